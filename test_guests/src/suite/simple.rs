//! Guests that need nothing of the host but to be run.

use super::{Test, passes};

macro_rules! simple {
    ($($name:ident $(: $limit:literal)?),* $(,)?) => {
        [$(Test {
            name: stringify!($name),
            limit: simple!(@limit $($limit)?),
            run: |accel| passes(accel, stringify!($name)),
        }),*]
    };
    (@limit) => { None };
    (@limit $limit:literal) => { Some($limit) };
}

pub(super) const TESTS: [Test; 18] = simple![
    basics,
    rare,
    protected: "it raises #UD for call gates",
    to_long_mode,
    handed_over,
    exceptions,
    double_fault: "it keeps the first fault's address in CR2",
    port_io,
    mmio,
    msr,
    syscall: "it raises #GP for SYSRET",
    single_step,
    breakpoints: "it knows no hardware breakpoints",
    reserved: "it lets PAT be anything, and its ring 0 is ring 3 of the host's",
    smc,
    fpu,
    lazy_fpu: "it forgets CR0.TS in ring 3",
    avx,
];
