//! Every operation on a card against its CPU twin, by the code of every architecture that the card
//! can run, over odd sizes. Without a card every test is listed as ignored.

#[path = "../common/mod.rs"]
mod common;

mod attention;
mod linear;
mod one_shot;
mod ops;

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use common::Random;
use libtest_mimic::{Arguments, Failed, Trial};
use secondwind_kernels::cuda::{Arch, Device, Memory, PackSource, device_count};

/// The check that [`CARD`] is for.
const ALONE: &str = "sums over ranks";

type Check = fn(&Device, &mut Random) -> Result<(), String>;

/// Ranks that share a card wait for each other on it, so nothing else may wait for the card meanwhile.
static CARD: RwLock<()> = RwLock::new(());

fn main() {
    let arguments = Arguments::from_args();
    let missing = match device_count() {
        Ok(0) => Some("the driver sees no card".to_owned()),
        Ok(_) => None,
        Err(error) => Some(error.to_string()),
    };
    let checks: &[(&str, Check)] = &[
        ("embed and take_rows", ops::embed),
        ("rms_norm", ops::rms_norm),
        ("silu_mul", ops::silu),
        ("quantised linears", linear::quantised),
        ("linears of far magnitudes", linear::far_apart),
        ("dense linears", linear::dense),
        ("grouped linears", linear::grouped),
        ("rope_kv and attention", attention::paths),
        ("sampling", ops::sampling),
        ("adjusted logits", ops::adjusting),
        ("masked logits", ops::masking),
        ("guard", linear::guard),
        (ALONE, one_shot::sums),
    ];
    let mut trials = Vec::new();
    for arch in [
        Some(Arch::Sm60),
        Some(Arch::Sm61),
        Some(Arch::Sm70),
        Some(Arch::Sm75),
        None,
    ] {
        // One device for the tests of an architecture: loading its PTX takes the driver seconds.
        let device: Arc<Mutex<Option<Arc<Device>>>> = Arc::default();
        for &(what, check) in checks {
            let name = format!("{}: {what}", arch.map_or("own code", Arch::name));
            let device = device.clone();
            let trial = Trial::test(name, move || match what {
                ALONE => {
                    let _alone = CARD.write().unwrap_or_else(PoisonError::into_inner);
                    run(&device, arch, check)
                }
                _ => {
                    let _shared = CARD.read().unwrap_or_else(PoisonError::into_inner);
                    run(&device, arch, check)
                }
            });
            trials.push(match &missing {
                Some(why) => trial.with_ignored_flag(true).with_kind(why),
                None => trial,
            });
        }
    }
    libtest_mimic::run(&arguments, trials).exit();
}

fn run(
    device: &Mutex<Option<Arc<Device>>>,
    arch: Option<Arch>,
    check: Check,
) -> Result<(), Failed> {
    let device = {
        let mut held = device.lock().unwrap_or_else(PoisonError::into_inner);
        match &*held {
            Some(device) => device.clone(),
            None => {
                let source = PackSource {
                    pack: std::env::var_os("SECONDWIND_WORKER_KERNEL_PACK").map(Into::into),
                    ..PackSource::default()
                };
                let opened = Arc::new(Device::open(0, arch, &source, |_| {})?);
                held.insert(opened).clone()
            }
        }
    };
    device.bind()?;
    let seed = std::env::var("SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or(1);
    let outcome = check(&device, &mut Random(seed));
    outcome.map_err(|what| format!("{what} (SEED={seed})").into())
}

/// The cases that run: every `EVERY`th, for sanitizers, which take long over each.
fn some<T>(cases: impl Iterator<Item = T>) -> impl Iterator<Item = T> {
    let every = std::env::var("EVERY").ok();
    let every = every.and_then(|every| every.parse().ok()).unwrap_or(1);
    cases.step_by(usize::max(every, 1))
}

fn told<E: std::fmt::Display>(error: E) -> String {
    error.to_string()
}

fn download(device: &Device, memory: &Memory<f32>, len: usize) -> Result<Vec<f32>, String> {
    let mut values = vec![f32::NAN; len];
    device.read(memory, 0, &mut values).map_err(told)?;
    Ok(values)
}

/// Device memory full of NaN: what is not written is seen.
fn poisoned(device: &Device, len: usize) -> Result<Memory<f32>, String> {
    let memory = device.zeros(len, "a test").map_err(told)?;
    device.fill(&memory, 0xff).map_err(told)?;
    Ok(memory)
}

/// `actual` within `tolerance` of `expected`, each element relative to its own `size`.
fn close(
    what: &str,
    actual: &[f32],
    expected: impl ExactSizeIterator<Item = (f64, f64)>,
    tolerance: f64,
) -> Result<(), String> {
    if actual.len() != expected.len() {
        return Err(format!(
            "{what}: {} values for {}",
            actual.len(),
            expected.len()
        ));
    }
    for (index, (&actual, (value, size))) in actual.iter().zip(expected).enumerate() {
        let error = (f64::from(actual) - value).abs();
        // A NaN is within no tolerance.
        if error.is_nan() || error > tolerance * size.max(1e-6) {
            return Err(format!(
                "{what}: element {index} is {actual}, expected {value} of size {size}"
            ));
        }
    }
    Ok(())
}
