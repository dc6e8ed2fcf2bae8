// Attention on codes, for a few query rows per KV head (token generation, small batches), of every head size and pair of types, plain f16
// rows on one side among them. D = 128 with codes on both sides has a quicker kernel, pq-attn-128-kernel.cuh. No cell is decoded to memory.
//
// A block of one wave serves one KV head, up to R of its query rows and one part of the context. The centroids of K and V lie in
// shared memory, one row of 256 bytes per centroid index, so a code byte becomes an address with one PRMT (byte 1 of the address is
// the code, byte 0 belongs to the lane). L = 8, 16 or 32 lanes share a cell; a lane owns 8 elements of the head (four half2),
// and takes its subspaces in an order of its own, so that the 32 lanes of every lookup read 32 different banks.
//
//   scores   s += y * q' in half2 on each lane over its four half2, then the sum over the lanes of a cell by a tensor-core product
//            with a matrix of ones, in floats, for 16 slots at once: two shuffles instead of a butterfly.
//   softmax  one cell per lane, base 2. The reference maximum of a warp moves only when a score passes it by far, so the
//            usual tile costs one vote. A weight is 2**(s - m) with m a little below the largest score: halves keep their full
//            precision down to 2**-20 of the largest weight.
//   values   o += p * y by a tensor-core product with a diagonal matrix of weights: a multiply-add per lane from halves into
//            floats, four half2 in one instruction.
//
// Work per cell of one head and row at D = 128, pq4, on an H200 (132 multiprocessors, 4.3 TB/s: 7 cycles per cell to read its codes):
// 4 wavefronts of lookups, 1-2 of code loads and about 14 issue slots (of 4 per cycle).
//
// Every warp takes tiles of 16 slots (16 * 32 / L cells), whose codes it loads one tile ahead into registers. Tiles in which no row
// sees a cell are left out before any code is read; a block that has none builds no tables.
#pragma once

#include "../pq/pq-params.h"
#include "pq-cuda-common.cuh"
#include "pq-launch.cuh"

#include <math_constants.h>

#include <type_traits>

namespace pq_attn {

constexpr int ANY_TYPE = -1;            // the type is known at run time only
constexpr int PLAIN    = PQ_TYPE_COUNT; // f16 rows

constexpr int N_SLOT = 16;  // slots of a tile: the rows of one tensor-core product, so the scores of a tile are summed together

constexpr float LOG2E = 1.44269504088896341f;

// The reference maximum is 2**-MAX_SHIFT of the largest weight when it is set, and is set again when a weight would pass
// 2**(MAX_SHIFT + MAX_GROWTH) = 16384: halves end at 65504.
constexpr float MAX_SHIFT  = 6.0f;
constexpr float MAX_GROWTH = 8.0f;

// Threads of a block, by its rows. Registers bound them: a row takes 4 for the query, 8 for the output, 4 for scores.
__host__ __device__ constexpr int n_threads(int R) {
    return R == 1 ? 512 : R == 4 ? 384 : 256;
}

// Threads that attend to the tail while the others build the tables.
__host__ __device__ constexpr int n_tail_threads(int R) {
    return n_threads(R) / 4;
}

__host__ __device__ constexpr int cells_per_tile(int L) {
    return N_SLOT * PQ_WARP / L;
}

// ---- what the host hands over ----

struct side_args {
    uint32_t mu, T_inv, centroids; // byte offsets in a head block; T_inv 0: identity
    uint64_t head_bytes;           // of a head block
    int32_t  bytewise;             // pq3 codes that are not at multiples of 4 bytes
};

struct args {
    pq_attn_params p;
    side_args      k, v;
    int32_t n_split;
    int32_t n_row_groups;
    int32_t n_rows;          // per KV head
    int32_t n_group;         // query heads per KV head
    small_divisor by_group, by_stream_mask, by_head_mask; // n_group, p.n_stream_mask, p.n_head_mask
    int64_t cells_per_split;
    int64_t slots_per_split;
    int32_t prefetch;        // contexts so deep that the codebooks will be needed
    int32_t mask_by_16;      // mask rows start at multiples of 16 bytes
    int32_t score_tiles;     // two phases: tiles whose scores fit
    int32_t n_head_log2;
    float   slope_log2_0;    // log2 of the ALiBi bases
    float   slope_log2_1;
    float   q_scale;         // what the product of q and k is scaled with before the softcap, or times log2(e) without one
    float   cap_inv;         // 1 / logit_softcap
    float   cap_log2e;       // logit_softcap times log2(e)
    float * partials;        // [n_stream][n_head_kv][n_rows][n_split] records
    int32_t record_floats;   // {m, weight of the coded part, weight of the tail, 0}, coded sum [D], tail sum [D]; those of attn_128_kernel are shorter
    uint32_t smem_scores, smem_rows, smem_q, smem_qt, smem_list, smem_bits, smem_merge_ml, smem_tail, smem_tail_part; // byte offsets
};

// Where the tables lie in shared memory is known at compile time, so that a lookup is one instruction. K begins at 0. L = 8: K
// and V share rows of 256 bytes. L = 32: two tables do not fit, one side is plain or they take turns.
__host__ __device__ constexpr uint32_t table_bytes(int type, int L) {
    return type == PLAIN ? 0 : PQ_KSUB * (L == 32 ? 512 : 256);
}

__host__ __device__ constexpr uint32_t v_table_offset(int L, bool two_phases) {
    return two_phases || L == 32 ? 0 : L == 8 ? 128 : table_bytes(PQ_TYPE_PQ4, 16);
}

// A query row of the block. Rows past the last repeat it, with a zero query, and write nothing.
struct row_info {
    const uint8_t * q;
    const uint8_t * mask;      // NULL: none
    const uint8_t * tail_mask;
    uint8_t       * dst;
    float           sink;      // times log2(e)
    float           slope;     // times log2(e)
    float           q_mu;      // q.mu, scaled as the scores are
    int32_t         valid;
};

// What a lane needs to look up its four half2 of a cell.
struct lane_side {
    const uint8_t * data;    // of the stream and head, at the lane's codes
    uint32_t row_stride;
    uint32_t low[2];         // address bytes that are the lane's, as PRMT takes them
    uint32_t pick[4];        // PRMT selectors
    int32_t  cell;           // which of a slot's cells
    int32_t  order;          // half2 i is at position i ^ order of the lane's four
    // pq3. Where codes lie in words, lanes load one each and hand them around; otherwise each loads its own, byte by byte.
    int32_t  bytewise;
    uint32_t select;         // PRMT selector of the three codes in two words: that of codes of one subspace, and that of codes of two
    uint32_t lanes;          // the lanes that have them, 5 bits each; then how far the last code is from the others, for who loads bytes
};

// element of a type known at compile time or run time
template <int TYPE, class F>
PQ_DEVICE void with_type(int type, F f) {
    if constexpr (TYPE != ANY_TYPE) {
        f(std::integral_constant<int, TYPE>{});
    } else {
        switch (type) {
            case PQ_TYPE_PQ4: f(std::integral_constant<int, PQ_TYPE_PQ4>{}); break;
            case PQ_TYPE_PQ3: f(std::integral_constant<int, PQ_TYPE_PQ3>{}); break;
            case PQ_TYPE_PQ2: f(std::integral_constant<int, PQ_TYPE_PQ2>{}); break;
            default:          f(std::integral_constant<int, PLAIN>{});       break;
        }
    }
}

// Score products sum over the four lanes of a quad (k of the matrices), so a cell's lanes are neighbours for K; value products
// weigh by k, so for V the lanes of a quad belong to the slot's different cells.
template <int L, bool IS_V>
PQ_DEVICE void lane_place(int lane, int * cell, int * l) {
    if (!IS_V || L == 32) {
        *cell = lane / L;
        *l    = lane % L;
    } else if (L == 16) {
        *cell = lane / 2 % 2;
        *l    = lane / 4 * 2 + lane % 2;
    } else {
        *cell = lane % 4;
        *l    = lane / 4;
    }
}

template <int TYPE, int L, bool IS_V>
PQ_DEVICE void init_side(lane_side & s, const side_args & sa, int D, int lane) {
    int l;
    lane_place<L, IS_V>(lane, &s.cell, &l);
    l %= D / 8; // lanes past the end repeat others and don't count
    const uint32_t low   = 16 * (l % 16);
    const uint32_t plane = l / 16; // 256 bytes of a table row serve 16 lanes: for L = 32 the table has two planes
    const int rot = L == 8 ? s.cell : L == 16 ? l / 8 + 2 * s.cell : l / 8; // 0..3
    s.bytewise = 0;
    if constexpr (TYPE == PQ_TYPE_PQ4 || TYPE == PQ_TYPE_PQ3) {
        s.order = rot;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int code = TYPE == PQ_TYPE_PQ3 ? min(i ^ rot, 2) : i ^ rot; // pq3: the last two share one
            s.pick[i] = 0x7600 | code << 4 | (4 + i % 2);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            s.low[i] = (low | 4 * (2 * i ^ rot)) | (low | 4 * ((2 * i + 1) ^ rot)) << 8 | plane << 16;
        }
    }
    if constexpr (TYPE == PQ_TYPE_PQ4) {
        s.data += 4 * l;
    } else if constexpr (TYPE == PQ_TYPE_PQ3) {
        // D / 8 lanes share 3 D / 32 words: two of them have their codes of one subspace in one, four their codes of two.
        auto lane_of = [&](int word) { return !IS_V || L == 32 ? lane / L * L + word : L == 16 ? word / 2 * 4 + s.cell * 2 + word % 2 : word * 4 + s.cell; };
        s.bytewise = sa.bytewise;
        s.data += s.bytewise ? 2 * l : 4 * min(l, 3 * D / 32 - 1);
        s.select = s.bytewise ? 0x3210 : l % 2 * 0x22 | (4 + l % 4) << 8 | 0x10;
        s.lanes  = s.bytewise ? lane * 33 | (D / 4 - l) << 10 : lane_of(l / 2) | lane_of(D / 16 + l / 4) << 5;
    } else if constexpr (TYPE == PQ_TYPE_PQ2) {
        // 8-byte reads: each half of a warp has 16 pairs of banks
        const int rot2 = L == 8 ? s.cell % 2 : L == 16 ? (IS_V ? s.cell : l / 8) : l / 8 % 2;
        s.data += 2 * l;
        s.order = 2 * rot2;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            s.pick[i] = 0x7600 | (i ^ rot2) << 4 | (4 + i);
        }
        s.low[0] = (low | 8 * (0 ^ rot2)) | (low | 8 * (1 ^ rot2)) << 8 | plane << 16;
    } else {
        s.data += 16 * l;
        s.order = 0;
    }
}

