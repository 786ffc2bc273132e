//! The process and its run directory: files are moved or removed and signals arrive during a run, and the run reports it.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use tokio::time::Instant;

use crate::cluster::Cluster;
use crate::runs::{Ended, Folder, NUM_STEPS, Process, reference, signal, wait_until};

/// A run that goes on until it is stopped, and writes no checkpoint before that.
const LONG: [&str; 8] = [
    "train",
    "smoke",
    "--run-dir",
    "run",
    "--set",
    "schedule.num_steps=100000",
    "--set",
    "local.checkpoint_every=1000000",
];

/// How soon a process must end when it is told to, whatever it waits for.
const PROMPT: Duration = Duration::from_secs(20);

/// Suspends a long run, calls `disturb` to change its folder, and lets it go on.
fn disturbed(folder: &Folder, disturb: impl FnOnce()) -> Process {
    let run = folder.start(&LONG);
    wait_until("step 3", || folder.last_step() >= 3);
    run.freeze();
    disturb();
    run.thaw();
    run
}

#[test]
fn a_run_whose_folder_is_moved_ends_and_writes_nothing_in_its_place() {
    for is_interrupted in [false, true] {
        let folder = Folder::new();
        let mut another = None;
        let run = disturbed(&folder, || {
            std::fs::rename(folder.path("run"), folder.path("moved")).unwrap();
            folder.call(&["train", "smoke", "--steps", "20", "--run-dir", "run"]).success();
            another = Some(of_run(&folder));
        });
        if is_interrupted {
            run.interrupt();
        }
        let ended = run.end();
        assert!(!ended.status.success(), "{ended:#?}");
        // The error names the file that the run checks first. The interrupt may be answered before or after it.
        let error = ended.stderr.lines().find_map(|line| line.strip_prefix("error: run/"));
        let says = error.and_then(|error| error.split_once(": ")).map(|(_, says)| says);
        let moved =
            "expected the file that this process has open, got another file: the original was moved or replaced";
        assert_eq!(says, Some(moved), "{ended:#?}");
        assert_eq!(of_run(&folder), another.unwrap(), "what is another run's is left alone");
        assert!(!folder.path("moved/checkpoints").exists() && !folder.path("moved/curves.svg").exists());
        // In its new place the run can be resumed.
        folder.call(&["train", "--resume", "--run-dir", "moved", "--dry-run"]).success();
    }
}

/// Returns the names and bytes of the files in `run`.
fn of_run(folder: &Folder) -> crate::runs::Files {
    let mut files = folder.files();
    files.retain(|name, _| name.starts_with("run/"));
    files
}

#[test]
fn a_run_ends_when_what_it_writes_is_removed() {
    for removed in ["run", "run/LOCK", "run/journal", "run/journal/00000000.log", "run/metrics.jsonl"] {
        let folder = Folder::new();
        let path = folder.path(removed);
        let run = disturbed(&folder, || match path.is_dir() {
            true => std::fs::remove_dir_all(&path).unwrap(),
            false => std::fs::remove_file(&path).unwrap(),
        });
        let ended = run.end();
        // For a folder the error may name any file in it: the process may check while the folder is being removed.
        let (named, says) = ended.refusal().split_once(": ").unwrap();
        assert!(named.starts_with(removed), "{removed}: {ended:#?}");
        assert!(says.starts_with("expected the file that this process has open, got No such file"), "{ended:#?}");
        assert!(!path.exists(), "{removed} is not made again");
    }
}

/// A study whose file of rows is removed ends, instead of writing rows that nobody can find.
#[test]
fn a_study_ends_when_its_rows_are_removed() {
    let folder = Folder::new();
    let study = "control = \"a\"\nseeds = [0]\nsamples = 1\nexams = [\"countdown-3\"]\nsplit = \"dev\"\nsteps = 100\n\
                 [[arm]]\nname = \"a\"\npreset = \"smoke\"\n";
    std::fs::write(folder.path("mine.toml"), study).unwrap();
    let process = folder.start(&["study", "mine.toml"]);
    let rows = folder.path("runs/study-mine/study.csv");
    wait_until("its first run", || rows.exists() && rows.parent().unwrap().read_dir().unwrap().count() > 1);
    std::fs::remove_file(&rows).unwrap();
    let says = "runs/study-mine/study.csv: expected the file that this process has open, got No such file";
    assert!(process.end().refusal().starts_with(says));
}

