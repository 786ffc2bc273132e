//! Input that the binary must refuse: one line says what was expected and what was found, and nothing is lost.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::runs::{
    Ended, Files, Folder, JournalRecord, NUM_STEPS, RESUME, SEGMENT, journal_records, policy_gradient_config,
    reference, wait_until,
};

const CHECKPOINT_REFUSED: &str = "checkpoint rejected, resuming from an earlier state: run/checkpoints/step_00000040/";

#[test]
fn keys_and_values_out_of_range() {
    for (assignment, says) in [
        ("learner.lr=1", "--set learner.lr: unknown field `lr`, expected one of `device`, `learning_rate`"),
        ("lerner.reuse=1", "--set lerner.reuse: expected a table in the config, got \"lerner\""),
        ("local.slot=1", "--set local.slot: unknown field `slot`, expected one of `threads`"),
        ("learner.reuse", "--set: expected key=value, got \"learner.reuse\""),
        ("learner.reuse=many", "--set learner.reuse: invalid type: string \"many\", expected f64"),
        ("learner.reuse=-1.0", "--set learner.reuse: expected over 0, up to 100, got -1"),
        ("learner.learning_rate=nan", "--set learner.learning_rate: expected over 0, up to 1, got NaN"),
        ("learner.device=gpu", "--set learner.device: expected cpu, candle-cpu, cuda or cuda:N, got \"gpu\""),
        (
            "learner.device=cuda",
            "learner.device: expected cpu, candle-cpu, or cuda in a build with `--features cuda` on a machine with",
        ),
        ("batch.lag=2", "--set batch.lag: expected 0 or 1, got 2"),
        ("seed=-1", "--set seed: invalid value: integer `-1`, expected u64"),
        ("model.d_model=33", "--set model.d_model: expected a multiple of 16 up to 8192, got 33"),
        ("schedule.num_steps=0", "--set schedule.num_steps: expected 1 or more, got 0"),
        ("local.slots=0", "--set local.slots: expected 1 to 1048576, got 0"),
        ("local.minutes=nan", "--set local.minutes: expected a number over 0, up to 1000000, got NaN"),
        ("learner.reusee=", "--set learner.reusee=: expected an optional key (self_play, "),
        ("model.size=huge", "--set model.size: expected one of micro, nano, small, got \"huge\""),
        ("actor.max_answer_tokens=9", "exams.names: countdown-3 needs actor.max_answer_tokens = 10, got 9"),
        (
            "self_play.proposer_loss=none",
            "--set self_play.proposer_loss: unknown variant `none`, expected `cross-entropy`",
        ),
        ("learner.shuffle_labels=true", "--set learner.shuffle_labels: expected false with self_play"),
        (
            "self_play.propose_tasks=16",
            "--set self_play.propose_tasks: expected at least 0, below batch.num_tasks, got 16",
        ),
        ("self_play.proposer_share=1.0", "--set self_play.proposer_share: expected at least 0, below 1, got 1"),
        ("self_play.problems.ladder=-0.1", "self_play.problems: expected weights of 0 or more, not all 0, got [0.5"),
    ] {
        refused(&Folder::new(), &["train", "smoke", "--run-dir", "run", "--set", assignment], &[says]);
    }
    refused(&Folder::new(), &["train", "smoke", "--run-dir", "run", "--minutes", "0"], &["expected", "got 0"]);
    refused(&Folder::new(), &["train", "smoke", "--run-dir", "run", "--minutes", "nan"], &["expected", "got NaN"]);
}

#[test]
fn policy_gradients_out_of_range() {
    for (assignment, says) in [
        (
            "learner.policy_gradient.kind=ppo",
            ["--set learner.policy_gradient.kind: unknown variant `ppo`", "expected one of `grpo`, `dr-grpo`"],
        ),
        ("learner.policy_gradient.weight=0.0", ["learner.policy_gradient.weight: expected over 0", "got 0"]),
        ("learner.policy_gradient.clip_low=1.5", ["learner.policy_gradient.clip_low: expected over 0", "got 1.5"]),
        ("learner.policy_gradient.clip_high=nan", ["learner.policy_gradient.clip_high: expected", "got NaN"]),
        ("learner.policy_gradient.entropy_bonus=-0.1", ["entropy_bonus: expected 0 to 1", "got -0.1"]),
        ("learner.policy_gradient.updates_per_step=0", ["updates_per_step: expected 1 to 1000", "got 0"]),
        (
            "actor.behavior=uniform-legal",
            ["actor.behavior: expected policy if learner.policy_gradient is set", "got uniform-legal"],
        ),
        ("learner.shuffle_labels=true", ["learner.shuffle_labels: expected false", "got true"]),
        ("actor.temperature=0.8", ["actor.temperature: expected 1 if learner.policy_gradient is set", "got 0.8"]),
        ("batch.num_rollouts=1", ["batch.num_rollouts: expected 2 or more unless", "got 1"]),
        (
            "learner.policy_gradient.groups_per_step=4",
            ["learner.policy_gradient.groups_per_step: expected none unless the kind is dapo", "got 4"],
        ),
    ] {
        let command = ["train", "pg.toml", "--run-dir", "run", "--set", assignment];
        refused(&Folder::holding(&policy_gradient_config("dr-grpo")), &command, &says);
    }
}

