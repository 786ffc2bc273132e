//! The language: types, operations, and the spellings of programs and values in tokens and in text.
//!
//! A program is a pipeline of steps in prefix notation that starts from a list: `filter > 3 map * 2 sum`. Every
//! operation has a fixed arity, so tokens need no parentheses; text has them for people: `filter (> 3) map (* 2) sum`.

use proto::{CounterRng, TokenId};

use super::value::{
    END, MAX_ANSWER_TOKENS, MAX_ELEMENTS, MAX_MAGNITUDE, MINUS, Type, View, is_space, parse_integer, write_integer,
};
use crate::quote;
use crate::symbols::vocabulary::{ADD, DIVIDE, MULTIPLY, PROGRAMS, PROGRAMS_DIGITS, SUBTRACT, base_name};

/// Prompt: a program and an input; asks for the output.
pub(super) const DEDUCE: TokenId = 130;
/// Prompt: a program and an output; asks for an input.
pub(super) const ABDUCE: TokenId = 131;
/// Prompt: pairs of input and output list; asks for a program.
pub(super) const INDUCE_LIST: TokenId = 132;
/// Prompt: pairs of input and output integer; asks for a program.
pub(super) const INDUCE_INTEGER: TokenId = 133;
const FIRST_OPERATION: TokenId = 134;

/// Most operations of a program in a problem.
pub(super) const MAX_PROBLEM_OPERATIONS: usize = 8;
/// Most bytes of any text, checked before parsing.
pub(super) const MAX_TEXT_BYTES: usize = 1_024;
/// Most lambdas and conditionals around an operation; bounds the recursion of the parser and of the interpreter.
pub(super) const MAX_DEPTH: usize = 8;

/// One of the two languages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Dialect {
    /// Integers from -99 to 99, lambdas and conditionals.
    Full,
    /// Digits modulo 10, straight-line: `+ 3` adds to every digit and `even` keeps the even ones, with `map` and `filter`
    /// implied.
    Digits,
}

/// What an operation computes. See `interpreter.rs` for the meaning of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Primitive {
    Reverse,
    Sort,
    Unique,
    Cumulate,
    Difference,
    Rotate,
    Duplicate,
    Take,
    Drop,
    Sum,
    Length,
    Maximum,
    Minimum,
    Head,
    Last,
    Range,
    Add,
    Subtract,
    Multiply,
    Divide,
    Modulo,
    Absolute,
    Negate,
    Square,
    Greater,
    Less,
    Even,
    Odd,
    Map,
    Filter,
    If,
    When,
}

/// Where an operation may stand and what follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// A step of its own.
    Step { from: Type, to: Type },
    /// A test of an integer; for a list, of its first element.
    Predicate,
    /// Followed by a step from integer to integer.
    Map,
    /// Followed by a predicate.
    Filter,
    /// Followed by a predicate and two steps of one type.
    If,
    /// Followed by a predicate and a step that keeps the type; if the predicate fails, the value is unchanged.
    When,
    /// An operation on integers, applied to every element of a list.
    Each,
    /// A predicate that keeps the elements of a list for which it holds.
    Keep,
}

/// A word of the language.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operation {
    pub(super) primitive: Primitive,
    pub(super) word: &'static str,
    pub(super) token: TokenId,
    pub(super) role: Role,
    /// First and last value of the constant that follows, if any.
    pub(super) constants: Option<(TokenId, TokenId)>,
}

const LIST_TO_LIST: Role = Role::Step { from: Type::List, to: Type::List };
const LIST_TO_INTEGER: Role = Role::Step { from: Type::List, to: Type::Integer };
const INTEGER_TO_INTEGER: Role = Role::Step { from: Type::Integer, to: Type::Integer };
const INTEGER_TO_LIST: Role = Role::Step { from: Type::Integer, to: Type::List };

const fn plain(primitive: Primitive, word: &'static str, token: TokenId, role: Role) -> Operation {
    Operation { primitive, word, token, role, constants: None }
}

const fn with(
    primitive: Primitive,
    word: &'static str,
    token: TokenId,
    role: Role,
    constants: (TokenId, TokenId),
) -> Operation {
    Operation { primitive, word, token, role, constants: Some(constants) }
}

