// Encode: a block takes one head of one side, a strip of 32 of its elements (whole codes) and some
// rows. Its strip of T and its centroids are read once and serve all its rows.
//
// Codes are bit-identical with the CPU's: x is rounded to f16, each element of y is one chain of fused multiply-adds over
// k = 0, 1, ..., a distance is a sum of squares from the left without fusing, and the lowest index wins a tie. So are anisotropic codes of a few
// rows; of many, those where rounding decides may be others.
#pragma once

#include "pq-cuda-common.cuh"
#include "pq-encode-few-kernel.cuh"
#include "pq-mma.cuh"

#include <type_traits>

namespace {

// ---- a few rows ----

// grid: (heads of all sides, strips, parts of the rows); max_rows: of a part, at most PQ_ENCODE_FEW_ROWS
__global__ void __launch_bounds__(PQ_ENCODE_FEW_THREADS) pq_encode_few_kernel(const __grid_constant__ pq_encode_sides sides, int max_rows) {
    __shared__ __align__(16) pq_encode_few_smem smem;
    const int    n_head_0 = sides.side[0].p.n_head_kv;
    const bool   second   = (int) blockIdx.x >= n_head_0;
    const int    head     = blockIdx.x - (second ? n_head_0 : 0);
    const pq_encode_side & side = sides.side[second];
    const int     col0 = blockIdx.y * PQ_ENCODE_STRIP;
    const int64_t row0 = (int64_t) blockIdx.z * max_rows;
    if (col0 >= side.p.D || row0 >= side.p.n_rows) {
        return; // the other side has more
    }
    switch (side.p.type) {
        case PQ_TYPE_PQ4: pq_encode_few<PQ_TYPE_PQ4>(side, head, col0, row0, max_rows, smem); break;
        case PQ_TYPE_PQ3: pq_encode_few<PQ_TYPE_PQ3>(side, head, col0, row0, max_rows, smem); break;
        case PQ_TYPE_PQ2: pq_encode_few<PQ_TYPE_PQ2>(side, head, col0, row0, max_rows, smem); break;
        default: break;
    }
}

// ---- many rows (prefill): throughput counts ----
//
// Both products run on tensor cores. y = x T - mu T: x and T are f16, so products are exact and only sums round. Half the squared
// distance to a centroid is one row of a product, too: |y|^2 / 2 - y.c + |c|^2 / 2, with y, |y|^2 / 2 and |c|^2 / 2 each split in two
// halves (22 bits). A lane keeps the smallest of each 8 centroids; the 8 that hold the smallest of all are then looked at one by
// one. That is not yet the CPU's code: its y is one chain of roundings, and distances round too. So the winner counts only
// when every other centroid is further away than these differences can make up for; the few elements where two are closer
// (about one in a thousand) are computed again, exactly as in pq_encode_few.

constexpr int PQ_ENCODE_THREADS = 256; // of a block

constexpr int PQ_ENCODE_SCALE_BITS = 5;   // centroids are scaled so that their largest element is in [2^5, 2^6)
constexpr float PQ_ENCODE_MAX_Y    = 256; // scaled; beyond it |y|^2 / 2 could leave the range of f16, and the code is computed exactly

constexpr int PQ_ENCODE_MAX_LIST = 64; // a tile has about four; more are outliers or NaN

template <int D_STEPS /* steps of 16 elements: D <= 16 * D_STEPS */>
struct pq_encode_tile_smem {
    static constexpr int ROWS   = D_STEPS <= 8 ? 128 : 64; // two blocks per multiprocessor
    static constexpr int STRIDE = 16 * D_STEPS + 8;        // + 8: the 8 rows of a matrix load lie in different banks

