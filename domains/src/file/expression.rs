//! Algebraic expressions, compared as rational functions with integer coefficients: their polynomials have one form, so equality is
//! decided, not sampled. Constants such as e and π are variables.

use num_bigint::BigInt;
use num_traits::ToPrimitive as _;

use super::polynomial::{Fuel, Polynomial, TooLarge};
use super::reply::bare;

/// Most bytes of an expression.
const MAX_BYTES: usize = 1_024;
/// Deepest nesting.
const MAX_DEPTH: usize = 32;
/// Largest exponent.
const MAX_EXPONENT: u32 = 4_096;

/// A quotient of polynomials. The divisor is not 0.
#[derive(Clone, Debug)]
pub(super) struct Quotient {
    dividend: Polynomial,
    divisor: Polynomial,
}

impl Quotient {
    /// Whether two are the same rational function.
    ///
    /// # Errors
    /// When deciding it takes too long.
    pub(super) fn equals(&self, other: &Quotient) -> Result<bool, String> {
        let mut fuel = Fuel::default();
        let mut product = |left: &Polynomial, right: &Polynomial| left.multiply(right, &mut fuel);
        let products = product(&self.dividend, &other.divisor)
            .and_then(|left| Ok((left, product(&other.dividend, &self.divisor)?)))
            .map_err(|_| TOO_LARGE.to_owned())?;
        Ok(products.0 == products.1)
    }

    fn of(dividend: Polynomial) -> Quotient {
        Quotient { dividend, divisor: Polynomial::one() }
    }

    /// Returns the value if it is an integer.
    fn integer(&self) -> Option<i64> {
        let (dividend, divisor) = (self.dividend.value()?, self.divisor.value()?);
        (&dividend % &divisor == BigInt::ZERO).then(|| (dividend / divisor).to_i64()).flatten()
    }
}

const TOO_LARGE: &str = "is too large to be computed";

/// Reads an expression of numbers and variables of one letter with + - * / ^, parentheses and `\frac`.
///
/// # Errors
/// What was expected and what was found.
pub(super) fn read(text: &str) -> Result<Quotient, String> {
    if text.len() > MAX_BYTES {
        return Err(format!("expected an expression of up to {MAX_BYTES} bytes, got {}", text.len()));
    }
    let lexemes = lexemes(bare(text))?;
    let mut reader = Reader { lexemes: &lexemes, at: 0, depth: 0, fuel: Fuel::default() };
    let quotient = reader.sum()?;
    if reader.at < lexemes.len() { Err(reader.refusal("an operator")) } else { Ok(quotient) }
}

/// Whether a text is letters and spaces alone, more than one: as a right answer it is a word rather than a product, except pi.
pub(super) fn is_word(text: &str) -> bool {
    let text = bare(text);
    text.len() > 1 && text != "pi" && text.bytes().all(|byte| byte.is_ascii_alphabetic() || byte == b' ')
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Lexeme<'a> {
    /// Digits, perhaps with decimals.
    Number(&'a str),
    Variable(&'a str),
    Sign(char),
    Fraction,
    /// An exponent in raised digits: the 2 of x².
    Raised(i64),
}

/// Splits an expression. What only places signs, such as `\left` and `\,`, is left out.
fn lexemes(text: &str) -> Result<Vec<Lexeme<'_>>, String> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(sign) = rest.chars().next() {
        let mut length = sign.len_utf8();
        match sign {
            ' ' | '\t' | '\n' | '\r' | '~' => {}
            '0'..='9' | '.' => {
                length = rest.find(|sign: char| !sign.is_ascii_digit() && sign != '.').unwrap_or(rest.len());
                found.push(Lexeme::Number(&rest[..length]));
            }
            'a'..='z' | 'A'..='Z' => {
                if let Some(name) = FUNCTIONS.into_iter().find(|name| rest.starts_with(name)) {
                    return Err(format!("expected an expression without functions, got {name}"));
                }
                let letters = rest.find(|sign: char| !sign.is_ascii_alphabetic()).unwrap_or(rest.len());
                let is_first = !text[..text.len() - rest.len()].ends_with(|sign: char| sign.is_ascii_alphabetic());
                if is_first && &rest[..letters] == "pi" {
                    length = letters;
                    found.push(Lexeme::Variable("pi"));
                } else if is_first && rest[..letters].contains("pi") {
                    let got = crate::quote(&rest[..letters]);
                    return Err(format!("expected pi apart from other letters, or p*i for a product, got {got}"));
                } else {
                    found.push(Lexeme::Variable(&rest[..1]));
                }
            }
            'π' => found.push(Lexeme::Variable("pi")),
            '*' if rest.starts_with("**") => {
                length = 2;
                found.push(Lexeme::Sign('^'));
            }
            '⁻' | '⁰' | '¹' | '²' | '³' | '⁴'..='⁹' => {
                let (exponent, end) = raised(rest)?;
                found.push(Lexeme::Raised(exponent));
                length = end;
            }
            '+' | '-' | '*' | '/' | '^' | '(' | ')' | '{' | '}' => found.push(Lexeme::Sign(sign)),
            '\u{2212}' => found.push(Lexeme::Sign('-')),
            '\u{d7}' | '\u{b7}' | '\u{22c5}' => found.push(Lexeme::Sign('*')),
            '\u{f7}' => found.push(Lexeme::Sign('/')),
            '\\' => {
                let (lexeme, end) = command(rest)?;
                found.extend(lexeme);
                length = end;
            }
            _ => return Err(format!("expected an expression, got {} in it", crate::quote(&rest[..length]))),
        }
        rest = &rest[length..];
    }
    Ok(found)
}

