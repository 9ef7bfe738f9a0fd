//! Bare-metal guests for the conformance suite.
