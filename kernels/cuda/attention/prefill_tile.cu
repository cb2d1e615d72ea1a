// Fused causal attention for prompts in fp32: online softmax over tiles of 64 keys, as FlashAttention
// does it. A block owns some consecutive tokens of one sequence with all query heads of one KV head;
// each (token, head) is a row of its tile, so the group shares every key and value it stages.
// Queries and keys pass through shared memory in runs of elements, values in runs of keys, always
// widened to f32 on the way in; the next run is on its way in registers meanwhile.
#include "attention/batch.cuh"

constexpr int THREADS = 128;
constexpr int COLUMN_THREADS = 16;                     // threads along keys and along output elements
constexpr int ROW_THREADS = THREADS / COLUMN_THREADS;  // threads along rows
constexpr int TILE_KEYS = 64;
constexpr int KEYS = TILE_KEYS / COLUMN_THREADS;       // of a thread, COLUMN_THREADS apart
constexpr int RUN_ELEMENTS = 32;                       // of queries and keys staged at once
constexpr int RUN_KEYS = 16;                           // of values staged at once
constexpr int PAD = 4;                                 // moves neighbouring rows to other banks

template <typename T>
__device__ __forceinline__ void widen(const Piece<T>& piece, float* to) {
    constexpr int COUNT = sizeof(Piece<T>) / sizeof(T);
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) *reinterpret_cast<float4*>(to + i) = widen4(piece, i);
}

__device__ __forceinline__ void axpy(float a, const float4& x, float (&y)[4]) {
    y[0] += a * x.x;
    y[1] += a * x.y;
    y[2] += a * x.z;
    y[3] += a * x.w;
}

