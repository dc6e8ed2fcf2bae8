// Attention on codes: the kernel for D = 128 with codes on both sides, the shape of most models, for a few query rows per KV head.
// One launch does the whole step: it turns queries and new keys to their positions, writes the new rows to the exact tail and encodes them, attends to
// codes and tail, merges the parts of the context and writes the result.
//
// A block has a multiprocessor to itself. It serves one KV head, up to R of its query rows and one part of the context:
//
//   1  asks for everything that does not depend on the kernel ahead in the stream, while that one still runs: tables, masks, and the codes of its
//      first tiles. Tables are the centroids of K and V in shared memory, one row of 256 bytes per centroid index, so that a code byte becomes an
//      address with one PRMT (byte 1 of the address is the code, byte 0 belongs to the lane). They lie in memory as they are wanted here
//      (pq-layout.h), and come by bulk copies (from 9.0 on);
//   2  maps the queries (q' = T^-1 q, and q.mu) with a tensor-core product;
//   3  some warps attend to the exact tail; all take tiles of 32 cells, each with a softmax of its own, while the next tile is on its way to shared memory
//      (tile_source). Tiles that nobody sees are never read;
//   4  merges its warps, and maps what they have with T^-1 of V. The last block of a row group to come here adds the parts (nobody waits for anybody);
//   5  helps to encode the new rows. No step reads the codes that it writes (the rows are in the tail), so it does not matter when they are made:
//      multiprocessors without attention encode as much as they have the time for (n_apart; the plan in pq-attn.cu leaves some to that in short contexts), the
//      rest is for the blocks that delivered their part and are not the last of their row group, while that one merges.
//
// In what follows g = lane / 4 and t = lane % 4, as the tensor-core products place their operands (pq-cuda-common.cuh).
//
//   K   Lane (g, t) looks up quarter t of cell g of a group of 8: 16 half2. Products sum over t, so C has whole scores. All 8 cells want
//       the same subspace at the same time, though, and it lies in one bank: so cell g takes half2 i ^ x at step i, where x ("turn") depends
//       on g. The product undoes that: for each turn it has rows or columns of its own, holding the query in that turn's order, and
//       of its results those are kept whose turn is the cell's. With R rows there is room for 16 / R turns (8 for one
//       row); what is left of the turn is undone by swapping registers. The cost hardly depends on R.
//       Codes of four elements (pq2, and the shared ones of pq3) give two half2 in one lookup, with a turn of its own: four places instead of eight.
//   V   16 lanes share a cell, two cells side by side; a lane owns 8 elements (four half2). One row: B is a diagonal matrix of
//       weights, so a product is four multiply-adds per lane, from halves into floats. More rows: the half2 of two cells are
//       re-packed by element, and B has the weights of two rows for those lanes' cells. One row with pq3: 8 lanes share a cell, with 16 elements each (v_lanes).
//
// Both ways lookups read 32 different banks. Per cell, head and side that is 2 wavefronts of shared memory for 64 lookups.
//
// The weights of a layer pass through L2 between one launch and the next and leave no instruction there: the code that a launch comes through arrives
// from memory. So what runs once is kept small, in loops that are not unrolled (an 8B model at 32768 cells: 5 % faster with a quarter less code).
#pragma once

#include "pq-attn-kernel.cuh" // rows, masks, tables, the V side of a lane
#include "pq-encode-group.cuh"
#include "pq-mma.cuh"

#include <type_traits>

namespace pq_attn {

constexpr int MAX_SPLIT      = 256; // parts of the context
constexpr int TILE_128       = 32;  // cells of a tile
constexpr int TILE_ALIGN     = 512; // bytes: how its pieces are turned follows from their addresses
constexpr int TAIL_STEP      = 8;   // tail slots that a warp takes at a time: the columns of one product
constexpr int Q_STRIDE       = 136; // halves between the mapped queries of rows: neighbours lie in other banks
constexpr int Q_SPLIT_STRIDE = 36;  // words between the lanes' parts of the queries, likewise
constexpr int T_INV_STRIDE   = 136; // halves between the rows of V's T_inv, likewise

// Registers bound the threads of a block: rows cost registers.
__host__ __device__ constexpr int n_threads_128(int R) {
    return R == 8 ? 384 : 512;
}

struct args_128 : args {
    small_divisor by_row_groups, by_heads, by_parts; // of block indexes
    int32_t    n_attn_blocks; // the others only encode
    int32_t    n_tail_warps;
    int32_t    tail_mask_by_16;
    int32_t    one_mask, one_tail_mask; // all rows of a stream have one, at a multiple of 16 bytes
    int32_t    early_tables;  // ask for the tables without asking masks first: a part so large has cells that somebody sees
    int32_t    k_paired, v_paired; // pq3: see tile_cell
    int32_t    settled;       // nothing but queries and new rows is still being written when the kernel starts
    uint32_t * counters;      // arrivals [n_stream][n_head_kv][n_row_groups]; 0 before and after a launch
    // The rows of this step, not yet written. n_new 0: they are.
    int32_t    n_new;
    pq_encode_units units;       // of encoding: strips of heads of both sides, some rows at a time
    int32_t    n_apart;          // of them, the first ones: for blocks without attention
    int32_t    n_helpers;        // blocks that encode the others
    int64_t    slot_base;        // where the slots of `p.tail` begin among those that tail_idx counts
    int64_t    slots_per_stream;
    pq_encode_sides new_rows;
    pq_cuda_rope    rope;
    uint8_t       * dst_q8;           // see pq_cuda_step; NULL: not wanted
    uint32_t smem_codes, smem_weights, smem_sums, smem_barriers; // byte offsets, with those of args
};

// Codes as tensors, u8 [n_stream][n_kv][bytes of a row], for copies of boxes [32][tile_cell()] (tile_box).
struct code_maps {
    CUtensorMap k, v;
};

// Bytes of a cell in a warp's tile. The 48 bytes of pq3 come with 16 of the head beside, where every two heads begin at a sector of memory (`paired`), so that they are
// whole sectors: a copy of parts of sectors takes longer.
__host__ __device__ constexpr uint32_t tile_cell(int type) {
    return type == PQ_TYPE_PQ2 ? 32 : 64;
}

// Where in them its codes begin.
template <int TYPE>
PQ_DEVICE uint32_t tile_skip(const uint8_t * codes, bool paired) {
    return TYPE == PQ_TYPE_PQ3 && paired ? (uint32_t) (uintptr_t) codes & 16 : 0;
}

// Whether a tile has piece i (of 16 bytes) of cell c at i ^ c / 2 % 4, for reads of neighbouring cells at once.
__host__ __device__ constexpr bool tile_turned(int type, bool is_v, int R) {
    return type == PQ_TYPE_PQ3 && (!is_v || R == 1);
}

// Words of codes that a lane loads of a cell's K.
template <int TYPE> struct k_words { enum { N = TYPE == PQ_TYPE_PQ4 ? 4 : TYPE == PQ_TYPE_PQ3 ? 3 : 2 }; };

// Half2 of a quarter, the first ones, that lookups give singly.
template <int TYPE> struct k_one { enum { N = TYPE == PQ_TYPE_PQ4 ? 16 : TYPE == PQ_TYPE_PQ3 ? 8 : 0 }; };

// A lookup of K gives one half2, or two side by side. All cells of a group want the same step at the same time, so a lane looks up half2 i ^ turn at
// step i: `turn` is the cell where lookups give one, and twice the cell's low bits where they give two. pq4 has lookups of one, pq2 of two; a quarter of
// pq3 has 8 half2 of the first kind, then 8 of the second (pq-layout.h).
template <int TYPE>
__host__ __device__ constexpr int k_turn(int g, int i) {
    return i >= k_one<TYPE>::N ? 2 * g & 6 : g;
}

struct k_lane {
    uint32_t low[4], low2[2]; // address bytes that are the lane's, as PRMT takes them: of lookups of one, of two
    uint32_t pick[4];         // PRMT selectors
    int32_t  g;               // the cell in its group
};

// The second half of each follows from the first. Where registers are scarce it is made anew for every group of cells.
template <int TYPE>
PQ_DEVICE k_lane without_registers(const k_lane & s) {
    k_lane x = s;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        x.pick[i]     = (uint32_t) pq_opaque((int) s.pick[i]);
        x.pick[i + 2] = x.pick[i] ^ 0x20;
        if constexpr (TYPE != PQ_TYPE_PQ2) {
            x.low[i]     = (uint32_t) pq_opaque((int) s.low[i]);
            x.low[i + 2] = x.low[i] ^ (TYPE == PQ_TYPE_PQ3 ? 0x4040 : 0x1010);
        }
    }
    if constexpr (TYPE != PQ_TYPE_PQ4) {
        x.low2[0] = (uint32_t) pq_opaque((int) s.low2[0]);
        x.low2[1] = x.low2[0] ^ 0x1010;
    }
    return x;
}

// Where in a half row of the table quarter t has half2 i, in bytes. A quarter of pq3 is word t of each of its three pieces of 16 codes: then a cell's
// words are at places that differ in two bits.
template <int TYPE>
PQ_DEVICE uint32_t k_column(int t, int i) {
    return TYPE == PQ_TYPE_PQ3 ? 64 * (i / 4) + 16 * t + 4 * (i % 4) : 32 * t + 4 * i;
}

template <int TYPE>
PQ_DEVICE void init_k_lane(k_lane & s, int lane) {
    const int g = lane / 4, t = lane % 4;
    s.g = g;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        s.pick[i] = pq_keep(0x7600 | (i ^ g % 4) << 4 | (4 + i % 2), lane);
    }
    if constexpr (TYPE != PQ_TYPE_PQ2) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s.low[i] = pq_keep(0x101 * k_column<TYPE>(t, g) ^ (k_column<TYPE>(0, 2 * i) | k_column<TYPE>(0, 2 * i + 1) << 8), lane);
        }
    }
    if constexpr (TYPE != PQ_TYPE_PQ4) { // 8-byte lookups: each half of a warp has 16 pairs of banks
#pragma unroll
        for (int i = 0; i < 2; i++) {
            s.low2[i] = pq_keep((32 * t + 8 * (2 * i ^ g % 4)) | (32 * t + 8 * ((2 * i + 1) ^ g % 4)) << 8, lane);
        }
    }
}

// The words of a cell come from the warp's tile in shared memory: where the first one is, of group 0.
template <int TYPE>
PQ_DEVICE uint32_t k_place(uint32_t tile, uint32_t skip, int lane) {
    return tile + (TYPE == PQ_TYPE_PQ3 ? lane / 4 * 64 + (lane / 8 * 16 ^ skip) + lane % 4 * 4 : 4 * k_words<TYPE>::N * lane);
}

template <int TYPE>
PQ_DEVICE void read_k_words(uint32_t (&w)[k_words<TYPE>::N], uint32_t place, uint32_t skip, int group) {
    const uint32_t from = group * 8 * tile_cell(TYPE);
    if constexpr (TYPE == PQ_TYPE_PQ4) {
        const uint4 v = pq_shared_u128(place + from);
        w[0] = v.x;
        w[1] = v.y;
        w[2] = v.z;
        w[3] = v.w;
    } else if constexpr (TYPE == PQ_TYPE_PQ3) {
        w[0] = pq_shared_u32(place + from);
        w[1] = pq_shared_u32((place ^ (16 + 2 * skip)) + from); // pieces 0 and 1, or 1 and 2
        w[2] = pq_shared_u32((place ^ 32) + from);              // 0 and 2, or 1 and 3
    } else {
        const uint2 v = pq_shared_u64(place + from);
        w[0] = v.x;
        w[1] = v.y;
    }
}

// How many lanes share a cell of V, with 8 or 16 elements each. pq3 with one row: codes then come in words, half as many loads, and one row has the registers for the sums.
template <int TYPE, int R> struct v_lanes { enum { N = TYPE == PQ_TYPE_PQ3 && R == 1 ? 8 : 16, CELLS = PQ_WARP / N, SLOTS = TILE_128 / CELLS, HALF2 = 64 / N }; };

