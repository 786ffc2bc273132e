//! Guarantees of countdown on text beyond the conformance suite: bounds, and answers that try to cheat the checker.

use domains::{Checker as _, Countdown, Forms, Judged, Ladder, Symbols as _, domain, problem_from_json};
use proto::{CounterRng, Problem, Purpose, Verdict};
use serde_json::{Value, json};

use Verdict::{Correct, Incorrect, Malformed, Resource};

use crate::symbols::{random, solve};

#[allow(dead_code, reason = "shared with other tests")]
mod symbols;

const COUNTDOWN: Countdown = Countdown { calculator: true };

fn problem(json: Value) -> Problem {
    problem_from_json(&json).unwrap_or_else(|error| panic!("{json}: {error}"))
}

/// Returns the problem with the bound of the ladder.
fn bounded(mut json: Value) -> Problem {
    json["max_intermediate"] = 99.into();
    problem(json)
}

fn judged(problem: &Problem, answer: &str) -> (Verdict, String) {
    let Judged { verdict, reason } = domain(&problem.domain).unwrap().judge(problem, None, answer).unwrap();
    assert_eq!(verdict == Correct, reason.is_none(), "{answer:?}: every verdict but correct has a reason");
    (verdict, reason.unwrap_or_default())
}

#[test]
fn a_problem_that_names_no_bound_has_none() {
    let json = json!({"domain": "countdown", "numbers": [40, 25, 20], "target": 50});
    let free = problem(json.clone());
    let right = "40 * 25 = 1000; 1000 / 20 = 50";
    assert_eq!(judged(&free, right), (Correct, String::new()));
    let (verdict, reason) = judged(&bounded(json.clone()), right);
    assert_eq!((verdict, &*reason), (Incorrect, "40 * 25 is 1000, over the max_intermediate of 99"));
    assert_eq!(COUNTDOWN.problem_to_json(&free).unwrap(), json);
    assert_eq!(free.text, "40 25 20 -> 50 no max");
    assert_eq!(COUNTDOWN.problem_from_text(&free.text).unwrap(), free);
    // Problems beyond the symbols of a policy are judged all the same.
    let large = problem(json!({"nums": [1_000, 70_000, 3, 4, 5, 6, 7], "target": 70_000_003u64}));
    assert_eq!(judged(&large, "70000 * 1000 + 3 + 4 + 5 - 6 - 7").1, "ends in 69999999, not 70000003");
    assert_eq!(judged(&large, "1000 * 70000 + 3 + (4 + 5) + 6 - 7 - (7 + 1)").0, Incorrect);
    for refusal in
        [COUNTDOWN.prompt(&large).err(), COUNTDOWN.grammar(&large).err(), COUNTDOWN.hindsight(&large, "").err()]
    {
        let refusal = refusal.unwrap().to_string();
        assert!(refusal.contains("2 to 6 numbers from 1 to 9999") && refusal.contains("70000 1000 7"), "{refusal}");
    }
}

/// A problem without a bound gets the prompt, answer length and verdicts of the smallest bound that fits.
#[test]
fn a_policy_is_asked_in_the_smallest_bound_that_fits() {
    for (json, bounded) in [
        (json!({"numbers": [40, 25, 20], "target": 50}), "40 25 20 -> 50"),
        (json!({"numbers": [40, 30, 75, 60], "target": 100}), "75 60 40 30 -> 100 max 9999"),
        (json!({"numbers": [100, 30, 75, 60], "target": 10}), "100 75 60 30 -> 10 max 9999"),
    ] {
        let (free, bounded) = (problem(json), Problem { domain: "countdown".to_owned(), text: bounded.to_owned() });
        assert_eq!(COUNTDOWN.prompt(&free).unwrap(), COUNTDOWN.prompt(&bounded).unwrap());
        assert_eq!(COUNTDOWN.max_answer_tokens(&free).unwrap(), COUNTDOWN.max_answer_tokens(&bounded).unwrap());
        for index in 0..200 {
            let mut rng = CounterRng::new(5, Purpose::Rollout, 0, index, 0);
            let text = random(&solve(&free), &mut rng);
            assert_eq!(judged(&free, &text).0, judged(&bounded, &text).0, "{text}");
        }
    }
    // Problems that a person types for a policy.
    for (typed, text) in [
        ("3 7 25 -> 78", "25 7 3 -> 78"),
        ("3 7 25 -> 78 max 99", "25 7 3 -> 78"),
        ("3 7 25->78 no max", "25 7 3 -> 78 no max"),
        ("40 30 75 60 -> 100", "75 60 40 30 -> 100 no max"),
        ("2 2 2 2 2 2 2 -> 4", "2 2 2 2 2 2 2 -> 4"),
    ] {
        assert_eq!(COUNTDOWN.problem_from_text(typed).unwrap().text, text);
    }
}

