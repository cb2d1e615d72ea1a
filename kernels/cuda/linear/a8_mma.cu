// Linear with int8 activations and 2, 3, 4 or 8 bit weights on int8 tensor cores (m8n8k16, Turing on).
//
// Both operands lie in memory in the order of the mma's fragments, so a lane's wide load is its fragment.
// Two mma cover a block of 32 rows; their int32 sum becomes fp32 by arithmetic alone: the accumulator starts
// at the bit pattern of 1.5 * 2^23, so the sum read as a float is 1.5 * 2^23 + dot, exact as |dot| < 2^22.
//
// skinny (up to 16 rows): warps stream weights straight from memory, an equal run of them each.
// tiled (more rows): the warps of a block share activations through shared memory.
// All blocks have 128 threads.
#include "linear/a8_mma.cuh"

#if __CUDA_ARCH__ >= 750
namespace {

// Up to 8 * RT rows. Any grid; as many blocks as the card holds at once is best: the work, (group of NT tiles,
// superblock) in this order, is cut into one equal run per warp, so the card stays full to the end. A run may begin and
// end inside a group; the warps that share a group leave their sums in `scratch`, and the last one to come adds them in
// the order of the warps.
template <int BITS, Scaling S, int RT, int NT>
__device__ __forceinline__ void skinny(const LinearJobs& jobs, const Activations& x, float* scratch, u32* tickets,
                                       u64* guard) {
    const int lane = threadIdx.x % WARP, superblocks = jobs.superblocks, sp = jobs.scales_per_superblock;
    const int warp = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, warps = gridDim.x * blockDim.x / WARP;
    int units = 0;
    for (int i = 0; i < jobs.count; ++i) units += job_groups<NT, 1>(jobs.job[i]) * superblocks;
    const int run = units / warps, longer = units % warps;  // so many warps have one unit more
    int unit = warp * run + min(warp, longer);
    const int stop = unit + run + (warp < longer);
    if (unit == stop) return;

    // Lanes past the last row and row tiles past the last one repeat it: no extra bytes.
    const int last_row_tile = (jobs.rows - 1) / 8, tile_row = min(lane / 4, jobs.rows - 1);
    const s8* q = x.q + (tile_row * 4 + lane % 4) * 32;
    const float* d = x.d + tile_row * 4;
    u32 row_index[RT];  // in superblocks
#pragma unroll
    for (int r = 0; r < RT; ++r) row_index[r] = min(r, last_row_tile) * superblocks;

    WeightTiles w;  // of the loads, which run one unit ahead
    Codes<BITS> codes[NT] = {};
    Scales<S> scales[NT] = {};
    uint4 a[RT][2];
    float4 da[RT];
    auto enter = [&](int group) { w = weight_tiles<BITS, NT>(jobs, run_of<NT, 1>(jobs, group, 0), lane); };
    auto load_weights = [&](int nt, int sb, bool on) {
        codes[nt].load(w.codes + (u64)(u32)sb * (128 * BITS) + (u64)w.codes_stride * nt, lane, on);
        scales[nt].load(w.scales + (u64)w.scales_stride * nt, sb, sp, on);
    };
    auto load_activations = [&](int r, int sb) {
        const u32 index = row_index[r] + sb;
        const uint4* p = (const uint4*)(q + (u64)index * TILE_BYTES);
        a[r][0] = p[0];
        a[r][1] = p[1];
        da[r] = *(const float4*)(d + (u64)index * TILE_SCALES);
    };
    int group = unit / superblocks, sb = unit % superblocks;
    enter(group);
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) load_weights(nt, sb, true);
#pragma unroll
    for (int r = 0; r < RT; ++r) load_activations(r, sb);
    for (; unit < stop; ++group, sb = 0) {
        const int begin = sb, end = min(superblocks, sb + stop - unit);
        float acc[RT][NT][2] = {};
        for (; sb < end; ++sb, ++unit) {
            const bool more = unit + 1 < stop;
            int next = sb + 1;
            if (next == superblocks) {
                next = 0;
                if (more) enter(group + 1);
            }
            uint4 a_now[RT][2];
            float4 d_now[RT];
#pragma unroll
            for (int r = 0; r < RT; ++r) {
                a_now[r][0] = a[r][0];
                a_now[r][1] = a[r][1];
                d_now[r] = da[r];
                load_activations(r, next);
            }
#pragma unroll
            for (int nt = 0; nt < NT; ++nt) {
                u32 b[4][2];
                float2 scale[PAIRS<S>];
                codes[nt].unpack(b);
                scales[nt].unpack(scale);
                load_weights(nt, next, more);
#pragma unroll
                for (int r = 0; r < RT; ++r) accumulate<S>(acc[r][nt], a_now[r], d_now[r], b, scale);
            }
        }

        const Run tiles = run_of<NT, 1>(jobs, group, 0);
        const LinearJob& job = jobs.job[tiles.job];
        subtract_zeros<BITS, RT, NT>(acc, weight_tiles<BITS, NT>(jobs, tiles, lane), x.dsum + tile_row * 4, row_index, begin,
                                     end, sp);
        if (end - begin < superblocks) {
            auto owner = [&](int u) {
                const int split = longer * (run + 1);
                return u < split ? u / (run + 1) : longer + (u - split) / run;
            };
            constexpr int SIZE = RT * NT * 2 * WARP;
            const int first = owner(group * superblocks), last = owner(group * superblocks + superblocks - 1);
            // A warp shares at most two groups: the one it ends in, as its first warp, and the one it begins in.
            auto sums = [&](int sharer) { return scratch + (u64)(sharer * 2 + (sharer == first)) * SIZE + lane; };
#pragma unroll
            for (int i = 0; i < RT * NT * 2; ++i) sums(warp)[i * WARP] = acc[i / (NT * 2)][i / 2 % NT][i % 2];
            __threadfence();
            __syncwarp();
            u32 ticket = 0;
            if (lane == 0) {
                ticket = atomicAdd(&tickets[group], 1);
                if (ticket == last - first) tickets[group] = 0;  // ready for the next launch
            }
            if (__shfl_sync(FULL_MASK, ticket, 0) != last - first) continue;
            __threadfence();
#pragma unroll
            for (int i = 0; i < RT * NT * 2; ++i) acc[i / (NT * 2)][i / 2 % NT][i % 2] = 0.0f;
#pragma unroll 4
            for (int sharer = first; sharer <= last; ++sharer) {
                const float* p = sums(sharer);
#pragma unroll
                for (int i = 0; i < RT * NT * 2; ++i) acc[i / (NT * 2)][i / 2 % NT][i % 2] += __ldcg(p + i * WARP);
            }
        }
#pragma unroll
        for (int i = 0; i < RT * NT * 2; ++i) {
            const int row = i / (NT * 2) * 8 + lane / 4;
            const int column = (tiles.tile + i / 2 % NT) * TILE_COLUMNS + lane % 4 * 2 + i % 2;
            if (row < jobs.rows)
                emit(job, tiles, row, column, acc[i / (NT * 2)][i / 2 % NT][i % 2], CODE_STEP<BITS>, guard);
        }
    }
}

