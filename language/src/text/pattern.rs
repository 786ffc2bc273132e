//! Answers that match a regular expression, token by token.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::iter::successors;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use proto::{LegalTokens, TokenId, TokenSet};
use regex_automata::dfa::{Automaton as _, StartKind, dense};
use regex_automata::nfa::thompson;
use regex_automata::util::primitives::StateID;
use regex_automata::util::start;
use regex_automata::{Anchored, MatchKind};

use super::tokenizer::Tokenizer;
use crate::{Error, Next};

/// Compiles patterns for a vocabulary, and keeps those that were used last.
pub(super) struct Patterns {
    vocabulary: Arc<Vocabulary>,
    /// The one that was used last is the last.
    used: Mutex<VecDeque<Arc<Pattern>>>,
}

/// A regular expression of answers: the tokens of a text that it matches from the first character to the last, and then the
/// end token. Every legal token can be followed by others up to the end.
pub(super) struct Pattern {
    text: String,
    vocabulary: Arc<Vocabulary>,
    automaton: Automaton,
    start: StateID,
    /// What is legal in each state from which tokens lead to the end, once it is known.
    next: BTreeMap<StateID, OnceLock<Next>>,
}

/// An answer under a pattern.
#[derive(Clone)]
pub(super) struct Answer {
    pattern: Arc<Pattern>,
    state: StateID,
}

type Automaton = dense::DFA<Vec<u32>>;

/// The state after the end token: the dead one of every automaton.
const DONE: StateID = StateID::ZERO;

/// Patterns in use at a time: the problems of a batch may have one each.
const MAX_USED: usize = 64;

/// The most states of a pattern. Each may need a bit for every token.
const MAX_STATES: usize = 4096;

/// The largest automaton, and the largest one that it is made from, in bytes.
const MAX_AUTOMATON_BYTES: usize = 1 << 22;

impl Patterns {
    /// Prepares for patterns of texts without special tokens and without tokens at which replies end.
    pub(super) fn new(tokenizer: Arc<Tokenizer>, end: TokenId, end_tokens: &[TokenId]) -> Patterns {
        let vocabulary = Arc::new(Vocabulary::new(tokenizer, end, end_tokens));
        Patterns { vocabulary, used: Mutex::default() }
    }

    /// Returns a domain's pattern, compiled.
    ///
    /// # Errors
    /// [`Error::Pattern`] when it is no regular expression, is too large, or no tokens match it.
    pub(super) fn get(&self, domain: &str, text: &str) -> Result<Arc<Pattern>, Error> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let known = used.iter().position(|pattern| pattern.text == text).and_then(|index| used.remove(index));
        let compile = || Pattern::compile(self.vocabulary.clone(), text).map(Arc::new);
        let refused = |reason| Error::Pattern { domain: domain.to_owned(), pattern: text.to_owned(), reason };
        let pattern = known.map_or_else(compile, Ok).map_err(refused)?;
        if used.len() == MAX_USED {
            used.pop_front();
        }
        used.push_back(pattern.clone());
        Ok(pattern)
    }
}

impl Pattern {
    fn compile(vocabulary: Arc<Vocabulary>, text: &str) -> Result<Pattern, String> {
        // Of all matches, not only those of the first alternative.
        let config = dense::Config::new().match_kind(MatchKind::All).start_kind(StartKind::Anchored);
        let config = config.dfa_size_limit(Some(MAX_AUTOMATON_BYTES));
        let config = config.determinize_size_limit(Some(MAX_AUTOMATON_BYTES));
        let nfa = thompson::Config::new().nfa_size_limit(Some(MAX_AUTOMATON_BYTES));
        let automaton = dense::Builder::new().configure(config).thompson(nfa).build(text);
        let automaton = automaton.map_err(|error| cause(&error))?;
        let start = automaton.start_state(&start::Config::new().anchored(Anchored::Yes));
        let start = start.map_err(|error| cause(&error))?;
        let open = open_states(&automaton, start, &vocabulary.bytes)?;
        if !open.contains(&start) {
            return Err("no tokens match it".to_owned());
        }
        let next = open.into_iter().map(|state| (state, OnceLock::new())).chain([(DONE, Next::Done.into())]).collect();
        Ok(Pattern { text: text.to_owned(), vocabulary, automaton, start, next })
    }

