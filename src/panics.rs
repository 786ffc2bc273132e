//! A panic is a defect. It ends the process in any thread or task, so that nothing waits for the failed one.

/// The exit status of a process that panicked.
const PANICKED: i32 = 101;

/// Makes the first panic in any thread or task end the process, after its message is on standard error.
pub(crate) fn end_the_process() {
    let say = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        say(panic);
        std::process::exit(PANICKED);
    }));
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
                Some("task") => drop(runtime.spawn(async { panic!("a defect of a task") })),
                _ => drop(runtime.spawn_blocking(|| panic!("a defect of a blocking task"))),
            }
            runtime.block_on(std::future::pending::<()>());
        }
        for (kind, text) in [("thread", "of a thread"), ("task", "of a task"), ("blocking", "of a blocking task")] {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args(["--exact", "panics::tests::a_panic_that_nobody_waits_for_ends_the_process", "--nocapture"]);
            let ended = command.env(CHILD, kind).output().unwrap();
            let said = String::from_utf8_lossy(&ended.stderr);
            assert_eq!(ended.status.code(), Some(PANICKED), "{said}");
            assert!(said.contains(&format!("a defect {text}")), "{said}");
        }
    }
}