    union {
        __half x[ROWS][STRIDE];
        struct { // of the second search of anisotropic codes, when x has done its duty
            float   moved[ROWS][PQ_ENCODE_STRIP + 1];     // y
            uint8_t rows[PQ_ENCODE_THREADS / 32][ROWS];   // those that a warp looks at
        };
    };
    __half   T[16 * D_STEPS][PQ_ENCODE_STRIP + 8];
    float    y[ROWS][PQ_ENCODE_STRIP + 1];                // + 1: rows of a warp lie in different banks
    uint4    centroids[PQ_ENCODE_STRIP * PQ_KSUB / 8];     // f16 [subspaces of the strip][PQ_KSUB][DSUB]
    float    mu[16 * D_STEPS];
    float    aniso[PQ_ENCODE_STRIP];                      // 0 beyond the head
    float    cost[ROWS];                                  // of the first codes
    __half   gap[PQ_ENCODE_STRIP / 2][ROWS];              // of a code: how much further away the second nearest centroid is, or less; 0 is always right
    uint32_t first_codes[ROWS * PQ_ENCODE_STRIP / 2 / 4];
    float    mu_T[PQ_ENCODE_STRIP];
    float    error2_y[ROWS];                              // |x|^2, then the square of how far an element of y can be from the CPU's
    float    column_norm2[PQ_ENCODE_STRIP];               // of T
    float    column_norm, norm_mu;                        // largest |column of T| of the strip, |mu|
    uint32_t codes[ROWS * PQ_ENCODE_STRIP / 2 / 4];       // u8 [ROWS][N_CODES]
    int32_t  cell[ROWS];
    // codes that must be computed exactly, as row * N_CODES + code: a bit for each, and the first ones as a list, which warps share evenly
    uint32_t unsure[ROWS * PQ_ENCODE_STRIP / 2 / 32];
    int32_t  n_unsure;
    uint16_t unsure_list[PQ_ENCODE_MAX_LIST];
};

// Asks for what of a strip does not depend on x.
template <int D_STEPS>
__device__ __forceinline__ void pq_encode_tile_ask(const pq_encode_params & p, const pq_encode_head & h, int col0, int n_cols, pq_encode_tile_smem<D_STEPS> & s) {
    const int tid = threadIdx.x;
    const int D   = p.D;
    if (h.T) {
#pragma unroll 1
        for (int i = tid; i < 16 * D_STEPS * (PQ_ENCODE_STRIP / 8); i += PQ_ENCODE_THREADS) {
            const int k = i / (PQ_ENCODE_STRIP / 8);
            const int j = i % (PQ_ENCODE_STRIP / 8) * 8;
            if (k < D && j < n_cols) {
                pq_cp_async(&s.T[k][j], h.T + (size_t) k * D + col0 + j);
            } else {
                *(uint4 *) &s.T[k][j] = make_uint4(0, 0, 0, 0);
            }
        }
    }
#pragma unroll 1
    for (int i = tid; i < n_cols * PQ_KSUB / 8; i += PQ_ENCODE_THREADS) {
        pq_cp_async(&s.centroids[i], (const uint4 *) (h.centroids + (size_t) col0 * PQ_KSUB) + i);
    }
    if (tid < D / 4) {
        pq_cp_async(&s.mu[4 * tid], h.mu + 4 * tid);
    } else if (tid >= PQ_ENCODE_THREADS - PQ_ENCODE_STRIP) {
        const int i = tid - (PQ_ENCODE_THREADS - PQ_ENCODE_STRIP);
        s.aniso[i] = i < n_cols ? __ldg(h.aniso + col0 + i) : 0.0f;
    }
}

// What follows from it. What is asked for has come.
template <int D_STEPS>
__device__ __forceinline__ void pq_encode_tile_begin(const pq_encode_params & p, const pq_encode_head & h, pq_encode_tile_smem<D_STEPS> & s) {
    const int tid = threadIdx.x;
    const int D   = p.D;
    if (h.T) { // 8 threads per column
        const int j = tid / 8;
        float sum = 0.0f, norm2 = 0.0f;
        for (int k = tid % 8; k < D; k += 8) {
            const float t = __half2float(s.T[k][j]);
            sum   += s.mu[k] * t;
            norm2 += t * t;
        }
#pragma unroll
        for (int o = 4; o > 0; o /= 2) {
            sum   += __shfl_xor_sync(0xffffffff, sum,   o);
            norm2 += __shfl_xor_sync(0xffffffff, norm2, o);
        }
        if (tid % 8 == 0) {
            s.mu_T[j]         = sum;
            s.column_norm2[j] = norm2;
        }
    }
    __syncthreads();
    if (tid < 32) { // how far y can be from the CPU's; without a transform it is the same
        float mu2 = 0.0f;
        for (int k = tid; k < D; k += 32) {
            mu2 += s.mu[k] * s.mu[k];
        }
        float column2 = h.T ? s.column_norm2[tid] : 0.0f;
#pragma unroll
        for (int o = 16; o > 0; o /= 2) {
            mu2    += __shfl_xor_sync(0xffffffff, mu2, o);
            column2 = fmaxf(column2, __shfl_xor_sync(0xffffffff, column2, o));
        }
        if (tid == 0) {
            s.norm_mu     = sqrtf(mu2);
            s.column_norm = sqrtf(column2);
        }
    }
}

// No code is unsure yet.
template <int D_STEPS>
__device__ __forceinline__ void pq_encode_tile_forget(pq_encode_tile_smem<D_STEPS> & s) {
    for (int i = threadIdx.x; i < s.ROWS * PQ_ENCODE_STRIP / 2 / 32; i += PQ_ENCODE_THREADS) {
        s.unsure[i] = 0;
    }
    if (threadIdx.x == 0) {
        s.n_unsure = 0;
    }
}

// x of a tile to shared memory as f16, and to the tail. Several pieces are loaded at a time: each waits for memory.
template <int D_STEPS>
__device__ __forceinline__ void pq_encode_tile_load(const pq_encode_params & p, int head, int col0, int n_cols, int64_t row0, int n_rows,
                                                    pq_encode_tile_smem<D_STEPS> & s) {
    const int tid = pq_opaque(threadIdx.x); // see pq_encode_tile_search
    constexpr int PIECES = 2 * D_STEPS; // of 8 elements
    constexpr int STEP   = PQ_ENCODE_THREADS / PIECES; // rows: a thread takes the same elements of every STEP-th row
    constexpr int BATCH  = D_STEPS <= 8 ? 4 : 2; // registers
    static_assert(PQ_ENCODE_THREADS % PIECES == 0 && pq_encode_tile_smem<D_STEPS>::ROWS % (BATCH * STEP) == 0, "no piece is beyond the last");
    const int  k       = tid % PIECES * 8;
    const bool to_tail = p.tail && k >= col0 && k < col0 + n_cols;
    const uint8_t * x  = pq_encode_row(p, row0, head) + k * (p.x_f16 ? sizeof(__half) : sizeof(float));
    for (int r0 = tid / PIECES; r0 < s.ROWS; r0 += BATCH * STEP) {
        union { uint4 u; __half2 h[4]; } v[BATCH];
        int32_t slot[BATCH]; // of the tail that the piece goes to, or negative
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            const int r = r0 + j * STEP;
            slot[j] = to_tail && r < n_rows ? (int32_t) max(p.tail_idx[row0 + r], (int64_t) -1) : -1;
        }
        if (p.x_f16) {
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                const int r = r0 + j * STEP;
                v[j].u = k < p.D && r < n_rows ? pq_load_fresh((const uint4 *) (x + r * p.x_row_stride)) : make_uint4(0, 0, 0, 0);
            }
        } else {
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                const int r = r0 + j * STEP;
                const bool    has  = k < p.D && r < n_rows;
                const float4  zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                const float4 * row = (const float4 *) (x + r * p.x_row_stride);
                const float4 a = has ? pq_load_fresh(row)     : zero;
                const float4 b = has ? pq_load_fresh(row + 1) : zero;
                v[j].h[0] = __floats2half2_rn(a.x, a.y);
                v[j].h[1] = __floats2half2_rn(a.z, a.w);
                v[j].h[2] = __floats2half2_rn(b.x, b.y);
                v[j].h[3] = __floats2half2_rn(b.z, b.w);
            }
        }
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            const int r = r0 + j * STEP;
            if (slot[j] >= 0) {
                *(uint4 *) (p.tail + slot[j] * p.tail_row_stride + ((int64_t) head * p.D + k) * sizeof(__half)) = v[j].u;
            }
            *(uint4 *) &s.x[r][k] = v[j].u;
            float norm2 = 0.0f;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float2 f = __half22float2(v[j].h[e]);
                norm2 += f.x * f.x + f.y * f.y;
            }
            static_assert(PIECES <= 32, "a row is of one warp");
