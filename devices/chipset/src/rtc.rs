//! The MC146818 real-time clock with its battery-backed memory.
//!
//! Motorola MC146818A datasheet (ADI845); the bytes beyond the clock's are where PC firmware looks for them.

use std::sync::{Arc, Weak};
use std::time::Duration;

use device_model::{Device, IoBus, IoError, IoHandler, IoRegion, IrqLine, ResetKind, Widths};
use guest_clock::{GuestClock, Timer};
use parking_lot::Mutex;

use crate::calendar::DateTime;

/// Ports, registers and bits.
pub mod spec {
    /// First port: index, data, and the same for the upper bank.
    pub const PORT: u64 = 0x70;
    /// Seconds; then seconds of the alarm, minutes, its minutes, hours, its hours.
    pub const SECONDS: u8 = 0;
    /// Day of the week, 1 for Sunday.
    pub const DAY_OF_WEEK: u8 = 6;
    /// Day of the month.
    pub const DAY: u8 = 7;
    /// Month.
    pub const MONTH: u8 = 8;
    /// Year of the century.
    pub const YEAR: u8 = 9;
    /// Register A.
    pub const A: u8 = 10;
    /// Register B.
    pub const B: u8 = 11;
    /// Register C.
    pub const C: u8 = 12;
    /// Register D.
    pub const D: u8 = 13;
    /// Century, as ACPI tables declare it.
    pub const CENTURY: u8 = 0x32;

    /// A: an update is under way.
    pub const A_UIP: u8 = 0x80;
    /// A: divider chain; 2: running at 32768 Hz.
    pub const A_DIVIDER: u8 = 0x70;
    /// A: rate of the periodic interrupt.
    pub const A_RATE: u8 = 0x0f;
    /// B: updates are stopped so that the time can be set.
    pub const B_SET: u8 = 0x80;
    /// B: periodic interrupt enable.
    pub const B_PIE: u8 = 0x40;
    /// B: alarm interrupt enable.
    pub const B_AIE: u8 = 0x20;
    /// B: update-ended interrupt enable.
    pub const B_UIE: u8 = 0x10;
    /// B: binary, not BCD.
    pub const B_DM: u8 = 0x04;
    /// B: 24 hours.
    pub const B_24H: u8 = 0x02;
    /// C: an enabled interrupt is pending. The flags below have the bits of their enables.
    pub const C_IRQF: u8 = 0x80;
    /// D: the battery is good.
    pub const D_VRT: u8 = 0x80;
    /// Hours: afternoon, in the 12-hour form.
    pub const PM: u8 = 0x80;
    /// Values of the alarm from here on match anything.
    pub const ALARM_ANY: u8 = 0xc0;
    /// Nanoseconds that the update bit is up before an update.
    pub const UIP_NS: u64 = 244_000;
}
use spec::*;

const SECOND: i128 = 1_000_000_000;
const DAY_SECONDS: i64 = 86_400;
const BYTES: usize = 256;

/// What firmware finds in the memory about the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CmosConfig {
    /// Bytes of RAM below 4 GiB.
    pub ram_below_4g: u64,
    /// Bytes of RAM above 4 GiB.
    pub ram_above_4g: u64,
    /// Processors.
    pub cpus: u32,
    /// The clock shows local time: seconds east of UTC.
    pub utc_offset: i32,
}

/// A clock that is held. The fields are kept as they were written, since one alone need not fit the others yet.
#[derive(Debug, Clone, Copy)]
struct Held {
    time: DateTime,
    /// Nanoseconds into the second.
    fraction: i128,
}

impl Held {
    fn at(now: i128) -> Self {
        Self {
            time: DateTime::from_unix(seconds_of(now)),
            fraction: now.rem_euclid(SECOND),
        }
    }

    fn nanoseconds(&self) -> i128 {
        i128::from(self.time.to_unix()) * SECOND + self.fraction
    }
}

