// Calibration capture: see llama-million.h.

#include "llama-million.h"

#include "ggml.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

struct reservoir {
    int32_t n_head   = 0;
    int32_t head_dim = 0;
    int64_t n_seen   = 0;

    // f16 [n_rows][n_head*head_dim]: the precision of the cache that the rows are taken from
    std::vector<ggml_fp16_t> rows;

    std::mt19937_64 rng;

    int64_t width() const { return (int64_t) n_head * head_dim; }
    int64_t n_rows() const { return width() > 0 ? (int64_t) rows.size() / width() : 0; }

    void add(const float * row, int64_t n_rows_max) {
        const int64_t w = width();
        int64_t slot = n_seen;
        if (n_seen < n_rows_max) {
            rows.resize((n_seen + 1) * w);
        } else {
            slot = (int64_t) (rng() % (uint64_t) (n_seen + 1));
        }
        if (slot < n_rows_max) {
            ggml_fp32_to_fp16_row(row, rows.data() + slot * w, w);
        }
        n_seen++;
    }
};

struct million_capture {
    uint32_t n_rows_max;
    uint64_t seed;

    std::vector<reservoir> layers[3]; // [kind][il]

    std::vector<uint8_t> data;
    std::vector<float>   row;

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

    // q [D, n_q, n_head, n_stream], strided; a query row needs only be sampled for second moments, so a quarter is kept
    r.head_dim = (int32_t) x->ne[0];
    r.n_head   = (int32_t) x->ne[2];
    cap->row.resize(r.width());
    for (int64_t s = 0; s < x->ne[3]; ++s) {
        for (int64_t i = 0; i < x->ne[1]; ++i) {
            for (int64_t h = 0; h < x->ne[2]; ++h) {
                memcpy(cap->row.data() + h * x->ne[0], cap->data.data() + i * x->nb[1] + h * x->nb[2] + s * x->nb[3], x->ne[0] * sizeof(float));
            }
            r.add(cap->row.data(), std::max<int64_t>(1, cap->n_rows_max / 4));
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
