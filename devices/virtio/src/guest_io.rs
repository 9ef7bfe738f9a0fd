//! Guest buffers in the forms that the block layer and links take.

#![allow(unsafe_code)] // Both forms are raw views of guest memory.

use std::io::{IoSlice, IoSliceMut};
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

/// Adds the buffers from `skip` bytes on to a list for `writev`.
pub(crate) fn io_slices<'a, const N: usize>(
    buffers: &'a Buffers,
    skip: usize,
    list: &mut SmallVec<[IoSlice<'a>; N]>,
) {
    let mut skip = skip;
    for slice in buffers.slices() {
        let at = skip.min(slice.len());
        skip -= at;
        if at < slice.len() {
            // SAFETY: the slice lies in a live mapping for as long as `buffers` is borrowed. The bytes may change under the
            // reader, and the seam of network links says so: they are copied before they are looked at.
            let bytes =
                unsafe { std::slice::from_raw_parts(slice.as_ptr().add(at), slice.len() - at) };
            list.push(IoSlice::new(bytes));
        }
    }
}

/// Adds the buffers from `skip` bytes on to a list for `readv`. Who lets it be written calls [`Buffers::written`] afterwards.
pub(crate) fn io_slices_mut<'a, const N: usize>(
    buffers: &'a mut Buffers,
    skip: usize,
    list: &mut SmallVec<[IoSliceMut<'a>; N]>,
) {
    let mut skip = skip;
    for slice in buffers.slices() {
        let at = skip.min(slice.len());
        skip -= at;
        if at < slice.len() {
            // SAFETY: as in `io_slices`. A guest may name the same bytes twice; links only copy into the pieces, one after
            // the other, and never read them.
            let bytes =
                unsafe { std::slice::from_raw_parts_mut(slice.as_ptr().add(at), slice.len() - at) };
            list.push(IoSliceMut::new(bytes));
        }
    }
}
