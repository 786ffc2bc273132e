//! What actors say of their choices: the truth passes in every domain, and whatever else they say is refused.

use std::sync::Arc;

use bus::{Bus, InProcess};
use domains::{Grammar, MaskDictionary, Next, domain, registry};
use proto::{
    ActionMask, Behavior, Choice, CounterRng, Difficulty, Digest, Envelope, Group, Message, Problem, ProblemOrigin,
    Purpose, Request, Rollout, Sampling, StopReason, Task, TaskId, TaskKind, Token, VersionSpan,
};
use tokio_util::sync::CancellationToken;
use verifier::{Error, check_choices};

const NUM_ROLLOUTS: u32 = 4;

/// Plays a task as actors do, with tokens drawn uniformly or the lowest legal ones preferred.
fn played(request: Request, behavior: Behavior, max_tokens: u32) -> Group {
    let domain = domain(request.domain()).unwrap();
    let grammar = match &request {
        Request::Solve { problem, .. } => domain.grammar(problem).unwrap(),
        Request::Propose { niche, .. } => domain.proposal_grammar(*niche),
    };
    let task = Task {
        id: TaskId { kind: TaskKind::Train, batch: 0, index: 0 },
        seed: 0,
        weights: Digest::of_bytes(b""),
        policy_version: 0,
        free_running: false,
        request,
        family: String::new(),
        num_rollouts: NUM_ROLLOUTS,
        sampling: Sampling { behavior, temperature: 1.0 },
        max_tokens,
    };
    let mut masks = MaskDictionary::default();
    let rollouts = (0..u64::from(NUM_ROLLOUTS)).map(|attempt| {
        let mut rng = CounterRng::new(0, Purpose::Rollout, 0, 0, attempt);
        rollout(grammar.fork(), behavior, max_tokens as usize, &mut masks, &mut rng)
    });
    let rollouts = rollouts.collect();
    Group { task, masks: masks.into_masks(), rollouts }
}

fn rollout(
    mut grammar: Box<dyn Grammar>,
    behavior: Behavior,
    max_tokens: usize,
    masks: &mut MaskDictionary,
    rng: &mut CounterRng,
) -> Rollout {
    let (mut tokens, mut choices): (Vec<Token>, Vec<Choice>) = (Vec::new(), Vec::new());
    let stop = loop {
        let token = match grammar.next() {
            Next::Done => break StopReason::Complete,
            _ if tokens.len() >= max_tokens => break StopReason::Length,
            Next::Forced(token) => token,
            Next::Choice(mask) => {
                let num_drawn_from = if behavior == Behavior::UniformLegal { mask.len() } else { 2 };
                let logprob = -(num_drawn_from as f32).ln();
                choices.push(Choice { position: tokens.len() as u16, mask: masks.index_of(mask), logprob });
                mask.iter().nth(rng.below(num_drawn_from as u64) as usize).unwrap()
            }
        };
        assert!(grammar.push(token));
        tokens.push(token);
    };
    let versions = vec![VersionSpan { first_token: 0, policy_version: 0 }];
    Rollout { tokens, choices, stop, versions, search: None }
}

fn solve(domain: &str, text: &str) -> Request {
    let problem = Problem { domain: domain.to_owned(), text: text.to_owned() };
    Request::Solve { problem, origin: ProblemOrigin::Ladder, has_key: false }
}

