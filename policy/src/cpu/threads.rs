use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, TryLockError};

use super::kernels::{MatrixView, PackedMatrix, Part, Start, matmul, parts};
use crate::ModelConfig;

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

/// Threads that each decode sequences of their own. Those that have none help another with its products, if its network is large.
/// Clones are the same threads. The helpers start when they are first needed, and change no bit of a result.
#[derive(Clone, Debug)]
pub struct ThreadPool(Arc<Threads>);

#[derive(Debug)]
struct Threads {
    num_threads: usize,
    num_busy: AtomicUsize,
    /// Held by the thread that is helped. There is one: a helper that waited for another's part would run all work of a third.
    helped: Mutex<()>,
    helpers: OnceLock<rayon::ThreadPool>,
}

/// Fewest values of a matrix whose products are shared: threads take some microseconds to begin and to end together.
const MIN_SHARED: usize = 1 << 18;

impl ThreadPool {
    /// Returns a pool of some threads.
    pub fn new(num_threads: usize) -> ThreadPool {
        let (num_busy, helped, helpers) = (AtomicUsize::new(0), Mutex::new(()), OnceLock::new());
        ThreadPool(Arc::new(Threads { num_threads, num_busy, helped, helpers }))
    }

    /// Runs the work of one of the threads, which is told whether others help it.
    pub(super) fn run<R: Send>(&self, config: &ModelConfig, work: impl FnOnce(Option<&ThreadPool>) -> R + Send) -> R {
        let Threads { num_threads, num_busy, helped, helpers } = &*self.0;
        let _busy = Busy::new(num_busy);
        let is_large = 2 * config.d_model * config.ff_dim >= MIN_SHARED;
        if !is_large || self.num_idle() == 0 {
            return work(None);
        }
        let _helped = match helped.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(error)) => error.into_inner(),
            Err(TryLockError::WouldBlock) => return work(None),
        };
        let start = || {
            let builder = rayon::ThreadPoolBuilder::new().num_threads(*num_threads);
            builder.thread_name(|index| format!("helper-{index}")).build().expect("could not start threads")
        };
        helpers.get_or_init(start).install(|| work(Some(self)))
    }

    fn num_idle(&self) -> usize {
        self.0.num_threads.saturating_sub(self.0.num_busy.load(Ordering::Relaxed))
    }
}

/// A thread that has work.
struct Busy<'a>(&'a AtomicUsize);

impl Busy<'_> {
    fn new(num_busy: &AtomicUsize) -> Busy<'_> {
        num_busy.fetch_add(1, Ordering::Relaxed);
        Busy(num_busy)
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Multiplies as [`matmul`] does, with the help of idle threads.
pub(super) fn helped_matmul(
    helpers: Option<&ThreadPool>,
    left: MatrixView<'_>,
    num_rows: usize,
    right: &PackedMatrix,
    out: &mut [f32],
) {
    let is_large = right.num_rows() * right.num_columns() >= MIN_SHARED;
    let num_idle = helpers.filter(|_| is_large).map_or(0, ThreadPool::num_idle);
    if num_idle == 0 {
        return matmul(left, num_rows, right, Start::Zero, out);
    }
    let mut parts = parts(left, num_rows, right, Start::Zero, 1 + num_idle, out).into_iter();
    let own = parts.next();
    rayon::scope(|scope| {
        parts.for_each(|part| scope.spawn(|_| part.run()));
        own.into_iter().for_each(Part::run);
    });
}
