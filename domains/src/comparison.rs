//! Comparison: the larger or the smaller of two numbers, or of three.
//!
//! A problem is `larger 9.11 9.9`: 2 or 3 numbers of different value, each with up to 9 digits before the point and up to 6
//! behind it. The order of the numbers does not make it another problem. An answer is one of the numbers as it is written.

use proto::{CounterRng, LadderLevel, Verdict};
use serde_json::{Map, Value};

use crate::exam::ExamSpec;
use crate::json::{Fields, Refusal, list};
use crate::quiz::QuizProblem;
use crate::{Judged, quote};

const MAX_WHOLE_DIGITS: usize = 9;
const MAX_FRACTION_DIGITS: usize = 6;

/// Which of the numbers is asked for, and the numbers.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Comparison {
    which: Which,
    numbers: Vec<Decimal>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Which {
    Larger,
    Smaller,
}

/// A number as it is written.
#[derive(Clone, Debug, PartialEq)]
struct Decimal {
    text: String,
    num_whole_digits: usize,
    num_fraction_digits: usize,
    /// The value in units of the last digit that a number may have.
    value: i64,
}

const NUM_LEVELS: u32 = 6;

impl QuizProblem for Comparison {
    const NAME: &'static str = "comparison";
    const DESCRIPTION: &'static str = "find the larger or the smaller number, in words";
    const LEVELS: &'static [LadderLevel] = &[
        LadderLevel { level: 1, description: "2 numbers of one digit" },
        LadderLevel { level: 2, description: "2 numbers up to 99" },
        LadderLevel { level: 3, description: "2 numbers up to 999" },
        LadderLevel { level: 4, description: "2 numbers from -99 to 99, one of them negative" },
        LadderLevel { level: 5, description: "2 decimals with up to 2 digits behind the point" },
        LadderLevel { level: NUM_LEVELS, description: "3 numbers up to 999" },
    ];
    const EXAMS: &'static [ExamSpec] = &[ExamSpec { name: "comparison", domain: Self::NAME, level: NUM_LEVELS }];
    const EXAMPLES: [(&'static str, &'static str); 3] =
        [("larger 3 8", "8"), ("smaller -4 2", "-4"), ("larger 1.5 1.25", "1.5")];
    const FORM: &'static str = "larger or smaller and 2 or 3 numbers of different value, with up to 9 digits before \
                                the point and 6 behind it, such as \"larger 9.11 9.9\"";
    const FIELDS: &'static str = "domain, which and numbers";

    fn parse(text: &str) -> Option<Comparison> {
        let mut words = text.split_ascii_whitespace();
        let which = Which::read(words.next()?)?;
        Comparison::new(which, words.map(Decimal::read).collect::<Option<_>>()?)
    }

    fn from_fields(fields: &mut Fields<'_>) -> Result<Comparison, Refusal> {
        let which = fields.read("which", "\"larger\" or \"smaller\"", |value| Which::read(value.as_str()?))?;
        let expected = "a list of 2 or 3 numbers of different value, each as a string such as \"9.11\",";
        fields.read("numbers", expected, |value| {
            Comparison::new(which, list(value, |number| Decimal::read(number.as_str()?))?)
        })
    }

    fn fields(&self) -> Map<String, Value> {
        let numbers: Vec<&str> = self.texts().collect();
        Map::from_iter([("which".to_owned(), self.which.word().into()), ("numbers".to_owned(), numbers.into())])
    }

    fn text(&self) -> String {
        let words: Vec<&str> = std::iter::once(self.which.word()).chain(self.texts()).collect();
        words.join(" ")
    }

    fn identity(&self) -> String {
        let mut ordered = self.clone();
        ordered.numbers.sort_unstable_by_key(|number| number.value);
        ordered.text()
    }

    fn level(&self) -> u32 {
        let most = |count: fn(&Decimal) -> usize| self.numbers.iter().map(count).max().unwrap_or(0);
        let is_negative = self.numbers.iter().any(|number| number.value < 0);
        let digits = (most(|number| number.num_whole_digits), most(|number| number.num_fraction_digits));
        match (self.numbers.len(), is_negative, digits) {
            (2, false, (1, 0)) => 1,
            (2, false, (2, 0)) => 2,
            (2, false, (3, 0)) => 3,
            (2, true, (1..=2, 0)) => 4,
            (2, false, (1..=2, 1..=2)) => 5,
            (3, false, (1..=3, 0)) => NUM_LEVELS,
            _ => 0,
        }
    }

    /// By what is asked for, and its place.
    fn kind(&self) -> u32 {
        self.goal() as u32
    }

    fn describe_kind(kind: u32) -> String {
        let which = if kind.is_multiple_of(2) { Which::Larger } else { Which::Smaller };
        let place = ["first", "second"].get(kind as usize / 2).unwrap_or(&"third");
        format!("{}, which is the {place}", which.word())
    }

    fn proposal_pattern(level: u32) -> String {
        let (most_99, most_999) = ("(?:[0-9]|[1-9][0-9])", "(?:[0-9]|[1-9][0-9]{1,2})");
        let (tens, hundreds, negative, decimal) =
            ("[1-9][0-9]", "[1-9][0-9]{2}", "-[1-9][0-9]?", "(?:[0-9]|[1-9][0-9])\\.[0-9]{1,2}");
        let numbers = match level {
            1 => "[0-9] [0-9]".to_owned(),
            2 => format!("(?:{tens} {most_99}|[0-9] {tens})"),
            3 => format!("(?:{hundreds} {most_999}|{most_99} {hundreds})"),
            4 => format!("(?:{negative} (?:{negative}|{most_99})|{most_99} {negative})"),
            5 => format!("{decimal} {decimal}"),
            _ => format!("{most_999} {most_999} {most_999}"),
        };
        format!("(?:larger|smaller) {numbers}")
    }

    fn draw(level: u32, rng: &mut CounterRng) -> Option<Comparison> {
        let which = if rng.below(2) == 0 { Which::Larger } else { Which::Smaller };
        let num_numbers = if level == NUM_LEVELS { 3 } else { 2 };
        // Most decimals have the whole part in common, or the digits behind the point would not matter.
        let whole = rng.below(20);
        let number = |_| match level {
            1 => rng.below(10).to_string(),
            2 => rng.below(100).to_string(),
            4 => (rng.below(199) as i64 - 99).to_string(),
            5 => {
                let (whole, num_digits) = (whole + rng.below(4) / 3, 1 + rng.below(2) as usize);
                format!("{whole}.{:0num_digits$}", rng.below(10u64.pow(num_digits as u32)))
            }
            _ => rng.below(1_000).to_string(),
        };
        let numbers: Vec<String> = (0..num_numbers).map(number).collect();
        Comparison::new(which, numbers.iter().map(|number| Decimal::read(number)).collect::<Option<_>>()?)
    }

    fn changed(&self, rng: &mut CounterRng) -> Option<Comparison> {
        let index = rng.below(self.numbers.len() as u64) as usize;
        let mut numbers = self.numbers.clone();
        numbers[index] = Comparison::draw(self.level(), rng)?.numbers.swap_remove(index);
        Comparison::new(self.which, numbers)
    }

    fn exam_levels(_exam: &ExamSpec) -> &'static [u32] {
        // There are so few numbers of one digit that an exam would hold most of their pairs.
        &[2, 3, 4, 5, 6]
    }

    fn answer(&self) -> String {
        self.numbers[self.place(self.which)].text.clone()
    }

    fn judge(&self, answer: &str) -> Judged {
        if answer == self.answer() {
            return Judged::correct();
        }
        if Decimal::read(answer).is_none() {
            let reason = format!("expected a number such as 12, -3 or 9.11, got {}", quote(answer));
            return Judged::because(Verdict::Malformed, reason);
        }
        let is_given = self.texts().any(|number| number == answer);
        let reason = if is_given { "is not the number asked for" } else { "is none of the numbers as written" };
        Judged::because(Verdict::Incorrect, reason)
    }

    /// Asks for the other end of the order, if the answer is there.
    fn solved_by(&self, answer: &str) -> Vec<Comparison> {
        let other = Comparison { which: self.which.other(), numbers: self.numbers.clone() };
        if other.answer() == answer { vec![other] } else { Vec::new() }
    }

    /// Balances what is asked for and the place of the answer: hardly two problems have the same answer.
    fn goal(&self) -> u64 {
        2 * self.place(self.which) as u64 + self.which as u64
    }

    fn question(&self) -> String {
        let which = match (self.which, self.numbers.len()) {
            (Which::Larger, 2) => "larger",
            (Which::Smaller, 2) => "smaller",
            (Which::Larger, _) => "largest",
            (Which::Smaller, _) => "smallest",
        };
        let numbers: Vec<&str> = self.texts().collect();
        let (last, first) = numbers.split_last().expect("a comparison has two numbers or more");
        format!("Reply with the number only. Which number is {which}: {} or {last}?", first.join(", "))
    }

    /// As many digits before and behind the point as any of the numbers has.
    fn answer_pattern(&self) -> String {
        let most = |count: fn(&Decimal) -> usize| self.numbers.iter().map(count).max().unwrap_or(0);
        let num_more = most(|number| number.num_whole_digits) - 1;
        let fraction = match most(|number| number.num_fraction_digits) {
            0 => String::new(),
            most => format!("(?:\\.[0-9]{{1,{most}}})?"),
        };
        format!("-?(?:0|[1-9][0-9]{{0,{num_more}}}){fraction}")
    }
}

