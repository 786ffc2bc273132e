//! The problem language: three ways to hide one part of (program, input, output), their texts, prompts and checkers.

use proto::{TokenId, Verdict};

use super::behavior::probes;
use super::grammar::{ProgramGrammar, ValueGrammar};
use super::interpreter::{FUEL, MAX_CELLS, Machine, Stop};
use super::language::{
    ABDUCE, DEDUCE, Dialect, INDUCE_INTEGER, INDUCE_LIST, MAX_PROBLEM_OPERATIONS, MAX_TEXT_BYTES, Program, Refusal,
};
use super::value::{END, MAX_ELEMENTS, MAX_MAGNITUDE, Type, Value, View, is_space, parse_integer};
use crate::json::{Fields, Refusal as Refused, list};
use crate::symbols::Grammar;
use crate::symbols::vocabulary::{PROGRAMS, PROGRAMS_DIGITS, ROLE_SOLVE};
use crate::{Judged, describe_json};

/// Which part of (program, input, output) a problem asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The output.
    Deduction,
    /// Any input with the given output.
    Abduction,
    /// Any program for the given pairs.
    Induction,
}

/// Most pairs of an induction problem.
const MAX_PAIRS: usize = 4;
/// Most tokens in the prompt of a generated problem.
pub(super) const MAX_DRAWN_PROMPT: usize = 40;
/// Most tokens in the prompt of a problem that hindsight relabels; a problem from a person may have more.
pub(super) const MAX_RELABELLED_PROMPT: usize = 48;

/// A parsed problem, legal in every part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Puzzle {
    Deduction { program: Program, input: Vec<i32>, output: Value },
    Abduction { program: Program, output: Value },
    Induction { dialect: Dialect, max_operations: usize, pairs: Vec<(Vec<i32>, Value)> },
}

/// What the parser expected when it failed.
pub(super) type Expected = &'static str;

const EXPECTED_TEXT: Expected = "a problem such as \"sort take 2 : [5 1 4] -> ?\", \"sort : ? -> [1 4]\" or \
                                 \"? max 2 : [5 1] -> [1 5] ; [3] -> [3]\"";
const EXPECTED_PROGRAM: Expected = "a well-typed program of 1 to 8 operations, such as \"filter (> 3) map (* 2)\"";
const EXPECTED_INPUT: Expected = "an input of up to 6 integers from -9 to 9 (digits in programs-digits)";
const EXPECTED_OUTPUT: Expected =
    "an output that is an integer or a list of up to 6 integers, within the range of the language";
const EXPECTED_DEFINED: Expected = "an input for which the program returns an output of up to 6 elements";
const EXPECTED_TYPE: Expected = "an output of the program's type";
const EXPECTED_PAIRS: Expected = "1 to 4 pairs with distinct inputs and with outputs of one type";
const EXPECTED_MAX: Expected = "a maximum number of operations from 1 to 4 (3 in programs-digits)";

impl Puzzle {
    pub(super) fn deduction(program: Program, input: Vec<i32>) -> Result<Puzzle, Expected> {
        check(program.num_operations <= MAX_PROBLEM_OPERATIONS, EXPECTED_PROGRAM)?;
        check(program.dialect.is_input(&input), EXPECTED_INPUT)?;
        let mut machine = Machine::new();
        let output = machine.run(&program, &input).ok().filter(|output| program.dialect.is_output(*output));
        let output = output.ok_or(EXPECTED_DEFINED)?.to_value();
        Ok(Puzzle::Deduction { program, input, output })
    }

    pub(super) fn abduction(program: Program, output: Value) -> Result<Puzzle, Expected> {
        check(program.num_operations <= MAX_PROBLEM_OPERATIONS, EXPECTED_PROGRAM)?;
        check(program.dialect.is_output(output.view()), EXPECTED_OUTPUT)?;
        check(program.output == output.view().type_of(), EXPECTED_TYPE)?;
        Ok(Puzzle::Abduction { program, output })
    }

