//! Guest time and timers: time that stops when the guest stops.
