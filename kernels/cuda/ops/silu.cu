// silu(gate) * up, and the same straight into int8.
#include "a8.cuh"
#include "rows.cuh"

// The fast division is within 2 ulp, and gives 0 where the quotient is below 1e-35 anyway.
__device__ __forceinline__ float silu_mul(float gate, float up) {
    return __fdividef(gate, 1.0f + expf(-gate)) * up;
}

__device__ __forceinline__ float4 silu_mul(float4 gate, float4 up) {
    return make_float4(silu_mul(gate.x, up.x), silu_mul(gate.y, up.y),
                       silu_mul(gate.z, up.z), silu_mul(gate.w, up.w));
}

// A thread per 4 values.
extern "C" __global__ void __launch_bounds__(256)
silu_mul_f32(float* __restrict__ gate,      // (count) f32, becomes silu(gate) * up
             const float* __restrict__ up,  // (count) f32
             int count, u64* guard, u32 check) {
    const int at = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (at >= count) return;
    const float4 value = silu_mul(load4(gate, at, count), load4(up, at, count));
    store4(gate, at, count, value);
    guard_finite4(guard, check, at, value);
}

// Grid: (rows padded to 8, ceil(superblocks / 8)): a warp per superblock.
extern "C" __global__ void __launch_bounds__(256)
silu_mul_a8(const float* gate,             // (rows, width) f32, row-major
            const float* __restrict__ up,  // (rows, width) f32
            int rows, int width,
            int superblocks,           // ceil(width / 128)
            s8* __restrict__ q,        // [row tile][superblock] 1024 bytes, see a8.cuh
            float* __restrict__ d,     // [row tile][superblock][8][4] f32
            float* __restrict__ dsum,  // like d
            float* out,                // (rows, width) f32 or null; may be `gate`
            u64* guard, u32 check) {   // of silu(gate) * up
    const int row = blockIdx.x, column = (blockIdx.y * blockDim.x + threadIdx.x) * 4;
    const int superblock = column / SUPERBLOCK_ROWS;
    if (superblock >= superblocks) return;
    float4 value = make_float4(0, 0, 0, 0);
    if (row < rows) {
        const size_t start = (size_t)row * width;
        value = silu_mul(load4(gate + start, column, width), load4(up + start, column, width));
        if (out != nullptr) store4(out + start, column, width, value);
        guard_finite4(guard, check, (u32)start + column, value);
    }
    store_a8(A8{q, d, dsum, superblocks}, row, superblock, value);
}
