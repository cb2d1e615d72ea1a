// Fused causal attention for prompts on tensor cores (sm_75 and later): f16 operands, f32 sums.
// A block owns some consecutive tokens of one sequence with all query heads of one KV head; each
// (token, head) is a row, and a warp owns 16 rows with all their keys, so that the scores a lane
// holds are already the operand of the weighted sum. Keys and values take turns: one is computed
// with while the other is on its way. Codes of an int8 cache become f16 on the way, unscaled and
// exact; a key's scale multiplies its scores, a value's its weights.
#include "attention/batch.cuh"

#if __CUDA_ARCH__ >= 750
constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP;
constexpr int PAD = 8;  // 16 bytes: rows start in different banks for ldmatrix

__device__ __forceinline__ u32 f16x2_of(float low, float high) {
    return f16_of_f32(low) | (u32)f16_of_f32(high) << 16;
}

// sum (16, 8) += a (16, 8) b (8, 8). Lane l holds of a row l/4 and l/4 + 8, columns 2 (l%4) and the
// next; of b the same rows of column l/4; of sum rows and columns as of a.
__device__ __forceinline__ void mma(float (&sum)[4], const u32 (&a)[2], u32 b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
}

// Four 8x8 matrices, lane l naming row l%8 of matrix l/8; each arrives as b above wants it when its
// rows are b's columns, or with `transposed` when they are b's rows.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(u32 (&b)[4], const f16* row) {
    const u32 at = (u32)__cvta_generic_to_shared(row);
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                     : "r"(at)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                     : "r"(at)
                     : "memory");
}

__device__ __forceinline__ Piece<f16> halves_of(const Piece<f16>& piece) { return piece; }

// As widen4, in the low bits of the f16 1024.
__device__ __forceinline__ Piece<f16> halves_of(const Piece<int8>& piece) {
    auto less_bias = [](u32 biased) {
        u32 pair;
        asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(biased), "r"(0x64806480u));  // 1024 + 128
        return pair;
    };
    u32 pairs[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const u32 codes = biased_codes(piece, i * 4);
        pairs[i * 2] = less_bias(__byte_perm(codes, 0x64646464u, 0x4140));
        pairs[i * 2 + 1] = less_bias(__byte_perm(codes, 0x64646464u, 0x4342));
    }
    const uint4 bits = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    return reinterpret_cast<const Piece<f16>&>(bits);
}

// The keys or values of a tile on their way from the cache to shared memory.
template <typename T, int HEAD_DIM, int TILE_KEYS>
struct InFlight {
    static constexpr int LANES = HEAD_DIM / 8;  // a piece each
    static constexpr int STEP = THREADS / LANES;
    static constexpr int LOADS = TILE_KEYS / STEP;
    Piece<T> piece[LOADS];

    __device__ __forceinline__ void load(const T* cache, const u32* rows) {
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const u32 row = rows[threadIdx.x / LANES + i * STEP];
            piece[i] = load_piece(cache + (size_t)(row * LANES + threadIdx.x % LANES) * 8);
        }
    }

    __device__ __forceinline__ void store(f16 (*to)[HEAD_DIM + PAD]) const {
#pragma unroll
        for (int i = 0; i < LOADS; ++i)
            *reinterpret_cast<Piece<f16>*>(&to[threadIdx.x / LANES + i * STEP][threadIdx.x % LANES * 8]) =
                halves_of(piece[i]);
    }
};

