//! Guarantees of every domain of the registry; those about tokens, of every domain that supports symbols.

use std::collections::HashSet;
use std::sync::Arc;

use domains::symbols::{Grammar, Next, vocabulary};
use domains::{Domain, Exam, Judged, Symbols, Wording, answer_of, domain, exam, exam_specs, registry};
use language::{Language as _, SymbolLanguage, trace};
use proptest::strategy::{Strategy as _, ValueTree as _};
use proptest::string::string_regex;
use proptest::test_runner::TestRunner;
use proto::{CounterRng, Difficulty, KeyedProblem, Problem, Purpose, SetDictionary, TokenId, Verdict};
use regex::Regex;

use crate::symbols::{enumerated, propose, solve};

#[allow(dead_code, reason = "shared with other tests")]
mod symbols;

fn asked_in_symbols() -> impl Iterator<Item = &'static Arc<dyn Domain>> {
    registry().iter().filter(|domain| domain.symbols().is_some())
}

fn symbols_of(domain: &dyn Domain) -> &dyn Symbols {
    domain.symbols().expect("every domain here can be asked in symbols")
}

/// Plays uniformly random legal tokens to the end. Returns the answer as tokens and as text.
fn random_answer(domain: &dyn Domain, problem: &Problem, rng: &mut CounterRng) -> (Vec<TokenId>, String) {
    let symbols = symbols_of(domain);
    let answer = random_walk(symbols.grammar(problem).unwrap(), symbols.max_answer_tokens(problem).unwrap(), rng);
    let text = symbols.answer_text(problem, &answer).unwrap_or_else(|| panic!("{problem:?} {answer:?} has no text"));
    (answer, text)
}

fn random_walk(mut grammar: Box<dyn Grammar>, max_tokens: u32, rng: &mut CounterRng) -> Vec<TokenId> {
    let mut answer = Vec::new();
    loop {
        let token = match grammar.next() {
            Next::Done => return answer,
            Next::Forced(token) => token,
            Next::Choice(mask) => {
                assert!(mask.len() > 1, "a choice has two or more tokens");
                mask.iter().nth(rng.below(mask.len() as u64) as usize).unwrap()
            }
        };
        assert!((token as usize) < vocabulary::VOCABULARY_SIZE);
        assert!(grammar.push(token));
        answer.push(token);
        assert!(answer.len() <= max_tokens as usize, "{answer:?}");
    }
}

fn for_each_ladder_problem(num_each: u64, mut visit: impl FnMut(&dyn Domain, &Problem, &mut CounterRng)) {
    for domain in registry() {
        for level in domain.ladder_levels() {
            for index in 0..num_each {
                let problem = domain.ladder(level.level, 1, index).problem;
                let mut rng = CounterRng::new(1, Purpose::Rollout, u64::from(level.level), index, 0);
                visit(domain.as_ref(), &problem, &mut rng);
            }
        }
    }
}

#[test]
fn legal_play_is_never_malformed_and_stays_within_its_length() {
    for_each_ladder_problem(300, |domain, problem, rng| {
        if domain.symbols().is_none() {
            return;
        }
        let (answer, text) = random_answer(domain, problem, rng);
        let Judged { verdict, reason } = domain.judge(problem, None, &text).unwrap();
        assert!(matches!(verdict, Verdict::Correct | Verdict::Incorrect), "{problem:?} {text:?} {verdict:?}");
        let has_reason = reason.is_some_and(|reason| !reason.is_empty());
        assert_eq!(has_reason, verdict != Verdict::Correct, "{text}: every verdict but correct has a reason");
        assert_eq!(symbols_of(domain).spell(problem, &text), Some(answer), "{text}: the one spelling");
    });
}

