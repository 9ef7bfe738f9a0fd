//! What every device is built from: register regions, interrupt lines, reset.
