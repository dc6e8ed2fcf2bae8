// The kernels, written once over the vector types of pq-simd.h. A file per instruction set defines PQ_VEC (the widest
// vector type) and PQ_TABLE_NAME, includes this file, and is compiled with the flags of its instruction set.
//
// Attention has two shapes:
//   many rows (prefill): flash attention. A tile of 64 cells is decoded once for all query rows of the item (every head of
//     the GQA group, many tokens), K transposed, and scores and values are register-blocked matrix products.
//   few rows (up to 8; token generation): no tile is ever decoded. K scores come from tables of the inner products
//     of the queries with all centroids, laid out [code][centroid][row], so one load serves every row, and both subspaces where
//     two share a code; V centroids go from the codebook to the accumulators. Codes are the outer loop, so the table in use stays
//     in the L1 cache.
//
// The exact tail follows the coded cells: their sums go through T^-1 once, and then the online softmax runs on over f16 rows.
#pragma once

#include "pq-kernels.h"
#include "pq-simd.h"

#include <math.h>
#include <string.h>

namespace {

using V  = PQ_VEC;
using V8 = pq_vec8;

constexpr int64_t PW = 2 * V::N; // panel width: columns of one micro-kernel

// Compile-time geometry of a type; pq_get_spec() is the same at run time. Every 8 elements have CODES codes. N_SHARE subspaces have
// a code that is shared; 1: none is.
template <int TYPE> struct geom;
template <> struct geom<PQ_TYPE_PQ4> { enum { DSUB = 2, CODES = 4, N_SHARE = 1 }; };
template <> struct geom<PQ_TYPE_PQ3> { enum { DSUB = 2, CODES = 3, N_SHARE = 2 }; };
template <> struct geom<PQ_TYPE_PQ2> { enum { DSUB = 4, CODES = 2, N_SHARE = 1 }; };

// of code j of a head: whether subspaces share it, and its first subspace
template <int TYPE> PQ_INLINE bool code_is_shared(int64_t j, int64_t D) { return TYPE == PQ_TYPE_PQ3 && j >= D / 4; }
template <int TYPE> PQ_INLINE int64_t code_subspace(int64_t j, int64_t D) {
    return TYPE != PQ_TYPE_PQ3 ? j : code_is_shared<TYPE>(j, D) ? (j - D / 4) * 4 + 2 : j / 2 * 4 + j % 2;
}

struct head_block {
    const float    * mu;
    const float    * aniso;
    const uint16_t * T;     // NULL: identity
    const uint16_t * T_inv; // NULL: identity
    const uint16_t * centroids;
};

head_block get_head_block(int32_t D, int32_t has_transform, const uint8_t * codebook, int64_t head) {
    const pq_codebook_layout l = pq_get_codebook_layout(D, has_transform);
    const uint8_t * p = codebook + (size_t) head * l.head_bytes;
    head_block b;
    b.mu        = (const float *) (p + l.mu);
    b.aniso     = (const float *) (p + l.aniso);
    b.T         = has_transform ? (const uint16_t *) (p + l.T)     : NULL;
    b.T_inv     = has_transform ? (const uint16_t *) (p + l.T_inv) : NULL;
    b.centroids = (const uint16_t *) (p + l.centroids);
    return b;
}

// e**x for x <= 80; 0 below -87, where floats run out. Relative error 2e-7 (the polynomial is that of Cephes).
template <class W>
PQ_INLINE typename W::T vexp(typename W::T x) {
    typedef typename W::T T;
    const T lowest = W::set1(-87.0f);
    const T c = W::max(W::min(x, W::set1(88.0f)), lowest);
    const T n = W::round(W::mul(c, W::set1(1.44269504088896341f)));
    T r = W::madd(n, W::set1(-0.693359375f), c);
    r   = W::madd(n, W::set1(2.12194440e-4f), r);
    T y = W::set1(1.9875691500e-4f);
    y = W::madd(y, r, W::set1(1.3981999507e-3f));
    y = W::madd(y, r, W::set1(8.3334519073e-3f));
    y = W::madd(y, r, W::set1(4.1665795894e-2f));
    y = W::madd(y, r, W::set1(1.6666665459e-1f));
    y = W::madd(y, r, W::set1(5.0000001201e-1f));
    y = W::madd(W::mul(y, r), r, W::add(r, W::set1(1.0f)));
    return W::if_lt(x, lowest, W::zero(), W::mul(y, W::pow2(n)));
}

template <class W>
PQ_INLINE typename W::T vtanh(typename W::T x) {
    const typename W::T c = W::max(W::min(x, W::set1(20.0f)), W::set1(-20.0f)); // +-1 beyond, in floats
    const typename W::T e = vexp<W>(W::add(c, c));
    return W::sub(W::set1(1.0f), W::div(W::set1(2.0f), W::add(e, W::set1(1.0f))));
}

// ---- matrix products ----

template <class W> PQ_INLINE typename W::T load_floats(const float    * p) { return W::load(p); }
template <class W> PQ_INLINE typename W::T load_floats(const uint16_t * p) { return W::load_f16(p); }

// B is f32, or a map in f16: to convert it while loading costs a sixth of the time here, to convert it beforehand would cost scratch
// memory and a pass over it.
//
// C [MR][NR vectors] = or += A [MR][K] * B [K][NR vectors]. FUSED: each element is one chain of fused multiply-adds over
// k = 0, 1, ... from 0, whatever the vector width, which is what makes codes equal on every instruction set.
template <int MR, int NR, bool FUSED, class TB>
PQ_INLINE void micro_kernel(const float * A, int64_t lda, const TB * B, int64_t ldb, float * C, int64_t ldc, int64_t K,
                            bool accumulate) {
    V::T c[MR][NR];
    PQ_UNROLL
    for (int r = 0; r < MR; r++) {
        PQ_UNROLL
        for (int j = 0; j < NR; j++) {
            c[r][j] = accumulate ? V::load(C + r * ldc + j * V::N) : V::zero();
        }
    }
    for (int64_t k = 0; k < K; k++) {
        V::T b[NR];
        PQ_UNROLL
        for (int j = 0; j < NR; j++) {
            b[j] = load_floats<V>(B + k * ldb + j * V::N);
        }
        PQ_UNROLL
        for (int r = 0; r < MR; r++) {
            const V::T a = V::set1(A[r * lda + k]);
            PQ_UNROLL
            for (int j = 0; j < NR; j++) {
                c[r][j] = FUSED ? V::fma(a, b[j], c[r][j]) : V::madd(a, b[j], c[r][j]);
            }
        }
    }
    PQ_UNROLL
    for (int r = 0; r < MR; r++) {
        PQ_UNROLL
        for (int j = 0; j < NR; j++) {
            V::store(C + r * ldc + j * V::N, c[r][j]);
        }
    }
}

template <int MR, int NR, bool FUSED, class TB>
void gemm_rows_left(const float * A, int64_t lda, int64_t rows, const TB * B, int64_t ldb, float * C, int64_t ldc, int64_t K,
                    bool accumulate) {
    if constexpr (MR > 0) {
        if (rows == MR) {
            micro_kernel<MR, NR, FUSED>(A, lda, B, ldb, C, ldc, K, accumulate);
        } else {
            gemm_rows_left<MR - 1, NR, FUSED>(A, lda, rows, B, ldb, C, ldc, K, accumulate);
        }
    }
}

template <int NR, bool FUSED, class TB>
void gemm_panel(const float * A, int64_t lda, int64_t rows, const TB * B, int64_t ldb, float * C, int64_t ldc, int64_t K,
                bool accumulate) {
    int64_t r = 0;
    for (; r + V::MR <= rows; r += V::MR) {
        micro_kernel<V::MR, NR, FUSED>(A + r * lda, lda, B, ldb, C + r * ldc, ldc, K, accumulate);
    }
    gemm_rows_left<V::MR - 1, NR, FUSED>(A + r * lda, lda, rows - r, B, ldb, C + r * ldc, ldc, K, accumulate);
}

// C [rows][N] = A [rows][K] * B [K][N], N a multiple of 8. Rows of C hold at least N rounded up to PQ_PAD floats. The last vector of
// a row of B may reach up to 8 elements past it, which for a map is still inside its head block.
template <bool FUSED>
void gemm(const float * A, int64_t lda, int64_t rows, const uint16_t * B, int64_t ldb, float * C, int64_t ldc, int64_t N, int64_t K) {
    int64_t j = 0;
    for (; rows == 1 && j + 8 * V::N <= N; j += 8 * V::N) { // two sums alone would wait for each other's latency
        micro_kernel<1, 8, FUSED>(A, lda, B + j, ldb, C + j, ldc, K, false);
    }
    for (; j + PW <= N; j += PW) {
        gemm_panel<2, FUSED>(A, lda, rows, B + j, ldb, C + j, ldc, K, false);
    }
    for (; j < N; j += V::N) {
        gemm_panel<1, FUSED>(A, lda, rows, B + j, ldb, C + j, ldc, K, false);
    }
}

// C += A [rows][K] * B, B in panels [ceil(N / PW)][K][PW]
void gemm_panels(const float * A, int64_t lda, int64_t rows, const float * B, float * C, int64_t ldc, int64_t N, int64_t K,
                 bool accumulate) {
    int64_t j = 0;
    for (; j + V::N < N; j += PW) {
        gemm_panel<2, false>(A, lda, rows, B + j * K, PW, C + j, ldc, K, accumulate);
    }
    if (j < N) {
        gemm_panel<1, false>(A, lda, rows, B + j * K, PW, C + j, ldc, K, accumulate);
    }
}

// C [R][D] = A [R][D] * B^T, B [D][D] in f16, D a multiple of 8; for few rows, where to transpose B would not pay
template <int R>
void map_few(const float * A, int64_t lda, const uint16_t * B, int64_t D, float * C, int64_t ldc) {
    constexpr int J = 8 / R; // rows of B at once: R * J sums in registers, and in one vector in the end
    for (int64_t j0 = 0; j0 < D; j0 += J) {
        V8::T sum[8];
        PQ_UNROLL
        for (int i = 0; i < 8; i++) {
            sum[i] = V8::zero();
        }
        for (int64_t k = 0; k < D; k += 8) {
            V8::T b[J];
            PQ_UNROLL
            for (int j = 0; j < J; j++) {
                b[j] = V8::load_f16(B + (j0 + j) * D + k);
            }
            PQ_UNROLL
            for (int r = 0; r < R; r++) {
                const V8::T a = V8::load(A + r * lda + k);
                PQ_UNROLL
                for (int j = 0; j < J; j++) {
                    sum[r * J + j] = V8::madd(a, b[j], sum[r * J + j]);
                }
            }
        }
        float lanes[8];
        V8::store(lanes, V8::hsum_8(sum));
        PQ_UNROLL
        for (int r = 0; r < R; r++) {
            memcpy(C + r * ldc + j0, lanes + r * J, J * sizeof(float));
        }
    }
}

// f16 rows of D elements (a multiple of 8), row(0), row(1), ... n of them (a multiple of PW), transposed: dst [n / PW][D][PW]
template <class ROW>
PQ_INLINE void transpose_f16(ROW row, int64_t n, int64_t D, float * dst) {
    for (int64_t t = 0; t < n; t += 8) {
        const uint16_t * rows[8];
        for (int64_t i = 0; i < 8; i++) {
            rows[i] = row(t + i);
        }
        float * panel = dst + t / PW * D * PW + t % PW;
        for (int64_t d = 0; d < D; d += 8) {
            V8::T x[8];
            V8::load_f16_columns(rows, d, x);
            PQ_UNROLL
            for (int e = 0; e < 8; e++) {
                V8::store(panel + (d + e) * PW, x[e]);
            }
        }
    }
}

// ---- codes ----

// Codes are staged in groups of 8: the codes as they lie in the cache, or, where a kernel takes pq3 for pq4, with EXPAND one for every
// subspace, M of them: those that two share twice.
//
// Stages codes m0.. (a multiple of 8) of one head: group g to dst + g * group_stride; missing codes of the last group are 0.
template <bool EXPAND>
PQ_INLINE void stage_cell(const uint8_t * src, int64_t m0, int64_t M, uint8_t * dst, int64_t group_stride) {
    dst += m0 / 8 * group_stride;
    for (int64_t m = m0; m < M; m += 8, dst += group_stride) {
        if (!EXPAND && m + 8 <= M) {
            memcpy(dst, src + m, 8);
            continue;
        }
        for (int64_t j = 0; j < 8; j++) {
            dst[j] = m + j >= M ? 0 : src[EXPAND ? pq_code_index(PQ_TYPE_PQ3, (int32_t) M * 2, (int32_t) (m + j)) : m + j];
        }
    }
}

// The same for all codes of n cells, at data + cell(i) * row_stride; cell i goes to dst + 8 * i.
template <bool EXPAND, class CELL>
PQ_INLINE void stage_cells(const uint8_t * data, size_t row_stride, CELL cell, int64_t n, int64_t M, uint8_t * dst, int64_t group_stride) {
    const int64_t m_wide = V8::STAGES_4_CELLS ? EXPAND ? M / 32 * 32 : M / 16 * 16 : 0;
    const int64_t n_wide = V8::STAGES_4_CELLS ? n / 4 * 4 : 0;
    for (int64_t i = 0; i < n_wide; i += 4) {
        const uint8_t * s[4];
        for (int64_t j = 0; j < 4; j++) {
            s[j] = data + (size_t) cell(i + j) * row_stride;
            // rows of one head lie a whole cell apart, too far for some prefetchers
            PQ_PREFETCH(data + (size_t) cell(pq_min(i + j + 16, n - 1)) * row_stride);
        }
        int64_t m = 0;
        for (; m + 32 <= m_wide; m += 32) {
            const int64_t at = EXPAND ? m / 2 : m, shared = (M / 2 + m / 4) - at;
            V8::stage_4_cells<EXPAND>(s[0] + at, s[1] + at, s[2] + at, s[3] + at, shared, dst + m / 8 * group_stride + i * 8, group_stride);
        }
        if (!EXPAND && m < m_wide) { // 16 are left; expanded, there are none
            V8::stage_4_cells_16(s[0] + m, s[1] + m, s[2] + m, s[3] + m, dst + m / 8 * group_stride + i * 8, group_stride);
        }
        for (int64_t j = 0; j < 4; j++) {
            stage_cell<EXPAND>(s[j], m_wide, M, dst + (i + j) * 8, group_stride);
        }
    }
    for (int64_t i = n_wide; i < n; i++) {
        stage_cell<EXPAND>(data + (size_t) cell(i) * row_stride, 0, M, dst + i * 8, group_stride);
    }
}

// A code for every subspace, D / DSUB of them.
template <int TYPE, class CELL>
PQ_INLINE void stage_subspaces(const uint8_t * data, size_t row_stride, CELL cell, int64_t n, int64_t D, uint8_t * dst,
                               int64_t group_stride) {
    stage_cells<TYPE == PQ_TYPE_PQ3>(data, row_stride, cell, n, D / geom<TYPE>::DSUB, dst, group_stride);
}

PQ_INLINE uint32_t load_codes(const uint8_t * p, int n) { // n 2 or 4
    uint32_t w = (uint32_t) p[0] | (uint32_t) p[1] << 8;
    if (n == 4) {
        w |= (uint32_t) p[2] << 16 | (uint32_t) p[3] << 24;
    }
    return w;
}

// f16 [N_SUB][PQ_KSUB][DSUB] -> f32 [N_SUB * DSUB][PQ_KSUB]: element by element the centroids of a code of N_SUB subspaces
template <class W, int DSUB, int N_SUB>
PQ_INLINE void centroids_to_soa(const uint16_t * c, float * soa) {
    for (int s = 0; s < N_SUB; s++, c += PQ_KSUB * DSUB, soa += PQ_KSUB * DSUB) {
        for (int64_t i = 0; i < PQ_KSUB; i += W::N) {
            if constexpr (DSUB == 2) {
                typename W::T x, y;
                W::unzip(W::load_f16(c + 2 * i), W::load_f16(c + 2 * i + W::N), &x, &y);
                W::store(soa + i, x);
                W::store(soa + PQ_KSUB + i, y);
            } else {
                typename W::T xz0, yw0, xz1, yw1, x, y, z, w;
                W::unzip(W::load_f16(c + 4 * i),            W::load_f16(c + 4 * i +     W::N), &xz0, &yw0);
                W::unzip(W::load_f16(c + 4 * i + 2 * W::N), W::load_f16(c + 4 * i + 3 * W::N), &xz1, &yw1);
                W::unzip(xz0, xz1, &x, &z);
                W::unzip(yw0, yw1, &y, &w);
                W::store(soa + i, x);
                W::store(soa + PQ_KSUB + i, y);
                W::store(soa + 2 * PQ_KSUB + i, z);
                W::store(soa + 3 * PQ_KSUB + i, w);
            }
        }
    }
}

// ---- encode ----

// Nearest centroid of R points. The distance is (y0 - c0)^2 + (y1 - c1)^2 + ..., summed from the left without fusing. Every lane keeps the
// first of its equals, and the lanes are merged by the lowest index, so a tie goes to the lowest index.
// Points and centroids have N_SUB * DSUB elements. Centroids come as f32 [N_SUB * DSUB][ksub], or, with F16, as they lie in the
// codebook, [N_SUB][ksub][DSUB]: for one row conversion in passing is quicker.
template <int DSUB, int N_SUB, int R, bool F16>
PQ_INLINE void nearest(const float * y, int64_t y_stride, const void * centroids, int64_t ksub, uint8_t * code, int64_t code_stride,
                       float * dist) {
    constexpr int N = N_SUB * DSUB;
    V::T best[R], index[R], p[R][N];
    PQ_UNROLL
    for (int r = 0; r < R; r++) {
        best[r]  = V::set1(INFINITY);
        index[r] = V::zero();
        PQ_UNROLL
        for (int e = 0; e < N; e++) {
            p[r][e] = V::set1(y[r * y_stride + e]);
        }
    }
    V::T lane = F16 ? V::centroid_lanes<DSUB>() : V::iota();
    for (int64_t c = 0; c < ksub; c += V::N) {
        V::T x[N];
        if constexpr (F16) {
            PQ_UNROLL
            for (int s = 0; s < N_SUB; s++) {
                V::load_centroids<DSUB>((const uint16_t *) centroids + (s * ksub + c) * DSUB, x + s * DSUB);
            }
        } else {
            PQ_UNROLL
            for (int e = 0; e < N; e++) {
                x[e] = V::load((const float *) centroids + e * ksub + c);
            }
        }
        PQ_UNROLL
        for (int r = 0; r < R; r++) {
            V::T d = V::sub(p[r][0], x[0]);
            d = V::mul(d, d);
            PQ_UNROLL
            for (int e = 1; e < N; e++) {
                const V::T d_e = V::sub(p[r][e], x[e]);
                d = V::add(d, V::mul(d_e, d_e));
            }
            index[r] = V::if_lt(d, best[r], lane, index[r]);
            best[r]  = V::min(d, best[r]); // keeps `best` when d is NaN
        }
        lane = V::add(lane, V::set1((float) V::N));
    }
    PQ_UNROLL
    for (int r = 0; r < R; r++) {
        const float b = V::hmin(best[r]);
        const V::T  i = V::if_eq(best[r], V::set1(b), index[r], V::set1((float) PQ_KSUB));
        code[r * code_stride] = (uint8_t) V::hmin(i);
        if (dist) {
            dist[r] = b;
        }
    }
}

// codes [n][PQ_MAX_M]: one code of n rows
template <int DSUB, int N_SUB>
void encode_code(const float * y, int64_t ld, int64_t n, const uint16_t * centroids, float * soa, uint8_t * codes) {
    int64_t r = 0;
    if (n >= 4) {
        centroids_to_soa<V, DSUB, N_SUB>(centroids, soa);
        for (; r + 4 <= n; r += 4) {
            nearest<DSUB, N_SUB, 4, false>(y + r * ld, ld, soa, PQ_KSUB, codes + r * PQ_MAX_M, PQ_MAX_M, NULL);
        }
    }
    for (; r < n; r++) {
        nearest<DSUB, N_SUB, 1, true>(y + r * ld, ld, centroids, PQ_KSUB, codes + r * PQ_MAX_M, PQ_MAX_M, NULL);
    }
}

// y [n][ld] -> codes [n][PQ_MAX_M]
template <int TYPE>
void encode_nearest(const float * y, int64_t ld, int64_t n, int64_t D, const uint16_t * centroids, float * soa, uint8_t * codes) {
    constexpr int DSUB = geom<TYPE>::DSUB;
    const int64_t n_codes = D / 8 * geom<TYPE>::CODES;
    for (int64_t j = 0; j < n_codes; j++) {
        const int64_t    d = code_subspace<TYPE>(j, D) * DSUB;
        const uint16_t * c = centroids + d * PQ_KSUB;
        if (code_is_shared<TYPE>(j, D)) {
            encode_code<DSUB, geom<TYPE>::N_SHARE>(y + d, ld, n, c, soa, codes + j);
        } else {
            encode_code<DSUB, 1>(y + d, ld, n, c, soa, codes + j);
        }
    }
}

// Of a strip, with e the error of its codes and d the direction of queries (pq-layout.h, "Anisotropic codes"): the sums of e^2, e d, d^2
struct strip_sums {
    float ee, ed, dd;

