use std::sync::Arc;

use domains::{Domain, registry};
use proto::{CounterRng, Difficulty, Digest, KeyedProblem, LadderLevel, Niche, Problem, ProblemSource, TokenId};

use crate::{Language, SymbolLanguage};

/// A domain as a learner's source of problems, with the language of its proposal prompts.
pub struct Source {
    domain: Arc<dyn Domain>,
    language: Arc<dyn Language>,
}

impl Source {
    /// Builds the source of a domain that is asked in a language.
    pub fn new(domain: Arc<dyn Domain>, language: Arc<dyn Language>) -> Source {
        Source { domain, language }
    }

    /// Lists the domains of the registry that have symbols.
    pub fn of_symbols() -> Vec<Arc<dyn ProblemSource>> {
        Source::all(Arc::new(SymbolLanguage), |domain| domain.symbols().is_some())
    }

    /// Lists the domains of the registry that have a wording and a ladder, asked in a language of words.
    pub fn of_words(language: Arc<dyn Language>) -> Vec<Arc<dyn ProblemSource>> {
        Source::all(language, |domain| domain.wording().is_some() && !domain.ladder_levels().is_empty())
    }

    fn all(language: Arc<dyn Language>, is_asked: fn(&dyn Domain) -> bool) -> Vec<Arc<dyn ProblemSource>> {
        let asked = registry().iter().filter(|domain| is_asked(domain.as_ref()));
        let source = |domain: &Arc<dyn Domain>| Source::new(domain.clone(), language.clone());
        asked.map(|domain| Arc::new(source(domain)) as Arc<dyn ProblemSource>).collect()
    }
}

impl ProblemSource for Source {
    fn name(&self) -> &'static str {
        self.domain.name()
    }

    fn ladder_levels(&self) -> &'static [LadderLevel] {
        self.domain.ladder_levels()
    }

    fn level_of(&self, niche: Niche) -> u32 {
        self.domain.level_of(niche)
    }

    fn ladder(&self, level: u32, seed: u64, index: u64) -> KeyedProblem {
        self.domain.ladder(level, seed, index)
    }

    fn mutate(&self, parent: &KeyedProblem, rng: &mut CounterRng) -> Option<KeyedProblem> {
        self.domain.mutate(parent, rng)
    }

    fn propose_prompt(&self, niche: Niche, difficulty: Difficulty) -> Vec<TokenId> {
        let prompt = self.language.propose_prompt(self.domain.name(), niche, difficulty);
        prompt.expect("a run has domains that its language can ask about")
    }

    fn max_proposal_tokens(&self, niche: Niche) -> u32 {
        let room = self.language.proposal_room(self.domain.name(), niche);
        room.expect("a run has domains that its language can ask about").answer as u32
    }

    fn describe_niche(&self, niche: Niche) -> String {
        self.domain.describe_niche(niche)
    }

    fn canonical_hash(&self, problem: &Problem) -> Digest {
        self.domain.canonical_hash(problem)
    }

    fn is_exam(&self, problem: &Problem) -> bool {
        self.domain.is_exam(problem)
    }
}
