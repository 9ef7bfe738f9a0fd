//! The LPC bridge of ICH9, function 00:1f.0: interrupt routing and the bases of power management and of the chipset's registers.
//!
//! Intel I/O Controller Hub 9 datasheet (document 316972), chapters 13.1 and 5.8.

use std::sync::Arc;

use device_model::{Device, IrqLine, IrqPin, IrqSink, ResetKind};
use parking_lot::Mutex;

use crate::builder::{FunctionBuilder, Identity};
use crate::function::{PciDevice, PciFunction};

/// Registers of the LPC bridge.
pub mod spec {
    /// Base of the power management ports, 32 bits.
    pub const PMBASE: u16 = 0x40;
    /// ACPI control, 8 bits.
    pub const ACPI_CNTL: u16 = 0x44;
    /// GPIO base, 32 bits.
    pub const GPIOBASE: u16 = 0x48;
    /// GPIO control, 8 bits.
    pub const GC: u16 = 0x4c;
    /// Routing of PIRQA# to PIRQD#, 8 bits each.
    pub const PIRQA_ROUT: u16 = 0x60;
    /// Serial interrupt control, 8 bits.
    pub const SIRQ_CNTL: u16 = 0x64;
    /// Routing of PIRQE# to PIRQH#, 8 bits each.
    pub const PIRQE_ROUT: u16 = 0x68;
    /// I/O decode ranges, 16 bits.
    pub const LPC_IO_DEC: u16 = 0x80;
    /// LPC interface enables, 16 bits.
    pub const LPC_EN: u16 = 0x82;
    /// General power management configuration 1, 16 bits.
    pub const GEN_PMCON_1: u16 = 0xa0;
    /// BIOS control, 8 bits.
    pub const BIOS_CNTL: u16 = 0xdc;
    /// Base of the root complex registers, 32 bits.
    pub const RCBA: u16 = 0xf0;

    /// ACPI_CNTL: the power management ports are on.
    pub const ACPI_EN: u8 = 1 << 7;
    /// PMBASE: bits of the address.
    pub const PMBASE_ADDRESS: u16 = 0xff80;
    /// PIRQx_ROUT: not routed to the 8259s.
    pub const ROUT_OFF: u8 = 1 << 7;
    /// PIRQx_ROUT: the 8259 input.
    pub const ROUT_IRQ: u8 = 0x0f;
}

/// How many interrupt request wires there are for PCI: PIRQA# to PIRQH#.
pub const PIRQS: usize = 8;

/// Where the PC's firmware puts the power management ports.
pub const PM_DEFAULT_BASE: u16 = 0x600;

/// Which wire (0 for PIRQA# to 7 for PIRQH#) pin `pin` (0 for INTA#) of slot `slot` on the root bus is on. ACPI tables must say
/// the same: slots 0 to 24 and 30 rotate over E to H; the chipset's own slots 25 to 29 and 31 use A to D.
pub fn pirq_of(slot: u8, pin: u8) -> usize {
    match slot {
        25..=29 | 31 => usize::from(pin % 4),
        _ => 4 + usize::from((slot + pin) % 4),
    }
}

/// Hears where the power management ports are to be.
pub type PmBaseSink = Box<dyn Fn(Option<u16>) + Send + Sync>;

/// The inputs of the eight wires: each drives its I/O APIC input and, as routed, an 8259 input.
struct Router {
    /// To the I/O APIC's inputs 16 to 23.
    apic: [IrqLine; PIRQS],
    isa: [Option<IrqPin>; 16],
    state: Mutex<RouterState>,
}

#[derive(Default)]
struct RouterState {
    high: [bool; PIRQS],
    /// The line to the 8259 input that the wire is routed to, with the input's number.
    routed: [Option<(u8, IrqLine)>; PIRQS],
}

impl IrqSink for Router {
    fn set_level(&self, pin: u32, high: bool) {
        let pin = pin as usize % PIRQS;
        let mut state = self.state.lock();
        state.high[pin] = high;
        self.apic[pin].set(high);
        if let Some((_, line)) = &state.routed[pin] {
            line.set(high);
        }
    }
}

impl Router {
    fn route(&self, routes: [u8; PIRQS]) {
        let mut state = self.state.lock();
        let RouterState { high, routed } = &mut *state;
        for ((route, high), routed) in routes.iter().zip(high).zip(routed) {
            let wanted = (route & spec::ROUT_OFF == 0).then_some(route & spec::ROUT_IRQ);
            if routed.as_ref().map(|(irq, _)| *irq) == wanted {
                continue;
            }
            *routed = wanted.and_then(|irq| {
                let line = self.isa[usize::from(irq)].as_ref()?.line();
                line.set(*high);
                Some((irq, line))
            });
        }
    }
}

/// The LPC bridge.
pub struct Lpc {
    function: PciFunction,
    router: Arc<Router>,
    pirqs: Vec<IrqPin>,
    pm_base: PmBaseSink,
    last_pm_base: Mutex<Option<u16>>,
}