    float cost() const { return ee + PQ_ANISO_WEIGHT * (ed * (ed / dd)); }
};

// codes: of a head; d0: the first element of the strip
template <int TYPE>
strip_sums sum_strip(const float * y, const uint8_t * codes, int64_t d0, int64_t D, const head_block & hb) {
    constexpr int DSUB = geom<TYPE>::DSUB;
    float a[3][PQ_ANISO_STRIP] = {};
    for (int64_t i = 0; i < PQ_ANISO_STRIP && d0 + i < D; i += 8) {
        uint32_t code = 0;
        for (int64_t m = 0; m < 8 / DSUB; m++) {
            code |= pq_code_get((enum pq_type) TYPE, (int32_t) D, codes, (int32_t) ((d0 + i) / DSUB + m)) << 8 * m;
        }
        const V8::T y_i = V8::load(y + d0 + i);
        const V8::T d   = V8::mul(V8::load(hb.aniso + d0 + i), y_i);
        const V8::T e   = V8::sub(y_i, V8::gather_f16<DSUB>(hb.centroids + (d0 + i) * PQ_KSUB, PQ_KSUB * DSUB, code));
        V8::store(a[0] + i, V8::mul(e, e));
        V8::store(a[1] + i, V8::mul(e, d));
        V8::store(a[2] + i, V8::mul(d, d));
    }
    for (int n = PQ_ANISO_STRIP / 2; n > 0; n /= 2) {
        for (int k = 0; k < 3; k++) {
            for (int i = 0; i < n; i++) {
                a[k][i] += a[k][i + n];
            }
        }
    }
    return { a[0][0], a[1][0], a[2][0] };
}

// s.codes are the nearest; moved [n][ld]: room
template <int TYPE>
void encode_aniso(const float * y, int64_t n, int64_t D, const head_block & hb, float * moved, const pq_encode_scratch & s) {
    constexpr int MAX_STRIPS = PQ_MAX_D / PQ_ANISO_STRIP;
    const int64_t ld = pq_padded(D), n_codes = D / 8 * geom<TYPE>::CODES;
    float cost[PQ_ROW_TILE][MAX_STRIPS];
    for (int64_t r = 0; r < n; r++) {
        for (int64_t d0 = 0; d0 < D; d0 += PQ_ANISO_STRIP) {
            const strip_sums sums = sum_strip<TYPE>(y + r * ld, s.codes + r * PQ_MAX_M, d0, D, hb);
            const float      step = PQ_ANISO_STEP * (sums.ed / sums.dd); // NaN without a direction, and then nothing costs less
            cost[r][d0 / PQ_ANISO_STRIP] = sums.cost();
            for (int64_t i = d0; i < d0 + PQ_ANISO_STRIP && i < D; i += 8) {
                const V8::T y_i = V8::load(y + r * ld + i);
                V8::store(moved + r * ld + i, V8::add(y_i, V8::mul(V8::set1(step), V8::mul(V8::load(hb.aniso + i), y_i))));
            }
        }
    }
    encode_nearest<TYPE>(moved, ld, n, D, hb.centroids, s.soa, s.moved_codes);
    for (int64_t r = 0; r < n; r++) {
        const uint8_t * from = s.moved_codes + r * PQ_MAX_M;
        uint8_t       * to   = s.codes + r * PQ_MAX_M;
        bool less[MAX_STRIPS];
        for (int64_t d0 = 0; d0 < D; d0 += PQ_ANISO_STRIP) {
            less[d0 / PQ_ANISO_STRIP] = sum_strip<TYPE>(y + r * ld, from, d0, D, hb).cost() < cost[r][d0 / PQ_ANISO_STRIP];
        }
        for (int64_t j = 0; j < n_codes; j++) {
            if (less[code_subspace<TYPE>(j, D) * geom<TYPE>::DSUB / PQ_ANISO_STRIP]) {
                to[j] = from[j];
            }
        }
    }
}

PQ_INLINE bool all_zero(const float * x, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        if (x[i] != 0.0f) {
            return false;
        }
    }
    return true;
}

