// Product quantization (PQ) cache types in ggml: how a codebook reaches the ops that need it.
//
// GGML_TYPE_PQ4, PQ3 and PQ2 hold codes (pq/pq-layout.h). Codes mean nothing without the codebook of their layer
// and side, an I8 tensor [head_bytes, n_head_kv] in the memory of the cache's device. It travels as an extra source, and so
// does the exact tail, which holds the most recent tokens of a layer and side as f16 rows beside the codes:
//
//     op               codes                  codebook         exact tail
//     SET_ROWS         dst (encode)           src[3]           src[4] F16 [D*n_head_kv, n_slots], written too
//                                                              src[5] I64 [n_rows] slot of each row; negative: not kept
//     CPY              dst or src[0]          src[2]
//     FLASH_ATTN_EXT   src[1] K, src[2] V     src[5] K         src[7] F16 [D, n_tail, n_head_kv, n_stream] K
//                                             src[6] V         src[8] F16 [D, n_tail, n_head_kv, n_stream] V
//                                                              src[9] F16 [n_tail, n_q (+ 2), 1, n_stream] mask
//     VIEW             src[0]                 src[1]           src[2] the tail as FLASH_ATTN_EXT takes it
//     the mask (an input)                                      src[0] the tail's mask
//
// What a VIEW or the mask holds is carried along and not read: a view of the cache carries its codebook and tail, so that
// every graph that reads the cache through a view has them at hand. When only one of K and V is coded, the other one's view
// carries its tail all the same. Attention with a mask that carries no tail mask reads codes alone, which is always correct.
//
// A token in the tail is -inf in the mask of FLASH_ATTN_EXT and visible in the mask of the tail: one softmax runs over both.
// Slots that are -inf in the tail's mask are not read, and may hold anything.
//
// The tail's mask may end in two more rows, which say whose rows the slots hold: row n_q has the low, row n_q + 1 the high 16
// bits of each slot's cell (an index into K and V of this op), all ones for a slot of no cell. Then a cell with a slot is -inf
// in the mask for every query, a slot without a cell is -inf in the tail's mask for every query, and a slot with a cell holds
// finite values, and no two slots have the same cell. So a backend may put the rows of the tail in the place of their cells and attend to n_kv columns; many queries
// at once need this on CUDA. They ride on the mask because FLASH_ATTN_EXT has no source left.
//
// Rows that a graph writes and then attends to with a tail's mask all have a slot of that tail: attention does not read their codes, and CUDA may still be making them.
//
// Such a mask is memory that the op may write: CUDA puts the tail's columns into it and has its own back before the op is over. Nothing else reads it meanwhile.
#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

#define GGML_PQ_SRC_SET_ROWS             3
#define GGML_PQ_SRC_SET_ROWS_TAIL        4
#define GGML_PQ_SRC_SET_ROWS_TAIL_IDX    5
#define GGML_PQ_SRC_CPY                  2
#define GGML_PQ_SRC_FLASH_ATTN_K         5
#define GGML_PQ_SRC_FLASH_ATTN_V         6
#define GGML_PQ_SRC_FLASH_ATTN_TAIL_K    7
#define GGML_PQ_SRC_FLASH_ATTN_TAIL_V    8
#define GGML_PQ_SRC_FLASH_ATTN_TAIL_MASK 9
#define GGML_PQ_SRC_VIEW                 1
#define GGML_PQ_SRC_VIEW_TAIL            2
#define GGML_PQ_SRC_MASK_TAIL_MASK       0

#define GGML_PQ_TAIL_CELL_ROWS 2 // rows after those of the queries in a tail's mask that holds the cells of its slots

GGML_API bool ggml_is_pq(enum ggml_type type);

// True when op computes on PQ codes: its result or a source has a PQ type, and it is not a mere view.
GGML_API bool ggml_pq_has_operand(const struct ggml_tensor * op);

// The codebook of a layer: I8 [head_bytes, n_head_kv]. With tables, where the kernels have a use for them, it is a view of a
// tensor that holds them after it: then two tensors are made.
GGML_API struct ggml_tensor * ggml_pq_new_codebook(
        struct ggml_context * ctx,
        enum ggml_type        type,
        int32_t               D,
        int32_t               n_head_kv,
        bool                  has_transform,
        bool                  with_tables);

// The lookup tables of a codebook in the memory of its device; NULL when it has none.
GGML_API const uint8_t * ggml_pq_codebook_tables(const struct ggml_tensor * codebook);

// Whether a codebook tensor has the size that codebooks of head size D have, whatever the type; `has_transform` then tells if maps are stored.
GGML_API bool ggml_pq_codebook_fits(const struct ggml_tensor * codebook, enum ggml_type type, int32_t D, bool * has_transform);

// Attaches a codebook to a SET_ROWS, CPY or VIEW; does nothing when it is NULL. Returns t.
GGML_API struct ggml_tensor * ggml_pq_set_codebook(struct ggml_tensor * t, struct ggml_tensor * codebook);

// The codebook that a view, or a permutation or view of one, carries; NULL when there is none.
GGML_API struct ggml_tensor * ggml_pq_get_codebook(const struct ggml_tensor * t);

// Lets a SET_ROWS into codes write f16 rows to the tail too; does nothing when the tail is NULL. Returns op.
GGML_API struct ggml_tensor * ggml_pq_set_rows_tail(struct ggml_tensor * op, struct ggml_tensor * tail, struct ggml_tensor * idx);

// Attaches a tail to a VIEW of the cache; does nothing when the tail is NULL. Returns view.
GGML_API struct ggml_tensor * ggml_pq_set_tail(struct ggml_tensor * view, struct ggml_tensor * tail);

// Attaches the tail's mask to the mask of the coded part, which must be an input. Returns mask.
GGML_API struct ggml_tensor * ggml_pq_set_tail_mask(struct ggml_tensor * mask, struct ggml_tensor * tail_mask);

// The tail that a view, or a permutation or view of one, carries; NULL when there is none.
GGML_API struct ggml_tensor * ggml_pq_get_tail(const struct ggml_tensor * t);

// The tail's mask that a mask carries; NULL when there is none.
GGML_API struct ggml_tensor * ggml_pq_get_tail_mask(const struct ggml_tensor * mask);

// Attaches to a FLASH_ATTN_EXT the codebooks and the tails that its K, V and mask carry.
GGML_API void ggml_pq_flash_attn_ext_add_extras(struct ggml_tensor * a);

#ifdef __cplusplus
}
#endif
