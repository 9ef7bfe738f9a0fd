//! CPUID: what the software CPU promises, and the instruction (SDM volume 2; Linux's
//! `Documentation/virt/kvm/x86/cpuid.rst` for the hypervisor's leaves).
//!
//! The model is one of no particular product: "GenuineIntel", a family and model that have everything promised, and every
//! bit that says "not susceptible" set, so that guests switch on no mitigations.

use x86_defs::control::Cr4;
use x86_defs::cpuid::{CpuidEntry, KVM_FEATURES, KVM_SIGNATURE};
use x86_defs::state::{RAX, RBX, RCX, RDX};

use super::paravirt;
use super::xsave;
use crate::apic::TIMER_HZ;
use crate::cpu::{Cpu, Op, Result};
use crate::mmu::{LINEAR_BITS, PHYSICAL_BITS};
use crate::simd::host_features;

/// Highest basic leaf.
const MAX_BASIC: u32 = 0x16;
/// Highest extended leaf.
const MAX_EXTENDED: u32 = 0x8000_0008;
/// Family 6, model 143, stepping 8.
const SIGNATURE: u32 = 0x0008_06f8;
/// Leaf 0x4000_0010: frequencies in kHz.
const KVM_TIMING: u32 = 0x4000_0010;
const BRAND: &[u8; 48] =
    b"Corten software CPU\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

fn bit(set: bool, n: u32) -> u32 {
    u32::from(set) << n
}

fn bits(all: &[u32]) -> u32 {
    all.iter().fold(0, |sum, n| sum | 1 << n)
}

