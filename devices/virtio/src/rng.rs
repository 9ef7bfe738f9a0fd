//! The entropy device (section 5.4): fills the guest's buffers with the host's random numbers.
//!
//! One thread, `virtio-rng`. A rate limit is in guest time: the budget of a period is given out, then the rest waits
//! for the next period.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use std::time::Duration;

use guest_clock::{GuestClock, Timer};
use rustix::event::PollFlags;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::device::{Activation, ActiveQueue, DeviceEvents, VirtioDevice};
use crate::doorbell;
use crate::spec::DeviceType;
use crate::worker::{Service, WaitSet, Worker, WorkerHandle};

const QUEUE_SIZE: u16 = 64;
/// The most that one request gets, in bytes; it may get less than it asked for (section 5.4.6).
const MAX_REQUEST: usize = 64 << 10;
/// Requests served before the thread looks for other work, so that a guest can't keep it from that.
const TURN: usize = 64;

/// A limit to what the guest may draw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateLimit {
    /// Bytes in each period; at least 1.
    pub bytes: u64,
    /// Nanoseconds of guest time; at least 1.
    pub period: u64,
}

/// The entropy device.
pub struct Rng {
    worker: Worker<Source>,
    events: Option<Arc<dyn DeviceEvents>>,
    // Keeps the handle that the timer's function uses.
    _timer: Option<WorkerHandle<Source>>,
}

struct Source {
    // Configuration.
    limit: Option<(RateLimit, GuestClock)>,
    // Runtime.
    active: Option<ActiveQueue>,
    timer: Option<Timer>,
    armed: Arc<AtomicBool>,
    // Volatile guest state.
    /// What is left of the period's budget, and the guest time at which the period ends.
    left: u64,
    period_end: u64,
    /// More waits than one turn may serve.
    again: bool,
}

impl Rng {
    /// An entropy device; `limit` with the clock that it goes by.
    ///
    /// # Errors
    /// When the host gives no thread.
    pub fn new(limit: Option<(RateLimit, GuestClock)>) -> std::io::Result<Self> {
        let clock = limit.as_ref().map(|(_, clock)| clock.clone());
        let worker = Worker::start(
            "virtio-rng",
            Source {
                limit,
                active: None,
                timer: None,
                armed: Arc::default(),
                left: 0,
                period_end: 0,
                again: false,
            },
        )?;
        let timer = clock.map(|clock| {
            let handle = worker.handle().clone();
            let of_timer = handle.clone();
            handle.post(move |source| {
                let armed = source.armed.clone();
                source.timer = Some(clock.timer(move || {
                    armed.store(false, Ordering::SeqCst);
                    of_timer.post(Source::serve);
                }));
            });
            handle
        });
        Ok(Self {
            worker,
            events: None,
            _timer: timer,
        })
    }
}

impl Source {
    /// How much may be given out now.
    fn budget(&mut self) -> u64 {
        let Some((limit, clock)) = &self.limit else {
            return u64::MAX;
        };
        let now = clock.now();
        if now >= self.period_end {
            self.left = limit.bytes.max(1);
            self.period_end = now.saturating_add(limit.period.max(1));
        }
        if self.left == 0
            && let Some(timer) = &self.timer
            && !self.armed.swap(true, Ordering::SeqCst)
        {
            timer.arm(self.period_end);
        }
        self.left
    }

    fn serve(&mut self) {
        self.again = false;
        for _ in 0..TURN {
            let budget = self.budget();
            let Some(active) = &mut self.active else {
                return;
            };
            let queue = &mut active.queue;
            if budget == 0 {
                // The timer comes back here; doorbells need not.
                queue.disable_doorbell();
                queue.commit();
                return;
            }
            let Some(chain) = queue.pop() else {
                queue.commit();
                if queue.enable_doorbell() {
                    continue;
                }
                return;
            };
            let wanted = chain.writable.len().min(MAX_REQUEST);
            let mut bytes = vec![0; wanted.min(usize::try_from(budget).unwrap_or(usize::MAX))];
            let filled = fill(&mut bytes);
            chain.writable.write_at(0, &bytes[..filled]);
            self.left = self.left.saturating_sub(filled as u64);
            queue.push(chain.token, filled as u32);
        }
        self.again = true;
        if let Some(active) = &mut self.active {
            active.queue.commit();
        }
    }
}

