//! Programs: deduce outputs, abduce inputs and induce programs of a small custom language, as in Absolute Zero
//! (Zhao et al. 2025).
//!
//! A program is a pipeline of operations on a list, `filter (> 3) map (* 2) sum`. A problem shows two of program, input
//! and output and asks for the third: `sort take 2 : [5 1 4] -> ?` for the output, `sort take 2 : ? -> [1 4]` for any
//! input that gives it, `? max 2 : [5 1 4] -> [1 4] ; [7 2] -> [2 7]` for any program of at most two operations that
//! does so. The language is total and charges fuel; integers that leave -99 to 99 leave the program without a value.
//! `programs-digits` is the straight-line language over digits modulo 10.
//!
//! Programs are distinguished by their outputs on fixed probe inputs. Behaviours are held out of training by their hash, so
//! that exams can ask about functions that no training source has shown. Every operation counts towards the length of a
//! program, those of lambdas included.
//!
//! Reading order, lowest layer first; a file imports those above it:
//!
//! | file | has |
//! |---|---|
//! | `value` | integers and lists, their text and tokens |
//! | `language` | `Dialect` and `Program`: operations, parsing, types |
//! | `interpreter` | `Machine`, which runs a program for fuel |
//! | `grammar` | which tokens may follow in a program or a value such that it can still be completed |
//! | `behavior` | what programs do on the probe inputs, and the catalogue of the shortest ones |
//! | `puzzle` | `Puzzle`: a problem as posed, read from text and judged |
//! | `generate` | the ladder and the exams |
//! | `propose` | problems that a policy writes, and changes of problems |
//! | `symbols` | the interface for networks that read symbols |
//! | `words` | the interface for models that read text |
//!
//! A `Puzzle` is only the public part of a problem. A `Sketch` is what a generator knows: a puzzle, the program behind it
//! and an answer. A [`Drawn`] is the same in text, for users of this crate. A [`Descriptor`] is the kind of problem that a puzzle
//! is; packed into a number it is the niche. A `Kind` is a niche of a dialect: the request for a proposal.
//!
//! An induction problem has a key, the reference program. With the key, an answer must behave like the reference on the probe
//! inputs; without it, only the visible pairs count. The keys of exams are committed beside them, and [`Checker::judge`] uses
//! them.

mod behavior;
mod generate;
mod grammar;
mod interpreter;
mod language;
mod propose;
mod puzzle;
mod symbols;
mod value;
mod words;

use std::collections::HashMap;
use std::sync::LazyLock;

use proto::{BalanceKey, CounterRng, Digest, KeyedProblem, LadderLevel, Niche, Problem, ProblemKey, Purpose, Verdict};

use self::behavior::{Behavior, Catalog};
use self::generate::Sketch;
use self::interpreter::Machine;
use self::language::Program;
use self::puzzle::{Puzzle, is_consistent, operation_bits, written_program};
use crate::exam::{Exam, ExamSpec, exam, exam_contains};
use crate::symbols::Symbols;
use crate::{Admission, Checker, Domain, Error, Exams, Forms, Judged, Ladder, Wording};

pub use self::generate::{ExamSplit, Stratum};
pub use self::language::Dialect;
pub use self::puzzle::Mode;

/// The domain of programs.
#[derive(Clone, Copy, Debug)]
pub struct Programs {
    /// Which language the programs are in.
    pub dialect: Dialect,
}

/// A problem with its key and an answer, which its generator knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drawn {
    /// The public part.
    pub problem: Problem,
    /// The key, if the mode has one.
    pub key: Option<ProblemKey>,
    /// One correct answer.
    pub answer: String,
}

/// A parsed problem, for judging many answers.
#[derive(Clone, Debug)]
pub struct PreparedProblem {
    puzzle: Puzzle,
    reference: Option<Program>,
    machine: Machine,
}

impl PreparedProblem {
    /// Judges an answer, with a reason when it is not correct.
    pub fn judge(&mut self, answer: &str) -> Judged {
        let answer = match self.puzzle.parse_answer(answer) {
            Ok(answer) => answer,
            Err(judged) => return judged,
        };
        match self.puzzle.judge(&answer, self.reference.as_ref(), &mut self.machine) {
            Verdict::Correct => Judged::correct(),
            verdict => Judged::because(verdict, self.puzzle.explain(&answer, verdict, &mut self.machine)),
        }
    }

