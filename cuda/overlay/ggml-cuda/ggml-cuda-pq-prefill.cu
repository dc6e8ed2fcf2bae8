#include "ggml-cuda-pq-prefill.h"

#include "ggml-cuda/convert.cuh"
#include "ggml-cuda/fattn-common.cuh"
#include "ggml-cuda/fattn.cuh"
#include "ggml-pq-params.h"
#include "pq-cuda.h"
#include "pq-launch.cuh"

// Attention to many tokens: the part of the cache in use as f16 rows, and the backend's own flash attention on them. Scratch is as large as that part, and
// goes back to the pool after the op. There are two ways:
//
//   in the space of codes   rows of K and V are looked up and not mapped back; queries and results are mapped instead (pq-prefill-kernel.cuh). For contexts
//                           that are long enough, of D = 128, with maps on both sides, without softcap and sinks
//   as rows of K and V      in all other cases
//
// For the latter columns of the scratch are the cells of one stream, padded to FATTN_KQ_STRIDE: K and V are f16 [n_head_kv][n_cols][D], the mask is
// f16 [n_q][n_cols]. The exact tail adds none: its rows, and the columns of its mask, go to the places of their cells.

static int64_t get_n_cols(const pq_attn_params & p) {
    return GGML_PAD(p.n_kv, FATTN_KQ_STRIDE);
}

struct mask_source {
    const char * data; // NULL: zeros
    size_t       token_stride;
};

struct tail_source {
    const half     * mask; // [n_q][n]; NULL: no tail
    const uint16_t * cell_low;
    const uint16_t * cell_high;
    size_t           token_stride; // bytes
    int64_t          n;
};

static constexpr int MASK_GROUP   = 8;   // columns of a thread: 16 bytes
static constexpr int MASK_THREADS = 256;
static constexpr int MASK_COLS    = MASK_GROUP * MASK_THREADS;
static constexpr int MASK_TOKENS  = 8;   // of a block: finding the slots of its columns is worth more than one row

// Writes the mask of all columns, and where the row of each column comes from. settled: masks and cells were complete before the kernel ahead began; they are then
// read while that one still runs, but what is written may lie where it reads.
// grid: (n_cols / 2048, n_q / 8)
static __global__ void __launch_bounds__(MASK_THREADS) merge_masks(const mask_source kv, const tail_source tail, half * dst,
                                                                   int32_t * row_source, int64_t n_kv, int64_t n_cols, int64_t n_q, bool settled) {
    __shared__ int32_t slots[MASK_COLS]; // of the block's columns; negative: none
    pq_pdl_launch_next(); // the decoder waits for this kernel's end by itself
    if (!settled) {
        pq_pdl_wait();
    }
    const int64_t block0 = (int64_t) blockIdx.x * MASK_COLS;
    for (int i = threadIdx.x; i < MASK_COLS; i += MASK_THREADS) {
        slots[i] = block0 + i < n_kv ? PQ_ROW_CODES : PQ_ROW_ZERO;
    }
    __syncthreads();
    for (int64_t slot = threadIdx.x; slot < tail.n; slot += MASK_THREADS) {
        const int32_t cell = (int32_t) ((uint32_t) tail.cell_low[slot] | (uint32_t) tail.cell_high[slot] << 16);
        if (cell >= block0 && cell < min(block0 + MASK_COLS, n_kv)) {
            slots[cell - block0] = (int32_t) slot;
        }
    }
    __syncthreads();
    const int     i0     = threadIdx.x * MASK_GROUP;
    const int64_t col0   = block0 + i0;
    const int64_t token0 = (int64_t) blockIdx.y * MASK_TOKENS;
    const int     n      = col0 < n_cols ? (int) min((int64_t) MASK_TOKENS, n_q - token0) : 0;
    int32_t slot[MASK_GROUP];
    bool    any_slot = false;
#pragma unroll
    for (int i = 0; i < MASK_GROUP; i++) {
        slot[i]  = slots[i0 + i];
        any_slot = any_slot || slot[i] >= 0;
    }
    union { half h[MASK_GROUP]; uint4 u; } v[MASK_TOKENS];
#pragma unroll
    for (int t = 0; t < MASK_TOKENS; t++) {
        if (t >= n) {
            break;
        }
        const half * src = (const half *) (kv.data + (token0 + t) * kv.token_stride) + col0;
        if (kv.data && col0 + MASK_GROUP <= n_kv && (uintptr_t) src % sizeof(uint4) == 0) {
            v[t].u = *(const uint4 *) src;
        } else {
#pragma unroll
            for (int i = 0; i < MASK_GROUP; i++) {
                v[t].h[i] = col0 + i >= n_kv ? __float2half(-INFINITY) : kv.data ? src[i] : __float2half(0.0f);
            }
        }
        if (any_slot) {
            const half * tail_row = (const half *) ((const char *) tail.mask + (token0 + t) * tail.token_stride);
#pragma unroll
            for (int i = 0; i < MASK_GROUP; i++) {
                if (slot[i] >= 0) {
                    v[t].h[i] = tail_row[slot[i]];
                }
            }
        }
    }
    if (settled) {
        pq_pdl_wait();
    }
    if (n > 0 && blockIdx.y == 0) {
        *(int4 *) (row_source + col0)     = make_int4(slot[0], slot[1], slot[2], slot[3]);
        *(int4 *) (row_source + col0 + 4) = make_int4(slot[4], slot[5], slot[6], slot[7]);
    }
#pragma unroll
    for (int t = 0; t < MASK_TOKENS; t++) {
        if (t < n) {
            *(uint4 *) (dst + (token0 + t) * n_cols + col0) = v[t].u;
        }
    }
}

