use proto::{
    BalanceKey, Choices, Example, Group, Legal, LegalTokens, Niche, Proposal, Rollout, StopReason, TokenId, TokenSet,
    VersionSpan,
};

use super::*;
use crate::config::{
    Constrain, DistillConfig, DpoConfig, KlConfig, KlForm, KlReference, LanguageConfig, PolicyGradientConfig,
    PolicyGradientKind, ProblemShares, SelfPlayConfig,
};
use crate::{TestSource, test_config, test_problem};

const RIGHT: Verdict = Verdict::Correct;
const WRONG: Verdict = Verdict::Incorrect;

fn fold_of(config: &Config) -> Fold {
    fold_with(config, References::default())
}

fn fold_with(config: &Config, references: References) -> Fold {
    let sources: Vec<Arc<dyn ProblemSource>> = vec![Arc::new(TestSource("countdown"))];
    let start = (State::initial(), TrainingState::initial(&config.model, config.seed));
    Fold::new(config.clone(), sources, &Backend::Cpu, 2, start, Plans::default(), references).unwrap()
}

fn policy_gradient(kind: PolicyGradientKind) -> PolicyGradientConfig {
    PolicyGradientConfig {
        kind,
        weight: 0.5,
        clip_low: 0.2,
        clip_high: 0.28,
        entropy_bonus: 0.0,
        updates_per_step: 1,
        groups_per_step: None,
        cross_entropy: true,
    }
}

/// Returns the config of a run that begins with a pretrained model and trains by a policy gradient alone.
fn config_with_base() -> Config {
    let mut config = test_config();
    config.language =
        Some(LanguageConfig { base: Digest::of_bytes(b"base"), examples: 0, constrain: Constrain::Answer });
    config.learner.learning_rate = 1e-2;
    config.learner.policy_gradient =
        Some(PolicyGradientConfig { cross_entropy: false, ..policy_gradient(PolicyGradientKind::Grpo) });
    config
}

/// Returns a scorer with weights far from the initial ones.
fn far_base(config: &Config) -> Box<dyn policy::Scorer> {
    let mut weights = policy::Params::init(&config.model, 9);
    weights.tensors.last_mut().unwrap().iter_mut().for_each(|weight| *weight *= 40.0);
    config.learner.device.open().unwrap().scorer(&config.model, &weights, 1).unwrap()
}

/// Plays a task. Its rollouts differ in their last token; their first two tokens are chosen from 4 and 7.
fn played(task: &Task, verdicts: &[Verdict]) -> ScoredGroup {
    let set: TokenSet = [4, 7].into_iter().collect();
    let index = task.id.index as TokenId;
    let choices = || Choices::new(3, [0, 1].map(|position| (position, Legal::Set(0))));
    let rollouts: Vec<Rollout> = (0..verdicts.len() as TokenId)
        .map(|number| Rollout {
            tokens: vec![4, 7, 10 * index + number],
            choices: choices(),
            logprobs: vec![-0.25, -0.75],
            values: None,
            search: None,
            stop: StopReason::Complete,
            versions: vec![VersionSpan { first_token: 0, policy_version: task.policy_version }],
        })
        .collect();
    let example = |rollout: &Rollout| Example {
        prompt: vec![9, index],
        answer: rollout.tokens.clone(),
        choices: choices(),
        problem_origin: ProblemOrigin::Ladder,
        label_origin: LabelOrigin::Solved,
        balance_key: BalanceKey { level: 1, goal: 1 },
    };
    let is_asked_to_solve = task.request.problem().is_some();
    let right = rollouts.iter().zip(verdicts).filter(|(_, verdict)| is_asked_to_solve && **verdict == RIGHT);
    let proposal = |number: u32| Proposal {
        rollout: number,
        keyed: test_problem("countdown", &format!("proposal {:?} {number}", task.id)),
        niche: Niche(1),
        choices: choices(),
    };
    let num_proposals = if is_asked_to_solve { 0 } else { verdicts.len() as u32 };
    ScoredGroup {
        prompt: vec![9, index],
        niche: Niche(1),
        balance_key: BalanceKey { level: 1, goal: 1 },
        verdicts: verdicts.to_vec(),
        example_sets: vec![set.clone()],
        examples: right.map(|(rollout, _)| example(rollout)).collect(),
        proposals: (0..num_proposals).map(proposal).collect(),
        group: Group { task: task.clone(), sets: vec![set], rollouts },
    }
}

