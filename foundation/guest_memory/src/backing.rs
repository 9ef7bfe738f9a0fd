//! Host memory that stands behind guest memory.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};

use parking_lot::Mutex;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::{MemoryError, PAGE_SHIFT, PAGE_SIZE};

/// Names of the bits in a page's flag byte; see [`Backing::page_flag`].
pub struct PageFlags;

impl PageFlags {
    /// A processor keeps decoded instructions of this page.
    pub const CODE: u8 = 1 << 0;
    /// Dirty pages are logged and this one is still clean.
    pub const LOG: u8 = 1 << 1;
}

/// How a [`Backing`] is made.
#[derive(Debug, Clone, Copy, Default)]
pub struct BackingOptions {
    /// Backed by a memory file that other processes can map (vhost-user), not by private memory.
    pub shared: bool,
    /// Ask for transparent huge pages.
    pub huge_pages: bool,
    /// Offer the pages to kernel same-page merging.
    pub mergeable: bool,
}

/// A piece of host memory, zero at first and given by the host only as it is touched, with a guard page
/// before and after it.
pub struct Backing {
    ptr: NonNull<u8>,
    len: u64,
    file: Option<OwnedFd>,
    /// Byte ranges that show a file's content until they are written; see [`Backing::show_file`].
    shown: Mutex<Vec<Range<u64>>>,
    flags: Vec<AtomicU8>,
    code_generation: Vec<AtomicU32>,
    dirty: Vec<AtomicU64>,
    logging: AtomicBool,
    code_listener: std::sync::OnceLock<std::sync::Arc<dyn CodeListener>>,
}

/// Who must know at once that decoded code is stale.
pub trait CodeListener: Send + Sync {
    /// Some page's generation has risen. Called by the thread that wrote.
    fn code_written(&self);
}

/// Times that a write made decoded code stale, in any backing.
static CODE_WRITES: AtomicU64 = AtomicU64::new(0);

/// A number that has risen when decoded code in any backing may have become stale since it was last asked for.
pub fn code_writes() -> u64 {
    CODE_WRITES.load(Ordering::SeqCst)
}

// SAFETY: the mapping is owned by the value and lives as long as it; all access is by raw pointer or by
// atomics, and the bytes are treated as volatile, so any thread may use it.
unsafe impl Send for Backing {}
// SAFETY: as above.
unsafe impl Sync for Backing {}

impl std::fmt::Debug for Backing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backing")
            .field("ptr", &self.ptr)
            .field("len", &self.len)
            .finish()
    }
}

/// A vector of zeroed atomics that the host gives page by page as it is touched.
fn zeroed_atomics<T>(count: usize) -> Vec<T> {
    let layout = std::alloc::Layout::array::<T>(count).expect("page count fits");
    if count == 0 {
        return Vec::new();
    }
    // SAFETY: the layout is that of `count` T; T is only ever an integer atomic here, for which all-zero bytes are
    // a value; the vector takes over the allocation with its exact length and capacity.
    unsafe {
        let ptr = std::alloc::alloc_zeroed(layout).cast::<T>();
        if ptr.is_null() {
            std::alloc::handle_alloc_error(layout);
        }
        Vec::from_raw_parts(ptr, count, count)
    }
}

