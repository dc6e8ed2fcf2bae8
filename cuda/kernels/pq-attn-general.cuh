// Attention on codes: the kernel for every head size, every pair of types, plain f16 rows on one side, and devices with so little shared memory
// that the tables of K and V take turns (two phases). D = 128 with codes on both sides has a quicker one, pq-attn-128.cuh.
//
// L = 8, 16 or 32 lanes share a cell; a lane owns 8 elements of the head (four half2).
//
//   scores   s += y * q' in half2 on each lane over its four half2, then the sum over the lanes of a cell by a tensor-core product
//            with a matrix of ones, in floats, for 16 slots at once: two shuffles instead of a butterfly.
//   softmax  one cell per lane (two for L = 8).
//   values   o += p * y by a tensor-core product with a diagonal matrix of weights: a multiply-add per lane from halves into
//            floats, four half2 in one instruction.
#pragma once

#include "pq-attn-block.cuh"

namespace pq_attn {

// What a lane needs to look up its four half2 of a cell.
struct lane_side {
    const uint8_t * data;    // of the stream and head, at the lane's codes
    uint32_t row_stride;
    uint32_t low[4];         // 8 bits: address bytes that are the lane's, as PRMT takes them. 6 bits: the lane's part of four addresses
    uint32_t pick[4];        // 8 bits: PRMT selectors. 6 bits: shifts
    int32_t  cell;           // which of a slot's cells
    int32_t  order;          // half2 i is at position i ^ order of the lane's four
    int32_t  next_lane;      // 6 bits: the lane whose word follows this lane's
    uint32_t funnel;         // 6 bits: shift that brings the lane's 24 bits to bits 8..31
    int32_t  bytewise;
};

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
    if constexpr (TYPE == PQ_TYPE_PQ4) {
        s.data += 4 * l;
        s.order = rot;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s.pick[i] = 0x7600 | (i ^ rot) << 4 | (4 + i % 2);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            s.low[i] = (low | 4 * (2 * i ^ rot)) | (low | 4 * ((2 * i + 1) ^ rot)) << 8 | plane << 16;
        }
    } else if constexpr (TYPE == PQ_TYPE_PQ3) {
        s.order = rot;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s.pick[i] = 6 * (i ^ rot);
            s.low[i]  = low | 4 * (i ^ rot) | plane << 14;
        }
        // Four lanes share three words: bits 0, 24, 48 and 72 of them are the first of theirs.
        s.bytewise  = sa.bytewise;
        s.data     += s.bytewise ? 3 * l : 3 * l / 4 * 4;
        s.next_lane = lane;
        s.funnel    = s.bytewise ? 0 : 24 - 8 * (l % 4);
        if (!s.bytewise && (l % 4 == 1 || l % 4 == 2)) {
            s.next_lane = !IS_V || L == 32 ? lane + 1 : L == 16 ? (lane % 2 == 0 ? lane + 1 : lane + 3) : lane + 4;
        }
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

// ---- codes ----