/// Plays the next batch, whose groups get these verdicts in order.
fn next_batch(fold: &mut Fold, verdicts: &[[Verdict; 2]; 4]) -> Vec<ScoredGroup> {
    fold.plan();
    let planned = fold.planned().batch(fold.state().step);
    planned.zip(verdicts).map(|(planned, verdicts)| played(&planned.task, verdicts)).collect()
}

const VERDICTS: [[Verdict; 2]; 4] = [[RIGHT, WRONG], [WRONG, WRONG], [WRONG, WRONG], [WRONG, WRONG]];

/// There is one example, so every draw of the update returns it: two chosen tokens of equal weight.
#[test]
fn a_batch_is_folded() {
    let config = test_config();
    let mut fold = fold_of(&config);
    let before = fold.trainer().export().unwrap().into_owned();
    let mut groups = next_batch(&mut fold, &VERDICTS);
    // The config does not list this level.
    let other_level = Example { balance_key: BalanceKey { level: 2, goal: 1 }, ..groups[0].examples[0].clone() };
    groups[3].examples.push(other_level);
    let Example { prompt, answer, .. } = &groups[0].examples[0];
    let legal = Legal::Set(0).tokens(&groups[0].example_sets);
    let sequence = Sequence::new(prompt, answer, [(0, legal.clone()), (1, legal)].into_iter());
    let logprobs = fold.trainer().logprobs(&[&sequence]).unwrap();
    let mismatch = mismatch_of(&fold, &groups[0]);
    let report = fold.fold(&groups, None).unwrap();
    assert_eq!((report.step, report.num_examples, report.num_new_examples, report.num_updates), (1, 1, 1, 1));
    assert_eq!(report.solve_rate, 1.0 / 8.0);
    assert_eq!(report.solved_by_family, BTreeMap::from([("countdown/1".to_owned(), (1, 8))]));
    assert_eq!(report.rollouts_by_staleness, BTreeMap::from([(0, 8)]));
    assert_eq!(report.entropy, 0.5, "the mean of 0.25 and 0.75");
    assert_eq!(report.learning_rate, config.learning_rate(0, None));
    assert_eq!((&report.policy_gradient, &report.proposer, &report.self_play), (&None, &None, &None));

    let expected = -f64::from(logprobs[0] + logprobs[1]) / 2.0;
    assert!((report.loss - expected).abs() < 1e-6, "{}, expected {expected}", report.loss);
    assert!(report.grad_norm > 0.0);
    assert!((report.logprob_mismatch.unwrap() - mismatch).abs() < 1e-6, "{report:?}, expected {mismatch}");

    let state = fold.state();
    assert_eq!((state.step, state.totals.num_rollouts, state.totals.num_correct), (1, 8, 1));
    let training = fold.trainer().export().unwrap();
    assert_eq!(report.weights_digest, training.weights.digest(&config.model));
    assert!(training.weights != before.weights && training.average != before.average);
    let after = fold.trainer().logprobs(&[&sequence]).unwrap();
    assert!(after[0] + after[1] > logprobs[0] + logprobs[1], "the answer is likelier now: {after:?}, {logprobs:?}");
    assert_eq!(fold.planned().iter().count(), 0);
}

/// The answer's third token was forced, and its first two were drawn from two tokens.
#[test]
fn examples_of_pretrained_models_train_every_token_among_all() {
    let language = LanguageConfig { base: Digest::of_bytes(b""), examples: 0, constrain: Constrain::Answer };
    let config = Config { language: Some(language), ..test_config() };
    let mut fold = fold_of(&config);
    let groups = next_batch(&mut fold, &VERDICTS);
    let Example { prompt, answer, .. } = &groups[0].examples[0];
    let free = Sequence::new(prompt, answer, (0..3).map(|position| (position, LegalTokens::Any)));
    let logprobs = fold.trainer().logprobs(&[&free]).unwrap();
    let loss = fold.fold(&groups, None).unwrap().loss;
    let expected = -logprobs.into_iter().map(f64::from).sum::<f64>() / 3.0;
    assert!((loss - expected).abs() < 1e-6, "{loss}, expected {expected}");
}

