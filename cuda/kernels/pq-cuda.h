// PQ cache kernels for CUDA: encode, decode, attention on codes. Raw device pointers, byte strides and the structs of
// pq/pq-params.h; nothing here knows ggml. No function allocates memory, synchronizes, or reads device memory on the host, so
// each can be captured in a CUDA graph.
//
// Attention takes two steps: a plan (a pure function of shapes and device properties, which tests call without a GPU)
// and the launch, which follows the plan.
#pragma once

#include "../pq/pq-params.h"

#include <cuda_runtime_api.h>

#include <stddef.h>
#include <stdint.h>

// ---- attention ----

#define PQ_CUDA_ATTN_MAX_N_Q 8 // query tokens per stream; above it decode to f16 and use a tensor-core kernel (prefill)

struct pq_cuda_device_props {
    int    cc;         // compute capability: 10 * major + minor
    int    n_sm;       // multiprocessors
    size_t smem_optin; // largest dynamic shared memory of a block, bytes (cudaDevAttrMaxSharedMemoryPerBlockOptin)
};

enum pq_cuda_attn_kernel {
    PQ_CUDA_ATTN_128,        // D = 128, codes on both sides: pq-attn-128-kernel.cuh
    PQ_CUDA_ATTN_ONE_PHASE,  // every other case: pq-attn-kernel.cuh
    PQ_CUDA_ATTN_TWO_PHASES, // the same where the tables of K and V don't fit into shared memory together: scores first, then values
};

struct pq_cuda_attn_plan {
    enum pq_cuda_attn_kernel kernel;
    int32_t lanes;           // lanes that share a cell, D / 8 rounded up to 8, 16 or 32
    int32_t rows_per_block;  // query rows of a KV head that one block serves at a time: 1, 4 or 8
    int32_t n_row_groups;    // blocks that share a KV head's rows
    int32_t n_split;         // parts of the context, each a block
    int64_t cells_per_split;
    int64_t slots_per_split; // of the exact tail
    int32_t n_threads;
    int32_t n_blocks;        // of attention; those that only encode come on top
    int32_t score_tiles;     // two phases: tiles whose scores fit in shared memory
    int32_t n_tail_warps;    // PQ_CUDA_ATTN_128: warps of a block that attend to the exact tail
    int32_t encode_rows;     // PQ_CUDA_ATTN_128: new rows of a step that a group of threads encodes at a time
    int32_t n_sm;            // of the device that the plan is for
    int32_t has_boxes;       // whether the device copies boxes of tensors, of which it needs a description (from 9.0 on)
    size_t  smem_bytes;      // dynamic shared memory of a block
    size_t  scratch_bytes;   // device memory that pq_cuda_attn takes as `scratch`; 0 when n_split is 1
    size_t  counter_bytes;   // and as `counters`
};

// NULL, or what about these parameters the CUDA kernels do not cover. Pure.
const char * pq_cuda_attn_unsupported(const pq_attn_params & p, const pq_cuda_device_props & device);

// Pure; only shapes, strides, types and the presence of optional parts are read. Parameters must be supported.
pq_cuda_attn_plan pq_cuda_attn_make_plan(const pq_attn_params & p, const pq_cuda_device_props & device);

// Launches attention on `stream`. `scratch` holds plan.scratch_bytes, 16-byte aligned. `counters` holds plan.counter_bytes, which are
// zero: a launch leaves them so, and launches that can run at the same time need counters of their own.
cudaError_t pq_cuda_attn(const pq_attn_params & p, const pq_cuda_attn_plan & plan, void * scratch, void * counters, cudaStream_t stream);

// Rotary position embedding (RoPE, arXiv 2104.09864; YaRN, arXiv 2309.00071) that a step applies to its queries and to its new rows of K, all
// elements of them. Pair i of a row at position x is turned by x * theta_scale^i; the numbers are those of ggml's GGML_OP_ROPE.
struct pq_cuda_rope {
    int32_t q, k;                 // whether queries are turned, whether new rows of K are
    int32_t neox;                 // a pair is elements i, i + D/2; otherwise 2i, 2i + 1
    const int32_t * pos;          // [n_stream * n_q]: of the tokens, in the order of the new rows
    const float   * freq_factors; // [D/2]; NULL: 1
    float theta_scale;            // frequency base ^ (-2 / D)
    float freq_scale;
    float ext_factor;             // 0: no YaRN
    float attn_factor;
    float corr_low, corr_high;    // YaRN's ramp, in pairs
};

// NULL, or why pq_cuda_step does not cover these parameters.
const char * pq_cuda_step_unsupported(const pq_attn_params & p, const pq_cuda_attn_plan & plan, const pq_encode_params * new_rows);

