//! A guest that writes anything anywhere in configuration space and in the registers behind it: nothing panics, nothing hangs, what is
//! mapped is what configuration space says, and reset undoes it all.

#[path = "../../../fuzz/src/input.rs"]
#[allow(unreachable_pub, dead_code)]
mod input;
#[path = "../../../fuzz/src/pci_machine.rs"]
#[allow(unreachable_pub, dead_code, missing_docs)]
mod pci_machine;
#[path = "../../../fuzz/src/registers.rs"]
#[allow(unreachable_pub, dead_code)]
mod registers;

use std::sync::Arc;

use device_model::ResetKind;
use pci::Devfn;
use pci_machine::{Card, Machine};

struct Numbers(u64);
impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Room for all cards below 4 GiB, in MiB.
const ROOM: u64 = 992;

#[test]
fn anything_goes_and_reset_undoes_it() {
    let machine = Machine::new();
    machine.reset(ResetKind::Cold);
    let pristine = machine.dump();
    let mut numbers = Numbers(0x0123_4567_89ab_cdef);
    for round in 0..40 {
        // Every other round from a sane start, so that cards behind bridges are reached too.
        if round % 2 == 0 {
            machine.set_up(ROOM).unwrap();
        }
        for _ in 0..1500 {
            let functions = [0u8, 8, 16, 0xf8, 24, 25];
            let devfn = Devfn::from_byte(functions[numbers.next() as usize % 6]);
            let bus = (numbers.next() % 4) as u8;
            let size = 1 << (numbers.next() % 3);
            // Mostly the header, where the effects are.
            let limit = if numbers.next().is_multiple_of(4) {
                0x100
            } else {
                0x40
            };
            let offset = (numbers.next() % limit) as u16 & !(size as u16 - 1);
            let data = match numbers.next() % 4 {
                0 => [0xff; 4],
                1 => 0xc000_0007u32.to_le_bytes(),
                _ => (numbers.next() as u32).to_le_bytes(),
            };
            machine.access.write(bus, devfn, offset, &data[..size]);
            let regions = machine.memory.regions();
            if let Some((base, len, _)) =
                regions.get(numbers.next() as usize % regions.len().max(1))
            {
                let at = base + numbers.next() % len;
                let mut data = numbers.next().to_le_bytes();
                machine.memory.write(at, &data[..size]);
                machine.memory.read(at, &mut data[..size]);
            }
        }
        machine.check_places();
        machine.reset(ResetKind::Cold);
        assert_eq!(machine.dump(), pristine);
        assert!(machine.memory.regions().is_empty());
        assert_eq!(machine.ports.regions().len(), 1); // CF8h
    }
}

#[test]
fn cards_come_and_go_while_the_guest_moves_them() {
    let machine = Arc::new(Machine::new());
    machine.reset(ResetKind::Cold);
    machine.set_up(ROOM).unwrap();
    let guest = {
        let machine = machine.clone();
        std::thread::spawn(move || {
            for n in 0..5000u32 {
                let address = 0xc000_0000 + (n % 64) * 0x10_0000;
                let devfn = Devfn::new(9, 0);
                machine.access.write(0, devfn, 0x18, &address.to_le_bytes());
                machine.access.write(0, devfn, 0x04, &[6, 0]);
                machine.memory.write(address.into(), &[1]);
            }
        })
    };
    for _ in 0..200 {
        let handle = machine
            .root
            .add(Devfn::new(9, 0), Card::new("guest"))
            .unwrap();
        std::thread::yield_now();
        let card = handle.remove();
        assert!(card.function().devfn().is_none());
    }
    guest.join().unwrap();
    let left = machine.memory.regions();
    assert!(left.iter().all(|(_, _, name)| !name.starts_with("guest")));
}
