// Calibration capture: see llama-million.h.

#include "llama-million.h"

#include "ggml.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <utility>
#include <vector>

// Tokens that an exact tail keeps unless told otherwise. Errors of keys that young do not reach their queries.
static constexpr int64_t N_TAIL = 128;

struct reservoir {
    int32_t n_head   = 0;
    int32_t head_dim = 0;
    int64_t n_seen   = 0;

    // f16 [n_rows][n_head*head_dim]: the precision of the cache that the rows are taken from
    std::vector<ggml_fp16_t> rows;

    // f32 [n_rows][n_head][2], of queries only: see million_capture_weights
    std::vector<float> weights;

    std::mt19937_64 rng;

    int64_t width() const { return (int64_t) n_head * head_dim; }
    int64_t n_rows() const { return width() > 0 ? (int64_t) rows.size() / width() : 0; }

    // Returns the place of the row, -1 when it is not kept.
    int64_t add(const float * row, int64_t n_rows_max) {
        const int64_t w = width();
        int64_t slot = n_seen;
        if (n_seen < n_rows_max) {
            rows.resize((n_seen + 1) * w);
        } else {
            slot = (int64_t) (rng() % (uint64_t) (n_seen + 1));
        }
        n_seen++;
        if (slot >= n_rows_max) {
            return -1;
        }
        ggml_fp32_to_fp16_row(row, rows.data() + slot * w, w);
        return slot;
    }
};

struct million_capture {
    uint32_t n_rows_max;
    uint32_t query_step;
    uint64_t seed;

    // for the weights of queries, which are worked out here wherever the model runs
    ggml_backend_ptr  cpu;
    ggml_gallocr_ptr  memory;

    std::vector<reservoir> layers[3]; // [kind][il]

    std::vector<uint8_t> data;
    std::vector<float>   row;

    std::vector<int64_t> seen; // queries that went by, by layer

    int64_t & n_queries(int il) {
        seen.resize(std::max<size_t>(seen.size(), il + 1), 0);
        return seen[il];
    }

    reservoir & get(int kind, int il) {
        auto & v = layers[kind];
        while ((int) v.size() <= il) {
            v.emplace_back();
            v.back().rng.seed(seed * 3 + kind + 0x9e3779b97f4a7c15ull * v.size());
        }
        return v[il];
    }

    const reservoir * find(int kind, int il) const {
        return kind >= 0 && kind < 3 && il >= 0 && il < (int) layers[kind].size() ? &layers[kind][il] : nullptr;
    }

    std::vector<std::vector<double>> matches; // [il], as million_capture_matches writes them; empty: none were weighed

    std::vector<float> weigh(const ggml_tensor * attn, const std::vector<std::pair<int64_t, int64_t>> & queries, std::vector<double> & sums);
};

// A tensor's data where the CPU can read it, whatever its strides.
struct host_tensor {
    const ggml_tensor *  t;
    std::vector<uint8_t> data;

    explicit host_tensor(const ggml_tensor * t) : t(t), data(ggml_nbytes(t)) {
        ggml_backend_tensor_get(t, data.data(), 0, data.size());
    }

    const void * row(int64_t i1, int64_t i2, int64_t i3) const {
        return data.data() + i1 * t->nb[1] + i2 * t->nb[2] + i3 * t->nb[3];
    }
};

// An input of a graph: rows of `ne0` elements, found by row(i1, i2) once the graph has memory.
struct graph_input {
    ggml_tensor *                                  t;
    std::function<const void *(int64_t, int64_t)>  row;

    void copy() const {
        for (int64_t i2 = 0; i2 < t->ne[2]; ++i2) {
            for (int64_t i1 = 0; i1 < t->ne[1]; ++i1) {
                memcpy((char *) t->data + i1 * t->nb[1] + i2 * t->nb[2], row(i1, i2), ggml_row_size(t->type, t->ne[0]));
            }
        }
    }
};

struct query_costs {
    std::vector<int64_t> n_seen; // by query, its cell and those before
    std::vector<float>   costs;  // [group][n_query][2]: what million_capture_weights tells of
};

