//! Batched play: threads that each advance many rollouts by one forward pass at a time.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_channel::{Receiver, Sender, TryRecvError, unbounded};
use language::{Episode, Language, Next};
use policy::{Decoder, Feed, PackedWeights, sample};
use proto::{
    Behavior, Choices, CounterRng, Group, LegalTokens, Purpose, Rollout, SetDictionary, StopReason, Task, TaskKind,
    TokenId, TokenSet, VersionSpan,
};
use tokio::sync::mpsc;

use crate::{Config, Error};

/// Threads that play rollouts. They end when the engine is dropped.
#[derive(Debug)]
pub struct Engine {
    jobs: Sender<Job>,
    newest: Newest,
}

/// Weights, and the step after which they were published.
#[derive(Clone, Debug)]
pub struct Weights {
    /// The step.
    pub policy_version: u64,
    /// The weights.
    pub packed: Arc<PackedWeights>,
}

/// The newest weights of a free-running run.
type Newest = Arc<Mutex<Option<Weights>>>;

type GroupSender = mpsc::UnboundedSender<Result<Group, Error>>;
/// Where finished groups come out.
pub(crate) type GroupReceiver = mpsc::UnboundedReceiver<Result<Group, Error>>;

/// One rollout to play.
#[derive(Clone, Debug)]
struct Job {
    group: Arc<OpenGroup>,
    attempt: usize,
    /// What was there to play it with when it came.
    weights: Weights,
}

/// A group whose rollouts are still being played.
#[derive(Debug)]
struct OpenGroup {
    task: Task,
    played: Mutex<Vec<Option<Played>>>,
}

/// A rollout, its sets not yet entered in the group's dictionary.
#[derive(Debug)]
struct Played {
    tokens: Vec<TokenId>,
    choices: Vec<(usize, LegalTokens)>,
    logprobs: Vec<f32>,
    stop: StopReason,
    versions: Vec<VersionSpan>,
}

impl Engine {
    /// Starts the threads, which play in a language; groups come out of the receiver as they are finished, and so does the panic of a
    /// thread.
    pub fn start(config: Config, language: Arc<dyn Language>) -> (Engine, GroupReceiver) {
        let (jobs, job_receiver) = unbounded();
        let (groups, group_receiver) = mpsc::unbounded_channel();
        let newest = Newest::default();
        let num_threads = config.num_threads.max(1);
        let slots_per_thread = config.num_slots.div_ceil(num_threads).max(1);
        for index in 0..num_threads {
            let (jobs, groups, newest) = (job_receiver.clone(), groups.clone(), newest.clone());
            let language = language.clone();
            let thread = format!("actor-{index}");
            let name = thread.clone();
            let play = move || {
                let play = || play(language.as_ref(), &jobs, &newest, &groups, slots_per_thread);
                let played = catch_unwind(AssertUnwindSafe(play));
                if let Err(panic) = played {
                    drop(groups.send(Err(Error::Panicked { thread, text: text_of(panic.as_ref()) })));
                }
            };
            std::thread::Builder::new().name(name).spawn(play).expect("the system can start a thread");
        }
        (Engine { jobs, newest }, group_receiver)
    }

    /// Takes weights for whatever is free-running, from the next token on.
    pub fn announce(&self, weights: Weights) {
        *self.newest.lock().unwrap_or_else(PoisonError::into_inner) = Some(weights);
    }

    /// Takes a task to play.
    ///
    /// # Errors
    /// [`Error::EngineStopped`] when the threads are gone.
    pub fn submit(&self, task: Task, weights: Weights) -> Result<(), Error> {
        let num_rollouts = task.num_rollouts as usize;
        let played = Mutex::new((0..num_rollouts).map(|_| None).collect());
        let group = Arc::new(OpenGroup { task, played });
        for attempt in 0..num_rollouts {
            let job = Job { group: group.clone(), attempt, weights: weights.clone() };
            self.jobs.send(job).map_err(|_| Error::EngineStopped)?;
        }
        Ok(())
    }
}

/// Reads what a thread said when it panicked.
fn text_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("no text").to_owned()
}

/// A rollout in a slot.
struct Active {
    job: Job,
    episode: Box<dyn Episode>,
    rng: CounterRng,
    played: Played,
    /// Tokens that the network has not seen yet.
    pending: Vec<TokenId>,
    /// What is legal next.
    legal: LegalTokens,
}

