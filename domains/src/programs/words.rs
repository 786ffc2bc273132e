//! Programs in words.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use proto::{KeyedProblem, Niche, Problem};

use super::generate::num_inputs;
use super::language::{Dialect, Operation, Primitive, Program, Role};
use super::propose::MIN_ELEMENTS;
use super::puzzle::Puzzle;
use super::value::{MAX_ELEMENTS, MAX_MAGNITUDE, Type, View};
use super::{Descriptor, Drawn, Programs};
use crate::proposing::{drawn_as, expect_level};
use crate::{Error, Ladder as _, Proposing, Wording, reply_with};

/// Problems with a solution: one of each mode, as a config shows the first ones.
const FULL_EXAMPLES: [(&str, &str); 3] = [
    ("rev take 1 : [2 3] -> ?", "[3]"),
    ("map (+ 1) : ? -> [3 5]", "[2 4]"),
    ("? max 1 : [1 2] -> [2 1] ; [3 4] -> [4 3]", "rev"),
];
const DIGITS_EXAMPLES: [(&str, &str); 3] = [
    ("sort : [3 2] -> ?", "[2 3]"),
    ("+ 1 : ? -> [3 5]", "[2 4]"),
    ("? max 1 : [1 2] -> [2 1] ; [3 4] -> [4 3]", "rev"),
];

impl Wording for Programs {
    /// Explains the words of the language that the program has, or all of them where a program is asked for.
    fn question(&self, problem: &Problem) -> Result<String, Error> {
        let puzzle = self.puzzle(problem)?;
        let explained = explained(self.dialect, puzzle.program());
        let program = puzzle.program().map(Program::text).unwrap_or_default();
        Ok(match &puzzle {
            Puzzle::Deduction { input, .. } => format!(
                "Reply with the result only. {STEPS} {explained} What does the program {program} make of {}?",
                View::List(input).text()
            ),
            Puzzle::Abduction { output, .. } => {
                let (low, high) = self.dialect.input_range();
                format!(
                    "Reply with a list only, of up to {MAX_ELEMENTS} integers from {low} to {high}. {STEPS} \
                     {explained} Of which list does the program {program} make {}?",
                    output.view().text()
                )
            }
            Puzzle::Induction { max_operations, pairs, .. } => {
                let pairs = pairs
                    .iter()
                    .map(|(input, output)| format!("{} of {}", output.view().text(), View::List(input).text()));
                let most = if *max_operations == 1 { "" } else { "up to " };
                let words = words(*max_operations);
                format!(
                    "Reply with a program only. {STEPS} {explained} Which program of {most}{words} makes {}?",
                    pairs.collect::<Vec<_>>().join(", and ")
                )
            }
        })
    }

    fn examples(&self) -> Vec<(Problem, String)> {
        let examples = match self.dialect {
            Dialect::Full => FULL_EXAMPLES,
            Dialect::Digits => DIGITS_EXAMPLES,
        };
        let example = |(problem, answer): (&str, &str)| {
            (Problem { domain: self.name().to_owned(), text: problem.to_owned() }, reply_with(answer))
        };
        examples.map(example).to_vec()
    }

    /// A value of the type that the program makes, a list that may be its input, or a well-typed program of the length and the type
    /// that are asked for.
    fn answer_pattern(&self, problem: &Problem) -> Result<Option<String>, Error> {
        let integer = match self.dialect {
            Dialect::Full => "(?:0|-?[1-9][0-9]?)",
            Dialect::Digits => "[0-9]",
        };
        Ok(Some(match &self.puzzle(problem)? {
            Puzzle::Deduction { output, .. } if output.view().type_of() == Type::Integer => integer.to_owned(),
            Puzzle::Deduction { .. } => list(integer, 0),
            Puzzle::Abduction { .. } => list(element(self.dialect), 0),
            Puzzle::Induction { max_operations, pairs, .. } => {
                Patterns::new(self.dialect).programs(Type::List, pairs[0].1.view().type_of(), *max_operations)
            }
        }))
    }

    fn proposing(&self) -> Option<&dyn Proposing> {
        Some(self)
    }
}

