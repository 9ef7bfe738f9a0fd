//! Messages of the transmission phase: requests and replies.

use super::{
    ChunkType, Command, CommandFlags, EXTENDED_REPLY_MAGIC, EXTENDED_REQUEST_MAGIC, Fields,
    MAX_CONTEXTS, MAX_EXTENTS, ProtocolError, REQUEST_MAGIC, ReplyFlags, SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
};

/// Bytes of a request with 32-bit lengths.
pub const COMPACT_REQUEST: usize = 28;
/// Bytes of a request with 64-bit lengths.
pub const EXTENDED_REQUEST: usize = 32;
/// Bytes of a simple reply, before a read's data.
pub const SIMPLE_REPLY: usize = 16;
/// Bytes before a structured reply chunk's payload.
pub const CHUNK_HEADER: usize = 20;
/// Bytes before an extended reply chunk's payload.
pub const EXTENDED_CHUNK_HEADER: usize = 32;

/// A request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Modifiers.
    pub flags: CommandFlags,
    /// What to do.
    pub command: Command,
    /// The client's number for it, which the reply repeats.
    pub cookie: u64,
    /// Where, in bytes.
    pub offset: u64,
    /// How much, in bytes: of the effect, or of the payload (see [`Request::payload`]).
    pub length: u64,
}

impl Request {
    /// How many bytes follow the request.
    pub fn payload(&self) -> u64 {
        if self.command == Command::WRITE || self.flags.contains(CommandFlags::PAYLOAD_LEN) {
            self.length
        } else {
            0
        }
    }
}

/// Reads a request of [`COMPACT_REQUEST`] or [`EXTENDED_REQUEST`] bytes.
///
/// # Errors
///
/// If the magic number is wrong.
pub fn parse_request(bytes: &[u8], extended: bool) -> Result<Request, ProtocolError> {
    let mut fields = Fields(bytes);
    let magic = fields.u32()?;
    let expected = if extended {
        EXTENDED_REQUEST_MAGIC
    } else {
        REQUEST_MAGIC
    };
    if magic != expected {
        return Err(ProtocolError("a request has a wrong magic number"));
    }
    let mut flags = CommandFlags::from_bits_retain(fields.u16()?);
    if !extended {
        // Not a flag of compact requests: never lets a payload be expected.
        if flags.contains(CommandFlags::PAYLOAD_LEN) {
            flags.remove(CommandFlags::PAYLOAD_LEN);
            flags |= CommandFlags::from_bits_retain(1 << 15);
        }
    }
    let request = Request {
        flags,
        command: Command(fields.u16()?),
        cookie: fields.u64()?,
        offset: fields.u64()?,
        length: if extended {
            fields.u64()?
        } else {
            u64::from(fields.u32()?)
        },
    };
    fields.end()?;
    Ok(request)
}

/// A request as the client sends it. In compact form the length must fit in 32 bits.
pub fn encode_request(request: &Request, extended: bool) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(EXTENDED_REQUEST);
    let magic = if extended {
        EXTENDED_REQUEST_MAGIC
    } else {
        REQUEST_MAGIC
    };
    bytes.extend(magic.to_be_bytes());
    bytes.extend(request.flags.bits().to_be_bytes());
    bytes.extend(request.command.0.to_be_bytes());
    bytes.extend(request.cookie.to_be_bytes());
    bytes.extend(request.offset.to_be_bytes());
    if extended {
        bytes.extend(request.length.to_be_bytes());
    } else {
        let length = u32::try_from(request.length).unwrap_or(u32::MAX);
        bytes.extend(length.to_be_bytes());
    }
    bytes
}

/// A simple reply without data.
pub fn simple_reply(cookie: u64, error: u32) -> [u8; SIMPLE_REPLY] {
    let mut bytes = [0; SIMPLE_REPLY];
    bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

/// Reads the rest of a simple reply after its magic number: error and cookie.
///
/// # Errors
///
/// If it is too short.
pub fn parse_simple_reply(bytes: &[u8]) -> Result<(u32, u64), ProtocolError> {
    let mut fields = Fields(bytes);
    Ok((fields.u32()?, fields.u64()?))
}

/// The head of a reply chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Whether it is the last.
    pub flags: ReplyFlags,
    /// What it holds.
    pub kind: ChunkType,
    /// The request that it answers.
    pub cookie: u64,
    /// The request's offset; sent with extended headers only.
    pub offset: u64,
    /// Bytes of payload that follow.
    pub length: u64,
}

