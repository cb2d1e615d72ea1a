// Linear for many activation rows on int8 activations: a tiled dp4a product with fp32 scaling.
// Codes are unpacked on their way to shared memory, so every bit width has the same inner loop: a word
// of 4 rows of K from 8 activation rows and 8 columns, 64 dp4a. Shared memory returns one word a clock
// and lane, a P40 does four dp4a in that time, so the tile of a thread has to be that large.
#include "linear/dp4a.cuh"
#include "linear/splits.cuh"

#if __CUDA_ARCH__ >= 610

constexpr int WARPS = 4, THREADS = WARPS * WARP;
constexpr int LANE_ROWS = 4, LANE_COLUMNS = 8;  // lanes of a warp
constexpr int M = 8, N = 8;                     // rows and columns of a thread, in runs of 4
constexpr int WARP_COLUMNS = LANE_COLUMNS * N;
constexpr int ROW_STEP = LANE_ROWS * 4, COLUMN_STEP = LANE_COLUMNS * 4;  // between the runs of a thread
constexpr int WORDS = BLOCK_ROWS / 4;           // of a block of 32 rows of K

// ROW_WARPS x COLUMN_WARPS warps side by side. Where these are fewer than 4, several groups of warps split
// the blocks of a superblock. Where the outputs are too few to fill the card, blocks split the superblocks.
template <int ROW_WARPS, int COLUMN_WARPS>
struct Shape {
    static constexpr int ROWS = LANE_ROWS * M * ROW_WARPS;
    static constexpr int COLUMNS = WARP_COLUMNS * COLUMN_WARPS;
    static constexpr int TILES = COLUMNS / TILE_COLUMNS;
    static constexpr int SPLITS = WARPS / (ROW_WARPS * COLUMN_WARPS);
    static constexpr bool BLOCKS_SPLIT = SPLITS > 1;  // the largest tile is for outputs that fill the card
    static_assert(ROWS * 4 % THREADS == 0 && TILES % WARPS == 0);  // copied in whole pieces
};

// One superblock of a block's tile, [t][word of K][row or column]. The pads spread the writes over the banks.
template <typename S>
struct alignas(16) Stage {
    int q[4][WORDS][S::ROWS + 4];
    int codes[4][WORDS][S::COLUMNS + 4];
    float d[4][S::ROWS];
    float dsum[4][S::ROWS];
    float scale[4][S::COLUMNS];
    float zero[4][S::COLUMNS];  // -zero * scale
};

// Where an n-tile begins.
struct Source {
    const u8* codes;
    const u16* scales;
    const s16* zeros;
};

// COUNT values in runs of 4 that lie STEP apart.
template <int STEP, typename T4, typename T, int COUNT>
__device__ __forceinline__ void load_runs(const T* from, T (&to)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT / 4; i++) {
        const T4 v = *(const T4*)(from + i * STEP);
        to[4 * i] = v.x, to[4 * i + 1] = v.y, to[4 * i + 2] = v.z, to[4 * i + 3] = v.w;
    }
}

