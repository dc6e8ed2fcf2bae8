// Chooses the compiled kernel of a pair of types.
#pragma once

#include "pq-attn-128.cuh"

namespace pq_attn {

template <int KT, int R>
cudaError_t launch_128_v(const args_128 & a, const code_maps & maps, const pq_cuda_attn_plan & plan, int n_blocks, cudaStream_t stream) {
    switch (a.p.v.type) {
        case PQ_TYPE_PQ4: return pq_launch(attn_128_kernel<KT, PQ_TYPE_PQ4, R>, n_blocks, plan.n_threads, plan.smem_bytes, stream, a, maps);
        case PQ_TYPE_PQ3: return pq_launch(attn_128_kernel<KT, PQ_TYPE_PQ3, R>, n_blocks, plan.n_threads, plan.smem_bytes, stream, a, maps);
        case PQ_TYPE_PQ2: return pq_launch(attn_128_kernel<KT, PQ_TYPE_PQ2, R>, n_blocks, plan.n_threads, plan.smem_bytes, stream, a, maps);
        default:          return cudaErrorInvalidValue;
    }
}

template <int R>
cudaError_t launch_128(const args_128 & a, const code_maps & maps, const pq_cuda_attn_plan & plan, int n_blocks, cudaStream_t stream) {
    switch (a.p.k.type) {
        case PQ_TYPE_PQ4: return launch_128_v<PQ_TYPE_PQ4, R>(a, maps, plan, n_blocks, stream);
        case PQ_TYPE_PQ3: return launch_128_v<PQ_TYPE_PQ3, R>(a, maps, plan, n_blocks, stream);
        case PQ_TYPE_PQ2: return launch_128_v<PQ_TYPE_PQ2, R>(a, maps, plan, n_blocks, stream);
        default:          return cudaErrorInvalidValue;
    }
}

} // namespace pq_attn
