//! The names of processor features, as QEMU spells them, and where CPUID shows each (SDM volume 2, CPUID; APM volume 3,
//! appendix E; Linux's `Documentation/virt/kvm/x86/cpuid.rst` for leaf 0x4000_0001).

use x86_defs::cpuid::CpuidEntry;

/// An output register of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Register::{Eax, Ebx, Ecx, Edx};

/// A register of CPUID that holds features and nothing else.
#[derive(Debug)]
pub(super) struct Word {
    pub(super) leaf: u32,
    /// Zero where the leaf has no subleaves.
    pub(super) subleaf: u32,
    pub(super) register: Register,
    /// `name=bit`, or `name=bit+bit` for a name of two bits; of several names of a bit the first is the one to show.
    names: &'static str,
}

const fn word(leaf: u32, subleaf: u32, register: Register, names: &'static str) -> Word {
    Word {
        leaf,
        subleaf,
        register,
        names,
    }
}

/// The register that holds what the hypervisor itself offers.
pub(super) const KVM_WORD: usize = 13;

/// All registers of features.
pub(super) const WORDS: [Word; 14] = [
    word(
        1,
        0,
        Ecx,
        "pni=0 sse3=0 pclmulqdq=1 pclmuldq=1 dtes64=2 monitor=3 ds-cpl=4 vmx=5 smx=6 est=7 tm2=8 ssse3=9 cid=10 \
         fma=12 cx16=13 xtpr=14 pdcm=15 pcid=17 dca=18 sse4.1=19 sse4-1=19 sse4.2=20 sse4-2=20 x2apic=21 movbe=22 \
         popcnt=23 tsc-deadline=24 aes=25 xsave=26 avx=28 f16c=29 rdrand=30 hypervisor=31",
    ),
    word(
        1,
        0,
        Edx,
        "fpu=0 vme=1 de=2 pse=3 tsc=4 msr=5 pae=6 mce=7 cx8=8 apic=9 sep=11 mtrr=12 pge=13 mca=14 cmov=15 pat=16 \
         pse36=17 pn=18 clflush=19 ds=21 acpi=22 mmx=23 fxsr=24 sse=25 sse2=26 ss=27 ht=28 tm=29 ia64=30 pbe=31",
    ),
    word(6, 0, Eax, "arat=2"),
    word(
        7,
        0,
        Ebx,
        "fsgsbase=0 tsc-adjust=1 sgx=2 bmi1=3 hle=4 avx2=5 smep=7 bmi2=8 erms=9 invpcid=10 rtm=11 mpx=14 avx512f=16 \
         avx512dq=17 rdseed=18 adx=19 smap=20 avx512ifma=21 pcommit=22 clflushopt=23 clwb=24 intel-pt=25 avx512pf=26 \
         avx512er=27 avx512cd=28 sha-ni=29 avx512bw=30 avx512vl=31",
    ),
    word(
        7,
        0,
        Ecx,
        "avx512vbmi=1 avx512-vbmi=1 umip=2 pku=3 ospke=4 waitpkg=5 avx512vbmi2=6 gfni=8 vaes=9 vpclmulqdq=10 \
         avx512vnni=11 avx512bitalg=12 avx512-vpopcntdq=14 la57=16 rdpid=22 bus-lock-detect=24 cldemote=25 movdiri=27 \
         movdir64b=28 sgxlc=30 pks=31",
    ),
    word(
        7,
        0,
        Edx,
        "avx512-4vnniw=2 avx512-4fmaps=3 fsrm=4 avx512-vp2intersect=8 md-clear=10 serialize=14 tsx-ldtrk=16 arch-lbr=19 \
         amx-bf16=22 avx512-fp16=23 amx-tile=24 amx-int8=25 spec-ctrl=26 stibp=27 flush-l1d=28 arch-capabilities=29 \
         core-capability=30 ssbd=31",
    ),
    word(7, 1, Eax, "avx-vnni=4 avx512-bf16=5"),
    word(0xd, 1, Eax, "xsaveopt=0 xsavec=1 xgetbv1=2 xsaves=3"),
    word(
        0x8000_0001,
        0,
        Ecx,
        "lahf-lm=0 cmp-legacy=1 svm=2 extapic=3 cr8legacy=4 abm=5 lzcnt=5 sse4a=6 misalignsse=7 3dnowprefetch=8 osvw=9 \
         ibs=10 xop=11 skinit=12 wdt=13 lwp=15 fma4=16 tce=17 nodeid-msr=19 tbm=21 topoext=22 perfctr-core=23 \
         perfctr-nb=24",
    ),
    word(
        0x8000_0001,
        0,
        Edx,
        "syscall=11 nx=20 xd=20 mmxext=22 fxsr-opt=25 ffxsr=25 pdpe1gb=26 rdtscp=27 lm=29 i64=29 3dnowext=30 3dnow=31",
    ),
    word(0x8000_0007, 0, Edx, "invtsc=8"),
    word(
        0x8000_0008,
        0,
        Ebx,
        "clzero=0 xsaveerptr=2 wbnoinvd=9 ibpb=12 ibrs=14 amd-stibp=15 amd-ssbd=24 virt-ssbd=25 amd-no-ssb=26",
    ),
    word(
        0x8000_000a,
        0,
        Edx,
        "npt=0 lbrv=1 svm-lock=2 nrip-save=3 tsc-scale=4 vmcb-clean=5 flushbyasid=6 decodeassists=7 pause-filter=10 \
         pfthreshold=12 avic=13 v-vmsave-vmload=15 vgif=16 svme-addr-chk=28",
    ),
    word(
        0x4000_0001,
        0,
        Eax,
        "kvmclock=0+3 kvm-nopiodelay=1 kvm-mmu=2 kvm-asyncpf=4 kvm-steal-time=5 kvm-pv-eoi=6 kvm-pv-unhalt=7 \
         kvm-pv-tlb-flush=9 kvm-asyncpf-vmexit=10 kvm-pv-ipi=11 kvm-poll-control=12 kvm-pv-sched-yield=13 \
         kvm-asyncpf-int=14 kvm-msi-ext-dest-id=15 kvmclock-stable-bit=24",
    ),
];

