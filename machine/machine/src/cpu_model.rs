//! What CPUID answers: model, features, topology (SDM volume 2, CPUID; APM volume 3, appendix E).

use vm_spec::CpuSpec;
use x86_defs::cpuid::CpuidEntry;

use crate::MachineError;

/// An output register of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Register::{Eax, Ebx, Ecx, Edx};

/// Features of one register: leaf, subleaf, register, and QEMU's name for each bit.
type Word = (u32, u32, Register, &'static [(&'static str, u32)]);

/// The features that can be added and taken, by QEMU's names.
const FEATURES: &[Word] = &[
    (
        1,
        0,
        Ecx,
        &[
            ("sse3", 0),
            ("pni", 0),
            ("pclmulqdq", 1),
            ("monitor", 3),
            ("ssse3", 9),
            ("fma", 12),
            ("cx16", 13),
            ("pcid", 17),
            ("sse4.1", 19),
            ("sse4-1", 19),
            ("sse4.2", 20),
            ("sse4-2", 20),
            ("x2apic", 21),
            ("movbe", 22),
            ("popcnt", 23),
            ("tsc-deadline", 24),
            ("aes", 25),
            ("xsave", 26),
            ("avx", 28),
            ("f16c", 29),
            ("rdrand", 30),
            ("hypervisor", 31),
        ],
    ),
    (
        1,
        0,
        Edx,
        &[
            ("fpu", 0),
            ("vme", 1),
            ("de", 2),
            ("pse", 3),
            ("tsc", 4),
            ("msr", 5),
            ("pae", 6),
            ("mce", 7),
            ("cx8", 8),
            ("apic", 9),
            ("sep", 11),
            ("mtrr", 12),
            ("pge", 13),
            ("mca", 14),
            ("cmov", 15),
            ("pat", 16),
            ("pse36", 17),
            ("clflush", 19),
            ("mmx", 23),
            ("fxsr", 24),
            ("sse", 25),
            ("sse2", 26),
            ("ss", 27),
        ],
    ),
    (
        7,
        0,
        Ebx,
        &[
            ("fsgsbase", 0),
            ("tsc-adjust", 1),
            ("bmi1", 3),
            ("hle", 4),
            ("avx2", 5),
            ("smep", 7),
            ("bmi2", 8),
            ("erms", 9),
            ("invpcid", 10),
            ("rtm", 11),
            ("rdseed", 18),
            ("adx", 19),
            ("smap", 20),
            ("clflushopt", 23),
            ("clwb", 24),
            ("sha-ni", 29),
        ],
    ),
    (
        7,
        0,
        Ecx,
        &[
            ("umip", 2),
            ("pku", 3),
            ("gfni", 8),
            ("vaes", 9),
            ("vpclmulqdq", 10),
            ("la57", 16),
            ("rdpid", 22),
        ],
    ),
    (
        7,
        0,
        Edx,
        &[
            ("fsrm", 4),
            ("md-clear", 10),
            ("spec-ctrl", 26),
            ("stibp", 27),
            ("arch-capabilities", 29),
            ("ssbd", 31),
        ],
    ),
    (
        0xd,
        1,
        Eax,
        &[
            ("xsaveopt", 0),
            ("xsavec", 1),
            ("xgetbv1", 2),
            ("xsaves", 3),
        ],
    ),
    (
        0x8000_0001,
        0,
        Ecx,
        &[
            ("lahf-lm", 0),
            ("abm", 5),
            ("lzcnt", 5),
            ("sse4a", 6),
            ("3dnowprefetch", 8),
            ("osvw", 9),
        ],
    ),
    (
        0x8000_0001,
        0,
        Edx,
        &[
            ("syscall", 11),
            ("nx", 20),
            ("mmxext", 22),
            ("fxsr-opt", 25),
            ("pdpe1gb", 26),
            ("rdtscp", 27),
            ("lm", 29),
        ],
    ),
    (0x8000_0007, 0, Edx, &[("invtsc", 8)]),
    (
        0x4000_0001,
        0,
        Eax,
        &[
            ("kvmclock", 0),
            ("kvm-nopiodelay", 1),
            ("kvm-asyncpf", 4),
            ("kvm-steal-time", 5),
            ("kvm-pv-eoi", 6),
            ("kvm-pv-unhalt", 7),
            ("kvm-pv-tlb-flush", 9),
            ("kvm-pv-ipi", 11),
            ("kvm-poll-control", 12),
            ("kvmclock-stable-bit", 24),
        ],
    ),
];

