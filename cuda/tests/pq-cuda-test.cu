// Tests and times the CUDA attention kernels.
//
//   pq-cuda-test [test [D]]         every case, or those of a head size, against plain loops in double precision (of sampled heads where
//                                   the context is long), and steps in one launch against a launch for each part
//   pq-cuda-test quick [step]       a few of each kernel, for compute-sanitizer, or steps alone
//   pq-cuda-test step               the latter alone
//   pq-cuda-test plan               the launch plan alone; needs no GPU
//   pq-cuda-test bench [7b|8b [depth [type [query tokens [sequences]]]]]
//                                   a result of two heads against plain loops, then times: median of graph replays over more layers than the L2 cache holds; bytes of codes per second
//                                   and the fraction of the copy bandwidth measured in the same run. "After a product": as in a model, where a step
//                                   finds its code and tables in memory and all multiprocessors busy; from step to step it begins early
//   pq-cuda-test once 7b|8b depth type
//                                   two launches without a graph, for a profiler: ncu --clock-control none -k regex:attn_kernel
#include "../kernels/pq-cuda.h"
#include "../kernels/pq-launch.cuh"
#include "../kernels/pq-rope.cuh"

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

static int n_failed = 0;
static int n_checks = 0;

static void check(bool ok, const char * fmt, ...) {
    n_checks++;
    if (ok) {
        return;
    }
    n_failed++;
    va_list args;
    va_start(args, fmt);
    printf("FAILED: ");
    vprintf(fmt, args);
    printf("\n");
    va_end(args);
    if (n_failed > 30) {
        printf("too many failures\n");
        exit(1);
    }
}

#define CUDA(call)                                                                          \
    do {                                                                                    \
        const cudaError_t err_ = (call);                                                    \
        if (err_ != cudaSuccess) {                                                          \
            printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(err_)); \
            exit(1);                                                                        \
        }                                                                                   \
    } while (0)

// ---- random numbers that are the same everywhere ----

struct rng {
    uint64_t s;
    explicit rng(uint64_t seed) : s(seed * 0x9e3779b97f4a7c15u + 1) {}
    uint64_t next() {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        return s;
    }
    int   below(int n) { return (int) ((next() >> 33) % (uint64_t) n); }
    float uniform()    { return (float) (next() >> 40) * 0x1p-24f * 2.0f - 1.0f; }
    float normal()     { return (uniform() + uniform() + uniform()) * 1.0f; } // variance 1
};

static uint16_t to_f16(float f)      { return __half_as_ushort(__float2half(f)); }
static double   from_f16(uint16_t h) { return (double) __half2float(__ushort_as_half(h)); }

static const uint16_t F16_MINUS_INF = 0xfc00;
static const uint16_t F16_NAN       = 0x7e00;

static const char * const type_names[] = { "pq4", "pq3", "pq2", "f16" };

// ---- one side of a cache on the host ----

struct host_side {
    pq_type type; // PQ_TYPE_COUNT: f16 rows
    int     D, H;
    bool    transform;
    std::vector<uint8_t> blocks;
    std::vector<uint8_t> data;  // [n_stream][n_kv][H][head_bytes]
    size_t head_bytes, row_stride, stream_stride;

    bool coded() const { return type < PQ_TYPE_COUNT; }
    pq_codebook_layout layout() const { return pq_get_codebook_layout(D, transform); }
    const uint8_t  * block(int h)     const { return blocks.data() + (size_t) h * layout().head_bytes; }
    const float    * mu(int h)        const { return (const float *) (block(h) + layout().mu); }
    const uint16_t * T_inv(int h)     const { return (const uint16_t *) (block(h) + layout().T_inv); }
    const uint16_t * centroids(int h) const { return (const uint16_t *) (block(h) + layout().centroids); }

    // the head blocks, and after them the lookup tables
    std::vector<uint8_t> with_tables(bool is_v) const {
        std::vector<uint8_t> all = blocks;
        if (coded()) {
            all.resize(blocks.size() + H * pq_table_bytes(D));
            pq_build_tables(type, D, H, transform, is_v, blocks.data(), all.data() + blocks.size());
        }
        return all;
    }

    const uint8_t * row(int64_t s, int64_t cell, int h) const { return data.data() + s * stream_stride + cell * row_stride + h * head_bytes; }
};

// encodes: T is needed; aniso: codes of all heads but every third are anisotropic
static void make_codebook(host_side & x, rng & r, bool encodes = false, bool aniso = false) {
    const pq_codebook_layout l = x.layout();
    x.blocks.assign((size_t) x.H * l.head_bytes, 0);
    for (int h = 0; h < x.H; h++) {
        uint8_t * b = x.blocks.data() + (size_t) h * l.head_bytes;
        for (int i = 0; i < x.D; i++) {
            ((float *) (b + l.mu))[i] = 0.5f * r.normal();
        }
        for (int i = 0; aniso && h % 3 != 2 && i < x.D; i++) {
            ((float *) (b + l.aniso))[i] = r.normal();
        }
        if (x.transform) {
            for (int i = 0; i < x.D; i++) {
                for (int j = 0; j < x.D; j++) {
                    const bool on = (i + h) % x.D == j;
                    ((uint16_t *) (b + l.T_inv))[i * x.D + j] = to_f16((on ? 0.5f + 0.2f * (float) (i % 7) : 0.0f) + 0.5f * r.normal() / sqrtf((float) x.D));
                    ((uint16_t *) (b + l.T))[i * x.D + j]     = encodes ? to_f16(r.normal() / sqrtf((float) x.D)) : F16_NAN; // attention has no use for it
                }
            }
        }
        for (int i = 0; i < x.D * PQ_KSUB; i++) {
            ((uint16_t *) (b + l.centroids))[i] = to_f16(r.normal());
        }
    }
}

static host_side make_side(pq_type type, int D, int H, int n_stream, int64_t n_kv, bool transform, rng & r) {
    host_side x;
    x.type          = type;
    x.D             = D;
    x.H             = H;
    x.transform     = type < PQ_TYPE_COUNT && transform;
    x.head_bytes    = type < PQ_TYPE_COUNT ? pq_head_bytes(type, D) : (size_t) D * 2;
    x.row_stride    = x.head_bytes * H;
    x.stream_stride = (x.row_stride * (n_kv + 3) + 15) / 16 * 16; // a stream is longer than what is used of it
    x.data.resize(x.stream_stride * n_stream);
    if (x.coded()) {
        for (uint8_t & b : x.data) {
            b = (uint8_t) (r.next() >> 40);
        }
        make_codebook(x, r);
    } else {
        for (size_t i = 0; i < x.data.size(); i += 2) {
            const uint16_t v = to_f16(r.normal());
            memcpy(&x.data[i], &v, 2);
        }
    }
    return x;
}

// ---- a case ----

enum mask_kind {
    MASK_NONE,
    MASK_CAUSAL,   // query i sees all but the last few cells
    MASK_RANDOM,   // each cell with probability 1/2, other values random
    MASK_SPARSE,   // a few runs of cells; whole tiles unseen
    MASK_ALL,      // nothing visible
    MASK_ONE_ROW,  // one query sees nothing, the others all
};

struct attn_case {
    pq_type   kt, vt;
    int       D, n_head, n_head_kv, n_stream, n_q;
    int64_t   n_kv;
    mask_kind mask;
    int       n_tail;    // slots; every third is unused
    bool      transform;
    float     softcap, max_bias;
    bool      sinks;
    int       n_head_mask, n_stream_mask;
    int       n_sm;      // for the plan: changes the split
    size_t    smem;      // for the plan: smaller devices take two phases
    size_t    v_lead;    // bytes before V's codes: 16, and cells do not begin at sectors of memory

    std::string name() const {
        char s[256];
        snprintf(s, sizeof(s), "K %s V %s D %d heads %d/%d streams %d n_q %d n_kv %lld mask %d tail %d T %d cap %g alibi %g sinks %d sm %d lead %zu", type_names[kt],
                 type_names[vt], D, n_head, n_head_kv, n_stream, n_q, (long long) n_kv, (int) mask, n_tail, transform, softcap, max_bias, sinks, n_sm, v_lead);
        return s;
    }
};

template <class T>
struct device_buf {
    T *    p = nullptr;
    size_t n = 0;
    device_buf() {}
    explicit device_buf(size_t n_) : n(n_) { CUDA(cudaMalloc(&p, std::max<size_t>(n, 1) * sizeof(T))); }
    explicit device_buf(const std::vector<T> & v) : device_buf(v.size()) { CUDA(cudaMemcpy(p, v.data(), n * sizeof(T), cudaMemcpyHostToDevice)); }
    device_buf(device_buf && o) : p(o.p), n(o.n) { o.p = nullptr; }
    device_buf(const device_buf &) = delete;
    device_buf & operator=(device_buf && o) { std::swap(p, o.p); std::swap(n, o.n); return *this; }
    ~device_buf() { cudaFree(p); }
};

// Bytes on the device, from `lead` on.
static device_buf<uint8_t> with_lead(size_t lead, const std::vector<uint8_t> & x) {
    std::vector<uint8_t> all(lead);
    all.insert(all.end(), x.begin(), x.end());
    return device_buf<uint8_t>(all);
}

// What a launch counts in, zero before and after.
struct counters {
    device_buf<uint8_t> buf;
    explicit counters(const pq_cuda_attn_plan & plan) : buf(plan.counter_bytes) { CUDA(cudaMemset(buf.p, 0, plan.counter_bytes)); }
    bool are_zero() const {
        std::vector<uint8_t> x(buf.n);
        CUDA(cudaMemcpy(x.data(), buf.p, buf.n, cudaMemcpyDeviceToHost));
        return std::all_of(x.begin(), x.end(), [](uint8_t b) { return b == 0; });
    }
};

static double slope_of(int h, int n_head, double max_bias) {
    if (max_bias <= 0.0) {
        return 1.0;
    }
    int n = 1;
    while (2 * n <= n_head) {
        n *= 2;
    }
    return h < n ? pow(pow(2.0, -max_bias / n), h + 1) : pow(pow(2.0, -max_bias / 2.0 / n), 2 * (h - n) + 1);
}

// Attention of one query to one head in double precision.
struct reference_row {
    const host_side & k, & v;
    int               head_kv;
    int64_t           n_kv;
    const uint8_t   * k_rows, * v_rows; // of the stream and head, row_stride apart
    int               n_tail;
    const uint16_t  * tail_k, * tail_v; // of the stream and head, tail_stride elements apart
    size_t            tail_stride;
    double            sink = -INFINITY;
    std::function<double(double dot, int64_t cell, int slot /* of the tail; or -1 */)> score; // -inf: not seen
    bool              sees_nothing = false; // afterwards

