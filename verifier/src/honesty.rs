//! Whether what an actor says of its choices is what the language says of the same tokens.

use domains::{Grammar, MaskDictionary, Next, domain};
use proto::{ActionMask, Group, Request, Rollout, StopReason};

/// Checks that every token of a group is legal, and that choices, their positions, their masks and the ends of the rollouts are
/// those of the language that its task asks for: the policy gradient trains on them as they are. [`Group::check`] has passed.
///
/// # Errors
/// In words, the first thing that is not as the language says.
pub fn check_choices(group: &Group) -> Result<(), String> {
    let Group { task, masks, rollouts } = group;
    let domain = domain(task.request.domain()).map_err(|error| error.to_string())?;
    let grammar = match &task.request {
        Request::Solve { problem, .. } => domain.grammar(problem).map_err(|error| error.to_string())?,
        Request::Propose { niche, .. } => domain.proposal_grammar(*niche),
    };
    let mut dictionary = MaskDictionary::default();
    for (number, rollout) in rollouts.iter().enumerate() {
        check_rollout(grammar.fork(), rollout, masks, &mut dictionary, task.max_tokens as usize)
            .map_err(|reason| format!("rollout {number}: {reason}"))?;
    }
    let num_used = dictionary.into_masks().len();
    if masks.len() != num_used {
        return Err(format!("expected the {num_used} masks that its choices use, got {}", masks.len()));
    }
    Ok(())
}

/// Walks a rollout through its language. Masks are entered in `dictionary` in order of first use, as actors do.
fn check_rollout(
    mut grammar: Box<dyn Grammar>,
    rollout: &Rollout,
    masks: &[ActionMask],
    dictionary: &mut MaskDictionary,
    max_tokens: usize,
) -> Result<(), String> {
    let mut said = rollout.choices.iter();
    for (position, token) in rollout.tokens.iter().enumerate() {
        if let Next::Choice(mask) = grammar.next() {
            let choice = match said.next() {
                Some(choice) if usize::from(choice.position) == position => choice,
                Some(other) => {
                    return Err(format!("expected a choice of token {position}, got one of {}", other.position));
                }
                None => return Err(format!("expected a choice of token {position}, got none")),
            };
            let said_mask = masks.get(usize::from(choice.mask)).copied().unwrap_or_default();
            if said_mask != mask {
                let [expected, got] = [mask, said_mask].map(|mask| mask.len());
                return Err(format!(
                    "expected the language's mask of {expected} tokens for token {position}, got another, of {got}"
                ));
            }
            if dictionary.index_of(mask) != choice.mask {
                return Err(format!(
                    "expected masks in order of first use, got mask {} for token {position}",
                    choice.mask
                ));
            }
        }
        if !grammar.push(*token) {
            return Err(format!("expected a legal token {position}, got {token}"));
        }
    }
    if let Some(choice) = said.next() {
        return Err(format!("expected no choice of token {}, which is forced, got one", choice.position));
    }
    let is_complete = grammar.next() == Next::Done;
    match rollout.stop {
        StopReason::Complete if !is_complete => Err("expected a complete answer, got the beginning of one".to_owned()),
        StopReason::Length if is_complete => {
            Err("expected an answer that was cut short, got a complete one".to_owned())
        }
        StopReason::Length if rollout.tokens.len() < max_tokens => {
            Err(format!("expected {max_tokens} tokens of an answer that was cut short, got {}", rollout.tokens.len()))
        }
        _ => Ok(()),
    }
}
