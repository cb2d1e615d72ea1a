// What the dp4a kernels share: integer dots that become floats without a conversion instruction.
#pragma once
#include "linear/unpack.cuh"

// A dp4a chain that starts at the bits of 1.5 * 2^23 ends at the bits of the float 1.5 * 2^23 + dot.
constexpr int MAGIC_BITS = 0x4b400000;
constexpr float MAGIC = 12582912.0f;

// An activation scale for which MAGIC * d is exact, so that one fma takes the magic away: two mantissa
// bits less, a relative change below 2^-21.
__device__ __forceinline__ float short_scale(float d) { return __uint_as_float(__float_as_uint(d) & ~3u); }

// d * dot, for the bits that a chain ended at.
__device__ __forceinline__ float scaled_dot(int bits, float d, float minus_magic_d) {
    return fmaf(__int_as_float(bits), d, minus_magic_d);
}
