#include "ggml-cuda-pq.h"

#include "ggml-cuda-pq-prefill.h"
#include "ggml-pq-params.h"
#include "pq-cuda.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

static pq_cuda_device_props device_props(int device) {
    const auto & d = ggml_cuda_info().devices[device];
    return { d.cc / 10, d.nsm, d.smpbo };
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

// Counters of the attention kernels: zero between launches. A context launches them one after the other, in one stream. They grow to what was
// needed most, while a graph may still hold the smaller ones: those live as long.
static void * get_counters(const ggml_backend_cuda_context & ctx, size_t n_bytes) {
    struct block {
        void * data = nullptr;
        size_t size = 0;
    };
    static std::mutex mutex;
    static std::map<std::pair<const ggml_backend_cuda_context *, int>, block> blocks;
    const std::lock_guard<std::mutex> lock(mutex);
    block & b = blocks[{ &ctx, ctx.device }];
    if (b.size < n_bytes) {
        b.size = GGML_PAD(std::max<size_t>(n_bytes, 4096), 4096) * 2;
        // not ordered with the stream: a stream that records a graph would only record them
        CUDA_CHECK(cudaMalloc(&b.data, b.size));
        std::vector<char> zeros(b.size, 0);
        cudaStream_t once;
        CUDA_CHECK(cudaStreamCreateWithFlags(&once, cudaStreamNonBlocking));
        CUDA_CHECK(cudaMemcpyAsync(b.data, zeros.data(), b.size, cudaMemcpyHostToDevice, once));
        CUDA_CHECK(cudaStreamSynchronize(once));
        CUDA_CHECK(cudaStreamDestroy(once));
    }
    return b.data;
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
        CUDA_CHECK(pq_cuda_attn(part, plan, scratch.get(), get_counters(ctx, plan.counter_bytes), ctx.stream()));
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
    if (ggml_cuda_pq_prefill_supported(device, op, p)) {
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
// so that nothing is left to wait for at the end of the graph (a CUDA graph must join what it forked). The last layer is the last
// one with the same indices: memory of an input is used for other tensors once the graph has no more reader of it.
// Attention without a tail reads all codes, and waits for them.
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

// Whether a node after i writes codes and keeps the indices of `op`, and thereby what its encoder reads, alive until then
static bool more_codes_follow(const ggml_cgraph * cgraph, int i, const ggml_tensor * op) {
    for (int j = i + 1; j < cgraph->n_nodes; j++) {
        const ggml_tensor * t = cgraph->nodes[j];
        if (writes_codes(t) && t->src[1] == op->src[1] && t->src[GGML_PQ_SRC_SET_ROWS_TAIL_IDX] == op->src[GGML_PQ_SRC_SET_ROWS_TAIL_IDX]) {
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
        if (p.tail.n == 0) {
            wait_for_codes(ctx);
        }
        switch (choose_attn_path(ctx.device, op, p, &why)) {
            case ATTN_CODED: attn_coded(ctx, p);   break;
            case ATTN_F16:   ggml_cuda_pq_prefill(ctx, op, p); break;
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

// ---- a step of a few tokens in one launch: writes of K and V, and the attention that follows ----

// The next node after i that computes; n_nodes: none
static int next_node(const ggml_cgraph * cgraph, int i) {
    for (i++; i < cgraph->n_nodes; i++) {
        const ggml_tensor * t = cgraph->nodes[i];
        if (!ggml_is_empty(t) && t->op != GGML_OP_NONE && t->op != GGML_OP_VIEW && t->op != GGML_OP_RESHAPE && t->op != GGML_OP_PERMUTE &&
            t->op != GGML_OP_TRANSPOSE) {
            break;
        }
    }
    return i;
}

static bool overlap(const void * a, size_t a_bytes, const void * b, size_t b_bytes) {
    return (const char *) a < (const char *) b + b_bytes && (const char *) b < (const char *) a + a_bytes;
}

static bool is_input(const ggml_tensor * t) {
    while (t && t->view_src) {
        t = t->view_src;
    }
    return t && t->op == GGML_OP_NONE;
}

// Whether `op` attends to the rows that K and V were written to just now, and everything can be done by one kernel.
static bool fuse_step(ggml_backend_cuda_context & ctx, const ggml_tensor * op, const ggml_tensor * const (&writes)[2], const pq_encode_params (&rows)[2]) {
    pq_attn_params p;
    const char * why;
    if (op->op != GGML_OP_FLASH_ATTN_EXT || !(op->flags & GGML_TENSOR_FLAG_COMPUTE) || !ggml_pq_has_operand(op) || ggml_pq_attn_params(op, p) ||
        p.n_q > PQ_CUDA_ATTN_MAX_N_Q || choose_attn_path(ctx.device, op, p, &why) != ATTN_CODED) {
        return false;
    }
    for (int i = 0; i < 2; i++) {
        const ggml_tensor * cache = op->src[1 + i];
        if (!cache->view_src || cache->view_src != writes[i]->view_src) {
            return false;
        }
        // The result is written while new rows may still be read, which the order of the nodes does not ask the allocator to allow for
        // (llama_million_tail::write does, for a few rows).
        for (const ggml_tensor * t : { writes[i]->src[0], writes[i]->src[1], writes[i]->src[GGML_PQ_SRC_SET_ROWS_TAIL_IDX] }) {
            if (t && overlap(op->data, ggml_nbytes(op), t->data, ggml_nbytes(t))) {
                return false;
            }
        }
    }
    const pq_cuda_attn_plan plan = pq_cuda_attn_make_plan(p, device_props(ctx.device));
    if (pq_cuda_step_unsupported(p, plan, rows)) {
        return false;
    }
    ggml_cuda_set_device(ctx.device);
    wait_for_codes(ctx);
    ggml_cuda_pool_alloc<char> scratch(ctx.pool(), std::max<size_t>(plan.scratch_bytes, 1));
    // Masks that are inputs are copied to the device before the graph, and such a copy waits for all kernels before it: what earlier graphs
    // wrote, codes and tail, is complete too. This graph writes no other rows of this cache.
    const bool settled = is_input(op->src[3]) && is_input(op->src[GGML_PQ_SRC_FLASH_ATTN_TAIL_MASK]);
    CUDA_CHECK(pq_cuda_step(p, plan, rows, settled, scratch.get(), get_counters(ctx, plan.counter_bytes), ctx.stream()));
    return true;
}

int ggml_cuda_pq_try_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i) {
    const ggml_tensor * first = cgraph->nodes[i];
    if (!writes_codes(first)) {
        return 0;
    }
    // two caches never overlap, and no row to encode is a cache: the order of the two does not matter
    const int j = next_node(cgraph, i);
    if (j == cgraph->n_nodes || !writes_codes(cgraph->nodes[j]) || cgraph->nodes[j]->view_src == first->view_src) {
        return 0;
    }
    const ggml_tensor * second = cgraph->nodes[j];
    pq_encode_params p[2];
    if (ggml_pq_encode_params(first, p[0]) || ggml_pq_encode_params(second, p[1]) || p[0].n_rows != p[1].n_rows) {
        return 0;
    }
    const int k = next_node(cgraph, j);
    if (k < cgraph->n_nodes && fuse_step(ctx, cgraph->nodes[k], { first, second }, p)) {
        return k - i;
    }
    encode_step(ctx, p, more_codes_follow(cgraph, j, first) && more_codes_follow(cgraph, j, second));
    return j - i;
}