impl Lpc {
    /// An LPC bridge whose wires end in the I/O APIC inputs `apic` (16 to 23) and, as the guest routes them, in the ISA
    /// inputs `isa` (0 to 15; `None` where PCI may not go). `pm_base` hears of moves of the power management ports.
    pub fn new(
        apic: &[IrqPin; PIRQS],
        isa: [Option<IrqPin>; 16],
        pm_base: PmBaseSink,
    ) -> Arc<Self> {
        let id = Identity {
            vendor: 0x8086,
            device: 0x2918,
            class: 0x06_0100,
            revision: 2,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        };
        let mut builder = FunctionBuilder::new("lpc", id);
        let config = builder.config();
        config.define(spec::PMBASE, &[1]);
        config.allow(spec::PMBASE, &spec::PMBASE_ADDRESS.to_le_bytes());
        config.allow(spec::ACPI_CNTL, &[0x87]);
        config.define(spec::GPIOBASE, &[1]);
        config.allow(spec::GPIOBASE, &[0x80, 0xff, 0, 0, 0x11]);
        for at in [spec::PIRQA_ROUT, spec::PIRQE_ROUT] {
            config.define(at, &[spec::ROUT_OFF; 4]);
            config.allow(at, &[0x8f; 4]);
        }
        config.define(spec::SIRQ_CNTL, &[0x10]);
        config.allow(spec::SIRQ_CNTL, &[0xc3]);
        config.allow(spec::LPC_IO_DEC, &[0x77, 0x13, 0x0f, 0x3f]);
        config.allow(spec::GEN_PMCON_1, &[0xff, 0x07, 0xff, 0, 0xff, 0]);
        config.allow(spec::BIOS_CNTL, &[0x1f]);
        config.allow(spec::RCBA, &0xffff_c001u32.to_le_bytes());
        let router = Arc::new(Router {
            apic: std::array::from_fn(|n| apic[n].line()),
            isa,
            state: Mutex::default(),
        });
        let pirqs = (0..PIRQS as u32)
            .map(|n| IrqPin::new(router.clone(), n))
            .collect();
        Arc::new(Self {
            function: builder.build(),
            router,
            pirqs,
            pm_base,
            last_pm_base: Mutex::new(None),
        })
    }

    /// The wire that a pin of a slot on the root bus is on; see [`pirq_of`].
    pub fn intx(&self, slot: u8, pin: u8) -> IrqPin {
        self.pirqs[pirq_of(slot, pin)].clone()
    }

    /// Does what firmware does first: puts the power management ports at `base` and turns them on, and routes the
    /// wires to the given 8259 inputs. A machine that boots a kernel without firmware calls this after each reset.
    pub fn preset(&self, base: u16, routes: [u8; PIRQS]) {
        self.function.change_config(|c| {
            c.set(
                spec::PMBASE,
                &(base & spec::PMBASE_ADDRESS | 1).to_le_bytes(),
            );
            c.set(spec::ACPI_CNTL, &[spec::ACPI_EN]);
            c.set(spec::PIRQA_ROUT, &routes[..4]);
            c.set(spec::PIRQE_ROUT, &routes[4..]);
        });
        self.sync();
    }

    fn sync(&self) {
        let (base, routes) = self.function.config(|c| {
            let on = c.u8(spec::ACPI_CNTL) & spec::ACPI_EN != 0;
            let mut routes = [0; PIRQS];
            c.read(spec::PIRQA_ROUT, &mut routes[..4]);
            c.read(spec::PIRQE_ROUT, &mut routes[4..]);
            let base = c.u16(spec::PMBASE) & spec::PMBASE_ADDRESS;
            (Some(base).filter(|b| on && *b != 0), routes)
        });
        self.router.route(routes);
        let mut last = self.last_pm_base.lock();
        if *last != base {
            *last = base;
            (self.pm_base)(base);
        }
    }
}

impl Device for Lpc {
    fn name(&self) -> String {
        "lpc".into()
    }

    fn reset(&self, _kind: ResetKind) {
        self.function.reset();
        self.sync();
    }
}

impl PciDevice for Lpc {
    fn function(&self) -> &PciFunction {
        &self.function
    }
    fn bar_read(&self, _bar: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn bar_write(&self, _bar: usize, _offset: u64, _data: &[u8]) {}
    fn bar_moved(&self, _bar: usize, _address: Option<u64>) {}
    fn config_written(&self, _offset: u16, _len: usize) {
        self.sync();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::config_write;
    use crate::testing::Nowhere;

    #[test]
    fn wires_go_to_both_controllers_as_routed() {
        let pin = |n| IrqPin::new(Arc::new(Nowhere), n);
        let apic: [IrqPin; 8] = std::array::from_fn(|n| pin(16 + n as u32));
        let isa: [IrqPin; 16] = std::array::from_fn(|n| pin(n as u32));
        let bases = Arc::new(Mutex::new(Vec::new()));
        let log = bases.clone();
        let lpc = Lpc::new(
            &apic,
            isa.clone().map(Some),
            Box::new(move |base| log.lock().push(base)),
        );
        let line = lpc.intx(2, 0).line(); // PIRQG#
        line.set(true);
        assert!(apic[6].is_high());
        assert!(isa.iter().all(|p| !p.is_high()));
        lpc.preset(PM_DEFAULT_BASE, [10, 10, 11, 11, 10, 10, 11, 11]);
        assert!(isa[11].is_high());
        config_write(lpc.as_ref(), spec::PIRQE_ROUT + 2, &[5]);
        assert!(isa[5].is_high() && !isa[11].is_high());
        lpc.reset(ResetKind::Warm);
        assert!(!isa[5].is_high() && apic[6].is_high());
        assert_eq!(*bases.lock(), [Some(0x600), None]);
    }
}
