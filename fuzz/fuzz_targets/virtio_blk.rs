#![no_main]

use corten_fuzz::virtio_devices::{Kind, device};

libfuzzer_sys::fuzz_target!(|data: &[u8]| device(Kind::Blk, data));