// ---- tables ----

// Asks for a head block (but for T, which attention does not use) to be brought into L2; thread i of n.
PQ_DEVICE void prefetch_l2(const uint8_t * block, const side_args & s, int i, int n) {
    if (!block) {
        return;
    }
    const uint32_t from = s.T_inv ? s.T_inv : s.centroids;
    for (uint64_t at = from + (uint64_t) i * 128; at < s.head_bytes; at += (uint64_t) n * 128) {
        pq_prefetch_l2(block + at);
    }
}

// One thread's work on a table, whose row c holds, 16 bytes per lane, centroid c of every subspace in the head's order. It takes the subspaces of
// one lane and 16 bytes of centroids of each, and turns that little matrix: both sides see whole 16-byte accesses.
template <int TYPE>
struct table_item {
    enum {
        DSUB  = TYPE == PQ_TYPE_PQ2 ? 4 : 2,
        N_SUB = 8 / DSUB,        // subspaces of a lane
        N_CEN = 16 / (2 * DSUB), // centroids in 16 bytes
        PLANE = PQ_KSUB * 256,
    };
    uint4 x[N_SUB];

    static __device__ __forceinline__ int n_lane4(int D) { return (D / 8 + 3) / 4; }
    static __device__ __forceinline__ int count(int D)   { return n_lane4(D) * 4 * (PQ_KSUB / N_CEN); }

    // Items side by side: 4 lanes for the stores, 8 runs of 16 bytes, a whole line of memory, for the loads.
    static __device__ __forceinline__ int lane(int item, int D) {
        const int block = item / 32 % n_lane4(D);
        return item % 4 + 4 * block;
    }
    static __device__ __forceinline__ int centroid(int item, int D) {
        return (item / 4 % 8 + 8 * (item / 32 / n_lane4(D))) * N_CEN;
    }
    __device__ __forceinline__ void load(const uint8_t * centroids, int item, int D) {
        const int l = lane(item, D), c = centroid(item, D);
#pragma unroll
        for (int m = 0; m < N_SUB; m++) {
            x[m] = __ldg((const uint4 *) (centroids + ((size_t) (l * N_SUB + m) * PQ_KSUB + c) * (2 * DSUB)));
        }
    }
    __device__ __forceinline__ void store(uint8_t * table, int item, int D) const {
        const int l   = lane(item, D);
        uint8_t * row = table + l / 16 * PLANE + centroid(item, D) * 256 + l % 16 * 16;
        if constexpr (DSUB == 2) {
            *(uint4 *) row         = make_uint4(x[0].x, x[1].x, x[2].x, x[3].x);
            *(uint4 *) (row + 256) = make_uint4(x[0].y, x[1].y, x[2].y, x[3].y);
            *(uint4 *) (row + 512) = make_uint4(x[0].z, x[1].z, x[2].z, x[3].z);
            *(uint4 *) (row + 768) = make_uint4(x[0].w, x[1].w, x[2].w, x[3].w);
        } else {
            *(uint4 *) row         = make_uint4(x[0].x, x[0].y, x[1].x, x[1].y);
            *(uint4 *) (row + 256) = make_uint4(x[0].z, x[0].w, x[1].z, x[1].w);
        }
    }
};

template <int TYPE>
PQ_DEVICE void build_table(uint8_t * table, const uint8_t * centroids, int D, int tid, int nt) {
    if constexpr (TYPE != PLAIN) {
        typedef table_item<TYPE> item_t;
#pragma unroll 2
        for (int i = tid; i < item_t::count(D); i += nt) {
            if (item_t::lane(i, D) < D / 8) {
                item_t item;
                item.load(centroids, i, D);
                item.store(table, i, D);
            }
        }
    }
}

// ---- codes ----

template <int TYPE>
PQ_DEVICE uint32_t load_word(const lane_side & s, const uint8_t * p) {
    if constexpr (TYPE == PQ_TYPE_PQ2) {
        return pq_load_stream_u16(p);
    } else if constexpr (TYPE == PQ_TYPE_PQ3) {
        if (s.bytewise) {
            return (uint32_t) p[0] | (uint32_t) p[1] << 8 | (uint32_t) p[s.lanes >> 10] << 16;
        }
    }
    return pq_load_stream_u32(p);
}

// The words of a tile: n of its cells exist. Plain rows are loaded where they are used: they would take four times the registers.
template <int TYPE, int L>
PQ_DEVICE void load_tile(uint32_t (&w)[N_SLOT], const lane_side & s, int64_t cell0, int n) {
    if constexpr (TYPE != PLAIN) {
        constexpr int CELLS = PQ_WARP / L; // per slot
        const uint8_t * p = s.data + cell0 * s.row_stride;
        if (n >= cells_per_tile(L)) {
            p += s.cell * s.row_stride;
#pragma unroll
            for (int j = 0; j < N_SLOT; j++) {
                w[j] = load_word<TYPE>(s, pq_mad_wide(s.row_stride, j * CELLS, p));
            }
        } else {
#pragma unroll
            for (int j = 0; j < N_SLOT; j++) {
                w[j] = load_word<TYPE>(s, p + (uint64_t) s.row_stride * (uint32_t) min(j * CELLS + s.cell, n - 1));
            }
        }
    }
}