    /// Sorts the pairs, because their order carries no information.
    pub(super) fn induction(
        dialect: Dialect,
        max_operations: usize,
        mut pairs: Vec<(Vec<i32>, Value)>,
    ) -> Result<Puzzle, Expected> {
        check((1..=dialect.max_operations()).contains(&max_operations), EXPECTED_MAX)?;
        check(pairs.iter().all(|(input, _)| dialect.is_input(input)), EXPECTED_INPUT)?;
        check(pairs.iter().all(|(_, output)| dialect.is_output(output.view())), EXPECTED_OUTPUT)?;
        if !pairs.is_sorted() {
            pairs.sort_unstable();
        }
        let distinct = pairs.windows(2).all(|neighbors| neighbors[0].0 != neighbors[1].0);
        let one_type =
            pairs.windows(2).all(|neighbors| neighbors[0].1.view().type_of() == neighbors[1].1.view().type_of());
        check((1..=MAX_PAIRS).contains(&pairs.len()) && distinct && one_type, EXPECTED_PAIRS)?;
        Ok(Puzzle::Induction { dialect, max_operations, pairs })
    }

    /// Reads a problem as a person would type it.
    pub(super) fn parse(dialect: Dialect, text: &str) -> Result<Puzzle, Expected> {
        check(text.len() <= MAX_TEXT_BYTES, EXPECTED_TEXT)?;
        let (head, body) = text.split_once(':').ok_or(EXPECTED_TEXT)?;
        if let Some(rest) = head.trim_matches(is_space).strip_prefix('?') {
            let mut words = rest.split(is_space).filter(|word| !word.is_empty());
            let max = match (words.next(), words.next(), words.next()) {
                (Some("max"), Some(max), None) => parse_integer(max).filter(|max| *max > 0).ok_or(EXPECTED_MAX)?,
                _ => return Err(EXPECTED_MAX),
            };
            let pairs = body.split(';').take(MAX_PAIRS + 1).map(|pair| {
                let (input, output) = pair.split_once("->").ok_or(EXPECTED_TEXT)?;
                let output = Value::parse(output).map_err(|_| EXPECTED_OUTPUT)?;
                Ok((parse_input(input)?, output))
            });
            return Puzzle::induction(dialect, max as usize, pairs.collect::<Result<_, Expected>>()?);
        }
        let program = parse_program(dialect, head)?;
        let (input, output) = body.split_once("->").ok_or(EXPECTED_TEXT)?;
        match (input.trim_matches(is_space), output.trim_matches(is_space)) {
            ("?", "?") => Err(EXPECTED_TEXT),
            ("?", output) => Puzzle::abduction(program, Value::parse(output).map_err(|_| EXPECTED_OUTPUT)?),
            (input, "?") => Puzzle::deduction(program, parse_input(input)?),
            _ => Err(EXPECTED_TEXT),
        }
    }

    /// Writes the canonical text.
    pub(super) fn text(&self) -> String {
        let mut text = String::with_capacity(96);
        match self {
            Puzzle::Deduction { program, input, .. } => {
                program.write(&mut text);
                text.push_str(" : ");
                View::List(input).write(&mut text);
                text.push_str(" -> ?");
            }
            Puzzle::Abduction { program, output } => {
                program.write(&mut text);
                text.push_str(" : ? -> ");
                output.view().write(&mut text);
            }
            Puzzle::Induction { max_operations, pairs, .. } => {
                text.push_str("? max ");
                View::Integer(*max_operations as i32).write(&mut text);
                for (index, (input, output)) in pairs.iter().enumerate() {
                    text.push_str(if index == 0 { " : " } else { " ; " });
                    View::List(input).write(&mut text);
                    text.push_str(" -> ");
                    output.view().write(&mut text);
                }
            }
        }
        text
    }

    pub(super) fn prompt(&self) -> Vec<TokenId> {
        let domain = match self.dialect() {
            Dialect::Full => PROGRAMS,
            Dialect::Digits => PROGRAMS_DIGITS,
        };
        let mut tokens = Vec::with_capacity(48);
        tokens.extend([ROLE_SOLVE, domain]);
        match self {
            Puzzle::Deduction { program, input, .. } => {
                tokens.push(DEDUCE);
                program.spell(&mut tokens);
                tokens.push(END);
                View::List(input).spell(&mut tokens);
            }
            Puzzle::Abduction { program, output } => {
                tokens.push(ABDUCE);
                program.spell(&mut tokens);
                tokens.push(END);
                output.view().spell(&mut tokens);
            }
            Puzzle::Induction { max_operations, pairs, .. } => {
                let integers = self.answer_type() == Type::Integer;
                tokens.extend([if integers { INDUCE_INTEGER } else { INDUCE_LIST }, *max_operations as TokenId]);
                for (input, output) in pairs {
                    View::List(input).spell(&mut tokens);
                    output.view().spell(&mut tokens);
                }
            }
        }
        tokens
    }

