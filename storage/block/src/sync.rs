//! Waiting for one another on one thread.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::task::{Poll, Waker};

/// Tasks that wait for something to happen.
#[derive(Default)]
pub struct WaitQueue {
    waiting: RefCell<VecDeque<Waker>>,
    epoch: Cell<u64>,
}

impl WaitQueue {
    /// Wakes every task that waits now.
    pub fn wake_all(&self) {
        self.epoch.set(self.epoch.get().wrapping_add(1));
        let waiting = std::mem::take(&mut *self.waiting.borrow_mut());
        for waker in waiting {
            waker.wake();
        }
    }

    /// Waits for the next [`Self::wake_all`]. The caller checks its condition again afterwards.
    pub async fn wait(&self) {
        let epoch = self.epoch.get();
        poll_fn(|cx| {
            if self.epoch.get() != epoch {
                return Poll::Ready(());
            }
            self.waiting.borrow_mut().push_back(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

/// Locks on ranges of bytes: shared ones among each other are free, an exclusive one overlaps nothing.
#[derive(Default)]
pub struct RangeLocks {
    held: RefCell<Vec<Held>>,
    next: Cell<u64>,
    released: WaitQueue,
}

struct Held {
    start: u64,
    end: u64,
    exclusive: bool,
    number: u64,
}

/// A lock on a range, until it is dropped.
pub struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    number: u64,
}

impl RangeLocks {
    /// Waits until nothing overlapping is held, and holds the range alone.
    pub async fn lock(&self, start: u64, length: u64) -> RangeGuard<'_> {
        self.acquire(start, length, true).await
    }

    /// Waits until nothing exclusive overlaps, and holds the range with others.
    pub async fn share(&self, start: u64, length: u64) -> RangeGuard<'_> {
        self.acquire(start, length, false).await
    }

    async fn acquire(&self, start: u64, length: u64, exclusive: bool) -> RangeGuard<'_> {
        let end = start.saturating_add(length);
        loop {
            let blocked =
                self.held.borrow().iter().any(|held| {
                    held.start < end && start < held.end && (exclusive || held.exclusive)
                });
            if !blocked {
                break;
            }
            self.released.wait().await;
        }
        let number = self.next.get();
        self.next.set(number.wrapping_add(1));
        self.held.borrow_mut().push(Held {
            start,
            end,
            exclusive,
            number,
        });
        RangeGuard {
            locks: self,
            number,
        }
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.locks
            .held
            .borrow_mut()
            .retain(|held| held.number != self.number);
        self.locks.released.wake_all();
    }
}
