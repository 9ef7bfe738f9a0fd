//! A guest for tests: drives a device through its registers, as a driver does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use device_model::IoHandler;
use guest_memory::{BackingOptions, GuestMemory};
use parking_lot::{Condvar, Mutex};

use crate::device::VirtioDevice;
use crate::queue::driver::{DriverQueue, Piece, Used};
use crate::spec::{Status, feature};
use crate::transport::spec::common;
use crate::transport::{FunctionInterrupts, ModernBar};

/// How long a test waits for a device before it fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// Guest memory in bytes.
pub(crate) const RAM: u64 = 16 << 20;
/// Where tests may put data; queues lie below.
pub(crate) const DATA: u64 = 4 << 20;

/// Counts interrupts.
#[derive(Default)]
pub(crate) struct Interrupts {
    pub(crate) msix: AtomicBool,
    counts: Mutex<Vec<u64>>,
    level: AtomicBool,
    came: Condvar,
}

impl FunctionInterrupts for Interrupts {
    fn msix_enabled(&self) -> bool {
        self.msix.load(Ordering::SeqCst)
    }
    fn message(&self, vector: u16) {
        let mut counts = self.counts.lock();
        let at = usize::from(vector);
        if counts.len() <= at {
            counts.resize(at + 1, 0);
        }
        counts[at] += 1;
        self.came.notify_all();
    }
    fn set_level(&self, high: bool) {
        let _counts = self.counts.lock();
        self.level.store(high, Ordering::SeqCst);
        self.came.notify_all();
    }
}

impl Interrupts {
    pub(crate) fn count(&self, vector: u16) -> u64 {
        let counts = self.counts.lock();
        counts.get(usize::from(vector)).copied().unwrap_or(0)
    }

    pub(crate) fn level(&self) -> bool {
        self.level.load(Ordering::SeqCst)
    }
}

/// A guest with one device.
pub(crate) struct Guest {
    pub(crate) memory: GuestMemory,
    pub(crate) bar: Arc<ModernBar>,
    pub(crate) interrupts: Arc<Interrupts>,
    pub(crate) queues: Vec<Option<DriverQueue>>,
    pub(crate) features: u64,
    next_ring: u64,
}

impl Guest {
    pub(crate) fn new(device: impl VirtioDevice + 'static) -> Self {
        let memory = GuestMemory::new();
        memory.add_ram(0, RAM, BackingOptions::default()).unwrap();
        Self::with_memory(memory, device)
    }

    pub(crate) fn with_memory(memory: GuestMemory, device: impl VirtioDevice + 'static) -> Self {
        let interrupts = Arc::new(Interrupts::default());
        interrupts.msix.store(true, Ordering::SeqCst);
        let queues = device.queue_sizes().len() as u16;
        let bar =
            ModernBar::new(&memory, Box::new(device), interrupts.clone(), queues + 1, 0).unwrap();
        Self {
            memory,
            bar: Arc::new(bar),
            interrupts,
            queues: (0..queues).map(|_| None).collect(),
            features: 0,
            next_ring: 0x1000,
        }
    }

    pub(crate) fn read(&self, offset: usize, len: usize) -> u64 {
        let mut data = [0; 8];
        self.bar.read(offset as u64, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    pub(crate) fn write(&self, offset: usize, len: usize, value: u64) {
        self.bar.write(offset as u64, &value.to_le_bytes()[..len]);
    }

    pub(crate) fn config<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut data = [0; N];
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.read(0x2000 + offset + i, 1) as u8;
        }
        data
    }

