//! Reasons that the programs domain gives for wrong answers in text, and information that it must not reveal.

use std::collections::BTreeSet;

use domains::programs::{Dialect, Programs};
use domains::{Checker, Forms, exam};
use proto::{Problem, ProblemKey};

use crate::symbols::enumerated;

#[allow(dead_code, reason = "shared with other tests")]
mod symbols;

const FULL: Programs = Programs { dialect: Dialect::Full };

fn problem(text: &str) -> Problem {
    FULL.problem_from_text(text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn reason(problem: &Problem, answer: &str) -> Option<String> {
    FULL.judge(problem, None, answer).unwrap().reason
}

#[test]
fn reasons_by_hand() {
    for (text, answer, expected) in [
        ("sort : [2 1] -> ?", "[2 1]", "is not what the program gives"),
        ("sort : [2 1] -> ?", "7", "is not what the program gives"),
        ("sort : [2 1] -> ?", "[1,,2]", "expected an element on both sides of every comma, got \"[1,,2]\""),
        ("sort : ? -> [1 2]", "[2 2]", "gives [2 2] on [2 2], not [1 2]"),
        ("sort : ? -> [1 2]", "[10 1]", "expected an input, a list of up to 6 integers from -9 to 9"),
        ("sort : ? -> [1 2]", "1", "expected an input, a list of up to 6 integers from -9 to 9"),
        ("map (sq) sum : ? -> 5", "[9 9]", "leaves the integers from -99 to 99 on [9 9]"),
        ("dup : ? -> [1 1]", "[1 2 3 4]", "gives a list of 8 elements on [1 2 3 4], not [1 1]"),
        ("? max 1 : [2 1] -> [1 2]", "uniq", "gives [2 1] on [2 1], not [1 2]"),
        ("? max 1 : [2 1] -> [1 2]", "sort rev rev", "has 3 operations, up to 1 are allowed"),
        ("? max 1 : [2 1] -> [1 2]", "sum rev", "word 2, \"rev\", does not fit what stands before it"),
        ("? max 1 : [2 1] -> [1 2]", "sum", "gives 3 on [2 1], not [1 2]"),
    ] {
        assert_eq!(reason(&problem(text), answer).unwrap(), expected, "{text} / {answer}");
    }
    let induction = problem("? max 4 : [9 9 9 9 9 9] -> [9]");
    let sorts = "sum range dup dup ".to_owned() + &"sort ".repeat(100);
    for (answer, expected) in [
        (sorts, "takes more than 4096 fuel on [9 9 9 9 9 9]"),
        ("dup ".repeat(40), "makes a list of more than 512 elements on [9 9 9 9 9 9]"),
        ("when even ".repeat(12) + "rev", "nested more than 8 deep"),
        ("9 ".repeat(1_000), "expected an answer of up to 1024 bytes, got 2000"),
    ] {
        assert_eq!(reason(&induction, &answer).unwrap(), expected);
    }
}

/// A reason does not depend on what a problem hides, so it reveals nothing about it.
#[test]
fn reasons_do_not_give_hidden_answers_away() {
    // Deduction: other programs on other inputs, with other outputs of either type.
    let answers = ["0", "[]", "[1 2]", "[9 9 9 9 9 9]", "-99", "[1,]", "x", ""];
    let hidden = ["sort : [2 1 3] -> ?", "sum : [2 1 3] -> ?", "rev dup : [4 4] -> ?", "map (* 3) : [-5 7] -> ?"];
    for answer in answers {
        let reasons = hidden.map(|text| reason(&problem(text), answer));
        assert!(reasons.iter().all(|reason| reason.is_some() && *reason == reasons[0]), "{answer}: {reasons:?}");
    }
    // Induction: other keys of the same pairs.
    let induction = problem("? max 2 : [4] -> 4 ; [5] -> 5");
    for answer in ["max", "head", "last", "rev last", "sum", "len", "sum rev", "min"] {
        let reasons: BTreeSet<String> = ["sum", "max", "head", "last", "min"]
            .into_iter()
            .filter_map(|reference| {
                FULL.checker(&induction, Some(&ProblemKey { text: reference.to_owned() })).unwrap().judge(answer).reason
            })
            .collect();
        assert_eq!(reasons.len(), 1, "{answer}: {reasons:?}");
    }
    // The keys of exams: if a wrong program fits the visible pairs, the reason tells no more than that.
    let mut num_hidden = 0;
    for problem in exam("programs-induction").unwrap().dev.iter().take(20) {
        for answer in enumerated(problem).take(20_000) {
            let told = reason(problem, &answer);
            if let Some(hidden) = told.as_deref().and_then(|told| told.strip_prefix("fits the pairs, and ")) {
                num_hidden += 1;
                assert_eq!(hidden, "does something else on an input that is not shown");
            }
        }
    }
    assert!(num_hidden > 0);
}
