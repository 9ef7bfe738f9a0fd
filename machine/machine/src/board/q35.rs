//! Q35 with an ICH9 south bridge.

use std::sync::Arc;
use std::time::Duration;

use chipset::serial::PC_PORTS;
use chipset::{
    AcpiPm, CmosConfig, DmaPages, Hpet, HpetPins, I8042, InterruptPins, IoApic, Pic, Pit, PvPanic,
    ResetControl, Rtc, Serial,
};
use device_model::{CharBackend, Device, IoBus, IoRegion, IrqPin, IrqSink, MsiSink, ResetKind};
use pci::lpc::{PIRQS, PM_DEFAULT_BASE};
use pci::{ConfigAccess, Devfn, Fabric, Lpc, Mch, PciBus, PciDevice, PciHandle, RootWindows};

use super::Base;
use crate::MachineError;
use crate::io::{Controllers, Processor};
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
    pub(crate) ports: IoBus,
    pub(crate) memory: IoBus,
    root: Arc<PciBus>,
    windows: RootWindows,
    pm: Arc<AcpiPm>,
    lpc: Arc<Lpc>,
    mch: Arc<Mch>,
    interrupts: Arc<Interrupts>,
    /// What stands behind the serial ports.
    serials: Vec<Arc<dyn CharBackend>>,
    pins: InterruptPins,
    /// Everything that a reset resets, besides what is on the PCI bus.
    devices: Vec<Arc<dyn Device>>,
    /// What keeps registers and functions in place.
    regions: Vec<IoRegion>,
    functions: Vec<PciHandle>,
}

/// The interrupt controllers.
struct Interrupts {
    pic: Arc<Pic>,
    ioapic: Arc<IoApic>,
}

impl Controllers for Interrupts {
    fn acknowledge(&self) -> Option<u8> {
        self.pic.acknowledge()
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.ioapic.end_of_interrupt(vector);
    }
}

/// The 8259 pair's output, which ends in LINT0 of the bootstrap processor.
struct ExtInt(Arc<dyn accel::Vm>);

impl IrqSink for ExtInt {
    fn set_level(&self, _pin: u32, high: bool) {
        self.0.set_extint(high);
    }
}

impl Q35 {
    /// Builds the board with its own devices.
    pub(crate) fn new(base: &Base, cpus: u32) -> Result<Self, MachineError> {
        let (ports, memory) = (IoBus::ports(), IoBus::memory());
        let messages: Arc<dyn MsiSink> = Arc::new(Processor(base.vm.clone()));
        let pic = Pic::new(IrqPin::new(Arc::new(ExtInt(base.vm.clone())), 0).line());
        let ioapic = IoApic::new(messages.clone());
        let pins = InterruptPins::new(&pic, &ioapic);
        let isa = |n: usize| pins.isa[n].line();

        let pit = Pit::new(base.clock.clone(), isa(0));
        let config = CmosConfig {
            ram_below_4g: base.map.low_end(),
            ram_above_4g: base.map.high_end().saturating_sub(HIGH),
            cpus,
            utc_offset: 0,
        };
        let rtc = Rtc::new(base.clock.clone(), isa(8), config);
        let hpet = {
            let pins = HpetPins {
                legacy: [pins.isa[0].clone(), pins.isa[8].clone()],
                gsi: pins.gsi.clone(),
            };
            let (pit, rtc) = (pit.clone(), rtc.clone());
            let legacy = Box::new(move |replaced| {
                pit.set_replaced(replaced);
                rtc.set_replaced(replaced);
            });
            Hpet::new(base.clock.clone(), pins, messages.clone(), legacy)
        };
        let power = base.power.clone();
        let pm = AcpiPm::new(base.clock.clone(), ports.clone(), isa(9), power.clone());
        let keyboard = I8042::new(isa(1), isa(12), power.clone());
        let reset_control = ResetControl::new(power.clone());
        let pages = DmaPages::new();
        let panic = PvPanic::new(power);

        let lpc = {
            let apic = std::array::from_fn(|n| pins.gsi[PCI_GSI + n].clone());
            // PCI interrupts may not go to the timer, keyboard, cascade, clock, mouse or coprocessor.
            let open = |n: usize| !matches!(n, 0 | 1 | 2 | 8 | 12 | 13);
            let isa = std::array::from_fn(|n| open(n).then(|| pins.isa[n].clone()));
            let pm = pm.clone();
            Lpc::new(&apic, isa, Box::new(move |place| pm.set_base(place)))
        };
        let fabric = Fabric {
            ports: ports.clone(),
            memory: memory.clone(),
            msi: messages,
        };
        let wires = lpc.clone();
        let root = PciBus::root(fabric, Arc::new(move |slot, pin| wires.intx(slot, pin)));
        let access = ConfigAccess::new(root.clone());
        let mch = Mch::new(access.clone(), memory.clone());

        let mut regions = vec![
            access.claim_ports(&ports, reset_control.clone())?,
            ioapic.attach(&memory)?,
            hpet.attach(&memory)?,
            rtc.attach(&ports)?,
            pm.attach()?,
            pages.attach(&ports)?,
            panic.attach(&ports)?,
        ];
        regions.extend(pic.attach(&ports)?);
        regions.extend(pit.attach(&ports)?);
        regions.extend(keyboard.attach(&ports)?);
        let functions = vec![
            root.add(Devfn::new(0, 0), mch.clone() as Arc<dyn PciDevice>)?,
            root.add(Devfn::new(ICH9_SLOT, 0), lpc.clone() as Arc<dyn PciDevice>)?,
        ];
        let devices: Vec<Arc<dyn Device>> = vec![
            pit,
            rtc,
            hpet,
            pm.clone(),
            keyboard,
            access,
            reset_control,
            pages,
            panic,
        ];
        let first = base.map.high_end().max(HIGH).next_multiple_of(32 * GIB);
        let windows = RootWindows {
            io: PCI_PORTS,
            memory32: PCI_MEMORY,
            memory64: first..first + PCI_MEMORY_64,
        };
        let interrupts = Arc::new(Interrupts { pic, ioapic });
        let serials = Vec::new();
        Ok(Self {
            ports,
            memory,
            root,
            windows,
            pm,
            lpc,
            mch,
            interrupts,
            serials,
            pins,
            devices,
            regions,
            functions,
        })
    }

