//! Which instructions are executed as they are, with other registers and another place for their memory operand.

use iced_x86::{
    Code, CpuidFeature, EncodingKind, FlowControl, Instruction, Mnemonic as M,
    OpCodeOperandKind as K, OpKind, Register,
};

use super::encoding::Encoding;
use crate::cpu::Mode;

/// What the fields of an encoding name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Shape {
    /// The register field names a general register.
    pub(crate) reg: bool,
    /// The register or memory field names a general register.
    pub(crate) rm: bool,
    /// VEX's second source is a general register.
    pub(crate) second: bool,
    /// The opcode names a general register.
    pub(crate) opcode: bool,
    /// The register field, the register or memory field, or the opcode names a byte register.
    pub(crate) reg_byte: bool,
    pub(crate) rm_byte: bool,
    pub(crate) opcode_byte: bool,
    /// There is a ModRM byte.
    pub(crate) modrm: bool,
    /// The memory operand must be aligned to this many bytes.
    pub(crate) align: u8,
    /// What happens to the memory operand.
    pub(crate) memory: Memory,
}

impl Shape {
    /// A byte register is among the operands.
    pub(crate) fn bytes(&self) -> bool {
        self.reg_byte || self.rm_byte || self.opcode_byte
    }
}

/// What happens to a memory operand.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Memory {
    /// There is none.
    #[default]
    None,
    /// It is read.
    Read,
    /// It is written.
    Write,
    /// It is read and written.
    Update,
}

/// True for branches that may have templates.
pub(crate) fn is_branch(i: &Instruction) -> bool {
    matches!(
        i.flow_control(),
        FlowControl::UnconditionalBranch
            | FlowControl::IndirectBranch
            | FlowControl::ConditionalBranch
            | FlowControl::Return
            | FlowControl::Call
            | FlowControl::IndirectCall
    )
}

/// True for PUSH, POP and LEAVE.
pub(crate) fn is_stack(i: &Instruction) -> bool {
    matches!(i.mnemonic(), M::Push | M::Pop | M::Leave)
}

/// True when the instruction may have a template in this mode; its handler is then not one that only raises a fault.
pub(crate) fn is_known(i: &Instruction, mode: Mode) -> bool {
    if is_branch(i) || is_stack(i) || i.mnemonic() == M::Lea || super::native::is_nop(i) {
        return true;
    }
    if super::string::is_string(i) {
        return mode.is_64bit();
    }
    if super::system::is_system(i, mode) {
        return true;
    }
    if is_x87(i) {
        return mode.contains(Mode::X87);
    }
    if general(i.mnemonic()) || super::divide::is_division(i) {
        return i.cpuid_features().iter().all(|f| host_has(*f));
    }
    let enabled = if i.encoding() == EncodingKind::VEX {
        Mode::AVX
    } else {
        Mode::SSE
    };
    vector(i) && mode.contains(enabled) && !has_mmx(i)
}

/// True when the instruction looks at the x87 unit, or changes it: MMX and what saves state as well.
pub(crate) fn touches_x87(i: &Instruction) -> bool {
    use CpuidFeature as F;
    let unit = |f: &CpuidFeature| {
        matches!(
            f,
            F::FPU
                | F::FPU287
                | F::FPU387
                | F::FPU287XL_ONLY
                | F::MMX
                | F::FXSR
                | F::XSAVE
                | F::XSAVEC
                | F::XSAVEOPT
                | F::XSAVES
        )
    };
    i.cpuid_features().iter().any(unit) || has_mmx(i) || i.mnemonic() == M::Wait
}

/// True for the x87 instructions that are executed in the host's unit: those that do not load its control word.
pub(crate) fn is_x87(i: &Instruction) -> bool {
    use CpuidFeature as F;
    let special = matches!(
        i.mnemonic(),
        M::Fldcw
            | M::Fldenv
            | M::Fstcw
            | M::Fstsw
            | M::Fclex
            | M::Finit
            | M::Fnstenv
            | M::Fstenv
            | M::Fnsave
            | M::Fsave
            | M::Frstor
            | M::Fnop
            | M::Feni
            | M::Fdisi
            | M::Fneni
            | M::Fndisi
            | M::Fsetpm
            | M::Fnsetpm
            | M::Frstpm
            | M::Fxsave
            | M::Fxrstor
    );
    let unit = |f: &CpuidFeature| matches!(f, F::FPU | F::FPU287 | F::FPU387 | F::CMOV | F::SSE3);
    let fpu = i
        .cpuid_features()
        .iter()
        .any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387));
    fpu && !special && i.cpuid_features().iter().all(unit) && !i.is_invalid()
}

fn has_mmx(i: &Instruction) -> bool {
    (0..i.op_count()).any(|k| i.op_kind(k) == OpKind::Register && i.op_register(k).is_mm())
}

