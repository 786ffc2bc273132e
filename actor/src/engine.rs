//! Batched play: threads that each advance many rollouts by one forward pass at a time.

mod slots;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_channel::{Receiver, Sender, TryRecvError, unbounded};
use language::{Episode, Language, Next};
use policy::{Draw, Policy, ThreadPool};
use proto::{
    Behavior, Choices, CounterRng, Group, LegalTokens, Purpose, Rollout, SetDictionary, StopReason, Task, TaskKind,
    TokenId, TokenSet, VersionSpan,
};
use tokio::sync::mpsc;

use self::slots::Slots;
use crate::{Config, Error};

/// Threads that play rollouts. They end when the engine is dropped.
#[derive(Debug)]
pub struct Engine {
    jobs: Sender<Job>,
    newest: Newest,
    num_fed: Arc<AtomicU64>,
}

/// A version of the weights, on the device that plays it.
#[derive(Clone, Debug)]
pub struct LoadedVersion {
    /// The step after which it was published.
    pub policy_version: u64,
    /// The weights.
    pub weights: policy::Weights,
}

/// The newest version of a free-running run.
type Newest = Arc<Mutex<Option<LoadedVersion>>>;

type GroupSender = mpsc::UnboundedSender<Result<Group, Error>>;
/// Receives finished groups.
pub(crate) type GroupReceiver = mpsc::UnboundedReceiver<Result<Group, Error>>;

/// One rollout to play.
#[derive(Clone, Debug)]
struct Job {
    group: Arc<OpenGroup>,
    attempt: usize,
    /// The version available when it was submitted.
    version: LoadedVersion,
}

/// A group whose rollouts are still being played.
#[derive(Debug)]
struct OpenGroup {
    task: Task,
    played: Mutex<Vec<Option<Played>>>,
}

/// A rollout whose sets are not yet entered in the group's dictionary.
#[derive(Debug)]
struct Played {
    tokens: Vec<TokenId>,
    choices: Vec<(usize, LegalTokens)>,
    logprobs: Vec<f32>,
    stop: StopReason,
    versions: Vec<VersionSpan>,
}

impl Engine {
    /// Starts the threads, as many as the device plays with. The receiver returns each group when it is finished, and the error
    /// or panic of a thread.
    pub fn start(config: Config, language: Arc<dyn Language>) -> (Engine, GroupReceiver) {
        let (jobs, job_receiver) = unbounded();
        let (groups, group_receiver) = mpsc::unbounded_channel();
        let newest = Newest::default();
        let num_fed = Arc::<AtomicU64>::default();
        let num_threads = config.backend.num_playing_threads(config.num_threads.max(1));
        let slots_per_thread = config.num_slots.div_ceil(num_threads).max(1);
        // What a thread without rollouts leaves idle helps another.
        let pool = ThreadPool::new(num_threads);
        for index in 0..num_threads {
            let (jobs, groups, newest) = (job_receiver.clone(), groups.clone(), newest.clone());
            let (language, num_fed, pool) = (language.clone(), num_fed.clone(), pool.clone());
            let thread = format!("actor-{index}");
            let name = thread.clone();
            let play = move || {
                let play = || play(language.as_ref(), &jobs, &newest, &groups, (slots_per_thread, &pool), num_fed);
                let failed = match catch_unwind(AssertUnwindSafe(play)) {
                    Ok(Ok(())) => return,
                    Ok(Err(error)) => Error::Policy { thread, source: error },
                    Err(panic) => Error::Panicked { thread, text: text_of(panic.as_ref()) },
                };
                drop(groups.send(Err(failed)));
            };
            std::thread::Builder::new().name(name).spawn(play).expect("could not start a thread");
        }
        (Engine { jobs, newest, num_fed }, group_receiver)
    }

    /// Returns the number of tokens that the network has read: those of every sequence but its last, less what rollouts took over
    /// from others that begin with the same tokens.
    pub fn num_fed(&self) -> u64 {
        self.num_fed.load(Ordering::Relaxed)
    }

