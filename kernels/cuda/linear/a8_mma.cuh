// Fragments of the int8 tensor-core linear: how lanes multiply and scale.
#pragma once
#include "linear/mma.cuh"

#if __CUDA_ARCH__ >= 750

constexpr int MAGIC_BITS = 0x4B400000;
constexpr float MAGIC = 12582912.0f;
constexpr int TILE_BYTES = 1024;  // q of 8 rows and a superblock
constexpr int TILE_SCALES = 32;   // d of the same: (row, t)

__device__ __forceinline__ void mma(int (&c)[2], u32 a, u32 b) {
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+r"(c[0]), "+r"(c[1])
        : "r"(a), "r"(b));
}

// Codes are 2^(8-b) too large as int8; what that leaves to undo at the end.
template <int BITS>
constexpr float CODE_STEP = 1.0f / (1 << (8 - BITS));

// Activations: see the layout of q, d and dsum.
struct Activations {
    const s8* q;        // [row tiles][superblocks][lane][32]
    const float* d;     // [row tiles][superblocks][8 rows][4]
    const float* dsum;  // like d; read only with zeros
};

// What is scaled at once. PLAIN: one weight scale for a superblock, one activation scale for a block. FINE: two or four
// weight scales for a superblock.
enum Scaling { PLAIN, FINE };

// A lane's weight scales of one superblock (its two columns each).
template <Scaling S>
constexpr int PAIRS = S == FINE ? 4 : 1;

template <Scaling S>
struct Scales {
    u32 pair[PAIRS<S>];
    __device__ __forceinline__ void load(const u16* scales, int sb, int sp, bool on) {
        if (S != FINE) sp = 1;
#pragma unroll
        for (int t = 0; t < PAIRS<S>; ++t) stream(pair[t], scales + (u64)(u32)(sb * sp + (t * sp >> 2)) * 8, on);
    }
    __device__ __forceinline__ void unpack(float2 (&scale)[PAIRS<S>]) const {
#pragma unroll
        for (int t = 0; t < PAIRS<S>; ++t) scale[t] = f32x2_of_f16x2(pair[t]);
    }
};

// acc += sum over t of scale_t * d_t * dot_t, for one (row tile, tile) and a superblock.
template <Scaling S>
__device__ __forceinline__ void accumulate(float (&acc)[2], const uint4 (&q)[2], const float4& d, const u32 (&b)[4][2],
                                           const float2 (&scale)[PAIRS<S>]) {
    const u32 a[4][2] = {{q[0].x, q[0].y}, {q[0].z, q[0].w}, {q[1].x, q[1].y}, {q[1].z, q[1].w}};
    const float dt[4] = {d.x, d.y, d.z, d.w};
    float sum[2] = {};
    int c[2] = {MAGIC_BITS, MAGIC_BITS};
#pragma unroll
    for (int t = 0; t < 4; ++t) {
        mma(c, a[t][0], b[t][0]);
        mma(c, a[t][1], b[t][1]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float dot = __int_as_float(c[i]) - MAGIC;
            c[i] = MAGIC_BITS;
            if (S == PLAIN)
                sum[i] = fmaf(dt[t], dot, sum[i]);
            else
                acc[i] = fmaf((i == 0 ? scale[t % PAIRS<S>].x : scale[t % PAIRS<S>].y) * dt[t], dot, acc[i]);
        }
    }
    if (S == PLAIN) {
        acc[0] = fmaf(scale[0].x, sum[0], acc[0]);
        acc[1] = fmaf(scale[0].y, sum[1], acc[1]);
    }
}

// Zero points, in a pass of its own as most models are symmetric: acc -= scale * zero * dsum.
template <int BITS, int RT, int NT>
__device__ __forceinline__ void subtract_zeros(float (&acc)[RT][NT][2], const WeightTiles& w, const float* dsum,
                                               const u32 (&row_index)[RT], int begin, int end, int sp) {
    if (w.zeros == nullptr) return;
#pragma unroll 1
    for (int block = begin * 4; block < end * 4; ++block) {
        float sum[RT];
#pragma unroll
        for (int r = 0; r < RT; ++r) sum[r] = dsum[(row_index[r] + block / 4) * TILE_SCALES + block % 4];
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            const u32 index = nt * w.scales_stride + (block * sp >> 2) * 8;
            const float2 scale = f32x2_of_f16x2(*(const u32*)(w.scales + index));
            const u32 zero = *(const u32*)(w.zeros + index);
            const float x = scale.x * ((int)(s16)zero << (8 - BITS)), y = scale.y * ((int)zero >> 16 << (8 - BITS));
#pragma unroll
            for (int r = 0; r < RT; ++r) {
                acc[r][nt][0] -= x * sum[r];
                acc[r][nt][1] -= y * sum[r];
            }
        }
    }
}

#endif
