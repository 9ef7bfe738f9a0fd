//! The client: an export as a disk.

mod disk;
mod handshake;

pub use disk::{NbdDisk, NbdMedium};
pub use handshake::{Listed, list};

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use block::executor::spawn_local;
use block::sync::WaitQueue;
use block::{BlockError, ErrorKind, IoBuf, Result};

use crate::protocol::{
    CHUNK_HEADER, Chunk, ChunkType, Command, CommandFlags, EXTENDED_CHUNK_HEADER,
    EXTENDED_REPLY_MAGIC, MAX_PAYLOAD, ReplyFlags, Request, SIMPLE_REPLY, SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC, StatusDescriptor, encode_request, parse_chunk_header, parse_error,
    parse_simple_reply, parse_status,
};
use crate::transport::{Outbox, Reader, Transport};
use handshake::Agreed;

fn broken(why: &str) -> BlockError {
    BlockError::new(ErrorKind::Io, format!("NBD: {why}"))
}

/// What the server said went wrong: a number and perhaps why.
type Refusal = (u32, String);

/// A request that waits for its reply.
struct Pending {
    request: Request,
    /// Where a read's data goes.
    target: Option<IoBuf>,
    /// Bytes of the target that the server has spoken of.
    filled: Cell<u64>,
    status: RefCell<Vec<StatusDescriptor>>,
    refusal: RefCell<Option<Refusal>>,
    done: Cell<bool>,
    wake: WaitQueue,
}

/// A connection in its transmission phase.
struct Connection {
    agreed: Agreed,
    transport: Rc<Transport>,
    outbox: Rc<Outbox>,
    pending: RefCell<HashMap<u64, Rc<Pending>>>,
    next: Cell<u64>,
    lost: Cell<bool>,
}

impl Connection {
    fn start(transport: Rc<Transport>, reader: Reader, agreed: Agreed) -> Rc<Self> {
        let connection = Rc::new(Self {
            agreed,
            transport: transport.clone(),
            outbox: Outbox::new(),
            pending: RefCell::default(),
            next: Cell::new(1),
            lost: Cell::new(false),
        });
        let outbox = connection.outbox.clone();
        spawn_local(async move {
            // The reader finds out about a failure by the end of the connection.
            let _ = outbox.run(&transport).await;
            transport.close().await;
        });
        let receiver = connection.clone();
        spawn_local(async move {
            // Whoever waits or comes later is told that the connection is lost.
            let _ = receiver.receive(reader).await;
            receiver.lost.set(true);
            receiver.outbox.close();
            receiver.transport.shutdown();
            let pending = std::mem::take(&mut *receiver.pending.borrow_mut());
            pending.values().for_each(|waiting| waiting.wake.wake_all());
        });
        connection
    }

    /// Sends a request and waits for its reply.
    async fn request(
        &self,
        command: Command,
        flags: CommandFlags,
        (offset, length): (u64, u64),
        target: Option<IoBuf>,
        payload: Option<IoBuf>,
    ) -> Result<Rc<Pending>> {
        let cookie = self.next.get();
        self.next.set(cookie + 1);
        let mut request = Request {
            flags,
            command,
            cookie,
            offset,
            length,
        };
        if self.agreed.extended && command == Command::WRITE {
            request.flags |= CommandFlags::PAYLOAD_LEN;
        }
        let pending = Rc::new(Pending {
            request,
            target,
            filled: Cell::new(0),
            status: RefCell::default(),
            refusal: RefCell::default(),
            done: Cell::new(false),
            wake: WaitQueue::default(),
        });
        if self.lost.get() {
            return Err(broken("the connection to the server is lost"));
        }
        self.pending.borrow_mut().insert(cookie, pending.clone());
        let head = IoBuf::from_slice(&encode_request(&request, self.agreed.extended));
        self.outbox.push(match payload {
            Some(payload) => IoBuf::concat(&[head, payload]),
            None => head,
        });
        while !pending.done.get() {
            if self.lost.get() {
                return Err(broken("the connection to the server is lost"));
            }
            pending.wake.wait().await;
        }
        if let Some((number, why)) = pending.refusal.borrow().as_ref() {
            let number = i32::try_from(*number).unwrap_or(5);
            let error = std::io::Error::from_raw_os_error(number);
            let message = if why.is_empty() {
                format!("the NBD server refused {command:?} of {length} bytes at {offset}")
            } else {
                format!("the NBD server says '{why}'")
            };
            return Err(BlockError::io(message, error));
        }
        Ok(pending)
    }

    fn find(&self, cookie: u64) -> Result<Rc<Pending>> {
        let found = self.pending.borrow().get(&cookie).cloned();
        found.ok_or_else(|| broken("the server answers a request that was not made"))
    }