struct copy_source {
    const char * data; // f16 [n_head_kv][n][D], by strides
    size_t       row_stride;
    size_t       head_stride;
};

static constexpr int COPY_ROWS    = 32;
static constexpr int COPY_THREADS = 256;

// Copies rows of a side without codes, or of the tail in their place. One that no query sees becomes 0: its probability is 0, but 0
// times NaN is not.
// grid: (n_cols / 32, n_head_kv)
static __global__ void __launch_bounds__(COPY_THREADS) copy_visible_rows(
        const copy_source src, const copy_source tail, const int32_t * row_source, half * dst, int64_t n_cols, int D, const half * mask,
        int64_t n_q) {
    __shared__ int source[COPY_ROWS];
    const int64_t row0 = (int64_t) blockIdx.x * COPY_ROWS;
    const int     head = blockIdx.y;
    const int     lane = threadIdx.x % COPY_ROWS;
    if (threadIdx.x < COPY_ROWS) {
        source[lane] = PQ_ROW_ZERO;
    }
    __syncthreads();
    for (int64_t q = threadIdx.x / COPY_ROWS; q < n_q; q += COPY_THREADS / COPY_ROWS) {
        if (__half2float(mask[q * n_cols + row0 + lane]) != -INFINITY) {
            source[lane] = row_source[row0 + lane];
            break;
        }
    }
    __syncthreads();
    const int n_pieces = D / 8; // of 16 bytes
    for (int i = threadIdx.x; i < COPY_ROWS * n_pieces; i += COPY_THREADS) {
        const int     r     = i / n_pieces;
        const int     piece = i % n_pieces;
        const int64_t row   = row0 + r;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (source[r] != PQ_ROW_ZERO) {
            const copy_source & from = source[r] >= 0 ? tail : src;
            v = *((const uint4 *) (from.data + (source[r] >= 0 ? source[r] : row) * from.row_stride + head * from.head_stride) + piece);
        }
        *((uint4 *) (dst + (head * n_cols + row) * D) + piece) = v;
    }
}

// A plain side of any type that converts to f16: the rows of one stream as f16. `converted` keeps what had to be converted.
static copy_source plain_side(const ggml_tensor * t, int64_t s, ggml_cuda_pool_alloc<half> & converted, cudaStream_t stream) {
    const char * data = (const char *) t->data + s * t->nb[3];
    if (t->type == GGML_TYPE_F16) {
        return { data, t->nb[1], t->nb[2] };
    }
    const size_t size = ggml_type_size(t->type);
    half * f16 = converted.alloc(t->ne[0] * t->ne[1] * t->ne[2]);
    ggml_get_to_fp16_nc_cuda(t->type)(data, f16, t->ne[0], t->ne[1], t->ne[2], 1, t->nb[1] / size, t->nb[2] / size, t->nb[3] / size, stream);
    return { (const char *) f16, t->ne[0] * sizeof(half), t->ne[0] * t->ne[1] * sizeof(half) };
}

