//! The block device (section 5.2).
//!
//! Each disk has one thread of its own, the [`IoThread`] that the disk was opened on; all its queues are served there, by
//! tasks. A request is a task from its arrival to its end, so many are in flight; those that end in one turn of the
//! executor are shown to the driver together, with one signal. Guest memory is read and written in place.

mod errors;
mod queue_task;
mod request;
pub mod spec;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use block::executor::{IoHandle, IoThread};
use block::{BlockError, Disk, DiskStatistics, Limits, ThrottleGroup};
use parking_lot::Mutex;

use crate::device::{Activation, ActiveQueue, DeviceEvents, VirtioDevice, read_space};
use crate::spec::DeviceType;
use errors::Errors;
pub use errors::{ErrorAction, ErrorPolicy, FailureSink, IoFailure};
use queue_task::{RunningQueue, Shared};
use spec::{ID_SIZE, SECTOR, config, feature};

/// How a disk appears to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlkOptions {
    /// Queues: 1 to 256. One for each vCPU is best.
    pub queues: u16,
    /// Entries of each queue: a power of two from 4 to 1024.
    pub queue_size: u16,
    /// The serial number; the guest sees the first 20 bytes.
    pub serial: String,
    /// What to do when the host can't read.
    pub read_errors: ErrorPolicy,
    /// What to do when the host can't write or flush.
    pub write_errors: ErrorPolicy,
}

impl Default for BlkOptions {
    fn default() -> Self {
        Self {
            queues: 1,
            queue_size: 256,
            serial: String::new(),
            read_errors: ErrorPolicy::Report,
            write_errors: ErrorPolicy::Enospc,
        }
    }
}

/// A disk on its thread: things that can't leave it.
struct Unit {
    shared: Rc<Shared>,
    queues: RefCell<HashMap<u16, Rc<RunningQueue>>>,
}

thread_local! {
    static UNITS: RefCell<HashMap<u64, Rc<Unit>>> = RefCell::default();
}

static NEXT_UNIT: AtomicU64 = AtomicU64::new(0);

fn unit(number: u64) -> Option<Rc<Unit>> {
    UNITS.with_borrow(|units| units.get(&number).cloned())
}

impl Unit {
    fn start(&self, active: ActiveQueue) {
        let index = active.queue.index();
        let running = RunningQueue::start(self.shared.clone(), active);
        self.queues.borrow_mut().insert(index, running);
    }

    async fn stop(&self, index: u16) {
        let running = self.queues.borrow_mut().remove(&index);
        if let Some(running) = running {
            running.stop().await;
        }
    }

    async fn stop_all(&self) {
        let indices: Vec<u16> = self.queues.borrow().keys().copied().collect();
        for index in indices {
            self.stop(index).await;
        }
    }
}

/// What the device and its handles share.
struct Core {
    number: u64,
    thread: IoHandle,
    config: Mutex<[u8; config::SIZE]>,
    write_through: Arc<AtomicBool>,
    events: Mutex<Option<Arc<dyn DeviceEvents>>>,
    failures: Arc<Mutex<Option<FailureSink>>>,
}

/// Reaches a disk that a guest has, from the monitor.
#[derive(Clone)]
pub struct BlkHandle(Arc<Core>);

/// The block device.
pub struct Blk {
    // Configuration.
    options: BlkOptions,
    read_only: bool,
    discards: bool,
    // Runtime.
    core: Arc<Core>,
    /// The thread; ends with the device.
    _thread: IoThread,
}

fn put(space: &mut [u8], at: usize, value: &[u8]) {
    space[at..at + value.len()].copy_from_slice(value);
}

/// Fills in what depends on the disk.
fn describe(space: &mut [u8; config::SIZE], limits: &Limits) {
    let sectors = limits.size / SECTOR;
    put(space, config::CAPACITY, &sectors.to_le_bytes());
    put(
        space,
        config::BLK_SIZE,
        &limits.logical_block_size.to_le_bytes(),
    );
    let ratio = (limits.physical_block_size / limits.logical_block_size.max(1)).max(1);
    put(space, config::PHYSICAL_BLOCK_EXP, &[ratio.ilog2() as u8]);
    let granularity = limits
        .discard_granularity
        .max(limits.logical_block_size)
        .max(SECTOR as u32);
    let alignment = granularity / SECTOR as u32;
    put(space, config::DISCARD_ALIGNMENT, &alignment.to_le_bytes());
}

