//! The fuzz target of QMP on its corpus and on seeded random changes of it.

#[path = "../../../fuzz/src/qmp_lines.rs"]
#[allow(unreachable_pub)]
mod qmp_lines;
#[path = "../../../fuzz/src/smoke.rs"]
#[allow(unreachable_pub, dead_code)]
mod smoke;

use std::time::Duration;

#[test]
fn qmp_bears_any_client() {
    let samples = smoke::corpus("qmp");
    let (size, at_most) = ((1500, 2000), Duration::from_secs(3));
    smoke::smoke("qmp", qmp_lines::client, &samples, size, at_most);
}
