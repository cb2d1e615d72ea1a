// Exact linear for many rows, every card: weights become fp32 in shared memory, then fp32 FMA.
#include "linear/sgemm.cuh"

// 8 depths (one unit of the layout) of one quantised column at a time.
template <int BITS>
struct WeightColumn {
    const u8* codes;     // of its tile
    const u16* scales;   // of its tile and column
    const s16* zeros;    // likewise, or null
    int scales_per_superblock, lane;
    u32 low, high;       // 2, 4: one word; 8: rows 0..3 and 4..7; 3: low two bits and signs
    u16 scale;
    int zero;

    __device__ void begin(const LinearJobs& jobs, int column, int half) {
        int tile = min(column / TILE_COLUMNS, jobs.tiles - 1);
        const LinearJob& job = job_of_tile(jobs, tile);
        scales_per_superblock = jobs.scales_per_superblock;
        const size_t first = (size_t)tile * jobs.superblocks;
        codes = job.codes + first * (SUPERBLOCK_ROWS * BITS);
        const size_t at = first * scales_per_superblock * TILE_COLUMNS + column % TILE_COLUMNS;
        scales = job.scales + at;
        zeros = job.zeros ? job.zeros + at : nullptr;
        lane = column % TILE_COLUMNS * 4 + half;
        zero = 0;
    }

    // A step is half a block: units 0, 1 or 2, 3.
    __device__ void fetch(int step) {
        const int superblock = step / CHUNK_STEPS, block = step / 2 % 4;
        const int unit_lane = lane + step % 2 * 2;
        const u8* at = codes + (size_t)superblock * (SUPERBLOCK_ROWS * BITS);
        if (BITS == 4) {
            low = __ldg(reinterpret_cast<const u32*>(at + unit_lane * 16 + block * 4));
        } else if (BITS == 8) {
            const uint2 words =
                __ldg(reinterpret_cast<const uint2*>(at + block / 2 * 512 + unit_lane * 16 + block % 2 * 8));
            low = words.x, high = words.y;
        } else {
            low = __ldg(reinterpret_cast<const u32*>(at + unit_lane * 8 + block / 2 * 4)) >> block % 2 * 4;
            if (BITS == 3) high = __ldg(reinterpret_cast<const u32*>(at + 256 + unit_lane * 4)) >> block * 2;
        }
        const int group = superblock * scales_per_superblock + (block * scales_per_superblock >> 2);
        scale = __ldg(scales + group * TILE_COLUMNS);
        if (zeros) zero = __ldg(zeros + group * TILE_COLUMNS);
    }

    __device__ u32 field(int i) const {
        const int byte = i % 4 * 8, upper = i / 4;
        if (BITS == 8) return (upper ? high : low) >> byte & 0xff;
        if (BITS == 4) return low >> (byte + upper * 4) & 0xf;
        const u32 two = low >> (byte + upper * 2) & 3;
        return BITS == 2 ? two : two | (high >> (byte + upper) & 1) << 2;
    }

    __device__ void values(float (&to)[8]) const {
        // Codes become floats as the low mantissa bits of 2^23; the subtraction is exact.
        constexpr u32 HALF = 1u << (BITS - 1);
        const float factor = f32_of_f16(scale), offset = 8388608.0f + HALF + zero;
#pragma unroll
        for (int i = 0; i < 8; ++i) to[i] = (__uint_as_float((field(i) ^ HALF) | 0x4b000000) - offset) * factor;
    }
};

template <int BITS, class Gemm>
__device__ __forceinline__ void linear_f32(const float* x, const LinearJobs& jobs, u64* guard) {
    __shared__ typename Gemm::Shared shared;
    Gemm gemm;
    const int first_row = blockIdx.x * Gemm::TILE_M, first_column = blockIdx.y * Gemm::TILE_N;
    const int depth = jobs.superblocks * SUPERBLOCK_ROWS;
    DenseRow<float> a[Gemm::A_RUNS];
    WeightColumn<BITS> b[Gemm::B_RUNS];
#pragma unroll
    for (int i = 0; i < Gemm::A_RUNS; ++i) {
        // Rows past the end repeat the last one: nothing of them is written.
        const int row = min(first_row + gemm.a_row(i), jobs.rows - 1);
        a[i].begin(x + (size_t)row * depth, depth, gemm.a_half(i));
    }
#pragma unroll
    for (int i = 0; i < Gemm::B_RUNS; ++i) b[i].begin(jobs, first_column + gemm.b_row(i), gemm.b_half(i));
    gemm.multiply(shared, a, b, jobs.superblocks);
    if (gemm.group > 0) return;

#pragma unroll
    for (int n = 0; n < Gemm::COLUMNS; ++n) {
        int tile = (first_column + gemm.column_of(n)) / TILE_COLUMNS;
        if (tile >= jobs.tiles) continue;
        const LinearJob& job = job_of_tile(jobs, tile);
        const int column = tile * TILE_COLUMNS + gemm.column_of(n) % TILE_COLUMNS;
        if (column >= job.n) continue;
        const float bias = job.bias ? __ldg(job.bias + column) : 0.0f;
#pragma unroll
        for (int m = 0; m < Gemm::ROWS; ++m) {
            const int row = first_row + gemm.row_of(m);
            if (row >= jobs.rows) continue;
            const size_t at = (size_t)row * job.n + column;
            const float value = gemm.sum[m][n] + bias;
            job.out[at] = value;
            guard_finite(guard, job.check, (u32)at, value);
        }
    }
}

// Grid (ceil(rows / M), ceil(tiles * 8 / N)), block M / R * N / C * G.
#define LINEAR_F32(BITS, M, N, R, C, G, BLOCKS)                                                           \
    extern "C" __global__ void __launch_bounds__(M / R * (N / C) * G, BLOCKS) linear_f32_w##BITS##_t##M(  \
        const float* x,   /* (rows, superblocks * 128) f32, row-major */                                  \
        LinearJobs jobs,  /* out (rows, n) f32 of each */                                                 \
        u64* guard) {     /* 1 or null */                                                                 \
        linear_f32<BITS, Sgemm<M, N, R, C, G>>(x, jobs, guard);                                           \
    }
#define LINEAR_F32_TILES(BITS)               \
    LINEAR_F32(BITS, 128, 128, 8, 16, 1, 2)  \
    LINEAR_F32(BITS, 64, 128, 8, 8, 2, 2)    \
    LINEAR_F32(BITS, 32, 64, 4, 8, 4, 2)

LINEAR_F32_TILES(2)
LINEAR_F32_TILES(3)
LINEAR_F32_TILES(4)
LINEAR_F32_TILES(8)
