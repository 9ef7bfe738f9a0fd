//! A 16550A serial port.
//!
//! National Semiconductor PC16550D datasheet (document TL/C/8652), section 8. Characters take no time on the wire: the
//! transmitter is empty again as soon as the backend has taken a byte, and a byte that was received is there at once.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use device_model::{
    CharBackend, CharEvent, CharFrontend, Device, IoBus, IoError, IoHandler, IoRegion, IrqLine,
    ResetKind, Widths,
};
use parking_lot::Mutex;

/// Registers by offset, and their bits.
pub mod spec {
    /// Receiver buffer (read), transmitter holding (write), divisor low (DLAB).
    pub const RBR_THR_DLL: u64 = 0;
    /// Interrupt enable, divisor high (DLAB).
    pub const IER_DLM: u64 = 1;
    /// Interrupt identification (read), FIFO control (write).
    pub const IIR_FCR: u64 = 2;
    /// Line control.
    pub const LCR: u64 = 3;
    /// Modem control.
    pub const MCR: u64 = 4;
    /// Line status.
    pub const LSR: u64 = 5;
    /// Modem status.
    pub const MSR: u64 = 6;
    /// Scratch.
    pub const SCR: u64 = 7;

    /// IER: received data.
    pub const IER_RDI: u8 = 0x01;
    /// IER: transmitter holding register empty.
    pub const IER_THRI: u8 = 0x02;
    /// IER: line status.
    pub const IER_RLSI: u8 = 0x04;
    /// IER: modem status.
    pub const IER_MSI: u8 = 0x08;
    /// IIR: nothing pending.
    pub const IIR_NONE: u8 = 0x01;
    /// IIR: modem status.
    pub const IIR_MSI: u8 = 0x00;
    /// IIR: transmitter holding register empty.
    pub const IIR_THRI: u8 = 0x02;
    /// IIR: received data.
    pub const IIR_RDI: u8 = 0x04;
    /// IIR: line status.
    pub const IIR_RLSI: u8 = 0x06;
    /// IIR: characters wait below the trigger level.
    pub const IIR_TIMEOUT: u8 = 0x0c;
    /// IIR: FIFOs are on.
    pub const IIR_FIFO: u8 = 0xc0;
    /// FCR: FIFOs on.
    pub const FCR_ENABLE: u8 = 0x01;
    /// FCR: clear the receive FIFO.
    pub const FCR_CLEAR_RX: u8 = 0x02;
    /// FCR: clear the transmit FIFO.
    pub const FCR_CLEAR_TX: u8 = 0x04;
    /// FCR: bits that stay: enable, DMA mode and trigger level.
    pub const FCR_KEPT: u8 = 0xc9;
    /// LCR: break control.
    pub const LCR_BREAK: u8 = 0x40;
    /// LCR: divisor latch access.
    pub const LCR_DLAB: u8 = 0x80;
    /// MCR: data terminal ready.
    pub const MCR_DTR: u8 = 0x01;
    /// MCR: request to send.
    pub const MCR_RTS: u8 = 0x02;
    /// MCR: auxiliary output 1.
    pub const MCR_OUT1: u8 = 0x04;
    /// MCR: auxiliary output 2, which lets interrupts out on PCs.
    pub const MCR_OUT2: u8 = 0x08;
    /// MCR: loopback.
    pub const MCR_LOOP: u8 = 0x10;
    /// LSR: data ready.
    pub const LSR_DR: u8 = 0x01;
    /// LSR: overrun.
    pub const LSR_OE: u8 = 0x02;
    /// LSR: break.
    pub const LSR_BI: u8 = 0x10;
    /// LSR: transmitter holding register empty.
    pub const LSR_THRE: u8 = 0x20;
    /// LSR: transmitter empty.
    pub const LSR_TEMT: u8 = 0x40;
    /// LSR: the bits that raise the line status interrupt.
    pub const LSR_ERRORS: u8 = 0x1e;
    /// MSR: clear to send.
    pub const MSR_CTS: u8 = 0x10;
    /// MSR: data set ready.
    pub const MSR_DSR: u8 = 0x20;
    /// MSR: ring.
    pub const MSR_RI: u8 = 0x40;
    /// MSR: carrier.
    pub const MSR_DCD: u8 = 0x80;
    /// MSR: ring has ended.
    pub const MSR_TERI: u8 = 0x04;
    /// MSR: the change bits.
    pub const MSR_DELTAS: u8 = 0x0f;
}
use spec::*;

