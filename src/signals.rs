//! Signals that ask this process to stop: Ctrl-C, SIGTERM, and SIGHUP, which a closing terminal sends.
//!
//! A separate thread receives them, so that busy threads do not delay them. A command that needs a clean shutdown calls
//! [`stop_in_order`] before its first wait. For any other command the first signal ends the process, as by default.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::report::note;

/// The action of the first signal. If it is `None`, the first signal ends the process.
static ORDER: Mutex<Option<Order>> = Mutex::new(None);

struct Order {
    shutdown: CancellationToken,
    how: &'static str,
    /// A child process that gets no signals from the terminal.
    child: Option<Pid>,
}

/// Starts signal handling for a command that shuts down cleanly: the first signal cancels the token, and a note says `how`
/// the command ends. A second signal ends the process at once.
///
/// # Errors
/// When the system refuses a handler or a thread.
pub(crate) fn stop_in_order(how: &'static str) -> Result<CancellationToken> {
    let shutdown = CancellationToken::new();
    let before = lock().replace(Order { shutdown: shutdown.clone(), how, child: None });
    assert!(before.is_none(), "a process runs one command");
    listen()?;
    Ok(shutdown)
}

/// Starts signal handling for a command without a clean shutdown if it is process 1 of a container. Process 1 has no default
/// signal actions: the kernel drops every signal without a handler.
///
/// # Errors
/// When the system refuses a handler or a thread.
pub(crate) fn listen_as_process_1() -> Result<()> {
    if std::process::id() == 1 { listen() } else { Ok(()) }
}

/// Forwards signals to a process until the result is dropped.
pub(crate) fn pass_on_to(child: Pid) -> PassedOn {
    set_child(Some(child));
    PassedOn
}

pub(crate) struct PassedOn;

impl Drop for PassedOn {
    fn drop(&mut self) {
        set_child(None);
    }
}

fn set_child(child: Option<Pid>) {
    if let Some(order) = lock().as_mut() {
        order.child = child;
    }
}

fn lock() -> MutexGuard<'static, Option<Order>> {
    ORDER.lock().unwrap_or_else(PoisonError::into_inner)
}

fn listen() -> Result<()> {
    static LISTENS: AtomicBool = AtomicBool::new(false);
    if LISTENS.swap(true, Ordering::Relaxed) {
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().context("listen for signals")?;
    let handle = |signal_: Signal| -> Result<_> {
        let _runtime = runtime.enter();
        signal(SignalKind::from_raw(signal_ as i32)).with_context(|| format!("listen for {signal_}"))
    };
    let (mut interrupts, mut terminations) = (handle(Signal::SIGINT)?, handle(Signal::SIGTERM)?);
    // A process started with SIGHUP ignored, as by nohup, must outlive the terminal.
    let mut hangups = if is_ignored(Signal::SIGHUP) { None } else { Some(handle(Signal::SIGHUP)?) };
    let hear = async move {
        let mut is_first = true;
        loop {
            let heard = tokio::select! {
                Some(()) = interrupts.recv() => Signal::SIGINT,
                Some(()) = terminations.recv() => Signal::SIGTERM,
                Some(()) = async { hangups.as_mut()?.recv().await }, if hangups.is_some() => Signal::SIGHUP,
            };
            obey(heard, is_first);
            is_first = false;
        }
    };
    let thread = std::thread::Builder::new().name("signals".to_owned()).spawn(move || runtime.block_on(hear));
    thread.context("start the thread that listens for signals").map(drop)
}

fn obey(heard: Signal, is_first: bool) {
    let order = lock();
    if let Some(child) = order.as_ref().and_then(|order| order.child) {
        // The child may have just ended.
        let _ = kill(child, heard);
    }
    match order.as_ref() {
        Some(Order { shutdown, how, .. }) if is_first => {
            // Print the note before cancelling: a command with nothing to clean up ends at once.
            note(format_args!("stopping: {how} (a second signal quits at once)"));
            shutdown.cancel();
        }
        // A closing terminal may cause two SIGHUPs: one from the shell and one from the kernel.
        Some(_) if heard == Signal::SIGHUP => {}
        _ => std::process::exit(128 + heard as i32),
    }
}

/// Whether this process was started with a signal ignored. Known on Linux only; elsewhere false.
fn is_ignored(signal: Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask >> (signal as i32 - 1) & 1 == 1)
}
