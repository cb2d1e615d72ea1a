// Single logits changed by a sequence's rules, masked rows, and rows of logits reduced to what sampling needs, so that
// no whole row leaves the device: the twins of adjust_logits, mask_logits, reduce_row and target_logit. Blocks reduce chunks of a row, then one block joins them.
// Integer counts, distinct ranks and sums of fixed shape: the same bits at every run.
#include "rows.cuh"

constexpr int CHUNK_THREADS = 512;
constexpr int CHUNK_ITEMS = 16;                     // logits of a thread, kept in registers
constexpr int CHUNK = CHUNK_THREADS * CHUNK_ITEMS;  // logits of a block
constexpr int MAX_CHUNKS = 32;                      // of a row
constexpr int ROW_THREADS = 1024;
constexpr int DIGIT_BITS = 11;
constexpr int BINS = 1 << DIGIT_BITS;

constexpr float FAR = -105.0f;  // an exponential is 0 from here down

struct Candidate {
    u32 id;
    float logit;
};

// The result of a row.
template <int K>
struct RowSummary {
    double sum_exp;           // of exp(logit - max)
    double sum_exp_t;         // of exp(x), x = (logit - max) / temperature; at 0 how many equal max
    double sum_x_exp_t;       // of x * exp(x); at 0 nothing
    float max;                // negative infinity if every token is banned
    float target;             // logit of the row's target id, NaN if it is not of this range
    u32 count;                // of candidates
    Candidate candidates[K];  // by falling logit, then rising id; the rest (~0, -inf)
};

// What a block says about its chunk of a row.
template <int K>
struct ChunkSummary {
    double sum_exp;  // relative to the chunk's max
    double sum_exp_t;
    double sum_x_exp_t;
    u64 best;
    u64 ranks[K];  // the best K of the chunk in no order, padded with NONE
};

// The order of candidates as one integer, the best lowest: falling logit, then rising column.
constexpr u64 NONE = ~0ull;

__device__ __forceinline__ float negative_infinity() { return __uint_as_float(0xff800000u); }

__device__ __forceinline__ u64 rank_of(float logit, u32 column) {
    if (!(logit > negative_infinity())) return NONE;  // NaN too
    const u32 bits = __float_as_uint(logit + 0.0f);  // -0 becomes 0
    return (u64)((int)bits < 0 ? bits : bits ^ 0x7fffffffu) << 32 | column;
}

__device__ __forceinline__ float logit_of(u64 rank) {
    if (rank == NONE) return negative_infinity();
    const u32 key = (u32)(rank >> 32);
    return __uint_as_float((int)key < 0 ? key : key ^ 0x7fffffffu);
}

__device__ __forceinline__ u64 warp_min(u64 value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        value = min(value, __shfl_xor_sync(FULL_MASK, value, offset));
    return value;
}

__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(FULL_MASK, value, offset);
    return value;
}

// Inclusive prefix sum over the warp.
__device__ __forceinline__ u32 warp_scan(u32 value) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
        const u32 lower = __shfl_up_sync(FULL_MASK, value, offset);
        if (lane >= offset) value += lower;
    }
    return value;
}

struct Selection {
    u32 bins[BINS];
    u32 warps[WARP];
    u32 digit, before, inside;
};

