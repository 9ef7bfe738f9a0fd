//! The memory space of a modern virtio device (section 4.1.4): four structures in one base address register.

use std::io;
use std::sync::Arc;

use device_model::{IoHandler, Widths};
use guest_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use super::frontend::{DeviceStatus, Frontend};
use super::signals::FunctionInterrupts;
use super::spec::common;
use crate::device::VirtioDevice;

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

/// A device behind its registers.
///
/// vCPUs call it. Doorbells and ISR status take no lock; the rest takes the registers' lock, under which the device itself is
/// called.
pub struct ModernBar(Frontend);

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
        let memory = memory.clone();
        Frontend::new(memory, device, interrupts, vectors, withheld).map(Self)
    }

    /// Resets the device, as its function is reset. When this returns, nothing of it touches guest memory.
    pub fn reset(&self) {
        self.0.reset();
    }

    /// How the device is doing.
    pub fn status(&self) -> DeviceStatus {
        self.0.status()
    }

    /// The queues' doorbells: offset in the base address register, and the event that a write there signals.
    pub fn doorbells(&self) -> impl Iterator<Item = (u64, &EventFd)> {
        let offset = |queue| layout::NOTIFY + queue * layout::NOTIFY_MULTIPLIER;
        self.0
            .doorbells()
            .map(move |(queue, event)| (offset(queue), event))
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
            layout::COMMON if at < common::SIZE => self.0.registers().read(at, data),
            layout::ISR if at == 0 => data[0] = self.0.signals.take_isr(),
            layout::DEVICE => self.0.registers().read_device(at, data),
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let at = (offset % layout::PART) as usize;
        match offset - at as u64 {
            layout::COMMON => self.0.registers().write(at, data),
            layout::DEVICE => self.0.registers().device().write_config(at, data),
            layout::NOTIFY => self.0.ring(at as u64 / layout::NOTIFY_MULTIPLIER),
            _ => {}
        }
    }
}