template <int TYPE>
void encode_tile(const pq_encode_params * p, int64_t row0, int64_t n, int64_t head, const head_block & hb, const pq_encode_scratch & s) {
    const int64_t D = p->D, n_codes = D / 8 * geom<TYPE>::CODES, ld = pq_padded(D);

    for (int64_t r = 0; r < n; r++) {
        const uint8_t * src  = (const uint8_t *) p->x + (row0 + r) * p->x_row_stride + head * p->x_head_stride;
        const int64_t   slot = p->tail ? p->tail_idx[row0 + r] : -1;
        uint16_t * tail = slot < 0 ? NULL : (uint16_t *) (p->tail + slot * p->tail_row_stride) + head * D;
        float    * x    = s.x + r * ld;
        for (int64_t i = 0; i < D; i += 8) {
            const V8::H v = p->x_f16 ? V8::load_half((const uint16_t *) src + i) : V8::to_half(V8::load((const float *) src + i));
            if (tail) {
                V8::store_half(tail + i, v);
            }
            V8::store(x + i, V8::sub(V8::from_half(v), V8::load(hb.mu + i)));
        }
    }
    const float * y = s.x;
    if (hb.T) {
        gemm<true>(s.x, ld, n, hb.T, D, s.y, ld, D, D);
        y = s.y;
    }

    encode_nearest<TYPE>(y, ld, n, D, hb.centroids, s.soa, s.codes);
    if (!all_zero(hb.aniso, D)) {
        encode_aniso<TYPE>(y, n, D, hb, hb.T ? s.x : s.y, s);
    }

    for (int64_t r = 0; r < n; r++) {
        const int64_t cell = p->row_idx ? p->row_idx[row0 + r] : row0 + r;
        memcpy(p->codes + cell * p->codes_row_stride + head * n_codes, s.codes + r * PQ_MAX_M, (size_t) n_codes);
    }
}

void encode_item(const pq_encode_params * p, int64_t item, void * scratch) {
    pq_arena a = pq_arena_begin(scratch);
    const pq_encode_scratch s = pq_encode_carve(&a, p->D);
    const int64_t head = item % p->n_head_kv;
    const int64_t row0 = item / p->n_head_kv * PQ_ROW_TILE;
    const int64_t n    = pq_min(PQ_ROW_TILE, p->n_rows - row0);
    const head_block hb = get_head_block(p->D, p->has_transform, p->codebook, head);
    switch (p->type) {
        case PQ_TYPE_PQ4: encode_tile<PQ_TYPE_PQ4>(p, row0, n, head, hb, s); break;
        case PQ_TYPE_PQ3: encode_tile<PQ_TYPE_PQ3>(p, row0, n, head, hb, s); break;
        case PQ_TYPE_PQ2: encode_tile<PQ_TYPE_PQ2>(p, row0, n, head, hb, s); break;
        default: break;
    }
}

// ---- decode ----

// staged [groups][n_staged][8] -> y, 8 elements of cell t from element d on at y + t * t_stride + offset(d)
template <int TYPE, class OFFSET>
PQ_INLINE void decode_rows(const uint8_t * staged, int64_t n_staged, int64_t n, int64_t D, const uint16_t * centroids,
                           float * y, int64_t t_stride, OFFSET offset) {
    constexpr int DSUB = geom<TYPE>::DSUB;
    for (int64_t d = 0; d < D; d += 8) {
        const int64_t    m   = d / DSUB;
        const uint8_t  * src = staged + m / 8 * n_staged * 8 + m % 8;
        const uint16_t * c   = centroids + d * PQ_KSUB;
        float          * dst = y + offset(d);
        for (int64_t t = 0; t < n; t++) {
            V8::store(dst + t * t_stride, V8::gather_f16<DSUB>(c, PQ_KSUB * DSUB, load_codes(src + t * 8, 8 / DSUB)));
        }
    }
}

template <int TYPE>
void decode_tile(const pq_decode_params * p, int64_t row0, int64_t n, int64_t head, const head_block & hb, const pq_decode_scratch & s) {
    const int64_t D = p->D, ld = pq_padded(D);
    stage_subspaces<TYPE>(p->codes + row0 * p->codes_row_stride + head * pq_head_bytes(p->type, p->D), p->codes_row_stride,
                          [](int64_t i) { return i; }, n, D, s.staged, PQ_ROW_TILE * 8);
    decode_rows<TYPE>(s.staged, PQ_ROW_TILE, n, D, hb.centroids, s.y, ld, [](int64_t d) { return d; });
    const float * x = s.y;
    if (hb.T_inv) {
        gemm<false>(s.y, ld, n, hb.T_inv, D, s.x, ld, D, D);
        x = s.x;
    }
    for (int64_t r = 0; r < n; r++) {
        float * dst = (float *) ((uint8_t *) p->x + (row0 + r) * p->x_row_stride + head * p->x_head_stride);
        for (int64_t i = 0; i < D; i += 8) {
            V8::store(dst + i, V8::add(V8::load(x + r * ld + i), V8::load(hb.mu + i)));
        }
    }
}