    pub(super) fn json(&self, domain: &str) -> serde_json::Value {
        match self {
            Puzzle::Deduction { program, input, .. } => serde_json::json!({
                "domain": domain, "mode": "deduction", "program": program.text(), "input": input,
            }),
            Puzzle::Abduction { program, output } => serde_json::json!({
                "domain": domain, "mode": "abduction", "program": program.text(), "output": output,
            }),
            Puzzle::Induction { max_operations, pairs, .. } => serde_json::json!({
                "domain": domain, "mode": "induction", "max_operations": max_operations, "pairs": pairs,
            }),
        }
    }

    /// Reads the JSON form.
    pub(super) fn from_json(dialect: Dialect, json: &serde_json::Value) -> Result<Puzzle, Refused> {
        let mut fields = Fields::of(json)?;
        fields.take("domain");
        let mode = |mode: &serde_json::Value| serde_json::from_value::<Mode>(mode.clone()).ok();
        let mode = fields.read("mode", r#""deduction", "abduction" or "induction""#, mode)?;
        let integer = |value: &serde_json::Value| value.as_i64().and_then(|integer| integer.try_into().ok());
        let input = |value: &serde_json::Value| list(value, integer);
        let output = |value: &serde_json::Value| match value.as_array() {
            Some(_) => list(value, integer).map(Value::List),
            None => integer(value).map(Value::Integer),
        };
        let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
        let of = |name: &str| json.get(name).map_or("none".to_owned(), describe_json);
        let program = |fields: &mut Fields<'_>| {
            let text = fields.read("program", "a string", text)?;
            parse_program(dialect, &text).map_err(|expected| (expected.to_owned(), of("program")))
        };
        // The name of the field that holds the data of the mode, and the puzzle.
        let (data, puzzle) = match mode {
            Mode::Deduction => {
                let program = program(&mut fields)?;
                let input = fields.read("input", "a list of integers", input)?;
                fields.end("domain, mode, program and input in a deduction problem")?;
                ("input", Puzzle::deduction(program, input))
            }
            Mode::Abduction => {
                let program = program(&mut fields)?;
                let output = fields.read("output", "an integer or a list of integers", output)?;
                fields.end("domain, mode, program and output in an abduction problem")?;
                ("output", Puzzle::abduction(program, output))
            }
            Mode::Induction => {
                let max = |value: &serde_json::Value| value.as_u64().map(|max| max.try_into().unwrap_or(usize::MAX));
                let max_operations = fields.read("max_operations", "a positive integer", max)?;
                let pair = |pair: &serde_json::Value| match pair.as_array().map(Vec::as_slice) {
                    Some([left, right]) => Some((input(left)?, output(right)?)),
                    _ => None,
                };
                let expected = "a list of pairs, each a list of an input and an output,";
                let pairs = fields.read("pairs", expected, |value| list(value, pair))?;
                fields.end("domain, mode, max_operations and pairs in an induction problem")?;
                ("pairs", Puzzle::induction(dialect, max_operations, pairs))
            }
        };
        puzzle.map_err(|expected| {
            let field = match expected {
                EXPECTED_PROGRAM => "program",
                EXPECTED_MAX => "max_operations",
                _ => data,
            };
            (expected.to_owned(), of(field))
        })
    }

    pub(super) fn dialect(&self) -> Dialect {
        match self {
            Puzzle::Deduction { program, .. } | Puzzle::Abduction { program, .. } => program.dialect,
            Puzzle::Induction { dialect, .. } => *dialect,
        }
    }

    pub(super) fn mode(&self) -> Mode {
        match self {
            Puzzle::Deduction { .. } => Mode::Deduction,
            Puzzle::Abduction { .. } => Mode::Abduction,
            Puzzle::Induction { .. } => Mode::Induction,
        }
    }

    /// Returns the type of the answer; for an answer that is a program, the type of its output.
    fn answer_type(&self) -> Type {
        match self {
            Puzzle::Deduction { output, .. } => output.view().type_of(),
            Puzzle::Abduction { .. } => Type::List,
            Puzzle::Induction { pairs, .. } => pairs[0].1.view().type_of(),
        }
    }

