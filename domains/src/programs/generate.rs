//! The ladder and the exams: random programs of a given minimal length, and problems about them.

use proto::{CounterRng, LadderLevel, Purpose, TokenId};

use super::behavior::{Behavior, CATALOG_LENGTH, Catalog, is_worthwhile};
use super::canonical_hash;
use super::grammar::ProgramGrammar;
use super::interpreter::Machine;
use super::language::{Dialect, Program, Role};
use super::puzzle::{MAX_DRAWN_PROMPT, Mode, Puzzle, is_consistent};
use super::value::{END, Type, Value, View};
use crate::exam::ExamSpec;
use crate::symbols::{Grammar, Next};

/// A problem with the program and an answer, which its generator knows.
#[derive(Clone, Debug)]
pub(super) struct Sketch {
    pub(super) puzzle: Puzzle,
    pub(super) program: Program,
    /// One correct answer.
    pub(super) answer: String,
}

/// Which programs an exam problem is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ExamSplit {
    /// Programs whose behaviour training may contain. Training never contains the problem, but it may contain the program with
    /// this input in a problem of another mode.
    NewInputs,
    /// Programs whose behaviour is held out of every source of training.
    NewBehaviors,
}

/// A kind of exam problem; an exam cycles through its kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stratum {
    /// What is asked.
    pub mode: Mode,
    /// Minimal length of the program.
    pub length: usize,
    /// Which programs.
    pub split: ExamSplit,
}

const NUM_MODES: usize = 3;
const MODES: [Mode; NUM_MODES] = [Mode::Deduction, Mode::Abduction, Mode::Induction];
/// Visible pairs of an induction problem.
const NUM_PAIRS: usize = 3;
/// Fewest of them whose output must differ from the input.
const MIN_CHANGED_PAIRS: usize = 2;
/// Most draws of inputs for one program before another program is drawn.
const NUM_INPUT_DRAWS: usize = 256;
/// Most draws of inputs to make an induction problem of a program that was run.
const NUM_INDUCTION_DRAWS: usize = 8;
/// Most programs drawn for one exam candidate.
const NUM_PROGRAM_DRAWS: usize = 100_000;
/// Batch numbers of this domain's draws begin here, so that no other domain shares them.
const BATCH: u64 = 0x7072_6f67_0000;

/// Number of slots. A problem's hash determines its slot, and candidate n of a stratum comes from slot n. So no candidate
/// repeats another, and an exam with under 200 problems per stratum leaves most problems of every program to training.
const NUM_SLOTS: u64 = 512;

/// The levels of the full language: one per length and mode.
pub(super) static FULL_LEVELS: [LadderLevel; 12] = [
    LadderLevel { level: 1, description: "deduction, minimal length 1" },
    LadderLevel { level: 2, description: "abduction, minimal length 1" },
    LadderLevel { level: 3, description: "induction from 3 pairs, minimal length 1" },
    LadderLevel { level: 4, description: "deduction, minimal length 2" },
    LadderLevel { level: 5, description: "abduction, minimal length 2" },
    LadderLevel { level: 6, description: "induction from 3 pairs, minimal length 2" },
    LadderLevel { level: 7, description: "deduction, minimal length 3" },
    LadderLevel { level: 8, description: "abduction, minimal length 3" },
    LadderLevel { level: 9, description: "induction from 3 pairs, minimal length 3" },
    LadderLevel { level: 10, description: "deduction, minimal length 4" },
    LadderLevel { level: 11, description: "abduction, minimal length 4" },
    LadderLevel { level: 12, description: "induction from 3 pairs, minimal length 4" },
];

pub(super) static FULL_EXAMS: [ExamSpec; 3] = [
    ExamSpec { name: "programs-deduction", domain: "programs", level: 10 },
    ExamSpec { name: "programs-abduction", domain: "programs", level: 11 },
    ExamSpec { name: "programs-induction", domain: "programs", level: 12 },
];

pub(super) static DIGITS_EXAMS: [ExamSpec; 1] =
    [ExamSpec { name: "programs-digits", domain: "programs-digits", level: 9 }];

/// Draws problem `index` of a level, among those that `is_allowed` accepts.
pub(super) fn ladder(
    dialect: Dialect,
    level: u32,
    seed: u64,
    index: u64,
    is_allowed: impl Fn(&Puzzle) -> bool,
) -> Sketch {
    let position = (level as usize).wrapping_sub(1);
    let num_levels = NUM_MODES * dialect.max_operations();
    assert!(position < num_levels, "ladder level: expected 1 to {num_levels}, got {level}");
    let (mode, length) = (MODES[position % NUM_MODES], position / NUM_MODES + 1);
    let mut rng = CounterRng::new(seed, Purpose::Ladder, batch(dialect, u64::from(level)), index, 0);
    let mut machine = Machine::new();
    loop {
        let program = draw_program(&mut rng, dialect, length);
        let Some(behavior) = worthwhile_behavior(&program, &mut machine) else { continue };
        if behavior.is_held_out(dialect) {
            continue;
        }
        let sketch = draw_puzzle(&mut rng, mode, &program, &mut machine);
        if let Some(sketch) = sketch.filter(|sketch| is_short(&sketch.puzzle) && is_allowed(&sketch.puzzle)) {
            return sketch;
        }
    }
}

