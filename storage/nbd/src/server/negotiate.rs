//! The server's side of the handshake.

use std::rc::Rc;

use block::executor::Socket;
use block::{BlockError, ErrorKind, IoBuf, Result};

use super::{Export, Server, Session};
use crate::protocol::{
    GoRequest, HandshakeFlags, INIT_MAGIC, Info, InfoType, MAX_CONTEXTS, MAX_OPTION, MAX_PAYLOAD,
    MAX_STRING, MetaRequest, OPTION_MAGIC, OptionHeader, OptionType, ReplyType, encode_info,
    encode_option_reply, put_string,
};
use crate::tls::TlsStream;
use crate::transport::{Reader, Transport};

/// A client that haggles longer than this is cut off.
const MAX_OPTIONS: u32 = 1024;

fn broken(why: &str) -> BlockError {
    BlockError::new(ErrorKind::Io, format!("NBD: {why}"))
}

struct Negotiation<'a> {
    server: &'a Server,
    transport: Rc<Transport>,
    reader: Reader,
    no_zeroes: bool,
    tls: bool,
    structured: bool,
    extended: bool,
    /// The export that the contexts were selected for, and their numbers.
    selected: Option<(String, Vec<u32>)>,
}

/// What follows an option.
enum Next {
    Option,
    End,
    Transmission(Rc<Export>),
    StartTls,
}

/// Agrees with a client; `None` if it went away or gave up in order.
pub(super) async fn negotiate(server: &Server, socket: Socket) -> Result<Option<Session>> {
    let transport = Rc::new(Transport::Plain(socket));
    let mut state = Negotiation {
        server,
        reader: Reader::new(transport.clone()),
        transport,
        no_zeroes: false,
        tls: false,
        structured: false,
        extended: false,
        selected: None,
    };
    let mut greeting = Vec::new();
    greeting.extend(INIT_MAGIC.to_be_bytes());
    greeting.extend(OPTION_MAGIC.to_be_bytes());
    let offered = HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES;
    greeting.extend(offered.bits().to_be_bytes());
    state.send(&greeting).await?;
    let mut flags = [0; 4];
    if !state.reader.try_read(&mut flags).await? {
        return Ok(None);
    }
    let flags = u32::from_be_bytes(flags);
    if flags & !u32::from(offered.bits()) != 0 {
        return Err(broken("the client wants unknown handshake flags"));
    }
    state.no_zeroes = flags & u32::from(HandshakeFlags::NO_ZEROES.bits()) != 0;
    for _ in 0..MAX_OPTIONS {
        let mut head = [0; 16];
        if !state.reader.try_read(&mut head).await? {
            return Ok(None);
        }
        let head = OptionHeader::parse(&head)?;
        match state.option(head).await? {
            Next::Option => {}
            Next::End => return Ok(None),
            Next::StartTls => {
                state = state.start_tls().await?;
            }
            Next::Transmission(export) => {
                let contexts = match state.selected.take() {
                    Some((name, contexts)) if name == export.name => contexts,
                    _ => Vec::new(),
                };
                return Ok(Some(Session {
                    transport: state.transport,
                    reader: state.reader,
                    export,
                    structured: state.structured,
                    extended: state.extended,
                    contexts,
                }));
            }
        }
    }
    Err(broken("the client sent too many options"))
}