    std::vector<double> attend(const float * q) {
        const int     D = k.D, M_k = k.coded() ? pq_n_subspaces(k.type, D) : 0, M_v = v.coded() ? pq_n_subspaces(v.type, D) : 0;
        const pq_spec sk = pq_get_spec(k.type), sv = pq_get_spec(v.type);
        std::vector<double> qt(q, q + D), o(D, 0.0), ot(D, 0.0);
        double q_mu = 0.0;
        for (int j = 0; k.coded() && j < D; j++) {
            q_mu += (double) q[j] * k.mu(head_kv)[j];
            if (k.transform) {
                qt[j] = 0.0;
                for (int i = 0; i < D; i++) {
                    qt[j] += from_f16(k.T_inv(head_kv)[j * D + i]) * q[i];
                }
            }
        }
        std::vector<double> lut((size_t) M_k * PQ_KSUB, 0.0), cv((size_t) D * PQ_KSUB);
        for (int m = 0; m < M_k; m++) {
            for (int e = 0; e < PQ_KSUB * sk.dsub; e++) {
                lut[(size_t) m * PQ_KSUB + e / sk.dsub] += qt[m * sk.dsub + e % sk.dsub] * from_f16(k.centroids(head_kv)[(size_t) m * PQ_KSUB * sk.dsub + e]);
            }
        }
        for (size_t e = 0; v.coded() && e < cv.size(); e++) {
            cv[e] = from_f16(v.centroids(head_kv)[e]);
        }
        std::vector<double> scores(n_kv + n_tail);
        double top = sink;
        for (int64_t i = 0; i < n_kv; i++) {
            const uint8_t * row = k_rows + i * k.row_stride;
            double x = q_mu;
            for (int m = 0; m < M_k; m++) {
                x += lut[(size_t) m * PQ_KSUB + pq_code_get(k.type, D, row, m)];
            }
            for (int d = 0; d < D && !k.coded(); d++) {
                x += q[d] * from_f16(((const uint16_t *) row)[d]);
            }
            scores[i] = score(x, i, -1);
            top = std::max(top, scores[i]);
        }
        for (int i = 0; i < n_tail; i++) {
            double x = 0.0;
            for (int d = 0; d < D; d++) {
                x += q[d] * from_f16(tail_k[i * tail_stride + d]);
            }
            scores[n_kv + i] = score(x, 0, i);
            top = std::max(top, scores[n_kv + i]);
        }
        double total = sink == -INFINITY ? 0.0 : exp(sink - top), coded = 0.0;
        for (int64_t i = 0; i < n_kv + n_tail; i++) {
            const double w = scores[i] == -INFINITY ? 0.0 : exp(scores[i] - top);
            if (w == 0.0) {
                continue;
            }
            total += w;
            if (i >= n_kv) {
                for (int d = 0; d < D; d++) {
                    ot[d] += w * from_f16(tail_v[(i - n_kv) * tail_stride + d]);
                }
                continue;
            }
            coded += w;
            const uint8_t * row = v_rows + i * v.row_stride;
            for (int m = 0; m < M_v; m++) {
                const double * y = &cv[((size_t) m * PQ_KSUB + pq_code_get(v.type, D, row, m)) * sv.dsub];
                for (int e = 0; e < sv.dsub; e++) {
                    o[m * sv.dsub + e] += w * y[e];
                }
            }
            for (int d = 0; d < D && !v.coded(); d++) {
                o[d] += w * from_f16(((const uint16_t *) row)[d]);
            }
        }
        sees_nothing = total == 0.0 || top == -INFINITY;
        std::vector<double> result(D);
        for (int d = 0; d < D; d++) {
            double x = o[d];
            if (v.coded() && v.transform) {
                x = 0.0;
                for (int j = 0; j < D; j++) {
                    x += o[j] * from_f16(v.T_inv(head_kv)[j * D + d]);
                }
            }
            x += ot[d] + (v.coded() ? coded * v.mu(head_kv)[d] : 0.0);
            result[d] = total == 0.0 ? 0.0 : x / total;
        }
        return result;
    }
};

static double worst_nmse = 0.0;

static void run_case(const attn_case & c, const pq_cuda_device_props & real) {
    rng r((uint64_t) c.n_kv * 31 + c.D * 7 + c.n_head + c.n_tail * 13 + c.mask);
    const int n_group = c.n_head / c.n_head_kv;
    const host_side k0 = make_side(c.kt, c.D, c.n_head_kv, c.n_stream, c.n_kv, c.transform, r);
    host_side k = k0, v = make_side(c.vt, c.D, c.n_head_kv, c.n_stream, c.n_kv, c.transform, r);

    std::vector<float> q((size_t) c.n_stream * c.n_head * c.n_q * c.D);
    for (float & x : q) {
        x = 1.5f * r.normal();
    }
    std::vector<float> sinks(c.n_head);
    for (float & x : sinks) {
        x = 3.0f * r.normal();
    }
    // mask rows longer than n_kv, as an arbitrary stride; 16-byte multiples in every other case
    const int64_t mask_ld = c.n_kv + (c.n_kv % 2 == 0 ? 8 - c.n_kv % 8 : 3);
    std::vector<uint16_t> mask((size_t) c.n_stream_mask * c.n_head_mask * c.n_q * mask_ld, F16_NAN);
    for (int64_t row = 0; row < (int64_t) c.n_stream_mask * c.n_head_mask * c.n_q; row++) {
        uint16_t * m = &mask[row * mask_ld];
        const int64_t i_q = row % c.n_q;
        for (int64_t i = 0; i < c.n_kv; i++) {
            bool seen = true;
            float value = 0.0f;
            switch (c.mask) {
                case MASK_NONE:    break;
                case MASK_CAUSAL:  seen = i < c.n_kv - c.n_q + i_q; break;
                case MASK_RANDOM:  seen = r.below(2); value = r.normal(); break;
                case MASK_SPARSE:  seen = (i / 40 * 7 + row) % 11 == 0; break;
                case MASK_ALL:     seen = false; break;
                case MASK_ONE_ROW: seen = row != 0; break;
            }
            m[i] = seen ? to_f16(value) : F16_MINUS_INF;
        }
    }
    const int64_t n_tail_ld = c.n_tail + (c.n_tail % 2 == 0 ? 16 - c.n_tail % 8 : 5);
    std::vector<uint16_t> tail_k((size_t) c.n_stream * c.n_head_kv * c.n_tail * c.D), tail_v(tail_k.size()), tail_mask((size_t) c.n_stream * c.n_q * n_tail_ld, F16_NAN);
    for (uint16_t & x : tail_k) { x = to_f16(r.normal()); }
    for (uint16_t & x : tail_v) { x = to_f16(r.normal()); }
    for (int s = 0; s < c.n_stream; s++) {
        for (int i = 0; i < c.n_tail; i++) {
            const bool used = (i + s) % 3 != 0 || c.n_tail == 1;
            for (int t = 0; t < c.n_q; t++) {
                tail_mask[((size_t) s * c.n_q + t) * n_tail_ld + i] = used && c.mask != MASK_ALL && i < c.n_tail - c.n_q + t + 1 ? to_f16(c.mask == MASK_RANDOM ? r.normal() : 0.0f) : F16_MINUS_INF;
            }
            for (int h = 0; h < c.n_head_kv && (!used || c.mask == MASK_ALL); h++) {
                for (int d = 0; d < c.D; d++) { // an unused slot holds anything
                    tail_k[(((size_t) s * c.n_head_kv + h) * c.n_tail + i) * c.D + d] = F16_NAN;
                    tail_v[(((size_t) s * c.n_head_kv + h) * c.n_tail + i) * c.D + d] = F16_NAN;
                }
            }
        }
    }
    auto mask_at = [&](int s, int h, int t, int64_t i) {
        return mask[(((size_t) (s % c.n_stream_mask) * c.n_head_mask + h % c.n_head_mask) * c.n_q + t) * mask_ld + i];
    };
    // a plain row that no query of its stream and head sees holds NaN
    for (host_side * side : { &k, &v }) {
        for (int s = 0; !side->coded() && c.mask != MASK_NONE && s < c.n_stream; s++) {
            for (int64_t i = 0; i < c.n_kv + 3; i++) {
                for (int hk = 0; hk < c.n_head_kv; hk++) {
                    bool seen = false;
                    for (int g = 0; g < n_group && i < c.n_kv; g++) {
                        for (int t = 0; t < c.n_q; t++) {
                            seen = seen || mask_at(s, hk * n_group + g, t, i) != F16_MINUS_INF;
                        }
                    }
                    for (int d = 0; d < c.D && !seen; d++) {
                        memcpy((void *) (side->row(s, i, hk) + 2 * d), &F16_NAN, 2);
                    }
                }
            }
        }
    }

    // ---- device ----
    device_buf<uint8_t> d_kb(k.with_tables(false)), d_vb(v.with_tables(true)), d_k(k.data), d_v(with_lead(c.v_lead, v.data));
    device_buf<float>   d_q(q), d_sinks(sinks), d_dst((size_t) c.n_stream * c.n_q * c.n_head * c.D);
    device_buf<uint16_t> d_mask(mask), d_tk(tail_k), d_tv(tail_v), d_tm(tail_mask);
    CUDA(cudaMemset(d_dst.p, 0xff, d_dst.n * sizeof(float)));

    pq_attn_params p = {};
    p.n_head    = c.n_head;
    p.n_head_kv = c.n_head_kv;
    p.n_stream  = c.n_stream;
    p.n_q       = c.n_q;
    p.n_kv      = c.n_kv;
    auto side = [&](const host_side & x, const uint8_t * data, const uint8_t * blocks) {
        pq_attn_side s = {};
        s.type          = x.type;
        s.D             = x.D;
        s.codebook      = x.coded() ? blocks : nullptr;
        s.tables        = x.coded() ? blocks + x.blocks.size() : nullptr;
        s.has_transform = x.transform;
        s.data          = data;
        s.row_stride    = x.row_stride;
        s.head_stride   = x.head_bytes;
        s.stream_stride = x.stream_stride;
        return s;
    };
    p.k = side(k, d_k.p, d_kb.p);
    p.v = side(v, d_v.p + c.v_lead, d_vb.p);
    p.q               = (const uint8_t *) d_q.p;
    p.q_token_stride  = (size_t) c.D * 4;
    p.q_head_stride   = p.q_token_stride * c.n_q;
    p.q_stream_stride = p.q_head_stride * c.n_head;
    if (c.mask != MASK_NONE) {
        p.mask               = (const uint8_t *) d_mask.p;
        p.mask_token_stride  = mask_ld * 2;
        p.mask_head_stride   = p.mask_token_stride * c.n_q;
        p.mask_stream_stride = p.mask_head_stride * c.n_head_mask;
    }
    p.n_head_mask   = c.n_head_mask;
    p.n_stream_mask = c.n_stream_mask;
    if (c.n_tail > 0) {
        p.tail.n                  = c.n_tail;
        p.tail.k                  = (const uint8_t *) d_tk.p;
        p.tail.v                  = (const uint8_t *) d_tv.p;
        p.tail.k_row_stride       = p.tail.v_row_stride    = (size_t) c.D * 2;
        p.tail.k_head_stride      = p.tail.v_head_stride   = p.tail.k_row_stride * c.n_tail;
        p.tail.k_stream_stride    = p.tail.v_stream_stride = p.tail.k_head_stride * c.n_head_kv;
        p.tail.mask               = (const uint8_t *) d_tm.p;
        p.tail.mask_token_stride  = n_tail_ld * 2;
        p.tail.mask_stream_stride = p.tail.mask_token_stride * c.n_q;
    }
    p.sinks           = c.sinks ? d_sinks.p : nullptr;
    p.scale           = 1.0f / sqrtf((float) c.D);
    p.max_bias        = c.max_bias;
    p.logit_softcap   = c.softcap;
    p.dst             = d_dst.p;
    p.dst_head_stride   = (size_t) c.D * 4;
    p.dst_token_stride  = p.dst_head_stride * c.n_head;
    p.dst_stream_stride = p.dst_token_stride * c.n_q;

    pq_cuda_device_props props = real;
    props.n_sm = c.n_sm ? c.n_sm : real.n_sm;
    props.smem_optin = c.smem ? c.smem : real.smem_optin;
    const char * why = pq_cuda_attn_unsupported(p, props);
    check(!why, "%s: unsupported: %s", c.name().c_str(), why ? why : "");
    if (why) {
        return;
    }
    const pq_cuda_attn_plan plan = pq_cuda_attn_make_plan(p, props);
    device_buf<uint8_t> scratch(plan.scratch_bytes);
    CUDA(cudaMemset(scratch.p, 0xff, plan.scratch_bytes));
    const counters n_done(plan);
    const cudaError_t err = pq_cuda_attn(p, plan, scratch.p, n_done.buf.p, 0);
    check(err == cudaSuccess, "%s: launch: %s", c.name().c_str(), cudaGetErrorString(err));
    CUDA(cudaDeviceSynchronize());
    check(n_done.are_zero(), "%s: counters are not as they were", c.name().c_str());
    std::vector<float> got(d_dst.n);
    CUDA(cudaMemcpy(got.data(), d_dst.p, got.size() * sizeof(float), cudaMemcpyDeviceToHost));

    // ---- reference ----
    double err2 = 0.0, ref2 = 0.0;
    const int step = c.n_kv * c.n_head * c.n_q * c.n_stream > (1 << 18) ? std::max(1, c.n_head / 4 - 1) : 1; // sampled heads
    for (int s = 0; s < c.n_stream; s++) {
        for (int h = 0; h < c.n_head; h += step) {
            const int    hk    = h / n_group;
            const size_t tail  = ((size_t) s * c.n_head_kv + hk) * c.n_tail * c.D;
            const double slope = slope_of(h, c.n_head, c.max_bias);
            for (int t = 0; t < c.n_q; t++) {
                reference_row x = { k, v, hk, c.n_kv, k.row(s, 0, hk), v.row(s, 0, hk), c.n_tail, tail_k.data() + tail, tail_v.data() + tail, (size_t) c.D };
                x.sink  = c.sinks ? sinks[h] : -INFINITY;
                x.score = [&](double dot, int64_t cell, int slot) {
                    const uint16_t m = slot >= 0 ? tail_mask[((size_t) s * c.n_q + t) * n_tail_ld + slot] : c.mask == MASK_NONE ? 0 : mask_at(s, h, t, cell);
                    dot *= p.scale;
                    dot  = c.softcap != 0.0f ? c.softcap * tanh(dot / c.softcap) : dot;
                    return m == F16_MINUS_INF ? -INFINITY : dot + slope * from_f16(m);
                };
                const std::vector<double> want = x.attend(&q[(((size_t) s * c.n_head + h) * c.n_q + t) * c.D]);
                const float * dst = &got[(((size_t) s * c.n_q + t) * c.n_head + h) * c.D];
                for (int d = 0; d < c.D; d++) {
                    if (x.sees_nothing) {
                        check(dst[d] == 0.0f, "%s: stream %d head %d query %d sees nothing, element %d is %g", c.name().c_str(), s, h, t, d, dst[d]);
                    }
                    err2 += (dst[d] - want[d]) * (dst[d] - want[d]);
                    ref2 += want[d] * want[d];
                }
            }
        }
    }
    const double nmse = ref2 == 0.0 ? err2 : err2 / ref2;
    worst_nmse = nmse > worst_nmse ? nmse : worst_nmse;
    check(nmse <= 1e-5, "%s: NMSE %.3g (split %d, kernel %d)", c.name().c_str(), nmse, plan.n_split, (int) plan.kernel);
    for (size_t i = 0; i < got.size(); i++) {
        if (!std::isfinite(got[i])) {
            check(false, "%s: element %zu was not written or is not finite", c.name().c_str(), i);
            break;
        }
    }
}

