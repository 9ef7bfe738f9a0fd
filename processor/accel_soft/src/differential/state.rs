//! The registers that a test compares.

use std::fmt::Write;

use crate::x87::X87;

/// User-visible registers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct State {
    /// In encoding order.
    pub(crate) gpr: [u64; 16],
    /// Instruction pointer.
    pub(crate) rip: u64,
    /// Flags.
    pub(crate) rflags: u64,
    /// Vector registers.
    pub(crate) ymm: [[u128; 2]; 16],
    /// MXCSR.
    pub(crate) mxcsr: u32,
    /// x87.
    pub(crate) x87: X87,
}

const GPR: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

/// Flags that a user program sees change: status flags, DF, AC, ID.
pub(crate) const FLAGS: u64 = 0x0024_0cd5;

impl State {
    /// What differs between the host's result and ours, one line each; empty when nothing does. `undefined` flags do not count.
    pub(crate) fn differences(&self, ours: &Self, undefined: u64, bits: u32) -> String {
        let mut out = String::new();
        let (count, whole) = if bits == 64 {
            (16, u64::MAX)
        } else {
            (8, 0xffff_ffff)
        };
        for (i, name) in GPR[..count].iter().enumerate() {
            line(&mut out, name, self.gpr[i] & whole, ours.gpr[i] & whole);
        }
        line(&mut out, "rip", self.rip, ours.rip);
        let mask = FLAGS & !undefined;
        line(&mut out, "rflags", self.rflags & mask, ours.rflags & mask);
        for i in 0..count {
            line128(
                &mut out,
                &format!("ymm{i}.low"),
                self.ymm[i][0],
                ours.ymm[i][0],
            );
            line128(
                &mut out,
                &format!("ymm{i}.high"),
                self.ymm[i][1],
                ours.ymm[i][1],
            );
        }
        line(&mut out, "mxcsr", self.mxcsr.into(), ours.mxcsr.into());
        let (a, b) = (&self.x87, &ours.x87);
        line(&mut out, "fcw", a.control.into(), b.control.into());
        line(&mut out, "fsw", a.status.into(), b.status.into());
        line(&mut out, "ftw", a.tags.into(), b.tags.into());
        for i in 0..8 {
            let whole = |(low, high): (u64, u16)| u128::from(low) | u128::from(high) << 64;
            line128(
                &mut out,
                &format!("R{i}"),
                whole(a.registers[i]),
                whole(b.registers[i]),
            );
        }
        out
    }
}

fn line(out: &mut String, name: &str, host: u64, ours: u64) {
    if host != ours {
        let _ = writeln!(out, "    {name}: host {host:#x}, ours {ours:#x}");
    }
}

fn line128(out: &mut String, name: &str, host: u128, ours: u128) {
    if host != ours {
        let _ = writeln!(out, "    {name}: host {host:#034x}, ours {ours:#034x}");
    }
}