/// Returns the mean difference between a group's log-probabilities from its actor and from the learner.
fn mismatch_of(fold: &Fold, scored: &ScoredGroup) -> f64 {
    let rollouts = scored.group.rollouts.iter();
    let differences = rollouts.flat_map(|rollout| {
        let logprobs = fold.trainer().logprobs(&[&played_sequence(scored, rollout)]).unwrap();
        let said = rollout.logprobs.clone();
        said.into_iter().zip(logprobs).map(|(said, logprob)| f64::from((said - logprob).abs())).collect::<Vec<_>>()
    });
    differences.sum::<f64>() / 4.0
}

#[test]
fn groups_that_do_not_answer_the_batch_are_refused() {
    type Spoil = fn(&mut Vec<ScoredGroup>);
    let cases: [(Spoil, &str); 6] = [
        (|groups| drop(groups.pop()), "expected 4 groups, got 3"),
        (|groups| groups.push(groups[3].clone()), "expected 4 groups, got 5"),
        (|groups| groups.swap(1, 2), "group 1 does not match a planned task"),
        (|groups| groups[2] = groups[1].clone(), "group 2 does not match a planned task"),
        (|groups| groups[3].group.task.seed ^= 1, "group 3 does not match a planned task"),
        (|groups| groups[0].group.task.id.batch = 1, "group 0 does not match a planned task"),
    ];
    for (spoil, expected) in cases {
        let mut fold = fold_of(&test_config());
        let (before, weights) = (fold.state().clone(), fold.weights_digest());
        let mut groups = next_batch(&mut fold, &VERDICTS);
        spoil(&mut groups);
        let error = fold.fold(&groups, None).unwrap_err();
        assert!(matches!(error, Error::Integrity { what: "batch", step: 0, .. }), "{error:?}");
        assert!(error.to_string().contains(expected), "{error}, expected {expected}");
        assert_eq!((fold.state(), fold.trainer().weights().unwrap().digest(&test_config().model)), (&before, weights));
    }
}

/// Up to two steps old in a free-running run: versions 1 to 3 at step 3.
#[test]
fn groups_of_other_versions_than_a_free_running_run_allows_are_refused() {
    let mut config = test_config();
    (config.batch.lag, config.batch.max_staleness) = (1, Some(2));
    for (policy_version, is_refused) in [(0, true), (1, false), (2, false), (3, false), (4, true)] {
        let mut fold = fold_of(&config);
        fold.state.step = 3;
        let mut groups = next_batch(&mut fold, &VERDICTS);
        groups[2].group.rollouts[1].versions[0].policy_version = policy_version;
        let folded = fold.fold(&groups, None);
        let refusal = folded.as_ref().err().map(ToString::to_string).unwrap_or_default();
        assert_eq!(refusal.contains("group 2 is older than batch.max_staleness allows"), is_refused, "{folded:?}");
        assert_eq!(folded.is_err(), is_refused, "{folded:?}");
    }
}

