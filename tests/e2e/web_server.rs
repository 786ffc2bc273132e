//! A web server for tests, on a free port of this machine. The unit tests of `model get` use it too.

use std::collections::BTreeMap;
use std::io::{self, BufRead as _, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// A server that records what is requested. Each connection has one request. Its threads end with the test's process.
pub(crate) struct WebServer {
    url: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) path: String,
    /// Values by lower-case name.
    pub(crate) headers: BTreeMap<String, String>,
}

impl WebServer {
    /// Starts a server that answers with whatever `answer` writes.
    pub(crate) fn start(
        answer: impl Fn(&Request, &mut dyn Write) -> io::Result<()> + Send + Sync + 'static,
    ) -> WebServer {
        WebServer::start_over(Some, answer)
    }

    /// Starts a server whose connections are first wrapped, as in TLS, or refused.
    pub(crate) fn start_over<S: Read + Write>(
        wrap: impl Fn(TcpStream) -> Option<S> + Send + Sync + 'static,
        answer: impl Fn(&Request, &mut dyn Write) -> io::Result<()> + Send + Sync + 'static,
    ) -> WebServer {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (record, shared) = (requests.clone(), Arc::new((wrap, answer)));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (record, shared) = (record.clone(), shared.clone());
                std::thread::spawn(move || {
                    let (wrap, answer) = &*shared;
                    let Some(mut stream) = wrap(stream.unwrap()) else { return };
                    if let Some(request) = Request::read(&mut stream) {
                        record.lock().unwrap().push(request.clone());
                        // A client that has what it wants, or was killed, does not wait for the rest.
                        drop(answer(&request, &mut stream).and_then(|()| stream.flush()));
                    }
                });
            }
        });
        WebServer { url, requests }
    }

    /// Returns the URL of a path that begins with a slash.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("{}{path}", self.url)
    }

    /// Returns the requests since the last call.
    pub(crate) fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.requests.lock().unwrap())
    }
}

impl Request {
    fn read(stream: &mut impl Read) -> Option<Request> {
        let mut lines = BufReader::new(stream).lines().map_while(Result::ok).take_while(|line| !line.is_empty());
        let path = lines.next()?.split(' ').nth(1)?.to_owned();
        let header = |line: String| line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_owned()));
        Some(Request { path, headers: lines.filter_map(header).collect() })
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// Returns the first byte of the part of a file that is requested.
    pub(crate) fn begins_at(&self) -> Option<u64> {
        self.header("range")
            .map(|range| range.strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap().parse().unwrap())
    }
}

/// Writes a whole answer.
pub(crate) fn reply(out: &mut dyn Write, status: &str, headers: &[(&str, &str)], body: &[u8]) -> io::Result<()> {
    let length = body.len().to_string();
    begin_reply(out, status, &[headers, &[("Content-Length", &length)]].concat())?;
    out.write_all(body)
}

/// Writes an answer up to its body.
pub(crate) fn begin_reply(out: &mut dyn Write, status: &str, headers: &[(&str, &str)]) -> io::Result<()> {
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    out.write_all(format!("HTTP/1.1 {status}\r\n{headers}Connection: close\r\n\r\n").as_bytes())
}