#[test]
fn what_the_run_poses_states_its_bound() {
    for level in COUNTDOWN.ladder_levels() {
        let problem = COUNTDOWN.ladder(level.level, 1, 0).problem;
        let json = COUNTDOWN.problem_to_json(&problem).unwrap();
        assert!(json["max_intermediate"].is_u64(), "{json}");
        assert_eq!(problem_from_json(&json).unwrap(), problem);
    }
    for name in ["countdown-3", "countdown-4", "countdown-sos"] {
        for problem in &domains::exam(name).unwrap().dev {
            assert!(COUNTDOWN.problem_to_json(problem).unwrap()["max_intermediate"].is_u64(), "{problem:?}");
            // An exam problem is still recognised if it names no bound.
            let mut free = COUNTDOWN.problem_to_json(problem).unwrap();
            free.as_object_mut().unwrap().remove("max_intermediate");
            assert!(COUNTDOWN.is_exam(&self::problem(free)), "{problem:?}");
        }
    }
}

/// Columns of the public Countdown data sets are accepted, and errors name the fault in similar records.
#[test]
fn records_of_others() {
    let ours = problem(json!({"domain": "countdown", "numbers": [3, 7, 25], "target": 82}));
    for record in [
        json!({"nums": [3, 7, 25], "target": 82}),
        json!({"numbers": [25, 7, 3], "target": 82}),
        json!({"domain": "countdown", "nums": [3, 7, 25], "target": 82, "max_intermediate": null}),
    ] {
        assert_eq!(problem(record), ours);
    }
    let other = problem(json!({"domain": "countdown-no-calculator", "nums": [3, 7, 25], "target": 82}));
    assert_eq!((&*other.domain, other.text), ("countdown-no-calculator", ours.text));
    for (record, says) in [
        (json!({"nums": [3, 7], "numbers": [3, 7], "target": 10}), "expected one of numbers and nums, got both"),
        (json!({"nums": [3, 7], "target": 10, "solution": "3 + 7"}), "target and max_intermediate, got \"solution\""),
        (json!({"nums": [3, 7], "target": 10.5}), "expected a positive integer of up to 64 bits as target, got 10.5"),
        (
            json!({"nums": [3, -7], "target": 10}),
            "expected a list of positive integers of up to 64 bits as nums, got [3,-7]",
        ),
        (json!({"nums": ["3", 7], "target": 10}), "as nums, got [\"3\",7]"),
        (json!({"nums": [3, 0], "target": 10}), "expected numbers from 1 to 18446744073709551615, got 0"),
        (json!({"nums": [3, 7], "target": 0}), "expected a target from 1 to 18446744073709551615, got 0"),
        (json!({"nums": [3], "target": 3}), "expected 2 to 16 numbers, got 1"),
        (json!({"nums": vec![1; 17], "target": 3}), "expected 2 to 16 numbers, got 17"),
        (json!({"nums": [3, 7], "target": 10, "max_intermediate": 50}), "of 99 or 9999, or none, got 50"),
        (
            json!({"nums": [3, 100], "target": 10, "max_intermediate": 99}),
            "expected numbers from 1 to 99, the largest intermediate result (max_intermediate), got 100",
        ),
        (json!({"nums": [3, 7], "goal": 10}), "as target, got none"),
        (json!({"target": 10}), "as numbers, got none"),
        (json!({"answer": 10}), "domain: expected one of countdown, "),
        (json!({"nums": [3, 7], "target": 1.8446744073709552e19}), "as target, got a number beyond 64 bits"),
        (json!({"domain": 7, "nums": [3, 7], "target": 10}), "got 7"),
        (json!([3, 7]), "problem: expected a JSON object, got [3,7]"),
        (json!(null), "problem: expected a JSON object, got null"),
        (json!("3 7 -> 10"), "problem: expected a JSON object, got \"3 7 -> 10\""),
    ] {
        let error = problem_from_json(&record).unwrap_err().to_string();
        assert!(error.contains(says), "{record}: {error}");
    }
}

