// Prepares a token's heads for attention in one launch: normalises and rotates queries in place,
// normalises and rotates keys, and stores keys and values in the paged cache.
// One warp owns one head of one token, of any even size up to 256.
#include "attention/batch.cuh"

constexpr int THREADS = 128;
constexpr int MAX_PAIRS = 4;          // of a lane: 128 pairs rotate together in the widest head
constexpr u32 NO_SLOT = 0xffffffffu;  // a padding token: nothing is stored

__device__ __forceinline__ void narrow(float value, float& to) { to = value; }
__device__ __forceinline__ void narrow(float value, f16& to) { to.bits = f16_of_f32(value); }

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
    T* keys,               // [block][kv_head][block_tokens][head_dim]
    T* values,             // [block][kv_head][block_tokens][head_dim]
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
        head.store(keys + row * head_dim);
    } else {
        Head(v + from, half, lane).store(values + row * head_dim);
    }
}

// Grid: ceil(tokens * (query_heads + 2 * kv_heads) / 4) blocks of 128 threads.
#define ROPE_KV(KV)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS) rope_kv_##KV(                                        \
        float* q, const float* k, const float* v, const float* q_norm, const float* k_norm, const float* cos,  \
        const float* sin, const u32* positions, const u32* slots, KV* keys, KV* values, int tokens,            \
        int query_heads, int kv_heads, int head_dim, int block_tokens, float eps) {                            \
        rope_kv<KV>(q, k, v, q_norm, k_norm, cos, sin, positions, slots, keys, values, tokens, query_heads,    \
                    kv_heads, head_dim, block_tokens, eps);                                                    \
    }

ROPE_KV(f16)
ROPE_KV(f32)
