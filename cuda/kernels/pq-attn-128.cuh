// Attention on codes: the kernel for D = 128 with codes on both sides, the shape of most models. Tiles of 32 cells per warp.
//
// In what follows g = lane / 4 and t = lane % 4, as the tensor-core products place their operands (pq-cuda-common.cuh).
//
//   K   Lane (g, t) looks up quarter t of cell g of a group of 8: 16 half2. Products sum over t, so C has whole scores. All 8 cells want
//       the same subspace at the same time, though, and it lies in one bank: so cell g takes half2 i ^ x at step i, where x ("turn") depends
//       on g. The product undoes that: for each turn it has rows or columns of its own, holding the query in that turn's order, and
//       of its results those are kept whose turn is the cell's. With R rows there is room for 16 / R turns (8 for one
//       row); what is left of the turn is undone by swapping registers. The cost hardly depends on R.
//   V   16 lanes share a cell, two cells side by side; a lane owns 8 elements (four half2). One row: B is a diagonal matrix of
//       weights, so a product is four multiply-adds per lane, from halves into floats. More rows: the half2 of two cells are
//       re-packed by element, and B has the weights of two rows for those lanes' cells.
//
// Both ways lookups read 32 different banks. Per cell, head and side that is 2 wavefronts of shared memory for 64 lookups.
#pragma once

#include "pq-attn-block.cuh"
#include "pq-attn-general.cuh" // the V side of a lane

namespace pq_attn {

constexpr int TILE_128  = TILE_128_CELLS;
constexpr int GROUP_128 = 8;  // cells of a group

// Words of codes that a lane loads of a cell's K.
template <int TYPE> struct k_words { enum { N = TYPE == PQ_TYPE_PQ4 ? 4 : TYPE == PQ_TYPE_PQ3 ? 3 : 2 }; };

// Bits of the turn (of a half2 index) that R rows leave to register swaps.
template <int TYPE, int R> struct k_swaps {
    enum { BITS = (R == 1 ? 0 : R == 4 ? 1 : 3) & (TYPE == PQ_TYPE_PQ2 ? 2 : 7) }; // pq2: a lookup gives two half2, their order is fixed
};

struct k_lane {
    const uint8_t * data; // of the stream and head, at the lane's quarter
    uint32_t row_stride;
    uint32_t low[4];      // 8 bits: address bytes that are the lane's, as PRMT takes them. 6 bits: the lane's part of 4 addresses
    uint32_t pick[4];     // 8 bits: PRMT selectors. 6 bits: shifts
    int32_t  turn;        // of half2 indexes
};

template <int TYPE>
PQ_DEVICE void init_k_lane(k_lane & s, int lane) {
    const int g = lane / 4, t = lane % 4;
    s.data += 4 * k_words<TYPE>::N * t;
    if constexpr (TYPE == PQ_TYPE_PQ2) {
        s.turn = 2 * (g % 4); // 8-byte lookups: each half of a warp has 16 pairs of banks
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s.pick[i] = pq_keep(0x7600 | (i ^ g % 4) << 4 | (4 + i % 2), lane);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            s.low[i] = pq_keep((32 * t + 8 * (2 * i ^ g % 4)) | (32 * t + 8 * ((2 * i + 1) ^ g % 4)) << 8, lane);
        }
    } else {
        s.turn = g;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s.pick[i] = pq_keep(TYPE == PQ_TYPE_PQ4 ? 0x7600 | (i ^ g % 4) << 4 | (4 + i % 2) : 6 * (i ^ g % 4), lane);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s.low[i] = pq_keep(TYPE == PQ_TYPE_PQ4 ? (32 * t + 4 * (2 * i ^ g)) | (32 * t + 4 * ((2 * i + 1) ^ g)) << 8 : 32 * t + 4 * (i ^ g), lane);
        }
    }
}

// The words of the lane's cells of a tile, of which n exist.
template <int TYPE>
PQ_DEVICE void load_k_tile(uint32_t (&w)[4][k_words<TYPE>::N], const k_lane & s, uint32_t cell0, int n, int lane) {
#pragma unroll
    for (int q = 0; q < 4; q++) {
        const uint8_t * x = pq_mad_wide(s.row_stride, cell0 + min(GROUP_128 * q + lane / 4, n - 1), s.data);
        if constexpr (TYPE == PQ_TYPE_PQ4) {
            const uint4 v = pq_load_stream_u128(x);
            w[q][0] = v.x;
            w[q][1] = v.y;
            w[q][2] = v.z;
            w[q][3] = v.w;
        } else if constexpr (TYPE == PQ_TYPE_PQ3) {
            w[q][0] = pq_load_stream_u32(x);
            w[q][1] = pq_load_stream_u32(x + 4);
            w[q][2] = pq_load_stream_u32(x + 8);
        } else {
            const uint2 v = pq_load_stream_u64(x);
            w[q][0] = v.x;
            w[q][1] = v.y;
        }
    }
}

