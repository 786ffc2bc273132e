//! The interpreter: the meaning and the cost of every operation.
//!
//! The language is total: it has no loops but those over finite lists, so fuel is a bound on cost and never a guess
//! about termination. An operation is charged for its data before it touches them.

use super::language::{Code, Dialect, Primitive, Program};
use super::value::{MAX_MAGNITUDE, View};

/// Fuel for one run. The most expensive program of a length that a policy may write takes less than half of it.
pub(super) const FUEL: u32 = 4_096;
/// Most elements of a list while a program runs.
pub(super) const MAX_CELLS: usize = 512;

/// Why a program has no value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// An integer above 99 or below -99. The program is undefined on this input, and equal to nothing.
    Overflow,
    /// Out of fuel.
    Fuel,
    /// A list longer than [`MAX_CELLS`].
    Cells,
}

/// The interpreter's memory, reused from run to run.
#[derive(Clone, Debug)]
pub(super) struct Machine {
    dialect: Dialect,
    fuel: u32,
    list: Vec<i32>,
}

/// The current value between two steps; a list is stored in [`Machine::list`].
#[derive(Clone, Copy, Debug)]
enum Current {
    Integer(i32),
    List,
}

impl Machine {
    pub(super) fn new() -> Machine {
        Machine { dialect: Dialect::Full, fuel: 0, list: Vec::with_capacity(16) }
    }

    /// Runs a program on an input.
    pub(super) fn run(&mut self, program: &Program, input: &[i32]) -> Result<View<'_>, Stop> {
        self.run_with_fuel(program, input, FUEL)
    }

    /// Runs a program on an input with the given fuel.
    pub(super) fn run_with_fuel(&mut self, program: &Program, input: &[i32], fuel: u32) -> Result<View<'_>, Stop> {
        self.dialect = program.dialect;
        self.fuel = fuel;
        self.list.clear();
        self.list.extend_from_slice(input);
        let mut current = Current::List;
        let mut rest = &program.codes[..];
        while let Some(code) = rest.first() {
            current = self.step(&rest[..code.span], current)?;
            rest = &rest[code.span..];
        }
        Ok(match current {
            Current::Integer(integer) => View::Integer(integer),
            Current::List => View::List(&self.list),
        })
    }

    /// Runs the one step that `codes` holds.
    fn step(&mut self, codes: &[Code], current: Current) -> Result<Current, Stop> {
        let (code, rest) = (codes[0], &codes[1..]);
        match (code.primitive, current) {
            (Primitive::If | Primitive::When, _) => {
                self.charge(1)?;
                let asked = match current {
                    Current::Integer(integer) => integer,
                    Current::List => self.list.first().copied().unwrap_or(0),
                };
                let branches = &rest[1..];
                let (first, second) = branches.split_at(branches[0].span);
                match (holds(rest[0], asked), second.is_empty()) {
                    (true, _) => self.step(first, current),
                    (false, true) => Ok(current),
                    (false, false) => self.step(second, current),
                }
            }
            (_, Current::Integer(integer)) => self.integer_step(code, integer),
            (Primitive::Map, Current::List) => {
                self.charge(1 + self.list.len())?;
                let mut list = std::mem::take(&mut self.list);
                for element in &mut list {
                    // A lambda maps an integer to an integer, so it does not change the machine's list.
                    if let Current::Integer(result) = self.step(rest, Current::Integer(*element))? {
                        *element = result;
                    }
                }
                self.list = list;
                Ok(Current::List)
            }
            (Primitive::Filter, Current::List) => {
                self.charge(1 + self.list.len())?;
                self.list.retain(|element| holds(rest[0], *element));
                Ok(Current::List)
            }
            (_, Current::List) => self.list_step(code),
        }
    }

    fn list_step(&mut self, code: Code) -> Result<Current, Stop> {
        let len = self.list.len();
        let constant = code.constant as usize;
        self.charge(1 + len)?;
        match code.primitive {
            Primitive::Reverse => self.list.reverse(),
            Primitive::Sort => {
                self.charge(len * len.checked_ilog2().unwrap_or(0) as usize)?;
                self.list.sort_unstable();
            }
            Primitive::Unique => {
                let mut seen = [false; 2 * MAX_MAGNITUDE as usize + 1];
                self.list.retain(|element| !std::mem::replace(&mut seen[(element + MAX_MAGNITUDE) as usize], true));
            }
            Primitive::Cumulate => {
                let mut sum = 0;
                for index in 0..len {
                    sum = self.bounded(sum + self.list[index])?;
                    self.list[index] = sum;
                }
            }
            Primitive::Difference => {
                for index in 1..len {
                    self.list[index - 1] = self.bounded(self.list[index] - self.list[index - 1])?;
                }
                self.list.truncate(len.saturating_sub(1));
            }
            Primitive::Rotate if len > 0 => self.list.rotate_left(1),
            Primitive::Rotate => {}
            Primitive::Duplicate => {
                self.reserve(2 * len)?;
                self.list.extend_from_within(..);
            }
            Primitive::Take => self.list.truncate(constant),
            Primitive::Drop => drop(self.list.drain(..constant.min(len))),
            // For the empty list, the sum, the length, the maximum, the minimum, the head and the last are 0.
            Primitive::Sum => return Ok(Current::Integer(self.bounded(self.list.iter().sum())?)),
            Primitive::Length => return Ok(Current::Integer(self.bounded(len as i32)?)),
            Primitive::Maximum => return Ok(Current::Integer(self.list.iter().copied().max().unwrap_or(0))),
            Primitive::Minimum => return Ok(Current::Integer(self.list.iter().copied().min().unwrap_or(0))),
            Primitive::Head => return Ok(Current::Integer(self.list.first().copied().unwrap_or(0))),
            Primitive::Last => return Ok(Current::Integer(self.list.last().copied().unwrap_or(0))),
            other => unreachable!("a program that was read applies {other:?} to no list"),
        }
        Ok(Current::List)
    }

    fn integer_step(&mut self, code: Code, integer: i32) -> Result<Current, Stop> {
        self.charge(1)?;
        let result = match code.primitive {
            Primitive::Add => integer + code.constant,
            Primitive::Subtract => integer - code.constant,
            Primitive::Multiply => integer * code.constant,
            // Rounds down, so that dividend = quotient * divisor + remainder with a remainder from 0.
            Primitive::Divide => integer.div_euclid(code.constant),
            Primitive::Modulo => integer.rem_euclid(code.constant),
            Primitive::Absolute => integer.abs(),
            Primitive::Negate => -integer,
            Primitive::Square => integer * integer,
            Primitive::Range => {
                let len = integer.max(0);
                self.charge(len as usize)?;
                self.reserve(len as usize)?;
                self.list.clear();
                self.list.extend(1..=len);
                return Ok(Current::List);
            }
            other => unreachable!("a program that was read applies {other:?} to no integer"),
        };
        self.bounded(result).map(Current::Integer)
    }

    fn bounded(&self, integer: i32) -> Result<i32, Stop> {
        match self.dialect {
            Dialect::Digits => Ok(integer.rem_euclid(10)),
            Dialect::Full if integer.abs() <= MAX_MAGNITUDE => Ok(integer),
            Dialect::Full => Err(Stop::Overflow),
        }
    }

    fn charge(&mut self, cost: usize) -> Result<(), Stop> {
        match self.fuel.checked_sub(cost as u32) {
            Some(left) => {
                self.fuel = left;
                Ok(())
            }
            None => {
                self.fuel = 0;
                Err(Stop::Fuel)
            }
        }
    }

    fn reserve(&self, num_cells: usize) -> Result<(), Stop> {
        if num_cells > MAX_CELLS { Err(Stop::Cells) } else { Ok(()) }
    }
}

