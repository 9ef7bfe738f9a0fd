//! The NBD protocol's messages, free of I/O. (NetworkBlockDevice/nbd, doc/proto.md; section names below
//! are its.)
//!
//! Everything on the wire is big-endian. What comes from the peer is hostile: lengths are checked before
//! anything is allocated, and every parser takes bytes that are there.

mod handshake;
mod transmission;

pub use handshake::{
    GoRequest, Info, MetaContext, MetaRequest, OPTION_HEADER, OPTION_REPLY_HEADER, OptionHeader,
    OptionReplyHeader, encode_contexts_request, encode_go_request, encode_info, encode_option,
    encode_option_reply, parse_meta_reply, parse_server_entry,
};
pub use transmission::{
    CHUNK_HEADER, COMPACT_REQUEST, Chunk, EXTENDED_CHUNK_HEADER, EXTENDED_REQUEST, Request,
    SIMPLE_REPLY, StatusDescriptor, chunk_header, encode_error, encode_request, encode_status,
    parse_chunk_header, parse_error, parse_request, parse_simple_reply, parse_status,
    parse_status_payload, simple_reply,
};

use std::fmt;

use bitflags::bitflags;

/// `NBDMAGIC`, the first bytes of a server.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, before each option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// The oldstyle server's second magic.
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// Before each reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// A request with 32-bit lengths.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// A request with 64-bit lengths.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// A simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// A chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// A chunk of an extended reply.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// The longest string that the protocol allows.
pub const MAX_STRING: usize = 4096;
/// The largest payload that is sent or taken: what every peer takes without being told.
pub const MAX_PAYLOAD: u32 = 32 << 20;
/// The most data that is taken with an option.
pub const MAX_OPTION: u32 = 64 << 10;
/// The most meta contexts that one connection selects.
pub const MAX_CONTEXTS: usize = 64;
/// The most extents in one block status reply for one context.
pub const MAX_EXTENTS: usize = 1 << 16;

bitflags! {
    /// Handshake flags: the server offers them, the client answers with what it takes.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct HandshakeFlags: u16 {
        /// Fixed newstyle: unknown options are refused, not fatal.
        const FIXED_NEWSTYLE = 1;
        /// No 124 zeroes after the answer to `EXPORT_NAME`.
        const NO_ZEROES = 2;
    }

    /// Transmission flags: what an export can do.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct TransmissionFlags: u16 {
        /// Always set.
        const HAS_FLAGS = 1;
        /// Writes are refused.
        const READ_ONLY = 1 << 1;
        /// `FLUSH` is there.
        const SEND_FLUSH = 1 << 2;
        /// `FUA` is heeded.
        const SEND_FUA = 1 << 3;
        /// Rotating storage.
        const ROTATIONAL = 1 << 4;
        /// `TRIM` is there.
        const SEND_TRIM = 1 << 5;
        /// `WRITE_ZEROES` is there.
        const SEND_WRITE_ZEROES = 1 << 6;
        /// `DF` is heeded.
        const SEND_DF = 1 << 7;
        /// What one connection flushes, all see.
        const CAN_MULTI_CONN = 1 << 8;
        /// `RESIZE` (experimental).
        const SEND_RESIZE = 1 << 9;
        /// `CACHE` is there.
        const SEND_CACHE = 1 << 10;
        /// `FAST_ZERO` is heeded.
        const SEND_FAST_ZERO = 1 << 11;
        /// A block status request may name its contexts.
        const BLOCK_STATUS_PAYLOAD = 1 << 12;
    }

    /// Flags of a request.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct CommandFlags: u16 {
        /// On stable storage before the reply.
        const FUA = 1;
        /// Zeroes keep their space.
        const NO_HOLE = 1 << 1;
        /// The answer to a read is one chunk.
        const DF = 1 << 2;
        /// One extent of status is enough.
        const REQ_ONE = 1 << 3;
        /// Zero quickly, or fail.
        const FAST_ZERO = 1 << 4;
        /// The length is that of a payload which follows (extended requests only).
        const PAYLOAD_LEN = 1 << 5;
    }

    /// Flags of a chunk.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct ReplyFlags: u16 {
        /// The last chunk of the reply.
        const DONE = 1;
    }

    /// The value of `base:allocation`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct StateFlags: u32 {
        /// Not allocated.
        const HOLE = 1;
        /// Reads as zeroes.
        const ZERO = 2;
    }
}

