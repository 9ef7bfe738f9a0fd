//! Network backends: the user-mode stack, tap.
