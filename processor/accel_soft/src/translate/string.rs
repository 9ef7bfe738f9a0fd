//! REP MOVS and REP STOS inside a page, as compilers and kernels use them to copy and to fill: executed by the host's.
//!
//! Whatever reaches another page, is longer than a page, or goes downwards is left to the interpreter, as is what has no
//! repeat prefix.

use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

use super::branch::usual;
use super::code::{At, Compiler, FLAG, Kept, Via};
use super::cold::{Cold, Target};
use super::emit::{Label, R14, R15, RCX, RDI, RSI, Reg, Rm, cc, hot, mem, op, op64};
use super::hot::at;
use crate::cpu::Mode;
use crate::mmu::way;

/// The direction flag in the second byte of RFLAGS.
const DF: u8 = 4;

/// Bytes of an element of a REP MOVS or REP STOS with 64-bit addresses in segments without a base; `None`: it is not one.
fn element(i: &Instruction) -> Option<u8> {
    let moves = i.op_count() == 2 && i.op0_kind() == OpKind::MemoryESRDI;
    let (size, from) = match i.mnemonic() {
        M::Movsb => (1, OpKind::MemorySegRSI),
        M::Movsd => (4, OpKind::MemorySegRSI),
        M::Movsq => (8, OpKind::MemorySegRSI),
        M::Stosb => (1, OpKind::Register),
        M::Stosd => (4, OpKind::Register),
        M::Stosq => (8, OpKind::Register),
        _ => return None,
    };
    let plain = i.segment_prefix() == Register::None && i.has_rep_prefix();
    (moves && i.op1_kind() == from && plain).then_some(size)
}

/// True for what [`Compiler::string`] can do.
pub(crate) fn is_string(i: &Instruction) -> bool {
    element(i).is_some()
}

impl Compiler<'_> {
    /// The instruction, which ends its block. False: it can't be done here.
    pub(crate) fn string(&mut self, at: At) -> bool {
        let Some(size) = element(at.i) else {
            return false;
        };
        let copies = at.i.op1_kind() != OpKind::Register;
        // STOS needs RAX.
        let kept = match usual(at) {
            Kept::InAx => Kept::InMemory,
            kept => kept,
        };
        let slow = self.asm.label();
        self.keep_flags(kept);
        self.asm.ins(op(0xf6), 0, hot(at::SYSTEM_FLAGS + 1));
        self.asm.u8(DF);
        self.asm.jcc(cc::NE, slow);
        self.asm.alu_i(7, RCX, 4096 / i32::from(size));
        self.asm.jcc(cc::A, slow);
        self.whole_range(at, RDI, size, true, slow);
        if copies {
            self.asm.store(hot(at::SAVED_ENTRY), R14);
            self.whole_range(at, RSI, size, false, slow);
        }
        self.cold.push(Cold::Missed {
            from: slow,
            op: self.op_number(at),
            stack: 0,
            kept,
        });
        self.execute_string(size, copies);
        let (from, next) = (self.asm.label(), self.next_place(at));
        self.asm.load(R14, hot(at::HELD_FLAG));
        self.asm.ins(op(0x80), 7, mem(R14, 0));
        self.asm.u8(0);
        self.asm.jcc(cc::NE, from);
        self.cold.push(Cold::Watched {
            from,
            kept,
            next: Target::Page(next),
            rest: 0,
        });
        self.restore_flags(kept);
        self.fall_through(at);
        true
    }

    /// The host address of what a register points to into R14, for RCX elements, or goes to `slow`. Where the flag byte of a
    /// page is that is written to is kept. Changes flags and R15.
    fn whole_range(&mut self, at: At, pointer: Reg, size: u8, write: bool, slow: Label) {
        let via = if self.mode.contains(Mode::USER) {
            Via::Recent(way::BASE + usize::from(pointer))
        } else {
            Via::Buffer
        };
        self.asm.mov(R14, pointer);
        self.translate(at, via, 1, write, slow);
        if write {
            let flag = match via {
                Via::Buffer => mem(R15, FLAG),
                Via::Recent(number) => hot(at::recent(number) + FLAG),
            };
            self.asm.load(R15, flag);
            self.asm.store(hot(at::HELD_FLAG), R15);
        }
        // The last byte lies in the same page.
        let scale = size.trailing_zeros() as u8;
        self.asm
            .lea(R15, Rm::Mem(Some(R14), Some((RCX, scale)), -1));
        self.asm.ins(op64(0x33), R15, Rm::Reg(R14));
        self.asm.ins(op64(0xc1), 5, Rm::Reg(R15));
        self.asm.u8(12);
        self.asm.jcc(cc::NE, slow);
    }

    /// Executes it at host addresses and moves the guest's pointers. STOS has its target in R14, MOVS its source, and its
    /// target is kept.
    fn execute_string(&mut self, size: u8, copies: bool) {
        let scale = size.trailing_zeros() as u8;
        if copies {
            self.asm.store(hot(at::HELD), RSI);
            self.asm.mov(RSI, R14);
            self.asm.mov(R14, RDI);
            self.asm.load(RDI, hot(at::SAVED_ENTRY));
        } else {
            self.asm.mov(R15, RDI);
            self.asm.mov(RDI, R14);
            self.asm.mov(R14, R15);
        }
        self.asm.mov(R15, RCX);
        self.asm.u8(0xf3);
        if size == 8 {
            self.asm.u8(0x48);
        }
        let byte = if copies { 0xa4 } else { 0xaa };
        self.asm.u8(byte | u8::from(size > 1));
        self.asm.lea(RDI, Rm::Mem(Some(R14), Some((R15, scale)), 0));
        if copies {
            self.asm.load(RSI, hot(at::HELD));
            self.asm.lea(RSI, Rm::Mem(Some(RSI), Some((R15, scale)), 0));
        }
    }
}