template <typename T, int HEAD_DIM>
__device__ __forceinline__ void prefill_mma(
    const float* q,  // (tokens, query_heads, head_dim) f32, rows batch.q_stride floats apart
    const Cache<T>& cache,
    const AttentionBatch& batch,
    const Tile* tiles,  // (tiles)
    float* out,         // (tokens, query_heads, head_dim) f32, row-major
    u64* guard, u32 check) {
    constexpr int TILE_KEYS = HEAD_DIM == 256 ? 16 : 32;  // registers set the bound
    __shared__ alignas(16) f16 key[TILE_KEYS][HEAD_DIM + PAD];
    __shared__ alignas(16) f16 value[TILE_KEYS][HEAD_DIM + PAD];
    __shared__ u32 cache_rows[2][TILE_KEYS];  // of this tile's keys and of the next's
    __shared__ int limits[16 * WARPS];        // keys that a row sees
    __shared__ u32 output_rows[16 * WARPS];   // (token, query head) of a row

    const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    const int quad = lane / 4, pair = lane % 4 * 2;  // a lane's row and first column of a fragment
    const Tile tile = tiles[blockIdx.x];
    const int kv_head = blockIdx.y;
    const HeadRange range = query_heads_of(batch, kv_head);
    const int rows = tile.tokens * range.count;
    if (rows == 0) return;
    const u32* table = table_of_row(batch, tile.row);
    const int end = batch.context_lengths[tile.first_token + tile.tokens - 1];
    auto cache_row_of = [&](int index) { return cache_row(batch, table, kv_head, min(index, end - 1)); };

    // Rows past the last compute the first one again and are not written. Scores come in log2 units.
    auto token_of = [&](int row) { return (int)tile.first_token + (row < rows ? row / range.count : 0); };
    auto head_of = [&](int row) { return range.first + (row < rows ? row % range.count : 0); };
    if (thread < 16 * WARPS) {
        limits[thread] = batch.context_lengths[token_of(thread)];
        output_rows[thread] = thread < rows ? token_of(thread) * batch.query_heads + head_of(thread) : NO_ROW;
    }
    u32 query[HEAD_DIM / 8][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = warp * 16 + half * 8 + quad;
        const float* from = q + (size_t)token_of(row) * batch.q_stride + head_of(row) * HEAD_DIM + pair;
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; ++d) {
            const float2 x = *reinterpret_cast<const float2*>(from + d * 8);
            query[d][half] = f16x2_of(x.x * (batch.scale * LOG2_E), x.y * (batch.scale * LOG2_E));
        }
    }
    float largest[2] = {NEG_INFINITY, NEG_INFINITY}, sum[2] = {};
    float mixed[HEAD_DIM / 8][4] = {};
    // Of the values so far, the largest scale: `mixed` counts in it, so that weights keep within f16
    // whatever the values are.
    float unit = SCALED<T> ? 0.0f : 1.0f;

    if (thread < TILE_KEYS) cache_rows[0][thread] = cache_row_of(thread);
    __syncthreads();
    InFlight<T, HEAD_DIM, TILE_KEYS> flight;
    flight.load(cache.keys, cache_rows[0]);
    flight.store(key);
    for (int start = 0; start < end; start += TILE_KEYS) {
        const int buffer = start / TILE_KEYS % 2;
        __syncthreads();
        const bool more = start + TILE_KEYS < end;
        if (more && thread < TILE_KEYS) cache_rows[buffer ^ 1][thread] = cache_row_of(start + TILE_KEYS + thread);

        flight.load(cache.values, cache_rows[buffer]);
        // Lane l has the scales of key l of the tile.
        float key_scale = 1.0f, value_scale = 1.0f;
        if (SCALED<T>) {
            const u32 row = cache_rows[buffer][lane % TILE_KEYS];
            key_scale = __ldg(cache.key_scales + row);
            value_scale = __ldg(cache.value_scales + row);
        }
        float score[TILE_KEYS / 8][4] = {};
#pragma unroll
        for (int d = 0; d < HEAD_DIM; d += 32)
#pragma unroll
            for (int n = 0; n < TILE_KEYS / 8; ++n) {
                u32 b[4];
                load_matrices<false>(b, &key[n * 8 + lane % 8][d + lane / 8 * 8]);
#pragma unroll
                for (int i = 0; i < 4; ++i) mma(score[n], query[d / 8 + i], b[i]);
            }

        float smaller = 1.0f;  // the unit so far over the new one
        if (SCALED<T>) {
#pragma unroll
            for (int n = 0; n < TILE_KEYS / 8; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float scale = __shfl_sync(FULL_MASK, key_scale, n * 8 + pair + i);
                    score[n][i] *= scale;
                    score[n][2 + i] *= scale;
                }
            const float next = fmaxf(unit, warp_max(value_scale));
            if (next > 0.0f) {
                smaller = unit / next;
                value_scale /= next;
            }
            unit = next;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int limit = limits[warp * 16 + half * 8 + quad];
            const float before = largest[half];
#pragma unroll
            for (int n = 0; n < TILE_KEYS / 8; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& s = score[n][half * 2 + i];
                    if (start + n * 8 + pair + i >= limit) s = NEG_INFINITY;
                    largest[half] = fmaxf(largest[half], s);
                }
            largest[half] = fmaxf(largest[half], __shfl_xor_sync(FULL_MASK, largest[half], 1));
            largest[half] = fmaxf(largest[half], __shfl_xor_sync(FULL_MASK, largest[half], 2));
            const float decay = exp2_approx(before - largest[half]);
            sum[half] *= decay;
#pragma unroll
            for (int n = 0; n < TILE_KEYS / 8; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& s = score[n][half * 2 + i];
                    s = exp2_approx(s - largest[half]);
                    sum[half] += s;
                }
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 8; ++d) {
                mixed[d][half * 2] *= decay * smaller;
                mixed[d][half * 2 + 1] *= decay * smaller;
            }
        }

        flight.store(value);
        __syncthreads();
        if (more) flight.load(cache.keys, cache_rows[buffer ^ 1]);