    /// Judges an answer, without a reason.
    fn verdict(&mut self, answer: &str) -> Verdict {
        match self.puzzle.parse_answer(answer) {
            Ok(answer) => self.puzzle.judge(&answer, self.reference.as_ref(), &mut self.machine),
            Err(judged) => judged.verdict,
        }
    }
}

/// The kind of a problem: the niche in which it competes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Descriptor {
    /// What is asked.
    pub mode: Mode,
    /// Operations of the shortest known program with the same behaviour. For an induction problem without a key, the
    /// most that an answer may have.
    pub length: u8,
    /// The operations used, as bits; none for an induction problem without a key.
    pub operations: u32,
    /// Kind of output: sign and size of an integer, length and size of a list.
    pub output_bucket: u8,
}

impl Descriptor {
    /// Packs the descriptor into one number.
    pub fn niche(&self) -> Niche {
        let high = u64::from(self.mode as u8) << 16 | u64::from(self.length) << 8 | u64::from(self.output_bucket);
        Niche(high << 32 | u64::from(self.operations))
    }

    /// Unpacks a niche; an unknown mode becomes the nearest one.
    pub fn of(niche: Niche) -> Descriptor {
        let high = niche.0 >> 32;
        let mode = match high >> 16 {
            0 => Mode::Deduction,
            1 => Mode::Abduction,
            _ => Mode::Induction,
        };
        Descriptor { mode, length: (high >> 8) as u8, operations: niche.0 as u32, output_bucket: high as u8 }
    }
}

impl Domain for Programs {
    fn symbols(&self) -> Option<&dyn Symbols> {
        Some(self)
    }

    fn wording(&self) -> Option<&dyn Wording> {
        Some(self)
    }

    fn exams(&self) -> Option<&dyn Exams> {
        Some(self)
    }
}

impl Ladder for Programs {
    fn name(&self) -> &'static str {
        match self.dialect {
            Dialect::Full => "programs",
            Dialect::Digits => "programs-digits",
        }
    }

    fn ladder_levels(&self) -> &'static [LadderLevel] {
        &generate::FULL_LEVELS[..3 * self.dialect.max_operations()]
    }

    fn level_of(&self, niche: Niche) -> u32 {
        let Descriptor { mode, length, .. } = Descriptor::of(niche);
        let length = usize::from(length);
        if (1..=self.dialect.max_operations()).contains(&length) { generate::level(mode, length) } else { 0 }
    }

    fn ladder(&self, level: u32, seed: u64, index: u64) -> KeyedProblem {
        let drawn = self.draw_ladder(level, seed, index);
        KeyedProblem { problem: drawn.problem, key: drawn.key }
    }

    fn mutate(&self, parent: &KeyedProblem, rng: &mut CounterRng) -> Option<KeyedProblem> {
        let puzzle = self.puzzle(&parent.problem).ok()?;
        let reference = parent.key.as_ref().map(|key| self.reference(key)).transpose().ok()?;
        let program = puzzle.program().or(reference.as_ref())?;
        let mutant = propose::mutate(&puzzle, program, rng, |mutant| self.is_trainable(mutant))?;
        Some(self.keyed(mutant))
    }

    fn describe_niche(&self, niche: Niche) -> String {
        propose::Kind::of(self.dialect, niche).to_string()
    }

    /// Hashes the text, except for the largest program length that an induction problem allows.
    fn canonical_hash(&self, problem: &Problem) -> Digest {
        canonical_hash(&problem.text)
    }

    /// Whether a problem is in an exam or about a held-out behaviour.
    ///
    /// If the problem shows its program, the program's behaviour decides. An induction problem is refused when any
    /// held-out program that it allows satisfies its pairs: any held-out behaviour of up to three operations, and any
    /// longer one that an exam asks about. This refuses more than necessary; [`Programs::is_exam_with_key`] is exact.
    fn is_exam(&self, problem: &Problem) -> bool {
        let canonical_hash = self.canonical_hash(problem);
        self.puzzle(problem).is_ok_and(|puzzle| self.is_exam_puzzle(&puzzle, &canonical_hash))
    }
}

impl Checker for Programs {
    fn judge(&self, problem: &Problem, key: Option<&ProblemKey>, answer: &str) -> Result<Judged, Error> {
        Ok(self.checker(problem, key)?.judge(answer))
    }

    fn verdicts(&self, problem: &Problem, key: Option<&ProblemKey>, answers: &[&str]) -> Result<Vec<Verdict>, Error> {
        let mut checker = self.checker(problem, key)?;
        Ok(answers.iter().map(|answer| checker.verdict(answer)).collect())
    }

