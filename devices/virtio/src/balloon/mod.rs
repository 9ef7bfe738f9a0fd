//! The memory balloon (section 5.5): pages that the guest does without go back to the host.
//!
//! One thread, `virtio-balloon`, gives pages back and collects statistics, so that vCPUs do not wait for the host's kernel.
//! Pages of the balloon, and free pages that the guest reports, read as zero when the guest touches them again.

pub mod spec;
#[cfg(test)]
mod tests;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use guest_clock::{GuestClock, Timer};
use guest_memory::{GuestMemory, GuestSlice, MemoryView};
use parking_lot::Mutex;
use rustix::event::PollFlags;

use crate::device::{Activation, ActiveQueue, DeviceEvents, VirtioDevice, read_space};
use crate::doorbell;
use crate::queue::{Buffers, QueueError, Token};
use crate::spec::DeviceType;
use crate::worker::{Service, WaitSet, Worker, WorkerHandle};
use spec::{PAGE, STATISTIC, config, feature};

const QUEUE_SIZE: u16 = 128;
/// Chains of one queue before the others have their turn.
const TURN: usize = 32;
/// The most page numbers in one chain: 256 MiB of guest memory.
const MAX_PAGES: usize = 64 << 10;

/// What a balloon offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BalloonOptions {
    /// The guest may take pages back by itself when it runs out of memory.
    pub deflate_on_oom: bool,
    /// The guest reports free pages, which then cost the host nothing.
    pub free_page_reporting: bool,
}

impl Default for BalloonOptions {
    fn default() -> Self {
        Self {
            deflate_on_oom: false,
            free_page_reporting: true,
        }
    }
}

/// What the guest last said of its memory. Values in bytes, or counts, as the tag has it (section 5.5.6.4).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BalloonStatistics {
    /// Guest time of the report in nanoseconds; 0 before the first.
    pub updated: u64,
    /// Tag and value, in the guest's order.
    pub values: Vec<(u16, u64)>,
}

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

/// Hears of the balloon's size in bytes.
type OnChange = Box<dyn Fn(u64) + Send>;

/// What the device and its handles share.
struct Shared {
    clock: GuestClock,
    config: Mutex<[u8; config::SIZE]>,
    events: Mutex<Option<Arc<dyn DeviceEvents>>>,
    statistics: Mutex<BalloonStatistics>,
    /// Nanoseconds of guest time between polls; 0 for none.
    interval: AtomicU64,
    /// Called when the guest has changed the balloon's size.
    on_change: Mutex<Option<OnChange>>,
}

impl Shared {
    fn field(&self, at: usize) -> u32 {
        let space = self.config.lock();
        u32::from_le_bytes([space[at], space[at + 1], space[at + 2], space[at + 3]])
    }