/// What a solver finds is right, in the form that is constrained decoding's.
#[test]
fn solutions_are_correct() {
    let mut solved = HashSet::new();
    for_each_ladder_problem(300, |domain, problem, _| {
        let Some(solution) = domain.solution(problem) else { return };
        solved.insert(domain.name());
        assert_eq!(domain.judge(problem, None, &solution).unwrap(), Judged::correct(), "{problem:?} {solution}");
        if let Some(pattern) = domain.wording().and_then(|wording| wording.answer_pattern(problem).unwrap()) {
            assert!(Regex::new(&format!("^(?:{pattern})$")).unwrap().is_match(&solution), "{pattern} {solution}");
        }
    });
    for name in ["arithmetic", "comparison", "strings", "countdown"] {
        assert!(solved.contains(name), "{solved:?}");
    }
}

/// Worked examples are solved as a model's reply would be, match the pattern, and are in no exam. Every problem that a
/// generator draws has a question.
#[test]
fn worked_examples_are_correct_and_problems_have_questions() {
    let mut num_domains = 0;
    for domain in registry() {
        let Some(wording) = domain.wording() else { continue };
        num_domains += 1;
        for (problem, reply) in wording.examples() {
            assert_eq!(
                domain.judge(&problem, None, answer_of(&reply)).unwrap(),
                Judged::correct(),
                "{problem:?} {reply}"
            );
            assert!(!domain.is_exam(&problem), "{problem:?}");
            if let Some(pattern) = wording.answer_pattern(&problem).unwrap() {
                let pattern = Regex::new(&format!("^(?:{pattern})$")).unwrap();
                assert!(pattern.is_match(answer_of(&reply)), "{pattern} {reply}");
            }
        }
        for level in domain.ladder_levels() {
            let problem = domain.ladder(level.level, 1, 0).problem;
            assert!(wording.question(&problem).unwrap().len() > problem.text.len());
        }
        let foreign = Problem { domain: "elsewhere".to_owned(), text: "1 2 -> 3".to_owned() };
        assert!(wording.question(&foreign).is_err());
        assert!(wording.answer_pattern(&foreign).is_err());
    }
    assert!(num_domains > 0);
}

/// Every text gets a verdict, and every verdict but `correct` comes with a short reason.
#[test]
fn noise_in_text_is_judged_with_a_reason() {
    const PIECES: [&str; 24] = [
        "25",
        "7",
        "3",
        "[",
        "]",
        "(",
        ")",
        ",",
        ";",
        "=",
        "+",
        "-",
        "*",
        "/",
        "sort",
        "take 2",
        "map",
        " ",
        "\n",
        "\u{feff}",
        "−",
        "0",
        "9999999999999999999999",
        "é",
    ];
    for_each_ladder_problem(100, |domain, problem, rng| {
        let text: String = (0..rng.below(16)).map(|_| PIECES[rng.below(PIECES.len() as u64) as usize]).collect();
        let Judged { verdict, reason } = domain.judge(problem, None, &text).unwrap();
        match reason {
            None => assert_eq!(verdict, Verdict::Correct, "{text:?}"),
            Some(reason) => assert!(!reason.is_empty() && reason.len() < 400, "{text:?}: {reason}"),
        }
    });
}

#[test]
fn hindsight_names_a_problem_that_the_answer_solves() {
    let mut num_found = 0;
    for_each_ladder_problem(300, |domain, problem, rng| {
        if domain.symbols().is_none() {
            return;
        }
        let (answer, text) = random_answer(domain, problem, rng);
        let solved = domain.judge(problem, None, &text).unwrap().verdict == Verdict::Correct;
        let hindsight = domain.hindsight(problem, &text).unwrap();
        assert!(!solved || hindsight.as_ref() == Some(problem));
        if let Some(other) = hindsight {
            num_found += 1;
            assert_eq!(domain.judge(&other, None, &text).unwrap().verdict, Verdict::Correct);
            let episode = SymbolLanguage.open(&solve(&other)).unwrap();
            assert!(episode.prompt().len() <= SymbolLanguage.room(problem).unwrap().prompt);
            let choices = trace(episode, &answer, &mut SetDictionary::default());
            assert!(choices.is_some(), "the answer is legal under the relabelled problem");
        }
    });
    assert!(num_found > 1_000, "hindsight found {num_found} problems");
}

