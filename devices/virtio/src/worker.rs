//! Device threads: a loop over `poll` that also runs calls from other threads.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use smallvec::SmallVec;

/// What a device thread does.
pub(crate) trait Service: Send + 'static {
    /// Adds the descriptors to wait for. Asked before each wait.
    fn wait_for<'a>(&'a self, set: &mut WaitSet<'a>);

    /// A descriptor with this token is ready.
    fn ready(&mut self, token: u64, events: PollFlags);

    /// Called after every wait, when all that was ready has been told: ends the batch.
    fn end_of_batch(&mut self);
}

/// The descriptors that a service waits for.
#[derive(Default)]
pub(crate) struct WaitSet<'a> {
    fds: SmallVec<[PollFd<'a>; 8]>,
    tokens: SmallVec<[u64; 8]>,
    at_most: Option<Duration>,
}

impl<'a> WaitSet<'a> {
    /// Waits for `events` on `fd`; told by `token`.
    pub(crate) fn add(&mut self, fd: BorrowedFd<'a>, events: PollFlags, token: u64) {
        self.fds.push(PollFd::from_borrowed_fd(fd, events));
        self.tokens.push(token);
    }

    /// Waits no longer than this.
    pub(crate) fn at_most(&mut self, time: Duration) {
        self.at_most = Some(self.at_most.map_or(time, |t| t.min(time)));
    }
}

type Call<S> = Box<dyn FnOnce(&mut S) + Send>;

struct Shared<S> {
    calls: Mutex<Vec<Call<S>>>,
    ended: AtomicBool,
    wake: OwnedFd,
}

/// Reaches a device thread from other threads.
pub(crate) struct WorkerHandle<S>(Arc<Shared<S>>);

impl<S> Clone for WorkerHandle<S> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

/// A device thread. Ends, and is waited for, when this is dropped.
pub(crate) struct Worker<S> {
    handle: WorkerHandle<S>,
    thread: Option<JoinHandle<()>>,
}

impl<S: Service> Worker<S> {
    /// Starts a thread called `name` (Linux shows the first 15 bytes).
    pub(crate) fn start(name: &str, service: S) -> std::io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC)?;
        let shared = Arc::new(Shared {
            calls: Mutex::default(),
            ended: AtomicBool::new(false),
            wake,
        });
        let of_thread = shared.clone();
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || serve(&of_thread, service))?;
        Ok(Self {
            handle: WorkerHandle(shared),
            thread: Some(thread),
        })
    }

    /// A handle for other threads.
    pub(crate) fn handle(&self) -> &WorkerHandle<S> {
        &self.handle
    }

    /// Runs `f` on the thread and waits for its value.
    pub(crate) fn call<T>(&self, f: impl FnOnce(&mut S) -> T + Send + 'static) -> T
    where
        T: Default + Send + 'static,
    {
        let (send, value) = mpsc::channel();
        self.handle.post(move |service| {
            let _ = send.send(f(service));
        });
        // The thread ends only with the worker, or by a panic that has been printed.
        value.recv().unwrap_or_default()
    }
}

impl<S> WorkerHandle<S> {
    /// Runs `f` on the thread, some time soon; not at all when that has ended.
    pub(crate) fn post(&self, f: impl FnOnce(&mut S) + Send + 'static) {
        let call: Call<S> = Box::new(f);
        let mut calls = self.0.calls.lock();
        if self.0.ended.load(Ordering::SeqCst) {
            // Without the lock: what it holds may be a handle.
            drop(calls);
            return;
        }
        calls.push(call);
        drop(calls);
        self.wake();
    }

    fn wake(&self) {
        // Fails only when the counter would overflow: the thread is awake then.
        let _ = rustix::io::write(&self.0.wake, &1u64.to_ne_bytes());
    }
}

impl<S> Drop for Worker<S> {
    fn drop(&mut self) {
        self.handle.0.ended.store(true, Ordering::SeqCst);
        self.handle.wake();
        if let Some(thread) = self.thread.take() {
            // A panic has been printed by the thread.
            let _ = thread.join();
        }
        // Calls that came too late may hold handles, which would keep them for ever.
        let late = std::mem::take(&mut *self.handle.0.calls.lock());
        drop(late);
    }
}

