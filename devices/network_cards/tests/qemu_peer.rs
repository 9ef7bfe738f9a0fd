//! Links over sockets, with QEMU at the other end: its user-mode network behind a hub of its own.
//!
//! Needs qemu-system-x86_64; the tests say so and pass as skipped where it is missing.

use std::io::{IoSlice, IoSliceMut};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use network_cards::{
    DgramConfig, DgramNet, LinkState, NetBackend, NetQueue, OffloadHeader, SocketAddress,
    StreamConfig, StreamNet,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// QEMU without a machine, whose user-mode network is connected to `netdev`.
fn qemu(netdev: &str) -> Option<Qemu> {
    let args = format!(
        "-machine none -nodefaults -nographic -netdev user,id=u,restrict=on -netdev {netdev},id=s \
         -netdev hubport,hubid=0,id=a,netdev=u -netdev hubport,hubid=0,id=b,netdev=s"
    );
    let child = Command::new("qemu-system-x86_64")
        .args(args.split_whitespace())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    if child.is_err() {
        eprintln!("skipped: needs qemu-system-x86_64");
    }
    child.ok().map(Qemu)
}

/// Asks for 10.0.2.2 until it answers.
fn resolve(queue: &mut dyn NetQueue, up: impl Fn() -> bool) {
    let own = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
    let mut ask = vec![0xff; 6];
    ask.extend_from_slice(&own);
    ask.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    ask.extend_from_slice(&own);
    ask.extend_from_slice(&[10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2]);
    let end = Instant::now() + Duration::from_secs(20);
    while Instant::now() < end {
        if up() {
            let _ = queue
                .transmit(&OffloadHeader::default(), &[IoSlice::new(&ask)])
                .unwrap();
        }
        let wait = Timespec {
            tv_sec: 0,
            tv_nsec: 200_000_000,
        };
        poll(
            &mut [PollFd::from_borrowed_fd(queue.poll_fd(), PollFlags::IN)],
            Some(&wait),
        )
        .unwrap();
        queue.process().unwrap();
        let mut buffer = [0; 2000];
        while let Some((_, len)) = queue.receive(&mut [IoSliceMut::new(&mut buffer)]).unwrap() {
            let frame = &buffer[..len];
            // An ARP reply, to us, from the gateway.
            if frame[..6] == own && frame[12..14] == [8, 6] && frame[28..32] == [10, 0, 2, 2] {
                return;
            }
        }
    }
    panic!("no answer");
}

fn take(net: &dyn NetBackend) -> Box<dyn NetQueue> {
    net.take_queues(1).unwrap().remove(0)
}

fn unix(path: &Path) -> SocketAddress {
    SocketAddress::Unix(path.to_owned())
}

#[test]
fn qemu_understands_our_stream_as_client_and_as_server() {
    let dir = tempfile::tempdir().unwrap();
    for server in [true, false] {
        let path = dir.path().join(if server { "ours" } else { "theirs" });
        let reconnect = (!server).then(|| Duration::from_millis(50));
        let config = StreamConfig {
            address: unix(&path),
            server,
            reconnect,
        };
        let net = StreamNet::new(config).unwrap();
        let role = if server { "off" } else { "on" };
        let netdev = format!(
            "stream,server={role},addr.type=unix,addr.path={}",
            path.display()
        );
        let Some(_qemu) = qemu(&netdev) else { return };
        resolve(&mut *take(&net), || net.link() == LinkState::Up);
    }
}

#[test]
fn qemu_understands_our_datagrams() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    let net = DgramNet::new(DgramConfig {
        local: unix(&ours),
        remote: unix(&theirs),
    })
    .unwrap();
    let netdev = format!(
        "dgram,local.type=unix,local.path={},remote.type=unix,remote.path={}",
        theirs.display(),
        ours.display()
    );
    let Some(_qemu) = qemu(&netdev) else { return };
    resolve(&mut *take(&net), || true);
}
