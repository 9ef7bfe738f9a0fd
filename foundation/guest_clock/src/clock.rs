//! The clock itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use rustix::time::{ClockId, clock_gettime};

use crate::timers::{Timer, TimerQueue};

const STOPPED: i64 = i64::MIN;

/// Guest time as a function of the host's.
pub(crate) struct Time {
    /// Host monotonic time at which guest time was zero, or [`STOPPED`].
    zero: AtomicI64,
    /// Guest time at which the clock was stopped.
    stopped_at: AtomicU64,
}

struct Inner {
    time: Arc<Time>,
    change: Mutex<()>,
    timers: TimerQueue,
}

/// Guest time. Clones are handles to the same clock. A new clock stands at zero until [`GuestClock::resume`].
#[derive(Clone)]
pub struct GuestClock(Arc<Inner>);

/// Host monotonic time in nanoseconds.
fn host_now() -> i64 {
    let t = clock_gettime(ClockId::Monotonic);
    t.tv_sec * 1_000_000_000 + t.tv_nsec
}

impl Default for GuestClock {
    fn default() -> Self {
        Self::new()
    }
}

impl GuestClock {
    /// A clock that stands at zero.
    pub fn new() -> Self {
        let time = Arc::new(Time {
            zero: AtomicI64::new(STOPPED),
            stopped_at: AtomicU64::new(0),
        });
        let timers = TimerQueue::start(time.clone());
        Self(Arc::new(Inner {
            time,
            change: Mutex::new(()),
            timers,
        }))
    }

    /// A clock that stands at zero and moves only by [`Self::advance`]: for tests that must run the same way each time.
    /// It has no thread, and is not to be resumed.
    pub fn stepped() -> Self {
        let time = Arc::new(Time {
            zero: AtomicI64::new(STOPPED),
            stopped_at: AtomicU64::new(0),
        });
        Self(Arc::new(Inner {
            time,
            change: Mutex::new(()),
            timers: TimerQueue::without_thread(),
        }))
    }

    /// Moves a [stepped](Self::stepped) clock by `nanoseconds`, then fires what is due on the caller's thread, earliest
    /// first: also timers that these calls arm for a time that has come, but no more than `at_most` calls in all.
    /// Returns how many there were.
    ///
    /// # Panics
    /// When the clock is running.
    pub fn advance(&self, nanoseconds: u64, at_most: usize) -> usize {
        let now = self.now().saturating_add(nanoseconds);
        self.set(now);
        (0..at_most)
            .take_while(|_| self.0.timers.fire_one(now))
            .count()
    }

    /// Nanoseconds of guest time.
    pub fn now(&self) -> u64 {
        self.0.time.now()
    }

    /// Stops the clock; timers do not fire until it goes on.
    pub fn stop(&self) {
        let _change = self.0.change.lock();
        if self.0.time.is_running() {
            self.0
                .time
                .stopped_at
                .store(self.0.time.now(), Ordering::SeqCst);
            self.0.time.zero.store(STOPPED, Ordering::SeqCst);
        }
    }

    /// Lets the clock go on from where it stands.
    pub fn resume(&self) {
        let _change = self.0.change.lock();
        if !self.0.time.is_running() {
            let at = self.0.time.stopped_at.load(Ordering::SeqCst);
            self.0
                .time
                .zero
                .store(host_now() - at as i64, Ordering::SeqCst);
            self.0.timers.wake();
        }
    }

    /// Sets guest time, as after a migration. Only while the clock is stopped.
    ///
    /// # Panics
    /// When the clock is running.
    pub fn set(&self, now: u64) {
        let _change = self.0.change.lock();
        assert!(!self.0.time.is_running(), "guest time set while it runs");
        self.0.time.stopped_at.store(now, Ordering::SeqCst);
    }

    /// True while the clock is running.
    pub fn is_running(&self) -> bool {
        self.0.time.is_running()
    }

    /// The host's monotonic time in nanoseconds at which guest time was zero, or `None` while the clock stands. It grows
    /// by the length of each stop: what runs on a clock of the host (a kernel's processor) sets itself back by as much.
    pub fn zero(&self) -> Option<i64> {
        Some(self.0.time.zero.load(Ordering::SeqCst)).filter(|zero| *zero != STOPPED)
    }

    /// The wall clock, since 1970-01-01 UTC: what a battery-backed clock would show.
    pub fn wall(&self) -> Duration {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
    }