// The lane's four half2 of a cell from its code word.
template <int TYPE, uint32_t TABLE /* offset in dynamic shared memory */>
PQ_DEVICE void lookup(uint32_t (&y)[4], uint32_t w, const lane_side & s) {
    if constexpr (TYPE == PQ_TYPE_PQ4) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            y[i] = pq_load_shared_u32<TABLE>(__byte_perm(w, s.low[i / 2], s.pick[i]));
        }
    } else if constexpr (TYPE == PQ_TYPE_PQ3) {
        const uint32_t own = __shfl_sync(PQ_FULL_WARP, w, s.lanes), shared = __shfl_sync(PQ_FULL_WARP, w, s.lanes >> 5); // counts lanes by 32
        lookup<PQ_TYPE_PQ4, TABLE>(y, __byte_perm(own, shared, s.select), s);
    } else {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint2 v = pq_load_shared_u64<TABLE>(__byte_perm(w, s.low[0], s.pick[i]));
            y[2 * i]     = v.x;
            y[2 * i + 1] = v.y;
        }
    }
}

// The same from a plain row; `live` has a bit per lane that holds a live cell's score. A row that nobody sees may hold anything, NaN included.
template <int L>
PQ_DEVICE void load_plain(uint32_t (&y)[4], const lane_side & s, int64_t cell0, int n, int slot, const uint32_t (&live)[2]) {
    constexpr int CELLS = PQ_WARP / L;
    const int cell  = min(slot * CELLS + s.cell, n - 1);
    const int owner = 4 * (slot % 8) + (L == 8 ? s.cell : 2 * s.cell + slot / 8); // see lane_cell()
    const uint4 v = pq_load_stream_u128(s.data + (cell0 + cell) * s.row_stride);
    const bool seen = live[L == 8 ? slot / 8 : 0] >> owner & 1;
    y[0] = seen ? v.x : 0;
    y[1] = seen ? v.y : 0;
    y[2] = seen ? v.z : 0;
    y[3] = seen ? v.w : 0;
}

// Which cell of a tile a lane does the softmax of: score products leave it with the scores of slots g and g + 8, of the
// cell that its t belongs to. L = 8: both are its own (i = 0, 1); otherwise it takes one of them.
template <int L>
PQ_DEVICE int lane_cell(int lane, int i) {
    const int g = lane / 4, t = lane % 4;
    return L == 8 ? (g + 8 * i) * 4 + t : L == 16 ? (g + 8 * (t % 2)) * 2 + t / 2 : g + 8 * (t % 2);
}

template <int L> struct lane_cells { enum { N = L == 8 ? 2 : 1 }; };

// ---- scores and values of a tile ----

template <int TYPE, int L, int R, uint32_t TABLE>
PQ_DEVICE void tile_scores(float (&c)[R][4], const uint32_t (&w)[N_SLOT], const lane_side & s, const uint32_t (&q)[R][4], int64_t cell0, int n,
                           const uint32_t (&live)[2], int lane) {
#pragma unroll
    for (int r = 0; r < R; r++) {
        c[r][0] = c[r][1] = c[r][2] = c[r][3] = 0.0f;
    }
#pragma unroll
    for (int j = 0; j < N_SLOT / 2; j++) {
        uint32_t y[2][4];
        if constexpr (TYPE == PLAIN) {
            load_plain<L>(y[0], s, cell0, n, j,     live);
            load_plain<L>(y[1], s, cell0, n, j + 8, live);
        } else {
            lookup<TYPE, TABLE>(y[0], w[j],     s);
            lookup<TYPE, TABLE>(y[1], w[j + 8], s);
        }
        // Slot j goes to row j of C, slot j + 8 to row j + 8: A has ones in row j, left half, and row j + 8, right half.
        const uint32_t ones = pq_opaque(lane) / 4 == j ? 0x3c003c00u : 0u;
#pragma unroll
        for (int r = 0; r < R; r++) {
            uint32_t b[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                __half2 sum = __hmul2(pq_as_half2(y[i][0]), pq_as_half2(q[r][0]));
                sum = __hfma2(pq_as_half2(y[i][1]), pq_as_half2(q[r][1]), sum);
                sum = __hfma2(pq_as_half2(y[i][2]), pq_as_half2(q[r][2]), sum);
                sum = __hfma2(pq_as_half2(y[i][3]), pq_as_half2(q[r][3]), sum);
                b[i] = pq_as_u32(sum);
            }
            pq_mma_m16n8k16(c[r], ones, 0u, 0u, ones, b[0], b[1]);
        }
    }
}

// C of the score products -> the scores of the lane's cells.
template <int L>
PQ_DEVICE void gather_scores(float (&s)[lane_cells<L>::N], const float (&c)[4], int lane) {
    const float lo = c[0] + c[1]; // slot g
    const float hi = c[2] + c[3]; // slot g + 8
    if constexpr (L == 8) {
        s[0] = lo;
        s[1] = hi;
    } else {
        const bool  odd  = lane % 2;
        const float keep = odd ? hi : lo;
        s[0] = keep + __shfl_xor_sync(PQ_FULL_WARP, odd ? lo : hi, 1);
        if constexpr (L == 32) {
            s[0] += __shfl_xor_sync(PQ_FULL_WARP, s[0], 2);
        }
    }
}

// Weights of the lane's cells -> {slot g, slot g + 8} of the cell that its t belongs to, as halves.
template <int L>
PQ_DEVICE uint32_t pack_weights(const float (&p)[lane_cells<L>::N], int lane) {
    if constexpr (L == 8) {
        return pq_as_u32(__floats2half2_rn(p[0], p[1]));
    } else {
        const uint32_t own   = __half_as_ushort(__float2half_rn(p[0]));
        const uint32_t other = __shfl_xor_sync(PQ_FULL_WARP, own, 1);
        return __byte_perm(own, other, lane % 2 ? 0x1054 : 0x5410);
    }
}

template <int TYPE, int L, int R, uint32_t TABLE>
PQ_DEVICE void tile_values(float (&o)[R][2][4], const uint32_t (&w)[N_SLOT], const lane_side & s, const uint32_t (&p)[R], int64_t cell0, int n,
                           const uint32_t (&live)[2], int lane) {
    const int g = lane / 4, t = lane % 4;
    // B has the weight of this lane's cell at (2t, 2t) and (2t + 1, 2t + 1), slot j in the upper half, slot j + 8 in the lower
    const uint32_t pick_lo = g == 2 * t ? 0x4410 : g == 2 * t + 1 ? 0x1044 : 0x4444;
    const uint32_t pick_hi = g == 2 * t ? 0x4432 : g == 2 * t + 1 ? 0x3244 : 0x4444;
    const int      owner   = L == 8 ? t : L == 16 ? t & 2 : 0;
#pragma unroll
    for (int j = 0; j < N_SLOT / 2; j++) {
        uint32_t y[2][4];
        if constexpr (TYPE == PLAIN) {
            load_plain<L>(y[0], s, cell0, n, j,     live);
            load_plain<L>(y[1], s, cell0, n, j + 8, live);
        } else {
            lookup<TYPE, TABLE>(y[0], w[j],     s);
            lookup<TYPE, TABLE>(y[1], w[j + 8], s);
        }
        const int source = pq_opaque(owner) + 4 * j;
#pragma unroll
        for (int r = 0; r < R; r++) {
            const uint32_t pj = __shfl_sync(PQ_FULL_WARP, p[r], source);
            const uint32_t b0 = __byte_perm(pj, 0, pick_lo);
            const uint32_t b1 = __byte_perm(pj, 0, pick_hi);
            pq_mma_m16n8k16(o[r][0], y[0][0], y[0][1], y[1][0], y[1][1], b0, b1);
            pq_mma_m16n8k16(o[r][1], y[0][2], y[0][3], y[1][2], y[1][3], b0, b1);
        }
    }
}

// ---- masks ----

PQ_DEVICE float mask_value(const uint8_t * mask, int64_t i) {
    return mask ? __half2float(((const __half *) mask)[i]) : 0.0f;
}