/// Volatile guest state, except what the battery keeps.
struct State {
    index: [u8; 2],
    memory: [u8; BYTES],
    /// Nanoseconds that the clock is ahead of the host's.
    offset: i128,
    /// What the clock shows while SET or a stopped divider holds it.
    held: Option<Held>,
    /// The second up to which updates have been taken note of.
    updated: i64,
    /// Guest time at which the periodic interrupt is next due.
    periodic: Option<u64>,
    /// HPET has taken the interrupt over.
    replaced: bool,
}

/// The clock.
pub struct Rtc {
    clock: GuestClock,
    irq: IrqLine,
    timer: Timer,
    config: CmosConfig,
    state: Mutex<State>,
}

impl Rtc {
    /// The clock, showing the host's time. `irq` is ISA interrupt 8.
    pub fn new(clock: GuestClock, irq: IrqLine, config: CmosConfig) -> Arc<Self> {
        let offset = i128::from(config.utc_offset) * SECOND;
        let state = State {
            index: [0; 2],
            memory: initial_memory(&config),
            offset,
            held: None,
            updated: seconds_of(wall(&clock) + offset),
            periodic: None,
            replaced: false,
        };
        Arc::new_cyclic(|rtc: &Weak<Self>| {
            let rtc = rtc.clone();
            Self {
                timer: clock.timer(move || {
                    if let Some(rtc) = rtc.upgrade() {
                        let mut state = rtc.state.lock();
                        rtc.sync(&mut state);
                    }
                }),
                clock,
                irq,
                config,
                state: Mutex::new(state),
            }
        })
    }

    /// Claims the ports 70h to 73h.
    ///
    /// # Errors
    /// When something else is there.
    pub fn attach(self: &Arc<Self>, ports: &IoBus) -> Result<IoRegion, IoError> {
        ports.add(PORT, 4, "rtc", self.clone())
    }

    /// HPET's legacy replacement takes the interrupt away, or gives it back.
    pub fn set_replaced(&self, replaced: bool) {
        let mut state = self.state.lock();
        state.replaced = replaced;
        self.sync(&mut state);
    }

    /// Sets a byte of the battery-backed memory, as the machine's configuration does; not for registers of the clock.
    pub fn set_memory(&self, index: u8, value: u8) {
        if index > D {
            self.state.lock().memory[usize::from(index)] = value;
        }
    }

    /// The clock's time in nanoseconds since 1970-01-01.
    fn now(&self, state: &State) -> i128 {
        match &state.held {
            Some(held) => held.nanoseconds(),
            None => wall(&self.clock) + state.offset,
        }
    }

    /// Takes note of what has happened by now, drives the interrupt, and arms the timer for what comes next.
    fn sync(&self, state: &mut State) {
        let guest_now = self.clock.now();
        self.note_updates(state);
        if let Some(due) = state.periodic.filter(|due| *due <= guest_now) {
            state.memory[usize::from(C)] |= B_PIE;
            let period = periodic_period(state.memory[usize::from(A)]);
            // Periods that nobody waited for are not made up for.
            state.periodic = period.map(|p| due + ((guest_now - due) / p + 1) * p);
        }
        let enabled = state.memory[usize::from(B)] & (B_PIE | B_AIE | B_UIE);
        let pending = state.memory[usize::from(C)] & enabled != 0;
        let flags = state.memory[usize::from(C)] & !C_IRQF;
        state.memory[usize::from(C)] = flags | if pending { C_IRQF } else { 0 };
        self.irq.set(pending && !state.replaced);
        self.arm(state, guest_now);
    }