// Which cell of a slot, and which elements of it (the l-th 8 or 16), a lane looks up of V. pq3: half of a warp has all places, for lookups of 8 bytes.
template <int TYPE, int R>
PQ_DEVICE void v_lane_place(int lane, int * cell, int * l) {
    if constexpr (v_lanes<TYPE, R>::N == 8) {
        *cell = lane % 4;
        *l    = lane / 4 ^ lane % 4 / 2 * 4;
    } else {
        lane_place<16, true>(lane, cell, l);
        *l ^= TYPE == PQ_TYPE_PQ3 ? 8 * *cell : 0;
    }
}

struct v_lane {
    uint32_t low[2], low2; // address bytes that are the lane's, as PRMT takes them; low2: of the codes that pq3 shares
    uint32_t pick[4];      // PRMT selectors
    int32_t  order;        // what comes at place i of the lane's is its code i ^ order (pq2: half2 i ^ order)
};

template <int TYPE, int R>
PQ_DEVICE void init_v_lane(v_lane & s, const side_args & v, int lane) {
    if constexpr (TYPE == PQ_TYPE_PQ3) { // two or four codes, a half2 each, in another order for every cell; then half as many for two
        constexpr int N_OWN = v_lanes<TYPE, R>::HALF2 / 2;
        int cell, l;
        v_lane_place<TYPE, R>(lane, &cell, &l);
        s.order = cell;
#pragma unroll
        for (int i = 0; i < N_OWN; i += 2) {
            s.low[i / 2] = 4 * (N_OWN * l + (i ^ cell)) | 4 * (N_OWN * l + ((i + 1) ^ cell)) << 8;
        }
        s.low2 = N_OWN == 2 ? 8 * l : 8 * (2 * l + cell % 2) | 8 * (2 * l + 1 - cell % 2) << 8;
#pragma unroll
        for (int i = 0; i < N_OWN; i++) {
            s.pick[i] = 0x7600 | (i ^ cell) << 4 | (4 + i % 2);
        }
    } else {
        lane_side x = {};
        init_side<TYPE, 16, true>(x, v, 128, lane);
        s.order = x.order;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s.low[i / 2] = x.low[i / 2];
            s.pick[i]    = x.pick[i];
        }
    }
}

// The codes of a lane's elements of a cell of V, a byte each.
struct v_unit {
    uint32_t own;
    uint32_t shared; // pq3: those of two subspaces. Two of them come twice, so that byte i ^ order is one of them
};

// The lane's half2 of a cell, in the order of its lookups.
template <int TYPE, int R, uint32_t TABLE>
PQ_DEVICE void lookup_v(uint32_t (&y)[v_lanes<TYPE, R>::HALF2], const v_unit & c, const v_lane & s) {
    constexpr int N_OWN = TYPE == PQ_TYPE_PQ4 ? 4 : v_lanes<TYPE, R>::HALF2 / 2; // codes
#pragma unroll
    for (int i = 0; i < N_OWN; i++) {
        const uint32_t at = __byte_perm(c.own, s.low[i / 2], s.pick[i]);
        if constexpr (TYPE == PQ_TYPE_PQ2) {
            const uint2 v = pq_load_shared_u64<TABLE>(at);
            y[2 * i]     = v.x;
            y[2 * i + 1] = v.y;
        } else {
            y[i] = pq_load_shared_u32<TABLE>(at);
        }
    }
    if constexpr (TYPE == PQ_TYPE_PQ3) {
#pragma unroll
        for (int i = 0; i < N_OWN / 2; i++) {
            const uint2 v = pq_load_shared_u64<TABLE + 128>(__byte_perm(c.shared, s.low2, N_OWN == 2 ? 0x7604 : s.pick[i]));
            y[N_OWN + 2 * i]     = v.x;
            y[N_OWN + 2 * i + 1] = v.y;
        }
    }
}

// Which half2 of the head is at place i of those of a lane.
template <int TYPE, int R>
PQ_DEVICE int v_half2(int i, int l, int order) {
    constexpr int N_OWN = v_lanes<TYPE, R>::HALF2 / 2;
    if (TYPE != PQ_TYPE_PQ3) {
        return 4 * l + (i ^ order);
    }
    if (i < N_OWN) {
        const int code = N_OWN * l + (i ^ order);
        return code / 2 * 4 + code % 2;
    }
    const int code = N_OWN == 2 ? l : 2 * l + ((i - N_OWN) / 2 ^ order % 2);
    return 4 * code + 2 + i % 2;
}

// Where the lane's codes of slot 0 are; skip: where in a cell they begin. With 8 lanes to a cell, lanes read different banks because pieces lie turned (tile_turned) and a slot has
// cells 0, 1, 4 and 5 from its first one on.
template <int TYPE, int R>
PQ_DEVICE void v_place(int lane, uint32_t tile, uint32_t skip, uint32_t * own, uint32_t * shared) {
    int cell, l;
    v_lane_place<TYPE, R>(lane, &cell, &l);
    if constexpr (v_lanes<TYPE, R>::N == 8) {
        const uint32_t at = tile + cell % 2 * 64 + cell / 2 * 256, turn = cell / 2 * 32;
        *own    = at + ((l / 4 * 16 + skip) ^ turn) + l % 4 * 4;
        *shared = at + ((32 + skip) ^ turn) + 2 * l;
    } else {
        const uint32_t at = tile + skip + cell * tile_cell(TYPE);
        *own    = at + (TYPE == PQ_TYPE_PQ4 ? 4 * l : 2 * l);
        *shared = at + 32 + l;
    }
}

// First cell of a slot.
template <int TYPE, int R>
__host__ __device__ constexpr int v_slot_cell(int slot) {
    return v_lanes<TYPE, R>::N == 8 ? slot % 2 * 2 + slot / 2 * 8 : 2 * slot;
}

template <int TYPE, int R>
PQ_DEVICE v_unit read_v_unit(uint32_t own, uint32_t shared, int slot) {
    const uint32_t from = v_slot_cell<TYPE, R>(slot) * tile_cell(TYPE);
    v_unit c;
    if constexpr (v_lanes<TYPE, R>::N == 8) {
        const uint32_t turn = slot % 2 * 16;
        c.own    = pq_shared_u32((own ^ turn) + from);
        c.shared = pq_shared_u16((shared ^ turn) + from) * 0x10001u;
    } else {
        c.own    = TYPE == PQ_TYPE_PQ4 ? pq_shared_u32(own + from) : pq_shared_u16(own + from);
        c.shared = TYPE == PQ_TYPE_PQ3 ? pq_shared_u8(shared + from) : 0;
    }
    return c;
}

PQ_DEVICE void swap_if(bool yes, uint32_t & a, uint32_t & b) {
    const uint32_t x = yes ? b : a;
    b = yes ? a : b;
    a = x;
}

// The lane's 16 half2 of one cell, half2 i ^ turn at i. The row of the table: first the first halves of the four quarters (pq-layout.h).
template <int TYPE>
PQ_DEVICE void lookup_k(uint32_t (&y)[16], const uint32_t (&w)[k_words<TYPE>::N], const k_lane & s) {
    constexpr int N_WORDS = TYPE == PQ_TYPE_PQ4 ? 4 : 2; // of codes whose lookups give one, or, pq2, two. pq3: then one of shared codes
    uint32_t x[N_WORDS];
#pragma unroll
    for (int i = 0; i < N_WORDS; i++) {
        x[i] = w[i];
    }
    if constexpr (TYPE != PQ_TYPE_PQ2) {
        // code i ^ turn: bit 2 of the turn swaps words, the others choose within a word
#pragma unroll
        for (int i = 0; i < N_WORDS; i += 2) {
            swap_if(s.g & 4, x[i], x[i + 1]);
        }
#pragma unroll
        for (int i = 0; i < 4 * N_WORDS; i++) {
            const uint32_t at = __byte_perm(x[i / 4], s.low[i % 8 / 2], s.pick[i % 4]);
            y[i] = i < 8 ? pq_load_shared_u32<0>(at) : pq_load_shared_u32<128>(at);
        }
    }
    if constexpr (TYPE != PQ_TYPE_PQ4) {
#pragma unroll
        for (int i = TYPE == PQ_TYPE_PQ3 ? 4 : 0; i < 8; i++) {
            const uint32_t at = __byte_perm(TYPE == PQ_TYPE_PQ3 ? w[2] : x[i / 4], s.low2[i % 4 / 2], s.pick[i % 4]);
            const uint2    v  = i < 4 ? pq_load_shared_u64<0>(at) : pq_load_shared_u64<128>(at);
            y[2 * i]     = v.x;
            y[2 * i + 1] = v.y;
        }
    }
}

// R rows have room for 16 / R turns: the others are undone here, by the bits of the cell that query_place leaves out. What is at half2 i stays within 2^n of it.
template <int TYPE, int R>
PQ_DEVICE void swap_back(uint32_t (&y)[16], int g) {
    constexpr int ROOM = R == 1 ? 7 : R == 4 ? 6 : 4; // bits of g that need no swap
#pragma unroll
    for (int half = 0; half < 16; half += 8) {
        const bool two = TYPE == PQ_TYPE_PQ2 || (TYPE == PQ_TYPE_PQ3 && half == 8);
#pragma unroll
        for (int bit = 1; bit < 8; bit *= 2) { // of half2 indexes
            const int of_g = two ? bit / 2 : bit;
            // lookups of two have turns of g's low bits only, which pq2 gives other rows of A (query_place)
            if (of_g == 0 || (TYPE == PQ_TYPE_PQ2 ? (ROOM & bit) != 0 : (ROOM & of_g) != 0)) {
                continue;
            }
#pragma unroll
            for (int i = half; i < half + 8; i++) {
                if ((i & bit) == 0) {
                    swap_if(g & of_g, y[i], y[i ^ bit]);
                }
            }
        }
    }
}

// How R rows and the turns share the 16 rows of A (R = 4, 8).
template <int TYPE, int R>
PQ_DEVICE void query_place(int m /* row of A */, int * row, int * g /* what of the cell the turn follows */) {
    *row = m % R;
    if constexpr (TYPE == PQ_TYPE_PQ2) { // its turn follows the low bits only
        *g = R == 8 ? m / 8 * 2 : m / 8 + m / 4 % 2 * 2;
    } else {
        *g = R == 8 ? m / 8 * 4 : m / 4 % 2 * 2 + m / 8 * 4;
    }
}

// One row: the lane's part of B, whose columns are the cells' turns. Half2 of the query for word i of column n.
template <int TYPE>
__host__ __device__ constexpr int query_words() {
    return (16 + k_one<TYPE>::N) / 2;
}

template <int TYPE>
PQ_DEVICE int query_half2(int i, int n) {
    constexpr int N_ONE = k_one<TYPE>::N;
    if (i < N_ONE) {
        return i ^ (n / 2 + n % 2 * 4);
    }
    return N_ONE + ((2 * (i - N_ONE)) ^ 2 * (n / 2)) + n % 2;
}

