//! The client's side of the handshake.

use std::rc::Rc;

use block::executor::Socket;
use block::{BlockError, IoBuf, Result};

use super::broken;
use crate::address::{Address, NbdName};
use crate::protocol::{
    HandshakeFlags, INIT_MAGIC, Info, InfoType, MAX_CONTEXTS, OLDSTYLE_MAGIC, OPTION_MAGIC,
    OptionReplyHeader, OptionType, ReplyType, TransmissionFlags, encode_contexts_request,
    encode_go_request, encode_option, parse_meta_reply, parse_server_entry,
};
use crate::tls::{TlsClient, TlsStream};
use crate::transport::{Reader, Transport};

/// The longest reply to an option that is taken.
const MAX_REPLY: u32 = 32 << 10;
/// The most replies to one option.
const MAX_REPLIES: usize = 100_000;

/// What client and server have agreed on.
#[derive(Debug, Clone)]
pub(super) struct Agreed {
    pub(super) size: u64,
    pub(super) flags: TransmissionFlags,
    pub(super) minimum: u32,
    pub(super) maximum: u32,
    pub(super) structured: bool,
    pub(super) extended: bool,
    /// The number of `base:allocation`, if it was selected.
    pub(super) base_allocation: Option<u32>,
}

/// An export of a server, as a list shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// For people; may be empty.
    pub description: String,
    /// Size in bytes and abilities.
    pub export: Option<(u64, TransmissionFlags)>,
    /// Minimum, preferred and largest request.
    pub block_size: Option<(u32, u32, u32)>,
    /// The meta contexts that it has.
    pub contexts: Vec<String>,
}

/// A reply to an option: its kind and data.
type Reply = (ReplyType, Vec<u8>);

struct Talk {
    transport: Rc<Transport>,
    reader: Reader,
    no_zeroes: bool,
}

impl Talk {
    /// Connects and greets, under TLS if there are credentials.
    async fn begin(socket: Socket, host: &str, tls: Option<&TlsClient>) -> Result<Self> {
        let mut talk = Self::greet(socket).await?;
        let Some(tls) = tls else { return Ok(talk) };
        if talk.simple_option(OptionType::STARTTLS).await?.is_some() {
            return Err(broken("the server has no TLS"));
        }
        if talk.reader.buffered() > 0 {
            return Err(broken("the server sent plain text after agreeing to TLS"));
        }
        drop(talk.reader);
        let Some(Transport::Plain(socket)) = Rc::into_inner(talk.transport) else {
            return Err(broken("TLS cannot start"));
        };
        let stream = TlsStream::connect(socket, tls, host).await?;
        let transport = Rc::new(Transport::Tls(Box::new(stream)));
        talk = Self {
            reader: Reader::new(transport.clone()),
            transport,
            no_zeroes: talk.no_zeroes,
        };
        Ok(talk)
    }

    async fn greet(socket: Socket) -> Result<Self> {
        let transport = Rc::new(Transport::Plain(socket));
        let mut reader = Reader::new(transport.clone());
        let first = u64::from_be_bytes(reader.array().await?);
        let second = u64::from_be_bytes(reader.array().await?);
        if first != INIT_MAGIC {
            return Err(broken("this is no NBD server"));
        }
        if second == OLDSTYLE_MAGIC {
            return Err(broken("the server speaks the oldstyle protocol only"));
        }
        if second != OPTION_MAGIC {
            return Err(broken("this is no NBD server"));
        }
        let offered = HandshakeFlags::from_bits_truncate(u16::from_be_bytes(reader.array().await?));
        if !offered.contains(HandshakeFlags::FIXED_NEWSTYLE) {
            return Err(broken(
                "the server does not speak the fixed newstyle protocol",
            ));
        }
        let answer = u32::from(offered.bits()).to_be_bytes();
        transport.write_all(IoBuf::from_slice(&answer)).await?;
        let no_zeroes = offered.contains(HandshakeFlags::NO_ZEROES);
        Ok(Self {
            transport,
            reader,
            no_zeroes,
        })
    }

    /// Sends an option and gathers the replies up to `ACK` or an error (which is the last).
    async fn option(&mut self, option: OptionType, data: &[u8]) -> Result<Vec<Reply>> {
        let bytes = IoBuf::from_slice(&encode_option(option, data));
        self.transport.write_all(bytes).await?;
        let mut replies = Vec::new();
        while replies.len() < MAX_REPLIES {
            let head = OptionReplyHeader::parse(&self.reader.array().await?)?;
            if head.option != option {
                return Err(broken("the server answers an option that was not sent"));
            }
            if head.length > MAX_REPLY {
                return Err(broken("a reply to an option is too long"));
            }
            let data = self.reader.vector(head.length as usize).await?;
            if head.reply == ReplyType::ACK || head.reply.is_error() {
                replies.push((head.reply, data));
                return Ok(replies);
            }
            replies.push((head.reply, data));
        }
        Err(broken("a reply to an option does not end"))
    }

    /// An option that is acknowledged or refused: the refusal, if it is one.
    async fn simple_option(&mut self, option: OptionType) -> Result<Option<Reply>> {
        let mut replies = self.option(option, &[]).await?;
        Ok(replies.pop().filter(|(reply, _)| reply.is_error()))
    }

    /// Agrees on the form of replies: structured, extended.
    async fn reply_form(&mut self) -> Result<(bool, bool)> {
        if self
            .simple_option(OptionType::EXTENDED_HEADERS)
            .await?
            .is_none()
        {
            return Ok((true, true));
        }
        let refused = self.simple_option(OptionType::STRUCTURED_REPLY).await?;
        Ok((refused.is_none(), false))
    }
}

