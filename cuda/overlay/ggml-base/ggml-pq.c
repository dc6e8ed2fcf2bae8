#include "ggml-pq.h"

#include "pq-layout.h"

bool ggml_is_pq(enum ggml_type type) {
    return type == GGML_TYPE_PQ4 || type == GGML_TYPE_PQ3 || type == GGML_TYPE_PQ2;
}

bool ggml_pq_has_operand(const struct ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_NONE:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
            return false;
        default:
            break;
    }
    if (ggml_is_pq(op->type)) {
        return true;
    }
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        if (op->src[i] && ggml_is_pq(op->src[i]->type)) {
            return true;
        }
    }
    return false;
}

struct ggml_tensor * ggml_pq_new_codebook(
        struct ggml_context * ctx, enum ggml_type type, int32_t D, int32_t n_head_kv, bool has_transform, bool with_tables) {
    GGML_ASSERT(ggml_is_pq(type) && pq_head_size_ok(D) && n_head_kv > 0);
    const struct pq_codebook_layout l = pq_get_codebook_layout(D, has_transform);
    const size_t table_bytes = pq_table_bytes(D);
    if (!with_tables || table_bytes == 0) {
        return ggml_new_tensor_2d(ctx, GGML_TYPE_I8, (int64_t) l.head_bytes, n_head_kv);
    }
    struct ggml_tensor * all = ggml_new_tensor_1d(ctx, GGML_TYPE_I8, (int64_t) (l.head_bytes + table_bytes) * n_head_kv);
    ggml_set_name(all, "pq_codebook_and_tables");
    // a leaf of graphs as any weight is, and not the result of an operation: no source
    struct ggml_tensor * codebook = ggml_view_2d(ctx, all, (int64_t) l.head_bytes, n_head_kv, l.head_bytes, 0);
    codebook->op     = GGML_OP_NONE;
    codebook->src[0] = NULL;
    return codebook;
}

const uint8_t * ggml_pq_codebook_tables(const struct ggml_tensor * codebook) {
    const struct ggml_tensor * all = codebook ? codebook->view_src : NULL;
    return all && ggml_nbytes(all) > ggml_nbytes(codebook) ? (const uint8_t *) codebook->data + ggml_nbytes(codebook) : NULL;
}

bool ggml_pq_codebook_fits(const struct ggml_tensor * codebook, enum ggml_type type, int32_t D, bool * has_transform) {
    if (!codebook || codebook->type != GGML_TYPE_I8 || !ggml_is_pq(type) || !pq_head_size_ok(D)) {
        return false;
    }
    for (int t = 0; t < 2; ++t) {
        if ((size_t) codebook->ne[0] == pq_get_codebook_layout(D, t).head_bytes) {
            *has_transform = t;
            return true;
        }
    }
    return false;
}

struct ggml_tensor * ggml_pq_set_codebook(struct ggml_tensor * t, struct ggml_tensor * codebook) {
    if (!codebook) {
        return t;
    }
    switch (t->op) {
        case GGML_OP_SET_ROWS: t->src[GGML_PQ_SRC_SET_ROWS] = codebook; break;
        case GGML_OP_CPY:      t->src[GGML_PQ_SRC_CPY]      = codebook; break;
        case GGML_OP_VIEW:     t->src[GGML_PQ_SRC_VIEW]     = codebook; break;
        default: GGML_ABORT("a codebook cannot be attached to %s", ggml_op_name(t->op));
    }
    return t;
}

struct ggml_tensor * ggml_pq_get_codebook(const struct ggml_tensor * t) {
    while (t && ggml_is_pq(t->type)) {
        if (t->op == GGML_OP_VIEW && t->src[GGML_PQ_SRC_VIEW]) {
            return t->src[GGML_PQ_SRC_VIEW];
        }
        t = t->src[0];
    }
    return NULL;
}

struct ggml_tensor * ggml_pq_set_rows_tail(struct ggml_tensor * op, struct ggml_tensor * tail, struct ggml_tensor * idx) {
    if (!tail) {
        return op;
    }
    GGML_ASSERT(op->op == GGML_OP_SET_ROWS && ggml_is_pq(op->type) && "only a SET_ROWS into codes writes a tail");
    GGML_ASSERT(idx);
    op->src[GGML_PQ_SRC_SET_ROWS_TAIL]     = tail;
    op->src[GGML_PQ_SRC_SET_ROWS_TAIL_IDX] = idx;
    return op;
}

struct ggml_tensor * ggml_pq_set_tail(struct ggml_tensor * view, struct ggml_tensor * tail) {
    if (!tail) {
        return view;
    }
    GGML_ASSERT(view->op == GGML_OP_VIEW && "only a view of the cache carries a tail");
    view->src[GGML_PQ_SRC_VIEW_TAIL] = tail;
    return view;
}

struct ggml_tensor * ggml_pq_set_tail_mask(struct ggml_tensor * mask, struct ggml_tensor * tail_mask) {
    GGML_ASSERT(mask->op == GGML_OP_NONE && "only an input carries a tail mask");
    mask->src[GGML_PQ_SRC_MASK_TAIL_MASK] = tail_mask;
    return mask;
}

struct ggml_tensor * ggml_pq_get_tail(const struct ggml_tensor * t) {
    while (t) {
        switch (t->op) {
            case GGML_OP_VIEW:
                if (t->src[GGML_PQ_SRC_VIEW_TAIL]) {
                    return t->src[GGML_PQ_SRC_VIEW_TAIL];
                }
                break;
            case GGML_OP_RESHAPE:
            case GGML_OP_PERMUTE:
            case GGML_OP_TRANSPOSE:
                break;
            default:
                return NULL; // a result of its own, no longer the cache
        }
        t = t->src[0];
    }
    return NULL;
}

struct ggml_tensor * ggml_pq_get_tail_mask(const struct ggml_tensor * mask) {
    return mask && mask->op == GGML_OP_NONE ? mask->src[GGML_PQ_SRC_MASK_TAIL_MASK] : NULL;
}

void ggml_pq_flash_attn_ext_add_extras(struct ggml_tensor * a) {
    GGML_ASSERT(a->op == GGML_OP_FLASH_ATTN_EXT);
    a->src[GGML_PQ_SRC_FLASH_ATTN_K] = ggml_pq_get_codebook(a->src[1]);
    a->src[GGML_PQ_SRC_FLASH_ATTN_V] = ggml_pq_get_codebook(a->src[2]);

    struct ggml_tensor * tail_k = ggml_pq_get_tail(a->src[1]);
    struct ggml_tensor * tail_v = ggml_pq_get_tail(a->src[2]);
    struct ggml_tensor * mask   = ggml_pq_get_tail_mask(a->src[3]);
    if (tail_k && tail_v && mask && ggml_pq_has_operand(a)) {
        a->src[GGML_PQ_SRC_FLASH_ATTN_TAIL_K]    = tail_k;
        a->src[GGML_PQ_SRC_FLASH_ATTN_TAIL_V]    = tail_v;
        a->src[GGML_PQ_SRC_FLASH_ATTN_TAIL_MASK] = mask;
    }
}