// The same from the warp's tile in shared memory, [32][head bytes]: where, and the words of a group.
template <int TYPE>
PQ_DEVICE uint32_t k_place(int lane) {
    return (4 * k_words<TYPE>::N) * (4 * (lane / 4) + lane % 4);
}

template <int TYPE>
PQ_DEVICE void read_k_words(uint32_t (&w)[k_words<TYPE>::N], uint32_t at) {
    if constexpr (TYPE == PQ_TYPE_PQ4) {
        const uint4 v = pq_shared_u128(at);
        w[0] = v.x;
        w[1] = v.y;
        w[2] = v.z;
        w[3] = v.w;
    } else if constexpr (TYPE == PQ_TYPE_PQ3) {
        w[0] = pq_shared_u32(at);
        w[1] = pq_shared_u32(at + 4);
        w[2] = pq_shared_u32(at + 8);
    } else {
        const uint2 v = pq_shared_u64(at);
        w[0] = v.x;
        w[1] = v.y;
    }
}

template <int TYPE>
PQ_DEVICE void v_place(int lane, uint32_t * at, uint32_t * next) {
    int cell, l;
    lane_place<16, true>(lane, &cell, &l);
    *at   = cell * (16 * k_words<TYPE>::N) + (TYPE == PQ_TYPE_PQ4 ? 4 * l : TYPE == PQ_TYPE_PQ3 ? 3 * l / 4 * 4 : 2 * l);
    *next = l % 4 == 1 || l % 4 == 2 ? 4 : 0; // pq3: 24 bits that go on in the next word
}

template <int TYPE>
PQ_DEVICE uint32_t read_v_word(uint32_t at, uint32_t next, const lane_side & vl) {
    if constexpr (TYPE == PQ_TYPE_PQ3) {
        return join_words(pq_shared_u32(at), pq_shared_u32(at + next), vl);
    } else {
        return TYPE == PQ_TYPE_PQ4 ? pq_shared_u32(at) : pq_shared_u16(at);
    }
}

PQ_DEVICE void swap_if(bool yes, uint32_t & a, uint32_t & b) {
    const uint32_t x = yes ? b : a;
    b = yes ? a : b;
    a = x;
}

// The lane's 16 half2 of one cell, half2 i ^ turn at i. The row of the table: first the first halves of the four quarters (BY_QUARTERS).
template <int TYPE>
PQ_DEVICE void lookup_k(uint32_t (&y)[16], const uint32_t (&w)[k_words<TYPE>::N], const k_lane & s) {
    if constexpr (TYPE == PQ_TYPE_PQ2) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint32_t at = __byte_perm(w[i / 4], s.low[i % 4 / 2], s.pick[i % 4]);
            const uint2    v  = i < 4 ? pq_load_shared_u64<0>(at) : pq_load_shared_u64<128>(at);
            y[2 * i]     = v.x;
            y[2 * i + 1] = v.y;
        }
    } else {
        // code i ^ turn: bit 2 of the turn swaps words, the others choose within a word
        uint32_t x[4];
        if constexpr (TYPE == PQ_TYPE_PQ4) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                x[i] = w[i];
            }
        } else { // four codes of 24 bits each at bits 8..31
            x[0] = w[0] << 8;
            x[1] = __funnelshift_r(w[0], w[1], 16);
            x[2] = __funnelshift_r(w[1], w[2], 8);
            x[3] = w[2];
        }
        swap_if(s.turn & 4, x[0], x[1]);
        swap_if(s.turn & 4, x[2], x[3]);
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const uint32_t at = TYPE == PQ_TYPE_PQ4 ? __byte_perm(x[i / 4], s.low[i % 8 / 2], s.pick[i % 4])
                                                    : ((x[i / 4] >> s.pick[i % 4] & 0x3f00) | s.low[i % 4]) ^ i % 8 / 4 * 16;
            y[i] = i < 8 ? pq_load_shared_u32<0>(at) : pq_load_shared_u32<128>(at);
        }
    }
}

