//! The 8254 interval timer, and port 61h that gates its speaker channel.
//!
//! Intel 8254 datasheet (document 231164); port 61h: ICH9 datasheet, section 13.7.1.

use std::sync::Arc;

use device_model::{Device, IoBus, IoError, IoHandler, IoRegion, IrqLine, ResetKind, Widths};
use guest_clock::{GuestClock, Timer};
use parking_lot::Mutex;

/// Ports and bits.
pub mod spec {
    /// First port: three counters and the control word.
    pub const PORT: u64 = 0x40;
    /// The system control port with the speaker's gate.
    pub const NMI_SC_PORT: u64 = 0x61;
    /// NMI_SC: gate of counter 2.
    pub const TIM_CNT2_EN: u8 = 1 << 0;
    /// NMI_SC: speaker data.
    pub const SPKR_DAT_EN: u8 = 1 << 1;
    /// NMI_SC: what can be written.
    pub const NMI_SC_WRITABLE: u8 = 0x0f;
    /// NMI_SC: toggles with each memory refresh.
    pub const REF_TOGGLE: u8 = 1 << 4;
    /// NMI_SC: output of counter 2.
    pub const TMR2_OUT: u8 = 1 << 5;
    /// Frequency of the counters' clock, in Hz.
    pub const FREQUENCY: u64 = 1_193_182;
    /// Nanoseconds between memory refreshes.
    pub const REFRESH: u64 = 15_085;
}
use spec::*;

const NANOSECONDS: u64 = 1_000_000_000;
/// The shortest time between two interrupts, in nanoseconds: more of them would only keep the host busy.
const SHORTEST_PERIOD: u64 = 20_000;

fn ticks(nanoseconds: u64) -> u64 {
    (u128::from(nanoseconds) * u128::from(FREQUENCY) / u128::from(NANOSECONDS)) as u64
}

/// The first nanosecond at which `count` ticks have passed.
fn nanoseconds(count: u64) -> u64 {
    let exact = (u128::from(count) * u128::from(NANOSECONDS)).div_ceil(u128::from(FREQUENCY));
    u64::try_from(exact).unwrap_or(u64::MAX)
}

/// Which bytes of the count are read or written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    Low,
    High,
    Both,
}

/// Volatile guest state of a counter.
#[derive(Debug, Clone)]
struct Counter {
    mode: u8,
    bcd: bool,
    access: Access,
    /// Counts to go from; 1 to 65536.
    count: u32,
    /// A count has been written since the control word.
    loaded: bool,
    /// Guest time of loading or, in the modes that wait for it, of the gate's edge.
    start: u64,
    gate: bool,
    triggered: bool,
    /// A first byte of two that has been written.
    half_written: Option<u8>,
    /// The next read gives the high byte.
    half_read: bool,
    latched: Option<u16>,
    latched_status: Option<u8>,
}

impl Counter {
    fn new(gate: bool) -> Self {
        Self {
            mode: 0,
            bcd: false,
            access: Access::Both,
            count: 0x1_0000,
            loaded: false,
            start: 0,
            gate,
            triggered: false,
            half_written: None,
            half_read: false,
            latched: None,
            latched_status: None,
        }
    }

    fn waits_for_trigger(&self) -> bool {
        matches!(self.mode, 1 | 5) && !self.triggered
    }

    /// True in the modes that start over by themselves.
    fn periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    fn elapsed(&self, now: u64) -> u64 {
        ticks(now.saturating_sub(self.start))
    }

    /// The level of OUT.
    fn output(&self, now: u64) -> bool {
        if !self.loaded || self.waits_for_trigger() {
            return self.mode != 0;
        }
        let count = u64::from(self.count);
        let passed = self.elapsed(now);
        match self.mode {
            0 => self.gate && passed >= count,
            1 => passed >= count,
            2 => !self.gate || passed % count != count - 1,
            3 => !self.gate || passed % count < count.div_ceil(2),
            _ => passed != count,
        }
    }