// ---- a step: new rows, encoding and attention in one launch, against a launch for each ----

enum rope_kind { ROPE_NONE, ROPE_PAIRS, ROPE_NEOX, ROPE_NEOX_YARN, ROPE_ONLY_K, ROPE_ONLY_Q };

struct step_case {
    pq_type kt, vt;
    int     n_head, n_head_kv, n_stream, n_q; // a new row per query
    int64_t n_kv;
    int     n_slots;  // per stream
    int     n_ahead;  // streams of the storage before those in use
    bool    transform;
    rope_kind rope;
};

// Turns rows of 128 to the positions of their tokens, in place.
static __global__ void rope_rows(float * x, pq_cuda_rope rope, int n_q, int n_head, bool heads_inside) {
    const int row = blockIdx.x, i = threadIdx.x; // a pair
    // rows of K are [token][head], queries [stream][head][token of the stream]
    const int token = heads_inside ? row / n_head : row / (n_head * n_q) * n_q + row % n_q;
    const int low = rope.neox ? i : 2 * i, high = rope.neox ? i + 64 : 2 * i + 1;
    const float2 turn = pq_rope_turn(rope, rope.pos[token], i);
    const float a = x[row * 128 + low], b = x[row * 128 + high];
    x[row * 128 + low]  = pq_rope_low(turn, a, b);
    x[row * 128 + high] = pq_rope_high(turn, a, b);
}

static __global__ void rope_turns(float2 * turns, pq_cuda_rope rope) {
    turns[blockIdx.x * 64 + threadIdx.x] = pq_rope_turn(rope, rope.pos[blockIdx.x], threadIdx.x);
}

static pq_cuda_rope make_rope(rope_kind kind, const int32_t * pos, const float * freq_factors) {
    pq_cuda_rope r = {};
    r.q            = kind != ROPE_NONE && kind != ROPE_ONLY_K;
    r.k            = kind != ROPE_NONE && kind != ROPE_ONLY_Q;
    r.neox         = kind == ROPE_NEOX || kind == ROPE_NEOX_YARN;
    r.pos          = pos;
    r.freq_factors = kind == ROPE_NEOX ? freq_factors : nullptr;
    r.theta_scale  = powf(10000.0f, -2.0f / 128.0f);
    r.freq_scale   = kind == ROPE_NEOX_YARN ? 0.25f : 1.0f;
    r.ext_factor   = kind == ROPE_NEOX_YARN ? 1.0f : 0.0f;
    r.attn_factor  = kind == ROPE_NEOX_YARN ? 0.9f : 1.0f;
    r.corr_low     = 20.0f;
    r.corr_high    = 45.0f;
    return r;
}

// The turns against double precision. They are approximations: what is tested is the formula.
static void test_turns() {
    std::vector<int32_t> pos = { 0, 1, 7, 100, 999 };
    std::vector<float> ff(64);
    for (int i = 0; i < 64; i++) { ff[i] = i < 20 ? 1.0f : 1.0f + 0.15f * (i - 20); }
    device_buf<int32_t> d_pos(pos);
    device_buf<float>   d_ff(ff), d_turns(pos.size() * 128);
    for (rope_kind kind : { ROPE_PAIRS, ROPE_NEOX, ROPE_NEOX_YARN }) {
        const pq_cuda_rope r = make_rope(kind, d_pos.p, d_ff.p);
        rope_turns<<<(int) pos.size(), 64>>>((float2 *) d_turns.p, r);
        std::vector<float> got(pos.size() * 128);
        CUDA(cudaMemcpy(got.data(), d_turns.p, got.size() * sizeof(float), cudaMemcpyDeviceToHost));
        for (size_t t = 0; t < pos.size(); t++) {
            for (int i = 0; i < 64; i++) {
                double theta = pos[t] * pow(10000.0, -i / 64.0), scale = r.attn_factor;
                if (r.freq_factors) {
                    theta /= ff[i];
                }
                if (r.ext_factor != 0.0f) {
                    const double mix = 1.0 - std::min(1.0, std::max(0.0, (i - 20.0) / 25.0));
                    theta = 0.25 * theta * (1.0 - mix) + theta * mix;
                    scale *= 1.0 + 0.1 * log(4.0);
                }
                const float c = got[(t * 64 + i) * 2], s = got[(t * 64 + i) * 2 + 1];
                check(fabs(c - scale * cos(theta)) < 1e-3 && fabs(s - scale * sin(theta)) < 1e-3, "turn of kind %d, position %d, pair %d: %g %g, not %g %g", (int) kind,
                      pos[t], i, c, s, scale * cos(theta), scale * sin(theta));
            }
        }
    }
}