// dst f32 [n_kv, n_query, group]: p^2 |v - o|^2 of the keys that an exact tail does not hold, 0 for the others. Sources f32: p and v.o
// [n_kv, n_query, group], |v|^2 [1, n_kv], |o|^2 [1, n_query, group].
static void weigh_keys(ggml_tensor * dst, int ith, int nth, void * user_data) {
    auto &        q    = *(query_costs *) user_data;
    const int64_t n_kv = dst->ne[0];
    const float * vv   = (const float *) dst->src[2]->data;
    for (int64_t r = ith; r < ggml_nrows(dst); r += nth) {
        const float * p  = (const float *) dst->src[0]->data + r * n_kv;
        const float * vo = (const float *) dst->src[1]->data + r * n_kv;
        const float   oo = ((const float *) dst->src[3]->data)[r];
        float       * w  = (float *) dst->data + r * n_kv;
        const int64_t n  = q.n_seen[r % dst->ne[1]], n_far = std::max<int64_t>(0, n - N_TAIL);
        double        far = 0.0, near = 0.0;
        for (int64_t j = 0; j < n; ++j) {
            w[j] = p[j] * p[j] * std::max(0.0f, vv[j] - 2.0f * vo[j] + oo);
            (j < n_far ? far : near) += w[j];
        }
        std::fill(w + n_far, w + n_kv, 0.0f);
        q.costs[2 * r]     = (float) far;
        q.costs[2 * r + 1] = (float) (near + far);
    }
}

