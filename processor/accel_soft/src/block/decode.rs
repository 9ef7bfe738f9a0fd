//! From bytes to operations.

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, OpKind, Register};

use crate::cpu::{
    BLOCK_RIP, Cpu, Ea, Exception, FLAT, FLAT_STACK, Mode, Op, ZERO, gpr, last_instruction,
};
use crate::exec;
use crate::simd::{self, Unit};
use crate::{system, x87};
use x86_defs::exception;
use x86_defs::state::{DS, ES, SS};

/// Most instructions in a block.
pub(crate) const MAX_INSTRUCTIONS: usize = 48;
/// Most bytes that a block is decoded from.
pub(crate) const MAX_BYTES: usize = 512;

/// Slot that always holds [`FAR`].
pub(crate) const FAR_SLOT: usize = 18;
/// Taken off RIP-relative displacements that do not fit 32 bits when they are made relative to the block's start.
pub(crate) const FAR: i64 = 4096;

/// What decoding gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Decoded {
    /// Instructions.
    pub(crate) count: usize,
    /// Bytes.
    pub(crate) len: usize,
    /// The first instruction goes on past the end of the bytes; nothing was decoded.
    pub(crate) cut: bool,
}

/// Decodes a block from bytes, of which there may be more in the next page when `more`. Appends the operations and one that
/// ends the block.
pub(crate) fn decode(bytes: &[u8], more: bool, mode: Mode, ops: &mut Vec<Op>) -> Decoded {
    let mut decoder = Decoder::with_ip(mode.bitness(), bytes, 0, decoder_options(mode));
    let most = if mode.contains(Mode::STEP) {
        1
    } else {
        MAX_INSTRUCTIONS
    };
    let (mut count, mut len) = (0, 0);
    let mut instruction = Instruction::default();
    while count < most && decoder.can_decode() {
        decoder.decode_out(&mut instruction);
        let cut = decoder.last_error() == iced_x86::DecoderError::NoMoreBytes;
        if cut && more {
            if count == 0 {
                return Decoded {
                    count: 0,
                    len: 0,
                    cut: true,
                };
            }
            break;
        }
        let (op, ends) = operation(&instruction, decoder.position(), mode);
        ops.push(op);
        count += 1;
        len = decoder.position();
        if ends {
            break;
        }
    }
    ops.push(terminator(len));
    Decoded {
        count,
        len,
        cut: false,
    }
}

/// How instructions are decoded in a mode.
pub(crate) fn decoder_options(mode: Mode) -> u32 {
    // What is reserved for hints (MPX, CET, CLDEMOTE and all that may come) does nothing here.
    let mut options = DecoderOptions::FORCE_RESERVED_NOP;
    if mode.contains(Mode::AMD) {
        options |= DecoderOptions::AMD;
    }
    options
}

fn terminator(len: usize) -> Op {
    Op {
        handler: exec::end_of_block,
        imm: 0,
        disp: 0,
        a: 0,
        b: 0,
        c: 0,
        base: gpr(ZERO),
        index: gpr(ZERO),
        scale: 0,
        seg: FLAT,
        ea_len: Ea::None as u8,
        next: len as u16,
        code: 0,
    }
}

/// The operation of an instruction, and whether it ends the block.
fn operation(i: &Instruction, next: usize, mode: Mode) -> (Op, bool) {
    let mut op = terminator(next);
    op.code = i.code() as u16;
    op.ea_len = Ea::None as u8 | (i.len() as u8) << 4;
    if i.is_invalid() || lock_is_wrong(i) || no_prefetch(i, mode) {
        // An instruction that is too long or cut off by the end of memory has no length of its own.
        op.handler = exec::undefined().handler;
        return (op, true);
    }
    registers(i, &mut op);
    immediates(i, &mut op);
    memory(i, &mut op, mode);
    if let Some(selected) = exec::select(i, &mut op, mode) {
        op.handler = selected.handler;
        return (op, selected.ends);
    }
    let vector = simd::lookup(i, &mut op).or_else(|| x87::lookup(i, &mut op));
    if let Some((handler, unit)) = vector {
        op.handler = match unavailable(unit, mode) {
            None => handler,
            Some(fault) => fault,
        };
        return (op, false);
    }
    if let Some(handler) = system::lookup(i, &op) {
        op.handler = handler;
        return (op, true);
    }
    op.handler = exec::undefined().handler;
    (op, true)
}

