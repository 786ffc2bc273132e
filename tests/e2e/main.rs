//! The real binary: the same digests at every step whatever happens to a run, and one clear error for whatever it cannot
//! take.

mod bad_input;
mod bench;
mod device;
mod inspect;
mod metrics;
mod pure_function;
mod runs;
mod study;
