//! Host files and block devices as media.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;

use rustix::fs::{FileType, Mode, OFlags, SeekFrom};

use crate::backend::{BlockFuture, ZeroFlags};
use crate::buffer::IoBuf;
use crate::error::{BlockError, ErrorKind, Result};
use crate::executor::{Executor, Operation};
use crate::lock::{LockMode, lock};
use crate::medium::{Medium, SparseRange};
use crate::sync::RangeLocks;

/// How a host file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FileOptions {
    /// Open for writing too.
    pub write: bool,
    /// Make a new file, or empty the one that is there (once its lock is held).
    pub create: bool,
    /// With `create`: fail if there is a file already.
    pub exclusive: bool,
    /// Pass the host's page cache by (`O_DIRECT`).
    pub direct: bool,
    /// The image lock to hold while the file is open.
    pub lock: LockMode,
    /// Do nothing when asked to flush: quicker, and a power cut may leave anything.
    pub ignore_flush: bool,
}

/// A file or block device of the host.
pub struct HostFile {
    file: Rc<OwnedFd>,
    name: Rc<str>,
    length: Cell<u64>,
    writable: bool,
    ignore_flush: bool,
    block_device: bool,
    /// What direct I/O demands of offsets, lengths and addresses; 1 through the page cache.
    alignment: u32,
    /// Orders read-modify-write cycles and the writes that they overlap.
    writing: RangeLocks,
    /// What the file system has been found not to be able to do.
    no_punch: Cell<bool>,
    no_zero_range: Cell<bool>,
    executor: Rc<Executor>,
}

/// Zeroes are written as data in pieces of this size where the file system has no better way.
const ZERO_PIECE: usize = 1 << 20;

impl HostFile {
    /// Opens `path`. Must run on an executor, which serves the file from then on.
    ///
    /// # Errors
    ///
    /// `NotFound`, `PermissionDenied`, `Locked`, `AlreadyExists`, `Unsupported` for anything but
    /// files and block devices; each names the file.
    pub fn open(path: &Path, options: &FileOptions) -> Result<Self> {
        let name: Rc<str> = path.to_string_lossy().into();
        let file = open_descriptor(path, &name, options)?;
        Self::from_descriptor(file, name, options)
    }

