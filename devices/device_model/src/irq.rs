//! Interrupt wires and messages.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

/// The inputs of an interrupt controller, or anything else that wires end in.
pub trait IrqSink: Send + Sync {
    /// The level of input number `pin` is now `high`. Called on changes only, one call at a time for each pin.
    fn set_level(&self, pin: u32, high: bool);
}

/// Takes interrupts that are sent as messages: writes of `data` to `address` in the local APICs' space.
pub trait MsiSink: Send + Sync {
    /// Sends a message. Does not block and does not call back into devices.
    fn send(&self, address: u64, data: u32);
}

struct Pin {
    sink: Arc<dyn IrqSink>,
    number: u32,
    /// How many lines hold the pin high.
    raised: Mutex<u32>,
}

/// One input of an [`IrqSink`]. Several lines may end in it; it is high while any of them is. Clones are handles to the same pin.
#[derive(Clone)]
pub struct IrqPin(Arc<Pin>);

impl IrqPin {
    /// Input number `number` of `sink`. Make one for each input and share it: two pins for one input would fight.
    pub fn new(sink: Arc<dyn IrqSink>, number: u32) -> Self {
        Self(Arc::new(Pin {
            sink,
            number,
            raised: Mutex::new(0),
        }))
    }

    /// A new line that ends in this pin; low.
    pub fn line(&self) -> IrqLine {
        IrqLine {
            pin: Some(self.clone()),
            high: AtomicBool::new(false),
        }
    }

    /// True while any line is high.
    pub fn is_high(&self) -> bool {
        *self.0.raised.lock() > 0
    }

    /// Sets a line, counts it and tells the sink of a change: all under the pin's lock, so that changes arrive in order.
    fn count(&self, line: &AtomicBool, high: bool) {
        let mut raised = self.0.raised.lock();
        if line.swap(high, Ordering::SeqCst) == high {
            return;
        }
        let before = *raised > 0;
        *raised = if high { *raised + 1 } else { *raised - 1 };
        let after = *raised > 0;
        if before != after {
            self.0.sink.set_level(self.0.number, after);
        }
    }
}

impl fmt::Debug for IrqPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IrqPin({})", self.0.number)
    }
}

/// A device's interrupt output. Dropping it lets the wire go low.
pub struct IrqLine {
    pin: Option<IrqPin>,
    high: AtomicBool,
}

impl IrqLine {
    /// A line that ends nowhere.
    pub fn unconnected() -> Self {
        Self {
            pin: None,
            high: AtomicBool::new(false),
        }
    }

    /// Sets the level. Setting the level that it has is cheap and does nothing.
    pub fn set(&self, high: bool) {
        if self.high.load(Ordering::Relaxed) == high {
            return;
        }
        match &self.pin {
            Some(pin) => pin.count(&self.high, high),
            None => self.high.store(high, Ordering::SeqCst),
        }
    }

    /// Drives it high and low again: one edge.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }

    /// The level that this line drives.
    pub fn is_high(&self) -> bool {
        self.high.load(Ordering::SeqCst)
    }
}

impl fmt::Debug for IrqLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IrqLine")
            .field("pin", &self.pin)
            .field("high", &self.high)
            .finish()
    }
}

impl Drop for IrqLine {
    fn drop(&mut self) {
        self.set(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Log(Mutex<Vec<(u32, bool)>>);
    impl IrqSink for Log {
        fn set_level(&self, pin: u32, high: bool) {
            self.0.lock().push((pin, high));
        }
    }

    #[test]
    fn lines_are_wired_or() {
        let log = Arc::new(Log::default());
        let pin = IrqPin::new(log.clone(), 10);
        let (a, b) = (pin.line(), pin.line());
        a.set(true);
        b.set(true);
        a.set(true);
        a.set(false);
        assert!(pin.is_high());
        drop(b);
        assert!(!pin.is_high());
        a.pulse();
        assert_eq!(
            *log.0.lock(),
            [(10, true), (10, false), (10, true), (10, false)]
        );
        IrqLine::unconnected().set(true);
    }
}
