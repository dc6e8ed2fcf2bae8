// Attention on codes, for a few query rows per KV head (token generation, small batches): what the kernels have in common. No cell is
// decoded to memory.
//
// A block has a multiprocessor to itself. It serves one KV head, up to R of its query rows and one part of the context:
//
//   - builds the tables: the centroids of K and V in shared memory, one row of 256 bytes per centroid index, so that a code byte becomes an
//     address with one PRMT (byte 1 of the address is the code, byte 0 belongs to the lane);
//   - lists the tiles and tail slots that some row sees: what nobody sees is never read;
//   - some warps attend to the exact tail, the others map the queries (T^-1 q, q.mu);
//   - every warp takes tiles of the list, with a softmax of its own (pq-attn-128.cuh, pq-attn-general.cuh);
//   - the warps and the tail are merged; the sums go to the combine kernel, or, when the context is not split, through T^-1 to the result.
//
// Lookups are bound by shared memory, 32 banks: the 32 lanes of every lookup take subspaces in an order of their own, such that each
// reads another bank. Sums run on the tensor cores, in floats, in shapes that undo these orders at no cost.
#pragma once

#include "../pq/pq-params.h"
#include "pq-cuda-common.cuh"
#include "pq-launch.cuh"

#include <math_constants.h>

#include <type_traits>

namespace pq_attn {

constexpr int ANY_TYPE = -1;            // the type is known at run time only
constexpr int PLAIN    = PQ_TYPE_COUNT; // f16 rows

constexpr int N_SLOT = 16; // slots of a tile, each of 32 / L cells: the rows of one tensor-core product

constexpr float LOG2E = 1.44269504088896341f;

// Softmax in base 2. The reference maximum of a warp moves only when a score passes it by far, so that the usual tile costs one vote.
// The reference maximum is 2**-MAX_SHIFT of the largest weight when it is set, and is set again when a weight would pass
// 2**(MAX_SHIFT + MAX_GROWTH) = 16384: halves end at 65504.
constexpr float MAX_SHIFT  = 6.0f;
constexpr float MAX_GROWTH = 8.0f;

// Threads of a block, by its rows: as many as the registers allow. A 128 kernel keeps its codes in shared memory (9.0 and later).
__host__ __device__ constexpr int n_threads_general(int R) {
    return R == 1 ? 512 : R == 4 ? 384 : 256;
}

__host__ __device__ constexpr int n_threads_128(int vt, int R, bool tensor_copy) {
    return !tensor_copy ? n_threads_general(R) : R == 1 ? 512 : vt == PQ_TYPE_PQ3 ? n_threads_general(R) : R == 4 ? 512 : 384;
}

// Threads that attend to the tail while the others go ahead.
__host__ __device__ constexpr int n_tail_threads(int NT) {
    return NT / 4;
}

// Halves from one mapped query to the next in shared memory: past 8 * L by 4 banks, as lanes read the same element of several rows.
__host__ __device__ constexpr int q_map_stride(int L) {
    return 8 * L + 8;
}

constexpr int TILE_128_CELLS = 32; // of kernel_128

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
    pq_tensor_map  k_map, v_map; // of kernel_128, where the device has tensor copies
    pq_attn_params p;
    side_args      k, v;
    int32_t n_split;
    int32_t n_row_groups;
    int32_t n_rows;          // per KV head
    int32_t n_group;         // query heads per KV head
    int64_t cells_per_split;
    int64_t slots_per_split;
    int32_t early_tables;    // build the tables before the kernel ahead of this one has ended: they will be needed
    int32_t mask_by_16;      // mask rows start at multiples of 16 bytes
    int32_t score_tiles;     // two phases: tiles whose scores fit
    int32_t n_head_log2;
    float   slope_log2_0;    // log2 of the ALiBi bases
    float   slope_log2_1;
    float   q_scale;         // what the product of q and k is scaled with before the softcap, or times log2(e) without one
    float   cap_inv;         // 1 / logit_softcap
    float   cap_log2e;       // logit_softcap times log2(e)
    float * partials;        // [n_stream][n_head_kv][n_rows][n_split] records
    int32_t record_floats;   // {m, weight of the coded part, weight of the tail, 0}, coded sum [D], tail sum [D]
    uint32_t smem_scores, smem_codes, smem_barriers, smem_rows, smem_q, smem_qt, smem_list, smem_bits, smem_weights, smem_merge_ml, smem_tail, smem_tail_part, smem_tail_ml; // byte offsets
};

