#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| corten_fuzz::user_network::conversation(data));
