//! The verifier: judges each answer and makes training examples from it.
//!
//! [`score`] is a function of the group and its problem's key. It trusts nothing that an actor wrote: verdicts come from the
//! domain's checker, and the masks of examples are derived anew from the domain's grammar. [`check_choices`] compares the data
//! that is trained on as an actor wrote it with the grammar. A group that differs has no verdicts.

mod honesty;

use std::collections::{BTreeMap, BTreeSet};
use std::panic::resume_unwind;
use std::sync::Arc;
use std::time::Duration;

use bus::{BEAT_EVERY, Bus, Delivery, run_blocking};
use domains::{Domain, domain};
use language::{Language, trace};
use proto::{
    BalanceKey, Difficulty, Example, Group, KeyedProblem, LabelOrigin, Message, Niche, Problem, ProblemKey,
    ProblemOrigin, Proposal, Refusal, RefusalCause, Request, Role, Rollout, ScoredGroup, SetDictionary, Task, TaskKind,
    TokenId, Verdict,
};
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

pub use honesty::check_choices;

/// Counts of a verifier's work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Groups scored.
    pub num_groups: u64,
    /// Answers judged.
    pub num_verdicts: u64,
}

/// Errors of a verifier.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bus failed.
    #[error(transparent)]
    Bus(#[from] bus::Error),
    /// The group cannot come from a correct actor.
    #[error("could not score the group of task {task:?}: {reason}")]
    Group {
        /// The task.
        task: proto::TaskId,
        /// Why its group cannot be judged.
        reason: String,
    },
}

/// Judges groups in a set of domains and a language.
#[derive(Clone)]
pub struct Judge {
    /// Domains that it knows.
    pub domains: Vec<Arc<dyn Domain>>,
    /// The language that groups are written in.
    pub language: Arc<dyn Language>,
    /// The most rollouts that a task of the run asks for. Larger groups are refused: they would only keep the verifier busy.
    pub max_rollouts: u32,
}

impl Judge {
    /// Builds a judge for every domain of the registry.
    pub fn new(language: Arc<dyn Language>, max_rollouts: u32) -> Judge {
        Judge { domains: domains::registry().to_vec(), language, max_rollouts }
    }
}

/// Why a group has no verdicts.
struct Unjudged {
    cause: RefusalCause,
    reason: String,
}

/// Groups that are being judged.
type Begun = BTreeMap<tokio::task::Id, Arc<Delivery<Group>>>;

/// Maximum number of groups in work: while one waits for its key or for publication, others are judged.
const MAX_IN_WORK: usize = 16;

/// Maximum length of a refusal's reason, in characters.
const MAX_REASON_CHARS: usize = 300;

/// Time limit for judging a group.
const ASK_LIMIT: Duration = Duration::from_secs(60);

/// Delay before a group whose checker did not answer is delivered again.
const CHECKER_PAUSE: Duration = Duration::from_secs(2);

/// How long a verifier that is told to stop works on the groups that it has begun.
const FINISH_LIMIT: Duration = Duration::from_secs(5);

