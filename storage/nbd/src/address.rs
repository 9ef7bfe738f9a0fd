//! Where servers are, and how people write that.

use std::fmt;
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use block::executor::{Socket, offload};
use block::{BlockError, Result};

use crate::protocol::MAX_STRING;

/// The port that IANA has given to NBD.
pub const DEFAULT_PORT: u16 = 10809;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// A host name or address, and a port.
    Tcp(String, u16),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp(host, port) if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp(host, port) => write!(f, "{host}:{port}"),
        }
    }
}

impl Address {
    /// Connects to a server.
    ///
    /// # Errors
    ///
    /// One line that names the address.
    pub async fn connect(&self) -> Result<Socket> {
        let failed = |e| BlockError::io(format!("Failed to connect to '{self}'"), e);
        let socket: OwnedFd = match self {
            Self::Unix(path) => UnixStream::connect(path).map_err(failed)?.into(),
            Self::Tcp(host, port) => {
                let (host, port) = (host.clone(), *port);
                // Looking names up and connecting both block.
                let stream = offload(move || TcpStream::connect((host.as_str(), port)));
                let stream = stream.await.map_err(failed)?;
                stream.set_nodelay(true).map_err(failed)?;
                stream.into()
            }
        };
        Socket::new(socket)
    }

    /// Listens there. A Unix socket that nobody listens on any more is replaced.
    ///
    /// # Errors
    ///
    /// One line that names the address.
    pub fn listen(&self) -> Result<OwnedFd> {
        let failed = |e| BlockError::io(format!("Failed to listen on '{self}'"), e);
        match self {
            Self::Unix(path) => {
                if UnixStream::connect(path)
                    .is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused)
                {
                    // If this fails, so does the bind, with a reason.
                    let _ = std::fs::remove_file(path);
                }
                Ok(UnixListener::bind(path).map_err(failed)?.into())
            }
            Self::Tcp(host, port) => {
                let addresses: Vec<_> = (host.as_str(), *port)
                    .to_socket_addrs()
                    .map_err(failed)?
                    .collect();
                Ok(TcpListener::bind(&addresses[..]).map_err(failed)?.into())
            }
        }
    }
}

/// The listening socket that the service manager has passed on (`LISTEN_FDS`), if it has.
///
/// # Errors
///
/// If more than one socket was passed, or it cannot be used.
pub fn inherited_listener() -> Result<Option<OwnedFd>> {
    let variable = |name| std::env::var(name).ok()?.parse::<u32>().ok();
    if variable("LISTEN_PID") != Some(std::process::id()) {
        return Ok(None);
    }
    match variable("LISTEN_FDS") {
        None | Some(0) => Ok(None),
        Some(1) => Ok(Some(take_inherited())),
        Some(_) => Err(BlockError::invalid_argument(
            "more than one socket in LISTEN_FDS",
        )),
    }
}

/// The first descriptor that a service manager passes on is always 3.
#[allow(unsafe_code)] // A descriptor known by its number alone.
fn take_inherited() -> OwnedFd {
    use std::os::fd::FromRawFd;
    // SAFETY: by the protocol of socket activation, descriptor 3 was opened for this process to own;
    // the caller takes it once, at the start of the program.
    unsafe { OwnedFd::from_raw_fd(3) }
}

/// An export as people name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NbdName {
    /// The server.
    pub address: Address,
    /// The export.
    pub export: String,
    /// TLS is a must.
    pub tls: bool,
    /// Where the certificates are (`tls-certificates=`).
    pub certificates: Option<PathBuf>,
}

impl NbdName {
    /// Whether `name` is that of an export, in whichever way.
    pub fn is_nbd(name: &str) -> bool {
        let scheme = name.split_once(':').map_or("", |(scheme, _)| scheme);
        matches!(
            scheme,
            "nbd" | "nbds" | "nbd+tcp" | "nbds+tcp" | "nbd+unix" | "nbds+unix"
        )
    }

    /// Reads `nbd://HOST[:PORT]/EXPORT`, `nbds://…`, `nbd+unix:///EXPORT?socket=PATH`,
    /// `nbd:HOST:PORT[:exportname=EXPORT]` or `nbd:unix:PATH[:exportname=EXPORT]`.
    ///
    /// # Errors
    ///
    /// `InvalidArgument`, naming what is wrong.
    pub fn parse(name: &str) -> Result<Self> {
        let bad = |why: &str| BlockError::invalid_argument(format!("'{name}': {why}"));
        let parsed = match name.split_once("://") {
            Some((scheme, rest)) => Self::parse_uri(scheme, rest),
            None => Self::parse_legacy(name),
        };
        let parsed = parsed.map_err(|why| bad(&why))?;
        if parsed.export.len() > MAX_STRING {
            return Err(bad("export name too long"));
        }
        Ok(parsed)
    }

