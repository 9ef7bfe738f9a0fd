//! What stands behind a guest's serial lines on the host: the terminal, files, sockets, pseudo-terminals.
//!
//! Every backend with input is a [`Stream`]: one thread that waits for its descriptors, moves bytes in both directions and
//! holds at most [`OUTPUT_ROOM`] bytes that the host has not taken yet. [`terminal`] keeps the terminal's settings safe.

mod menu;
mod null;
mod open;
mod stream;
pub mod terminal;

pub use null::Null;
pub use open::{OpenError, file, pty, stdio, tcp_client, tcp_server, unix_client, unix_server};
pub use stream::{OUTPUT_ROOM, Stream};
