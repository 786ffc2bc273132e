//! The verifier: says what each answer is worth and makes training examples of it.
//!
//! [`score`] is a function of the group and its problem's key. It trusts nothing that an actor wrote: verdicts come from
//! the domain's checker, and the masks of examples are derived anew from the domain's grammar. What is trained on as an actor
//! wrote it, [`check_choices`] compares with the grammar; a group that differs has no verdicts.

mod honesty;

use std::collections::{BTreeMap, BTreeSet};
use std::panic::resume_unwind;
use std::sync::Arc;
use std::time::Duration;

use bus::{BEAT_EVERY, Bus, Delivery, run_blocking};
use domains::{Domain, domain};
use language::{Language, trace};
use proto::{
    Aim, Difficulty, Example, Group, KeyedProblem, LabelOrigin, Message, Niche, Problem, ProblemKey, ProblemOrigin,
    Proposal, Refusal, Request, Role, Rollout, ScoredGroup, SetDictionary, Task, TaskKind, TokenId, Verdict,
};
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

pub use honesty::check_choices;

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
    /// The group is none that an actor of ours plays.
    #[error("cannot judge task {task:?}: {reason}")]
    Group {
        /// Which task.
        task: proto::TaskId,
        /// What is wrong with its group.
        reason: String,
    },
}

/// Groups that are being judged.
type Begun = BTreeMap<tokio::task::Id, Arc<Delivery<Group>>>;

/// Groups that are worked on at a time: while one waits for its key or to be sent, others are judged.
const MAX_IN_WORK: usize = 16;

/// How much people are told of what is wrong with a group.
const MAX_REASON_CHARS: usize = 300;

/// How long a verifier that is told to stop goes on with what it has begun.
const FINISH_LIMIT: Duration = Duration::from_secs(5);

/// Scores groups from the bus until told to stop; what is begun then is finished. No task of the run asks for more than
/// `max_rollouts`: a group that says otherwise would only keep the verifier busy.
///
/// # Errors
/// [`Error::Bus`], or [`Error::Group`] for a group that no verifier can judge: a fault, never a verdict. A bus between machines
/// keeps such groups for people to look at, and the verifier goes on.
pub async fn run(
    max_rollouts: u32,
    language: Arc<dyn Language>,
    bus: Arc<dyn Bus>,
    shutdown: CancellationToken,
) -> Result<Summary, Error> {
    let mut summary = Summary::default();
    let mut end = |begun: &mut Begun, judged: Result<(tokio::task::Id, Result<Option<usize>, Error>), JoinError>| {
        let (id, num_verdicts) = judged.unwrap_or_else(|error| resume_unwind(error.into_panic()));
        begun.remove(&id);
        let num_verdicts = num_verdicts?;
        summary.num_groups += u64::from(num_verdicts.is_some());
        summary.num_verdicts += num_verdicts.unwrap_or(0) as u64;
        Ok::<(), Error>(())
    };
    let mut in_work = JoinSet::new();
    let mut begun = Begun::new();
    let mut beats = tokio::time::interval(BEAT_EVERY);
    // Kept over the turns of the loop: a wait that is begun anew each time may never end.
    let mut next = bus.next_group();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => break,
            Some(judged) = in_work.join_next_with_id() => end(&mut begun, judged)?,
            group = &mut next, if in_work.len() < MAX_IN_WORK => {
                next = bus.next_group();
                let group = Arc::new(group?);
                begun.insert(in_work.spawn(judge(max_rollouts, language.clone(), bus.clone(), group.clone())).id(), group);
            }
            _ = beats.tick() => {
                let tasks = begun.values().map(|group| group.message.body.task.id).collect();
                bus.beat(Role::Verifier, tasks).await?;
            }
        }
    }
    drop(next);
    bus.leave().await;
    let finish = async {
        while let Some(judged) = in_work.join_next_with_id().await {
            end(&mut begun, judged)?;
        }
        Ok::<(), Error>(())
    };
    tokio::time::timeout(FINISH_LIMIT, finish).await.unwrap_or(Ok(()))?;
    // What takes longer goes to others.
    for group in begun.into_values() {
        group.hand_back(Duration::ZERO).await?;
    }
    Ok(summary)
}