void decode_item(const pq_decode_params * p, int64_t item, void * scratch) {
    pq_arena a = pq_arena_begin(scratch);
    const pq_decode_scratch s = pq_decode_carve(&a, p->D);
    const int64_t head = item % p->n_head_kv;
    const int64_t row0 = item / p->n_head_kv * PQ_ROW_TILE;
    const int64_t n    = pq_min(PQ_ROW_TILE, p->n_rows - row0);
    const head_block hb = get_head_block(p->D, p->has_transform, p->codebook, head);
    switch (p->type) {
        case PQ_TYPE_PQ4: decode_tile<PQ_TYPE_PQ4>(p, row0, n, head, hb, s); break;
        case PQ_TYPE_PQ3: decode_tile<PQ_TYPE_PQ3>(p, row0, n, head, hb, s); break;
        case PQ_TYPE_PQ2: decode_tile<PQ_TYPE_PQ2>(p, row0, n, head, hb, s); break;
        default: break;
    }
}

// ---- attention: what both shapes share ----

struct attn_item_ctx {
    const pq_attn_params * p;
    pq_attn_plan           pl;
    pq_attn_scratch        s;
    int64_t stream, head_kv;
    int64_t tok0, n_tok, n_rows; // of this block of query tokens

    // what the item attends to now: a chunk of the cache, or the tail
    pq_attn_side    k, v;
    const uint8_t * k_data;
    const uint8_t * v_data;
    head_block      k_block, v_block; // all NULL without codes
    const uint8_t * mask;
    size_t          mask_token_stride, mask_head_stride;
    int32_t         n_head_mask;
    int64_t         kv0, kv1;         // its cells
    int64_t         base;             // the item without its part
    bool            has_queries;      // s.qt and s.q_mu hold the queries for k
};

const uint16_t zero_row[PQ_MAX_D] = { 0 }; // stands in for rows that are not there, or may hold anything

// of a side without codes: rows are f16 and a multiple of 8 long, and need no conversion beforehand
PQ_INLINE bool is_f16(const pq_attn_side & side) { return side.type == PQ_TYPE_COUNT && !side.to_float; }

void f16_to_float(const void * src, float * dst, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        dst[i] = pq_f16_to_f32(((const uint16_t *) src)[i]);
    }
}

void use_side(const pq_attn_side & from, int64_t stream, int64_t head, pq_attn_side * side, const uint8_t ** data, head_block * block) {
    *side = from;
    *data = from.data + stream * from.stream_stride + head * from.head_stride;
    if (from.type == PQ_TYPE_COUNT) {
        *block = head_block();
        if (!from.to_float && from.D % 8 != 0) {
            side->to_float = f16_to_float;
        }
    } else {
        *block = get_head_block(from.D, from.has_transform, from.codebook, head);
    }
}

void attn_use(attn_item_ctx * c, const pq_attn_side & k, const pq_attn_side & v) {
    use_side(k, c->stream, c->head_kv, &c->k, &c->k_data, &c->k_block);
    use_side(v, c->stream, c->head_kv, &c->v, &c->v_data, &c->v_block);
    c->has_queries = false;
}

void attn_use_cache(attn_item_ctx * c, int64_t chunk) {
    const pq_attn_params * p = c->p;
    attn_use(c, p->k, p->v);
    c->n_head_mask       = p->n_head_mask;
    c->mask_token_stride = p->mask_token_stride;
    c->mask_head_stride  = p->mask_head_stride;
    c->mask              = p->mask ? p->mask + c->stream % p->n_stream_mask * p->mask_stream_stride : NULL;
    c->kv0               = chunk * c->pl.chunk;
    c->kv1               = pq_min(c->kv0 + c->pl.chunk, p->n_kv);
}

void attn_use_tail(attn_item_ctx * c) {
    const pq_attn_tail & t = c->p->tail;
    const pq_attn_side k = { PQ_TYPE_COUNT, c->p->k.D, NULL, 0, t.k, t.k_row_stride, t.k_head_stride, t.k_stream_stride, NULL };
    const pq_attn_side v = { PQ_TYPE_COUNT, c->p->v.D, NULL, 0, t.v, t.v_row_stride, t.v_head_stride, t.v_stream_stride, NULL };
    attn_use(c, k, v);
    c->n_head_mask       = 1;
    c->mask_token_stride = t.mask_token_stride;
    c->mask_head_stride  = 0;
    c->mask              = t.mask + c->stream * t.mask_stream_stride;
    c->kv0               = 0;
    c->kv1               = t.n;
}

PQ_INLINE int64_t row_tok (const attn_item_ctx * c, int64_t r) { return c->tok0 + r / c->pl.n_group; }
PQ_INLINE int64_t row_head(const attn_item_ctx * c, int64_t r) { return c->head_kv * c->pl.n_group + r % c->pl.n_group; }

PQ_INLINE const uint16_t * mask_row(const attn_item_ctx * c, int64_t r) {
    return (const uint16_t *) (c->mask + row_tok(c, r) * c->mask_token_stride + row_head(c, r) % c->n_head_mask * c->mask_head_stride);
}

// rows that share a row of the mask
PQ_INLINE int64_t rows_per_mask(const attn_item_ctx * c) { return c->n_head_mask == 1 ? c->pl.n_group : 1; }

// Starts an item for one stream, KV head and block of query tokens: sums that have seen no cell.
void attn_begin(attn_item_ctx * c, const pq_attn_params * p, int64_t base, void * scratch) {
    c->p  = p;
    c->pl = pq_attn_make_plan(p);
    pq_arena a = pq_arena_begin(scratch);
    c->s = pq_attn_carve(&a, &c->pl);

    const int64_t block = base % c->pl.n_block;
    c->base    = base;
    c->head_kv = base / c->pl.n_block % p->n_head_kv;
    c->stream  = base / c->pl.n_block / p->n_head_kv;
    c->tok0    = block * c->pl.n_tok;
    c->n_tok   = pq_min(c->pl.n_tok, p->n_q - c->tok0);
    c->n_rows  = c->n_tok * c->pl.n_group;

    const uint32_t n_head_log2 = 1u << (uint32_t) floor(log2((double) p->n_head));
    const float    m0 = powf(2.0f, -(p->max_bias       ) / n_head_log2);
    const float    m1 = powf(2.0f, -(p->max_bias / 2.0f) / n_head_log2);
    const int64_t  rows = pq_max(c->n_rows, c->pl.rp);
    for (int64_t r = 0; r < rows; r++) {
        c->s.m[r]     = -INFINITY;
        c->s.sum[r]   = 0.0f;
        c->s.slope[r] = 1.0f;
        if (r < c->n_rows && p->max_bias > 0.0f) {
            const uint32_t h = (uint32_t) row_head(c, r);
            c->s.slope[r] = h < n_head_log2 ? powf(m0, (float) (h + 1)) : powf(m1, (float) (2 * (h - n_head_log2) + 1));
        }
    }
    memset(c->s.o, 0, (size_t) (rows * c->pl.dv) * sizeof(float));
}

// Reads the queries, once there is a cell to meet, and maps them for coded K: q' = T^-1 q, so that q'.y = q.(x - mu).
void attn_queries(attn_item_ctx * c) {
    if (c->has_queries) {
        return;
    }
    c->has_queries = true;
    const bool map = c->k_block.T_inv != NULL;
    if (map && *c->s.mapped == c->base + 1) { // an item of the same queries was here before
        return;
    }
    *c->s.mapped = map ? c->base + 1 : 0;
    const pq_attn_params * p = c->p;
    const int64_t D = c->k.D, ld = c->pl.dk;
    const int64_t rows = pq_max(c->n_rows, c->pl.rp); // those past n_rows fill up a vector

    float * q = map ? c->s.q : c->s.qt;
    memset(q, 0, (size_t) (rows * ld) * sizeof(float));
    if (map) {
        memset(c->s.qt, 0, (size_t) (rows * ld) * sizeof(float));
    }
    memset(c->s.q_mu, 0, (size_t) rows * sizeof(float));
    for (int64_t r = 0; r < c->n_rows; r++) {
        memcpy(q + r * ld, p->q + row_tok(c, r) * p->q_token_stride + row_head(c, r) * p->q_head_stride + c->stream * p->q_stream_stride,
               (size_t) D * sizeof(float));
        if (c->k_block.mu) {
            V8::T sum = V8::zero();
            for (int64_t i = 0; i < D; i += 8) {
                sum = V8::madd(V8::load(q + r * ld + i), V8::load(c->k_block.mu + i), sum);
            }
            c->s.q_mu[r] = V8::hsum(sum);
        }
    }
    if (!map) {
        return;
    }
    const uint16_t * T_inv = c->k_block.T_inv;
    switch (c->pl.rp) {
        case 1:  map_few<1>(q, ld, T_inv, D, c->s.qt, ld); break;
        case 2:  map_few<2>(q, ld, T_inv, D, c->s.qt, ld); break;
        case 4:  map_few<4>(q, ld, T_inv, D, c->s.qt, ld); break;
        case 8:  map_few<8>(q, ld, T_inv, D, c->s.qt, ld); break;
        default:
            for (int64_t j = 0; j < D; j += PW) { // the last panel may reach into the padding of a row of s.qt
                transpose_f16([=](int64_t i) { return j + i < D ? T_inv + (j + i) * D : zero_row; }, PW, D, c->s.kt);
                gemm_panel<2, false>(q, ld, c->n_rows, c->s.kt, PW, c->s.qt + j, ld, D, false);
            }
            break;
    }
}

// Turns the sums of coded V, p y, into sums of p x: o T^-1 + mu times the sum of the weights.
void attn_map_back(attn_item_ctx * c) {
    const int64_t D = c->v.D, ld = c->pl.dv;
    const int64_t rows = pq_max(c->n_rows, c->pl.rp);
    bool empty = true;
    for (int64_t r = 0; r < c->n_rows; r++) {
        empty = empty && c->s.m[r] == -INFINITY;
    }
    if (c->v.type == PQ_TYPE_COUNT || empty) {
        return;
    }
    if (c->v_block.T_inv) {
        gemm<false>(c->s.o, ld, rows, c->v_block.T_inv, D, c->s.q, ld, D, D);
        float * mapped = c->s.q;
        c->s.q = c->s.o;
        c->s.o = mapped;
    }
    for (int64_t r = 0; r < c->n_rows; r++) {
        const V8::T sum = V8::set1(c->s.sum[r]);
        float * o = c->s.o + r * ld;
        for (int64_t i = 0; i < D; i += 8) {
            V8::store(o + i, V8::madd(sum, V8::load(c->v_block.mu + i), V8::load(o + i)));
        }
    }
}