// How R rows and the turns share the 16 rows of A (R = 4, 8).
template <int TYPE, int R>
PQ_DEVICE void query_place(int m /* row of A */, int * row, int * turn) {
    *row = m % R;
    if constexpr (R == 8) {
        *turn = m / 8 * 4;
    } else if constexpr (TYPE == PQ_TYPE_PQ2) { // bit 1 of the turn follows the even or odd cell, see take_scores()
        *turn = m / 8 * 2 + m / 4 % 2 * 4;
    } else {
        *turn = m / 4 % 2 * 2 + m / 8 * 4;
    }
}

// Which row and which cells of a tile a lane does the softmax of.
template <int R> struct softmax_lane {
    enum { N = R }; // cells

    static __device__ __forceinline__ int row(int lane) {
        return R == 1 ? 0 : R == 4 ? lane / 4 % 4 : lane / 4;
    }
    static __device__ __forceinline__ bool first(int lane) { // R = 4: of the two lanes with the same g % 4 and t, the one with cells 0..15
        return lane / 16 == lane % 2;
    }
    // R = 4 and 8: cells come in pairs, i even
    static __device__ __forceinline__ int cell(int lane, int i) {
        return R == 1 ? 8 * (lane % 4) + lane / 4 : R == 4 ? 8 * ((first(lane) ? 0 : 2) + i / 2) + 2 * (lane % 4) + i % 2 : 8 * (i / 2) + 2 * (lane % 4) + i % 2;
    }
};

// Scores of a tile: s[i] of cell softmax_lane::cell(lane, i). words(i, w): the lane's words of group i. q: R = 1: the lane's part of B, 16;
// otherwise of A, 32.
template <int TYPE, int R, int N_Q, class WORDS>
PQ_DEVICE void scores_128(float (&s)[softmax_lane<R>::N], WORDS words, const k_lane & kl, const uint32_t (&q)[N_Q], int lane) {
    const int g = lane / 4, t = lane % 4;
    if constexpr (R == 1) {
        // A: two groups of cells. C [cell][turn]: of row g, column g is wanted
        float v[4];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t y[2][16];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                uint32_t w[k_words<TYPE>::N];
                words(2 * h + i, w);
                lookup_k<TYPE>(y[i], w, kl);
            }
            float c[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
#pragma unroll
            for (int i = 0; i < 16; i += 2) {
                pq_mma_m16n8k16(c, y[0][i], y[1][i], y[0][i + 1], y[1][i + 1], q[i], q[i + 1]);
            }
            v[2 * h]     = g % 2 ? c[1] : c[0];
            v[2 * h + 1] = g % 2 ? c[3] : c[2];
        }
        const int owner = g * 4 + g / 2;
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[i] = __shfl_sync(PQ_FULL_WARP, v[i], owner);
        }
        s[0] = t < 2 ? (t == 0 ? x[0] : x[1]) : (t == 2 ? x[2] : x[3]);
    } else {
        // B: a group of cells. C [row and turn][cell]
        float v[4][2];
#pragma unroll
        for (int h = 0; h < 4; h++) {
            uint32_t y[16], w[k_words<TYPE>::N];
            words(h, w);
            lookup_k<TYPE>(y, w, kl);
            if constexpr (k_swaps<TYPE, R>::BITS & 1) {
#pragma unroll
                for (int i = 0; i < 16; i += 2) {
                    swap_if(kl.turn & 1, y[i], y[i + 1]);
                }
            }
            if constexpr (k_swaps<TYPE, R>::BITS & 2) {
#pragma unroll
                for (int i = 0; i < 16; i += 4) {
                    swap_if(kl.turn & 2, y[i],     y[i + 2]);
                    swap_if(kl.turn & 2, y[i + 1], y[i + 3]);
                }
            }
            float c[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
#pragma unroll
            for (int i = 0; i < 8; i++) {
                pq_mma_m16n8k16(c, q[4 * i], q[4 * i + 1], q[4 * i + 2], q[4 * i + 3], y[2 * i], y[2 * i + 1]);
            }
            // the turn of cells 2t and 2t + 1 chooses rows g or g + 8 of C (query_place)
            if constexpr (R == 4 && TYPE == PQ_TYPE_PQ2) {
                v[h][0] = c[0];
                v[h][1] = c[3];
            } else {
                const bool upper = R == 8 && TYPE == PQ_TYPE_PQ2 ? t % 2 : t / 2;
                v[h][0] = upper ? c[2] : c[0];
                v[h][1] = upper ? c[3] : c[1];
            }
        }
        if constexpr (R == 8) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                s[i] = v[i / 2][i % 2];
            }
        } else { // half of the lanes have scores: they hand two groups to the others
            const bool first = softmax_lane<R>::first(lane);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float other = __shfl_xor_sync(PQ_FULL_WARP, v[2 + i / 2][i % 2], 16);
                s[i] = first ? v[i / 2][i % 2] : other;
            }
        }
    }
}

