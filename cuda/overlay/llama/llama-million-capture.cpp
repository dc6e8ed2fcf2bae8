// Calibration capture: see llama-million.h.

#include "llama-million.h"

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <utility>
#include <vector>

// Tokens that an exact tail keeps unless told otherwise. Errors of keys that young do not reach their queries.
static constexpr int64_t N_TAIL = 128;

// A query only counts in second moments, so one of so many is kept.
static constexpr int64_t QUERY_STEP = 4;

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
    uint64_t seed;

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
};

// Heads of a tensor [D, n, n_head, n_stream] as floats, whatever its strides.
struct heads {
    const ggml_tensor *  t;
    std::vector<uint8_t> data;

    explicit heads(const ggml_tensor * t) : t(t), data(ggml_nbytes(t)) {
        ggml_backend_tensor_get(t, data.data(), 0, data.size());
    }

    float at(int64_t d, int64_t i, int64_t h, int64_t s) const {
        const uint8_t * x = data.data() + d * t->nb[0] + i * t->nb[1] + h * t->nb[2] + s * t->nb[3];
        return t->type == GGML_TYPE_F16 ? ggml_fp16_to_fp32(*(const ggml_fp16_t *) x) : *(const float *) x;
    }

    // f32 [D][n]
    std::vector<float> transposed(int64_t h, int64_t s) const {
        const int64_t      n = t->ne[1];
        std::vector<float> out(t->ne[0] * n);
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t d = 0; d < t->ne[0]; ++d) {
                out[d * n + i] = at(d, i, h, s);
            }
        }
        return out;
    }
};

// out[n_a][n] = a[n_a][D] * b[D][n]. Four rows of a at once: each value of b that is loaded is used four times, and 64 columns
// of the four sums fit the first cache.
static void multiply(const std::vector<float> & a, const std::vector<float> & b, int64_t D, int64_t n, std::vector<float> & out) {
    const int64_t n_a = (int64_t) a.size() / D;
    out.resize(n_a * n);
    for (int64_t j0 = 0; j0 < n; j0 += 64) {
        const int64_t n_j = std::min<int64_t>(64, n - j0);
        for (int64_t i0 = 0; i0 < n_a; i0 += 4) {
            const int64_t n_i = std::min<int64_t>(4, n_a - i0);
            float         sum[4][64] = {};
            for (int64_t d = 0; d < D; ++d) {
                const float * r = b.data() + d * n + j0;
                float         x[4];
                for (int64_t i = 0; i < 4; ++i) {
                    x[i] = i < n_i ? a[(i0 + i) * D + d] : 0.0f;
                }
                for (int64_t j = 0; j < n_j; ++j) {
                    sum[0][j] += x[0] * r[j];
                    sum[1][j] += x[1] * r[j];
                    sum[2][j] += x[2] * r[j];
                    sum[3][j] += x[3] * r[j];
                }
            }
            for (int64_t i = 0; i < n_i; ++i) {
                std::copy_n(sum[i], n_j, out.data() + (i0 + i) * n + j0);
            }
        }
    }
}

