//! Guest memory as instructions see it: segment checks, translation, page crossing, device space.
//!
//! Three layers: *operands* (`read_op`, `write_op`, `update_op`: the memory operand of an [`Op`]), *segmented* addresses
//! (`read`, `write`: a segment number and an offset) and *linear* addresses (`load`, `store` and bulk copies). All of
//! them fault before anything is written, also where an access crosses pages.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use x86_defs::state::SS;

use super::op::{FLAT, FLAT_STACK};
use super::{Cpu, Ea, Fault, Mode, Op, Privilege, Result};

/// What an access does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Data read.
    Read,
    /// Data write, or read and write.
    Write,
    /// Instruction fetch.
    Fetch,
}

/// Where a linear address lies.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mapping {
    /// Guest-physical address of the byte.
    pub(crate) physical: u64,
    /// Host address of the byte, or null for device space (and for ROM when the access is a write).
    pub(crate) host: *mut u8,
    /// The page's flag byte ([`guest_memory::Backing::page_flag`]) where `host` is not null.
    pub(crate) flag: *const AtomicU8,
}

/// An integer that memory and registers can hold.
pub(crate) trait Value: Copy + Eq + Default + Send + Sync + 'static {
    /// Bits.
    const BITS: u32 = size_of::<Self>() as u32 * 8;
    /// Zero-extended (the low half of a `u128`).
    fn to_u64(self) -> u64;
    /// Truncated (zero-extended to a `u128`).
    fn from_u64(value: u64) -> Self;
    /// From little-endian bytes, exactly as many as the type has.
    fn from_bytes(bytes: &[u8]) -> Self;
    /// Little-endian bytes into the start of `to`.
    fn to_bytes(self, to: &mut [u8]);
    /// Atomic compare-exchange at a host address: true when `old` was there.
    ///
    /// # Safety
    /// `host` is valid for the type and aligned for it.
    unsafe fn compare_exchange(host: *mut u8, old: Self, new: Self) -> bool;
}

macro_rules! value {
    ($type:ty, $atomic:ty) => {
        impl Value for $type {
            #[inline(always)]
            #[allow(clippy::cast_lossless)]
            fn to_u64(self) -> u64 {
                self as u64
            }
            #[inline(always)]
            fn from_u64(value: u64) -> Self {
                value as $type
            }
            fn from_bytes(bytes: &[u8]) -> Self {
                let mut array = [0; size_of::<Self>()];
                array.copy_from_slice(&bytes[..size_of::<Self>()]);
                Self::from_le_bytes(array)
            }
            fn to_bytes(self, to: &mut [u8]) {
                to[..size_of::<Self>()].copy_from_slice(&self.to_le_bytes());
            }
            #[inline(always)]
            unsafe fn compare_exchange(host: *mut u8, old: Self, new: Self) -> bool {
                // SAFETY: the caller's promise.
                unsafe { <$atomic>::from_ptr(host.cast()) }
                    .compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst)
                    .is_ok()
            }
        }
    };
}
value!(u8, AtomicU8);
value!(u16, AtomicU16);
value!(u32, AtomicU32);
value!(u64, AtomicU64);

impl Value for u128 {
    #[inline(always)]
    fn to_u64(self) -> u64 {
        self as u64
    }
    #[inline(always)]
    fn from_u64(value: u64) -> Self {
        u128::from(value)
    }
    fn from_bytes(bytes: &[u8]) -> Self {
        let mut array = [0; 16];
        array.copy_from_slice(&bytes[..16]);
        Self::from_le_bytes(array)
    }
    fn to_bytes(self, to: &mut [u8]) {
        to[..16].copy_from_slice(&self.to_le_bytes());
    }
    #[inline(always)]
    unsafe fn compare_exchange(host: *mut u8, old: Self, new: Self) -> bool {
        let (low, high) = (new as u64, (new >> 64) as u64);
        let done: u8;
        // SAFETY: sixteen valid, aligned bytes by the caller's promise. RBX is saved around its use because the compiler
        // keeps it for itself.
        unsafe {
            std::arch::asm!(
                "xchg rbx, {low}",
                "lock cmpxchg16b [{host}]",
                "sete {done}",
                "mov rbx, {low}",
                low = inout(reg) low => _,
                host = in(reg) host,
                done = lateout(reg_byte) done,
                in("rcx") high,
                inout("rax") old as u64 => _,
                inout("rdx") (old >> 64) as u64 => _,
                options(nostack),
            );
        }
        done != 0
    }
}

