//! The pages that a vCPU shares with the kernel (`struct kvm_run`), and the way to get a thread out of `KVM_RUN`.

#![allow(unsafe_code)] // maps and reads memory that the kernel writes; sends signals

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicU64, Ordering};

use kvm_bindings::{
    KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_IN,
    KVM_EXIT_IOAPIC_EOI, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN,
    KVM_EXIT_SYSTEM_EVENT, kvm_run,
};
use kvm_ioctls::VcpuFd;

/// A port access that waits to be carried out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PortExit {
    pub(crate) read: bool,
    pub(crate) port: u16,
    /// Bytes of one access: 1, 2 or 4.
    pub(crate) size: usize,
    /// Accesses (more than one for string instructions).
    pub(crate) count: usize,
    offset: usize,
}

/// A memory access that waits to be carried out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MemoryExit {
    pub(crate) address: u64,
    pub(crate) data: [u8; 8],
    /// Bytes of `data` that count, 1 to 8.
    pub(crate) len: usize,
    pub(crate) write: bool,
}

/// Why `KVM_RUN` came back.
#[derive(Debug, Clone, Copy)]
pub(crate) enum KvmExit {
    Port(PortExit),
    Memory(MemoryExit),
    EndOfInterrupt(u8),
    Shutdown,
    /// Nothing to do but to go on.
    Interrupted,
    InternalError(u32),
    FailedEntry(u64),
    SystemEvent(u32),
    Other(u32),
}

/// The mapping.
pub(crate) struct RunPage {
    ptr: NonNull<kvm_run>,
    len: usize,
}

// SAFETY: the mapping lives as long as the value. What other threads touch (`immediate_exit`) is atomic; all else is only
// touched by the thread that owns the vCPU, by raw pointer.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// Maps the run page of a vCPU, `len` bytes (`KVM_GET_VCPU_MMAP_SIZE`).
    pub(crate) fn map(vcpu: &VcpuFd, len: usize) -> io::Result<Self> {
        if len < size_of::<kvm_run>() {
            return Err(io::Error::other("KVM's run page is smaller than kvm_run"));
        }
        // SAFETY: a fresh shared mapping of the vCPU's file, which keeps the file alive by itself.
        let ptr = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        if ptr == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let ptr = NonNull::new(ptr.cast()).expect("the host maps nothing at address zero");
        Ok(Self { ptr, len })
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the byte lies in the live mapping; every access of ours to it is atomic.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.ptr.as_ptr()).immediate_exit) }
    }

    /// Asks KVM to come back as soon as the vCPU can take an interrupt from the 8259.
    pub(crate) fn request_interrupt_window(&self, wanted: bool) {
        // SAFETY: a plain byte in the live mapping that only this thread writes.
        unsafe {
            (&raw mut (*self.ptr.as_ptr()).request_interrupt_window).write_volatile(wanted.into());
        }
    }

    /// True when the vCPU could take an interrupt from the 8259 when `KVM_RUN` came back.
    pub(crate) fn ready_for_interrupt(&self) -> bool {
        // SAFETY: a plain byte in the live mapping.
        unsafe {
            (&raw const (*self.ptr.as_ptr()).ready_for_interrupt_injection).read_volatile() != 0
        }
    }

    /// Decodes the exit that `KVM_RUN` left.
    pub(crate) fn exit(&self) -> KvmExit {
        let run = self.ptr.as_ptr();
        // SAFETY: the kernel has filled in the member of the union that belongs to the reason before `KVM_RUN` came back, and
        // writes nothing until the next one.
        unsafe {
            let union = &raw const (*run).__bindgen_anon_1;
            match (&raw const (*run).exit_reason).read_volatile() {
                KVM_EXIT_IO => {
                    let io = (&raw const (*union).io).read_volatile();
                    KvmExit::Port(PortExit {
                        read: u32::from(io.direction) == KVM_EXIT_IO_IN,
                        port: io.port,
                        size: io.size.into(),
                        count: io.count as usize,
                        offset: io.data_offset as usize,
                    })
                }
                KVM_EXIT_MMIO => {
                    let mmio = (&raw const (*union).mmio).read_volatile();
                    KvmExit::Memory(MemoryExit {
                        address: mmio.phys_addr,
                        data: mmio.data,
                        len: (mmio.len as usize).min(8),
                        write: mmio.is_write != 0,
                    })
                }
                KVM_EXIT_IOAPIC_EOI => {
                    KvmExit::EndOfInterrupt((&raw const (*union).eoi.vector).read_volatile())
                }
                KVM_EXIT_SHUTDOWN => KvmExit::Shutdown,
                KVM_EXIT_INTR | KVM_EXIT_IRQ_WINDOW_OPEN => KvmExit::Interrupted,
                KVM_EXIT_INTERNAL_ERROR => {
                    KvmExit::InternalError((&raw const (*union).internal.suberror).read_volatile())
                }
                KVM_EXIT_FAIL_ENTRY => KvmExit::FailedEntry(
                    (&raw const (*union).fail_entry.hardware_entry_failure_reason).read_volatile(),
                ),
                KVM_EXIT_SYSTEM_EVENT => {
                    KvmExit::SystemEvent((&raw const (*union).system_event.type_).read_volatile())
                }
                reason => KvmExit::Other(reason),
            }
        }
    }

    /// Host address of access `index` of a port exit, or `None` when the kernel's description leaves the mapping.
    fn port_data(&self, exit: &PortExit, index: usize) -> Option<*mut u8> {
        let at = index
            .checked_mul(exit.size)
            .and_then(|o| o.checked_add(exit.offset))?;
        let end = at.checked_add(exit.size)?;
        (end <= self.len).then(|| self.ptr.as_ptr().cast::<u8>().wrapping_add(at))
    }

    /// Copies the data of access `index` out.
    pub(crate) fn read_port_data(&self, exit: &PortExit, index: usize, to: &mut [u8]) {
        if let Some(ptr) = self.port_data(exit, index) {
            // SAFETY: the range was checked to lie in the mapping.
            unsafe { std::ptr::copy_nonoverlapping(ptr, to.as_mut_ptr(), to.len().min(exit.size)) };
        }
    }

    /// Copies the data of access `index` in.
    pub(crate) fn write_port_data(&self, exit: &PortExit, index: usize, from: &[u8]) {
        if let Some(ptr) = self.port_data(exit, index) {
            // SAFETY: as above.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), ptr, from.len().min(exit.size)) };
        }
    }

    /// Fills in what a memory read has found.
    pub(crate) fn write_memory_data(&self, data: [u8; 8]) {
        // SAFETY: the exit was a memory access, so this member of the union is the current one.
        unsafe {
            let union = &raw mut (*self.ptr.as_ptr()).__bindgen_anon_1;
            (&raw mut (*union).mmio.data).write_volatile(data);
        }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nobody uses it any more.
        unsafe { libc::munmap(self.ptr.as_ptr().cast(), self.len) };
    }
}

