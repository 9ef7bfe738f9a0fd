//! FXSAVE, FXRSTOR and the XSAVE family (SDM volume 1, sections 10.5 and 13.4 to 13.12).

use x86_defs::control::{Cr0, Cr4, Xcr0};
use x86_defs::exception;
use x86_defs::state::{RAX, RDX};

use super::control::XCR0_KNOWN;
use crate::cpu::{Access, Cpu, Exception, Op, Result};
use crate::simd::{MXCSR_MASK, Vectors};
use crate::x87::X87;

/// Where the header is.
const HEADER: usize = 512;
/// Where the AVX component is, in both formats.
pub(super) const AVX_OFFSET: usize = 576;
/// Bytes of the AVX component.
pub(super) const AVX_SIZE: usize = 256;
/// Bytes of the whole area.
pub(super) const SIZE: usize = AVX_OFFSET + AVX_SIZE;
/// XCOMP_BV: the area is compacted.
const COMPACTED: u64 = 1 << 63;

const X87_BIT: u64 = Xcr0::X87.bits();
const SSE_BIT: u64 = Xcr0::SSE.bits();
const AVX_BIT: u64 = Xcr0::AVX.bits();

/// Bytes that XSAVE needs for these components.
pub(super) fn size_of(components: Xcr0) -> usize {
    if components.contains(Xcr0::AVX) {
        SIZE
    } else {
        AVX_OFFSET
    }
}

/// An XSAVE area.
pub(super) type Area = [u8; SIZE];

fn put(area: &mut [u8], at: usize, bytes: &[u8]) {
    area[at..at + bytes.len()].copy_from_slice(bytes);
}

fn get<const N: usize>(area: &[u8], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&area[at..at + N]);
    bytes
}

fn get_u64(area: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(get(area, at))
}

/// The x87 part of the legacy area. `wide` stores 64-bit pointers instead of 32-bit ones with selectors.
fn put_x87(area: &mut [u8], x87: &X87, wide: bool) {
    put(area, 0, &x87.control.to_le_bytes());
    put(area, 2, &x87.status.to_le_bytes());
    put(area, 4, &[x87.tags, 0]);
    put(area, 6, &x87.opcode.to_le_bytes());
    put(area, 8, &x87.instruction.to_le_bytes());
    put(area, 16, &x87.data.to_le_bytes());
    if !wide {
        put(area, 12, &u32::from(x87.instruction_segment).to_le_bytes());
        put(area, 20, &u32::from(x87.data_segment).to_le_bytes());
    }
    let top = usize::from(x87.status >> 11 & 7);
    for i in 0..8 {
        let (significand, exponent) = x87.registers[(top + i) & 7];
        put(area, 32 + i * 16, &significand.to_le_bytes());
        put(area, 40 + i * 16, &exponent.to_le_bytes());
        put(area, 42 + i * 16, &[0; 6]);
    }
}

fn get_x87(area: &[u8], wide: bool) -> X87 {
    let mut x87 = X87 {
        control: u16::from_le_bytes(get(area, 0)) & 0x1f7f | 0x40,
        status: u16::from_le_bytes(get(area, 2)),
        tags: area[4],
        opcode: u16::from_le_bytes(get(area, 6)) & 0x7ff,
        instruction: get_u64(area, 8),
        data: get_u64(area, 16),
        ..X87::default()
    };
    if !wide {
        x87.instruction &= 0xffff_ffff;
        x87.data &= 0xffff_ffff;
        x87.instruction_segment = u16::from_le_bytes(get(area, 12));
        x87.data_segment = u16::from_le_bytes(get(area, 20));
    }
    let top = usize::from(x87.status >> 11 & 7);
    for i in 0..8 {
        let significand = get_u64(area, 32 + i * 16);
        let exponent = u16::from_le_bytes(get(area, 40 + i * 16));
        x87.registers[(top + i) & 7] = (significand, exponent);
    }
    x87
}

fn put_xmm(area: &mut [u8], vectors: &Vectors, count: usize) {
    for (i, register) in vectors.ymm.iter().take(count).enumerate() {
        put(area, 160 + i * 16, &register[0].to_le_bytes());
    }
}

fn get_xmm(area: &[u8], vectors: &mut Vectors, count: usize) {
    for (i, register) in vectors.ymm.iter_mut().take(count).enumerate() {
        register[0] = u128::from_le_bytes(get(area, 160 + i * 16));
    }
}

fn put_upper(area: &mut [u8], vectors: &Vectors, count: usize) {
    for (i, register) in vectors.ymm.iter().take(count).enumerate() {
        put(area, AVX_OFFSET + i * 16, &register[1].to_le_bytes());
    }
}