#pragma unroll
            for (int o = PIECES / 2; o > 0; o /= 2) {
                norm2 += __shfl_xor_sync(0xffffffff, norm2, o);
            }
            if (tid % PIECES == 0) {
                s.error2_y[r] = norm2;
            }
        }
    }
    for (int r = tid; r < n_rows; r += PQ_ENCODE_THREADS) {
        s.cell[r] = (int32_t) (p.row_idx ? p.row_idx[row0 + r] : row0 + r);
    }
    pq_encode_tile_forget(s);
}

// The codes of a tile to the cache, in words where it allows that
template <int TYPE, int D_STEPS>
__device__ __forceinline__ void pq_encode_tile_store(const pq_encode_side & side, int head, int col0, int n_cols, int n_rows,
                                                     const pq_encode_tile_smem<D_STEPS> & s) {
    typedef pq_encode_geom<TYPE> G;
    constexpr int WORDS = G::N_CODES / 4; // of one kind of codes each
    static_assert(G::N_OWN % 4 == 0 && G::N_SHARED % 4 == 0, "whole words");
    const uintptr_t places = (uintptr_t) pq_encode_code<TYPE>(side, 0, head, col0, 0) | (uintptr_t) pq_encode_code<TYPE>(side, 0, head, col0, G::N_CODES - 4);
    if (n_cols == PQ_ENCODE_STRIP && (places | side.p.codes_row_stride) % sizeof(uint32_t) == 0) {
        for (int i = threadIdx.x; i < n_rows * WORDS; i += PQ_ENCODE_THREADS) {
            *(uint32_t *) pq_encode_code<TYPE>(side, s.cell[i / WORDS], head, col0, i % WORDS * 4) = s.codes[i];
        }
        return;
    }
    for (int i = threadIdx.x; i < n_rows * G::N_CODES; i += PQ_ENCODE_THREADS) {
        const int code = i % G::N_CODES;
        if (G::place(code) < n_cols) {
            *pq_encode_code<TYPE>(side, s.cell[i / G::N_CODES], head, col0, code) = ((const uint8_t *) s.codes)[i];
        }
    }
}

// y of a tile: 16 rows and 16 elements of the strip at a time
template <int D_STEPS>
__device__ __forceinline__ void pq_encode_tile_transform(const pq_encode_params & p, const pq_encode_head & h, int col0,
                                                         pq_encode_tile_smem<D_STEPS> & s) {
    const int tid = pq_opaque(threadIdx.x);
    for (int r = tid; r < s.ROWS; r += PQ_ENCODE_THREADS) {
        // products of 128 terms were seen to differ by a fourth of it; without a transform nothing differs
        const float error_y = 0x1p-20f * (sqrtf(s.error2_y[r]) + s.norm_mu) * s.column_norm;
        s.error2_y[r] = error_y * error_y;
    }
    if (!h.T) {
        for (int i = tid; i < s.ROWS * PQ_ENCODE_STRIP; i += PQ_ENCODE_THREADS) {
            const int r = i / PQ_ENCODE_STRIP;
            const int j = i % PQ_ENCODE_STRIP;
            if (col0 + j < p.D) {
                s.y[r][j] = __fsub_rn(__half2float(s.x[r][col0 + j]), s.mu[col0 + j]);
            }
        }
        return;
    }
    const int lane = tid % 32;
    for (int unit = tid / 32; unit < s.ROWS / 16 * 2; unit += PQ_ENCODE_THREADS / 32) {
        const int row = unit / 2 * 16;
        const int col = unit % 2 * 16;
        float y[2][4] = {};
#pragma unroll
        for (int k = 0; k < D_STEPS; k++) { // x and T are zero beyond D
            uint32_t a[4], b[4];
            pq_ldmatrix(a, &s.x[row + lane % 16][16 * k + lane / 16 * 8]);
            pq_ldmatrix_trans(b, &s.T[16 * k + lane % 16][col + lane / 16 * 8]);
            pq_mma_k16(y[0], a, b[0], b[1], y[0]);
            pq_mma_k16(y[1], a, b[2], b[3], y[1]);
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int r = row + lane / 4 + 8 * (i / 2);
                const int c = col + 8 * j + 2 * (lane % 4) + i % 2;
                s.y[r][c] = y[j][i] - s.mu_T[c];
            }
        }
    }
}

__device__ __forceinline__ int pq_min3(int a, int b, int c) {
    return __vimin3_s32(a, b, c);
}

// best <- the smaller, second <- the second smallest of both
__device__ __forceinline__ void pq_merge_best(int & best, int & second, int best_b, int second_b) {
    second = pq_min3(second, second_b, max(best, best_b));
    best   = min(best, best_b);
}

