//! What other threads may touch of a vCPU: its interrupt requests, its events, and what decides whether a message is
//! for it.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bitflags::bitflags;
use parking_lot::{Condvar, Mutex};

bitflags! {
    /// Why a vCPU must look up from its guest's code.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct Event: u32 {
        /// [`accel::Exit::Kicked`] is asked for.
        const KICK = 1 << 0;
        /// A non-maskable interrupt.
        const NMI = 1 << 1;
        /// INIT.
        const INIT = 1 << 2;
        /// A startup IPI; the vector is in [`Mailbox::take_startup_vector`].
        const STARTUP = 1 << 3;
        /// An interrupt request register or the 8259's output has changed, or interrupts may be taken again.
        const INTERRUPT = 1 << 4;
        /// The local APIC's timer has expired.
        const TIMER = 1 << 5;
        /// Forget all address translations: the memory map has changed.
        const FLUSH_TLB = 1 << 6;
        /// Wake from HLT (paravirtual kick).
        const WAKE = 1 << 7;
        /// A single step, a breakpoint or another thing of the vCPU's own thread is due.
        const LOCAL = 1 << 8;
        /// Code has been written to.
        const CODE = 1 << 9;
        /// Say what has been done so far.
        const STATISTICS = 1 << 10;
    }
}

/// How a local APIC takes part in addressing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ApicMode {
    /// Globally disabled.
    Disabled,
    /// xAPIC: 8-bit IDs, flat or cluster logical addressing.
    Xapic,
    /// x2APIC: 32-bit IDs.
    X2apic,
}

/// The side of a vCPU that other threads see. All of it is lock-free but for waking a sleeping vCPU.
#[derive(Debug)]
pub struct Mailbox {
    apic_id: u32,
    events: AtomicU32,
    irr: [AtomicU32; 8],
    tmr: [AtomicU32; 8],
    startup_vector: AtomicU8,
    mode: AtomicU8,
    software_enabled: AtomicBool,
    logical: AtomicU32,
    flat: AtomicBool,
    priority: AtomicU8,
    extint: AtomicBool,
    asleep: AtomicBool,
    lock: Mutex<()>,
    wake: Condvar,
    interrupts: AtomicU64,
}

impl Mailbox {
    /// A mailbox for the vCPU with this APIC ID, its local APIC as after reset.
    pub fn new(apic_id: u32) -> Self {
        Self {
            apic_id,
            events: AtomicU32::new(0),
            irr: Default::default(),
            tmr: Default::default(),
            startup_vector: AtomicU8::new(0),
            mode: AtomicU8::new(ApicMode::Xapic as u8),
            software_enabled: AtomicBool::new(false),
            logical: AtomicU32::new(0),
            flat: AtomicBool::new(true),
            priority: AtomicU8::new(0),
            extint: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            lock: Mutex::new(()),
            wake: Condvar::new(),
            interrupts: AtomicU64::new(0),
        }
    }

    /// The APIC ID.
    pub fn apic_id(&self) -> u32 {
        self.apic_id
    }

    /// True when the vCPU must look at its events; cheap, for every block.
    #[inline(always)]
    pub fn has_events(&self) -> bool {
        self.events.load(Ordering::Relaxed) != 0
    }

    /// The word behind [`Self::has_events`], for generated code.
    pub fn events_word(&self) -> &AtomicU32 {
        &self.events
    }

    /// Takes all events.
    pub fn take_events(&self) -> Event {
        Event::from_bits_retain(self.events.swap(0, Ordering::SeqCst))
    }

    /// Raises events and wakes the vCPU if it sleeps.
    pub fn raise(&self, event: Event) {
        self.events.fetch_or(event.bits(), Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) {
            // Under the lock: the sleeper is then either waiting or has yet to look at its events.
            let _guard = self.lock.lock();
            self.wake.notify_one();
        }
    }

    /// Sleeps until there are events, or for `most`.
    pub fn sleep(&self, most: Option<Duration>) {
        let end = most.map(|d| Instant::now() + d);
        let mut guard = self.lock.lock();
        self.asleep.store(true, Ordering::SeqCst);
        while self.events.load(Ordering::SeqCst) == 0 {
            match end {
                None => self.wake.wait(&mut guard),
                Some(end) => {
                    if self.wake.wait_until(&mut guard, end).timed_out() {
                        break;
                    }
                }
            }
        }
        self.asleep.store(false, Ordering::SeqCst);
    }

