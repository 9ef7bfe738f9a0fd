//! The user-mode stack against the host's own kernel as the guest, in network namespaces of the test's own.
//!
//! Needs root, /dev/net/tun and the tools unshare and ip; each test says so and passes as skipped where they are missing.

mod lab;
mod tap_device;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use lab::{Card, Lab};
use network_cards::UserNetConfig;

const TIMEOUT: Option<Duration> = Some(Duration::from_secs(20));

/// Makes a lab or leaves the test.
macro_rules! lab {
    ($config:expr, $card:expr) => {
        match Lab::new($config, $card) {
            Ok(lab) => lab,
            Err(why) => {
                eprintln!("skipped: {why}");
                return;
            }
        }
    };
}

fn has(tool: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(tool).is_file()))
}

/// Bytes that show when they are lost, doubled or out of order.
fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

fn listen(lab: &Lab, addr: &str) -> (TcpListener, u16) {
    let listener = lab.world.run(|| TcpListener::bind(addr)).unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

fn connect(lab: &Lab, addr: &str, port: u16) -> std::io::Result<TcpStream> {
    let addr: SocketAddr = format!("{addr}:{port}").parse().unwrap();
    let stream = lab
        .guest
        .run(|| TcpStream::connect_timeout(&addr, Duration::from_secs(10)))?;
    stream.set_read_timeout(TIMEOUT)?;
    stream.set_write_timeout(TIMEOUT)?;
    Ok(stream)
}

/// Sends `up` and gets `down` over one connection, in both directions at once, and checks both.
fn exchange(near: TcpStream, far: TcpStream, up: usize, down: usize) {
    let send = |mut stream: TcpStream, len: usize| {
        stream.write_all(&pattern(len)).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
    };
    let receive = |mut stream: TcpStream, len: usize| {
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        assert_eq!(got.len(), len);
        assert!(got == pattern(len), "the data is not what was sent");
    };
    for stream in [&near, &far] {
        stream.set_read_timeout(TIMEOUT).unwrap();
        stream.set_write_timeout(TIMEOUT).unwrap();
    }
    let (near2, far2) = (near.try_clone().unwrap(), far.try_clone().unwrap());
    thread::scope(|scope| {
        scope.spawn(move || send(near, up));
        scope.spawn(move || receive(near2, down));
        scope.spawn(move || send(far, down));
        scope.spawn(move || receive(far2, up));
    });
}

#[test]
fn needs_root_dhcp_client_gets_its_settings() {
    let config = UserNetConfig {
        hostname: Some("steel".into()),
        domainname: Some("example.org".into()),
        ..Default::default()
    };
    let lab = lab!(config, Card::Modern);
    if !has("busybox") {
        return eprintln!("skipped: needs busybox's udhcpc");
    }
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("script");
    let text = "#!/bin/sh\n[ \"$1\" = bound ] && echo \"$ip/$mask $router $dns $hostname $domain $lease\"\nexit 0\n";
    std::fs::write(&script, text).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&script, mode).unwrap();
    let run = format!(
        "ip link set tap0 up; busybox udhcpc -i tap0 -n -q -f -t 5 -T 1 -O hostname -s {}",
        script.display()
    );
    let output = lab.guest.shell(&run);
    let want = "10.0.2.15/24 10.0.2.2 10.0.2.3 steel example.org 86400";
    assert!(output.lines().any(|line| line == want), "{output}");
}

#[test]
fn needs_root_tcp_carries_data_both_ways_with_offloads() {
    let lab = lab!(UserNetConfig::default(), Card::Modern);
    lab.configure();
    let (listener, port) = listen(&lab, "127.0.0.1:0");
    let near = connect(&lab, "10.0.2.2", port).unwrap();
    let far = listener.accept().unwrap().0;
    exchange(near, far, 24 << 20, 30 << 20);
}

#[test]
fn needs_root_tcp_carries_data_both_ways_without_offloads() {
    let lab = lab!(UserNetConfig::default(), Card::Plain);
    lab.configure();
    let (listener, port) = listen(&lab, "127.0.0.1:0");
    let near = connect(&lab, "10.0.2.2", port).unwrap();
    let far = listener.accept().unwrap().0;
    exchange(near, far, 6 << 20, 8 << 20);
}

