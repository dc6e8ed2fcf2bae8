#include "ggml-cpu-pq.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "pq-cpu.h"

#include <algorithm>
#include <cstring>

namespace {

constexpr size_t SCRATCH_ALIGN = 64; // a cache line, and the widest vector

size_t aligned(size_t n) {
    return GGML_PAD(n, SCRATCH_ALIGN);
}

pq_type pq_type_of(ggml_type type) {
    return ggml_is_pq(type) ? (pq_type) (type - GGML_TYPE_PQ4) : PQ_TYPE_COUNT;
}

// SET_ROWS into, or CPY into, a PQ tensor
bool encode_params(const ggml_tensor * op, pq_encode_params & p) {
    const bool          rows     = op->op == GGML_OP_SET_ROWS;
    const ggml_tensor * x        = op->src[0];
    const ggml_tensor * codebook = op->src[rows ? GGML_PQ_SRC_SET_ROWS : GGML_PQ_SRC_CPY];
    if (!codebook || !ggml_is_pq(op->type) || (x->type != GGML_TYPE_F32 && x->type != GGML_TYPE_F16)) {
        return false;
    }
    const int64_t n_head_kv = codebook->ne[1];

    p           = {};
    p.type      = pq_type_of(op->type);
    p.n_head_kv = (int32_t) n_head_kv;
    p.x_f16     = x->type == GGML_TYPE_F16;
    p.x         = x->data;
    p.codes     = (uint8_t *) op->data;
    p.codebook  = (const uint8_t *) codebook->data;

    if (rows) {
        // x [n_head_kv*D, n_rows], indices I64 [n_rows], dst [n_head_kv*D, n_cells]
        const ggml_tensor * idx = op->src[1];
        if (x->ne[0] % n_head_kv != 0 || x->ne[2] != 1 || x->ne[3] != 1 || op->ne[2] != 1 || op->ne[3] != 1 ||
            idx->type != GGML_TYPE_I64 || !ggml_is_contiguous(idx)) {
            return false;
        }
        p.D                = (int32_t) (x->ne[0] / n_head_kv);
        p.n_rows           = x->ne[1];
        p.x_row_stride     = x->nb[1];
        p.x_head_stride    = p.D * ggml_type_size(x->type);
        p.codes_row_stride = op->nb[1];
        p.row_idx          = (const int64_t *) idx->data;
    } else {
        // x and dst [D, n_head_kv, n_cells]
        if (x->ne[1] != n_head_kv || x->ne[3] != 1 || !ggml_are_same_shape(x, op) ||
            op->nb[1] != ggml_row_size(op->type, x->ne[0])) {
            return false;
        }
        p.D                = (int32_t) x->ne[0];
        p.n_rows           = x->ne[2];
        p.x_row_stride     = x->nb[2];
        p.x_head_stride    = x->nb[1];
        p.codes_row_stride = op->nb[2];
    }
    bool has_transform;
    if (x->nb[0] != ggml_type_size(x->type) || !ggml_pq_codebook_fits(codebook, op->type, p.D, &has_transform)) {
        return false;
    }
    p.has_transform = has_transform;
    return true;
}

// CPY of PQ codes [D, n_head_kv, n_cells] to f32
bool decode_params(const ggml_tensor * op, pq_decode_params & p) {
    const ggml_tensor * codes    = op->src[0];
    const ggml_tensor * codebook = op->src[GGML_PQ_SRC_CPY];
    bool has_transform;
    if (op->type != GGML_TYPE_F32 || !ggml_is_pq(codes->type) || !codebook || codes->ne[1] != codebook->ne[1] ||
        codes->ne[3] != 1 || !ggml_are_same_shape(codes, op) || op->nb[0] != sizeof(float) ||
        codes->nb[1] != ggml_row_size(codes->type, codes->ne[0]) ||
        !ggml_pq_codebook_fits(codebook, codes->type, (int32_t) codes->ne[0], &has_transform)) {
        return false;
    }
    p                  = {};
    p.type             = pq_type_of(codes->type);
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
    return true;
}

void f16_to_float(const void * src, float * dst, int64_t n) {
    ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) src, dst, n);
}

void f32_to_float(const void * src, float * dst, int64_t n) {
    memcpy(dst, src, n * sizeof(float));
}

bool attn_side(const ggml_tensor * t, const ggml_tensor * codebook, pq_attn_side & s) {
    s               = {};
    s.type          = pq_type_of(t->type);
    s.D             = (int32_t) t->ne[0];
    s.data          = (const uint8_t *) t->data;
    s.row_stride    = t->nb[1];
    s.head_stride   = t->nb[2];
    s.stream_stride = t->nb[3];
    if (ggml_is_pq(t->type)) {
        bool has_transform;
        if (!codebook || codebook->ne[1] != t->ne[2] || !ggml_pq_codebook_fits(codebook, t->type, s.D, &has_transform)) {
            return false;
        }
        s.codebook      = (const uint8_t *) codebook->data;
        s.has_transform = has_transform;
        return true;
    }
    if (t->nb[0] != ggml_type_size(t->type)) {
        return false;
    }
    switch (t->type) {
        case GGML_TYPE_F32: s.to_float = f32_to_float; break;
        case GGML_TYPE_F16: s.to_float = f16_to_float; break;
        default:            s.to_float = (void (*)(const void *, float *, int64_t)) ggml_get_type_traits(t->type)->to_float;
    }
    return s.to_float != nullptr && s.D % ggml_blck_size(t->type) == 0 && s.D <= PQ_MAX_D;
}

