//! Guest buffers in the forms that the block layer and links take.

#![allow(unsafe_code)] // Both forms are raw views of guest memory.

use std::sync::Arc;

use block::{IoBuf, KeepAlive, Segment};
use guest_memory::{Backing, GuestSlice};
use smallvec::SmallVec;

use crate::queue::Buffers;

/// The buffers as one transfer buffer of the block layer; nothing is copied. Who lets it be written calls
/// [`Buffers::written`] afterwards.
pub(crate) fn io_buf(buffers: &Buffers) -> IoBuf {
    let slices = buffers.slices();
    let segments: SmallVec<[Segment; 4]> = slices
        .iter()
        .map(|slice| Segment {
            address: slice.as_ptr(),
            length: slice.len(),
        })
        .collect();
    // SAFETY: each segment is a slice of a backing, which stays mapped, readable and writable, while the backing lives;
    // `keep_alive` holds every one of them. Nobody makes references into guest memory.
    unsafe { IoBuf::from_raw(&segments, keep_alive(slices)) }
}

/// Holds the memory of all slices; nearly always that is one backing.
fn keep_alive(slices: &[GuestSlice]) -> KeepAlive {
    let Some((first, rest)) = slices.split_first() else {
        return Arc::new(());
    };
    if rest
        .iter()
        .all(|s| Arc::ptr_eq(s.backing(), first.backing()))
    {
        return first.backing().clone();
    }
    let mut backings: Vec<Arc<Backing>> = Vec::new();
    for slice in slices {
        if !backings.iter().any(|b| Arc::ptr_eq(b, slice.backing())) {
            backings.push(slice.backing().clone());
        }
    }
    Arc::new(backings)
}
