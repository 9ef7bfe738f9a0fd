//! Q35 with an ICH9 south bridge.

use std::sync::Arc;

use chipset::{AcpiPm, Hpet, HpetPins, I8042, ResetControl};
use device_model::{Device, ResetKind};
use pci::lpc::{PIRQS, PM_DEFAULT_BASE};
use pci::{
    ConfigAccess, Devfn, ExpressType, Fabric, Lpc, Mch, PciBus, PciDevice, PciHandle, RootWindows,
};
use virtio::device::VirtioDevice;
use virtio::transport::{PciWiring, VirtioPci};

use super::core::Core;
use super::{Base, Board};
use crate::MachineError;
use crate::firmware::Platform;
use crate::memory_map::{ECAM, HIGH, PCI_MEMORY};

/// I/O APIC inputs of the eight PCI interrupt wires.
const PCI_GSI: usize = 16;
/// 8259 inputs that the wires lead to while an operating system does not use the I/O APIC, as PC firmware sets them.
const PIRQ_ROUTES: [u8; PIRQS] = [10, 10, 11, 11, 10, 10, 11, 11];
/// Port window for PCI, above all fixed ports.
const PCI_PORTS: std::ops::Range<u64> = 0xc000..0x1_0000;
/// Bytes of the 64-bit window for PCI memory.
const PCI_MEMORY_64: u64 = 64 << 30;
/// The chipset's own slot on the root bus.
const ICH9_SLOT: u8 = 31;
const GIB: u64 = 1 << 30;

/// The board.
pub(crate) struct Q35 {
    core: Core,
    base: Base,
    root: Arc<PciBus>,
    windows: RootWindows,
    pm: Arc<AcpiPm>,
    lpc: Arc<Lpc>,
    mch: Arc<Mch>,
    /// What keeps functions in place.
    functions: Vec<PciHandle>,
}

impl Q35 {
    /// Builds the board with its own devices.
    pub(crate) fn new(base: &Base, cpus: u32) -> Result<Self, MachineError> {
        let mut core = Core::new(base, cpus)?;
        let (ports, memory) = (core.ports.clone(), core.memory.clone());
        let isa = |n: usize| core.pins.isa[n].line();
        let hpet = hpet(&core, base);
        let power = base.power.clone();
        let pm = AcpiPm::new(base.clock.clone(), ports.clone(), isa(9), power.clone());
        let keyboard = I8042::new(isa(1), isa(12), power.clone());
        let reset_control = ResetControl::new(power);
        let lpc = lpc(&core, &pm);
        let fabric = Fabric {
            ports: ports.clone(),
            memory: memory.clone(),
            msi: core.messages.clone(),
        };
        let wires = lpc.clone();
        let root = PciBus::root(fabric, Arc::new(move |slot, pin| wires.intx(slot, pin)));
        let access = ConfigAccess::new(root.clone());
        let mch = Mch::new(access.clone(), memory.clone());
        core.regions.extend([
            access.claim_ports(&ports, reset_control.clone())?,
            hpet.attach(&memory)?,
            pm.attach()?,
        ]);
        core.regions.extend(keyboard.attach(&ports)?);
        let functions = vec![
            root.add(Devfn::new(0, 0), mch.clone() as Arc<dyn PciDevice>)?,
            root.add(Devfn::new(ICH9_SLOT, 0), lpc.clone() as Arc<dyn PciDevice>)?,
        ];
        let devices: [Arc<dyn Device>; 5] = [hpet, pm.clone(), keyboard, access, reset_control];
        core.devices.extend(devices);
        let first = base.map.high_end().max(HIGH).next_multiple_of(32 * GIB);
        let windows = RootWindows {
            io: PCI_PORTS,
            memory32: PCI_MEMORY,
            memory64: first..first + PCI_MEMORY_64,
        };
        Ok(Self {
            core,
            base: base.clone(),
            root,
            windows,
            pm,
            lpc,
            mch,
            functions,
        })
    }
}

fn hpet(core: &Core, base: &Base) -> Arc<Hpet> {
    let pins = HpetPins {
        legacy: [core.pins.isa[0].clone(), core.pins.isa[8].clone()],
        gsi: core.pins.gsi.clone(),
    };
    let (pit, rtc) = (core.pit.clone(), core.rtc.clone());
    let legacy = Box::new(move |replaced| {
        pit.set_replaced(replaced);
        rtc.set_replaced(replaced);
    });
    Hpet::new(base.clock.clone(), pins, core.messages.clone(), legacy)
}

fn lpc(core: &Core, pm: &Arc<AcpiPm>) -> Arc<Lpc> {
    let apic = std::array::from_fn(|n| core.pins.gsi[PCI_GSI + n].clone());
    // PCI interrupts may not go to the timer, keyboard, cascade, clock, mouse or coprocessor.
    let open = |n: usize| !matches!(n, 0 | 1 | 2 | 8 | 12 | 13);
    let isa = std::array::from_fn(|n| open(n).then(|| core.pins.isa[n].clone()));
    let pm = pm.clone();
    Lpc::new(&apic, isa, Box::new(move |place| pm.set_base(place)))
}

impl Board for Q35 {
    fn core(&self) -> &Core {
        &self.core
    }

    fn core_mut(&mut self) -> &mut Core {
        &mut self.core
    }

    /// Plugs the device into the first free slot of the root bus.
    fn plug(
        &mut self,
        name: String,
        device: Box<dyn VirtioDevice>,
        withheld: u64,
    ) -> Result<(), MachineError> {
        let wiring = PciWiring {
            memory: self.base.memory.clone(),
            doorbells: self.base.doorbells(),
            express: Some(ExpressType::RootIntegratedEndpoint),
            withheld,
        };
        let function = VirtioPci::new(name, device, wiring)?;
        self.functions
            .push(self.root.add_anywhere(1, function as Arc<dyn PciDevice>)?);
        Ok(())
    }

    fn platform(&self) -> Platform {
        Platform::Q35 {
            pci_memory_64: self.windows.memory64.clone(),
        }
    }

    fn reset(&self, kind: ResetKind) {
        self.root.reset(kind);
        self.core.reset(kind);
    }

    /// Configuration space, power management, PCI addresses.
    fn set_up_for_kernel(&self) -> Result<(), MachineError> {
        self.mch.enable_ecam(ECAM.start);
        self.lpc.preset(PM_DEFAULT_BASE, PIRQ_ROUTES);
        pci::assign(&self.root, &self.windows)?;
        Ok(())
    }

    fn press_power_button(&self) {
        self.pm.press_power_button();
    }
}