    /// Returns the legal tokens in a state.
    fn next(&self, state: StateID) -> &Next {
        self.next[&state].get_or_init(|| {
            let steps = self.vocabulary.steps(&self.automaton, state).filter(|(_, to)| self.next.contains_key(to));
            let end = may_end(&self.automaton, state).then_some(self.vocabulary.end);
            let legal: TokenSet = steps.map(|(token, _)| token).chain(end).collect();
            match legal.last() {
                Some(only) if legal.len() == 1 => Next::Forced(only),
                _ => Next::Choice(LegalTokens::Only(legal)),
            }
        })
    }

    /// Returns the state after a token; `None` if it is illegal.
    fn step(&self, state: StateID, token: TokenId) -> Option<StateID> {
        let is_legal = match self.next(state) {
            Next::Done => false,
            Next::Forced(only) => *only == token,
            Next::Choice(legal) => legal.contains(token),
        };
        let advance = |state, byte: &u8| self.automaton.next_state(state, *byte);
        is_legal.then(|| match token == self.vocabulary.end {
            true => DONE,
            false => self.vocabulary.tokenizer.bytes(token).iter().fold(state, advance),
        })
    }
}

impl Answer {
    /// Begins an answer.
    pub(super) fn new(pattern: Arc<Pattern>) -> Answer {
        Answer { state: pattern.start, pattern }
    }

    /// Returns the legal next tokens.
    pub(super) fn next(&self) -> Next {
        self.pattern.next(self.state).clone()
    }

    /// Appends a token. Returns `false` and changes nothing if it is illegal.
    pub(super) fn push(&mut self, token: TokenId) -> bool {
        let to = self.pattern.step(self.state, token);
        self.state = to.unwrap_or(self.state);
        to.is_some()
    }
}

/// The tokens that answers are written in.
struct Vocabulary {
    tokenizer: Arc<Tokenizer>,
    /// Tokens of text by their bytes, each with the number of bytes that it shares with the one before it.
    tokens: Vec<(TokenId, usize)>,
    /// The bytes that are tokens of text on their own.
    bytes: Vec<u8>,
    end: TokenId,
}

impl Vocabulary {
    fn new(tokenizer: Arc<Tokenizer>, end: TokenId, end_tokens: &[TokenId]) -> Vocabulary {
        let is_text = |token: &TokenId| {
            !tokenizer.is_special(*token) && !end_tokens.contains(token) && !tokenizer.bytes(*token).is_empty()
        };
        let mut sorted: Vec<TokenId> = (0..tokenizer.vocabulary_size() as TokenId).filter(is_text).collect();
        sorted.sort_by_key(|token| tokenizer.bytes(*token));
        let (mut tokens, mut bytes, mut before) = (Vec::with_capacity(sorted.len()), Vec::new(), &[][..]);
        for token in sorted {
            let text = tokenizer.bytes(token);
            tokens.push((token, before.iter().zip(text).take_while(|(left, right)| left == right).count()));
            bytes.extend((text.len() == 1).then_some(text[0]));
            before = text;
        }
        Vocabulary { tokens, bytes, end, tokenizer: tokenizer.clone() }
    }

    /// Lists the tokens that an automaton reads in a state without going dead, with the states that they lead to.
    fn steps(&self, automaton: &Automaton, from: StateID) -> impl Iterator<Item = (TokenId, StateID)> {
        // The state after each byte of a token, up to where it goes dead.
        let mut states = vec![from];
        self.tokens.iter().filter_map(move |(token, shared)| {
            if *shared >= states.len() {
                return None;
            }
            states.truncate(shared + 1);
            let mut state = *states.last()?;
            for byte in &self.tokenizer.bytes(*token)[*shared..] {
                state = automaton.next_state(state, *byte);
                if automaton.is_dead_state(state) {
                    return None;
                }
                states.push(state);
            }
            Some((*token, state))
        })
    }
}