    /// Adds serial port COM1 and on.
    pub(crate) fn add_serial(&mut self, backend: Arc<dyn CharBackend>) -> Result<(), MachineError> {
        let number = self.serials.len();
        let Some((base, irq)) = PC_PORTS.get(number) else {
            return Err(MachineError::Spec(
                "--serial: a machine has four serial ports".into(),
            ));
        };
        let name = format!("serial{number}");
        let serial = Serial::new(&name, self.pins.isa[*irq].line(), backend.clone());
        self.regions.push(serial.attach(&self.ports, *base)?);
        self.devices.push(serial);
        self.serials.push(backend);
        Ok(())
    }

    /// Plugs a function into the first free slot of the root bus.
    pub(crate) fn plug(&mut self, device: Arc<dyn PciDevice>) -> Result<(), MachineError> {
        self.functions.push(self.root.add_anywhere(1, device)?);
        Ok(())
    }

    /// Numbers of the serial ports that there are, from 1.
    pub(crate) fn serial_ports(&self) -> Vec<u8> {
        (1..=self.serials.len() as u8).collect()
    }

    /// The window for 64-bit PCI memory.
    pub(crate) fn pci_memory_64(&self) -> std::ops::Range<u64> {
        self.windows.memory64.clone()
    }

    pub(crate) fn controllers(&self) -> Arc<dyn Controllers> {
        self.interrupts.clone()
    }

    /// Resets every device.
    pub(crate) fn reset(&self, kind: ResetKind) {
        self.root.reset(kind);
        self.devices.iter().for_each(|device| device.reset(kind));
        // Last, so that lines which fall as the devices reset leave nothing behind.
        self.interrupts.pic.reset(kind);
        self.interrupts.ioapic.reset(kind);
    }

    /// Does what firmware would have done before a kernel: configuration space, power management, PCI addresses.
    ///
    /// # Errors
    /// When the PCI windows are too small for the devices.
    pub(crate) fn set_up_for_kernel(&self) -> Result<(), MachineError> {
        self.mch.enable_ecam(ECAM.start);
        self.lpc.preset(PM_DEFAULT_BASE, PIRQ_ROUTES);
        pci::assign(&self.root, &self.windows)?;
        Ok(())
    }

    /// Presses the power button.
    pub(crate) fn press_power_button(&self) {
        self.pm.press_power_button();
    }

    /// Waits, at most for a while, until serial output has reached the host.
    pub(crate) fn drain(&self, at_most: Duration) {
        for backend in &self.serials {
            backend.drain(at_most);
        }
    }
}