// What million_capture_weights says, of the queries (token, stream) of one attention: f32 [n_query][n_head][2]. What million_capture_matches says of them is
// added to `sums`.
std::vector<float> million_capture::weigh(const ggml_tensor * attn, const std::vector<std::pair<int64_t, int64_t>> & queries, std::vector<double> & sums) {
    const ggml_tensor * q = attn->src[0];
    const ggml_tensor * k = attn->src[1];
    const ggml_tensor * v = attn->src[2];

    float params[3]; // scale, max_bias, logit_softcap
    memcpy(params, attn->op_params, sizeof(params));

    const int64_t      n_head = q->ne[2];
    std::vector<float> out(queries.size() * n_head * 2, 0.0f);
    for (const ggml_tensor * t : { k, v }) {
        if (t->type != GGML_TYPE_F16 && t->type != GGML_TYPE_F32) {
            return out;
        }
    }
    if (!attn->src[3] || params[1] != 0.0f) {
        return out; // no causal mask, or ALiBi, whose slopes are not worked out here
    }
    const host_tensor hq(q), hk(k), hv(v), ho(attn), hm(attn->src[3]);
    const int64_t n_kv  = k->ne[1];
    const int64_t group = n_head / k->ne[2];
    const int64_t D     = k->ne[0];
    const int64_t n_columns = 2 * D + 1; // of one head's sums: q, k, 1
    sums.resize(k->ne[2] * (D + 1) * n_columns);

    std::vector<float> sinks;
    if (attn->src[4]) {
        sinks.resize(n_head);
        ggml_backend_tensor_get(attn->src[4], sinks.data(), 0, n_head * sizeof(float));
    }

    // By stream and KV head, so that scores stay in the caches.
    for (int64_t part = 0; part < q->ne[3] * k->ne[2]; ++part) {
        const int64_t        s    = part / k->ne[2];
        const int64_t        h_kv = part % k->ne[2];
        const int64_t        h0   = h_kv * group;
        std::vector<int64_t> mine;
        query_costs          seen;
        for (int64_t i = 0; i < (int64_t) queries.size(); ++i) {
            if (queries[i].second == s) {
                mine.push_back(i);
            }
        }
        if (mine.empty()) {
            continue;
        }
        const auto token  = [&](int64_t i) { return queries[mine[i]].first; };
        const auto masked = [&](int64_t i, int64_t h) { return (const ggml_fp16_t *) hm.row(token(i), h % hm.t->ne[2], s % hm.t->ne[3]); };
        for (int64_t i = 0; i < (int64_t) mine.size(); ++i) {
            int64_t n = n_kv; // its own cell is the last that a query sees
            while (n > 0 && ggml_fp16_to_fp32(masked(i, h0)[n - 1]) == -INFINITY) {
                --n;
            }
            seen.n_seen.push_back(n);
        }

        ggml_context *     ctx = ggml_init({ ggml_tensor_overhead() * 64 + ggml_graph_overhead(), nullptr, /*no_alloc =*/ true });
        std::vector<graph_input> inputs;
        const auto         add = [&](ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, std::function<const void *(int64_t, int64_t)> row) {
            ggml_tensor * t = ggml_new_tensor_3d(ctx, type, ne0, ne1, ne2);
            ggml_set_input(t);
            inputs.push_back({ t, row });
            return t;
        };
        const int64_t n  = (int64_t) mine.size();
        seen.costs.resize(2 * n * group);
        auto *        tq = add(GGML_TYPE_F32, q->ne[0], n, group, [&](int64_t i, int64_t g) { return hq.row(token(i), h0 + g, s); });
        auto *        to = add(GGML_TYPE_F32, v->ne[0], n, group, [&](int64_t i, int64_t g) { return ho.row(h0 + g, token(i), s); });
        auto *        tk = add(k->type, k->ne[0], n_kv, 1, [&](int64_t j, int64_t) { return hk.row(j, h_kv, s % k->ne[3]); });
        auto *        tv = add(v->type, v->ne[0], n_kv, 1, [&](int64_t j, int64_t) { return hv.row(j, h_kv, s % v->ne[3]); });
        auto *        tm = add(GGML_TYPE_F16, n_kv, n, group, [&](int64_t i, int64_t g) { return masked(i, h0 + g); });

        // In f32: where v and o are nearly the same, digits cancel.
        tk = ggml_cast(ctx, tk, GGML_TYPE_F32);
        tv = ggml_cast(ctx, tv, GGML_TYPE_F32);
        ggml_tensor * scores = ggml_mul_mat(ctx, tk, tq);
        float         scale  = params[0];
        if (params[2] != 0.0f) {
            scores = ggml_tanh_inplace(ctx, ggml_scale_inplace(ctx, scores, scale / params[2]));
            scale  = params[2];
        }
        ggml_tensor * p = ggml_soft_max_ext_inplace(ctx, scores, tm, scale, 0.0f);
        if (!sinks.empty()) {
            ggml_soft_max_add_sinks(p, add(GGML_TYPE_F32, group, 1, 1, [&](int64_t, int64_t) { return sinks.data() + h0; }));
        }
        ggml_tensor * args[] = { p, ggml_mul_mat(ctx, tv, to), ggml_sum_rows(ctx, ggml_sqr(ctx, tv)), ggml_sum_rows(ctx, ggml_sqr(ctx, to)) };
        ggml_tensor * w = ggml_custom_4d(ctx, GGML_TYPE_F32, n_kv, n, group, 1, args, 4, weigh_keys, GGML_N_TASKS_MAX, &seen);

        // Sums of w k q and w k k, [D][D], and of w k. For those without q the weights of a key are summed over the queries before.
        const float   one    = 1.0f;
        const auto    turned = [&](ggml_tensor * t) { return ggml_cont(ctx, ggml_transpose(ctx, t)); };
        ggml_tensor * w_all  = ggml_reshape_2d(ctx, w, n_kv, n * group);
        ggml_tensor * w_key  = ggml_out_prod(ctx, w_all, add(GGML_TYPE_F32, 1, n * group, 1, [&](int64_t, int64_t) { return &one; }));
        ggml_tensor * k_t    = turned(tk);
        ggml_tensor * wk_t   = turned(ggml_mul_mat(ctx, k_t, w_all)); // by query
        ggml_tensor * kq     = ggml_mul_mat(ctx, turned(ggml_reshape_2d(ctx, tq, D, n * group)), wk_t);
        ggml_tensor * kk     = ggml_mul_mat(ctx, k_t, ggml_mul(ctx, k_t, w_key));
        ggml_tensor * k1     = ggml_mul_mat(ctx, k_t, w_key);
        ggml_cgraph * graph  = ggml_new_graph(ctx);
        for (ggml_tensor * t : { kq, kk, k1 }) {
            ggml_set_output(t);
            ggml_build_forward_expand(graph, t);
        }
        if (!ggml_gallocr_alloc_graph(memory.get(), graph)) {
            GGML_ABORT("not enough memory to weigh the queries of a calibration");
        }
        for (const graph_input & i : inputs) {
            i.copy();
        }
        GGML_ASSERT(ggml_backend_graph_compute(cpu.get(), graph) == GGML_STATUS_SUCCESS);
        double * sum  = sums.data() + h_kv * (D + 1) * n_columns;
        double * last = sum + D * n_columns;
        for (int64_t i = 0; i < D; ++i, sum += n_columns) {
            for (int64_t j = 0; j < D; ++j) {
                sum[j]     += ((const float *) kq->data)[i * D + j];
                sum[D + j] += ((const float *) kk->data)[i * D + j];
            }
            sum[2 * D]  += ((const float *) k1->data)[i];
            last[D + i] += ((const float *) k1->data)[i];
        }
        for (int64_t r = 0; r < n * group; ++r) {
            const float * q_r = (const float *) hq.row(token(r % n), h0 + r / n, s);
            for (int64_t i = 0; i < D; ++i) {
                last[i] += (double) seen.costs[2 * r] * q_r[i];
            }
            last[2 * D] += seen.costs[2 * r];
            memcpy(&out[(mine[r % n] * n_head + h0 + r / n) * 2], &seen.costs[2 * r], 2 * sizeof(float));
        }
        ggml_free(ctx);
    }
    return out;
}