    fn set_field(&self, at: usize, value: u32) {
        self.config.lock()[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
}

/// The device's thread.
struct Keeper {
    // Configuration.
    shared: Arc<Shared>,
    // Runtime.
    timer: Option<Timer>,
    view: Option<MemoryView>,
    queues: Vec<(Role, ActiveQueue)>,
    again: bool,
    // Volatile guest state.
    /// The statistics buffer, which the driver leaves with us until we want new ones.
    held: Option<Token>,
}

impl Keeper {
    fn start(&mut self, role: Role, memory: &GuestMemory, queue: ActiveQueue) {
        self.view.get_or_insert_with(|| MemoryView::new(memory));
        self.queues.push((role, queue));
        self.again = true;
        self.arm();
    }

    fn stop(&mut self, index: u16) {
        self.queues.retain(|(_, q)| q.queue.index() != index);
        if !self.queues.iter().any(|(r, _)| *r == Role::Statistics) {
            self.held = None;
        }
    }

    fn reset(&mut self) {
        self.queues.clear();
        self.view = None;
        self.held = None;
    }

    fn serve(&mut self, at: usize) {
        let Some((role, active)) = self.queues.get_mut(at) else {
            return;
        };
        let Some(view) = &mut self.view else {
            return;
        };
        view.refresh();
        let queue = &mut active.queue;
        for _ in 0..TURN {
            let Some(chain) = queue.pop() else {
                queue.commit();
                if queue.enable_doorbell() {
                    continue;
                }
                return;
            };
            match role {
                Role::Inflate => {
                    if chain.readable.len() > MAX_PAGES * 4 {
                        queue.fail(QueueError::Request("a balloon request of too many pages"));
                        return;
                    }
                    inflate(view, &chain.readable);
                }
                Role::Deflate => {}
                Role::Statistics => {
                    read_statistics(&self.shared, &chain.readable);
                    if self.held.replace(chain.token).is_some() {
                        queue.fail(QueueError::Request("a second buffer for statistics"));
                        return;
                    }
                    continue;
                }
                Role::Reporting => {
                    // A guest that fills free pages with a pattern counts on finding it again.
                    if self.shared.field(config::POISON) == 0 {
                        chain.writable.slices().iter().for_each(discard);
                    }
                }
            }
            queue.push(chain.token, 0);
        }
        queue.commit();
        self.again = true;
    }

    /// Asks for new statistics, if the driver has left us its buffer.
    fn poll_statistics(&mut self) {
        let of_statistics = self.queues.iter_mut().find(|(r, _)| *r == Role::Statistics);
        if let (Some((_, active)), Some(token)) = (of_statistics, self.held.take()) {
            active.queue.push(token, 0);
            active.queue.commit();
        }
        self.arm();
    }

    fn arm(&self) {
        let interval = self.shared.interval.load(Ordering::SeqCst);
        let wanted = interval != 0 && self.queues.iter().any(|(r, _)| *r == Role::Statistics);
        match &self.timer {
            Some(timer) if wanted => timer.arm(self.shared.clock.now().saturating_add(interval)),
            Some(timer) => timer.disarm(),
            None => {}
        }
    }
}

fn discard(slice: &GuestSlice) {
    slice.discard();
}

/// Gives the pages whose numbers are in the buffers back to the host.
fn inflate(view: &mut MemoryView, numbers: &Buffers) {
    let bytes = numbers.to_vec(MAX_PAGES * 4);
    let mut pages = bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|number| u64::from(u32::from_le_bytes(*number)));
    let Some(first) = pages.next() else {
        return;
    };
    // Drivers give them in falling or rising order: neighbours go together.
    let (mut start, mut end) = (first, first + 1);
    for page in pages {
        if page + 1 == start {
            start = page;
        } else if page == end {
            end += 1;
        } else {
            give_back(view, start, end);
            (start, end) = (page, page + 1);
        }
    }
    give_back(view, start, end);
}

/// Gives pages back, as far as they are memory.
fn give_back(view: &mut MemoryView, start: u64, end: u64) {
    let bytes = ((end - start) * PAGE) as usize;
    if view
        .for_each(start * PAGE, bytes, true, |slice| discard(&slice))
        .is_err()
    {
        // A part of them is no memory: those that are have been given back up to the first that is not. The rest, one by one.
        for page in start..end {
            if let Some(slice) = view.slice(page * PAGE, PAGE as usize, true) {
                discard(&slice);
            }
        }
    }
}

fn read_statistics(shared: &Shared, buffer: &Buffers) {
    let bytes = buffer.to_vec(64 * STATISTIC);
    let values: Vec<(u16, u64)> = bytes
        .as_chunks::<STATISTIC>()
        .0
        .iter()
        .map(|[t0, t1, value @ ..]| (u16::from_le_bytes([*t0, *t1]), u64::from_le_bytes(*value)))
        .collect();
    // The driver's first buffer may be empty: it comes before anybody has asked.
    if !values.is_empty() {
        *shared.statistics.lock() = BalloonStatistics {
            updated: shared.clock.now(),
            values,
        };
    }
}

impl Service for Keeper {
    fn wait_for<'a>(&'a self, set: &mut WaitSet<'a>) {
        if self.again {
            set.at_most(Duration::ZERO);
        }
        for (at, (_, active)) in self.queues.iter().enumerate() {
            set.add(active.doorbell.as_fd(), PollFlags::IN, at as u64);
        }
    }

    fn ready(&mut self, token: u64, _: PollFlags) {
        if let Some((_, active)) = self.queues.get(token as usize) {
            doorbell::take(&active.doorbell);
        }
        self.serve(token as usize);
    }

    fn end_of_batch(&mut self) {
        if std::mem::take(&mut self.again) {
            for at in 0..self.queues.len() {
                self.serve(at);
            }
        }
    }
}

/// Reaches a balloon that a guest has, from the monitor.
#[derive(Clone)]
pub struct BalloonHandle {
    shared: Arc<Shared>,
    thread: WorkerHandle<Keeper>,
}

impl BalloonHandle {
    /// Asks the guest to give up `bytes` of its memory in all; rounded down to pages.
    pub fn set_target(&self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
        self.shared.set_field(config::NUM_PAGES, pages);
        if let Some(events) = &*self.shared.events.lock() {
            events.config_changed();
        }
    }

    /// What the guest has given up, in bytes, as it says.
    pub fn actual(&self) -> u64 {
        u64::from(self.shared.field(config::ACTUAL)) * PAGE
    }

