//! The register file of a modern virtio device: common configuration, status machine, queues.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use guest_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use super::signals::Signals;
use super::spec::{NO_VECTOR, common};
use crate::device::{Activation, ActiveQueue, VirtioDevice};
use crate::doorbell;
use crate::queue::{Queue, QueueConfig};
use crate::spec::{Status, feature};

/// The features that every device of ours has.
const COMMON_FEATURES: u64 = feature::VERSION_1
    | feature::INDIRECT_DESC
    | feature::EVENT_IDX
    | feature::RING_PACKED
    | feature::RING_RESET;

/// A queue as its registers show it.
#[derive(Debug, Clone, Copy, Default)]
struct QueueRegisters {
    size: u16,
    enabled: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

/// What the transport knows of a device, under the transport's lock.
pub(super) struct Registers {
    // Configuration.
    memory: GuestMemory,
    offered: u64,
    max_sizes: Vec<u16>,
    vectors: u16,
    // Runtime.
    device: Box<dyn VirtioDevice>,
    signals: Arc<Signals>,
    doorbells: Arc<Vec<EventFd>>,
    active: bool,
    // Volatile guest state.
    status: Status,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

impl Registers {
    pub(super) fn new(
        memory: GuestMemory,
        mut device: Box<dyn VirtioDevice>,
        signals: Arc<Signals>,
        doorbells: Arc<Vec<EventFd>>,
        vectors: u16,
        withheld: u64,
    ) -> Self {
        let max_sizes = device.queue_sizes();
        device.connect(signals.clone());
        let mut registers = Self {
            memory,
            offered: (device.features() | COMMON_FEATURES) & !withheld,
            max_sizes,
            vectors,
            device,
            signals,
            doorbells,
            active: false,
            status: Status::empty(),
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: Vec::new(),
        };
        registers.clear();
        registers
    }

    /// Puts the registers into their reset state.
    fn clear(&mut self) {
        self.status = Status::empty();
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.queues = self
            .max_sizes
            .iter()
            .map(|size| QueueRegisters {
                size: *size,
                ..QueueRegisters::default()
            })
            .collect();
        self.active = false;
        self.signals.reset();
    }

    /// Resets the device.
    pub(super) fn reset(&mut self) {
        if self.active {
            self.device.reset();
        }
        self.clear();
    }

    pub(super) fn device(&mut self) -> &mut dyn VirtioDevice {
        &mut *self.device
    }

    /// Whether the device's configuration space may be written yet (section 2.1.2: after `DRIVER`).
    pub(super) fn read_device(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        self.device.read_config(offset, data);
    }

    /// Status as the driver reads it.
    pub(super) fn status(&self) -> Status {
        let failed = self.signals.needs_reset.load(Ordering::SeqCst);
        if failed && !self.status.is_empty() {
            self.status | Status::DEVICE_NEEDS_RESET
        } else {
            self.status
        }
    }

    fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// The greatest size of the selected queue, 0 when there is none.
    pub(super) fn max_size(&self) -> u16 {
        let size = self.max_sizes.get(usize::from(self.queue_select));
        size.copied().unwrap_or(0)
    }

    /// Reads common configuration.
    pub(super) fn read(&self, offset: usize, data: &mut [u8]) {
        let mut image = [0u8; common::SIZE];
        let mut put = |at: usize, bytes: &[u8]| {
            image[at..at + bytes.len()].copy_from_slice(bytes);
        };
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let vector = |v: &std::sync::atomic::AtomicU16| v.load(Ordering::SeqCst).to_le_bytes();
        let offered = half(self.offered, self.device_feature_select);
        let driver = half(self.driver_features, self.driver_feature_select);
        put(0, &self.device_feature_select.to_le_bytes());
        put(common::DEVICE_FEATURE, &offered.to_le_bytes());
        put(
            common::DRIVER_FEATURE_SELECT,
            &self.driver_feature_select.to_le_bytes(),
        );
        put(common::DRIVER_FEATURE, &driver.to_le_bytes());
        put(common::CONFIG_VECTOR, &vector(&self.signals.config_vector));
        put(
            common::NUM_QUEUES,
            &(self.queues.len() as u16).to_le_bytes(),
        );
        put(common::STATUS, &[self.status().bits()]);
        put(common::GENERATION, &[self.signals.generation()]);
        put(common::QUEUE_SELECT, &self.queue_select.to_le_bytes());
        if let Some(queue) = self.selected() {
            let v = &self.signals.queue_vectors[usize::from(self.queue_select)];
            put(common::QUEUE_SIZE, &queue.size.to_le_bytes());
            put(common::QUEUE_VECTOR, &vector(v));
            put(common::QUEUE_ENABLE, &[u8::from(queue.enabled)]);
            put(common::QUEUE_NOTIFY_OFF, &self.queue_select.to_le_bytes());
            put(common::QUEUE_DESC, &queue.descriptors.to_le_bytes());
            put(common::QUEUE_DRIVER, &queue.driver.to_le_bytes());
            put(common::QUEUE_DEVICE, &queue.device.to_le_bytes());
            put(common::QUEUE_NOTIFY_DATA, &self.queue_select.to_le_bytes());
        } else {
            put(common::QUEUE_VECTOR, &NO_VECTOR.to_le_bytes());
        }
        data.fill(0);
        crate::device::read_space(&image, offset, data);
    }

