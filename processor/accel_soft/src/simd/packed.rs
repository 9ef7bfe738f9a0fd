//! Sixteen bytes that move through one vector register.
//!
//! A `u128` moves through two general registers; a stub that then loads what was stored in two halves waits for both stores
//! to reach the cache. So registers and memory operands are moved by this type.
#![allow(unsafe_code)] // Reads and writes the register file as vectors.

use std::arch::x86_64::{
    __m128i, _mm_cvtsi64_si128, _mm_loadu_si128, _mm_setzero_si128, _mm_storeu_si128,
};

use crate::cpu::{Cpu, Value};

/// Sixteen bytes.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Packed(__m128i);

impl Packed {
    /// A quadword, zero-extended.
    #[inline(always)]
    pub(crate) fn from_quadword(value: u64) -> Self {
        // SAFETY: SSE2 is part of x86-64.
        Self(unsafe { _mm_cvtsi64_si128(value as i64) })
    }

    fn bits(self) -> u128 {
        // SAFETY: sixteen bytes either way.
        unsafe { std::mem::transmute(self.0) }
    }
}

impl Default for Packed {
    #[inline(always)]
    fn default() -> Self {
        // SAFETY: SSE2 is part of x86-64.
        Self(unsafe { _mm_setzero_si128() })
    }
}

impl PartialEq for Packed {
    fn eq(&self, other: &Self) -> bool {
        self.bits() == other.bits()
    }
}

impl Eq for Packed {}

impl Value for Packed {
    fn to_u64(self) -> u64 {
        self.bits() as u64
    }
    fn from_u64(value: u64) -> Self {
        Self::from_quadword(value)
    }
    fn from_bytes(bytes: &[u8]) -> Self {
        let bytes = &bytes[..16];
        // SAFETY: sixteen bytes are there.
        Self(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
    }
    fn to_bytes(self, to: &mut [u8]) {
        let to = &mut to[..16];
        // SAFETY: sixteen bytes are there.
        unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), self.0) }
    }
    unsafe fn compare_exchange(host: *mut u8, old: Self, new: Self) -> bool {
        // SAFETY: the caller's promise.
        unsafe { u128::compare_exchange(host, old.bits(), new.bits()) }
    }
}

impl Cpu {
    /// An XMM register.
    #[inline(always)]
    pub(crate) fn xmm(&self, number: u8) -> Packed {
        // SAFETY: sixteen registers of 32 bytes, aligned.
        unsafe {
            self.vectors
                .ymm
                .as_ptr()
                .add(usize::from(number & 15))
                .cast::<Packed>()
                .read()
        }
    }

    /// The upper half of a YMM register.
    #[inline(always)]
    pub(crate) fn ymm_high(&self, number: u8) -> Packed {
        // SAFETY: as in `xmm`; the upper half follows the lower.
        unsafe {
            self.vectors
                .ymm
                .as_ptr()
                .add(usize::from(number & 15))
                .cast::<Packed>()
                .add(1)
                .read()
        }
    }

    /// Writes an XMM register and nothing else.
    #[inline(always)]
    pub(crate) fn set_xmm(&mut self, number: u8, value: Packed) {
        // SAFETY: as in `xmm`.
        unsafe {
            self.vectors
                .ymm
                .as_mut_ptr()
                .add(usize::from(number & 15))
                .cast::<Packed>()
                .write(value)
        }
    }

    /// Writes the upper half of a YMM register.
    #[inline(always)]
    pub(crate) fn set_ymm_high(&mut self, number: u8, value: Packed) {
        // SAFETY: as in `ymm_high`.
        unsafe {
            self.vectors
                .ymm
                .as_mut_ptr()
                .add(usize::from(number & 15))
                .cast::<Packed>()
                .add(1)
                .write(value)
        }
    }
}
