//! A panic is a defect. It ends the process in any thread or task, so that nothing waits for the failed one. The one exception is
//! code of others on untrusted input.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The exit status of a process that panicked.
const PANICKED: i32 = 101;

/// Makes the first panic in any thread or task end the process, after its message is on standard error.
pub(crate) fn end_the_process() {
    let say = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !IS_CAUGHT.get() {
            say(panic);
            std::process::exit(PANICKED);
        }
    }));
}

thread_local! {
    /// Whether a panic of this thread is returned by [`caught`].
    static IS_CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// Runs code of others on untrusted input, on which it may panic.
///
/// # Errors
/// The message of its panic.
pub(crate) fn caught<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    let before = IS_CAUGHT.replace(true);
    let result = catch_unwind(AssertUnwindSafe(run));
    IS_CAUGHT.set(before);
    result.map_err(|panic: Box<dyn Any + Send>| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        text.or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "a panic without a message".to_owned())
    })
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const CHILD: &str = "AUTODIDACT_TEST_PANICS";

    /// The test starts itself as a child process, which must end although nothing awaits the panicking task.
    #[test]
    fn a_panic_that_nobody_waits_for_ends_the_process() {
        if let Some(kind) = std::env::var_os(CHILD) {
            end_the_process();
            let runtime = tokio::runtime::Runtime::new().unwrap();
            match kind.to_str() {
                Some("thread") => drop(std::thread::spawn(|| panic!("a defect of a thread"))),
                Some("after one that is caught") => {
                    assert_eq!(caught(|| panic!("{}", 7)), Err::<(), _>("7".to_owned()));
                    panic!("a defect after one that is caught");
                }
                Some("task") => drop(runtime.spawn(async { panic!("a defect of a task") })),
                _ => drop(runtime.spawn_blocking(|| panic!("a defect of a blocking task"))),
            }
            runtime.block_on(std::future::pending::<()>());
        }
        for (kind, text) in [
            ("thread", "of a thread"),
            ("task", "of a task"),
            ("blocking", "of a blocking task"),
            ("after one that is caught", "after one that is caught"),
        ] {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args(["--exact", "panics::tests::a_panic_that_nobody_waits_for_ends_the_process", "--nocapture"]);
            let ended = command.env(CHILD, kind).output().unwrap();
            let said = String::from_utf8_lossy(&ended.stderr);
            assert_eq!(ended.status.code(), Some(PANICKED), "{said}");
            assert!(said.contains(&format!("a defect {text}")), "{said}");
        }
    }
}
