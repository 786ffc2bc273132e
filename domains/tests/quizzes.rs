//! Guarantees of the domains of text alone beyond the conformance suite: forms, answers and hindsight by hand, and answers
//! that try to cheat a checker.

use domains::{Error, domain};
use proto::{KeyedProblem, Problem, Verdict};
use serde_json::json;

use Verdict::{Correct, Incorrect, Malformed};

fn problem(name: &str, typed: &str) -> Problem {
    domain(name).unwrap().problem_from_text(typed).unwrap_or_else(|error| panic!("{typed}: {error}"))
}

fn verdict(problem: &Problem, answer: &str) -> Verdict {
    domain(&problem.domain).unwrap().judge(problem, None, answer).unwrap().verdict
}

/// Returns the text of the problem that an answer solves.
fn hindsight(problem: &Problem, answer: &str) -> Option<String> {
    domain(&problem.domain).unwrap().hindsight(problem, answer).unwrap().map(|solved| solved.text)
}

fn level(problem: &Problem) -> u32 {
    let domain = domain(&problem.domain).unwrap();
    domain.level_of(domain.niche(problem, None).unwrap())
}

fn question(problem: &Problem) -> String {
    domain(&problem.domain).unwrap().wording().unwrap().question(problem).unwrap()
}

fn pattern(problem: &Problem) -> String {
    domain(&problem.domain).unwrap().wording().unwrap().answer_pattern(problem).unwrap().unwrap()
}

/// The expression with the largest value.
const LARGEST: &str = "999999999 * 999999999 * 999999999 * 999999999";

/// Values by Python; levels by hand.
#[test]
fn expressions_have_their_values_and_levels() {
    for (text, value, of_level) in [
        ("4 + 8", "12", 1),
        ("47 + 38", "85", 2),
        ("8 + 40", "48", 2),
        ("3 - 8", "-5", 3),
        ("0 - 0", "0", 3),
        ("7 * 8", "56", 4),
        ("45 * 7", "315", 5),
        ("45 * 1", "45", 0),
        ("99 - 21 + 40", "118", 6),
        ("10 - 20 - 30", "-40", 6),
        ("(7 + 5) * 3", "36", 7),
        ("3 * (7 + 5)", "36", 7),
        ("(3 - 11) * 4", "-32", 7),
        ("7 + 5 * 3", "22", 7),
        ("7 - 5 * 3", "-8", 7),
        ("93 % 7", "2", 8),
        ("12 % 19", "12", 8),
        ("347 * 28", "9716", 9),
        ("100 - (30 - 7)", "77", 0),
        ("100 - 30 - 7", "63", 0),
        ("2 * 3 % 4", "2", 0),
        ("2 * (7 % 4)", "6", 0),
        ("20 - 3 * 4 % 5", "18", 0),
        ("999999999 * 0", "0", 0),
        (LARGEST, "999999996000000005999999996000000001", 0),
    ] {
        let problem = problem("arithmetic", text);
        assert_eq!(problem.text, text, "it is canonical");
        assert_eq!((verdict(&problem, value), level(&problem)), (Correct, of_level), "{text}");
        assert_eq!(verdict(&problem, &format!(" \t{value}\r\n")), Correct, "{text}");
        assert_eq!(verdict(&problem, &format!("{value}1")), if value == "0" { Malformed } else { Incorrect }, "{text}");
    }
}

