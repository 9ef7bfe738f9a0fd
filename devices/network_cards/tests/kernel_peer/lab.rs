//! Two network namespaces: in one the "guest", which is the host's own kernel behind a tap device; in the other the
//! user-mode stack and the servers that the guest talks to.
#![allow(dead_code)] // Shared by programs that use different parts of it.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use network_cards::offload::MAX_FRAME;
use network_cards::{
    CaptureConfig, Captured, NetBackend, NetQueue, OffloadHeader, Offloads, Tap, TapConfig,
    Transmit, UserNet, UserNetConfig,
};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// A network namespace, kept alive by a sleeping process in it.
pub(crate) struct Namespace {
    keeper: Child,
    file: File,
}

impl Namespace {
    /// Makes a namespace for work with tap devices, or says why that is not possible here.
    pub(crate) fn for_test() -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("needs root".into());
        }
        if !Path::new("/dev/net/tun").exists() {
            return Err("needs /dev/net/tun".into());
        }
        Self::new().ok_or_else(|| "needs network namespaces (unshare)".into())
    }

    fn new() -> Option<Self> {
        let mut keeper = Command::new("unshare")
            .args(["--net", "--", "sleep", "300"])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let own = std::fs::read_link("/proc/self/ns/net").ok()?;
        let path = format!("/proc/{}/ns/net", keeper.id());
        let end = Instant::now() + Duration::from_secs(10);
        while Instant::now() < end {
            match std::fs::read_link(&path) {
                Ok(other) if other != own => {
                    return File::open(&path).ok().map(|file| Self { keeper, file });
                }
                _ if keeper.try_wait().is_ok_and(|status| status.is_some()) => return None,
                _ => thread::sleep(Duration::from_millis(2)),
            }
        }
        let _ = keeper.kill();
        let _ = keeper.wait();
        None
    }

    /// Runs something in the namespace, on a thread of its own.
    pub(crate) fn run<T: Send>(&self, what: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = || {
                self.enter();
                what()
            };
            scope.spawn(inside).join().unwrap()
        })
    }

    fn enter(&self) {
        move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
    }

    /// Starts a thread in the namespace.
    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        what: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let file = self.file.try_clone().unwrap();
        thread::spawn(move || {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            what()
        })
    }

    /// Runs a shell script in the namespace and gives its output; it must succeed.
    pub(crate) fn shell(&self, script: &str) -> String {
        let output = self.try_shell(script);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{script}\n{text}{errors}");
        text
    }

    /// Runs a shell script in the namespace.
    pub(crate) fn try_shell(&self, script: &str) -> std::process::Output {
        let run = || {
            Command::new("sh")
                .args(["-c", script])
                .stdin(Stdio::null())
                .output()
        };
        self.run(run).unwrap()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}

/// Guest, stack and world.
pub(crate) struct Lab {
    /// Where the guest's kernel has its interface `tap0`.
    pub(crate) guest: Namespace,
    /// Where the stack has its sockets; `192.0.2.1` and `2001:db8::1` are hosts in it.
    pub(crate) world: Namespace,
    /// The forwarded ports.
    pub(crate) forwards: Vec<SocketAddr>,
    stop: Arc<AtomicBool>,
    wake: Arc<rustix::fd::OwnedFd>,
    pump: Option<JoinHandle<()>>,
    pump_thread: u32,
}

/// What a lab's guest can take and may leave undone.
#[derive(Clone, Copy)]
pub(crate) enum Card {
    /// Everything.
    Modern,
    /// Nothing, like the cards of old.
    Plain,
}

impl Lab {
    /// Makes a lab, or says why that is not possible here.
    pub(crate) fn new(config: UserNetConfig, card: Card) -> Result<Self, String> {
        Self::make(config, card, None)
    }

    /// Makes a lab that records what passes.
    pub(crate) fn with_capture(
        config: UserNetConfig,
        card: Card,
        file: &Path,
    ) -> Result<Self, String> {
        Self::make(config, card, Some(file))
    }