#[test]
fn exams_that_cannot_be_sat() {
    for (names, says) in [
        ("[\"nonsense\"]", "--set exams.names: exam: expected one of countdown-3"),
        ("[\"countdown-3\", \"countdown-3\"]", "--set exams.names: expected every exam once, got countdown-3 twice"),
        ("[\"programs-induction\"]", "--set exams.names: programs-induction needs model.max_positions = "),
    ] {
        let assignment = format!("exams.names={names}");
        refused(&Folder::new(), &["train", "smoke", "--run-dir", "run", "--set", &assignment], &[says]);
    }
    // The longest prompt of countdown-3 has 6 tokens.
    let assignment = ["train", "smoke", "--run-dir", "run", "--set", "model.max_positions=25"];
    let says = "exams.names: countdown-3 needs model.max_positions = 26 (prompts of up to 6 tokens, \
                actor.max_answer_tokens = 20), got 25";
    refused(&Folder::new(), &assignment, &[says]);
    Folder::new()
        .call(&["train", "smoke", "--run-dir", "run", "--steps", "1", "--set", "model.max_positions=26"])
        .success();
}

/// One line names the key, its place, what was expected and what was found.
#[test]
fn config_files() {
    for (text, says) in [
        (
            "preset = \"smoke\"\n[learner]\nlr = 1\n",
            "mine.toml, line 3, column 1: learner.lr: unknown field `lr`, expected one of",
        ),
        (
            "preset = \"smoke\"\n[lerner]\nreuse = 1.0\n",
            "mine.toml, line 2, column 2: lerner: unknown field `lerner`, expected one of `seed`",
        ),
        ("preset = \"smoke\"\n[batch]\n  lag = 7\n", "mine.toml, line 3, column 3: batch.lag: expected 0 or 1, got 7"),
        (
            "preset = \"smoke\"\nmodel.d_model = 33\n",
            "mine.toml, line 2, column 7: model.d_model: expected a multiple of 16 up to 8192, got 33",
        ),
        (
            "preset = \"smoke\"\nbatch = 7\n",
            "mine.toml, line 2, column 1: batch: invalid type: integer `7`, expected struct",
        ),
        (
            "preset = \"smoke\"\nlocal.slots = 0\n",
            "mine.toml, line 2, column 7: local.slots: expected 1 to 1048576, got 0",
        ),
        ("preset = \"smoke\"\nlocal = 0\n", "mine.toml, line 2, column 1: local: expected a table, got 0"),
        (
            "preset = \"smoke\"\nlocal.minutes = -1.0\n",
            "mine.toml, line 2, column 7: local.minutes: expected a number over 0, up to 1000000, got -1",
        ),
        (
            "preset = \"smoke\"\nmodel.size = \"huge\"\n",
            "mine.toml: model.size: expected one of micro, nano, small, got \"huge\"",
        ),
        (
            "learner.reuse = 1.0\n",
            "mine.toml: expected a full config, or a preset such as preset = \"laptop\"; `actor` is missing",
        ),
        (
            "preset = \"smoke\"\ndomains = [{name = 3, share = 1.0, levels = []}]\n",
            "mine.toml, line 2, column 13: domains.0.name: invalid type: integer `3`, expected a string",
        ),
        (
            "preset = \"smoke\"\nexams.names = [\"chess\"]\n",
            "mine.toml, line 2, column 7: exams.names: exam: expected one of countdown-3",
        ),
        (
            "preset = \"smok\"\n",
            "mine.toml: preset: expected one of laptop, ladder, qwen3-0.6b, smoke, smollm2, smollm2-lora, got \"smok\"",
        ),
        ("preset = 3\n", "mine.toml: preset: expected a name, got 3"),
        ("preset = \"smoke\"\n[learner\nreuse = 1.0\n", "mine.toml, line 2, column 9: unclosed table, expected `]`"),
    ] {
        let files = Files::from([("mine.toml".into(), text.as_bytes().to_vec())]);
        refused(&Folder::holding(&files), &["train", "mine.toml", "--run-dir", "run"], &[says]);
    }
    let files = Files::from([("mine.toml".into(), b"preset = \"\xff\"".to_vec())]);
    refused(&Folder::holding(&files), &["train", "mine.toml", "--run-dir", "run"], &["mine.toml", "UTF-8"]);
    let says = [
        "expected one of laptop, ladder, qwen3-0.6b, smoke, smollm2, smollm2-lora, or a TOML file",
        "got \"absent.toml\"",
    ];
    refused(&Folder::new(), &["train", "absent.toml", "--run-dir", "run"], &says);
    refused(&Folder::new(), &["config", "absent.toml"], &says);
}

#[test]
fn run_directories_in_use() {
    let folder = Folder::holding(&reference(0).files);
    let says = "--run-dir run: expected an empty or nonexistent directory, found a run; resume it with \
                `--resume --run-dir run`";
    refused(&folder, &["train", "smoke", "--run-dir", "run"], &[says]);
    let others = Folder::holding(&Files::from([("run/note.txt".into(), b"mine".to_vec())]));
    let says = "--run-dir run: expected an empty or nonexistent directory, found files that are not a run";
    refused(&others, &["train", "smoke", "--run-dir", "run"], &[says]);
    refused(&folder, &["train", "--resume", "--run-dir", "absent"], &["absent: expected a run directory"]);
    let killed = Files::from([("run/config.toml.0.partial".into(), vec![])]);
    Folder::holding(&killed).call(&["train", "smoke", "--run-dir", "run", "--steps", "1"]).success();
}

