// Launches of the attention kernel, one file per number of rows (pq-attn-rows*.cu) so that they compile side by side.
#pragma once

#include "pq-attn-kernel.cuh"
#include "pq-cuda.h"

namespace pq_attn {

// The types that the kernel of these parameters is compiled for: equal ones have kernels of their own at the common head sizes; the
// others share one that looks at the types once per tile. Of two phases there is only that one.
inline int kernel_type(const pq_attn_params & p, int lanes) {
    return p.k.type == p.v.type && lanes < 32 ? (int) p.k.type : ANY_TYPE;
}

template <int R>
cudaError_t launch(const args & a, const pq_cuda_attn_plan & plan, cudaStream_t stream);

extern template cudaError_t launch<1>(const args &, const pq_cuda_attn_plan &, cudaStream_t);
extern template cudaError_t launch<4>(const args &, const pq_cuda_attn_plan &, cudaStream_t);
extern template cudaError_t launch<8>(const args &, const pq_cuda_attn_plan &, cudaStream_t);

} // namespace pq_attn
