//! Execution on the host's own processor: any bytes, from any register state, with every way out caught.
//!
//! The code ends in INT3. Whatever happens, that or a fault, arrives as a signal, whose frame holds all registers.

use std::arch::naked_asm;
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, Ordering};

use super::state::State;
use crate::x87::X87;

/// Where code lies: two pages.
pub(crate) const CODE: u64 = 0x3000_0000;
/// Bytes of code.
pub(crate) const CODE_SIZE: u64 = 0x2000;
/// Where memory operands lie: two writable pages and a read-only one, with nothing before and after.
pub(crate) const DATA: u64 = 0x3100_0000;
/// Bytes of writable data.
pub(crate) const DATA_WRITABLE: u64 = 0x2000;
/// Bytes of data.
pub(crate) const DATA_SIZE: u64 = 0x3000;
/// Where the stack lies: two pages, with nothing before and after.
pub(crate) const STACK: u64 = 0x3200_0000;
/// Bytes of stack.
pub(crate) const STACK_SIZE: u64 = 0x2000;
/// Where the test writes the code.
const CODE_WINDOW: u64 = 0x2e00_0000;
/// Linux's selectors of 32-bit and 64-bit user code.
const COMPATIBILITY_CS: u64 = 0x23;
const LONG_CS: i64 = 0x33;
/// The page that the trampoline finds its target in.
const CONTROL: u64 = 0x2f00_0000;

/// How an execution ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct End {
    /// Exception vector; 3 at the INT3 that ends the code.
    pub(crate) vector: u8,
    /// Error code, for vectors that have one.
    pub(crate) error: u32,
    /// The faulting address of a page fault.
    pub(crate) address: u64,
}

/// What the trampoline loads, in the order in which it does.
#[repr(C, align(64))]
struct Entry {
    fxsave: [u8; 512],
    ymm: [[u128; 2]; 16],
    gpr: [u64; 16],
    rflags: u64,
}

/// What the signal handler takes out of the frame.
#[repr(C, align(64))]
struct Exit {
    gpr: [u64; 16],
    rip: u64,
    rflags: u64,
    trap: u64,
    error: u64,
    cr2: u64,
    frame: [u8; 832],
}

struct Shared<T>(UnsafeCell<T>);
// SAFETY: used under the lock that every native execution takes, by its thread and that thread's signal handler.
unsafe impl<T> Sync for Shared<T> {}

static EXIT: Shared<Exit> = Shared(UnsafeCell::new(Exit {
    gpr: [0; 16],
    rip: 0,
    rflags: 0,
    trap: 0,
    error: 0,
    cr2: 0,
    frame: [0; 832],
}));
static HOST_RSP: Shared<u64> = Shared(UnsafeCell::new(0));
static RUNNING: AtomicBool = AtomicBool::new(false);

/// The host's processor with its pages and signal handlers. One at a time.
pub(crate) struct Native {
    _lock: std::sync::MutexGuard<'static, ()>,
}

static LOCK: std::sync::Mutex<()> = std::sync::Mutex::new(());

fn map(address: u64, size: u64, protection: i32) {
    let flags =
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE;
    // SAFETY: a new mapping, which replaces none.
    let got = unsafe { libc::mmap(address as *mut _, size as usize, protection, flags, -1, 0) };
    assert_eq!(
        got as u64, address,
        "mapping of the test's pages at their fixed address"
    );
}

/// Maps the code pages, which only the test can write, through a second mapping.
fn map_code() {
    // SAFETY: new mappings of a new memory file.
    unsafe {
        let file = libc::memfd_create(c"code".as_ptr(), 0);
        assert_eq!(libc::ftruncate(file, CODE_SIZE as i64), 0);
        let shared = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE;
        let (read, write, execute) = (libc::PROT_READ, libc::PROT_WRITE, libc::PROT_EXEC);
        for (at, protection) in [(CODE, read | execute), (CODE_WINDOW, read | write)] {
            let got = libc::mmap(
                at as *mut _,
                CODE_SIZE as usize,
                protection,
                shared,
                file,
                0,
            );
            assert_eq!(got as u64, at, "mapping of the code pages");
        }
        libc::close(file);
    }
}