#pragma unroll
        for (int n = 0; n < TILE_KEYS / 8; ++n) {
            if (SCALED<T>)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float scale = __shfl_sync(FULL_MASK, value_scale, n * 8 + pair + i);
                    score[n][i] *= scale;
                    score[n][2 + i] *= scale;
                }
            const u32 weight[2] = {f16x2_of(score[n][0], score[n][1]), f16x2_of(score[n][2], score[n][3])};
#pragma unroll
            for (int d = 0; d < HEAD_DIM; d += 32) {
                u32 b[4];
                load_matrices<true>(b, &value[n * 8 + lane % 8][d + lane / 8 * 8]);
#pragma unroll
                for (int i = 0; i < 4; ++i) mma(mixed[d / 8 + i], weight, b[i]);
            }
        }
        if (more) flight.store(key);
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        sum[half] += __shfl_xor_sync(FULL_MASK, sum[half], 1);
        sum[half] += __shfl_xor_sync(FULL_MASK, sum[half], 2);
        const u32 row = output_rows[warp * 16 + half * 8 + quad];
        if (row == NO_ROW) continue;
        const u32 first = row * HEAD_DIM + pair;
        const float over = sum[half] / unit;
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; ++d) {
            const float2 mean = make_float2(mixed[d][half * 2] / over, mixed[d][half * 2 + 1] / over);
            *reinterpret_cast<float2*>(&out[first + d * 8]) = mean;
            guard_finite(guard, check, first + d * 8, mean.x);
            guard_finite(guard, check, first + d * 8 + 1, mean.y);
        }
    }
}

// Grid: (tiles, kv_heads) blocks of 128 threads. Tile rows: 64.
#define PREFILL_MMA(KV, HEAD_DIM)                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, HEAD_DIM == 256 ? 2 : 3) prefill_mma_##KV##_##HEAD_DIM( \
        const float* q, Cache<KV> cache, AttentionBatch batch, const Tile* tiles, float* out, u64* guard,         \
        u32 check) {                                                                                              \
        prefill_mma<KV, HEAD_DIM>(q, cache, batch, tiles, out, guard, check);                                     \
    }

PREFILL_MMA(f16, 64)
PREFILL_MMA(f16, 128)
PREFILL_MMA(f16, 256)
PREFILL_MMA(int8, 64)
PREFILL_MMA(int8, 128)
PREFILL_MMA(int8, 256)
#endif
