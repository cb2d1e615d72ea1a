// Exact linear at 1..4 rows (more through the grid), every card: bound by reading the weights once.
//
// A code needs no conversion: masked out of its word in place, code << bit IS the fp32 number
// code * 2^(bit - 149), a subnormal (up to 24 bits: the exponents 0 and 1 have the same spacing), which FMA
// takes at full speed. The activations carry the opposite power of two, given to them once when a warp
// stages them. Codes are unsigned here; the middle is taken off through the sum of the activations.
#include "common.cuh"

// Activations are scaled by 2^80 / 2^bit: they may reach 2^48 and products keep 2^-80 absolute.
constexpr int ACTIVATION_EXPONENT = 80;
constexpr float RESULT_SCALE = 0x1p69f, SUM_SCALE = 0x1p-69f;  // 2^(149 - 80) and back

// One lane's codes of one superblock.
template <int BITS>
struct Codes {
    static constexpr int HALF = 1 << (BITS - 1);
    u32 word[BITS];

    // superblock: the first byte of (tile, superblock)
    __device__ __forceinline__ void load(const u8* superblock, int lane) {
        if (BITS == 4 || BITS == 8) {
#pragma unroll
            for (int w = 0; w < BITS; w += 4) {
                const uint4 four = __ldcs(reinterpret_cast<const uint4*>(superblock) + w / 4 * WARP + lane);
                word[w] = four.x, word[w + 1] = four.y, word[w + 2] = four.z, word[w + 3] = four.w;
            }
        } else {
            const uint2 two = __ldcs(reinterpret_cast<const uint2*>(superblock) + lane);
            word[0] = two.x, word[1] = two.y;
            if (BITS == 3) word[2] = __ldcs(reinterpret_cast<const u32*>(superblock + 256) + lane);
        }
    }

    // The upper bytes of blocks t and t + 1 (t even), past the 24 bits, share one word: bytes 0 and 1.
    __device__ __forceinline__ u32 tops(int t) const { return __byte_perm(word[t & ~1], word[t | 1], 0x0073); }

    // Rows 4 * upper.. of block t as numbers code * 2^(bit - 149); staging counts on these bits.
    __device__ __forceinline__ void four_rows(int t, int upper, float (&code)[4]) const {
        u32 bytes;    // a row in each byte
        int bit = 0;  // where in the byte
        if (BITS == 4) {
            bytes = word[t], bit = upper * 4;
        } else if (BITS == 8) {
            bytes = word[t * 2 + upper];
        } else if (BITS == 2) {
            bytes = word[t / 2], bit = t % 2 * 4 + upper * 2;
        } else {  // two low bits and the sign meet
            const int low = t % 2 * 4 + upper * 2, sign = t * 2 + upper;
            bytes = (word[t / 2] >> low & 0x03030303u) |
                    ((sign < 2 ? word[2] << (2 - sign) : word[2] >> (sign - 2)) & 0x04040404u);
        }
        constexpr u32 MASK = 2 * HALF - 1;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int at = i == 3 ? bit + (BITS == 4 ? t % 2 * 8 : 0) : i * 8 + bit;
            const u32 from = i < 3 ? bytes : BITS == 4 ? tops(t) : bytes >> 24;
            code[i] = __uint_as_float(from & MASK << at);
        }
    }

    // Two's complement to unsigned: all codes + HALF at once.
    __device__ __forceinline__ Codes biased() const {
        Codes to;
#pragma unroll
        for (int w = 0; w < BITS; ++w)
            to.word[w] = BITS == 3 ? w == 2 ? ~word[w] : word[w]
                                   : word[w] ^ (BITS == 4 ? 0x88888888u : BITS == 8 ? 0x80808080u : 0xaaaaaaaau);
        return to;
    }

    // For the rows 4 * lane.. of a superblock.
    __device__ __forceinline__ static int staged_bit(int lane) {
        const int upper = lane % 2, t = lane / 8;
        return BITS == 4 ? upper * 4 : BITS == 2 ? t % 2 * 4 + upper * 2 : 0;
    }
};

