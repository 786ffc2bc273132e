//! The answer languages as typed pushdown automata with a budget: a token is legal if the rest of the answer still fits.

use proto::{TokenId, TokenSet};

use super::language::{Dialect, Operation, Role};
use super::value::{END, MAX_ELEMENTS, MINUS, Type};
use crate::symbols::{Grammar, Next};

/// Integers and lists: an integer ends by itself, a list with [`END`].
#[derive(Clone, Debug)]
pub(super) struct ValueGrammar {
    range: (i32, i32),
    /// Elements that may still follow.
    room: usize,
    /// Whether [`MINUS`] was the last token.
    negative: bool,
    is_list: bool,
    is_done: bool,
}

impl ValueGrammar {
    /// Returns the grammar of integers within a range.
    pub(super) fn integer(range: (i32, i32)) -> ValueGrammar {
        ValueGrammar { range, room: 1, negative: false, is_list: false, is_done: false }
    }

    /// Returns the grammar of lists of up to six integers within a range.
    pub(super) fn list(range: (i32, i32)) -> ValueGrammar {
        ValueGrammar { range, room: MAX_ELEMENTS, negative: false, is_list: true, is_done: false }
    }
}

impl Grammar for ValueGrammar {
    fn next(&self) -> Next {
        if self.is_done {
            return Next::Done;
        }
        let (low, high) = self.range;
        let mut mask = TokenSet::default();
        if self.negative {
            (1..=-low).for_each(|magnitude| mask.insert(magnitude as TokenId));
        } else {
            if self.room > 0 {
                (0..=high).for_each(|integer| mask.insert(integer as TokenId));
                if low < 0 {
                    mask.insert(MINUS);
                }
            }
            if self.is_list {
                mask.insert(END);
            }
        }
        Next::of(mask)
    }

    fn push(&mut self, token: TokenId) -> bool {
        if !self.next().allows(token) {
            return false;
        }
        self.negative = token == MINUS;
        self.is_done = token == END || (!self.is_list && token != MINUS);
        if token != MINUS && token != END {
            self.room -= 1;
        }
        true
    }

    fn fork(&self) -> Box<dyn Grammar> {
        Box::new(self.clone())
    }
}

/// A stack entry of the automaton: a part that is expected within the current step of the pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    /// A step; `to` is open in the first branch of an `if`.
    Step { from: Type, to: Option<Type> },
    /// The second branch of an `if`, which takes its type from the first.
    SecondBranch { from: Type },
    /// The end of a lambda; the operation that has it leads to this type.
    Becomes(Type),
    /// A predicate.
    Predicate,
    /// A constant from `first` to `last`; after it the operation is complete and has led to `to`, unless it is a predicate.
    Constant { first: TokenId, last: TokenId, to: Option<Type> },
}

/// Most slots on the stack: every operation of an answer pushes at most two more than it pops.
const MAX_SLOTS: usize = 16;

/// Programs of a bounded number of operations.
#[derive(Clone, Copy, Debug)]
pub(super) struct ProgramGrammar {
    dialect: Dialect,
    /// Operations that may still follow.
    budget: usize,
    /// The type that the program must lead to, if it is known.
    output: Option<Type>,
    /// The type that the pipeline has reached.
    at: Type,
    /// The stack; the last slot is next.
    slots: [Slot; MAX_SLOTS],
    num_slots: usize,
    is_empty: bool,
    is_done: bool,
}

impl ProgramGrammar {
    /// Returns the grammar of programs of one to `max_operations` operations.
    ///
    /// # Panics
    /// When `max_operations` is 0 or over 8, or allows no program of the type.
    pub(super) fn new(dialect: Dialect, max_operations: usize, output: Option<Type>) -> ProgramGrammar {
        assert!((1..=MAX_SLOTS / 2).contains(&max_operations), "operations: expected 1 to 8, got {max_operations}");
        ProgramGrammar {
            dialect,
            budget: max_operations,
            output,
            at: Type::List,
            slots: [Slot::Predicate; MAX_SLOTS],
            num_slots: 0,
            is_empty: true,
            is_done: false,
        }
    }

    /// Returns the number of operations that may still follow.
    pub(super) fn budget(&self) -> usize {
        self.budget
    }