    fn arm(&self, state: &State, guest_now: u64) {
        let b = state.memory[usize::from(B)];
        let mut next = state.periodic.filter(|_| b & B_PIE != 0);
        if state.held.is_none() && b & (B_UIE | B_AIE) != 0 {
            let now = self.now(state);
            let left = if b & B_UIE != 0 {
                Some(1)
            } else {
                next_alarm(&state.memory, seconds_of(now))
            };
            if let Some(seconds) = left {
                let target = (i128::from(seconds_of(now)) + i128::from(seconds)) * SECOND;
                let at = guest_now.saturating_add((target - now).max(0) as u64);
                next = Some(next.map_or(at, |n| n.min(at)));
            }
        }
        match next {
            Some(at) => self.timer.arm(at),
            None => self.timer.disarm(),
        }
    }

    /// Sets the flags of the updates and alarms since the last call.
    fn note_updates(&self, state: &mut State) {
        if state.held.is_some() {
            return;
        }
        let second = seconds_of(self.now(state));
        let passed = second - state.updated;
        if passed > 0 {
            state.memory[usize::from(C)] |= B_UIE;
            let alarm = next_alarm(&state.memory, state.updated);
            if alarm.is_some_and(|after| after <= passed) {
                state.memory[usize::from(C)] |= B_AIE;
            }
        }
        state.updated = second;
    }

    fn read_register(&self, state: &mut State, index: u8) -> u8 {
        match index {
            0 | 2 | 4 | DAY_OF_WEEK..=YEAR | CENTURY => {
                let time = match &state.held {
                    Some(held) => held.time,
                    None => DateTime::from_unix(seconds_of(self.now(state))),
                };
                read_time(&time, index, state.memory[usize::from(B)])
            }
            A => {
                let into = self.now(state).rem_euclid(SECOND) as u64;
                let updating = state.held.is_none() && into >= SECOND as u64 - UIP_NS;
                state.memory[usize::from(A)] | if updating { A_UIP } else { 0 }
            }
            C => {
                self.sync(state);
                let flags = std::mem::take(&mut state.memory[usize::from(C)]);
                self.sync(state);
                flags
            }
            D => D_VRT,
            _ => state.memory[usize::from(index)],
        }
    }

    fn write_register(&self, state: &mut State, index: u8, value: u8) {
        match index {
            0 | 2 | 4 | DAY_OF_WEEK..=YEAR | CENTURY => self.write_time(state, index, value),
            A => {
                let was = state.memory[usize::from(A)];
                state.memory[usize::from(A)] = value & !A_UIP;
                self.hold_or_go(state);
                if (was ^ value) & (A_RATE | A_DIVIDER) != 0 {
                    state.periodic = periodic_period(value).map(|p| (self.clock.now() / p + 1) * p);
                }
            }
            B => {
                // Setting SET clears the enable of the update interrupt.
                let value = if value & B_SET != 0 {
                    value & !B_UIE
                } else {
                    value
                };
                state.memory[usize::from(B)] = value;
                self.hold_or_go(state);
            }
            C | D => {}
            _ => state.memory[usize::from(index)] = value,
        }
        self.sync(state);
    }

    /// Stops the clock where it is, or lets it go on from there, as registers A and B say.
    fn hold_or_go(&self, state: &mut State) {
        let divider = state.memory[usize::from(A)] & A_DIVIDER;
        let hold = state.memory[usize::from(B)] & B_SET != 0 || divider >= 0x60;
        match (hold, state.held) {
            (true, None) => state.held = Some(Held::at(self.now(state))),
            (false, Some(held)) => {
                let at = held.nanoseconds();
                state.offset = at - wall(&self.clock);
                state.held = None;
                state.updated = seconds_of(at);
            }
            _ => {}
        }
    }

    fn write_time(&self, state: &mut State, index: u8, value: u8) {
        let b = state.memory[usize::from(B)];
        if let Some(held) = &mut state.held {
            set_time(&mut held.time, index, value, b);
            return;
        }
        let now = self.now(state);
        let mut held = Held::at(now);
        set_time(&mut held.time, index, value, b);
        let new = held.nanoseconds();
        state.offset += new - now;
        state.updated = seconds_of(new);
    }
}

