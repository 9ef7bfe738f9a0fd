//! A connection against a simple TCP of the test's own, over a link that loses, doubles and reorders, in simulated time.

use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::connection::{Connection, Limits, Phase, Readiness};
use super::ring::Budget;
use super::segment::{Flags, Segment, before};
use crate::user::timers::Millis;

/// Numbers that look random (xorshift64*).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % sides.max(1)
    }

    fn percent(&mut self, chance: u8) -> bool {
        self.roll(100) < usize::from(chance)
    }
}

fn pattern(len: usize, salt: u8) -> Vec<u8> {
    (0..len as u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8 ^ salt)
        .collect()
}

/// The guest's TCP: go-back-N in both directions.
struct Guest {
    data: Vec<u8>,
    iss: u32,
    una: u32,
    nxt: u32,
    /// The right edge of the window that the stack offered.
    edge: u32,
    synchronized: bool,
    rcv_nxt: u32,
    got: Vec<u8>,
    /// Not read by the guest's program yet.
    unread: usize,
    buffer: usize,
    /// The right edge of the largest window that was ever offered to the stack.
    offered: u32,
    scale: u8,
    host_fin: bool,
    ack_due: bool,
    quiet_since: Millis,
}

impl Guest {
    fn window(&self) -> u16 {
        ((self.buffer - self.unread) >> self.scale).min(0xffff) as u16
    }

    fn end(&self) -> u32 {
        self.iss
            .wrapping_add(1)
            .wrapping_add(self.data.len() as u32)
    }

    fn done(&self) -> bool {
        self.una == self.end().wrapping_add(1) && self.host_fin
    }

    fn segment(&mut self, seq: u32, flags: Flags, len: usize) -> Segment {
        self.ack_due = false;
        let window = self.window();
        let edge = self.rcv_nxt.wrapping_add(u32::from(window) << self.scale);
        if self.synchronized && before(self.offered, edge) {
            self.offered = edge;
        }
        Segment {
            seq,
            ack: self.rcv_nxt,
            flags,
            window,
            header_len: 20,
            payload_len: len,
            ..Default::default()
        }
    }

    /// What the guest sends now.
    fn speak(&mut self, dice: &mut Dice, now: Millis) -> Option<(Segment, Vec<u8>)> {
        if !self.synchronized {
            return None;
        }
        if now - self.quiet_since > 300 && self.una != self.nxt {
            self.nxt = self.una;
            self.quiet_since = now;
        }
        let room = self.edge.wrapping_sub(self.nxt) as i32;
        let left = self.end().wrapping_sub(self.nxt) as i32;
        if left > 0 && room > 0 {
            let len = (1 + dice.roll(3000)).min(left as usize).min(room as usize);
            let at = self.data.len() - left as usize;
            let bytes = self.data[at..at + len].to_vec();
            let mut flags = Flags::ACK;
            // FIN with the last bytes, sometimes.
            let fin = left as usize == len && dice.percent(50);
            flags.set(Flags::FIN, fin);
            let segment = self.segment(self.nxt, flags, len);
            self.nxt = self.nxt.wrapping_add(len as u32).wrapping_add(fin.into());
            return Some((segment, bytes));
        }
        if left == 0 {
            let segment = self.segment(self.nxt, Flags::ACK | Flags::FIN, 0);
            self.nxt = self.nxt.wrapping_add(1);
            return Some((segment, Vec::new()));
        }
        self.ack_due
            .then(|| (self.segment(self.nxt, Flags::ACK, 0), Vec::new()))
    }

    fn hear(&mut self, segment: &Segment, bytes: &[u8], now: Millis) {
        assert!(!segment.flags.contains(Flags::RST), "reset");
        if segment.flags.contains(Flags::SYN) {
            if !self.synchronized {
                self.rcv_nxt = segment.seq.wrapping_add(1);
                // The window of a SYN is not scaled.
                self.offered = self.rcv_nxt.wrapping_add(self.buffer.min(0xffff) as u32);
                self.una = self.iss.wrapping_add(1);
                self.nxt = self.una;
                self.edge = segment.ack.wrapping_add(segment.window.into());
                self.synchronized = true;
            }
            self.ack_due = true;
            return;
        }
        // Scaled, and never taken back.
        let edge = segment.ack.wrapping_add(u32::from(segment.window) << 7);
        if before(self.edge, edge) {
            self.edge = edge;
        }
        if before(self.una, segment.ack) {
            assert!(
                !before(self.end().wrapping_add(1), segment.ack),
                "acknowledged too much"
            );
            self.una = segment.ack;
            if before(self.nxt, self.una) {
                self.nxt = self.una;
            }
            self.quiet_since = now;
        }
        let old = before(segment.seq, self.rcv_nxt);
        if segment.payload_len > 0 || segment.flags.contains(Flags::FIN) || old {
            self.ack_due = true;
        }
        let behind = self.rcv_nxt.wrapping_sub(segment.seq);
        if before(self.rcv_nxt, segment.seq) || behind > segment.payload_len as u32 {
            return;
        }
        let edge = self.offered.wrapping_sub(segment.seq) as usize;
        assert!(segment.payload_len <= edge, "more than was offered");
        let new = &bytes[behind as usize..];
        let took = new.len().min(self.buffer - self.unread);
        self.got.extend_from_slice(&new[..took]);
        self.unread += took;
        self.rcv_nxt = self.rcv_nxt.wrapping_add(took as u32);
        if took == new.len() && segment.flags.contains(Flags::FIN) && !self.host_fin {
            self.rcv_nxt = self.rcv_nxt.wrapping_add(1);
            self.host_fin = true;
        }
    }
}

