//! What CPUID answers: model, features, topology (SDM volume 2, CPUID; APM volume 3, appendix E).

#[cfg(test)]
mod against_qemu;
mod features;
mod models;

use vm_spec::CpuSpec;
use x86_defs::cpuid::CpuidEntry;

use crate::MachineError;
use features::{Features, KVM_WORD, WORDS};
use models::{Named, Vendor};

/// First and last of the leaves in which a hypervisor shows itself.
const HYPERVISOR_LEAVES: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_ffff;

/// Features that no named model has unless they are asked for: what a guest can't be given, though the silicon that the model
/// is named after has it.
const NOT_BY_DEFAULT: &str = "svm npt lbrv svm-lock nrip-save tsc-scale vmcb-clean flushbyasid decodeassists pause-filter \
                              pfthreshold avic v-vmsave-vmload vgif svme-addr-chk vmx monitor acpi";
/// Features that every named model has beyond the silicon's own: those of a virtual machine.
const OF_EVERY_GUEST: &str = "x2apic hypervisor tsc-adjust";

/// The CPUID tables of a machine's vCPUs.
#[derive(Debug, Clone)]
pub struct CpuModel {
    entries: Vec<CpuidEntry>,
    cpus: u32,
    missing: Vec<&'static str>,
}

fn is(entry: &CpuidEntry, leaf: u32, subleaf: u32) -> bool {
    entry.leaf == leaf && entry.subleaf.unwrap_or(0) == subleaf
}

fn refuse(text: String) -> MachineError {
    MachineError::Spec(format!("--cpu: {text}"))
}

fn feature(name: &str) -> Result<Features, MachineError> {
    Features::named(name).ok_or_else(|| refuse(format!("unknown feature '{name}'")))
}

fn set_of(names: &str) -> Features {
    let mut set = Features::default();
    for found in names.split_ascii_whitespace().filter_map(Features::named) {
        set.add(found);
    }
    set
}

/// The names that `--cpu` takes for a model.
pub fn model_names() -> Vec<String> {
    let mut names = vec!["host".to_owned(), "max".to_owned()];
    names.extend(models::names());
    names
}

impl CpuModel {
    /// The tables for `spec` on a processor that can do all of `supported`, with `cpus` vCPUs whose local APIC IDs count from 0.
    ///
    /// A named model has those of its features that the processor has ([`Self::missing`] names the others), and what a
    /// hypervisor offers.
    ///
    /// # Errors
    /// For an unknown model or feature, for a feature asked for by name that the processor has not got, and where `enforce`
    /// was asked for and any is missing.
    pub fn new(
        spec: &CpuSpec,
        supported: Vec<CpuidEntry>,
        cpus: u32,
    ) -> Result<Self, MachineError> {
        let can = Features::of(&supported);
        let named = match spec.model.as_str() {
            "max" | "host" => None,
            name => Some(models::named(name).ok_or_else(|| {
                refuse(format!(
                    "unknown model '{name}', expected one that --cpu help lists, such as max, host or Haswell"
                ))
            })?),
        };
        let mut wanted = named.as_ref().map_or(can, |named| features_of(named, can));
        for name in &spec.add {
            let asked = feature(name)?;
            if !can.has(asked) {
                return Err(refuse(format!("this processor has no {name}")));
            }
            wanted.add(asked);
        }
        let mut entries = supported;
        for name in &spec.remove {
            if name == "kvm" {
                entries.retain(|e| !HYPERVISOR_LEAVES.contains(&e.leaf));
            } else {
                wanted.remove(feature(name)?);
            }
        }
        let mut lacking = wanted;
        lacking.remove(can);
        let missing = lacking.names();
        if spec.enforce && !missing.is_empty() {
            let list = missing.join(", ");
            return Err(refuse(format!(
                "{}: this processor has no {list}",
                spec.model
            )));
        }
        if let Some(named) = &named {
            identify(&mut entries, named);
        }
        limit(&mut entries, wanted.common(can));
        Ok(Self {
            entries,
            cpus,
            missing,
        })
    }

