//! Events that may come often are told at most once in a while, the last state of them in any case (QEMU `qapi`, "rate-limited").

use std::time::{Duration, Instant};

/// How long nothing more is told.
const PAUSE: Duration = Duration::from_secs(1);

/// The rate of one kind of events.
#[derive(Debug, Default)]
pub(crate) struct EventRate {
    told: Option<Instant>,
    /// When the event that waits is to be told.
    due: Option<Instant>,
}

impl EventRate {
    /// Whether an event that comes, or has come due, is told now. If not it waits.
    pub(crate) fn admit(&mut self, now: Instant) -> bool {
        let due = self.told.map(|told| told + PAUSE);
        if let Some(due) = due.filter(|due| *due > now) {
            self.due = Some(due);
            return false;
        }
        self.due = None;
        self.told = Some(now);
        true
    }

    /// When to ask again, while an event waits.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_comes_at_once_and_the_last_in_a_second() {
        let (mut rate, start) = (EventRate::default(), Instant::now());
        let after = |ms| start + Duration::from_millis(ms);
        assert!(rate.admit(start));
        assert_eq!(rate.due(), None);
        for ms in [1, 500, 999] {
            assert!(!rate.admit(after(ms)));
            assert_eq!(rate.due(), Some(after(1000)));
        }
        assert!(rate.admit(after(1000)));
        assert_eq!(rate.due(), None);
        assert!(!rate.admit(after(1999)));
        assert!(rate.admit(after(2005)));
    }
}