constexpr uint32_t PQ_ENCODE_ONES = 0x3c003c00; // two halves

// A code stands for DIMS elements: one subspace, or two of two elements each (pq3). Where two share it, a point of four dimensions has half of its
// centroid in the table of each.
template <int DIMS_, int DSUB_> struct pq_encode_kind {
    static constexpr int DIMS = DIMS_;
    static constexpr int DSUB = DSUB_;

    // where element e of centroid c lies, counted from the first table
    static __host__ __device__ constexpr int element(int c, int e) { return e / DSUB * (PQ_KSUB * DSUB) + c * DSUB + e % DSUB; }
};
typedef pq_encode_kind<2, 2> pq_encode_pair;   // pq4, and two of three codes of pq3
typedef pq_encode_kind<4, 2> pq_encode_shared; // the others of pq3
typedef pq_encode_kind<4, 4> pq_encode_four;   // pq2

// The codes of a warp: two of pairs, or one of four elements, which take as long and as many registers. f(kind, number, code)
template <int TYPE, class F>
__device__ __forceinline__ void pq_encode_codes_of_warp(int warp, F f) {
    typedef std::integral_constant<int, 0> first;
    typedef std::integral_constant<int, 1> second;
    if constexpr (TYPE == PQ_TYPE_PQ4) {
        f(pq_encode_pair{}, first{},  warp);
        f(pq_encode_pair{}, second{}, warp + 8);
    } else if constexpr (TYPE == PQ_TYPE_PQ2) {
        f(pq_encode_four{}, first{}, warp);
    } else if (warp < 4) {
        f(pq_encode_shared{}, first{}, pq_encode_geom<TYPE>::N_OWN + warp);
    } else {
        f(pq_encode_pair{}, first{},  2 * (warp - 4));
        f(pq_encode_pair{}, second{}, 2 * (warp - 4) + 1);
    }
}

// A float, scaled, as two halves
__device__ __forceinline__ uint32_t pq_encode_split(float y) {
    const __half high = __float2half_rn(y);
    const __half2 h = __halves2half2(high, __float2half_rn(y - __half2float(high)));
    uint32_t u;
    memcpy(&u, &h, 4);
    return u;
}

// Of 32 centroids four words each, by a warp: from lanes that have all of a centroid, to lanes that want one of each.
struct pq_encode_words {
    uint32_t word[4][PQ_WARP + 8]; // + 8: the words of eight centroids lie in different banks

    __device__ __forceinline__ void put(uint32_t a, uint32_t b, uint32_t c, uint32_t d, int lane) {
        __syncwarp(); // those before have been read
        word[0][lane] = a;
        word[1][lane] = b;
        word[2][lane] = c;
        word[3][lane] = d;
        __syncwarp();
    }

    __device__ __forceinline__ uint32_t get(int i, int lane) const { return word[lane % 4][8 * i + lane / 4]; }
};

// The search's side of them: centroids as an operand of the product, one register (two for four elements) per 8 of them
struct pq_encode_operand {
    static constexpr int N = PQ_KSUB / 8;
    uint32_t b[2 * N];
    float    scale[2]; // power of two

    template <class KIND, int I>
    __device__ __forceinline__ void load(const __half * centroids /* of the first table */, pq_encode_words & words, int lane) {
        __half2 most = __half2half2(__float2half_rn(0.0f));
#pragma unroll
        for (int i = 0; i < PQ_KSUB * KIND::DIMS / 8 / 32; i++) { // tables lie side by side
            const uint4 c = ((const uint4 *) centroids)[32 * i + lane];
            most = __hmax2(most, __hmax2(__hmax2(magnitudes(c.x), magnitudes(c.y)), __hmax2(magnitudes(c.z), magnitudes(c.w))));
        }
        float largest = fmaxf(__low2float(most), __high2float(most));
#pragma unroll
        for (int o = 16; o > 0; o /= 2) {
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, o));
        }
        scale[I] = largest > 0.0f ? ldexpf(1.0f, PQ_ENCODE_SCALE_BITS - ilogbf(largest)) : 1.0f;

        // A lane makes the words of a centroid, and gets those that it holds of four.
        constexpr int PAIRS = KIND::DIMS / 2;
        __half2 c[N / 4][PAIRS];
#pragma unroll
        for (int k = 0; k < N / 4; k++) {
#pragma unroll
            for (int e = 0; e < PAIRS; e++) {
                c[k][e] = *(const __half2 *) (centroids + KIND::element(32 * k + lane, 2 * e));
            }
        }
#pragma unroll
        for (int k = 0; k < N / 4; k++) {
            uint32_t minus[KIND::DIMS];
            float norm2 = 0.0f;
#pragma unroll
            for (int e = 0; e < PAIRS; e++) {
                const float2 f = __half22float2(c[k][e]);
                const float x = f.x * scale[I], y = f.y * scale[I];
                norm2 = e == 0 ? x * x + y * y : norm2 + x * x + y * y;
                minus[2 * e]     = bits(__half2half2(__float2half_rn(-x)));
                minus[2 * e + 1] = bits(__half2half2(__float2half_rn(-y)));
            }
            const uint32_t norm = pq_encode_split(0.5f * norm2);
            // rows 2t and 2t + 1 of the operand: -c[t] meets the two halves of y[t]; |c|^2 / 2 meets ones, ones meet |y|^2 / 2
            auto take = [&](int first, int step) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    b[first + step * i] = words.get(i, lane);
                }
            };
            if constexpr (KIND::DIMS == 2) {
                words.put(minus[0], minus[1], norm, PQ_ENCODE_ONES, lane);
                take(I * N + 4 * k, 1);
            } else {
                words.put(minus[0], minus[1], minus[2], minus[3], lane);
                take(8 * k, 2);
                words.put(norm, PQ_ENCODE_ONES, 0, 0, lane);
                take(8 * k + 1, 2);
            }
        }
    }

    static __device__ __forceinline__ __half2 magnitudes(uint32_t h) {
        h &= 0x7fff7fff;
        __half2 x;
        memcpy(&x, &h, 4);
        return x;
    }

    static __device__ __forceinline__ uint32_t bits(__half2 h) {
        uint32_t u;
        memcpy(&u, &h, 4);
        return u;
    }
};

