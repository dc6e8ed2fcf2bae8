// Device helpers of the attention kernels: thin wrappers around instructions, nothing that knows what a cache is.
#pragma once

#include <cuda.h> // CUtensorMap
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdint.h>

#if CUDART_VERSION < 12000
#error "the PQ kernels need CUDA 12.0 or later, for copies of boxes (CUtensorMap): install a newer toolkit, or build without -DGGML_CUDA=ON"
#endif

#define PQ_DEVICE static __device__ __forceinline__

constexpr int PQ_WARP = 32;

#define PQ_FULL_WARP 0xffffffffu

// Codes and rows of the cache are read once by a block: they need no room in L1. `volatile` keeps a load where it was written, ahead
// of the work that hides it.
PQ_DEVICE uint32_t pq_load_stream_u32(const uint8_t * p) {
    uint32_t x;
    asm volatile("ld.global.nc.L1::no_allocate.b32 %0, [%1];" : "=r"(x) : "l"(p));
    return x;
}

PQ_DEVICE uint32_t pq_load_stream_u16(const uint8_t * p) {
    uint32_t x; // a 32-bit register: joining halves would wait for the load
    asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=r"(x) : "l"(p));
    return x;
}

PQ_DEVICE uint32_t pq_load_u16(const uint16_t * p) {
    uint32_t x;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=r"(x) : "l"(p));
    return x;
}

PQ_DEVICE uint32_t pq_load_u32(const uint16_t * p) {
    uint32_t x;
    asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(x) : "l"(p));
    return x;
}

PQ_DEVICE uint4 pq_load_u128(const uint8_t * p) {
    uint4 x;
    asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
    return x;
}

// p + a * b in one instruction; the compiler makes two of it
PQ_DEVICE const uint8_t * pq_mad_wide(uint32_t a, uint32_t b, const uint8_t * p) {
    const uint8_t * x;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(x) : "r"(a), "r"(b), "l"(p));
    return x;
}

PQ_DEVICE uint4 pq_load_stream_u128(const uint8_t * p) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
    return x;
}

// The same for rows that this kernel may have written: the path for data that never changes must not be used.
PQ_DEVICE uint4 pq_load_row_u128(const uint8_t * p) {
    uint4 x;
    asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p) : "memory");
    return x;
}

PQ_DEVICE uint2 pq_load_row_u64(const uint8_t * p) {
    uint2 x;
    asm volatile("ld.global.L1::no_allocate.v2.b32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(p) : "memory");
    return x;
}

PQ_DEVICE void pq_prefetch_l2(const uint8_t * p) {
    asm volatile("prefetch.global.L2 [%0];" : : "l"(p));
}

// Counts an arrival; returns how many there were before. What the thread has written, or has seen written, is seen by who arrives later. Lighter than
// __threadfence(), which orders everything with everything.
PQ_DEVICE uint32_t pq_arrive(uint32_t * counter) {
    uint32_t x;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(x) : "l"(counter) : "memory");
    return x;
}

// Division without the slow instruction sequence of a division: exact where the product of both numbers is below 2^32.
struct small_divisor {
    uint32_t d, inverse; // ceil(2^32 / d); d 1: not used

    small_divisor() = default;
    explicit small_divisor(uint32_t d) : d(d), inverse((uint32_t) (((1ull << 32) + d - 1) / d)) {}

    // Leaves the quotient in x, returns the remainder.
    __device__ __forceinline__ int split(uint32_t & x) const {
        const uint32_t q = d == 1 ? x : __umulhi(x, inverse);
        const uint32_t r = x - q * d;
        x = q;
        return (int) r;
    }
};

// ---- shared memory ----

// Dynamic shared memory begins at 0, and from 9.0 on after the 1 KB that the system keeps, in a kernel without static
// shared memory. With the address known at compile time a table lookup needs no addition; kernels that use it check it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr uint32_t PQ_SHARED_BASE = 0;
#else
constexpr uint32_t PQ_SHARED_BASE = 1024;
#endif

