//! The language of pretrained models: a request is a conversation, and an answer is free text up to an end token.

use std::sync::{Arc, Mutex, PoisonError};

use domains::{Domain, Wording, answer_of, domain, reply_with};
use proto::{Difficulty, Digest, LegalTokens, Niche, Problem, Request, TokenId, Verdict};

use super::{ChatMessage, ChatTemplate, Date, Specials, TemplateOptions, Tokenizer, encode_chat};
use crate::{Episode, Error, Language, Next, Room};

/// Asks in words, and reads the answer from the reply.
pub struct TextLanguage {
    replies: Arc<Replies>,
    template: ChatTemplate,
    /// The token with which answers that are not sampled end.
    end: TokenId,
    options: TextOptions,
    /// The problem that was asked last, with its prompt: the rollouts of a group ask the same one.
    asked: Mutex<Option<(Problem, Arc<[TokenId]>)>>,
}

/// Reads replies.
struct Replies {
    tokenizer: Tokenizer,
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
    /// Worked examples before the question.
    pub num_examples: usize,
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
        ends.sort_unstable();
        ends.dedup();
        let end = turn_end.or(named_end).or(ends.first().copied()).ok_or_else(|| Error::Tokenizer {
            what: "end tokens".to_owned(),
            expected: "an eos_token in the model's files".to_owned(),
            got: "none".to_owned(),
        })?;
        let replies = Arc::new(Replies { tokenizer, vocabulary_size, end_tokens: ends });
        Ok(TextLanguage { replies, template, end, options, asked: Mutex::new(None) })
    }

    /// Returns the tokens at which replies end, ascending.
    pub fn end_tokens(&self) -> &[TokenId] {
        &self.replies.end_tokens
    }

    /// Returns the prompt of a problem.
    fn prompt(&self, problem: &Problem) -> Result<Arc<[TokenId]>, Error> {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((last, prompt)) = &*asked
            && last == problem
        {
            return Ok(prompt.clone());
        }
        let prompt: Arc<[TokenId]> = self.chat(wording_of(domain(&problem.domain)?.as_ref())?, problem)?.into();
        *asked = Some((problem.clone(), prompt.clone()));
        Ok(prompt)
    }

    fn chat(&self, wording: &dyn Wording, problem: &Problem) -> Result<Vec<TokenId>, Error> {
        let say = |role: &str, content: String| ChatMessage { role: role.to_owned(), content };
        let mut messages = Vec::new();
        for (example, reply) in wording.examples().into_iter().take(self.options.num_examples) {
            messages.extend([say("user", wording.question(&example)?), say("assistant", reply)]);
        }
        messages.push(say("user", wording.question(problem)?));
        let tokenizer = &self.replies.tokenizer;
        // Templates that know of it think by default, and no reply here is long enough for that.
        let options = TemplateOptions::from([("enable_thinking".to_owned(), false.into())]);
        let mut tokens = encode_chat(tokenizer, &self.template, &messages, true, &options)?;
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
        let Request::Solve { problem, .. } = request else {
            return Err(Error::NoProposals { domain: domain.name().to_owned() });
        };
        Ok(Box::new(TextEpisode {
            domain,
            prompt: self.prompt(problem)?,
            request: Arc::new(request.clone()),
            replies: self.replies.clone(),
            answer: Vec::new(),
        }))
    }

    fn propose_prompt(&self, name: &str, _niche: Niche, _difficulty: Difficulty) -> Result<Vec<TokenId>, Error> {
        Err(Error::NoProposals { domain: name.to_owned() })
    }

    fn room(&self, problem: &Problem) -> Result<Room, Error> {
        Ok(Room { prompt: self.prompt(problem)?.len(), answer: self.options.max_reply_tokens as usize })
    }

    fn proposal_room(&self, name: &str, _niche: Niche) -> Result<Room, Error> {
        Err(Error::NoProposals { domain: name.to_owned() })
    }

    fn text(&self, request: &Request, answer: &[TokenId]) -> Result<Option<String>, Error> {
        match request {
            Request::Solve { .. } => Ok(self.replies.text(answer).map(|reply| answer_of(&reply).to_owned())),
            Request::Propose { domain, .. } => Err(Error::NoProposals { domain: domain.clone() }),
        }
    }

    fn spell(&self, _problem: &Problem, answer: &str) -> Result<Option<Vec<TokenId>>, Error> {
        let reply = reply_with(answer);
        let mut tokens = self.replies.tokenizer.encode(&reply, Specials::Text)?;
        // Some tokenizers have no token for some bytes.
        let is_whole = self.replies.tokenizer.decode(&tokens) == reply.as_bytes();
        tokens.push(self.end);
        Ok(is_whole.then_some(tokens))
    }

    fn show(&self, _name: &str, answer: &[TokenId]) -> String {
        String::from_utf8_lossy(&self.replies.bytes(answer)).into_owned()
    }
}

fn wording_of(domain: &dyn Domain) -> Result<&dyn Wording, Error> {
    domain.wording().ok_or_else(|| Error::NoWording { domain: domain.name().to_owned() })
}

struct TextEpisode {
    domain: &'static dyn Domain,
    request: Arc<Request>,
    prompt: Arc<[TokenId]>,
    replies: Arc<Replies>,
    answer: Vec<TokenId>,
}

impl Episode for TextEpisode {
    fn prompt(&self) -> &[TokenId] {
        &self.prompt
    }

    fn next(&self) -> Next {
        if self.replies.is_complete(&self.answer) { Next::Done } else { Next::Choice(LegalTokens::Any) }
    }

    fn push(&mut self, token: TokenId) -> bool {
        let is_legal = !self.replies.is_complete(&self.answer) && (token as usize) < self.replies.vocabulary_size;
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
        self.domain.judge(problem, None, answer_of(&reply)).ok().map(|judged| judged.verdict)
    }
}
