//! Guests that need nothing of the host but to be run.

use super::{Test, passes};

macro_rules! simple {
    ($($name:ident),* $(,)?) => {
        [$(Test { name: stringify!($name), run: |accel| passes(accel, stringify!($name)) }),*]
    };
}

pub(super) const TESTS: [Test; 5] = simple![basics, to_long_mode, exceptions, port_io, mmio];
