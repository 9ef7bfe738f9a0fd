//! Decoded blocks and their cache.

mod cache;
mod decode;

pub(crate) use cache::{Block, BlockCache, Link, MAX_OPS, NO_GENERATION, Second};
pub(crate) use decode::{FAR, FAR_SLOT, decode, decoder_options};
