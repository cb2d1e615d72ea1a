// Linear for 1 to 8 activation rows on int8 activations: dp4a, fp32 scaling, bound by the weights' bytes.
// More rows work too (a row tile of 8 per blockIdx.x); each row tile reads the weights again, mostly from L2.
#include "linear/dp4a.cuh"

#if __CUDA_ARCH__ >= 610

// A warp walks the superblocks `split`, `split` + splits, ... of PANELS panels of TILES n-tiles. In each
// panel a lane owns TILES of the 4 units of one column, so that LANES lanes share a column. More tiles
// would pay the float scaling of an integer dot less often, more panels would load the activations from
// shared memory less often, but both take registers and spread a small matrix over fewer warps.
constexpr int PANELS = 2, TILES = 2, LANES = 4 / TILES;
constexpr int PANEL_COLUMNS = TILES * TILE_COLUMNS, COLUMNS = PANELS * PANEL_COLUMNS;

struct alignas(16) Units {
    int2 unit[TILES];  // 8 activations each
};

// What a warp shares of one superblock, arranged so that what a lane needs for a block is contiguous.
template <int ROWS>
struct alignas(16) Stage {
    static constexpr int ROW_BYTES = SUPERBLOCK_ROWS + 32;  // the pad spreads the rows over the banks
    u8 q[ROWS][ROW_BYTES];                                  // [row][t][unit] 8 bytes
    float d[4][ROWS];
    float scale[COLUMNS][4];
};