#[test]
fn ladder_is_a_function_of_its_arguments_and_can_be_solved() {
    for_each_ladder_problem(3, |domain, problem, _| {
        // In other domains enumeration takes too long to find an answer; `tests/programs.rs` takes the generator's.
        if domain.name() == "countdown" {
            let is_right = |answer: String| domain.judge(problem, None, &answer).unwrap().verdict == Verdict::Correct;
            assert!(enumerated(problem).take(200_000).any(is_right), "{problem:?}");
        }
    });
    for domain in registry() {
        for level in domain.ladder_levels() {
            let draw = |seed, index| domain.ladder(level.level, seed, index);
            assert_eq!(draw(1, 0), draw(1, 0));
            let distinct: HashSet<_> = (0..50).map(|index| draw(2, index)).collect();
            // The smallest levels have 100 problems: sums and products of two digits.
            assert!(distinct.len() > 25, "{} level {} repeats itself", domain.name(), level.level);
            for KeyedProblem { problem, key } in distinct {
                assert_eq!(domain.balance_key(&problem, None).unwrap().level, level.level, "{problem:?}");
                assert_eq!(domain.level_of(domain.niche(&problem, key.as_ref()).unwrap()), level.level, "{problem:?}");
            }
        }
    }
}

#[test]
fn problems_survive_their_json_and_their_text() {
    for_each_ladder_problem(50, |domain, problem, _| {
        let json = domain.problem_to_json(problem).unwrap();
        assert_eq!(&domains::problem_from_json(&json).unwrap(), problem);
        assert_eq!(&domain.problem_from_text(&problem.text).unwrap(), problem);
        let mut unknown = json.clone();
        unknown["unknown"] = 1.into();
        assert!(domains::problem_from_json(&unknown).is_err());
    });
}

#[test]
fn exams_are_what_their_generator_writes_and_nothing_trains_on_them() {
    for spec in exam_specs() {
        let committed = exam(spec.name).unwrap();
        let is_same = committed == &Exam::generate(spec).unwrap();
        assert!(is_same, "{}: rebuild it with `generate --exam`", spec.name);
        let domain = domain(spec.domain).unwrap();
        let distinct: HashSet<_> =
            committed.dev.iter().chain(&committed.test).map(|problem| domain.canonical_hash(problem)).collect();
        assert_eq!(distinct.len(), committed.dev.len() + committed.test.len());
        assert!(committed.dev.iter().chain(&committed.test).all(|problem| domain.is_exam(problem)));
        for seed in 0..3 {
            assert!((0..2_000).all(|index| !domain.is_exam(&domain.ladder(spec.level, seed, index).problem)));
        }
    }
}

#[test]
fn illegal_tokens_change_nothing() {
    for_each_ladder_problem(20, |domain, problem, _| {
        if domain.symbols().is_none() {
            return;
        }
        let mut grammar = symbols_of(domain).grammar(problem).unwrap();
        let before = grammar.next();
        for token in 0..vocabulary::VOCABULARY_SIZE as TokenId {
            let legal = match &before {
                Next::Done => false,
                Next::Forced(forced) => *forced == token,
                Next::Choice(mask) => mask.contains(token),
            };
            if !legal {
                assert!(!grammar.push(token));
                assert_eq!(grammar.next(), before);
            }
        }
        for nothing in [&[][..], &[TokenId::MAX]] {
            assert_eq!(symbols_of(domain).answer_text(problem, nothing), None);
        }
    });
}

/// Checks that a problem may be posed: it is valid, in no exam, has a niche, and a prompt in symbols has a bounded length.
fn expect_posable(domain: &dyn Domain, keyed: &KeyedProblem) {
    assert_eq!(&domain.problem_from_text(&keyed.problem.text).unwrap(), &keyed.problem);
    assert!(!domain.is_exam(&keyed.problem), "{keyed:?}");
    if let Some(symbols) = domain.symbols() {
        let prompt = symbols.prompt(&keyed.problem).unwrap();
        assert!(prompt.len() <= symbols.max_prompt_tokens(&keyed.problem).unwrap());
    }
    assert_eq!(domain.judge(&keyed.problem, keyed.key.as_ref(), "").unwrap().verdict, Verdict::Malformed);
    let niche = domain.niche(&keyed.problem, keyed.key.as_ref()).unwrap();
    assert!(!domain.describe_niche(niche).is_empty());
}

