//! Messages of the handshake: options and replies to them ("Fixed newstyle negotiation").

use super::{
    Fields, InfoType, MAX_CONTEXTS, OPTION_MAGIC, OPTION_REPLY_MAGIC, OptionType, ProtocolError,
    ReplyType, TransmissionFlags, put_string,
};

/// Bytes before an option's data.
pub const OPTION_HEADER: usize = 16;
/// Bytes before the data of a reply to an option.
pub const OPTION_REPLY_HEADER: usize = 20;

/// The head of an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    /// Which one.
    pub option: OptionType,
    /// Bytes of data that follow.
    pub length: u32,
}

impl OptionHeader {
    /// Reads the head of an option.
    ///
    /// # Errors
    ///
    /// If the magic number is wrong: then the rest cannot be trusted either.
    pub fn parse(bytes: &[u8; OPTION_HEADER]) -> Result<Self, ProtocolError> {
        let mut fields = Fields(bytes);
        if fields.u64()? != OPTION_MAGIC {
            return Err(ProtocolError("an option has a wrong magic number"));
        }
        Ok(Self {
            option: OptionType(fields.u32()?),
            length: fields.u32()?,
        })
    }
}

/// An option as the client sends it.
pub fn encode_option(option: OptionType, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(OPTION_HEADER + data.len());
    bytes.extend(OPTION_MAGIC.to_be_bytes());
    bytes.extend(option.0.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap_or(0).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// The head of a reply to an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// What is answered.
    pub option: OptionType,
    /// How.
    pub reply: ReplyType,
    /// Bytes of data that follow.
    pub length: u32,
}

impl OptionReplyHeader {
    /// Reads the head of a reply.
    ///
    /// # Errors
    ///
    /// If the magic number is wrong.
    pub fn parse(bytes: &[u8; OPTION_REPLY_HEADER]) -> Result<Self, ProtocolError> {
        let mut fields = Fields(bytes);
        if fields.u64()? != OPTION_REPLY_MAGIC {
            return Err(ProtocolError(
                "a reply to an option has a wrong magic number",
            ));
        }
        Ok(Self {
            option: OptionType(fields.u32()?),
            reply: ReplyType(fields.u32()?),
            length: fields.u32()?,
        })
    }
}

/// A reply to an option as the server sends it.
pub fn encode_option_reply(option: OptionType, reply: ReplyType, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(OPTION_REPLY_HEADER + data.len());
    bytes.extend(OPTION_REPLY_MAGIC.to_be_bytes());
    bytes.extend(option.0.to_be_bytes());
    bytes.extend(reply.0.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap_or(0).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// The data of `INFO` and `GO`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GoRequest {
    /// The export's name.
    pub name: String,
    /// What the client wants to know beside the size.
    pub wanted: Vec<InfoType>,
}

impl GoRequest {
    /// Reads the data.
    ///
    /// # Errors
    ///
    /// If it is malformed.
    pub fn parse(data: &[u8]) -> Result<Self, ProtocolError> {
        let mut fields = Fields(data);
        let name = fields.string()?;
        let count = fields.u16()?;
        let wanted = (0..count).map(|_| fields.u16().map(InfoType));
        let wanted = wanted.collect::<Result<_, _>>()?;
        fields.end()?;
        Ok(Self { name, wanted })
    }
}

/// The data of `INFO` and `GO`.
pub fn encode_go_request(name: &str, wanted: &[InfoType]) -> Vec<u8> {
    let mut bytes = Vec::new();
    put_string(&mut bytes, name);
    bytes.extend(u16::try_from(wanted.len()).unwrap_or(0).to_be_bytes());
    bytes.extend(wanted.iter().flat_map(|w| w.0.to_be_bytes()));
    bytes
}

/// One piece of information on an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Info {
    /// Size in bytes and abilities.
    Export(u64, TransmissionFlags),
    /// The canonical name.
    Name(String),
    /// For people.
    Description(String),
    /// Minimum, preferred and largest request.
    BlockSize {
        /// Offsets and lengths are multiples of it.
        minimum: u32,
        /// Requests of this size cost the least.
        preferred: u32,
        /// No payload may be larger.
        maximum: u32,
    },
    /// Something that is not known.
    Other(InfoType),
}

impl Info {
    /// Reads the data of a reply of type `INFO`.
    ///
    /// # Errors
    ///
    /// If it is malformed.
    pub fn parse(data: &[u8]) -> Result<Self, ProtocolError> {
        let mut fields = Fields(data);
        let kind = InfoType(fields.u16()?);
        let info = match kind {
            InfoType::EXPORT => {
                let size = fields.u64()?;
                Self::Export(size, TransmissionFlags::from_bits_retain(fields.u16()?))
            }
            InfoType::NAME => Self::Name(fields.text(fields.0.len())?),
            InfoType::DESCRIPTION => Self::Description(fields.text(fields.0.len())?),
            InfoType::BLOCK_SIZE => Self::BlockSize {
                minimum: fields.u32()?,
                preferred: fields.u32()?,
                maximum: fields.u32()?,
            },
            _ => return Ok(Self::Other(kind)),
        };
        fields.end()?;
        Ok(info)
    }
}

/// The data of a reply of type `INFO`.
pub fn encode_info(info: &Info) -> Vec<u8> {
    let mut bytes = Vec::new();
    match info {
        Info::Export(size, flags) => {
            bytes.extend(InfoType::EXPORT.0.to_be_bytes());
            bytes.extend(size.to_be_bytes());
            bytes.extend(flags.bits().to_be_bytes());
        }
        Info::Name(text) => {
            bytes.extend(InfoType::NAME.0.to_be_bytes());
            bytes.extend(text.as_bytes());
        }
        Info::Description(text) => {
            bytes.extend(InfoType::DESCRIPTION.0.to_be_bytes());
            bytes.extend(text.as_bytes());
        }
        Info::BlockSize {
            minimum,
            preferred,
            maximum,
        } => {
            bytes.extend(InfoType::BLOCK_SIZE.0.to_be_bytes());
            bytes.extend(
                [*minimum, *preferred, *maximum]
                    .iter()
                    .flat_map(|n| n.to_be_bytes()),
            );
        }
        Info::Other(kind) => bytes.extend(kind.0.to_be_bytes()),
    }
    bytes
}

/// The data of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaRequest {
    /// The export's name.
    pub export: String,
    /// What is asked for: contexts, or namespaces with a colon at the end.
    pub queries: Vec<String>,
}

