//! The server's transmission phase.

use std::cell::Cell;
use std::rc::Rc;

use block::executor::spawn_local;
use block::sync::WaitQueue;
use block::{BlockError, ErrorKind, IoBuf, Result, ZeroFlags};

use super::{Export, Session, wire_error};
use crate::protocol::{
    COMPACT_REQUEST, Chunk, ChunkType, Command, CommandFlags, EXTENDED_CHUNK_HEADER,
    EXTENDED_REQUEST, MAX_CONTEXTS, MAX_EXTENTS, MAX_PAYLOAD, ReplyFlags, Request, chunk_header,
    encode_error, encode_status, errors, parse_request, parse_status_payload, simple_reply,
};
use crate::transport::Outbox;

/// Most requests of one client that are under way at once.
const MAX_REQUESTS: usize = 128;
/// Most bytes of payload of one client that are under way at once (one request may always be).
const MAX_BYTES: u64 = 64 << 20;
/// Reads of at least this many bytes are looked at for holes.
const SPARSE_READ: u64 = 64 << 10;

/// What the handlers of one connection share.
struct Connection {
    export: Rc<Export>,
    outbox: Rc<Outbox>,
    structured: bool,
    extended: bool,
    contexts: Vec<u32>,
    requests: Cell<usize>,
    bytes: Cell<u64>,
    finished: WaitQueue,
}

/// A request under way, counted until it is dropped.
struct Counted {
    connection: Rc<Connection>,
    bytes: u64,
}

impl Drop for Counted {
    fn drop(&mut self) {
        let connection = &self.connection;
        connection.requests.set(connection.requests.get() - 1);
        connection.bytes.set(connection.bytes.get() - self.bytes);
        connection.finished.wake_all();
    }
}

/// An error for the client: the number and why.
type Refusal = (u32, String);

fn refusal(error: &BlockError) -> Refusal {
    (wire_error(error), error.one_line())
}

/// Serves requests until the client ends the connection; every request begun is answered before.
pub(super) async fn serve(session: Session, outbox: Rc<Outbox>) -> Result<()> {
    let mut reader = session.reader;
    let connection = Rc::new(Connection {
        export: session.export,
        outbox,
        structured: session.structured,
        extended: session.extended,
        contexts: session.contexts,
        requests: Cell::new(0),
        bytes: Cell::new(0),
        finished: WaitQueue::default(),
    });
    let result = receive(&connection, &mut reader).await;
    while connection.requests.get() > 0 {
        connection.finished.wait().await;
    }
    result
}

async fn receive(connection: &Rc<Connection>, reader: &mut crate::transport::Reader) -> Result<()> {
    let extended = connection.extended;
    let size = if extended {
        EXTENDED_REQUEST
    } else {
        COMPACT_REQUEST
    };
    loop {
        let mut bytes = [0; EXTENDED_REQUEST];
        if !reader.try_read(&mut bytes[..size]).await? {
            return Ok(());
        }
        let request = parse_request(&bytes[..size], extended)?;
        if request.command == Command::DISC {
            return Ok(());
        }
        let payload = request.payload();
        if payload > u64::from(MAX_PAYLOAD) {
            let message = "NBD: the client sends more than 32 MiB in one request";
            return Err(BlockError::new(ErrorKind::Io, message));
        }
        let bytes = match request.command {
            Command::READ => request.length.min(u64::from(MAX_PAYLOAD)),
            _ => payload,
        };
        let counted = connection.admit(bytes).await;
        let payload = if payload > 0 {
            let buf = IoBuf::zeroed(usize::try_from(payload).unwrap_or(0));
            reader.read_into(&buf).await?;
            Some(buf)
        } else {
            None
        };
        spawn_local(async move {
            counted.connection.handle(&request, payload).await;
        });
    }
}

impl Connection {
    /// Waits until there is room for another request.
    async fn admit(self: &Rc<Self>, bytes: u64) -> Counted {
        while self.requests.get() > 0
            && (self.requests.get() >= MAX_REQUESTS || self.bytes.get() + bytes > MAX_BYTES)
        {
            self.finished.wait().await;
        }
        self.requests.set(self.requests.get() + 1);
        self.bytes.set(self.bytes.get() + bytes);
        Counted {
            connection: self.clone(),
            bytes,
        }
    }

    async fn handle(&self, request: &Request, payload: Option<IoBuf>) {
        let done = match self.check(request) {
            Ok(()) => match request.command {
                Command::READ => self.read(request).await,
                Command::BLOCK_STATUS => self.block_status(request, payload).await,
                _ => match self.perform(request, payload).await {
                    Ok(()) => {
                        self.acknowledge(request);
                        Ok(())
                    }
                    Err(error) => Err(refusal(&error)),
                },
            },
            Err(refusal) => Err(refusal),
        };
        if let Err((number, why)) = done {
            self.fail(request, number, &why);
        }
    }

