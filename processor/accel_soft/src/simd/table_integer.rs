//! Stubs of the integer instructions on vectors, and of those on floating-point values that only move or combine bits.
#![allow(unsafe_code)] // The stubs are naked functions.

use iced_x86::Mnemonic;

use super::call::stub;
use super::table::{Entry, Output};

/// `op a, b` on MM, XMM and YMM.
macro_rules! mxy {
    ($op:literal) => {
        Entry {
            mm: Some(stub!(concat!($op, " mm0, mm1"))),
            ..xy!($op)
        }
    };
}

/// `op a, b` on XMM and YMM.
macro_rules! xy {
    ($op:literal) => {
        Entry {
            xmm: Some(stub!(concat!($op, " xmm0, xmm1"))),
            ymm: Some(stub!(concat!("v", $op, " ymm0, ymm0, ymm1"))),
            ..Entry::NONE
        }
    };
}

/// `op a, count` on MM, XMM and YMM, with the count always in an XMM register.
macro_rules! shift {
    ($op:literal) => {
        Entry {
            mm: Some(stub!(concat!($op, " mm0, mm1"))),
            xmm: Some(stub!(concat!($op, " xmm0, xmm1"))),
            ymm: Some(stub!(concat!("v", $op, " ymm0, ymm0, xmm1"))),
            ..Entry::NONE
        }
    };
}

/// `op result, b` on XMM and YMM.
macro_rules! unary {
    ($op:literal) => {
        Entry {
            xmm: Some(stub!(concat!($op, " xmm0, xmm1"))),
            ymm: Some(stub!(concat!("v", $op, " ymm0, ymm1"))),
            ..Entry::NONE
        }
    };
}

/// `op result, b` on MM, XMM and YMM.
macro_rules! unary_mxy {
    ($op:literal) => {
        Entry {
            mm: Some(stub!(concat!($op, " mm0, mm1"))),
            ..unary!($op)
        }
    };
}

/// `op result, b` that widens an XMM register's elements.
macro_rules! widen {
    ($op:literal) => {
        Entry {
            xmm: Some(stub!(concat!($op, " xmm0, xmm1"))),
            ymm: Some(stub!(concat!("v", $op, " ymm0, xmm1"))),
            ..Entry::NONE
        }
    };
}

/// `op a, b` on XMM alone.
macro_rules! x {
    ($op:literal) => {
        Entry {
            xmm: Some(stub!(concat!($op, " xmm0, xmm1"))),
            ..Entry::NONE
        }
    };
}

/// Three-operand VEX instructions on XMM and YMM.
macro_rules! vex {
    ($op:literal) => {
        Entry {
            xmm: Some(stub!(concat!($op, " xmm0, xmm0, xmm1"))),
            ymm: Some(stub!(concat!($op, " ymm0, ymm0, ymm1"))),
            ..Entry::NONE
        }
    };
}

/// VEX broadcasts from the lowest element of an XMM register.
macro_rules! broadcast {
    ($op:literal) => {
        Entry {
            xmm: Some(stub!(concat!($op, " xmm0, xmm1"))),
            ymm: Some(stub!(concat!($op, " ymm0, xmm1"))),
            ..Entry::NONE
        }
    };
}

/// Blends by a mask in the third source.
macro_rules! blend {
    ($op:literal) => {
        Entry {
            xmm: Some(stub!(
                "movdqa xmm3, xmm0",
                "movdqa xmm0, xmm2",
                concat!($op, " xmm3, xmm1"),
                "movdqa xmm0, xmm3"
            )),
            ymm: Some(stub!(concat!("v", $op, " ymm0, ymm0, ymm1, ymm2"))),
            ..Entry::NONE
        }
    };
}

/// Tests that set flags.
macro_rules! test {
    ($xmm:literal, $ymm:literal) => {
        Entry {
            xmm: Some(stub!($xmm, "pushfq", "pop rax")),
            ymm: Some(stub!($ymm, "pushfq", "pop rax")),
            ..Entry::NONE
        }
        .output(Output::Flags)
    };
}

/// Masks of sign bits in a general register.
macro_rules! mask {
    ($op:literal) => {
        Entry {
            xmm: Some(stub!(concat!($op, " eax, xmm1"))),
            ymm: Some(stub!(concat!("v", $op, " eax, ymm1"))),
            ..Entry::NONE
        }
        .output(Output::General)
    };
}

/// The entry of a mnemonic in this table.
pub(crate) fn entry(mnemonic: Mnemonic) -> Option<Entry> {
    arithmetic(mnemonic)
        .or_else(|| arrangement(mnemonic))
        .or_else(|| cryptography(mnemonic))
}

