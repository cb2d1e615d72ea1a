// fp32 tiles for out = A B^T with fp32 FMA alone: what the exact linears of every card share.
// An operand is anything with `fetch(step)` (start the loads of this thread's 8 values of that step)
// and `values(float[8])` (what they became), so quantised and dense weights use the same loop.
#pragma once
#include "common.cuh"

constexpr int STEP = 16;                             // depth of one shared tile
constexpr int CHUNK_STEPS = SUPERBLOCK_ROWS / STEP;  // what one group takes before the next group's turn

// One TILE_M x TILE_N tile of the output, ROWS x COLUMNS of it a thread. GROUPS groups of threads share the
// tile and split the depth: where the tiles are fewer than the card could hold, it would idle otherwise.
template <int TILE_M_, int TILE_N_, int ROWS_, int COLUMNS_, int GROUPS_>
struct Sgemm {
    static constexpr int TILE_M = TILE_M_, TILE_N = TILE_N_, ROWS = ROWS_, COLUMNS = COLUMNS_, GROUPS = GROUPS_;
    static constexpr int GROUP_THREADS = TILE_M / ROWS * (TILE_N / COLUMNS), THREADS = GROUP_THREADS * GROUPS;
    // A thread loads runs of 8 depths: half a step of this many rows of A and of B.
    static constexpr int A_RUNS = 2 * TILE_M / GROUP_THREADS, B_RUNS = 2 * TILE_N / GROUP_THREADS;
    // Outputs come in runs of 4, what one shared load brings; those of a thread lie this far apart.
    static constexpr int ROW_STRIDE = TILE_M * 4 / ROWS, COLUMN_STRIDE = TILE_N * 4 / COLUMNS;
    static_assert(A_RUNS > 0 && B_RUNS > 0 && TILE_N / COLUMNS % 8 == 0 && TILE_M / ROWS % 4 == 0, "tile");

    struct Stage {
        float a[STEP][TILE_M], b[STEP][TILE_N];
    };
    struct Shared {
        Stage stage[GROUPS][2];
    };
    static_assert(sizeof(Shared) >= (GROUPS - 1) * TILE_M * TILE_N * sizeof(float), "room for the reduction");

    float sum[ROWS][COLUMNS];
    int group, thread;  // thread within its group
    int row, column;    // first of this thread's output within the tile

    __device__ Sgemm() : sum{} {
        group = GROUPS == 1 ? 0 : threadIdx.x / GROUP_THREADS;
        thread = threadIdx.x % GROUP_THREADS;
        // A warp is 4 x 8 threads: one wide shared load of it then touches few distinct words.
        constexpr int WARPS_ACROSS = TILE_N / COLUMNS / 8;
        const int warp = thread / WARP, lane = thread % WARP;
        row = (warp / WARPS_ACROSS * 4 + lane / 8) * 4;
        column = (warp % WARPS_ACROSS * 8 + lane % 8) * 4;
    }

    __device__ int row_of(int index) const { return row + index / 4 * ROW_STRIDE + index % 4; }
    __device__ int column_of(int index) const { return column + index / 4 * COLUMN_STRIDE + index % 4; }

    // Where run i of this thread lies: in which row of the tile's A (or B), and in which half of a step.
    __device__ int a_row(int i) const { return (thread + i * GROUP_THREADS) % TILE_M; }
    __device__ int a_half(int i) const { return (thread + i * GROUP_THREADS) / TILE_M; }
    __device__ int b_row(int i) const { return (thread + i * GROUP_THREADS) % TILE_N; }
    __device__ int b_half(int i) const { return (thread + i * GROUP_THREADS) / TILE_N; }