    /// What can be refused without asking the disk.
    fn check(&self, request: &Request) -> Result<(), Refusal> {
        type F = CommandFlags;
        let invalid = |why: &str| Err((errors::EINVAL, why.to_owned()));
        let changes = matches!(
            request.command,
            Command::WRITE | Command::TRIM | Command::WRITE_ZEROES
        );
        let allowed = match request.command {
            Command::READ if self.structured => F::DF | F::FUA,
            Command::WRITE if self.extended => F::FUA | F::PAYLOAD_LEN,
            Command::READ | Command::WRITE | Command::TRIM | Command::FLUSH => F::FUA,
            Command::CACHE => F::empty(),
            Command::WRITE_ZEROES => F::FUA | F::NO_HOLE | F::FAST_ZERO,
            Command::BLOCK_STATUS => F::REQ_ONE | F::PAYLOAD_LEN,
            _ => return invalid("unknown command"),
        };
        if request.flags.bits() & !allowed.bits() != 0 {
            return invalid("unknown or unexpected command flags");
        }
        if self.extended
            && request.command == Command::WRITE
            && !request.flags.contains(F::PAYLOAD_LEN)
        {
            return invalid("a write without NBD_CMD_FLAG_PAYLOAD_LEN");
        }
        if changes && self.export.read_only() {
            return Err((errors::EPERM, "the export is read-only".to_owned()));
        }
        let has_range = request.command != Command::FLUSH
            && !(request.command == Command::BLOCK_STATUS
                && request.flags.contains(F::PAYLOAD_LEN));
        if has_range && !self.export.contains(request.offset, request.length) {
            let number = if changes {
                errors::ENOSPC
            } else {
                errors::EINVAL
            };
            return Err((number, "the request reaches past the end".to_owned()));
        }
        if request.command == Command::READ && request.length > u64::from(MAX_PAYLOAD) {
            return invalid("a read of more than 32 MiB");
        }
        Ok(())
    }

    async fn perform(&self, request: &Request, payload: Option<IoBuf>) -> Result<()> {
        type F = CommandFlags;
        let through = request.flags.contains(F::FUA);
        let (offset, length) = (request.offset, request.length);
        match request.command {
            Command::FLUSH => self.export.flush().await,
            _ if length == 0 => Ok(()),
            Command::WRITE => match payload {
                Some(buf) => self.export.write(offset, buf, through).await,
                None => Ok(()),
            },
            Command::TRIM => self.export.trim(offset, length, through).await,
            Command::WRITE_ZEROES => {
                let mut flags = ZeroFlags::empty();
                flags.set(ZeroFlags::MAY_UNMAP, !request.flags.contains(F::NO_HOLE));
                flags.set(ZeroFlags::NO_FALLBACK, request.flags.contains(F::FAST_ZERO));
                self.export
                    .write_zeroes(offset, length, flags, through)
                    .await
            }
            // The host's page cache is filled by reading ahead; nothing has to be done for that.
            _ => Ok(()),
        }
    }

    fn chunk(
        &self,
        request: &Request,
        kind: ChunkType,
        last: bool,
        length: usize,
    ) -> ([u8; EXTENDED_CHUNK_HEADER], usize) {
        let flags = if last {
            ReplyFlags::DONE
        } else {
            ReplyFlags::empty()
        };
        let chunk = Chunk {
            flags,
            kind,
            cookie: request.cookie,
            offset: request.offset,
            length: length as u64,
        };
        chunk_header(&chunk, self.extended)
    }

    /// Sends a chunk with a small payload.
    fn send_chunk(&self, request: &Request, kind: ChunkType, last: bool, payload: &[u8]) {
        let (head, used) = self.chunk(request, kind, last, payload.len());
        let mut bytes = head[..used].to_vec();
        bytes.extend(payload);
        self.outbox.push(IoBuf::from_slice(&bytes));
    }

    fn acknowledge(&self, request: &Request) {
        if self.extended {
            self.send_chunk(request, ChunkType::NONE, true, &[]);
        } else {
            let reply = simple_reply(request.cookie, 0);
            self.outbox.push(IoBuf::from_slice(&reply));
        }
    }

    fn fail(&self, request: &Request, number: u32, why: &str) {
        if self.structured {
            let payload = encode_error(number, why, None);
            self.send_chunk(request, ChunkType::ERROR, true, &payload);
        } else {
            let reply = simple_reply(request.cookie, number);
            self.outbox.push(IoBuf::from_slice(&reply));
        }
    }

