#include "pq-cuda.h"
#include "pq-prefill-kernel.cuh"

#include <algorithm>

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
    a.n_mask_blocks = (int32_t) ((p.tail.n + PQ_PREFILL_THREADS - 1) / PQ_PREFILL_THREADS * ((p.n_q + PQ_PREFILL_TOKENS - 1) / PQ_PREFILL_TOKENS));
    return a;
}

// ---- rows ----

typedef void (*rows_kernel_t)(pq_prefill_rows_args);

template <int TYPE>
static rows_kernel_t get_rows_kernel(bool aligned) {
    return aligned ? pq_prefill_rows_kernel<TYPE, true> : pq_prefill_rows_kernel<TYPE, TYPE != PQ_TYPE_PQ3>;
}

// Sides of the same type in one launch
static cudaError_t look_up_rows(const pq_cuda_prefill_step & s, int first, int n_sides, const pq_cuda_device_props & device, cudaStream_t stream) {
    const bool last = first + n_sides == 2;
    const pq_attn_params & p = s.p;
    pq_prefill_rows_args a = {};
    uintptr_t codes = 0;
    for (int i = 0; i < n_sides; i++) {
        const pq_attn_side     & from = first + i == 0 ? p.k : p.v;
        const pq_codebook_layout l    = pq_get_codebook_layout(from.D, from.has_transform);
        a.side[i] = { from.data, from.codebook, first + i == 0 ? s.k_rows : s.v_rows, from.row_stride, from.head_stride, l.head_bytes, l.centroids };
        codes |= (uintptr_t) from.data | from.row_stride | from.head_stride;
    }
    a.cell_low     = s.cell_low;
    a.cell_high    = s.cell_high;
    a.n_slots      = p.tail.n;
    a.n_rows       = (int32_t) p.n_kv;
    a.n_head_kv    = p.n_head_kv;
    a.after_encode = s.after_encode && p.tail.n > 0; // or the new codes are read
    a.tail_follows = a.after_encode && last;
    const int type = first == 0 ? p.k.type : p.v.type;
    if ((type == PQ_TYPE_PQ4 && codes % 4 != 0) || (type == PQ_TYPE_PQ2 && codes % 2 != 0)) {
        return cudaErrorMisalignedAddress;
    }
    // All blocks run at once: one more would start when the others have ended.
    const int n_tiles = (a.n_rows + PQ_ROWS_TILE - 1) / PQ_ROWS_TILE;
    const int n_heads = n_sides * p.n_head_kv;
    const dim3 grid((unsigned) std::min(n_tiles, std::max(1, PQ_ROWS_BLOCKS * device.n_sm / n_heads)), (unsigned) n_heads);
    const rows_kernel_t kernel = type == PQ_TYPE_PQ4 ? get_rows_kernel<PQ_TYPE_PQ4>(true) :
                                 type == PQ_TYPE_PQ3 ? get_rows_kernel<PQ_TYPE_PQ3>(codes % 2 == 0) :
                                                       get_rows_kernel<PQ_TYPE_PQ2>(true);
    return pq_launch(kernel, grid, PQ_PREFILL_THREADS, PQ_ROWS_TABLE, stream, a);
}

cudaError_t pq_cuda_prefill_begin(const pq_cuda_prefill_step & step, cudaStream_t stream) {
    if (step.p.n_kv < 1 || step.p.n_kv > INT32_MAX / 2) {
        return cudaErrorInvalidValue;
    }
    pq_cuda_device_props device;
    cudaError_t err = pq_cuda_get_device_props(&device);
    if (err != cudaSuccess) {
        return err;
    }
    pq_cuda_prefill_step s = step;
    s.after_encode = step.after_encode && device.cc >= 90; // before that no kernel begins early
    const pq_prefill_args a = get_args(s);
    const int64_t n_tail_blocks = 2 * s.p.n_head_kv * a.n_slot_blocks;
    const int64_t n_blocks      = s.p.n_head_kv * a.n_row_blocks + a.n_mask_blocks + (s.after_encode ? 1 : n_tail_blocks);
    err = pq_launch(pq_prefill_begin_kernel, dim3((unsigned) n_blocks), PQ_PREFILL_THREADS, 0, stream, a);
    if (err == cudaSuccess) {
        const int n_sides = s.p.k.type == s.p.v.type ? 2 : 1;
        err = look_up_rows(s, 0, n_sides, device, stream);
        if (err == cudaSuccess && n_sides == 1) {
            err = look_up_rows(s, 1, 1, device, stream);
        }
    }
    if (err == cudaSuccess && s.after_encode && n_tail_blocks > 0) {
        err = pq_launch(pq_prefill_tail_kernel, dim3((unsigned) n_tail_blocks), PQ_PREFILL_THREADS, 0, stream, a);
    }
    return err;
}

cudaError_t pq_cuda_prefill_end(const pq_cuda_prefill_step & s, cudaStream_t stream) {
    const pq_prefill_args a = get_args(s);
    const int64_t n_blocks = s.p.n_head_kv * a.n_row_blocks + a.n_mask_blocks;
    return pq_launch(pq_prefill_end_kernel, dim3((unsigned) n_blocks), PQ_PREFILL_THREADS, 0, stream, a);
}