/// By hand: h = H(h, H(group)) over the groups in order. Any change of a group changes the state's digest.
#[test]
fn the_history_is_a_chain_over_every_group() {
    let config = test_config();
    let fold_batch = |change: fn(&mut Vec<ScoredGroup>)| {
        let mut fold = fold_of(&config);
        let mut groups = next_batch(&mut fold, &VERDICTS);
        change(&mut groups);
        let report = fold.fold(&groups, None).unwrap();
        let expected = groups
            .iter()
            .fold(Digest::of_bytes(b""), |history, scored| Digest::of_digests(&[history, Digest::of(scored)]));
        assert_eq!(fold.state().history, expected);
        (report.weights_digest, report.state_digest)
    };
    let (weights, state) = fold_batch(|_| {});
    assert_eq!(fold_batch(|_| {}), (weights, state));
    // Training does not use these values: the weights stay the same, and the state digest changes.
    let changes: [fn(&mut Vec<ScoredGroup>); 3] = [
        |groups| groups[3].group.rollouts[1].tokens[2] += 1,
        |groups| groups[3].group.rollouts[1].logprobs[1] -= 0.5,
        |groups| groups[3].verdicts[1] = Verdict::Malformed,
    ];
    for change in changes {
        let (same_weights, other_state) = fold_batch(change);
        assert_eq!(same_weights, weights);
        assert_ne!(other_state, state);
    }
}

/// Folds three steps: the first measures a niche, the second asks for problems, the third poses them.
fn propose(loss: ProposerLoss) -> StepReport {
    let mut config = test_config();
    let problems = ProblemShares { proposer: 1.0, mutation: 0.0, archive: 0.0, ladder: 0.0 };
    let (propose_tasks, proposer_share) = (3, 0.5);
    config.self_play =
        Some(SelfPlayConfig { bootstrap_steps: 0, propose_tasks, proposer_loss: loss, proposer_share, problems });
    config.learner.policy_gradient = Some(policy_gradient(PolicyGradientKind::DrGrpo));
    let mut fold = fold_of(&config);
    for _ in 0..2 {
        let groups = next_batch(&mut fold, &VERDICTS);
        fold.fold(&groups, None).unwrap();
    }
    // Its only solve task poses a proposal, which is measured as easy.
    let groups = next_batch(&mut fold, &[[RIGHT, WRONG]; 4]);
    assert!(fold.planned().get(groups[3].group.task.id).unwrap().proposal.is_some());
    fold.fold(&groups, None).unwrap()
}

/// Of three groups of two proposals each, one is refused, one is no problem, and one was proposed before.
#[test]
fn proposals_are_counted_by_what_came_of_them() {
    let mut config = test_config();
    let problems = ProblemShares { proposer: 0.0, mutation: 0.0, archive: 0.0, ladder: 1.0 };
    let proposer_loss = ProposerLoss::CrossEntropy;
    config.self_play =
        Some(SelfPlayConfig { bootstrap_steps: 0, propose_tasks: 3, proposer_loss, proposer_share: 0.5, problems });
    let mut fold = fold_of(&config);
    let groups = next_batch(&mut fold, &VERDICTS);
    fold.fold(&groups, None).unwrap();
    let verdicts = [[RIGHT, WRONG], [RIGHT, Verdict::Malformed], [RIGHT, RIGHT], [RIGHT, WRONG]];
    let mut groups = next_batch(&mut fold, &verdicts);
    groups[0].proposals.truncate(1);
    groups[1].proposals.truncate(1);
    groups[1].proposals[0].keyed = groups[0].proposals[0].keyed.clone();
    let own = fold.fold(&groups, None).unwrap().self_play.unwrap();
    let counts = [
        own.num_new_proposals,
        own.num_repeated_proposals,
        own.num_refused_proposals,
        own.num_malformed_proposals,
        own.num_pending,
    ];
    assert_eq!(counts, [3, 1, 1, 1, 3]);
}

/// A request that leaves no room for a proposal is not made: another problem is posed instead.
#[test]
fn requests_that_do_not_fit_are_not_made() {
    let mut config = test_config();
    let problems = ProblemShares { proposer: 0.0, mutation: 0.0, archive: 0.0, ladder: 1.0 };
    let proposer_loss = ProposerLoss::CrossEntropy;
    config.self_play =
        Some(SelfPlayConfig { bootstrap_steps: 0, propose_tasks: 3, proposer_loss, proposer_share: 0.5, problems });
    let needed = 2 + TestSource("countdown").max_proposal_tokens(Niche(1)) as usize;
    let num_asked = |max_positions| {
        config.model.max_positions = max_positions;
        config.actor.max_answer_tokens = 1;
        let mut fold = fold_of(&config);
        let groups = next_batch(&mut fold, &VERDICTS);
        fold.fold(&groups, None).unwrap();
        let groups = next_batch(&mut fold, &VERDICTS);
        groups.iter().filter(|scored| scored.group.task.request.problem().is_none()).count()
    };
    assert_eq!([needed, needed - 1].map(num_asked), [3, 0]);
}

