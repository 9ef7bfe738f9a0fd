//! Stubs of the instructions on floating-point vectors that have no immediate.
#![allow(unsafe_code)] // The stubs are naked functions.

use iced_x86::Mnemonic;

use super::call::stub;
use super::table::{Entry, Float, Output};

/// `op a, b` on XMM and YMM.
macro_rules! xy {
    ($op:literal, $float:ident) => {
        Entry {
            xmm: Some(stub!(concat!($op, " xmm0, xmm1"))),
            ymm: Some(stub!(concat!("v", $op, " ymm0, ymm0, ymm1"))),
            float: Float::$float,
            ..Entry::NONE
        }
    };
}

/// `op a, b` on XMM alone: scalars, whose upper elements come from `a`.
macro_rules! x {
    ($op:literal, $float:ident) => {
        Entry {
            xmm: Some(stub!(concat!($op, " xmm0, xmm1"))),
            float: Float::$float,
            ..Entry::NONE
        }
    };
}

/// `op result, b` with the given YMM operands.
macro_rules! unary {
    ($op:literal, $ymm:literal, $float:ident) => {
        Entry {
            xmm: Some(stub!(concat!($op, " xmm0, xmm1"))),
            ymm: Some(stub!(concat!("v", $op, $ymm))),
            float: Float::$float,
            ..Entry::NONE
        }
    };
}

/// Scalar comparisons that set flags.
macro_rules! compare {
    ($op:literal) => {
        Entry {
            xmm: Some(stub!(concat!($op, " xmm0, xmm1"), "pushfq", "pop rax")),
            ..Entry::NONE
        }
        .output(Output::Flags)
        .float(Float::Flags)
    };
}

/// Scalars to general registers.
macro_rules! to_general {
    ($op:literal) => {
        Entry {
            xmm: Some(stub!(concat!($op, " eax, xmm1"))),
            wide: Some(stub!(concat!($op, " rax, xmm1"))),
            ..Entry::NONE
        }
        .output(Output::General)
        .float(Float::Flags)
    };
}

/// General registers to scalars.
macro_rules! from_general {
    ($op:literal) => {
        Entry {
            xmm: Some(stub!(concat!($op, " xmm0, eax"))),
            wide: Some(stub!(concat!($op, " xmm0, rax"))),
            ..Entry::NONE
        }
        .float(Float::Flags)
    };
}

/// The entry of a mnemonic in this table.
pub(crate) fn entry(mnemonic: Mnemonic) -> Option<Entry> {
    arithmetic(mnemonic).or_else(|| conversion(mnemonic))
}

#[rustfmt::skip]
fn arithmetic(mnemonic: Mnemonic) -> Option<Entry> {
    use Mnemonic as M;
    Some(match mnemonic {
        M::Addps | M::Vaddps => xy!("addps", Single),
        M::Addpd | M::Vaddpd => xy!("addpd", Double),
        M::Addss | M::Vaddss => x!("addss", SingleScalar),
        M::Addsd | M::Vaddsd => x!("addsd", DoubleScalar),
        M::Subps | M::Vsubps => xy!("subps", Single),
        M::Subpd | M::Vsubpd => xy!("subpd", Double),
        M::Subss | M::Vsubss => x!("subss", SingleScalar),
        M::Subsd | M::Vsubsd => x!("subsd", DoubleScalar),
        M::Mulps | M::Vmulps => xy!("mulps", Single),
        M::Mulpd | M::Vmulpd => xy!("mulpd", Double),
        M::Mulss | M::Vmulss => x!("mulss", SingleScalar),
        M::Mulsd | M::Vmulsd => x!("mulsd", DoubleScalar),
        M::Divps | M::Vdivps => xy!("divps", Single),
        M::Divpd | M::Vdivpd => xy!("divpd", Double),
        M::Divss | M::Vdivss => x!("divss", SingleScalar),
        M::Divsd | M::Vdivsd => x!("divsd", DoubleScalar),
        M::Minps | M::Vminps => xy!("minps", Flags),
        M::Minpd | M::Vminpd => xy!("minpd", Flags),
        M::Minss | M::Vminss => x!("minss", Flags),
        M::Minsd | M::Vminsd => x!("minsd", Flags),
        M::Maxps | M::Vmaxps => xy!("maxps", Flags),
        M::Maxpd | M::Vmaxpd => xy!("maxpd", Flags),
        M::Maxss | M::Vmaxss => x!("maxss", Flags),
        M::Maxsd | M::Vmaxsd => x!("maxsd", Flags),
        M::Haddps | M::Vhaddps => xy!("haddps", Single),
        M::Haddpd | M::Vhaddpd => xy!("haddpd", Double),
        M::Hsubps | M::Vhsubps => xy!("hsubps", Single),
        M::Hsubpd | M::Vhsubpd => xy!("hsubpd", Double),
        M::Addsubps | M::Vaddsubps => xy!("addsubps", Single),
        M::Addsubpd | M::Vaddsubpd => xy!("addsubpd", Double),
        M::Sqrtps | M::Vsqrtps => unary!("sqrtps", " ymm0, ymm1", Flags),
        M::Sqrtpd | M::Vsqrtpd => unary!("sqrtpd", " ymm0, ymm1", Flags),
        M::Sqrtss | M::Vsqrtss => x!("sqrtss", Flags),
        M::Sqrtsd | M::Vsqrtsd => x!("sqrtsd", Flags),
        M::Rsqrtps | M::Vrsqrtps => unary!("rsqrtps", " ymm0, ymm1", No),
        M::Rsqrtss | M::Vrsqrtss => x!("rsqrtss", No),
        M::Rcpps | M::Vrcpps => unary!("rcpps", " ymm0, ymm1", No),
        M::Rcpss | M::Vrcpss => x!("rcpss", No),
        M::Comiss | M::Vcomiss => compare!("comiss"),
        M::Comisd | M::Vcomisd => compare!("comisd"),
        M::Ucomiss | M::Vucomiss => compare!("ucomiss"),
        M::Ucomisd | M::Vucomisd => compare!("ucomisd"),
        _ => return None,
    })
}