/// Only checkpoints that the journal leads to are the run's: another run's checkpoint in its folder is not scored as its own.
#[test]
fn a_checkpoint_of_another_run_is_not_scored() {
    let folder = Folder::holding(&reference(0).files);
    let steps = (NUM_STEPS + 10).to_string();
    folder.call(&["train", "smoke", "--seed", "1", "--steps", &steps, "--run-dir", "other"]).success();
    let checkpoint = |run: &str, step: u64| format!("{run}/checkpoints/step_{step:08}");
    let copy = |step: u64| {
        let (from, to) = (folder.path(&checkpoint("other", step)), folder.path(&checkpoint("run", step)));
        std::fs::create_dir_all(&to).unwrap();
        for entry in from.read_dir().unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    };
    let eval = ["--exam", "countdown-3", "--split", "dev", "--samples", "1"];
    // One is later than the run, the other replaces one of the run's own.
    for (foreign, used) in [(NUM_STEPS + 10, 40), (NUM_STEPS, 30)] {
        copy(foreign);
        let ended = folder.call(&[&["eval", "run"], &eval[..]].concat()).success();
        assert!(ended.stdout.contains(&format!("200 problems, step {used}\n")), "{ended:#?}");
        let says = format!("checkpoint rejected, using an earlier one: its step {foreign} is not in the journal\n");
        assert!(ended.stderr.ends_with(&says), "{ended:#?}");
        let ended = folder.call(&["solve", "run", "3 7 25 -> 82", "--samples", "1"]).success();
        assert!(ended.stdout.contains(&format!("(step {used})")), "{ended:#?}");
        let named = checkpoint("run", foreign);
        let ended = folder.call(&[&["eval", &named], &eval[..]].concat());
        let says = format!("{named}: ");
        assert!(
            ended.refusal().starts_with(&says) && ended.refusal().contains("the checkpoint is from another run"),
            "{ended:#?}"
        );
    }
    folder.call(&[&["eval", &checkpoint("run", 30)], &eval[..]].concat()).success();
    folder.call(&[&["eval", &checkpoint("other", 50)], &eval[..]].concat()).success();
}

#[test]
fn runs_that_begin_together_have_folders_of_their_own() {
    let folder = Folder::new();
    let runs: Vec<Process> = (0..8).map(|_| folder.start(&["train", "smoke", "--steps", "2", "--json"])).collect();
    let folder_of = |process: Process| {
        let ended = process.end().success();
        let summary: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
        summary["run_dir"].as_str().unwrap().to_owned()
    };
    let taken: BTreeSet<String> = runs.into_iter().map(folder_of).collect();
    let expected: BTreeSet<String> = (1..=8).map(|number| format!("runs/smoke-0-{number}")).collect();
    assert_eq!(taken, expected);
}

/// Every command that may wait forever installs its signal handlers before it waits, and ends when it is told to.
#[test]
fn what_waits_for_a_server_ends_when_it_is_told_to() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let url = format!("nats://127.0.0.1:{port}");
    for (args, is_success) in [
        (&["learner", "smoke", "--run-dir", "run", "--bus", &url][..], false),
        (&["actor", "--bus", &url], true),
        (&["verifier", "--bus", &url], true),
    ] {
        for tell in [Process::terminate, Process::interrupt, Process::hang_up] {
            let folder = Folder::new();
            let process = folder.start(args);
            wait_until("handlers", || listens(process.id()));
            tell(&process);
            let told = Instant::now();
            let ended = process.end();
            assert!(told.elapsed() < PROMPT, "{ended:#?}");
            assert_eq!(ended.status.success(), is_success, "{ended:#?}");
            assert!(ended.stderr.starts_with("stopping: "), "{ended:#?}");
            assert_eq!(folder.path("").read_dir().unwrap().count(), 0, "nothing is left: {ended:#?}");
        }
    }
}

/// Process 1 of a container has no default signal actions. `verify` waits for its input, the others for a server.
#[test]
fn process_1_ends_when_it_is_told_to() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let url = format!("nats://127.0.0.1:{port}");
    let learner = ["learner", "smoke", "--run-dir", "run", "--bus", &url];
    // Root does not need the user namespace; other users need it to make a PID namespace.
    let unshare = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"];
    let as_process_1 = |args: &[&str]| {
        let mut command = Command::new(unshare[0]);
        command.args(&unshare[1..]).args(args);
        command
    };
    let may_have_another = as_process_1(&["true"]).stderr(Stdio::null()).status().is_ok_and(|status| status.success());
    for (args, status) in [(&learner[..], 1), (&["actor", "--bus", &url], 0), (&["verify"], 143)] {
        let folder = Folder::new();
        let program = env!("CARGO_BIN_EXE_autodidact");
        let mut command = match may_have_another {
            true => as_process_1(&[&[program], args].concat()),
            // In a container that permits no other, the commands that wait must catch signals all the same.
            false if args == ["verify"] => continue,
            false => {
                let mut command = Command::new(program);
                command.args(args);
                command
            }
        };
        command.stdin(Stdio::piped());
        let process = folder.start_command(command);
        let children = format!("/proc/{0}/task/{0}/children", process.id());
        let told_process = || match may_have_another {
            true => std::fs::read_to_string(&children).ok()?.trim().parse().ok(),
            false => Some(process.id()),
        };
        wait_until("a process that listens", || told_process().is_some_and(listens));
        if args != ["verify"] {
            // Process 1 listens from its beginning, and ends at once until it knows how its command ends in order.
            wait_until("it to wait for a server", || process.said_so_far().contains("still trying to connect to "));
        }
        signal("-TERM", told_process().unwrap());
        let told = Instant::now();
        let ended = process.end();
        assert!(told.elapsed() < PROMPT, "{ended:#?}");
        assert_eq!(ended.status.code(), Some(status), "{ended:#?}");
        assert_eq!(ended.stderr.matches("stopping: ").count(), usize::from(args != ["verify"]), "{ended:#?}");
    }
}

