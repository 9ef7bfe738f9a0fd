//! Virtqueues: the device's side of both ring formats (sections 2.6 to 2.8).
//!
//! A [`Queue`] belongs to one thread. It takes [`Chain`]s with [`pop`](Queue::pop), whose buffers are guest memory, not copies;
//! gives them back with [`push`](Queue::push); and shows a batch of them to the driver, with at most one signal, with
//! [`commit`](Queue::commit).
//!
//! The rings are the guest's, and hostile: whatever lies in them, a queue only ever touches guest memory, does a bounded
//! amount of work, and latches the first [`QueueError`]. From then on it looks empty, and the device asks for its reset.

mod buffers;
mod descriptor;
#[cfg(test)]
pub(crate) mod driver;
mod error;
mod packed;
#[cfg(test)]
mod properties;
mod ring_memory;
mod split;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use guest_memory::{GuestMemory, MemoryView};

pub use buffers::Buffers;
pub use error::QueueError;

use crate::spec::feature;
use packed::PackedRing;
use split::SplitRing;

/// Where a queue's signals go. Implemented by the transport.
pub trait QueueEvents: Send + Sync {
    /// The driver wants to know that buffers of queue `index` have been used.
    fn used(&self, index: u16);
    /// Queue `index` can't go on.
    fn failed(&self, index: u16, error: &QueueError);
}

/// How a queue is set up by the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueConfig {
    /// Its number in the device.
    pub index: u16,
    /// Entries.
    pub size: u16,
    /// Guest-physical address of the descriptor table, or of the packed ring.
    pub descriptors: u64,
    /// Guest-physical address of the driver area: available ring, or driver event suppression.
    pub driver: u64,
    /// Guest-physical address of the device area: used ring, or device event suppression.
    pub device: u64,
    /// Next entry to be taken: [`fresh`](Self::fresh), or from [`Queue::position`].
    pub next_available: u16,
    /// Next entry to be used.
    pub next_used: u16,
}

impl QueueConfig {
    /// The position in which a queue starts.
    pub fn fresh(features: u64) -> u16 {
        if features & feature::RING_PACKED != 0 {
            1 << 15
        } else {
            0
        }
    }
}

/// What of the negotiated features concerns rings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RingFeatures {
    event_idx: bool,
    indirect: bool,
}

/// What a ring's `pop` yields.
struct Popped {
    id: u16,
    descriptors: u16,
    readable: Buffers,
    writable: Buffers,
}

/// Names a chain to [`Queue::push`]. Good for the queue that it came from, until that is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token {
    id: u16,
    descriptors: u16,
    queue: u32,
}

/// A request of the driver's.
#[derive(Debug, Clone)]
pub struct Chain {
    /// For giving it back.
    pub token: Token,
    /// What the device reads.
    pub readable: Buffers,
    /// What the device writes.
    pub writable: Buffers,
}

#[derive(Debug)]
enum Ring {
    Split(SplitRing),
    Packed(PackedRing),
}

/// The device's side of a virtqueue.
pub struct Queue {
    // Configuration.
    config: QueueConfig,
    /// Tells this queue's tokens from those of earlier ones.
    serial: u32,
    events: Arc<dyn QueueEvents>,
    // Runtime.
    view: MemoryView,
    // Volatile guest state.
    ring: Option<Ring>,
    error: Option<QueueError>,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue")
            .field("config", &self.config)
            .field("error", &self.error)
            .finish_non_exhaustive()
    }
}

static SERIAL: AtomicU32 = AtomicU32::new(0);

impl Queue {
    /// Takes over a queue that the driver has set up. One that can't be is a queue with its error latched.
    pub fn new(
        memory: &GuestMemory,
        config: QueueConfig,
        features: u64,
        events: Arc<dyn QueueEvents>,
    ) -> Self {
        let mut view = MemoryView::new(memory);
        let ring_features = RingFeatures {
            event_idx: features & feature::EVENT_IDX != 0,
            indirect: features & feature::INDIRECT_DESC != 0,
        };
        let ring = if features & feature::RING_PACKED != 0 {
            PackedRing::new(&mut view, &config, ring_features).map(Ring::Packed)
        } else {
            SplitRing::new(&mut view, &config, ring_features).map(Ring::Split)
        };
        let mut queue = Self {
            config,
            serial: SERIAL.fetch_add(1, Ordering::Relaxed),
            events,
            view,
            ring: None,
            error: None,
        };
        match ring {
            Ok(ring) => queue.ring = Some(ring),
            Err(error) => queue.fail(error),
        }
        queue
    }