/// Answers and proposals of every domain and level, by both kinds of play, complete and cut short.
#[test]
fn honest_groups_pass() {
    let mut num_cut_short = 0;
    for domain in registry() {
        for level in domain.ladder_levels() {
            for index in 0..20 {
                let keyed = domain.ladder(level.level, 5, index);
                let niche = domain.niche(&keyed.problem, keyed.key.as_ref()).unwrap();
                let max_tokens = domain.max_answer_tokens(&keyed.problem).unwrap();
                let difficulty = Difficulty::Hard;
                let propose = Request::Propose { domain: domain.name().to_owned(), niche, difficulty };
                for behavior in [Behavior::Policy, Behavior::UniformLegal] {
                    let solve = solve(domain.name(), &keyed.problem.text);
                    for (request, max_tokens) in [
                        (solve.clone(), max_tokens),
                        (solve, 1 + index as u32),
                        (propose.clone(), domain.max_proposal_tokens(niche)),
                    ] {
                        let group = played(request, behavior, max_tokens);
                        assert_eq!(group.check(), Ok(()), "{group:?}");
                        assert_eq!(check_choices(&group), Ok(()), "{group:?}");
                        let cut_short = group.rollouts.iter().filter(|rollout| rollout.stop == StopReason::Length);
                        num_cut_short += cut_short.count();
                    }
                }
            }
        }
    }
    assert!(num_cut_short > 100, "{num_cut_short}");
}

/// Enters a changed copy of a mask, as the last one; returns its index.
fn other_mask(group: &mut Group, mask: u16, change: impl Fn(&mut Vec<Token>)) -> u16 {
    let mut tokens: Vec<Token> = group.masks[usize::from(mask)].iter().collect();
    change(&mut tokens);
    group.masks.push(tokens.into_iter().collect());
    (group.masks.len() - 1) as u16
}

fn token_of(rollout: &Rollout, choice: usize) -> Token {
    rollout.tokens[usize::from(rollout.choices[choice].position)]
}

#[test]
fn forged_choices_are_refused() {
    type Forge = fn(&mut Group);
    let cases: [(&str, Forge, &str); 11] = [
        (
            "a wider mask",
            |group| {
                let wider = other_mask(group, group.rollouts[1].choices[0].mask, |tokens| tokens.push(250));
                group.rollouts[1].choices[0].mask = wider;
            },
            "rollout 1: expected the language's mask of ",
        ),
        (
            "a narrower mask",
            |group| {
                let kept = token_of(&group.rollouts[1], 0);
                let mask = group.rollouts[1].choices[0].mask;
                let narrower = other_mask(group, mask, |tokens| tokens.retain(|token| *token == kept));
                group.rollouts[1].choices[0].mask = narrower;
            },
            "got another, of 1",
        ),
        (
            "another mask of as many tokens",
            |group| {
                let kept = token_of(&group.rollouts[0], 1);
                let mask = group.rollouts[0].choices[1].mask;
                let other = other_mask(group, mask, |tokens| {
                    let gone = tokens.iter().position(|token| *token != kept).unwrap();
                    tokens[gone] = 250;
                });
                group.rollouts[0].choices[1].mask = other;
            },
            "rollout 0: expected the language's mask of ",
        ),
        (
            "a position that is forced",
            |group| {
                let Group { masks, rollouts, .. } = group;
                let Rollout { tokens, choices, .. } = &mut rollouts[0];
                let choice = choices.last_mut().unwrap();
                choice.position += 1;
                let token = tokens[usize::from(choice.position)];
                masks.push([token, 250].into_iter().collect());
                choice.mask = (masks.len() - 1) as u16;
            },
            "rollout 0: expected a choice of token ",
        ),
        ("a choice that is left out", |group| assert!(group.rollouts[3].choices.pop().is_some()), ", got none"),
        (
            "the first choice left out",
            |group| _ = group.rollouts[3].choices.remove(0),
            "a choice of token 0, got one of",
        ),
        (
            "a choice where one token is legal",
            |group| {
                let Group { masks, rollouts, .. } = group;
                let Rollout { tokens, choices, .. } = &mut rollouts[2];
                let last = Choice { position: (tokens.len() - 1) as u16, mask: masks.len() as u16, logprob: -0.1 };
                masks.push([*tokens.last().unwrap()].into_iter().collect());
                choices.push(last);
            },
            "rollout 2: expected no choice of token ",
        ),
        (
            "a token that is not legal",
            |group| *group.rollouts[2].tokens.last_mut().unwrap() = 250,
            "rollout 2: expected a legal token ",
        ),
        (
            "an end that is none",
            |group| group.rollouts[1].stop = StopReason::Length,
            "expected an answer that was cut short",
        ),
        (
            "an answer that breaks off",
            |group| {
                let Rollout { tokens, choices, .. } = &mut group.rollouts[3];
                tokens.truncate(usize::from(choices.last().unwrap().position) + 1);
            },
            "rollout 3: expected a complete answer",
        ),
        (
            "masks in another order",
            |group| {
                let Group { masks, rollouts, .. } = group;
                masks.swap(0, 1);
                let choices = rollouts.iter_mut().flat_map(|rollout| &mut rollout.choices);
                choices.filter(|choice| choice.mask < 2).for_each(|choice| choice.mask = 1 - choice.mask);
            },
            "expected masks in order of first use",
        ),
    ];
    for behavior in [Behavior::Policy, Behavior::UniformLegal] {
        for (what, forge, expected) in &cases {
            let mut group = played(solve("countdown", "20 12 6 1 -> 50"), behavior, 20);
            check_choices(&group).unwrap();
            forge(&mut group);
            let refusal = check_choices(&group).expect_err(what);
            assert!(refusal.contains(expected), "{what}: {refusal}");
            assert_eq!(group.check(), Ok(()), "{what}: only the language tells");
        }
    }
    // Answers of a language in which a proposal is not legal.
    let mut group = played(solve("countdown", "20 12 6 1 -> 50"), Behavior::Policy, 20);
    group.task.request = solve("countdown", "20 12 6 2 -> 50");
    check_choices(&group).unwrap_err();
    group.task.request = solve("countdown", "no problem");
    check_choices(&group).unwrap_err();
    group.task.request = solve("chess", "e4");
    check_choices(&group).unwrap_err();
}

