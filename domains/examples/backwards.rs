//! A complete domain without symbols, as docs/adding-a-domain.md describes it: the task is to write words backwards.

use domains::{Admission, Checker, Domain, Error, Forms, Judged, Ladder, describe_json};
use proto::{BalanceKey, CounterRng, Digest, KeyedProblem, LadderLevel, Niche, Problem, ProblemKey, Purpose, Verdict};
use serde_json::{Value, json};

/// A domain whose problems are words of three small letters.
pub(crate) struct Backwards;

impl Backwards {
    fn problem(word: &str) -> Result<Problem, Error> {
        let is_word = word.len() == 3 && word.bytes().all(|letter| letter.is_ascii_lowercase());
        let refusal = || Error::Problem { domain: "backwards", expected: "3 small letters".into(), got: word.into() };
        is_word.then(|| Problem { domain: "backwards".into(), text: word.into() }).ok_or_else(refusal)
    }
}

impl Domain for Backwards {}

impl Ladder for Backwards {
    fn name(&self) -> &'static str {
        "backwards"
    }

    fn ladder_levels(&self) -> &'static [LadderLevel] {
        &[LadderLevel { level: 1, description: "3 letters" }]
    }

    fn level_of(&self, _niche: Niche) -> u32 {
        1
    }

    fn ladder(&self, level: u32, seed: u64, index: u64) -> KeyedProblem {
        let mut rng = CounterRng::new(seed, Purpose::Ladder, u64::from(level), index, 0);
        let word: String = (0..3).map(|_| char::from(b'a' + rng.below(26) as u8)).collect();
        KeyedProblem { problem: Backwards::problem(&word).expect("a word of the level"), key: None }
    }

    fn mutate(&self, _parent: &KeyedProblem, _rng: &mut CounterRng) -> Option<KeyedProblem> {
        None
    }

    fn describe_niche(&self, _niche: Niche) -> String {
        "3 letters".to_owned()
    }

    fn canonical_hash(&self, problem: &Problem) -> Digest {
        Digest::of_bytes(problem.text.as_bytes())
    }
}

impl Checker for Backwards {
    fn judge(&self, problem: &Problem, _key: Option<&ProblemKey>, answer: &str) -> Result<Judged, Error> {
        let is_right = answer.trim().chars().rev().eq(Backwards::problem(&problem.text)?.text.chars());
        Ok(if is_right { Judged::correct() } else { Judged::because(Verdict::Incorrect, "is another word") })
    }

    /// Returns the problem that the answer solves: the answer spelled backwards.
    fn hindsight(&self, _problem: &Problem, answer: &str) -> Result<Option<Problem>, Error> {
        Ok(Backwards::problem(&answer.trim().chars().rev().collect::<String>()).ok())
    }

    fn niche(&self, problem: &Problem, _key: Option<&ProblemKey>) -> Result<Niche, Error> {
        Backwards::problem(&problem.text).map(|_| Niche(0))
    }

    fn admit(&self, _niche: Niche, proposal: &str) -> Result<Admission, Error> {
        let admitted = Backwards::problem(proposal.trim()).map(|problem| KeyedProblem { problem, key: None });
        Ok(admitted.map_err(|error| Judged::because(Verdict::Malformed, error.to_string())))
    }

    fn balance_key(&self, _problem: &Problem, _answer: Option<&str>) -> Result<BalanceKey, Error> {
        Ok(BalanceKey { level: 1, goal: 0 })
    }
}

impl Forms for Backwards {
    fn description(&self) -> &'static str {
        "write a word backwards"
    }

    fn problem_from_json(&self, json: &Value) -> Result<Problem, Error> {
        let got = describe_json(&json["word"]);
        let refusal = Error::Problem { domain: "backwards", expected: "a word in \"word\"".into(), got };
        Backwards::problem(json["word"].as_str().ok_or(refusal)?)
    }

    fn problem_from_text(&self, text: &str) -> Result<Problem, Error> {
        Backwards::problem(text)
    }

    fn problem_to_json(&self, problem: &Problem) -> Result<Value, Error> {
        Ok(json!({"domain": "backwards", "word": problem.text}))
    }
}

fn main() {
    let problem = Backwards.ladder(1, 0, 0).problem;
    let judged = Backwards.judge(&problem, None, "abc").expect("it is a problem of this domain");
    println!("{}: abc is {:?}", problem.text, judged.verdict);
}