bool attn_params(const ggml_tensor * op, pq_attn_params & p) {
    const ggml_tensor * q     = op->src[0];
    const ggml_tensor * k     = op->src[1];
    const ggml_tensor * v     = op->src[2];
    const ggml_tensor * mask  = op->src[3];
    const ggml_tensor * sinks = op->src[4];

    p = {};
    if (q->type != GGML_TYPE_F32 || op->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float) || op->nb[0] != sizeof(float) ||
        k->ne[2] != v->ne[2] || k->ne[1] != v->ne[1] || q->ne[2] % k->ne[2] != 0 || q->ne[3] != k->ne[3] || v->ne[3] != k->ne[3] ||
        q->ne[0] != k->ne[0] || op->ne[0] != v->ne[0] ||
        !attn_side(k, op->src[GGML_PQ_SRC_FLASH_ATTN_K], p.k) || !attn_side(v, op->src[GGML_PQ_SRC_FLASH_ATTN_V], p.v)) {
        return false;
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
            return false;
        }
        p.mask               = (const uint8_t *) mask->data;
        p.mask_token_stride  = mask->nb[1];
        p.mask_head_stride   = mask->nb[2];
        p.mask_stream_stride = mask->nb[3];
        p.n_head_mask        = (int32_t) mask->ne[2];
        p.n_stream_mask      = (int32_t) mask->ne[3];
    }
    p.sinks = sinks ? (const float *) sinks->data : nullptr;

    p.scale         = ggml_get_op_params_f32(op, 0);
    p.max_bias      = ggml_get_op_params_f32(op, 1);
    p.logit_softcap = ggml_get_op_params_f32(op, 2);

    p.dst               = (float *) op->data;
    p.dst_head_stride   = op->nb[1];
    p.dst_token_stride  = op->nb[2];
    p.dst_stream_stride = op->nb[3];
    return true;
}

// Runs n items on all threads; an idle thread takes the next one.
template <typename F> void for_each_item(const ggml_compute_params * params, int64_t n, F && run) {
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);
    for (int64_t i = params->ith; i < n; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        run(i);
    }
}

uint8_t * thread_scratch(const ggml_compute_params * params, size_t shared, size_t per_thread) {
    GGML_ASSERT(params->wsize >= SCRATCH_ALIGN + aligned(shared) + params->nth * aligned(per_thread));
    uint8_t * base = (uint8_t *) GGML_PAD((uintptr_t) params->wdata, SCRATCH_ALIGN);
    return base + aligned(shared) + params->ith * aligned(per_thread);
}

} // namespace

bool ggml_cpu_pq_supports_op(const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_SET_ROWS: {
            pq_encode_params p;
            return encode_params(op, p);
        }
        case GGML_OP_CPY: {
            if (op->type == op->src[0]->type) {
                return true; // copies bytes
            }
            pq_encode_params e;
            pq_decode_params d;
            return encode_params(op, e) || decode_params(op, d);
        }
        case GGML_OP_DUP:
        case GGML_OP_CONT:
            return op->type == op->src[0]->type; // copies bytes
        case GGML_OP_FLASH_ATTN_EXT: {
            pq_attn_params p;
            return attn_params(op, p);
        }
        default:
            return false;
    }
}

bool ggml_cpu_pq_work_size(int n_threads, const ggml_tensor * op, size_t * size) {
    if (!ggml_pq_has_operand(op)) {
        return false;
    }
    size_t shared     = 0;
    size_t per_thread = 0;
    if (op->op == GGML_OP_FLASH_ATTN_EXT) {
        pq_attn_params p;
        GGML_ASSERT(attn_params(op, p));
        shared     = pq_attn_partials_size(&p);
        per_thread = pq_attn_scratch_size(&p);
    } else if (op->type != op->src[0]->type) {
        pq_encode_params e;
        pq_decode_params d;
        if (encode_params(op, e)) {
            per_thread = pq_encode_scratch_size(&e);
        } else {
            GGML_ASSERT(decode_params(op, d));
            per_thread = pq_decode_scratch_size(&d);
        }
    } else {
        return false;
    }
    *size = SCRATCH_ALIGN + aligned(shared) + n_threads * aligned(per_thread);
    return true;
}

bool ggml_cpu_pq_compute_forward(ggml_compute_params * params, ggml_tensor * op) {
    if (!ggml_pq_has_operand(op)) {
        return false;
    }
    if (op->op == GGML_OP_FLASH_ATTN_EXT) {
        pq_attn_params p;
        GGML_ASSERT(attn_params(op, p));
        const size_t shared   = pq_attn_partials_size(&p);
        uint8_t    * partials = (uint8_t *) GGML_PAD((uintptr_t) params->wdata, SCRATCH_ALIGN);
        uint8_t    * scratch  = thread_scratch(params, shared, pq_attn_scratch_size(&p));
        for_each_item(params, pq_attn_n_items(&p), [&](int64_t i) { pq_attn_item(&p, i, partials, scratch); });
        const int64_t n_reduce = pq_attn_n_reduce_items(&p);
        if (n_reduce > 0) {
            ggml_barrier(params->threadpool);
            for (int64_t i = params->ith; i < n_reduce; i += params->nth) {
                pq_attn_reduce_item(&p, i, partials, scratch);
            }
        }
        return true;
    }
    if (op->type == op->src[0]->type) {
        return false;
    }
    pq_encode_params e;
    if (encode_params(op, e)) {
        uint8_t * scratch = thread_scratch(params, 0, pq_encode_scratch_size(&e));
        for_each_item(params, pq_encode_n_items(&e), [&](int64_t i) { pq_encode_item(&e, i, scratch); });
        return true;
    }
    pq_decode_params d;
    GGML_ASSERT(decode_params(op, d));
    uint8_t * scratch = thread_scratch(params, 0, pq_decode_scratch_size(&d));
    for_each_item(params, pq_decode_n_items(&d), [&](int64_t i) { pq_decode_item(&d, i, scratch); });
    return true;
}