// Where the mapped query has element i, so that its half2 are in the order of the lookups.
template <int TYPE>
__host__ __device__ constexpr int query_element(int i) {
    if (TYPE != PQ_TYPE_PQ3) {
        return i;
    }
    // bits and not divisions: those are merged to one by a divisor that the kernel works out
    const uint32_t u = (uint32_t) i, own = (u >> 4 & 3) << 5 | u >> 6 << 3 | (u >> 3 & 1) << 2, shared = u >> 5 << 5 | 16 | (u >> 3 & 3) << 2;
    return (int) ((u >> 2 & 1 ? shared : own) | (u & 3));
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

// Scores of a tile: s[i] of cell softmax_lane::cell(lane, i). words(i, w): the lane's words of group i. q: R = 1: the lane's part of B,
// query_words(); otherwise of A, 32.
template <int TYPE, int R, int N_Q, class WORDS>
PQ_DEVICE void scores_128(float (&s)[softmax_lane<R>::N], WORDS words, const k_lane & kl, const uint32_t (&q)[N_Q], int lane) {
    const int g = lane / 4, t = lane % 4;
    if constexpr (R == 1) {
        // A: cells. What lookups give side by side has to be so in registers too: lookups of one half2 make a row of A each for two groups of cells,
        // C [cell][turn]; those of two make two rows of one group, C [first or second half2, cell][turn, first or second half2]. Of cell g, lane t = g % 4
        // has what is wanted: query_half2() has put it there.
        constexpr int N_ONE = k_one<TYPE>::N;
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
            float c[4] = { 0.0f, 0.0f, 0.0f, 0.0f }, d[2][4] = {};
#pragma unroll
            for (int i = 0; i < N_ONE; i += 2) {
                pq_mma_m16n8k16(c, y[0][i], y[1][i], y[0][i + 1], y[1][i + 1], q[i], q[i + 1]);
            }
#pragma unroll
            for (int i = N_ONE; i < 16; i += 4) {
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    pq_mma_m16n8k16(d[j], y[j][i], y[j][i + 1], y[j][i + 2], y[j][i + 3], q[(N_ONE + i) / 2], q[(N_ONE + i) / 2 + 1]);
                }
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
                v[2 * h + j] = N_ONE == 0 ? 0.0f : g / 4 ? c[2 * j + 1] : c[2 * j];
                if (N_ONE < 16) {
                    v[2 * h + j] += d[j][0] + d[j][3];
                }
            }
        }
        const int owner = g * 4 + g % 4;
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[i] = __shfl_sync(PQ_FULL_WARP, v[i], owner);
        }
        s[0] = t < 2 ? (t == 0 ? x[0] : x[1]) : (t == 2 ? x[2] : x[3]);
    } else {
        // B: a group of cells. C [row and turn][cell]. Unrolled, though the loop over tiles then passes the first instruction cache (12 KB): in two
        // rounds it was slower (8 KV heads, 32768 cells: 39 us and 34 us on an H100).
#pragma unroll
        for (int part = 0; part < 2; part++) {
            float v[2][2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                uint32_t y[16], w[k_words<TYPE>::N];
                words(2 * part + h, w);
                lookup_k<TYPE>(y, w, R == 4 ? without_registers<TYPE>(kl) : kl);
                swap_back<TYPE, R>(y, kl.g);
                // two chains, as a product waits for the one before it; eight rows have no registers for a second one
                float c[4] = { 0.0f, 0.0f, 0.0f, 0.0f }, d[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
                float (&other)[4] = R == 8 ? c : d;
#pragma unroll
                for (int i = 0; i < 8; i += 2) {
                    pq_mma_m16n8k16(c,     q[4 * i],     q[4 * i + 1], q[4 * i + 2], q[4 * i + 3], y[2 * i],     y[2 * i + 1]);
                    pq_mma_m16n8k16(other, q[4 * i + 4], q[4 * i + 5], q[4 * i + 6], q[4 * i + 7], y[2 * i + 2], y[2 * i + 3]);
                }
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    c[i] += d[i];
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
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float x = v[i / 2][i % 2];
                if constexpr (R == 8) {
                    s[i]     = part == 0 ? x : s[i];
                    s[4 + i] = x; // of the second part in the end
                } else { // half of the lanes have scores: they hand two groups to the others
                    const float other = __shfl_xor_sync(PQ_FULL_WARP, x, 16);
                    const bool  first = softmax_lane<R>::first(lane);
                    s[i] = part == 0 ? x : first ? s[i] : other;
                }
            }
        }
    }
}

// The weights of a tile on their way from the softmax's lanes to those of B, R > 1: half2 {cell c, cell c + 16} at
// [c / 4][c % 2][row][c / 2 % 2] of a warp's own weights.
template <int R>
PQ_DEVICE void put_weights(uint32_t weights /* shared address */, const float (&p)[R], int lane) {
    const int t = lane % 4, row = softmax_lane<R>::row(lane);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        // cell c = 8 * (i / 2) + 2t + i % 2, below 16
        const uint32_t word = weights + 4 * (((2 * (i / 2) * 2 + t / 2 * 2 + i % 2) * R + row) * 2 + t % 2);
        if constexpr (R == 8) {
            pq_store_shared_u32(word, pq_as_u32(__floats2half2_rn(p[i], p[i + 4])));
        } else {
            pq_store_shared_u16(word + (softmax_lane<R>::first(lane) ? 0 : 2), __half_as_ushort(__float2half_rn(p[i])));
        }
    }
}

// o += weights * y. unit(j): the lane's codes of slot j; with S half of the slots, asked for in the order j, j + S, j + 1, j + 1 + S, ... R = 1: o[pairs of half2][{half2, element}];
// otherwise o[two rows][half2], {element, row} of {0, 0}, {0, 1}, {1, 0}, {1, 1}.
template <int TYPE, uint32_t TABLE, int R, int N_O, class UNIT>
PQ_DEVICE void values_128(float (&o)[N_O][4], UNIT unit, const v_lane & vl, uint32_t p, uint32_t weights /* shared address */, int lane) {
    constexpr int S = v_lanes<TYPE, R>::SLOTS / 2, N = v_lanes<TYPE, R>::HALF2;
    const int g = lane / 4, t = lane % 4;
    if constexpr (R == 1) {
        const uint32_t pick_lo = g == 2 * t ? 0x4410 : g == 2 * t + 1 ? 0x1044 : 0x4444;
        const uint32_t pick_hi = g == 2 * t ? 0x4432 : g == 2 * t + 1 ? 0x3244 : 0x4444;
        const int      cell    = N == 4 ? t / 2 : t % 2 + t / 2 * 4; // the lane's of slot 0
#pragma unroll
        for (int j = 0; j < S; j++) {
            uint32_t y[2][N];
            lookup_v<TYPE, R, TABLE>(y[0], unit(j),     vl);
            lookup_v<TYPE, R, TABLE>(y[1], unit(j + S), vl);
            const int      first = v_slot_cell<TYPE, R>(j); // the weight of cell c, below 16, is in lane 4 (c % 8) + c / 8
            const uint32_t pj = __shfl_sync(PQ_FULL_WARP, p, pq_opaque(4 * cell) + 4 * (first % 8) + first / 8);
            const uint32_t b0 = __byte_perm(pj, 0, pick_lo);
            const uint32_t b1 = __byte_perm(pj, 0, pick_hi);
#pragma unroll
            for (int i = 0; i < N / 2; i++) {
                pq_mma_m16n8k16(o[i], y[0][2 * i], y[0][2 * i + 1], y[1][2 * i], y[1][2 * i + 1], b0, b1);
            }
        }
    } else {
#pragma unroll
        for (int j = 0; j < S; j += 2) {
            uint32_t y[4][N];
            lookup_v<TYPE, R, TABLE>(y[0], unit(j),         vl);
            lookup_v<TYPE, R, TABLE>(y[1], unit(j + S),     vl);
            lookup_v<TYPE, R, TABLE>(y[2], unit(j + 1),     vl);
            lookup_v<TYPE, R, TABLE>(y[3], unit(j + 1 + S), vl);
            uint2 b[R / 2];
#pragma unroll
            for (int r = 0; r < R / 2; r++) {
                b[r] = pq_shared_u64(weights + 8 * (j * R + 2 * r));
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

PQ_DEVICE float2 add_from(float2 own, float2 sent, int lane_mask) { // what the lane there sent
    return make_float2(own.x + __shfl_xor_sync(PQ_FULL_WARP, sent.x, lane_mask), own.y + __shfl_xor_sync(PQ_FULL_WARP, sent.y, lane_mask));
}

// The sums of a row over all cells of the warp. Lanes with the same elements of different cells share them out: a lane is left with two half2 of the head, at[0] and at[1].
// Where a lane's codes have an order of their own, what one keeps in a place comes from another place of the other.
template <int TYPE, int R, int N>
PQ_DEVICE void fold_cells(float2 (&x)[2], int (&at)[2], const float2 (&y)[N], int order, int lane) {
    static_assert(N == v_lanes<TYPE, R>::HALF2, "what lookups give");
    int cell, l;
    v_lane_place<TYPE, R>(lane, &cell, &l);
    if constexpr (TYPE != PQ_TYPE_PQ3) {
        x[0] = add_from(y[0], y[2], 2);
        x[1] = add_from(y[1], y[3], 2);
        at[0] = v_half2<TYPE, R>(0, l, order);
        at[1] = v_half2<TYPE, R>(1, l, order);
    } else {
        float2 z[3]; // of two cells: one of their own codes, and both of a shared one
        if constexpr (N == 8) { // four cells: first those side by side
            z[0] = add_from(add_from(y[0], y[1], 1), add_from(y[2], y[3], 1), 18);
            z[1] = add_from(y[4], y[6], 1);
            z[2] = add_from(y[5], y[7], 1);
        } else {
            z[0] = add_from(y[0], y[1], 18);
            z[1] = y[2];
            z[2] = y[3];
        }
        const bool second = N == 8 ? cell / 2 : cell;
        x[0] = z[0];
        x[1] = add_from(second ? z[2] : z[1], second ? z[1] : z[2], 18);
        at[0] = v_half2<TYPE, R>(0, l, order);
        at[1] = v_half2<TYPE, R>(N / 2 + second, l, order);
    }
}

// ---- products of rows with the queries ----

// Queries of up to 8 rows, scaled, as A of a product: rows 0..7 are halves, rows 8..15 what rounding took off, so that sums are those of floats.
// The k of the matrices are put to use in the order of memory: half2 j of the lane at step i are elements 32 i + 8 t + 2 j, 2 j + 1.
struct query_rows {
    uint32_t hi[16], lo[16]; // [4 i + j]
};

PQ_DEVICE void split_half2(uint32_t & hi, uint32_t & lo, float x, float y) {
    const __half2 h = __floats2half2_rn(x, y);
    const float2  f = __half22float2(h);
    hi = pq_as_u32(h);
    lo = pq_as_u32(__floats2half2_rn(x - f.x, y - f.y));
}

// They lie in shared memory as lanes take them: row g, quarter t at (4 g + t) * Q_SPLIT_STRIDE, hi then lo.
PQ_DEVICE void store_query(uint32_t * split, int row, const float4 & x /* elements 4 lane, ... of the row, scaled */, int lane) {
    uint32_t * to = split + (4 * row + lane % 8 / 2) * Q_SPLIT_STRIDE + 2 * (lane / 8 * 2 + lane % 2);
    uint2 hi, lo;
    split_half2(hi.x, lo.x, x.x, x.y);
    split_half2(hi.y, lo.y, x.z, x.w);
    *(uint2 *) to        = hi;
    *(uint2 *) (to + 16) = lo;
}

template <int R>
PQ_DEVICE void load_queries(query_rows & q, const uint32_t * split, int lane) {
    const uint4 * from = (const uint4 *) (split + min(lane, 4 * R - 1) * Q_SPLIT_STRIDE); // rows past the last repeat it
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint4 hi = from[i], lo = from[4 + i];
        q.hi[4 * i] = hi.x; q.hi[4 * i + 1] = hi.y; q.hi[4 * i + 2] = hi.z; q.hi[4 * i + 3] = hi.w;
        q.lo[4 * i] = lo.x; q.lo[4 * i + 1] = lo.y; q.lo[4 * i + 2] = lo.z; q.lo[4 * i + 3] = lo.w;
    }
}

// Products of the queries with 8 rows of halves: x, y are those of query g with rows 2t and 2t + 1. b: pieces 4 i + t of row g.
PQ_DEVICE void dot_rows(float & x, float & y, const query_rows & q, const uint4 (&b)[4]) {
    float c[2][4] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) { // two chains: a product waits for the one before it
        pq_mma_m16n8k16(c[0], q.hi[4 * i],     q.lo[4 * i],     q.hi[4 * i + 1], q.lo[4 * i + 1], b[i].x, b[i].y);
        pq_mma_m16n8k16(c[1], q.hi[4 * i + 2], q.lo[4 * i + 2], q.hi[4 * i + 3], q.lo[4 * i + 3], b[i].z, b[i].w);
    }
    x = c[0][0] + c[0][2] + (c[1][0] + c[1][2]);
    y = c[0][1] + c[0][3] + (c[1][1] + c[1][3]);
}

PQ_DEVICE void load_T_inv(uint4 (&b)[4], const side_args & k, const uint8_t * block, int j, int lane) {
    const uint4 * row = (const uint4 *) (block + k.T_inv + (j + lane / 4) * 256) + lane % 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        b[i] = __ldg(row + 4 * i);
    }
}

// q' of the rows to q_map, half [R][Q_STRIDE]. All warps of the block call it.
template <int KT, int R, int NW>
PQ_DEVICE void map_queries_128(__half * q_map, const query_rows & q, const side_args & k, const uint8_t * block, uint4 (&b)[4] /* of the warp's first 8 rows */,
                               int warp, int lane) {
    const int g = lane / 4, t = lane % 4;
    if (k.T_inv != 0) {
#pragma unroll
        for (int i = 0; i < (16 + NW - 1) / NW; i++) {
            const int j = 8 * (warp + i * NW);
            if (i > 0) {
                if (j >= 128) {
                    break;
                }
                load_T_inv(b, k, block, j, lane);
            }
            float x, y;
            dot_rows(x, y, q, b);
            if (g < R) {
                *(__half2 *) (q_map + g * Q_STRIDE + query_element<KT>(j + 2 * t)) = __floats2half2_rn(x, y);
            }
        }
    } else if (warp == 0 && g < R) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            *(uint2 *) (q_map + g * Q_STRIDE + query_element<KT>(32 * i + 8 * t))     = make_uint2(q.hi[4 * i],     q.hi[4 * i + 1]);
            *(uint2 *) (q_map + g * Q_STRIDE + query_element<KT>(32 * i + 8 * t + 4)) = make_uint2(q.hi[4 * i + 2], q.hi[4 * i + 3]);
        }
    }
}

