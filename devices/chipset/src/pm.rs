//! ACPI power management of ICH9: fixed events, the timer, general-purpose events, sleeping; and the reset control port.
//!
//! ICH9 datasheet (document 316972), sections 13.8 and 13.7.5; ACPI 6.5, section 4.8.

use std::sync::{Arc, Weak};

use device_model::{
    Device, IoBus, IoError, IoHandler, IoRegion, IrqLine, PowerControl, PowerEvent, ResetCause,
    ResetKind, ShutdownCause, WakeCause, Widths,
};
use guest_clock::{GuestClock, Timer};
use parking_lot::Mutex;

/// Registers by offset from the base, and bits.
pub mod spec {
    /// Ports in the block.
    pub const PORTS: u64 = 128;
    /// Fixed event status, 16 bits.
    pub const PM1_STS: u64 = 0x00;
    /// Fixed event enable, 16 bits.
    pub const PM1_EN: u64 = 0x02;
    /// Control, 32 bits.
    pub const PM1_CNT: u64 = 0x04;
    /// Timer, 32 bits.
    pub const PM1_TMR: u64 = 0x08;
    /// General-purpose event status, 64 bits.
    pub const GPE0_STS: u64 = 0x20;
    /// General-purpose event enable, 64 bits.
    pub const GPE0_EN: u64 = 0x28;
    /// SMI control and enable, 32 bits.
    pub const SMI_EN: u64 = 0x30;
    /// SMI status, 32 bits.
    pub const SMI_STS: u64 = 0x34;

    /// PM1: timer overflow.
    pub const TMROF: u16 = 1 << 0;
    /// PM1: global.
    pub const GBL: u16 = 1 << 5;
    /// PM1: power button.
    pub const PWRBTN: u16 = 1 << 8;
    /// PM1: real-time clock alarm.
    pub const RTC: u16 = 1 << 10;
    /// PM1_STS: woken from sleep.
    pub const WAK: u16 = 1 << 15;
    /// PM1_STS: what can be cleared.
    pub const PM1_STS_CLEAR: u16 = 0xcd31;
    /// PM1_EN: what can be written.
    pub const PM1_EN_WRITABLE: u16 = 0x4521;
    /// PM1_CNT: events raise SCI, not SMI.
    pub const SCI_EN: u16 = 1 << 0;
    /// PM1_CNT: sleep type.
    pub const SLP_TYP: u16 = 7 << 10;
    /// PM1_CNT: sleep now.
    pub const SLP_EN: u16 = 1 << 13;
    /// PM1_CNT: what can be written and stays.
    pub const PM1_CNT_WRITABLE: u16 = 0x1c03;
    /// Frequency of the timer, in Hz.
    pub const FREQUENCY: u64 = 3_579_545;
    /// The timer's width: its status is set whenever the top bit changes.
    pub const TIMER_BITS: u32 = 24;

    /// The port that firmware is called by: `SMI_CMD` in ACPI's words. The next one is its scratch byte.
    pub const APM_CNT: u64 = 0xb2;
    /// Written to APM_CNT: hand power management over to the system.
    pub const ACPI_ENABLE: u8 = 0x02;
    /// Written to APM_CNT: take it back.
    pub const ACPI_DISABLE: u8 = 0x03;

    /// RST_CNT: hard reset, not just the processor's.
    pub const SYS_RST: u8 = 1 << 1;
    /// RST_CNT: reset on a rising edge.
    pub const RST_CPU: u8 = 1 << 2;
    /// RST_CNT: with a power cycle.
    pub const FULL_RST: u8 = 1 << 3;
}
use spec::*;

/// The sleep type that ACPI tables should give for S5. All ones is ICH9's own number for it; 0, which other virtual machines use, is
/// understood too.
pub const SLEEP_TYPE_S5: u8 = 7;
/// The sleep type for S3: ICH9's own is 5; 1 is understood too.
pub const SLEEP_TYPE_S3: u8 = 5;

/// Volatile guest state.
#[derive(Debug, Clone, Default)]
struct State {
    status: u16,
    enable: u16,
    control: u16,
    gpe_status: u64,
    gpe_enable: u64,
    smi_enable: u32,
    apm_control: u8,
    apm_status: u8,
    /// The half period of the timer's top bit up to which its status has been taken note of.
    half_periods: u64,
}

/// Where the ports are mapped.
#[derive(Default)]
struct Mapping {
    base: Option<u16>,
    region: Option<IoRegion>,
}