fn wall(clock: &GuestClock) -> i128 {
    let wall: Duration = clock.wall();
    // 128 bits hold any Duration.
    wall.as_nanos() as i128
}

fn seconds_of(nanoseconds: i128) -> i64 {
    nanoseconds.div_euclid(SECOND) as i64
}

/// Nanoseconds between periodic interrupts, by the rate in register A.
fn periodic_period(a: u8) -> Option<u64> {
    let rate = match a & A_RATE {
        0 => return None,
        // The two fastest settings are aliases at this time base.
        rate @ 1..=2 => rate + 7,
        rate => rate,
    };
    Some((1_000_000_000u64 << (rate - 1)) / 32_768)
}

fn to_form(value: u8, b: u8) -> u8 {
    if b & B_DM != 0 {
        value
    } else {
        ((value / 10) << 4) | (value % 10)
    }
}

fn from_form(value: u8, b: u8) -> u8 {
    if b & B_DM != 0 {
        value
    } else {
        (value >> 4).wrapping_mul(10).wrapping_add(value & 15)
    }
}

fn hours_to_form(hours: u8, b: u8) -> u8 {
    if b & B_24H != 0 {
        return to_form(hours, b);
    }
    let twelve = match hours % 12 {
        0 => 12,
        h => h,
    };
    to_form(twelve, b) | if hours >= 12 { PM } else { 0 }
}

fn hours_from_form(value: u8, b: u8) -> u8 {
    if b & B_24H != 0 {
        return from_form(value, b);
    }
    from_form(value & !PM, b) % 12 + if value & PM != 0 { 12 } else { 0 }
}

fn read_time(time: &DateTime, index: u8, b: u8) -> u8 {
    match index {
        0 => to_form(time.second, b),
        2 => to_form(time.minute, b),
        4 => hours_to_form(time.hour, b),
        DAY_OF_WEEK => to_form(time.day_of_week(), b),
        DAY => to_form(time.day, b),
        MONTH => to_form(time.month, b),
        YEAR => to_form(time.year.rem_euclid(100) as u8, b),
        _ => to_form(time.year.div_euclid(100).rem_euclid(100) as u8, b),
    }
}

fn set_time(time: &mut DateTime, index: u8, value: u8, b: u8) {
    let plain = from_form(value, b);
    match index {
        0 => time.second = plain,
        2 => time.minute = plain,
        4 => time.hour = hours_from_form(value, b),
        DAY => time.day = plain,
        MONTH => time.month = plain,
        YEAR => time.year = time.year.div_euclid(100) * 100 + i64::from(plain % 100),
        CENTURY => time.year = i64::from(plain % 100) * 100 + time.year.rem_euclid(100),
        _ => {} // the day of the week follows from the date
    }
}

/// Seconds from `now` until the alarm next matches; 1 to a day, or `None` when it never does.
fn next_alarm(memory: &[u8; BYTES], now: i64) -> Option<i64> {
    let b = memory[usize::from(B)];
    let wanted = |index: usize, hours: bool| {
        let value = memory[index];
        (value < ALARM_ANY).then(|| {
            i64::from(if hours {
                hours_from_form(value, b)
            } else {
                from_form(value, b)
            })
        })
    };
    // In the 12-hour form the afternoon bit makes any value of 12 PM on look like "any".
    let hour = match memory[5] {
        value if b & B_24H == 0 && value & 0x40 == 0 => Some(i64::from(hours_from_form(value, b))),
        _ => wanted(5, true),
    };
    let (minute, second) = (wanted(3, false), wanted(1, false));
    let possible = |field: Option<i64>, limit| field.is_none_or(|v| v < limit);
    if !possible(hour, 24) || !possible(minute, 60) || !possible(second, 60) {
        return None;
    }
    let matches = |of_day: i64| {
        hour.is_none_or(|h| of_day / 3600 == h)
            && minute.is_none_or(|m| of_day / 60 % 60 == m)
            && second.is_none_or(|s| of_day % 60 == s)
    };
    let start = now.rem_euclid(DAY_SECONDS);
    // By second to the next minute, by minute to the next hour, by hour from there on.
    let mut after = 1;
    while after <= DAY_SECONDS {
        let of_day = (start + after) % DAY_SECONDS;
        if matches(of_day) {
            return Some(after);
        }
        after += if hour.is_some_and(|h| of_day / 3600 != h) {
            3600 - of_day % 3600
        } else if minute.is_some_and(|m| of_day / 60 % 60 != m) {
            60 - of_day % 60
        } else {
            1
        };
    }
    None
}

