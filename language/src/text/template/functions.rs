//! The functions, filters and methods that templates expect besides those of the language.

use minijinja::value::{Kwargs, StringInput, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::{Date, json};

/// Adds them to an environment.
pub(super) fn add_all(environment: &mut Environment<'_>, date: Date) {
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", move |format: &str| strftime(date, format));
    environment.add_filter("tojson", to_json);
    environment.add_filter("trim", |text: StringInput<'_>, chars: Option<&str>| {
        strip(text.as_str(), chars, Side::Both).to_owned()
    });
    // To Python, none cannot be iterated over, and texts and mappings are sequences.
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_test("sequence", |value: &Value| {
        let is_sized =
            matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable | ValueKind::String | ValueKind::Map);
        value.is_undefined() || is_sized
    });
    environment.set_unknown_method_callback(call_method);
    environment.remove_global("debug");
}

fn raise_exception(message: &Value) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, format!("the template raises {:?}", message.to_string())))
}

/// Writes a value as Python's `json.dumps` does, by default with `ensure_ascii=False`.
fn to_json(state: &State<'_, '_>, value: &Value, arguments: Kwargs) -> Result<Value, Error> {
    let indent = match arguments.get::<Option<Value>>("indent")? {
        Some(indent) if indent.is_number() => Some(" ".repeat(usize::try_from(indent)?.min(json::MAX_INDENT))),
        Some(indent) if !indent.is_none() => Some(indent.to_string()),
        _ => None,
    };
    let item_separator = if indent.is_some() { "," } else { ", " };
    let separators = match arguments.get::<Option<Value>>("separators")?.filter(|separators| !separators.is_none()) {
        Some(separators) => {
            (separators.get_item_by_index(0)?.to_string(), separators.get_item_by_index(1)?.to_string())
        }
        None => (item_separator.to_owned(), ": ".to_owned()),
    };
    let style = json::Style {
        is_ascii: arguments.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sorts_keys: arguments.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        indent,
        separators,
    };
    arguments.assert_all_used()?;
    let text = json::write(value, &style)?;
    state.consume_fuel(text.len() as u64 / 16)?;
    Ok(Value::from(text))
}

