// PQ cache types in libllama: reads codebooks from GGUF metadata (docs/format.md), checks them against the model, and
// hands them to the KV cache. The second half is a C ABI for the Python package: checks, sizes, and calibration capture.
#pragma once

#include "ggml-backend.h"
#include "ggml-pq.h"
#include "llama.h"

#ifdef __cplusplus

#include <memory>

struct llama_hparams;
struct llama_model_loader;

struct llama_million; // the codebooks of one model

// Takes the million.* metadata over while the file is open; NULL when it has none. Throws for a file with PQ weights. Checks happen when a cache needs them,
// so that a model with bad codebooks still runs with other cache types.
std::shared_ptr<llama_million> llama_million_load(const llama_model_loader & ml);

// The codebook of a layer and side in memory of type `buft`, made on first use and shared by the model's contexts.
// NULL for types other than PQ. Throws std::runtime_error with the reason when it cannot be had.
ggml_tensor * llama_million_codebook(
        const llama_model        & model,
        const llama_hparams      & hparams,
        ggml_backend_buffer_type_t buft,
        ggml_type                  type,
        uint32_t                   il,
        bool                       is_v);

// Refuses (logging why) cache types that this model cannot have; turns flash attention from auto to on for PQ types.
bool llama_million_check_params(const llama_model & model, llama_context_params & params);

// Throws when a node reads or writes PQ codes in a way no backend can: a clear end instead of an abort in the scheduler.
void llama_million_check_graph(ggml_cgraph * gf);

extern "C" {
#endif

// NULL when a cache of these types can be made for the model, else the reason. The text lives until the thread's next call.
LLAMA_API const char * million_model_check(const struct llama_model * model, int32_t type_k, int32_t type_v);

// Bytes of the context's cache tensors; 0 when it has none. Any of the pointers may be NULL.
LLAMA_API uint64_t million_cache_bytes(
        struct llama_context * ctx, int32_t * type_k, int32_t * type_v, uint64_t * bytes_k, uint64_t * bytes_v);

// ---- calibration capture ----
//
// Keeps, per layer, a uniform random sample (reservoir sampling, Vitter's algorithm R) of the rows that the
// cache would store and of the queries that meet them. Set as a context's cb_eval, with the capture as user data.

struct million_capture;

enum million_capture_kind {
    MILLION_CAPTURE_K = 0, // source of the cache write: after rope
    MILLION_CAPTURE_V = 1,
    MILLION_CAPTURE_Q = 2, // queries as attention sees them: after rope
};

LLAMA_API struct million_capture * million_capture_init(uint32_t n_rows_max, uint64_t seed);
LLAMA_API void                     million_capture_free(struct million_capture * cap);

LLAMA_API bool million_capture_eval(struct ggml_tensor * t, bool ask, void * user_data); // a ggml_backend_sched_eval_callback

LLAMA_API int32_t million_capture_n_layer (const struct million_capture * cap); // highest layer seen, plus one
LLAMA_API int32_t million_capture_n_head  (const struct million_capture * cap, int32_t il, int32_t kind); // 0: not seen
LLAMA_API int32_t million_capture_head_dim(const struct million_capture * cap, int32_t il, int32_t kind);
LLAMA_API int64_t million_capture_n_seen  (const struct million_capture * cap, int32_t il, int32_t kind);
LLAMA_API int64_t million_capture_n_rows  (const struct million_capture * cap, int32_t il, int32_t kind);

// Writes up to n_max sampled rows, f32 [n][n_head][head_dim], and returns their number.
LLAMA_API int64_t million_capture_rows(const struct million_capture * cap, int32_t il, int32_t kind, float * dst, int64_t n_max);

#ifdef __cplusplus
}
#endif