// Elements from one superblock's scales to the next's.
template <int PARTS>
__device__ __forceinline__ int parts_step(int parts) {
    return PARTS == 1 ? TILE_COLUMNS : parts * TILE_COLUMNS;
}

// What a block shares, in dynamic shared memory: one of these a warp.
template <int ROWS, int TILES>
struct WarpShared {
    float4 x[ROWS][WARP];  // the superblock the warp works on
    float sum[TILES][ROWS][TILE_COLUMNS];
};

// PARTS: how often a superblock's scale changes, 1 or up to 4.
template <int BITS, int ROWS, int TILES, int PARTS, bool SYMMETRIC>
__device__ __forceinline__ void multiply(const float* x, const LinearJobs& jobs, WarpShared<ROWS, TILES>& shared) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int superblocks = jobs.superblocks, parts = jobs.scales_per_superblock;
    // Each warp takes a run of superblocks; runs differ by one at most.
    const int begin = warp * superblocks / warps, end = (warp + 1) * superblocks / warps;

    // A lane's codes are of column lane / 4, and so are its scales if a superblock has one; of more, each
    // lane loads the one of block lane / 8 and column lane % 8.
    const int scale_offset = PARTS == 1 ? lane / 4 : (lane / 8 * parts >> 2) * TILE_COLUMNS + lane % 8;
    const u8* codes_at[TILES];
    const u16* scales_at[TILES];
    const s16* zeros_at[TILES];