/// A proposal is a program and its inputs, `sort take 2 : [5 1 4]`, whatever is asked about them: running it makes the rest.
impl Proposing for Programs {
    fn request(&self, niche: Niche) -> Result<String, Error> {
        let (_, sample) = &self.proposals(niche)?[0];
        let Descriptor { mode, length, .. } = Descriptor::of(niche);
        let (low, high) = self.dialect.input_range();
        let words = words(length.into());
        let lists = match num_inputs(mode) {
            1 => "a list".to_owned(),
            number => format!("{number} lists"),
        };
        Ok(format!(
            "Reply with a program and its inputs only. {STEPS} {} No shorter program may do the same, and the result must be neither \
             empty nor the input. Write as in {sample}: a program of {words}, \
             and {lists} of {MIN_ELEMENTS} to {MAX_ELEMENTS} integers from {low} to {high}. Kind: {}.",
            explained(self.dialect, None),
            self.describe_niche(niche)
        ))
    }

    fn examples(&self, niche: Niche) -> Result<Vec<(Niche, String)>, Error> {
        Ok(self.proposals(niche)?.split_off(1))
    }

    fn pattern(&self, niche: Niche) -> Result<String, Error> {
        expect_level(self, niche)?;
        let Descriptor { mode, length, .. } = Descriptor::of(niche);
        let mut patterns = Patterns::new(self.dialect);
        let of_types = [Type::Integer, Type::List].map(|to| patterns.program(Type::List, to, length.into()));
        let program = any_of(of_types.into_iter().flatten().collect()).expect("there are programs of any length");
        let input = list(element(self.dialect), MIN_ELEMENTS);
        Ok(format!("{program} : {input}(?: ; {input}){{{}}}", num_inputs(mode) - 1))
    }
}

impl Programs {
    fn proposals(&self, niche: Niche) -> Result<Vec<(Niche, String)>, Error> {
        drawn_as(self, niche, |level, seed, index| {
            let Drawn { problem, key, answer } = self.draw_ladder(level, seed, index);
            let text = |input: &[i32]| View::List(input).text();
            let proposal = match self.puzzle(&problem).expect("a problem of the ladder") {
                Puzzle::Deduction { program, input, .. } => format!("{} : {}", program.text(), text(&input)),
                Puzzle::Abduction { program, .. } => format!("{} : {answer}", program.text()),
                Puzzle::Induction { pairs, .. } => {
                    let inputs: Vec<String> = pairs.iter().map(|(input, _)| text(input)).collect();
                    format!("{answer} : {}", inputs.join(" ; "))
                }
            };
            (KeyedProblem { problem, key }, proposal)
        })
    }
}

fn words(number: usize) -> String {
    if number == 1 { "one word".to_owned() } else { format!("{number} words") }
}

/// How programs are introduced.
const STEPS: &str = "A program changes a list step by step, from left to right.";

/// Returns the pattern of an integer of an input.
fn element(dialect: Dialect) -> &'static str {
    match dialect {
        Dialect::Full => "(?:0|-?[1-9])",
        Dialect::Digits => "[0-9]",
    }
}

/// Returns the pattern of a list of so many elements or more.
fn list(element: &str, min_elements: usize) -> String {
    match min_elements {
        0 => format!("\\[(?:{element}(?: {element}){{0,{}}})?\\]", MAX_ELEMENTS - 1),
        _ => format!("\\[{element}(?: {element}){{{},{}}}\\]", min_elements - 1, MAX_ELEMENTS - 1),
    }
}

/// Explains the words of a program, or all words of a language.
fn explained(dialect: Dialect, program: Option<&Program>) -> String {
    let is_used = |operation: &&Operation| {
        program.is_none_or(|program| program.codes.iter().any(|code| code.primitive == operation.primitive))
    };
    let used: Vec<&Operation> = dialect.operations().iter().filter(is_used).collect();
    let has_parts = used.iter().any(|operation| matches!(operation.role, Role::Map | Role::If | Role::When));
    let mut text = "Words: ".to_owned();
    for operation in used {
        write!(text, "{}: {}. ", spelled(operation), meaning(operation)).expect("a string takes text");
    }
    if has_parts {
        text += "A and B are one step each. ";
    }
    match dialect {
        Dialect::Full => write!(text, "An integer over {MAX_MAGNITUDE} or under -{MAX_MAGNITUDE} is an error."),
        Dialect::Digits => write!(text, "All results are taken modulo 10."),
    }
    .expect("a string takes text");
    text
}

