//! Plans: what decoding finds out about a vector instruction so that executing it need not.

use std::collections::HashMap;
use std::sync::LazyLock;

use iced_x86::{Code, EncodingKind, Instruction, OpKind, Register};
use parking_lot::Mutex;

use super::Unit;
use super::call::Stub;
use super::table::{Entry, Float, Output, entry};
use crate::cpu::Op;

/// Where a source operand is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Source {
    /// Register operand [`Op::a`].
    A,
    /// Register operand [`Op::b`].
    B,
    /// Register operand [`Op::c`].
    C,
    /// This register.
    Fixed(u8),
    /// The memory operand.
    Memory,
    /// The immediate, zero-extended.
    Immediate,
    /// There is none.
    None,
}

/// What a destination's upper half becomes, and how wide the operation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Width {
    /// MM registers.
    Mm,
    /// XMM registers; the upper halves stay.
    Legacy,
    /// XMM registers; the upper half of the destination becomes zero.
    Vex128,
    /// YMM registers.
    Vex256,
}

/// How an instruction of a given code and immediate is executed.
#[derive(Debug)]
pub(crate) struct Plan {
    /// The routine.
    pub(crate) stub: Stub,
    /// Relation to MXCSR.
    pub(crate) float: Float,
    /// Where the result goes.
    pub(crate) output: Output,
    /// Width.
    pub(crate) width: Width,
    /// The stub works on YMM registers.
    pub(crate) wide: bool,
    /// Registers 0, 1 and 2 of the stub.
    pub(crate) sources: [Source; 3],
    /// Bytes of the memory operand.
    pub(crate) memory: u8,
    /// The memory operand must be aligned to its size.
    pub(crate) aligned: bool,
    /// The second source is an MM register, a general register, or neither.
    pub(crate) second: Bank,
    /// The destination is an MM register, a general register, or neither.
    pub(crate) destination: Bank,
    /// The immediate.
    pub(crate) imm: u8,
    /// A conversion from or to a general register: the stub uses RAX.
    pub(crate) general: bool,
}

/// A register file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bank {
    /// MMX.
    Mm,
    /// XMM and YMM.
    Vector,
    /// General registers of 64 bits.
    General64,
    /// General registers of 32 bits (or fewer).
    General32,
    /// No register.
    None,
}

impl Bank {
    fn of(register: Register) -> Self {
        match register {
            r if r.is_mm() => Self::Mm,
            r if r.is_xmm() || r.is_ymm() => Self::Vector,
            r if r.is_gpr64() => Self::General64,
            r if r.is_gpr() => Self::General32,
            _ => Self::None,
        }
    }
}

/// What plans are shared by.
type Key = (Code, u8, [Source; 3]);

/// Plans live as long as the process: there are at most as many as codes times immediates.
static PLANS: LazyLock<Mutex<HashMap<Key, &'static Plan>>> = LazyLock::new(Mutex::default);

impl Plan {
    /// The plan for an instruction of the stub tables.
    pub(crate) fn for_instruction(instruction: &Instruction) -> Option<&'static Self> {
        let table = entry(instruction)?;
        let imm = immediate(instruction);
        let key = (instruction.code(), imm, sources(instruction, &table));
        if let Some(plan) = PLANS.lock().get(&key) {
            return Some(plan);
        }
        let plan: &'static Self = Box::leak(Box::new(Self::new(instruction, &table, key.2, imm)?));
        PLANS.lock().insert(key, plan);
        Some(plan)
    }

    fn new(
        instruction: &Instruction,
        table: &Entry,
        sources: [Source; 3],
        imm: u8,
    ) -> Option<Self> {
        let kinds = (0..instruction.op_count()).map(|i| Bank::of(register(instruction, i)));
        let banks: Vec<Bank> = kinds.collect();
        let has_ymm = (0..instruction.op_count()).any(|i| register(instruction, i).is_ymm());
        // Narrowing and widening conversions are 256 bits wide although one operand is an XMM register.
        let wide = has_ymm || instruction.memory_size().size() == 32;
        let mm_operation = table.mm.is_some() && banks.contains(&Bank::Mm);
        let second = second_bank(instruction);
        let destination = banks.first().copied().unwrap_or(Bank::None);
        let general64 = second == Bank::General64 || destination == Bank::General64;
        let memory64 = table.wide.is_some()
            && table.output == Output::Vector
            && instruction.memory_size().size() == 8;
        let stub = match () {
            () if mm_operation => table.mm,
            () if wide => table.ymm,
            () if table.wide.is_some() && (general64 || memory64) => table.wide,
            () => table.xmm,
        }?;
        let from_memory = sources.contains(&Source::Memory);
        let selector = if instruction.mnemonic() == iced_x86::Mnemonic::Insertps
            || instruction.mnemonic() == iced_x86::Mnemonic::Vinsertps
        {
            // A memory operand is the element itself: the immediate's source selector does not count.
            if from_memory { imm & 0x3f } else { imm }
        } else {
            imm
        };
        let vex = instruction.encoding() == EncodingKind::VEX;
        let memory = u8::try_from(instruction.memory_size().size()).ok()?;
        Some(Self {
            stub: if table.immediate {
                stub.with_imm(selector)
            } else {
                stub
            },
            float: table.float,
            output: table.output,
            width: match (mm_operation, vex, wide) {
                (true, ..) => Width::Mm,
                (_, false, _) => Width::Legacy,
                (_, true, false) => Width::Vex128,
                (_, true, true) => Width::Vex256,
            },
            wide,
            sources,
            memory,
            aligned: !vex && memory == 16,
            second,
            destination,
            imm,
            general: table.wide.is_some(),
        })
    }

    /// What must be enabled.
    pub(crate) fn unit(&self) -> Unit {
        match self.width {
            Width::Mm => Unit::Mmx,
            Width::Legacy => Unit::Sse,
            Width::Vex128 | Width::Vex256 => Unit::Avx,
        }
    }

    /// The plan that decoding left in an operation.
    ///
    /// # Safety
    /// The operation's immediate must have been set by [`Plan::keep_in`].
    #[allow(unsafe_code)] // Plans are reached by address, so that executing an instruction looks nothing up.
    #[inline(always)]
    pub(crate) unsafe fn of(op: &Op) -> &'static Self {
        // SAFETY: the caller's promise; plans are never freed.
        unsafe { &*(op.imm as *const Self) }
    }

    /// Leaves the plan's address in an operation, in place of the immediate, which the plan has taken over.
    pub(crate) fn keep_in(&'static self, op: &mut Op) {
        op.imm = std::ptr::from_ref(self) as u64;
    }
}

