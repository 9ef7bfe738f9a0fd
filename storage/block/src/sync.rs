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
/// First come, first served, so nobody waits forever; a task must not ask for a second range while it
/// holds one.
#[derive(Default)]
pub struct RangeLocks {
    /// In the order of arrival.
    entries: RefCell<Vec<RangeEntry>>,
    next: Cell<u64>,
    waiting: Cell<usize>,
    released: WaitQueue,
}

struct RangeEntry {
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
        let number = self.next.get();
        self.next.set(number.wrapping_add(1));
        self.entries.borrow_mut().push(RangeEntry {
            start,
            end,
            exclusive,
            number,
        });
        let guard = RangeGuard {
            locks: self,
            number,
        };
        while self.is_blocked(start, end, exclusive, number) {
            self.waiting.set(self.waiting.get() + 1);
            self.released.wait().await;
        }
        guard
    }

    /// Whether an earlier entry is in the way of this one.
    fn is_blocked(&self, start: u64, end: u64, exclusive: bool, number: u64) -> bool {
        let entries = self.entries.borrow();
        entries
            .iter()
            .take_while(|entry| entry.number != number)
            .any(|entry| entry.start < end && start < entry.end && (exclusive || entry.exclusive))
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.locks
            .entries
            .borrow_mut()
            .retain(|entry| entry.number != self.number);
        if self.locks.waiting.replace(0) > 0 {
            self.locks.released.wake_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::{block_on, spawn_local, yield_now};
    use std::rc::Rc;

    #[test]
    fn exclusive_ranges_wait_and_later_shared_ones_queue_behind() {
        block_on(async {
            let locks = Rc::new(RangeLocks::default());
            let order = Rc::new(RefCell::new(Vec::new()));
            let first = locks.share(0, 10).await;
            let spawn = |name: &'static str, start, exclusive| {
                let (locks, order) = (locks.clone(), order.clone());
                spawn_local(async move {
                    let _held = locks.acquire(start, 10, exclusive).await;
                    order.borrow_mut().push(name);
                    yield_now().await;
                })
            };
            let tasks = [
                spawn("exclusive", 5, true),
                spawn("shared", 0, false),
                spawn("far", 100, true),
            ];
            yield_now().await;
            yield_now().await;
            assert_eq!(*order.borrow(), ["far"]);
            drop(first);
            for task in tasks {
                task.await;
            }
            assert_eq!(*order.borrow(), ["far", "exclusive", "shared"]);
        })
        .unwrap();
    }
}
