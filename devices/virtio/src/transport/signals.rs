//! From a device to its driver: interrupts, ISR status, configuration generation.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use parking_lot::Mutex;

use super::spec::{ISR_CONFIG, ISR_QUEUE, NO_VECTOR};
use crate::device::DeviceEvents;
use crate::queue::{QueueError, QueueEvents};

/// How a device's function interrupts: a PCI function by messages or a pin, a memory-mapped device by a pin.
pub trait FunctionInterrupts: Send + Sync {
    /// True while MSI-X is enabled: then there are messages only.
    fn msix_enabled(&self) -> bool;
    /// Sends MSI-X message number `vector`, or makes it pending while it is masked.
    fn message(&self, vector: u16);
    /// Sets the level of the function's interrupt pin.
    fn set_level(&self, high: bool);
}

/// The state that device threads and vCPUs share without a lock.
pub(super) struct Signals {
    // Configuration.
    interrupts: Arc<dyn FunctionInterrupts>,
    // Volatile guest state.
    /// Between `DRIVER_OK` and reset.
    pub(super) driver_ok: AtomicBool,
    pub(super) needs_reset: AtomicBool,
    pub(super) config_vector: AtomicU16,
    pub(super) queue_vectors: Vec<AtomicU16>,
    generation: AtomicU8,
    isr: AtomicU8,
    /// What went wrong last, for people.
    failure: Mutex<Option<String>>,
}

impl Signals {
    pub(super) fn new(interrupts: Arc<dyn FunctionInterrupts>, queues: usize) -> Self {
        Self {
            interrupts,
            driver_ok: AtomicBool::new(false),
            needs_reset: AtomicBool::new(false),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            generation: AtomicU8::new(0),
            isr: AtomicU8::new(0),
            failure: Mutex::new(None),
        }
    }

    fn interrupt(&self, cause: u8, vector: &AtomicU16) {
        if self.interrupts.msix_enabled() {
            let vector = vector.load(Ordering::Acquire);
            if vector != NO_VECTOR {
                self.interrupts.message(vector);
            }
        } else {
            self.isr.fetch_or(cause, Ordering::SeqCst);
            self.interrupts.set_level(true);
        }
    }

    fn config_interrupt(&self) {
        if self.driver_ok.load(Ordering::Acquire) {
            self.interrupt(ISR_CONFIG, &self.config_vector);
        }
    }

    /// Reads ISR status, which clears it and lowers the pin.
    pub(super) fn take_isr(&self) -> u8 {
        let isr = self.isr();
        self.acknowledge(isr);
        isr
    }

    /// ISR status, left as it is.
    pub(super) fn isr(&self) -> u8 {
        self.isr.load(Ordering::SeqCst)
    }

    /// The driver has seen these causes; the pin falls with the last one (section 4.2.2, `InterruptACK`).
    pub(super) fn acknowledge(&self, causes: u8) {
        self.isr.fetch_and(!causes, Ordering::SeqCst);
        self.interrupts.set_level(false);
        // One that is left, or was raised between the two lines above.
        if self.isr.load(Ordering::SeqCst) != 0 {
            self.interrupts.set_level(true);
        }
    }

    /// The host has refused something that the device can't do without.
    pub(super) fn host_failure(&self, error: &std::io::Error) {
        *self.failure.lock() = Some(error.to_string());
        self.needs_reset.store(true, Ordering::SeqCst);
        self.config_interrupt();
    }

    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn failure(&self) -> Option<String> {
        self.failure.lock().clone()
    }

    /// The reset state. The device's threads are quiet.
    pub(super) fn reset(&self) {
        self.driver_ok.store(false, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
        self.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
        self.isr.store(0, Ordering::SeqCst);
        self.interrupts.set_level(false);
    }
}

impl QueueEvents for Signals {
    fn used(&self, index: u16) {
        if let Some(vector) = self.queue_vectors.get(usize::from(index)) {
            self.interrupt(ISR_QUEUE, vector);
        }
    }

    fn failed(&self, index: u16, error: &QueueError) {
        *self.failure.lock() = Some(format!("queue {index}: {error}"));
        self.needs_reset.store(true, Ordering::SeqCst);
        self.config_interrupt();
    }
}

impl DeviceEvents for Signals {
    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.config_interrupt();
    }
}