#pragma unroll
    for (int c = 0; c < TILES; ++c) {
        int tile = min((int)blockIdx.y * TILES + c, jobs.tiles - 1);
        const LinearJob& job = job_of_tile(jobs, tile);
        const size_t first = (size_t)tile * superblocks + begin;
        const size_t scale = first * parts * TILE_COLUMNS + scale_offset;
        codes_at[c] = job.codes + first * (SUPERBLOCK_ROWS * BITS);
        scales_at[c] = job.scales + scale;
        zeros_at[c] = job.zeros + scale;
    }
    const float4* x_at[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const int row = min((int)blockIdx.x * ROWS + r, jobs.rows - 1);
        x_at[r] = reinterpret_cast<const float4*>(x) + ((size_t)row * superblocks + begin) * WARP + lane;
    }
    const float power = __uint_as_float((127 + ACTIVATION_EXPONENT - Codes<BITS>::staged_bit(lane)) << 23);
    const float last_power = BITS == 4 && lane / 8 % 2 ? power * 0x1p-8f : power;

    Codes<BITS> codes[TILES];
    u16 scale[TILES];
    s16 zero[TILES];
    float4 values[ROWS];
    auto load = [&](bool more) {
        if (more) {
#pragma unroll
            for (int c = 0; c < TILES; ++c) {
                codes[c].load(codes_at[c], lane);
                scale[c] = __ldg(scales_at[c]);
                if (!SYMMETRIC) zero[c] = __ldg(zeros_at[c]);
            }
#pragma unroll
            for (int r = 0; r < ROWS; ++r) values[r] = __ldg(x_at[r]);
        }
#pragma unroll
        for (int c = 0; c < TILES; ++c) {
            codes_at[c] += SUPERBLOCK_ROWS * BITS;
            scales_at[c] += parts_step<PARTS>(parts);
            zeros_at[c] += parts_step<PARTS>(parts);
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) x_at[r] += WARP;
    };
    load(begin < end);

    float total[TILES][ROWS] = {};
    auto step = [&](bool more) {
        __syncwarp();  // the rows staged before have been read
        float share[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float4 v = values[r];
            shared.x[r][lane] =
                make_float4(v.x * power, v.y * (power * 0x1p-8f), v.z * (power * 0x1p-16f), v.w * last_power);
            // Together the four lanes of a column take off middle * (sum of activations); what share of the
            // sum each has is free: here that of the lanes l % 4, of a block or of the superblock.
            share[r] = ((v.x + v.y) + (v.z + v.w)) * -SUM_SCALE;
#pragma unroll
            for (int other = 4; other < (PARTS == 1 ? WARP : 8); other *= 2)
                share[r] += __shfl_xor_sync(FULL_MASK, share[r], other);
        }
        Codes<BITS> now[TILES];
        float factor[TILES], middle[TILES];
#pragma unroll
        for (int c = 0; c < TILES; ++c) {
            now[c] = codes[c].biased();
            factor[c] = f32_of_f16(scale[c]);
            middle[c] = SYMMETRIC ? Codes<BITS>::HALF : Codes<BITS>::HALF + zero[c];
        }
        load(more);  // in flight while this superblock is worked on
        __syncwarp();

        float dot[TILES][ROWS];
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            const int of_block = t * 8;
            if (t % (4 / PARTS) == 0) {
                float own[ROWS];
#pragma unroll
                for (int r = 0; r < ROWS; ++r)
                    own[r] = PARTS == 1 ? share[r] : __shfl_sync(FULL_MASK, share[r], of_block + lane % 4);
#pragma unroll
                for (int c = 0; c < TILES; ++c) {
                    const float m = PARTS == 1 || SYMMETRIC
                                        ? middle[c]
                                        : __shfl_sync(FULL_MASK, middle[c], of_block + lane / 4);
#pragma unroll
                    for (int r = 0; r < ROWS; ++r) dot[c][r] = m * own[r];
                }
            }
#pragma unroll
            for (int upper = 0; upper < 2; ++upper) {
                float4 v[ROWS];
#pragma unroll
                for (int r = 0; r < ROWS; ++r) v[r] = shared.x[r][t * 8 + lane % 4 * 2 + upper];
#pragma unroll
                for (int c = 0; c < TILES; ++c) {
                    float code[4];
                    now[c].four_rows(t, upper, code);
#pragma unroll
                    for (int r = 0; r < ROWS; ++r) {
                        // These never flush subnormals, whatever the compiler's flags.
                        dot[c][r] = __fmaf_ieee_rn(v[r].x, code[0], dot[c][r]);
                        dot[c][r] = __fmaf_ieee_rn(v[r].y, code[1], dot[c][r]);
                        dot[c][r] = __fmaf_ieee_rn(v[r].z, code[2], dot[c][r]);
                        dot[c][r] = __fmaf_ieee_rn(v[r].w, code[3], dot[c][r]);
                    }
                }
            }
            if ((t + 1) % (4 / PARTS) == 0) {
#pragma unroll
                for (int c = 0; c < TILES; ++c) {
                    const float f =
                        PARTS == 1 ? factor[c] : __shfl_sync(FULL_MASK, factor[c], of_block + lane / 4);
#pragma unroll
                    for (int r = 0; r < ROWS; ++r) total[c][r] = fmaf(f, dot[c][r], total[c][r]);
                }
            }
        }
    };
    // A loop that all warps leave at once needs no care for divergence around its shuffles.
    const int common = superblocks / warps;
    int done = 0;
    for (; done + 1 < common; ++done) step(true);
    for (; begin + done < end; ++done) step(begin + done + 1 < end);

#pragma unroll
    for (int c = 0; c < TILES; ++c)
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float sum = total[c][r];
            sum += __shfl_xor_sync(FULL_MASK, sum, 1);
            sum += __shfl_xor_sync(FULL_MASK, sum, 2);
            if (lane % 4 == 0) shared.sum[c][r][lane / 4] = sum * RESULT_SCALE;
        }
}

