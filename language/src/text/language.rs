//! The language of pretrained models: a request is a conversation, and an answer is text up to an end token.

use std::sync::{Arc, Mutex, PoisonError};

use domains::{Domain, Proposing, Turn, Wording, answer_of, domain, reply_with};
use proto::{Difficulty, Digest, LegalTokens, Niche, Problem, Request, TokenId, Verdict};

use super::pattern::{Answer, Pattern, Patterns};
use super::{ChatMessage, ChatTemplate, Date, Specials, TemplateOptions, Tokenizer, encode_chat};
use crate::{Episode, Error, Language, Next, Room};

/// Asks in words, and reads the answer from the reply.
pub struct TextLanguage {
    replies: Arc<Replies>,
    template: ChatTemplate,
    /// The token with which answers that are not sampled end.
    end: TokenId,
    options: TextOptions,
    /// `None` if no reply is constrained.
    patterns: Option<Patterns>,
    /// What was asked last, with its prompt: the rollouts of a group ask the same.
    asked: Mutex<Option<(Asked, Arc<[TokenId]>)>>,
}

/// What a prompt asks for.
#[derive(PartialEq)]
enum Asked {
    /// The answer to a problem.
    Answer(Problem),
    /// A problem of a domain.
    Proposal(String, Niche, Difficulty),
}

/// Reads replies.
struct Replies {
    tokenizer: Arc<Tokenizer>,
    /// Rows of the model's embedding.
    vocabulary_size: usize,
    /// Ascending.
    end_tokens: Vec<TokenId>,
}

impl Replies {
    fn is_complete(&self, tokens: &[TokenId]) -> bool {
        tokens.last().is_some_and(|token| self.end_tokens.contains(token))
    }

    /// Returns the bytes of a reply without its end token.
    fn bytes(&self, tokens: &[TokenId]) -> Vec<u8> {
        self.tokenizer.decode(&tokens[..tokens.len() - usize::from(self.is_complete(tokens))])
    }

    /// Returns a complete reply as text; `None` if it is incomplete or not UTF-8.
    fn text(&self, tokens: &[TokenId]) -> Option<String> {
        self.is_complete(tokens).then(|| String::from_utf8(self.bytes(tokens)).ok()).flatten()
    }
}

/// How a pretrained model is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TextOptions {
    /// Longest reply, in tokens, its end token included; 1 or more.
    pub max_reply_tokens: u32,
    /// Worked examples before the question, of answers or of proposals.
    pub num_examples: usize,
    /// Which replies are legal.
    pub constraint: Constraint,
}

/// Which replies are legal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Constraint {
    /// All of them, up to an end token. The answer is what [`Wording::answer_in`] finds, and the proposal what [`answer_of`] finds.
    None,
    /// A bare answer or proposal that matches the pattern of its domain, up to one end token; for domains without a pattern all of
    /// them.
    Answer,
}

/// Ends of turns in templates in use; not every model's files name them as ends.
const TURN_ENDS: [&str; 3] = ["<|im_end|>", "<|eot_id|>", "<end_of_turn>"];

/// How models without a chat template are asked.
const PLAIN_TEMPLATE: &str = "{% for message in messages %}\
     {{ 'Answer: ' if message.role == 'assistant' else 'Question: ' }}{{ message.content }}\
     {{ eos_token if message.role == 'assistant' }}\n\n{% endfor %}\
     {% if add_generation_prompt %}Answer:{% endif %}";

