// Attention on PQ codes for many query tokens: codes to f16, then the backend's own flash attention.
#pragma once

#include "ggml-cuda/common.cuh"
#include "ggml-pq.h"
#include "pq-params.h"

// `p` is what ggml_pq_attn_params makes of op, a FLASH_ATTN_EXT.
bool ggml_cuda_pq_prefill_supported(int device, const ggml_tensor * op, const pq_attn_params & p);

// settled: masks were complete before the kernel ahead in the stream began. new_rows (NULL: none): rows of K and of V to encode first, which attention reads from the exact tail,
// if there is one.
void ggml_cuda_pq_prefill(ggml_backend_cuda_context & ctx, const ggml_tensor * op, const pq_attn_params & p, bool settled, const pq_encode_params * new_rows);