/// True when the host executes general instructions of this feature.
fn host_has(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    match feature {
        F::BMI1 => std::arch::is_x86_feature_detected!("bmi1"),
        F::BMI2 => std::arch::is_x86_feature_detected!("bmi2"),
        F::LZCNT => std::arch::is_x86_feature_detected!("lzcnt"),
        F::POPCNT => std::arch::is_x86_feature_detected!("popcnt"),
        F::MOVBE => std::arch::is_x86_feature_detected!("movbe"),
        F::ADX => std::arch::is_x86_feature_detected!("adx"),
        F::SSE4_2 => std::arch::is_x86_feature_detected!("sse4.2"),
        F::INTEL8086
        | F::INTEL8086_ONLY
        | F::INTEL186
        | F::INTEL286
        | F::INTEL386
        | F::INTEL486
        | F::X64
        | F::CMOV
        | F::SSE2
        | F::FPU => true,
        _ => false,
    }
}

/// The shape of an instruction that can be executed as it is, or `None`.
pub(crate) fn shape(i: &Instruction, e: &Encoding) -> Option<Shape> {
    let general = general(i.mnemonic());
    let x87 = is_x87(i);
    if !general && !x87 && !vector(i) {
        return None;
    }
    // AMD's processors read 32 bits for these 16.
    if i.code() == Code::Movsxd_r16_rm16 || bit_string(i) {
        return None;
    }
    let mut s = Shape {
        memory: if x87 {
            x87_memory(i)
        } else {
            memory(i, general)
        },
        modrm: x87,
        ..Shape::default()
    };
    let info = i.op_code();
    for k in 0..i.op_count() {
        match info.op_kind(k) {
            K::r8_or_mem => (s.rm, s.rm_byte, s.modrm) = (true, true, true),
            K::r16_or_mem | K::r32_or_mem | K::r64_or_mem | K::r16_rm | K::r32_rm | K::r64_rm => {
                (s.rm, s.modrm) = (true, true);
            }
            K::r8_reg => (s.reg, s.reg_byte, s.modrm) = (true, true, true),
            K::r16_reg | K::r32_reg | K::r64_reg => (s.reg, s.modrm) = (true, true),
            K::r32_vvvv | K::r64_vvvv => s.second = true,
            K::r8_opcode => (s.opcode, s.opcode_byte) = (true, true),
            K::r16_opcode | K::r32_opcode | K::r64_opcode => s.opcode = true,
            K::mem
            | K::xmm_reg
            | K::ymm_reg
            | K::xmm_or_mem
            | K::ymm_or_mem
            | K::xmm_rm
            | K::ymm_rm => s.modrm = true,
            K::xmm_vvvv
            | K::ymm_vvvv
            | K::xmm_is4
            | K::ymm_is4
            | K::imm8
            | K::imm8_const_1
            | K::imm8sex16
            | K::imm8sex32
            | K::imm8sex64
            | K::imm16
            | K::imm32
            | K::imm32sex64
            | K::imm64
            | K::al
            | K::cl
            | K::ax
            | K::eax
            | K::rax => {}
            K::st0 | K::sti_opcode if x87 => {}
            // The implicit operand of the blends that are older than VEX.
            _ if i.op_kind(k) == OpKind::Register && i.op_register(k) == Register::XMM0 => {}
            _ => return None,
        }
    }
    s.align = alignment(i, e);
    Some(s)
}

/// True when the last byte names a vector register.
pub(crate) fn names_register_last(i: &Instruction) -> bool {
    let info = i.op_code();
    (0..i.op_count()).any(|k| matches!(info.op_kind(k), K::xmm_is4 | K::ymm_is4))
}

/// Bit instructions with the bit's number in a register reach beyond their memory operand.
fn bit_string(i: &Instruction) -> bool {
    matches!(i.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc)
        && i.op0_kind() == OpKind::Memory
        && i.op1_kind() == OpKind::Register
}

fn general(m: M) -> bool {
    matches!(
        m,
        M::Adc
            | M::Adcx
            | M::Add
            | M::Adox
            | M::And
            | M::Andn
            | M::Bextr
            | M::Blsi
            | M::Blsmsk
            | M::Blsr
            | M::Bsf
            | M::Bsr
            | M::Bswap
            | M::Bt
            | M::Btc
            | M::Btr
            | M::Bts
            | M::Bzhi
            | M::Cbw
            | M::Cdq
            | M::Cdqe
            | M::Clc
            | M::Cmc
            | M::Cmova
            | M::Cmovae
            | M::Cmovb
            | M::Cmovbe
            | M::Cmove
            | M::Cmovg
            | M::Cmovge
            | M::Cmovl
            | M::Cmovle
            | M::Cmovne
            | M::Cmovno
            | M::Cmovnp
            | M::Cmovns
            | M::Cmovo
            | M::Cmovp
            | M::Cmovs
            | M::Cmp
            | M::Cmpxchg
            | M::Cqo
            | M::Crc32
            | M::Cwd
            | M::Cwde
            | M::Dec
            | M::Imul
            | M::Inc
            | M::Lzcnt
            | M::Mov
            | M::Movbe
            | M::Movnti
            | M::Movsx
            | M::Movsxd
            | M::Movzx
            | M::Mul
            | M::Mulx
            | M::Neg
            | M::Not
            | M::Or
            | M::Pdep
            | M::Pext
            | M::Popcnt
            | M::Rcl
            | M::Rcr
            | M::Rol
            | M::Ror
            | M::Rorx
            | M::Sal
            | M::Sar
            | M::Sarx
            | M::Sbb
            | M::Seta
            | M::Setae
            | M::Setb
            | M::Setbe
            | M::Sete
            | M::Setg
            | M::Setge
            | M::Setl
            | M::Setle
            | M::Setne
            | M::Setno
            | M::Setnp
            | M::Setns
            | M::Seto
            | M::Setp
            | M::Sets
            | M::Shl
            | M::Shld
            | M::Shlx
            | M::Shr
            | M::Shrd
            | M::Shrx
            | M::Stc
            | M::Sub
            | M::Test
            | M::Tzcnt
            | M::Xadd
            | M::Xchg
            | M::Xor
    )
}