#[rustfmt::skip]
fn arithmetic(mnemonic: Mnemonic) -> Option<Entry> {
    use Mnemonic as M;
    Some(match mnemonic {
        M::Paddb | M::Vpaddb => mxy!("paddb"),
        M::Paddw | M::Vpaddw => mxy!("paddw"),
        M::Paddd | M::Vpaddd => mxy!("paddd"),
        M::Paddq | M::Vpaddq => mxy!("paddq"),
        M::Psubb | M::Vpsubb => mxy!("psubb"),
        M::Psubw | M::Vpsubw => mxy!("psubw"),
        M::Psubd | M::Vpsubd => mxy!("psubd"),
        M::Psubq | M::Vpsubq => mxy!("psubq"),
        M::Paddsb | M::Vpaddsb => mxy!("paddsb"),
        M::Paddsw | M::Vpaddsw => mxy!("paddsw"),
        M::Paddusb | M::Vpaddusb => mxy!("paddusb"),
        M::Paddusw | M::Vpaddusw => mxy!("paddusw"),
        M::Psubsb | M::Vpsubsb => mxy!("psubsb"),
        M::Psubsw | M::Vpsubsw => mxy!("psubsw"),
        M::Psubusb | M::Vpsubusb => mxy!("psubusb"),
        M::Psubusw | M::Vpsubusw => mxy!("psubusw"),
        M::Pmullw | M::Vpmullw => mxy!("pmullw"),
        M::Pmulhw | M::Vpmulhw => mxy!("pmulhw"),
        M::Pmulhuw | M::Vpmulhuw => mxy!("pmulhuw"),
        M::Pmuludq | M::Vpmuludq => mxy!("pmuludq"),
        M::Pmaddwd | M::Vpmaddwd => mxy!("pmaddwd"),
        M::Psadbw | M::Vpsadbw => mxy!("psadbw"),
        M::Pminub | M::Vpminub => mxy!("pminub"),
        M::Pminsw | M::Vpminsw => mxy!("pminsw"),
        M::Pmaxub | M::Vpmaxub => mxy!("pmaxub"),
        M::Pmaxsw | M::Vpmaxsw => mxy!("pmaxsw"),
        M::Pavgb | M::Vpavgb => mxy!("pavgb"),
        M::Pavgw | M::Vpavgw => mxy!("pavgw"),
        M::Phaddw | M::Vphaddw => mxy!("phaddw"),
        M::Phaddd | M::Vphaddd => mxy!("phaddd"),
        M::Phaddsw | M::Vphaddsw => mxy!("phaddsw"),
        M::Phsubw | M::Vphsubw => mxy!("phsubw"),
        M::Phsubd | M::Vphsubd => mxy!("phsubd"),
        M::Phsubsw | M::Vphsubsw => mxy!("phsubsw"),
        M::Pmaddubsw | M::Vpmaddubsw => mxy!("pmaddubsw"),
        M::Psignb | M::Vpsignb => mxy!("psignb"),
        M::Psignw | M::Vpsignw => mxy!("psignw"),
        M::Psignd | M::Vpsignd => mxy!("psignd"),
        M::Pmulhrsw | M::Vpmulhrsw => mxy!("pmulhrsw"),
        M::Pabsb | M::Vpabsb => unary_mxy!("pabsb"),
        M::Pabsw | M::Vpabsw => unary_mxy!("pabsw"),
        M::Pabsd | M::Vpabsd => unary_mxy!("pabsd"),
        M::Pmuldq | M::Vpmuldq => xy!("pmuldq"),
        M::Pmulld | M::Vpmulld => xy!("pmulld"),
        M::Pminsb | M::Vpminsb => xy!("pminsb"),
        M::Pminsd | M::Vpminsd => xy!("pminsd"),
        M::Pminuw | M::Vpminuw => xy!("pminuw"),
        M::Pminud | M::Vpminud => xy!("pminud"),
        M::Pmaxsb | M::Vpmaxsb => xy!("pmaxsb"),
        M::Pmaxsd | M::Vpmaxsd => xy!("pmaxsd"),
        M::Pmaxuw | M::Vpmaxuw => xy!("pmaxuw"),
        M::Pmaxud | M::Vpmaxud => xy!("pmaxud"),
        M::Phminposuw | M::Vphminposuw => x!("phminposuw"),
        M::Pcmpgtb | M::Vpcmpgtb => mxy!("pcmpgtb"),
        M::Pcmpgtw | M::Vpcmpgtw => mxy!("pcmpgtw"),
        M::Pcmpgtd | M::Vpcmpgtd => mxy!("pcmpgtd"),
        M::Pcmpgtq | M::Vpcmpgtq => xy!("pcmpgtq"),
        M::Pcmpeqb | M::Vpcmpeqb => mxy!("pcmpeqb"),
        M::Pcmpeqw | M::Vpcmpeqw => mxy!("pcmpeqw"),
        M::Pcmpeqd | M::Vpcmpeqd => mxy!("pcmpeqd"),
        M::Pcmpeqq | M::Vpcmpeqq => xy!("pcmpeqq"),
        M::Pand | M::Vpand => mxy!("pand"),
        M::Pandn | M::Vpandn => mxy!("pandn"),
        M::Por | M::Vpor => mxy!("por"),
        M::Pxor | M::Vpxor => mxy!("pxor"),
        M::Andps | M::Vandps => xy!("andps"),
        M::Andpd | M::Vandpd => xy!("andpd"),
        M::Andnps | M::Vandnps => xy!("andnps"),
        M::Andnpd | M::Vandnpd => xy!("andnpd"),
        M::Orps | M::Vorps => xy!("orps"),
        M::Orpd | M::Vorpd => xy!("orpd"),
        M::Xorps | M::Vxorps => xy!("xorps"),
        M::Xorpd | M::Vxorpd => xy!("xorpd"),
        M::Psrlw | M::Vpsrlw => shift!("psrlw"),
        M::Psrld | M::Vpsrld => shift!("psrld"),
        M::Psrlq | M::Vpsrlq => shift!("psrlq"),
        M::Psraw | M::Vpsraw => shift!("psraw"),
        M::Psrad | M::Vpsrad => shift!("psrad"),
        M::Psllw | M::Vpsllw => shift!("psllw"),
        M::Pslld | M::Vpslld => shift!("pslld"),
        M::Psllq | M::Vpsllq => shift!("psllq"),
        M::Vpsrlvd => vex!("vpsrlvd"),
        M::Vpsrlvq => vex!("vpsrlvq"),
        M::Vpsravd => vex!("vpsravd"),
        M::Vpsllvd => vex!("vpsllvd"),
        M::Vpsllvq => vex!("vpsllvq"),
        M::Ptest | M::Vptest => test!("ptest xmm0, xmm1", "vptest ymm0, ymm1"),
        M::Vtestps => test!("vtestps xmm0, xmm1", "vtestps ymm0, ymm1"),
        M::Vtestpd => test!("vtestpd xmm0, xmm1", "vtestpd ymm0, ymm1"),
        M::Pmovmskb | M::Vpmovmskb =>
            Entry { mm: Some(stub!("pmovmskb eax, mm1")), ..mask!("pmovmskb") },
        M::Movmskps | M::Vmovmskps => mask!("movmskps"),
        M::Movmskpd | M::Vmovmskpd => mask!("movmskpd"),
        _ => return None,
    })
}