// Grid (groups of RT row tiles, groups of NT * WARPS tiles, splits of K): row groups first, so that blocks at work
// together read the same weights. Activations go through two shared buffers of a superblock each; a warp's weights have
// no one to be shared with and come from memory straight to registers.
template <int BITS, Scaling S, int RT, int NT>
__device__ __forceinline__ void tiled(const LinearJobs& jobs, const Activations& x, float* scratch, u32* tickets,
                                      u64* guard) {
    // A row tile in shared memory: the lanes' first halves; the second ones, 64 bytes off a multiple of 128 so that
    // neither filling nor reading conflicts; the scales.
    constexpr int SECOND = 576, SCALES = 1088, STRIDE = 1216, BUFFER = RT * STRIDE;
    constexpr int THREADS = WARPS * WARP, LOADS = RT * 64 / THREADS, SCALE_CHUNKS = RT * 8;
    constexpr int COLUMNS = NT * TILE_COLUMNS, PITCH = COLUMNS + 8;  // of a warp's output; 8: no bank conflicts
    static_assert(RT * 64 % THREADS == 0 && SCALE_CHUNKS <= THREADS && WARPS * 8 * PITCH * 4 <= 2 * BUFFER, "");
    __shared__ __align__(16) u8 shared[2 * BUFFER];

    const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP, sp = jobs.scales_per_superblock;
    const WeightTiles w = weight_tiles<BITS, NT>(jobs, run_of<NT, WARPS>(jobs, blockIdx.y, warp), lane);
    const int row_tile = blockIdx.x * RT, last_row_tile = (jobs.rows - 1) / 8;
    const int begin = jobs.superblocks * blockIdx.z / gridDim.z;
    const int end = jobs.superblocks * (blockIdx.z + 1) / gridDim.z;

    // Consecutive threads take consecutive 16 bytes.
    const uint4* q = (const uint4*)x.q + thread % 64;
    const float4* d = (const float4*)x.d + thread % 8;
    const int q_target = thread / 64 * STRIDE + thread % 2 * SECOND + thread % 64 / 2 * 16;
    const int d_target = thread / 8 * STRIDE + SCALES + thread % 8 * 16;
    u32 q_index[LOADS];  // row tiles, in superblocks
#pragma unroll
    for (int i = 0; i < LOADS; ++i)
        q_index[i] = min(row_tile + i * (THREADS / 64) + thread / 64, last_row_tile) * jobs.superblocks;
    const u32 d_index = min(row_tile + thread / 8, last_row_tile) * jobs.superblocks;

    float acc[RT][NT][2] = {};
    Codes<BITS> codes[NT] = {};
    Scales<S> packed[NT] = {};
    uint4 staged[LOADS];
    float4 staged_scales;
    auto load_weights = [&](int sb) {
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            codes[nt].load(w.codes + (u64)(u32)sb * (128 * BITS) + (u64)w.codes_stride * nt, lane, true);
            packed[nt].load(w.scales + (u64)w.scales_stride * nt, sb, sp, true);
        }
    };
    auto load_activations = [&](int sb) {
#pragma unroll
        for (int i = 0; i < LOADS; ++i) staged[i] = q[(u64)(q_index[i] + sb) * (TILE_BYTES / 16)];
        if (thread < SCALE_CHUNKS) staged_scales = d[(d_index + sb) * (TILE_SCALES / 4)];
    };
    auto store_activations = [&](u8* buffer) {
#pragma unroll
        for (int i = 0; i < LOADS; ++i) *(uint4*)(buffer + q_target + i * (THREADS / 64) * STRIDE) = staged[i];
        if (thread < SCALE_CHUNKS) *(float4*)(buffer + d_target) = staged_scales;
    };
    if (begin < end) {
        load_activations(begin);
        load_weights(begin);
        store_activations(shared);
    }
    __syncthreads();
    for (int sb = begin; sb < end; ++sb) {
        const u8* buffer = shared + (sb - begin) % 2 * BUFFER;
        const bool more = sb + 1 < end;
        u32 b[NT][4][2];
        float2 scale[NT][PAIRS<S>];
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            codes[nt].unpack(b[nt]);
            packed[nt].unpack(scale[nt]);
        }
        if (more) {
            load_weights(sb + 1);
            load_activations(sb + 1);
        }
