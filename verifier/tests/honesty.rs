//! Actors' reports of their choices: honest reports pass in every domain, and all others are refused.

use std::sync::Arc;

use bus::{Bus, InProcess};
use domains::registry;
use domains::symbols::vocabulary::VOCABULARY_SIZE;
use language::{Episode, Language as _, Next, SymbolLanguage};
use proto::{
    Behavior, Choices, CounterRng, Difficulty, Digest, Envelope, Group, Legal, LegalTokens, Message, Problem,
    ProblemOrigin, Purpose, Request, Rollout, Sampling, SetDictionary, StopReason, Task, TaskId, TaskKind, TokenId,
    VersionSpan,
};
use tokio_util::sync::CancellationToken;
use verifier::{Error, Judge, check_choices};

const NUM_ROLLOUTS: u32 = 4;

/// Plays a task as actors do, with tokens drawn uniformly or the lowest legal ones preferred.
fn played(request: Request, behavior: Behavior, max_tokens: u32) -> Group {
    let episode = SymbolLanguage.open(&request).unwrap();
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
    let mut sets = SetDictionary::default();
    let rollouts = (0..u64::from(NUM_ROLLOUTS)).map(|attempt| {
        let mut rng = CounterRng::new(0, Purpose::Rollout, 0, 0, attempt);
        rollout(episode.fork(), behavior, max_tokens as usize, &mut sets, &mut rng)
    });
    let rollouts = rollouts.collect();
    Group { task, sets: sets.into_sets(), rollouts }
}

fn rollout(
    mut episode: Box<dyn Episode>,
    behavior: Behavior,
    max_tokens: usize,
    sets: &mut SetDictionary,
    rng: &mut CounterRng,
) -> Rollout {
    let (mut tokens, mut choices, mut logprobs) = (Vec::<TokenId>::new(), Vec::new(), Vec::new());
    let stop = loop {
        let token = match episode.next() {
            Next::Done => break StopReason::Complete,
            _ if tokens.len() >= max_tokens => break StopReason::Length,
            Next::Forced(token) => token,
            Next::Choice(LegalTokens::Any) => panic!("a grammar names what is legal"),
            Next::Choice(LegalTokens::Only(legal)) => {
                let num_drawn_from = if behavior == Behavior::UniformLegal { legal.len() } else { 2 };
                logprobs.push(-(num_drawn_from as f32).ln());
                let drawn = legal.iter().nth(rng.below(num_drawn_from as u64) as usize).unwrap();
                choices.push((tokens.len(), sets.refer(LegalTokens::Only(legal))));
                drawn
            }
        };
        assert!(episode.push(token));
        tokens.push(token);
    };
    let versions = vec![VersionSpan { first_token: 0, policy_version: 0 }];
    let choices = Choices::new(tokens.len(), choices);
    Rollout { tokens, choices, logprobs, values: None, search: None, stop, versions }
}

fn solve(domain: &str, text: &str) -> Request {
    let problem = Problem { domain: domain.to_owned(), text: text.to_owned() };
    Request::Solve { problem, origin: ProblemOrigin::Ladder, has_key: false }
}

/// Covers answers and proposals of every domain and level, by both behaviors, complete and cut short.
#[test]
fn honest_groups_pass() {
    let mut num_cut_short = 0;
    for domain in registry().iter().filter(|domain| domain.symbols().is_some()) {
        for level in domain.ladder_levels() {
            for index in 0..20 {
                let keyed = domain.ladder(level.level, 5, index);
                let niche = domain.niche(&keyed.problem, keyed.key.as_ref()).unwrap();
                let max_tokens = SymbolLanguage.room(&keyed.problem).unwrap().answer as u32;
                let difficulty = Difficulty::Hard;
                let propose = Request::Propose { domain: domain.name().to_owned(), niche, difficulty };
                for behavior in [Behavior::Policy, Behavior::UniformLegal] {
                    let solve = solve(domain.name(), &keyed.problem.text);
                    for (request, max_tokens) in [
                        (solve.clone(), max_tokens),
                        (solve, 1 + index as u32),
                        (propose.clone(), SymbolLanguage.proposal_room(domain.name(), niche).unwrap().answer as u32),
                    ] {
                        let group = played(request, behavior, max_tokens);
                        assert_eq!(group.check(VOCABULARY_SIZE), Ok(()), "{group:?}");
                        assert_eq!(check_choices(&SymbolLanguage, &group), Ok(()), "{group:?}");
                        let cut_short = group.rollouts.iter().filter(|rollout| rollout.stop == StopReason::Length);
                        num_cut_short += cut_short.count();
                    }
                }
            }
        }
    }
    assert!(num_cut_short > 100, "{num_cut_short}");
}

