// Prefill in the space of codes: what comes before and after flash attention on rows that are looked up and not mapped back (pq-decode-kernel.cuh).
//
//     q.x = (T^-1 q).y + q.mu      the last term is the same for every cell: the softmax does not see it
//     sum p x = (sum p y) T^-1 + mu
//
// So the queries are mapped instead of the keys, and the result instead of the values: of a long context those are far fewer rows. Rows of the exact tail
// are mapped forth, (x - mu) T, and take the places of their cells. The mask takes the tail's columns there while attention runs, and has its own back
// afterwards: a merged copy of it would be as large as the whole mask.
//
// The rows that a prefill encodes are in the tail, so nothing here uses their codes, and what it wants of the tail it finds where the encoder does. So kernels run beside
// each other (from 9.0 on, where one can begin before the other ends): the encoder of K, which computes, in half of every multiprocessor (of more rows in all of it), lookups of K
// and then of V, which wait for memory, in the other half, and the encoder of V, queries, the tail and the mask take the place of who ends. All find complete what is ahead of the
// first because that one waits for it; who waits for the last waits for all, because one block of each waits for the kernel ahead. Rows of x, queries and the tail are read past
// L1, which those blocks that do not wait may have stale; of codes and masks nothing old is there, since ordinary kernels have begun after these were last read. Lookups read codes
// that the encoder writes, but only of rows of the tail, which they do not look up.
//
// Rows y lie in f16 and a flash attention may add them up in it, as it does with rows x: their mean, which mu takes out, is what grows with the context.
//
// A block maps 128 rows of a head, a warp 16 of them with tensor-core products. Rows are split into two halves each, so that products are as good as those of
// floats. D = 128.
#pragma once

#include "pq-cuda-common.cuh"
#include "pq-cuda.h"
#include "pq-decode-kernel.cuh" // units of codes, and their centroids
#include "pq-launch.cuh"
#include "pq-mma.cuh"

#include <cuda_fp16.h>

#include <stdint.h>

