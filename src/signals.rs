//! What asks this process to stop: Ctrl-C, SIGTERM, and SIGHUP, which a terminal sends that goes away.
//!
//! One thread hears them, whatever the others are busy with. A command that has something to put in order says so before its
//! first wait ([`stop_in_order`]); of any other command the first signal is the end, as it is by default.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::report::note;

/// What the first signal sets in motion; without it, it ends the process.
static ORDER: Mutex<Option<Order>> = Mutex::new(None);

struct Order {
    shutdown: CancellationToken,
    how: &'static str,
    /// A process of ours that no terminal reaches.
    child: Option<Pid>,
}

/// Starts to listen for a command that stops in order: the first signal cancels the token, and a person is told `how` the
/// command ends. A second one ends the process at once.
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

/// Listens for a command that has nothing to put in order, where it is process 1 of a container: that one has no default for
/// signals, and the kernel drops each that nobody listens for.
///
/// # Errors
/// When the system refuses a handler or a thread.
pub(crate) fn listen_as_process_1() -> Result<()> {
    if std::process::id() == 1 { listen() } else { Ok(()) }
}

/// Passes signals on to a process for as long as the result lives.
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
    // Whoever starts a process with SIGHUP ignored, as nohup does, wants it to outlive the terminal.
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
        // It may have ended just now.
        let _ = kill(child, heard);
    }
    match order.as_ref() {
        Some(Order { shutdown, how, .. }) if is_first => {
            // Said first: what has nothing to put in order is gone at once.
            note(format_args!("stopping: {how} (again quits at once)"));
            shutdown.cancel();
        }
        // A terminal that goes away may say so twice: the shell does, and so does the kernel.
        Some(_) if heard == Signal::SIGHUP => {}
        _ => std::process::exit(128 + heard as i32),
    }
}

/// Whether this process was started with a signal ignored. Linux alone says.
fn is_ignored(signal: Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask >> (signal as i32 - 1) & 1 == 1)
}
