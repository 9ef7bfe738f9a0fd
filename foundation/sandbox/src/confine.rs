//! Giving up what a process may do.

use std::collections::BTreeMap;
use std::error::Error;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, Scope,
};
use rustix::process::{DumpableBehavior, Signal};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// The system calls of a process that computes, reads what it was given, and answers.
const ALLOWED: [i64; 30] = [
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_close,
    libc::SYS_eventfd2,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fstat,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_read,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_restart_syscall,
    // Without it, a handler of faults that wants to step aside returns for ever.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_write,
];

/// Shuts this process in, with nothing but `socket`, which gets another number.
pub(crate) fn with_only(socket: OwnedFd) -> Result<OwnedFd> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    let socket = alone(socket)?;
    // No debugger looks in, no core is left, and no set-user-ID program gives anything back.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    rustix::thread::set_no_new_privs(true)?;
    forbid_files()?;
    filter_calls()?;
    Ok(socket)
}

/// Closes everything but `socket`, which becomes descriptor 0.
fn alone(socket: OwnedFd) -> Result<OwnedFd> {
    let socket = socket.into_raw_fd();
    // SAFETY: numbers are passed; the process has one thread, and what owned the closed descriptors is never
    // used or dropped in the child, which ends by _exit.
    #[allow(unsafe_code)]
    let (moved, closed) = unsafe {
        let moved = libc::dup2(socket, 0);
        (moved, libc::syscall(libc::SYS_close_range, 1, u32::MAX, 0))
    };
    if moved != 0 || closed != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    // SAFETY: descriptor 0 was made above and is owned by nothing else.
    #[allow(unsafe_code)]
    Ok(unsafe { OwnedFd::from_raw_fd(0) })
}

/// No file system, port or process outside, as far as the kernel's Landlock goes; an old one's may know less.
fn forbid_files() -> Result<()> {
    let abi = ABI::V6;
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?;
    ruleset.create()?.restrict_self()?;
    Ok(())
}

fn filter_calls() -> Result<()> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    // Memory never becomes code.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        let executable = SeccompCmpOp::MaskedEq(libc::PROT_EXEC.cast_unsigned().into());
        let data = SeccompCondition::new(2, SeccompCmpArgLen::Dword, executable, 0)?;
        rules.insert(call, vec![SeccompRule::new(vec![data])?]);
    }
    // It may end itself.
    let own = rustix::process::getpid().as_raw_nonzero().get();
    let own = u64::from(own.cast_unsigned());
    let itself = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, own)?;
    rules.insert(libc::SYS_tgkill, vec![SeccompRule::new(vec![itself])?]);
    let refused = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let arch = std::env::consts::ARCH.try_into()?;
    let filter = SeccompFilter::new(rules, refused, SeccompAction::Allow, arch)?;
    let program: BpfProgram = filter.try_into()?;
    seccompiler::apply_filter(&program)?;
    Ok(())
}