// ---- positions ----

// The 64 turns of a token to shared memory. A warp calls it.
PQ_DEVICE void put_turns(float2 * turns, const pq_cuda_rope & rope, int token, int lane) {
    const int32_t pos = rope.pos[token];
#pragma unroll 1
    for (int i = lane; i < 64; i += PQ_WARP) {
        turns[i] = pq_rope_turn(rope, pos, i);
    }
}

// Elements 4 lane, ... of a row, turned.
PQ_DEVICE float4 turn_row(const float4 & x, const float2 * turns, bool neox, int lane) {
    if (!neox) {
        const float4 t = ((const float4 *) turns)[lane]; // of two pairs
        const float2 a = make_float2(t.x, t.y), b = make_float2(t.z, t.w);
        return make_float4(pq_rope_low(a, x.x, x.y), pq_rope_high(a, x.x, x.y), pq_rope_low(b, x.z, x.w), pq_rope_high(b, x.z, x.w));
    }
    const float own[4] = { x.x, x.y, x.z, x.w };
    float y[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float  other = __shfl_xor_sync(PQ_FULL_WARP, own[i], 16);
        const float2 t     = turns[4 * (lane % 16) + i];
        y[i] = lane < 16 ? pq_rope_low(t, own[i], other) : pq_rope_high(t, other, own[i]);
    }
    return make_float4(y[0], y[1], y[2], y[3]);
}

// ---- the exact tail ----

// Writes the new rows to the tail as f16, K and V in turns. Blocks of the same slots write the same. turns: float2 [n_q][64]
PQ_DEVICE void write_tail_128(const args_128 & a, const float2 * turns, int stream, int head_kv, int64_t slot0, int64_t n_slots, int warp, int n_warps, int lane) {
#pragma unroll 1
    for (int i = warp; i < 2 * a.n_new; i += n_warps) {
        const pq_encode_params & p = a.new_rows.side[i & 1].p;
        const int64_t slot = p.tail_idx[i / 2];
        float4        x    = *((const float4 *) ((const uint8_t *) p.x + i / 2 * p.x_row_stride + head_kv * p.x_head_stride) + lane);
        const int64_t here = slot - a.slot_base - stream * a.slots_per_stream - slot0;
        if (here >= 0 && here < n_slots) { // so it is a token of this stream
            if (a.rope.k && i % 2 == 0) {
                x = turn_row(x, turns + (i / 2 - stream * (int) a.p.n_q) * 64, a.rope.neox, lane);
            }
            union { __half2 h[2]; uint2 u; } y;
            y.h[0] = __floats2half2_rn(x.x, x.y);
            y.h[1] = __floats2half2_rn(x.z, x.w);
            *((uint2 *) (p.tail + slot * p.tail_row_stride + head_kv * 256) + lane) = y.u;
        }
    }
}

PQ_DEVICE uint32_t seen_cells(const uint4 & mask /* of 8 cells */) { // not 0: some cell is seen
    return (mask.x ^ 0xfc00fc00u) | (mask.y ^ 0xfc00fc00u) | (mask.z ^ 0xfc00fc00u) | (mask.w ^ 0xfc00fc00u);
}

// Whether somebody sees one of n cells, N of them most of the time. by_16: masks lie at multiples of 16 bytes
template <int N>
PQ_DEVICE bool any_cell_seen(const uint8_t * mask, int64_t cell0, int n, bool by_16) {
    const uint8_t * m = mask + cell0 * 2;
    uint32_t seen = 0;
    if (by_16 && n == N) {
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
            seen |= seen_cells(__ldg((const uint4 *) m + i));
        }
    } else {
#pragma unroll 1
        for (int i = 0; i < n; i++) {
            seen |= ((const uint16_t *) m)[i] ^ 0xfc00u;
        }
    }
    return seen != 0;
}

// Whether any row of the block sees one of the n cells (slots of the tail) from i on.
template <int R, bool TAIL>
PQ_DEVICE bool any_seen(const args_128 & a, const row_info * rows, int64_t i, int n) {
    const uint8_t * before = nullptr;
#pragma unroll 1
    for (int r = 0; r < R; r++) {
        const uint8_t * mask = TAIL ? rows[r].tail_mask : rows[r].mask;
        if (mask == nullptr || (mask != before && any_cell_seen<TAIL ? TAIL_STEP : TILE_128>(mask, i, n, TAIL ? a.tail_mask_by_16 : a.mask_by_16))) {
            return true;
        }
        before = mask;
    }
    return false;
}

// A warp's units (tiles of cells, or steps of slots) of 0 .. n - 1, first, first + stride, ..., without those that nobody sees. All lanes call it.
struct seen_units {
    int      first, stride, n, lane;
    int      round; // the 32 units from this one of the warp's on
    uint32_t live;  // those of them that are seen and not yet taken

    __device__ __forceinline__ seen_units(int first, int stride, int n, int lane) : first(first), stride(stride), n(n), lane(lane), round(-PQ_WARP), live(0) {}

    // seen(i): whether somebody sees unit i. Returns -1 at the end.
    template <class SEEN>
    __device__ __forceinline__ int next(SEEN seen) {
        while (live == 0) {
            round += PQ_WARP;
            if (first + round * stride >= n) {
                return -1;
            }
            const int i = first + (round + lane) * stride;
            live = __ballot_sync(PQ_FULL_WARP, i < n && seen(i));
        }
        const int i = __ffs(live) - 1;
        live &= live - 1;
        return first + (round + i) * stride;
    }
};

// Attention of R rows over a warp's share of the n_slots slots from slot0 on, in floats: `step` of `steps` is the first that somebody sees
// (seen_step says which are). Leaves the weighted sums in o [R][128], and m and the sum of weights in ml [R].
template <int R, class SEEN>
PQ_DEVICE void attend_tail_128(float * o, float2 * ml, const args_128 & a, const row_info * rows, const query_rows & q, int stream, int head_kv, int64_t slot0,
                               int n_slots, int step, seen_units & steps, SEEN seen_step, int lane) {
    const int g = lane / 4, t = lane % 4;
    const pq_attn_tail & tail = a.p.tail;
    const uint8_t  * k    = tail.k + stream * tail.k_stream_stride + head_kv * tail.k_head_stride + slot0 * tail.k_row_stride + 16 * t;
    const uint8_t  * v    = tail.v + stream * tail.v_stream_stride + head_kv * tail.v_head_stride + slot0 * tail.v_row_stride + 8 * lane;
    const uint16_t * mask = (const uint16_t *) rows[min(g, R - 1)].tail_mask + slot0;
    const float     slope = rows[min(g, R - 1)].slope;
    float acc[R][4] = {}, m = -CUDART_INF_F, sum = 0.0f;
    for (; step >= 0; step = steps.next(seen_step)) {
        const int s0 = step * TAIL_STEP;
        const uint8_t * k_row = k + min(s0 + g, n_slots - 1) * tail.k_row_stride;
        const uint4 b[4] = { pq_load_row_u128(k_row), pq_load_row_u128(k_row + 64), pq_load_row_u128(k_row + 128), pq_load_row_u128(k_row + 192) };
        uint2 y[TAIL_STEP];
#pragma unroll
        for (int i = 0; i < TAIL_STEP; i++) {
            y[i] = pq_load_row_u64(v + min(s0 + i, n_slots - 1) * tail.v_row_stride);
        }
        uint32_t bias[2], seen[2]; // of slots 2t and 2t + 1
#pragma unroll
        for (int i = 0; i < 2; i++) {
            bias[i] = g < R && s0 + 2 * t + i < n_slots ? pq_load_u16(mask + s0 + 2 * t + i) : 0xfc00;
            seen[i] = __ballot_sync(PQ_FULL_WARP, bias[i] != 0xfc00);
        }
        float s[2];
        dot_rows(s[0], s[1], q, b);
        float m_new = m;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (a.p.logit_softcap != 0.0f) {
                s[i] = a.cap_log2e * pq_tanh(s[i] * a.cap_inv);
            }
            s[i]  = bias[i] == 0xfc00 ? -CUDART_INF_F : fmaf(slope, __half2float(__ushort_as_half((unsigned short) bias[i])), s[i]);
            m_new = fmaxf(m_new, s[i]);
        }
        m_new = fmaxf(m_new, __shfl_xor_sync(PQ_FULL_WARP, m_new, 1));
        m_new = fmaxf(m_new, __shfl_xor_sync(PQ_FULL_WARP, m_new, 2));
        const float ref = m_new == -CUDART_INF_F ? 0.0f : m_new;
        const float f   = pq_exp2(m - ref);
        m    = m_new;
        s[0] = pq_exp2(s[0] - ref);
        s[1] = pq_exp2(s[1] - ref);
        sum  = fmaf(sum, f, s[0] + s[1]);
#pragma unroll
        for (int r = 0; r < R; r++) {
            const float fr = __shfl_sync(PQ_FULL_WARP, f, 4 * r);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                acc[r][e] *= fr;
            }
        }