// Whether any of n cells from cell0 on is visible.
PQ_DEVICE bool cells_live(const uint8_t * mask, int64_t cell0, int n, bool by_16) {
    const uint8_t * m = mask + cell0 * 2;
    int i = 0;
    uint32_t dead = 0xffffffffu;
    if (by_16) {
#pragma unroll 4
        for (; i + 8 <= n; i += 8) {
            const uint4 v = __ldg((const uint4 *) (m + i * 2));
            if (v.x != 0xfc00fc00u || v.y != 0xfc00fc00u || v.z != 0xfc00fc00u || v.w != 0xfc00fc00u) {
                dead = 0;
            }
        }
    }
    for (; i < n; i++) {
        if (((const uint16_t *) m)[i] != 0xfc00) {
            dead = 0;
        }
    }
    return dead == 0;
}

// Lists in order the i < n_tile with live(true, i), then the i < n_slot with live(false, i). All threads call it. Returns how many of each.
// bits: u32 [n_tile / 32 + n_slot / 32 + 2]
template <int NT, class F>
PQ_DEVICE int2 list_live(int n_tile, int n_slot, uint16_t * list, uint32_t * bits, F live) {
    constexpr int NW = NT / PQ_WARP;
    const int lane = threadIdx.x % PQ_WARP, warp = threadIdx.x / PQ_WARP;
    const int w_tile = (n_tile + 31) / 32, w_all = w_tile + (n_slot + 31) / 32;
#pragma unroll 2
    for (int w = warp; w < w_all; w += NW) {
        const bool is_tile = w < w_tile;
        const int  i = (is_tile ? w : w - w_tile) * 32 + lane;
        const uint32_t b = __ballot_sync(PQ_FULL_WARP, i < (is_tile ? n_tile : n_slot) && live(is_tile, i));
        if (lane == 0) {
            bits[w] = b;
        }
    }
    __syncthreads();
    int tiles = 0, slots = 0;
    for (int w = lane; w < w_all; w += PQ_WARP) {
        const int n = __popc(bits[w]);
        tiles += w < w_tile ? n : 0;
        slots += w < w_tile ? 0 : n;
    }
    for (int w = warp; w < w_all; w += NW) {
        int before = 0;
        for (int x = lane; x < w; x += PQ_WARP) {
            before += __popc(bits[x]);
        }
        before = __reduce_add_sync(PQ_FULL_WARP, before);
        const uint32_t b = bits[w];
        if (b >> lane & 1) {
            list[before + __popc(b & ((1u << lane) - 1))] = (uint16_t) ((w < w_tile ? w : w - w_tile) * 32 + lane);
        }
    }
    __syncthreads();
    return make_int2(__reduce_add_sync(PQ_FULL_WARP, tiles), __reduce_add_sync(PQ_FULL_WARP, slots));
}

// ---- queries ----

// q' = T_inv q and q.mu of R rows, scaled. qt [R][8 * L] halves, in the order of the elements.
template <int L, int R>
PQ_DEVICE void map_queries(__half * qt, row_info * rows, const float * q, const side_args & k, const uint8_t * block, int D, float scale, bool coded,
                           int tid, int nt) {
    const int lane = tid % PQ_WARP, warp = tid / PQ_WARP;
    if (!coded || k.T_inv == 0) {
        for (int i = tid; i < R * D; i += nt) {
            qt[i / D * (8 * L) + i % D] = __float2half_rn(q[i] * scale);
        }
    } else {
        constexpr int AHEAD = 4; // rows of T_inv in flight per thread
        const int l = tid % L;
        for (int j0 = tid / L; j0 < D; j0 += nt / L * AHEAD) {
            uint4 t[AHEAD];
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                const int j = j0 + a * (nt / L);
                t[a] = j < D && l < D / 8 ? __ldg((const uint4 *) (block + k.T_inv + ((size_t) j * D + 8 * l) * 2)) : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                const int j = j0 + a * (nt / L);
                if (j >= D) { // the same for the whole warp: D is a multiple of 8
                    break;
                }
                const float2 t0 = pq_half2_to_float2(t[a].x), t1 = pq_half2_to_float2(t[a].y);
                const float2 t2 = pq_half2_to_float2(t[a].z), t3 = pq_half2_to_float2(t[a].w);
#pragma unroll
                for (int r = 0; r < R; r++) {
                    float sum = 0.0f;
                    if (l < D / 8) {
                        const float4 a0 = *(const float4 *) (q + r * D + 8 * l);
                        const float4 a1 = *(const float4 *) (q + r * D + 8 * l + 4);
                        sum = t0.x * a0.x + t0.y * a0.y + t1.x * a0.z + t1.y * a0.w + t2.x * a1.x + t2.y * a1.y + t3.x * a1.z + t3.y * a1.w;
                    }
#pragma unroll
                    for (int o = L / 2; o > 0; o /= 2) {
                        sum += __shfl_xor_sync(PQ_FULL_WARP, sum, o);
                    }
                    if (l == 0) {
                        qt[r * (8 * L) + j] = __float2half_rn(sum * scale);
                    }
                }
            }
        }
    }
    for (int r = warp; r < R; r += nt / PQ_WARP) {
        float sum = 0.0f;
        for (int i = lane; coded && i < D; i += PQ_WARP) {
            sum += q[r * D + i] * ((const float *) (block + k.mu))[i];
        }
        sum = pq_warp_sum(sum);
        if (lane == 0) {
            rows[r].q_mu = sum * scale;
        }
    }
}

// ---- the exact tail ----

// Attention of R rows over the listed slots, with raw queries, in floats, by the first nt threads of the block. Half a warp takes a slot: 8
// elements per lane (16 for L = 32). Leaves weighted sums of every warp, and its m and sum of weights, for merge_tail.
// part: float [nt / 32][R][D], then float [nt / 32][R][2]
template <int L, int R>
PQ_DEVICE void attend_tail(float * part, const args & a, const row_info * rows, const float * q,
                           const uint16_t * slots, int n_slots, int64_t slot0, int stream, int head_kv, int nt) {
    constexpr int E     = L == 32 ? 2 : 1;               // 16-byte pieces per lane
    constexpr int AHEAD = R == 8 || L == 32 ? 2 : 4;     // slots in flight per half warp
    const int tid = threadIdx.x, lane = tid % PQ_WARP, warp = tid / PQ_WARP, nw = nt / PQ_WARP;
    const int l = lane % 16, half = lane / 16;
    const int D = a.p.k.D;
    const pq_attn_tail & tail = a.p.tail;
    const uint8_t * k = tail.k + stream * tail.k_stream_stride + head_kv * tail.k_head_stride + slot0 * tail.k_row_stride;
    const uint8_t * v = tail.v + stream * tail.v_stream_stride + head_kv * tail.v_head_stride + slot0 * tail.v_row_stride;
    // every lane does the softmax of one row, l % R
    const row_info & mine = rows[l % R];
    const uint16_t * mask = (const uint16_t *) mine.tail_mask + slot0;
    float acc[R][E][8], m = -CUDART_INF_F, sum = 0.0f;
#pragma unroll
    for (int r = 0; r < R; r++) {
#pragma unroll
        for (int e = 0; e < E * 8; e++) {
            acc[r][e / 8][e % 8] = 0.0f;
        }
    }
    for (int i0 = 2 * warp; i0 < n_slots; i0 += 2 * nw * AHEAD) {
        uint4    x[AHEAD][E], y[AHEAD][E];
        uint32_t bias[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            const int slot = slots[min(i0 + half + 2 * nw * u, n_slots - 1)];
#pragma unroll
            for (int e = 0; e < E; e++) {
                const int at = l + 16 * e < D / 8 ? 16 * (l + 16 * e) : 0;
                x[u][e] = pq_load_stream_u128(k + slot * tail.k_row_stride + at);
                y[u][e] = pq_load_stream_u128(v + slot * tail.v_row_stride + at);
            }
            bias[u] = pq_load_u16(mask + slot);
        }
        float s[AHEAD];
#pragma unroll
        for (int r = 0; r < R; r++) {
            float dot[AHEAD];
#pragma unroll
            for (int u = 0; u < AHEAD; u++) {
                dot[u] = 0.0f;
            }
#pragma unroll
            for (int e = 0; e < E; e++) {
                if (l + 16 * e < D / 8) {
                    const float4 a0 = *(const float4 *) (q + r * D + 8 * (l + 16 * e));
                    const float4 a1 = *(const float4 *) (q + r * D + 8 * (l + 16 * e) + 4);
#pragma unroll
                    for (int u = 0; u < AHEAD; u++) {
                        const float2 k0 = pq_half2_to_float2(x[u][e].x), k1 = pq_half2_to_float2(x[u][e].y);
                        const float2 k2 = pq_half2_to_float2(x[u][e].z), k3 = pq_half2_to_float2(x[u][e].w);
                        dot[u] += k0.x * a0.x + k0.y * a0.y + k1.x * a0.z + k1.y * a0.w + k2.x * a1.x + k2.y * a1.y + k3.x * a1.z + k3.y * a1.w;
                    }
                }
            }
#pragma unroll
            for (int off = 8; off > 0; off /= 2) {
#pragma unroll
                for (int u = 0; u < AHEAD; u++) {
                    dot[u] += __shfl_xor_sync(PQ_FULL_WARP, dot[u], off);
                }
            }
#pragma unroll
            for (int u = 0; u < AHEAD; u++) {
                s[u] = r == 0 || l % R == r ? dot[u] : s[u];
            }
        }
        float m_new = m;
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            float z = s[u] * a.q_scale;
            if (a.p.logit_softcap != 0.0f) {
                z = a.cap_log2e * tanhf(z * a.cap_inv);
            }
            const bool seen = bias[u] != 0xfc00 && i0 + half + 2 * nw * u < n_slots;
            s[u]  = seen ? fmaf(mine.slope, __half2float(__ushort_as_half(bias[u])), z) : -CUDART_INF_F;
            m_new = fmaxf(m_new, s[u]);
        }
        const float ref = m_new == -CUDART_INF_F ? 0.0f : m_new;
        const float f   = pq_exp2(m - ref);
        m    = m_new;
        sum *= f;
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            s[u] = pq_exp2(s[u] - ref);
            sum += s[u];
        }
