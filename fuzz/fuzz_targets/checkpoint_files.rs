//! Any two files as config.json and model.safetensors open, or are refused, without a panic.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| secondwind_model::fuzz::checkpoint_files(input));
