//! The packed format (section 2.8).
//!
//! A position is a number modulo twice the ring's size: the lower lap has wrap counter 1, the upper lap 0.

use std::sync::atomic::{Ordering, fence};

use guest_memory::MemoryView;

use super::descriptor::{ChainBuilder, Descriptor};
use super::ring_memory::RingArea;
use super::{Popped, QueueConfig, QueueError, RingFeatures};
use crate::spec::descriptor::{AVAIL, INDIRECT, NEXT, SIZE, USED, WRITE};
use crate::spec::{MAX_QUEUE_SIZE, event};

/// Where in a descriptor the flags lie.
const FLAGS: usize = 14;
/// The wrap counter's bit in a position as memory and saved state have it.
const WRAP: u16 = 1 << 15;

#[derive(Debug)]
pub(super) struct PackedRing {
    // Configuration.
    size: u16,
    features: RingFeatures,
    ring: RingArea,
    driver_event: RingArea,
    device_event: RingArea,
    // Volatile guest state.
    next_available: u32,
    next_used: u32,
    /// `next_used` when the driver was last asked whether it wants a signal.
    asked: u32,
    /// The first used descriptor that the driver can't see yet, and the flags that will show it.
    unpublished: Option<(u32, u16)>,
    /// Descriptors taken and not yet used.
    in_flight: u16,
    /// Descriptors of the last `pop`.
    last_taken: u16,
}

impl PackedRing {
    pub(super) fn new(
        view: &mut MemoryView,
        config: &QueueConfig,
        features: RingFeatures,
    ) -> Result<Self, QueueError> {
        let size = config.size;
        if size == 0 || size > MAX_QUEUE_SIZE {
            return Err(QueueError::Size(size));
        }
        for (part, addr, align) in [
            ("descriptor ring", config.descriptors, 16),
            ("driver event area", config.driver, 4),
            ("device event area", config.device, 4),
        ] {
            if addr % align != 0 {
                return Err(QueueError::Misaligned { part, addr });
            }
        }
        let bytes = usize::from(size) * SIZE;
        let mut ring = Self {
            size,
            features,
            ring: RingArea::new(view, "descriptor ring", config.descriptors, bytes, true)?,
            driver_event: RingArea::new(view, "driver event area", config.driver, 4, false)?,
            device_event: RingArea::new(view, "device event area", config.device, 4, true)?,
            next_available: 0,
            next_used: 0,
            asked: 0,
            unpublished: None,
            in_flight: 0,
            last_taken: 0,
        };
        let position = |p| ring.decode(p).ok_or(QueueError::Size(size));
        (ring.next_available, ring.next_used) = (
            position(config.next_available)?,
            position(config.next_used)?,
        );
        ring.asked = ring.next_used;
        Ok(ring)
    }

    pub(super) fn map(&mut self, view: &mut MemoryView) -> Result<(), QueueError> {
        self.ring.map(view)?;
        self.driver_event.map(view)?;
        self.device_event.map(view)
    }

    /// A position from its form in memory: the descriptor in bits 0 to 14, the wrap counter in bit 15.
    fn decode(&self, position: u16) -> Option<u32> {
        let index = position & !WRAP;
        let lap = if position & WRAP != 0 { 0 } else { self.size };
        (index < self.size).then(|| u32::from(index) + u32::from(lap))
    }

    fn encode(&self, position: u32) -> u16 {
        let (index, wrap) = self.split(position);
        index | if wrap { WRAP } else { 0 }
    }

    /// A position's descriptor and wrap counter.
    fn split(&self, position: u32) -> (u16, bool) {
        let size = u32::from(self.size);
        if position < size {
            (position as u16, true)
        } else {
            ((position - size) as u16, false)
        }
    }

    fn advance(&self, position: u32, by: u16) -> u32 {
        (position + u32::from(by)) % (2 * u32::from(self.size))
    }

    /// How far `to` lies behind `from`.
    fn distance(&self, from: u32, to: u32) -> u32 {
        let laps = 2 * u32::from(self.size);
        (to + laps - from) % laps
    }

    pub(super) fn position(&self) -> (u16, u16) {
        (
            self.encode(self.next_available),
            self.encode(self.next_used),
        )
    }

    /// Whether an entry waits.
    pub(super) fn waiting(&self, view: &MemoryView) -> Result<bool, QueueError> {
        let (index, wrap) = self.split(self.next_available);
        let flags = self
            .ring
            .load_u16(view, usize::from(index) * SIZE + FLAGS)?;
        Ok((flags & AVAIL != 0) == wrap && (flags & USED != 0) != wrap)
    }