static FULL: [Operation; 32] = [
    with(Primitive::Add, "+", ADD, INTEGER_TO_INTEGER, (1, 9)),
    with(Primitive::Subtract, "-", SUBTRACT, INTEGER_TO_INTEGER, (1, 9)),
    with(Primitive::Multiply, "*", MULTIPLY, INTEGER_TO_INTEGER, (2, 5)),
    with(Primitive::Divide, "/", DIVIDE, INTEGER_TO_INTEGER, (2, 5)),
    plain(Primitive::Reverse, "rev", FIRST_OPERATION, LIST_TO_LIST),
    plain(Primitive::Sort, "sort", FIRST_OPERATION + 1, LIST_TO_LIST),
    plain(Primitive::Unique, "uniq", FIRST_OPERATION + 2, LIST_TO_LIST),
    plain(Primitive::Cumulate, "cum", FIRST_OPERATION + 3, LIST_TO_LIST),
    plain(Primitive::Difference, "diff", FIRST_OPERATION + 4, LIST_TO_LIST),
    plain(Primitive::Rotate, "rot", FIRST_OPERATION + 5, LIST_TO_LIST),
    plain(Primitive::Duplicate, "dup", FIRST_OPERATION + 6, LIST_TO_LIST),
    with(Primitive::Take, "take", FIRST_OPERATION + 7, LIST_TO_LIST, (1, 4)),
    with(Primitive::Drop, "drop", FIRST_OPERATION + 8, LIST_TO_LIST, (1, 4)),
    plain(Primitive::Sum, "sum", FIRST_OPERATION + 9, LIST_TO_INTEGER),
    plain(Primitive::Length, "len", FIRST_OPERATION + 10, LIST_TO_INTEGER),
    plain(Primitive::Maximum, "max", FIRST_OPERATION + 11, LIST_TO_INTEGER),
    plain(Primitive::Minimum, "min", FIRST_OPERATION + 12, LIST_TO_INTEGER),
    plain(Primitive::Head, "head", FIRST_OPERATION + 13, LIST_TO_INTEGER),
    plain(Primitive::Last, "last", FIRST_OPERATION + 14, LIST_TO_INTEGER),
    plain(Primitive::Range, "range", FIRST_OPERATION + 15, INTEGER_TO_LIST),
    with(Primitive::Modulo, "%", FIRST_OPERATION + 16, INTEGER_TO_INTEGER, (2, 5)),
    plain(Primitive::Absolute, "abs", FIRST_OPERATION + 17, INTEGER_TO_INTEGER),
    plain(Primitive::Negate, "neg", FIRST_OPERATION + 18, INTEGER_TO_INTEGER),
    plain(Primitive::Square, "sq", FIRST_OPERATION + 19, INTEGER_TO_INTEGER),
    with(Primitive::Greater, ">", FIRST_OPERATION + 20, Role::Predicate, (0, 9)),
    with(Primitive::Less, "<", FIRST_OPERATION + 21, Role::Predicate, (0, 9)),
    plain(Primitive::Even, "even", FIRST_OPERATION + 22, Role::Predicate),
    plain(Primitive::Odd, "odd", FIRST_OPERATION + 23, Role::Predicate),
    plain(Primitive::Map, "map", FIRST_OPERATION + 24, Role::Map),
    plain(Primitive::Filter, "filter", FIRST_OPERATION + 25, Role::Filter),
    plain(Primitive::If, "if", FIRST_OPERATION + 26, Role::If),
    plain(Primitive::When, "when", FIRST_OPERATION + 27, Role::When),
];

static DIGITS: [Operation; 16] = [
    with(Primitive::Add, "+", ADD, Role::Each, (1, 9)),
    with(Primitive::Multiply, "*", MULTIPLY, Role::Each, (2, 9)),
    plain(Primitive::Reverse, "rev", FIRST_OPERATION, LIST_TO_LIST),
    plain(Primitive::Sort, "sort", FIRST_OPERATION + 1, LIST_TO_LIST),
    plain(Primitive::Unique, "uniq", FIRST_OPERATION + 2, LIST_TO_LIST),
    plain(Primitive::Cumulate, "cum", FIRST_OPERATION + 3, LIST_TO_LIST),
    plain(Primitive::Rotate, "rot", FIRST_OPERATION + 5, LIST_TO_LIST),
    with(Primitive::Take, "take", FIRST_OPERATION + 7, LIST_TO_LIST, (1, 4)),
    with(Primitive::Drop, "drop", FIRST_OPERATION + 8, LIST_TO_LIST, (1, 4)),
    plain(Primitive::Sum, "sum", FIRST_OPERATION + 9, LIST_TO_INTEGER),
    plain(Primitive::Maximum, "max", FIRST_OPERATION + 11, LIST_TO_INTEGER),
    plain(Primitive::Minimum, "min", FIRST_OPERATION + 12, LIST_TO_INTEGER),
    with(Primitive::Greater, ">", FIRST_OPERATION + 20, Role::Keep, (0, 8)),
    with(Primitive::Less, "<", FIRST_OPERATION + 21, Role::Keep, (1, 9)),
    plain(Primitive::Even, "even", FIRST_OPERATION + 22, Role::Keep),
    plain(Primitive::Odd, "odd", FIRST_OPERATION + 23, Role::Keep),
];