/// Bytes in each FIFO.
pub const FIFO_SIZE: usize = 16;
/// Ports of a serial port.
pub const PORTS: u64 = 8;
/// The PC's places for serial ports: first port and ISA interrupt, for COM1 to COM4.
pub const PC_PORTS: [(u64, usize); 4] = [(0x3f8, 4), (0x2f8, 3), (0x3e8, 4), (0x2e8, 3)];

const TRIGGER_LEVELS: [usize; 4] = [1, 4, 8, 14];
/// 9600 baud at the PC's 1.8432 MHz.
const RESET_DIVISOR: u16 = 12;

/// Volatile guest state.
#[derive(Debug, Clone)]
struct State {
    divisor: u16,
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    /// The error bits of the line status register; the others are derived.
    lsr_errors: u8,
    msr: u8,
    scr: u8,
    /// An empty transmitter has yet to be reported.
    thr_pending: bool,
    rx: VecDeque<u8>,
    tx: VecDeque<u8>,
}

impl State {
    fn new(carrier: bool) -> Self {
        let mut state = Self {
            divisor: RESET_DIVISOR,
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: MCR_OUT2,
            lsr_errors: 0,
            msr: 0,
            scr: 0,
            thr_pending: false,
            rx: VecDeque::with_capacity(FIFO_SIZE),
            tx: VecDeque::with_capacity(FIFO_SIZE),
        };
        state.msr = state.modem_inputs(carrier);
        state
    }

    fn fifo(&self) -> bool {
        self.fcr & FCR_ENABLE != 0
    }

    fn capacity(&self) -> usize {
        if self.fifo() { FIFO_SIZE } else { 1 }
    }

    fn lsr(&self) -> u8 {
        let ready = if self.rx.is_empty() { 0 } else { LSR_DR };
        let empty = if self.tx.is_empty() {
            LSR_THRE | LSR_TEMT
        } else {
            0
        };
        self.lsr_errors | ready | empty
    }

    /// The modem's lines as the port sees them now.
    fn modem_inputs(&self, carrier: bool) -> u8 {
        if self.mcr & MCR_LOOP == 0 {
            return MSR_CTS | MSR_DSR | if carrier { MSR_DCD } else { 0 };
        }
        [
            (MCR_RTS, MSR_CTS),
            (MCR_DTR, MSR_DSR),
            (MCR_OUT1, MSR_RI),
            (MCR_OUT2, MSR_DCD),
        ]
        .iter()
        .filter(|(out, _)| self.mcr & out != 0)
        .fold(0, |lines, (_, line)| lines | line)
    }

    fn update_modem(&mut self, carrier: bool) {
        let now = self.modem_inputs(carrier);
        let changed = (self.msr ^ now) & 0xf0;
        let mut deltas = changed >> 4;
        // The ring indicator reports its trailing edge only.
        if now & MSR_RI != 0 {
            deltas &= !MSR_TERI;
        }
        self.msr = now | self.msr & MSR_DELTAS | deltas;
    }

