//! Differential tests: each form of each instruction, with random operands, on the host's own processor and on the software
//! CPU; all registers, flags that the manual defines, memory and faults must agree.
//!
//! `CORTEN_DIFF_SEED` chooses the seed (the failing seed is printed), `CORTEN_DIFF_CASES` the number of cases of each form,
//! `CORTEN_DIFF_ONLY` the forms whose name contains it.

mod generate;
mod guest;
mod native;
mod random;
mod speed;
mod state;

use std::collections::BTreeMap;
use std::fmt::Write as _;

use iced_x86::{Code, CpuidFeature, EncodingKind, Instruction};

use generate::Case;
use guest::{Guest, How};
use native::{CODE, DATA, DATA_SIZE, End, Native, STACK, STACK_SIZE};
use random::Random;

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.is_empty())
}

fn number(name: &str, default: u64) -> u64 {
    variable(name)
        .and_then(|v| v.parse().ok())
        .unwrap_or(default)
}

/// Features whose instructions are tested.
fn vector_features() -> Vec<CpuidFeature> {
    use CpuidFeature as F;
    [
        F::MMX,
        F::SSE,
        F::SSE2,
        F::SSE3,
        F::SSSE3,
        F::SSE4_1,
        F::SSE4_2,
        F::AES,
        F::PCLMULQDQ,
        F::SHA,
        F::AVX,
        F::AVX2,
        F::FMA,
        F::F16C,
        F::GFNI,
        F::VAES,
        F::VPCLMULQDQ,
        F::FPU,
        F::FPU387,
    ]
    .to_vec()
}