/// The power management block.
pub struct AcpiPm {
    clock: GuestClock,
    sci: IrqLine,
    power: Arc<dyn PowerControl>,
    timer: Timer,
    ports: IoBus,
    mapping: Mutex<Mapping>,
    state: Mutex<State>,
    own: Weak<Self>,
}

impl AcpiPm {
    /// The block in its reset state; its ports are nowhere until [`Self::set_base`]. `sci` is ISA interrupt 9.
    pub fn new(
        clock: GuestClock,
        ports: IoBus,
        sci: IrqLine,
        power: Arc<dyn PowerControl>,
    ) -> Arc<Self> {
        Arc::new_cyclic(|own: &Weak<Self>| {
            let pm = own.clone();
            Self {
                timer: clock.timer(move || {
                    if let Some(pm) = pm.upgrade() {
                        pm.sync(&mut pm.state.lock());
                    }
                }),
                clock,
                sci,
                power,
                ports,
                mapping: Mutex::default(),
                state: Mutex::default(),
                own: own.clone(),
            }
        })
    }

    /// Claims the ports B2h and B3h.
    ///
    /// # Errors
    /// When something else is there.
    pub fn attach(self: &Arc<Self>) -> Result<IoRegion, IoError> {
        let handler = Arc::new(ApmPorts(self.clone()));
        self.ports.add(APM_CNT, 2, "apm", handler)
    }

    /// Moves the block's 128 ports to `base`, or takes them away, as the LPC bridge says.
    pub fn set_base(&self, base: Option<u16>) {
        let mut mapping = self.mapping.lock();
        if mapping.base == base {
            return;
        }
        mapping.region = None;
        mapping.base = base;
        let Some((base, own)) = base.zip(self.own.upgrade()) else {
            return;
        };
        let handler = Arc::new(PmPorts(Arc::downgrade(&own)));
        mapping.region = self
            .ports
            .add_movable(base.into(), PORTS, "acpi pm", handler)
            .ok();
    }

    /// Where the ports are.
    pub fn base(&self) -> Option<u16> {
        self.mapping.lock().base
    }

    /// Presses the power button.
    pub fn press_power_button(&self) {
        let mut state = self.state.lock();
        state.status |= PWRBTN;
        self.sync(&mut state);
        drop(state);
        self.power.request(PowerEvent::Wake(WakeCause::PowerButton));
    }

    /// Raises general-purpose event `number`, 0 to 63.
    pub fn raise_event(&self, number: u8) {
        let mut state = self.state.lock();
        state.gpe_status |= 1u64.checked_shl(number.into()).unwrap_or(0);
        self.sync(&mut state);
    }

    /// Does what firmware does when a system without `SMI_CMD` boots: events raise SCI from now on.
    pub fn enable_acpi(&self) {
        let mut state = self.state.lock();
        state.control |= SCI_EN;
        self.sync(&mut state);
    }

    /// The machine has been woken from a suspended state.
    pub fn note_wake(&self, cause: WakeCause) {
        let mut state = self.state.lock();
        state.status |= WAK
            | match cause {
                WakeCause::PowerButton => PWRBTN,
                WakeCause::Rtc => RTC,
                _ => 0,
            };
        self.sync(&mut state);
    }

    fn timer_ticks(&self) -> u64 {
        (u128::from(self.clock.now()) * u128::from(FREQUENCY) / 1_000_000_000) as u64
    }

    fn note_timer(&self, state: &mut State) {
        let half_periods = self.timer_ticks() >> (TIMER_BITS - 1);
        if half_periods != state.half_periods {
            state.half_periods = half_periods;
            state.status |= TMROF;
        }
    }

    /// Drives SCI and arms the timer for its next overflow.
    fn sync(&self, state: &mut State) {
        self.note_timer(state);
        let fixed = state.status & state.enable & (TMROF | GBL | PWRBTN | RTC) != 0;
        let general = state.gpe_status & state.gpe_enable != 0;
        self.sci
            .set((fixed || general) && state.control & SCI_EN != 0);
        if state.enable & TMROF != 0 && state.status & TMROF == 0 {
            let ticks = (state.half_periods + 1) << (TIMER_BITS - 1);
            let at = (u128::from(ticks) * 1_000_000_000).div_ceil(u128::from(FREQUENCY));
            self.timer.arm(u64::try_from(at).unwrap_or(u64::MAX));
        } else {
            self.timer.disarm();
        }
    }