fn call_method(state: &mut State<'_, '_>, value: &Value, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    let side = match method {
        "strip" => Side::Both,
        "lstrip" => Side::Left,
        "rstrip" => Side::Right,
        _ => return unknown_method_callback(state, value, method, arguments),
    };
    match value.as_str() {
        Some(text) if value.kind() == ValueKind::String => {
            let (chars,): (Option<&str>,) = from_args(arguments)?;
            Ok(Value::from(strip(text, chars, side)))
        }
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

#[derive(Clone, Copy)]
enum Side {
    Left,
    Right,
    Both,
}

/// Strips characters as Python's `str.strip` does. To Rust, the separators U+001C to U+001F are no whitespace.
fn strip<'a>(text: &'a str, chars: Option<&str>, side: Side) -> &'a str {
    let goes = |character: char| match chars {
        Some(chars) => chars.contains(character),
        None => character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character),
    };
    match side {
        Side::Left => text.trim_start_matches(goes),
        Side::Right => text.trim_end_matches(goes),
        Side::Both => text.trim_matches(goes),
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// Formats midnight of a date as Python's `strftime` does in the locale C.
fn strftime(date: Date, format: &str) -> Result<String, Error> {
    let Date { year, month, day } = date;
    let (month_name, weekday) = (MONTHS[usize::from(month) - 1], weekday(date));
    let mut text = String::new();
    let mut rest = format.chars();
    while let Some(character) = rest.next() {
        if character != '%' {
            text.push(character);
            continue;
        }
        let mut directive = rest.next();
        let is_bare = directive == Some('-');
        if is_bare {
            directive = rest.next();
        }
        let pad = |number: u16, width: usize| if is_bare { number.to_string() } else { format!("{number:0width$}") };
        text.push_str(&match directive {
            Some('Y') => year.to_string(),
            Some('y') => pad(year % 100, 2),
            Some('m') => pad(month.into(), 2),
            Some('d') => pad(day.into(), 2),
            Some('e') if is_bare => day.to_string(),
            Some('e') => format!("{day:2}"),
            Some('j') => pad(day_of_year(date), 3),
            Some('B') => month_name.to_owned(),
            Some('b' | 'h') => month_name[..3].to_owned(),
            Some('A') => WEEKDAYS[weekday].to_owned(),
            Some('a') => WEEKDAYS[weekday][..3].to_owned(),
            Some('u') => (if weekday == 0 { 7 } else { weekday }).to_string(),
            Some('w') => weekday.to_string(),
            Some('H' | 'M' | 'S') => pad(0, 2),
            Some('I') => pad(12, 2),
            Some('p') => "AM".to_owned(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => "00:00:00".to_owned(),
            Some('R') => "00:00".to_owned(),
            Some('D') => format!("{month:02}/{day:02}/{:02}", year % 100),
            Some('%') => "%".to_owned(),
            other => {
                let directive = other.map_or("an end".to_owned(), |other| format!("%{other}"));
                let reason = format!("strftime_now: expected a directive for a date, got {directive}");
                return Err(Error::new(ErrorKind::InvalidOperation, reason));
            }
        });
    }
    Ok(text)
}

/// Returns the day of the week, 0 for Sunday.
///
/// Source: Sakamoto 1992.
fn weekday(date: Date) -> usize {
    const SHIFT: [usize; 12] = [0, 3, 2, 5, 0, 3, 5, 1, 4, 6, 2, 4];
    let year = usize::from(date.year) - usize::from(date.month < 3);
    (year + year / 4 - year / 100 + year / 400 + SHIFT[usize::from(date.month) - 1] + usize::from(date.day)) % 7
}

fn day_of_year(date: Date) -> u16 {
    let months = (1..date.month).map(|month| (28..=31).rev().find(|day| Date::new(date.year, month, *day).is_some()));
    months.flatten().map(u16::from).sum::<u16>() + u16::from(date.day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_formatted_as_in_python() {
        // python: datetime(2024, 7, 26).strftime(...)
        let date = Date::new(2024, 7, 26).unwrap();
        let format = |format| strftime(date, format).unwrap();
        assert_eq!(format("%d %b %Y"), "26 Jul 2024");
        assert_eq!(format("%A, %B %-d, %Y; %j %y %e"), "Friday, July 26, 2024; 208 24 26");
        assert_eq!(format("%Y-%m-%dT%H:%M:%S %I %p %% %F %T"), "2024-07-26T00:00:00 12 AM % 2024-07-26 00:00:00");
        let first = Date::new(1, 1, 1).unwrap();
        assert_eq!(strftime(first, "%a %w %u %j %-j %-m %e %D").unwrap(), "Mon 1 1 001 1 1  1 01/01/01");
        assert_eq!(strftime(Date::new(2000, 12, 31).unwrap(), "%a %j %u").unwrap(), "Sun 366 7");
        for broken in ["%Q", "%", "%-", "%-Q"] {
            assert!(strftime(date, broken).is_err(), "{broken}");
        }
    }

    #[test]
    fn impossible_dates_are_none() {
        let days = [
            (2023, 2, 29),
            (1900, 2, 29),
            (2024, 4, 31),
            (2024, 13, 1),
            (2024, 0, 1),
            (2024, 1, 0),
            (0, 1, 1),
            (10_000, 1, 1),
        ];
        days.into_iter().for_each(|(year, month, day)| assert_eq!(Date::new(year, month, day), None));
        assert!(Date::new(2000, 2, 29).is_some());
    }

    #[test]
    fn strips_what_python_strips() {
        // python: '\x1c\x1f \u3000a\x0b\x85\u2028 \x1c'.strip(), '\u200b\x00'.strip()
        assert_eq!(strip("\u{1c}\u{1f} \u{3000}a\u{b}\u{85}\u{2028} \u{1c}", None, Side::Both), "a");
        assert_eq!(strip("\u{200b}\0", None, Side::Both), "\u{200b}\0");
        assert_eq!(strip("\n\na\n", Some("\n"), Side::Left), "a\n");
        assert_eq!(strip("xaax", Some("ax"), Side::Right), "");
    }
}
