//! Image locks that QEMU honours and whose locks we honour.
//!
//! A process that uses an image takes open-file-description locks, all of them shared, on single bytes
//! of it: byte 100 + p says "I use permission p", byte 200 + p says "I do not let others use p". Then it
//! tests that no one else holds the byte that contradicts its own. (docs: QEMU's block layer,
//! `RAW_LOCK_PERM_BASE` and `RAW_LOCK_SHARED_BASE`.)

#![allow(unsafe_code)] // fcntl with open-file-description locks.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use crate::error::{BlockError, ErrorKind, Result};

const PERMISSION_BASE: i64 = 100;
const UNSHARED_BASE: i64 = 200;

/// Permission numbers as QEMU counts them.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// How an image is locked while it is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LockMode {
    /// No locks and no test: for looking at an image that may be in use.
    None,
    /// Others may read it too; nobody may write it.
    #[default]
    Read,
    /// Nobody else may write it; others may not count on what they read.
    Write,
    /// Writers may share it (each takes care of its own part).
    SharedWrite,
}

struct Wanted {
    used: &'static [i64],
    unshared: &'static [i64],
}

impl Wanted {
    /// The bytes to lock.
    fn bytes(&self) -> impl Iterator<Item = i64> + use<> {
        let used = self.used.iter().map(|p| PERMISSION_BASE + p);
        used.chain(self.unshared.iter().map(|p| UNSHARED_BASE + p))
    }
}

impl LockMode {
    fn wanted(self) -> Wanted {
        match self {
            Self::None => Wanted {
                used: &[],
                unshared: &[],
            },
            Self::Read => Wanted {
                used: &[CONSISTENT_READ],
                unshared: &[WRITE, RESIZE],
            },
            Self::Write => {
                let used = &[CONSISTENT_READ, WRITE, RESIZE];
                Wanted {
                    used,
                    unshared: &[WRITE, RESIZE],
                }
            }
            Self::SharedWrite => Wanted {
                used: &[CONSISTENT_READ, WRITE],
                unshared: &[RESIZE],
            },
        }
    }
}

/// How long a lock may outlive its use: a process that is being started has all files of its parent, and with them
/// their locks, until it runs its own program, and the kernel closes the files of a killed one when it gets to it.
const LINGERS: Duration = Duration::from_millis(250);

/// Takes the locks of `mode` on `file`, called `name` in messages. Waits up to a quarter of a second for others.
///
/// The locks go with the file description; on an error those taken so far do, because the caller then
/// closes the file.
pub(crate) fn lock(file: BorrowedFd<'_>, name: &str, mode: LockMode) -> Result<()> {
    let begin = Instant::now();
    while !try_lock(file, name, mode)? {
        if begin.elapsed() >= LINGERS {
            return Err(locked(file, name));
        }
        // Two that want to write would refuse each other as long as both keep what they have.
        unlock(file, mode);
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Gives up what [`try_lock`] took. A lock that can't be given up goes with the file.
fn unlock(file: BorrowedFd<'_>, mode: LockMode) {
    for byte in mode.wanted().bytes() {
        let _ = fcntl_lock(file, libc::F_OFD_SETLK, libc::F_UNLCK, byte);
    }
}

/// False: somebody else has a lock that contradicts.
fn try_lock(file: BorrowedFd<'_>, name: &str, mode: LockMode) -> Result<bool> {
    let wanted = mode.wanted();
    for byte in wanted.bytes() {
        match fcntl_lock(file, libc::F_OFD_SETLK, libc::F_RDLCK, byte) {
            Ok(_) => {}
            // A file system without locks: QEMU goes on without them too.
            Err(e) if is_unsupported(&e) => return Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => return Ok(false),
            Err(e) => return Err(BlockError::io(format!("cannot lock '{name}'"), e)),
        }
    }
    let contradicting = wanted.used.iter().map(|p| UNSHARED_BASE + p);
    let contradicting = contradicting.chain(wanted.unshared.iter().map(|p| PERMISSION_BASE + p));
    for byte in contradicting {
        let held = fcntl_lock(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte)
            .map_err(|e| BlockError::io(format!("cannot test the locks of '{name}'"), e))?;
        if held != libc::F_UNLCK {
            return Ok(false);
        }
    }
    Ok(true)
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::EINVAL)
    )
}

/// One fcntl call on one byte; returns the lock type that the kernel filled in.
fn fcntl_lock(file: BorrowedFd<'_>, command: i32, kind: i32, byte: i64) -> io::Result<i32> {
    let short = |value: i32| i16::try_from(value).unwrap_or(0);
    let mut lock = libc::flock {
        l_type: short(kind),
        l_whence: short(libc::SEEK_SET),
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    };
    // SAFETY: `lock` is a valid `struct flock` for the length of the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(i32::from(lock.l_type))
}

