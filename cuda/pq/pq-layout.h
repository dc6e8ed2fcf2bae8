// Every memory layout of the product-quantized (PQ) KV cache, in one place.
//
// Product quantization cuts a head vector of D elements into M subspaces of `dsub` elements and stores, for each
// subspace, the index ("code", one byte) of the nearest of 256 centroids. The names are those of
// faiss::ProductQuantizer. The method is MILLION (DAC'25, arXiv 2504.03661), with a transform per layer and KV head:
//
//     y = (x - mu) T            encode: code[m] = argmin_c |y[m*dsub .. +dsub] - centroid[m][c]|^2, ties to the lowest c
//                               (K of a codebook with `aniso`: see "Anisotropic codes")
//     x ~ y^ T^-1 + mu          decode: y^ is the concatenation of the chosen centroids
//     q.x ~ (T^-1 q).y^ + q.mu  attention never decodes: it maps the query once and the output once
//
// pq3 is pq4 with every fourth code left out: of each four subspaces the last two share one code, which minimizes the sum
// of their distances. So half of the elements have 4 bits and the other half 2, and T sees to it that those are the ones
// that need no more. No code is ever anything but a byte.
//
// This header is plain C so that C, C++ and CUDA can include it; it depends on nothing.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// The order is that of the ggml types GGML_TYPE_PQ4, GGML_TYPE_PQ3, GGML_TYPE_PQ2.
enum pq_type {
    PQ_TYPE_PQ4 = 0, // dsub 2, a code each: 4 bits per element
    PQ_TYPE_PQ3 = 1, // dsub 2, three codes for four subspaces: 3 bits per element
    PQ_TYPE_PQ2 = 2, // dsub 4, a code each: 2 bits per element
    PQ_TYPE_COUNT,
};

#define PQ_KSUB     256 // centroids per subspace
#define PQ_MAX_D    256 // largest head size
#define PQ_MAX_DIMS 4   // elements of a code
#define PQ_MAX_M    128 // PQ_MAX_D / 2

struct pq_spec {
    int32_t dsub;        // elements per subspace
    int32_t block_elems; // elements of the smallest group that has whole codes (the ggml block size)
    int32_t block_bytes; // codes of that group, a byte each (the ggml type size)
};

static inline struct pq_spec pq_get_spec(enum pq_type type) {
    switch (type) {
        case PQ_TYPE_PQ4: { const struct pq_spec s = { 2, 2, 1 }; return s; }
        case PQ_TYPE_PQ3: { const struct pq_spec s = { 2, 8, 3 }; return s; }
        case PQ_TYPE_PQ2: { const struct pq_spec s = { 4, 4, 1 }; return s; }
        default:          { const struct pq_spec s = { 0, 1, 0 }; return s; }
    }
}

// ---------------------------------------------------------------------------------------------------------
// Codes of one head: `codes: u8 [pq_head_bytes]`. pq4 and pq2: byte m is the code of subspace m. pq3: first the codes of
// one subspace, then those that two share: bytes 2u and 2u + 1 are the codes of subspaces 4u and 4u + 1, and byte D / 4 + u
// that of both 4u + 2 and 4u + 3. So a kernel finds codes of a kind side by side, in words.
//
// The cache of one layer is `codes: u8 [n_stream][kv_size][n_head_kv][pq_head_bytes]`, in the place where an
// f16 cache has [n_stream][kv_size][n_head_kv][D] halves.
// ---------------------------------------------------------------------------------------------------------

#define PQ_CODE_ORDER 2u // version of this order: states that are saved have codes, and are refused where it is another. 1: pq3 had no runs of one kind

static inline int32_t pq_n_subspaces(enum pq_type type, int32_t D) { // M
    return D / pq_get_spec(type).dsub;
}

static inline size_t pq_head_bytes(enum pq_type type, int32_t D) {
    const struct pq_spec s = pq_get_spec(type);
    return (size_t) (D / s.block_elems) * (size_t) s.block_bytes;
}

// Head sizes that the kernels take: multiples of 8 (whole blocks of every type) up to PQ_MAX_D.
static inline int pq_head_size_ok(int32_t D) {
    return D >= 8 && D <= PQ_MAX_D && D % 8 == 0;
}

static inline int32_t pq_code_index(enum pq_type type, int32_t D, int32_t m) { // which byte is the code of subspace m
    return type != PQ_TYPE_PQ3 ? m : m % 4 < 2 ? m / 4 * 2 + m % 4 : D / 4 + m / 4;
}

static inline uint32_t pq_code_get(enum pq_type type, int32_t D, const uint8_t * codes, int32_t m) {
    return codes[pq_code_index(type, D, m)];
}

// ---------------------------------------------------------------------------------------------------------
// Anisotropic codes (Guo et al., "Accelerating Large-Scale Inference with Anisotropic Vector Quantization", ICML 2020). Queries that look for
// a key lie along d = aniso * y, so an error e of a key costs  |e|^2 + PQ_ANISO_WEIGHT (e.d)^2 / |d|^2,  summed over strips of a head: runs of
// PQ_ANISO_STRIP elements of y, of which the last may be shorter. The codes that cost least can't be found one by one. So a strip has the
// nearest ones first; then, with e their error, those nearest to  y + PQ_ANISO_STEP (e.d) / |d|^2 d,  which are taken where they cost less.
//
// Every backend makes the same codes of a few rows, bit by bit: products and sums are rounded one by one, and the sum of a strip is a tree,
// a[i] += a[i + n] for n = 16, 8, 4, 2, 1, in which elements beyond a head are 0.
// ---------------------------------------------------------------------------------------------------------