// Where the tables lie in shared memory is known at compile time, so that a lookup is one instruction. K begins at 0. L = 8: K
// and V share rows of 256 bytes. L = 32: two tables fit only when both are pq3, or one side is plain.
__host__ __device__ constexpr uint32_t table_bytes(int type, int L) {
    return type == PLAIN ? 0 : (type == PQ_TYPE_PQ3 ? 64 : 256) * (L == 32 ? 512 : 256);
}

__host__ __device__ constexpr uint32_t v_table_offset(int kt, int L, bool two_phases) {
    return two_phases ? 0 : L == 8 ? 128 : kt != ANY_TYPE ? table_bytes(kt, L) : L == 16 ? table_bytes(PQ_TYPE_PQ4, 16) : 0;
}

// How the 16-byte pieces of a table row (8 elements of the head each) are laid out.
enum table_order {
    IN_ORDER,
    BY_QUARTERS, // D = 128: first the first halves of the four quarters of the head, then the second halves (pq-attn-128.cuh)
};

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

// ---- tables ----

// Row c of a table holds, 16 bytes per lane, centroid c of every subspace in the head's order. A thread takes the subspaces of one lane and 16
// bytes of centroids of each (an item), and turns that little matrix: both sides see whole 16-byte accesses without conflicts.
template <int TYPE, table_order ORDER>
struct table_item {
    static constexpr int DSUB  = TYPE == PQ_TYPE_PQ2 ? 4 : 2;
    static constexpr int KSUB  = TYPE == PQ_TYPE_PQ3 ? 64 : 256;
    static constexpr int N_SUB = 8 / DSUB;        // subspaces of a lane
    static constexpr int N_CEN = 16 / (2 * DSUB); // centroids in 16 bytes
    static constexpr int PLANE = KSUB * 256;
    uint4 x[N_SUB];

    static __host__ __device__ constexpr int count(int D) {
        return (D / 8 + 7) / 8 * 8 * (KSUB / N_CEN);
    }
    // 8 lanes side by side for the stores, 4 runs of 16 bytes for the loads
    static __device__ __forceinline__ void place(int item, int D, int * l, int * c) {
        const int block = item / 32, n_lane8 = (D / 8 + 7) / 8;
        *l = ORDER == IN_ORDER ? item % 8 + 8 * (block % n_lane8) : item % 8 / 2 * 4 + block % 2 * 2 + item % 2;
        *c = (item / 8 % 4 + 4 * (block / n_lane8)) * N_CEN;
    }
    __device__ __forceinline__ void load(const uint8_t * centroids, int item, int D) {
        int l, c;
        place(item, D, &l, &c);
        if (item < count(D) && l < D / 8) {
#pragma unroll
            for (int m = 0; m < N_SUB; m++) {
                x[m] = pq_load_u128(centroids + ((size_t) (l * N_SUB + m) * KSUB + c) * (2 * DSUB));
            }
        }
    }
    __device__ __forceinline__ void store(uint8_t * table, int item, int D) const {
        int l, c;
        place(item, D, &l, &c);
        if (item < count(D) && l < D / 8) {
            const int piece = ORDER == IN_ORDER ? l : l / 2 % 2 * 8 + l / 4 * 2 + l % 2;
            uint8_t * row = table + piece / 16 * PLANE + c * 256 + piece % 16 * 16;
            if constexpr (DSUB == 2) {
                *(uint4 *) (row)       = make_uint4(x[0].x, x[1].x, x[2].x, x[3].x);
                *(uint4 *) (row + 256) = make_uint4(x[0].y, x[1].y, x[2].y, x[3].y);
                *(uint4 *) (row + 512) = make_uint4(x[0].z, x[1].z, x[2].z, x[3].z);
                *(uint4 *) (row + 768) = make_uint4(x[0].w, x[1].w, x[2].w, x[3].w);
            } else {
                *(uint4 *) (row)       = make_uint4(x[0].x, x[0].y, x[1].x, x[1].y);
                *(uint4 *) (row + 256) = make_uint4(x[0].z, x[0].w, x[1].z, x[1].w);
            }
        }
    }
};

