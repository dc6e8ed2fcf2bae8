// From ggml tensors to the parameter structs of the kernels (pq-params.h), for the backends: what an op must look like is
// written once. Each function returns NULL, or what about op the kernels do not cover.
#pragma once

#include "ggml-impl.h"
#include "ggml-pq.h"
#include "pq-params.h"

static inline enum pq_type ggml_pq_type_of(enum ggml_type type) {
    return ggml_is_pq(type) ? (enum pq_type) (type - GGML_TYPE_PQ4) : PQ_TYPE_COUNT;
}

// SET_ROWS into, or CPY into, a PQ tensor
static inline const char * ggml_pq_encode_params(const struct ggml_tensor * op, struct pq_encode_params & p) {
    const bool          rows     = op->op == GGML_OP_SET_ROWS;
    const ggml_tensor * x        = op->src[0];
    const ggml_tensor * codebook = op->src[rows ? GGML_PQ_SRC_SET_ROWS : GGML_PQ_SRC_CPY];
    if (!codebook) {
        return "it has no codebook";
    }
    if (!ggml_is_pq(op->type) || (x->type != GGML_TYPE_F32 && x->type != GGML_TYPE_F16) || x->nb[0] != ggml_type_size(x->type)) {
        return "only contiguous f32 and f16 rows are encoded";
    }
    const int64_t n_head_kv = codebook->ne[1];

    p           = {};
    p.type      = ggml_pq_type_of(op->type);
    p.n_head_kv = (int32_t) n_head_kv;
    p.x_f16     = x->type == GGML_TYPE_F16;
    p.x         = x->data;
    p.codes     = (uint8_t *) op->data;
    p.codebook  = (const uint8_t *) codebook->data;

    if (rows) {
        // x [n_head_kv*D, n_rows], indices I64 [n_rows], dst [n_head_kv*D, n_cells]
        const ggml_tensor * idx      = op->src[1];
        const ggml_tensor * tail     = op->src[GGML_PQ_SRC_SET_ROWS_TAIL];
        const ggml_tensor * tail_idx = op->src[GGML_PQ_SRC_SET_ROWS_TAIL_IDX];
        if (x->ne[0] % n_head_kv != 0 || x->ne[2] != 1 || x->ne[3] != 1 || op->ne[2] != 1 || op->ne[3] != 1) {
            return "rows must be [D*n_head_kv, n_rows]";
        }
        if (idx->type != GGML_TYPE_I64 || !ggml_is_contiguous(idx)) {
            return "row indices must be contiguous I64";
        }
        p.D                = (int32_t) (x->ne[0] / n_head_kv);
        p.n_rows           = x->ne[1];
        p.x_row_stride     = x->nb[1];
        p.x_head_stride    = p.D * ggml_type_size(x->type);
        p.codes_row_stride = op->nb[1];
        p.row_idx          = (const int64_t *) idx->data;
        if (tail) {
            if (tail->type != GGML_TYPE_F16 || tail->ne[0] != x->ne[0] || tail->nb[0] != sizeof(ggml_fp16_t) ||
                tail->ne[2] != 1 || tail->ne[3] != 1) {
                return "the tail must be f16 [D*n_head_kv, n_slots]";
            }
            if (!tail_idx || tail_idx->type != GGML_TYPE_I64 || !ggml_is_contiguous(tail_idx) || tail_idx->ne[0] != p.n_rows) {
                return "slot indices must be contiguous I64 [n_rows]";
            }
            p.tail            = (uint8_t *) tail->data;
            p.tail_row_stride = tail->nb[1];
            p.tail_idx        = (const int64_t *) tail_idx->data;
        }
    } else {
        // x and dst [D, n_head_kv, n_cells]
        if (x->ne[1] != n_head_kv || x->ne[3] != 1 || !ggml_are_same_shape(x, op) ||
            op->nb[1] != ggml_row_size(op->type, x->ne[0])) {
            return "a copy into codes must be of [D, n_head_kv, n_cells], its heads side by side";
        }
        p.D                = (int32_t) x->ne[0];
        p.n_rows           = x->ne[2];
        p.x_row_stride     = x->nb[2];
        p.x_head_stride    = x->nb[1];
        p.codes_row_stride = op->nb[2];
    }
    bool has_transform;
    if (!ggml_pq_codebook_fits(codebook, op->type, p.D, &has_transform)) {
        return "the codebook is not of this type and head size";
    }
    p.has_transform = has_transform;
    return NULL;
}

