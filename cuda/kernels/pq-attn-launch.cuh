// Chooses the compiled kernel of a plan.
#pragma once

#include "pq-attn-128.cuh"
#include "pq-attn-general.cuh"
#include "pq-attn.cuh"

namespace pq_attn {

template <int L, int R, bool TWO_PHASES>
cudaError_t launch_general(const args & a, const pq_cuda_attn_plan & plan, cudaStream_t stream) {
    return pq_launch(general_kernel<ANY_TYPE, ANY_TYPE, L, R, TWO_PHASES>, plan.n_blocks, plan.n_threads, plan.smem_bytes, stream, a);
}

template <int KT, int R>
cudaError_t launch_128(const args & a, const pq_cuda_attn_plan & plan, cudaStream_t stream) {
    switch (a.p.v.type) {
        case PQ_TYPE_PQ4: return pq_launch(kernel_128<KT, PQ_TYPE_PQ4, R>, plan.n_blocks, plan.n_threads, plan.smem_bytes, stream, a);
        case PQ_TYPE_PQ3: return pq_launch(kernel_128<KT, PQ_TYPE_PQ3, R>, plan.n_blocks, plan.n_threads, plan.smem_bytes, stream, a);
        case PQ_TYPE_PQ2: return pq_launch(kernel_128<KT, PQ_TYPE_PQ2, R>, plan.n_blocks, plan.n_threads, plan.smem_bytes, stream, a);
        default:          return cudaErrorInvalidValue;
    }
}

template <int R>
cudaError_t launch(const args & a, const pq_cuda_attn_plan & plan, cudaStream_t stream) {
    if (plan.kernel == PQ_CUDA_ATTN_128) {
        switch (a.p.k.type) {
            case PQ_TYPE_PQ4: return launch_128<PQ_TYPE_PQ4, R>(a, plan, stream);
            case PQ_TYPE_PQ3: return launch_128<PQ_TYPE_PQ3, R>(a, plan, stream);
            case PQ_TYPE_PQ2: return launch_128<PQ_TYPE_PQ2, R>(a, plan, stream);
            default:          return cudaErrorInvalidValue;
        }
    }
    const bool two_phases = plan.kernel == PQ_CUDA_ATTN_TWO_PHASES;
    switch (plan.lanes) {
        case 8:  return launch_general<8, R, false>(a, plan, stream);
        case 16: return two_phases ? launch_general<16, R, true>(a, plan, stream) : launch_general<16, R, false>(a, plan, stream);
        case 32: return two_phases ? launch_general<32, R, true>(a, plan, stream) : launch_general<32, R, false>(a, plan, stream);
        default: return cudaErrorInvalidValue;
    }
}

} // namespace pq_attn