// Adds the sinks, which have no value, and writes the result.
void attn_write(attn_item_ctx * c) {
    const pq_attn_params * p = c->p;
    for (int64_t r = 0; r < c->n_rows; r++) {
        float m = c->s.m[r], sum = c->s.sum[r], weight = 1.0f;
        const int64_t h = row_head(c, r);
        if (p->sinks) {
            const float sink = p->sinks[h];
            if (sink > m) {
                weight = expf(m - sink);
                sum    = sum * weight + 1.0f;
            } else if (m != -INFINITY) {
                sum += expf(sink - m);
            }
        }
        const float   inv = sum == 0.0f ? 0.0f : weight / sum;
        const float * o   = c->s.o + r * c->pl.dv;
        float       * dst = (float *) ((uint8_t *) p->dst + c->stream * p->dst_stream_stride + row_tok(c, r) * p->dst_token_stride
                                       + h * p->dst_head_stride);
        for (int64_t i = 0; i < p->v.D; i++) {
            dst[i] = o[i] * inv;
        }
    }
}

// A partial result, written by one item and merged by the reduce item of its base: max [n_rows] | sum [n_rows] | O [n_rows][dv]
void attn_save(const attn_item_ctx * c, float * part) {
    memcpy(part,                c->s.m,   (size_t) c->n_rows * sizeof(float));
    memcpy(part + c->pl.n_rows, c->s.sum, (size_t) c->n_rows * sizeof(float));
    memcpy(part + 2 * c->pl.n_rows, c->s.o, (size_t) (c->n_rows * c->pl.dv) * sizeof(float));
}

void attn_merge(attn_item_ctx * c, const float * part) {
    const int64_t ld = c->pl.dv;
    for (int64_t r = 0; r < c->n_rows; r++) {
        if (part[r] == -INFINITY) {
            continue;
        }
        const float m = c->s.m[r] > part[r] ? c->s.m[r] : part[r];
        const float f_old = expf(c->s.m[r] - m), f_new = expf(part[r] - m);
        float       * o     = c->s.o + r * ld;
        const float * o_new = part + 2 * c->pl.n_rows + r * ld;
        for (int64_t j = 0; j < ld; j += V::N) {
            V::store(o + j, V::madd(V::load(o_new + j), V::set1(f_new), V::mul(V::load(o + j), V::set1(f_old))));
        }
        c->s.m[r]   = m;
        c->s.sum[r] = c->s.sum[r] * f_old + part[c->pl.n_rows + r] * f_new;
    }
}

void attn_reduce_item(const pq_attn_params * p, int64_t item, void * partials, void * scratch) {
    attn_item_ctx ctx, * c = &ctx;
    attn_begin(c, p, item, scratch);
    attn_use_cache(c, 0);
    const float * parts = (const float *) partials + item * c->pl.n_part * c->pl.partial_floats;
    for (int64_t i = 0; i < c->pl.n_chunk; i++) {
        attn_merge(c, parts + i * c->pl.partial_floats);
    }
    attn_map_back(c);
    for (int64_t i = c->pl.n_chunk; i < c->pl.n_part; i++) { // the tail
        attn_merge(c, parts + i * c->pl.partial_floats);
    }
    attn_write(c);
}

template <class W>
PQ_INLINE typename W::T score_post(const pq_attn_params * p, typename W::T s, float scale) {
    s = W::mul(s, W::set1(scale));
    if (p->logit_softcap != 0.0f) {
        s = W::mul(W::set1(p->logit_softcap), vtanh<W>(s));
    }
    return s;
}

// ---- attention with many rows ----

template <int TYPE>
void load_k_tile(attn_item_ctx * c, int64_t cell0, int64_t n) {
    constexpr int DSUB = geom<TYPE>::DSUB;
    const int64_t D = c->k.D, M = D / DSUB;
    stage_subspaces<TYPE>(c->k_data, c->k.row_stride, [=](int64_t t) { return cell0 + pq_min(t, n - 1); }, // the mask takes repeats out
                          PQ_KV_TILE, D, c->s.staged, PQ_KV_TILE * 8);
    for (int64_t m = 0; m < M; m++) {
        const uint8_t  * src = c->s.staged + m / 8 * PQ_KV_TILE * 8 + m % 8;
        const uint16_t * cen = c->k_block.centroids + m * PQ_KSUB * DSUB;
        for (int64_t t = 0; t < PQ_KV_TILE; t += 8) {
            V8::T x[DSUB];
            V8::gather_cells<DSUB>(cen, src + t * 8, x);
            float * dst = c->s.kt + t / PW * D * PW + m * DSUB * PW + t % PW;
            PQ_UNROLL
            for (int e = 0; e < DSUB; e++) {
                V8::store(dst + e * PW, x[e]);
            }
        }
    }
}

template <int TYPE>
void load_v_tile(attn_item_ctx * c, int64_t cell0, int64_t n) {
    const int64_t D = c->v.D;
    stage_subspaces<TYPE>(c->v_data, c->v.row_stride, [=](int64_t t) { return cell0 + pq_min(t, n - 1); }, // weight 0 for repeats
                          PQ_KV_TILE, D, c->s.staged, PQ_KV_TILE * 8);
    decode_rows<TYPE>(c->s.staged, PQ_KV_TILE, PQ_KV_TILE, D, c->v_block.centroids, c->s.vt, PW,
                      [](int64_t d) { return d / PW * PQ_KV_TILE * PW + d % PW; });
}

// Of a side without codes, a cell that no row sees may hold anything, and 0 * NaN is not 0: it is read as zeros.
void load_plain_k_tile(attn_item_ctx * c, int64_t cell0, const bool * seen) {
    const int64_t D = c->k.D;
    auto row = [=](int64_t t) {
        return seen[t] ? (const uint16_t *) (c->k_data + (cell0 + t) * (int64_t) c->k.row_stride) : zero_row;
    };
    if (is_f16(c->k)) {
        transpose_f16(row, PQ_KV_TILE, D, c->s.kt);
        return;
    }
    for (int64_t t = 0; t < PQ_KV_TILE; t++) {
        if (seen[t]) {
            c->k.to_float(row(t), c->s.row, D);
        } else {
            memset(c->s.row, 0, (size_t) D * sizeof(float));
        }
        float * dst = c->s.kt + t / PW * D * PW + t % PW;
        for (int64_t d = 0; d < D; d++) {
            dst[d * PW] = c->s.row[d];
        }
    }
}

void load_plain_v_tile(attn_item_ctx * c, int64_t cell0, const bool * seen) {
    const int64_t D = c->v.D;
    for (int64_t t = 0; t < PQ_KV_TILE; t++) {
        const uint8_t * row = seen[t] ? c->v_data + (cell0 + t) * (int64_t) c->v.row_stride : (const uint8_t *) zero_row;
        if (is_f16(c->v)) {
            for (int64_t d = 0; d < D; d += 8) {
                V8::store(c->s.vt + (d / PW * PQ_KV_TILE + t) * PW + d % PW, V8::load_f16((const uint16_t *) row + d));
            }
            continue;
        }
        if (seen[t]) {
            c->v.to_float(row, c->s.row, D);
        } else {
            memset(c->s.row, 0, (size_t) D * sizeof(float));
        }
        for (int64_t d = 0; d < D; d += PW) {
            memcpy(c->s.vt + (d / PW * PQ_KV_TILE + t) * PW, c->s.row + d, (size_t) pq_min(PW, D - d) * sizeof(float));
        }
    }
}

// scores of a tile, s [rows][PQ_KV_TILE]; what stands past column n is finite and meaningless
void tile_scores(attn_item_ctx * c, int64_t cell0, int64_t n, const bool * seen) {
    const int64_t D = c->k.D;
    switch (c->k.type) {
        case PQ_TYPE_PQ4: load_k_tile<PQ_TYPE_PQ4>(c, cell0, n); break;
        case PQ_TYPE_PQ3: load_k_tile<PQ_TYPE_PQ3>(c, cell0, n); break;
        case PQ_TYPE_PQ2: load_k_tile<PQ_TYPE_PQ2>(c, cell0, n); break;
        default:          load_plain_k_tile(c, cell0, seen);     break;
    }
    for (int64_t t = 0; t < PQ_KV_TILE; t += PW) {
        gemm_panel<2, false>(c->s.qt, c->pl.dk, c->n_rows, c->s.kt + t * D, PW, c->s.s + t, PQ_KV_TILE, D, false);
    }
}

void tile_values(attn_item_ctx * c, int64_t cell0, int64_t n, const bool * seen) {
    switch (c->v.type) {
        case PQ_TYPE_PQ4: load_v_tile<PQ_TYPE_PQ4>(c, cell0, n); break;
        case PQ_TYPE_PQ3: load_v_tile<PQ_TYPE_PQ3>(c, cell0, n); break;
        case PQ_TYPE_PQ2: load_v_tile<PQ_TYPE_PQ2>(c, cell0, n); break;
        default:          load_plain_v_tile(c, cell0, seen);     break;
    }
    gemm_panels(c->s.s, PQ_KV_TILE, c->n_rows, c->s.vt, c->s.o, c->pl.dv, c->v.D, PQ_KV_TILE, true);
}

// Which of the n cells of a tile some row sees; those past n are not seen.
void tile_seen(const attn_item_ctx * c, int64_t cell0, int64_t n, bool * seen) {
    uint16_t any[PQ_KV_TILE] = { 0 }; // not zero: seen
    for (int64_t r = 0; c->mask && r < c->n_rows; r += rows_per_mask(c)) {
        const uint16_t * mask = mask_row(c, r) + cell0;
        for (int64_t t = 0; t < n; t++) {
            any[t] |= mask[t] ^ 0xfc00;
        }
    }
    for (int64_t t = 0; t < PQ_KV_TILE; t++) {
        seen[t] = t < n && (!c->mask || any[t] != 0);
    }
}

bool tile_is_masked(const attn_item_ctx * c, int64_t cell0, int64_t n) {
    for (int64_t r = 0; r < c->n_rows; r += rows_per_mask(c)) {
        const uint16_t * mask = mask_row(c, r) + cell0;
        int64_t t = 0;
        for (; t + 4 <= n; t += 4) {
            uint64_t w;
            memcpy(&w, mask + t, 8);
            if (w != 0xfc00fc00fc00fc00u) {
                return false;
            }
        }
        for (; t < n; t++) {
            if (mask[t] != 0xfc00) {
                return false;
            }
        }
    }
    return true;
}