/// The forms of 64-bit mode that need only these features.
fn forms(features: &[CpuidFeature], bits: u32) -> Vec<Code> {
    let only = variable("CORTEN_DIFF_ONLY");
    Code::values()
        .filter(|code| {
            let form = code.op_code();
            form.is_instruction()
                && if bits == 64 {
                    form.mode64()
                } else {
                    form.mode32()
                }
                && matches!(form.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
                && code.cpuid_features().iter().all(|f| features.contains(f))
                && only
                    .as_ref()
                    .is_none_or(|only| format!("{code:?}").contains(only.as_str()))
        })
        .collect()
}

/// Both processors.
struct Pair {
    native: Native,
    guest: Guest,
    /// The software CPU executes host code.
    translated: bool,
}

impl Pair {
    fn new(translated: bool) -> Self {
        let native = Native::new();
        let mut guest = Guest::new();
        guest.write(DATA, native.bytes(DATA, DATA_SIZE));
        guest.write(STACK, native.bytes(STACK, STACK_SIZE));
        Self {
            native,
            guest,
            translated,
        }
    }

    /// Makes the guest's memory that of the host.
    fn synchronize(&mut self) {
        for (start, size) in [(DATA, DATA_SIZE), (STACK, STACK_SIZE)] {
            let bytes = self.native.bytes(start, size).to_vec();
            self.guest.write(start, &bytes);
        }
    }

    /// Runs a case on both; what differs.
    fn compare(&mut self, case: &Case, single: bool) -> String {
        for (address, bytes) in &case.memory {
            self.native.write(*address, bytes);
            self.guest.write(*address, bytes);
        }
        let start = case.state.rip;
        self.native.set_code(start, &case.bytes);
        self.guest.write(start, &case.bytes);
        let end = start + case.bytes.len() as u64;
        self.guest.write(end, &[0xeb, 0xfe]);
        let mut host = case.state;
        if self.translated {
            // Unmasked exceptions are for the interpreter.
            host.mxcsr |= 0x1f80;
            if single {
                // With nothing pending either: ES and the busy bit.
                host.x87.control |= 0x3f;
                host.x87.status &= !0x8080;
            }
        }
        let mut ours = host;
        let how = match (self.translated, single) {
            (true, _) => How::Translated,
            (false, true) => How::Single,
            (false, false) => How::Block,
        };
        let host_end = self.native.run(&mut host, case.bits);
        let stops = |rip| !(start..end).contains(&rip) && self.native.is_end(rip);
        let our_end = self.guest.run(&mut ours, case.bits, stops, how);
        self.native.clear_code(start, case.bytes.len());
        let ends = [0xeb, 0xfe].repeat(case.bytes.len().div_ceil(2) + 1);
        self.guest.write(start, &ends);
        let mut out = String::new();
        if host_end.vector == our_end.vector
            && host_end.vector != 3
            && case.instructions.iter().any(moves_all)
        {
            // How many of the registers have been moved before the fault is the processor's business.
            self.synchronize();
            return out;
        }
        if host_end.vector == 19
            && case.instructions.iter().any(is_dot_product)
            && host.mxcsr & 0x800 == 0
        {
            // An exact but tiny product, which an unmasked underflow tells of, is not in the result.
            self.synchronize();
            return out;
        }
        if (end + 1..end + 16).contains(&host.rip) && case.instructions.iter().any(is_indirect) {
            // It went into the middle of itself, and an instruction there has taken in what stands behind the code, which differs.
            self.synchronize();
            return out;
        }
        if host.mxcsr & MISALIGNED_MASK != 0 {
            // AMD's bit for misaligned SSE operands, which the software CPU's CPUID does not promise.
            self.synchronize();
            return out;
        }
        if matches!(host_end.vector, 12..=14)
            && our_end.vector == 3
            && case.instructions.iter().any(is_masked_store)
        {
            // A fault at a byte that would not have been written.
            self.synchronize();
            return out;
        }
        if matches!(host_end.vector, 12..=14) && case.instructions.iter().any(is_stored_by_pieces) {
            // The pieces before the fault may be in memory.
            self.synchronize();
        }
        if !same_end(&case.instructions, host_end, our_end) {
            let _ = writeln!(out, "    end: host {host_end:x?}, ours {our_end:x?}");
        }
        let mut undefined = undefined_flags(&case.instructions);
        if self.translated && host_end.vector != 3 {
            // Flags that the block would have written before it read them are not kept.
            undefined = u64::MAX;
        }
        if unsure_inexact(&case.instructions, host.mxcsr, host_end) {
            ours.mxcsr = ours.mxcsr & !0x3f | host.mxcsr & 0x3f;
        }
        out += &host.differences(&ours, undefined, case.bits);
        for (start, size) in [(DATA, DATA_SIZE), (STACK, STACK_SIZE)] {
            let (a, b) = (
                self.native.bytes(start, size),
                self.guest.bytes(start, size),
            );
            if a == b {
                continue;
            }
            for (i, (x, y)) in a
                .iter()
                .zip(b)
                .enumerate()
                .filter(|(_, (x, y))| x != y)
                .take(8)
            {
                let _ = writeln!(
                    out,
                    "    memory {:#x}: host {x:#x}, ours {y:#x}",
                    start + i as u64
                );
            }
            let copy = a.to_vec();
            self.guest.write(start, &copy);
        }
        out
    }
}

/// True for branches to an address that is data.
fn is_indirect(i: &Instruction) -> bool {
    use iced_x86::FlowControl;
    matches!(
        i.flow_control(),
        FlowControl::IndirectBranch | FlowControl::IndirectCall | FlowControl::Return
    )
}

/// MXCSR.MM (APM volume 1, section 4.2.2).
const MISALIGNED_MASK: u32 = 1 << 17;

/// True when two ends agree. The instructions that store or load piece by piece may fault at any byte of the page.
fn same_end(instructions: &[Instruction], host: End, ours: End) -> bool {
    use iced_x86::Mnemonic as M;
    // What is mapped outside the test's pages is the host kernel's business.
    let outside = host.vector == 14 && !(CODE..STACK + STACK_SIZE + 0x1000).contains(&host.address);
    let host = if outside {
        End {
            error: host.error & !1,
            ..host
        }
    } else {
        host
    };
    if host == ours {
        return true;
    }
    // BOUND may compare with one bound before it reads the other.
    if host.vector == 5 && instructions.iter().any(|i| i.mnemonic() == M::Bound) {
        return true;
    }
    // Which of its two operands CMPS looks at first is not always the same on AMD's processors.
    let fault = |end: End| matches!(end.vector, 12..=14);
    let compares = |i: &Instruction| {
        matches!(
            i.code(),
            Code::Cmpsb_m8_m8 | Code::Cmpsw_m16_m16 | Code::Cmpsd_m32_m32 | Code::Cmpsq_m64_m64
        )
    };
    if instructions.iter().any(compares) && fault(host) && fault(ours) {
        return true;
    }
    // The masked stores may look at bytes that they do not write.
    let by_pieces = |i: &Instruction| {
        is_masked_store(i)
            || i.memory_size().size() == 10
            || matches!(
                i.mnemonic(),
                M::Fnsave | M::Frstor | M::Fnstenv | M::Fldenv | M::Fsave | M::Fstenv | M::Fbstp
            )
    };
    instructions.iter().any(by_pieces) && fault(host) && fault(ours)
}

fn is_dot_product(i: &Instruction) -> bool {
    use iced_x86::Mnemonic as M;
    matches!(i.mnemonic(), M::Dpps | M::Dppd | M::Vdpps | M::Vdppd)
}

/// PUSHA and POPA.
fn moves_all(i: &Instruction) -> bool {
    use iced_x86::Mnemonic as M;
    matches!(i.mnemonic(), M::Pusha | M::Pushad | M::Popa | M::Popad)
}

fn is_stored_by_pieces(i: &Instruction) -> bool {
    use iced_x86::Mnemonic as M;
    let environment = matches!(i.mnemonic(), M::Fnsave | M::Fnstenv | M::Fsave | M::Fstenv);
    environment || i.memory_size().size() == 10
}

fn is_masked_store(i: &Instruction) -> bool {
    use iced_x86::Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Maskmovdqu
            | M::Vmaskmovdqu
            | M::Maskmovq
            | M::Vmaskmovps
            | M::Vmaskmovpd
            | M::Vpmaskmovd
            | M::Vpmaskmovq
    )
}

