//! Records of people's files: the fields that this program documents, and those of data sets in use.

use proto::{KeyedProblem, Problem, ProblemKey};
use serde_json::Value;

use super::check::{self, Check};
use super::number;
use super::question::{Asked, Question};
use super::reference::Reference;
use super::reply::last_boxed;
use crate::json::{Fields, Refusal};
use crate::{Countdown, Forms as _, Turn, describe_json};

/// The fields that say what is asked; of several, the first one counts.
pub(super) const ASKED: [&str; 4] = ["prompt", "question", "problem", "messages"];
/// All fields that are read.
pub(super) const FIELDS: [&str; 10] =
    ["prompt", "question", "problem", "messages", "answer", "solution", "check", "nums", "numbers", "target"];

/// Reads a record: `prompt`, `question`, `problem` or `messages` with `answer` or `solution`, or `nums` or `numbers` with `target`.
/// Other fields are ignored. `needs_answer` tells whether a record without an answer is refused.
pub(super) fn read(json: &Value, needs_answer: bool) -> Result<KeyedProblem, Refusal> {
    let mut fields = Fields::of(json)?;
    let asked = ASKED.into_iter().find(|name| fields.has(name));
    let Some(asked) = asked else {
        let is_countdown = fields.has("target") && (fields.has("nums") || fields.has("numbers"));
        if is_countdown {
            return countdown(json);
        }
        return Err(("prompt, messages, question, problem, or nums with target".to_owned(), "none of them".to_owned()));
    };
    let turns = turns(asked, fields.take(asked).expect("the field is there"))?;
    let named = match fields.take("check") {
        None => None,
        Some(name) => Some(
            serde_json::from_value::<Check>(name.clone())
                .map_err(|_| (format!("{} as check", check::NAMES), describe_json(name)))?,
        ),
    };
    let (check, answer) = match (fields.take("answer"), fields.take("solution")) {
        (Some(answer), solution) => {
            let (check, answer) = from_answer(named, answer, solution.is_some())?;
            (check, Some(answer))
        }
        (None, Some(solution)) => {
            let (check, answer) = from_solution(named, solution)?;
            (check, Some(answer))
        }
        (None, None) if needs_answer => return Err(("answer or solution".to_owned(), "neither".to_owned())),
        (None, None) => (named.unwrap_or(Check::Exact), None),
    };
    if let Some(answer) = &answer {
        Reference::read(check, answer).map_err(|reason| {
            (
                format!("an answer that its check ({}) accepts", name(check)),
                format!("{}: {reason}", crate::quote(answer)),
            )
        })?;
    }
    let question = Question::Asked(Asked { check, turns });
    if !question.is_valid() {
        return Err((
            format!("{asked} that ends with a message of the role user, with roles system, user and assistant"),
            "another".to_owned(),
        ));
    }
    Ok(KeyedProblem { problem: question.problem(), key: answer.map(|text| ProblemKey { text }) })
}

/// Writes a problem as a record.
pub(super) fn write(question: &Question, answer: Option<&str>) -> Value {
    let mut json: Value = serde_json::from_str(&question.text()).expect("a canonical text is JSON");
    if let Question::Countdown(problem) = question {
        let problem = Problem { domain: "countdown".to_owned(), text: problem.clone() };
        json =
            Countdown { calculator: true }.problem_to_json(&problem).expect("a problem of countdown has a JSON form");
    }
    json["domain"] = super::question::NAME.into();
    if let Some(answer) = answer {
        json["answer"] = answer.into();
    }
    json
}

fn countdown(json: &Value) -> Result<KeyedProblem, Refusal> {
    let fields = json.as_object().expect("a record");
    let known =
        ["nums", "numbers", "target"].into_iter().filter_map(|name| Some((name.to_owned(), fields.get(name)?.clone())));
    let problem = Countdown::unbounded_from_json(&Value::Object(known.collect()))?;
    Ok(KeyedProblem { problem: Question::Countdown(problem).problem(), key: None })
}

/// Reads messages: a text is a user's.
fn turns(name: &str, value: &Value) -> Result<Vec<Turn>, Refusal> {
    let refuse =
        |got: &Value| (format!("a text, or a list of messages with role and content, as {name}"), describe_json(got));
    match value {
        Value::String(text) if name != "messages" => Ok(vec![Turn::user(text.clone())]),
        Value::Array(messages) => messages
            .iter()
            .map(|message| {
                let part = |name: &str| message.get(name)?.as_str().map(str::to_owned);
                let turn = part("role").zip(part("content")).map(|(role, content)| Turn { role, content });
                turn.ok_or_else(|| refuse(message))
            })
            .collect(),
        other => Err(refuse(other)),
    }
}

