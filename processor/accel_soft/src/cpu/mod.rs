//! The state of a software CPU and what every instruction needs.

mod access;
mod fault;
mod flags;
mod machine;
mod mode;
mod op;
mod registers;
mod state;

pub(crate) use access::{Access, Mapping, Value};
pub(crate) use fault::{Exception, Fault, Result};
pub(crate) use flags::{STATUS, Status};
pub(crate) use machine::{Counters, Machine, Published, VcpuShared};
pub(crate) use mode::{Mode, Privilege};
pub(crate) use op::{
    Ea, FLAT, FLAT_STACK, Flow, Handler, Op, fault, gpr, instruction, last_instruction, leave,
};
pub(crate) use registers::{BLOCK_RIP, RegisterFile, ZERO};
pub(crate) use state::{Cpu, Waiting};
