//! A device with what every transport puts before it: the registers, the signals to its driver and the queues' doorbells.

use std::io;
use std::sync::Arc;

use guest_memory::GuestMemory;
use parking_lot::{Mutex, MutexGuard};
use vmm_sys_util::eventfd::EventFd;

use super::registers::Registers;
use super::signals::{FunctionInterrupts, Signals};
use crate::device::VirtioDevice;
use crate::doorbell;
use crate::spec::Status;

/// How a device is doing, for people and monitors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceStatus {
    /// Its status register.
    pub status: Status,
    /// What went wrong last.
    pub failure: Option<String>,
}

/// What a transport gives access to. Doorbells and signals take no lock; the rest takes the registers' lock, under which the device
/// itself is called.
pub(super) struct Frontend {
    registers: Mutex<Registers>,
    pub(super) signals: Arc<Signals>,
    doorbells: Arc<Vec<EventFd>>,
}

impl Frontend {
    /// `vectors` is the number of MSI-X vectors that the function has; `withheld` are features that are not offered though device
    /// and transport have them.
    pub(super) fn new(
        memory: GuestMemory,
        device: Box<dyn VirtioDevice>,
        interrupts: Arc<dyn FunctionInterrupts>,
        vectors: u16,
        withheld: u64,
    ) -> io::Result<Self> {
        let queues = device.queue_sizes().len();
        let doorbells: io::Result<Vec<EventFd>> =
            (0..queues).map(|_| doorbell::new_event()).collect();
        let doorbells = Arc::new(doorbells?);
        let signals = Arc::new(Signals::new(interrupts, queues));
        let registers = Registers::new(
            memory,
            device,
            signals.clone(),
            doorbells.clone(),
            vectors,
            withheld,
        );
        Ok(Self {
            registers: Mutex::new(registers),
            signals,
            doorbells,
        })
    }

    pub(super) fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock()
    }

    /// Resets the device. When this returns, nothing of it touches guest memory.
    pub(super) fn reset(&self) {
        self.registers().reset();
    }

    pub(super) fn status(&self) -> DeviceStatus {
        DeviceStatus {
            status: self.registers().status(),
            failure: self.signals.failure(),
        }
    }

    /// The queues' doorbells, in the order of the queues.
    pub(super) fn doorbells(&self) -> impl Iterator<Item = (u64, &EventFd)> {
        (0..).zip(self.doorbells.iter())
    }

    /// Rings a queue's doorbell; one that there is not has none.
    pub(super) fn ring(&self, queue: u64) {
        let event = usize::try_from(queue).ok();
        if let Some(event) = event.and_then(|queue| self.doorbells.get(queue)) {
            // Fails only when the counter would overflow: it is signalled then.
            let _ = event.write(1);
        }
    }
}
