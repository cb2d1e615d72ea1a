//! Any bytes as any message between coordinator and workers are read, or refused, and lose nothing.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| secondwind_proto::fuzz::wire(input));
