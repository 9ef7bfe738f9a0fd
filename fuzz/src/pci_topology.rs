//! PCI from the guest's side: configuration space through ports and memory, base addresses and their moves, bridges, MSI and
//! MSI-X tables, hot-plug.

use std::sync::Arc;

use device_model::{Device, IoBus, IoHandler, IoRegion, IrqPin, ResetKind, Widths};
use parking_lot::Mutex;
use pci::lpc::{PIRQS, PM_DEFAULT_BASE};
use pci::{
    Bar, BarKind, CONFIG_ADDRESS, CONFIG_DATA, ConfigAccess, Devfn, ExpressType, Fabric,
    FunctionBuilder, Identity, Lpc, Mch, PciBridge, PciBus, PciDevice, PciFunction, PciHandle,
    RootPort, RootWindows, assign,
};

use crate::input::Input;
use crate::registers::{Ends, access};

/// A card with every kind of register, both kinds of messages and PCI Express.
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
            ..Identity::default()
        };
        let memory32 = BarKind::Memory32 {
            prefetchable: false,
        };
        let memory64 = BarKind::Memory64 { prefetchable: true };
        let function = FunctionBuilder::new(name, id)
            .bar(0, bar(BarKind::Io, 0x40))
            .and_then(|b| b.bar(1, bar(memory32, 0x2000)))
            // Between registers of the card's own, not at a multiple of an entry.
            .and_then(|b| b.msix_in(9, 1, 0x808, 0x1000))
            .and_then(|b| b.bar(2, bar(memory32, 0x10)))
            .and_then(|b| b.bar(4, bar(memory64, 1 << 40)))
            .expect("registers of possible sizes")
            .interrupt_pin(2)
            .msi(8)
            .express(ExpressType::Endpoint)
            .power_management()
            .build();
        Arc::new(Self(function))
    }

    fn check(&self, bar: usize, offset: u64, length: usize) {
        let size = self.0.bar(bar).expect("one of its registers").size;
        assert!(offset + length as u64 <= size, "an access past BAR {bar}");
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
        self.check(bar, offset, data.len());
        data.fill(bar as u8);
    }
    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) {
        self.check(bar, offset, data.len());
        self.0.set_intx(data[0] & 1 != 0);
        self.0.notify(u16::from(data[0]));
    }
    fn bar_moved(&self, _bar: usize, _address: Option<u64>) {}
    fn config_written(&self, _offset: u16, _len: usize) {}
}

struct ResetPort;
impl IoHandler for ResetPort {
    fn widths(&self) -> Widths {
        Widths::BYTE
    }
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&self, _offset: u64, _data: &[u8]) {}
}

struct Machine {
    ports: IoBus,
    memory: IoBus,
    root: Arc<PciBus>,
    mch: Arc<Mch>,
    lpc: Arc<Lpc>,
    access: Arc<ConfigAccess>,
    slot: Arc<RootPort>,
    cards: Vec<Arc<Card>>,
    /// Cards that come and go: into the root port's slot and the root bus.
    guests: Mutex<[Option<PciHandle>; 2]>,
    _handles: Vec<PciHandle>,
    _config: IoRegion,
}

const FREE: &str = "a free slot";

impl Machine {
    fn new() -> Self {
        let (ports, memory) = (IoBus::ports(), IoBus::memory());
        let ends = Arc::new(Ends::default());
        let pin = |n| IrqPin::new(ends.clone(), n);
        let apic: [IrqPin; PIRQS] = std::array::from_fn(|n| pin(16 + n as u32));
        let isa = std::array::from_fn(|n| (n > 2).then(|| pin(n as u32)));
        let lpc = Lpc::new(&apic, isa, Box::new(|_| {}));
        let fabric = Fabric {
            ports: ports.clone(),
            memory: memory.clone(),
            msi: ends.clone(),
        };
        let wires = lpc.clone();
        let root = PciBus::root(fabric, Arc::new(move |slot, pin| wires.intx(slot, pin)));
        let access = ConfigAccess::new(root.clone());
        let mch = Mch::new(access.clone(), memory.clone());
        let port = RootPort::new("port", 1, false, Box::new(|| {}));
        let slot = RootPort::new("slot", 2, true, Box::new(|| {}));
        let bridge = PciBridge::new("bridge");
        let cards: Vec<_> = ["a", "b", "c"].map(Card::new).into();
        let place = |bus: &Arc<PciBus>, slot, function, device: Arc<dyn PciDevice>| {
            bus.add(Devfn::new(slot, function), device).expect(FREE)
        };
        let handles = vec![
            place(&root, 0, 0, mch.clone()),
            place(&root, 31, 0, lpc.clone()),
            place(&root, 1, 0, port.clone()),
            place(&root, 1, 1, slot.clone()),
            place(&root, 2, 0, cards[0].clone()),
            place(&port.bus(), 0, 0, bridge.clone()),
            place(&bridge.bus(), 3, 0, cards[1].clone()),
            place(&bridge.bus(), 3, 1, cards[2].clone()),
        ];
        let config = access.claim_ports(&ports, Arc::new(ResetPort));
        Self {
            _config: config.expect("free ports"),
            ports,
            memory,
            root,
            mch,
            lpc,
            access,
            slot,
            cards,
            guests: Mutex::default(),
            _handles: handles,
        }
    }

