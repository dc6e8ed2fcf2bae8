// Chooses the compiled kernel of a plan.
#pragma once

#include "pq-attn.cuh"

namespace pq_attn {

template <int KT, int VT, int L, int R, bool TWO_PHASES>
cudaError_t launch_kernel(const args & a, const pq_cuda_attn_plan & plan, cudaStream_t stream) {
    return pq_launch(attn_kernel<KT, VT, L, R, TWO_PHASES>, plan.n_blocks, plan.n_threads, plan.smem_bytes, stream, a);
}

template <int R>
cudaError_t launch(const args & a, const pq_cuda_attn_plan & plan, cudaStream_t stream) {
    if (plan.kernel == PQ_CUDA_ATTN_TWO_PHASES) {
        switch (plan.lanes) {
            case 16: return launch_kernel<ANY_TYPE, ANY_TYPE, 16, R, true>(a, plan, stream);
            case 32: return launch_kernel<ANY_TYPE, ANY_TYPE, 32, R, true>(a, plan, stream);
            default: return cudaErrorInvalidValue;
        }
    }
    switch (kernel_type(a.p, plan.lanes)) {
        case PQ_TYPE_PQ4: return plan.lanes == 8  ? launch_kernel<PQ_TYPE_PQ4, PQ_TYPE_PQ4,  8, R, false>(a, plan, stream)
                                                  : launch_kernel<PQ_TYPE_PQ4, PQ_TYPE_PQ4, 16, R, false>(a, plan, stream);
        case PQ_TYPE_PQ3: return plan.lanes == 8  ? launch_kernel<PQ_TYPE_PQ3, PQ_TYPE_PQ3,  8, R, false>(a, plan, stream)
                                                  : launch_kernel<PQ_TYPE_PQ3, PQ_TYPE_PQ3, 16, R, false>(a, plan, stream);
        case PQ_TYPE_PQ2: return plan.lanes == 8  ? launch_kernel<PQ_TYPE_PQ2, PQ_TYPE_PQ2,  8, R, false>(a, plan, stream)
                                                  : launch_kernel<PQ_TYPE_PQ2, PQ_TYPE_PQ2, 16, R, false>(a, plan, stream);
        default:          break;
    }
    switch (plan.lanes) {
        case 8:  return launch_kernel<ANY_TYPE, ANY_TYPE,  8, R, false>(a, plan, stream);
        case 16: return launch_kernel<ANY_TYPE, ANY_TYPE, 16, R, false>(a, plan, stream);
        case 32: return launch_kernel<ANY_TYPE, ANY_TYPE, 32, R, false>(a, plan, stream);
        default: return cudaErrorInvalidValue;
    }
}

} // namespace pq_attn
