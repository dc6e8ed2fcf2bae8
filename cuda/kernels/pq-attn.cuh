// Launches of the attention kernel, one file per number of rows (pq-attn-rows*.cu) so that they compile side by side.
#pragma once

#include "pq-attn-block.cuh"
#include "pq-cuda.h"

namespace pq_attn {

// Whether these parameters take the kernel for D = 128 with codes on both sides (where its tables fit into shared memory together).
inline bool takes_kernel_128(const pq_attn_params & p) {
    for (const pq_attn_side * s : { &p.k, &p.v }) {
        // a lane loads 16 bytes of a pq4 K, 8 of pq2; four lanes of pq3 V share three words
        if (s->D != 128 || s->type >= PQ_TYPE_COUNT || ((uintptr_t) s->data | s->row_stride | s->head_stride | s->stream_stride) % 16 != 0) {
            return false;
        }
    }
    return true;
}

template <int R>
cudaError_t launch(const args & a, const pq_cuda_attn_plan & plan, cudaStream_t stream);

extern template cudaError_t launch<1>(const args &, const pq_cuda_attn_plan &, cudaStream_t);
extern template cudaError_t launch<4>(const args &, const pq_cuda_attn_plan &, cudaStream_t);
extern template cudaError_t launch<8>(const args &, const pq_cuda_attn_plan &, cudaStream_t);

} // namespace pq_attn
