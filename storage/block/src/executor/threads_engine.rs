//! The engine on a pool of threads, for kernels and containers without io_uring.

#![allow(unsafe_code)] // System calls with raw addresses.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Shared;
use super::operation::Operation;
use super::slots::{SlotId, Slots};
use crate::buffer::{IoBuf, Segment};

/// As many system calls may be under way at once.
const MAX_WORKERS: usize = 16;

/// A system call in plain values, for another thread. The slot table holds what it points to.
enum Call {
    Read { offset: i64, segments: Vec<Segment> },
    Write { offset: i64, segments: Vec<Segment> },
    Sync,
    Allocate { mode: i32, offset: i64, length: i64 },
}

struct Job {
    slot: SlotId,
    fd: i32,
    call: Call,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    idle: usize,
    workers: usize,
    closed: bool,
}

struct Pool {
    queue: Mutex<Queue>,
    work: Condvar,
    done: Mutex<Vec<(SlotId, i32)>>,
    executor: Arc<Shared>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Watched {
    slot: SlotId,
    file: Rc<OwnedFd>,
    then: Then,
}

/// What is done with a descriptor when it is ready.
enum Then {
    /// Nothing: the poll was all.
    Tell,
    /// An eventfd's counter is read to here.
    Count(IoBuf),
    Receive(IoBuf),
    Send(IoBuf),
}

impl Then {
    fn awaited(&self) -> PollFlags {
        match self {
            Self::Send(_) => PollFlags::OUT,
            _ => PollFlags::IN,
        }
    }

    fn perform(&self, file: &OwnedFd) -> i32 {
        match self {
            Self::Tell => 0,
            Self::Count(target) => {
                let mut count = [0; 8];
                match rustix::io::read(file, &mut count) {
                    Ok(n) => {
                        target.copy_from(&count);
                        i32::try_from(n).unwrap_or(0)
                    }
                    Err(e) => -e.raw_os_error(),
                }
            }
            Self::Receive(buf) => transfer(file, buf, false),
            Self::Send(buf) => transfer(file, buf, true),
        }
    }
}

/// Moves what can be moved between a socket and `buf` without waiting.
fn transfer(file: &OwnedFd, buf: &IoBuf, send: bool) -> i32 {
    let segments = buf.segments();
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: all zeroes is a valid `msghdr` without any pieces.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = segments.as_ptr().cast_mut().cast();
    message.msg_iovlen = segments.len().min(super::uring_engine::MAX_SEGMENTS);
    // SAFETY: the segments (of the layout of `struct iovec`) lie in `buf`, which lives on.
    let moved = unsafe {
        if send {
            libc::sendmsg(file.as_raw_fd(), &raw const message, flags)
        } else {
            libc::recvmsg(file.as_raw_fd(), &raw mut message, flags)
        }
    };
    if moved < 0 {
        return -std::io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(libc::EIO);
    }
    i32::try_from(moved).unwrap_or(i32::MAX)
}

pub(crate) struct ThreadsEngine {
    pool: Arc<Pool>,
    watched: Vec<Watched>,
}

impl ThreadsEngine {
    pub(crate) fn new(shared: &Arc<Shared>) -> Self {
        let pool = Pool {
            queue: Mutex::default(),
            work: Condvar::new(),
            done: Mutex::default(),
            executor: shared.clone(),
        };
        Self {
            pool: Arc::new(pool),
            watched: Vec::new(),
        }
    }

    pub(crate) fn start(
        &mut self,
        slots: &mut Slots,
        operation: Operation,
        waker: Waker,
    ) -> SlotId {
        let bounded = operation.is_bounded();
        let (file, call) = match &operation {
            Operation::Read { file, offset, buf } => {
                let segments = buf.segments().to_vec();
                (
                    file,
                    Call::Read {
                        offset: position(*offset),
                        segments,
                    },
                )
            }
            Operation::Write { file, offset, buf } => {
                let segments = buf.segments().to_vec();
                (
                    file,
                    Call::Write {
                        offset: position(*offset),
                        segments,
                    },
                )
            }
            Operation::Sync { file } => (file, Call::Sync),
            Operation::Allocate {
                file,
                mode,
                offset,
                length,
            } => {
                let (offset, length) = (position(*offset), position(*length));
                (
                    file,
                    Call::Allocate {
                        mode: *mode,
                        offset,
                        length,
                    },
                )
            }
            Operation::Readable { file } => {
                let file = file.clone();
                return self.watch(slots, operation, waker, file, Then::Tell);
            }
            Operation::EventRead { file, buf } => {
                let (file, then) = (file.clone(), Then::Count(buf.clone()));
                return self.watch(slots, operation, waker, file, then);
            }
            Operation::Receive { file, buf } => {
                let (file, then) = (file.clone(), Then::Receive(buf.clone()));
                return self.watch(slots, operation, waker, file, then);
            }
            Operation::Send { file, buf } => {
                let (file, then) = (file.clone(), Then::Send(buf.clone()));
                return self.watch(slots, operation, waker, file, then);
            }
        };
        let fd = file.as_raw_fd();
        let slot = slots.insert(waker, operation.into_held(), None, bounded);
        self.pool.push(Job { slot, fd, call });
        slot
    }