    /// The counting element's value.
    fn value(&self, now: u64) -> u16 {
        if !self.loaded || self.waits_for_trigger() || (!self.gate && !matches!(self.mode, 1 | 5)) {
            return self.encode(self.count);
        }
        let count = u64::from(self.count);
        let passed = self.elapsed(now);
        let left = match self.mode {
            2 => count - passed % count,
            // Mode 3 counts by twos, through the count once for each half of the wave.
            3 => {
                let even = count & !1;
                even.max(2) - (2 * (passed % count)) % even.max(2)
            }
            _ => {
                let modulus: u64 = if self.bcd { 10_000 } else { 0x1_0000 };
                (count + modulus - passed % modulus) % modulus
            }
        };
        self.encode(left as u32)
    }

    fn encode(&self, value: u32) -> u16 {
        if !self.bcd {
            return value as u16;
        }
        let mut rest = value % 10_000;
        let mut digits = 0;
        for shift in [0, 4, 8, 12] {
            digits |= (rest % 10) << shift;
            rest /= 10;
        }
        digits as u16
    }

    fn decode(&self, value: u16) -> u32 {
        let plain = if self.bcd {
            [12, 8, 4, 0]
                .iter()
                .fold(0, |n, shift| n * 10 + u32::from(value >> shift & 15))
        } else {
            u32::from(value)
        };
        match (plain, self.bcd) {
            (0, false) => 0x1_0000,
            (0, true) => 10_000,
            (n, _) => n,
        }
    }

    fn load(&mut self, value: u16, now: u64) {
        // A count of 1 is not legal in the periodic modes and would make them divide by nothing.
        let least = if self.periodic() { 2 } else { 1 };
        self.count = self.decode(value).max(least);
        self.loaded = true;
        self.start = now;
        self.triggered = false;
    }

    fn set_gate(&mut self, gate: bool, now: u64) {
        if gate && !self.gate {
            match self.mode {
                1 | 5 => {
                    self.start = now;
                    self.triggered = true;
                }
                // Counting starts over in the periodic modes, and goes on (which it has not begun) in the others.
                _ => self.start = now,
            }
        }
        self.gate = gate;
    }

    fn write_control(&mut self, value: u8, access: Access) {
        *self = Self {
            access,
            // Modes 6 and 7 are 2 and 3.
            mode: match value >> 1 & 7 {
                mode @ 6.. => mode - 4,
                mode => mode,
            },
            bcd: value & 1 != 0,
            ..Self::new(self.gate)
        };
    }

    fn status(&self, now: u64) -> u8 {
        let access = match self.access {
            Access::Low => 1,
            Access::High => 2,
            Access::Both => 3,
        };
        u8::from(self.output(now)) << 7
            | u8::from(!self.loaded) << 6
            | access << 4
            | self.mode << 1
            | u8::from(self.bcd)
    }

    fn write_count(&mut self, byte: u8, now: u64) {
        match (self.access, self.half_written.take()) {
            (Access::Low, _) => self.load(u16::from(byte), now),
            (Access::High, _) => self.load(u16::from(byte) << 8, now),
            (Access::Both, Some(low)) => self.load(u16::from_le_bytes([low, byte]), now),
            (Access::Both, None) => {
                self.half_written = Some(byte);
                // In mode 0 the first byte stops the counter.
                if self.mode == 0 {
                    self.loaded = false;
                }
            }
        }
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self
            .latched
            .unwrap_or_else(|| self.value(now))
            .to_le_bytes();
        match self.access {
            Access::Low => {
                self.latched = None;
                low
            }
            Access::High => {
                self.latched = None;
                high
            }
            Access::Both if self.half_read => {
                self.half_read = false;
                self.latched = None;
                high
            }
            Access::Both => {
                self.half_read = true;
                low
            }
        }
    }

    fn latch(&mut self, now: u64) {
        if self.latched.is_none() {
            self.latched = Some(self.value(now));
        }
    }

    /// The next rising edge of OUT after `now`.
    fn next_rise(&self, now: u64) -> Option<u64> {
        if !self.loaded || self.waits_for_trigger() || !self.gate {
            return None;
        }
        let count = u64::from(self.count);
        let passed = self.elapsed(now);
        let at = match self.mode {
            2 | 3 => (passed / count + 1) * count,
            0 | 1 if passed < count => count,
            4 | 5 if passed <= count => count + 1,
            _ => return None,
        };
        let at = self.start.saturating_add(nanoseconds(at));
        let too_short = self.periodic() && nanoseconds(count) < SHORTEST_PERIOD;
        Some(if too_short {
            at.max(now.saturating_add(SHORTEST_PERIOD))
        } else {
            at
        })
    }
}