/// Whether a predicate holds for an integer.
fn holds(predicate: Code, integer: i32) -> bool {
    match predicate.primitive {
        Primitive::Greater => integer > predicate.constant,
        Primitive::Less => integer < predicate.constant,
        Primitive::Even => integer % 2 == 0,
        Primitive::Odd => integer % 2 != 0,
        other => unreachable!("a program that was read asks nothing with {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::behavior::{for_each_program, probes};
    use super::super::value::Value;
    use super::*;

    fn run(text: &str, input: &[i32], fuel: u32) -> Result<Value, Stop> {
        let program = Program::parse(Dialect::Full, text).unwrap();
        Machine::new().run_with_fuel(&program, input, fuel).map(View::to_value)
    }

    #[test]
    fn fuel_is_charged_before_work_and_in_proportion() {
        let dear = "sum range dup sort";
        let needed = (0..).find(|fuel| run(dear, &[9; 6], *fuel) != Err(Stop::Fuel)).unwrap();
        // sum: 1 + 6. range: 1 + 54. dup: 1 + 54. sort: 1 + 108 + 108 * 6.
        assert_eq!(needed, 7 + 55 + 55 + 757);
    }

    /// So the legal answers of a policy never exceed a limit, and are either right or wrong.
    #[test]
    fn programs_of_a_policys_length_take_less_than_half_of_the_fuel() {
        let mut machine = Machine::new();
        for_each_program(Dialect::Full, Dialect::Full.max_operations(), &mut |program| {
            for input in [[9; 6], [9, 8, 7, 9, 9, 9]] {
                let outcome = machine.run_with_fuel(program, &input, FUEL / 2);
                assert!(matches!(outcome, Ok(_) | Err(Stop::Overflow)), "{}", program.text());
            }
        });
    }

    #[test]
    fn more_fuel_changes_nothing_but_whether_it_is_enough() {
        let mut machine = Machine::new();
        for_each_program(Dialect::Full, 2, &mut |program| {
            let input = &probes(Dialect::Full)[12];
            let full = machine.run(program, input).map(View::to_value);
            let mut finished = false;
            for fuel in (0..400).step_by(3) {
                match machine.run_with_fuel(program, input, fuel).map(View::to_value) {
                    Err(Stop::Fuel) => assert!(!finished, "{} needs less", program.text()),
                    outcome => {
                        finished = true;
                        assert_eq!(outcome, full);
                    }
                }
            }
        });
    }

    #[test]
    fn limits_have_their_own_reasons() {
        let dups = |count: usize| "dup ".repeat(count);
        assert!(run(&dups(9), &[1], FUEL).is_ok());
        assert_eq!(run(&dups(10), &[1], FUEL), Err(Stop::Cells));
        assert_eq!(run("map (sq)", &[9, 10], FUEL), Err(Stop::Overflow));
        assert_eq!(run("map (neg) sum", &[-99], FUEL), Ok(Value::Integer(99)));
        assert_eq!(run("cum", &[60, 60], FUEL), Err(Stop::Overflow));
        assert_eq!(run(&("dup ".repeat(9) + &"sort ".repeat(9)), &[1], FUEL), Err(Stop::Fuel));
    }

    /// The state that one run leaves in memory does not affect the next.
    #[test]
    fn runs_do_not_see_each_other() {
        let mut machine = Machine::new();
        let failing = Program::parse(Dialect::Full, "map (* 5) map (* 5)").unwrap();
        let copying = Program::parse(Dialect::Full, "dup").unwrap();
        assert_eq!(machine.run(&failing, &[9]), Err(Stop::Overflow));
        assert_eq!(machine.run(&copying, &[1]), Ok(View::List(&[1, 1])));
    }
}
