//! Problems of a user's own file: runs that train on them, and `verify`, `generate` and `eval` of them.

use serde_json::{Value, json};

use crate::bad_input::refused;
use crate::cluster::Cluster;
use crate::pretrained_run::write_model;
use crate::runs::{Folder, HASTE, wait_until};

const NUM_PROBLEMS: usize = 100;

const CONFIG: &str = "preset = \"smollm2\"\nmodel = { base = \"model\", max_positions = 200 }\n\
                      domains = [{ name = \"file\", path = \"problems.jsonl\", share = 1.0 }]\n\
                      batch = { num_tasks = 20, num_rollouts = 8 }\n\
                      learner = { learning_rate = 3e-3, update_tokens = 2000 }\n\
                      schedule.num_steps = 6\nexams.names = [\"file\"]\nlocal.slots = 16\n";

const TRAIN: [&str; 4] = ["train", "tiny.toml", "--run-dir", "run"];
const RESUME: [&str; 4] = ["train", "--resume", "--run-dir", "run"];

/// Returns questions whose answers are letters: of an untrained network's, one in 26 is right.
fn problems() -> String {
    let problem = |number: usize| {
        let letter = char::from(b'A' + (number % 26) as u8).to_string();
        let messages = json!([{"role": "system", "content": "Say a letter."}, {"role": "user", "content": format!("Box {number}?")}]);
        match number % 2 {
            0 => json!({"messages": messages, "answer": letter, "check": "choice"}),
            _ => json!({"prompt": format!("Which letter is in box {number}?"), "answer": letter, "check": "choice"}),
        }
    };
    (0..NUM_PROBLEMS).map(|number| format!("{}\n", problem(number))).collect()
}

fn write_in(folder: &Folder) {
    write_model(&folder.path("model"), 0);
    std::fs::write(folder.path("problems.jsonl"), problems()).unwrap();
    std::fs::write(folder.path("tiny.toml"), CONFIG).unwrap();
}

fn folder() -> Folder {
    let folder = Folder::new();
    write_in(&folder);
    folder
}

#[test]
fn a_run_is_a_function_of_its_config_and_the_content_of_its_file() {
    let first = folder();
    first.call(&[&TRAIN[..], &["--set", "local.threads=1"]].concat()).success();
    let expected = first.history();
    assert_eq!(expected.steps.len(), 6);
    assert_eq!(
        expected.exams.iter().map(|(step, name, _)| (*step, name.as_str())).collect::<Vec<_>>(),
        [(0, "file"), (6, "file")]
    );
    let rows = crate::runs::metrics(&first.path("run"));
    let num_examples: u64 = rows.iter().filter_map(|row| row["num_examples"].as_u64()).sum();
    assert!(num_examples > 0, "some answers are right: {rows:?}");
    let replayed = first.call(&["replay", "run"]).success();
    assert!(replayed.stdout.contains("replayed 6 steps"), "{replayed:#?}");

    // The same content elsewhere.
    let second = folder();
    std::fs::rename(second.path("problems.jsonl"), second.path("moved.jsonl")).unwrap();
    std::fs::write(second.path("tiny.toml"), CONFIG.replace("problems.jsonl", "moved.jsonl")).unwrap();
    second.call(&[&TRAIN[..], &["--set", "local.threads=2", "--set", "local.slots=5"]].concat()).success();
    second.history().assert_steps_of(&expected);

    // Other content is another run.
    let third = folder();
    std::fs::write(third.path("problems.jsonl"), problems().replace("\"B\"", "\"C\"")).unwrap();
    third.call(&TRAIN).success();
    let [one, other] = [&first, &third].map(|folder| {
        let config: toml::Table = std::fs::read_to_string(folder.path("run/config.toml")).unwrap().parse().unwrap();
        config["domains"][0]["file"].clone()
    });
    assert_ne!(one, other);
}