// Layer and side of a cache tensor, or of a view of one, by the name that llama_kv_cache gives it.
static bool parse_cache_name(const ggml_tensor * t, int & kind, int & il) {
    while (t && t->view_src) {
        t = t->view_src;
    }
    char side = 0;
    char end  = 0;
    if (!t || sscanf(t->name, "cache_%c_l%d%c", &side, &il, &end) != 2 || il < 0 || (side != 'k' && side != 'v')) {
        return false;
    }
    kind = side == 'k' ? MILLION_CAPTURE_K : MILLION_CAPTURE_V;
    return true;
}

million_capture * million_capture_init(uint32_t n_rows_max, uint32_t query_step, uint64_t seed, int32_t n_threads) {
    ggml_backend_ptr cpu(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    if (!cpu || query_step < 1) {
        return nullptr;
    }
    auto * reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(cpu.get()));
    auto   set = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    if (set) {
        set(cpu.get(), n_threads);
    }
    auto * cap = new million_capture();
    cap->n_rows_max = n_rows_max;
    cap->query_step = query_step;
    cap->seed       = seed;
    cap->memory.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(cpu.get())));
    cap->cpu        = std::move(cpu);
    return cap;
}

void million_capture_free(million_capture * cap) {
    delete cap;
}

bool million_capture_eval(ggml_tensor * t, bool ask, void * user_data) {
    auto * cap  = (million_capture *) user_data;
    int    kind = 0;
    int    il   = 0;

    if (t->op == GGML_OP_SET_ROWS) {
        if (!parse_cache_name(t, kind, il)) {
            return !ask;
        }
    } else if (t->op == GGML_OP_FLASH_ATTN_EXT) {
        if (!parse_cache_name(t->src[1], kind, il)) {
            return !ask;
        }
        kind = MILLION_CAPTURE_Q;
    } else {
        return !ask;
    }
    if (ask) {
        return true;
    }

    const ggml_tensor * x = t->src[0];
    if (x->type != GGML_TYPE_F32) {
        return true;
    }
    cap->data.resize(ggml_nbytes(x));
    ggml_backend_tensor_get(x, cap->data.data(), 0, cap->data.size());

    auto & r = cap->get(kind, il);
    if (kind != MILLION_CAPTURE_Q) {
        // [n_head_kv*D, n_tokens]; how the width splits into heads is known once attention has been seen
        if (r.n_head == 0) {
            r.n_head   = 1;
            r.head_dim = (int32_t) x->ne[0];
        }
        for (int64_t i = 0; i < x->ne[1]; ++i) {
            r.add((const float *) (cap->data.data() + i * x->nb[1]), cap->n_rows_max);
        }
        return true;
    }

    const ggml_tensor * kv[2] = { t->src[1], t->src[2] };
    for (int side = 0; side < 2; ++side) {
        auto & s = cap->get(side, il);
        if (s.n_head == 1 && kv[side]->ne[0] * kv[side]->ne[2] == s.head_dim) {
            s.head_dim = (int32_t) kv[side]->ne[0];
            s.n_head   = (int32_t) kv[side]->ne[2];
        }
    }

    // q [D, n_q, n_head, n_stream], strided
    r.head_dim = (int32_t) x->ne[0];
    r.n_head   = (int32_t) x->ne[2];
    cap->row.resize(r.width());
    std::vector<std::pair<int64_t, int64_t>> kept;
    std::vector<int64_t>                     places;
    for (int64_t s = 0; s < x->ne[3]; ++s) {
        for (int64_t i = 0; i < x->ne[1]; ++i) {
            if (cap->n_queries(il)++ % cap->query_step != 0) {
                continue;
            }
            for (int64_t h = 0; h < x->ne[2]; ++h) {
                memcpy(cap->row.data() + h * x->ne[0], cap->data.data() + i * x->nb[1] + h * x->nb[2] + s * x->nb[3], x->ne[0] * sizeof(float));
            }
            const int64_t place = r.add(cap->row.data(), cap->n_rows_max);
            if (place >= 0) {
                kept.emplace_back(i, s);
                places.push_back(place);
            }
        }
    }
    if (!kept.empty()) {
        cap->matches.resize(std::max<size_t>(cap->matches.size(), il + 1));
        const auto    weights = cap->weigh(t, kept, cap->matches[il]);
        const int64_t w       = r.n_head * 2;
        r.weights.resize(r.n_rows() * w);
        for (size_t i = 0; i < kept.size(); ++i) {
            std::copy_n(weights.data() + i * w, w, r.weights.data() + places[i] * w);
        }
    }
    return true;
}

