//! The terminal that the process was started from.

use std::io::IsTerminal;
use std::os::fd::AsFd;

use parking_lot::Mutex;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// The settings to go back to.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// True when standard input is a terminal.
pub fn is_terminal() -> bool {
    std::io::stdin().is_terminal()
}

/// Puts the terminal into raw mode, so that every key reaches the guest. [`restore`] undoes it, and so does a panic. Does
/// nothing when standard input is none, or when it has been done.
///
/// # Errors
/// When the host refuses.
pub fn make_raw() -> std::io::Result<()> {
    let mut saved = SAVED.lock();
    if saved.is_some() || !is_terminal() {
        return Ok(());
    }
    let stdin = std::io::stdin();
    let before = tcgetattr(stdin.as_fd())?;
    let mut raw = before.clone();
    raw.make_raw();
    tcsetattr(stdin.as_fd(), OptionalActions::Now, &raw)?;
    *saved = Some(before);
    drop(saved);
    let next = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        next(info);
    }));
    Ok(())
}

/// Puts the terminal back into the settings from before [`make_raw`].
pub fn restore() {
    // A panic while the lock is held must not wait for itself.
    let Some(mut saved) = SAVED.try_lock() else {
        return;
    };
    if let Some(before) = saved.take() {
        let _ = tcsetattr(std::io::stdin().as_fd(), OptionalActions::Now, &before);
    }
}