    /// Writes common configuration. Accesses that are not a register's own size are ignored.
    pub(super) fn write(&mut self, offset: usize, data: &[u8]) {
        let mut bytes = [0; 8];
        let Some(low) = bytes.get_mut(..data.len()) else {
            return;
        };
        low.copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        match (offset, data.len()) {
            (common::DEVICE_FEATURE_SELECT, 4) => self.device_feature_select = value as u32,
            (common::DRIVER_FEATURE_SELECT, 4) => self.driver_feature_select = value as u32,
            (common::DRIVER_FEATURE, 4) => self.write_driver_features(value as u32),
            (common::CONFIG_VECTOR, 2) => {
                let vector = self.checked_vector(value as u16);
                self.signals.config_vector.store(vector, Ordering::SeqCst);
            }
            (common::STATUS, 1) => self.write_status(value as u8),
            (common::QUEUE_SELECT, 2) => self.queue_select = value as u16,
            (common::QUEUE_VECTOR, 2) => {
                let vector = self.checked_vector(value as u16);
                if let Some(v) = self
                    .signals
                    .queue_vectors
                    .get(usize::from(self.queue_select))
                {
                    v.store(vector, Ordering::SeqCst);
                }
            }
            (common::QUEUE_ENABLE, 2) if value == 1 => self.enable_queue(),
            (common::QUEUE_RESET, 2) if value == 1 => self.reset_queue(),
            _ => self.write_queue(offset, data.len(), value),
        }
    }

    /// A vector that the function has, or none (section 4.1.5.1.2: the driver reads back what it got).
    fn checked_vector(&self, vector: u16) -> u16 {
        if vector < self.vectors {
            vector
        } else {
            NO_VECTOR
        }
    }

    fn write_driver_features(&mut self, value: u32) {
        if self.status.contains(Status::FEATURES_OK) {
            return;
        }
        let value = u64::from(value);
        match self.driver_feature_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    fn write_status(&mut self, value: u8) {
        if value == 0 {
            self.reset();
            return;
        }
        let mut new = Status::from_bits_truncate(value) - Status::DEVICE_NEEDS_RESET;
        // Bits are only ever added; the way back is a reset.
        new |= self.status;
        if new.contains(Status::FEATURES_OK)
            && !self.status.contains(Status::FEATURES_OK)
            && !self.features_are_good()
        {
            new -= Status::FEATURES_OK;
        }
        if !new.contains(Status::FEATURES_OK) {
            new -= Status::DRIVER_OK;
        }
        let go = new.contains(Status::DRIVER_OK) && !self.active;
        self.status = new;
        if go {
            self.activate();
        }
    }

    fn features_are_good(&self) -> bool {
        let features = self.driver_features;
        features & !self.offered == 0
            && features & feature::VERSION_1 != 0
            && self.device.accepts(features)
    }

    fn write_queue(&mut self, offset: usize, len: usize, value: u64) {
        let max = self.max_sizes.get(usize::from(self.queue_select)).copied();
        let (Some(queue), Some(max)) = (self.queues.get_mut(usize::from(self.queue_select)), max)
        else {
            return;
        };
        if queue.enabled {
            return;
        }
        if (offset, len) == (common::QUEUE_SIZE, 2) {
            let size = value as u16;
            if size != 0 && size <= max {
                queue.size = size;
            }
            return;
        }
        let (register, at) = match offset & !7 {
            common::QUEUE_DESC => (&mut queue.descriptors, offset & 7),
            common::QUEUE_DRIVER => (&mut queue.driver, offset & 7),
            common::QUEUE_DEVICE => (&mut queue.device, offset & 7),
            _ => return,
        };
        match (at, len) {
            (0, 8) => *register = value,
            (0, 4) => *register = *register & !0xffff_ffff | value,
            (4, 4) => *register = *register & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    /// Makes an enabled queue. The features must have been negotiated.
    fn make_queue(&self, index: u16) -> io::Result<ActiveQueue> {
        let registers = self.queues[usize::from(index)];
        let fresh = QueueConfig::fresh(self.driver_features);
        let config = QueueConfig {
            index,
            size: registers.size,
            descriptors: registers.descriptors,
            driver: registers.driver,
            device: registers.device,
            next_available: fresh,
            next_used: fresh,
        };
        Ok(ActiveQueue {
            queue: Queue::new(
                &self.memory,
                config,
                self.driver_features,
                self.signals.clone(),
            ),
            doorbell: doorbell::reader(&self.doorbells[usize::from(index)])?,
        })
    }

    fn activate(&mut self) {
        self.active = true;
        self.signals.driver_ok.store(true, Ordering::SeqCst);
        let enabled =
            (0..self.queues.len() as u16).filter(|i| self.queues[usize::from(*i)].enabled);
        let queues: io::Result<Vec<ActiveQueue>> = enabled.map(|i| self.make_queue(i)).collect();
        match queues {
            Ok(queues) => self.device.activate(Activation {
                features: self.driver_features,
                queues,
                memory: self.memory.clone(),
            }),
            Err(error) => self.signals.host_failure(&error),
        }
    }

    fn enable_queue(&mut self) {
        let index = self.queue_select;
        let Some(queue) = self.queues.get_mut(usize::from(index)) else {
            return;
        };
        if std::mem::replace(&mut queue.enabled, true) || !self.active {
            return;
        }
        match self.make_queue(index) {
            Ok(queue) => self.device.start_queue(queue),
            Err(error) => self.signals.host_failure(&error),
        }
    }

    fn reset_queue(&mut self) {
        let index = self.queue_select;
        let negotiated = self.driver_features & feature::RING_RESET != 0;
        let Some(queue) = self.queues.get_mut(usize::from(index)) else {
            return;
        };
        if !negotiated || !queue.enabled {
            return;
        }
        *queue = QueueRegisters {
            size: self.max_sizes[usize::from(index)],
            ..QueueRegisters::default()
        };
        self.signals.queue_vectors[usize::from(index)].store(NO_VECTOR, Ordering::SeqCst);
        if self.active {
            self.device.stop_queue(index);
        }
    }
}
