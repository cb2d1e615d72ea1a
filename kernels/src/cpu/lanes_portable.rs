//! Sixteen lanes in safe Rust: arrays that the compiler vectorises for the build's baseline.

use half::f16;

use super::lanes::{LANES, Lanes};

/// Available everywhere.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Portable;

#[inline(always)]
fn each(f: impl Fn(usize) -> f32) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    for (lane, out) in out.iter_mut().enumerate() {
        *out = f(lane);
    }
    out
}

/// Eight rows of 16 codes, less the centre.
#[inline(always)]
fn codes(code: impl Fn(usize, usize) -> u32, centre: i32) -> [[f32; LANES]; 8] {
    let mut out = [[0.0; LANES]; 8];
    for (row, out) in out.iter_mut().enumerate() {
        *out = each(|lane| (code(row, lane) as i32 - centre) as f32);
    }
    out
}

impl Lanes for Portable {
    type F = [f32; LANES];

    const TILE: (usize, usize) = (4, 1);
    const STREAMS: (usize, usize) = (1, 1);
    const QUERIES: usize = 4;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        *x
    }
    #[inline(always)]
    fn load_bits(self, x: &[u32; LANES]) -> Self::F {
        each(|i| f32::from_bits(x[i]))
    }
    #[inline(always)]
    fn store(self, x: Self::F, out: &mut [f32; LANES]) {
        *out = x;
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
            each(|i| a[i].mul_add(b[i], c[i]))
        } else {
            each(|i| a[i] * b[i] + c[i])
        }
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        each(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn round(self, x: Self::F) -> Self::F {
        const SHIFTER: f32 = 12_582_912.0;
        each(|i| (x[i] + SHIFTER) - SHIFTER)
    }
    #[inline(always)]
    fn power_of_two(self, n: Self::F) -> Self::F {
        each(|i| f32::from_bits(((n[i] as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    fn widen_f16(self, x: &[u16; LANES]) -> Self::F {
        each(|i| f16::from_bits(x[i]).to_f32_const())
    }
    #[inline(always)]
    fn widen_bf16(self, x: &[u16; LANES]) -> Self::F {
        each(|i| f32::from_bits(u32::from(x[i]) << 16))
    }
    #[inline(always)]
    fn widen_i8(self, x: &[i8; LANES]) -> Self::F {
        each(|i| f32::from(x[i]))
    }
    #[inline(always)]
    fn widen_u16(self, x: &[u16; LANES]) -> Self::F {
        each(|i| f32::from(x[i]))
    }
    #[inline(always)]
    fn unpack2(self, unit: &[u16; 16]) -> [Self::F; 8] {
        codes(|row, lane| u32::from(unit[lane]) >> (2 * row) & 3, 2)
    }
    #[inline(always)]
    fn unpack3(self, unit: &[u16; 24]) -> [Self::F; 8] {
        let mut high = [0u32; LANES];
        for (lane, high) in high.iter_mut().enumerate() {
            *high = u32::from(unit[16 + lane / 2]) >> (8 * (lane % 2));
        }
        let low = |row: usize, lane: usize| u32::from(unit[lane]) >> (2 * row) & 3;
        codes(|row, lane| (high[lane] >> row & 1) << 2 | low(row, lane), 4)
    }
    #[inline(always)]
    fn unpack4(self, unit: &[u32; 16]) -> [Self::F; 8] {
        codes(|row, lane| unit[lane] >> (4 * row) & 15, 8)
    }
    #[inline(always)]
    fn unpack8(self, unit: &[u32; 32]) -> [Self::F; 8] {
        codes(
            |row, lane| unit[row / 4 * 16 + lane] >> (8 * (row % 4)) & 255,
            128,
        )
    }
}
