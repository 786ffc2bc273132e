//! Verdicts and examples of groups, and resistance to hostile actors.

use domains::{domain, exam};
use language::text::{Constraint, TextLanguage, TextOptions, Tokenizer, TokenizerParts};
use language::{Language as _, Next, SymbolLanguage, enumerate_answers};
use proptest::prelude::*;
use proto::{
    Behavior, Choices, Difficulty, Digest, Group, LabelOrigin, Legal, LegalTokens, Niche, Problem, ProblemKey,
    ProblemOrigin, Request, Rollout, Sampling, ScoredGroup, StopReason, Task, TaskId, TaskKind, TokenId, TokenSet,
    Verdict,
};

/// Scores a group of the symbol language.
fn score(group: Group, key: Option<&ProblemKey>) -> Result<ScoredGroup, language::Error> {
    verifier::score(&SymbolLanguage, group, key)
}

fn solve(domain: &str, problem: &str) -> Request {
    let problem = Problem { domain: domain.to_owned(), text: problem.to_owned() };
    Request::Solve { problem, origin: ProblemOrigin::Ladder, has_key: false }
}

fn group(problem: &str, kind: TaskKind, answers: &[&[TokenId]]) -> Group {
    let rollouts = answers.iter().map(|answer| Rollout {
        tokens: answer.to_vec(),
        choices: Choices { positions: Some(vec![60_000]), legal: vec![Legal::Set(9)] },
        logprobs: vec![f32::NAN],
        values: None,
        search: None,
        stop: StopReason::Complete,
        versions: Vec::new(),
    });
    Group {
        task: Task {
            id: TaskId { kind, batch: 0, index: 0 },
            seed: 0,
            weights: Digest::of_bytes(b""),
            policy_version: 0,
            free_running: false,
            request: solve("countdown", problem),
            family: String::new(),
            num_rollouts: answers.len() as u32,
            sampling: Sampling { behavior: Behavior::Policy, temperature: 1.0 },
            max_tokens: 20,
        },
        sets: Vec::new(),
        rollouts: rollouts.collect(),
    }
}

/// 112 is `*`, 110 is `+`, 114 is `=`.
const SOLVES_82: [TokenId; 10] = [25, 112, 3, 114, 75, 75, 110, 7, 114, 82];

#[test]
fn solved_and_missed_both_become_examples_of_what_they_solve() {
    let scored = score(group("25 7 3 -> 82", TaskKind::Train, &[&SOLVES_82]), None).unwrap();
    assert_eq!(scored.verdicts, [Verdict::Correct]);
    assert_eq!(scored.examples[0].label_origin, LabelOrigin::Solved);
    let missed = score(group("25 7 3 -> 78", TaskKind::Train, &[&SOLVES_82]), None).unwrap();
    assert_eq!(missed.verdicts, [Verdict::Incorrect]);
    assert_eq!(missed.examples[0].label_origin, LabelOrigin::Hindsight);
    assert_eq!(missed.examples[0].prompt, scored.prompt, "the prompt is the problem that was solved");
    assert_ne!(missed.prompt, scored.prompt);
}

/// Sets and positions of examples come from the grammar, never from the actor (here the actor's are nonsense).
#[test]
fn sets_are_derived_anew() {
    let scored = score(group("25 7 3 -> 82", TaskKind::Train, &[&SOLVES_82]), None).unwrap();
    let mut grammar = SymbolLanguage.open(&scored.group.task.request).unwrap();
    let mut expected: Vec<(usize, TokenSet)> = Vec::new();
    for (position, token) in SOLVES_82.iter().enumerate() {
        if let Next::Choice(LegalTokens::Only(legal)) = grammar.next() {
            expected.push((position, legal));
        }
        assert!(grammar.push(*token));
    }
    let set = |legal| match legal {
        Legal::Set(set) => scored.example_sets[set as usize].clone(),
        Legal::Any => panic!("a grammar names what is legal"),
    };
    let choices = scored.examples[0].choices.iter();
    let derived: Vec<_> = choices.map(|(position, legal)| (position, set(legal))).collect();
    assert_eq!(derived, expected);
    assert!(!derived.is_empty());
}