/// Returns a word with what stands behind it.
fn spelled(operation: &Operation) -> String {
    let parts = match operation.role {
        Role::Map => " (A)",
        Role::Filter => " (T)",
        Role::If => " (T) (A) else (B)",
        Role::When => " (T) (A)",
        Role::Step { .. } | Role::Predicate | Role::Each | Role::Keep => "",
    };
    let constant = if operation.constants.is_some() { " N" } else { "" };
    format!("{}{constant}{parts}", operation.word)
}

/// Returns what an operation does, as `interpreter.rs` computes it.
fn meaning(operation: &Operation) -> &'static str {
    match (operation.primitive, operation.role) {
        (Primitive::Add, Role::Each) => "adds N to every element",
        (Primitive::Multiply, Role::Each) => "multiplies every element by N",
        (Primitive::Greater, Role::Keep) => "keeps the elements over N",
        (Primitive::Less, Role::Keep) => "keeps the elements under N",
        (Primitive::Even, Role::Keep) => "keeps the even elements",
        (Primitive::Odd, Role::Keep) => "keeps the odd elements",
        (Primitive::Reverse, _) => "reverses the list",
        (Primitive::Sort, _) => "sorts the list, smallest first",
        (Primitive::Unique, _) => "drops elements that were there before",
        (Primitive::Cumulate, _) => "makes every element the sum up to it",
        (Primitive::Difference, _) => "makes the differences of neighbors, each element less the one before it",
        (Primitive::Rotate, _) => "moves the first element to the end",
        (Primitive::Duplicate, _) => "repeats the list behind itself",
        (Primitive::Take, _) => "keeps the first N elements",
        (Primitive::Drop, _) => "drops the first N elements",
        (Primitive::Sum, _) => "the sum of the list",
        (Primitive::Length, _) => "the number of elements",
        (Primitive::Maximum, _) => "the largest element, 0 if there is none",
        (Primitive::Minimum, _) => "the smallest element, 0 if there is none",
        (Primitive::Head, _) => "the first element, 0 if there is none",
        (Primitive::Last, _) => "the last element, 0 if there is none",
        (Primitive::Range, _) => "the list from 1 to the integer, empty if it is below 1",
        (Primitive::Add, _) => "adds N to the integer",
        (Primitive::Subtract, _) => "subtracts N from the integer",
        (Primitive::Multiply, _) => "multiplies the integer by N",
        (Primitive::Divide, _) => "divides the integer by N, rounded down",
        (Primitive::Modulo, _) => "the remainder of the integer by N, from 0",
        (Primitive::Absolute, _) => "the integer without its sign",
        (Primitive::Negate, _) => "the integer with the other sign",
        (Primitive::Square, _) => "the integer times itself",
        (Primitive::Greater, _) => "tests for over N",
        (Primitive::Less, _) => "tests for under N",
        (Primitive::Even, _) => "tests for even",
        (Primitive::Odd, _) => "tests for odd",
        (Primitive::Map, _) => "does A to every element",
        (Primitive::Filter, _) => "keeps the elements that pass test T",
        (Primitive::If, _) => "does A if the integer, or the first element (0 if there is none), passes test T, else B",
        (Primitive::When, _) => "does A if the integer, or the first element (0 if there is none), passes test T",
    }
}

/// Regular expressions of programs in their canonical text, by type and number of operations.
struct Patterns {
    dialect: Dialect,
    /// Of one step with exactly so many operations; `None` if there is none.
    steps: BTreeMap<(bool, bool, usize), Option<String>>,
}

impl Patterns {
    fn new(dialect: Dialect) -> Patterns {
        Patterns { dialect, steps: BTreeMap::new() }
    }