/// Reads an exponent in raised digits, with a raised minus or without. Returns its length too.
fn raised(text: &str) -> Result<(i64, usize), String> {
    const DIGITS: [char; 10] = ['⁰', '¹', '²', '³', '⁴', '⁵', '⁶', '⁷', '⁸', '⁹'];
    let end = text.find(|sign: char| sign != '⁻' && !DIGITS.contains(&sign)).unwrap_or(text.len());
    let digit = |sign: char| match DIGITS.iter().position(|digit| *digit == sign) {
        Some(digit) => char::from(b'0' + digit as u8),
        None => '-',
    };
    let exponent = text[..end].chars().map(digit).collect::<String>().parse();
    exponent
        .map(|exponent| (exponent, end))
        .map_err(|_| format!("expected an integer as the exponent, got {}", crate::quote(&text[..end])))
}

const FUNCTIONS: [&str; 13] =
    ["sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "max", "min", "mod"];

/// Reads a command of LaTeX. Returns its lexeme, if it has a meaning here, and its length.
fn command(text: &str) -> Result<(Option<Lexeme<'_>>, usize), String> {
    let end = text[1..].find(|sign: char| !sign.is_ascii_alphabetic()).map_or(text.len(), |end| end + 1);
    let name = &text[1..end];
    let lexeme = match name {
        "frac" | "dfrac" | "tfrac" => Some(Lexeme::Fraction),
        "cdot" | "times" => Some(Lexeme::Sign('*')),
        "div" => Some(Lexeme::Sign('/')),
        "left" | "right" => None,
        "" if text[1..].starts_with([',', ';', '!', ':', ' ']) => return Ok((None, 2)),
        // \mathrm{e}
        "text" | "mathrm" => {
            let letter = text[end..].strip_prefix('{').and_then(|rest| rest.get(..1)).unwrap_or_default();
            let is_letter = letter.bytes().all(|byte| byte.is_ascii_alphabetic()) && !letter.is_empty();
            if !is_letter || text.as_bytes().get(end + 2) != Some(&b'}') {
                return Err(format!("expected one letter in \\{name}{{}}, got {}", crate::quote(text)));
            }
            return Ok((Some(Lexeme::Variable(letter)), end + 3));
        }
        name if GREEK.contains(&name) => Some(Lexeme::Variable(name)),
        _ => return Err(format!("expected an expression, got {} in it", crate::quote(&text[..end]))),
    };
    Ok((lexeme, end))
}

const GREEK: [&str; 20] = [
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "kappa", "lambda", "mu", "nu", "pi", "rho",
    "sigma", "tau", "phi", "chi", "psi", "omega",
];

/// Reads an expression by recursive descent, to a bounded depth.
struct Reader<'a> {
    lexemes: &'a [Lexeme<'a>],
    at: usize,
    depth: usize,
    fuel: Fuel,
}

impl<'a> Reader<'a> {
    fn peek(&self) -> Option<&'a Lexeme<'a>> {
        self.lexemes.get(self.at)
    }

    fn take(&mut self, sign: char) -> bool {
        let is_next = self.peek() == Some(&Lexeme::Sign(sign));
        self.at += usize::from(is_next);
        is_next
    }

