//! x87 instructions executed on the host: the guest's whole x87 state goes into the host's unit, the instruction runs
//! there under the guest's own control word, and the state comes back.
//!
//! Exceptions that the guest has not masked do no harm: the unit only notes them, and nothing that waits for them runs
//! before the state is taken out again. So stack faults, suppressed results, tags and condition codes are the processor's own.

use std::arch::{asm, naked_asm};

use super::X87;

/// An FXSAVE image (SDM volume 1, table 10-2), 64-bit format.
#[derive(Clone, Copy)]
#[repr(C, align(16))]
struct Image {
    control: u16,
    status: u16,
    tags: u8,
    reserved: u8,
    opcode: u16,
    instruction: u64,
    data: u64,
    mxcsr: u32,
    mxcsr_mask: u32,
    /// ST(0) to ST(7).
    stack: [u128; 8],
    xmm: [u128; 16],
    rest: [u128; 6],
}

const _: () = assert!(size_of::<Image>() == 512);

/// A routine of one x87 instruction, from one of the tables below.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Routine(u64);

impl Routine {
    /// The instruction of two bytes (escape D8 to DF, then C0 to FF).
    pub(crate) fn of_registers(escape: u8, second: u8) -> Self {
        let index = u64::from(escape & 7) * 64 + u64::from(second & 0x3f);
        Self(register_forms as *const () as u64 + index * STRIDE)
    }

    /// The instruction of an escape with a memory operand and this extension (ModRM.reg).
    pub(crate) fn of_memory(escape: u8, extension: u8) -> Self {
        let index = u64::from(escape & 7) * 8 + u64::from(extension & 7);
        Self(memory_forms as *const () as u64 + index * STRIDE)
    }

    /// As a number to keep in an operation.
    pub(crate) fn to_bits(self) -> u64 {
        self.0
    }

    /// From what [`Self::to_bits`] gave.
    ///
    /// # Safety
    /// The number must come from there.
    pub(crate) unsafe fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
}

/// The exception flags of the status word, and their masks in the control word.
const EXCEPTIONS: u16 = 0x3f;

/// Bytes of a table entry.
const STRIDE: u64 = 4;

/// D8 C0 to DF FF, each followed by a return.
#[unsafe(naked)]
unsafe extern "C" fn register_forms() {
    naked_asm!(
        ".p2align 2",
        ".set x87_escape, 0xd8",
        ".rept 8",
        ".set x87_second, 0xc0",
        ".rept 64",
        ".byte x87_escape, x87_second, 0xc3, 0x90",
        ".set x87_second, x87_second + 1",
        ".endr",
        ".set x87_escape, x87_escape + 1",
        ".endr",
    )
}

/// D8 /0 to DF /7 with the memory operand at RDI, each followed by a return.
#[unsafe(naked)]
unsafe extern "C" fn memory_forms() {
    naked_asm!(
        ".p2align 2",
        ".set x87_escape, 0xd8",
        ".rept 8",
        ".set x87_extension, 0x07",
        ".rept 8",
        ".byte x87_escape, x87_extension, 0xc3, 0x90",
        ".set x87_extension, x87_extension + 8",
        ".endr",
        ".set x87_escape, x87_escape + 1",
        ".endr",
    )
}

impl Image {
    fn of(unit: &X87) -> Self {
        let top = usize::from(unit.status >> 11 & 7);
        let mut stack = [0; 8];
        for (i, slot) in stack.iter_mut().enumerate() {
            let (significand, rest) = unit.registers[(top + i) & 7];
            *slot = u128::from(significand) | u128::from(rest) << 64;
        }
        // The guest may have loaded exception flags that are pending by its control word. The host's unit would raise them
        // as its own, and end the process; whoever calls has decided what they mean to the guest.
        let pending = unit.status & !unit.control & EXCEPTIONS != 0;
        Self {
            control: unit.control | if pending { EXCEPTIONS } else { 0 },
            status: unit.status,
            tags: unit.tags,
            reserved: 0,
            opcode: 0,
            instruction: 0,
            data: 0,
            mxcsr: 0x1f80,
            mxcsr_mask: 0,
            stack,
            xmm: [0; 16],
            rest: [0; 6],
        }
    }

    fn into_unit(self, unit: &mut X87) {
        let top = usize::from(self.status >> 11 & 7);
        for (i, slot) in self.stack.iter().enumerate() {
            unit.registers[(top + i) & 7] = (*slot as u64, (*slot >> 64) as u16);
        }
        unit.status = self.status;
        unit.tags = self.tags;
    }
}

/// Executes an instruction on `unit`. `memory` is its memory operand (ignored by those that have none); `flags` are the
/// status flags of RFLAGS, as they are afterwards in the result.
pub(crate) fn execute(routine: Routine, unit: &mut X87, memory: &mut [u8; 16], flags: u64) -> u64 {
    let mut image = Image::of(unit);
    let mut flags = flags & 0x8d5 | 0x202;
    // SAFETY: the image is aligned and valid (the control word and MXCSR have no reserved bit set), the routine is one
    // instruction that touches the x87 unit, flags and sixteen bytes at RDI at most; FNINIT leaves the unit as the ABI wants it.
    unsafe {
        asm!(
            "fxrstor64 [{image}]",
            "push {flags}",
            "popfq",
            "call {routine}",
            "pushfq",
            "pop {flags}",
            "fxsave64 [{image}]",
            "fninit",
            image = in(reg) &raw mut image,
            flags = inout(reg) flags,
            routine = in(reg) routine.0,
            in("rdi") memory.as_mut_ptr(),
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
        );
    }
    image.into_unit(unit);
    flags
}