// Codes of 16 rows: code `code_index` of the strip, number I of the warp. again: those that the warp has listed, from place row0 on; otherwise those from row0
// on, whose gaps are noted where codes are anisotropic.
template <int TYPE, class KIND, int I, int D_STEPS>
__device__ __forceinline__ void pq_encode_tile_search(const pq_encode_operand & op, bool again, int row0, int n_rows, bool anisotropic, int code_index,
                                                      pq_encode_tile_smem<D_STEPS> & s) {
    typedef pq_encode_geom<TYPE> G;
    constexpr int DIMS   = KIND::DIMS;
    constexpr int N      = pq_encode_operand::N;
    constexpr int GROUPS = 8;          // per lane; with 4 lanes of a row, four times as many
    constexpr int PER    = N / GROUPS; // products per group: 2 * PER centroids
    constexpr int TAG    = 0xff;       // of a key: the group. A byte is replaced at once.
    const int place = G::place(code_index);
    const int tid = pq_opaque(threadIdx.x); // worked out anew: what follows from it would be kept over all of a tile otherwise
    const int lane = tid % 32;
    const int g = lane / 4, t = lane % 4;

    auto row_of = [&](int i) { return again ? s.rows[tid / 32][min(row0 + i, n_rows - 1)] : row0 + i; };
    float    offset[2];
    uint32_t a[4] = { 0, 0, 0, 0 };
#pragma unroll
    for (int r = 0; r < 2; r++) { // rows g and g + 8
        const float * y_row = (again ? s.moved : s.y)[row_of(g + 8 * r)] + place;
        float n2 = 0.0f, mine = 0.0f;
#pragma unroll
        for (int e = 0; e < DIMS; e++) {
            const float v = y_row[e] * op.scale[I];
            n2  += v * v;
            mine = e == t ? v : mine;
        }
        // sums stay positive in spite of their rounding, so that they compare like integers
        offset[r] = n2 * (1.0f / 1024) + 1.0f / 64;
        const float start = 0.5f * n2 + offset[r];
        if (DIMS == 2) {
            a[r] = t == 2 ? PQ_ENCODE_ONES : pq_encode_split(t == 3 ? start : mine);
        } else {
            a[r]     = pq_encode_split(mine);
            a[2 + r] = t == 1 ? pq_encode_split(start) : PQ_ENCODE_ONES;
        }
    }
    const float zero[4] = { 0.0f, 0.0f, 0.0f, 0.0f };

    int best[2], second[2]; // keys of the smallest group, and, without its tag, of the next one
    {
        // the tags of groups 0-3 and 4-7, a byte each: 4 * group + t
        const uint32_t tags[2] = { 0x0c080400 + t * 0x01010101u, 0x1c181410 + t * 0x01010101u };
        int key[2][GROUPS];
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            int m[2];
#pragma unroll
            for (int i = 0; i < PER; i++) {
                const int n = group * PER + i;
                float d[4];
                if constexpr (DIMS == 2) {
                    pq_mma_k8(d, a[0], a[1], op.b[I * N + n], zero);
                } else {
                    pq_mma_k16(d, a, op.b[2 * n], op.b[2 * n + 1], zero);
                }
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int d0 = __float_as_int(d[2 * r]), d1 = __float_as_int(d[2 * r + 1]);
                    m[r] = i == 0 ? min(d0, d1) : pq_min3(m[r], d0, d1);
                }
            }
            key[0][group] = (int) __byte_perm(m[0], tags[group / 4], 0x3214 + group % 4);
            key[1][group] = (int) __byte_perm(m[1], tags[group / 4], 0x3214 + group % 4);
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            best[r] = min(key[r][0], key[r][1]);
#pragma unroll
            for (int group = 2; group < GROUPS; group += 2) {
                best[r] = pq_min3(best[r], key[r][group], key[r][group + 1]);
            }
#pragma unroll
            for (int o = 1; o < 4; o *= 2) {
                best[r] = min(best[r], __shfl_xor_sync(0xffffffff, best[r], o));
            }
            // No two keys are equal. As unsigned numbers, key - best - 1 keep their order, and that of the best is the largest.
            const uint32_t minus = ~(uint32_t) best[r];
            uint32_t next = min(key[r][0] + minus, key[r][1] + minus);
#pragma unroll
            for (int group = 2; group < GROUPS; group += 2) {
                next = __vimin3_u32(next, key[r][group] + minus, key[r][group + 1] + minus);
            }
#pragma unroll
            for (int o = 1; o < 4; o *= 2) {
                next = min(next, __shfl_xor_sync(0xffffffff, next, o));
            }
            second[r] = (int) (next - minus);
        }
    }

    // Lanes 0, 1 of a row's four take row g, lanes 2, 3 row g + 8; each of them half of the winning group.
    const int  r        = t / 2;
    const int  e        = t % 2;
    const int  tag      = (r ? best[1] : best[0]) & TAG;
    const int  row      = row_of(g + 8 * r);
    const int  first    = tag / 4 * (8 * PER) + tag % 4 * 2 + e; // the group's centroids: first, first + 8, first + 16, ...
    float      y_r[DIMS];