/// A set of constants with names: what is not named is kept as a number.
macro_rules! numbers {
    ($(#[$doc:meta])* $name:ident: $raw:ty { $($(#[$vdoc:meta])* $constant:ident = $value:expr),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash)]
        pub struct $name(pub $raw);
        impl $name {
            $($(#[$vdoc])* pub const $constant: Self = Self($value);)+
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match *self {
                    $(Self::$constant => f.write_str(stringify!($constant)),)+
                    Self(other) => write!(f, "{other:#x}"),
                }
            }
        }
    };
}

numbers! {
    /// What a client asks for in the handshake.
    OptionType: u32 {
        /// Use this export; an error ends the connection.
        EXPORT_NAME = 1,
        /// Give up.
        ABORT = 2,
        /// Name the exports.
        LIST = 3,
        /// Go on under TLS.
        STARTTLS = 5,
        /// Tell about an export.
        INFO = 6,
        /// Tell about an export and use it.
        GO = 7,
        /// Structured replies from now on.
        STRUCTURED_REPLY = 8,
        /// Which meta contexts are there.
        LIST_META_CONTEXT = 9,
        /// Use these meta contexts.
        SET_META_CONTEXT = 10,
        /// 64-bit lengths from now on.
        EXTENDED_HEADERS = 11,
    }
}

numbers! {
    /// How a server answers an option; errors have the highest bit set.
    ReplyType: u32 {
        /// Done.
        ACK = 1,
        /// One export of a list.
        SERVER = 2,
        /// One piece of information on an export.
        INFO = 3,
        /// One meta context.
        META_CONTEXT = 4,
        /// Not known.
        ERR_UNSUP = 0x8000_0001,
        /// Not wanted here.
        ERR_POLICY = 0x8000_0002,
        /// Malformed.
        ERR_INVALID = 0x8000_0003,
        /// Not on this platform.
        ERR_PLATFORM = 0x8000_0004,
        /// TLS first.
        ERR_TLS_REQD = 0x8000_0005,
        /// No such export.
        ERR_UNKNOWN = 0x8000_0006,
        /// The server goes away.
        ERR_SHUTDOWN = 0x8000_0007,
        /// The client must ask for block sizes.
        ERR_BLOCK_SIZE_REQD = 0x8000_0008,
        /// Too long.
        ERR_TOO_BIG = 0x8000_0009,
        /// Extended headers first.
        ERR_EXT_HEADER_REQD = 0x8000_000a,
    }
}

impl ReplyType {
    /// Whether it is an error.
    pub fn is_error(self) -> bool {
        self.0 & 0x8000_0000 != 0
    }
}

numbers! {
    /// What information about an export is.
    InfoType: u16 {
        /// Size and transmission flags.
        EXPORT = 0,
        /// The canonical name.
        NAME = 1,
        /// A description for people.
        DESCRIPTION = 2,
        /// Minimum, preferred and largest sizes of requests.
        BLOCK_SIZE = 3,
    }
}

numbers! {
    /// What a request wants done.
    Command: u16 {
        /// Read data.
        READ = 0,
        /// Write data.
        WRITE = 1,
        /// End the connection.
        DISC = 2,
        /// Everything written so far to stable storage.
        FLUSH = 3,
        /// Contents are no longer needed.
        TRIM = 4,
        /// Will be read soon.
        CACHE = 5,
        /// Make it zeroes.
        WRITE_ZEROES = 6,
        /// Where is what.
        BLOCK_STATUS = 7,
    }
}

numbers! {
    /// What a chunk of a structured reply holds.
    ChunkType: u16 {
        /// Nothing; the end of a reply.
        NONE = 0,
        /// An offset and data.
        OFFSET_DATA = 1,
        /// An offset and a number of zeroes.
        OFFSET_HOLE = 2,
        /// Status with 32-bit lengths.
        BLOCK_STATUS = 5,
        /// Status with 64-bit lengths.
        BLOCK_STATUS_EXT = 6,
        /// An error.
        ERROR = 0x8001,
        /// An error at an offset.
        ERROR_OFFSET = 0x8002,
    }
}

impl ChunkType {
    /// Whether it is an error.
    pub fn is_error(self) -> bool {
        self.0 & 0x8000 != 0
    }
}

/// Error numbers on the wire ("Error values").
pub mod errors {
    /// Not permitted (read-only).
    pub const EPERM: u32 = 1;
    /// Input or output failed.
    pub const EIO: u32 = 5;
    /// No memory.
    pub const ENOMEM: u32 = 12;
    /// Bad argument.
    pub const EINVAL: u32 = 22;
    /// No space.
    pub const ENOSPC: u32 = 28;
    /// Too large.
    pub const EOVERFLOW: u32 = 75;
    /// Not supported.
    pub const ENOTSUP: u32 = 95;
    /// The server goes away.
    pub const ESHUTDOWN: u32 = 108;
}

/// The peer broke the protocol's rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProtocolError(pub &'static str);

impl fmt::Display for ProtocolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for ProtocolError {}

/// Reads fields from the front of a message.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn bytes(&mut self, count: usize) -> Result<&'a [u8], ProtocolError> {
        let Some((head, tail)) = self.0.split_at_checked(count) else {
            return Err(ProtocolError("a message is shorter than its fields"));
        };
        self.0 = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ProtocolError> {
        let mut value = [0; N];
        value.copy_from_slice(self.bytes(N)?);
        Ok(value)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, ProtocolError> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, ProtocolError> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, ProtocolError> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string whose length stands before it in 32 bits.
    pub(crate) fn string(&mut self) -> Result<String, ProtocolError> {
        let length = self.u32()? as usize;
        self.text(length)
    }

    pub(crate) fn text(&mut self, length: usize) -> Result<String, ProtocolError> {
        if length > MAX_STRING {
            return Err(ProtocolError("a string is longer than 4096 bytes"));
        }
        let bytes = self.bytes(length)?;
        let text =
            std::str::from_utf8(bytes).map_err(|_| ProtocolError("a string is not UTF-8"))?;
        if text.contains('\0') {
            return Err(ProtocolError("a string contains a zero byte"));
        }
        Ok(text.to_owned())
    }

    pub(crate) fn end(&self) -> Result<(), ProtocolError> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(ProtocolError("a message is longer than its fields"))
        }
    }
}

pub(crate) fn put_string(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend(u32::try_from(text.len()).unwrap_or(0).to_be_bytes());
    bytes.extend(text.as_bytes());
}