    fn read_byte(&self, state: &State, offset: u64) -> u8 {
        let pick = |value: u64, at: u64| (value >> (8 * (offset - at))) as u8;
        match offset {
            0x00..0x02 => pick(state.status.into(), PM1_STS),
            0x02..0x04 => pick(state.enable.into(), PM1_EN),
            0x04..0x08 => pick(state.control.into(), PM1_CNT),
            0x20..0x28 => pick(state.gpe_status, GPE0_STS),
            0x28..0x30 => pick(state.gpe_enable, GPE0_EN),
            0x30..0x34 => pick(state.smi_enable.into(), SMI_EN),
            _ => 0,
        }
    }

    fn write_byte(&self, state: &mut State, offset: u64, value: u8) {
        let place = |at: u64| {
            (
                u64::from(value) << (8 * (offset - at)),
                0xffu64 << (8 * (offset - at)),
            )
        };
        match offset {
            0x00..0x02 => state.status &= !(place(PM1_STS).0 as u16 & PM1_STS_CLEAR),
            0x02..0x04 => {
                let (bits, mask) = place(PM1_EN);
                state.enable = state.enable & !(mask as u16) | bits as u16 & PM1_EN_WRITABLE;
            }
            0x04..0x06 => {
                let (bits, mask) = place(PM1_CNT);
                let kept = state.control & !(mask as u16);
                state.control = kept | bits as u16 & PM1_CNT_WRITABLE;
                if bits as u16 & SLP_EN != 0 {
                    self.sleep(state.control);
                }
            }
            0x20..0x28 => state.gpe_status &= !place(GPE0_STS).0,
            0x28..0x30 => {
                let (bits, mask) = place(GPE0_EN);
                state.gpe_enable = state.gpe_enable & !mask | bits;
            }
            0x30..0x34 => {
                let (bits, mask) = place(SMI_EN);
                state.smi_enable = state.smi_enable & !(mask as u32) | bits as u32;
            }
            _ => {}
        }
    }

    fn sleep(&self, control: u16) {
        let event = match (control & SLP_TYP) >> 10 {
            // S5, and S4, which is S5 with something on disk.
            0 | 2 | 6 | 7 => PowerEvent::Shutdown(ShutdownCause::Acpi),
            1 | 5 => PowerEvent::Suspend,
            _ => return,
        };
        self.power.request(event);
    }
}

impl Device for AcpiPm {
    fn name(&self) -> String {
        "acpi-pm".into()
    }

    fn reset(&self, _kind: ResetKind) {
        let mut state = self.state.lock();
        *state = State {
            half_periods: self.timer_ticks() >> (TIMER_BITS - 1),
            ..State::default()
        };
        self.sync(&mut state);
    }
}

/// The block's ports. They refer back weakly, since the block owns their region.
struct PmPorts(Weak<AcpiPm>);

impl IoHandler for PmPorts {
    fn widths(&self) -> Widths {
        Widths::UP_TO_DWORD
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let Some(pm) = self.0.upgrade() else {
            data.fill(0xff);
            return;
        };
        if (PM1_TMR..PM1_TMR + 4).contains(&offset) {
            let value = pm.timer_ticks() & ((1 << TIMER_BITS) - 1);
            let bytes = (value >> (8 * (offset - PM1_TMR))).to_le_bytes();
            data.copy_from_slice(&bytes[..data.len()]);
            return;
        }
        let mut state = pm.state.lock();
        pm.note_timer(&mut state);
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = pm.read_byte(&state, offset + i as u64);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(pm) = self.0.upgrade() else { return };
        let mut state = pm.state.lock();
        for (i, byte) in data.iter().enumerate() {
            pm.write_byte(&mut state, offset + i as u64, *byte);
        }
        pm.sync(&mut state);
    }
}

/// Ports B2h and B3h.
struct ApmPorts(Arc<AcpiPm>);

impl IoHandler for ApmPorts {
    fn widths(&self) -> Widths {
        Widths::BYTE
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.0.state.lock();
        data.fill(if offset == 0 {
            state.apm_control
        } else {
            state.apm_status
        });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let [value] = data else { return };
        let mut state = self.0.state.lock();
        if offset != 0 {
            state.apm_status = *value;
            return;
        }
        state.apm_control = *value;
        match *value {
            ACPI_ENABLE => state.control |= SCI_EN,
            ACPI_DISABLE => state.control &= !SCI_EN,
            _ => {}
        }
        self.0.sync(&mut state);
    }
}

/// Port CF9h: reset control. It lies inside the ports of configuration access, which hand it on.
pub struct ResetControl {
    power: Arc<dyn PowerControl>,
    value: Mutex<u8>,
}

