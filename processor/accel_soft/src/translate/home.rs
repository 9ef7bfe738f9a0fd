//! Where a vCPU lives: at the top of a stack of its own.
//!
//! Translated code runs with the host's stack pointer at the [`Cpu`], so that all of its state is a short displacement
//! away and no register is lost to a pointer. Calls and signals push below it, onto a stack with a guard page at its end.

use std::ops::{Deref, DerefMut};

use crate::cpu::Cpu;

/// Bytes of stack below a vCPU: devices run on it.
const STACK: usize = 1 << 20;
const PAGE: usize = 4096;

/// A vCPU at the top of a stack.
pub(crate) struct Home {
    whole: *mut u8,
    cpu: *mut Cpu,
}

// SAFETY: the memory belongs to the value alone; a `Cpu` is Send.
unsafe impl Send for Home {}

const fn size() -> usize {
    PAGE + STACK + size_of::<Cpu>().next_multiple_of(PAGE)
}

impl Home {
    /// Moves a vCPU in.
    ///
    /// # Panics
    /// When the host has no memory.
    pub(crate) fn new(cpu: Cpu) -> Self {
        // SAFETY: a fresh mapping at an address of the host's choosing; its first page is made inaccessible. The `Cpu` lies
        // page-aligned behind the stack, inside the mapping.
        unsafe {
            let whole = libc::mmap(
                std::ptr::null_mut(),
                size(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_STACK,
                -1,
                0,
            );
            assert!(whole != libc::MAP_FAILED, "no memory for a vCPU's stack");
            assert_eq!(libc::mprotect(whole, PAGE, libc::PROT_NONE), 0);
            let whole = whole.cast::<u8>();
            let home = whole.add(PAGE + STACK).cast::<Cpu>();
            home.write(cpu);
            Self { whole, cpu: home }
        }
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        // SAFETY: made by `new`; nobody else has the addresses.
        unsafe {
            self.cpu.drop_in_place();
            libc::munmap(self.whole.cast(), size());
        }
    }
}

impl Deref for Home {
    type Target = Cpu;
    #[inline(always)]
    fn deref(&self) -> &Cpu {
        // SAFETY: initialized by `new`, and owned.
        unsafe { &*self.cpu }
    }
}

impl DerefMut for Home {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut Cpu {
        // SAFETY: as above.
        unsafe { &mut *self.cpu }
    }
}
