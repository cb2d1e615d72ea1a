// f32 activations into the stored row order of a quantised weight, as int8, as f16 or as they are.
#include "a8.cuh"
#include "rows.cuh"

// Stored rows `column`..+3 of one activation row; `order` names the source of each, null: itself.
__device__ __forceinline__ float4 gather4(const float* row, const u32* order, int k, int column) {
    if (order == nullptr) return load4(row, column, k);
    const uint4 source = *reinterpret_cast<const uint4*>(order + column);
    auto at = [&](u32 i) { return i < (u32)k ? row[i] : 0.0f; };  // padding is 0xffffffff
    return make_float4(at(source.x), at(source.y), at(source.z), at(source.w));
}

// Grid: (rows padded to 8, any): the blocks of a row share its superblocks. Few rows want many blocks
// each; many permuted rows one each, which then gathers the row from its own L1.
extern "C" __global__ void __launch_bounds__(1024)
quantise_a8(const float* __restrict__ x,    // (rows, k) f32, row-major
            const u32* __restrict__ order,  // (superblocks * 128) or null
            int rows, int k, int superblocks,
            s8* __restrict__ q,           // [row tile][superblock] 1024 bytes, see a8.cuh
            float* __restrict__ d,        // [row tile][superblock][8][4] f32
            float* __restrict__ dsum) {   // like d
    const A8 a8{q, d, dsum, superblocks};
    const int row = blockIdx.x, lane = threadIdx.x % WARP;
    const int warp = (blockIdx.y * blockDim.x + threadIdx.x) / WARP;
    for (int superblock = warp; superblock < superblocks; superblock += gridDim.y * blockDim.x / WARP) {
        float4 value = make_float4(0, 0, 0, 0);
        const int column = superblock * SUPERBLOCK_ROWS + lane * 4;
        if (row < rows) value = gather4(x + (size_t)row * k, order, k, column);
        store_a8(a8, row, superblock, value);
    }
}

// Grid: (rows, any), like quantise_a8.
extern "C" __global__ void __launch_bounds__(1024)
gather_f32(const float* __restrict__ x,    // (rows, k) f32, row-major
           const u32* __restrict__ order,  // (superblocks * 128) or null
           int k, int superblocks,
           float* __restrict__ out) {  // (rows, superblocks * 128) f32, row-major
    const size_t row = blockIdx.x;
    const int width = superblocks * SUPERBLOCK_ROWS;
    const int thread = blockIdx.y * blockDim.x + threadIdx.x;
    for (int column = thread * 4; column < width; column += gridDim.y * blockDim.x * 4)
        store4(out + row * width, column, width, gather4(x + row * k, order, k, column));
}

constexpr int F16_THREADS = 512;  // most of a block that makes f16 of rows

// What a row is multiplied by so that its largest magnitude lies in [2^exponent, 2^(exponent + 1)), for all threads of
// the block; `row_scale` gets the power that undoes it. Both stay normal numbers; what is not finite stays so, and the
// linear's guard finds it.
__device__ __forceinline__ float row_power(const float* row, int k, int exponent, float* row_scale) {
    __shared__ u32 tops[F16_THREADS / WARP];
    u32 top = 0;  // magnitudes order like their bits
    auto magnitude = [](float value) { return __float_as_uint(value) & 0x7fffffffu; };
    for (int column = threadIdx.x * 4; column < k; column += blockDim.x * 4) {
        const float4 v = load4(row, column, k);
        top = max(max(top, max(magnitude(v.x), magnitude(v.y))), max(magnitude(v.z), magnitude(v.w)));
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) top = max(top, __shfl_xor_sync(FULL_MASK, top, offset));
    __syncthreads();  // the tops of a row before have been read
    if (threadIdx.x % WARP == 0) tops[threadIdx.x / WARP] = top;
    __syncthreads();
    for (int warp = 0; warp < blockDim.x / WARP; ++warp) top = max(top, tops[warp]);
    const int power = min(max((int)(top >> 23), 15), 254);
    if (threadIdx.x == 0) *row_scale = __int_as_float((power - exponent) << 23);
    return __int_as_float((254 + exponent - power) << 23);
}

__device__ __forceinline__ u32 f16x2(float a, float b) { return f16_of_f32(a) | (u32)f16_of_f32(b) << 16; }

// What rounding left of the two values.
__device__ __forceinline__ u32 rest_f16x2(float a, float b, u32 rounded) {
    const float2 r = f32x2_of_f16x2(rounded);
    return f16x2(a - r.x, b - r.y);
}