impl Cpu {
    /// The effective address of the memory operand: the offset, not yet in a segment.
    #[inline(always)]
    pub(crate) fn ea(&self, op: &Op) -> u64 {
        let base: u64 = self.regs.get(op.base);
        let index: u64 = self.regs.get(op.index);
        let sum = base
            .wrapping_add(index << (op.scale & 3))
            .wrapping_add(op.disp as u64);
        match op.ea() {
            Ea::Flat64 | Ea::None => sum,
            Ea::Seg16 => sum & 0xffff,
            Ea::Flat32 | Ea::Long32 | Ea::Seg32 => sum & 0xffff_ffff,
        }
    }

    /// The linear address of the memory operand, `size` bytes, with the segment checked.
    #[inline(always)]
    pub(crate) fn linear_op(&mut self, op: &Op, size: u64, access: Access) -> Result<u64> {
        let base: u64 = self.regs.get(op.base);
        let index: u64 = self.regs.get(op.index);
        let sum = base
            .wrapping_add(index << (op.scale & 3))
            .wrapping_add(op.disp as u64);
        if op.ea_len & 15 == Ea::Flat64 as u8 {
            return Ok(sum.wrapping_add(self.bases[(op.seg & 7) as usize]));
        }
        if op.ea_len & 15 == Ea::Flat32 as u8 {
            return Ok(sum & 0xffff_ffff);
        }
        self.linear_op_checked(op, sum, size, access)
    }

    #[inline(never)]
    fn linear_op_checked(&mut self, op: &Op, sum: u64, size: u64, access: Access) -> Result<u64> {
        match op.ea() {
            Ea::Long32 => Ok((sum & 0xffff_ffff).wrapping_add(self.bases[(op.seg & 7) as usize])),
            Ea::Seg16 => self.linear(op.seg, sum & 0xffff, size, access),
            _ => self.linear(op.seg, sum & 0xffff_ffff, size, access),
        }
    }

    /// The linear address of `size` bytes at `offset` in a segment, with limit and type checked outside 64-bit mode. `seg`
    /// is a segment number, [`FLAT`] or [`FLAT_STACK`].
    pub(crate) fn linear(
        &mut self,
        seg: u8,
        offset: u64,
        size: u64,
        access: Access,
    ) -> Result<u64> {
        let linear = self.bases[(seg & 7) as usize].wrapping_add(offset);
        if self.mode.is_64bit() {
            return Ok(linear);
        }
        if seg < FLAT && !self.segment_allows(usize::from(seg), offset, size, access) {
            return Err(if usize::from(seg) == SS {
                self.ss(0)
            } else {
                self.gp(0)
            });
        }
        Ok(linear & 0xffff_ffff)
    }

    /// Reads the memory operand.
    #[inline(always)]
    pub(crate) fn read_op<T: Value>(&mut self, op: &Op) -> Result<T> {
        let linear = self.linear_op(op, size_of::<T>() as u64, Access::Read)?;
        self.load_in(linear, op.seg)
    }

    /// Writes the memory operand.
    #[inline(always)]
    pub(crate) fn write_op<T: Value>(&mut self, op: &Op, value: T) -> Result<()> {
        let linear = self.linear_op(op, size_of::<T>() as u64, Access::Write)?;
        self.store_in(linear, value, op.seg)
    }

    /// Reads the memory operand and replaces it, not atomically. Returns the old value.
    #[inline(always)]
    pub(crate) fn update_op<T: Value>(
        &mut self,
        op: &Op,
        f: impl FnOnce(&mut Self, T) -> T,
    ) -> Result<T> {
        let linear = self.linear_op(op, size_of::<T>() as u64, Access::Write)?;
        self.update(linear, op.seg, f)
    }

