use std::fmt::{self, Debug, Display, Formatter};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use async_nats::ConnectOptions;

use crate::Error;

/// The servers of a cluster, as given by `--bus`: `nats://127.0.0.1:4222`, several with commas between them. A password or token
/// in an address (`nats://USER:PASSWORD@HOST`, `nats://TOKEN@HOST`) is used with all servers, and never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Servers {
    addresses: Vec<Address>,
}

#[derive(Clone, PartialEq, Eq)]
struct Address {
    scheme: &'static str,
    host: String,
    port: Option<u16>,
    login: Option<Login>,
}

/// How a process without a key authenticates.
#[derive(Clone, PartialEq, Eq)]
enum Login {
    Token(String),
    Password { user: String, password: String },
}

/// Why an address is invalid. The text is quoted only as far as it cannot be secret.
struct Mistake {
    expected: &'static str,
    got: String,
}

/// The port of an address without one.
const DEFAULT_PORT: u16 = 4222;
const FORM: &str = "nats://HOST:PORT or tls://HOST:PORT, several separated by commas without spaces";
const WITH_LOGIN: &str = "nats:// or tls:// before each user, password or token, and %2C for a comma in any of these";

impl FromStr for Servers {
    type Err = Error;

    fn from_str(text: &str) -> Result<Servers, Error> {
        let items: Vec<&str> = text.split(',').collect();
        let read_item = |(index, item): (usize, &&str)| {
            // In `nats://u:se,cret@host` the text before the comma is the beginning of a password.
            let mut more = items[index + 1..].iter().take_while(|next| !next.contains("://"));
            let read = match more.any(|next| next.contains('@')) {
                true => Err(Mistake { expected: WITH_LOGIN, got: "something else".to_owned() }),
                false => read(item),
            };
            let what = if items.len() == 1 { "server".to_owned() } else { format!("server {}", index + 1) };
            read.map_err(|Mistake { expected, got }| Error::Unfit { what, expected: expected.to_owned(), got })
        };
        let addresses = items.iter().enumerate().map(read_item).collect::<Result<Vec<Address>, Error>>()?;
        let mut logins = addresses.iter().filter_map(|address| address.login.as_ref());
        let first = logins.next();
        if logins.any(|login| Some(login) != first) {
            return Err(Error::Unfit {
                what: "servers".to_owned(),
                expected: "one user and password, or one token, for all of them".to_owned(),
                got: "several".to_owned(),
            });
        }
        Ok(Servers { addresses })
    }
}

impl Servers {
    /// Returns the number of servers.
    pub(super) fn len(&self) -> usize {
        self.addresses.len()
    }

    /// Returns the addresses without credentials.
    pub(super) fn addresses(&self) -> Vec<String> {
        let address = |Address { scheme, host, port, .. }: &Address| {
            format!("{scheme}://{host}:{}", port.unwrap_or(DEFAULT_PORT))
        };
        self.addresses.iter().map(address).collect()
    }

    /// Whether an address contains credentials.
    pub(super) fn has_login(&self) -> bool {
        self.login().is_some()
    }

    /// Adds the credentials of the addresses to the options.
    pub(super) fn log_in(&self, options: ConnectOptions) -> ConnectOptions {
        match self.login().cloned() {
            None => options,
            Some(Login::Token(token)) => options.token(token),
            Some(Login::Password { user, password }) => options.user_and_password(user, password),
        }
    }

    fn login(&self) -> Option<&Login> {
        self.addresses.iter().find_map(|address| address.login.as_ref())
    }
}

/// Shows `***` in place of secrets.
impl Display for Servers {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        for (index, Address { scheme, host, port, login }) in self.addresses.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            let login = if login.is_some() { "***@" } else { "" };
            write!(formatter, "{comma}{scheme}://{login}{host}")?;
            port.map_or(Ok(()), |port| write!(formatter, ":{port}"))?;
        }
        Ok(())
    }
}

impl Debug for Servers {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        write!(formatter, "\"{self}\"")
    }
}

