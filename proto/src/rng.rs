use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::Digest;

/// The purpose of a stream of random draws. It is part of the key, so that two uses never share draws.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Initial weights.
    Init,
    /// Tokens of a rollout: one stream per (batch, task index, rollout).
    Rollout,
    /// Tokens of an evaluation rollout.
    Evaluation,
    /// Which problems a batch asks for.
    Plan,
    /// A problem of a domain's ladder.
    Ladder,
    /// A candidate for an exam.
    Exam,
    /// Which examples an update trains on.
    Replay,
    /// A control that permutes labels.
    Shuffle,
    /// A change of a problem of the archive.
    Mutation,
    /// Inputs that a verifier runs a program on.
    Execution,
    /// Faults that a bus injects on purpose; nothing that is learned depends on them.
    Fault,
}

/// Random draws that are a function of their key alone: (seed, purpose, batch, index, attempt).
///
/// The draws of one key come in order, from ChaCha8 under a key hashed with blake3. Nothing else in the workspace draws
/// random numbers.
///
/// ```
/// use proto::{CounterRng, Purpose};
/// let mut rng = CounterRng::new(7, Purpose::Plan, 3, 0, 0);
/// let same = CounterRng::new(7, Purpose::Plan, 3, 0, 0).next_u64();
/// assert_eq!(rng.next_u64(), same);
/// assert!(rng.below(10) < 10 && (0.0..1.0).contains(&rng.unit_f64()));
/// ```
#[derive(Clone, Debug)]
pub struct CounterRng(ChaCha8Rng);

impl CounterRng {
    /// Opens the stream of a key.
    pub fn new(seed: u64, purpose: Purpose, batch: u64, index: u64, attempt: u64) -> CounterRng {
        let mut hasher = blake3::Hasher::new_derive_key("autodidact 2026 counter rng v1");
        for word in [seed, purpose as u64, batch, index, attempt] {
            hasher.update(&word.to_le_bytes());
        }
        CounterRng(ChaCha8Rng::from_seed(*hasher.finalize().as_bytes()))
    }

    /// Opens the stream of a digest, for draws that must not depend on the run.
    pub fn of_digest(digest: &Digest, purpose: Purpose) -> CounterRng {
        CounterRng::new(digest.head(), purpose, 0, 0, 0)
    }

    /// Draws 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// Draws from [0, 1) in steps of 2^-53.
    pub fn unit_f64(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Draws from 0 .. `n` (multiply-shift; the bias is below n / 2^64).
    ///
    /// # Panics
    /// When `n` is zero.
    pub fn below(&mut self, n: u64) -> u64 {
        assert!(n > 0, "below: expected a positive bound, got 0");
        ((u128::from(self.next_u64()) * u128::from(n)) >> 64) as u64
    }

    /// Permutes a slice (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A changed stream would change every run: these bits are a promise.
    #[test]
    fn stream_is_fixed() {
        let mut rng = CounterRng::new(1, Purpose::Rollout, 2, 3, 4);
        assert_eq!(rng.next_u64(), 14_709_574_604_289_895_988);
    }

    #[test]
    fn digests_have_streams_of_their_own() {
        let first = |bytes, purpose| CounterRng::of_digest(&Digest::of_bytes(bytes), purpose).next_u64();
        assert_eq!(first(b"a", Purpose::Execution), first(b"a", Purpose::Execution));
        assert_ne!(first(b"a", Purpose::Execution), first(b"b", Purpose::Execution));
        assert_ne!(first(b"a", Purpose::Execution), first(b"a", Purpose::Plan));
    }

    #[test]
    fn every_part_of_the_key_matters() {
        let first =
            |seed, purpose, batch, index, attempt| CounterRng::new(seed, purpose, batch, index, attempt).next_u64();
        let base = first(1, Purpose::Plan, 1, 1, 1);
        for other in [
            first(2, Purpose::Plan, 1, 1, 1),
            first(1, Purpose::Ladder, 1, 1, 1),
            first(1, Purpose::Plan, 2, 1, 1),
            first(1, Purpose::Plan, 1, 2, 1),
            first(1, Purpose::Plan, 1, 1, 2),
        ] {
            assert_ne!(base, other);
        }
    }
}
