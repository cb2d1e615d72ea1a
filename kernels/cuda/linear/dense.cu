// Linear on dense weights as Hugging Face stores them, (n, k) row-major in f16, bf16 or f32, with fp32
// arithmetic on every card: lm_head and modules that were not quantised.
#include "linear/sgemm.cuh"

// V neighbours of a row, one load: 8 or 16 bytes.
template <typename T, int V>
struct Run {
    alignas(sizeof(T) * V) T value[V];

    __device__ __forceinline__ void load(const T* from) {
        if (V == 1) value[0] = *from;
        else if (sizeof(value) == 8)
            *reinterpret_cast<uint2*>(value) = __ldcs(reinterpret_cast<const uint2*>(from));
        else *reinterpret_cast<uint4*>(value) = __ldcs(reinterpret_cast<const uint4*>(from));
    }
};

// V is 1 or 4.
template <int V>
__device__ __forceinline__ void load_activations(float (&to)[V], const float* from) {
    if (V == 1) {
        to[0] = __ldg(from);
    } else {
        const float4 four = __ldg(reinterpret_cast<const float4*>(from));
        to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
    }
}

// Sums each of N values over the warp; lane l is left with that of value l / (32 / N), in value[0].
template <int N, int OFFSET = 16>
__device__ __forceinline__ void warp_sums(float* value, int lane) {
    const bool upper = lane & OFFSET;
#pragma unroll
    for (int i = 0; i < (N + 1) / 2; ++i) {  // each lane keeps one half and hands the other over
        const float sent = N > 1 && !upper ? value[i + N / 2] : value[i];
        const float kept = N > 1 && upper ? value[i + N / 2] : value[i];
        value[i] = kept + __shfl_xor_sync(FULL_MASK, sent, OFFSET);
    }
    if constexpr (OFFSET > 1) warp_sums<(N + 1) / 2, OFFSET / 2>(value, lane);
}

// COLUMNS columns a warp: the activations it reads serve all of them.
template <typename T, int V, int ROWS, int COLUMNS>
__device__ __forceinline__ void dense_dots(const float* x, const T* weights, int rows, int n, int k,
                                           int first_row, int first_column, int lane,
                                           float (&dot)[COLUMNS * ROWS]) {
    const T* weights_at[COLUMNS];
    const float* x_at[ROWS];
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
        weights_at[c] = weights + (size_t)min(first_column + c, n - 1) * k + lane * V;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) x_at[r] = x + (size_t)min(first_row + r, rows - 1) * k + lane * V;
#pragma unroll
    for (int i = 0; i < COLUMNS * ROWS; ++i) dot[i] = 0.0f;

    // Lanes take neighbouring runs, so that loads of weights and of activations are both whole lines.
    auto add = [&](int at) {
        Run<T, V> run[COLUMNS];
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) run[c].load(weights_at[c] + at);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float value[V];
            load_activations(value, x_at[r] + at);
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (int i = 0; i < V; ++i)
                    dot[c * ROWS + r] = fmaf(value[i], (float)run[c].value[i], dot[c * ROWS + r]);
        }
    };
    constexpr int SPAN = WARP * V;
    int at = 0;
    for (; at + SPAN <= k; at += SPAN) add(at);
    if (at + lane * V < k) add(at);
}

constexpr int GEMV_WARPS = 4;

template <typename T, int ROWS, int COLUMNS>
__device__ __forceinline__ void dense_gemv(const float* x, const T* weights, const float* bias, float* out,
                                           int rows, int n, int k, u64* guard, u32 check) {
    const int lane = threadIdx.x % WARP;
    const int first_column = (blockIdx.y * GEMV_WARPS + threadIdx.x / WARP) * COLUMNS;
    const int first_row = blockIdx.x * ROWS;
    if (first_column >= n) return;
    float dot[COLUMNS * ROWS];
    if (k % 4 == 0) dense_dots<T, 4, ROWS, COLUMNS>(x, weights, rows, n, k, first_row, first_column, lane, dot);
    else dense_dots<T, 1, ROWS, COLUMNS>(x, weights, rows, n, k, first_row, first_column, lane, dot);

    constexpr int LANES = WARP / (COLUMNS * ROWS);  // that end with the same sum
    warp_sums<COLUMNS * ROWS>(dot, lane);
    const int column = first_column + lane / LANES / ROWS, row = first_row + lane / LANES % ROWS;
    if (lane % LANES != 0 || column >= n || row >= rows) return;
    const float value = dot[0] + (bias ? __ldg(bias + column) : 0.0f);
    const size_t at = (size_t)row * n + column;
    out[at] = value;
    guard_finite(guard, check, (u32)at, value);
}