#pragma unroll
    for (int i = 0; i < DIMS; i++) {
        y_r[i] = (again ? s.moved : s.y)[row][place + i];
    }
    const __half * centroids = (const __half *) s.centroids + place * PQ_KSUB;
    const int  k0  = g % PER; // where a lane begins, so that rows of a warp read from different banks
    const int  at0 = first | 8 * k0;
    const int  id0 = k0 * 2 | e;
    int near = 0x7fffffff, near2 = 0x7fffffff;
#pragma unroll
    for (int i = 0; i < PER; i++) {
        float d;
#pragma unroll
        for (int j = 0; j < DIMS; j += 2) {
            const float2 f  = __half22float2(*(const __half2 *) (centroids + KIND::element(at0 ^ 8 * i, j)));
            const float  d0 = y_r[j] - f.x, d1 = y_r[j + 1] - f.y;
            d = j == 0 ? d0 * d0 + d1 * d1 : d + d0 * d0 + d1 * d1;
        }
        const int key = (__float_as_int(d) & ~15) | (id0 ^ 2 * i);
        near2 = i == 0 ? near2 : min(near2, max(near, key));
        near  = i == 0 ? key : min(near, key);
    }
    const int near_b  = __shfl_xor_sync(0xffffffff, near,  1);
    const int near2_b = __shfl_xor_sync(0xffffffff, near2, 1);
    pq_merge_best(near, near2, near_b, near2_b);

    if (e == 0 && (again || row < n_rows)) {
        const float n2      = (r ? offset[1] : offset[0]) * 1024; // of scaled y, and a little more
        const float inv2    = 1.0f / (op.scale[I] * op.scale[I]);
        const float d       = __int_as_float(near & ~15);
        const float d_near2 = __int_as_float(near2 & ~15);
        const float d_other = 2.0f * (__int_as_float((r ? second[1] : second[0]) & ~TAG) - (r ? offset[1] : offset[0])) * inv2;
        // Squared distances move by 4 |error of y| sqrt(DIMS) per distance, and by roundings. Distances are squared: no root is taken.
        const float move2     = 16.0f * DIMS * s.error2_y[row];
        const float gap_near2 = d_near2 - d - 0x1p-17f * d_near2;
        const float gap_other = d_other - d - 0x1p-17f * d_other - (0x1p-17f * n2 + 1.0f / 1024) * inv2;
        const bool  sure      =
            gap_near2 > 0.0f && gap_near2 * gap_near2 > move2 * d_near2 &&
            gap_other > 0.0f && gap_other * gap_other > move2 * d_other &&
            n2 < PQ_ENCODE_MAX_Y * PQ_ENCODE_MAX_Y;
        const int   code    = tag / 4 * (8 * PER) + (near & 15) / 2 * 8 + tag % 4 * 2 + (near & 1);
        ((uint8_t *) s.codes)[row * G::N_CODES + code_index] = (uint8_t) code;
        if (anisotropic && !again) { // less than it is, by more than all roundings
            const float gap = pq_sqrt(d + fminf(gap_near2, gap_other)) - pq_sqrt(d) - pq_sqrt(move2);
            s.gap[code_index][row] = __float2half_rd(sure ? gap * (1.0f - 0x1p-6f) : 0.0f);
        }
        if (!sure) { // NaN comes here, too
            const int at = row * G::N_CODES + code_index;
            const int n  = atomicAdd(&s.n_unsure, 1);
            if (n < PQ_ENCODE_MAX_LIST) {
                s.unsure_list[n] = (uint16_t) at;
            }
            atomicOr(&s.unsure[at / 32], 1u << (at % 32));
        }
    }
}

// One code, by a warp, in the order of operations of the CPU
template <class KIND, int D_STEPS>
__device__ __forceinline__ int pq_encode_tile_exact_of(const pq_encode_params & p, const pq_encode_head & h, bool second, int col0, int row, int place,
                                                    pq_encode_tile_smem<D_STEPS> & s) {
    const int lane = threadIdx.x % 32;
    const int j    = place + lane % KIND::DIMS;
    float y_j = 0.0f;
    if (second) {
        y_j = s.moved[row][j];
    } else if (h.T) {
#pragma unroll 2
        for (int k = 0; k < p.D; k += 8) { // the loads of a step do not wait for the sums of the one before it
            float x[8], T[8];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                x[i] = __fsub_rn(__half2float(s.x[row][k + i]), s.mu[k + i]);
                T[i] = __half2float(s.T[k + i][j]);
            }
#pragma unroll
            for (int i = 0; i < 8; i++) {
                y_j = __fmaf_rn(x[i], T[i], y_j);
            }
        }
    } else {
        y_j = __fsub_rn(__half2float(s.x[row][col0 + j]), s.mu[col0 + j]);
    }
    float y[KIND::DIMS];
#pragma unroll
    for (int e = 0; e < KIND::DIMS; e++) {
        y[e] = __shfl_sync(0xffffffff, y_j, e);
    }
    const __half * centroids = (const __half *) s.centroids + place * PQ_KSUB;
    float best  = INFINITY;
    int   index = 0;
    for (int i = lane; i < PQ_KSUB; i += 32) {
        float c[KIND::DIMS];
#pragma unroll
        for (int e = 0; e < KIND::DIMS; e++) {
            c[e] = __half2float(centroids[KIND::element(i, e)]);
        }
        const float d = pq_encode_distance<KIND::DIMS>(y, c);
        if (d < best) {
            best  = d;
            index = i;
        }
    }
#pragma unroll
    for (int o = 16; o > 0; o /= 2) {
        const float other_best  = __shfl_xor_sync(0xffffffff, best,  o);
        const int   other_index = __shfl_xor_sync(0xffffffff, index, o);
        if (other_best < best || (other_best == best && other_index < index)) {
            best  = other_best;
            index = other_index;
        }
    }
    return index;
}