#[test]
fn needs_root_ipv6_works_from_a_router_advertisement() {
    let lab = lab!(UserNetConfig::default(), Card::Modern);
    lab.configure();
    lab.await_ipv6();
    let (listener, port) = listen(&lab, "[::1]:0");
    let near = connect(&lab, "[fec0::2]", port).unwrap();
    let far = listener.accept().unwrap().0;
    exchange(near, far, 5 << 20, 7 << 20);
    let (beyond, port) = listen(&lab, "[2001:db8::1]:0");
    let near = connect(&lab, "[2001:db8::1]", port).unwrap();
    exchange(near, beyond.accept().unwrap().0, 100_000, 100_000);
    let ping = lab
        .guest
        .try_shell("busybox ping -6 -c 2 -W 5 fec0::2 && busybox ping -6 -c 2 -W 5 2001:db8::1");
    assert!(ping.status.success() || !has("busybox"), "{ping:?}");
}

#[test]
fn needs_root_a_hundred_connections_come_and_go() {
    let lab = lab!(UserNetConfig::default(), Card::Modern);
    lab.configure();
    let (listener, port) = listen(&lab, "192.0.2.1:0");
    let server = thread::spawn(move || {
        for n in 0..100u32 {
            let mut stream = listener.accept().unwrap().0;
            stream.set_read_timeout(TIMEOUT).unwrap();
            let mut got = Vec::new();
            stream.read_to_end(&mut got).unwrap();
            assert_eq!(got, n.to_be_bytes());
            stream.write_all(&got).unwrap();
        }
    });
    for n in 0..100u32 {
        let mut stream = connect(&lab, "192.0.2.1", port).unwrap();
        stream.write_all(&n.to_be_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        assert_eq!(got, n.to_be_bytes());
    }
    server.join().unwrap();
}

#[test]
fn needs_root_refused_and_unreachable_are_told_at_once() {
    let lab = lab!(UserNetConfig::default(), Card::Modern);
    lab.configure();
    let (listener, port) = listen(&lab, "127.0.0.1:0");
    drop(listener);
    let refused = connect(&lab, "10.0.2.2", port).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    // The world has no route there, and nothing is at the other address of the link.
    for addr in ["198.51.100.1", "10.0.2.77"] {
        let error = connect(&lab, addr, 80).unwrap_err();
        assert_ne!(
            error.kind(),
            std::io::ErrorKind::TimedOut,
            "{addr}: {error}"
        );
    }
}

#[test]
fn needs_root_resets_pass_in_both_directions() {
    let lab = lab!(UserNetConfig::default(), Card::Modern);
    lab.configure();
    let (listener, port) = listen(&lab, "127.0.0.1:0");
    let reset = |stream: &TcpStream| {
        rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO)).unwrap();
    };
    for guest_resets in [true, false] {
        let near = connect(&lab, "10.0.2.2", port).unwrap();
        let far = listener.accept().unwrap().0;
        far.set_read_timeout(TIMEOUT).unwrap();
        let (killer, mut victim) = if guest_resets {
            (near, far)
        } else {
            (far, near)
        };
        reset(&killer);
        drop(killer);
        let error = victim.read(&mut [0; 10]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
}

#[test]
fn needs_root_a_reader_who_stops_and_goes_on_loses_nothing() {
    let lab = lab!(UserNetConfig::default(), Card::Modern);
    lab.configure();
    let (listener, port) = listen(&lab, "127.0.0.1:0");
    let near = connect(&lab, "10.0.2.2", port).unwrap();
    let far = listener.accept().unwrap().0;
    let data = pattern(20 << 20);
    for (mut from, mut to) in [
        (near.try_clone().unwrap(), far.try_clone().unwrap()),
        (far.try_clone().unwrap(), near.try_clone().unwrap()),
    ] {
        from.set_write_timeout(TIMEOUT).unwrap();
        to.set_read_timeout(TIMEOUT).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| from.write_all(&data).unwrap());
            // Long enough for all buffers to fill and for the window to close.
            thread::sleep(Duration::from_millis(700));
            let mut got = vec![0; data.len()];
            to.read_exact(&mut got).unwrap();
            assert!(got == data);
        });
    }
}

