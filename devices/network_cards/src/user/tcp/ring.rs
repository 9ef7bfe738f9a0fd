//! A byte queue that grows up to a limit, out of a budget shared by all connections.

use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The least that a queue holds once it holds anything, in bytes.
const SMALLEST: usize = 16 << 10;

/// Bytes that all queues of a stack may still take together.
#[derive(Debug, Clone)]
pub(crate) struct Budget(Arc<AtomicUsize>);

impl Budget {
    pub(crate) fn new(bytes: usize) -> Self {
        Self(Arc::new(AtomicUsize::new(bytes)))
    }

    fn take(&self, bytes: usize) -> bool {
        let take = |left: usize| left.checked_sub(bytes);
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
            .is_ok()
    }

    fn give_back(&self, bytes: usize) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// A byte queue.
pub(crate) struct Ring {
    /// A power of two long, or empty.
    bytes: Box<[u8]>,
    head: usize,
    len: usize,
    budget: Budget,
}

impl Ring {
    /// An empty queue without memory.
    pub(crate) fn new(budget: Budget) -> Self {
        Self {
            bytes: Box::default(),
            head: 0,
            len: 0,
            budget,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Makes room for `more` bytes if `limit` and the budget allow, and answers how much room there is.
    pub(crate) fn make_room(&mut self, more: usize, limit: usize) -> usize {
        let want = (self.len + more).min(limit);
        if want > self.bytes.len() {
            let size = want.next_power_of_two().max(SMALLEST);
            if self.budget.take(size - self.bytes.len()) {
                self.move_to(size);
            }
        }
        limit.min(self.bytes.len()).saturating_sub(self.len)
    }

    fn move_to(&mut self, size: usize) {
        let mut bytes = vec![0; size].into_boxed_slice();
        let [a, b] = self.range(0, self.len);
        bytes[..a.len()].copy_from_slice(a);
        bytes[a.len()..a.len() + b.len()].copy_from_slice(b);
        (self.bytes, self.head) = (bytes, 0);
    }

    /// True if it holds memory and nothing in it.
    pub(crate) fn is_spare(&self) -> bool {
        self.len == 0 && !self.bytes.is_empty()
    }

    /// Gives the memory back if the queue is empty.
    pub(crate) fn trim(&mut self) {
        if self.len == 0 {
            self.budget.give_back(self.bytes.len());
            (self.bytes, self.head) = (Box::default(), 0);
        }
    }

    /// The `len` bytes from the `from`th on, in two pieces. They must be there.
    pub(crate) fn range(&self, from: usize, len: usize) -> [&[u8]; 2] {
        let size = self.bytes.len();
        if len == 0 || from + len > self.len {
            return [&[], &[]];
        }
        let start = (self.head + from) & (size - 1);
        let first = len.min(size - start);
        [
            &self.bytes[start..start + first],
            &self.bytes[..len - first],
        ]
    }

    /// All bytes, for a vectored write.
    pub(crate) fn as_io_slices(&self) -> [IoSlice<'_>; 2] {
        self.range(0, self.len).map(IoSlice::new)
    }

    /// Free space of at most `limit` bytes, for a vectored read; [`commit`](Self::commit) says how much was used.
    pub(crate) fn spare(&mut self, limit: usize) -> [IoSliceMut<'_>; 2] {
        let size = self.bytes.len();
        let free = limit.min(size - self.len);
        if free == 0 {
            return [IoSliceMut::new(&mut []), IoSliceMut::new(&mut [])];
        }
        let start = (self.head + self.len) & (size - 1);
        let first = free.min(size - start);
        let (front, back) = self.bytes.split_at_mut(start);
        [
            IoSliceMut::new(&mut back[..first]),
            IoSliceMut::new(&mut front[..free - first]),
        ]
    }

    /// Adds `n` bytes that were written to the spare space.
    pub(crate) fn commit(&mut self, n: usize) {
        self.len = (self.len + n).min(self.bytes.len());
    }

    /// Adds as much of `bytes` as there is room for.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> usize {
        let mut done = 0;
        for mut part in self.spare(bytes.len()) {
            let n = part.len();
            part.copy_from_slice(&bytes[done..done + n]);
            done += n;
        }
        self.commit(done);
        done
    }

    /// Takes the first `n` bytes away.
    pub(crate) fn consume(&mut self, n: usize) {
        let n = n.min(self.len);
        self.len -= n;
        self.head = if self.len == 0 {
            0
        } else {
            (self.head + n) & (self.bytes.len() - 1)
        };
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ring({} of {})", self.len, self.bytes.len())
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.budget.give_back(self.bytes.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    proptest! {
        #[test]
        fn it_behaves_like_a_queue(steps in prop::collection::vec((any::<bool>(), 0usize..20_000), 1..40)) {
            let budget = Budget::new(1 << 20);
            let mut ring = Ring::new(budget.clone());
            let mut model = VecDeque::new();
            let mut next = 0u8;
            for (push, n) in steps {
                if push {
                    let bytes: Vec<u8> = (0..n).map(|_| { next = next.wrapping_add(7); next }).collect();
                    let room = ring.make_room(n, 50_000);
                    prop_assert_eq!(room.min(n), n.min(50_000 - model.len()));
                    let took = ring.push(&bytes[..n.min(room)]);
                    prop_assert_eq!(took, n.min(room));
                    model.extend(&bytes[..took]);
                } else {
                    ring.consume(n);
                    model.drain(..n.min(model.len()));
                }
                let all: Vec<u8> = ring.range(0, ring.len()).concat();
                prop_assert!(all.iter().eq(model.iter()));
            }
            drop(ring);
            prop_assert_eq!(budget.0.load(Ordering::Relaxed), 1 << 20);
        }
    }

    #[test]
    fn without_budget_there_is_no_room() {
        let budget = Budget::new(20 << 10);
        let mut a = Ring::new(budget.clone());
        let mut b = Ring::new(budget);
        assert_eq!(a.make_room(100, 1 << 20), 16 << 10);
        assert_eq!(b.make_room(100, 1 << 20), 0);
        a.trim();
        assert_eq!(b.make_room(100, 1 << 20), 16 << 10);
    }
}