static bool plain_side_ok(const ggml_tensor * t) {
    if (ggml_is_pq(t->type)) {
        return true;
    }
    if (t->type == GGML_TYPE_F16) {
        return t->nb[1] % 16 == 0 && t->nb[2] % 16 == 0 && t->nb[3] % 16 == 0;
    }
    const size_t size = ggml_type_size(t->type);
    return ggml_get_to_fp16_nc_cuda(t->type) != nullptr && t->nb[1] % size == 0 && t->nb[2] % size == 0 && t->nb[3] % size == 0;
}

// The op as flash attention of one stream on f16 tensors, without data. ops: K, V, mask
static void make_f16_op(const ggml_tensor * op, int64_t n_cols, ggml_tensor & fa, ggml_tensor & q, ggml_tensor (&ops)[3]) {
    fa       = *op;
    fa.ne[3] = 1;
    fa.view_src = nullptr;
    ggml_set_op_params_i32(&fa, 4, 0); // how many cells a query sees at most; the mask says it too
    q       = *op->src[0];
    q.ne[3] = 1;
    for (int i = 0; i < 3; i++) {
        ggml_tensor & t = ops[i];
        t       = {};
        t.type  = GGML_TYPE_F16;
        t.ne[0] = i < 2 ? op->src[1 + i]->ne[0] : n_cols;
        t.ne[1] = i < 2 ? n_cols : op->src[0]->ne[1];
        t.ne[2] = i < 2 ? op->src[1 + i]->ne[2] : 1;
        t.ne[3] = 1;
        t.nb[0] = sizeof(half);
        for (int d = 1; d < GGML_MAX_DIMS; d++) {
            t.nb[d] = t.nb[d - 1] * t.ne[d - 1];
        }
        t.buffer = op->buffer;
    }
    for (int i = 5; i < GGML_MAX_SRC; i++) {
        fa.src[i] = nullptr;
    }
    fa.src[0] = &q;
    fa.src[1] = &ops[0];
    fa.src[2] = &ops[1];
    fa.src[3] = &ops[2];
}

bool ggml_cuda_pq_prefill_supported(int device, const ggml_tensor * op, const pq_attn_params & p) {
    // no kernel of the backend's flash attention is compiled with a softcap for other head sizes
    if (p.logit_softcap != 0.0f && p.k.D != 128 && p.k.D != 256) {
        return false;
    }
    if (p.n_head_mask > 1 || !plain_side_ok(op->src[1]) || !plain_side_ok(op->src[2])) {
        return false;
    }
    if (p.tail.n > 0 && !ggml_pq_attn_tail_has_cells(op)) {
        return false;
    }
    for (const size_t stride : { p.tail.k_row_stride, p.tail.k_head_stride, p.tail.k_stream_stride,
                                 p.tail.v_row_stride, p.tail.v_head_stride, p.tail.v_stream_stride }) {
        if (stride % 16 != 0) {
            return false;
        }
    }
    ggml_tensor fa, q, ops[3];
    make_f16_op(op, get_n_cols(p), fa, q, ops);
    return ggml_cuda_flash_attn_ext_supported(device, &fa);
}

// A part of K or V as decoding takes it, to rows of `t`.
static pq_cuda_decode_side coded_side(const pq_attn_params & p, const pq_attn_side & side, int64_t s, const ggml_tensor & t) {
    pq_cuda_decode_side d = {};
    d.p.type             = side.type;
    d.p.D                = side.D;
    d.p.n_head_kv        = p.n_head_kv;
    d.p.n_rows           = t.ne[1];
    d.p.codebook         = side.codebook;
    d.p.has_transform    = side.has_transform;
    d.p.codes            = side.data + s * side.stream_stride;
    d.p.codes_row_stride = side.row_stride;
    d.p.x_row_stride     = t.nb[1];
    d.p.x_head_stride    = t.nb[2];
    d.codes_head_stride  = side.head_stride;
    d.x_f16              = (uint16_t *) t.data;
    return d;
}

// ---- in the space of codes ----