    /// Returns the pattern of the programs from type to type with 1 to `most` operations.
    fn programs(&mut self, from: Type, to: Type, most: usize) -> String {
        let lengths = (1..=most).filter_map(|length| self.program(from, to, length));
        any_of(lengths.collect()).expect("a program of one operation leads to any type")
    }

    /// Returns the pattern of the programs with exactly so many operations.
    fn program(&mut self, from: Type, to: Type, length: usize) -> Option<String> {
        let mut parts: Vec<String> = self.step(from, to, length).into_iter().collect();
        for between in [Type::Integer, Type::List] {
            for first in 1..length {
                let ending = self.program(between, to, length - first);
                parts.extend(
                    self.step(from, between, first).zip(ending).map(|(step, ending)| format!("{step} {ending}")),
                );
            }
        }
        any_of(parts)
    }

    fn step(&mut self, from: Type, to: Type, length: usize) -> Option<String> {
        let key = (from == Type::List, to == Type::List, length);
        if let Some(known) = self.steps.get(&key) {
            return known.clone();
        }
        let mut parts = Vec::new();
        for operation in self.dialect.operations() {
            let word = word(operation);
            match operation.role {
                Role::Step { from: own_from, to: own_to } if (own_from, own_to, 1) == (from, to, length) => {
                    parts.push(word)
                }
                Role::Each | Role::Keep if (from, to, length) == (Type::List, Type::List, 1) => parts.push(word),
                Role::Map if (from, to) == (Type::List, Type::List) && length > 1 => {
                    let body = self.step(Type::Integer, Type::Integer, length - 1);
                    parts.extend(body.map(|body| format!("{word} \\({body}\\)")));
                }
                Role::Filter if (from, to, length) == (Type::List, Type::List, 2) => {
                    parts.push(format!("{word} \\({}\\)", self.test()));
                }
                Role::When if from == to && length > 2 => {
                    let body = self.step(from, to, length - 2);
                    parts.extend(body.map(|body| format!("{word} \\({}\\) \\({body}\\)", self.test())));
                }
                Role::If => {
                    for first in 1..length.saturating_sub(2) {
                        let branches = self.step(from, to, first).zip(self.step(from, to, length - 2 - first));
                        parts.extend(branches.map(|(first, second)| {
                            format!("{word} \\({}\\) \\({first}\\) else \\({second}\\)", self.test())
                        }));
                    }
                }
                _ => {}
            }
        }
        let pattern = any_of(parts);
        self.steps.insert(key, pattern.clone());
        pattern
    }

    fn test(&self) -> String {
        let tests = self.dialect.operations().iter().filter(|operation| operation.role == Role::Predicate);
        any_of(tests.map(word).collect()).expect("a language with conditions has tests")
    }
}

/// Returns the pattern of a word, with its constant.
fn word(operation: &Operation) -> String {
    let word = regex::escape(operation.word);
    operation.constants.map_or(word.clone(), |(first, last)| format!("{word} [{first}-{last}]"))
}

fn any_of(mut patterns: Vec<String>) -> Option<String> {
    match patterns.len() {
        0 => None,
        1 => patterns.pop(),
        _ => Some(format!("(?:{})", patterns.join("|"))),
    }
}

#[cfg(test)]
mod tests {
    use proptest::strategy::{Strategy as _, ValueTree as _};
    use proptest::string::string_regex;
    use proptest::test_runner::TestRunner;
    use proto::Verdict;
    use regex::Regex;

    use super::super::behavior::for_each_program;
    use super::*;
    use crate::Checker as _;

    const BOTH: [Programs; 2] = [Programs { dialect: Dialect::Full }, Programs { dialect: Dialect::Digits }];

    fn problem(programs: Programs, text: &str) -> Problem {
        Problem { domain: programs.name().to_owned(), text: text.to_owned() }
    }