// Blocks of 32 against the floats that they hold.
static void check_q8(const char * name, const std::vector<float> & x, const uint8_t * blocks) {
    for (size_t b = 0; b < x.size() / 32; b++) {
        const uint8_t * block = blocks + b * PQ_Q8_BLOCK_BYTES;
        uint16_t ds[2];
        memcpy(ds, block, sizeof(ds));
        double top = 0.0, sum = 0.0, size = 0.0;
        for (int i = 0; i < 32; i++) {
            top   = std::max(top, (double) fabsf(x[32 * b + i]));
            sum  += x[32 * b + i];
            size += fabsf(x[32 * b + i]);
        }
        bool ok = fabs(from_f16(ds[0]) - top / 127.0) <= 1e-3 * top / 127.0 + 1e-7 && fabs(from_f16(ds[1]) - sum) <= 1e-3 * fabs(sum) + 1e-5 * size + 1e-7;
        for (int i = 0; i < 32; i++) {
            ok = ok && (top == 0.0 ? block[4 + i] == 0 : fabs(x[32 * b + i] * 127.0 / top - (int8_t) block[4 + i]) <= 0.5001);
        }
        check(ok, "%s: block %zu of the result as integers is off", name, b);
        if (!ok) {
            return;
        }
    }
}

static void run_step(const step_case & c, const pq_cuda_device_props & props) {
    const int D = 128, H = c.n_head_kv, n_rows = c.n_q * c.n_stream;
    char name[160];
    snprintf(name, sizeof(name), "step: K %s V %s heads %d/%d streams %d n_q %d n_kv %lld slots %d T %d rope %d", type_names[c.kt], type_names[c.vt], c.n_head, H,
             c.n_stream, c.n_q, (long long) c.n_kv, c.n_slots, c.transform, (int) c.rope);
    rng r((uint64_t) c.n_kv + c.n_slots * 7 + c.n_head + c.n_q);
    host_side k = make_side(c.kt, D, H, c.n_stream, c.n_kv, c.transform, r), v = make_side(c.vt, D, H, c.n_stream, c.n_kv, c.transform, r);
    make_codebook(k, r, true, true);
    make_codebook(v, r, true);
    // where the new rows go: the last cells of each stream, and any slots
    std::vector<int64_t> cell(n_rows), slot(n_rows);
    std::vector<uint16_t> mask((size_t) c.n_stream * c.n_q * c.n_kv, 0), tail_mask((size_t) c.n_stream * c.n_q * c.n_slots, F16_MINUS_INF);
    const int64_t cells_per_stream = (int64_t) (k.stream_stride / k.row_stride); // rows are of one stream's length only when it divides
    for (int i = 0; i < n_rows; i++) {
        const int s = i / c.n_q, t = i % c.n_q;
        cell[i] = s * cells_per_stream + c.n_kv - c.n_q + t;
        slot[i] = (int64_t) (s + c.n_ahead) * c.n_slots + (c.n_slots / 2 + 5 * t) % c.n_slots;
        for (int u = 0; u < c.n_q; u++) {
            mask[((size_t) s * c.n_q + u) * c.n_kv + c.n_kv - c.n_q + t] = F16_MINUS_INF;
            if (t <= u) {
                tail_mask[((size_t) s * c.n_q + u) * c.n_slots + slot[i] % c.n_slots] = 0;
            }
            for (int x = 0; x < c.n_slots; x += 3) { // older tokens
                bool is_new = false;
                for (int w = 0; w < c.n_q; w++) {
                    is_new = is_new || (c.n_slots / 2 + 5 * w) % c.n_slots == x;
                }
                if (!is_new) {
                    tail_mask[((size_t) s * c.n_q + u) * c.n_slots + x] = 0;
                }
            }
        }
    }
    std::vector<uint16_t> tail((size_t) (c.n_stream + c.n_ahead) * c.n_slots * H * D);
    for (uint16_t & x : tail) { x = to_f16(r.normal()); }
    for (int i = 0; i < n_rows; i++) { // nothing is there yet
        std::fill_n(&tail[slot[i] * H * D], H * D, F16_NAN);
    }
    device_buf<uint8_t>  d_kb(k.with_tables(false)), d_vb(v.with_tables(true)), d_k[2] = { device_buf<uint8_t>(k.data), device_buf<uint8_t>(k.data) }, d_v[2] = { device_buf<uint8_t>(v.data), device_buf<uint8_t>(v.data) };
    device_buf<uint16_t> d_mask(mask), d_tm(tail_mask), d_tk[2] = { device_buf<uint16_t>(tail), device_buf<uint16_t>(tail) }, d_tv[2] = { device_buf<uint16_t>(tail), device_buf<uint16_t>(tail) };
    device_buf<int64_t>  d_cell(cell), d_slot(slot);
    const size_t n_out = (size_t) n_rows * c.n_head * D;
    device_buf<float>    d_dst[2] = { device_buf<float>(n_out), device_buf<float>(n_out) };
    device_buf<uint8_t>  d_q8(n_out / 32 * PQ_Q8_BLOCK_BYTES);

    pq_attn_params   p[2] = {};
    pq_encode_params e[2][2] = {};
    for (int i = 0; i < 2; i++) {
        p[i].n_head = c.n_head; p[i].n_head_kv = H; p[i].n_stream = c.n_stream; p[i].n_q = c.n_q; p[i].n_kv = c.n_kv;
        for (int side = 0; side < 2; side++) {
            const host_side & x = side ? v : k;
            pq_attn_side & a = side ? p[i].v : p[i].k;
            a.type = x.type; a.D = D; a.has_transform = x.transform;
            a.codebook = side ? d_vb.p : d_kb.p;
            a.tables   = a.codebook + x.blocks.size();
            a.data = side ? d_v[i].p : d_k[i].p;
            a.row_stride = x.row_stride; a.head_stride = x.head_bytes; a.stream_stride = cells_per_stream * x.row_stride;
            pq_encode_params & n = e[i][side];
            n.type = x.type; n.D = D; n.n_head_kv = H; n.n_rows = n_rows; n.codebook = a.codebook; n.has_transform = x.transform;
            n.x_row_stride = (size_t) H * D * 4; n.x_head_stride = D * 4;
            n.codes = (uint8_t *) a.data; n.codes_row_stride = x.row_stride; n.row_idx = d_cell.p;
            n.tail = (uint8_t *) (side ? d_tv[i].p : d_tk[i].p); n.tail_row_stride = (size_t) H * D * 2; n.tail_idx = d_slot.p;
        }
        p[i].q_token_stride = D * 4; p[i].q_head_stride = p[i].q_token_stride * c.n_q; p[i].q_stream_stride = p[i].q_head_stride * c.n_head;
        p[i].mask = (const uint8_t *) d_mask.p;
        p[i].mask_token_stride = c.n_kv * 2; p[i].mask_head_stride = p[i].mask_stream_stride = p[i].mask_token_stride * c.n_q;
        p[i].n_head_mask = 1; p[i].n_stream_mask = c.n_stream;
        pq_attn_tail & t = p[i].tail;
        t.n = c.n_slots;
        t.k_row_stride = t.v_row_stride = (size_t) H * D * 2; t.k_head_stride = t.v_head_stride = D * 2;
        t.k_stream_stride = t.v_stream_stride = t.k_row_stride * c.n_slots;
        t.k = (const uint8_t *) d_tk[i].p + c.n_ahead * t.k_stream_stride;
        t.v = (const uint8_t *) d_tv[i].p + c.n_ahead * t.k_stream_stride;
        t.mask = (const uint8_t *) d_tm.p; t.mask_token_stride = c.n_slots * 2; t.mask_stream_stride = t.mask_token_stride * c.n_q;
        p[i].scale = 1.0f / sqrtf((float) D);
        p[i].dst = d_dst[i].p;
        p[i].dst_head_stride = D * 4; p[i].dst_token_stride = p[i].dst_head_stride * c.n_head; p[i].dst_stream_stride = p[i].dst_token_stride * c.n_q;
    }
    const pq_cuda_attn_plan plan = pq_cuda_attn_make_plan(p[0], props);
    device_buf<uint8_t> scratch(plan.scratch_bytes);
    const counters n_done(plan);
    std::vector<int32_t> pos(n_rows);
    std::vector<float>   freq_factors(64);
    for (int i = 0; i < n_rows; i++) { pos[i] = (int32_t) c.n_kv - 1 + i % c.n_q + 1000 * (i / c.n_q); }
    for (int i = 0; i < 64; i++)     { freq_factors[i] = 1.0f + 0.1f * i; }
    device_buf<int32_t> d_pos(pos);
    device_buf<float>   d_ff(freq_factors);
    const pq_cuda_rope rope = make_rope(c.rope, d_pos.p, d_ff.p);
    for (int round = 0; round < 3; round++) { // the counters serve more than once
        std::vector<float> q((size_t) n_rows * c.n_head * D), x((size_t) n_rows * H * D);
        for (float & f : q) { f = 1.5f * r.normal(); }
        for (float & f : x) { f = r.normal(); }
        device_buf<float> d_q[2] = { device_buf<float>(q), device_buf<float>(q) }, d_k_new[2] = { device_buf<float>(x), device_buf<float>(x) }, d_v_new(x);
        if (rope.q) {
            rope_rows<<<n_rows * c.n_head, 64>>>(d_q[0].p, rope, c.n_q, c.n_head, false);
        }
        if (rope.k) {
            rope_rows<<<n_rows * H, 64>>>(d_k_new[0].p, rope, c.n_q, H, true);
        }
        for (int i = 0; i < 2; i++) {
            p[i].q = (const uint8_t *) d_q[i].p;
            e[i][0].x = d_k_new[i].p;
            e[i][1].x = d_v_new.p;
            CUDA(cudaMemset(d_dst[i].p, 0xff, n_out * sizeof(float)));
        }
        const char * why = pq_cuda_step_unsupported(p[1], plan, e[1]);
        check(!why, "%s: %s", name, why ? why : "");
        if (why) {
            return;
        }
        CUDA(pq_cuda_encode(e[0], 2, 0));
        CUDA(pq_cuda_attn(p[0], plan, scratch.p, n_done.buf.p, 0));
        // The second round begins while the kernel before it may run, the first does not. In the third each step has another before it, which it may not disturb.
        for (int i = 0; i < (round == 2 ? 4 : 1); i++) {
            CUDA(pq_cuda_step(p[1], plan, e[1], c.rope == ROPE_NONE ? nullptr : &rope, round > 0, round > 0 ? d_q8.p : nullptr, scratch.p, n_done.buf.p, 0));
        }
        CUDA(cudaDeviceSynchronize());
        check(n_done.are_zero(), "%s: counters are not as they were", name);
        auto same = [&](const char * what, const void * a, const void * b, size_t n) {
            std::vector<uint8_t> x(n), y(n);
            CUDA(cudaMemcpy(x.data(), a, n, cudaMemcpyDeviceToHost));
            CUDA(cudaMemcpy(y.data(), b, n, cudaMemcpyDeviceToHost));
            const size_t at = std::mismatch(x.begin(), x.end(), y.begin()).first - x.begin();
            check(at == n, "%s: round %d: %s differ at byte %zu of %zu", name, round, what, at, n);
        };
        same("codes of K", d_k[0].p, d_k[1].p, k.data.size());
        same("codes of V", d_v[0].p, d_v[1].p, v.data.size());
        same("tails of K", d_tk[0].p, d_tk[1].p, tail.size() * 2);
        same("tails of V", d_tv[0].p, d_tv[1].p, tail.size() * 2);
        same("results", d_dst[0].p, d_dst[1].p, n_out * sizeof(float));
        std::vector<float> got(n_out);
        CUDA(cudaMemcpy(got.data(), d_dst[1].p, n_out * sizeof(float), cudaMemcpyDeviceToHost));
        check(std::all_of(got.begin(), got.end(), [](float f) { return std::isfinite(f); }), "%s: the result is not finite: a new row was not seen", name);
        if (round > 0) {
            std::vector<uint8_t> q8(d_q8.n);
            CUDA(cudaMemcpy(q8.data(), d_q8.p, q8.size(), cudaMemcpyDeviceToHost));
            check_q8(name, got, q8.data());
        }
    }
}

