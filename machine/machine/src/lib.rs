//! Boards, firmware tables, loaders, the run loop.
//!
//! [`run()`] builds a machine from a [`vm_spec::VmSpec`] alone and runs it to its end. The board (`board`) wires devices to
//! buses and interrupt controllers; `lifecycle` runs, parks and resets the vCPUs; [`loader`] and [`firmware`] put
//! into memory what a kernel expects to find there.

mod board;
mod chars;
pub mod cpu_model;
mod disks;
mod error;
mod event_rate;
pub mod firmware;
mod io;
mod jobs;
mod lifecycle;
pub mod loader;
pub mod memory_map;
mod nets;
mod processor;
mod run;
mod signals;
mod statistics;

pub use error::MachineError;
pub use run::{Outcome, RunOptions, run};
