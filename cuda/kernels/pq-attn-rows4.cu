#include "pq-attn-launch.cuh"

template cudaError_t pq_attn::launch<4>(const args &, const pq_cuda_attn_plan &, cudaStream_t);