static void test_step(const pq_cuda_device_props & props) {
    const pq_type P4 = PQ_TYPE_PQ4, P3 = PQ_TYPE_PQ3, P2 = PQ_TYPE_PQ2;
    test_turns();
    int i = 0;
    for (const auto & t : { std::pair<pq_type, pq_type>(P4, P4), { P3, P3 }, { P2, P2 }, { P4, P2 }, { P2, P3 } }) {
        for (int64_t n_kv : { 31, 256, 4096 }) {
            for (const auto & heads : { std::pair<int, int>(32, 32), { 32, 8 }, { 8, 1 }, { 3, 3 } }) {
                for (int n_q : { 1, 3, 8 }) {
                    run_step({ t.first, t.second, heads.first, heads.second, 1, n_q, n_kv, 64, 0, true, (rope_kind) (i++ % 6) }, props);
                }
            }
        }
    }
    for (int n_stream : { 2, 5 }) {
        for (rope_kind rope : { ROPE_NONE, ROPE_PAIRS, ROPE_NEOX }) {
            run_step({ P4, P4, 8, 4, n_stream, 1, 1000, 129, 0, true, rope }, props);
            run_step({ P3, P4, 8, 4, n_stream, 2, 1000, 64, 2, false, rope }, props);
        }
    }
    run_step({ P4, P4, 64, 64, 1, 1, 40000, 640, 0, true, ROPE_NONE }, props); // more blocks than multiprocessors
    run_step({ P4, P4, 32, 32, 1, 1, 33024, 640, 0, true, ROPE_NONE }, props); // the last part is longer than the others
    run_step({ P4, P4, 64, 64, 1, 1, 40000, 640, 0, true, ROPE_PAIRS }, props);
    for (const auto & t : { std::pair<pq_type, pq_type>(P4, P4), { P4, P3 }, { P3, P2 } }) { // blocks without attention encode all, unit after unit
        for (int n_q : { 1, 8 }) {
            run_step({ t.first, t.second, 32, 32, 1, n_q, 32768, 640, 0, true, ROPE_NEOX }, props);
            run_step({ t.first, t.second, 32, 8,  1, n_q, 32768, 640, 0, true, ROPE_PAIRS }, props);
        }
    }
}

static void test(const pq_cuda_device_props & props, int only_D) {
    const pq_type P4 = PQ_TYPE_PQ4, P3 = PQ_TYPE_PQ3, P2 = PQ_TYPE_PQ2, F = PQ_TYPE_COUNT;
    const attn_case base = { P4, P4, 128, 4, 4, 1, 1, 257, MASK_CAUSAL, 128, true, 0.0f, 0.0f, false, 1, 1, 0, 0, 0 };
    auto with = [&](auto f) {
        attn_case c = base;
        f(c);
        if (only_D == 0 || c.D == only_D) {
            run_case(c, props);
        }
    };
    with([](attn_case &) {});
    const pq_type types[] = { P4, P3, P2, F };
    for (pq_type kt : types) {
        for (pq_type vt : types) {
            if (kt == F && vt == F) {
                continue;
            }
            for (int D : { 64, 80, 96, 128, 192, 256 }) {
                for (int group : { 1, 4, 8 }) {
                    with([&](attn_case & c) { c.kt = kt; c.vt = vt; c.D = D; c.n_head = 2 * group; c.n_head_kv = 2; c.n_kv = 300; c.mask = MASK_RANDOM; });
                }
                with([&](attn_case & c) { c.kt = kt; c.vt = vt; c.D = D; c.n_head = 3; c.n_head_kv = 3; c.mask = MASK_SPARSE; c.n_kv = 1000; });
            }
        }
    }
    for (pq_type kt : { P4, P3, P2 }) { // rows of whole sectors, and not
        for (pq_type vt : { P4, P3, P2 }) {
            for (size_t v_lead : { 0, 16 }) {
                for (int group : { 1, 4 }) {
                    with([&](attn_case & c) { c.kt = kt; c.vt = vt; c.n_head = 8 * group; c.n_head_kv = 8; c.n_kv = 1000; c.v_lead = v_lead; });
                    with([&](attn_case & c) { c.kt = kt; c.vt = vt; c.n_head = 8 * group; c.n_head_kv = 8; c.n_kv = 2000; c.v_lead = v_lead; c.mask = MASK_SPARSE; });
                }
            }
        }
    }
    for (int64_t n_kv : { 1, 31, 97, 257, 8192 }) {
        for (int n_tail : { 0, 1, 7, 128, 129, 640 }) {
            for (pq_type t : { P4, P3, P2 }) {
                with([&](attn_case & c) { c.kt = c.vt = t; c.n_kv = n_kv; c.n_tail = n_tail; });
            }
        }
        for (mask_kind mask : { MASK_NONE, MASK_RANDOM, MASK_SPARSE, MASK_ALL, MASK_ONE_ROW }) {
            for (int n_tail : { 0, 129 }) {
                with([&](attn_case & c) { c.n_kv = n_kv; c.mask = mask; c.n_q = 3; c.n_tail = n_tail; });
                with([&](attn_case & c) { c.n_kv = n_kv; c.mask = mask; c.n_q = 2; c.n_head = 8; c.n_head_kv = 1; c.n_tail = n_tail; });
                with([&](attn_case & c) { c.n_kv = n_kv; c.mask = mask; c.kt = F; c.n_tail = n_tail; });
                with([&](attn_case & c) { c.n_kv = n_kv; c.mask = mask; c.vt = F; c.n_q = 2; c.n_tail = n_tail; });
            }
        }
    }
    for (int group : { 1, 2, 3, 5, 7, 8, 16 }) {
        for (int n_q : { 1, 2, 5, 8 }) {
            with([&](attn_case & c) { c.n_head = 2 * group; c.n_head_kv = 2; c.n_q = n_q; c.n_tail = 40; });
            with([&](attn_case & c) { c.n_head = 2 * group; c.n_head_kv = 2; c.n_q = n_q; c.mask = MASK_RANDOM; c.n_head_mask = 2 * group; c.kt = P2; });
        }
    }
    for (int n_stream : { 2, 3 }) {
        with([&](attn_case & c) { c.n_stream = n_stream; c.n_stream_mask = n_stream; c.mask = MASK_RANDOM; });
        with([&](attn_case & c) { c.n_stream = n_stream; c.n_stream_mask = 1; c.n_q = 2; c.vt = P3; });
        with([&](attn_case & c) { c.n_stream = n_stream; c.n_stream_mask = 1; c.mask = MASK_RANDOM; c.n_kv = 4096; });
    }
    for (float cap : { 0.0f, 5.0f }) {
        for (float max_bias : { 0.0f, 8.0f }) {
            for (bool sinks : { false, true }) {
                for (bool transform : { false, true }) {
                    for (mask_kind mask : { MASK_RANDOM, MASK_ALL }) {
                        with([&](attn_case & c) {
                            c.softcap = cap; c.max_bias = max_bias; c.sinks = sinks; c.transform = transform; c.mask = mask;
                            c.n_head = 12; c.n_head_kv = 6; c.n_kv = 1025;
                        });
                        with([&](attn_case & c) {
                            c.softcap = cap; c.max_bias = max_bias; c.sinks = sinks; c.transform = transform; c.mask = mask; c.n_tail = 0; c.n_sm = 1;
                        });
                    }
                }
            }
        }
    }
    for (int n_sm : { 1, 16, 132, 1000 }) { // from no split to a tile per block
        for (int64_t n_kv : { 65, 8192 }) {
            with([&](attn_case & c) { c.n_sm = n_sm; c.n_kv = n_kv; });
            with([&](attn_case & c) { c.n_sm = n_sm; c.n_kv = n_kv; c.n_head = 16; c.kt = P3; c.mask = MASK_SPARSE; });
        }
    }
    for (int group : { 1, 4, 8 }) { // the last part is longer than the others
        with([&](attn_case & c) { c.n_head = group; c.n_head_kv = 1; c.n_kv = 8500; c.n_sm = 2; });
    }
    for (pq_type kt : { P4, P3, P2 }) { // devices with little shared memory take two phases, in several rounds
        for (int D : { 96, 128, 192, 256 }) {
            for (int group : { 1, 4, 8 }) {
                with([&](attn_case & c) {
                    c.kt = kt; c.vt = P4; c.D = D; c.n_head = group; c.n_head_kv = 1; c.n_kv = 9000; c.n_sm = 2;
                    c.smem = D > 128 ? 0 : 120 * 1024; c.mask = MASK_SPARSE;
                });
            }
        }
    }
}

// A case or two of each kernel: for compute-sanitizer, under which everything takes a hundred times as long.
static void test_quick_step(const pq_cuda_device_props & props) {
    const pq_type P4 = PQ_TYPE_PQ4, P3 = PQ_TYPE_PQ3, P2 = PQ_TYPE_PQ2;
    run_step({ P4, P4, 2, 2, 1, 1, 700, 64, 0, true, ROPE_PAIRS }, props);
    run_step({ P3, P2, 4, 1, 2, 1, 700, 40, 1, true, ROPE_NEOX_YARN }, props);
    run_step({ P4, P2, 1, 1, 1, 8, 31, 64, 0, false, ROPE_NEOX }, props);
    run_step({ P3, P3, 4, 4, 1, 1, 700, 64, 0, true, ROPE_PAIRS }, props); // heads in pairs
    run_step({ P3, P3, 8, 2, 1, 1, 700, 64, 0, true, ROPE_NEOX }, props);
}