/// Scores a group and sends it on its way; only then is the group done. Gives the number of verdicts, where there are any.
async fn judge(
    max_rollouts: u32,
    language: Arc<dyn Language>,
    bus: Arc<dyn Bus>,
    delivery: Arc<Delivery<Group>>,
) -> Result<Option<usize>, Error> {
    let group = &delivery.message.body;
    let task = group.task.id;
    let key = match group.task.request {
        Request::Solve { has_key: true, .. } => match bus.get_key(task).await {
            Ok(key) => Some(key),
            Err(error @ bus::Error::NoKey { .. }) => {
                // Its batch is over, or the store is lost; then the learner asks again, and stores the key again.
                tracing::debug!(%error, "a group is passed over");
                delivery.acknowledge().await?;
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        },
        _ => None,
    };
    let num_rollouts = group.task.num_rollouts;
    let judged = match group.check(language.vocabulary_size()) {
        Ok(()) if num_rollouts <= max_rollouts => {
            // It may take long; what is taken is kept, and others are judged, meanwhile.
            let group = group.clone();
            let scored = run_blocking(move || {
                check_choices(language.as_ref(), &group)?;
                score(language.as_ref(), group, key.as_ref()).map_err(|error| error.to_string())
            });
            scored.await
        }
        Ok(()) => Err(format!("expected up to {max_rollouts} rollouts, as the run asks for, got {num_rollouts}")),
        Err(reason) => Err(reason),
    };
    let scored = match judged {
        Ok(scored) => scored,
        Err(reason) => return refuse(bus.as_ref(), &delivery, reason).await,
    };
    let num_verdicts = scored.verdicts.len();
    match bus.publish_scored(delivery.message.reply(scored)).await {
        Err(error @ bus::Error::TooLarge { .. }) => return refuse(bus.as_ref(), &delivery, error.to_string()).await,
        published => published?,
    }
    delivery.acknowledge().await?;
    Ok(Some(num_verdicts))
}

/// Has a group set aside of which nothing can be made: its actor is hostile, or broken. The learner asks for its task again.
async fn refuse(bus: &dyn Bus, delivery: &Delivery<Group>, reason: String) -> Result<Option<usize>, Error> {
    let Message { envelope, body: Group { task: Task { id: task, .. }, .. } } = &delivery.message;
    let task = *task;
    // It may quote the group, which may be large.
    let reason: String = reason.chars().take(MAX_REASON_CHARS).collect();
    if !delivery.set_aside().await {
        return Err(Error::Group { task, reason });
    }
    let actor = &envelope.played_by;
    tracing::warn!(actor, ?task, reason, "a group that cannot be judged is set aside");
    bus.refuse(Refusal { envelope: envelope.clone(), task, reason }).await?;
    Ok(None)
}

/// Judges every rollout of a group, and makes examples of those that solve something exactly, or problems of those that
/// wrote one. What was sampled stays as it is; prompts are written anew.
///
/// # Errors
/// When the group's problem is not of its domain, or the domain cannot be asked in the language.
pub fn score(language: &dyn Language, group: Group, key: Option<&ProblemKey>) -> Result<ScoredGroup, language::Error> {
    let domain = domain(group.task.request.domain())?.as_ref();
    match group.task.request.clone() {
        Request::Solve { problem, origin, .. } => {
            score_answers(Examples::none(language, domain, origin), group, &problem, key)
        }
        Request::Propose { niche, .. } => score_proposals(language, domain, group, niche),
    }
}

fn score_answers(
    mut examples: Examples<'_>,
    group: Group,
    problem: &Problem,
    key: Option<&ProblemKey>,
) -> Result<ScoredGroup, language::Error> {
    let Examples { language, domain, .. } = examples;
    let request = &group.task.request;
    let mut verdicts = Vec::with_capacity(group.rollouts.len());
    for Rollout { tokens, .. } in &group.rollouts {
        // What is not complete is no answer.
        let Some(text) = language.text(request, tokens)? else {
            verdicts.push(Verdict::Malformed);
            continue;
        };
        let verdict = domain.judge(problem, key, &text)?.verdict;
        verdicts.push(verdict);
        if group.task.id.kind == TaskKind::Train {
            examples.learn_from(problem, Answer { tokens, text: &text }, verdict)?;
        }
    }
    Ok(ScoredGroup {
        prompt: language.open(request)?.prompt().to_vec(),
        niche: domain.niche(problem, key)?,
        aim: domain.aim(problem, None)?,
        verdicts,
        example_sets: examples.sets.into_sets(),
        examples: examples.made,
        proposals: Vec::new(),
        group,
    })
}

/// Training examples in the making.
struct Examples<'a> {
    language: &'a dyn Language,
    domain: &'a dyn Domain,
    /// Who wrote the problem that was posed.
    origin: ProblemOrigin,
    /// Problems that a machine has answered already.
    executed: BTreeSet<String>,
    sets: SetDictionary,
    made: Vec<Example>,
}

