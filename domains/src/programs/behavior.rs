//! Behaviour of programs: their outputs on fixed probe inputs, and a catalogue of all short programs by behaviour.

use std::collections::HashMap;
use std::sync::LazyLock;

use proto::{CounterRng, Digest, Purpose, TokenId};

use super::interpreter::{Machine, Stop};
use super::language::{Dialect, Operation, Program, Role};
use super::value::{Type, View};

/// Number of probe inputs.
pub(super) const NUM_PROBES: usize = 64;
/// Number of them that are corner cases or have up to three elements.
const NUM_SHORT_PROBES: usize = 20;
/// Programs up to this length are enumerated exhaustively.
pub(super) const CATALOG_LENGTH: usize = 3;
/// One in this many behaviours is held out of all training.
const HELD_OUT_MODULUS: u64 = 16;
/// Key of the draws of the probe inputs.
const PROBE_BATCH: u64 = 0x7072_6f62_6573;

/// Identifies what a program does on the probe inputs. Programs with equal behaviour count as the same function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Behavior(u64);

/// Returns the inputs that distinguish programs. Induction answers are tested on them too.
pub(super) fn probes(dialect: Dialect) -> &'static [Vec<i32>] {
    static FULL: LazyLock<Vec<Vec<i32>>> = LazyLock::new(|| draw_probes(Dialect::Full));
    static DIGITS: LazyLock<Vec<Vec<i32>>> = LazyLock::new(|| draw_probes(Dialect::Digits));
    match dialect {
        Dialect::Full => &FULL,
        Dialect::Digits => &DIGITS,
    }
}

/// Draws a few corner cases, a few short inputs, then long ones, because many programs agree on short ones; half with repeats.
fn draw_probes(dialect: Dialect) -> Vec<Vec<i32>> {
    let corners: [&[i32]; 9] = [
        &[],
        &[0],
        &[1],
        &[9],
        &[2, 2, 2],
        &[1, 2, 3, 4, 5, 6],
        &[9, 8, 7, 6],
        &[5, 0, 5, 0, 5, 0],
        &[6, 4, 2, 5, 1, 1],
    ];
    let mut probes: Vec<Vec<i32>> = corners.iter().map(|corner| corner.to_vec()).collect();
    let mut rng = CounterRng::new(0, Purpose::Exam, PROBE_BATCH, dialect as u64, 0);
    while probes.len() < NUM_PROBES {
        let (min_len, max_len) = if probes.len() < NUM_SHORT_PROBES { (2, 3) } else { (4, 6) };
        let mut input = dialect.draw_input(&mut rng, min_len, max_len);
        if probes.len().is_multiple_of(2) {
            let (from, to) = (rng.below(input.len() as u64) as usize, rng.below(input.len() as u64) as usize);
            input[to] = input[from];
        }
        if !probes.contains(&input) {
            probes.push(input);
        }
    }
    probes
}

impl Behavior {
    /// Runs a program on the probe inputs and hashes the results.
    pub(super) fn of(program: &Program, machine: &mut Machine) -> Behavior {
        let mut seen = Vec::with_capacity(NUM_PROBES * 8);
        for probe in probes(program.dialect) {
            match machine.run(program, probe) {
                Ok(View::Integer(integer)) => seen.extend([0x80, integer as u8]),
                Ok(View::List(list)) => {
                    seen.extend([0x81, list.len() as u8, (list.len() >> 8) as u8]);
                    seen.extend(list.iter().map(|element| *element as u8));
                }
                Err(Stop::Overflow) => seen.push(0x82),
                Err(Stop::Fuel) => seen.push(0x83),
                Err(Stop::Cells) => seen.push(0x84),
            }
        }
        let digest = Digest::of_bytes(&seen);
        let (head, _) = digest.as_bytes().split_first_chunk().expect("a digest has 32 bytes");
        Behavior(u64::from_le_bytes(*head))
    }

    /// Whether programs with this behaviour are excluded from training: a sixteenth of all behaviours, except those of single
    /// operations. The behaviour itself decides, so every source agrees without a table.
    pub(super) fn is_held_out(self, dialect: Dialect) -> bool {
        static FULL: LazyLock<Vec<Behavior>> = LazyLock::new(|| single_operations(Dialect::Full));
        static DIGITS: LazyLock<Vec<Behavior>> = LazyLock::new(|| single_operations(Dialect::Digits));
        let single_operations = match dialect {
            Dialect::Full => &FULL,
            Dialect::Digits => &DIGITS,
        };
        self.0.is_multiple_of(HELD_OUT_MODULUS) && single_operations.binary_search(&self).is_err()
    }
}