/// First and last of the leaves in which a hypervisor shows itself.
const HYPERVISOR_LEAVES: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_ffff;

/// The CPUID tables of a machine's vCPUs.
#[derive(Debug, Clone)]
pub struct CpuModel {
    entries: Vec<CpuidEntry>,
    cpus: u32,
}

fn register(entry: &mut CpuidEntry, which: Register) -> &mut u32 {
    match which {
        Eax => &mut entry.eax,
        Ebx => &mut entry.ebx,
        Ecx => &mut entry.ecx,
        Edx => &mut entry.edx,
    }
}

fn is(entry: &CpuidEntry, leaf: u32, subleaf: u32) -> bool {
    entry.leaf == leaf && entry.subleaf.unwrap_or(0) == subleaf
}

fn find(name: &str) -> Option<(u32, u32, Register, u32)> {
    FEATURES.iter().find_map(|(leaf, subleaf, register, bits)| {
        let (_, bit) = bits.iter().find(|(known, _)| *known == name)?;
        Some((*leaf, *subleaf, *register, *bit))
    })
}

impl CpuModel {
    /// The tables for `spec` on a processor that can do all of `supported`, with `cpus` vCPUs whose local APIC IDs count from 0.
    ///
    /// # Errors
    /// For an unknown model or feature, or a feature that the processor has not got.
    pub fn new(
        spec: &CpuSpec,
        supported: Vec<CpuidEntry>,
        cpus: u32,
    ) -> Result<Self, MachineError> {
        let refuse = |text: String| MachineError::Spec(format!("--cpu: {text}"));
        if !matches!(spec.model.as_str(), "max" | "host") {
            return Err(refuse(format!(
                "unknown model '{}', expected max or host",
                spec.model
            )));
        }
        let mut entries = supported;
        for name in &spec.add {
            let Some((leaf, subleaf, which, bit)) = find(name) else {
                return Err(refuse(format!("unknown feature '{name}'")));
            };
            let there = entries
                .iter_mut()
                .find(|e| is(e, leaf, subleaf))
                .is_some_and(|e| *register(e, which) & 1 << bit != 0);
            if !there {
                return Err(refuse(format!("this processor has no {name}")));
            }
        }
        for name in &spec.remove {
            if name == "kvm" {
                entries.retain(|e| !HYPERVISOR_LEAVES.contains(&e.leaf));
                continue;
            }
            let Some((leaf, subleaf, which, bit)) = find(name) else {
                return Err(refuse(format!("unknown feature '{name}'")));
            };
            for entry in entries.iter_mut().filter(|e| is(e, leaf, subleaf)) {
                *register(entry, which) &= !(1 << bit);
            }
        }
        Ok(Self { entries, cpus })
    }

