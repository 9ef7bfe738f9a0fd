//! Nothing behind the line.

use std::sync::Weak;
use std::time::Duration;

use device_model::{CharBackend, CharFrontend};

/// Output is thrown away, and there is no input.
#[derive(Debug, Default)]
pub struct Null;

impl CharBackend for Null {
    fn connect(&self, _frontend: Weak<dyn CharFrontend>) {}

    fn write(&self, data: &[u8]) -> usize {
        data.len()
    }

    fn accept_input(&self) {}

    fn is_open(&self) -> bool {
        false
    }

    fn drain(&self, _at_most: Duration) {}
}