#[rustfmt::skip]
fn arrangement(mnemonic: Mnemonic) -> Option<Entry> {
    use Mnemonic as M;
    Some(match mnemonic {
        M::Punpcklbw | M::Vpunpcklbw => mxy!("punpcklbw"),
        M::Punpcklwd | M::Vpunpcklwd => mxy!("punpcklwd"),
        M::Punpckldq | M::Vpunpckldq => mxy!("punpckldq"),
        M::Punpckhbw | M::Vpunpckhbw => mxy!("punpckhbw"),
        M::Punpckhwd | M::Vpunpckhwd => mxy!("punpckhwd"),
        M::Punpckhdq | M::Vpunpckhdq => mxy!("punpckhdq"),
        M::Punpcklqdq | M::Vpunpcklqdq => xy!("punpcklqdq"),
        M::Punpckhqdq | M::Vpunpckhqdq => xy!("punpckhqdq"),
        M::Unpcklps | M::Vunpcklps => xy!("unpcklps"),
        M::Unpcklpd | M::Vunpcklpd => xy!("unpcklpd"),
        M::Unpckhps | M::Vunpckhps => xy!("unpckhps"),
        M::Unpckhpd | M::Vunpckhpd => xy!("unpckhpd"),
        M::Packsswb | M::Vpacksswb => mxy!("packsswb"),
        M::Packssdw | M::Vpackssdw => mxy!("packssdw"),
        M::Packuswb | M::Vpackuswb => mxy!("packuswb"),
        M::Packusdw | M::Vpackusdw => xy!("packusdw"),
        M::Pshufb | M::Vpshufb => mxy!("pshufb"),
        M::Movsldup | M::Vmovsldup => unary!("movsldup"),
        M::Movshdup | M::Vmovshdup => unary!("movshdup"),
        M::Movddup | M::Vmovddup => unary!("movddup"),
        M::Movhlps | M::Vmovhlps => x!("movhlps"),
        M::Movlhps | M::Vmovlhps => x!("movlhps"),
        M::Pmovsxbw | M::Vpmovsxbw => widen!("pmovsxbw"),
        M::Pmovsxbd | M::Vpmovsxbd => widen!("pmovsxbd"),
        M::Pmovsxbq | M::Vpmovsxbq => widen!("pmovsxbq"),
        M::Pmovsxwd | M::Vpmovsxwd => widen!("pmovsxwd"),
        M::Pmovsxwq | M::Vpmovsxwq => widen!("pmovsxwq"),
        M::Pmovsxdq | M::Vpmovsxdq => widen!("pmovsxdq"),
        M::Pmovzxbw | M::Vpmovzxbw => widen!("pmovzxbw"),
        M::Pmovzxbd | M::Vpmovzxbd => widen!("pmovzxbd"),
        M::Pmovzxbq | M::Vpmovzxbq => widen!("pmovzxbq"),
        M::Pmovzxwd | M::Vpmovzxwd => widen!("pmovzxwd"),
        M::Pmovzxwq | M::Vpmovzxwq => widen!("pmovzxwq"),
        M::Pmovzxdq | M::Vpmovzxdq => widen!("pmovzxdq"),
        M::Pblendvb | M::Vpblendvb => blend!("pblendvb"),
        M::Blendvps | M::Vblendvps => blend!("blendvps"),
        M::Blendvpd | M::Vblendvpd => blend!("blendvpd"),
        M::Vpermilps => vex!("vpermilps"),
        M::Vpermilpd => vex!("vpermilpd"),
        M::Vpermd => Entry { ymm: Some(stub!("vpermd ymm0, ymm0, ymm1")), ..Entry::NONE },
        M::Vpermps => Entry { ymm: Some(stub!("vpermps ymm0, ymm0, ymm1")), ..Entry::NONE },
        M::Vpbroadcastb => broadcast!("vpbroadcastb"),
        M::Vpbroadcastw => broadcast!("vpbroadcastw"),
        M::Vpbroadcastd => broadcast!("vpbroadcastd"),
        M::Vpbroadcastq => broadcast!("vpbroadcastq"),
        // Without VBROADCAST from a register, which AVX alone has not got.
        M::Vbroadcastss => Entry {
            xmm: Some(stub!("movaps xmm0, xmm1", "shufps xmm0, xmm0, 0")),
            ymm: Some(stub!("vshufps xmm0, xmm1, xmm1, 0", "vinsertf128 ymm0, ymm0, xmm0, 1")),
            ..Entry::NONE
        },
        M::Vbroadcastsd => Entry {
            ymm: Some(stub!("vmovlhps xmm0, xmm1, xmm1", "vinsertf128 ymm0, ymm0, xmm0, 1")),
            ..Entry::NONE
        },
        M::Vbroadcastf128 | M::Vbroadcasti128 => Entry {
            ymm: Some(stub!("vinsertf128 ymm0, ymm1, xmm1, 1")),
            ..Entry::NONE
        },
        _ => return None,
    })
}

#[rustfmt::skip]
fn cryptography(mnemonic: Mnemonic) -> Option<Entry> {
    use Mnemonic as M;
    Some(match mnemonic {
        M::Aesenc | M::Vaesenc => xy!("aesenc"),
        M::Aesenclast | M::Vaesenclast => xy!("aesenclast"),
        M::Aesdec | M::Vaesdec => xy!("aesdec"),
        M::Aesdeclast | M::Vaesdeclast => xy!("aesdeclast"),
        M::Aesimc | M::Vaesimc => x!("aesimc"),
        M::Sha1nexte => x!("sha1nexte"),
        M::Sha1msg1 => x!("sha1msg1"),
        M::Sha1msg2 => x!("sha1msg2"),
        M::Sha256msg1 => x!("sha256msg1"),
        M::Sha256msg2 => x!("sha256msg2"),
        M::Sha256rnds2 => Entry {
            xmm: Some(stub!("movdqa xmm3, xmm0", "movdqa xmm0, xmm2", "sha256rnds2 xmm3, xmm1, xmm0", "movdqa xmm0, xmm3")),
            ..Entry::NONE
        },
        M::Gf2p8mulb | M::Vgf2p8mulb => xy!("gf2p8mulb"),
        _ => return None,
    })
}
