// Four neighbours of a row at once, whatever the row's width.
#pragma once
#include "common.cuh"

template <typename T>
struct alignas(4 * sizeof(T)) Four {
    T x, y, z, w;
};

// Values `column`..`column + 3` of `row`, `fill` past its end. A row whose width is not a multiple
// of 4 need not start on a vector's boundary, so it is read one by one.
template <typename T>
__device__ __forceinline__ float4 load4(const T* row, int column, int width, float fill = 0.0f) {
    if (width % 4 == 0) {
        if (column >= width) return make_float4(fill, fill, fill, fill);
        const Four<T> four = *reinterpret_cast<const Four<T>*>(row + column);
        return make_float4(four.x, four.y, four.z, four.w);
    }
    auto at = [&](int i) { return i < width ? (float)row[i] : fill; };
    return make_float4(at(column), at(column + 1), at(column + 2), at(column + 3));
}

// The reverse; nothing is written past the row's end.
__device__ __forceinline__ void store4(float* row, int column, int width, float4 value) {
    if (width % 4 == 0) {
        if (column < width) *reinterpret_cast<float4*>(row + column) = value;
        return;
    }
    if (column < width) row[column] = value.x;
    if (column + 1 < width) row[column + 1] = value.y;
    if (column + 2 < width) row[column + 2] = value.z;
    if (column + 3 < width) row[column + 3] = value.w;
}

__device__ __forceinline__ void guard_finite4(u64* guard, u32 check, u32 element, float4 value) {
    // A finite value times 0 is 0, any other is NaN: one branch for the four.
    if (value.x * 0.0f + value.y * 0.0f + value.z * 0.0f + value.w * 0.0f == 0.0f) return;
    guard_finite(guard, check, element, value.x);
    guard_finite(guard, check, element + 1, value.y);
    guard_finite(guard, check, element + 2, value.z);
    guard_finite(guard, check, element + 3, value.w);
}
