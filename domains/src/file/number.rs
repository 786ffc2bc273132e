//! Numbers as people and models write them, read exactly.
//!
//! An expression is not a number: whoever asks for a value is not answered by the question. So a fraction is in lowest terms.

use num_bigint::{BigInt, BigUint};
use num_rational::BigRational;
use num_traits::{One as _, Zero as _};

use super::reply::bare;

/// Most bytes of a number.
const MAX_BYTES: usize = 256;
/// Largest exponent of ten, and its negative the smallest.
const MAX_EXPONENT: u32 = 400;

/// What a number has to look like.
const EXPECTED: &str = "a number such as 42, -1,234.5, 2/3, 1e-3 or 10%";
const REDUCED: &str = "a fraction in lowest terms, with a denominator of 2 or more";

/// Reads a number: an integer or a decimal, with an exponent or in groups of three digits, or a fraction in lowest terms, with
/// its integer part or without. It may have a sign and a currency sign, or end in a percent sign, which divides it by 100.
///
/// # Errors
/// What was expected and what was found.
pub(super) fn read(text: &str) -> Result<BigRational, String> {
    let text = bare(text);
    let refuse = |expected: &str| format!("expected {expected}, got {}", crate::quote(text));
    if text.len() > MAX_BYTES {
        return Err(format!("expected a number of up to {MAX_BYTES} bytes, got {}", text.len()));
    }
    let (mut is_negative, unsigned) = sign(text);
    let (has_currency, mut rest) = currency(unsigned);
    if has_currency && unsigned.len() == text.len() {
        (is_negative, rest) = sign(rest);
    }
    let (rest, is_percent) = match rest.strip_suffix('%') {
        Some(rest) => (rest.strip_suffix('\\').unwrap_or(rest).trim_end_matches([' ', '\t']), true),
        None => (rest, false),
    };
    let rest = rest.replace("{,}", ",").replace(",\\!", ",");
    let magnitude = decimal(&rest).or_else(|| if is_percent { None } else { mixed(&rest) });
    let magnitude = magnitude.filter(|_| !(is_percent && has_currency));
    let magnitude = magnitude.ok_or_else(|| refuse(if is_of_integers(&rest) { REDUCED } else { EXPECTED }))?;
    let value = if is_percent { magnitude / BigRational::from_integer(100.into()) } else { magnitude };
    Ok(if is_negative { -value } else { value })
}

/// Whether a text is a fraction of integers, in lowest terms or not.
fn is_of_integers(text: &str) -> bool {
    fraction_parts(text).is_some_and(|parts| parts.iter().all(|part| digits(part).is_some()))
}

/// Returns whether a sign is minus, and the rest.
fn sign(text: &str) -> (bool, &str) {
    let minus = text.strip_prefix(['-', '\u{2212}']);
    let rest = minus.or_else(|| text.strip_prefix('+')).unwrap_or(text);
    (minus.is_some(), if rest.len() < text.len() { rest.trim_start_matches(' ') } else { rest })
}

/// Returns whether there is a currency sign, and the rest.
fn currency(text: &str) -> (bool, &str) {
    let rest = text.strip_prefix("\\$").or_else(|| text.strip_prefix(['$', '€', '£', '¥']));
    rest.map_or((false, text), |rest| (true, rest.trim_start_matches(' ')))
}

/// Reads a decimal without a sign.
fn decimal(text: &str) -> Option<BigRational> {
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, self::exponent(exponent)?),
        None => (text, 0),
    };
    let (whole, decimals) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    if mantissa.ends_with('.') || !decimals.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let whole = match whole.split_once(',') {
        Some((first, groups)) => {
            let is_group = |group: &str| group.len() == 3 && digits(group).is_some();
            let is_grouped = (1..=3).contains(&first.len()) && groups.split(',').all(is_group);
            is_grouped.then(|| whole.replace(',', ""))?
        }
        None => whole.to_owned(),
    };
    let all = digits(&format!("{whole}{decimals}"))?;
    let shift = exponent - i64::try_from(decimals.len()).ok()?;
    let power = BigRational::from_integer(BigInt::from(10).pow(shift.unsigned_abs() as u32));
    let value = BigRational::from_integer(all.into());
    Some(if shift < 0 { value / power } else { value * power })
}

