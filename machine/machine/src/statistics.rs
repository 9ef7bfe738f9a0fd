//! What the vCPUs have done: the figures behind QMP's `query-stats`, and what `--stats` prints when a machine has ended.

use std::time::Duration;

use accel::{ParavirtualStatistics, TranslationStatistics, VcpuStatistics};
use qmp::{Figure, Meaning, Statistics};

/// Figures of one vCPU, or the sums over all, and the time that it has or they have had.
struct View {
    vcpu: VcpuStatistics,
    elapsed: Duration,
}

impl View {
    /// Time not halted.
    fn busy(&self) -> Duration {
        self.elapsed.saturating_sub(self.vcpu.halted)
    }

    /// Time in the guest's code: not halted, not in devices and not translating.
    fn running(&self) -> Duration {
        let translating = self
            .vcpu
            .translation
            .map_or(Duration::ZERO, |t| t.translating);
        self.busy()
            .saturating_sub(self.vcpu.in_devices)
            .saturating_sub(translating)
    }

    /// Instructions in a second that is not spent halted.
    fn instructions_per_second(&self) -> f64 {
        self.vcpu.instructions as f64 / self.busy().as_secs_f64().max(1e-9)
    }
}

fn ns(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// A figure's value, where the processor has it.
type Read = fn(&View) -> Option<u64>;

/// Every figure.
const FIGURES: &[(&str, Meaning, Read)] = &[
    ("elapsed-time", Meaning::Time, |v| Some(ns(v.elapsed))),
    ("instructions", Meaning::Count, |v| {
        counted(v).map(|v| v.vcpu.instructions)
    }),
    ("instructions-per-second", Meaning::Now, |v| {
        counted(v).map(|v| v.instructions_per_second() as u64)
    }),
    ("halted-time", Meaning::Time, |v| Some(ns(v.vcpu.halted))),
    ("running-time", Meaning::Time, |v| {
        counted(v).map(|v| ns(v.running()))
    }),
    ("device-time", Meaning::Time, |v| {
        counted(v).map(|v| ns(v.vcpu.in_devices))
    }),
    ("device-accesses", Meaning::Count, |v| Some(v.vcpu.io_calls)),
    ("interrupts", Meaning::Count, |v| Some(v.vcpu.interrupts)),
    ("page-walks", Meaning::Count, |v| {
        counted(v).map(|v| v.vcpu.page_walks)
    }),
    ("pv-kicks", Meaning::Count, |v| {
        v.vcpu.paravirtual.map(|p| p.kicks)
    }),
    ("pv-ipis", Meaning::Count, |v| {
        v.vcpu.paravirtual.map(|p| p.ipis)
    }),
    ("pv-tlb-flushes", Meaning::Count, |v| {
        v.vcpu.paravirtual.map(|p| p.tlb_flushes)
    }),
    ("pause-yields", Meaning::Count, |v| {
        v.vcpu.paravirtual.map(|p| p.yields)
    }),
    ("translation-time", Meaning::Time, |v| {
        v.vcpu.translation.map(|t| ns(t.translating))
    }),
    ("translated-blocks", Meaning::Count, |v| {
        v.vcpu.translation.map(|t| t.blocks)
    }),
    ("translated-guest-code", Meaning::Bytes, |v| {
        v.vcpu.translation.map(|t| t.guest_bytes)
    }),
    ("translated-host-code", Meaning::Bytes, |v| {
        v.vcpu.translation.map(|t| t.code_bytes)
    }),
    ("invalidated-blocks", Meaning::Count, |v| {
        v.vcpu.translation.map(|t| t.stale)
    }),
    ("code-cache-flushes", Meaning::Count, |v| {
        v.vcpu.translation.map(|t| t.flushes)
    }),
    ("code-cache-used", Meaning::BytesNow, |v| {
        v.vcpu.translation.map(|t| t.cache_used)
    }),
    ("code-cache-size", Meaning::BytesNow, |v| {
        v.vcpu.translation.map(|t| t.cache_size)
    }),
    ("exits-unlinked", Meaning::Count, |v| {
        v.vcpu.translation.map(|t| t.links)
    }),
    ("exits-fault", Meaning::Count, |v| {
        v.vcpu.translation.map(|t| t.faults)
    }),
    ("exits-other", Meaning::Count, |v| {
        v.vcpu.translation.map(|t| t.others)
    }),
];

/// The names and meanings alone.
const NAMES: [(&str, Meaning); FIGURES.len()] = {
    let mut names = [("", Meaning::Now); FIGURES.len()];
    let mut i = 0;
    while i < names.len() {
        names[i] = (FIGURES[i].0, FIGURES[i].1);
        i += 1;
    }
    names
};

/// The view, where the processor is one that counts for itself.
fn counted(view: &View) -> Option<&View> {
    view.vcpu.paravirtual.is_some().then_some(view)
}

/// The names that figures may have.
pub(crate) fn names() -> &'static [(&'static str, Meaning)] {
    &NAMES
}

fn figures(view: &View) -> Vec<Figure> {
    FIGURES
        .iter()
        .filter_map(|(name, _, read)| Some((*name, read(view)?)))
        .collect()
}