struct State {
    counters: [Counter; 3],
    /// The writable bits of port 61h.
    control: u8,
    /// HPET has taken the interrupt over.
    replaced: bool,
}

impl State {
    fn new() -> Self {
        Self {
            counters: [Counter::new(true), Counter::new(true), Counter::new(false)],
            control: 0,
            replaced: false,
        }
    }
}

/// The interval timer with port 61h.
pub struct Pit {
    clock: GuestClock,
    irq: IrqLine,
    timer: Timer,
    state: Mutex<State>,
}

impl Pit {
    /// The timer in its reset state. `irq` is ISA interrupt 0.
    pub fn new(clock: GuestClock, irq: IrqLine) -> Arc<Self> {
        Arc::new_cyclic(|pit: &std::sync::Weak<Self>| {
            let pit = pit.clone();
            Self {
                timer: clock.timer(move || {
                    if let Some(pit) = pit.upgrade() {
                        pit.rise();
                    }
                }),
                clock,
                irq,
                state: Mutex::new(State::new()),
            }
        })
    }

    /// Claims the ports 40h to 43h and 61h.
    ///
    /// # Errors
    /// When something else is there.
    pub fn attach(self: &Arc<Self>, ports: &IoBus) -> Result<Vec<IoRegion>, IoError> {
        Ok(vec![
            ports.add(PORT, 4, "pit", self.clone())?,
            ports.add(
                NMI_SC_PORT,
                1,
                "system control port B",
                Arc::new(ControlPort(self.clone())),
            )?,
        ])
    }

    /// HPET's legacy replacement takes the interrupt away, or gives it back.
    pub fn set_replaced(&self, replaced: bool) {
        let mut state = self.state.lock();
        state.replaced = replaced;
        self.sync(&state);
    }

    /// Drives the interrupt output and arms the timer for the next edge.
    fn sync(&self, state: &State) {
        let now = self.clock.now();
        let counter = &state.counters[0];
        // In the periodic modes the low pulse comes right before the edge: see `rise`.
        let high = counter.periodic() && counter.loaded || counter.output(now);
        self.irq.set(high && !state.replaced);
        match counter.next_rise(now).filter(|_| !state.replaced) {
            Some(at) => self.timer.arm(at),
            None => self.timer.disarm(),
        }
    }

    /// The timer has expired: OUT of counter 0 rises.
    fn rise(&self) {
        let state = self.state.lock();
        let counter = &state.counters[0];
        if counter.loaded && !state.replaced && (counter.periodic() || counter.mode >= 4) {
            self.irq.set(false);
        }
        self.sync(&state);
    }

    fn write_control_word(&self, state: &mut State, value: u8, now: u64) {
        let access = match value >> 4 & 3 {
            0 => None,
            1 => Some(Access::Low),
            2 => Some(Access::High),
            _ => Some(Access::Both),
        };
        let select = usize::from(value >> 6);
        if select == 3 {
            for (n, counter) in state.counters.iter_mut().enumerate() {
                if value & 2 << n == 0 {
                    continue;
                }
                if value & 0x20 == 0 {
                    counter.latch(now);
                }
                if value & 0x10 == 0 && counter.latched_status.is_none() {
                    counter.latched_status = Some(counter.status(now));
                }
            }
            return;
        }
        match access {
            None => state.counters[select].latch(now),
            Some(access) => state.counters[select].write_control(value, access),
        }
    }
}

impl IoHandler for Pit {
    fn widths(&self) -> Widths {
        Widths::BYTE
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.state.lock();
        let value = match state.counters.get_mut(offset as usize) {
            Some(counter) => counter.read(self.clock.now()),
            None => 0xff, // the control word can't be read
        };
        data.fill(value);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let [value] = data else { return };
        let mut state = self.state.lock();
        let now = self.clock.now();
        match state.counters.get_mut(offset as usize) {
            Some(counter) => counter.write_count(*value, now),
            None => self.write_control_word(&mut state, *value, now),
        }
        self.sync(&state);
    }
}

impl Device for Pit {
    fn name(&self) -> String {
        "pit".into()
    }

    fn reset(&self, _kind: ResetKind) {
        let mut state = self.state.lock();
        *state = State::new();
        self.sync(&state);
    }
}

