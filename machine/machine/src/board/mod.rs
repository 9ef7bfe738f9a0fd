//! Boards: which devices there are, and how they are wired.

mod core;
mod microvm;
mod peripherals;
mod q35;

use std::sync::Arc;
use std::time::Duration;

use accel::Vm;
use device_model::{CharBackend, Doorbells, IoBus, PowerControl, ResetKind};
use guest_clock::GuestClock;
use guest_memory::GuestMemory;
use virtio::device::VirtioDevice;
use vm_spec::{MachineType, VmSpec};

use crate::MachineError;
use crate::firmware::Platform;
use crate::io::{Controllers, Processor};
use crate::memory_map::MemoryMap;
use core::Core;
use microvm::Microvm;
pub(crate) use peripherals::{Controls, Peripherals};
use q35::Q35;

/// What every board is built on.
#[derive(Clone)]
pub(crate) struct Base {
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) memory: GuestMemory,
    pub(crate) clock: GuestClock,
    pub(crate) power: Arc<dyn PowerControl>,
    pub(crate) map: MemoryMap,
}

impl Base {
    /// The processor's short cut for doorbells.
    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        Some(Arc::new(Processor(self.vm.clone())))
    }
}

/// A board.
pub(crate) trait Board {
    fn core(&self) -> &Core;
    fn core_mut(&mut self) -> &mut Core;

    /// Adds a virtio device, in the board's own way. `withheld` are features that it does not offer though it has them.
    ///
    /// # Errors
    /// When there is no room for it.
    fn plug(
        &mut self,
        name: String,
        device: Box<dyn VirtioDevice>,
        withheld: u64,
    ) -> Result<(), MachineError>;

    /// What ACPI is to say of it.
    fn platform(&self) -> Platform;

    /// Resets every device.
    fn reset(&self, kind: ResetKind);

    /// Does what firmware would have done before a kernel.
    ///
    /// # Errors
    /// When there is no room for the devices.
    fn set_up_for_kernel(&self) -> Result<(), MachineError>;

    /// Presses the power button.
    fn press_power_button(&self);

    /// Adds serial port COM1 and on.
    fn add_serial(&mut self, backend: Arc<dyn CharBackend>) -> Result<(), MachineError> {
        self.core_mut().add_serial(backend)
    }

    /// Adds the debug console's port.
    fn add_debug_console(&mut self, backend: Arc<dyn CharBackend>) -> Result<(), MachineError> {
        self.core_mut().add_debug_console(backend)
    }

    /// Numbers of the serial ports that there are, from 1.
    fn serial_ports(&self) -> Vec<u8> {
        self.core().serial_ports()
    }

    /// The port space.
    fn ports(&self) -> IoBus {
        self.core().ports.clone()
    }

    /// The memory space of devices.
    fn memory(&self) -> IoBus {
        self.core().memory.clone()
    }

    /// The interrupt controllers.
    fn controllers(&self) -> Arc<dyn Controllers> {
        self.core().controllers()
    }

    /// Waits, at most for a while, until serial output has reached the host.
    fn drain(&self, at_most: Duration) {
        self.core().drain(at_most);
    }
}

/// Builds the board that the specification names, with its own devices.
///
/// # Errors
/// When devices are in one another's way.
pub(crate) fn build(base: &Base, spec: &VmSpec) -> Result<Box<dyn Board>, MachineError> {
    Ok(match spec.machine {
        MachineType::Q35 => Box::new(Q35::new(base, spec.cpus)?),
        MachineType::Microvm => Box::new(Microvm::new(base, spec.cpus)?),
    })
}

/// Whether a machine has PCI Express.
pub(crate) fn has_pci(machine: MachineType) -> bool {
    match machine {
        MachineType::Q35 => true,
        MachineType::Microvm => false,
    }
}
