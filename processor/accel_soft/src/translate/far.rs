//! Direct jumps to other pages.
//!
//! Where another page is depends on the translations in use, for which a key stands ([`super::jumps`]). The code of such a jump
//! compares the key's number with the one that its target was found under, and goes straight there when it is the same; else
//! it looks the target up as an indirect jump does. It is linked when its target has been found that way for the first time.

use super::code::Compiler;
use super::cold::Cold;
use super::emit::{R15, RCX, hot};
use super::hot::at;
use super::jumps::Jumps;
use super::memory::CodeMemory;
use super::stubs::{jrcxz, np};

/// What the guard of a jump that is not linked adds to a key's number: never zero, as numbers are even.
const NOT_LINKED: i32 = -1;

/// A jump to another page. Places count from the start of all code.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FarLink {
    /// What is added to the number of the key: zero means that the target is known.
    guard: u32,
    /// The distance of the jump for any other key.
    miss: u32,
    /// The distance of the jump to the target.
    jump: u32,
}

impl FarLink {
    /// The same with places counted from further ahead.
    pub(crate) fn moved(self, by: u64) -> Self {
        let [guard, miss, jump] = [self.guard, self.miss, self.jump].map(|at| at + by as u32);
        Self { guard, miss, jump }
    }

    /// Makes it lead to where the table of jumps leads for an address, under a key.
    pub(crate) fn link(
        self,
        memory: &mut CodeMemory,
        jumps: &Jumps,
        rip: u64,
        key: u64,
        lookup: u64,
    ) {
        let Some(code) = jumps.find(rip, key) else {
            return;
        };
        let start = memory.start();
        memory.patch_jump(start + u64::from(self.jump), code);
        memory.patch_jump(start + u64::from(self.miss), lookup);
        let number = (key >> 48) as u32;
        memory.patch(start + u64::from(self.guard), number.wrapping_neg());
    }

    /// True when the target is known for some key.
    #[cfg(test)]
    pub(crate) fn is_linked(self, memory: &CodeMemory) -> bool {
        let [a, b, c, d, _] = memory.bytes(memory.start() + u64::from(self.guard));
        i32::from_le_bytes([a, b, c, d]) != NOT_LINKED
    }

    /// It is known for no key any more.
    pub(crate) fn unlink(self, memory: &mut CodeMemory) {
        memory.patch(memory.start() + u64::from(self.guard), NOT_LINKED as u32);
    }
}

impl Compiler<'_> {
    /// Goes to the address in R14, in another page. Keeps flags.
    pub(crate) fn go_far(&mut self) {
        self.asm.mov(R15, RCX);
        self.asm.ins(np(0xb7), RCX, hot(at::KEY + 6));
        // LEA ECX, [RCX + disp32].
        self.asm.bytes.extend_from_slice(&[0x8d, 0x89]);
        let guard = self.asm.len() as u32;
        self.asm.i32(NOT_LINKED);
        jrcxz(self.asm, 0);
        let behind = self.asm.len();
        let from = self.asm.label();
        self.asm.mov(RCX, R15);
        let miss = self.asm.jmp_label(from) as u32;
        self.asm.bytes[behind - 1] = (self.asm.len() - behind) as u8;
        self.asm.mov(RCX, R15);
        let jump = self.asm.jmp_label(from) as u32;
        let link = self.first_far_link + self.far_links.len() as u32;
        self.far_links.push(FarLink { guard, miss, jump });
        self.cold.push(Cold::FarLink { from, link });
    }
}