impl Native {
    /// Maps the pages and installs the handlers.
    pub(crate) fn new() -> Self {
        let lock = LOCK
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        static MAPPED: AtomicBool = AtomicBool::new(false);
        if !MAPPED.swap(true, Ordering::SeqCst) {
            let all = libc::PROT_READ | libc::PROT_WRITE;
            map(CONTROL, 0x1000, all);
            map_code();
            map(DATA - 0x1000, 0x1000, libc::PROT_NONE);
            map(DATA, DATA_SIZE, all);
            map(DATA + DATA_SIZE, 0x1000, libc::PROT_NONE);
            map(STACK - 0x1000, 0x1000, libc::PROT_NONE);
            map(STACK, STACK_SIZE, all);
            map(STACK + STACK_SIZE, 0x1000, libc::PROT_NONE);
            // SAFETY: our own pages.
            unsafe {
                std::ptr::write_bytes(CODE_WINDOW as *mut u8, 0xcc, CODE_SIZE as usize);
                let readonly = DATA + DATA_WRITABLE;
                for i in 0..0x1000 {
                    *((readonly + i) as *mut u8) = (i * 7) as u8;
                }
                libc::mprotect(readonly as *mut _, 0x1000, libc::PROT_READ);
            }
        }
        install_handlers();
        Self { _lock: lock }
    }

    /// Writes code; the rest of its pages is INT3.
    pub(crate) fn set_code(&mut self, at: u64, bytes: &[u8]) {
        assert!(at >= CODE && at + bytes.len() as u64 <= CODE + CODE_SIZE);
        // SAFETY: inside the code pages.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                (at - CODE + CODE_WINDOW) as *mut u8,
                bytes.len(),
            )
        }
    }

    /// Makes code INT3 again.
    pub(crate) fn clear_code(&mut self, at: u64, len: usize) {
        assert!(at >= CODE && at + len as u64 <= CODE + CODE_SIZE);
        // SAFETY: inside the code pages.
        unsafe { std::ptr::write_bytes((at - CODE + CODE_WINDOW) as *mut u8, 0xcc, len) }
    }

    /// True where the code pages hold INT3.
    pub(crate) fn is_end(&self, rip: u64) -> bool {
        // SAFETY: inside the code pages.
        (CODE..CODE + CODE_SIZE).contains(&rip) && unsafe { *(rip as *const u8) } == 0xcc
    }

    /// Bytes of data and stack pages.
    pub(crate) fn bytes(&self, address: u64, len: u64) -> &[u8] {
        assert!(in_pages(address, len));
        // SAFETY: mapped for good, and written only through `&mut self`.
        unsafe { std::slice::from_raw_parts(address as *const u8, len as usize) }
    }

    /// Writes to data and stack pages.
    pub(crate) fn write(&mut self, address: u64, bytes: &[u8]) {
        assert!(in_pages(address, bytes.len() as u64));
        // SAFETY: as in `bytes`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address as *mut u8, bytes.len()) }
    }

    /// Executes from `state.rip` until a trap or fault.
    pub(crate) fn run(&mut self, state: &mut State, bits: u32) -> End {
        let entry = entry_of(state);
        // SAFETY: the control page is ours; the trampoline saves what it must and the handler comes back to it; the code
        // under test can reach only what a user program can, and is generated to touch the test's pages alone.
        unsafe {
            *(CONTROL as *mut u64) = state.rip;
            *((CONTROL + 8) as *mut u64) = state.rip | COMPATIBILITY_CS << 32;
            RUNNING.store(true, Ordering::SeqCst);
            if bits == 64 {
                enter(&raw const entry, HOST_RSP.0.get());
            } else {
                enter_32(&raw const entry, HOST_RSP.0.get());
            }
            RUNNING.store(false, Ordering::SeqCst);
            leave(&*EXIT.0.get(), state)
        }
    }
}

fn in_pages(address: u64, len: u64) -> bool {
    let end = address + len;
    (address >= DATA && end <= DATA + DATA_SIZE) || (address >= STACK && end <= STACK + STACK_SIZE)
}

fn entry_of(state: &State) -> Entry {
    let mut fxsave = [0; 512];
    let unit = &state.x87;
    fxsave[0..2].copy_from_slice(&unit.control.to_le_bytes());
    fxsave[2..4].copy_from_slice(&unit.status.to_le_bytes());
    fxsave[4] = unit.tags;
    fxsave[24..28].copy_from_slice(&state.mxcsr.to_le_bytes());
    for i in 0..8 {
        let (significand, rest) = unit.registers[(unit.top() + i) & 7];
        fxsave[32 + 16 * i..40 + 16 * i].copy_from_slice(&significand.to_le_bytes());
        fxsave[40 + 16 * i..42 + 16 * i].copy_from_slice(&rest.to_le_bytes());
    }
    Entry {
        fxsave,
        ymm: state.ymm,
        gpr: state.gpr,
        rflags: state.rflags,
    }
}