    /// The table of one vCPU: one package, each vCPU a core of its own.
    pub fn table(&self, apic_id: u32) -> Vec<CpuidEntry> {
        const HTT: u32 = 1 << 28;
        let id_bits = self.cpus.next_power_of_two().trailing_zeros();
        let ids = 1u32 << id_bits;
        let mut entries: Vec<CpuidEntry> = self
            .entries
            .iter()
            .copied()
            .filter(|e| !matches!(e.leaf, 0xb | 0x1f))
            .collect();
        for entry in &mut entries {
            match entry.leaf {
                0 => entry.eax = entry.eax.max(0xb),
                1 => {
                    entry.ebx = entry.ebx & 0xff00 | apic_id << 24 | ids.min(255) << 16;
                    entry.edx = if self.cpus > 1 {
                        entry.edx | HTT
                    } else {
                        entry.edx & !HTT
                    };
                }
                4 if entry.eax & 0x1f != 0 => {
                    // Caches of levels 1 and 2 belong to a core, those of level 3 to the package.
                    let shared = if entry.eax >> 5 & 7 >= 3 { ids - 1 } else { 0 };
                    let cores = (ids - 1).min(63);
                    entry.eax = entry.eax & 0x3fff | shared.min(0xfff) << 14 | cores << 26;
                }
                0x8000_0001 if self.cpus <= 1 => entry.ecx &= !2,
                0x8000_0008 => entry.ecx = id_bits << 12 | (self.cpus - 1).min(255),
                _ => {}
            }
        }
        let level = |subleaf, eax, ebx, kind: u32| CpuidEntry {
            leaf: 0xb,
            subleaf: Some(subleaf),
            eax,
            ebx,
            ecx: kind << 8 | subleaf,
            edx: apic_id,
        };
        entries.push(level(0, 0, 1, 1));
        entries.push(level(1, id_bits, self.cpus, 2));
        entries.push(level(2, 0, 0, 0));
        entries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> Vec<CpuidEntry> {
        let entry = |leaf, subleaf| CpuidEntry {
            leaf,
            subleaf,
            ..CpuidEntry::default()
        };
        vec![
            CpuidEntry {
                eax: 0xd,
                ..entry(0, None)
            },
            CpuidEntry {
                ecx: 1 << 28,
                edx: 1,
                ..entry(1, None)
            },
            CpuidEntry {
                eax: 0x121,
                ..entry(4, Some(0))
            },
            CpuidEntry {
                eax: 0x163,
                ..entry(4, Some(3))
            },
            CpuidEntry {
                ebx: 1 << 5,
                ..entry(7, Some(0))
            },
            entry(0xb, Some(0)),
            entry(0x4000_0000, None),
        ]
    }

    fn model(text: &str, cpus: u32) -> Result<CpuModel, String> {
        let spec = CpuSpec::parse("--cpu", text).map_err(|e| e.to_string())?;
        CpuModel::new(&spec, supported(), cpus).map_err(|e| e.to_string())
    }

    fn entry(table: &[CpuidEntry], leaf: u32, subleaf: u32) -> CpuidEntry {
        *table.iter().find(|e| is(e, leaf, subleaf)).unwrap()
    }

    #[test]
    fn features_come_and_go() {
        let table = model("max,+avx,-avx2,-kvm", 1).unwrap().table(0);
        assert_eq!(entry(&table, 7, 0).ebx, 0);
        assert_eq!(entry(&table, 1, 0).ecx, 1 << 28);
        assert!(!table.iter().any(|e| e.leaf == 0x4000_0000));
        assert_eq!(
            model("max,+aes", 1).unwrap_err(),
            "--cpu: this processor has no aes"
        );
        assert_eq!(
            model("max,-warp", 1).unwrap_err(),
            "--cpu: unknown feature 'warp'"
        );
        assert!(model("Z80", 1).unwrap_err().contains("unknown model 'Z80'"));
    }

    #[test]
    fn topology_is_one_package_of_cores() {
        let table = model("max", 6).unwrap().table(5);
        let one = entry(&table, 1, 0);
        assert_eq!(
            (one.ebx >> 24, one.ebx >> 16 & 0xff, one.edx >> 28 & 1),
            (5, 8, 1)
        );
        assert_eq!(entry(&table, 4, 0).eax >> 14 & 0xfff, 0);
        assert_eq!(entry(&table, 4, 3).eax >> 14 & 0xfff, 7);
        let core = entry(&table, 0xb, 1);
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (3, 6, 0x201, 5));
        assert_eq!(entry(&table, 0xb, 0).ecx, 0x100);
    }
}
