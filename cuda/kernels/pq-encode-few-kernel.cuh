// Encode a few rows (token generation), where latency counts: a group of 128 threads takes one head of one side, a strip of 32 of its
// elements (whole codes) and up to 8 rows. A kernel of its own does it (pq-encode.cu), or groups inside the
// attention kernel of the same step (pq-encode-group.cuh).
//
// Codes are bit-identical with the CPU's: x is rounded to f16, each element of y is one chain of fused multiply-adds over
// k = 0, 1, ..., a distance is a sum of squares from the left without fusing, and the lowest index wins a tie.
#pragma once

#include "../pq/pq-params.h"
#include "pq-cuda-common.cuh"
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
        sides.side[i].layout     = pq_get_codebook_layout(params[i].D, params[i].has_transform);
        sides.side[i].head_bytes = pq_head_bytes(params[i].type, params[i].D);
    }
    return sides;
}

// Codes of a strip, the shared ones last, as they lie in the cache: each stands for the elements from place() on.
template <int TYPE> struct pq_encode_geom {
    static constexpr int N_SHARED = TYPE == PQ_TYPE_PQ3 ? PQ_ENCODE_STRIP / 8 : 0;
    static constexpr int N_OWN    = (PQ_ENCODE_STRIP - 4 * N_SHARED) / (TYPE == PQ_TYPE_PQ2 ? 4 : 2);
    static constexpr int N_CODES  = N_OWN + N_SHARED;

    static __host__ __device__ constexpr bool is_shared(int code) { return code >= N_OWN; }

    static __host__ __device__ constexpr int code_of(int element) {
        return TYPE == PQ_TYPE_PQ4 ? element / 2 : TYPE == PQ_TYPE_PQ2 ? element / 4 : element % 8 < 4 ? element / 8 * 2 + element % 4 / 2 : N_OWN + element / 8;
    }

    static __host__ __device__ constexpr int place(int code) {
        return TYPE == PQ_TYPE_PQ4 ? 2 * code : TYPE == PQ_TYPE_PQ2 ? 4 * code : is_shared(code) ? (code - N_OWN) * 8 + 4 : code / 2 * 8 + code % 2 * 2;
    }
};

struct pq_encode_head {
    const float  * mu;
    const float  * aniso;
    const __half * T; // NULL: identity
    const __half * centroids;
};