/// One direction of the link.
#[derive(Default)]
struct Lane {
    frames: VecDeque<(Segment, Vec<u8>)>,
}

impl Lane {
    fn put(&mut self, dice: &mut Dice, trouble: &Trouble, frame: (Segment, Vec<u8>)) {
        if dice.percent(trouble.loss) {
            return;
        }
        if dice.percent(trouble.doubling) {
            self.frames.push_back(frame.clone());
        }
        self.frames.push_back(frame);
    }

    fn take(&mut self, dice: &mut Dice, trouble: &Trouble) -> Option<(Segment, Vec<u8>)> {
        if dice.percent(trouble.reordering) && !self.frames.is_empty() {
            let at = dice.roll(self.frames.len());
            return self.frames.remove(at);
        }
        self.frames.pop_front()
    }
}

#[derive(Debug, Clone)]
struct Trouble {
    loss: u8,
    doubling: u8,
    reordering: u8,
}

#[derive(Debug, Clone)]
struct Plan {
    seed: u64,
    up: usize,
    down: usize,
    trouble: Trouble,
    buffer: usize,
    scale: Option<u8>,
    mss: u16,
    segmentation: bool,
    iss: u32,
    guest_reads: u8,
    host_reads: u8,
    from_host: bool,
}

fn plans() -> impl Strategy<Value = Plan> {
    let trouble = prop_oneof![
        Just(Trouble {
            loss: 0,
            doubling: 0,
            reordering: 0
        }),
        (0u8..20, 0u8..10, 0u8..30).prop_map(|(loss, doubling, reordering)| Trouble {
            loss,
            doubling,
            reordering
        }),
    ];
    let sizes = (0usize..300_000, 0usize..300_000, 500usize..200_000);
    let card = (
        prop::option::of(0u8..9),
        88u16..9000,
        any::<bool>(),
        any::<bool>(),
    );
    let pace = (20u8..100, 20u8..100);
    (
        any::<u64>(),
        sizes,
        trouble,
        card,
        prop_oneof![any::<u32>(), Just(u32::MAX - 5000)],
        pace,
    )
        .prop_map(
            |(
                seed,
                (up, down, buffer),
                trouble,
                (scale, mss, segmentation, from_host),
                iss,
                pace,
            )| Plan {
                seed: seed | 1,
                up,
                down,
                trouble,
                buffer,
                scale,
                mss,
                segmentation,
                iss,
                guest_reads: pace.0,
                host_reads: pace.1,
                from_host,
            },
        )
}

/// The host's program at the other end of the socket.
struct Program {
    stream: Option<UnixStream>,
    data: Vec<u8>,
    sent: usize,
    shut: bool,
    got: Vec<u8>,
    eof: bool,
}

impl Program {
    /// Reads and writes some. Answers whether anything moved.
    fn run(&mut self, dice: &mut Dice, plan: &Plan) -> bool {
        let Some(stream) = &mut self.stream else {
            return false;
        };
        let mut moved = false;
        if dice.percent(plan.host_reads) && !self.eof {
            let mut buffer = vec![0; 1 + dice.roll(40_000)];
            match stream.read(&mut buffer) {
                Ok(0) => (self.eof, moved) = (true, true),
                Ok(n) => {
                    self.got.extend_from_slice(&buffer[..n]);
                    moved = true;
                }
                Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
            }
        }
        if self.sent < self.data.len() {
            let end = (self.sent + 1 + dice.roll(40_000)).min(self.data.len());
            match stream.write(&self.data[self.sent..end]) {
                Ok(n) => (self.sent, moved) = (self.sent + n, true),
                Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
            }
        } else if !self.shut {
            stream.shutdown(Shutdown::Write).unwrap();
            (self.shut, moved) = (true, true);
        }
        moved
    }
}

