//! The table of operations in flight.

use std::task::Waker;

use super::operation::Held;
use crate::buffer::Segment;

/// The place of an operation in the table.
pub(crate) type SlotId = u32;

enum State {
    Free,
    Pending(Waker),
    /// The future was dropped; the kernel still works on it.
    Abandoned,
    Done(i32),
}

struct Slot {
    state: State,
    held: Option<Held>,
    /// The iovec array of a vectored transfer; the kernel reads it at submission.
    segments: Option<Box<[Segment]>>,
    bounded: bool,
}

/// The table of operations in flight.
#[derive(Default)]
pub(crate) struct Slots {
    slots: Vec<Slot>,
    free: Vec<SlotId>,
    /// How many operations the kernel has that end by themselves.
    bounded: usize,
}

impl Slots {
    pub(crate) fn insert(
        &mut self,
        waker: Waker,
        held: Held,
        segments: Option<Box<[Segment]>>,
        bounded: bool,
    ) -> SlotId {
        self.bounded += usize::from(bounded);
        let slot = Slot {
            state: State::Pending(waker),
            held: Some(held),
            segments,
            bounded,
        };
        if let Some(id) = self.free.pop() {
            self.slots[id as usize] = slot;
            id
        } else {
            self.slots.push(slot);
            u32::try_from(self.slots.len() - 1).expect("fewer than 2^32 operations in flight")
        }
    }

    /// Records the kernel's answer; returns who waits for it.
    pub(crate) fn complete(&mut self, id: SlotId, result: i32) -> Option<Waker> {
        let slot = &mut self.slots[id as usize];
        slot.held = None;
        slot.segments = None;
        self.bounded -= usize::from(slot.bounded);
        match std::mem::replace(&mut slot.state, State::Done(result)) {
            State::Pending(waker) => Some(waker),
            State::Abandoned => {
                slot.state = State::Free;
                self.free.push(id);
                None
            }
            State::Free | State::Done(_) => unreachable!("an operation completed twice"),
        }
    }

    /// The result if it is there (and frees the slot), else remembers `waker`.
    pub(crate) fn take(&mut self, id: SlotId, waker: &Waker) -> Option<i32> {
        let slot = &mut self.slots[id as usize];
        match &mut slot.state {
            State::Done(result) => {
                let result = *result;
                slot.state = State::Free;
                self.free.push(id);
                Some(result)
            }
            State::Pending(former) => {
                former.clone_from(waker);
                None
            }
            State::Free | State::Abandoned => unreachable!("a freed operation was polled"),
        }
    }

    /// The future is gone. Returns its waker, to be dropped outside of any borrow.
    pub(crate) fn abandon(&mut self, id: SlotId) -> Option<Waker> {
        let slot = &mut self.slots[id as usize];
        match std::mem::replace(&mut slot.state, State::Abandoned) {
            State::Pending(waker) => Some(waker),
            State::Done(_) => {
                slot.state = State::Free;
                self.free.push(id);
                None
            }
            State::Free | State::Abandoned => unreachable!("an operation was dropped twice"),
        }
    }

    /// Whether nobody waits for an operation that may never end by itself.
    pub(crate) fn needs_cancel(&self, id: SlotId) -> bool {
        let slot = &self.slots[id as usize];
        matches!(slot.state, State::Abandoned) && !slot.bounded
    }

    /// How many operations the kernel has.
    pub(crate) fn in_flight(&self) -> usize {
        let under_way = |slot: &&Slot| matches!(slot.state, State::Pending(_) | State::Abandoned);
        self.slots.iter().filter(under_way).count()
    }

    /// How many operations are under way that end by themselves.
    pub(crate) fn bounded_in_flight(&self) -> usize {
        self.bounded
    }

    /// Gives up the memory of operations that may never end: the kernel may still write to it.
    pub(crate) fn leak_unbounded(&mut self) {
        for slot in &mut self.slots {
            if matches!(slot.state, State::Pending(_) | State::Abandoned) {
                std::mem::forget(slot.held.take());
                std::mem::forget(slot.segments.take());
            }
        }
    }
}