#[test]
fn a_file_that_has_moved_is_found_and_another_is_refused() {
    let folder = folder();
    let process = folder.start(&TRAIN);
    wait_until("steps", || folder.last_step() >= 2);
    process.kill();
    std::fs::rename(folder.path("problems.jsonl"), folder.path("moved.jsonl")).unwrap();
    refused(&folder, &RESUME, &["local.file: ", "problems.jsonl: expected the file of problems, found none"]);
    refused(&folder, &["replay", "run"], &["local.file: ", "expected the file of problems, found none"]);
    std::fs::write(folder.path("problems.jsonl"), problems().replace("\"B\"", "\"C\"")).unwrap();
    refused(&folder, &RESUME, &["local.file: ", "problems.jsonl: expected problems with digest", "got"]);
    std::fs::remove_file(folder.path("problems.jsonl")).unwrap();
    // What does not need the problems goes on.
    folder.call(&["inspect", "run", "--group", "0/0"]).success();
    folder.call(&[&RESUME[..], &["--set", "local.file=moved.jsonl"]].concat()).success();
    assert_eq!(folder.history().steps.len(), 6);
    // From now on it is found there, from any directory.
    folder.call(&RESUME).success();
    let eval = ["eval", "run", "--exam", "file", "--samples", "1"];
    folder.call(&eval).success();
    std::fs::rename(folder.path("moved.jsonl"), folder.path("again.jsonl")).unwrap();
    let config = std::fs::read_to_string(folder.path("run/config.toml")).unwrap();
    assert!(config.contains(&format!("file = \"{}\"", folder.path("moved.jsonl").display())), "{config}");
    for command in [&eval[..], &["replay", "run"]] {
        refused(&folder, command, &["local.file: ", "moved.jsonl: expected the file of problems, found none"]);
        folder.call(&[command, &["--file", "again.jsonl"]].concat()).success();
    }
    let problem = r#"{"prompt":"Which?","answer":"A","check":"choice"}"#;
    folder.call(&["solve", "run", problem, "--domain", "file", "--samples", "1", "--file", "again.jsonl"]).success();
    refused(
        &folder,
        &["eval", "model", "--exam", "file", "--file", "again.jsonl"],
        &["--file again.jsonl: expected a run"],
    );
    assert_eq!(std::fs::read_to_string(folder.path("run/config.toml")).unwrap(), config, "they change no config");
}

#[test]
fn workers_need_no_file() {
    let expected = folder();
    expected.call(&TRAIN).success();
    let cluster = Cluster::new();
    write_in(&cluster.folder);
    let learner = cluster.start("learner", &[&["tiny.toml", "--run-dir", "run"], &HASTE[..]].concat());
    wait_until("the run", || cluster.folder.path("run/config.toml").exists());
    std::fs::remove_file(cluster.folder.path("problems.jsonl")).unwrap();
    let workers = [cluster.start("actor", &[]), cluster.start("verifier", &[])];
    learner.end().success();
    workers.into_iter().for_each(|worker| drop(worker.end().success()));
    cluster.folder.history().assert_steps_of(&expected.history());
}

#[test]
fn problems_are_generated_verified_and_evaluated() {
    let folder = folder();
    let generated =
        folder.call(&["generate", "--domain", "file", "--path", "problems.jsonl", "--count", "5"]).success();
    let lines: Vec<Value> = generated.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 5);
    let answers: String = lines.iter().map(|problem| format!("{}\n", json!({"problem": problem, "answer": format!("The answer is ({}).", problem["answer"].as_str().unwrap())}))).collect();
    std::fs::write(folder.path("answers.jsonl"), answers).unwrap();
    let verified = folder.call(&["verify", "answers.jsonl"]).success();
    for (reply, problem) in verified.stdout.lines().zip(&lines) {
        let letter = problem["answer"].as_str().unwrap();
        assert_eq!(reply, format!("{{\"verdict\":\"correct\",\"read\":\"({letter}).\"}}"));
    }
    folder.call(&TRAIN).success();
    let measured = folder.call(&["eval", "run", "--exam", "file", "--samples", "2", "--json"]).success();
    let measured: Value = serde_json::from_str(&measured.stdout).unwrap();
    let num_problems = measured["scores"]["num_problems"].as_u64().unwrap();
    assert!((1..20).contains(&num_problems), "{measured}");
    let all = folder.call(&["eval", "run", "--samples", "1"]).success();
    assert!(all.stdout.starts_with("file (test)"), "{all:#?}");
    let mine = folder.call(&["eval", "run", "--problems", "problems.jsonl", "--samples", "1", "--json"]).success();
    assert!(mine.stdout.contains(&format!("\"num_problems\":{NUM_PROBLEMS}")), "{mine:#?}");
    let solved = folder.call(&[
        "solve",
        "run",
        r#"{"prompt":"Which letter?","answer":"A","check":"choice"}"#,
        "--domain",
        "file",
    ]);
    assert!(solved.success().stdout.contains("Which letter?"));
    let says = ["file problem: expected JSON with the right answer"];
    refused(&folder, &["solve", "run", "Which letter?", "--domain", "file"], &says);
    refused(&folder, &["generate", "--domain", "file"], &["--path: expected the file whose problems are generated"]);
    let says = ["--path: expected none for countdown"];
    refused(&folder, &["generate", "--domain", "countdown", "--path", "problems.jsonl"], &says);
}

