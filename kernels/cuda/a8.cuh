// Activations quantised to int8 for the integer dot products: how they are written.
#pragma once
#include "common.cuh"

constexpr int ROW_TILE = 8;  // activation rows of a tile; the last tile is padded with zeros

// Row tiles of 8 rows by superblocks of 128 stored rows.
struct A8 {
    s8* q;            // [row tile][superblock][row % 8 * 4 + j][t][8] s8
    float* d;         // [row tile][superblock][row % 8][t] f32, value = d * q
    float* dsum;      // like d: d * sum(q)
    int superblocks;  // stored rows / 128
};

// A warp stores one superblock of one row; lane l brings its values 4l..4l+3.
__device__ __forceinline__ void store_a8(const A8& a8, int row, int superblock, float4 x) {
    // Magnitudes order like their bits, where NaN is the largest: it reaches d, not silence.
    auto magnitude = [](float value) { return __float_as_uint(value) & 0x7fffffffu; };
    u32 top = max(max(magnitude(x.x), magnitude(x.y)), max(magnitude(x.z), magnitude(x.w)));
#pragma unroll
    for (int offset = 1; offset < 8; offset *= 2)
        top = max(top, __shfl_xor_sync(FULL_MASK, top, offset));
    const float absmax = __uint_as_float(top);
    const bool zero = absmax < 1e-36f;  // 127 / absmax would overflow
    const float inverse = zero ? 0.0f : __fdividef(127.0f, absmax);
    const float d = zero ? 0.0f : absmax * (1.0f / 127.0f);

    const int q0 = __float2int_rn(x.x * inverse), q1 = __float2int_rn(x.y * inverse);
    const int q2 = __float2int_rn(x.z * inverse), q3 = __float2int_rn(x.w * inverse);
    int sum = q0 + q1 + q2 + q3;
#pragma unroll
    for (int offset = 1; offset < 8; offset *= 2) sum += __shfl_xor_sync(FULL_MASK, sum, offset);

    const int lane = threadIdx.x % WARP;
    const int t = lane / 8, j = lane / 2 % 4, half = lane % 2;
    const size_t tile = (size_t)(row / ROW_TILE) * a8.superblocks + superblock;
    const size_t cell = tile * ROW_TILE + row % ROW_TILE;
    u32* words = reinterpret_cast<u32*>(a8.q) + cell * (SUPERBLOCK_ROWS / 4);
    words[j * 8 + t * 2 + half] = (q0 & 255) | (q1 & 255) << 8 | (q2 & 255) << 16 | (u32)q3 << 24;
    if (lane % 8 == 0) {
        a8.d[cell * 4 + t] = d;
        a8.dsum[cell * 4 + t] = d * sum;
    }
}