/// The register that an operand is, or `Register::None`.
pub(crate) fn register(instruction: &Instruction, operand: u32) -> Register {
    if instruction.op_kind(operand) == OpKind::Register {
        instruction.op_register(operand)
    } else {
        Register::None
    }
}

/// The immediate, or 0.
fn immediate(instruction: &Instruction) -> u8 {
    let last = instruction.op_count().wrapping_sub(1);
    if instruction.op_count() > 0 && instruction.op_kind(last) == OpKind::Immediate8 {
        instruction.immediate8()
    } else {
        0
    }
}

/// The register file of the second source, where that is a register.
fn second_bank(instruction: &Instruction) -> Bank {
    let operands: Vec<u32> = (0..instruction.op_count())
        .filter(|i| instruction.op_kind(*i) != OpKind::Immediate8)
        .collect();
    match operands.len() {
        2 => Bank::of(register(instruction, operands[1])),
        3.. => Bank::of(register(instruction, operands[2])),
        _ => Bank::None,
    }
}

/// Where the stub's registers 0, 1 and 2 come from.
fn sources(instruction: &Instruction, table: &Entry) -> [Source; 3] {
    // The operands without the immediate, as slots of the operation; memory does not count among the slots.
    let mut slots = [Source::A, Source::B, Source::C].into_iter();
    let mut operands = Vec::with_capacity(4);
    for i in 0..instruction.op_count() {
        match instruction.op_kind(i) {
            OpKind::Register => {
                let number = (instruction.op_register(i).number() & 15) as u8;
                operands.push(slots.next().unwrap_or(Source::Fixed(number)));
            }
            OpKind::Memory => operands.push(Source::Memory),
            _ => {}
        }
    }
    let by_immediate = operands.len() < instruction.op_count() as usize && !table.immediate;
    match *operands.as_slice() {
        // Shifts by an immediate.
        [a] if by_immediate => [a, Source::Immediate, Source::None],
        [_, b] if by_immediate => [b, Source::Immediate, Source::None],
        // PSLLDQ and PSRLDQ.
        [a] => [a, a, Source::None],
        [_, b] if is_byte_shift(instruction) => [b, b, Source::None],
        // Legacy blends and SHA256RNDS2 have an implied mask; one-source instructions ignore the first.
        [a, b] if has_implied_third(instruction) => [a, b, Source::Fixed(0)],
        [a, b] => [a, b, Source::None],
        [a, b, c] if is_fma(instruction) => [a, b, c],
        [_, b, c] => [b, c, Source::None],
        [_, b, c, d] => [b, c, d],
        _ => [Source::None; 3],
    }
}

fn has_implied_third(instruction: &Instruction) -> bool {
    use iced_x86::Mnemonic as M;
    matches!(
        instruction.mnemonic(),
        M::Pblendvb | M::Blendvps | M::Blendvpd | M::Sha256rnds2
    )
}

fn is_byte_shift(instruction: &Instruction) -> bool {
    use iced_x86::Mnemonic as M;
    matches!(instruction.mnemonic(), M::Vpslldq | M::Vpsrldq)
}

fn is_fma(instruction: &Instruction) -> bool {
    instruction
        .cpuid_features()
        .contains(&iced_x86::CpuidFeature::FMA)
}
