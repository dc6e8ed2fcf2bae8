// Encode a few rows (token generation), where latency counts: a group of 128 threads takes one head of one side, a strip of 32 of its
// elements (whole subspaces, whole bytes of codes) and up to 8 rows. A kernel of its own does it (pq-encode.cu), or groups inside the
// attention kernel of the same step (pq-encode-group.cuh).
//
// Codes are bit-identical with the CPU's: x is rounded to f16, each element of y is one chain of fused multiply-adds over
// k = 0, 1, ..., a distance is a sum of squares from the left without fusing, and the lowest index wins a tie.
#pragma once

#include "../pq/pq-params.h"
#include "pq-launch.cuh"
#include "pq-mma.cuh"

#include <cuda_fp16.h>

#include <stdint.h>

namespace {

constexpr int PQ_ENCODE_STRIP       = 32;  // elements: 64 bytes of a row of T, two full sectors
constexpr int PQ_ENCODE_FEW_THREADS = 128; // of a group

struct pq_encode_side {
    pq_encode_params   p;
    pq_codebook_layout layout;
    size_t             head_bytes; // of codes
};

struct pq_encode_sides {
    pq_encode_side side[2]; // K and V, or only the first
};

inline pq_encode_sides pq_make_encode_sides(const pq_encode_params * params, int n_sides) {
    pq_encode_sides sides = {};
    for (int i = 0; i < n_sides; i++) {
        sides.side[i].p          = params[i];
        sides.side[i].layout     = pq_get_codebook_layout(params[i].type, params[i].D, params[i].has_transform);
        sides.side[i].head_bytes = pq_head_bytes(params[i].type, params[i].D);
    }
    return sides;
}

template <int TYPE> struct pq_encode_geom;
template <> struct pq_encode_geom<PQ_TYPE_PQ4> { enum { DSUB = 2, KSUB = 256, NBITS = 8 }; };
template <> struct pq_encode_geom<PQ_TYPE_PQ3> { enum { DSUB = 2, KSUB = 64,  NBITS = 6 }; };
template <> struct pq_encode_geom<PQ_TYPE_PQ2> { enum { DSUB = 4, KSUB = 256, NBITS = 8 }; };

struct pq_encode_head {
    const float  * mu;
    const __half * T; // NULL: identity
    const __half * centroids;
};

__device__ __forceinline__ pq_encode_head pq_encode_get_head(const pq_encode_side & side, int head) {
    const uint8_t * block = side.p.codebook + (size_t) head * side.layout.head_bytes;
    pq_encode_head h;
    h.mu        = (const float *) (block + side.layout.mu);
    h.T         = side.p.has_transform ? (const __half *) (block + side.layout.T) : nullptr;
    h.centroids = (const __half *) (block + side.layout.centroids);
    return h;
}

__device__ __forceinline__ const uint8_t * pq_encode_row(const pq_encode_params & p, int64_t row, int head) {
    return (const uint8_t *) p.x + row * p.x_row_stride + head * p.x_head_stride;
}

// element i of the row of `head`, as an f16 cache would hold it
__device__ __forceinline__ __half pq_encode_load_x(const pq_encode_params & p, int64_t row, int head, int i) {
    const uint8_t * x = pq_encode_row(p, row, head);
    return p.x_f16 ? ((const __half *) x)[i] : __float2half_rn(((const float *) x)[i]);
}

template <int DSUB>
__device__ __forceinline__ float pq_encode_distance(const float (&y)[DSUB], const float (&c)[DSUB]) {
    float d = __fsub_rn(y[0], c[0]);
    d = __fmul_rn(d, d);
#pragma unroll
    for (int e = 1; e < DSUB; e++) {
        const float d_e = __fsub_rn(y[e], c[e]);
        d = __fadd_rn(d, __fmul_rn(d_e, d_e));
    }
    return d;
}

// Byte b of the codes of a strip. codes: u8 [NSUB] in shared memory
template <int TYPE>
__device__ __forceinline__ uint8_t pq_encode_pack(const uint8_t * codes, int b) {
    if (pq_encode_geom<TYPE>::NBITS == 8) {
        return codes[b];
    }
    const uint8_t * q = codes + b / 3 * 4; // four codes in three bytes
    const uint32_t  w = (uint32_t) q[0] | (uint32_t) q[1] << 6 | (uint32_t) q[2] << 12 | (uint32_t) q[3] << 18;
    return (uint8_t) (w >> (8 * (b % 3)));
}

// Where it goes.
template <int TYPE>
__device__ __forceinline__ uint8_t * pq_encode_code_byte(const pq_encode_side & side, int64_t cell, int head, int col0, int b) {
    typedef pq_encode_geom<TYPE> G;
    return side.p.codes + cell * side.p.codes_row_stride + head * side.head_bytes + col0 / G::DSUB * G::NBITS / 8 + b;
}

__device__ __forceinline__ void pq_encode_store_tail(const pq_encode_params & p, int head, int i, int64_t row, __half x) {
    const int64_t slot = p.tail_idx[row];
    if (slot >= 0) {
        ((__half *) (p.tail + slot * p.tail_row_stride))[(int64_t) head * p.D + i] = x;
    }
}

// ---- a strip: what both kernels for a few rows do ----

constexpr int PQ_ENCODE_FEW_ROWS = 8; // rows of a group

template <int TYPE> struct pq_encode_few_geom : pq_encode_geom<TYPE> {
    typedef pq_encode_geom<TYPE> G;
    enum {
        NSUB  = PQ_ENCODE_STRIP / G::DSUB,
        LANES = PQ_ENCODE_FEW_THREADS / NSUB, // threads that share a subspace: 8 or 16, never across a warp
        PER   = 8 / G::DSUB,                  // centroids of a 16-byte load
        LOADS = G::KSUB / LANES / PER,
    };
};

// A thread's share of the centroids of its subspace.
template <int TYPE>
__device__ __forceinline__ void pq_encode_load_centroids(uint4 (&centroids)[pq_encode_few_geom<TYPE>::LOADS], const pq_encode_head & h, int col0, int n_cols,
                                                         int tid) {
    typedef pq_encode_few_geom<TYPE> G;
    const int sub = tid / G::LANES, lane = tid % G::LANES;
    if (sub * G::DSUB < n_cols) {
        const uint4 * from = (const uint4 *) (h.centroids + (size_t) (col0 / G::DSUB + sub) * G::KSUB * G::DSUB) + lane;
#pragma unroll
        for (int i = 0; i < G::LOADS; i++) {
            centroids[i] = __ldg(from + i * G::LANES);
        }
    }
}

// Element j of the strip: one chain of multiply-adds. x: the row without its mean, at 16 bytes
template <int UNROLL>
__device__ __forceinline__ float pq_encode_map(const float * x, const __half (*T)[PQ_ENCODE_STRIP], int j, int D) {
    float y = 0.0f;
#pragma unroll UNROLL
    for (int k = 0; k < D; k += 8) {
        const float4 a = *(const float4 *) (x + k), b = *(const float4 *) (x + k + 4);
        const float x8[8] = { a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w };
#pragma unroll
        for (int e = 0; e < 8; e++) {
            y = __fmaf_rn(x8[e], __half2float(T[k + e][j]), y);
        }
    }
    return y;
}

// The nearest centroid of the thread's subspace to elements y of a row, in all of its LANES threads. get(i): load i of the thread's share
template <int TYPE, int UNROLL, class GET>
__device__ __forceinline__ int pq_encode_search(const float * y, GET get, int tid) {
    typedef pq_encode_few_geom<TYPE> G;
    const int lane = tid % G::LANES;
    float y_sub[G::DSUB];
#pragma unroll
    for (int e = 0; e < G::DSUB; e++) {
        y_sub[e] = y[e];
    }
    float best  = INFINITY;
    int   index = 0;
#pragma unroll UNROLL
    for (int i = 0; i < G::LOADS; i++) {
        const uint4    load = get(i);
        const __half * c8   = (const __half *) &load;
#pragma unroll
        for (int j = 0; j < G::PER; j++) {
            float c[G::DSUB];
#pragma unroll
            for (int e = 0; e < G::DSUB; e++) {
                c[e] = __half2float(c8[j * G::DSUB + e]);
            }
            const float d = pq_encode_distance<G::DSUB>(y_sub, c);
            if (d < best) {
                best  = d;
                index = (i * G::LANES + lane) * G::PER + j;
            }
        }
    }
    const unsigned mask = ((1u << G::LANES) - 1) << (tid & (32 - G::LANES));
#pragma unroll
    for (int o = G::LANES / 2; o > 0; o /= 2) {
        const float other_best  = __shfl_xor_sync(mask, best,  o, G::LANES);
        const int   other_index = __shfl_xor_sync(mask, index, o, G::LANES);
        if (other_best < best || (other_best == best && other_index < index)) {
            best  = other_best;
            index = other_index;
        }
    }
    return index;
}

// ---- a kernel of its own: one block, one strip ----

struct alignas(16) pq_encode_few_smem {
    float   x[PQ_ENCODE_FEW_ROWS][PQ_MAX_D];
    float   y[PQ_ENCODE_FEW_ROWS][PQ_ENCODE_STRIP];
    __half  T[PQ_MAX_D][PQ_ENCODE_STRIP];
    uint8_t codes[PQ_ENCODE_FEW_ROWS][PQ_ENCODE_STRIP / 2];
    int64_t cell[PQ_ENCODE_FEW_ROWS]; // of the cache, that the codes of a row go to
};

template <int TYPE>
__device__ void pq_encode_few(const pq_encode_side & side, int head, int col0, int64_t row0, pq_encode_few_smem & s) {
    typedef pq_encode_few_geom<TYPE> G;
    const pq_encode_params & p = side.p;
    const int tid    = threadIdx.x;
    const int D      = p.D;
    const int n_cols = min(PQ_ENCODE_STRIP, D - col0);
    const int n_rows = (int) min((int64_t) PQ_ENCODE_FEW_ROWS, p.n_rows - row0);
    const int sub    = tid / G::LANES;
    const pq_encode_head h = pq_encode_get_head(side, head);

    // the codebook does not depend on earlier kernels: its way through the memory overlaps with their end
    uint4 centroids[G::LOADS];
    pq_encode_load_centroids<TYPE>(centroids, h, col0, n_cols, tid);
    if (h.T) {
        for (int i = tid; i < D * (PQ_ENCODE_STRIP / 8); i += PQ_ENCODE_FEW_THREADS) {
            const int k = i / (PQ_ENCODE_STRIP / 8);
            const int j = i % (PQ_ENCODE_STRIP / 8) * 8;
            if (j < n_cols) {
                pq_cp_async(&s.T[k][j], h.T + (size_t) k * D + col0 + j);
            }
        }
    }
    pq_pdl_wait();
    pq_pdl_launch_next();

    if (tid < n_rows) { // asked for now, needed at the end
        s.cell[tid] = p.row_idx ? p.row_idx[row0 + tid] : row0 + tid;
    }
    for (int i = tid; i < n_rows * D; i += PQ_ENCODE_FEW_THREADS) {
        const int    r = i / D;
        const int    k = i - r * D;
        const __half x = pq_encode_load_x(p, row0 + r, head, k);
        s.x[r][k] = __fsub_rn(__half2float(x), __ldg(h.mu + k));
        if (p.tail && k >= col0 && k < col0 + n_cols) {
            pq_encode_store_tail(p, head, k, row0 + r, x);
        }
    }
    pq_cp_async_wait();
    __syncthreads();

    for (int i = tid; i < n_rows * PQ_ENCODE_STRIP; i += PQ_ENCODE_FEW_THREADS) {
        const int r = i / PQ_ENCODE_STRIP;
        const int j = i % PQ_ENCODE_STRIP;
        if (j < n_cols) {
            s.y[r][j] = h.T ? pq_encode_map<1>(s.x[r], s.T, j, D) : s.x[r][col0 + j];
        }
    }
    __syncthreads();

    for (int r = 0; r < n_rows && sub * G::DSUB < n_cols; r++) {
        const int index = pq_encode_search<TYPE, G::LOADS>(s.y[r] + sub * G::DSUB, [&](int i) { return centroids[i]; }, tid);
        if (tid % G::LANES == 0) {
            (&s.codes[0][0])[r * G::NSUB + sub] = (uint8_t) index;
        }
    }
    __syncthreads();

    const int n_bytes = n_cols / G::DSUB * G::NBITS / 8;
    for (int i = tid; i < n_rows * n_bytes; i += PQ_ENCODE_FEW_THREADS) {
        const int r = i / n_bytes, b = i % n_bytes;
        *pq_encode_code_byte<TYPE>(side, s.cell[r], head, col0, b) = pq_encode_pack<TYPE>(&s.codes[0][0] + r * G::NSUB, b);
    }
}

} // namespace
