//! Predecoded operations and how they are called.

use super::{Cpu, RegisterFile, Result};

/// What executes an operation. It ends by calling the handler of the operation that follows (the call is in tail
/// position; blocks are short, so that the stack is bounded even where the compiler makes it a real call) or, in the last
/// operation of a block and on a fault, by returning.
pub(crate) type Handler = fn(&mut Cpu, *const Op) -> Flow;

/// How a block ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Flow {
    /// `Cpu::rip` says where to go on.
    Next,
    /// The same, but the block was left early, after `Cpu::left_at`.
    Left,
    /// `Cpu::exception` is to be delivered; `Cpu::fault_op` raised it.
    Fault,
}

/// How the effective address of a memory operand is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Ea {
    /// 64-bit address; segment bases are added ([`Op::seg`] names the zero base where there is none), nothing is checked.
    Flat64 = 0,
    /// 32-bit address in a segment without base and limit: wraps at 4 GiB.
    Flat32 = 1,
    /// 32-bit address in 64-bit mode: wraps at 4 GiB, then the segment base is added.
    Long32 = 2,
    /// 32-bit address in a segment with base, limit and type to check.
    Seg32 = 3,
    /// 16-bit address, likewise.
    Seg16 = 4,
    /// No memory operand.
    None = 5,
}

/// Index into `Cpu::bases` of the base that is always zero, for operands that default to DS, ES or CS in 64-bit mode.
pub(crate) const FLAT: u8 = 6;
/// The same for operands that default to SS: a non-canonical address raises #SS, not #GP.
pub(crate) const FLAT_STACK: u8 = 7;

/// One decoded instruction. 32 bytes.
#[repr(C)]
pub(crate) struct Op {
    pub(crate) handler: Handler,
    /// The immediate, sign- or zero-extended as the instruction uses it. Far pointers: offset in bits 0 to 31, selector in
    /// 32 to 47. ENTER, EXTRQ, INSERTQ: the second immediate in bits 32 to 39. MOV moffs: the 64-bit offset. Near branches:
    /// the target as a distance from the block's first instruction.
    pub(crate) imm: u64,
    /// Displacement. For RIP-relative operands, already relative to the block's first instruction.
    pub(crate) disp: i32,
    /// First register operand: byte offset into `Cpu::regs` of a general register; the register's number for all others.
    pub(crate) a: u8,
    /// Second register operand, not counting a memory operand.
    pub(crate) b: u8,
    /// Third register operand.
    pub(crate) c: u8,
    /// Byte offset of the base register.
    pub(crate) base: u8,
    /// Byte offset of the index register.
    pub(crate) index: u8,
    /// Shift of the index.
    pub(crate) scale: u8,
    /// Index into `Cpu::bases`: segment number or [`FLAT`] or [`FLAT_STACK`].
    pub(crate) seg: u8,
    /// How the address is made (bits 0 to 3) and the instruction's length (bits 4 to 7).
    pub(crate) ea_len: u8,
    /// Distance from the block's first instruction to the following instruction.
    pub(crate) next: u16,
    /// What it is, as `Code as u16`.
    pub(crate) code: u16,
}

const _: () = assert!(size_of::<Op>() == 32);

impl Op {
    /// How the effective address is made.
    #[inline(always)]
    pub(crate) fn ea(&self) -> Ea {
        match self.ea_len & 15 {
            0 => Ea::Flat64,
            1 => Ea::Flat32,
            2 => Ea::Long32,
            3 => Ea::Seg32,
            4 => Ea::Seg16,
            _ => Ea::None,
        }
    }

    /// True when the instruction has a memory operand.
    #[inline(always)]
    pub(crate) fn has_memory(&self) -> bool {
        self.ea_len & 15 < Ea::None as u8
    }

    /// Bytes of the instruction.
    #[inline(always)]
    pub(crate) fn len(&self) -> u64 {
        u64::from(self.ea_len >> 4)
    }
}

impl Cpu {
    /// RIP of the instruction.
    #[inline(always)]
    pub(crate) fn rip_of(&self, op: &Op) -> u64 {
        self.next_rip(op).wrapping_sub(op.len()) & self.rip_mask
    }

