#include "pq-cuda.h"
#include "pq-decode-kernel.cuh"

#include <algorithm>

typedef void (*decode_kernel_t)(pq_decode_args);

struct decode_shape {
    decode_kernel_t kernel;
    int             n_col_parts;
    int             n_cols;      // of a part, a multiple of 32
    size_t          fixed_bytes; // of shared memory, beside the table
    int64_t         tile_rows;   // rows that are taken at a time
    int64_t         max_per_sm;  // blocks
};

// codes: pointers and strides of the codes of all sides, or-ed
template <int TYPE, int U>
static decode_shape get_shape(int D, bool f16, uintptr_t codes) {
    const int  n_col_parts = U == 8 ? 2 : 1; // T^-1 of more than 128 columns does not fit beside the table
    const bool full        = D == 32 * U && f16 && codes % pq_decode_codes_align<TYPE, U>() == 0;
    return { full ? pq_decode_kernel<TYPE, U, true> : pq_decode_kernel<TYPE, U, false>, n_col_parts,
             ((D + n_col_parts - 1) / n_col_parts + 31) / 32 * 32, pq_decode_smem_layout<U>::T_BYTES + pq_decode_smem_layout<U>::MU_BYTES,
             PQ_DECODE_ROWS, n_col_parts > 1 ? 1 : 2 };
}

template <int TYPE>
static decode_shape get_shape(int D, bool has_transform, bool f16, uintptr_t codes) {
    if (!has_transform) {
        return { pq_decode_plain_kernel<TYPE>, 1, D, 0, 1, 2 };
    }
    return D <= 64  ? get_shape<TYPE, 2>(D, f16, codes) :
           D <= 128 ? get_shape<TYPE, 4>(D, f16, codes) :
                      get_shape<TYPE, 8>(D, f16, codes);
}

static cudaError_t check(const pq_cuda_decode_side & s) {
    if (!pq_head_size_ok(s.p.D) || s.p.type >= PQ_TYPE_COUNT || (s.row_source && !s.x_f16)) {
        return cudaErrorInvalidValue;
    }
    // rows are stored in pieces of 16 bytes; the codes of 8 elements are one load, but for pq3, whose codes lie anywhere
    const uintptr_t dst       = (uintptr_t) (s.x_f16 ? (void *) s.x_f16 : (void *) s.p.x) | s.p.x_row_stride | s.p.x_head_stride;
    const uintptr_t tail      = s.row_source ? (uintptr_t) s.tail | s.tail_row_stride | s.tail_head_stride : 0;
    const uintptr_t src       = (uintptr_t) s.p.codes | s.p.codes_row_stride | s.codes_head_stride;
    const uintptr_t src_align = s.p.type == PQ_TYPE_PQ4 ? 4 : s.p.type == PQ_TYPE_PQ2 ? 2 : 1;
    return dst % 16 != 0 || tail % 16 != 0 || src % src_align != 0 ? cudaErrorMisalignedAddress : cudaSuccess;
}

cudaError_t pq_cuda_decode_rows(const pq_cuda_decode_side * sides, int n_sides, cudaStream_t stream) {
    if (n_sides < 1 || n_sides > 2) {
        return cudaErrorInvalidValue;
    }
    const pq_decode_params & p = sides[0].p;
    if (n_sides == 2 && (p.type != sides[1].p.type || p.D != sides[1].p.D || p.has_transform != sides[1].p.has_transform)) {
        const cudaError_t err = pq_cuda_decode_rows(sides, 1, stream);
        return err != cudaSuccess ? err : pq_cuda_decode_rows(sides + 1, 1, stream);
    }
    pq_decode_args a      = {};
    int            n_heads = 0;
    int64_t        n_rows  = 0;
    bool           f16     = true;
    uintptr_t      codes   = 0;
    for (int i = 0; i < n_sides; i++) {
        const cudaError_t err = check(sides[i]);
        if (err != cudaSuccess) {
            return err;
        }
        a.side[i].s      = sides[i];
        a.side[i].layout = pq_get_codebook_layout(p.D, p.has_transform);
        f16      = f16 && sides[i].x_f16;
        codes   |= (uintptr_t) sides[i].p.codes | sides[i].p.codes_row_stride | sides[i].codes_head_stride;
        n_heads += sides[i].p.n_head_kv;
        n_rows   = std::max(n_rows, sides[i].p.n_rows);
    }
    if (n_rows == 0) {
        return cudaSuccess;
    }
    if (n_rows > INT32_MAX / 2) {
        return cudaErrorInvalidValue;
    }
    pq_cuda_device_props device;
    const cudaError_t err = pq_cuda_get_device_props(&device);
    if (err != cudaSuccess) {
        return err;
    }
    const decode_shape shape =
        p.type == PQ_TYPE_PQ4 ? get_shape<PQ_TYPE_PQ4>(p.D, p.has_transform, f16, codes) :
        p.type == PQ_TYPE_PQ3 ? get_shape<PQ_TYPE_PQ3>(p.D, p.has_transform, f16, codes) :
                                get_shape<PQ_TYPE_PQ2>(p.D, p.has_transform, f16, codes);
    const size_t table_bytes = (size_t) p.D * PQ_KSUB * sizeof(uint16_t);
    a.n_cols        = shape.n_cols;
    a.table_in_smem = shape.fixed_bytes + table_bytes <= device.smem_optin;
    const size_t smem_bytes = shape.fixed_bytes + (a.table_in_smem ? table_bytes : 0);

    // All blocks run at once: one more would start when the others have ended. 1024: what a block takes by itself.
    const int64_t per_sm  = std::max<int64_t>(1, std::min<int64_t>(shape.max_per_sm, (device.smem_optin + 1024) / (smem_bytes + 1024)));
    const int64_t n_tiles = (n_rows + shape.tile_rows - 1) / shape.tile_rows;
    const int64_t n_parts = std::min(n_tiles, std::max<int64_t>(1, per_sm * device.n_sm / (n_heads * shape.n_col_parts)));
    return pq_launch(shape.kernel, dim3((unsigned) n_parts, (unsigned) n_heads, (unsigned) shape.n_col_parts), PQ_DECODE_THREADS, smem_bytes,
                     stream, a);
}

cudaError_t pq_cuda_decode(const pq_decode_params & p, uint16_t * x_f16, cudaStream_t stream) {
    pq_cuda_decode_side side = {};
    side.p                 = p;
    side.codes_head_stride = pq_head_bytes(p.type, p.D);
    side.x_f16             = x_f16;
    return pq_cuda_decode_rows(&side, 1, stream);
}