fn initial_memory(config: &CmosConfig) -> [u8; BYTES] {
    let mut memory = [0; BYTES];
    memory[usize::from(A)] = 0x26;
    memory[usize::from(B)] = B_24H;
    let mut put = |at: usize, bytes: &[u8]| memory[at..at + bytes.len()].copy_from_slice(bytes);
    let kib = |bytes: u64| bytes >> 10;
    let base = kib(config.ram_below_4g).min(640) as u16;
    let extended = kib(config.ram_below_4g.saturating_sub(1 << 20)).min(0xffff) as u16;
    put(0x15, &base.to_le_bytes());
    put(0x17, &extended.to_le_bytes());
    put(0x30, &extended.to_le_bytes());
    let above_16m = config.ram_below_4g.saturating_sub(16 << 20) >> 16;
    put(0x34, &(above_16m.min(0xffff) as u16).to_le_bytes());
    let high = config.ram_above_4g >> 16;
    put(0x5b, &high.to_le_bytes()[..3]);
    put(0x5f, &[config.cpus.saturating_sub(1).min(0xff) as u8]);
    // Equipment: a mouse and a mathematics coprocessor.
    put(0x14, &[0x06]);
    memory
}

impl IoHandler for Rtc {
    fn widths(&self) -> Widths {
        Widths::BYTE
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.state.lock();
        let bank = (offset / 2) as usize & 1;
        let value = if offset & 1 == 0 {
            0xff // the index can't be read
        } else {
            let index = state.index[bank];
            self.read_register(&mut state, index)
        };
        data.fill(value);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let [value] = data else { return };
        let mut state = self.state.lock();
        let bank = (offset / 2) as usize & 1;
        if offset & 1 == 0 {
            // Bit 7 of the first index masks NMIs; the second bank is the upper half.
            state.index[bank] = value & 0x7f | (bank as u8) << 7;
        } else {
            let index = state.index[bank];
            self.write_register(&mut state, index, *value);
        }
    }
}

impl Device for Rtc {
    fn name(&self) -> String {
        "rtc".into()
    }