const WAKE: u64 = u64::MAX;

fn serve<S: Service>(shared: &Shared<S>, mut service: S) {
    let mut ready: Vec<(u64, PollFlags)> = Vec::new();
    while !shared.ended.load(Ordering::SeqCst) {
        wait(shared, &service, &mut ready);
        for (token, events) in ready.drain(..) {
            if token == WAKE {
                crate::doorbell::take(&shared.wake);
                let calls = std::mem::take(&mut *shared.calls.lock());
                for call in calls {
                    call(&mut service);
                }
                // The calls may have replaced what else was ready. What still is will be told by the next wait.
                break;
            }
            service.ready(token, events);
        }
        service.end_of_batch();
    }
}

fn wait<S: Service>(shared: &Shared<S>, service: &S, ready: &mut Vec<(u64, PollFlags)>) {
    let mut set = WaitSet::default();
    set.add(shared.wake.as_fd(), PollFlags::IN, WAKE);
    service.wait_for(&mut set);
    let timeout = set.at_most.map(|time| Timespec {
        tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(time.subsec_nanos()),
    });
    // An interrupted wait is one in which nothing was ready.
    if poll(&mut set.fds, timeout.as_ref()).is_ok() {
        let told = set.fds.iter().zip(&set.tokens);
        ready.extend(
            told.filter(|(fd, _)| !fd.revents().is_empty())
                .map(|(fd, token)| (*token, fd.revents())),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Counter {
        event: OwnedFd,
        seen: mpsc::Sender<u64>,
        count: u64,
    }

    impl Service for Counter {
        fn wait_for<'a>(&'a self, set: &mut WaitSet<'a>) {
            set.add(self.event.as_fd(), PollFlags::IN, 7);
        }
        fn ready(&mut self, token: u64, _: PollFlags) {
            crate::doorbell::take(&self.event);
            self.count += token;
        }
        fn end_of_batch(&mut self) {
            let _ = self.seen.send(self.count);
        }
    }

    #[test]
    fn a_worker_serves_events_and_calls_and_ends() {
        let event = crate::doorbell::new_event().unwrap();
        let (seen, count) = mpsc::channel();
        let worker = Worker::start(
            "test-worker",
            Counter {
                event: crate::doorbell::reader(&event).unwrap(),
                seen,
                count: 0,
            },
        )
        .unwrap();
        event.write(1).unwrap();
        assert!(count.iter().any(|c| c == 7));
        assert_eq!(worker.call(|s| std::mem::replace(&mut s.count, 1)), 7);
        worker.handle().post(|s| s.count += 1);
        assert!(count.iter().any(|c| c == 2));
        drop(worker);
        assert!(count.iter().last().is_none_or(|c| c == 2));
    }

    /// A timer's function holds a handle, and a call may hold the timer.
    #[test]
    fn calls_that_hold_handles_go_with_the_worker() {
        let event = crate::doorbell::new_event().unwrap();
        let counter = Counter {
            event: crate::doorbell::reader(&event).unwrap(),
            seen: mpsc::channel().0,
            count: 0,
        };
        let worker = Worker::start("test-worker", counter).unwrap();
        let handle = worker.handle().clone();
        let held = Arc::new(());
        let post = |handle: &WorkerHandle<Counter>| {
            let inside = (held.clone(), handle.clone());
            handle.post(move |_| drop(inside));
        };
        // While the thread is at something else, so that it never comes to it.
        let (begin, has_begun) = mpsc::channel();
        let watched = handle.clone();
        handle.post(move |_| {
            begin.send(()).unwrap();
            while !watched.0.ended.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
        });
        has_begun.recv().unwrap();
        post(&handle);
        drop(worker);
        assert_eq!(Arc::strong_count(&held), 1);
        post(&handle);
        assert_eq!(Arc::strong_count(&held), 1);
    }
}
