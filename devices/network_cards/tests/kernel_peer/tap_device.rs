//! Opening tap devices, and what is said when that is not possible.

use std::io::{IoSlice, IoSliceMut};

use network_cards::offload::MAX_FRAME;
use network_cards::{NetBackend, NetQueue, OffloadHeader, Offloads, Tap, TapConfig, Transmit};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::lab::Namespace;

/// Makes a namespace or leaves the test.
macro_rules! namespace {
    () => {
        match Namespace::for_test() {
            Ok(namespace) => namespace,
            Err(why) => {
                eprintln!("skipped: {why}");
                return;
            }
        }
    };
}

fn open(space: &Namespace, ifname: &str, queues: u16) -> Result<Tap, String> {
    let config = TapConfig {
        ifname: ifname.into(),
        queues,
    };
    space.run(|| Tap::open(&config)).map_err(|e| {
        let line = e.to_string();
        assert_eq!(line.lines().count(), 1);
        line
    })
}

/// Frames that wait on a queue; waits a while for the first.
fn drain(queue: &mut dyn NetQueue) -> usize {
    let mut buffer = vec![0; MAX_FRAME];
    let mut fds = [PollFd::from_borrowed_fd(queue.poll_fd(), PollFlags::IN)];
    let wait = Timespec {
        tv_sec: 0,
        tv_nsec: 300_000_000,
    };
    poll(&mut fds, Some(&wait)).unwrap();
    let mut count = 0;
    while queue
        .receive(&mut [IoSliceMut::new(&mut buffer)])
        .unwrap()
        .is_some()
    {
        count += 1;
    }
    count
}

#[test]
fn needs_root_what_is_wrong_with_a_tap_device_is_told_in_a_line() {
    let space = namespace!();
    let wrong = |name: &str, queues| open(&space, name, queues).unwrap_err();
    assert!(wrong("", 1).starts_with("ifname=: "));
    assert!(wrong("a name that is far too long", 1).starts_with("ifname="));
    assert!(wrong("a/b", 1).starts_with("ifname=a/b: "));
    assert_eq!(wrong("lo", 1), "interface lo is not a tap device");
    assert!(wrong("tap0", 0).starts_with("queues=0: "));
    let tap = open(&space, "tap0", 1).unwrap();
    assert_eq!(tap.name(), "tap0");
    assert_eq!(
        wrong("tap0", 1),
        "interface tap0 is in use by another program"
    );
    drop(tap);
    space.shell("ip tuntap add tap1 mode tap");
    let one_queue = "interface tap1 is not a tap device that was made with multi_queue";
    assert_eq!(wrong("tap1", 2), one_queue);
    assert!(open(&space, "tap1", 1).is_ok());
    space.shell("ip tuntap add tap2 mode tap multi_queue");
    assert!(open(&space, "tap2", 1).is_ok());
    assert!(open(&space, "tap2", 3).is_ok());
}

#[test]
fn needs_root_missing_permission_is_told_in_a_line() {
    let space = namespace!();
    space.shell("ip tuntap add tap1 mode tap user 12345");
    let tell = |name: &str| {
        let config = TapConfig {
            ifname: name.into(),
            queues: 1,
        };
        space.run(|| {
            let none = rustix::thread::CapabilitySet::empty();
            let sets = rustix::thread::CapabilitySets {
                effective: none,
                permitted: none,
                inheritable: none,
            };
            rustix::thread::set_capabilities(None, sets).unwrap();
            Tap::open(&config).unwrap_err().to_string()
        })
    };
    assert!(tell("tap9").starts_with("there is no interface tap9, and making one needs"));
    assert!(tell("tap1").starts_with("interface tap1 belongs to another user"));
}

#[test]
fn needs_root_queues_can_be_taken_out_of_use() {
    let space = namespace!();
    let tap = open(&space, "tap0", 2).unwrap();
    assert_eq!(tap.max_queue_pairs(), 2);
    assert!(tap.take_queues(3).is_err());
    let mut queues = tap.take_queues(2).unwrap();
    assert!(tap.take_queues(2).is_err());
    space.shell(
        "echo 1 >/proc/sys/net/ipv6/conf/tap0/disable_ipv6
         ip link set tap0 up; ip addr add 10.9.9.1/24 dev tap0; ip neigh add 10.9.9.2 lladdr 02:00:00:00:00:02 dev tap0",
    );
    let send = || {
        space.run(|| {
            for _ in 0..64 {
                let socket = std::net::UdpSocket::bind("10.9.9.1:0").unwrap();
                socket.send_to(b"x", "10.9.9.2:9").unwrap();
            }
        });
    };
    send();
    let [first, second] = &mut queues[..] else {
        panic!("two queues")
    };
    let counts = (drain(&mut **first), drain(&mut **second));
    assert_eq!(counts.0 + counts.1, 64, "{counts:?}");
    tap.set_active_queues(1).unwrap();
    send();
    assert_eq!(drain(&mut **first), 64);
    tap.set_active_queues(2).unwrap();
    tap.set_active_queues(2).unwrap();
    assert!(tap.set_active_queues(3).is_err());
    send();
    assert_eq!(drain(&mut **first) + drain(&mut **second), 64);
}

#[test]
fn needs_root_long_and_broken_frames_do_no_harm() {
    let space = namespace!();
    let tap = open(&space, "tap0", 1).unwrap();
    assert!(
        tap.receive_offloads()
            .contains(Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6)
    );
    let mut queue = tap.take_queues(1).unwrap().remove(0);
    let frame = vec![0u8; 2000];
    // The interface is down: frames are lost.
    let mut send = |header: OffloadHeader, len: usize| {
        queue
            .transmit(&header, &[IoSlice::new(&frame[..len])])
            .unwrap()
    };
    assert_eq!(send(OffloadHeader::default(), 60), Transmit::Accepted);
    space.shell("ip link set tap0 up; ip addr add 10.9.9.1/24 dev tap0");
    for bytes in [
        [1, 0, 0, 0, 0, 0, 255, 255, 255, 255],
        [1, 1, 255, 255, 1, 0, 9, 0, 9, 0],
        [0xff; 10],
    ] {
        let header = OffloadHeader::decode(&bytes).unwrap_or_default();
        for len in [0, 1, 13, 14, 60, 2000] {
            assert_eq!(send(header, len), Transmit::Accepted);
        }
    }
    // A frame that is longer than the guest's buffers is dropped whole.
    while drain(&mut *queue) > 0 {}
    space.shell("ip neigh add 10.9.9.2 lladdr 02:00:00:00:00:02 dev tap0");
    space.run(|| {
        let socket = std::net::UdpSocket::bind("10.9.9.1:0").unwrap();
        socket.send_to(&[7; 1000], "10.9.9.2:9").unwrap();
        socket.send_to(&[7; 20], "10.9.9.2:9").unwrap();
    });
    let mut small = [0; 500];
    let mut lens = Vec::new();
    while let Some((_, len)) = queue.receive(&mut [IoSliceMut::new(&mut small)]).unwrap() {
        lens.push(len);
    }
    assert!(
        lens.contains(&62) && lens.iter().all(|len| *len < 500),
        "{lens:?}"
    );
}

#[test]
fn needs_root_an_interface_that_goes_away_is_an_error() {
    let space = namespace!();
    let tap = open(&space, "tap0", 1).unwrap();
    let mut queue = tap.take_queues(1).unwrap().remove(0);
    space.shell("ip link del tap0");
    let error = queue
        .receive(&mut [IoSliceMut::new(&mut [0; 2000])])
        .unwrap_err();
    assert_eq!(error.to_string(), "interface tap0 is gone");
}
