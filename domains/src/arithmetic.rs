//! Arithmetic: the value of an expression.
//!
//! A problem is an expression such as `47 + 38` or `(7 + 5) * 3`: 2 to 4 whole numbers of up to 9 digits, without a sign,
//! with `+ - * %` and parentheses. `%` is the remainder of a number from 0 by one from 1. The canonical text has a space on
//! both sides of every operator, and no parentheses that change nothing. Exchanging the sides of `+` or `*` does not make it
//! another problem, so an exam that has `47 + 38` holds out `38 + 47` too.
//!
//! An answer is the value in its one spelling: digits without a leading zero, after a `-` if it is below 0. `+5`, `05`,
//! `-0`, `1,234` and `= 5` are malformed.

use std::fmt::{self, Display};

use proto::{CounterRng, LadderLevel, Verdict};
use serde_json::{Map, Value};

use crate::exam::ExamSpec;
use crate::json::{Fields, Refusal};
use crate::quiz::{QuizProblem, is_whole_number, typed};
use crate::{Judged, quote};

/// Most numbers in an expression. With numbers below [`NUMBER_LIMIT`], every value fits into 128 bits.
const MAX_NUMBERS: usize = 4;
const NUMBER_LIMIT: u64 = 1_000_000_000;

/// An expression with a value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Expression {
    Number(u64),
    Operation(Box<Operation>),
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Operation {
    operator: Operator,
    left: Expression,
    right: Expression,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Operator {
    Add,
    Subtract,
    Multiply,
    Remainder,
}

use Operator::{Add, Multiply, Remainder, Subtract};

const NUM_LEVELS: u32 = 9;
/// Kinds of values from 0 to 199.
const NUM_KINDS_OF_TENS: u32 = 20;

impl QuizProblem for Expression {
    const NAME: &'static str = "arithmetic";
    const DESCRIPTION: &'static str = "compute the value of an expression, in words";
    const LEVELS: &'static [LadderLevel] = &[
        LadderLevel { level: 1, description: "sums of one-digit numbers" },
        LadderLevel { level: 2, description: "sums of numbers up to 99, one of them with two digits" },
        LadderLevel { level: 3, description: "differences of numbers up to 99, below 0 as well" },
        LadderLevel { level: 4, description: "products of one-digit numbers" },
        LadderLevel { level: 5, description: "products of a two-digit number and one from 2 to 9" },
        LadderLevel { level: 6, description: "sums and differences of three numbers up to 99" },
        LadderLevel { level: 7, description: "a product and a sum or difference of three numbers up to 20" },
        LadderLevel { level: 8, description: "remainders of a two-digit number by one from 2 to 20" },
        LadderLevel { level: NUM_LEVELS, description: "products of a three-digit and a two-digit number" },
    ];
    const EXAMS: &'static [ExamSpec] = &[
        ExamSpec { name: "arithmetic-sum", domain: Self::NAME, level: 2 },
        ExamSpec { name: "arithmetic-mixed", domain: Self::NAME, level: NUM_LEVELS },
    ];
    const EXAMPLES: [(&'static str, &'static str); 3] = [("7 + 5", "12"), ("3 - 8", "-5"), ("6 * 4", "24")];
    const FORM: &'static str = "an expression of 2 to 4 whole numbers of up to 9 digits with + - * and %, such as \
                                \"47 + 38\" or \"(7 + 5) * 3\" (% of a number from 0 by one from 1)";
    const FIELDS: &'static str = "domain and expression";

    fn parse(text: &str) -> Option<Expression> {
        let mut reader = Reader { rest: text };
        let expression = reader.sum().filter(|_| reader.peek().is_none())?;
        expression.checked()
    }

    fn from_fields(fields: &mut Fields<'_>) -> Result<Expression, Refusal> {
        fields.read("expression", Self::FORM, |value| typed(value.as_str()?))
    }

    fn fields(&self) -> Map<String, Value> {
        Map::from_iter([("expression".to_owned(), self.text().into())])
    }

    fn text(&self) -> String {
        self.to_string()
    }

    fn identity(&self) -> String {
        match self {
            Expression::Number(number) => number.to_string(),
            Expression::Operation(operation) => {
                let Operation { operator, left, right } = operation.as_ref();
                let mut sides = [left.identity(), right.identity()];
                if matches!(operator, Add | Multiply) {
                    sides.sort_unstable();
                }
                format!("({}{operator}{})", sides[0], sides[1])
            }
        }
    }

    fn level(&self) -> u32 {
        let (mut numbers, operators) = (self.numbers(), self.operators());
        if operators != [Remainder] {
            numbers.sort_unstable_by(|left, right| right.cmp(left));
        }
        match (&numbers[..], &operators[..]) {
            ([0..=9, _], [Add]) => 1,
            ([10..=99, _], [Add]) => 2,
            ([0..=99, _], [Subtract]) => 3,
            ([0..=9, _], [Multiply]) => 4,
            ([10..=99, 2..=9], [Multiply]) => 5,
            ([0..=99, ..], [Add | Subtract, Add | Subtract]) => 6,
            ([0..=20, ..], [Multiply, Add | Subtract] | [Add | Subtract, Multiply]) => 7,
            ([10..=99, 2..=20], [Remainder]) => 8,
            ([100..=999, 10..=99], [Multiply]) => NUM_LEVELS,
            _ => 0,
        }
    }

    /// By the value: one kind below 0, then one for every ten up to 199, then one for every number of digits.
    fn kind(&self) -> u32 {
        let value = self.value().expect("an expression was checked when it was read or drawn");
        match value {
            ..0 => 0,
            0..200 => 1 + value as u32 / 10,
            _ => NUM_KINDS_OF_TENS + 1 + value.ilog10(),
        }
    }

    fn describe_kind(kind: u32) -> String {
        match kind {
            0 => "with a value below 0".to_owned(),
            1..=NUM_KINDS_OF_TENS => format!("with a value from {} to {}", 10 * (kind - 1), 10 * (kind - 1) + 9),
            _ => format!("with a value of {} digits", kind - NUM_KINDS_OF_TENS),
        }
    }

    fn proposal_pattern(level: u32) -> String {
        let (tens, most_99, hundreds) = ("[1-9][0-9]", "(?:[0-9]|[1-9][0-9])", "[1-9][0-9]{2}");
        let most_20 = "(?:1?[0-9]|20)";
        match level {
            1 => r"[0-9] \+ [0-9]".to_owned(),
            2 => format!(r"(?:{tens} \+ {most_99}|[0-9] \+ {tens})"),
            3 => format!("{most_99} - {most_99}"),
            4 => r"[0-9] \* [0-9]".to_owned(),
            5 => format!(r"(?:{tens} \* [2-9]|[2-9] \* {tens})"),
            6 => format!("{most_99} [-+] {most_99} [-+] {most_99}"),
            7 => format!(
                r"(?:\({most_20} [-+] {most_20}\) \* {most_20}|{most_20} [-+] {most_20} \* {most_20}|{most_20} \* {most_20} [-+] {most_20})"
            ),
            8 => format!("{tens} % (?:[2-9]|1[0-9]|20)"),
            _ => format!(r"(?:{hundreds} \* {tens}|{tens} \* {hundreds})"),
        }
    }

    fn draw(level: u32, rng: &mut CounterRng) -> Option<Expression> {
        let mut from = |least: u64, most: u64| Expression::Number(least + rng.below(most - least + 1));
        let drawn = match level {
            1 => from(0, 9).with(Add, from(0, 9)),
            2 => from(0, 99).with(Add, from(0, 99)),
            3 => from(0, 99).with(Subtract, from(0, 99)),
            4 => from(0, 9).with(Multiply, from(0, 9)),
            5 => from(10, 99).with(Multiply, from(2, 9)),
            6 => {
                let (first, second, third) = (from(0, 99), from(0, 99), from(0, 99));
                let [left, right] = [(); 2].map(|()| sum_or_difference(rng));
                first.with(left, second).with(right, third)
            }
            7 => {
                let (first, second, factor) = (from(0, 20), from(0, 20), from(2, 9));
                let operator = sum_or_difference(rng);
                if rng.below(2) == 0 {
                    first.with(operator, second).with(Multiply, factor)
                } else {
                    first.with(operator, second.with(Multiply, factor))
                }
            }
            8 => from(10, 99).with(Remainder, from(2, 20)),
            _ => from(100, 999).with(Multiply, from(10, 99)),
        };
        Some(drawn)
    }

    fn changed(&self, rng: &mut CounterRng) -> Option<Expression> {
        let numbers = self.numbers();
        let index = rng.below(numbers.len() as u64) as usize;
        let number = rng.below(10u64.pow(num_digits(numbers[index])));
        self.with_number(index, number).checked()
    }

    fn exam_levels(exam: &ExamSpec) -> &'static [u32] {
        // The levels of one-digit numbers are so small that an exam would hold most of them.
        if exam.level == NUM_LEVELS { &[3, 5, 6, 7, 8, 9] } else { &[2] }
    }

    fn answer(&self) -> String {
        self.value().expect("an expression was checked when it was read or drawn").to_string()
    }

    fn judge(&self, answer: &str) -> Judged {
        let digits = answer.strip_prefix('-').filter(|digits| *digits != "0").unwrap_or(answer);
        if !is_whole_number(digits) {
            let expected = "expected an integer such as 12 or -3, in digits without a leading zero";
            Judged::because(Verdict::Malformed, format!("{expected}, got {}", quote(answer)))
        } else if answer == self.answer() {
            Judged::correct()
        } else {
            Judged::because(Verdict::Incorrect, format!("is not the value of {self}"))
        }
    }

    /// Lists expressions with one number changed, the last number first.
    fn solved_by(&self, answer: &str) -> Vec<Expression> {
        let Ok(value) = answer.parse::<i64>() else { return Vec::new() };
        let changed = |index| self.with_value(value.into(), index)?.checked();
        (0..self.numbers().len()).rev().filter_map(changed).collect()
    }

    fn question(&self) -> String {
        format!("Reply with the number only. What is {}?", self.text().replace('%', "mod"))
    }

    /// As many digits as the numbers of the expression have together: no value has more.
    fn answer_pattern(&self) -> String {
        let num_digits: u32 = self.numbers().into_iter().map(num_digits).sum();
        format!("(?:0|-?[1-9][0-9]{{0,{}}})", num_digits - 1)
    }
}