// Online softmax of one tile: scores -> weights, in place; brings m, sum and o of each row up to date.
void tile_softmax(attn_item_ctx * c, int64_t cell0, int64_t n, float scale) {
    const pq_attn_params * p = c->p;
    for (int64_t r = 0; r < c->n_rows; r++) {
        float * s = c->s.s + r * PQ_KV_TILE;
        const uint16_t * mask = c->mask ? mask_row(c, r) + cell0 : NULL;
        uint16_t last[PQ_KV_TILE];
        if (n < PQ_KV_TILE) {
            for (int64_t t = 0; t < PQ_KV_TILE; t++) {
                last[t] = t >= n ? 0xfc00 : mask ? mask[t] : 0;
            }
            mask = last;
        }
        const V::T q_mu  = V::set1(c->s.q_mu[r]);
        const V::T slope = V::set1(c->s.slope[r]);
        V::T top = V::set1(-INFINITY);
        for (int64_t t = 0; t < PQ_KV_TILE; t += V::N) {
            V::T x = score_post<V>(p, V::add(V::load(s + t), q_mu), scale);
            if (mask) {
                x = V::madd(V::load_f16(mask + t), slope, x);
            }
            top = V::max(top, x);
            V::store(s + t, x);
        }
        const float m_old = c->s.m[r];
        const float tile  = V::hmax(top);
        const float m_new = tile > m_old ? tile : m_old;
        if (m_new == -INFINITY) { // this row has seen no cell yet
            memset(s, 0, PQ_KV_TILE * sizeof(float));
            continue;
        }
        const V::T m = V::set1(m_new);
        V::T sum = V::zero();
        for (int64_t t = 0; t < PQ_KV_TILE; t += V::N) {
            const V::T w = vexp<V>(V::sub(V::load(s + t), m));
            sum = V::add(sum, w);
            V::store(s + t, w);
        }
        if (m_new != m_old) {
            const float f = expf(m_old - m_new);
            float * o = c->s.o + r * c->pl.dv;
            for (int64_t d = 0; d < c->pl.dv; d += V::N) {
                V::store(o + d, V::mul(V::load(o + d), V::set1(f)));
            }
            c->s.sum[r] *= f;
            c->s.m[r]    = m_new;
        }
        c->s.sum[r] += V::hsum(sum);
    }
}

void attn_many_rows(attn_item_ctx * c, float scale) {
    for (int64_t cell = c->kv0; cell < c->kv1; cell += PQ_KV_TILE) {
        const int64_t n = pq_min(PQ_KV_TILE, c->kv1 - cell);
        if (c->mask && tile_is_masked(c, cell, n)) {
            continue;
        }
        bool seen[PQ_KV_TILE];
        if (c->k.type == PQ_TYPE_COUNT || c->v.type == PQ_TYPE_COUNT) {
            tile_seen(c, cell, n, seen);
        }
        attn_queries(c);
        tile_scores(c, cell, n, seen);
        tile_softmax(c, cell, n, scale);
        tile_values(c, cell, n, seen);
    }
}

// ---- attention with few rows ----

// Lists the cells that some row may see. Returns their number; *plain tells that no score needs an addition.
int64_t few_cells(attn_item_ctx * c, int64_t cell0, int64_t n, bool * plain) {
    int32_t * cells = c->s.cells;
    *plain = true;
    if (!c->mask) {
        for (int64_t t = 0; t < n; t++) {
            cells[t] = (int32_t) t;
        }
        return n;
    }
    const uint16_t * masks[PQ_FEW_ROWS];
    int n_masks = 0;
    for (int64_t r = 0; r < c->n_rows; r += rows_per_mask(c)) {
        masks[n_masks++] = mask_row(c, r) + cell0;
    }
    int64_t n_cells = 0;
    if (n_masks == 1) {
        uint32_t any = 0;
        for (int64_t t = 0; t < n; t++) {
            const uint16_t w    = masks[0][t];
            const bool     live = w != 0xfc00;
            cells[n_cells] = (int32_t) t;
            n_cells += live;
            any     |= live ? w & 0x7fffu : 0u;
        }
        *plain = any == 0;
        return n_cells;
    }
    for (int64_t t = 0; t < n; t++) {
        bool live = false;
        for (int i = 0; i < n_masks; i++) {
            live = live || masks[i][t] != 0xfc00;
        }
        cells[n_cells] = (int32_t) t;
        n_cells += live;
    }
    *plain = false;
    return n_cells;
}

// table [PQ_KSUB][RP] = inner products of RP query slices (qt + r * ld) with all centroids, f32 [N][PQ_KSUB], of a code of N elements
template <int N, int RP>
PQ_INLINE void few_build_table(const float * soa, const float * qt, int64_t ld, float * table) {
    if constexpr (RP == 8) {
        V8::T q[N];
        for (int e = 0; e < N; e++) {
            float lanes[8];
            for (int r = 0; r < 8; r++) {
                lanes[r] = qt[r * ld + e];
            }
            q[e] = V8::load(lanes);
        }
        for (int64_t i = 0; i < PQ_KSUB; i++) {
            V8::T x = V8::mul(q[0], V8::set1(soa[i]));
            PQ_UNROLL
            for (int e = 1; e < N; e++) {
                x = V8::madd(q[e], V8::set1(soa[e * PQ_KSUB + i]), x);
            }
            V8::store(table + 8 * i, x);
        }
    } else {
        for (int64_t i = 0; i < PQ_KSUB; i += 8) {
            V8::T x[RP];
            PQ_UNROLL
            for (int r = 0; r < RP; r++) {
                x[r] = V8::mul(V8::set1(qt[r * ld]), V8::load(soa + i));
                PQ_UNROLL
                for (int e = 1; e < N; e++) {
                    x[r] = V8::madd(V8::set1(qt[r * ld + e]), V8::load(soa + e * PQ_KSUB + i), x[r]);
                }
            }
            if constexpr (RP == 1) {
                V8::store(table + i, x[0]);
            } else if constexpr (RP == 2) {
                V8::T lo, hi;
                V8::zip(x[0], x[1], &lo, &hi);
                V8::store(table + 2 * i, lo);
                V8::store(table + 2 * i + 8, hi);
            } else {
                V8::T a_lo, a_hi, b_lo, b_hi, lo, hi;
                V8::zip(x[0], x[2], &a_lo, &a_hi);
                V8::zip(x[1], x[3], &b_lo, &b_hi);
                V8::zip(a_lo, b_lo, &lo, &hi);
                V8::store(table + 4 * i, lo);
                V8::store(table + 4 * i + 8, hi);
                V8::zip(a_hi, b_hi, &lo, &hi);
                V8::store(table + 4 * i + 16, lo);
                V8::store(table + 4 * i + 24, hi);
            }
        }
    }
}

// s [n][RP] += q'.y
template <int TYPE, int RP>
void few_scores_coded(attn_item_ctx * c, int64_t n) {
    constexpr int DSUB   = geom<TYPE>::DSUB;
    constexpr int N_SHARE = geom<TYPE>::N_SHARE;
    constexpr int NB     = RP <= 2 ? 8 : 4; // codes per pass: their tables should fit into the L1 cache
    const int64_t n_codes = c->k.D / 8 * geom<TYPE>::CODES, ld = c->pl.dk;
    const int32_t * cells = c->s.cells;
    stage_cells<false>(c->k_data, c->k.row_stride, [=](int64_t i) { return (int64_t) cells[i]; }, n, n_codes, c->s.staged, PQ_KV_SEG_STRIDE);
    for (int64_t j0 = 0; j0 < n_codes; j0 += NB) {
        for (int64_t j = 0; j < NB; j++) {
            float * table = c->s.table + j * PQ_KSUB * RP;
            if (j0 + j >= n_codes) {
                memset(table, 0, PQ_KSUB * RP * sizeof(float));
                continue;
            }
            const int64_t    d   = code_subspace<TYPE>(j0 + j, c->k.D) * DSUB;
            const uint16_t * cen = c->k_block.centroids + d * PQ_KSUB;
            if (code_is_shared<TYPE>(j0 + j, c->k.D)) {
                centroids_to_soa<V8, DSUB, N_SHARE>(cen, c->s.soa);
                few_build_table<DSUB * N_SHARE, RP>(c->s.soa, c->s.qt + d, ld, table);
            } else {
                centroids_to_soa<V8, DSUB, 1>(cen, c->s.soa);
                few_build_table<DSUB, RP>(c->s.soa, c->s.qt + d, ld, table);
            }
        }
        const uint8_t * codes = c->s.staged + j0 / 8 * PQ_KV_SEG_STRIDE + j0 % 8;
        for (int64_t i = 0; i < n; i++) {
            V8::table_add<RP, NB>(c->s.table, PQ_KSUB * RP, codes + i * 8, c->s.s + i * RP);
        }
    }
}

PQ_INLINE const uint8_t * few_row(const attn_item_ctx * c, const pq_attn_side & side, const uint8_t * data, int64_t i) {
    return data + (size_t) c->s.cells[i] * side.row_stride;
}

// s [n][RP] = q.k of f16 rows
template <int RP>
void few_scores_f16(attn_item_ctx * c, int64_t n) {
    constexpr int NC = 8 / RP; // cells at once: the sums of NC cells and RP rows fill one vector
    for (int64_t i = 0; i < n; i += NC) {
        const uint16_t * k[NC];
        PQ_UNROLL
        for (int j = 0; j < NC; j++) {
            k[j] = (const uint16_t *) few_row(c, c->k, c->k_data, pq_min(i + j, n - 1));
        }
        V8::T sum[8];
        PQ_UNROLL
        for (int j = 0; j < 8; j++) {
            sum[j] = V8::zero();
        }
        for (int64_t d = 0; d < c->k.D; d += 8) {
            V8::T q[RP];
            PQ_UNROLL
            for (int r = 0; r < RP; r++) {
                q[r] = V8::load(c->s.qt + r * c->pl.dk + d);
            }
            PQ_UNROLL
            for (int j = 0; j < NC; j++) {
                const V8::T x = V8::load_f16(k[j] + d);
                PQ_UNROLL
                for (int r = 0; r < RP; r++) {
                    sum[j * RP + r] = V8::madd(q[r], x, sum[j * RP + r]);
                }
            }
        }
        V8::store(c->s.s + i * RP, V8::hsum_8(sum));
    }
}

