//! Calls of host stubs: short machine-code routines that hold one SIMD instruction each.
//!
//! A stub takes its operands in the host's XMM0 (first source and destination), XMM1 (second source) and XMM2 (third
//! source), or the YMM or MM registers of these numbers, and RAX; it leaves its result in register 0 or RAX and may destroy
//! registers 0 to 3 and the flags. Because the host executes the very operation, NaN payloads, denormals, rounding and exception
//! flags are the processor's own.
#![allow(unsafe_code)] // Inline assembly is the only way to execute a chosen instruction under a chosen MXCSR.

use std::arch::{asm, naked_asm};

/// MXCSR as the host's compiled code expects it: all exceptions masked, round to nearest.
const HOST_MXCSR: u32 = 0x1f80;
/// MXCSR exception flags IE, DE, ZE, OE, UE, PE (SDM volume 1, section 10.2.3).
pub(crate) const MXCSR_FLAGS: u32 = 0x3f;
/// MXCSR exception masks, at [`MXCSR_FLAGS`] shifted left by 7.
pub(crate) const MXCSR_MASKS: u32 = 0x1f80;
/// Flush to zero.
pub(crate) const MXCSR_FZ: u32 = 1 << 15;
/// Underflow mask.
pub(crate) const MXCSR_UM: u32 = 1 << 11;

/// The address of a stub made by [`stub!`] or an entry of a table made by [`imm_stubs!`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stub(usize);

/// Bytes from one entry of an immediate table to the next.
const IMM_STRIDE: usize = 8;

impl Stub {
    /// A routine that follows this module's convention.
    ///
    /// # Safety
    /// The routine must destroy nothing but registers 0 to 3 of the vector file, RAX and flags, and touch no memory.
    pub(crate) const unsafe fn new(address: usize) -> Self {
        Self(address)
    }

    /// The address of its first instruction.
    pub(crate) fn address(self) -> usize {
        self.0
    }

    /// The entry for an immediate in a table of 256.
    pub(crate) fn with_imm(self, imm: u8) -> Self {
        Self(self.0 + usize::from(imm) * IMM_STRIDE)
    }
}

/// A stub of the given instructions.
macro_rules! stub {
    ($($line:expr),+ $(,)?) => {{
        #[unsafe(naked)]
        unsafe extern "C" fn routine() {
            core::arch::naked_asm!($($line,)+ "ret")
        }
        // SAFETY: the lines use vector registers 0 to 3, RAX and flags alone.
        unsafe { $crate::simd::call::Stub::new(routine as *const () as usize) }
    }};
}

/// A table of 256 stubs, one for each value of the immediate that ends the instruction whose other bytes are given.
macro_rules! imm_stubs {
    ($bytes:literal) => {{
        #[unsafe(naked)]
        unsafe extern "C" fn table() {
            core::arch::naked_asm!(
                ".p2align 3",
                ".set imm_stub_value, 0",
                ".rept 256",
                concat!(".byte ", $bytes, ", imm_stub_value"),
                "ret",
                ".p2align 3",
                ".set imm_stub_value, imm_stub_value + 1",
                ".endr",
            )
        }
        // SAFETY: each entry is one instruction on vector registers 0 and 1 and a return.
        unsafe { $crate::simd::call::Stub::new(table as *const () as usize) }
    }};
}

pub(crate) use {imm_stubs, stub};

/// A 256-bit register or operand: lower half, which is the XMM register, and upper half.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C, align(32))]
pub(crate) struct Vector(pub(crate) [u128; 2]);

impl From<u128> for Vector {
    fn from(low: u128) -> Self {
        Self([low, 0])
    }
}

/// Operands of a stub: registers 0, 1, 2 and RAX on entry; register 0 and RAX on return.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(32))]
pub(crate) struct Operands {
    /// Register 0.
    pub(crate) a: Vector,
    /// Register 1.
    pub(crate) b: Vector,
    /// Register 2.
    pub(crate) c: Vector,
    /// RAX.
    pub(crate) rax: u64,
}

/// Calls a stub on XMM registers. The upper half of `a` is left as it is.
#[inline]
pub(crate) fn call_xmm(stub: Stub, operands: &mut Operands) {
    // SAFETY: a stub keeps to the registers declared here; the operands are live and 16-byte aligned.
    unsafe {
        asm!(
            "movdqa xmm0, [rdi]",
            "movdqa xmm1, [rdi + 32]",
            "movdqa xmm2, [rdi + 64]",
            "mov rax, [rdi + 96]",
            "call {stub}",
            "movdqa [rdi], xmm0",
            "mov [rdi + 96], rax",
            stub = in(reg) stub.0,
            in("rdi") operands,
            out("rax") _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
        );
    }
}