// Activations for a16_mma: each is high + low, two f16, times a power of two of its row. high + low differs from x by at
// most 2^-23 of x or 2^-39 of the row's largest, whichever is more: a low half is a multiple of 2^-24.
//
// Grid: row tiles of 16 * 8; a block has rows b and b + 8 of a tile, whose words stand side by side. Chunks of 16 bytes
// lie as [row tile][superblock][t][high, low][first, last two pairs][row % 8 * 4 + j]: of two pairs of values, the words
// of row b and of b + 8 in turn. The pairs are values (0, 2), (4, 6), (1, 3), (5, 7) of unit j, see linear/widen.cuh.
extern "C" __global__ void __launch_bounds__(F16_THREADS)
split_f16(const float* __restrict__ x,    // (rows, k) f32, row-major
          const u32* __restrict__ order,  // (superblocks * 128) or null
          int rows, int k, int superblocks,
          uint2* __restrict__ out,           // (rows padded to 16, superblocks * 128) 4 bytes, see above
          float* __restrict__ row_scales) {  // (rows) x = row_scale * (high + low)
    constexpr int EXPONENT = 14;  // the most that f16 has room for
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int row_tile = blockIdx.x / 8, first = row_tile * 16 + blockIdx.x % 8;
    float power[2] = {};
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
        const int row = first + upper * 8;
        if (row < rows) power[upper] = row_power(x + (size_t)row * k, k, EXPONENT, row_scales + row);
    }
    const int t = lane / 8, j = lane / 2 % 4, half = lane % 2;
    for (int superblock = warp; superblock < superblocks; superblock += warps) {
        u32 word[2][2][2] = {};  // high or low, pair, row
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
            const int row = first + upper * 8;
            if (row >= rows) continue;
            const float4 v = gather4(x + (size_t)row * k, order, k, superblock * SUPERBLOCK_ROWS + lane * 4);
            const float value[4] = {v.x * power[upper], v.z * power[upper], v.y * power[upper], v.w * power[upper]};
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                const float a = value[pair * 2], b = value[pair * 2 + 1];
                word[0][pair][upper] = f16x2(a, b);
                word[1][pair][upper] = rest_f16x2(a, b, word[0][pair][upper]);
            }
        }
        const size_t block = ((size_t)row_tile * superblocks + superblock) * 4 + t;
#pragma unroll
        for (int low = 0; low < 2; ++low)
#pragma unroll
            for (int pair = 0; pair < 2; ++pair)
                out[(block * 128 + (low * 2 + pair) * WARP + blockIdx.x % 8 * 4 + j) * 2 + half] =
                    make_uint2(word[low][pair][0], word[low][pair][1]);
    }
}

// Activations for a16_half2: rounded to f16 under a power of two of their row, below 16 so that no 8 products with
// codes of 8 bits leave the range of f16.
//
// Grid: rows padded to 8. Chunks of 16 bytes lie as [row tile of 8][superblock][t][row % 8 * 4 + j]: the pairs of values
// (0, 2), (4, 6), (1, 3), (5, 7) of unit j.
extern "C" __global__ void __launch_bounds__(F16_THREADS)
round_f16(const float* __restrict__ x,    // (rows, k) f32, row-major
          const u32* __restrict__ order,  // (superblocks * 128) or null
          int rows, int k, int superblocks,
          u32* __restrict__ out,             // (rows padded to 8, superblocks * 128) f16, see above
          float* __restrict__ row_scales) {  // (rows) x = row_scale * out
    constexpr int EXPONENT = 3;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP, row = blockIdx.x;
    float power = 0.0f;
    if (row < rows) power = row_power(x + (size_t)row * k, k, EXPONENT, row_scales + row);
    const int t = lane / 8, j = lane / 2 % 4, half = lane % 2;
    for (int superblock = warp; superblock < superblocks; superblock += warps) {
        float4 v = make_float4(0, 0, 0, 0);
        if (row < rows) v = gather4(x + (size_t)row * k, order, k, superblock * SUPERBLOCK_ROWS + lane * 4);
        const size_t block = ((size_t)(row / 8) * superblocks + superblock) * 4 + t;
        u32* words = out + (block * WARP + row % 8 * 4 + j) * 4;
        words[half] = f16x2(v.x * power, v.z * power);
        words[2 + half] = f16x2(v.y * power, v.w * power);
    }
}