    fn reset(&self, kind: ResetKind) {
        self.root.reset(kind);
        self.access.reset(kind);
    }

    /// As firmware leaves it. The windows are too small for all cards together, so that giving them out may fail half way.
    fn set_up(&self, room: u64) {
        let windows = RootWindows {
            io: 0x6000..0x1_0000,
            memory32: 0xc000_0000..0xc000_0000 + (room << 20),
            memory64: 1 << 41..1 << 47,
        };
        let _ = assign(&self.root, &windows);
        self.mch.enable_ecam(0xb000_0000);
        self.lpc.preset(PM_DEFAULT_BASE, [10; PIRQS]);
    }

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
            self.ports.write(CONFIG_ADDRESS, &select.to_le_bytes());
            self.ports
                .write(CONFIG_DATA + u64::from(at & 3), &data[..size]);
        } else if let Some((base, _)) = self.mch.ecam() {
            let at = u64::from(bus) << 20 | u64::from(devfn.byte()) << 12 | u64::from(at);
            self.memory.write(base + at, &data[..size]);
            self.memory.read(base + at, &mut [0; 8][..size]);
        }
    }

    /// A card comes or goes.
    fn plug(&self, input: &mut Input<'_>) {
        let which = usize::from(input.byte() & 1);
        let mut guests = self.guests.lock();
        guests[which] = match guests[which].take() {
            Some(handle) => {
                let card = handle.remove();
                assert!(card.function().devfn().is_none());
                None
            }
            None => {
                let (bus, slot) = [(self.slot.bus(), 0), (self.root.clone(), 9)][which].clone();
                let card = Card::new(["guest 0", "guest 1"][which]);
                Some(bus.add(Devfn::new(slot, 0), card).expect(FREE))
            }
        };
    }

    fn step(&self, input: &mut Input<'_>) {
        match input.byte() {
            0..128 => self.configure(input),
            128..192 => {
                access(&self.memory, &self.memory.regions(), input);
            }
            192..220 => {
                access(&self.ports, &self.ports.regions(), input);
            }
            220..232 => {
                let card = &self.cards[input.below(3) as usize];
                card.0.set_intx(input.byte() & 1 != 0);
                card.0.notify(input.word(2) as u16);
            }
            232..242 => self.plug(input),
            242..246 => drop(self.slot.request_unplug()),
            246..252 => self.set_up(u64::from(input.byte())),
            252 => self.cards[input.below(3) as usize].reset(ResetKind::Warm),
            _ => self.reset(ResetKind::Warm),
        }
    }

    /// All configuration space of the functions that stay.
    fn dump(&self) -> Vec<u8> {
        let mut all = Vec::new();
        let on_root = self.root.functions();
        let staying = on_root.iter().map(|(_, device)| device.function());
        for function in staying.chain(self.cards.iter().map(|card| &card.0)) {
            if function.name().starts_with("guest") {
                continue;
            }
            let mut bytes = vec![0; 4096];
            function.config_read(0, &mut bytes);
            all.extend(bytes);
        }
        all
    }

    /// # Panics
    /// When the registers of a card on the root bus are not where configuration space says.
    fn check_places(&self) {
        for bar in [0, 1, 2, 4] {
            let space = if bar == 0 { &self.ports } else { &self.memory };
            let name = format!("a BAR {bar}");
            let regions = space.regions();
            let there = regions.iter().filter(|(_, _, whose)| *whose == name);
            let there = Vec::from_iter(there.map(|(base, ..)| *base));
            assert_eq!(there, Vec::from_iter(self.cards[0].0.bar_address(bar)));
        }
    }
}

/// A guest that writes anything anywhere. Nothing may panic or hang; what is mapped is what configuration space says; a reset
/// undoes it all.
pub fn topology(data: &[u8]) {
    let machine = Machine::new();
    machine.reset(ResetKind::Cold);
    let pristine = machine.dump();
    machine.set_up(512);
    let mut input = Input::new(data);
    while input.more() {
        machine.step(&mut input);
    }
    machine.check_places();
    machine.guests.lock().iter_mut().for_each(|g| *g = None);
    machine.reset(ResetKind::Cold);
    assert!(machine.dump() == pristine, "a reset leaves something");
    assert!(machine.memory.regions().is_empty());
    assert_eq!(machine.ports.regions().len(), 1); // CF8h
}
