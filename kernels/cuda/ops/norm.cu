// RMS norm of rows, with the residual's sum before it and the quantisation after it fused.
// A block holds one row in registers, up to 16 values a thread: blockDim.x * 16 >= padded width.
// Half as many a thread is quicker for few rows, and slower where rows fill the device.
#include "a8.cuh"
#include "rows.cuh"

constexpr int MAX_THREADS = 1024;
constexpr int QUADS = 4;  // float4s of a thread

__device__ __forceinline__ float block_sum(float value) {
    __shared__ float sums[WARP];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    value = warp_sum(value);
    if (lane == 0) sums[warp] = value;
    __syncthreads();
    return warp_sum(lane < blockDim.x / WARP ? sums[lane] : 0.0f);
}

// `x` of row blockIdx.x (plus `delta`, which is then kept in `x`) normed into `out` and `a8`.
template <bool ADD, bool QUANTISE>
__device__ __forceinline__ void norm_row(float* x, const float* delta, const float* weight, int rows,
                                         int width, float eps, float* out, const A8& a8, u64* guard,
                                         u32 check) {
    const int row = blockIdx.x;
    const size_t start = (size_t)row * width;
    const bool padding = row >= rows;
    const int stride = blockDim.x * 4;  // columns that the block covers at a time
    const float4 none = make_float4(0, 0, 0, 0);
    // All loads before the first use, for one latency instead of one per quad.
    float4 value[QUADS], other[QUADS], gain[QUADS];
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
        const int column = i * stride + threadIdx.x * 4;
        const bool inside = !padding && column < width;
        value[i] = inside ? load4(x + start, column, width) : none;
        if (ADD) other[i] = inside ? load4(delta + start, column, width) : none;
        gain[i] = inside ? load4(weight, column, width) : none;
    }
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
        const int column = i * stride + threadIdx.x * 4;
        float4& v = value[i];
        if (ADD && !padding && column < width) {
            v.x += other[i].x, v.y += other[i].y, v.z += other[i].z, v.w += other[i].w;
            store4(x + start, column, width, v);
            guard_finite4(guard, check, (u32)start + column, v);
        }
        squares += (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
    }
    const float scale = rsqrtf(block_sum(squares) / width + eps);
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
        const int column = i * stride + threadIdx.x * 4;
        if (i * stride >= width) break;
        float4 normed = value[i];
        normed.x *= scale * gain[i].x, normed.y *= scale * gain[i].y;
        normed.z *= scale * gain[i].z, normed.w *= scale * gain[i].w;
        if (out != nullptr && !padding && column < width) store4(out + start, column, width, normed);
        // A warp's columns are one superblock, so it enters as a whole.
        const int superblock = column / SUPERBLOCK_ROWS;
        if (QUANTISE && superblock < a8.superblocks) store_a8(a8, row, superblock, normed);
    }
}

// Grid: (rows).
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
rms_norm_f32(const float* __restrict__ x,       // (rows, width) f32, row-major
             const float* __restrict__ weight,  // (width) f32
             int rows, int width, float eps,
             float* __restrict__ out) {  // (rows, width) f32
    norm_row<false, false>(const_cast<float*>(x), nullptr, weight, rows, width, eps, out, A8{}, nullptr,
                           0);
}

// Grid: (rows).
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
add_rms_norm_f32(float* __restrict__ residual,      // (rows, width) f32, += delta
                 const float* __restrict__ delta,   // (rows, width) f32
                 const float* __restrict__ weight,  // (width) f32
                 int rows, int width, float eps,
                 float* __restrict__ out,  // (rows, width) f32
                 u64* guard, u32 check) {  // of residual
    norm_row<true, false>(residual, delta, weight, rows, width, eps, out, A8{}, guard, check);
}

// Grid: (rows padded to 8).
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
rms_norm_a8(const float* __restrict__ x,       // (rows, width) f32, row-major
            const float* __restrict__ weight,  // (width) f32
            int rows, int width, float eps,
            int superblocks,              // ceil(width / 128)
            s8* __restrict__ q,           // [row tile][superblock] 1024 bytes, see a8.cuh
            float* __restrict__ d,        // [row tile][superblock][8][4] f32
            float* __restrict__ dsum,     // like d
            float* __restrict__ out) {    // (rows, width) f32 or null
    const A8 a8{q, d, dsum, superblocks};
    norm_row<false, true>(const_cast<float*>(x), nullptr, weight, rows, width, eps, out, a8, nullptr, 0);
}

// Grid: (rows padded to 8).
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
add_rms_norm_a8(float* __restrict__ residual,      // (rows, width) f32, += delta
                const float* __restrict__ delta,   // (rows, width) f32
                const float* __restrict__ weight,  // (width) f32
                int rows, int width, float eps,
                int superblocks,           // ceil(width / 128)
                s8* __restrict__ q,        // [row tile][superblock] 1024 bytes, see a8.cuh
                float* __restrict__ d,     // [row tile][superblock][8][4] f32
                float* __restrict__ dsum,  // like d
                float* __restrict__ out,   // (rows, width) f32 or null
                u64* guard, u32 check) {   // of residual
    const A8 a8{q, d, dsum, superblocks};
    norm_row<true, true>(residual, delta, weight, rows, width, eps, out, a8, guard, check);
}