#pragma unroll
        for (int r = 0; r < RT; ++r) {
            const u8* tile_data = buffer + r * STRIDE;
            const uint4 a[2] = {*(const uint4*)(tile_data + lane * 16), *(const uint4*)(tile_data + SECOND + lane * 16)};
            const float4 d = *(const float4*)(tile_data + SCALES + lane / 4 * 16);
#pragma unroll
            for (int nt = 0; nt < NT; ++nt) accumulate<S>(acc[r][nt], a, d, b[nt], scale[nt]);
        }
        if (more) store_activations(shared + (sb + 1 - begin) % 2 * BUFFER);
        __syncthreads();
    }

    // The run once more, from a block index the compiler cannot know: kept, it would cost the main loop registers.
    u32 group;
    asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(group));
    const Run tiles = run_of<NT, WARPS>(jobs, group, warp);
    u32 row_index[RT];
#pragma unroll
    for (int r = 0; r < RT; ++r) row_index[r] = min(row_tile + r, last_row_tile) * jobs.superblocks;
    subtract_zeros<BITS, RT, NT>(acc, weight_tiles<BITS, NT>(jobs, tiles, lane), x.dsum + lane / 4 * 4, row_index, begin,
                                 end, sp);
    const int output = blockIdx.y * gridDim.x + blockIdx.x, splits = gridDim.z;
    if (splits > 1) {
        constexpr int SIZE = RT * NT * 2 * THREADS;
        float* sums = scratch + (u64)output * splits * SIZE + thread;
#pragma unroll
        for (int i = 0; i < RT * NT * 2; ++i)
            sums[blockIdx.z * SIZE + i * THREADS] = acc[i / (NT * 2)][i / 2 % NT][i % 2];
        if (!last_split(tickets, output, splits, thread)) return;
#pragma unroll
        for (int i = 0; i < RT * NT * 2; ++i) acc[i / (NT * 2)][i / 2 % NT][i % 2] = 0.0f;
#pragma unroll 1
        for (int s = 0; s < splits; ++s) {
#pragma unroll
            for (int i = 0; i < RT * NT * 2; ++i)
                acc[i / (NT * 2)][i / 2 % NT][i % 2] += __ldcg(sums + s * SIZE + i * THREADS);
        }
    }
    // Each warp turns its row tiles through shared memory, so that rows leave whole.
    float* turn = (float*)shared + warp * 8 * PITCH;