#[test]
fn nothing_of_an_exam_becomes_an_example() {
    let sat = exam("countdown-3").unwrap();
    let domain = domain("countdown").unwrap();
    for problem in sat.test.iter().chain(&sat.dev).take(200) {
        let request = solve("countdown", &problem.text);
        let is_right = |answer: &Vec<TokenId>| {
            let text = SymbolLanguage.text(&request, answer).unwrap().unwrap();
            domain.judge(problem, None, &text).unwrap().verdict == Verdict::Correct
        };
        let solution = enumerate_answers(SymbolLanguage.open(&request).unwrap()).find(is_right).unwrap();
        // As the posed problem, and by hindsight from another target.
        let other = problem.text.split("->").next().unwrap().to_owned() + "-> 1";
        for text in [&problem.text, &other] {
            assert!(score(group(text, TaskKind::Train, &[&solution]), None).unwrap().examples.is_empty(), "{text}");
        }
    }
}

#[test]
fn evaluations_make_no_examples_and_nonsense_makes_no_panic() {
    assert!(score(group("25 7 3 -> 82", TaskKind::Evaluate, &[&SOLVES_82]), None).unwrap().examples.is_empty());
    let nonsense: [&[TokenId]; 4] = [&[], &[TokenId::MAX; 40], &[25, 112], &[25, 112, 3, 114, 76, 76, 110, 7, 114, 83]];
    let scored = score(group("25 7 3 -> 83", TaskKind::Train, &nonsense), None).unwrap();
    let expected = [Verdict::Malformed, Verdict::Malformed, Verdict::Malformed, Verdict::Incorrect];
    assert_eq!(scored.verdicts, expected);
    assert!(scored.examples.is_empty());
    assert!(score(group("no problem", TaskKind::Train, &[]), None).is_err());
}

/// The same bytes get the same verdict after ten thousand others.
#[test]
fn verdicts_do_not_depend_on_what_was_judged_before() {
    let first = score(group("25 7 3 -> 82", TaskKind::Train, &[&SOLVES_82, &[25], &[]]), None).unwrap();
    for number in 0..10_000u32 {
        let target = 1 + number % 99;
        let scored = score(group(&format!("25 7 3 -> {target}"), TaskKind::Train, &[&SOLVES_82]), None).unwrap();
        assert_eq!(scored.verdicts[0] == Verdict::Correct, target == 82);
    }
    let last = score(group("25 7 3 -> 82", TaskKind::Train, &[&SOLVES_82, &[25], &[]]), None).unwrap();
    assert_eq!((last.verdicts, last.examples, last.example_sets), (first.verdicts, first.examples, first.example_sets));
}

fn of_programs(problem: &str, answers: &[&str]) -> Group {
    let domain = domain("programs").unwrap();
    let problem = domain.problem_from_text(problem).unwrap();
    let tokens: Vec<Vec<TokenId>> =
        answers.iter().map(|text| SymbolLanguage.spell(&problem, text).unwrap().unwrap()).collect();
    let mut group = group("", TaskKind::Train, &tokens.iter().map(Vec::as_slice).collect::<Vec<_>>());
    group.task.request = solve("programs", &problem.text);
    group
}

/// Both `sort` and `rev` fit the visible pairs; the key decides which one is correct.
#[test]
fn an_induction_answer_must_do_what_the_key_does() {
    let pairs = "? max 1 : [3 2 1] -> [1 2 3] ; [5 4] -> [4 5]";
    let key = ProblemKey { text: "rev".to_owned() };
    let scored = score(of_programs(pairs, &["rev", "sort"]), Some(&key)).unwrap();
    assert_eq!(scored.verdicts, [Verdict::Correct, Verdict::Incorrect]);
    let labels = scored.examples.iter().filter(|example| example.prompt == scored.prompt).map(|it| it.label_origin);
    assert_eq!(labels.collect::<Vec<_>>(), [LabelOrigin::Solved], "what the key refutes is not taught");
    let without = score(of_programs(pairs, &["rev", "sort"]), None).unwrap();
    assert_eq!(without.verdicts, [Verdict::Correct, Verdict::Correct]);
    assert_ne!(scored.niche, without.niche, "the niche names the operations of the reference");
    let nonsense = ProblemKey { text: "no program".to_owned() };
    assert!(score(of_programs(pairs, &["rev"]), Some(&nonsense)).is_err());
}

/// For wrong outputs the executor adds the right one, once, labelled `Executor`. It also adds an induction example of the
/// program for every answer, each with other inputs.
#[test]
fn programs_that_are_shown_are_run_by_the_executor() {
    let scored = score(of_programs("sum : [1 2] -> ?", &["4", "5", "3"]), None).unwrap();
    let of_mode = |level| scored.examples.iter().filter(move |example| example.balance_key.level == level);
    let labels: Vec<_> = of_mode(1).map(|example| (example.label_origin, &example.answer[..])).collect();
    assert_eq!(labels, [(LabelOrigin::Executor, &[3][..]), (LabelOrigin::Solved, &[3][..])]);
    let inductions: Vec<_> = of_mode(3).collect();
    assert_eq!(inductions.len(), 3);
    assert!(inductions.iter().all(|example| example.label_origin == LabelOrigin::Executor));
    assert!(inductions.windows(2).all(|two| two[0].prompt != two[1].prompt && two[0].answer == two[1].answer));
}