// What million_capture_weights says, of the queries (token, stream) of one attention: f32 [n_query][n_head][2].
static std::vector<float> query_weights(const ggml_tensor * attn, const std::vector<std::pair<int64_t, int64_t>> & queries) {
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
    const heads   hq(q), hk(k), hv(v), ho(attn), hm(attn->src[3]);
    const int64_t D      = q->ne[0];
    const int64_t D_v    = v->ne[0];
    const int64_t n_kv   = k->ne[1];
    const int64_t group  = n_head / k->ne[2];

    std::vector<float> sinks(n_head, -INFINITY);
    if (attn->src[4]) {
        ggml_backend_tensor_get(attn->src[4], sinks.data(), 0, n_head * sizeof(float));
    }

    // f32 [n_query][mask heads][n_kv]; and the cell of each query's token: the last that it sees
    const int64_t        n_mask = hm.t->ne[2];
    std::vector<float>   masks(queries.size() * n_mask * n_kv);
    std::vector<int64_t> own(queries.size(), -1);
    for (size_t i = 0; i < queries.size(); ++i) {
        for (int64_t m = 0; m < n_mask; ++m) {
            float * mask = masks.data() + (i * n_mask + m) * n_kv;
            for (int64_t j = 0; j < n_kv; ++j) {
                mask[j] = hm.at(j, queries[i].first, m, queries[i].second % hm.t->ne[3]);
                own[i]  = mask[j] > -INFINITY ? std::max(own[i], j) : own[i];
            }
        }
    }

    const auto run = [&](int64_t h_kv, int64_t s) {
        std::vector<int64_t> mine;
        std::vector<float>   a, o;
        for (int64_t i = 0; i < (int64_t) queries.size(); ++i) {
            if (queries[i].second != s) {
                continue;
            }
            mine.push_back(i);
            for (int64_t h = h_kv * group; h < (h_kv + 1) * group; ++h) {
                for (int64_t d = 0; d < D; ++d) {
                    a.push_back(hq.at(d, queries[i].first, h, s) * params[0]);
                }
                for (int64_t d = 0; d < D_v; ++d) {
                    o.push_back(ho.at(d, h, queries[i].first, s));
                }
            }
        }
        const auto         kt = hk.transposed(h_kv, s % k->ne[3]);
        const auto         vt = hv.transposed(h_kv, s % v->ne[3]);
        std::vector<float> scores, along, vv(n_kv, 0.0f);
        multiply(a, kt, D, n_kv, scores);
        multiply(o, vt, D_v, n_kv, along);
        for (int64_t d = 0; d < D_v; ++d) {
            for (int64_t j = 0; j < n_kv; ++j) {
                vv[j] += vt[d * n_kv + j] * vt[d * n_kv + j];
            }
        }
        for (int64_t r = 0; r < (int64_t) mine.size() * group; ++r) {
            const int64_t i    = mine[r / group];
            const int64_t h    = h_kv * group + r % group;
            const int64_t n    = own[i] + 1;
            const float * mask = masks.data() + (i * n_mask + h % n_mask) * n_kv;
            float *       p    = scores.data() + r * n_kv;
            if (n == 0) {
                continue;
            }
            if (params[2] != 0.0f) {
                for (int64_t j = 0; j < n; ++j) {
                    p[j] = params[2] * std::tanh(p[j] / params[2]);
                }
            }
            float top = sinks[h];
            for (int64_t j = 0; j < n; ++j) {
                p[j] += mask[j];
                top = std::max(top, p[j]);
            }
            float oo = 0.0f;
            for (int64_t d = 0; d < D_v; ++d) {
                oo += o[r * D_v + d] * o[r * D_v + d];
            }
            double sum = std::exp(sinks[h] - top);
            double cost[2] = {}; // of keys that the tail holds, and of all others
            for (int64_t j = 0; j < n; ++j) {
                const float e = std::exp(p[j] - top);
                sum += e;
                cost[j < n - N_TAIL] += (double) e * e * std::max(0.0f, vv[j] - 2.0f * along[r * n_kv + j] + oo);
            }
            out[(i * n_head + h) * 2 + 0] = (float) (cost[1] / (sum * sum));
            out[(i * n_head + h) * 2 + 1] = (float) ((cost[0] + cost[1]) / (sum * sum));
        }
    };

    std::vector<std::thread> threads;
    const int64_t n_thread = std::max(1u, std::thread::hardware_concurrency());
    const int64_t n_part   = k->ne[2] * q->ne[3];
    for (int64_t i = 0; i < std::min(n_thread, n_part); ++i) {
        threads.emplace_back([&, i] {
            for (int64_t part = i; part < n_part; part += n_thread) {
                run(part % k->ne[2], part / k->ne[2]);
            }
        });
    }
    for (auto & thread : threads) {
        thread.join();
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

million_capture * million_capture_init(uint32_t n_rows_max, uint64_t seed) {
    auto * cap = new million_capture();
    cap->n_rows_max = n_rows_max;
    cap->seed       = seed;
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
            if (cap->n_queries(il)++ % QUERY_STEP != 0) {
                continue;
            }
            for (int64_t h = 0; h < x->ne[2]; ++h) {
                memcpy(cap->row.data() + h * x->ne[0], cap->data.data() + i * x->nb[1] + h * x->nb[2] + s * x->nb[3], x->ne[0] * sizeof(float));
            }
            const int64_t place = r.add(cap->row.data(), std::max<int64_t>(1, cap->n_rows_max / QUERY_STEP));
            if (place >= 0) {
                kept.emplace_back(i, s);
                places.push_back(place);
            }
        }
    }
    if (!kept.empty()) {
        const auto    weights = query_weights(t, kept);
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
