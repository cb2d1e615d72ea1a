//! Sixteen f32 lanes on every instruction set, and the one place that enters one.
//!
//! Kernels are written once against [`Lanes`] and compiled per instruction set by [`dispatch`].
//! Everything between `dispatch` and an intrinsic is `#[inline(always)]`, because a function that
//! is not inlined would be compiled without the instruction set's features. The fused and
//! unfused operations are the same on AVX2 and AVX-512, so both give the same bits.

use crate::error::KernelError;
use crate::isa::CpuIsa;

use super::lanes_portable::Portable;
#[cfg(target_arch = "x86_64")]
use super::{lanes_avx2::Avx2, lanes_avx512::Avx512};

/// Lanes of one vector.
pub(crate) const LANES: usize = 16;

/// Operations on 16 f32 lanes. A value of an implementing type proves that the machine has them.
pub(crate) trait Lanes: Copy + Send + Sync {
    /// 16 lanes.
    type F: Copy;

    /// Rows and panels of one register tile of the matrix product.
    const TILE: (usize, usize);
    /// Panels that one matrix-vector pass takes together, by rows (1 and 2, 3 and 4).
    const STREAMS: (usize, usize);
    /// Queries that attention works on together.
    const QUERIES: usize;

    fn splat(self, x: f32) -> Self::F;
    fn load(self, x: &[f32; LANES]) -> Self::F;
    /// Loads 16 f32 given as bits.
    fn load_bits(self, x: &[u32; LANES]) -> Self::F;
    fn store(self, x: Self::F, out: &mut [f32; LANES]);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, fused where the instruction set has it.
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `if a > b { a } else { b }`: a NaN in `b` survives.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `if a < b { a } else { b }`: a NaN in `b` survives.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// To the nearest integer, ties to even; |x| < 2^22.
    fn round(self, x: Self::F) -> Self::F;
    /// `2^n` for integral `n` in -126..=127.
    fn power_of_two(self, n: Self::F) -> Self::F;
    /// Widens 16 f16 given as bits, exactly.
    fn widen_f16(self, x: &[u16; LANES]) -> Self::F;
    /// Widens 16 bf16 given as bits, exactly.
    fn widen_bf16(self, x: &[u16; LANES]) -> Self::F;
    /// Converts 16 integers.
    fn widen_i8(self, x: &[i8; LANES]) -> Self::F;
    /// Converts 16 integers.
    fn widen_u16(self, x: &[u16; LANES]) -> Self::F;
    /// `code - 2` of 8 rows of a unit.
    fn unpack2(self, unit: &[u16; 16]) -> [Self::F; 8];
    /// `code - 4` of 8 rows of a unit.
    fn unpack3(self, unit: &[u16; 24]) -> [Self::F; 8];
    /// `code - 8` of 8 rows of a unit.
    fn unpack4(self, unit: &[u32; 16]) -> [Self::F; 8];
    /// `code - 128` of 8 rows of a unit.
    fn unpack8(self, unit: &[u32; 32]) -> [Self::F; 8];

    #[inline(always)]
    fn zero(self) -> Self::F {
        self.splat(0.0)
    }

    #[inline(always)]
    fn to_array(self, x: Self::F) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        self.store(x, &mut out);
        out
    }

    /// Loads up to 16 numbers, 0 in the other lanes.
    #[inline(always)]
    fn load_part(self, x: &[f32]) -> Self::F {
        match x.first_chunk() {
            Some(x) => self.load(x),
            None => {
                let mut padded = [0.0; LANES];
                padded[..x.len()].copy_from_slice(x);
                self.load(&padded)
            }
        }
    }

    /// Stores as many lanes as `out` holds.
    #[inline(always)]
    fn store_part(self, x: Self::F, out: &mut [f32]) {
        match out.first_chunk_mut() {
            Some(out) => self.store(x, out),
            None => {
                let length = out.len();
                out.copy_from_slice(&self.to_array(x)[..length]);
            }
        }
    }

    /// Sum of the lanes: halves added to halves, always in this order.
    #[inline(always)]
    fn sum(self, x: Self::F) -> f32 {
        let x = self.to_array(x);
        let mut half = [0.0; 8];
        for i in 0..8 {
            half[i] = x[i] + x[i + 8];
        }
        let quarter = [
            half[0] + half[4],
            half[1] + half[5],
            half[2] + half[6],
            half[3] + half[7],
        ];
        (quarter[0] + quarter[2]) + (quarter[1] + quarter[3])
    }

    /// Largest lane; no lane may be NaN.
    #[inline(always)]
    fn largest(self, x: Self::F) -> f32 {
        let x = self.to_array(x);
        let mut largest = x[0];
        for value in x {
            largest = if value > largest { value } else { largest };
        }
        largest
    }
}

