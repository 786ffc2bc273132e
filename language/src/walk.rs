use domains::domain;
use proto::{Choices, CounterRng, LegalTokens, Problem, SetDictionary, TokenId};

use crate::{Episode, Error, Language, Next};

/// Replays an answer in its episode and returns its choices. Enters their sets in `sets`.
///
/// Returns `None` when the answer is incomplete or illegal.
pub fn trace(mut episode: Box<dyn Episode>, answer: &[TokenId], sets: &mut SetDictionary) -> Option<Choices> {
    let mut choices = Vec::new();
    for (position, token) in answer.iter().enumerate() {
        if let Next::Choice(legal) = episode.next() {
            choices.push((position, sets.refer(legal)));
        }
        if !episode.push(*token) {
            return None;
        }
    }
    (episode.next() == Next::Done).then(|| Choices::new(answer.len(), choices))
}

/// Returns the solution that a problem's domain finds, in tokens; `None` if the domain has no solver, or the language cannot
/// express what it finds.
///
/// # Errors
/// As [`Language::open`].
pub fn solution(language: &dyn Language, problem: &Problem) -> Result<Option<Vec<TokenId>>, Error> {
    match domain(&problem.domain)?.solution(problem) {
        Some(answer) => language.spell(problem, &answer),
        None => Ok(None),
    }
}

/// Plays uniformly random legal tokens until the answer is complete.
///
/// # Panics
/// When any token is legal: such an answer has no end.
pub fn random_answer(mut episode: Box<dyn Episode>, rng: &mut CounterRng) -> Vec<TokenId> {
    let mut answer = Vec::new();
    loop {
        let token = match episode.next() {
            Next::Done => return answer,
            Next::Forced(token) => token,
            Next::Choice(legal) => {
                let legal = bounded(legal);
                legal[rng.below(legal.len() as u64) as usize]
            }
        };
        let legal = episode.push(token);
        debug_assert!(legal, "the episode offered the token");
        answer.push(token);
    }
}

/// Lists complete answers in canonical order: depth first, tokens ascending. This is the blind baseline.
///
/// # Panics
/// When any token is legal.
pub fn enumerate_answers(episode: Box<dyn Episode>) -> impl Iterator<Item = Vec<TokenId>> {
    let mut open = vec![(episode, Vec::new())];
    std::iter::from_fn(move || {
        while let Some((mut episode, mut answer)) = open.pop() {
            match episode.next() {
                Next::Done => return Some(answer),
                Next::Forced(token) => {
                    let legal = episode.push(token);
                    debug_assert!(legal, "a forced token is legal");
                    answer.push(token);
                    open.push((episode, answer));
                }
                Next::Choice(legal) => {
                    for token in bounded(legal).into_iter().rev() {
                        let mut branch = episode.fork();
                        branch.push(token);
                        let mut longer = answer.clone();
                        longer.push(token);
                        open.push((branch, longer));
                    }
                }
            }
        }
        None
    })
}

fn bounded(legal: LegalTokens) -> Vec<TokenId> {
    match legal {
        LegalTokens::Any => {
            panic!(
                "expected an answer language with a set of legal tokens at every choice, got one that allows any token"
            )
        }
        LegalTokens::Only(set) => set.iter().collect(),
    }
}
