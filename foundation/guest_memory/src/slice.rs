//! A piece of guest memory that is contiguous in the host.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use crate::{Backing, PAGE_SHIFT};

/// Bytes of guest memory that are contiguous in the host, kept alive by this value. Made by
/// [`GuestMemory::slice`](crate::GuestMemory::slice) and [`slices`](crate::GuestMemory::slices).
#[derive(Debug, Clone)]
pub struct GuestSlice {
    pub(crate) backing: Arc<Backing>,
    pub(crate) offset: u64,
    pub(crate) len: usize,
}

impl GuestSlice {
    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True when the slice has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Host address of the first byte, for system calls that read or write it (`readv`, io_uring). The guest and other
    /// threads may change the bytes at any time, so no reference may be made from it. Who lets the host write through
    /// it calls [`Self::written`] afterwards.
    pub fn as_ptr(&self) -> *mut u8 {
        self.backing.as_ptr().wrapping_add(self.offset as usize)
    }

    /// Takes note that the first `len` bytes have been written through [`Self::as_ptr`].
    pub fn written(&self, len: usize) {
        self.note(0, len.min(self.len));
    }

    /// The part of `len` bytes that starts `at` bytes into the slice, cut off at its end.
    #[must_use]
    pub fn part(&self, at: usize, len: usize) -> Self {
        let at = at.min(self.len);
        Self {
            backing: self.backing.clone(),
            offset: self.offset + at as u64,
            len: len.min(self.len - at),
        }
    }

    /// Copies bytes out, from `at` bytes into the slice; returns how many there were.
    pub fn read_at(&self, at: usize, to: &mut [u8]) -> usize {
        let n = to.len().min(self.len.saturating_sub(at));
        if n != 0 {
            // SAFETY: `at + n` lies inside the slice, which lies inside the live mapping; raw copy, no references.
            unsafe { std::ptr::copy_nonoverlapping(self.as_ptr().add(at), to.as_mut_ptr(), n) };
        }
        n
    }

    /// Copies bytes in, to `at` bytes into the slice; returns how many there was room for.
    pub fn write_at(&self, at: usize, from: &[u8]) -> usize {
        let n = from.len().min(self.len.saturating_sub(at));
        if n != 0 {
            // SAFETY: as in `read_at`.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.as_ptr().add(at), n) };
            self.note(at, n);
        }
        n
    }

    /// Fills bytes with a value.
    pub fn fill(&self, value: u8) {
        // SAFETY: the slice lies inside the live mapping.
        unsafe { std::ptr::write_bytes(self.as_ptr(), value, self.len) };
        self.note(0, self.len);
    }

    /// Gives the pages that lie wholly inside the slice back to the host ([`Backing::discard`]).
    pub fn discard(&self) {
        self.backing.discard(self.offset, self.len as u64);
    }

    /// The memory that the slice lies in.
    pub fn backing(&self) -> &Arc<Backing> {
        &self.backing
    }

    /// The host address of an aligned value of `len` bytes that lies `at` bytes into the slice.
    fn aligned(&self, at: usize, len: usize) -> Option<*mut u8> {
        if at.checked_add(len)? > self.len {
            return None;
        }
        let ptr = self.as_ptr().wrapping_add(at);
        ptr.addr().is_multiple_of(len).then_some(ptr)
    }

    /// Reads a little-endian 16-bit value `at` bytes into the slice in one access with acquire ordering, or `None` if it
    /// is misaligned or reaches past the end.
    pub fn load_u16(&self, at: usize) -> Option<u16> {
        let ptr = self.aligned(at, 2)?;
        // SAFETY: two live, aligned bytes of the mapping; other access to them is atomic or raw.
        let value = unsafe { AtomicU16::from_ptr(ptr.cast()) }.load(Ordering::Acquire);
        Some(u16::from_le(value))
    }

    /// Reads a little-endian 32-bit value as [`Self::load_u16`] does.
    pub fn load_u32(&self, at: usize) -> Option<u32> {
        let ptr = self.aligned(at, 4)?;
        // SAFETY: as in `load_u16`, with four bytes.
        let value = unsafe { AtomicU32::from_ptr(ptr.cast()) }.load(Ordering::Acquire);
        Some(u32::from_le(value))
    }

    /// Reads a little-endian 64-bit value as [`Self::load_u16`] does.
    pub fn load_u64(&self, at: usize) -> Option<u64> {
        let ptr = self.aligned(at, 8)?;
        // SAFETY: as in `load_u16`, with eight bytes.
        let value = unsafe { AtomicU64::from_ptr(ptr.cast()) }.load(Ordering::Acquire);
        Some(u64::from_le(value))
    }

    /// Writes a little-endian 16-bit value `at` bytes into the slice in one access with release ordering. Returns
    /// false, and writes nothing, if it is misaligned or reaches past the end.
    pub fn store_u16(&self, at: usize, value: u16) -> bool {
        let Some(ptr) = self.aligned(at, 2) else {
            return false;
        };
        // SAFETY: as in `load_u16`.
        unsafe { AtomicU16::from_ptr(ptr.cast()) }.store(value.to_le(), Ordering::Release);
        self.note(at, 2);
        true
    }

    /// Writes a little-endian 32-bit value as [`Self::store_u16`] does.
    pub fn store_u32(&self, at: usize, value: u32) -> bool {
        let Some(ptr) = self.aligned(at, 4) else {
            return false;
        };
        // SAFETY: as in `load_u16`, with four bytes.
        unsafe { AtomicU32::from_ptr(ptr.cast()) }.store(value.to_le(), Ordering::Release);
        self.note(at, 4);
        true
    }

    /// Writes a little-endian 64-bit value as [`Self::store_u16`] does.
    pub fn store_u64(&self, at: usize, value: u64) -> bool {
        let Some(ptr) = self.aligned(at, 8) else {
            return false;
        };
        // SAFETY: as in `load_u16`, with eight bytes.
        unsafe { AtomicU64::from_ptr(ptr.cast()) }.store(value.to_le(), Ordering::Release);
        self.note(at, 8);
        true
    }

    fn note(&self, at: usize, len: usize) {
        if len == 0 {
            return;
        }
        let first = self.offset + at as u64;
        let last = first + len as u64 - 1;
        for page in (first >> PAGE_SHIFT)..=(last >> PAGE_SHIFT) {
            if self.backing.page_flag(page).load(Ordering::Relaxed) != 0 {
                self.backing.note_write(first, len as u64);
                return;
            }
        }
    }
}

/// The slices that a range of guest memory is made of; nearly always one.
pub type GuestSlices = smallvec::SmallVec<[GuestSlice; 1]>;