fn leave(exit: &Exit, state: &mut State) -> End {
    state.gpr = exit.gpr;
    state.rip = exit.rip;
    state.rflags = exit.rflags;
    let frame = &exit.frame;
    let u64_at = |at: usize| u64::from_le_bytes(frame[at..at + 8].try_into().unwrap());
    let u128_at = |at: usize| u128::from_le_bytes(frame[at..at + 16].try_into().unwrap());
    let components = u64_at(512);
    state.mxcsr = u64_at(24) as u32;
    for (i, register) in state.ymm.iter_mut().enumerate() {
        let low = if components & 2 != 0 {
            u128_at(160 + 16 * i)
        } else {
            0
        };
        let high = if components & 4 != 0 {
            u128_at(576 + 16 * i)
        } else {
            0
        };
        *register = [low, high];
    }
    if components & 1 == 0 {
        state.x87 = X87::default();
    } else {
        state.x87.control = u64_at(0) as u16;
        state.x87.status = (u64_at(0) >> 16) as u16;
        state.x87.tags = frame[4];
        let top = state.x87.top();
        for i in 0..8 {
            let at = 32 + 16 * i;
            state.x87.registers[(top + i) & 7] = (u64_at(at), u64_at(at + 8) as u16);
        }
    }
    let vector = exit.trap as u8;
    if vector == 3 {
        state.rip -= 1;
    }
    End {
        vector,
        error: if matches!(vector, 8 | 10..=14 | 17) {
            exit.error as u32
        } else {
            0
        },
        address: if vector == 14 { exit.cr2 } else { 0 },
    }
}

/// Loads all registers from the entry at RDI and jumps. The host's stack pointer is left at RSI.
#[unsafe(naked)]
unsafe extern "C" fn enter(_: *const Entry, _: *mut u64) {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rsi], rsp",
        "fxrstor64 [rdi]",
        "vmovdqa ymm0, [rdi + 512]",
        "vmovdqa ymm1, [rdi + 544]",
        "vmovdqa ymm2, [rdi + 576]",
        "vmovdqa ymm3, [rdi + 608]",
        "vmovdqa ymm4, [rdi + 640]",
        "vmovdqa ymm5, [rdi + 672]",
        "vmovdqa ymm6, [rdi + 704]",
        "vmovdqa ymm7, [rdi + 736]",
        "vmovdqa ymm8, [rdi + 768]",
        "vmovdqa ymm9, [rdi + 800]",
        "vmovdqa ymm10, [rdi + 832]",
        "vmovdqa ymm11, [rdi + 864]",
        "vmovdqa ymm12, [rdi + 896]",
        "vmovdqa ymm13, [rdi + 928]",
        "vmovdqa ymm14, [rdi + 960]",
        "vmovdqa ymm15, [rdi + 992]",
        "push qword ptr [rdi + 1152]",
        "popfq",
        "mov rax, [rdi + 1024]",
        "mov rcx, [rdi + 1032]",
        "mov rdx, [rdi + 1040]",
        "mov rbx, [rdi + 1048]",
        "mov rsp, [rdi + 1056]",
        "mov rbp, [rdi + 1064]",
        "mov rsi, [rdi + 1072]",
        "mov r8, [rdi + 1088]",
        "mov r9, [rdi + 1096]",
        "mov r10, [rdi + 1104]",
        "mov r11, [rdi + 1112]",
        "mov r12, [rdi + 1120]",
        "mov r13, [rdi + 1128]",
        "mov r14, [rdi + 1136]",
        "mov r15, [rdi + 1144]",
        "mov rdi, [rdi + 1080]",
        // JMP [CONTROL]: an absolute address, because all registers are taken.
        ".byte 0xff, 0x24, 0x25, 0x00, 0x00, 0x00, 0x2f",
    )
}