#[test]
fn expressions_are_read_as_typed_within_their_bounds() {
    for (typed, text) in [
        ("47+38", "47 + 38"),
        ("  (47 +\t38) ", "47 + 38"),
        ("((7+5))*((3))", "(7 + 5) * 3"),
        ("7+(5*3)", "7 + 5 * 3"),
        ("(9-4)-3", "9 - 4 - 3"),
        ("9-(4-3)", "9 - (4 - 3)"),
        ("2*(3*4)", "2 * (3 * 4)"),
    ] {
        assert_eq!(problem("arithmetic", typed).text, text);
    }
    let deep = format!("{}1 + 2{}", "(".repeat(5_000), ")".repeat(5_000));
    for typed in [
        "",
        "7",
        "(7)",
        "+",
        "7 +",
        "+ 7 + 5",
        "-7 + 5",
        "7 + -5",
        "7 ++ 5",
        "7 5",
        "7 + 5 3",
        "7(5)",
        "(7 + 5",
        "7 + 5)",
        "()",
        "07 + 5",
        "7 + 00",
        "7.0 + 5",
        "7,000 + 5",
        "1e3 + 5",
        "0x7 + 5",
        "7 / 5",
        "7 ** 5",
        "7 × 5",
        "7 − 5",
        "７ + 5",
        "٧ + 5",
        "7\u{a0}+ 5",
        "7 + x",
        "7 % 0",
        "(3 - 5) % 7",
        "7 % (5 - 5)",
        "1 + 2 + 3 + 4 + 5",
        "1000000000 + 1",
        "99999999999999999999999 + 1",
        "7 + 5 = 12",
        "7 + 5?",
        &deep,
        &" ".repeat(200),
    ] {
        let refused = domain("arithmetic").unwrap().problem_from_text(typed).unwrap_err().to_string();
        assert!(refused.contains("2 to 4 whole numbers of up to 9 digits"), "{refused}");
    }
    for text in ["47+38", " 47 + 38", "(47 + 38)", "7 + (5 * 3)", "7"] {
        let problem = Problem { domain: "arithmetic".to_owned(), text: text.to_owned() };
        let judged = domain("arithmetic").unwrap().judge(&problem, None, "85");
        assert!(matches!(judged, Err(Error::Problem { .. })), "{text:?} is not canonical");
    }
    // The sides of a sum and of a product are no order; those of a difference are.
    let hash = |text: &str| domain("arithmetic").unwrap().canonical_hash(&problem("arithmetic", text));
    assert_eq!(hash("47 + 38"), hash("38 + 47"));
    assert_eq!(hash("(7 + 5) * 3"), hash("3 * (5 + 7)"));
    assert_ne!(hash("47 - 38"), hash("38 - 47"));
    assert_ne!(hash("7 + 5 * 3"), hash("(7 + 5) * 3"));
}

/// Answers that would be right, or worth trying, under laxer parsing.
#[test]
fn arithmetic_has_one_spelling_of_an_answer() {
    let (sum, difference, nothing) =
        (problem("arithmetic", "47 + 38"), problem("arithmetic", "3 - 8"), problem("arithmetic", "8 - 8"));
    let (zeros, nines) = (format!("{}85", "0".repeat(500)), "9".repeat(1_024));
    for answer in [
        "",
        " ",
        "\n",
        "-",
        "--85",
        "+85",
        "085",
        "00",
        &zeros,
        "= 85",
        "=85",
        "85.",
        "85.0",
        "8.5e1",
        "8,5",
        "8_5",
        "8 5",
        "85 85",
        "8\n5",
        "85!",
        "85\0",
        "\u{feff}85",
        "85\u{a0}",
        "\u{a0}85",
        "85\u{200b}",
        "\u{2028}85",
        "８５",
        "٨٥",
        "⁸⁵",
        "85²",
        "(85)",
        "47 + 38",
        "47 + 38 = 85",
        "eighty-five",
        "the answer is 85",
        "<answer>85</answer>",
        "0x55",
        "\"85\"",
        "85\u{b}",
        "NaN",
        &"9".repeat(1_025),
        &format!("85{}", " ".repeat(1_100)),
    ] {
        assert_eq!(verdict(&sum, answer), Malformed, "{answer:?}");
    }
    for answer in ["84", "-85", "0", "850", "99999999999999999999999999999999999999999999999999", &nines] {
        assert_eq!(verdict(&sum, answer), Incorrect, "{answer:?}");
    }
    for (answer, expected) in [
        ("-5", Correct),
        ("5", Incorrect),
        ("−5", Malformed),
        ("- 5", Malformed),
        ("–5", Malformed),
        ("-05", Malformed),
    ] {
        assert_eq!(verdict(&difference, answer), expected, "{answer:?}");
    }
    for (answer, expected) in [("0", Correct), ("-0", Malformed), ("00", Malformed)] {
        assert_eq!(verdict(&nothing, answer), expected, "{answer:?}");
    }
    let judged = domain("arithmetic").unwrap().judge(&sum, None, "86").unwrap();
    assert_eq!(judged.reason.as_deref(), Some("is not the value of 47 + 38"));
}

