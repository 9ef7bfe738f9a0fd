//! The high precision event timers.
//!
//! IA-PC HPET Specification 1.0a, section 2.3.

use std::sync::{Arc, Weak};

use bitfield_struct::bitfield;
use device_model::{
    Device, IoBus, IoError, IoHandler, IoRegion, IrqLine, IrqPin, MsiSink, ResetKind, Widths,
};
use guest_clock::{GuestClock, Timer as ClockTimer};
use parking_lot::Mutex;

/// Registers and bits.
pub mod spec {
    /// Where PCs have it.
    pub const BASE: u64 = 0xfed0_0000;
    /// Bytes that it decodes.
    pub const SIZE: u64 = 0x400;
    /// General capabilities and ID.
    pub const GCAP_ID: u64 = 0x000;
    /// General configuration.
    pub const GEN_CONF: u64 = 0x010;
    /// General interrupt status.
    pub const GINTR_STA: u64 = 0x020;
    /// Main counter.
    pub const MAIN_CNT: u64 = 0x0f0;
    /// First timer's configuration.
    pub const TIM0_CONF: u64 = 0x100;
    /// Bytes of a timer's registers: configuration, comparator, message route.
    pub const TIM_STRIDE: u64 = 0x20;
    /// GEN_CONF: the main counter runs.
    pub const ENABLE_CNF: u64 = 1;
    /// GEN_CONF: timers 0 and 1 replace the interval timer's and the clock's interrupts.
    pub const LEG_RT_CNF: u64 = 2;
    /// Femtoseconds of a tick.
    pub const PERIOD: u64 = 10_000_000;
    /// Nanoseconds of a tick.
    pub const PERIOD_NS: u64 = PERIOD / 1_000_000;
    /// I/O APIC inputs that timers can be routed to: 2, 8, 16 to 23.
    pub const ROUTES: u32 = 0x00ff_0104;
    /// Vendor ID.
    pub const VENDOR: u64 = 0x8086;
}
use spec::*;

/// The shortest time between two interrupts of a periodic timer, in nanoseconds: more of them would only keep the host busy.
const SHORTEST_PERIOD: u64 = 20_000;
/// How many timers there are.
pub const TIMERS: usize = 3;

/// A timer's configuration and capabilities register.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
struct Config {
    reserved: bool,
    level: bool,
    enabled: bool,
    periodic: bool,
    can_be_periodic: bool,
    is_64_bit: bool,
    set_value: bool,
    reserved2: bool,
    force_32_bit: bool,
    #[bits(5)]
    route: u8,
    message: bool,
    can_send_message: bool,
    #[bits(16)]
    reserved3: u16,
    routes: u32,
}

impl Config {
    const RESET: Self = Self::new()
        .with_can_be_periodic(true)
        .with_is_64_bit(true)
        .with_can_send_message(true)
        .with_routes(ROUTES);
    const WRITABLE: u64 = 0x7f4e;
}

/// Volatile guest state of a timer.
#[derive(Debug, Clone, Copy)]
struct TimerState {
    config: Config,
    comparator: u64,
    period: u64,
    fsb: u64,
}

impl TimerState {
    const RESET: Self = Self {
        config: Config::RESET,
        comparator: u64::MAX,
        period: 0,
        fsb: 0,
    };

    fn wraps_at_32_bits(&self) -> bool {
        self.config.force_32_bit()
    }

    /// Ticks from `counter` until it meets the comparator: 1 at least.
    fn distance(&self, counter: u64) -> u64 {
        let distance = if self.wraps_at_32_bits() {
            u64::from((self.comparator as u32).wrapping_sub(counter as u32))
        } else {
            self.comparator.wrapping_sub(counter)
        };
        match distance {
            0 if self.wraps_at_32_bits() => 1 << 32,
            0 => u64::MAX,
            n => n,
        }
    }

    /// Ticks since `counter` met a periodic timer's comparator, when it has: time goes on between two looks at it.
    fn behind(&self, counter: u64) -> Option<u64> {
        let behind = if self.wraps_at_32_bits() {
            i64::from((counter as u32).wrapping_sub(self.comparator as u32) as i32)
        } else {
            counter.wrapping_sub(self.comparator) as i64
        };
        let repeats = self.config.periodic() && self.period != 0;
        u64::try_from(behind).ok().filter(|_| repeats)
    }