impl Backing {
    /// Maps `len` bytes, a whole number of pages.
    ///
    /// # Errors
    /// [`MemoryError::BadRegion`] for an odd size, [`MemoryError::Map`] when the host refuses.
    pub fn new(len: u64, options: BackingOptions) -> Result<Self, MemoryError> {
        if len == 0 || !len.is_multiple_of(PAGE_SIZE) || len > (1 << 46) {
            return Err(MemoryError::BadRegion { base: 0, size: len });
        }
        let refused = |e: rustix::io::Errno| MemoryError::Map {
            size: len,
            source: std::io::Error::from(e),
        };
        let guard = PAGE_SIZE as usize;
        let size = len as usize;
        // SAFETY: a fresh mapping at an address of the host's choosing touches nothing that exists.
        let whole = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                size + 2 * guard,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(refused)?;
        let inner = whole.cast::<u8>().wrapping_add(guard);
        let unmap = |e| {
            // SAFETY: `whole` was mapped just above with this size and nobody else knows of it.
            let _ = unsafe { rustix::mm::munmap(whole, size + 2 * guard) };
            refused(e)
        };
        let file = if options.shared {
            let fd = rustix::fs::memfd_create("guest-memory", rustix::fs::MemfdFlags::CLOEXEC)
                .map_err(unmap)?;
            rustix::fs::ftruncate(&fd, len).map_err(unmap)?;
            Some(fd)
        } else {
            None
        };
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the fixed mappings replace the inside of the reservation made above, which is ours.
        let mapped = unsafe {
            match &file {
                Some(fd) => {
                    let flags = MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE;
                    rustix::mm::mmap(inner.cast(), size, prot, flags, fd, 0)
                }
                None => {
                    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
                    rustix::mm::mmap_anonymous(inner.cast(), size, prot, flags)
                }
            }
        }
        .map_err(unmap)?;
        for (wanted, advice) in [
            (options.huge_pages, Advice::LinuxHugepage),
            (options.mergeable, Advice::LinuxMergeable),
            (true, Advice::LinuxDontDump),
        ] {
            if wanted {
                // SAFETY: advice on our own fresh mapping. A kernel without the feature refuses; nothing is lost.
                let _ = unsafe { rustix::mm::madvise(mapped, size, advice) };
            }
        }
        let pages = (len >> PAGE_SHIFT) as usize;
        Ok(Self {
            ptr: NonNull::new(inner).expect("the host maps nothing at address zero"),
            len,
            file,
            shown: Mutex::default(),
            flags: zeroed_atomics(pages),
            code_generation: zeroed_atomics(pages),
            dirty: zeroed_atomics(pages.div_ceil(64)),
            logging: AtomicBool::new(false),
            code_listener: std::sync::OnceLock::new(),
        })
    }