impl TextLanguage {
    /// Builds the language of a model.
    ///
    /// - `vocabulary_size`: rows of the model's embedding, padding included.
    /// - `end_tokens`: the tokens at which the model's files say that text ends. Those that the tokenizer names, and the ends of
    ///   turns that the chat template writes, are added.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer does not fit the model, or no end token is known; [`Error::Template`] when the chat
    /// template does not compile.
    pub fn new(
        tokenizer: Tokenizer,
        vocabulary_size: usize,
        end_tokens: &[TokenId],
        options: TextOptions,
    ) -> Result<TextLanguage, Error> {
        tokenizer.expect_fits(vocabulary_size)?;
        let source = tokenizer.chat_template().unwrap_or(PLAIN_TEMPLATE);
        let date = Date::new(2026, 1, 1).expect("a day of the calendar");
        let template = ChatTemplate::new(source, tokenizer.named_tokens(), date)?;
        let turn_end =
            TURN_ENDS.into_iter().filter(|text| source.contains(text)).find_map(|text| tokenizer.special_id(text));
        let named_end = tokenizer.named_tokens().get("eos_token").and_then(|text| tokenizer.special_id(text));
        let mut ends: Vec<TokenId> = end_tokens.iter().copied().chain(turn_end).chain(named_end).collect();
        ends.retain(|token| (*token as usize) < vocabulary_size);
        ends.sort_unstable();
        ends.dedup();
        let end = turn_end.or(named_end).or(ends.first().copied()).ok_or_else(|| Error::Tokenizer {
            what: "end tokens".to_owned(),
            expected: "an eos_token in the model's files".to_owned(),
            got: "none".to_owned(),
        })?;
        let tokenizer = Arc::new(tokenizer);
        let patterns = match options.constraint {
            Constraint::None => None,
            Constraint::Answer => Some(Patterns::new(tokenizer.clone(), end, &ends)),
        };
        let replies = Arc::new(Replies { tokenizer, vocabulary_size, end_tokens: ends });
        Ok(TextLanguage { replies, template, end, options, patterns, asked: Mutex::new(None) })
    }

    /// Returns the tokens at which replies end, ascending.
    pub fn end_tokens(&self) -> &[TokenId] {
        &self.replies.end_tokens
    }

    fn prompt(&self, asked: Asked) -> Result<Arc<[TokenId]>, Error> {
        let mut last = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((last, prompt)) = &*last
            && *last == asked
        {
            return Ok(prompt.clone());
        }
        let messages = match &asked {
            Asked::Answer(problem) => self.messages(problem)?,
            Asked::Proposal(domain, niche, difficulty) => self.proposal_messages(domain, *niche, *difficulty)?,
        };
        let prompt: Arc<[TokenId]> = self.encode(&messages)?.into();
        *last = Some((asked, prompt.clone()));
        Ok(prompt)
    }

    /// Returns the pattern that answers to a problem have to match.
    fn pattern(&self, problem: &Problem) -> Result<Option<Arc<Pattern>>, Error> {
        let Some(patterns) = &self.patterns else { return Ok(None) };
        let pattern = wording_of(domain(&problem.domain)?.as_ref())?.answer_pattern(problem)?;
        pattern.map(|text| patterns.get(&problem.domain, &text)).transpose()
    }

    /// Returns the pattern that proposals for a niche have to match.
    fn proposal_pattern(&self, name: &str, niche: Niche) -> Result<Option<Arc<Pattern>>, Error> {
        let Some(patterns) = &self.patterns else { return Ok(None) };
        let pattern = proposing_of(domain(name)?.as_ref())?.pattern(niche)?;
        patterns.get(name, &pattern).map(Some)
    }

    /// Returns the conversation that asks for an answer to a problem: worked examples, and the question.
    ///
    /// # Errors
    /// [`Error::NoWording`] when the domain cannot be asked about in words; [`Error::Domain`] when the problem is not in its language.
    pub fn messages(&self, problem: &Problem) -> Result<Vec<ChatMessage>, Error> {
        let wording = wording_of(domain(&problem.domain)?.as_ref())?;
        let is_bare = self.pattern(problem)?.is_some();
        let mut messages = Vec::new();
        for (example, reply) in wording.examples().into_iter().take(self.options.num_examples) {
            let reply = if is_bare { answer_of(&reply).to_owned() } else { reply };
            messages.extend([say("user", wording.question(&example)?), say("assistant", reply)]);
        }
        let asked = wording.messages(problem)?;
        messages.extend(asked.into_iter().map(|Turn { role, content }| ChatMessage { role, content }));
        Ok(messages)
    }

