//! Any GPTQ tensors of any small shape are read, or refused, and what is read is in range.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| secondwind_model::fuzz::gptq_tensors(input));