/// Solver and proposer have separate reports, though both train in one update: the solver's figures equal those of a step in
/// which no proposal trains by the policy gradient.
#[test]
fn the_proposer_is_reported_apart_from_the_solver() {
    let [with, without] = [ProposerLoss::PolicyGradient, ProposerLoss::CrossEntropy].map(propose);
    assert_eq!(without.proposer, None);
    let [solver, alone] = [&with, &without].map(|report| report.policy_gradient.clone().unwrap());
    assert_eq!((solver.num_rollouts, alone.num_rollouts), (2, 2));
    for (got, expected) in [
        (solver.loss, alone.loss),
        (solver.clip_fraction, alone.clip_fraction),
        (solver.importance_ratio, alone.importance_ratio),
        (solver.entropy, alone.entropy),
    ] {
        assert!((got - expected).abs() < 1e-9, "{solver:?}, expected {alone:?}");
    }
    let (own, proposer) = (with.self_play.unwrap(), with.proposer);
    assert_eq!((own.difficulties, own.num_as_asked), ([0, 0, 1, 0], 1), "the seed asks for an easy problem");
    let proposer = proposer.unwrap();
    assert_eq!(proposer.num_rollouts, 1);
    // Reward 1/2 and baseline 0: the loss is the mean of -1/2 ratio over two tokens, unless it is clipped.
    assert!(proposer.loss < 0.0 && proposer.loss >= -0.5 * 1.28 - 1e-6, "{proposer:?}");
    assert!(proposer.importance_ratio > 0.0 && (0.0..=2.0f64.ln() + 1e-6).contains(&proposer.entropy), "{proposer:?}");
}

/// No group has an advantage, so that the penalty alone trains: it moves the policy towards the base.
#[test]
fn a_penalty_in_the_loss_holds_the_policy_near_its_base() {
    let mut config = config_with_base();
    config.learner.kl = Some(KlConfig { to: KlReference::Base, weight: 1.0, form: KlForm::Loss });
    let (mut fold, base) = (fold_with(&config, References::of(Some(far_base(&config)), None)), far_base(&config));
    let mut distances = Vec::new();
    for step in 0..20 {
        let groups = next_batch(&mut fold, &[[WRONG; 2]; 4]);
        let sequences: Vec<Sequence> = groups
            .iter()
            .flat_map(|scored| scored.group.rollouts.iter().map(|rollout| played_sequence(scored, rollout)))
            .collect();
        let sequences: Vec<&Sequence> = sequences.iter().collect();
        let (reference, current) = (base.logprobs(&sequences).unwrap(), fold.trainer().logprobs(&sequences).unwrap());
        let distance = reference.iter().zip(&current).map(|(left, right)| f64::from((left - right).abs())).sum::<f64>();
        distances.push(distance / reference.len() as f64);
        let report = fold.fold(&groups, None).unwrap();
        // The actors say -0.25 and -0.75 of the two tokens.
        let expected = -0.5 - reference.iter().map(|logprob| f64::from(*logprob)).sum::<f64>() / reference.len() as f64;
        let got = report.kl_to_base.unwrap();
        assert!((got - expected).abs() < 1e-6, "step {step}: {got}, expected {expected}");
        assert_eq!(report.policy_gradient.unwrap().num_rollouts, 8);
    }
    let (first, last) = (distances[0], distances[distances.len() - 1]);
    assert!(first > 0.1 && last < first / 2.0, "{distances:?}");
}

