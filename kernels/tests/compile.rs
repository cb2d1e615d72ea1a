//! Every kernel, compiled for every architecture that it is built for, without a GPU: what each takes of
//! a card is held against a reviewed table, `kernels/cuda/usage.txt`. Without NVRTC the tests are listed
//! as ignored; `SECONDWIND_WORKER_NVRTC_LIBRARY` names one, `UPDATE_USAGE=1` writes the table anew.

use std::{env, fmt::Write, fs, path::PathBuf, process::Command, sync::OnceLock};

use libtest_mimic::{Arguments, Failed, Trial};
use rayon::prelude::*;
use secondwind_kernels::cuda::{Arch, Form, Nvrtc, Pack, Usage};

/// The compiler whose figures the table has.
const VERSION: (i32, i32) = (12, 6);
const TABLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/cuda/usage.txt");

type Check = fn() -> Result<(), Failed>;

struct Compiled {
    pack: Pack,
    usage: Vec<(Arch, &'static str, Usage)>,
}

fn main() {
    let library = env::var_os("SECONDWIND_WORKER_NVRTC_LIBRARY").map(PathBuf::from);
    let missing = Nvrtc::open(library.as_deref())
        .err()
        .map(|error| error.to_string());
    let ptxas = env::var_os("PTXAS");
    let no_ptxas = ptxas.is_none().then(|| "PTXAS names no ptxas".to_owned());
    let tests: [(&str, Check, Option<String>); 4] = [
        (
            "usage is as reviewed",
            usage_is_as_reviewed,
            missing.clone(),
        ),
        (
            "blocks fit every card",
            blocks_fit_every_card,
            missing.clone(),
        ),
        (
            "no half arithmetic on 6.1",
            no_half_arithmetic,
            missing.clone(),
        ),
        (
            "ptx assembles under its stamp",
            ptx_assembles,
            missing.or(no_ptxas),
        ),
    ];
    let trials = tests
        .into_iter()
        .map(|(name, test, missing)| {
            let trial = Trial::test(name, test);
            match missing {
                Some(why) => trial.with_ignored_flag(true).with_kind(why),
                None => trial,
            }
        })
        .collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

fn compiled() -> &'static Compiled {
    static COMPILED: OnceLock<Compiled> = OnceLock::new();
    COMPILED.get_or_init(|| {
        let library = env::var_os("SECONDWIND_WORKER_NVRTC_LIBRARY").map(PathBuf::from);
        let nvrtc = Nvrtc::open(library.as_deref()).expect("it was there a moment ago");
        assert_eq!(nvrtc.version(), VERSION, "the table is of another NVRTC");
        let mut usage = Vec::new();
        let pack = Pack::build(&nvrtc, &Arch::ALL, |unit, arch, kernels| {
            usage.extend(kernels.iter().cloned().map(|kernel| (arch, unit, kernel)));
        });
        Compiled {
            pack: pack.expect("every unit compiles"),
            usage,
        }
    })
}

fn usage_is_as_reviewed() -> Result<(), Failed> {
    let mut table = String::from("# arch unit kernel registers shared spilled stack\n");
    for (arch, unit, usage) in &compiled().usage {
        let Usage {
            kernel,
            registers,
            shared_bytes,
            spill_bytes,
            stack_bytes,
        } = usage;
        writeln!(
            table,
            "{arch} {unit} {kernel} {registers} {shared_bytes} {spill_bytes} {stack_bytes}"
        )?;
    }
    if env::var_os("UPDATE_USAGE").is_some() {
        fs::write(TABLE, table)?;
        return Ok(());
    }
    let reviewed = fs::read_to_string(TABLE)?;
    let changed: Vec<String> = table
        .lines()
        .filter(|line| !reviewed.lines().any(|other| other == *line))
        .map(str::to_owned)
        .collect();
    if changed.is_empty() && table.len() == reviewed.len() {
        return Ok(());
    }
    Err(format!(
        "UPDATE_USAGE=1 writes these, if they are as they should be:\n{}",
        changed.join("\n")
    )
    .into())
}

/// Registers of a block fit a multiprocessor, static shared memory needs no asking, and what runs for
/// every token on the oldest cards does not spill.
fn blocks_fit_every_card() -> Result<(), Failed> {
    const HOT: [(Arch, &str); 9] = [
        (Arch::Sm60, "attention/decode_split"),
        (Arch::Sm61, "attention/decode_split"),
        (Arch::Sm61, "linear/a8_dp4a_gemv"),
        (Arch::Sm61, "linear/a8_dp4a_gemm"),
        (Arch::Sm75, "attention/decode_split"),
        (Arch::Sm61, "linear/dense"),
        (Arch::Sm60, "linear/a16_half2"),
        (Arch::Sm60, "linear/a16_f32_gemv"),
        (Arch::Sm61, "linear/a16_f32_gemv"),
    ];
    for (arch, unit, usage) in &compiled().usage {
        let what = format!("{arch} {}", usage.kernel);
        if usage.shared_bytes as usize > arch.static_shared_bytes() {
            return Err(format!("{what}: {} bytes of shared memory", usage.shared_bytes).into());
        }
        if HOT.contains(&(*arch, *unit)) && usage.spill_bytes > 0 {
            return Err(format!("{what}: {} bytes are spilled", usage.spill_bytes).into());
        }
    }
    Ok(())
}

/// 6.1 runs half arithmetic at a 64th of its rate: only conversions, loads, stores and moves may name it. On 6.0 one
/// path has it, and the measurement of its peak.
fn no_half_arithmetic() -> Result<(), Failed> {
    for arch in [Arch::Sm60, Arch::Sm61] {
        for (unit, code) in compiled().pack.codes(arch, Form::Ptx) {
            if arch == Arch::Sm60 && ["linear/a16_half2", "bench/peak"].contains(&unit) {
                continue;
            }
            let text = String::from_utf8_lossy(&code.bytes);
            let found = text.lines().map(str::trim).find(|line| {
                let opcode = line.split_whitespace().next().unwrap_or_default();
                let harmless = ["cvt.", "ld.", "st.", "mov.", ".reg", ".param"];
                (opcode.contains(".f16") || opcode.contains(".bf16"))
                    && !harmless.iter().any(|start| opcode.starts_with(start))
            });
            if let Some(line) = found {
                return Err(format!("{arch} {unit}: {line}").into());
            }
        }
    }
    Ok(())
}

/// A driver takes no PTX that is newer than itself, so the stamp is as old as can be.
fn ptx_assembles() -> Result<(), Failed> {
    let ptxas = env::var_os("PTXAS").ok_or("no ptxas")?;
    let folder = tempfile::tempdir()?;
    let assembles = |(arch, unit, bytes): (Arch, &str, &[u8])| -> Result<(), Failed> {
        let name = format!("{}-{arch}.ptx", unit.replace('/', "-"));
        let path = folder.path().join(name);
        fs::write(&path, bytes)?;
        // Without optimisation: whether it assembles does not depend on it.
        let output = Command::new(&ptxas)
            .args(["-O0", "-arch", arch.name(), "-o", "/dev/null"])
            .arg(&path)
            .output()?;
        if output.status.success() {
            return Ok(());
        }
        let words = String::from_utf8_lossy(&output.stderr);
        let first = words.lines().next().unwrap_or_default();
        Err(format!("{arch} {unit}: {first}").into())
    };
    let codes = |arch| {
        let codes = compiled().pack.codes(arch, Form::Ptx);
        codes.map(move |(unit, code)| (arch, unit, code.bytes.as_slice()))
    };
    let all: Vec<_> = Arch::ALL.into_iter().flat_map(codes).collect();
    all.into_par_iter().try_for_each(assembles)
}