#pragma unroll
        for (int r = 0; r < R; r++) {
            const float fr = __shfl_sync(PQ_FULL_WARP, f, r, 16);
#pragma unroll
            for (int e = 0; e < E * 8; e++) {
                acc[r][e / 8][e % 8] *= fr;
            }
#pragma unroll
            for (int u = 0; u < AHEAD; u++) {
                const float p = __shfl_sync(PQ_FULL_WARP, s[u], r, 16);
#pragma unroll
                for (int e = 0; e < E; e++) {
                    const uint32_t h[4] = { y[u][e].x, y[u][e].y, y[u][e].z, y[u][e].w };
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const float2 w = pq_half2_to_float2(h[i]);
                        acc[r][e][2 * i]     = fmaf(p, w.x, acc[r][e][2 * i]);
                        acc[r][e][2 * i + 1] = fmaf(p, w.y, acc[r][e][2 * i + 1]);
                    }
                }
            }
        }
    }
    // the halves of the warp
    const float m_all = fmaxf(m, __shfl_xor_sync(PQ_FULL_WARP, m, 16));
    const float f     = m == -CUDART_INF_F ? 0.0f : pq_exp2(m - m_all);
    sum *= f;
    sum += __shfl_xor_sync(PQ_FULL_WARP, sum, 16);
#pragma unroll
    for (int r = 0; r < R; r++) {
        const float fr = __shfl_sync(PQ_FULL_WARP, f, r, 16);
#pragma unroll
        for (int e = 0; e < E; e++) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                acc[r][e][i] *= fr;
                acc[r][e][i] += __shfl_xor_sync(PQ_FULL_WARP, acc[r][e][i], 16);
            }
            if (half == 0 && l + 16 * e < D / 8) {
                float * dst = part + (warp * R + r) * D + 8 * (l + 16 * e);
                *(float4 *) dst       = make_float4(acc[r][e][0], acc[r][e][1], acc[r][e][2], acc[r][e][3]);
                *(float4 *) (dst + 4) = make_float4(acc[r][e][4], acc[r][e][5], acc[r][e][6], acc[r][e][7]);
            }
        }
    }
    if (lane < R) {
        *(float2 *) (part + nw * R * D + 2 * (warp * R + lane)) = make_float2(m_all, sum);
    }
}

// Adds what the nt / 32 warps have, by their threads, after a barrier of the block (racecheck misunderstands one of these warps alone): the weighted sums to o [R][D],
// m and the sum of weights of every row to ml [R][2].
template <int R>
PQ_DEVICE void merge_tail(float * o, float * ml, const float * part, int D, int nt) {
    const int nw = nt / PQ_WARP;
    const float * part_ml = part + nw * R * D;
#pragma unroll 1
    for (int i = threadIdx.x; i < R * D; i += nt) {
        const int r = i / D;
        float top = -CUDART_INF_F;
#pragma unroll 1
        for (int w = 0; w < nw; w++) {
            top = fmaxf(top, part_ml[2 * (w * R + r)]);
        }
        const float ref = top == -CUDART_INF_F ? 0.0f : top;
        float x = 0.0f, total = 0.0f;
#pragma unroll 1
        for (int w = 0; w < nw; w++) {
            const float fw = pq_exp2(part_ml[2 * (w * R + r)] - ref);
            x     += part[w * R * D + i] * fw;
            total += part_ml[2 * (w * R + r) + 1] * fw;
        }
        o[i] = x;
        if (i % D == 0) {
            ml[2 * r]     = top;
            ml[2 * r + 1] = total;
        }
    }
}

// ---- the end: sinks, T_inv, mu ----

// What the weighted sums of a row, whose weights come to `sum` above 2^m, are multiplied with: the sink takes its part, and a row that sees nothing is 0.
PQ_DEVICE float result_scale(const args & a, const row_info & row, float m, float sum) {
    float weight = 1.0f;
    if (a.p.sinks) {
        const float sink = row.sink;
        if (sink > m) {
            weight = pq_exp2(m - sink);
            sum    = sum * weight + 1.0f;
        } else if (m != -CUDART_INF_F) {
            sum += pq_exp2(sink - m);
        }
    }
    return sum == 0.0f ? 0.0f : weight / sum;
}

// Writes R rows from coded sums o [R][D] and tail sums ot [R][D] (NULL: none), both relative to m; head [R][4] = {m, weight of the coded part, weight of the
// tail}. red: float [8 * NT * R]. o is in shared memory and complete (a barrier has passed).
template <int R, int NT>
PQ_DEVICE void write_rows(const args & a, const row_info * rows, const float * o, const float * ot, const float * head, const uint8_t * v_block,
                          float * red) {
    const int tid = threadIdx.x;
    const int D   = a.p.v.D;
    bool any_coded = false;
#pragma unroll
    for (int r = 0; r < R; r++) {
        any_coded = any_coded || head[4 * r + 1] != 0.0f;
    }
    const bool map = v_block && a.v.T_inv != 0 && any_coded;
    const int chunks = D / 8;
    const int n_grp  = NT / chunks; // groups of threads that share the rows of T_inv; a thread of a group has 8 columns
    if (map) {
        const int chunk = tid % chunks, grp = tid / chunks;
        if (grp < n_grp) {
            float acc[R][8];
#pragma unroll
            for (int r = 0; r < R; r++) {
#pragma unroll
                for (int e = 0; e < 8; e++) {
                    acc[r][e] = 0.0f;
                }
            }
#pragma unroll 4
            for (int j = grp; j < D; j += n_grp) {
                const uint4  t  = __ldg((const uint4 *) (v_block + a.v.T_inv + ((size_t) j * D + 8 * chunk) * 2));
                const float2 t0 = pq_half2_to_float2(t.x), t1 = pq_half2_to_float2(t.y), t2 = pq_half2_to_float2(t.z), t3 = pq_half2_to_float2(t.w);
#pragma unroll
                for (int r = 0; r < R; r++) {
                    const float y = o[r * D + j];
                    acc[r][0] += y * t0.x;
                    acc[r][1] += y * t0.y;
                    acc[r][2] += y * t1.x;
                    acc[r][3] += y * t1.y;
                    acc[r][4] += y * t2.x;
                    acc[r][5] += y * t2.y;
                    acc[r][6] += y * t3.x;
                    acc[r][7] += y * t3.y;
                }
            }
#pragma unroll
            for (int r = 0; r < R; r++) {
                float * dst = red + (grp * R + r) * D + 8 * chunk;
                *(float4 *) dst       = make_float4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
                *(float4 *) (dst + 4) = make_float4(acc[r][4], acc[r][5], acc[r][6], acc[r][7]);
            }
        }
        __syncthreads();
    }
    for (int i = tid; i < R * D; i += NT) {
        const int r = i / D, d = i % D;
        if (!rows[r].valid) {
            continue;
        }
        const float m = head[4 * r], coded = head[4 * r + 1];
        const float inv = result_scale(a, rows[r], m, coded + head[4 * r + 2]);
        float x = o[i];
        if (map) {
            x = 0.0f;
            for (int g = 0; g < n_grp; g++) {
                x += red[g * R * D + i];
            }
        }
        if (ot) {
            x += ot[i];
        }
        if (v_block && coded != 0.0f) {
            x += ((const float *) (v_block + a.v.mu))[d] * coded;
        }
        ((float *) rows[r].dst)[d] = x * inv;
    }
}

