//! Eventfds between vCPUs and device threads.

#![allow(unsafe_code)] // Two crates have types of their own for an owned eventfd.

use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

use rustix::event::EventfdFlags;
use vmm_sys_util::eventfd::EventFd;

/// A new eventfd. Reads of it block: a thread reads after `poll`, and io_uring waits by itself.
pub(crate) fn new_event() -> io::Result<EventFd> {
    EventFd::new(EventfdFlags::CLOEXEC.bits().cast_signed())
}

/// Another descriptor of the same event.
pub(crate) fn reader(event: &EventFd) -> io::Result<OwnedFd> {
    let copy = event.try_clone()?.into_raw_fd();
    // SAFETY: `into_raw_fd` gave up the ownership of a descriptor that is open.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Takes the signals of an event that `poll` has found ready.
pub(crate) fn take(event: &OwnedFd) {
    let mut count = [0; 8];
    // A failure leaves the event ready, and the caller comes here again.
    let _ = rustix::io::read(event, &mut count);
}
