// PQ ops of the CPU backend: turns ggml tensors into the parameter structs of pq/pq-params.h.
#pragma once

#include "ggml-cpu-impl.h"
#include "ggml-pq.h"

#ifdef __cplusplus
extern "C" {
#endif

// Whether the kernels take op, which has a PQ operand.
bool ggml_cpu_pq_supports_op(const struct ggml_tensor * op);

// Both return false, and do nothing, for an op without PQ operands.
bool ggml_cpu_pq_work_size(int n_threads, const struct ggml_tensor * op, size_t * size);
bool ggml_cpu_pq_compute_forward(struct ggml_compute_params * params, struct ggml_tensor * op);

#ifdef __cplusplus
}
#endif
