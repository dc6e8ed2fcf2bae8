// Decode: codes -> rows x = y T^-1 + mu. Persistent blocks: each takes a head of a side and every n-th tile of its rows.
//
// A warp works alone on tiles of 32 rows. It looks up y, which is exact in f16, straight into the registers of the tensor-core
// product y T^-1: a register holds two neighbours of y, which is an entry of the table (half an entry of pq2's). Which elements of y
// meet in one step of the product is free as long as the rows of T^-1 follow: lane t of a row's four takes the t-th quarter of
// the row, so that its codes lie side by side. Table and T^-1 stay in shared memory; warps wait for each other only at the start.
//
// The columns of T^-1 are mixed, too: the four 8-column products of 32 columns are of every fourth pair of them, so that a
// thread ends with 8 neighbours of a row and stores 16 bytes at once.
//
// A row may also come from the exact tail, or be zero (row_source): then it is copied. A block without coded rows loads no codebook.
#pragma once

#include "pq-cuda.h"
#include "pq-launch.cuh"
#include "pq-mma.cuh"

#include <cuda_fp16.h>

#include <stdint.h>

namespace {

constexpr int PQ_DECODE_THREADS = 256;
constexpr int PQ_DECODE_WARPS   = PQ_DECODE_THREADS / 32;
constexpr int PQ_DECODE_ROWS    = 32; // of a warp's tile: two products of 16 rows share what is read of T^-1
constexpr int PQ_ROW_NONE       = -3; // beyond the last row

struct pq_decode_side {
    pq_cuda_decode_side s;
    pq_codebook_layout  layout;
};

struct pq_decode_args {
    pq_decode_side side[2];       // K and V, or only the first
    int32_t        n_cols;        // columns of a block, a multiple of 32
    int32_t        table_in_smem; // 0: centroids are read through the cache, where shared memory is too small
};

template <int TYPE> struct pq_decode_geom;
template <> struct pq_decode_geom<PQ_TYPE_PQ4> { enum { DSUB = 2, OWN = 4 }; };
template <> struct pq_decode_geom<PQ_TYPE_PQ3> { enum { DSUB = 2, OWN = 2 }; };
template <> struct pq_decode_geom<PQ_TYPE_PQ2> { enum { DSUB = 4, OWN = 2 }; };

// A unit is the codes of 8 elements: OWN bytes side by side, and for pq3 a shared one in the last third of the head.
// Unit j of the head whose codes are p. ALIGNED: those of pq3 lie at a multiple of 2 bytes, as all others do.
template <int TYPE, bool ALIGNED = false>
__device__ __forceinline__ uint32_t pq_decode_load_unit(const uint8_t * p, int j, int D) {
    if (TYPE == PQ_TYPE_PQ4) {
        return ((const uint32_t *) p)[j];
    }
    if (TYPE == PQ_TYPE_PQ2) {
        return ((const uint16_t *) p)[j];
    }
    const uint32_t own = ALIGNED ? ((const uint16_t *) p)[j] : (uint32_t) p[2 * j] | (uint32_t) p[2 * j + 1] << 8;
    return own | (uint32_t) p[D / 4 + j] << 16;
}

// 8 elements of y, from element 8 * j of the head on. table: f16 [M][PQ_KSUB][DSUB]
template <int TYPE, bool GLOBAL>
__device__ __forceinline__ uint4 pq_decode_lookup(const __half * table, uint32_t codes, int j) {
    typedef pq_decode_geom<TYPE> G;
    if constexpr (G::DSUB == 2) {
        const uint32_t * t = (const uint32_t *) table + j * 4 * PQ_KSUB;
        uint32_t v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int code = TYPE == PQ_TYPE_PQ3 && i == 3 ? 2 : i; // the last two share one
            const uint32_t * c = t + i * PQ_KSUB + ((codes >> (8 * code)) & 255);
            v[i] = GLOBAL ? __ldg(c) : *c;
        }
        return make_uint4(v[0], v[1], v[2], v[3]);
    } else {
        const uint2 * t = (const uint2 *) table + j * 2 * PQ_KSUB;
        const uint2 * a = t + (codes & 255);
        const uint2 * b = t + PQ_KSUB + ((codes >> 8) & 255);
        const uint2 va = GLOBAL ? __ldg(a) : *a;
        const uint2 vb = GLOBAL ? __ldg(b) : *b;
        return make_uint4(va.x, va.y, vb.x, vb.y);
    }
}

