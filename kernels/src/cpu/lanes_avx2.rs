//! Sixteen lanes in two AVX2 registers.

use std::arch::x86_64::*;

use super::lanes::{Kernel, LANES, Lanes};
use crate::isa::CpuIsa;

/// Proof that the machine has AVX2, FMA and F16C: made by `detect` alone.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2(());

/// Intrinsics in a method of [`Avx2`].
macro_rules! simd {
    ($($body:tt)*) => {
        // SAFETY: a value of `Avx2` exists only after `detect` saw every feature that these
        // intrinsics need; loads and stores stay within the array that a reference points to and
        // are unaligned.
        unsafe { $($body)* }
    };
}

/// One operation on both halves.
macro_rules! both {
    ($intrinsic:ident($($x:ident),+)) => {
        simd! { [$intrinsic($($x[0]),+), $intrinsic($($x[1]),+)] }
    };
}

/// The bits below the top `$up` and down to bit `$down - $up`, as a signed number in f32.
macro_rules! signed_field {
    ($x:expr, $up:literal, $down:literal) => {
        simd! {
            [
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<$down>(_mm256_slli_epi32::<$up>($x[0]))),
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<$down>(_mm256_slli_epi32::<$up>($x[1]))),
            ]
        }
    };
}

impl Avx2 {
    pub(crate) fn detect() -> Option<Self> {
        CpuIsa::Avx2.is_available().then_some(Self(()))
    }

    pub(crate) fn enter<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn compiled<K: Kernel>(lanes: Avx2, kernel: K) -> K::Output {
            kernel.run(lanes)
        }
        simd! { compiled(self, kernel) }
    }

    /// `nibble - 8` for eight nibbles of each lane.
    #[inline(always)]
    fn nibbles(self, x: [__m256i; 2]) -> [[__m256; 2]; 8] {
        // Flipping its top bit makes `nibble - 8` the signed value of the nibble.
        let flip = simd! { _mm256_set1_epi32(0x8888_8888u32 as i32) };
        let x = simd! { [_mm256_xor_si256(x[0], flip), _mm256_xor_si256(x[1], flip)] };
        [
            signed_field!(x, 28, 28),
            signed_field!(x, 24, 28),
            signed_field!(x, 20, 28),
            signed_field!(x, 16, 28),
            signed_field!(x, 12, 28),
            signed_field!(x, 8, 28),
            signed_field!(x, 4, 28),
            signed_field!(x, 0, 28),
        ]
    }

    #[inline(always)]
    fn words(self, x: &[u32; 16]) -> [__m256i; 2] {
        let (low, high) = x.split_at(8);
        simd! {
            [_mm256_loadu_si256(low.as_ptr().cast()), _mm256_loadu_si256(high.as_ptr().cast())]
        }
    }

    #[inline(always)]
    fn halves(self, x: &[u16; 16]) -> [__m256i; 2] {
        let (low, high) = x.split_at(8);
        simd! {
            [
                _mm256_cvtepu16_epi32(_mm_loadu_si128(low.as_ptr().cast())),
                _mm256_cvtepu16_epi32(_mm_loadu_si128(high.as_ptr().cast())),
            ]
        }
    }
}

/// Moves 16 bits of each lane into the low two bits of 8 nibbles.
#[inline]
#[target_feature(enable = "avx2")]
fn spread_pairs(x: __m256i) -> __m256i {
    let x = keep(_mm256_or_si256(x, _mm256_slli_epi32::<8>(x)), 0x00ff_00ff);
    let x = keep(_mm256_or_si256(x, _mm256_slli_epi32::<4>(x)), 0x0f0f_0f0f);
    keep(_mm256_or_si256(x, _mm256_slli_epi32::<2>(x)), 0x3333_3333)
}

/// Moves 8 bits of each lane into bit 2 of 8 nibbles.
#[inline]
#[target_feature(enable = "avx2")]
fn spread_high_bits(x: __m256i) -> __m256i {
    let x = keep(_mm256_or_si256(x, _mm256_slli_epi32::<12>(x)), 0x000f_000f);
    let x = keep(_mm256_or_si256(x, _mm256_slli_epi32::<6>(x)), 0x0303_0303);
    _mm256_slli_epi32::<2>(keep(
        _mm256_or_si256(x, _mm256_slli_epi32::<3>(x)),
        0x1111_1111,
    ))
}

#[inline]
#[target_feature(enable = "avx2")]
fn keep(x: __m256i, mask: i32) -> __m256i {
    _mm256_and_si256(x, _mm256_set1_epi32(mask))
}

impl Lanes for Avx2 {
    type F = [__m256; 2];