/// Whether a process catches SIGHUP, SIGINT and SIGTERM.
fn listens(process: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let mask = mask.map_or(0, |mask| u64::from_str_radix(mask.trim(), 16).unwrap());
    [1, 2, 15].iter().all(|signal| mask >> (signal - 1) & 1 == 1)
}

#[test]
fn a_terminal_that_goes_away_stops_a_run_with_a_checkpoint() {
    let folder = Folder::new();
    let run = folder.start(&LONG);
    wait_until("step 3", || folder.last_step() >= 3);
    run.hang_up();
    wait_until("the run to stop", || run.said_so_far().contains("stopping: writing a checkpoint"));
    // Both the shell and the kernel send the signal.
    signal_if_it_runs(&run);
    let ended = run.end().success();
    assert_eq!(folder.checkpoints(), [folder.last_step()]);
    let resumed = ended.printed("resume with: ");
    assert_eq!(resumed, "autodidact train --resume --run-dir run");
}

fn signal_if_it_runs(process: &Process) {
    drop(Command::new("kill").args(["-HUP", &process.id().to_string()]).stderr(Stdio::null()).status());
}

/// Without its terminal, the run cannot even write its messages.
#[test]
fn a_run_outlives_its_terminal_until_its_checkpoint_is_written() {
    let folder = Folder::new();
    let mut command = Command::new("script");
    // The shell passes the signal on, as shells do when their terminal goes, and stays to record how the run ended.
    let line = format!(
        "trap 'kill -HUP $run' HUP; {} {} & run=$!; wait $run; ended=$?; [ $ended -le 128 ] || {{ wait $run; ended=$?; }}; \
         echo $ended > status",
        env!("CARGO_BIN_EXE_autodidact"),
        LONG.join(" "),
    );
    command.args(["--quiet", "--return", "--command", &line, "/dev/null"]).env("SHELL", "/bin/sh");
    let terminal = folder.start_command(command);
    wait_until("step 3", || folder.last_step() >= 3);
    terminal.kill();
    let status = || std::fs::read_to_string(folder.path("status")).unwrap_or_default();
    wait_until("the run to end", || status().ends_with('\n'));
    assert_eq!(status(), "0\n");
    assert_eq!(folder.checkpoints(), [folder.last_step()]);
}

/// Ignores SIGHUP, as under nohup.
#[test]
fn a_run_that_is_to_outlive_its_terminal_does() {
    let folder = Folder::new();
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' HUP; exec \"$0\" train smoke --run-dir run", env!("CARGO_BIN_EXE_autodidact")]);
    let run = folder.start_command(command);
    wait_until("step 3", || folder.last_step() >= 3);
    run.hang_up();
    run.end().success();
    folder.history().assert_steps_of(&reference(0).history);
}

/// A folder whose name begins with a dash: commands that are printed for the user run exactly as printed.
#[test]
fn commands_run_as_they_are_printed() {
    let folder = Folder::new();
    let run = folder.start(&["train", "smoke", "--run-dir=-x", "--set", "schedule.num_steps=100000"]);
    wait_until("checkpoints", || folder.path("-x/checkpoints").exists());
    run.interrupt();
    let ended = run.end().success();
    let command = ended.printed("resume with: ");
    assert_eq!(command, "autodidact train --resume --run-dir ./-x");
    let resumed = folder.start_command(shell(command));
    wait_until("it to go on", || resumed.printed_so_far().contains("resumed at step "));
    resumed.interrupt();
    resumed.end().success();
    let ended = folder.call(&["train", "smoke", "--steps", "1", "--set", "schedule.warmup_steps=1", "--run-dir=-y"]);
    let ended = ended.success();
    for label in ["reproduce the weights with: ", "test exams: "] {
        let command = ended.printed(label);
        assert!(!command.contains(" -y"), "{command}");
        folder.call_printed(command).success();
    }
    let refused = folder.call(&["train", "smoke", "--run-dir=-y"]);
    assert!(refused.refusal().contains("resume it with `--resume --run-dir ./-y`"), "{refused:#?}");
}

