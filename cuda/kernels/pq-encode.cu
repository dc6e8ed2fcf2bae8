#include "pq-cuda.h"
#include "pq-encode-kernel.cuh"

#include <algorithm>

static cudaError_t launch_tile(const pq_encode_sides & sides, int n_heads, int n_strips, int64_t n_rows, cudaStream_t stream) {
    const dim3 grid(n_heads, n_strips, (unsigned) ((n_rows + PQ_ENCODE_TILE_ROWS - 1) / PQ_ENCODE_TILE_ROWS));
    switch (sides.side[0].p.type) {
        case PQ_TYPE_PQ4: return pq_launch(pq_encode_tile_kernel<PQ_TYPE_PQ4>, grid, PQ_ENCODE_THREADS, 0, stream, sides);
        case PQ_TYPE_PQ3: return pq_launch(pq_encode_tile_kernel<PQ_TYPE_PQ3>, grid, PQ_ENCODE_THREADS, 0, stream, sides);
        case PQ_TYPE_PQ2: return pq_launch(pq_encode_tile_kernel<PQ_TYPE_PQ2>, grid, PQ_ENCODE_THREADS, 0, stream, sides);
        default:          return cudaErrorInvalidValue;
    }
}

cudaError_t pq_cuda_encode(const pq_encode_params * params, int n_sides, cudaStream_t stream) {
    if (n_sides < 1 || n_sides > 2) {
        return cudaErrorInvalidValue;
    }
    pq_encode_sides sides = {};
    int     n_heads = 0;
    int     max_D   = 0;
    int64_t n_rows  = 0;
    for (int i = 0; i < n_sides; i++) {
        if (!pq_head_size_ok(params[i].D) || params[i].type >= PQ_TYPE_COUNT) {
            return cudaErrorInvalidValue;
        }
        sides.side[i].p          = params[i];
        sides.side[i].layout     = pq_get_codebook_layout(params[i].type, params[i].D, params[i].has_transform);
        sides.side[i].head_bytes = pq_head_bytes(params[i].type, params[i].D);
        n_heads += params[i].n_head_kv;
        max_D    = std::max(max_D, (int) params[i].D);
        n_rows   = std::max(n_rows, params[i].n_rows);
    }
    if (n_rows == 0) {
        return cudaSuccess;
    }
    const int n_strips = (max_D + PQ_ENCODE_STRIP - 1) / PQ_ENCODE_STRIP;

    // The tile kernel keeps a fourth of its rows busy at 32 rows, and reads the codebook once for 128.
    if (n_rows <= 32) {
        const dim3 grid(n_heads, n_strips, (unsigned) ((n_rows + PQ_ENCODE_FEW_ROWS - 1) / PQ_ENCODE_FEW_ROWS));
        return pq_launch(pq_encode_few_kernel, grid, PQ_ENCODE_THREADS, 0, stream, sides);
    }
    if (n_sides == 2 && params[0].type != params[1].type) { // compiled per type, to keep its registers few
        const cudaError_t err = pq_cuda_encode(params, 1, stream);
        return err != cudaSuccess ? err : pq_cuda_encode(params + 1, 1, stream);
    }
    return launch_tile(sides, n_heads, n_strips, n_rows, stream);
}