    const TILE: (usize, usize) = (6, 1);
    const STREAMS: (usize, usize) = (2, 1);
    const QUERIES: usize = 4;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        simd! { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        let (low, high) = x.split_at(8);
        simd! { [_mm256_loadu_ps(low.as_ptr()), _mm256_loadu_ps(high.as_ptr())] }
    }
    #[inline(always)]
    fn load_bits(self, x: &[u32; LANES]) -> Self::F {
        let [low, high] = self.words(x);
        simd! { [_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)] }
    }
    #[inline(always)]
    fn store(self, x: Self::F, out: &mut [f32; LANES]) {
        let (low, high) = out.split_at_mut(8);
        simd! {
            _mm256_storeu_ps(low.as_mut_ptr(), x[0]);
            _mm256_storeu_ps(high.as_mut_ptr(), x[1]);
        }
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_div_ps(a, b))
    }
    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        both!(_mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_min_ps(a, b))
    }
    #[inline(always)]
    fn round(self, x: Self::F) -> Self::F {
        simd! { [_mm256_round_ps::<8>(x[0]), _mm256_round_ps::<8>(x[1])] }
    }
    #[inline(always)]
    fn power_of_two(self, n: Self::F) -> Self::F {
        simd! {
            let bias = _mm256_set1_epi32(127);
            let low = _mm256_add_epi32(_mm256_cvtps_epi32(n[0]), bias);
            let high = _mm256_add_epi32(_mm256_cvtps_epi32(n[1]), bias);
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(high)),
            ]
        }
    }
    #[inline(always)]
    fn widen_f16(self, x: &[u16; LANES]) -> Self::F {
        let (low, high) = x.split_at(8);
        simd! {
            [
                _mm256_cvtph_ps(_mm_loadu_si128(low.as_ptr().cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(high.as_ptr().cast())),
            ]
        }
    }
    #[inline(always)]
    fn widen_bf16(self, x: &[u16; LANES]) -> Self::F {
        let [low, high] = self.halves(x);
        simd! {
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            ]
        }
    }
    #[inline(always)]
    fn widen_i8(self, x: &[i8; LANES]) -> Self::F {
        simd! {
            let codes = _mm_loadu_si128(x.as_ptr().cast());
            [
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128::<8>(codes))),
            ]
        }
    }
    #[inline(always)]
    fn widen_u16(self, x: &[u16; LANES]) -> Self::F {
        let [low, high] = self.halves(x);
        simd! { [_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)] }
    }
    #[inline(always)]
    fn unpack2(self, unit: &[u16; 16]) -> [Self::F; 8] {
        let [low, high] = self.halves(unit);
        // Adding 6 to each code moves the centre 2 to 8.
        let x = simd! {
            let lift = _mm256_set1_epi32(0x6666_6666);
            [
                _mm256_add_epi32(spread_pairs(low), lift),
                _mm256_add_epi32(spread_pairs(high), lift),
            ]
        };
        self.nibbles(x)
    }
    #[inline(always)]
    fn unpack3(self, unit: &[u16; 24]) -> [Self::F; 8] {
        let (pairs, bits) = unit.split_at(16);
        let (first, second) = bits.split_at(4);
        // Adding 4 to each code moves the centre 4 to 8.
        let x = simd! {
            let low = [
                _mm256_cvtepu16_epi32(_mm_loadu_si128(pairs.as_ptr().cast())),
                _mm256_cvtepu16_epi32(_mm_loadu_si128(pairs[8..].as_ptr().cast())),
            ];
            let high = [
                _mm256_cvtepu8_epi32(_mm_loadl_epi64(first.as_ptr().cast())),
                _mm256_cvtepu8_epi32(_mm_loadl_epi64(second.as_ptr().cast())),
            ];
            let lift = _mm256_set1_epi32(0x4444_4444);
            let code = [
                _mm256_or_si256(spread_pairs(low[0]), spread_high_bits(high[0])),
                _mm256_or_si256(spread_pairs(low[1]), spread_high_bits(high[1])),
            ];
            [_mm256_add_epi32(code[0], lift), _mm256_add_epi32(code[1], lift)]
        };
        self.nibbles(x)
    }
    #[inline(always)]
    fn unpack4(self, unit: &[u32; 16]) -> [Self::F; 8] {
        self.nibbles(self.words(unit))
    }
    #[inline(always)]
    fn unpack8(self, unit: &[u32; 32]) -> [Self::F; 8] {
        let (first, second) = unit.split_at(16);
        // Flipping the top bit makes `code - 128` the signed value of the byte.
        let words = simd! {
            let flip = _mm256_set1_epi32(0x8080_8080u32 as i32);
            [
                _mm256_xor_si256(_mm256_loadu_si256(first.as_ptr().cast()), flip),
                _mm256_xor_si256(_mm256_loadu_si256(first[8..].as_ptr().cast()), flip),
                _mm256_xor_si256(_mm256_loadu_si256(second.as_ptr().cast()), flip),
                _mm256_xor_si256(_mm256_loadu_si256(second[8..].as_ptr().cast()), flip),
            ]
        };
        let (a, b) = ([words[0], words[1]], [words[2], words[3]]);
        [
            signed_field!(a, 24, 24),
            signed_field!(a, 16, 24),
            signed_field!(a, 8, 24),
            signed_field!(a, 0, 24),
            signed_field!(b, 24, 24),
            signed_field!(b, 16, 24),
            signed_field!(b, 8, 24),
            signed_field!(b, 0, 24),
        ]
    }
}