template <uint32_t OFFSET /* in dynamic shared memory */>
PQ_DEVICE uint32_t pq_load_shared_u32(uint32_t address) {
    uint32_t x;
    asm volatile("ld.shared.b32 %0, [%1+%2];" : "=r"(x) : "r"(address), "n"(PQ_SHARED_BASE + OFFSET));
    return x;
}

template <uint32_t OFFSET>
PQ_DEVICE uint2 pq_load_shared_u64(uint32_t address) {
    uint2 x;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2+%3];" : "=r"(x.x), "=r"(x.y) : "r"(address), "n"(PQ_SHARED_BASE + OFFSET));
    return x;
}

// By absolute addresses.
PQ_DEVICE uint32_t pq_shared_u8(uint32_t address) {
    uint32_t x;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(x) : "r"(address));
    return x;
}

PQ_DEVICE uint32_t pq_shared_u16(uint32_t address) {
    uint32_t x;
    asm volatile("ld.shared.u16 %0, [%1];" : "=r"(x) : "r"(address));
    return x;
}

PQ_DEVICE uint32_t pq_shared_u32(uint32_t address) {
    uint32_t x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address));
    return x;
}

PQ_DEVICE uint2 pq_shared_u64(uint32_t address) {
    uint2 x;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(address));
    return x;
}

PQ_DEVICE uint4 pq_shared_u128(uint32_t address) {
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address));
    return x;
}

PQ_DEVICE void pq_store_shared_u16(uint32_t address, uint16_t x) {
    asm volatile("st.shared.b16 [%0], %1;" : : "r"(address), "h"(x) : "memory");
}

PQ_DEVICE void pq_store_shared_u32(uint32_t address, uint32_t x) {
    asm volatile("st.shared.b32 [%0], %1;" : : "r"(address), "r"(x) : "memory");
}

// 16 bytes from global to shared memory, beside what the thread goes on to do. Copies are waited for in groups, the oldest first. The whole
// line comes to L2: the heads beside this one are other blocks' work of the same time.
PQ_DEVICE void pq_copy_async(uint32_t shared, const uint8_t * global) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" : : "r"(shared), "l"(global) : "memory");
}

PQ_DEVICE void pq_copy_async_if(bool yes, uint32_t shared, const uint8_t * global) {
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.u32 p, %2, 0;\n"
                 "@p cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n"
                 "}" : : "r"(shared), "l"(global), "r"((uint32_t) yes) : "memory");
}

PQ_DEVICE void pq_copy_commit() {
    asm volatile("cp.async.commit_group;" : : : "memory");
}

template <int N /* groups that may still be on their way */>
PQ_DEVICE void pq_copy_wait() {
    asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool PQ_HAS_BULK_COPIES = true;
#else
constexpr bool PQ_HAS_BULK_COPIES = false;
#endif

// Copies from global to shared memory that one thread asks for and every thread can wait for (from 9.0 on; before that, threads copy).
// `barrier`: shared address of 8 bytes. A thread opens it. For every phase of it, numbered from 0, one thread says how many bytes are to come and asks for them, and
// others, once they can know it to be open, wait.
PQ_DEVICE void pq_bulk_open(uint32_t barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" : : "r"(barrier) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
#endif
}

PQ_DEVICE void pq_bulk_expect(uint32_t barrier, uint32_t n_bytes /* of all copies */) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(barrier), "r"(n_bytes) : "memory");
#endif
}

PQ_DEVICE void pq_bulk_copy(uint32_t shared, const uint8_t * global, uint32_t n_bytes, uint32_t barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 : : "r"(shared), "l"(global), "r"(n_bytes), "r"(barrier) : "memory");
#endif
}

