// Prepares a token's heads for attention in one launch: normalises and rotates queries in place,
// normalises and rotates keys, and stores keys and values in the paged cache.
// One warp owns one head of one token, of any even size up to 256. An int8 cache takes codes in
// -127..127 and the scale, largest magnitude / 127, that they count.
#include "attention/batch.cuh"

constexpr int THREADS = 128;
constexpr int MAX_PAIRS = 4;          // of a lane: 128 pairs rotate together in the widest head
constexpr u32 NO_SLOT = 0xffffffffu;  // a padding token: nothing is stored

__device__ __forceinline__ void narrow(float value, float& to) { to = value; }
__device__ __forceinline__ void narrow(float value, f16& to) { to.bits = f16_of_f32(value); }

// The nearest code, ties to even. A scale that underflows is 0 and whatever stands beside it counts
// as 0; one that is denormal may be too small for the largest value, hence the bounds.
__device__ __forceinline__ int8 code_of(float value, float scale) {
    return {(s8)max(-127, min(127, __float2int_rn(value / scale)))};
}

// A lane owns elements i and i + half of a head for i = lane, lane + 32, ...: the pairs that rotate.
struct Head {
    int half, lane;
    float low[MAX_PAIRS], high[MAX_PAIRS];

    __device__ __forceinline__ Head(const float* head, int half_, int lane_) : half(half_), lane(lane_) {
#pragma unroll
        for (int i = 0; i < MAX_PAIRS; ++i) {
            const int at = lane + i * WARP;
            low[i] = at < half ? head[at] : 0.0f;
            high[i] = at < half ? head[half + at] : 0.0f;
        }
    }

    __device__ __forceinline__ void normalise(const float* weight, float eps) {
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < MAX_PAIRS; ++i) squares += low[i] * low[i] + high[i] * high[i];
        const float scale = rsqrtf(warp_sum(squares) / (2 * half) + eps);
#pragma unroll
        for (int i = 0; i < MAX_PAIRS; ++i) {
            const int at = lane + i * WARP;
            if (at >= half) break;
            low[i] *= scale * weight[at];
            high[i] *= scale * weight[half + at];
        }
    }

    __device__ __forceinline__ void rotate(const float* cos, const float* sin) {
#pragma unroll
        for (int i = 0; i < MAX_PAIRS; ++i) {
            const int at = lane + i * WARP;
            if (at >= half) break;
            const float a = low[i], b = high[i];
            low[i] = a * cos[at] - b * sin[at];
            high[i] = b * cos[at] + a * sin[at];
        }
    }

    // The largest magnitude, compared by its bits, which puts what is not finite above all else: the
    // scale then is not finite either, nor is what attention makes of it.
    __device__ __forceinline__ float largest() const {
        u32 bits = 0;
#pragma unroll
        for (int i = 0; i < MAX_PAIRS; ++i)
            bits = max(bits, max(__float_as_uint(low[i]) & 0x7fffffffu, __float_as_uint(high[i]) & 0x7fffffffu));
#pragma unroll
        for (int offset = WARP / 2; offset > 0; offset >>= 1) bits = max(bits, __shfl_xor_sync(FULL_MASK, bits, offset));
        return __uint_as_float(bits);
    }

    // Stores the row of the cache and its scale.
    template <typename T>
    __device__ __forceinline__ void store(T* cache, float* scales, size_t row) const {
        T* head = cache + row * (2 * half);
        if constexpr (SCALED<T>) {
            const float scale = largest() / 127.0f;
            if (lane == 0) scales[row] = scale;
#pragma unroll
            for (int i = 0; i < MAX_PAIRS; ++i) {
                const int at = lane + i * WARP;
                if (at >= half) break;
                head[at] = code_of(low[i], scale);
                head[half + at] = code_of(high[i], scale);
            }
        } else {
            store(head);
        }
    }

    template <typename T>
    __device__ __forceinline__ void store(T* head) const {
#pragma unroll
        for (int i = 0; i < MAX_PAIRS; ++i) {
            const int at = lane + i * WARP;
            if (at >= half) break;
            narrow(low[i], head[at]);
            narrow(high[i], head[half + at]);
        }
    }
};

template <typename T>
__device__ __forceinline__ void rope_kv(
    float* q,              // (tokens, query_heads, head_dim) f32, rotated in place
    const float* k,        // (tokens, kv_heads, head_dim) f32
    const float* v,        // (tokens, kv_heads, head_dim) f32
    const float* q_norm,   // (head_dim) f32, or null for no norm
    const float* k_norm,   // (head_dim) f32, or null for no norm
    const float* cos,      // (positions, head_dim / 2) f32
    const float* sin,      // (positions, head_dim / 2) f32
    const u32* positions,  // (tokens)
    const u32* slots,      // (tokens): block * block_tokens + offset, or NO_SLOT
    const Cache<T>& cache,
    int tokens, int query_heads, int kv_heads, int head_dim, int block_tokens, float eps) {
    const int lane = threadIdx.x % WARP, half = head_dim / 2;
    const int heads = query_heads + 2 * kv_heads;
    const int item = (blockIdx.x * THREADS + threadIdx.x) / WARP;
    const size_t token = item / heads;
    if (token >= tokens) return;
    const int query_head = item % heads;
    const int key_head = query_head - query_heads;
    const int value_head = key_head - kv_heads;
    const size_t turn = (size_t)positions[token] * half;

    if (key_head < 0) {
        float* at = q + (token * query_heads + query_head) * head_dim;
        Head head(at, half, lane);
        if (q_norm != nullptr) head.normalise(q_norm, eps);
        head.rotate(cos + turn, sin + turn);
        head.store(at);
        return;
    }

    const u32 slot = slots[token];
    if (slot == NO_SLOT) return;
    const int kv_head = value_head < 0 ? key_head : value_head;
    const size_t row = (size_t)(slot / block_tokens * kv_heads + kv_head) * block_tokens + slot % block_tokens;
    const size_t from = (token * kv_heads + kv_head) * head_dim;
    if (value_head < 0) {
        Head head(k + from, half, lane);
        if (k_norm != nullptr) head.normalise(k_norm, eps);
        head.rotate(cos + turn, sin + turn);
        head.store(cache.keys, cache.key_scales, row);
    } else {
        Head(v + from, half, lane).store(cache.values, cache.value_scales, row);
    }
}

// Grid: ceil(tokens * (query_heads + 2 * kv_heads) / 4) blocks of 128 threads.
#define ROPE_KV(KV)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS) rope_kv_##KV(                                        \
        float* q, const float* k, const float* v, const float* q_norm, const float* k_norm, const float* cos,  \
        const float* sin, const u32* positions, const u32* slots, Cache<KV> cache, int tokens,                 \
        int query_heads, int kv_heads, int head_dim, int block_tokens, float eps) {                            \
        rope_kv<KV>(q, k, v, q_norm, k_norm, cos, sin, positions, slots, cache, tokens, query_heads, kv_heads, \
                    head_dim, block_tokens, eps);                                                              \
    }

ROPE_KV(f16)
ROPE_KV(f32)
ROPE_KV(int8)
