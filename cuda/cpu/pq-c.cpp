#include "pq-c.h"

#include "../pq/pq-codebook.h"
#include "pq-simd.h"

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <vector>

namespace {

// Runs fn(item, scratch) for every item; the calling thread works too.
template <class F>
void run_items(int64_t n_items, size_t scratch_bytes, int n_threads, F fn) {
    if (n_threads <= 0) {
        n_threads = (int) std::thread::hardware_concurrency();
    }
    std::atomic<int64_t> next{0};
    auto work = [&]() {
        std::vector<uint8_t> scratch(scratch_bytes); // zeros, which is what pq_attn_scratch_begin is for
        for (int64_t i = next++; i < n_items; i = next++) {
            fn(i, scratch.data());
        }
    };
    std::vector<std::thread> threads;
    for (int64_t t = 1; t < n_threads && t < n_items; t++) {
        threads.emplace_back(work);
    }
    work();
    for (std::thread & t : threads) {
        t.join();
    }
}

int fail(char * err, size_t err_len, const std::string & text) {
    if (err && err_len) {
        snprintf(err, err_len, "%s", text.c_str());
    }
    return -1;
}

} // namespace

size_t million_pq_codebook_bytes(int type, int D, int n_head_kv, int has_transform) {
    if (type < 0 || type >= PQ_TYPE_COUNT || !pq_head_size_ok(D) || n_head_kv <= 0) {
        return 0;
    }
    return pq_get_codebook_layout(D, has_transform).head_bytes * (size_t) n_head_kv;
}

int million_pq_codebook_build(int type, const uint8_t * blob, size_t n, int D, int n_head_kv, uint8_t * dst, size_t dst_bytes,
                              char * err, size_t err_len) try {
    pq_blob     parsed;
    std::string error;
    if (!pq_blob_parse(blob, n, (pq_type) type, parsed, error)) {
        return fail(err, err_len, error);
    }
    if (parsed.D != D) {
        return fail(err, err_len, "codebook head size: found " + std::to_string(parsed.D) + ", needs " + std::to_string(D));
    }
    if (parsed.n_head_kv != n_head_kv) {
        return fail(err, err_len, "codebook KV heads: found " + std::to_string(parsed.n_head_kv) + ", needs " + std::to_string(n_head_kv));
    }
    const size_t need = million_pq_codebook_bytes(type, D, n_head_kv, parsed.has_transform);
    if (dst_bytes < need) {
        return fail(err, err_len, "codebook buffer: found " + std::to_string(dst_bytes) + " bytes, needs " + std::to_string(need));
    }
    if (!pq_codebook_build(parsed, dst, error)) {
        return fail(err, err_len, error);
    }
    return 0;
} catch (const std::exception & e) { // out of memory; nothing may be thrown through C
    return fail(err, err_len, e.what());
}

void million_pq_encode(const pq_encode_params * p, int n_threads) {
    run_items(pq_encode_n_items(p), pq_encode_scratch_size(p), n_threads,
              [&](int64_t i, void * scratch) { pq_encode_item(p, i, scratch); });
}

void million_pq_decode(const pq_decode_params * p, int n_threads) {
    run_items(pq_decode_n_items(p), pq_decode_scratch_size(p), n_threads,
              [&](int64_t i, void * scratch) { pq_decode_item(p, i, scratch); });
}

void million_pq_attn(const pq_attn_params * p, int n_threads) {
    std::vector<uint8_t> partials(pq_attn_partials_size(p));
    run_items(pq_attn_n_items(p), pq_attn_scratch_size(p), n_threads,
              [&](int64_t i, void * scratch) { pq_attn_item(p, i, partials.data(), scratch); });
    run_items(pq_attn_n_reduce_items(p), pq_attn_scratch_size(p), n_threads,
              [&](int64_t i, void * scratch) { pq_attn_reduce_item(p, i, partials.data(), scratch); });
}

size_t million_pq_attn_params_bytes(void) {
    return sizeof(pq_attn_params);
}

int million_pq_kmeans_assign_many(const float * x, int64_t n_problems, int64_t n, int32_t dsub, const float * centroids, int32_t ksub,
                                  uint8_t * codes, float * dists, double * sums, int64_t * counts, double * costs, int n_threads) {
    if ((dsub != 2 && dsub != 4) || ksub < 1 || ksub > PQ_KSUB) {
        return -1;
    }
    run_items(n_problems, 0, n_threads, [&](int64_t i, void *) {
        pq_kmeans_assign(x + i * n * dsub, n, dsub, dsub, centroids + i * ksub * dsub, ksub, codes ? codes + i * n : nullptr,
                         dists ? dists + i * n : nullptr, sums + i * ksub * dsub, counts + i * ksub, costs + i * ksub);
    });
    return 0;
}

void million_pq_f16_to_float(const void * src, float * dst, int64_t n) {
    const uint16_t * p = (const uint16_t *) src;
    for (int64_t i = 0; i < n; i++) {
        dst[i] = pq_f16_to_f32(p[i]);
    }
}

void million_pq_f32_to_float(const void * src, float * dst, int64_t n) {
    memcpy(dst, src, (size_t) n * sizeof(float));
}