/// Returns the level of problems of a mode about programs of a given minimal length.
pub(super) fn level(mode: Mode, length: usize) -> u32 {
    ((length - 1) * NUM_MODES + mode as usize + 1) as u32
}

/// Lists the strata of an exam.
pub(super) fn strata(exam: &ExamSpec, dialect: Dialect) -> Vec<Stratum> {
    let modes = match exam.name {
        "programs-deduction" => &MODES[..1],
        "programs-abduction" => &MODES[1..2],
        "programs-induction" => &MODES[2..],
        _ => &MODES[..],
    };
    let mut strata = Vec::new();
    for length in 1..=dialect.max_operations() {
        for split in [ExamSplit::NewInputs, ExamSplit::NewBehaviors] {
            if length > 1 || split == ExamSplit::NewInputs {
                strata.extend(modes.iter().map(|mode| Stratum { mode: *mode, length, split }));
            }
        }
    }
    strata
}

/// Draws candidate `index` of an exam; `None` when none is found within the limits.
pub(super) fn exam_candidate(dialect: Dialect, exam: &ExamSpec, index: u64) -> Option<Sketch> {
    let strata = strata(exam, dialect);
    let stratum = strata[(index % strata.len() as u64) as usize];
    let slot = index / strata.len() as u64 % NUM_SLOTS;
    let mut rng = CounterRng::new(0, Purpose::Exam, batch(dialect, u64::from(exam.level)), index, 0);
    let mut machine = Machine::new();
    for _ in 0..NUM_PROGRAM_DRAWS {
        let program = match stratum.split {
            ExamSplit::NewBehaviors if stratum.length <= CATALOG_LENGTH => {
                draw_held_out_program(&mut rng, dialect, stratum.length)
            }
            _ => draw_program(&mut rng, dialect, stratum.length),
        };
        let behavior = Behavior::of(&program, &mut machine);
        if behavior.is_held_out(dialect) != (stratum.split == ExamSplit::NewBehaviors) {
            continue;
        }
        if worthwhile_behavior(&program, &mut machine).is_none() {
            continue;
        }
        for _ in 0..NUM_INPUT_DRAWS {
            let Some(sketch) = draw_puzzle(&mut rng, stratum.mode, &program, &mut machine) else { continue };
            let hash = canonical_hash(&sketch.puzzle.text());
            let is_in_slot =
                u64::from(u16::from_le_bytes([hash.as_bytes()[0], hash.as_bytes()[1]])) % NUM_SLOTS == slot;
            if is_in_slot && is_short(&sketch.puzzle) && is_unambiguous(&sketch.puzzle, behavior, &mut machine) {
                return Some(sketch);
            }
        }
    }
    None
}

pub(super) fn is_short(puzzle: &Puzzle) -> bool {
    puzzle.prompt().len() <= MAX_DRAWN_PROMPT
}

/// Whether only one behaviour among the enumerated programs is consistent with the pairs of an induction problem.
fn is_unambiguous(puzzle: &Puzzle, behavior: Behavior, machine: &mut Machine) -> bool {
    match puzzle {
        Puzzle::Induction { dialect, max_operations, pairs } => Catalog::get(*dialect)
            .programs
            .iter()
            .take_while(|(_, program)| program.num_operations <= *max_operations)
            .all(|(other, program)| *other == behavior || !is_consistent(machine, program, pairs)),
        _ => true,
    }
}

/// Returns the behaviour of a program; `None` unless it is worthwhile and no shorter program has the same behaviour.
pub(super) fn worthwhile_behavior(program: &Program, machine: &mut Machine) -> Option<Behavior> {
    if !is_worthwhile(program, machine) {
        return None;
    }
    let behavior = Behavior::of(program, machine);
    let expected = (program.num_operations <= CATALOG_LENGTH).then_some(program.num_operations);
    (Catalog::get(program.dialect).minimal_length(behavior) == expected).then_some(behavior)
}

/// Draws an induction problem about a program, short enough for a prompt; `None` when the first few draws fail.
pub(super) fn induction(program: &Program, rng: &mut CounterRng) -> Option<Sketch> {
    let mut machine = Machine::new();
    let draw = |_| draw_puzzle(rng, Mode::Induction, program, &mut machine).filter(|sketch| is_short(&sketch.puzzle));
    (0..NUM_INDUCTION_DRAWS).find_map(draw)
}

