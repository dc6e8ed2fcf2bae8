// Tensor-core instructions of the encode and decode kernels. With g = lane / 4, t = lane % 4 a lane holds
//   A [16][8 or 16]: a[0] = A[g][2t, 2t+1], a[1] = A[g+8][2t, 2t+1], a[2] = A[g][2t+8, 2t+9], a[3] = A[g+8][2t+8, 2t+9]
//   B [8 or 16][8]:  b0 = B[2t, 2t+1][g], b1 = B[2t+8, 2t+9][g]
//   C [16][8]:       c[0], c[1] = C[g][2t, 2t+1], c[2], c[3] = C[g+8][2t, 2t+1]
// A and B are halves, two in a register; sums are floats.
#pragma once

#include <cuda_fp16.h>

#include <stdint.h>

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define PQ_ASM_SM80(...) asm volatile(__VA_ARGS__)
#else
#define PQ_ASM_SM80(...) // older devices never get here: the kernels are launched from 8.0 on
#endif

// Four 8 x 8 matrices of halves; lanes 8i to 8i + 7 give the rows of matrix i. `trans` transposes each.
static __device__ __forceinline__ void pq_ldmatrix(uint32_t (&a)[4], const __half * row) {
    const unsigned s = (unsigned) __cvta_generic_to_shared(row);
    PQ_ASM_SM80("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(s) : "memory");
}

static __device__ __forceinline__ void pq_ldmatrix_trans(uint32_t (&a)[4], const __half * row) {
    const unsigned s = (unsigned) __cvta_generic_to_shared(row);
    PQ_ASM_SM80("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(s) : "memory");
}

// d = c + A B
static __device__ __forceinline__ void pq_mma_k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
    PQ_ASM_SM80("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
                : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

static __device__ __forceinline__ void pq_mma_k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0, const float (&c)[4]) {
    PQ_ASM_SM80("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
                : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                : "r"(a0), "r"(a1), "r"(b0), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

static __device__ __forceinline__ void pq_cp_async(void * smem, const void * global) { // 16 bytes
    const unsigned s = (unsigned) __cvta_generic_to_shared(smem);
    PQ_ASM_SM80("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(s), "l"(global) : "memory");
}

static __device__ __forceinline__ void pq_cp_async_wait() {
    PQ_ASM_SM80("cp.async.wait_all;" ::: "memory");
}
