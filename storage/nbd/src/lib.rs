//! The NBD protocol: messages, a server and a client.
//!
//! [`protocol`] has the messages, free of I/O. [`server`] exports [`block::Disk`]s to any number of
//! clients on one executor; [`client`] makes an export a [`block::BlockBackend`] and a
//! [`block::Medium`]. Both speak the fixed newstyle handshake, simple, structured and extended replies,
//! and TLS with X.509 certificates.
//!
//! TLS with pre-shared keys, which the protocol leaves to implementations, is not there: rustls has no
//! external pre-shared keys. `EXPORT_NAME` is served and used for old peers; the oldstyle handshake,
//! which the protocol has dropped, is refused.

mod address;
pub mod client;
pub mod protocol;
pub mod server;
mod tls;
mod transport;

pub use address::{Address, DEFAULT_PORT, NbdName, inherited_listener};
pub use tls::{TlsClient, TlsServer};

use block::BlockError;
use protocol::ProtocolError;

impl From<ProtocolError> for BlockError {
    fn from(error: ProtocolError) -> Self {
        Self::new(block::ErrorKind::Io, format!("NBD: {error}"))
    }
}