    /// Features of the model that the processor has not got, so that the guest goes without.
    pub fn missing(&self) -> &[&'static str] {
        &self.missing
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
        // A model from before the leaf has none, unless its vCPUs are too many for the IDs of leaf 1.
        if let Some(first) = entries.iter_mut().find(|e| e.leaf == 0) {
            if first.eax < 0xb && ids <= 256 {
                return entries;
            }
            first.eax = first.eax.max(0xb);
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

/// What a named model promises before the processor's limits are seen.
fn features_of(named: &Named, can: Features) -> Features {
    let mut wanted = set_of(&named.features.join(" "));
    wanted.remove(set_of(NOT_BY_DEFAULT));
    wanted.add(set_of(OF_EVERY_GUEST).common(can));
    wanted.0[KVM_WORD] = can.0[KVM_WORD];
    if named.vendor != Vendor::Intel && named.features.contains(&"lm") {
        mirror(&mut wanted);
    }
    wanted
}

/// AMD's processors show most of leaf 1, EDX a second time in leaf 0x8000_0001 (APM volume 3, appendix E.4.2).
fn mirror(set: &mut Features) {
    const MIRRORED: u32 = 0x0183_f3ff;
    let place = |leaf| {
        WORDS
            .iter()
            .position(|w| w.leaf == leaf && w.register == features::Register::Edx)
    };
    if let (Some(from), Some(to)) = (place(1), place(0x8000_0001)) {
        set.0[to] |= set.0[from] & MIRRORED;
    }
}

/// Makes every register of features show those of the set, and no state components that go with others.
fn limit(entries: &mut Vec<CpuidEntry>, set: Features) {
    for entry in entries.iter_mut() {
        for (word, bits) in WORDS.iter().zip(set.0) {
            if word.is_in(entry) {
                *word.register.of(entry) = bits;
            }
        }
    }
    let has = |name| Features::named(name).is_some_and(|feature| set.has(feature));
    if !has("xsave") {
        entries.retain(|e| e.leaf != 0xd);
    } else if !has("avx") {
        const AVX: u32 = 1 << 2;
        /// The legacy area and the header.
        const WITHOUT_AVX: u32 = 576;
        entries.retain(|e| !is(e, 0xd, 2) || e.subleaf.is_none());
        if let Some(components) = entries.iter_mut().find(|e| is(e, 0xd, 0)) {
            components.eax &= !AVX;
            (components.ebx, components.ecx) = (WITHOUT_AVX, WITHOUT_AVX);
        }
    }
    if !has("arch-capabilities") && !has("spec-ctrl") {
        entries.retain(|e| !is(e, 7, 2));
    }
}

fn word(bytes: &[u8]) -> u32 {
    bytes
        .iter()
        .rev()
        .fold(0, |sum, byte| sum << 8 | u32::from(*byte))
}

/// Makes the tables those of a model by vendor, signature, brand, leaves and caches.
fn identify(entries: &mut Vec<CpuidEntry>, named: &Named) {
    let letters = named.vendor.letters();
    let vendor = [
        word(&letters[..4]),
        word(&letters[8..]),
        word(&letters[4..8]),
    ];
    let amd = named.vendor != Vendor::Intel;
    let mut brand = [0; 48];
    for (to, from) in brand.iter_mut().zip(named.brand.bytes()) {
        *to = from;
    }
    entries.retain(|e| match e.leaf {
        2 | 4 => !amd && e.leaf <= named.level,
        0x8000_0005 => false,
        0..0x4000_0000 => e.leaf <= named.level,
        0x8000_0000.. => e.leaf <= named.extended,
        _ => true,
    });
    for entry in entries.iter_mut() {
        match entry.leaf {
            0 => [entry.ebx, entry.ecx, entry.edx] = vendor,
            1 => entry.eax = named.signature(),
            0x8000_0000 if amd => [entry.ebx, entry.ecx, entry.edx] = vendor,
            0x8000_0001 => entry.eax = if amd { named.signature() } else { 0 },
            0x8000_0002..=0x8000_0004 => {
                let at = (entry.leaf - 0x8000_0002) as usize * 16;
                let part = |n: usize| word(&brand[at + n * 4..at + n * 4 + 4]);
                [entry.eax, entry.ebx, entry.ecx, entry.edx] = [part(0), part(1), part(2), part(3)];
            }
            _ => {}
        }
    }
    highest(entries, 0, named.level);
    if named.extended != 0 {
        highest(entries, 0x8000_0000, named.extended);
    }
    if amd {
        entries.extend(
            amd_caches()
                .into_iter()
                .filter(|e| e.leaf <= named.extended),
        );
        entries.retain(|e| e.leaf != 0x8000_0006 || e.edx != 0);
    }
}

/// Sets the highest leaf of a range. Leaves up to it that are not there answer zeroes.
fn highest(entries: &mut [CpuidEntry], base: u32, level: u32) {
    if let Some(first) = entries.iter_mut().find(|e| e.leaf == base) {
        first.eax = level;
    }
}

/// AMD's description of caches (APM volume 3, appendix E.4.5): 64 KiB and 2 ways at level 1, 512 KiB and 16 ways at level 2,
/// 16 MiB and 16 ways at level 3, lines of 64 bytes.
fn amd_caches() -> [CpuidEntry; 2] {
    const LEVEL_1: u32 = 64 << 24 | 2 << 16 | 1 << 8 | 64;
    const LEVEL_2: u32 = 512 << 16 | 8 << 12 | 1 << 8 | 64;
    const LEVEL_3: u32 = 32 << 18 | 8 << 12 | 1 << 8 | 64;
    let entry = |leaf, ecx, edx| CpuidEntry {
        leaf,
        ecx,
        edx,
        ..CpuidEntry::default()
    };
    [
        entry(0x8000_0005, LEVEL_1, LEVEL_1),
        entry(0x8000_0006, LEVEL_2, LEVEL_3),
    ]
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
        assert!(model("Haswell,enforce", 1).unwrap_err().contains("has no"));
    }

    #[test]
    fn a_named_model_has_its_name_and_no_more_than_there_is() {
        let model = model("Haswell-v4", 2).unwrap();
        assert!(model.missing().contains(&"aes") && !model.missing().contains(&"avx2"));
        let table = model.table(1);
        assert_eq!(entry(&table, 1, 0).eax, 0x0003_06c1);
        assert_eq!(entry(&table, 1, 0).ecx, 1 << 28);
        assert_eq!(entry(&table, 0, 0).ebx.to_le_bytes(), *b"Genu");
        assert_eq!(entry(&table, 0, 0).eax, 0xd);
        assert!(table.iter().any(|e| e.leaf == 0x4000_0000));
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
