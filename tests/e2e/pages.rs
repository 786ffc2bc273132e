//! Runs the commands of docs/cluster.md as they are written there, so that the page stays correct.

use std::net::TcpListener;
use std::process::Command;

use crate::nats_server::tool;
use crate::runs::{Folder, Process, wait_until};

const PAGE: &str = include_str!("../../docs/cluster.md");

/// Returns the commands under a heading.
fn commands(heading: &str) -> Vec<String> {
    let (_, section) = PAGE.split_once(&format!("\n## {heading}\n")).expect("the page has the heading");
    let section = section.split("\n## ").next().unwrap();
    let blocks = section.split("```sh\n").skip(1).map(|block| block.split("```").next().unwrap());
    blocks.flat_map(str::lines).map(str::to_owned).collect()
}

/// Starts a command as a shell does, with a free port for the server instead of the usual one.
fn start(folder: &Folder, port: u16, command: &str) -> Process {
    let mut shell = Command::new("sh");
    let own = std::path::Path::new(env!("CARGO_BIN_EXE_autodidact")).parent().unwrap().to_owned();
    let server = tool("nats/bin/nats-server").parent().unwrap().to_owned();
    let path = std::env::join_paths(
        [own, server].into_iter().chain(std::env::split_paths(&std::env::var_os("PATH").unwrap())),
    );
    let command =
        command.replace(":4222", &format!(":{port}")).replace("nats-server ", &format!("nats-server -p {port} "));
    // A command after `&&` replaces the shell too, so that signals reach it.
    let command =
        command.rsplit_once("&& ").map_or(format!("exec {command}"), |(first, last)| format!("{first}&& exec {last}"));
    shell.args(["-euc", &command]).env("PATH", path.unwrap());
    folder.start_command(shell)
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Starts a server, a learner and its workers, and waits for the run to end.
fn run(folder: &Folder, commands: &[String]) {
    let port = free_port();
    let mut processes: Vec<Process> = commands.iter().map(|command| start(folder, port, command)).collect();
    let server = processes.remove(0);
    for process in processes {
        let ended = process.end().success();
        assert_eq!(ended.stderr.lines().find(|line| line.contains("ERROR")), None, "{ended:#?}");
    }
    server.terminate();
    server.end();
}

#[test]
fn a_run_on_one_machine() {
    let folder = Folder::new();
    let store = folder.path("nats");
    let commands: Vec<String> = commands("On one machine")
        .into_iter()
        .map(|command| command.replace("/tmp/nats", store.to_str().unwrap()))
        .collect();
    assert!(commands.len() == 4 && commands[0].starts_with("nats-server "), "{commands:?}");
    run(&folder, &commands);
}

/// Runs the commands that `keys init` prints, too.
#[test]
fn a_run_with_keys() {
    let folder = Folder::new();
    let commands = commands("With keys");
    let [init] = &commands[..] else { panic!("expected one command, got {commands:?}") };
    let init = start(&folder, 4222, &init.replace("nats.example.com", "127.0.0.1"));
    wait_until("keys", || init.printed_so_far().contains("autodidact verifier "));
    let printed = init.end().success().stdout;
    let commands: Vec<String> = printed.lines().filter_map(|line| line.strip_prefix("  ")).map(str::to_owned).collect();
    assert_eq!(commands.len(), 4, "{printed}");
    run(&folder, &commands);
}