namespace {

constexpr int PQ_PREFILL_D       = 128;
constexpr int PQ_PREFILL_THREADS = 256;
constexpr int PQ_PREFILL_ROWS    = 16 * PQ_PREFILL_THREADS / 32; // of a block
constexpr int PQ_PREFILL_STRIDE  = PQ_PREFILL_D + 8;             // halves: the 8 rows of a matrix load lie in different banks
constexpr int PQ_PREFILL_TOKENS  = 8;                            // of a block of the mask

typedef __half pq_prefill_smem[PQ_PREFILL_D][PQ_PREFILL_STRIDE]; // a map

// Rows of K and V that are encoded meanwhile: their slots of the tail may not have them yet.
struct pq_prefill_new_rows {
    const uint8_t * x[2]; // of K, of V
    size_t          row_stride[2], head_stride[2];
    int32_t         f16[2]; // otherwise f32
    const int64_t * slots;  // [n]
    int64_t         slot0;  // of them, the first of this tail
    int32_t         n;
};

struct pq_prefill_args {
    pq_cuda_prefill_step s;
    pq_codebook_layout k, v;
    pq_prefill_new_rows new_rows;
    int32_t n_group;       // query heads of a KV head
    int32_t n_row_blocks;  // of a KV head's queries, or results
    int32_t n_slot_blocks; // of the tail's rows of a KV head
    int32_t n_mask_blocks;
};

// Rows of a warp, times a map of a head: its rows are what an element of the input adds to the result, or, BY_ROW, each makes one element of it.
// from(row): a row of the block, or any other that can be read where there is none; load(it, col): its elements col, col + 1.
// to(row): where the result goes, or NULL; store(it, col, value). SETTLED: nothing of this needs the kernel ahead
template <bool BY_ROW, bool SETTLED, class FROM, class LOAD, class TO, class STORE>
__device__ __forceinline__ void pq_prefill_map(pq_prefill_smem & m, const __half * map, FROM from, LOAD load, TO to, STORE store) {
    constexpr int KS = PQ_PREFILL_D / 16;
    for (int i = threadIdx.x; i < PQ_PREFILL_D * PQ_PREFILL_D / 8; i += PQ_PREFILL_THREADS) {
        pq_cp_async(&m[i / (PQ_PREFILL_D / 8)][i % (PQ_PREFILL_D / 8) * 8], map + i * 8);
    }
    if (!SETTLED) {
        pq_pdl_wait(); // codebooks never depend on the kernels ahead
    }
    pq_pdl_launch_next();

    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int row  = threadIdx.x / 32 * 16 + g; // of the block, and row + 8
    const auto src0 = from(row), src1 = from(row + 8);
    const auto dst0 = to(row),   dst1 = to(row + 8);
    uint32_t hi[KS][4], lo[KS][4];
#pragma unroll
    for (int k = 0; k < KS; k++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2  x = load(i % 2 ? src1 : src0, 16 * k + 2 * t + i / 2 * 8);
            const __half2 h = __floats2half2_rn(x.x, x.y);
            const float2  f = __half22float2(h);
            const __half2 l = __floats2half2_rn(x.x - f.x, x.y - f.y);
            hi[k][i] = *(const uint32_t *) &h;
            lo[k][i] = *(const uint32_t *) &l;
        }
    }
    pq_cp_async_wait();
    __syncthreads();
#pragma unroll 1
    for (int n = 0; n < PQ_PREFILL_D; n += 16) {
        float acc[2][4] = {};
#pragma unroll
        for (int k = 0; k < KS; k++) {
            uint32_t b[4]; // rows 0-7 and 8-15 of B for 8 columns, then for the next 8
            if (BY_ROW) {
                pq_ldmatrix(b, &m[n + lane / 16 * 8 + lane % 8][16 * k + lane / 8 % 2 * 8]);
            } else {
                pq_ldmatrix_trans(b, &m[16 * k + lane % 16][n + lane / 16 * 8]);
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
                pq_mma_k16(acc[j], hi[k], b[2 * j], b[2 * j + 1], acc[j]);
                pq_mma_k16(acc[j], lo[k], b[2 * j], b[2 * j + 1], acc[j]);
            }
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            if (dst0) {
                store(dst0, n + 8 * j + 2 * t, make_float2(acc[j][0], acc[j][1]));
            }
            if (dst1) {
                store(dst1, n + 8 * j + 2 * t, make_float2(acc[j][2], acc[j][3]));
            }
        }
    }
}

// The query rows of a block: of one KV head, tokens first.
struct pq_prefill_queries {
    int head_kv, row0, n_group, n; // n: rows that there are from row0 on

    __device__ __forceinline__ pq_prefill_queries(const pq_prefill_args & a, int block)
        : head_kv(block / a.n_row_blocks), row0(block % a.n_row_blocks * PQ_PREFILL_ROWS), n_group(a.n_group), n((int) a.s.p.n_q * a.n_group - row0) {}

    __device__ __forceinline__ int token(int row) const { return (row0 + min(row, n - 1)) / n_group; }
    __device__ __forceinline__ int head(int row)  const { return head_kv * n_group + (row0 + min(row, n - 1)) % n_group; }
};

__device__ __forceinline__ int32_t pq_prefill_cell(const uint16_t * low, const uint16_t * high, int64_t slot) {
    return (int32_t) ((uint32_t) low[slot] | (uint32_t) high[slot] << 16);
}

__device__ __forceinline__ int64_t pq_prefill_cell(const pq_cuda_prefill_step & s, int64_t slot) {
    const int32_t cell = pq_prefill_cell(s.cell_low, s.cell_high, slot);
    return cell < s.p.n_kv ? cell : -1; // -1: the slot is not in use
}