template <int TYPE, table_order ORDER>
PQ_DEVICE void build_table(uint8_t * table, const uint8_t * centroids, int D, int thread, int n) {
    if constexpr (TYPE != PLAIN) {
        typedef table_item<TYPE, ORDER> item;
        constexpr int AHEAD = 2;
        for (int i = thread; i < item::count(D); i += AHEAD * n) {
            item x[AHEAD];
#pragma unroll
            for (int u = 0; u < AHEAD; u++) {
                x[u].load(centroids, i + u * n, D);
            }
#pragma unroll
            for (int u = 0; u < AHEAD; u++) {
                x[u].store(table, i + u * n, D);
            }
        }
    }
}

// ---- masks ----

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
template <int NT, class F, class G, class H>
PQ_DEVICE int2 list_live(int n_tile, int n_slot, uint16_t * list, uint32_t * bits, F live, G before_barrier, H between) {
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
    before_barrier();
    __syncthreads();
    between();
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

// q' = T_inv q and q.mu of R rows, scaled. qt [R][q_map_stride(L)] halves, in the order of the elements.
// Row j of T_inv times the R queries: the lane has elements 8l .. 8l + 7 of the row (t) and of the queries (x).
template <int L, int R>
PQ_DEVICE void map_row(__half * qt, int j, const uint4 & t, const float (&x)[R][8], float scale, int lane) {
    const float2 t0 = pq_half2_to_float2(t.x), t1 = pq_half2_to_float2(t.y), t2 = pq_half2_to_float2(t.z), t3 = pq_half2_to_float2(t.w);
    float sum[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
        sum[r] = t0.x * x[r][0] + t0.y * x[r][1] + t1.x * x[r][2] + t1.y * x[r][3] + t2.x * x[r][4] + t2.y * x[r][5] + t3.x * x[r][6] + t3.y * x[r][7];
    }
    const float total = pq_sum_rows<R, L>(sum, lane);
    if (lane % L < R) {
        qt[lane % L * q_map_stride(L) + j] = __float2half_rn(total * scale);
    }
}

template <int R>
PQ_DEVICE void load_queries(float (&x)[R][8], const float * q, int D, int l) {
    const bool in = l < D / 8;
#pragma unroll
    for (int r = 0; r < R; r++) {
        const float4 a0 = in ? *(const float4 *) (q + r * D + 8 * l)     : make_float4(0, 0, 0, 0);
        const float4 a1 = in ? *(const float4 *) (q + r * D + 8 * l + 4) : make_float4(0, 0, 0, 0);
        x[r][0] = a0.x; x[r][1] = a0.y; x[r][2] = a0.z; x[r][3] = a0.w;
        x[r][4] = a1.x; x[r][5] = a1.y; x[r][6] = a1.z; x[r][7] = a1.w;
    }
}

// q.mu of the rows, by warps of the n_warp that call it. mu(i): element lane + 32 * i.
template <int R, class MU>
PQ_DEVICE void map_mu(row_info * rows, const float * q, MU mu, int D, float scale, int warp, int n_warp, int lane) {
    for (int r = warp; r < R; r += n_warp) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < PQ_MAX_D / PQ_WARP; i++) {
            if (lane + i * PQ_WARP < D) {
                sum += q[r * D + lane + i * PQ_WARP] * mu(i);
            }
        }
        sum = pq_warp_sum(sum);
        if (lane == 0) {
            rows[r].q_mu = sum * scale;
        }
    }
}