fn refusal(export: &str, (reply, data): &Reply) -> BlockError {
    let text = String::from_utf8_lossy(data);
    let why = match *reply {
        ReplyType::ERR_TLS_REQD => "the server wants TLS (nbds://)".to_owned(),
        _ if !text.is_empty() => text.into_owned(),
        other => format!("{other:?}"),
    };
    broken(&format!("the server refuses the export '{export}': {why}"))
}

/// The name that a server's certificate must be for.
fn host(address: &Address) -> &str {
    match address {
        Address::Tcp(host, _) => host,
        Address::Unix(_) => "localhost",
    }
}

/// Chooses an export of the server behind `socket`.
pub(super) async fn connect(
    socket: Socket,
    name: &NbdName,
    tls: Option<&TlsClient>,
) -> Result<(Rc<Transport>, Reader, Agreed)> {
    let mut talk = Talk::begin(socket, host(&name.address), tls).await?;
    let (structured, extended) = talk.reply_form().await?;
    let mut agreed = Agreed {
        size: 0,
        flags: TransmissionFlags::empty(),
        minimum: 1,
        maximum: crate::protocol::MAX_PAYLOAD,
        structured,
        extended,
        base_allocation: None,
    };
    if structured {
        let wanted = encode_contexts_request(&name.export, &["base:allocation"]);
        for (reply, data) in talk.option(OptionType::SET_META_CONTEXT, &wanted).await? {
            if reply == ReplyType::META_CONTEXT {
                let context = parse_meta_reply(&data)?;
                if context.name == "base:allocation" {
                    agreed.base_allocation = Some(context.id);
                }
            }
        }
    }
    let wanted = encode_go_request(&name.export, &[InfoType::BLOCK_SIZE]);
    let replies = talk.option(OptionType::GO, &wanted).await?;
    match replies.last() {
        Some((ReplyType::ERR_UNSUP, _)) => {
            let bytes = encode_option(OptionType::EXPORT_NAME, name.export.as_bytes());
            talk.transport.write_all(IoBuf::from_slice(&bytes)).await?;
            agreed.size = u64::from_be_bytes(talk.reader.array().await?);
            let flags = u16::from_be_bytes(talk.reader.array().await?);
            agreed.flags = TransmissionFlags::from_bits_retain(flags);
            if !talk.no_zeroes {
                talk.reader.skip(124).await?;
            }
        }
        Some(reply) if reply.0.is_error() => return Err(refusal(&name.export, reply)),
        _ => apply_infos(&replies, &mut agreed)?,
    }
    if agreed.size > i64::MAX.cast_unsigned() {
        return Err(broken("the export is too large"));
    }
    Ok((talk.transport, talk.reader, agreed))
}

fn apply_infos(replies: &[Reply], agreed: &mut Agreed) -> Result<()> {
    let mut known = false;
    for (_, data) in replies
        .iter()
        .filter(|(reply, _)| *reply == ReplyType::INFO)
    {
        match Info::parse(data)? {
            Info::Export(size, flags) => (agreed.size, agreed.flags, known) = (size, flags, true),
            Info::BlockSize {
                minimum, maximum, ..
            } => {
                let sane = minimum.is_power_of_two() && minimum <= 64 << 10 && maximum >= minimum;
                if !sane {
                    return Err(broken("the server has impossible block sizes"));
                }
                agreed.minimum = minimum;
                let maximum = maximum.min(crate::protocol::MAX_PAYLOAD);
                agreed.maximum = maximum / minimum * minimum;
            }
            _ => {}
        }
    }
    if known {
        Ok(())
    } else {
        Err(broken("the server does not say how large the export is"))
    }
}

/// Lists the exports of a server with what it tells of them.
///
/// # Errors
///
/// If the server cannot be reached or refuses to list.
pub async fn list(address: &Address, tls: Option<&TlsClient>) -> Result<Vec<Listed>> {
    let socket = address.connect().await?;
    let mut talk = Talk::begin(socket, host(address), tls).await?;
    let (structured, _) = talk.reply_form().await?;
    let replies = talk.option(OptionType::LIST, &[]).await?;
    if let Some(reply) = replies.last().filter(|(reply, _)| reply.is_error()) {
        return Err(refusal("", reply));
    }
    let mut found = Vec::new();
    for (_, data) in replies
        .iter()
        .filter(|(reply, _)| *reply == ReplyType::SERVER)
    {
        let (name, description) = parse_server_entry(data)?;
        let mut listed = Listed {
            name,
            description,
            export: None,
            block_size: None,
            contexts: Vec::new(),
        };
        let kinds = [InfoType::NAME, InfoType::DESCRIPTION, InfoType::BLOCK_SIZE];
        let wanted = encode_go_request(&listed.name, &kinds);
        for (reply, data) in talk.option(OptionType::INFO, &wanted).await? {
            if reply != ReplyType::INFO {
                continue;
            }
            match Info::parse(&data)? {
                Info::Export(size, flags) => listed.export = Some((size, flags)),
                Info::Description(text) => listed.description = text,
                Info::BlockSize {
                    minimum,
                    preferred,
                    maximum,
                } => listed.block_size = Some((minimum, preferred, maximum)),
                _ => {}
            }
        }
        if structured {
            let wanted = encode_contexts_request(&listed.name, &[]);
            let replies = talk.option(OptionType::LIST_META_CONTEXT, &wanted).await?;
            for (_, data) in replies.iter().filter(|r| r.0 == ReplyType::META_CONTEXT) {
                if listed.contexts.len() < MAX_CONTEXTS {
                    listed.contexts.push(parse_meta_reply(data)?.name);
                }
            }
        }
        found.push(listed);
    }
    talk.option(OptionType::ABORT, &[]).await.ok();
    talk.transport.close().await;
    Ok(found)
}