/// Returns the check and the right answer. A text with a line `#### 42` is a solution that ends in a number, as in GSM8K. Beside a
/// solution, as in MATH-500, it is what the solution has in its box.
fn from_answer(named: Option<Check>, answer: &Value, has_solution: bool) -> Result<(Check, String), Refusal> {
    let text = match answer {
        Value::String(text) => text.clone(),
        Value::Number(_) | Value::Bool(_) => number_text(answer)?,
        Value::Array(_) | Value::Object(_) if named == Some(Check::Json) => json_text(answer)?,
        other => return Err(("a text or a number as answer".to_owned(), describe_json(other))),
    };
    let marked = text.rsplit_once("####").map(|(_, last)| last.trim().to_owned());
    Ok(match (named, marked) {
        (None | Some(Check::Number), Some(number)) => (Check::Number, number),
        (Some(check), _) => (check, text),
        (None, None) if has_solution => (expression_or_exact(&text), text),
        (None, None) if number::read(&text).is_ok() => (Check::Number, text),
        (None, None) => (Check::Exact, text),
    })
}

/// Writes a value as JSON.
fn json_text(value: &Value) -> Result<String, Refusal> {
    match value {
        Value::Number(_) => drop(number_text(value)?),
        Value::Array(elements) => elements.iter().try_for_each(|element| json_text(element).map(drop))?,
        Value::Object(fields) => fields.values().try_for_each(|field| json_text(field).map(drop))?,
        Value::Null | Value::Bool(_) | Value::String(_) => {}
    }
    Ok(value.to_string())
}

/// Writes a number as its digits.
fn number_text(answer: &Value) -> Result<String, Refusal> {
    let text = answer.to_string();
    let is_float = answer.is_f64();
    let num_digits = text.bytes().filter(u8::is_ascii_digit).count();
    // An integer that is too large for 64 bits was read as a number in floating point.
    let is_large = answer.as_f64().is_some_and(|value| value.abs() >= 1e15);
    if is_float && (num_digits > MAX_FLOAT_DIGITS || is_large) {
        let expected =
            format!("a number of up to {MAX_FLOAT_DIGITS} digits, or a text, as answer, so that none is lost");
        return Err((expected, describe_json(answer)));
    }
    Ok(text)
}

/// Digits that a floating-point number keeps.
const MAX_FLOAT_DIGITS: usize = 15;

/// Returns the check and the content of the last box of a solution, as in MATH.
fn from_solution(named: Option<Check>, solution: &Value) -> Result<(Check, String), Refusal> {
    let text = solution.as_str().ok_or_else(|| ("a text as solution".to_owned(), describe_json(solution)))?;
    let boxed = last_boxed(text).ok_or_else(|| ("a solution with \\boxed{}".to_owned(), crate::quote(text)))?;
    Ok((named.unwrap_or_else(|| expression_or_exact(boxed)), boxed.to_owned()))
}

/// Returns the check of an answer in a data set of mathematics.
fn expression_or_exact(answer: &str) -> Check {
    if Reference::read(Check::Expression, answer).is_ok() { Check::Expression } else { Check::Exact }
}

fn name(check: Check) -> String {
    serde_json::to_value(check).ok().and_then(|name| Some(name.as_str()?.to_owned())).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn records_of_data_sets_have_the_check_of_their_kind() {
        let gsm = json!({"question": "How many?", "answer": "48 / 2 = 24.\n#### 24"});
        let of_math = |solution: &str| json!({"problem": "Find it.", "solution": solution});
        let of_math_500 = |answer: Value| json!({"problem": "Find it.", "solution": "So it is.", "answer": answer});
        for (record, check, answer) in [
            (gsm, "number", "24"),
            (of_math("It is \\boxed{p - q}."), "expression", "p - q"),
            (
                of_math("It is \\boxed{\\left(3, \\frac{\\pi}{2}\\right)}."),
                "exact",
                "\\left(3, \\frac{\\pi}{2}\\right)",
            ),
            (of_math_500("p - q".into()), "expression", "p - q"),
            (of_math_500("\\frac{14}{3}".into()), "expression", "\\frac{14}{3}"),
            (of_math_500("9".into()), "expression", "9"),
            (of_math_500(9.into()), "expression", "9"),
            (of_math_500("\\text{Evelyn}".into()), "exact", "\\text{Evelyn}"),
            (of_math_500("3 + 3 = 6\n#### 6".into()), "number", "6"),
            (json!({"prompt": "Find it.", "answer": "p - q"}), "exact", "p - q"),
            (json!({"prompt": "Find it.", "answer": "9"}), "number", "9"),
            (json!({"prompt": "Find it.", "answer": "9", "solution": "So.", "check": "exact"}), "exact", "9"),
        ] {
            let keyed = read(&record, true).unwrap_or_else(|error| panic!("{record}: {error:?}"));
            let Some(Question::Asked(asked)) = Question::read(&keyed.problem.text) else { panic!("{record}") };
            assert_eq!((name(asked.check).as_str(), keyed.key.unwrap().text.as_str()), (check, answer), "{record}");
        }
    }
}