template <int L, int R>
PQ_DEVICE void map_queries(__half * qt, row_info * rows, const float * q, const side_args & k, const uint8_t * block, int D, float scale, int tid, int nt) {
    const int lane = tid % PQ_WARP, warp = tid / PQ_WARP;
    if (!block || k.T_inv == 0) {
        for (int i = tid; i < R * D; i += nt) {
            qt[i / D * q_map_stride(L) + i % D] = __float2half_rn(q[i] * scale);
        }
    } else {
        constexpr int AHEAD = 4; // rows of T_inv in flight per thread
        const int  l  = tid % L;
        const bool in = l < D / 8;
        float x[R][8];
        load_queries<R>(x, q, D, l);
        for (int j0 = tid / L; j0 < D; j0 += nt / L * AHEAD) {
            uint4 t[AHEAD];
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                const int j = j0 + a * (nt / L);
                t[a] = j < D && in ? __ldg((const uint4 *) (block + k.T_inv + ((size_t) j * D + 8 * l) * 2)) : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                const int j = j0 + a * (nt / L);
                if (j >= D) { // the same for the whole warp: D is a multiple of 8
                    break;
                }
                map_row<L, R>(qt, j, t[a], x, scale, lane);
            }
        }
    }
    map_mu<R>(rows, q, [&](int i) { return block ? ((const float *) (block + k.mu))[lane + i * PQ_WARP] : 0.0f; }, D, scale, warp, nt / PQ_WARP, lane);
}

// ---- the exact tail ----

