// What the tensor-core linears share: a lane's packed weights, which tiles a warp takes, how K is split and how
// results leave.
#pragma once
#include "linear/splits.cuh"

#if __CUDA_ARCH__ >= 700

constexpr int WARPS = 4;  // of a block

// Weights are read once: they should not push the activations out of L1. Predicated, as the last ones have no
// successor to load; `v` keeps its value then.
__device__ __forceinline__ void stream(uint4& v, const u8* p, bool on) {
    asm volatile(
        "{ .reg .pred on; setp.ne.u32 on, %5, 0; @on ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
        : "l"(p), "r"((u32)on));
}
__device__ __forceinline__ void stream(uint2& v, const u8* p, bool on) {
    asm volatile("{ .reg .pred on; setp.ne.u32 on, %3, 0; @on ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2]; }"
                 : "+r"(v.x), "+r"(v.y)
                 : "l"(p), "r"((u32)on));
}
__device__ __forceinline__ void stream(u32& v, const void* p, bool on) {
    asm volatile("{ .reg .pred on; setp.ne.u32 on, %2, 0; @on ld.global.nc.u32 %0, [%1]; }"
                 : "+r"(v)
                 : "l"(p), "r"((u32)on));
}

// A lane's codes of one (tile, superblock): packed as loaded, and as int8x4 (t, lo/hi).
template <int BITS>
struct Codes;

template <>
struct Codes<4> {
    uint4 w;
    static constexpr int LANE_BYTES = 16;
    __device__ __forceinline__ void load(const u8* p, int, bool on) { stream(w, p, on); }
    __device__ __forceinline__ u32 word(int i) const { return i == 0 ? w.x : i == 1 ? w.y : i == 2 ? w.z : w.w; }
    __device__ __forceinline__ void unpack(u32 (&b)[4][2]) const {
        const u32 words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            b[t][0] = (words[t] << 4) & 0xF0F0F0F0u;
            b[t][1] = words[t] & 0xF0F0F0F0u;
        }
    }
};

template <>
struct Codes<8> {
    uint4 plane[2];
    static constexpr int LANE_BYTES = 16;
    __device__ __forceinline__ void load(const u8* p, int, bool on) {
        stream(plane[0], p, on);
        stream(plane[1], p + 512, on);
    }
    __device__ __forceinline__ u32 word(int i) const {
        const uint4 w = plane[i / 4];
        return i % 4 == 0 ? w.x : i % 4 == 1 ? w.y : i % 4 == 2 ? w.z : w.w;
    }
    __device__ __forceinline__ void unpack(u32 (&b)[4][2]) const {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            b[2 * h][0] = plane[h].x;
            b[2 * h][1] = plane[h].y;
            b[2 * h + 1][0] = plane[h].z;
            b[2 * h + 1][1] = plane[h].w;
        }
    }
};

template <>
struct Codes<2> {
    uint2 w;
    static constexpr int LANE_BYTES = 8;
    __device__ __forceinline__ void load(const u8* p, int, bool on) { stream(w, p, on); }
    __device__ __forceinline__ u32 word(int i) const { return i == 0 ? w.x : w.y; }
    __device__ __forceinline__ void unpack(u32 (&b)[4][2]) const {
#pragma unroll
        for (int e = 0; e < 8; ++e) b[e / 2][e % 2] = ((e < 4 ? w.x : w.y) << (6 - 2 * (e % 4))) & 0xC0C0C0C0u;
    }
};

template <>
struct Codes<3> {
    uint2 low;
    u32 sign;
    static constexpr int LANE_BYTES = 8;
    __device__ __forceinline__ void load(const u8* p, int lane, bool on) {
        stream(low, p, on);
        stream(sign, p + (256 - lane * 4), on);
    }
    __device__ __forceinline__ u32 word(int i) const { return i == 0 ? low.x : i == 1 ? low.y : sign; }
    __device__ __forceinline__ void unpack(u32 (&b)[4][2]) const {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const u32 w = e < 4 ? low.x : low.y;
            const int shift = 5 - 2 * (e % 4);
            const u32 bits = shift >= 0 ? w << shift : w >> -shift;
            b[e / 2][e % 2] = ((sign << (7 - e)) & 0x80808080u) | (bits & 0x60606060u);
        }
    }
};

// The tiles of a warp: NT neighbours of one job, or one if the job has less than NT. Jobs are cut into groups of RUNS
// such runs. The last run moves back to stay inside the matrix, and leaves the columns before `from` to their owner.
template <int NT>
__device__ __forceinline__ int run_tiles(const LinearJob& job) {
    return job.tiles < NT ? 1 : NT;
}

template <int NT, int RUNS>
__device__ __forceinline__ int job_groups(const LinearJob& job) {
    return job.tiles < NT ? (job.tiles + RUNS - 1) / RUNS : (job.tiles + NT * RUNS - 1) / (NT * RUNS);
}

struct Run {
    int job, tile;  // the first tile
    int from, end;  // columns to write
};

template <int NT, int RUNS>
__device__ __forceinline__ Run run_of(const LinearJobs& jobs, int group, int member) {
    int index = 0;
    for (; index + 1 < jobs.count; ++index) {
        const int groups = job_groups<NT, RUNS>(jobs.job[index]);
        if (group < groups) break;
        group -= groups;
    }
    const LinearJob& job = jobs.job[index];
    const int count = run_tiles<NT>(job), first = (group * RUNS + member) * count;
    const int tile = min(first, job.tiles - count);
    return {index, tile, first * TILE_COLUMNS, min((tile + count) * TILE_COLUMNS, job.n)};
}

// Addresses of a run. If it is one tile, the others repeat it.
struct WeightTiles {
    const u8* codes;    // this lane's
    const u16* scales;  // this lane's two columns
    const s16* zeros;
    u32 codes_stride;   // bytes between tiles
    u32 scales_stride;  // elements between tiles
};

template <int BITS, int NT>
__device__ __forceinline__ WeightTiles weight_tiles(const LinearJobs& jobs, const Run& run, int lane) {
    const LinearJob& job = jobs.job[run.job];
    const bool repeat = run_tiles<NT>(job) == 1;
    const u32 codes_stride = jobs.superblocks * 128 * BITS;
    const u32 scales_stride = jobs.superblocks * jobs.scales_per_superblock * 8;
    const u64 scale = (u64)run.tile * scales_stride + (lane % 4) * 2;
    return {job.codes + (u64)run.tile * codes_stride + lane * Codes<BITS>::LANE_BYTES, job.scales + scale,
            job.zeros ? job.zeros + scale : nullptr, repeat ? 0 : codes_stride, repeat ? 0 : scales_stride};
}

// The output at (row, column) is sum * factor + bias.
__device__ __forceinline__ void emit(const LinearJob& job, const Run& run, int row, int column, float sum, float factor,
                                     u64* guard) {
    if (column < run.from || column >= run.end) return;
    const float bias = job.bias ? job.bias[column] : 0.0f;
    const float value = fmaf(sum, factor, bias);
    job.out[(u64)row * job.n + column] = value;
    guard_finite(guard, job.check, row * job.n + column, value);
}

#endif