#[test]
fn random_proposals_are_legal_and_some_are_admitted_where_they_say() {
    for domain in asked_in_symbols() {
        let symbols = symbols_of(domain.as_ref());
        let (mut num_admitted, mut num_played) = (0, 0);
        for level in domain.ladder_levels() {
            for index in 0..40 {
                let KeyedProblem { problem, key } = domain.ladder(level.level, 2, index);
                let niche = domain.niche(&problem, key.as_ref()).unwrap();
                assert_eq!(domain.level_of(niche), level.level);
                let prompt = symbols.propose_prompt(niche, Difficulty::Hard);
                assert_ne!(prompt, symbols.propose_prompt(niche, Difficulty::Easy));
                let mut rng = CounterRng::new(2, Purpose::Rollout, u64::from(level.level), index, 0);
                for _ in 0..20 {
                    num_played += 1;
                    let max_tokens = symbols.max_proposal_tokens(niche);
                    let proposal = random_walk(symbols.proposal_grammar(niche), max_tokens, &mut rng);
                    let text = symbols.proposal_text(niche, &proposal).expect("a complete proposal has a text");
                    let Ok(admitted) = domain.admit(niche, &text).unwrap() else { continue };
                    num_admitted += 1;
                    expect_posable(domain.as_ref(), &admitted);
                    let found = domain.niche(&admitted.problem, admitted.key.as_ref()).unwrap();
                    assert_eq!(domain.level_of(found), level.level, "level binds");
                    let episode = SymbolLanguage.open(&propose(domain.name(), found)).unwrap();
                    let choices = trace(episode, &proposal, &mut SetDictionary::default());
                    assert!(choices.is_some(), "the proposal is legal under the niche that it turned out to have");
                    assert_eq!(domain.admit(found, &text).unwrap(), Ok(admitted));
                }
                for noise in ["", ":", "->", "25 7 3", "sort", &"9 ".repeat(10_000)] {
                    assert_eq!(domain.admit(niche, noise).unwrap().unwrap_err().verdict, Verdict::Malformed);
                }
                for noise in [&[][..], &[TokenId::MAX; 4]] {
                    assert_eq!(symbols.proposal_text(niche, noise), None);
                }
            }
        }
        assert!(20 * num_admitted > num_played, "{}: {num_admitted} of {num_played}", domain.name());
        // An arbitrary niche causes no panic.
        for niche in [0, u64::MAX, 0x0102_0304_0506_0708].map(proto::Niche) {
            let mut rng = CounterRng::new(3, Purpose::Rollout, 0, niche.0, 0);
            symbols.propose_prompt(niche, Difficulty::Unsolved);
            let levels = domain.ladder_levels();
            assert!(domain.level_of(niche) <= levels.last().unwrap().level);
            let proposal = random_walk(symbols.proposal_grammar(niche), symbols.max_proposal_tokens(niche), &mut rng);
            let _ = domain.admit(niche, &symbols.proposal_text(niche, &proposal).unwrap()).unwrap();
        }
    }
}