    fn watch(
        &mut self,
        slots: &mut Slots,
        operation: Operation,
        waker: Waker,
        file: Rc<OwnedFd>,
        then: Then,
    ) -> SlotId {
        let slot = slots.insert(waker, operation.into_held(), None, false);
        self.watched.push(Watched { slot, file, then });
        slot
    }

    /// Ends the watch of a descriptor that nobody waits for.
    pub(crate) fn cancel(&mut self, slots: &mut Slots, id: SlotId) {
        let index = self.watched.iter().position(|watched| watched.slot == id);
        if let Some(index) = index {
            self.watched.swap_remove(index);
            slots.complete(id, -libc::ECANCELED);
        }
    }

    pub(crate) fn turn(&mut self, shared: &Shared, slots: &mut Slots, block: bool) -> Vec<Waker> {
        let mut woken = self.completed(slots);
        self.poll_descriptors(shared, slots, block && woken.is_empty(), &mut woken);
        woken.extend(self.completed(slots));
        woken
    }

    fn completed(&self, slots: &mut Slots) -> Vec<Waker> {
        let done = std::mem::take(&mut *lock(&self.pool.done));
        done.into_iter()
            .filter_map(|(slot, result)| slots.complete(slot, result))
            .collect()
    }

    fn poll_descriptors(
        &mut self,
        shared: &Shared,
        slots: &mut Slots,
        block: bool,
        woken: &mut Vec<Waker>,
    ) {
        let ready: Vec<bool> = {
            let watched = self.watched.iter();
            let watched = watched.map(|w| (w.file.as_fd(), w.then.awaited()));
            let mut fds: Vec<PollFd<'_>> = std::iter::once((shared.wake_fd.as_fd(), PollFlags::IN))
                .chain(watched)
                .map(|(fd, flags): (BorrowedFd<'_>, _)| PollFd::from_borrowed_fd(fd, flags))
                .collect();
            let zero = Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            // An interrupted poll leaves no descriptor ready; the caller comes again.
            let _ = poll(&mut fds, if block { None } else { Some(&zero) });
            fds.iter().map(|fd| !fd.revents().is_empty()).collect()
        };
        if ready[0] {
            let mut count = [0; 8];
            // Only resets the counter; what woke us is in the inbox or in `done`.
            let _ = rustix::io::read(&shared.wake_fd, &mut count);
        }
        for index in (0..self.watched.len()).rev().filter(|i| ready[i + 1]) {
            let watched = self.watched.swap_remove(index);
            let result = watched.then.perform(&watched.file);
            woken.extend(slots.complete(watched.slot, result));
        }
    }

    /// Waits until no thread touches a buffer any more.
    pub(crate) fn drain(&mut self, slots: &mut Slots) {
        while slots.bounded_in_flight() > 0 {
            self.completed(slots);
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
        lock(&self.pool.queue).closed = true;
        self.pool.work.notify_all();
    }
}

fn position(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

impl Pool {
    fn push(self: &Arc<Self>, job: Job) {
        let mut queue = lock(&self.queue);
        queue.jobs.push_back(job);
        if queue.idle >= queue.jobs.len() || queue.workers == MAX_WORKERS {
            self.work.notify_one();
            return;
        }
        let pool = self.clone();
        let spawned = std::thread::Builder::new()
            .name("block-io".to_owned())
            .spawn(move || pool.work());
        match spawned {
            Ok(_) => queue.workers += 1,
            Err(_) if queue.workers > 0 => self.work.notify_one(),
            Err(_) => {
                // No thread at all can be had: do it here.
                let Some(job) = queue.jobs.pop_back() else {
                    return;
                };
                drop(queue);
                self.finish(&job);
            }
        }
    }

    fn work(&self) {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                drop(queue);
                self.finish(&job);
                queue = lock(&self.queue);
            } else if queue.closed {
                return;
            } else {
                queue.idle += 1;
                queue = self
                    .work
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner);
                queue.idle -= 1;
            }
        }
    }

    fn finish(&self, job: &Job) {
        let result = perform(job);
        lock(&self.done).push((job.slot, result));
        self.executor.notify();
    }
}

fn perform(job: &Job) -> i32 {
    let count = |segments: &[Segment]| {
        i32::try_from(segments.len().min(super::uring_engine::MAX_SEGMENTS)).unwrap_or(0)
    };
    let result: i64 = match &job.call {
        // SAFETY: the segments lie in a buffer that the slot table holds until the completion of
        // this job is taken in; `Segment` has the layout of `struct iovec`.
        Call::Read { offset, segments } => unsafe {
            let iovecs = segments.as_ptr().cast::<libc::iovec>();
            libc::preadv(job.fd, iovecs, count(segments), *offset) as i64
        },
        // SAFETY: as above.
        Call::Write { offset, segments } => unsafe {
            let iovecs = segments.as_ptr().cast::<libc::iovec>();
            libc::pwritev(job.fd, iovecs, count(segments), *offset) as i64
        },
        // SAFETY: no memory is involved; the slot table holds the descriptor.
        Call::Sync => unsafe { i64::from(libc::fdatasync(job.fd)) },
        Call::Allocate {
            mode,
            offset,
            length,
        } => {
            // SAFETY: as above.
            i64::from(unsafe { libc::fallocate(job.fd, *mode, *offset, *length) })
        }
    };
    if result < 0 {
        return -std::io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(libc::EIO);
    }
    i32::try_from(result).unwrap_or(i32::MAX)
}