// The weights of a tile on their way from the softmax's lanes to those of B, R > 1: half2 {cell c, cell c + 16} at
// [c / 4][c % 2][row][c / 2 % 2] of a warp's own weights.
template <int R>
PQ_DEVICE void put_weights(uint32_t * weights, const float (&p)[R], int lane) {
    const int t = lane % 4, row = softmax_lane<R>::row(lane);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        // cell c = 8 * (i / 2) + 2t + i % 2, below 16
        uint32_t * word = weights + ((2 * (i / 2) * 2 + t / 2 * 2 + i % 2) * R + row) * 2 + t % 2;
        if constexpr (R == 8) {
            *word = pq_as_u32(__floats2half2_rn(p[i], p[i + 4]));
        } else {
            ((__half *) word)[softmax_lane<R>::first(lane) ? 0 : 1] = __float2half_rn(p[i]);
        }
    }
}

// o += weights * y. word(j): the lane's word of slot j, asked for in the order j, j + 8, j + 1, j + 9, ... R = 1: o[dims 0..3 or 4..7 of the lane]; otherwise o[two rows][half2], {element, row} of {0, 0}, {0, 1}, {1, 0}, {1, 1}.
template <int TYPE, uint32_t TABLE, int R, int N_O, class WORD>
PQ_DEVICE void values_128(float (&o)[N_O][4], WORD word, const lane_side & vl, uint32_t p, const uint32_t * weights, int lane) {
    const int g = lane / 4, t = lane % 4;
    if constexpr (R == 1) {
        const uint32_t pick_lo = g == 2 * t ? 0x4410 : g == 2 * t + 1 ? 0x1044 : 0x4444;
        const uint32_t pick_hi = g == 2 * t ? 0x4432 : g == 2 * t + 1 ? 0x3244 : 0x4444;
        const int      owner   = t / 2 * 4;
#pragma unroll
        for (int j = 0; j < N_SLOT / 2; j++) {
            uint32_t y[2][4];
            lookup<TYPE, TABLE, PQ_TENSOR_COPY>(y[0], word(j),     vl);
            lookup<TYPE, TABLE, PQ_TENSOR_COPY>(y[1], word(j + 8), vl);
            const uint32_t pj = __shfl_sync(PQ_FULL_WARP, p, pq_opaque(owner) + 4 * (2 * j % 8) + j / 4); // cell 2j + t / 2
            const uint32_t b0 = __byte_perm(pj, 0, pick_lo);
            const uint32_t b1 = __byte_perm(pj, 0, pick_hi);
            pq_mma_m16n8k16(o[0], y[0][0], y[0][1], y[1][0], y[1][1], b0, b1);
            pq_mma_m16n8k16(o[1], y[0][2], y[0][3], y[1][2], y[1][3], b0, b1);
        }
    } else {
#pragma unroll
        for (int j = 0; j < N_SLOT / 2; j += 2) {
            uint32_t y[4][4];
            lookup<TYPE, TABLE, PQ_TENSOR_COPY>(y[0], word(j),     vl);
            lookup<TYPE, TABLE, PQ_TENSOR_COPY>(y[1], word(j + 8), vl);
            lookup<TYPE, TABLE, PQ_TENSOR_COPY>(y[2], word(j + 1), vl);
            lookup<TYPE, TABLE, PQ_TENSOR_COPY>(y[3], word(j + 9), vl);
            uint2 b[R / 2];
#pragma unroll
            for (int r = 0; r < R / 2; r++) {
                b[r] = *(const uint2 *) (weights + (j * R + 2 * r) * 2);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t a0 = __byte_perm(y[0][i], y[1][i], 0x5410), a1 = __byte_perm(y[0][i], y[1][i], 0x7632);
                const uint32_t a2 = __byte_perm(y[2][i], y[3][i], 0x5410), a3 = __byte_perm(y[2][i], y[3][i], 0x7632);
#pragma unroll
                for (int r = 0; r < R / 2; r++) {
                    pq_mma_m16n8k16(o[4 * r + i], a0, a1, a2, a3, b[r].x, b[r].y);
                }
            }
        }
    }
}

