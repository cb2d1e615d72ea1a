// Packed codes of one lane and superblock, and their unpacking to int8 bytes for dp4a and int8 mma.
#pragma once
#include "common.cuh"

// A lane's 32 codes of a superblock are BITS words: 4 blocks t of 8 values (one unit of one column).
// A block needs one or two of those words; word_of(t, i) tells which, so that a kernel may keep
// words somewhere else (shared memory) and fetch what a block needs.
template <int BITS>
struct CodeWords {
    static constexpr int WORDS = BITS;
    static constexpr int TILE_BYTES = SUPERBLOCK_ROWS * BITS;     // one superblock of one n-tile
    static constexpr float INVERSE = 1.0f / (1 << (8 - BITS));    // bytes are code << (8 - BITS)
};

template <int BITS>
struct Codes;

template <>
struct Codes<4> : CodeWords<4> {
    static constexpr int WORDS_OF_BLOCK = 1;
    u32 word[WORDS];

    // tile: [lane] 16 bytes
    __device__ __forceinline__ void load(const u8* tile, int lane) {
        uint4 v = __ldg((const uint4*)tile + lane);
        word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
    }
    static __device__ __forceinline__ int word_of(int t, int) { return t; }
    static __device__ __forceinline__ void unpack(int, u32 a, u32, int& lo, int& hi) {
        lo = (a << 4) & 0xf0f0f0f0u;
        hi = a & 0xf0f0f0f0u;
    }
    __device__ __forceinline__ void unpack(int t, int& lo, int& hi) const { unpack(t, word[t], 0, lo, hi); }
};

template <>
struct Codes<8> : CodeWords<8> {
    static constexpr int WORDS_OF_BLOCK = 2;
    u32 word[WORDS];

    // tile: [2][lane] 16 bytes
    __device__ __forceinline__ void load(const u8* tile, int lane) {
        uint4 v = __ldg((const uint4*)tile + lane);
        uint4 w = __ldg((const uint4*)tile + WARP + lane);
        word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
        word[4] = w.x, word[5] = w.y, word[6] = w.z, word[7] = w.w;
    }
    static __device__ __forceinline__ int word_of(int t, int i) { return 2 * t + i; }
    static __device__ __forceinline__ void unpack(int, u32 a, u32 b, int& lo, int& hi) {
        lo = a;
        hi = b;
    }
    __device__ __forceinline__ void unpack(int t, int& lo, int& hi) const {
        unpack(t, word[2 * t], word[2 * t + 1], lo, hi);
    }
};

template <>
struct Codes<2> : CodeWords<2> {
    static constexpr int WORDS_OF_BLOCK = 1;
    u32 word[WORDS];

    // tile: [lane] 8 bytes
    __device__ __forceinline__ void load(const u8* tile, int lane) {
        uint2 v = __ldg((const uint2*)tile + lane);
        word[0] = v.x, word[1] = v.y;
    }
    static __device__ __forceinline__ int word_of(int t, int) { return t >> 1; }
    static __device__ __forceinline__ void unpack(int t, u32 a, u32, int& lo, int& hi) {
        int shift = 4 * (t & 1);
        lo = (a << (6 - shift)) & 0xc0c0c0c0u;
        hi = (a << (4 - shift)) & 0xc0c0c0c0u;
    }
    __device__ __forceinline__ void unpack(int t, int& lo, int& hi) const { unpack(t, word[t >> 1], 0, lo, hi); }
};

template <>
struct Codes<3> : CodeWords<3> {
    static constexpr int WORDS_OF_BLOCK = 2;
    u32 word[WORDS];

    // tile: [lane] 8 bytes of low bits, then [lane] 4 bytes of signs
    __device__ __forceinline__ void load(const u8* tile, int lane) {
        uint2 v = __ldg((const uint2*)tile + lane);
        word[0] = v.x, word[1] = v.y;
        word[2] = __ldg((const u32*)(tile + WARP * sizeof(uint2)) + lane);
    }
    static __device__ __forceinline__ int word_of(int t, int i) { return i == 0 ? t >> 1 : 2; }
    static __device__ __forceinline__ void unpack(int t, u32 low, u32 sign, int& lo, int& hi) {
        int shift = 4 * (t & 1);
        lo = ((low >> shift << 5) & 0x60606060u) | ((sign << (7 - 2 * t)) & 0x80808080u);
        hi = ((low >> shift << 3) & 0x60606060u) | ((sign << (6 - 2 * t)) & 0x80808080u);
    }
    __device__ __forceinline__ void unpack(int t, int& lo, int& hi) const {
        unpack(t, word[t >> 1], word[2], lo, hi);
    }
};
