//! TLS with X.509 certificates, from folders laid out as QEMU's and libvirt's tools lay them out.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::executor::Socket;
use block::sync::RangeLocks;
use block::{BlockError, IoBuf, Result};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection,
};
use std::cell::RefCell;

/// Larger than the largest TLS record.
const RECORD: usize = 18 << 10;
/// Plain text that is turned into records at once.
const PIECE: usize = 256 << 10;

/// A server's credentials.
#[derive(Clone)]
pub struct TlsServer(Arc<ServerConfig>);

/// A client's credentials.
#[derive(Clone)]
pub struct TlsClient {
    config: Arc<ClientConfig>,
    host: Option<String>,
}

fn refused(what: &str, path: &Path, why: impl std::fmt::Display) -> BlockError {
    BlockError::invalid_argument(format!("cannot use {what} '{}': {why}", path.display()))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let failed = |e| refused("the certificates in", path, e);
    let found = CertificateDer::pem_file_iter(path).map_err(failed)?;
    found.collect::<Result<_, _>>().map_err(failed)
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_file(path).map_err(|e| refused("the key in", path, e))
}

fn authorities(directory: &Path) -> Result<RootCertStore> {
    let path = directory.join("ca-cert.pem");
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&path)? {
        roots
            .add(certificate)
            .map_err(|e| refused("the authority in", &path, e))?;
    }
    Ok(roots)
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

impl TlsServer {
    /// Reads `server-cert.pem` and `server-key.pem` of a folder; with `verify_peer` also `ca-cert.pem`
    /// (and `ca-crl.pem` if it is there), and then takes only clients with a certificate that it signed.
    ///
    /// # Errors
    ///
    /// One line that names the file.
    pub fn load(directory: &Path, verify_peer: bool) -> Result<Self> {
        let chain = certificates(&directory.join("server-cert.pem"))?;
        let key_path = directory.join("server-key.pem");
        let builder = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|e| refused("TLS with", directory, e))?;
        let builder = if verify_peer {
            let roots = Arc::new(authorities(directory)?);
            let mut verifier = WebPkiClientVerifier::builder_with_provider(roots, provider());
            let revoked = directory.join("ca-crl.pem");
            if revoked.exists() {
                let list = CertificateRevocationListDer::from_pem_file(&revoked)
                    .map_err(|e| refused("the revocations in", &revoked, e))?;
                verifier = verifier.with_crls([list]);
            }
            let verifier = verifier
                .build()
                .map_err(|e| refused("the authority of", directory, e))?;
            builder.with_client_cert_verifier(verifier)
        } else {
            builder.with_no_client_auth()
        };
        let config = builder
            .with_single_cert(chain, key(&key_path)?)
            .map_err(|e| refused("the key in", &key_path, e))?;
        Ok(Self(Arc::new(config)))
    }
}

impl TlsClient {
    /// Reads `ca-cert.pem` of a folder, and `client-cert.pem` with `client-key.pem` if they are there.
    /// The server's certificate must be for the host that is connected to, or for `host`.
    ///
    /// # Errors
    ///
    /// One line that names the file.
    pub fn load(directory: &Path, host: Option<String>) -> Result<Self> {
        let builder = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|e| refused("TLS with", directory, e))?
            .with_root_certificates(authorities(directory)?);
        let own = directory.join("client-cert.pem");
        let config = if own.exists() {
            let key_path = directory.join("client-key.pem");
            builder
                .with_client_auth_cert(certificates(&own)?, key(&key_path)?)
                .map_err(|e| refused("the key in", &key_path, e))?
        } else {
            builder.with_no_client_auth()
        };
        Ok(Self {
            config: Arc::new(config),
            host,
        })
    }

    /// The credentials in the first folder that libnbd's programs look at too.
    ///
    /// # Errors
    ///
    /// If there are none.
    pub fn load_default() -> Result<Self> {
        let home = std::env::var_os("HOME")
            .map(PathBuf::from)
            .unwrap_or_default();
        let folders = [
            home.join(".pki/libnbd"),
            home.join(".config/pki/libnbd"),
            PathBuf::from("/etc/pki/libnbd"),
        ];
        match folders.iter().find(|f| f.join("ca-cert.pem").exists()) {
            Some(folder) => Self::load(folder, None),
            None => Err(BlockError::invalid_argument(
                "TLS needs certificates: name their folder with tls-certificates=DIR",
            )),
        }
    }
}

