//! The x87 environment: FLDENV, FNSTENV, FRSTOR, FNSAVE, control and status words.

use super::X87;
use crate::cpu::{Access, Cpu, Mode, Op, Result};

/// Status word: an unmasked exception is pending (ES), and its copy (B).
const PENDING: u16 = 0x8080;
/// Exceptions in status and control words.
const EXCEPTIONS: u16 = 0x3f;
/// Bits of the control word that can be set; bit 6 is always set.
const CONTROL: u16 = 0x1f3f;

impl X87 {
    /// Sets the control word as FLDCW does.
    pub(crate) fn set_control(&mut self, value: u16) {
        self.control = value & CONTROL | 0x40;
        self.derive_pending();
    }

    /// ES and B follow from exceptions and masks.
    pub(crate) fn derive_pending(&mut self) {
        let pending = self.status & EXCEPTIONS & !self.control != 0;
        self.status = self.status & !PENDING | if pending { PENDING } else { 0 };
    }

    /// The top of stack.
    pub(crate) fn top(&self) -> usize {
        usize::from(self.status >> 11 & 7)
    }

    /// The full tag word (SDM volume 1, figure 8-7).
    fn tag_word(&self) -> u16 {
        let mut word = 0;
        for (i, (significand, rest)) in self.registers.iter().enumerate() {
            let exponent = rest & 0x7fff;
            let tag = match (self.tags >> i & 1, exponent, *significand) {
                (0, ..) => 3,
                (_, 0, 0) => 1,
                (_, 0 | 0x7fff, _) => 2,
                (_, _, s) if s >> 63 == 0 => 2,
                _ => 0,
            };
            word |= tag << (2 * i);
        }
        word
    }

    fn set_tag_word(&mut self, word: u16) {
        self.tags = (0..8).fold(0, |tags, i| tags | u8::from(word >> (2 * i) & 3 != 3) << i);
    }

    /// FNINIT.
    pub(crate) fn initialize(&mut self) {
        *self = Self {
            registers: self.registers,
            ..Self::default()
        };
    }
}

/// The environment's layout (SDM volume 1, figures 8-9 to 8-12).
#[derive(Clone, Copy)]
struct Layout {
    /// 32-bit fields (28 bytes) or 16-bit fields (14 bytes).
    long: bool,
    /// Protected mode: selectors and offsets; else linear addresses.
    protected: bool,
}

impl Layout {
    fn of(cpu: &Cpu, long: bool) -> Self {
        Self {
            long,
            protected: cpu.mode.contains(Mode::PROTECTED),
        }
    }

    fn size(self) -> usize {
        if self.long { 28 } else { 14 }
    }

    fn write(self, unit: &X87, to: &mut [u8]) {
        let (ip, dp) = (unit.instruction as u32, unit.data as u32);
        let opcode = u32::from(unit.opcode & 0x7ff);
        let (cs, ds) = (
            u32::from(unit.instruction_segment),
            u32::from(unit.data_segment),
        );
        let head = [unit.control, unit.status, unit.tag_word()].map(u32::from);
        let tail = match (self.protected, self.long) {
            (true, true) => [ip, cs | opcode << 16, dp, ds | 0xffff_0000],
            (true, false) => [ip, cs, dp, ds],
            (false, true) => [
                ip & 0xffff | 0xffff_0000,
                opcode | ip >> 16 << 12,
                dp & 0xffff | 0xffff_0000,
                dp >> 16 << 12,
            ],
            (false, false) => [ip, ip >> 4 & 0xf000 | opcode, dp, dp >> 4 & 0xf000],
        };
        for (i, word) in head.into_iter().enumerate() {
            self.put(to, i, word | 0xffff_0000);
        }
        for (i, word) in tail.into_iter().enumerate() {
            self.put(to, i + 3, word);
        }
    }

    fn put(self, to: &mut [u8], index: usize, value: u32) {
        if self.long {
            to[index * 4..index * 4 + 4].copy_from_slice(&value.to_le_bytes());
        } else {
            to[index * 2..index * 2 + 2].copy_from_slice(&(value as u16).to_le_bytes());
        }
    }

    fn get(self, from: &[u8], index: usize) -> u32 {
        let size = if self.long { 4 } else { 2 };
        let bytes = &from[index * size..(index + 1) * size];
        bytes
            .iter()
            .rev()
            .fold(0, |value, byte| value << 8 | u32::from(*byte))
    }