    /// The highest interrupt that is pending and enabled.
    fn interrupt(&self) -> u8 {
        let trigger = if self.fifo() {
            TRIGGER_LEVELS[usize::from(self.fcr >> 6)]
        } else {
            1
        };
        if self.ier & IER_RLSI != 0 && self.lsr_errors & LSR_ERRORS != 0 {
            IIR_RLSI
        } else if self.ier & IER_RDI != 0 && self.rx.len() >= trigger {
            IIR_RDI
        } else if self.ier & IER_RDI != 0 && !self.rx.is_empty() {
            IIR_TIMEOUT
        } else if self.ier & IER_THRI != 0 && self.thr_pending {
            IIR_THRI
        } else if self.ier & IER_MSI != 0 && self.msr & MSR_DELTAS != 0 {
            IIR_MSI
        } else {
            IIR_NONE
        }
    }

    fn push_received(&mut self, byte: u8) {
        if self.rx.len() < self.capacity() {
            self.rx.push_back(byte);
        } else {
            self.lsr_errors |= LSR_OE;
            // Without FIFOs the new character replaces the old one; a full FIFO keeps what it has.
            if !self.fifo() {
                self.rx.clear();
                self.rx.push_back(byte);
            }
        }
    }
}

/// A serial port.
pub struct Serial {
    name: String,
    irq: IrqLine,
    backend: Arc<dyn CharBackend>,
    state: Mutex<State>,
}

impl Serial {
    /// A serial port in its reset state whose other end is `backend`.
    pub fn new(name: &str, irq: IrqLine, backend: Arc<dyn CharBackend>) -> Arc<Self> {
        let carrier = backend.is_open();
        let serial = Arc::new(Self {
            name: name.to_owned(),
            irq,
            backend,
            state: Mutex::new(State::new(carrier)),
        });
        let frontend: Weak<dyn CharFrontend> = Arc::<Self>::downgrade(&serial);
        serial.backend.connect(frontend);
        serial
    }

    /// Claims the eight ports from `base` on.
    ///
    /// # Errors
    /// When something else is there.
    pub fn attach(self: &Arc<Self>, ports: &IoBus, base: u64) -> Result<IoRegion, IoError> {
        ports.add(base, PORTS, &self.name, self.clone())
    }

    /// Drives the interrupt output from the state.
    fn sync(&self, state: &State) {
        // In loopback OUT2 is inside the chip, and the pin that gates the interrupt is inactive.
        let gate = state.mcr & MCR_OUT2 != 0 && state.mcr & MCR_LOOP == 0;
        self.irq.set(gate && state.interrupt() != IIR_NONE);
    }

    /// Hands what waits in the transmitter to the backend.
    fn transmit(&self, state: &mut State) {
        if state.tx.is_empty() {
            return;
        }
        state.tx.make_contiguous();
        let taken = self.backend.write(state.tx.as_slices().0);
        state.tx.drain(..taken.min(state.tx.len()));
        if state.tx.is_empty() {
            state.thr_pending = true;
        }
    }

    fn write_data(&self, state: &mut State, byte: u8) {
        state.thr_pending = false;
        if state.mcr & MCR_LOOP != 0 {
            state.push_received(byte);
            state.thr_pending = true;
            return;
        }
        if state.tx.len() < state.capacity() {
            state.tx.push_back(byte);
        } else if let Some(last) = state.tx.back_mut() {
            // A write that did not wait for an empty register overwrites it.
            *last = byte;
        }
        self.transmit(state);
    }

    fn read_data(&self, state: &mut State) -> u8 {
        let byte = state.rx.pop_front().unwrap_or(0);
        if state.rx.is_empty() {
            self.backend.accept_input();
        }
        byte
    }

    fn write_fifo_control(&self, state: &mut State, value: u8) {
        let switched = (state.fcr ^ value) & FCR_ENABLE != 0;
        let before = state.rx.len();
        if switched || value & FCR_CLEAR_RX != 0 {
            state.rx.clear();
            state.lsr_errors &= !LSR_BI;
        }
        if switched || value & FCR_CLEAR_TX != 0 {
            state.tx.clear();
            state.thr_pending = true;
        }
        state.fcr = if value & FCR_ENABLE != 0 {
            value & FCR_KEPT
        } else {
            0
        };
        if before > 0 && state.rx.is_empty() {
            self.backend.accept_input();
        }
    }