/// The loop of one thread: fill slots, run the network once, draw one token for each slot.
fn play(language: &dyn Language, jobs: &Receiver<Job>, newest: &Newest, groups: &GroupSender, num_slots: usize) {
    let mut slots: Vec<Option<Active>> = (0..num_slots).map(|_| None).collect();
    let mut decoder: Option<Decoder> = None;
    let mut playing: Option<Weights> = None;
    let mut held: Option<Job> = None;
    let mut num_active = 0;
    loop {
        if let (Some(decoder), Some(playing)) = (&mut decoder, &mut playing)
            && num_active > 0
            && let Some(newer) = newer(newest, playing.policy_version)
            && slots.iter().flatten().all(|active| active.job.group.task.free_running)
        {
            decoder.set_weights(newer.packed.clone());
            slots.iter_mut().flatten().for_each(|active| active.go_on_with(newer.policy_version));
            *playing = newer;
        }
        while num_active < num_slots {
            let job = match held.take().map_or_else(|| next_job(jobs, num_active > 0), Ok) {
                Ok(job) => job,
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return,
            };
            let weights = job.weights(newest);
            let policy_version = weights.policy_version;
            if !playing.as_ref().is_some_and(|playing| Arc::ptr_eq(&playing.packed, &weights.packed)) {
                // Slots of different versions never share a forward pass.
                if num_active > 0 {
                    held = Some(job);
                    break;
                }
                match &mut decoder {
                    Some(decoder) => decoder.set_weights(weights.packed.clone()),
                    None => decoder = Some(Decoder::new(weights.packed.clone(), num_slots)),
                }
                playing = Some(weights);
            }
            let decoder = decoder.as_mut().expect("a version is being played");
            match begin(language, job, policy_version, decoder.config().max_positions) {
                Begun::Playing(active) => {
                    let slot = slots.iter().position(Option::is_none).expect("a slot is free");
                    decoder.reset(slot);
                    slots[slot] = Some(*active);
                    num_active += 1;
                }
                Begun::Over(Some(group)) => drop(groups.send(Ok(group))),
                Begun::Over(None) => {}
                Begun::Failed(error) => drop(groups.send(Err(error))),
            }
        }
        if num_active == 0 {
            continue;
        }
        let decoder = decoder.as_mut().expect("a version is being played");
        let feeds: Vec<Feed<'_>> = slots
            .iter()
            .enumerate()
            .filter_map(|(slot, active)| Some(Feed { slot, tokens: &active.as_ref()?.pending }))
            .collect();
        let fed: Vec<usize> = feeds.iter().map(|feed| feed.slot).collect();
        let logits = decoder.forward(&feeds);
        let width = logits.len() / fed.len();
        for (slot, logits) in fed.into_iter().zip(logits.chunks_exact(width)) {
            let active = slots[slot].as_mut().expect("the slot was fed");
            let temperature = active.job.group.task.sampling.temperature;
            let (token, logprob) = sample(logits, &active.legal, temperature, &mut active.rng);
            if active.choose(token, logprob) {
                num_active -= 1;
                let active = slots[slot].take().expect("the slot was fed");
                if let Some(group) = active.job.group.clone().finish(active.job.attempt, active.played) {
                    drop(groups.send(Ok(group)));
                }
            }
        }
    }
}

fn next_job(jobs: &Receiver<Job>, busy: bool) -> Result<Job, TryRecvError> {
    if busy { jobs.try_recv() } else { jobs.recv().map_err(|_| TryRecvError::Disconnected) }
}

/// Gives the newest weights, if they are newer than these.
fn newer(newest: &Newest, policy_version: u64) -> Option<Weights> {
    let newest = newest.lock().unwrap_or_else(PoisonError::into_inner);
    newest.as_ref().filter(|newest| newest.policy_version > policy_version).cloned()
}

impl Job {
    /// Chooses the weights to begin with.
    fn weights(&self, newest: &Newest) -> Weights {
        let newer = self.group.task.free_running.then(|| newer(newest, self.weights.policy_version)).flatten();
        newer.unwrap_or_else(|| self.weights.clone())
    }
}

/// A job that was taken up.
enum Begun {
    /// The network is to choose its next token.
    Playing(Box<Active>),
    /// It was played without the network; with its group, if that is complete.
    Over(Option<Group>),
    Failed(Error),
}

/// Opens a rollout and plays it as far as it needs no network.
fn begin(language: &dyn Language, job: Job, policy_version: u64, max_positions: usize) -> Begun {
    match open(language, job, policy_version, max_positions) {
        Ok(mut active) => {
            let mut over = active.advance();
            while active.job.group.task.sampling.behavior == Behavior::UniformLegal && !over {
                let (token, logprob) = draw_uniformly(&active.legal, language.vocabulary_size(), &mut active.rng);
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

/// Draws a legal token, each as likely as the others; returns the log-probability of that with it.
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
    /// Appends a chosen token and whatever it forces; tells whether the rollout is over.
    fn choose(&mut self, token: TokenId, logprob: f32) -> bool {
        let legal = std::mem::replace(&mut self.legal, LegalTokens::Only(TokenSet::default()));
        self.played.choices.push((self.played.tokens.len(), legal));
        self.played.logprobs.push(logprob);
        self.pending.clear();
        self.append(token);
        self.advance()
    }

    /// Appends forced tokens up to the next choice; tells whether the rollout is over.
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

    /// Has the next token drawn by newer weights, which have to see everything.
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
    /// Enters a rollout; gives the group if it was the last one.
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