// Mapping a row of queries, results or the tail takes as long as is saved with four rows of K and V, and the launches as long as with 50000 (H100 and H200, kernels alone, when there
// were two, none of them beside the encoder; in a model measured at 32768 cells only).
static bool pays_in_code_space(const pq_attn_params & p) {
    const bool mask_fits = p.n_kv == get_n_cols(p) && p.mask && (p.mask_token_stride | p.mask_stream_stride | (uintptr_t) p.mask) % 16 == 0;
    return mask_fits && p.n_kv * p.n_head_kv > 4 * (p.n_q * p.n_head + p.tail.n * p.n_head_kv) + 50000 && !pq_cuda_prefill_unsupported(p);
}

static void prefill_in_code_space(ggml_backend_cuda_context & ctx, const ggml_tensor * op, const pq_attn_params & p, const pq_encode_params * new_rows) {
    ggml_cuda_pool_alloc<half>     k_rows(ctx.pool(), p.n_kv * p.k.D * p.n_head_kv);
    ggml_cuda_pool_alloc<half>     v_rows(ctx.pool(), p.n_kv * p.v.D * p.n_head_kv);
    ggml_cuda_pool_alloc<float>    q_mapped(ctx.pool(), p.n_q * p.k.D * p.n_head);
    ggml_cuda_pool_alloc<uint16_t> mask_kept(ctx.pool(), std::max<int64_t>(p.n_q * p.tail.n, 1));
    cudaStream_t stream = ctx.stream();

    ggml_tensor fa, q, ops[3];
    make_f16_op(op, p.n_kv, fa, q, ops);
    ops[0].data = k_rows.get();
    ops[1].data = v_rows.get();
    q.data  = q_mapped.get();
    q.nb[2] = p.k.D * sizeof(float);
    q.nb[1] = q.nb[2] * p.n_head;
    q.nb[3] = q.nb[1] * p.n_q;

    for (int64_t s = 0; s < p.n_stream; s++) {
        pq_cuda_prefill_step step = {};
        step.p       = p;
        step.p.k.data += s * p.k.stream_stride;
        step.p.v.data += s * p.v.stream_stride;
        step.p.q    += s * p.q_stream_stride;
        step.p.dst   = (float *) ((char *) p.dst + s * p.dst_stream_stride);
        step.p.mask += s % p.n_stream_mask * p.mask_stream_stride;
        step.mask    = const_cast<uint8_t *>(step.p.mask); // which has its values back before anything else reads it (ggml-pq.h)
        if (p.tail.n > 0) {
            step.p.tail.k    += s * p.tail.k_stream_stride;
            step.p.tail.v    += s * p.tail.v_stream_stride;
            step.p.tail.mask += s * p.tail.mask_stream_stride;
            const uint8_t * cells = step.p.tail.mask + p.n_q * p.tail.mask_token_stride;
            step.cell_low  = (const uint16_t *) cells;
            step.cell_high = (const uint16_t *) (cells + p.tail.mask_token_stride);
        }
        step.q_mapped  = q_mapped.get();
        step.k_rows    = (uint16_t *) k_rows.get();
        step.v_rows    = (uint16_t *) v_rows.get();
        step.mask_kept = mask_kept.get();

        CUDA_CHECK(pq_cuda_prefill_begin(step, s == 0 ? new_rows : nullptr, stream));
        ops[2].data  = step.mask;
        ops[2].nb[1] = p.mask_token_stride;
        ops[2].nb[2] = ops[2].nb[3] = p.mask_token_stride * p.n_q;
        fa.data = step.p.dst;
        ggml_cuda_flash_attn_ext(ctx, &fa);
        CUDA_CHECK(pq_cuda_prefill_end(step, stream));
    }
}

// ---- as rows of K and V ----

// The mask as flash attention takes it, where nothing has to be merged into it
static bool mask_as_it_is(const pq_attn_params & p) {
    return p.mask && p.tail.n == 0 && p.n_kv == get_n_cols(p) && p.k.type != PQ_TYPE_COUNT && p.v.type != PQ_TYPE_COUNT &&
        (p.mask_token_stride | p.mask_stream_stride | (uintptr_t) p.mask) % 16 == 0;
}

