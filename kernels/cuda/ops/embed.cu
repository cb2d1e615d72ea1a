// Rows by index, and the residual's sum.
#include "rows.cuh"

// Grid: (tokens, ceil(width / 1024)).
template <typename T>
__device__ __forceinline__ void embed(const T* table, const u32* tokens, u32 first_id, u32 rows,
                                      int width, float* out) {
    const int column = (blockIdx.y * blockDim.x + threadIdx.x) * 4;
    if (column >= width) return;
    const u32 row = tokens[blockIdx.x] - first_id;  // an id below the range wraps to far above it
    float4 value = make_float4(0, 0, 0, 0);         // another rank has the row; the ranks are summed
    if (row < rows) value = load4(table + (size_t)row * width, column, width);
    store4(out + (size_t)blockIdx.x * width, column, width, value);
}

#define EMBED(NAME, T)                                               \
    extern "C" __global__ void __launch_bounds__(256)                \
    NAME(const T* __restrict__ table,    /* (rows, width), row-major */ \
         const u32* __restrict__ tokens, /* (tokens) ids */          \
         u32 first_id,                   /* id of the table's first row */ \
         u32 rows, int width,                                        \
         float* __restrict__ out) { /* (tokens, width) f32 */        \
        embed(table, tokens, first_id, rows, width, out);            \
    }

EMBED(embed_f16, f16)
EMBED(embed_bf16, bf16)
EMBED(embed_f32, float)

// Grid: (chosen rows, ceil(width / 1024)).
extern "C" __global__ void __launch_bounds__(256)
take_rows_f32(const float* __restrict__ x,   // (any, width) f32, row-major
              const u32* __restrict__ rows,  // (chosen)
              int width,
              float* __restrict__ out) {  // (chosen, width) f32
    const int column = (blockIdx.y * blockDim.x + threadIdx.x) * 4;
    if (column >= width) return;
    const float4 value = load4(x + (size_t)rows[blockIdx.x] * width, column, width);
    store4(out + (size_t)blockIdx.x * width, column, width, value);
}

// A thread per 4 values.
extern "C" __global__ void __launch_bounds__(256)
add_f32(float* __restrict__ residual,     // (count) f32, += delta
        const float* __restrict__ delta,  // (count) f32
        int count, u64* guard, u32 check) {
    const int at = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (at >= count) return;
    float4 value = load4(residual, at, count);
    const float4 other = load4(delta, at, count);
    value.x += other.x, value.y += other.y, value.z += other.z, value.w += other.w;
    store4(residual, at, count, value);
    guard_finite4(guard, check, at, value);
}