/// The last number that can change does.
#[test]
fn a_wrong_value_solves_an_expression_with_one_other_number() {
    for (text, answer, solved) in [
        ("47 + 38", "91", Some("47 + 44")),
        ("47 + 38", "46", Some("8 + 38")),
        ("47 + 38", "147", None),
        ("9 + 38", "120", Some("82 + 38")),
        ("3 + 4", "13", Some("9 + 4")),
        ("3 + 4", "14", None),
        ("3 - 8", "-4", Some("3 - 7")),
        ("3 - 8", "50", Some("58 - 8")),
        ("6 * 7", "54", Some("6 * 9")),
        ("6 * 7", "14", Some("2 * 7")),
        ("6 * 7", "43", None),
        ("0 * 7", "7", Some("1 * 7")),
        ("10 - 20 - 30", "-35", Some("10 - 20 - 25")),
        ("(7 + 5) * 3", "48", Some("(7 + 5) * 4")),
        ("(7 + 5) * 3", "39", Some("(7 + 6) * 3")),
        ("7 - 5 * 3", "-13", Some("7 - 5 * 4")),
        ("93 % 7", "5", Some("96 % 7")),
        ("93 % 7", "9", None),
        ("347 * 28", "10410", Some("347 * 30")),
        ("347 * 28", "9744", Some("348 * 28")),
        ("347 * 28", "9717", None),
        ("47 + 38", "-1", None),
        ("47 + 38", "99999999999999999999", None),
        ("47 + 38", "091", None),
        ("47 + 38", "85", Some("47 + 38")),
    ] {
        let found = hindsight(&problem("arithmetic", text), answer);
        // Where the exam has the problem, another number changes, or none.
        let is_free =
            solved.is_none_or(|solved| !domain("arithmetic").unwrap().is_exam(&problem("arithmetic", solved)));
        assert!(is_free, "{solved:?} is in an exam: choose another one for this table");
        assert_eq!(found.as_deref(), solved, "{text} answered {answer}");
    }
}

#[test]
fn comparisons_by_hand() {
    for (typed, answer, of_level) in [
        ("larger 3 8", "8", 1),
        ("smaller 3 8", "3", 1),
        ("larger 10 9", "10", 2),
        ("smaller 101 99", "99", 3),
        ("larger -7 -12", "-7", 4),
        ("smaller 5 -5", "-5", 4),
        ("larger 9.11 9.9", "9.9", 5),
        ("smaller 9.11 9.9", "9.11", 5),
        ("larger 3.50 3.5001", "3.5001", 0),
        ("larger 9 9.1", "9.1", 5),
        ("smaller 0.05 0.5", "0.05", 5),
        ("larger 12 120 102", "120", 6),
        ("smaller 12 120 102", "12", 6),
        ("smaller -0.5 -0.25", "-0.5", 0),
        ("larger 999999999.999999 -999999999.999999", "999999999.999999", 0),
    ] {
        let problem = problem("comparison", typed);
        assert_eq!(problem.text, typed, "it is canonical");
        assert_eq!((verdict(&problem, answer), level(&problem)), (Correct, of_level), "{typed}");
    }
    let decimals = problem("comparison", "larger 9.11 9.9");
    for (answer, expected) in [
        (" 9.9\n", Correct),
        ("9.11", Incorrect),
        ("9.90", Incorrect),
        ("9", Incorrect),
        ("-9.9", Incorrect),
        ("", Malformed),
        ("9.", Malformed),
        (".9", Malformed),
        ("9,9", Malformed),
        ("09.9", Malformed),
        ("+9.9", Malformed),
        ("9.9.", Malformed),
        ("9.9 9.11", Malformed),
        ("larger", Malformed),
        ("９.９", Malformed),
        ("9․9", Malformed),
        ("−9.9", Malformed),
        ("-0", Incorrect),
        ("9.9 is larger", Malformed),
        ("99999999999999999999", Malformed),
    ] {
        assert_eq!(verdict(&decimals, answer), expected, "{answer:?}");
    }
    assert_eq!(verdict(&decimals, &"9".repeat(5_000)), Malformed);
    for typed in [
        "",
        "larger",
        "larger 3",
        "larger 3 3",
        "larger 3 3.0",
        "larger 0 0.00",
        "larger 3 8 3",
        "larger 1 2 3 4",
        "greater 3 8",
        "Larger 3 8",
        "larger 3, 8",
        "larger 03 8",
        "larger 3. 8",
        "larger .3 8",
        "larger -0 8",
        "larger +3 8",
        "larger −3 8",
        "larger ３ 8",
        "larger 1e3 8",
        "larger 1234567890 8",
        "larger 0.1234567 8",
        "3 8",
        "larger 3\u{a0}8",
    ] {
        let refused = domain("comparison").unwrap().problem_from_text(typed).unwrap_err().to_string();
        assert!(refused.contains("2 or 3 numbers of different value"), "{refused}");
    }
    let hash = |text: &str| domain("comparison").unwrap().canonical_hash(&problem("comparison", text));
    assert_eq!(hash("larger 9.11 9.9"), hash("larger 9.9 9.11"));
    assert_ne!(hash("larger 9.11 9.9"), hash("smaller 9.11 9.9"));
    // Two numbers: the other one answers the other question. Of three, the one between them answers none.
    for (typed, answer, solved) in [
        ("larger 3 8", "3", Some("smaller 3 8")),
        ("smaller 8 3", "8", Some("larger 8 3")),
        ("larger 3 8", "8", Some("larger 3 8")),
        ("larger 3 8", "5", None),
        ("larger 3 8", "3.0", None),
        ("largest 31 8 5", "5", Some("smaller 31 8 5")),
        ("largest 31 8 5", "8", None),
    ] {
        assert_eq!(hindsight(&problem("comparison", typed), answer).as_deref(), solved, "{typed} answered {answer}");
    }
}