/// Scores groups from the bus until told to stop, then finishes or hands back the groups in work. Hands back a group whose
/// checker is unavailable, and notifies the learner.
///
/// # Errors
/// [`Error::Bus`], or [`Error::Group`] for a group that no verifier can judge: a fault, never a verdict. A bus between machines
/// keeps such groups for inspection, and the verifier continues.
pub async fn run(judge: Judge, bus: Arc<dyn Bus>, shutdown: CancellationToken) -> Result<Summary, Error> {
    let judge = Arc::new(judge);
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
    // Kept across iterations: a wait that restarts in each of them may never end.
    let mut next = bus.next_group();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => break,
            Some(judged) = in_work.join_next_with_id() => end(&mut begun, judged)?,
            group = &mut next, if in_work.len() < MAX_IN_WORK => {
                next = bus.next_group();
                let group = Arc::new(group?);
                begun.insert(in_work.spawn(take(judge.clone(), bus.clone(), group.clone())).id(), group);
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
    // Unfinished groups go to other verifiers.
    for group in begun.into_values() {
        group.hand_back(Duration::ZERO).await?;
    }
    Ok(summary)
}

/// Scores a group, publishes the result, and only then acknowledges the group. Returns the number of verdicts, if it has any.
async fn take(judge: Arc<Judge>, bus: Arc<dyn Bus>, delivery: Arc<Delivery<Group>>) -> Result<Option<usize>, Error> {
    let group = &delivery.message.body;
    let task = group.task.id;
    let key = match group.task.request {
        Request::Solve { has_key: true, .. } => match bus.get_key(task).await {
            Ok(key) => Some(key),
            Err(error @ bus::Error::NoKey { .. }) => {
                // Its batch is over, or the store was lost. If lost, the learner issues the task and stores the key again.
                tracing::debug!(%error, "group skipped");
                delivery.acknowledge().await?;
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        },
        _ => None,
    };
    let scored = match judge.score(group.clone(), key).await {
        Ok(scored) => scored,
        Err(unjudged) => return refuse(bus.as_ref(), &delivery, unjudged).await,
    };
    let num_verdicts = scored.verdicts.len();
    match bus.publish_scored(delivery.message.reply(scored)).await {
        Err(error @ bus::Error::TooLarge { .. }) => {
            return refuse(bus.as_ref(), &delivery, Unjudged::group(error.to_string())).await;
        }
        published => published?,
    }
    delivery.acknowledge().await?;
    Ok(Some(num_verdicts))
}

impl Judge {
    /// Scores a group in a separate thread: it may take long, and other groups are judged meanwhile.
    async fn score(self: Arc<Self>, group: Group, key: Option<ProblemKey>) -> Result<ScoredGroup, Unjudged> {
        group.check(self.language.vocabulary_size()).map_err(Unjudged::group)?;
        let (max_rollouts, num_rollouts) = (self.max_rollouts, group.task.num_rollouts);
        if num_rollouts > max_rollouts {
            let reason = format!("expected up to {max_rollouts} rollouts, as the run asks for, got {num_rollouts}");
            return Err(Unjudged::group(reason));
        }
        let name = group.task.request.domain().to_owned();
        let scored = run_blocking(move || {
            check_choices(self.language.as_ref(), &group).map_err(Unjudged::group)?;
            let domain = self.domains.iter().find(|domain| domain.name() == group.task.request.domain());
            let unknown = || Unjudged::group(format!("expected a known domain, got {}", group.task.request.domain()));
            let domain = domain.ok_or_else(unknown)?.clone();
            score_in(domain.as_ref(), self.language.as_ref(), group, key.as_ref()).map_err(Unjudged::from)
        });
        let unavailable = |_| Unjudged {
            cause: RefusalCause::CheckerUnavailable,
            reason: format!("the checker of {name} gave no verdicts within {} s", ASK_LIMIT.as_secs()),
        };
        tokio::time::timeout(ASK_LIMIT, scored).await.map_err(unavailable).flatten()
    }
}

impl Unjudged {
    fn group(reason: String) -> Unjudged {
        Unjudged { cause: RefusalCause::Group, reason }
    }
}

impl From<language::Error> for Unjudged {
    fn from(error: language::Error) -> Unjudged {
        let cause = match error {
            language::Error::Domain(domains::Error::Unavailable { .. }) => RefusalCause::CheckerUnavailable,
            _ => RefusalCause::Group,
        };
        Unjudged { cause, reason: error.to_string() }
    }
}

/// Reports to the learner that a group has no verdicts. Sets an invalid group aside: its actor is hostile or broken, and the
/// learner issues its task again. Hands back a group whose checker is unavailable, to be judged later.
async fn refuse(bus: &dyn Bus, delivery: &Delivery<Group>, unjudged: Unjudged) -> Result<Option<usize>, Error> {
    let Message { envelope, body: Group { task: Task { id: task, .. }, .. } } = &delivery.message;
    let (task, cause) = (*task, unjudged.cause);
    // The reason may quote the group, which may be large.
    let reason: String = unjudged.reason.chars().take(MAX_REASON_CHARS).collect();
    let actor = &envelope.played_by;
    match cause {
        RefusalCause::Group => {
            if !delivery.set_aside().await {
                return Err(Error::Group { task, reason });
            }
            tracing::warn!(actor, ?task, reason, "group could not be scored; moved to the dead-letter stream");
        }
        RefusalCause::CheckerUnavailable => {
            tracing::debug!(?task, reason, "checker unavailable; group handed back for redelivery");
            delivery.hand_back(CHECKER_PAUSE).await?;
        }
    }
    bus.refuse(Refusal { envelope: envelope.clone(), task, cause, reason }).await?;
    Ok(None)
}

/// Judges every rollout of a group. Makes examples from rollouts that solve a problem exactly, and proposals from rollouts that
/// write one. The group itself is unchanged; prompts are written anew.
///
/// # Errors
/// When the group's problem is not valid in its domain, or the language does not support the domain.
pub fn score(language: &dyn Language, group: Group, key: Option<&ProblemKey>) -> Result<ScoredGroup, language::Error> {
    let domain = domain(group.task.request.domain())?;
    score_in(domain.as_ref(), language, group, key)
}

/// Scores a group of the given domain.
fn score_in(
    domain: &dyn Domain,
    language: &dyn Language,
    group: Group,
    key: Option<&ProblemKey>,
) -> Result<ScoredGroup, language::Error> {
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
    // An incomplete answer has no text, and is malformed.
    let texts = group.rollouts.iter().map(|rollout| language.text(request, &rollout.tokens));
    let texts: Vec<Option<String>> = texts.collect::<Result<_, _>>()?;
    let complete: Vec<&str> = texts.iter().flatten().map(String::as_str).collect();
    let mut judged = domain.verdicts(problem, key, &complete)?.into_iter();
    let mut verdicts = Vec::with_capacity(group.rollouts.len());
    for (Rollout { tokens, .. }, text) in group.rollouts.iter().zip(&texts) {
        let Some(text) = text else {
            verdicts.push(Verdict::Malformed);
            continue;
        };
        let verdict = judged.next().expect("every answer has a verdict");
        verdicts.push(verdict);
        if group.task.id.kind == TaskKind::Train {
            examples.learn_from(problem, Answer { tokens, text }, verdict)?;
        }
    }
    Ok(ScoredGroup {
        prompt: language.open(request)?.prompt().to_vec(),
        niche: domain.niche(problem, key)?,
        balance_key: domain.balance_key(problem, None)?,
        verdicts,
        example_sets: examples.sets.into_sets(),
        examples: examples.made,
        proposals: Vec::new(),
        group,
    })
}

/// Builder of training examples.
struct Examples<'a> {
    language: &'a dyn Language,
    domain: &'a dyn Domain,
    /// Who wrote the problem that was posed.
    origin: ProblemOrigin,
    /// Texts of problems that execution has answered already.
    executed: BTreeSet<String>,
    sets: SetDictionary,
    made: Vec<Example>,
}

/// An answer as sampled, and as the text that its checker reads.
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

    /// Adds the examples that an answer yields: the problem that it solves, and the problems that executing it answers.
    fn learn_from(&mut self, problem: &Problem, answer: Answer<'_>, verdict: Verdict) -> Result<(), language::Error> {
        if verdict == Verdict::Correct {
            self.add(problem, answer, LabelOrigin::Solved)?;
        } else if let Some(solved) = self.domain.hindsight(problem, answer.text)?.filter(|solved| solved != problem) {
            // Not the posed problem: its key may know better than what the problem shows.
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
                balance_key: self.domain.balance_key(problem, Some(answer.text))?,
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
        // An incomplete proposal has no text, and is malformed.
        let Some(text) = text else {
            verdicts.push(Verdict::Malformed);
            continue;
        };
        let keyed = match domain.admit(niche, &text)? {
            Ok(keyed) => keyed,
            Err(refused) => {
                verdicts.push(refused.verdict);
                continue;
            }
        };
        verdicts.push(Verdict::Correct);
        let KeyedProblem { problem, key } = &keyed;
        let niche = domain.niche(problem, key.as_ref())?;
        // As if the task had asked for this niche; the difficulty does not constrain the grammar.
        let request = Request::Propose { domain: domain.name().to_owned(), niche, difficulty: Difficulty::Hard };
        let Some(choices) = trace(language.open(&request)?, &rollout.tokens, &mut sets) else { continue };
        proposals.push(Proposal { rollout: number as u32, keyed, niche, choices });
    }
    let example_sets = sets.into_sets();
    let balance_key = BalanceKey { level: domain.level_of(niche), goal: niche.0 };
    Ok(ScoredGroup { prompt, niche, balance_key, verdicts, example_sets, examples: Vec::new(), proposals, group })
}
