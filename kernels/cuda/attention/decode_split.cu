// Decode: each token attends to its sequence, which several blocks split between them. The query
// heads of a KV head share its reads. A warp walks over chunks of 32 keys with an online softmax,
// warps merge in shared memory, blocks in a workspace, where the last one to arrive combines.
// The grid depends on maxima only; how a sequence is cut follows from its length on the device.
#include "attention/batch.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP;
constexpr int CHUNK = WARP;            // keys that a warp takes at once: one per lane in the softmax
constexpr int RUN = 16;                // keys that certainly lie in one cache block
constexpr int LEAST_KEYS = 128;        // of a split: fewer do not pay for its merge
constexpr int MOST_SPLITS = 64;
constexpr int COMBINED = 16;           // splits that the combination loads at once
constexpr int KEY_LANES = 4;           // lanes that share a key's dot product
constexpr int KEY_ROUNDS = KEY_LANES;  // keys of such a quad in a chunk, so that each lane ends with one
constexpr int VALUE_ELEMENTS = 8;      // of a value that a lane accumulates

constexpr int min_of(int a, int b) { return a < b ? a : b; }

// The softmax weights of one key, aligned for the widest load that fits.
template <int GROUP>
struct alignas(GROUP == 1 ? 4 : GROUP == 2 ? 8 : 16) Weights {
    float of[GROUP];
};

// Blocks of the same token and query heads count themselves in; true for the last of `blocks`.
// The counter wraps to 0 by itself, ready for the next launch.
__device__ __forceinline__ bool is_last_block(u32* arrivals, u32 blocks) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicInc(arrivals, blocks - 1) == blocks - 1;
    __syncthreads();
    return last;
}

