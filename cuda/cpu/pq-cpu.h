// PQ cache kernels for the CPU: encode, decode, attention on codes, and the assignment step of k-means.
// Raw pointers, byte strides and plain structs: the kernels know neither ggml nor threads. A caller asks how many
// work items there are, runs them in any order on any thread, each with a scratch area of its own, and then
// (attention only, after all items are done) runs the reduce items.
//
// One template (pq-kernels-impl.h) is compiled once per instruction set; codes are bit-identical across them:
// the encode path uses one fused multiply-add order everywhere. The widest set that the processor
// has is chosen at run time; GGML_PQ_SIMD=scalar|avx2|avx512 or pq_cpu_simd_set() forces one.
#pragma once

#include "../pq/pq-params.h"

#include <stddef.h>
#include <stdint.h>

#if !defined(PQ_SHARED)
#define PQ_API
#elif defined(_WIN32)
#define PQ_API __declspec(dllexport)
#else
#define PQ_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

PQ_API const char * pq_cpu_simd_name(void);              // "scalar", "avx2" or "avx512": what runs now
PQ_API int          pq_cpu_simd_set(const char * name);  // or "auto"; returns 0, or -1 when this processor or build lacks it

// ---- encode ----

PQ_API int64_t pq_encode_n_items     (const struct pq_encode_params * p);
PQ_API size_t  pq_encode_scratch_size(const struct pq_encode_params * p);
PQ_API void    pq_encode_item        (const struct pq_encode_params * p, int64_t item, void * scratch);

// ---- decode ----

PQ_API int64_t pq_decode_n_items     (const struct pq_decode_params * p);
PQ_API size_t  pq_decode_scratch_size(const struct pq_decode_params * p);
PQ_API void    pq_decode_item        (const struct pq_decode_params * p, int64_t item, void * scratch);

// ---- attention ----

// The split over the context is fixed by the shapes and not by the number of threads, so that
// results do not depend on it. A thread's scratch keeps the mapped queries for its next item, as long as that has the same.
PQ_API int64_t pq_attn_n_items       (const struct pq_attn_params * p);
PQ_API int64_t pq_attn_n_reduce_items(const struct pq_attn_params * p); // 0: the items wrote the result already
PQ_API size_t  pq_attn_partials_size (const struct pq_attn_params * p); // bytes shared by all items
PQ_API size_t  pq_attn_scratch_size  (const struct pq_attn_params * p); // bytes per thread
PQ_API void    pq_attn_scratch_begin (void * scratch); // by each thread, before its first item of p
PQ_API void    pq_attn_item          (const struct pq_attn_params * p, int64_t item, void * partials, void * scratch);
PQ_API void    pq_attn_reduce_item   (const struct pq_attn_params * p, int64_t item, void * partials, void * scratch);

// ---- k-means ----

// One assignment pass of Lloyd's algorithm: code[i] = nearest of the ksub centroids (ties to the lowest), dists[i] its squared distance,
// and per centroid the sum and number of its points and the sum of their squared distances.
// x f32 [n][dsub] with `x_stride` floats between points; centroids f32 [ksub][dsub]; codes u8 [n] or NULL; dists f32 [n] or NULL;
// sums f64 [ksub][dsub]; counts i64 [ksub]; costs f64 [ksub]. dsub is 2 or 4.
PQ_API void pq_kmeans_assign(const float * x, int64_t n, int64_t x_stride, int32_t dsub, const float * centroids, int32_t ksub,
                             uint8_t * codes, float * dists, double * sums, int64_t * counts, double * costs);

#ifdef __cplusplus
}
#endif