fn get_upper(area: &[u8], vectors: &mut Vectors, count: usize) {
    for (i, register) in vectors.ymm.iter_mut().take(count).enumerate() {
        register[1] = u128::from_le_bytes(get(area, AVX_OFFSET + i * 16));
    }
}

fn put_mxcsr(area: &mut [u8], mxcsr: u32) {
    put(area, 24, &mxcsr.to_le_bytes());
    put(area, 28, &MXCSR_MASK.to_le_bytes());
}

impl Cpu {
    /// How many vector registers the mode has.
    fn vector_count(&self) -> usize {
        if self.mode.is_64bit() { 16 } else { 8 }
    }

    /// The components that are not in their initial state (XINUSE).
    pub(super) fn components_in_use(&self) -> u64 {
        let x = &self.x87;
        let initial = X87::default();
        let x87 = x.control != initial.control
            || x.status != 0
            || x.tags != 0
            || x.opcode != 0
            || x.instruction != 0
            || x.data != 0
            || x.registers.iter().any(|r| *r != (0, 0));
        let sse = self.vectors.ymm.iter().any(|r| r[0] != 0);
        let avx = self.vectors.ymm.iter().any(|r| r[1] != 0);
        u64::from(x87) | u64::from(sse) << 1 | u64::from(avx) << 2
    }

    fn check_fx(&mut self) -> Result<()> {
        if self.cr0.contains(Cr0::EM) {
            return Err(self.ud());
        }
        self.check_not_switched()
    }

    fn check_not_switched(&mut self) -> Result<()> {
        if self.cr0.contains(Cr0::TS) {
            return Err(self.raise(Exception::Plain(exception::NM)));
        }
        Ok(())
    }

    fn check_xsave(&mut self) -> Result<()> {
        if !self.cr4.contains(Cr4::OSXSAVE) {
            return Err(self.ud());
        }
        self.check_not_switched()
    }

    /// The operand's address, which must be a multiple of `align`.
    fn area_address(&mut self, op: &Op, align: u64, access: Access) -> Result<u64> {
        let linear = self.linear_op(op, 512, access)?;
        if linear & (align - 1) != 0 {
            return Err(self.gp(0));
        }
        if self.mode.is_64bit() && !super::canonical(linear) {
            let stack =
                usize::from(op.seg) == x86_defs::state::SS || op.seg == crate::cpu::FLAT_STACK;
            return Err(if stack { self.ss(0) } else { self.gp(0) });
        }
        Ok(linear)
    }

    /// The requested-feature bitmap: what EDX:EAX asks for of what is enabled.
    fn requested(&self) -> u64 {
        let asked = self.regs[RDX] << 32 | self.regs[RAX] & 0xffff_ffff;
        asked & self.xcr0.bits()
    }

    /// Writes the components of `which` into the area at `linear`.
    fn store_components(&mut self, linear: u64, which: u64, mxcsr: bool, wide: bool) -> Result<()> {
        let mut area: Area = [0; SIZE];
        let count = self.vector_count();
        put_x87(&mut area, &self.x87, wide);
        put_mxcsr(&mut area, self.vectors.mxcsr);
        put_xmm(&mut area, &self.vectors, count);
        put_upper(&mut area, &self.vectors, count);
        let at = |offset: usize| linear.wrapping_add(offset as u64);
        if which & X87_BIT != 0 {
            self.store_bytes(linear, &area[..24])?;
            self.store_bytes(at(32), &area[32..160])?;
        }
        if mxcsr {
            self.store_bytes(at(24), &area[24..32])?;
        }
        if which & SSE_BIT != 0 {
            self.store_bytes(at(160), &area[160..160 + count * 16])?;
        }
        if which & AVX_BIT != 0 {
            self.store_bytes(at(AVX_OFFSET), &area[AVX_OFFSET..AVX_OFFSET + count * 16])?;
        }
        Ok(())
    }

    /// XSAVE and XSAVEOPT.
    fn xsave_standard(&mut self, op: &Op, wide: bool, optimize: bool) -> Result<()> {
        self.check_xsave()?;
        let linear = self.area_address(op, 64, Access::Write)?;
        let requested = self.requested();
        let in_use = self.components_in_use();
        let header = linear.wrapping_add(HEADER as u64);
        self.probe(linear, size_of(self.xcr0) as u64, Access::Write, op.seg)?;
        let old: u64 = self.load(header)?;
        let written = if optimize {
            requested & in_use
        } else {
            requested
        };
        let mxcsr = requested & (SSE_BIT | AVX_BIT) != 0;
        self.store_components(linear, written, mxcsr, wide)?;
        self.store(header, old & !requested | in_use & requested)
    }