template <typename T, int HEAD_DIM, int GROUP>
__device__ __forceinline__ void decode_split(
    const float* q,  // (tokens, query_heads, head_dim) f32, rows batch.q_stride floats apart
    const Cache<T>& cache,
    const AttentionBatch& batch,
    int slices,      // runs of at most GROUP query heads that the largest group is cut into
    float* partial,  // workspace (tokens, query_heads, splits, head_dim)
    float2* stats,   // workspace (tokens, query_heads, splits): largest score in log2 units, sum of weights
    u32* arrivals,   // (tokens, kv_heads * slices), zero before the first launch, zero again after each
    float* out,      // (tokens, query_heads, head_dim) f32, row-major
    u64* guard, u32 check) {
    constexpr int PIECE = sizeof(Piece<T>) / sizeof(T);
    constexpr int VALUE_LANES = HEAD_DIM / VALUE_ELEMENTS;
    constexpr int VALUE_ROWS = WARP / VALUE_LANES;  // values that a warp reads at once
    constexpr int VALUE_PIECES = VALUE_ELEMENTS / PIECE;
    // Loads of keys, and as many of values, that a lane has under way; registers set the bound.
    constexpr int IN_FLIGHT = min_of(16, (GROUP > 5 ? 128 : 256) / (int)sizeof(Piece<T>));
    constexpr int KEY_STEP = KEY_LANES * PIECE;  // elements of a key that its lanes read at once
    constexpr int KEY_LOADS = min_of(HEAD_DIM / KEY_STEP, IN_FLIGHT / KEY_ROUNDS);
    constexpr int KEY_BATCH = KEY_LOADS * KEY_STEP;
    constexpr bool VALUES_EARLY = KEY_BATCH == HEAD_DIM;  // else the keys alone fill the registers
    constexpr int VALUE_LOADS = min_of(CHUNK / VALUE_ROWS, IN_FLIGHT / VALUE_PIECES);

    __shared__ alignas(16) float query[GROUP][HEAD_DIM];  // later the merged sum of weighted values
    __shared__ Weights<GROUP> weights[WARPS][CHUNK];
    __shared__ float2 warp_stats[GROUP][WARPS];
    __shared__ float factor[GROUP][MOST_SPLITS];

    const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    const int splits = gridDim.x, split = blockIdx.x;
    const size_t token = blockIdx.z;
    const int kv_head = blockIdx.y / slices;
    const int length = batch.context_lengths[token];
    const u32* table = table_of_row(batch, batch.row_of_token[token]);
    const HeadRange range = query_heads_of(batch, kv_head);
    const int first_head = range.first + blockIdx.y % slices * GROUP;
    const int group = min(GROUP, range.first + range.count - first_head);
    const size_t first_output = token * batch.query_heads + first_head;
    const int share = max(LEAST_KEYS, ((length + splits - 1) / splits + CHUNK - 1) / CHUNK * CHUNK);
    const int active = (length + share - 1) / share;
    const int begin = split * share, end = min(length, begin + share);
    if (group <= 0) return;
    if (length == 0 && split == 0)
#pragma unroll 1
        for (int i = thread; i < group * HEAD_DIM; i += THREADS) out[first_output * HEAD_DIM + i] = 0.0f;
    if (split >= active) return;

    const int quad = lane / KEY_LANES, part = lane % KEY_LANES;
    const int value_row = lane / VALUE_LANES, value_lane = lane % VALUE_LANES;
    float largest[GROUP], sum[GROUP], mixed[GROUP][VALUE_ELEMENTS];
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        largest[g] = NEG_INFINITY;
        sum[g] = 0.0f;
#pragma unroll
        for (int i = 0; i < VALUE_ELEMENTS; ++i) mixed[g][i] = 0.0f;
    }

    // Cache rows of a chunk's two runs; a run past the end repeats the first, masked below.
    auto rows_of = [&](int start) {
        const u32 low = cache_row(batch, table, kv_head, start);
        return make_uint2(low, start + RUN < end ? cache_row(batch, table, kv_head, start + RUN) : low);
    };
    uint2 next = begin + warp * CHUNK < end ? rows_of(begin + warp * CHUNK) : make_uint2(0, 0);

    for (int i = thread; i < GROUP * HEAD_DIM; i += THREADS)
        query[0][i] = i < group * HEAD_DIM
                          ? q[token * batch.q_stride + first_head * HEAD_DIM + i] * (batch.scale * LOG2_E)
                          : 0.0f;
    __syncthreads();

    for (int start = begin + warp * CHUNK; start < end; start += WARPS * CHUNK) {
        const uint2 rows = next;
        if (start + WARPS * CHUNK < end) next = rows_of(start + WARPS * CHUNK);

        // Lane l has the scales of key l of the chunk.
        float key_scale = 1.0f, value_scale = 1.0f;
        if (SCALED<T>) {
            const u32 row = (lane < RUN ? rows.x : rows.y) + lane % RUN;
            key_scale = __ldg(cache.key_scales + row);
            value_scale = start + lane < end ? __ldg(cache.value_scales + row) : 0.0f;
        }

        // A quad of lanes takes keys quad * 4 .. quad * 4 + 3, each lane a quarter of the elements.
        float dot[KEY_ROUNDS][GROUP];
#pragma unroll
        for (int r = 0; r < KEY_ROUNDS; ++r)
#pragma unroll
            for (int g = 0; g < GROUP; ++g) dot[r][g] = 0.0f;
        const T* key_at = cache.keys +
                          ((size_t)(quad * KEY_ROUNDS < RUN ? rows.x : rows.y) + quad * KEY_ROUNDS % RUN) * HEAD_DIM +
                          part * PIECE;
        const T* value_at = cache.values + value_row * HEAD_DIM + value_lane * PIECE;
        const T* low_values = value_at + (size_t)rows.x * HEAD_DIM;
        const T* high_values = value_at + (size_t)rows.y * HEAD_DIM - RUN * HEAD_DIM;
        Piece<T> value[VALUE_LOADS][VALUE_PIECES];
        auto load_values = [&](int first) {
#pragma unroll
            for (int i = 0; i < VALUE_LOADS; ++i) {
                const int key = first + i * VALUE_ROWS;
                const T* at = (key < RUN ? low_values : high_values) + key * HEAD_DIM;
#pragma unroll
                for (int p = 0; p < VALUE_PIECES; ++p) value[i][p] = load_piece(at + p * VALUE_LANES * PIECE);
            }
        };
#pragma unroll 1
        for (int d = 0; d < HEAD_DIM; d += KEY_BATCH) {
            Piece<T> key[KEY_LOADS][KEY_ROUNDS];
#pragma unroll
            for (int n = 0; n < KEY_LOADS; ++n)
#pragma unroll
                for (int r = 0; r < KEY_ROUNDS; ++r) key[n][r] = load_piece(key_at + r * HEAD_DIM + d + n * KEY_STEP);
            if (VALUES_EARLY) load_values(0);
#pragma unroll
            for (int n = 0; n < KEY_LOADS; ++n)
#pragma unroll
                for (int i = 0; i < PIECE; i += 4) {
                    float4 k[KEY_ROUNDS];
#pragma unroll
                    for (int r = 0; r < KEY_ROUNDS; ++r) k[r] = widen4(key[n][r], i);
#pragma unroll
                    for (int g = 0; g < GROUP; ++g) {
                        const float* at = &query[g][d + n * KEY_STEP + part * PIECE + i];
                        const float4 x = *reinterpret_cast<const float4*>(at);
#pragma unroll
                        for (int r = 0; r < KEY_ROUNDS; ++r) {
                            dot[r][g] += x.x * k[r].x;
                            dot[r][g] += x.y * k[r].y;
                            dot[r][g] += x.z * k[r].z;
                            dot[r][g] += x.w * k[r].w;
                        }
                    }
                }
        }
        if (!VALUES_EARLY) load_values(0);

        // Reduce and scatter: lane l ends with the score of key l of the chunk.
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
            const bool upper = part & 2, odd = part & 1;
            float even_key = upper ? dot[2][g] : dot[0][g], odd_key = upper ? dot[3][g] : dot[1][g];
            even_key += __shfl_xor_sync(FULL_MASK, upper ? dot[0][g] : dot[2][g], 2);
            odd_key += __shfl_xor_sync(FULL_MASK, upper ? dot[1][g] : dot[3][g], 2);
            float score = odd ? odd_key : even_key;
            score += __shfl_xor_sync(FULL_MASK, odd ? even_key : odd_key, 1);
            if (SCALED<T>) score *= key_scale;
            if (start + lane >= end) score = NEG_INFINITY;

            const float before = largest[g];
            largest[g] = fmaxf(before, warp_max(score));
            const float decay = exp2_approx(before - largest[g]), weight = exp2_approx(score - largest[g]);
            sum[g] = sum[g] * decay + weight;
            weights[warp][lane].of[g] = SCALED<T> ? weight * value_scale : weight;
#pragma unroll
            for (int i = 0; i < VALUE_ELEMENTS; ++i) mixed[g][i] *= decay;
        }
        __syncwarp();

