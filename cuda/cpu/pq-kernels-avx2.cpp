// The kernels for AVX2, FMA and F16C. Compiled without those flags, the file offers no kernels.
#if defined(__AVX2__)

#define PQ_VEC        pq_vec8
#define PQ_TABLE_NAME "avx2"
#include "pq-kernels-impl.h"

const pq_kernels * pq_kernels_avx2(void) {
    return &table;
}

#else

#include "pq-kernels.h"

const pq_kernels * pq_kernels_avx2(void) {
    return NULL;
}

#endif
