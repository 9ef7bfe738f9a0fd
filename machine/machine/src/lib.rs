//! Boards, firmware tables, loaders, the run loop.

pub mod firmware;
pub mod loader;
pub mod memory_map;