    pub(super) fn pop(&mut self, view: &mut MemoryView) -> Result<Option<Popped>, QueueError> {
        if !self.waiting(view)? {
            return Ok(None);
        }
        let popped = self.walk(view)?;
        if self.in_flight + popped.descriptors > self.size {
            return Err(QueueError::TooManyInFlight(self.size));
        }
        self.next_available = self.advance(self.next_available, popped.descriptors);
        self.last_taken = popped.descriptors;
        self.in_flight += popped.descriptors;
        Ok(Some(popped))
    }

    fn walk(&self, view: &mut MemoryView) -> Result<Popped, QueueError> {
        let mut chain = ChainBuilder::new(view, self.features.indirect);
        let mut position = self.next_available;
        for descriptors in 1..=self.size {
            let (index, _) = self.split(position);
            let mut bytes = [0; SIZE];
            self.ring
                .read(chain.view(), usize::from(index) * SIZE, &mut bytes)?;
            let d = Descriptor::decode(&bytes);
            let (id, flags) = (d.third, d.fourth);
            let last = if flags & INDIRECT != 0 {
                chain.add_packed_table(d)?;
                true
            } else {
                chain.add(d.addr, d.len, flags)?;
                flags & NEXT == 0
            };
            if last {
                return Ok(Popped {
                    id,
                    descriptors,
                    readable: chain.readable,
                    writable: chain.writable,
                });
            }
            position = self.advance(position, 1);
        }
        Err(QueueError::ChainTooLong(u32::from(self.size)))
    }

    /// Undoes the last `pop`.
    pub(super) fn unpop(&mut self) {
        let back = 2 * u32::from(self.size) - u32::from(self.last_taken);
        self.next_available = (self.next_available + back) % (2 * u32::from(self.size));
        self.in_flight = self.in_flight.saturating_sub(self.last_taken);
        self.last_taken = 0;
    }

    pub(super) fn push(
        &mut self,
        view: &MemoryView,
        id: u16,
        descriptors: u16,
        len: u32,
    ) -> Result<(), QueueError> {
        let (index, wrap) = self.split(self.next_used);
        let at = usize::from(index) * SIZE;
        self.ring.store_u32(view, at + 8, len)?;
        self.ring.store_u16(view, at + 12, id)?;
        let mut flags = if wrap { AVAIL | USED } else { 0 };
        if len != 0 {
            flags |= WRITE;
        }
        // The driver looks at them in order: those behind a hidden one are hidden as well.
        if self.unpublished.is_none() {
            self.unpublished = Some((self.next_used, flags));
        } else {
            self.ring.store_u16(view, at + FLAGS, flags)?;
        }
        self.next_used = self.advance(self.next_used, descriptors);
        self.in_flight = self.in_flight.saturating_sub(descriptors);
        Ok(())
    }

    /// Shows the driver what has been pushed. Returns whether it wants to be signalled.
    pub(super) fn publish(&mut self, view: &MemoryView) -> Result<bool, QueueError> {
        let Some((position, flags)) = self.unpublished.take() else {
            return Ok(false);
        };
        let (index, _) = self.split(position);
        self.ring
            .store_u16(view, usize::from(index) * SIZE + FLAGS, flags)?;
        // As in the split format: the used entries first, then the driver's wish.
        fence(Ordering::SeqCst);
        let (old, new) = (self.asked, self.next_used);
        self.asked = new;
        let wish = self.driver_event.load_u32(view, 0)?;
        let (position, flags) = (wish as u16, (wish >> 16) as u16 & 3);
        if flags == event::DESC && self.features.event_idx {
            // A position that can't be is taken for the wish to be signalled.
            return Ok(self
                .decode(position)
                .is_none_or(|p| self.distance(old, p) < self.used_since(old, new)));
        }
        Ok(flags != event::DISABLE)
    }

    /// Descriptors used between two positions, one of which at least is not equal to the other.
    fn used_since(&self, old: u32, new: u32) -> u32 {
        match self.distance(old, new) {
            0 => 2 * u32::from(self.size),
            n => n,
        }
    }

    pub(super) fn disable_doorbell(&mut self, view: &MemoryView) -> Result<(), QueueError> {
        self.device_event.store_u16(view, 2, event::DISABLE)
    }

    /// Asks for a doorbell at the next entry.
    pub(super) fn enable_doorbell(&mut self, view: &MemoryView) -> Result<(), QueueError> {
        if self.features.event_idx {
            self.device_event
                .store_u16(view, 0, self.encode(self.next_available))?;
            self.device_event.store_u16(view, 2, event::DESC)?;
        } else {
            self.device_event.store_u16(view, 2, event::ENABLE)?;
        }
        fence(Ordering::SeqCst);
        Ok(())
    }
}