    /// XSAVEC and XSAVES: the compacted format, which for the components that there are has the same layout.
    fn xsave_compacted(&mut self, op: &Op, wide: bool, supervisor: bool) -> Result<()> {
        self.check_xsave()?;
        if supervisor {
            self.need_supervisor()?;
        }
        let linear = self.area_address(op, 64, Access::Write)?;
        let requested = self.requested();
        // MXCSR away from its default counts as SSE state in use.
        let mxcsr_used = u64::from(self.vectors.mxcsr != 0x1f80) << 1;
        let written = requested & (self.components_in_use() | mxcsr_used);
        let header = linear.wrapping_add(HEADER as u64);
        let size = if requested & AVX_BIT != 0 {
            SIZE
        } else {
            AVX_OFFSET
        };
        self.probe(linear, size as u64, Access::Write, op.seg)?;
        self.store_components(linear, written, written & SSE_BIT != 0, wide)?;
        self.store(header, written)?;
        self.store(header.wrapping_add(8), COMPACTED | requested)
    }

    /// XRSTOR and XRSTORS.
    fn xrstor(&mut self, op: &Op, wide: bool, supervisor: bool) -> Result<()> {
        self.check_xsave()?;
        if supervisor {
            self.need_supervisor()?;
        }
        let linear = self.area_address(op, 64, Access::Read)?;
        let requested = self.requested();
        let mut header = [0; 64];
        self.load_bytes(linear.wrapping_add(HEADER as u64), &mut header)?;
        let (present, layout) = (get_u64(&header, 0), get_u64(&header, 8));
        let compacted = layout & COMPACTED != 0;
        let good = if compacted {
            let known = XCR0_KNOWN.bits() & self.xcr0.bits();
            layout & !(COMPACTED | known) == 0
                && present & !layout == 0
                && header[16..].iter().all(|b| *b == 0)
        } else {
            !supervisor && present & !self.xcr0.bits() == 0 && header[8..24].iter().all(|b| *b == 0)
        };
        if !good {
            return Err(self.gp(0));
        }
        self.load_components(linear, requested, present, compacted, wide)
    }

    fn load_components(
        &mut self,
        linear: u64,
        requested: u64,
        present: u64,
        compacted: bool,
        wide: bool,
    ) -> Result<()> {
        let mut area: Area = [0; SIZE];
        let read = requested & present;
        let mxcsr_wanted = if compacted {
            read & SSE_BIT != 0
        } else {
            requested & (SSE_BIT | AVX_BIT) != 0
        };
        if read & (X87_BIT | SSE_BIT) != 0 || mxcsr_wanted {
            self.load_bytes(linear, &mut area[..416])?;
        }
        if read & AVX_BIT != 0 {
            let at = linear.wrapping_add(AVX_OFFSET as u64);
            self.load_bytes(at, &mut area[AVX_OFFSET..])?;
        }
        let mxcsr = if mxcsr_wanted {
            u32::from_le_bytes(get(&area, 24))
        } else if compacted && requested & SSE_BIT != 0 {
            0x1f80
        } else {
            self.vectors.mxcsr
        };
        if mxcsr & !MXCSR_MASK != 0 {
            return Err(self.gp(0));
        }
        self.vectors.mxcsr = mxcsr;
        let count = self.vector_count();
        if requested & X87_BIT != 0 {
            self.x87 = if read & X87_BIT != 0 {
                get_x87(&area, wide)
            } else {
                X87::default()
            };
        }
        if requested & SSE_BIT != 0 {
            if read & SSE_BIT == 0 {
                area[160..416].fill(0);
            }
            get_xmm(&area, &mut self.vectors, count);
        }
        if requested & AVX_BIT != 0 {
            get_upper(&area, &mut self.vectors, count);
        }
        Ok(())
    }

    /// The XSAVE area of a saved state, in the standard format.
    pub(super) fn save_area(&self) -> Vec<u8> {
        let mut area: Area = [0; SIZE];
        put_x87(&mut area, &self.x87, true);
        put_mxcsr(&mut area, self.vectors.mxcsr);
        put_xmm(&mut area, &self.vectors, 16);
        put_upper(&mut area, &self.vectors, 16);
        let all = XCR0_KNOWN.bits();
        put(&mut area, HEADER, &all.to_le_bytes());
        area.to_vec()
    }