/// The figures of the machine and of each vCPU. `elapsed` is the guest's time.
pub(crate) fn query(vcpus: &[VcpuStatistics], elapsed: Duration) -> Statistics {
    let view = |vcpu| View { vcpu, elapsed };
    let each = vcpus.iter().map(|vcpu| figures(&view(*vcpu)));
    let number = u32::try_from(vcpus.len()).unwrap_or(u32::MAX);
    let total = View {
        vcpu: sum(vcpus),
        elapsed: elapsed.saturating_mul(number),
    };
    Statistics {
        vm: figures(&total),
        vcpus: each.collect(),
    }
}

fn sum(vcpus: &[VcpuStatistics]) -> VcpuStatistics {
    vcpus
        .iter()
        .fold(VcpuStatistics::default(), |a, b| VcpuStatistics {
            instructions: a.instructions.wrapping_add(b.instructions),
            io_calls: a.io_calls.wrapping_add(b.io_calls),
            interrupts: a.interrupts.wrapping_add(b.interrupts),
            halted: a.halted.saturating_add(b.halted),
            in_devices: a.in_devices.saturating_add(b.in_devices),
            page_walks: a.page_walks.wrapping_add(b.page_walks),
            paravirtual: either(a.paravirtual, b.paravirtual, |a, b| ParavirtualStatistics {
                kicks: a.kicks + b.kicks,
                ipis: a.ipis + b.ipis,
                tlb_flushes: a.tlb_flushes + b.tlb_flushes,
                yields: a.yields + b.yields,
            }),
            translation: either(a.translation, b.translation, |a, b| TranslationStatistics {
                translating: a.translating.saturating_add(b.translating),
                blocks: a.blocks + b.blocks,
                guest_bytes: a.guest_bytes + b.guest_bytes,
                code_bytes: a.code_bytes + b.code_bytes,
                stale: a.stale + b.stale,
                flushes: a.flushes + b.flushes,
                cache_used: a.cache_used + b.cache_used,
                cache_size: a.cache_size + b.cache_size,
                links: a.links + b.links,
                faults: a.faults + b.faults,
                others: a.others + b.others,
            }),
        })
}

fn either<T>(a: Option<T>, b: Option<T>, both: fn(T, T) -> T) -> Option<T> {
    match (a, b) {
        (Some(a), Some(b)) => Some(both(a, b)),
        (a, b) => a.or(b),
    }
}

/// The figures of all vCPUs as lines for people. `elapsed` is the guest's time.
pub(crate) fn report(vcpus: &[VcpuStatistics], elapsed: Duration) -> Vec<String> {
    let mut lines = vec![format!("ran for {:.3} s", elapsed.as_secs_f64())];
    for (number, vcpu) in vcpus.iter().enumerate() {
        let view = View {
            vcpu: *vcpu,
            elapsed,
        };
        lines.push(format!(
            "vCPU {number}: {} instructions, {:.0} MIPS while not halted, halted for {:.3} s, in devices for {:.3} s, {} interrupts, \
             {} accesses to devices, {} walks of page tables",
            vcpu.instructions,
            view.instructions_per_second() / 1e6,
            vcpu.halted.as_secs_f64(),
            vcpu.in_devices.as_secs_f64(),
            vcpu.interrupts,
            vcpu.io_calls,
            vcpu.page_walks,
        ));
        if let Some(p) = &vcpu.paravirtual {
            lines.push(format!(
                "vCPU {number}: paravirtual: {} kicks, {} interrupts sent, {} TLB flushes left by others, {} yields",
                p.kicks, p.ipis, p.tlb_flushes, p.yields,
            ));
        }
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
         {} times, {} KiB of {} in use; left translated code {} times: {} for a place not linked yet, {} for faults, {} for the rest",
        t.blocks,
        t.translating.as_secs_f64(),
        t.guest_bytes,
        t.code_bytes,
        t.stale,
        t.flushes,
        t.cache_used >> 10,
        t.cache_size >> 10,
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

    #[test]
    fn figures_are_those_of_the_schema_and_add_up() {
        let vcpu = |instructions, kicks| VcpuStatistics {
            instructions,
            halted: Duration::from_millis(500),
            in_devices: Duration::from_millis(100),
            paravirtual: Some(ParavirtualStatistics {
                kicks,
                ..ParavirtualStatistics::default()
            }),
            translation: Some(TranslationStatistics {
                translating: Duration::from_millis(50),
                ..TranslationStatistics::default()
            }),
            ..VcpuStatistics::default()
        };
        let all = query(&[vcpu(1000, 1), vcpu(500, 2)], Duration::from_secs(1));
        let get = |figures: &[Figure], name: &str| figures.iter().find(|f| f.0 == name).unwrap().1;
        assert_eq!(all.vcpus.len(), 2);
        for figures in [&all.vm, &all.vcpus[0], &all.vcpus[1]] {
            let names: Vec<&str> = figures.iter().map(|f| f.0).collect();
            let known: Vec<&str> = names_of_all();
            assert_eq!(names, known);
        }
        assert_eq!(get(&all.vm, "instructions"), 1500);
        assert_eq!(get(&all.vm, "pv-kicks"), 3);
        assert_eq!(get(&all.vcpus[0], "instructions-per-second"), 2000);
        assert_eq!(get(&all.vm, "instructions-per-second"), 1500);
        assert_eq!(get(&all.vcpus[1], "running-time"), 350_000_000);
        // A processor that counts little says little.
        let few = query(&[VcpuStatistics::default()], Duration::from_secs(1));
        assert_eq!(few.vcpus[0].len(), 4);
    }

    fn names_of_all() -> Vec<&'static str> {
        names().iter().map(|(name, _)| *name).collect()
    }
}