#[test]
fn files_that_cannot_be_used_are_refused_with_their_line() {
    let folder = folder();
    let right = r#"{"prompt":"What is 6 * 7?","answer":"42"}"#;
    for (content, says) in [
        ("", &["problems.jsonl: expected problems, one JSON object per line or one in a row, found none"][..]),
        ("\n\n", &["problems.jsonl: expected problems"]),
        ("nothing", &["problems.jsonl, line 1: expected one JSON object per line"]),
        (
            r#"{"answer":"42"}"#,
            &["line 1: file problem: expected prompt, messages, question, problem, or nums with target, got none"],
        ),
        (r#"{"prompt":"What?"}"#, &["line 1: file problem: expected answer or solution, got neither"]),
        (
            r#"{"prompt":7,"answer":"42"}"#,
            &["expected a text, or a list of messages with role and content, as prompt, got 7"],
        ),
        (r#"{"prompt":" ","answer":"42"}"#, &["expected prompt that ends with a message of the role user"]),
        (
            r#"{"messages":[{"role":"assistant","content":"a"}],"answer":"42"}"#,
            &["ends with a message of the role user"],
        ),
        (r#"{"prompt":"What?","answer":null}"#, &["expected answer or solution, got neither"]),
        (r#"{"prompt":"What?","answer":["42"]}"#, &["expected a text or a number as answer, got [\"42\"]"]),
        (r#"{"prompt":"What?","answer":[0.5]}"#, &["expected a text or a number as answer, got [0.5]"]),
        (
            r#"{"prompt":"What?","answer":"42","check":"math"}"#,
            &["expected exact, number, expression, choice, regex or json as check, got \"math\""],
        ),
        (
            r#"{"prompt":"What?","answer":"five","check":"number"}"#,
            &["expected an answer that its check (number) accepts, got \"five\""],
        ),
        (
            r#"{"prompt":"What?","answer":"(","check":"regex"}"#,
            &["its check (regex) accepts, got \"(\"", "unclosed group"],
        ),
        (r#"{"problem":"What?","solution":"42"}"#, &["expected a solution with \\boxed{}, got \"42\""]),
        (r#"{"nums":[3],"target":82}"#, &["expected 2 to 16 numbers, got 1"]),
    ] {
        std::fs::write(folder.path("problems.jsonl"), content).unwrap();
        refused(&folder, &["config", "tiny.toml"], &[&["domains: "], says].concat());
        if !content.trim().is_empty() {
            std::fs::write(folder.path("problems.jsonl"), format!("{right}\n\n{content}\n")).unwrap();
            let says: Vec<String> = says.iter().map(|says| says.replace("line 1", "line 3")).collect();
            refused(&folder, &["config", "tiny.toml"], &says.iter().map(String::as_str).collect::<Vec<_>>());
        }
    }
    std::fs::write(folder.path("problems.jsonl"), format!("{right}\n{}\n", right.replace("42", "43"))).unwrap();
    let says = ["line 2: file problem: expected one answer and one check for every problem, got others than in 1"];
    refused(&folder, &["config", "tiny.toml"], &says);
    let long = json!({"prompt": "long ".repeat(100), "answer": "42"}).to_string();
    std::fs::write(folder.path("problems.jsonl"), problems() + &long).unwrap();
    refused(&folder, &["config", "tiny.toml"], &["problems.jsonl, line 101 needs model.max_positions = ", "got 200"]);
    std::fs::write(folder.path("problems.jsonl"), right).unwrap();
    refused(&folder, &["config", "tiny.toml"], &["exam file: expected problems, got none"]);
    folder.call(&["config", "tiny.toml", "--set", "exams.names=[]"]).success();
    // Of this problem's hash, it is held out.
    let held_out = (0..1_000).map(|number| format!(r#"{{"prompt":"What is {number} + 1?","answer":{}}}"#, number + 1));
    let held_out = held_out.into_iter().find(|line| {
        let keyed = domains::keyed_from_json(&serde_json::from_str(line).unwrap()).unwrap();
        domains::domain("file").unwrap().is_exam(&keyed.problem)
    });
    std::fs::write(folder.path("problems.jsonl"), held_out.unwrap()).unwrap();
    refused(&folder, &["config", "tiny.toml", "--set", "exams.names=[]"], &["expected problems to train on, got none"]);
    std::fs::write(folder.path("problems.jsonl"), problems()).unwrap();
    let two = "domains = [{ name = \"arithmetic\", path = \"problems.jsonl\", share = 1.0, levels = [{ level = 1, weight = 1.0 }] }]";
    for (from, to, says) in [
        ("path = \"problems.jsonl\", ", "", &["domains.0: expected path = \"FILE\" of the problems, got nothing"][..]),
        (
            "path = \"problems.jsonl\"",
            "path = \"nowhere.jsonl\"",
            &["nowhere.jsonl: expected a file of problems, cannot read it"],
        ),
        ("path = \"problems.jsonl\"", "path = 7", &["expected the path of a file, got 7"]),
        (
            "domains = [{ name = \"file\", path = \"problems.jsonl\", share = 1.0 }]",
            two,
            &["expected no file for the domain arithmetic"],
        ),
        (
            "preset = \"smollm2\"\nmodel = { base = \"model\", max_positions = 200 }\n",
            "preset = \"smoke\"\n",
            &["expected a pretrained model (model.base)"],
        ),
    ] {
        std::fs::write(folder.path("bad.toml"), CONFIG.replace(from, to)).unwrap();
        refused(&folder, &["config", "bad.toml"], says);
    }
    let set = |change: &'static str| ["config", "tiny.toml", "--set", change];
    refused(&folder, &set("local.file=problems.jsonl"), &["expected the place of the file in path alone"]);
}

/// `tests/peers/parquet.py` wrote them.
#[test]
fn parquet_files_are_read_as_the_same_records_in_json_lines() {
    const WRITTEN: [(&str, &[u8]); 3] = [
        ("problems.jsonl", include_bytes!("parquet/problems.jsonl")),
        ("pandas.parquet", include_bytes!("parquet/pandas.parquet")),
        ("pyarrow.parquet", include_bytes!("parquet/pyarrow.parquet")),
    ];
    let folder = folder();
    let config = CONFIG.replace("max_positions = 200", "max_positions = 400");
    let read = WRITTEN.map(|(name, content)| {
        std::fs::write(folder.path(name), content).unwrap();
        let generated = folder.call(&["generate", "--domain", "file", "--path", name, "--count", "100"]).success();
        std::fs::write(folder.path("mine.toml"), config.replace("problems.jsonl", name)).unwrap();
        let config: toml::Table = folder.call(&["config", "mine.toml"]).success().stdout.parse().unwrap();
        (generated.stdout, config["domains"][0]["file"].clone())
    });
    assert_eq!(read[0].0.lines().count(), 100);
    assert!(read[0] == read[1] && read[0] == read[2], "{read:#?}");

    // The run goes on with the same problems in another format, and is asked those of any.
    folder.call(&["train", "mine.toml", "--run-dir", "run", "--steps", "2"]).success();
    let asked = WRITTEN.map(|(name, _)| {
        let asked = folder.call(&["eval", "run", "--problems", name, "--samples", "1"]).success().stdout;
        asked.replace(name, "")
    });
    assert!(!asked[0].is_empty() && asked[0] == asked[1] && asked[0] == asked[2], "{asked:#?}");
    std::fs::remove_file(folder.path("pyarrow.parquet")).unwrap();
    folder.call(&["replay", "run", "--file", "problems.jsonl"]).success();

    let pandas = WRITTEN[1].1;
    let missing = pandas.windows(4).position(|word| word == b"mess").unwrap();
    for (content, says) in [
        (
            &pandas[..pandas.len() - 1],
            "bad.parquet: expected a Parquet file that ends with PAR1, got one that is cut off",
        ),
        (&pandas[..missing], "ends with PAR1"),
        (WRITTEN[0].1, "bad.parquet: expected a Parquet file, which begins with PAR1, got another"),
    ] {
        std::fs::write(folder.path("bad.parquet"), content).unwrap();
        refused(&folder, &["generate", "--domain", "file", "--path", "bad.parquet"], &[says]);
    }
    // A right answer that its check does not accept.
    let mut wrong = pandas.to_vec();
    let check = wrong.windows(6).position(|word| word == b"choice").unwrap();
    wrong[check..check + 6].copy_from_slice(b"number");
    std::fs::write(folder.path("bad.parquet"), wrong).unwrap();
    let says = ["bad.parquet, row 2: file problem: expected an answer that its check (number) accepts, got \"A\""];
    refused(&folder, &["generate", "--domain", "file", "--path", "bad.parquet"], &says);
}

#[test]
fn the_pages_show_records_as_they_are_read() {
    let pages = [include_str!("../../docs/formats.md"), include_str!("../../docs/language-models.md")];
    let blocks = pages.iter().flat_map(|page| page.split("```jsonl\n").skip(1));
    let lines = blocks.flat_map(|block| block.split("```").next().unwrap().lines());
    let read =
        lines.map(|line| domains::Problems::read([(1, serde_json::from_str(line).unwrap())]).unwrap().all().len());
    assert_eq!(read.sum::<usize>(), 7);
}