    /// RIP of the instruction that follows.
    #[inline(always)]
    pub(crate) fn next_rip(&self, op: &Op) -> u64 {
        self.regs[super::registers::BLOCK_RIP].wrapping_add(u64::from(op.next)) & self.rip_mask
    }

    /// First register operand, a general register, as an instruction of the value's operand size reads it.
    #[inline(always)]
    pub(crate) fn reg_a<T: super::Value>(&self, op: &Op) -> T {
        self.regs.get(op.a)
    }

    /// Second register operand.
    #[inline(always)]
    pub(crate) fn reg_b<T: super::Value>(&self, op: &Op) -> T {
        self.regs.get(op.b)
    }

    /// Writes the first register operand ([`RegisterFile::set`]).
    #[inline(always)]
    pub(crate) fn set_a<T: super::Value>(&mut self, op: &Op, value: T) {
        self.regs.set(op.a, value);
    }
}

/// The handler for an instruction that ends in the instruction after it. `f` is called with `Cpu::rip` *not* up to date
/// ([`Cpu::rip_of`], [`Cpu::next_rip`]), and must leave all architectural state unchanged when it fails, but for what the
/// architecture lets a failing instruction change.
pub(crate) fn instruction<F>(_: F) -> Handler
where
    F: Fn(&mut Cpu, &Op) -> Result<()> + Copy,
{
    const {
        assert!(
            size_of::<F>() == 0,
            "a function item or a closure without captures"
        )
    };
    fn call<F: Fn(&mut Cpu, &Op) -> Result<()> + Copy>(cpu: &mut Cpu, op: *const Op) -> Flow {
        // SAFETY: F has no size, is Copy and a value of it was given to `instruction`.
        let f = unsafe { std::ptr::NonNull::<F>::dangling().read() };
        // SAFETY: handlers are called with an operation of a live block, which ends in one that does not go on.
        let this = unsafe { &*op };
        if f(cpu, this).is_err() {
            return fault(cpu, op);
        }
        if cpu.leave_block {
            return leave(cpu, op);
        }
        // SAFETY: only the last operation of a block has a handler that does not go on to the next.
        unsafe { ((*op.add(1)).handler)(cpu, op.add(1)) }
    }
    call::<F>
}

/// The handler for an instruction that ends its block because it may change RIP or what decoding rests on. `Cpu::rip` is
/// the following instruction's when `f` is called; `f` may change it. On a fault it is set back.
pub(crate) fn last_instruction<F>(_: F) -> Handler
where
    F: Fn(&mut Cpu, &Op) -> Result<()> + Copy,
{
    const {
        assert!(
            size_of::<F>() == 0,
            "a function item or a closure without captures"
        )
    };
    fn call<F: Fn(&mut Cpu, &Op) -> Result<()> + Copy>(cpu: &mut Cpu, op: *const Op) -> Flow {
        // SAFETY: as in `instruction`.
        let f = unsafe { std::ptr::NonNull::<F>::dangling().read() };
        // SAFETY: as in `instruction`.
        let this = unsafe { &*op };
        cpu.rip = cpu.next_rip(this);
        if f(cpu, this).is_err() {
            return fault(cpu, op);
        }
        Flow::Next
    }
    call::<F>
}

/// Ends the block with the exception that `cpu` holds, raised by `op`.
#[cold]
#[inline(never)]
pub(crate) fn fault(cpu: &mut Cpu, op: *const Op) -> Flow {
    cpu.fault_op = op;
    Flow::Fault
}

/// Ends the block after `op`, because the rest of it may be stale.
#[cold]
#[inline(never)]
pub(crate) fn leave(cpu: &mut Cpu, op: *const Op) -> Flow {
    cpu.leave_block = false;
    // SAFETY: `op` is the operation that was just executed.
    cpu.rip = cpu.next_rip(unsafe { &*op });
    cpu.left_at = op;
    Flow::Left
}

/// Byte offset of general register `number` (0 to 15) for [`Op::a`] and its kind.
pub(crate) const fn gpr(number: usize) -> u8 {
    RegisterFile::offset(number)
}