    pub(crate) fn config_u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.config(offset))
    }

    pub(crate) fn config_u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.config(offset))
    }

    pub(crate) fn config_u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.config(offset))
    }

    pub(crate) fn status(&self) -> Status {
        Status::from_bits_retain(self.read(common::STATUS, 1) as u8)
    }

    pub(crate) fn set_status(&self, status: Status) {
        self.write(common::STATUS, 1, u64::from(status.bits()));
    }

    pub(crate) fn offered(&self) -> u64 {
        let half = |select| {
            self.write(common::DEVICE_FEATURE_SELECT, 4, select);
            self.read(common::DEVICE_FEATURE, 4)
        };
        half(0) | half(1) << 32
    }

    /// Resets, and negotiates those of `wanted` that are offered (and `VERSION_1`).
    pub(crate) fn negotiate(&mut self, wanted: u64) {
        self.set_status(Status::empty());
        assert_eq!(self.status(), Status::empty());
        self.set_status(Status::ACKNOWLEDGE | Status::DRIVER);
        self.features = self.offered() & (wanted | feature::VERSION_1);
        for (select, value) in [(0, self.features & 0xffff_ffff), (1, self.features >> 32)] {
            self.write(common::DRIVER_FEATURE_SELECT, 4, select);
            self.write(common::DRIVER_FEATURE, 4, value);
        }
        self.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK);
        assert!(self.status().contains(Status::FEATURES_OK));
        self.write(common::CONFIG_VECTOR, 2, self.queues.len() as u64);
        self.next_ring = 0x1000;
    }

    /// Sets up queue `index`; its vector is its number.
    pub(crate) fn add_queue(&mut self, index: u16, size: u16) {
        let driver = DriverQueue::new(&self.memory, self.next_ring, size, self.features);
        self.next_ring = (self.next_ring + driver.footprint()).next_multiple_of(0x1000);
        assert!(self.next_ring <= DATA);
        let config = driver.config(index);
        self.write(common::QUEUE_SELECT, 2, u64::from(index));
        self.write(common::QUEUE_SIZE, 2, u64::from(size));
        self.write(common::QUEUE_VECTOR, 2, u64::from(index));
        for (register, address) in [
            (common::QUEUE_DESC, config.descriptors),
            (common::QUEUE_DRIVER, config.driver),
            (common::QUEUE_DEVICE, config.device),
        ] {
            self.write(register, 4, address & 0xffff_ffff);
            self.write(register + 4, 4, address >> 32);
        }
        self.write(common::QUEUE_ENABLE, 2, 1);
        assert_eq!(self.read(common::QUEUE_ENABLE, 2), 1);
        self.queues[usize::from(index)] = Some(driver);
    }

    pub(crate) fn driver_ok(&self) {
        self.set_status(
            Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK | Status::DRIVER_OK,
        );
        assert!(self.status().contains(Status::DRIVER_OK));
    }

    /// Negotiates, sets up all queues with `size` entries, and starts.
    pub(crate) fn start(&mut self, wanted: u64, size: u16) {
        self.negotiate(wanted);
        for index in 0..self.queues.len() as u16 {
            self.add_queue(index, size);
        }
        self.driver_ok();
    }

    pub(crate) fn queue(&mut self, index: u16) -> &mut DriverQueue {
        self.queues[usize::from(index)].as_mut().unwrap()
    }

    pub(crate) fn kick(&self, index: u16) {
        self.write(0x3000 + 4 * usize::from(index), 2, u64::from(index));
    }

    /// Makes a request available and rings the doorbell if the device wants that.
    pub(crate) fn send(&mut self, index: u16, pieces: &[Piece]) -> u64 {
        let request = self.queue(index).add(pieces).expect("room in the queue");
        if self.queue(index).must_kick() {
            self.kick(index);
        }
        request
    }

    /// Waits until `check` yields something.
    pub(crate) fn wait<T>(&mut self, mut check: impl FnMut(&mut Self) -> Option<T>) -> T {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(value) = check(self) {
                return value;
            }
            assert!(Instant::now() < end, "the device did not answer");
            let interrupts = self.interrupts.clone();
            let mut counts = interrupts.counts.lock();
            interrupts
                .came
                .wait_for(&mut counts, Duration::from_millis(2));
        }
    }

    /// Waits for a used buffer of a queue; interrupts are wanted meanwhile.
    pub(crate) fn used(&mut self, index: u16) -> Used {
        self.wait(|guest| {
            let queue = guest.queue(index);
            queue.want_signal(true);
            queue.used()
        })
    }

    /// Makes a request and waits for its end.
    pub(crate) fn request(&mut self, index: u16, pieces: &[Piece]) -> u32 {
        let sent = self.send(index, pieces);
        let (done, written) = self.used(index);
        assert_eq!(done, sent);
        written
    }

    /// Waits until the device wants a reset.
    pub(crate) fn wait_for_failure(&mut self) {
        self.wait(|guest| {
            guest
                .status()
                .contains(Status::DEVICE_NEEDS_RESET)
                .then_some(())
        });
    }

    pub(crate) fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(at, &mut bytes).unwrap();
        bytes
    }

    pub(crate) fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write(at, bytes).unwrap();
    }
}