/// Lists the tokens of a dialect with their names.
pub(super) fn words(dialect: Dialect) -> Vec<(TokenId, &'static str)> {
    let domain = match dialect {
        Dialect::Full => (PROGRAMS, "<programs>"),
        Dialect::Digits => (PROGRAMS_DIGITS, "<programs-digits>"),
    };
    let words = [
        domain,
        (END, "."),
        (MINUS, "minus"),
        (DEDUCE, "<deduce>"),
        (ABDUCE, "<abduce>"),
        (INDUCE_LIST, "<induce-list>"),
        (INDUCE_INTEGER, "<induce-integer>"),
    ];
    // The signs in the shared vocabulary do not belong to the domain.
    let operations = dialect.operations().iter().filter(|operation| base_name(operation.token).is_none());
    words.into_iter().chain(operations.map(|operation| (operation.token, operation.word))).collect()
}

impl Dialect {
    /// Lists the words, tokens ascending.
    pub(super) fn operations(self) -> &'static [Operation] {
        match self {
            Dialect::Full => &FULL,
            Dialect::Digits => &DIGITS,
        }
    }

    /// Finds the word of a token.
    pub(super) fn operation(self, token: TokenId) -> Option<&'static Operation> {
        self.operations().iter().find(|operation| operation.token == token)
    }

    /// Finds the word of a primitive.
    ///
    /// # Panics
    /// When the dialect has no word for it.
    pub(super) fn operation_of(self, primitive: Primitive) -> &'static Operation {
        let found = self.operations().iter().find(|operation| operation.primitive == primitive);
        found.unwrap_or_else(|| panic!("operation: expected one of the dialect, got {primitive:?}"))
    }

    /// Returns the smallest and largest element of an input.
    pub(super) fn input_range(self) -> (i32, i32) {
        match self {
            Dialect::Full => (-9, 9),
            Dialect::Digits => (0, 9),
        }
    }

    /// Returns the smallest and largest integer.
    pub(super) fn integer_range(self) -> (i32, i32) {
        match self {
            Dialect::Full => (-MAX_MAGNITUDE, MAX_MAGNITUDE),
            Dialect::Digits => (0, 9),
        }
    }

    /// Returns the most operations that an answer of the policy may have, which is the top of the ladder.
    pub(super) fn max_operations(self) -> usize {
        match self {
            Dialect::Full => 4,
            Dialect::Digits => 3,
        }
    }

    /// Whether a list may be an input.
    pub(super) fn is_input(self, list: &[i32]) -> bool {
        let (low, high) = self.input_range();
        list.len() <= MAX_ELEMENTS && list.iter().all(|element| (low..=high).contains(element))
    }

    /// Draws an input of any length within the bounds: mostly digits; a fifth negative, if the language has negative inputs.
    pub(super) fn draw_input(self, rng: &mut CounterRng, min_len: usize, max_len: usize) -> Vec<i32> {
        let (low, high) = self.input_range();
        let len = min_len + rng.below((max_len - min_len + 1) as u64) as usize;
        (0..len)
            .map(|_| {
                if low < 0 && rng.below(5) == 0 {
                    -1 - rng.below(low.unsigned_abs().into()) as i32
                } else {
                    rng.below(high as u64 + 1) as i32
                }
            })
            .collect()
    }

    /// Whether a value may be an output in a problem.
    pub(super) fn is_output(self, value: View<'_>) -> bool {
        let (low, high) = self.integer_range();
        match value {
            View::Integer(integer) => (low..=high).contains(&integer),
            View::List(list) => list.len() <= MAX_ELEMENTS && list.iter().all(|element| (low..=high).contains(element)),
        }
    }
}

/// One operation of a parsed program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Code {
    pub(super) primitive: Primitive,
    pub(super) constant: i32,
    /// Number of codes of the operation, its lambda or its branches included.
    pub(super) span: usize,
}

