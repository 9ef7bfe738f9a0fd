//! The way of messages between local APICs, I/O APICs and devices.

use std::sync::Arc;

use accel::Msi;
use parking_lot::RwLock;

use super::mailbox::{Event, Mailbox};
use super::spec::{DeliveryMode, ICR_LOGICAL};

/// The largest number of vCPUs, and one more than the highest APIC ID.
pub const MAX_APICS: usize = 288;

/// An interrupt message on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Destination: an APIC ID or a logical address.
    pub destination: u32,
    /// The destination has 32 bits, as an x2APIC's has; else 0xff is the broadcast.
    pub wide: bool,
    /// The destination is logical.
    pub logical: bool,
    /// How to deliver it.
    pub mode: DeliveryMode,
    /// Vector.
    pub vector: u8,
    /// Level-triggered.
    pub level: bool,
}

impl Message {
    /// Decodes a message-signalled interrupt (SDM volume 3, section 12.11). `None` when the address is not in the local
    /// APICs' range.
    ///
    /// Destination bits beyond eight come in address bits 5 to 11 (bits 8 to 14 of the destination; the KVM and Hyper-V
    /// convention) or in bits 40 to 63 (bits 8 to 31, as the seam says).
    pub fn from_msi(msi: Msi) -> Option<Self> {
        let low = msi.address as u32;
        if low >> 20 != 0xfee {
            return None;
        }
        let high = (msi.address >> 32) as u32 & !0xff;
        let extended = (low >> 5 & 0x7f) << 8;
        let destination = (low >> 12 & 0xff) | extended | high;
        Some(Self {
            destination,
            wide: destination > 0xff,
            logical: low & 1 << 2 != 0,
            mode: match DeliveryMode::from_bits(msi.data) {
                // The redirection hint lets the message go to one of the destinations.
                DeliveryMode::Fixed if low & 0b1100 == 0b1100 => DeliveryMode::LowestPriority,
                mode => mode,
            },
            vector: msi.data as u8,
            level: msi.data & 1 << 15 != 0,
        })
    }

    /// Decodes an interrupt command with an explicit destination.
    pub fn from_icr(low: u32, destination: u32, wide: bool) -> Self {
        Self {
            destination,
            wide,
            logical: low & ICR_LOGICAL != 0,
            mode: DeliveryMode::from_bits(low),
            vector: low as u8,
            level: false,
        }
    }
}

/// All mailboxes of a machine, by APIC ID.
#[derive(Debug, Default)]
pub struct ApicBus {
    mailboxes: RwLock<Vec<Option<Arc<Mailbox>>>>,
}

impl ApicBus {
    /// A bus with nobody on it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a vCPU on the bus; false when its ID is taken or too high.
    pub fn attach(&self, mailbox: Arc<Mailbox>) -> bool {
        let id = mailbox.apic_id() as usize;
        let mut all = self.mailboxes.write();
        if id >= MAX_APICS {
            return false;
        }
        if all.len() <= id {
            all.resize(id + 1, None);
        }
        if all[id].is_some() {
            return false;
        }
        all[id] = Some(mailbox);
        true
    }

    /// Takes a vCPU off the bus.
    pub fn detach(&self, apic_id: u32) {
        if let Some(slot) = self.mailboxes.write().get_mut(apic_id as usize) {
            *slot = None;
        }
    }

    /// The mailbox of an APIC ID.
    pub fn get(&self, apic_id: u32) -> Option<Arc<Mailbox>> {
        self.mailboxes.read().get(apic_id as usize)?.clone()
    }

    /// Calls `f` for every vCPU.
    pub fn for_each(&self, mut f: impl FnMut(&Mailbox)) {
        self.mailboxes.read().iter().flatten().for_each(|m| f(m));
    }

    /// Sends a message-signalled interrupt; one for another address than the local APICs' is lost, as on a bus.
    pub fn send_msi(&self, msi: Msi) {
        if let Some(message) = Message::from_msi(msi) {
            self.send(message);
        }
    }

    /// Sends a message to its destinations. Returns how many accepted it.
    pub fn send(&self, message: Message) -> usize {
        let all = self.mailboxes.read();
        // The usual case by far: one APIC, named by its ID.
        if !message.logical && (message.wide || message.destination != 0xff) {
            if let Some(Some(m)) = all.get(message.destination as usize) {
                return usize::from(m.matches_physical(message.destination, message.wide))
                    * usize::from(deliver(m, message));
            }
            if message.destination != u32::MAX {
                return 0;
            }
        }
        let meant = |m: &&Arc<Mailbox>| {
            if message.logical {
                m.matches_logical(message.destination, message.wide)
            } else {
                m.matches_physical(message.destination, message.wide)
            }
        };
        let mut targets = all.iter().flatten().filter(meant);
        if message.mode == DeliveryMode::LowestPriority {
            let lowest = targets
                .filter(|m| m.accepts_fixed())
                .min_by_key(|m| m.priority());
            return lowest.map_or(0, |m| usize::from(deliver(m, message)));
        }
        targets
            .by_ref()
            .map(|m| usize::from(deliver(m, message)))
            .sum()
    }