    /// Calls `f` with [`Self::actual`] whenever the guest changes it, on a vCPU's thread.
    pub fn on_change(&self, f: impl Fn(u64) + Send + 'static) {
        *self.shared.on_change.lock() = Some(Box::new(f));
    }

    /// What the guest last said of its memory.
    pub fn statistics(&self) -> BalloonStatistics {
        self.shared.statistics.lock().clone()
    }

    /// Asks for statistics every `interval` nanoseconds of guest time; 0 ends it.
    pub fn poll_statistics(&self, interval: u64) {
        self.shared.interval.store(interval, Ordering::SeqCst);
        self.thread.post(|keeper| keeper.arm());
    }
}

/// The memory balloon.
pub struct Balloon {
    // Configuration.
    options: BalloonOptions,
    // Runtime.
    shared: Arc<Shared>,
    worker: Worker<Keeper>,
    memory: Option<GuestMemory>,
    // Volatile guest state.
    features: u64,
}

impl Balloon {
    /// A balloon with nothing in it.
    ///
    /// # Errors
    /// When the host gives no thread.
    pub fn new(
        options: BalloonOptions,
        clock: &GuestClock,
    ) -> std::io::Result<(Self, BalloonHandle)> {
        let shared = Arc::new(Shared {
            clock: clock.clone(),
            config: Mutex::new([0; config::SIZE]),
            events: Mutex::new(None),
            statistics: Mutex::default(),
            interval: AtomicU64::new(0),
            on_change: Mutex::new(None),
        });
        let keeper = Keeper {
            shared: shared.clone(),
            timer: None,
            view: None,
            queues: Vec::new(),
            again: false,
            held: None,
        };
        let worker = Worker::start("virtio-balloon", keeper)?;
        let of_timer = worker.handle().clone();
        let timer = clock.timer(move || of_timer.post(Keeper::poll_statistics));
        worker
            .handle()
            .post(move |keeper| keeper.timer = Some(timer));
        let handle = BalloonHandle {
            shared: shared.clone(),
            thread: worker.handle().clone(),
        };
        let device = Self {
            options,
            shared,
            worker,
            memory: None,
            features: 0,
        };
        Ok((device, handle))
    }

    /// What queue `index` is for. Section 5.5.2 has reporting at 4, but Linux and other drivers number only the queues whose
    /// features were negotiated, so it can be at 2 or 3 as well; nothing else can be there then.
    fn role(&self, index: u16) -> Role {
        match index {
            0 => Role::Inflate,
            1 => Role::Deflate,
            2 if self.features & feature::STATS_VQ != 0 => Role::Statistics,
            _ => Role::Reporting,
        }
    }

    fn start(&self, queue: ActiveQueue) {
        let role = self.role(queue.queue.index());
        if let Some(memory) = self.memory.clone() {
            self.worker
                .call(move |keeper| keeper.start(role, &memory, queue));
        }
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 5]
    }

    fn features(&self) -> u64 {
        let mut features = feature::STATS_VQ;
        if self.options.deflate_on_oom {
            features |= feature::DEFLATE_ON_OOM;
        }
        if self.options.free_page_reporting {
            features |= feature::PAGE_REPORTING | feature::PAGE_POISON;
        }
        features
    }

    fn accepts(&self, _: u64) -> bool {
        true
    }

    fn connect(&mut self, events: Arc<dyn DeviceEvents>) {
        *self.shared.events.lock() = Some(events);
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_space(&*self.shared.config.lock(), offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else {
            return;
        };
        match offset {
            config::ACTUAL => {
                self.shared.set_field(offset, value);
                if let Some(tell) = &*self.shared.on_change.lock() {
                    tell(u64::from(value) * PAGE);
                }
            }
            config::POISON => self.shared.set_field(offset, value),
            _ => {}
        }
    }

    fn activate(&mut self, activation: Activation) {
        self.features = activation.features;
        if self.features & feature::PAGE_POISON == 0 {
            self.shared.set_field(config::POISON, 0);
        }
        self.memory = Some(activation.memory);
        for queue in activation.queues {
            self.start(queue);
        }
    }

    fn start_queue(&mut self, queue: ActiveQueue) {
        self.start(queue);
    }

    fn stop_queue(&mut self, index: u16) {
        self.worker.call(move |keeper| keeper.stop(index));
    }

    fn reset(&mut self) {
        self.worker.call(Keeper::reset);
        self.shared.set_field(config::ACTUAL, 0);
        self.shared.set_field(config::POISON, 0);
        *self.shared.statistics.lock() = BalloonStatistics::default();
    }
}
