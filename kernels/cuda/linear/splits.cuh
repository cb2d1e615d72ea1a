// Blocks that share an output: each sums its part of K.
#pragma once
#include "common.cuh"

// Blocks that split K of one output count themselves in; true for all threads of the last one, which then adds the
// blocks' sums in the order of the splits, so that the result does not depend on who is last.
__device__ __forceinline__ bool last_split(u32* tickets, int output, int splits, int thread) {
    __shared__ u32 ticket;
    __threadfence();
    __syncthreads();
    if (thread == 0) {
        ticket = atomicAdd(&tickets[output], 1);
        if (ticket == splits - 1) tickets[output] = 0;  // ready for the next launch
    }
    __syncthreads();
    __threadfence();
    return ticket == splits - 1;
}
