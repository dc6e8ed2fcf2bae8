#include "pq-cuda.h"
#include "pq-decode-kernel.cuh"

#include <algorithm>

typedef void (*decode_kernel_t)(pq_decode_args);

template <int TYPE>
static decode_kernel_t choose_kernel(int D, bool has_transform) {
    if (!has_transform) {
        return pq_decode_plain_kernel<TYPE>;
    }
    return D <= 64 ? pq_decode_kernel<TYPE, 4> : D <= 128 ? pq_decode_kernel<TYPE, 8> : pq_decode_kernel<TYPE, 16>;
}

cudaError_t pq_cuda_decode(const pq_decode_params & p, uint16_t * x_f16, cudaStream_t stream) {
    if (!pq_head_size_ok(p.D)) {
        return cudaErrorInvalidValue;
    }
    if (p.n_rows == 0) {
        return cudaSuccess;
    }
    decode_kernel_t kernel;
    switch (p.type) {
        case PQ_TYPE_PQ4: kernel = choose_kernel<PQ_TYPE_PQ4>(p.D, p.has_transform); break;
        case PQ_TYPE_PQ3: kernel = choose_kernel<PQ_TYPE_PQ3>(p.D, p.has_transform); break;
        case PQ_TYPE_PQ2: kernel = choose_kernel<PQ_TYPE_PQ2>(p.D, p.has_transform); break;
        default:          return cudaErrorInvalidValue;
    }
    // rows are stored in pieces of 16 bytes; the codes of 8 elements are one load, but for pq3, whose 3 bytes lie anywhere
    const uintptr_t dst       = (uintptr_t) (x_f16 ? (void *) x_f16 : (void *) p.x) | p.x_row_stride | p.x_head_stride;
    const uintptr_t src       = (uintptr_t) p.codes | p.codes_row_stride;
    const uintptr_t src_align = p.type == PQ_TYPE_PQ4 ? 4 : p.type == PQ_TYPE_PQ2 ? 2 : 1;
    if (dst % 16 != 0 || src % src_align != 0) {
        return cudaErrorMisalignedAddress;
    }
    pq_cuda_device_props device;
    const cudaError_t err = pq_cuda_get_device_props(&device);
    if (err != cudaSuccess) {
        return err;
    }

    pq_decode_args a;
    a.p          = p;
    a.layout     = pq_get_codebook_layout(p.type, p.D, p.has_transform);
    a.head_bytes = pq_head_bytes(p.type, p.D);
    a.x_f16      = x_f16;

    const int    k_steps     = p.D <= 64 ? 4 : p.D <= 128 ? 8 : 16;
    const size_t tile_bytes  = p.has_transform ? PQ_DECODE_TILE_CELLS * (16 * k_steps + 8) * sizeof(uint16_t) : 0;
    const size_t table_bytes = (size_t) p.D * pq_get_spec(p.type).ksub * sizeof(uint16_t);
    a.table_in_smem = tile_bytes + table_bytes <= device.smem_optin;

    // two blocks per multiprocessor: one looks up while the other multiplies
    const int64_t n_tiles = (p.n_rows + PQ_DECODE_TILE_CELLS - 1) / PQ_DECODE_TILE_CELLS;
    const int64_t n_parts = std::min(n_tiles, std::max<int64_t>(1, (2 * device.n_sm + p.n_head_kv - 1) / p.n_head_kv));
    return pq_launch(kernel, dim3((unsigned) n_parts, (unsigned) p.n_head_kv), PQ_DECODE_THREADS,
                     tile_bytes + (a.table_in_smem ? table_bytes : 0), stream, a);
}
