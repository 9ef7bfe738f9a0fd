//! What the machine asks of all devices alike.

/// How a device is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResetKind {
    /// As after power-on: all but what a battery or the configuration keeps is lost.
    Cold,
    /// The platform reset without loss of power (port CF9h, the keyboard controller, a triple fault): what lies in
    /// a suspend well may survive.
    Warm,
}

/// A device as the machine sees it.
pub trait Device: Send + Sync {
    /// A short name for messages, such as `serial0`.
    fn name(&self) -> String;
    /// Puts the guest-visible state into its reset state, drops work that is under way, and drives outputs accordingly. The vCPUs
    /// stand still. Devices are reset before the interrupt controllers that their lines end in.
    fn reset(&self, kind: ResetKind);
}