#pragma unroll 1
        for (int first = 0; first < CHUNK; first += VALUE_LOADS * VALUE_ROWS) {
            if (first > 0) load_values(first);
            if (start + CHUNK > end) {  // what lies past the end may be anything, and 0 * NaN is NaN
#pragma unroll
                for (int i = 0; i < VALUE_LOADS; ++i)
                    if (start + first + i * VALUE_ROWS + value_row >= end)
#pragma unroll
                        for (int p = 0; p < VALUE_PIECES; ++p) value[i][p] = Piece<T>{};
            }
#pragma unroll
            for (int i = 0; i < VALUE_LOADS; ++i) {
                const Weights<GROUP> weight = weights[warp][first + i * VALUE_ROWS + value_row];
#pragma unroll
                for (int e = 0; e < VALUE_ELEMENTS; e += 4) {
                    const float4 x = widen4(value[i][e / PIECE], e % PIECE);
#pragma unroll
                    for (int g = 0; g < GROUP; ++g) {
                        mixed[g][e] += weight.of[g] * x.x;
                        mixed[g][e + 1] += weight.of[g] * x.y;
                        mixed[g][e + 2] += weight.of[g] * x.z;
                        mixed[g][e + 3] += weight.of[g] * x.w;
                    }
                }
            }
        }
        __syncwarp();
    }

    // Within the warp, then across warps, always in the same order.
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        sum[g] = warp_sum(sum[g]);
        if (lane == 0) warp_stats[g][warp] = make_float2(largest[g], sum[g]);
