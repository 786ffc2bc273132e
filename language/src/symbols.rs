//! The language of networks that start from random weights: a closed vocabulary of 256 symbols, and a grammar for each domain
//! that has one.

use std::sync::Arc;

use domains::symbols::vocabulary::{VOCABULARY_SIZE, base_name};
use domains::symbols::{self, Grammar};
use domains::{Domain, Symbols, domain, registry};
use proto::{Difficulty, Digest, LegalTokens, Niche, Problem, Request, TokenId, Verdict};

use crate::{Episode, Error, Language, Next, Room};

/// The symbols of every domain that has them.
#[derive(Clone, Copy, Debug, Default)]
pub struct SymbolLanguage;

impl Language for SymbolLanguage {
    fn vocabulary_size(&self) -> usize {
        VOCABULARY_SIZE
    }

    fn token_name(&self, token: TokenId) -> String {
        let of_domains = || {
            let tables = registry().iter().filter_map(|domain| domain.symbols()).map(Symbols::tokens);
            tables.flatten().find(|(other, _)| *other == token).map(|(_, name)| name.to_owned())
        };
        base_name(token).or_else(of_domains).unwrap_or_else(|| format!("<unused-{token}>"))
    }

    fn open(&self, request: &Request) -> Result<Box<dyn Episode>, Error> {
        let domain = domain(request.domain())?.as_ref();
        let symbols = symbols_of(domain)?;
        let (prompt, grammar) = match request {
            Request::Solve { problem, .. } => (symbols.prompt(problem)?, symbols.grammar(problem)?),
            Request::Propose { niche, difficulty, .. } => {
                (symbols.propose_prompt(*niche, *difficulty), symbols.proposal_grammar(*niche))
            }
        };
        let (request, prompt) = (Arc::new(request.clone()), prompt.into());
        Ok(Box::new(SymbolEpisode { domain, request, prompt, grammar, answer: Vec::new() }))
    }

    fn propose_prompt(&self, name: &str, niche: Niche, difficulty: Difficulty) -> Result<Vec<TokenId>, Error> {
        Ok(symbols_of(domain(name)?.as_ref())?.propose_prompt(niche, difficulty))
    }

    fn room(&self, problem: &Problem) -> Result<Room, Error> {
        let symbols = symbols_of(domain(&problem.domain)?.as_ref())?;
        Ok(Room { prompt: symbols.max_prompt_tokens(problem)?, answer: symbols.max_answer_tokens(problem)? as usize })
    }

    fn proposal_room(&self, name: &str, niche: Niche) -> Result<Room, Error> {
        let symbols = symbols_of(domain(name)?.as_ref())?;
        // Every difficulty is one token.
        let prompt = symbols.propose_prompt(niche, Difficulty::Hard).len();
        Ok(Room { prompt, answer: symbols.max_proposal_tokens(niche) as usize })
    }

    fn text(&self, request: &Request, answer: &[TokenId]) -> Result<Option<String>, Error> {
        let symbols = symbols_of(domain(request.domain())?.as_ref())?;
        Ok(match request {
            Request::Solve { problem, .. } => symbols.answer_text(problem, answer),
            Request::Propose { niche, .. } => symbols.proposal_text(*niche, answer),
        })
    }

    fn show(&self, name: &str, answer: &[TokenId]) -> String {
        let symbols = domain(name).ok().and_then(|domain| domain.symbols());
        symbols.and_then(|symbols| symbols.show(answer)).unwrap_or_else(|| self.show_tokens(answer))
    }

    fn spell(&self, problem: &Problem, answer: &str) -> Result<Option<Vec<TokenId>>, Error> {
        Ok(symbols_of(domain(&problem.domain)?.as_ref())?.spell(problem, answer))
    }
}

fn symbols_of(domain: &dyn Domain) -> Result<&dyn Symbols, Error> {
    domain.symbols().ok_or_else(|| Error::NoSymbols { domain: domain.name().to_owned() })
}

struct SymbolEpisode {
    domain: &'static dyn Domain,
    request: Arc<Request>,
    prompt: Arc<[TokenId]>,
    grammar: Box<dyn Grammar>,
    answer: Vec<TokenId>,
}

impl Episode for SymbolEpisode {
    fn prompt(&self) -> &[TokenId] {
        &self.prompt
    }

    fn next(&self) -> Next {
        match self.grammar.next() {
            symbols::Next::Done => Next::Done,
            symbols::Next::Forced(token) => Next::Forced(token),
            symbols::Next::Choice(set) => Next::Choice(LegalTokens::Only(set)),
        }
    }

    fn push(&mut self, token: TokenId) -> bool {
        let is_legal = self.grammar.push(token);
        if is_legal {
            self.answer.push(token);
        }
        is_legal
    }

    fn fork(&self) -> Box<dyn Episode> {
        Box::new(SymbolEpisode {
            domain: self.domain,
            request: self.request.clone(),
            prompt: self.prompt.clone(),
            grammar: self.grammar.fork(),
            answer: self.answer.clone(),
        })
    }

    fn state_hash(&self) -> Digest {
        match self.grammar.state() {
            Some(state) => Digest::of(&(&self.prompt[..1], self.domain.name(), state)),
            None => Digest::of(&(&*self.request, &self.answer)),
        }
    }

    fn check(&self) -> Option<Verdict> {
        let Request::Solve { problem, .. } = &*self.request else { return None };
        if self.grammar.next() != symbols::Next::Done || !self.domain.may_be_searched(problem) {
            return None;
        }
        let answer = self.domain.symbols()?.answer_text(problem, &self.answer)?;
        self.domain.judge(problem, None, &answer).ok().map(|judged| judged.verdict)
    }
}