    /// Moves a periodic timer's comparator to its next match, when the counter has gone `behind` ticks past this one.
    fn advance(&mut self, behind: u64) {
        if !self.config.periodic() || self.period == 0 {
            return;
        }
        let steps = behind / self.period + 1;
        self.comparator = self
            .comparator
            .wrapping_add(steps.wrapping_mul(self.period));
        if self.wraps_at_32_bits() {
            self.comparator &= 0xffff_ffff;
        }
    }
}

/// The next time that the counter meets a timer's comparator.
#[derive(Clone, Copy)]
struct Match {
    /// The comparator that it was reckoned for.
    comparator: u64,
    /// The whole counter then.
    counter: u64,
    /// Guest time when that is seen to.
    at: u64,
}

/// Volatile guest state.
struct State {
    config: u64,
    /// Interrupt status: one bit for each level-triggered timer.
    status: u64,
    /// The main counter's value at `since`, or where it stands.
    counter: u64,
    since: u64,
    timers: [TimerState; TIMERS],
    /// When each timer is due that has something to do then.
    due: [Option<Match>; TIMERS],
    /// The line that each timer drives, with where it goes.
    lines: [Option<(Route, IrqLine)>; TIMERS],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Route {
    Legacy(usize),
    Gsi(usize),
}

/// The timers' wiring.
pub struct HpetPins {
    /// ISA interrupts 0 and 8, which legacy replacement takes over.
    pub legacy: [IrqPin; 2],
    /// The I/O APIC's inputs 0 to 23.
    pub gsi: Vec<IrqPin>,
}

/// Called with true when the interval timer and the clock are to be silent, because legacy replacement is on, and with false when
/// they may interrupt again.
pub type LegacySink = Box<dyn Fn(bool) + Send + Sync>;

/// The event timer block.
pub struct Hpet {
    clock: GuestClock,
    pins: HpetPins,
    messages: Arc<dyn MsiSink>,
    legacy: LegacySink,
    wake: [ClockTimer; TIMERS],
    state: Mutex<State>,
}

impl State {
    fn new(now: u64) -> Self {
        Self {
            config: 0,
            status: 0,
            counter: 0,
            since: now,
            timers: [TimerState::RESET; TIMERS],
            due: [None; TIMERS],
            lines: [const { None }; TIMERS],
        }
    }

    fn running(&self) -> bool {
        self.config & ENABLE_CNF != 0
    }

    fn counter(&self, now: u64) -> u64 {
        if !self.running() {
            return self.counter;
        }
        let passed = now.saturating_sub(self.since) / PERIOD_NS;
        self.counter.wrapping_add(passed)
    }

    /// Takes the counter's present value as its base.
    fn rebase(&mut self, now: u64) {
        let counter = self.counter(now);
        // The part of a tick that has passed is not lost.
        self.since = if self.running() {
            now - now.saturating_sub(self.since) % PERIOD_NS
        } else {
            now
        };
        self.counter = counter;
    }
}

impl Hpet {
    /// The block in its reset state.
    pub fn new(
        clock: GuestClock,
        pins: HpetPins,
        messages: Arc<dyn MsiSink>,
        legacy: LegacySink,
    ) -> Arc<Self> {
        Arc::new_cyclic(|hpet: &Weak<Self>| {
            let wake = std::array::from_fn(|n| {
                let hpet = hpet.clone();
                clock.timer(move || {
                    if let Some(hpet) = hpet.upgrade() {
                        hpet.expire(n);
                    }
                })
            });
            let state = Mutex::new(State::new(clock.now()));
            Self {
                clock,
                pins,
                messages,
                legacy,
                wake,
                state,
            }
        })
    }

    /// Claims its registers at the PC's place.
    ///
    /// # Errors
    /// When something else is there.
    pub fn attach(self: &Arc<Self>, memory: &IoBus) -> Result<IoRegion, IoError> {
        memory.add(BASE, SIZE, "hpet", self.clone())
    }

    fn route(&self, state: &State, n: usize) -> Option<Route> {
        if state.config & LEG_RT_CNF != 0 && n < 2 {
            return Some(Route::Legacy(n));
        }
        let route = usize::from(state.timers[n].config.route());
        (ROUTES & 1 << route != 0).then_some(Route::Gsi(route))
    }

