use std::sync::{Mutex, PoisonError};

/// Fewest values for which a thread is worth starting.
const MIN_VALUES: usize = 1 << 20;

/// Returns how many of `num_threads` threads are worth starting to read or write so many values once.
pub(super) fn worth_starting(num_threads: usize, num_values: usize) -> usize {
    num_threads.min(num_values.div_ceil(MIN_VALUES))
}

/// Runs `work` on every item, on up to `num_threads` threads, each of which takes the next item when it is done with one.
pub(super) fn for_each<I: IntoIterator<IntoIter: Send>>(num_threads: usize, items: I, work: impl Fn(I::Item) + Sync) {
    let items = Mutex::new(items.into_iter());
    let next = || items.lock().unwrap_or_else(PoisonError::into_inner).next();
    let run = || {
        while let Some(item) = next() {
            work(item);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..num_threads {
            scope.spawn(run);
        }
        run();
    });
}
