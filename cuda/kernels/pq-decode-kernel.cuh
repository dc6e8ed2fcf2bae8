// Decode: codes -> rows x = y T^-1 + mu. A block takes one head and every n-th tile of 64 cells. The head's centroids lie in shared
// memory; a tile of y is looked up as f16, which is exact, and multiplied by T^-1, which stays in registers, on tensor cores.
//
// Each warp has 32 columns of the result. Its four 8-column products are of every fourth pair of them, so that a thread ends with
// 8 neighbours of a row and stores 16 bytes at once.
#pragma once

#include "../pq/pq-params.h"
#include "pq-launch.cuh"
#include "pq-mma.cuh"

#include <cuda_fp16.h>

#include <stdint.h>

namespace {

constexpr int PQ_DECODE_THREADS    = 256;
constexpr int PQ_DECODE_TILE_CELLS = 64;

struct pq_decode_args {
    pq_decode_params   p;
    pq_codebook_layout layout;
    size_t             head_bytes;    // of codes
    uint16_t         * x_f16;         // NULL: f32 to p.x
    int32_t            table_in_smem; // 0: centroids are read through the cache, where shared memory is too small
};

template <int TYPE> struct pq_decode_geom;
template <> struct pq_decode_geom<PQ_TYPE_PQ4> { enum { DSUB = 2, KSUB = 256, UNIT_BYTES = 4 }; };
template <> struct pq_decode_geom<PQ_TYPE_PQ3> { enum { DSUB = 2, KSUB = 64,  UNIT_BYTES = 3 }; };
template <> struct pq_decode_geom<PQ_TYPE_PQ2> { enum { DSUB = 4, KSUB = 256, UNIT_BYTES = 2 }; };

// A unit is the codes of 8 elements.
template <int TYPE>
__device__ __forceinline__ uint32_t pq_decode_load_unit(const uint8_t * p) {
    if (TYPE == PQ_TYPE_PQ4) {
        return *(const uint32_t *) p;
    }
    if (TYPE == PQ_TYPE_PQ3) {
        return (uint32_t) p[0] | (uint32_t) p[1] << 8 | (uint32_t) p[2] << 16;
    }
    return *(const uint16_t *) p;
}

// 8 elements of y, from element 8 * j of the head on. table: f16 [M][KSUB][DSUB]
template <int TYPE, bool GLOBAL>
__device__ __forceinline__ uint4 pq_decode_lookup(const __half * table, uint32_t codes, int j) {
    typedef pq_decode_geom<TYPE> G;
    if constexpr (G::DSUB == 2) {
        constexpr int NBITS = TYPE == PQ_TYPE_PQ3 ? 6 : 8;
        const uint32_t * t = (const uint32_t *) table + j * 4 * G::KSUB;
        uint32_t v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t * c = t + i * G::KSUB + ((codes >> (NBITS * i)) & (G::KSUB - 1));
            v[i] = GLOBAL ? __ldg(c) : *c;
        }
        return make_uint4(v[0], v[1], v[2], v[3]);
    } else {
        const uint2 * t = (const uint2 *) table + j * 2 * G::KSUB;
        const uint2 * a = t + (codes & 255);
        const uint2 * b = t + G::KSUB + ((codes >> 8) & 255);
        const uint2 va = GLOBAL ? __ldg(a) : *a;
        const uint2 vb = GLOBAL ? __ldg(b) : *b;
        return make_uint4(va.x, va.y, vb.x, vb.y);
    }
}

__device__ __forceinline__ void pq_decode_store(const pq_decode_args & a, int64_t row, int head, int col, const float (&x)[8]) {
    const size_t offset = row * a.p.x_row_stride + head * a.p.x_head_stride;
    if (a.x_f16) {
        union { __half2 h[4]; uint4 u; } v;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            v.h[i] = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
        }
        *(uint4 *) ((uint8_t *) a.x_f16 + offset + col * sizeof(__half)) = v.u;
    } else {
        float4 * dst = (float4 *) ((uint8_t *) a.p.x + offset + col * sizeof(float));
        dst[0] = make_float4(x[0], x[1], x[2], x[3]);
        dst[1] = make_float4(x[4], x[5], x[6], x[7]);
    }
}

__device__ __forceinline__ void pq_decode_load_mu(float (&mu)[8], const float * src) {
    const float4 lo = __ldg((const float4 *) src), hi = __ldg((const float4 *) src + 1);
    mu[0] = lo.x; mu[1] = lo.y; mu[2] = lo.z; mu[3] = lo.w;
    mu[4] = hi.x; mu[5] = hi.y; mu[6] = hi.z; mu[7] = hi.w;
}