impl Comparison {
    fn new(which: Which, numbers: Vec<Decimal>) -> Option<Comparison> {
        let mut values: Vec<i64> = numbers.iter().map(|number| number.value).collect();
        values.sort_unstable();
        values.dedup();
        let is_negative_zero = |number: &Decimal| number.value == 0 && number.text.starts_with('-');
        let is_legal =
            (2..=3).contains(&numbers.len()) && values.len() == numbers.len() && !numbers.iter().any(is_negative_zero);
        is_legal.then_some(Comparison { which, numbers })
    }

    fn texts(&self) -> impl Iterator<Item = &str> {
        self.numbers.iter().map(|number| number.text.as_str())
    }

    /// Returns the place of the largest or smallest number.
    fn place(&self, which: Which) -> usize {
        let numbered = self.numbers.iter().enumerate();
        let found = match which {
            Which::Larger => numbered.max_by_key(|(_, number)| number.value),
            Which::Smaller => numbered.min_by_key(|(_, number)| number.value),
        };
        found.expect("a comparison has two numbers or more").0
    }
}

impl Which {
    /// Reads either form of the word.
    fn read(word: &str) -> Option<Which> {
        match word {
            "larger" | "largest" => Some(Which::Larger),
            "smaller" | "smallest" => Some(Which::Smaller),
            _ => None,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Which::Larger => "larger",
            Which::Smaller => "smaller",
        }
    }