/// As [`enter`], but jumps to 32-bit code. Data segments are set to the flat one, which 64-bit code does not look at; so is
/// the stack's, because SYSRET leaves another than its selector says on AMD's processors.
#[unsafe(naked)]
unsafe extern "C" fn enter_32(_: *const Entry, _: *mut u64) {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rsi], rsp",
        "mov eax, 0x2b",
        "mov ds, eax",
        "mov es, eax",
        "mov ss, eax",
        "fxrstor64 [rdi]",
        "vmovdqa ymm0, [rdi + 512]",
        "vmovdqa ymm1, [rdi + 544]",
        "vmovdqa ymm2, [rdi + 576]",
        "vmovdqa ymm3, [rdi + 608]",
        "vmovdqa ymm4, [rdi + 640]",
        "vmovdqa ymm5, [rdi + 672]",
        "vmovdqa ymm6, [rdi + 704]",
        "vmovdqa ymm7, [rdi + 736]",
        "push qword ptr [rdi + 1152]",
        "popfq",
        "mov rax, [rdi + 1024]",
        "mov rcx, [rdi + 1032]",
        "mov rdx, [rdi + 1040]",
        "mov rbx, [rdi + 1048]",
        "mov rsp, [rdi + 1056]",
        "mov rbp, [rdi + 1064]",
        "mov rsi, [rdi + 1072]",
        "mov rdi, [rdi + 1080]",
        // JMP FAR [CONTROL + 8].
        ".byte 0xff, 0x2c, 0x25, 0x08, 0x00, 0x00, 0x2f",
    )
}

/// Where the handler goes on: returns from [`enter`].
#[unsafe(naked)]
unsafe extern "C" fn landing() {
    naked_asm!(
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx", "ret"
    )
}

fn install_handlers() {
    static STACK_MEMORY: Shared<[u8; 65536]> = Shared(UnsafeCell::new([0; 65536]));
    // SAFETY: the alternate stack is static and used by one thread at a time; the handler only copies.
    unsafe {
        let stack = libc::stack_t {
            ss_sp: STACK_MEMORY.0.get().cast(),
            ss_flags: 0,
            ss_size: 65536,
        };
        libc::sigaltstack(&raw const stack, std::ptr::null_mut());
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        for signal in [
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGILL,
            libc::SIGFPE,
            libc::SIGTRAP,
        ] {
            libc::sigaction(signal, &raw const action, std::ptr::null_mut());
        }
    }
}

extern "C" fn handler(signal: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    if !RUNNING.load(Ordering::SeqCst) {
        // A fault of the test itself: let it have its usual end.
        // SAFETY: sets the default action.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        return;
    }
    // The code under test may have set AC, and Linux leaves it to the handler.
    // SAFETY: uses aligned stack only.
    unsafe {
        std::arch::asm!("pushfq", "and dword ptr [rsp], 0xfffbffff", "popfq");
    }
    // SAFETY: the kernel gives a valid context whose floating-point frame has the XSAVE format; `run` waits for us.
    unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        let registers = &mut context.uc_mcontext.gregs;
        let exit = &mut *EXIT.0.get();
        let order = [
            libc::REG_RAX,
            libc::REG_RCX,
            libc::REG_RDX,
            libc::REG_RBX,
            libc::REG_RSP,
            libc::REG_RBP,
            libc::REG_RSI,
            libc::REG_RDI,
            libc::REG_R8,
            libc::REG_R9,
            libc::REG_R10,
            libc::REG_R11,
            libc::REG_R12,
            libc::REG_R13,
            libc::REG_R14,
            libc::REG_R15,
        ];
        for (to, from) in exit.gpr.iter_mut().zip(order) {
            *to = registers[from as usize] as u64;
        }
        exit.rip = registers[libc::REG_RIP as usize] as u64;
        exit.rflags = registers[libc::REG_EFL as usize] as u64;
        exit.trap = registers[libc::REG_TRAPNO as usize] as u64;
        exit.error = registers[libc::REG_ERR as usize] as u64;
        exit.cr2 = registers[libc::REG_CR2 as usize] as u64;
        let frame = context.uc_mcontext.fpregs.cast::<u8>();
        std::ptr::copy_nonoverlapping(frame, exit.frame.as_mut_ptr(), 832);
        // Back to the host's world: control words, empty x87 stack, flags.
        frame.cast::<u16>().write_unaligned(0x37f);
        frame.add(2).cast::<u16>().write_unaligned(0);
        frame.add(4).cast::<u8>().write_unaligned(0);
        frame.add(24).cast::<u32>().write_unaligned(0x1f80);
        registers[libc::REG_RIP as usize] = landing as *const () as i64;
        registers[libc::REG_RSP as usize] = *HOST_RSP.0.get() as i64;
        registers[libc::REG_EFL as usize] = 0x202;
        let selectors = &mut registers[libc::REG_CSGSFS as usize];
        *selectors = *selectors & !0xffff | LONG_CS;
    }
}
