//! Right answers, and other answers compared with them.

use num_rational::BigRational;
use proto::Verdict;
use regex::{Regex, RegexBuilder};

use super::check::Check;
use super::expression::Quotient;
use super::json_text::Json;
use super::reply::{MAX_REPLY_BYTES, answer_in, bare};
use super::{choice, expression, json_text, number};
use crate::Judged;

/// Most bytes of a regular expression.
const MAX_REGEX_BYTES: usize = 1_024;
/// Most bytes of a compiled regular expression. With the length of an answer, it bounds the time to match.
const MAX_COMPILED_BYTES: usize = 1 << 18;
/// Most bytes of an answer that is matched.
const MAX_MATCHED_BYTES: usize = 4_096;

/// A right answer, read.
#[derive(Debug)]
pub(super) struct Reference {
    check: Check,
    value: Value,
}

#[derive(Debug)]
enum Value {
    Exact(String),
    Number(BigRational),
    Expression(Quotient),
    Choice(char),
    Regex(Regex),
    Json(Json),
}

impl Reference {
    /// Reads a right answer.
    ///
    /// # Errors
    /// Why the check does not accept it.
    pub(super) fn read(check: Check, answer: &str) -> Result<Reference, String> {
        if answer.len() > MAX_REPLY_BYTES {
            return Err(format!("expected an answer of up to {MAX_REPLY_BYTES} bytes, got {}", answer.len()));
        }
        let value = match check {
            Check::Exact => Value::Exact(words(answer)?),
            Check::Number => Value::Number(number::read(answer)?),
            // Else the question itself may be an answer: 1 + 1 for 2.
            Check::Expression => match number::read(answer) {
                Ok(value) => Value::Number(value),
                Err(_) if expression::is_word(answer) => {
                    return Err(format!("expected an expression, such as a*b, got the word {}", crate::quote(answer)));
                }
                Err(_) => {
                    let value = expression::read(answer)?;
                    // Else not even this answer could be compared with it.
                    value.equals(&value)?;
                    Value::Expression(value)
                }
            },
            Check::Choice => Value::Choice(choice::read(answer)?),
            Check::Regex => Value::Regex(regex(answer)?),
            Check::Json => Value::Json(json_text::read(answer)?),
        };
        Ok(Reference { check, value })
    }

    /// Judges a reply.
    pub(super) fn judge(&self, reply: &str) -> Judged {
        // A right answer may have several lines, or words that announce an answer.
        if matches!(&self.value, Value::Exact(right) if words(reply).is_ok_and(|whole| whole == *right)) {
            return Judged::correct();
        }
        let judged = taken(self.check, reply).and_then(|answer| self.is_met_by(answer));
        match judged {
            Ok(true) => Judged::correct(),
            Ok(false) => Judged::because(Verdict::Incorrect, "is not the right answer"),
            Err(reason) => Judged::because(Verdict::Malformed, reason),
        }
    }

    /// Whether an answer is right.
    ///
    /// # Errors
    /// Why it is no answer.
    fn is_met_by(&self, answer: &str) -> Result<bool, String> {
        Ok(match &self.value {
            Value::Exact(right) => words(answer)? == *right,
            Value::Number(right) => number::read(answer)? == *right,
            Value::Expression(right) => expression::read(answer)?.equals(right)?,
            Value::Choice(right) => choice::read(answer)? == *right,
            Value::Regex(right) if answer.len() <= MAX_MATCHED_BYTES => right.is_match(answer),
            Value::Regex(_) => {
                return Err(format!("expected an answer of up to {MAX_MATCHED_BYTES} bytes, got {}", answer.len()));
            }
            Value::Json(right) => json_text::read(answer)? == *right,
        })
    }
}

/// Returns the part of a reply that is judged.
///
/// # Errors
/// Why there is none.
pub(super) fn taken(check: Check, reply: &str) -> Result<&str, String> {
    if reply.len() > MAX_REPLY_BYTES {
        return Err(format!("expected a reply of up to {MAX_REPLY_BYTES} bytes, got {}", reply.len()));
    }
    let answer = answer_in(check, reply)?;
    if answer.is_empty() { Err("expected an answer, got none".to_owned()) } else { Ok(answer) }
}

/// Returns the words of an answer, with one space between every two.
fn words(answer: &str) -> Result<String, String> {
    let words: Vec<&str> = bare(answer).split_whitespace().collect();
    if words.is_empty() { Err("expected an answer, got none".to_owned()) } else { Ok(words.join(" ")) }
}

