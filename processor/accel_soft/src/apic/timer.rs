//! The local APIC's timer (SDM volume 3, section 12.5.4).

use guest_clock::{GuestClock, Timer};

use super::spec::{LVT_TIMER_MODE, TIMER_ONE_SHOT, TIMER_PERIODIC, TIMER_TSC_DEADLINE};

/// Frequency of the timer's input in Hz; CPUID leaf 0x15 (crystal) and KVM's timing leaf say so to the guest. One tick is
/// one nanosecond of guest time.
pub const TIMER_HZ: u64 = 1_000_000_000;

/// The least period of a periodic timer in nanoseconds; a guest that asks for less would only keep the host busy.
const LEAST_PERIOD: u64 = 100_000;

/// The timer's registers, and the guest-clock timer behind them.
pub(super) struct ApicTimer {
    clock: GuestClock,
    timer: Timer,
    initial: u32,
    divide: u32,
    /// Guest time at which the count was (re)started; meaningless when `initial` is zero.
    started: u64,
    /// IA32_TSC_DEADLINE, zero when disarmed.
    deadline: u64,
}

/// By what the divide configuration register divides.
fn divisor(divide: u32) -> u64 {
    match (divide & 3) | (divide >> 1 & 4) {
        7 => 1,
        n => 2 << n,
    }
}

impl ApicTimer {
    pub(super) fn new(clock: GuestClock, fire: impl Fn() + Send + Sync + 'static) -> Self {
        let timer = clock.timer(fire);
        Self {
            clock,
            timer,
            initial: 0,
            divide: 0,
            started: 0,
            deadline: 0,
        }
    }

    pub(super) fn reset(&mut self) {
        self.timer.disarm();
        self.initial = 0;
        self.divide = 0;
        self.started = 0;
        self.deadline = 0;
    }

    pub(super) fn initial(&self) -> u32 {
        self.initial
    }

    pub(super) fn divide(&self) -> u32 {
        self.divide
    }

    pub(super) fn deadline(&self) -> u64 {
        self.deadline
    }

    fn period(&self) -> u64 {
        u64::from(self.initial) * divisor(self.divide)
    }

    fn effective_period(&self) -> u64 {
        self.period().max(LEAST_PERIOD)
    }

    /// The current count.
    pub(super) fn current(&self, lvt: u32) -> u32 {
        let period = self.period();
        if period == 0 || lvt & LVT_TIMER_MODE == TIMER_TSC_DEADLINE {
            return 0;
        }
        let elapsed = self.clock.now().saturating_sub(self.started);
        let left = if lvt & LVT_TIMER_MODE == TIMER_PERIODIC {
            period - elapsed % period
        } else {
            period.saturating_sub(elapsed)
        };
        left.div_ceil(divisor(self.divide)) as u32
    }

    /// Writes the initial count, which starts the timer or, with zero, stops it.
    pub(super) fn set_initial(&mut self, value: u32, lvt: u32) {
        if lvt & LVT_TIMER_MODE == TIMER_TSC_DEADLINE {
            return;
        }
        self.initial = value;
        self.started = self.clock.now();
        self.arm(lvt);
    }

    /// Writes the divide configuration. The count goes on from where it is.
    pub(super) fn set_divide(&mut self, value: u32, lvt: u32) {
        let current = self.current(lvt);
        self.divide = value & 0xb;
        if self.initial != 0 && lvt & LVT_TIMER_MODE != TIMER_TSC_DEADLINE {
            let done = u64::from(self.initial.saturating_sub(current)) * divisor(self.divide);
            self.started = self.clock.now().saturating_sub(done);
            self.arm(lvt);
        }
    }

    /// The LVT has been written: a change into or out of deadline mode disarms the timer.
    pub(super) fn mode_changed(&mut self, old: u32, new: u32) {
        let (old, new) = (old & LVT_TIMER_MODE, new & LVT_TIMER_MODE);
        if old == new {
            return;
        }
        if (old == TIMER_TSC_DEADLINE) != (new == TIMER_TSC_DEADLINE) {
            self.timer.disarm();
            self.initial = 0;
            self.deadline = 0;
        } else {
            self.arm(new);
        }
    }

    /// Writes IA32_TSC_DEADLINE; `at` is the guest time at which the TSC has that value.
    pub(super) fn set_deadline(&mut self, value: u64, at: u64, lvt: u32) {
        if lvt & LVT_TIMER_MODE != TIMER_TSC_DEADLINE {
            return;
        }
        self.deadline = value;
        if value == 0 {
            self.timer.disarm();
        } else {
            self.timer.arm(at);
        }
    }