    /// Its number in the device.
    pub fn index(&self) -> u16 {
        self.config.index
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.config.size
    }

    /// What has gone wrong.
    pub fn error(&self) -> Option<&QueueError> {
        self.error.as_ref()
    }

    /// Latches an error, the device's own verdict on a request included: the queue is empty from now on.
    pub fn fail(&mut self, error: QueueError) {
        if self.error.is_none() {
            self.events.failed(self.config.index, &error);
            self.error = Some(error);
        }
    }

    /// Next entry to be taken and next entry to be used, as [`QueueConfig`] has them.
    pub fn position(&self) -> (u16, u16) {
        match &self.ring {
            Some(Ring::Split(ring)) => ring.position(),
            Some(Ring::Packed(ring)) => ring.position(),
            None => (self.config.next_available, self.config.next_used),
        }
    }

    /// Follows the memory map, then runs `f`; an error is latched.
    fn with<T: Default>(
        &mut self,
        f: impl FnOnce(&mut Ring, &mut MemoryView) -> Result<T, QueueError>,
    ) -> T {
        if self.error.is_some() {
            return T::default();
        }
        let Some(ring) = &mut self.ring else {
            return T::default();
        };
        let mapped = if self.view.refresh() {
            match ring {
                Ring::Split(ring) => ring.map(&mut self.view),
                Ring::Packed(ring) => ring.map(&mut self.view),
            }
        } else {
            Ok(())
        };
        match mapped.and_then(|()| f(ring, &mut self.view)) {
            Ok(value) => value,
            Err(error) => {
                self.fail(error);
                T::default()
            }
        }
    }

    /// True if a chain waits.
    pub fn has_next(&mut self) -> bool {
        self.with(|ring, view| match ring {
            Ring::Split(ring) => ring.waiting(view).map(|n| n != 0),
            Ring::Packed(ring) => ring.waiting(view),
        })
    }

    /// Takes the next chain; `None` when there is none, or the queue has failed.
    pub fn pop(&mut self) -> Option<Chain> {
        let serial = self.serial;
        self.with(|ring, view| match ring {
            Ring::Split(ring) => ring.pop(view),
            Ring::Packed(ring) => ring.pop(view),
        })
        .map(|popped| Chain {
            token: Token {
                id: popped.id,
                descriptors: popped.descriptors,
                queue: serial,
            },
            readable: popped.readable,
            writable: popped.writable,
        })
    }

    /// Puts back the chain that the last [`pop`](Self::pop) took.
    pub fn unpop(&mut self, chain: Chain) {
        debug_assert_eq!(chain.token.queue, self.serial);
        match &mut self.ring {
            Some(Ring::Split(ring)) => ring.unpop(),
            Some(Ring::Packed(ring)) => ring.unpop(),
            None => {}
        }
    }

    /// Gives a chain back to the driver, `written` bytes of whose writable part have been written, from its start. The driver
    /// sees it with the next [`commit`](Self::commit).
    pub fn push(&mut self, token: Token, written: u32) {
        if token.queue != self.serial {
            return;
        }
        self.with(|ring, view| match ring {
            Ring::Split(ring) => ring.push(view, token.id, written),
            Ring::Packed(ring) => ring.push(view, token.id, token.descriptors, written),
        });
    }

    /// Shows the driver what has been pushed, and signals if it wants that.
    pub fn commit(&mut self) {
        let signal = self.with(|ring, view| match ring {
            Ring::Split(ring) => ring.publish(view),
            Ring::Packed(ring) => ring.publish(view),
        });
        if signal {
            self.events.used(self.config.index);
        }
    }

    /// Says that the driver need not ring the doorbell, as while the queue is being emptied anyway.
    pub fn disable_doorbell(&mut self) {
        self.with(|ring, view| match ring {
            Ring::Split(ring) => ring.disable_doorbell(view),
            Ring::Packed(ring) => ring.disable_doorbell(view),
        });
    }

    /// Asks the driver to ring the doorbell for the next chain. Returns true if one has come meanwhile: its doorbell may
    /// not have rung.
    pub fn enable_doorbell(&mut self) -> bool {
        self.with(|ring, view| match ring {
            Ring::Split(ring) => ring.enable_doorbell(view),
            Ring::Packed(ring) => ring.enable_doorbell(view),
        });
        self.has_next()
    }
}
