//! What people write: the values of options, and a whole specification as JSON.

use vm_spec::{CharSpec, CpuSpec, DiskSpec, NetSpec, Options, VmSpec, parse_accel, parse_size};

/// A specification that can be written can be read, and is the same then.
fn comes_back(spec: &VmSpec) {
    let text = serde_json::to_string(spec).expect("a specification is JSON");
    let again: VmSpec = serde_json::from_str(&text).expect("what was written can be read");
    assert!(again == *spec, "{text}");
}

/// Reads a text as the value of every option, and as a specification. Nothing may panic; what is wrong is said in one line.
pub fn options(data: &[u8]) {
    if let Ok(spec) = serde_json::from_slice::<VmSpec>(data) {
        comes_back(&spec);
    }
    let text = String::from_utf8_lossy(data);
    let mut spec = VmSpec::new(1 << 30);
    let mut failures = Vec::new();
    match DiskSpec::parse("--disk", &text) {
        Ok(disk) => spec.disks.push(disk),
        Err(why) => failures.push(why),
    }
    match NetSpec::parse("--net", &text) {
        Ok(net) => spec.nets.extend(net),
        Err(why) => failures.push(why),
    }
    match CharSpec::parse("--serial", &text) {
        Ok(serial) => spec.serials.extend(serial),
        Err(why) => failures.push(why),
    }
    match CpuSpec::parse("--cpu", &text) {
        Ok(cpu) => spec.cpu = cpu,
        Err(why) => failures.push(why),
    }
    match parse_accel("--accel", &text) {
        Ok((accel, soft)) => (spec.accel, spec.soft) = (accel, soft),
        Err(why) => failures.push(why),
    }
    comes_back(&spec);
    for failure in failures {
        assert!(failure.to_string().starts_with("--"));
    }
    if let Some(size) = parse_size(&text, 20) {
        // The text that it is shown as means the same size, where it has a unit.
        let shown = vm_spec::format_size(size).replace(' ', "");
        let again = parse_size(shown.trim_end_matches("bytes"), 0);
        assert_eq!(again, Some(size), "{shown}");
    }
    let mut options = Options::parse("--balloon", &text);
    let _ = options.take_switch("on");
    let _ = options.take_all("key");
    let _ = options.finish("on, key");
}
