// Attention with materialised scores, one block per (token, query head), any head size: what every
// card can run and the fused kernels are held against.
#include "attention/batch.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int MAX_HEAD_DIM = 256;

__device__ __forceinline__ float block_max(float value, float* shared) {
    value = warp_max(value);
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = value;
    __syncthreads();
    value = shared[0];
    for (int i = 1; i < WARPS; ++i) value = fmaxf(value, shared[i]);
    __syncthreads();
    return value;
}

__device__ __forceinline__ float block_sum(float value, float* shared) {
    value = warp_sum(value);
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = value;
    __syncthreads();
    value = shared[0];
    for (int i = 1; i < WARPS; ++i) value += shared[i];
    __syncthreads();
    return value;
}

template <typename T>
__device__ __forceinline__ void eager(
    const float* q,  // (tokens, query_heads, head_dim) f32, rows batch.q_stride floats apart
    const Cache<T>& cache,
    const AttentionBatch& batch,
    int head_dim,       // at most 256
    int first_token,    // of this launch: long prompts go in pieces, so that the scratch stays small
    float* scores,      // scratch (tokens of this launch, query_heads, score_stride)
    int score_stride,   // at least the longest context of the launch
    float* out,         // (tokens, query_heads, head_dim) f32, row-major
    u64* guard, u32 check) {
    __shared__ float query[MAX_HEAD_DIM];
    __shared__ float reduced[WARPS];
    const int thread = threadIdx.x, lane = thread % WARP;
    const int head = blockIdx.x;
    const size_t token = first_token + blockIdx.y;
    const int length = batch.context_lengths[token];
    const u32* table = table_of_row(batch, batch.row_of_token[token]);
    const int kv_head = batch.kv_head_of_query_head[head];
    float* score = scores + ((size_t)blockIdx.y * batch.query_heads + head) * score_stride;

    if (thread < head_dim) query[thread] = q[token * batch.q_stride + head * head_dim + thread] * batch.scale;
    __syncthreads();

    float largest = NEG_INFINITY;
    for (int key = thread / WARP; key < length; key += WARPS) {
        const u32 at = cache_row(batch, table, kv_head, key);
        const T* row = cache.keys + (size_t)at * head_dim;
        float dot = 0.0f;
        for (int d = lane; d < head_dim; d += WARP) dot += query[d] * (float)row[d];
        dot = warp_sum(dot);
        if (SCALED<T>) dot *= cache.key_scales[at];
        if (lane == 0) score[key] = dot;
        largest = fmaxf(largest, dot);
    }
    largest = block_max(largest, reduced);

    float total = 0.0f;
    for (int key = thread; key < length; key += THREADS) {
        const float weight = expf(score[key] - largest);
        score[key] = weight;
        total += weight;
    }
    total = block_sum(total, reduced);

    if (thread >= head_dim) return;
    float sum = 0.0f;
    for (int key = 0; key < length; ++key) {
        const u32 at = cache_row(batch, table, kv_head, key);
        const float weight = SCALED<T> ? score[key] * cache.value_scales[at] : score[key];
        sum += weight * (float)cache.values[(size_t)at * head_dim + thread];
    }
    const float mean = length > 0 ? sum / total : 0.0f;
    const size_t element = (token * batch.query_heads + head) * head_dim + thread;
    out[element] = mean;
    guard_finite(guard, check, element, mean);
}

// Grid: (query_heads, tokens of this launch) blocks of 256 threads.
#define EAGER(KV)                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_eager_##KV(                           \
        const float* q, Cache<KV> cache, AttentionBatch batch, int head_dim, int first_token,             \
        float* scores, int score_stride, float* out, u64* guard, u32 check) {                             \
        eager<KV>(q, cache, batch, head_dim, first_token, scores, score_stride, out, guard, check);       \
    }

EAGER(f16)
EAGER(f32)
EAGER(int8)