// CPY of PQ codes [D, n_head_kv, n_cells] to f32
static inline const char * ggml_pq_decode_params(const struct ggml_tensor * op, struct pq_decode_params & p) {
    const ggml_tensor * codes    = op->src[0];
    const ggml_tensor * codebook = op->src[GGML_PQ_SRC_CPY];
    if (!codebook) {
        return "it has no codebook";
    }
    if (op->type != GGML_TYPE_F32 || op->nb[0] != sizeof(float) || !ggml_is_pq(codes->type)) {
        return "codes are decoded to contiguous f32 rows only";
    }
    if (codes->ne[1] != codebook->ne[1] || codes->ne[3] != 1 || !ggml_are_same_shape(codes, op) ||
        codes->nb[1] != ggml_row_size(codes->type, codes->ne[0])) {
        return "a copy of codes must be of [D, n_head_kv, n_cells], its heads side by side";
    }
    bool has_transform;
    if (!ggml_pq_codebook_fits(codebook, codes->type, (int32_t) codes->ne[0], &has_transform)) {
        return "the codebook is not of this type and head size";
    }
    p                  = {};
    p.type             = ggml_pq_type_of(codes->type);
    p.D                = (int32_t) codes->ne[0];
    p.n_head_kv        = (int32_t) codes->ne[1];
    p.n_rows           = codes->ne[2];
    p.codebook         = (const uint8_t *) codebook->data;
    p.has_transform    = has_transform;
    p.codes            = (const uint8_t *) codes->data;
    p.codes_row_stride = codes->nb[2];
    p.x                = (float *) op->data;
    p.x_row_stride     = op->nb[2];
    p.x_head_stride    = op->nb[1];
    return NULL;
}

static inline const char * ggml_pq_attn_side(const struct ggml_tensor * t, const struct ggml_tensor * codebook, struct pq_attn_side & s) {
    s               = {};
    s.type          = ggml_pq_type_of(t->type);
    s.D             = (int32_t) t->ne[0];
    s.data          = (const uint8_t *) t->data;
    s.row_stride    = t->nb[1];
    s.head_stride   = t->nb[2];
    s.stream_stride = t->nb[3];
    if (!ggml_is_pq(t->type)) {
        return t->nb[0] == ggml_type_size(t->type) && s.D <= PQ_MAX_D ? NULL : "K and V rows must be contiguous, of 256 elements at most";
    }
    bool has_transform;
    if (!codebook || codebook->ne[1] != t->ne[2] || !ggml_pq_codebook_fits(codebook, t->type, s.D, &has_transform)) {
        return "K or V has no codebook of its type, head size and number of heads";
    }
    s.codebook      = (const uint8_t *) codebook->data;
    s.has_transform = has_transform;
    s.tables        = ggml_pq_codebook_tables(codebook);
    return NULL;
}

// Whether the tail of a FLASH_ATTN_EXT tells the cells of its slots: rows n_q and n_q + 1 of its mask, see ggml-pq.h.
static inline bool ggml_pq_attn_tail_has_cells(const struct ggml_tensor * op) {
    const ggml_tensor * tail_mask = op->src[GGML_PQ_SRC_FLASH_ATTN_TAIL_MASK];
    return tail_mask && tail_mask->ne[1] == op->src[0]->ne[1] + GGML_PQ_TAIL_CELL_ROWS;
}