#[test]
fn a_changed_config_is_not_resumed() {
    for newest_checkpoint in [NUM_STEPS, 30] {
        let folder = Folder::holding(&reference(0).files);
        if newest_checkpoint < NUM_STEPS {
            remove_checkpoint(&folder, NUM_STEPS);
        }
        for (from, to, says) in [
            ("learning_rate = 0.004", "learning_rate = 0.005", "learner.learning_rate was 0.004, is 0.005"),
            ("d_model = 32", "d_model = 64", "model.d_model was 32, is 64"),
        ] {
            let path = folder.path("run/config.toml");
            let config = std::fs::read_to_string(&path).unwrap();
            assert!(config.contains(from), "{config}");
            std::fs::write(&path, config.replace(from, to)).unwrap();
            let says = format!("manifest: {says}; `--fork` starts a new run from this config");
            refused(&folder, &RESUME, &[&says]);
            std::fs::write(&path, config).unwrap();
        }
        let changed = ["--set", "seed=3", "--set", "learner.hindsight=false"];
        let says = "manifest: learner.hindsight was true, is false, seed was 0, is 3; `--fork` starts";
        refused(&folder, &[&RESUME[..], &changed].concat(), &[says]);
        folder.resume().success();
        folder.history().assert_steps_of(&reference(0).history);
    }
}

/// If nothing in the run shows which key changed, the error shows the hashes in short form.
#[test]
fn a_config_whose_origin_is_lost_is_not_resumed() {
    let folder = Folder::holding(&reference(0).files);
    std::fs::remove_file(folder.path("run/manifest.json")).unwrap();
    refused(&folder, &[&RESUME[..], &["--set", "seed=3"]].concat(), &["manifest: seed was 0, is 3; `--fork` starts"]);
    let path = folder.path("run/config.toml");
    let config = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, config.replace("d_model = 32", "d_model = 64")).unwrap();
    let says = ["run/journal: expected a journal of this config (", "), got one of another config ("];
    refused(&folder, &RESUME, &says);
    refused(&folder, &["replay", "run"], &says);
}

#[test]
fn what_is_said_twice_is_refused() {
    let train = ["train", "smoke", "--run-dir", "run"];
    for (args, said) in [
        (&["--seed", "1", "--set", "seed=2"][..], "--seed 1 and --set seed=2"),
        (&["--seed", "1", "--set", "seed=1"], "--seed 1 and --set seed=1"),
        (&["--steps", "5", "--set", "schedule.num_steps=9"], "--steps 5 and --set schedule.num_steps=9"),
        (&["--steps", "5", "--set", "schedule={num_steps=9}"], "--steps 5 and --set schedule={num_steps=9}"),
        (&["--steps", "5", "--set", "local.minutes=3"], "--steps 5 and --set local.minutes=3"),
        (&["--minutes", "2", "--set", "local.minutes=3"], "--minutes 2 and --set local.minutes=3"),
        (&["--minutes", "2", "--set", "schedule.num_steps=9"], "--minutes 2 and --set schedule.num_steps=9"),
        (&["--set", "learner.reuse=2", "--set", "learner.reuse=3"], "--set learner.reuse=2 and --set learner.reuse=3"),
    ] {
        let says = format!("{said}: expected one of them, got both");
        refused(&Folder::new(), &[&train[..], args].concat(), &[&says]);
    }
    let says = "--set: expected one key=value on one line, got \"seed=2\\nlearner.reuse=3\"";
    refused(&Folder::new(), &[&train[..], &["--set", "seed=2\nlearner.reuse=3"]].concat(), &[says]);
    let says = ["local.minutes = 3, schedule.num_steps = 40: expected one limit on the run, got both"];
    refused(&Folder::new(), &[&train[..], &["--set", "local.minutes=3"]].concat(), &says);
    let mine = "preset = \"smoke\"\nlocal.minutes = 3.0\n";
    let folder = Folder::holding(&Files::from([("mine.toml".into(), mine.into())]));
    refused(&folder, &["train", "mine.toml", "--run-dir", "run"], &says);
    let resumed = Folder::holding(&reference(0).files);
    let says = "--minutes 2 and --set local.minutes=3: expected one of them";
    refused(&resumed, &[&RESUME[..], &["--minutes", "2", "--set", "local.minutes=3"]].concat(), &[says]);
    // Arguments that agree, or that replace the end of the run that its file sets, are no contradiction.
    let steps = ["--steps", "1", "--set", "local.minutes=", "--set", "self_play="];
    folder.call(&[&["train", "mine.toml", "--run-dir", "run"], &steps[..]].concat()).success();
}

#[test]
fn the_clock_does_not_end_a_run_that_ends_by_steps() {
    let folder = Folder::holding(&reference(0).files);
    let says = "--minutes: expected a run without a fixed number of steps, got 3 for a run of 40 steps";
    refused(&folder, &["train", "--resume", "--run-dir", "run", "--minutes", "3"], &[says]);
}

