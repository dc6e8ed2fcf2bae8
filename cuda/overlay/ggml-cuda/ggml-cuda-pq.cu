#include "ggml-cuda-pq.h"

#include "ggml-cuda-pq-prefill.h"
#include "ggml-cuda/mmvq.cuh"
#include "ggml-pq-params.h"
#include "pq-cuda.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <tuple>
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

// What the kernels of a context keep between launches. It launches them one after the other, in one stream.
enum kept { KEPT_COUNTERS, KEPT_Q8_1 };

// Counters of the attention kernels (zero between launches), or room for a result in q8_1, which the next product reads. They grow to what was
// needed most, while a graph may still hold the smaller ones: those live as long.
static void * get_kept(const ggml_backend_cuda_context & ctx, kept what, size_t n_bytes) {
    struct block {
        void * data = nullptr;
        size_t size = 0;
    };
    static std::mutex mutex;
    static std::map<std::tuple<const ggml_backend_cuda_context *, int, kept>, block> blocks;
    const std::lock_guard<std::mutex> lock(mutex);
    block & b = blocks[{ &ctx, ctx.device, what }];
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
        CUDA_CHECK(pq_cuda_attn(part, plan, scratch.get(), get_kept(ctx, KEPT_COUNTERS, plan.counter_bytes), ctx.stream()));
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

// What the nodes of a graph leave to later ones.
struct graph_state {
    std::set<const ggml_tensor *> deferred_ropes; // passed over, for the step that reads them to do (see the end of this file)
    const ggml_tensor * q8_1_op = nullptr; // a step whose result was also made in q8_1,
    const void        * q8_1    = nullptr; // here
};

static graph_state & state_of(const ggml_backend_cuda_context & ctx) {
    static std::mutex mutex;
    static std::map<const ggml_backend_cuda_context *, graph_state> states;
    const std::lock_guard<std::mutex> lock(mutex);
    return states[&ctx];
}

static const ggml_tensor * storage_of(const ggml_tensor * t) {
    return t && t->view_src ? t->view_src : t; // a view's source is never a view
}

static bool is_input(const ggml_tensor * t) {
    return t && storage_of(t)->op == GGML_OP_NONE;
}

// Whether masks were complete, and what earlier graphs wrote, before the kernel ahead began. Those that are inputs are copied to the device before the graph
// begins, and kernels start early only after one that lets them: products with weights, which every layer has before its attention, do so at their end.
// (Prefill changes a mask for a while, and has restored it before the product that follows begins.)
static bool masks_settled(const ggml_tensor * op) {
    const ggml_tensor * tail_mask = op->src[GGML_PQ_SRC_FLASH_ATTN_TAIL_MASK];
    return is_input(op->src[3]) && (!tail_mask || is_input(tail_mask));
}

bool ggml_cuda_pq_compute_forward(ggml_backend_cuda_context & ctx, ggml_tensor * op) {
    if (op->op == GGML_OP_ROPE) {
        return state_of(ctx).deferred_ropes.count(op) > 0;
    }
    if (!ggml_pq_has_operand(op)) {
        return false;
    }
    ggml_cuda_set_device(ctx.device);
    if (op->op == GGML_OP_FLASH_ATTN_EXT) {
        state_of(ctx).q8_1_op = nullptr;
        pq_attn_params p;
        const char * why = ggml_pq_attn_params(op, p);
        GGML_ASSERT(!why);
        switch (choose_attn_path(ctx.device, op, p, &why)) {
            case ATTN_CODED: attn_coded(ctx, p);   break;
            case ATTN_F16:   ggml_cuda_pq_prefill(ctx, op, p, masks_settled(op), nullptr); break;
            case ATTN_NONE:  GGML_ABORT("FLASH_ATTN_EXT on PQ cache codes: %s", why);
        }
        return true;
    }
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

// ---- writes of K and V, and the attention that follows, together; of a few tokens in one launch, with the rotary embedding ----

static bool overlap(const void * a, size_t a_bytes, const void * b, size_t b_bytes) {
    return (const char *) a < (const char *) b + b_bytes && (const char *) b < (const char *) a + a_bytes;
}

static bool is_noop(const ggml_tensor * t) {
    return ggml_is_empty(t) || t->op == GGML_OP_NONE || t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_PERMUTE || t->op == GGML_OP_TRANSPOSE;
}

// The next node after i that computes; n_nodes: none
static int next_node(const ggml_cgraph * cgraph, int i) {
    do {
        i++;
    } while (i < cgraph->n_nodes && is_noop(cgraph->nodes[i]));
    return i;
}

// What one launch can do, all of it nodes of a graph: K and V are written, then attended to.
struct fused_step {
    int               i_attn;
    const ggml_tensor * op;   // node i_attn
    pq_encode_params  rows[2];
    pq_attn_params    p;
    pq_cuda_attn_plan plan;
    bool              settled;
    const ggml_tensor * ropes[2]; // that make the queries and the rows of K, and could be done here; or NULL
    bool              q8_1;     // the result goes to a product that takes it so
};

// Whether no node after i, up to the last one, writes where t lies.
static bool outlives(const ggml_tensor * t, const ggml_cgraph * cgraph, int i, int i_last) {
    while (t && ++i <= i_last) {
        const ggml_tensor * other = cgraph->nodes[i];
        if (!is_noop(other) && overlap(other->data, ggml_nbytes(other), t->data, ggml_nbytes(t))) {
            return false;
        }
    }
    return true;
}

// Whether node i_rope makes rows [token][head][128] that nothing but node i_read sees, and what it reads can be read by node i_attn instead.
static bool can_defer_rope(const ggml_cgraph * cgraph, int i_rope, int i_read, int i_attn) {
    const ggml_tensor * rope = cgraph->nodes[i_rope], * x = rope->src[0];
    const int32_t * op  = rope->op_params;
    const int mode      = op[2], n_dims = op[1], n_offs = op[15];
    if ((mode != GGML_ROPE_TYPE_NORMAL && mode != GGML_ROPE_TYPE_NEOX) || n_dims != 128 || n_offs != 0 || rope->ne[0] != 128 || rope->ne[3] != 1 ||
        rope->type != GGML_TYPE_F32 || x->type != GGML_TYPE_F32 || !ggml_are_same_stride(rope, x) || rope->nb[0] != sizeof(float)) {
        return false;
    }
    for (int i = i_rope; i < i_read; i++) {
        if (storage_of(cgraph->nodes[i]) == rope && ggml_node_get_use_count(cgraph, i) != 1) {
            return false;
        }
    }
    // ggml_cuda_pq_add_alloc_deps has asked for it
    return outlives(x, cgraph, i_rope, i_attn) && outlives(rope->src[1], cgraph, i_rope, i_attn) && outlives(rope->src[2], cgraph, i_rope, i_attn);
}

static int find_node(const ggml_cgraph * cgraph, const ggml_tensor * t, int before) {
    while (before-- > 0) {
        if (cgraph->nodes[before] == t) {
            return before;
        }
    }
    return -1;
}

// `t`, or what it is a reshape of
static const ggml_tensor * without_reshapes(const ggml_tensor * t) {
    while (t->op == GGML_OP_RESHAPE) {
        t = t->src[0];
    }
    return t;
}

// Whether the node after i_attn is a product of a quantized matrix with the result of attention, all of it, of few enough tokens for ggml_cuda_mul_mat_vec_q.
static bool product_takes_q8_1(const ggml_cgraph * cgraph, int i_attn) {
    const ggml_tensor * op = cgraph->nodes[i_attn];
    const int i = next_node(cgraph, i_attn);
    if (i >= cgraph->n_nodes || cgraph->nodes[i]->op != GGML_OP_MUL_MAT) {
        return false;
    }
    const ggml_tensor * w = cgraph->nodes[i]->src[0], * x = cgraph->nodes[i]->src[1];
    return ggml_is_quantized(w->type) && without_reshapes(x) == op && ggml_is_contiguous(op) && x->ne[0] % MATRIX_ROW_PADDING == 0 && ggml_nrows(x) <= MMVQ_MAX_BATCH_SIZE;
}

// Whether nodes i, j and the one after them are such a step.
static bool get_step(const ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i, int j, fused_step & s) {
    const ggml_tensor * const writes[2] = { cgraph->nodes[i], cgraph->nodes[j] };
    s.i_attn = next_node(cgraph, j);
    const ggml_tensor * op = s.i_attn < cgraph->n_nodes ? cgraph->nodes[s.i_attn] : nullptr;
    const char * why;
    if (!op || op->op != GGML_OP_FLASH_ATTN_EXT || !(op->flags & GGML_TENSOR_FLAG_COMPUTE) || !ggml_pq_has_operand(op) || ggml_pq_attn_params(op, s.p) ||
        s.p.n_q > PQ_CUDA_ATTN_MAX_N_Q || choose_attn_path(ctx.device, op, s.p, &why) != ATTN_CODED) {
        return false;
    }
    for (int side = 0; side < 2; side++) {
        const ggml_tensor * cache = op->src[1 + side], * write = writes[side];
        if (!cache->view_src || cache->view_src != write->view_src || ggml_pq_encode_params(write, s.rows[side])) {
            return false;
        }
        // the result is written while new rows may still be read: ggml_cuda_pq_add_alloc_deps has asked for room of its own
        for (const ggml_tensor * t : { write->src[0], write->src[1], write->src[GGML_PQ_SRC_SET_ROWS_TAIL_IDX] }) {
            if (t && overlap(op->data, ggml_nbytes(op), t->data, ggml_nbytes(t))) {
                return false;
            }
        }
    }
    s.op   = op;
    s.q8_1 = product_takes_q8_1(cgraph, s.i_attn);
    s.plan = pq_cuda_attn_make_plan(s.p, device_props(ctx.device));
    if (pq_cuda_step_unsupported(s.p, s.plan, s.rows)) {
        return false;
    }
    s.settled = masks_settled(op); // codes and tail, too: this graph writes no other rows of this cache

    const int64_t n_tokens = s.p.n_q * s.p.n_stream;
    s.ropes[0] = s.ropes[1] = nullptr;
    const ggml_tensor * q = storage_of(op->src[0]), * k = storage_of(writes[0]->src[0]);
    if (n_tokens != s.rows[0].n_rows) {
        return true;
    }
    if (q->op == GGML_OP_ROPE && q->data == s.p.q && q->nb[1] == s.p.q_head_stride && q->nb[2] == s.p.q_token_stride && q->ne[2] == n_tokens &&
        (s.p.n_stream == 1 || s.p.q_stream_stride == s.p.n_q * q->nb[2]) && is_input(q->src[1]) && (!q->src[2] || is_input(q->src[2]))) {
        const int i_rope = find_node(cgraph, q, i);
        s.ropes[0] = i_rope >= 0 && can_defer_rope(cgraph, i_rope, s.i_attn, s.i_attn) ? q : nullptr;
    }
    if (k->op == GGML_OP_ROPE && k->data == s.rows[0].x && k->nb[1] == s.rows[0].x_head_stride && k->nb[2] == s.rows[0].x_row_stride && k->ne[2] == n_tokens &&
        is_input(k->src[1]) && (!k->src[2] || is_input(k->src[2]))) {
        const int i_rope = find_node(cgraph, k, i);
        s.ropes[1] = i_rope >= 0 && can_defer_rope(cgraph, i_rope, i, s.i_attn) ? k : nullptr;
    }
    // both are turned by the same numbers
    if (s.ropes[0] && s.ropes[1] && (memcmp(q->op_params, k->op_params, sizeof(q->op_params)) != 0 || q->src[1] != k->src[1] || q->src[2] != k->src[2])) {
        s.ropes[0] = nullptr;
    }
    return true;
}

static pq_cuda_rope get_rope(const ggml_tensor * op) {
    const int32_t * n_ctx_orig = op->op_params + 4;
    float base, beta_fast, beta_slow, corr[2];
    pq_cuda_rope r = {};
    memcpy(&base,          op->op_params + 5, sizeof(float));
    memcpy(&r.freq_scale,  op->op_params + 6, sizeof(float));
    memcpy(&r.ext_factor,  op->op_params + 7, sizeof(float));
    memcpy(&r.attn_factor, op->op_params + 8, sizeof(float));
    memcpy(&beta_fast,     op->op_params + 9, sizeof(float));
    memcpy(&beta_slow,     op->op_params + 10, sizeof(float));
    ggml_rope_yarn_corr_dims(128, *n_ctx_orig, base, beta_fast, beta_slow, corr);
    r.neox         = op->op_params[2] == GGML_ROPE_TYPE_NEOX;
    r.pos          = (const int32_t *) op->src[1]->data;
    r.freq_factors = op->src[2] ? (const float *) op->src[2]->data : nullptr;
    r.theta_scale  = powf(base, -2.0f / 128);
    r.corr_low     = corr[0];
    r.corr_high    = corr[1];
    return r;
}

const void * ggml_cuda_pq_get_q8_1(const ggml_backend_cuda_context & ctx, const ggml_tensor * src1) {
    const graph_state & state = state_of(ctx);
    const ggml_tensor * op = without_reshapes(src1);
    // Another graph may have other nodes at the same addresses, but attention on codes passes through here whenever it is computed. Rows are of whole blocks,
    // without padding: where they begin does not matter.
    return op == state.q8_1_op && op->op == GGML_OP_FLASH_ATTN_EXT && ggml_pq_has_operand(op) && src1->ne[0] % MATRIX_ROW_PADDING == 0 ? state.q8_1 : nullptr;
}

static void run_step(ggml_backend_cuda_context & ctx, const fused_step & s) {
    pq_attn_params   p    = s.p;
    pq_encode_params rows[2] = { s.rows[0], s.rows[1] };
    pq_cuda_rope     rope = {};
    auto & deferred = state_of(ctx).deferred_ropes;
    if (s.ropes[0] && deferred.erase(s.ropes[0])) {
        rope   = get_rope(s.ropes[0]);
        rope.q = 1;
        p.q    = (const uint8_t *) s.ropes[0]->src[0]->data;
    }
    if (s.ropes[1] && deferred.erase(s.ropes[1])) {
        const int32_t q = rope.q;
        rope      = get_rope(s.ropes[1]);
        rope.q    = q;
        rope.k    = 1;
        rows[0].x = s.ropes[1]->src[0]->data;
    }
    ggml_cuda_set_device(ctx.device);
    void * q8_1 = s.q8_1 ? get_kept(ctx, KEPT_Q8_1, ggml_row_size(GGML_TYPE_Q8_1, ggml_nelements(s.op))) : nullptr;
    state_of(ctx).q8_1_op = q8_1 ? s.op : nullptr;
    state_of(ctx).q8_1    = q8_1;
    ggml_cuda_pool_alloc<char> scratch(ctx.pool(), std::max<size_t>(s.plan.scratch_bytes, 1));
    CUDA_CHECK(pq_cuda_step(p, s.plan, rows, rope.q || rope.k ? &rope : nullptr, s.settled, (uint8_t *) q8_1, scratch.get(), get_kept(ctx, KEPT_COUNTERS, s.plan.counter_bytes), ctx.stream()));
}

static bool writes_codes(const ggml_tensor * t) {
    return t->op == GGML_OP_SET_ROWS && ggml_is_pq(t->type) && (t->flags & GGML_TENSOR_FLAG_COMPUTE);
}

// The writes of K and V that follow node i of a layer, itself included.
static bool find_writes(const ggml_cgraph * cgraph, int i, int * k, int * v) {
    const int end = std::min(cgraph->n_nodes, i + 64);
    while (i < end && !writes_codes(cgraph->nodes[i])) {
        if (cgraph->nodes[i]->op == GGML_OP_FLASH_ATTN_EXT) {
            return false;
        }
        i = next_node(cgraph, i);
    }
    // two caches never overlap, and no row to encode is a cache: the order of the two does not matter
    const int j = i < end ? next_node(cgraph, i) : cgraph->n_nodes;
    if (j >= cgraph->n_nodes || !writes_codes(cgraph->nodes[j]) || cgraph->nodes[j]->view_src == cgraph->nodes[i]->view_src) {
        return false;
    }
    *k = i;
    *v = j;
    return true;
}

void ggml_cuda_pq_add_alloc_deps(ggml_cgraph * cgraph, ggml_backend_graph_optimize_params * params) {
    for (int i = 0; i < cgraph->n_nodes; i++) {
        int k, v;
        if (!writes_codes(cgraph->nodes[i]) || !find_writes(cgraph, i, &k, &v) || next_node(cgraph, v) >= cgraph->n_nodes) {
            continue;
        }
        ggml_tensor * op = cgraph->nodes[next_node(cgraph, v)];
        if (op->op != GGML_OP_FLASH_ATTN_EXT || !ggml_pq_has_operand(op)) {
            continue;
        }
        // Whatever the number of tokens: the places that graphs of many are given are those that graphs of few use.
        auto keep = [&](const ggml_tensor * t) {
            if (t) {
                params->add_alloc_dep(params->user_data, const_cast<ggml_tensor *>(storage_of(t)), op);
            }
        };
        for (const ggml_tensor * rows : { storage_of(op->src[0]), storage_of(cgraph->nodes[k]->src[0]), storage_of(cgraph->nodes[v]->src[0]) }) {
            keep(rows);
            // of a norm, its product with weights and a rope the backend makes one kernel, as good as ours
            if (rows->op == GGML_OP_ROPE && storage_of(rows->src[0])->op != GGML_OP_MUL) {
                for (const ggml_tensor * t : { rows->src[0], rows->src[1], rows->src[2] }) {
                    keep(t);
                }
            }
        }
        for (int write : { k, v }) {
            keep(cgraph->nodes[write]->src[1]);
            keep(cgraph->nodes[write]->src[GGML_PQ_SRC_SET_ROWS_TAIL_IDX]);
        }
    }
}

// Whether op attends to what the writes of K and V write to, and finds all of their rows in the exact tail, if it reads one.
static bool is_attention_to(const ggml_tensor * op, const ggml_tensor * k, const ggml_tensor * v) {
    if (op->op != GGML_OP_FLASH_ATTN_EXT || !(op->flags & GGML_TENSOR_FLAG_COMPUTE) || op->src[1]->view_src != k->view_src || op->src[2]->view_src != v->view_src || !k->view_src) {
        return false;
    }
    const bool has_tail = op->src[GGML_PQ_SRC_FLASH_ATTN_TAIL_MASK] != nullptr;
    for (const ggml_tensor * write : { k, v }) { // rows that are written to a tail have a slot each (llama_million_tail::assign)
        if (has_tail && !write->src[GGML_PQ_SRC_SET_ROWS_TAIL_IDX]) {
            return false;
        }
    }
    return true;
}

int ggml_cuda_pq_try_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i) {
    const ggml_tensor * first = cgraph->nodes[i];
    int k, v;
    fused_step s;
    if (first->op == GGML_OP_ROPE) {
        auto & deferred = state_of(ctx).deferred_ropes;
        deferred.erase(first);
        if (find_writes(cgraph, i, &k, &v) && get_step(ctx, cgraph, k, v, s) && (first == s.ropes[0] || first == s.ropes[1])) {
            deferred.insert(first); // and ggml_cuda_pq_compute_forward passes it over
        }
        return 0;
    }
    if (!writes_codes(first) || !find_writes(cgraph, i, &k, &v)) {
        return 0;
    }
    if (get_step(ctx, cgraph, k, v, s)) {
        run_step(ctx, s);
        return s.i_attn - i;
    }
    const ggml_tensor * second = cgraph->nodes[v];
    pq_encode_params p[2];
    if (ggml_pq_encode_params(first, p[0]) || ggml_pq_encode_params(second, p[1]) || p[0].n_rows != p[1].n_rows) {
        return 0;
    }
    ggml_cuda_set_device(ctx.device);
    const int next = next_node(cgraph, v);
    const ggml_tensor * op = next < cgraph->n_nodes ? cgraph->nodes[next] : nullptr;
    pq_attn_params attn;
    const char * why;
    if (op && is_attention_to(op, first, second) && !ggml_pq_attn_params(op, attn) && choose_attn_path(ctx.device, op, attn, &why) == ATTN_F16) {
        state_of(ctx).q8_1_op = nullptr;
        ggml_cuda_pq_prefill(ctx, op, attn, masks_settled(op), p);
        return next - i;
    }
    CUDA_CHECK(pq_cuda_encode(p, 2, ctx.stream()));
    return v - i;
}

// ---- L2 ----

void ggml_cuda_pq_pass_through_l2(ggml_backend_cuda_context & ctx, const ggml_tensor * a, const ggml_tensor * b) {
    struct sizes {
        int window = 0; // largest that a stream can have an access policy for; 0: it can't
        int l2     = 0;
    };
    static const std::vector<sizes> devices = [] {
        std::vector<sizes> all(ggml_backend_cuda_get_device_count());
        for (int i = 0; i < (int) all.size(); i++) {
            const int device = ggml_cuda_info().devices[i].physical_device;
            CUDA_CHECK(cudaDeviceGetAttribute(&all[i].window, cudaDevAttrMaxAccessPolicyWindowSize, device));
            CUDA_CHECK(cudaDeviceGetAttribute(&all[i].l2, cudaDevAttrL2CacheSize, device));
        }
        return all;
    }();
    const sizes & device = devices[ctx.device];
    // Weights that L2 can hold from one token to the next should stay there, and so should what a product reads more than once: experts, a part of a cache.
    if (device.window <= 0 || ggml_backend_buffer_get_usage(a->buffer) != GGML_BACKEND_BUFFER_USAGE_WEIGHTS || ggml_nrows(a) != a->ne[1] ||
        ggml_backend_buffer_get_size(a->buffer) < 2 * (size_t) device.l2) {
        return;
    }
    const char * begin = (const char *) a->data, * end = begin + ggml_nbytes(a);
    if (b) {
        const char * first = std::min(begin, (const char *) b->data), * last = std::max(end, (const char *) b->data + ggml_nbytes(b));
        if (last - first <= device.window) {
            begin = first;
            end   = last;
        }
    }
    cudaStreamAttrValue value = {};
    value.accessPolicyWindow.base_ptr  = const_cast<char *>(begin);
    value.accessPolicyWindow.num_bytes = std::min<size_t>(end - begin, device.window);
    value.accessPolicyWindow.hitRatio  = 1.0f;
    value.accessPolicyWindow.hitProp   = cudaAccessPropertyStreaming;
    value.accessPolicyWindow.missProp  = cudaAccessPropertyNormal;
    // It holds for the stream until the next one is set: other kernels do not read these addresses.
    if (cudaStreamSetAttribute(ctx.stream(), cudaStreamAttributeAccessPolicyWindow, &value) != cudaSuccess) {
        (void) cudaGetLastError(); // only a hint
    }
}