impl Negotiation<'_> {
    async fn send(&self, bytes: &[u8]) -> Result<()> {
        self.transport.write_all(IoBuf::from_slice(bytes)).await
    }

    async fn reply(&self, option: OptionType, reply: ReplyType, data: &[u8]) -> Result<()> {
        self.send(&encode_option_reply(option, reply, data)).await
    }

    async fn refuse(&self, option: OptionType, reply: ReplyType, why: &str) -> Result<Next> {
        self.reply(option, reply, why.as_bytes()).await?;
        Ok(Next::Option)
    }

    async fn option(&mut self, head: OptionHeader) -> Result<Next> {
        let option = head.option;
        if head.length > MAX_OPTION {
            if option == OptionType::EXPORT_NAME {
                return Err(broken("the client sent an export name that is too long"));
            }
            self.reader.skip(u64::from(head.length)).await?;
            return self
                .refuse(option, ReplyType::ERR_TOO_BIG, "option too long")
                .await;
        }
        let data = self.reader.vector(head.length as usize).await?;
        if self.server.tls.is_some() && !self.tls {
            match option {
                OptionType::STARTTLS | OptionType::ABORT => {}
                OptionType::EXPORT_NAME => return Err(broken("the client did not use TLS")),
                _ => {
                    let why = "TLS is required";
                    return self.refuse(option, ReplyType::ERR_TLS_REQD, why).await;
                }
            }
        }
        let has_data = !data.is_empty();
        match option {
            OptionType::ABORT => {
                // The client need not wait for the answer.
                let _ = self.reply(option, ReplyType::ACK, &[]).await;
                Ok(Next::End)
            }
            OptionType::EXPORT_NAME => self.export_name(&data).await,
            OptionType::LIST
            | OptionType::STARTTLS
            | OptionType::STRUCTURED_REPLY
            | OptionType::EXTENDED_HEADERS
                if has_data =>
            {
                self.refuse(option, ReplyType::ERR_INVALID, "the option takes no data")
                    .await
            }
            OptionType::LIST => self.list().await,
            OptionType::STARTTLS => match (&self.server.tls, self.tls) {
                (None, _) => {
                    self.refuse(option, ReplyType::ERR_POLICY, "TLS is not set up")
                        .await
                }
                (_, true) => {
                    self.refuse(option, ReplyType::ERR_INVALID, "TLS is in use")
                        .await
                }
                (Some(_), false) => {
                    self.reply(option, ReplyType::ACK, &[]).await?;
                    Ok(Next::StartTls)
                }
            },
            OptionType::STRUCTURED_REPLY if self.extended => {
                let why = "extended headers are in use";
                self.refuse(option, ReplyType::ERR_EXT_HEADER_REQD, why)
                    .await
            }
            OptionType::STRUCTURED_REPLY if self.structured => {
                self.refuse(option, ReplyType::ERR_INVALID, "already in use")
                    .await
            }
            OptionType::EXTENDED_HEADERS if self.extended => {
                self.refuse(option, ReplyType::ERR_INVALID, "already in use")
                    .await
            }
            OptionType::STRUCTURED_REPLY | OptionType::EXTENDED_HEADERS => {
                self.structured = true;
                self.extended = option == OptionType::EXTENDED_HEADERS;
                self.reply(option, ReplyType::ACK, &[]).await?;
                Ok(Next::Option)
            }
            OptionType::INFO | OptionType::GO => self.go(option, &data).await,
            OptionType::LIST_META_CONTEXT | OptionType::SET_META_CONTEXT => {
                self.meta_context(option, &data).await
            }
            _ => {
                self.refuse(option, ReplyType::ERR_UNSUP, "unknown option")
                    .await
            }
        }
    }

    async fn start_tls(self) -> Result<Self> {
        if self.reader.buffered() > 0 {
            return Err(broken("the client sent plain text after asking for TLS"));
        }
        drop(self.reader);
        let transport = Rc::into_inner(self.transport);
        let (Some(Transport::Plain(socket)), Some(tls)) = (transport, &self.server.tls) else {
            return Err(broken("TLS cannot start"));
        };
        let transport = Rc::new(Transport::Tls(Box::new(
            TlsStream::accept(socket, tls).await?,
        )));
        Ok(Self {
            server: self.server,
            reader: Reader::new(transport.clone()),
            transport,
            no_zeroes: self.no_zeroes,
            tls: true,
            // What was agreed in the clear may have been an attacker's.
            structured: false,
            extended: false,
            selected: None,
        })
    }

    async fn export_name(&mut self, data: &[u8]) -> Result<Next> {
        let name = std::str::from_utf8(data).unwrap_or("\0");
        // There is no way to refuse but to hang up.
        let Some(export) = self.server.find(name).cloned() else {
            return Err(broken("the client asked for an unknown export"));
        };
        if self.extended {
            return Err(broken("the client used EXPORT_NAME with extended headers"));
        }
        let mut answer = export.size().to_be_bytes().to_vec();
        answer.extend(export.flags(self.structured).bits().to_be_bytes());
        if !self.no_zeroes {
            answer.extend([0; 124]);
        }
        self.send(&answer).await?;
        Ok(Next::Transmission(export))
    }

    async fn list(&self) -> Result<Next> {
        for export in &self.server.exports {
            let mut data = Vec::new();
            put_string(&mut data, &export.name);
            data.extend(export.description.as_bytes());
            self.reply(OptionType::LIST, ReplyType::SERVER, &data)
                .await?;
        }
        self.reply(OptionType::LIST, ReplyType::ACK, &[]).await?;
        Ok(Next::Option)
    }

    async fn go(&mut self, option: OptionType, data: &[u8]) -> Result<Next> {
        let request = match GoRequest::parse(data) {
            Ok(request) => request,
            Err(e) => return self.refuse(option, ReplyType::ERR_INVALID, e.0).await,
        };
        let Some(export) = self.server.find(&request.name).cloned() else {
            let why = format!("export '{}' not present", request.name);
            return self.refuse(option, ReplyType::ERR_UNKNOWN, &why).await;
        };
        let mut answers = vec![Info::Export(export.size(), export.flags(self.structured))];
        if request.wanted.contains(&InfoType::NAME) {
            answers.push(Info::Name(export.name.clone()));
        }
        if !export.description.is_empty() && export.description.len() <= MAX_STRING {
            answers.push(Info::Description(export.description.clone()));
        }
        answers.push(Info::BlockSize {
            minimum: 1,
            preferred: 4096,
            maximum: MAX_PAYLOAD,
        });
        for info in &answers {
            self.reply(option, ReplyType::INFO, &encode_info(info))
                .await?;
        }
        self.reply(option, ReplyType::ACK, &[]).await?;
        Ok(if option == OptionType::GO {
            Next::Transmission(export)
        } else {
            Next::Option
        })
    }

    async fn meta_context(&mut self, option: OptionType, data: &[u8]) -> Result<Next> {
        let set = option == OptionType::SET_META_CONTEXT;
        if set {
            self.selected = None;
        }
        if !self.structured {
            let why = "structured replies first";
            return self.refuse(option, ReplyType::ERR_INVALID, why).await;
        }
        let request = match MetaRequest::parse(data) {
            Ok(request) => request,
            Err(e) => return self.refuse(option, ReplyType::ERR_INVALID, e.0).await,
        };
        let Some(export) = self.server.find(&request.export) else {
            let why = format!("export '{}' not present", request.export);
            return self.refuse(option, ReplyType::ERR_UNKNOWN, &why).await;
        };
        let all = !set && request.queries.is_empty();
        let wanted = |name: &str| {
            all || request.queries.iter().any(|query| {
                query == name || (!set && query.ends_with(':') && name.starts_with(query.as_str()))
            })
        };
        let mut found = export.contexts();
        found.retain(|(_, name)| wanted(name));
        found.truncate(MAX_CONTEXTS);
        for (number, name) in &found {
            // In a list the numbers mean nothing.
            let mut data = if set { *number } else { 0 }.to_be_bytes().to_vec();
            data.extend(name.as_bytes());
            self.reply(option, ReplyType::META_CONTEXT, &data).await?;
        }
        if set {
            let numbers = found.iter().map(|(number, _)| *number).collect();
            self.selected = Some((request.export, numbers));
        }
        self.reply(option, ReplyType::ACK, &[]).await?;
        Ok(Next::Option)
    }
}