#pragma unroll
    for (int r = 0; r < RT; ++r) {
        __syncwarp();
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
            *(float2*)(turn + lane / 4 * PITCH + nt * TILE_COLUMNS + lane % 4 * 2) =
                make_float2(acc[r][nt][0], acc[r][nt][1]);
        __syncwarp();
#pragma unroll 1
        for (int e = lane; e < 8 * COLUMNS; e += WARP) {
            const int row = (row_tile + r) * 8 + e / COLUMNS, column = e % COLUMNS;
            if (row < jobs.rows)
                emit(jobs.job[tiles.job], tiles, row, tiles.tile * TILE_COLUMNS + column,
                     turn[e / COLUMNS * PITCH + column], CODE_STEP<BITS>, guard);
        }
    }
}

}  // namespace

// q, d, dsum: see Activations; dsum may be null if all jobs are symmetric. scratch: (sums of the warps or splits that
// share an output) f32. tickets: (outputs so shared) u32, 0 before the first launch, and left so. guard may be null.
#define KERNEL(NAME, KIND, BLOCKS, ...)                                                                                 \
    extern "C" __global__ void __launch_bounds__(WARPS* WARP, BLOCKS)                                                   \
        NAME(const __grid_constant__ LinearJobs jobs, const s8* q, const float* d, const float* dsum, float* scratch,   \
             u32* tickets, u64* guard) {                                                                                \
        KIND<__VA_ARGS__>(jobs, {q, d, dsum}, scratch, tickets, guard);                                                 \
    }

// The number is the rows a block takes. WIDE, NARROW: tiles of a warp; at 8 bits a lane holds twice the bytes of a tile,
// and with fine scales four times the scales.
#define KERNELS(BITS, WIDE, NARROW)                                                  \
    KERNEL(linear_a8_mma_w##BITS##_rows8, skinny, 4, BITS, PLAIN, 1, WIDE)           \
    KERNEL(linear_a8_mma_w##BITS##_rows8_fine, skinny, 4, BITS, FINE, 1, NARROW)     \
    KERNEL(linear_a8_mma_w##BITS##_rows16, skinny, 3, BITS, PLAIN, 2, WIDE)          \
    KERNEL(linear_a8_mma_w##BITS##_rows16_fine, skinny, 3, BITS, FINE, 2, NARROW)    \
    KERNEL(linear_a8_mma_w##BITS##_rows32, tiled, 2, BITS, PLAIN, 4, 4)              \
    KERNEL(linear_a8_mma_w##BITS##_rows32_fine, tiled, 2, BITS, FINE, 4, 2)          \
    KERNEL(linear_a8_mma_w##BITS##_rows64, tiled, 2, BITS, PLAIN, 8, WIDE)           \
    KERNEL(linear_a8_mma_w##BITS##_rows64_fine, tiled, 2, BITS, FINE, 8, 2)

KERNELS(2, 4, 2)
KERNELS(3, 4, 2)
KERNELS(4, 4, 2)
KERNELS(8, 2, 1)
#endif
