//! Timers in guest time, fired by one thread for each clock.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::clock::Time;

type Fire = Arc<dyn Fn() + Send + Sync>;

#[derive(Default)]
struct Queue {
    /// By deadline, then by the timer's number.
    armed: BTreeMap<(u64, u64), Fire>,
    ended: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
    next: AtomicU64,
}

/// The armed timers of a clock, and the thread that fires them.
pub(crate) struct TimerQueue(Arc<Shared>);

/// A timer; see [`GuestClock::timer`](crate::GuestClock::timer).
pub struct Timer {
    shared: Arc<Shared>,
    number: u64,
    fire: Fire,
    /// The deadline that it is armed for.
    deadline: Mutex<Option<u64>>,
}

impl Timer {
    /// Arms the timer for a guest time in nanoseconds, in place of an earlier deadline. A time that has passed fires at
    /// once.
    pub fn arm(&self, deadline: u64) {
        let mut own = self.deadline.lock();
        let mut queue = self.shared.queue.lock();
        if let Some(old) = own.replace(deadline) {
            queue.armed.remove(&(old, self.number));
        }
        let first = queue
            .armed
            .first_key_value()
            .is_none_or(|((at, _), _)| deadline < *at);
        queue
            .armed
            .insert((deadline, self.number), self.fire.clone());
        drop(queue);
        if first {
            self.shared.changed.notify_one();
        }
    }

    /// Disarms the timer. A call of its function that has begun may still be under way.
    pub fn disarm(&self) {
        if let Some(old) = self.deadline.lock().take() {
            self.shared.queue.lock().armed.remove(&(old, self.number));
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.disarm();
    }
}

impl TimerQueue {
    /// An empty queue whose thread runs until [`Self::end`].
    pub(crate) fn start(time: Arc<Time>) -> Self {
        let shared = Arc::new(Shared::default());
        let served = shared.clone();
        std::thread::Builder::new()
            .name("guest-timers".into())
            .spawn(move || serve(&served, &time))
            .expect("the host gives a thread for timers");
        Self(shared)
    }

    /// An empty queue whose timers only [`Self::fire_one`] fires.
    pub(crate) fn without_thread() -> Self {
        Self(Arc::default())
    }

    /// Fires the earliest timer that is due by `now`. False when there is none.
    pub(crate) fn fire_one(&self, now: u64) -> bool {
        let mut queue = self.0.queue.lock();
        let first = queue.armed.first_entry();
        let Some(first) = first.filter(|first| first.key().0 <= now) else {
            return false;
        };
        let fire = first.remove();
        drop(queue);
        fire();
        true
    }

    pub(crate) fn timer(&self, fire: impl Fn() + Send + Sync + 'static) -> Timer {
        Timer {
            shared: self.0.clone(),
            number: self.0.next.fetch_add(1, Ordering::Relaxed),
            fire: Arc::new(fire),
            deadline: Mutex::new(None),
        }
    }

    pub(crate) fn wake(&self) {
        // Under the lock, so that the thread is either waiting or has yet to look at the clock.
        let _queue = self.0.queue.lock();
        self.0.changed.notify_one();
    }

    pub(crate) fn end(&self) {
        self.0.queue.lock().ended = true;
        self.0.changed.notify_one();
    }
}

/// What the thread has to do next.
enum Next {
    Fire(Fire),
    Wait(Option<Duration>),
}

fn next(queue: &mut Queue, time: &Time) -> Next {
    if !time.is_running() {
        return Next::Wait(None);
    }
    let Some(first) = queue.armed.first_entry() else {
        return Next::Wait(None);
    };
    let (deadline, _) = *first.key();
    let now = time.now();
    if deadline > now {
        return Next::Wait(Some(Duration::from_nanos(deadline - now)));
    }
    Next::Fire(first.remove())
}

fn serve(shared: &Shared, time: &Time) {
    // The kernel's default slack of 50 us would show in every guest timer.
    let _ = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1));
    let mut queue = shared.queue.lock();
    while !queue.ended {
        match next(&mut queue, time) {
            Next::Fire(fire) => MutexGuard::unlocked(&mut queue, move || fire()),
            Next::Wait(None) => shared.changed.wait(&mut queue),
            Next::Wait(Some(left)) => {
                shared.changed.wait_until(&mut queue, Instant::now() + left);
            }
        }
    }
}