/// Port 61h.
struct ControlPort(Arc<Pit>);

impl IoHandler for ControlPort {
    fn widths(&self) -> Widths {
        Widths::BYTE
    }

    fn read(&self, _offset: u64, data: &mut [u8]) {
        let state = self.0.state.lock();
        let now = self.0.clock.now();
        let mut value = state.control;
        if !(now / REFRESH).is_multiple_of(2) {
            value |= REF_TOGGLE;
        }
        if state.counters[2].output(now) {
            value |= TMR2_OUT;
        }
        data.fill(value);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let [value] = data else { return };
        let mut state = self.0.state.lock();
        state.control = value & NMI_SC_WRITABLE;
        let now = self.0.clock.now();
        state.counters[2].set_gate(value & TIM_CNT2_EN != 0, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Line, smoke};

    struct Bench {
        clock: GuestClock,
        ports: IoBus,
        line: Line,
        pit: Arc<Pit>,
        _regions: Vec<IoRegion>,
    }

    fn bench() -> Bench {
        let clock = GuestClock::new();
        let line = Line::new();
        let pit = Pit::new(clock.clone(), line.line());
        let ports = IoBus::ports();
        Bench {
            _regions: pit.attach(&ports).unwrap(),
            clock,
            ports,
            line,
            pit,
        }
    }

    impl Bench {
        fn put(&self, port: u64, value: u8) {
            self.ports.write(port, &[value]);
        }
        fn get(&self, port: u64) -> u8 {
            let mut data = [0];
            self.ports.read(port, &mut data);
            data[0]
        }
        fn at_ticks(&self, n: u64) {
            self.clock.set(nanoseconds(n));
        }
    }

    #[test]
    fn a_rate_generator_counts_down_and_around() {
        let b = bench();
        b.put(0x43, 0x34);
        b.put(0x40, 0xe8);
        b.put(0x40, 0x03);
        b.at_ticks(2010);
        b.put(0x43, 0x00);
        b.at_ticks(2500);
        assert_eq!((b.get(0x40), b.get(0x40)), (0xde, 0x03)); // 990
        assert_eq!((b.get(0x40), b.get(0x40)), (0xf4, 0x01)); // 500
        assert!(b.line.is_high());
    }

    #[test]
    fn counter_2_calibrates_through_port_61h() {
        let b = bench();
        b.put(0x61, 0);
        b.put(0x43, 0xb0);
        b.put(0x42, 0x10);
        b.put(0x42, 0x27);
        b.put(0x61, 1);
        b.at_ticks(9999);
        assert_eq!(b.get(0x61) & TMR2_OUT, 0);
        b.at_ticks(10_000);
        assert_eq!(b.get(0x61) & TMR2_OUT, TMR2_OUT);
        b.put(0x43, 0xe8); // read back status
        assert_eq!(b.get(0x42), 0xb0);
    }

    #[test]
    fn a_one_shot_raises_the_interrupt_once() {
        let b = bench();
        b.put(0x43, 0x38); // mode 4
        b.put(0x40, 1);
        b.put(0x40, 0);
        let before = b.line.edges();
        b.clock.resume();
        while b.line.edges() == before {
            std::thread::yield_now();
        }
        assert!(b.line.is_high());
        b.put(0x43, 0x30); // mode 0: the output falls
        assert!(!b.line.is_high());
        b.put(0x40, 1);
        b.put(0x40, 0);
        while !b.line.is_high() {
            std::thread::yield_now();
        }
    }

    #[test]
    fn bcd_counts_in_decimal() {
        let b = bench();
        b.put(0x43, 0x31);
        b.put(0x40, 0x00);
        b.put(0x40, 0x10);
        b.at_ticks(1);
        b.put(0x43, 0x00);
        assert_eq!((b.get(0x40), b.get(0x40)), (0x99, 0x09));
    }

    #[test]
    fn any_traffic_is_survived_and_reset_undoes_it() {
        let b = bench();
        smoke(&*b.pit, 4, &[1], 20_000);
        b.clock.set(u64::MAX / 2);
        smoke(&*b.pit, 4, &[1], 20_000);
        b.pit.reset(ResetKind::Cold);
        assert!(!b.line.is_high());
        b.put(0x43, 0xe2);
        assert_eq!(b.get(0x40), 0x70);
    }
}
