//! The verifier: says what each answer is worth and makes training examples of it.
//!
//! [`score`] is a function of the group alone. It trusts nothing that an actor wrote: verdicts come from the domain's
//! checker, and the masks of examples are derived anew from the domain's grammar.

use std::sync::Arc;

use bus::Bus;
use domains::{Domain, MaskDictionary, domain, trace};
use proto::{Example, Group, LabelOrigin, Problem, ScoredGroup, Task, TaskKind, Token, Verdict};
use tokio_util::sync::CancellationToken;

/// What a verifier did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Groups scored.
    pub num_groups: u64,
    /// Answers judged.
    pub num_verdicts: u64,
}

/// What can go wrong in a verifier.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bus failed.
    #[error(transparent)]
    Bus(#[from] bus::Error),
    /// The group's problem is not one of ours.
    #[error("cannot judge task {task:?}")]
    Problem {
        /// Which task.
        task: proto::TaskId,
        /// What is wrong with its problem.
        source: domains::Error,
    },
}

/// Scores groups from the bus until told to stop.
///
/// # Errors
/// [`Error::Bus`], or [`Error::Problem`] for a task that no verifier can judge: a fault, never a verdict.
pub async fn run(bus: Arc<dyn Bus>, shutdown: CancellationToken) -> Result<Summary, Error> {
    let mut summary = Summary::default();
    loop {
        let group = tokio::select! {
            () = shutdown.cancelled() => return Ok(summary),
            group = bus.next_group() => group?,
        };
        let task = group.task.id;
        let scored = score(group).map_err(|source| Error::Problem { task, source })?;
        summary.num_groups += 1;
        summary.num_verdicts += scored.verdicts.len() as u64;
        bus.publish_scored(scored).await?;
    }
}

/// Judges every rollout of a group and makes examples of those that solve something exactly.
///
/// # Errors
/// When the group's problem is not in its domain's language.
pub fn score(group: Group) -> Result<ScoredGroup, domains::Error> {
    let task = &group.task;
    let domain = domain(&task.problem.domain)?.as_ref();
    let mut masks = MaskDictionary::default();
    let mut verdicts = Vec::with_capacity(group.rollouts.len());
    let mut examples = Vec::new();
    for rollout in &group.rollouts {
        let verdict = domain.judge(&task.problem, &rollout.tokens)?;
        verdicts.push(verdict);
        if task.id.kind == TaskKind::Solve {
            examples.extend(example(domain, task, &rollout.tokens, verdict, &mut masks)?);
        }
    }
    let prompt = domain.prompt(&task.problem)?;
    Ok(ScoredGroup { prompt, verdicts, example_masks: masks.into_masks(), examples, group })
}

fn example(
    domain: &dyn Domain,
    task: &Task,
    answer: &[Token],
    verdict: Verdict,
    masks: &mut MaskDictionary,
) -> Result<Option<Example>, domains::Error> {
    let (problem, label_origin): (Problem, _) = match verdict {
        Verdict::Correct => (task.problem.clone(), LabelOrigin::Solved),
        _ => match domain.hindsight(&task.problem, answer)? {
            Some(problem) => (problem, LabelOrigin::Hindsight),
            None => return Ok(None),
        },
    };
    if domain.is_exam(&problem) {
        return Ok(None);
    }
    let Some(choices) = trace(domain.grammar(&problem)?, answer, masks) else { return Ok(None) };
    Ok((!choices.is_empty()).then_some(Example {
        prompt: domain.prompt(&problem)?,
        answer: answer.to_vec(),
        choices,
        problem_origin: task.origin,
        label_origin,
        goal: domain.goal(&problem)?,
    }))
}
