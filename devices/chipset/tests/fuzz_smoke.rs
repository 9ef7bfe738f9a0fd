//! The fuzz target of the PC's devices on seeded random input.

#[path = "../../../fuzz/src/chipset_registers.rs"]
#[allow(unreachable_pub, missing_docs)]
mod chipset_registers;
#[path = "../../../fuzz/src/input.rs"]
#[allow(unreachable_pub, dead_code)]
mod input;
#[path = "../../../fuzz/src/registers.rs"]
#[allow(unreachable_pub, dead_code)]
mod registers;
#[path = "../../../fuzz/src/smoke.rs"]
#[allow(unreachable_pub, dead_code)]
mod smoke;

use std::time::Duration;

#[test]
fn the_chipset_bears_any_registers_time_and_events() {
    let run = chipset_registers::registers;
    let (size, at_most) = ((400, 4000), Duration::from_secs(5));
    smoke::smoke("chipset", run, &[], size, at_most);
}