template <bool F16 /* known to be f16 */>
__device__ __forceinline__ void pq_decode_store(const pq_cuda_decode_side & s, int64_t row, int head, int col, const float (&x)[8]) {
    const size_t offset = row * s.p.x_row_stride + head * s.p.x_head_stride;
    if (F16 || s.x_f16) {
        union { __half2 h[4]; uint4 u; } v;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            v.h[i] = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
        }
        *(uint4 *) ((uint8_t *) s.x_f16 + offset + col * sizeof(__half)) = v.u;
    } else {
        float4 * dst = (float4 *) ((uint8_t *) s.p.x + offset + col * sizeof(float));
        dst[0] = make_float4(x[0], x[1], x[2], x[3]);
        dst[1] = make_float4(x[4], x[5], x[6], x[7]);
    }
}

__device__ __forceinline__ int pq_decode_row_source(const pq_cuda_decode_side & s, int64_t row) {
    return row >= s.p.n_rows ? PQ_ROW_NONE : s.row_source ? s.row_source[row] : PQ_ROW_CODES;
}

// 8 halves of a row that is not decoded
__device__ __forceinline__ uint4 pq_decode_load_tail(const pq_cuda_decode_side & s, int source, int head, int piece) {
    return source < 0 ? make_uint4(0, 0, 0, 0) :
        *((const uint4 *) (s.tail + source * s.tail_row_stride + head * s.tail_head_stride) + piece);
}

template <int THREADS = PQ_DECODE_THREADS>
__device__ __forceinline__ void pq_decode_start_table(int D, const __half * centroids, __half * table) {
    for (int i = threadIdx.x; i < D * PQ_KSUB / 8; i += THREADS) {
        pq_cp_async((uint4 *) table + i, (const uint4 *) centroids + i);
    }
}

// grid: (parts of the rows, heads of all sides). Dynamic shared memory: the table, f16 [M][PQ_KSUB][DSUB]
template <int TYPE>
__global__ void __launch_bounds__(PQ_DECODE_THREADS) pq_decode_plain_kernel(const __grid_constant__ pq_decode_args a) {
    extern __shared__ __align__(16) uint8_t pq_decode_smem[];
    __half * table = (__half *) pq_decode_smem;
    const int  n_head_0 = a.side[0].s.p.n_head_kv;
    const bool second   = (int) blockIdx.y >= n_head_0;
    const int  head     = blockIdx.y - (second ? n_head_0 : 0);
    const pq_cuda_decode_side & s      = a.side[second].s;
    const pq_codebook_layout  & layout = a.side[second].layout;
    const int n_units = s.p.D / 8;
    const uint8_t * block     = s.p.codebook + (size_t) head * layout.head_bytes;
    const __half  * centroids = (const __half *) (block + layout.centroids);
    const float   * mu        = (const float *) (block + layout.mu);
    const uint8_t * codes     = s.p.codes + head * s.codes_head_stride;

    if (a.table_in_smem) {
        pq_decode_start_table(s.p.D, centroids, table);
    }
    pq_pdl_wait();
    pq_pdl_launch_next();
    pq_cp_async_wait();
    __syncthreads();

    const int64_t n = s.p.n_rows * n_units;
    for (int64_t i = (int64_t) blockIdx.x * PQ_DECODE_THREADS + threadIdx.x; i < n; i += (int64_t) gridDim.x * PQ_DECODE_THREADS) {
        const int64_t row    = i / n_units;
        const int     j      = (int) (i % n_units);
        const int     source = pq_decode_row_source(s, row);
        if (source != PQ_ROW_CODES) {
            *((uint4 *) ((uint8_t *) s.x_f16 + row * s.p.x_row_stride + head * s.p.x_head_stride) + j) =
                pq_decode_load_tail(s, source, head, j);
            continue;
        }
        const uint32_t c = pq_decode_load_unit<TYPE>(codes + row * s.p.codes_row_stride, j, s.p.D);
        union { uint4 u; __half h[8]; } y;
        y.u = a.table_in_smem ? pq_decode_lookup<TYPE, false>(table, c, j) : pq_decode_lookup<TYPE, true>(centroids, c, j);
        float x[8];
#pragma unroll
        for (int e = 0; e < 8; e++) {
            x[e] = __half2float(y.h[e]) + __ldg(mu + j * 8 + e);
        }
        pq_decode_store<false>(s, row, head, j * 8, x);
    }
}

