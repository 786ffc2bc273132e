//! Untrusted messages: the fuzzer's corpus, and length prefixes beyond the end of a message. Nothing panics, and memory use is
//! proportional to the size of the message.

use std::path::Path;

use peak_alloc::PeakAlloc;
use proto::wire;

#[path = "../../tests/fuzz/receive.rs"]
mod receive;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Maximum bytes in memory per byte of a message: an empty rollout has 5 on the wire. `SLACK` is extra: a list's length
/// prefix can preallocate up to 1 MiB, and a domain needs memory to judge.
const GROWTH: usize = 256;
const SLACK: usize = 4 << 20;

fn receive_within_bounds(name: &str, bytes: &[u8]) {
    ALLOCATOR.reset_peak_usage();
    let before = ALLOCATOR.current_usage();
    receive::receive(bytes);
    let grown = ALLOCATOR.peak_usage().saturating_sub(before);
    assert!(grown <= GROWTH * bytes.len() + SLACK, "{name}: {grown} bytes for a message of {}", bytes.len());
}

/// A single test, because the allocator counts for all threads.
#[test]
fn nothing_that_comes_does_harm() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus/messages");
    let paths = std::fs::read_dir(corpus).unwrap().map(|entry| entry.unwrap().path());
    let files: Vec<(String, Vec<u8>)> =
        paths.map(|path| (path.display().to_string(), std::fs::read(&path).unwrap())).collect();
    assert!(files.len() >= 10, "{} files", files.len());
    // Fills the domains' caches first, so that they are not charged to a message.
    files.iter().for_each(|(_, bytes)| receive::receive(bytes));
    for (name, bytes) in &files {
        receive_within_bounds(name, bytes);
        if !name.contains("/seed-") {
            // The fuzzer found this input and has tried its variations.
            continue;
        }
        // Truncates, and sets each byte to its maximum, so that length prefixes exceed the data.
        for cut in 0..bytes.len().min(512) {
            receive_within_bounds(&format!("{name}, cut at {cut}"), &bytes[..cut]);
            let mut changed = bytes.clone();
            changed[cut] = 0xff;
            receive_within_bounds(&format!("{name}, changed at {cut}"), &changed);
        }
    }
    let endless = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
    for kind in 0..7 {
        let long = [&[kind, wire::WIRE_VERSION][..], &endless.repeat(100)].concat();
        receive_within_bounds("endless", &long);
    }
}
