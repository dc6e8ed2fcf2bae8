#include "pq-encode.cuh"
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

static cudaError_t look_up_rows(const pq_cuda_prefill_step & s, bool is_v, bool settled, int max_blocks, cudaStream_t stream) {
    const pq_attn_side     & from = is_v ? s.p.v : s.p.k;
    const pq_codebook_layout l    = pq_get_codebook_layout(from.D, from.has_transform);
    pq_prefill_rows_args a = {};
    a.codes             = from.data;
    a.codebook          = from.codebook;
    a.rows              = is_v ? s.v_rows : s.k_rows;
    a.codes_row_stride  = from.row_stride;
    a.codes_head_stride = from.head_stride;
    a.head_bytes        = l.head_bytes;
    a.centroids         = l.centroids;
    a.cell_low          = s.cell_low;
    a.cell_high         = s.cell_high;
    a.n_slots           = s.p.tail.n;
    a.n_rows            = (int32_t) s.p.n_kv;
    a.settled           = settled;
    const uintptr_t codes = (uintptr_t) from.data | from.row_stride | from.head_stride;
    if ((from.type == PQ_TYPE_PQ4 && codes % 4 != 0) || (from.type == PQ_TYPE_PQ2 && codes % 2 != 0)) {
        return cudaErrorMisalignedAddress;
    }
    const int  n_tiles = (a.n_rows + PQ_ROWS_TILE - 1) / PQ_ROWS_TILE;
    const dim3 grid((unsigned) std::min(n_tiles, std::max(1, max_blocks / s.p.n_head_kv)), (unsigned) s.p.n_head_kv);
    const rows_kernel_t kernel = from.type == PQ_TYPE_PQ4 ? get_rows_kernel<PQ_TYPE_PQ4>(true) :
                                 from.type == PQ_TYPE_PQ3 ? get_rows_kernel<PQ_TYPE_PQ3>(codes % 2 == 0) :
                                                            get_rows_kernel<PQ_TYPE_PQ2>(true);
    return pq_launch(kernel, grid, PQ_ROWS_THREADS, PQ_ROWS_TABLE, stream, a);
}

// Whether the rows of the tail that rows to encode become can be read where these are, and if so, which slot of theirs is the first of this tail.
static bool finds_new_rows(const pq_attn_params & p, const pq_encode_params * rows, int64_t * slot0) {
    if (p.tail.n == 0 || !rows[0].tail || !rows[1].tail || rows[0].tail_idx != rows[1].tail_idx || rows[0].n_rows != rows[1].n_rows || rows[0].n_rows > INT32_MAX) {
        return false;
    }
    const uint8_t * const tails[2] = { p.tail.k, p.tail.v };
    const size_t strides[2] = { p.tail.k_row_stride, p.tail.v_row_stride }, head_strides[2] = { p.tail.k_head_stride, p.tail.v_head_stride };
    for (int i = 0; i < 2; i++) {
        const size_t pair = 2 * (rows[i].x_f16 ? sizeof(__half) : sizeof(float));
        const ptrdiff_t lead = tails[i] - rows[i].tail, stride = (ptrdiff_t) strides[i];
        if (rows[i].D != PQ_PREFILL_D || rows[i].n_head_kv != p.n_head_kv || rows[i].tail_row_stride != strides[i] ||
            head_strides[i] != PQ_PREFILL_D * sizeof(uint16_t) || ((uintptr_t) rows[i].x | rows[i].x_row_stride | rows[i].x_head_stride) % pair != 0 ||
            lead < 0 || lead % stride != 0 || (i > 0 && lead / stride != *slot0)) {
            return false;
        }
        *slot0 = lead / stride;
    }
    return true;
}

cudaError_t pq_cuda_prefill_begin(const pq_cuda_prefill_step & s, const pq_encode_params * new_rows, cudaStream_t stream) {
    if (s.p.n_kv < 1 || s.p.n_kv > INT32_MAX / 2) {
        return cudaErrorInvalidValue;
    }
    pq_cuda_device_props device;
    cudaError_t err = pq_cuda_get_device_props(&device);
    if (err != cudaSuccess) {
        return err;
    }
    pq_prefill_args a = get_args(s);
    const bool beside = new_rows && pq_encodes_tiles(new_rows, 2) && finds_new_rows(s.p, new_rows, &a.new_rows.slot0);
    if (beside) {
        for (int i = 0; i < 2; i++) {
            a.new_rows.x[i]           = (const uint8_t *) new_rows[i].x;
            a.new_rows.row_stride[i]  = new_rows[i].x_row_stride;
            a.new_rows.head_stride[i] = new_rows[i].x_head_stride;
            a.new_rows.f16[i]         = new_rows[i].x_f16;
        }
        a.new_rows.slots = new_rows->tail_idx;
        a.new_rows.n     = (int32_t) new_rows->n_rows;
    } else if (new_rows) {
        err = pq_cuda_encode(new_rows, 2, stream);
    }
    // of lookups, as many as can run at once, or one to a multiprocessor, which is hardly slower and leaves room
    const int n_per_sm = beside && pq_device_has_pdl((const void *) pq_prefill_begin_kernel) ? 1 : std::min(PQ_ROWS_BLOCKS, (int) (device.smem_optin / (PQ_ROWS_TABLE + 1024)));
    const int n_blocks = std::max(1, n_per_sm) * device.n_sm;
    if (err == cudaSuccess && beside) {
        err = pq_encode(new_rows, 1, false, stream);
    }
    if (err == cudaSuccess) {
        err = look_up_rows(s, false, beside, n_blocks, stream);
    }
    if (err == cudaSuccess) {
        err = look_up_rows(s, true, true, n_blocks, stream);
    }
    if (err == cudaSuccess && beside) {
        err = pq_encode(new_rows + 1, 1, true, stream);
    }
    if (err != cudaSuccess) {
        return err;
    }
    const int64_t n_grid = s.p.n_head_kv * (a.n_row_blocks + 2 * a.n_slot_blocks) + a.n_mask_blocks + 1;
    return pq_launch(pq_prefill_begin_kernel, dim3((unsigned) n_grid), PQ_PREFILL_THREADS, 0, stream, a);
}

cudaError_t pq_cuda_prefill_end(const pq_cuda_prefill_step & s, cudaStream_t stream) {
    const pq_prefill_args a = get_args(s);
    const int64_t n_blocks = s.p.n_head_kv * a.n_row_blocks + a.n_mask_blocks;
    return pq_launch(pq_prefill_end_kernel, dim3((unsigned) n_blocks), PQ_PREFILL_THREADS, 0, stream, a);
}
