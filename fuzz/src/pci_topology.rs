//! PCI from the guest's side: configuration space through ports and memory, base addresses and their moves, bridges, MSI and
//! MSI-X tables, hot-plug.

use device_model::{Device, ResetKind};
use pci::{CONFIG_ADDRESS, CONFIG_DATA, Devfn, PciHandle};

use crate::input::Input;
use crate::pci_machine::{Card, FREE, Machine};
use crate::registers::access;

/// A guest, and who plugs cards into its machine.
struct Guest {
    machine: Machine,
    /// Cards that come and go: into the root port's slot and the root bus.
    guests: [Option<PciHandle>; 2],
}

impl Guest {
    /// An access to configuration space, mostly where something is.
    fn configure(&self, input: &mut Input<'_>) {
        let how = input.byte();
        let devfn = match how & 3 {
            0 => Devfn::from_byte(input.byte()),
            _ => Devfn::from_byte(input.pick(&[0, 8, 9, 16, 0xf8, 24, 25, 72])),
        };
        let bus = if how & 0x0c == 0 {
            input.byte()
        } else {
            input.byte() & 3
        };
        let size = usize::from(how >> 4 & 3) + 1;
        let at = u16::from(input.byte());
        let data = input.number().to_le_bytes();
        if how & 0x40 != 0 {
            let select = 1 << 31
                | u32::from(bus) << 16
                | u32::from(devfn.byte()) << 8
                | u32::from(at & 0xfc);
            self.machine
                .ports
                .write(CONFIG_ADDRESS, &select.to_le_bytes());
            self.machine
                .ports
                .write(CONFIG_DATA + u64::from(at & 3), &data[..size]);
        } else if let Some((base, _)) = self.machine.mch.ecam() {
            let at = u64::from(bus) << 20 | u64::from(devfn.byte()) << 12 | u64::from(at);
            self.machine.memory.write(base + at, &data[..size]);
            self.machine.memory.read(base + at, &mut [0; 8][..size]);
        }
    }

    /// A card comes or goes.
    fn plug(&mut self, input: &mut Input<'_>) {
        let which = usize::from(input.byte() & 1);
        self.guests[which] = match self.guests[which].take() {
            Some(handle) => {
                let card = handle.remove();
                assert!(card.function().devfn().is_none());
                None
            }
            None => {
                let (bus, slot) =
                    [(self.machine.slot.bus(), 0), (self.machine.root.clone(), 9)][which].clone();
                let card = Card::new(["guest 0", "guest 1"][which]);
                Some(bus.add(Devfn::new(slot, 0), card).expect(FREE))
            }
        };
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() {
            0..128 => self.configure(input),
            128..192 => {
                access(&self.machine.memory, &self.machine.memory.regions(), input);
            }
            192..220 => {
                access(&self.machine.ports, &self.machine.ports.regions(), input);
            }
            220..232 => {
                let card = &self.machine.cards[input.below(3) as usize];
                card.0.set_intx(input.byte() & 1 != 0);
                card.0.notify(input.word(2) as u16);
            }
            232..242 => self.plug(input),
            242..246 => drop(self.machine.slot.request_unplug()),
            246..252 => drop(self.machine.set_up(u64::from(input.byte()))),
            252 => self.machine.cards[input.below(3) as usize].reset(ResetKind::Warm),
            _ => self.machine.reset(ResetKind::Warm),
        }
    }
}

/// A guest that writes anything anywhere. Nothing may panic or hang; what is mapped is what configuration space says; a reset
/// undoes it all.
pub fn topology(data: &[u8]) {
    let machine = Machine::new();
    machine.reset(ResetKind::Cold);
    let pristine = machine.dump();
    let _ = machine.set_up(512);
    let mut guest = Guest {
        machine,
        guests: [None, None],
    };
    let mut input = Input::new(data);
    while input.more() {
        guest.step(&mut input);
    }
    let machine = guest.machine;
    machine.check_places();
    drop(guest.guests);
    machine.reset(ResetKind::Cold);
    assert!(machine.dump() == pristine, "a reset leaves something");
    assert!(machine.memory.regions().is_empty());
    assert_eq!(machine.ports.regions().len(), 1); // CF8h
}