/// The head of a reply chunk as the server sends it: the bytes and how many of them count.
pub fn chunk_header(chunk: &Chunk, extended: bool) -> ([u8; EXTENDED_CHUNK_HEADER], usize) {
    let mut bytes = [0; EXTENDED_CHUNK_HEADER];
    let magic = if extended {
        EXTENDED_REPLY_MAGIC
    } else {
        STRUCTURED_REPLY_MAGIC
    };
    bytes[..4].copy_from_slice(&magic.to_be_bytes());
    bytes[4..6].copy_from_slice(&chunk.flags.bits().to_be_bytes());
    bytes[6..8].copy_from_slice(&chunk.kind.0.to_be_bytes());
    bytes[8..16].copy_from_slice(&chunk.cookie.to_be_bytes());
    if extended {
        bytes[16..24].copy_from_slice(&chunk.offset.to_be_bytes());
        bytes[24..32].copy_from_slice(&chunk.length.to_be_bytes());
        (bytes, EXTENDED_CHUNK_HEADER)
    } else {
        let length = u32::try_from(chunk.length).unwrap_or(u32::MAX);
        bytes[16..20].copy_from_slice(&length.to_be_bytes());
        (bytes, CHUNK_HEADER)
    }
}

/// Reads the rest of a chunk's head after its magic number.
///
/// # Errors
///
/// If it is too short.
pub fn parse_chunk_header(bytes: &[u8], extended: bool) -> Result<Chunk, ProtocolError> {
    let mut fields = Fields(bytes);
    let chunk = Chunk {
        flags: ReplyFlags::from_bits_retain(fields.u16()?),
        kind: ChunkType(fields.u16()?),
        cookie: fields.u64()?,
        offset: if extended { fields.u64()? } else { 0 },
        length: if extended {
            fields.u64()?
        } else {
            u64::from(fields.u32()?)
        },
    };
    fields.end()?;
    Ok(chunk)
}

/// The payload of an error chunk: number, message, and with an offset if it is known.
pub fn encode_error(error: u32, message: &str, offset: Option<u64>) -> Vec<u8> {
    let mut end = message.len().min(1024);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    let message = &message[..end];
    let mut bytes = Vec::with_capacity(6 + message.len() + 8);
    bytes.extend(error.to_be_bytes());
    bytes.extend(u16::try_from(message.len()).unwrap_or(0).to_be_bytes());
    bytes.extend(message.as_bytes());
    if let Some(offset) = offset {
        bytes.extend(offset.to_be_bytes());
    }
    bytes
}

/// Reads the payload of an error chunk: number and message.
///
/// # Errors
///
/// If it is malformed.
pub fn parse_error(payload: &[u8], kind: ChunkType) -> Result<(u32, String), ProtocolError> {
    let mut fields = Fields(payload);
    let error = fields.u32()?;
    let length = usize::from(fields.u16()?);
    let message = String::from_utf8_lossy(fields.bytes(length)?).into_owned();
    if kind == ChunkType::ERROR_OFFSET {
        fields.u64()?;
    }
    // Later versions may add fields to errors of other types.
    if error == 0 {
        return Err(ProtocolError("an error chunk says that there is no error"));
    }
    Ok((error, message))
}

/// One extent of a block status reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusDescriptor {
    /// Its length in bytes.
    pub length: u64,
    /// What the context says of it.
    pub flags: u64,
}

/// The payload of a status chunk for the context with number `context`.
pub fn encode_status(context: u32, extents: &[StatusDescriptor], extended: bool) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(8 + extents.len() * 16);
    bytes.extend(context.to_be_bytes());
    if extended {
        bytes.extend(u32::try_from(extents.len()).unwrap_or(0).to_be_bytes());
    }
    for extent in extents {
        if extended {
            bytes.extend(extent.length.to_be_bytes());
            bytes.extend(extent.flags.to_be_bytes());
        } else {
            let length = u32::try_from(extent.length).unwrap_or(u32::MAX);
            let flags = u32::try_from(extent.flags).unwrap_or(u32::MAX);
            bytes.extend(length.to_be_bytes());
            bytes.extend(flags.to_be_bytes());
        }
    }
    bytes
}