    /// Takes over an XSAVE area of a saved state.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn restore_area(&mut self, saved: &[u8]) -> std::result::Result<(), String> {
        if saved.len() < AVX_OFFSET {
            return Err(format!("{} bytes of XSAVE area are too few", saved.len()));
        }
        let mut area: Area = [0; SIZE];
        let n = saved.len().min(SIZE);
        area[..n].copy_from_slice(&saved[..n]);
        let present = get_u64(&area, HEADER);
        let mxcsr = u32::from_le_bytes(get(&area, 24));
        if mxcsr & !MXCSR_MASK != 0 {
            return Err(format!("MXCSR {mxcsr:#x} has reserved bits set"));
        }
        self.x87 = if present & X87_BIT != 0 {
            get_x87(&area, true)
        } else {
            X87::default()
        };
        self.vectors = Vectors::default();
        if present & (SSE_BIT | AVX_BIT) != 0 {
            self.vectors.mxcsr = mxcsr;
        }
        if present & SSE_BIT != 0 {
            get_xmm(&area, &mut self.vectors, 16);
        }
        if present & AVX_BIT != 0 {
            get_upper(&area, &mut self.vectors, 16);
        }
        Ok(())
    }
}

/// FXSAVE; `WIDE` is the form with REX.W.
pub(super) fn fxsave<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.check_fx()?;
    let linear = cpu.area_address(op, 16, Access::Write)?;
    let mut area: Area = [0; SIZE];
    put_x87(&mut area, &cpu.x87, WIDE);
    let mut len = 160;
    if cpu.cr4.contains(Cr4::OSFXSR) {
        put_mxcsr(&mut area, cpu.vectors.mxcsr);
        let count = cpu.vector_count();
        put_xmm(&mut area, &cpu.vectors, count);
        len += count * 16;
    }
    cpu.store_bytes(linear, &area[..len])
}

/// FXRSTOR; `WIDE` is the form with REX.W.
pub(super) fn fxrstor<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.check_fx()?;
    let linear = cpu.area_address(op, 16, Access::Read)?;
    let mut area = [0; 416];
    cpu.load_bytes(linear, &mut area)?;
    if cpu.cr4.contains(Cr4::OSFXSR) {
        let mxcsr = u32::from_le_bytes(get(&area, 24));
        if mxcsr & !MXCSR_MASK != 0 {
            return Err(cpu.gp(0));
        }
        cpu.vectors.mxcsr = mxcsr;
        let count = cpu.vector_count();
        get_xmm(&area, &mut cpu.vectors, count);
    }
    cpu.x87 = get_x87(&area, WIDE);
    Ok(())
}

pub(super) fn xsave<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.xsave_standard(op, WIDE, false)
}

pub(super) fn xsaveopt<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.xsave_standard(op, WIDE, true)
}

pub(super) fn xsavec<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.xsave_compacted(op, WIDE, false)
}

pub(super) fn xsaves<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.xsave_compacted(op, WIDE, true)
}

pub(super) fn xrstor<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.xrstor(op, WIDE, false)
}

pub(super) fn xrstors<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Result<()> {
    cpu.xrstor(op, WIDE, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_legacy_area_is_relative_to_the_top_of_stack() {
        let mut x87 = X87 {
            status: 3 << 11,
            tags: 0b1000,
            control: 0x27f,
            instruction: 0x1234_5678_9abc,
            ..X87::default()
        };
        x87.registers[3] = (0x8000_0000_0000_0001, 0x3fff);
        x87.registers[2] = (7, 0xc000);
        let mut area = [0; 512];
        put_x87(&mut area, &x87, true);
        assert_eq!(get_u64(&area, 32), 0x8000_0000_0000_0001);
        assert_eq!(u16::from_le_bytes(get(&area, 40)), 0x3fff);
        assert_eq!(get_u64(&area, 32 + 7 * 16), 7);
        let back = get_x87(&area, true);
        assert_eq!(back.registers, x87.registers);
        assert_eq!(
            (back.status, back.tags, back.control),
            (3 << 11, 0b1000, 0x27f)
        );
        assert_eq!(back.instruction, 0x1234_5678_9abc);
        x87.instruction_segment = 0x10;
        put_x87(&mut area, &x87, false);
        let back = get_x87(&area, false);
        assert_eq!(
            (back.instruction, back.instruction_segment),
            (0x5678_9abc, 0x10)
        );
    }

    #[test]
    fn vector_halves_keep_their_places() {
        let mut v = Vectors::default();
        v.ymm[9] = [0x1111, 0x2222];
        let mut area: Area = [0; SIZE];
        put_xmm(&mut area, &v, 16);
        put_upper(&mut area, &v, 16);
        assert_eq!(get_u64(&area, 160 + 9 * 16), 0x1111);
        assert_eq!(get_u64(&area, 576 + 9 * 16), 0x2222);
        let mut back = Vectors::default();
        get_xmm(&area, &mut back, 16);
        get_upper(&area, &mut back, 16);
        assert_eq!(back.ymm[9], [0x1111, 0x2222]);
    }
}
