#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    // One executor for each input: what it leaves behind is bounded by the fuzzer's own runs.
    let _ = block::executor::block_on(corten_fuzz::nbd_peers::server(data.to_vec()));
});
