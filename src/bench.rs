//! `secondwind bench`: measures this machine, each figure beside what bounds it.

mod cpu_kernels;
mod cuda_kernels;
mod model;
mod percentiles;
mod roofline;
mod schedule;
mod serve;

use anyhow::Result;
use clap::{Args, Subcommand};
use secondwind_worker::Device;

use crate::{
    cli::{Common, block_on},
    exit::UsageError,
};

/// Flags of `bench`.
#[derive(Args, Debug)]
pub struct Flags {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Time linear layers against this machine's memory bandwidth and arithmetic
    Kernels(KernelFlags),
    /// Time prompts and decoding of a model, or of one of random weights, on one card or more
    Model(model::ModelFlags),
    /// Replay requests on the scheduler alone, with a cost model of two P40
    Schedule(schedule::ScheduleFlags),
    /// Load a server with requests, one of its own unless --url names another: latencies and throughput
    Serve(serve::ServeFlags),
}

/// Flags of `bench kernels`.
#[derive(Args, Debug)]
struct KernelFlags {
    /// `cpu`, or `cuda:N` for a card
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    /// CPU threads [default: one per core]
    #[arg(long, value_name = "N")]
    threads: Option<std::num::NonZeroUsize>,
    #[command(flatten)]
    card: CardFlags,
    /// Also draw the card's roofline into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<std::path::PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// How a card is used.
#[derive(Args, Debug, Default)]
pub struct CardFlags {
    /// Run the code of an older architecture, such as `sm_61`
    #[arg(long, value_name = "ARCH")]
    arch_override: Option<String>,
    /// Kernel pack [default: the installed one, else compiled and kept]
    #[arg(long, value_name = "FILE")]
    kernel_pack: Option<std::path::PathBuf>,
}

impl CardFlags {
    /// Opens card `ordinal`.
    pub fn open(&self, ordinal: usize) -> Result<secondwind_kernels::cuda::Device> {
        use secondwind_kernels::cuda::{Arch, Device, PackSource};
        let arch = self
            .arch_override
            .as_deref()
            .map(str::parse::<Arch>)
            .transpose();
        let arch = arch.map_err(|error| UsageError::one(format!("--arch-override: {error}")))?;
        let source = PackSource {
            pack: self.kernel_pack.clone(),
            nvrtc: None,
            cache: crate::worker::cache_directory(),
        };
        let note = |text: String| tracing::info!("{text}");
        Ok(Device::open(ordinal, arch, &source, note)?)
    }
}

/// Runs the command.
pub fn run(flags: Flags, common: Common) -> Result<()> {
    match flags.what {
        What::Kernels(flags) => {
            common.start_logging()?;
            kernels(&flags)
        }
        What::Model(flags) => {
            common.start_logging()?;
            model::run(&flags)
        }
        What::Schedule(flags) => {
            common.start_logging()?;
            schedule::run(&flags)
        }
        What::Serve(flags) => block_on(serve::run(flags, common)),
    }
}

fn kernels(flags: &KernelFlags) -> Result<()> {
    match flags.device.parse() {
        Ok(Device::Cpu) if flags.svg.is_some() => {
            Err(UsageError::one("--svg: the roofline is drawn for cards, --device cuda:N").into())
        }
        Ok(Device::Cpu) => cpu_kernels::run(flags.threads, flags.json),
        Ok(Device::Cuda(ordinal)) => {
            let device = flags.card.open(ordinal)?;
            cuda_kernels::run(&device, flags.json, flags.svg.as_deref())
        }
        Err(why) => Err(UsageError::one(format!("--device: {why}")).into()),
    }
}