// FLASH_ATTN_EXT. A side without codes (type PQ_TYPE_COUNT) has no to_float yet, and may have any ggml type.
static inline const char * ggml_pq_attn_params(const struct ggml_tensor * op, struct pq_attn_params & p) {
    const ggml_tensor * q         = op->src[0];
    const ggml_tensor * k         = op->src[1];
    const ggml_tensor * v         = op->src[2];
    const ggml_tensor * mask      = op->src[3];
    const ggml_tensor * sinks     = op->src[4];
    const ggml_tensor * tail_k    = op->src[GGML_PQ_SRC_FLASH_ATTN_TAIL_K];
    const ggml_tensor * tail_v    = op->src[GGML_PQ_SRC_FLASH_ATTN_TAIL_V];
    const ggml_tensor * tail_mask = op->src[GGML_PQ_SRC_FLASH_ATTN_TAIL_MASK];

    p = {};
    if (q->type != GGML_TYPE_F32 || op->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float) || op->nb[0] != sizeof(float)) {
        return "queries and result must be contiguous f32 rows";
    }
    if (k->ne[2] != v->ne[2] || k->ne[1] != v->ne[1] || q->ne[2] % k->ne[2] != 0 || q->ne[3] != k->ne[3] || v->ne[3] != k->ne[3] ||
        q->ne[0] != k->ne[0] || op->ne[0] != v->ne[0]) {
        return "the shapes of queries, K and V do not match";
    }
    const char * why = ggml_pq_attn_side(k, op->src[GGML_PQ_SRC_FLASH_ATTN_K], p.k);
    if (!why) {
        why = ggml_pq_attn_side(v, op->src[GGML_PQ_SRC_FLASH_ATTN_V], p.v);
    }
    if (why) {
        return why;
    }
    p.n_head    = (int32_t) q->ne[2];
    p.n_head_kv = (int32_t) k->ne[2];
    p.n_stream  = (int32_t) q->ne[3];
    p.n_q       = q->ne[1];
    p.n_kv      = k->ne[1];

    p.q               = (const uint8_t *) q->data;
    p.q_token_stride  = q->nb[1];
    p.q_head_stride   = q->nb[2];
    p.q_stream_stride = q->nb[3];

    if (mask) {
        if (mask->type != GGML_TYPE_F16 || mask->nb[0] != sizeof(ggml_fp16_t)) {
            return "the mask must be contiguous f16 rows";
        }
        p.mask               = (const uint8_t *) mask->data;
        p.mask_token_stride  = mask->nb[1];
        p.mask_head_stride   = mask->nb[2];
        p.mask_stream_stride = mask->nb[3];
        p.n_head_mask        = (int32_t) mask->ne[2];
        p.n_stream_mask      = (int32_t) mask->ne[3];
    }
    if (tail_k || tail_v || tail_mask) {
        if (!tail_k || !tail_v || !tail_mask || tail_k->type != GGML_TYPE_F16 || tail_v->type != GGML_TYPE_F16 ||
            tail_mask->type != GGML_TYPE_F16 || tail_k->nb[0] != sizeof(ggml_fp16_t) || tail_v->nb[0] != sizeof(ggml_fp16_t) ||
            tail_mask->nb[0] != sizeof(ggml_fp16_t)) {
            return "the tail needs K, V and a mask, all contiguous f16 rows";
        }
        if (tail_k->ne[0] != k->ne[0] || tail_v->ne[0] != v->ne[0] || tail_v->ne[1] != tail_k->ne[1] ||
            tail_k->ne[2] != k->ne[2] || tail_v->ne[2] != k->ne[2] || tail_k->ne[3] != k->ne[3] || tail_v->ne[3] != k->ne[3] ||
            tail_mask->ne[0] != tail_k->ne[1] || tail_mask->ne[1] < q->ne[1] || tail_mask->ne[2] != 1 || tail_mask->ne[3] != k->ne[3]) {
            return "the shape of the tail does not match K, V and the queries";
        }
        p.tail.n                  = tail_k->ne[1];
        p.tail.k                  = (const uint8_t *) tail_k->data;
        p.tail.k_row_stride       = tail_k->nb[1];
        p.tail.k_head_stride      = tail_k->nb[2];
        p.tail.k_stream_stride    = tail_k->nb[3];
        p.tail.v                  = (const uint8_t *) tail_v->data;
        p.tail.v_row_stride       = tail_v->nb[1];
        p.tail.v_head_stride      = tail_v->nb[2];
        p.tail.v_stream_stride    = tail_v->nb[3];
        p.tail.mask               = (const uint8_t *) tail_mask->data;
        p.tail.mask_token_stride  = tail_mask->nb[1];
        p.tail.mask_stream_stride = tail_mask->nb[3];
    }
    p.sinks = sinks ? (const float *) sinks->data : NULL;

    p.scale         = ggml_get_op_params_f32(op, 0);
    p.max_bias      = ggml_get_op_params_f32(op, 1);
    p.logit_softcap = ggml_get_op_params_f32(op, 2);

    p.dst               = (float *) op->data;
    p.dst_head_stride   = op->nb[1];
    p.dst_token_stride  = op->nb[2];
    p.dst_stream_stride = op->nb[3];
    return NULL;
}
