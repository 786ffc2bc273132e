//! `--metrics ADDR`: the HTTP endpoint for Prometheus and for health checks.

use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use hyper::body::Incoming;
use hyper::header::CONTENT_TYPE;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::TEXT_FORMAT;

/// A process that serves metrics and readiness.
pub(crate) trait Scraped: Send + Sync + 'static {
    /// Returns the metrics in Prometheus' text format.
    ///
    /// # Errors
    /// When no metrics are available yet, with the reason.
    fn text(&self) -> Result<String>;

    /// Whether the process does its work. The error is the reason why not.
    fn readiness(&self) -> Result<(), String>;
}

/// A bound address.
#[derive(Debug)]
pub(crate) struct Listener {
    listener: TcpListener,
    pub(crate) address: SocketAddr,
}

impl Listener {
    /// Binds an address. Port 0 binds any free port.
    pub(crate) fn bind(address: &str) -> Result<Listener> {
        let bind = || -> std::io::Result<Listener> {
            let listener = TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            Ok(Listener { address: listener.local_addr()?, listener })
        };
        bind().map_err(|error| {
            anyhow!("--metrics: expected a free address, such as 127.0.0.1:9100, got {address}: {error}")
        })
    }

    /// Answers `/metrics`, `/healthz` and `/readyz` for as long as the runtime is alive.
    pub(crate) fn serve(self, metrics: Arc<dyn Scraped>) -> Result<()> {
        let listener = tokio::net::TcpListener::from_std(self.listener).context("serve metrics")?;
        tokio::spawn(answer_all(listener, metrics));
        Ok(())
    }
}

async fn answer_all(listener: tokio::net::TcpListener, metrics: Arc<dyn Scraped>) {
    loop {
        let (stream, _) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "failed to accept a metrics connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let metrics = metrics.clone();
        let answer = service_fn(move |request| {
            let response = answer(metrics.as_ref(), &request);
            async { Ok::<_, Infallible>(response) }
        });
        // One request per connection, so that a scraper that does not read holds no resources for long.
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(CONNECTION_LIMIT)
            .keep_alive(false)
            .serve_connection(TokioIo::new(stream), answer);
        tokio::spawn(tokio::time::timeout(CONNECTION_LIMIT, connection));
    }
}

const CONNECTION_LIMIT: Duration = Duration::from_secs(10);

/// Pause after a failed accept, for example when file handles run out, which takes time to clear.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

fn answer(metrics: &dyn Scraped, request: &Request<Incoming>) -> Response<String> {
    let (status, content_type, body) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => match metrics.text() {
            Ok(text) => (StatusCode::OK, TEXT_FORMAT, text),
            Err(error) => (StatusCode::SERVICE_UNAVAILABLE, PLAIN, format!("{error}\n")),
        },
        (&Method::GET, "/healthz") => (StatusCode::OK, PLAIN, "ok\n".to_owned()),
        (&Method::GET, "/readyz") => match metrics.readiness() {
            Ok(()) => (StatusCode::OK, PLAIN, "ok\n".to_owned()),
            Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, PLAIN, format!("{reason}\n")),
        },
        (&Method::GET, _) => (StatusCode::NOT_FOUND, PLAIN, "expected /metrics, /healthz or /readyz\n".to_owned()),
        _ => (StatusCode::METHOD_NOT_ALLOWED, PLAIN, "expected GET\n".to_owned()),
    };
    let response = Response::builder().status(status).header(CONTENT_TYPE, content_type).body(body);
    response.expect("status and header are constants")
}

const PLAIN: &str = "text/plain; charset=utf-8";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_address_is_refused() {
        let taken = Listener::bind("127.0.0.1:0").unwrap();
        let address = taken.address.to_string();
        let refusal = Listener::bind(&address).unwrap_err().to_string();
        assert!(refusal.starts_with("--metrics: expected a free address"), "{refusal}");
        assert!(refusal.contains(&format!("got {address}: ")), "{refusal}");
        assert!(Listener::bind("nonsense").unwrap_err().to_string().contains("got nonsense: "));
    }
}