#define PQ_ANISO_STRIP  32
#define PQ_ANISO_WEIGHT 3.0f
#define PQ_ANISO_STEP   0.75f // w / (1 + w)

// ---------------------------------------------------------------------------------------------------------
// Codebook at run time: `head blocks: u8 [n_head_kv][head_bytes]`, one tensor per layer and side (K or V), in the
// memory of the device that holds the layer's cache. A head block is
//
//     mu:        f32 [D]
//     aniso:     f32 [D]       0: nearest codes it is
//     T:         f16 [D][D]    row i: what element i of (x - mu) adds to y     } absent when the transform
//     T_inv:     f16 [D][D]    row j: what element j of y adds to (x - mu)     } is the identity
//     centroids: f16 [M][PQ_KSUB][dsub]
//
// with every part at a multiple of 64 bytes. Whether the maps are there follows from the block's size alone.
// ---------------------------------------------------------------------------------------------------------

struct pq_codebook_layout {
    size_t mu;         // byte offsets from the start of a head block
    size_t aniso;
    size_t T;          // 0 when the transform is the identity
    size_t T_inv;      // 0 when the transform is the identity
    size_t centroids;
    size_t head_bytes; // size of a head block, and the stride between heads
};

static inline size_t pq_align64(size_t n) {
    return (n + 63) / 64 * 64;
}

static inline struct pq_codebook_layout pq_get_codebook_layout(int32_t D, int has_transform) {
    struct pq_codebook_layout l = { 0, 0, 0, 0, 0, 0 };
    size_t off = pq_align64((size_t) D * sizeof(float));
    l.aniso = off; off += pq_align64((size_t) D * sizeof(float));
    if (has_transform) {
        l.T     = off; off += pq_align64((size_t) D * (size_t) D * sizeof(uint16_t));
        l.T_inv = off; off += pq_align64((size_t) D * (size_t) D * sizeof(uint16_t));
    }
    l.centroids  = off; off += pq_align64((size_t) D * PQ_KSUB * sizeof(uint16_t)); // M*dsub == D
    l.head_bytes = off;
    return l;
}

// ---------------------------------------------------------------------------------------------------------
// Lookup tables at run time: the centroids once more, by index, as a kernel wants them in shared memory (CUDA, D = 128).
// They follow the head blocks in the memory of a device that uses them:
//
//     tables: f16 [n_head_kv][PQ_KSUB][128]    row c: centroid c of every subspace, side by side
//
// A row of V is in order. One of K has the four quarters of a head in two halves each, first the first halves: then four
// threads with a quarter each read different banks. A row of pq3 has first all subspaces with a code of their own, then those
// that share one.
// ---------------------------------------------------------------------------------------------------------

#define PQ_TABLE_D 128

static inline size_t pq_table_bytes(int32_t D) { // of a head; 0: no kernel has a use for it
    return D == PQ_TABLE_D ? (size_t) PQ_KSUB * PQ_TABLE_D * sizeof(uint16_t) : 0;
}

static inline int32_t pq_table_place(enum pq_type type, int is_v, int32_t i) { // of element i in a row
    return type == PQ_TYPE_PQ3 ? i / 4 % 2 * 64 + i / 8 * 4 + i % 4
         : is_v                ? i
                               : i / 16 % 2 * 64 + i / 32 * 16 + i % 16;
}

static inline void pq_build_tables(enum pq_type type, int32_t D, int32_t n_head_kv, int has_transform, int is_v,
                                   const uint8_t * head_blocks, uint8_t * tables) {
    const int32_t                   dsub = pq_get_spec(type).dsub;
    const struct pq_codebook_layout l    = pq_get_codebook_layout(D, has_transform);
    for (int32_t h = 0; h < n_head_kv && pq_table_bytes(D) > 0; h++) {
        const uint16_t * centroids = (const uint16_t *) (head_blocks + (size_t) h * l.head_bytes + l.centroids);
        uint16_t       * table     = (uint16_t *) (tables + (size_t) h * pq_table_bytes(D));
        for (int32_t i = 0; i < D; i++) {
            for (int32_t c = 0; c < PQ_KSUB; c++) {
                table[c * D + pq_table_place(type, is_v, i)] = centroids[(i / dsub * PQ_KSUB + c) * dsub + i % dsub];
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------
// Codebook in a file: one blob per layer and side, base64 in a GGUF string (docs/format.md). Little endian.
//
//     header, 32 bytes:  magic "MPQB" | u32 version | u16 D | u16 n_head_kv | u16 M | u16 dsub | u16 code bytes per head |
//                        u16 flags | u32 payload_bytes | u32 crc32 of the payload (zlib's) | u32 0
//     payload, per head: mu f32 [D] | T f16 [D][D], when flags has PQ_BLOB_TRANSFORM | aniso f32 [D], when flags has PQ_BLOB_ANISO |
//                        centroids f16 [M][PQ_KSUB][dsub]
//
// T^-1 is not stored: the reader inverts the stored T, so the two cannot disagree.
// ---------------------------------------------------------------------------------------------------------

#define PQ_BLOB_VERSION      2u
#define PQ_BLOB_HEADER_BYTES 32
#define PQ_BLOB_TRANSFORM    1u
#define PQ_BLOB_ANISO        2u // K only

#ifdef __cplusplus
}
#endif