template <int BITS, int ROW_WARPS, int COLUMN_WARPS>
__device__ __forceinline__ void gemm(
    const u8* q,        // [row tiles][superblocks][32 lanes][4 blocks] 8 bytes s8
    const float* d,     // [row tiles][superblocks][8 rows][4 blocks]
    const float* dsum,  // like d; read only with zeros
    const LinearJobs& jobs,
    float* scratch,     // [output][split][warp][M * N][lane]; read only with splits
    u32* tickets,       // [output], zero between launches
    u64* guard) {
    using S = Shape<ROW_WARPS, COLUMN_WARPS>;
    constexpr int SUMS_BYTES = S::SPLITS > 1 ? ROW_WARPS * COLUMN_WARPS * M * N * WARP * sizeof(float) : 0;
    constexpr int STAGE_BYTES = sizeof(Stage<S>);
    constexpr int SHARED_BYTES = SUMS_BYTES > STAGE_BYTES ? SUMS_BYTES : STAGE_BYTES;
    static_assert(SHARED_BYTES <= 48 * 1024);
    __shared__ uint4 shared[SHARED_BYTES / sizeof(uint4)];
    Stage<S>& stage = *(Stage<S>*)shared;
    __shared__ Source sources[S::TILES];

    const u32 thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    const u32 row_warp = warp % ROW_WARPS, column_warp = warp / ROW_WARPS % COLUMN_WARPS;
    const u32 split = warp / (ROW_WARPS * COLUMN_WARPS);
    const int superblocks = jobs.superblocks, per_superblock = jobs.scales_per_superblock;
    const int first_row = blockIdx.x * S::ROWS, first_tile = blockIdx.y * S::TILES;
    const int last_row_tile = (jobs.rows - 1) / 8;
    const bool has_zeros = jobs.job[0].zeros != nullptr;
    // First row and column of the thread's first runs.
    const u32 my_row = row_warp * LANE_ROWS * M + lane / LANE_COLUMNS * 4;
    const u32 my_column = column_warp * WARP_COLUMNS + lane % LANE_COLUMNS * 4;

    // Where the tiles begin. Tiles past the end repeat the last one, rows likewise.
    if (thread < S::TILES) {
        int tile = min(first_tile + (int)thread, jobs.tiles - 1);
        const LinearJob& job = job_of_tile(jobs, tile);
        const size_t first_scale = (size_t)tile * superblocks * per_superblock * TILE_COLUMNS;
        sources[thread].codes = job.codes + (size_t)tile * superblocks * Codes<BITS>::TILE_BYTES;
        sources[thread].scales = job.scales + first_scale;
        sources[thread].zeros = job.zeros + first_scale;
    }

    // Copies a superblock to shared memory. Other blocks' arithmetic hides the latency: there are no
    // registers to load ahead into.
    auto copy = [&](int superblock) {
        constexpr int CODE_PIECES = S::TILES / WARPS, ROW_PIECES = S::ROWS * 4 / THREADS;
        // A warp copies the codes of a tile; as lane (t, column) the scale of a block.
        const u32 scale_index =
            (superblock * per_superblock + (lane / 8 * per_superblock >> 2)) * TILE_COLUMNS + lane % 8;
        Codes<BITS> codes[CODE_PIECES];
        float scale[CODE_PIECES];
#pragma unroll
        for (int i = 0; i < CODE_PIECES; i++) {
            const Source& source = sources[i * WARPS + warp];
            codes[i].load(source.codes + (size_t)superblock * Codes<BITS>::TILE_BYTES, lane);
            scale[i] = f32_of_f16(__ldg(source.scales + scale_index));
        }
        // Thread (row, unit) copies 32 activations; as (row, t) the scale of a block.
        const u32 row = thread / 4, unit = thread % 4;
        uint4 v[ROW_PIECES][2];
        float scale_x[ROW_PIECES];
        u32 index[ROW_PIECES];
#pragma unroll
        for (int i = 0; i < ROW_PIECES; i++) {
            const int row_tile = min(first_row / 8 + (int)row / 8 + i * (THREADS / 32), last_row_tile);
            index[i] = (row_tile * superblocks + superblock) * WARP + lane;
            v[i][0] = __ldg((const uint4*)q + (size_t)index[i] * 2);
            v[i][1] = __ldg((const uint4*)q + (size_t)index[i] * 2 + 1);
            scale_x[i] = __ldg(d + index[i]);
        }
#pragma unroll
        for (int i = 0; i < CODE_PIECES; i++) {
            const u32 column = (i * WARPS + warp) * TILE_COLUMNS;
#pragma unroll
            for (int t = 0; t < 4; t++) {
                int* words = &stage.codes[t][lane % 4 * 2][column + lane / 4];
                codes[i].unpack(t, words[0], words[S::COLUMNS + 4]);
            }
            stage.scale[lane / 8][column + lane % 8] = scale[i] * Codes<BITS>::INVERSE;
        }
#pragma unroll
        for (int i = 0; i < ROW_PIECES; i++) {
            constexpr int WORD = S::ROWS + 4, BLOCK = WORDS * WORD;
            int* words = &stage.q[0][unit * 2][row + i * (THREADS / 4)];
            words[0] = v[i][0].x, words[WORD] = v[i][0].y;
            words[BLOCK] = v[i][0].z, words[BLOCK + WORD] = v[i][0].w;
            words[2 * BLOCK] = v[i][1].x, words[2 * BLOCK + WORD] = v[i][1].y;
            words[3 * BLOCK] = v[i][1].z, words[3 * BLOCK + WORD] = v[i][1].w;
            stage.d[unit][row + i * (THREADS / 4)] = short_scale(scale_x[i]);
        }
        if (has_zeros) {
#pragma unroll
            for (int i = 0; i < CODE_PIECES; i++)
                stage.zero[lane / 8][(i * WARPS + warp) * TILE_COLUMNS + lane % 8] =
                    -scale[i] * __ldg(sources[i * WARPS + warp].zeros + scale_index);
#pragma unroll
            for (int i = 0; i < ROW_PIECES; i++) stage.dsum[unit][row + i * (THREADS / 4)] = __ldg(dsum + index[i]);
        }
    };

    float acc[M][N] = {};
    const int begin = S::BLOCKS_SPLIT ? superblocks * blockIdx.z / gridDim.z : 0;
    const int end = S::BLOCKS_SPLIT ? superblocks * (blockIdx.z + 1) / gridDim.z : superblocks;
    for (int superblock = begin; superblock < end; superblock++) {
        __syncthreads();
        copy(superblock);
        __syncthreads();
#pragma unroll 1
        for (u32 t = split; t < 4; t += S::SPLITS) {
            int dot[M][N];
#pragma unroll
            for (int word = 0; word < WORDS; word++) {
                int x[M], w[N];
                load_runs<ROW_STEP, int4>(&stage.q[t][word][my_row], x);
                load_runs<COLUMN_STEP, int4>(&stage.codes[t][word][my_column], w);
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int n = 0; n < N; n++) dot[m][n] = __dp4a(w[n], x[m], word == 0 ? MAGIC_BITS : dot[m][n]);
            }
            float scale[N], scale_x[M];
            load_runs<COLUMN_STEP, float4>(&stage.scale[t][my_column], scale);
            load_runs<ROW_STEP, float4>(&stage.d[t][my_row], scale_x);
#pragma unroll
            for (int m = 0; m < M; m++) {
                const float minus_magic = -MAGIC * scale_x[m];
#pragma unroll
                for (int n = 0; n < N; n++)
                    acc[m][n] = fmaf(scaled_dot(dot[m][n], scale_x[m], minus_magic), scale[n], acc[m][n]);
            }
            if (has_zeros) {
                float zero[N], sum[M];
                load_runs<COLUMN_STEP, float4>(&stage.zero[t][my_column], zero);
                load_runs<ROW_STEP, float4>(&stage.dsum[t][my_row], sum);
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int n = 0; n < N; n++) acc[m][n] = fmaf(zero[n], sum[m], acc[m][n]);
            }
        }
    }

    // The splits add up in their order, the first one ends with the sum.
    float* sums = (float*)shared + warp % (ROW_WARPS * COLUMN_WARPS) * M * N * WARP + lane;
