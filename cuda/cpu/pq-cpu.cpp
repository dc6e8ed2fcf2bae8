#include "pq-cpu.h"
#include "pq-kernels.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

// MSVC compiles intrinsics without flags but has no way to ask the processor that is this short; it gets the scalar kernels
// unless the whole build is for AVX2 or AVX-512, as ggml's own MSVC builds are.
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define PQ_CPU_HAS_AVX2() \
    (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
#define PQ_CPU_HAS_AVX512() \
    (PQ_CPU_HAS_AVX2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && \
     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi"))
#else
#if defined(__AVX2__)
#define PQ_CPU_HAS_AVX2() true
#else
#define PQ_CPU_HAS_AVX2() false
#endif
#if defined(__AVX512F__)
#define PQ_CPU_HAS_AVX512() true
#else
#define PQ_CPU_HAS_AVX512() false
#endif
#endif

namespace {

std::atomic<const pq_kernels *> g_kernels{nullptr};

// NULL when this build or this processor lacks the instruction set, or it has no such name.
const pq_kernels * find_kernels(const char * name) {
    const bool any = strcmp(name, "auto") == 0;
    if ((any || strcmp(name, "avx512") == 0) && pq_kernels_avx512() && PQ_CPU_HAS_AVX512()) {
        return pq_kernels_avx512();
    }
    if ((any || strcmp(name, "avx2") == 0) && pq_kernels_avx2() && PQ_CPU_HAS_AVX2()) {
        return pq_kernels_avx2();
    }
    return any || strcmp(name, "scalar") == 0 ? pq_kernels_scalar() : nullptr;
}

int64_t n_row_items(int64_t n_rows, int32_t n_head_kv) {
    return pq_ceil_div(n_rows, PQ_ROW_TILE) * n_head_kv;
}

} // namespace

const pq_kernels * pq_kernels_current(void) {
    const pq_kernels * k = g_kernels.load(std::memory_order_acquire);
    if (!k) {
        const char * name = getenv("GGML_PQ_SIMD");
        k = name ? find_kernels(name) : nullptr;
        if (!k) {
            k = find_kernels("auto");
        }
        // Threads that come here together find the same kernels; one that called pq_cpu_simd_set() meanwhile wins.
        const pq_kernels * expected = nullptr;
        if (!g_kernels.compare_exchange_strong(expected, k, std::memory_order_acq_rel)) {
            k = expected;
        }
    }
    return k;
}

const char * pq_cpu_simd_name(void) {
    return pq_kernels_current()->name;
}

int pq_cpu_simd_set(const char * name) {
    const pq_kernels * k = name ? find_kernels(name) : nullptr;
    if (!k) {
        return -1;
    }
    g_kernels.store(k, std::memory_order_release);
    return 0;
}

int64_t pq_encode_n_items(const pq_encode_params * p) {
    return n_row_items(p->n_rows, p->n_head_kv);
}

size_t pq_encode_scratch_size(const pq_encode_params * p) {
    pq_arena a = pq_arena_begin(nullptr);
    pq_encode_carve(&a, p->D);
    return pq_arena_bytes(&a);
}

void pq_encode_item(const pq_encode_params * p, int64_t item, void * scratch) {
    pq_kernels_current()->encode_item(p, item, scratch);
}

int64_t pq_decode_n_items(const pq_decode_params * p) {
    return n_row_items(p->n_rows, p->n_head_kv);
}

size_t pq_decode_scratch_size(const pq_decode_params * p) {
    pq_arena a = pq_arena_begin(nullptr);
    pq_decode_carve(&a, p->D);
    return pq_arena_bytes(&a);
}

void pq_decode_item(const pq_decode_params * p, int64_t item, void * scratch) {
    pq_kernels_current()->decode_item(p, item, scratch);
}

int64_t pq_attn_n_items(const pq_attn_params * p) {
    const pq_attn_plan pl = pq_attn_make_plan(p);
    return pl.n_base * pl.n_part;
}

int64_t pq_attn_n_reduce_items(const pq_attn_params * p) {
    const pq_attn_plan pl = pq_attn_make_plan(p);
    return pl.n_part > 1 ? pl.n_base : 0;
}

size_t pq_attn_partials_size(const pq_attn_params * p) {
    const pq_attn_plan pl = pq_attn_make_plan(p);
    return pl.n_part > 1 ? (size_t) (pl.n_base * pl.n_part * pl.partial_floats) * sizeof(float) : 0;
}

size_t pq_attn_scratch_size(const pq_attn_params * p) {
    const pq_attn_plan pl = pq_attn_make_plan(p);
    pq_arena a = pq_arena_begin(nullptr);
    pq_attn_carve(&a, &pl);
    return pq_arena_bytes(&a);
}

void pq_attn_scratch_begin(void * scratch) {
    pq_arena a = pq_arena_begin(scratch);
    *pq_take<int64_t>(&a, 1) = 0; // pq_attn_scratch::mapped
}

void pq_attn_item(const pq_attn_params * p, int64_t item, void * partials, void * scratch) {
    pq_kernels_current()->attn_item(p, item, partials, scratch);
}

void pq_attn_reduce_item(const pq_attn_params * p, int64_t item, void * partials, void * scratch) {
    pq_kernels_current()->attn_reduce_item(p, item, partials, scratch);
}

void pq_kmeans_assign(const float * x, int64_t n, int64_t x_stride, int32_t dsub, const float * centroids, int32_t ksub,
                      uint8_t * codes, float * dists, double * sums, int64_t * counts, double * costs) {
    pq_kernels_current()->kmeans_assign(x, n, x_stride, dsub, centroids, ksub, codes, dists, sums, counts, costs);
}