#[rustfmt::skip]
fn conversion(mnemonic: Mnemonic) -> Option<Entry> {
    use Mnemonic as M;
    Some(match mnemonic {
        M::Cvtdq2ps | M::Vcvtdq2ps => unary!("cvtdq2ps", " ymm0, ymm1", Flags),
        M::Cvtps2dq | M::Vcvtps2dq => unary!("cvtps2dq", " ymm0, ymm1", Flags),
        M::Cvttps2dq | M::Vcvttps2dq => unary!("cvttps2dq", " ymm0, ymm1", Flags),
        M::Cvtdq2pd | M::Vcvtdq2pd => unary!("cvtdq2pd", " ymm0, xmm1", No),
        M::Cvtps2pd | M::Vcvtps2pd => unary!("cvtps2pd", " ymm0, xmm1", Flags),
        M::Cvtpd2ps | M::Vcvtpd2ps => unary!("cvtpd2ps", " xmm0, ymm1", Single),
        M::Cvtpd2dq | M::Vcvtpd2dq => unary!("cvtpd2dq", " xmm0, ymm1", Flags),
        M::Cvttpd2dq | M::Vcvttpd2dq => unary!("cvttpd2dq", " xmm0, ymm1", Flags),
        M::Cvtss2sd | M::Vcvtss2sd => x!("cvtss2sd", Flags),
        M::Cvtsd2ss | M::Vcvtsd2ss => x!("cvtsd2ss", SingleScalar),
        M::Cvtss2si | M::Vcvtss2si => to_general!("cvtss2si"),
        M::Cvtsd2si | M::Vcvtsd2si => to_general!("cvtsd2si"),
        M::Cvttss2si | M::Vcvttss2si => to_general!("cvttss2si"),
        M::Cvttsd2si | M::Vcvttsd2si => to_general!("cvttsd2si"),
        M::Cvtsi2ss | M::Vcvtsi2ss => from_general!("cvtsi2ss"),
        M::Cvtsi2sd | M::Vcvtsi2sd => from_general!("cvtsi2sd"),
        M::Vcvtph2ps => Entry {
            xmm: Some(stub!("vcvtph2ps xmm0, xmm1")),
            ymm: Some(stub!("vcvtph2ps ymm0, xmm1")),
            float: Float::Flags,
            ..Entry::NONE
        },
        // Between MMX and SSE: two elements, with zeroes, which convert without a flag, in the place of the other two.
        M::Cvtpi2ps => Entry { xmm: Some(stub!("cvtdq2ps xmm1, xmm1", "movsd xmm0, xmm1")), float: Float::Flags, ..Entry::NONE },
        M::Cvtpi2pd => Entry { xmm: Some(stub!("cvtdq2pd xmm0, xmm1")), ..Entry::NONE },
        M::Cvtps2pi => Entry { xmm: Some(stub!("movq xmm1, xmm1", "cvtps2dq xmm0, xmm1")), float: Float::Flags, ..Entry::NONE },
        M::Cvttps2pi => Entry { xmm: Some(stub!("movq xmm1, xmm1", "cvttps2dq xmm0, xmm1")), float: Float::Flags, ..Entry::NONE },
        M::Cvtpd2pi => Entry { xmm: Some(stub!("cvtpd2dq xmm0, xmm1")), float: Float::Flags, ..Entry::NONE },
        M::Cvttpd2pi => Entry { xmm: Some(stub!("cvttpd2dq xmm0, xmm1")), float: Float::Flags, ..Entry::NONE },
        _ => return None,
    })
}