template <int TYPE>
PQ_DEVICE uint32_t load_word(const lane_side & s, const uint8_t * p) {
    if constexpr (TYPE == PQ_TYPE_PQ2) {
        return pq_load_stream_u16(p);
    } else if constexpr (TYPE == PQ_TYPE_PQ3) {
        if (s.bytewise) {
            return (uint32_t) p[0] << 8 | (uint32_t) p[1] << 16 | (uint32_t) p[2] << 24;
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
// pq3: the lane's 24 bits at bits 8..31, from its word and the next.
PQ_DEVICE uint32_t join_words(uint32_t w, uint32_t next, const lane_side & s) {
    return __funnelshift_r(w, next, s.funnel);
}

template <int TYPE, uint32_t TABLE /* offset in dynamic shared memory */, bool JOINED = false /* pq3: w is 24 bits at bits 8..31 */>
PQ_DEVICE void lookup(uint32_t (&y)[4], uint32_t w, const lane_side & s) {
    if constexpr (TYPE == PQ_TYPE_PQ4) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            y[i] = pq_load_shared_u32<TABLE>(__byte_perm(w, s.low[i / 2], s.pick[i]));
        }
    } else if constexpr (TYPE == PQ_TYPE_PQ3) {
        const uint32_t bits = JOINED ? w : join_words(w, __shfl_sync(PQ_FULL_WARP, w, s.next_lane), s);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            y[i] = pq_load_shared_u32<TABLE>((bits >> s.pick[i] & 0x3f00) | s.low[i]);
        }
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

template <int KT /* type of K, PLAIN or ANY_TYPE */, int VT /* of V */, int L /* lanes per cell */, int R /* rows */, bool TWO_PHASES>
__global__ void __launch_bounds__(n_threads_general(R), 1) general_kernel(const __grid_constant__ args a) {
    static_assert(L == 8 || L == 16 || L == 32, "a slot has whole cells");
    constexpr int NT     = n_threads_general(R);
    constexpr int NW     = NT / PQ_WARP;
    constexpr int CELLS  = PQ_WARP / L; // per slot
    constexpr int TILE   = cells_per_tile(L);
    constexpr int N_LANE_CELLS = lane_cells<L>::N;
    constexpr uint32_t V_TABLE = v_table_offset(KT, L, TWO_PHASES);

    extern __shared__ __align__(16) uint8_t smem[];
    const int tid = threadIdx.x, lane = tid % PQ_WARP, warp = tid / PQ_WARP;
    const bool k_coded = KT == ANY_TYPE ? a.p.k.type < PQ_TYPE_COUNT : KT < PQ_TYPE_COUNT;
    const bool v_coded = VT == ANY_TYPE ? a.p.v.type < PQ_TYPE_COUNT : VT < PQ_TYPE_COUNT;
    block b = locate_block<R, NT>(a, smem, k_coded, v_coded);

    auto build_k = [&](int thread, int n) {
        with_type<KT>(a.p.k.type, [&](auto type) { build_table<type.value, IN_ORDER>(smem, b.k_block + a.k.centroids, b.D, thread, n); });
    };
    auto build_v = [&](int thread, int n) {
        with_type<VT>(a.p.v.type, [&](auto type) { build_table<type.value, IN_ORDER>(smem + V_TABLE, b.v_block + a.v.centroids, b.D, thread, n); });
    };
    if (!TWO_PHASES && a.early_tables) {
        build_k(tid, NT);
        build_v(tid, NT);
    }
    place_rows<R>(b, a);
    pq_pdl_wait();
    begin_block<L, R, NT>(b, a, smem, []() {});
    const int     n_tile = b.n_tile;
    const int64_t kv0    = b.kv0;

    lane_side ks, vs;
    ks.data = a.p.k.data + b.stream * a.p.k.stream_stride + b.head_kv * a.p.k.head_stride;
    vs.data = a.p.v.data + b.stream * a.p.v.stream_stride + b.head_kv * a.p.v.head_stride;
    ks.row_stride = (uint32_t) a.p.k.row_stride;
    vs.row_stride = (uint32_t) a.p.v.row_stride;
    with_type<KT>(a.p.k.type, [&](auto type) { init_side<type.value, L, false>(ks, a.k, b.D, lane); });
    with_type<VT>(a.p.v.type, [&](auto type) { init_side<type.value, L, true>(vs, a.v, b.D, lane); });

    uint32_t kw[N_SLOT], vw[N_SLOT];
    auto tile_cells = [&](int tile) { return b.cells_of(tile, TILE); };
    auto load_k = [&](int tile) { with_type<KT>(a.p.k.type, [&](auto type) { load_tile<type.value, L>(kw, ks, kv0 + (int64_t) tile * TILE, tile_cells(tile)); }); };
    auto load_v = [&](int tile) { with_type<VT>(a.p.v.type, [&](auto type) { load_tile<type.value, L>(vw, vs, kv0 + (int64_t) tile * TILE, tile_cells(tile)); }); };

    bool one_mask = true;
#pragma unroll
    for (int r = 1; r < R; r++) {
        one_mask = one_mask && b.rows[r].mask == b.rows[0].mask;
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
                    mask[r][i] = cell >= n ? 0xfc00 : b.rows[r].mask ? pq_load_u16((const uint16_t *) b.rows[r].mask + kv0 + (int64_t) tile * TILE + cell) : 0;
                }
            }
        }
    };

    prepare_block<L, R, NT>(
        b, a, smem, true,
        [&](int thread, int n) {
            map_queries<L, R>(b.q_map, b.rows, b.q, a.k, b.k_block, b.D, a.q_scale, thread, n);
            if (!TWO_PHASES && !a.early_tables) {
                build_k(thread, n);
                build_v(thread, n);
            }
        },
        [&]() {
            if (!TWO_PHASES && warp < n_tile) {
                load_k(b.list[warp]);
                load_v(b.list[warp]);
                load_mask(b.list[warp]);
            }
        });

    uint32_t q[R][4]; // the lane's part of each query, in the order of its lookups
    if (n_tile > 0) {
        int cell, l;
        lane_place<L, false>(lane, &cell, &l);
#pragma unroll
        for (int r = 0; r < R; r++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                q[r][i] = ((const uint32_t *) b.q_map)[r * (q_map_stride(L) / 2) + 4 * l + (i ^ ks.order)]; // zeros past D
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
            const float q_mu = b.rows[r].q_mu, slope = b.rows[r].slope;
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
            const int  tile = b.list[i];
            const bool more = i + NW < n_tile;
            const int  next = more ? b.list[i + NW] : 0;
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
            build_k(tid, NT);
            __syncthreads();
            if (i0 + warp < i1) {
                load_k(b.list[i0 + warp]);
            }
            for (int i = i0 + warp; i < i1; i += NW) {
                load_mask(b.list[i]);
                scores(b.list[i]);
                if (i + NW < i1) {
                    load_k(b.list[i + NW]);
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
            build_v(tid, NT);
            __syncthreads();
            if (i0 + warp < i1) {
                load_v(b.list[i0 + warp]);
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
                values(b.list[i]);
                if (i + NW < i1) {
                    load_v(b.list[i + NW]);
                }
            }
        }
    }
    pq_pdl_launch_next();

#pragma unroll
    for (int r = 0; r < R; r++) {
        float x = pq_warp_sum(sum[r]);
        if constexpr (L == 32) {
            x *= 0.5f; // every cell was counted by two lanes
        }
        if (lane == 0) {
            b.ml[2 * (warp * R + r)]     = m[r];
            b.ml[2 * (warp * R + r) + 1] = x;
        }
    }
    finish_block<R, NT, CELLS>(b, a, smem, [&](const float (&factor)[R], float * dst) {
        int cell, l;
        lane_place<L, true>(lane, &cell, &l);
        if (l < b.D / 8) {
#pragma unroll
            for (int r = 0; r < R; r++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    *(float2 *) (dst + (cell * R + r) * b.D + 8 * l + 2 * (i ^ vs.order)) =
                        make_float2(o[r][i / 2][i % 2 * 2] * factor[r], o[r][i / 2][i % 2 * 2 + 1] * factor[r]);
                }
            }
        }
    });
}

} // namespace pq_attn
