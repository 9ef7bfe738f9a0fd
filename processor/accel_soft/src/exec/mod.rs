//! Integer instructions.

mod alu;
mod arith;
mod bcd;
mod bits;
mod branch;
mod dispatch;
mod moves;
mod multiply;
mod port;
mod select;
mod shift;
mod stack;
mod string;
#[cfg(test)]
mod tests;
mod various;

pub(crate) use branch::end_of_block;
pub(crate) use select::{select, undefined};