static void test_quick(const pq_cuda_device_props & props) {
    const pq_type P4 = PQ_TYPE_PQ4, P3 = PQ_TYPE_PQ3, P2 = PQ_TYPE_PQ2, F = PQ_TYPE_COUNT;
    const attn_case base = { P4, P4, 128, 4, 4, 1, 1, 257, MASK_CAUSAL, 40, true, 0.0f, 0.0f, false, 1, 1, 0, 0 };
    for (const auto & t : { std::pair<pq_type, pq_type>(P4, P4), { P3, P3 }, { P3, P2 }, { P2, P3 }, { P4, F }, { F, P3 } }) {
        for (int D : { 64, 128, 256 }) {
            for (int group : { 1, 4, 8 }) {
                attn_case c = base;
                const int n_head_kv = t.first == P3 && t.second == P3 ? 2 : 1; // heads in pairs
                c.kt = t.first; c.vt = t.second; c.D = D; c.n_head = n_head_kv * group; c.n_head_kv = n_head_kv; c.mask = MASK_SPARSE; c.n_kv = 700; c.n_sm = 3;
                run_case(c, props);
            }
        }
    }
    test_quick_step(props);
}

// ---- plan ----

static void test_plan() {
    pq_cuda_device_props h200 = { 90, 132, 232448 };
    const uint8_t * const somewhere = (const uint8_t *) 1024;
    auto plan_of = [&](pq_attn_params p) { // heads side by side
        for (pq_attn_side * side : { &p.k, &p.v }) {
            side->head_stride = pq_head_bytes(side->type, side->D);
            side->row_stride  = side->head_stride * p.n_head_kv;
        }
        return pq_cuda_attn_make_plan(p, h200);
    };
    for (int D : { 64, 80, 96, 128, 192, 256 }) {
        for (int n_head_kv : { 1, 2, 5, 8, 32, 40, 64 }) {
            for (int group : { 1, 4, 5, 8, 16 }) {
                for (int n_q : { 1, 2, 8 }) {
                    for (int64_t n_kv : { 0, 1, 255, 256, 4096, 32768, 33024, 131072, 1048576 }) {
                        for (int t = 0; t < 4; t++) {
                            for (int n_tail : { 0, 640, 2176 }) {
                                pq_attn_params p = {};
                                p.n_head = n_head_kv * group; p.n_head_kv = n_head_kv; p.n_stream = 1; p.n_q = n_q; p.n_kv = n_kv; p.tail.n = n_tail;
                                p.k.type = (pq_type) (t % 3);
                                p.v.type = (pq_type) (t == 3 ? 2 : t);
                                p.k.D = p.v.D = D;
                                p.k.tables = p.v.tables = somewhere;
                                check(!pq_cuda_attn_unsupported(p, h200), "D %d: unsupported", D);
                                const pq_cuda_attn_plan plan = plan_of(p);
                                char name[128];
                                snprintf(name, sizeof(name), "D %d heads %d x %d n_q %d n_kv %lld type %d tail %d", D, n_head_kv, group, n_q, (long long) n_kv, t, n_tail);
                                check(plan.smem_bytes <= h200.smem_optin, "%s: %zu bytes of shared memory", name, plan.smem_bytes);
                                check(plan.rows_per_block * plan.n_row_groups >= group * n_q, "%s: rows left over", name);
                                const int64_t round = plan.kernel == PQ_CUDA_ATTN_128 ? plan.n_threads : 0; // that the last part may have beyond the others
                                check(plan.n_split * plan.cells_per_split + round >= n_kv && (plan.n_split - 1) * plan.cells_per_split < std::max<int64_t>(n_kv, 1), "%s: split %d x %lld",
                                      name, plan.n_split, (long long) plan.cells_per_split);
                                check(plan.n_split * plan.slots_per_split >= n_tail, "%s: slots left over", name);
                                check(plan.n_blocks == n_head_kv * plan.n_row_groups * plan.n_split, "%s: %d blocks", name, plan.n_blocks);
                                // a long context fills the device, and the scratch is that of the blocks, not of the context
                                const int n_base = n_head_kv * plan.n_row_groups;
                                const int waves = (plan.n_blocks + h200.n_sm - 1) / h200.n_sm;
                                check(n_kv < 32768 || plan.n_blocks >= 0.85 * waves * h200.n_sm, "%s: %d blocks (%d heads) leave multiprocessors idle", name, plan.n_blocks, n_base);
                                check(plan.scratch_bytes <= (size_t) plan.n_blocks * plan.rows_per_block * (2 * D + 4) * 4, "%s: %zu bytes of scratch", name, plan.scratch_bytes);
                                const bool two_phases = plan.kernel == PQ_CUDA_ATTN_TWO_PHASES;
                                check(!two_phases || plan.score_tiles >= 1, "%s: no room for scores", name);
                                check(two_phases || D <= 128, "%s: tables of %d would not fit", name, D);
                                check((plan.kernel == PQ_CUDA_ATTN_128) == (D == 128), "%s: kernel %d", name, (int) plan.kernel);
                                check(plan.kernel != PQ_CUDA_ATTN_128 || (plan.n_tail_warps >= 1) == (n_tail > 0), "%s: %d warps for the tail", name, plan.n_tail_warps);
                            }
                        }
                    }
                }
            }
        }
    }
    pq_attn_params p = {};
    p.n_head = 32; p.n_head_kv = 32; p.n_stream = 1; p.n_q = 1; p.n_kv = 32768; p.k.type = p.v.type = PQ_TYPE_PQ4; p.k.D = p.v.D = 128;
    check(plan_of(p).kernel != PQ_CUDA_ATTN_128, "no tables: another kernel");
    p.k.tables = p.v.tables = somewhere;
    for (int apart = 0; apart < 3; apart++) { // neither side's heads, those of K, of V
        pq_attn_params x = p;
        for (int i = 0; i < 2; i++) {
            pq_attn_side & side = i ? x.v : x.k;
            side.head_stride = apart == i + 1 ? 64 * p.n_kv : 64;
            side.row_stride  = apart == i + 1 ? 64 : 64 * p.n_head_kv;
        }
        check((pq_cuda_attn_make_plan(x, h200).kernel == PQ_CUDA_ATTN_128) == (apart == 0), "heads that are not side by side (%d): another kernel", apart);
    }
    check(plan_of(p).n_split == 4, "Llama-2-7B geometry at 32768: split %d", plan_of(p).n_split);
    p.n_head_kv = 8;
    check(plan_of(p).n_split == 16, "Llama-3.1-8B geometry at 32768: split %d", plan_of(p).n_split);
    // In a short context a step leaves multiprocessors to the encoding of its new rows, all of them at once. Without a tail it has no such rows.
    p.n_kv = 4096;
    check(plan_of(p).n_split == 16, "Llama-3.1-8B geometry at 4096, without a tail: split %d", plan_of(p).n_split);
    p.tail.n = 640;
    const pq_cuda_attn_plan step = plan_of(p);
    check((h200.n_sm - step.n_blocks) * (step.n_threads / 128) >= 2 * 8 * 4, "Llama-3.1-8B geometry at 4096: %d blocks leave too little for 64 strips", step.n_blocks);
    p.n_kv = 131072;
    check(plan_of(p).n_split == 16, "Llama-3.1-8B geometry at 131072, with a tail: split %d", plan_of(p).n_split);
    // Eight sequences: the few multiprocessors without attention can't encode eight rows of every strip, so units are small enough for those with it to help.
    p.n_stream = 8;
    p.n_kv = 8448;
    const pq_cuda_attn_plan batch = plan_of(p);
    check(batch.n_split == 2 && batch.encode_rows <= 2, "Llama-3.1-8B geometry, 8 sequences of 8448: split %d, %d rows encoded at a time", batch.n_split, batch.encode_rows);
    p.n_stream = 1;
    p.n_kv = 4096;
    check(plan_of(p).encode_rows == 1, "one row, %d encoded at a time", plan_of(p).encode_rows);
    // a few cells more than whole rounds of 16 warps are of the last part, and not a round more for all of them
    for (const int n_head_kv : { 8, 32 }) {
        p.n_head_kv = n_head_kv;
        p.n_kv = 32768 + 256;
        const pq_cuda_attn_plan plan = plan_of(p);
        check(plan.n_split * plan.cells_per_split == 32768, "%d heads at 33024: split %d x %lld", n_head_kv, plan.n_split, (long long) plan.cells_per_split);
    }
    p.n_head_kv = 8;
    p.tail.n = 0;
    p.n_kv = 32768;
    const pq_cuda_device_props turing = { 75, 68, 65536 };
    check(pq_cuda_attn_unsupported(p, turing) != nullptr, "7.5 is too old");
    const pq_cuda_device_props ada = { 89, 128, 101376 };
    check(!pq_cuda_attn_unsupported(p, ada) && pq_cuda_attn_make_plan(p, ada).kernel == PQ_CUDA_ATTN_TWO_PHASES && pq_cuda_attn_make_plan(p, ada).smem_bytes <= ada.smem_optin, "8.9 takes two phases");
    p.k.D = 64;
    check(pq_cuda_attn_unsupported(p, h200) != nullptr, "different head sizes");
    p.k.D = 128;
    p.n_q = PQ_CUDA_ATTN_MAX_N_Q + 1;
    check(pq_cuda_attn_unsupported(p, h200) != nullptr, "too many query tokens");
    p.n_q = 1;
    p.k.row_stride = 6;
    check(pq_cuda_attn_unsupported(p, h200) != nullptr, "pq4 rows at multiples of 2");
    p.k.row_stride = 0;
    p.k.type = p.v.type = PQ_TYPE_COUNT;
    check(pq_cuda_attn_unsupported(p, h200) != nullptr, "no side holds codes");
}

// ---- benchmark ----

static const uint32_t ALL_BITS = 0xffffffffu, BITS_OF_HALVES = 0xbfffbfffu; // halves below 2: any bits would hold NaN

__global__ void fill_random(uint32_t * x, size_t n, uint32_t seed, uint32_t keep) {
    for (size_t i = blockIdx.x * (size_t) blockDim.x + threadIdx.x; i < n; i += (size_t) gridDim.x * blockDim.x) {
        uint32_t h = (uint32_t) i * 0x9e3779b9u ^ (uint32_t) (i >> 32) ^ seed;
        h ^= h >> 16; h *= 0x7feb352du; h ^= h >> 15; h *= 0x846ca68bu; h ^= h >> 16;
        x[i] = h & keep;
    }
}

