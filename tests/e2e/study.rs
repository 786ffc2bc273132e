//! A study: which runs it starts, which it does not repeat, and what one failed run costs.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use crate::pretrained;
use crate::runs::{Ended, Files, Folder, History, wait_until};

const STUDY: &str = "
control = \"policy\"
seeds = [0, 1]
samples = 2
exams = [\"countdown-3\"]
split = \"dev\"
steps = 4

[[arm]]
name = \"policy\"
preset = \"smoke\"

[[arm]]
name = \"random\"
config = \"random.toml\"
set = [\"learner.reuse=1\"]
";

/// The default folder of the study's runs and rows.
const DIR: &str = "runs/study-mine";

#[test]
fn every_arm_meets_every_seed_once() {
    let folder = folder(STUDY);
    let planned = folder.call(&["study", "mine.toml", "--dry-run"]).success();
    let commands: Vec<&str> = planned.stdout.lines().filter_map(|line| line.strip_prefix("to start: ")).collect();
    assert_eq!(commands.len(), 4, "{planned:#?}");
    assert!(!folder.path("runs").exists(), "a dry run writes nothing");

    let ended = study(&folder).success();
    let rows = rows(&folder);
    let (header, rows) = rows.split_first().unwrap();
    assert!(header.starts_with("arm,seed,manifest,steps,trained_tokens,cpu_seconds,wall_seconds,exam,split,"));
    let begins: Vec<String> = rows.iter().map(|row| row.split(',').take(2).collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(begins, ["policy 0", "random 0", "policy 1", "random 1"], "seed by seed");
    assert!(rows.iter().all(|row| row.contains(",4,") && row.contains(",countdown-3,dev,200,")), "{rows:#?}");
    assert!(ended.stdout.contains("minus policy, in points"), "{ended:#?}");

    // The commands of the plan are the runs of the study.
    let run_dir = commands[3].split_once("--run-dir ").unwrap().1;
    let by_study = History::read(&folder.path(run_dir));
    folder.call_printed(&commands[3].replace(run_dir, "by-hand")).success();
    assert_eq!(History::read(&folder.path("by-hand")), by_study);

    let before = folder.files();
    let again = study(&folder).success();
    assert!(!again.stdout.contains("[1/4]"), "{again:#?}");
    assert!(again.stdout.ends_with(&table(&ended)), "the table is the same: {again:#?}");
    assert_eq!(folder.files(), before, "what is finished is left alone");
    let planned = folder.call(&["study", "mine.toml", "--dry-run"]).success();
    assert_eq!(planned.stdout.matches("finished: autodidact train ").count(), 4, "{planned:#?}");
}

#[test]
fn an_arm_that_is_added_or_changed_runs_and_the_others_do_not() {
    let folder = folder(&STUDY.replace("seeds = [0, 1]", "seeds = [0]"));
    let ended = study(&folder).success();
    assert!(ended.stdout.contains("no interval from one pair"), "{ended:#?}");
    std::fs::write(folder.path("random.toml"), "preset = \"smoke\"\n[learner]\nreuse = 1.5\n").unwrap();
    let study_file = STUDY.replace("seeds = [0, 1]", "seeds = [0]").replace("reuse=1", "hindsight=false");
    std::fs::write(folder.path("mine.toml"), &study_file).unwrap();
    let ended = study(&folder).success();
    assert!(ended.stdout.starts_with("[2/2] random seed 0: "), "{ended:#?}");
    assert_eq!(rows(&folder).len(), 1 + 3, "the old row stays");
    let summary: serde_json::Value =
        serde_json::from_str(&folder.call(&["study", "mine.toml", "--json"]).success().stdout).unwrap();
    let costs = summary["costs"].as_array().unwrap();
    assert!(costs.len() == 2 && costs.iter().all(|cost| cost["n"] == 1), "and is not in the table: {summary}");
}

#[test]
fn ctrl_c_is_passed_on_and_the_study_goes_on_from_there() {
    let folder = folder(&STUDY.replace("steps = 4", "steps = 300").replace("seeds = [0, 1]", "seeds = [0]"));
    let process = folder.start(&["study", "mine.toml"]);
    let run_dir = || {
        let entries = std::fs::read_dir(folder.path(DIR)).into_iter().flatten();
        let paths = entries.map(|entry| entry.unwrap().path());
        paths.filter(|path| path.join("metrics.jsonl").exists()).collect::<Vec<_>>()
    };
    let steps = |folder: &Path| std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap().lines().count();
    wait_until("a few steps", || run_dir().first().is_some_and(|run_dir| steps(run_dir) > 5));
    process.interrupt();
    let ended = process.end().success();
    assert!(ended.stderr.contains("stopping: writing a checkpoint"), "{ended:#?}");
    assert!(ended.stderr.ends_with("stopped; resume with: autodidact study mine.toml\n"), "{ended:#?}");
    assert_eq!(run_dir().len(), 1, "the next run did not start");
    assert!(run_dir()[0].join("checkpoints").exists(), "{ended:#?}");
    assert_eq!(rows(&folder).len(), 0);

    let planned = folder.call(&["study", "mine.toml", "--dry-run"]).success();
    assert!(planned.stdout.starts_with("to resume: autodidact train "), "{planned:#?}");
    study(&folder).success();
    assert_eq!(rows(&folder).len(), 1 + 2);
    let command = planned.stdout.lines().next().unwrap().strip_prefix("to resume: ").unwrap();
    let (start, run_dir) = command.split_once(" --run-dir ").unwrap();
    folder.call_printed(&format!("{start} --run-dir undisturbed")).success();
    assert_eq!(History::read(&folder.path(run_dir)), History::read(&folder.path("undisturbed")));
}

#[test]
fn a_row_that_a_crash_cut_short_is_written_again() {
    let folder = folder(&STUDY.replace("seeds = [0, 1]", "seeds = [0]"));
    let whole = table(&study(&folder).success());
    let path = folder.path(DIR).join("study.csv");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 20]).unwrap();
    let journals = |files: Files| files.into_iter().filter(|(name, _)| name.ends_with(".log")).collect::<Files>();
    let before = journals(folder.files());
    let ended = study(&folder).success();
    assert!(ended.stderr.starts_with("runs/study-mine/study.csv: "), "{ended:#?}");
    assert!(ended.stderr.contains("study.csv: removed an incomplete line of "), "{ended:#?}");
    assert!(ended.stderr.ends_with(" bytes from the end\n"), "{ended:#?}");
    let scores = |row: &str| row.split(',').skip(7).map(str::to_owned).collect::<Vec<_>>();
    let written = String::from_utf8(bytes).unwrap();
    let expected: Vec<_> = written.lines().map(scores).collect();
    assert_eq!(rows(&folder).iter().map(|row| scores(row)).collect::<Vec<_>>(), expected);
    assert_eq!(journals(folder.files()), before, "nothing was trained again");
    let pairs = |table: &str| table.lines().filter(|line| line.contains("pairs")).count();
    assert_eq!(pairs(&table(&ended)), pairs(&whole));
}

#[test]
fn a_run_that_fails_takes_nothing_else_with_it() {
    let folder = folder(&STUDY.replace("seeds = [0, 1]", "seeds = [0]"));
    let planned = folder.call(&["study", "mine.toml", "--dry-run"]).success();
    let run_dir = planned.stdout.lines().next().unwrap().split_once("--run-dir ").unwrap().1;
    std::fs::create_dir_all(folder.path(run_dir)).unwrap();
    std::fs::write(folder.path(run_dir).join("note.txt"), "in the way").unwrap();
    let ended = study(&folder);
    assert_eq!(ended.status.code(), Some(1), "{ended:#?}");
    assert!(ended.stderr.contains("policy seed 0 failed: train ended with exit status: 1\n"), "{ended:#?}");
    let last = "error: 1 of 2 runs failed: policy seed 0; retry with: autodidact study mine.toml\n";
    assert!(ended.stderr.ends_with(last), "{ended:#?}");
    assert_eq!(rows(&folder).len(), 1 + 1, "the other run is there");
    std::fs::remove_dir_all(folder.path(run_dir)).unwrap();
    study(&folder).success();
    assert_eq!(rows(&folder).len(), 1 + 2);
}

#[test]
fn ci_shortens_every_run_and_says_so() {
    let folder = folder(&STUDY.replace("steps = 4", "minutes = 10"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_autodidact"));
    command.args(["study", "mine.toml"]).env("AUTODIDACT_CI", "1");
    let ended = folder.start_command(command).end().success();
    assert_eq!(ended.stderr, "AUTODIDACT_CI=1: runs are shortened to 3 steps\n");
    let steps: BTreeSet<String> =
        rows(&folder).iter().skip(1).map(|row| row.split(',').nth(3).unwrap().to_owned()).collect();
    assert_eq!(steps, BTreeSet::from(["3".to_owned()]));
}

#[test]
fn shipped_studies_can_be_run() {
    let studies = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/studies");
    for entry in std::fs::read_dir(studies).unwrap() {
        let path = entry.unwrap().path();
        let planned = pretrained::call(&["study", path.to_str().unwrap(), "--dry-run"]).success();
        assert!(planned.stdout.starts_with("to start: autodidact train "), "{path:?}: {planned:#?}");
    }
}

#[test]
fn study_files() {
    for (from, to, says) in [
        ("samples = 2", "sample = 2", "mine.toml, line 4, column 1: unknown field `sample`, expected one of `control`"),
        ("samples = 2", "samples = \"2\"", "mine.toml, line 4, column 11: invalid type: string \"2\", expected u32"),
        ("samples = 2", "samples = 0", "mine.toml: samples: expected 1 to 4096, got 0"),
        ("samples = 2", "samples = ", "mine.toml, line 4, column 11: "),
        ("seeds = [0, 1]", "seeds = []", "seeds: expected one or more, got none"),
        ("seeds = [0, 1]", "seeds = [0, 1, 0]", "seeds: expected every seed once, got [0, 1, 0]"),
        ("\"policy\"\nseeds", "\"nobody\"\nseeds", "control: expected one of policy, random, got \"nobody\""),
        ("name = \"random\"", "name = \"policy\"", "arm.name: expected every name once, got \"policy\" twice"),
        ("name = \"random\"", "name = \"../up\"", "arm.name: expected letters, digits, - and _, got \"../up\""),
        ("steps = 4", "steps = 4\nminutes = 1", "expected steps or minutes, got both"),
        ("steps = 4", "minutes = 0", "arm policy: --minutes: expected a number over 0, up to 1000000, got 0"),
        ("steps = 4", "steps = 0", "arm policy: --set schedule.num_steps: expected 1 or more, got 0"),
        (
            "preset = \"smoke\"",
            "preset = \"smok\"",
            "arm policy: preset: expected one of laptop, ladder, qwen3-0.6b, smoke, smollm2, smollm2-lora, got \"smok\"",
        ),
        ("preset = \"smoke\"", "", "arm policy: expected one of preset and config, got both or neither"),
        (
            "random.toml",
            "absent.toml",
            "arm random: config: expected one of laptop, ladder, qwen3-0.6b, smoke, smollm2, smollm2-lora, or a TOML file",
        ),
        ("learner.reuse=1", "learner.lr=1", "arm random: --set learner.lr: unknown field `lr`"),
        (
            "learner.reuse=1",
            "learner.update_tokens=99",
            "arm random: expected learner.update_tokens = 384, as in the control policy, got 99",
        ),
        ("[\"countdown-3\"]", "[]", "exams: expected one or more, got none"),
        (
            "\"countdown-3\"",
            "\"countdown-3\", \"countdown-3\"",
            "exams: expected every exam once, got countdown-3 twice",
        ),
        ("countdown-3", "nonsense", "mine.toml: exam: expected one of countdown-3"),
        ("countdown-3", "programs-induction", "exams: programs-induction needs model.max_positions = "),
    ] {
        assert!(STUDY.contains(from), "{from}");
        let folder = folder(&STUDY.replacen(from, to, 1));
        let before = folder.files();
        let ended = study(&folder);
        assert!(ended.refusal().contains(says), "{to}: expected {says:?}, got {ended:#?}");
        assert_eq!(folder.files(), before, "{to} was refused and changed something");
    }
    let folder = folder(STUDY);
    assert!(folder.call(&["study", "absent.toml"]).refusal().contains("absent.toml"));
}

fn folder(study: &str) -> Folder {
    let random = "preset = \"smoke\"\n[actor]\nbehavior = \"uniform-legal\"\n";
    Folder::holding(&Files::from([
        ("mine.toml".to_owned(), study.as_bytes().to_vec()),
        ("random.toml".to_owned(), random.as_bytes().to_vec()),
    ]))
}

fn study(folder: &Folder) -> Ended {
    folder.call(&["study", "mine.toml"])
}

/// Returns the lines of `study.csv`, the header first.
fn rows(folder: &Folder) -> Vec<String> {
    let text = std::fs::read_to_string(folder.path(DIR).join("study.csv")).unwrap();
    text.lines().map(str::to_owned).collect()
}

fn table(ended: &Ended) -> String {
    ended.stdout[ended.stdout.find("means ").expect("a table")..].to_owned()
}
