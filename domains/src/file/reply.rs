//! Which part of a reply is the answer.

use super::check::Check;

/// Most bytes of a reply.
pub(super) const MAX_REPLY_BYTES: usize = 1 << 16;

/// Returns the part of a reply that is judged: the text within the last `<answer>` and `</answer>`. Else, for a regex the last
/// line that is not blank; for JSON the last fenced block, else all of the reply; and otherwise the content of the last `\boxed{}`,
/// else the last line that is not blank, from behind `####`, `answer is` or `answer:` on.
///
/// # Errors
/// When there are boxes with different contents.
pub(super) fn answer_in(check: Check, reply: &str) -> Result<&str, String> {
    if let Some(tagged) = tagged(reply) {
        return Ok(tagged.trim());
    }
    match check {
        Check::Json => return Ok(fenced(reply).unwrap_or(reply).trim()),
        Check::Regex => return Ok(last_line(reply)),
        Check::Exact | Check::Number | Check::Expression | Check::Choice => {}
    }
    let boxes = boxed(reply);
    if let Some(last) = boxes.last() {
        let other = boxes.iter().find(|other| other.trim() != last.trim());
        return match other {
            None => Ok(last.trim()),
            Some(other) => {
                let [other, last] = [other, last].map(|text| crate::quote(text));
                Err(format!("expected one answer in \\boxed{{}}, got {other} and {last}"))
            }
        };
    }
    Ok(announced(last_line(reply)))
}

/// Returns the content of the last `\boxed{}` of a text.
pub(super) fn last_boxed(text: &str) -> Option<&str> {
    boxed(text).pop().map(str::trim)
}

/// Removes what surrounds an answer and does not belong to it: white space, signs of mathematics and of bold face, `\text{}`, and a
/// full stop behind it.
pub(super) fn bare(text: &str) -> &str {
    let mut text = text.trim();
    for _ in 0..MAX_WRAPPERS {
        let before = text.len();
        for (open, close) in WRAPPERS {
            let inner = text.strip_prefix(open).and_then(|rest| rest.strip_suffix(close));
            text = inner.filter(|inner| is_balanced(inner) && !inner.is_empty()).unwrap_or(text).trim();
        }
        text = text.strip_suffix('.').filter(|rest| !rest.is_empty()).unwrap_or(text).trim();
        if text.len() == before {
            break;
        }
    }
    text
}

/// How often what surrounds an answer is removed.
const MAX_WRAPPERS: usize = 8;

const WRAPPERS: [(&str, &str); 8] = [
    ("$", "$"),
    ("\\(", "\\)"),
    ("\\[", "\\]"),
    ("**", "**"),
    ("\\boxed{", "}"),
    ("\\text{", "}"),
    ("\\textbf{", "}"),
    ("\\mathrm{", "}"),
];

/// Whether every brace that closes was opened before.
fn is_balanced(text: &str) -> bool {
    let mut depth = 0_i32;
    for byte in text.bytes() {
        depth += i32::from(byte == b'{') - i32::from(byte == b'}');
        if depth < 0 {
            return false;
        }
    }
    depth == 0
}

fn tagged(reply: &str) -> Option<&str> {
    let start = reply.rfind("<answer>")? + "<answer>".len();
    let end = reply[start..].find("</answer>")?;
    Some(&reply[start..start + end])
}

/// Returns the content of the last block between lines of three backticks.
fn fenced(reply: &str) -> Option<&str> {
    let close = reply.rfind("```")?;
    let open = reply[..close].rfind("```")?;
    let block = &reply[open + 3..close];
    let (language, content) = block.split_once('\n')?;
    (language.trim().is_empty() || language.trim().eq_ignore_ascii_case("json")).then_some(content)
}

/// Lists the contents of the boxes that are closed and in no other.
fn boxed(text: &str) -> Vec<&str> {
    const OPEN: &str = "\\boxed{";
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(OPEN) {
        rest = &rest[at + OPEN.len()..];
        let mut depth = 1_u32;
        let close = rest.bytes().position(|byte| {
            depth = depth + u32::from(byte == b'{') - u32::from(byte == b'}');
            depth == 0
        });
        let Some(close) = close else { break };
        found.push(&rest[..close]);
        rest = &rest[close..];
    }
    found
}

fn last_line(reply: &str) -> &str {
    reply.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default().trim()
}

/// Returns what stands behind the last announcement of an answer in a line.
fn announced(line: &str) -> &str {
    let lower = line.to_ascii_lowercase();
    let ends = ["####", "answer is", "answer:"].map(|words| lower.rfind(words).map(|at| at + words.len()));
    match ends.into_iter().flatten().max() {
        None => line,
        // **Answer:** 5
        Some(end) => line[end..].trim_matches([' ', '\t', '\r', '*', ':']),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_found() {
        for (check, reply, answer) in [
            (Check::Number, "42", "42"),
            (Check::Number, "6 * 7 is 42.\n#### 42\n", "42"),
            (Check::Number, "So the answer is 42.", "42."),
            (Check::Number, "**Answer:** 42", "42"),
            (Check::Number, "The Answer is: 42", "42"),
            (Check::Number, "Hence \\boxed{42}, as 6 * 7.\nDone.", "42"),
            (Check::Number, "\\boxed{\\frac{1}{2}} and \\boxed{ \\frac{1}{2} }", "\\frac{1}{2}"),
            (Check::Number, "\\boxed{1} <answer> 2 </answer> 3", "2"),
            (Check::Number, "<answer>1</answer><answer>2</answer>", "2"),
            (Check::Number, "<answer>1", "<answer>1"),
            (Check::Number, "\\boxed{1", "\\boxed{1"),
            (Check::Number, "", ""),
            (Check::Exact, "first\n last \n\n", "last"),
            (Check::Regex, "a\n\\boxed{b}", "\\boxed{b}"),
            (Check::Json, "{\n\"a\": 1\n}\n", "{\n\"a\": 1\n}"),
            (Check::Json, "Here:\n```json\n[1]\n```\nDone.", "[1]"),
            (Check::Json, "```JSON\n[1]\n```", "[1]"),
            (Check::Json, "```python\n[1]\n```", "```python\n[1]\n```"),
            (Check::Json, "<answer>[1]</answer>", "[1]"),
        ] {
            assert_eq!(answer_in(check, reply).unwrap(), answer, "{reply}");
        }
        let error = answer_in(Check::Number, "\\boxed{5} or \\boxed{6}").unwrap_err();
        assert_eq!(error, "expected one answer in \\boxed{}, got \"5\" and \"6\"");
    }

    #[test]
    fn what_surrounds_an_answer_is_removed() {
        for (text, bare) in [
            (" 5. ", "5"),
            ("$5$.", "5"),
            ("\\text{yes}", "yes"),
            ("$\\text{yes}.$", "yes"),
            ("\\text{a} or \\text{b}", "\\text{a} or \\text{b}"),
            (".", "."),
            ("$", "$"),
            ("$$", "$$"),
            ("...", "."),
            ("\\text{\\text{5}}", "5"),
            ("", ""),
        ] {
            assert_eq!(super::bare(text), bare, "{text}");
        }
    }
}