/// Answers by Python's `[::-1]`, `sorted`, `count` and `index`.
#[test]
fn words_by_hand() {
    for (typed, text, answer, of_level) in [
        ("spell dog", "spell d o g", "d o g", 1),
        ("reverse dog", "reverse d o g", "g o d", 2),
        ("reverse d o g", "reverse d o g", "g o d", 2),
        ("reverse hello", "reverse h e l l o", "o l l e h", 2),
        ("sort banana", "sort b a n a n a", "a a a b n n", 7),
        ("sort dog", "sort d o g", "d g o", 3),
        ("count a in banana", "count a in b a n a n a", "3", 4),
        ("count z in b a n a n a", "count z in b a n a n a", "0", 4),
        ("count i in in", "count i in i n", "1", 0),
        ("position n in banana", "position n in b a n a n a", "3", 5),
        ("reverse letters", "reverse l e t t e r s", "s r e t t e l", 6),
        ("reverse ab", "reverse a b", "b a", 0),
        ("position p in abcdefghijklmnop", "position p in a b c d e f g h i j k l m n o p", "16", 0),
    ] {
        let problem = problem("strings", typed);
        assert_eq!(problem.text, text);
        assert_eq!((verdict(&problem, answer), level(&problem)), (Correct, of_level), "{typed}");
    }
    let reverse = problem("strings", "reverse dog");
    for (answer, expected) in [
        ("\tg o d \n", Correct),
        ("d o g", Incorrect),
        ("g o", Incorrect),
        ("g", Incorrect),
        ("g o d d", Incorrect),
        ("", Malformed),
        ("god", Malformed),
        ("go d", Malformed),
        ("g  o d", Malformed),
        ("g\to d", Malformed),
        ("g\no d", Malformed),
        ("g-o-d", Malformed),
        ("g, o, d", Malformed),
        ("G O D", Malformed),
        ("g o d.", Malformed),
        ("g ο d", Malformed),
        ("g\u{a0}o\u{a0}d", Malformed),
        ("\u{feff}g o d", Malformed),
        ("g o \u{64}\u{301}", Malformed),
        ("3", Malformed),
        ("The answer: g o d", Malformed),
    ] {
        assert_eq!(verdict(&reverse, answer), expected, "{answer:?}");
    }
    assert_eq!(verdict(&reverse, &"g ".repeat(5_000)), Malformed);
    assert_eq!(verdict(&reverse, &["g"; 512].join(" ")), Incorrect);
    let count = problem("strings", "count a in banana");
    for (answer, expected) in [
        ("3", Correct),
        ("2", Incorrect),
        ("99999999999999999999", Incorrect),
        ("03", Malformed),
        ("3.0", Malformed),
        ("-3", Malformed),
        ("+3", Malformed),
        ("three", Malformed),
        ("３", Malformed),
        ("a a a", Malformed),
        ("", Malformed),
    ] {
        assert_eq!(verdict(&count, answer), expected, "{answer:?}");
    }
    for typed in [
        "",
        "reverse",
        "reverse d",
        "reverse Dog",
        "reverse d-o-g",
        "reverse dög",
        "reverse d0g",
        "reverse abcdefghijklmnopq",
        "count a banana",
        "count in banana",
        "count an in banana",
        "count A in banana",
        "count a in",
        "position x in banana",
        "shuffle dog",
        "reverse a in dog\u{a0}",
        "dog",
    ] {
        let refused = domain("strings").unwrap().problem_from_text(typed).unwrap_err().to_string();
        assert!(refused.contains("a word of 2 to 16 letters from a to z"), "{refused}");
    }
}