static float median(std::vector<float> v) {
    std::sort(v.begin(), v.end());
    return v[v.size() / 2];
}

static double copy_gb_s() {
    const size_t n = (size_t) 2 << 30;
    device_buf<uint8_t> a(n), b(n);
    fill_random<<<1024, 256>>>((uint32_t *) a.p, n / 4, 1, ALL_BITS);
    cudaEvent_t e0, e1;
    CUDA(cudaEventCreate(&e0));
    CUDA(cudaEventCreate(&e1));
    std::vector<float> ms;
    for (int i = 0; i < 12; i++) {
        CUDA(cudaEventRecord(e0));
        CUDA(cudaMemcpyAsync(b.p, a.p, n, cudaMemcpyDeviceToDevice));
        CUDA(cudaEventRecord(e1));
        CUDA(cudaEventSynchronize(e1));
        float x;
        CUDA(cudaEventElapsedTime(&x, e0, e1));
        ms.push_back(x);
    }
    return 2.0 * (double) n / median(ms) * 1e-6;
}

struct bench_setup {
    host_side                        k, v;                       // codebooks, and rows of one head
    std::vector<float>               q_host;                     // [stream][head][token][D]
    std::vector<uint16_t>            mask_host, tail_mask_host;  // of any token
    std::vector<device_buf<uint8_t>> buffers; // of all layers
    std::vector<pq_attn_params>      layers;
    std::vector<pq_encode_params>    new_rows; // K and V of each layer; empty when a side is plain
    pq_cuda_attn_plan                plan;
    device_buf<uint8_t>              scratch;
    device_buf<float>                q, dst;
    device_buf<uint16_t>             mask, tail_mask;
    device_buf<float>                x;
    device_buf<int64_t>              cells, slots;
    device_buf<int32_t>              pos;
    pq_cuda_rope                     rope;
    device_buf<uint8_t>              counters;
    double                           code_bytes = 0; // of a layer
};

// n_batch: sequences, each with a stream and a context of its own
static bench_setup make_bench(bool mha, int64_t depth, pq_type kt, pq_type vt, int n_q, int n_batch, const pq_cuda_device_props & props, int max_layers) {
    bench_setup b;
    const int     D = 128, n_head = 32, H = mha ? 32 : 8, W = 128, n_tail = 640;
    const int64_t n_kv = std::max<int64_t>((depth + 255) / 256 * 256, 256);
    rng r(1);
    // the last W tokens are in the tail; everything when there are no more
    std::vector<uint16_t> mask((size_t) n_kv, F16_MINUS_INF), tail_mask(n_tail, F16_MINUS_INF);
    for (int64_t i = 0; i < depth - W; i++) {
        mask[i] = 0;
    }
    for (int i = 0; i < W; i++) {
        tail_mask[(i + 300) % n_tail] = 0;
    }
    std::vector<uint16_t> mask_q, tail_mask_q;
    for (int i = 0; i < n_q; i++) {
        mask_q.insert(mask_q.end(), mask.begin(), mask.end());
        tail_mask_q.insert(tail_mask_q.end(), tail_mask.begin(), tail_mask.end());
    }
    b.mask      = device_buf<uint16_t>(mask_q);
    b.tail_mask = device_buf<uint16_t>(tail_mask_q);
    std::vector<float> q((size_t) n_batch * n_head * n_q * D);
    for (float & x : q) {
        x = r.normal();
    }
    b.q   = device_buf<float>(q);
    b.dst = device_buf<float>(q.size());
    b.q_host         = q;
    b.mask_host      = mask;
    b.tail_mask_host = tail_mask;

    auto row_bytes = [&](pq_type t) { return t < PQ_TYPE_COUNT ? pq_head_bytes(t, D) * H : (size_t) D * 2 * H; };
    b.code_bytes = (double) n_batch * (double) std::max<int64_t>(depth - W, 0) * (double) (row_bytes(kt) + row_bytes(vt));
    const double layer_bytes = (double) n_batch * (double) n_kv * (double) (row_bytes(kt) + row_bytes(vt)) + 1.0;
    const int    n_layer     = std::min(max_layers, std::max(2, std::min(32, (int) (3e9 / layer_bytes))));

    host_side ck = {}, cv = {};
    for (host_side * c : { &ck, &cv }) {
        c->type = c == &ck ? kt : vt;
        c->D = D;
        c->H = H;
        c->transform = c->coded();
        if (c->coded()) {
            make_codebook(*c, r, true, c == &ck);
        }
        c->row_stride = row_bytes((pq_type) c->type) / H;
    }
    b.k = ck;
    b.v = cv;
    std::vector<float> x((size_t) n_batch * n_q * H * D);
    for (float & f : x) {
        f = r.normal();
    }
    std::vector<int64_t> cells, slots;
    for (int s = 0; s < n_batch; s++) {
        for (int i = 0; i < n_q; i++) {
            cells.push_back(s * n_kv + n_kv - 1 - i);
            slots.push_back((int64_t) s * n_tail + (300 + i) % n_tail);
        }
    }
    b.x     = device_buf<float>(x);
    b.cells = device_buf<int64_t>(cells);
    b.slots = device_buf<int64_t>(slots);
    for (int l = 0; l < n_layer; l++) {
        auto random = [&](size_t n, uint32_t keep) {
            b.buffers.emplace_back(n);
            fill_random<<<1024, 256>>>((uint32_t *) b.buffers.back().p, n / 4, (uint32_t) b.buffers.size(), keep);
            return b.buffers.back().p;
        };
        pq_attn_params p = {};
        p.n_head = n_head; p.n_head_kv = H; p.n_stream = n_batch; p.n_q = n_q; p.n_kv = n_kv;
        auto side = [&](const host_side & c) {
            pq_attn_side s = {};
            s.type = c.type; s.D = D; s.has_transform = c.transform;
            if (c.coded()) {
                b.buffers.emplace_back(c.with_tables(&c == &cv));
                s.codebook = b.buffers.back().p;
                s.tables   = s.codebook + c.blocks.size();
            }
            s.row_stride    = row_bytes(c.type);
            s.head_stride   = s.row_stride / H;
            s.stream_stride = s.row_stride * n_kv;
            s.data = random(s.stream_stride * n_batch, c.coded() ? ALL_BITS : BITS_OF_HALVES);
            return s;
        };
        p.k = side(ck);
        p.v = side(cv);
        p.q = (const uint8_t *) b.q.p;
        p.q_token_stride = D * 4; p.q_head_stride = p.q_token_stride * n_q; p.q_stream_stride = p.q_head_stride * n_head;
        p.mask = (const uint8_t *) b.mask.p;
        p.mask_token_stride = n_kv * 2; p.mask_head_stride = p.mask_token_stride * n_q; p.mask_stream_stride = p.mask_head_stride;
        p.n_head_mask = p.n_stream_mask = 1;
        p.tail.n = n_tail;
        const size_t tail_bytes = (size_t) n_batch * H * n_tail * D * 2;
        for (const uint8_t ** x : { &p.tail.k, &p.tail.v }) {
            *x = random(tail_bytes, BITS_OF_HALVES);
        }
        p.tail.k_row_stride = p.tail.v_row_stride = (size_t) H * D * 2; // as the cache lays it out: [slots][n_head_kv][D]
        p.tail.k_head_stride = p.tail.v_head_stride = D * 2;
        p.tail.k_stream_stride = p.tail.v_stream_stride = p.tail.k_row_stride * n_tail;
        p.tail.mask = (const uint8_t *) b.tail_mask.p;
        p.tail.mask_token_stride = n_tail * 2;
        p.scale = 1.0f / sqrtf((float) D);
        p.dst = b.dst.p;
        p.dst_head_stride = D * 4; p.dst_token_stride = p.dst_head_stride * n_head; p.dst_stream_stride = p.dst_token_stride * n_q;
        b.layers.push_back(p);
        for (int side = 0; side < 2 && kt < PQ_TYPE_COUNT && vt < PQ_TYPE_COUNT; side++) {
            const pq_attn_side & a = side ? p.v : p.k;
            pq_encode_params e = {};
            e.type = a.type; e.D = D; e.n_head_kv = H; e.n_rows = (int64_t) n_batch * n_q; e.codebook = a.codebook; e.has_transform = 1;
            e.x = b.x.p; e.x_row_stride = (size_t) H * D * 4; e.x_head_stride = D * 4;
            e.codes = (uint8_t *) a.data; e.codes_row_stride = a.row_stride; e.row_idx = b.cells.p;
            e.tail = (uint8_t *) (side ? p.tail.v : p.tail.k); e.tail_row_stride = p.tail.k_row_stride; e.tail_idx = b.slots.p;
            b.new_rows.push_back(e);
        }
    }
    b.pos     = device_buf<int32_t>(std::vector<int32_t>((size_t) n_batch * n_q, (int32_t) depth));
    b.rope    = make_rope(ROPE_PAIRS, b.pos.p, nullptr);
    b.plan    = pq_cuda_attn_make_plan(b.layers[0], props);
    b.scratch = device_buf<uint8_t>(b.plan.scratch_bytes);
    b.counters = device_buf<uint8_t>(b.plan.counter_bytes);
    CUDA(cudaMemset(b.counters.p, 0, b.plan.counter_bytes));
    CUDA(cudaDeviceSynchronize());
    return b;
}