    fn arm(&self, lvt: u32) {
        if self.initial == 0 {
            self.timer.disarm();
        } else if lvt & LVT_TIMER_MODE == TIMER_PERIODIC {
            let elapsed = self.clock.now().saturating_sub(self.started);
            let period = self.effective_period();
            self.timer
                .arm(self.started + (elapsed / period + 1) * period);
        } else {
            self.timer.arm(self.started + self.period());
        }
    }

    /// The guest-clock timer has fired. Returns whether the APIC's timer has really expired (its registers may have been
    /// written meanwhile), and arms it anew if it is periodic. `deadline_at` is the guest time of the TSC deadline.
    pub(super) fn fired(&mut self, lvt: u32, deadline_at: impl Fn(u64) -> u64) -> bool {
        let now = self.clock.now();
        match lvt & LVT_TIMER_MODE {
            TIMER_TSC_DEADLINE => {
                if self.deadline == 0 {
                    return false;
                }
                let at = deadline_at(self.deadline);
                if at > now {
                    self.timer.arm(at);
                    return false;
                }
                self.deadline = 0;
                true
            }
            TIMER_PERIODIC => {
                let period = self.effective_period();
                if self.initial == 0 || now.saturating_sub(self.started) < period {
                    return false;
                }
                // Ticks that a late thread has missed are not made up for.
                self.started += (now - self.started) / period * period;
                self.arm(lvt);
                true
            }
            TIMER_ONE_SHOT => self.initial != 0 && now >= self.started + self.period(),
            _ => false,
        }
    }

    /// Takes over saved registers: the initial count, divide configuration, current count and deadline.
    pub(super) fn restore(
        &mut self,
        lvt: u32,
        initial: u32,
        divide: u32,
        current: u32,
        deadline: (u64, u64),
    ) {
        self.timer.disarm();
        self.initial = initial;
        self.divide = divide & 0xb;
        self.deadline = 0;
        if lvt & LVT_TIMER_MODE == TIMER_TSC_DEADLINE {
            self.set_deadline(deadline.0, deadline.1, lvt);
        } else {
            let done = u64::from(initial.saturating_sub(current)) * divisor(self.divide);
            self.started = self.clock.now().saturating_sub(done);
            if current != 0 {
                self.arm(lvt);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divides_as_the_manual_says() {
        let all = [0, 1, 2, 3, 8, 9, 10, 11].map(divisor);
        assert_eq!(all, [2, 4, 8, 16, 32, 64, 128, 1]);
    }

    #[test]
    fn counts_down_in_guest_time() {
        let clock = GuestClock::new();
        let mut t = ApicTimer::new(clock.clone(), || {});
        t.set_divide(3, TIMER_ONE_SHOT);
        t.set_initial(1000, TIMER_ONE_SHOT);
        clock.set(1600);
        assert_eq!(t.current(TIMER_ONE_SHOT), 900);
        t.set_divide(1, TIMER_ONE_SHOT);
        assert_eq!(t.current(TIMER_ONE_SHOT), 900);
        assert!(!t.fired(TIMER_ONE_SHOT, |d| d));
        clock.set(1_000_000);
        assert_eq!(t.current(TIMER_ONE_SHOT), 0);
        assert!(t.fired(TIMER_ONE_SHOT, |d| d));
        t.mode_changed(TIMER_ONE_SHOT, TIMER_TSC_DEADLINE);
        t.set_initial(5, TIMER_TSC_DEADLINE);
        assert_eq!(t.initial(), 0);
        t.set_deadline(2_000_000, 2_000_000, TIMER_TSC_DEADLINE);
        assert!(!t.fired(TIMER_TSC_DEADLINE, |d| d));
        clock.set(2_000_000);
        assert!(t.fired(TIMER_TSC_DEADLINE, |d| d));
        assert_eq!(t.deadline(), 0);
        assert!(!t.fired(TIMER_TSC_DEADLINE, |d| d));
    }

    #[test]
    fn periodic_starts_over() {
        let clock = GuestClock::new();
        let mut t = ApicTimer::new(clock.clone(), || {});
        t.set_divide(0xb, TIMER_PERIODIC);
        t.set_initial(1_000_000, TIMER_PERIODIC);
        clock.set(1_250_000);
        assert_eq!(t.current(TIMER_PERIODIC), 750_000);
        assert!(t.fired(TIMER_PERIODIC, |d| d));
        assert!(!t.fired(TIMER_PERIODIC, |d| d));
        clock.set(5_000_000);
        assert!(t.fired(TIMER_PERIODIC, |d| d));
        assert!(!t.fired(TIMER_PERIODIC, |d| d));
        assert_eq!(t.current(TIMER_PERIODIC), 1_000_000);
    }
}
