//! The program: the library's command line, and an allocator.

use std::process::ExitCode;

/// Keeps the pages of freed buffers: training repeatedly allocates and frees the same large buffers.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    autodidact::main()
}