/// A parsed program: well typed, within the maximum depth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Program {
    pub(super) dialect: Dialect,
    /// Prefix order, `map` and `filter` written out in either dialect.
    pub(super) codes: Vec<Code>,
    /// Number of operations, those of lambdas included.
    pub(super) num_operations: usize,
    pub(super) output: Type,
}

/// Why tokens are not a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Not in the language, or ill typed.
    Malformed,
    /// Nested too deeply.
    Depth,
}

impl Program {
    /// Reads a program from tokens, without [`END`].
    pub(super) fn read(dialect: Dialect, tokens: &[TokenId]) -> Result<Program, Refusal> {
        if tokens.is_empty() || tokens.len() > MAX_ANSWER_TOKENS {
            return Err(Refusal::Malformed);
        }
        let codes = Vec::with_capacity(tokens.len() + 2);
        let mut reader = Reader { dialect, tokens, codes, num_operations: 0, has_ended: false };
        let mut output = Type::List;
        while !reader.tokens.is_empty() {
            output = reader.step(output, 0)?;
        }
        Ok(Program { dialect, codes: reader.codes, num_operations: reader.num_operations, output })
    }

    /// Reads a program such as `filter (> 3) map (* 2)`, or without the parentheses and `else`.
    pub(super) fn parse(dialect: Dialect, text: &str) -> Result<Program, Refusal> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(Refusal::Malformed);
        }
        let words = lexemes(text);
        let bare: Vec<&str> = words.iter().copied().filter(|word| !PUNCTUATION.contains(word)).collect();
        let tokens: Option<Vec<TokenId>> = bare.iter().map(|word| token_of(dialect, word)).collect();
        let program = Program::read(dialect, &tokens.ok_or(Refusal::Malformed)?)?;
        // The punctuation is either complete and in place, or absent.
        if words.len() != bare.len() && words != lexemes(&program.text()) {
            return Err(Refusal::Malformed);
        }
        Ok(program)
    }

    /// Returns why a text is not a program, for people.
    pub(super) fn explain(dialect: Dialect, text: &str) -> String {
        let words: Vec<&str> = lexemes(text).into_iter().filter(|word| !PUNCTUATION.contains(word)).collect();
        if words.is_empty() {
            return "expected a program, got nothing".to_owned();
        }
        if words.len() > MAX_ANSWER_TOKENS {
            return format!("expected a program of up to {MAX_ANSWER_TOKENS} words, got {}", words.len());
        }
        let mut tokens = Vec::with_capacity(words.len());
        for word in &words {
            match token_of(dialect, word) {
                Some(token) => tokens.push(token),
                None => return format!("expected operations and their constants, got {}", quote(word)),
            }
        }
        let codes = Vec::new();
        let mut reader = Reader { dialect, tokens: &tokens, codes, num_operations: 0, has_ended: false };
        let (num_words, mut output) = (words.len(), Type::List);
        loop {
            if reader.tokens.is_empty() {
                let written = Program::read(dialect, &tokens).map(|program| program.text()).unwrap_or_default();
                return format!("expected the parentheses of {}, or none", quote(&written));
            }
            match reader.step(output, 0) {
                Ok(next) => output = next,
                Err(Refusal::Depth) => return format!("nested more than {MAX_DEPTH} deep"),
                Err(Refusal::Malformed) if reader.has_ended => {
                    return "the program ends within an operation".to_owned();
                }
                Err(Refusal::Malformed) => {
                    let place = num_words - reader.tokens.len();
                    return format!("word {place}, {}, does not fit what stands before it", quote(words[place - 1]));
                }
            }
        }
    }

    /// Appends the spelling in tokens, without [`END`].
    pub(super) fn spell(&self, tokens: &mut Vec<TokenId>) {
        for code in &self.codes {
            let understood = matches!(code.primitive, Primitive::Map | Primitive::Filter);
            if self.dialect == Dialect::Digits && understood {
                continue;
            }
            let operation = self.dialect.operation_of(code.primitive);
            tokens.push(operation.token);
            if operation.constants.is_some() {
                tokens.push(code.constant as TokenId);
            }
        }
    }
}

impl Program {
    /// Writes the program as text.
    pub(super) fn text(&self) -> String {
        let mut text = String::with_capacity(32);
        self.write(&mut text);
        text
    }

