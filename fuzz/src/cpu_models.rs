//! CPU models with features added and taken away.

use accel::Accel;
use accel_soft::{SoftAccel, SoftOptions};
use machine::cpu_model::{CpuModel, model_names};
use vm_spec::CpuSpec;

/// Reads a text as the value of `--cpu` and makes every vCPU's table from it. Nothing may panic, and the guest is never told of more
/// leaves than there are.
pub fn model(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let Ok(mut spec) = CpuSpec::parse("--cpu", &text) else {
        return;
    };
    // A name is hard to guess: where it is none, its first byte picks one.
    let names = model_names();
    if !names.contains(&spec.model) {
        let pick = spec.model.as_bytes().first().copied().unwrap_or(0);
        spec.model = names[usize::from(pick) % names.len()].clone();
    }
    let supported = SoftAccel::new(SoftOptions::default())
        .supported_cpuid()
        .expect("a table");
    for cpus in [1, 3, 255] {
        let Ok(model) = CpuModel::new(&spec, supported.clone(), cpus) else {
            continue;
        };
        for id in [0, cpus - 1] {
            assert!(model.table(id).len() <= 2 * supported.len() + 16);
        }
    }
}
