//! The split format (section 2.7).

use std::sync::atomic::{Ordering, fence};

use guest_memory::MemoryView;

use super::descriptor::{ChainBuilder, Descriptor};
use super::ring_memory::RingArea;
use super::{Popped, QueueConfig, QueueError, RingFeatures};
use crate::spec::descriptor::{INDIRECT, NEXT, SIZE};
use crate::spec::{AVAIL_NO_INTERRUPT, USED_NO_NOTIFY};

/// Bytes of `flags` and `idx` before the entries of either ring.
const RING_HEADER: usize = 4;
const USED_ENTRY: usize = 8;

#[derive(Debug)]
pub(super) struct SplitRing {
    // Configuration.
    size: u16,
    features: RingFeatures,
    table: RingArea,
    available: RingArea,
    used: RingArea,
    // Volatile guest state.
    /// The next entry of the available ring to be taken.
    next_available: u16,
    /// The next entry of the used ring to be filled.
    next_used: u16,
    /// `next_used` as the driver sees it.
    published: u16,
    /// `next_used` when the driver was last asked whether it wants a signal.
    asked: u16,
    in_flight: u16,
}

impl SplitRing {
    pub(super) fn new(
        view: &mut MemoryView,
        config: &QueueConfig,
        features: RingFeatures,
    ) -> Result<Self, QueueError> {
        let size = config.size;
        if size == 0 || !size.is_power_of_two() {
            return Err(QueueError::Size(size));
        }
        let n = usize::from(size);
        for (part, addr, align) in [
            ("descriptor table", config.descriptors, 16),
            ("available ring", config.driver, 2),
            ("used ring", config.device, 4),
        ] {
            if addr % align != 0 {
                return Err(QueueError::Misaligned { part, addr });
            }
        }
        // With event suppression each ring has two more bytes. A driver that does not negotiate it may leave them out.
        let event = if features.event_idx { 2 } else { 0 };
        Ok(Self {
            size,
            features,
            table: RingArea::new(
                view,
                "descriptor table",
                config.descriptors,
                n * SIZE,
                false,
            )?,
            available: RingArea::new(
                view,
                "available ring",
                config.driver,
                RING_HEADER + 2 * n + event,
                false,
            )?,
            used: RingArea::new(
                view,
                "used ring",
                config.device,
                RING_HEADER + USED_ENTRY * n + event,
                true,
            )?,
            next_available: config.next_available,
            next_used: config.next_used,
            published: config.next_used,
            asked: config.next_used,
            in_flight: 0,
        })
    }

    pub(super) fn map(&mut self, view: &mut MemoryView) -> Result<(), QueueError> {
        self.table.map(view)?;
        self.available.map(view)?;
        self.used.map(view)
    }

    pub(super) fn position(&self) -> (u16, u16) {
        (self.next_available, self.next_used)
    }

    /// How many entries wait.
    pub(super) fn waiting(&self, view: &MemoryView) -> Result<u16, QueueError> {
        let index = self.available.load_u16(view, 2)?;
        let waiting = index.wrapping_sub(self.next_available);
        if waiting > self.size {
            return Err(QueueError::AvailableIndex {
                index,
                next: self.next_available,
                size: self.size,
            });
        }
        Ok(waiting)
    }

    pub(super) fn pop(&mut self, view: &mut MemoryView) -> Result<Option<Popped>, QueueError> {
        if self.waiting(view)? == 0 {
            return Ok(None);
        }
        if self.in_flight >= self.size {
            return Err(QueueError::TooManyInFlight(self.size));
        }
        let slot = usize::from(self.next_available & (self.size - 1));
        let head = self.available.load_u16(view, RING_HEADER + 2 * slot)?;
        let popped = self.walk(view, head)?;
        self.next_available = self.next_available.wrapping_add(1);
        self.in_flight += 1;
        Ok(Some(popped))
    }

    fn walk(&self, view: &mut MemoryView, head: u16) -> Result<Popped, QueueError> {
        let mut chain = ChainBuilder::new(view, self.features.indirect);
        let mut index = head;
        for _ in 0..self.size {
            if index >= self.size {
                return Err(QueueError::DescriptorIndex {
                    index,
                    size: u32::from(self.size),
                });
            }
            let mut bytes = [0; SIZE];
            self.table
                .read(chain.view(), usize::from(index) * SIZE, &mut bytes)?;
            let d = Descriptor::decode(&bytes);
            let last = if d.third & INDIRECT != 0 {
                chain.add_split_table(d)?;
                true
            } else {
                chain.add(d.addr, d.len, d.third)?;
                d.third & NEXT == 0
            };
            if last {
                return Ok(Popped {
                    id: head,
                    descriptors: 1,
                    readable: chain.readable,
                    writable: chain.writable,
                });
            }
            index = d.fourth;
        }
        Err(QueueError::ChainTooLong(u32::from(self.size)))
    }

    /// Undoes the last `pop`.
    pub(super) fn unpop(&mut self) {
        self.next_available = self.next_available.wrapping_sub(1);
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    pub(super) fn push(&mut self, view: &MemoryView, id: u16, len: u32) -> Result<(), QueueError> {
        let slot = usize::from(self.next_used & (self.size - 1));
        let at = RING_HEADER + USED_ENTRY * slot;
        self.used.store_u32(view, at, u32::from(id))?;
        self.used.store_u32(view, at + 4, len)?;
        self.next_used = self.next_used.wrapping_add(1);
        self.in_flight = self.in_flight.saturating_sub(1);
        Ok(())
    }

    /// Shows the driver what has been pushed. Returns whether it wants to be signalled.
    pub(super) fn publish(&mut self, view: &MemoryView) -> Result<bool, QueueError> {
        if self.published == self.next_used {
            return Ok(false);
        }
        self.published = self.next_used;
        self.used.store_u16(view, 2, self.next_used)?;
        // The driver writes its wish and then looks at the index; we write the index and then look at its wish.
        fence(Ordering::SeqCst);
        let (old, new) = (self.asked, self.next_used);
        self.asked = new;
        if self.features.event_idx {
            let event = self
                .available
                .load_u16(view, RING_HEADER + 2 * usize::from(self.size))?;
            // Section 2.7.10: signal if the entry at `event` is among those used since the last time.
            return Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old));
        }
        Ok(self.available.load_u16(view, 0)? & AVAIL_NO_INTERRUPT == 0)
    }

    pub(super) fn disable_doorbell(&mut self, view: &MemoryView) -> Result<(), QueueError> {
        if self.features.event_idx {
            // The event index stays behind, which is as good as disabled.
            return Ok(());
        }
        self.used.store_u16(view, 0, USED_NO_NOTIFY)
    }

    /// Asks for a doorbell at the next entry.
    pub(super) fn enable_doorbell(&mut self, view: &MemoryView) -> Result<(), QueueError> {
        if self.features.event_idx {
            let at = RING_HEADER + USED_ENTRY * usize::from(self.size);
            self.used.store_u16(view, at, self.next_available)?;
        } else {
            self.used.store_u16(view, 0, 0)?;
        }
        fence(Ordering::SeqCst);
        Ok(())
    }
}
