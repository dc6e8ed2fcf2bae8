#include "pq-cuda.h"
#include "pq-prefill-kernel.cuh"

const char * pq_cuda_prefill_unsupported(const pq_attn_params & p) {
    if (p.k.D != PQ_PREFILL_D || p.v.D != PQ_PREFILL_D) {
        return "the maps are for D = 128";
    }
    for (const pq_attn_side * s : { &p.k, &p.v }) {
        if (s->type >= PQ_TYPE_COUNT || !s->has_transform) {
            return "a side has no map";
        }
    }
    if (p.logit_softcap != 0.0f || p.sinks) {
        return "scores without q.mu are not good enough for a softcap or for sinks";
    }
    const uintptr_t floats = (uintptr_t) p.q | p.q_token_stride | p.q_head_stride | p.q_stream_stride |
                             (uintptr_t) p.dst | p.dst_token_stride | p.dst_head_stride | p.dst_stream_stride;
    const uintptr_t halves = (uintptr_t) p.tail.k | p.tail.k_row_stride | p.tail.k_head_stride | p.tail.k_stream_stride |
                             (uintptr_t) p.tail.v | p.tail.v_row_stride | p.tail.v_head_stride | p.tail.v_stream_stride;
    if (floats % 8 != 0 || (p.tail.n > 0 && halves % 4 != 0)) {
        return "rows of queries or results are not at multiples of 8 bytes, or those of the tail not of 4";
    }
    return nullptr;
}

static pq_prefill_args get_args(const pq_cuda_prefill_step & s) {
    const pq_attn_params & p = s.p;
    pq_prefill_args a = {};
    a.s = s;
    a.k = pq_get_codebook_layout(p.k.D, p.k.has_transform);
    a.v = pq_get_codebook_layout(p.v.D, p.v.has_transform);
    a.n_group       = p.n_head / p.n_head_kv;
    a.n_row_blocks  = (int32_t) ((p.n_q * a.n_group + PQ_PREFILL_ROWS - 1) / PQ_PREFILL_ROWS);
    a.n_slot_blocks = (int32_t) ((p.tail.n + PQ_PREFILL_ROWS - 1) / PQ_PREFILL_ROWS);
    return a;
}

static int64_t n_mask_blocks(const pq_attn_params & p) {
    return (p.tail.n + PQ_PREFILL_THREADS - 1) / PQ_PREFILL_THREADS * ((p.n_q + PQ_PREFILL_TOKENS - 1) / PQ_PREFILL_TOKENS);
}

cudaError_t pq_cuda_prefill_begin(const pq_cuda_prefill_step & s, cudaStream_t stream) {
    const pq_prefill_args a = get_args(s);
    const int64_t n_blocks = s.p.n_head_kv * (a.n_row_blocks + 2 * a.n_slot_blocks) + n_mask_blocks(s.p);
    return pq_launch(pq_prefill_begin_kernel, dim3((unsigned) n_blocks), PQ_PREFILL_THREADS, 0, stream, a);
}

cudaError_t pq_cuda_prefill_end(const pq_cuda_prefill_step & s, cudaStream_t stream) {
    const pq_prefill_args a = get_args(s);
    const int64_t n_blocks = s.p.n_head_kv * a.n_row_blocks + n_mask_blocks(s.p);
    return pq_launch(pq_prefill_end_kernel, dim3((unsigned) n_blocks), PQ_PREFILL_THREADS, 0, stream, a);
}