#pragma unroll
        for (int i = 0; i < TAIL_STEP; i++) {
            // a slot that nobody sees may hold NaN
            const bool   any = seen[i % 2] & (0x11111111u << (i / 2));
            const float2 y0 = pq_half2_to_float2(any ? y[i].x : 0), y1 = pq_half2_to_float2(any ? y[i].y : 0);
#pragma unroll
            for (int r = 0; r < R; r++) {
                const float p = __shfl_sync(PQ_FULL_WARP, s[i % 2], 4 * r + i / 2);
                acc[r][0] = fmaf(p, y0.x, acc[r][0]);
                acc[r][1] = fmaf(p, y0.y, acc[r][1]);
                acc[r][2] = fmaf(p, y1.x, acc[r][2]);
                acc[r][3] = fmaf(p, y1.y, acc[r][3]);
            }
        }
    }
    sum += __shfl_xor_sync(PQ_FULL_WARP, sum, 1);
    sum += __shfl_xor_sync(PQ_FULL_WARP, sum, 2);
    if (t == 0 && g < R) {
        ml[g] = make_float2(m, sum);
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
        *(float4 *) (o + r * 128 + 4 * lane) = make_float4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
    }
}

// ---- codes ----

// Where codes of one side are, those of the block's head and of its part of the context, and where a warp has room for a tile of them.
struct tile_place {
    const uint8_t     * codes;      // as tile_cell() has them: tile_skip() bytes before the head's first one
    uint32_t            row_stride;
    bool                paired;
    const CUtensorMap * map;        // the same place by coordinates
    int                 x, cell, stream;
    uint32_t            tile;       // shared addresses
    uint32_t            barrier;    // a box is there; opened
};

// Codes come to a tile in one of two ways.
//
// As a box (from 9.0 on): one instruction copies a tile, and takes no more passes through shared memory than its bytes do. Copies by lanes take a pass for every line of
// memory that cells lie in, beside those of the lookups. But a cell of a box takes 4 to 5 cycles on its way, and pq4 with one row reads the most bytes in a given time: there
// K is faster by lanes (32 heads, 32768 cells on an H200, after a product: 47.2 us, both by lanes 48.3, both as boxes 50.0).
template <int TYPE, bool IS_V, int R>
__host__ __device__ constexpr bool comes_as_box() {
    return PQ_HAS_BULK_COPIES && !(TYPE == PQ_TYPE_PQ4 && !IS_V && R == 1);
}

template <int TYPE>
struct tile_box {
    const CUtensorMap * map;
    int                 x, cell, stream;
    uint32_t            tile, barrier;

    __device__ __forceinline__ tile_box(const tile_place & at, int lane)
        : map(at.map), x(at.x), cell((int) pq_keep((uint32_t) at.cell, lane)) /* or it is worked out again for every tile */, stream(at.stream), tile(at.tile), barrier(at.barrier) {}

    // Asks for tile i; -1: for none. The whole warp calls it.
    __device__ __forceinline__ void copy(int i, uint32_t /* row_stride */, int /* n_cell */, int /* lane */) const {
        if (i >= 0) {
            pq_bulk_copy_box(tile, map, x, cell + i * TILE_128, stream, TILE_128 * tile_cell(TYPE), barrier);
        }
    }

    template <int N_OTHERS>
    __device__ __forceinline__ void wait(uint32_t phase) const {
        pq_bulk_wait(barrier, phase);
    }
};

// By lanes: those side by side copy pieces of 16 bytes side by side.
template <int TYPE, bool TURNED>
struct tile_pieces {
    enum {
        N      = tile_cell(TYPE) / 16, // pieces of a cell
        ROWS   = PQ_WARP / N,          // cells of a copy
        BY_ROW = TYPE == PQ_TYPE_PQ4,  // a lane's place is kept. The other types have no registers for that, and work it out
    };
    const uint8_t * lane_codes;        // of the part's first cell, at the lane's piece; BY_ROW: of its first row
    uint32_t        lane_dst;
    bool            idle;              // pq3: the lane's piece is not of the cell

    __device__ __forceinline__ tile_pieces(const tile_place & at, int lane)
        : lane_codes(at.codes + (BY_ROW ? lane / N * at.row_stride : 0) + 16 * (lane % N)), lane_dst(at.tile + 16 * (TURNED ? lane ^ lane / (2 * N) % 4 : lane)),
          idle(TYPE == PQ_TYPE_PQ3 && !at.paired && lane % N == 3) {}

    // One group of copies per call, even an empty one: the waits count groups.
    __device__ __forceinline__ void copy(int i, uint32_t row_stride, int n_cell, int lane) const {
        if (i >= 0) {
            copy_tile(i, row_stride, n_cell, lane);
        }
        pq_copy_commit();
    }

    template <int N_OTHERS /* groups of the other side that were asked for later */>
    __device__ __forceinline__ void wait(uint32_t) const {
        pq_copy_wait<N_OTHERS>();
    }

    // Cells past the last one of the part are the last again.
    __device__ __forceinline__ void copy_tile(int i, uint32_t row_stride, int n_cell, int lane) const {
        if constexpr (BY_ROW) {
            const uint8_t * src = lane_codes + (int64_t) i * (TILE_128 * (uint64_t) row_stride);
            const int n = min(TILE_128, n_cell - i * TILE_128);
            if (n == TILE_128) {
#pragma unroll
                for (int j = 0; j < N; j++) {
                    pq_copy_async(lane_dst + 512 * j, src + (uint64_t) (j * ROWS) * row_stride);
                }
            } else {
#pragma unroll 1
                for (int j = 0; j < N; j++) {
                    const int row = pq_opaque(lane) / N; // or the places of all pieces would take registers
                    pq_copy_async(lane_dst + 512 * j, src + (int64_t) (min(j * ROWS + row, n - 1) - row) * row_stride);
                }
            }
        } else {
            // worked out anew and without a sign: `lane` behind pq_opaque() may be negative for all that the compiler knows, which takes it more instructions
            const uint32_t first = i * TILE_128 + (uint32_t) pq_opaque((int) (threadIdx.x % PQ_WARP)) / N;
#pragma unroll
            for (int j = 0; j < N; j++) {
                const uint8_t * src = pq_mad_wide(min(first + j * ROWS, (uint32_t) n_cell - 1), row_stride, lane_codes);
                pq_copy_async_if(!idle, lane_dst + 512 * j, src);
            }
        }
    }
};

template <int TYPE, bool IS_V, int R>
using tile_source = std::conditional_t<comes_as_box<TYPE, IS_V, R>(), tile_box<TYPE>, tile_pieces<TYPE, tile_turned(TYPE, IS_V, R)>>;

// ---- tables ----

// Asks for the lookup tables of a head. From 9.0 on one thread calls it, before that all do.
template <int KT, int VT, int NT>
PQ_DEVICE void ask_for_tables(const args_128 & a, int head_kv, uint8_t * smem, uint32_t barrier, int tid) {
    constexpr uint32_t K = table_bytes(KT, 16), V = table_bytes(VT, 16);
    const uint8_t * k = a.p.k.tables + (size_t) head_kv * K, * v = a.p.v.tables + (size_t) head_kv * V;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    pq_bulk_expect(barrier, K + V);
    pq_bulk_copy(PQ_SHARED_BASE,     k, K, barrier);
    pq_bulk_copy(PQ_SHARED_BASE + K, v, V, barrier);
#else
#pragma unroll 4
    for (int i = tid; i < (int) (K + V) / 16; i += NT) {
        ((uint4 *) smem)[i] = __ldg(i < (int) K / 16 ? (const uint4 *) k + i : (const uint4 *) v + (i - K / 16));
    }
#endif
}

// ---- the result ----

constexpr uint32_t V_MAP_BYTES = 128 * T_INV_STRIDE * sizeof(__half) + 128 * sizeof(float);

// V's T_inv, half [128][T_INV_STRIDE], and mu, float [128], on their way to shared memory.
template <int NT>
PQ_DEVICE void copy_v_map(uint32_t shared, const uint8_t * v_block, const side_args & v, int tid) {
#pragma unroll 1
    for (int i = tid; v.T_inv && i < 128 * 16; i += NT) {
        pq_copy_async(shared + i / 16 * (T_INV_STRIDE * 2) + i % 16 * 16, v_block + v.T_inv + i * 16);
    }
    if (tid < 32) {
        pq_copy_async(shared + 128 * T_INV_STRIDE * 2 + tid * 16, v_block + v.mu + tid * 16);
    }
    pq_copy_commit();
}

// A row of a part of the context, on its way to the block that merges the parts: m, the sum of its weights, and its elements in units of that sum.
constexpr int RECORD_128 = 4 + 128; // floats

// The weights of n parts of a row, and what they come to: {m, sum}. A warp calls it.
PQ_DEVICE void weigh_parts(const float * records, int n, float * weights, float * head, int lane) {
    auto header = [&](int part) { return __ldcg((const float2 *) (records + (size_t) part * RECORD_128)); };
    const float2 first = lane < n ? header(lane) : make_float2(-CUDART_INF_F, 0.0f); // most often there are no more
    float top = first.x, sum = 0.0f;
#pragma unroll 1
    for (int part = lane + PQ_WARP; part < n; part += PQ_WARP) {
        top = fmaxf(top, header(part).x);
    }
    top = pq_warp_max(top);
    const float ref = top == -CUDART_INF_F ? 0.0f : top;
#pragma unroll 1
    for (int part = lane; part < n; part += PQ_WARP) {
        const float2 h = part == lane ? first : header(part);
        const float  w = pq_exp2(h.x - ref) * h.y;
        weights[part] = w;
        sum += w;
    }
    sum = pq_warp_sum(sum);
    if (lane == 0) {
        *(float2 *) head = make_float2(top, sum);
    }
}

// A block of 32 elements as integers, one per lane, as ggml's kernel makes them, whose file is compiled with fast math.
PQ_DEVICE void write_q8_block(uint8_t * block, float x, int lane) {
    const float max = pq_warp_max(fabsf(x)), sum = pq_warp_sum(x), d = __fdividef(max, 127.0f);
    block[4 + lane] = (uint8_t) (int8_t) (max == 0.0f ? 0.0f : roundf(__fdividef(x, d)));
    if (lane == 0) {
        *(uint32_t *) block = pq_as_u32(__floats2half2_rn(d, sum));
    }
}

// The result once more as integers, if it is wanted so. rows_out: float [R][128]. All warps of the block call it.
template <int R, int NW>
PQ_DEVICE void write_q8_128(const args_128 & a, const row_info * rows, const float * rows_out, int warp, int lane) {
    if (a.dst_q8) {
        __syncthreads();
#pragma unroll 1
        for (int i = warp; i < 4 * R; i += NW) {
            if (rows[i / 4].valid) {
                const int64_t at = (const float *) rows[i / 4].dst - a.p.dst + i % 4 * 32; // of an element
                write_q8_block(a.dst_q8 + at / 32 * PQ_Q8_BLOCK_BYTES, rows_out[32 * i + lane], lane);
            }
        }
    }
}

