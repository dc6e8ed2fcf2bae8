// What pq-cpu.cpp (dispatch) and pq-kernels-impl.h (the kernels, compiled once per instruction set) share: how work
// is split into items, how scratch memory is laid out, and the table of kernels.
//
// Everything here is `static`: the files that include it are compiled for different processors, and a function with
// external linkage would be merged into one copy, perhaps the one that the running processor can't execute.
#pragma once

#include "pq-cpu.h"

#include <stddef.h>
#include <stdint.h>

struct pq_kernels {
    const char * name;
    void   (*encode_item)     (const pq_encode_params * p, int64_t item, void * scratch);
    void   (*decode_item)     (const pq_decode_params * p, int64_t item, void * scratch);
    void   (*attn_item)       (const pq_attn_params * p, int64_t item, void * partials, void * scratch);
    void   (*attn_reduce_item)(const pq_attn_params * p, int64_t item, void * partials, void * scratch);
    void   (*kmeans_assign)   (const float * x, int64_t n, int64_t x_stride, int32_t dsub, const float * centroids, int32_t ksub,
                               uint8_t * codes, float * dists, double * sums, int64_t * counts, double * costs);
};

// NULL when the file was compiled without its instruction set (another architecture, an old compiler).
const pq_kernels * pq_kernels_scalar(void);
const pq_kernels * pq_kernels_avx2(void);
const pq_kernels * pq_kernels_avx512(void);

const pq_kernels * pq_kernels_current(void); // those that the functions of pq-cpu.h run

static inline int64_t pq_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t pq_max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t pq_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t pq_round_up(int64_t a, int64_t b) { return pq_ceil_div(a, b) * b; }

enum {
    PQ_ROW_TILE  = 32,   // rows per encode or decode item: enough to pay for converting the centroids once
    PQ_KV_TILE   = 64,   // cells per step with many query rows: K and V tiles of 64 x 128 floats fit into L2 together
    PQ_Q_ROWS    = 96,   // query rows per item: a multiple of every micro-kernel's height (6 and 12)
    PQ_FEW_ROWS  = 8,    // up to here tables of inner products beat decoding: one row of a table is one AVX2 register
    PQ_KV_SEG    = 1024, // cells per pass with few rows: amortizes the tables; the codes of a pass stay in L2
    PQ_KV_SEG_STRIDE = PQ_KV_SEG * 8 + 64, // bytes between groups of codes: no power of two, which would put them all into one cache set
    PQ_MIN_ITEMS = 64,   // below this many items the context is split too
    PQ_PAD       = 32,   // floats: rows in scratch memory are padded for two of the widest vectors
};

// Carves aligned arrays out of a scratch area; from a NULL base it only adds up their sizes.
struct pq_arena {
    uintptr_t base;
    size_t    used;
};

static inline pq_arena pq_arena_begin(void * scratch) {
    pq_arena a = { ((uintptr_t) scratch + 63) / 64 * 64, 0 };
    return a;
}

template <class T>
static inline T * pq_take(pq_arena * a, int64_t n) {
    T * p = (T *) (a->base + a->used);
    a->used += pq_align64((size_t) n * sizeof(T));
    return p;
}

static inline size_t pq_arena_bytes(const pq_arena * a) {
    return a->used + 64; // the caller's area may start anywhere
}

static inline int64_t pq_padded(int64_t n_floats) { return pq_round_up(n_floats, PQ_PAD); }

// ---- encode and decode: item = (tile of rows, head), heads fastest ----

struct pq_encode_scratch {
    float   * x;           // [PQ_ROW_TILE][D]  x - mu
    float   * y;           // [PQ_ROW_TILE][padded D]
    float   * soa;         // [elements][PQ_KSUB] centroids of one code
    uint8_t * codes;       // [PQ_ROW_TILE][PQ_MAX_M]
    uint8_t * moved_codes; // the same, of the second search for anisotropic codes
};

static inline pq_encode_scratch pq_encode_carve(pq_arena * a, int64_t D) {
    pq_encode_scratch s;
    s.x           = pq_take<float>(a, PQ_ROW_TILE * pq_padded(D));
    s.y           = pq_take<float>(a, PQ_ROW_TILE * pq_padded(D));
    s.soa         = pq_take<float>(a, PQ_MAX_DIMS * PQ_KSUB);
    s.codes       = pq_take<uint8_t>(a, PQ_ROW_TILE * PQ_MAX_M);
    s.moved_codes = pq_take<uint8_t>(a, PQ_ROW_TILE * PQ_MAX_M);
    return s;
}

struct pq_decode_scratch {
    uint8_t * staged; // [groups][PQ_ROW_TILE][8]
    float   * y;      // [PQ_ROW_TILE][padded D]
    float   * x;      // [PQ_ROW_TILE][padded D]
};

static inline int64_t pq_n_groups(int64_t D) { return pq_ceil_div(D, 16) + 1; } // of 8 codes; enough for dsub 2 and 4

static inline pq_decode_scratch pq_decode_carve(pq_arena * a, int64_t D) {
    pq_decode_scratch s;
    s.staged = pq_take<uint8_t>(a, pq_n_groups(D) * PQ_ROW_TILE * 8);
    s.y      = pq_take<float>(a, PQ_ROW_TILE * pq_padded(D));
    s.x      = pq_take<float>(a, PQ_ROW_TILE * pq_padded(D));
    return s;
}

// ---- attention: item = (stream, KV head, block of query tokens, part), parts fastest ----
//
// A part is a chunk of the cache's cells, or the exact tail. Without a split over the context one item does both.

