// What the kernels of every backend take: raw pointers, byte strides and plain numbers. The CPU backend (cpu/pq-cpu.h) and the
// CUDA backend (kernels/pq-cuda.h) share these structs; pointers are to memory of the device that runs the kernel.
#pragma once

#include "pq-layout.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// ---- encode: x [n_rows][n_head_kv][D] -> codes u8 [cells][n_head_kv][pq_head_bytes] ----
//
// x is rounded to f16 first: the codes of a row are those of the row that an f16 cache, or the exact tail, would hold.

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

    uint8_t       * tail;             // f16 [slots][n_head_kv][D], the exact tail; NULL: none
    size_t          tail_row_stride;  // bytes between slots; heads are D halves apart
    const int64_t * tail_idx;         // slot of each token, [n_rows]; negative: the token is not kept
};

// ---- decode: codes -> x [n_rows][n_head_kv][D], x = y T^-1 + mu ----

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

// ---- attention ----

// One side of the cache. With type != PQ_TYPE_COUNT it holds codes; otherwise rows of another format (so that a PQ K
// meets an f16 V, and the other way round): f16 without `to_float`; the CPU reads any other through it.
struct pq_attn_side {
    enum pq_type    type;
    int32_t         D;
    const uint8_t * codebook;      // head blocks; NULL without codes
    int32_t         has_transform;
    const uint8_t * data;
    size_t          row_stride;    // bytes between cells
    size_t          head_stride;   // bytes between KV heads
    size_t          stream_stride; // bytes between streams
    void (*to_float)(const void * src, float * dst, int64_t n); // CPU only; NULL with codes, and for f16 rows
    const uint8_t * tables;        // lookup tables of all heads (pq-layout.h); NULL: none, and the CPU has no use for them
};

// The exact tail: f16 rows of the most recent tokens. A token that is in the tail is masked in the coded part (-inf in
// `mask`) and visible here, so that the softmax sees it once.
struct pq_attn_tail {
    int64_t         n;               // slots per stream; 0: no tail
    const uint8_t * k;               // f16 [n_stream][n_head_kv][n][k.D], by strides
    size_t          k_row_stride;    // bytes between slots
    size_t          k_head_stride;
    size_t          k_stream_stride;
    const uint8_t * v;               // f16 [n_stream][n_head_kv][n][v.D], by strides
    size_t          v_row_stride;
    size_t          v_head_stride;
    size_t          v_stream_stride;
    const uint8_t * mask;            // f16 [n_stream][n_q][n], by strides; -inf excludes a slot (an unused one may hold anything)
    size_t          mask_token_stride;
    size_t          mask_stream_stride;
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

    struct pq_attn_tail tail; // its mask takes the head's ALiBi slope too

    const float * sinks;  // f32 [n_head]: a score that takes part in the softmax and has no value; NULL: none

    float scale;          // score = scale * q.k
    float max_bias;       // ALiBi; 0: off
    float logit_softcap;  // score = cap * tanh(score / cap); 0: off

    float * dst;          // f32 [n_stream][n_q][n_head][v.D], by strides
    size_t  dst_head_stride;
    size_t  dst_token_stride;
    size_t  dst_stream_stride;
};

#ifdef __cplusplus
}
#endif