/// True after an unmasked overflow or underflow: whether the flag of inexact results is set then depends on the result in a
/// format of unlimited exponent, which the software CPU does not compute.
fn unsure_inexact(instructions: &[Instruction], mxcsr: u32, end: End) -> bool {
    use iced_x86::Mnemonic as M;
    // These raise exceptions in more than one step.
    let steps = |i: &Instruction| {
        matches!(
            i.mnemonic(),
            M::Vcvtps2ph | M::Dpps | M::Dppd | M::Vdpps | M::Vdppd
        )
    };
    end.vector == 19 && (instructions.iter().any(steps) || mxcsr & !(mxcsr >> 7) & 0x18 != 0)
}

/// Flags that the manual leaves undefined after these instructions.
fn undefined_flags(instructions: &[Instruction]) -> u64 {
    use iced_x86::RflagsBits as B;
    // Rotations by more than one.
    let rotates = |i: &Instruction| {
        use iced_x86::Mnemonic as M;
        matches!(i.mnemonic(), M::Rol | M::Ror | M::Rcl | M::Rcr) && i.immediate8() != 1
    };
    let bits = instructions.iter().fold(0, |all, i| {
        all | i.rflags_undefined() | if rotates(i) { B::OF } else { 0 }
    });
    [
        (B::CF, 0),
        (B::PF, 2),
        (B::AF, 4),
        (B::ZF, 6),
        (B::SF, 7),
        (B::OF, 11),
    ]
    .iter()
    .fold(0, |mask, (bit, at)| {
        if bits & bit != 0 {
            mask | 1 << at
        } else {
            mask
        }
    })
}

fn describe(case: &Case, seed: u64, differences: &str) -> String {
    let mut out = String::new();
    for i in &case.instructions {
        let _ = writeln!(out, "  {:?} at {:#x}: {i}", i.code(), i.ip());
    }
    let _ = writeln!(out, "  bytes {:02x?}, seed {seed}", case.bytes);
    out + differences
}

/// The forms one by one.
fn check_forms(codes: &[Code], bits: u32, translated: bool) {
    let cases = number("CORTEN_DIFF_CASES", 60);
    let seed = number("CORTEN_DIFF_SEED", 1);
    let mut pair = Pair::new(translated);
    let mut failures: BTreeMap<String, (u64, String)> = BTreeMap::new();
    let mut covered = 0;
    let mut not_encoded = Vec::new();
    let mut total = 0;
    for code in codes {
        let mut done = 0;
        for i in 0..cases {
            let case_seed = seed
                .wrapping_mul(1_000_003)
                .wrapping_add((*code as u64) << 20 | i);
            let mut random = Random::new(case_seed);
            let Some(case) = generate::single(&mut random, *code, bits) else {
                continue;
            };
            done += 1;
            let differences = pair.compare(&case, i & 1 == 0);
            if !differences.is_empty() {
                let failure = failures
                    .entry(format!("{code:?}"))
                    .or_insert_with(|| (0, describe(&case, case_seed, &differences)));
                failure.0 += 1;
            }
        }
        total += done;
        if done == 0 {
            not_encoded.push(format!("{code:?}"));
        } else {
            covered += 1;
        }
    }
    println!(
        "{covered} of {} forms, {total} cases, seed {seed}",
        codes.len()
    );
    println!("not generated: {}", not_encoded.join(" "));
    for (name, (count, text)) in &failures {
        println!("{name}: {count} differ, first:\n{text}");
    }
    assert!(failures.is_empty(), "{} forms differ", failures.len());
}

