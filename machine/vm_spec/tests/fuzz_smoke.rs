//! The fuzz target of options and of the specification, on its corpus and on seeded random changes of it.

#[path = "../../../fuzz/src/option_texts.rs"]
#[allow(unreachable_pub)]
mod option_texts;
#[path = "../../../fuzz/src/smoke.rs"]
#[allow(unreachable_pub, dead_code)]
mod smoke;

use std::time::Duration;

#[test]
fn options_bear_any_text() {
    let mut samples = smoke::corpus("options");
    let spec = vm_spec::VmSpec::new(1 << 30);
    samples.push(serde_json::to_vec(&spec).unwrap());
    let (size, at_most) = ((20_000, 2000), Duration::from_secs(3));
    smoke::smoke("options", option_texts::options, &samples, size, at_most);
}