fn initial_config(options: &BlkOptions, limits: &Limits) -> [u8; config::SIZE] {
    let mut space = [0; config::SIZE];
    let seg_max = u32::from(options.queue_size.saturating_sub(2).max(1));
    let ranges = request::MAX_RANGES as u32;
    for (at, value) in [
        (config::SEG_MAX, seg_max),
        (config::MAX_DISCARD_SECTORS, request::MAX_RANGE_SECTORS),
        (config::MAX_DISCARD_SEG, ranges),
        (config::MAX_ZEROES_SECTORS, request::MAX_RANGE_SECTORS),
        (config::MAX_ZEROES_SEG, ranges),
    ] {
        put(&mut space, at, &value.to_le_bytes());
    }
    put(&mut space, config::WRITEBACK, &[1]);
    put(
        &mut space,
        config::NUM_QUEUES,
        &options.queues.to_le_bytes(),
    );
    put(
        &mut space,
        config::ZEROES_MAY_UNMAP,
        &[u8::from(limits.discard_granularity != 0)],
    );
    describe(&mut space, limits);
    space
}

impl Blk {
    /// Makes the device. `open` runs on `thread` and opens the disk there.
    ///
    /// # Errors
    /// What `open` reports, [`block::ErrorKind::InvalidArgument`] for impossible options, or the end of the thread.
    pub fn new<F, Fut>(
        thread: IoThread,
        options: BlkOptions,
        open: F,
    ) -> Result<(Self, BlkHandle), BlockError>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = Result<Disk, BlockError>> + 'static,
    {
        let size = options.queue_size;
        if !(1..=256).contains(&options.queues) {
            let queues = options.queues;
            let why = format!("a virtio disk has 1 to 256 queues, not {queues}");
            return Err(BlockError::invalid_argument(why));
        }
        if !size.is_power_of_two() || !(4..=1024).contains(&size) {
            let why =
                format!("a virtio disk's queue size is a power of two from 4 to 1024, not {size}");
            return Err(BlockError::invalid_argument(why));
        }
        let number = NEXT_UNIT.fetch_add(1, Ordering::Relaxed);
        let write_through = Arc::new(AtomicBool::new(false));
        let of_thread = write_through.clone();
        let mut id = [0; ID_SIZE];
        for (to, from) in id.iter_mut().zip(options.serial.bytes()) {
            *to = from;
        }
        let failures = Arc::default();
        let errors = Errors {
            read: options.read_errors,
            write: options.write_errors,
            sink: Arc::clone(&failures),
        };
        let limits = thread.handle().call(move || async move {
            let disk = Rc::new(open().await?);
            let limits = disk.limits();
            let shared = Rc::new(Shared {
                disk,
                id,
                write_through: of_thread,
                errors,
            });
            let unit = Rc::new(Unit {
                shared,
                queues: RefCell::default(),
            });
            UNITS.with_borrow_mut(|units| units.insert(number, unit));
            Ok::<Limits, BlockError>(limits)
        })??;
        let core = Arc::new(Core {
            number,
            thread: thread.handle().clone(),
            config: Mutex::new(initial_config(&options, &limits)),
            write_through,
            events: Mutex::new(None),
            failures,
        });
        let handle = BlkHandle(core.clone());
        let device = Self {
            options,
            read_only: limits.read_only,
            discards: limits.discard_granularity != 0,
            core,
            _thread: thread,
        };
        Ok((device, handle))
    }
}

impl Core {
    /// Runs something with the unit on its thread; `None` when the disk has been closed.
    fn on_thread<T, F, Fut>(&self, f: F) -> Option<T>
    where
        T: Send + 'static,
        F: FnOnce(Rc<Unit>) -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
    {
        let number = self.number;
        self.thread
            .call(move || async move {
                match unit(number) {
                    Some(unit) => Some(f(unit).await),
                    None => None,
                }
            })
            .ok()
            .flatten()
    }

    fn close(&self) -> Result<(), BlockError> {
        let number = self.number;
        self.on_thread(move |unit| async move {
            unit.stop_all().await;
            UNITS.with_borrow_mut(|units| units.remove(&number));
            unit.shared.disk.close().await
        })
        .unwrap_or(Ok(()))
    }
}

/// What a disk is and has done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlkState {
    /// The image's file, if it is in one.
    pub file: Option<String>,
    /// The image's format.
    pub format: &'static str,
    /// Its size and abilities.
    pub limits: Limits,
    /// How many images lie below it.
    pub backing_depth: u32,
    /// What it has done.
    pub statistics: DiskStatistics,
}

impl BlkHandle {
    /// What the disk is and has done; `None` when it has been closed.
    pub fn state(&self) -> Option<BlkState> {
        self.0.on_thread(|unit| async move {
            let disk = &unit.shared.disk;
            BlkState {
                file: disk.backend().file_name().map(|name| name.to_string()),
                format: disk.backend().format_name(),
                limits: disk.limits(),
                backing_depth: disk.backend().backing_depth(),
                statistics: disk.statistics(),
            }
        })
    }

