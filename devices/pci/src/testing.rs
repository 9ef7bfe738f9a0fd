//! A board and a card for the crate's tests.

use std::sync::Arc;

use device_model::{Device, IoBus, IrqPin, IrqSink, MsiSink, ResetKind, Widths};
use parking_lot::Mutex;

use crate::address::Devfn;
use crate::builder::{Bar, BarKind, FunctionBuilder, Identity};
use crate::bus::{Fabric, PciBus, PciHandle};
use crate::function::{PciDevice, PciFunction};

pub(crate) struct Nowhere;
impl IrqSink for Nowhere {
    fn set_level(&self, _pin: u32, _high: bool) {}
}

struct Messages(Arc<Mutex<Vec<(u64, u32)>>>);
impl MsiSink for Messages {
    fn send(&self, address: u64, data: u32) {
        self.0.lock().push((address, data));
    }
}

/// A root bus whose slots' pins are wired rotated to four interrupt pins.
pub(crate) struct Board {
    pub(crate) ports: IoBus,
    pub(crate) memory: IoBus,
    pub(crate) pins: Vec<IrqPin>,
    pub(crate) messages: Arc<Mutex<Vec<(u64, u32)>>>,
    pub(crate) bus: Arc<PciBus>,
}

impl Board {
    pub(crate) fn new() -> Self {
        let (ports, memory) = (IoBus::ports(), IoBus::memory());
        let pins: Vec<IrqPin> = (0..4).map(|n| IrqPin::new(Arc::new(Nowhere), n)).collect();
        let messages = Arc::default();
        let fabric = Fabric {
            ports: ports.clone(),
            memory: memory.clone(),
            msi: Arc::new(Messages(Arc::clone(&messages))),
        };
        let wired = pins.clone();
        let bus = PciBus::root(
            fabric,
            Arc::new(move |slot, pin| wired[usize::from((slot + pin) % 4)].clone()),
        );
        Self {
            ports,
            memory,
            pins,
            messages,
            bus,
        }
    }

    pub(crate) fn plug_card(&self, slot: u8) -> (Arc<Card>, PciHandle) {
        let card = Arc::new(Card::new());
        let handle = self.bus.add(Devfn::new(slot, 0), card.clone()).unwrap();
        (card, handle)
    }
}

/// A card with one register of each kind and two MSI messages. Its bytes read as the low byte of their access's offset.
pub(crate) struct Card {
    function: PciFunction,
    pub(crate) moves: Mutex<Vec<(usize, Option<u64>)>>,
}

impl Card {
    pub(crate) fn new() -> Self {
        let bar = |kind, size| Bar {
            kind,
            size,
            widths: Widths::ANY,
        };
        let id = Identity {
            vendor: 0x1234,
            device: 0x5678,
            class: 0x02_0000,
            ..Default::default()
        };
        let function = FunctionBuilder::new("card", id)
            .bar(0, bar(BarKind::Memory32 { prefetchable: true }, 0x1000))
            .and_then(|b| b.bar(1, bar(BarKind::Io, 0x20)))
            .and_then(|b| {
                b.bar(
                    2,
                    bar(
                        BarKind::Memory64 {
                            prefetchable: false,
                        },
                        0x4000,
                    ),
                )
            })
            .unwrap()
            .msi(2)
            .power_management()
            .interrupt_pin(1)
            .build();
        Self {
            function,
            moves: Mutex::default(),
        }
    }
}

impl Device for Card {
    fn name(&self) -> String {
        "card".into()
    }
    fn reset(&self, _kind: ResetKind) {
        self.function.reset();
    }
}

impl PciDevice for Card {
    fn function(&self) -> &PciFunction {
        &self.function
    }
    fn bar_read(&self, _bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }
    fn bar_write(&self, _bar: usize, _offset: u64, _data: &[u8]) {}
    fn bar_moved(&self, bar: usize, address: Option<u64>) {
        self.moves.lock().push((bar, address));
    }
    fn config_written(&self, _offset: u16, _len: usize) {}
}
