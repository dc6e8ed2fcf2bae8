// The kernels in plain C++: what runs where there is nothing better, and what the other instruction sets are tested against.
#define PQ_SCALAR
#define PQ_VEC        pq_vec8
#define PQ_TABLE_NAME "scalar"
#include "pq-kernels-impl.h"

const pq_kernels * pq_kernels_scalar(void) {
    return &table;
}
