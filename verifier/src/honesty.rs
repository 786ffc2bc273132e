//! Checks the choices that an actor reports against the language.

use language::{Episode, Language, Next};
use proto::{Group, Legal, LegalTokens, Rollout, SetDictionary, StopReason, TokenSet};

/// Checks that every token of a group is legal, and that the choices, their positions, their sets and the ends of the rollouts
/// match the language of the task: the policy gradient trains on them unchanged. Expects that [`Group::check`] has passed.
///
/// # Errors
/// A description of the first mismatch.
pub fn check_choices(language: &dyn Language, group: &Group) -> Result<(), String> {
    let Group { task, sets, rollouts } = group;
    let episode = language.open(&task.request).map_err(|error| error.to_string())?;
    let mut dictionary = SetDictionary::default();
    for (number, rollout) in rollouts.iter().enumerate() {
        check_rollout(episode.fork(), rollout, sets, &mut dictionary, task.max_tokens as usize)
            .map_err(|reason| format!("rollout {number}: {reason}"))?;
    }
    let num_used = dictionary.into_sets().len();
    if sets.len() != num_used {
        return Err(format!("expected the {num_used} sets that its choices use, got {}", sets.len()));
    }
    Ok(())
}

/// Replays a rollout in its episode. Enters sets in `dictionary` in order of first use, as actors do.
fn check_rollout(
    mut episode: Box<dyn Episode>,
    rollout: &Rollout,
    sets: &[TokenSet],
    dictionary: &mut SetDictionary,
    max_tokens: usize,
) -> Result<(), String> {
    let mut said = rollout.choices.iter();
    for (position, token) in rollout.tokens.iter().enumerate() {
        if let Next::Choice(legal) = episode.next() {
            let said_legal = match said.next() {
                Some((at, legal)) if at == position => legal,
                Some((other, _)) => {
                    return Err(format!("expected a choice at token {position}, got one at {other}"));
                }
                None => return Err(format!("expected a choice at token {position}, got none")),
            };
            if let Legal::Set(set) = said_legal
                && set as usize >= sets.len()
            {
                return Err(format!("expected one of the {} sets at token {position}, got set {set}", sets.len()));
            }
            let said_tokens = said_legal.tokens(sets);
            if said_tokens != legal {
                let [expected, got] = [&legal, &said_tokens].map(describe);
                return Err(format!(
                    "expected the language's legal tokens at token {position} ({expected}), got {got}"
                ));
            }
            if dictionary.refer(legal) != said_legal {
                return Err(format!("expected sets in order of first use, got {said_legal:?} at token {position}"));
            }
        }
        if !episode.push(*token) {
            return Err(format!("expected a legal token at position {position}, got {token}"));
        }
    }
    if let Some((position, _)) = said.next() {
        return Err(format!("expected no choice at token {position}, which is forced, got one"));
    }
    let is_complete = episode.next() == Next::Done;
    match rollout.stop {
        StopReason::Complete if !is_complete => Err("expected a complete answer, got an incomplete one".to_owned()),
        StopReason::Length if is_complete => Err("expected a truncated answer, got a complete one".to_owned()),
        StopReason::Length if rollout.tokens.len() < max_tokens => {
            Err(format!("expected {max_tokens} tokens in a truncated answer, got {}", rollout.tokens.len()))
        }
        _ => Ok(()),
    }
}

fn describe(legal: &LegalTokens) -> String {
    match legal {
        LegalTokens::Any => "any token".to_owned(),
        LegalTokens::Only(set) => format!("a set of {} tokens", set.len()),
    }
}
