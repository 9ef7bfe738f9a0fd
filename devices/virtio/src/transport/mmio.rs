//! A virtio device as a block of memory-mapped registers (section 4.2).

use std::io;
use std::sync::Arc;

use device_model::{
    Device, Doorbell, Doorbells, IoBus, IoError, IoHandler, IoRegion, IrqLine, ResetKind, Widths,
};
use guest_memory::GuestMemory;

use super::frontend::{DeviceStatus, Frontend};
use super::signals::FunctionInterrupts;
use super::spec::{common, mmio};
use crate::device::VirtioDevice;
use crate::spec::DeviceType;

/// What a memory-mapped device is connected to.
pub struct MmioWiring {
    /// Guest memory.
    pub memory: GuestMemory,
    /// The short cut for doorbells, if the processor has one.
    pub doorbells: Option<Arc<dyn Doorbells>>,
    /// The device's interrupt, a level.
    pub interrupt: IrqLine,
    /// Feature bits that are not offered though the device has them.
    pub withheld: u64,
}

/// The only way to interrupt is the line.
struct Line(IrqLine);

impl FunctionInterrupts for Line {
    fn msix_enabled(&self) -> bool {
        false
    }
    fn message(&self, _vector: u16) {}
    fn set_level(&self, high: bool) {
        self.0.set(high);
    }
}

/// A virtio device in the memory space.
pub struct VirtioMmio {
    // Configuration.
    name: String,
    kind: DeviceType,
    short_cut: Option<Arc<dyn Doorbells>>,
    // Runtime.
    frontend: Frontend,
}

impl VirtioMmio {
    /// Puts registers before a device. `name` is for messages and monitors: `disk0`.
    ///
    /// # Errors
    /// When the host gives no event descriptors.
    pub fn new(
        name: impl Into<String>,
        device: Box<dyn VirtioDevice>,
        wiring: MmioWiring,
    ) -> io::Result<Arc<Self>> {
        let kind = device.device_type();
        let line = Arc::new(Line(wiring.interrupt));
        let frontend = Frontend::new(wiring.memory, device, line, 0, wiring.withheld)?;
        Ok(Arc::new(Self {
            name: name.into(),
            kind,
            short_cut: wiring.doorbells,
            frontend,
        }))
    }

    /// Claims [`mmio::SIZE`] bytes from `base` on.
    ///
    /// # Errors
    /// When something else is there.
    pub fn attach(self: &Arc<Self>, memory: &IoBus, base: u64) -> Result<IoRegion, IoError> {
        let region = memory.add(base, mmio::SIZE, &self.name, self.clone())?;
        if let Some(short_cut) = &self.short_cut {
            for (queue, event) in self.frontend.doorbells() {
                let bell = Doorbell {
                    address: base + mmio::QUEUE_NOTIFY,
                    len: 4,
                    value: Some(queue),
                };
                // Without the short cut the write comes to `write`.
                short_cut.add(bell, event);
            }
        }
        Ok(region)
    }

    /// How the device is doing.
    pub fn status(&self) -> DeviceStatus {
        self.frontend.status()
    }

    /// A register of common configuration, `len` bytes of it.
    fn common(&self, at: usize, len: usize) -> u32 {
        let mut bytes = [0; 4];
        self.frontend.registers().read(at, &mut bytes[..len]);
        u32::from_le_bytes(bytes)
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            mmio::MAGIC_VALUE => mmio::MAGIC,
            mmio::VERSION => mmio::VERSION_MODERN,
            mmio::DEVICE_ID => self.kind as u32,
            mmio::VENDOR_ID => mmio::VENDOR,
            mmio::DEVICE_FEATURES => self.common(common::DEVICE_FEATURE, 4),
            mmio::QUEUE_NUM_MAX => u32::from(self.frontend.registers().max_size()),
            mmio::QUEUE_READY => self.common(common::QUEUE_ENABLE, 2),
            mmio::INTERRUPT_STATUS => u32::from(self.frontend.signals.isr()),
            mmio::STATUS => self.common(common::STATUS, 1),
            // There is no shared memory region, which a length of -1 says (section 4.2.2).
            mmio::SHM_LEN_LOW..=mmio::SHM_BASE_HIGH => u32::MAX,
            mmio::CONFIG_GENERATION => self.common(common::GENERATION, 1),
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        // Common configuration's registers of the same meaning, and their sizes.
        let (at, len) = match offset {
            mmio::DEVICE_FEATURES_SEL => (common::DEVICE_FEATURE_SELECT, 4),
            mmio::DRIVER_FEATURES => (common::DRIVER_FEATURE, 4),
            mmio::DRIVER_FEATURES_SEL => (common::DRIVER_FEATURE_SELECT, 4),
            mmio::QUEUE_SEL => (common::QUEUE_SELECT, 2),
            mmio::QUEUE_NUM => (common::QUEUE_SIZE, 2),
            mmio::QUEUE_READY => (common::QUEUE_ENABLE, 2),
            mmio::QUEUE_RESET => (common::QUEUE_RESET, 2),
            mmio::STATUS => (common::STATUS, 1),
            mmio::QUEUE_DESC_LOW | mmio::QUEUE_DESC_HIGH => {
                (common::QUEUE_DESC + (offset & 4) as usize, 4)
            }
            mmio::QUEUE_DRIVER_LOW | mmio::QUEUE_DRIVER_HIGH => {
                (common::QUEUE_DRIVER + (offset & 4) as usize, 4)
            }
            mmio::QUEUE_DEVICE_LOW | mmio::QUEUE_DEVICE_HIGH => {
                (common::QUEUE_DEVICE + (offset & 4) as usize, 4)
            }
            mmio::QUEUE_NOTIFY => return self.frontend.ring(value.into()),
            mmio::INTERRUPT_ACK => return self.frontend.signals.acknowledge(value as u8),
            _ => return,
        };
        // A selector of more bits than there can be queues selects none.
        let value = if offset == mmio::QUEUE_SEL {
            value.min(u32::from(u16::MAX))
        } else {
            value
        };
        let bytes = value.to_le_bytes();
        self.frontend.registers().write(at, &bytes[..len]);
    }
}