#[test]
fn a_broken_config_is_not_resumed() {
    let folder = Folder::holding(&reference(0).files);
    let path = folder.path("run/config.toml");
    for (line, says) in [
        ("[learner", ["run/config.toml, line ", "unclosed table, expected `]`"]),
        ("unheard_of = 1", ["run/config.toml, line ", "unknown field `unheard_of`, expected one of"]),
    ] {
        let config = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("{config}{line}\n")).unwrap();
        refused(&folder, &RESUME, &says);
        std::fs::write(&path, config).unwrap();
    }
}

#[test]
fn a_second_learner_is_refused_and_the_first_goes_on() {
    let folder = Folder::new();
    let first = folder.start(&["train", "smoke", "--run-dir", "run", "--set", "schedule.num_steps=100000"]);
    wait_until("step 3", || folder.last_step() >= 3);
    let second = folder.resume();
    let refusal = second.refusal();
    assert!(refusal.starts_with("run/LOCK: expected no other learner in this run directory, got "), "{refusal}");
    let seen = folder.last_step();
    wait_until("the first learner to go on", || folder.last_step() >= seen + 3);
    first.interrupt();
    first.end().success();
    // The reference's learning rate decays from step 32 on.
    let steps = folder.history().steps;
    let compared = steps.len().min(32);
    assert_eq!(steps[..compared], reference(0).history.steps[..compared]);
}

#[test]
fn a_cut_journal_is_recovered() {
    let bytes = &reference(0).files[SEGMENT];
    let records = journal_records(bytes);
    let last_step = records.iter().rfind(|record| record.kind == JournalRecord::STEP).unwrap();
    let some_group = records.iter().filter(|record| record.kind == JournalRecord::GROUP).nth(35 * 16 + 5).unwrap();
    for (record, kept_bytes) in [(last_step, JournalRecord::HEADER_BYTES + 1), (some_group, 3)] {
        let folder = Folder::holding(&reference(0).files);
        remove_checkpoint(&folder, NUM_STEPS);
        std::fs::write(folder.path(SEGMENT), &bytes[..record.offset + kept_bytes]).unwrap();
        let ended = folder.resume().success();
        assert_eq!(ended.stderr, format!("journal: removed {kept_bytes} bytes of an unreadable record from the end\n"));
        folder.history().assert_steps_of(&reference(0).history);
        assert!(folder.call(&["replay", "run"]).success().stdout.starts_with("replayed 40 steps "));
    }
}

/// A crash may occur between the journal's record of an exam and its row of `metrics.jsonl`, and lose either.
#[test]
fn an_exam_has_one_row_whatever_a_crash_lost() {
    let cut = |name: &str, num_bytes: usize| {
        let folder = Folder::holding(&reference(0).files);
        let bytes = &reference(0).files[name];
        std::fs::write(folder.path(name), &bytes[..bytes.len() - num_bytes]).unwrap();
        folder
    };
    // The last exam is the last record of the journal and the last row of the metrics.
    for folder in [cut(SEGMENT, 1), cut("run/metrics.jsonl", 2)] {
        folder.resume().success();
        assert_eq!(folder.history(), reference(0).history);
    }
}

#[test]
fn a_damaged_record_is_passed_over() {
    let records = journal_records(&reference(0).files[SEGMENT]);
    let group = records.iter().filter(|record| record.kind == JournalRecord::GROUP).nth(35 * 16 + 5).unwrap();
    let folder = Folder::holding(&reference(0).files);
    remove_checkpoint(&folder, NUM_STEPS);
    folder.flip(SEGMENT, group.offset + JournalRecord::HEADER_BYTES);
    let ended = folder.resume().success();
    let says = format!("journal: skipped the damaged record at byte {} of {SEGMENT}\n", group.offset);
    assert_eq!(ended.stderr, says);
    folder.history().assert_steps_of(&reference(0).history);
}

/// A checkpoint's index of the journal is no part of the results: without it the run reads the journal, and rewrites the index.
#[test]
fn a_checkpoint_without_its_place_in_the_journal_is_used() {
    let place = format!("run/checkpoints/step_{NUM_STEPS:08}/journal.postcard");
    for is_missing in [true, false] {
        let folder = Folder::holding(&reference(0).files);
        if is_missing {
            std::fs::remove_file(folder.path(&place)).unwrap();
        } else {
            folder.flip(&place, reference(0).files[&place].len() / 2);
        }
        let ended = folder.resume().success();
        assert!(ended.stderr.contains("reading the journal from its beginning instead"), "{ended:#?}");
        assert_eq!(ended.stderr.lines().count(), 1, "{ended:#?}");
        assert!(ended.stdout.contains("resumed at step 40\n"), "{ended:#?}");
        assert_eq!(folder.history(), reference(0).history);
        let again = folder.resume().success();
        assert!(again.stderr.is_empty() && again.stdout.contains("resumed at step 40\n"), "{again:#?}");
    }
}