// What the codes of a lane's units are a multiple of, in bytes, where they are loaded together.
template <int TYPE, int U>
__host__ __device__ constexpr int pq_decode_codes_align() {
    return pq_decode_geom<TYPE>::OWN * U < 16 ? pq_decode_geom<TYPE>::OWN * U : 16;
}

// BYTES bytes that lie at a multiple of that, or of 16: 2, 4, 8, 16, ...
template <int BYTES, int N>
__device__ __forceinline__ void pq_decode_load_words(uint32_t (&w)[N], const uint8_t * p) {
    static_assert(N == (BYTES + 3) / 4, "words");
    if constexpr (BYTES == 2) {
        w[0] = *(const uint16_t *) p;
    } else if constexpr (BYTES == 4) {
        w[0] = *(const uint32_t *) p;
    } else if constexpr (BYTES == 8) {
        const uint2 v = *(const uint2 *) p;
        w[0] = v.x; w[1] = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < N / 4; i++) {
            const uint4 v = ((const uint4 *) p)[i];
            w[4 * i] = v.x; w[4 * i + 1] = v.y; w[4 * i + 2] = v.z; w[4 * i + 3] = v.w;
        }
    }
}

// Units of a lane, which lie side by side, from unit `first` of the head whose codes are p. `n`: those that the head has
template <int TYPE, int U, bool FULL>
__device__ __forceinline__ void pq_decode_load_codes(uint32_t (&c)[U], const uint8_t * p, int first, int n, int D) {
    constexpr int OWN = pq_decode_geom<TYPE>::OWN;
    if constexpr (FULL) {
        uint32_t own[U * OWN / 4], shared[(U + 3) / 4];
        pq_decode_load_words<U * OWN>(own, p + first * OWN);
        if constexpr (TYPE == PQ_TYPE_PQ3) {
            pq_decode_load_words<U>(shared, p + D / 4 + first);
        }
#pragma unroll
        for (int u = 0; u < U; u++) { // of pq2 the bytes above a unit's do not matter
            c[u] = TYPE == PQ_TYPE_PQ4 ? own[u] :
                   TYPE == PQ_TYPE_PQ2 ? own[u / 2] >> u % 2 * 16 :
                                         __byte_perm(own[u / 2], shared[u / 4], u % 2 * 0x22 | (4 + u % 4) << 8 | 0x10);
        }
    } else {
#pragma unroll
        for (int u = 0; u < U; u++) {
            c[u] = u < n ? pq_decode_load_unit<TYPE>(p, first + u, D) : 0;
        }
    }
}

// Element of y (row of T^-1) that the product has at place k; lane t of a row's four takes units t * U, ..., t * U + U - 1.
template <int U>
__device__ __forceinline__ int pq_decode_element(int k) {
    const int step = k / 16, t = k % 8 / 2;
    return 8 * (t * U + step / 2) + step % 2 * 4 + k % 16 / 8 * 2 + k % 2;
}

template <int U>
struct pq_decode_smem_layout {
    static constexpr int MAX_COLS = U == 2 ? 64 : 128;
    static constexpr int STRIDE   = MAX_COLS + 8; // halves; + 8: the 8 rows of a matrix load lie in different banks
    static constexpr int T_BYTES  = 32 * U * STRIDE * (int) sizeof(uint16_t);
    static constexpr int MU_BYTES = MAX_COLS * (int) sizeof(float);
    // T_inv: f16 [32 * U][STRIDE] | mu: f32 [MAX_COLS] | table: f16 [M][PQ_KSUB][DSUB]
};

