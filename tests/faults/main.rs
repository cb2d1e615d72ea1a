//! Faults: daemons in network namespaces of their own, and schedules of what is done to them that follow from a seed.
//!
//! `FAULT_SCHEDULES` says how many run, `FAULT_SEED` runs one again, `FAULT_COLLECTIVE=nccl` takes two cards. A
//! run of 200 or more writes its table into `docs/reliability.md`. Everything lives in namespaces of a process that
//! this one starts: no process, link or mount outlives it. Needs root and iproute2.

mod clients;
mod daemon;
mod drill;
mod network;
mod proxy;
mod rack;
#[path = "../soak/random.rs"]
mod random;
mod report;
mod schedule;

use std::{
    os::unix::process::CommandExt,
    process::{Command, ExitCode},
    sync::{Arc, Mutex},
    time::Instant,
};

use libtest_mimic::{Arguments, Failed, Trial};
use tokio::runtime::Runtime;

use crate::{
    daemon::Kind,
    drill::Ground,
    report::Report,
    schedule::{Fault, Schedule},
};

/// What CI has the time for: eight faults, two in each phase.
const SCHEDULES: u64 = 8;
/// As many and their table is worth keeping.
const WHOLE: u64 = 200;
/// Set in the process that has the namespaces.
const INSIDE: &str = "FAULT_INSIDE";
/// New namespaces for what follows; all in them ends with it.
const NAMESPACES: [&str; 6] = [
    "--net",
    "--mount",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
];

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // One rack serves all schedules.
    arguments.test_threads = Some(1);
    let kind = match std::env::var("FAULT_COLLECTIVE").as_deref() {
        Err(_) | Ok("grpc") => Kind::Grpc,
        Ok("nccl") => Kind::Nccl,
        Ok(other) => panic!("FAULT_COLLECTIVE: {other:?} is not grpc or nccl"),
    };
    let missing = missing("ip link add probe type bridge");
    if missing.is_none() && !arguments.list && std::env::var_os(INSIDE).is_none() {
        inside();
    }
    if missing.is_none() && !arguments.list {
        network::bridge().expect("namespaces of its own take a bridge");
    }
    let seeds = match number("FAULT_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("FAULT_SCHEDULES").unwrap_or(SCHEDULES),
    };
    let no_netem = missing_netem();
    let run = Arc::new(Mutex::new(Run::default()));
    let trials = seeds.clone().map(|seed| {
        let schedule = Schedule::new(seed, kind.world());
        let netem = no_netem.as_ref().filter(|_| schedule.fault == Fault::Netem);
        let why = missing.as_ref().or(netem);
        let name = match why {
            Some(why) => format!("{schedule} ({why})"),
            None => schedule.to_string(),
        };
        let run = Arc::clone(&run);
        Trial::test(name, move || drill(&run, kind, &schedule)).with_ignored_flag(why.is_some())
    });
    // The wall clock is the whole machine's: no namespace has one of its own.
    let clock = Trial::test(
        "the wall clock jumps (it belongs to the whole machine)",
        || Ok(()),
    )
    .with_ignored_flag(true);
    let trials: Vec<Trial> = trials.chain([clock]).collect();
    let began = Instant::now();
    let conclusion = libtest_mimic::run(&arguments, trials);
    let schedules = seeds.end - seeds.start;
    if schedules >= WHOLE && !conclusion.has_failed() && missing.is_none() && !arguments.list {
        let run = run.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Err(error) = run.report.write(schedules, began.elapsed()) {
            eprintln!("docs/reliability.md: {error:#}");
            return ExitCode::FAILURE;
        }
    }
    conclusion.exit_code()
}

/// What schedules share.
#[derive(Default)]
struct Run {
    /// Built for the first schedule, and after one that failed.
    ground: Option<(Runtime, Ground)>,
    report: Report,
}

fn drill(run: &Mutex<Run>, kind: Kind, schedule: &Schedule) -> Result<(), Failed> {
    let mut run = run.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let (runtime, mut ground) = match run.ground.take() {
        Some(ground) => ground,
        None => {
            let runtime = Runtime::new()?;
            let ground = runtime.block_on(Ground::new(kind));
            (
                runtime,
                ground.map_err(|error| Failed::from(format!("{error:#}")))?,
            )
        }
    };
    match runtime.block_on(ground.run(schedule)) {
        Ok(waited) => {
            run.report.add(schedule.fault, schedule.phase, waited);
            run.ground = Some((runtime, ground));
            Ok(())
        }
        Err(error) => Err(Failed::from(format!(
            "{schedule}\n{error:#}\n{}",
            ground.logs()
        ))),
    }
}

/// Becomes this program again, where it may do as it likes.
fn inside() -> ! {
    let program = std::env::current_exe().expect("a program has a path");
    let error = Command::new("unshare")
        .args(NAMESPACES)
        .arg(program)
        .args(std::env::args_os().skip(1))
        .env(INSIDE, "1")
        .exec();
    panic!("unshare: {error}")
}

/// Why a command fails in namespaces of its own.
fn missing(command: &str) -> Option<String> {
    let probe = Command::new("unshare")
        .args(NAMESPACES)
        .args(command.split_whitespace())
        .output();
    match probe {
        Err(error) => Some(format!("unshare: {error}")),
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
    }
}

fn missing_netem() -> Option<String> {
    missing("tc qdisc add dev lo root netem delay 1ms")
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|_| panic!("{variable}: {text:?} is not a number")))
}