template <typename T, int HEAD_DIM>
__device__ __forceinline__ void prefill_tile(
    const float* q,  // (tokens, query_heads, head_dim) f32, rows batch.q_stride floats apart
    const Cache<T>& cache,
    const AttentionBatch& batch,
    const Tile* tiles,  // (tiles)
    float* out,         // (tokens, query_heads, head_dim) f32, row-major
    u64* guard, u32 check) {
    constexpr int ROWS = HEAD_DIM == 256 ? 4 : 8;  // of a thread, ROW_THREADS apart; registers set the bound
    constexpr int TILE_ROWS = ROWS * ROW_THREADS;
    constexpr int QUADS = HEAD_DIM / (4 * COLUMN_THREADS);  // float4s of an output row that a thread owns
    constexpr int PIECE = sizeof(Piece<T>) / sizeof(T);
    constexpr int QUERY_LOADS = TILE_ROWS * RUN_ELEMENTS / 4 / THREADS;
    constexpr int KEY_LOADS = TILE_KEYS * RUN_ELEMENTS / PIECE / THREADS;
    constexpr int VALUE_LOADS = RUN_KEYS * HEAD_DIM / PIECE / THREADS;

    struct Operands {
        float query[TILE_ROWS][RUN_ELEMENTS + PAD];
        float key[TILE_KEYS][RUN_ELEMENTS + PAD];
    };
    union Stage {
        Operands operands;                         // until the scores are complete
        float weight[TILE_ROWS][TILE_KEYS + PAD];  // from then on
    };
    __shared__ alignas(16) Stage stage;
    __shared__ alignas(16) float value[RUN_KEYS][HEAD_DIM];
    __shared__ u32 cache_rows[TILE_KEYS];
    __shared__ int limits[TILE_ROWS];       // keys that a row sees
    __shared__ u32 output_rows[TILE_ROWS];  // (token, query head) of a row

    const int thread = threadIdx.x;
    const int row_thread = thread / COLUMN_THREADS, column_thread = thread % COLUMN_THREADS;
    const Tile tile = tiles[blockIdx.x];
    const int kv_head = blockIdx.y;
    const HeadRange range = query_heads_of(batch, kv_head);
    const int rows = tile.tokens * range.count;
    if (rows == 0) return;
    const u32* table = table_of_row(batch, tile.row);
    const int end = batch.context_lengths[tile.first_token + tile.tokens - 1];

    // Rows past the last compute the first one again and are not written.
    auto token_of = [&](int row) { return (int)tile.first_token + (row < rows ? row / range.count : 0); };
    auto head_of = [&](int row) { return range.first + (row < rows ? row % range.count : 0); };
    auto cache_row_of = [&](int key) { return cache_row(batch, table, kv_head, min(key, end - 1)); };

    constexpr int QUERY_LANES = RUN_ELEMENTS / 4;
    int query_at[QUERY_LOADS];
#pragma unroll
    for (int i = 0; i < QUERY_LOADS; ++i) {
        const int row = thread / QUERY_LANES + i * (THREADS / QUERY_LANES);
        query_at[i] = token_of(row) * batch.q_stride + head_of(row) * HEAD_DIM + thread % QUERY_LANES * 4;
    }
    if (thread < TILE_ROWS) {
        limits[thread] = batch.context_lengths[token_of(thread)];
        output_rows[thread] = thread < rows ? token_of(thread) * batch.query_heads + head_of(thread) : NO_ROW;
    }
    float largest[ROWS], sum[ROWS], mixed[ROWS][QUADS][4];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        largest[r] = NEG_INFINITY;
        sum[r] = 0.0f;
#pragma unroll
        for (int c = 0; c < QUADS; ++c)
#pragma unroll
            for (int e = 0; e < 4; ++e) mixed[r][c][e] = 0.0f;
    }

    u32 next_cache_row = thread < TILE_KEYS ? cache_row_of(thread) : 0;
    for (int start = 0; start < end; start += TILE_KEYS) {
        if (thread < TILE_KEYS) cache_rows[thread] = next_cache_row;
        __syncthreads();
        if (thread < TILE_KEYS && start + TILE_KEYS < end) next_cache_row = cache_row_of(start + TILE_KEYS + thread);

        float4 next_query[QUERY_LOADS];
        Piece<T> next_key[KEY_LOADS];
        constexpr int KEY_LANES = RUN_ELEMENTS / PIECE;
        auto load_operands = [&](int d) {
#pragma unroll
            for (int i = 0; i < QUERY_LOADS; ++i)
                next_query[i] = __ldg(reinterpret_cast<const float4*>(q + query_at[i] + d));
#pragma unroll
            for (int i = 0; i < KEY_LOADS; ++i) {
                const int key = thread / KEY_LANES + i * (THREADS / KEY_LANES);
                next_key[i] =
                    load_piece(cache.keys + (size_t)cache_rows[key] * HEAD_DIM + d + thread % KEY_LANES * PIECE);
            }
        };
        float key_scale[KEYS], value_scale[KEYS];
#pragma unroll
        for (int k = 0; k < KEYS; ++k) {
            const u32 row = cache_rows[column_thread + k * COLUMN_THREADS];
            key_scale[k] = batch.scale * LOG2_E * (SCALED<T> ? __ldg(cache.key_scales + row) : 1.0f);
            value_scale[k] = SCALED<T> ? __ldg(cache.value_scales + row) : 1.0f;
        }
        float score[ROWS][KEYS] = {};
        load_operands(0);
#pragma unroll 1
        for (int d = 0; d < HEAD_DIM; d += RUN_ELEMENTS) {
#pragma unroll
            for (int i = 0; i < QUERY_LOADS; ++i)
                *reinterpret_cast<float4*>(
                    &stage.operands.query[thread / QUERY_LANES + i * (THREADS / QUERY_LANES)]
                                         [thread % QUERY_LANES * 4]) = next_query[i];
#pragma unroll
            for (int i = 0; i < KEY_LOADS; ++i)
                widen(next_key[i],
                      &stage.operands.key[thread / KEY_LANES + i * (THREADS / KEY_LANES)][thread % KEY_LANES * PIECE]);
            __syncthreads();
            if (d + RUN_ELEMENTS < HEAD_DIM) load_operands(d + RUN_ELEMENTS);
#pragma unroll 2
            for (int e = 0; e < RUN_ELEMENTS; e += 4) {
                float4 key[KEYS];
#pragma unroll
                for (int k = 0; k < KEYS; ++k)
                    key[k] = *reinterpret_cast<const float4*>(
                        &stage.operands.key[column_thread + k * COLUMN_THREADS][e]);
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    const float4 x = *reinterpret_cast<const float4*>(
                        &stage.operands.query[row_thread + r * ROW_THREADS][e]);
#pragma unroll
                    for (int k = 0; k < KEYS; ++k) {
                        score[r][k] += x.x * key[k].x;
                        score[r][k] += x.y * key[k].y;
                        score[r][k] += x.z * key[k].z;
                        score[r][k] += x.w * key[k].w;
                    }
                }
            }
            __syncthreads();
        }

        Piece<T> next_value[VALUE_LOADS];
        constexpr int VALUE_LANES = HEAD_DIM / PIECE;
        auto load_values = [&](int run) {
#pragma unroll
            for (int i = 0; i < VALUE_LOADS; ++i) {
                const int key = run + thread / VALUE_LANES + i * (THREADS / VALUE_LANES);
                next_value[i] =
                    load_piece(cache.values + (size_t)cache_rows[key] * HEAD_DIM + thread % VALUE_LANES * PIECE);
            }
        };
        load_values(0);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const int limit = limits[row_thread + r * ROW_THREADS];
            const float before = largest[r];