impl ResetControl {
    /// The port in its reset state.
    pub fn new(power: Arc<dyn PowerControl>) -> Arc<Self> {
        Arc::new(Self {
            power,
            value: Mutex::new(0),
        })
    }
}

impl IoHandler for ResetControl {
    fn widths(&self) -> Widths {
        Widths::BYTE
    }

    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(*self.value.lock());
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let [value] = data else { return };
        let mut current = self.value.lock();
        let rises = value & !*current & RST_CPU != 0;
        *current = value & (SYS_RST | FULL_RST);
        if rises {
            let full = value & FULL_RST != 0;
            self.power
                .request(PowerEvent::Reset(ResetCause::Port0Cf9 { full }));
        }
    }
}

impl Device for ResetControl {
    fn name(&self) -> String {
        "reset-control".into()
    }

    fn reset(&self, _kind: ResetKind) {
        *self.value.lock() = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Line, Recorder, smoke};

    struct Bench {
        clock: GuestClock,
        ports: IoBus,
        line: Line,
        power: Arc<Recorder>,
        pm: Arc<AcpiPm>,
        _apm: IoRegion,
    }

    fn bench() -> Bench {
        let (clock, ports, line) = (GuestClock::new(), IoBus::ports(), Line::new());
        let power = Arc::new(Recorder::default());
        let pm = AcpiPm::new(clock.clone(), ports.clone(), line.line(), power.clone());
        pm.set_base(Some(0x600));
        Bench {
            _apm: pm.attach().unwrap(),
            clock,
            ports,
            line,
            power,
            pm,
        }
    }

    impl Bench {
        fn get32(&self, port: u64) -> u32 {
            let mut data = [0; 4];
            self.ports.read(port, &mut data);
            u32::from_le_bytes(data)
        }
        fn put16(&self, port: u64, value: u16) {
            self.ports.write(port, &value.to_le_bytes());
        }
    }

    #[test]
    fn the_power_button_raises_sci() {
        let b = bench();
        b.ports.write(0xb2, &[ACPI_ENABLE]);
        assert_eq!(b.get32(0x604), 1);
        b.put16(0x602, PWRBTN);
        b.pm.press_power_button();
        assert!(b.line.is_high());
        b.put16(0x600, PWRBTN);
        assert!(!b.line.is_high());
    }

    #[test]
    fn general_events_raise_sci() {
        let b = bench();
        b.pm.enable_acpi();
        b.pm.raise_event(2);
        assert!(!b.line.is_high());
        b.ports.write(0x628, &[4]);
        assert!(b.line.is_high());
        b.ports.write(0x620, &[4]);
        assert!(!b.line.is_high());
    }

    #[test]
    fn the_timer_counts_and_overflows() {
        let b = bench();
        b.clock.set(1_000_000_000);
        assert_eq!(b.get32(0x608), 3_579_545);
        b.clock.set(5_000_000_000);
        assert_eq!(b.get32(0x608), 17_897_725 - (1 << 24));
        assert_eq!(b.get32(0x600) & 1, 1);
        b.put16(0x600, 1);
        assert_eq!(b.get32(0x600) & 1, 0);
    }

    #[test]
    fn sleeping_and_resetting_ask_the_machine() {
        let b = bench();
        b.put16(0x604, SLP_EN | 7 << 10);
        b.put16(0x604, SLP_EN);
        b.put16(0x604, SLP_EN | 5 << 10);
        let reset = ResetControl::new(b.power.clone());
        reset.write(0, &[2]);
        reset.write(0, &[6]);
        assert_eq!(
            *b.power.requests.lock(),
            [
                PowerEvent::Shutdown(ShutdownCause::Acpi),
                PowerEvent::Shutdown(ShutdownCause::Acpi),
                PowerEvent::Suspend,
                PowerEvent::Reset(ResetCause::Port0Cf9 { full: false }),
            ]
        );
    }

    #[test]
    fn any_traffic_is_survived_and_reset_undoes_it() {
        let b = bench();
        smoke(&PmPorts(Arc::downgrade(&b.pm)), PORTS, &[1, 2, 4], 20_000);
        b.pm.reset(ResetKind::Cold);
        assert!(!b.line.is_high());
        assert_eq!((b.get32(0x600), b.get32(0x604), b.get32(0x628)), (0, 0, 0));
        b.pm.set_base(None);
        assert_eq!(b.get32(0x600), u32::MAX);
    }
}
