// Linear at 1..8 rows (more through the grid) in half precision, two multiply-adds an instruction: for cards that have
// neither dot products nor tensor cores for it, with precision = fast only.
//
// A half sums 8 products, of integers up to 256 and activations below 16, before it goes on in fp32: no overflow, and
// an error within 8 * 2^-11 of the sum of their magnitudes. 6.1 runs half arithmetic at a 64th of its rate and has no
// such code; from 7.5 on tensor cores do better.
#include "linear/unpack.cuh"
#include "linear/widen.cuh"

#if __CUDA_ARCH__ == 600 || __CUDA_ARCH__ == 700
namespace {

// What a block shares, in dynamic shared memory: one of these a warp.
template <int ROWS, int TILES>
struct WarpShared {
    uint4 x[4 * ROWS * 4];  // [t][row][j] the superblock the warp works on
    float sum[TILES][ROWS][TILE_COLUMNS];
};

template <int BITS, int ROWS, int TILES>
__device__ __forceinline__ void multiply(const uint4* x, const LinearJobs& jobs, WarpShared<ROWS, TILES>& shared) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int superblocks = jobs.superblocks, parts = jobs.scales_per_superblock;
    const bool symmetric = jobs.job[0].zeros == nullptr;
    // Each warp takes a run of superblocks; runs differ by one at most.
    const int begin = warp * superblocks / warps, end = (warp + 1) * superblocks / warps;

    // A lane's codes, scales and zero points are of column lane / 4.
    const u8* codes_at[TILES];
    const u16* scales_at[TILES];
    const s16* zeros_at[TILES];
#pragma unroll
    for (int c = 0; c < TILES; ++c) {
        int tile = min((int)blockIdx.y * TILES + c, jobs.tiles - 1);
        const LinearJob& job = job_of_tile(jobs, tile);
        const size_t first = (size_t)tile * superblocks;
        codes_at[c] = job.codes + first * CodeWords<BITS>::TILE_BYTES;
        scales_at[c] = job.scales + first * parts * TILE_COLUMNS + lane / 4;
        zeros_at[c] = symmetric ? nullptr : job.zeros + first * parts * TILE_COLUMNS + lane / 4;
    }
    // Of a superblock's chunks, [t][8 rows][j], those of ROWS rows.
    constexpr int LOADS = ROWS / 2;
    const int first_row = blockIdx.x * ROWS;
    const uint4* x_at = x + (size_t)(first_row / 8) * superblocks * 128 + first_row % 8 * 4;
    uint4 staged[LOADS];
    Codes<BITS> codes[TILES];
    auto load = [&](int superblock) {
#pragma unroll
        for (int c = 0; c < TILES; ++c)
            codes[c].load(codes_at[c] + (size_t)superblock * CodeWords<BITS>::TILE_BYTES, lane);
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const int chunk = i * WARP + lane;
            staged[i] = __ldg(x_at + (size_t)superblock * 128 + chunk / (ROWS * 4) * 32 + chunk % (ROWS * 4));
        }
    };
    u16 scale[TILES];
    int zero[TILES] = {};
    auto load_scales = [&](int block) {
        const int at = (block * parts >> 2) * TILE_COLUMNS;
#pragma unroll
        for (int c = 0; c < TILES; ++c) {
            scale[c] = __ldg(scales_at[c] + at);
            if (!symmetric) zero[c] = __ldg(zeros_at[c] + at);
        }
    };
    if (begin < end) {
        load(begin);
        load_scales(begin * 4);
    }

    float total[TILES][ROWS] = {};
    u32 half[TILES][ROWS] = {};
    Widening<BITS> now[TILES] = {};
