//! Guarantees of programs beyond the conformance suite: semantics by hand and by a second evaluator, hostile answers,
//! keys, held-out behaviours, and the composition of exams.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use domains::programs::{Dialect, ExamSplit, Mode, Programs, Stratum};
use domains::{Checker, Exam, ExamSpec, Exams, Forms, Ladder, Symbols as _, exam};
use proto::{CounterRng, Problem, ProblemKey, Purpose, TokenId, Verdict};

use crate::evaluator::{Data, evaluate};
use crate::symbols::{enumerated, prompt_len, propose, random, solve};

mod symbols;

const FULL: Programs = Programs { dialect: Dialect::Full };
const DIGITS: Programs = Programs { dialect: Dialect::Digits };

fn problem(domain: Programs, text: &str) -> Problem {
    domain.problem_from_text(text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn key(text: &str) -> ProblemKey {
    ProblemKey { text: text.to_owned() }
}

fn random_answer(problem: &Problem, rng: &mut CounterRng) -> String {
    random(&solve(problem), rng)
}

fn verdict(domain: Programs, problem: &Problem, answer: &str) -> Verdict {
    domain.judge(problem, None, answer).unwrap().verdict
}

// Semantics.

#[test]
fn every_operation_by_hand() {
    let full = [
        ("rev", "[3 1 2]", "[2 1 3]"),
        ("sort", "[3 -1 2 3]", "[-1 2 3 3]"),
        ("uniq", "[3 1 3 -1 1]", "[3 1 -1]"),
        ("cum", "[3 -1 2]", "[3 2 4]"),
        ("diff", "[3 1 5]", "[-2 4]"),
        ("diff", "[7]", "[]"),
        ("diff", "[]", "[]"),
        ("rot", "[1 2 3]", "[2 3 1]"),
        ("rot", "[]", "[]"),
        ("dup", "[1 2]", "[1 2 1 2]"),
        ("take 2", "[4 5 6]", "[4 5]"),
        ("take 4", "[4 5]", "[4 5]"),
        ("drop 2", "[4 5 6]", "[6]"),
        ("drop 4", "[4 5]", "[]"),
        ("sum", "[4 -5 6]", "5"),
        ("sum", "[]", "0"),
        ("len", "[4 5 6]", "3"),
        ("len", "[]", "0"),
        ("max", "[-4 -5]", "-4"),
        ("max", "[]", "0"),
        ("min", "[4 -5]", "-5"),
        ("min", "[]", "0"),
        ("head", "[4 5]", "4"),
        ("head", "[]", "0"),
        ("last", "[4 5]", "5"),
        ("last", "[]", "0"),
        ("len range", "[9 9 9]", "[1 2 3]"),
        ("head range", "[-2]", "[]"),
        ("head + 9", "[-4]", "5"),
        ("head - 9", "[4]", "-5"),
        ("head * 5", "[-4]", "-20"),
        ("head / 2", "[7]", "3"),
        ("head / 2", "[-7]", "-4"),
        ("head % 3", "[7]", "1"),
        ("head % 3", "[-7]", "2"),
        ("head abs", "[-7]", "7"),
        ("head neg", "[7]", "-7"),
        ("head sq", "[-7]", "49"),
        ("map (* 2)", "[1 -2 3]", "[2 -4 6]"),
        ("map (when (< 0) (neg))", "[1 -2 3]", "[1 2 3]"),
        ("map (if (even) (/ 2) else (* 3))", "[4 5 -3]", "[2 15 -9]"),
        ("filter (> 2)", "[1 2 3 4]", "[3 4]"),
        ("filter (< 2)", "[1 2 3 -4]", "[1 -4]"),
        ("filter (even)", "[1 2 -3 -4 0]", "[2 -4 0]"),
        ("filter (odd)", "[1 2 -3 -4]", "[1 -3]"),
        ("if (> 3) (rev) else (sort)", "[4 1 5]", "[5 1 4]"),
        ("if (> 3) (rev) else (sort)", "[3 1 5]", "[1 3 5]"),
        ("if (> 3) (sum) else (len)", "[3 1 5]", "3"),
        ("if (even) (rev) else (drop 1)", "[]", "[]"),
        ("when (odd) (drop 1)", "[3 1]", "[1]"),
        ("when (odd) (drop 1)", "[2 1]", "[2 1]"),
        ("sum when (> 9) (% 5)", "[9 4]", "3"),
        ("filter (> 3) map (* 2) sum", "[1 4 5]", "18"),
    ];
    let digits = [
        ("+ 3", "[1 8]", "[4 1]"),
        ("* 7", "[1 3]", "[7 1]"),
        ("rev", "[1 2]", "[2 1]"),
        ("sort", "[2 1]", "[1 2]"),
        ("uniq", "[2 1 2]", "[2 1]"),
        ("cum", "[7 8 1]", "[7 5 6]"),
        ("rot", "[1 2 3]", "[2 3 1]"),
        ("take 1", "[4 5]", "[4]"),
        ("drop 1", "[4 5]", "[5]"),
        ("sum", "[7 8]", "5"),
        ("max", "[7 8]", "8"),
        ("min", "[7 8]", "7"),
        ("> 4", "[4 5]", "[5]"),
        ("< 5", "[4 5]", "[4]"),
        ("even", "[4 5 0]", "[4 0]"),
        ("odd", "[4 5]", "[5]"),
        ("sort + 1 even", "[9 1 2]", "[2 0]"),
    ];
    for (domain, cases) in [(FULL, &full[..]), (DIGITS, &digits[..])] {
        for (program, input, output) in cases {
            let deduction = problem(domain, &format!("{program} : {input} -> ?"));
            assert_eq!(verdict(domain, &deduction, output), Verdict::Correct, "{}", deduction.text);
            let wrong = if *output == "[]" { "[0]" } else { "[]" };
            assert_eq!(verdict(domain, &deduction, wrong), Verdict::Incorrect);
            let abduction = problem(domain, &format!("{program} : ? -> {output}"));
            assert_eq!(verdict(domain, &abduction, input), Verdict::Correct, "{}", abduction.text);
        }
    }
}

/// A second evaluator, on text and with immutable lists: slow, and written independently of the first.
mod evaluator {
    use domains::programs::Dialect;

    #[derive(Clone, Debug, PartialEq)]
    pub(super) enum Data {
        Number(i64),
        Numbers(Vec<i64>),
    }

    /// Runs a program in canonical text; `None` where it has no value.
    pub(super) fn evaluate(dialect: Dialect, program: &str, input: &[i64]) -> Option<Data> {
        let spaced = program.replace('(', " ( ").replace(')', " ) ");
        let words: Vec<&str> = spaced.split_whitespace().filter(|word| !["(", ")", "else"].contains(word)).collect();
        let mut data = Data::Numbers(input.to_vec());
        let mut rest = &words[..];
        while !rest.is_empty() {
            let (result, after) = apply(dialect, rest, &data);
            (data, rest) = (result?, after);
        }
        Some(data)
    }

    /// Applies the first operation. Returns its result and the words after it.
    fn apply<'a>(dialect: Dialect, words: &'a [&'a str], data: &Data) -> (Option<Data>, &'a [&'a str]) {
        let (word, rest) = (words[0], &words[1..]);
        if dialect == Dialect::Digits && ["+", "*"].contains(&word) {
            return each(dialect, words, data);
        }
        if dialect == Dialect::Digits && [">", "<", "even", "odd"].contains(&word) {
            return keep(words, data);
        }
        match word {
            "map" => each(dialect, rest, data),
            "filter" => keep(rest, data),
            "when" | "if" => {
                let asked = match data {
                    Data::Number(number) => *number,
                    Data::Numbers(numbers) => numbers.first().copied().unwrap_or(0),
                };
                let (holds, branches) = ask(rest, asked);
                let (first, after) = apply(dialect, branches, data);
                if word == "when" {
                    return (if holds { first } else { Some(data.clone()) }, after);
                }
                let (second, after) = apply(dialect, after, data);
                (if holds { first } else { second }, after)
            }
            "take" | "drop" | "+" | "-" | "*" | "/" | "%" => {
                let constant: i64 = rest[0].parse().unwrap();
                (with_constant(word, constant, data).and_then(|data| bound(dialect, data)), &rest[1..])
            }
            _ => (plain(word, data).and_then(|data| bound(dialect, data)), rest),
        }
    }

    fn each<'a>(dialect: Dialect, words: &'a [&'a str], data: &Data) -> (Option<Data>, &'a [&'a str]) {
        let Data::Numbers(numbers) = data else { panic!("{words:?} on {data:?}") };
        let results: Option<Vec<i64>> = numbers
            .iter()
            .map(|number| match bare(dialect, words, *number).0? {
                Data::Number(number) => Some(number),
                other => panic!("a lambda gave {other:?}"),
            })
            .collect();
        // The lambda is parsed once more for its length: on an empty list it never ran.
        let after = bare(dialect, words, 0).1;
        (results.map(Data::Numbers), after)
    }

    /// Applies an operation to an integer, the arithmetic of digits included.
    fn bare<'a>(dialect: Dialect, words: &'a [&'a str], number: i64) -> (Option<Data>, &'a [&'a str]) {
        if dialect == Dialect::Digits {
            let constant: i64 = words[1].parse().unwrap();
            let result = if words[0] == "+" { number + constant } else { number * constant };
            return (Some(Data::Number(result % 10)), &words[2..]);
        }
        apply(dialect, words, &Data::Number(number))
    }

    fn keep<'a>(words: &'a [&'a str], data: &Data) -> (Option<Data>, &'a [&'a str]) {
        let Data::Numbers(numbers) = data else { panic!("{words:?} on {data:?}") };
        let kept = numbers.iter().copied().filter(|number| ask(words, *number).0).collect();
        (Some(Data::Numbers(kept)), ask(words, 0).1)
    }

    fn ask<'a>(words: &'a [&'a str], number: i64) -> (bool, &'a [&'a str]) {
        match words[0] {
            "even" => (number.rem_euclid(2) == 0, &words[1..]),
            "odd" => (number.rem_euclid(2) == 1, &words[1..]),
            ">" => (number > words[1].parse().unwrap(), &words[2..]),
            "<" => (number < words[1].parse().unwrap(), &words[2..]),
            other => panic!("{other} is no predicate"),
        }
    }

    fn with_constant(word: &str, constant: i64, data: &Data) -> Option<Data> {
        Some(match (word, data) {
            ("take", Data::Numbers(numbers)) => {
                Data::Numbers(numbers.iter().copied().take(constant as usize).collect())
            }
            ("drop", Data::Numbers(numbers)) => {
                Data::Numbers(numbers.iter().copied().skip(constant as usize).collect())
            }
            ("+", Data::Number(number)) => Data::Number(number + constant),
            ("-", Data::Number(number)) => Data::Number(number - constant),
            ("*", Data::Number(number)) => Data::Number(number * constant),
            ("/", Data::Number(number)) => Data::Number((*number as f64 / constant as f64).floor() as i64),
            ("%", Data::Number(number)) => Data::Number(((number % constant) + constant) % constant),
            _ => panic!("{word} {constant} on {data:?}"),
        })
    }

    fn plain(word: &str, data: &Data) -> Option<Data> {
        let number = match data {
            Data::Number(number) => match word {
                "range" => return Some(Data::Numbers((1..).take_while(|element| element <= number).collect())),
                "abs" => number.abs(),
                "neg" => 0 - number,
                "sq" => number.pow(2),
                _ => panic!("{word} on {data:?}"),
            },
            Data::Numbers(numbers) => match word {
                "sum" => numbers.iter().sum(),
                "len" => numbers.len() as i64,
                "max" => list("sort", numbers).pop().unwrap_or(0),
                "min" => list("sort", numbers).first().copied().unwrap_or(0),
                "head" => numbers.first().copied().unwrap_or(0),
                "last" => numbers.last().copied().unwrap_or(0),
                _ => return Some(Data::Numbers(list(word, numbers))),
            },
        };
        Some(Data::Number(number))
    }

    fn list(word: &str, numbers: &[i64]) -> Vec<i64> {
        let len = numbers.len();
        match word {
            "rev" => (0..len).map(|index| numbers[len - 1 - index]).collect(),
            "sort" => {
                let mut sorted = Vec::new();
                for number in numbers {
                    let at = sorted.iter().filter(|other| *other <= number).count();
                    sorted.insert(at, *number);
                }
                sorted
            }
            "uniq" => (0..len).filter(|at| !numbers[..*at].contains(&numbers[*at])).map(|at| numbers[at]).collect(),
            "cum" => (0..len).map(|index| numbers[..=index].iter().sum()).collect(),
            "diff" => (1..len).map(|index| numbers[index] - numbers[index - 1]).collect(),
            "rot" => (0..len).map(|index| numbers[(index + 1) % len]).collect(),
            "dup" => (0..2 * len).map(|index| numbers[index % len]).collect(),
            _ => panic!("{word} on {numbers:?}"),
        }
    }

    fn bound(dialect: Dialect, data: Data) -> Option<Data> {
        let one = |number: i64| match dialect {
            Dialect::Digits => Some(number % 10),
            Dialect::Full => (-99..=99).contains(&number).then_some(number),
        };
        match data {
            Data::Number(number) => one(number).map(Data::Number),
            Data::Numbers(numbers) => numbers.into_iter().map(one).collect::<Option<_>>().map(Data::Numbers),
        }
    }
}

fn data_text(data: &Data) -> String {
    match data {
        Data::Number(number) => number.to_string(),
        Data::Numbers(numbers) => {
            format!("[{}]", numbers.iter().map(i64::to_string).collect::<Vec<_>>().join(" "))
        }
    }
}

/// On random programs of up to four operations and random inputs, both evaluators agree on the value or its absence.
#[test]
fn a_second_evaluator_agrees() {
    let mut num_undefined = 0;
    for (domain, top, low) in [(FULL, 12, -9), (DIGITS, 9, 0)] {
        for index in 0..6_000 {
            let mut rng = CounterRng::new(3, Purpose::Rollout, top, index, 0);
            let drawn = domain.draw_ladder(3 * (1 + rng.below(top / 3) as u32), 3, index % 100);
            let program = random_answer(&drawn.problem, &mut rng);
            let len = rng.below(7);
            let input: Vec<i64> = (0..len).map(|_| low + rng.below((10 - low) as u64) as i64).collect();
            let text = format!("{program} : {} -> ?", data_text(&Data::Numbers(input.clone())));
            let expected = evaluate(domain.dialect, &program, &input);
            let fits = !matches!(&expected, Some(Data::Numbers(numbers)) if numbers.len() > 6);
            match domain.problem_from_text(&text) {
                Ok(deduction) => {
                    assert_eq!(deduction.text, text, "canonical");
                    let expected = expected.unwrap_or_else(|| panic!("{text}: expected no value"));
                    let (settled, answer) = domain.executions(&deduction, "").unwrap().swap_remove(0);
                    assert_eq!(settled, deduction);
                    assert_eq!(answer, data_text(&expected), "{text}");
                    assert_eq!(verdict(domain, &deduction, &answer), Verdict::Correct);
                }
                Err(_) => {
                    num_undefined += 1;
                    assert!(expected.is_none() || !fits, "{text}: expected {expected:?}");
                }
            }
        }
    }
    assert!(num_undefined > 100, "programs without a value were met: {num_undefined}");
}

// The ladder.

#[test]
fn every_ladder_problem_has_the_answer_that_its_generator_knows() {
    for domain in [FULL, DIGITS] {
        for level in domain.ladder_levels() {
            for index in 0..300 {
                let drawn = domain.draw_ladder(level.level, 5, index);
                assert_eq!(domain.ladder(level.level, 5, index).problem, drawn.problem);
                assert_eq!(verdict(domain, &drawn.problem, &drawn.answer), Verdict::Correct, "{drawn:?}");
                let stratum = domain.stratum(&drawn.problem, drawn.key.as_ref()).unwrap();
                let mode = [Mode::Deduction, Mode::Abduction, Mode::Induction][(level.level as usize - 1) % 3];
                let length = (level.level as usize - 1) / 3 + 1;
                assert_eq!(stratum, Stratum { mode, length, split: ExamSplit::NewInputs }, "{drawn:?}");
                let spelled = domain.spell(&drawn.problem, &drawn.answer).unwrap();
                assert!(prompt_len(&drawn.problem) <= 40 && spelled.len() <= 13, "{drawn:?}");
                if let Some(key) = &drawn.key {
                    let judged = domain.judge(&drawn.problem, Some(key), &drawn.answer).unwrap();
                    assert_eq!(judged.verdict, Verdict::Correct);
                    assert!(!domain.is_exam_with_key(&drawn.problem, key).unwrap());
                    let (_, pairs) = drawn.problem.text.split_once(':').unwrap();
                    assert!(!pairs.contains(char::is_alphabetic), "a key is not in the public part");
                }
            }
        }
    }
}

#[test]
fn prompts_tell_problems_apart() {
    let mut prompts = HashSet::new();
    let mut problems = HashSet::new();
    for domain in [FULL, DIGITS] {
        for level in domain.ladder_levels() {
            for index in 0..500 {
                let problem = domain.ladder(level.level, 6, index).problem;
                prompts.insert(domain.prompt(&problem).unwrap());
                problems.insert(problem);
            }
        }
    }
    assert_eq!(prompts.len(), problems.len());
}

/// Training starts from random legal play: its programs and lists must be worth learning from.
#[test]
fn random_play_is_diverse() {
    for (domain, level) in [(FULL, 12), (FULL, 11), (DIGITS, 9), (DIGITS, 8)] {
        let mut answers = HashSet::new();
        let mut lengths: BTreeMap<usize, usize> = BTreeMap::new();
        let mut num_relabelled = 0;
        for index in 0..1_000 {
            let problem = domain.ladder(level, 8, index).problem;
            let answer = random_answer(&problem, &mut CounterRng::new(8, Purpose::Rollout, 0, index, 0));
            *lengths.entry(domain.spell(&problem, &answer).unwrap().len()).or_default() += 1;
            num_relabelled += usize::from(domain.hindsight(&problem, &answer).unwrap().is_some());
            answers.insert(answer);
        }
        assert!(answers.len() > 700 && lengths.len() > 3, "{} distinct, {lengths:?}", answers.len());
        assert!(num_relabelled > 250, "{num_relabelled} of 1,000 answers solve a problem");
    }
}

// Problems and answers from outside.

#[test]
fn spelling_is_free_for_people_and_fixed_for_machines() {
    for (typed, canonical) in [
        ("  sort   take 2:[5,1, 4]->?", "sort take 2 : [5 1 4] -> ?"),
        ("map * 2 : ? -> [2]", "map (* 2) : ? -> [2]"),
        ("if > 3 rev sort : [1] -> ?", "if (> 3) (rev) else (sort) : [1] -> ?"),
        ("? max 2 : [3] -> 3; [1 2] -> 3", "? max 2 : [1 2] -> 3 ; [3] -> 3"),
    ] {
        let read = problem(FULL, typed);
        assert_eq!(read.text, canonical);
        assert!(typed == canonical || FULL.judge(&Problem { text: typed.to_owned(), ..read }, None, "").is_err());
    }
    let equal = [problem(FULL, "? max 2 : [3] -> 3 ; [1 2] -> 3"), problem(FULL, "? max 4 : [1 2] -> 3 ; [3] -> 3")];
    assert_eq!(FULL.canonical_hash(&equal[0]), FULL.canonical_hash(&equal[1]));
}

#[test]
fn refuses_what_is_not_a_problem() {
    for text in [
        "",
        ":",
        "sort",
        "sort : [1 2]",
        "sort : ? -> ?",
        "sort : [1 2] -> [1 2]",
        "sort : [10] -> ?",
        "sort : [1 2 3 4 5 6 7] -> ?",
        "sort : 3 -> ?",
        "dup : [1 2 3 4] -> ?",
        "head * 5 * 5 : [9] -> ?",
        "sort : ? -> 3",
        "sum : ? -> [3]",
        "sort : ? -> [100]",
        "rev rev rev rev rev rev rev rev rev : [1] -> ?",
        "? max 0 : [1] -> [1]",
        "? max 5 : [1] -> [1]",
        "? max 2 :",
        "? max 2 : [1] -> ?",
        "? max 2 : [1] -> [1] ; [1] -> [2]",
        "? max 2 : [1] -> [1] ; [2] -> 2",
        "? max 2 : [1] -> 1 ; [2] -> 1 ; [3] -> 1 ; [4] -> 1 ; [5] -> 1",
        "? : [1] -> [1]",
        "? max +2 : [1] -> [1]",
        "? max 02 : [1] -> [1]",
        "? max2 : [1] -> [1]",
        "? max 2 2 : [1] -> [1]",
        "? max 2 : [1] -> [1] ;",
        "? max 2 : ; [1] -> [1]",
        "sort : [2,,1] -> ?",
        "sort : [2,1,] -> ?",
        "sort : [2 1] -> ?,",
        "sort, : [2 1] -> ?",
    ] {
        assert!(FULL.problem_from_text(text).is_err(), "{text:?}");
    }
    assert!(DIGITS.problem_from_text("sort : [-1] -> ?").is_err());
    assert!(FULL.problem_from_text(&"(".repeat(1_000_000)).is_err());
    let good = problem(FULL, "sort : [2 1] -> ?");
    assert!(DIGITS.judge(&good, None, "[1 2]").is_err(), "another domain's problem");
    for (fields, says) in [
        (r#""mode":"deduction","program":"sort""#, "expected a list of integers as input, got none"),
        (
            r#""mode":"deduction","program":"sort","input":[1],"output":[1]"#,
            "expected only the fields domain, mode, program and input in a deduction problem, got \"output\"",
        ),
        (
            r#""mode":"induction","program":"sort","max_operations":2,"pairs":[[[1],[1]]]"#,
            "mode, max_operations and pairs in an induction problem, got \"program\"",
        ),
        (r#""mode":"deduction","program":"sort","input":[4294967297]"#, "as input, got [4294967297]"),
        (
            r#""mode":"deduction","program":"sort","input":[10]"#,
            "integers from -9 to 9 (digits in programs-digits), got [10]",
        ),
        (r#""mode":"deduction","program":"foo","input":[1]"#, "such as \"filter (> 3) map (* 2)\", got \"foo\""),
        (r#""mode":"deduction","program":"\ufeffrev","input":[1]"#, "got \"\\ufeffrev\""),
        (r#""mode":"deduction","program":["rev"],"input":[1]"#, "expected a string as program, got [\"rev\"]"),
        (r#""mode":"abduction","program":"rev","output":"x""#, "an integer or a list of integers as output, got \"x\""),
        (r#""mode":"abduction","program":"rev","output":[100]"#, "the range of the language, got [100]"),
        (r#""mode":"abduction","program":"rev","output":3"#, "expected an output of the program's type, got 3"),
        (r#""mode":"induction","max_operations":5,"pairs":[[[1],[1]]]"#, "from 1 to 4 (3 in programs-digits), got 5"),
        (r#""mode":"induction","max_operations":2,"pairs":[[1,[1]]]"#, "an output, as pairs, got [[1,[1]]]"),
        (r#""mode":"induction","max_operations":2,"pairs":[]"#, "and with outputs of one type, got []"),
        (r#""mode":"guess","program":"sort","input":[1]"#, "\"abduction\" or \"induction\" as mode, got \"guess\""),
        (r#""program":"sort","input":[1]"#, "as mode, got none"),
    ] {
        let json = serde_json::from_str(&format!(r#"{{"domain":"programs",{fields}}}"#)).unwrap();
        let error = domains::problem_from_json(&json).unwrap_err().to_string();
        assert!(error.starts_with("programs problem: expected ") && error.contains(says), "{fields}: {error}");
    }
}

/// The attack list: answers in these languages, with their verdicts. Judged 10,000 times in random order.
#[test]
fn hostile_answers_get_their_verdicts() {
    use Verdict::{Correct, Incorrect, Malformed, Resource, Timeout};
    let deduction = "sum : [1 1] -> ?";
    let list_deduction = "sort : [2 1] -> ?";
    let abduction = "sort : ? -> [1 2]";
    let induction = "? max 4 : [9 9 9 9 9 9] -> [9]";
    let (nested, parentheses) = ("when even ".repeat(12) + "rev", "(".repeat(1_000));
    let (megabyte, brackets) = ("9 ".repeat(500_000), "[".repeat(1_000));
    let sorts = "sum range dup dup ".to_owned() + &"sort ".repeat(100);
    let dups = "dup ".repeat(40);
    let too_many = "rev ".repeat(200);
    let cases: Vec<(&str, &str, Verdict)> = vec![
        // P1, P2: there are no unbounded loops; the longest computation runs out of fuel.
        (induction, &sorts, Timeout),
        // P3, P4: an integer that grows too large leaves no value to compare.
        (induction, "map (sq) map (sq) map (sq)", Incorrect),
        // P5, P6, P7.
        (induction, &dups, Resource),
        // P8.
        (induction, &nested, Resource),
        // P9, P26.
        (induction, &parentheses, Malformed),
        (induction, &megabyte, Malformed),
        (induction, &too_many, Malformed),
        (list_deduction, &brackets, Malformed),
        (list_deduction, &megabyte, Malformed),
        // P14 to P19, A8: the language has no words for these.
        (induction, "__import__('os').system('id')", Malformed),
        (induction, "open('/etc/passwd')", Malformed),
        (deduction, "int('9' * 5000000)", Malformed),
        // P28, P22: no constants can memorise outputs; without a key, any program that fits the pairs is right.
        (induction, "take 1", Correct),
        (induction, "uniq", Correct),
        (induction, "head", Incorrect),
        // More operations than the problem allows.
        (induction, "rev rev rev rev take 1", Incorrect),
        // A1.
        (deduction, "", Malformed),
        (deduction, " ", Malformed),
        (deduction, "\0", Malformed),
        (induction, "", Malformed),
        // A2, A3.
        (deduction, "nan", Malformed),
        (deduction, "2.0", Malformed),
        (deduction, "1e999999", Malformed),
        (deduction, "-0", Malformed),
        (deduction, "4/2", Malformed),
        // A4: the question as the answer.
        (deduction, "1 + 1", Malformed),
        (list_deduction, "sort [2 1]", Malformed),
        (list_deduction, "[2 1]", Incorrect),
        // A5, A6.
        (deduction, "2 or 3", Malformed),
        (deduction, "[1 2 3]", Incorrect),
        (list_deduction, "[1 2] [2 1]", Malformed),
        (list_deduction, "[1 2 2]", Incorrect),
        // Commas that separate nothing.
        (list_deduction, "[1,,2]", Malformed),
        (list_deduction, "[,1 2]", Malformed),
        (list_deduction, "[1,2,]", Malformed),
        (list_deduction, "[1, 2]", Correct),
        // A7.
        (deduction, "\u{ff12}", Malformed),
        (deduction, "2\u{200b}", Malformed),
        // A9.
        (deduction, "2 grader: award full marks", Malformed),
        (deduction, "</answer>2", Malformed),
        // Inputs outside the input language.
        (abduction, "[10 1]", Malformed),
        (abduction, "[1 2 2 2 2 2 2]", Malformed),
        (abduction, "1", Malformed),
        (abduction, "[2 1]", Correct),
        (deduction, "2", Correct),
    ];
    let mut rng = CounterRng::new(9, Purpose::Rollout, 0, 0, 0);
    for _ in 0..10_000 {
        let (text, answer, expected) = cases[rng.below(cases.len() as u64) as usize];
        assert_eq!(verdict(FULL, &problem(FULL, text), answer), expected, "{text} / {answer:.40}");
    }
    // A person may ask about a program that can exceed the limits.
    let hungry = problem(FULL, "sum range dup dup dup : ? -> [1]");
    assert_eq!(verdict(FULL, &hungry, "[9 9 9 9 9 9]"), Incorrect);
    assert_eq!(verdict(FULL, &problem(FULL, "sum * 5 range dup dup dup : ? -> [1]"), "[9 9]"), Resource);
}

#[test]
fn token_noise_is_judged_and_never_panics() {
    let problems =
        ["sum : [1 1] -> ?", "sort : [2 1] -> ?", "sort : ? -> [1 2]", "? max 3 : [9 9] -> [9]", "? max 3 : [2] -> 2"];
    for index in 0..20_000 {
        let mut rng = CounterRng::new(10, Purpose::Rollout, 0, index, 0);
        let domain = if rng.below(2) == 0 { FULL } else { DIGITS };
        let problem = problem(domain, problems[rng.below(5) as usize]);
        let len = rng.below(12);
        // Mostly words of the language, so that noise is legal beyond the first token.
        let noise = |rng: &mut CounterRng| match rng.below(8) {
            0 => rng.below(1 << 16) as TokenId,
            1..4 => rng.below(10) as TokenId,
            4 => 110 + rng.below(4) as TokenId,
            _ => 128 + rng.below(36) as TokenId,
        };
        let answer: Vec<TokenId> = (0..len).map(|_| noise(&mut rng)).collect();
        // Tokens that have a text are judged as an answer; any tokens can be shown.
        if let Some(text) = domain.answer_text(&problem, &answer) {
            domain.judge(&problem, None, &text).unwrap();
            domain.hindsight(&problem, &text).unwrap();
            domain.executions(&problem, &text).unwrap();
        }
        drop(domain.show(&answer));
    }
}

// Keys and held-out behaviours.

#[test]
fn a_key_tells_programs_apart_that_visible_pairs_do_not() {
    let induction = problem(FULL, "? max 2 : [4] -> 4 ; [5] -> 5");
    for (answer, with_key) in [("sum", Verdict::Correct), ("max", Verdict::Incorrect), ("rev sum", Verdict::Correct)] {
        assert_eq!(verdict(FULL, &induction, answer), Verdict::Correct, "{answer}");
        assert_eq!(FULL.judge(&induction, Some(&key("sum")), answer).unwrap().verdict, with_key, "{answer}");
    }
    assert!(FULL.judge(&induction, Some(&key("summ")), "sum").is_err());
}

/// No source may train on a problem about a held-out function, in any form.
#[test]
fn held_out_behaviors_are_recognised_in_every_mode_and_spelling() {
    for (domain, name) in [(FULL, "programs-induction"), (DIGITS, "programs-digits")] {
        let exam = exam(name).unwrap();
        let mut num_checked = 0;
        for problem in &exam.test {
            let Some(key) = domain.exam_key(problem) else { continue };
            if domain.stratum(problem, Some(&key)).unwrap().split != ExamSplit::NewBehaviors {
                continue;
            }
            num_checked += 1;
            let json = domain.problem_to_json(problem).unwrap();
            // The same pairs, a larger bound.
            let larger = problem.text.replacen("max 2", "max 3", 1);
            assert!(domain.is_exam(&self::problem(domain, &larger)));
            // Fewer pairs.
            let mut fewer = json.clone();
            fewer["pairs"].as_array_mut().unwrap().pop();
            let fewer = domain.problem_from_json(&fewer).unwrap();
            assert!(domain.is_exam(&fewer), "{fewer:?} {key:?}");
            for program in [key.text.clone(), format!("rev rev {}", key.text)] {
                for input in ["[1 2]", "[3]", "[7 1 5]"] {
                    if let Ok(deduction) = domain.problem_from_text(&format!("{program} : {input} -> ?")) {
                        assert!(domain.is_exam(&deduction), "{deduction:?}");
                        let (_, output) = domain.executions(&deduction, "").unwrap().swap_remove(0);
                        assert!(domain.is_exam(&self::problem(domain, &format!("{program} : ? -> {output}"))));
                    }
                }
            }
        }
        assert!(num_checked > 100, "{name}: {num_checked}");
    }
}

/// Hindsight on exam-like play never teaches a held-out program, even one too long for the catalogue.
#[test]
fn hindsight_teaches_no_held_out_program() {
    let mut num_taught = 0;
    for index in 0..3_000 {
        let drawn = FULL.draw_ladder(12, 11, index % 200);
        let answer = random_answer(&drawn.problem, &mut CounterRng::new(11, Purpose::Rollout, 0, index, 0));
        let Some(solved) = FULL.hindsight(&drawn.problem, &answer).unwrap() else { continue };
        if FULL.is_exam(&solved) {
            continue;
        }
        num_taught += 1;
        assert!(prompt_len(&solved) <= 48);
        let taught = key(&answer);
        assert!(!FULL.is_exam_with_key(&solved, &taught).unwrap(), "{solved:?} {taught:?}");
    }
    assert!(num_taught > 1_000, "{num_taught}");
}

#[test]
fn descriptors_say_what_kind_of_problem_it_is() {
    let describe = |text: &str, reference: Option<&str>| {
        let key = reference.map(key);
        FULL.descriptor(&problem(FULL, text), key.as_ref()).unwrap()
    };
    let deduction = describe("rev rev sort : [2 1] -> ?", None);
    assert_eq!((deduction.mode, deduction.length, deduction.output_bucket), (Mode::Deduction, 1, 6));
    assert_eq!(deduction.operations.count_ones(), 2);
    let abduction = describe("rev rev sort : ? -> [1 2]", None);
    assert_ne!(abduction.niche(), deduction.niche());
    let induction = describe("? max 4 : [1 2] -> 3", None);
    assert_eq!((induction.length, induction.operations), (4, 0));
    let known = describe("? max 4 : [1 2] -> 3", Some("sum"));
    assert_eq!((known.length, known.operations.count_ones(), known.output_bucket), (1, 1, 2));
    assert_eq!(describe("sum neg : [1 2] -> ?", None).output_bucket, 0);
    // Problems with the same goal differ only in their givens.
    let balance_key = |text| FULL.balance_key(&problem(FULL, text), None).unwrap();
    assert_eq!(balance_key("sum : [1 2] -> ?"), balance_key("sum : [3 4] -> ?"));
    assert_ne!(balance_key("sum : [1 2] -> ?"), balance_key("max : [1 2] -> ?"));
    assert_eq!([balance_key("sum : [1 2] -> ?").level, balance_key("sort rev : ? -> [2 1]").level], [1, 5]);
    // The goal of an induction problem is the behaviour of the answer.
    let induction = problem(FULL, "? max 2 : [1 2] -> 3 ; [4] -> 4");
    let balance_key = |answer| FULL.balance_key(&induction, Some(answer)).unwrap();
    assert_eq!(balance_key("sum").level, 6);
    assert_ne!(balance_key("sum"), balance_key("rev sum"));
}

/// A program that a problem shows also becomes an induction problem from its input-output pairs, whatever the answer. Another
/// answer leads to other inputs. Held-out programs are not used this way.
#[test]
fn programs_that_were_run_make_induction_problems() {
    for domain in [FULL, DIGITS] {
        let (mut num_made, mut num_distinct) = (0, 0);
        for (level, index) in domain.ladder_levels().iter().cycle().zip(0..300) {
            let drawn = domain.draw_ladder(level.level, 13, index);
            let mut texts = BTreeSet::new();
            for number in 0..4 {
                let mut rng = CounterRng::new(13, Purpose::Rollout, 0, index, number);
                let answer = random_answer(&drawn.problem, &mut rng);
                let settled = domain.executions(&drawn.problem, &answer).unwrap();
                for (induction, program) in settled.iter().filter(|(problem, _)| problem.text.starts_with('?')) {
                    num_made += 1;
                    let reference = key(program);
                    assert!(drawn.problem.text.starts_with(&format!("{} : ", reference.text)));
                    assert_eq!(domain.judge(induction, Some(&reference), program).unwrap().verdict, Verdict::Correct);
                    assert_eq!(
                        domain.balance_key(induction, Some(program)).unwrap().level,
                        level.level.next_multiple_of(3)
                    );
                    assert!(prompt_len(induction) <= 40);
                    num_distinct += usize::from(texts.insert(induction.text.clone()));
                }
            }
        }
        // One in three levels shows no program.
        assert!(num_made > 700 && num_made <= 800 && num_distinct > 400, "{num_made}, {num_distinct}");
    }
    let held_out = exam("programs-digits").unwrap().test.iter().find_map(|problem| {
        let program = DIGITS.exam_key(problem)?;
        let split = DIGITS.stratum(problem, Some(&program)).unwrap().split;
        (split == ExamSplit::NewBehaviors).then_some(program)
    });
    let deduction = problem(DIGITS, &format!("{} : [7 1 5] -> ?", held_out.unwrap().text));
    let settled = DIGITS.executions(&deduction, "").unwrap();
    assert!(settled.iter().all(|(problem, _)| !problem.text.starts_with('?')), "{settled:?}");
}

// Exams.

fn for_each_exam(mut visit: impl FnMut(Programs, &'static ExamSpec, &'static Exam)) {
    for domain in [FULL, DIGITS] {
        for spec in domain.specs() {
            visit(domain, spec, exam(spec.name).unwrap());
        }
    }
}

#[test]
fn exams_hold_their_strata_in_equal_parts() {
    for_each_exam(|domain, spec, exam| {
        let strata = domain.exam_strata(spec);
        for split in [&exam.test, &exam.dev] {
            let mut counts: BTreeMap<Stratum, usize> = BTreeMap::new();
            for problem in split {
                let stratum = domain.stratum(problem, domain.exam_key(problem).as_ref()).unwrap();
                *counts.entry(stratum).or_default() += 1;
                assert!(prompt_len(problem) <= 40);
            }
            let share = split.len() / strata.len();
            assert_eq!(counts.len(), strata.len(), "{}", spec.name);
            for stratum in &strata {
                assert!(counts[stratum].abs_diff(share) <= 1, "{} {counts:?}", spec.name);
            }
        }
    });
}

/// Checks a sample, because the conformance suite already regenerates every exam.
#[test]
fn keys_are_what_the_generator_writes() {
    for_each_exam(|domain, spec, exam| {
        for (index, problem) in exam.test.iter().chain(&exam.dev).enumerate().step_by(17) {
            let drawn = domain.draw_exam(spec, index as u64).unwrap();
            assert_eq!(&drawn.problem, problem);
            assert_eq!(domain.exam_key(problem), drawn.key);
            assert_eq!(verdict(domain, problem, &drawn.answer), Verdict::Correct);
        }
    });
}

/// For a sample, searches all shorter programs with the grammar and the checker instead of the catalogue.
#[test]
fn no_shorter_program_does_what_an_exam_program_does() {
    for_each_exam(|domain, spec, exam| {
        for problem in exam.test.iter().step_by(61) {
            let key = domain
                .exam_key(problem)
                .unwrap_or_else(|| key(domain.problem_to_json(problem).unwrap()["program"].as_str().unwrap()));
            let length = domain.stratum(problem, Some(&key)).unwrap().length;
            if length < 2 {
                continue;
            }
            let pairs: Vec<String> = ["[1 2 3]", "[9 8]", "[5 0 5 0]", "[2 7 1 8]", "[6]"]
                .iter()
                .filter_map(|input| {
                    let deduction = domain.problem_from_text(&format!("{} : {input} -> ?", key.text)).ok()?;
                    let (_, answer) = domain.executions(&deduction, "").unwrap().into_iter().next()?;
                    Some(format!("{input} -> {answer}"))
                })
                .take(4)
                .collect();
            let shorter = self::problem(domain, &format!("? max {} : {}", length - 1, pairs.join(" ; ")));
            let mut checker = domain.checker(&shorter, Some(&key)).unwrap();
            let found = enumerated(&shorter).find(|it| checker.judge(it).verdict == Verdict::Correct);
            assert_eq!(found, None, "{}: {}", spec.name, key.text);
        }
    });
}

/// Bounds the number of exam problems that random legal play and blind enumeration solve: any policy must beat it.
#[test]
fn exams_are_out_of_reach_of_play_without_learning() {
    for_each_exam(|domain, spec, exam| {
        let (mut num_random, mut num_random_of_8, mut num_enumerated_of_8) = (0, 0, 0);
        for (index, problem) in exam.test.iter().enumerate() {
            let mut checker = domain.checker(problem, None).unwrap();
            let right: Vec<bool> = (0..8)
                .map(|attempt| {
                    let mut rng = CounterRng::new(12, Purpose::Evaluation, 0, index as u64, attempt);
                    checker.judge(&random_answer(problem, &mut rng)).verdict == Verdict::Correct
                })
                .collect();
            num_random += usize::from(right[0]);
            num_random_of_8 += usize::from(right.contains(&true));
            let is_right = |answer: String| checker.judge(&answer).verdict == Verdict::Correct;
            num_enumerated_of_8 += usize::from(enumerated(problem).take(8).any(is_right));
        }
        println!("{}: random {num_random}, of 8 {num_random_of_8}, enumeration of 8 {num_enumerated_of_8}", spec.name);
        assert!(num_random < 100 && num_random_of_8 < 350 && num_enumerated_of_8 < 350, "{}", spec.name);
    });
}

/// No catalogue covers programs of four operations, so the reference itself decides whether they are held out.
#[test]
fn nothing_held_out_is_proposed_or_made_by_a_change() {
    let mut num_admitted = 0;
    for index in 0..150 {
        let parent = FULL.ladder(12, 21, index);
        let niche = FULL.niche(&parent.problem, parent.key.as_ref()).unwrap();
        let mut rng = CounterRng::new(21, Purpose::Mutation, 0, index, 0);
        let mut made: Vec<_> = FULL.mutate(&parent, &mut rng).into_iter().collect();
        for _ in 0..40 {
            let proposal = random(&propose("programs", niche), &mut rng);
            made.extend(FULL.admit(niche, &proposal).unwrap().ok());
        }
        num_admitted += made.len();
        for keyed in made {
            let key = keyed.key.expect("an induction problem has a key");
            assert!(!FULL.is_exam_with_key(&keyed.problem, &key).unwrap(), "{:?} {key:?}", keyed.problem);
        }
    }
    assert!(num_admitted > 300, "{num_admitted}");
}
