//! A connection's bytes, plain or under TLS, and reading messages from them.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use block::executor::Socket;
use block::sync::WaitQueue;
use block::{BlockError, IoBuf, Result};

use crate::tls::TlsStream;

/// A connection.
pub(crate) enum Transport {
    Plain(Socket),
    Tls(Box<TlsStream>),
}

impl Transport {
    async fn read(&self, buf: IoBuf) -> Result<usize> {
        match self {
            Self::Plain(socket) => socket.read(buf).await,
            Self::Tls(stream) => stream.read(buf).await,
        }
    }

    pub(crate) async fn write_all(&self, buf: IoBuf) -> Result<()> {
        match self {
            Self::Plain(socket) => socket.write_all(buf).await,
            Self::Tls(stream) => stream.write_all(buf).await,
        }
    }

    pub(crate) async fn close(&self) {
        if let Self::Tls(stream) = self {
            stream.close().await;
        }
        self.shutdown();
    }

    pub(crate) fn shutdown(&self) {
        match self {
            Self::Plain(socket) => socket.shutdown(),
            Self::Tls(stream) => stream.shutdown(),
        }
    }
}

/// Room for many small messages; the payloads of larger ones go past it.
const BUFFER: usize = 64 << 10;

/// Reads messages from a connection.
pub(crate) struct Reader {
    transport: Rc<Transport>,
    buffer: IoBuf,
    start: usize,
    end: usize,
}

pub(crate) fn ended() -> BlockError {
    BlockError::io(
        "the peer has closed the NBD connection",
        std::io::Error::from_raw_os_error(104),
    )
}

impl Reader {
    pub(crate) fn new(transport: Rc<Transport>) -> Self {
        Self {
            transport,
            buffer: IoBuf::zeroed(BUFFER),
            start: 0,
            end: 0,
        }
    }

    /// How many bytes are here already.
    pub(crate) fn buffered(&self) -> usize {
        self.end - self.start
    }

    /// Gets more; false at the end of the stream.
    async fn fill(&mut self) -> Result<bool> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.end == self.buffer.len() {
            let rest = self.buffer.slice(self.start, self.buffered()).to_vec();
            self.buffer.copy_from(&rest);
            (self.start, self.end) = (0, rest.len());
        }
        let room = self.buffer.slice(self.end, self.buffer.len() - self.end);
        let count = self.transport.read(room).await?;
        self.end += count;
        Ok(count > 0)
    }

    /// Fills `bytes` (which is small); false if the stream ends just before them.
    pub(crate) async fn try_read(&mut self, bytes: &mut [u8]) -> Result<bool> {
        while self.buffered() < bytes.len() {
            if !self.fill().await? {
                return if self.buffered() == 0 {
                    Ok(false)
                } else {
                    Err(ended())
                };
            }
        }
        self.buffer.copy_to_at(self.start, bytes);
        self.start += bytes.len();
        Ok(true)
    }

    /// Fills `bytes`, which is small.
    pub(crate) async fn read(&mut self, bytes: &mut [u8]) -> Result<()> {
        if self.try_read(bytes).await? {
            Ok(())
        } else {
            Err(ended())
        }
    }

    pub(crate) async fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read(&mut bytes).await?;
        Ok(bytes)
    }

    pub(crate) async fn u32(&mut self) -> Result<u32> {
        self.array().await.map(u32::from_be_bytes)
    }

    /// Reads `length` bytes; the caller has checked that it is bounded.
    pub(crate) async fn vector(&mut self, length: usize) -> Result<Vec<u8>> {
        let buf = IoBuf::zeroed(length);
        self.read_into(&buf).await?;
        Ok(buf.to_vec())
    }

    /// Fills `buf`, without a copy for what is not here yet.
    pub(crate) async fn read_into(&mut self, buf: &IoBuf) -> Result<()> {
        let here = self.buffered().min(buf.len());
        let mut bytes = [0; 4096];
        let mut done = 0;
        while done < here {
            let n = bytes.len().min(here - done);
            self.buffer.copy_to_at(self.start, &mut bytes[..n]);
            buf.copy_from_at(done, &bytes[..n]);
            self.start += n;
            done += n;
        }
        while done < buf.len() {
            let count = self
                .transport
                .read(buf.slice(done, buf.len() - done))
                .await?;
            if count == 0 {
                return Err(ended());
            }
            done += count;
        }
        Ok(())
    }

    /// Passes over `length` bytes.
    pub(crate) async fn skip(&mut self, mut length: u64) -> Result<()> {
        loop {
            let here = usize::try_from(length)
                .unwrap_or(usize::MAX)
                .min(self.buffered());
            self.start += here;
            length -= here as u64;
            if length == 0 {
                return Ok(());
            }
            if !self.fill().await? {
                return Err(ended());
            }
        }
    }
}

/// Messages on their way out: whatever has been queued while one write was under way goes with the next.
pub(crate) struct Outbox {
    queue: RefCell<Vec<IoBuf>>,
    filled: WaitQueue,
    closed: Cell<bool>,
    /// The writer has ended: nothing goes out any more.
    ended: Cell<bool>,
}

/// No write is put together of more messages than this.
const BATCH: usize = 128;

impl Outbox {
    pub(crate) fn new() -> Rc<Self> {
        Rc::new(Self {
            queue: RefCell::default(),
            filled: WaitQueue::default(),
            closed: Cell::new(false),
            ended: Cell::new(false),
        })
    }

    pub(crate) fn push(&self, message: IoBuf) {
        if !self.ended.get() {
            self.queue.borrow_mut().push(message);
            self.filled.wake_all();
        }
    }

    /// Lets the writer end when everything has been written.
    pub(crate) fn close(&self) {
        self.closed.set(true);
        self.filled.wake_all();
    }

    /// The writer: runs until the box is closed and empty, or the connection fails.
    pub(crate) async fn run(&self, transport: &Transport) -> Result<()> {
        let result = self.write_batches(transport).await;
        self.ended.set(true);
        self.queue.borrow_mut().clear();
        result
    }

    async fn write_batches(&self, transport: &Transport) -> Result<()> {
        loop {
            let mut batch = std::mem::take(&mut *self.queue.borrow_mut());
            if batch.is_empty() {
                if self.closed.get() {
                    return Ok(());
                }
                self.filled.wait().await;
                continue;
            }
            while !batch.is_empty() {
                let count = batch.len().min(BATCH);
                let whole = match &batch[..count] {
                    [one] => one.clone(),
                    several => IoBuf::concat(several),
                };
                transport.write_all(whole).await?;
                batch.drain(..count);
            }
        }
    }
}