// Merges the parts of the context, records [R][n_split] of which n_rows rows exist, and writes the rows. All threads of the block call it.
// work: float [R][MAX_SPLIT] + [NT][4], rows_out: float [R][128], head: float [R][4]
template <int R, int NT>
PQ_DEVICE void merge_parts_128(const args_128 & a, const row_info * rows, const float * records, int n_rows, float * head, float * work, float * rows_out) {
    constexpr int COLS   = R * 128 / 4;                   // of four floats
    constexpr int GROUPS = NT / COLS;                     // of threads that share the parts
    constexpr int AHEAD  = 8;                             // parts of a thread on their way at a time
    static_assert(NT >= COLS, "all columns at once");
    const int tid = threadIdx.x, lane = tid % PQ_WARP, warp = tid / PQ_WARP;
    float  * weights = work;                              // [R][n_split]
    float4 * partial = (float4 *) (work + R * MAX_SPLIT); // [GROUPS][COLS]
    const int group = tid / COLS, c = tid % COLS, r = c / 32;
    const bool here = group < GROUPS && r < n_rows;
    const float4 * from = (const float4 *) (records + (size_t) r * a.n_split * RECORD_128 + 4) + c % 32;
    float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
    for (int part0 = 0; part0 < a.n_split; part0 += AHEAD * GROUPS) {
        float4 y[AHEAD];
#pragma unroll
        for (int e = 0; e < AHEAD; e++) {
            const int part = part0 + group + e * GROUPS;
            y[e] = here && part < a.n_split ? __ldcg(from + part * (RECORD_128 / 4)) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
        if (part0 == 0) { // while they are on their way
            if (warp < R) {
                weigh_parts(records + (size_t) warp * a.n_split * RECORD_128, warp < n_rows ? a.n_split : 0, weights + warp * a.n_split, head + 4 * warp, lane);
            }
            __syncthreads();
        }
#pragma unroll
        for (int e = 0; e < AHEAD; e++) {
            const float w = here ? weights[r * a.n_split + min(part0 + group + e * GROUPS, a.n_split - 1)] : 0.0f;
            x.x = fmaf(w, y[e].x, x.x);
            x.y = fmaf(w, y[e].y, x.y);
            x.z = fmaf(w, y[e].z, x.z);
            x.w = fmaf(w, y[e].w, x.w);
        }
    }
    if (group < GROUPS) {
        partial[group * COLS + c] = x;
    }
    __syncthreads();
    if (tid < COLS && rows[r].valid) {
        const float f = result_scale(a, rows[r], head[4 * r], head[4 * r + 1]);
        x = partial[c];
#pragma unroll
        for (int k = 1; k < GROUPS; k++) {
            const float4 y = partial[k * COLS + c];
            x = make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
        }
        x = make_float4(x.x * f, x.y * f, x.z * f, x.w * f);
        ((float4 *) rows[r].dst)[c % 32]      = x;
        ((float4 *) rows_out)[c] = x;
    }
    write_q8_128<R, NT / PQ_WARP>(a, rows, rows_out, warp, lane);
}

// The rows of a block, in units of what they were scaled by. sums: float [2][R][128], of the coded part and of the tail; split: half [2][R][Q_STRIDE], those of the
// coded part, then what rounding took off (units of the whole: the weight of the coded part makes its elements as small as centroids, so that two halves hold a
// float). weights: of the coded part of each row, scaled too. v_map: see copy_v_map. store(r, j, x, y): takes elements j and j + 1 of a row
template <int R, int NW, class STORE>
PQ_DEVICE void map_rows_128(const args_128 & a, const float * sums, const __half * split, const float * weights, const __half * v_map, int warp, int lane, STORE store) {
    const int g = lane / 4, t = lane % 4, r = min(g, R - 1);
    bool any_coded = false;
#pragma unroll
    for (int i = 0; i < R; i++) {
        any_coded = any_coded || weights[i] != 0.0f;
    }
    const float coded = weights[r];
    const float * x = sums + r * 128, * x_tail = sums + (R + r) * 128, * mu = (const float *) (v_map + 128 * T_INV_STRIDE);
    const bool map = any_coded && a.v.T_inv != 0;
    // rows 0..7 of A are halves, rows 8..15 what rounding took off; the lane's row of a matrix load
    const __half * a_row = split + (lane / 8 % 2 * R + min(lane % 8, R - 1)) * Q_STRIDE + lane / 16 * 8;
#pragma unroll
    for (int i = 0; i < (16 + NW - 1) / NW; i++) {
        const int j = 8 * (warp + i * NW);
        if (j >= 128) {
            break;
        }
        float y0, y1;
        if (map) {
            float c[2][4] = {};
#pragma unroll
            for (int k = 0; k < 128; k += 32) {
                uint32_t b[4];
                pq_ldmatrix_trans(b, v_map + (k + lane) * T_INV_STRIDE + j);
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    uint32_t u[4];
                    pq_ldmatrix(u, a_row + k + 16 * h);
                    pq_mma_m16n8k16(c[h], u[0], u[1], u[2], u[3], b[2 * h], b[2 * h + 1]);
                }
            }
            y0 = c[0][0] + c[0][2] + (c[1][0] + c[1][2]);
            y1 = c[0][1] + c[0][3] + (c[1][1] + c[1][3]);
        } else {
            y0 = x[j + 2 * t];
            y1 = x[j + 2 * t + 1];
        }
        if (any_coded) {
            y0 = fmaf(mu[j + 2 * t],     coded, y0);
            y1 = fmaf(mu[j + 2 * t + 1], coded, y1);
        }
        y0 += x_tail[j + 2 * t];
        y1 += x_tail[j + 2 * t + 1];
        if (g < R) {
            store(r, j + 2 * t, y0, y1);
        }
    }
}

// ---- encoding ----

// One function per type, called and not inlined: the registers of the attention loop are counted.
template <int TYPE>
__device__ __noinline__ int encode_units_of(const args_128 & a, pq_encode_group_smem & s, int unit, int n_units, int stride) {
    return pq_encode_group<TYPE>(a.rope.k ? &a.rope : nullptr, a.units, unit, n_units, stride, s);
}

// A group encodes every stride-th unit below n_units.
template <int KT, int VT>
__device__ __forceinline__ void encode_units(const args_128 & a, pq_encode_group_smem & s, int unit, int n_units, int stride) {
    if (unit < n_units) {
        pq_encode_group_begin(a.new_rows, s);
    }
    while (unit < n_units) {
        if (KT == VT || pq_encode_unit(unit, a.units).side == 0) {
            unit = encode_units_of<KT>(a, s, unit, n_units, stride);
        } else {
            unit = encode_units_of<VT>(a, s, unit, n_units, stride);
        }
    }
}

// Brings to L2 what the last units need, those that blocks with attention will encode: every block a part of it.
PQ_DEVICE void prefetch_last_units(const args_128 & a, int tid) {
#pragma unroll 1
    for (int unit = a.n_apart + blockIdx.x; unit < a.units.n; unit += a.n_attn_blocks) {
        const pq_encode_unit u(unit, a.units);
        if (tid < PQ_ENCODE_FEW_THREADS) {
            pq_encode_prefetch(a.new_rows.side[u.side], u, tid);
        }
    }
}

// ---- the kernel ----

// The parameters of a launch come from memory, a line of them when it is first read. So that the lines come together and not one after the other, each warp
// begins with a word of another line. What it returns has to be used, or it is not read.
template <int NW>
PQ_DEVICE uint32_t touch_params(const args_128 & a, int warp) {
    constexpr int LINE = 64, N_LINES = (sizeof(args_128) + LINE - 1) / LINE;
    uint32_t x = 0;
#pragma unroll
    for (int i = 0; i < N_LINES; i += NW) {
        x ^= ((const uint32_t *) &a)[min(i + warp, N_LINES - 1) * (LINE / (int) sizeof(uint32_t))];
    }
    return x;
}