template <int KT /* type of K */, int VT /* of V */, int R /* rows */>
__global__ void __launch_bounds__(n_threads_128(VT, R, PQ_TENSOR_COPY), 1) kernel_128(const __grid_constant__ args a) {
    static_assert(KT >= 0 && KT < PQ_TYPE_COUNT && VT >= 0 && VT < PQ_TYPE_COUNT, "both sides hold codes");
    constexpr int NT  = n_threads_128(VT, R, PQ_TENSOR_COPY);
    constexpr int NW  = NT / PQ_WARP;
    constexpr int L   = 16;
    constexpr int D   = 128;
    constexpr int N_Q = R == 1 ? 16 : 32;
    constexpr int N_O = R == 1 ? 2 : 2 * R;
    constexpr int N_S = softmax_lane<R>::N;
    constexpr uint32_t V_TABLE = table_bytes(KT, L);

    extern __shared__ __align__(16) uint8_t smem[];
    const int tid = threadIdx.x, lane = tid % PQ_WARP, warp = tid / PQ_WARP;
    const int g = lane / 4, t = lane % 4;
    block b = locate_block<R, NT>(a, smem, true, true);

    auto build = [&](int thread, int n) {
        build_table<KT, BY_QUARTERS>(smem, b.k_block + a.k.centroids, D, thread, n);
        build_table<VT, IN_ORDER>(smem + V_TABLE, b.v_block + a.v.centroids, D, thread, n);
    };
    constexpr int N_GRP = NT / L;                     // groups of lanes, each with a row of T_inv
    constexpr int N_ROW = (D + N_GRP - 1) / N_GRP;    // rows per group
    const bool map_ahead = a.early_tables && a.k.T_inv != 0;
    uint4 t_inv[N_ROW];
    float mu[D / PQ_WARP];
    if (a.early_tables) { // all loads at once: they are what takes time
        typedef table_item<KT, BY_QUARTERS> k_item;
        typedef table_item<VT, IN_ORDER>    v_item;
        constexpr int N_K = (k_item::count(D) + NT - 1) / NT, N_V = (v_item::count(D) + NT - 1) / NT;
        k_item k[N_K];
        v_item v[N_V];
#pragma unroll
        for (int i = 0; i < N_K; i++) {
            k[i].load(b.k_block + a.k.centroids, tid + i * NT, D);
        }
#pragma unroll
        for (int i = 0; i < N_V; i++) {
            v[i].load(b.v_block + a.v.centroids, tid + i * NT, D);
        }
#pragma unroll
        for (int i = 0; i < N_K; i++) {
            k[i].store(smem, tid + i * NT, D);
        }
#pragma unroll
        for (int i = 0; i < N_ROW; i++) {
            const int j = tid / L + i * N_GRP;
            t_inv[i] = map_ahead && j < D ? load_t_inv(b.k_block, a.k, D, j, tid % L) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < D / PQ_WARP; i++) {
            mu[i] = __ldg((const float *) (b.k_block + a.k.mu) + lane + i * PQ_WARP);
        }
#pragma unroll
        for (int i = 0; i < N_V; i++) {
            v[i].store(smem + V_TABLE, tid + i * NT, D);
        }
    }
    // R > 1: weights of a tile per warp, then as many zeros for the lanes of B that are off its diagonal
    uint32_t * weights = (uint32_t *) (smem + a.smem_weights);
    if (R > 1 && tid < 16 * R + 4) {
        weights[NW * 16 * R + tid] = 0;
    }
    b.D = D;
    place_rows<R>(b, a);

    k_lane    kl = {};
    lane_side vl = {};
    auto init_lanes = [&]() {
        init_k_lane<KT>(kl, lane);
        init_side<VT, L, true>(vl, a.v, D, lane);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            vl.low[i]  = pq_keep(vl.low[i], lane);
            vl.pick[i] = pq_keep(vl.pick[i], lane);
        }
    };
#if PQ_TENSOR_COPY
    // A tile of K and one of V per warp, in flight until the warp comes to them; a warp reads a tile to registers and asks for its next at once.
    constexpr uint32_t K_BYTES = TILE_128 * 16 * k_words<KT>::N, V_BYTES = TILE_128 * 16 * k_words<VT>::N;
    const uint32_t k_tile = PQ_SHARED_BASE + a.smem_codes + warp * (K_BYTES + V_BYTES), v_tile = k_tile + K_BYTES;
    const uint32_t k_barrier = PQ_SHARED_BASE + a.smem_barriers + warp * 16, v_barrier = k_barrier + 8;
    if (lane == 0) {
        pq_mbarrier_init(k_barrier);
        pq_mbarrier_init(v_barrier);
        pq_mbarrier_init_done();
        pq_tensor_map_prefetch(a.k_map);
        pq_tensor_map_prefetch(a.v_map);
    }