    /// Counts the operations that the cheapest completion needs. `None` when there is no completion.
    fn num_needed(&self) -> Option<usize> {
        let mut num_needed = 0;
        // The type that the slots above have led to; `None` while it is open, and then it can be any type.
        let mut reached = None;
        for slot in self.slots[..self.num_slots].iter().rev() {
            match slot {
                Slot::Step { to, .. } => {
                    num_needed += 1;
                    reached = *to;
                }
                Slot::SecondBranch { .. } | Slot::Predicate => num_needed += 1,
                Slot::Becomes(to) => reached = Some(*to),
                Slot::Constant { to, .. } => reached = *to,
            }
        }
        let at = if self.num_slots == 0 { Some(self.at) } else { reached };
        match (at, self.output) {
            (Some(at), Some(output)) if at != output => {
                let exists = self
                    .dialect
                    .operations()
                    .iter()
                    .any(|operation| operation.role == Role::Step { from: at, to: output });
                exists.then_some(num_needed + 1)
            }
            _ if self.num_slots == 0 && self.is_empty => Some(1),
            _ => Some(num_needed),
        }
    }

    /// Returns the automaton after an operation; `None` when it is illegal here or its parts no longer fit the budget.
    fn entered(&self, operation: &Operation) -> Option<ProgramGrammar> {
        let slot = self.slots[..self.num_slots].last().copied();
        let (from, wanted) = match slot {
            None => (self.at, None),
            Some(Slot::Step { from, to }) => (from, to),
            Some(Slot::Predicate) => {
                let mut after = *self;
                after.num_slots -= 1;
                after.spend()?;
                after.complete_operation(operation, None);
                return (operation.role == Role::Predicate).then_some(after).filter(ProgramGrammar::fits);
            }
            Some(_) => return None,
        };
        let to = match operation.role {
            Role::Step { from: expected, to } if expected == from => Some(to),
            Role::Map | Role::Filter | Role::Each | Role::Keep if from == Type::List => Some(Type::List),
            Role::When => Some(from),
            Role::If => wanted,
            _ => return None,
        };
        if wanted.is_some() && to != wanted {
            return None;
        }
        let mut after = *self;
        after.num_slots -= usize::from(slot.is_some());
        after.is_empty = false;
        after.spend()?;
        match operation.role {
            Role::Map => {
                after.wait(Slot::Becomes(Type::List))?;
                after.wait(Slot::Step { from: Type::Integer, to: Some(Type::Integer) })?;
            }
            Role::Filter => {
                after.wait(Slot::Becomes(Type::List))?;
                after.wait(Slot::Predicate)?;
            }
            Role::When => {
                after.wait(Slot::Step { from, to: Some(from) })?;
                after.wait(Slot::Predicate)?;
            }
            Role::If => {
                after.wait(Slot::SecondBranch { from })?;
                after.wait(Slot::Step { from, to: wanted })?;
                after.wait(Slot::Predicate)?;
            }
            _ => after.complete_operation(operation, to),
        }
        Some(after).filter(ProgramGrammar::fits)
    }

    fn fits(&self) -> bool {
        self.num_needed().is_some_and(|num_needed| num_needed <= self.budget)
    }

    fn spend(&mut self) -> Option<()> {
        self.budget = self.budget.checked_sub(1)?;
        Some(())
    }

    fn wait(&mut self, slot: Slot) -> Option<()> {
        *self.slots.get_mut(self.num_slots)? = slot;
        self.num_slots += 1;
        Some(())
    }

    /// Completes an operation without lambda or branches, or expects its constant first.
    fn complete_operation(&mut self, operation: &Operation, to: Option<Type>) {
        match operation.constants {
            Some((first, last)) => {
                let fits = self.wait(Slot::Constant { first, last, to });
                debug_assert!(fits.is_some(), "a constant takes the slot of its operation");
            }
            None => self.complete(to),
        }
    }

    /// Completes a predicate, or a step that has led to a type.
    fn complete(&mut self, to: Option<Type>) {
        let mut reached = to;
        while self.num_slots > 0 {
            match self.slots[self.num_slots - 1] {
                Slot::Becomes(to) => {
                    reached = Some(to);
                    self.num_slots -= 1;
                }
                Slot::SecondBranch { from } => {
                    self.slots[self.num_slots - 1] = Slot::Step { from, to: reached };
                    return;
                }
                Slot::Step { .. } | Slot::Predicate | Slot::Constant { .. } => return,
            }
        }
        self.at = reached.expect("a step leads to a type");
    }
}

impl Grammar for ProgramGrammar {
    fn next(&self) -> Next {
        if self.is_done {
            return Next::Done;
        }
        if let Some(Slot::Constant { first, last, .. }) = self.slots[..self.num_slots].last() {
            return Next::of((*first..=*last).collect());
        }
        let operations = self.dialect.operations().iter().filter(|operation| self.entered(operation).is_some());
        let mut mask: TokenSet = operations.map(|operation| operation.token).collect();
        let may_end = self.num_slots == 0 && !self.is_empty && self.output.is_none_or(|output| output == self.at);
        if may_end {
            mask.insert(END);
        }
        Next::of(mask)
    }

