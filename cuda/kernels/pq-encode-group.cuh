// Encode a few rows inside the attention kernel of the same step, D = 128: groups of 128 threads take unit after unit, a unit being a strip of
// one head and up to 8 rows. A unit waits for memory longer than it computes, so what the next one needs is asked for as soon as this one is done with
// its own, and the unit after that is brought to L2.
//
// Codes are those of pq_encode_few, bit for bit. Rows are f32 at multiples of 16 bytes, and the tail is not written here: attention has done it.
#pragma once

#include "pq-cuda-common.cuh"
#include "pq-encode-few-kernel.cuh"
#include "pq-rope.cuh"

namespace {

constexpr int PQ_ENCODE_UNIT_D   = 128;
constexpr int PQ_ENCODE_N_STRIPS = PQ_ENCODE_UNIT_D / PQ_ENCODE_STRIP;

// The loop over units is kept within the first instruction cache (12 KB): so it is not unrolled where that does not pay, divides by multiplying, and has
// its parameters in shared memory.
struct alignas(16) pq_encode_group_smem {
    pq_encode_sides sides;
    float2  turns[PQ_ENCODE_FEW_ROWS][PQ_ENCODE_UNIT_D / 2]; // of the rows from turned_row0 on
    uint4   centroids[PQ_ENCODE_STRIP * PQ_KSUB / 8];     // f16 [subspaces of the strip][PQ_KSUB][DSUB]
    float   raw[PQ_ENCODE_FEW_ROWS][PQ_ENCODE_UNIT_D];    // of the unit to come
    float   mu[PQ_ENCODE_UNIT_D];
    float   aniso[PQ_ENCODE_STRIP];
    __half  T[PQ_ENCODE_UNIT_D][PQ_ENCODE_STRIP];
    float   x[PQ_ENCODE_FEW_ROWS][PQ_ENCODE_UNIT_D];   // of this unit: turned, rounded to f16, without the mean
    float   y[PQ_ENCODE_FEW_ROWS][PQ_ENCODE_STRIP];
    pq_encode_found found;
};

// The rows of a step, cut into units.
struct pq_encode_units {
    int32_t       n;            // units
    int32_t       n_rows;       // of K, and of V
    int32_t       rows;         // of a unit, at most PQ_ENCODE_FEW_ROWS
    int32_t       n_head;       // of K, and of V
    small_divisor by_two_heads; // by 2 n_head
};

// Units are counted strips first, then heads of K, heads of V, rows.
struct pq_encode_unit {
    int side, head, col0, row0, n_rows;