    /// True while the vCPU's thread is in [`Self::sleep`].
    pub fn is_asleep(&self) -> bool {
        self.asleep.load(Ordering::SeqCst)
    }

    /// Requests an interrupt; returns false when the same one was requested already.
    pub fn request(&self, vector: u8, level: bool) -> bool {
        let (word, bit) = (usize::from(vector / 32), 1 << (vector % 32));
        if level {
            self.tmr[word].fetch_or(bit, Ordering::SeqCst);
        } else {
            self.tmr[word].fetch_and(!bit, Ordering::SeqCst);
        }
        let new = self.irr[word].fetch_or(bit, Ordering::SeqCst) & bit == 0;
        self.raise(Event::INTERRUPT);
        new
    }

    /// The highest requested vector.
    pub fn highest_request(&self) -> Option<u8> {
        (0..8usize).rev().find_map(|i| {
            let word = self.irr[i].load(Ordering::SeqCst);
            (word != 0).then(|| (i as u32 * 32 + 31 - word.leading_zeros()) as u8)
        })
    }

    /// Withdraws a request because it is taken into service.
    pub fn accept(&self, vector: u8) {
        self.irr[usize::from(vector / 32)].fetch_and(!(1 << (vector % 32)), Ordering::SeqCst);
        self.interrupts.fetch_add(1, Ordering::Relaxed);
    }

    /// True when the last request of this vector was level-triggered.
    pub fn is_level(&self, vector: u8) -> bool {
        self.tmr[usize::from(vector / 32)].load(Ordering::SeqCst) & 1 << (vector % 32) != 0
    }

    /// A word of the interrupt request register.
    pub fn irr_word(&self, index: usize) -> u32 {
        self.irr[index & 7].load(Ordering::SeqCst)
    }

    /// A word of the trigger mode register.
    pub fn tmr_word(&self, index: usize) -> u32 {
        self.tmr[index & 7].load(Ordering::SeqCst)
    }

    /// Sets a word of both registers, as when state is restored or reset.
    pub fn set_words(&self, index: usize, irr: u32, tmr: u32) {
        self.irr[index & 7].store(irr, Ordering::SeqCst);
        self.tmr[index & 7].store(tmr, Ordering::SeqCst);
    }

    /// Leaves a startup IPI.
    pub fn startup(&self, vector: u8) {
        self.startup_vector.store(vector, Ordering::SeqCst);
        self.raise(Event::STARTUP);
    }

    /// The vector of the last startup IPI.
    pub fn startup_vector(&self) -> u8 {
        self.startup_vector.load(Ordering::SeqCst)
    }

    /// Sets the level of the 8259's output as LINT0 sees it.
    pub fn set_extint(&self, raised: bool) {
        self.extint.store(raised, Ordering::SeqCst);
        if raised {
            self.raise(Event::INTERRUPT);
        }
    }

    /// The level of the 8259's output.
    pub fn extint(&self) -> bool {
        self.extint.load(Ordering::SeqCst)
    }

    /// Interrupts taken into service so far.
    pub fn interrupts(&self) -> u64 {
        self.interrupts.load(Ordering::Relaxed)
    }

    /// Tells how the local APIC is addressed from now on.
    pub(super) fn set_addressing(&self, mode: ApicMode, enabled: bool, logical: u32, flat: bool) {
        self.logical.store(logical, Ordering::SeqCst);
        self.flat.store(flat, Ordering::SeqCst);
        self.software_enabled.store(enabled, Ordering::SeqCst);
        self.mode.store(mode as u8, Ordering::SeqCst);
    }

    /// Tells the processor priority, by which the lowest-priority destination is chosen.
    pub(super) fn set_priority(&self, priority: u8) {
        self.priority.store(priority, Ordering::Relaxed);
    }

    /// The processor priority last told.
    pub(super) fn priority(&self) -> u8 {
        self.priority.load(Ordering::Relaxed)
    }

    /// The mode of the local APIC.
    pub fn mode(&self) -> ApicMode {
        match self.mode.load(Ordering::SeqCst) {
            0 => ApicMode::Disabled,
            1 => ApicMode::Xapic,
            _ => ApicMode::X2apic,
        }
    }

