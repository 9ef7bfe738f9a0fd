//! What the vCPUs reach: ports, device memory, interrupt controllers.

use std::sync::Arc;

use accel::{CpuIo, Msi, Vm};
use device_model::{Doorbell, Doorbells, IoBus, MsiSink};
use vmm_sys_util::eventfd::EventFd;

/// The interrupt controllers, as a vCPU sees them.
pub(crate) trait Controllers: Send + Sync {
    /// The 8259 pair's acknowledge cycle.
    fn acknowledge(&self) -> Option<u8>;
    /// The end of a level-triggered interrupt of this vector.
    fn end_of_interrupt(&self, vector: u8);
}

/// The machine's buses behind its vCPUs.
pub(crate) struct Buses {
    pub(crate) ports: IoBus,
    pub(crate) memory: IoBus,
    pub(crate) controllers: Arc<dyn Controllers>,
}

impl CpuIo for Buses {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.ports.read(u64::from(port), data);
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        self.ports.write(u64::from(port), data);
    }

    fn mmio_read(&self, addr: u64, data: &mut [u8]) {
        self.memory.read(addr, data);
    }

    fn mmio_write(&self, addr: u64, data: &[u8]) {
        self.memory.write(addr, data);
    }

    fn acknowledge_extint(&self) -> Option<u8> {
        self.controllers.acknowledge()
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.controllers.end_of_interrupt(vector);
    }
}

/// The processor side as devices see it: messages and doorbells.
pub(crate) struct Processor(pub(crate) Arc<dyn Vm>);

impl MsiSink for Processor {
    fn send(&self, address: u64, data: u32) {
        self.0.send_msi(Msi { address, data });
    }
}

fn doorbell(bell: Doorbell) -> accel::Doorbell {
    accel::Doorbell {
        address: bell.address,
        len: bell.len,
        value: bell.value,
    }
}

impl Doorbells for Processor {
    fn add(&self, bell: Doorbell, event: &EventFd) -> bool {
        self.0.add_doorbell(doorbell(bell), event)
    }

    fn remove(&self, bell: Doorbell, event: &EventFd) {
        self.0.remove_doorbell(doorbell(bell), event);
    }
}
