// Linear with 2, 3, 4 or 8 bit weights on fp16 tensor cores (m16n8k8 from Turing on, m8n8k4 on Volta), of the
// exact family.
//
// An activation is the sum of two f16, high and low, under a power of two of its row (ops/quantise.cu says how close:
// within 2^-23 of itself or 2^-39 of its row's largest); a code less its zero point is an integer that f16 holds. So
// products are exact, and what is lost is what fp32 sums lose. A tensor core rounds each of its sums towards zero:
// therefore a block of 32 rows starts a sum of its own, the low halves first, and fp32 arithmetic scales it and adds
// it on.
//
// The order in which a block's rows meet the mma's depth is that in which codes come out of their words, the same
// for both operands. The warps of a block share activations through shared memory; a warp's weights have no one to be
// shared with and come from memory straight to registers. All blocks have 128 threads.
#include "linear/mma.cuh"
#include "linear/widen.cuh"

#if __CUDA_ARCH__ >= 700
namespace {

// What the two kinds of tensor cores differ in. The product of 16 rows, 8 columns and a block: `holder` is the lane in
// whose place of the layouts (row or column * 4 + unit) a lane's operands stand; `add` takes two pairs of values of a
// unit, in two halves; a lane's scales are those of PAIRS pairs of columns.
#if __CUDA_ARCH__ >= 750
struct Fragment {
    static constexpr int SUMS = 4, PAIRS = 1;
    float sum[SUMS];

    static __device__ int holder(int lane) { return lane; }
    static __device__ int scale_column(int lane, int) { return lane % 4 * 2; }
    static __device__ int pair_of(int) { return 0; }

    // A half is a pair; a: the words of rows lane / 4 and + 8, of two pairs in turn.
    __device__ __forceinline__ void add(const uint4& a, const u32* b, int half) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(half ? a.z : a.x), "r"(half ? a.w : a.y), "r"(b[half]));
    }

    // Two pairs of neighbouring columns, and where the pairs stand.
    __device__ __forceinline__ void finish(float (&to)[4], int) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) to[i] = sum[i];
    }
    static __device__ int row(int lane, int pair) { return pair * 8 + lane / 4; }
    static __device__ int column(int lane) { return lane % 4 * 2; }
};
#else
// Four groups of 8 lanes, lane / 4 % 4, multiply at once; each takes one unit, so their sums are of different depths.
struct Fragment {
    static constexpr int SUMS = 16, PAIRS = 2;
    float sum[SUMS];

    static __device__ int holder(int lane) { return (lane % 4 + lane / 16 * 4) * 4 + lane / 4 % 4; }
    static __device__ int scale_column(int lane, int pair) { return pair * 4 + (lane & 2); }
    static __device__ int pair_of(int e) { return e / 4 % 2; }

    // A half is 8 of the rows; both take both pairs.
    __device__ __forceinline__ void add(const uint4& a, const u32* b, int half) {
        float* c = sum + half * 8;
        asm("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9}, {%10, %11}, "
            "{%0, %1, %2, %3, %4, %5, %6, %7};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7])
            : "r"(half ? a.y : a.x), "r"(half ? a.w : a.z), "r"(b[0]), "r"(b[1]));
    }

    // The four groups' sums added up, of which each group keeps a quarter.
    __device__ __forceinline__ void finish(float (&to)[4], int lane) const {
        const bool upper = lane & 8, right = lane & 4;
        float rows[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float other = __shfl_xor_sync(FULL_MASK, upper ? sum[i] : sum[8 + i], 8);
            rows[i] = (upper ? sum[8 + i] : sum[i]) + other;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float other = __shfl_xor_sync(FULL_MASK, right ? rows[i] : rows[4 + i], 4);
            to[i] = (right ? rows[4 + i] : rows[i]) + other;
        }
    }
    static __device__ int row(int lane, int pair) { return lane / 8 % 2 * 8 + lane / 16 * 4 + pair * 2 + lane % 2; }
    static __device__ int column(int lane) { return lane / 4 % 2 * 4 + (lane & 2); }
};
#endif

constexpr int THREADS = WARPS * WARP;
constexpr int BLOCK_CHUNKS = 4 * WARP;  // 16 bytes each, of 16 rows of a block of 32: see `split_f16`
constexpr int STAGE_CHUNKS = 512;       // what the warps share at once: 16 rows of four blocks, or 64 rows of one

