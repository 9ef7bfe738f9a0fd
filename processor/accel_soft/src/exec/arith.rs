//! Arithmetic with the processor's own status flags.
//!
//! The host is of the guest's architecture, so that each operation is the host's instruction followed by LAHF and SETO: the
//! flags are right by construction, undefined ones included.

use std::arch::asm;

use crate::cpu::{Status, Value};

/// Flags from AX after LAHF and SETO AL.
#[inline(always)]
fn status(ax: u16) -> Status {
    Status {
        of: ax as u8,
        low: (ax >> 8) as u8,
    }
}

/// Operations on an operand size, each with the status flags that the processor gives it.
pub(crate) trait Arith: Value {
    /// The signed type of the same size, as 64 bits.
    fn sign_extend(self) -> i64;
    /// ADD.
    fn add(self, b: Self) -> (Self, Status);
    /// SUB, CMP.
    fn sub(self, b: Self) -> (Self, Status);
    /// ADC.
    fn adc(self, b: Self, carry: bool) -> (Self, Status);
    /// SBB.
    fn sbb(self, b: Self, carry: bool) -> (Self, Status);
    /// AND, TEST.
    fn and(self, b: Self) -> (Self, Status);
    /// OR.
    fn or(self, b: Self) -> (Self, Status);
    /// XOR.
    fn xor(self, b: Self) -> (Self, Status);
    /// INC.
    fn inc(self, carry: bool) -> (Self, Status);
    /// DEC.
    fn dec(self, carry: bool) -> (Self, Status);
    /// NEG.
    fn neg(self) -> (Self, Status);
    /// NOT.
    fn not(self) -> Self;
    /// SHL by a count whose masked value is not zero.
    fn shl(self, count: u8) -> (Self, Status);
    /// SHR likewise.
    fn shr(self, count: u8) -> (Self, Status);
    /// SAR likewise.
    fn sar(self, count: u8) -> (Self, Status);
    /// ROL; only CF and OF of the status count.
    fn rol(self, count: u8) -> (Self, Status);
    /// ROR likewise.
    fn ror(self, count: u8) -> (Self, Status);
    /// RCL likewise.
    fn rcl(self, count: u8, carry: bool) -> (Self, Status);
    /// RCR likewise.
    fn rcr(self, count: u8, carry: bool) -> (Self, Status);
    /// MUL: low and high half.
    fn mul(self, b: Self) -> (Self, Self, Status);
    /// One-operand IMUL: low and high half.
    fn imul(self, b: Self) -> (Self, Self, Status);
}

/// Operations that have no 8-bit form.
pub(crate) trait WideArith: Arith {
    /// Two-operand IMUL.
    fn imul2(self, b: Self) -> (Self, Status);
    /// SHLD by a count whose masked value is not zero.
    fn shld(self, fill: Self, count: u8) -> (Self, Status);
    /// SHRD likewise.
    fn shrd(self, fill: Self, count: u8) -> (Self, Status);
    /// BSF: the index (meaningless for zero).
    fn bsf(self) -> (Self, Status);
    /// BSR likewise.
    fn bsr(self) -> (Self, Status);
}

macro_rules! two {
    ($type:ty, $class:ident, $m:literal, $name:ident, $text:literal) => {
        #[inline(always)]
        fn $name(mut self, b: Self) -> (Self, Status) {
            let ax: u16;
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!(
                    concat!($text, " {a", $m, "}, {b", $m, "}"),
                    "lahf",
                    "seto al",
                    a = inout($class) self,
                    b = in($class) b,
                    out("ax") ax,
                    options(pure, nomem, nostack),
                );
            }
            (self, status(ax))
        }
    };
}
macro_rules! two_carry {
    ($type:ty, $class:ident, $m:literal, $name:ident, $text:literal) => {
        #[inline(always)]
        fn $name(mut self, b: Self, carry: bool) -> (Self, Status) {
            let ax: u16;
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!(
                    "add {c}, 255",
                    concat!($text, " {a", $m, "}, {b", $m, "}"),
                    "lahf",
                    "seto al",
                    a = inout($class) self,
                    b = in($class) b,
                    c = inout(reg_byte) u8::from(carry) => _,
                    out("ax") ax,
                    options(pure, nomem, nostack),
                );
            }
            (self, status(ax))
        }
    };
}
macro_rules! one_carry {
    ($type:ty, $class:ident, $m:literal, $name:ident, $text:literal) => {
        #[inline(always)]
        fn $name(mut self, carry: bool) -> (Self, Status) {
            let ax: u16;
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!(
                    "add {c}, 255",
                    concat!($text, " {a", $m, "}"),
                    "lahf",
                    "seto al",
                    a = inout($class) self,
                    c = inout(reg_byte) u8::from(carry) => _,
                    out("ax") ax,
                    options(pure, nomem, nostack),
                );
            }
            (self, status(ax))
        }
    };
}
macro_rules! shift {
    ($type:ty, $class:ident, $m:literal, $name:ident, $text:literal) => {
        #[inline(always)]
        fn $name(mut self, count: u8) -> (Self, Status) {
            let ax: u16;
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!(
                    concat!($text, " {a", $m, "}, cl"),
                    "lahf",
                    "seto al",
                    a = inout($class) self,
                    in("cl") count,
                    out("ax") ax,
                    options(pure, nomem, nostack),
                );
            }
            (self, status(ax))
        }
    };
}
macro_rules! shift_carry {
    ($type:ty, $class:ident, $m:literal, $name:ident, $text:literal) => {
        #[inline(always)]
        fn $name(mut self, count: u8, carry: bool) -> (Self, Status) {
            let ax: u16;
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!(
                    "add {c}, 255",
                    concat!($text, " {a", $m, "}, cl"),
                    "lahf",
                    "seto al",
                    a = inout($class) self,
                    c = inout(reg_byte) u8::from(carry) => _,
                    in("cl") count,
                    out("ax") ax,
                    options(pure, nomem, nostack),
                );
            }
            (self, status(ax))
        }
    };
}
macro_rules! arith {
    ($type:ty, $signed:ty, $double:ty, $signed_double:ty, $class:ident, $m:literal) => {
        impl Arith for $type {
            #[inline(always)]
            #[allow(clippy::cast_lossless, trivial_numeric_casts)]
            fn sign_extend(self) -> i64 {
                self as $signed as i64
            }
            two!($type, $class, $m, add, "add");
            two!($type, $class, $m, sub, "sub");
            two!($type, $class, $m, and, "and");
            two!($type, $class, $m, or, "or");
            two!($type, $class, $m, xor, "xor");
            two_carry!($type, $class, $m, adc, "adc");
            two_carry!($type, $class, $m, sbb, "sbb");
            one_carry!($type, $class, $m, inc, "inc");
            one_carry!($type, $class, $m, dec, "dec");
            #[inline(always)]
            fn neg(self) -> (Self, Status) {
                Self::default().sub(self)
            }
            #[inline(always)]
            fn not(self) -> Self {
                !self
            }
            shift!($type, $class, $m, shl, "shl");
            shift!($type, $class, $m, shr, "shr");
            shift!($type, $class, $m, sar, "sar");
            shift!($type, $class, $m, rol, "rol");
            shift!($type, $class, $m, ror, "ror");
            shift_carry!($type, $class, $m, rcl, "rcl");
            shift_carry!($type, $class, $m, rcr, "rcr");
            #[inline(always)]
            #[allow(clippy::cast_lossless)]
            fn mul(self, b: Self) -> (Self, Self, Status) {
                let product = self as $double * b as $double;
                let (low, high) = (product as $type, (product >> <$type>::BITS) as $type);
                (low, high, product_status(low.sign_extend(), high != 0))
            }
            #[inline(always)]
            #[allow(clippy::cast_lossless)]
            fn imul(self, b: Self) -> (Self, Self, Status) {
                let product = self as $signed as $signed_double * b as $signed as $signed_double;
                let low = product as $type;
                let high = (product >> <$type>::BITS) as $type;
                let over = low as $signed as $signed_double != product;
                (low, high, product_status(low.sign_extend(), over))
            }
        }
    };
}