#[test]
fn proposals_are_admitted_measured_by_niche_and_never_an_exam() {
    let countdown = domain("countdown").unwrap();
    let propose = |niche, answers: &[&[TokenId]]| {
        let mut group = group("", TaskKind::Train, answers);
        let domain = "countdown".to_owned();
        group.task.request = Request::Propose { domain, niche, difficulty: Difficulty::Hard };
        score(group, None).unwrap()
    };
    let three_numbers = Niche(0x0003_0000);
    // 25 7 3 -> 82 has a solution, 25 25 25 -> 90 has none; the others are not in the language.
    let nonsense: [&[TokenId]; 6] =
        [&[25, 7, 3, 82], &[25, 25, 25, 90], &[26, 7, 3, 82], &[7, 3, 82], &[], &[TokenId::MAX; 4]];
    let scored = propose(three_numbers, &nonsense);
    assert_eq!(scored.verdicts.iter().filter(|verdict| **verdict == Verdict::Correct).count(), 1);
    assert!(scored.examples.is_empty());
    let [proposal] = &scored.proposals[..] else { panic!("{:?}", scored.proposals) };
    assert_eq!((proposal.rollout, &proposal.keyed.problem.text[..]), (0, "25 7 3 -> 82"));
    assert_eq!(proposal.niche, countdown.niche(&proposal.keyed.problem, None).unwrap());
    assert_eq!(countdown.describe_niche(proposal.niche), "3 numbers, target 80 to 89, + *");
    assert_eq!(proposal.choices.iter().map(|(position, _)| position).collect::<Vec<_>>(), [0, 1, 2, 3]);
    for problem in &exam("countdown-3").unwrap().test[..200] {
        let (numbers, target) = problem.text.split_once(" -> ").unwrap();
        let mut tokens: Vec<TokenId> = numbers.split(' ').map(|number| number.parse().unwrap()).collect();
        tokens.push(target.parse().unwrap());
        assert!(propose(three_numbers, &[&tokens]).proposals.is_empty(), "{}", problem.text);
    }
}

/// A language whose tokens are bytes, and an end.
fn language_of_bytes(constraint: Constraint) -> TextLanguage {
    let is_printable = |byte: &u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let symbol = |byte: u8| {
        let stand_in = || 256 + (0..byte).filter(|before| !is_printable(before)).count() as u32;
        char::from_u32(if is_printable(&byte) { byte.into() } else { stand_in() }).unwrap().to_string()
    };
    let tokenizer = TokenizerParts::Gguf {
        model: "gpt2".to_owned(),
        pre: Some("smollm".to_owned()),
        tokens: (0..=255).map(symbol).chain(["<|end|>".to_owned()]).collect(),
        token_types: vec![1; 256].into_iter().chain([3]).collect(),
        merges: Vec::new(),
        bos: None,
        eos: Some(END),
        unknown: None,
        padding: None,
        add_bos: None,
        add_space_prefix: None,
        chat_template: None,
    };
    let options = TextOptions { max_reply_tokens: 40, num_examples: 1, constraint };
    TextLanguage::new(Tokenizer::new(tokenizer).unwrap(), 257, &[], options).unwrap()
}

const END: TokenId = 256;