    /// Returns the conversation that asks for a problem of a niche and a difficulty: worked examples, whose difficulty nobody knows,
    /// and the request.
    ///
    /// # Errors
    /// [`Error::NoProposals`] when problems of the domain cannot be proposed in words; [`Error::Domain`] when the niche belongs to no
    /// level of its ladder.
    pub fn proposal_messages(
        &self,
        name: &str,
        niche: Niche,
        difficulty: Difficulty,
    ) -> Result<Vec<ChatMessage>, Error> {
        let proposing = proposing_of(domain(name)?.as_ref())?;
        let mut messages = Vec::new();
        for (niche, proposal) in proposing.examples(niche)?.into_iter().take(self.options.num_examples) {
            messages.extend([say("user", proposing.request(niche)?), say("assistant", proposal)]);
        }
        let difficulty = match difficulty {
            Difficulty::Unsolved => "too hard",
            Difficulty::Hard => "hard",
            Difficulty::Easy => "easy",
            Difficulty::Trivial => "too easy",
        };
        messages.push(say("user", format!("{} Difficulty: {difficulty}.", proposing.request(niche)?)));
        Ok(messages)
    }

    fn encode(&self, messages: &[ChatMessage]) -> Result<Vec<TokenId>, Error> {
        let tokenizer = &self.replies.tokenizer;
        // Templates that know of it think by default, and no reply here is long enough for that.
        let options = TemplateOptions::from([("enable_thinking".to_owned(), false.into())]);
        let mut tokens = encode_chat(tokenizer, &self.template, messages, true, &options)?;
        if tokenizer.chat_template().is_none() && tokenizer.add_bos() == Some(true) {
            let bos = tokenizer.named_tokens().get("bos_token").and_then(|text| tokenizer.special_id(text));
            tokens.splice(..0, bos);
        }
        Ok(tokens)
    }
}

impl Language for TextLanguage {
    fn vocabulary_size(&self) -> usize {
        self.replies.vocabulary_size
    }

    fn token_name(&self, token: TokenId) -> String {
        self.replies.tokenizer.token_name(token)
    }

    fn open(&self, request: &Request) -> Result<Box<dyn Episode>, Error> {
        let domain = domain(request.domain())?.as_ref();
        let (asked, pattern) = match request {
            Request::Solve { problem, .. } => (Asked::Answer(problem.clone()), self.pattern(problem)?),
            Request::Propose { domain, niche, difficulty } => {
                (Asked::Proposal(domain.clone(), *niche, *difficulty), self.proposal_pattern(domain, *niche)?)
            }
        };
        Ok(Box::new(TextEpisode {
            domain,
            prompt: self.prompt(asked)?,
            request: Arc::new(request.clone()),
            replies: self.replies.clone(),
            bare: pattern.map(Answer::new),
            answer: Vec::new(),
        }))
    }

    fn propose_prompt(&self, name: &str, niche: Niche, difficulty: Difficulty) -> Result<Vec<TokenId>, Error> {
        Ok(self.prompt(Asked::Proposal(name.to_owned(), niche, difficulty))?.to_vec())
    }

    fn room(&self, problem: &Problem) -> Result<Room, Error> {
        let prompt = self.prompt(Asked::Answer(problem.clone()))?;
        Ok(Room { prompt: prompt.len(), answer: self.options.max_reply_tokens as usize })
    }

    fn proposal_room(&self, name: &str, niche: Niche) -> Result<Room, Error> {
        let difficulties = [Difficulty::Unsolved, Difficulty::Hard, Difficulty::Easy, Difficulty::Trivial];
        let prompts = difficulties.map(|difficulty| self.propose_prompt(name, niche, difficulty));
        let lengths: Vec<usize> = prompts.into_iter().map(|prompt| Ok(prompt?.len())).collect::<Result<_, Error>>()?;
        let longest = lengths.into_iter().max().expect("there are four of them");
        Ok(Room { prompt: longest, answer: self.options.max_reply_tokens as usize })
    }