#endif
    pq_pdl_wait();
    begin_block<L, R, NT>(b, a, smem, [&]() {
        if (a.early_tables) {
            if (map_ahead) {
                float x[R][8];
                load_queries<R>(x, b.q, D, tid % L);
#pragma unroll
                for (int i = 0; i < N_ROW; i++) {
                    if (tid / L + i * N_GRP < D) { // the same for the whole warp
                        map_row<L, R>(b.q_map, tid / L + i * N_GRP, t_inv[i], x, a.q_scale, lane);
                    }
                }
            } else {
                for (int i = tid; i < R * D; i += NT) {
                    b.q_map[i / D * q_map_stride(L) + i % D] = __float2half_rn(b.q[i] * a.q_scale);
                }
            }
            map_mu<R>(b.rows, b.q, [&](int i) { return mu[i % (D / PQ_WARP)]; }, D, a.q_scale, warp, NW, lane);
        }
    });
#if !PQ_TENSOR_COPY
    kl.data = a.p.k.data + b.stream * a.p.k.stream_stride + b.head_kv * a.p.k.head_stride + b.kv0 * a.p.k.row_stride;
    vl.data = a.p.v.data + b.stream * a.p.v.stream_stride + b.head_kv * a.p.v.head_stride + b.kv0 * a.p.v.row_stride;
    kl.row_stride = (uint32_t) a.p.k.row_stride;
    vl.row_stride = (uint32_t) a.p.v.row_stride;
    init_lanes();
#endif

    // the lane's row in the softmax
    const int row = softmax_lane<R>::row(lane);
    const uint16_t * my_mask = (const uint16_t *) b.rows[row].mask;
    my_mask = my_mask ? my_mask + b.kv0 : nullptr;

    uint32_t mask[(N_S + 1) / 2]; // of a cell, or of two
#if PQ_TENSOR_COPY
    auto load_k = [&](int tile) {
        if (lane == 0) {
            pq_tensor_copy(k_tile, a.k_map, b.head_kv, (int) b.kv0 + tile * TILE_128, b.stream, K_BYTES, k_barrier);
        }
    };
    auto load_v = [&](int tile) {
        if (lane == 0) {
            pq_tensor_copy(v_tile, a.v_map, b.head_kv, (int) b.kv0 + tile * TILE_128, b.stream, V_BYTES, v_barrier);
        }
    };
#else
    uint32_t kw[4][k_words<KT>::N], vw[N_SLOT];
    auto load_k = [&](int tile) { load_k_tile<KT>(kw, kl, tile * TILE_128, b.cells_of(tile, TILE_128), lane); };
    auto load_v = [&](int tile) { load_tile<VT, L>(vw, vl, tile * TILE_128, b.cells_of(tile, TILE_128)); };
