//! `keys init`: permissions on a NATS server. Makes a key for each process, certificates, and the server's config.

use std::fs::{DirBuilder, File};
use std::io::Write as _;
use std::net::Ipv6Addr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use bus::nats::is_host;
use nkeys::KeyPair;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer};

use crate::report::{print, quoted_path};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Create a key for every process of a cluster, TLS certificates, and the server config that uses them.
    Init(InitArgs),
}

#[derive(clap::Args)]
struct InitArgs {
    /// Output directory; must be empty or not exist.
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// Number of keys for actors.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=MAX_KEYS))]
    actors: u32,
    /// Number of keys for verifiers.
    #[arg(long, value_name = "M", value_parser = clap::value_parser!(u32).range(1..=MAX_KEYS))]
    verifiers: u32,
    /// Host name or IP address by which processes reach the server; repeatable.
    #[arg(long, value_name = "NAME", default_values_t = ["localhost".to_owned(), "127.0.0.1".to_owned()])]
    host: Vec<String>,
}

const MAX_KEYS: i64 = 10_000;

/// The config of a server, and the permissions of each role.
const SERVER: &str = include_str!("../deploy/nats/nats.conf");
const LEARNER: &str = include_str!("../deploy/nats/learner.conf");
const ACTOR: &str = include_str!("../deploy/nats/actor.conf");
const VERIFIER: &str = include_str!("../deploy/nats/verifier.conf");

pub(crate) fn run(args: &Args) -> Result<()> {
    let Command::Init(args) = &args.command;
    let folder = &args.folder;
    let is_free = folder.read_dir().map_or(true, |mut entries| entries.next().is_none());
    ensure!(
        is_free && !folder.is_file(),
        "{}: expected an empty or nonexistent directory, found files",
        folder.display()
    );
    // Checked before anything is written: an invalid name must change nothing.
    let is_name = |host: &str| is_host(host) || host.parse::<Ipv6Addr>().is_ok();
    if let Some(host) = args.host.iter().find(|host| !is_name(host)) {
        bail!("--host: expected a host name or an address, got {host:?}");
    }
    let certificates = Certificates::make(&args.host)?;
    let mut builder = DirBuilder::new();
    builder.recursive(true).mode(0o700).create(folder).with_context(|| format!("create {}", folder.display()))?;
    let actors = (0..args.actors).map(|number| (format!("actor-{number}"), ACTOR));
    let verifiers = (0..args.verifiers).map(|number| (format!("verifier-{number}"), VERIFIER));
    let mut users = "authorization {\n  users: [\n".to_owned();
    for (name, template) in std::iter::once(("learner".to_owned(), LEARNER)).chain(actors).chain(verifiers) {
        let pair = KeyPair::new_user();
        write_secret(&folder.join(format!("{name}.nk")), &format!("{}\n", pair.seed()?))?;
        users += &template.replace("NAME", &name).replace("KEY", &pair.public_key());
    }
    users += "  ]\n}\n";
    for (name, text) in [
        ("ca.pem", certificates.authority.as_str()),
        ("server.pem", &certificates.server),
        ("server.key", &certificates.server_key),
        ("users.conf", &users),
        ("nats.conf", SERVER),
    ] {
        write_secret(&folder.join(name), text)?;
    }
    let host = &args.host[0];
    let host = if host.contains(':') { format!("[{host}]") } else { host.clone() };
    let path = |name: &str| quoted_path(&folder.join(name));
    let joins = |name: &str| {
        format!("--bus tls://{host}:4222 --nkey {} --tls-ca {}", path(&format!("{name}.nk")), path("ca.pem"))
    };
    print(&format!(
        "{} keys in {}, one per process. Start the server:\n  cd {} && nats-server -c nats.conf\nStart the processes:\n  \
         autodidact learner smoke {}\n  autodidact actor {}\n  autodidact verifier {}",
        1 + args.actors + args.verifiers,
        folder.display(),
        quoted_path(folder),
        joins("learner"),
        joins("actor-0"),
        joins("verifier-0")
    ))
}

/// Certificates in PEM: a certificate authority for one server. The authority's key is not kept.
struct Certificates {
    authority: String,
    server: String,
    server_key: String,
}

impl Certificates {
    fn make(hosts: &[String]) -> Result<Certificates> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "autodidact");
        let key = rcgen::KeyPair::generate()?;
        let authority = params.self_signed(&key)?.pem();
        let issuer = Issuer::new(params, key);
        let server_key = rcgen::KeyPair::generate()?;
        let params = CertificateParams::new(hosts)
            .map_err(|error| anyhow!("--host: expected names and addresses, got {hosts:?}: {error}"))?;
        let server = params.signed_by(&server_key, &issuer)?.pem();
        Ok(Certificates { authority, server, server_key: server_key.serialize_pem() })
    }
}

/// Writes a new file that only its owner may read.
fn write_secret(path: &Path, text: &str) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let mut file = File::options().create_new(true).write(true).mode(0o600).open(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write().with_context(|| format!("write {}", path.display()))
}
