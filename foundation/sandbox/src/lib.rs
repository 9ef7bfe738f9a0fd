//! Work on untrusted input in a child process that can do nothing but work.
//!
//! The child has one descriptor, a socket to its parent, and asks there for each file that it needs; what it may have
//! is decided by code that never sees the input. It can open nothing itself and reach no network: seccomp (Linux
//! `Documentation/userspace-api/seccomp_filter.rst`) refuses every system call but those that compute, read and
//! answer, and Landlock (`Documentation/userspace-api/landlock.rst`) every access to a file system, to ports and to
//! processes outside, should one come through.

mod channel;
mod confine;

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, WaitOptions, waitpid};

use channel::{Channel, Kind};

/// The longest message either side may send, in bytes.
pub const MAX_MESSAGE: usize = 64 << 20;

/// Exit status of a child that could not shut itself in.
const NOT_CONFINED: i32 = 3;

/// The child's way to its parent.
pub struct Parent(Rc<Channel>);

impl Parent {
    /// Asks the parent; the answer may come with a descriptor.
    ///
    /// # Errors
    ///
    /// If the parent is gone, or the message is longer than [`MAX_MESSAGE`].
    pub fn ask(&self, question: &[u8]) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
        self.0.send(Kind::Question, question, None)?;
        match self.0.receive()? {
            Some((Kind::Answer, answer, descriptor)) => Ok((answer, descriptor)),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// Runs `work` in a confined child and returns what it returns. Meanwhile `serve` answers the child's questions, with
/// a descriptor or without one.
///
/// The calling process must have one thread, as the child is a fork of it. Nothing that `work` does stays.
///
/// # Errors
///
/// `Unsupported` if the kernel does not let it be confined. Else, if it cannot be made or ends without a result: by a
/// signal, a panic, too long a message. The text says which.
pub fn run(
    work: impl FnOnce(Parent) -> Vec<u8>,
    mut serve: impl FnMut(&[u8]) -> (Vec<u8>, Option<OwnedFd>),
) -> io::Result<Vec<u8>> {
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let Some(child) = fork()? else {
        in_child(theirs, work)
    };
    drop(theirs);
    let channel = Channel::new(ours);
    let mut result = None;
    let served: io::Result<()> = loop {
        match channel.receive() {
            Ok(Some((Kind::Question, question, _))) => {
                let (answer, descriptor) = serve(&question);
                if let Err(error) = channel.send(Kind::Answer, &answer, descriptor.as_ref()) {
                    break Err(error);
                }
            }
            Ok(Some((Kind::Result, bytes, _))) => result = Some(bytes),
            Ok(Some(_)) => break Err(io::ErrorKind::InvalidData.into()),
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    // It has nobody to talk to any more, and ends.
    drop(channel);
    let ended = rustix::io::retry_on_intr(|| waitpid(Some(child), WaitOptions::empty()))?;
    match (result, served) {
        (Some(result), Ok(())) => Ok(result),
        (_, Err(error)) => Err(error),
        (None, Ok(())) => {
            let status = ended.map(|(_, status)| status);
            let signal = status.and_then(rustix::process::WaitStatus::terminating_signal);
            let code = status.and_then(rustix::process::WaitStatus::exit_status);
            Err(match (signal, code) {
                (_, Some(NOT_CONFINED)) => {
                    let message = "the kernel does not let a sandbox be made";
                    io::Error::new(io::ErrorKind::Unsupported, message)
                }
                (Some(signal), _) => {
                    io::Error::other(format!("the sandboxed child was ended by signal {signal}"))
                }
                _ => io::Error::other("the sandboxed child ended without a result"),
            })
        }
    }
}

/// `None` in the child.
fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: the caller promises that there is one thread, so that no lock is held by one that the child lacks.
    #[allow(unsafe_code)]
    let child = unsafe { libc::fork() };
    match child {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(None),
        child => Ok(Pid::from_raw(child)),
    }
}

fn in_child(socket: OwnedFd, work: impl FnOnce(Parent) -> Vec<u8>) -> ! {
    // A panic must not unwind into what the parent was about to do, and has nowhere to be told.
    std::panic::set_hook(Box::new(|_| {}));
    let Ok(channel) = confine::with_only(socket).map(Channel::new) else {
        exit(NOT_CONFINED)
    };
    let channel = Rc::new(channel);
    let parent = Parent(channel.clone());
    let work = std::panic::AssertUnwindSafe(|| work(parent));
    let Ok(result) = std::panic::catch_unwind(work) else {
        exit(101)
    };
    let sent = channel.send(Kind::Result, &result, None);
    exit(i32::from(sent.is_err()))
}

/// Ends the process without what the parent left to be done at its exit.
fn exit(status: i32) -> ! {
    // SAFETY: takes a number and does not return.
    #[allow(unsafe_code)]
    unsafe {
        libc::_exit(status)
    }
}