#pragma unroll
            for (int k = 0; k < KEYS; ++k) {
                const bool seen = start + column_thread + k * COLUMN_THREADS < limit;
                score[r][k] = seen ? score[r][k] * key_scale[k] : NEG_INFINITY;
                largest[r] = fmaxf(largest[r], score[r][k]);
            }
#pragma unroll
            for (int offset = COLUMN_THREADS / 2; offset > 0; offset >>= 1)
                largest[r] = fmaxf(largest[r], __shfl_xor_sync(FULL_MASK, largest[r], offset));
            const float decay = exp2_approx(before - largest[r]);
            sum[r] *= decay;
#pragma unroll
            for (int k = 0; k < KEYS; ++k) {
                const float weight = exp2_approx(score[r][k] - largest[r]);
                stage.weight[row_thread + r * ROW_THREADS][column_thread + k * COLUMN_THREADS] =
                    SCALED<T> ? weight * value_scale[k] : weight;
                sum[r] += weight;
            }
#pragma unroll
            for (int c = 0; c < QUADS; ++c)
#pragma unroll
                for (int e = 0; e < 4; ++e) mixed[r][c][e] *= decay;
        }

#pragma unroll 1
        for (int run = 0; run < TILE_KEYS; run += RUN_KEYS) {
#pragma unroll
            for (int i = 0; i < VALUE_LOADS; ++i)
                widen(next_value[i],
                      &value[thread / VALUE_LANES + i * (THREADS / VALUE_LANES)][thread % VALUE_LANES * PIECE]);
            __syncthreads();
            if (run + RUN_KEYS < TILE_KEYS) load_values(run + RUN_KEYS);
#pragma unroll 1
            for (int key = 0; key < RUN_KEYS; key += 4) {
                float4 weight[ROWS];
#pragma unroll
                for (int r = 0; r < ROWS; ++r)
                    weight[r] =
                        *reinterpret_cast<const float4*>(&stage.weight[row_thread + r * ROW_THREADS][run + key]);
#pragma unroll
                for (int c = 0; c < QUADS; ++c) {
                    const float* at = &value[key][(c * COLUMN_THREADS + column_thread) * 4];
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        const float4 x = *reinterpret_cast<const float4*>(at + k * HEAD_DIM);
#pragma unroll
                        for (int r = 0; r < ROWS; ++r)
                            axpy(k == 0 ? weight[r].x : k == 1 ? weight[r].y : k == 2 ? weight[r].z : weight[r].w, x,
                                 mixed[r][c]);
                    }
                }
            }
            __syncthreads();
        }
    }

#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int offset = COLUMN_THREADS / 2; offset > 0; offset >>= 1)
            sum[r] += __shfl_xor_sync(FULL_MASK, sum[r], offset);
        const u32 row = output_rows[row_thread + r * ROW_THREADS];
        if (row == NO_ROW) continue;
#pragma unroll
        for (int c = 0; c < QUADS; ++c) {
            const u32 element = row * HEAD_DIM + (c * COLUMN_THREADS + column_thread) * 4;
            const float (&x)[4] = mixed[r][c];
            write_checked(out, element, make_float4(x[0] / sum[r], x[1] / sum[r], x[2] / sum[r], x[3] / sum[r]), guard,
                          check);
        }
    }
}

// Grid: (tiles, kv_heads) blocks of 128 threads. Tile rows: 64, or 32 for head_dim 256.
#define PREFILL_TILE(KV, HEAD_DIM)                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, HEAD_DIM == 64 ? 3 : 2)                              \
        prefill_tile_##KV##_##HEAD_DIM(const float* q, Cache<KV> cache, AttentionBatch batch,                  \
                                       const Tile* tiles, float* out, u64* guard, u32 check) {                 \
        prefill_tile<KV, HEAD_DIM>(q, cache, batch, tiles, out, guard, check);                                 \
    }

PREFILL_TILE(f16, 64)
PREFILL_TILE(f16, 128)
PREFILL_TILE(f16, 256)
PREFILL_TILE(f32, 64)
PREFILL_TILE(f32, 128)
PREFILL_TILE(f32, 256)
PREFILL_TILE(int8, 64)
PREFILL_TILE(int8, 128)
PREFILL_TILE(int8, 256)