    fn make(config: UserNetConfig, card: Card, file: Option<&Path>) -> Result<Self, String> {
        let (guest, world) = (Namespace::for_test()?, Namespace::for_test()?);
        world.shell(
            "ip link set lo up; ip addr add 192.0.2.1/32 dev lo; ip addr add 2001:db8::1/128 dev lo
             echo '0 2147483647' >/proc/sys/net/ipv4/ping_group_range",
        );
        let tap = guest
            .run(|| {
                Tap::open(&TapConfig {
                    ifname: "tap0".into(),
                    queues: 1,
                })
            })
            .unwrap();
        let net = world.run(|| UserNet::new(config)).unwrap();
        let forwards = net.forwarded_ports().to_vec();
        let net: Arc<dyn NetBackend> = match file {
            Some(file) => {
                Arc::new(Captured::new(Arc::new(net), &CaptureConfig::new(file)).unwrap())
            }
            None => Arc::new(net),
        };
        match card {
            Card::Modern => {
                tap.set_offloads(net.transmit_offloads() & tap.receive_offloads())
                    .unwrap();
                net.set_offloads(net.receive_offloads() & tap.transmit_offloads())
                    .unwrap();
            }
            Card::Plain => {
                tap.set_offloads(Offloads::empty()).unwrap();
                guest.shell("ethtool -K tap0 tx off tso off gso off gro off 2>/dev/null || true");
            }
        }
        let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap());
        let stop = Arc::new(AtomicBool::new(false));
        let (tell, told) = std::sync::mpsc::channel();
        let pump = {
            let (wake, stop) = (wake.clone(), stop.clone());
            world.spawn(move || {
                let _ = tell.send(rustix::thread::gettid().as_raw_nonzero().get() as u32);
                let mut card = tap.take_queues(1).unwrap().remove(0);
                let mut link = net.take_queues(1).unwrap().remove(0);
                let mut buffer = vec![0u8; MAX_FRAME];
                while !stop.load(Ordering::Relaxed) {
                    pump_once(&mut *card, &mut *link, &wake, &mut buffer);
                }
            })
        };
        let pump_thread = told.recv().unwrap();
        Ok(Self {
            guest,
            world,
            forwards,
            stop,
            wake,
            pump: Some(pump),
            pump_thread,
        })
    }

    /// The file that tells the CPU time of the thread that the stack runs on.
    pub(crate) fn pump_stat(&self) -> String {
        format!("/proc/self/task/{}/stat", self.pump_thread)
    }

    /// Moves an interface of the world to the guest.
    pub(crate) fn adopt(&self, name: &str) {
        self.world.shell(&format!(
            "ip link set {name} netns {}",
            self.guest.keeper.id()
        ));
    }

    /// Gives the guest its addresses without DHCP, IPv6 without waiting for duplicates.
    pub(crate) fn configure(&self) {
        self.guest.shell(
            "ip link set lo up
             echo 0 >/proc/sys/net/ipv6/conf/tap0/accept_dad
             ip link set tap0 up
             ip addr add 10.0.2.15/24 dev tap0; ip route add default via 10.0.2.2",
        );
    }

    /// Waits until the guest has made itself an address from a router advertisement.
    pub(crate) fn await_ipv6(&self) -> String {
        let end = Instant::now() + Duration::from_secs(20);
        while Instant::now() < end {
            let text = self.guest.shell("ip -6 -o addr show dev tap0 scope site");
            if text.contains("fec0::") && !text.contains("tentative") {
                return text;
            }
            thread::sleep(Duration::from_millis(50));
        }
        panic!(
            "no IPv6 address: {}",
            self.guest.shell("ip -6 addr; ip -6 route")
        );
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        if let Some(pump) = self.pump.take() {
            let _ = pump.join();
        }
    }
}

fn flags(queue: &dyn NetQueue, has_room: bool) -> PollFlags {
    let interest = queue.interest(has_room);
    let mut flags = PollFlags::empty();
    flags.set(PollFlags::IN, interest.readable);
    flags.set(PollFlags::OUT, interest.writable);
    flags
}

/// One pass of a card's loop, where the guest's rings are a tap device.
fn pump_once(
    card: &mut dyn NetQueue,
    link: &mut dyn NetQueue,
    wake: &rustix::fd::OwnedFd,
    buffer: &mut [u8],
) {
    let mut fds = [
        PollFd::from_borrowed_fd(card.poll_fd(), flags(card, true)),
        PollFd::from_borrowed_fd(link.poll_fd(), flags(link, true)),
        PollFd::new(wake, PollFlags::IN),
    ];
    poll(&mut fds, None).unwrap();
    let link_ready = !fds[1].revents().is_empty();
    if link_ready {
        link.process().unwrap();
    }
    for _ in 0..64 {
        let Some((header, len)) = card.receive(&mut [IoSliceMut::new(buffer)]).unwrap() else {
            break;
        };
        send(link, &header, &buffer[..len]);
    }
    while let Some((header, len)) = link.receive(&mut [IoSliceMut::new(buffer)]).unwrap() {
        send(card, &header, &buffer[..len]);
    }
}

fn send(to: &mut dyn NetQueue, header: &OffloadHeader, frame: &[u8]) {
    while to.transmit(header, &[IoSlice::new(frame)]).unwrap() == Transmit::WouldBlock {
        thread::sleep(Duration::from_micros(50));
    }
}