/// LOCK is allowed on few instructions and only with a memory destination; iced checks most of it.
fn lock_is_wrong(i: &Instruction) -> bool {
    i.has_lock_prefix() && i.op0_kind() != OpKind::Memory
}

/// AMD's PREFETCH and PREFETCHW have a memory operand only (APM volume 3); on Intel's processors these bytes are a hint.
fn no_prefetch(i: &Instruction, mode: Mode) -> bool {
    let reserved = matches!(
        i.code(),
        Code::Reservednop_rm16_r16_0F0D
            | Code::Reservednop_rm32_r32_0F0D
            | Code::Reservednop_rm64_r64_0F0D
    );
    reserved && mode.contains(Mode::AMD) && i.op0_kind() == OpKind::Register
}

/// The handler that raises what an instruction of a unit raises that is not to be used.
fn unavailable(unit: Unit, mode: Mode) -> Option<crate::cpu::Handler> {
    let (there, handler): (Mode, crate::cpu::Handler) = match unit {
        Unit::Own => return None,
        Unit::X87 => (Mode::X87, last_instruction(|cpu, _| Err(cpu.nm()))),
        Unit::Mmx => (Mode::MMX, last_instruction(|cpu, _| Err(cpu.no_sse(false)))),
        Unit::Sse => (Mode::SSE, last_instruction(|cpu, _| Err(cpu.no_sse(true)))),
        Unit::Avx => (Mode::AVX, last_instruction(|cpu, _| Err(cpu.no_avx()))),
    };
    (!mode.contains(there)).then_some(handler)
}

impl Cpu {
    /// #UD or #NM of an MMX or SSE instruction.
    fn no_sse(&mut self, sse: bool) -> crate::cpu::Fault {
        use x86_defs::control::{Cr0, Cr4};
        if self.cr0.contains(Cr0::EM) || (sse && !self.cr4.contains(Cr4::OSFXSR)) {
            return self.ud();
        }
        self.nm()
    }

    /// #UD or #NM of an AVX instruction.
    fn no_avx(&mut self) -> crate::cpu::Fault {
        use x86_defs::control::{Cr4, Xcr0};
        let enabled = self.mode.contains(Mode::PROTECTED)
            && self.cr4.contains(Cr4::OSXSAVE)
            && self.xcr0.contains(Xcr0::SSE | Xcr0::AVX);
        if !enabled {
            return self.ud();
        }
        self.raise(Exception::Plain(exception::NM))
    }
}

/// The byte offset of a general register in the register file, or the number of any other.
fn place(register: Register) -> u8 {
    match register {
        Register::AH | Register::CH | Register::DH | Register::BH => {
            gpr(register as usize - Register::AH as usize) + 1
        }
        // The numbers of byte registers are other than those of the registers that they are part of.
        r if r.is_gpr() => gpr(r.full_register().number()),
        r => r.number() as u8,
    }
}

fn registers(i: &Instruction, op: &mut Op) {
    let mut n = 0;
    for operand in 0..i.op_count() {
        if i.op_kind(operand) != OpKind::Register {
            continue;
        }
        let at = place(i.op_register(operand));
        match n {
            0 => op.a = at,
            1 => op.b = at,
            2 => op.c = at,
            _ => op.imm = u64::from(at),
        }
        n += 1;
    }
}

fn immediates(i: &Instruction, op: &mut Op) {
    for operand in 0..i.op_count() {
        match i.op_kind(operand) {
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                op.imm = i.near_branch_target();
            }
            OpKind::FarBranch16 => {
                op.imm = u64::from(i.far_branch16()) | u64::from(i.far_branch_selector()) << 32;
            }
            OpKind::FarBranch32 => {
                op.imm = u64::from(i.far_branch32()) | u64::from(i.far_branch_selector()) << 32;
            }
            OpKind::Immediate8_2nd => op.imm |= u64::from(i.immediate8_2nd()) << 32,
            kind if (OpKind::Immediate8..OpKind::MemorySegSI).contains(&kind) => {
                op.imm = i.immediate(operand);
            }
            _ => {}
        }
    }
}