int32_t million_capture_n_layer(const million_capture * cap) {
    return (int32_t) std::max({ cap->layers[0].size(), cap->layers[1].size(), cap->layers[2].size() });
}

int32_t million_capture_n_head(const million_capture * cap, int32_t il, int32_t kind) {
    const auto * r = cap->find(kind, il);
    return r ? r->n_head : 0;
}

int32_t million_capture_head_dim(const million_capture * cap, int32_t il, int32_t kind) {
    const auto * r = cap->find(kind, il);
    return r ? r->head_dim : 0;
}

int64_t million_capture_n_seen(const million_capture * cap, int32_t il, int32_t kind) {
    const auto * r = cap->find(kind, il);
    return r ? r->n_seen : 0;
}

int64_t million_capture_n_rows(const million_capture * cap, int32_t il, int32_t kind) {
    const auto * r = cap->find(kind, il);
    return r ? r->n_rows() : 0;
}

int64_t million_capture_rows(const million_capture * cap, int32_t il, int32_t kind, float * dst, int64_t n_max) {
    const auto * r = cap->find(kind, il);
    if (!r) {
        return 0;
    }
    const int64_t n = std::min(r->n_rows(), n_max);
    ggml_fp16_to_fp32_row(r->rows.data(), dst, n * r->width());
    return n;
}

int64_t million_capture_weights(const million_capture * cap, int32_t il, float * dst, int64_t n_max) {
    const auto * r = cap->find(MILLION_CAPTURE_Q, il);
    if (!r || r->n_head < 1) {
        return 0;
    }
    const int64_t w = r->n_head * 2;
    const int64_t n = std::min((int64_t) r->weights.size() / w, n_max);
    std::copy_n(r->weights.data(), n * w, dst);
    return n;
}

int64_t million_capture_matches(const million_capture * cap, int32_t il, float * dst, int64_t n_max) {
    if (il < 0 || il >= (int32_t) cap->matches.size()) {
        return 0;
    }
    const auto & sums = cap->matches[il];
    if ((int64_t) sums.size() > n_max) {
        return 0; // of other heads than the caller has in mind
    }
    std::copy(sums.begin(), sums.end(), dst);
    return (int64_t) sums.size();
}
