//! The memory space of a modern virtio device (section 4.1.4): four structures in one base address register.

use std::io;
use std::sync::Arc;

use device_model::{IoHandler, Widths};
use guest_memory::GuestMemory;
use parking_lot::Mutex;
use vmm_sys_util::eventfd::EventFd;

use super::registers::Registers;
use super::signals::{FunctionInterrupts, Signals};
use super::spec::common;
use crate::device::VirtioDevice;
use crate::doorbell;
use crate::spec::Status;

/// Where the structures lie.
pub(super) mod layout {
    /// Common configuration.
    pub(in crate::transport) const COMMON: u64 = 0;
    /// ISR status.
    pub(in crate::transport) const ISR: u64 = 0x1000;
    /// The device's own configuration.
    pub(in crate::transport) const DEVICE: u64 = 0x2000;
    /// Doorbells.
    pub(in crate::transport) const NOTIFY: u64 = 0x3000;
    /// `notify_off_multiplier`: bytes from one queue's doorbell to the next one's.
    pub(in crate::transport) const NOTIFY_MULTIPLIER: u64 = 4;
    /// Bytes of each structure.
    pub(in crate::transport) const PART: u64 = 0x1000;
    /// Bytes in all.
    pub(in crate::transport) const SIZE: u64 = 0x4000;
}

/// How a device is doing, for people and monitors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceStatus {
    /// Its status register.
    pub status: Status,
    /// What went wrong last.
    pub failure: Option<String>,
}

/// A device behind its registers.
///
/// vCPUs call it. Doorbells and ISR status take no lock; the rest takes the registers' lock, under which the device itself is
/// called.
pub struct ModernBar {
    registers: Mutex<Registers>,
    signals: Arc<Signals>,
    doorbells: Arc<Vec<EventFd>>,
}

impl ModernBar {
    /// Puts registers before a device. `vectors` is the number of MSI-X vectors that the function has; `withheld` are features
    /// that are not offered though device and transport have them.
    ///
    /// # Errors
    /// When the host gives no event descriptors.
    pub fn new(
        memory: &GuestMemory,
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
            memory.clone(),
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

    /// Resets the device, as its function is reset. When this returns, nothing of it touches guest memory.
    pub fn reset(&self) {
        self.registers.lock().reset();
    }

    /// How the device is doing.
    pub fn status(&self) -> DeviceStatus {
        DeviceStatus {
            status: self.registers.lock().status(),
            failure: self.signals.failure(),
        }
    }

    /// The queues' doorbells: offset in the base address register, and the event that a write there signals.
    pub fn doorbells(&self) -> impl Iterator<Item = (u64, &EventFd)> {
        let offset = |i| layout::NOTIFY + i as u64 * layout::NOTIFY_MULTIPLIER;
        self.doorbells
            .iter()
            .enumerate()
            .map(move |(i, e)| (offset(i), e))
    }

    fn ring(&self, offset: u64) {
        let queue = offset / layout::NOTIFY_MULTIPLIER;
        if let Some(event) = self.doorbells.get(queue as usize) {
            // Fails only when the counter would overflow: it is signalled then.
            let _ = event.write(1);
        }
    }
}

impl IoHandler for ModernBar {
    fn widths(&self) -> Widths {
        Widths::ANY
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let at = (offset % layout::PART) as usize;
        match offset - at as u64 {
            layout::COMMON if at < common::SIZE => self.registers.lock().read(at, data),
            layout::ISR if at == 0 => data[0] = self.signals.take_isr(),
            layout::DEVICE => self.registers.lock().read_device(at, data),
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let at = (offset % layout::PART) as usize;
        match offset - at as u64 {
            layout::COMMON => self.registers.lock().write(at, data),
            layout::DEVICE => self.registers.lock().device().write_config(at, data),
            layout::NOTIFY => self.ring(at as u64),
            _ => {}
        }
    }
}