    /// Announces a version, which free-running rollouts use from the next token on.
    pub fn announce(&self, version: LoadedVersion) {
        *self.newest.lock().unwrap_or_else(PoisonError::into_inner) = Some(version);
    }

    /// Queues the rollouts of a task.
    ///
    /// # Errors
    /// [`Error::EngineStopped`] when the threads have ended.
    pub fn submit(&self, task: Task, version: LoadedVersion) -> Result<(), Error> {
        let num_rollouts = task.num_rollouts as usize;
        let played = Mutex::new((0..num_rollouts).map(|_| None).collect());
        let group = Arc::new(OpenGroup { task, played });
        for attempt in 0..num_rollouts {
            let job = Job { group: group.clone(), attempt, version: version.clone() };
            self.jobs.send(job).map_err(|_| Error::EngineStopped)?;
        }
        Ok(())
    }
}

/// Returns the message of a panic.
fn text_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("no message").to_owned()
}

/// A rollout that is being played.
struct Active {
    job: Job,
    episode: Box<dyn Episode>,
    rng: CounterRng,
    played: Played,
    /// Tokens that the network has not seen yet.
    pending: Vec<TokenId>,
    /// Legal next tokens.
    legal: LegalTokens,
}

/// Largest cache that a thread keeps while it has nothing to play. A learner in the same process needs the memory meanwhile.
const IDLE_CACHE_BYTES: usize = 64 << 20;

/// Runs the loop of one thread: begins rollouts, runs the network once, draws one token for each rollout that it was run for.
fn play(
    language: &dyn Language,
    jobs: &Receiver<Job>,
    newest: &Newest,
    groups: &GroupSender,
    (num_slots, pool): (usize, &ThreadPool),
    num_fed: Arc<AtomicU64>,
) -> Result<(), policy::Error> {
    let mut slots = Slots::new(num_slots, num_fed);
    let mut playing: Option<(LoadedVersion, Box<dyn Policy>)> = None;
    let mut held: Option<Job> = None;
    loop {
        if let Some((version, policy)) = &mut playing
            && !slots.is_empty()
            && let Some(newer) = newer(newest, version.policy_version)
            && slots.rollouts().all(|active| active.job.group.task.free_running)
        {
            policy.set_weights(&newer.weights)?;
            slots.begin_again(newer.policy_version);
            *version = newer;
        }
        let cache_bytes = |policy: &dyn Policy| num_slots * policy.config().cache_bytes();
        let is_large = playing.as_ref().is_some_and(|(_, policy)| cache_bytes(policy.as_ref()) > IDLE_CACHE_BYTES);
        if slots.is_empty() && held.is_none() && jobs.is_empty() && is_large {
            playing = None;
        }
        while !slots.is_full() {
            let job = match held.take().map_or_else(|| next_job(jobs, !slots.is_empty()), Ok) {
                Ok(job) => job,
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return Ok(()),
            };
            let wanted = job.version(newest);
            let policy_version = wanted.policy_version;
            let policy = match &mut playing {
                Some((version, policy)) if version.weights.is_same(&wanted.weights) => policy,
                // Slots of different versions never share a forward pass.
                Some(_) if !slots.is_empty() => {
                    held = Some(job);
                    break;
                }
                Some((version, policy)) => {
                    policy.set_weights(&wanted.weights)?;
                    slots.begin_again(policy_version);
                    *version = wanted;
                    policy
                }
                None => {
                    let policy = wanted.weights.shared_policy(num_slots, pool)?;
                    // A cache that was dropped held what the slots say that they hold.
                    slots.begin_again(policy_version);
                    &mut playing.insert((wanted, policy)).1
                }
            };
            match begin(language, job, policy_version, policy.config().max_positions) {
                Begun::Playing(active) => slots.add(active),
                Begun::Over(Some(group)) => drop(groups.send(Ok(group))),
                Begun::Over(None) => {}
                Begun::Failed(error) => drop(groups.send(Err(error))),
            }
        }
        if slots.is_empty() {
            continue;
        }
        let (_, policy) = playing.as_mut().expect("a version is being played");
        slots.feed(policy.as_mut())?;
        let drawn = policy.sample(&mut slots.draws())?;
        for Active { job, played, .. } in slots.choose(drawn) {
            if let Some(group) = job.group.clone().finish(job.attempt, played) {
                drop(groups.send(Ok(group)));
            }
        }
    }
}

