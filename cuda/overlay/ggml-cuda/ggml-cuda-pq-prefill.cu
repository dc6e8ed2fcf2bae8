#include "ggml-cuda-pq-prefill.h"

#include "ggml-cuda/convert.cuh"
#include "ggml-cuda/fattn-common.cuh"
#include "ggml-cuda/fattn.cuh"
#include "pq-cuda.h"

// Columns of the scratch: the exact tail, padded to FATTN_KQ_STRIDE, then the coded cells, padded likewise. K and V are
// f16 [n_head_kv][n_cols][D] of one stream at a time, the mask is f16 [n_q][n_cols]. Scratch is as large as the part of the
// cache in use, n_kv, and goes back to the pool after the op.

struct columns {
    int64_t n_tail;
    int64_t tail_end; // n_tail, padded
    int64_t kv_end;   // tail_end + n_kv
    int64_t n;        // kv_end, padded
};

static columns get_columns(const pq_attn_params & p) {
    columns c;
    c.n_tail   = p.tail.n;
    c.tail_end = GGML_PAD(p.tail.n, FATTN_KQ_STRIDE);
    c.kv_end   = c.tail_end + p.n_kv;
    c.n        = GGML_PAD(c.kv_end, FATTN_KQ_STRIDE);
    return c;
}

static constexpr int MASK_GROUP = 8; // columns of a thread: 16 bytes

struct mask_source {
    const char * data; // NULL: zeros
    size_t       token_stride;
};

// grid: (groups of columns / 256, n_q)
static __global__ void concat_masks(const mask_source tail, const mask_source kv, half * dst, const columns c) {
    const int64_t g0 = ((int64_t) blockIdx.x * blockDim.x + threadIdx.x) * MASK_GROUP;
    if (g0 >= c.n) {
        return;
    }
    const int64_t token = blockIdx.y;
    const bool    is_kv = g0 >= c.tail_end;
    const int64_t col   = is_kv ? g0 - c.tail_end : g0;
    const int64_t n     = is_kv ? c.kv_end - c.tail_end : c.n_tail;
    const char  * data  = is_kv ? kv.data : tail.data;
    const half  * src   = (const half *) (data + token * (is_kv ? kv.token_stride : tail.token_stride)) + col;

    union { half h[MASK_GROUP]; uint4 u; } v;
    if (data != nullptr && col + MASK_GROUP <= n && (uintptr_t) src % sizeof(uint4) == 0) {
        v.u = *(const uint4 *) src;
    } else {
#pragma unroll
        for (int i = 0; i < MASK_GROUP; i++) {
            v.h[i] = col + i >= n ? __float2half(-INFINITY) : data ? src[i] : __float2half(0.0f);
        }
    }
    *(uint4 *) (dst + token * c.n + g0) = v.u;
}

struct copy_source {
    const char * data; // f16 [n_head_kv][n][D], by strides
    size_t       row_stride;
    size_t       head_stride;
};

static constexpr int COPY_ROWS    = 32;
static constexpr int COPY_THREADS = 256;

// Copies rows; one that no query sees, and those from n up to n_padded, become 0: their probability is 0, but 0 times NaN is not.
// grid: (n_padded / 32, n_head_kv)
static __global__ void __launch_bounds__(COPY_THREADS) copy_visible_rows(
        const copy_source src, half * dst, int64_t dst_head_stride, int D, int64_t n, int64_t n_padded, const mask_source mask, int64_t n_q) {
    __shared__ int visible[COPY_ROWS];
    const int64_t row0 = (int64_t) blockIdx.x * COPY_ROWS;
    const int     head = blockIdx.y;
    const int     lane = threadIdx.x % COPY_ROWS;
    if (threadIdx.x < COPY_ROWS) {
        visible[lane] = row0 + lane < n && mask.data == nullptr;
    }
    __syncthreads();
    if (mask.data != nullptr && row0 + lane < n) {
        bool seen = false;
        for (int64_t q = threadIdx.x / COPY_ROWS; q < n_q && !seen; q += COPY_THREADS / COPY_ROWS) {
            seen = __half2float(((const half *) (mask.data + q * mask.token_stride))[row0 + lane]) != -INFINITY;
        }
        if (seen) {
            visible[lane] = 1;
        }
    }
    __syncthreads();
    const int n_pieces = D / 8; // of 16 bytes
    for (int i = threadIdx.x; i < COPY_ROWS * n_pieces; i += COPY_THREADS) {
        const int     r     = i / n_pieces;
        const int     piece = i % n_pieces;
        const int64_t row   = row0 + r;
        if (row >= n_padded) {
            break;
        }
        uint4 v = make_uint4(0, 0, 0, 0);
        if (visible[r]) {
            v = *((const uint4 *) (src.data + row * src.row_stride + head * src.head_stride) + piece);
        }
        *((uint4 *) (dst + head * dst_head_stride + row * D) + piece) = v;
    }
}

static void copy_rows(const copy_source & src, half * dst, int64_t n_cols, int n_head_kv, int D, int64_t n, int64_t n_padded,
                      const mask_source & mask, int64_t n_q, cudaStream_t stream) {
    if (n_padded == 0) {
        return;
    }
    const dim3 grid((unsigned) ((n_padded + COPY_ROWS - 1) / COPY_ROWS), n_head_kv);
    copy_visible_rows<<<grid, COPY_THREADS, 0, stream>>>(src, dst, n_cols * D, D, n, n_padded, mask, n_q);
    CUDA_CHECK(cudaGetLastError());
}