/// A short answer that says that it was cut short: actors stop at the limit, not before.
#[test]
fn answers_are_cut_short_at_the_limit() {
    let mut group = played(solve("countdown", "20 12 6 1 -> 50"), Behavior::Policy, 7);
    assert!(group.rollouts.iter().all(|rollout| rollout.stop == StopReason::Length));
    check_choices(&group).unwrap();
    group.task.max_tokens = 8;
    let refusal = check_choices(&group).unwrap_err();
    assert_eq!(refusal, "rollout 0: expected 8 tokens of an answer that was cut short, got 7");
}

/// Log-probabilities are one for each choice by their form, and no more than 0 and finite by [`Group::check`].
#[test]
fn probabilities_that_are_none_are_refused() {
    for logprob in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.5] {
        let mut group = played(solve("countdown", "20 12 6 1 -> 50"), Behavior::Policy, 20);
        group.rollouts[0].choices[0].logprob = logprob;
        assert_eq!(group.check(), Err("expected logprobs".to_owned()), "{logprob}");
    }
}

/// The way through the verifier: between threads of a process nobody is hostile, so there it is a fault that ends it.
#[tokio::test]
async fn a_verifier_judges_no_forged_group() {
    let bus: Arc<dyn Bus> = Arc::new(InProcess::new());
    let honest = played(solve("countdown", "20 12 6 1 -> 50"), Behavior::Policy, 20);
    let mut forged = honest.clone();
    let all: ActionMask = (0..256).collect();
    forged.masks[0] = all;
    assert_eq!(forged.check(), Ok(()));
    let publish = async |body| bus.publish_group(Message { envelope: Envelope::default(), body }).await.unwrap();
    let verifier = tokio::spawn(verifier::run(NUM_ROLLOUTS, bus.clone(), CancellationToken::new()));
    publish(honest.clone()).await;
    assert_eq!(bus.next_scored().await.unwrap().message.body.group, honest);
    publish(forged).await;
    let error = verifier.await.unwrap().unwrap_err();
    let Error::Group { task, reason } = error else { panic!("{error}") };
    assert_eq!(task, honest.task.id);
    assert!(
        reason.starts_with("rollout 0: expected the language's mask of ") && reason.ends_with(", of 256"),
        "{reason}"
    );
}