    /// Appends the spelling in text.
    pub(super) fn write(&self, text: &mut String) {
        let mut rest = &self.codes[..];
        while let Some(code) = rest.first() {
            if rest.len() < self.codes.len() {
                text.push(' ');
            }
            self.write_operation(&rest[..code.span], text);
            rest = &rest[code.span..];
        }
    }

    /// Writes the operation at the front of `codes` with its lambda or its branches.
    fn write_operation(&self, codes: &[Code], text: &mut String) {
        let (code, mut rest) = codes.split_first().expect("an operation has at least its own code");
        // In the digits dialect, `map` and `filter` are implied.
        if self.dialect == Dialect::Digits && !rest.is_empty() {
            return self.write_operation(rest, text);
        }
        let operation = self.dialect.operation_of(code.primitive);
        text.push_str(operation.word);
        if operation.constants.is_some() {
            text.push(' ');
            write_integer(code.constant, text);
        }
        let mut num_parts = 0;
        while let Some(part) = rest.first() {
            num_parts += 1;
            text.push_str(if num_parts == 3 { " else (" } else { " (" });
            self.write_operation(&rest[..part.span], text);
            text.push(')');
            rest = &rest[part.span..];
        }
    }
}

const PUNCTUATION: [&str; 3] = ["(", ")", "else"];

/// Splits at white space and around parentheses.
fn lexemes(text: &str) -> Vec<&str> {
    text.split(is_space)
        .flat_map(|word| word.split_inclusive(['(', ')']))
        .flat_map(|word| match word.strip_suffix(['(', ')']) {
            Some(before) => [before, &word[before.len()..]],
            None => [word, ""],
        })
        .filter(|word| !word.is_empty())
        .collect()
}

fn token_of(dialect: Dialect, word: &str) -> Option<TokenId> {
    match dialect.operations().iter().find(|operation| operation.word == word) {
        Some(operation) => Some(operation.token),
        None => parse_integer(word).filter(|constant| *constant >= 0).map(|constant| constant as TokenId),
    }
}

struct Reader<'a> {
    dialect: Dialect,
    tokens: &'a [TokenId],
    codes: Vec<Code>,
    num_operations: usize,
    /// Whether a token was requested after the last one.
    has_ended: bool,
}

