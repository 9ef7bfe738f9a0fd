//! How devices ask the machine for what only it can do.

/// Why the guest powers off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShutdownCause {
    /// ACPI S5 by `PM1a_CNT` or its reduced-hardware equivalent.
    Acpi,
    /// The guest's debug exit device, with its status.
    DebugExit(u32),
    /// `pvpanic`'s shutdown bit.
    PvPanic,
}

/// Why the guest resets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResetCause {
    /// Port CF9h; `full` when it asks for a power cycle.
    Port0Cf9 {
        /// Hard reset with a power cycle.
        full: bool,
    },
    /// The keyboard controller's pulse of its output line.
    KeyboardController,
    /// Port 92h.
    FastA20,
    /// A watchdog.
    Watchdog,
    /// ACPI's reset register or another platform register.
    Platform,
}

/// Why a sleeping guest wakes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WakeCause {
    /// The power button.
    PowerButton,
    /// The real-time clock's alarm.
    Rtc,
    /// A general-purpose event.
    GeneralPurposeEvent,
    /// Keyboard or another legacy device.
    Other,
}

/// What `pvpanic` was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PanicKind {
    /// The guest has panicked.
    Panicked,
    /// The guest has panicked and handles the crash itself (kdump).
    CrashLoaded,
}

/// What a device asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerEvent {
    /// Power off.
    Shutdown(ShutdownCause),
    /// Reset the platform.
    Reset(ResetCause),
    /// The guest says that it has panicked; what follows is policy.
    Panic(PanicKind),
    /// Suspend to memory (S3).
    Suspend,
    /// Leave a suspended state.
    Wake(WakeCause),
}

/// The machine's ear for [`PowerEvent`]s. Called on a vCPU's or a timer's thread, possibly with the device's lock held: takes note,
/// and acts later on another thread.
pub trait PowerControl: Send + Sync {
    /// Takes note of a request.
    fn request(&self, event: PowerEvent);
}