    /// Sends a message to all vCPUs but the one with ID `except`.
    pub fn broadcast(&self, message: Message, except: Option<u32>) -> usize {
        let all = self.mailboxes.read();
        all.iter()
            .flatten()
            .filter(|m| Some(m.apic_id()) != except && m.mode() != super::ApicMode::Disabled)
            .map(|m| usize::from(deliver(m, message)))
            .sum()
    }
}

/// Delivers a message to one APIC.
fn deliver(mailbox: &Mailbox, message: Message) -> bool {
    match message.mode {
        DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
            if !mailbox.accepts_fixed() || message.vector < 16 {
                return false;
            }
            mailbox.request(message.vector, message.level);
        }
        DeliveryMode::Nmi => mailbox.raise(Event::NMI),
        DeliveryMode::Init => mailbox.raise(Event::INIT),
        DeliveryMode::Startup => mailbox.startup(message.vector),
        // ExtINT messages ask the processor to fetch the vector from the 8259, whose line says the same.
        DeliveryMode::ExtInt => mailbox.raise(Event::INTERRUPT),
        // There is no system management mode.
        DeliveryMode::Smi | DeliveryMode::Reserved => return false,
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apic::ApicMode;

    fn bus(n: u32) -> (ApicBus, Vec<Arc<Mailbox>>) {
        let bus = ApicBus::new();
        let all: Vec<_> = (0..n).map(|id| Arc::new(Mailbox::new(id))).collect();
        for m in &all {
            m.set_addressing(ApicMode::Xapic, true, 1 << (24 + m.apic_id()), true);
            assert!(bus.attach(m.clone()));
        }
        (bus, all)
    }

    fn got(all: &[Arc<Mailbox>]) -> Vec<Option<u8>> {
        all.iter()
            .map(|m| {
                let v = m.highest_request();
                v.into_iter().for_each(|v| m.accept(v));
                v
            })
            .collect()
    }

    #[test]
    fn messages_find_their_destinations() {
        let (bus, all) = bus(4);
        assert!(!bus.attach(all[0].clone()));
        let msi = |address, data| bus.send_msi(Msi { address, data });
        msi(0xfee0_2000, 0x41);
        assert_eq!(got(&all), [None, None, Some(0x41), None]);
        msi(0xfeef_f000, 0x42);
        assert_eq!(got(&all), [Some(0x42); 4]);
        // Logical: members 0 and 3.
        msi(0xfee0_9004, 0x43);
        assert_eq!(got(&all), [Some(0x43), None, None, Some(0x43)]);
        // Lowest priority: one of them, the idle one.
        all[0].set_priority(0x80);
        msi(0xfee0_9004, 0x144);
        assert_eq!(got(&all), [None, None, None, Some(0x44)]);
        // With the redirection hint.
        msi(0xfee0_900c, 0x45);
        assert_eq!(got(&all), [None, None, None, Some(0x45)]);
        // Not an APIC's address, no such APIC, illegal vector.
        msi(0xfed0_0000, 0x46);
        msi(0xfee0_7000, 0x46);
        msi(0xfee0_0000, 0x0f);
        assert_eq!(got(&all), [None; 4]);
        msi(0xfee0_1000, 0xc000 | 0x47);
        assert!(all[1].is_level(0x47));
    }

    #[test]
    fn high_ids_are_reached_by_extended_destinations() {
        let bus = ApicBus::new();
        let m = Arc::new(Mailbox::new(287));
        m.set_addressing(ApicMode::X2apic, true, 0, true);
        assert!(bus.attach(m.clone()));
        assert!(!bus.attach(Arc::new(Mailbox::new(288))));
        bus.send_msi(Msi {
            address: 0xfee1_f020,
            data: 0x51,
        });
        assert_eq!(m.highest_request(), Some(0x51));
        m.accept(0x51);
        bus.send_msi(Msi {
            address: 0x100_fee1_f000,
            data: 0x52,
        });
        assert_eq!(m.highest_request(), Some(0x52));
    }

    #[test]
    fn other_modes_become_events() {
        let (bus, all) = bus(2);
        let send = |low| bus.send(Message::from_icr(low, 1, false));
        assert_eq!(send(0x400), 1);
        assert_eq!(send(0x500), 1);
        assert_eq!(send(0x69a), 1);
        assert_eq!(send(0x200), 0);
        let e = all[1].take_events();
        assert_eq!(e, Event::NMI | Event::INIT | Event::STARTUP);
        assert_eq!(all[1].startup_vector(), 0x9a);
        assert!(!all[0].has_events());
        let fixed = Message::from_icr(0x55, 0, false);
        assert_eq!(bus.broadcast(fixed, Some(1)), 1);
        assert_eq!(got(&all), [Some(0x55), None]);
    }
}
