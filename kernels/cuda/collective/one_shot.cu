// A sum over ranks in one launch, for messages so small that latency is all they cost: every rank writes
// its values into each other rank's inbox and adds up what arrives in its own.
// A value travels beside the number of its round in one 8-byte word, which no bus tears apart, so that
// neither a fence nor a barrier is needed (the LL protocol of NCCL does the same). Two rounds alternate
// between two halves: who writes round n + 2 has read all of round n + 1, which a rank sends only after
// it has read all of round n. Every block has rounds and room of its own and never meets another one.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int MOST_RANKS = 8;
constexpr int BLOCKS = 32;   // of the largest sum
constexpr int PIECES = 1024; // two values each, that a block has room for
constexpr int LOOKS = 256;   // between two glances at the host's word, which lies across the bus

// kernels/src/cuda/one_shot.rs fills it in.
struct Inboxes {
    u64 out[MOST_RANKS];   // where this rank's values go at each rank; its own is not used
    u64 in[MOST_RANKS];    // where each rank's values arrive here: [half][block][PIECES] 16 bytes
    u32* rounds;           // (BLOCKS) the last round of each block
    const u32* stop;       // host memory: not 0 once nobody may wait any more
    int rank, ranks;
};

__device__ __forceinline__ void send(u64 to, float a, float b, u32 round) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %2};" ::"l"(to), "r"(__float_as_uint(a)), "r"(round),
                 "r"(__float_as_uint(b))
                 : "memory");
}

__device__ __forceinline__ uint4 look(u64 at) {
    uint4 v;
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at)
                 : "memory");
    return v;
}

// False if the host gave up.
__device__ __forceinline__ bool receive(u64 at, u32 round, const u32* stop, float2& value) {
#pragma unroll 1
    for (u32 looks = 1;; looks++) {
        const uint4 v = look(at);
        if (v.y == round && v.w == round) {
            value = make_float2(__uint_as_float(v.x), __uint_as_float(v.z));
            return true;
        }
        if (looks % LOOKS == 0 && *(const volatile u32*)stop != 0) return false;
    }
}

// Grid: (blocks) of 256 threads, blocks <= BLOCKS and at most PIECES pieces each. Sums in rank order, so
// that all ranks have the same bits.
extern "C" __global__ void __launch_bounds__(THREADS) all_reduce_one_shot_f32(
    float* x,      // (elements) f32, replaced by the sum over ranks
    int elements,
    Inboxes inboxes) {
    const int pieces = (elements + 1) / 2;
    const int share = (pieces + gridDim.x - 1) / gridDim.x;
    const int first = blockIdx.x * share, count = min(share, pieces - first);
    const u32 round = inboxes.rounds[blockIdx.x] + 1;
    const u64 room = ((round % 2) * BLOCKS + blockIdx.x) * (u64)(PIECES * sizeof(uint4));

    auto own = [&](int i) {
        const int at = 2 * (first + i);
        return make_float2(x[at], at + 1 < elements ? x[at + 1] : 0.0f);
    };
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += THREADS) {
        const float2 value = own(i);
#pragma unroll 1
        for (int peer = 0; peer < inboxes.ranks; peer++)
            if (peer != inboxes.rank) send(inboxes.out[peer] + room + i * sizeof(uint4), value.x, value.y, round);
    }
    bool whole = true;
#pragma unroll 1
    for (int i = threadIdx.x; i < count && whole; i += THREADS) {
        float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll 1
        for (int rank = 0; rank < inboxes.ranks && whole; rank++) {
            float2 value = make_float2(0.0f, 0.0f);
            if (rank == inboxes.rank)
                value = own(i);
            else
                whole = receive(inboxes.in[rank] + room + i * sizeof(uint4), round, inboxes.stop, value);
            sum = rank == 0 ? value : make_float2(sum.x + value.x, sum.y + value.y);
        }
        const int at = 2 * (first + i);
        x[at] = sum.x;
        if (at + 1 < elements) x[at + 1] = sum.y;
    }
    __syncthreads();
    if (threadIdx.x == 0) inboxes.rounds[blockIdx.x] = round;
}