/// Reads the payload of a status chunk: the context's number and the extents.
///
/// # Errors
///
/// If it is malformed, has no extents, or an empty one.
pub fn parse_status(
    payload: &[u8],
    kind: ChunkType,
) -> Result<(u32, Vec<StatusDescriptor>), ProtocolError> {
    let mut fields = Fields(payload);
    let context = fields.u32()?;
    let extended = kind == ChunkType::BLOCK_STATUS_EXT;
    let size = if extended { 16 } else { 8 };
    let announced = if extended {
        fields.u32()? as usize
    } else {
        fields.0.len() / size
    };
    if !fields.0.len().is_multiple_of(size) || announced != fields.0.len() / size || announced == 0
    {
        return Err(ProtocolError("a block status has a wrong length"));
    }
    if announced > MAX_EXTENTS * 16 {
        return Err(ProtocolError("a block status has too many extents"));
    }
    let mut extents = Vec::with_capacity(announced);
    for _ in 0..announced {
        let extent = if extended {
            StatusDescriptor {
                length: fields.u64()?,
                flags: fields.u64()?,
            }
        } else {
            StatusDescriptor {
                length: u64::from(fields.u32()?),
                flags: u64::from(fields.u32()?),
            }
        };
        if extent.length == 0 {
            return Err(ProtocolError("a block status has an empty extent"));
        }
        extents.push(extent);
    }
    Ok((context, extents))
}

/// Reads the payload of a block status request: the length of the effect and the contexts' numbers.
///
/// # Errors
///
/// If it is malformed, or names no or too many contexts.
pub fn parse_status_payload(payload: &[u8]) -> Result<(u64, Vec<u32>), ProtocolError> {
    let mut fields = Fields(payload);
    let length = fields.u64()?;
    if fields.0.len() > MAX_CONTEXTS * 4 {
        return Err(ProtocolError(
            "a block status request names too many contexts",
        ));
    }
    let mut contexts = Vec::new();
    while !fields.0.is_empty() {
        contexts.push(fields.u32()?);
    }
    if contexts.is_empty() {
        return Err(ProtocolError("a block status request names no context"));
    }
    Ok((length, contexts))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_survive_the_wire_and_match_the_specification() {
        let request = Request {
            flags: CommandFlags::FUA,
            command: Command::TRIM,
            cookie: 0x0102_0304_0506_0708,
            offset: 0x1000,
            length: 0x200,
        };
        let compact = encode_request(&request, false);
        let expected = b"\x25\x60\x95\x13\0\x01\0\x04\x01\x02\x03\x04\x05\x06\x07\x08\
                         \0\0\0\0\0\0\x10\0\0\0\x02\0";
        assert_eq!(compact, expected);
        assert_eq!(parse_request(&compact, false).unwrap(), request);
        let extended = encode_request(&request, true);
        let expected = b"\x21\xe4\x1c\x71\0\x01\0\x04\x01\x02\x03\x04\x05\x06\x07\x08\
                         \0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x02\0";
        assert_eq!(extended, expected);
        assert_eq!(parse_request(&extended, true).unwrap(), request);
        assert!(parse_request(&extended, false).is_err());
    }

    #[test]
    fn chunks_survive_the_wire() {
        let chunk = Chunk {
            flags: ReplyFlags::DONE,
            kind: ChunkType::OFFSET_DATA,
            cookie: 7,
            offset: 4096,
            length: 520,
        };
        for extended in [false, true] {
            let (bytes, used) = chunk_header(&chunk, extended);
            let offset = if extended { 4096 } else { 0 };
            let parsed = parse_chunk_header(&bytes[4..used], extended).unwrap();
            assert_eq!(parsed, Chunk { offset, ..chunk });
        }
    }

    #[test]
    fn status_lengths_are_checked() {
        let extents = [
            StatusDescriptor {
                length: 512,
                flags: 3,
            },
            StatusDescriptor {
                length: 1 << 20,
                flags: 0,
            },
        ];
        for (kind, extended) in [
            (ChunkType::BLOCK_STATUS, false),
            (ChunkType::BLOCK_STATUS_EXT, true),
        ] {
            let bytes = encode_status(5, &extents, extended);
            assert_eq!(parse_status(&bytes, kind).unwrap(), (5, extents.to_vec()));
            assert!(parse_status(&bytes[..bytes.len() - 1], kind).is_err());
            assert!(parse_status(&bytes[..4], kind).is_err());
        }
        let message = encode_error(28, "full", Some(9));
        let parsed = parse_error(&message, ChunkType::ERROR_OFFSET).unwrap();
        assert_eq!(parsed, (28, "full".to_owned()));
    }
}