#endif
    auto load_mask = [&](int tile) {
        const int n = b.cells_of(tile, TILE_128);
        const uint16_t * m = my_mask + tile * TILE_128;
        if (R > 1 && my_mask && a.mask_by_16 && n == TILE_128) { // the usual tile
            m += softmax_lane<R>::cell(lane, 0);
#pragma unroll
            for (int i = 0; i < N_S; i += 2) {
                mask[i / 2] = pq_load_u32(m + 4 * i);
            }
            return;
        }
#pragma unroll
        for (int i = 0; i < N_S; i += 2) {
            const int cell = softmax_lane<R>::cell(lane, i);
            if (cell >= n) {
                mask[i / 2] = 0xfc00fc00u;
            } else if (!my_mask) {
                mask[i / 2] = R == 1 || cell + 1 < n ? 0 : 0xfc000000u;
            } else if (R == 1) {
                mask[i / 2] = pq_load_u16(m + cell);
            } else {
                mask[i / 2] = pq_load_u16(m + cell) | (cell + 1 < n ? pq_load_u16(m + cell + 1) << 16 : 0xfc000000u);
            }
        }
    };

    // Warps that attend to the tail join at the second round of tiles; meanwhile the others go ahead. When tables are still to be
    // built, all wait for them.
    const int  nw_tail = b.n_slot > 0 && b.n_tile > 0 && a.early_tables ? n_tail_threads(NT) / PQ_WARP : 0;
    const int  i_first = warp < nw_tail ? NW - nw_tail + warp : warp - nw_tail;
    const bool late    = warp < nw_tail;
    auto i_after = [&](int i) { return i < NW - nw_tail && nw_tail > 0 ? NW - nw_tail + warp : i + NW; };
    auto ahead = [&]() {
        if (i_first < b.n_tile) {
            load_k(b.list[i_first]);
            load_v(b.list[i_first]);
            load_mask(b.list[i_first]);
        }
    };
    if (nw_tail > 0) {
        if (PQ_TENSOR_COPY || !late) {
            ahead();
        }
        if (late) {
            attend_tail<L, R>(b.tail_o, b.tail_ml, (float *) (smem + a.smem_tail_part), (float *) (smem + a.smem_tail_ml), a, b.rows, b.q, b.list + b.n_tile, b.n_slot, b.slot0, b.stream, b.head_kv,
                              nw_tail * PQ_WARP);
            if (!PQ_TENSOR_COPY) {
                ahead();
            }
        }
    } else {
        prepare_block<L, R, NT>(
            b, a, smem, !a.early_tables,
            [&](int thread, int n) {
                map_queries<L, R>(b.q_map, b.rows, b.q, a.k, b.k_block, D, a.q_scale, thread, n);
                build(thread, n);
            },
            ahead);
    }

#if PQ_TENSOR_COPY
    init_lanes(); // not before: registers
    uint32_t phase = 0, v_at, v_next;
    v_place<VT>(lane, &v_at, &v_next);
    v_at += v_tile;
    const uint32_t k_at = k_tile + k_place<KT>(lane);
#endif
    uint32_t q[N_Q];
    if (b.n_tile > 0) {
        const uint32_t * q_map = (const uint32_t *) b.q_map + 16 * t; // the lane's quarter, half2 of row 0
        if constexpr (R == 1) {
#pragma unroll
            for (int i = 0; i < 16; i++) {
                q[i] = q_map[i ^ kl.turn];
            }
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int r, turn;
                    query_place<KT, R>(g + e % 2 * 8, &r, &turn);
                    q[4 * i + e] = q_map[r * (q_map_stride(L) / 2) + ((2 * i + e / 2) ^ turn)];
                }
            }
        }
    }

    float o[N_O][4], m = -CUDART_INF_F, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < N_O; i++) {
        o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.0f;
    }
    const float q_mu = b.rows[row].q_mu, slope = b.rows[row].slope;
    uint32_t * my_weights = weights + warp * 16 * R;
    const uint32_t * b_weights = (g / 2 == t ? my_weights : weights + NW * 16 * R + 4) + (t / 2 * R + g % 2) * 2; // + 4: in other banks

    for (int i = i_first; i < b.n_tile; i = i_after(i)) {
        const bool more = i_after(i) < b.n_tile;
        const int  next = more ? b.list[i_after(i)] : 0;
#if PQ_TENSOR_COPY
        pq_mbarrier_wait(k_barrier, phase);
        auto k_words_of = [&](int g8, uint32_t (&w)[k_words<KT>::N]) {
            read_k_words<KT>(w, k_at + g8 * K_BYTES / 4);
            if (g8 == 3) { // the tile is in registers
                __syncwarp();
                if (more) {
                    load_k(next);
                }
            }
        };
#else
        auto k_words_of = [&](int g8, uint32_t (&w)[k_words<KT>::N]) {
#pragma unroll
            for (int e = 0; e < k_words<KT>::N; e++) {
                w[e] = kw[g8][e];
            }
        };
#endif
        float s[N_S];
        scores_128<KT, R>(s, k_words_of, kl, q, lane);
#if !PQ_TENSOR_COPY
        if (more) {
            load_k(next);
        }
#endif
        bool grows = false;
#pragma unroll
        for (int e = 0; e < N_S; e++) {
            float x = s[e] + q_mu;
            if (a.p.logit_softcap != 0.0f) {
                x = a.cap_log2e * tanhf(x * a.cap_inv);
            }
            const uint32_t h = R > 1 && e % 2 ? mask[e / 2] >> 16 : mask[e / 2] & 0xffff;
            s[e]  = fmaf(slope, __half2float(__ushort_as_half((unsigned short) h)), x); // x is finite: -inf stays -inf
            grows = grows || s[e] > m + (MAX_SHIFT + MAX_GROWTH);
        }
        if (__any_sync(PQ_FULL_WARP, grows)) {
            float top = s[0];
#pragma unroll
            for (int e = 1; e < N_S; e++) {
                top = fmaxf(top, s[e]);
            }
            top = fmaxf(top, __shfl_xor_sync(PQ_FULL_WARP, top, 1)); // the lanes of a row
            top = fmaxf(top, __shfl_xor_sync(PQ_FULL_WARP, top, 2));
            if (R <= 4) {
                top = fmaxf(top, __shfl_xor_sync(PQ_FULL_WARP, top, 16));
            }
            if (R == 1) {
                top = fmaxf(top, __shfl_xor_sync(PQ_FULL_WARP, top, 4));
                top = fmaxf(top, __shfl_xor_sync(PQ_FULL_WARP, top, 8));
            }
            const float m_new = fmaxf(m, top - MAX_SHIFT);
            const float f     = m == -CUDART_INF_F ? 0.0f : pq_exp2(m - m_new);
            m    = m_new;
            sum *= f;
            if constexpr (R == 1) {
#pragma unroll
                for (int e = 0; e < 8; e++) {
                    o[e / 4][e % 4] *= f;
                }
            } else {
#pragma unroll
                for (int r = 0; r < R; r++) {
                    const float fr = __shfl_sync(PQ_FULL_WARP, f, 4 * r);
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        o[r / 2 * 4 + e][r % 2]     *= fr;
                        o[r / 2 * 4 + e][r % 2 + 2] *= fr;
                    }
                }
            }
        }
        const float ref = m == -CUDART_INF_F ? 0.0f : m;