#[test]
fn needs_root_forwarded_ports_lead_to_the_guest() {
    let forwards = [
        "tcp:127.0.0.1:0-:8080",
        "udp:127.0.0.1:0-:9090",
        "tcp:[::1]:0-10.0.2.15:8080",
    ];
    let hostfwd = forwards.iter().map(|f| f.parse().unwrap()).collect();
    let lab = lab!(
        UserNetConfig {
            hostfwd,
            ..Default::default()
        },
        Card::Modern
    );
    lab.configure();
    let listener = lab.guest.run(|| TcpListener::bind("0.0.0.0:8080")).unwrap();
    for forward in [lab.forwards[0], lab.forwards[2]] {
        let near = lab.world.run(|| TcpStream::connect(forward)).unwrap();
        let (far, peer) = listener.accept().unwrap();
        assert_eq!(peer.ip().to_string(), "10.0.2.2");
        exchange(near, far, 1 << 20, 2 << 20);
    }
    let server = lab.guest.run(|| UdpSocket::bind("0.0.0.0:9090")).unwrap();
    let client = lab.world.run(|| UdpSocket::bind("127.0.0.1:0")).unwrap();
    server.set_read_timeout(TIMEOUT).unwrap();
    client.set_read_timeout(TIMEOUT).unwrap();
    let mut buffer = [0; 9000];
    for len in [0, 5, 1472, 1473, 8000] {
        client.send_to(&pattern(len), lab.forwards[1]).unwrap();
        let (got, from) = server.recv_from(&mut buffer).unwrap();
        assert_eq!(
            (&buffer[..got], from.ip().to_string().as_str()),
            (&pattern(len)[..], "10.0.2.2")
        );
        server.send_to(&buffer[..got], from).unwrap();
        let (got, from) = client.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..got], from), (&pattern(len)[..], lab.forwards[1]));
    }
}

#[test]
fn needs_root_a_forwarded_port_of_a_guest_that_is_not_there_closes() {
    let hostfwd = vec!["tcp:127.0.0.1:0-10.0.2.15:8080".parse().unwrap()];
    let lab = lab!(
        UserNetConfig {
            hostfwd,
            ..Default::default()
        },
        Card::Modern
    );
    lab.configure();
    // Nobody listens in the guest, so its kernel resets.
    let mut stream = lab
        .world
        .run(|| TcpStream::connect(lab.forwards[0]))
        .unwrap();
    stream.set_read_timeout(TIMEOUT).unwrap();
    let result = stream.read(&mut [0; 1]);
    assert!(
        matches!(&result, Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset),
        "{result:?}"
    );
}

#[test]
fn needs_root_udp_and_names_find_their_way() {
    let dir = tempfile::tempdir().unwrap();
    let resolv_conf = dir.path().join("resolv.conf");
    std::fs::write(&resolv_conf, "nameserver 127.0.0.53\n").unwrap();
    let lab = lab!(
        UserNetConfig {
            resolv_conf,
            ..Default::default()
        },
        Card::Modern
    );
    lab.configure();
    let echo = |addr: &str| {
        let socket = lab.world.run(|| UdpSocket::bind(addr)).unwrap();
        let port = socket.local_addr().unwrap().port();
        socket.set_read_timeout(TIMEOUT).unwrap();
        thread::spawn(move || {
            let mut buffer = [0; 10_000];
            while let Ok((len, from)) = socket.recv_from(&mut buffer) {
                socket.send_to(&buffer[..len], from).unwrap();
                if len == 4 {
                    break;
                }
            }
        });
        port
    };
    for (server, seen) in [
        ("127.0.0.1:0", "10.0.2.2"),
        ("192.0.2.1:0", "192.0.2.1"),
        ("127.0.0.53:53", "10.0.2.3"),
    ] {
        let addr: SocketAddr = (seen.parse::<std::net::IpAddr>().unwrap(), echo(server)).into();
        let client = lab.guest.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
        client.set_read_timeout(TIMEOUT).unwrap();
        for len in [100, 1472, 3000, 9000, 4] {
            client.send_to(&pattern(len), addr).unwrap();
            let mut buffer = [0; 10_000];
            let (got, from) = client.recv_from(&mut buffer).unwrap();
            assert_eq!(from, addr);
            assert!(buffer[..got] == pattern(len));
        }
    }
}

#[test]
fn needs_root_pings_are_answered_near_and_far() {
    let lab = lab!(UserNetConfig::default(), Card::Modern);
    if !has("busybox") {
        return eprintln!("skipped: needs busybox's ping");
    }
    lab.configure();
    for addr in ["10.0.2.2", "10.0.2.3", "192.0.2.1"] {
        let output = lab
            .guest
            .shell(&format!("busybox ping -c 2 -i 0.2 -s 1000 -W 5 {addr}"));
        assert!(output.contains("2 packets received"), "{output}");
    }
}

