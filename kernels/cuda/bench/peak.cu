// Peak issue rates of the arithmetic the linears are built on: what a bound is measured against.
// Launch enough warps to fill the card; each warp runs `iterations` x CHAINS independent instructions.
// Multiply-adds per warp instruction: m8n8k16 1024, m16n8k8 1024, dp4a 128, fma 32, of f16x2 64.
#include "common.cuh"

namespace {
constexpr int CHAINS = 8;  // enough independent accumulators to hide the latency of one
}

extern "C" __global__ void __launch_bounds__(256) peak_fma_f32(int iterations, float* out /* (threads of the grid) */) {
    float sum[CHAINS] = {};
    const float a = 1.0f + threadIdx.x * 1e-7f, b = threadIdx.x * 1e-3f;
    for (int i = 0; i < iterations; ++i) {
#pragma unroll
        for (int c = 0; c < CHAINS; ++c) sum[c] = fmaf(sum[c], a, b);
    }
    float total = 0.0f;
#pragma unroll
    for (int c = 0; c < CHAINS; ++c) total += sum[c];
    out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}

#if __CUDA_ARCH__ == 600 || __CUDA_ARCH__ == 700
extern "C" __global__ void __launch_bounds__(256) peak_fma_f16x2(int iterations, u32* out /* (threads of the grid) */) {
    u32 sum[CHAINS] = {};
    const u32 a = 0x3c003c00, b = threadIdx.x;  // 1 and a little
    for (int i = 0; i < iterations; ++i) {
#pragma unroll
        for (int c = 0; c < CHAINS; ++c)
            asm volatile("fma.rn.f16x2 %0, %0, %1, %2;" : "+r"(sum[c]) : "r"(a), "r"(b));
    }
    u32 total = 0;
#pragma unroll
    for (int c = 0; c < CHAINS; ++c) total += sum[c];
    out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}
#endif

#if __CUDA_ARCH__ >= 610
extern "C" __global__ void __launch_bounds__(256) peak_dp4a(int iterations, int* out /* (threads of the grid) */) {
    int sum[CHAINS] = {};
    const int a = threadIdx.x * 0x01030507, b = threadIdx.x * 0x02040608 + 1;
    for (int i = 0; i < iterations; ++i) {
#pragma unroll
        for (int c = 0; c < CHAINS; ++c) sum[c] = __dp4a(a, b, sum[c]);
    }
    int total = 0;
#pragma unroll
    for (int c = 0; c < CHAINS; ++c) total += sum[c];
    out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}
#endif

#if __CUDA_ARCH__ >= 750
extern "C" __global__ void __launch_bounds__(256) peak_mma_s8_m8n8k16(int iterations, int* out /* (threads of the grid) */) {
    int sum[CHAINS][2] = {};
    const u32 a = threadIdx.x * 0x01030507, b = threadIdx.x * 0x02040608 + 1;
    for (int i = 0; i < iterations; ++i) {
#pragma unroll
        for (int c = 0; c < CHAINS; ++c)
            asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                         : "+r"(sum[c][0]), "+r"(sum[c][1])
                         : "r"(a), "r"(b));
    }
    int total = 0;
#pragma unroll
    for (int c = 0; c < CHAINS; ++c) total += sum[c][0] + sum[c][1];
    out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}

extern "C" __global__ void __launch_bounds__(256) peak_mma_f16_m16n8k8(int iterations, float* out /* (threads of the grid) */) {
    float sum[CHAINS][4] = {};
    const u32 a0 = 0x3c003c00, a1 = threadIdx.x, b = 0x14001400;
    for (int i = 0; i < iterations; ++i) {
#pragma unroll
        for (int c = 0; c < CHAINS; ++c)
            asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                         : "+f"(sum[c][0]), "+f"(sum[c][1]), "+f"(sum[c][2]), "+f"(sum[c][3])
                         : "r"(a0), "r"(a1), "r"(b));
    }
    float total = 0.0f;
#pragma unroll
    for (int c = 0; c < CHAINS; ++c) total += sum[c][0] + sum[c][1] + sum[c][2] + sum[c][3];
    out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}
#endif
