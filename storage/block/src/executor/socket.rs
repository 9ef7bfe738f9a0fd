//! Stream sockets whose transfers go through the executor.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use rustix::net::{Shutdown, SocketFlags};

use super::{Executor, Operation};
use crate::buffer::IoBuf;
use crate::error::{BlockError, Result};

/// A connected stream socket (in blocking mode: the executor does the waiting).
///
/// One task may read while another writes. A task that waits in a read or a write is woken by
/// [`Socket::shutdown`].
pub struct Socket {
    file: Rc<OwnedFd>,
    executor: Rc<Executor>,
}

fn transient(result: i32) -> bool {
    result == -libc::EINTR || result == -libc::EAGAIN
}

impl Socket {
    /// Takes a connected socket, to be served by this thread's executor.
    ///
    /// # Errors
    ///
    /// If no executor runs on this thread, or the socket cannot be set to blocking mode.
    pub fn new(file: OwnedFd) -> Result<Self> {
        rustix::io::ioctl_fionbio(&file, false)
            .map_err(|e| BlockError::io("cannot set up a socket", e.into()))?;
        Ok(Self {
            file: Rc::new(file),
            executor: Executor::current()?,
        })
    }

    /// Reads what there is, at least one byte, into the beginning of `buf`; 0 at the end of the stream.
    ///
    /// # Errors
    ///
    /// What the host reports, such as a connection that was reset.
    pub async fn read(&self, buf: IoBuf) -> Result<usize> {
        loop {
            let receive = Operation::Receive {
                file: self.file.clone(),
                buf: buf.clone(),
            };
            match self.executor.submit(receive).await {
                count @ 0.. => return Ok(usize::try_from(count).unwrap_or(0)),
                result if transient(result) => {}
                result => return Err(failed("cannot read from a socket", result)),
            }
        }
    }

    /// Writes all of `buf`.
    ///
    /// # Errors
    ///
    /// What the host reports, such as a peer that has gone.
    pub async fn write_all(&self, buf: IoBuf) -> Result<()> {
        let mut rest = buf;
        while !rest.is_empty() {
            let send = Operation::Send {
                file: self.file.clone(),
                buf: rest.clone(),
            };
            match self.executor.submit(send).await {
                0 => return Err(failed("cannot write to a socket", -libc::EPIPE)),
                count @ 1.. => {
                    let done = usize::try_from(count).unwrap_or(0);
                    if done == rest.len() {
                        return Ok(());
                    }
                    rest = rest.slice(done, rest.len() - done);
                }
                result if transient(result) => {}
                result => return Err(failed("cannot write to a socket", result)),
            }
        }
        Ok(())
    }

    /// Ends the connection in both directions.
    pub fn shutdown(&self) {
        // A peer that has gone already is what is wanted.
        let _ = rustix::net::shutdown(&self.file, Shutdown::Both);
    }

    /// The descriptor.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn failed(what: &str, result: i32) -> BlockError {
    BlockError::io(what, io::Error::from_raw_os_error(-result))
}

/// A listening stream socket.
pub struct Listener {
    file: Rc<OwnedFd>,
    executor: Rc<Executor>,
}

impl Listener {
    /// Takes a listening socket.
    ///
    /// # Errors
    ///
    /// If no executor runs on this thread, or the socket cannot be set to non-blocking mode.
    pub fn new(file: OwnedFd) -> Result<Self> {
        rustix::io::ioctl_fionbio(&file, true)
            .map_err(|e| BlockError::io("cannot set up a listening socket", e.into()))?;
        Ok(Self {
            file: Rc::new(file),
            executor: Executor::current()?,
        })
    }

    /// Waits for the next connection.
    ///
    /// # Errors
    ///
    /// What the host reports, such as no descriptors being left.
    pub async fn accept(&self) -> Result<Socket> {
        loop {
            match rustix::net::accept_with(&self.file, SocketFlags::CLOEXEC) {
                Ok(connection) => return Socket::new(connection),
                Err(rustix::io::Errno::AGAIN) => {
                    let file = self.file.clone();
                    self.executor.submit(Operation::Readable { file }).await;
                }
                // The peer gave up before we came to it.
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(e) => return Err(BlockError::io("cannot accept a connection", e.into())),
            }
        }
    }
}