/// Attacks on the checker: each line would be right, or worth trying, under laxer parsing.
#[test]
fn attacks_get_their_verdicts() {
    let json = json!({"numbers": [3, 7, 25], "target": 82});
    let (free, bounded) = (problem(json.clone()), bounded(json));
    let deep = |depth: usize| format!("{}25 * 3{} + 7", "(".repeat(depth), ")".repeat(depth));
    assert_eq!(judged(&free, &deep(32)).0, Correct);
    assert_eq!(judged(&free, &deep(33)).0, Resource);
    assert_eq!(judged(&free, &"(".repeat(1_000)).0, Resource);
    let (huge, long, padded) =
        ("9".repeat(1_000), "25 * 3 + 7 + ".repeat(100), format!("25 * 3 + 7{}", " ".repeat(1_024)));
    let malformed = [
        // Empty, or not an answer.
        "",
        " ",
        "\n\n",
        ";",
        " ; ",
        ",",
        "=",
        "= 82",
        "()",
        "82",
        "(82)",
        "82 = 82",
        "25",
        "\0",
        // The answer with other text around it.
        "the answer is 82",
        "25 * 3 + 7 # right",
        "25 * 3 + 7 -- grader: correct",
        "<answer>25 * 3 + 7</answer>",
        // Missing steps.
        "25 * 3 = 75;; 75 + 7 = 82",
        "; 25 * 3 = 75; 75 + 7 = 82",
        "25 * 3 = 75; 75 + 7 = 82;",
        "25 * 3 + 7,",
        "25 * 3 = 75,, 75 + 7 = 82",
        "25 * 3 = 75; ; 75 + 7 = 82",
        "25 * 3 = 75;\n;75 + 7 = 82",
        // Malformed steps.
        "25 * 3 = 75; 75 + 7",
        "25 * 3; 75 + 7 = 82",
        "25 * 3 = 75; 82",
        "25 * 3 = 75; (75) + 7 = 82",
        "25 * 3 = 75 75 + 7 = 82",
        "25 * 3 = 75 + 7 = 82",
        "25 * 3 + 7 = 82 = 82",
        "25 * 3 + 7 = 75 + 7",
        "82 = 25 * 3 + 7",
        "25 * 3 + 7 =",
        "25 * 3 + 7 == 82",
        "25 * 3 + 7 = (82)",
        "(25 * 3 + 7 = 82)",
        "25 * 3\n+ 7",
        "25 = 25; 25 * 3 = 75; 75 + 7 = 82",
        "25 * 3 = 75; 75 + 7 = 82; 82 = 82",
        // Signs.
        "-25 + 3 + 7",
        "+25 * 3 + 7",
        "25 * +3 + 7",
        "25 * 3 - -7",
        "25 * 3 + +7",
        "25 * 3 -- 7",
        "(-25) * 3 + 7",
        "25 * 3 + 7 = +82",
        "25 * 3 + 7 = -82",
        "25 * -3 = 75",
        "25 * 3 = 75; 75 + 7 = +82",
        "−25 * 3",
        "25 * (−3)",
        // Unknown operators.
        "25 ** 3",
        "25 // 3",
        "25 ^ 3",
        "25 % 3 + 7",
        "25 x 3 + 7",
        "25 X 3 + 7",
        "25 · 3 + 7",
        "25 ∗ 3 + 7",
        "25 ⁄ 3",
        "25 – 3",
        "25 — 3",
        "25 ＋ 3",
        "25 ✕ 3 + 7",
        "25 : 3",
        "25 << 3",
        "25 | 3",
        "25 ~ 3",
        "25 !",
        // Adjacent operands without an operator.
        "25(3) + 7",
        "(25)(3) + 7",
        "(25) 3 + 7",
        "2 5 * 3 + 7",
        "25 3 7",
        "25 * 3 7",
        "25 * (3) 7",
        // Other spellings of integers.
        "025 * 3 + 7",
        "25 * 03 + 7",
        "25 * 3 = 075; 75 + 7 = 82",
        "25 * 3 + 7 = 082",
        "25.0 * 3 + 7",
        "25. * 3 + 7",
        "2_5 * 3 + 7",
        "2,5 * 3 + 7",
        "0x19 * 3 + 7",
        "0b11 * 25 + 7",
        "0o31 * 3 + 7",
        "25e0 * 3 + 7",
        "2.5e1 * 3 + 7",
        "25u64 * 3 + 7",
        "25L * 3",
        "２５ * 3 + 7",
        "٢٥ * 3 + 7",
        "²⁵ * 3",
        "25² + 3",
        "Ⅲ * 25 + 7",
        "½ * 25",
        "25 * 3 + 七",
        "\"25\" * 3 + 7",
        "'25' * 3",
        "25 * 3 + 7.",
        "0 + 0 = 0",
        "25 * 0 + 3 + 7",
        "25 * 3 + 7 + 0",
        "25 - 25 = 0; 3 + 7 = 10",
        // Unbalanced or misplaced parentheses.
        "(25 * 3 + 7",
        "25 * 3 + 7)",
        ")25 * 3 + 7(",
        "((25 * 3) + 7",
        "(25 * 3)) + 7",
        "[25 * 3] + 7",
        "{25 * 3} + 7",
        "(25 * 3] + 7",
        "25 * () 3",
        "25 * (3 +) 7",
        "（25 * 3） + 7",
        // Missing operands.
        "25 * 3 +",
        "* 3 + 7",
        "25 * * 3",
        "25 * 3 + 7 +",
        "+",
        "25 +* 3",
        // Invisible characters.
        "\u{feff}25 * 3 + 7",
        "25\u{a0}* 3 + 7",
        "25\u{200b} * 3 + 7",
        "25 * 3 + 7\u{2028}",
        "25 * 3 + 7\0",
        "2\u{200d}5 * 3 + 7",
        "25 * 3\u{b}+ 7",
        "25 * 3\u{c}+ 7",
        "25 * 3 \u{202e}+ 7",
        "25 * 3\u{85}+ 7",
        "25 * 3 = 75\u{2028}75 + 7 = 82",
        // Calls.
        "eval('82')",
        "__import__('os')",
        "max(25, 82)",
        "sum([25, 57])",
        "25 if 1 else 3",
        "82; rm -rf /",
        // Over the length limits.
        &huge,
        &long,
        &padded,
    ];
    for answer in malformed {
        assert_eq!(judged(&free, answer).0, Malformed, "{answer:?}");
        assert_eq!(judged(&bounded, answer).0, Malformed, "{answer:?}");
    }
    let incorrect = [
        // Arithmetic that wraps, rounds or leaves the positive integers.
        "25 / 3 * 7",
        "25 / 7 * 3",
        "(3 - 25) * 7",
        "3 - 7 + 25",
        "(25 - 25) + 82",
        "7 / 25 * 3",
        "3 / 7 = 1; 25 + 57 = 82",
        // The target used as a number, and numbers that are reused, unused or not given.
        "82 * 1",
        "82 / 1 = 82",
        "82 + 25 - 25",
        "75 + 7 = 82",
        "75 + 7",
        "25 * 3 + 7 * 25 / 25",
        "25 * 3 = 75; 75 + 7 = 82; 82 * 1 = 82",
        "25 * 3 = 75; 75 * 1 = 75; 75 + 7 = 82",
        "25 + 57 = 82",
        "25 * 3 = 82",
        "253 + 7",
        "25 + 3 + 7 + 7 * 7 - 2",
        // False results.
        "25 * 3 = 82; 82 + 7 = 82",
        "25 + 3 + 7 = 82",
        "25 * 3 = 75; 75 + 7 = 83",
        "25 * 3 + 7 = 83",
        "25 + 7 = 82; 82 / 3 = 82",
        "25 * 3 = 75; 7 + 3 = 10; 75 + 7 = 82",
    ];
    for answer in incorrect {
        assert_eq!(judged(&free, answer).0, Incorrect, "{answer:?}");
        assert_eq!(judged(&bounded, answer).0, Incorrect, "{answer:?}");
    }
}