    /// Reads the memory operand and replaces it in one atomic step. `f` may be called several times. Returns the old value.
    pub(crate) fn update_op_locked<T: Value>(
        &mut self,
        op: &Op,
        f: impl FnMut(&mut Self, T) -> T,
    ) -> Result<T> {
        let linear = self.linear_op(op, size_of::<T>() as u64, Access::Write)?;
        self.update_locked(linear, op.seg, f)
    }

    /// Reads from a segment.
    pub(crate) fn read<T: Value>(&mut self, seg: u8, offset: u64) -> Result<T> {
        let linear = self.linear(seg, offset, size_of::<T>() as u64, Access::Read)?;
        self.load_in(linear, seg)
    }

    /// Writes to a segment.
    pub(crate) fn write<T: Value>(&mut self, seg: u8, offset: u64, value: T) -> Result<()> {
        let linear = self.linear(seg, offset, size_of::<T>() as u64, Access::Write)?;
        self.store_in(linear, value, seg)
    }

    /// Reads from a linear address.
    #[inline(always)]
    pub(crate) fn load<T: Value>(&mut self, linear: u64) -> Result<T> {
        self.load_in(linear, FLAT)
    }

    /// Writes to a linear address.
    #[inline(always)]
    pub(crate) fn store<T: Value>(&mut self, linear: u64, value: T) -> Result<()> {
        self.store_in(linear, value, FLAT)
    }

    /// As [`Self::load`]; `seg` says whether a non-canonical address is a stack fault.
    #[inline(always)]
    pub(crate) fn load_in<T: Value>(&mut self, linear: u64, seg: u8) -> Result<T> {
        if let Some(host) = self.tlb.read_hit(linear, size_of::<T>()) {
            // SAFETY: the entry maps the page to host memory that stays mapped while the entry is there, and the access lies
            // inside the page.
            return Ok(unsafe { host.cast::<T>().read_unaligned() });
        }
        self.load_slow(linear, seg)
    }

    /// As [`Self::store`]; `seg` says whether a non-canonical address is a stack fault.
    #[inline(always)]
    pub(crate) fn store_in<T: Value>(&mut self, linear: u64, value: T, seg: u8) -> Result<()> {
        if let Some((host, flag)) = self.tlb.write_hit(linear, size_of::<T>()) {
            // SAFETY: as in `load_in`; the flag lives as long as the memory.
            unsafe {
                host.cast::<T>().write_unaligned(value);
                if (*flag).load(Ordering::Relaxed) != 0 {
                    self.note_write(host, size_of::<T>());
                }
            }
            return Ok(());
        }
        self.store_slow(linear, value, seg)
    }

    /// Reads a linear address and replaces it, not atomically.
    #[inline(always)]
    pub(crate) fn update<T: Value>(
        &mut self,
        linear: u64,
        seg: u8,
        f: impl FnOnce(&mut Self, T) -> T,
    ) -> Result<T> {
        if let Some((host, flag)) = self.tlb.write_hit(linear, size_of::<T>()) {
            // SAFETY: as in `store_in`. `f` computes and does not touch the TLB.
            unsafe {
                let old = host.cast::<T>().read_unaligned();
                let new = f(self, old);
                host.cast::<T>().write_unaligned(new);
                if (*flag).load(Ordering::Relaxed) != 0 {
                    self.note_write(host, size_of::<T>());
                }
                return Ok(old);
            }
        }
        self.probe(linear, size_of::<T>() as u64, Access::Write, seg)?;
        let old = self.load_slow(linear, seg)?;
        let new = f(self, old);
        self.store_slow(linear, new, seg)?;
        Ok(old)
    }