// ---- the kernels ----

PQ_DEVICE row_info get_row(const args & a, int stream, int head_kv, int row) {
    row_info x;
    x.valid = row < a.n_rows;
    row = min(row, a.n_rows - 1);
    uint32_t tok = (uint32_t) row;
    const int h = head_kv * a.n_group + a.by_group.split(tok);
    x.q    = a.p.q + stream * a.p.q_stream_stride + tok * a.p.q_token_stride + h * a.p.q_head_stride;
    uint32_t of_stream = (uint32_t) stream, of_head = (uint32_t) h;
    x.mask = a.p.mask ? a.p.mask + a.by_stream_mask.split(of_stream) * a.p.mask_stream_stride + a.by_head_mask.split(of_head) * a.p.mask_head_stride
                            + tok * a.p.mask_token_stride : nullptr;
    x.tail_mask = a.p.tail.n > 0 ? a.p.tail.mask + stream * a.p.tail.mask_stream_stride + tok * a.p.tail.mask_token_stride : nullptr;
    x.dst  = (uint8_t *) a.p.dst + stream * a.p.dst_stream_stride + tok * a.p.dst_token_stride + h * a.p.dst_head_stride;
    x.sink = a.p.sinks ? a.p.sinks[h] * LOG2E : 0.0f;
    x.q_mu = 0.0f;
    x.slope = LOG2E;
    if (a.p.max_bias > 0.0f) {
        x.slope *= exp2f(h < a.n_head_log2 ? a.slope_log2_0 * (h + 1) : a.slope_log2_1 * (2 * (h - a.n_head_log2) + 1));
    }
    return x;
}

