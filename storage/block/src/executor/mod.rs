//! A single-threaded executor with asynchronous file I/O: one for each disk's I/O thread, or for the
//! length of a [`block_on`] in a tool.
//!
//! Tasks are local (they need not be `Send`), so a format keeps its state in `Cell`s and `RefCell`s
//! without locks. Wakers work from any thread. Submissions made while tasks run are handed to the
//! kernel together, when every ready task has had its turn.

mod offload;
mod operation;
mod slots;
mod socket;
mod task;
mod thread;
mod threads_engine;
mod uring_engine;

pub use offload::offload;
pub(crate) use operation::Operation;
pub use socket::{Listener, Socket};
pub use task::{JoinHandle, yield_now};
pub use thread::{IoHandle, IoThread};

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use rustix::event::{EventfdFlags, eventfd};

use crate::buffer::IoBuf;
use crate::error::{BlockError, ErrorKind, Result};
use slots::{SlotId, Slots};
use task::Tasks;
use threads_engine::ThreadsEngine;
use uring_engine::UringEngine;

/// How an executor talks to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EngineKind {
    /// io_uring where the kernel allows it, else threads.
    #[default]
    Auto,
    /// io_uring; an error where the kernel refuses it.
    IoUring,
    /// A pool of threads with preadv and pwritev.
    Threads,
}

enum Engine {
    Uring(Box<UringEngine>),
    Threads(ThreadsEngine),
}

/// State that other threads may touch.
pub(crate) struct Shared {
    inbox: Mutex<Inbox>,
    /// Set while a wake-up through `wake_fd` is under way and not yet seen.
    notified: AtomicBool,
    wake_fd: OwnedFd,
}

#[derive(Default)]
struct Inbox {
    woken: Vec<usize>,
    calls: Vec<Box<dyn FnOnce() + Send>>,
    closed: bool,
}

impl Shared {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn notify(&self) {
        if !self.notified.swap(true, Ordering::AcqRel) {
            // The counter cannot overflow: it is reset each time the flag is. A failure would mean
            // a closed descriptor, which `self` owns.
            let _ = rustix::io::write(&self.wake_fd, &1u64.to_ne_bytes());
        }
    }

    fn wake_remote(&self, task: usize) {
        self.inbox().woken.push(task);
        self.notify();
    }
}

/// The executor of one thread.
pub(crate) struct Executor {
    tasks: RefCell<Tasks>,
    ready: RefCell<VecDeque<usize>>,
    shared: Arc<Shared>,
    slots: RefCell<Slots>,
    engine: RefCell<Engine>,
}

thread_local! {
    static CURRENT: RefCell<Option<Rc<Executor>>> = const { RefCell::new(None) };
}

/// The task number of the future that `block_on` was called with.
const ROOT: usize = usize::MAX;

pub(crate) struct TaskWaker {
    id: usize,
    queued: AtomicBool,
    shared: Arc<Shared>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.queued.swap(true, Ordering::AcqRel) {
            return;
        }
        let local = CURRENT
            .try_with(|current| {
                let current = current.try_borrow().ok()?;
                let executor = current.as_ref()?;
                Arc::ptr_eq(&executor.shared, &self.shared)
                    .then(|| executor.ready.borrow_mut().push_back(self.id))
            })
            .ok()
            .flatten();
        if local.is_none() {
            self.shared.wake_remote(self.id);
        }
    }
}