/// An answer as it was sampled, and as its checker reads it.
#[derive(Clone, Copy)]
struct Answer<'a> {
    tokens: &'a [TokenId],
    text: &'a str,
}

impl<'a> Examples<'a> {
    fn none(language: &'a dyn Language, domain: &'a dyn Domain, origin: ProblemOrigin) -> Examples<'a> {
        let (executed, sets, made) = (BTreeSet::new(), SetDictionary::default(), Vec::new());
        Examples { language, domain, origin, executed, sets, made }
    }

    /// Adds what an answer teaches: the problem that it solves, and what running it settles.
    fn learn_from(&mut self, problem: &Problem, answer: Answer<'_>, verdict: Verdict) -> Result<(), language::Error> {
        if verdict == Verdict::Correct {
            self.add(problem, answer, LabelOrigin::Solved)?;
        } else if let Some(solved) = self.domain.hindsight(problem, answer.text)?.filter(|solved| solved != problem) {
            // Not the problem itself: its key may know better than what it shows.
            self.add(&solved, answer, LabelOrigin::Hindsight)?;
        }
        for (settled, text) in self.domain.executions(problem, answer.text)? {
            let is_solved_here = verdict == Verdict::Correct && settled == *problem;
            if !is_solved_here && self.executed.insert(settled.text.clone()) {
                let Some(tokens) = self.language.spell(&settled, &text)? else { continue };
                self.add(&settled, Answer { tokens: &tokens, text: &text }, LabelOrigin::Executor)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, problem: &Problem, answer: Answer<'_>, label_origin: LabelOrigin) -> Result<(), language::Error> {
        if self.domain.is_exam(problem) {
            return Ok(());
        }
        let request = Request::Solve { problem: problem.clone(), origin: self.origin, has_key: false };
        let episode = self.language.open(&request)?;
        let prompt = episode.prompt().to_vec();
        let Some(choices) = trace(episode, answer.tokens, &mut self.sets) else { return Ok(()) };
        if !choices.is_empty() {
            self.made.push(Example {
                prompt,
                answer: answer.tokens.to_vec(),
                choices,
                problem_origin: self.origin,
                label_origin,
                aim: self.domain.aim(problem, Some(answer.text))?,
            });
        }
        Ok(())
    }
}

fn score_proposals(
    language: &dyn Language,
    domain: &dyn Domain,
    group: Group,
    niche: Niche,
) -> Result<ScoredGroup, language::Error> {
    let request = &group.task.request;
    let prompt = language.open(request)?.prompt().to_vec();
    let mut sets = SetDictionary::default();
    let mut verdicts = Vec::with_capacity(group.rollouts.len());
    let mut proposals = Vec::new();
    for (number, rollout) in group.rollouts.iter().enumerate() {
        let text = language.text(request, &rollout.tokens)?;
        let admitted = text.and_then(|text| domain.admit(niche, &text));
        verdicts.push(if admitted.is_some() { Verdict::Correct } else { Verdict::Incorrect });
        let Some(keyed) = admitted else { continue };
        let KeyedProblem { problem, key } = &keyed;
        let niche = domain.niche(problem, key.as_ref())?;
        // As if it had been asked for that niche; how hard it is to be binds nothing.
        let request = Request::Propose { domain: domain.name().to_owned(), niche, difficulty: Difficulty::Hard };
        let Some(choices) = trace(language.open(&request)?, &rollout.tokens, &mut sets) else { continue };
        proposals.push(Proposal { rollout: number as u32, keyed, niche, choices });
    }
    let example_sets = sets.into_sets();
    let aim = Aim { level: domain.level_of(niche), goal: niche.0 };
    Ok(ScoredGroup { prompt, niche, aim, verdicts, example_sets, examples: Vec::new(), proposals, group })
}