template <int BITS, int ROWS>
__device__ __forceinline__ void gemv(
    const u8* q,        // [row tiles][superblocks][32 lanes][4 blocks] 8 bytes s8
    const float* d,     // [row tiles][superblocks][8 rows][4 blocks]
    const float* dsum,  // like d; read only with zeros
    const LinearJobs& jobs, u64* guard) {
    extern __shared__ uint4 shared[];
    const u32 lane = threadIdx.x;
    const int split = threadIdx.y, splits = blockDim.y;
    const int warp = threadIdx.z * splits + split;
    const int superblocks = jobs.superblocks, per_superblock = jobs.scales_per_superblock;
    const int first_tile = (blockIdx.y * blockDim.z + threadIdx.z) * PANELS * TILES;
    // Tile of the panel, column of the tile, first unit of the lane.
    const u32 lane_tile = lane / (8 * LANES), column = lane / LANES % 8, unit = lane % LANES * TILES;
    const u32 lane_column = lane / LANES;  // of the panel

    // Opaque addresses: the compiler would derive them anew in every iteration.
    u32 stage_offset = warp * sizeof(Stage<ROWS>);
    asm("" : "+r"(stage_offset));
    Stage<ROWS>& stage = *(Stage<ROWS>*)((u8*)shared + stage_offset);
    // The lanes of a column share the scales of its blocks as they share its units.
    auto job_of_panel = [&](int panel, int& tile, size_t& first_scale) -> const LinearJob& {
        tile = min(first_tile + panel * TILES + (int)lane_tile, jobs.tiles - 1);
        const LinearJob& job = job_of_tile(jobs, tile);
        const u32 lane_scale = (unit * per_superblock >> 2) * TILE_COLUMNS + column;
        first_scale = (size_t)tile * superblocks * per_superblock * TILE_COLUMNS + lane_scale;
        return job;
    };
    const u8* codes[PANELS];
    const u16* scales[PANELS];
#pragma unroll
    for (int panel = 0; panel < PANELS; panel++) {
        int tile;
        size_t first_scale;
        const LinearJob& job = job_of_panel(panel, tile, first_scale);
        codes[panel] = job.codes + (size_t)tile * superblocks * Codes<BITS>::TILE_BYTES;
        scales[panel] = job.scales + first_scale;
        asm("" : "+l"(codes[panel]), "+l"(scales[panel]));
    }
    const bool has_zeros = jobs.job[0].zeros != nullptr;
    // Lane (row, j) copies unit j of its row and, as (row, t), the scale of block t; lanes beyond the
    // rows repeat others.
    const u32 copy_row = lane / 4 % ROWS, copy_unit = lane % 4;
    const size_t first_block = (size_t)blockIdx.x * superblocks * WARP;
    const uint4* lane_q = (const uint4*)q + (first_block + copy_row * 4 + copy_unit) * 2;
    const float* lane_d = d + first_block + copy_row * 4 + copy_unit;
    asm("" : "+l"(lane_q), "+l"(lane_d));

    Codes<BITS> next[PANELS][TILES];
    u32 next_scale[PANELS][TILES];
    uint4 next_q[2];
    float next_d;
    // Ahead of the arithmetic it costs a second set of registers. One row has little arithmetic to hide a
    // fetch behind, so more warps do it better; codes of 8 bits do not fit twice.
    constexpr bool FETCH_AHEAD = ROWS > 1 && BITS < 8;
    // Past the end it repeats `superblock`: a branch would let the compiler move the loads.
    auto fetch_after = [&](int superblock) {
        const u32 index = superblock + splits < superblocks ? superblock + splits : superblock;
#pragma unroll
        for (int panel = 0; panel < PANELS; panel++)
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                const u32 scale_block = index * per_superblock + (i * per_superblock >> 2);
                next[panel][i].load(codes[panel] + (size_t)index * Codes<BITS>::TILE_BYTES, column * 4 + unit + i);
                next_scale[panel][i] = __ldg(scales[panel] + scale_block * TILE_COLUMNS);
            }
        next_q[0] = __ldg(lane_q + index * (2 * WARP));
        next_q[1] = __ldg(lane_q + index * (2 * WARP) + 1);
        next_d = __ldg(lane_d + index * WARP);
    };

    float acc[PANELS][ROWS] = {};
    if (split < superblocks) fetch_after(split - splits);
    for (int superblock = split; superblock < superblocks; superblock += splits) {
        __syncwarp();
        u8* units = &stage.q[copy_row][copy_unit * 8];
        *(uint2*)(units + 0) = make_uint2(next_q[0].x, next_q[0].y);
        *(uint2*)(units + 32) = make_uint2(next_q[0].z, next_q[0].w);
        *(uint2*)(units + 64) = make_uint2(next_q[1].x, next_q[1].y);
        *(uint2*)(units + 96) = make_uint2(next_q[1].z, next_q[1].w);
        stage.d[copy_unit][copy_row] = short_scale(next_d);
        Codes<BITS> now[PANELS][TILES];
#pragma unroll
        for (int panel = 0; panel < PANELS; panel++)
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                now[panel][i] = next[panel][i];
                stage.scale[panel * PANEL_COLUMNS + lane_column][unit + i] =
                    f32_of_f16(next_scale[panel][i]) * Codes<BITS>::INVERSE;
            }
        if (FETCH_AHEAD) fetch_after(superblock);
        __syncwarp();

