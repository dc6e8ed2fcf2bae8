// PQ ops of the CUDA backend: turns ggml tensors into the parameter structs of kernels/pq-cuda.h.
#pragma once

#include "ggml-cuda/common.cuh"
#include "ggml-pq.h"

// Whether the device takes op, which has a PQ operand. Logs, once for each reason, why it does not: the scheduler would
// otherwise move op to the CPU without a word.
bool ggml_cuda_pq_supports_op(int device, const ggml_tensor * op);

// Does nothing and returns false for an op without PQ operands.
bool ggml_cuda_pq_compute_forward(ggml_backend_cuda_context & ctx, ggml_tensor * op);

// Encodes K and V of a layer in one launch when node i and the next one that computes write them. Returns the number of nodes
// after i that are thereby done; 0: nothing was done.
int ggml_cuda_pq_try_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i);