    /// A timer that calls `fire` in the clock's own thread whenever it expires. The call must be short, and may arm the
    /// timer again. Dropping the timer disarms it.
    pub fn timer(&self, fire: impl Fn() + Send + Sync + 'static) -> Timer {
        self.0.timers.timer(fire)
    }
}

impl Time {
    pub(crate) fn now(&self) -> u64 {
        loop {
            let zero = self.zero.load(Ordering::SeqCst);
            if zero != STOPPED {
                return (host_now() - zero).max(0) as u64;
            }
            let at = self.stopped_at.load(Ordering::SeqCst);
            if self.zero.load(Ordering::SeqCst) == STOPPED {
                return at;
            }
        }
    }

    pub(crate) fn is_running(&self) -> bool {
        self.zero.load(Ordering::SeqCst) != STOPPED
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.timers.end();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn stands_still_while_stopped() {
        let clock = GuestClock::new();
        assert_eq!(clock.now(), 0);
        clock.set(5_000);
        assert_eq!(clock.now(), 5_000);
        clock.resume();
        let a = clock.now();
        assert!(a >= 5_000);
        clock.stop();
        let b = clock.now();
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(clock.now(), b);
        clock.resume();
        assert!(clock.now() >= b);
    }

    #[test]
    fn its_zero_moves_by_the_length_of_a_stop() {
        let clock = GuestClock::new();
        assert_eq!(clock.zero(), None);
        clock.resume();
        let first = clock.zero().unwrap();
        assert!(first <= host_now());
        clock.stop();
        assert_eq!(clock.zero(), None);
        std::thread::sleep(Duration::from_millis(2));
        clock.resume();
        assert!(clock.zero().unwrap() >= first + 2_000_000);
    }

    #[test]
    fn timers_fire_in_order_and_not_while_stopped() {
        let clock = GuestClock::new();
        let (send, fired) = mpsc::channel();
        let make = |n: u32| {
            let send = send.clone();
            clock.timer(move || send.send(n).unwrap())
        };
        let (a, b, c) = (make(1), make(2), make(3));
        b.arm(2_000_000);
        a.arm(1_000_000);
        c.arm(1_500_000);
        c.disarm();
        assert!(fired.recv_timeout(Duration::from_millis(10)).is_err());
        clock.resume();
        assert_eq!(fired.recv_timeout(Duration::from_secs(5)), Ok(1));
        assert_eq!(fired.recv_timeout(Duration::from_secs(5)), Ok(2));
        assert!(clock.now() >= 2_000_000);
        drop(b);
        assert!(fired.try_recv().is_err());
    }

    #[test]
    fn a_timer_can_arm_itself_again() {
        let clock = GuestClock::new();
        clock.resume();
        let (send, fired) = mpsc::channel();
        let own: Arc<Mutex<Option<Timer>>> = Arc::default();
        let (inside, at) = (own.clone(), clock.clone());
        let timer = clock.timer(move || {
            if let Some(timer) = inside.lock().as_ref() {
                timer.arm(at.now() + 1000);
            }
            let _ = send.send(());
        });
        // It can't fire before its own hand is on it.
        own.lock().insert(timer).arm(0);
        for _ in 0..3 {
            fired.recv_timeout(Duration::from_secs(5)).unwrap();
        }
        own.lock().take();
    }

    #[test]
    fn a_stepped_clock_fires_on_the_callers_thread_and_no_more_than_is_asked() {
        let clock = GuestClock::stepped();
        let fired = Arc::new(AtomicU64::new(0));
        let (count, own) = (fired.clone(), Arc::new(Mutex::new(None::<Timer>)));
        let again = Arc::downgrade(&own);
        let timer = clock.timer(move || {
            count.fetch_add(1, Ordering::SeqCst);
            // Armed for a time that has come: due again at once.
            if let Some(timer) = again.upgrade().as_ref().and_then(|t| t.try_lock()) {
                timer.as_ref().unwrap().arm(10);
            }
        });
        timer.arm(10);
        *own.lock() = Some(timer);
        assert_eq!(clock.advance(9, 100), 0);
        assert_eq!(clock.advance(1, 7), 7);
        assert_eq!((clock.now(), fired.load(Ordering::SeqCst)), (10, 7));
        own.lock().take();
        assert_eq!(clock.advance(1, 7), 0);
    }
}