constexpr int GEMV_COLUMNS = 4;  // of a warp

// Grid (ceil(rows / ROWS), ceil(n / 16)), block 128.
#define DENSE_GEMV(NAME, T, ROWS)                                                                   \
    extern "C" __global__ void __launch_bounds__(GEMV_WARPS * WARP) dense_gemv_##NAME##_r##ROWS(    \
        const float* x,       /* (rows, k) f32, row-major */                                        \
        const T* weights,     /* (n, k), row-major */                                               \
        const float* bias,    /* (n) or null */                                                     \
        float* out,           /* (rows, n) f32, row-major */                                        \
        int rows, int n, int k, u64* guard, /* 1 or null */                                         \
        u32 check) {                                                                                \
        dense_gemv<T, ROWS, GEMV_COLUMNS>(x, weights, bias, out, rows, n, k, guard, check);         \
    }

template <typename T, class Gemm>
__device__ __forceinline__ void dense_gemm(const float* x, const T* weights, const float* bias, float* out,
                                           int rows, int n, int k, u64* guard, u32 check) {
    __shared__ typename Gemm::Shared shared;
    Gemm gemm;
    const int first_row = blockIdx.x * Gemm::TILE_M, first_column = blockIdx.y * Gemm::TILE_N;
    DenseRow<float> a[Gemm::A_RUNS];
    DenseRow<T> b[Gemm::B_RUNS];
    // Past the end the last row and column repeat: nothing of them is written.
#pragma unroll
    for (int i = 0; i < Gemm::A_RUNS; ++i)
        a[i].begin(x + (size_t)min(first_row + gemm.a_row(i), rows - 1) * k, k, gemm.a_half(i));
#pragma unroll
    for (int i = 0; i < Gemm::B_RUNS; ++i)
        b[i].begin(weights + (size_t)min(first_column + gemm.b_row(i), n - 1) * k, k, gemm.b_half(i));
    gemm.multiply(shared, a, b, (k + SUPERBLOCK_ROWS - 1) / SUPERBLOCK_ROWS);
    if (gemm.group > 0) return;

#pragma unroll
    for (int j = 0; j < Gemm::COLUMNS; ++j) {
        const int column = first_column + gemm.column_of(j);
        if (column >= n) continue;
        const float add = bias ? __ldg(bias + column) : 0.0f;
#pragma unroll
        for (int m = 0; m < Gemm::ROWS; ++m) {
            const int row = first_row + gemm.row_of(m);
            if (row >= rows) continue;
            const size_t at = (size_t)row * n + column;
            const float value = gemm.sum[m][j] + add;
            out[at] = value;
            guard_finite(guard, check, (u32)at, value);
        }
    }
}

// Grid (ceil(rows / M), ceil(n / N)), block M / R * N / C * G.
#define DENSE_GEMM(NAME, T, M, N, R, C, G, BLOCKS)                                                             \
    extern "C" __global__ void __launch_bounds__(M / R * (N / C) * G, BLOCKS) dense_gemm_##NAME##_t##M(        \
        const float* x,       /* (rows, k) f32, row-major */                                                   \
        const T* weights,     /* (n, k), row-major */                                                          \
        const float* bias,    /* (n) or null */                                                                \
        float* out,           /* (rows, n) f32, row-major */                                                   \
        int rows, int n, int k, u64* guard, /* 1 or null */                                                    \
        u32 check) {                                                                                           \
        dense_gemm<T, Sgemm<M, N, R, C, G>>(x, weights, bias, out, rows, n, k, guard, check);                  \
    }

#define DENSE(NAME, T)                         \
    DENSE_GEMV(NAME, T, 1)                     \
    DENSE_GEMV(NAME, T, 2)                     \
    DENSE_GEMV(NAME, T, 4)                     \
    DENSE_GEMV(NAME, T, 8)                     \
    DENSE_GEMM(NAME, T, 128, 128, 8, 16, 1, 2) \
    DENSE_GEMM(NAME, T, 64, 128, 8, 8, 2, 2)   \
    DENSE_GEMM(NAME, T, 32, 64, 4, 8, 4, 2)

DENSE(f16, f16)
DENSE(bf16, bf16)
DENSE(f32, float)