    /// Takes an open file. `name` is what messages call it. Only `write`, `create` (empties it) and
    /// `lock` of the options count; `direct` says how it was opened.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub fn from_descriptor(file: OwnedFd, name: Rc<str>, options: &FileOptions) -> Result<Self> {
        let failed =
            |e: rustix::io::Errno| BlockError::io(format!("cannot open '{name}'"), e.into());
        let block_device = check_kind(&file, &name)?;
        lock(file.as_fd(), &name, options.lock)?;
        if options.create && !block_device {
            rustix::fs::ftruncate(&file, 0).map_err(failed)?;
        }
        let length = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(failed)?;
        let alignment = if options.direct {
            direct_alignment(&file)
        } else {
            1
        };
        Ok(Self {
            file: Rc::new(file),
            name,
            length: Cell::new(length),
            writable: options.write,
            ignore_flush: options.ignore_flush,
            block_device,
            alignment,
            writing: RangeLocks::default(),
            no_punch: Cell::new(false),
            no_zero_range: Cell::new(false),
            executor: Executor::current()?,
        })
    }

    /// An empty file without a name in `directory`, gone when it is closed.
    ///
    /// # Errors
    ///
    /// If the directory does not let us.
    pub fn temporary(directory: &Path) -> Result<Self> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR).map_err(|e| {
            let place = directory.display();
            BlockError::io(
                format!("cannot create a temporary file in '{place}'"),
                e.into(),
            )
        })?;
        let options = FileOptions {
            write: true,
            lock: LockMode::None,
            // Nobody can open it after a power cut.
            ignore_flush: true,
            ..FileOptions::default()
        };
        Self::from_descriptor(file, "temporary file".into(), &options)
    }

    /// The descriptor, for calls that this type does not have.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Whether it is a block device.
    pub fn is_block_device(&self) -> bool {
        self.block_device
    }

    fn failed(&self, what: &str, offset: u64, length: u64, error: io::Error) -> BlockError {
        let name = &self.name;
        BlockError::io(
            format!("cannot {what} {length} bytes at {offset} of '{name}'"),
            error,
        )
    }

    /// Reads until `buf` is full or the file ends; the rest is zeroes.
    async fn read_fully(&self, offset: u64, buf: &IoBuf) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let rest = if done == 0 {
                buf.clone()
            } else {
                buf.slice(done, buf.len() - done)
            };
            let at = offset + done as u64;
            let read = Operation::Read {
                file: self.file.clone(),
                offset: at,
                buf: rest,
            };
            match self.executor.submit(read).await {
                0 => {
                    buf.fill_at(done, buf.len() - done, 0);
                    break;
                }
                count @ 1.. => done += usize::try_from(count).unwrap_or(0),
                error if is_transient(error) => {}
                error => {
                    return Err(self.failed("read", at, buf.len() as u64, errno(error)));
                }
            }
            // Direct I/O ends at the end of the file with a count that is no multiple of anything.
            if self.alignment > 1 && !done.is_multiple_of(self.alignment as usize) {
                buf.fill_at(done, buf.len() - done, 0);
                break;
            }
        }
        Ok(())
    }

    async fn write_fully(&self, offset: u64, buf: &IoBuf) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let rest = if done == 0 {
                buf.clone()
            } else {
                buf.slice(done, buf.len() - done)
            };
            let at = offset + done as u64;
            let write = Operation::Write {
                file: self.file.clone(),
                offset: at,
                buf: rest,
            };
            match self.executor.submit(write).await {
                0 => {
                    let error = io::Error::from_raw_os_error(libc::ENOSPC);
                    return Err(self.failed("write", at, buf.len() as u64, error));
                }
                count @ 1.. => done += usize::try_from(count).unwrap_or(0),
                error if is_transient(error) => {}
                error => {
                    return Err(self.failed("write", at, buf.len() as u64, errno(error)));
                }
            }
        }
        self.length
            .set(self.length.get().max(offset + buf.len() as u64));
        Ok(())
    }

    fn is_aligned(&self, offset: u64, buf: &IoBuf) -> bool {
        self.alignment == 1
            || (offset.is_multiple_of(u64::from(self.alignment))
                && buf.is_aligned(self.alignment as usize))
    }

    /// The whole blocks around a range.
    fn around(&self, offset: u64, length: u64) -> (u64, u64) {
        let alignment = u64::from(self.alignment);
        let start = offset - offset % alignment;
        (start, (offset + length).next_multiple_of(alignment) - start)
    }

    async fn read_unaligned(&self, offset: u64, buf: &IoBuf) -> Result<()> {
        let (start, length) = self.around(offset, buf.len() as u64);
        let bounce = IoBuf::zeroed(to_usize(length)?);
        self.read_fully(start, &bounce).await?;
        let part = bounce.slice(to_usize(offset - start)?, buf.len());
        buf.copy_from(&part.to_vec());
        Ok(())
    }

    async fn write_unaligned(&self, offset: u64, buf: &IoBuf) -> Result<()> {
        let (start, length) = self.around(offset, buf.len() as u64);
        let _exclusive = self.writing.lock(start, length).await;
        let bounce = IoBuf::zeroed(to_usize(length)?);
        let whole = start == offset && length == buf.len() as u64;
        if !whole {
            self.read_fully(start, &bounce).await?;
        }
        bounce.copy_from_at(to_usize(offset - start)?, &buf.to_vec());
        let end = offset + buf.len() as u64;
        let former_length = self.length.get();
        self.write_fully(start, &bounce).await?;
        if !self.block_device && end.max(former_length) < start + length {
            // The last block was filled up; the file must not grow by that.
            self.truncate(end.max(former_length))?;
        }
        Ok(())
    }

    fn truncate(&self, length: u64) -> Result<()> {
        rustix::fs::ftruncate(&self.file, length).map_err(|e| {
            let name = &self.name;
            BlockError::io(
                format!("cannot make '{name}' {length} bytes long"),
                e.into(),
            )
        })?;
        self.length.set(length);
        Ok(())
    }

    async fn allocate(&self, mode: i32, offset: u64, length: u64) -> Result<(), io::Error> {
        loop {
            let file = self.file.clone();
            let operation = Operation::Allocate {
                file,
                mode,
                offset,
                length,
            };
            match self.executor.submit(operation).await {
                0.. => return Ok(()),
                error if is_transient(error) => {}
                error => return Err(errno(error)),
            }
        }
    }

    /// Tries the file system's own ways to zero a range inside the file.
    async fn zero_quickly(&self, offset: u64, length: u64, unmap: bool) -> Result<bool> {
        let ways = [
            (
                unmap,
                &self.no_punch,
                libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            ),
            (
                true,
                &self.no_zero_range,
                libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
            ),
        ];
        for (wanted, missing, mode) in ways {
            if !wanted || missing.get() {
                continue;
            }
            match self.allocate(mode, offset, length).await {
                Ok(()) => return Ok(true),
                Err(e) if is_missing(&e) => missing.set(true),
                Err(e) => return Err(self.failed("zero", offset, length, e)),
            }
        }
        Ok(false)
    }

    async fn zero_as_data(&self, offset: u64, length: u64) -> Result<()> {
        let piece = IoBuf::zeroed(to_usize(length.min(ZERO_PIECE as u64))?);
        let mut done = 0;
        while done < length {
            let n = to_usize((length - done).min(ZERO_PIECE as u64))?;
            self.write_dispatch(offset + done, piece.slice(0, n))
                .await?;
            done += n as u64;
        }
        Ok(())
    }

    async fn write_dispatch(&self, offset: u64, buf: IoBuf) -> Result<()> {
        if offset
            .checked_add(buf.len() as u64)
            .is_none_or(|end| end > i64::MAX.cast_unsigned())
        {
            let error = io::Error::from_raw_os_error(libc::EFBIG);
            return Err(self.failed("write", offset, buf.len() as u64, error));
        }
        if !self.is_aligned(offset, &buf) {
            return self.write_unaligned(offset, &buf).await;
        }
        if self.alignment > 1 {
            let _order = self.writing.share(offset, buf.len() as u64).await;
            return self.write_fully(offset, &buf).await;
        }
        self.write_fully(offset, &buf).await
    }

    async fn zero_range(&self, offset: u64, length: u64, flags: ZeroFlags) -> Result<()> {
        let end = offset + length;
        let inside = self.length.get().clamp(offset, end) - offset;
        let unmap = flags.contains(ZeroFlags::MAY_UNMAP);
        if inside > 0 && !self.zero_quickly(offset, inside, unmap).await? {
            if flags.contains(ZeroFlags::NO_FALLBACK) {
                let message = format!("the host cannot zero parts of '{}' quickly", self.name);
                return Err(BlockError::unsupported(message));
            }
            self.zero_as_data(offset, inside).await?;
        }
        if end > self.length.get() && !self.block_device {
            self.truncate(end)?;
        }
        Ok(())
    }
}