    pub(super) fn grammar(&self) -> Box<dyn Grammar> {
        let dialect = self.dialect();
        match self {
            Puzzle::Deduction { output: Value::Integer(_), .. } => {
                Box::new(ValueGrammar::integer(dialect.integer_range()))
            }
            Puzzle::Deduction { output: Value::List(_), .. } => Box::new(ValueGrammar::list(dialect.integer_range())),
            Puzzle::Abduction { .. } => Box::new(ValueGrammar::list(dialect.input_range())),
            Puzzle::Induction { max_operations, .. } => {
                Box::new(ProgramGrammar::new(dialect, *max_operations, Some(self.answer_type())))
            }
        }
    }

    pub(super) fn max_answer_tokens(&self) -> u32 {
        let tokens_per_integer = if self.dialect().integer_range().0 < 0 { 2 } else { 1 };
        match self {
            // Every operation takes at most one token and a constant.
            Puzzle::Induction { max_operations, .. } => 2 * *max_operations as u32 + 1,
            _ if self.answer_type() == Type::Integer => tokens_per_integer,
            _ => tokens_per_integer * MAX_ELEMENTS as u32 + 1,
        }
    }

    /// Judges an answer in tokens.
    ///
    /// A program must satisfy the visible pairs. If `reference` is given, the program must also have the reference's output on
    /// each probe input, and no output when the reference has none.
    pub(super) fn judge(&self, answer: &[TokenId], reference: Option<&Program>, machine: &mut Machine) -> Verdict {
        // An empty answer is a prefix of every answer, so it is incorrect rather than malformed.
        if answer.is_empty() {
            return Verdict::Incorrect;
        }
        match self {
            Puzzle::Deduction { output, .. } => match Value::read(answer) {
                Some(value) => correct_if(value == *output),
                None => Verdict::Malformed,
            },
            Puzzle::Abduction { program, output } => match Value::read(answer) {
                Some(Value::List(input)) if program.dialect.is_input(&input) => match machine.run(program, &input) {
                    Ok(value) => correct_if(value == output.view()),
                    Err(stop) => verdict_of(stop),
                },
                _ => Verdict::Malformed,
            },
            Puzzle::Induction { dialect, max_operations, pairs } => {
                let program = match answer.strip_suffix(&[END]).map(|tokens| Program::read(*dialect, tokens)) {
                    Some(Ok(program)) => program,
                    Some(Err(refusal)) => return verdict_of_refusal(refusal),
                    None => return Verdict::Malformed,
                };
                match judge_pairs(&program, pairs, machine) {
                    Verdict::Correct if program.num_operations > *max_operations => Verdict::Incorrect,
                    Verdict::Correct => match reference {
                        Some(reference) => judge_probes(&program, reference, machine),
                        None => Verdict::Correct,
                    },
                    verdict => verdict,
                }
            }
        }
    }

    /// Converts an answer in text to tokens, to be judged.
    ///
    /// # Errors
    /// The verdict and its reason, when the text has no spelling in tokens.
    pub(super) fn parse_answer(&self, text: &str) -> Result<Vec<TokenId>, Judged> {
        let malformed = |reason: String| Judged::because(Verdict::Malformed, reason);
        if text.len() > MAX_TEXT_BYTES {
            return Err(malformed(format!("expected an answer of up to {MAX_TEXT_BYTES} bytes, got {}", text.len())));
        }
        let mut tokens = Vec::with_capacity(16);
        if self.mode() == Mode::Induction {
            let refused =
                |refusal| Judged::because(verdict_of_refusal(refusal), Program::explain(self.dialect(), text));
            Program::parse(self.dialect(), text).map_err(refused)?.spell(&mut tokens);
            tokens.push(END);
        } else {
            Value::parse(text).map_err(malformed)?.view().spell(&mut tokens);
        }
        Ok(tokens)
    }

