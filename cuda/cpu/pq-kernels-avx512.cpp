// The kernels for AVX-512 (F, BW, VL, DQ, VBMI). Compiled without those flags, the file offers no kernels.
#if defined(__AVX512F__)

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // false alarms inside GCC's own header (its bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define PQ_VEC        pq_vec16
#define PQ_TABLE_NAME "avx512"
#include "pq-kernels-impl.h"

const pq_kernels * pq_kernels_avx512(void) {
    return &table;
}

#else

#include "pq-kernels.h"

const pq_kernels * pq_kernels_avx512(void) {
    return NULL;
}

#endif