    fn text(&self, request: &Request, tokens: &[TokenId]) -> Result<Option<String>, Error> {
        match request {
            Request::Solve { problem, .. } => {
                let is_bare = self.pattern(problem)?.is_some();
                let wording = wording_of(domain(&problem.domain)?.as_ref())?;
                let answer = |reply: String| if is_bare { reply } else { wording.answer_in(&reply).to_owned() };
                Ok(self.replies.text(tokens).map(answer))
            }
            Request::Propose { .. } => {
                let is_bare = self.patterns.is_some();
                let proposal = |reply: String| if is_bare { reply } else { answer_of(&reply).to_owned() };
                Ok(self.replies.text(tokens).map(proposal))
            }
        }
    }

    fn spell(&self, problem: &Problem, answer: &str) -> Result<Option<Vec<TokenId>>, Error> {
        let bare = self.pattern(problem)?.map(Answer::new);
        let reply = if bare.is_some() { answer.to_owned() } else { reply_with(answer) };
        let mut tokens = self.replies.tokenizer.encode(&reply, Specials::Text)?;
        // Some tokenizers have no token for some bytes.
        let is_whole = self.replies.tokenizer.decode(&tokens) == reply.as_bytes();
        tokens.push(self.end);
        let is_legal = bare.is_none_or(|mut bare| tokens.iter().all(|token| bare.push(*token)));
        Ok((is_whole && is_legal).then_some(tokens))
    }

    fn show(&self, _name: &str, answer: &[TokenId]) -> String {
        String::from_utf8_lossy(&self.replies.bytes(answer)).into_owned()
    }
}

fn wording_of(domain: &dyn Domain) -> Result<&dyn Wording, Error> {
    domain.wording().ok_or_else(|| Error::NoWording { domain: domain.name().to_owned() })
}

fn proposing_of(domain: &dyn Domain) -> Result<&dyn Proposing, Error> {
    wording_of(domain)?.proposing().ok_or_else(|| Error::NoProposals { domain: domain.name().to_owned() })
}

fn say(role: &str, content: String) -> ChatMessage {
    ChatMessage { role: role.to_owned(), content }
}

struct TextEpisode {
    domain: &'static dyn Domain,
    request: Arc<Request>,
    prompt: Arc<[TokenId]>,
    replies: Arc<Replies>,
    /// The answer under the constraint; `None` if it is free.
    bare: Option<Answer>,
    answer: Vec<TokenId>,
}

impl Episode for TextEpisode {
    fn prompt(&self) -> &[TokenId] {
        &self.prompt
    }

    fn next(&self) -> Next {
        match &self.bare {
            Some(bare) => bare.next(),
            None if self.replies.is_complete(&self.answer) => Next::Done,
            None => Next::Choice(LegalTokens::Any),
        }
    }

    fn push(&mut self, token: TokenId) -> bool {
        let is_legal = match &mut self.bare {
            Some(bare) => bare.push(token),
            None => !self.replies.is_complete(&self.answer) && (token as usize) < self.replies.vocabulary_size,
        };
        if is_legal {
            self.answer.push(token);
        }
        is_legal
    }

    fn fork(&self) -> Box<dyn Episode> {
        Box::new(TextEpisode {
            domain: self.domain,
            request: self.request.clone(),
            prompt: self.prompt.clone(),
            replies: self.replies.clone(),
            bare: self.bare.clone(),
            answer: self.answer.clone(),
        })
    }

    fn state_hash(&self) -> Digest {
        Digest::of(&(&*self.request, &self.answer))
    }

    fn check(&self) -> Option<Verdict> {
        let Request::Solve { problem, .. } = &*self.request else { return None };
        if !self.replies.is_complete(&self.answer) || !self.domain.may_be_searched(problem) {
            return None;
        }
        let Some(reply) = self.replies.text(&self.answer) else { return Some(Verdict::Malformed) };
        let answer = if self.bare.is_some() { &reply } else { self.domain.wording()?.answer_in(&reply) };
        self.domain.judge(problem, None, answer).ok().map(|judged| judged.verdict)
    }
}