/// Features of integer instructions that CPUID promises.
fn integer_features() -> Vec<CpuidFeature> {
    use CpuidFeature as F;
    [
        F::INTEL8086,
        F::INTEL186,
        F::INTEL286,
        F::INTEL386,
        F::INTEL486,
        F::X64,
        F::CMOV,
        F::CX8,
        F::CMPXCHG16B,
        F::BMI1,
        F::BMI2,
        F::LZCNT,
        F::POPCNT,
        F::MOVBE,
        F::ADX,
        F::MULTIBYTENOP,
        F::PREFETCHW,
        F::SSE4_2,
        F::CLFSH,
        F::CLFLUSHOPT,
        F::CLWB,
        F::PAUSE,
    ]
    .to_vec()
}

/// Why a form of 64-bit mode is not compared with the host in user mode, or `None` when it is.
fn left_out(code: Code) -> Option<&'static str> {
    use iced_x86::Mnemonic as M;
    match code.mnemonic() {
        M::Int
        | M::Int1
        | M::Int3
        | M::Into
        | M::Syscall
        | M::Sysenter
        | M::Sysret
        | M::Sysexit
        | M::Sysretq
        | M::Sysexitq
        | M::Iret
        | M::Iretd
        | M::Iretq => Some("enters or leaves the kernel"),
        M::In
        | M::Out
        | M::Insb
        | M::Insw
        | M::Insd
        | M::Outsb
        | M::Outsw
        | M::Outsd
        | M::Cli
        | M::Sti
        | M::Hlt
        | M::Clts
        | M::Lgdt
        | M::Lidt
        | M::Lldt
        | M::Ltr
        | M::Lmsw
        | M::Invd
        | M::Wbinvd
        | M::Invlpg
        | M::Rdmsr
        | M::Wrmsr => Some("privileged"),
        M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw | M::Lar | M::Lsl | M::Verr | M::Verw => {
            Some("depends on system tables")
        }
        M::Lss | M::Lfs | M::Lgs | M::Retf | M::Push | M::Pop if touches_segments(code) => {
            Some("loads segments")
        }
        M::Lss | M::Lfs | M::Lgs | M::Lds | M::Les | M::Retf => Some("loads segments"),
        M::Pushf | M::Pushfq | M::Popf | M::Popfq => Some("reads system flags"),
        M::Mov if touches_segments(code) => Some("moves segment, control or debug registers"),
        M::Jmp | M::Call
            if code
                .op_code()
                .op_kinds()
                .first()
                .is_some_and(|k| format!("{k:?}") == "mem") =>
        {
            Some("far transfer")
        }
        _ => None,
    }
}

fn touches_segments(code: Code) -> bool {
    use iced_x86::OpCodeOperandKind as K;
    code.op_code().op_kinds().iter().any(|k| {
        matches!(
            k,
            K::seg_reg
                | K::cr_reg
                | K::dr_reg
                | K::tr_reg
                | K::fs
                | K::gs
                | K::es
                | K::cs
                | K::ss
                | K::ds
        )
    })
}

/// Features that CPUID promises and whose instructions answer otherwise each time, or are about the system's state.
fn system_features() -> Vec<CpuidFeature> {
    use CpuidFeature as F;
    [
        F::CPUID,
        F::TSC,
        F::RDTSCP,
        F::RDPID,
        F::RDRAND,
        F::RDSEED,
        F::FSGSBASE,
        F::FXSR,
        F::XSAVE,
        F::XSAVEOPT,
        F::XSAVEC,
        F::SYSCALL,
        F::SEP,
        F::MSR,
        F::SMAP,
        F::INVPCID,
        F::RDPMC,
        F::MONITOR,
    ]
    .to_vec()
}

/// Every form of 64-bit mode that CPUID may promise, tested or not.
fn promised() -> Vec<Code> {
    let features = [integer_features(), vector_features(), system_features()];
    forms(&features.concat(), 64)
}

fn integer_forms(bits: u32) -> Vec<Code> {
    let all = forms(&integer_features(), bits).into_iter();
    all.filter(|c| left_out(*c).is_none()).collect()
}