// The K-th lowest of the block's ranks (all distinct but for NONE), or something between it and the
// next one; NONE - 1 if there are fewer than K. Radix select from the top digit down.
template <int K, int THREADS, int ITEMS>
__device__ __forceinline__ u64 kth_rank(const u64 (&ranks)[ITEMS], Selection& shared) {
    constexpr int OWN = BINS / THREADS;  // bins of a thread
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    u64 prefix = 0, known = 0;  // bits of the result found so far, and which they are
    u32 wanted = K;
    for (int shift = 64 - DIGIT_BITS;; shift = max(shift - DIGIT_BITS, 0)) {
#pragma unroll
        for (int i = 0; i < OWN; i++) shared.bins[i * THREADS + threadIdx.x] = 0;
        __syncthreads();
        if (threadIdx.x == 0) shared.inside = 0;
#pragma unroll
        for (int i = 0; i < ITEMS; i++)
            if ((ranks[i] & known) == prefix && ranks[i] != NONE)
                atomicAdd(&shared.bins[(ranks[i] >> shift) % BINS], 1u);
        __syncthreads();

        u32 own[OWN], sum = 0;
#pragma unroll
        for (int i = 0; i < OWN; i++) sum += own[i] = shared.bins[threadIdx.x * OWN + i];
        const u32 scanned = warp_scan(sum);
        if (lane == WARP - 1) shared.warps[warp] = scanned;
        __syncthreads();
        const u32 totals = warp_scan(lane < THREADS / WARP ? shared.warps[lane] : 0);
        const u32 earlier = __shfl_sync(FULL_MASK, totals, max(warp - 1, 0));
        u32 before = scanned - sum + (warp > 0 ? earlier : 0);
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            if (before < wanted && wanted <= before + own[i]) {
                shared.digit = threadIdx.x * OWN + i;
                shared.before = before;
                shared.inside = own[i];
            }
            before += own[i];
        }
        __syncthreads();
        if (shared.inside == 0) return NONE - 1;
        prefix |= (u64)shared.digit << shift;
        known |= (u64)(BINS - 1) << shift;
        wanted -= shared.before;
        if (shared.inside == wanted) return prefix | ~known;  // the rest of the bin is wanted whole
    }
}

template <int K>
__device__ __forceinline__ void reduce_chunk(const float* logits, const float* temperatures, int n,
                                             ChunkSummary<K>* summaries) {
    constexpr int WARPS = CHUNK_THREADS / WARP;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const float* row = logits + (size_t)blockIdx.y * n;
    ChunkSummary<K>& summary = summaries[blockIdx.y * gridDim.x + blockIdx.x];

    u64 ranks[CHUNK_ITEMS], best = NONE;
#pragma unroll
    for (int i = 0; i < CHUNK_ITEMS; i += 4) {
        const int column = blockIdx.x * CHUNK + (i * CHUNK_THREADS / 4 + threadIdx.x) * 4;
        const float4 four = load4(row, column, n, negative_infinity());
        ranks[i] = rank_of(four.x, column), ranks[i + 1] = rank_of(four.y, column + 1);
        ranks[i + 2] = rank_of(four.z, column + 2), ranks[i + 3] = rank_of(four.w, column + 3);
    }
#pragma unroll
    for (int i = 0; i < CHUNK_ITEMS; i++) best = min(best, ranks[i]);

    __shared__ u64 bests[WARPS];
    best = warp_min(best);
    if (lane == 0) bests[warp] = best;
    __syncthreads();
    best = warp_min(bests[lane % WARPS]);

    const float max = logit_of(best), temperature = temperatures[blockIdx.y];
    // Few f32 additions in a thread, then f64 across threads.
    float part = 0.0f, part_t = 0.0f, part_x = 0.0f;
#pragma unroll
    for (int i = 0; i < CHUNK_ITEMS; i++) {
        // Of NONE negative infinity or, where nothing is left, NaN; here and far below the terms are 0.
        const float distance = logit_of(ranks[i]) - max;
        const float x = temperature > 0.0f ? distance / temperature
                        : distance == 0.0f ? 0.0f
                                           : FAR;
        const float term_t = expf(fmaxf(x, FAR));
        part += expf(fmaxf(distance, FAR));
        part_t += term_t;
        part_x += fmaxf(x, FAR) * term_t;
    }
    __shared__ double sums[3][WARPS];
    const double sum = warp_sum((double)part), sum_t = warp_sum((double)part_t);
    const double sum_x = warp_sum((double)part_x);
    if (lane == 0) sums[0][warp] = sum, sums[1][warp] = sum_t, sums[2][warp] = sum_x;
    __syncthreads();
    if (warp == 0) {
        const double total = warp_sum(lane < WARPS ? sums[0][lane] : 0.0);
        const double total_t = warp_sum(lane < WARPS ? sums[1][lane] : 0.0);
        const double total_x = warp_sum(lane < WARPS ? sums[2][lane] : 0.0);
        if (lane == 0) {
            summary.sum_exp = total, summary.sum_exp_t = total_t, summary.sum_x_exp_t = total_x;
            summary.best = best;
        }
    }

    if constexpr (K == 1) {
        if (threadIdx.x == 0) summary.ranks[0] = best;
        return;
    }
    __shared__ Selection selection;
    __shared__ u32 count;
    if (threadIdx.x == 0) count = 0;
    const u64 limit = kth_rank<K, CHUNK_THREADS>(ranks, selection);
#pragma unroll
    for (int i = 0; i < CHUNK_ITEMS; i++)
        if (ranks[i] <= limit) summary.ranks[atomicAdd(&count, 1u)] = ranks[i];
    __syncthreads();
    for (int i = count + threadIdx.x; i < K; i += CHUNK_THREADS) summary.ranks[i] = NONE;
}