#[test]
fn wrong_letters_and_numbers_solve_other_words() {
    for (typed, answer, solved) in [
        ("reverse dog", "d o g", Some("reverse g o d")),
        ("reverse dog", "x y z w", Some("reverse w z y x")),
        ("reverse dog", "x y", None),
        ("reverse dog", "a b c d e f", None),
        ("reverse dog", "god", None),
        ("spell dog", "d o o g", Some("spell d o o g")),
        ("sort dog", "d o g", None),
        ("count a in banana", "2", Some("count n in b a n a n a")),
        ("count a in banana", "1", Some("count b in b a n a n a")),
        ("count y in banana", "0", Some("count y in b a n a n a")),
        ("count a in banana", "0", Some("count c in b a n a n a")),
        ("count a in banana", "4", None),
        ("position n in banana", "1", Some("position b in b a n a n a")),
        ("position n in banana", "4", None),
        ("position n in banana", "9", None),
    ] {
        assert_eq!(hindsight(&problem("strings", typed), answer).as_deref(), solved, "{typed} answered {answer}");
    }
    // Sorted letters are those of a word in another order, which depends on the question.
    let sorted = |typed: &str| hindsight(&problem("strings", typed), "a b x y z").unwrap();
    let word = sorted("sort zebra");
    let mut letters: Vec<&str> = word.strip_prefix("sort ").unwrap().split(' ').collect();
    assert_eq!(word, sorted("sort zebra"));
    assert_ne!(word, sorted("sort tiger"));
    letters.sort_unstable();
    assert_eq!(letters, ["a", "b", "x", "y", "z"]);
}

#[test]
fn questions_and_patterns_by_hand() {
    for (name, typed, asks, matches) in [
        ("arithmetic", "47 + 38", "Reply with the number only. What is 47 + 38?", "(?:0|-?[1-9][0-9]{0,3})"),
        ("arithmetic", "93 % 7", "Reply with the number only. What is 93 mod 7?", "(?:0|-?[1-9][0-9]{0,2})"),
        (
            "comparison",
            "larger 9.11 9.9",
            "Reply with the number only. Which number is larger: 9.11 or 9.9?",
            "-?(?:0|[1-9][0-9]{0,0})(?:\\.[0-9]{1,2})?",
        ),
        (
            "comparison",
            "smallest 12 120 102",
            "Reply with the number only. Which number is smallest: 12, 120 or 102?",
            "-?(?:0|[1-9][0-9]{0,2})",
        ),
        (
            "strings",
            "spell dog",
            "Reply with the letters only. Spell with a space between the letters: dog",
            "[a-z](?: [a-z]){0,7}",
        ),
        ("strings", "reverse dog", "Reply with the letters only. Reverse the letters: d o g", "[a-z](?: [a-z]){0,7}"),
        (
            "strings",
            "sort abcdefghi",
            "Reply with the letters only. Sort the letters from a to z: a b c d e f g h i",
            "[a-z](?: [a-z]){0,15}",
        ),
        (
            "strings",
            "count a in banana",
            "Reply with the number only. How many times does a occur in b a n a n a?",
            "(?:0|[1-9][0-9]?)",
        ),
        (
            "strings",
            "position n in banana",
            "Reply with the number only. At which position is the first n in b a n a n a?",
            "(?:0|[1-9][0-9]?)",
        ),
        (
            "countdown",
            "3 7 25 -> 82",
            "Reply with an expression only. Every intermediate result must be a positive integer up to 99. With + - * / and \
             parentheses, and each number exactly once, make 82 from 25, 7 and 3.",
            "\\({0,2}(?:25|7|3)\\){0,2}(?: [-+*/] \\({0,2}(?:25|7|3)\\){0,2}){2}",
        ),
    ] {
        let problem = problem(name, typed);
        assert_eq!((&*question(&problem), &*pattern(&problem)), (asks, matches));
    }
}