// Coded cells of one stream to dst, f16 [n_head_kv][n_cols][D]
static void decode_side(const pq_attn_side & side, int64_t s, int n_head_kv, int64_t n_kv, half * dst, int64_t n_cols, cudaStream_t stream) {
    pq_decode_params d = {};
    d.type             = side.type;
    d.D                = side.D;
    d.n_head_kv        = n_head_kv;
    d.n_rows           = n_kv;
    d.codebook         = side.codebook;
    d.has_transform    = side.has_transform;
    d.codes            = side.data + s * side.stream_stride;
    d.codes_row_stride = side.row_stride;
    d.x_row_stride     = side.D * sizeof(half);
    d.x_head_stride    = n_cols * side.D * sizeof(half);
    if (side.head_stride == pq_head_bytes(side.type, side.D)) {
        CUDA_CHECK(pq_cuda_decode(d, (uint16_t *) dst, stream));
        return;
    }
    // the heads of a cell lie apart: not llama.cpp's cache, but a layout that the op allows
    d.n_head_kv = 1;
    for (int h = 0; h < n_head_kv; h++) {
        CUDA_CHECK(pq_cuda_decode(d, (uint16_t *) (dst + h * n_cols * side.D), stream));
        d.codes    += side.head_stride;
        d.codebook += pq_get_codebook_layout(side.type, side.D, side.has_transform).head_bytes;
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
static void make_f16_op(const ggml_tensor * op, const columns & c, ggml_tensor & fa, ggml_tensor & q, ggml_tensor (&ops)[3]) {
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
        t.ne[0] = i < 2 ? op->src[1 + i]->ne[0] : c.n;
        t.ne[1] = i < 2 ? c.n : op->src[0]->ne[1];
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
    for (const size_t stride : { p.tail.k_row_stride, p.tail.k_head_stride, p.tail.k_stream_stride,
                                 p.tail.v_row_stride, p.tail.v_head_stride, p.tail.v_stream_stride }) {
        if (stride % 16 != 0) {
            return false;
        }
    }
    ggml_tensor fa, q, ops[3];
    make_f16_op(op, get_columns(p), fa, q, ops);
    return ggml_cuda_flash_attn_ext_supported(device, &fa);
}

void ggml_cuda_pq_prefill(ggml_backend_cuda_context & ctx, const ggml_tensor * op, const pq_attn_params & p) {
    const columns c      = get_columns(p);
    cudaStream_t  stream = ctx.stream();

    ggml_cuda_pool_alloc<half> k_f16(ctx.pool(), c.n * p.k.D * p.n_head_kv);
    ggml_cuda_pool_alloc<half> v_f16(ctx.pool(), c.n * p.v.D * p.n_head_kv);
    ggml_cuda_pool_alloc<half> mask_f16(ctx.pool(), c.n * p.n_q);

    ggml_tensor fa, q, ops[3];
    make_f16_op(op, c, fa, q, ops);
    ops[0].data = k_f16.get();
    ops[1].data = v_f16.get();
    ops[2].data = mask_f16.get();

    for (int64_t s = 0; s < p.n_stream; s++) {
        mask_source mask = { nullptr, 0 };
        if (p.mask) {
            mask = { (const char *) p.mask + s % p.n_stream_mask * p.mask_stream_stride, p.mask_token_stride };
        }
        mask_source tail_mask = { nullptr, 0 };
        if (p.tail.n > 0) {
            tail_mask = { (const char *) p.tail.mask + s * p.tail.mask_stream_stride, p.tail.mask_token_stride };
        }
        const dim3 grid((unsigned) ((c.n / MASK_GROUP + 255) / 256), (unsigned) p.n_q);
        concat_masks<<<grid, 256, 0, stream>>>(tail_mask, mask, mask_f16.get(), c);
        CUDA_CHECK(cudaGetLastError());

        for (int i = 0; i < 2; i++) {
            const pq_attn_side & side = i == 0 ? p.k : p.v;
            half * dst = (half *) ops[i].data;
            const copy_source tail = i == 0 ?
                copy_source { (const char *) p.tail.k + s * p.tail.k_stream_stride, p.tail.k_row_stride, p.tail.k_head_stride } :
                copy_source { (const char *) p.tail.v + s * p.tail.v_stream_stride, p.tail.v_row_stride, p.tail.v_head_stride };
            copy_rows(tail, dst, c.n, p.n_head_kv, side.D, c.n_tail, c.tail_end, tail_mask, p.n_q, stream);
            half * cells = dst + c.tail_end * side.D;
            if (side.type != PQ_TYPE_COUNT) {
                decode_side(side, s, p.n_head_kv, p.n_kv, cells, c.n, stream);
                copy_rows({}, cells + p.n_kv * side.D, c.n, p.n_head_kv, side.D, 0, c.n - c.kv_end, {}, 0, stream);
            } else {
                ggml_cuda_pool_alloc<half> converted(ctx.pool());
                copy_rows(plain_side(op->src[1 + i], s, converted, stream), cells, c.n, p.n_head_kv, side.D, p.n_kv, c.n - c.tail_end,
                          mask, p.n_q, stream);
            }
        }
        q.data  = (char *) op->src[0]->data + s * op->src[0]->nb[3];
        fa.data = (char *) op->data + s * op->nb[3];
        ggml_cuda_flash_attn_ext(ctx, &fa);
    }
}