#[cfg(test)]
mod tests {
    use proto::{Choices, CounterRng, ProblemOrigin, Purpose, SetDictionary};

    use super::*;
    use crate::text::pattern::tests::smollm2;
    use crate::{random_answer, trace};

    const END: TokenId = 2;

    fn language() -> TextLanguage {
        let options = TextOptions { max_reply_tokens: 32, num_examples: 1, constraint: Constraint::Answer };
        TextLanguage::new(smollm2(), 49_152, &[0, 1 << 20], options).unwrap()
    }

    /// Opens an episode under a pattern that the domain need not have.
    fn open(language: &TextLanguage, pattern: &str) -> Box<dyn Episode> {
        let problem = Problem { domain: "countdown".to_owned(), text: "7 3 -> 10".to_owned() };
        let pattern = language.patterns.as_ref().unwrap().get(&problem.domain, pattern).unwrap();
        Box::new(TextEpisode {
            domain: domain(&problem.domain).unwrap().as_ref(),
            prompt: language.prompt(Asked::Answer(problem.clone())).unwrap(),
            request: Arc::new(Request::Solve { problem, origin: ProblemOrigin::Exam, has_key: false }),
            replies: language.replies.clone(),
            bare: Some(Answer::new(pattern)),
            answer: Vec::new(),
        })
    }

    fn traced(episode: Box<dyn Episode>, answer: &[TokenId]) -> Option<(Choices, Vec<proto::TokenSet>)> {
        let mut sets = SetDictionary::default();
        trace(episode, answer, &mut sets).map(|choices| (choices, sets.into_sets()))
    }

    #[test]
    fn choices_of_constrained_answers_are_the_same_wherever_they_are_replayed() {
        let [player, checker] = [(); 2].map(|()| language());
        let pattern = "[a-z]( [a-z]){2}";
        for walk in 0..50 {
            let mut rng = CounterRng::new(3, Purpose::Rollout, walk, 0, 0);
            let answer = random_answer(open(&player, pattern), &mut rng);
            let (choices, sets) = traced(open(&player, pattern), &answer).unwrap();
            assert_eq!(traced(open(&checker, pattern), &answer), Some((choices.clone(), sets.clone())));
            assert_eq!(answer.last(), Some(&END));
            assert!(choices.iter().all(|(position, legal)| legal.tokens(&sets).contains(answer[position])));
            // Nothing can follow the third letter but the end.
            assert!(choices.iter().all(|(position, _)| position + 1 < answer.len()));
            assert_eq!(traced(open(&player, "[0-9]{1,7}"), &answer), None, "it is another problem's answer");
            assert_eq!(traced(open(&player, pattern), &answer[..answer.len() - 1]), None, "it has no end");
        }
    }

    #[test]
    fn a_constrained_answer_is_judged_bare_and_copies_go_on_apart() {
        let language = language();
        let pattern = r"[0-9+\-*/() ]{1,24}";
        for (text, verdict) in [("7 + 3", Verdict::Correct), ("7 - 3", Verdict::Incorrect), ("7 +", Verdict::Malformed)]
        {
            let mut episode = open(&language, pattern);
            assert!(!episode.push(END), "an empty answer does not match");
            for token in language.replies.tokenizer.encode(text, Specials::Text).unwrap() {
                let Next::Choice(LegalTokens::Only(legal)) = episode.next() else { panic!("several tokens are legal") };
                assert!(legal.contains(token) && legal.iter().all(|token| token >= 17 || token == END));
                let before = episode.fork();
                assert!(!episode.push(0) && !episode.push(1 << 20), "an end token, and no token");
                assert!(episode.push(token));
                assert_eq!((before.next(), episode.check()), (Next::Choice(LegalTokens::Only(legal)), None));
                assert_ne!(before.state_hash(), episode.state_hash());
            }
            assert!(episode.push(END) && !episode.push(END));
            assert_eq!((episode.next(), episode.check()), (Next::Done, Some(verdict)), "{text}");
        }
    }
}