#[test]
fn problems_in_json() {
    for (name, typed, json) in [
        ("arithmetic", "(47 + 38) * 2", json!({"domain": "arithmetic", "expression": "(47 + 38) * 2"})),
        (
            "comparison",
            "larger 9.11 9.9",
            json!({"domain": "comparison", "which": "larger", "numbers": ["9.11", "9.9"]}),
        ),
        ("strings", "reverse dog", json!({"domain": "strings", "task": "reverse", "word": "dog"})),
        (
            "strings",
            "count a in banana",
            json!({"domain": "strings", "task": "count", "letter": "a", "word": "banana"}),
        ),
    ] {
        let problem = problem(name, typed);
        assert_eq!(domains::problem_from_json(&json).unwrap(), problem);
        assert_eq!(domain(name).unwrap().problem_to_json(&problem).unwrap(), json);
    }
    for (json, says) in [
        (json!({"domain": "arithmetic"}), "as expression, got none"),
        (json!({"domain": "arithmetic", "expression": 85}), "as expression, got 85"),
        (json!({"domain": "arithmetic", "expression": "7 / 5"}), "as expression, got \"7 / 5\""),
        (json!({"domain": "arithmetic", "expression": "7 + 5", "value": 12}), "only the fields domain and expression"),
        (
            json!({"domain": "comparison", "numbers": ["1", "2"]}),
            "expected \"larger\" or \"smaller\" as which, got none",
        ),
        (
            json!({"domain": "comparison", "which": "larger", "numbers": [1, 2]}),
            "as a string such as \"9.11\", as numbers",
        ),
        (json!({"domain": "comparison", "which": "larger", "numbers": ["1", "1.0"]}), "of different value"),
        (
            json!({"domain": "strings", "task": "shout", "word": "dog"}),
            "spell, reverse, sort, count or position as task",
        ),
        (json!({"domain": "strings", "task": "reverse", "word": "d o g"}), "2 to 16 letters from a to z as word"),
        (json!({"domain": "strings", "task": "reverse", "word": "dog", "letter": "d"}), "only the fields domain, task"),
        (json!({"domain": "strings", "task": "count", "word": "dog"}), "one letter from a to z as letter, got none"),
        (json!({"domain": "strings", "task": "count", "word": "dog", "letter": "do"}), "as letter, got \"do\""),
        (json!({"domain": "strings", "task": "position", "word": "dog", "letter": "x"}), "with the letter among them"),
    ] {
        let error = domains::problem_from_json(&json).unwrap_err().to_string();
        assert!(error.contains(says), "{json}: {error}");
    }
}

/// Problems beyond the ladder are judged, but are neither changed nor proposed.
#[test]
fn beyond_the_ladder() {
    for (name, typed) in [("arithmetic", "1234 + 1"), ("comparison", "larger 1234 1"), ("strings", "reverse ab")] {
        let (domain, problem) = (domain(name).unwrap(), problem(name, typed));
        let niche = domain.niche(&problem, None).unwrap();
        assert_eq!((niche.0, domain.describe_niche(niche)), (0, "beyond the ladder".to_owned()));
        assert_eq!(domain.balance_key(&problem, None).unwrap().level, 0);
        assert_eq!(domain.admit(niche, &problem.text).unwrap().unwrap_err().verdict, Verdict::Incorrect);
        let mut rng = proto::CounterRng::new(0, proto::Purpose::Mutation, 0, 0, 0);
        assert_eq!(domain.mutate(&KeyedProblem { problem, key: None }, &mut rng), None);
    }
}
