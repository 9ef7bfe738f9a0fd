//! Computation on other processors: compression must not hold up a disk's I/O.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker};

type Job = Box<dyn FnOnce() + Send>;

struct Pool {
    jobs: Mutex<VecDeque<Job>>,
    work: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The process's pool: as many threads as processors, started at the first use.
fn pool() -> &'static Pool {
    static POOL: OnceLock<&'static Pool> = OnceLock::new();
    POOL.get_or_init(|| {
        let pool: &'static Pool = Box::leak(Box::new(Pool {
            jobs: Mutex::default(),
            work: Condvar::new(),
        }));
        let threads = std::thread::available_parallelism()
            .map_or(1, usize::from)
            .min(64);
        for number in 0..threads {
            let name = format!("compute-{number}");
            let started = std::thread::Builder::new()
                .name(name)
                .spawn(move || serve(pool));
            assert!(number > 0 || started.is_ok(), "no thread can be started");
        }
        pool
    })
}

fn serve(pool: &Pool) {
    let mut jobs = lock(&pool.jobs);
    loop {
        if let Some(job) = jobs.pop_front() {
            drop(jobs);
            job();
            jobs = lock(&pool.jobs);
        } else {
            jobs = pool.work.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

struct Slot<T> {
    value: Option<T>,
    waker: Option<Waker>,
    /// The job was dropped without a value: it panicked.
    ended: bool,
}

struct Running<T>(Arc<Mutex<Slot<T>>>);

/// Tells the waiting task when the job is done, whichever way.
struct Ending<T>(Arc<Mutex<Slot<T>>>);

impl<T> Drop for Ending<T> {
    fn drop(&mut self) {
        let mut slot = lock(&self.0);
        slot.ended = true;
        let waker = slot.waker.take();
        drop(slot);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Future for Running<T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let mut slot = lock(&self.0);
        if let Some(value) = slot.value.take() {
            return Poll::Ready(value);
        }
        assert!(!slot.ended, "a computation panicked");
        slot.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// Runs `compute` on another processor.
///
/// # Panics
///
/// If `compute` panics.
pub async fn offload<T: Send + 'static>(compute: impl FnOnce() -> T + Send + 'static) -> T {
    let slot = Arc::new(Mutex::new(Slot {
        value: None,
        waker: None,
        ended: false,
    }));
    let ending = Ending(slot.clone());
    let job: Job = Box::new(move || {
        let run = std::panic::AssertUnwindSafe(|| {
            let value = compute();
            lock(&ending.0).value = Some(value);
        });
        // The panic has been printed; the pool's thread goes on.
        let _ = std::panic::catch_unwind(run);
        drop(ending);
    });
    let pool = pool();
    lock(&pool.jobs).push_back(job);
    pool.work.notify_one();
    Running(slot).await
}