#pragma unroll 1
    for (int s = 1; s < S::SPLITS; s++) {
        __syncthreads();
        if (split == s) {
#pragma unroll
            for (int i = 0; i < M * N; i++) sums[i * WARP] = acc[i / N][i % N];
        }
        __syncthreads();
        if (split == 0) {
#pragma unroll
            for (int i = 0; i < M * N; i++) acc[i / N][i % N] += sums[i * WARP];
        }
    }
    if (S::BLOCKS_SPLIT && gridDim.z > 1) {
        constexpr int SIZE = ROW_WARPS * COLUMN_WARPS * M * N * WARP;
        const int output = blockIdx.y * gridDim.x + blockIdx.x, splits = gridDim.z;
        float* parts = scratch + ((size_t)output * splits * SIZE + warp * M * N * WARP + lane);
        if (split == 0) {
#pragma unroll
            for (int i = 0; i < M * N; i++) parts[blockIdx.z * SIZE + i * WARP] = acc[i / N][i % N];
        }
        if (!last_split(tickets, output, splits, thread)) return;
        if (split == 0) {
#pragma unroll
            for (int i = 0; i < M * N; i++) acc[i / N][i % N] = 0.0f;
#pragma unroll 1
            for (int s = 0; s < splits; s++) {
#pragma unroll
                for (int i = 0; i < M * N; i++) acc[i / N][i % N] += __ldcg(parts + s * SIZE + i * WARP);
            }
        }
    }
    if (split != 0) return;

#pragma unroll
    for (int run = 0; run < N / 4; run++) {
        const u32 place = my_column + run * COLUMN_STEP;
        int tile = first_tile + place / TILE_COLUMNS;
        if (tile >= jobs.tiles) break;
        const LinearJob& job = job_of_tile(jobs, tile);
        const int column = tile * TILE_COLUMNS + place % TILE_COLUMNS;
#pragma unroll
        for (int n = 0; n < 4; n++) {
            if (column + n >= job.n) break;
            const float bias = job.bias != nullptr ? job.bias[column + n] : 0.0f;
#pragma unroll
            for (int m = 0; m < M; m++) {
                const int row = first_row + my_row + m / 4 * ROW_STEP + m % 4;
                if (row >= jobs.rows) continue;
                const size_t element = (size_t)row * job.n + column + n;
                const float value = acc[m][run * 4 + n] + bias;
                job.out[element] = value;
                guard_finite(guard, job.check, (u32)element, value);
            }
        }
    }
}

// Block (128); grid (ceil(rows / R), ceil(tiles / (C / 8)), splits): rows vary fastest, so that the row tiles of
// the same columns find the codes in the L2 cache.
#define GEMM(BITS, R, C, ROW_WARPS, COLUMN_WARPS)                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, 3) linear_a8_dp4a_gemm_w##BITS##_r##R##_c##C(     \
        const s8* q, const float* d, const float* dsum, LinearJobs jobs, float* scratch, u32* tickets,      \
        u64* guard) {                                                                                       \
        using S = Shape<ROW_WARPS, COLUMN_WARPS>;                                                           \
        static_assert(S::ROWS == R && S::COLUMNS == C);                                                     \
        gemm<BITS, ROW_WARPS, COLUMN_WARPS>((const u8*)q, d, dsum, jobs, scratch, tickets, guard);          \
    }
#define SHAPES(BITS) GEMM(BITS, 32, 64, 1, 1) GEMM(BITS, 64, 64, 2, 1) GEMM(BITS, 64, 128, 2, 2)
SHAPES(2)
SHAPES(3)
SHAPES(4)
SHAPES(8)

#endif