struct pq_attn_plan {
    int32_t n_group;   // query heads per KV head
    int64_t n_tok;     // query tokens per block
    int64_t n_block;   // blocks of query tokens
    int64_t n_rows;    // rows of a full block, n_group * n_tok; row = token * n_group + head in the group
    int32_t rp;        // few rows: n_rows rounded up to 1, 2, 4 or 8; otherwise 0
    int64_t n_base;    // items without the split over the context
    int64_t n_chunk;
    int64_t chunk;     // cells per chunk
    int64_t n_part;    // n_chunk, and one more for the tail when there are several
    int64_t dk, dv;    // padded head sizes
    int64_t partial_floats; // max [n_rows] | sum [n_rows] | O [n_rows][dv]
};

static inline pq_attn_plan pq_attn_make_plan(const pq_attn_params * p) {
    pq_attn_plan pl;
    pl.n_group = p->n_head / p->n_head_kv;
    pl.rp      = 0;
    if (pl.n_group * p->n_q <= PQ_FEW_ROWS) {
        pl.n_tok = p->n_q;
        pl.rp    = 1;
        while (pl.rp < pl.n_group * p->n_q) {
            pl.rp *= 2;
        }
    } else {
        pl.n_tok = pq_min(p->n_q, pq_max(1, PQ_Q_ROWS / pl.n_group));
    }
    pl.n_block = pq_ceil_div(p->n_q, pl.n_tok);
    pl.n_rows  = pl.n_tok * pl.n_group;
    pl.n_base  = (int64_t) p->n_stream * p->n_head_kv * pl.n_block;

    const int64_t min_chunk = pl.rp ? PQ_KV_SEG / 2 : PQ_KV_SEG; // many rows: each chunk maps its queries again
    pl.n_chunk = pq_min(pq_ceil_div(PQ_MIN_ITEMS, pq_max(1, pl.n_base)), pq_ceil_div(p->n_kv, min_chunk));
    pl.n_chunk = pq_max(1, pl.n_chunk);
    pl.chunk   = pq_max(PQ_KV_TILE, pq_round_up(pq_ceil_div(p->n_kv, pl.n_chunk), PQ_KV_TILE));
    pl.n_chunk = pq_max(1, pq_ceil_div(p->n_kv, pl.chunk));
    pl.n_part  = pl.n_chunk + (pl.n_chunk > 1 && p->tail.n > 0);

    pl.dk = pq_padded(p->k.D);
    pl.dv = pq_padded(p->v.D);
    pl.partial_floats = pq_round_up(2 * pl.n_rows + pl.n_rows * pl.dv, 16);
    return pl;
}

struct pq_attn_scratch {
    int64_t * mapped; // the base item, plus one, whose mapped queries qt and q_mu hold from an item before; 0: none's
    float * q;      // [rows][dk]; later the output mapped back, [rows][dv]
    float * qt;     // [rows][dk] queries as they meet K: mapped for codes
    float * q_mu;   // [rows]
    float * slope;  // [rows]
    float * m;      // [rows] running maximum
    float * sum;    // [rows] running sum
    float * o;      // [rows][dv]
    float * row;    // [max(dk, dv)] one converted row

    // many rows
    float   * kt;     // [panels of cells][dk][panel]
    float   * vt;     // [panels of dv][PQ_KV_TILE][panel]
    float   * s;      // [rows][PQ_KV_TILE]; few rows: [PQ_KV_SEG][rp]
    uint8_t * staged; // [groups][cells][8] codes

    // few rows
    float   * bias;   // [PQ_KV_SEG][rp] slope * mask
    float   * soa;    // [elements][PQ_KSUB] centroids of one code
    float   * table;  // inner products [codes][PQ_KSUB][rp], or f32 centroids [codes][PQ_KSUB][elements]
    int32_t * cells;  // [PQ_KV_SEG] cells that some row may see
};

static inline pq_attn_scratch pq_attn_carve(pq_arena * a, const pq_attn_plan * pl) {
    const int64_t rows  = pq_max(pl->n_rows, pl->rp);
    const int64_t d_max = pq_max(pl->dk, pl->dv);
    pq_attn_scratch s;
    s.mapped = pq_take<int64_t>(a, 1); // the first: pq_attn_scratch_begin
    s.q     = pq_take<float>(a, rows * d_max);
    s.qt    = pq_take<float>(a, rows * pl->dk);
    s.q_mu  = pq_take<float>(a, rows);
    s.slope = pq_take<float>(a, rows);
    s.m     = pq_take<float>(a, rows);
    s.sum   = pq_take<float>(a, rows);
    s.o     = pq_take<float>(a, rows * pl->dv);
    s.row   = pq_take<float>(a, d_max);
    if (pl->rp == 0) {
        s.kt     = pq_take<float>(a, PQ_KV_TILE * pl->dk);
        s.vt     = pq_take<float>(a, PQ_KV_TILE * pl->dv);
        s.s      = pq_take<float>(a, rows * PQ_KV_TILE);
        s.staged = pq_take<uint8_t>(a, pq_n_groups(d_max) * PQ_KV_TILE * 8);
        s.bias   = NULL;
        s.soa    = NULL;
        s.table  = NULL;
        s.cells  = NULL;
    } else {
        s.kt     = NULL;
        s.vt     = NULL;
        s.s      = pq_take<float>(a, PQ_KV_SEG * pl->rp + PQ_PAD);
        s.staged = pq_take<uint8_t>(a, pq_n_groups(d_max) * PQ_KV_SEG_STRIDE);
        s.bias   = pq_take<float>(a, PQ_KV_SEG * pl->rp + PQ_PAD);
        s.soa    = pq_take<float>(a, PQ_MAX_DIMS * PQ_KSUB);
        s.table  = pq_take<float>(a, 8 * PQ_KSUB * 8);
        s.cells  = pq_take<int32_t>(a, PQ_KV_SEG);
    }
    return s;
}