#[test]
fn a_penalty_in_the_advantage_changes_what_is_learned() {
    let weights = |kl: Option<KlConfig>| {
        let mut config = config_with_base();
        config.learner.kl = kl;
        let mut fold = fold_with(&config, References::of(Some(far_base(&config)), None));
        let groups = next_batch(&mut fold, &VERDICTS);
        let report = fold.fold(&groups, None).unwrap();
        (report.weights_digest, report.kl_to_base, report.policy_gradient.map(|report| report.num_rollouts))
    };
    let of = |form| weights(Some(KlConfig { to: KlReference::Base, weight: 1.0, form }));
    let (without, in_loss, in_advantage) = (weights(None), of(KlForm::Loss), of(KlForm::Advantage));
    assert_eq!((without.1, without.2), (None, Some(2)), "one group of four disagrees");
    assert_eq!((in_loss.1, in_loss.2), (in_advantage.1, in_advantage.2));
    assert_eq!(in_loss.2, Some(8));
    assert!(in_loss.0 != without.0 && in_advantage.0 != without.0 && in_loss.0 != in_advantage.0);
}

#[test]
fn a_penalty_needs_a_base_and_a_policy_gradient() {
    type Spoil = fn(&mut Config);
    let cases: [(Spoil, &str); 4] = [
        (|config| config.language = None, "learner.kl: expected none in a run without a pretrained model"),
        (|config| config.learner.policy_gradient = None, "learner.kl: expected none without learner.policy_gradient"),
        (
            |config| config.learner.policy_gradient.as_mut().unwrap().kind = PolicyGradientKind::Gspo,
            "learner.kl.form: expected loss if learner.policy_gradient.kind is gspo",
        ),
        (|config| config.learner.kl.as_mut().unwrap().weight = 0.0, "learner.kl.weight: expected over 0"),
    ];
    for (spoil, says) in cases {
        let mut config = config_with_base();
        config.learner.kl = Some(KlConfig { to: KlReference::Base, weight: 0.05, form: KlForm::Advantage });
        config.validate(&[&TestSource("countdown")]).unwrap();
        spoil(&mut config);
        let error = config.validate(&[&TestSource("countdown")]).unwrap_err().to_string();
        assert!(error.contains(says), "{error}, expected {says}");
    }
    let mut config = config_with_base();
    config.learner.kl = Some(KlConfig { to: KlReference::Base, weight: 0.05, form: KlForm::Loss });
    let error = References::load(&config, 1, &crate::Models::default()).err().unwrap().to_string();
    assert!(error.contains("local.base: expected"), "{error}");
}

/// The first group has a right answer and a wrong one: the only pair. At the base's own weights its margin is 0.
#[test]
fn preferences_raise_the_right_answer_over_the_wrong_one() {
    let mut config = config_with_base();
    config.learner.policy_gradient = None;
    config.learner.dpo =
        Some(DpoConfig { weight: 1.0, beta: 0.5, per_token: false, updates_per_step: 1, cross_entropy: false });
    let own = policy::Params::init(&config.model, config.seed);
    let base = config.learner.device.open().unwrap().scorer(&config.model, &own, 1).unwrap();
    let mut fold = fold_with(&config, References::of(Some(base), None));
    let mut reports = Vec::new();
    for _ in 0..5 {
        let mut groups = next_batch(&mut fold, &VERDICTS);
        // The answers differ in a choice.
        groups[0].group.rollouts[1].tokens[1] = 4;
        reports.push(fold.fold(&groups, None).unwrap());
    }
    let first = reports[0].dpo.clone().unwrap();
    assert_eq!((first.num_pairs, first.margin, first.accuracy), (1, 0.0, 0.0));
    assert!((first.loss - 2f64.ln()).abs() < 1e-6, "{first:?}");
    let last = reports[4].dpo.clone().unwrap();
    assert!(last.margin > 0.0 && last.accuracy == 1.0 && last.loss < first.loss, "{last:?}");
    assert!(reports.iter().all(|report| report.num_updates == 1 && report.policy_gradient.is_none()));
    for (spoil, says) in [
        ((|config| config.language = None) as fn(&mut Config), "learner.dpo: expected none in a run without"),
        (|config| config.batch.num_rollouts = 1, "batch.num_rollouts: expected 2 or more with learner.dpo"),
        (|config| config.learner.dpo.as_mut().unwrap().beta = 0.0, "learner.dpo.beta: expected over 0"),
        (
            |config| config.learner.policy_gradient = Some(policy_gradient(PolicyGradientKind::Grpo)),
            "learner.dpo: expected none with learner.policy_gradient",
        ),
    ] {
        let mut config = config.clone();
        spoil(&mut config);
        let error = config.validate(&[&TestSource("countdown")]).unwrap_err().to_string();
        assert!(error.contains(says), "{error}, expected {says}");
    }
}

