//! Sixteen lanes in one AVX-512 register.

use std::arch::x86_64::*;

use super::lanes::{Kernel, LANES, Lanes};
use crate::isa::CpuIsa;

/// Proof that the machine has AVX-512 F, BW, DQ, VL, FMA and F16C: made by `detect` alone.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512(());

/// Intrinsics in a method of [`Avx512`].
macro_rules! simd {
    ($($body:tt)*) => {
        // SAFETY: a value of `Avx512` exists only after `detect` saw every feature that these
        // intrinsics need; loads and stores go through references to whole arrays, unaligned.
        unsafe { $($body)* }
    };
}

impl Avx512 {
    pub(crate) fn detect() -> Option<Self> {
        CpuIsa::Avx512.is_available().then_some(Self(()))
    }

    pub(crate) fn enter<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        fn compiled<K: Kernel>(lanes: Avx512, kernel: K) -> K::Output {
            kernel.run(lanes)
        }
        simd! { compiled(self, kernel) }
    }

    /// `code - centre` for eight nibbles of each lane; `centred[code]` is the value.
    ///
    /// A permute reads the low four bits of its index only, so no mask is needed.
    #[inline(always)]
    fn nibbles(self, x: __m512i, centred: __m512) -> [__m512; 8] {
        simd! {
            [
                _mm512_permutexvar_ps(x, centred),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(x), centred),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<8>(x), centred),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<12>(x), centred),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<16>(x), centred),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<20>(x), centred),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<24>(x), centred),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<28>(x), centred),
            ]
        }
    }

    /// `table[code] = code - centre`.
    #[inline(always)]
    fn table(self, centre: f32) -> __m512 {
        simd! {
            let codes = _mm512_set_ps(
                15.0, 14.0, 13.0, 12.0, 11.0, 10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0,
            );
            _mm512_sub_ps(codes, _mm512_set1_ps(centre))
        }
    }

    /// Moves 16 bits of each lane into the low two bits of 8 nibbles.
    #[inline(always)]
    fn spread_pairs(self, x: __m512i) -> __m512i {
        simd! {
            let x = keep(_mm512_or_si512(x, _mm512_slli_epi32::<8>(x)), 0x00ff_00ff);
            let x = keep(_mm512_or_si512(x, _mm512_slli_epi32::<4>(x)), 0x0f0f_0f0f);
            keep(_mm512_or_si512(x, _mm512_slli_epi32::<2>(x)), 0x3333_3333)
        }
    }

    /// Moves 8 bits of each lane into the lowest bit of 8 nibbles.
    #[inline(always)]
    fn spread_bits(self, x: __m512i) -> __m512i {
        simd! {
            let x = keep(_mm512_or_si512(x, _mm512_slli_epi32::<12>(x)), 0x000f_000f);
            let x = keep(_mm512_or_si512(x, _mm512_slli_epi32::<6>(x)), 0x0303_0303);
            keep(_mm512_or_si512(x, _mm512_slli_epi32::<3>(x)), 0x1111_1111)
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn keep(x: __m512i, mask: i32) -> __m512i {
    _mm512_and_si512(x, _mm512_set1_epi32(mask))
}

impl Lanes for Avx512 {
    type F = __m512;

    const TILE: (usize, usize) = (6, 4);
    const STREAMS: (usize, usize) = (4, 4);
    const QUERIES: usize = 8;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        simd! { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        simd! { _mm512_loadu_ps(x.as_ptr()) }
    }
    #[inline(always)]
    fn load_bits(self, x: &[u32; LANES]) -> Self::F {
        simd! { _mm512_loadu_ps(x.as_ptr().cast()) }
    }
    #[inline(always)]
    fn store(self, x: Self::F, out: &mut [f32; LANES]) {
        simd! { _mm512_storeu_ps(out.as_mut_ptr(), x) }
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        simd! { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        simd! { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        simd! { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        simd! { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        simd! { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        simd! { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        simd! { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn round(self, x: Self::F) -> Self::F {
        simd! { _mm512_roundscale_ps::<0>(x) }
    }
    #[inline(always)]
    fn power_of_two(self, n: Self::F) -> Self::F {
        simd! {
            let biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
        }
    }
    #[inline(always)]
    fn widen_f16(self, x: &[u16; LANES]) -> Self::F {
        simd! { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
    }
    #[inline(always)]
    fn widen_bf16(self, x: &[u16; LANES]) -> Self::F {
        simd! {
            let x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(x))
        }
    }
    #[inline(always)]
    fn widen_i8(self, x: &[i8; LANES]) -> Self::F {
        simd! {
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(x.as_ptr().cast())))
        }
    }
    #[inline(always)]
    fn widen_u16(self, x: &[u16; LANES]) -> Self::F {
        simd! {
            _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast())))
        }
    }
    #[inline(always)]
    fn unpack2(self, unit: &[u16; 16]) -> [Self::F; 8] {
        simd! {
            let x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(unit.as_ptr().cast()));
            // Whatever the next code leaves in the index's upper two bits, the entry is the same.
            let centred = _mm512_broadcast_f32x4(_mm_set_ps(1.0, 0.0, -1.0, -2.0));
            [
                _mm512_permutexvar_ps(x, centred),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<2>(x), centred),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(x), centred),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<6>(x), centred),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<8>(x), centred),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<10>(x), centred),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<12>(x), centred),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<14>(x), centred),
            ]
        }
    }
    #[inline(always)]
    fn unpack3(self, unit: &[u16; 24]) -> [Self::F; 8] {
        let (low, high) = unit.split_at(16);
        // SAFETY: as in `simd!`; `low` and `high` are 32 and 16 bytes long.
        let (low, high) = unsafe {
            (
                _mm512_cvtepu16_epi32(_mm256_loadu_si256(low.as_ptr().cast())),
                _mm512_cvtepu8_epi32(_mm_loadu_si128(high.as_ptr().cast())),
            )
        };
        let (low, high) = (self.spread_pairs(low), self.spread_bits(high));
        let codes = simd! { _mm512_or_si512(low, _mm512_slli_epi32::<2>(high)) };
        self.nibbles(codes, self.table(4.0))
    }
    #[inline(always)]
    fn unpack4(self, unit: &[u32; 16]) -> [Self::F; 8] {
        let x = simd! { _mm512_loadu_si512(unit.as_ptr().cast()) };
        self.nibbles(x, self.table(8.0))
    }
    #[inline(always)]
    fn unpack8(self, unit: &[u32; 32]) -> [Self::F; 8] {
        // SAFETY: as in `simd!`; the second load starts at the 17th of 32 words.
        let words = unsafe {
            [
                _mm512_loadu_si512(unit.as_ptr().cast()),
                _mm512_loadu_si512(unit.as_ptr().add(16).cast()),
            ]
        };
        simd! {
            // Flipping the top bit makes `code - 128` the signed value of the byte.
            let flip = _mm512_set1_epi32(0x8080_8080u32 as i32);
            let (a, b) = (_mm512_xor_si512(words[0], flip), _mm512_xor_si512(words[1], flip));
            [
                _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(_mm512_slli_epi32::<24>(a))),
                _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(_mm512_slli_epi32::<16>(a))),
                _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(_mm512_slli_epi32::<8>(a))),
                _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(a)),
                _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(_mm512_slli_epi32::<24>(b))),
                _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(_mm512_slli_epi32::<16>(b))),
                _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(_mm512_slli_epi32::<8>(b))),
                _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(b)),
            ]
        }
    }

    #[inline(always)]
    fn largest(self, x: Self::F) -> f32 {
        simd! { _mm512_reduce_max_ps(x) }
    }
}