    fn expect(&mut self, sign: char) -> Result<(), String> {
        if self.take(sign) { Ok(()) } else { Err(self.refusal(&format!("`{sign}`"))) }
    }

    fn refusal(&self, expected: &str) -> String {
        let got = match self.peek() {
            None => "the end".to_owned(),
            Some(Lexeme::Number(text) | Lexeme::Variable(text)) => crate::quote(text),
            Some(Lexeme::Sign(sign)) => format!("`{sign}`"),
            Some(Lexeme::Fraction) => "a fraction".to_owned(),
            Some(Lexeme::Raised(exponent)) => format!("the exponent {exponent}"),
        };
        format!("expected {expected} in the expression, got {got}")
    }

    fn sum(&mut self) -> Result<Quotient, String> {
        if self.depth == MAX_DEPTH {
            return Err(format!("expected an expression nested up to {MAX_DEPTH} deep, got a deeper one"));
        }
        self.depth += 1;
        let is_negative = self.take('-');
        let _plus = !is_negative && self.take('+');
        let mut sum = self.product()?;
        if is_negative {
            sum.dividend = sum.dividend.negate();
        }
        loop {
            let is_difference = self.take('-');
            if !is_difference && !self.take('+') {
                break;
            }
            let mut other = self.product()?;
            if is_difference {
                other.dividend = other.dividend.negate();
            }
            sum = self.bounded(|fuel| {
                if sum.divisor == other.divisor {
                    return Ok(Quotient { dividend: sum.dividend.add(&other.dividend, fuel)?, divisor: other.divisor });
                }
                let right = other.dividend.multiply(&sum.divisor, fuel)?;
                let dividend = sum.dividend.multiply(&other.divisor, fuel)?.add(&right, fuel)?;
                Ok(Quotient { dividend, divisor: sum.divisor.multiply(&other.divisor, fuel)? })
            })?;
        }
        self.depth -= 1;
        Ok(sum)
    }

    fn product(&mut self) -> Result<Quotient, String> {
        let mut is_number = matches!(self.peek(), Some(Lexeme::Number(_)));
        let mut product = self.power()?;
        // Behind a slash, it is unclear what a factor without a sign belongs to.
        let mut is_divided = false;
        loop {
            if self.take('*') {
                is_number = matches!(self.peek(), Some(Lexeme::Number(_)));
                is_divided = false;
                let factor = self.power()?;
                product = self.multiply(&product, &factor)?;
            } else if self.take('/') {
                is_number = false;
                is_divided = true;
                let divisor = self.power()?;
                product = self.divide(&product, &divisor)?;
            } else {
                match self.peek() {
                    Some(Lexeme::Variable(_) | Lexeme::Sign('(' | '{')) if !is_divided => {}
                    // 1\frac{1}{2} may be a sum.
                    Some(Lexeme::Fraction) if !is_divided && !is_number => {}
                    Some(Lexeme::Number(_) | Lexeme::Variable(_) | Lexeme::Fraction | Lexeme::Sign('(' | '{')) => {
                        return Err(self.refusal("an operator"));
                    }
                    _ => return Ok(product),
                }
                is_number = false;
                let factor = self.power()?;
                product = self.multiply(&product, &factor)?;
            }
        }
    }

    fn power(&mut self) -> Result<Quotient, String> {
        let base = self.atom()?;
        let exponent = if let Some(Lexeme::Raised(exponent)) = self.peek() {
            self.at += 1;
            Some(*exponent)
        } else if self.take('^') {
            let is_negative = self.take('-');
            self.atom()?.integer().map(|exponent| if is_negative { -exponent } else { exponent })
        } else {
            return Ok(base);
        };
        if matches!(self.peek(), Some(Lexeme::Sign('^') | Lexeme::Raised(_))) {
            return Err(self.refusal("parentheses around a power that is raised to a power"));
        }
        let exponent = exponent.filter(|exponent| exponent.unsigned_abs() <= MAX_EXPONENT.into());
        let exponent = exponent.ok_or_else(|| {
            format!("expected an integer from -{MAX_EXPONENT} to {MAX_EXPONENT} as the exponent, got another")
        })?;
        let size = exponent.unsigned_abs() as u32;
        if base.dividend.is_zero() && exponent <= 0 {
            return Err("expected no power of 0 with an exponent up to 0, got one".to_owned());
        }
        let power = self.bounded(|fuel| {
            Ok(Quotient { dividend: base.dividend.power(size, fuel)?, divisor: base.divisor.power(size, fuel)? })
        })?;
        Ok(if exponent < 0 { Quotient { dividend: power.divisor, divisor: power.dividend } } else { power })
    }

