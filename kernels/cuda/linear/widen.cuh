// Packed codes to pairs of f16: small integers, exact, with the zero point taken off. This is half arithmetic, so
// never for sm_61.
#pragma once
#include "common.cuh"

__device__ __forceinline__ u32 fma_f16x2(u32 a, u32 b, u32 c) {
    u32 to;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(to) : "r"(a), "r"(b), "r"(c));
    return to;
}

__device__ __forceinline__ u32 sub_f16x2(u32 a, u32 b) {
    u32 to;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(to) : "r"(a), "r"(b));
    return to;
}

constexpr u32 BOTH_HALVES = 0x00010001;  // times 16 bits: the same in both

// 1024 + zero point, twice: 0x6400 are the bits of 1024, whose ulp is 1. `zero` as stored, less 2^(bits-1).
template <int BITS>
__device__ __forceinline__ u32 middle_of(int zero) {
    return (0x6400 + (1 << (BITS - 1)) + zero) * BOTH_HALVES;
}

// A lane's codes of one (tile, superblock), the current block's foremost: `advance` brings the next one's there.
template <int BITS>
struct Widening {
    u32 word[BITS];  // in the order of the layout

    // block: the current one; only whether it is odd matters.
    __device__ __forceinline__ void advance(int block) {
        if (BITS == 4) {
            word[0] = word[1], word[1] = word[2], word[2] = word[3];
        } else if (BITS == 8) {
#pragma unroll
            for (int i = 0; i < 6; ++i) word[i] = word[i + 2];
        } else {
            word[0] = block % 2 ? word[1] : word[0] >> 4;
            if (BITS == 3) word[2] >>= 2;
        }
    }

    // Values (0, 2), (4, 6), (1, 3), (5, 7) of the lane's unit. A code stays where it is in its word and becomes
    // 1024 + code * 2^shift by one logical operation; what that is too much goes with the zero point.
    __device__ __forceinline__ void widen(u32 middle, u32 (&pair)[4]) const {
        constexpr u32 HALF = 1 << (BITS - 1), LOW = BITS == 3 ? 3 : 2 * HALF - 1;
        constexpr int SHIFT = BITS == 8 ? 0 : BITS == 4 ? 4 : 2;       // of the upper four values
        constexpr u32 UNIT = (15 - SHIFT) << 10;                       // 2^-SHIFT
        constexpr u32 ABOVE = SHIFT == 4 ? 0x6380 : 0x6200;            // 1024 - 1024 * 2^-SHIFT
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
            const int shift = upper * SHIFT;
            const u32 from = word[BITS == 8 ? upper : 0];
#pragma unroll
            for (int odd = 0; odd < 2; ++odd) {
                u32 code = (odd ? from >> 8 : from) & (LOW << shift) * BOTH_HALVES;
                if (BITS == 3) {  // the sign, inverted below, is the third bit
                    const int left = shift + 2 - upper - odd * 8;
                    code |= (left >= 0 ? word[2] << left : word[2] >> -left) & (4 << shift) * BOTH_HALVES;
                }
                code ^= (0x6400 | HALF << shift) * BOTH_HALVES;
                pair[odd * 2 + upper] = shift == 0 ? sub_f16x2(code, middle)
                                                   : fma_f16x2(code, UNIT * BOTH_HALVES,
                                                               sub_f16x2(ABOVE * BOTH_HALVES, middle));
            }
        }
    }
};