fn shell(printed: &str) -> Command {
    let args = printed.strip_prefix("autodidact ").unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", &format!("exec \"$0\" {args}"), env!("CARGO_BIN_EXE_autodidact")]);
    command
}

/// On a terminal the log has colours, unless the user or the terminal disables them.
#[test]
fn colours_are_for_those_who_want_them() {
    let on_terminal = |args: &str, set: &[(&str, &str)]| {
        let folder = Folder::new();
        let mut command = Command::new("script");
        let line = format!("{} {args}", env!("CARGO_BIN_EXE_autodidact"));
        command
            .args(["--quiet", "--return", "--command", &line, "/dev/null"])
            .env("TERM", "xterm")
            // A continuous integration service counts as a terminal with colours, whatever its TERM.
            .env_remove("CI")
            .envs(set.iter().copied());
        folder.start_command(command).end()
    };
    let train = "train smoke --steps 1 --run-dir run";
    for (args, log) in [(train, "info"), ("train --nonsense", "")] {
        let is_coloured = |set: &[(&str, &str)]| {
            let ended: Ended = on_terminal(args, &[&[("RUST_LOG", log)], set].concat());
            assert!(ended.stdout.contains("checkpoint written") || ended.stdout.contains("--nonsense"), "{ended:#?}");
            ended.stdout.contains('\x1b')
        };
        assert!(is_coloured(&[]) && is_coloured(&[("NO_COLOR", "")]), "{args}");
        assert!(!is_coloured(&[("NO_COLOR", "1")]) && !is_coloured(&[("TERM", "dumb")]), "{args}");
    }
}

#[test]
fn a_log_that_asks_for_nothing_has_what_it_has_by_default() {
    let cluster = Cluster::new();
    let fault = "local.bus.fault={drop=0.1,duplicate=0.1,reorder=0.1,seed=1}";
    let mut command = Command::new(env!("CARGO_BIN_EXE_autodidact"));
    command.args(["learner", "smoke", "--run-dir", "run", "--bus", &cluster.server.url(), "--set", fault]);
    command.env("RUST_LOG", "");
    let learner = cluster.folder.start_command(command);
    wait_until("a warning", || learner.said_so_far().contains("WARN"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_autodidact"));
    command.arg("domains").env("RUST_LOG", "learner=loud");
    let refused = cluster.folder.start_command(command).end();
    assert!(refused.refusal().starts_with("RUST_LOG: expected levels such as info or "), "{refused:#?}");
}

/// The errors that a user meets first: one clear message for each.
#[test]
fn first_errors_say_what_to_do() {
    let folder = Folder::new();
    let ended = folder.call(&[]);
    assert_eq!(ended.status.code(), Some(2), "{ended:#?}");
    assert!(ended.stderr.contains("Usage: autodidact <COMMAND>") && ended.stderr.contains("  train "), "{ended:#?}");
    assert!(folder.call(&["--help"]).success().stdout.contains("Usage: autodidact <COMMAND>"));
    let presets = "config: expected one of laptop, ladder, qwen3-0.6b, smoke, smollm2, smollm2-lora, or a TOML file, got \"lapotp\": No such file";
    for args in [&["train", "lapotp"][..], &["config", "lapotp"], &["learner", "lapotp", "--bus", "nats://127.0.0.1:1"]]
    {
        assert!(folder.call(args).refusal().starts_with(presets), "{args:?}");
    }
    std::fs::write(folder.path("runs"), "mine").unwrap();
    for (run_dir, says) in [("runs/mine", "create runs/mine: "), ("runs", "create runs: ")] {
        assert!(folder.call(&["train", "smoke", "--run-dir", run_dir]).refusal().starts_with(says), "{run_dir}");
    }
    let nowhere = folder.call(&["train", "smoke"]);
    assert!(nowhere.refusal().starts_with("create runs; use --run-dir to choose another directory: "), "{nowhere:#?}");
    assert_eq!(std::fs::read(folder.path("runs")).unwrap(), b"mine");
    for command in ["eval", "replay", "inspect"] {
        let ended = folder.call(&[command, "absent"]);
        assert!(ended.refusal().starts_with("absent: expected a run"), "{ended:#?}");
    }
    assert!(!Path::new(&folder.path("absent")).exists());
}