/// Fills `bytes` from the host's generator; returns how many.
fn fill(bytes: &mut [u8]) -> usize {
    let mut done = 0;
    while done < bytes.len() {
        match getrandom(&mut bytes[done..], GetRandomFlags::empty()) {
            Ok(n) => done += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => break,
        }
    }
    done
}

impl Service for Source {
    fn wait_for<'a>(&'a self, set: &mut WaitSet<'a>) {
        if let Some(active) = &self.active {
            set.add(active.doorbell.as_fd(), PollFlags::IN, 0);
        }
        if self.again {
            set.at_most(Duration::ZERO);
        }
    }

    fn ready(&mut self, _: u64, _: PollFlags) {
        if let Some(active) = &self.active {
            let doorbell: &OwnedFd = &active.doorbell;
            doorbell::take(doorbell);
        }
        self.serve();
    }

    fn end_of_batch(&mut self) {
        if self.again {
            self.serve();
        }
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Entropy
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        0
    }

    fn accepts(&self, _: u64) -> bool {
        true
    }

    fn connect(&mut self, events: Arc<dyn DeviceEvents>) {
        self.events = Some(events);
    }

    fn read_config(&self, _: usize, _: &mut [u8]) {}

    fn write_config(&mut self, _: usize, _: &[u8]) {}

    fn activate(&mut self, activation: Activation) {
        for queue in activation.queues {
            self.start_queue(queue);
        }
    }

    fn start_queue(&mut self, queue: ActiveQueue) {
        self.worker.call(|source| {
            source.active = Some(queue);
            source.serve();
        });
    }

    fn stop_queue(&mut self, _: u16) {
        self.reset();
    }

    fn reset(&mut self) {
        self.worker.call(|source| source.active = None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{Status, feature};
    use crate::testing::{DATA, Guest, RAM};
    use crate::transport::spec::common;

    #[test]
    fn gives_random_bytes_with_every_ring() {
        let mut guest = Guest::new(Rng::new(None).unwrap());
        for features in [
            0,
            feature::EVENT_IDX,
            feature::RING_PACKED,
            feature::RING_PACKED | feature::EVENT_IDX,
        ] {
            guest.start(features | feature::INDIRECT_DESC, 8);
            for _ in 0..20 {
                guest.put(DATA, &[0; 64]);
                assert_eq!(
                    guest.request(0, &[(DATA, 32, true), (DATA + 40, 8, true)]),
                    40
                );
                assert_ne!(guest.bytes(DATA, 32), [0; 32]);
                assert_eq!(guest.bytes(DATA + 32, 8), [0; 8]);
                assert_ne!(guest.bytes(DATA + 40, 8), [0; 8]);
            }
        }
        assert!(guest.interrupts.count(0) > 0);
    }

    #[test]
    fn a_limit_holds_the_rest_back_until_the_next_period() {
        let clock = GuestClock::new();
        let limit = RateLimit {
            bytes: 48,
            period: 1_000_000,
        };
        let mut guest = Guest::new(Rng::new(Some((limit, clock.clone()))).unwrap());
        guest.start(0, 8);
        assert_eq!(guest.request(0, &[(DATA, 32, true)]), 32);
        assert_eq!(guest.request(0, &[(DATA, 32, true)]), 16);
        guest.send(0, &[(DATA, 8, true)]);
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(guest.queue(0).used(), None);
        clock.resume();
        assert_eq!(guest.used(0), (2, 8));
    }

    #[test]
    fn interrupts_by_pin_without_msix() {
        let mut guest = Guest::new(Rng::new(None).unwrap());
        guest.interrupts.msix.store(false, Ordering::SeqCst);
        guest.start(0, 8);
        guest.send(0, &[(DATA, 8, true)]);
        guest.wait(|guest| guest.interrupts.level().then_some(()));
        assert_eq!(guest.read(0x1000, 1), 1);
        assert!(!guest.interrupts.level());
        assert_eq!(guest.read(0x1000, 1), 0);
        assert_eq!(guest.interrupts.count(0), 0);
    }

    #[test]
    fn a_hostile_queue_asks_for_a_reset_and_works_after_it() {
        let mut guest = Guest::new(Rng::new(None).unwrap());
        guest.start(0, 8);
        guest.send(0, &[(RAM, 8, true)]);
        guest.wait_for_failure();
        guest.wait(|guest| (guest.interrupts.count(1) == 1).then_some(()));
        assert_eq!(
            guest.bar.status().failure.unwrap(),
            "queue 0: a buffer 0x1000000+0x8 that is not in memory"
        );
        guest.start(0, 8);
        assert_eq!(guest.request(0, &[(DATA, 8, true)]), 8);
    }

    #[test]
    fn single_queues_reset() {
        let mut guest = Guest::new(Rng::new(None).unwrap());
        guest.start(feature::RING_RESET, 8);
        guest.request(0, &[(DATA, 8, true)]);
        guest.write(common::QUEUE_SELECT, 2, 0);
        guest.write(common::QUEUE_RESET, 2, 1);
        assert_eq!(guest.read(common::QUEUE_RESET, 2), 0);
        assert_eq!(guest.read(common::QUEUE_ENABLE, 2), 0);
        assert_eq!(guest.read(common::QUEUE_SIZE, 2), 64);
        assert_eq!(guest.read(common::QUEUE_DESC, 8), 0);
        guest.send(0, &[(DATA, 8, true)]);
        guest.add_queue(0, 4);
        assert_eq!(guest.request(0, &[(DATA, 8, true)]), 8);
    }

    #[test]
    fn the_status_machine_keeps_its_order() {
        let guest = Guest::new(Rng::new(None).unwrap());
        let all = guest.offered();
        assert_ne!(all & feature::VERSION_1, 0);
        let begun = Status::ACKNOWLEDGE | Status::DRIVER;
        let negotiate = |features: u64| {
            guest.set_status(Status::empty());
            guest.set_status(begun);
            guest.write(common::DRIVER_FEATURE_SELECT, 4, 0);
            guest.write(common::DRIVER_FEATURE, 4, features & 0xffff_ffff);
            guest.write(common::DRIVER_FEATURE_SELECT, 4, 1);
            guest.write(common::DRIVER_FEATURE, 4, features >> 32);
            guest.set_status(begun | Status::FEATURES_OK);
            guest.status().contains(Status::FEATURES_OK)
        };
        assert!(!negotiate(0));
        assert!(!negotiate(feature::VERSION_1 | 1 << 50));
        guest.set_status(begun | Status::FEATURES_OK | Status::DRIVER_OK);
        assert_eq!(guest.status(), begun);
        assert!(negotiate(feature::VERSION_1));
        guest.write(common::DRIVER_FEATURE, 4, 0);
        assert_eq!(guest.read(common::DRIVER_FEATURE, 4), 1);
        guest.write(common::QUEUE_SELECT, 2, 77);
        assert_eq!(guest.read(common::QUEUE_SIZE, 2), 0);
        guest.write(common::QUEUE_ENABLE, 2, 1);
        guest.write(common::QUEUE_RESET, 2, 1);
        guest.write(common::QUEUE_VECTOR, 2, 0);
        assert_eq!(guest.read(common::QUEUE_VECTOR, 2), 0xffff);
        guest.write(common::CONFIG_VECTOR, 2, 2);
        assert_eq!(guest.read(common::CONFIG_VECTOR, 2), 0xffff);
        guest.write(common::CONFIG_VECTOR, 2, 1);
        assert_eq!(guest.read(common::CONFIG_VECTOR, 2), 1);
        assert_eq!(guest.read(common::NUM_QUEUES, 2), 1);
        // No queue is enabled; the device must bear that too.
        guest.driver_ok();
        guest.kick(0);
        guest.kick(900);
        guest.bar.reset();
        assert_eq!(guest.status(), Status::empty());
    }

    #[test]
    fn registers_bear_every_access() {
        let guest = Guest::new(Rng::new(None).unwrap());
        let mut seed = 1u64;
        for _ in 0..20_000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let len = 1 << (seed >> 60 & 3);
            let offset = ((seed >> 33) % 0x4000) & !(len - 1);
            let offset = if seed & 1 << 20 == 0 {
                offset & 0x3f
            } else {
                offset
            };
            if seed & 1 << 21 == 0 {
                guest.write(offset as usize, len as usize, seed >> 13 & 0xff);
            } else {
                guest.read(offset as usize, len as usize);
            }
        }
    }
}
