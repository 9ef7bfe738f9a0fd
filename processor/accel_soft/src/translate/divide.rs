//! DIV and IDIV of 32 and 64 bits: executed by the host where they can't raise an exception, else by the interpreter.

use iced_x86::{Instruction, Mnemonic as M, OpKind};

use super::code::{At, Compiler, Kept};
use super::cold::{Cold, Rejoin};
use super::emit::{Opcode, R14, R15, RAX, RDX, Rm, cc, hot, mem, op, op64};
use super::registers::{Place, place};

/// True for DIV and IDIV.
pub(crate) fn is_division(i: &Instruction) -> bool {
    matches!(i.mnemonic(), M::Div | M::Idiv)
}

impl Compiler<'_> {
    /// DIV and IDIV. Flags are undefined behind them. False: it can't be done here.
    pub(crate) fn divide(&mut self, at: At) -> bool {
        let i = at.i;
        let register = i.op0_kind() == OpKind::Register;
        let size = if register {
            i.op0_register().size()
        } else {
            i.memory_size().size()
        };
        if !matches!(size, 4 | 8) {
            return false;
        }
        let of_size = |byte: u8| -> Opcode { if size == 8 { op64(byte) } else { op(byte) } };
        let (slow, back) = (self.asm.label(), self.asm.label());
        if register {
            match place(i.op0_register().number() as u8) {
                Place::Host(reg) => self.asm.ins(of_size(0x8b), R14, Rm::Reg(reg)),
                Place::Frame(from) => self.asm.ins(of_size(0x8b), R14, hot(from)),
            }
        } else {
            if !self.linear_address(at) {
                return false;
            }
            let via = self.via(at);
            self.translate(at, via, size as u32, false, slow);
            self.asm.ins(of_size(0x8b), R14, mem(R14, 0));
        }
        if i.mnemonic() == M::Div {
            // The quotient fits when the upper half is less than the divisor.
            self.asm.ins(of_size(0x3b), RDX, Rm::Reg(R14));
            self.asm.jcc(cc::AE, slow);
        } else {
            // It fits when the upper half is the sign of the lower, unless the divisor is 0 or -1.
            self.asm.ins(of_size(0x8b), R15, Rm::Reg(RAX));
            self.asm.ins(of_size(0xc1), 7, Rm::Reg(R15));
            self.asm.u8(63);
            self.asm.ins(of_size(0x3b), R15, Rm::Reg(RDX));
            self.asm.jcc(cc::NE, slow);
            self.asm.ins(of_size(0x8d), R15, mem(R14, 1));
            self.asm.ins(of_size(0x83), 7, Rm::Reg(R15));
            self.asm.u8(1);
            self.asm.jcc(cc::BE, slow);
        }
        let extension = if i.mnemonic() == M::Div { 6 } else { 7 };
        self.asm.ins(of_size(0xf7), extension, Rm::Reg(R14));
        self.asm.bind(back);
        self.cold.push(Cold::Slow {
            from: slow,
            rejoin: Rejoin::Back(back),
            op: self.op_number(at),
            kept: Kept::Nowhere,
        });
        true
    }
}