    __device__ __forceinline__ pq_encode_unit(int unit, const pq_encode_units & all) {
        uint32_t rows = (uint32_t) unit / PQ_ENCODE_N_STRIPS;
        const int h = all.by_two_heads.split(rows);
        col0 = unit % PQ_ENCODE_N_STRIPS * PQ_ENCODE_STRIP;
        side = h >= all.n_head;
        head = h - side * all.n_head;
        row0 = (int) rows * all.rows;
        n_rows = min(all.rows, all.n_rows - row0);
    }
};

// The groups of a block, as many as there is room for.
__device__ __forceinline__ int pq_encode_group_thread() {
    return threadIdx.x % PQ_ENCODE_FEW_THREADS;
}

__device__ __forceinline__ void pq_encode_group_sync() { // barrier 0 is that of __syncthreads
    pq_barrier<PQ_ENCODE_FEW_THREADS>(1 + threadIdx.x / PQ_ENCODE_FEW_THREADS);
}

// Asks for the codebook's part of a unit that goes to shared memory.
__device__ __forceinline__ void pq_encode_ask_for_map(pq_encode_group_smem & s, const pq_encode_side & side, const pq_encode_unit & u, int tid) {
    const pq_encode_head h = pq_encode_get_head(side, u.head);
    if (h.T) {
        constexpr int PIECES = PQ_ENCODE_STRIP / 8, ROWS = PQ_ENCODE_FEW_THREADS / PIECES;
        __half       * to   = &s.T[tid / PIECES][tid % PIECES * 8];
        const __half * from = h.T + tid / PIECES * PQ_ENCODE_UNIT_D + u.col0 + tid % PIECES * 8;
#pragma unroll
        for (int i = 0; i < PQ_ENCODE_UNIT_D / ROWS; i++) {
            pq_cp_async(to + i * ROWS * PQ_ENCODE_STRIP, from + i * ROWS * PQ_ENCODE_UNIT_D);
        }
    }
    if (tid < PQ_ENCODE_UNIT_D / 4) {
        pq_cp_async(&s.mu[4 * tid], h.mu + 4 * tid);
    } else if (tid < PQ_ENCODE_UNIT_D / 4 + PQ_ENCODE_STRIP / 4) {
        const int i = 4 * (tid - PQ_ENCODE_UNIT_D / 4);
        pq_cp_async(&s.aniso[i], h.aniso + u.col0 + i);
    }
}

// Asks for the rows of a unit.
__device__ __forceinline__ void pq_encode_ask_for_rows(pq_encode_group_smem & s, const pq_encode_side & side, const pq_encode_unit & u, int tid) {
#pragma unroll 1
    for (int r = tid / PQ_WARP; r < u.n_rows; r += PQ_ENCODE_FEW_THREADS / PQ_WARP) {
        pq_cp_async(&s.raw[r][4 * (tid % PQ_WARP)], (const float *) pq_encode_row(side.p, u.row0 + r, u.head) + 4 * (tid % PQ_WARP));
    }
}

__device__ __forceinline__ void pq_encode_ask_for_centroids(pq_encode_group_smem & s, const pq_encode_side & side, const pq_encode_unit & u, int tid) {
    const uint4 * from = (const uint4 *) (pq_encode_get_head(side, u.head).centroids + u.col0 * PQ_KSUB);
#pragma unroll
    for (int i = tid; i < PQ_ENCODE_FEW_THREADS * PQ_ENCODE_FEW_LOADS; i += PQ_ENCODE_FEW_THREADS) {
        pq_cp_async(&s.centroids[i], from + i);
    }
}

// Brings the codebook's part of a unit to L2.
__device__ __forceinline__ void pq_encode_prefetch(const pq_encode_side & side, const pq_encode_unit & u, int tid) {
    const pq_encode_head h = pq_encode_get_head(side, u.head);
    if (h.T) { // a row of the strip is 64 bytes
        pq_prefetch_l2((const uint8_t *) (h.T + tid * PQ_ENCODE_UNIT_D + u.col0));
        pq_prefetch_l2((const uint8_t *) (h.T + tid * PQ_ENCODE_UNIT_D + u.col0) + 32);
    }
    for (int i = tid * 128; i < PQ_ENCODE_STRIP * PQ_KSUB * 2; i += PQ_ENCODE_FEW_THREADS * 128) {
        pq_prefetch_l2((const uint8_t *) (h.centroids + u.col0 * PQ_KSUB) + i);
    }
}

// Before anything else, once.
__device__ __forceinline__ void pq_encode_group_begin(const pq_encode_sides & sides, pq_encode_group_smem & s) {
    static_assert(sizeof(pq_encode_sides) <= PQ_ENCODE_FEW_THREADS * sizeof(uint32_t), "a word per thread");
    const int tid = pq_encode_group_thread();
    if (tid < (int) (sizeof(pq_encode_sides) / sizeof(uint32_t))) {
        ((uint32_t *) &s.sides)[tid] = ((const uint32_t *) &sides)[tid];
    }
    pq_encode_group_sync();
}

// Encodes units `unit`, unit + stride, ... below `end`, up to one of the other type, which is returned; `end` or more: there are none left.
// rope: what is still to be done to rows of K; NULL: nothing
template <int TYPE>
__device__ __forceinline__ int pq_encode_group(const pq_cuda_rope * rope, const pq_encode_units & all, int unit, int end, int stride,
                                               pq_encode_group_smem & s) {
    constexpr int N_CODES = pq_encode_geom<TYPE>::N_CODES; // 8 rows of them are no more than threads
    static_assert(PQ_ENCODE_FEW_ROWS * N_CODES <= PQ_ENCODE_FEW_THREADS, "a code per thread");
    const int tid = pq_encode_group_thread();
    const pq_encode_share share = pq_encode_get_share<TYPE>(tid);
    const pq_encode_places<TYPE> places(share);
    auto at = [&](int unit) { return pq_encode_unit(unit, all); };
    auto prefetch = [&](int unit) {
        const pq_encode_unit u = at(min(unit, end - 1));
        if (unit < end && (int) s.sides.side[u.side].p.type == TYPE) {
            pq_encode_prefetch(s.sides.side[u.side], u, tid);
        }
    };
    {
        const pq_encode_unit u = at(unit);
        pq_encode_ask_for_map(s, s.sides.side[u.side], u, tid);
        pq_encode_ask_for_centroids(s, s.sides.side[u.side], u, tid);
        prefetch(unit + stride);
        pq_pdl_wait();
        pq_encode_ask_for_rows(s, s.sides.side[u.side], u, tid);
        pq_copy_commit(); // rows, mean, T; centroids come in the next group of copies, and here there is nothing left for it
        pq_copy_commit();
    }
    const bool neox  = rope && rope->neox;
    const int  pair  = neox ? tid % 64 : tid / 2; // of element tid of a row
    const int  other = neox ? tid ^ 64 : tid ^ 1;
    const bool high  = other < tid;
    int turned_row0 = -1;
#pragma unroll 1
    while (true) {
        const pq_encode_unit u = at(unit);
        const pq_encode_side & side = s.sides.side[u.side];
        const int n_rows = u.n_rows;
        const int next = unit + stride;
        prefetch(unit + 2 * stride);
        const int     code_row = min(tid / N_CODES, n_rows - 1);
        const int64_t cell     = side.p.row_idx ? side.p.row_idx[u.row0 + code_row] : u.row0 + code_row; // needed at the end
        const bool    turned   = rope && u.side == 0;
        if (turned && turned_row0 != u.row0) {
            turned_row0 = u.row0;
#pragma unroll 1
            for (int i = tid; i < n_rows * 64; i += PQ_ENCODE_FEW_THREADS) {
                s.turns[i / 64][i % 64] = pq_rope_turn(*rope, rope->pos[u.row0 + i / 64], i % 64);
            }
        }
        pq_copy_wait<1>();
        pq_encode_group_sync();
        const float mu = s.mu[tid], aniso = s.aniso[tid % PQ_WARP]; // an element of the row, and one of the strip
        const bool  anisotropic = __any_sync(0xffffffff, aniso != 0.0f);
#pragma unroll 1
        for (int r = 0; r < n_rows; r++) {
            float x = s.raw[r][tid];
            if (turned) {
                const float2 turn = s.turns[r][pair];
                const float  y    = s.raw[r][other];
                x = high ? pq_rope_high(turn, y, x) : pq_rope_low(turn, x, y);
            }
            s.x[r][tid] = __fsub_rn(__half2float(__float2half_rn(x)), mu);
        }
        pq_encode_group_sync();
        const bool has_T = side.p.has_transform;
        // of one row a single warp makes them: not the same one in every group, or all would be one scheduler's
#pragma unroll 1
        for (int i = (threadIdx.x - threadIdx.x / PQ_ENCODE_FEW_THREADS * PQ_WARP) % PQ_ENCODE_FEW_THREADS; i < n_rows * PQ_ENCODE_STRIP; i += PQ_ENCODE_FEW_THREADS) {
            const int r = i / PQ_ENCODE_STRIP, j = i % PQ_ENCODE_STRIP;
            s.y[r][j] = has_T ? pq_encode_map<2>(s.x[r], s.T, j, PQ_ENCODE_UNIT_D) : s.x[r][u.col0 + j];
        }
        pq_copy_wait<0>();
        pq_encode_group_sync();
        const pq_encode_unit then = at(min(next, end - 1));
        const bool more = next < end && (int) s.sides.side[then.side].p.type == TYPE;
        if (more) {
            pq_encode_ask_for_rows(s, s.sides.side[then.side], then, tid);
            pq_encode_ask_for_map(s, s.sides.side[then.side], then, tid);
        }
        pq_copy_commit();
#pragma unroll 1
        for (int second = 0; second <= (int) anisotropic; second++) {
#pragma unroll 1
            for (int r = 0; r < n_rows; r++) {
                const float * y = second ? s.found.moved[r] : s.y[r];
                const int index = pq_encode_search<TYPE, 2>(y, share, [&](int i) { return s.centroids[places(i)]; });
                if (share.lane == 0) {
                    s.found.codes[second][r][share.code] = (uint8_t) index;
                }
            }
            pq_encode_group_sync();
            if (anisotropic) {
#pragma unroll 1
                for (int r = tid / PQ_WARP; r < n_rows; r += PQ_ENCODE_FEW_THREADS / PQ_WARP) {
                    pq_encode_judge<TYPE>(s.found, r, second, s.y[r][tid % PQ_WARP], aniso, true, (const __half *) s.centroids);
                }
                pq_encode_group_sync();
            }
        }
        if (more) {
            pq_encode_ask_for_centroids(s, s.sides.side[then.side], then, tid);
        }
        pq_copy_commit();
        if (tid / N_CODES < n_rows) {
            *pq_encode_code<TYPE>(side, cell, u.head, u.col0, tid % N_CODES) = s.found.codes[0][code_row][tid % N_CODES];
        }
        unit = next;
        if (!more) {
            return unit;
        }
    }
}

} // namespace
