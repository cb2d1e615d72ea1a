//! The CUDA sources, embedded, and for which architectures each is built.

use sha2::{Digest, Sha256};

use super::Arch;

/// One file that is compiled by itself.
#[derive(Debug, Clone, Copy)]
pub struct Unit {
    /// Path below `kernels/cuda`, without the extension: `linear/f32`.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
    archs: Archs,
}

/// The architectures of a unit.
#[derive(Debug, Clone, Copy)]
enum Archs {
    /// This one and all that are newer.
    From(Arch),
    /// These.
    Only(&'static [Arch]),
}

/// A file that units include.
pub(super) struct Header {
    pub name: &'static str,
    pub text: &'static str,
}

macro_rules! archs {
    (from $arch:ident) => { Archs::From(Arch::$arch) };
    (only $($arch:ident)+) => { Archs::Only(&[$(Arch::$arch),+]) };
}

macro_rules! units {
    ($($name:literal $which:ident $($arch:ident)+),* $(,)?) => {
        &[$(Unit {
            name: $name,
            text: include_str!(concat!("../../cuda/", $name, ".cu")),
            archs: archs!($which $($arch)+),
        }),*]
    };
}

macro_rules! headers {
    ($($name:literal),* $(,)?) => {
        &[$(Header { name: $name, text: include_str!(concat!("../../cuda/", $name)) }),*]
    };
}

/// Every unit. Four-way dot products start at 6.1, tensor cores at 7.0, those for integers at 7.5.
pub const UNITS: &[Unit] = units![
    "ops/embed" from Sm60,
    "ops/norm" from Sm60,
    "ops/quantise" from Sm60,
    "ops/sample" from Sm60,
    "ops/silu" from Sm60,
    "attention/rope_kv" from Sm60,
    "attention/eager" from Sm60,
    "attention/decode_split" from Sm60,
    "attention/prefill_tile" from Sm60,
    "attention/prefill_mma" from Sm75,
    "linear/f32" from Sm60,
    "linear/a16_f32_gemv" from Sm60,
    "linear/a16_half2" only Sm60 Sm70,
    "linear/a16_mma" from Sm70,
    "linear/a8_dp4a_gemv" from Sm61,
    "linear/a8_dp4a_gemm" from Sm61,
    "linear/a8_mma" from Sm75,
    "linear/dense" from Sm60,
    "linear/dense_mma" from Sm75,
    "collective/one_shot" from Sm60,
    "bench/peak" from Sm60,
];

pub(super) const HEADERS: &[Header] = headers![
    "common.cuh",
    "a8.cuh",
    "rows.cuh",
    "attention/batch.cuh",
    "linear/a8_mma.cuh",
    "linear/dp4a.cuh",
    "linear/mma.cuh",
    "linear/sgemm.cuh",
    "linear/splits.cuh",
    "linear/unpack.cuh",
    "linear/widen.cuh",
];

impl Unit {
    /// True if the unit has code for `arch`.
    pub fn is_built_for(&self, arch: Arch) -> bool {
        match self.archs {
            Archs::From(oldest) => oldest <= arch,
            Archs::Only(archs) => archs.contains(&arch),
        }
    }
}

/// Options of every compilation. Nothing relaxes IEEE arithmetic.
pub(super) const OPTIONS: [&str; 3] = ["--std=c++17", "-default-device", "--ptxas-options=-v"];

/// SHA-256 over sources and options, in hex: a pack belongs to the version that has the same.
pub fn source_hash() -> String {
    let mut hash = Sha256::new();
    let mut part = |text: &str| {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    };
    for unit in UNITS {
        part(unit.name);
        part(unit.text);
        let built = |arch: &Arch| unit.is_built_for(*arch);
        Arch::ALL
            .into_iter()
            .filter(built)
            .for_each(|arch| part(arch.name()));
    }
    for header in HEADERS {
        part(header.name);
        part(header.text);
    }
    OPTIONS.into_iter().for_each(&mut part);
    Arch::ALL.map(Arch::ptx_version).into_iter().for_each(part);
    hash.finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