// grid: (parts of the rows, heads of all sides, parts of the columns). Dynamic shared memory: pq_decode_smem_layout
template <int TYPE, int U /* units of 8 elements per lane; D <= 32 * U */, bool FULL /* D == 32 * U, f16 rows, codes aligned */>
__global__ void __launch_bounds__(PQ_DECODE_THREADS, U <= 4 ? 2 : 1) pq_decode_kernel(const __grid_constant__ pq_decode_args a) {
    typedef pq_decode_smem_layout<U> S;
    constexpr int KS     = 2 * U; // steps of 16 elements
    constexpr int STRIDE = S::STRIDE;

    extern __shared__ __align__(16) uint8_t pq_decode_smem[];
    __half * T_inv = (__half *) pq_decode_smem;
    float  * mu    = (float *) (pq_decode_smem + S::T_BYTES);
    __half * table = (__half *) (pq_decode_smem + S::T_BYTES + S::MU_BYTES);

    const int  tid      = threadIdx.x;
    const int  lane     = tid % 32;
    const int  g        = lane / 4, t = lane % 4;
    const int  n_head_0 = a.side[0].s.p.n_head_kv;
    const bool second   = (int) blockIdx.y >= n_head_0;
    const int  head     = blockIdx.y - (second ? n_head_0 : 0);
    const pq_cuda_decode_side & s      = a.side[second].s;
    const pq_codebook_layout  & layout = a.side[second].layout;
    const int  D        = FULL ? 32 * U : s.p.D;
    const int  col0     = blockIdx.z * a.n_cols;
    const int  n_mine   = FULL ? U : min(U, D / 8 - t * U); // units of this lane, may be negative
    const uint8_t * block     = s.p.codebook + (size_t) head * layout.head_bytes;
    const __half  * centroids = (const __half *) (block + layout.centroids);
    const uint8_t * codes     = s.p.codes + head * s.codes_head_stride;

    pq_pdl_wait();
    pq_pdl_launch_next();

    // neighbouring tiles go to different blocks, so that a few tiles make many blocks busy
    const int step   = gridDim.x * PQ_DECODE_WARPS * PQ_DECODE_ROWS;
    const int first  = (tid / 32 * gridDim.x + blockIdx.x) * PQ_DECODE_ROWS;
    const int n_rows = (int) s.p.n_rows;
    bool any = false;
    for (int row0 = first; row0 < n_rows && !any; row0 += step) {
        any = __any_sync(0xffffffff, pq_decode_row_source(s, row0 + lane) == PQ_ROW_CODES);
    }
    if (__syncthreads_or(any)) {
        if (a.table_in_smem) {
            pq_decode_start_table(D, centroids, table);
        }
        const __half * src = (const __half *) (block + layout.T_inv);
#pragma unroll 4
        for (int i = tid; i < 32 * U * (S::MAX_COLS / 8); i += PQ_DECODE_THREADS) {
            const int k   = i / (S::MAX_COLS / 8);
            const int col = i % (S::MAX_COLS / 8) * 8;
            const int e   = pq_decode_element<U>(k);
            union { uint4 u; uint32_t w[4]; } v;
            v.u = make_uint4(0, 0, 0, 0);
            if (e < D && col < a.n_cols && col0 + col < D) {
                v.u = __ldg((const uint4 *) (src + (size_t) e * D + col0 + col));
            }
            // columns 8q + 2i, 8q + 2i + 1 of 32 go to place 2q of product i
            uint32_t * dst = (uint32_t *) (T_inv + k * STRIDE + col / 32 * 32 + col % 32 / 4);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                dst[4 * j] = v.w[j];
            }
        }
        for (int i = tid; i < S::MAX_COLS; i += PQ_DECODE_THREADS) {
            mu[i] = i < a.n_cols && col0 + i < D ? __ldg((const float *) (block + layout.mu) + col0 + i) : 0.0f;
        }
        pq_cp_async_wait();
        __syncthreads();
    }

