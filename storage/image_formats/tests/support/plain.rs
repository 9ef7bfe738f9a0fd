//! Operations on images of any format, and the same on a plain model.

use std::rc::Rc;

use block::{CacheMode, Disk, DiskOptions, IoBuf, Medium, ZeroFlags};
use image_formats::{External, Image, ImageOptions, NewImage, Opener, create_file, resolve_name};
use proptest::prelude::*;

use super::pattern;

/// One operation of a guest, or of a person on the image.
#[derive(Debug, Clone)]
pub enum Step {
    Write {
        at: u64,
        length: u64,
        value: u8,
    },
    Zero {
        at: u64,
        length: u64,
        unmap: bool,
    },
    Discard {
        at: u64,
        length: u64,
    },
    Flush,
    Reopen,
    /// The size changes to this.
    Resize(u64),
    /// The writes are in flight together, each to another place.
    Burst {
        at: u64,
        value: u8,
    },
}

/// Steps on a disk of `size` bytes with sectors of `sector` bytes; `most` sectors at once.
pub fn steps(size: u64, sector: u64, most: u64) -> impl Strategy<Value = Step> {
    let range = move || {
        // Mostly at the beginning, so that operations meet.
        let at = prop_oneof![0..size / sector, 0..(size / sector).min(256)];
        (at, 1..most).prop_map(move |(at, n)| (at * sector, (n * sector).min(size - at * sector)))
    };
    prop_oneof![
        8 => (range(), 1u8..).prop_map(|((at, length), value)| Step::Write { at, length, value }),
        3 => (range(), any::<bool>()).prop_map(|((at, length), unmap)| Step::Zero { at, length, unmap }),
        2 => range().prop_map(|(at, length)| Step::Discard { at, length }),
        3 => Just(Step::Flush),
        1 => Just(Step::Reopen),
        1 => (range(), any::<u8>()).prop_map(|((at, _), value)| Step::Burst { at, value }),
    ]
}

fn options(format: &str, write: bool) -> ImageOptions {
    ImageOptions {
        format: Some(format.to_owned()),
        write,
        external: External::Follow,
        lock: false,
        ..ImageOptions::default()
    }
}

/// A gate that opens whatever an image of this format names.
pub fn gate(format: &str) -> Opener {
    Opener::new(options(format, true))
}

/// Opens what is in `medium`.
pub async fn open(medium: &Rc<dyn Medium>, format: &str) -> Image {
    let opened = gate(format).open_format(medium.clone()).await;
    opened.unwrap()
}

/// Makes an image in `medium`.
pub async fn create(medium: &Rc<dyn Medium>, new: &NewImage) {
    for file in new.files(&medium.name()) {
        create_file(&resolve_name(&medium.name(), &file), CacheMode::Unsafe).unwrap();
    }
    let gate = gate(new.format());
    new.create(medium, &gate, || [7; 16]).await.unwrap();
}

pub fn disk(image: &Image) -> Disk {
    let options = DiskOptions {
        discard: true,
        ..DiskOptions::default()
    };
    Disk::new(image.backend.clone(), options)
}

pub async fn content(image: &Image) -> Vec<u8> {
    let disk = disk(image);
    let buffer = IoBuf::zeroed(disk.size() as usize);
    if !buffer.is_empty() {
        disk.read(0, buffer.clone()).await.unwrap();
    }
    buffer.to_vec()
}

/// Runs one step on both. Returns the image, which may have been opened anew.
pub async fn run(
    medium: &Rc<dyn Medium>,
    image: Image,
    model: &mut Vec<u8>,
    step: &Step,
    sector: u64,
) -> Image {
    let d = disk(&image);
    let range = |at: u64, length: u64| at as usize..(at + length) as usize;
    match step {
        Step::Write { at, length, value } => {
            let bytes = pattern(*value, *length, *at);
            let buffer = IoBuf::from_slice(&bytes);
            d.write(*at, buffer, false).await.unwrap();
            model[range(*at, *length)].copy_from_slice(&bytes);
        }
        Step::Zero { at, length, unmap } => {
            let flags = if *unmap {
                ZeroFlags::MAY_UNMAP
            } else {
                ZeroFlags::empty()
            };
            d.write_zeroes(*at, *length, flags, false).await.unwrap();
            model[range(*at, *length)].fill(0);
        }
        Step::Discard { at, length } => {
            d.discard(*at, *length).await.unwrap();
            // Either content is right; the model follows what the disk chose.
            let buffer = IoBuf::zeroed(*length as usize);
            d.read(*at, buffer.clone()).await.unwrap();
            for (n, sector) in buffer.to_vec().chunks(512).enumerate() {
                let place = range(at + n as u64 * 512, 512);
                let is_zero = sector.iter().all(|b| *b == 0);
                let is_old = sector == &model[place.clone()];
                assert!(is_zero || is_old, "discard made up data");
                model[place].copy_from_slice(sector);
            }
        }
        Step::Flush => d.flush().await.unwrap(),
        Step::Reopen => {
            image.backend.close().await.unwrap();
            let format = image.backend.format_name();
            drop(d);
            drop(image);
            return open(medium, format).await;
        }
        Step::Resize(size) => {
            d.resize(*size).await.unwrap();
            model.resize(*size as usize, 0);
        }
        Step::Burst { at, value } => {
            let d = Rc::new(d);
            let mut tasks = Vec::new();
            for n in 0..12u64 {
                let start = at + n * 97 * sector;
                if start + 2 * sector > model.len() as u64 {
                    break;
                }
                let bytes = pattern(value.wrapping_add(n as u8), 2 * sector, start);
                model[range(start, 2 * sector)].copy_from_slice(&bytes);
                let d = d.clone();
                tasks.push(block::executor::spawn_local(async move {
                    let buffer = IoBuf::from_slice(&bytes);
                    d.write(start, buffer, n == 7).await.unwrap();
                }));
            }
            for task in tasks {
                task.await;
            }
        }
    }
    image
}