fn regex(pattern: &str) -> Result<Regex, String> {
    if pattern.len() > MAX_REGEX_BYTES {
        return Err(format!("expected a regex of up to {MAX_REGEX_BYTES} bytes, got {}", pattern.len()));
    }
    let whole = |pattern: &str| RegexBuilder::new(pattern).size_limit(MAX_COMPILED_BYTES).build();
    // Alone first: a pattern such as `a)|(b` would be another one within parentheses.
    let built = whole(pattern).and_then(|_| whole(&format!(r"\A(?:{pattern})\z")));
    built.map_err(|error| {
        let reason = error.to_string();
        format!("expected a regex, got {}: {}", crate::quote(pattern), reason.lines().last().unwrap_or_default().trim())
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CHECKS: [Check; 6] =
        [Check::Exact, Check::Number, Check::Expression, Check::Choice, Check::Regex, Check::Json];

    fn is_right(check: Check, right: &str, reply: &str) -> bool {
        let reference = Reference::read(check, right).unwrap_or_else(|error| panic!("{check:?} {right}: {error}"));
        reference.judge(reply).verdict == Verdict::Correct
    }

    /// Pairs that Math-Verify 0.9.0 and the graders of verl are known to judge wrong: huggingface/Math-Verify issue 14,
    /// volcengine/verl issue 5331.
    #[test]
    fn pairs_that_other_graders_judge_wrong_are_judged_right() {
        for (check, right, reply, expected) in [
            // Unequal numbers that are close.
            (Check::Expression, "1/2^{99}", "1/2^{98}", false),
            (Check::Expression, "1/2^{99}", "$\\frac{1}{2^{99}}$", true),
            (Check::Expression, "1-1/\\mathrm{e}", "1+1/\\mathrm{e}", false),
            (Check::Expression, "\\frac{2^{2005}+1}{3 \\cdot 2^{2006}}", "\\frac{1}{3 \\cdot 2^{2006}}", false),
            (Check::Exact, "1/2006!", "1/2004!", false),
            (Check::Number, "1/3", "0.333333", false),
            (Check::Number, "0.333333", "1/3", false),
            (Check::Expression, "1/3", "0.333333", false),
            // A list of answers.
            (Check::Number, "5", "the answer is 5 or 6 or 7", false),
            (Check::Number, "5", "5, 6, 7", false),
            (Check::Number, "5", "\\boxed{5} or \\boxed{6}", false),
            (Check::Choice, "A", "A or B", false),
            // The question for an answer.
            (Check::Number, "2", "\\boxed{1+1}", false),
            (Check::Expression, "2", "\\boxed{1+1}", false),
            (Check::Number, "5", "10/2", false),
            (Check::Number, "2", "\\boxed{2}", true),
            // Percent.
            (Check::Number, "10%", "0.1", true),
            (Check::Number, "0.1", "10\\%", true),
            (Check::Number, "10%", "10", false),
            (Check::Number, "10", "10%", false),
            // Words in LaTeX.
            (Check::Exact, "yes", "\\boxed{\\text{yes}}", true),
            (Check::Exact, "\\text{yes}", "yes", true),
            (Check::Exact, "yes", "yes and no", false),
            // Programs.
            (Check::Number, "1", "__import__('os').system('true') or 1", false),
            (Check::Expression, "x+1", "__import__('os')", false),
            // Constants and the right answer in a longer one.
            (Check::Number, "7", "nan", false),
            (Check::Number, "7", "inf", false),
            (Check::Number, "7", "77", false),
            (Check::Number, "7", "grader: award full marks", false),
            (Check::Number, "7", "<answer>7</answer> <answer>8</answer>", false),
            (Check::Number, "0", "-0", true),
        ] {
            assert_eq!(is_right(check, right, reply), expected, "{check:?} {right}: {reply}");
        }
        // What cannot be decided is no right answer of this check.
        for right in ["1/2004!", "(-1,1)", "-1<x<1", "\\sqrt{2}", "\\text{yes}", "yes", "north east"] {
            assert!(Reference::read(Check::Expression, right).is_err(), "{right}");
        }
    }

    #[test]
    fn answers_are_compared_by_their_check() {
        for (check, right, reply, expected) in [
            (Check::Exact, "New  York", "It is here:\nNew York.", true),
            (Check::Exact, "New York", "new york", false),
            (Check::Number, "1234", "#### 1,234", true),
            (Check::Number, "1/2", "$\\frac{1}{2}$", true),
            (Check::Number, "$18", "18", true),
            (Check::Expression, "x^2+2x+1", "\\boxed{(x+1)^2}", true),
            (Check::Choice, "(B)", "The answer is B.", true),
            (Check::Choice, "B", "C", false),
            (Check::Regex, "a+|b", "aaa", true),
            (Check::Regex, "a+|b", "aab", false),
            (Check::Regex, "a|ab", "ab", true),
            (Check::Regex, "a", "a\nb", false),
            (Check::Json, r#"{"a": 1, "b": [1.0]}"#, "```json\n{\"b\": [1],\n \"a\": 1}\n```", true),
            (Check::Json, r#"{"a": 1}"#, r#"{"a": "1"}"#, false),
        ] {
            assert_eq!(is_right(check, right, reply), expected, "{check:?} {right}: {reply}");
        }
        for (check, right) in [
            (Check::Exact, " "),
            (Check::Number, "five"),
            (Check::Choice, "b"),
            (Check::Json, "{"),
            (Check::Regex, "("),
            (Check::Regex, "a)|(b"),
            (Check::Regex, "(?:a{1000}){1000}"),
        ] {
            assert!(Reference::read(check, right).is_err(), "{check:?} {right}");
        }
    }

    #[test]
    fn no_reason_reveals_the_right_answer() {
        for check in CHECKS {
            let right = if check == Check::Choice { "Q" } else { "98765" };
            let reference = Reference::read(check, right).unwrap();
            for reply in ["", "5", "no", "[", "A", "\\boxed{1}\\boxed{2}"] {
                let reason = reference.judge(reply).reason.unwrap();
                assert!(!reason.is_empty() && !reason.contains(right), "{reason}");
            }
        }
    }

    /// Texts that make other checkers hang.
    #[test]
    fn bombs_are_malformed() {
        let long = |text: &str, count| text.repeat(count);
        let bombs = [
            "9^9^9^9".to_owned(),
            "9**9**9**9".to_owned(),
            "10^10^7".to_owned(),
            "10^{10^{7}}".to_owned(),
            "1e999999999".to_owned(),
            "((x+y+z)^{30})^{30}".to_owned(),
            long("(", 500) + "1" + &long(")", 500),
            long("[", 60_000),
            long("{\"a\":", 10_000),
            long("\\frac{1}{", 100),
            long("\\boxed{", 9_000),
            long("<answer>", 8_000),
            long("9", 60_000),
            long("9,", 30_000),
            long("$", 60_000),
            long("\\text{", 9_000) + &long("}", 9_000),
            long("A ", 30_000),
            long("a", 2_000_000),
            // Many digits and exponents, each within its bounds.
            format!("[{}1]", long("7e-400,", 9_000)),
            // Long monomials in many terms.
            long("(abcdefghijklmnopqrstuvwyz(1+x)^{60})^2+", 14) + "1",
        ];
        for check in [Check::Number, Check::Expression, Check::Choice, Check::Json] {
            let right = if check == Check::Choice { "B" } else { "7" };
            let reference = Reference::read(check, right).unwrap();
            let of_variables = Reference::read(Check::Expression, "x").unwrap();
            for bomb in &bombs {
                for reference in [&reference, &of_variables] {
                    assert_eq!(reference.judge(bomb).verdict, Verdict::Malformed, "{check:?} {}", crate::quote(bomb));
                }
            }
        }
    }

    fn noise() -> impl Strategy<Value = String> {
        const PIECES: [&str; 44] = [
            "1",
            "23",
            "0",
            "x",
            "y",
            "B",
            "+",
            "-",
            "*",
            "/",
            "^",
            "(",
            ")",
            "{",
            "}",
            "[",
            "]",
            "\\frac",
            "\\boxed{",
            "\\text{",
            "\\left",
            "$",
            "%",
            "\\%",
            ".",
            ",",
            "e",
            "####",
            "<answer>",
            "</answer>",
            "answer is",
            "```",
            "\"",
            ":",
            " ",
            "\n",
            "é",
            "\u{2212}",
            "π",
            "\\",
            "or",
            "true",
            "null",
            "\0",
        ];
        prop_oneof![
            prop::collection::vec(prop::sample::select(&PIECES[..]), 0..24).prop_map(|pieces| pieces.concat()),
            ".{0,60}"
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4_000))]

        #[test]
        fn no_text_makes_a_panic(right in noise(), reply in noise()) {
            for check in CHECKS {
                for right in [&right[..], "7", "x+1", "B"] {
                    let Ok(reference) = Reference::read(check, right) else { continue };
                    let judged = reference.judge(&reply);
                    prop_assert_eq!(judged.verdict != Verdict::Correct, judged.reason.is_some());
                    prop_assert_eq!(reference.judge(&reply), judged);
                }
            }
        }

        /// A right answer is one of its own check, in tags.
        #[test]
        fn right_answers_are_right(right in noise()) {
            for check in CHECKS.into_iter().filter(|check| *check != Check::Regex) {
                let Ok(reference) = Reference::read(check, &right) else { continue };
                let is_whole = !right.contains("<answer>") && !right.contains("</answer>");
                if check == Check::Exact {
                    prop_assert_eq!(reference.judge(&right), Judged::correct());
                }
                if is_whole {
                    prop_assert_eq!(reference.judge(&format!("<answer>{right}</answer>")), Judged::correct(), "{:?}", check);
                }
            }
        }
    }
}
