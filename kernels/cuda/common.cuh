// What all kernels share: types, conversions, the guard, the shape of a linear's launch.
// Compiled by NVRTC alone, so nothing here comes from a toolkit header.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char s8;
typedef short s16;
typedef float f32;

constexpr int WARP = 32;
constexpr u32 FULL_MASK = 0xffffffffu;
#define NEG_INFINITY __uint_as_float(0xff800000u)

// Weight layout (kernels/src/cuda/layout.rs writes it).
constexpr int TILE_COLUMNS = 8;       // columns of a tile: 4 lanes each
constexpr int SUPERBLOCK_ROWS = 128;  // stored rows that one lane's wide load covers
constexpr int BLOCK_ROWS = 32;        // rows that share one activation scale

// f16 is a storage format: these two conversions exist on every architecture, arithmetic does not.
__device__ __forceinline__ float f32_of_f16(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ u16 f16_of_f32(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ float f32_of_bf16(u16 bits) { return __uint_as_float((u32)bits << 16); }

__device__ __forceinline__ float2 f32x2_of_f16x2(u32 bits) {
    return make_float2(f32_of_f16((u16)bits), f32_of_f16((u16)(bits >> 16)));
}

// Storage types that only ever widen to f32.
struct f16 {
    u16 bits;
    __device__ __forceinline__ operator float() const { return f32_of_f16(bits); }
};
struct bf16 {
    u16 bits;
    __device__ __forceinline__ operator float() const { return f32_of_bf16(bits); }
};

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(FULL_MASK, value, offset);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1)
        value = fmaxf(value, __shfl_xor_sync(FULL_MASK, value, offset));
    return value;
}

// Keeps the first (check, element) that is not finite; all ones means none. `guard` may be null.
__device__ __forceinline__ void guard_finite(u64* guard, u32 check, u32 element, float value) {
    if (guard != nullptr && (__float_as_uint(value) & 0x7f800000u) == 0x7f800000u)
        atomicMin(guard, (u64)check << 32 | element);
}

// One matrix of a launch; shapes as in the weight layout.
struct LinearJob {
    const u8* codes;    // [tiles][superblocks] 128 * bits bytes
    const u16* scales;  // [tiles][superblocks * scales_per_superblock][8] f16
    const s16* zeros;   // like scales, zero point - 2^(bits-1); null if symmetric
    const float* bias;  // (n) or null
    float* out;         // (rows, n) f32, row-major
    int n;              // columns
    int tiles;          // ceil(n / 8)
    u32 check;          // the guard's number for `out`
};

// Matrices that read the same activations in one launch (q, k, v or gate, up).
struct LinearJobs {
    LinearJob job[3];
    int count;
    int tiles;                  // of all jobs
    int superblocks;            // stored rows / 128
    int scales_per_superblock;  // 1, 2 or 4
    int rows;                   // activation rows
};

// The job that owns tile `tile` of the concatenation; `tile` becomes its own index.
__device__ __forceinline__ const LinearJob& job_of_tile(const LinearJobs& jobs, int& tile) {
    int index = 0;
    while (index + 1 < jobs.count && tile >= jobs.job[index].tiles) tile -= jobs.job[index++].tiles;
    return jobs.job[index];
}
