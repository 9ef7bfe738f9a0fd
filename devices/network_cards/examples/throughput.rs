//! How fast TCP goes through the user-mode stack, with the host's kernel as the guest behind a tap device; beside it QEMU's
//! user-mode network on the same tap device, if QEMU is installed. Needs root. Figures are for one connection.
//!
//! `cargo run --release -p network_cards --example throughput [SECONDS]`

#[path = "../tests/kernel_peer/lab.rs"]
mod lab;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use lab::{Card, Lab};
use network_cards::UserNetConfig;

/// What one run gave.
struct Figures {
    /// Of payload.
    megabytes_per_second: f64,
    /// Of the thread or process that is the network, by second.
    cpu: f64,
}

impl Figures {
    fn print(&self, name: &str) {
        let rate = self.megabytes_per_second;
        println!(
            "{name:<44} {rate:>8.0} MB/s {:>6.1} Gbit/s {:>5.0} % CPU {:>8.0} MB per CPU second",
            rate * 8.0 / 1000.0,
            self.cpu * 100.0,
            rate / self.cpu.max(0.001),
        );
    }
}

/// CPU time of a task, user and system, in seconds; the clock ticks a hundred times a second.
fn cpu_seconds(stat: &str) -> f64 {
    let text = std::fs::read_to_string(stat).unwrap_or_default();
    let after_name = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    let ticks = |n: usize| {
        fields
            .get(n)
            .and_then(|f| f.parse::<f64>().ok())
            .unwrap_or(0.0)
    };
    (ticks(11) + ticks(12)) / 100.0
}

fn measure(near: TcpStream, far: TcpStream, up: bool, time: Duration, stat: &str) -> Figures {
    let (mut from, mut to) = if up { (near, far) } else { (far, near) };
    let sender = thread::spawn(move || {
        let block = vec![7u8; 256 << 10];
        while from.write_all(&block).is_ok() {}
    });
    let mut block = vec![0u8; 256 << 10];
    // Let windows open first.
    let warm = Instant::now();
    while warm.elapsed() < Duration::from_millis(200) {
        let _ = to.read(&mut block);
    }
    let (start, cpu) = (Instant::now(), cpu_seconds(stat));
    let mut bytes = 0;
    while start.elapsed() < time {
        bytes += to.read(&mut block).unwrap_or(0);
    }
    let (seconds, cpu) = (start.elapsed().as_secs_f64(), cpu_seconds(stat) - cpu);
    drop(to);
    let _ = sender.join();
    Figures {
        megabytes_per_second: bytes as f64 / 1e6 / seconds,
        cpu: cpu / seconds,
    }
}

fn both_ways(lab: &Lab, name: &str, time: Duration, stat: &str) {
    let listener = lab.world.run(|| TcpListener::bind("127.0.0.1:0")).unwrap();
    let port = listener.local_addr().unwrap().port();
    for up in [true, false] {
        let connect = || TcpStream::connect(("10.0.2.2", port));
        let near = lab.guest.run(connect).unwrap();
        let far = listener.accept().unwrap().0;
        let way = if up { "from the guest" } else { "to the guest" };
        measure(near, far, up, time, stat).print(&format!("{name}, {way}"));
    }
}

/// Round trips of one byte, in microseconds.
fn latency(lab: &Lab, name: &str) {
    let listener = lab.world.run(|| TcpListener::bind("127.0.0.1:0")).unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut near = lab
        .guest
        .run(|| TcpStream::connect(("10.0.2.2", port)))
        .unwrap();
    let mut far = listener.accept().unwrap().0;
    near.set_nodelay(true).unwrap();
    far.set_nodelay(true).unwrap();
    thread::spawn(move || {
        let mut byte = [0];
        while far.read_exact(&mut byte).is_ok() && far.write_all(&byte).is_ok() {}
    });
    let rounds = 5000;
    let start = Instant::now();
    let mut byte = [1];
    for _ in 0..rounds {
        near.write_all(&byte).unwrap();
        near.read_exact(&mut byte).unwrap();
    }
    let micros = start.elapsed().as_secs_f64() * 1e6 / f64::from(rounds);
    println!("{name:<44} {micros:>8.1} µs for a round trip of one byte");
}

/// QEMU without a machine: its user-mode network and our tap device on a hub.
fn qemu(lab: &Lab) -> Option<Child> {
    let args = "-machine none -nodefaults -nographic -netdev user,id=u -netdev tap,id=t,ifname=tap1,script=no,downscript=no,vnet_hdr=off \
                -netdev hubport,hubid=0,id=a,netdev=u -netdev hubport,hubid=0,id=b,netdev=t";
    // It must have the tap device of one namespace and the sockets of the other, so the device moves.
    let child = lab.world.run(|| {
        Command::new("qemu-system-x86_64")
            .args(args.split_whitespace())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
    });
    let child = child.ok()?;
    let end = Instant::now() + Duration::from_secs(5);
    while Instant::now() < end {
        if lab.world.try_shell("ip link show tap1").status.success() {
            lab.adopt("tap1");
            lab.guest.shell(
                "ip link set tap0 down; ip addr flush dev tap0
                 ip link set tap1 up; ip addr add 10.0.2.15/24 dev tap1; ip route add default via 10.0.2.2",
            );
            return Some(child);
        }
        thread::sleep(Duration::from_millis(50));
    }
    None
}

fn main() {
    let seconds = std::env::args()
        .nth(1)
        .and_then(|s| s.parse().ok())
        .unwrap_or(3);
    let time = Duration::from_secs(seconds);
    for (card, name) in [
        (Card::Modern, "with offloads"),
        (Card::Plain, "without offloads"),
    ] {
        let lab = match Lab::new(UserNetConfig::default(), card) {
            Ok(lab) => lab,
            Err(why) => return eprintln!("{why}"),
        };
        lab.configure();
        both_ways(&lab, name, time, &lab.pump_stat());
        latency(&lab, name);
        if let Card::Plain = card
            && let Some(mut child) = qemu(&lab)
        {
            let name = "QEMU's user-mode network";
            both_ways(&lab, name, time, &format!("/proc/{}/stat", child.id()));
            latency(&lab, name);
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