// Exchanges the tail's columns of the mask with what is kept: first the tail's, then the mask's own.
template <bool BEFORE>
__device__ __forceinline__ void pq_prefill_mask(const pq_cuda_prefill_step & s, int block) {
    const int64_t n_slot_blocks = (s.p.tail.n + PQ_PREFILL_THREADS - 1) / PQ_PREFILL_THREADS;
    const int64_t slot   = block % n_slot_blocks * PQ_PREFILL_THREADS + threadIdx.x;
    const int64_t token0 = block / n_slot_blocks * PQ_PREFILL_TOKENS;
    if (!BEFORE) {
        pq_pdl_wait();
    }
    pq_pdl_launch_next();
    const int64_t cell = slot < s.p.tail.n ? pq_prefill_cell(s, slot) : -1;
    if (cell < 0) {
        return;
    }
    uint16_t taken[PQ_PREFILL_TOKENS], own[PQ_PREFILL_TOKENS]; // all are asked for before the first is written
    const int n = (int) min((int64_t) PQ_PREFILL_TOKENS, s.p.n_q - token0);
    auto mask = [&](int i) { return (uint16_t *) (s.mask + (token0 + i) * s.p.mask_token_stride) + cell; };
    auto kept = [&](int i) { return s.mask_kept + (token0 + i) * s.p.tail.n + slot; };
#pragma unroll
    for (int i = 0; i < PQ_PREFILL_TOKENS; i++) {
        if (i < n) {
            taken[i] = BEFORE ? ((const uint16_t *) (s.p.tail.mask + (token0 + i) * s.p.tail.mask_token_stride))[slot] : *kept(i);
            own[i]   = BEFORE ? *mask(i) : 0;
        }
    }
#pragma unroll
    for (int i = 0; i < PQ_PREFILL_TOKENS; i++) {
        if (i < n) {
            *mask(i) = taken[i];
            if (BEFORE) {
                *kept(i) = own[i];
            }
        }
    }
}

// ---- rows of the tail ----

struct pq_prefill_row {
    const uint8_t * x;
    bool            f16; // otherwise f32
};

// Block `block` of 2 * n_head_kv * n_slot_blocks: of the heads of K, then of V.
PQ_DEVICE void pq_prefill_tail_rows(const pq_prefill_args & a, pq_prefill_smem & smem, int block) {
    __shared__ int32_t new_row[PQ_PREFILL_ROWS]; // of a slot of the block, or -1
    const pq_attn_params & p = a.s.p;
    const bool is_v    = block >= p.n_head_kv * a.n_slot_blocks;
    const int  head_kv = block / a.n_slot_blocks - (is_v ? p.n_head_kv : 0);
    const int  slot0   = block % a.n_slot_blocks * PQ_PREFILL_ROWS;
    for (int i = threadIdx.x; i < PQ_PREFILL_ROWS; i += PQ_PREFILL_THREADS) {
        new_row[i] = -1;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < a.new_rows.n; i += PQ_PREFILL_THREADS) {
        const int64_t at = __ldg(a.new_rows.slots + i) - a.new_rows.slot0 - slot0;
        if (at >= 0 && at < PQ_PREFILL_ROWS) {
            new_row[at] = i;
        }
    }
    __syncthreads();
    const uint8_t * codebook = is_v ? p.v.codebook + head_kv * a.v.head_bytes : p.k.codebook + head_kv * a.k.head_bytes;
    const float   * mu   = (const float *) (codebook + (is_v ? a.v.mu : a.k.mu));
    const uint8_t * tail = is_v ? p.tail.v + head_kv * p.tail.v_head_stride : p.tail.k + head_kv * p.tail.k_head_stride;
    const size_t    tail_row_stride = is_v ? p.tail.v_row_stride : p.tail.k_row_stride;
    const uint8_t * x    = a.new_rows.x[is_v] + head_kv * a.new_rows.head_stride[is_v];
    const size_t    x_row_stride = a.new_rows.row_stride[is_v];
    const bool      x_f16 = a.new_rows.f16[is_v];
    __half        * rows = (__half *) (is_v ? a.s.v_rows : a.s.k_rows) + head_kv * p.n_kv * PQ_PREFILL_D;
    pq_prefill_map<false, true>(smem, (const __half *) (codebook + (is_v ? a.v.T : a.k.T)),
        [&](int row) {
            const int at = new_row[row];
            return at >= 0 ? pq_prefill_row{ x + at * x_row_stride, x_f16 } : pq_prefill_row{ tail + min((int64_t) slot0 + row, p.tail.n - 1) * tail_row_stride, true };
        },
        [&](const pq_prefill_row & r, int col) { // as the tail has it, or is to have it
            const __half2 h = r.f16 ? pq_load_fresh((const __half2 *) (r.x + col * sizeof(__half))) : __float22half2_rn(pq_load_fresh((const float2 *) (r.x + col * sizeof(float))));
            const float2 f = __half22float2(h), m = __ldg((const float2 *) (mu + col));
            return make_float2(f.x - m.x, f.y - m.y);
        },
        [&](int row) {
            const int64_t cell = slot0 + row < p.tail.n ? pq_prefill_cell(a.s, slot0 + row) : -1;
            return cell >= 0 ? rows + cell * PQ_PREFILL_D : nullptr; // a slot that is not in use may hold NaN
        },
        [&](__half * to, int col, float2 y) { // one row that overflows would be NaN in the results of all queries
            *(__half2 *) (to + col) = __floats2half2_rn(fminf(fmaxf(y.x, -65504.0f), 65504.0f), fminf(fmaxf(y.y, -65504.0f), 65504.0f));
        });
}