// The box of a tensor of three dimensions that begins at x0 (innermost), x1, x2, as a whole phase of the barrier. What lies outside of the tensor comes as zeros, and is
// counted in n_bytes too. Whole warps call it.
PQ_DEVICE void pq_bulk_copy_box(uint32_t shared, const CUtensorMap * map, int x0, int x1, int x2, uint32_t n_bytes, uint32_t barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "elect.sync _|p, 0xffffffff;\n"
                 "@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [%5], %6;\n"
                 "@p cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];\n"
                 "}"
                 : : "r"(shared), "l"(map), "r"(x0), "r"(x1), "r"(x2), "r"(barrier), "r"(n_bytes) : "memory");
#endif
}

// Asks for the description of a tensor, which the first copy of a box waits for.
PQ_DEVICE void pq_prefetch_map(const CUtensorMap * map) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("prefetch.tensormap [%0];" : : "l"(map) : "memory");
#endif
}

// Whole warps call it: were lanes to leave the loop one by one, the compiler would not take what follows for the same in all lanes.
PQ_DEVICE void pq_bulk_wait(uint32_t barrier, uint32_t phase) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint32_t done;
    do {
        asm volatile("{\n"
                     ".reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n"
                     "}" : "=r"(done) : "r"(barrier), "r"(phase & 1) : "memory");
    } while (!__all_sync(PQ_FULL_WARP, done));
#endif
}

PQ_DEVICE __half2 pq_as_half2(uint32_t x) {
    __half2 h;
    memcpy(&h, &x, 4);
    return h;
}

PQ_DEVICE uint32_t pq_as_u32(__half2 h) {
    uint32_t x;
    memcpy(&x, &h, 4);
    return x;
}

PQ_DEVICE float2 pq_half2_to_float2(uint32_t x) {
    return __half22float2(pq_as_half2(x));
}

PQ_DEVICE float pq_exp2(float x) { // 2 ulp; exp2(-inf) = 0
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

PQ_DEVICE float pq_sqrt(float x) { // to 2^-23
    float y;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// tanh to an absolute error of 2^-23: what is left of a relative error near 0 is not seen in a score that is scaled with the softcap.
PQ_DEVICE float pq_tanh(float x) {
    return 1.0f - __fdividef(2.0f, 1.0f + pq_exp2(2.88539008f * x)); // exp2 may be inf
}

// A value that the compiler can't derive others from ahead of time: for what is cheaper to compute again than to keep in a register.
PQ_DEVICE int pq_opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// The same for a value that stays: the compiler would rather compute it again in every turn of a loop than keep it in a register.
// The whole warp calls it.
PQ_DEVICE uint32_t pq_keep(uint32_t x, int lane) {
    return __shfl_sync(PQ_FULL_WARP, x, lane);
}

// Barrier number `id` of N threads of a block, a multiple of 32.
template <int N>
PQ_DEVICE void pq_barrier(int id) {
    asm volatile("bar.sync %0, %1;" : : "r"(id), "n"(N) : "memory");
}

PQ_DEVICE float pq_warp_sum(float x) {
#pragma unroll
    for (int o = PQ_WARP / 2; o > 0; o /= 2) {
        x += __shfl_xor_sync(PQ_FULL_WARP, x, o);
    }
    return x;
}

PQ_DEVICE float pq_warp_max(float x) {
#pragma unroll
    for (int o = PQ_WARP / 2; o > 0; o /= 2) {
        x = fmaxf(x, __shfl_xor_sync(PQ_FULL_WARP, x, o));
    }
    return x;
}

// C [16][8] += A [16][16] * B [16][8], halves in, floats out. With g = lane / 4, t = lane % 4 a lane holds
//   A: a0 = A[g][2t, 2t+1], a1 = A[g+8][2t, 2t+1], a2 = A[g][2t+8, 2t+9], a3 = A[g+8][2t+8, 2t+9]
//   B: b0 = B[2t, 2t+1][g], b1 = B[2t+8, 2t+9][g]
//   C: c[0], c[1] = C[g][2t, 2t+1], c[2], c[3] = C[g+8][2t, 2t+1]
PQ_DEVICE void pq_mma_m16n8k16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