    fn finish(&self, pending: &Pending) -> Result<()> {
        self.pending.borrow_mut().remove(&pending.request.cookie);
        let wanted = pending.target.as_ref().map_or(0, |t| t.len() as u64);
        if pending.refusal.borrow().is_none() && pending.filled.get() != wanted {
            return Err(broken("the server left parts of a read out"));
        }
        pending.done.set(true);
        pending.wake.wake_all();
        Ok(())
    }

    async fn receive(&self, mut reader: Reader) -> Result<()> {
        loop {
            let magic = reader.u32().await?;
            match magic {
                SIMPLE_REPLY_MAGIC if !self.agreed.extended => self.simple(&mut reader).await?,
                STRUCTURED_REPLY_MAGIC if self.agreed.structured && !self.agreed.extended => {
                    let head: [u8; CHUNK_HEADER - 4] = reader.array().await?;
                    self.chunk(&parse_chunk_header(&head, false)?, &mut reader)
                        .await?;
                }
                EXTENDED_REPLY_MAGIC if self.agreed.extended => {
                    let head: [u8; EXTENDED_CHUNK_HEADER - 4] = reader.array().await?;
                    self.chunk(&parse_chunk_header(&head, true)?, &mut reader)
                        .await?;
                }
                _ => return Err(broken("a reply has a wrong magic number")),
            }
        }
    }

    async fn simple(&self, reader: &mut Reader) -> Result<()> {
        let head: [u8; SIMPLE_REPLY - 4] = reader.array().await?;
        let (error, cookie) = parse_simple_reply(&head)?;
        let pending = self.find(cookie)?;
        if error != 0 {
            *pending.refusal.borrow_mut() = Some((error, String::new()));
        } else if let Some(target) = &pending.target {
            if self.agreed.structured {
                return Err(broken(
                    "a simple reply to a read after structured ones were agreed on",
                ));
            }
            reader.read_into(target).await?;
            pending.filled.set(target.len() as u64);
        }
        self.finish(&pending)
    }

    async fn chunk(&self, chunk: &Chunk, reader: &mut Reader) -> Result<()> {
        let pending = self.find(chunk.cookie)?;
        if chunk.length > u64::from(MAX_PAYLOAD) + 4096 {
            return Err(broken("a reply is too long"));
        }
        let length = usize::try_from(chunk.length).unwrap_or(0);
        match chunk.kind {
            ChunkType::NONE if length == 0 && chunk.flags.contains(ReplyFlags::DONE) => {}
            ChunkType::OFFSET_DATA if length > 8 => {
                let at = u64::from_be_bytes(reader.array().await?);
                let part = pending.part(at, chunk.length - 8)?;
                reader.read_into(&part).await?;
            }
            ChunkType::OFFSET_HOLE if length == 12 => {
                let at = u64::from_be_bytes(reader.array().await?);
                let count = reader.u32().await?;
                let part = pending.part(at, u64::from(count))?;
                part.fill_at(0, part.len(), 0);
            }
            ChunkType::BLOCK_STATUS | ChunkType::BLOCK_STATUS_EXT
                if pending.request.command == Command::BLOCK_STATUS
                    && self.agreed.extended == (chunk.kind == ChunkType::BLOCK_STATUS_EXT) =>
            {
                let payload = reader.vector(length).await?;
                let (context, extents) = parse_status(&payload, chunk.kind)?;
                if Some(context) == self.agreed.base_allocation {
                    *pending.status.borrow_mut() = extents;
                }
            }
            kind if kind.is_error() && length <= 64 << 10 => {
                let payload = reader.vector(length).await?;
                let refusal = parse_error(&payload, kind)?;
                pending.refusal.borrow_mut().get_or_insert(refusal);
            }
            _ => return Err(broken("a reply does not fit its request")),
        }
        if chunk.flags.contains(ReplyFlags::DONE) {
            self.finish(&pending)?;
        }
        Ok(())
    }
}

impl Pending {
    /// The part of the target for `length` bytes at `at`.
    fn part(&self, at: u64, length: u64) -> Result<IoBuf> {
        let target = self.target.as_ref();
        let start = at.checked_sub(self.request.offset);
        let filled = self.filled.get() + length;
        match (target, start) {
            (Some(target), Some(start))
                if length > 0
                    && start
                        .checked_add(length)
                        .is_some_and(|end| end <= target.len() as u64)
                    && filled <= target.len() as u64 =>
            {
                self.filled.set(filled);
                let (start, length) = (usize::try_from(start), usize::try_from(length));
                Ok(target.slice(start.unwrap_or(0), length.unwrap_or(0)))
            }
            _ => Err(broken("a reply has data that was not asked for")),
        }
    }
}
