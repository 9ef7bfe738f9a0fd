//! What the vCPUs of a virtual machine share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use accel::{ParavirtualStatistics, TranslationStatistics};
use guest_clock::GuestClock;
use guest_memory::GuestMemory;
use parking_lot::{Condvar, Mutex, RwLock};

use crate::apic::{ApicBus, Mailbox};

/// The part of a vCPU that other threads see.
#[derive(Debug)]
pub(crate) struct VcpuShared {
    /// Its events and its interrupt requests.
    pub(crate) mailbox: Arc<Mailbox>,
    /// Its thread may be using translations.
    pub(crate) in_guest: AtomicBool,
    /// The generation of the memory map that its translations are of.
    pub(crate) map_seen: AtomicU64,
    /// Nanoseconds halted.
    pub(crate) halted: AtomicU64,
    /// What it has done, as of the last time that it said.
    pub(crate) published: Mutex<Published>,
    /// Signalled when it has said ([`crate::apic::Event::STATISTICS`]).
    pub(crate) said: Condvar,
}

/// Counters of a vCPU as other threads see them.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Published {
    /// How often it has said.
    pub(crate) times: u64,
    /// Instructions executed.
    pub(crate) instructions: u64,
    /// Of its own thread.
    pub(crate) counters: Counters,
    /// Of translation.
    pub(crate) translation: Option<TranslationStatistics>,
}

/// Counters that a vCPU's thread keeps, apart from those of instructions and translation.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counters {
    /// Calls of `CpuIo`.
    pub(crate) io_calls: u64,
    /// Nanoseconds in them.
    pub(crate) io_time: u64,
    /// Walks of page tables.
    pub(crate) page_walks: u64,
    /// Of the paravirtual interface.
    pub(crate) paravirtual: ParavirtualStatistics,
}

impl VcpuShared {
    /// The shared part of the vCPU with this APIC ID.
    pub(crate) fn new(apic_id: u32) -> Self {
        Self {
            mailbox: Arc::new(Mailbox::new(apic_id)),
            in_guest: AtomicBool::new(false),
            map_seen: AtomicU64::new(0),
            halted: AtomicU64::new(0),
            published: Mutex::default(),
            said: Condvar::new(),
        }
    }
}

/// A virtual machine's processor side.
pub(crate) struct Machine {
    /// Guest memory.
    pub(crate) memory: GuestMemory,
    /// Guest time.
    pub(crate) clock: GuestClock,
    /// The mailboxes of all vCPUs.
    pub(crate) apics: Arc<ApicBus>,
    /// All vCPUs, in the order in which they were made.
    pub(crate) vcpus: RwLock<Vec<Arc<VcpuShared>>>,
    /// Held during a locked access that the host can't make atomic: one that is misaligned.
    pub(crate) bus: Mutex<()>,
}

impl Machine {
    /// A machine without vCPUs.
    pub(crate) fn new(memory: GuestMemory, clock: GuestClock) -> Self {
        Self {
            memory,
            clock,
            apics: Arc::default(),
            vcpus: RwLock::default(),
            bus: Mutex::default(),
        }
    }
}