// Attention of R rows over the listed slots, with raw queries, in floats, by the first nt threads of the block. Half a warp takes a slot: 8
// elements per lane (16 for L = 32). Leaves the weighted sums in o [R][D], and m and the sum of weights of every row in ml [R][2].
// part: float [nt / 32][R][D], part_ml: float [nt / 32][R][2]
template <int L, int R>
PQ_DEVICE void attend_tail(float * o, float * ml, float * part, float * part_ml, const args & a, const row_info * rows, const float * q,
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
        float dot[AHEAD][R], s[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
#pragma unroll
            for (int r = 0; r < R; r++) {
                dot[u][r] = 0.0f;
            }
        }
#pragma unroll
        for (int e = 0; e < E; e++) {
            if (l + 16 * e < D / 8) {
#pragma unroll
                for (int r = 0; r < R; r++) {
                    const float4 a0 = *(const float4 *) (q + r * D + 8 * (l + 16 * e));
                    const float4 a1 = *(const float4 *) (q + r * D + 8 * (l + 16 * e) + 4);
#pragma unroll
                    for (int u = 0; u < AHEAD; u++) {
                        const float2 k0 = pq_half2_to_float2(x[u][e].x), k1 = pq_half2_to_float2(x[u][e].y);
                        const float2 k2 = pq_half2_to_float2(x[u][e].z), k3 = pq_half2_to_float2(x[u][e].w);
                        dot[u][r] += k0.x * a0.x + k0.y * a0.y + k1.x * a0.z + k1.y * a0.w + k2.x * a1.x + k2.y * a1.y + k3.x * a1.z + k3.y * a1.w;
                    }
                }
            }
        }
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            s[u] = pq_sum_rows<R, 16>(dot[u], lane);
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
        *(float2 *) (part_ml + 2 * (warp * R + lane)) = make_float2(m_all, sum);
    }
    pq_barrier(1, nt);
    for (int i = tid; i < R * D; i += nt) {
        const int r = i / D;
        float top = -CUDART_INF_F;
#pragma unroll 4
        for (int w = 0; w < nw; w++) {
            top = fmaxf(top, part_ml[2 * (w * R + r)]);
        }
        const float ref = top == -CUDART_INF_F ? 0.0f : top;
        float x = 0.0f, total = 0.0f;
#pragma unroll 4
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

PQ_DEVICE uint4 load_t_inv(const uint8_t * block, const side_args & s, int D, int row, int chunk /* of 8 columns */) {
    return pq_load_u128(block + s.T_inv + (row * D + 8 * chunk) * 2);
}

// The rows of T_inv that a thread of write_rows() takes first.
template <int NT, int N_AHEAD>
PQ_DEVICE void load_t_inv_ahead(uint4 (&t)[N_AHEAD], const uint8_t * v_block, const side_args & v, int D) {
    const int chunk = threadIdx.x % (D / 8), grp = threadIdx.x / (D / 8), n_grp = NT / (D / 8);
#pragma unroll
    for (int i = 0; i < N_AHEAD; i++) {
        t[i] = v_block && v.T_inv && grp < n_grp && grp + i * n_grp < D ? load_t_inv(v_block, v, D, grp + i * n_grp, chunk) : make_uint4(0, 0, 0, 0);
    }
}

// Writes R rows from coded sums o [R][D] and tail sums ot [R][D] (NULL: none), both relative to m; head [R][4] = {m, weight of the coded part, weight of the
// tail}. red: float [8 * NT * R]. o is in shared memory and complete (a barrier has passed). ahead: the thread's first rows of T_inv.
template <int R, int NT, int N_AHEAD>
PQ_DEVICE void write_rows(const args & a, const row_info * rows, const float * o, const float * ot, const float * head, const uint8_t * v_block,
                          float * red, const uint4 (&ahead)[N_AHEAD]) {
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
            auto add = [&](int j, const uint4 & t) {
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
            };
#pragma unroll
            for (int i = 0; i < N_AHEAD; i++) {
                if (grp + i * n_grp < D) {
                    add(grp + i * n_grp, ahead[i]);
                }
            }
#pragma unroll 4
            for (int j = grp + N_AHEAD * n_grp; j < D; j += n_grp) {
                add(j, load_t_inv(v_block, a.v, D, j, chunk));
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
        float sum = coded + head[4 * r + 2], weight = 1.0f;
        if (a.p.sinks) {
            const float sink = rows[r].sink;
            if (sink > m) {
                weight = pq_exp2(m - sink);
                sum    = sum * weight + 1.0f;
            } else if (m != -CUDART_INF_F) {
                sum += pq_exp2(sink - m);
            }
        }
        const float inv = sum == 0.0f ? 0.0f : weight / sum;
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

PQ_DEVICE const uint8_t * row_mask(const args & a, int stream, int h, int tok) {
    return a.p.mask + stream % a.p.n_stream_mask * a.p.mask_stream_stride + h % a.p.n_head_mask * a.p.mask_head_stride + tok * a.p.mask_token_stride;
}

PQ_DEVICE const uint8_t * row_tail_mask(const args & a, int stream, int tok) {
    return a.p.tail.mask + stream * a.p.tail.mask_stream_stride + tok * a.p.tail.mask_token_stride;
}

PQ_DEVICE row_info get_row(const args & a, int stream, int head_kv, int row) {
    row_info x;
    x.valid = row < a.n_rows;
    row = min(row, a.n_rows - 1);
    const int tok = row / a.n_group;
    const int h   = head_kv * a.n_group + row % a.n_group;
    x.q    = a.p.q + stream * a.p.q_stream_stride + tok * a.p.q_token_stride + h * a.p.q_head_stride;
    x.mask      = a.p.mask ? row_mask(a, stream, h, tok) : nullptr;
    x.tail_mask = a.p.tail.n > 0 ? row_tail_mask(a, stream, tok) : nullptr;
    x.dst  = (uint8_t *) a.p.dst + stream * a.p.dst_stream_stride + tok * a.p.dst_token_stride + h * a.p.dst_head_stride;
    x.sink = a.p.sinks ? a.p.sinks[h] * LOG2E : 0.0f;
    x.q_mu = 0.0f;
    x.slope = LOG2E;
    if (a.p.max_bias > 0.0f) {
        x.slope *= exp2f(h < a.n_head_log2 ? a.slope_log2_0 * (h + 1) : a.slope_log2_1 * (2 * (h - a.n_head_log2) + 1));
    }
    return x;
}

// What every thread of a block knows.
struct block {
    int stream, head_kv, split, row0;
    int D;
    const uint8_t * k_block; // head blocks; NULL: plain rows
    const uint8_t * v_block;
    int64_t kv0;             // first cell of this part
    int n_cell;
    int64_t slot0;           // first tail slot of this part
    int n_tile, n_slot;      // listed

    row_info * rows;         // [R]
    float    * q;            // [R][D]
    __half   * q_map;        // [R][q_map_stride(L)]
    uint16_t * list;         // tiles, then tail slots
    float    * ml;           // {m, sum of weights} [warps][R]
    float    * tail_ml;      // the same of the tail [R]
    float    * head;         // [R][4]: m, weight of the coded part, weight of the tail, factor of the tail's sums
    float    * tail_o;       // [R][D]

    __device__ __forceinline__ int cells_of(int tile, int cells_per_tile) const {
        return min(cells_per_tile, n_cell - tile * cells_per_tile);
    }
};

template <int R, int NT>
PQ_DEVICE block locate_block(const args & a, uint8_t * smem, bool k_coded, bool v_coded) {
    if ((uint32_t) __cvta_generic_to_shared(smem) != PQ_SHARED_BASE) {
        __trap(); // see PQ_SHARED_BASE
    }
    block b;
    int i = blockIdx.x; // heads of one part of the context side by side: together they read whole rows of the cache
    b.row0    = i % a.n_row_groups * R; i /= a.n_row_groups;
    b.head_kv = i % a.p.n_head_kv;      i /= a.p.n_head_kv;
    b.split   = i % a.n_split;
    b.stream  = i / a.n_split;
    b.D       = a.p.k.D;
    b.k_block = k_coded ? a.p.k.codebook + b.head_kv * a.k.head_bytes : nullptr;
    b.v_block = v_coded ? a.p.v.codebook + b.head_kv * a.v.head_bytes : nullptr;
    b.rows    = (row_info *) (smem + a.smem_rows);
    b.q       = (float *)    (smem + a.smem_q);
    b.q_map   = (__half *)   (smem + a.smem_qt);
    b.list    = (uint16_t *) (smem + a.smem_list);
    b.ml      = (float *)    (smem + a.smem_merge_ml);
    b.head    = b.ml + 2 * (NT / PQ_WARP) * R; // a multiple of 16 bytes
    b.tail_ml = b.head + 4 * R;
    b.tail_o  = (float *)    (smem + a.smem_tail);
    return b;
}

// The rows' places; reads nothing that a kernel writes. A barrier follows in begin_block().
template <int R>
PQ_DEVICE void place_rows(const block & b, const args & a) {
    if (threadIdx.x < R) {
        b.rows[threadIdx.x] = get_row(a, b.stream, b.head_kv, b.row0 + threadIdx.x);
    }
}

// Queries, and the list of what any row sees. between(): what can be done once b.q is there.
template <int L, int R, int NT, class F>
PQ_DEVICE void begin_block(block & b, const args & a, uint8_t * smem, F between) {
    constexpr int TILE    = cells_per_tile(L);
    constexpr int Q_AHEAD = (R * 8 * L + NT - 1) / NT; // elements of the queries per thread
    const int tid = threadIdx.x;
    float q_ahead[Q_AHEAD];
#pragma unroll
    for (int u = 0; u < Q_AHEAD; u++) {
        const int i = tid + u * NT, r = i / b.D, row = b.row0 + r;
        const int h = b.head_kv * a.n_group + row % a.n_group;
        q_ahead[u] = r < R && row < a.n_rows
            ? __ldg((const float *) (a.p.q + b.stream * a.p.q_stream_stride + row / a.n_group * a.p.q_token_stride + h * a.p.q_head_stride) + i % b.D) : 0.0f;
    }
    if (b.D < 8 * L) {
        for (int i = tid; i < R * q_map_stride(L); i += NT) {
            b.q_map[i] = __float2half_rn(0.0f); // for the lanes past D
        }
    }
    b.kv0    = min(b.split * a.cells_per_split, a.p.n_kv);
    b.n_cell = (int) (min(b.kv0 + a.cells_per_split, a.p.n_kv) - b.kv0);
    b.slot0  = min(b.split * a.slots_per_split, a.p.tail.n);
    const int64_t slot1 = min(b.slot0 + a.slots_per_split, a.p.tail.n);
    // by the queries' places, not through b.rows: their loads need not wait for it
    const int2 n = list_live<NT>((b.n_cell + TILE - 1) / TILE, (int) (slot1 - b.slot0), b.list, (uint32_t *) (smem + a.smem_bits), [&](bool is_tile, int i) {
        bool live = !is_tile ? false : !a.p.mask;
        for (int r = 0; r < R && b.row0 + r < a.n_rows && !live; r++) {
            const int row = b.row0 + r, tok = row / a.n_group, h = b.head_kv * a.n_group + row % a.n_group;
            if (r > 0 && row % a.n_group != 0 && (!is_tile || a.p.n_head_mask == 1)) {
                continue; // the mask of the row before
            }
            if (is_tile) {
                live = cells_live(row_mask(a, b.stream, h, tok), b.kv0 + (int64_t) i * TILE, b.cells_of(i, TILE), a.mask_by_16);
            } else {
                live = ((const uint16_t *) row_tail_mask(a, b.stream, tok))[b.slot0 + i] != 0xfc00;
            }
        }
        return live;
    }, [&]() {
#pragma unroll
        for (int u = 0; u < Q_AHEAD; u++) {
            if (tid + u * NT < R * b.D) {
                b.q[tid + u * NT] = q_ahead[u];
            }
        }
    }, between);
    b.n_tile = n.x;
    b.n_slot = n.y;
}

// The tail by some warps, and, when there are tiles, `others(thread, threads)` by the rest of them (by all when there is no tail). `ahead` issues the loads of
// a warp's first tile: behind the tail's own, which are waited for first.
template <int L, int R, int NT, class OTHERS, class AHEAD>
PQ_DEVICE void prepare_block(block & b, const args & a, uint8_t * smem, bool any_others, OTHERS others, AHEAD ahead) {
    const int tid     = threadIdx.x;
    const int nt_tail = b.n_slot == 0 ? 0 : b.n_tile == 0 ? NT : n_tail_threads(NT);
    if (tid < nt_tail) {
        attend_tail<L, R>(b.tail_o, b.tail_ml, b.n_tile == 0 ? (float *) smem : (float *) (smem + a.smem_tail_part), (float *) (smem + a.smem_tail_ml), a, b.rows, b.q, b.list + b.n_tile, b.n_slot,
                          b.slot0, b.stream, b.head_kv, nt_tail);
        ahead();
    } else if (b.n_tile > 0) {
        ahead();
        if (any_others) {
            others(tid - nt_tail, NT - nt_tail);
        }
    }
    if (nt_tail == 0 && tid < R) {
        b.tail_ml[2 * tid]     = -CUDART_INF_F;
        b.tail_ml[2 * tid + 1] = 0.0f;
    }
    __syncthreads();
}

// Merges the warps and the tail and writes the block's result. Every warp has put its {m, sum of weights} into b.ml and writes its sums in
// `put(factors, dst)`: N_PART parts [R][D] at dst, each scaled by the factor of its row.
template <int R, int NT, int N_PART, class PUT>
PQ_DEVICE void finish_block(const block & b, const args & a, uint8_t * smem, PUT put) {
    constexpr int NW = NT / PQ_WARP;
    const int tid = threadIdx.x, warp = tid / PQ_WARP;
    const int D   = b.D;
    float * merge = (float *) smem; // [NW][N_PART][R][D], over the tables
    __syncthreads();
    float factor[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
        float top = b.tail_ml[2 * r];
#pragma unroll
        for (int w = 0; w < NW; w++) {
            top = fmaxf(top, b.ml[2 * (w * R + r)]);
        }
        const float ref = top == -CUDART_INF_F ? 0.0f : top;
        factor[r] = pq_exp2(b.ml[2 * (warp * R + r)] - ref);
        if (tid == r) {
            float coded = 0.0f;
            for (int w = 0; w < NW; w++) {
                coded += b.ml[2 * (w * R + r) + 1] * pq_exp2(b.ml[2 * (w * R + r)] - ref);
            }
            const float tail = pq_exp2(b.tail_ml[2 * r] - ref);
            *(float4 *) (b.head + 4 * r) = make_float4(top, coded, b.tail_ml[2 * r + 1] * tail, tail);
        }
    }
    if (b.n_tile > 0) {
        put(factor, merge + warp * N_PART * R * D);
    }
    __syncthreads();

    const bool has_tail = a.p.tail.n > 0;
    float * sums = b.q; // [R][D]: the queries are done with
    for (int i = tid; i < R * D; i += NT) {
        float x = 0.0f;
        if (b.n_tile > 0) {
#pragma unroll 8
            for (int w = 0; w < NW * N_PART; w++) {
                x += merge[w * R * D + i];
            }
        }
        const int   r  = i / D;
        const float xt = b.n_slot > 0 ? b.tail_o[i] * b.head[4 * r + 3] : 0.0f;
        if (a.n_split == 1) {
            sums[i] = x;
            if (has_tail) {
                b.tail_o[i] = xt;
            }
        } else if (b.rows[r].valid) {
            float * record = a.partials + ((((size_t) b.stream * a.p.n_head_kv + b.head_kv) * a.n_rows + b.row0 + r) * a.n_split + b.split) * a.record_floats;
            record[4 + i % D] = x;
            if (has_tail) {
                record[4 + D + i % D] = xt;
            }
            if (i % D < 3) {
                record[i % D] = b.head[4 * r + i % D];
            }
        }
    }
    if (a.n_split == 1) {
        __syncthreads();
        uint4 t_inv[4];
        load_t_inv_ahead<NT>(t_inv, b.n_tile > 0 ? b.v_block : nullptr, a.v, D);
        write_rows<R, NT>(a, b.rows, sums, has_tail ? b.tail_o : nullptr, b.head, b.v_block, (float *) smem, t_inv);
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
    const int stream  = blockIdx.z;
    const bool has_tail  = a.p.tail.n > 0;
    const int  width     = has_tail ? 2 * D : D;
    const uint8_t * v_block = a.p.v.type < PQ_TYPE_COUNT ? a.p.v.codebook + head_kv * a.v.head_bytes : nullptr;
    const float   * records = a.partials + ((((size_t) stream * a.p.n_head_kv + head_kv) * a.n_rows + blockIdx.x) * a.n_split) * a.record_floats;
    // While the parts are still at work.
    if (tid == 0) {
        row = get_row(a, stream, head_kv, blockIdx.x);
    }
    uint4 t_inv[4];
    load_t_inv_ahead<NT>(t_inv, v_block, a.v, D);
    pq_pdl_wait();
    pq_pdl_launch_next();

    // groups of threads share the parts; a thread of a group has one element of the coded or the tail sum
    const int n_grp = NT / width, grp = tid / width, i = tid % width;
    float x = 0.0f, m = -CUDART_INF_F;
    if (grp < n_grp) { // a running maximum: no load waits for another
#pragma unroll 4
        for (int s = grp; s < a.n_split; s += n_grp) {
            const float * record = records + (size_t) s * a.record_floats;
            const float   m_new  = fmaxf(m, record[0]);
            const float   ref    = m_new == -CUDART_INF_F ? 0.0f : m_new;
            x = x * pq_exp2(m - ref) + record[4 + i] * pq_exp2(record[0] - ref);
            m = m_new;
        }
        red[grp * width + i] = x;
        red[NT + grp]        = m; // every thread of a group has the same
    }
    float weight = 0.0f, m_weight = -CUDART_INF_F;
    if (tid < 2) { // of the coded part, and of the tail
#pragma unroll 4
        for (int s = 0; s < a.n_split; s++) {
            const float * record = records + (size_t) s * a.record_floats;
            const float   m_new  = fmaxf(m_weight, record[0]);
            const float   ref    = m_new == -CUDART_INF_F ? 0.0f : m_new;
            weight   = weight * pq_exp2(m_weight - ref) + record[1 + tid] * pq_exp2(record[0] - ref);
            m_weight = m_new;
        }
        head[1 + tid] = weight;
        head[0] = m_weight;
    }
    __syncthreads();
    if (tid < width) {
        const float ref = head[0] == -CUDART_INF_F ? 0.0f : head[0];
        float sum = 0.0f;
        for (int g = 0; g < n_grp; g++) {
            sum += red[g * width + tid] * pq_exp2(red[NT + g] - ref);
        }
        o[tid] = sum;
    }
    __syncthreads();
    write_rows<1, NT>(a, &row, o, has_tail ? o + D : nullptr, head, v_block, red, t_inv);
}

} // namespace pq_attn