fn read(item: &str) -> Result<Address, Mistake> {
    let (before, place) = item.rsplit_once('@').map_or((None, item), |(before, place)| (Some(before), place));
    // Errors quote only the scheme and the text after the `@`: the rest before the `@` is secret.
    let (scheme, login) = match (before, place.split_once("://")) {
        (Some(before), _) => match before.split_once("://") {
            Some((scheme, login)) => (Some(scheme), Some(login)),
            None => (None, Some(before)),
        },
        (None, Some((scheme, _))) => (Some(scheme), None),
        (None, None) => (None, None),
    };
    let place = if before.is_none() { place.split_once("://").map_or(place, |(_, place)| place) } else { place };
    let is_word = |scheme: &str| scheme.chars().all(|letter| letter.is_ascii_alphanumeric() || "+-.".contains(letter));
    let shown = match (scheme, login) {
        (Some(scheme), Some(_)) if is_word(scheme) => format!("\"{scheme}://***@{}\"", place.escape_debug()),
        (_, Some(_)) => format!("\"***@{}\"", place.escape_debug()),
        (_, None) => format!("{item:?}"),
    };
    let mistake = |expected| Mistake { expected, got: shown.clone() };
    if item.chars().any(|letter| letter.is_whitespace() || letter.is_control()) {
        return Err(mistake(FORM));
    }
    let scheme = match scheme.map(str::to_ascii_lowercase).as_deref() {
        None | Some("nats") => "nats",
        Some("tls") => "tls",
        Some(_) => return Err(mistake(FORM)),
    };
    let place = place.strip_suffix('/').unwrap_or(place);
    let (host, port) = match place.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or_else(|| mistake("a ] after an IPv6 address"))?;
            host.parse::<Ipv6Addr>().map_err(|_| mistake("an IPv6 address between [ and ]"))?;
            (format!("[{host}]"), port)
        }
        None => {
            let (host, port) = place.split_at(place.find(':').unwrap_or(place.len()));
            if port.matches(':').count() > 1 {
                return Err(mistake("a host and a port, with an IPv6 address between [ and ]"));
            }
            if !is_host(host) {
                return Err(mistake("a host name or an IP address"));
            }
            (host.to_owned(), port)
        }
    };
    let port = match port.strip_prefix(':') {
        None if port.is_empty() => None,
        None => return Err(mistake("only a port after an IPv6 address")),
        Some(port) => {
            let is_number = port.chars().all(|digit| digit.is_ascii_digit());
            let number = port.parse().ok().filter(|port| is_number && *port > 0);
            Some(number.ok_or_else(|| mistake("a port from 1 to 65535"))?)
        }
    };
    let login = login.map(|login| read_login(login, &mistake)).transpose()?;
    Ok(Address { scheme, host, port, login })
}

/// Whether a text is a host name or an IPv4 address.
pub fn is_host(host: &str) -> bool {
    if host.chars().all(|letter| letter.is_ascii_digit() || letter == '.') {
        return host.parse::<Ipv4Addr>().is_ok();
    }
    let is_letter = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '-' | '_');
    let is_label = |label: &str| {
        let has_room = (1..=63).contains(&label.len());
        has_room && label.chars().all(is_letter) && !label.starts_with('-') && !label.ends_with('-')
    };
    host.len() <= 253 && host.strip_suffix('.').unwrap_or(host).split('.').all(is_label)
}