/// What other threads want of a vCPU, and the way to tell it. KVM looks at `immediate_exit` on its way in and at signals
/// while inside, so a request made at any time is seen before guest code goes on for long.
pub(crate) struct Doorman {
    page: RunPage,
    /// Thread inside [`Doorman::enter`], or 0.
    thread: AtomicI32,
    kick: AtomicBool,
    nmi: AtomicBool,
    /// Calls of the machine's I/O so far.
    pub(crate) io_calls: AtomicU64,
}

impl Doorman {
    pub(crate) fn new(page: RunPage) -> Self {
        install_signal();
        Self {
            page,
            thread: AtomicI32::new(0),
            kick: AtomicBool::new(false),
            nmi: AtomicBool::new(false),
            io_calls: AtomicU64::new(0),
        }
    }

    pub(crate) fn page(&self) -> &RunPage {
        &self.page
    }

    /// Makes the vCPU's thread leave the kernel and look at what is wanted of it.
    pub(crate) fn nudge(&self) {
        let thread = self.thread.load(Ordering::SeqCst);
        // SAFETY: no arguments.
        let own = unsafe { libc::gettid() };
        if thread == own {
            return; // called from inside the run loop, which looks before it goes back in
        }
        self.page.immediate_exit().store(1, Ordering::SeqCst);
        if thread != 0 {
            // SAFETY: the signal has a handler that does nothing; a thread that has ended meanwhile gets nothing.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, kick_signal()) };
        }
    }

    pub(crate) fn kick(&self) {
        self.kick.store(true, Ordering::SeqCst);
        self.page.immediate_exit().store(1, Ordering::SeqCst);
        self.nudge();
    }

    pub(crate) fn nmi(&self) {
        self.nmi.store(true, Ordering::SeqCst);
        self.nudge();
    }

    pub(crate) fn take_nmi(&self) -> bool {
        self.nmi.load(Ordering::SeqCst) && self.nmi.swap(false, Ordering::SeqCst)
    }

    /// Called when `KVM_RUN` was interrupted: true when a kick is what did it.
    pub(crate) fn take_kick(&self) -> bool {
        // First this, so that a request made from here on interrupts the next `KVM_RUN`.
        self.page.immediate_exit().store(0, Ordering::SeqCst);
        self.kick.swap(false, Ordering::SeqCst)
    }

    /// Makes the next `KVM_RUN` come back at once, with a fresh word on what the vCPU can take.
    pub(crate) fn refresh(&self) {
        self.page.immediate_exit().store(1, Ordering::SeqCst);
    }

    /// Forgets an NMI that is still on its way in (reset).
    pub(crate) fn forget(&self) {
        self.nmi.store(false, Ordering::SeqCst);
    }

    /// Says that this thread runs the vCPU until the value is dropped.
    pub(crate) fn enter(&self) -> Inside<'_> {
        // SAFETY: no arguments.
        let own = unsafe { libc::gettid() };
        self.thread.store(own, Ordering::SeqCst);
        Inside(self)
    }
}

/// See [`Doorman::enter`].
pub(crate) struct Inside<'a>(&'a Doorman);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.thread.store(0, Ordering::SeqCst);
    }
}

/// The signal that gets a thread out of the kernel.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

fn install_signal() {
    static ONCE: Once = Once::new();
    extern "C" fn nothing(_: libc::c_int) {}
    ONCE.call_once(|| {
        // SAFETY: a zeroed sigaction with a handler that does nothing and no flags; the signal is not used by anybody else in
        // the process.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
            libc::sigaction(kick_signal(), &raw const action, std::ptr::null_mut());
        }
    });
}

/// Lets the signal through to this thread, which may have inherited a mask that holds it back.
pub(crate) fn unblock_signal() {
    // SAFETY: works on a local set and this thread's mask only.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, kick_signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
    }
}