// ---- queries, rows of the tail and the mask ----

// Behind kernels that have waited for all that this reads.
// grid: n_head_kv * n_row_blocks + 2 * n_head_kv * n_slot_blocks + blocks of the mask + 1, which waits
__global__ void __launch_bounds__(PQ_PREFILL_THREADS) pq_prefill_begin_kernel(const __grid_constant__ pq_prefill_args a) {
    __shared__ __align__(16) pq_prefill_smem smem;
    const pq_attn_params & p = a.s.p;
    const int n_query_blocks = p.n_head_kv * a.n_row_blocks, n_tail_blocks = 2 * p.n_head_kv * a.n_slot_blocks;
    int block = blockIdx.x;
    if (block < n_query_blocks) {
        const pq_prefill_queries rows(a, block);
        pq_prefill_map<true, true>(smem, (const __half *) (p.k.codebook + rows.head_kv * a.k.head_bytes + a.k.T_inv),
            [&](int row) { return (const float *) (p.q + rows.token(row) * p.q_token_stride + rows.head(row) * p.q_head_stride); },
            [&](const float * q, int col) { return pq_load_fresh((const float2 *) (q + col)); },
            [&](int row) { return row < rows.n ? a.s.q_mapped + ((int64_t) rows.token(row) * p.n_head + rows.head(row)) * PQ_PREFILL_D : nullptr; },
            [&](float * q, int col, float2 y) { *(float2 *) (q + col) = y; });
        return;
    }
    block -= n_query_blocks;
    if (block < n_tail_blocks) {
        pq_prefill_tail_rows(a, smem, block);
    } else if (block < n_tail_blocks + a.n_mask_blocks) {
        pq_prefill_mask<true>(a.s, block - n_tail_blocks);
    } else {
        pq_pdl_launch_next();
        pq_pdl_wait();
    }
}

// ---- rows of K and V, but for those of the tail ----