/// A connection under TLS. One task may read while another writes.
pub(crate) struct TlsStream {
    socket: Socket,
    state: RefCell<Connection>,
    received: IoBuf,
    /// Keeps records in the order in which they were made.
    sending: RangeLocks,
}

fn broken(why: impl std::fmt::Display) -> BlockError {
    BlockError::new(block::ErrorKind::Io, format!("TLS: {why}"))
}

impl TlsStream {
    /// Makes `socket` a server's end.
    pub(crate) async fn accept(socket: Socket, credentials: &TlsServer) -> Result<Self> {
        let server = ServerConnection::new(credentials.0.clone()).map_err(broken)?;
        Self::start(socket, server.into()).await
    }

    /// Makes `socket` a client's end, for the server `host`.
    pub(crate) async fn connect(
        socket: Socket,
        credentials: &TlsClient,
        host: &str,
    ) -> Result<Self> {
        let host = credentials.host.as_deref().unwrap_or(host).to_owned();
        let name = ServerName::try_from(host.clone())
            .map_err(|_| broken(format!("'{host}' is no host name")))?;
        let client = ClientConnection::new(credentials.config.clone(), name).map_err(broken)?;
        Self::start(socket, client.into()).await
    }

    async fn start(socket: Socket, state: Connection) -> Result<Self> {
        let stream = Self {
            socket,
            state: RefCell::new(state),
            received: IoBuf::zeroed(RECORD),
            sending: RangeLocks::default(),
        };
        stream.state.borrow_mut().set_buffer_limit(None);
        loop {
            stream.send_records().await?;
            if !stream.state.borrow().is_handshaking() {
                return Ok(stream);
            }
            if !stream.receive_records().await? {
                return Err(broken("the peer ended the connection during the handshake"));
            }
        }
    }

    async fn send_records(&self) -> Result<()> {
        let _order = self.sending.lock(0, 1).await;
        let mut records = Vec::new();
        {
            let mut state = self.state.borrow_mut();
            while state.wants_write() {
                state.write_tls(&mut records).map_err(broken)?;
            }
        }
        if records.is_empty() {
            return Ok(());
        }
        self.socket.write_all(IoBuf::from_slice(&records)).await
    }

    /// Takes in what the peer sent; false at the end of the stream.
    async fn receive_records(&self) -> Result<bool> {
        let count = self.socket.read(self.received.clone()).await?;
        let mut bytes = vec![0; count];
        self.received.copy_to(&mut bytes);
        let mut rest = &bytes[..];
        let mut failure = None;
        {
            let mut state = self.state.borrow_mut();
            loop {
                // Without bytes this tells the state that the stream has ended.
                state.read_tls(&mut rest).map_err(broken)?;
                if let Err(error) = state.process_new_packets() {
                    failure = Some(error);
                    break;
                }
                if rest.is_empty() {
                    break;
                }
            }
        }
        // Alerts and key updates.
        let sent = self.send_records().await;
        match failure {
            Some(error) => Err(broken(error)),
            None => sent.map(|()| count > 0),
        }
    }

    pub(crate) async fn read(&self, buf: IoBuf) -> Result<usize> {
        let mut plain = vec![0; buf.len().min(64 << 10)];
        loop {
            let read = self.state.borrow_mut().reader().read(&mut plain);
            match read {
                Ok(count) => {
                    buf.copy_from(&plain[..count]);
                    return Ok(count);
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(broken(e)),
            }
            self.receive_records().await?;
        }
    }

    pub(crate) async fn write_all(&self, buf: IoBuf) -> Result<()> {
        for start in (0..buf.len()).step_by(PIECE) {
            let plain = buf.slice(start, PIECE.min(buf.len() - start)).to_vec();
            self.state
                .borrow_mut()
                .writer()
                .write_all(&plain)
                .map_err(broken)?;
            self.send_records().await?;
        }
        Ok(())
    }

    /// Says goodbye.
    pub(crate) async fn close(&self) {
        self.state.borrow_mut().send_close_notify();
        // The peer may have gone already.
        let _ = self.send_records().await;
    }

    pub(crate) fn shutdown(&self) {
        self.socket.shutdown();
    }
}