template <int KT /* type of K, PLAIN or ANY_TYPE */, int VT /* of V */, int L /* lanes per cell */, int R /* rows */, bool TWO_PHASES>
__global__ void __launch_bounds__(n_threads(R), 1) attn_kernel(const __grid_constant__ args a) {
    static_assert(L == 8 || L == 16 || L == 32, "a slot has whole cells");
    constexpr int NT     = n_threads(R);
    constexpr int NW     = NT / PQ_WARP;
    constexpr int NT_TAIL = n_tail_threads(R);
    constexpr int CELLS  = PQ_WARP / L; // per slot
    constexpr int TILE   = cells_per_tile(L);
    constexpr int N_LANE_CELLS = lane_cells<L>::N;
    constexpr uint32_t V_TABLE = v_table_offset(L, TWO_PHASES);

    extern __shared__ __align__(16) uint8_t smem[];
    row_info * rows  = (row_info *) (smem + a.smem_rows);
    float    * q_raw = (float *)    (smem + a.smem_q);      // [R][D]
    __half   * q_map = (__half *)   (smem + a.smem_qt);     // [R][8 * L]
    uint16_t * list  = (uint16_t *) (smem + a.smem_list);
    float    * ml    = (float *)    (smem + a.smem_merge_ml); // {m, sum} [NW][R], then of the tail [R], then head [R][4]

    const int tid = threadIdx.x, lane = tid % PQ_WARP, warp = tid / PQ_WARP;
    const int D   = a.p.k.D;
    int b = blockIdx.x; // heads of one part of the context side by side: together they read whole rows of the cache
    const int row_group = b % a.n_row_groups; b /= a.n_row_groups;
    const int head_kv   = b % a.p.n_head_kv;  b /= a.p.n_head_kv;
    const int split     = b % a.n_split;      b /= a.n_split;
    const int stream = b;
    const int row0 = row_group * R;

    if ((uint32_t) __cvta_generic_to_shared(smem) != PQ_SHARED_BASE) {
        __trap(); // see PQ_SHARED_BASE
    }
    const bool k_coded = KT == ANY_TYPE ? a.p.k.type < PQ_TYPE_COUNT : KT < PQ_TYPE_COUNT;
    const bool v_coded = VT == ANY_TYPE ? a.p.v.type < PQ_TYPE_COUNT : VT < PQ_TYPE_COUNT;
    const uint8_t * k_block = k_coded ? a.p.k.codebook + head_kv * a.k.head_bytes : nullptr;
    const uint8_t * v_block = v_coded ? a.p.v.codebook + head_kv * a.v.head_bytes : nullptr;
    if (a.prefetch) { // while the kernel before this one ends; the parts of the context share the work
        prefetch_l2(k_block, a.k, split * NT + tid, a.n_split * NT);
        prefetch_l2(v_block, a.v, split * NT + tid, a.n_split * NT);
    }
    pq_pdl_wait();

    // ---- the rows; the tiles and tail slots that any of them sees ----
    constexpr int Q_AHEAD = (R * 8 * L + NT - 1) / NT; // elements of the queries per thread
    float q_ahead[Q_AHEAD];
#pragma unroll
    for (int u = 0; u < Q_AHEAD; u++) {
        const int i = tid + u * NT, r = i / D, row = row0 + r;
        const int h = head_kv * a.n_group + row % a.n_group;
        q_ahead[u] = r < R && row < a.n_rows
            ? __ldg((const float *) (a.p.q + stream * a.p.q_stream_stride + row / a.n_group * a.p.q_token_stride + h * a.p.q_head_stride) + i % D) : 0.0f;
    }
    if (tid < R) {
        rows[tid] = get_row(a, stream, head_kv, row0 + tid);
    }
    if (D < 8 * L) {
        for (int i = tid; i < R * 8 * L; i += NT) {
            q_map[i] = __float2half_rn(0.0f); // for the lanes past D
        }
    }
    __syncthreads();
    const int64_t kv0   = min(split * a.cells_per_split, a.p.n_kv);
    const int64_t kv1   = min(kv0 + a.cells_per_split, a.p.n_kv);
    const int64_t slot0 = min(split * a.slots_per_split, a.p.tail.n);
    const int64_t slot1 = min(slot0 + a.slots_per_split, a.p.tail.n);
#pragma unroll
    for (int u = 0; u < Q_AHEAD; u++) {
        if (tid + u * NT < R * D) {
            q_raw[tid + u * NT] = q_ahead[u];
        }
    }
    const int2 n_live = list_live<NT>((int) ((kv1 - kv0 + TILE - 1) / TILE), (int) (slot1 - slot0), list, (uint32_t *) (smem + a.smem_bits), [&](bool is_tile, int i) {
        bool live = false;
        for (int r = 0; r < R && !live; r++) {
            if (!is_tile) {
                if (r == 0 || rows[r].tail_mask != rows[r - 1].tail_mask) {
                    live = ((const uint16_t *) rows[r].tail_mask)[slot0 + i] != 0xfc00;
                }
            } else if (!rows[r].mask) {
                live = true;
            } else if (r == 0 || rows[r].mask != rows[r - 1].mask) {
                const int64_t cell0 = kv0 + (int64_t) i * TILE;
                live = cells_live(rows[r].mask, cell0, (int) min((int64_t) TILE, kv1 - cell0), a.mask_by_16);
            }
        }
        return live;
    });
    const int n_tile = n_live.x, n_slot = n_live.y;

    lane_side ks, vs;
    ks.data = a.p.k.data + stream * a.p.k.stream_stride + head_kv * a.p.k.head_stride;
    vs.data = a.p.v.data + stream * a.p.v.stream_stride + head_kv * a.p.v.head_stride;
    ks.row_stride = (uint32_t) a.p.k.row_stride;
    vs.row_stride = (uint32_t) a.p.v.row_stride;
    with_type<KT>(a.p.k.type, [&](auto type) { init_side<type.value, L, false>(ks, a.k, D, lane); });
    with_type<VT>(a.p.v.type, [&](auto type) { init_side<type.value, L, true>(vs, a.v, D, lane); });

    auto build_k = [&](int first, int n) { // by threads first .. first + n - 1
        with_type<KT>(a.p.k.type, [&](auto type) { build_table<type.value>(smem, k_block + a.k.centroids, D, tid - first, n); });
    };
    auto build_v = [&](int first, int n) {
        with_type<VT>(a.p.v.type, [&](auto type) { build_table<type.value>(smem + V_TABLE, v_block + a.v.centroids, D, tid - first, n); });
    };

    uint32_t kw[N_SLOT], vw[N_SLOT];
    auto tile_cells = [&](int tile) { return (int) min((int64_t) TILE, kv1 - kv0 - (int64_t) tile * TILE); };
    auto load_k = [&](int tile) { with_type<KT>(a.p.k.type, [&](auto type) { load_tile<type.value, L>(kw, ks, kv0 + (int64_t) tile * TILE, tile_cells(tile)); }); };
    auto load_v = [&](int tile) { with_type<VT>(a.p.v.type, [&](auto type) { load_tile<type.value, L>(vw, vs, kv0 + (int64_t) tile * TILE, tile_cells(tile)); }); };

    bool one_mask = true;
#pragma unroll
    for (int r = 1; r < R; r++) {
        one_mask = one_mask && rows[r].mask == rows[0].mask;
    }
    uint32_t mask[R][N_LANE_CELLS];
    auto load_mask = [&](int tile) {
        const int n = tile_cells(tile);
#pragma unroll
        for (int r = 0; r < R; r++) {
#pragma unroll
            for (int i = 0; i < N_LANE_CELLS; i++) {
                const int cell = lane_cell<L>(lane, i);
                if (r > 0 && one_mask) {
                    mask[r][i] = mask[0][i];
                } else {
                    mask[r][i] = cell >= n ? 0xfc00 : rows[r].mask ? pq_load_u16((const uint16_t *) rows[r].mask + kv0 + (int64_t) tile * TILE + cell) : 0;
                }
            }
        }
    };

    if constexpr (!TWO_PHASES) {
        if (warp < n_tile) { // on their way while tables are built
            load_k(list[warp]);
            load_v(list[warp]);
            load_mask(list[warp]);
        }
    }

    // ---- the tail by some warps of the block, queries and tables by the others ----
    float * tail_o  = (float *) (smem + a.smem_tail); // [R][D]
    float * tail_ml = ml + 2 * NW * R;
    float * head    = tail_ml + 2 * R;
    auto tail_part = [&] { return n_tile == 0 ? (float *) smem : (float *) (smem + a.smem_tail_part); };
    const int nt_tail = n_slot == 0 ? 0 : n_tile == 0 ? NT : NT_TAIL;
    if (tid < nt_tail) {
        attend_tail<L, R>(tail_part(), a, rows, q_raw, list + n_tile, n_slot, slot0, stream, head_kv, nt_tail);
    } else if (n_tile > 0) {
        map_queries<L, R>(q_map, rows, q_raw, a.k, k_block, D, a.q_scale, k_coded, tid - nt_tail, NT - nt_tail);
        if constexpr (!TWO_PHASES) {
            build_k(nt_tail, NT - nt_tail);
            build_v(nt_tail, NT - nt_tail);
        }
    }
    if (nt_tail == 0 && tid < R) {
        tail_ml[2 * tid]     = -CUDART_INF_F;
        tail_ml[2 * tid + 1] = 0.0f;
    }
    __syncthreads();

    uint32_t q[R][4]; // the lane's part of each query, in the order of its lookups
    if (n_tile > 0) {
        int cell, l;
        lane_place<L, false>(lane, &cell, &l);
#pragma unroll
        for (int r = 0; r < R; r++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                q[r][i] = ((const uint32_t *) q_map)[r * (4 * L) + 4 * l + (i ^ ks.order)]; // zeros past D
            }
        }
    }

    // ---- the coded part ----
    float o[R][2][4], m[R], sum[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
        m[r]   = -CUDART_INF_F;
        sum[r] = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            o[r][0][i] = o[r][1][i] = 0.0f;
        }
    }
    uint32_t live[2];
    float    s[R][N_LANE_CELLS];

    auto find_live = [&]() { // needed by plain rows only
#pragma unroll
        for (int i = 0; i < N_LANE_CELLS; i++) {
            bool any = false;
#pragma unroll
            for (int r = 0; r < R; r++) {
                any = any || mask[r][i] != 0xfc00;
            }
            live[i] = __ballot_sync(PQ_FULL_WARP, any);
        }
    };
    auto scores = [&](int tile) {
        float c[R][4];
        if (!k_coded || !v_coded) {
            find_live();
        }
        with_type<KT>(a.p.k.type, [&](auto type) {
            tile_scores<type.value, L, R, 0>(c, kw, ks, q, kv0 + (int64_t) tile * TILE, tile_cells(tile), live, lane);
        });
#pragma unroll
        for (int r = 0; r < R; r++) {
            gather_scores<L>(s[r], c[r], lane);
            const float q_mu = rows[r].q_mu, slope = rows[r].slope;
#pragma unroll
            for (int i = 0; i < N_LANE_CELLS; i++) {
                float x = s[r][i] + q_mu;
                if (a.p.logit_softcap != 0.0f) {
                    x = a.cap_log2e * tanhf(x * a.cap_inv);
                }
                s[r][i] = mask[r][i] == 0xfc00 ? -CUDART_INF_F : fmaf(slope, __half2float(__ushort_as_half(mask[r][i])), x);
            }
        }
    };
    auto values = [&](int tile) {
        bool grows = false;
#pragma unroll
        for (int r = 0; r < R; r++) {
#pragma unroll
            for (int i = 0; i < N_LANE_CELLS; i++) {
                grows = grows || s[r][i] > m[r] + (MAX_SHIFT + MAX_GROWTH);
            }
        }
        if (__any_sync(PQ_FULL_WARP, grows)) {
#pragma unroll
            for (int r = 0; r < R; r++) {
                float top = s[r][0];
                if constexpr (N_LANE_CELLS == 2) {
                    top = fmaxf(top, s[r][1]);
                }
                const float m_new = fmaxf(m[r], pq_warp_max(top) - MAX_SHIFT);
                const float f     = m[r] == -CUDART_INF_F ? 0.0f : pq_exp2(m[r] - m_new);
                m[r]    = m_new;
                sum[r] *= f;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    o[r][0][i] *= f;
                    o[r][1][i] *= f;
                }
            }
        }
        uint32_t p[R];