/// Returns the states that bytes lead to, and from which they lead to the end of a match.
fn open_states(automaton: &Automaton, start: StateID, bytes: &[u8]) -> Result<BTreeSet<StateID>, String> {
    let steps = |state: StateID| bytes.iter().map(move |byte| automaton.next_state(state, *byte));
    let mut states = vec![start];
    let mut known = BTreeSet::from([start]);
    let mut num_seen = 0;
    while let Some(state) = states.get(num_seen).copied() {
        num_seen += 1;
        states.extend(steps(state).filter(|to| known.insert(*to)));
        if states.len() > MAX_STATES {
            return Err(format!("it has more than {MAX_STATES} states"));
        }
    }
    let mut open: BTreeSet<StateID> = states.iter().copied().filter(|state| may_end(automaton, *state)).collect();
    let mut num_open = 0;
    while open.len() > num_open {
        num_open = open.len();
        // Most bytes lead to a state that was found later.
        for state in states.iter().rev() {
            if !open.contains(state) && steps(*state).any(|to| open.contains(&to)) {
                open.insert(*state);
            }
        }
    }
    Ok(open)
}

/// Whether the text that leads to a state matches.
fn may_end(automaton: &Automaton, state: StateID) -> bool {
    automaton.is_match_state(automaton.next_eoi_state(state))
}