template <int BITS, int ROWS, int TILES, int PARTS, bool SYMMETRIC>
__device__ __forceinline__ void linear_f32_gemv(const float* x, const LinearJobs& jobs, u64* guard) {
    extern __shared__ float4 dynamic[];
    auto* shared = reinterpret_cast<WarpShared<ROWS, TILES>*>(dynamic);
    multiply<BITS, ROWS, TILES, PARTS, SYMMETRIC>(x, jobs, shared[threadIdx.x / WARP]);
    __syncthreads();

    const int warps = blockDim.x / WARP;
    for (int i = threadIdx.x; i < TILES * ROWS * TILE_COLUMNS; i += blockDim.x) {
        const int c = i / (ROWS * TILE_COLUMNS), r = i / TILE_COLUMNS % ROWS;
        int tile = blockIdx.y * TILES + c;
        const int row = blockIdx.x * ROWS + r;
        if (tile >= jobs.tiles || row >= jobs.rows) continue;
        const LinearJob& job = job_of_tile(jobs, tile);
        const int column = tile * TILE_COLUMNS + i % TILE_COLUMNS;
        if (column >= job.n) continue;
        float value = job.bias ? __ldg(job.bias + column) : 0.0f;
        for (int w = 0; w < warps; ++w) value += shared[w].sum[c][r][i % TILE_COLUMNS];
        const size_t at = (size_t)row * job.n + column;
        job.out[at] = value;
        guard_finite(guard, job.check, (u32)at, value);
    }
}

// Grid (ceil(rows / ROWS), ceil(tiles / TILES)): the blocks that read the same weights run side by side.
// Block 32 * warps, warps <= THREADS / 32, with warps * ROWS * (512 + 32 * TILES) bytes of dynamic shared
// memory. Few tiles want many warps and TILES 2; many tiles want TILES 4, which unpacks with fewer loads of x.
// Symbols of their own for fine scales (more than one a superblock) and for zero points: as branches of one
// symbol they spilled. Zero points take registers that leave room for a block less where room is scarcest.
#define LINEAR_F32_GEMV_SYMBOL(SUFFIX, BITS, ROWS, TILES, PARTS, SYMMETRIC, THREADS, BLOCKS)    \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                               \
        linear_f32_gemv_w##BITS##_r##ROWS##_t##TILES##SUFFIX(                                   \
            const float* x,   /* (rows, superblocks * 128) f32, row-major */                    \
            LinearJobs jobs,  /* out (rows, n) f32 of each; all with zeros or all without */    \
            u64* guard) {     /* 1 or null */                                                   \
        linear_f32_gemv<BITS, ROWS, TILES, PARTS, SYMMETRIC>(x, jobs, guard);                   \
    }
#define LINEAR_F32_GEMV(BITS, ROWS, TILES, THREADS, BLOCKS)                                                       \
    LINEAR_F32_GEMV_SYMBOL(, BITS, ROWS, TILES, 1, true, THREADS, BLOCKS)                                         \
    LINEAR_F32_GEMV_SYMBOL(_fine, BITS, ROWS, TILES, 4, true, THREADS, BLOCKS)                                    \
    LINEAR_F32_GEMV_SYMBOL(_zeros, BITS, ROWS, TILES, 1, false, THREADS, BLOCKS > 4 ? BLOCKS - 1 : BLOCKS)        \
    LINEAR_F32_GEMV_SYMBOL(_fine_zeros, BITS, ROWS, TILES, 4, false, THREADS, BLOCKS > 4 ? BLOCKS - 1 : BLOCKS)
#define LINEAR_F32_GEMV_ROWS(BITS)          \
    LINEAR_F32_GEMV(BITS, 1, 2, 256, 3)     \
    LINEAR_F32_GEMV(BITS, 1, 4, 128, 5)     \
    LINEAR_F32_GEMV(BITS, 2, 4, 256, 2)     \
    LINEAR_F32_GEMV(BITS, 4, 4, 128, 3)

LINEAR_F32_GEMV_ROWS(2)
LINEAR_F32_GEMV_ROWS(3)
LINEAR_F32_GEMV_ROWS(4)
// Twice the words a tile: two tiles are what the registers hold.
LINEAR_F32_GEMV(8, 1, 2, 256, 2)
LINEAR_F32_GEMV(8, 2, 2, 256, 2)
LINEAR_F32_GEMV(8, 4, 2, 128, 3)
