//! `microvm`: virtio devices in memory space, hardware-reduced ACPI, and no PCI.

use std::sync::Arc;

use chipset::GenericEvents;
use device_model::ResetKind;
use virtio::device::VirtioDevice;
use virtio::transport::spec::mmio;
use virtio::transport::{MmioWiring, VirtioMmio};

use super::core::Core;
use super::{Base, Board};
use crate::MachineError;
use crate::firmware::{Platform, Transport};
use crate::memory_map::{GENERIC_EVENTS, VIRTIO_MMIO};

/// I/O APIC input of the generic events.
const EVENTS_GSI: usize = 9;
/// First I/O APIC input for virtio devices, and the number of inputs that they share.
const FIRST_GSI: usize = 16;
const GSIS: usize = 8;
/// Most virtio devices.
const MAX_DEVICES: usize = 32;

/// The board.
pub(crate) struct Microvm {
    core: Core,
    base: Base,
    events: Arc<GenericEvents>,
    transports: Vec<Transport>,
}

impl Microvm {
    /// Builds the board with its own devices.
    pub(crate) fn new(base: &Base, cpus: u32) -> Result<Self, MachineError> {
        let mut core = Core::new(base, cpus)?;
        let line = core.pins.gsi[EVENTS_GSI].line();
        let events = GenericEvents::new(line, base.power.clone());
        core.regions
            .push(events.attach(&core.memory, GENERIC_EVENTS)?);
        core.devices.push(events.clone());
        Ok(Self {
            core,
            base: base.clone(),
            events,
            transports: Vec::new(),
        })
    }
}

impl Board for Microvm {
    fn core(&self) -> &Core {
        &self.core
    }

    fn core_mut(&mut self) -> &mut Core {
        &mut self.core
    }

    fn plug(
        &mut self,
        name: String,
        device: Box<dyn VirtioDevice>,
        withheld: u64,
    ) -> Result<(), MachineError> {
        let number = self.transports.len();
        if number == MAX_DEVICES {
            let text = format!("--machine: microvm has room for {MAX_DEVICES} virtio devices");
            return Err(MachineError::Spec(text));
        }
        let gsi = FIRST_GSI + number % GSIS;
        let address = VIRTIO_MMIO + number as u64 * mmio::SIZE;
        let wiring = MmioWiring {
            memory: self.base.memory.clone(),
            doorbells: self.base.doorbells(),
            interrupt: self.core.pins.gsi[gsi].line(),
            withheld,
        };
        let device = VirtioMmio::new(&name, device, wiring)
            .map_err(|e| MachineError::host(format!("event descriptors for {name}"), e))?;
        self.core
            .regions
            .push(device.attach(&self.core.memory, address)?);
        self.core.devices.push(device);
        self.transports.push(Transport {
            address,
            gsi: gsi as u32,
        });
        Ok(())
    }

    fn platform(&self) -> Platform {
        Platform::Microvm {
            transports: self.transports.clone(),
        }
    }

    fn reset(&self, kind: ResetKind) {
        self.core.reset(kind);
    }

    fn set_up_for_kernel(&self) -> Result<(), MachineError> {
        Ok(())
    }

    fn press_power_button(&self) {
        self.events.press_power_button();
    }
}