#[test]
fn a_damaged_checkpoint_is_refused_and_the_one_before_used() {
    let files = ["model.safetensors", "optimizer.safetensors", "state.postcard", "config.json", "tokenizer.json"];
    for file in files.into_iter().chain(["COMPLETE"]) {
        let folder = Folder::holding(&reference(0).files);
        let damaged = format!("run/checkpoints/step_{NUM_STEPS:08}/{file}");
        let middle = reference(0).files[&damaged].len() / 2;
        folder.flip(&damaged, middle);
        let ended = folder.resume().success();
        assert!(ended.stderr.starts_with(CHECKPOINT_REFUSED), "{ended:#?}");
        assert_eq!(ended.stderr.lines().count(), 1, "{ended:#?}");
        assert!(ended.stdout.contains("resumed at step 30\n"), "{ended:#?}");
        folder.history().assert_steps_of(&reference(0).history);
        let is_same = folder.files()[&damaged] == reference(0).files[&damaged];
        // This one also has the digest of the place in the journal, which another process takes later.
        assert!(is_same || file == "COMPLETE", "{file} was written again");
        let again = folder.resume().success();
        assert!(again.stderr.is_empty() && again.stdout.contains("resumed at step 40\n"), "{again:#?}");
    }
}

/// A journal that was lost in part or as a whole is rebuilt from the newest checkpoint that it knows.
#[test]
fn a_checkpoint_that_the_journal_does_not_know_is_not_used() {
    let bytes = &reference(0).files[SEGMENT];
    let steps: Vec<JournalRecord> =
        journal_records(bytes).into_iter().filter(|record| record.kind == JournalRecord::STEP).collect();
    for (kept, resumed) in [(Some(&bytes[..steps[34].offset]), "resumed at step 30\n"), (None, "resumed at step 0\n")] {
        let folder = Folder::holding(&reference(0).files);
        match kept {
            Some(bytes) => std::fs::write(folder.path(SEGMENT), bytes).unwrap(),
            None => std::fs::remove_dir_all(folder.path("run/journal")).unwrap(),
        }
        let ended = folder.resume().success();
        let says = "checkpoint rejected, resuming from an earlier state: its step 40 is not in the journal\n";
        assert!(ended.stderr.starts_with(says), "{ended:#?}");
        assert!(ended.stdout.contains(resumed), "{ended:#?}");
        folder.history().assert_steps_of(&reference(0).history);
        assert!(folder.call(&["replay", "run"]).success().stdout.starts_with("replayed 40 steps "));
    }
}

#[test]
fn a_damaged_record_of_a_step_costs_no_checkpoint() {
    let records = journal_records(&reference(0).files[SEGMENT]);
    let step = records.iter().filter(|record| record.kind == JournalRecord::STEP).nth(29).unwrap();
    let folder = Folder::holding(&reference(0).files);
    remove_checkpoint(&folder, NUM_STEPS);
    folder.flip(SEGMENT, step.offset + JournalRecord::HEADER_BYTES);
    let ended = folder.resume().success();
    assert!(ended.stdout.contains("resumed at step 30\n"), "{ended:#?}");
    folder.history().assert_steps_of(&reference(0).history);
}

#[test]
fn a_journal_without_its_manifest_is_not_continued() {
    let folder = Folder::holding(&reference(0).files);
    folder.flip(SEGMENT, JournalRecord::HEADER_BYTES + 5);
    refused(&folder, &RESUME, &["run/journal: expected a journal that begins with a readable manifest, got none"]);
}

#[test]
fn what_is_not_there_is_not_replayed() {
    let folder = Folder::holding(&reference(0).files);
    let says = "expected a journal with step 41, got 40 steps";
    refused(&folder, &["replay", "run", "--to", "41"], &[says]);
}

#[test]
fn eval_and_solve_pass_over_a_damaged_checkpoint() {
    let folder = Folder::holding(&reference(0).files);
    folder.flip(&format!("run/checkpoints/step_{NUM_STEPS:08}/model.safetensors"), 100);
    let says = "checkpoint rejected, using an earlier one: run/checkpoints/step_00000040/model.safetensors: expected ";
    let eval = folder.call(&["eval", "run", "--exam", "countdown-3", "--split", "dev", "--samples", "1"]).success();
    assert!(eval.stderr.starts_with(says) && eval.stdout.contains("step 30\n"), "{eval:#?}");
    let solve = folder.call(&["solve", "run", "3 7 -> 21", "--json"]).success();
    assert!(solve.stderr.starts_with(says) && solve.stdout.contains("\"step\":30"), "{solve:#?}");
    let named = ["eval", "run/checkpoints/step_00000040", "--exam", "countdown-3"];
    refused(&folder, &named, &["step_00000040/model.safetensors: expected bytes with digest "]);
}

/// Without a calculator, countdown has a different exam, whether the run or its checkpoint is named.
#[test]
fn a_run_without_a_calculator_sits_exams_without_one() {
    let folder = Folder::new();
    let domains =
        "domains=[{ name = \"countdown-no-calculator\", share = 1.0, levels = [{ level = 2, weight = 1.0 }] }]";
    folder.call(&["train", "smoke", "--run-dir", "run", "--steps", "2", "--set", domains]).success();
    let eval =
        |path| folder.call(&["eval", path, "--exam", "countdown-3", "--samples", "1", "--json"]).success().stdout;
    let of_run: Value = serde_json::from_str(&eval("run")).unwrap();
    assert_eq!(eval("run/checkpoints/step_00000002"), eval("run"));
    let calculated = reference(0).summary["baselines"]["countdown-3"]["uniform_legal"].as_f64().unwrap();
    let guessed = of_run["scores"]["uniform_legal"]["pass_at_1"]["mean"].as_f64().unwrap();
    assert!(guessed < 0.2 * calculated, "{guessed} and {calculated}");
}

