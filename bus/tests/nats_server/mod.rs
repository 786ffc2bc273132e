//! A nats-server of a test's own: on a free port, with its store in a folder that goes away with it.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;
use tokio::time::Instant;

/// A server that runs until it is dropped.
pub(crate) struct NatsServer {
    folder: TempDir,
    port: u16,
    child: Child,
    /// Where its config is, if it has one.
    config: Option<PathBuf>,
    scheme: &'static str,
}

/// The longest wait for a server to answer.
const START_LIMIT: Duration = Duration::from_secs(30);

impl NatsServer {
    pub(crate) fn start() -> NatsServer {
        NatsServer::start_with(tempfile::tempdir().unwrap(), None, "nats")
    }

    /// Starts a server with this config, and nothing besides.
    #[allow(dead_code, reason = "not every suite that starts servers configures them")]
    pub(crate) fn with_config(config: &str) -> NatsServer {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("nats.conf"), config).unwrap();
        let path = folder.path().to_owned();
        NatsServer::start_with(folder, Some(path), "nats")
    }

    /// Starts a server with the config in a folder that `keys init` made.
    #[allow(dead_code, reason = "not every suite that starts servers has keys")]
    pub(crate) fn with_keys(keys: &Path) -> NatsServer {
        NatsServer::start_with(tempfile::tempdir().unwrap(), Some(keys.to_owned()), "tls")
    }

    fn start_with(folder: TempDir, config: Option<PathBuf>, scheme: &'static str) -> NatsServer {
        // The server takes a free port and says which.
        let child = spawn(folder.path(), config.as_deref(), -1);
        let port = wait_for_port(folder.path());
        NatsServer { folder, port, child, config, scheme }
    }

    pub(crate) fn url(&self) -> String {
        format!("{}://127.0.0.1:{}", self.scheme, self.port)
    }

    /// Returns its address with a user and password, or a token, before the host.
    #[allow(dead_code, reason = "not every suite that starts servers configures them")]
    pub(crate) fn url_of(&self, login: &str) -> String {
        self.url().replace("://", &format!("://{login}@"))
    }

    /// Kills the server with SIGKILL.
    #[allow(dead_code, reason = "not every suite that starts servers kills them")]
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again where it was.
    #[allow(dead_code, reason = "not every suite that starts servers kills them")]
    pub(crate) fn restart(&mut self) {
        for entry in std::fs::read_dir(self.folder.path()).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "ports") {
                std::fs::remove_file(path).unwrap();
            }
        }
        self.child = spawn(self.folder.path(), self.config.as_deref(), i32::from(self.port));
        wait_for_port(self.folder.path());
    }

    /// Has it read its config again.
    #[allow(dead_code, reason = "not every suite that starts servers has keys")]
    pub(crate) fn reload(&self) {
        assert!(Command::new("kill").args(["-HUP", &self.child.id().to_string()]).status().unwrap().success());
    }

    /// Removes everything that a killed server had stored.
    #[allow(dead_code, reason = "not every suite that starts servers wipes them")]
    pub(crate) fn wipe(&self) {
        std::fs::remove_dir_all(self.folder.path().join("store")).unwrap();
    }
}

impl Drop for NatsServer {
    fn drop(&mut self) {
        // Both fail when it was killed before, which is as well.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn spawn(folder: &Path, config: Option<&Path>, port: i32) -> Child {
    let log = File::create(folder.join("log")).unwrap();
    let mut command = Command::new(binary());
    command.args(["-a", "127.0.0.1", "-p", &port.to_string()]);
    command.arg("--ports_file_dir").arg(folder);
    match config {
        // It says itself where the store is.
        Some(config) => command.args(["-c", "nats.conf"]).current_dir(config),
        None => command.args(["-js", "-sd"]).arg(folder.join("store")),
    };
    command.stdout(Stdio::null()).stderr(log);
    command.spawn().unwrap()
}

fn wait_for_port(folder: &Path) -> u16 {
    let began = Instant::now();
    loop {
        let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let ports = entries.filter(|path| path.extension().is_some_and(|extension| extension == "ports"));
        // `{"nats":["nats://127.0.0.1:40001"]}`, once it is written in full.
        let text = ports.filter_map(|path| std::fs::read_to_string(path).ok()).find(|text| text.contains('}'));
        let port = text.and_then(|text| text.split(':').next_back()?.split('"').next()?.parse().ok());
        if let Some(port) = port {
            return port;
        }
        if began.elapsed() > START_LIMIT {
            let mut log = String::new();
            File::open(folder.join("log")).unwrap().read_to_string(&mut log).unwrap();
            panic!("nats-server did not start:\n{log}");
        }
        std::thread::park_timeout(Duration::from_millis(10));
    }
}

/// Finds the server: `NATS_SERVER` names one, otherwise `tests/setup.sh` has put one into the target folder.
fn binary() -> PathBuf {
    std::env::var_os("NATS_SERVER").map_or_else(|| tool("nats/bin/nats-server"), PathBuf::from)
}

/// Finds what `tests/setup.sh` has put into the target folder.
pub(crate) fn tool(path: &str) -> PathBuf {
    let target = std::env::current_exe().unwrap();
    let found = target.ancestors().map(|folder| folder.join("tools").join(path)).find(|path| path.exists());
    found.unwrap_or_else(|| panic!("tests need {path} in the target folder's tools: run `sh tests/setup.sh`"))
}
