//! What all boards have of the PC: buses, interrupt controllers, timer, clock, serial ports, panic device.

use std::sync::Arc;
use std::time::Duration;

use chipset::serial::PC_PORTS;
use chipset::{
    CmosConfig, DebugConsole, DmaPages, InterruptPins, IoApic, Pic, Pit, PvPanic, Rtc, Serial,
};
use device_model::{CharBackend, Device, IoBus, IoRegion, IrqPin, IrqSink, MsiSink, ResetKind};

use super::Base;
use crate::MachineError;
use crate::io::{Controllers, Processor};
use crate::memory_map::HIGH;

/// The 8259 pair's output, which ends in LINT0 of the bootstrap processor.
struct ExtInt(Arc<dyn accel::Vm>);

impl IrqSink for ExtInt {
    fn set_level(&self, _pin: u32, high: bool) {
        self.0.set_extint(high);
    }
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

/// The common part of every board.
pub(crate) struct Core {
    pub(super) ports: IoBus,
    pub(super) memory: IoBus,
    pub(super) messages: Arc<dyn MsiSink>,
    pub(super) pins: InterruptPins,
    pub(super) pit: Arc<Pit>,
    pub(super) rtc: Arc<Rtc>,
    interrupts: Arc<Interrupts>,
    /// What stands behind the serial ports.
    serials: Vec<Arc<dyn CharBackend>>,
    /// What stands behind the debug console's port.
    debug_console: Option<Arc<dyn CharBackend>>,
    /// Everything that a reset resets before the interrupt controllers.
    pub(super) devices: Vec<Arc<dyn Device>>,
    /// What keeps registers in place.
    pub(super) regions: Vec<IoRegion>,
}

impl Core {
    pub(super) fn new(base: &Base, cpus: u32) -> Result<Self, MachineError> {
        let (ports, memory) = (IoBus::ports(), IoBus::memory());
        let messages: Arc<dyn MsiSink> = Arc::new(Processor(base.vm.clone()));
        let pic = Pic::new(IrqPin::new(Arc::new(ExtInt(base.vm.clone())), 0).line());
        let ioapic = IoApic::new(messages.clone());
        let pins = InterruptPins::new(&pic, &ioapic);
        let pit = Pit::new(base.clock.clone(), pins.isa[0].line());
        let config = CmosConfig {
            ram_below_4g: base.map.low_end(),
            ram_above_4g: base.map.high_end().saturating_sub(HIGH),
            cpus,
            utc_offset: 0,
        };
        let rtc = Rtc::new(base.clock.clone(), pins.isa[8].line(), config);
        let pages = DmaPages::new();
        let panic = PvPanic::new(base.power.clone());
        let mut regions = vec![
            ioapic.attach(&memory)?,
            rtc.attach(&ports)?,
            pages.attach(&ports)?,
            panic.attach(&ports)?,
        ];
        regions.extend(pic.attach(&ports)?);
        regions.extend(pit.attach(&ports)?);
        Ok(Self {
            ports,
            memory,
            messages,
            pins,
            devices: vec![pit.clone(), rtc.clone(), pages, panic],
            pit,
            rtc,
            interrupts: Arc::new(Interrupts { pic, ioapic }),
            serials: Vec::new(),
            debug_console: None,
            regions,
        })
    }

    /// Adds serial port COM1 and on.
    pub(super) fn add_serial(&mut self, backend: Arc<dyn CharBackend>) -> Result<(), MachineError> {
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

    /// Adds the debug console's port, 402h.
    pub(super) fn add_debug_console(
        &mut self,
        backend: Arc<dyn CharBackend>,
    ) -> Result<(), MachineError> {
        let console = DebugConsole::new(backend.clone());
        self.regions.push(console.attach(&self.ports)?);
        self.devices.push(console);
        self.debug_console = Some(backend);
        Ok(())
    }

    /// Numbers of the serial ports that there are, from 1.
    pub(super) fn serial_ports(&self) -> Vec<u8> {
        (1..=self.serials.len() as u8).collect()
    }

    pub(super) fn controllers(&self) -> Arc<dyn Controllers> {
        self.interrupts.clone()
    }

    pub(super) fn reset(&self, kind: ResetKind) {
        self.devices.iter().for_each(|device| device.reset(kind));
        // Last, so that lines which fall as the devices reset leave nothing behind.
        self.interrupts.pic.reset(kind);
        self.interrupts.ioapic.reset(kind);
    }

    /// Waits, at most for a while, until the output of serial ports and debug console has reached the host.
    pub(super) fn drain(&self, at_most: Duration) {
        for backend in self.serials.iter().chain(&self.debug_console) {
            backend.drain(at_most);
        }
    }
}
