// PQ cache kernels for the CPU: encode, decode, attention on codes, and the assignment step of k-means.
// Raw pointers, byte strides and plain structs: the kernels know neither ggml nor threads. A caller asks how many
// work items there are, runs them in any order on any thread, each with a scratch area of its own, and then
// (attention only, after all items are done) runs the reduce items.
//
// One template (pq-kernels-impl.h) is compiled once per instruction set; codes are bit-identical across them:
// the encode path uses one fused multiply-add order everywhere. The widest set that the processor
// has is chosen at run time; GGML_PQ_SIMD=scalar|avx2|avx512 or pq_cpu_simd_set() forces one.
#pragma once

#include "../pq/pq-layout.h"

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

// ---- encode: x f32 [n_rows][n_head_kv][D] -> codes u8 [rows][n_head_kv][pq_head_bytes] ----

struct pq_encode_params {
    enum pq_type type;
    int32_t      D;
    int32_t      n_head_kv;
    int64_t      n_rows;

    const uint8_t * codebook;      // head blocks
    int32_t         has_transform;

    const void * x;                // f32, or f16 when x_f16
    int32_t      x_f16;
    size_t       x_row_stride;     // bytes between tokens
    size_t       x_head_stride;    // bytes between heads

    uint8_t       * codes;
    size_t          codes_row_stride; // bytes between cells; heads are pq_head_bytes apart
    const int64_t * row_idx;          // cell of each token, [n_rows]; NULL: 0, 1, 2, ...
};

PQ_API int64_t pq_encode_n_items     (const struct pq_encode_params * p);
PQ_API size_t  pq_encode_scratch_size(const struct pq_encode_params * p);
PQ_API void    pq_encode_item        (const struct pq_encode_params * p, int64_t item, void * scratch);

// ---- decode: codes -> f32 [n_rows][n_head_kv][D], x = y T^-1 + mu ----

struct pq_decode_params {
    enum pq_type type;
    int32_t      D;
    int32_t      n_head_kv;
    int64_t      n_rows;

    const uint8_t * codebook;
    int32_t         has_transform;

    const uint8_t * codes;
    size_t          codes_row_stride;

    float * x;
    size_t  x_row_stride;
    size_t  x_head_stride;
};

PQ_API int64_t pq_decode_n_items     (const struct pq_decode_params * p);
PQ_API size_t  pq_decode_scratch_size(const struct pq_decode_params * p);
PQ_API void    pq_decode_item        (const struct pq_decode_params * p, int64_t item, void * scratch);

// ---- attention ----

// One side of the cache. With type != PQ_TYPE_COUNT it holds codes; otherwise rows of any other format, which
// `to_float` turns into f32 (so that a PQ K meets an f16 V, and the other way round).
struct pq_attn_side {
    enum pq_type    type;
    int32_t         D;
    const uint8_t * codebook;      // head blocks; NULL without codes
    int32_t         has_transform;
    const uint8_t * data;
    size_t          row_stride;    // bytes between cells
    size_t          head_stride;   // bytes between KV heads
    size_t          stream_stride; // bytes between streams
    void (*to_float)(const void * src, float * dst, int64_t n); // NULL with codes
};

struct pq_attn_params {
    int32_t n_head;
    int32_t n_head_kv; // divides n_head; query head h reads KV head h / (n_head / n_head_kv)
    int32_t n_stream;
    int64_t n_q;       // query tokens per stream
    int64_t n_kv;      // cells per stream

    struct pq_attn_side k;
    struct pq_attn_side v;

    const uint8_t * q; // f32 [n_stream][n_head][n_q][k.D], by strides
    size_t          q_token_stride;
    size_t          q_head_stride;
    size_t          q_stream_stride;

    // f16 [n_stream_mask][n_head_mask][n_q][n_kv], broadcast over heads and streams by index modulo; NULL: no mask.
    // -inf excludes a cell; other values, times the head's ALiBi slope, are added to the score.
    const uint8_t * mask;
    size_t          mask_token_stride;
    size_t          mask_head_stride;
    size_t          mask_stream_stride;
    int32_t         n_head_mask;
    int32_t         n_stream_mask;

    const float * sinks;  // f32 [n_head]: a score that takes part in the softmax and has no value; NULL: none

    float scale;          // score = scale * q.k
    float max_bias;       // ALiBi; 0: off
    float logit_softcap;  // score = cap * tanh(score / cap); 0: off

    float * dst;          // f32 [n_stream][n_q][n_head][v.D], by strides
    size_t  dst_head_stride;
    size_t  dst_token_stride;
    size_t  dst_stream_stride;
};

// The split over the context is fixed by the shapes and not by the number of threads, so that
// results do not depend on it.
PQ_API int64_t pq_attn_n_items       (const struct pq_attn_params * p);
PQ_API int64_t pq_attn_n_reduce_items(const struct pq_attn_params * p); // 0: the items wrote the result already
PQ_API size_t  pq_attn_partials_size (const struct pq_attn_params * p); // bytes shared by all items
PQ_API size_t  pq_attn_scratch_size  (const struct pq_attn_params * p); // bytes per thread
PQ_API void    pq_attn_item          (const struct pq_attn_params * p, int64_t item, void * partials, void * scratch);
PQ_API void    pq_attn_reduce_item   (const struct pq_attn_params * p, int64_t item, void * partials, void * scratch);

// ---- k-means ----

// One assignment pass of Lloyd's algorithm: code[i] = nearest of the ksub centroids (ties to the lowest), and per
// centroid the sum (f64) and number of its points. Returns the sum of squared distances.
// x f32 [n][dsub] with `x_stride` floats between points; centroids f32 [ksub][dsub]; sums f64 [ksub][dsub];
// counts i64 [ksub]; codes u8 [n] or NULL. dsub is 2 or 4.
PQ_API double pq_kmeans_assign(const float * x, int64_t n, int64_t x_stride, int32_t dsub, const float * centroids,
                               int32_t ksub, uint8_t * codes, double * sums, int64_t * counts);

#ifdef __cplusplus
}
#endif