    /// Reads a linear address and replaces it atomically. A misaligned access is atomic only with respect to other such
    /// accesses where it lies inside one page.
    pub(crate) fn update_locked<T: Value>(
        &mut self,
        linear: u64,
        seg: u8,
        mut f: impl FnMut(&mut Self, T) -> T,
    ) -> Result<T> {
        let size = size_of::<T>();
        if linear & (size as u64 - 1) != 0 {
            let machine = self.machine.clone();
            let _bus = machine.bus.lock();
            return self.update(linear, seg, f);
        }
        let mapping = self.map_for(linear, Access::Write, seg, Privilege::Current)?;
        if mapping.host.is_null() {
            let old = self.load_slow(linear, seg)?;
            let new = f(self, old);
            self.store_slow(linear, new, seg)?;
            return Ok(old);
        }
        loop {
            // SAFETY: `map_for` gave the host address of this aligned access, which lies inside a page; `f` only computes.
            unsafe {
                let old = mapping.host.cast::<T>().read_volatile();
                let new = f(self, old);
                if T::compare_exchange(mapping.host, old, new) {
                    if (*mapping.flag).load(Ordering::Relaxed) != 0 {
                        self.note_write(mapping.host, size);
                    }
                    self.note_data_access(linear, size as u64, true);
                    return Ok(old);
                }
            }
        }
    }

    /// Reads a linear address as the processor itself does (descriptor tables, TSS): with supervisor privilege.
    pub(crate) fn load_system<T: Value>(&mut self, linear: u64) -> Result<T> {
        let mut bytes = [0; 16];
        let bytes = &mut bytes[..size_of::<T>()];
        self.copy_in(linear, bytes, FLAT, Privilege::System)?;
        Ok(T::from_bytes(bytes))
    }

    /// Writes a linear address as the processor itself does: with supervisor privilege.
    pub(crate) fn store_system<T: Value>(&mut self, linear: u64, value: T) -> Result<()> {
        let mut bytes = [0; 16];
        value.to_bytes(&mut bytes);
        self.copy_out(linear, &bytes[..size_of::<T>()], FLAT, Privilege::System)
    }

    /// Reads any number of bytes from a linear address.
    pub(crate) fn load_bytes(&mut self, linear: u64, to: &mut [u8]) -> Result<()> {
        self.copy_in(linear, to, FLAT, Privilege::Current)
    }

    /// Writes any number of bytes (at most a page) to a linear address; faults before anything is written.
    pub(crate) fn store_bytes(&mut self, linear: u64, from: &[u8]) -> Result<()> {
        self.copy_out(linear, from, FLAT, Privilege::Current)
    }

    /// Faults if an access of `size` bytes would.
    pub(crate) fn probe(&mut self, linear: u64, size: u64, access: Access, seg: u8) -> Result<()> {
        self.check_end(linear, size, seg, Privilege::Current)?;
        let last = self.wrap_linear(linear.wrapping_add(size - 1));
        self.map_for(linear, access, seg, Privilege::Current)?;
        if (linear ^ last) >> 12 != 0 {
            self.map_for(last & !0xfff, access, seg, Privilege::Current)?;
        }
        Ok(())
    }

    /// Linear addresses have 32 bits outside 64-bit mode.
    #[inline]
    pub(crate) fn wrap_linear(&self, linear: u64) -> u64 {
        if self.mode.is_64bit() {
            linear
        } else {
            linear & 0xffff_ffff
        }
    }

    /// Translates one linear address after checking that it is canonical.
    pub(crate) fn map_for(
        &mut self,
        linear: u64,
        access: Access,
        seg: u8,
        privilege: Privilege,
    ) -> Result<Mapping> {
        self.check_canonical(linear, seg)?;
        self.translate(linear, access, privilege)
    }

    /// #SS for the stack segment, #GP for the others.
    fn beyond_limit(&mut self, seg: u8) -> Fault {
        if seg == FLAT_STACK || usize::from(seg) == SS {
            self.ss(0)
        } else {
            self.gp(0)
        }
    }

    /// #GP or #SS for an address that is not canonical. An access is checked at its last byte first: that goes before page
    /// faults of its first.
    #[inline]
    fn check_canonical(&mut self, linear: u64, seg: u8) -> Result<()> {
        if self.mode.is_64bit() && !canonical(linear) {
            return Err(self.beyond_limit(seg));
        }
        Ok(())
    }

