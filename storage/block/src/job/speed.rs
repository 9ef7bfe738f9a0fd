//! How fast a job may go.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// How far ahead of its average a job may be.
const AHEAD: Duration = Duration::from_millis(100);

/// A limit on bytes per second; 0 is none.
#[derive(Default)]
pub(super) struct Speed {
    limit: Cell<u64>,
    /// When what was done so far would have been done at the limit.
    due: Cell<Option<Instant>>,
}

impl Speed {
    pub(super) fn limit(&self) -> u64 {
        self.limit.get()
    }

    pub(super) fn set_limit(&self, limit: u64) {
        self.limit.set(limit);
        self.due.set(None);
    }

    /// Counts bytes as done.
    pub(super) fn count(&self, bytes: u64) {
        let limit = self.limit.get();
        if limit == 0 {
            return;
        }
        let now = Instant::now();
        let due = self.due.get().unwrap_or(now);
        // A job that was slower for a while may not make up for all of it.
        let due = now
            .checked_sub(AHEAD)
            .map_or(due, |earliest| due.max(earliest));
        let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(limit);
        // Nobody waits for a hundred years.
        let time = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        self.due
            .set(due.checked_add(time.min(Duration::from_secs(3 << 30))));
    }

    /// How long to wait before more may be done.
    pub(super) fn wait(&self) -> Duration {
        match self.due.get() {
            Some(due) if self.limit.get() != 0 => due.saturating_duration_since(Instant::now()),
            _ => Duration::ZERO,
        }
    }
}
