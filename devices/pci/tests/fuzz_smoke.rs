//! The fuzz target of PCI on seeded random input.

#[path = "../../../fuzz/src/input.rs"]
#[allow(unreachable_pub, dead_code)]
mod input;
#[path = "../../../fuzz/src/pci_machine.rs"]
#[allow(unreachable_pub, missing_docs)]
mod pci_machine;
#[path = "../../../fuzz/src/pci_topology.rs"]
#[allow(unreachable_pub, missing_docs)]
mod pci_topology;
#[path = "../../../fuzz/src/registers.rs"]
#[allow(unreachable_pub, dead_code)]
mod registers;
#[path = "../../../fuzz/src/smoke.rs"]
#[allow(unreachable_pub, dead_code)]
mod smoke;

use std::time::Duration;

#[test]
fn pci_bears_any_guest() {
    let (size, at_most) = ((300, 3000), Duration::from_secs(5));
    smoke::smoke("pci", pci_topology::topology, &[], size, at_most);
}
