// Encode a few rows (token generation), where latency counts: a group of 128 threads takes one head of one side, a strip of 32 of its
// elements (whole subspaces, whole bytes of codes) and up to 8 rows. A kernel of its own does it (pq-encode.cu), or groups inside the
// attention kernel of the same step (pq-attn-128-kernel.cuh).
//
// Codes are bit-identical with the CPU's: x is rounded to f16, each element of y is one chain of fused multiply-adds over
// k = 0, 1, ..., a distance is a sum of squares from the left without fusing, and the lowest index wins a tie.
#pragma once

#include "../pq/pq-params.h"
#include "pq-launch.cuh"
#include "pq-mma.cuh"
#include "pq-rope.cuh"

#include <cuda_fp16.h>

#include <stdint.h>

namespace {

constexpr int PQ_ENCODE_STRIP       = 32;  // elements: 64 bytes of a row of T, two full sectors
constexpr int PQ_ENCODE_FEW_THREADS = 128; // of a group

// A block is one group, or (GROUPS, inside the attention kernel, which writes the tail itself) some, each at work of its own.
template <bool GROUPS>
__device__ __forceinline__ int pq_encode_thread() {
    return GROUPS ? threadIdx.x % PQ_ENCODE_FEW_THREADS : threadIdx.x;
}

template <bool GROUPS>
__device__ __forceinline__ void pq_encode_sync() {
    if (!GROUPS) {
        __syncthreads();
    } else { // barrier 0 is that of __syncthreads
        asm volatile("bar.sync %0, %1;" : : "r"(1 + threadIdx.x / PQ_ENCODE_FEW_THREADS), "n"(PQ_ENCODE_FEW_THREADS) : "memory");
    }
}

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
    return (const uint8_t *) p.x + (p.x_idx ? p.x_idx[row] : row) * p.x_row_stride + head * p.x_head_stride;
}

// element i of the row of `head`, as an f16 cache would hold it
__device__ __forceinline__ __half pq_encode_load_x(const pq_encode_params & p, int64_t row, int head, int i) {
    const uint8_t * x = pq_encode_row(p, row, head);
    return p.x_f16 ? ((const __half *) x)[i] : __float2half_rn(((const float *) x)[i]);
}

// The same of a row of floats that is still to be turned to its position.
__device__ __forceinline__ __half pq_encode_load_turned(const pq_encode_params & p, const pq_cuda_rope & rope, int64_t row, int head, int i) {
    const float * x = (const float *) pq_encode_row(p, row, head);
    const int half_D = p.D / 2;
    const bool is_high = rope.neox ? i >= half_D : i % 2;
    const int  low     = is_high ? i - (rope.neox ? half_D : 1) : i, high = low + (rope.neox ? half_D : 1);
    const float2 turn  = pq_rope_turn(rope, rope.pos[row], rope.neox ? low : low / 2);
    return __float2half_rn(is_high ? pq_rope_high(turn, x[low], x[high]) : pq_rope_low(turn, x[low], x[high]));
}