/// A computation that is compiled once per instruction set.
pub(crate) trait Kernel {
    type Output;
    /// Must be `#[inline(always)]`, and so must all that it calls with `lanes`.
    fn run<L: Lanes>(self, lanes: L) -> Self::Output;
}

/// `body` for `index` 0 to `count - 1`, spelled out: a loop this long would be unrolled too late
/// for the accumulators to live in registers.
macro_rules! unroll {
    ($index:ident < $count:ident, $body:expr) => {
        unroll!(@ $index, $count, $body, 0 1 2 3 4 5 6 7);
    };
    (@ $index:ident, $count:ident, $body:expr, $($at:literal)*) => {
        $(if const { $at < $count } {
            let $index = $at;
            $body;
        })*
    };
}
pub(crate) use unroll;

/// An instruction set that this machine was seen to have.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Available {
    Portable(Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
}

impl Available {
    /// Proof that the machine runs `isa`, for the path named `path`.
    pub(crate) fn new(isa: Option<CpuIsa>, path: &'static str) -> Result<Self, KernelError> {
        let isa = isa.ok_or_else(|| KernelError::PathRefused {
            path,
            reason: "it is not a cpu path".into(),
        })?;
        let found = match isa {
            CpuIsa::Portable => Some(Self::Portable(Portable)),
            #[cfg(target_arch = "x86_64")]
            CpuIsa::Avx2 => Avx2::detect().map(Self::Avx2),
            #[cfg(target_arch = "x86_64")]
            CpuIsa::Avx512 => Avx512::detect().map(Self::Avx512),
            #[cfg(not(target_arch = "x86_64"))]
            CpuIsa::Avx2 | CpuIsa::Avx512 => None,
        };
        found.ok_or_else(|| KernelError::PathRefused {
            path,
            reason: format!("this machine has not all of: {}", isa.features()),
        })
    }

    /// Queries that attention works on together.
    pub(crate) fn queries(self) -> usize {
        self.tuning().1
    }

    /// Rows of the register tile of the matrix product.
    pub(crate) fn tile_rows(self) -> usize {
        self.tuning().0.0
    }

    /// Panels of the register tile of the matrix product.
    pub(crate) fn tile_panels(self) -> usize {
        self.tuning().0.1
    }

    const fn tuning(self) -> ((usize, usize), usize) {
        match self {
            Self::Portable(_) => (Portable::TILE, Portable::QUERIES),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => (Avx2::TILE, Avx2::QUERIES),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => (Avx512::TILE, Avx512::QUERIES),
        }
    }

    /// The best set of the machine.
    pub(crate) fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(lanes) = Avx512::detect() {
                return Self::Avx512(lanes);
            }
            if let Some(lanes) = Avx2::detect() {
                return Self::Avx2(lanes);
            }
        }
        Self::Portable(Portable)
    }
}

/// Runs `kernel` compiled for the instruction set `isa`.
pub(crate) fn dispatch<K: Kernel>(isa: Available, kernel: K) -> K::Output {
    match isa {
        Available::Portable(lanes) => kernel.run(lanes),
        #[cfg(target_arch = "x86_64")]
        Available::Avx2(lanes) => lanes.enter(kernel),
        #[cfg(target_arch = "x86_64")]
        Available::Avx512(lanes) => lanes.enter(kernel),
    }
}

/// Every instruction set of the machine that runs the tests.
#[cfg(test)]
pub(crate) fn test_sets() -> Vec<Available> {
    CpuIsa::ALL
        .into_iter()
        .filter_map(|isa| Available::new(Some(isa), "test").ok())
        .collect()
}