// A whole step in one launch: what pq_cuda_encode(new_rows, 2) and then pq_cuda_attn do, for new rows (K and V of the same tokens) that all
// have a slot in the exact tail that attention reads. `rope` (NULL: none) is applied to queries and rows on the way; there is one new row per query token
// then. `settled`: masks, positions, and all codes and tail rows but those of the new rows, were complete before the kernel ahead in the stream
// began, frequency factors too. They are then read while that one may still run. `dst_q8` (NULL: not wanted): the result once more, as a product with integers takes it, blocks of
// 32 elements (ggml's block_q8_1: f16 scale, f16 sum of the elements, int8 [32]); dst must be contiguous then.
cudaError_t pq_cuda_step(const pq_attn_params & p, const pq_cuda_attn_plan & plan, const pq_encode_params * new_rows, const pq_cuda_rope * rope,
                         bool settled, uint8_t * dst_q8, void * scratch, void * counters, cudaStream_t stream);

#define PQ_Q8_BLOCK_BYTES 36

// Reads the properties of the current device.
cudaError_t pq_cuda_get_device_props(pq_cuda_device_props * props);

// ---- encode ----

// Encodes the sides (K and V of one step, 1 or 2) in one launch; each side has its own parameters.
cudaError_t pq_cuda_encode(const pq_encode_params * sides, int n_sides, cudaStream_t stream);

// ---- decode ----

// Codes -> rows, to p.x (f32), or, when x_f16 is not NULL, to x_f16 (f16; the strides of p.x then hold for it).
cudaError_t pq_cuda_decode(const pq_decode_params & p, uint16_t * x_f16, cudaStream_t stream);

// What pq_cuda_decode_side::row_source has beside slots of the tail
#define PQ_ROW_CODES (-1) // the row is decoded
#define PQ_ROW_ZERO  (-2) // the row becomes zero; its codes are not read

// One side of a cache as f16 rows: most are decoded, some come from the exact tail.
struct pq_cuda_decode_side {
    pq_decode_params p;                 // n_rows rows by its strides; p.x is for x_f16 == NULL
    size_t           codes_head_stride; // bytes between the heads of a cell
    uint16_t       * x_f16;             // f16 [n_rows][n_head_kv][D], by the strides of p.x
    const int32_t  * row_source;        // [n_rows]: PQ_ROW_CODES, PQ_ROW_ZERO or a slot of the tail; NULL: all rows are decoded
    const uint8_t  * tail;              // f16 [slots][n_head_kv][D], by strides
    size_t           tail_row_stride;
    size_t           tail_head_stride;
};

// Fills the sides (K and V, 1 or 2), in one launch when they have the same type and head size.
cudaError_t pq_cuda_decode_rows(const pq_cuda_decode_side * sides, int n_sides, cudaStream_t stream);

// ---- prefill: what a flash attention of another library needs before and after it ----

// One stream of p, attended to in the space of codes: K and V are rows y, looked up and not mapped back, the queries are q_mapped, and no mu is
// counted. Rows of the exact tail take the places of their cells, and the mask has their columns in between.
struct pq_cuda_prefill_step {
    pq_attn_params   p;         // pointers are to the stream
    const uint16_t * cell_low;  // [p.tail.n]: the cell of a slot, 16 bits each, no two the same; negative: the slot is not in use; n_kv or more: it is ignored
    const uint16_t * cell_high;
    float          * q_mapped;  // [n_q][n_head][D]: T^-1 q
    uint16_t       * k_rows;    // f16 [n_head_kv][n_kv][D]
    uint16_t       * v_rows;
    uint8_t        * mask;      // p.mask, to be written
    uint16_t       * mask_kept; // [n_q][p.tail.n]
};

// NULL, or why this can't be done: a score needs all of its terms, there is nothing to map, or rows do not lie as the kernels want them.
const char * pq_cuda_prefill_unsupported(const pq_attn_params & p);

// Makes q_mapped, puts the rows and the mask of the tail to their cells, and looks up all other rows of K and V. new_rows (NULL: none): rows of K and of V to encode, which
// pq_cuda_encode would do before it; where there is a tail, each has a slot of it, or of another stream's. Many rows that become rows of the tail are encoded beside the
// lookups, which do not want their codes.
cudaError_t pq_cuda_prefill_begin(const pq_cuda_prefill_step & s, const pq_encode_params * new_rows, cudaStream_t stream);

// After attention: p.dst becomes rows of V again, and the mask what it was.
cudaError_t pq_cuda_prefill_end(const pq_cuda_prefill_step & s, cudaStream_t stream);
