//! A guest that writes anything anywhere in configuration space and in the registers behind it: nothing panics, nothing hangs, what is
//! mapped is what configuration space says, and reset undoes it all.

use std::sync::Arc;

use device_model::{Device, IoBus, IoHandler, IrqPin, IrqSink, MsiSink, ResetKind, Widths};
use pci::{
    Bar, BarKind, ConfigAccess, Devfn, ExpressType, Fabric, FunctionBuilder, Identity, Lpc, Mch,
    PciBridge, PciBus, PciDevice, PciFunction, PciHandle, RootPort, RootWindows, assign, lpc,
};

struct Nothing;
impl IrqSink for Nothing {
    fn set_level(&self, _pin: u32, _high: bool) {}
}
impl MsiSink for Nothing {
    fn send(&self, _address: u64, _data: u32) {}
}
impl IoHandler for Nothing {
    fn widths(&self) -> Widths {
        Widths::BYTE
    }
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&self, _offset: u64, _data: &[u8]) {}
}

/// A card with every kind of register, MSI-X and PCI Express.
struct Card(PciFunction);

impl Card {
    fn new(name: &str) -> Arc<Self> {
        let bar = |kind, size| Bar {
            kind,
            size,
            widths: Widths::ANY,
        };
        let id = Identity {
            vendor: 0x1234,
            device: 0x1111,
            class: 0xff_0000,
            ..Default::default()
        };
        let function = FunctionBuilder::new(name, id)
            .bar(0, bar(BarKind::Io, 0x40))
            .and_then(|b| b.msix(9, 1))
            .and_then(|b| {
                b.bar(
                    2,
                    bar(
                        BarKind::Memory32 {
                            prefetchable: false,
                        },
                        0x2000,
                    ),
                )
            })
            .and_then(|b| b.bar(4, bar(BarKind::Memory64 { prefetchable: true }, 0x10_0000)))
            .unwrap()
            .interrupt_pin(2)
            .msi(8)
            .express(ExpressType::Endpoint)
            .power_management()
            .build();
        Arc::new(Self(function))
    }
}

impl Device for Card {
    fn name(&self) -> String {
        self.0.name().to_owned()
    }
    fn reset(&self, _kind: ResetKind) {
        self.0.reset();
    }
}

impl PciDevice for Card {
    fn function(&self) -> &PciFunction {
        &self.0
    }
    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]) {
        let size = self.0.bar(bar).unwrap().size;
        assert!(offset + data.len() as u64 <= size);
        data.fill(bar as u8);
    }
    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) {
        let size = self.0.bar(bar).unwrap().size;
        assert!(offset + data.len() as u64 <= size);
        self.0.set_intx(data[0] & 1 != 0);
        self.0.notify(u16::from(data[0]));
    }
    fn bar_moved(&self, _bar: usize, _address: Option<u64>) {}
    fn config_written(&self, _offset: u16, _len: usize) {}
}

struct Machine {
    ports: IoBus,
    memory: IoBus,
    root: Arc<PciBus>,
    mch: Arc<Mch>,
    lpc: Arc<Lpc>,
    access: Arc<ConfigAccess>,
    cards: Vec<Arc<Card>>,
    _handles: Vec<PciHandle>,
    _config: device_model::IoRegion,
}

impl Machine {
    fn new() -> Self {
        let (ports, memory) = (IoBus::ports(), IoBus::memory());
        let nothing = Arc::new(Nothing);
        let pin = |n| IrqPin::new(nothing.clone(), n);
        let apic: [IrqPin; 8] = std::array::from_fn(|n| pin(16 + n as u32));
        let isa: [Option<IrqPin>; 16] = std::array::from_fn(|n| Some(pin(n as u32)));
        let lpc = Lpc::new(&apic, isa, Box::new(|_| {}));
        let fabric = Fabric {
            ports: ports.clone(),
            memory: memory.clone(),
            msi: nothing.clone(),
        };
        let wires = lpc.clone();
        let root = PciBus::root(fabric, Arc::new(move |slot, pin| wires.intx(slot, pin)));
        let access = ConfigAccess::new(root.clone());
        let mch = Mch::new(access.clone(), memory.clone());
        let port = RootPort::new("port", 1, true, Box::new(|| {}));
        let bridge = PciBridge::new("bridge");
        let cards: Vec<_> = ["a", "b", "c"].map(Card::new).into();
        let handles = vec![
            root.add(Devfn::new(0, 0), mch.clone()).unwrap(),
            root.add(Devfn::new(31, 0), lpc.clone()).unwrap(),
            root.add(Devfn::new(1, 0), port.clone()).unwrap(),
            root.add(Devfn::new(2, 0), cards[0].clone()).unwrap(),
            port.bus().add(Devfn::new(0, 0), bridge.clone()).unwrap(),
            bridge
                .bus()
                .add(Devfn::new(3, 0), cards[1].clone())
                .unwrap(),
            bridge
                .bus()
                .add(Devfn::new(3, 1), cards[2].clone())
                .unwrap(),
        ];
        let config = access.claim_ports(&ports, nothing).unwrap();
        Self {
            ports,
            memory,
            root,
            mch,
            lpc,
            access,
            cards,
            _handles: handles,
            _config: config,
        }
    }

    fn reset(&self) {
        self.root.reset(ResetKind::Cold);
        self.access.reset(ResetKind::Cold);
    }

    /// All configuration space of all functions that can be reached.
    fn dump(&self) -> Vec<u8> {
        let mut all = Vec::new();
        for (_, device) in self.root.functions() {
            let mut bytes = vec![0; 4096];
            device.function().config_read(0, &mut bytes);
            all.extend(bytes);
        }
        for card in &self.cards {
            let mut bytes = vec![0; 4096];
            card.0.config_read(0, &mut bytes);
            all.extend(bytes);
        }
        all
    }
}

struct Numbers(u64);
impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

const WINDOWS: RootWindows = RootWindows {
    io: 0x6000..0x1_0000,
    memory32: 0xc000_0000..0xfe00_0000,
    memory64: 0x1_0000_0000..0x80_0000_0000,
};

#[test]
fn anything_goes_and_reset_undoes_it() {
    let machine = Machine::new();
    machine.reset();
    let pristine = machine.dump();
    let mut numbers = Numbers(0x0123_4567_89ab_cdef);
    for round in 0..40 {
        // Every other round from a sane start, so that cards behind bridges are reached too.
        if round % 2 == 0 {
            assign(&machine.root, &WINDOWS).unwrap();
            machine.mch.enable_ecam(0xb000_0000);
            machine.lpc.preset(0x600, [10; lpc::PIRQS]);
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
        for card in &machine.cards[..1] {
            for bar in [0, 1, 2, 4] {
                let wanted = card.0.bar_address(bar);
                let space = if bar == 0 {
                    &machine.ports
                } else {
                    &machine.memory
                };
                let name = format!("{} BAR {bar}", card.0.name());
                let there: Vec<u64> = space
                    .regions()
                    .into_iter()
                    .filter(|(_, _, n)| *n == name)
                    .map(|(base, ..)| base)
                    .collect();
                assert_eq!(there, Vec::from_iter(wanted), "{name}");
            }
        }
        machine.reset();
        assert_eq!(machine.dump(), pristine);
        assert!(machine.memory.regions().is_empty());
        assert_eq!(machine.ports.regions().len(), 1); // CF8h
    }
}

#[test]
fn cards_come_and_go_while_the_guest_moves_them() {
    let machine = Arc::new(Machine::new());
    machine.reset();
    assign(&machine.root, &WINDOWS).unwrap();
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