    /// True for abduction: any input with the given output is correct, and running the program reveals no more than that.
    /// Deduction asks for the output, and the key of an induction problem is hidden.
    fn may_be_searched(&self, problem: &Problem) -> bool {
        self.puzzle(problem).is_ok_and(|puzzle| puzzle.mode() == Mode::Abduction)
    }

    /// Returns the abduction or induction problem that an answer solves. A wrong output solves no deduction problem: see
    /// [`Programs::executions`]. A program with a held-out behaviour counts only for the problem as posed.
    fn hindsight(&self, problem: &Problem, answer: &str) -> Result<Option<Problem>, Error> {
        let puzzle = self.puzzle(problem)?;
        let Ok(answer) = puzzle.parse_answer(answer) else { return Ok(None) };
        let Some(solved) = puzzle.hindsight(&answer) else { return Ok(None) };
        let is_relabelled_program = solved != puzzle && solved.mode() == Mode::Induction;
        if is_relabelled_program {
            let behavior =
                written_program(self.dialect, &answer).map(|program| Behavior::of(&program, &mut Machine::new()));
            if behavior.is_none_or(|behavior| behavior.is_held_out(self.dialect)) {
                return Ok(None);
            }
        }
        Ok(Some(self.problem(&solved)))
    }

    /// Runs the program of a problem or of an answer. Lists first the deduction of its output, if it has one, then the induction
    /// of a program that the problem shows, from inputs drawn with a seed that depends on problem and answer.
    fn executions(&self, problem: &Problem, answer: &str) -> Result<Vec<(Problem, String)>, Error> {
        let puzzle = self.puzzle(problem)?;
        // A program that the problem shows can be run whatever the answer is.
        let answer = puzzle.parse_answer(answer).unwrap_or_default();
        let deduction = puzzle.execution(&answer).and_then(|deduction| {
            let Puzzle::Deduction { output, .. } = &deduction else { return None };
            Some((self.problem(&deduction), output.view().text()))
        });
        let teaches = |program: &&Program| !Behavior::of(program, &mut Machine::new()).is_held_out(self.dialect);
        let induction = puzzle.program().filter(teaches).and_then(|program| {
            // Two bytes per symbol, whatever the width of token ids: the draws of every run depend on it.
            let answer: Vec<u8> = answer.iter().flat_map(|token| (*token as u16).to_le_bytes()).collect();
            let run = Digest::of_digests(&[Digest::of_bytes(problem.text.as_bytes()), Digest::of_bytes(&answer)]);
            generate::induction(program, &mut CounterRng::of_digest(&run, Purpose::Execution))
        });
        let induction = induction.map(|sketch| (self.problem(&sketch.puzzle), sketch.answer));
        Ok(deduction.into_iter().chain(induction).collect())
    }

    fn niche(&self, problem: &Problem, key: Option<&ProblemKey>) -> Result<Niche, Error> {
        Ok(self.descriptor(problem, key)?.niche())
    }

    /// Admits problems like those of the ladder: about a program that depends on its input, that no shorter program
    /// equals, and that has no held-out behaviour, with an output that is neither empty nor the input.
    fn admit(&self, niche: Niche, proposal: &str) -> Result<Admission, Error> {
        let is_held_out = || Judged::because(Verdict::Incorrect, "is held out for the exams");
        let admitted = propose::Kind::of(self.dialect, niche).read(proposal).and_then(|sketch| {
            if self.is_trainable(&sketch.puzzle) { Ok(self.keyed(sketch)) } else { Err(is_held_out()) }
        });
        Ok(admitted)
    }

    /// Takes the level from the operations that the program has, or that are allowed. When a shorter program is equivalent, this
    /// level is higher than that of the niche.
    fn balance_key(&self, problem: &Problem, answer: Option<&str>) -> Result<BalanceKey, Error> {
        let puzzle = self.puzzle(problem)?;
        let answer = answer.filter(|_| puzzle.mode() == Mode::Induction);
        let written = answer.and_then(|answer| Program::parse(self.dialect, answer).ok());
        let program = puzzle.program().or(written.as_ref());
        let length = match &puzzle {
            Puzzle::Induction { max_operations, .. } => *max_operations,
            Puzzle::Deduction { program, .. } | Puzzle::Abduction { program, .. } => program.num_operations,
        };
        let niche = describe(&puzzle, program, length).niche();
        Ok(BalanceKey { level: self.level_of(niche), goal: niche.0 })
    }
}