    fn reset(&self, _kind: ResetKind) {
        // The battery keeps time and memory; only interrupts are reset, and what the configuration says is put back.
        let mut state = self.state.lock();
        state.index = [0; 2];
        let fresh = initial_memory(&self.config);
        state.memory[usize::from(C)] = 0;
        state.memory[usize::from(B)] &= !(B_PIE | B_AIE | B_UIE | B_SET);
        for at in [
            0x14, 0x15, 0x16, 0x17, 0x18, 0x30, 0x31, 0x34, 0x35, 0x5b, 0x5c, 0x5d, 0x5f,
        ] {
            state.memory[at] = fresh[at];
        }
        self.hold_or_go(&mut state);
        self.sync(&mut state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Line, smoke};

    fn rtc() -> (Arc<Rtc>, Line, GuestClock) {
        let (clock, line) = (GuestClock::new(), Line::new());
        let config = CmosConfig {
            ram_below_4g: 2 << 30,
            ram_above_4g: 5 << 30,
            cpus: 4,
            utc_offset: 0,
        };
        (Rtc::new(clock.clone(), line.line(), config), line, clock)
    }

    fn get(rtc: &Rtc, index: u8) -> u8 {
        rtc.write(0, &[index]);
        let mut data = [0];
        rtc.read(1, &mut data);
        data[0]
    }

    fn put(rtc: &Rtc, index: u8, value: u8) {
        rtc.write(0, &[index]);
        rtc.write(1, &[value]);
    }

    #[test]
    fn the_time_can_be_set_and_read_in_both_forms() {
        let (rtc, _, _) = rtc();
        put(&rtc, B, B_SET | B_24H);
        for (index, value) in [
            (0, 0x56),
            (2, 0x34),
            (4, 0x23),
            (7, 0x29),
            (8, 0x02),
            (9, 0x24),
        ] {
            put(&rtc, index, value);
        }
        put(&rtc, CENTURY, 0x20);
        assert_eq!(get(&rtc, 4), 0x23);
        assert_eq!(get(&rtc, DAY_OF_WEEK), 5); // 2024-02-29 was a Thursday
        put(&rtc, B, B_SET | B_DM);
        assert_eq!((get(&rtc, 4), get(&rtc, 0)), (0x8b, 56));
        put(&rtc, B, B_SET | B_DM | B_24H);
        assert_eq!((get(&rtc, 4), get(&rtc, CENTURY)), (23, 20));
    }

    #[test]
    fn memory_sizes_are_where_firmware_looks() {
        let (rtc, _, _) = rtc();
        assert_eq!((get(&rtc, 0x15), get(&rtc, 0x16)), (0x80, 0x02));
        assert_eq!((get(&rtc, 0x34), get(&rtc, 0x35)), (0x00, 0x7f));
        assert_eq!(
            (get(&rtc, 0x5b), get(&rtc, 0x5c), get(&rtc, 0x5d)),
            (0, 0x40, 1)
        );
        assert_eq!(get(&rtc, 0x5f), 3);
        assert_eq!(get(&rtc, D), 0x80);
    }

    #[test]
    fn alarms_are_found() {
        let mut memory = [0; BYTES];
        memory[usize::from(B)] = B_24H;
        let noon = 12 * 3600;
        memory[1] = 0x30;
        memory[3] = 0xff;
        memory[5] = 0xff;
        assert_eq!(next_alarm(&memory, noon), Some(30));
        assert_eq!(next_alarm(&memory, noon + 30), Some(60));
        memory[3] = 0x00;
        memory[5] = 0x11;
        assert_eq!(next_alarm(&memory, noon), Some(23 * 3600 + 30));
        memory[5] = 0x77;
        assert_eq!(next_alarm(&memory, noon), None);
        memory[usize::from(B)] = 0;
        memory[5] = 0x81; // 1 PM
        assert_eq!(next_alarm(&memory, noon), Some(3630));
    }

    #[test]
    fn the_periodic_interrupt_comes_until_it_is_acknowledged() {
        let (rtc, line, clock) = rtc();
        put(&rtc, A, 0x26);
        put(&rtc, A, 0x23); // 8192 Hz
        put(&rtc, B, B_24H | B_PIE);
        clock.resume();
        for _ in 0..3 {
            while !line.is_high() {
                std::thread::yield_now();
            }
            assert_eq!(get(&rtc, C) & (C_IRQF | B_PIE), C_IRQF | B_PIE);
            rtc.set_replaced(true);
            assert!(!line.is_high());
            rtc.set_replaced(false);
        }
        rtc.reset(ResetKind::Warm);
        assert!(!line.is_high());
    }

    #[test]
    fn any_traffic_is_survived() {
        let (rtc, line, _) = rtc();
        smoke(&*rtc, 4, &[1], 50_000);
        for index in 0..=D {
            for value in [0, 0x12, 0x7f, 0xff] {
                put(&rtc, index, value);
                get(&rtc, index);
            }
        }
        rtc.reset(ResetKind::Cold);
        assert!(!line.is_high());
        assert_eq!(get(&rtc, 0x5f), 3);
    }
}