    fn parse_uri(scheme: &str, rest: &str) -> Result<Self, String> {
        let (tls, unix) = match scheme {
            "nbd" | "nbd+tcp" => (false, false),
            "nbds" | "nbds+tcp" => (true, false),
            "nbd+unix" => (false, true),
            "nbds+unix" => (true, true),
            _ => return Err(format!("unknown scheme '{scheme}'")),
        };
        let rest = rest.split('#').next().unwrap_or("");
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let mut socket = None;
        let mut certificates = None;
        for part in query.split(['&', ';']).filter(|p| !p.is_empty()) {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let value = percent_decode(value)?;
            match key {
                "socket" => socket = Some(value),
                "tls-certificates" => certificates = Some(PathBuf::from(value)),
                _ => return Err(format!("unknown parameter '{key}'")),
            }
        }
        let address = if unix {
            if !authority.is_empty() {
                return Err("a Unix socket has no host".to_owned());
            }
            Address::Unix(socket.ok_or("socket=PATH is missing")?.into())
        } else {
            if socket.is_some() {
                return Err("socket= needs nbd+unix://".to_owned());
            }
            let host = authority
                .rsplit_once('@')
                .map_or(authority, |(_, host)| host);
            let (host, port) = host_and_port(host)?;
            Address::Tcp(host, port)
        };
        Ok(Self {
            address,
            export: percent_decode(path)?,
            tls,
            certificates,
        })
    }

    fn parse_legacy(name: &str) -> Result<Self, String> {
        let rest = name.strip_prefix("nbd:").ok_or("expected nbd:")?;
        let (place, export) = match rest.split_once(":exportname=") {
            Some((place, export)) => (place, export),
            None => (rest, ""),
        };
        let address = match place.strip_prefix("unix:") {
            Some(path) if !path.is_empty() => Address::Unix(path.into()),
            Some(_) => return Err("expected a path after nbd:unix:".to_owned()),
            None => {
                let (host, port) = host_and_port(place)?;
                Address::Tcp(host, port)
            }
        };
        Ok(Self {
            address,
            export: export.to_owned(),
            tls: false,
            certificates: None,
        })
    }

    /// The name as a URI.
    pub fn uri(&self) -> String {
        let s = if self.tls { "s" } else { "" };
        let export = percent_encode(&self.export);
        match &self.address {
            Address::Unix(path) => {
                let path = path.to_string_lossy();
                format!("nbd{s}+unix:///{export}?socket={path}")
            }
            Address::Tcp(host, port) => {
                let host = if host.contains(':') {
                    format!("[{host}]")
                } else {
                    host.clone()
                };
                if export.is_empty() {
                    format!("nbd{s}://{host}:{port}")
                } else {
                    format!("nbd{s}://{host}:{port}/{export}")
                }
            }
        }
    }
}

fn host_and_port(text: &str) -> Result<(String, u16), String> {
    let port = |text: &str| match text {
        "" => Ok(DEFAULT_PORT),
        port => port.parse().map_err(|_| format!("bad port '{port}'")),
    };
    if let Some(rest) = text.strip_prefix('[') {
        let (host, rest) = rest.split_once(']').ok_or("a bracket is not closed")?;
        return Ok((host.to_owned(), port(rest.strip_prefix(':').unwrap_or(""))?));
    }
    let (host, after) = text.split_once(':').unwrap_or((text, ""));
    let host = if host.is_empty() { "localhost" } else { host };
    Ok((host.to_owned(), port(after)?))
}

fn percent_decode(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes().iter();
    while let Some(&byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digits = [rest.next(), rest.next()].map(|d| d.map(|d| char::from(*d).to_digit(16)));
        match digits {
            [Some(Some(high)), Some(Some(low))] => {
                bytes.push(u8::try_from(high * 16 + low).unwrap_or(0));
            }
            _ => return Err("a % is not followed by two hexadecimal digits".to_owned()),
        }
    }
    String::from_utf8(bytes).map_err(|_| "it is not UTF-8".to_owned())
}

fn percent_encode(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~/".contains(&b);
    text.bytes()
        .map(|b| {
            if plain(b) {
                char::from(b).to_string()
            } else {
                format!("%{b:02X}")
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_all_kinds() {
        let parse = |text: &str| NbdName::parse(text).unwrap();
        let name = parse("nbd://example.com:123/a%20b");
        assert_eq!(name.address, Address::Tcp("example.com".into(), 123));
        assert_eq!(name.export, "a b");
        assert_eq!(name.uri(), "nbd://example.com:123/a%20b");
        let name = parse("nbds://[::1]/x");
        assert_eq!(name.address, Address::Tcp("::1".into(), DEFAULT_PORT));
        assert!(name.tls);
        let name = parse("nbd+unix:///?socket=/run/x.sock");
        assert_eq!(name.address, Address::Unix("/run/x.sock".into()));
        assert_eq!(name.export, "");
        let name = parse("nbd:unix:/a/b:exportname=c");
        assert_eq!(name.address, Address::Unix("/a/b".into()));
        assert_eq!(name.export, "c");
        let name = parse("nbd:localhost:10810");
        assert_eq!(name.address, Address::Tcp("localhost".into(), 10810));
        for bad in [
            "nbd+unix:///",
            "nbd://h:x/",
            "nbd://h/%zz",
            "nbd+unix://h/?socket=/x",
        ] {
            assert!(NbdName::parse(bad).is_err(), "{bad}");
        }
        assert!(NbdName::is_nbd("nbd+unix:///?socket=x"));
        assert!(!NbdName::is_nbd("./nbd:x") && !NbdName::is_nbd("nbd"));
    }
}
