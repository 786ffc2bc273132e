//! Problems that the policy writes, and changes of problems.
//!
//! A proposal is a program and its inputs, whatever the mode; running it produces the rest. The prompt names a kind: mode,
//! length, operations, and kind of output. Only mode and length are binding.

use std::fmt;

use proto::{CounterRng, Difficulty, Niche, TokenId, Verdict};

use super::Descriptor;
use super::generate::{Sketch, draw_program_from, draw_puzzle, is_short, num_inputs, pose, worthwhile_behavior};
use super::grammar::{ProgramGrammar, ValueGrammar};
use super::interpreter::Machine;
use super::language::{ABDUCE, DEDUCE, Dialect, INDUCE_LIST, Program};
use super::puzzle::{Mode, Puzzle};
use super::value::{END, MAX_ELEMENTS, Value};
use crate::symbols::vocabulary::{PROGRAMS, PROGRAMS_DIGITS, ROLE_PROPOSE, difficulty_token};
use crate::symbols::{Grammar, Next};
use crate::{Judged, quote};

/// Fewest elements in an input of a proposal, as on the ladder.
pub(super) const MIN_ELEMENTS: usize = 2;
/// Most draws of a change to find one that is a problem.
const NUM_MUTATION_DRAWS: usize = 64;

/// A niche of a dialect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    dialect: Dialect,
    descriptor: Descriptor,
}

impl Kind {
    /// Unpacks a niche; clamps a length that is out of range to the nearest legal one.
    pub(super) fn of(dialect: Dialect, niche: Niche) -> Kind {
        let mut descriptor = Descriptor::of(niche);
        descriptor.length = descriptor.length.clamp(1, dialect.max_operations() as u8);
        Kind { dialect, descriptor }
    }

    pub(super) fn prompt(self, difficulty: Difficulty) -> Vec<TokenId> {
        let domain = match self.dialect {
            Dialect::Full => PROGRAMS,
            Dialect::Digits => PROGRAMS_DIGITS,
        };
        let mode = match self.descriptor.mode {
            Mode::Deduction => DEDUCE,
            Mode::Abduction => ABDUCE,
            Mode::Induction => INDUCE_LIST,
        };
        let mut tokens = vec![ROLE_PROPOSE, domain, mode, TokenId::from(self.descriptor.length)];
        tokens.extend(self.operations().map(|operation| operation.token));
        tokens.extend([END, TokenId::from(self.descriptor.output_bucket.min(99)), difficulty_token(difficulty)]);
        tokens
    }

    pub(super) fn max_tokens(self) -> u32 {
        let tokens_per_integer = if self.dialect.input_range().0 < 0 { 2 } else { 1 };
        let input_tokens = tokens_per_integer * MAX_ELEMENTS + 1;
        (2 * usize::from(self.descriptor.length) + 1 + num_inputs(self.descriptor.mode) * input_tokens) as u32
    }

    pub(super) fn grammar(self) -> ProposalGrammar {
        ProposalGrammar {
            range: self.dialect.input_range(),
            inputs_left: num_inputs(self.descriptor.mode),
            part: Part::Program(ProgramGrammar::new(self.dialect, usize::from(self.descriptor.length), None)),
        }
    }

    /// Reads a proposal such as `sort take 2 : [5 1 4]`; several inputs have `;` between them.
    pub(super) fn read(self, proposal: &str) -> Result<Sketch, Judged> {
        let is_none = || {
            let expected = "expected a program and its inputs, such as \"sort take 2 : [5 1 4]\"";
            Judged::because(Verdict::Malformed, format!("{expected}, got {}", quote(proposal)))
        };
        let refuse = |reason: &str| Judged::because(Verdict::Incorrect, reason);
        let (program, inputs) = proposal.split_once(':').ok_or_else(is_none)?;
        let program = Program::parse(self.dialect, program).map_err(|_| is_none())?;
        let inputs: Vec<Value> =
            inputs.split(';').map(Value::parse).collect::<Result<_, _>>().map_err(|_| is_none())?;
        let (length, num_inputs) = (usize::from(self.descriptor.length), num_inputs(self.descriptor.mode));
        if (program.num_operations, inputs.len()) != (length, num_inputs) {
            let expected = format!("expected {length} operations and {num_inputs} inputs");
            let got = format!("got {} and {}", program.num_operations, inputs.len());
            return Err(refuse(&format!("{expected}, {got}")));
        }
        let inputs = inputs.into_iter().map(|input| match input {
            Value::List(input) if self.dialect.is_input(&input) && input.len() >= MIN_ELEMENTS => Ok(input),
            _ => Err(refuse("has an input that is no list of 2 elements or more in the range of the language")),
        });
        let inputs: Vec<Vec<i32>> = inputs.collect::<Result<_, _>>()?;
        let mut machine = Machine::new();
        let behavior = worthwhile_behavior(&program, &mut machine)
            .ok_or_else(|| refuse("has a program that ignores its input, or that a shorter one equals"))?;
        if behavior.is_held_out(self.dialect) {
            return Err(refuse("has a program that is held out for the exams"));
        }
        let sketch = pose(self.descriptor.mode, &program, inputs, &mut machine);
        let sketch = sketch.ok_or_else(|| refuse("has no outputs that teach anything"))?;
        if is_short(&sketch.puzzle) { Ok(sketch) } else { Err(refuse("is too long for a prompt")) }
    }