/// The actors' log-probabilities are those of the policy, as in a real run. Verdicts give no advantage.
#[test]
fn distillation_moves_the_policy_to_its_teacher() {
    let mut config = config_with_base();
    config.learner.policy_gradient.as_mut().unwrap().kind = PolicyGradientKind::Distill;
    config.learner.distill = Some(DistillConfig { teacher: Digest::of_bytes(b"teacher"), weight: 1.0 });
    config.learner.policy_gradient.as_mut().unwrap().weight = 1.0;
    let mut fold = fold_with(&config, References::of(None, Some(far_base(&config))));
    let mut distances = Vec::new();
    for step in 0..30 {
        let mut groups = next_batch(&mut fold, &[[RIGHT, WRONG]; 4]);
        for (number, scored) in groups.iter_mut().enumerate() {
            // All pairs of tokens are answers, each as often as any other: their mean is a distance between two distributions.
            for (index, rollout) in scored.group.rollouts.iter_mut().enumerate() {
                let kind = 2 * number + index;
                (rollout.tokens[0], rollout.tokens[1]) = ([4, 7][kind % 2], [4, 7][kind / 2 % 2]);
            }
            for rollout in 0..2 {
                let sequence = played_sequence(scored, &scored.group.rollouts[rollout]);
                scored.group.rollouts[rollout].logprobs = fold.trainer().logprobs(&[&sequence]).unwrap();
            }
        }
        let teacher = far_base(&config);
        let sequences: Vec<Sequence> = groups
            .iter()
            .flat_map(|scored| scored.group.rollouts.iter().map(|rollout| played_sequence(scored, rollout)))
            .collect();
        let wanted = teacher.logprobs(&sequences.iter().collect::<Vec<_>>()).unwrap();
        let said: Vec<f32> =
            groups.iter().flat_map(|scored| &scored.group.rollouts).flat_map(|it| it.logprobs.clone()).collect();
        let distance = said.iter().zip(&wanted).map(|(left, right)| f64::from((left - right).abs())).sum::<f64>();
        distances.push(distance / 16.0);
        let report = fold.fold(&groups, None).unwrap();
        let expected = said.iter().zip(&wanted).map(|(left, right)| f64::from(left - right)).sum::<f64>() / 16.0;
        let got = report.kl_to_teacher.unwrap();
        assert!((got - expected).abs() < 1e-6, "step {step}: {got}, expected {expected}");
        assert_eq!((report.kl_to_base, report.policy_gradient.unwrap().num_rollouts), (None, 8));
    }
    let (first, last) = (distances[0], distances[distances.len() - 1]);
    assert!(first > 0.1 && last < first / 2.0, "{distances:?}");
    for (spoil, says) in [
        ((|config| config.language = None) as fn(&mut Config), "learner.distill: expected none in a run without"),
        (|config| config.learner.policy_gradient = None, "learner.distill: expected none without"),
        (|config| config.learner.distill = None, "learner.policy_gradient.kind: expected another kind without"),
        (
            |config| config.learner.policy_gradient.as_mut().unwrap().kind = PolicyGradientKind::Gspo,
            "learner.distill: expected none if learner.policy_gradient.kind is gspo",
        ),
    ] {
        let mut config = config.clone();
        spoil(&mut config);
        let error = config.validate(&[&TestSource("countdown")]).unwrap_err().to_string();
        assert!(error.contains(says), "{error}, expected {says}");
    }
    let error = References::load(&config, 1, &crate::Models::default()).err().unwrap().to_string();
    assert!(error.contains("local.teacher: expected"), "{error}");
}
