// PQ ops of the CUDA backend: turns ggml tensors into the parameter structs of kernels/pq-cuda.h.
#pragma once

#include "ggml-cuda/common.cuh"
#include "ggml-backend-impl.h"
#include "ggml-pq.h"

// Whether the device takes op, which has a PQ operand. Logs, once for each reason, why it does not: the scheduler would
// otherwise move op to the CPU without a word.
bool ggml_cuda_pq_supports_op(int device, const ggml_tensor * op);

// Returns false, and does nothing, for an op without PQ operands. A rope that a later step does (below) is passed over.
bool ggml_cuda_pq_compute_forward(ggml_backend_cuda_context & ctx, ggml_tensor * op);

// Asks that what a launch of several nodes reads stays allocated until the last of them.
void ggml_cuda_pq_add_alloc_deps(ggml_cgraph * cgraph, ggml_backend_graph_optimize_params * params);

// Does together what node i and those after it ask for: the writes of K and V of a layer, and their attention where it follows; for a few tokens in one launch, and with the
// rotary embedding of K and queries, which comes earlier. Returns the number of nodes after i that are thereby done; 0: nothing was done.
int ggml_cuda_pq_try_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i);

// The rows of `src1` as blocks of block_q8_1, when it is the result of such a launch and they came with it; otherwise NULL.
const void * ggml_cuda_pq_get_q8_1(const ggml_backend_cuda_context & ctx, const ggml_tensor * src1);

// For a product that reads matrices once: lets them leave L2 first. They would otherwise drive out what the next kernels begin with: their code, activations, codebooks.
// b: a second matrix of the same product; NULL: none
void ggml_cuda_pq_pass_through_l2(ggml_backend_cuda_context & ctx, const ggml_tensor * a, const ggml_tensor * b);