/// Replaces the legal set of a choice with a changed copy.
fn change_set(group: &mut Group, rollout: usize, choice: usize, change: impl Fn(&mut Vec<TokenId>)) {
    let legal = &mut group.rollouts[rollout].choices.legal[choice];
    let Legal::Set(set) = *legal else { panic!("a grammar names what is legal") };
    *legal = Legal::Set(group.sets.len() as u32);
    let mut tokens: Vec<TokenId> = group.sets[set as usize].iter().collect();
    change(&mut tokens);
    group.sets.push(tokens.into_iter().collect());
}

fn change_choices(rollout: &mut Rollout, change: impl Fn(&mut Vec<(usize, Legal)>)) {
    let mut choices: Vec<(usize, Legal)> = rollout.choices.iter().collect();
    change(&mut choices);
    rollout.choices = Choices::new(rollout.tokens.len(), choices);
    rollout.logprobs.resize(rollout.choices.len(), -0.1);
}

fn token_of(rollout: &Rollout, choice: usize) -> TokenId {
    rollout.tokens[rollout.choices.iter().nth(choice).unwrap().0]
}

#[test]
fn forged_choices_are_refused() {
    type Forge = fn(&mut Group);
    let cases: [(&str, Forge, &str); 12] = [
        (
            "a wider set",
            |group| change_set(group, 1, 0, |tokens| tokens.push(250)),
            "rollout 1: expected the language's legal tokens at token ",
        ),
        (
            "a narrower set",
            |group| {
                let kept = token_of(&group.rollouts[1], 0);
                change_set(group, 1, 0, |tokens| tokens.retain(|token| *token == kept));
            },
            ", got a set of 1 tokens",
        ),
        (
            "another set of as many tokens",
            |group| {
                let kept = token_of(&group.rollouts[0], 1);
                change_set(group, 0, 1, |tokens| {
                    let gone = tokens.iter().position(|token| *token != kept).unwrap();
                    tokens[gone] = 250;
                });
            },
            "rollout 0: expected the language's legal tokens at token ",
        ),
        ("the whole vocabulary", |group| group.rollouts[2].choices.legal[1] = Legal::Any, ", got any token"),
        (
            "a position that is forced",
            |group| {
                let Group { sets, rollouts, .. } = group;
                let tokens = rollouts[0].tokens.clone();
                let set = Legal::Set(sets.len() as u32);
                change_choices(&mut rollouts[0], |choices| {
                    let (position, legal) = choices.last_mut().unwrap();
                    (*position, *legal) = (*position + 1, set);
                });
                let forced = rollouts[0].choices.iter().last().unwrap().0;
                sets.push([tokens[forced], 250].into_iter().collect());
            },
            "rollout 0: expected a choice at token ",
        ),
        (
            "a choice that is left out",
            |group| change_choices(&mut group.rollouts[3], |choices| assert!(choices.pop().is_some())),
            ", got none",
        ),
        (
            "the first choice left out",
            |group| change_choices(&mut group.rollouts[3], |choices| _ = choices.remove(0)),
            "a choice at token 0, got one at",
        ),
        (
            "a choice where one token is legal",
            |group| {
                let Group { sets, rollouts, .. } = group;
                let last = rollouts[2].tokens.len() - 1;
                let set = Legal::Set(sets.len() as u32);
                sets.push([rollouts[2].tokens[last]].into_iter().collect());
                change_choices(&mut rollouts[2], |choices| choices.push((last, set)));
            },
            "rollout 2: expected no choice at token ",
        ),
        (
            "a token that is not legal",
            |group| *group.rollouts[2].tokens.last_mut().unwrap() = 250,
            "rollout 2: expected a legal token ",
        ),
        ("an end that is none", |group| group.rollouts[1].stop = StopReason::Length, "expected a truncated answer"),
        (
            "an answer that breaks off",
            |group| {
                let Rollout { tokens, choices, .. } = &mut group.rollouts[3];
                tokens.truncate(choices.iter().last().unwrap().0 + 1);
            },
            "rollout 3: expected a complete answer",
        ),
        (
            "sets in another order",
            |group| {
                let Group { sets, rollouts, .. } = group;
                sets.swap(0, 1);
                for legal in rollouts.iter_mut().flat_map(|rollout| &mut rollout.choices.legal) {
                    if let Legal::Set(set @ 0..2) = legal {
                        *set = 1 - *set;
                    }
                }
            },
            "expected sets in order of first use",
        ),
    ];
    for behavior in [Behavior::Policy, Behavior::UniformLegal] {
        for (what, forge, expected) in &cases {
            let mut group = played(solve("countdown", "20 12 6 1 -> 50"), behavior, 20);
            check_choices(&SymbolLanguage, &group).unwrap();
            forge(&mut group);
            let refusal = check_choices(&SymbolLanguage, &group).expect_err(what);
            assert!(refusal.contains(expected), "{what}: {refusal}");
            assert_eq!(group.check(VOCABULARY_SIZE), Ok(()), "{what}: only the language tells");
        }
    }
    // The same answers to another problem, to an invalid one, and in an unknown domain.
    let mut group = played(solve("countdown", "20 12 6 1 -> 50"), Behavior::Policy, 20);
    group.task.request = solve("countdown", "20 12 6 2 -> 50");
    check_choices(&SymbolLanguage, &group).unwrap_err();
    group.task.request = solve("countdown", "no problem");
    check_choices(&SymbolLanguage, &group).unwrap_err();
    group.task.request = solve("chess", "e4");
    check_choices(&SymbolLanguage, &group).unwrap_err();
}

