#include "pq-encode.cuh"
#include "pq-encode-kernel.cuh"

#include <algorithm>

// The tile kernel works in tiles of 64 or 128 rows: up to here it would mostly idle.
static constexpr int64_t MAX_FEW_ROWS = 32;

template <int D_STEPS>
static cudaError_t launch_tile(const pq_encode_sides & sides, int n_heads, int n_strips, int64_t n_rows, bool settled, int n_sm, cudaStream_t stream) {
    typedef pq_encode_tile_smem<D_STEPS> smem;
    // Two blocks per multiprocessor, all at once: one more would start when the others have ended. A block that takes several tiles
    // loads its part of the codebook once.
    const int64_t n_tiles = (n_rows + smem::ROWS - 1) / smem::ROWS;
    const int64_t n_parts = std::min<int64_t>(n_tiles, std::max(1, 2 * n_sm / (n_heads * n_strips)));
    const dim3 grid(n_strips, (unsigned) n_parts, n_heads);
    switch (sides.side[0].p.type) {
        case PQ_TYPE_PQ4: return pq_launch(pq_encode_tile_kernel<PQ_TYPE_PQ4, D_STEPS>, grid, PQ_ENCODE_THREADS, sizeof(smem), stream, sides, settled);
        case PQ_TYPE_PQ3: return pq_launch(pq_encode_tile_kernel<PQ_TYPE_PQ3, D_STEPS>, grid, PQ_ENCODE_THREADS, sizeof(smem), stream, sides, settled);
        case PQ_TYPE_PQ2: return pq_launch(pq_encode_tile_kernel<PQ_TYPE_PQ2, D_STEPS>, grid, PQ_ENCODE_THREADS, sizeof(smem), stream, sides, settled);
        default:          return cudaErrorInvalidValue;
    }
}

// Rows can be loaded and stored 16 bytes at a time, as the tile kernel does.
static bool wide_ok(const pq_encode_params & p) {
    return ((uintptr_t) p.x | p.x_row_stride | p.x_head_stride | (uintptr_t) p.tail | p.tail_row_stride) % 16 == 0;
}

bool pq_encodes_tiles(const pq_encode_params * params, int n_sides) {
    int64_t n_rows = 0;
    for (int i = 0; i < n_sides; i++) {
        n_rows = std::max(n_rows, params[i].n_rows);
        if (!wide_ok(params[i])) {
            return false;
        }
    }
    return n_rows > MAX_FEW_ROWS;
}

cudaError_t pq_cuda_encode(const pq_encode_params * params, int n_sides, cudaStream_t stream) {
    return pq_encode(params, n_sides, false, stream);
}

cudaError_t pq_encode(const pq_encode_params * params, int n_sides, bool settled, cudaStream_t stream) {
    if (n_sides < 1 || n_sides > 2) {
        return cudaErrorInvalidValue;
    }
    const pq_encode_sides sides = pq_make_encode_sides(params, n_sides);
    int     n_heads = 0;
    int     max_D   = 0;
    int64_t n_rows  = 0;
    for (int i = 0; i < n_sides; i++) {
        if (!pq_head_size_ok(params[i].D) || params[i].type >= PQ_TYPE_COUNT) {
            return cudaErrorInvalidValue;
        }
        n_heads += params[i].n_head_kv;
        max_D    = std::max(max_D, (int) params[i].D);
        n_rows   = std::max(n_rows, params[i].n_rows);
    }
    if (n_rows == 0) {
        return cudaSuccess;
    }
    const int n_strips = (max_D + PQ_ENCODE_STRIP - 1) / PQ_ENCODE_STRIP;

    int device = 0, n_sm = 0;
    cudaError_t err = cudaGetDevice(&device);
    if (err == cudaSuccess) {
        err = cudaDeviceGetAttribute(&n_sm, cudaDevAttrMultiProcessorCount, device);
    }
    if (err != cudaSuccess) {
        return err;
    }
    if (!pq_encodes_tiles(params, n_sides)) { // rows of a block are searched for one after the other: no more of them than it takes for two blocks on every multiprocessor
        const int64_t n_parts  = std::max<int64_t>(1, 2 * n_sm / (n_heads * n_strips));
        const int64_t max_rows = std::min<int64_t>((n_rows + n_parts - 1) / n_parts, PQ_ENCODE_FEW_ROWS);
        const dim3 grid(n_heads, n_strips, (unsigned) ((n_rows + max_rows - 1) / max_rows));
        return pq_launch(pq_encode_few_kernel, grid, PQ_ENCODE_FEW_THREADS, 0, stream, sides, (int) max_rows);
    }
    if (n_sides == 2 && params[0].type != params[1].type) { // the tile kernel is compiled per type, to keep its registers few
        err = pq_encode(params, 1, settled, stream);
        return err != cudaSuccess ? err : pq_encode(params + 1, 1, settled, stream);
    }
    return max_D <= 64  ? launch_tile<4> (sides, n_heads, n_strips, n_rows, settled, n_sm, stream) :
           max_D <= 128 ? launch_tile<8> (sides, n_heads, n_strips, n_rows, settled, n_sm, stream) :
                          launch_tile<16>(sides, n_heads, n_strips, n_rows, settled, n_sm, stream);
}