fn locked(file: BorrowedFd<'_>, name: &str) -> BlockError {
    let holder = match holder(file) {
        Some((process, command)) => format!("process {process} ({command})"),
        None => "another process".to_owned(),
    };
    BlockError::new(
        ErrorKind::Locked,
        format!("the image '{name}' is in use by {holder}"),
    )
}

/// Finds a process that holds an image lock on the file, by the lock lines of its descriptors. Only
/// processes that we may look at are found.
fn holder(file: BorrowedFd<'_>) -> Option<(u32, String)> {
    let inode = rustix::fs::fstat(file).ok()?.st_ino;
    let own = file.as_raw_fd().to_string();
    let processes = std::fs::read_dir("/proc").ok()?.flatten();
    let numbers = processes.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    for process in numbers {
        let Ok(descriptors) = std::fs::read_dir(format!("/proc/{process}/fdinfo")) else {
            continue;
        };
        for descriptor in descriptors.flatten() {
            if process == std::process::id() && descriptor.file_name().to_str() == Some(&own) {
                continue;
            }
            let Ok(text) = std::fs::read_to_string(descriptor.path()) else {
                continue;
            };
            let path = format!("/proc/{process}/fd/{}", descriptor.file_name().display());
            if has_image_lock(&text, inode)
                && std::fs::metadata(path).is_ok_and(|m| m.ino() == inode)
            {
                let command = std::fs::read_to_string(format!("/proc/{process}/comm"));
                let command = command.unwrap_or_else(|_| "?".to_owned()).trim().to_owned();
                return Some((process, command));
            }
        }
    }
    None
}

/// Whether a descriptor's information has a line like
/// `lock: 1: OFDLCK ADVISORY READ -1 fe:00:1234 101 101` for this inode and one of our bytes.
fn has_image_lock(fdinfo: &str, inode: u64) -> bool {
    fdinfo
        .lines()
        .filter(|line| line.starts_with("lock:"))
        .any(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let Some(kind) = words.iter().position(|w| *w == "OFDLCK") else {
                return false;
            };
            let place = words.get(kind + 4).and_then(|w| w.rsplit(':').next());
            let start = words.get(kind + 5).and_then(|w| w.parse::<i64>().ok());
            place == Some(inode.to_string().as_str())
                && start.is_some_and(|s| (PERMISSION_BASE..UNSHARED_BASE + 8).contains(&s))
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn open(path: &std::path::Path) -> std::fs::File {
        std::fs::File::options()
            .read(true)
            .write(true)
            .open(path)
            .unwrap()
    }

    #[test]
    fn writers_exclude_each_other_and_readers() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let try_lock = |mode| {
            let file = open(file.path());
            lock(file.as_fd(), "disk.img", mode).map(|()| file)
        };
        let first = try_lock(LockMode::Read).unwrap();
        let second = try_lock(LockMode::Read).unwrap();
        let error = try_lock(LockMode::Write).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Locked);
        drop((first, second));
        let writer = try_lock(LockMode::Write).unwrap();
        assert_eq!(
            try_lock(LockMode::Read).unwrap_err().kind(),
            ErrorKind::Locked
        );
        assert_eq!(
            try_lock(LockMode::Write).unwrap_err().kind(),
            ErrorKind::Locked
        );
        try_lock(LockMode::None).unwrap();
        drop(writer);
        let shared = try_lock(LockMode::SharedWrite).unwrap();
        try_lock(LockMode::SharedWrite).unwrap();
        assert!(try_lock(LockMode::Write).is_err());
        drop(shared);
        try_lock(LockMode::Write).unwrap();
    }

    #[test]
    fn a_lock_that_is_about_to_go_is_waited_for() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let writer = open(file.path());
        lock(writer.as_fd(), "disk.img", LockMode::Write).unwrap();
        let ends = std::thread::spawn(move || {
            std::thread::sleep(LINGERS / 5);
            drop(writer);
        });
        let other = open(file.path());
        lock(other.as_fd(), "disk.img", LockMode::Write).unwrap();
        ends.join().unwrap();
    }

    #[test]
    fn errors_name_the_holder() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let writer = open(file.path());
        lock(writer.as_fd(), "disk.img", LockMode::Write).unwrap();
        let other = open(file.path());
        let error = lock(other.as_fd(), "disk.img", LockMode::Write).unwrap_err();
        let expected = format!(
            "the image 'disk.img' is in use by process {}",
            std::process::id()
        );
        assert!(error.message().starts_with(&expected), "{error}");
    }
}