/// Returns the cause that an error goes back to.
fn cause(error: &(dyn std::error::Error + 'static)) -> String {
    successors(Some(error), |error| error.source()).last().expect("an error is its own cause at the least").to_string()
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::Path;
    use std::sync::LazyLock;

    use proto::{CounterRng, Purpose};
    use regex::bytes::Regex;
    use serde_json::Value;

    use super::*;
    use crate::text::TokenizerParts;

    const END: TokenId = 2;
    const NUM_SPECIAL: TokenId = 17;

    /// SmolLM2's tokenizer, without a chat template.
    pub(in crate::text) fn smollm2() -> Tokenizer {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/smollm2.json.zst");
        let json: Value = serde_json::from_slice(&zstd::decode_all(&*std::fs::read(file).unwrap()).unwrap()).unwrap();
        let strings = |key: &str| -> Vec<String> { serde_json::from_value(json[key].clone()).unwrap() };
        let merges = strings("merges");
        let merged = merges.iter().map(|merge| merge.replace(' ', ""));
        let tokens: Vec<String> = strings("first_tokens").into_iter().chain(merged).collect();
        Tokenizer::new(TokenizerParts::Gguf {
            model: "gpt2".to_owned(),
            pre: Some("smollm".to_owned()),
            token_types: (0..tokens.len() as TokenId).map(|id| if id < NUM_SPECIAL { 3 } else { 1 }).collect(),
            tokens,
            merges,
            bos: Some(1),
            eos: Some(END),
            unknown: None,
            padding: None,
            add_bos: None,
            add_space_prefix: None,
            chat_template: None,
        })
        .unwrap()
    }

    fn patterns() -> Patterns {
        Patterns::new(Arc::new(smollm2()), END, &[0, END])
    }

    fn is_number(text: &[u8]) -> bool {
        let digits = text.strip_prefix(b"-").unwrap_or(text);
        digits.len() <= 7 && digits.iter().all(u8::is_ascii_digit)
    }

    fn is_letters(text: &[u8]) -> bool {
        let fits = |(index, byte): (usize, &u8)| if index % 2 == 0 { byte.is_ascii_lowercase() } else { *byte == b' ' };
        text.len() <= 15 && text.iter().enumerate().all(fits)
    }

    fn is_expression(text: &[u8]) -> bool {
        text.len() <= 24 && text.iter().all(|byte| b"0123456789+-*/() ".contains(byte))
    }

    fn is_of_three_characters(text: &[u8]) -> bool {
        static WHOLE: LazyLock<Vec<String>> = LazyLock::new(|| {
            let characters = ["é", "ê", "€"];
            let longer = |text: String| characters.map(|character| text.clone() + character);
            let two = characters.into_iter().flat_map(|character| longer(character.to_owned()));
            two.flat_map(longer).collect()
        });
        WHOLE.iter().any(|whole| whole.as_bytes().starts_with(text))
    }

    /// Whether a text is the beginning of a match.
    type IsBeginning = fn(&[u8]) -> bool;

    const CASES: [(&str, IsBeginning); 4] = [
        ("-?[0-9]{1,7}", is_number),
        ("[a-z]( [a-z]){0,7}", is_letters),
        (r"[0-9+\-*/() ]{1,24}", is_expression),
        ("[é-ê€]{1,3}", is_of_three_characters),
    ];

    #[test]
    fn legal_tokens_are_those_that_the_whole_vocabulary_has() {
        let (patterns, tokenizer) = (patterns(), smollm2());
        for (text, is_beginning) in CASES {
            let whole = Regex::new(&format!(r"\A(?:{text})\z")).unwrap();
            let pattern = patterns.get("words", text).unwrap();
            let mut compared = BTreeSet::new();
            for walk in 0..100 {
                let mut rng = CounterRng::new(7, Purpose::Rollout, walk, 0, 0);
                let (mut answer, mut bytes) = (Answer::new(pattern.clone()), Vec::new());
                loop {
                    let legal: Vec<TokenId> = match answer.next() {
                        Next::Done => break,
                        Next::Forced(token) => vec![token],
                        Next::Choice(LegalTokens::Only(set)) => set.iter().collect(),
                        Next::Choice(LegalTokens::Any) => panic!("every pattern forbids some token"),
                    };
                    if compared.len() < 12 && compared.insert(bytes.clone()) {
                        let is_legal = |token: &TokenId| match *token {
                            END => whole.is_match(&bytes),
                            0..NUM_SPECIAL => false,
                            token => is_beginning(&[&bytes, tokenizer.bytes(token)].concat()),
                        };
                        let expected: Vec<TokenId> = (0..49_152).filter(is_legal).collect();
                        assert_eq!(legal, expected, "{text} after {:?}", String::from_utf8_lossy(&bytes));
                        assert_eq!(legal.len() == 1, matches!(answer.next(), Next::Forced(_)));
                    }
                    let other = rng.below(49_200) as TokenId;
                    assert_eq!(answer.clone().push(other), legal.contains(&other), "{text}: {other}");
                    let token = legal[rng.below(legal.len() as u64) as usize];
                    assert!(answer.push(token));
                    if token != END {
                        bytes.extend(tokenizer.bytes(token));
                    }
                }
                assert!(whole.is_match(&bytes), "{text}: {:?}", String::from_utf8_lossy(&bytes));
                assert!(!answer.push(END), "it has ended");
            }
            assert!(compared.len() > 8, "{text}: {} beginnings", compared.len());
        }
    }

    #[test]
    fn no_token_leads_to_where_no_answer_ends() {
        let (patterns, tokenizer) = (patterns(), smollm2());
        // No token spells the byte 4, and no character is both c and d.
        for text in ["q(b\u{4}|z)", r"q(b\x04|z)", "q(b[c&&d]|z)", "(?:q|qb\u{4})z"] {
            let mut answer = Answer::new(patterns.get("words", text).unwrap());
            let single = |text: &str| tokenizer.encode(text, crate::text::Specials::Text).unwrap()[0];
            assert!(answer.push(single("q")), "{text}");
            assert_eq!(answer.next(), Next::Forced(single("z")), "{text}");
        }
    }

    #[test]
    fn unusable_patterns_are_errors_that_name_them() {
        let patterns = patterns();
        for (text, reason) in [
            ("[0-9", "unclosed character class"),
            ("[0-9]{1,100000000}", "exceeded limit of 4194304"),
            ("[ab]{1,5000}", "it has more than 4096 states"),
            ("7\u{4}", "no tokens match it"),
            ("[a&&b]", "no tokens match it"),
        ] {
            let error = patterns.get("sums", text).err().unwrap().to_string();
            assert!(error.starts_with("domain sums: expected a pattern") && error.contains(reason), "{error}");
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
        assert!(patterns.used.lock().unwrap().is_empty());
    }

    #[test]
    fn patterns_are_compiled_once_while_they_are_in_use() {
        let patterns = patterns();
        let [first, second] = ["0", "1"].map(|text| patterns.get("sums", text).unwrap());
        for other in 2..MAX_USED + 1 {
            patterns.get("sums", &other.to_string()).unwrap();
            assert!(Arc::ptr_eq(&patterns.get("sums", "0").unwrap(), &first), "it is still in use");
        }
        assert!(!Arc::ptr_eq(&patterns.get("sums", "1").unwrap(), &second), "it was used first");
        assert_eq!(patterns.used.lock().unwrap().len(), MAX_USED);
    }
}