    // Groups go on at their own pace, so each has a barrier of its own.
    __device__ void group_barrier() const {
        if (GROUPS == 1) __syncthreads();
        else asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(GROUP_THREADS) : "memory");
    }

    // chunks: depth / 128. Afterwards the sums of group 0 are those of the tile.
    template <class A, class B>
    __device__ void multiply(Shared& shared, A (&a)[A_RUNS], B (&b)[B_RUNS], int chunks) {
        const int steps = (chunks - group + GROUPS - 1) / GROUPS * CHUNK_STEPS;
        auto fetch = [&](int step) {
            const int depth = (step / CHUNK_STEPS * GROUPS + group) * CHUNK_STEPS + step % CHUNK_STEPS;
#pragma unroll
            for (int i = 0; i < A_RUNS; ++i) a[i].fetch(depth);
#pragma unroll
            for (int i = 0; i < B_RUNS; ++i) b[i].fetch(depth);
        };
        if (steps > 0) fetch(0);
        for (int step = 0; step < steps; ++step) {
            // Two stages and one barrier: whoever writes a stage again has seen the other one filled,
            // so all have left this one.
            Stage& stage = shared.stage[group][step & 1];
            float values[8];
#pragma unroll
            for (int i = 0; i < A_RUNS; ++i) {
                a[i].values(values);
#pragma unroll
                for (int k = 0; k < 8; ++k) stage.a[a_half(i) * 8 + k][a_row(i)] = values[k];
            }
#pragma unroll
            for (int i = 0; i < B_RUNS; ++i) {
                b[i].values(values);
#pragma unroll
                for (int k = 0; k < 8; ++k) stage.b[b_half(i) * 8 + k][b_row(i)] = values[k];
            }
            group_barrier();
            if (step + 1 < steps) fetch(step + 1);
#pragma unroll
            for (int k = 0; k < STEP; ++k) {
                float left[ROWS], right[COLUMNS];
#pragma unroll
                for (int i = 0; i < ROWS; i += 4) load4(left + i, &stage.a[k][row + i / 4 * ROW_STRIDE]);
#pragma unroll
                for (int i = 0; i < COLUMNS; i += 4)
                    load4(right + i, &stage.b[k][column + i / 4 * COLUMN_STRIDE]);
#pragma unroll
                for (int m = 0; m < ROWS; ++m)
#pragma unroll
                    for (int n = 0; n < COLUMNS; ++n) sum[m][n] = fmaf(left[m], right[n], sum[m][n]);
            }
        }
        if (GROUPS > 1) {
            // So that all groups have met as often: sanitizers count a thread's barriers, whichever they are.
            const int most = (chunks + GROUPS - 1) / GROUPS * CHUNK_STEPS;
            for (int step = steps; step < most; ++step) group_barrier();
            reduce(shared);
        }
    }

    // Always in the order of the groups: the same bits every time.
    __device__ void reduce(Shared& shared) {
        float* partial = reinterpret_cast<float*>(&shared);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < ROWS * COLUMNS; ++i)
            if (group > 0)
                partial[((group - 1) * ROWS * COLUMNS + i) * GROUP_THREADS + thread] =
                    sum[i / COLUMNS][i % COLUMNS];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < ROWS * COLUMNS; ++i)
#pragma unroll
            for (int other = 0; other < GROUPS - 1; ++other)
                sum[i / COLUMNS][i % COLUMNS] += partial[(other * ROWS * COLUMNS + i) * GROUP_THREADS + thread];
    }

    __device__ static void load4(float* to, const float* from) {
        const float4 four = *reinterpret_cast<const float4*>(from);
        to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
    }
};

// 8 depths of one row of a dense (rows, depth) row-major matrix, as stored; past its end come zeros.
template <typename T>
struct DenseRun {
    alignas(16) T value[8];

    __device__ __forceinline__ void load(const T* row, int first, int depth) {
        // Rows of such a depth all begin at a multiple of 16 bytes.
        if (first + 8 <= depth && depth * (int)sizeof(T) % 16 == 0) {
#pragma unroll
            for (int w = 0; w < (int)sizeof(value) / 16; ++w)
                reinterpret_cast<uint4*>(value)[w] = __ldg(reinterpret_cast<const uint4*>(row + first) + w);
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) value[i] = first + i < depth ? row[first + i] : T{};
        }
    }
};

// One such row as an operand.
template <typename T>
struct DenseRow {
    const T* row;
    int depth;
    DenseRun<T> run;

    // half: which 8 of a step's 16 depths this thread loads.
    __device__ void begin(const T* from, int depth_, int half) {
        row = from + half * 8;
        depth = depth_ - half * 8;
    }
    __device__ void fetch(int step) { run.load(row, step * STEP, depth); }
    __device__ void values(float (&to)[8]) const {
#pragma unroll
        for (int i = 0; i < 8; ++i) to[i] = run.value[i];
    }
};
