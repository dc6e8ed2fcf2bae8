// Launches of the attention kernel for D = 128, one file per number of rows (pq-attn-128-rows*.cu) so that they compile side by side.
#pragma once

#include "pq-attn-128-kernel.cuh"
#include "pq-cuda.h"

namespace pq_attn {

template <int R>
cudaError_t launch_128(const args_128 & a, const code_maps & maps, const pq_cuda_attn_plan & plan, int n_blocks, cudaStream_t stream);

extern template cudaError_t launch_128<1>(const args_128 &, const code_maps &, const pq_cuda_attn_plan &, int, cudaStream_t);
extern template cudaError_t launch_128<4>(const args_128 &, const code_maps &, const pq_cuda_attn_plan &, int, cudaStream_t);
extern template cudaError_t launch_128<8>(const args_128 &, const code_maps &, const pq_cuda_attn_plan &, int, cudaStream_t);

} // namespace pq_attn