/// Flags of a multiplication: CF and OF say that the high half counts; SF and PF follow the low half, as on Intel's processors.
#[inline(always)]
fn product_status(low: i64, over: bool) -> Status {
    let parity = u8::from((low as u8).count_ones() & 1 == 0) << 2;
    Status {
        of: u8::from(over),
        low: u8::from(over) | parity | u8::from(low < 0) << 7,
    }
}

macro_rules! wide {
    ($type:ty, $m:literal) => {
        impl WideArith for $type {
            two!($type, reg, $m, imul2, "imul");
            double_shift!($type, $m, shld, "shld");
            double_shift!($type, $m, shrd, "shrd");
            scan!($type, $m, bsf, "bsf");
            scan!($type, $m, bsr, "bsr");
        }
    };
}
macro_rules! double_shift {
    ($type:ty, $m:literal, $name:ident, $text:literal) => {
        #[inline(always)]
        fn $name(mut self, fill: Self, count: u8) -> (Self, Status) {
            let ax: u16;
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!(
                    concat!($text, " {a", $m, "}, {b", $m, "}, cl"),
                    "lahf",
                    "seto al",
                    a = inout(reg) self,
                    b = in(reg) fill,
                    in("cl") count,
                    out("ax") ax,
                    options(pure, nomem, nostack),
                );
            }
            (self, status(ax))
        }
    };
}
macro_rules! scan {
    ($type:ty, $m:literal, $name:ident, $text:literal) => {
        #[inline(always)]
        fn $name(self) -> (Self, Status) {
            let (result, ax): ($type, u16);
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!(
                    concat!($text, " {r", $m, "}, {a", $m, "}"),
                    "lahf",
                    "seto al",
                    r = inout(reg) <$type>::default() => result,
                    a = in(reg) self,
                    out("ax") ax,
                    options(pure, nomem, nostack),
                );
            }
            (result, status(ax))
        }
    };
}

arith!(u8, i8, u16, i16, reg_byte, "");
arith!(u16, i16, u32, i32, reg, ":x");
arith!(u32, i32, u64, i64, reg, ":e");
arith!(u64, i64, u128, i128, reg, ":r");
wide!(u16, ":x");
wide!(u32, ":e");
wide!(u64, ":r");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Status;

    fn rflags((_, s): (impl Sized, Status)) -> u64 {
        s.to_rflags()
    }

    #[test]
    fn flags_are_the_processors() {
        assert_eq!(0xffu8.add(1).0, 0);
        assert_eq!(rflags(0xffu8.add(1)), 0x55);
        assert_eq!(rflags(0x7fff_ffffu32.add(1)), 0x894);
        assert_eq!(rflags(0u64.sub(1)), 0x95);
        assert_eq!(0u16.sbb(0, true).0, 0xffff);
        assert_eq!(rflags(0u16.inc(true)) & 1, 1);
        assert_eq!(0x80u8.rcl(1, true), (1, 0x80u8.rcl(1, true).1));
        assert!(0x80u8.rcl(1, false).1.carry());
        assert_eq!(5u32.imul2(7).0, 35);
        assert_eq!(0x40u64.bsf().0, 6);
        assert_eq!(0x8000u16.shld(0x8000, 1).0, 1);
        let (low, high, s) = (-2i32 as u32).imul(3);
        assert_eq!((low as i32, high as i32, s.carry()), (-6, -1, false));
    }
}
