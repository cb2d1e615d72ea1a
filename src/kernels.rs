//! `secondwind kernels`: the CUDA kernels as a pack, as files, and what they take of a card.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use secondwind_kernels::cuda::{Arch, CudaError, Form, Nvrtc, Pack, Usage};
use serde::Serialize;

use crate::{cli::Common, exit::UsageError, output};

/// Flags of `kernels`.
#[derive(Args, Debug)]
pub struct Flags {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Compile every kernel into a pack, so that a host needs no compiler
    Build(BuildFlags),
    /// Print registers, shared memory and spills of every kernel
    Report(ReportFlags),
}

/// What is compiled, and with what.
#[derive(Args, Debug)]
struct Compilation {
    /// Architectures, such as `sm_61,sm_75` [default: all]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    arch: Vec<String>,
    /// libnvrtc.so to compile with [default: libnvrtc.so.12 as the linker finds it]
    #[arg(long, value_name = "FILE")]
    nvrtc_library: Option<PathBuf>,
}

/// Flags of `kernels build`.
#[derive(Args, Debug)]
struct BuildFlags {
    #[command(flatten)]
    compilation: Compilation,
    /// The pack to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Also write every cubin and PTX as a file into this folder
    #[arg(long, value_name = "DIR")]
    emit: Option<PathBuf>,
}

/// Flags of `kernels report`.
#[derive(Args, Debug)]
struct ReportFlags {
    #[command(flatten)]
    compilation: Compilation,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// One kernel on one architecture.
#[derive(Serialize)]
struct Row {
    arch: &'static str,
    unit: &'static str,
    #[serde(flatten)]
    usage: Usage,
}

#[derive(Serialize)]
struct Report {
    nvrtc: String,
    kernels: Vec<Row>,
}

/// Runs the command.
pub fn run(flags: Flags, common: Common) -> Result<()> {
    common.start_logging()?;
    match flags.what {
        What::Build(flags) => build(&flags),
        What::Report(flags) => report(&flags),
    }
}

fn build(flags: &BuildFlags) -> Result<()> {
    let (_, pack, rows) = flags.compilation.compile()?;
    pack.write(&flags.out)?;
    if let Some(folder) = &flags.emit {
        emit(&pack, folder)?;
    }
    let bytes = fs::metadata(&flags.out).map_or(0, |file| file.len());
    output::print_line(&format!(
        "{}: {} kernels, {}",
        flags.out.display(),
        rows.len(),
        output::bytes(bytes)
    ))
}

/// Every code as `ARCH/UNIT.cubin` and `ARCH/UNIT.ptx`.
fn emit(pack: &Pack, folder: &Path) -> Result<()> {
    for arch in Arch::ALL {
        for (form, extension) in [(Form::Cubin, "cubin"), (Form::Ptx, "ptx")] {
            for (unit, code) in pack.codes(arch, form) {
                let name = format!("{}.{extension}", unit.replace('/', "_"));
                let path = folder.join(arch.name()).join(name);
                let parent = path.parent().unwrap_or(folder);
                fs::create_dir_all(parent)
                    .and_then(|()| fs::write(&path, &code.bytes))
                    .with_context(|| format!("cannot write {}", path.display()))?;
            }
        }
    }
    Ok(())
}

fn report(flags: &ReportFlags) -> Result<()> {
    let (nvrtc, _, kernels) = flags.compilation.compile()?;
    if flags.json {
        return output::print_line(&serde_json::to_string(&Report { nvrtc, kernels })?);
    }
    let rows: Vec<Vec<String>> = kernels
        .iter()
        .map(|row| {
            vec![
                row.arch.to_owned(),
                row.unit.to_owned(),
                row.usage.kernel.clone(),
                row.usage.registers.to_string(),
                row.usage.shared_bytes.to_string(),
                row.usage.spill_bytes.to_string(),
            ]
        })
        .collect();
    let header = ["arch", "unit", "kernel", "registers", "shared", "spilled"];
    output::print_line(&format!(
        "NVRTC {nvrtc}\n\n{}",
        output::table(&header, &rows, &[3, 4, 5])
    ))
}

impl Compilation {
    fn compile(&self) -> Result<(String, Pack, Vec<Row>)> {
        let archs = self.arch.iter().map(|name| name.trim().parse::<Arch>());
        let archs: Result<Vec<Arch>, CudaError> = archs.collect();
        let archs = match archs {
            Ok(archs) if archs.is_empty() => Arch::ALL.to_vec(),
            Ok(archs) => archs,
            Err(error) => return Err(UsageError::one(format!("--arch: {error}")).into()),
        };
        let nvrtc = Nvrtc::open(self.nvrtc_library.as_deref())?;
        let (major, minor) = nvrtc.version();
        let mut rows = Vec::new();
        let pack = Pack::build(&nvrtc, &archs, |unit, arch, usages| {
            let arch = arch.name();
            rows.extend(
                usages
                    .iter()
                    .cloned()
                    .map(|usage| Row { arch, unit, usage }),
            );
        })?;
        Ok((format!("{major}.{minor}"), pack, rows))
    }
}