// Brings to L2 what COLS elements of a head will need of the codebook.
template <int TYPE, int COLS>
__device__ __forceinline__ void pq_encode_prefetch(const pq_encode_side & side, int head, int col0, int tid, int n_threads) {
    typedef pq_encode_geom<TYPE> G;
    constexpr int SECTOR = 32, ROW = COLS * 2 / SECTOR; // bytes, sectors
    const pq_encode_head h = pq_encode_get_head(side, head);
    const int n_T = h.T ? side.p.D * ROW : 0, n_C = COLS * G::KSUB * 2 / SECTOR;
#pragma unroll 1
    for (int i = tid; i < n_T + n_C; i += n_threads) {
        const uint8_t * at = i < n_T ? (const uint8_t *) (h.T + (size_t) (i / ROW) * side.p.D + col0) + i % ROW * SECTOR
                                     : (const uint8_t *) (h.centroids + (size_t) col0 * G::KSUB) + (i - n_T) * SECTOR;
        pq_prefetch_l2(at);
    }
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

// Writes the codes of a strip, codes: u8 [n_rows][NSUB] in shared memory, as bytes of the cache.
template <int TYPE, bool GROUPS>
__device__ __forceinline__ void pq_encode_store(const pq_encode_side & side, int head, int col0, int n_cols, const int64_t * cells, int n_rows,
                                                const uint8_t * codes) {
    typedef pq_encode_geom<TYPE> G;
    constexpr int NSUB = PQ_ENCODE_STRIP / G::DSUB;
    const pq_encode_params & p = side.p;
    const int n_bytes = n_cols / G::DSUB * G::NBITS / 8;
#pragma unroll 1
    for (int i = pq_encode_thread<GROUPS>(); i < n_rows * n_bytes; i += PQ_ENCODE_FEW_THREADS) {
        const int r = i / n_bytes;
        const int b = i % n_bytes;
        const uint8_t * c = codes + r * NSUB;
        uint8_t byte;
        if (G::NBITS == 8) {
            byte = c[b];
        } else { // four codes in three bytes
            const uint8_t * q = c + b / 3 * 4;
            const uint32_t  w = (uint32_t) q[0] | (uint32_t) q[1] << 6 | (uint32_t) q[2] << 12 | (uint32_t) q[3] << 18;
            byte = (uint8_t) (w >> (8 * (b % 3)));
        }
        p.codes[cells[r] * p.codes_row_stride + head * side.head_bytes + col0 / G::DSUB * G::NBITS / 8 + b] = byte;
    }
}

__device__ __forceinline__ void pq_encode_store_tail(const pq_encode_params & p, int head, int i, int64_t row, __half x) {
    const int64_t slot = p.tail_idx[row];
    if (slot >= 0) {
        ((__half *) (p.tail + slot * p.tail_row_stride))[(int64_t) head * p.D + i] = x;
    }
}

// ---- a few rows (token generation): latency counts ----

constexpr int PQ_ENCODE_FEW_ROWS = 8; // rows of a group

// COLS: elements of a group's work, a strip or several
template <int MAX_D, int COLS>
struct alignas(16) pq_encode_few_smem {
    float   x[PQ_ENCODE_FEW_ROWS][MAX_D];
    float   y[PQ_ENCODE_FEW_ROWS][COLS];
    __half  T[MAX_D][COLS];
    uint8_t codes[PQ_ENCODE_FEW_ROWS][PQ_ENCODE_STRIP / 2]; // of a strip
    int64_t cell[PQ_ENCODE_FEW_ROWS];                       // of the cache, that the codes of a row go to
    int     unit;                                          // what a group inside the attention kernel does next
};

// rope: NULL, or (GROUPS) what is still to be done to the rows. before(), after(): work beside this, on either side of the first barrier
template <int TYPE, bool GROUPS, int MAX_D, int COLS, class BEFORE, class AFTER>
__device__ void pq_encode_few(const pq_encode_side & side, const pq_cuda_rope * rope, int head, int col0, int64_t row0, pq_encode_few_smem<MAX_D, COLS> & s,
                              BEFORE before, AFTER after) {
    typedef pq_encode_geom<TYPE> G;
    static_assert(COLS % PQ_ENCODE_STRIP == 0, "whole strips");
    constexpr int NSUB  = PQ_ENCODE_STRIP / G::DSUB;
    constexpr int LANES = PQ_ENCODE_FEW_THREADS / NSUB; // threads that share a subspace: 8 or 16, never across a warp
    constexpr int PER   = 8 / G::DSUB;              // centroids of a 16-byte load
    constexpr int LOADS = G::KSUB / LANES / PER;

    const pq_encode_params & p = side.p;
    const int tid    = pq_encode_thread<GROUPS>();
    const int D      = p.D;
    const int n_cols = min(COLS, D - col0);
    const int n_rows = (int) min((int64_t) PQ_ENCODE_FEW_ROWS, p.n_rows - row0);
    const pq_encode_head h = pq_encode_get_head(side, head);

    // the codebook does not depend on earlier kernels: its way through the memory overlaps with their end
    const int sub  = tid / LANES;
    const int lane = tid % LANES;
    uint4 centroids[LOADS];
    auto load_centroids = [&](int strip) {
        const int m = (col0 + strip) / G::DSUB + sub;
        if (strip + sub * G::DSUB < n_cols) {
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                centroids[i] = __ldg((const uint4 *) (h.centroids + (size_t) m * G::KSUB * G::DSUB) + i * LANES + lane);
            }
        }
    };
    load_centroids(0);
    if (h.T) {
#pragma unroll 1
        for (int i = tid; i < D * (COLS / 8); i += PQ_ENCODE_FEW_THREADS) {
            const int k = i / (COLS / 8);
            const int j = i % (COLS / 8) * 8;
            if (j < n_cols) {
                pq_cp_async(&s.T[k][j], h.T + (size_t) k * D + col0 + j);
            }
        }
    }
    pq_pdl_wait();
    if (!GROUPS) { // the attention kernel has more to do
        pq_pdl_launch_next();
    }

    if (tid < n_rows) { // asked for now, needed at the end
        s.cell[tid] = p.row_idx ? p.row_idx[row0 + tid] : row0 + tid;
    }
#pragma unroll 2
    for (int i = tid; i < n_rows * D; i += PQ_ENCODE_FEW_THREADS) {
        const int    r = D == PQ_ENCODE_FEW_THREADS ? i / PQ_ENCODE_FEW_THREADS : i / D;
        const int    k = i - r * D;
        const __half x = GROUPS && rope ? pq_encode_load_turned(p, *rope, row0 + r, head, k) : pq_encode_load_x(p, row0 + r, head, k);
        s.x[r][k] = __fsub_rn(__half2float(x), __ldg(h.mu + k));
        if (!GROUPS && p.tail && k >= col0 && k < col0 + n_cols) {
            pq_encode_store_tail(p, head, k, row0 + r, x);
        }
    }
    pq_cp_async_wait();
    before();
    pq_encode_sync<GROUPS>();
    after();

#pragma unroll 1
    for (int i = tid; i < n_rows * COLS; i += PQ_ENCODE_FEW_THREADS) {
        const int r = i / COLS;
        const int j = i % COLS;
        if (j < n_cols) {
            float y = 0.0f;
            if (h.T) {
                for (int k = 0; k < D; k += 8) {
#pragma unroll
                    for (int e = 0; e < 8; e++) {
                        y = __fmaf_rn(s.x[r][k + e], __half2float(s.T[k + e][j]), y);
                    }
                }
            } else {
                y = s.x[r][col0 + j];
            }
            s.y[r][j] = y;
        }
    }
    pq_encode_sync<GROUPS>();

#pragma unroll 1
    for (int strip = 0; strip < n_cols; strip += PQ_ENCODE_STRIP) {
        if (strip > 0) {
            pq_encode_sync<GROUPS>(); // the codes before have been read
        }
#pragma unroll 1
        for (int r = 0; r < n_rows && strip + sub * G::DSUB < n_cols; r++) {
            float y[G::DSUB];
#pragma unroll
            for (int e = 0; e < G::DSUB; e++) {
                y[e] = s.y[r][strip + sub * G::DSUB + e];
            }
            float best  = INFINITY;
            int   index = 0;
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                const __half * c8 = (const __half *) &centroids[i];
#pragma unroll
                for (int j = 0; j < PER; j++) {
                    float c[G::DSUB];
#pragma unroll
                    for (int e = 0; e < G::DSUB; e++) {
                        c[e] = __half2float(c8[j * G::DSUB + e]);
                    }
                    const float d = pq_encode_distance<G::DSUB>(y, c);
                    if (d < best) {
                        best  = d;
                        index = (i * LANES + lane) * PER + j;
                    }
                }
            }
            const unsigned mask = ((1u << LANES) - 1) << (tid & (32 - LANES));
#pragma unroll
            for (int o = LANES / 2; o > 0; o /= 2) {
                const float other_best  = __shfl_xor_sync(mask, best,  o, LANES);
                const int   other_index = __shfl_xor_sync(mask, index, o, LANES);
                if (other_best < best || (other_best == best && other_index < index)) {
                    best  = other_best;
                    index = other_index;
                }
            }
            if (lane == 0) {
                (&s.codes[0][0])[r * NSUB + sub] = (uint8_t) index;
            }
        }
        if (COLS > PQ_ENCODE_STRIP) {
            load_centroids(strip + PQ_ENCODE_STRIP);
        }
        pq_encode_sync<GROUPS>();
        pq_encode_store<TYPE, GROUPS>(side, head, col0 + strip, min(PQ_ENCODE_STRIP, n_cols - strip), s.cell, n_rows, &s.codes[0][0]);
    }
}

} // namespace