impl Executor {
    pub(crate) fn new(kind: EngineKind) -> Result<Rc<Self>> {
        let wake_fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| BlockError::io("cannot create an eventfd", e.into()))?;
        let shared = Arc::new(Shared {
            inbox: Mutex::default(),
            notified: AtomicBool::new(false),
            wake_fd,
        });
        let engine = match kind {
            EngineKind::Threads => Engine::Threads(ThreadsEngine::new(&shared)),
            EngineKind::IoUring => UringEngine::new(&shared)
                .map(|uring| Engine::Uring(Box::new(uring)))
                .map_err(|e| BlockError::io("cannot set up io_uring", e))?,
            EngineKind::Auto => match UringEngine::new(&shared) {
                Ok(uring) => Engine::Uring(Box::new(uring)),
                Err(_) => Engine::Threads(ThreadsEngine::new(&shared)),
            },
        };
        Ok(Rc::new(Self {
            tasks: RefCell::default(),
            ready: RefCell::default(),
            shared,
            slots: RefCell::default(),
            engine: RefCell::new(engine),
        }))
    }

    /// The executor of this thread.
    ///
    /// # Errors
    ///
    /// If no executor runs on this thread.
    pub(crate) fn current() -> Result<Rc<Self>> {
        CURRENT.with(|c| c.borrow().clone()).ok_or_else(|| {
            BlockError::new(
                ErrorKind::InvalidArgument,
                "no executor runs on this thread",
            )
        })
    }

    pub(crate) fn waker(&self, id: usize) -> Arc<TaskWaker> {
        Arc::new(TaskWaker {
            id,
            queued: AtomicBool::new(false),
            shared: self.shared.clone(),
        })
    }

    /// Runs `future` to its end, and spawned tasks meanwhile.
    fn run<T>(self: &Rc<Self>, future: impl Future<Output = T>) -> T {
        let _entered = Entered::new(self.clone());
        let mut future = pin!(future);
        let root = self.waker(ROOT);
        let waker = Waker::from(root.clone());
        root.wake_by_ref();
        loop {
            // A bounded batch, so that tasks that wake each other cannot starve the I/O.
            let batch = self.ready.borrow().len();
            for _ in 0..batch {
                let Some(id) = self.ready.borrow_mut().pop_front() else {
                    break;
                };
                if id == ROOT {
                    root.queued.store(false, Ordering::Release);
                    if let Poll::Ready(value) =
                        future.as_mut().poll(&mut Context::from_waker(&waker))
                    {
                        return value;
                    }
                } else {
                    Tasks::poll(&self.tasks, id);
                }
            }
            let block = self.ready.borrow().is_empty();
            self.turn(block);
        }
    }

    /// Submits what is queued, takes completions in, and if `block` waits for one or for a wake-up.
    fn turn(&self, block: bool) {
        let woken = {
            let mut engine = self.engine.borrow_mut();
            let mut slots = self.slots.borrow_mut();
            match &mut *engine {
                Engine::Uring(uring) => uring.turn(&self.shared, &mut slots, block),
                Engine::Threads(threads) => threads.turn(&self.shared, &mut slots, block),
            }
        };
        for waker in woken {
            waker.wake();
        }
        if self.shared.notified.load(Ordering::Acquire) {
            self.take_inbox();
        }
    }

    fn take_inbox(&self) {
        // The flag is cleared before the inbox is read: who posts after that notifies again.
        self.shared.notified.store(false, Ordering::Release);
        let (woken, calls) = {
            let mut inbox = self.shared.inbox();
            (
                std::mem::take(&mut inbox.woken),
                std::mem::take(&mut inbox.calls),
            )
        };
        self.ready.borrow_mut().extend(woken);
        for call in calls {
            call();
        }
    }

    pub(crate) fn spawn<T: 'static>(
        self: &Rc<Self>,
        future: impl Future<Output = T> + 'static,
    ) -> JoinHandle<T> {
        let (future, handle) = task::joinable(future);
        let waker = {
            let mut tasks = self.tasks.borrow_mut();
            let id = tasks.vacant();
            let waker = self.waker(id);
            tasks.insert(id, future, waker.clone());
            waker
        };
        waker.wake_by_ref();
        handle
    }

    /// Ends an operation that nobody waits for and that might go on for ever.
    fn cancel(&self, slot: SlotId) {
        let mut engine = self.engine.borrow_mut();
        let mut slots = self.slots.borrow_mut();
        if slots.needs_cancel(slot) {
            match &mut *engine {
                Engine::Uring(uring) => uring.cancel(slot),
                Engine::Threads(threads) => threads.cancel(&mut slots, slot),
            }
        }
    }

    /// Starts `operation`; the future yields the system call's result.
    pub(crate) fn submit(self: &Rc<Self>, operation: Operation) -> Submitted {
        Submitted {
            executor: self.clone(),
            state: SubmitState::New(operation),
        }
    }
}

/// Makes an executor the thread's current one, and the former one again at the end.
struct Entered {
    executor: Rc<Executor>,
    former: Option<Rc<Executor>>,
}

impl Entered {
    fn new(executor: Rc<Executor>) -> Self {
        let former = CURRENT.with(|c| c.borrow_mut().replace(executor.clone()));
        Self { executor, former }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        // Tasks hold the executor through their files; dropping them breaks the circle. This runs
        // while the executor is still current, because their destructors may wake one another.
        let tasks = std::mem::take(&mut *self.executor.tasks.borrow_mut());
        drop(tasks);
        let calls = {
            let mut inbox = self.executor.shared.inbox();
            inbox.closed = true;
            std::mem::take(&mut inbox.calls)
        };
        drop(calls);
        CURRENT.with(|c| *c.borrow_mut() = self.former.take());
    }
}

impl Drop for Executor {
    fn drop(&mut self) {
        let slots = self.slots.get_mut();
        match self.engine.get_mut() {
            Engine::Uring(uring) => uring.drain(&self.shared, slots),
            Engine::Threads(threads) => threads.drain(slots),
        }
    }
}

/// An operation in the kernel's hands. Dropping it abandons the result, and cancels what might wait for ever;
/// the buffer stays alive until the kernel is done with it.
pub(crate) struct Submitted {
    executor: Rc<Executor>,
    state: SubmitState,
}

enum SubmitState {
    New(Operation),
    InFlight(SlotId),
    Finished,
}