impl Forms for Programs {
    fn description(&self) -> &'static str {
        match self.dialect {
            Dialect::Full => {
                "predict outputs, find inputs and write programs in a small language on integers and lists"
            }
            Dialect::Digits => "the same in a straight-line language on digits modulo 10",
        }
    }

    fn problem_from_json(&self, json: &serde_json::Value) -> Result<Problem, Error> {
        let puzzle = Puzzle::from_json(self.dialect, json);
        puzzle.map(|puzzle| self.problem(&puzzle)).map_err(|(expected, got)| Error::Problem {
            domain: self.name(),
            expected,
            got,
        })
    }

    fn problem_from_text(&self, text: &str) -> Result<Problem, Error> {
        self.parse(text).map(|puzzle| self.problem(&puzzle))
    }

    fn problem_to_json(&self, problem: &Problem) -> Result<serde_json::Value, Error> {
        Ok(self.puzzle(problem)?.json(self.name()))
    }
}

impl Exams for Programs {
    fn of(&self) -> &'static str {
        self.name()
    }

    fn specs(&self) -> &'static [ExamSpec] {
        match self.dialect {
            Dialect::Full => &generate::FULL_EXAMS,
            Dialect::Digits => &generate::DIGITS_EXAMS,
        }
    }

    fn candidate(&self, exam: &ExamSpec, index: u64) -> Option<Problem> {
        self.draw_exam(exam, index).map(|drawn| drawn.problem)
    }

    /// Writes one program per line in the order of the exam, and an empty line for a problem that needs none.
    fn keys_file(&self, spec: &ExamSpec, exam: &Exam) -> Option<Vec<u8>> {
        if !self.exam_strata(spec).iter().any(|stratum| stratum.mode == Mode::Induction) {
            return None;
        }
        let mut text = String::new();
        for (problem, index) in exam.test.iter().chain(&exam.dev).zip(0..) {
            let drawn = self.draw_exam(spec, index).filter(|drawn| drawn.problem == *problem);
            let drawn = drawn.expect("problem n of an exam is candidate n, because no candidate repeats another");
            text += drawn.key.as_ref().map_or("", |key| &key.text);
            text.push('\n');
        }
        Some(zstd::bulk::compress(text.as_bytes(), 19).expect("compressing to memory needs nothing but memory"))
    }

    fn is_held_out(&self, problem: &Problem) -> Result<bool, Error> {
        let puzzle = self.puzzle(problem)?;
        Ok(match self.committed_reference(problem) {
            Some(program) => Behavior::of(program, &mut Machine::new()).is_held_out(self.dialect),
            None => self.is_about_held_out(&puzzle),
        })
    }
}

impl Programs {
    /// Draws problem `index` of a level with its key and an answer: a function of its arguments, never an exam problem.
    ///
    /// # Panics
    /// When the level is not one of the ladder's.
    pub fn draw_ladder(&self, level: u32, seed: u64, index: u64) -> Drawn {
        let sketch = generate::ladder(self.dialect, level, seed, index, |puzzle| self.is_trainable(puzzle));
        self.drawn(sketch)
    }

    /// Draws candidate `index` of an exam with its key and an answer; candidates take the exam's strata in turn.
    pub fn draw_exam(&self, exam: &ExamSpec, index: u64) -> Option<Drawn> {
        generate::exam_candidate(self.dialect, exam, index).map(|sketch| self.drawn(sketch))
    }

    /// Lists the kinds of problems of an exam, which have equal shares of it.
    pub fn exam_strata(&self, exam: &ExamSpec) -> Vec<Stratum> {
        generate::strata(exam, self.dialect)
    }

    /// Returns the stratum of an exam that a problem would belong to.
    ///
    /// # Errors
    /// [`Error::Problem`] when the problem or the key is not in its language, or an induction problem has no key.
    pub fn stratum(&self, problem: &Problem, key: Option<&ProblemKey>) -> Result<Stratum, Error> {
        let puzzle = self.puzzle(problem)?;
        let reference = key.map(|key| self.reference(key)).transpose()?;
        let program = puzzle.program().or(reference.as_ref()).ok_or_else(|| Error::Problem {
            domain: self.name(),
            expected: "an induction problem with its key".to_owned(),
            got: format!("{:?} without a key", problem.text),
        })?;
        let behavior = Behavior::of(program, &mut Machine::new());
        let minimal = Catalog::get(self.dialect).minimal_length(behavior);
        let split = if behavior.is_held_out(self.dialect) { ExamSplit::NewBehaviors } else { ExamSplit::NewInputs };
        Ok(Stratum { mode: puzzle.mode(), length: minimal.unwrap_or(program.num_operations), split })
    }