    /// Checks the last byte of an access. In flat 32-bit segments an access may go on from the end of the address space to its
    /// beginning on Intel's processors; on AMD's it is beyond the segment's limit.
    fn check_end(&mut self, linear: u64, len: u64, seg: u8, privilege: Privilege) -> Result<()> {
        let last = linear.wrapping_add(len.saturating_sub(1));
        let wraps = last > 0xffff_ffff
            && privilege == Privilege::Current
            && self.bases[usize::from(seg & 7)] == 0;
        if wraps && self.mode & (Mode::AMD | Mode::CODE64) == Mode::AMD {
            return Err(self.beyond_limit(seg));
        }
        self.check_canonical(self.wrap_linear(last), seg)
    }

    #[cold]
    #[inline(never)]
    fn load_slow<T: Value>(&mut self, linear: u64, seg: u8) -> Result<T> {
        let mut bytes = [0; 16];
        let bytes = &mut bytes[..size_of::<T>()];
        self.copy_in(linear, bytes, seg, Privilege::Current)?;
        Ok(T::from_bytes(bytes))
    }

    #[cold]
    #[inline(never)]
    fn store_slow<T: Value>(&mut self, linear: u64, value: T, seg: u8) -> Result<()> {
        let mut bytes = [0; 16];
        value.to_bytes(&mut bytes);
        self.copy_out(linear, &bytes[..size_of::<T>()], seg, Privilege::Current)
    }

    fn copy_in(&mut self, linear: u64, to: &mut [u8], seg: u8, privilege: Privilege) -> Result<()> {
        let len = to.len() as u64;
        let mut at = linear;
        let mut to = to;
        self.check_end(linear, len, seg, privilege)?;
        while !to.is_empty() {
            let n = to.len().min(0x1000 - (at & 0xfff) as usize);
            let mapping = self.map_for(at, Access::Read, seg, privilege)?;
            let (now, rest) = to.split_at_mut(n);
            if mapping.host.is_null() {
                self.device_read(mapping.physical, now);
            } else {
                // SAFETY: `n` bytes from the host address lie inside the page that the mapping is of.
                unsafe { copy_from_guest(mapping.host, now) };
            }
            to = rest;
            at = self.wrap_linear(at.wrapping_add(n as u64));
        }
        if privilege == Privilege::Current {
            self.note_data_access(linear, len, false);
        }
        Ok(())
    }

    fn copy_out(&mut self, linear: u64, from: &[u8], seg: u8, privilege: Privilege) -> Result<()> {
        let mut at = linear;
        self.check_end(linear, from.len() as u64, seg, privilege)?;
        // All pages must be writable before the first byte changes. Walks can't undo one another's mappings.
        let pages = ((linear & 0xfff) + from.len() as u64).div_ceil(0x1000);
        for _ in 0..pages {
            self.map_for(at, Access::Write, seg, privilege)?;
            at = self.wrap_linear((at & !0xfff).wrapping_add(0x1000));
        }
        at = linear;
        let len = from.len() as u64;
        let mut from = from;
        while !from.is_empty() {
            let n = from.len().min(0x1000 - (at & 0xfff) as usize);
            let mapping = self.map_for(at, Access::Write, seg, privilege)?;
            let (now, rest) = from.split_at(n);
            if mapping.host.is_null() {
                self.device_write(mapping.physical, now);
            } else {
                // SAFETY: as in `copy_in`; the flag lives as long as the memory.
                unsafe {
                    copy_to_guest(now, mapping.host);
                    if (*mapping.flag).load(Ordering::Relaxed) != 0 {
                        self.note_write(mapping.host, n);
                    }
                }
            }
            from = rest;
            at = self.wrap_linear(at.wrapping_add(n as u64));
        }
        if privilege == Privilege::Current {
            self.note_data_access(linear, len, true);
        }
        Ok(())
    }