    fn read(self, unit: &mut X87, from: &[u8]) {
        let word = |i| self.get(from, i);
        unit.control = word(0) as u16 & CONTROL | 0x40;
        unit.status = word(1) as u16;
        unit.set_tag_word(word(2) as u16);
        unit.derive_pending();
        let (ip, second, dp, fourth) = (word(3), word(4), word(5), word(6));
        let (high_ip, high_dp) = match (self.protected, self.long) {
            (true, _) => (0, 0),
            (false, true) => (second >> 12 << 16, fourth >> 12 << 16),
            (false, false) => (second >> 12 << 16, fourth >> 12 << 16),
        };
        let low = if self.protected { u32::MAX } else { 0xffff };
        unit.instruction = u64::from(ip & low | high_ip);
        unit.data = u64::from(dp & low | high_dp);
        // Processors that say so in CPUID keep no selectors.
        unit.instruction_segment = 0;
        unit.data_segment = 0;
        match (self.protected, self.long) {
            (true, true) => unit.opcode = (second >> 16) as u16 & 0x7ff,
            (true, false) => {}
            (false, _) => unit.opcode = second as u16 & 0x7ff,
        }
    }
}

fn address(cpu: &mut Cpu, op: &Op, size: usize, access: Access) -> Result<u64> {
    let linear = cpu.linear_op(op, size as u64, access)?;
    cpu.probe(linear, size as u64, access, op.seg)?;
    Ok(linear)
}

/// FNSTENV.
pub(crate) fn store_environment<const LONG: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let layout = Layout::of(cpu, LONG);
    let mut bytes = [0; 28];
    layout.write(&cpu.x87, &mut bytes);
    let linear = address(cpu, op, layout.size(), Access::Write)?;
    cpu.store_bytes(linear, &bytes[..layout.size()])?;
    cpu.x87.control |= EXCEPTIONS;
    cpu.x87.derive_pending();
    Ok(())
}

/// FLDENV.
pub(crate) fn load_environment<const LONG: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.check_pending_x87()?;
    let layout = Layout::of(cpu, LONG);
    let mut bytes = [0; 28];
    let linear = address(cpu, op, layout.size(), Access::Read)?;
    cpu.load_bytes(linear, &mut bytes[..layout.size()])?;
    layout.read(&mut cpu.x87, &bytes);
    Ok(())
}

/// FNSAVE.
pub(crate) fn save<const LONG: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let layout = Layout::of(cpu, LONG);
    let size = layout.size();
    let mut bytes = [0; 108];
    layout.write(&cpu.x87, &mut bytes);
    for i in 0..8 {
        let (significand, rest) = cpu.x87.registers[(cpu.x87.top() + i) & 7];
        let at = size + i * 10;
        bytes[at..at + 8].copy_from_slice(&significand.to_le_bytes());
        bytes[at + 8..at + 10].copy_from_slice(&rest.to_le_bytes());
    }
    let linear = address(cpu, op, size + 80, Access::Write)?;
    cpu.store_bytes(linear, &bytes[..size + 80])?;
    cpu.x87.initialize();
    Ok(())
}

/// FRSTOR.
pub(crate) fn restore<const LONG: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.check_pending_x87()?;
    let layout = Layout::of(cpu, LONG);
    let size = layout.size();
    let mut bytes = [0; 108];
    let linear = address(cpu, op, size + 80, Access::Read)?;
    cpu.load_bytes(linear, &mut bytes[..size + 80])?;
    layout.read(&mut cpu.x87, &bytes);
    let top = cpu.x87.top();
    for (i, image) in bytes[size..size + 80].chunks_exact(10).enumerate() {
        let significand = u64::from_le_bytes(image[..8].try_into().unwrap_or_default());
        let rest = u16::from_le_bytes([image[8], image[9]]);
        cpu.x87.registers[(top + i) & 7] = (significand, rest);
    }
    Ok(())
}

/// FLDCW.
pub(crate) fn load_control(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.check_pending_x87()?;
    let value = cpu.read_op::<u16>(op)?;
    cpu.x87.set_control(value);
    Ok(())
}

/// FNSTCW.
pub(crate) fn store_control(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value = cpu.x87.control;
    cpu.write_op(op, value)
}

/// FNSTSW to memory.
pub(crate) fn store_status(cpu: &mut Cpu, op: &Op) -> Result<()> {
    let value = cpu.x87.status;
    cpu.write_op(op, value)
}

/// FNSTSW AX.
pub(crate) fn status_to_ax(cpu: &mut Cpu, _: &Op) -> Result<()> {
    let value = cpu.x87.status;
    cpu.regs.set::<u16>(
        crate::cpu::RegisterFile::offset(x86_defs::state::RAX),
        value,
    );
    Ok(())
}

/// FNCLEX.
pub(crate) fn clear_exceptions(cpu: &mut Cpu, _: &Op) -> Result<()> {
    cpu.x87.status &= 0x7f00;
    Ok(())
}

/// FNINIT.
pub(crate) fn initialize(cpu: &mut Cpu, _: &Op) -> Result<()> {
    cpu.x87.initialize();
    Ok(())
}