#[test]
fn options_that_do_not_go_together_or_out_of_range() {
    let folder = Folder::holding(&reference(0).files);
    for (args, says) in [
        (&["eval", "run", "--problems", "x", "--split", "dev"][..], "cannot be used with '--split <SPLIT>'"),
        (&["eval", "run", "--threads", "20000"], "20000 is not in 0..=1024"),
        (&["replay", "run", "--threads", "20000"], "20000 is not in 0..=1024"),
        (&["keys", "init", "k", "--actors", "1", "--verifiers", "1", "--host", "a b"], "address, got \"a b\""),
        (
            &["keys", "init", "k", "--actors", "1", "--verifiers", "1", "--host", "nats://h:4222"],
            "got \"nats://h:4222\"",
        ),
        (
            &["keys", "init", "k", "--actors", "1", "--verifiers", "1", "--host", ""],
            "expected a host name or an address",
        ),
    ] {
        let refused = folder.call(args);
        assert!(!refused.status.success() && refused.stderr.contains(says), "{args:?}: {refused:#?}");
    }
    assert!(!folder.path("k").exists());
}

#[test]
fn exams_that_do_not_fit() {
    let folder = Folder::holding(&reference(0).files);
    let says = ["countdown-sos (test): ", ": expected prompt and answer within model.max_positions = 32, got 49"];
    refused(&folder, &["eval", "run", "--exam", "countdown-sos"], &says);
    let all = folder.call(&["eval", "run", "--samples", "1", "--json"]).success();
    assert!(all.stderr.contains("countdown-sos (test): skipped, its problems need more than "), "{all:#?}");
    for line in all.stdout.lines() {
        assert!(serde_json::from_str::<Value>(line).unwrap()["exam"].is_string(), "{line}");
    }
}

#[test]
fn without_a_checkpoint_the_journal_is_enough() {
    let folder = Folder::holding(&reference(0).files);
    let checkpoints = folder.checkpoints();
    for step in &checkpoints {
        folder.flip(&format!("run/checkpoints/step_{step:08}/state.postcard"), 100);
    }
    let ended = folder.resume().success();
    let refused = ended.stderr.lines().filter(|line| line.starts_with("checkpoint rejected")).count();
    assert_eq!(refused, checkpoints.len(), "{ended:#?}");
    assert!(ended.stdout.contains("resumed at step 0\n"), "{ended:#?}");
    folder.history().assert_steps_of(&reference(0).history);
    assert_eq!(folder.history().exams, reference(0).history.exams);
}

#[test]
fn a_full_disk_in_a_checkpoint() {
    survives_full_disk("local.checkpoint_every=10");
}

#[test]
fn a_full_disk_in_the_journal() {
    survives_full_disk("local.checkpoint_every=1000");
}

#[test]
fn errors_name_their_cause_once() {
    let folder = Folder::holding(&reference(0).files);
    std::fs::remove_dir_all(folder.path("run/journal")).unwrap();
    let ended = refused(&folder, &["replay", "run"], &["run/journal"]);
    assert_eq!(ended.stderr.matches("No such file").count(), 1, "{ended:#?}");
}

#[test]
fn folders_that_are_no_run() {
    let folder = Folder::holding(&Files::from([("plain/note.txt".into(), b"nothing".to_vec())]));
    for name in ["plain", "absent"] {
        refused(&folder, &["eval", name], &[name, "expected a run with a complete checkpoint", "found none of them"]);
        refused(&folder, &["replay", name], &[name, "expected a run directory"]);
    }
}

#[test]
fn exams_and_problems_to_score() {
    let folder = Folder::holding(&reference(0).files);
    let says = ["exam: expected one of countdown-3", "got \"nonsense\""];
    refused(&folder, &["eval", "run", "--exam", "nonsense"], &says);
    let problem: &[u8] = b"{\"domain\":\"countdown\",\"numbers\":[3,7,25],\"target\":78}\n";
    let lines: [(&[u8], &str); 6] = [
        (b"{\"domain\":\"countdown\",\"numbers\":[3,7", "EOF while parsing"),
        (b"not JSON at all", "expected"),
        (b"{\"domain\":\"count\xffdown\"}", "invalid utf-8"),
        (b"{\"domain\":\"chess\"}", "domain: expected one of countdown, "),
        (b"{\"numbers\":[3,7,25],\"goal\":78}", "bits as target, got none"),
        (b"{\"domain\":\"countdown\",\"numbers\":[3,-7,25],\"target\":78}", "as numbers, got [3,-7,25]"),
    ];
    for (line, says) in lines {
        std::fs::write(folder.path("mine.jsonl"), [problem, problem, line, b"\n", problem].concat()).unwrap();
        refused(&folder, &["eval", "run", "--problems", "mine.jsonl"], &["mine.jsonl, line 3: ", says]);
    }
    std::fs::write(folder.path("mine.jsonl"), b"\n\n").unwrap();
    refused(&folder, &["eval", "run", "--problems", "mine.jsonl"], &["mine.jsonl: expected problems", "found none"]);
    refused(&folder, &["eval", "run", "--problems", "absent.jsonl"], &["absent.jsonl", "No such file"]);
}