template <int KT /* type of K */, int VT /* of V */, int R /* rows */>
__global__ void __launch_bounds__(n_threads_128(R), 1) attn_128_kernel(const __grid_constant__ args_128 a, const __grid_constant__ code_maps maps) {
    static_assert(KT >= 0 && KT < PQ_TYPE_COUNT && VT >= 0 && VT < PQ_TYPE_COUNT, "both sides hold codes");
    constexpr int NT  = n_threads_128(R);
    constexpr int NW  = NT / PQ_WARP;
    constexpr int L   = 16;
    constexpr int D   = 128;
    constexpr int N_Q = R == 1 ? query_words<KT>() : 32;
    constexpr int N_O = R == 1 ? v_lanes<VT, R>::HALF2 / 2 : 2 * R;
    constexpr int N_S = softmax_lane<R>::N;
    constexpr int N_GROUP_ENCODE = NT / PQ_ENCODE_FEW_THREADS;
    static_assert(NT % PQ_ENCODE_FEW_THREADS == 0, "every thread is of a group");
    constexpr uint32_t V_TABLE = table_bytes(KT, L);
    constexpr uint32_t K_BYTES = TILE_128 * tile_cell(KT), V_BYTES = TILE_128 * tile_cell(VT);

    extern __shared__ __align__(16) uint8_t smem[];
    row_info * rows    = (row_info *) (smem + a.smem_rows);
    __half   * q_map   = (__half *)   (smem + a.smem_qt);       // [R][Q_STRIDE], afterwards the sums of the coded part as halves, see map_rows_128
    float2   * ml      = (float2 *)   (smem + a.smem_merge_ml); // {m, sum of weights} [NW][R]
    float2   * tail_ml = ml + NW * R;                           // the same of the tail [n_tail_warps][R]
    float    * head    = (float *) (tail_ml + NW * R);          // [R][4]: m, weight of the coded part, weight of the tail; then how many parts came before
    float    * coded_weights = head + 4 * R + 4;                // [R]: in units of the whole
    float    * sums    = (float *)    (smem + a.smem_sums);     // [2][R][128]: coded, tail
    uint32_t * q_split = (uint32_t *) sums;                     // [4 R][Q_SPLIT_STRIDE], before there are sums
    float    * tail_o  = (float *)    (smem + a.smem_tail);     // [n_tail_warps][R][128]
    float2   * turns   = (float2 *) tail_o;                     // [n_q][64]: of the stream's tokens, before the tail is attended to

    const int tid = threadIdx.x, lane = tid % PQ_WARP;
    const int warp = __shfl_sync(PQ_FULL_WARP, tid / PQ_WARP, 0); // so that the compiler knows it to be the same in all lanes
    const uint32_t touched = touch_params<NW>(a, warp);
    const int g = lane / 4, t = lane % 4;
    pq_encode_group_smem & encode_smem = ((pq_encode_group_smem *) smem)[tid / PQ_ENCODE_FEW_THREADS];

    if ((uint32_t) __cvta_generic_to_shared(smem) != PQ_SHARED_BASE) {
        __trap(); // see PQ_SHARED_BASE
    }
    if ((int) blockIdx.x >= a.n_attn_blocks) {
        pq_pdl_launch_next();
        const int n_blocks = gridDim.x - a.n_attn_blocks; // a second group of a block begins where every block has a first one
        encode_units<KT, VT>(a, encode_smem, blockIdx.x - a.n_attn_blocks + tid / PQ_ENCODE_FEW_THREADS * n_blocks, a.n_apart, n_blocks * N_GROUP_ENCODE);
        return;
    }
    uint32_t b = blockIdx.x; // heads of one part of the context side by side: together they read whole rows of the cache
    const int row_group = a.by_row_groups.split(b);
    const int head_kv   = a.by_heads.split(b);
    const int split     = a.by_parts.split(b);
    const int stream    = (int) b;
    const int row0      = row_group * R;
    const int64_t kv0     = min(split * a.cells_per_split, a.p.n_kv);
    const int     n_cell  = (int) ((split == a.n_split - 1 ? a.p.n_kv : min(kv0 + a.cells_per_split, a.p.n_kv)) - kv0);
    const int     n_tile  = (n_cell + TILE_128 - 1) / TILE_128;
    const int64_t slot0   = min(split * a.slots_per_split, a.p.tail.n);
    const int     n_slots = (int) (min(slot0 + a.slots_per_split, a.p.tail.n) - slot0);
    const uint8_t * k_block = a.p.k.codebook + head_kv * a.k.head_bytes;
    const uint8_t * v_block = a.p.v.codebook + head_kv * a.v.head_bytes;

    const uint32_t tables_here = PQ_SHARED_BASE + a.smem_barriers, k_here = tables_here + 8 + 16 * warp, v_here = k_here + 8; // K, V of the warp's tile
    constexpr bool ONE_ASKS = PQ_HAS_BULK_COPIES;
    const bool asks = ONE_ASKS ? tid == PQ_WARP : true; // not a thread of the first warp, which has the rows to see to
    if (ONE_ASKS && asks) {
        pq_bulk_open(tables_here);
        if (comes_as_box<KT, false, R>() && n_tile > 0) { // without cells there is no map
            pq_prefetch_map(&maps.k);
        }
        if (comes_as_box<VT, true, R>() && n_tile > 0) {
            pq_prefetch_map(&maps.v);
        }
    }
    if (a.early_tables && asks) {
        ask_for_tables<KT, VT, NT>(a, head_kv, smem, tables_here, tid);
    }
    if (!a.settled) {
        pq_pdl_wait();
    }
    // The warp's tiles are first, first + NW, ... Warps that attend to the tail come last in every round.
    const int nw_tail   = n_slots > 0 ? min(a.n_tail_warps, (n_slots + TAIL_STEP - 1) / TAIL_STEP) : 0;
    const int warp_tile = warp < nw_tail ? NW - nw_tail + warp : warp - nw_tail;
    // Where all rows have one mask, the lane's first tile and step of the tail are looked at ahead of everything else that there is to do before copies can begin.
    const int  lane_tile  = warp_tile + lane * NW, lane_step = warp + lane * nw_tail;
    const bool early_tile = a.one_mask && (lane_tile + 1) * TILE_128 <= n_cell;
    const bool early_step = a.one_tail_mask && warp < nw_tail && (lane_step + 1) * TAIL_STEP <= n_slots;
    uint4 tile_mask[TILE_128 / 8] = {}, step_mask = {};
    if (early_tile) {
        uint32_t of_stream = (uint32_t) stream;
        const uint8_t * mask = a.p.mask + a.by_stream_mask.split(of_stream) * a.p.mask_stream_stride + (kv0 + (int64_t) lane_tile * TILE_128) * 2;
#pragma unroll
        for (int i = 0; i < TILE_128 / 8; i++) {
            tile_mask[i] = pq_load_u128(mask + 16 * i); // which stays here: __ldg may be moved to where it is used
        }
    }
    if (early_step) {
        step_mask = pq_load_u128(a.p.tail.mask + stream * a.p.tail.mask_stream_stride + (slot0 + lane_step * TAIL_STEP) * 2);
    }
    // Warps from the last one on see to the tokens: first ones have the tail.
    const int q_tok = NW - 1 - warp;
    if ((a.rope.q || a.rope.k) && q_tok < (int) a.p.n_q) {
        put_turns(turns + q_tok * 64, a.rope, stream * (int) a.p.n_q + q_tok, lane);
    }
    const uint8_t * k_codes = a.p.k.data + stream * a.p.k.stream_stride + head_kv * a.p.k.head_stride + kv0 * a.p.k.row_stride;
    const uint8_t * v_codes = a.p.v.data + stream * a.p.v.stream_stride + head_kv * a.p.v.head_stride + kv0 * a.p.v.row_stride;
    if (tid < R) {
        rows[tid] = get_row(a, stream, head_kv, row0 + tid);
    }
    if (a.early_tables) { // the inverse maps to L2, by all blocks of a head together
        const int n_lines = D * D * 2 / 128, part = NT * split + tid;
        for (int i = part; i < n_lines; i += NT * a.n_split) {
            if (a.k.T_inv) {
                pq_prefetch_l2(k_block + a.k.T_inv + i * 128);
            }
            if (a.v.T_inv) {
                pq_prefetch_l2(v_block + a.v.T_inv + i * 128);
            }
        }
    }
    if (a.settled) { // masks of the part
        for (int tok = (warp + NW / 2) % NW; tok < (int) a.p.n_q; tok += NW) {
            uint32_t of_stream = (uint32_t) stream;
            const uint8_t * mask = a.p.mask + a.by_stream_mask.split(of_stream) * a.p.mask_stream_stride + tok * a.p.mask_token_stride + kv0 * 2;
            const uint8_t * tail_mask = a.p.tail.mask + stream * a.p.tail.mask_stream_stride + tok * a.p.tail.mask_token_stride + slot0 * 2;
            for (int i = lane; a.p.mask && i * 64 < n_cell; i += PQ_WARP) {
                pq_prefetch_l2(mask + i * 128);
            }
            if (lane * 64 < n_slots) {
                pq_prefetch_l2(tail_mask + lane * 128);
            }
        }
    }
    if (R > 1) { // weights of a tile per warp, then as many zeros for the lanes of B that are off its diagonal
        uint32_t * weights = (uint32_t *) (smem + a.smem_weights);
        for (int i = tid; i < 16 * R + 4; i += NT) {
            weights[NW * 16 * R + i] = 0;
        }
    }
    if (lane == 0) {
        ((uint32_t *) ml)[warp] = touched; // nobody reads it
    }
    __syncthreads(); // the rows, and turns

    auto cells_of  = [&](int tile) { return min(TILE_128, n_cell - tile * TILE_128); };
    auto seen_tile = [&](int tile) { return any_seen<R, false>(a, rows, kv0 + (int64_t) tile * TILE_128, cells_of(tile)); };
    auto seen_step = [&](int step) { return any_seen<R, true>(a, rows, slot0 + step * TAIL_STEP, min(TAIL_STEP, n_slots - step * TAIL_STEP)); };
    seen_units tiles(warp_tile, NW, n_tile, lane);
    seen_units steps(warp, nw_tail, warp < nw_tail ? (n_slots + TAIL_STEP - 1) / TAIL_STEP : 0, lane);
    const uint32_t k_tile = PQ_SHARED_BASE + a.smem_codes + warp * (K_BYTES + V_BYTES), v_tile = k_tile + K_BYTES;
    const uint32_t k_skip = tile_skip<KT>(k_codes, a.k_paired), v_skip = tile_skip<VT>(v_codes, a.v_paired);
    const tile_place k_place_at = { k_codes - k_skip, (uint32_t) a.p.k.row_stride, a.k_paired != 0, &maps.k, head_kv * (int) a.p.k.head_stride - (int) k_skip, (int) kv0, stream, k_tile, k_here };
    const tile_place v_place_at = { v_codes - v_skip, (uint32_t) a.p.v.row_stride, a.v_paired != 0, &maps.v, head_kv * (int) a.p.v.head_stride - (int) v_skip, (int) kv0, stream, v_tile, v_here };
    const tile_source<KT, false, R> k_source(k_place_at, lane);
    const tile_source<VT, true, R>  v_source(v_place_at, lane);
    auto load_k = [&](int i) { k_source.copy(i, (uint32_t) a.p.k.row_stride, n_cell, lane); };
    auto load_v = [&](int i) { v_source.copy(i, (uint32_t) a.p.v.row_stride, n_cell, lane); };
    constexpr bool K_BOX = comes_as_box<KT, false, R>(), V_BOX = comes_as_box<VT, true, R>();
    constexpr int  N_OTHERS = !K_BOX && !V_BOX; // groups of copies: each side asks for its next tile when it has read one
    if (lane == 0) {
        if (K_BOX) {
            pq_bulk_open(k_here);
        }
        if (V_BOX) {
            pq_bulk_open(v_here);
        }
    }
    __syncwarp();
    uint32_t tile_seen = 0;
    const uint32_t step_seen = seen_cells(step_mask);
#pragma unroll
    for (int i = 0; i < TILE_128 / 8; i++) {
        tile_seen |= seen_cells(tile_mask[i]);
    }
    const int first_tile = tiles.next([&](int tile) { return early_tile && tile == lane_tile ? tile_seen != 0 : seen_tile(tile); });
    const int first_step = steps.next([&](int step) { return early_step && step == lane_step ? step_seen != 0 : seen_step(step); });
    load_k(first_tile);
    load_v(first_tile);
    if (first_step >= 0) { // the first rows of the tail to L2, two lines each of K and V
        const int64_t slot = slot0 + min(first_step * TAIL_STEP + lane / 4, n_slots - 1);
        const uint8_t * tail_row = lane % 4 < 2 ? a.p.tail.k + stream * a.p.tail.k_stream_stride + head_kv * a.p.tail.k_head_stride + slot * a.p.tail.k_row_stride
                                                : a.p.tail.v + stream * a.p.tail.v_stream_stride + head_kv * a.p.tail.v_head_stride + slot * a.p.tail.v_row_stride;
        pq_prefetch_l2(tail_row + lane % 2 * 128);
    }
    bool any_tile = a.early_tables;
    if (!any_tile) {
        any_tile = __syncthreads_or(first_tile >= 0);
        if (any_tile && asks) {
            ask_for_tables<KT, VT, NT>(a, head_kv, smem, tables_here, tid);
        }
    }
    const int q_row = warp - (NW - R); // the query that the warp loads, 0 .. R - 1: the first warps have the tail to see to
    uint4  t_inv[4] = {};
    float4 mu = {};
    if (any_tile) {
        if (a.k.T_inv) {
            load_T_inv(t_inv, a.k, k_block, 8 * warp, lane);
        }
        if (q_row >= 0) {
            mu = __ldg((const float4 *) (k_block + a.k.mu) + lane);
        }
    }
    if (a.settled) {
        pq_pdl_wait();
    }

    // Everything that the block still has to wait for is asked for at once.
    if (q_row >= 0) {
        // not through __ldg, which the compiler may move ahead of the wait for the kernel that makes the queries
        const uint4 u = row0 + q_row < a.n_rows ? pq_load_row_u128(rows[q_row].q + 16 * lane) : make_uint4(0, 0, 0, 0);
        float4 x = make_float4(__uint_as_float(u.x), __uint_as_float(u.y), __uint_as_float(u.z), __uint_as_float(u.w));
        if (a.rope.q) { // rows are [n_q][n_group]
            uint32_t token = (uint32_t) min(row0 + q_row, a.n_rows - 1);
            a.by_group.split(token);
            x = turn_row(x, turns + token * 64, a.rope.neox, lane);
        }
        x = make_float4(x.x * a.q_scale, x.y * a.q_scale, x.z * a.q_scale, x.w * a.q_scale);
        store_query(q_split, q_row, x, lane);
        const float q_mu = pq_warp_sum(fmaf(x.x, mu.x, fmaf(x.y, mu.y, fmaf(x.z, mu.z, x.w * mu.w))));
        if (lane == 0) {
            rows[q_row].q_mu = q_mu;
        }
    }
    write_tail_128(a, turns, stream, head_kv, slot0, n_slots, (2 * NW - R - 1 - warp) % NW, NW, lane);

    __syncthreads(); // queries, and, before 9.0, tables
    query_rows qr;
    load_queries<R>(qr, q_split, lane);
    if (any_tile) {
        map_queries_128<KT, R, NW>(q_map, qr, a.k, k_block, t_inv, warp, lane);
    }
    __syncthreads(); // mapped queries, new rows
    if (warp < nw_tail) {
        attend_tail_128<R>(tail_o + warp * R * D, tail_ml + warp * R, a, rows, qr, stream, head_kv, slot0, n_slots, first_step, steps, seen_step, lane);
    }

    float o[N_O][4], m = -CUDART_INF_F, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < N_O; i++) {
        o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.0f;
    }
    const int row = softmax_lane<R>::row(lane); // the lane's row in the softmax
    int       v_order = 0;
    if (any_tile) {
        pq_bulk_wait(tables_here, 0);
        int       tile = first_tile;
        k_lane    kl = {};
        v_lane    vl = {};
        init_k_lane<KT>(kl, lane);
        init_v_lane<VT, R>(vl, a.v, lane);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            vl.low[i] = pq_keep(vl.low[i], lane);
        }
        if (VT == PQ_TYPE_PQ3) {
            vl.low2 = pq_keep(vl.low2, lane);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            vl.pick[i] = pq_keep(vl.pick[i], lane);
        }
        v_order = vl.order;
        uint32_t v_own, v_shared;
        v_place<VT, R>(lane, v_tile, v_skip, &v_own, &v_shared);
        if (VT == PQ_TYPE_PQ3 && R > 1) {
            v_shared = pq_keep(v_shared, lane); // or it is added up again for every code; with one row it is not
        }
        const uint32_t k_at = k_place<KT>(k_tile, k_skip, lane);

        uint32_t q[N_Q];
        const uint32_t * q_part = (const uint32_t *) q_map + 16 * t; // the lane's quarter, half2 of row 0
        if constexpr (R == 1) {
#pragma unroll
            for (int i = 0; i < query_words<KT>(); i++) {
                q[i] = q_part[query_half2<KT>(i, kl.g)];
            }
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int r, g_turn;
                    query_place<KT, R>(g + e % 2 * 8, &r, &g_turn);
                    const int step = 2 * i + e / 2;
                    q[4 * i + e] = q_part[r * (Q_STRIDE / 2) + (step ^ k_turn<KT>(g_turn, step))];
                }
            }
        }
        const float q_mu = rows[row].q_mu, slope = rows[row].slope;
        const uint16_t * my_mask = rows[row].mask ? (const uint16_t *) rows[row].mask + kv0 : nullptr;
        const uint32_t weights    = PQ_SHARED_BASE + a.smem_weights;
        const uint32_t my_weights = weights + 4 * warp * 16 * R;
        const uint32_t b_weights  = (g / 2 == t ? my_weights : weights + 4 * (NW * 16 * R + 4)) + 8 * (t / 2 * R + g % 2); // + 4: in other banks

        uint32_t mask[(N_S + 1) / 2]; // of a cell, or of two
        auto load_mask = [&](int i_tile) {
            const int n = cells_of(i_tile);
            const uint16_t * x = my_mask + i_tile * TILE_128;
            if (R > 1 && my_mask && a.mask_by_16 && n == TILE_128) { // the usual tile
                x += softmax_lane<R>::cell(lane, 0);
#pragma unroll
                for (int i = 0; i < N_S; i += 2) {
                    mask[i / 2] = pq_load_u32(x + 4 * i);
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
                    mask[i / 2] = pq_load_u16(x + cell);
                } else {
                    mask[i / 2] = pq_load_u16(x + cell) | (cell + 1 < n ? pq_load_u16(x + cell + 1) << 16 : 0xfc000000u);
                }
            }
        };
        if (tile >= 0) {
            load_mask(tile);
        }
        uint32_t phase = 0;
        while (tile >= 0) {
            const int next = tiles.next(seen_tile);
            k_source.template wait<N_OTHERS>(phase);
            __syncwarp();
            // The next tile is asked for when this one has been read. The order of a warp's reads and of its copies by lanes is that of the instructions; a box is asked for
            // when a later read has been waited for, as reads end in their order.
            uint32_t kw[R == 1 ? 4 : 1][k_words<KT>::N];
            if constexpr (R == 1) { // which has registers for the whole tile
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    read_k_words<KT>(kw[i], k_at, k_skip, i);
                }
                if (!K_BOX) {
                    __syncwarp();
                    load_k(next);
                }
            }
            auto k_words_of = [&](int g8, uint32_t (&w)[k_words<KT>::N]) {
                if constexpr (R == 1) {
#pragma unroll
                    for (int i = 0; i < k_words<KT>::N; i++) {
                        w[i] = kw[g8][i];
                    }
                    if (K_BOX && g8 == 1) { // lookups of group 0 have been made, with words that were read
                        __syncwarp();
                        load_k(next);
                    }
                } else {
                    read_k_words<KT>(w, k_at, k_skip, g8);
                    if (!K_BOX && g8 == 3) {
                        __syncwarp();
                        load_k(next);
                    }
                }
            };
            float s[N_S];
            scores_128<KT, R>(s, k_words_of, kl, q, lane);
            if (K_BOX && R > 1) {
                __syncwarp();
                load_k(next);
            }
            bool grows = false;