/// Draws a problem about a program; `None` when the inputs that are drawn are unsuitable.
pub(super) fn draw_puzzle(
    rng: &mut CounterRng,
    mode: Mode,
    program: &Program,
    machine: &mut Machine,
) -> Option<Sketch> {
    let (min_len, max_len) = if mode == Mode::Induction { (3, 5) } else { (2, 6) };
    let inputs = (0..num_inputs(mode)).map(|_| program.dialect.draw_input(rng, min_len, max_len));
    pose(mode, program, inputs, machine)
}

/// Returns the number of inputs of a problem.
pub(super) fn num_inputs(mode: Mode) -> usize {
    if mode == Mode::Induction { NUM_PAIRS } else { 1 }
}

/// Makes a problem from a program and inputs; `None` when an output is missing or empty, when the program leaves too many
/// inputs unchanged, or when all outputs are equal.
pub(super) fn pose(
    mode: Mode,
    program: &Program,
    inputs: impl IntoIterator<Item = Vec<i32>>,
    machine: &mut Machine,
) -> Option<Sketch> {
    let dialect = program.dialect;
    let mut pairs = Vec::with_capacity(num_inputs(mode));
    for input in inputs {
        let output = machine.run(program, &input).ok().filter(|output| dialect.is_output(*output))?.to_value();
        if output.view().is_empty() {
            return None;
        }
        pairs.push((input, output));
    }
    let (puzzle, answer) = if mode == Mode::Induction {
        let num_changed = pairs.iter().filter(|(input, output)| output.view() != View::List(input)).count();
        if num_changed < MIN_CHANGED_PAIRS || pairs.iter().all(|(_, output)| *output == pairs[0].1) {
            return None;
        }
        (Puzzle::induction(dialect, program.num_operations, pairs), program.text())
    } else {
        let (input, output) = pairs.pop()?;
        if output == Value::List(input.clone()) {
            return None;
        }
        if mode == Mode::Deduction {
            (Puzzle::deduction(program.clone(), input), output.view().text())
        } else {
            (Puzzle::abduction(program.clone(), output), View::List(&input).text())
        }
    };
    Some(Sketch { puzzle: puzzle.ok()?, program: program.clone(), answer })
}

/// Draws a program of exactly `length` operations from random legal words. Words from list to list are three times as likely
/// as others, because a program that has become arithmetic on one integer stays that way.
fn draw_program(rng: &mut CounterRng, dialect: Dialect, length: usize) -> Program {
    draw_program_from(rng, dialect, length, &[])
}

/// Like [`draw_program`], but begins with a given prefix of some program of that length.
pub(super) fn draw_program_from(rng: &mut CounterRng, dialect: Dialect, length: usize, prefix: &[TokenId]) -> Program {
    let mut tokens = Vec::with_capacity(2 * length);
    loop {
        tokens.clear();
        let mut grammar = ProgramGrammar::new(dialect, length, None);
        for token in prefix {
            let legal = grammar.push(*token);
            debug_assert!(legal, "the prefix begins a program");
            tokens.push(*token);
        }
        while let Next::Choice(mask) = grammar.next() {
            let mut candidates: Vec<TokenId> = mask.iter().filter(|token| *token != END).collect();
            let from_list_to_list = dialect.operations().iter().filter(|operation| {
                matches!(operation.role, Role::Step { from: Type::List, to: Type::List } | Role::Map | Role::Filter)
                    && mask.contains(operation.token)
            });
            candidates.extend(from_list_to_list.flat_map(|operation| [operation.token; 2]));
            let token = candidates[rng.below(candidates.len() as u64) as usize];
            let legal = grammar.push(token);
            debug_assert!(legal, "candidates are legal");
            tokens.push(token);
        }
        // A type that no operation accepts ends a program early.
        if grammar.budget() == 0 {
            return Program::read(dialect, &tokens).expect("the grammar writes programs");
        }
    }
}

/// Draws one of the held-out behaviours of a length uniformly: few have two operations, and one that random words often
/// hit would fill the stratum.
fn draw_held_out_program(rng: &mut CounterRng, dialect: Dialect, length: usize) -> Program {
    let programs = &Catalog::get(dialect).programs;
    loop {
        let (behavior, program) = &programs[rng.below(programs.len() as u64) as usize];
        if program.num_operations == length && behavior.is_held_out(dialect) {
            return program.clone();
        }
    }
}

fn batch(dialect: Dialect, level: u64) -> u64 {
    BATCH + ((dialect as u64) << 8) + level
}
