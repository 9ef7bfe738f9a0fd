#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| corten_fuzz::option_texts::options(data));