/// Bits of the address of a memory operand.
fn address_size(i: &Instruction, mode: Mode) -> u32 {
    let of = |r: Register| match r.size() {
        2 => 16,
        4 => 32,
        8 => 64,
        _ => 0,
    };
    if i.memory_base() != Register::None {
        return of(i.memory_base());
    }
    if i.memory_index() != Register::None && i.memory_index().is_gpr() {
        return of(i.memory_index());
    }
    match i.memory_displ_size() {
        2 => 16,
        4 => 32,
        8 => 64,
        _ => mode.bitness(),
    }
}

/// The kind of memory operand and its segment, for an implicit operand (string instructions) or an explicit one.
fn segment_and_kind(i: &Instruction, bits: u32, segment: Register, mode: Mode) -> (u8, Ea) {
    let number = segment.number();
    if mode.is_64bit() {
        let kind = if bits == 64 { Ea::Flat64 } else { Ea::Long32 };
        let seg = match segment {
            Register::FS | Register::GS => number as u8,
            // Prefixes that name another segment do not count: the base register alone makes a stack access.
            _ if matches!(
                i.memory_base(),
                Register::RSP | Register::RBP | Register::ESP | Register::EBP
            ) =>
            {
                FLAT_STACK
            }
            _ => FLAT,
        };
        return (seg, kind);
    }
    let kind = match bits {
        16 => Ea::Seg16,
        _ if mode.contains(Mode::FLAT) && [ES, SS, DS].contains(&number) => Ea::Flat32,
        _ => Ea::Seg32,
    };
    (number as u8, kind)
}

fn memory(i: &Instruction, op: &mut Op, mode: Mode) {
    for operand in 0..i.op_count() {
        let (bits, string) = match i.op_kind(operand) {
            OpKind::Memory => (address_size(i, mode), false),
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => (16, true),
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => (32, true),
            OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => (64, true),
            _ => continue,
        };
        let es = matches!(
            i.op_kind(operand),
            OpKind::MemoryESDI | OpKind::MemoryESEDI | OpKind::MemoryESRDI
        );
        let segment = if es { Register::ES } else { i.memory_segment() };
        let (seg, kind) = segment_and_kind(i, bits, segment, mode);
        // Of the two operands of MOVS and CMPS the one that is not in ES has the segment to remember.
        if !(es && i.op_count() > 1 && operand == 0 && is_two_sided(i)) {
            op.seg = seg;
        }
        if es && operand == 1 && is_two_sided(i) {
            op.seg = segment_and_kind(i, bits, i.memory_segment(), mode).0;
        }
        // A string instruction in flat segments may still name another one.
        let both = string && kind == Ea::Flat32 && op.seg >= 4;
        let kind = if both { Ea::Seg32 } else { kind };
        op.ea_len = op.ea_len & 0xf0 | kind as u8;
        if !string {
            address(i, op);
        }
    }
}

fn is_two_sided(i: &Instruction) -> bool {
    use iced_x86::Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Movsb | M::Movsw | M::Movsd | M::Movsq | M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq
    )
}

fn address(i: &Instruction, op: &mut Op) {
    let displacement = i.memory_displacement64();
    op.scale = i.memory_index_scale().trailing_zeros() as u8;
    op.index = match i.memory_index() {
        Register::None => gpr(ZERO),
        r if r.is_gpr() => place(r),
        vector => {
            // VSIB: the index is a vector register, named by the third register operand.
            op.c = vector.number() as u8;
            gpr(ZERO)
        }
    };
    op.base = match i.memory_base() {
        Register::None => gpr(ZERO),
        Register::RIP | Register::EIP => gpr(BLOCK_RIP),
        r => place(r),
    };
    // Displacements are 32 bits, sign-extended, but for those relative to RIP, which are from the block's start here.
    if op.base == gpr(BLOCK_RIP) && op.index == gpr(ZERO) {
        let relative = displacement as i64;
        if let Ok(fits) = i32::try_from(relative) {
            op.disp = fits;
        } else if let Ok(fits) = i32::try_from(relative - FAR) {
            op.disp = fits;
            op.index = gpr(FAR_SLOT);
        } else {
            // EIP-relative: 32 bits are what counts.
            op.disp = relative as i32;
        }
    } else {
        op.disp = displacement as i32;
    }
}