fn entry(leaf: u32, subleaf: Option<u32>, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidEntry {
    CpuidEntry {
        leaf,
        subleaf,
        eax,
        ebx,
        ecx,
        edx,
    }
}

fn word(bytes: &[u8]) -> u32 {
    bytes
        .iter()
        .rev()
        .fold(0, |sum, b| sum << 8 | u32::from(*b))
}

/// Leaf 1: signature, CLFLUSH line size, features. APIC ID and count of processors are the machine's to fill in.
fn leaf_1() -> [u32; 4] {
    let host = host_features();
    let cmpxchg16b = 13;
    let ecx = bits(&[0, 9, cmpxchg16b, 17, 19, 20, 21, 22, 23, 24, 26, 31])
        | bit(host.pclmulqdq, 1)
        | bit(host.fma, 12)
        | bit(host.aes, 25)
        | bit(host.avx, 28)
        | bit(host.f16c, 29)
        | bit(has_rdrand(), 30);
    // FPU VME DE PSE TSC MSR PAE MCE CX8 APIC SEP MTRR PGE MCA CMOV PAT PSE36 CLFSH MMX FXSR SSE SSE2 SS HTT(machine)
    let edx = bits(&[
        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26, 27,
    ]);
    [SIGNATURE, 8 << 8, ecx, edx]
}

/// The host's RDRAND and RDSEED stand behind the guest's.
fn has_rdrand() -> bool {
    is_x86_feature_detected!("rdrand")
}

/// Leaf 7: FSGSBASE TSC_ADJUST BMI1 AVX2 SMEP BMI2 ERMS INVPCID RDSEED ADX SMAP CLFLUSHOPT CLWB SHA; UMIP GFNI VAES
/// VPCLMULQDQ RDPID; FSRM IBRS STIBP ARCH_CAPABILITIES SSBD.
fn leaf_7() -> [u32; 4] {
    let host = host_features();
    let ebx = bits(&[0, 1, 3, 7, 8, 9, 10, 19, 20, 23, 24])
        | bit(host.avx2, 5)
        | bit(is_x86_feature_detected!("rdseed"), 18)
        | bit(host.sha, 29);
    let ecx = bits(&[2, 22])
        | bit(host.gfni, 8)
        | bit(host.vaes && host.avx, 9)
        | bit(host.vpclmulqdq && host.avx, 10);
    let edx = bits(&[4, 26, 27, 29, 31]);
    [2, ebx, ecx, edx]
}

/// Leaf 7, subleaf 2: BHI_DIS_S can be set, which guests prefer to clearing the branch history by code of their own at every
/// entry (they do not take BHI_NO's word for it under a hypervisor).
const LEAF_7_2: [u32; 4] = [0, 0, 0, 1 << 4];

/// Cache parameters of one level (leaf 4): type, level, ways, sets of 64-byte lines.
fn cache(subleaf: u32, kind: u32, level: u32, ways: u32, sets: u32) -> CpuidEntry {
    let eax = kind | level << 5 | 1 << 8;
    let inclusive = u32::from(level == 3) << 1;
    entry(
        4,
        Some(subleaf),
        [eax, (ways - 1) << 22 | 63, sets - 1, inclusive],
    )
}

/// Leaf 0xD: XSAVE's components and what is there of the family.
fn xsave_leaves() -> Vec<CpuidEntry> {
    let avx = host_features().avx;
    let components = u32::try_from(super::control::XCR0_KNOWN.bits()).unwrap_or(3);
    let components = if avx { components } else { 3 };
    let most = if avx { xsave::SIZE } else { xsave::AVX_OFFSET } as u32;
    let mut all = vec![
        entry(0xd, Some(0), [components, most, most, 0]),
        // XSAVEOPT, XSAVEC, XGETBV with ECX 1, XSAVES.
        entry(0xd, Some(1), [0b1111, most, 0, 0]),
    ];
    if avx {
        let (size, offset) = (xsave::AVX_SIZE as u32, xsave::AVX_OFFSET as u32);
        all.push(entry(0xd, Some(2), [size, offset, 0, 0]));
    }
    all
}

/// Leaf 0x15: the TSC's ratio to the timer's clock in lowest terms, for guests multiply in 32 bits.
fn tsc_ratio(tsc_khz: u32) -> [u32; 4] {
    let timer_khz = (TIMER_HZ / 1000) as u32;
    let (mut a, mut b) = (timer_khz, tsc_khz);
    while b != 0 {
        (a, b) = (b, a % b);
    }
    let divisor = a.max(1);
    [timer_khz / divisor, tsc_khz / divisor, TIMER_HZ as u32, 0]
}

/// Everything that the software CPU can promise. The machine fills in APIC IDs and topology; leaf 0x15, 0x16 and
/// 0x4000_0010 are for a time-stamp counter of `tsc_khz`.
pub(crate) fn supported(tsc_khz: u32) -> Vec<CpuidEntry> {
    let vendor = b"GenuineIntel";
    let (b, d, c) = (word(&vendor[..4]), word(&vendor[4..8]), word(&vendor[8..]));
    let mut all = vec![
        entry(0, None, [MAX_BASIC, b, c, d]),
        entry(1, None, leaf_1()),
        // No descriptors of leaf 2: "see leaf 4".
        entry(2, None, [0x00fe_ff01, 0, 0, 0]),
        cache(0, 1, 1, 8, 64),
        cache(1, 2, 1, 8, 64),
        cache(2, 3, 2, 8, 1024),
        cache(3, 3, 3, 16, 16384),
        entry(4, Some(4), [0; 4]),
        entry(5, None, [0; 4]),
        // ARAT: the APIC's timer never stops.
        entry(6, None, [1 << 2, 0, 0, 0]),
        entry(7, Some(0), leaf_7()),
        entry(7, Some(1), [0; 4]),
        entry(7, Some(2), LEAF_7_2),
        entry(0xa, None, [0; 4]),
        entry(0xb, Some(0), [0, 1, 1 << 8, 0]),
        entry(0xb, Some(1), [0, 1, 1 | 2 << 8, 0]),
        // TSC ticks per tick of the "crystal" that drives the APIC's timer, and that one's frequency.
        entry(0x15, None, tsc_ratio(tsc_khz)),
        entry(0x16, None, [tsc_khz / 1000, tsc_khz / 1000, 100, 0]),
    ];
    all.extend(xsave_leaves());
    all.extend(hypervisor_leaves(tsc_khz));
    all.extend(extended_leaves());
    all
}

fn hypervisor_leaves(tsc_khz: u32) -> [CpuidEntry; 3] {
    let signature = b"KVMKVMKVM\0\0\0";
    let name = |at: usize| word(&signature[at..at + 4]);
    [
        entry(KVM_SIGNATURE, None, [KVM_TIMING, name(0), name(4), name(8)]),
        entry(KVM_FEATURES, None, [paravirt::FEATURES, 0, 0, 0]),
        entry(KVM_TIMING, None, [tsc_khz, (TIMER_HZ / 1000) as u32, 0, 0]),
    ]
}

fn extended_leaves() -> Vec<CpuidEntry> {
    // LAHF LZCNT PREFETCHW
    let ecx = bits(&[0, 5, 8]);
    // SYSCALL NX MMXEXT (which SSE includes) 1-GiB pages RDTSCP long mode
    let edx = bits(&[11, 20, 22, 26, 27, 29]);
    let mut all = vec![
        entry(0x8000_0000, None, [MAX_EXTENDED, 0, 0, 0]),
        entry(0x8000_0001, None, [0, 0, ecx, edx]),
    ];
    for (i, part) in BRAND.chunks_exact(16).enumerate() {
        let w = |n: usize| word(&part[n * 4..n * 4 + 4]);
        all.push(entry(
            0x8000_0002 + i as u32,
            None,
            [w(0), w(1), w(2), w(3)],
        ));
    }
    all.extend([
        entry(0x8000_0005, None, [0; 4]),
        // L2: 512 KiB, 8 ways, 64-byte lines.
        entry(0x8000_0006, None, [0, 0, 512 << 16 | 6 << 12 | 64, 0]),
        // Invariant TSC.
        entry(0x8000_0007, None, [0, 0, 0, 1 << 8]),
        entry(
            0x8000_0008,
            None,
            // AMD's bits for IBPB, IBRS, STIBP and SSBD.
            [
                LINEAR_BITS << 8 | PHYSICAL_BITS,
                bits(&[12, 14, 15, 24]),
                0,
                0,
            ],
        ),
    ]);
    all
}

impl Cpu {
    /// What CPUID answers now.
    pub(super) fn cpuid_answer(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let leaf = self.answered_leaf(leaf);
        let found = self
            .cpuid
            .get(&(leaf, u32::MAX))
            .or_else(|| self.cpuid.get(&(leaf, subleaf)));
        let mut answer = found.map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx]);
        match leaf {
            1 => {
                let osxsave = self.cr4.contains(Cr4::OSXSAVE);
                answer[2] = answer[2] & !(1 << 27) | bit(osxsave && answer[2] & 1 << 26 != 0, 27);
                if !self.apic_enabled() {
                    answer[3] &= !(1 << 9);
                }
            }
            // Unknown levels of the topology repeat the subleaf and the x2APIC ID.
            0xb if found.is_none() => {
                let id = self.cpuid.get(&(0xb, 0)).map_or(0, |e| e.edx);
                answer = [0, 0, subleaf & 0xff, id];
            }
            0xd if subleaf <= 1 && found.is_some() => {
                answer[1] = xsave::size_of(self.xcr0) as u32;
            }
            _ => {}
        }
        answer
    }

    /// Leaves beyond the highest one answer as the highest basic leaf.
    fn answered_leaf(&self, leaf: u32) -> u32 {
        let base = match leaf {
            0x4000_0000..=0x4fff_ffff => return leaf,
            0x8000_0000.. => 0x8000_0000,
            _ => 0,
        };
        let highest = |base| self.cpuid.get(&(base, u32::MAX)).map_or(0, |e| e.eax);
        if leaf <= highest(base) || base == leaf {
            leaf
        } else {
            highest(0)
        }
    }
}