    /// Returns why an answer that [`Puzzle::parse_answer`] accepted is not correct. Reveals nothing that the problem hides:
    /// neither the output of a deduction nor what a reference does on inputs that are not shown.
    pub(super) fn explain(&self, answer: &[TokenId], verdict: Verdict, machine: &mut Machine) -> String {
        match self {
            Puzzle::Deduction { .. } if verdict == Verdict::Malformed => {
                format!("expected an integer, or a list of up to {MAX_ELEMENTS} elements, got a longer list")
            }
            Puzzle::Deduction { .. } => "is not what the program gives".to_owned(),
            Puzzle::Abduction { program, output } => match Value::read(answer) {
                Some(Value::List(input)) if program.dialect.is_input(&input) => {
                    explain_run(program, &input, output.view(), machine).unwrap_or_default()
                }
                _ => {
                    let (low, high) = program.dialect.input_range();
                    format!("expected an input, a list of up to {MAX_ELEMENTS} integers from {low} to {high}")
                }
            },
            Puzzle::Induction { dialect, max_operations, pairs } => {
                let Some(program) = written_program(*dialect, answer) else {
                    return "is not a program".to_owned();
                };
                let mut unfit =
                    pairs.iter().filter_map(|(input, output)| explain_run(&program, input, output.view(), machine));
                if let Some(reason) = unfit.next() {
                    return reason;
                }
                match verdict {
                    _ if program.num_operations > *max_operations => {
                        format!("has {} operations, up to {max_operations} are allowed", program.num_operations)
                    }
                    Verdict::Timeout => "fits the pairs, and runs out of fuel on an input that is not shown".to_owned(),
                    Verdict::Resource => {
                        "fits the pairs, and makes too long a list of an input that is not shown".to_owned()
                    }
                    _ => "fits the pairs, and does something else on an input that is not shown".to_owned(),
                }
            }
        }
    }

    /// Returns the puzzle with the same givens that an answer solves exactly. `None` when there is none, or when it is
    /// trivial (an empty output, or one output for all inputs) or too long for a prompt.
    pub(super) fn hindsight(&self, answer: &[TokenId]) -> Option<Puzzle> {
        let mut machine = Machine::new();
        if self.judge(answer, None, &mut machine) == Verdict::Correct {
            return Some(self.clone());
        }
        match self {
            Puzzle::Deduction { .. } => None,
            Puzzle::Abduction { program, .. } => {
                let Some(Value::List(input)) = Value::read(answer) else { return None };
                let output = program.dialect.is_input(&input).then(|| machine.run(program, &input).ok()).flatten()?;
                let told = !output.is_empty();
                told.then(|| Puzzle::abduction(program.clone(), output.to_value()).ok()).flatten()
            }
            Puzzle::Induction { dialect, max_operations, pairs } => {
                let program = written_program(*dialect, answer)?;
                if program.num_operations > *max_operations {
                    return None;
                }
                let relabelled = pairs.iter().map(|(input, _)| {
                    machine.run(&program, input).ok().map(|output| (input.clone(), output.to_value()))
                });
                let relabelled: Vec<_> = relabelled.collect::<Option<_>>()?;
                let varied = relabelled.iter().any(|(_, output)| *output != relabelled[0].1);
                let puzzle = varied.then(|| Puzzle::induction(*dialect, *max_operations, relabelled).ok()).flatten();
                puzzle.filter(|puzzle| puzzle.prompt().len() <= MAX_RELABELLED_PROMPT)
            }
        }
    }

    /// Returns the deduction that running an answer solves, whatever its verdict; a program is run on the first of the inputs.
    pub(super) fn execution(&self, answer: &[TokenId]) -> Option<Puzzle> {
        let (program, input) = match self {
            Puzzle::Deduction { program, input, .. } => (program.clone(), input.clone()),
            Puzzle::Abduction { program, .. } => match Value::read(answer)? {
                Value::List(input) => (program.clone(), input),
                Value::Integer(_) => return None,
            },
            Puzzle::Induction { dialect, pairs, .. } => (written_program(*dialect, answer)?, pairs[0].0.clone()),
        };
        Puzzle::deduction(program, input).ok()
    }

    /// Returns the program, if the problem shows it.
    pub(super) fn program(&self) -> Option<&Program> {
        match self {
            Puzzle::Deduction { program, .. } | Puzzle::Abduction { program, .. } => Some(program),
            Puzzle::Induction { .. } => None,
        }
    }