impl Expression {
    fn with(self, operator: Operator, right: Expression) -> Expression {
        Expression::Operation(Box::new(Operation { operator, left: self, right }))
    }

    /// Returns the expression if it is a problem.
    fn checked(self) -> Option<Expression> {
        let numbers = self.numbers();
        let is_legal = (2..=MAX_NUMBERS).contains(&numbers.len())
            && numbers.iter().all(|number| *number < NUMBER_LIMIT)
            && self.value().is_some();
        is_legal.then_some(self)
    }

    /// Computes the value; `None` for a remainder of a number below 0, or by one below 1.
    fn value(&self) -> Option<i128> {
        let operation = match self {
            Expression::Number(number) => return Some(i128::from(*number)),
            Expression::Operation(operation) => operation,
        };
        let (left, right) = (operation.left.value()?, operation.right.value()?);
        match operation.operator {
            Add => left.checked_add(right),
            Subtract => left.checked_sub(right),
            Multiply => left.checked_mul(right),
            Remainder => (left >= 0 && right >= 1).then(|| left % right),
        }
    }

    /// Lists the numbers in written order.
    fn numbers(&self) -> Vec<u64> {
        match self {
            Expression::Number(number) => vec![*number],
            Expression::Operation(operation) => [operation.left.numbers(), operation.right.numbers()].concat(),
        }
    }

