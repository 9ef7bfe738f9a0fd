//! The socket device (section 5.10): streams between programs in the guest and programs on the host.
//!
//! On the host's side there is a Unix socket, used as other virtual machine monitors have established:
//!
//! * From the host: connect to the socket, send `CONNECT 52\n`; after the answer `OK 1073741824\n` the connection is one to port
//!   52 of the guest.
//! * From the guest: a connection to port 52 of the host (context ID 2) is one to the Unix socket with `_52` behind its name.
//!
//! One thread, `virtio-vsock`, serves all connections. Credit in both directions keeps what waits bounded: 256 KiB for each
//! connection on our side.

mod connection;
mod packet;
pub mod spec;
mod switch;
#[cfg(test)]
mod tests;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::device::{Activation, ActiveQueue, DeviceEvents, VirtioDevice, read_space};
use crate::spec::DeviceType;
use crate::worker::Worker;
use spec::{F_STREAM, FIRST_GUEST_CID};
use switch::Switch;

const QUEUE_SIZE: u16 = 128;

/// Why a socket device can't be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// A context ID that a guest can't have.
    #[error("a guest's context ID is a number from 3 to 4294967294, not {0}")]
    Cid(u64),
    /// The Unix socket can't be made.
    #[error("can't listen on {}", path.display())]
    Listen {
        /// Its name.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The host gives no thread.
    #[error("can't start the virtio socket device's thread")]
    Thread(#[source] io::Error),
}

/// The socket device.
pub struct Vsock {
    // Configuration.
    guest_cid: u64,
    path: PathBuf,
    // Runtime.
    worker: Worker<Switch>,
    events: Option<Arc<dyn DeviceEvents>>,
}

impl Vsock {
    /// A socket device. Makes the Unix socket `path`, which must not be there, and removes it at the end.
    ///
    /// # Errors
    /// For a context ID that can't be, or a socket that can't be made.
    pub fn new(guest_cid: u64, path: &Path) -> Result<Self, VsockError> {
        // The specification reserves the upper half of the number and its largest value.
        if !(FIRST_GUEST_CID..u64::from(u32::MAX)).contains(&guest_cid) {
            return Err(VsockError::Cid(guest_cid));
        }
        let listen = || {
            let listener = UnixListener::bind(path)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let listener = listen().map_err(|source| VsockError::Listen {
            path: path.to_owned(),
            source,
        })?;
        let switch = Switch::new(guest_cid, path.to_owned(), listener);
        let worker = Worker::start("virtio-vsock", switch).map_err(VsockError::Thread)?;
        Ok(Self {
            guest_cid,
            path: path.to_owned(),
            worker,
            events: None,
        })
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        // Somebody may have removed it already.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> DeviceType {
        DeviceType::Vsock
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 3]
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn accepts(&self, _: u64) -> bool {
        true
    }

    fn connect(&mut self, events: Arc<dyn DeviceEvents>) {
        self.events = Some(events);
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_space(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn write_config(&mut self, _: usize, _: &[u8]) {}

    fn activate(&mut self, activation: Activation) {
        for queue in activation.queues {
            self.start_queue(queue);
        }
    }

    fn start_queue(&mut self, queue: ActiveQueue) {
        self.worker.call(move |switch| switch.start(queue));
    }

    fn stop_queue(&mut self, index: u16) {
        self.worker.call(move |switch| switch.stop(index));
    }

    fn reset(&mut self) {
        self.worker.call(Switch::reset);
    }
}