// Called and not inlined: it is rare, and the registers of the search are counted.
template <int TYPE, int D_STEPS>
__device__ __noinline__ void pq_encode_tile_exact(const pq_encode_params & p, const pq_encode_head & h, bool second, int col0, int at,
                                                  pq_encode_tile_smem<D_STEPS> & s) {
    typedef pq_encode_geom<TYPE> G;
    const int row = at / G::N_CODES, code = at % G::N_CODES, place = G::place(code);
    int index;
    if constexpr (TYPE == PQ_TYPE_PQ2) {
        index = pq_encode_tile_exact_of<pq_encode_four>(p, h, second, col0, row, place, s);
    } else if (TYPE == PQ_TYPE_PQ3 && G::is_shared(code)) {
        index = pq_encode_tile_exact_of<pq_encode_shared>(p, h, second, col0, row, place, s);
    } else {
        index = pq_encode_tile_exact_of<pq_encode_pair>(p, h, second, col0, row, place, s);
    }
    if (threadIdx.x % 32 == 0) {
        ((uint8_t *) s.codes)[at] = (uint8_t) index;
    }
}

// ---- anisotropic codes (pq-layout.h) ----

// Lists the rows that the second search has to look at for a code, and returns how many they are. Where y moves by less than half of the gap, the
// nearest centroid stays the nearest: with pq4 that is so for three rows of four.
template <class KIND, int D_STEPS>
__device__ __forceinline__ int pq_encode_tile_list(int place, int code_index, int n_rows, pq_encode_tile_smem<D_STEPS> & s) {
    const int tid = pq_opaque(threadIdx.x), lane = tid % 32;
    int n = 0;
    for (int row0 = 0; row0 < n_rows; row0 += 32) {
        const int row = row0 + lane;
        float move2 = 0.0f;
#pragma unroll
        for (int e = 0; e < KIND::DIMS; e++) {
            const float move = s.moved[row][place + e] - s.y[row][place + e];
            move2 += move * move;
        }
        const float    gap = __half2float(s.gap[code_index][row]);
        const bool     may = row < n_rows && !(gap > 0.0f && gap * gap > 4.0f * move2); // NaN is looked at
        const unsigned all = __ballot_sync(0xffffffff, may);
        if (may) {
            s.rows[tid / 32][n + __popc(all & ((1u << lane) - 1))] = (uint8_t) row;
        }
        n += __popc(all);
    }
    __syncwarp();
    return n;
}

struct pq_encode_sums {
    float ee, ed, dd;
};

// Elements I, I + N, I + 2 N, ... of a strip, added as the CPU's tree does. get(i): those of one element
template <int N, int I, class GET>
__device__ __forceinline__ pq_encode_sums pq_encode_tree(GET get) {
    if constexpr (N == PQ_ENCODE_STRIP) {
        return get(I);
    } else {
        const pq_encode_sums a = pq_encode_tree<2 * N, I>(get), b = pq_encode_tree<2 * N, I + N>(get);
        return { __fadd_rn(a.ee, b.ee), __fadd_rn(a.ed, b.ed), __fadd_rn(a.dd, b.dd) };
    }
}

// A row, by two threads side by side, after either search: pq_encode_judge with many rows. One takes the even elements, the other the odd ones, which is the
// last step of the tree. y is that of the tensor cores, so it moves and costs what the CPU's does but for rounding; codes may differ where that decides.
template <int TYPE, int D_STEPS>
__device__ __noinline__ void pq_encode_tile_judge(bool second, int n_rows, int n_cols, pq_encode_tile_smem<D_STEPS> & s) {
    typedef pq_encode_geom<TYPE> G;
    constexpr int BATCH = 8;
    for (int at = threadIdx.x; at < 2 * s.ROWS; at += PQ_ENCODE_THREADS) { // whole warps
        const int row = at / 2, odd = at % 2;
        uint8_t * codes = (uint8_t *) s.codes + row * G::N_CODES, * first = (uint8_t *) s.first_codes + row * G::N_CODES;
        pq_encode_sums sums = pq_encode_tree<2, 0>([&](int even) {
            const int   i = even + odd;
            const float y = s.y[row][i], d = __fmul_rn(s.aniso[i], y);
            const float e = __fsub_rn(y, pq_encode_centroid_element<TYPE>((const __half *) s.centroids, i, codes[G::code_of(i)]));
            return i < n_cols ? pq_encode_sums{ __fmul_rn(e, e), __fmul_rn(e, d), __fmul_rn(d, d) } : pq_encode_sums{ 0.0f, 0.0f, 0.0f };
        });
        sums.ee = __fadd_rn(sums.ee, __shfl_xor_sync(0xffffffff, sums.ee, 1));
        sums.ed = __fadd_rn(sums.ed, __shfl_xor_sync(0xffffffff, sums.ed, 1));
        sums.dd = __fadd_rn(sums.dd, __shfl_xor_sync(0xffffffff, sums.dd, 1));
        __syncwarp(); // both threads have read the codes
        if (row >= n_rows) {
            continue; // what is there is of no row
        }
        const float cost = pq_encode_cost(sums.ee, sums.ed, sums.dd);
        if (!second) {
            const float step = __fmul_rn(PQ_ANISO_STEP, __fdiv_rn(sums.ed, sums.dd));
#pragma unroll 1
            for (int i0 = odd; i0 < PQ_ENCODE_STRIP; i0 += 2 * BATCH) {
                float y[BATCH], d[BATCH]; // all loads before the first store
#pragma unroll
                for (int i = 0; i < BATCH; i++) {
                    y[i] = s.y[row][i0 + 2 * i];
                    d[i] = __fmul_rn(s.aniso[i0 + 2 * i], y[i]);
                }
#pragma unroll
                for (int i = 0; i < BATCH; i++) {
                    s.moved[row][i0 + 2 * i] = __fadd_rn(y[i], __fmul_rn(step, d[i]));
                }
            }
            if (odd) {
                s.cost[row]     = cost;
                s.error2_y[row] = 0.0f; // of what the second search looks for
            }
        }
        if (!odd) {
            const bool keep = second && !(cost < s.cost[row]);
#pragma unroll
            for (int i = 0; i < G::N_CODES; i += 4) { // a row has whole words of them
                if (keep) {
                    *(uint32_t *) (codes + i) = *(const uint32_t *) (first + i);
                } else if (!second) {
                    *(uint32_t *) (first + i) = *(const uint32_t *) (codes + i);
                }
            }
        }
    }
}

