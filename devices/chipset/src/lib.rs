//! The PC's own devices: timers, interrupt controllers, serial ports, power management.