    /// Converts the tokens of a complete proposal to text.
    pub(super) fn text(self, proposal: &[TokenId]) -> Option<String> {
        let mut parts = proposal.split_inclusive(|token| *token == END);
        let program = parts.next()?.strip_suffix(&[END])?;
        let program = Program::read(self.dialect, program).ok()?;
        let inputs: Vec<String> = parts.map(|input| Some(Value::read(input)?.view().text())).collect::<Option<_>>()?;
        (inputs.len() == num_inputs(self.descriptor.mode))
            .then(|| format!("{} : {}", program.text(), inputs.join(" ; ")))
    }

    fn operations(self) -> impl Iterator<Item = &'static super::language::Operation> {
        let bits = self.descriptor.operations;
        self.dialect.operations().iter().filter(move |operation| bits & 1 << operation.primitive as u32 != 0)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Descriptor { mode, length, output_bucket, .. } = self.descriptor;
        let asked = match mode {
            Mode::Deduction => "the result is asked",
            Mode::Abduction => "an input is asked",
            Mode::Induction => "the program is asked",
        };
        let words: Vec<&str> = self.operations().map(|operation| operation.word).collect();
        write!(formatter, "{asked}, program of length {length}, {}, ", words.join(" "))?;
        // See `Puzzle::output_bucket`.
        match output_bucket {
            0 => write!(formatter, "result below 0"),
            1 => write!(formatter, "result 0"),
            2 => write!(formatter, "result 1 to 9"),
            3 => write!(formatter, "result 10 or more"),
            list => {
                let (most, is_large) = ((list - 4) / 2 * 2, list % 2 == 1);
                let lengths = if most == 0 { "no".to_owned() } else { format!("{} or {most}", most - 1) };
                write!(
                    formatter,
                    "result of {lengths} integers{}",
                    if is_large { ", not all of one digit" } else { "" }
                )
            }
        }
    }
}

/// A program, then its inputs one after the other.
#[derive(Clone, Debug)]
pub(super) struct ProposalGrammar {
    range: (i32, i32),
    /// Inputs that are not complete.
    inputs_left: usize,
    part: Part,
}

#[derive(Clone, Debug)]
enum Part {
    Program(ProgramGrammar),
    Input(ValueGrammar),
}

impl Grammar for ProposalGrammar {
    fn next(&self) -> Next {
        match &self.part {
            _ if self.inputs_left == 0 => Next::Done,
            Part::Program(program) => program.next(),
            Part::Input(input) => input.next(),
        }
    }

    fn push(&mut self, token: TokenId) -> bool {
        let (legal, ended) = match &mut self.part {
            _ if self.inputs_left == 0 => return false,
            Part::Program(program) => (program.push(token), program.next() == Next::Done),
            Part::Input(input) => {
                let legal = input.push(token);
                let ended = input.next() == Next::Done;
                self.inputs_left -= usize::from(ended);
                (legal, ended)
            }
        };
        if ended {
            self.part = Part::Input(ValueGrammar::list(self.range));
        }
        legal
    }

    fn fork(&self) -> Box<dyn Grammar> {
        Box::new(self.clone())
    }
}

/// Changes a problem into another one of the same mode, with other inputs or another ending of the program.
pub(super) fn mutate(
    parent: &Puzzle,
    program: &Program,
    rng: &mut CounterRng,
    is_allowed: impl Fn(&Puzzle) -> bool,
) -> Option<Sketch> {
    let mut machine = Machine::new();
    let mut spelled = Vec::new();
    program.spell(&mut spelled);
    (0..NUM_MUTATION_DRAWS).find_map(|_| {
        let changed = (rng.below(2) == 0).then(|| {
            let kept = rng.below(spelled.len() as u64) as usize;
            draw_program_from(rng, program.dialect, program.num_operations, &spelled[..kept])
        });
        let program = changed.as_ref().unwrap_or(program);
        worthwhile_behavior(program, &mut machine).filter(|behavior| !behavior.is_held_out(program.dialect))?;
        let sketch = draw_puzzle(rng, parent.mode(), program, &mut machine)?;
        (sketch.puzzle != *parent && is_short(&sketch.puzzle) && is_allowed(&sketch.puzzle)).then_some(sketch)
    })
}