    #[test]
    fn questions_explain_what_they_name() {
        let [full, digits] = BOTH;
        let ask = |programs: Programs, text: &str| programs.question(&problem(programs, text)).unwrap();
        assert_eq!(
            ask(full, "filter (> 3) sum : [5 1 4] -> ?"),
            "Reply with the result only. A program changes a list step by step, from left to right. Words: sum: the sum of the list. > \
             N: tests for over N. filter (T): keeps the elements that pass test T. An integer over 99 or under -99 is an error. \
             What does the program filter (> 3) sum make of [5 1 4]?"
        );
        assert_eq!(
            ask(digits, "> 3 : ? -> [5 4]"),
            "Reply with a list only, of up to 6 integers from 0 to 9. A program changes a list step by step, from left to right. \
             Words: > N: keeps the elements over N. All results are taken modulo 10. Of which list does the program > 3 make [5 4]?"
        );
        let asked = ask(full, "? max 2 : [5 1] -> [1 5] ; [7 2] -> [2 7]");
        for operation in Dialect::Full.operations() {
            assert!(asked.contains(&format!("{}: {}. ", spelled(operation), meaning(operation))), "{operation:?}");
        }
        assert!(asked.ends_with("Which program of up to 2 words makes [1 5] of [5 1], and [2 7] of [7 2]?"), "{asked}");
        assert!(ask(full, "? max 1 : [5 1] -> 6").ends_with("Which program of one word makes 6 of [5 1]?"));
    }

    /// Every program matches the pattern of its type from its length on, and what matches is a program of that type and length.
    #[test]
    fn patterns_hold_the_programs_of_a_type_and_a_length() {
        let mut runner = TestRunner::deterministic();
        for (dialect, most) in [(Dialect::Full, 3), (Dialect::Digits, 3)] {
            let types = [Type::Integer, Type::List];
            let pattern = |to: Type, most: usize| Patterns::new(dialect).programs(Type::List, to, most);
            let patterns: Vec<[Regex; 2]> = (1..=most)
                .map(|most| types.map(|to| Regex::new(&format!("^(?:{})$", pattern(to, most))).unwrap()))
                .collect();
            for length in 1..=most {
                for_each_program(dialect, length, &mut |program| {
                    let text = program.text();
                    for (most, of_types) in (1..).zip(&patterns) {
                        for (to, pattern) in types.iter().zip(of_types) {
                            let is_of = program.output == *to && length <= most;
                            assert_eq!(pattern.is_match(&text), is_of, "{text} as {to:?} of {most}");
                        }
                    }
                });
            }
            for to in types {
                let texts = string_regex(&pattern(to, dialect.max_operations())).unwrap();
                for _ in 0..500 {
                    let text = texts.new_tree(&mut runner).unwrap().current();
                    let program = Program::parse(dialect, &text).unwrap();
                    assert!(program.output == to && program.num_operations <= dialect.max_operations(), "{text}");
                    assert_eq!(program.text(), text);
                }
            }
        }
    }

    /// Answers that match are never malformed, and of some that are wrong hindsight makes problems.
    #[test]
    fn answers_that_match_are_well_formed() {
        let mut runner = TestRunner::deterministic();
        for programs in BOTH {
            let mut num_found = 0;
            for level in programs.ladder_levels() {
                for index in 0..5 {
                    let drawn = programs.draw_ladder(level.level, 3, index);
                    let pattern = programs.answer_pattern(&drawn.problem).unwrap().unwrap();
                    let whole = Regex::new(&format!("^(?:{pattern})$")).unwrap();
                    assert!(
                        whole.is_match(&drawn.answer),
                        "{:?}: {pattern} does not match {}",
                        drawn.problem,
                        drawn.answer
                    );
                    let answers = string_regex(&pattern).unwrap();
                    for _ in 0..20 {
                        let answer = answers.new_tree(&mut runner).unwrap().current();
                        let judged = programs.judge(&drawn.problem, drawn.key.as_ref(), &answer).unwrap();
                        assert!(judged.verdict != Verdict::Malformed, "{:?} {answer}: {judged:?}", drawn.problem);
                        let solved = programs.hindsight(&drawn.problem, &answer).unwrap();
                        num_found += usize::from(solved.is_some_and(|solved| solved != drawn.problem));
                    }
                }
            }
            assert!(num_found > 50, "{num_found}");
        }
    }
}
