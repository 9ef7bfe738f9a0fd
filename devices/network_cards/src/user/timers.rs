//! Deadlines of the stack, and the one kernel timer that stands for all of them.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::slab::Token;
use crate::backend::NetError;

/// Milliseconds since the stack was made.
pub(crate) type Millis = u64;

/// Whose deadline it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Owner {
    /// A TCP connection.
    Tcp(Token),
    /// A UDP flow.
    Udp(Token),
    /// A ping flow.
    Ping(Token),
    /// The next router advertisement.
    RouterAdvertisement,
    /// Listening sockets that ran out of descriptors.
    Listeners,
}

/// All deadlines. Each owner has one at most and knows it; one that only moves to a later time can stay, and the owner asks
/// again when it is called too early.
#[derive(Debug)]
pub(crate) struct Timers {
    deadlines: BTreeSet<(Millis, Owner)>,
    fd: OwnedFd,
    /// What the kernel's timer is set to.
    armed: Option<Millis>,
    start: Instant,
}

impl Timers {
    pub(crate) fn new() -> Result<Self, NetError> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let fd = timerfd_create(TimerfdClockId::Monotonic, flags)
            .map_err(|e| NetError::os("can't make a timer", e))?;
        Ok(Self {
            deadlines: BTreeSet::new(),
            fd,
            armed: None,
            start: Instant::now(),
        })
    }

    /// The time by the host's clock.
    pub(crate) fn now(&self) -> Millis {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    pub(crate) fn set(&mut self, at: Millis, owner: Owner) {
        self.deadlines.insert((at, owner));
    }

    /// Withdraws a deadline.
    pub(crate) fn cancel(&mut self, at: Millis, owner: Owner) {
        self.deadlines.remove(&(at, owner));
    }

    /// The next deadline that has passed.
    pub(crate) fn pop_due(&mut self, now: Millis) -> Option<Owner> {
        let (at, owner) = *self.deadlines.first()?;
        if at > now {
            return None;
        }
        self.deadlines.pop_first();
        Some(owner)
    }

    /// Sets the kernel's timer for the first deadline, if it is not set early enough.
    pub(crate) fn arm(&mut self, now: Millis) {
        let Some(&(at, _)) = self.deadlines.first() else {
            return;
        };
        if self.armed.is_some_and(|armed| armed <= at) {
            return;
        }
        // Zero would disarm it.
        let wait = Duration::from_millis(at.saturating_sub(now).max(1));
        let spec = Itimerspec {
            it_interval: Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: Timespec {
                tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: wait.subsec_nanos().into(),
            },
        };
        // The descriptor is a timer and the times are in range, so this can't fail.
        if timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &spec).is_ok() {
            self.armed = Some(at);
        }
    }

    /// Forgets the kernel's timer after it has fired.
    pub(crate) fn fired(&mut self) {
        let _ = rustix::io::read(&self.fd, &mut [0u8; 8]);
        self.armed = None;
    }
}

impl AsFd for Timers {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
impl Timers {
    pub(crate) fn len(&self) -> usize {
        self.deadlines.len()
    }
}