#pragma unroll
            for (int e = 0; e < N_S; e++) {
                float x = s[e] + q_mu;
                if (a.p.logit_softcap != 0.0f) {
                    x = a.cap_log2e * pq_tanh(x * a.cap_inv);
                }
                const uint32_t h = R > 1 && e % 2 ? mask[e / 2] >> 16 : mask[e / 2] & 0xffff;
                s[e]  = h == 0xfc00 ? -CUDART_INF_F : fmaf(slope, __half2float(__ushort_as_half((unsigned short) h)), x);
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
                    for (int e = 0; e < 4 * N_O; e++) {
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
            }
            v_source.template wait<N_OTHERS>(phase);
            __syncwarp();
            if (next >= 0) {
                load_mask(next);
            }
            auto v_unit_of = [&](int j) {
                const v_unit c = read_v_unit<VT, R>(v_own, v_shared, j);
                if (!V_BOX && j == v_lanes<VT, R>::SLOTS - 1) {
                    __syncwarp();
                    load_v(next);
                }
                return c;
            };
            values_128<VT, V_TABLE, R>(o, v_unit_of, vl, p, b_weights, lane);
            if (V_BOX) {
                __syncwarp();
                load_v(next);
            }
            tile = next;
            phase++;
        }
        // every lane has counted its own cells
        sum += __shfl_xor_sync(PQ_FULL_WARP, sum, 1);
        sum += __shfl_xor_sync(PQ_FULL_WARP, sum, 2);
        if (R <= 4) {
            sum += __shfl_xor_sync(PQ_FULL_WARP, sum, 16);
        }
        if (R == 1) {
            sum += __shfl_xor_sync(PQ_FULL_WARP, sum, 4);
            sum += __shfl_xor_sync(PQ_FULL_WARP, sum, 8);
        }
    }
    pq_copy_wait<0>();
    pq_pdl_launch_next();
    if (a.n_apart < a.units.n) {
        prefetch_last_units(a, tid);
    }
    if (t == 0 && g < R) {
        ml[warp * R + g] = make_float2(m, sum);
    }
    __syncthreads();

    // ---- merge the warps, and the tail ----
    float * merge = (float *) smem; // [NW][R][128], over the tables
    constexpr uint32_t V_MAP = NW * R * D * sizeof(float);
    const uint32_t v_map = PQ_SHARED_BASE + V_MAP;
    if (any_tile && warp >= R) {
        copy_v_map<NT - R * PQ_WARP>(v_map, v_block, a.v, tid - R * PQ_WARP);
    }
    if (warp < R) { // a warp per row, a lane per warp
        const float2 none  = make_float2(-CUDART_INF_F, 0.0f);
        const float2 coded = lane < NW      ? ml[lane * R + warp]      : none;
        const float2 tail  = lane < nw_tail ? tail_ml[lane * R + warp] : none;
        const float  top   = pq_warp_max(fmaxf(coded.x, tail.x));
        const float  ref   = top == -CUDART_INF_F ? 0.0f : top;
        const float  sum_coded = pq_warp_sum(coded.y * pq_exp2(coded.x - ref)), sum_tail = pq_warp_sum(tail.y * pq_exp2(tail.x - ref));
        if (lane == 0) {
            *(float4 *) (head + 4 * warp) = make_float4(top, sum_coded, sum_tail, 0.0f);
        }
        if (lane < nw_tail) {
            tail_ml[lane * R + warp].x = pq_exp2(tail.x - ref); // what the tail's sum of the warp counts for
        }
    }
    __syncthreads();
    if (any_tile) {
        float factor[R]; // before anything is stored, or each would wait for the row before it
#pragma unroll
        for (int r = 0; r < R; r++) {
            const float top = head[4 * r];
            factor[r] = pq_exp2(ml[warp * R + r].x - (top == -CUDART_INF_F ? 0.0f : top));
        }
#pragma unroll
        for (int r = 0; r < R; r++) {
            constexpr int N = v_lanes<VT, R>::HALF2;
            float2 y[N], x[2];
            int    at[2];
#pragma unroll
            for (int i = 0; i < N; i++) {
                y[i] = R == 1 ? make_float2(o[i / 2][i % 2 * 2], o[i / 2][i % 2 * 2 + 1]) : make_float2(o[r / 2 * 4 + i][r % 2], o[r / 2 * 4 + i][r % 2 + 2]);
            }
            fold_cells<VT, R>(x, at, y, v_order, lane);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                *(float2 *) (merge + (warp * R + r) * D + 2 * at[i]) = make_float2(x[i].x * factor[r], x[i].y * factor[r]);
            }
        }
    }
    __syncthreads();
    // in units of the whole: the result, or, of a part, the sum of its weights
    auto scale = [&](int r) {
        const float weight = head[4 * r + 1] + head[4 * r + 2];
        return a.n_split == 1 ? result_scale(a, rows[r], head[4 * r], weight) : weight == 0.0f ? 0.0f : 1.0f / weight;
    };
    for (int i = tid; i < R * D; i += NT) {
        const int   r = i / D;
        const float f = scale(r);
        float x = 0.0f, xt = 0.0f;
        if (any_tile) {
#pragma unroll 8
            for (int w = 0; w < NW; w++) {
                x += merge[w * R * D + i];
            }
        }
#pragma unroll 4
        for (int w = 0; w < nw_tail; w++) {
            xt = fmaf(tail_o[w * R * D + i], tail_ml[w * R + r].x, xt);
        }
        x *= f;
        sums[i]         = x;
        sums[R * D + i] = xt * f;
        const __half hi = __float2half_rn(x);
        q_map[r * Q_STRIDE + i % D]       = hi;
        q_map[(R + r) * Q_STRIDE + i % D] = __float2half_rn(x - __half2float(hi));
        if (i % D == 0) {
            coded_weights[r] = head[4 * r + 1] * f;
        }
    }
    pq_copy_wait<0>();
    __syncthreads();

    // ---- the result, or a part of it. The last block of the row group merges the parts ----
    const __half * v_map_here = (const __half *) (smem + V_MAP);
    int helper = blockIdx.x; // which one of the blocks that encode
    if (a.n_split == 1) {
        map_rows_128<R, NW>(a, sums, q_map, coded_weights, v_map_here, warp, lane,
            [&](int r, int j, float x, float y) {
                if (rows[r].valid) {
                    *(float2 *) ((float *) rows[r].dst + j) = make_float2(x, y);
                    *(float2 *) (merge + r * D + j)         = make_float2(x, y);
                }
            });
        write_q8_128<R, NW>(a, rows, merge, warp, lane);
    } else {
        const int group  = (stream * a.p.n_head_kv + head_kv) * a.n_row_groups + row_group;
        const int n_rows = min(R, a.n_rows - row0);
        float * records  = a.partials + (((size_t) stream * a.p.n_head_kv + head_kv) * a.n_rows + row0) * a.n_split * RECORD_128;
        auto    weight   = [&](int r) { return head[4 * r + 1] + head[4 * r + 2]; };
        map_rows_128<R, NW>(a, sums, q_map, coded_weights, v_map_here, warp, lane,
            [&](int r, int j, float x, float y) {
                if (r < n_rows) {
                    *(float2 *) (records + ((size_t) r * a.n_split + split) * RECORD_128 + 4 + j) = make_float2(x, y);
                }
            });
        if (tid < n_rows) {
            *(float2 *) (records + ((size_t) tid * a.n_split + split) * RECORD_128) = make_float2(head[4 * tid], weight(tid));
        }
        __syncthreads();
        if (tid == 0) {
            const uint32_t before = pq_arrive(a.counters + group); // for the whole block: the others' writes lie before the barrier
            if (before == (uint32_t) a.n_split - 1) {
                a.counters[group] = 0;
            }
            head[4 * R] = __uint_as_float(before);
        }
        __syncthreads();
        const int before = (int) __float_as_uint(head[4 * R]);
        helper = before * (a.n_attn_blocks / a.n_split) + group; // who comes early begins
        if (before == a.n_split - 1) {
            merge_parts_128<R, NT>(a, rows, records, n_rows, head, (float *) smem, sums);
        }
    }
    if (helper < a.n_helpers) {
        __syncthreads(); // the encoder lies over everything that there was in shared memory
        encode_units<KT, VT>(a, encode_smem, a.n_apart + helper + tid / PQ_ENCODE_FEW_THREADS * a.n_helpers, a.units.n, a.n_helpers * N_GROUP_ENCODE);
    }
}

} // namespace pq_attn
