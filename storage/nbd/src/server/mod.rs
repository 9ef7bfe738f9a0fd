//! The server: exports disks to any number of clients on one executor.

mod export;
mod negotiate;
mod serve;

pub use export::Export;

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use block::executor::{Socket, sleep, spawn_local};
use block::{BlockError, ErrorKind, Result};

use crate::tls::TlsServer;
use crate::transport::{Outbox, Transport};

/// A client that has not chosen an export after this time is cut off.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// What clients are offered.
pub struct Server {
    exports: Vec<Rc<Export>>,
    tls: Option<TlsServer>,
}

/// What one connection has agreed on.
struct Session {
    transport: Rc<Transport>,
    reader: crate::transport::Reader,
    export: Rc<Export>,
    structured: bool,
    extended: bool,
    /// The selected meta contexts, by number.
    contexts: Vec<u32>,
}

impl Server {
    /// A server of `exports`. With `tls`, clients must use it.
    pub fn new(exports: Vec<Rc<Export>>, tls: Option<TlsServer>) -> Rc<Self> {
        Rc::new(Self { exports, tls })
    }

    fn find(&self, name: &str) -> Option<&Rc<Export>> {
        self.exports.iter().find(|export| export.name == name)
    }

    /// Agrees with a client, or cuts it off if it does not come to the point.
    async fn negotiate(&self, socket: Socket) -> Result<Option<Session>> {
        let mut negotiation = pin!(negotiate::negotiate(self, socket));
        let mut limit = pin!(sleep(HANDSHAKE_LIMIT));
        poll_fn(|cx| {
            if let Poll::Ready(session) = negotiation.as_mut().poll(cx) {
                return Poll::Ready(session);
            }
            let late = |_| {
                let message = "NBD: the client did not choose an export in time";
                Err(BlockError::new(ErrorKind::Io, message))
            };
            limit.as_mut().poll(cx).map(late)
        })
        .await
    }

    /// Serves one client to its end.
    ///
    /// # Errors
    ///
    /// If the client broke the rules or the connection failed; other clients are not concerned.
    pub async fn serve(self: &Rc<Self>, socket: Socket) -> Result<()> {
        let Some(session) = self.negotiate(socket).await? else {
            return Ok(());
        };
        let (transport, outbox) = (session.transport.clone(), Outbox::new());
        let writer = {
            let (transport, outbox) = (transport.clone(), outbox.clone());
            spawn_local(async move {
                let result = outbox.run(&transport).await;
                if result.is_err() {
                    // The reader ends with this.
                    transport.shutdown();
                }
                result
            })
        };
        let served = serve::serve(session, outbox.clone()).await;
        outbox.close();
        let written = writer.await;
        transport.close().await;
        served.and(written)
    }
}

/// The number on the wire that stands for an error.
fn wire_error(error: &BlockError) -> u32 {
    use crate::protocol::errors;
    match error.errno() {
        1 | 13 | 30 => errors::EPERM,
        12 => errors::ENOMEM,
        22 => errors::EINVAL,
        28 | 122 | 27 => errors::ENOSPC,
        75 => errors::EOVERFLOW,
        95 => errors::ENOTSUP,
        108 => errors::ESHUTDOWN,
        _ => errors::EIO,
    }
}