    /// True when fixed interrupts are accepted.
    pub(super) fn accepts_fixed(&self) -> bool {
        self.mode() != ApicMode::Disabled && self.software_enabled.load(Ordering::SeqCst)
    }

    /// Does a message with this physical destination mean this APIC? `wide` messages carry 32-bit destinations, in
    /// which only all ones is the broadcast.
    pub(super) fn matches_physical(&self, destination: u32, wide: bool) -> bool {
        match self.mode() {
            ApicMode::Disabled => false,
            ApicMode::Xapic => {
                destination == self.apic_id
                    || destination == u32::MAX
                    || (!wide && destination == 0xff)
            }
            ApicMode::X2apic => {
                destination == self.apic_id
                    || destination == u32::MAX
                    || (!wide && destination == 0xff)
            }
        }
    }

    /// Does a message with this logical destination mean this APIC (SDM volume 3, sections 12.6.2.2 and 12.12.10.2)?
    pub(super) fn matches_logical(&self, destination: u32, wide: bool) -> bool {
        let ldr = self.logical.load(Ordering::SeqCst);
        match self.mode() {
            ApicMode::Disabled => false,
            ApicMode::Xapic if wide && destination != u32::MAX && destination > 0xff => false,
            ApicMode::Xapic => {
                let (own, asked) = ((ldr >> 24) as u8, destination as u8);
                if destination == u32::MAX || asked == 0xff {
                    return true;
                }
                if self.flat.load(Ordering::SeqCst) {
                    own & asked != 0
                } else {
                    own >> 4 == asked >> 4 && own & asked & 0xf != 0
                }
            }
            ApicMode::X2apic => {
                if destination == u32::MAX || (!wide && destination == 0xff) {
                    return true;
                }
                ldr >> 16 == destination >> 16 && ldr & destination & 0xffff != 0
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_ordered_by_vector_and_remember_their_trigger() {
        let m = Mailbox::new(3);
        assert_eq!(m.highest_request(), None);
        assert!(m.request(0x31, false));
        assert!(!m.request(0x31, false));
        assert!(m.request(0xef, true));
        assert!(m.request(0x40, true));
        assert_eq!(m.highest_request(), Some(0xef));
        assert!(m.is_level(0xef) && m.is_level(0x40) && !m.is_level(0x31));
        m.accept(0xef);
        assert_eq!(m.highest_request(), Some(0x40));
        assert!(m.take_events().contains(Event::INTERRUPT));
        assert!(!m.has_events());
    }

    #[test]
    fn logical_addressing_follows_the_mode() {
        let m = Mailbox::new(5);
        m.set_addressing(ApicMode::Xapic, true, 0x2000_0000, true);
        assert!(m.matches_logical(0x20, false) && m.matches_logical(0x30, false));
        assert!(!m.matches_logical(0x10, false));
        // Cluster 2, member 1 and 3.
        m.set_addressing(ApicMode::Xapic, true, 0x2a00_0000, false);
        assert!(m.matches_logical(0x28, false) && m.matches_logical(0xff, false));
        assert!(!m.matches_logical(0x24, false) && !m.matches_logical(0x18, false));
        m.set_addressing(ApicMode::X2apic, true, 1 << 5, true);
        assert!(m.matches_logical(0x20, true) && !m.matches_logical(0x1_0020, true));
        assert!(m.matches_logical(u32::MAX, true));
        assert!(!m.matches_logical(0x1f, true));
        assert!(m.matches_physical(5, true) && !m.matches_physical(0xff, true));
        assert!(m.matches_physical(0xff, false));
        m.set_addressing(ApicMode::Disabled, true, 1 << 5, true);
        assert!(!m.matches_physical(5, true) && !m.accepts_fixed());
    }

    #[test]
    fn a_sleeper_wakes_for_events() {
        let m = std::sync::Arc::new(Mailbox::new(0));
        let other = m.clone();
        let sleeper = std::thread::spawn(move || {
            other.sleep(None);
            other.take_events()
        });
        m.raise(Event::WAKE);
        assert_eq!(sleeper.join().unwrap(), Event::WAKE);
        m.sleep(Some(Duration::from_millis(1)));
    }
}