// One warp joins the sums of a row's chunks.
template <int K>
__device__ __forceinline__ void join_sums(const ChunkSummary<K>* chunk, int chunks, float temperature,
                                          RowSummary<K>& out) {
    const int lane = threadIdx.x % WARP;
    u64 best = NONE;
    for (int i = lane; i < chunks; i += WARP) best = min(best, chunk[i].best);
    best = warp_min(best);
    const double max = logit_of(best);
    double sum = 0.0, sum_t = 0.0, sum_x = 0.0;
    for (int i = lane; i < chunks; i += WARP) {
        if (chunk[i].best == NONE) continue;
        const double distance = logit_of(chunk[i].best) - max;
        const double x = temperature > 0.0f ? distance / temperature : 0.0;
        const double decay_t = temperature > 0.0f ? exp(x) : distance == 0.0;
        sum += chunk[i].sum_exp * exp(distance);
        sum_t += chunk[i].sum_exp_t * decay_t;
        // Every x of the chunk is further from the row's max by this one.
        sum_x += (chunk[i].sum_x_exp_t + x * chunk[i].sum_exp_t) * decay_t;
    }
    sum = warp_sum(sum), sum_t = warp_sum(sum_t), sum_x = warp_sum(sum_x);
    if (lane == 0) {
        out.sum_exp = sum, out.sum_exp_t = sum_t, out.sum_x_exp_t = sum_x;
        out.max = (float)max;
    }
}

template <int K>
__device__ __forceinline__ void join_row(const ChunkSummary<K>* summaries, const float* logits,
                                         const float* temperatures, const u32* targets, int n,
                                         u32 first_id, int chunks, RowSummary<K>* rows) {
    const int row = blockIdx.x;
    const ChunkSummary<K>* chunk = summaries + row * chunks;
    RowSummary<K>& out = rows[row];
    if (blockIdx.y == 1) {  // beside the candidates, not before them
        if (threadIdx.x < WARP) join_sums(chunk, chunks, temperatures[row], out);
        if (threadIdx.x == 0) {
            const u32 column = targets == nullptr ? ~0u : targets[row] - first_id;
            const float nan = __uint_as_float(0x7fffffffu);
            out.target = column < (u32)n ? logits[(size_t)row * n + column] : nan;
        }
        return;
    }
    auto candidate = [&](u64 rank) {
        return Candidate{rank == NONE ? ~0u : first_id + (u32)rank, logit_of(rank)};
    };
    if constexpr (K == 1) {
        u64 best = NONE;
        for (int i = threadIdx.x; i < chunks; i += WARP) best = min(best, chunk[i].ranks[0]);
        best = warp_min(best);
        if (threadIdx.x == 0) out.count = best != NONE, out.candidates[0] = candidate(best);
        return;
    }

    constexpr int ITEMS = (MAX_CHUNKS * K + ROW_THREADS - 1) / ROW_THREADS;
    u64 ranks[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int item = i * ROW_THREADS + threadIdx.x;
        ranks[i] = item / K < chunks ? chunk[item / K].ranks[item % K] : NONE;
    }
    __shared__ Selection selection;
    __shared__ u32 count;
    __shared__ u64 kept[K];
    if (threadIdx.x == 0) count = 0;
    const u64 limit = kth_rank<K, ROW_THREADS>(ranks, selection);
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
        if (ranks[i] <= limit) kept[atomicAdd(&count, 1u)] = ranks[i];
    __syncthreads();

    // Ranks are distinct, so a candidate's place is how many are better: 4 threads count it.
    constexpr int SHARE = ROW_THREADS / K;
    const int own = threadIdx.x / SHARE;
    const u64 rank = own < count ? kept[own] : NONE;
    u32 place = 0;
    for (int i = threadIdx.x % SHARE; i < count; i += SHARE) place += kept[i] < rank;
#pragma unroll
    for (int offset = 1; offset < SHARE; offset *= 2) place += __shfl_xor_sync(FULL_MASK, place, offset);
    if (threadIdx.x % SHARE == 0) out.candidates[own < count ? place : own] = candidate(rank);
    if (threadIdx.x == 0) out.count = count;
}

