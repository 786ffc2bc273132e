//! Tests of the real binary: the same digests at every step whatever happens to a run, and one clear error for any input that
//! it refuses.

mod audit;
mod bad_input;
mod bench;
mod checker;
mod cluster;
mod crash_points;
mod device;
mod export;
mod fetch;
mod free_running;
mod input;
mod inspect;
mod journal;
mod learning;
mod metrics;
mod model;
#[path = "../../bus/tests/nats_server/mod.rs"]
mod nats_server;
mod own_problems;
mod pages;
mod pretrained;
mod pretrained_run;
mod process;
mod pure_function;
mod roles;
mod runs;
mod security;
mod servers;
mod study;
mod two_layers;
mod web_server;