/// An answer that claims to be cut short below the limit is refused: actors stop at the limit, not before.
#[test]
fn answers_are_cut_short_at_the_limit() {
    let mut group = played(solve("countdown", "20 12 6 1 -> 50"), Behavior::Policy, 7);
    assert!(group.rollouts.iter().all(|rollout| rollout.stop == StopReason::Length));
    check_choices(&SymbolLanguage, &group).unwrap();
    group.task.max_tokens = 8;
    let refusal = check_choices(&SymbolLanguage, &group).unwrap_err();
    assert_eq!(refusal, "rollout 0: expected 8 tokens in a truncated answer, got 7");
}

/// [`Group::check`] requires one log-probability for each choice, finite and at most 0.
#[test]
fn probabilities_that_are_none_are_refused() {
    for logprob in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.5] {
        let mut group = played(solve("countdown", "20 12 6 1 -> 50"), Behavior::Policy, 20);
        group.rollouts[0].logprobs[0] = logprob;
        let says = "expected a finite log-probability of at most 0 for every choice";
        assert_eq!(group.check(VOCABULARY_SIZE), Err(says.to_owned()), "{logprob}");
    }
}

/// Sends a forged group through the verifier. Threads of one process trust each other, so there it is a fatal error.
#[tokio::test]
async fn a_verifier_judges_no_forged_group() {
    let bus: Arc<dyn Bus> = Arc::new(InProcess::new());
    let honest = played(solve("countdown", "20 12 6 1 -> 50"), Behavior::Policy, 20);
    let mut forged = honest.clone();
    forged.sets[0] = (0..256).collect();
    assert_eq!(forged.check(VOCABULARY_SIZE), Ok(()));
    let publish = async |body| bus.publish_group(Message { envelope: Envelope::default(), body }).await.unwrap();
    let verifier = tokio::spawn(verifier::run(
        Judge::new(Arc::new(SymbolLanguage), NUM_ROLLOUTS),
        bus.clone(),
        CancellationToken::new(),
    ));
    publish(honest.clone()).await;
    assert_eq!(bus.next_scored().await.unwrap().message.body.group, honest);
    publish(forged).await;
    let error = verifier.await.unwrap().unwrap_err();
    let Error::Group { task, reason } = error else { panic!("{error}") };
    assert_eq!(task, honest.task.id);
    assert!(
        reason.starts_with("rollout 0: expected the language's legal tokens at token ")
            && reason.ends_with("set of 256 tokens"),
        "{reason}"
    );
}
