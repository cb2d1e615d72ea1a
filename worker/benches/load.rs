//! Loading against reading, and memory held against memory planned, on a synthetic checkpoint.
//!
//! `cargo bench -p secondwind-worker --bench load [-- SIZE]`, where SIZE is a Qwen2.5 size (0.5b). The
//! files are in the page cache when they are read, so the figures are about work, not about a disk.

use std::{process::Command, time::Instant};

use secondwind_model::{
    checkpoint::Checkpoint,
    plan::{self, KvDType, LmHead, PlanSettings, Precision},
    slices::{byte_runs, slices},
    synthetic::SyntheticModel,
};
use secondwind_worker::{backend::CpuBackend, loader, measure_cpu, session::peak_resident_bytes};

/// Set for the child processes that load one rank each, so that their peak is their own.
const RANK: &str = "SECONDWIND_BENCH_RANK";

fn main() {
    let size = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with('-'));
    let size = size.unwrap_or_else(|| "0.5b".into());
    if let Ok(rank) = std::env::var(RANK) {
        return child(&size, &rank);
    }
    let model = SyntheticModel::qwen2_5(&size).expect("a size of Qwen2.5");
    let folder = tempfile::tempdir().expect("a folder for the checkpoint");
    model.write(folder.path()).expect("a checkpoint is written");
    // Nothing is measured while the system still writes.
    for file in folder.path().read_dir().expect("a folder").flatten() {
        let file = std::fs::File::open(file.path()).expect("a file");
        file.sync_all().expect("it is written");
    }
    println!("Qwen2.5-{size}, int4, one thread");
    println!("rank     read MB  reading GB/s  loading GB/s  load of read  planned MiB  peak MiB");
    for rank in ["0/1", "0/2", "1/2"] {
        let status = Command::new(std::env::current_exe().expect("this program"))
            .env(RANK, format!("{rank} {}", folder.path().display()))
            .arg(&size)
            .status();
        assert!(
            status.is_ok_and(|status| status.success()),
            "rank {rank} failed"
        );
    }
}

fn child(size: &str, rank: &str) {
    let (rank, folder) = rank.split_once(' ').expect("a rank and a folder");
    let (rank, world) = rank.split_once('/').expect("a rank of a world");
    let (rank, world): (usize, usize) =
        (rank.parse().expect("rank"), world.parse().expect("world"));
    let checkpoint = Checkpoint::open(folder.as_ref()).expect("it opens");
    let shape = checkpoint.shape().expect("it has a shape");
    let capabilities = measure_cpu(&shape, 1, None).expect("capabilities");
    let settings = PlanSettings {
        max_context_tokens: 1024,
        max_sequences: 4,
        max_step_tokens: 256,
        max_logit_rows: 64,
        block_tokens: 16,
        kv_dtype: KvDType::F32,
        precision: Precision::Exact,
        lm_head: LmHead::Fp16,
        memory_reserve_bytes: 0,
        forced_split: Some(vec![1.0; world]),
    };
    let plan = plan::plan(&shape, &settings, &vec![capabilities; world]).expect("a plan");
    // Brings the files into the page cache.
    read(&checkpoint, &shape, &plan, rank, false);
    let (bytes, reading) = read(&checkpoint, &shape, &plan, rank, true);
    // Starts the peak anew.
    std::fs::write("/proc/self/clear_refs", "5").expect("a Linux kernel");
    let mut backend = CpuBackend::new(1, None, None).expect("a backend");
    let start = Instant::now();
    let parts = loader::load(&mut backend, &checkpoint, &plan, rank, |_, _| true);
    let loading = start.elapsed().as_secs_f64();
    let parts = parts.expect("it loads");
    let peak = peak_resident_bytes();
    drop(parts);
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!(
        "{rank}/{world}  {:>10.0}  {:>12.2}  {:>12.2}  {:>10.0} %  {:>11.0}  {:>8.0}   ({size})",
        bytes as f64 / 1e6,
        bytes as f64 / reading / 1e9,
        bytes as f64 / loading / 1e9,
        100.0 * reading / loading,
        mib(plan.ranks[rank].memory.total()),
        mib(peak),
    );
}

/// Reads what a rank needs, as plainly as can be, and keeps it if asked to: bytes and seconds.
fn read(
    checkpoint: &Checkpoint,
    shape: &plan::ModelShape,
    plan: &plan::ShardPlan,
    rank: usize,
    keep: bool,
) -> (u64, f64) {
    let start = Instant::now();
    let mut kept = Vec::new();
    let mut bytes = 0;
    for tensor in slices(shape, plan, rank)
        .iter()
        .flat_map(|slice| &slice.tensors)
    {
        let info = checkpoint.tensor(&tensor.name).expect("a tensor");
        let element = info.dtype.bytes() as usize;
        let mut buffer = vec![0; tensor.elements() * element];
        let mut rest = buffer.as_mut_slice();
        for run in byte_runs(
            tensor.shape,
            element,
            tensor.rows.clone(),
            tensor.columns.clone(),
        ) {
            let (now, later) = rest.split_at_mut((run.end - run.start) as usize);
            checkpoint.read_at(info, run.start, now).expect("bytes");
            rest = later;
        }
        bytes += buffer.len() as u64;
        if keep {
            kept.push(buffer);
        }
    }
    (bytes, start.elapsed().as_secs_f64())
}
