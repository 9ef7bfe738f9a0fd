//! Memory for code: written by one mapping, executed by another.

use std::io::Error;
use std::os::fd::{FromRawFd, OwnedFd};

const PAGE: usize = 4096;
/// Bytes of a huge page of the host.
const HUGE: usize = 2 << 20;

/// Host code, mapped twice: no page is ever writable and executable at one address. Guard pages stand round both mappings.
pub(crate) struct CodeMemory {
    writable: Mapping,
    executable: Mapping,
    len: usize,
    used: usize,
    /// Huge pages made.
    huge: usize,
}

// SAFETY: the mappings belong to the value alone.
unsafe impl Send for CodeMemory {}

struct Mapping {
    whole: *mut u8,
    size: usize,
    start: *mut u8,
}

impl Mapping {
    fn new(file: &OwnedFd, len: usize, protection: i32) -> Result<Self, Error> {
        use std::os::fd::AsRawFd;
        let size = len + 2 * PAGE + HUGE;
        // SAFETY: a fresh reservation at an address of the host's choosing; the fixed mapping replaces its inside.
        unsafe {
            let whole = libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            );
            if whole == libc::MAP_FAILED {
                return Err(Error::last_os_error());
            }
            let whole = whole.cast::<u8>();
            let to_boundary = (whole as usize + PAGE).next_multiple_of(HUGE) - whole as usize;
            let mapping = Self {
                whole,
                size,
                start: whole.add(to_boundary),
            };
            let inside = libc::mmap(
                mapping.start.cast(),
                len,
                protection,
                libc::MAP_SHARED | libc::MAP_FIXED,
                file.as_raw_fd(),
                0,
            );
            if inside == libc::MAP_FAILED {
                return Err(Error::last_os_error());
            }
            Ok(mapping)
        }
    }

    /// Makes a huge page of small ones that hold something.
    fn collapse(&self, at: usize) {
        /// Linux 6.1: `include/uapi/asm-generic/mman-common.h`.
        const MADV_COLLAPSE: i32 = 25;
        // SAFETY: the advice changes nothing but how the pages of the own mapping are kept; a host that can't refuses.
        unsafe { libc::madvise(self.start.add(at).cast(), HUGE, MADV_COLLAPSE) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nobody has the address any more.
        unsafe { libc::munmap(self.whole.cast(), self.size) };
    }
}

impl CodeMemory {
    /// Room for `len` bytes, taken from the host only as it is used.
    ///
    /// # Errors
    /// What the host says.
    pub(crate) fn new(len: usize) -> Result<Self, Error> {
        let len = len.next_multiple_of(PAGE);
        // SAFETY: the descriptor that the call gives is ours.
        let file = unsafe {
            let fd = libc::memfd_create(c"translated-code".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        let size = len.try_into().map_err(Error::other)?;
        // SAFETY: an own descriptor.
        if unsafe { libc::ftruncate(std::os::fd::AsRawFd::as_raw_fd(&file), size) } != 0 {
            return Err(Error::last_os_error());
        }
        Ok(Self {
            writable: Mapping::new(&file, len, libc::PROT_READ | libc::PROT_WRITE)?,
            executable: Mapping::new(&file, len, libc::PROT_READ | libc::PROT_EXEC)?,
            len,
            used: 0,
            huge: 0,
        })
    }

    /// The address at which the next code will be executed.
    pub(crate) fn next(&self) -> u64 {
        self.executable.start as u64 + self.used as u64
    }

    /// The address at which the first code is executed.
    pub(crate) fn start(&self) -> u64 {
        self.executable.start as u64
    }

    /// Bytes in use.
    pub(crate) fn used(&self) -> usize {
        self.used
    }

    /// Bytes left.
    pub(crate) fn left(&self) -> usize {
        self.len - self.used
    }

    /// Puts code at [`Self::next`].
    ///
    /// # Panics
    /// When there is not as much room.
    pub(crate) fn append(&mut self, code: &[u8]) {
        let end = (self.used + code.len()).next_multiple_of(16).min(self.len);
        assert!(self.used + code.len() <= self.len);
        // SAFETY: inside the mapping, which no reference is to.
        unsafe {
            std::ptr::copy_nonoverlapping(
                code.as_ptr(),
                self.writable.start.add(self.used),
                code.len(),
            );
        }
        self.collapse_full(self.used, end);
        self.used = end;
    }

    /// Code that is spread over hundreds of pages misses in the host's own translation buffer: what is full becomes a huge page.
    fn collapse_full(&mut self, from: usize, to: usize) {
        let full = to / HUGE;
        if full > from / HUGE && full > self.huge {
            self.huge = full;
            self.writable.collapse((full - 1) * HUGE);
            self.executable.collapse((full - 1) * HUGE);
        }
    }

    /// Forgets all code behind the first `keep` bytes.
    pub(crate) fn truncate(&mut self, keep: usize) {
        self.used = keep.min(self.used);
    }

    /// Replaces four bytes of code at an executable address.
    pub(crate) fn patch(&mut self, at: u64, value: u32) {
        let offset = (at - self.executable.start as u64) as usize;
        assert!(offset + 4 <= self.used);
        // SAFETY: inside the mapping.
        unsafe {
            self.writable
                .start
                .add(offset)
                .cast::<u32>()
                .write_unaligned(value);
        }
    }

    /// Five bytes of code at an executable address.
    pub(crate) fn bytes(&self, at: u64) -> [u8; 5] {
        let offset = (at - self.executable.start as u64) as usize;
        assert!(offset + 5 <= self.used);
        // SAFETY: inside the mapping.
        unsafe {
            self.writable
                .start
                .add(offset)
                .cast::<[u8; 5]>()
                .read_unaligned()
        }
    }

    /// Replaces code at an executable address.
    pub(crate) fn put(&mut self, at: u64, bytes: &[u8; 5]) {
        let offset = (at - self.executable.start as u64) as usize;
        assert!(offset + 5 <= self.used);
        // SAFETY: inside the mapping.
        unsafe {
            self.writable
                .start
                .add(offset)
                .cast::<[u8; 5]>()
                .write_unaligned(*bytes)
        };
    }

    /// Puts a jump at an executable address.
    pub(crate) fn put_jump(&mut self, at: u64, target: u64) {
        let [a, b, c, d] = (target.wrapping_sub(at + 5) as u32).to_le_bytes();
        self.put(at, &[0xe9, a, b, c, d]);
    }

    /// Replaces the distance of a jump.
    pub(crate) fn patch_jump(&mut self, at: u64, target: u64) {
        self.patch(at, target.wrapping_sub(at + 4) as u32);
    }
}