impl Medium for HostFile {
    fn name(&self) -> Rc<str> {
        self.name.clone()
    }

    fn len(&self) -> u64 {
        self.length.get()
    }

    fn read_only(&self) -> bool {
        !self.writable
    }

    fn alignment(&self) -> u32 {
        self.alignment
    }

    fn read(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            if self.is_aligned(offset, &buf) {
                self.read_fully(offset, &buf).await
            } else {
                self.read_unaligned(offset, &buf).await
            }
        })
    }

    fn write(&self, offset: u64, buf: IoBuf) -> BlockFuture<'_, ()> {
        Box::pin(self.write_dispatch(offset, buf))
    }

    fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> BlockFuture<'_, ()> {
        Box::pin(self.zero_range(offset, length, flags))
    }

    fn discard(&self, offset: u64, length: u64) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            let length = self.length.get().clamp(offset, offset + length) - offset;
            if length == 0 || self.no_punch.get() {
                return Ok(());
            }
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            match self.allocate(mode, offset, length).await {
                Ok(()) => Ok(()),
                Err(e) if is_missing(&e) => {
                    self.no_punch.set(true);
                    Ok(())
                }
                Err(e) => Err(self.failed("discard", offset, length, e)),
            }
        })
    }

    fn preallocate(&self, offset: u64, length: u64) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            if length == 0 || self.block_device {
                return Ok(());
            }
            self.allocate(0, offset, length)
                .await
                .map_err(|e| self.failed("reserve", offset, length, e))?;
            self.length.set(self.length.get().max(offset + length));
            Ok(())
        })
    }

    fn flush(&self) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            if self.ignore_flush {
                return Ok(());
            }
            loop {
                let operation = Operation::Sync {
                    file: self.file.clone(),
                };
                match self.executor.submit(operation).await {
                    0.. => return Ok(()),
                    error if is_transient(error) => {}
                    error => {
                        let message = format!("cannot flush '{}'", self.name);
                        return Err(BlockError::io(message, errno(error)));
                    }
                }
            }
        })
    }

    fn set_len(&self, length: u64) -> BlockFuture<'_, ()> {
        Box::pin(async move {
            if !self.block_device {
                return self.truncate(length);
            }
            if length > self.length.get() {
                let message = format!("the block device '{}' cannot grow", self.name);
                return Err(BlockError::new(ErrorKind::NoSpace, message));
            }
            Ok(())
        })
    }

    fn sparse_range(&self, offset: u64, length: u64) -> Result<SparseRange> {
        let stored = |length| Ok(SparseRange { data: true, length });
        if self.block_device {
            return stored(length);
        }
        let end = offset + length;
        let data = match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) => data,
            // No more data after this place.
            Err(rustix::io::Errno::NXIO) => {
                return Ok(SparseRange {
                    data: false,
                    length,
                });
            }
            Err(rustix::io::Errno::INVAL) => return stored(length),
            Err(e) => return Err(self.failed("find data in", offset, length, e.into())),
        };
        if data > offset {
            return Ok(SparseRange {
                data: false,
                length: data.min(end) - offset,
            });
        }
        match rustix::fs::seek(&self.file, SeekFrom::Hole(offset)) {
            Ok(hole) if hole > offset => stored(hole.min(end) - offset),
            _ => stored(length),
        }
    }
}