    /// Runs something with the disk on its thread, and waits for that; `None` when the disk has been closed.
    pub fn on_disk<T, F, Fut>(&self, f: F) -> Option<T>
    where
        T: Send + 'static,
        F: FnOnce(Rc<Disk>) -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
    {
        self.0.on_thread(move |unit| f(unit.shared.disk.clone()))
    }

    /// Has failures of the host's told to `sink`.
    pub fn on_failure(&self, sink: FailureSink) {
        *self.0.failures.lock() = Some(sink);
    }

    /// Tries again what failures have stopped.
    pub fn retry(&self) {
        self.0.on_thread(|unit| async move {
            unit.queues
                .borrow()
                .values()
                .for_each(|queue| queue.retry());
        });
    }

    /// Puts the disk into a group for its limits.
    pub fn set_throttle(&self, group: Arc<ThrottleGroup>) {
        self.0
            .on_thread(|unit| async move { unit.shared.disk.set_throttle(group) });
    }

    /// Changes the disk's size and tells the guest.
    ///
    /// # Errors
    /// What the disk reports.
    pub fn resize(&self, size: u64) -> Result<(), BlockError> {
        let limits = self.0.on_thread(move |unit| async move {
            unit.shared.disk.resize(size).await?;
            Ok::<Limits, BlockError>(unit.shared.disk.limits())
        });
        let Some(limits) = limits else {
            return Err(BlockError::invalid_argument("the disk has been closed"));
        };
        describe(&mut self.0.config.lock(), &limits?);
        if let Some(events) = &*self.0.events.lock() {
            events.config_changed();
        }
        Ok(())
    }

    /// Brings everything that was written to stable storage.
    ///
    /// # Errors
    /// What the disk reports.
    pub fn flush(&self) -> Result<(), BlockError> {
        self.0
            .on_thread(|unit| async move { unit.shared.disk.flush().await })
            .unwrap_or(Ok(()))
    }

    /// Stops serving the guest and closes the image. Dropping the device does so too, without telling of errors.
    ///
    /// # Errors
    /// What the disk reports.
    pub fn close(&self) -> Result<(), BlockError> {
        self.0.close()
    }
}

impl Drop for Blk {
    fn drop(&mut self) {
        // Who wants to know of an error has called `BlkHandle::close`.
        let _ = self.core.close();
    }
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.options.queue_size; usize::from(self.options.queues)]
    }

    fn features(&self) -> u64 {
        let mut features =
            feature::SEG_MAX | feature::BLK_SIZE | feature::FLUSH | feature::TOPOLOGY | feature::MQ;
        if self.read_only {
            features |= feature::RO;
        } else {
            features |= feature::CONFIG_WCE | feature::WRITE_ZEROES;
            if self.discards {
                features |= feature::DISCARD;
            }
        }
        features
    }

    fn accepts(&self, _: u64) -> bool {
        true
    }

    fn connect(&mut self, events: Arc<dyn DeviceEvents>) {
        *self.core.events.lock() = Some(events);
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_space(&*self.core.config.lock(), offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if let (config::WRITEBACK, [writeback @ (0 | 1)]) = (offset, data)
            && !self.read_only
        {
            self.core.config.lock()[config::WRITEBACK] = *writeback;
            self.core
                .write_through
                .store(*writeback == 0, Ordering::Relaxed);
        }
    }

    fn activate(&mut self, activation: Activation) {
        let features = activation.features;
        // Section 5.2.5: without FLUSH the driver can't ask for stable storage, so each write goes there.
        if features & feature::CONFIG_WCE == 0 {
            let through = features & feature::FLUSH == 0;
            self.core.config.lock()[config::WRITEBACK] = u8::from(!through);
            self.core.write_through.store(through, Ordering::Relaxed);
        }
        self.core.on_thread(move |unit| async move {
            for active in activation.queues {
                unit.start(active);
            }
        });
    }

    fn start_queue(&mut self, queue: ActiveQueue) {
        self.core
            .on_thread(move |unit| async move { unit.start(queue) });
    }

    fn stop_queue(&mut self, index: u16) {
        self.core
            .on_thread(move |unit| async move { unit.stop(index).await });
    }

    fn reset(&mut self) {
        self.core
            .on_thread(|unit| async move { unit.stop_all().await });
        self.core.config.lock()[config::WRITEBACK] = 1;
        self.core.write_through.store(false, Ordering::Relaxed);
    }
}