#[test]
fn problems_to_generate() {
    let folder = Folder::new();
    let says = ["domain: expected one of countdown", "got \"nonsense\""];
    refused(&folder, &["generate", "--domain", "nonsense"], &says);
    let says = ["level: expected one of 1, 2", "got 99"];
    refused(&folder, &["generate", "--domain", "countdown", "--level", "99"], &says);
}

#[test]
fn a_reader_that_closes_the_pipe_ends_generate_quietly() {
    let folder = Folder::new();
    let ended = read_one_line(&folder, &["generate", "--domain", "countdown", "--count", "100000"]);
    assert!(ended.stdout.starts_with("{\"domain\":\"countdown\""), "{ended:#?}");
    assert_eq!(ended.stderr, "");
}

#[test]
fn answers_to_verify() {
    let right = r#"{"problem":{"domain":"countdown","numbers":[3,7],"target":4},"answer":"7 - 3 = 4"}"#;
    let wrong = right.replace("7 - 3 = 4", "7 + 3 = 10");
    let lines: [&[u8]; 9] = [
        right.as_bytes(),
        b"not JSON at all",
        b"{\"problem\":\"\xff\"}",
        b"{}",
        b"[]",
        br#"{"problem":{"domain":"chess"},"answer":"e4"}"#,
        br#"{"problem":{"domain":"countdown","numbers":[3,7],"target":4}}"#,
        wrong.as_bytes(),
        &right.as_bytes()[..40],
    ];
    let folder = Folder::holding(&Files::from([("answers.jsonl".into(), lines.join(&b"\n"[..]))]));
    let ended = folder.call(&["verify", "answers.jsonl"]);
    let replies: Vec<Value> = ended.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(replies.len(), lines.len(), "a line for a line: {ended:#?}");
    for (index, says) in [
        (1, "expected one JSON object per line: expected ident at column 2"),
        (2, "expected UTF-8"),
        (3, "expected a field `problem`, found none"),
        (4, "expected one JSON object per line, got []"),
        (5, "domain: expected one of countdown"),
        (6, "expected a text field `answer`, found none"),
        (8, "expected one JSON object per line: EOF while parsing a string at column 40"),
    ] {
        assert_eq!(replies[index]["line"], index + 1);
        let error = replies[index]["error"].as_str().unwrap();
        assert!(error.starts_with(says), "line {}: {error}", index + 1);
    }
    assert_eq!([&replies[0]["verdict"], &replies[7]["verdict"]], ["correct", "incorrect"]);
    assert_eq!(replies[7]["reason"], "ends in 10, not 4");
    assert_eq!(
        ended.refusal(),
        "7 of 9 lines are not a valid problem with an answer; the output has an error for each"
    );
    assert!(folder.call(&["verify", "absent.jsonl"]).refusal().starts_with("open absent.jsonl: "));
}

#[test]
fn a_line_without_an_end_is_refused_and_the_next_is_judged() {
    let line = b"{\"problem\":{\"domain\":\"countdown\",\"numbers\":[3,7],\"target\":4},\"answer\":\"7 - 3 = 4\"}";
    let text = [&vec![b' '; 3 << 20][..], b"\n", line].concat();
    let folder = Folder::holding(&Files::from([("answers.jsonl".into(), text)]));
    let ended = folder.call(&["verify", "answers.jsonl"]);
    let says = "{\"error\":\"expected a line of up to 1048576 bytes, got a longer one\",\"line\":1}\n\
                {\"verdict\":\"correct\"}\n";
    assert_eq!(ended.stdout, says);
    assert!(ended.refusal().starts_with("1 of 2 lines"), "{ended:#?}");
}

#[test]
fn an_exam_is_written_whole_or_not_at_all() {
    let folder = Folder::holding(&Files::from([("exam.zst".into(), b"mine".to_vec())]));
    let mut command = Command::new("sh");
    let script = "ulimit -f 1; trap '' XFSZ; exec \"$0\" generate --exam countdown-3 --out exam.zst";
    command.args(["-c", script, env!("CARGO_BIN_EXE_autodidact")]);
    let ended = folder.start_command(command).end();
    assert!(ended.stderr.contains("write exam.zst: File too large"), "{ended:#?}");
    assert_eq!(folder.files(), Files::from([("exam.zst".into(), b"mine".to_vec())]));
    folder.call(&["generate", "--exam", "countdown-3", "--out", "exam.zst"]).success();
    let committed = format!("{}/domains/exams/countdown-3.jsonl.zst", env!("CARGO_MANIFEST_DIR"));
    assert!(folder.files()["exam.zst"] == std::fs::read(committed).unwrap());
    let usage = folder.call(&["generate", "--domain", "countdown", "--out", "x"]);
    assert_eq!(usage.status.code(), Some(2), "{usage:#?}");
}

