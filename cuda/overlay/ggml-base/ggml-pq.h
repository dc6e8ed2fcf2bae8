// Product quantization (PQ) cache types in ggml: how a codebook reaches the ops that need it.
//
// GGML_TYPE_PQ4, PQ3 and PQ2 hold codes (pq/pq-layout.h). Codes mean nothing without the codebook of their layer
// and side, an I8 tensor [head_bytes, n_head_kv] in the memory of the cache's device. It travels as an extra source:
//
//     op               codes                  codebook
//     SET_ROWS         dst (encode)           src[3]
//     CPY              dst or src[0]          src[2]
//     FLASH_ATTN_EXT   src[1] K, src[2] V     src[5] K, src[6] V
//     VIEW             src[0]                 src[1], carried along and not read
//
// A view of the cache carries its codebook, so that every graph that reads the cache through a view has it at hand.
#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

#define GGML_PQ_SRC_SET_ROWS     3
#define GGML_PQ_SRC_CPY          2
#define GGML_PQ_SRC_FLASH_ATTN_K 5
#define GGML_PQ_SRC_FLASH_ATTN_V 6
#define GGML_PQ_SRC_VIEW         1

GGML_API bool ggml_is_pq(enum ggml_type type);

// True when op computes on PQ codes: its result or a source has a PQ type, and it is not a mere view.
GGML_API bool ggml_pq_has_operand(const struct ggml_tensor * op);

// The codebook of a layer: I8 [head_bytes, n_head_kv].
GGML_API struct ggml_tensor * ggml_pq_new_codebook(
        struct ggml_context * ctx,
        enum ggml_type        type,
        int32_t               D,
        int32_t               n_head_kv,
        bool                  has_transform);

// Whether a codebook tensor has the size of type `type` at head size D; `has_transform` then tells if maps are stored.
GGML_API bool ggml_pq_codebook_fits(const struct ggml_tensor * codebook, enum ggml_type type, int32_t D, bool * has_transform);

// Attaches a codebook to a SET_ROWS, CPY or VIEW; does nothing when it is NULL. Returns t.
GGML_API struct ggml_tensor * ggml_pq_set_codebook(struct ggml_tensor * t, struct ggml_tensor * codebook);

// The codebook that a view, or a permutation or view of one, carries; NULL when there is none.
GGML_API struct ggml_tensor * ggml_pq_get_codebook(const struct ggml_tensor * t);

// Attaches the codebooks that the K and V of a FLASH_ATTN_EXT carry.
GGML_API void ggml_pq_flash_attn_ext_add_codebooks(struct ggml_tensor * a);

#ifdef __cplusplus
}
#endif