    fn atom(&mut self) -> Result<Quotient, String> {
        let next = self.peek();
        match next {
            Some(Lexeme::Number(text)) => {
                self.at += 1;
                number(text)
            }
            Some(Lexeme::Variable(name)) => {
                self.at += 1;
                Ok(Quotient::of(Polynomial::variable(name)))
            }
            Some(Lexeme::Fraction) => {
                self.at += 1;
                // Of \frac12, the digits are read one by one.
                if let Some(Lexeme::Number(digits)) = self.peek()
                    && let (Some(dividend), Some(divisor)) =
                        (digits.get(..1), digits.get(1..).filter(|it| it.len() == 1))
                {
                    self.at += 1;
                    let (dividend, divisor) = (number(dividend)?, number(divisor)?);
                    return self.divide(&dividend, &divisor);
                }
                let dividend = self.argument()?;
                let divisor = self.argument()?;
                self.divide(&dividend, &divisor)
            }
            Some(Lexeme::Sign('(')) => self.group('(', ')'),
            Some(Lexeme::Sign('{')) => self.group('{', '}'),
            _ => Err(self.refusal("a number, a variable or `(`")),
        }
    }

    fn group(&mut self, open: char, close: char) -> Result<Quotient, String> {
        self.expect(open)?;
        let inner = self.sum()?;
        self.expect(close)?;
        Ok(inner)
    }

    /// Reads an argument of `\frac`: braces, a digit or a variable.
    fn argument(&mut self) -> Result<Quotient, String> {
        match self.peek() {
            Some(Lexeme::Sign('{')) => self.group('{', '}'),
            Some(Lexeme::Variable(_)) => self.atom(),
            Some(Lexeme::Number(digit)) if digit.len() == 1 => self.atom(),
            _ => Err(self.refusal("`{` or one digit behind \\frac")),
        }
    }

    fn multiply(&mut self, left: &Quotient, right: &Quotient) -> Result<Quotient, String> {
        self.bounded(|fuel| {
            let dividend = left.dividend.multiply(&right.dividend, fuel)?;
            Ok(Quotient { dividend, divisor: left.divisor.multiply(&right.divisor, fuel)? })
        })
    }

    fn divide(&mut self, left: &Quotient, right: &Quotient) -> Result<Quotient, String> {
        if right.dividend.is_zero() {
            return Err("expected no division by 0, got one".to_owned());
        }
        let inverse = Quotient { dividend: right.divisor.clone(), divisor: right.dividend.clone() };
        self.multiply(left, &inverse)
    }

    fn bounded<T>(&mut self, compute: impl FnOnce(&mut Fuel) -> Result<T, TooLarge>) -> Result<T, String> {
        compute(&mut self.fuel).map_err(|TooLarge| TOO_LARGE.to_owned())
    }
}

