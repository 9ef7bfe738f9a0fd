//! The fuzz target of AHCI on seeded random input.

#[path = "../../../fuzz/src/ahci_ports.rs"]
#[allow(unreachable_pub)]
mod ahci_ports;
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
fn ahci_bears_any_commands() {
    let (size, at_most) = ((150, 3000), Duration::from_secs(4));
    smoke::smoke("ahci", ahci_ports::commands, &[], size, at_most);
}