__device__ __forceinline__ pq_encode_head pq_encode_get_head(const pq_encode_side & side, int head) {
    const uint8_t * block = side.p.codebook + (size_t) head * side.layout.head_bytes;
    pq_encode_head h;
    h.mu        = (const float *) (block + side.layout.mu);
    h.aniso     = (const float *) (block + side.layout.aniso);
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

// The first square is not added to 0: that would leave it as it is, but the compiler cannot know.
// follows: other elements of the code come first, and have come to `before`
template <int DIMS>
__device__ __forceinline__ float pq_encode_distance(const float (&y)[DIMS], const float (&c)[DIMS], bool follows = false, float before = 0.0f) {
    float d = 0.0f;
#pragma unroll
    for (int e = 0; e < DIMS; e++) {
        const float d_e = __fsub_rn(y[e], c[e]), square = __fmul_rn(d_e, d_e);
        d = e > 0 ? __fadd_rn(d, square) : follows ? __fadd_rn(before, square) : square;
    }
    return d;
}

// Where a code of a strip goes.
template <int TYPE>
__device__ __forceinline__ uint8_t * pq_encode_code(const pq_encode_side & side, int64_t cell, int head, int col0, int code) {
    typedef pq_encode_geom<TYPE> G;
    uint8_t * codes = side.p.codes + cell * side.p.codes_row_stride + head * side.head_bytes;
    const int strip = col0 / PQ_ENCODE_STRIP;
    return codes + code + (G::is_shared(code) ? side.p.D / 4 - G::N_OWN + strip * G::N_SHARED : strip * G::N_OWN);
}

__device__ __forceinline__ void pq_encode_store_tail(const pq_encode_params & p, int head, int i, int64_t row, __half x) {
    const int64_t slot = p.tail_idx[row];
    if (slot >= 0) {
        ((__half *) (p.tail + slot * p.tail_row_stride))[(int64_t) head * p.D + i] = x;
    }
}

// ---- a strip: what both kernels for a few rows do ----

constexpr int PQ_ENCODE_FEW_ROWS = 8; // rows of a group

constexpr int PQ_ENCODE_FEW_LOADS = 8; // of 16 bytes of centroids, per thread

// Threads share the search for a code: 8 of them for a pair of elements, 16 for four, never across a warp. So each has as much to look at.
struct pq_encode_share {
    int  code;   // of the strip
    int  place;  // of its elements in the strip
    int  lane;   // of the threads that share it
    bool shared; // pq3: by two subspaces
};

template <int TYPE>
__device__ __forceinline__ pq_encode_share pq_encode_get_share(int tid) {
    pq_encode_share s;
    if constexpr (TYPE == PQ_TYPE_PQ3) { // half of the threads for either kind
        constexpr int HALF = PQ_ENCODE_FEW_THREADS / 2;
        s.shared = tid >= HALF;
        s.code   = s.shared ? pq_encode_geom<TYPE>::N_OWN + (tid - HALF) / 16 : tid / 8;
        s.lane   = s.shared ? tid % 16 : tid % 8;
    } else {
        constexpr int LANES = TYPE == PQ_TYPE_PQ4 ? 8 : 16;
        s.shared = false;
        s.code   = tid / LANES;
        s.lane   = tid % LANES;
    }
    s.place = pq_encode_geom<TYPE>::place(s.code);
    return s;
}

// Where a thread's share of the centroids of a strip lies, in units of 16 bytes: of each two loads the first at first + pair * STEP, the other `other` after it.
template <int TYPE>
struct pq_encode_places {
    static constexpr int TABLE = PQ_KSUB * 2 * (int) sizeof(__half) / 16; // of a pair of elements
    static constexpr int LANES = TYPE == PQ_TYPE_PQ2 ? 16 : 8;
    static constexpr int STEP  = 2 * LANES; // where two subspaces share a code, 16 lanes take from both tables in turns
    int first, other;

    __device__ __forceinline__ pq_encode_places(const pq_encode_share & s)
        : first(s.place * PQ_KSUB * (int) sizeof(__half) / 16 + s.lane), other(TYPE == PQ_TYPE_PQ3 && s.shared ? TABLE : LANES) {}

    __device__ __forceinline__ int operator()(int load) const { return first + load / 2 * STEP + (load % 2 ? other : 0); }
};

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

// The nearest centroid to the elements of a code, in all threads that share it; whole warps take part. y: of the strip; get(i): load i of the thread's share
// pq3: one loop for both kinds of codes, which takes two loads at a time: of two lots of pairs, or both tables of the same four elements. As two loops it
// would be half as much code again, and code that runs once per step comes from memory.
template <int TYPE, int UNROLL, class GET>
__device__ __forceinline__ int pq_encode_search(const float * y, const pq_encode_share & share, GET get) {
    constexpr int  DSUB   = TYPE == PQ_TYPE_PQ2 ? 4 : 2;
    constexpr bool MIXED  = TYPE == PQ_TYPE_PQ3;
    constexpr int  PER    = 8 / DSUB; // centroids of a load
    const int  lanes  = MIXED ? share.shared ? 16 : 8 : 4 * DSUB; // see pq_encode_share
    const bool shared = MIXED && share.shared;
    float y_first[DSUB], y_second[DSUB]; // of a pair of loads
#pragma unroll
    for (int e = 0; e < DSUB; e++) {
        y_first[e]  = y[share.place + e];
        y_second[e] = y[share.place + e + (shared ? DSUB : 0)];
    }
    float best  = INFINITY;
    int   index = 0; // of those that the thread looks at
    auto take = [&](float d, int i) {
        if (d < best) {
            best  = d;
            index = i;
        }
    };
    auto distance = [&](const float (&y_code)[DSUB], const uint4 & load, int j, bool follows, float before) {
        float c[DSUB];
#pragma unroll
        for (int e = 0; e < DSUB; e++) {
            c[e] = __half2float(((const __half *) &load)[j * DSUB + e]);
        }
        return pq_encode_distance<DSUB>(y_code, c, follows, before);
    };
    int at = shared ? 0 : PER; // of the second load's centroids
#pragma unroll (UNROLL / 2)
    for (int i = 0; i < PQ_ENCODE_FEW_LOADS; i += 2) {
        const uint4 load[2] = { get(i), get(i + 1) };
        float first[PER];
#pragma unroll
        for (int j = 0; j < PER; j++) {
            first[j] = distance(y_first, load[0], j, false, 0.0f);
            if (!shared) {
                take(first[j], at - PER + j);
            }
        }
#pragma unroll
        for (int j = 0; j < PER; j++) {
            take(distance(y_second, load[1], j, shared, first[j]), at + j);
        }
        at += shared ? PER : 2 * PER;
    }
    index = (index / PER * lanes + share.lane) * PER + index % PER;
#pragma unroll 1
    for (int o = lanes / 2; o > 0; o /= 2) { // lanes of a warp share codes of the same kind
        const float other_best  = __shfl_xor_sync(0xffffffff, best,  o);
        const int   other_index = __shfl_xor_sync(0xffffffff, index, o);
        if (other_best < best || (other_best == best && other_index < index)) {
            best  = other_best;
            index = other_index;
        }
    }
    return index;
}

// ---- anisotropic codes (pq-layout.h) ----

static_assert(PQ_ENCODE_STRIP == PQ_ANISO_STRIP && PQ_ENCODE_STRIP == PQ_WARP, "a lane per element of a strip");

// What both searches leave of 8 rows and a strip.
struct pq_encode_found {
    float   moved[PQ_ENCODE_FEW_ROWS][PQ_ENCODE_STRIP]; // y, for the second search
    float   cost[PQ_ENCODE_FEW_ROWS];                   // of the first codes
    uint8_t codes[2][PQ_ENCODE_FEW_ROWS][PQ_ENCODE_STRIP / 2];
};

// The element of a code in its centroid: `place` is that of the element in the strip. centroids: of the strip
template <int TYPE>
__device__ __forceinline__ float pq_encode_centroid_element(const __half * centroids, int place, int code) {
    constexpr int DSUB = TYPE == PQ_TYPE_PQ2 ? 4 : 2;
    return __half2float(centroids[place / DSUB * (PQ_KSUB * DSUB) + code * DSUB + place % DSUB]);
}

// The sum over a warp, in the order of the CPU's tree.
__device__ __forceinline__ float pq_encode_sum(float a) {
#pragma unroll
    for (int n = PQ_WARP / 2; n > 0; n /= 2) {
        a = __fadd_rn(a, __shfl_xor_sync(0xffffffff, a, n));
    }
    return a;
}

__device__ __forceinline__ float pq_encode_cost(float ee, float ed, float dd) {
    return __fadd_rn(ee, __fmul_rn(PQ_ANISO_WEIGHT, __fmul_rn(ed, __fdiv_rn(ed, dd))));
}

// A warp, a row, after either search: where the second one is to look, or which codes to keep. aniso: of the lane's element; it and y are 0 beyond the head
template <int TYPE>
__device__ __forceinline__ void pq_encode_judge(pq_encode_found & f, int r, bool second, float y, float aniso, bool inside, const __half * centroids) {
    typedef pq_encode_geom<TYPE> G;
    const int   lane = threadIdx.x % PQ_WARP;
    const float d    = __fmul_rn(aniso, y);
    const float e    = inside ? __fsub_rn(y, pq_encode_centroid_element<TYPE>(centroids, lane, f.codes[second][r][G::code_of(lane)])) : 0.0f;
    const float ee   = pq_encode_sum(__fmul_rn(e, e));
    const float ed   = pq_encode_sum(__fmul_rn(e, d));
    const float dd   = pq_encode_sum(__fmul_rn(d, d));
    const float cost = pq_encode_cost(ee, ed, dd); // NaN without a direction, and then nothing costs less
    if (!second) {
        f.moved[r][lane] = __fadd_rn(y, __fmul_rn(__fmul_rn(PQ_ANISO_STEP, __fdiv_rn(ed, dd)), d));
        if (lane == 0) {
            f.cost[r] = cost;
        }
    } else if (cost < f.cost[r] && lane < G::N_CODES) {
        f.codes[0][r][lane] = f.codes[1][r][lane];
    }
}

// ---- a kernel of its own: one block, one strip ----

struct alignas(16) pq_encode_few_smem {
    float   x[PQ_ENCODE_FEW_ROWS][PQ_MAX_D];
    float   y[PQ_ENCODE_FEW_ROWS][PQ_ENCODE_STRIP];
    __half  T[PQ_MAX_D][PQ_ENCODE_STRIP];
    pq_encode_found found;
    int64_t cell[PQ_ENCODE_FEW_ROWS]; // of the cache, that the codes of a row go to
};

template <int TYPE>
__device__ void pq_encode_few(const pq_encode_side & side, int head, int col0, int64_t row0, int max_rows, pq_encode_few_smem & s) {
    typedef pq_encode_geom<TYPE> G;
    const pq_encode_params & p = side.p;
    const int tid    = threadIdx.x;
    const int D      = p.D;
    const int n_cols = min(PQ_ENCODE_STRIP, D - col0);
    const int n_rows = (int) min((int64_t) max_rows, p.n_rows - row0);
    const pq_encode_share share = pq_encode_get_share<TYPE>(tid);
    const pq_encode_head h = pq_encode_get_head(side, head);

    // the codebook does not depend on earlier kernels: its way through the memory overlaps with their end
    uint4 centroids[PQ_ENCODE_FEW_LOADS];
    const pq_encode_places<TYPE> places(share);
#pragma unroll
    for (int i = 0; i < PQ_ENCODE_FEW_LOADS; i++) {
        centroids[i] = share.place < n_cols ? __ldg((const uint4 *) (h.centroids + (size_t) col0 * PQ_KSUB) + places(i)) : make_uint4(0, 0, 0, 0);
    }
    const float aniso = tid % PQ_WARP < n_cols ? __ldg(h.aniso + col0 + tid % PQ_WARP) : 0.0f; // of an element per lane
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

    const bool inside      = tid % PQ_WARP < n_cols;
    const bool anisotropic = __any_sync(0xffffffff, aniso != 0.0f);
#pragma unroll 1
    for (int second = 0; second <= (int) anisotropic; second++) {
        for (int r = 0; r < n_rows; r++) {
            const int index = pq_encode_search<TYPE, PQ_ENCODE_FEW_LOADS>(second ? s.found.moved[r] : s.y[r], share, [&](int i) { return centroids[i]; });
            if (share.lane == 0 && share.place < n_cols) {
                s.found.codes[second][r][share.code] = (uint8_t) index;
            }
        }
        __syncthreads();
        if (anisotropic) {
            for (int r = tid / PQ_WARP; r < n_rows; r += PQ_ENCODE_FEW_THREADS / PQ_WARP) {
                pq_encode_judge<TYPE>(s.found, r, second, inside ? s.y[r][tid % PQ_WARP] : 0.0f, aniso, inside, h.centroids + (size_t) col0 * PQ_KSUB);
            }
            __syncthreads();
        }
    }

    for (int i = tid; i < n_rows * G::N_CODES; i += PQ_ENCODE_FEW_THREADS) {
        const int r = i / G::N_CODES, code = i % G::N_CODES;
        if (G::place(code) < n_cols) {
            *pq_encode_code<TYPE>(side, s.cell[r], head, col0, code) = s.found.codes[0][r][code];
        }
    }
}

} // namespace