// Grid (groups of 16 * RT rows, groups of NT * WARPS tiles, splits of K): row groups first, so that blocks at work
// together read the same weights.
template <int BITS, int RT, int NT>
__device__ __forceinline__ void multiply(const LinearJobs& jobs, const uint4* x, const float* row_scales,
                                         float* scratch, u32* tickets, u64* guard) {
    constexpr int DEPTH = 4 / RT, LOADS = STAGE_CHUNKS / THREADS;  // blocks of a stage; a thread's chunks of one
    constexpr int COLUMNS = NT * TILE_COLUMNS, PITCH = COLUMNS + 8;  // of a warp's output; 8: no bank conflicts
    __shared__ uint4 shared[2 * STAGE_CHUNKS];
    static_assert(WARPS * 16 * PITCH * 4 <= (int)sizeof(shared), "");

    const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP, sp = jobs.scales_per_superblock;
    const int holder = Fragment::holder(lane);
    const WeightTiles w = weight_tiles<BITS, NT>(jobs, run_of<NT, WARPS>(jobs, blockIdx.y, warp), holder);
    const u16* tile_scales = w.scales - holder % 4 * 2;
    const s16* zeros = w.zeros ? w.zeros - holder % 4 * 2 + holder / 4 : nullptr;  // of the column a lane widens
    const int row_tile = blockIdx.x * RT, last_row_tile = (jobs.rows - 1) / 16;
    const int begin = jobs.superblocks * blockIdx.z / gridDim.z;
    const int end = jobs.superblocks * (blockIdx.z + 1) / gridDim.z;

    // Chunks lie in a stage as in memory, one row tile behind the other. Those past the last repeat it: never written.
    u32 from[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
        const int tile = i * THREADS / (DEPTH * BLOCK_CHUNKS);
        from[i] = (u32)min(row_tile + tile, last_row_tile) * jobs.superblocks * (4 * BLOCK_CHUNKS) +
                  i * THREADS % (DEPTH * BLOCK_CHUNKS) + thread;
    }
    uint4 staged[LOADS];
    auto load_stage = [&](int block) {
#pragma unroll
        for (int i = 0; i < LOADS; ++i) staged[i] = __ldcg(x + from[i] + (u32)block * BLOCK_CHUNKS);
    };
    auto store_stage = [&](uint4* stage) {
#pragma unroll
        for (int i = 0; i < LOADS; ++i) stage[i * THREADS + thread] = staged[i];
    };
    Codes<BITS> codes[NT] = {};
    auto load_codes = [&](int sb) {
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
            codes[nt].load(w.codes + (u64)(u32)sb * (128 * BITS) + (u64)w.codes_stride * nt, holder, true);
    };
    u32 scales[NT][Fragment::PAIRS];
    int zero[NT] = {};
    auto load_scales = [&](int block) {
        const u32 at = (block * sp >> 2) * 8;
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
            for (int p = 0; p < Fragment::PAIRS; ++p)
                scales[nt][p] = __ldg((const u32*)(tile_scales + (u64)w.scales_stride * nt + at +
                                                   Fragment::scale_column(lane, p)));
            if (zeros) zero[nt] = __ldg(zeros + (u64)w.scales_stride * nt + at);
        }
    };

    float sum[RT][NT][Fragment::SUMS] = {};
    if (begin < end) {
        load_stage(begin * 4);
        load_codes(begin);
        load_scales(begin * 4);
        store_stage(shared);
    }
    __syncthreads();
    const int stop = end * 4;
    int stage = 0;
    Widening<BITS> now[NT] = {};
#pragma unroll 1
    for (int block = begin * 4; block < stop; ++block) {
        if (block % 4 == 0) {
#pragma unroll
            for (int nt = 0; nt < NT; ++nt)
#pragma unroll
                for (int i = 0; i < BITS; ++i) now[nt].word[i] = codes[nt].word(i);
            if (block + 4 < stop) load_codes(block / 4 + 1);
        }
        if (block % DEPTH == 0 && block + DEPTH < stop) load_stage(block + DEPTH);
        u32 b[NT][4];
        float2 scale[NT][Fragment::PAIRS];
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            now[nt].widen(middle_of<BITS>(zero[nt]), b[nt]);
            now[nt].advance(block);
#pragma unroll
            for (int p = 0; p < Fragment::PAIRS; ++p) scale[nt][p] = f32x2_of_f16x2(scales[nt][p]);
        }
        if (block + 1 < stop) load_scales(block + 1);
        const uint4* chunks = shared + stage + block % DEPTH * BLOCK_CHUNKS + holder;
#pragma unroll
        for (int r = 0; r < RT; ++r) {
            Fragment dot[NT] = {};
#pragma unroll
            for (int part = 3; part >= 0; --part) {  // the low halves first
                const uint4 a = chunks[r * DEPTH * BLOCK_CHUNKS + part * WARP];
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int nt = 0; nt < NT; ++nt) dot[nt].add(a, b[nt] + part % 2 * 2, half);
            }