fn number(text: &str) -> Result<Quotient, String> {
    let value = super::number::read(text).ok().filter(|_| !text.ends_with('.'));
    let value = value.ok_or_else(|| format!("expected a number, got {}", crate::quote(text)))?;
    let (dividend, divisor) = value.into_raw();
    Ok(Quotient { dividend: Polynomial::constant(dividend), divisor: Polynomial::constant(divisor) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn are_equal(left: &str, right: &str) -> bool {
        let [left, right] = [left, right].map(|text| read(text).unwrap_or_else(|error| panic!("{text}: {error}")));
        left.equals(&right).unwrap()
    }

    #[test]
    fn equal_expressions_are_equal() {
        for (left, right) in [
            ("x^2 - 1", "(x+1)(x-1)"),
            ("(a+b)^2", "a^2 + 2ab + b^2"),
            ("\\frac{x}{2}", "0.5x"),
            ("\\frac{1}{x} + \\frac{1}{y}", "\\dfrac{x+y}{xy}"),
            ("x*y", "xy"),
            ("\\frac{x^2y}{x}", "\\boxed{yx}"),
            ("x^{-1}", "1/x"),
            ("x^-1", "\\frac{1}{x}"),
            ("2\\pi", "2 \\cdot \\pi"),
            ("2π", "\\pi \\times 2"),
            ("-x^2", "-(x^2)"),
            ("\\left(x+1\\right)^{2}", "x^2+2x+1"),
            ("2^{10}", "1024"),
            ("2^10", "1024"),
            ("\\mathrm{e}", "e"),
            ("$x$", "x"),
            ("(x^2-1)/(x-1)", "x+1"),
            ("x - x", "0"),
            ("6 \\div 4", "1.5"),
            ("\\frac{\\frac{1}{2}}{3}", "\\frac{1}{6}"),
            ("x\\frac{1}{2}", "x/2"),
            ("2pi", "2\\pi"),
            ("2 pi r", "2\\pi r"),
            ("pi", "π"),
            ("pi/2", "\\frac\\pi2"),
            ("x**2", "x^2"),
            ("2**-1", "0.5"),
            ("x²", "x^2"),
            ("3x²y¹⁰", "3x^2y^{10}"),
            ("x⁻²", "1/x^2"),
            ("(x+1)²", "x^2+2x+1"),
            ("\\frac12", "1/2"),
            ("\\frac 12 x", "x/2"),
            ("\\frac1x", "1/x"),
            ("\\dfrac{x}2", "x/2"),
            ("\\frac x{2y}", "\\frac{x}{2y}"),
        ] {
            assert!(are_equal(left, right), "{left} {right}");
        }
        for (left, right) in [
            ("1/2^99", "1/2^98"),
            ("1 - 1/e", "1 + 1/e"),
            ("(2^{2005}+1)/(3*2^{2006})", "1/(3*2^{2006})"),
            ("x^2", "2x"),
            ("x+y", "x-y"),
            ("x", "X"),
            ("0.333333", "1/3"),
            ("-x^2", "(-x)^2"),
            ("2pi", "2p*i"),
            ("-x²", "(-x)²"),
            ("x²", "2x"),
            ("\\frac12", "12"),
            // Of the points 0 to 5, both have the same values.
            ("x", "x + x(x-1)(x-2)(x-3)(x-4)(x-5)"),
        ] {
            assert!(!are_equal(left, right), "{left} {right}");
        }
    }

    #[test]
    fn other_texts_are_no_expressions() {
        for text in [
            "",
            "1 2",
            "x2",
            "1\\frac{1}{2}",
            "1/2x",
            "1/2(x)",
            "2004!",
            "\\sqrt{2}",
            "x=5",
            "(1,2)",
            "1,234",
            "10%",
            "|x|",
            "x^y",
            "x^{1/2}",
            "2^3^2",
            "9^9^9^9",
            "10^{10^7}",
            "9^9999",
            "(x+y)^4000",
            "1/0",
            "1/(x-x)",
            "0^0",
            "0^{-1}",
            "(",
            "x)",
            "((x)",
            "x+",
            "+",
            "*x",
            "x***2",
            "x* *2",
            "**x",
            "x**",
            "x²³⁻",
            "x⁻",
            "²",
            "x²^2",
            "x^2²",
            "x**2**3",
            "x⁹⁹⁹⁹",
            "x⁹⁹⁹⁹⁹⁹⁹⁹⁹⁹⁹⁹⁹⁹⁹⁹⁹⁹⁹⁹⁹",
            "½",
            "2pir",
            "api",
            "pip",
            "--x",
            "2*-3",
            "1.2.3",
            "x.y",
            "\\frac123",
            "\\frac{1}23",
            "\\frac1.5",
            "\\frac(1)2",
            "1\\frac12",
            "\\frac1",
            "\\frac{1}",
            "\\pm 1",
            "x\u{200b}",
            "\\",
            "\\left",
            "sin(x)",
            "x_1",
            "__import__('os')",
            "x^",
            "\\binom{3}{2}",
            "∞",
        ] {
            assert!(read(text).is_err(), "{text}: {:?}", read(text));
        }
        for text in [
            "(".repeat(500),
            "(".repeat(500) + "1" + &")".repeat(500),
            "-".repeat(1_000),
            "x+".repeat(511),
            "9".repeat(1_000),
        ] {
            assert!(read(&text).is_err(), "{text}");
        }
        assert!(read(&"1".repeat(2_000)).unwrap_err().contains("up to 1024 bytes"));
        assert!(read(&format!("{}1{}", "(".repeat(40), ")".repeat(40))).unwrap_err().contains("32 deep"));
        // Many large products.
        assert_eq!(read(&"(a+b+c+d)^{9}".repeat(70)).unwrap_err(), TOO_LARGE);
    }
}