#pragma unroll 1
    for (int block = begin * 4; block < end * 4; ++block) {
        if (block % 4 == 0) {
            __syncwarp();  // the rows staged before have been read
#pragma unroll
            for (int i = 0; i < LOADS; ++i) shared.x[i * WARP + lane] = staged[i];
#pragma unroll
            for (int c = 0; c < TILES; ++c)
#pragma unroll
                for (int i = 0; i < BITS; ++i) now[c].word[i] = codes[c].word[i];
            if (block + 4 < end * 4) load(block / 4 + 1);  // in flight while this superblock is worked on
            __syncwarp();
        }
        u32 pair[TILES][4];
        float factor[TILES];
#pragma unroll
        for (int c = 0; c < TILES; ++c) {
            now[c].widen(middle_of<BITS>(zero[c]), pair[c]);
            now[c].advance(block);
            factor[c] = f32_of_f16(scale[c]);
        }
        if (block + 1 < end * 4) load_scales(block + 1);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const uint4 v = shared.x[(block % 4 * ROWS + r) * 4 + lane % 4];
#pragma unroll
            for (int c = 0; c < TILES; ++c) {
                half[c][r] = fma_f16x2(pair[c][0], v.x, half[c][r]);
                half[c][r] = fma_f16x2(pair[c][1], v.y, half[c][r]);
                half[c][r] = fma_f16x2(pair[c][2], v.z, half[c][r]);
                half[c][r] = fma_f16x2(pair[c][3], v.w, half[c][r]);
            }
        }
        // Two blocks make 8 products a half, if they share a scale.
        if (block % 2 == 1 || parts == 4) {
#pragma unroll
            for (int c = 0; c < TILES; ++c)
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    const float2 two = f32x2_of_f16x2(half[c][r]);
                    total[c][r] = fmaf(factor[c], two.x + two.y, total[c][r]);
                    half[c][r] = 0;
                }
        }
    }

#pragma unroll
    for (int c = 0; c < TILES; ++c)
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float sum = total[c][r];
            sum += __shfl_xor_sync(FULL_MASK, sum, 1);
            sum += __shfl_xor_sync(FULL_MASK, sum, 2);
            if (lane % 4 == 0) shared.sum[c][r][lane / 4] = sum;
        }
}

template <int BITS, int ROWS, int TILES>
__device__ __forceinline__ void linear(const uint4* x, const float* row_scales, const LinearJobs& jobs, u64* guard) {
    extern __shared__ uint4 dynamic[];
    auto* shared = reinterpret_cast<WarpShared<ROWS, TILES>*>(dynamic);
    multiply<BITS, ROWS, TILES>(x, jobs, shared[threadIdx.x / WARP]);
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
        float sum = 0.0f;
        for (int w = 0; w < warps; ++w) sum += shared[w].sum[c][r][i % TILE_COLUMNS];
        const float value = fmaf(sum, row_scales[row], job.bias ? __ldg(job.bias + column) : 0.0f);
        const size_t at = (size_t)row * job.n + column;
        job.out[at] = value;
        guard_finite(guard, job.check, (u32)at, value);
    }
}

}  // namespace

// Grid (ceil(rows / ROWS), ceil(tiles / TILES)). Block 32 * warps, up to 4 warps, with warps * ROWS * (256 + 32 * TILES)
// bytes of dynamic shared memory.
#define LINEAR_HALF2(BITS, ROWS, TILES, BLOCKS)                                                                    \
    extern "C" __global__ void __launch_bounds__(128, BLOCKS) linear_half2_w##BITS##_r##ROWS(                      \
        const uint4* x,          /* [row tiles of 8][superblocks][4 blocks] 512 bytes, see `round_f16` */          \
        const float* row_scales, /* (rows) f32 */                                                                  \
        LinearJobs jobs,         /* out (rows, n) f32 of each; all with zeros or all without */                    \
        u64* guard) {            /* 1 or null */                                                                   \
        linear<BITS, ROWS, TILES>(x, row_scales, jobs, guard);                                                     \
    }

LINEAR_HALF2(2, 4, 4, 3)
LINEAR_HALF2(2, 8, 4, 2)
LINEAR_HALF2(3, 4, 4, 3)
LINEAR_HALF2(3, 8, 4, 2)
LINEAR_HALF2(4, 4, 4, 3)
LINEAR_HALF2(4, 8, 4, 2)
// Twice the words a tile: two tiles are what the registers hold.
LINEAR_HALF2(8, 4, 2, 4)
LINEAR_HALF2(8, 8, 2, 3)
#endif