#pragma unroll
            for (int nt = 0; nt < NT; ++nt)
#pragma unroll
                for (int e = 0; e < Fragment::SUMS; ++e) {
                    const float2 pair = scale[nt][Fragment::pair_of(e)];
                    sum[r][nt][e] = fmaf(e % 2 ? pair.y : pair.x, dot[nt].sum[e], sum[r][nt][e]);
                }
        }
        if (block % DEPTH == DEPTH - 1) {
            stage ^= STAGE_CHUNKS;
            if (block + 1 < stop) store_stage(shared + stage);
            __syncthreads();
        }
    }

    // The run once more, from a block index the compiler cannot know: kept, it would cost the main loop registers.
    u32 group;
    asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(group));
    const Run tiles = run_of<NT, WARPS>(jobs, group, warp);
    constexpr int SUMS = RT * NT * 4;
    float own[SUMS];
#pragma unroll
    for (int i = 0; i < RT * NT; ++i) {
        Fragment all;
        float four[4];
#pragma unroll
        for (int e = 0; e < Fragment::SUMS; ++e) all.sum[e] = sum[i / NT][i % NT][e];
        all.finish(four, lane);
#pragma unroll
        for (int e = 0; e < 4; ++e) own[i * 4 + e] = four[e];
    }
    const int output = blockIdx.y * gridDim.x + blockIdx.x, splits = gridDim.z;
    if (splits > 1) {
        float* sums = scratch + (u64)output * splits * (SUMS * THREADS) + thread;
#pragma unroll
        for (int i = 0; i < SUMS; ++i) sums[(blockIdx.z * SUMS + i) * THREADS] = own[i];
        if (!last_split(tickets, output, splits, thread)) return;
#pragma unroll
        for (int i = 0; i < SUMS; ++i) own[i] = 0.0f;
#pragma unroll 1
        for (int s = 0; s < splits; ++s) {
#pragma unroll
            for (int i = 0; i < SUMS; ++i) own[i] += __ldcg(sums + (s * SUMS + i) * THREADS);
        }
    }
    // Each warp turns its row tiles through shared memory, so that rows leave whole.
    float* turn = (float*)shared + warp * 16 * PITCH;
#pragma unroll
    for (int r = 0; r < RT; ++r) {
        __syncwarp();
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                const float* two = own + (r * NT + nt) * 4 + pair * 2;
                *(float2*)(turn + Fragment::row(lane, pair) * PITCH + nt * TILE_COLUMNS + Fragment::column(lane)) =
                    make_float2(two[0], two[1]);
            }
        __syncwarp();
#pragma unroll 1
        for (int e = lane; e < 16 * COLUMNS; e += WARP) {
            const int row = (row_tile + r) * 16 + e / COLUMNS, column = e % COLUMNS;
            if (row < jobs.rows)
                emit(jobs.job[tiles.job], tiles, row, tiles.tile * TILE_COLUMNS + column,
                     turn[e / COLUMNS * PITCH + column], row_scales[row], guard);
        }
    }
}

}  // namespace

// x: [row tiles of 16][superblocks][4 blocks] 2048 bytes, see `split_f16`. row_scales: (rows) f32. scratch: (sums of the
// splits that share an output) f32. tickets: (outputs so shared) u32, 0 before the first launch, and left so. guard may
// be null. The number is the rows a block takes.
#define LINEAR_A16_MMA(BITS, RT, NT, BLOCKS)                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) linear_a16_mma_w##BITS##_rows##RT(                 \
        const __grid_constant__ LinearJobs jobs, const uint4* x, const float* row_scales, float* scratch,            \
        u32* tickets, u64* guard) {                                                                                  \
        multiply<BITS, RT / 16, NT>(jobs, x, row_scales, scratch, tickets, guard);                                   \
    }
// NT: on Volta a lane holds four times the sums.
#if __CUDA_ARCH__ >= 750
#define LINEAR_A16_MMA_ROWS(BITS)  \
    LINEAR_A16_MMA(BITS, 16, 4, 3) \
    LINEAR_A16_MMA(BITS, 32, 4, 2) \
    LINEAR_A16_MMA(BITS, 64, 4, 2)
#else
#define LINEAR_A16_MMA_ROWS(BITS)  \
    LINEAR_A16_MMA(BITS, 16, 2, 3) \
    LINEAR_A16_MMA(BITS, 32, 2, 2)
#endif

LINEAR_A16_MMA_ROWS(2)
LINEAR_A16_MMA_ROWS(3)
LINEAR_A16_MMA_ROWS(4)
LINEAR_A16_MMA_ROWS(8)
#endif