    fn read_register(&self, state: &mut State, offset: u64) -> u8 {
        let latch = state.lcr & LCR_DLAB != 0;
        let [low, high] = state.divisor.to_le_bytes();
        match offset {
            RBR_THR_DLL if latch => low,
            RBR_THR_DLL => self.read_data(state),
            IER_DLM if latch => high,
            IER_DLM => state.ier,
            IIR_FCR => {
                let id = state.interrupt();
                if id == IIR_THRI {
                    state.thr_pending = false;
                }
                id | if state.fifo() { IIR_FIFO } else { 0 }
            }
            LCR => state.lcr,
            MCR => state.mcr,
            LSR => {
                let value = state.lsr();
                state.lsr_errors = 0;
                value
            }
            MSR => {
                let value = state.msr;
                state.msr &= !MSR_DELTAS;
                value
            }
            SCR => state.scr,
            _ => 0xff,
        }
    }

    fn write_register(&self, state: &mut State, offset: u64, value: u8) {
        let latch = state.lcr & LCR_DLAB != 0;
        match offset {
            RBR_THR_DLL if latch => {
                state.divisor = state.divisor & 0xff00 | u16::from(value);
            }
            RBR_THR_DLL => self.write_data(state, value),
            IER_DLM if latch => {
                state.divisor = state.divisor & 0x00ff | u16::from(value) << 8;
            }
            IER_DLM => {
                let enabled = value & 0x0f & !state.ier;
                state.ier = value & 0x0f;
                // Enabling the interrupt while the register is empty raises it.
                if enabled & IER_THRI != 0 && state.tx.is_empty() {
                    state.thr_pending = true;
                }
            }
            IIR_FCR => self.write_fifo_control(state, value),
            LCR => state.lcr = value,
            MCR => {
                state.mcr = value & 0x1f;
                state.update_modem(self.backend.is_open());
            }
            SCR => state.scr = value,
            _ => {}
        }
    }
}

impl IoHandler for Serial {
    fn widths(&self) -> Widths {
        Widths::BYTE
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.state.lock();
        data.fill(self.read_register(&mut state, offset));
        self.sync(&state);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.state.lock();
        if let [value] = data {
            self.write_register(&mut state, offset, *value);
        }
        self.sync(&state);
    }
}

impl CharFrontend for Serial {
    fn receive(&self, data: &[u8]) -> usize {
        let mut state = self.state.lock();
        if state.mcr & MCR_LOOP != 0 {
            return data.len(); // the receiver hears the transmitter only
        }
        let room = state.capacity().saturating_sub(state.rx.len());
        let taken = room.min(data.len());
        state.rx.extend(&data[..taken]);
        self.sync(&state);
        taken
    }

    fn writable(&self) {
        let mut state = self.state.lock();
        self.transmit(&mut state);
        self.sync(&state);
    }

    fn event(&self, event: CharEvent) {
        let mut state = self.state.lock();
        match event {
            CharEvent::Opened => state.update_modem(true),
            CharEvent::Closed => state.update_modem(false),
            CharEvent::Break => {
                state.push_received(0);
                state.lsr_errors |= LSR_BI;
            }
        }
        self.sync(&state);
    }
}

impl Device for Serial {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn reset(&self, _kind: ResetKind) {
        let mut state = self.state.lock();
        *state = State::new(self.backend.is_open());
        self.sync(&state);
        drop(state);
        self.backend.accept_input();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Line, MemoryBackend, smoke};

    fn port() -> (Arc<Serial>, Arc<MemoryBackend>, Line) {
        let line = Line::new();
        let backend = Arc::new(MemoryBackend::default());
        (
            Serial::new("serial0", line.line(), backend.clone()),
            backend,
            line,
        )
    }

