// C interface of libmillion-pq, for ctypes: everything in pq-cpu.h, and the calls below, which bring their own threads and scratch.
#pragma once

#include "pq-cpu.h"

#ifdef __cplusplus
extern "C" {
#endif

// Bytes of the run-time head blocks of all heads (pq-layout.h); 0 when the type or a size is not valid.
PQ_API size_t million_pq_codebook_bytes(int type, int D, int n_head_kv, int has_transform);

// Checks a blob (the bytes, not base64) and writes its head blocks to dst. Returns 0, or -1 and a message in err. D and n_head_kv are
// what the caller expects; dst_bytes is at least million_pq_codebook_bytes(); whether the blob has a transform shows
// in its flags, at byte 18.
PQ_API int million_pq_codebook_build(int type, const uint8_t * blob, size_t n, int D, int n_head_kv, uint8_t * dst,
                                     size_t dst_bytes, char * err, size_t err_len);

// n_threads <= 0: one per processor
PQ_API void million_pq_encode(const struct pq_encode_params * p, int n_threads);
PQ_API void million_pq_decode(const struct pq_decode_params * p, int n_threads);
PQ_API void million_pq_attn  (const struct pq_attn_params   * p, int n_threads);

// So that who mirrors the structs in another language can tell an old mirror from a new library.
PQ_API size_t million_pq_attn_params_bytes(void);

// pq_kmeans_assign() for many problems of one shape. Contiguous: x f32 [n_problems][n][dsub], centroids f32 [n_problems][ksub][dsub],
// codes u8 [n_problems][n] or NULL, dists f32 [n_problems][n] or NULL, sums f64 [n_problems][ksub][dsub], counts i64 [n_problems][ksub],
// costs f64 [n_problems][ksub]. Returns 0, or -1 when dsub is not 2 or 4, or ksub not 1 to 256.
PQ_API int million_pq_kmeans_assign_many(const float * x, int64_t n_problems, int64_t n, int32_t dsub, const float * centroids, int32_t ksub,
                                         uint8_t * codes, float * dists, double * sums, int64_t * counts, double * costs, int n_threads);

// pq_attn_side::to_float for f16 and f32 rows
PQ_API void million_pq_f16_to_float(const void * src, float * dst, int64_t n);
PQ_API void million_pq_f32_to_float(const void * src, float * dst, int64_t n);

#ifdef __cplusplus
}
#endif
