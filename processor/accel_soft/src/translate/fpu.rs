//! The x87 unit while translated code runs: in the host's, from the first instruction that needs it until somebody else asks
//! for its state. The rest of Rust's code does not touch the host's unit, so that it can stay there through calls.
//!
//! Only with all exceptions masked, so that none is raised in the host. The pointers to the last instruction and operand are
//! not followed: what FNSAVE gives are those of the last instruction that the interpreter has executed.

use std::arch::asm;

use super::runtime::exit;
use crate::cpu::Cpu;
use crate::x87::X87;

/// All exceptions of the control word.
const MASKS: u16 = 0x3f;
/// A register is empty, in the full tag word.
const EMPTY: u16 = 3;

/// The image of FNSAVE and FRSTOR (SDM volume 1, figure 8-9, and the registers behind it).
#[repr(C, align(16))]
struct Image([u8; 108]);

impl Image {
    fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.0[at], self.0[at + 1]])
    }

    fn of(unit: &X87) -> Self {
        let mut image = Self([0; 108]);
        let tags = (0..8).fold(0, |tags, i| {
            let tag = if unit.tags >> i & 1 == 0 { EMPTY } else { 0 };
            tags | tag << (2 * i)
        });
        for (at, word) in [(0, unit.control), (4, unit.status), (8, tags)] {
            image.0[at..at + 2].copy_from_slice(&word.to_le_bytes());
        }
        for i in 0..8 {
            let (significand, rest) = unit.registers[(unit.top() + i) & 7];
            let at = 28 + 10 * i;
            image.0[at..at + 8].copy_from_slice(&significand.to_le_bytes());
            image.0[at + 8..at + 10].copy_from_slice(&rest.to_le_bytes());
        }
        image
    }

    fn put_into(&self, unit: &mut X87) {
        unit.control = self.word(0);
        unit.status = self.word(4);
        let tags = self.word(8);
        unit.tags = (0..8).fold(0, |all, i| {
            all | u8::from(tags >> (2 * i) & 3 != EMPTY) << i
        });
        let top = unit.top();
        for i in 0..8 {
            let at = 28 + 10 * i;
            let mut significand = [0; 8];
            significand.copy_from_slice(&self.0[at..at + 8]);
            unit.registers[(top + i) & 7] = (u64::from_le_bytes(significand), self.word(at + 8));
        }
    }
}

/// True when the unit can't raise an exception.
pub(crate) fn is_masked(cpu: &Cpu) -> bool {
    cpu.x87.control & MASKS == MASKS
}

/// Puts the guest's unit into the host's. False: it has exceptions that are not masked.
pub(crate) fn enter(cpu: &mut Cpu) -> bool {
    if !is_masked(cpu) {
        return false;
    }
    let image = Image::of(&cpu.x87);
    // SAFETY: reads the image; with all exceptions masked nothing is raised. The unit is not used by compiled Rust.
    unsafe { asm!("frstor [{}]", in(reg) &raw const image, options(nostack)) };
    cpu.x87_live = true;
    true
}

/// Takes the guest's unit out of the host's, if it is there.
pub(crate) fn leave(cpu: &mut Cpu) {
    if !cpu.x87_live {
        return;
    }
    let mut image = Image([0; 108]);
    // SAFETY: writes the image, and leaves the unit as after FNINIT.
    unsafe { asm!("fnsave [{}]", in(reg) &raw mut image, options(nostack)) };
    image.put_into(&mut cpu.x87);
    cpu.x87_live = false;
}

/// Called before the first instruction of a block that needs the unit. Zero: go on.
///
/// # Safety
/// As [`super::runtime::run_op`].
pub(crate) unsafe extern "sysv64" fn load(cpu: *mut Cpu, index: u32) -> u32 {
    // SAFETY: the caller's promise.
    let cpu = unsafe { &mut *cpu };
    if enter(cpu) {
        return 0;
    }
    super::runtime::stop_before(cpu, index);
    exit::NEXT
}