#pragma unroll
        for (int offset = VALUE_LANES; offset < WARP; offset <<= 1)
#pragma unroll
            for (int i = 0; i < VALUE_ELEMENTS; ++i)
                mixed[g][i] += __shfl_xor_sync(FULL_MASK, mixed[g][i], offset);
    }
    __syncthreads();
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        float most = NEG_INFINITY;
        for (int w = 0; w < WARPS; ++w) most = fmaxf(most, warp_stats[g][w].x);
        const float rescale = exp2_approx(largest[g] - most);
#pragma unroll
        for (int i = 0; i < VALUE_ELEMENTS; ++i) mixed[g][i] *= rescale;
    }
#pragma unroll 1
    for (int w = 0; w < WARPS; ++w) {
        if (warp == w && value_row == 0)
#pragma unroll
            for (int g = 0; g < GROUP; ++g)
#pragma unroll
                for (int i = 0; i < VALUE_ELEMENTS; ++i) {
                    float& to = query[g][i / PIECE * VALUE_LANES * PIECE + value_lane * PIECE + i % PIECE];
                    to = w == 0 ? mixed[g][i] : to + mixed[g][i];
                }
        __syncthreads();
    }

    // One warp per query head: its block's maximum and sum.
#pragma unroll 1
    for (int g = warp; g < group; g += WARPS) {
        float most = NEG_INFINITY, total = 0.0f;
        for (int w = 0; w < WARPS; ++w) most = fmaxf(most, warp_stats[g][w].x);
        for (int w = 0; w < WARPS; ++w) total += warp_stats[g][w].y * exp2_approx(warp_stats[g][w].x - most);
        if (lane == 0) {
            factor[g][0] = 1.0f / total;
            if (active > 1) stats[(first_output + g) * splits + split] = make_float2(most, total);
        }
    }
    __syncthreads();
    if (active == 1) {
#pragma unroll 1
        for (int i = 4 * thread; i < group * HEAD_DIM; i += 4 * THREADS) {
            const float f = factor[i / HEAD_DIM][0];
            const float4 x = *reinterpret_cast<const float4*>(&query[0][i]);
            const float4 mean = make_float4(f * x.x, f * x.y, f * x.z, f * x.w);
            write_checked(out, first_output * HEAD_DIM + i, mean, guard, check);
        }
        return;
    }
#pragma unroll 1
    for (int i = thread; i < group * HEAD_DIM; i += THREADS)
        partial[((first_output + i / HEAD_DIM) * splits + split) * HEAD_DIM + i % HEAD_DIM] = query[0][i];
    if (!is_last_block(&arrivals[token * gridDim.y + blockIdx.y], active)) return;

    // Factors of the splits, 0 for those that only fill up the last batch of loads.
    for (int g = warp; g < group; g += WARPS) {
        const float2* of_head = stats + (first_output + g) * splits;
        float2 part[MOST_SPLITS / WARP];
        float most = NEG_INFINITY, total = 0.0f;
#pragma unroll
        for (int i = 0; i < MOST_SPLITS / WARP; ++i) {
            const int s = lane + i * WARP;
            part[i] = s < active ? __ldcg(&of_head[s]) : make_float2(NEG_INFINITY, 0.0f);
            most = fmaxf(most, part[i].x);
        }
        most = warp_max(most);
#pragma unroll
        for (int i = 0; i < MOST_SPLITS / WARP; ++i) {
            part[i].x = exp2_approx(part[i].x - most);
            total += part[i].x * part[i].y;
        }
        total = warp_sum(total);
#pragma unroll
        for (int i = 0; i < MOST_SPLITS / WARP; ++i) factor[g][lane + i * WARP] = part[i].x / total;
    }
    __syncthreads();
