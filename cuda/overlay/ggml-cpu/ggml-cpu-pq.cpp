#include "ggml-cpu-pq.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "ggml-pq-params.h"
#include "pq-kernels.h"

#include <algorithm>
#include <cstring>

namespace {

constexpr size_t SCRATCH_ALIGN = 64; // a cache line, and the widest vector

size_t aligned(size_t n) {
    return GGML_PAD(n, SCRATCH_ALIGN);
}

// test-backend-ops asks for the reference: it compares the kernels of other instruction sets, and other backends, with the scalar ones.
const pq_kernels * kernels_for(const ggml_compute_params * params) {
    return params->use_ref ? pq_kernels_scalar() : pq_kernels_current();
}

bool encode_params(const ggml_tensor * op, pq_encode_params & p) {
    return !ggml_pq_encode_params(op, p);
}

bool decode_params(const ggml_tensor * op, pq_decode_params & p) {
    return !ggml_pq_decode_params(op, p);
}

void f32_to_float(const void * src, float * dst, int64_t n) {
    memcpy(dst, src, n * sizeof(float));
}

// Tells the kernels how to read a side that holds no codes.
bool set_to_float(const ggml_tensor * t, pq_attn_side & s) {
    switch (t->type) {
        case GGML_TYPE_PQ4:
        case GGML_TYPE_PQ3:
        case GGML_TYPE_PQ2:
        case GGML_TYPE_F16: return true;
        case GGML_TYPE_F32: s.to_float = f32_to_float; return true;
        default:            s.to_float = (void (*)(const void *, float *, int64_t)) ggml_get_type_traits(t->type)->to_float;
    }
    return s.to_float != nullptr && s.D % ggml_blck_size(t->type) == 0;
}

bool attn_params(const ggml_tensor * op, pq_attn_params & p) {
    return !ggml_pq_attn_params(op, p) && set_to_float(op->src[1], p.k) && set_to_float(op->src[2], p.v);
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
    const pq_kernels * kernels = kernels_for(params);
    if (op->op == GGML_OP_FLASH_ATTN_EXT) {
        pq_attn_params p;
        GGML_ASSERT(attn_params(op, p));
        const size_t shared   = pq_attn_partials_size(&p);
        uint8_t    * partials = (uint8_t *) GGML_PAD((uintptr_t) params->wdata, SCRATCH_ALIGN);
        uint8_t    * scratch  = thread_scratch(params, shared, pq_attn_scratch_size(&p));
        pq_attn_scratch_begin(scratch);
        for_each_item(params, pq_attn_n_items(&p), [&](int64_t i) { kernels->attn_item(&p, i, partials, scratch); });
        const int64_t n_reduce = pq_attn_n_reduce_items(&p);
        if (n_reduce > 0) {
            ggml_barrier(params->threadpool);
            for (int64_t i = params->ith; i < n_reduce; i += params->nth) {
                kernels->attn_reduce_item(&p, i, partials, scratch);
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
        for_each_item(params, pq_encode_n_items(&e), [&](int64_t i) { kernels->encode_item(&e, i, scratch); });
        return true;
    }
    pq_decode_params d;
    GGML_ASSERT(decode_params(op, d));
    uint8_t * scratch = thread_scratch(params, 0, pq_decode_scratch_size(&d));
    for_each_item(params, pq_decode_n_items(&d), [&](int64_t i) { kernels->decode_item(&d, i, scratch); });
    return true;
}