/// Calls a stub on YMM registers. The host must have AVX.
#[inline]
pub(crate) fn call_ymm(stub: Stub, operands: &mut Operands) {
    // SAFETY: as in `call_xmm`; operands are 32-byte aligned, and the upper halves are clean again on return.
    unsafe {
        asm!(
            "vmovdqa ymm0, [rdi]",
            "vmovdqa ymm1, [rdi + 32]",
            "vmovdqa ymm2, [rdi + 64]",
            "mov rax, [rdi + 96]",
            "call {stub}",
            "vmovdqa [rdi], ymm0",
            "mov [rdi + 96], rax",
            "vzeroupper",
            stub = in(reg) stub.0,
            in("rdi") operands,
            out("rax") _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
        );
    }
}

/// Calls a stub on MM registers: the lowest quadwords of the operands.
#[inline]
pub(crate) fn call_mm(stub: Stub, operands: &mut Operands) {
    // SAFETY: as in `call_xmm`; the x87 register stack is empty before, by the ABI, and after, by EMMS.
    unsafe {
        asm!(
            "movq mm0, [rdi]",
            "movq mm1, [rdi + 32]",
            "mov rax, [rdi + 96]",
            "call {stub}",
            "movq [rdi], mm0",
            "mov [rdi + 96], rax",
            "emms",
            stub = in(reg) stub.0,
            in("rdi") operands,
            out("rax") _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("mm0") _, out("mm1") _, out("mm2") _, out("mm3") _, out("mm4") _, out("mm5") _, out("mm6") _, out("mm7") _,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _, out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
        );
    }
}

/// Calls a stub under a guest's MXCSR with all exceptions masked; returns the exception flags that it raised.
#[inline]
pub(crate) fn call_float(stub: Stub, wide: bool, mxcsr: u32, operands: &mut Operands) -> u32 {
    let mut control = (mxcsr | MXCSR_MASKS) & !MXCSR_FLAGS;
    // With the underflow exception unmasked the processor ignores flush-to-zero (SDM volume 1, section 10.2.3.3).
    if mxcsr & MXCSR_UM == 0 {
        control &= !MXCSR_FZ;
    }
    // Between the two loads of MXCSR there must be no compiled arithmetic: everything happens in one routine.
    let routine = if wide {
        float_ymm as *const () as usize
    } else {
        float_xmm as *const () as usize
    };
    // SAFETY: the routines keep to the convention written at their definition.
    unsafe {
        asm!(
            "call {routine}",
            routine = in(reg) routine,
            in("rdi") operands,
            in("rsi") &raw mut control,
            in("rdx") &HOST_MXCSR,
            in("rcx") stub.0,
            out("rax") _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
        );
    }
    control & MXCSR_FLAGS
}

/// RDI: operands, RSI: MXCSR in and out, RDX: the host's MXCSR, RCX: the stub. Destroys RAX and XMM0 to XMM3.
#[unsafe(naked)]
unsafe extern "C" fn float_xmm() {
    naked_asm!(
        "movdqa xmm0, [rdi]",
        "movdqa xmm1, [rdi + 32]",
        "movdqa xmm2, [rdi + 64]",
        "mov rax, [rdi + 96]",
        "ldmxcsr [rsi]",
        "call rcx",
        "stmxcsr [rsi]",
        "ldmxcsr [rdx]",
        "movdqa [rdi], xmm0",
        "mov [rdi + 96], rax",
        "ret",
    )
}

/// As [`float_xmm`], on YMM registers.
#[unsafe(naked)]
unsafe extern "C" fn float_ymm() {
    naked_asm!(
        "vmovdqa ymm0, [rdi]",
        "vmovdqa ymm1, [rdi + 32]",
        "vmovdqa ymm2, [rdi + 64]",
        "mov rax, [rdi + 96]",
        "ldmxcsr [rsi]",
        "call rcx",
        "stmxcsr [rsi]",
        "ldmxcsr [rdx]",
        "vmovdqa [rdi], ymm0",
        "mov [rdi + 96], rax",
        "vzeroupper",
        "ret",
    )
}