// A result before it is timed: the first and the last head of the first sequence and the last token, against double precision.
static void check_bench(const bench_setup & b, const char * name) {
    const pq_attn_params & p = b.layers[0];
    CUDA(pq_cuda_attn(p, b.plan, b.scratch.p, b.counters.p, 0));
    std::vector<float> got(b.dst.n);
    CUDA(cudaMemcpy(got.data(), b.dst.p, got.size() * sizeof(float), cudaMemcpyDeviceToHost));
    const int D = p.k.D, t = (int) p.n_q - 1;
    double err2 = 0.0, ref2 = 0.0;
    for (int h : { 0, (int) p.n_head - 1 }) {
        const int hk = h / (p.n_head / p.n_head_kv);
        auto rows = [&](const uint8_t * from, size_t from_stride, size_t n_bytes, int64_t n) {
            std::vector<uint8_t> x(n_bytes * n);
            CUDA(cudaMemcpy2D(x.data(), n_bytes, from, from_stride, n_bytes, n, cudaMemcpyDeviceToHost));
            return x;
        };
        const std::vector<uint8_t> k      = rows(p.k.data + hk * p.k.head_stride, p.k.row_stride, b.k.row_stride, p.n_kv);
        const std::vector<uint8_t> v      = rows(p.v.data + hk * p.v.head_stride, p.v.row_stride, b.v.row_stride, p.n_kv);
        const std::vector<uint8_t> tail_k = rows(p.tail.k + hk * p.tail.k_head_stride, p.tail.k_row_stride, D * 2, p.tail.n);
        const std::vector<uint8_t> tail_v = rows(p.tail.v + hk * p.tail.v_head_stride, p.tail.v_row_stride, D * 2, p.tail.n);
        reference_row x = { b.k, b.v, hk, p.n_kv, k.data(), v.data(), (int) p.tail.n, (const uint16_t *) tail_k.data(), (const uint16_t *) tail_v.data(), (size_t) D };
        x.score = [&](double dot, int64_t cell, int slot) {
            return (slot >= 0 ? b.tail_mask_host[slot] : b.mask_host[cell]) == F16_MINUS_INF ? -INFINITY : dot * p.scale;
        };
        const std::vector<double> want = x.attend(&b.q_host[((size_t) h * p.n_q + t) * D]);
        for (int d = 0; d < D; d++) {
            const double y = got[((size_t) t * p.n_head + h) * D + d];
            err2 += (y - want[d]) * (y - want[d]);
            ref2 += want[d] * want[d];
        }
    }
    check(err2 <= 1e-5 * ref2, "%s: NMSE %.3g", name, err2 / ref2);
}

enum bench_what { ATTENTION, ENCODE_AND_ATTENTION, STEP, PRODUCT, PRODUCT_AND_STEP };

// Stands for the products with the weights of a layer: it reads as much, from memory, and takes all multiprocessors until its end.
static __global__ void __launch_bounds__(128) read_weights(const uint4 * weights, size_t n, uint32_t * sum) {
    pq_pdl_wait();
    uint32_t x = 0;
    for (size_t i = blockIdx.x * (size_t) blockDim.x + threadIdx.x; i < n; i += (size_t) gridDim.x * blockDim.x) {
        const uint4 w = __ldcs(weights + i);
        x += w.x ^ w.y ^ w.z ^ w.w;
    }
    if (x == 1) { // never: or nothing would be read
        *sum = x;
    }
    pq_pdl_launch_next();
}

// Microseconds per layer: sorted, of graph replays.
static std::vector<float> time_layers(const bench_setup & b, bench_what what) {
    const size_t product_bytes = (size_t) 140 << 20; // Llama-3.1-8B, Q4_0
    const device_buf<uint8_t> weights(what >= PRODUCT ? product_bytes : 16);
    cudaStream_t stream;
    CUDA(cudaStreamCreate(&stream));
    cudaGraph_t     graph;
    cudaGraphExec_t exec;
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (size_t l = 0; l < b.layers.size(); l++) {
        const pq_encode_params * rows = what == ATTENTION ? nullptr : &b.new_rows[2 * l];
        if (what >= PRODUCT) {
            CUDA(pq_launch(read_weights, dim3(b.plan.n_sm * 16), 128, 0, stream, (const uint4 *) weights.p, product_bytes / sizeof(uint4), (uint32_t *) weights.p));
        }
        if (what == PRODUCT) {
            continue;
        }
        if (what == STEP || what == PRODUCT_AND_STEP) {
            CUDA(pq_cuda_step(b.layers[l], b.plan, rows, &b.rope, true, nullptr, b.scratch.p, b.counters.p, stream));
            continue;
        }
        if (rows) {
            CUDA(pq_cuda_encode(rows, 2, stream));
        }
        CUDA(pq_cuda_attn(b.layers[l], b.plan, b.scratch.p, b.counters.p, stream));
    }
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t e0, e1;
    CUDA(cudaEventCreate(&e0));
    CUDA(cudaEventCreate(&e1));
    std::vector<float> us;
    for (int i = 0; i < 23; i++) {
        CUDA(cudaEventRecord(e0, stream));
        CUDA(cudaGraphLaunch(exec, stream));
        CUDA(cudaEventRecord(e1, stream));
        CUDA(cudaEventSynchronize(e1));
        float ms;
        CUDA(cudaEventElapsedTime(&ms, e0, e1));
        if (i >= 3) {
            us.push_back(ms * 1e3f / (float) b.layers.size());
        }
    }
    CUDA(cudaGraphExecDestroy(exec));
    CUDA(cudaGraphDestroy(graph));
    CUDA(cudaStreamDestroy(stream));
    std::sort(us.begin(), us.end());
    return us;
}

static void bench_one(bool mha, int64_t depth, pq_type kt, pq_type vt, int n_q, int n_batch, const pq_cuda_device_props & props, double copy) {
    const bench_setup b = make_bench(mha, depth, kt, vt, n_q, n_batch, props, 1000);
    char name[96];
    snprintf(name, sizeof(name), "bench: %s K %s V %s depth %lld n_q %d x %d", mha ? "7b" : "8b", type_names[kt], type_names[vt], (long long) depth, n_q, n_batch);
    check_bench(b, name);
    const std::vector<float> us = time_layers(b, ATTENTION);
    const double t = us[us.size() / 2], gb_s = b.code_bytes / t * 1e-3;
    printf("%-3s %-3s/%-3s n_q %d x %d  depth %8lld  split %3d  attention %8.2f us (min %.2f max %.2f)  %6.0f GB/s %5.1f%% of copy", mha ? "7b" : "8b", type_names[kt], type_names[vt], n_q,
           n_batch, (long long) depth, b.plan.n_split, t, us.front(), us.back(), gb_s, 100.0 * gb_s / copy);
    if (!b.new_rows.empty()) {
        const std::vector<float> two = time_layers(b, ENCODE_AND_ATTENTION);
        printf("  encode, attention %8.2f", two[two.size() / 2]);
        if (!pq_cuda_step_unsupported(b.layers[0], b.plan, b.new_rows.data())) {
            const std::vector<float> one = time_layers(b, STEP), product = time_layers(b, PRODUCT), both = time_layers(b, PRODUCT_AND_STEP);
            printf("  step %8.2f, after a product %8.2f", one[one.size() / 2], both[both.size() / 2] - product[product.size() / 2]);
        }
    }
    printf("\n");
    fflush(stdout);
}

static pq_type parse_type(const char * s) {
    for (int i = 0; i <= PQ_TYPE_COUNT; i++) {
        if (!strcmp(s, type_names[i])) {
            return (pq_type) i;
        }
    }
    printf("found type '%s', need pq4, pq3, pq2 or f16\n", s);
    exit(2);
}

int main(int argc, char ** argv) {
    const std::string mode = argc > 1 ? argv[1] : "test";
    if (mode == "plan") {
        test_plan();
        printf("%d checks, %d failed\n", n_checks, n_failed);
        return n_failed ? 1 : 0;
    }
    pq_cuda_device_props props;
    CUDA(pq_cuda_get_device_props(&props));
    if (mode == "quick") {
        if (argc > 2 && !strcmp(argv[2], "step")) {
            test_quick_step(props);
        } else {
            test_quick(props);
        }
        printf("%d checks, %d failed; worst NMSE %.3g\n", n_checks, n_failed, worst_nmse);
        return n_failed ? 1 : 0;
    }
    if (mode == "step") {
        test_step(props);
        printf("%d checks, %d failed\n", n_checks, n_failed);
        return n_failed ? 1 : 0;
    }
    if (mode == "test") {
        test_plan();
        test_step(props);
        test(props, argc > 2 ? atoi(argv[2]) : 0);
        printf("%d checks, %d failed; worst NMSE %.3g\n", n_checks, n_failed, worst_nmse);
        return n_failed ? 1 : 0;
    }
    if (mode == "once" && argc == 5) {
        const pq_type t = parse_type(argv[4]);
        bench_setup b = make_bench(!strcmp(argv[2], "7b"), atoll(argv[3]), t, t, 1, 1, props, 2);
        for (const pq_attn_params & p : b.layers) {
            CUDA(pq_cuda_attn(p, b.plan, b.scratch.p, b.counters.p, 0));
        }
        CUDA(cudaDeviceSynchronize());
        return 0;
    }
    if (mode == "bench") {
        const double copy = copy_gb_s();
        cudaDeviceProp dp;
        CUDA(cudaGetDeviceProperties(&dp, 0));
        printf("%s, %d multiprocessors, copy %.0f GB/s\n", dp.name, props.n_sm, copy);
        const pq_type all[] = { PQ_TYPE_PQ4, PQ_TYPE_PQ3, PQ_TYPE_PQ2 };
        for (bool mha : { true, false }) {
            if (argc > 2 && strcmp(argv[2], mha ? "7b" : "8b")) {
                continue;
            }
            const std::vector<int64_t> depths = argc > 3 ? std::vector<int64_t>{ atoll(argv[3]) } : mha ? std::vector<int64_t>{ 0, 4096, 32768, 131072 }
                                                                                                      : std::vector<int64_t>{ 0, 4096, 32768, 131072, 1048576 };
            for (int64_t depth : depths) {
                for (pq_type t : all) {
                    if (argc > 4 && parse_type(argv[4]) != t) {
                        continue;
                    }
                    bench_one(mha, depth, t, t, argc > 5 ? atoi(argv[5]) : 1, argc > 6 ? atoi(argv[6]) : 1, props, copy);
                }
            }
            if (argc == 2) {
                bench_one(mha, 32768, PQ_TYPE_PQ4, PQ_TYPE_PQ2, 1, 1, props, copy);
                bench_one(mha, 32768, PQ_TYPE_PQ4, PQ_TYPE_COUNT, 1, 1, props, copy);
                bench_one(mha, 32768, PQ_TYPE_PQ4, PQ_TYPE_PQ4, 2, 1, props, copy);
                bench_one(mha, 32768, PQ_TYPE_PQ4, PQ_TYPE_PQ4, 8, 1, props, copy);
                bench_one(mha, 8192, PQ_TYPE_PQ4, PQ_TYPE_PQ4, 1, 8, props, copy);
            }
        }
        printf("%d results checked, %d failed\n", n_checks, n_failed);
        return n_failed ? 1 : 0;
    }
    printf("usage: pq-cuda-test [test [D] | quick [step] | step | plan | bench [7b|8b [depth [type [query tokens [sequences]]]]] | once 7b|8b depth type]\n");
    return 2;
}