    /// Host address of the first byte. Valid for [`Self::len`] bytes while the backing lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// Bytes.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The memory file behind a shared backing.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd)
    }

    /// The flag byte ([`PageFlags`]) of page number `page`. A writer that goes by the host address must load it
    /// *after* its store and, when it is not zero, call [`Self::note_write`].
    ///
    /// # Panics
    /// When the page is out of range.
    pub fn page_flag(&self, page: u64) -> &AtomicU8 {
        &self.flags[page as usize]
    }

    /// Counts the writes that hit decoded code in the page: code decoded under an older number is stale.
    ///
    /// # Panics
    /// When the page is out of range.
    pub fn code_generation(&self, page: u64) -> &AtomicU32 {
        &self.code_generation[page as usize]
    }

    /// Marks a page as holding decoded code. Returns the generation to remember beside the code and whether the
    /// mark is new; when it is new the caller must make every other writer see it
    /// ([`barrier_for_new_code`]) before it reads the bytes that it decodes.
    pub fn mark_code(&self, page: u64) -> (u32, bool) {
        let old = self.flags[page as usize].fetch_or(PageFlags::CODE, Ordering::SeqCst);
        (
            self.code_generation(page).load(Ordering::SeqCst),
            old & PageFlags::CODE == 0,
        )
    }

    /// The number of the page whose flag byte ([`Self::page_flag`]) lies at this address.
    pub fn page_of_flag(&self, flag: *const u8) -> Option<u64> {
        let page = (flag as usize).wrapping_sub(self.flags.as_ptr() as usize);
        (page < self.flags.len()).then_some(page as u64)
    }

    /// Takes note of a write to `len` bytes at `offset` that has happened: stale code and dirty pages. True when decoded
    /// code has become stale.
    pub fn note_write(&self, offset: u64, len: u64) -> bool {
        let mut stale = false;
        if len == 0 {
            return stale;
        }
        let last = (offset + len - 1).min(self.len - 1) >> PAGE_SHIFT;
        for page in (offset >> PAGE_SHIFT)..=last {
            let flag = &self.flags[page as usize];
            let set = flag.load(Ordering::SeqCst);
            if set & PageFlags::LOG != 0 {
                self.dirty[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::SeqCst);
                flag.fetch_and(!PageFlags::LOG, Ordering::SeqCst);
            }
            if set & PageFlags::CODE != 0 {
                // The number first: who sees the flag gone must also see the new number.
                self.code_generation[page as usize].fetch_add(1, Ordering::SeqCst);
                flag.fetch_and(!PageFlags::CODE, Ordering::SeqCst);
                stale = true;
            }
        }
        if stale {
            CODE_WRITES.fetch_add(1, Ordering::SeqCst);
            if let Some(listener) = self.code_listener.get() {
                listener.code_written();
            }
        }
        stale
    }

    /// Who is told from now on that a write has made decoded code stale, whoever wrote. The first one stays.
    pub fn listen_to_code(&self, listener: std::sync::Arc<dyn CodeListener>) {
        let _ = self.code_listener.set(listener);
    }

    /// True between [`Self::start_log`] and [`Self::stop_log`].
    pub fn is_logging(&self) -> bool {
        self.logging.load(Ordering::SeqCst)
    }

    /// Starts logging dirty pages; all pages count as clean. An accelerator that keeps a log of its own follows at its next
    /// `sync_dirty_log`, which must come before the first page is read.
    pub fn start_log(&self) {
        self.logging.store(true, Ordering::SeqCst);
        self.dirty.iter().for_each(|w| w.store(0, Ordering::SeqCst));
        self.flags.iter().for_each(|f| {
            f.fetch_or(PageFlags::LOG, Ordering::SeqCst);
        });
    }

    /// Stops logging dirty pages.
    pub fn stop_log(&self) {
        self.logging.store(false, Ordering::SeqCst);
        self.flags.iter().for_each(|f| {
            f.fetch_and(!PageFlags::LOG, Ordering::SeqCst);
        });
    }

    /// Adds pages found dirty by somebody else (KVM) to the log: bit `n` of the words is page `first + n`.
    pub fn merge_log(&self, first: u64, words: &[u64]) {
        for (i, word) in words.iter().enumerate() {
            let mut rest = *word;
            while rest != 0 {
                let page = first + i as u64 * 64 + u64::from(rest.trailing_zeros());
                rest &= rest - 1;
                if let Some(w) = self.dirty.get((page / 64) as usize) {
                    w.fetch_or(1 << (page % 64), Ordering::SeqCst);
                }
            }
        }
    }

    /// Takes the dirty pages since the last call: bit `n` of word `w` is page `64 * w + n`. The pages count as clean
    /// again from *before* the words are read, so no write is lost.
    pub fn take_log(&self) -> Vec<u64> {
        let mut taken = Vec::with_capacity(self.dirty.len());
        for (i, word) in self.dirty.iter().enumerate() {
            let bits = word.swap(0, Ordering::SeqCst);
            let mut rest = bits;
            while rest != 0 {
                let page = i * 64 + rest.trailing_zeros() as usize;
                rest &= rest - 1;
                if let Some(flag) = self.flags.get(page) {
                    flag.fetch_or(PageFlags::LOG, Ordering::SeqCst);
                }
            }
            taken.push(bits);
        }
        taken
    }

    /// Puts a file's content into the range, all in whole pages, without reading it: the host reads a page as it is touched,
    /// and a page that is written becomes the backing's own; the file is never changed. Somebody who cuts the file
    /// short while it is shown kills the process, so this is for files that nobody else writes.
    ///
    /// # Errors
    /// The host's reason, or `Unsupported` for a shared backing or a range that is not whole pages inside it.
    pub fn show_file(
        &self,
        offset: u64,
        len: u64,
        file: BorrowedFd<'_>,
        file_offset: u64,
    ) -> std::io::Result<()> {
        let end = offset.checked_add(len).filter(|end| *end <= self.len);
        let whole = (offset | len | file_offset) & (PAGE_SIZE - 1) == 0;
        let (Some(end), true, true, None) = (end, whole, len != 0, &self.file) else {
            return Err(std::io::ErrorKind::Unsupported.into());
        };
        // Under the lock, so that a discard at the same time leaves the list right.
        let mut shown = self.shown.lock();
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the range lies inside our own mapping, of which the fixed mapping replaces whole pages; nobody holds
        // references into guest memory.
        unsafe {
            let at = self.ptr.as_ptr().add(offset as usize).cast();
            rustix::mm::mmap(at, len as usize, prot, flags, file, file_offset)?;
            let _ = rustix::mm::madvise(at, len as usize, Advice::LinuxDontDump);
        }
        shown.push(offset..end);
        drop(shown);
        self.note_write(offset, len);
        Ok(())
    }

    /// Replaces what of the range shows a file by pages of zeros.
    fn hide_files(&self, range: &Range<u64>) {
        let mut shown = self.shown.lock();
        let mut kept = Vec::new();
        for there in shown.drain(..) {
            let (start, end) = (there.start.max(range.start), there.end.min(range.end));
            if start >= end {
                kept.push(there);
                continue;
            }
            let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
            let prot = ProtFlags::READ | ProtFlags::WRITE;
            // SAFETY: as in `show_file`.
            unsafe {
                let at = self.ptr.as_ptr().add(start as usize);
                let len = (end - start) as usize;
                // A host that has no mapping to spare leaves the old one, which is zeroed by hand.
                if rustix::mm::mmap_anonymous(at.cast(), len, prot, flags).is_err() {
                    at.write_bytes(0, len);
                    kept.push(there);
                    continue;
                }
                let _ = rustix::mm::madvise(at.cast(), len, Advice::LinuxDontDump);
            }
            kept.extend(
                [there.start..start, end..there.end]
                    .into_iter()
                    .filter(|r| !r.is_empty()),
            );
        }
        *shown = kept;
    }

    /// Gives the pages that lie wholly inside the range back to the host; they read as zero afterwards.
    pub fn discard(&self, offset: u64, len: u64) {
        let start = offset.next_multiple_of(PAGE_SIZE);
        let end = offset.saturating_add(len).min(self.len) & !(PAGE_SIZE - 1);
        if start >= end {
            return;
        }
        match &self.file {
            Some(fd) => {
                let flags =
                    rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
                let _ = rustix::fs::fallocate(fd, flags, start, end - start);
            }
            None => {
                // SAFETY: the range lies inside our own mapping; nobody holds references into guest memory.
                let _ = unsafe {
                    let at = self.ptr.as_ptr().add(start as usize);
                    rustix::mm::madvise(at.cast(), (end - start) as usize, Advice::LinuxDontNeed)
                };
                // Afterwards, as the pages of a file show the file again when they are given back.
                self.hide_files(&(start..end));
            }
        }
        self.note_write(start, end - start);
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        let guard = PAGE_SIZE as usize;
        // SAFETY: the mapping with its guard pages is ours and nobody uses it any more.
        let _ = unsafe {
            rustix::mm::munmap(
                self.ptr.as_ptr().wrapping_sub(guard).cast(),
                self.len as usize + 2 * guard,
            )
        };
    }
}

/// Makes every thread of the process see all that this thread has stored, and this thread all that the others have:
/// the heavy half of a barrier whose light half is the program order "store, then load the page's flag" of every
/// writer. Called after [`Backing::mark_code`] has set a new mark.
pub fn barrier_for_new_code() {
    use std::sync::OnceLock;
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    const SYS_MEMBARRIER: libc::c_long = libc::SYS_membarrier;
    const PRIVATE_EXPEDITED: i32 = 1 << 3;
    const REGISTER_PRIVATE_EXPEDITED: i32 = 1 << 4;
    // SAFETY: membarrier takes integers only and changes no memory.
    let call = |command: i32| unsafe { libc::syscall(SYS_MEMBARRIER, command, 0, 0) } == 0;
    if !*REGISTERED.get_or_init(|| call(REGISTER_PRIVATE_EXPEDITED)) || !call(PRIVATE_EXPEDITED) {
        std::sync::atomic::fence(Ordering::SeqCst);
    }
}