    /// Lists the operators in written order.
    fn operators(&self) -> Vec<Operator> {
        match self {
            Expression::Number(_) => Vec::new(),
            Expression::Operation(operation) => {
                let Operation { operator, left, right } = operation.as_ref();
                [left.operators(), vec![*operator], right.operators()].concat()
            }
        }
    }

    /// Replaces one of the numbers.
    fn with_number(&self, index: usize, number: u64) -> Expression {
        match self {
            Expression::Number(_) => Expression::Number(number),
            Expression::Operation(operation) => {
                let Operation { operator, left, right } = operation.as_ref();
                match index.checked_sub(left.numbers().len()) {
                    None => left.with_number(index, number).with(*operator, right.clone()),
                    Some(index) => left.clone().with(*operator, right.with_number(index, number)),
                }
            }
        }
    }

    /// Replaces one of the numbers so that the expression has this value; `None` when no number does that.
    fn with_value(&self, value: i128, index: usize) -> Option<Expression> {
        let operation = match self {
            Expression::Number(_) => return u64::try_from(value).ok().map(Expression::Number),
            Expression::Operation(operation) => operation,
        };
        let Operation { operator, left, right } = operation.as_ref();
        let (left_value, right_value) = (left.value()?, right.value()?);
        let quotient = |by: i128| (by != 0 && value % by == 0).then(|| value / by);
        match index.checked_sub(left.numbers().len()) {
            None => {
                let needed = match operator {
                    Add => value - right_value,
                    Subtract => value + right_value,
                    Multiply => quotient(right_value)?,
                    Remainder if (0..right_value).contains(&value) => left_value - left_value % right_value + value,
                    Remainder => return None,
                };
                Some(left.with_value(needed, index)?.with(*operator, right.clone()))
            }
            Some(index) => {
                let needed = match operator {
                    Add => value - left_value,
                    Subtract => left_value - value,
                    Multiply => quotient(left_value)?,
                    Remainder => return None,
                };
                Some(left.clone().with(*operator, right.with_value(needed, index)?))
            }
        }
    }

