//! The table of interrupt routes.
//!
//! KVM keeps one table for a VM. Its first entries stand for the pins of I/O APICs: KVM tells us of the end of
//! level-triggered interrupts only for vectors that it finds there, so every level-triggered message that is sent gets an
//! entry. The entries behind them belong to irqfds.

use std::collections::HashMap;
use std::os::fd::RawFd;

use accel::Msi;
use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi, kvm_irq_routing_msi__bindgen_ty_1,
};

/// Entries for level-triggered messages: a vector each, with room for several destinations.
pub(crate) const LEVEL_ROUTES: u32 = 512;
/// Entries in all that KVM takes (`KVM_MAX_IRQ_ROUTES`).
const ALL_ROUTES: u32 = 4096;

/// The part of a message's data that says "level-triggered" (SDM volume 3, section 12.11.2).
const DATA_LEVEL_TRIGGERED: u32 = 1 << 15;

/// A message as KVM takes it: the low byte of the upper address is reserved.
pub(crate) fn address(msi: Msi) -> (u32, u32) {
    (msi.address as u32, (msi.address >> 32) as u32 & !0xff)
}

#[derive(Default)]
pub(crate) struct Routes {
    /// Level-triggered messages by entry.
    level: Vec<Msi>,
    /// Which one to give up when the table is full.
    oldest: usize,
    /// Entry and message of each event.
    events: HashMap<RawFd, (u32, Msi)>,
    free: Vec<u32>,
    next: u32,
}

impl Routes {
    /// Takes note of a message that is about to be sent. True when the table has changed.
    pub(crate) fn note_level(&mut self, msi: Msi) -> bool {
        if msi.data & DATA_LEVEL_TRIGGERED == 0 || self.level.contains(&msi) {
            return false;
        }
        if self.level.len() < LEVEL_ROUTES as usize {
            self.level.push(msi);
        } else {
            self.level[self.oldest] = msi;
            self.oldest = (self.oldest + 1) % self.level.len();
        }
        true
    }

    /// The entry of an event.
    pub(crate) fn of_event(&self, event: RawFd) -> Option<u32> {
        self.events.get(&event).map(|(gsi, _)| *gsi)
    }

    /// Gives an event an entry with a message, or its entry another message; `None` when the table is full.
    pub(crate) fn set_event(&mut self, event: RawFd, msi: Msi) -> Option<u32> {
        self.note_level(msi);
        if let Some((gsi, old)) = self.events.get_mut(&event) {
            *old = msi;
            return Some(*gsi);
        }
        let gsi = match self.free.pop() {
            Some(gsi) => gsi,
            None if self.next < ALL_ROUTES - LEVEL_ROUTES => {
                self.next += 1;
                LEVEL_ROUTES + self.next - 1
            }
            None => return None,
        };
        self.events.insert(event, (gsi, msi));
        Some(gsi)
    }

    /// Takes an event's entry away and returns which it was.
    pub(crate) fn remove_event(&mut self, event: RawFd) -> Option<u32> {
        let (gsi, _) = self.events.remove(&event)?;
        self.free.push(gsi);
        Some(gsi)
    }

    /// The table for `KVM_SET_GSI_ROUTING`.
    pub(crate) fn table(&self) -> KvmIrqRouting {
        let level = (0u32..).zip(self.level.iter().copied());
        let events = self.events.values().copied();
        let entries: Vec<_> = level.chain(events).map(|(g, m)| entry(g, m)).collect();
        KvmIrqRouting::from_entries(&entries).expect("no more entries than KVM takes")
    }
}

fn entry(gsi: u32, msi: Msi) -> kvm_irq_routing_entry {
    let (address_lo, address_hi) = address(msi);
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        flags: 0,
        pad: 0,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo,
                address_hi,
                data: msi.data,
                __bindgen_anon_1: kvm_irq_routing_msi__bindgen_ty_1 { pad: 0 },
            },
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn msi(data: u32) -> Msi {
        Msi {
            address: 0xfee0_0000,
            data,
        }
    }

    #[test]
    fn level_messages_get_one_entry_each() {
        let mut routes = Routes::default();
        assert!(!routes.note_level(msi(0x40)));
        assert!(routes.note_level(msi(0x8040)));
        assert!(!routes.note_level(msi(0x8040)));
        for i in 0..2 * u64::from(LEVEL_ROUTES) {
            routes.note_level(Msi {
                address: 0xfee0_0000 | i << 32,
                data: 0x8041,
            });
        }
        assert_eq!(routes.table().as_slice().len(), LEVEL_ROUTES as usize);
    }

    #[test]
    fn events_keep_their_entry_until_removed_and_the_table_has_an_end() {
        let mut routes = Routes::default();
        let first = routes.set_event(3, msi(0x30)).unwrap();
        assert_eq!(first, LEVEL_ROUTES);
        assert_eq!(routes.set_event(3, msi(0x31)), Some(first));
        let second = routes.set_event(4, msi(0x32)).unwrap();
        assert_ne!(first, second);
        assert_eq!(routes.remove_event(3), Some(first));
        assert_eq!(routes.remove_event(3), None);
        assert_eq!(routes.set_event(5, msi(0x33)), Some(first));
        let given = (10..10_000).filter(|fd| routes.set_event(*fd, msi(1)).is_some());
        assert_eq!(given.count() as u32, ALL_ROUTES - LEVEL_ROUTES - 2);
    }
}