    async fn read(&self, request: &Request) -> Result<(), Refusal> {
        let whole = request.flags.contains(CommandFlags::DF);
        if self.structured && !whole && request.length >= SPARSE_READ {
            return self.read_sparsely(request).await;
        }
        let buf = self.read_part(request, request.offset, request.length, true);
        self.outbox.push(buf.await?);
        Ok(())
    }

    /// Reads into one buffer with the reply's head before the data, so that both go out in one piece.
    async fn read_part(
        &self,
        request: &Request,
        offset: u64,
        length: u64,
        last: bool,
    ) -> Result<IoBuf, Refusal> {
        let length = usize::try_from(length).unwrap_or(0);
        let mut head = Vec::with_capacity(EXTENDED_CHUNK_HEADER + 8);
        if !self.structured {
            head.extend(simple_reply(request.cookie, 0));
        } else if length == 0 {
            let (bytes, used) = self.chunk(request, ChunkType::NONE, true, 0);
            head.extend(&bytes[..used]);
        } else {
            let (bytes, used) = self.chunk(request, ChunkType::OFFSET_DATA, last, length + 8);
            head.extend(&bytes[..used]);
            head.extend(offset.to_be_bytes());
        }
        let buf = IoBuf::zeroed(head.len() + length);
        buf.copy_from(&head);
        if length > 0 {
            let data = buf.slice(head.len(), length);
            let read = self.export.read(offset, data).await;
            read.map_err(|e| refusal(&e))?;
        }
        Ok(buf)
    }

    /// Data where there is some, and holes.
    async fn read_sparsely(&self, request: &Request) -> Result<(), Refusal> {
        let (offset, end) = (request.offset, request.offset + request.length);
        let found = self
            .export
            .status(super::export::BASE_ALLOCATION, offset, request.length, 64)
            .await;
        let mut parts = found.map_err(|e| refusal(&e))?;
        // What was not looked at is read as data.
        let known: u64 = parts.iter().map(|p| p.length).sum();
        if known < request.length {
            let rest = crate::protocol::StatusDescriptor {
                length: request.length - known,
                flags: 0,
            };
            parts.push(rest);
        }
        let mut at = offset;
        let mut ready = Vec::new();
        for part in parts {
            let last = at + part.length == end;
            if part.flags == 0 {
                ready.push(self.read_part(request, at, part.length, last).await?);
            } else {
                let mut payload = at.to_be_bytes().to_vec();
                payload.extend(u32::try_from(part.length).unwrap_or(u32::MAX).to_be_bytes());
                let (head, used) = self.chunk(request, ChunkType::OFFSET_HOLE, last, payload.len());
                let bytes = [&head[..used], &payload].concat();
                ready.push(IoBuf::from_slice(&bytes));
            }
            at += part.length;
        }
        ready.into_iter().for_each(|part| self.outbox.push(part));
        Ok(())
    }

    async fn block_status(&self, request: &Request, payload: Option<IoBuf>) -> Result<(), Refusal> {
        let invalid = |why: &str| (errors::EINVAL, why.to_owned());
        let mut length = request.length;
        let mut contexts = self.contexts.clone();
        if request.flags.contains(CommandFlags::PAYLOAD_LEN) {
            let payload = payload.filter(|p| p.len() <= 8 + 4 * MAX_CONTEXTS);
            let payload = payload.ok_or_else(|| invalid("a payload of a wrong length"))?;
            let named;
            (length, named) = parse_status_payload(&payload.to_vec()).map_err(|e| invalid(e.0))?;
            if !named.iter().all(|id| contexts.contains(id)) {
                return Err(invalid("a context that was not selected"));
            }
            contexts.retain(|id| named.contains(id));
            if !self.export.contains(request.offset, length) {
                return Err(invalid("the request reaches past the end"));
            }
        }
        if contexts.is_empty() {
            return Err(invalid("no meta context was selected"));
        }
        if length == 0 {
            return Err(invalid("a block status of no bytes"));
        }
        let one = request.flags.contains(CommandFlags::REQ_ONE);
        let limit = if one { 1 } else { MAX_EXTENTS };
        let mut replies = Vec::with_capacity(contexts.len());
        for context in &contexts {
            let found = self
                .export
                .status(*context, request.offset, length, limit)
                .await;
            let mut found = found.map_err(|e| refusal(&e))?;
            found.truncate(limit);
            replies.push(encode_status(*context, &found, self.extended));
        }
        let kind = if self.extended {
            ChunkType::BLOCK_STATUS_EXT
        } else {
            ChunkType::BLOCK_STATUS
        };
        let count = replies.len();
        for (n, reply) in replies.iter().enumerate() {
            self.send_chunk(request, kind, n + 1 == count, reply);
        }
        Ok(())
    }
}
