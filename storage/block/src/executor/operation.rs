//! What an engine can be asked to do.

use std::os::fd::OwnedFd;
use std::rc::Rc;

use crate::buffer::IoBuf;

/// One system call to be made asynchronously.
pub(crate) enum Operation {
    /// preadv.
    Read {
        file: Rc<OwnedFd>,
        offset: u64,
        buf: IoBuf,
    },
    /// pwritev.
    Write {
        file: Rc<OwnedFd>,
        offset: u64,
        buf: IoBuf,
    },
    /// fdatasync.
    Sync { file: Rc<OwnedFd> },
    /// fallocate with `mode` as its flags.
    Allocate {
        file: Rc<OwnedFd>,
        mode: i32,
        offset: u64,
        length: u64,
    },
    /// poll for input.
    Readable { file: Rc<OwnedFd> },
    /// A read of eight bytes from an eventfd or timerfd, waiting until it is signalled.
    EventRead { file: Rc<OwnedFd>, buf: IoBuf },
    /// A read from a socket, waiting until there is something; it may fill a part of the buffer.
    Receive { file: Rc<OwnedFd>, buf: IoBuf },
    /// A write to a socket, waiting until there is room; it may take a part of the buffer.
    Send { file: Rc<OwnedFd>, buf: IoBuf },
}

/// What an operation in flight keeps alive.
pub(crate) enum Held {
    File(#[allow(dead_code, reason = "held for its destructor")] Rc<OwnedFd>),
    Transfer(
        #[allow(dead_code, reason = "held for its destructor")] Rc<OwnedFd>,
        #[allow(dead_code, reason = "held for its destructor")] IoBuf,
    ),
}

impl Operation {
    pub(crate) fn into_held(self) -> Held {
        match self {
            Self::Sync { file } | Self::Allocate { file, .. } | Self::Readable { file } => {
                Held::File(file)
            }
            Self::Read { file, buf, .. }
            | Self::Write { file, buf, .. }
            | Self::EventRead { file, buf }
            | Self::Receive { file, buf }
            | Self::Send { file, buf } => Held::Transfer(file, buf),
        }
    }

    /// Whether it ends by itself in bounded time.
    pub(crate) fn is_bounded(&self) -> bool {
        !matches!(
            self,
            Self::Readable { .. }
                | Self::EventRead { .. }
                | Self::Receive { .. }
                | Self::Send { .. }
        )
    }
}