fn single_operations(dialect: Dialect) -> Vec<Behavior> {
    let mut machine = Machine::new();
    let mut behaviors = Vec::new();
    for_each_program(dialect, 1, &mut |program| behaviors.push(Behavior::of(program, &mut machine)));
    behaviors.sort_unstable();
    behaviors
}

/// Whether a program is worth a problem: on the probes it mostly has a value, is not the identity, and produces no single
/// output more than half of the time.
pub(super) fn is_worthwhile(program: &Program, machine: &mut Machine) -> bool {
    let probes = probes(program.dialect);
    let mut outputs: Vec<_> =
        probes.iter().filter_map(|probe| machine.run(program, probe).ok().map(|output| output.to_value())).collect();
    let num_defined = outputs.len();
    let is_identity = probes.iter().all(|probe| machine.run(program, probe) == Ok(View::List(probe)));
    outputs.sort_unstable();
    let most_common = outputs.chunk_by(|left, right| left == right).map(<[_]>::len).max().unwrap_or(0);
    4 * num_defined >= 3 * NUM_PROBES && !is_identity && 2 * most_common <= NUM_PROBES
}

/// Every behaviour of programs up to [`CATALOG_LENGTH`].
pub(super) struct Catalog {
    minimal_lengths: HashMap<Behavior, usize>,
    /// One program per behaviour, shortest first, in order of enumeration.
    pub(super) programs: Vec<(Behavior, Program)>,
}

impl Catalog {
    /// Returns the catalogue of a dialect, built on first use.
    pub(super) fn get(dialect: Dialect) -> &'static Catalog {
        static FULL: LazyLock<Catalog> = LazyLock::new(|| Catalog::enumerate(Dialect::Full, CATALOG_LENGTH));
        static DIGITS: LazyLock<Catalog> = LazyLock::new(|| Catalog::enumerate(Dialect::Digits, CATALOG_LENGTH));
        match dialect {
            Dialect::Full => &FULL,
            Dialect::Digits => &DIGITS,
        }
    }

    /// Runs every program up to a length.
    pub(super) fn enumerate(dialect: Dialect, max_length: usize) -> Catalog {
        let mut catalog = Catalog { minimal_lengths: HashMap::new(), programs: Vec::new() };
        let mut machine = Machine::new();
        for length in 1..=max_length {
            for_each_program(dialect, length, &mut |program| {
                let behavior = Behavior::of(program, &mut machine);
                if let std::collections::hash_map::Entry::Vacant(entry) = catalog.minimal_lengths.entry(behavior) {
                    entry.insert(length);
                    catalog.programs.push((behavior, program.clone()));
                }
            });
        }
        catalog
    }

    /// Returns the length of the shortest program with this behaviour; `None` when it is over [`CATALOG_LENGTH`].
    pub(super) fn minimal_length(&self, behavior: Behavior) -> Option<usize> {
        self.minimal_lengths.get(&behavior).copied()
    }
}

/// Visits every program of exactly `length` operations, in a fixed order.
pub(super) fn for_each_program(dialect: Dialect, length: usize, visit: &mut impl FnMut(&Program)) {
    let steps =
        [Type::Integer, Type::List].map(|from| (0..=length).map(|size| steps(dialect, from, size)).collect::<Vec<_>>());
    extend(dialect, &steps, Type::List, length, &mut Vec::new(), visit);
}

/// Steps by input type and by size, each with its output type.
type Steps = [Vec<Vec<(Vec<TokenId>, Type)>>; 2];

fn extend(
    dialect: Dialect,
    steps: &Steps,
    at: Type,
    length: usize,
    prefix: &mut Vec<TokenId>,
    visit: &mut impl FnMut(&Program),
) {
    if length == 0 {
        let program = Program::read(dialect, prefix).expect("steps follow one another by type");
        return visit(&program);
    }
    for size in 1..=length {
        for (tokens, to) in &steps[at as usize][size] {
            let before = prefix.len();
            prefix.extend(tokens);
            extend(dialect, steps, *to, length - size, prefix, visit);
            prefix.truncate(before);
        }
    }
}