#pragma unroll 1
    for (int row0 = first; row0 < n_rows; row0 += step) {
        const int      source = pq_decode_row_source(s, row0 + lane);
        const unsigned coded  = __ballot_sync(0xffffffff, source == PQ_ROW_CODES);
        const unsigned other  = __ballot_sync(0xffffffff, source >= 0 || source == PQ_ROW_ZERO);

        if (other != 0 && col0 == 0) {
            const int n_pieces = D / 8; // of a row, 16 bytes each
            for (int i0 = 0; i0 < n_pieces; i0 += 4) {
                uint4 v[4];
                int   row[4], piece[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int i = (i0 + j) * 32 + lane;
                    row[j]   = min(i / n_pieces, PQ_DECODE_ROWS - 1);
                    piece[j] = i % n_pieces;
                    const int from = __shfl_sync(0xffffffff, source, row[j]);
                    if (i0 + j >= n_pieces || (other >> row[j] & 1) == 0) {
                        row[j] = -1;
                    } else {
                        v[j] = pq_decode_load_tail(s, from, head, piece[j]);
                    }
                }
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    if (row[j] >= 0) {
                        *((uint4 *) ((uint8_t *) s.x_f16 + (int64_t) (row0 + row[j]) * s.p.x_row_stride + head * s.p.x_head_stride) + piece[j]) = v[j];
                    }
                }
            }
        }
        if (coded == 0) {
            continue;
        }

        uint32_t y[2][KS][4]; // operands of rows 0-15 and 16-31
        {
            uint32_t c[4][U]; // of rows g, g + 8, g + 16, g + 24
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = g + 8 * i;
                const int64_t from = row0 + (coded >> row & 1 ? row : __ffs(coded) - 1); // any codes will do where none are needed
                pq_decode_load_codes<TYPE, U, FULL>(c[i], codes + from * s.p.codes_row_stride, t * U, n_mine, D);
            }
#pragma unroll
            for (int u = 0; u < U; u++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    uint4 v = make_uint4(0, 0, 0, 0);
                    if (FULL || u < n_mine) {
                        v = U <= 4 || a.table_in_smem ? pq_decode_lookup<TYPE, false>(table, c[i][u], t * U + u) :
                                                        pq_decode_lookup<TYPE, true>(centroids, c[i][u], t * U + u);
                    }
                    y[i / 2][2 * u][i % 2]         = v.x;
                    y[i / 2][2 * u][2 + i % 2]     = v.y;
                    y[i / 2][2 * u + 1][i % 2]     = v.z;
                    y[i / 2][2 * u + 1][2 + i % 2] = v.w;
                }
            }
        }

#pragma unroll 1
        for (int c0 = 0; c0 < a.n_cols; c0 += 32) {
            float acc[2][4][4] = {};
            const __half * b_row = T_inv + lane % 16 * STRIDE + c0 + lane / 16 * 8;
#pragma unroll
            for (int k = 0; k < KS; k++) {
                uint32_t b[2][4]; // rows 0-7 and 8-15 of products 0 and 1, then of 2 and 3
                pq_ldmatrix_trans(b[0], b_row + 16 * k * STRIDE);
                pq_ldmatrix_trans(b[1], b_row + 16 * k * STRIDE + 16);
#pragma unroll
                for (int m = 0; m < 2; m++) {
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        pq_mma_k16(acc[m][j], y[m][k], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1], acc[m][j]);
                    }
                }
            }
            const int    col = c0 + 8 * t; // this thread's 8 columns
            const float4 lo  = *(const float4 *) (mu + col), hi = *(const float4 *) (mu + col + 4);
            const float  m8[8] = { lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w };
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = g + 8 * i;
                if ((coded >> row & 1) && (FULL || col0 + col < D)) {
                    float x[8];
#pragma unroll
                    for (int j = 0; j < 8; j++) {
                        x[j] = acc[i / 2][j / 2][i % 2 * 2 + j % 2] + m8[j];
                    }
                    pq_decode_store<FULL>(s, row0 + row, head, col0 + col, x);
                }
            }
        }
    }
}

} // namespace