#pragma unroll 1
    for (int i = 4 * thread; i < group * HEAD_DIM; i += 4 * THREADS) {
        const int g = i / HEAD_DIM;
        const float* of_head = partial + (first_output + g) * splits * HEAD_DIM + i % HEAD_DIM;
        float4 mean = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
        for (int first = 0; first < active; first += COMBINED) {
            float4 part[COMBINED];
#pragma unroll
            for (int s = 0; s < COMBINED; ++s)
                part[s] = __ldcg(reinterpret_cast<const float4*>(of_head + min(first + s, active - 1) * HEAD_DIM));
#pragma unroll
            for (int s = 0; s < COMBINED; ++s) {
                const float f = factor[g][first + s];
                mean.x += f * part[s].x;
                mean.y += f * part[s].y;
                mean.z += f * part[s].z;
                mean.w += f * part[s].w;
            }
        }
        write_checked(out, first_output * HEAD_DIM + i, mean, guard, check);
    }
}

// Grid: (splits, kv_heads * slices, tokens) blocks of 128 threads, splits <= MOST_SPLITS.
#define DECODE_SPLIT(KV, HEAD_DIM, GROUP)                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) decode_split_##KV##_##HEAD_DIM##_g##GROUP(        \
        const float* q, Cache<KV> cache, AttentionBatch batch, int slices, float* partial, float2* stats,      \
        u32* arrivals, float* out, u64* guard, u32 check) {                                                    \
        decode_split<KV, HEAD_DIM, GROUP>(q, cache, batch, slices, partial, stats, arrivals, out, guard,       \
                                          check);                                                              \
    }

// A group runs in the smallest that holds it; f16 caches have an exact one for nearly every model.
// With int8 ones so few that the groups of Qwen models, 2 and 4 to 8, do at most a quarter more
// arithmetic than their own would.
#define DECODE_SPLIT_F16(HEAD_DIM) \
    DECODE_SPLIT(f16, HEAD_DIM, 1) \
    DECODE_SPLIT(f16, HEAD_DIM, 2) \
    DECODE_SPLIT(f16, HEAD_DIM, 4) \
    DECODE_SPLIT(f16, HEAD_DIM, 5) \
    DECODE_SPLIT(f16, HEAD_DIM, 6) \
    DECODE_SPLIT(f16, HEAD_DIM, 7) \
    DECODE_SPLIT(f16, HEAD_DIM, 8)
#define DECODE_SPLIT_F32(HEAD_DIM) \
    DECODE_SPLIT(f32, HEAD_DIM, 2) \
    DECODE_SPLIT(f32, HEAD_DIM, 4) \
    DECODE_SPLIT(f32, HEAD_DIM, 8)
#define DECODE_SPLIT_INT8(HEAD_DIM) \
    DECODE_SPLIT(int8, HEAD_DIM, 2) \
    DECODE_SPLIT(int8, HEAD_DIM, 5) \
    DECODE_SPLIT(int8, HEAD_DIM, 8)

DECODE_SPLIT_F16(64)
DECODE_SPLIT_F16(128)
DECODE_SPLIT_F16(256)
DECODE_SPLIT_F32(64)
DECODE_SPLIT_F32(128)
DECODE_SPLIT_F32(256)
DECODE_SPLIT_INT8(64)
DECODE_SPLIT_INT8(128)
DECODE_SPLIT_INT8(256)