/// Reads an exponent of ten within its bounds.
fn exponent(text: &str) -> Option<i64> {
    let (is_negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let is_plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    let value = digits.parse::<u32>().ok().filter(|value| is_plain && *value <= MAX_EXPONENT)?;
    Some(if is_negative { -i64::from(value) } else { value.into() })
}

/// Reads a fraction in lowest terms, with an integer before it or without: `2/3`, `\frac{2}{3}`, `1 2/3`, `1\frac{2}{3}`.
fn mixed(text: &str) -> Option<BigRational> {
    if let Some(fraction) = fraction(text) {
        return Some(fraction);
    }
    let end = text.find(|letter: char| !letter.is_ascii_digit())?;
    let (whole, rest) = text.split_at(end);
    let spaced = rest.strip_prefix(' ');
    let part = fraction(spaced.unwrap_or(rest)).filter(|_| spaced.is_some() || rest.starts_with('\\'))?;
    let is_proper = part < BigRational::one();
    Some(BigRational::from_integer(digits(whole)?.into()) + part).filter(|_| is_proper)
}

fn fraction(text: &str) -> Option<BigRational> {
    let [numerator, denominator] = fraction_parts(text)?;
    let (numerator, denominator) = (digits(numerator)?, digits(denominator)?);
    if denominator.is_zero() || denominator.is_one() {
        return None;
    }
    let value = BigRational::new(numerator.into(), denominator.clone().into());
    (*value.denom() == BigInt::from(denominator)).then_some(value)
}

/// Splits `a/b`, `\frac{a}{b}` or `\frac ab` with digits a and b.
fn fraction_parts(text: &str) -> Option<[&str; 2]> {
    let latex = ["\\frac", "\\dfrac", "\\tfrac"].into_iter().find_map(|command| text.strip_prefix(command));
    let Some(rest) = latex else {
        let (numerator, denominator) = text.split_once('/')?;
        return Some([numerator, denominator]);
    };
    if let Some(braced) = rest.strip_prefix('{') {
        let (numerator, denominator) = braced.strip_suffix('}')?.split_once("}{")?;
        return Some([numerator, denominator]);
    }
    let (numerator, denominator) = rest.trim_start_matches(' ').split_at_checked(1)?;
    (denominator.len() == 1).then_some([numerator, denominator])
}

fn digits(text: &str) -> Option<BigUint> {
    let is_plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    is_plain.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ratio(numerator: i64, denominator: i64) -> BigRational {
        BigRational::new(numerator.into(), denominator.into())
    }

    #[test]
    fn numbers_have_their_exact_values() {
        for (text, numerator, denominator) in [
            ("42", 42, 1),
            ("-42", -42, 1),
            ("\u{2212}42", -42, 1),
            ("+7", 7, 1),
            ("007", 7, 1),
            ("0", 0, 1),
            ("-0", 0, 1),
            ("42.", 42, 1),
            ("42.0", 42, 1),
            (".5", 1, 2),
            ("0.1", 1, 10),
            ("0.333333", 333_333, 1_000_000),
            ("1,234", 1_234, 1),
            ("1,234,567.5", 2_469_135, 2),
            ("1{,}234", 1_234, 1),
            ("10,\\!080", 10_080, 1),
            ("$5", 5, 1),
            ("-$5", -5, 1),
            ("$-5", -5, 1),
            ("\\$1,200.50", 2_401, 2),
            ("€ 3", 3, 1),
            ("$42$", 42, 1),
            ("$$42$$", 42, 1),
            ("\\(42\\)", 42, 1),
            ("**42**", 42, 1),
            ("\\text{42}", 42, 1),
            ("3/4", 3, 4),
            ("-3/4", -3, 4),
            ("\\frac{3}{4}", 3, 4),
            ("-\\dfrac{3}{4}", -3, 4),
            ("\\tfrac34", 3, 4),
            ("\\frac 34", 3, 4),
            ("1 1/2", 3, 2),
            ("-1 1/2", -3, 2),
            ("1\\frac{1}{2}", 3, 2),
            ("10%", 1, 10),
            ("10 %", 1, 10),
            ("10\\%", 1, 10),
            ("1e3", 1_000, 1),
            ("1.5E-2", 3, 200),
            ("2e+1", 20, 1),
        ] {
            assert_eq!(read(text), Ok(ratio(numerator, denominator)), "{text}");
        }
        assert_eq!(read("1e400").unwrap(), BigRational::from_integer(BigInt::from(10).pow(400)));
    }

    #[test]
    fn other_texts_are_no_numbers() {
        for text in [
            "",
            " ",
            "-",
            "+",
            "$",
            "%",
            ".",
            "1+1",
            "2*3",
            "6/8",
            "4/2",
            "3/1",
            "1/0",
            "0/5",
            "1 2",
            "1 6/8",
            "1 3/2",
            "1-1/2",
            "1,23",
            "12,34",
            "1234,567",
            ",123",
            "1,234,",
            "1.2.3",
            "1.2,345",
            "1..2",
            "nan",
            "inf",
            "Infinity",
            "1e",
            "e5",
            "1e999999",
            "1e-401",
            "1e5e5",
            "1_000",
            "0x10",
            "five",
            "5 apples",
            "5 or 6",
            "5, 6",
            "\u{ff15}",
            "\u{665}",
            "5\u{200b}",
            "--5",
            "- -5",
            "1/2%",
            "$5%",
            "\\frac{1}{2}{3}",
            "\\frac{1}",
            "\\frac{}{2}",
            "\\frac123",
            "\\sqrt{4}",
            "2^3",
            "(5)",
            "5%%",
            "50\\",
            "\\frac{1+1}{3}",
            "1.5/2",
            "{5}",
            "5=5",
            "x=5",
            "5°",
        ] {
            assert!(read(text).is_err(), "{text:?}: {:?}", read(text));
        }
        assert!(read("6/8").unwrap_err().contains("lowest terms"));
        assert!(read(&"9".repeat(257)).unwrap_err().contains("up to 256 bytes"));
    }
}
