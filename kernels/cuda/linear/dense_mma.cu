// Linear on dense f16 weights with tensor cores (fast family: activations become f16, sums stay fp32).
#include "linear/sgemm.cuh"

#if __CUDA_ARCH__ >= 750

constexpr int DEPTH = 32;           // of a shared tile: 4 chunks of 8
constexpr int CHUNKS = DEPTH / 8;
constexpr int TILE_N = 128;
constexpr int WARPS = 8, THREADS = WARPS * WARP;

// Rows of 4 chunks of 16 bytes; the swizzle keeps the 8 rows of an ldmatrix in different banks.
template <int ROWS>
struct HalfTile {
    uint4 chunk[ROWS * CHUNKS];

    __device__ static int place(int row, int c) { return row * CHUNKS + (c ^ (row >> 1 & 3)); }

    // The 16 x 16 corner at (row, chunk c) as four 8 x 8: rows 0..7 and 8..15 of c, then of c + 1.
    __device__ void load(u32 (&to)[4], int row, int c, int lane) const {
        const u32 at = (u32)__cvta_generic_to_shared(&chunk[place(row + lane % 16, c + lane / 16)]);
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(at)
                     : "memory");
    }
};

__device__ __forceinline__ void mma(float (&sum)[4], u32 a0, u32 a1, u32 b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(b));
}

__device__ __forceinline__ u32 f16x2(float low, float high) {
    return f16_of_f32(low) | (u32)f16_of_f32(high) << 16;
}

// WARPS_M of the 8 warps lie along the rows, the others along the columns.
template <int TILE_M, int WARPS_M>
__device__ __forceinline__ void dense_mma(const float* x, const f16* weights, const float* bias, float* out,
                                          int rows, int n, int k, u64* guard, u32 check) {
    constexpr int WARPS_N = WARPS / WARPS_M;
    constexpr int M = TILE_M / WARPS_M / 16, N = TILE_N / WARPS_N / 16;  // 16 x 16 corners of a warp
    constexpr int A_EACH = (TILE_M * CHUNKS + THREADS - 1) / THREADS, B_EACH = TILE_N * CHUNKS / THREADS;
    struct Stage {
        HalfTile<TILE_M> a;
        HalfTile<TILE_N> b;
    };
    __shared__ Stage stages[2];

    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int first_row = blockIdx.x * TILE_M, first_column = blockIdx.y * TILE_N;
    const int warp_row = warp / WARPS_N * M * 16, warp_column = warp % WARPS_N * N * 16;

    // This thread's runs are one chunk of several rows. Rows past the end repeat the last: never written.
    const int own_row = threadIdx.x / CHUNKS, own_chunk = threadIdx.x % CHUNKS;
    constexpr int ROW_STEP = THREADS / CHUNKS;
    const float* a_row[A_EACH];
    const f16* b_row[B_EACH];
#pragma unroll
    for (int i = 0; i < A_EACH; ++i)
        a_row[i] = x + (size_t)min(first_row + own_row + i * ROW_STEP, rows - 1) * k + own_chunk * 8;
#pragma unroll
    for (int i = 0; i < B_EACH; ++i)
        b_row[i] = weights + (size_t)min(first_column + own_row + i * ROW_STEP, n - 1) * k + own_chunk * 8;
    const int own_depth = k - own_chunk * 8;

    DenseRun<float> a[A_EACH];
    DenseRun<f16> b[B_EACH];
    auto load = [&](int depth) {
#pragma unroll
        for (int i = 0; i < B_EACH; ++i) b[i].load(b_row[i], depth, own_depth);
#pragma unroll
        for (int i = 0; i < A_EACH; ++i) a[i].load(a_row[i], depth, own_depth);
    };
    auto store = [&](Stage& stage) {
#pragma unroll
        for (int i = 0; i < B_EACH; ++i)
            stage.b.chunk[stage.b.place(own_row + i * ROW_STEP, own_chunk)] =
                *reinterpret_cast<const uint4*>(b[i].value);
#pragma unroll
        for (int i = 0; i < A_EACH; ++i) {
            const float* v = a[i].value;
            if (TILE_M >= ROW_STEP || own_row < TILE_M)
                stage.a.chunk[stage.a.place(own_row + i * ROW_STEP, own_chunk)] =
                    make_uint4(f16x2(v[0], v[1]), f16x2(v[2], v[3]), f16x2(v[4], v[5]), f16x2(v[6], v[7]));
        }
    };

    float sum[M][2 * N][4] = {};
    load(0);
    int at = 0;
    for (int depth = 0; depth < k; depth += DEPTH, at ^= 1) {
        // Whoever fills a stage again has met everybody in the other one since it was read.
        Stage& stage = stages[at];
        store(stage);
        __syncthreads();
        if (depth + DEPTH < k) load(depth + DEPTH);
#pragma unroll 1  // unrolled, the largest tile spills
        for (int c = 0; c < CHUNKS; c += 2) {
            u32 left[M][4], right[N][4];
#pragma unroll
            for (int m = 0; m < M; ++m) stage.a.load(left[m], warp_row + m * 16, c, lane);
#pragma unroll
            for (int j = 0; j < N; ++j) stage.b.load(right[j], warp_column + j * 16, c, lane);
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int m = 0; m < M; ++m)
#pragma unroll
                    for (int j = 0; j < 2 * N; ++j)
                        mma(sum[m][j], left[m][half * 2], left[m][half * 2 + 1], right[j / 2][half * 2 + j % 2]);
        }
    }

#pragma unroll
    for (int j = 0; j < 2 * N; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int column = first_column + warp_column + j * 8 + lane % 4 * 2 + e;
            if (column >= n) continue;
            const float add = bias ? __ldg(bias + column) : 0.0f;
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int lower = 0; lower < 2; ++lower) {
                    const int row = first_row + warp_row + m * 16 + lower * 8 + lane / 4;
                    if (row >= rows) continue;
                    const size_t element = (size_t)row * n + column;
                    const float value = sum[m][j][lower * 2 + e] + add;
                    out[element] = value;
                    guard_finite(guard, check, (u32)element, value);
                }
        }
}

// Grid (ceil(rows / TILE_M), ceil(n / 128)), block 256.
#define DENSE_MMA(TILE_M, WARPS_M, BLOCKS)                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) dense_mma_f16_t##TILE_M(            \
        const float* x,       /* (rows, k) f32, row-major */                                          \
        const f16* weights,   /* (n, k), row-major */                                                 \
        const float* bias,    /* (n) or null */                                                       \
        float* out,           /* (rows, n) f32, row-major */                                          \
        int rows, int n, int k, u64* guard, /* 1 or null */                                           \
        u32 check) {                                                                                  \
        dense_mma<TILE_M, WARPS_M>(x, weights, bias, out, rows, n, k, guard, check);                  \
    }

DENSE_MMA(16, 1, 3)
DENSE_MMA(32, 1, 3)
DENSE_MMA(64, 2, 2)
DENSE_MMA(128, 2, 2)

#endif