// A change of one logit; kernels/src/logits.rs writes it.
struct alignas(16) Adjustment {
    u32 element;  // of (rows, n) logits
    float bias;
    float penalty;
    float subtract;
};

constexpr int ADJUST_THREADS = 256;

// One thread a change, no two of the same logit. Rounded step by step, as on a CPU.
extern "C" __global__ void __launch_bounds__(ADJUST_THREADS)
adjust_logits(float* __restrict__ logits,                   // (rows, n) f32, row-major
              const Adjustment* __restrict__ adjustments,   // (count)
              u32 count,
              float* __restrict__ originals) {              // (count) f32 or null
    const u32 index = blockIdx.x * ADJUST_THREADS + threadIdx.x;
    if (index >= count) return;
    const Adjustment change = adjustments[index];
    const float logit = logits[change.element];
    if (originals != nullptr) originals[index] = logit;
    const float biased = __fadd_rn(logit, change.bias);
    const float penalised = biased > 0.0f ? __fdiv_rn(biased, change.penalty)
                                          : __fmul_rn(biased, change.penalty);
    const float largest = __uint_as_float(0x7f7fffffu);
    logits[change.element] = fminf(__fsub_rn(penalised, change.subtract), largest);
}

constexpr int MASK_THREADS = 256;

// Bans what a row's mask leaves out. Grid: (blocks of columns, masked rows).
extern "C" __global__ void __launch_bounds__(MASK_THREADS)
mask_logits(float* __restrict__ logits,      // (any, n) f32, row-major
            const u32* __restrict__ rows,    // (masked rows) each once
            const u32* __restrict__ words,   // (masked rows, ceil(n / 32)), a set bit stays
            int n) {
    const int column = blockIdx.x * MASK_THREADS + threadIdx.x;
    if (column >= n) return;
    const u32 word = words[(size_t)blockIdx.y * ((n + 31) / 32) + column / 32];
    if (word >> (column % 32) & 1) return;
    logits[(size_t)rows[blockIdx.y] * n + column] = __uint_as_float(0xff800000u);
}

#define SAMPLE(K, JOIN_THREADS)                                                                    \
    /* Grid: (chunks of 8192, rows). */                                                            \
    extern "C" __global__ void __launch_bounds__(CHUNK_THREADS)                                    \
    sample_chunks_k##K(const float* __restrict__ logits,       /* (rows, n) f32, row-major */      \
                       const float* __restrict__ temperatures, /* (rows) f32 >= 0 */               \
                       int n,                                  /* at most 32 chunks */             \
                       ChunkSummary<K>* __restrict__ chunks) { /* (rows, chunks) */                \
        reduce_chunk<K>(logits, temperatures, n, chunks);                                          \
    }                                                                                              \
    /* Grid: (rows, 2): the candidates, the sums. */                                               \
    extern "C" __global__ void __launch_bounds__(JOIN_THREADS, 1)                                  \
    sample_rows_k##K(const ChunkSummary<K>* __restrict__ summaries, /* (rows, chunks) */           \
                     const float* __restrict__ logits,              /* (rows, n) f32, row-major */ \
                     const float* __restrict__ temperatures,        /* (rows) f32 >= 0 */          \
                     const u32* __restrict__ targets,               /* (rows) ids or null */       \
                     int n, u32 first_id,                           /* id of column 0 */           \
                     int chunks,                                    /* of a row */                 \
                     RowSummary<K>* __restrict__ rows) {            /* (rows) */                   \
        join_row<K>(summaries, logits, temperatures, targets, n, first_id, chunks, rows);          \
    }

SAMPLE(256, ROW_THREADS)
SAMPLE(1, WARP)
