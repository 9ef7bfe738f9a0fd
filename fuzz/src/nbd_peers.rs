//! Hostile peers of the NBD server and client: the input is everything that the peer ever sends.

use std::os::unix::net::UnixStream;
use std::rc::Rc;

use block::executor::{Socket, spawn_local};
use block::{BlockBackend, Disk, DiskOptions, ExtentQuery, IoBuf, MemoryMedium, RawBackend, Scope};
use nbd::NbdName;
use nbd::client::NbdDisk;
use nbd::server::{Export, Server};

/// The end of a connection whose peer sends `data`, then nothing more, and takes whatever comes.
fn scripted(data: Vec<u8>) -> Socket {
    let (near, far) = UnixStream::pair().expect("a pair of sockets");
    let closing = far.try_clone().expect("a descriptor");
    let far = Rc::new(Socket::new(far.into()).expect("an executor"));
    let sender = far.clone();
    spawn_local(async move {
        // The other end may hang up in the middle.
        let _ = sender.write_all(IoBuf::from_slice(&data)).await;
        let _ = closing.shutdown(std::net::Shutdown::Write);
    });
    spawn_local(async move {
        let buf = IoBuf::zeroed(4096);
        while far.read(buf.clone()).await.is_ok_and(|n| n > 0) {}
    });
    Socket::new(near.into()).expect("an executor")
}

/// A client's bytes against the server.
pub async fn server(data: Vec<u8>) {
    let medium = Rc::new(MemoryMedium::new(1 << 16).with_limit(1 << 16));
    let backend = RawBackend::open(medium).await.expect("a raw disk");
    let disk = Rc::new(Disk::new(Rc::new(backend), DiskOptions::default()));
    let export = Export::new("", disk, 0, true).expect("an export");
    let server = Server::new(vec![Rc::new(export.with_allocation_depth())], None);
    let _ = server.serve(scripted(data)).await;
}

/// A server's bytes against the client.
pub async fn client(data: Vec<u8>) {
    let name = NbdName::parse("nbd+unix:///x?socket=/x").expect("a name");
    let Ok(disk) = NbdDisk::over(scripted(data), &name, true).await else {
        return;
    };
    let _ = disk.read(0, IoBuf::zeroed(512)).await;
    let query = ExtentQuery {
        offset: 0,
        length: disk.limits().size.clamp(512, 1 << 20),
        scope: Scope::Chain,
        limit: 100,
    };
    let _ = disk.extents(query).await;
    let _ = disk.write(0, IoBuf::zeroed(512)).await;
    let _ = disk.close().await;
}