#[test]
fn needs_root_a_restricted_guest_reaches_nothing_but_can_be_reached() {
    let hostfwd = vec!["tcp:127.0.0.1:0-:8080".parse().unwrap()];
    let config = UserNetConfig {
        restrict: true,
        hostfwd,
        ..Default::default()
    };
    let lab = lab!(config, Card::Modern);
    lab.configure();
    let (_listener, port) = listen(&lab, "127.0.0.1:0");
    assert!(connect(&lab, "10.0.2.2", port).is_err());
    let listener = lab.guest.run(|| TcpListener::bind("0.0.0.0:8080")).unwrap();
    let near = lab
        .world
        .run(|| TcpStream::connect(lab.forwards[0]))
        .unwrap();
    exchange(near, listener.accept().unwrap().0, 1000, 2000);
}

#[test]
fn needs_root_curl_and_wget_fetch_a_page() {
    let lab = lab!(UserNetConfig::default(), Card::Modern);
    lab.configure();
    let (listener, port) = listen(&lab, "127.0.0.1:0");
    let page = pattern(3 << 20);
    let served = page.clone();
    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let mut request = [0; 4096];
            let _ = stream.read(&mut request);
            let head = format!(
                "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n",
                served.len()
            );
            let _ = stream.write_all(head.as_bytes());
            let _ = stream.write_all(&served);
        }
    });
    let url = format!("http://10.0.2.2:{port}/");
    for (tool, command) in [("curl", "curl -sf -m 20"), ("wget", "wget -q -T 20 -O -")] {
        if !has(tool) {
            eprintln!("skipped: {tool} is not installed");
            continue;
        }
        let output = lab.guest.try_shell(&format!("{command} {url}"));
        assert!(output.status.success() && output.stdout == page, "{tool}");
    }
}

#[test]
fn needs_root_datagrams_that_the_guest_did_not_cut_arrive_cut() {
    let lab = lab!(UserNetConfig::default(), Card::Modern);
    if !has("python3") {
        return eprintln!("skipped: needs python3, for UDP_SEGMENT");
    }
    lab.configure();
    let server = lab.world.run(|| UdpSocket::bind("127.0.0.1:0")).unwrap();
    server.set_read_timeout(TIMEOUT).unwrap();
    let port = server.local_addr().unwrap().port();
    // SOL_UDP and UDP_SEGMENT.
    lab.guest.shell(&format!(
        "python3 -c '
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(17, 103, 1000)
s.sendto(bytes(n // 1000 for n in range(5300)), (\"10.0.2.2\", {port}))'"
    ));
    let mut buffer = [0; 10_000];
    for n in 0..6u8 {
        let len = server.recv(&mut buffer).unwrap();
        assert_eq!(buffer[..len], vec![n; if n == 5 { 300 } else { 1000 }]);
    }
}

/// What passes can be read by tcpdump while it goes on.
#[test]
fn needs_root_a_capture_shows_the_guests_frames() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("net.pcap");
    let lab = match Lab::with_capture(UserNetConfig::default(), Card::Modern, &file) {
        Ok(lab) => lab,
        Err(why) => return eprintln!("skipped: {why}"),
    };
    lab.configure();
    let (listener, port) = listen(&lab, "127.0.0.1:0");
    let near = connect(&lab, "10.0.2.2", port).unwrap();
    exchange(near, listener.accept().unwrap().0, 1000, 100_000);
    let bytes = std::fs::read(&file).unwrap();
    let mut at = 24;
    let mut arp = 0;
    let mut payload = 0;
    while at + 16 <= bytes.len() {
        let kept = u32::from_ne_bytes(bytes[at + 8..at + 12].try_into().unwrap()) as usize;
        let frame = &bytes[at + 16..at + 16 + kept];
        arp += usize::from(frame[12..14] == [8, 6]);
        let from_host = frame[12..14] == [8, 0] && frame[23] == 6 && frame[26..30] == [10, 0, 2, 2];
        payload += if from_host {
            frame.len().saturating_sub(54)
        } else {
            0
        };
        at += 16 + kept;
    }
    assert_eq!(at, bytes.len());
    // The SYN's options count as well.
    assert!(
        arp >= 2 && (100_000..100_100).contains(&payload),
        "{arp} {payload}"
    );
}