#[test]
fn integer_forms_agree_with_the_host() {
    check_forms(&integer_forms(64), 64, false);
}

#[test]
fn translated_integer_forms_agree_with_the_host() {
    check_forms(&integer_forms(64), 64, true);
    check_forms(&integer_forms(32), 32, true);
}

#[test]
fn translated_vector_forms_agree_with_the_host() {
    check_forms(&forms(&vector_features(), 64), 64, true);
    check_forms(&forms(&vector_features(), 32), 32, true);
}

#[test]
fn vector_forms_agree_with_the_host() {
    check_forms(&forms(&vector_features(), 64), 64, false);
}

#[test]
fn integer_forms_of_32_bit_code_agree_with_the_host() {
    check_forms(&integer_forms(32), 32, false);
}

#[test]
fn vector_forms_of_32_bit_code_agree_with_the_host() {
    check_forms(&forms(&vector_features(), 32), 32, false);
}

/// Blocks of several instructions, whose flags and registers flow from one into the other.
#[test]
fn sequences_agree_with_the_host() {
    check_sequences(false);
}

#[test]
fn translated_sequences_agree_with_the_host() {
    check_sequences(true);
}

fn check_sequences(translated: bool) {
    let straight = |code: &Code| {
        let instruction = {
            let mut i = Instruction::new();
            i.set_code(*code);
            i
        };
        left_out(*code).is_none()
            && instruction.flow_control() == iced_x86::FlowControl::Next
            && !instruction.is_stack_instruction()
            && !instruction.is_string_instruction()
    };
    let integers: Vec<Code> = forms(&integer_features(), 64)
        .into_iter()
        .filter(straight)
        .collect();
    let vectors: Vec<Code> = forms(&vector_features(), 64)
        .into_iter()
        .filter(straight)
        .collect();
    let all = [integers.as_slice(), vectors.as_slice()].concat();
    if all.is_empty() {
        return;
    }
    // Nothing that leaves flags undefined, and no store that may fault where it does not write.
    let suits = |i: &Instruction| {
        undefined_flags(std::slice::from_ref(i)) == 0
            && !is_masked_store(i)
            && !is_stored_by_pieces(i)
            && i.mnemonic() != iced_x86::Mnemonic::Vcvtps2ph
    };
    let count = number("CORTEN_DIFF_CASES", 60) * 100;
    let seed = number("CORTEN_DIFF_SEED", 1);
    let mut pair = Pair::new(translated);
    let mut failed = 0;
    for i in 0..count {
        let case_seed = seed.wrapping_mul(7_000_003).wrapping_add(i);
        let mut random = Random::new(case_seed);
        let pool = match random.below(3) {
            0 if !integers.is_empty() => &integers,
            1 if !vectors.is_empty() => &vectors,
            _ => &all,
        };
        let length = 2 + random.below(19) as usize;
        let Some(case) = generate::sequence(&mut random, pool, length, suits) else {
            continue;
        };
        let differences = pair.compare(&case, i & 3 == 0);
        if !differences.is_empty() {
            failed += 1;
            if failed <= 5 {
                println!("{}", describe(&case, case_seed, &differences));
            }
        }
    }
    println!("{count} sequences, seed {seed}");
    assert_eq!(failed, 0, "sequences differ");
}

/// The forms that are promised and not compared, with the reason. No form may be left out without one.
#[test]
fn coverage_is_told() {
    let promised = promised();
    let mut reasons: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let mut random = Random::new(1);
    let mut covered = 0;
    for code in &promised {
        let system = code
            .cpuid_features()
            .iter()
            .any(|f| system_features().contains(f));
        let reason = left_out(*code)
            .or(system.then_some("system state, or another answer each time"))
            .or_else(|| {
                let encodable = (0..50).any(|_| generate::single(&mut random, *code, 64).is_some());
                (!encodable).then_some("16-bit branch of other processors")
            });
        match reason {
            Some(reason) => reasons.entry(reason).or_default().push(format!("{code:?}")),
            None => covered += 1,
        }
    }
    println!(
        "{covered} of {} promised forms of 64-bit mode are compared",
        promised.len()
    );
    for (reason, names) in &reasons {
        println!("{reason} ({}): {}", names.len(), names.join(" "));
    }
    if variable("CORTEN_DIFF_ONLY").is_none() {
        assert!(covered > 1900, "{covered} forms");
    }
}