/// Names of what CPUID does not show, only the MSRs IA32_ARCH_CAPABILITIES and IA32_CORE_CAPABILITIES, which the processor
/// itself answers for.
const IN_MSRS: &str = "rdctl-no ibrs-all rsba skip-l1dfl-vmentry ssb-no mds-no pschange-mc-no tsx-ctrl taa-no split-lock-detect";

fn names(text: &'static str) -> impl Iterator<Item = (&'static str, u32)> {
    text.split_ascii_whitespace().filter_map(|item| {
        let (name, bits) = item.split_once('=')?;
        let mask = bits
            .split('+')
            .filter_map(|bit| bit.parse::<u32>().ok())
            .fold(0, |mask, bit| mask | 1 << bit);
        Some((name, mask))
    })
}

/// A set of features: the bits of each of [`WORDS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Features(pub(super) [u32; WORDS.len()]);

impl Features {
    /// One feature by its name: nothing for one that CPUID does not show, `None` for a name that nobody knows.
    pub(super) fn named(name: &str) -> Option<Self> {
        for (index, word) in WORDS.iter().enumerate() {
            if let Some((_, mask)) = names(word.names).find(|(known, _)| *known == name) {
                let mut found = Self::default();
                found.0[index] = mask;
                return Some(found);
            }
        }
        let silent = IN_MSRS.split_ascii_whitespace().any(|known| known == name);
        silent.then(Self::default)
    }

    /// What CPUID tables promise.
    pub(super) fn of(entries: &[CpuidEntry]) -> Self {
        let mut found = Self::default();
        for (bits, word) in found.0.iter_mut().zip(&WORDS) {
            *bits = entries
                .iter()
                .find(|e| word.is_in(e))
                .map_or(0, |e| *word.register.of(&mut e.clone()));
        }
        found
    }

    /// Adds those of another set.
    pub(super) fn add(&mut self, other: Self) {
        self.0.iter_mut().zip(other.0).for_each(|(a, b)| *a |= b);
    }

    /// Takes those of another set away.
    pub(super) fn remove(&mut self, other: Self) {
        self.0.iter_mut().zip(other.0).for_each(|(a, b)| *a &= !b);
    }

    /// Those that are in both sets.
    pub(super) fn common(mut self, other: Self) -> Self {
        self.0.iter_mut().zip(other.0).for_each(|(a, b)| *a &= b);
        self
    }

    /// True when `other` has nothing that this set has not.
    pub(super) fn has(self, other: Self) -> bool {
        other.common(self) == other
    }

    /// The names of its features.
    pub(super) fn names(self) -> Vec<&'static str> {
        let mut all = Vec::new();
        for (bits, word) in self.0.iter().zip(&WORDS) {
            let mut named = 0;
            for (name, mask) in names(word.names) {
                if bits & mask != 0 && named & mask == 0 {
                    all.push(name);
                    named |= mask;
                }
            }
        }
        all
    }
}

impl Word {
    /// True for the entry that holds this register.
    pub(super) fn is_in(&self, entry: &CpuidEntry) -> bool {
        entry.leaf == self.leaf && entry.subleaf.unwrap_or(0) == self.subleaf
    }
}

impl Register {
    /// The register in an entry.
    pub(super) fn of(self, entry: &mut CpuidEntry) -> &mut u32 {
        match self {
            Eax => &mut entry.eax,
            Ebx => &mut entry.ebx,
            Ecx => &mut entry.ecx,
            Edx => &mut entry.edx,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_one_feature_and_every_bit_a_bit() {
        let mut seen = std::collections::BTreeSet::new();
        for word in &WORDS {
            for (name, mask) in names(word.names) {
                assert_ne!(mask, 0, "{name}");
                assert!(seen.insert(name), "{name} twice");
            }
        }
        assert_eq!(
            (WORDS[KVM_WORD].leaf, WORDS[KVM_WORD].register),
            (0x4000_0001, Eax)
        );
        assert_eq!(Features::named("kvmclock").unwrap().0[KVM_WORD], 9);
        assert_eq!(Features::named("mds-no"), Some(Features::default()));
        assert_eq!(Features::named("warp"), None);
    }

    #[test]
    fn names_come_back() {
        let mut set = Features::named("sse3").unwrap();
        set.add(Features::named("kvmclock").unwrap());
        set.add(Features::named("abm").unwrap());
        assert_eq!(set.names(), ["pni", "abm", "kvmclock"]);
    }
}