    fn precedence(&self) -> u8 {
        match self {
            Expression::Number(_) => 2,
            Expression::Operation(operation) => u8::from(matches!(operation.operator, Multiply | Remainder)),
        }
    }
}

impl Display for Expression {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let operation = match self {
            Expression::Number(number) => return number.fmt(formatter),
            Expression::Operation(operation) => operation,
        };
        let side = |side: &Expression, binds: bool| if binds { side.to_string() } else { format!("({side})") };
        let Operation { operator, left, right } = operation.as_ref();
        let left = side(left, left.precedence() >= self.precedence());
        let right = side(right, right.precedence() > self.precedence());
        write!(formatter, "{left} {operator} {right}")
    }
}

impl Display for Operator {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Add => "+",
            Subtract => "-",
            Multiply => "*",
            Remainder => "%",
        })
    }
}

fn sum_or_difference(rng: &mut CounterRng) -> Operator {
    if rng.below(2) == 0 { Add } else { Subtract }
}

/// Counts the decimal digits of a number.
fn num_digits(number: u64) -> u32 {
    number.checked_ilog10().unwrap_or(0) + 1
}

/// Reads an expression by recursive descent. The text of a problem is short, which bounds the depth.
struct Reader<'a> {
    rest: &'a str,
}

impl Reader<'_> {
    fn peek(&mut self) -> Option<char> {
        self.rest = self.rest.trim_start_matches([' ', '\t', '\r', '\n']);
        self.rest.chars().next()
    }

    /// Takes the next character if it is one of these.
    fn take<T: Copy>(&mut self, known: &[(char, T)]) -> Option<T> {
        let next = self.peek()?;
        let (_, found) = known.iter().find(|(sign, _)| *sign == next)?;
        self.rest = &self.rest[next.len_utf8()..];
        Some(*found)
    }

    fn sum(&mut self) -> Option<Expression> {
        let mut left = self.product()?;
        while let Some(operator) = self.take(&[('+', Add), ('-', Subtract)]) {
            left = left.with(operator, self.product()?);
        }
        Some(left)
    }

    fn product(&mut self) -> Option<Expression> {
        let mut left = self.operand()?;
        while let Some(operator) = self.take(&[('*', Multiply), ('%', Remainder)]) {
            left = left.with(operator, self.operand()?);
        }
        Some(left)
    }

    fn operand(&mut self) -> Option<Expression> {
        if self.take(&[('(', ())]).is_some() {
            let inner = self.sum()?;
            self.take(&[(')', ())])?;
            return Some(inner);
        }
        let end = self.rest.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(self.rest.len());
        let (digits, rest) = self.rest.split_at(end);
        self.rest = rest;
        digits.parse().ok().filter(|_| is_whole_number(digits)).map(Expression::Number)
    }
}