// grid: (strips, parts of the rows, heads of all sides). Heads of K come first: those blocks search twice. settled: what is encoded was complete when the kernel
// ahead in the stream let this one begin, and one block waits for its end. What is asked for waits long beside kernels that fill the memory, so all of it is asked for at once.
// Dynamic shared memory: pq_encode_tile_smem
template <int TYPE, int D_STEPS>
__global__ void __launch_bounds__(PQ_ENCODE_THREADS, 2) pq_encode_tile_kernel(const __grid_constant__ pq_encode_sides sides, bool settled) {
    typedef pq_encode_geom<TYPE> G;
    constexpr int WARPS = PQ_ENCODE_THREADS / 32;
    extern __shared__ __align__(16) uint8_t pq_encode_smem[];
    pq_encode_tile_smem<D_STEPS> & s = *(pq_encode_tile_smem<D_STEPS> *) pq_encode_smem;

    pq_pdl_launch_beside(settled, PQ_ENCODE_THREADS);
    const int    n_head_0 = sides.side[0].p.n_head_kv;
    const bool   second   = (int) blockIdx.z >= n_head_0;
    const int    head     = blockIdx.z - (second ? n_head_0 : 0);
    const pq_encode_side   & side = sides.side[second];
    const pq_encode_params & p    = side.p;
    const int64_t step   = (int64_t) gridDim.y * s.ROWS;
    const int     col0   = blockIdx.x * PQ_ENCODE_STRIP;
    int64_t       row0   = (int64_t) blockIdx.y * s.ROWS;
    if (col0 >= p.D || row0 >= p.n_rows) {
        return; // the other side has more
    }
    const int tid    = threadIdx.x;
    const int warp   = tid / 32;
    const int n_cols = min(PQ_ENCODE_STRIP, p.D - col0);
    const pq_encode_head h = pq_encode_get_head(side, head);

    pq_encode_tile_ask(p, h, col0, n_cols, s);
    if (!settled) {
        pq_pdl_wait();
    }
    pq_encode_operand op;
    bool anisotropic = false;
    for (bool first = true; row0 < p.n_rows; row0 += step, first = false) {
        const int n_rows = (int) min((int64_t) s.ROWS, p.n_rows - row0);
        pq_encode_tile_load(p, head, col0, n_cols, row0, n_rows, s);
        if (first) {
            pq_cp_async_wait();
        }
        __syncthreads();
        if (first) {
            pq_encode_tile_begin(p, h, s);
            static_assert(WARPS * sizeof(pq_encode_words) <= sizeof(s.y), "there is no y yet");
            pq_encode_codes_of_warp<TYPE>(warp, [&](auto kind, auto i, int code) {
                if (G::place(code) < n_cols) {
                    op.load<decltype(kind), i.value>((const __half *) s.centroids + G::place(code) * PQ_KSUB, ((pq_encode_words *) s.y)[warp], tid % 32);
                }
            });
            anisotropic = __any_sync(0xffffffff, s.aniso[tid % 32] != 0.0f);
            __syncthreads();
        }
        pq_encode_tile_transform(p, h, col0, s);
        __syncthreads();
#pragma unroll 1
        for (int again = 0; again <= (int) anisotropic; again++) { // anisotropic codes are searched for twice
            pq_encode_codes_of_warp<TYPE>(pq_opaque(warp), [&](auto kind, auto i, int code) { // not known ahead: places of both kinds would take registers
                if (G::place(code) >= n_cols) {
                    return;
                }
                const int n = again ? pq_encode_tile_list<decltype(kind)>(G::place(code), code, n_rows, s) : n_rows;
#pragma unroll 1
                for (int row = 0; row < n; row += 16) {
                    pq_encode_tile_search<TYPE, decltype(kind), i.value>(op, again, row, n, anisotropic, code, s);
                }
                __syncwarp(); // the list has been read
            });
            __syncthreads();
            const bool listed = s.n_unsure <= PQ_ENCODE_MAX_LIST;
            for (int i = warp; i < (listed ? s.n_unsure : s.ROWS * G::N_CODES / 32); i += WARPS) {
                for (uint32_t left = listed ? 1 : s.unsure[i]; left != 0; left &= left - 1) {
                    const int at = listed ? s.unsure_list[i] : i * 32 + __ffs(left) - 1;
                    pq_encode_tile_exact<TYPE>(p, h, again, col0, at, s);
                }
            }
            __syncthreads();
            if (anisotropic) {
                pq_encode_tile_judge<TYPE>(again, n_rows, n_cols, s);
                pq_encode_tile_forget(s);
                __syncthreads();
            }
        }
        pq_encode_tile_store<TYPE>(side, head, col0, n_cols, n_rows, s);
        __syncthreads(); // codes and x are free
    }
    if (settled && blockIdx.x + blockIdx.y + blockIdx.z == 0) {
        pq_pdl_wait();
    }
}

} // namespace