#[test]
fn a_reader_that_closes_the_pipe_ends_verify_quietly() {
    let line = "{\"problem\":{\"domain\":\"countdown\",\"numbers\":[3,7],\"target\":4},\"answer\":\"7 - 3 = 4\"}\n";
    let folder = Folder::holding(&Files::from([("answers.jsonl".into(), line.repeat(100_000).into_bytes())]));
    let ended = read_one_line(&folder, &["verify", "answers.jsonl"]);
    assert_eq!((ended.stdout.as_str(), ended.stderr.as_str()), ("{\"verdict\":\"correct\"}\n", ""));
}

#[test]
fn standard_output_on_a_full_disk() {
    let folder = Folder::new();
    let mut command = Command::new("sh");
    let script = "exec \"$0\" generate --domain countdown > /dev/full";
    command.args(["-c", script, env!("CARGO_BIN_EXE_autodidact")]);
    let ended = folder.start_command(command).end();
    assert!(ended.refusal().starts_with("write to standard output: No space left on device"), "{ended:#?}");
}

/// A suspended terminal reads nothing more; then the run is killed.
#[test]
fn a_reader_that_stops_reading_loses_no_row() {
    let (mut output, reader) = UnixStream::pair().unwrap();
    output.set_nonblocking(true).unwrap();
    while output.write(&[b'.'; 4_096]).is_ok() {}
    output.set_nonblocking(false).unwrap();
    let folder = Folder::new();
    let mut command = Command::new(env!("CARGO_BIN_EXE_autodidact"));
    command.args(["train", "smoke", "--run-dir", "run"]).current_dir(folder.path("")).env_remove("AUTODIDACT_CI");
    let mut child = command.stdout(OwnedFd::from(output)).stderr(Stdio::null()).spawn().unwrap();
    let num_rows = |text: &[u8]| text.iter().filter(|byte| **byte == b'\n').count();
    let expected = num_rows(&reference(0).files["run/metrics.jsonl"]);
    wait_until("every row", || {
        assert_eq!(child.try_wait().unwrap(), None, "it waits for its reader");
        num_rows(&std::fs::read(folder.path("run/metrics.jsonl")).unwrap_or_default()) == expected
    });
    child.kill().unwrap();
    child.wait().unwrap();
    drop(reader);
    assert_eq!(folder.history(), reference(0).history);
}

/// The output has no reader any more; the files in the run directory are complete all the same.
#[test]
fn a_reader_that_closes_the_pipe_loses_nothing_of_a_run() {
    let folder = Folder::new();
    let ended = read_one_line(&folder, &["train", "smoke", "--run-dir", "run"]);
    assert_eq!(ended.stderr, "");
    assert_eq!(folder.history(), reference(0).history);
    assert!(folder.path("run/curves.svg").exists());
}

/// Runs a command that must be refused and must change no file.
#[track_caller]
pub(crate) fn refused(folder: &Folder, args: &[&str], says: &[&str]) -> Ended {
    let before = folder.files();
    let ended = folder.call(args);
    let refusal = ended.refusal();
    for part in says {
        assert!(refusal.contains(part), "{args:?}: expected {part:?}, got {refusal:?}");
    }
    let after = folder.files();
    let differs = |name: &&String| before.get(*name) != after.get(*name);
    let changed: Vec<_> = before.keys().chain(after.keys()).filter(differs).collect();
    assert!(changed.is_empty(), "{args:?} was refused and changed {changed:?}");
    ended
}

/// Ends a run by a limit on the size of files, on which a write fails as on a full disk: no more bytes, an error.
fn survives_full_disk(checkpoints: &str) {
    let whole_journal = reference(0).files[SEGMENT].len();
    // Shells count in units of 512 or 1024 bytes: a quarter of the journal in the smaller unit is less than the whole in both.
    let limit = whole_journal / 4 / 512;
    let folder = Folder::new();
    let limited = |args: &[&str]| {
        let mut command = Command::new("sh");
        let script = format!("ulimit -f {limit}; trap '' XFSZ; exec \"$0\" \"$@\"");
        command.args(["-c", &script, env!("CARGO_BIN_EXE_autodidact")]).args(args);
        folder.start_command(command).end()
    };
    let ended = limited(&["train", "smoke", "--run-dir", "run", "--set", checkpoints]);
    assert!(ended.refusal().contains("run/"), "{ended:#?}");
    assert!(ended.refusal().contains("File too large"), "{ended:#?}");
    assert!(folder.last_step() < NUM_STEPS, "{ended:#?}");
    let again = limited(&RESUME);
    assert!(again.stderr.lines().last().is_some_and(|line| line.starts_with("error: ")), "{again:#?}");
    folder.resume().success();
    folder.history().assert_steps_of(&reference(0).history);
    assert!(folder.call(&["replay", "run"]).success().stdout.starts_with("replayed 40 steps "));
}

/// Runs a command whose reader closes the pipe after the first line.
fn read_one_line(folder: &Folder, args: &[&str]) -> Ended {
    let mut command = Command::new(env!("CARGO_BIN_EXE_autodidact"));
    command.args(args).current_dir(folder.path("")).env_remove("AUTODIDACT_CI");
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdout = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut stdout).unwrap();
    wait_until("the command to end", || child.try_wait().unwrap().is_some());
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    Ended { status: child.wait().unwrap(), stdout, stderr }.success()
}

fn remove_checkpoint(folder: &Folder, step: u64) {
    std::fs::remove_dir_all(folder.path(&format!("run/checkpoints/step_{step:08}"))).unwrap();
}