impl IoHandler for VirtioMmio {
    fn widths(&self) -> Widths {
        Widths::ANY
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(mmio::CONFIG) {
            self.frontend.registers().read_device(at as usize, data);
        } else if data.len() == 4 {
            // Registers are 32 bits wide; other accesses are undefined (section 4.2.2.2).
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(at) = offset.checked_sub(mmio::CONFIG) {
            let mut registers = self.frontend.registers();
            registers.device().write_config(at as usize, data);
        } else if let Ok(bytes) = data.try_into() {
            self.write_register(offset, u32::from_le_bytes(bytes));
        }
    }
}

impl Device for VirtioMmio {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn reset(&self, _kind: ResetKind) {
        self.frontend.reset();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use device_model::{IrqPin, IrqSink};
    use guest_memory::BackingOptions;

    use super::*;
    use crate::queue::driver::DriverQueue;
    use crate::rng::Rng;
    use crate::spec::feature;
    use crate::testing::{DATA, PATIENCE, RAM};

    struct Level(mpsc::Sender<bool>);
    impl IrqSink for Level {
        fn set_level(&self, _: u32, high: bool) {
            let _ = self.0.send(high);
        }
    }

    const BASE: u64 = 0xfeb0_0000;

    struct Driver(IoBus);

    impl Driver {
        fn read(&self, at: u64) -> u32 {
            let mut data = [0; 4];
            self.0.read(BASE + at, &mut data);
            u32::from_le_bytes(data)
        }
        fn write(&self, at: u64, value: u32) {
            self.0.write(BASE + at, &value.to_le_bytes());
        }
        fn write_64(&self, at: u64, value: u64) {
            self.write(at, value as u32);
            self.write(at + 4, (value >> 32) as u32);
        }
    }

    #[test]
    fn a_driver_gets_bytes_from_a_device_in_memory_space() {
        let memory = GuestMemory::new();
        memory.add_ram(0, RAM, BackingOptions::default()).unwrap();
        let (send, levels) = mpsc::channel();
        let pin = IrqPin::new(Arc::new(Level(send)), 0);
        let wiring = MmioWiring {
            memory: memory.clone(),
            doorbells: None,
            interrupt: pin.line(),
            withheld: 0,
        };
        let device = VirtioMmio::new("rng", Box::new(Rng::new(None).unwrap()), wiring).unwrap();
        let bus = IoBus::memory();
        let _region = device.attach(&bus, BASE).unwrap();
        let d = Driver(bus);
        let identity = [mmio::MAGIC_VALUE, mmio::VERSION, mmio::DEVICE_ID].map(|at| d.read(at));
        assert_eq!(identity, [0x7472_6976, 2, 4]);
        assert_eq!(d.read(mmio::SHM_LEN_LOW), u32::MAX);
        d.write(mmio::STATUS, 1);
        d.write(mmio::STATUS, 3);
        d.write(mmio::DEVICE_FEATURES_SEL, 1);
        assert_ne!(
            d.read(mmio::DEVICE_FEATURES) & (feature::VERSION_1 >> 32) as u32,
            0
        );
        d.write(mmio::DRIVER_FEATURES_SEL, 1);
        d.write(mmio::DRIVER_FEATURES, (feature::VERSION_1 >> 32) as u32);
        d.write(mmio::STATUS, 11);
        assert_eq!(d.read(mmio::STATUS), 11);
        let mut driver = DriverQueue::new(&memory, 0x1000, 8, feature::VERSION_1);
        let config = driver.config(0);
        d.write(mmio::QUEUE_SEL, 1);
        assert_eq!(d.read(mmio::QUEUE_NUM_MAX), 0);
        d.write(mmio::QUEUE_SEL, 0x1_0000);
        assert_eq!(d.read(mmio::QUEUE_NUM_MAX), 0);
        d.write(mmio::QUEUE_SEL, 0);
        assert!(d.read(mmio::QUEUE_NUM_MAX) >= 8);
        d.write(mmio::QUEUE_NUM, 8);
        d.write_64(mmio::QUEUE_DESC_LOW, config.descriptors);
        d.write_64(mmio::QUEUE_DRIVER_LOW, config.driver);
        d.write_64(mmio::QUEUE_DEVICE_LOW, config.device);
        d.write(mmio::QUEUE_READY, 1);
        assert_eq!(d.read(mmio::QUEUE_READY), 1);
        d.write(mmio::STATUS, 15);
        driver.add(&[(DATA, 16, true)]).unwrap();
        d.write(mmio::QUEUE_NOTIFY, 7);
        d.write(mmio::QUEUE_NOTIFY, 0);
        while !levels.recv_timeout(PATIENCE).unwrap() {}
        assert_eq!(driver.used(), Some((0, 16)));
        assert_eq!(d.read(mmio::INTERRUPT_STATUS), 1);
        d.write(mmio::INTERRUPT_ACK, 1);
        assert!(!levels.recv_timeout(PATIENCE).unwrap());
        assert_eq!(d.read(mmio::INTERRUPT_STATUS), 0);
        d.write(mmio::STATUS, 0);
        assert_eq!(device.status().status.bits(), 0);
        assert_eq!(d.read(mmio::QUEUE_READY), 0);
    }
}