    fn get(serial: &Serial, offset: u64) -> u8 {
        let mut data = [0];
        serial.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn linux_takes_it_for_a_16550a() {
        let (s, _, _) = port();
        s.write(IER_DLM, &[0]);
        assert_eq!(get(&s, IER_DLM), 0);
        s.write(IER_DLM, &[0xff]);
        assert_eq!(get(&s, IER_DLM), 0x0f);
        s.write(IER_DLM, &[0]);
        s.write(MCR, &[MCR_LOOP | 0x0a]);
        assert_eq!(get(&s, MSR) & 0xf0, 0x90);
        s.write(MCR, &[0]);
        s.write(IIR_FCR, &[FCR_ENABLE]);
        assert_eq!(get(&s, IIR_FCR) >> 6, 3);
    }

    #[test]
    fn an_empty_transmitter_interrupts_when_asked_for() {
        let (s, backend, line) = port();
        s.write(MCR, &[MCR_OUT2]);
        for _ in 0..2 {
            s.write(IER_DLM, &[IER_THRI]);
            assert!(line.is_high());
            assert_eq!(get(&s, IIR_FCR), IIR_THRI);
            assert!(!line.is_high());
            assert_eq!(get(&s, IIR_FCR), IIR_NONE);
            s.write(IER_DLM, &[0]);
        }
        s.write(IER_DLM, &[IER_THRI]);
        get(&s, IIR_FCR);
        s.write(RBR_THR_DLL, b"x");
        assert!(line.is_high());
        assert_eq!(backend.output(), b"x");
    }

    #[test]
    fn a_full_backend_holds_the_transmitter() {
        let (s, backend, _) = port();
        s.write(IIR_FCR, &[FCR_ENABLE]);
        backend.set_room(1);
        for byte in b"abc" {
            s.write(RBR_THR_DLL, &[*byte]);
        }
        assert_eq!(get(&s, LSR) & LSR_THRE, 0);
        backend.set_room(100);
        s.writable();
        assert_eq!(get(&s, LSR) & LSR_THRE, LSR_THRE);
        assert_eq!(backend.output(), b"abc");
    }

    #[test]
    fn received_bytes_wait_at_the_backend_when_the_fifo_is_full() {
        let (s, backend, line) = port();
        s.write(IIR_FCR, &[FCR_ENABLE | 0xc0]);
        s.write(MCR, &[MCR_OUT2]);
        s.write(IER_DLM, &[IER_RDI]);
        let input: Vec<u8> = (1..=20).collect();
        assert_eq!(s.receive(&input[..3]), 3);
        assert_eq!(get(&s, IIR_FCR), IIR_TIMEOUT | IIR_FIFO);
        assert_eq!(s.receive(&input[3..]), 13);
        assert_eq!(get(&s, IIR_FCR), IIR_RDI | IIR_FIFO);
        assert!(line.is_high());
        for byte in &input[..16] {
            assert_eq!(get(&s, RBR_THR_DLL), *byte);
        }
        assert!(!line.is_high());
        assert_eq!(get(&s, LSR) & LSR_DR, 0);
        assert!(backend.asked_for_input());
    }

    #[test]
    fn a_break_is_seen_in_the_line_status() {
        let (s, _, line) = port();
        s.write(MCR, &[MCR_OUT2]);
        s.write(IER_DLM, &[IER_RLSI]);
        s.event(CharEvent::Break);
        assert!(line.is_high());
        assert_eq!(get(&s, IIR_FCR), IIR_RLSI);
        assert_eq!(get(&s, LSR) & LSR_BI, LSR_BI);
        assert_eq!(get(&s, LSR) & LSR_BI, 0);
        assert!(!line.is_high());
    }

    #[test]
    fn any_traffic_is_survived_and_reset_undoes_it() {
        let (s, _, line) = port();
        smoke(&*s, PORTS, &[1], 20_000);
        s.reset(ResetKind::Cold);
        assert!(!line.is_high());
        let values: Vec<u8> = (1..8).map(|offset| get(&s, offset)).collect();
        assert_eq!(values, [0, 1, 0, 8, 0x60, 0xb0, 0]);
    }
}