impl Future for Submitted {
    /// What the system call returned: a count, or a negated error number.
    type Output = i32;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<i32> {
        match std::mem::replace(&mut self.state, SubmitState::Finished) {
            SubmitState::New(operation) => {
                let executor = self.executor.clone();
                let mut engine = executor.engine.borrow_mut();
                let mut slots = executor.slots.borrow_mut();
                let waker = cx.waker().clone();
                let slot = match &mut *engine {
                    Engine::Uring(uring) => uring.start(&mut slots, operation, waker),
                    Engine::Threads(threads) => threads.start(&mut slots, operation, waker),
                };
                self.state = SubmitState::InFlight(slot);
                Poll::Pending
            }
            SubmitState::InFlight(slot) => {
                let result = self.executor.slots.borrow_mut().take(slot, cx.waker());
                if result.is_none() {
                    self.state = SubmitState::InFlight(slot);
                }
                result.map_or(Poll::Pending, Poll::Ready)
            }
            SubmitState::Finished => panic!("an operation was polled after its end"),
        }
    }
}

impl Drop for Submitted {
    fn drop(&mut self) {
        if let SubmitState::InFlight(slot) = self.state {
            let abandoned = self.executor.slots.borrow_mut().abandon(slot);
            drop(abandoned);
            self.executor.cancel(slot);
        }
    }
}

/// Runs `future` on this thread until it is done, with the engine that the kernel offers.
///
/// # Errors
///
/// If the executor cannot be set up (no file descriptors left, for example).
pub fn block_on<T>(future: impl Future<Output = T>) -> Result<T> {
    block_on_with(EngineKind::Auto, future)
}

/// [`block_on`] with an engine of the caller's choice.
///
/// # Errors
///
/// If the executor or the engine cannot be set up.
pub fn block_on_with<T>(kind: EngineKind, future: impl Future<Output = T>) -> Result<T> {
    Ok(Executor::new(kind)?.run(future))
}

/// Runs `future` beside the caller on this thread's executor.
///
/// # Panics
///
/// If no executor runs on this thread.
pub fn spawn_local<T: 'static>(future: impl Future<Output = T> + 'static) -> JoinHandle<T> {
    Executor::current()
        .expect("spawn_local runs inside an executor")
        .spawn(future)
}

/// An eventfd whose signals a task waits for: a virtqueue's doorbell, for example.
///
/// It may be blocking or non-blocking; nobody else may read it.
pub struct EventSource {
    file: Rc<OwnedFd>,
    executor: Rc<Executor>,
    buffer: IoBuf,
}

impl EventSource {
    /// Watches `eventfd` on this thread's executor.
    ///
    /// # Errors
    ///
    /// If no executor runs on this thread.
    pub fn new(eventfd: OwnedFd) -> Result<Self> {
        let executor = Executor::current()?;
        Ok(Self {
            file: Rc::new(eventfd),
            executor,
            buffer: IoBuf::zeroed(8),
        })
    }

    /// Waits for a signal and takes it: resets the counter and returns what it was.
    ///
    /// # Errors
    ///
    /// If the descriptor cannot be read.
    pub async fn wait(&self) -> Result<u64> {
        loop {
            let read = Operation::EventRead {
                file: self.file.clone(),
                buf: self.buffer.clone(),
            };
            match self.executor.submit(read).await {
                8 => {
                    let mut count = [0; 8];
                    self.buffer.copy_to(&mut count);
                    return Ok(u64::from_ne_bytes(count));
                }
                result if result == -libc::EAGAIN || result == -libc::EINTR => {
                    self.executor
                        .submit(Operation::Readable {
                            file: self.file.clone(),
                        })
                        .await;
                }
                result => {
                    let error = std::io::Error::from_raw_os_error(-result.min(0));
                    return Err(BlockError::io("cannot wait for an event", error));
                }
            }
        }
    }

    /// Takes pending signals without waiting: the counter, or 0.
    pub fn take(&self) -> u64 {
        let mut fds = [rustix::event::PollFd::new(
            &*self.file,
            rustix::event::PollFlags::IN,
        )];
        let mut count = [0; 8];
        let none = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        match rustix::event::poll(&mut fds, Some(&none)) {
            Ok(1) if rustix::io::read(self.file.as_fd(), &mut count) == Ok(8) => {
                u64::from_ne_bytes(count)
            }
            _ => 0,
        }
    }
}

/// Waits for `duration`.
///
/// # Errors
///
/// If no timer can be made, or no executor runs on this thread.
pub async fn sleep(duration: std::time::Duration) -> Result<()> {
    use rustix::time::{
        Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
        timerfd_settime,
    };
    let failed = |e: rustix::io::Errno| BlockError::io("cannot set a timer", e.into());
    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC).map_err(failed)?;
    let seconds = i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
    let value = Itimerspec {
        it_interval: Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        },
        it_value: Timespec {
            tv_sec: seconds,
            // Zero would disarm the timer.
            tv_nsec: i64::from(duration.subsec_nanos().max(1)),
        },
    };
    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &value).map_err(failed)?;
    EventSource::new(timer)?.wait().await.map(|_| ())
}