struct World {
    plan: Plan,
    dice: Dice,
    now: Millis,
    connection: Connection,
    guest: Guest,
    program: Program,
    to_guest: Lane,
    to_stack: Lane,
}

const SYN: Segment = Segment {
    src_port: 0,
    dst_port: 0,
    seq: 0,
    ack: 0,
    flags: Flags::SYN,
    window: 0,
    mss: None,
    window_scale: None,
    header_len: 20,
    payload_len: 0,
};

impl World {
    fn new(plan: &Plan) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let guest = Guest {
            data: pattern(plan.up, 0x55),
            iss: plan.iss,
            una: plan.iss,
            nxt: plan.iss,
            edge: plan.iss,
            synchronized: false,
            rcv_nxt: 0,
            got: Vec::new(),
            unread: 0,
            buffer: plan.buffer,
            offered: 0,
            scale: plan.scale.unwrap_or(0),
            host_fin: false,
            ack_due: false,
            quiet_since: 0,
        };
        let key = (
            "10.0.2.15:1000".parse().unwrap(),
            "10.0.2.2:80".parse().unwrap(),
        );
        let budget = Budget::new(16 << 20);
        let iss = plan.iss.wrapping_mul(3);
        let connection = if plan.from_host {
            Connection::from_host(key, Some([2; 6]), ours.into(), (iss, &budget), 0)
        } else {
            let syn = Self::syn(plan);
            let ends = (iss, &budget);
            let mut connection = Connection::from_guest(key, [2; 6], &syn, ours.into(), ends, 0);
            connection.connected();
            connection
        };
        let program = Program {
            stream: Some(theirs),
            data: pattern(plan.down, 0xaa),
            sent: 0,
            shut: false,
            got: Vec::new(),
            eof: false,
        };
        Self {
            plan: plan.clone(),
            dice: Dice(plan.seed),
            now: 0,
            connection,
            guest,
            program,
            to_guest: Lane::default(),
            to_stack: Lane::default(),
        }
    }

    fn syn(plan: &Plan) -> Segment {
        // With scaling both ways, as the guest's model reads windows that way.
        let scale = Some(plan.scale.unwrap_or(0));
        let window = plan.buffer.min(0xffff) as u16;
        Segment {
            seq: plan.iss,
            window,
            mss: Some(plan.mss),
            window_scale: scale,
            ..SYN
        }
    }

    /// One small step of everything. Answers whether anything happened.
    fn step(&mut self) -> bool {
        let mut moved = self.program.run(&mut self.dice, &self.plan);
        let all = Readiness {
            readable: true,
            writable: true,
            hang_up: true,
        };
        self.connection.on_socket(all, self.now);
        let limits = Limits {
            payload: 200 + self.dice.roll(65_000),
            segmentation: self.plan.segmentation,
        };
        if self.connection.has_output()
            && let Some(out) = self.connection.next_segment(&limits, self.now)
        {
            let most = if limits.segmentation {
                limits.payload
            } else {
                self.plan.mss.into()
            };
            assert!(out.segment.payload_len <= most.min(limits.payload));
            let bytes = self.connection.data(&out).concat();
            assert_eq!(bytes.len(), out.segment.payload_len);
            self.to_guest
                .put(&mut self.dice, &self.plan.trouble, (out.segment, bytes));
            moved = true;
        }
        if let Some((segment, bytes)) = self.to_guest.take(&mut self.dice, &self.plan.trouble) {
            moved = true;
            let answers_syn = segment.flags.contains(Flags::SYN) && self.plan.from_host;
            self.guest.hear(&segment, &bytes, self.now);
            if answers_syn {
                let flags = Flags::SYN | Flags::ACK;
                let syn = Segment {
                    flags,
                    ack: self.guest.rcv_nxt,
                    ..Self::syn(&self.plan)
                };
                self.to_stack
                    .put(&mut self.dice, &self.plan.trouble, (syn, Vec::new()));
            }
        }
        if self.dice.percent(self.plan.guest_reads) && self.guest.unread > 0 {
            let was = self.guest.window();
            let n = 1 + self.dice.roll(self.guest.unread);
            self.guest.unread -= n;
            self.guest.ack_due |= was == 0 || n > self.guest.buffer / 4;
            moved = true;
        }
        if let Some(frame) = self.guest.speak(&mut self.dice, self.now) {
            self.to_stack.put(&mut self.dice, &self.plan.trouble, frame);
            moved = true;
        }
        if let Some((segment, bytes)) = self.to_stack.take(&mut self.dice, &self.plan.trouble) {
            // In two pieces, as frames come.
            let cut = self.dice.roll(bytes.len() + 1);
            let parts = [IoSlice::new(&bytes[..cut]), IoSlice::new(&bytes[cut..])];
            self.connection.on_segment(&segment, &parts, 0, self.now);
            moved = true;
        }
        moved
    }

    fn run(&mut self) {
        let end = self.now + 3_600_000;
        for step in 0..1_000_000 {
            self.now += u64::from(step % 32 == 0);
            let finished = matches!(self.connection.phase(), Phase::TimeWait | Phase::Dead);
            if finished && self.guest.done() && self.program.eof {
                return;
            }
            if !self.step() {
                self.now += 20;
            }
            if self.connection.deadline().is_some_and(|at| at <= self.now) {
                self.connection.on_timer(self.now);
            }
            assert!(self.now < end, "it takes for ever");
        }
        panic!("it takes too many steps: {:?}", self.connection);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_iters: 0, ..Default::default() })]

    #[test]
    fn all_bytes_arrive_in_order_over_a_bad_link(plan in plans()) {
        let mut world = World::new(&plan);
        world.run();
        prop_assert!(world.guest.got == world.program.data, "{} of {} bytes down", world.guest.got.len(), plan.down);
        prop_assert!(world.program.got == world.guest.data, "{} of {} bytes up", world.program.got.len(), plan.up);
    }
}

