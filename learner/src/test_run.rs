//! A run without actors and verifier, for tests: its groups are made up.

use std::path::Path;
use std::sync::Arc;

use policy::{Backend, TrainingState};
use proto::{
    BalanceKey, Choices, Example, Group, LabelOrigin, Legal, Niche, ProblemOrigin, ProblemSource, Rollout, ScoredGroup,
    StopReason, Task, TokenId, TokenSet, Verdict, VersionSpan,
};

use crate::checkpoint::{Snapshot, save};
use crate::journal::Known;
use crate::journal::{Damage, EvalRecord, GroupRecord, Journal, Record, StepRecord};
use crate::point::Point;
use crate::{Config, Fold, Plans, References, State, TestSource, test_config, test_manifest};

/// The current run and its journal records.
pub(crate) struct TestRun {
    pub(crate) fold: Fold,
    /// The records of its journal.
    pub(crate) records: Vec<Record>,
}

pub(crate) fn config() -> Config {
    let mut config = test_config();
    config.schedule.num_steps = None;
    config
}

pub(crate) fn sources() -> Vec<Arc<dyn ProblemSource>> {
    vec![Arc::new(TestSource("countdown"))]
}

impl TestRun {
    pub(crate) fn new() -> TestRun {
        let config = config();
        let start = (State::initial(), TrainingState::initial(&config.model, config.seed));
        let references = References::default();
        let fold = Fold::new(config, sources(), &Backend::Cpu, 1, start, Plans::default(), references).unwrap();
        TestRun { fold, records: vec![Record::Manifest(test_manifest())] }
    }

    /// Returns the groups of the next batch.
    pub(crate) fn play(&mut self) -> Vec<ScoredGroup> {
        let step = self.fold.state().step;
        self.fold.plan();
        self.fold.planned().batch(step).map(|planned| answer(&planned.task, -1.0)).collect()
    }

    /// Makes the next step. Its groups arrive in reverse order.
    pub(crate) fn step(&mut self) {
        let groups = self.play();
        let record = |scored: &ScoredGroup| Record::Group(by("a", scored));
        self.records.extend(groups.iter().rev().map(record));
        let report = self.fold.fold(&groups, None).unwrap();
        self.records.push(Record::Step(StepRecord {
            step: report.step,
            groups: groups.iter().map(proto::Digest::of).collect(),
            weights_digest: report.weights_digest,
            state_digest: report.state_digest,
            elapsed_ms: 1_000 * report.step,
        }));
        let eval = EvalRecord { step: report.step, exam: "countdown-3".to_owned(), num_correct: 1, num_problems: 2 };
        self.records.push(Record::Eval(eval));
    }

    /// Writes all records so far, and returns the point after them.
    pub(crate) fn write_journal(&self, folder: &Path) -> Point {
        let (mut journal, _) = Journal::open(folder, &Damage::default(), None).unwrap();
        self.records.iter().for_each(|record| journal.append(record).unwrap());
        journal.sync().unwrap();
        let mut known = Known::default();
        self.records.iter().for_each(|record| known.take(record, true));
        Point { place: journal.last(), known, ..Point::default() }
    }

    /// Writes a checkpoint of the current state.
    pub(crate) fn write_checkpoint(&self, folder: &Path, point: &Point) -> std::path::PathBuf {
        let (state, planned) = (self.fold.state(), self.fold.planned());
        std::fs::create_dir_all(folder).unwrap();
        let training = &self.fold.trainer().export().unwrap();
        let snapshot = Snapshot { state, training, planned, versions: Vec::new(), control: None, point };
        save(folder, self.fold.config(), snapshot, "{}").unwrap()
    }
}

pub(crate) fn by(player: &str, scored: &ScoredGroup) -> GroupRecord {
    GroupRecord::new(player.to_owned(), scored.clone())
}

/// Answers a task with identical rollouts of two tokens, and makes one example of them.
pub(crate) fn answer(task: &Task, logprob: f32) -> ScoredGroup {
    let first = 10 + (task.id.batch * 7 + u64::from(task.id.index)) as TokenId % 100;
    let set: TokenSet = [first, 200].into_iter().collect();
    let choices = Choices::new(2, [(0, Legal::Set(0))]);
    let rollout = Rollout {
        tokens: vec![first, 3],
        choices: choices.clone(),
        logprobs: vec![logprob],
        values: None,
        search: None,
        stop: StopReason::Complete,
        versions: vec![VersionSpan { first_token: 0, policy_version: task.policy_version }],
    };
    let num_rollouts = task.num_rollouts as usize;
    let balance_key = BalanceKey { level: 1, goal: 3 };
    ScoredGroup {
        group: Group { task: task.clone(), sets: vec![set.clone()], rollouts: vec![rollout; num_rollouts] },
        prompt: vec![120, 4],
        niche: Niche(1),
        balance_key,
        verdicts: vec![Verdict::Correct; num_rollouts],
        example_sets: vec![set],
        examples: vec![Example {
            prompt: vec![120, 4],
            answer: vec![first, 3],
            choices,
            problem_origin: ProblemOrigin::Ladder,
            label_origin: LabelOrigin::Solved,
            balance_key,
        }],
        proposals: Vec::new(),
    }
}