#pragma unroll
        for (int r = 0; r < R; r++) {
            const float ref = m[r] == -CUDART_INF_F ? 0.0f : m[r];
            float w[N_LANE_CELLS];
#pragma unroll
            for (int i = 0; i < N_LANE_CELLS; i++) {
                w[i] = pq_exp2(s[r][i] - ref);
                sum[r] += w[i];
            }
            p[r] = pack_weights<L>(w, lane);
        }
        with_type<VT>(a.p.v.type, [&](auto type) {
            tile_values<type.value, L, R, V_TABLE>(o, vw, vs, p, kv0 + (int64_t) tile * TILE, tile_cells(tile), live, lane);
        });
    };

    if constexpr (!TWO_PHASES) {
        for (int i = warp; i < n_tile; i += NW) {
            const int  tile = list[i];
            const bool more = i + NW < n_tile;
            const int  next = more ? list[i + NW] : 0;
            scores(tile);
            if (more) {
                load_k(next);
            }
            values(tile);
            if (more) {
                load_v(next);
                load_mask(next);
            }
        }
    } else {
        float * kept = (float *) (smem + a.smem_scores); // [score_tiles][R][N_LANE_CELLS][32]
        for (int i0 = 0; i0 < n_tile; i0 += a.score_tiles) {
            const int i1 = min(i0 + a.score_tiles, n_tile);
            __syncthreads();
            build_k(0, NT);
            __syncthreads();
            if (i0 + warp < i1) {
                load_k(list[i0 + warp]);
            }
            for (int i = i0 + warp; i < i1; i += NW) {
                load_mask(list[i]);
                scores(list[i]);
                if (i + NW < i1) {
                    load_k(list[i + NW]);
                }
#pragma unroll
                for (int r = 0; r < R; r++) {
#pragma unroll
                    for (int e = 0; e < N_LANE_CELLS; e++) {
                        kept[(((i - i0) * R + r) * N_LANE_CELLS + e) * PQ_WARP + lane] = s[r][e];
                    }
                }
            }
            __syncthreads();
            build_v(0, NT);
            __syncthreads();
            if (i0 + warp < i1) {
                load_v(list[i0 + warp]);
            }
            for (int i = i0 + warp; i < i1; i += NW) {
#pragma unroll
                for (int r = 0; r < R; r++) {
#pragma unroll
                    for (int e = 0; e < N_LANE_CELLS; e++) {
                        s[r][e] = kept[(((i - i0) * R + r) * N_LANE_CELLS + e) * PQ_WARP + lane];
                    }
                }
                if (!v_coded) {
#pragma unroll
                    for (int e = 0; e < N_LANE_CELLS; e++) {
                        bool any = false;
#pragma unroll
                        for (int r = 0; r < R; r++) {
                            any = any || s[r][e] != -CUDART_INF_F;
                        }
                        live[e] = __ballot_sync(PQ_FULL_WARP, any);
                    }
                }
                values(list[i]);
                if (i + NW < i1) {
                    load_v(list[i + NW]);
                }
            }
        }
    }
    pq_pdl_launch_next();

    // ---- merge the warps and the tail ----
    float wm[R]; // by which this warp's sums are scaled
    float * merge = (float *) smem; // [NW * CELLS][R][D], over the tables
#pragma unroll
    for (int r = 0; r < R; r++) {
        float x = pq_warp_sum(sum[r]);
        if constexpr (L == 32) {
            x *= 0.5f; // every cell was counted by two lanes
        }
        if (lane == 0) {
            ml[2 * (warp * R + r)]     = m[r];
            ml[2 * (warp * R + r) + 1] = x;
        }
    }
    if (n_slot > 0 && (n_tile == 0 || tid < NT_TAIL)) {
        merge_tail<R>(tail_o, tail_ml, tail_part(), D, n_tile == 0 ? NT : NT_TAIL);
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < R; r++) {
        float top = tail_ml[2 * r];
        for (int w = 0; w < NW; w++) {
            top = fmaxf(top, ml[2 * (w * R + r)]);
        }
        const float ref = top == -CUDART_INF_F ? 0.0f : top;
        wm[r] = pq_exp2(m[r] - ref);
        if (tid == r) {
            float coded = 0.0f;
            for (int w = 0; w < NW; w++) {
                coded += ml[2 * (w * R + r) + 1] * pq_exp2(ml[2 * (w * R + r)] - ref);
            }
            head[4 * r]     = top;
            head[4 * r + 1] = coded;
            head[4 * r + 2] = tail_ml[2 * r + 1] * pq_exp2(tail_ml[2 * r] - ref);
            head[4 * r + 3] = pq_exp2(tail_ml[2 * r] - ref);
        }
    }
    if (n_tile > 0) {
        int cell, l;
        lane_place<L, true>(lane, &cell, &l);
        if (l < D / 8) {
#pragma unroll
            for (int r = 0; r < R; r++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float * dst = merge + ((warp * CELLS + cell) * R + r) * D + 8 * l + 2 * (i ^ vs.order);
                    *(float2 *) dst = make_float2(o[r][i / 2][i % 2 * 2] * wm[r], o[r][i / 2][i % 2 * 2 + 1] * wm[r]);
                }
            }
        }
    }
    __syncthreads();

    const bool has_tail = a.p.tail.n > 0;
    float * sums = q_raw; // [R][D]: the queries are done with
    for (int i = tid; i < R * D; i += NT) {
        float x = 0.0f;
        if (n_tile > 0) {
            for (int w = 0; w < NW * CELLS; w++) {
                x += merge[w * R * D + i];
            }
        }
        const int   r  = i / D;
        const float xt = n_slot > 0 ? tail_o[i] * head[4 * r + 3] : 0.0f;
        if (a.n_split == 1) {
            sums[i] = x;
            if (has_tail) {
                tail_o[i] = xt;
            }
        } else if (rows[r].valid) {
            float * record = a.partials + ((((size_t) stream * a.p.n_head_kv + head_kv) * a.n_rows + row0 + r) * a.n_split + split) * a.record_floats;
            record[4 + i % D] = x;
            if (has_tail) {
                record[4 + D + i % D] = xt;
            }
            if (i % D < 3) {
                record[i % D] = head[4 * r + i % D];
            }
        }
    }
    if (a.n_split == 1) {
        __syncthreads();
        write_rows<R, NT>(a, rows, sums, has_tail ? tail_o : nullptr, head, v_block, (float *) smem);
    }
}

constexpr int COMBINE_THREADS = 512;

// Merges the parts of one query row: block (row of the KV head, KV head, stream).
template <int NT>
__global__ void __launch_bounds__(NT) combine_kernel(const __grid_constant__ args a) {
    __shared__ row_info row;
    __shared__ float    head[4];
    __shared__ float    o[2 * PQ_MAX_D];
    __shared__ __align__(16) float red[8 * NT];
    const int tid     = threadIdx.x;
    const int D       = a.p.v.D;
    const int head_kv = blockIdx.y;
    const int stream = blockIdx.z;
    const bool has_tail  = a.p.tail.n > 0;
    const int  width     = has_tail ? 2 * D : D;
    if (tid == 0) {
        row = get_row(a, stream, head_kv, blockIdx.x);
    }
    pq_pdl_wait();

    const float * records = a.partials + ((((size_t) stream * a.p.n_head_kv + head_kv) * a.n_rows + blockIdx.x) * a.n_split) * a.record_floats;
    float m = -CUDART_INF_F;
    for (int s = 0; s < a.n_split; s++) {
        m = fmaxf(m, records[(size_t) s * a.record_floats]);
    }
    const float ref = m == -CUDART_INF_F ? 0.0f : m;
    // groups of threads share the parts; a thread of a group has one element of the coded or the tail sum
    const int n_grp = max(1, NT / width);
    for (int i = tid % width; i < width; i += NT) {
        const int grp = tid / width;
        if (grp >= n_grp) {
            break;
        }
        float x = 0.0f;
#pragma unroll 4
        for (int s = grp; s < a.n_split; s += n_grp) {
            const float * record = records + (size_t) s * a.record_floats;
            x += record[4 + i] * pq_exp2(record[0] - ref);
        }
        red[grp * width + i] = x;
    }
    if (tid < 2) {
        float x = 0.0f;
        for (int s = 0; s < a.n_split; s++) {
            const float * record = records + (size_t) s * a.record_floats;
            x += record[1 + tid] * pq_exp2(record[0] - ref);
        }
        head[1 + tid] = x;
        head[0] = m;
    }
    __syncthreads();
    for (int i = tid; i < width; i += NT) {
        float x = 0.0f;
        for (int g = 0; g < n_grp; g++) {
            x += red[g * width + i];
        }
        o[i] = x;
    }
    __syncthreads();
    const uint8_t * v_block = a.p.v.type < PQ_TYPE_COUNT ? a.p.v.codebook + head_kv * a.v.head_bytes : nullptr;
    write_rows<1, NT>(a, &row, o, has_tail ? o + D : nullptr, head, v_block, red);
}

} // namespace pq_attn