fn quiet_plan() -> Plan {
    Plan {
        seed: 9,
        up: 10,
        down: 1000,
        trouble: Trouble {
            loss: 0,
            doubling: 0,
            reordering: 0,
        },
        buffer: 4000,
        scale: Some(0),
        mss: 1460,
        segmentation: true,
        iss: 1,
        guest_reads: 100,
        host_reads: 100,
        from_host: false,
    }
}

#[test]
fn a_guest_that_says_nothing_is_given_up_and_the_host_is_told() {
    let mut world = World::new(&quiet_plan());
    let limits = Limits {
        payload: 60_000,
        segmentation: true,
    };
    for _ in 0..1000 {
        world.now += 30_000;
        if world
            .connection
            .deadline()
            .is_some_and(|at| at <= world.now)
        {
            world.connection.on_timer(world.now);
        }
        while world.connection.next_segment(&limits, world.now).is_some() {}
    }
    assert_eq!(world.connection.phase(), Phase::Dead);
    let mut stream = world.program.stream.take().unwrap();
    assert!(matches!(stream.read(&mut [0; 1]), Ok(0) | Err(_)));
}

#[test]
fn a_guest_that_fetches_nothing_is_waited_for() {
    let mut world = World::new(&quiet_plan());
    for _ in 0..1000 {
        world.now += 30_000;
        if world
            .connection
            .deadline()
            .is_some_and(|at| at <= world.now)
        {
            world.connection.on_timer(world.now);
        }
    }
    assert_eq!(world.connection.phase(), Phase::SynReceived);
    world.run();
    assert_eq!(world.guest.got.len(), 1000);
}

#[test]
fn wild_numbers_do_no_harm() {
    let mut dice = Dice(77);
    let limits = Limits {
        payload: 60_000,
        segmentation: true,
    };
    for seed in 1..200 {
        let mut world = World::new(&Plan {
            seed,
            down: 50_000,
            ..quiet_plan()
        });
        for _ in 0..20 {
            world.step();
        }
        for _ in 0..200 {
            let near = |dice: &mut Dice, base: u32| match dice.roll(3) {
                0 => base,
                1 => base
                    .wrapping_add(dice.roll(100_000) as u32)
                    .wrapping_sub(50_000),
                _ => dice.roll(usize::MAX) as u32,
            };
            let len = dice.roll(70_000);
            let segment = Segment {
                seq: near(&mut dice, world.guest.nxt),
                ack: near(&mut dice, world.guest.rcv_nxt),
                flags: Flags::from_bits_truncate(dice.roll(256) as u8 | 0x10) - Flags::RST,
                window: dice.roll(0x1_0000) as u16,
                window_scale: Some(14),
                mss: Some(dice.roll(0x1_0000) as u16),
                header_len: 20,
                payload_len: len,
                ..Default::default()
            };
            // The frame may be shorter than its header says.
            let bytes = vec![1; if dice.percent(90) { len } else { len / 2 }];
            world.now += dice.roll(10_000) as u64;
            world
                .connection
                .on_segment(&segment, &[IoSlice::new(&bytes)], 0, world.now);
            world.connection.on_socket(
                Readiness {
                    readable: true,
                    ..Default::default()
                },
                world.now,
            );
            if world
                .connection
                .deadline()
                .is_some_and(|at| at <= world.now)
            {
                world.connection.on_timer(world.now);
            }
            if let Some(out) = world.connection.next_segment(&limits, world.now) {
                let bytes = world.connection.data(&out).concat();
                assert_eq!(bytes.len(), out.segment.payload_len);
            }
        }
    }
}