    /// The line that timer `n` drives now.
    fn line<'a>(&self, state: &'a mut State, n: usize) -> Option<&'a IrqLine> {
        let wanted = self.route(state, n);
        if state.lines[n].as_ref().map(|(route, _)| *route) != wanted {
            state.lines[n] = wanted.and_then(|route| {
                let pin = match route {
                    Route::Legacy(n) => self.pins.legacy.get(n),
                    Route::Gsi(n) => self.pins.gsi.get(n),
                };
                Some((route, pin?.line()))
            });
        }
        state.lines[n].as_ref().map(|(_, line)| line)
    }

    /// Drives level-triggered outputs, and arms the timers.
    fn sync(&self, state: &mut State) {
        let now = self.clock.now();
        for n in 0..TIMERS {
            let high = state.status & 1 << n != 0 && state.timers[n].config.enabled();
            if let Some(line) = self.line(state, n) {
                line.set(high);
            }
            self.arm(state, n, now);
        }
    }

    /// Reckons when timer `n` is due, and wakes for it when an interrupt comes then. Nobody notices the other timers before the
    /// registers are looked at; [`Self::catch_up`] sees to them.
    fn arm(&self, state: &mut State, n: usize, now: u64) {
        let timer = &state.timers[n];
        let enabled = timer.config.enabled();
        let visible = enabled || timer.config.level() || timer.config.periodic();
        if !state.running() || !visible {
            state.due[n] = None;
            self.wake[n].disarm();
            return;
        }
        // It may be armed already for what it would be armed for now, though the counter may have just met it.
        let armed = state.due[n].filter(|due| due.comparator == timer.comparator);
        let due = armed.unwrap_or_else(|| Self::next_match(state, n, now));
        state.due[n] = Some(due);
        if !enabled {
            self.wake[n].disarm();
        } else if armed.is_none() {
            self.wake[n].arm(due.at);
        }
    }

    fn next_match(state: &State, n: usize, now: u64) -> Match {
        let (timer, counter) = (&state.timers[n], state.counter(now));
        let (distance, met) = match timer.behind(counter) {
            Some(behind) => (0, counter.wrapping_sub(behind)),
            None => {
                let distance = timer.distance(counter);
                (distance, counter.wrapping_add(distance))
            }
        };
        let base = now - now.saturating_sub(state.since) % PERIOD_NS;
        let mut at = base.saturating_add(distance.saturating_mul(PERIOD_NS));
        if timer.config.periodic() && timer.period.saturating_mul(PERIOD_NS) < SHORTEST_PERIOD {
            at = at.max(now.saturating_add(SHORTEST_PERIOD));
        }
        Match {
            comparator: timer.comparator,
            counter: met,
            at,
        }
    }

    /// The clock's call for timer `n`.
    fn expire(&self, n: usize) {
        let mut state = self.state.lock();
        let now = self.clock.now();
        // A call may have begun for an earlier deadline, while the guest set a new one that has yet to come.
        if self.meet(&mut state, n, now) {
            self.sync(&mut state);
        }
    }

    /// Does what timer `n` does when the counter meets its comparator; false when that has yet to come.
    fn meet(&self, state: &mut State, n: usize, now: u64) -> bool {
        let Some(due) = state.due[n].filter(|due| due.at <= now && state.running()) else {
            return false;
        };
        state.due[n] = None;
        let behind = state.counter(now).wrapping_sub(due.counter);
        state.timers[n].advance(behind);
        self.interrupt(state, n);
        true
    }

    /// Does what silent timers would have done by now.
    fn catch_up(&self, state: &mut State) {
        let now = self.clock.now();
        let mut any = false;
        for n in 0..TIMERS {
            any |= !state.timers[n].config.enabled() && self.meet(state, n, now);
        }
        if any {
            self.sync(state);
        }
    }

    fn interrupt(&self, state: &mut State, n: usize) {
        let TimerState { config, fsb, .. } = state.timers[n];
        let legacy = state.config & LEG_RT_CNF != 0 && n < 2;
        if config.level() {
            state.status |= 1 << n;
            return;
        }
        if !config.enabled() {
            return;
        }
        if config.message() && !legacy {
            self.messages.send(fsb >> 32, fsb as u32);
        } else if let Some(line) = self.line(state, n) {
            line.pulse();
        }
    }

    fn read_register(&self, state: &State, offset: u64) -> u64 {
        match offset {
            GCAP_ID => {
                let timers = TIMERS as u64 - 1;
                // Revision 1, a 64-bit counter, legacy replacement.
                PERIOD << 32 | VENDOR << 16 | 1 << 15 | 1 << 13 | timers << 8 | 1
            }
            GEN_CONF => state.config,
            GINTR_STA => state.status,
            MAIN_CNT => state.counter(self.clock.now()),
            _ => match Self::timer_register(offset) {
                Some((n, 0)) => state.timers[n].config.into(),
                Some((n, 8)) => state.timers[n].comparator,
                Some((n, 16)) => state.timers[n].fsb,
                _ => 0,
            },
        }
    }

    /// The timer and its register that an offset names.
    fn timer_register(offset: u64) -> Option<(usize, u64)> {
        let at = offset.checked_sub(TIM0_CONF)?;
        let n = (at / TIM_STRIDE) as usize;
        (n < TIMERS).then_some((n, at % TIM_STRIDE))
    }

    /// Writes the bits of `mask` of the 64-bit register at `offset`.
    fn write_register(&self, state: &mut State, offset: u64, value: u64, mask: u64) {
        let now = self.clock.now();
        match offset {
            GEN_CONF => {
                let bits = mask & (ENABLE_CNF | LEG_RT_CNF);
                let new = state.config & !bits | value & bits;
                let changed = state.config ^ new;
                state.rebase(now);
                state.config = new;
                state.since = now;
                if changed & LEG_RT_CNF != 0 {
                    (self.legacy)(new & LEG_RT_CNF != 0);
                }
                state.due = [None; TIMERS];
            }
            GINTR_STA => state.status &= !(value & mask),
            MAIN_CNT => {
                let counter = state.counter(now);
                state.counter = counter & !mask | value & mask;
                state.since = now;
                state.due = [None; TIMERS];
            }
            _ => {
                if let Some((n, register)) = Self::timer_register(offset) {
                    Self::write_timer(&mut state.timers[n], register, value, mask);
                    state.due[n] = None;
                    if !state.timers[n].config.level() {
                        state.status &= !(1 << n);
                    }
                }
            }
        }
    }

    fn write_timer(timer: &mut TimerState, register: u64, value: u64, mask: u64) {
        match register {
            0 => {
                let bits = mask & Config::WRITABLE;
                timer.config = Config::from(u64::from(timer.config) & !bits | value & bits);
                if timer.config.force_32_bit() {
                    timer.comparator &= 0xffff_ffff;
                    timer.period &= 0xffff_ffff;
                }
            }
            8 => {
                let limit = if timer.wraps_at_32_bits() {
                    0xffff_ffff
                } else {
                    u64::MAX
                };
                // In periodic mode the set-value bit lets one write through to the comparator; others set the period.
                if !timer.config.periodic() || timer.config.set_value() {
                    timer.comparator = (timer.comparator & !mask | value & mask) & limit;
                }
                if timer.config.periodic() {
                    timer.period = (timer.period & !mask | value & mask) & limit;
                }
                timer.config.set_set_value(false);
            }
            16 => timer.fsb = timer.fsb & !mask | value & mask,
            _ => {}
        }
    }
}