template <int TYPE>
__device__ __forceinline__ void pq_decode_start_table(const pq_decode_args & a, const __half * centroids, __half * table) {
    if (a.table_in_smem) {
        for (int i = threadIdx.x; i < a.p.D * pq_decode_geom<TYPE>::KSUB / 8; i += PQ_DECODE_THREADS) {
            pq_cp_async((uint4 *) table + i, (const uint4 *) centroids + i);
        }
    }
}

// grid: (parts of the context, heads). Dynamic shared memory: the table, f16 [M][KSUB][DSUB]
template <int TYPE>
__global__ void __launch_bounds__(PQ_DECODE_THREADS) pq_decode_plain_kernel(const __grid_constant__ pq_decode_args a) {
    extern __shared__ __align__(16) uint8_t pq_decode_smem[];
    __half * table = (__half *) pq_decode_smem;
    const int head    = blockIdx.y;
    const int n_units = a.p.D / 8;
    const uint8_t * block     = a.p.codebook + (size_t) head * a.layout.head_bytes;
    const __half  * centroids = (const __half *) (block + a.layout.centroids);
    const float   * mu        = (const float *) (block + a.layout.mu);
    const uint8_t * codes     = a.p.codes + head * a.head_bytes;

    pq_decode_start_table<TYPE>(a, centroids, table);
    pq_pdl_wait();
    pq_pdl_launch_next();
    pq_cp_async_wait();
    __syncthreads();

    const int64_t n = a.p.n_rows * n_units;
    for (int64_t i = (int64_t) blockIdx.x * PQ_DECODE_THREADS + threadIdx.x; i < n; i += (int64_t) gridDim.x * PQ_DECODE_THREADS) {
        const int64_t row = i / n_units;
        const int     j   = (int) (i % n_units);
        const uint32_t c  = pq_decode_load_unit<TYPE>(codes + row * a.p.codes_row_stride + j * pq_decode_geom<TYPE>::UNIT_BYTES);
        union { uint4 u; __half h[8]; } y;
        y.u = a.table_in_smem ? pq_decode_lookup<TYPE, false>(table, c, j) : pq_decode_lookup<TYPE, true>(centroids, c, j);
        float x[8];
        pq_decode_load_mu(x, mu + j * 8);
#pragma unroll
        for (int e = 0; e < 8; e++) {
            x[e] += __half2float(y.h[e]);
        }
        pq_decode_store(a, row, head, j * 8, x);
    }
}