/// What every domain guarantees whose problems can be proposed in words.
#[test]
fn proposals_in_words_are_asked_for_by_niche_and_admitted_where_they_say() {
    let mut num_domains = 0;
    let mut runner = TestRunner::deterministic();
    for domain in registry() {
        let Some(proposing) = domain.wording().and_then(Wording::proposing) else { continue };
        num_domains += 1;
        let (mut requests, mut niches) = (HashSet::new(), HashSet::new());
        for level in domain.ladder_levels() {
            let (mut num_admitted, mut num_drawn) = (0, 0);
            for index in 0..20 {
                let KeyedProblem { problem, key } = domain.ladder(level.level, 2, index);
                let niche = domain.niche(&problem, key.as_ref()).unwrap();
                niches.insert(niche);
                requests.insert(proposing.request(niche).unwrap());
                let pattern = proposing.pattern(niche).unwrap();
                let whole = Regex::new(&format!("^(?:{pattern})$")).unwrap();
                let examples = proposing.examples(niche).unwrap();
                assert_eq!((examples.len(), &examples), (3, &proposing.examples(niche).unwrap()));
                for (other, proposal) in examples {
                    assert!(whole.is_match(&proposal), "{pattern} {proposal}");
                    assert_eq!(proposing.pattern(other).unwrap(), pattern, "one pattern for all niches of a level");
                    let admitted = domain.admit(niche, &proposal).unwrap().unwrap();
                    expect_posable(domain.as_ref(), &admitted);
                    assert_eq!(domain.niche(&admitted.problem, admitted.key.as_ref()).unwrap(), other, "{proposal}");
                }
                let proposals = string_regex(&pattern).unwrap();
                for _ in 0..20 {
                    num_drawn += 1;
                    let proposal = proposals.new_tree(&mut runner).unwrap().current();
                    match domain.admit(niche, &proposal).unwrap() {
                        Ok(admitted) => {
                            num_admitted += 1;
                            expect_posable(domain.as_ref(), &admitted);
                            let found = domain.niche(&admitted.problem, admitted.key.as_ref()).unwrap();
                            assert_eq!(domain.level_of(found), level.level, "level binds");
                            assert_eq!(domain.admit(found, &proposal).unwrap(), Ok(admitted));
                        }
                        Err(Judged { verdict, reason }) => {
                            assert!(reason.is_some_and(|reason| !reason.is_empty()), "{proposal}");
                            assert!(matches!(verdict, Verdict::Incorrect | Verdict::Malformed), "{proposal}");
                        }
                    }
                }
            }
            // Of random targets of two numbers, one in fifty or so can be made.
            assert!(100 * num_admitted > num_drawn, "{} {level:?}: {num_admitted} of {num_drawn}", domain.name());
        }
        assert!(requests.len() == niches.len() && niches.len() > domain.ladder_levels().len(), "{requests:?}");
        for nowhere in [0x0006_0000, 0xff06_0000].map(proto::Niche) {
            assert_eq!(domain.level_of(nowhere), 0);
            assert!(proposing.request(nowhere).is_err() && proposing.examples(nowhere).is_err());
            assert!(proposing.pattern(nowhere).is_err());
        }
    }
    assert_eq!(num_domains, 7);
}

#[test]
fn mutants_are_other_problems_that_may_be_posed() {
    for domain in registry().iter().filter(|domain| !domain.ladder_levels().is_empty()) {
        let (mut num_mutants, mut num_parents) = (0, 0);
        for level in domain.ladder_levels() {
            for index in 0..20 {
                let mut parent = domain.ladder(level.level, 4, index);
                let mut rng = CounterRng::new(4, Purpose::Mutation, u64::from(level.level), index, 0);
                for _ in 0..5 {
                    num_parents += 1;
                    let Some(mutant) = domain.mutate(&parent, &mut rng) else { continue };
                    num_mutants += 1;
                    assert_ne!(mutant.problem, parent.problem);
                    if domain.symbols().is_some() {
                        let room = |keyed: &KeyedProblem| SymbolLanguage.room(&keyed.problem).unwrap().prompt;
                        let lengths = [room(&mutant), room(&parent)];
                        assert!(
                            lengths[0] <= lengths[1],
                            "{lengths:?}: a change makes no prompt longer than was allowed for"
                        );
                    }
                    expect_posable(domain.as_ref(), &mutant);
                    let niche = domain.niche(&mutant.problem, mutant.key.as_ref()).unwrap();
                    assert_eq!(domain.level_of(niche), level.level, "a change keeps the level");
                    parent = mutant;
                }
            }
        }
        assert!(5 * num_mutants > 4 * num_parents, "{}: {num_mutants} of {num_parents}", domain.name());
    }
}