    fn other(self) -> Which {
        match self {
            Which::Larger => Which::Smaller,
            Which::Smaller => Which::Larger,
        }
    }
}

impl Decimal {
    /// Reads a number: no leading zero, and a digit on both sides of a point.
    fn read(text: &str) -> Option<Decimal> {
        let magnitude = text.strip_prefix('-').unwrap_or(text);
        let (whole, fraction) = match magnitude.split_once('.') {
            Some((whole, fraction)) => (whole, Some(fraction)),
            None => (magnitude, None),
        };
        let are_digits = |digits: &str, most: usize| {
            (1..=most).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit())
        };
        let is_legal = are_digits(whole, MAX_WHOLE_DIGITS)
            && (whole == "0" || !whole.starts_with('0'))
            && fraction.is_none_or(|fraction| are_digits(fraction, MAX_FRACTION_DIGITS));
        if !is_legal {
            return None;
        }
        let fraction = fraction.unwrap_or_default();
        let value: i64 = format!("{whole}{fraction:0<MAX_FRACTION_DIGITS$}").parse().ok()?;
        Some(Decimal {
            text: text.to_owned(),
            num_whole_digits: whole.len(),
            num_fraction_digits: fraction.len(),
            value: if text.starts_with('-') { -value } else { value },
        })
    }
}