template <int RP>
void few_scores(attn_item_ctx * c, int64_t n) {
    if (is_f16(c->k)) {
        few_scores_f16<RP>(c, n);
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        for (int r = 0; r < RP; r++) {
            c->s.s[i * RP + r] = c->s.q_mu[r];
        }
    }
    switch (c->k.type) {
        case PQ_TYPE_PQ4: few_scores_coded<PQ_TYPE_PQ4, RP>(c, n); return;
        case PQ_TYPE_PQ3: few_scores_coded<PQ_TYPE_PQ3, RP>(c, n); return;
        case PQ_TYPE_PQ2: few_scores_coded<PQ_TYPE_PQ2, RP>(c, n); return;
        default: break;
    }
    memset(c->s.row, 0, (size_t) c->pl.dk * sizeof(float));
    for (int64_t i = 0; i < n; i++) {
        c->k.to_float(few_row(c, c->k, c->k_data, i), c->s.row, c->k.D);
        for (int r = 0; r < RP; r++) {
            V8::T sum = V8::zero();
            for (int64_t d = 0; d < c->k.D; d += 8) {
                sum = V8::madd(V8::load(c->s.qt + r * c->pl.dk + d), V8::load(c->s.row + d), sum);
            }
            c->s.s[i * RP + r] = V8::hsum(sum);
        }
    }
}

// The centroids of 8 elements in f32: as they lie in the codebook, but the subspaces that share a code side by side
template <int TYPE>
PQ_INLINE void few_build_centroids(const uint16_t * cen, float * table) {
    constexpr int64_t n_own = geom<TYPE>::N_SHARE == 2 ? 4 * PQ_KSUB : 8 * PQ_KSUB;
    for (int64_t i = 0; i < n_own; i += 8) {
        V8::store(table + i, V8::load_f16(cen + i));
    }
    for (int64_t i = n_own; i < 8 * PQ_KSUB; i += 16) {
        const uint16_t * a = cen + n_own + (i - n_own) / 2;
        V8::T lo, hi;
        V8::zip_f16_pairs(a, a + 2 * PQ_KSUB, &lo, &hi);
        V8::store(table + i, lo);
        V8::store(table + i + 8, hi);
    }
}

// o += s [n][RP] * y
template <int TYPE, int RP>
void few_values_coded(attn_item_ctx * c, int64_t n) {
    constexpr int DSUB = geom<TYPE>::DSUB;
    constexpr int NV   = RP <= 4 ? 2 : 1; // vectors of 8 elements per pass: RP * NV sums in registers
    const int64_t D = c->v.D;
    const int32_t * cells = c->s.cells;
    stage_subspaces<TYPE>(c->v_data, c->v.row_stride, [=](int64_t i) { return (int64_t) cells[i]; }, n, D, c->s.staged, PQ_KV_SEG_STRIDE);
    for (int64_t d0 = 0; d0 < D; d0 += 8 * NV) {
        const int64_t    m0 = d0 / DSUB;
        for (int64_t j = 0; j < NV; j++) {
            float * table = c->s.table + 8 * j * PQ_KSUB;
            if (d0 + 8 * j < D) {
                few_build_centroids<TYPE>(c->v_block.centroids + (d0 + 8 * j) * PQ_KSUB, table);
            } else {
                memset(table, 0, 8 * PQ_KSUB * sizeof(float));
            }
        }
        const uint8_t * codes = c->s.staged + m0 / 8 * PQ_KV_SEG_STRIDE + m0 % 8;
        V8::T o[RP][NV];
        PQ_UNROLL
        for (int r = 0; r < RP; r++) {
            PQ_UNROLL
            for (int j = 0; j < NV; j++) {
                o[r][j] = V8::load(c->s.o + r * c->pl.dv + d0 + 8 * j);
            }
        }
        for (int64_t i = 0; i < n; i++) {
            V8::T y[NV];
            PQ_UNROLL
            for (int j = 0; j < NV; j++) {
                y[j] = V8::gather<geom<TYPE>::CODES>(c->s.table + 8 * j * PQ_KSUB, load_codes(codes + i * 8 + j * (8 / DSUB), 8 / DSUB));
            }
            PQ_UNROLL
            for (int r = 0; r < RP; r++) {
                const V8::T w = V8::set1(c->s.s[i * RP + r]);
                PQ_UNROLL
                for (int j = 0; j < NV; j++) {
                    o[r][j] = V8::madd(w, y[j], o[r][j]);
                }
            }
        }
        PQ_UNROLL
        for (int r = 0; r < RP; r++) {
            PQ_UNROLL
            for (int j = 0; j < NV; j++) {
                V8::store(c->s.o + r * c->pl.dv + d0 + 8 * j, o[r][j]);
            }
        }
    }
}

// the same with f16 rows, NV vectors of 8 elements from d0 on
template <int RP, int NV>
PQ_INLINE void few_values_f16(attn_item_ctx * c, int64_t d0, int64_t n) {
    V8::T o[RP][NV];
    PQ_UNROLL
    for (int r = 0; r < RP; r++) {
        PQ_UNROLL
        for (int j = 0; j < NV; j++) {
            o[r][j] = V8::load(c->s.o + r * c->pl.dv + d0 + 8 * j);
        }
    }
    for (int64_t i = 0; i < n; i++) {
        const uint16_t * row = (const uint16_t *) few_row(c, c->v, c->v_data, i) + d0;
        V8::T x[NV];
        PQ_UNROLL
        for (int j = 0; j < NV; j++) {
            x[j] = V8::load_f16(row + 8 * j);
        }
        PQ_UNROLL
        for (int r = 0; r < RP; r++) {
            const V8::T w = V8::set1(c->s.s[i * RP + r]);
            PQ_UNROLL
            for (int j = 0; j < NV; j++) {
                o[r][j] = V8::madd(w, x[j], o[r][j]);
            }
        }
    }
    PQ_UNROLL
    for (int r = 0; r < RP; r++) {
        PQ_UNROLL
        for (int j = 0; j < NV; j++) {
            V8::store(c->s.o + r * c->pl.dv + d0 + 8 * j, o[r][j]);
        }
    }
}

template <int RP>
void few_values(attn_item_ctx * c, int64_t n) {
    const int64_t D = c->v.D;
    switch (c->v.type) {
        case PQ_TYPE_PQ4: few_values_coded<PQ_TYPE_PQ4, RP>(c, n); return;
        case PQ_TYPE_PQ3: few_values_coded<PQ_TYPE_PQ3, RP>(c, n); return;
        case PQ_TYPE_PQ2: few_values_coded<PQ_TYPE_PQ2, RP>(c, n); return;
        default: break;
    }
    if (is_f16(c->v)) {
        constexpr int NV = 8 / RP; // RP * NV sums in registers
        int64_t d = 0;
        for (; d + 8 * NV <= D; d += 8 * NV) {
            few_values_f16<RP, NV>(c, d, n);
        }
        for (; d < D; d += 8) {
            few_values_f16<RP, 1>(c, d, n);
        }
        return;
    }
    memset(c->s.row, 0, (size_t) c->pl.dv * sizeof(float));
    for (int64_t i = 0; i < n; i++) {
        c->v.to_float(few_row(c, c->v, c->v_data, i), c->s.row, D);
        for (int r = 0; r < RP; r++) {
            const V8::T w = V8::set1(c->s.s[i * RP + r]);
            float * o = c->s.o + r * c->pl.dv;
            for (int64_t d = 0; d < D; d += 8) {
                V8::store(o + d, V8::madd(w, V8::load(c->s.row + d), V8::load(o + d)));
            }
        }
    }
}

// The scores of all rows lie interleaved, [n][RP] with RP a divisor of 8: lane l of a vector belongs to row l % RP.
template <int RP>
void few_softmax(attn_item_ctx * c, int64_t cell0, int64_t n, bool plain, float scale) {
    const pq_attn_params * p = c->p;
    float * s = c->s.s;
    const int64_t n_s   = n * RP;
    const int64_t n_pad = pq_round_up(n_s, 8);

    float * bias = NULL;
    if (!plain) {
        bias = c->s.bias;
        for (int r = 0; r < RP; r++) {
            if (r < c->n_rows) {
                const uint16_t * mask = mask_row(c, r) + cell0;
                for (int64_t i = 0; i < n; i++) {
                    bias[i * RP + r] = c->s.slope[r] * pq_f16_to_f32(mask[c->s.cells[i]]);
                }
            } else {
                for (int64_t i = 0; i < n; i++) {
                    bias[i * RP + r] = 0.0f;
                }
            }
        }
        for (int64_t i = n_s; i < n_pad; i++) {
            bias[i] = 0.0f;
        }
    }
    for (int64_t i = n_s; i < n_pad; i++) {
        s[i] = 0.0f;
    }

    V8::T top = V8::set1(-INFINITY);
    float lanes[8];
    for (int64_t i = 0; i < n_pad; i += 8) {
        V8::T x = score_post<V8>(p, V8::load(s + i), scale);
        if (bias) {
            x = V8::add(x, V8::load(bias + i));
        }
        V8::store(s + i, x);
        if (i + 8 <= n_s) {
            top = V8::max(top, x);
        }
    }
    V8::store(lanes, top);
    for (int64_t i = n_s / 8 * 8; i < n_s; i++) {
        lanes[i % 8] = s[i] > lanes[i % 8] ? s[i] : lanes[i % 8];
    }
    for (int64_t i = n_s; i < n_pad; i++) {
        s[i] = -INFINITY;
    }

    float shift[8];
    for (int r = 0; r < RP; r++) {
        const float m_old = c->s.m[r];
        float m_new = m_old;
        for (int l = r; l < 8; l += RP) {
            m_new = lanes[l] > m_new ? lanes[l] : m_new;
        }
        if (m_new != m_old) {
            const float f = expf(m_old - m_new);
            float * o = c->s.o + r * c->pl.dv;
            for (int64_t d = 0; d < c->pl.dv; d += 8) {
                V8::store(o + d, V8::mul(V8::load(o + d), V8::set1(f)));
            }
            c->s.sum[r] *= f;
            c->s.m[r]    = m_new;
        }
        for (int l = r; l < 8; l += RP) {
            shift[l] = m_new == -INFINITY ? 0.0f : m_new; // a row that has seen no cell: keeps -inf - m from being NaN
        }
    }

    const V8::T m = V8::load(shift);
    V8::T sum = V8::zero();
    for (int64_t i = 0; i < n_pad; i += 8) {
        const V8::T w = vexp<V8>(V8::sub(V8::load(s + i), m));
        sum = V8::add(sum, w);
        V8::store(s + i, w);
    }
    V8::store(lanes, sum);
    for (int l = 0; l < 8; l++) {
        c->s.sum[l % RP] += lanes[l];
    }
}