fn next_job(jobs: &Receiver<Job>, busy: bool) -> Result<Job, TryRecvError> {
    if busy { jobs.try_recv() } else { jobs.recv().map_err(|_| TryRecvError::Disconnected) }
}

/// Returns the newest version, if it is newer than this one.
fn newer(newest: &Newest, policy_version: u64) -> Option<LoadedVersion> {
    let newest = newest.lock().unwrap_or_else(PoisonError::into_inner);
    newest.as_ref().filter(|newest| newest.policy_version > policy_version).cloned()
}

impl Job {
    /// Returns the version to begin with.
    fn version(&self, newest: &Newest) -> LoadedVersion {
        let newer = self.group.task.free_running.then(|| newer(newest, self.version.policy_version)).flatten();
        newer.unwrap_or_else(|| self.version.clone())
    }
}

/// A job that was started.
enum Begun {
    /// The network chooses its next token.
    Playing(Box<Active>),
    /// It ended without the network. Holds its group, if that is complete.
    Over(Option<Group>),
    Failed(Error),
}

/// Opens a rollout and plays it until it needs the network.
fn begin(language: &dyn Language, job: Job, policy_version: u64, max_positions: usize) -> Begun {
    match open(language, job, policy_version, max_positions) {
        Ok(mut active) => {
            let solution = match script(language, &active.job.group.task) {
                Ok(solution) => solution,
                Err(error) => return Begun::Failed(error),
            };
            let mut over = active.advance();
            while !over {
                let (token, logprob) = match active.job.group.task.sampling.behavior {
                    Behavior::Policy => break,
                    Behavior::UniformLegal => {
                        draw_uniformly(&active.legal, language.vocabulary_size(), &mut active.rng)
                    }
                    Behavior::Solver => (solution[active.played.tokens.len()], 0.0),
                };
                over = active.choose(token, logprob);
            }
            match over {
                true => Begun::Over(active.job.group.clone().finish(active.job.attempt, active.played)),
                false => Begun::Playing(Box::new(active)),
            }
        }
        Err(error) => Begun::Failed(error),
    }
}

fn open(language: &dyn Language, job: Job, policy_version: u64, max_positions: usize) -> Result<Active, Error> {
    let task = &job.group.task;
    let fail = |reason: String| Error::Task { task: task.id, reason };
    let episode = language.open(&task.request).map_err(|error| fail(error.to_string()))?;
    let needed = episode.prompt().len() + task.max_tokens as usize;
    if needed > max_positions {
        let (prompt, answer) = (episode.prompt().len(), task.max_tokens);
        return Err(fail(format!(
            "expected prompt and answer within model.max_positions = {max_positions}, got {prompt} + {answer}"
        )));
    }
    let purpose = match task.id.kind {
        TaskKind::Train => Purpose::Rollout,
        TaskKind::Evaluate => Purpose::Evaluation,
    };
    let rng = CounterRng::new(task.seed, purpose, task.id.batch, u64::from(task.id.index), job.attempt as u64);
    let versions = vec![VersionSpan { first_token: 0, policy_version }];
    let (tokens, choices, logprobs) = (Vec::new(), Vec::new(), Vec::new());
    let played = Played { tokens, choices, logprobs, stop: StopReason::Complete, versions };
    let legal = LegalTokens::Only(TokenSet::default());
    Ok(Active { pending: episode.prompt().to_vec(), episode, rng, played, legal, job })
}

