// PQ cache types in libllama: reads codebooks from GGUF metadata (docs/format.md), checks them against the model, and
// hands them to the KV cache. The second half is a C ABI for the Python package: checks, sizes, and calibration capture.
#pragma once

#include "ggml-backend.h"
#include "ggml-pq.h"
#include "llama.h"

#ifdef __cplusplus

#include <functional>
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

// The type of one layer's K or V in a cache of type `type`: f16 for a layer that the file has no PQ codebook for.
ggml_type llama_million_layer_type(const llama_model & model, ggml_type type, uint32_t il, bool is_v);

// Whether a cache of these types and layers can have an exact tail: all of its layers must have codes in K or V.
bool llama_million_can_have_tail(const llama_model & model, ggml_type type_k, ggml_type type_v, uint32_t n_layer,
        const std::function<bool(int32_t il)> & filter);

// Refuses (logging why) cache types that this model cannot have; turns flash attention from auto to on for PQ types; notes
// the micro-batch size for the exact tail of the caches that the calling thread makes next.
bool llama_million_check_params(const llama_model & model, llama_context_params & params);

// Throws when a node reads or writes PQ codes in a way no backend can: a clear end instead of an abort in the scheduler.
void llama_million_check_graph(ggml_cgraph * gf);

extern "C" {
#endif

// NULL when a cache of these types can be made for the model, else the reason. The text lives until the thread's next call.
LLAMA_API const char * million_model_check(const struct llama_model * model, int32_t type_k, int32_t type_v);

struct million_cache_info {
    int32_t  type_k;     // ggml types of the layers, -1 without a cache; the last layer's when they differ
    int32_t  type_v;
    uint64_t bytes_k;    // codes or values
    uint64_t bytes_v;
    uint64_t bytes_f16;  // what the same cells take in f16
    uint64_t bytes_tail; // the exact tail
    uint64_t bytes_codebooks;
    uint32_t n_tail;     // tokens of a sequence in the exact tail; 0: none
    uint32_t n_slots;    // its rows, micro-batch included
};

// Types and bytes of the context's cache tensors, all 0 (types -1) when it has none.
LLAMA_API void million_get_cache_info(struct llama_context * ctx, struct million_cache_info * info);

// Tokens that the exact tail of a PQ cache keeps per sequence, for contexts that the calling thread makes from now on.
// 0: no tail. Negative: the default, which is the environment variable MILLION_KV_TAIL or else 128. Returns the value before.
LLAMA_API int32_t million_set_kv_tail(int32_t n_tokens);

// ---- calibration capture ----
//
// Keeps, per layer, a uniform random sample (reservoir sampling, Vitter's algorithm R) of the rows that the
// cache would store, and every `query_step`th of the queries that meet them, which are weighed on n_threads of the CPU. Set as a context's
// cb_eval, with the capture as user data.

struct million_capture;

enum million_capture_kind {
    MILLION_CAPTURE_K = 0, // source of the cache write: after rope
    MILLION_CAPTURE_V = 1,
    MILLION_CAPTURE_Q = 2, // queries as attention sees them: after rope
};

LLAMA_API struct million_capture * million_capture_init(uint32_t n_rows_max, uint32_t query_step, uint64_t seed, int32_t n_threads);
LLAMA_API void                     million_capture_free(struct million_capture * cap);

LLAMA_API bool million_capture_eval(struct ggml_tensor * t, bool ask, void * user_data); // a ggml_backend_sched_eval_callback

LLAMA_API int32_t million_capture_n_layer (const struct million_capture * cap); // highest layer seen, plus one
LLAMA_API int32_t million_capture_n_head  (const struct million_capture * cap, int32_t il, int32_t kind); // 0: not seen
LLAMA_API int32_t million_capture_head_dim(const struct million_capture * cap, int32_t il, int32_t kind);
LLAMA_API int64_t million_capture_n_seen  (const struct million_capture * cap, int32_t il, int32_t kind);
LLAMA_API int64_t million_capture_n_rows  (const struct million_capture * cap, int32_t il, int32_t kind);

// Writes up to n_max sampled rows, f32 [n][n_head][head_dim], and returns their number.
LLAMA_API int64_t million_capture_rows(const struct million_capture * cap, int32_t il, int32_t kind, float * dst, int64_t n_max);

// Writes the weights of up to n_max sampled queries, f32 [n][n_head][2], and returns their number. They are what errors of a
// query's scores do to its output o: by the derivative p (v - o) of the output by a score, the sum of p^2 |v - o|^2, first over
// all keys but those of its last 128 tokens, which an exact tail holds, then over all keys. 0 where attention has ALiBi.
LLAMA_API int64_t million_capture_weights(const struct million_capture * cap, int32_t il, float * dst, int64_t n_max);

// Which keys the queries of a layer look for: f32 [n_head_kv][D + 1][2 D + 1], by KV head the sum of w [k; 1] [q; k; 1]^T over the weighed queries
// q of its group and the keys k that are beyond an exact tail, with w = p^2 |v - o|^2 as above. So the last row is the sum of w q, of w k, and of w.
// Returns how many numbers were written; 0 where queries could not be weighed, or there are more than n_max.
LLAMA_API int64_t million_capture_matches(const struct million_capture * cap, int32_t il, float * dst, int64_t n_max);

#ifdef __cplusplus
}
#endif
