//! Signals that end the machine in good order.

use std::sync::mpsc::Sender;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::MachineError;
use crate::lifecycle::Request;

/// Turns SIGTERM, SIGINT and SIGHUP into requests to end. A file that grows past the process's limit (SIGXFSZ) is an error of the
/// disk whose image it is, not the end of the machine.
pub(crate) fn serve(requests: Sender<Request>) -> Result<(), MachineError> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, libc::SIGXFSZ])
        .map_err(|e| MachineError::host("signal handlers", e))?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for signal in signals.forever() {
                if signal != libc::SIGXFSZ && requests.send(Request::Terminate).is_err() {
                    return;
                }
            }
        })
        .map_err(|e| MachineError::host("a thread for signals", e))?;
    Ok(())
}