/// Opens a file or block device for reading, unlocked, for somebody else to read.
///
/// # Errors
///
/// As [`HostFile::open`].
pub fn open_to_read(path: &Path) -> Result<OwnedFd> {
    let name = path.to_string_lossy();
    let file = open_descriptor(path, &name, &FileOptions::default())?;
    check_kind(&file, &name)?;
    Ok(file)
}

/// Whether it is a block device; an error for what is no file either.
fn check_kind(file: &OwnedFd, name: &str) -> Result<bool> {
    let stat = rustix::fs::fstat(file)
        .map_err(|e| BlockError::io(format!("cannot open '{name}'"), e.into()))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(false),
        FileType::BlockDevice => Ok(true),
        _ => {
            let message = format!("'{name}' is neither a file nor a block device");
            Err(BlockError::unsupported(message))
        }
    }
}

fn open_descriptor(path: &Path, name: &str, options: &FileOptions) -> Result<OwnedFd> {
    let mut flags = OFlags::CLOEXEC | OFlags::NONBLOCK;
    flags |= if options.write {
        OFlags::RDWR
    } else {
        OFlags::RDONLY
    };
    if options.create {
        flags |= OFlags::CREATE;
    }
    if options.exclusive {
        flags |= OFlags::EXCL;
    }
    if options.direct {
        flags |= OFlags::DIRECT;
    }
    let verb = if options.create { "create" } else { "open" };
    let file = rustix::fs::open(path, flags, Mode::from_raw_mode(0o644)).map_err(|e| {
        let hint = if options.direct && e == rustix::io::Errno::INVAL {
            " for direct I/O, which its file system does not have"
        } else {
            ""
        };
        BlockError::io(format!("cannot {verb} '{name}'{hint}"), e.into())
    })?;
    // Non-blocking only kept the open of a pipe from waiting; io_uring would take it literally.
    let plain = flags & OFlags::DIRECT;
    rustix::fs::fcntl_setfl(&file, plain)
        .map_err(|e| BlockError::io(format!("cannot {verb} '{name}'"), e.into()))?;
    Ok(file)
}

/// Finds the smallest block that the file takes in direct reads.
fn direct_alignment(file: &OwnedFd) -> u32 {
    for alignment in [512usize, 1024, 2048] {
        let mut bytes = vec![0u8; 2 * 4096 + alignment];
        let start =
            bytes.as_ptr().addr().next_multiple_of(4096) - bytes.as_ptr().addr() + alignment;
        let Some(target) = bytes.get_mut(start..start + alignment) else {
            continue;
        };
        if rustix::io::pread(file, target, 0).is_ok() {
            return u32::try_from(alignment).unwrap_or(4096);
        }
    }
    4096
}

fn is_transient(result: i32) -> bool {
    result == -libc::EINTR || result == -libc::EAGAIN
}

fn errno(result: i32) -> io::Error {
    io::Error::from_raw_os_error(-result)
}

/// Whether the file system has no such operation, as opposed to a failure of it.
fn is_missing(error: &io::Error) -> bool {
    let numbers = [
        libc::EOPNOTSUPP,
        libc::ENOTTY,
        libc::ENODEV,
        libc::EINVAL,
        libc::ENOSYS,
    ];
    error
        .raw_os_error()
        .is_some_and(|number| numbers.contains(&number))
}

fn to_usize(value: u64) -> Result<usize> {
    usize::try_from(value).map_err(|_| {
        BlockError::new(
            ErrorKind::InvalidArgument,
            "a transfer larger than the address space",
        )
    })
}