void ggml_cuda_pq_prefill(ggml_backend_cuda_context & ctx, const ggml_tensor * op, const pq_attn_params & p, bool settled, const pq_encode_params * new_rows) {
    if (pays_in_code_space(p)) {
        prefill_in_code_space(ctx, op, p, new_rows);
        return;
    }
    if (new_rows) {
        CUDA_CHECK(pq_cuda_encode(new_rows, 2, ctx.stream()));
    }
    const int64_t n_cols = get_n_cols(p);
    const bool    merge  = !mask_as_it_is(p);
    cudaStream_t  stream = ctx.stream();

    ggml_cuda_pool_alloc<half>    k_f16(ctx.pool(), n_cols * p.k.D * p.n_head_kv);
    ggml_cuda_pool_alloc<half>    v_f16(ctx.pool(), n_cols * p.v.D * p.n_head_kv);
    ggml_cuda_pool_alloc<half>    mask_f16(ctx.pool());
    ggml_cuda_pool_alloc<int32_t> row_source(ctx.pool());
    if (merge) {
        mask_f16.alloc(n_cols * p.n_q);
        row_source.alloc(n_cols);
    }

    ggml_tensor fa, q, ops[3];
    make_f16_op(op, n_cols, fa, q, ops);
    ops[0].data = k_f16.get();
    ops[1].data = v_f16.get();

    for (int64_t s = 0; s < p.n_stream; s++) {
        mask_source mask = { nullptr, 0 };
        if (p.mask) {
            mask = { (const char *) p.mask + s % p.n_stream_mask * p.mask_stream_stride, p.mask_token_stride };
        }
        if (merge) {
            tail_source tail = {};
            if (p.tail.n > 0) {
                const char * rows = (const char *) p.tail.mask + s * p.tail.mask_stream_stride;
                const char * low  = rows + p.n_q * p.tail.mask_token_stride;
                tail = { (const half *) rows, (const uint16_t *) low, (const uint16_t *) (low + p.tail.mask_token_stride),
                         p.tail.mask_token_stride, p.tail.n };
            }
            const dim3 grid((unsigned) ((n_cols + MASK_COLS - 1) / MASK_COLS), (unsigned) ((p.n_q + MASK_TOKENS - 1) / MASK_TOKENS));
            CUDA_CHECK(pq_launch(merge_masks, grid, MASK_THREADS, 0, stream, mask, tail, mask_f16.get(), row_source.get(), p.n_kv, n_cols, p.n_q, settled));
            ops[2].data = mask_f16.get();
        } else {
            ops[2].data = (void *) mask.data;
            ops[2].nb[1] = mask.token_stride;
            ops[2].nb[2] = ops[2].nb[3] = mask.token_stride * p.n_q;
        }

        pq_cuda_decode_side coded[2];
        int                 n_coded = 0;
        for (int i = 0; i < 2; i++) {
            const pq_attn_side & side = i == 0 ? p.k : p.v;
            half * dst = (half *) ops[i].data;
            const copy_source tail = i == 0 ?
                copy_source { (const char *) p.tail.k + s * p.tail.k_stream_stride, p.tail.k_row_stride, p.tail.k_head_stride } :
                copy_source { (const char *) p.tail.v + s * p.tail.v_stream_stride, p.tail.v_row_stride, p.tail.v_head_stride };
            if (side.type == PQ_TYPE_COUNT) {
                ggml_cuda_pool_alloc<half> converted(ctx.pool());
                copy_visible_rows<<<dim3((unsigned) (n_cols / COPY_ROWS), p.n_head_kv), COPY_THREADS, 0, stream>>>(
                    plain_side(op->src[1 + i], s, converted, stream), tail, row_source.get(), dst, n_cols, side.D, mask_f16.get(), p.n_q);
                CUDA_CHECK(cudaGetLastError());
                continue;
            }
            pq_cuda_decode_side & d = coded[n_coded++];
            d = coded_side(p, side, s, ops[i]);
            d.row_source       = merge ? row_source.get() : nullptr;
            d.tail             = (const uint8_t *) tail.data;
            d.tail_row_stride  = tail.row_stride;
            d.tail_head_stride = tail.head_stride;
        }
        CUDA_CHECK(pq_cuda_decode_rows(coded, n_coded, stream));

        q.data  = (char *) op->src[0]->data + s * op->src[0]->nb[3];
        fa.data = (char *) op->data + s * op->nb[3];
        ggml_cuda_flash_attn_ext(ctx, &fa);
    }
}