impl MetaRequest {
    /// Reads the data.
    ///
    /// # Errors
    ///
    /// If it is malformed.
    pub fn parse(data: &[u8]) -> Result<Self, ProtocolError> {
        let mut fields = Fields(data);
        let export = fields.string()?;
        let count = fields.u32()? as usize;
        // Each query has four bytes at least, so the data bounds the loop.
        if count > fields.0.len() / 4 {
            return Err(ProtocolError("more queries are announced than sent"));
        }
        let queries = (0..count).map(|_| fields.string());
        let queries = queries.collect::<Result<_, _>>()?;
        fields.end()?;
        Ok(Self { export, queries })
    }
}

/// The data of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
pub fn encode_contexts_request(export: &str, queries: &[&str]) -> Vec<u8> {
    let mut bytes = Vec::new();
    put_string(&mut bytes, export);
    let count = u32::try_from(queries.len().min(MAX_CONTEXTS)).unwrap_or(0);
    bytes.extend(count.to_be_bytes());
    for query in queries.iter().take(MAX_CONTEXTS) {
        put_string(&mut bytes, query);
    }
    bytes
}

/// A meta context and the number under which the server knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaContext {
    /// The number.
    pub id: u32,
    /// The name.
    pub name: String,
}

/// Reads a reply of type `META_CONTEXT`.
///
/// # Errors
///
/// If it is malformed.
pub fn parse_meta_reply(data: &[u8]) -> Result<MetaContext, ProtocolError> {
    let mut fields = Fields(data);
    let id = fields.u32()?;
    let name = fields.text(fields.0.len())?;
    Ok(MetaContext { id, name })
}

/// Reads a reply of type `SERVER`: an export's name and its description.
///
/// # Errors
///
/// If it is malformed.
pub fn parse_server_entry(data: &[u8]) -> Result<(String, String), ProtocolError> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let description = fields.text(fields.0.len())?;
    Ok((name, description))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_survive_the_wire() {
        let data = encode_go_request("disk", &[InfoType::BLOCK_SIZE, InfoType::NAME]);
        let go = GoRequest::parse(&data).unwrap();
        assert_eq!(go.name, "disk");
        assert_eq!(go.wanted, [InfoType::BLOCK_SIZE, InfoType::NAME]);
        let data = encode_contexts_request("", &["base:allocation", "qemu:"]);
        let meta = MetaRequest::parse(&data).unwrap();
        assert_eq!(meta.queries, ["base:allocation", "qemu:"]);
        let info = Info::BlockSize {
            minimum: 1,
            preferred: 4096,
            maximum: 32 << 20,
        };
        assert_eq!(Info::parse(&encode_info(&info)).unwrap(), info);
        let option = encode_option(OptionType::LIST, b"xy");
        let head = option[..OPTION_HEADER].try_into().unwrap();
        assert_eq!(OptionHeader::parse(head).unwrap().length, 2);
    }

    #[test]
    fn lies_about_lengths_are_found() {
        for data in [
            &b"\0\0\0\x05disk\0\0"[..],
            b"\xff\xff\xff\xff",
            b"\0\0\0\x01\xff\0\0",
            b"\0\0\0\x01x\0\x02\0\0",
            b"\0\0\0\x01x\0\0extra",
        ] {
            assert!(GoRequest::parse(data).is_err(), "{data:?}");
        }
        assert!(MetaRequest::parse(b"\0\0\0\0\xff\xff\xff\xff\0\0\0\0").is_err());
    }
}