/// SSE to AVX2 as the host has them, without what is special.
fn vector(i: &Instruction) -> bool {
    use CpuidFeature as F;
    if !matches!(i.encoding(), EncodingKind::Legacy | EncodingKind::VEX) {
        return false;
    }
    let known = i.cpuid_features().iter().all(|f| {
        matches!(
            f,
            F::SSE
                | F::SSE2
                | F::SSE3
                | F::SSSE3
                | F::SSE4_1
                | F::SSE4_2
                | F::AES
                | F::PCLMULQDQ
                | F::SHA
                | F::AVX
                | F::AVX2
                | F::FMA
                | F::F16C
        )
    });
    let special = matches!(
        i.mnemonic(),
        M::Ldmxcsr
            | M::Vldmxcsr
            | M::Stmxcsr
            | M::Vstmxcsr
            | M::Maskmovdqu
            | M::Vmaskmovdqu
            | M::Vmaskmovps
            | M::Vmaskmovpd
            | M::Vpmaskmovd
            | M::Vpmaskmovq
            | M::Lfence
            | M::Mfence
            | M::Sfence
            | M::Clflush
            | M::Monitor
            | M::Mwait
            | M::Pause
    );
    known && !special && !i.cpuid_features().is_empty()
}

fn memory(i: &Instruction, general: bool) -> Memory {
    let Some(k) = (0..i.op_count()).find(|k| i.op_kind(*k) == OpKind::Memory) else {
        return Memory::None;
    };
    if k != 0 {
        return match i.mnemonic() {
            M::Xchg | M::Xadd => Memory::Update,
            _ => Memory::Read,
        };
    }
    let only_read = matches!(
        i.mnemonic(),
        M::Cmp | M::Test | M::Bt | M::Mul | M::Imul | M::Div | M::Idiv
    );
    let only_written = matches!(i.mnemonic(), M::Mov | M::Movbe | M::Movnti) || is_setcc(i.code());
    match (general, only_read, only_written) {
        (true, true, _) => Memory::Read,
        (true, _, false) => Memory::Update,
        _ => Memory::Write,
    }
}

fn x87_memory(i: &Instruction) -> Memory {
    if !(0..i.op_count()).any(|k| i.op_kind(k) == OpKind::Memory) {
        return Memory::None;
    }
    match i.mnemonic() {
        M::Fst | M::Fstp | M::Fist | M::Fistp | M::Fisttp | M::Fbstp | M::Fnstcw | M::Fnstsw => {
            Memory::Write
        }
        _ => Memory::Read,
    }
}

fn is_setcc(code: Code) -> bool {
    matches!(
        code,
        Code::Seto_rm8
            | Code::Setno_rm8
            | Code::Setb_rm8
            | Code::Setae_rm8
            | Code::Sete_rm8
            | Code::Setne_rm8
            | Code::Setbe_rm8
            | Code::Seta_rm8
            | Code::Sets_rm8
            | Code::Setns_rm8
            | Code::Setp_rm8
            | Code::Setnp_rm8
            | Code::Setl_rm8
            | Code::Setge_rm8
            | Code::Setle_rm8
            | Code::Setg_rm8
    )
}

/// What the memory operand must be aligned to.
fn alignment(i: &Instruction, e: &Encoding) -> u8 {
    let size = i.memory_size().size();
    let always = matches!(
        i.mnemonic(),
        M::Movaps
            | M::Movapd
            | M::Movdqa
            | M::Movntdq
            | M::Movntps
            | M::Movntpd
            | M::Movntdqa
            | M::Vmovaps
            | M::Vmovapd
            | M::Vmovdqa
            | M::Vmovntdq
            | M::Vmovntps
            | M::Vmovntpd
            | M::Vmovntdqa
    );
    let never = matches!(
        i.mnemonic(),
        M::Movups
            | M::Movupd
            | M::Movdqu
            | M::Lddqu
            | M::Pcmpestri
            | M::Pcmpestrm
            | M::Pcmpistri
            | M::Pcmpistrm
    );
    if size >= 16 && (always || e.vex.is_none() && !never) {
        size as u8
    } else {
        0
    }
}
