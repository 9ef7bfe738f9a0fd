//! What `--stats` prints when a machine has ended.

use std::time::Duration;

use accel::{TranslationStatistics, VcpuStatistics};

/// The figures of all vCPUs as lines for people. `elapsed` is the time that the machine has run.
pub(crate) fn report(vcpus: &[VcpuStatistics], elapsed: Duration) -> Vec<String> {
    let mut lines = vec![format!("ran for {:.3} s", elapsed.as_secs_f64())];
    for (number, vcpu) in vcpus.iter().enumerate() {
        let busy = elapsed.saturating_sub(vcpu.halted).as_secs_f64();
        let mips = vcpu.instructions as f64 / 1e6 / busy.max(1e-9);
        lines.push(format!(
            "vCPU {number}: {} instructions, {mips:.0} MIPS while not halted, halted for {:.3} s, {} interrupts, {} accesses \
             to devices",
            vcpu.instructions,
            vcpu.halted.as_secs_f64(),
            vcpu.interrupts,
            vcpu.io_calls,
        ));
        if let Some(translation) = &vcpu.translation {
            lines.push(format!("vCPU {number}: {}", translated(translation)));
        }
    }
    lines
}

fn translated(t: &TranslationStatistics) -> String {
    let ratio = t.code_bytes as f64 / (t.guest_bytes.max(1)) as f64;
    format!(
        "translated {} blocks in {:.3} s, {} bytes of the guest into {} ({ratio:.1} each), {} made stale by writes, cache emptied \
         {} times; left translated code {} times: {} for a place not linked yet, {} for faults, {} for the rest",
        t.blocks,
        t.translating.as_secs_f64(),
        t.guest_bytes,
        t.code_bytes,
        t.stale,
        t.flushes,
        t.links + t.faults + t.others,
        t.links,
        t.faults,
        t.others,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_those_of_the_vcpus() {
        let translation = TranslationStatistics {
            blocks: 7,
            guest_bytes: 100,
            code_bytes: 850,
            links: 1,
            faults: 2,
            others: 3,
            ..TranslationStatistics::default()
        };
        let vcpu = VcpuStatistics {
            instructions: 50_000_000,
            halted: Duration::from_secs(1),
            translation: Some(translation),
            ..VcpuStatistics::default()
        };
        let lines = report(&[vcpu, VcpuStatistics::default()], Duration::from_secs(2));
        assert_eq!(lines.len(), 4);
        assert!(lines[1].contains("50 MIPS"), "{}", lines[1]);
        assert!(lines[2].contains("8.5 each") && lines[2].contains("left translated code 6 times"));
    }
}