    /// Reads a problem once, to judge many answers. If no key is given, looks up the key of an exam problem; an induction
    /// problem without a key is judged by its visible pairs.
    ///
    /// # Errors
    /// [`Error::Problem`] when the problem or the key is not in its language.
    pub fn checker(&self, problem: &Problem, key: Option<&ProblemKey>) -> Result<PreparedProblem, Error> {
        let puzzle = self.puzzle(problem)?;
        let reference = match key {
            Some(key) => Some(self.reference(key)?),
            None => self.committed_reference(problem).cloned(),
        };
        Ok(PreparedProblem { puzzle, reference, machine: Machine::new() })
    }

    /// Whether a problem is in an exam or its reference has a held-out behaviour.
    ///
    /// # Errors
    /// [`Error::Problem`] when the key is not in its language.
    pub fn is_exam_with_key(&self, problem: &Problem, key: &ProblemKey) -> Result<bool, Error> {
        let behavior = Behavior::of(&self.reference(key)?, &mut Machine::new());
        Ok(behavior.is_held_out(self.dialect) || exam_contains(self.name(), &self.canonical_hash(problem)))
    }

    /// Describes a problem, including the reference of its key if that is known.
    ///
    /// # Errors
    /// [`Error::Problem`] when the problem or the key is not in its language.
    pub fn descriptor(&self, problem: &Problem, key: Option<&ProblemKey>) -> Result<Descriptor, Error> {
        let puzzle = self.puzzle(problem)?;
        let reference = key.map(|key| self.reference(key)).transpose()?;
        let program = puzzle.program().or(reference.as_ref());
        let length = match (program, &puzzle) {
            (Some(program), _) => {
                let behavior = Behavior::of(program, &mut Machine::new());
                let minimal = Catalog::get(self.dialect).minimal_length(behavior);
                minimal.unwrap_or(program.num_operations)
            }
            (None, Puzzle::Induction { max_operations, .. }) => *max_operations,
            (None, _) => 0,
        };
        Ok(describe(&puzzle, program, length))
    }

    /// Returns the committed key of an exam problem.
    pub fn exam_key(&self, problem: &Problem) -> Option<ProblemKey> {
        let reference = EXAM_REFERENCES.get(&(self.dialect, self.canonical_hash(problem)));
        reference.map(|program| ProblemKey { text: program.text() })
    }

    fn is_trainable(&self, puzzle: &Puzzle) -> bool {
        !self.is_exam_puzzle(puzzle, &canonical_hash(&puzzle.text()))
    }

    fn is_exam_puzzle(&self, puzzle: &Puzzle, canonical_hash: &Digest) -> bool {
        exam_contains(self.name(), canonical_hash) || self.is_about_held_out(puzzle)
    }

    /// Whether a problem's program, or one that its pairs allow, has a held-out behaviour.
    fn is_about_held_out(&self, puzzle: &Puzzle) -> bool {
        let mut machine = Machine::new();
        match puzzle {
            Puzzle::Deduction { program, .. } | Puzzle::Abduction { program, .. } => {
                Behavior::of(program, &mut machine).is_held_out(self.dialect)
            }
            Puzzle::Induction { max_operations, pairs, .. } => held_out_programs(self.dialect)
                .iter()
                .take_while(|program| program.num_operations <= *max_operations)
                .any(|program| is_consistent(&mut machine, program, pairs)),
        }
    }