/// Lists the steps of exactly `size` operations from a type.
fn steps(dialect: Dialect, from: Type, size: usize) -> Vec<(Vec<TokenId>, Type)> {
    let mut found = Vec::new();
    for operation in dialect.operations() {
        let word = operation.token;
        match operation.role {
            Role::Step { from: expected, to } if expected == from && size == 1 => {
                found.extend(spellings(operation).map(|tokens| (tokens, to)));
            }
            Role::Each | Role::Keep if from == Type::List && size == 1 => {
                found.extend(spellings(operation).map(|tokens| (tokens, Type::List)));
            }
            Role::Map if from == Type::List && size > 1 => {
                let bodies = steps(dialect, Type::Integer, size - 1).into_iter().filter(|(_, to)| *to == Type::Integer);
                found.extend(bodies.map(|(body, _)| ([&[word], &body[..]].concat(), Type::List)));
            }
            Role::Filter if from == Type::List && size == 2 => {
                found.extend(predicates(dialect).map(|predicate| ([&[word], &predicate[..]].concat(), Type::List)));
            }
            Role::When if size > 2 => {
                let branches = steps(dialect, from, size - 2).into_iter().filter(|(_, to)| *to == from);
                for (branch, to) in branches {
                    found
                        .extend(predicates(dialect).map(|predicate| ([&[word], &predicate[..], &branch].concat(), to)));
                }
            }
            Role::If if size > 3 => {
                for first_size in 1..size - 2 {
                    let seconds = steps(dialect, from, size - 2 - first_size);
                    for (first, to) in steps(dialect, from, first_size) {
                        for (second, _) in seconds.iter().filter(|(_, other)| *other == to) {
                            found.extend(
                                predicates(dialect)
                                    .map(|predicate| ([&[word], &predicate[..], &first, second].concat(), to)),
                            );
                        }
                    }
                }
            }
            _ => {}
        }
    }
    found
}

fn predicates(dialect: Dialect) -> impl Iterator<Item = Vec<TokenId>> {
    dialect.operations().iter().filter(|operation| operation.role == Role::Predicate).flat_map(spellings)
}

/// Lists an operation with each of its constants.
fn spellings(operation: &Operation) -> impl Iterator<Item = Vec<TokenId>> + use<> {
    let word = operation.token;
    let (first, last) = operation.constants.unwrap_or((0, 0));
    let has_constant = operation.constants.is_some();
    (first..=last).map(move |constant| if has_constant { vec![word, constant] } else { vec![word] })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_most_a_tenth_of_the_behaviors_of_any_length_is_held_out() {
        for dialect in [Dialect::Full, Dialect::Digits] {
            for length in 1..=CATALOG_LENGTH {
                let programs = Catalog::get(dialect).programs.iter();
                let of_length: Vec<_> = programs.filter(|(_, program)| program.num_operations == length).collect();
                let num_held_out = of_length.iter().filter(|(behavior, _)| behavior.is_held_out(dialect)).count();
                assert!(10 * num_held_out <= of_length.len(), "{dialect:?} {length}: {num_held_out}");
                assert_eq!(num_held_out == 0, length == 1);
            }
        }
    }

    #[test]
    fn behaviors_are_counted_as_published() {
        let count = |dialect, length| {
            Catalog::get(dialect).programs.iter().filter(|(_, program)| program.num_operations == length).count()
        };
        assert_eq!([1, 2, 3].map(|length| count(Dialect::Full, length)), [21, 450, 8_378]);
        assert_eq!([1, 2, 3].map(|length| count(Dialect::Digits, length)), [53, 1_567, 31_837]);
    }

    #[test]
    fn equal_functions_have_equal_behavior() {
        let behavior = |text| Behavior::of(&Program::parse(Dialect::Full, text).unwrap(), &mut Machine::new());
        assert_eq!(behavior("rev rev sort"), behavior("sort"));
        assert_eq!(behavior("map (+ 1) map (+ 2)"), behavior("map (+ 3)"));
        assert_eq!(behavior("head"), behavior("take 1 sum"));
        assert_ne!(behavior("filter (> 3)"), behavior("filter (> 4)"));
        assert_ne!(behavior("sum"), behavior("take 1 map (+ 1)"));
    }

    #[test]
    fn worthwhile_programs_depend_on_their_input() {
        let verdict = |text| is_worthwhile(&Program::parse(Dialect::Full, text).unwrap(), &mut Machine::new());
        for trivial in ["rev rev", "len - 9 range", "filter (> 9)", "filter (< 0) filter (> 0)", "map (sq) map (sq)"] {
            assert!(!verdict(trivial), "{trivial}");
        }
        for useful in ["rev", "sum", "filter (> 3)", "if (even) (sort) else (rev)"] {
            assert!(verdict(useful), "{useful}");
        }
    }
}