    fn push(&mut self, token: TokenId) -> bool {
        if self.is_done {
            return false;
        }
        if let Some(Slot::Constant { first, last, to }) = self.slots[..self.num_slots].last().copied() {
            let legal = (first..=last).contains(&token);
            if legal {
                self.num_slots -= 1;
                self.complete(to);
            }
            return legal;
        }
        if token == END {
            self.is_done = self.next().allows(END);
            return self.is_done;
        }
        match self.dialect.operation(token).and_then(|operation| self.entered(operation)) {
            Some(after) => {
                *self = after;
                true
            }
            None => false,
        }
    }

    fn fork(&self) -> Box<dyn Grammar> {
        Box::new(*self)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::behavior::for_each_program;
    use super::*;

    /// Lists all complete words of an automaton.
    fn complete_words(grammar: &dyn Grammar) -> Vec<Vec<TokenId>> {
        let tokens: Vec<TokenId> = match grammar.next() {
            Next::Done => return vec![Vec::new()],
            Next::Forced(token) => vec![token],
            Next::Choice(set) => set.iter().collect(),
        };
        let begun_with = |token: TokenId| {
            let mut after = grammar.fork();
            assert!(after.push(token));
            let words = complete_words(after.as_ref()).into_iter();
            words.map(move |word| [&[token], &word[..]].concat())
        };
        tokens.into_iter().flat_map(begun_with).collect()
    }

    /// The automaton and the enumeration were written independently: each checks the other.
    #[test]
    fn programs_are_those_that_enumeration_finds() {
        for (dialect, max_operations) in [(Dialect::Full, 3), (Dialect::Digits, 2)] {
            let mut found = BTreeSet::new();
            for length in 1..=max_operations {
                for_each_program(dialect, length, &mut |program| {
                    let mut tokens = Vec::new();
                    program.spell(&mut tokens);
                    tokens.push(END);
                    assert!(found.insert((program.output as u8, tokens)), "every program is visited once");
                });
            }
            for output in [Type::Integer, Type::List] {
                let grammar = ProgramGrammar::new(dialect, max_operations, Some(output));
                let legal = complete_words(&grammar);
                let distinct: BTreeSet<_> = legal.iter().cloned().collect();
                assert_eq!(distinct.len(), legal.len());
                let expected = found.iter().filter(|(to, _)| *to == output as u8).map(|(_, tokens)| tokens.clone());
                assert_eq!(distinct, expected.collect());
            }
        }
    }

    /// Beyond what exams ask for: nested conditionals, lambdas around them, and branches whose type is open.
    #[test]
    fn budgets_up_to_eight_never_lead_into_a_dead_end() {
        for max_operations in 1..=8 {
            for output in [None, Some(Type::Integer), Some(Type::List)] {
                for index in 0..300 {
                    let mut rng = proto::CounterRng::new(1, proto::Purpose::Rollout, max_operations as u64, index, 0);
                    let mut grammar = ProgramGrammar::new(Dialect::Full, max_operations, output);
                    let mut tokens = Vec::new();
                    loop {
                        let token = match grammar.next() {
                            Next::Done => break,
                            Next::Forced(token) => token,
                            Next::Choice(mask) => {
                                assert!(!mask.is_empty(), "{tokens:?} has no continuation");
                                // Nesting is the likely failure, so it is preferred when it is legal.
                                let nests = |token: &TokenId| {
                                    let role = Dialect::Full.operation(*token).map(|operation| operation.role);
                                    matches!(role, Some(Role::Map | Role::Filter | Role::If | Role::When))
                                };
                                let nesting: Vec<TokenId> = mask.iter().filter(nests).collect();
                                let all: Vec<TokenId> = mask.iter().collect();
                                let pool = if nesting.is_empty() || rng.below(2) == 0 { all } else { nesting };
                                pool[rng.below(pool.len() as u64) as usize]
                            }
                        };
                        assert!(grammar.push(token));
                        tokens.push(token);
                    }
                    tokens.pop();
                    let program = super::super::language::Program::read(Dialect::Full, &tokens).unwrap();
                    assert!(program.num_operations <= max_operations);
                    assert!(output.is_none_or(|output| output == program.output));
                }
            }
        }
    }

    #[test]
    fn values_end_by_themselves_or_where_room_ends() {
        let mut integer = ValueGrammar::integer((-99, 99));
        assert!(integer.push(MINUS) && !integer.push(0) && !integer.push(MINUS) && integer.push(99));
        assert_eq!(integer.next(), Next::Done);
        let mut list = ValueGrammar::list((0, 9));
        assert!(!list.push(MINUS) && !list.push(10));
        assert!((0..6).all(|element| list.push(element)));
        assert_eq!(list.next(), Next::Forced(END));
        assert!(list.push(END) && !list.push(END));
        assert_eq!(list.next(), Next::Done);
    }
}
