#include "pq-attn-128-launch.cuh"

template cudaError_t pq_attn::launch_128<1>(const args_128 &, const code_maps &, const pq_cuda_attn_plan &, int, cudaStream_t);