impl IoHandler for Hpet {
    fn widths(&self) -> Widths {
        Widths::DWORD_OR_QWORD
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.state.lock();
        self.catch_up(&mut state);
        let value = self.read_register(&state, offset & !7) >> (8 * (offset & 7));
        let len = data.len().min(8);
        data[..len].copy_from_slice(&value.to_le_bytes()[..len]);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 8];
        let at = (offset & 7) as usize;
        if at + data.len() > 8 {
            return;
        }
        bytes[at..at + data.len()].copy_from_slice(data);
        let mask = u64::MAX >> (64 - 8 * data.len() as u32) << (8 * at);
        let mut state = self.state.lock();
        self.catch_up(&mut state);
        self.write_register(&mut state, offset & !7, u64::from_le_bytes(bytes), mask);
        self.sync(&mut state);
    }
}

impl Device for Hpet {
    fn name(&self) -> String {
        "hpet".into()
    }

    fn reset(&self, _kind: ResetKind) {
        let mut state = self.state.lock();
        *state = State::new(self.clock.now());
        self.sync(&mut state);
        (self.legacy)(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Line, Recorder, smoke};

    struct Bench {
        clock: GuestClock,
        hpet: Arc<Hpet>,
        gsi: Vec<Line>,
        legacy: Vec<Line>,
        messages: Arc<Recorder>,
        replaced: Arc<Mutex<Vec<bool>>>,
    }

    fn bench() -> Bench {
        bench_on(GuestClock::new())
    }

    fn bench_on(clock: GuestClock) -> Bench {
        let gsi: Vec<Line> = (0..24).map(|_| Line::new()).collect();
        let legacy: Vec<Line> = (0..2).map(|_| Line::new()).collect();
        let messages = Arc::new(Recorder::default());
        let replaced = Arc::new(Mutex::new(Vec::new()));
        let log = replaced.clone();
        let pins = HpetPins {
            legacy: [legacy[0].pin(), legacy[1].pin()],
            gsi: gsi.iter().map(Line::pin).collect(),
        };
        let hpet = Hpet::new(
            clock.clone(),
            pins,
            messages.clone(),
            Box::new(move |on| log.lock().push(on)),
        );
        Bench {
            clock,
            hpet,
            gsi,
            legacy,
            messages,
            replaced,
        }
    }

    impl Bench {
        fn put(&self, offset: u64, value: u64) {
            self.hpet.write(offset, &value.to_le_bytes());
        }
        fn get(&self, offset: u64) -> u64 {
            let mut data = [0; 8];
            self.hpet.read(offset, &mut data);
            u64::from_le_bytes(data)
        }
    }

    fn wait(condition: impl Fn() -> bool) {
        while !condition() {
            std::thread::yield_now();
        }
    }

    #[test]
    fn the_counter_counts_while_it_is_enabled() {
        let b = bench();
        assert_eq!(b.get(GCAP_ID), 0x0098_9680_8086_a201);
        b.clock.set(1_000);
        assert_eq!(b.get(MAIN_CNT), 0);
        b.put(GEN_CONF, ENABLE_CNF);
        b.clock.set(3_005);
        assert_eq!(b.get(MAIN_CNT), 200);
        b.put(GEN_CONF, 0);
        b.clock.set(9_000);
        assert_eq!(b.get(MAIN_CNT), 200);
        b.put(MAIN_CNT, 0xffff_ffff_ffff_ffff);
        b.put(GEN_CONF, ENABLE_CNF);
        b.clock.set(9_010);
        assert_eq!(b.get(MAIN_CNT), 0);
        let mut half = [0; 4];
        b.hpet.read(GCAP_ID + 4, &mut half);
        assert_eq!(u32::from_le_bytes(half), 10_000_000);
    }

    #[test]
    fn legacy_replacement_interrupts_periodically() {
        let b = bench();
        b.put(GEN_CONF, LEG_RT_CNF);
        assert_eq!(*b.replaced.lock(), [true]);
        b.put(TIM0_CONF, 0x4c); // enabled, periodic, set value
        b.put(TIM0_CONF + 8, 10_000);
        b.put(TIM0_CONF + 8, 10_000);
        b.put(GEN_CONF, ENABLE_CNF | LEG_RT_CNF);
        b.clock.resume();
        wait(|| b.legacy[0].edges() >= 3);
        assert!(b.get(TIM0_CONF + 8) >= 40_000);
        b.hpet.reset(ResetKind::Cold);
        assert_eq!(b.replaced.lock().last(), Some(&false));
    }

    #[test]
    fn a_tiny_period_does_not_keep_the_host_busy() {
        let b = bench();
        b.put(TIM0_CONF, 0x4c | 20 << 9);
        b.put(TIM0_CONF + 8, 1);
        b.put(TIM0_CONF + 8, 1);
        b.put(GEN_CONF, ENABLE_CNF);
        b.clock.resume();
        wait(|| b.gsi[20].edges() >= 10);
        b.clock.stop();
        let passed = b.clock.now();
        let most = passed / SHORTEST_PERIOD + 2;
        assert!(b.gsi[20].edges() as u64 <= most, "in {passed} ns");
    }

    /// The clock's thread may be on its way with a call while the guest sets another deadline.
    #[test]
    fn a_call_for_an_earlier_deadline_does_nothing() {
        let b = bench();
        b.put(TIM0_CONF, 0x4c | 20 << 9);
        b.put(TIM0_CONF + 8, 1);
        b.put(GEN_CONF, ENABLE_CNF);
        b.hpet.expire(0);
        assert_eq!((b.gsi[20].edges(), b.get(TIM0_CONF + 8)), (0, 1));
        b.clock.set(SHORTEST_PERIOD);
        b.hpet.expire(0);
        assert_eq!(b.gsi[20].edges(), 1);
        assert_eq!(b.get(TIM0_CONF + 8), SHORTEST_PERIOD / PERIOD_NS + 1);
    }

    /// What nobody is told of is reckoned when somebody looks.
    #[test]
    fn a_silent_timer_sleeps_and_is_seen_to_have_run() {
        const PERIOD_TICKS: u64 = 100_000;
        for (config, wrap) in [(0x48, None), (0x148, Some(1u64 << 32))] {
            let b = bench_on(GuestClock::stepped());
            let sleep = |ticks: u64| assert_eq!(b.clock.advance(ticks * PERIOD_NS, 1), 0);
            b.put(TIM0_CONF, config | 20 << 9); // periodic, set value; not enabled
            b.put(TIM0_CONF + 8, 500_000);
            b.put(TIM0_CONF + 8, PERIOD_TICKS);
            b.put(TIM0_CONF + 0x20, 2 | 21 << 9); // level, one shot; not enabled
            b.put(TIM0_CONF + 0x28, 650_000);
            b.put(GEN_CONF, ENABLE_CNF);
            sleep(649_999);
            assert_eq!((b.get(TIM0_CONF + 8), b.get(GINTR_STA)), (700_000, 0));
            sleep(1);
            assert_eq!((b.get(TIM0_CONF + 8), b.get(GINTR_STA)), (700_000, 2));
            // Longer than the counter's low half takes to come round.
            sleep(3 << 32);
            let next = ((3 << 32) + 650_000u64).next_multiple_of(PERIOD_TICKS);
            assert_eq!(b.get(TIM0_CONF + 8), wrap.map_or(next, |wrap| next % wrap));
            // It wakes for the next one as soon as it is told to interrupt.
            b.put(TIM0_CONF, config & !0x40 | 0x4 | 20 << 9);
            sleep(next - (3 << 32) - 650_000 - 1);
            assert_eq!((b.clock.advance(PERIOD_NS, 2), b.gsi[20].edges()), (1, 1));
        }
    }

    #[test]
    fn levels_stay_until_the_status_is_cleared() {
        let b = bench();
        b.put(TIM0_CONF + 0x40, 16 << 9 | 6); // level, enabled, to input 16
        b.put(TIM0_CONF + 0x48, 100);
        b.put(GEN_CONF, ENABLE_CNF);
        b.clock.resume();
        wait(|| b.gsi[16].is_high());
        assert_eq!(b.get(GINTR_STA), 4);
        b.put(GINTR_STA, 4);
        assert!(!b.gsi[16].is_high());
    }

    #[test]
    fn timers_send_messages() {
        let b = bench();
        b.put(TIM0_CONF + 0x30, 0xfee0_1000_0000_0041);
        b.put(TIM0_CONF + 0x20, 0x4004);
        b.put(TIM0_CONF + 0x28, 50);
        b.put(GEN_CONF, ENABLE_CNF);
        b.clock.resume();
        wait(|| !b.messages.messages.lock().is_empty());
        assert_eq!(b.messages.messages.lock()[0], (0xfee0_1000, 0x41));
    }

    #[test]
    fn any_traffic_is_survived_and_reset_undoes_it() {
        let b = bench();
        smoke(&*b.hpet, 0x400, &[4, 8], 20_000);
        smoke(&*b.hpet, 0x160, &[4, 8], 20_000);
        b.hpet.reset(ResetKind::Cold);
        assert_eq!(b.get(GEN_CONF), 0);
        assert_eq!(b.get(TIM0_CONF), 0x00ff_0104_0000_8030);
        assert_eq!(b.get(TIM0_CONF + 8), u64::MAX);
        assert!(b.gsi.iter().chain(&b.legacy).all(|l| !l.is_high()));
    }
}
