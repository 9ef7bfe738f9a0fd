//! A PCI hierarchy with something of everything, for tests that torment it: the chipset's functions, root ports, a bridge, cards.

use std::sync::Arc;

use device_model::{Device, IoBus, IoHandler, IoRegion, IrqPin, ResetKind, Widths};
use pci::lpc::{PIRQS, PM_DEFAULT_BASE};
use pci::{
    Bar, BarKind, ConfigAccess, Devfn, ExpressType, Fabric, FunctionBuilder, Identity, Lpc, Mch,
    PciBridge, PciBus, PciDevice, PciError, PciFunction, PciHandle, RootPort, RootWindows, assign,
};

use crate::registers::Ends;

/// A card with every kind of register, both kinds of messages and PCI Express.
pub struct Card(pub PciFunction);

impl Card {
    /// A card of this name.
    pub fn new(name: &str) -> Arc<Self> {
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

/// The hierarchy.
pub struct Machine {
    pub ports: IoBus,
    pub memory: IoBus,
    pub root: Arc<PciBus>,
    pub mch: Arc<Mch>,
    pub lpc: Arc<Lpc>,
    pub access: Arc<ConfigAccess>,
    pub slot: Arc<RootPort>,
    pub cards: Vec<Arc<Card>>,
    _handles: Vec<PciHandle>,
    _config: IoRegion,
}

/// What every place is before something is put there.
pub const FREE: &str = "a free slot";

impl Machine {
    /// The hierarchy, before firmware has been there.
    pub fn new() -> Self {
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
            _handles: handles,
        }
    }

    /// Resets everything.
    pub fn reset(&self, kind: ResetKind) {
        self.root.reset(kind);
        self.access.reset(kind);
    }

    /// As firmware leaves it, with `room` MiB for memory below 4 GiB. With too little for all cards giving it out fails half way.
    ///
    /// # Errors
    /// When it does.
    pub fn set_up(&self, room: u64) -> Result<(), PciError> {
        let windows = RootWindows {
            io: 0x6000..0x1_0000,
            memory32: 0xc000_0000..0xc000_0000 + (room << 20),
            memory64: 1 << 41..1 << 47,
        };
        let assigned = assign(&self.root, &windows);
        self.mch.enable_ecam(0xb000_0000);
        self.lpc.preset(PM_DEFAULT_BASE, [10; PIRQS]);
        assigned
    }

    /// All configuration space of the functions that stay.
    pub fn dump(&self) -> Vec<u8> {
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
    pub fn check_places(&self) {
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