/// Returns the tokens that the solver of the task's domain answers with; none if the task has another behaviour.
fn script(language: &dyn Language, task: &Task) -> Result<Vec<TokenId>, Error> {
    if task.sampling.behavior != Behavior::Solver {
        return Ok(Vec::new());
    }
    let fail = |reason: String| Error::Task { task: task.id, reason };
    let problem =
        task.request.problem().ok_or_else(|| fail("expected a problem to solve, got a request for one".to_owned()))?;
    let found = language::solution(language, problem).map_err(|error| fail(error.to_string()))?;
    found.ok_or_else(|| fail(format!("expected a problem that its domain solves, got {:?}", problem.text)))
}

/// Draws a legal token uniformly and returns it with its log-probability.
fn draw_uniformly(legal: &LegalTokens, vocabulary_size: usize, rng: &mut CounterRng) -> (TokenId, f32) {
    let num_legal = match legal {
        LegalTokens::Any => vocabulary_size,
        LegalTokens::Only(set) => set.len(),
    };
    let place = rng.below(num_legal as u64) as usize;
    let token = match legal {
        LegalTokens::Any => place as TokenId,
        LegalTokens::Only(set) => set.iter().nth(place).expect("a choice has tokens"),
    };
    (token, -libm::logf(num_legal as f32))
}

impl Active {
    /// Returns the draw of the next token, after a feed.
    fn draw(&mut self, feed: usize) -> Draw<'_> {
        let temperature = self.job.group.task.sampling.temperature;
        Draw { feed, legal: &self.legal, temperature, rng: &mut self.rng }
    }

    /// Appends a chosen token and the tokens that it forces. Returns whether the rollout is over.
    fn choose(&mut self, token: TokenId, logprob: f32) -> bool {
        let legal = std::mem::replace(&mut self.legal, LegalTokens::Only(TokenSet::default()));
        self.played.choices.push((self.played.tokens.len(), legal));
        self.played.logprobs.push(logprob);
        self.pending.clear();
        self.append(token);
        self.advance()
    }

    /// Appends forced tokens up to the next choice. Returns whether the rollout is over.
    fn advance(&mut self) -> bool {
        loop {
            match self.episode.next() {
                Next::Done => return true,
                _ if self.played.tokens.len() >= self.job.group.task.max_tokens as usize => {
                    self.played.stop = StopReason::Length;
                    return true;
                }
                Next::Forced(token) => self.append(token),
                Next::Choice(legal) => {
                    self.legal = legal;
                    return false;
                }
            }
        }
    }

    /// Switches to newer weights, which must read the whole sequence again.
    fn go_on_with(&mut self, policy_version: u64) {
        let Played { tokens, choices, versions, .. } = &mut self.played;
        let last = versions.last_mut().expect("a rollout begins with a version");
        let has_drawn = choices.last().is_some_and(|(position, _)| *position >= last.first_token as usize);
        if last.policy_version < policy_version {
            match has_drawn {
                true => versions.push(VersionSpan { first_token: tokens.len() as u32, policy_version }),
                false => last.policy_version = policy_version,
            }
        }
        self.pending.clear();
        self.pending.extend(self.episode.prompt().iter().chain(tokens.iter()));
    }

    fn append(&mut self, token: TokenId) {
        let legal = self.episode.push(token);
        debug_assert!(legal, "the episode offered the token");
        self.played.tokens.push(token);
        self.pending.push(token);
    }
}

impl OpenGroup {
    /// Records a finished rollout. Returns the group if it was the last one.
    fn finish(self: Arc<OpenGroup>, attempt: usize, rollout: Played) -> Option<Group> {
        let mut played = self.played.lock().unwrap_or_else(PoisonError::into_inner);
        played[attempt] = Some(rollout);
        if played.iter().any(Option::is_none) {
            return None;
        }
        let mut sets = SetDictionary::default();
        let rollouts = played
            .drain(..)
            .flatten()
            .map(|Played { tokens, choices, logprobs, stop, versions }| {
                let choices = choices.into_iter().map(|(position, legal)| (position, sets.refer(legal)));
                let choices = Choices::new(tokens.len(), choices);
                Rollout { tokens, choices, logprobs, values: None, search: None, stop, versions }
            })
            .collect();
        Some(Group { task: self.task.clone(), sets: sets.into_sets(), rollouts })
    }
}