impl Reader<'_> {
    /// Reads one step with a given input type; returns its output type.
    fn step(&mut self, from: Type, depth: usize) -> Result<Type, Refusal> {
        if depth > MAX_DEPTH {
            return Err(Refusal::Depth);
        }
        let position = self.codes.len();
        let operation = self.operation()?;
        let to = match operation.role {
            Role::Step { from: expected, to } => {
                self.expect(from == expected)?;
                self.code(operation)?;
                to
            }
            Role::Each | Role::Keep => {
                self.expect(from == Type::List)?;
                let around = if operation.role == Role::Each { Primitive::Map } else { Primitive::Filter };
                self.codes.push(Code { primitive: around, constant: 0, span: 2 });
                self.code(operation)?;
                Type::List
            }
            Role::Map => {
                self.expect(from == Type::List)?;
                self.code(operation)?;
                let body = self.step(Type::Integer, depth + 1)?;
                self.expect(body == Type::Integer)?;
                Type::List
            }
            Role::Filter => {
                self.expect(from == Type::List)?;
                self.code(operation)?;
                self.predicate()?;
                Type::List
            }
            Role::When => {
                self.code(operation)?;
                self.predicate()?;
                let branch = self.step(from, depth + 1)?;
                self.expect(branch == from)?;
                from
            }
            Role::If => {
                self.code(operation)?;
                self.predicate()?;
                let first = self.step(from, depth + 1)?;
                let second = self.step(from, depth + 1)?;
                self.expect(first == second)?;
                first
            }
            Role::Predicate => return Err(Refusal::Malformed),
        };
        self.codes[position].span = self.codes.len() - position;
        Ok(to)
    }

    fn predicate(&mut self) -> Result<(), Refusal> {
        let operation = self.operation()?;
        self.expect(operation.role == Role::Predicate)?;
        self.code(operation)
    }

    fn operation(&mut self) -> Result<&'static Operation, Refusal> {
        let token = self.token()?;
        self.num_operations += 1;
        self.dialect.operation(token).ok_or(Refusal::Malformed)
    }

    /// Appends the code of an operation, its constant included.
    fn code(&mut self, operation: &Operation) -> Result<(), Refusal> {
        let mut constant = 0;
        if let Some((first, last)) = operation.constants {
            let token = self.token()?;
            self.expect((first..=last).contains(&token))?;
            constant = token as i32;
        }
        self.codes.push(Code { primitive: operation.primitive, constant, span: 1 });
        Ok(())
    }

    fn token(&mut self) -> Result<TokenId, Refusal> {
        let Some((token, rest)) = self.tokens.split_first() else {
            self.has_ended = true;
            return Err(Refusal::Malformed);
        };
        self.tokens = rest;
        Ok(*token)
    }

    fn expect(&self, holds: bool) -> Result<(), Refusal> {
        if holds { Ok(()) } else { Err(Refusal::Malformed) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::behavior::for_each_program;
    use super::*;

    #[test]
    fn programs_read_back_from_tokens_and_text() {
        for (dialect, length) in [(Dialect::Full, 1), (Dialect::Full, 2), (Dialect::Full, 3), (Dialect::Digits, 2)] {
            for_each_program(dialect, length, &mut |program| {
                let mut tokens = Vec::new();
                program.spell(&mut tokens);
                assert_eq!(Program::read(dialect, &tokens).as_ref(), Ok(program));
                assert_eq!(program.num_operations, length);
                let text = program.text();
                assert_eq!(Program::parse(dialect, &text).as_ref(), Ok(program), "{text}");
                let bare = text.replace(['(', ')'], " ").replace("else", "");
                assert_eq!(Program::parse(dialect, &bare).as_ref(), Ok(program), "{bare}");
            });
        }
    }

    #[test]
    fn refuses_what_is_not_a_program() {
        let malformed = [
            "",
            "foo",
            "take",
            "take 0",
            "take 5",
            "take -1",
            "map",
            "map rev",
            "map (sum)",
            "filter 3",
            "filter sum",
            "even",
            "sum rev",
            "sum sum",
            "+ 1",
            "rev range",
            "if even rev",
            "if even rev else sum",
            "when even sum",
            "map (+ 1",
            "map + 1)",
            "map ((+ 1))",
            "(rev)",
            "if (even) (rev) (sort)",
            "else rev",
            "sort else",
            "3",
            "[1]",
        ];
        for text in malformed {
            assert_eq!(Program::parse(Dialect::Full, text), Err(Refusal::Malformed), "{text:?}");
        }
        for text in ["map + 1", "filter even", "+ 0", "sum max", "len", "if even rev sort"] {
            assert_eq!(Program::parse(Dialect::Digits, text), Err(Refusal::Malformed), "{text:?}");
        }
        let nested = |depth: usize| "when even ".repeat(depth) + "rev";
        assert!(Program::parse(Dialect::Full, &nested(8)).is_ok());
        assert_eq!(Program::parse(Dialect::Full, &nested(9)), Err(Refusal::Depth));
        assert_eq!(Program::parse(Dialect::Full, &nested(100)), Err(Refusal::Malformed), "too many tokens to look at");
    }

    #[test]
    fn says_what_is_no_program() {
        for (text, says) in [
            ("", "expected a program, got nothing"),
            ("()", "expected a program, got nothing"),
            ("sort flip", "expected operations and their constants, got \"flip\""),
            ("sort, rev", "expected operations and their constants, got \"sort,\""),
            ("take 100", "expected operations and their constants, got \"100\""),
            ("sort take", "the program ends within an operation"),
            ("map", "the program ends within an operation"),
            ("take 5", "word 2, \"5\", does not fit what stands before it"),
            ("sum rev", "word 2, \"rev\", does not fit what stands before it"),
            ("map (sum)", "word 2, \"sum\", does not fit what stands before it"),
            ("even", "word 1, \"even\", does not fit what stands before it"),
            ("if even rev else sum", "word 4, \"sum\", does not fit what stands before it"),
            ("map (+ 1", "expected the parentheses of \"map (+ 1)\", or none"),
            ("sort else", "expected the parentheses of \"sort\", or none"),
        ] {
            assert!(Program::parse(Dialect::Full, text).is_err(), "{text:?}");
            assert_eq!(Program::explain(Dialect::Full, text), says, "{text:?}");
        }
        assert_eq!(Program::explain(Dialect::Full, &("when even ".repeat(9) + "rev")), "nested more than 8 deep");
        let long = Program::explain(Dialect::Full, &"rev ".repeat(200));
        assert_eq!(long, "expected a program of up to 128 words, got 200");
    }
}
