// f32 activations into the stored row order of a quantised weight, as int8 or as they are.
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