pub(super) fn cpuid(cpu: &mut Cpu, _: &Op) -> Result<()> {
    let (leaf, subleaf) = (cpu.regs[RAX] as u32, cpu.regs[RCX] as u32);
    let answer = cpu.cpuid_answer(leaf, subleaf);
    for (register, value) in [RAX, RBX, RCX, RDX].into_iter().zip(answer) {
        cpu.regs[register] = u64::from(value);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(all: &[CpuidEntry], leaf: u32, subleaf: Option<u32>) -> CpuidEntry {
        *all.iter()
            .find(|e| e.leaf == leaf && e.subleaf == subleaf)
            .unwrap()
    }

    #[test]
    fn leaves_are_whole() {
        let all = supported(2_000_000);
        let first = find(&all, 0, None);
        assert_eq!(first.ebx.to_le_bytes(), *b"Genu");
        assert_eq!(first.edx.to_le_bytes(), *b"ineI");
        assert_eq!(first.ecx.to_le_bytes(), *b"ntel");
        let basic = all.iter().filter(|e| e.leaf < 0x4000_0000).map(|e| e.leaf);
        assert_eq!(basic.max(), Some(first.eax));
        let last = find(&all, 0x8000_0000, None).eax;
        assert_eq!(all.iter().map(|e| e.leaf).max(), Some(last));
        let kvm = find(&all, KVM_SIGNATURE, None);
        assert_eq!(kvm.ebx.to_le_bytes(), *b"KVMK");
        let timing = find(&all, KVM_TIMING, None);
        assert_eq!((timing.eax, timing.ebx), (2_000_000, 1_000_000));
        let tsc = find(&all, 0x15, None);
        let hz = u64::from(tsc.ecx) * u64::from(tsc.ebx) / u64::from(tsc.eax);
        assert_eq!(hz, 2_000_000_000);
    }

    #[test]
    fn nothing_is_promised_that_is_not_there() {
        let all = supported(1_000_000);
        let one = find(&all, 1, None);
        let seven = find(&all, 7, Some(0));
        // No VMX, SMX, MONITOR, DCA, PDCM; no MPX, AVX-512, PT, RTM, HLE, PKU, LA57, CET.
        assert_eq!(one.ecx & bits(&[2, 3, 5, 6, 15, 18]), 0);
        assert_eq!(
            seven.ebx & bits(&[2, 4, 11, 14, 16, 17, 25, 26, 27, 28, 30, 31]),
            0
        );
        assert_eq!(seven.ecx & bits(&[3, 7, 16, 25, 27, 28]), 0);
        assert_eq!(seven.edx & bits(&[2, 3, 22, 23, 24, 25]), 0);
        // AVX and what rests on it go together with its state component.
        let avx = one.ecx & 1 << 28 != 0;
        let d = find(&all, 0xd, Some(0));
        assert_eq!(d.eax & 4 != 0, avx);
        assert!(avx || one.ecx & bits(&[12, 29]) == 0 && seven.ebx & 1 << 5 == 0);
    }
}
