// A step's sequences and where the paged cache keeps them, for every attention kernel.
#pragma once
#include "common.cuh"

// COUNT neighbours that one load or store moves.
template <typename T, int COUNT>
struct alignas(sizeof(T) * COUNT) Pack {
    T at[COUNT];
};

// An element of an int8 cache: what is meant is code * the scale of its row.
struct int8 {
    s8 code;
    __device__ __forceinline__ operator float() const { return (float)code; }
};

// True for a cache whose rows have scales. They multiply scores and softmax weights, one number a
// row, so that the loops over channels only convert integers.
template <typename T>
constexpr bool SCALED = false;
template <>
constexpr bool SCALED<int8> = true;

// A layer's cache. Rows are those that `cache_row` counts; scales are null unless SCALED.
template <typename T>
struct Cache {
    T* keys;              // [block][kv_head][block_tokens][head_dim]
    T* values;            // [block][kv_head][block_tokens][head_dim]
    float* key_scales;    // [block][kv_head][block_tokens] f32
    float* value_scales;  // [block][kv_head][block_tokens] f32
};

// What one load moves of a cache row: 16 bytes, or 8 of an int8 cache, so that a lane's share of a
// row is the same for f16 and int8.
template <typename T>
using Piece = Pack<T, sizeof(T) == 4 ? 4 : 8>;

template <typename T>
__device__ __forceinline__ Piece<T> load_piece(const T* at) {
    if constexpr (sizeof(Piece<T>) == 16) {
        const uint4 bits = __ldg(reinterpret_cast<const uint4*>(at));
        return reinterpret_cast<const Piece<T>&>(bits);
    } else {
        const uint2 bits = __ldg(reinterpret_cast<const uint2*>(at));
        return reinterpret_cast<const Piece<T>&>(bits);
    }
}

// Elements i..i+3 of a piece, widened; of an int8 cache not yet scaled.
template <typename T>
__device__ __forceinline__ float4 widen4(const Piece<T>& piece, int i) {
    return make_float4((float)piece.at[i], (float)piece.at[i + 1], (float)piece.at[i + 2], (float)piece.at[i + 3]);
}

// Four codes plus 128 each as unsigned bytes.
__device__ __forceinline__ u32 biased_codes(const Piece<int8>& piece, int i) {
    return reinterpret_cast<const u32*>(piece.at)[i / 4] ^ 0x80808080u;
}

// Pascal converts integers at a quarter of the rate of a permute or a sum, so each byte becomes the
// low bits of 2^23 instead, and a subtraction takes off 2^23 and the bias. Exact.
__device__ __forceinline__ float4 widen4(const Piece<int8>& piece, int i) {
    const u32 codes = biased_codes(piece, i);
    const float offset = 8388608.0f + 128.0f;
    return make_float4(__uint_as_float(__byte_perm(codes, 0x4b000000u, 0x7540)) - offset,
                       __uint_as_float(__byte_perm(codes, 0x4b000000u, 0x7541)) - offset,
                       __uint_as_float(__byte_perm(codes, 0x4b000000u, 0x7542)) - offset,
                       __uint_as_float(__byte_perm(codes, 0x4b000000u, 0x7543)) - offset);
}

// What every attention kernel reads of a step; the same buffers serve all layers.
struct AttentionBatch {
    const u32* block_tables;           // blocks of all rows, one row after the other
    const u32* table_offsets;          // (rows + 1): where each row's blocks start
    const u32* row_of_token;           // (tokens)
    const u32* context_lengths;        // (tokens): keys to attend to, the token itself included; 0 gives zeros
    const u32* kv_head_of_query_head;  // (query_heads), ascending
    int tokens;
    int query_heads;
    int kv_heads;
    int block_tokens;  // a multiple of 16
    int q_stride;      // floats from one token's queries to the next token's
    float scale;
};

__device__ __forceinline__ const u32* table_of_row(const AttentionBatch& batch, u32 row) {
    return batch.block_tables + batch.table_offsets[row];
}

// Where the cache ([block][kv_head][block_tokens][head_dim]) keeps a head of a sequence's token,
// counted in rows of head_dim: also the place of the row's scale.
__device__ __forceinline__ u32 cache_row(const AttentionBatch& batch, const u32* table, u32 kv_head, u32 token) {
    const u32 block_tokens = batch.block_tokens;
    return (table[token / block_tokens] * batch.kv_heads + kv_head) * block_tokens + token % block_tokens;
}

// The query heads of a KV head, found by a whole warp.
struct HeadRange {
    int first;
    int count;
};

__device__ __forceinline__ HeadRange query_heads_of(const AttentionBatch& batch, u32 kv_head) {
    HeadRange range = {0, 0};
#pragma unroll 1
    for (int base = 0; base < batch.query_heads; base += WARP) {
        const int head = base + threadIdx.x % WARP;
        const u32 of = head < batch.query_heads ? batch.kv_head_of_query_head[head] : 0xffffffffu;
        range.first += __popc(__ballot_sync(FULL_MASK, of < kv_head));
        range.count += __popc(__ballot_sync(FULL_MASK, of == kv_head));
    }
    return range;
}

// Scores are kept in log2 units, so that a softmax is made of exp2.
constexpr float LOG2_E = 1.44269504f;

// 2^x of a softmax, where a denormal weight is as good as 0.
__device__ __forceinline__ float exp2_approx(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}

// Writes four neighbours of a kernel's output and checks them.
__device__ __forceinline__ void write_checked(float* out, u32 element, float4 value, u64* guard, u32 check) {
    *reinterpret_cast<float4*>(out + element) = value;
    guard_finite(guard, check, element, value.x);
    guard_finite(guard, check, element + 1, value.y);
    guard_finite(guard, check, element + 2, value.z);
    guard_finite(guard, check, element + 3, value.w);
}

// What a block of a prompt kernel works on: consecutive tokens of one sequence, so few that
// tokens * largest group fits the kernel's rows. A row is a (token, query head) of one KV head.
struct Tile {
    u32 first_token, tokens, row;
};
constexpr u32 NO_ROW = 0xffffffffu;  // of a tile that it does not fill
