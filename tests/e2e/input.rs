//! Text input from users: every file and argument that is read, and docs/formats.md word for word.

use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::bad_input::refused;
use crate::runs::{Ended, Files, Folder, reference};

const PAGE: &str = include_str!("../../docs/formats.md");

const RIGHT: &str = r#"{"problem":{"domain":"countdown","numbers":[3,7],"target":4},"answer":"7 - 3 = 4"}"#;
const CORRECT: &str = "{\"verdict\":\"correct\"}\n";
const MARK: &str = "\u{feff}";

fn verify(text: impl Into<Vec<u8>>) -> Ended {
    let folder = Folder::holding(&Files::from([("answers.jsonl".into(), text.into())]));
    folder.call(&["verify", "answers.jsonl"])
}

/// Runs a command of `sh` in which `$0` is the binary.
fn shell(folder: &Folder, script: &str) -> Ended {
    let mut command = Command::new("sh");
    command.args(["-c", script, env!("CARGO_BIN_EXE_autodidact")]).stdin(Stdio::null());
    folder.start_command(command).end()
}

/// Returns the error that replaces the only line's verdict.
fn error_of(line: &str) -> String {
    let ended = verify(line);
    let reply: Value = serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{line}: {error} {ended:#?}"));
    assert_eq!(
        ended.refusal(),
        "1 of 1 lines are not a valid problem with an answer; the output has an error for each"
    );
    assert_eq!(reply["line"], 1);
    reply["error"].as_str().unwrap_or_else(|| panic!("{line}: {reply}")).to_owned()
}

#[test]
fn the_page_says_what_verify_prints() {
    let blocks: Vec<&str> = PAGE.split("```json\n").skip(1).map(|block| block.split("```").next().unwrap()).collect();
    let [answers, replies] = blocks[..] else { panic!("expected answers and replies, got {blocks:?}") };
    assert_eq!(verify(answers).stdout, replies);
}

#[test]
fn the_page_names_problems_as_they_are_read() {
    let mut num_read = 0;
    for row in PAGE.lines().filter(|line| line.contains("| `{\"")) {
        let cells: Vec<&str> = row.split("| ").map(|cell| cell.trim_matches([' ', '|', '`'])).collect();
        let [.., json, text] = cells[..] else { panic!("{row}") };
        let read = domains::problem_from_json(&serde_json::from_str(json).unwrap()).unwrap();
        let typed = domains::domain(&read.domain).unwrap().problem_from_text(text).unwrap();
        let bare = |text: &str| text.trim_end_matches(" no max").to_owned();
        assert_eq!(bare(&typed.text), bare(&read.text), "{row}");
        num_read += 1;
    }
    assert_eq!(num_read, 10);
}

#[test]
fn a_key_is_given_once() {
    let right = r#""domain":"countdown","numbers":[3,7,25],"target":82"#;
    let answer = r#""answer":"25 * 3 = 75; 75 + 7 = 82""#;
    for (line, says) in [
        (format!(r#"{{"problem":{{{right},"target":10}},{answer}}}"#), "target is given twice at column 72"),
        (format!(r#"{{"problem":{{"target":10,{right}}},{answer}}}"#), "target is given twice"),
        (format!(r#"{{"problem":{{{right}}},"answer":"wrong",{answer}}}"#), "answer is given twice"),
        (format!(r#"{{"problem":{{}},"problem":{{{right}}},{answer}}}"#), "problem is given twice"),
        (format!(r#"{{"problem":{{{right},"numbers":[82,1]}},{answer}}}"#), "numbers is given twice"),
        (format!(r#"{{"problem":{{{right},"nums":[82,1]}},{answer}}}"#), "expected one of numbers and nums, got both"),
        (format!(r#"{{"problem":{{{right},"t\u0061rget":10}},{answer}}}"#), "target is given twice"),
        (format!(r#"{{"problem":{{{right}}},{answer},"meta":[{{"a":{{"b":1,"b":1}}}}]}}"#), "b is given twice"),
    ] {
        let error = error_of(&line);
        assert!(error.contains(says), "{line}: {error}");
    }
    let folder = Folder::holding(&reference(0).files);
    std::fs::write(folder.path("mine.jsonl"), format!("{{{right}}}\n{{{right},\"domain\":\"countdown\"}}\n")).unwrap();
    let says = ["mine.jsonl, line 2: ", "domain is given twice at column 61"];
    refused(&folder, &["eval", "run", "--problems", "mine.jsonl"], &says);
    let says = ["problem: expected a JSON object: target is given twice at column 61"];
    refused(&folder, &["solve", "run", &format!("{{{right},\"target\":10}}")], &says);
}

#[test]
fn a_byte_order_mark_is_taken_at_the_start_and_named_elsewhere() {
    assert_eq!(verify(format!("{MARK}{RIGHT}\n{RIGHT}\n")).success().stdout, CORRECT.repeat(2));
    assert_eq!(verify(format!("{MARK}\n{RIGHT}\n")).success().stdout, CORRECT);
    for text in [format!("{RIGHT}\n{MARK}{RIGHT}\n"), format!("\n{MARK}{RIGHT}\n"), format!("{MARK}{MARK}{RIGHT}\n")] {
        let ended = verify(text);
        assert!(
            ended.stdout.contains("a byte order mark (U+FEFF) is at character 1; it is allowed only"),
            "{ended:#?}"
        );
        assert!(ended.refusal().starts_with("1 of "), "{ended:#?}");
    }
    let ended = verify(RIGHT.replace("7 - 3", &format!("{MARK}7 - 3"))).success();
    assert!(ended.stdout.starts_with("{\"verdict\":\"malformed\",\"reason\":\"") && ended.stdout.contains("(U+FEFF)"));
    let utf_16: Vec<u8> = format!("{MARK}{RIGHT}\n").encode_utf16().flat_map(u16::to_le_bytes).collect();
    assert!(verify(utf_16).stdout.contains("expected UTF-8, got a UTF-16 byte order mark"));

    let folder = Folder::holding(&reference(0).files);
    let problem = r#"{"nums":[3,7],"target":4}"#;
    std::fs::write(folder.path("mine.jsonl"), format!("{MARK}{problem}\n\n{problem}\n")).unwrap();
    let scored = folder.call(&["eval", "run", "--problems", "mine.jsonl", "--samples", "1", "--json"]).success();
    assert!(scored.stdout.contains("\"num_problems\":2"), "{scored:#?}");
    std::fs::write(folder.path("mine.jsonl"), format!("{problem}\n{MARK}{problem}\n")).unwrap();
    refused(&folder, &["eval", "run", "--problems", "mine.jsonl"], &["mine.jsonl, line 2: ", "(U+FEFF)"]);
    for text in ["3 7 -> 21", problem] {
        folder.call(&["solve", "run", &format!("{MARK}{text}"), "--samples", "1"]).success();
        refused(&folder, &["solve", "run", &format!("{MARK}{MARK}{text}")], &["feff"]);
    }

    let config = "preset = \"smoke\"\nseed = 7\n";
    let files = |text: String| Files::from([("mine.toml".to_owned(), text.into_bytes())]);
    let resolved = Folder::holding(&files(format!("{MARK}{config}"))).call(&["config", "mine.toml"]).success();
    assert_eq!(resolved.stdout, Folder::holding(&files(config.to_owned())).call(&["config", "mine.toml"]).stdout);
    let twice = Folder::holding(&files(format!("{MARK}{MARK}{config}")));
    refused(&twice, &["config", "mine.toml"], &["mine.toml: expected at most one byte order mark (U+FEFF), got two"]);
    let says = ["mine.toml, line 1, column 9: unclosed table, expected `]`"];
    refused(&Folder::holding(&files(format!("{MARK}[learner\n"))), &["config", "mine.toml"], &says);
    let says = ["mine.toml, line 2, column 1: ", "a byte order mark (U+FEFF) is at line 2, column 1"];
    refused(&Folder::holding(&files(config.replace("seed", &format!("{MARK}seed")))), &["config", "mine.toml"], &says);
    let study = include_str!("../../deploy/studies/smoke.toml");
    let folder = Folder::holding(&files(format!("{MARK}{study}")));
    folder.call(&["study", "mine.toml", "--dry-run"]).success();
}

#[test]
fn a_dash_is_standard_input_and_blank_lines_are_no_lines() {
    let text = format!("\n{RIGHT}\r\n  \t\r\n\n{RIGHT}\nno JSON\n\n");
    let folder = Folder::holding(&Files::from([("answers.jsonl".into(), text.clone().into_bytes())]));
    let replies = [folder.call(&["verify", "answers.jsonl"])].into_iter().chain(
        ["verify - < answers.jsonl", "verify < answers.jsonl"].map(|call| shell(&folder, &format!("\"$0\" {call}"))),
    );
    for ended in replies {
        assert!(ended.stdout.starts_with(&CORRECT.repeat(2)), "{ended:#?}");
        assert_eq!(ended.stdout.lines().count(), 3, "{ended:#?}");
        assert!(ended.stdout.ends_with("\"line\":6}\n"), "{ended:#?}");
        assert!(ended.refusal().starts_with("1 of 3 lines"), "{ended:#?}");
    }
    assert_eq!(verify("\n \n").success().stdout, "");
    let folder = Folder::new();
    for file in ["- < mine.toml", "mine.toml"] {
        let call = format!("printf 'preset = \"smoke\"\\nseed = 7\\n' > mine.toml; \"$0\" config {file}");
        assert!(shell(&folder, &call).success().stdout.starts_with("seed = 7\n"), "{file}");
    }
    let wrong = shell(&folder, "echo 'seed = ' | \"$0\" config -");
    assert!(wrong.refusal().starts_with("standard input, line 1, column "), "{wrong:#?}");
    let begun = shell(&folder, "\"$0\" train - --steps 1 < mine.toml").success();
    assert!(begun.stdout.starts_with("run directory: runs/stdin-7-1\n"), "{begun:#?}");

    let folder = Folder::holding(&reference(0).files);
    let call = "\"$0\" generate --domain countdown --count 3 | \"$0\" eval run --problems - --samples 1 --json";
    let scored: Value = serde_json::from_str(&shell(&folder, call).success().stdout).unwrap();
    assert_eq!((&scored["exam"], &scored["scores"]["num_problems"]), (&json!("standard input"), &json!(3)));
    let wrong = shell(&folder, "echo '{}' | \"$0\" eval run --problems -");
    assert!(wrong.refusal().starts_with("standard input, line 1: domain: expected one of"), "{wrong:#?}");
}

#[test]
fn what_was_found_is_named() {
    let problem = r#"{"domain":"countdown","numbers":[3,7],"target":4}"#;
    for (line, says) in [
        (format!(r#"{{"problem":{problem},"answer":7}}"#), "expected a text field `answer`, got 7"),
        (format!(r#"{{"problem":{problem},"answer":[1,4]}}"#), "expected a text field `answer`, got [1,4]"),
        (format!(r#"{{"problem":{problem},"answer":null}}"#), "expected a text field `answer`, got null"),
        (format!(r#"{{"problem":{problem},"answer":[{}1]}}"#, "1,".repeat(99)), "got an array of 100 elements"),
        (r#"{"problem":7,"answer":"7"}"#.to_owned(), "problem: expected a JSON object, got 7"),
        (r#"{"problem":null,"answer":"7"}"#.to_owned(), "problem: expected a JSON object, got null"),
        (r#"{"problem":{"domain":null},"answer":"7"}"#.to_owned(), "domain: expected one of countdown, "),
        ("[1,4]".to_owned(), "expected one JSON object per line, got [1,4]"),
        (
            "[".to_owned(),
            "expected one JSON object per line, got part of an array: EOF while parsing a list at column 1",
        ),
        ("null".to_owned(), "expected one JSON object per line, got null"),
        (format!("{RIGHT},"), "expected one JSON object per line: trailing characters at column 83"),
    ] {
        let error = error_of(&line);
        assert!(error.starts_with(says) || error.ends_with(says), "{line}: {error}");
        assert!(error.chars().count() <= 300, "{error}");
    }
    let long = "9".repeat(9_999);
    let problem_of = |field: &str| format!(r#"{{"problem":{{"domain":"countdown",{field}"target":4}},"answer":"7"}}"#);
    let error = error_of(&problem_of(&format!("\"numbers\":\"{long}\",")));
    assert!(error.ends_with("as numbers, got a string of 9999 bytes"), "{error}");
    let error = error_of(&problem_of(&format!("\"numbers\":[1,3],\"{long}\":1,")));
    assert!(error.chars().count() < 300 && error.ends_with("9\"..."), "{error}");

    let folder = Folder::holding(&reference(0).files);
    for (text, says) in [
        (
            format!("[\n  {problem},\n  {problem}\n]\n"),
            "mine.jsonl, line 1: expected one JSON object per line, got part of an array",
        ),
        (
            format!("[{problem},{problem}]\n"),
            "mine.jsonl, line 1: expected one JSON object per line, got an array of 2 elements",
        ),
        (
            format!("{problem}\n{problem},\n"),
            "mine.jsonl, line 2: expected one JSON object per line: trailing characters at column 50",
        ),
        (
            format!("{problem}\n\n{{\"nums\":[3,7],\"target\":100000}}\n"),
            "mine.jsonl, line 3: countdown problem: expected what a policy can be asked",
        ),
        (
            format!("{problem}\n{{\"nums\":[100,200,300,400],\"target\":777}}\n"),
            "mine.jsonl, line 2: 400 300 200 100 -> 777 no max: expected prompt and answer within model.max_positions = 32",
        ),
    ] {
        std::fs::write(folder.path("mine.jsonl"), text).unwrap();
        refused(&folder, &["eval", "run", "--problems", "mine.jsonl"], &[says]);
    }
    for (text, says) in [
        (format!("{problem},"), "problem: expected a JSON object: trailing characters at column 50"),
        (format!("[{problem}]"), "problem: expected a JSON object, got [{\"domain\":"),
        ("{\"nums\":[3,7],\n\"target\"}".to_owned(), "expected `:` at line 2, column 9"),
        ("{\"nums\":[3,7,1,1,1,1,1],\"target\":4}".to_owned(), "expected what a policy can be asked, 2 to 6 numbers"),
        ("[40,25,20] -> 50".to_owned(), "expected numbers, an arrow and a target"),
        ("\"3 7 -> 4\"".to_owned(), "problem: expected a JSON object, got \"3 7 -> 4\""),
    ] {
        refused(&folder, &["solve", "run", &text], &[says]);
    }
}

#[test]
fn problems_of_others_are_posed() {
    let folder = Folder::holding(&reference(0).files);
    let solve = |text: &str, more: &[&str]| {
        let ended = folder.call(&[&["solve", "run", text, "--samples", "1", "--json"], more].concat()).success();
        serde_json::from_str::<Value>(&ended.stdout).unwrap()["problem"].clone()
    };
    let typed = json!({"domain": "countdown", "numbers": [7, 3], "target": 21, "max_intermediate": 99});
    assert_eq!(solve("3 7 -> 21", &[]), typed);
    let record = r#"{"nums":[3,7],"target":21}"#;
    let mut free = json!({"domain": "countdown", "numbers": [7, 3], "target": 21});
    assert_eq!(solve(record, &[]), free);
    free["domain"] = "countdown-no-calculator".into();
    assert_eq!(solve(record, &["--domain", "countdown-no-calculator"]), free);
}

/// A record that names no domain uses the variant that the run trains on.
#[test]
fn a_run_without_a_calculator_is_asked_without_one() {
    let folder = Folder::new();
    let domains =
        "domains=[{ name = \"countdown-no-calculator\", share = 1.0, levels = [{ level = 2, weight = 1.0 }] }]";
    folder.call(&["train", "smoke", "--run-dir", "run", "--steps", "1", "--set", domains]).success();
    let eval = |domain: &str| {
        let line = |index| format!("{{{domain}\"nums\":[{},7,3],\"target\":{}}}\n", 10 + index, 20 + index);
        std::fs::write(folder.path("mine.jsonl"), (0..12).map(line).collect::<String>()).unwrap();
        folder.call(&["eval", "run", "--problems", "mine.jsonl", "--samples", "8", "--json"]).success().stdout
    };
    assert_eq!(eval(""), eval("\"domain\":\"countdown-no-calculator\","));
    assert_ne!(eval(""), eval("\"domain\":\"countdown\","));
}