#pragma unroll
        for (int t = 0; t < 4; t++) {
            int lo[PANELS][TILES], hi[PANELS][TILES];
            float scale[PANELS];
#pragma unroll
            for (int panel = 0; panel < PANELS; panel++) {
                scale[panel] = stage.scale[panel * PANEL_COLUMNS + lane_column][t];
#pragma unroll
                for (int i = 0; i < TILES; i++) now[panel][i].unpack(t, lo[panel][i], hi[panel][i]);
            }
#pragma unroll
            for (int row = 0; row < ROWS; row++) {
                const Units x = *(const Units*)&stage.q[row][t * BLOCK_ROWS + unit * 8];
                const float scale_x = stage.d[t][row], minus_magic = -MAGIC * scale_x;
#pragma unroll
                for (int panel = 0; panel < PANELS; panel++) {
                    int dot = MAGIC_BITS;
#pragma unroll
                    for (int i = 0; i < TILES; i++) {
                        dot = __dp4a(lo[panel][i], x.unit[i].x, dot);
                        dot = __dp4a(hi[panel][i], x.unit[i].y, dot);
                    }
                    acc[panel][row] = fmaf(scaled_dot(dot, scale_x, minus_magic), scale[panel], acc[panel][row]);
                }
            }
        }
        // Each lane of a column subtracts the zero points of the blocks whose scales it fetched.
        if (has_zeros) {
#pragma unroll
            for (int panel = 0; panel < PANELS; panel++) {
                int tile;
                size_t first_scale;
                const s16* zeros = job_of_panel(panel, tile, first_scale).zeros + first_scale;
#pragma unroll
                for (int i = 0; i < TILES; i++) {
                    const u32 scale_block = superblock * per_superblock + (i * per_superblock >> 2);
                    const float zero = __ldg(zeros + scale_block * TILE_COLUMNS) * (-1.0f / Codes<BITS>::INVERSE);
                    const float product = stage.scale[panel * PANEL_COLUMNS + lane_column][unit + i] * zero;
                    const float* sums = dsum + first_block + superblock * WARP + unit + i;
#pragma unroll
                    for (int row = 0; row < ROWS; row++)
                        acc[panel][row] = fmaf(product, __ldg(sums + row * 4), acc[panel][row]);
                }
            }
        }
        if (!FETCH_AHEAD) fetch_after(superblock);
    }

    // Sum over the lanes of a column, then over the splits, always in the same order.
    float* sums = (float*)shared;  // [column group][split][ROWS][COLUMNS]
    __syncthreads();
#pragma unroll
    for (int panel = 0; panel < PANELS; panel++)
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
#pragma unroll
            for (int offset = LANES / 2; offset > 0; offset /= 2)
                acc[panel][row] += __shfl_xor_sync(FULL_MASK, acc[panel][row], offset);
            if (unit == 0) sums[(warp * ROWS + row) * COLUMNS + panel * PANEL_COLUMNS + lane_column] = acc[panel][row];
        }
    __syncthreads();
    const float* group_sums = sums + threadIdx.z * splits * ROWS * COLUMNS;
    for (u32 i = split * WARP + lane; i < ROWS * COLUMNS; i += splits * WARP) {
        const int row = blockIdx.x * 8 + i / COLUMNS;
        int tile = first_tile + i % COLUMNS / TILE_COLUMNS;
        if (row >= jobs.rows || tile >= jobs.tiles) continue;
        const LinearJob& job = job_of_tile(jobs, tile);
        const int out_column = tile * TILE_COLUMNS + i % TILE_COLUMNS;
        if (out_column >= job.n) continue;
        float value = job.bias != nullptr ? job.bias[out_column] : 0.0f;
        for (int s = 0; s < splits; s++) value += group_sums[s * ROWS * COLUMNS + i];
        const size_t element = (size_t)row * job.n + out_column;
        job.out[element] = value;
        guard_finite(guard, job.check, (u32)element, value);
    }
}

// Block (32, splits of K, column groups), at most 16 warps; grid (ceil(rows / 8), ceil(tiles / (4 * groups)));
// dynamic shared memory: warps * (ROWS * 176 + 512) bytes. ROWS is at least the rows, or 8.
#define GEMV(BITS, ROWS)                                                                                    \
    static_assert(sizeof(Stage<ROWS>) == ROWS * 176 + 512 && sizeof(Stage<ROWS>) >= ROWS * COLUMNS * 4);    \
    extern "C" __global__ void __launch_bounds__(512) linear_a8_dp4a_gemv_w##BITS##_m##ROWS(                \
        const s8* q, const float* d, const float* dsum, LinearJobs jobs, u64* guard) {                      \
        gemv<BITS, ROWS>((const u8*)q, d, dsum, jobs, guard);                                               \
    }
#define ROW_COUNTS(BITS) GEMV(BITS, 1) GEMV(BITS, 2) GEMV(BITS, 4) GEMV(BITS, 8)
ROW_COUNTS(2)
ROW_COUNTS(3)
ROW_COUNTS(4)
ROW_COUNTS(8)

#endif
