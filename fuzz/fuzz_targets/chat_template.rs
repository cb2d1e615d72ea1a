//! Any chat template over any chat ends soon, with a text or an error.
//!
//! The memory of values that a template builds is not limited, so run it with
//! `-fork=1 -ignore_ooms=1`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use secondwind_coordinator::text::template::fuzz;

fuzz_target!(
    // The fuzzer's hook would abort on panics of the template engine, which are caught and reported.
    init: drop(std::panic::take_hook()),
    |data: &[u8]| fuzz(data)
);