    /// A read of device space: the local APIC or the machine. Any number of bytes inside a page.
    pub(crate) fn device_read(&mut self, physical: u64, to: &mut [u8]) {
        if self.apic_claims(physical) {
            return self.apic_mmio_read(physical, to);
        }
        let mut at = physical;
        for part in pieces(physical, to.len()) {
            let offset = (at - physical) as usize;
            self.outside(|io| io.mmio_read(at, &mut to[offset..offset + part]));
            at += part as u64;
        }
    }

    /// A write to device space.
    pub(crate) fn device_write(&mut self, physical: u64, from: &[u8]) {
        if self.apic_claims(physical) {
            return self.apic_mmio_write(physical, from);
        }
        let mut at = physical;
        for part in pieces(physical, from.len()) {
            let offset = (at - physical) as usize;
            self.outside(|io| io.mmio_write(at, &from[offset..offset + part]));
            at += part as u64;
        }
    }

    /// Takes note of a write that has happened at a host address where somebody asked for it.
    #[cold]
    #[inline(never)]
    pub(crate) fn note_write(&mut self, host: *mut u8, len: usize) {
        let host = host as usize;
        for region in self.memory_map.iter() {
            let start = region.backing.as_ptr() as usize;
            if (start..start + region.backing.len() as usize).contains(&host) {
                region.backing.note_write((host - start) as u64, len as u64);
                break;
            }
        }
        self.leave_block = true;
    }

    /// As [`Self::note_write`], for a page that is named by its flag byte's address.
    #[cold]
    pub(crate) fn note_write_by_flag(&mut self, flag: *const u8) {
        for region in self.memory_map.iter() {
            if let Some(page) = region.backing.page_of_flag(flag) {
                region.backing.note_write(page << 12, 1);
                break;
            }
        }
        self.leave_block = true;
    }
}

/// True for an address whose bits 47 to 63 are equal.
#[inline(always)]
pub(crate) fn canonical(linear: u64) -> bool {
    (linear as i64) << 16 >> 16 == linear as i64
}

/// Cuts an access to device space into pieces of at most eight bytes that are naturally aligned, or as the access is when
/// it has a size that a device can take whole.
fn pieces(address: u64, len: usize) -> impl Iterator<Item = usize> {
    let (mut at, mut left) = (address, len);
    std::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let whole = matches!(left, 1 | 2 | 4 | 8) && (at & 7) as usize + left <= 8;
        let aligned = 1usize << at.trailing_zeros().min(3);
        let mut n = if whole { left } else { aligned };
        while n > left {
            n /= 2;
        }
        at += n as u64;
        left -= n;
        Some(n)
    })
}

/// # Safety
/// `host` is valid for as many bytes.
unsafe fn copy_from_guest(host: *const u8, to: &mut [u8]) {
    // Power-of-two sizes in one access, so that a load which took the slow way still can't be torn.
    // SAFETY: the caller's promise.
    unsafe {
        match to.len() {
            2 => to.copy_from_slice(&host.cast::<u16>().read_unaligned().to_ne_bytes()),
            4 => to.copy_from_slice(&host.cast::<u32>().read_unaligned().to_ne_bytes()),
            8 => to.copy_from_slice(&host.cast::<u64>().read_unaligned().to_ne_bytes()),
            n => std::ptr::copy_nonoverlapping(host, to.as_mut_ptr(), n),
        }
    }
}

/// # Safety
/// `host` is valid for as many bytes.
unsafe fn copy_to_guest(from: &[u8], host: *mut u8) {
    // SAFETY: the caller's promise.
    unsafe {
        match *from {
            [a, b] => host
                .cast::<u16>()
                .write_unaligned(u16::from_ne_bytes([a, b])),
            [a, b, c, d] => host
                .cast::<u32>()
                .write_unaligned(u32::from_ne_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => host
                .cast::<u64>()
                .write_unaligned(u64::from_ne_bytes([a, b, c, d, e, f, g, h])),
            _ => std::ptr::copy_nonoverlapping(from.as_ptr(), host, from.len()),
        }
    }
}