#pragma unroll
        for (int e = 0; e < N_S; e++) {
            s[e] = pq_exp2(s[e] - ref);
            sum += s[e];
        }
        uint32_t p = 0;
        if constexpr (R == 1) { // {cell c, cell c + 16} for lanes t = 0, 1
            const uint32_t own   = __half_as_ushort(__float2half_rn(s[0]));
            const uint32_t other = __shfl_xor_sync(PQ_FULL_WARP, own, 2);
            p = __byte_perm(own, other, 0x5410);
        } else {
            __syncwarp(); // the weights of the tile before have been read
            put_weights<R>(my_weights, s, lane);
            __syncwarp();
        }
#if PQ_TENSOR_COPY
        pq_mbarrier_wait(v_barrier, phase);
        phase ^= 1;
        if (more) {
            load_mask(next);
        }
        auto v_word_of = [&](int j) {
            const uint32_t w = read_v_word<VT>(v_at + j * V_BYTES / N_SLOT, v_next, vl);
            if (j == N_SLOT - 1) {
                __syncwarp();
                if (more) {
                    load_v(next);
                }
            }
            return w;
        };
        values_128<VT, V_TABLE, R>(o, v_word_of, vl, p, b_weights, lane);
#else
        values_128<VT, V_TABLE, R>(o, [&](int j) { return vw[j]; }, vl, p, b_weights, lane);
        if (more) {
            load_v(next);
            load_mask(next);
        }
#endif
    }
    pq_pdl_launch_next();

    sum += __shfl_xor_sync(PQ_FULL_WARP, sum, 1);
    sum += __shfl_xor_sync(PQ_FULL_WARP, sum, 2);
    if (R <= 4) {
        sum += __shfl_xor_sync(PQ_FULL_WARP, sum, 16);
    }
    if (R == 1) {
        sum += __shfl_xor_sync(PQ_FULL_WARP, sum, 4);
        sum += __shfl_xor_sync(PQ_FULL_WARP, sum, 8);
    }
    if (t == 0 && g < R) {
        *(float2 *) (b.ml + 2 * (warp * R + g)) = make_float2(m, sum);
    }
    finish_block<R, NT, 2>(b, a, smem, [&](const float (&factor)[R], float * dst) {
        int cell, l;
        lane_place<L, true>(lane, &cell, &l);
#pragma unroll
        for (int r = 0; r < R; r++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float x = R == 1 ? o[i / 2][i % 2 * 2]     : o[r / 2 * 4 + i][r % 2];
                const float y = R == 1 ? o[i / 2][i % 2 * 2 + 1] : o[r / 2 * 4 + i][r % 2 + 2];
                *(float2 *) (dst + (cell * R + r) * D + 8 * l + 2 * (i ^ vl.order)) = make_float2(x * factor[r], y * factor[r]);
            }
        }
    });
}

} // namespace pq_attn