    /// Classifies the output into one of a few kinds: sign and size of an integer, length and size of a list. An induction
    /// problem is classified by its first pair.
    pub(super) fn output_bucket(&self) -> u8 {
        let output = match self {
            Puzzle::Deduction { output, .. } | Puzzle::Abduction { output, .. } => output,
            Puzzle::Induction { pairs, .. } => &pairs[0].1,
        };
        match output {
            Value::Integer(integer) => match integer {
                ..0 => 0,
                0 => 1,
                1..=9 => 2,
                10.. => 3,
            },
            Value::List(list) => {
                let is_large = list.iter().any(|element| element.abs() > 9);
                4 + 2 * list.len().div_ceil(2) as u8 + u8::from(is_large)
            }
        }
    }
}

/// Reads an answer that is a program.
pub(super) fn written_program(dialect: Dialect, answer: &[TokenId]) -> Option<Program> {
    Program::read(dialect, answer.strip_suffix(&[END])?).ok()
}

/// Returns the set of operations of a program as bits.
pub(super) fn operation_bits(program: &Program) -> u32 {
    program.codes.iter().fold(0, |bits, code| bits | 1 << (code.primitive as u32))
}

/// Whether a program produces the outputs of all pairs.
pub(super) fn is_consistent(machine: &mut Machine, program: &Program, pairs: &[(Vec<i32>, Value)]) -> bool {
    program.output == pairs[0].1.view().type_of()
        && pairs.iter().all(|(input, output)| machine.run(program, input) == Ok(output.view()))
}

fn judge_pairs(program: &Program, pairs: &[(Vec<i32>, Value)], machine: &mut Machine) -> Verdict {
    for (input, output) in pairs {
        match machine.run(program, input) {
            Ok(value) if value == output.view() => {}
            Ok(_) => return Verdict::Incorrect,
            Err(stop) => return verdict_of(stop),
        }
    }
    Verdict::Correct
}

fn judge_probes(program: &Program, reference: &Program, machine: &mut Machine) -> Verdict {
    let mut reference_machine = Machine::new();
    for probe in probes(program.dialect) {
        let (got, expected) = (machine.run(program, probe), reference_machine.run(reference, probe));
        if got != expected {
            return got.err().map_or(Verdict::Incorrect, verdict_of);
        }
    }
    Verdict::Correct
}

/// Describes what a program returns on an input instead of the output that is shown; `None` when it returns that output.
fn explain_run(program: &Program, input: &[i32], output: View<'_>, machine: &mut Machine) -> Option<String> {
    let written = |value: View<'_>| {
        let mut text = String::new();
        value.write(&mut text);
        text
    };
    let on = format!("on {}", written(View::List(input)));
    Some(match machine.run(program, input) {
        Ok(value) if value == output => return None,
        Ok(View::List(list)) if list.len() > MAX_ELEMENTS => {
            format!("gives a list of {} elements {on}, not {}", list.len(), written(output))
        }
        Ok(value) => format!("gives {} {on}, not {}", written(value), written(output)),
        Err(Stop::Overflow) => format!("leaves the integers from -{MAX_MAGNITUDE} to {MAX_MAGNITUDE} {on}"),
        Err(Stop::Fuel) => format!("takes more than {FUEL} fuel {on}"),
        Err(Stop::Cells) => format!("makes a list of more than {MAX_CELLS} elements {on}"),
    })
}

fn correct_if(holds: bool) -> Verdict {
    if holds { Verdict::Correct } else { Verdict::Incorrect }
}

fn verdict_of(stop: Stop) -> Verdict {
    match stop {
        Stop::Overflow => Verdict::Incorrect,
        Stop::Fuel => Verdict::Timeout,
        Stop::Cells => Verdict::Resource,
    }
}

fn verdict_of_refusal(refusal: Refusal) -> Verdict {
    match refusal {
        Refusal::Malformed => Verdict::Malformed,
        Refusal::Depth => Verdict::Resource,
    }
}

fn parse_program(dialect: Dialect, text: &str) -> Result<Program, Expected> {
    Program::parse(dialect, text).map_err(|_| EXPECTED_PROGRAM)
}

fn parse_input(text: &str) -> Result<Vec<i32>, Expected> {
    match Value::parse(text) {
        Ok(Value::List(list)) => Ok(list),
        _ => Err(EXPECTED_INPUT),
    }
}

fn check(holds: bool, expected: Expected) -> Result<(), Expected> {
    if holds { Ok(()) } else { Err(expected) }
}