/// An admitted proposal becomes that of the niche that it has. All else that a model may say is refused, and counted as no problem
/// or as one not worth asking.
#[test]
fn proposals_in_words_are_admitted_or_refused() {
    let arithmetic = domain("arithmetic").unwrap();
    let asked = Problem { domain: "arithmetic".to_owned(), text: "47 + 38".to_owned() };
    let asked = arithmetic.niche(&asked, None).unwrap();
    let in_exam = exam("arithmetic-sum").unwrap().dev[0].text.clone();
    let replies = [
        ("47 + 35", Verdict::Correct),
        ("10 + 35", Verdict::Correct),
        (&in_exam, Verdict::Incorrect),
        ("7 + 5", Verdict::Incorrect),
        ("", Verdict::Malformed),
        ("999999999999999999999999 + 1", Verdict::Malformed),
        ("reverse d o g", Verdict::Malformed),
        ("47 + 35<|end|>", Verdict::Malformed),
        ("\u{e9}\n\n47+35", Verdict::Malformed),
    ];
    let language = language_of_bytes(Constraint::None);
    let tokens = |reply: &str| reply.bytes().map(TokenId::from).chain([END]).collect::<Vec<_>>();
    let mut answers: Vec<Vec<TokenId>> = replies.iter().map(|(reply, _)| tokens(reply)).collect();
    // Incomplete, and no UTF-8.
    answers.extend([b"47 + 35".map(TokenId::from).to_vec(), vec![0xff, END]]);
    let mut group = group("", TaskKind::Train, &answers.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let difficulty = Difficulty::Hard;
    group.task.request = Request::Propose { domain: "arithmetic".to_owned(), niche: asked, difficulty };
    let scored = verifier::score(&language, group.clone(), None).unwrap();
    let expected: Vec<Verdict> = replies.iter().map(|(_, verdict)| *verdict).chain([Verdict::Malformed; 2]).collect();
    assert_eq!(scored.verdicts, expected);
    assert_eq!(scored.prompt, language.propose_prompt("arithmetic", asked, Difficulty::Hard).unwrap());
    assert!(scored.examples.is_empty());
    let [as_asked, moved] = &scored.proposals[..] else { panic!("{:?}", scored.proposals) };
    assert_eq!((as_asked.rollout, as_asked.niche, &*as_asked.keyed.problem.text), (0, asked, "47 + 35"));
    assert_eq!((moved.rollout, &*moved.keyed.problem.text), (1, "10 + 35"));
    let niche = arithmetic.describe_niche(moved.niche);
    assert!(moved.niche != asked && niche.ends_with("with a value from 40 to 49"), "{niche}");
    assert_eq!(moved.choices.len(), "10 + 35".len() + 1, "every token was chosen, the end as well");
    // Under the constraint fewer tokens are choices: of " + " only the first byte is, which could be a digit.
    let scored = verifier::score(&language_of_bytes(Constraint::Answer), group, None).unwrap();
    assert_eq!(scored.verdicts[..4], expected[..4]);
    assert_eq!(scored.proposals[0].choices.len(), 4, "{:?}", scored.proposals[0].choices);
}

/// Generates texts of problems and keys: valid, nearly valid, and arbitrary ones.
fn text() -> impl Strategy<Value = String> {
    let right = ["25 7 3 -> 82", "50 75 2 9 -> 98 max 9999", "sum : [1 2] -> ?", "sort take 2 : ? -> [1 2]", "rev"];
    let right = prop::sample::select([&right[..], &["? max 1 : [3 2 1] -> [1 2 3] ; [5 4] -> [4 5]"]].concat());
    let bent = (right.clone(), any::<prop::sample::Index>(), any::<char>()).prop_map(|(text, at, letter)| {
        let mut letters: Vec<char> = text.chars().collect();
        let at = at.index(letters.len());
        letters[at] = letter;
        letters.into_iter().collect()
    });
    prop_oneof![right.prop_map(str::to_owned), bent, ".{0,40}"]
}

fn request() -> impl Strategy<Value = Request> {
    let domain =
        prop::sample::select(domains::registry().iter().map(|domain| domain.name().to_owned()).collect::<Vec<_>>());
    let solve = (domain.clone(), text()).prop_map(|(domain, text)| solve(&domain, &text));
    let propose = (domain, any::<u64>(), any::<bool>()).prop_map(|(domain, niche, is_hard)| {
        let difficulty = if is_hard { Difficulty::Hard } else { Difficulty::Easy };
        Request::Propose { domain, niche: Niche(niche), difficulty }
    });
    prop_oneof![solve, propose]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// Every group either gets verdicts or is refused.
    #[test]
    fn no_group_makes_a_panic(
        request in request(),
        key in prop::option::of(text()),
        answers in prop::collection::vec(prop::collection::vec(0..256 as TokenId, 0..24), 0..4),
        is_evaluation: bool,
    ) {
        let kind = if is_evaluation { TaskKind::Evaluate } else { TaskKind::Train };
        let mut group = group("", kind, &answers.iter().map(Vec::as_slice).collect::<Vec<_>>());
        group.task.request = request;
        if let Ok(scored) = score(group, key.map(|text| ProblemKey { text }).as_ref()) {
            prop_assert_eq!(scored.verdicts.len(), answers.len());
            prop_assert!(!scored.prompt.is_empty());
        }
    }
}