    /// Returns the committed reference of an exam problem.
    fn committed_reference(&self, problem: &Problem) -> Option<&'static Program> {
        let has_key = problem.text.starts_with('?');
        has_key.then(|| EXAM_REFERENCES.get(&(self.dialect, self.canonical_hash(problem)))).flatten()
    }

    fn drawn(&self, sketch: Sketch) -> Drawn {
        let answer = sketch.answer.clone();
        let KeyedProblem { problem, key } = self.keyed(sketch);
        Drawn { problem, key, answer }
    }

    fn keyed(&self, sketch: Sketch) -> KeyedProblem {
        let has_key = sketch.puzzle.mode() == Mode::Induction;
        let key = has_key.then(|| ProblemKey { text: sketch.program.text() });
        KeyedProblem { problem: self.problem(&sketch.puzzle), key }
    }

    fn problem(&self, puzzle: &Puzzle) -> Problem {
        Problem { domain: self.name().to_owned(), text: puzzle.text() }
    }

    fn reference(&self, key: &ProblemKey) -> Result<Program, Error> {
        Program::parse(self.dialect, &key.text).map_err(|_| Error::Problem {
            domain: self.name(),
            expected: "a key that is a program".to_owned(),
            got: format!("{:?}", key.text),
        })
    }

    fn parse(&self, text: &str) -> Result<Puzzle, Error> {
        Puzzle::parse(self.dialect, text).map_err(|expected| {
            let got = if text.len() <= language::MAX_TEXT_BYTES {
                format!("{text:?}")
            } else {
                format!("{} bytes", text.len())
            };
            Error::Problem { domain: self.name(), expected: expected.to_owned(), got }
        })
    }

    /// Reads a problem's canonical text.
    fn puzzle(&self, problem: &Problem) -> Result<Puzzle, Error> {
        let puzzle = self.parse(&problem.text)?;
        let expected = if problem.domain != self.name() {
            format!("a problem of this domain, not of {:?}", problem.domain)
        } else if puzzle.text() != problem.text {
            format!("the canonical text {:?}", puzzle.text())
        } else {
            return Ok(puzzle);
        };
        Err(Error::Problem { domain: self.name(), expected, got: format!("{:?}", problem.text) })
    }
}

fn describe(puzzle: &Puzzle, program: Option<&Program>, length: usize) -> Descriptor {
    Descriptor {
        mode: puzzle.mode(),
        length: length as u8,
        operations: program.map_or(0, operation_bits),
        output_bucket: puzzle.output_bucket(),
    }
}

/// Hashes a canonical text; for an induction problem, only its pairs.
fn canonical_hash(text: &str) -> Digest {
    let pairs = text.strip_prefix("? max ").and_then(|rest| rest.split_once(" : ")).map(|(_, pairs)| pairs);
    Digest::of_bytes(pairs.unwrap_or(text).as_bytes())
}

/// The references of exam problems that have a key.
static EXAM_REFERENCES: LazyLock<HashMap<(Dialect, Digest), Program>> = LazyLock::new(|| {
    let committed = [
        (Dialect::Full, "programs-induction", &include_bytes!("../../exams/programs-induction.keys.zst")[..]),
        (Dialect::Digits, "programs-digits", &include_bytes!("../../exams/programs-digits.keys.zst")[..]),
    ];
    let mut references = HashMap::new();
    for (dialect, name, bytes) in committed {
        let text = zstd::bulk::decompress(bytes, 1 << 24).expect("the file was committed compressed");
        let text = String::from_utf8(text).expect("the file was committed as UTF-8");
        let exam = exam(name).expect("the exam is registered");
        for (problem, line) in exam.test.iter().chain(&exam.dev).zip(text.lines()) {
            if !line.is_empty() {
                let program = Program::parse(dialect, line).expect("the file was committed with programs");
                references.insert((dialect, canonical_hash(&problem.text)), program);
            }
        }
    }
    references
});

/// Returns every held-out program of an exam, and one for every held-out behaviour of the catalogue; shortest first.
fn held_out_programs(dialect: Dialect) -> &'static [Program] {
    static FULL: LazyLock<Vec<Program>> = LazyLock::new(|| collect_held_out(Dialect::Full));
    static DIGITS: LazyLock<Vec<Program>> = LazyLock::new(|| collect_held_out(Dialect::Digits));
    match dialect {
        Dialect::Full => &FULL,
        Dialect::Digits => &DIGITS,
    }
}

fn collect_held_out(dialect: Dialect) -> Vec<Program> {
    let domain = Programs { dialect };
    let catalog = Catalog::get(dialect).programs.iter().filter(|(behavior, _)| behavior.is_held_out(dialect));
    let mut programs: Vec<Program> = catalog.map(|(_, program)| program.clone()).collect();
    for spec in Exams::specs(&domain) {
        let exam = exam(spec.name).expect("the exam is registered");
        for problem in exam.test.iter().chain(&exam.dev) {
            let puzzle = domain.puzzle(problem).expect("the exam was committed with legal problems");
            let program = puzzle.program().or_else(|| domain.committed_reference(problem));
            let held_out = program.filter(|program| Behavior::of(program, &mut Machine::new()).is_held_out(dialect));
            programs.extend(held_out.cloned());
        }
    }
    programs.sort_by_cached_key(|program| (program.num_operations, program.text()));
    programs.dedup();
    programs
}
