//! Checkers outside the program, which may be unavailable.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use domains::{Admission, Checker, Domain, Error, Forms, Judged, Ladder, domain};
use learner::Event;
use proto::{BalanceKey, CounterRng, Digest, KeyedProblem, LadderLevel, Niche, Problem, ProblemKey};

use crate::roles::Roles;
use crate::runs::Folder;

/// Countdown with a checker that is unavailable for the first `num_unanswered` answers.
struct FarAway {
    countdown: Arc<dyn Domain>,
    num_unanswered: u64,
    num_asked: AtomicU64,
}

impl FarAway {
    fn domains(num_unanswered: u64) -> Vec<Arc<dyn Domain>> {
        let countdown = domain("countdown").unwrap().clone();
        vec![Arc::new(FarAway { countdown, num_unanswered, num_asked: AtomicU64::new(0) })]
    }
}

impl Domain for FarAway {}

impl Checker for FarAway {
    fn judge(&self, problem: &Problem, key: Option<&ProblemKey>, answer: &str) -> Result<Judged, Error> {
        if self.num_asked.fetch_add(1, Ordering::SeqCst) < self.num_unanswered {
            return Err(Error::Unavailable { domain: self.name(), reason: "connection refused".to_owned() });
        }
        self.countdown.judge(problem, key, answer)
    }

    fn hindsight(&self, problem: &Problem, answer: &str) -> Result<Option<Problem>, Error> {
        self.countdown.hindsight(problem, answer)
    }

    fn niche(&self, problem: &Problem, key: Option<&ProblemKey>) -> Result<Niche, Error> {
        self.countdown.niche(problem, key)
    }

    fn admit(&self, niche: Niche, proposal: &str) -> Result<Admission, Error> {
        self.countdown.admit(niche, proposal)
    }

    fn balance_key(&self, problem: &Problem, answer: Option<&str>) -> Result<BalanceKey, Error> {
        self.countdown.balance_key(problem, answer)
    }
}

impl Ladder for FarAway {
    fn name(&self) -> &'static str {
        self.countdown.name()
    }

    fn ladder_levels(&self) -> &'static [LadderLevel] {
        self.countdown.ladder_levels()
    }

    fn level_of(&self, niche: Niche) -> u32 {
        self.countdown.level_of(niche)
    }

    fn ladder(&self, level: u32, seed: u64, index: u64) -> KeyedProblem {
        self.countdown.ladder(level, seed, index)
    }

    fn mutate(&self, parent: &KeyedProblem, rng: &mut CounterRng) -> Option<KeyedProblem> {
        self.countdown.mutate(parent, rng)
    }

    fn describe_niche(&self, niche: Niche) -> String {
        self.countdown.describe_niche(niche)
    }

    fn canonical_hash(&self, problem: &Problem) -> Digest {
        self.countdown.canonical_hash(problem)
    }

    fn is_exam(&self, problem: &Problem) -> bool {
        self.countdown.is_exam(problem)
    }
}

impl Forms for FarAway {
    fn description(&self) -> &'static str {
        self.countdown.description()
    }

    fn problem_from_json(&self, json: &serde_json::Value) -> Result<Problem, Error> {
        self.countdown.problem_from_json(json)
    }

    fn problem_from_text(&self, text: &str) -> Result<Problem, Error> {
        self.countdown.problem_from_text(text)
    }

    fn problem_to_json(&self, problem: &Problem) -> Result<serde_json::Value, Error> {
        self.countdown.problem_to_json(problem)
    }
}

/// The checker fails for every task of the first batch, for many of them more often than a group may fail to be judged, and
/// nothing arrives for longer than a stall may last. The weights equal those of a run whose checker was available.
#[test]
fn tasks_wait_for_a_checker_that_comes_back() {
    let expected = Roles::default().run(&Folder::new().path("run"), &mut |_| Ok(())).unwrap();
    let mut waited_for = Vec::new();
    let mut observe = |event: Event| {
        if let Event::Waiting(waiting) = event {
            waited_for.extend(waiting.first.into_iter().filter_map(|missing| missing.unavailable));
        }
        Ok(())
    };
    let stall_limit = Duration::from_secs(4);
    let roles = Roles { domains: FarAway::domains(300), stall_limit, ..Roles::default() };
    let got = roles.run(&Folder::new().path("run"), &mut observe).unwrap();
    assert_eq!((got.step, got.weights_digest), (expected.step, expected.weights_digest));
    assert_eq!(got.evals, expected.evals);
    assert!(!waited_for.is_empty(), "people are told");
    let says = "the checker of countdown is unavailable: connection refused";
    assert!(waited_for.iter().all(|reason| reason == says), "{waited_for:?}");
}

#[test]
fn a_checker_that_stays_away_ends_the_run_with_its_name() {
    let roles = Roles {
        domains: FarAway::domains(u64::MAX),
        stall_limit: Duration::from_secs(1),
        checker_limit: Duration::from_secs(3),
        ..Roles::default()
    };
    let error = roles.run(&Folder::new().path("run"), &mut |_| Ok(())).unwrap_err().to_string();
    assert!(
        error.starts_with("step 0: ") && error.contains("task ") && error.contains(" of batch 0 has waited "),
        "{error}"
    );
    assert!(
        error.contains(" s for its checker (local.checker_seconds): ")
            && error.ends_with("the checker of countdown is unavailable: connection refused"),
        "{error}"
    );
}
