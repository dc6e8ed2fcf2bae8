#include "ggml-cuda-pq.h"

#include "ggml-cuda/convert.cuh"
#include "ggml-cuda/fattn-common.cuh"
#include "ggml-cuda/fattn.cuh"
#include "ggml-pq-params.h"
#include "pq-cuda.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <string>

static pq_cuda_device_props device_props(int device) {
    const auto & d = ggml_cuda_info().devices[device];
    return { d.cc / 10, d.nsm, d.smpbo };
}

// ---- prefill: codes to f16, then the backend's own flash attention ----
//
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

static bool f16_path_ok(int device, const ggml_tensor * op, const pq_attn_params & p) {
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

static void attn_f16(ggml_backend_cuda_context & ctx, const ggml_tensor * op, const pq_attn_params & p) {
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

// ---- the attention kernels on codes ----

static bool has_f16_sides(const ggml_tensor * op) {
    for (int i = 1; i <= 2; i++) {
        if (!ggml_is_pq(op->src[i]->type) && op->src[i]->type != GGML_TYPE_F16) {
            return false;
        }
    }
    return true;
}

// NULL, or why no number of query tokens can be done on codes. `p` is left with the most tokens that one launch takes.
static const char * coded_path_unsupported(const ggml_tensor * op, int device, pq_attn_params & p) {
    p.n_q = std::min<int64_t>(p.n_q, PQ_CUDA_ATTN_MAX_N_Q);
    if (!has_f16_sides(op)) {
        return "beside a PQ K or V, the other one must be PQ or f16";
    }
    return pq_cuda_attn_unsupported(p, device_props(device));
}

static void attn_coded(ggml_backend_cuda_context & ctx, const pq_attn_params & p) {
    for (int64_t q0 = 0; q0 < p.n_q; q0 += PQ_CUDA_ATTN_MAX_N_Q) {
        pq_attn_params part = p;
        part.n_q  = std::min<int64_t>(p.n_q - q0, PQ_CUDA_ATTN_MAX_N_Q);
        part.q   += q0 * p.q_token_stride;
        part.dst  = (float *) ((char *) p.dst + q0 * p.dst_token_stride);
        if (part.mask) {
            part.mask += q0 * p.mask_token_stride;
        }
        if (part.tail.n > 0) {
            part.tail.mask += q0 * p.tail.mask_token_stride;
        }
        const pq_cuda_attn_plan plan = pq_cuda_attn_make_plan(part, device_props(ctx.device));
        ggml_cuda_pool_alloc<char> scratch(ctx.pool(), std::max<size_t>(plan.scratch_bytes, 1));
        CUDA_CHECK(pq_cuda_attn(part, plan, scratch.get(), ctx.stream()));
    }
}

enum attn_path { ATTN_NONE, ATTN_CODED, ATTN_F16 };

// `why` says what is missing when no path does it.
static attn_path choose_attn_path(int device, const ggml_tensor * op, const pq_attn_params & p, const char ** why) {
    pq_attn_params few = p;
    *why = coded_path_unsupported(op, device, few);
    if (p.n_q <= PQ_CUDA_ATTN_MAX_N_Q && !*why) {
        return ATTN_CODED;
    }
    if (f16_path_ok(device, op, p)) {
        return ATTN_F16;
    }
    // prefill in steps of a few tokens: for the head sizes that the backend's flash attention does not have
    return *why ? ATTN_NONE : ATTN_CODED;
}

// ---- copies of codes as bytes ----

static bool copy_bytes_ok(const ggml_tensor * src, const ggml_tensor * dst) {
    return src->type == dst->type && ((ggml_is_contiguous(src) && ggml_is_contiguous(dst) && ggml_nelements(src) == ggml_nelements(dst)) ||
        (ggml_are_same_shape(src, dst) && src->nb[0] == ggml_type_size(src->type) && dst->nb[0] == src->nb[0]));
}

static void copy_bytes(const ggml_tensor * src, ggml_tensor * dst, cudaStream_t stream) {
    if (ggml_is_contiguous(src) && ggml_is_contiguous(dst)) {
        CUDA_CHECK(cudaMemcpyAsync(dst->data, src->data, ggml_nbytes(src), cudaMemcpyDeviceToDevice, stream));
        return;
    }
    const size_t row_bytes = ggml_row_size(src->type, src->ne[0]);
    for (int64_t i3 = 0; i3 < src->ne[3]; i3++) {
        for (int64_t i2 = 0; i2 < src->ne[2]; i2++) {
            CUDA_CHECK(cudaMemcpy2DAsync((char *) dst->data + i2 * dst->nb[2] + i3 * dst->nb[3], dst->nb[1],
                                         (const char *) src->data + i2 * src->nb[2] + i3 * src->nb[3], src->nb[1],
                                         row_bytes, src->ne[1], cudaMemcpyDeviceToDevice, stream));
        }
    }
}

// ---- support ----

static const char * convert_unsupported(const ggml_tensor * op) {
    if (ggml_is_pq(op->type)) {
        pq_encode_params e;
        return ggml_pq_encode_params(op, e);
    }
    pq_decode_params d;
    const char * why = ggml_pq_decode_params(op, d);
    return why || (d.x_row_stride % 16 == 0 && d.x_head_stride % 16 == 0) ? why : "decoded rows must lie at multiples of 16 bytes";
}

// NULL, or why the device does not take op
static const char * unsupported(int device, const ggml_tensor * op) {
    if (device_props(device).cc < 80) {
        return "the PQ kernels need compute capability 8.0 (Ampere) or later";
    }
    const bool bytes = op->src[0] && op->src[0]->type == op->type;
    switch (op->op) {
        case GGML_OP_SET_ROWS: {
            pq_encode_params p;
            return ggml_pq_encode_params(op, p);
        }
        case GGML_OP_CPY:
            if (!bytes) {
                return convert_unsupported(op);
            }
            [[fallthrough]];
        case GGML_OP_DUP:
        case GGML_OP_CONT:
            return bytes && copy_bytes_ok(op->src[0], op) ? nullptr : "codes are copied as whole rows, and converted by CPY only";
        case GGML_OP_FLASH_ATTN_EXT: {
            pq_attn_params p;
            const char * why = ggml_pq_attn_params(op, p);
            if (!why && choose_attn_path(device, op, p, &why) != ATTN_NONE) {
                why = nullptr;
            }
            return why;
        }
        default:
            return "it has no kernel for codes";
    }
}

bool ggml_cuda_pq_supports_op(int device, const ggml_tensor * op) {
    const char * why = unsupported(device, op);
    if (!why) {
        return true;
    }
    static std::mutex            mutex;
    static std::set<std::string> said;
    const std::string            text = std::string(ggml_op_name(op->op)) + " on PQ cache codes: " + why;
    const std::lock_guard<std::mutex> lock(mutex);
    if (said.insert(text).second) {
        GGML_LOG_WARN("%s: CUDA device %d leaves an op to the CPU, which is slow: %s\n", __func__, device, text.c_str());
    }
    return false;
}

// ---- codes off the critical path ----
//
// No step reads the codes of the rows it writes: they are in the tail, which attention reads instead. So in prefill only the write
// to the tail is on the way of the step, and the codes are made from there on a stream of their own, beside attention
// and the feed-forward part of the layer. The next layer's write waits for them, and the last layer's stay on the main stream,
// so that nothing is left to wait for at the end of the graph (a CUDA graph must join what it forked).
// A step of a few tokens encodes in order: there the launch of one more kernel costs more than it hides (measured on an
// H200, 7B geometry: 318 tokens/s in order, 308 beside; prefill of 2048: 8841 and 9123).

struct side_stream {
    cudaEvent_t rows_written;
    cudaEvent_t codes_written;
    bool        busy = false; // codes_written has yet to be waited for

    side_stream() {
        CUDA_CHECK(cudaEventCreateWithFlags(&rows_written,  cudaEventDisableTiming));
        CUDA_CHECK(cudaEventCreateWithFlags(&codes_written, cudaEventDisableTiming));
    }
};

static constexpr int SIDE_STREAM_MIN_ROWS = 33; // from here on the encoder works in tiles, which take far longer than a launch
static constexpr int SIDE_STREAM          = GGML_CUDA_MAX_STREAMS - 1; // the backend takes its concurrent streams from the other end

// One per backend context and device; contexts are few, and live as long as the program's.
static side_stream & get_side_stream(const ggml_backend_cuda_context & ctx) {
    static std::mutex mutex;
    static std::map<std::pair<const ggml_backend_cuda_context *, int>, side_stream> streams;
    const std::lock_guard<std::mutex> lock(mutex);
    return streams[{ &ctx, ctx.device }];
}

static bool writes_codes(const ggml_tensor * t) {
    return t->op == GGML_OP_SET_ROWS && ggml_is_pq(t->type) && (t->flags & GGML_TENSOR_FLAG_COMPUTE);
}

static bool more_codes_follow(const ggml_cgraph * cgraph, int i) {
    for (int j = i + 1; j < cgraph->n_nodes; j++) {
        if (writes_codes(cgraph->nodes[j])) {
            return true;
        }
    }
    return false;
}

static void wait_for_codes(ggml_backend_cuda_context & ctx) {
    side_stream & side = get_side_stream(ctx);
    if (side.busy) {
        CUDA_CHECK(cudaStreamWaitEvent(ctx.stream(), side.codes_written));
        side.busy = false;
    }
}

static void encode_step(ggml_backend_cuda_context & ctx, pq_encode_params (&p)[2], bool more_follow) {
    wait_for_codes(ctx);
    if (!p[0].tail || !p[1].tail || p[0].n_rows < SIDE_STREAM_MIN_ROWS || !more_follow) {
        CUDA_CHECK(pq_cuda_encode(p, 2, ctx.stream()));
        return;
    }
    side_stream & side = get_side_stream(ctx);
    CUDA_CHECK(pq_cuda_write_tail(p, 2, ctx.stream()));
    for (auto & s : p) {
        s.x             = s.tail;
        s.x_f16         = 1;
        s.x_row_stride  = s.tail_row_stride;
        s.x_head_stride = s.D * sizeof(half);
        s.x_idx         = s.tail_idx;
        s.tail          = nullptr;
    }
    cudaStream_t stream = ctx.stream(ctx.device, SIDE_STREAM);
    CUDA_CHECK(cudaEventRecord(side.rows_written, ctx.stream()));
    CUDA_CHECK(cudaStreamWaitEvent(stream, side.rows_written));
    CUDA_CHECK(pq_cuda_encode(p, 2, stream));
    CUDA_CHECK(cudaEventRecord(side.codes_written, stream));
    side.busy = true;
}

bool ggml_cuda_pq_compute_forward(ggml_backend_cuda_context & ctx, ggml_tensor * op) {
    if (!ggml_pq_has_operand(op)) {
        return false;
    }
    ggml_cuda_set_device(ctx.device);
    if (op->op == GGML_OP_FLASH_ATTN_EXT) {
        pq_attn_params p;
        const char * why = ggml_pq_attn_params(op, p);
        GGML_ASSERT(!why);
        switch (choose_attn_path(ctx.device, op, p, &why)) {
            case ATTN_CODED: attn_coded(ctx, p);   break;
            case ATTN_F16:   attn_f16(ctx, op, p); break;
            case ATTN_NONE:  GGML_ABORT("FLASH_ATTN_EXT on PQ cache codes: %s", why);
        }
        return true;
    }
    wait_for_codes(ctx);
    if (op->type == op->src[0]->type) {
        copy_bytes(op->src[0], op, ctx.stream());
    } else if (ggml_is_pq(op->type)) {
        pq_encode_params p;
        GGML_ASSERT(!ggml_pq_encode_params(op, p));
        CUDA_CHECK(pq_cuda_encode(&p, 1, ctx.stream()));
    } else {
        pq_decode_params p;
        GGML_ASSERT(!ggml_pq_decode_params(op, p));
        CUDA_CHECK(pq_cuda_decode(p, nullptr, ctx.stream()));
    }
    return true;
}

int ggml_cuda_pq_try_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i) {
    const ggml_tensor * first = cgraph->nodes[i];
    if (!writes_codes(first)) {
        return 0;
    }
    int j = i + 1;
    while (j < cgraph->n_nodes && (ggml_is_empty(cgraph->nodes[j]) || cgraph->nodes[j]->op == GGML_OP_NONE ||
           cgraph->nodes[j]->op == GGML_OP_VIEW || cgraph->nodes[j]->op == GGML_OP_RESHAPE ||
           cgraph->nodes[j]->op == GGML_OP_PERMUTE || cgraph->nodes[j]->op == GGML_OP_TRANSPOSE)) {
        j++;
    }
    // two caches never overlap, and no row to encode is a cache: the order of the two does not matter
    if (j == cgraph->n_nodes || !writes_codes(cgraph->nodes[j]) || cgraph->nodes[j]->view_src == first->view_src) {
        return 0;
    }
    pq_encode_params p[2];
    if (ggml_pq_encode_params(first, p[0]) || ggml_pq_encode_params(cgraph->nodes[j], p[1]) || p[0].n_rows != p[1].n_rows) {
        return 0;
    }
    encode_step(ctx, p, more_codes_follow(cgraph, j));
    return j - i;
}