fn read_login(login: &str, mistake: &impl Fn(&'static str) -> Mistake) -> Result<Login, Mistake> {
    let decode = |text: &str| {
        let decoded = decode(text)
            .ok_or_else(|| mistake("%XX, two hexadecimal digits after each %, in a user, password or token"))?;
        Ok(decoded)
    };
    match login.split_once(':') {
        _ if login.is_empty() => Err(mistake("USER:PASSWORD or a token before the @")),
        Some(("", _)) => Err(mistake("a user before the password")),
        Some((user, password)) => Ok(Login::Password { user: decode(user)?, password: decode(password)? }),
        None => Ok(Login::Token(decode(login)?)),
    }
}

/// Decodes `%41` as `A`. Returns `None` if two hexadecimal digits are missing, or the result is not UTF-8.
fn decode(text: &str) -> Option<String> {
    let mut parts = text.split('%');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let digits = part.get(..2).filter(|digits| digits.chars().all(|digit| digit.is_ascii_hexdigit()))?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        bytes.extend_from_slice(&part.as_bytes()[2..]);
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn servers(text: &str) -> Servers {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn addresses_are_read_and_shown() {
        for (text, shown, addresses) in [
            ("nats://127.0.0.1:4222", "nats://127.0.0.1:4222", "nats://127.0.0.1:4222"),
            ("nats://nats", "nats://nats", "nats://nats:4222"),
            ("TLS://nats.example.com:4222/", "tls://nats.example.com:4222", "tls://nats.example.com:4222"),
            ("a_b.c-d:1", "nats://a_b.c-d:1", "nats://a_b.c-d:1"),
            ("nats://[::1]:65535", "nats://[::1]:65535", "nats://[::1]:65535"),
            ("tls://[fe80::1]", "tls://[fe80::1]", "tls://[fe80::1]:4222"),
            ("nats://a:1,tls://b,c:2", "nats://a:1,tls://b,nats://c:2", "nats://a:1 tls://b:4222 nats://c:2"),
        ] {
            let read = servers(text);
            assert_eq!((read.to_string().as_str(), read.addresses().join(" ").as_str()), (shown, addresses), "{text}");
            assert!(!read.has_login(), "{text}");
        }
    }

    #[test]
    fn a_password_or_token_is_read_and_never_shown() {
        let password = |user: &str, password: &str| Login::Password { user: user.into(), password: password.into() };
        for (text, login, shown) in [
            ("nats://u:s3cret@h:1", password("u", "s3cret"), "nats://***@h:1"),
            ("nats://s3cret@h", Login::Token("s3cret".into()), "nats://***@h"),
            ("tls://u:s3cret@[::1]:1", password("u", "s3cret"), "tls://***@[::1]:1"),
            ("u:s3cret@h", password("u", "s3cret"), "nats://***@h"),
            ("nats://u%40x:s3cret%2C%2F%3A%25%c3%A4@h", password("u@x", "s3cret,/:%ä"), "nats://***@h"),
            ("nats://u:s3cret/@:://?#@h", password("u", "s3cret/@:://?#"), "nats://***@h"),
            ("nats://u:@h", password("u", ""), "nats://***@h"),
            (
                "nats://u:s3cret@a,nats://b,nats://u:s3cret@c",
                password("u", "s3cret"),
                "nats://***@a,nats://b,nats://***@c",
            ),
        ] {
            let read = servers(text);
            assert!(read.login() == Some(&login), "{text}");
            assert_eq!(read.to_string(), shown, "{text}");
            assert!(!format!("{read:?} {}", read.addresses().join(" ")).contains("s3cret"), "{text}");
        }
    }

    #[test]
    fn what_was_mistyped_is_refused_and_a_secret_in_it_not_shown() {
        for (text, says) in [
            ("", "expected a host name or an IP address, got \"\""),
            ("http://h:4222", "expected nats://HOST:PORT or tls://HOST:PORT, several separated by commas"),
            ("ws://h", "got \"ws://h\""),
            ("nats:/h", "expected a port from 1 to 65535, got \"nats:/h\""),
            ("nats://", "expected a host name or an IP address, got \"nats://\""),
            ("nats://:4222", "expected a host name or an IP address, got \"nats://:4222\""),
            ("nats://h:", "expected a port from 1 to 65535, got \"nats://h:\""),
            ("nats://h:0", "expected a port from 1 to 65535, got"),
            ("nats://h:99999", "expected a port from 1 to 65535, got \"nats://h:99999\""),
            ("nats://h:+1", "expected a port from 1 to 65535, got"),
            ("nats://h:4222x", "expected a port from 1 to 65535, got"),
            ("nats://h:4222/x", "expected a port from 1 to 65535, got"),
            ("nats://h/x", "expected a host name or an IP address, got"),
            ("nats://127.0.0.256", "expected a host name or an IP address, got"),
            ("nats://a..b", "expected a host name or an IP address, got"),
            ("-", "expected a host name or an IP address, got \"-\""),
            ("nats://-h:1", "expected a host name or an IP address, got"),
            ("nats://h-.b", "expected a host name or an IP address, got"),
            ("nats://ä", "expected a host name or an IP address, got"),
            ("nats://::1:4222", "with an IPv6 address between [ and ], got"),
            ("nats://[::1:4222", "expected a ] after an IPv6 address, got"),
            ("nats://[h]:4222", "expected an IPv6 address between [ and ], got"),
            ("nats://[::1]4222", "expected only a port after an IPv6 address, got"),
            ("nats://a,", "bus: server 2: expected a host name or an IP address, got \"\""),
            (",nats://a", "bus: server 1: expected a host name or an IP address, got \"\""),
            ("nats://a,,nats://b", "bus: server 2: expected "),
            (
                "nats://a, nats://b",
                "bus: server 2: expected nats://HOST:PORT or tls://HOST:PORT, several separated by commas",
            ),
            (" nats://a", "bus: server: expected nats://HOST:PORT"),
            ("nats://a b", "bus: server: expected nats://HOST:PORT"),
            ("nats://a\n", "got \"nats://a\\n\""),
            ("http://u:s3cret@h:1", "got \"http://***@h:1\""),
            ("s3cret:://x@h:0", "got \"***@h:0\""),
            ("nats://u:s3cret@", "expected a host name or an IP address, got \"nats://***@\""),
            ("nats://u:s3cret@h:99999", "expected a port from 1 to 65535, got \"nats://***@h:99999\""),
            ("nats://u:s3c ret@h", "got \"nats://***@h\""),
            ("nats://:s3cret@h", "expected a user before the password, got \"nats://***@h\""),
            ("nats://@h", "expected USER:PASSWORD or a token before the @, got"),
            (
                "nats://u:s3cret%@h",
                "expected %XX, two hexadecimal digits after each %, in a user, password or token, got",
            ),
            ("nats://u:s3cret%+1@h", "expected %XX, "),
            ("nats://u:s3cret%FF@h", "expected %XX, "),
            (
                "nats://u:s3cret,x@h",
                "bus: server 1: expected nats:// or tls:// before each user, password or token, and %2C",
            ),
            ("nats://a,nats://s3cret,x,y@h", "bus: server 2: expected nats:// or tls:// before each user"),
            (
                "nats://u:s3cret@a,nats://u:other@b",
                "bus: servers: expected one user and password, or one token, for all",
            ),
            ("nats://u:s3cret@a,nats://s3cret@b", "for all of them, got several"),
        ] {
            let refused =
                text.parse::<Servers>().map(|read| panic!("{text} was read as {read}")).unwrap_err().to_string();
            assert!(refused.contains(says), "{text}: expected {says}: {refused}");
            assert!(!refused.contains("s3c"), "{text}: {refused}");
        }
    }
}