template <int RP>
void attn_few_rows(attn_item_ctx * c, float scale) {
    const uint8_t * k_data = c->k_data;
    const uint8_t * v_data = c->v_data;
    for (int64_t cell = c->kv0; cell < c->kv1; cell += PQ_KV_SEG) {
        bool plain;
        const int64_t n = few_cells(c, cell, pq_min(PQ_KV_SEG, c->kv1 - cell), &plain);
        if (n == 0) {
            continue;
        }
        c->k_data = k_data + cell * c->k.row_stride;
        c->v_data = v_data + cell * c->v.row_stride;
        attn_queries(c);
        few_scores<RP>(c, n);
        few_softmax<RP>(c, cell, n, plain, scale);
        few_values<RP>(c, n);
    }
}

void attn_run(attn_item_ctx * c) {
    const pq_attn_params * p = c->p;
    const float scale = p->logit_softcap != 0.0f ? p->scale / p->logit_softcap : p->scale;
    switch (c->pl.rp) {
        case 1:  attn_few_rows<1>(c, scale); break;
        case 2:  attn_few_rows<2>(c, scale); break;
        case 4:  attn_few_rows<4>(c, scale); break;
        case 8:  attn_few_rows<8>(c, scale); break;
        default: attn_many_rows(c, scale);   break;
    }
}

void attn_item(const pq_attn_params * p, int64_t item, void * partials, void * scratch) {
    attn_item_ctx ctx, * c = &ctx;
    const int64_t n_part = pq_attn_make_plan(p).n_part;
    const int64_t part   = item % n_part;
    attn_begin(c, p, item / n_part, scratch);
    if (part < c->pl.n_chunk) {
        attn_use_cache(c, part);
        attn_run(c);
    }
    if (n_part == 1) {
        attn_map_back(c);
    }
    if (p->tail.n > 0 && part == n_part - 1) {
        attn_use_tail(c);
        attn_run(c);
    }
    if (n_part == 1) {
        attn_write(c);
    } else {
        attn_save(c, (float *) partials + item * c->pl.partial_floats);
    }
}

// ---- k-means ----

// Nearest centroids of R * V::N points, one per lane, by the score |c|^2 / 2 - x.c, which takes one operation per element where the distance
// takes two or three. Centroids come in groups of V::N; a point gets the group with the least score, and a bound: where one
// score of the group is within it and no other, that centroid is the one that nearest() finds. Infinity: another group may have it.
//
// The bound is what rounding can do. With u = 2^-24 and r = |x| + max |c|, a score is off by at most 2 DSUB u r^2 / 2, and half a distance,
// as nearest() sums it, by (DSUB + 2) u r^2 / 2. Each counts twice; two more u are for terms of second order, and 2^-126 is for subnormals.
//
// x f32 [DSUB][R * V::N]; centroids f32 [n_groups * V::N][DSUB + 1], the last element being |c|^2 / 2; group, bound f32 [R * V::N]
template <int DSUB, int R>
PQ_INLINE void nearest_groups(const float * x, const float * centroids, int64_t n_groups, float c_max, float * group, float * bound) {
    V::T minus_x[R][DSUB], best[R], second[R], index[R];
    PQ_UNROLL
    for (int r = 0; r < R; r++) {
        best[r]  = second[r] = V::set1(INFINITY);
        index[r] = V::zero();
        PQ_UNROLL
        for (int e = 0; e < DSUB; e++) {
            minus_x[r][e] = V::sub(V::zero(), V::load(x + (e * R + r) * V::N));
        }
    }
    for (int64_t g = 0; g < n_groups; g++) {
        V::T least[R];
        PQ_UNROLL
        for (int r = 0; r < R; r++) {
            least[r] = V::set1(INFINITY);
        }
        PQ_NO_UNROLL // else the points do not stay in registers
        for (int c = 0; c < V::N; c++, centroids += DSUB + 1) {
            PQ_UNROLL
            for (int r = 0; r < R; r++) {
                V::T score = V::set1(centroids[DSUB]);
                PQ_UNROLL
                for (int e = 0; e < DSUB; e++) {
                    score = V::madd(minus_x[r][e], V::set1(centroids[e]), score);
                }
                least[r] = V::min(score, least[r]); // keeps `least` when the score is NaN
            }
        }
        PQ_UNROLL
        for (int r = 0; r < R; r++) {
            second[r] = V::min(second[r], V::max(best[r], least[r]));
            index[r]  = V::if_lt(least[r], best[r], V::set1((float) g), index[r]);
            best[r]   = V::min(best[r], least[r]);
        }
    }
    PQ_UNROLL
    for (int r = 0; r < R; r++) {
        V::T r2 = V::set1(c_max);
        PQ_UNROLL
        for (int e = 0; e < DSUB; e++) {
            r2 = V::madd(minus_x[r][e], minus_x[r][e], r2);
        }
        r2 = V::add(r2, r2); // (|x| + max |c|)^2 <= 2 (|x|^2 + max |c|^2)
        const V::T limit = V::add(best[r], V::madd(r2, V::set1((3 * DSUB + 4) * 0x1p-24f), V::set1(0x1p-126f)));
        V::store(bound + r * V::N, V::if_lt(limit, second[r], limit, V::set1(INFINITY)));
        V::store(group + r * V::N, index[r]);
    }
}

template <int DSUB>
void kmeans_assign_dsub(const float * x, int64_t n, int64_t x_stride, const float * centroids, int32_t ksub, uint8_t * codes,
                        float * dists, double * sums, int64_t * counts, double * costs) {
    constexpr int R      = 8 / DSUB; // of AVX2's 16 registers 8 hold points, R minima, and the others a centroid
    constexpr int POINTS = R * V::N;
    float rows[PQ_KSUB * (DSUB + 1)];    // [ksub][DSUB + 1], for nearest_groups()
    float columns[PQ_KSUB * (DSUB + 1)]; // the same, [n_groups][DSUB + 1][V::N]
    const int64_t n_groups = pq_round_up(ksub, V::N) / V::N;
    float c_max = 0.0f;
    for (int64_t c = 0; c < n_groups * V::N; c++) {
        float row[DSUB + 1];
        float cc = 0.0f;
        for (int e = 0; e < DSUB; e++) {
            row[e] = c < ksub ? centroids[c * DSUB + e] : 0.0f;
            cc    += row[e] * row[e];
        }
        row[DSUB] = c < ksub ? 0.5f * cc : INFINITY; // never nearer than anything
        c_max     = cc > c_max ? cc : c_max;
        for (int e = 0; e <= DSUB; e++) {
            rows[c * (DSUB + 1) + e] = row[e];
            columns[(c / V::N * (DSUB + 1) + e) * V::N + c % V::N] = e < DSUB && c >= ksub ? INFINITY : row[e];
        }
    }
    memset(sums,   0, (size_t) ksub * DSUB * sizeof(double));
    memset(counts, 0, (size_t) ksub * sizeof(int64_t));
    memset(costs,  0, (size_t) ksub * sizeof(double));
    for (int64_t i0 = 0; i0 < n; i0 += POINTS) {
        float lanes[DSUB * POINTS], group[POINTS], bound[POINTS];
        for (int64_t i = 0; i < POINTS; i++) {
            const float * point = x + pq_min(i0 + i, n - 1) * x_stride;
            for (int e = 0; e < DSUB; e++) {
                lanes[e * POINTS + i] = point[e];
            }
        }
        nearest_groups<DSUB, R>(lanes, rows, n_groups, c_max, group, bound);
        for (int64_t i = 0; i < pq_min(POINTS, n - i0); i++) {
            const float * point = x + (i0 + i) * x_stride;
            const float * in    = columns + (int64_t) group[i] * (DSUB + 1) * V::N;
            V::T score = V::load(in + DSUB * V::N);
            PQ_UNROLL
            for (int e = 0; e < DSUB; e++) {
                score = V::madd(V::set1(-point[e]), V::load(in + e * V::N), score);
            }
            const uint32_t within = V::mask_le(score, V::set1(bound[i]));
            int   code;
            float dist;
            if (within != 0 && (within & (within - 1)) == 0) {
                const int lane = pq_lowest_bit(within);
                code = (int) group[i] * V::N + lane;
                for (int e = 0; e < DSUB; e++) {
                    const float d = point[e] - in[e * V::N + lane];
                    dist = e == 0 ? d * d : dist + d * d;
                }
            } else {
                code = 0;
                dist = INFINITY;
                for (int64_t g = 0; g < n_groups; g++) {
                    uint8_t code_g;
                    float   dist_g;
                    nearest<DSUB, 1, 1, false>(point, x_stride, columns + g * (DSUB + 1) * V::N, V::N, &code_g, 1, &dist_g);
                    if (dist_g < dist) {
                        dist = dist_g;
                        code = (int) g * V::N + code_g;
                    }
                }
            }
            for (int e = 0; e < DSUB; e++) {
                sums[code * DSUB + e] += point[e];
            }
            counts[code]++;
            costs[code] += dist;
            if (codes) {
                codes[i0 + i] = (uint8_t) code;
            }
            if (dists) {
                dists[i0 + i] = dist;
            }
        }
    }
}

void kmeans_assign(const float * x, int64_t n, int64_t x_stride, int32_t dsub, const float * centroids, int32_t ksub, uint8_t * codes,
                   float * dists, double * sums, int64_t * counts, double * costs) {
    const auto run = dsub == 2 ? kmeans_assign_dsub<2> : kmeans_assign_dsub<4>;
    run(x, n, x_stride, centroids, ksub, codes, dists, sums, counts, costs);
}

const pq_kernels table = { PQ_TABLE_NAME, encode_item, decode_item, attn_item, attn_reduce_item, kmeans_assign };

} // namespace