// grid: (parts of the context, heads). Dynamic shared memory: the tile, f16 [64][16 * KS + 8], and the table
template <int TYPE, int KS /* steps of 16 elements; D <= 16 * KS */>
__global__ void __launch_bounds__(PQ_DECODE_THREADS) pq_decode_kernel(const __grid_constant__ pq_decode_args a) {
    static_assert(KS == 4 || KS == 8 || KS == 16, "8 warps: KS / 2 of them side by side, 16 / KS below each other");
    typedef pq_decode_geom<TYPE> G;
    constexpr int STRIDE  = 16 * KS + 8; // halves; + 8: the 8 rows of a matrix load lie in different banks
    constexpr int N_WARPS = KS / 2;
    constexpr int M_TILES = KS / 4;      // tiles of 16 rows per warp
    constexpr int UNITS   = KS / 2;      // units per thread and tile: 64 cells * 2 * KS units / 256 threads

    extern __shared__ __align__(16) uint8_t pq_decode_smem[];
    __half * tile  = (__half *) pq_decode_smem;
    __half * table = tile + PQ_DECODE_TILE_CELLS * STRIDE;

    const int tid     = threadIdx.x;
    const int lane    = tid % 32;
    const int warp_n  = tid / 32 % N_WARPS;
    const int warp_m  = tid / 32 / N_WARPS;
    const int head    = blockIdx.y;
    const int D       = a.p.D;
    const int n_units = D / 8;
    const int n_k     = (D + 15) / 16;
    const uint8_t * block     = a.p.codebook + (size_t) head * a.layout.head_bytes;
    const __half  * centroids = (const __half *) (block + a.layout.centroids);
    const __half  * T_inv     = (const __half *) (block + a.layout.T_inv);
    const uint8_t * codes     = a.p.codes + head * a.head_bytes;

    pq_decode_start_table<TYPE>(a, centroids, table);

    // T^-1 to registers, 64 rows at a time through the tile. Columns 8q + 2i, 8q + 2i + 1 of a warp's 32 go to place 2q of product i.
    uint32_t b[KS][4][2];
#pragma unroll
    for (int k0 = 0; k0 < KS; k0 += 4) {
        for (int i = tid; i < PQ_DECODE_TILE_CELLS * 2 * KS; i += PQ_DECODE_THREADS) {
            const int row = i / (2 * KS);
            const int col = i % (2 * KS) * 8;
            union { uint4 u; uint32_t w[4]; } v;
            v.u = make_uint4(0, 0, 0, 0);
            if (16 * k0 + row < D && col < D) {
                v.u = __ldg((const uint4 *) (T_inv + (size_t) (16 * k0 + row) * D + col));
            }
            uint32_t * dst = (uint32_t *) (tile + row * STRIDE + col / 32 * 32 + col % 32 / 4);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                dst[4 * j] = v.w[j];
            }
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < 4; k++) {
#pragma unroll
            for (int j = 0; j < 4; j += 2) { // rows 0-7 and 8-15 of product j, then of j + 1
                uint32_t r[4];
                pq_ldmatrix_trans(r, tile + (16 * k + lane % 16) * STRIDE + 32 * warp_n + 8 * (j + lane / 16));
                b[k0 + k][j][0]     = r[0];
                b[k0 + k][j][1]     = r[1];
                b[k0 + k][j + 1][0] = r[2];
                b[k0 + k][j + 1][1] = r[3];
            }
        }
        __syncthreads();
    }
    // where D is an odd multiple of 8, the last step reads 8 elements past it
    if (tid < PQ_DECODE_TILE_CELLS && D % 16 != 0) {
        *(uint4 *) (tile + tid * STRIDE + D) = make_uint4(0, 0, 0, 0);
    }

    const int col = 32 * warp_n + 8 * (lane % 4); // this thread's 8 columns
    float mu[8] = {};
    if (col < D) {
        pq_decode_load_mu(mu, (const float *) (block + a.layout.mu) + col);
    }

    pq_pdl_wait();
    pq_pdl_launch_next();

    uint32_t c[UNITS]; // codes of the next tile, on their way while this one is multiplied
    const auto load_codes = [&](int64_t row0) {
#pragma unroll
        for (int i = 0; i < UNITS; i++) {
            const int u    = tid + i * PQ_DECODE_THREADS;
            const int cell = u / n_units;
            if (cell < PQ_DECODE_TILE_CELLS && row0 + cell < a.p.n_rows) {
                c[i] = pq_decode_load_unit<TYPE>(codes + (row0 + cell) * a.p.codes_row_stride + u % n_units * G::UNIT_BYTES);
            }
        }
    };
    const int64_t step = (int64_t) gridDim.x * PQ_DECODE_TILE_CELLS;
    int64_t       row0 = (int64_t) blockIdx.x * PQ_DECODE_TILE_CELLS;
#pragma unroll
    for (int i = 0; i < UNITS; i++) {
        c[i] = 0; // rows past the end decode code 0 and are not stored
    }
    load_codes(row0);
    pq_cp_async_wait();

    for (; row0 < a.p.n_rows; row0 += step) {
        __syncthreads(); // the tile is free, and at first the table is there
#pragma unroll
        for (int i = 0; i < UNITS; i++) {
            const int u    = tid + i * PQ_DECODE_THREADS;
            const int cell = u / n_units;
            const int j    = u % n_units;
            if (cell < PQ_DECODE_TILE_CELLS) {
                *(uint4 *) (tile + cell * STRIDE + 8 * j) =
                    a.table_in_smem ? pq_decode_lookup<TYPE, false>(table, c[i], j) : pq_decode_lookup<TYPE, true>(centroids, c[i], j);
            }
        }
        load_codes(row0 + step);
        __syncthreads();

#pragma unroll
        for (int t = 0; t < M_TILES; t++) {
            const int row = (warp_m * M_TILES + t) * 16;
            float acc[4][4] = {};
#pragma unroll
            for (int k = 0; k < KS; k++) {
                if (k < n_k) {
                    uint32_t y[4];
                    pq_ldmatrix(y, tile + (row + lane % 16) * STRIDE + 16 * k + lane / 16 * 8);
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        pq_mma_k16(acc[j], y, b[k][j][0], b[k][j][1], acc[j]);
                    }
                }
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int64_t cell = row0 + row + 8 * h + lane / 4;
                if (cell < a.p.n_rows && col < D) {
                    float x[8];
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        x[2 * j]     = acc[j][2 * h]     + mu[2 * j];
                        x[2 * j + 1] = acc[j][2 * h + 1] + mu[2 * j + 1];
                    }
                    pq_decode_store(a, cell, head, col, x);
                }
            }
        }
    }
}

} // namespace