// Lookups alone, as fast as memory takes them. 16 threads share a row, so that a warp stores whole lines; the codes of the next rows are on their way while
// these are looked up.
constexpr int PQ_ROWS_THREADS   = 512;  // half of what a multiprocessor has registers for
constexpr int PQ_ROWS_STEP      = PQ_ROWS_THREADS / 16;
constexpr int PQ_ROWS_AHEAD     = 8;    // rows of a thread
constexpr int PQ_ROWS_TURNS     = 2;    // tiles of a block whose codes are on their way: reads wait long behind so many writes
constexpr int PQ_ROWS_TILE      = PQ_ROWS_AHEAD * PQ_ROWS_STEP;
constexpr int PQ_ROWS_BLOCKS    = 2;    // of a multiprocessor, one where something else runs beside
constexpr int PQ_ROWS_TILE_BITS = 1024; // a bit for every tile, or for several
constexpr int PQ_ROWS_TABLE     = PQ_PREFILL_D * PQ_KSUB * (int) sizeof(__half);

struct pq_prefill_rows_args { // of K, or of V
    const uint8_t  * codes;
    const uint8_t  * codebook;
    uint16_t       * rows;
    size_t           codes_row_stride, codes_head_stride;
    size_t           head_bytes, centroids; // of the codebook
    const uint16_t * cell_low, * cell_high;
    int64_t          n_slots;
    int32_t          n_rows;
    int32_t          settled; // what this one reads was complete when the kernel ahead let it begin
};

// grid: (blocks that share a head, heads). Dynamic shared memory: the table, f16 [M][PQ_KSUB][DSUB]
template <int TYPE, bool ALIGNED /* codes, at a multiple of 2 bytes */>
__global__ void __launch_bounds__(PQ_ROWS_THREADS, PQ_ROWS_BLOCKS) pq_prefill_rows_kernel(const __grid_constant__ pq_prefill_rows_args a) {
    extern __shared__ __align__(16) uint8_t pq_prefill_table[];
    __shared__ uint32_t tiles_of_tail[PQ_ROWS_TILE_BITS / 32]; // tile i has rows of the tail: bit i modulo their number
    __shared__ uint32_t rows_of_tail[PQ_ROWS_TILE / 32];       // of this tile
    pq_pdl_launch_beside(a.settled, PQ_ROWS_THREADS);
    const int tid  = threadIdx.x;
    const int head = blockIdx.y;
    pq_decode_start_table<PQ_ROWS_THREADS>(PQ_PREFILL_D, (const __half *) (a.codebook + head * a.head_bytes + a.centroids), (__half *) pq_prefill_table);
    for (int i = tid; i < PQ_ROWS_TILE_BITS / 32; i += PQ_ROWS_THREADS) {
        tiles_of_tail[i] = 0;
    }
    if (!a.settled) {
        pq_pdl_wait();
    }

    const int j = tid % 16, n_rows = a.n_rows, step = gridDim.x * PQ_ROWS_TILE;
    const uint8_t * codes = a.codes + head * a.codes_head_stride;
    uint8_t       * dst   = (uint8_t *) (a.rows + (int64_t) head * n_rows * PQ_PREFILL_D) + j * 16;
    auto load = [&](uint32_t (&c)[PQ_ROWS_AHEAD], int row) {
#pragma unroll
        for (int i = 0; i < PQ_ROWS_AHEAD; i++) {
            c[i] = pq_decode_load_unit<TYPE, ALIGNED>(codes + (int64_t) min(row + PQ_ROWS_STEP * i, n_rows - 1) * a.codes_row_stride, j, PQ_PREFILL_D);
        }
    };
    auto each_cell_of_tail = [&](auto f) {
        for (int64_t slot = tid; slot < a.n_slots; slot += PQ_ROWS_THREADS) {
            const int32_t cell = pq_prefill_cell(a.cell_low, a.cell_high, slot);
            if (cell >= 0) {
                f((uint32_t) cell);
            }
        }
    };
    int row0 = blockIdx.x * PQ_ROWS_TILE;
    uint32_t c[PQ_ROWS_TURNS][PQ_ROWS_AHEAD]; // of this turn, and of those to come
#pragma unroll
    for (int turn = 0; turn < PQ_ROWS_TURNS; turn++) {
        load(c[turn], row0 + turn * step + tid / 16);
    }
    __syncthreads();
    each_cell_of_tail([&](uint32_t cell) {
        const uint32_t i = cell / PQ_ROWS_TILE % PQ_ROWS_TILE_BITS;
        atomicOr(&tiles_of_tail[i / 32], 1u << i % 32);
    });
    pq_cp_async_wait();
    __syncthreads();
#pragma unroll 1
    for (; row0 < n_rows; row0 += step) {
        const int row = row0 + tid / 16;
        uint32_t c_then[PQ_ROWS_AHEAD];
        load(c_then, row + PQ_ROWS_TURNS * step);
        uint32_t skip = 0; // bit i: row + PQ_ROWS_STEP * i is of the tail
        const uint32_t bit = row0 / PQ_ROWS_TILE % PQ_ROWS_TILE_BITS;
        if (tiles_of_tail[bit / 32] >> bit % 32 & 1) {
            __syncthreads(); // another tile's have been read
            if (tid < PQ_ROWS_TILE / 32) {
                rows_of_tail[tid] = 0;
            }
            __syncthreads();
            each_cell_of_tail([&](uint32_t cell) {
                if (cell / PQ_ROWS_TILE == (uint32_t) row0 / PQ_ROWS_TILE) {
                    atomicOr(&rows_of_tail[cell % PQ_ROWS_TILE / 32], 1u << cell % 32);
                }
            });
            __syncthreads();
#pragma unroll
            for (int i = 0; i < PQ_ROWS_AHEAD; i++) {
                const int at = tid / 16 + PQ_ROWS_STEP * i;
                skip |= (rows_of_tail[at / 32] >> at % 32 & 1) << i;
            }
        }
#pragma unroll
        for (int i = 0; i < PQ_ROWS_AHEAD; i++) {
            const uint4 y = pq_decode_lookup<TYPE, false>((const __half *) pq_prefill_table, c[0][i], j);
            if (row + PQ_ROWS_STEP * i < n_rows && !(skip >> i & 1)) {
                __stcs((uint4 *) (dst + (int64_t) (row + PQ_ROWS_STEP * i) * (PQ_PREFILL_D * sizeof(__half))), y); // of a long context L2 holds no row until it is read
            }
#pragma unroll
            for (int turn = 1; turn < PQ_ROWS_TURNS; turn++) {
                c[turn - 1][i] = c[turn][i];
            }
            c[PQ_ROWS_TURNS - 1][i] = c_then[i];
        }
    }
    if (a.settled && blockIdx.x + blockIdx.y == 0) {
        pq_pdl_wait();
    }
}

// ---- afterwards ----

// The result in place, then the mask.
// grid: n_head_kv * n_row_blocks + blocks of the mask
__global__ void __launch_bounds__(PQ_PREFILL_THREADS) pq_prefill_end_kernel(const __grid_constant__ pq_prefill_args a) {
    __shared__ __align__(16) pq_prefill_smem smem;
    const pq_attn_params & p = a.s.p;
    const int block = blockIdx.x;
    if (block >= p.n_head_kv * a.n_row_blocks) {
        pq_prefill_mask<false>(a.s, block - p.n_head_kv * a.n_row_blocks);
        return;
    }
    const pq_prefill_queries rows(a, block);
    const uint8_t * codebook = p.v.codebook + rows.head_kv * a.v.head_bytes;
    const float   * mu       = (const float *) (codebook + a.v.mu);
    auto at = [&](int row) { return (float *) ((uint8_t *) p.dst + rows.token(row) * p.dst_token_stride + rows.head(row) * p.dst_head_stride); };
    pq_prefill_map<false, false>(smem, (const __half *) (codebook + a.v.T_inv),
        at,
        [&](const float * x, int col) { return *(const float2 *) (x + col); },
        [&](int row) { return row < rows.n ? at(row) : nullptr; },
        [&](float * x, int col, float2 y) {
            const float2 m = __ldg((const float2 *) (mu + col));
            *(float2 *) (x + col) = make_float2(y.x + m.x, y.y + m.y);
        });
}

} // namespace
