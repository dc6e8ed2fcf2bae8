// How the kernels are launched: with programmatic dependent launch (PDL) where the device has it. A kernel then starts
// while the one before it still runs; before pq_pdl_wait() it may only use what no kernel that may still run writes (codebooks; what its caller says is settled).
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <stddef.h>

// Waits until all kernels before this one are complete and their writes are visible. At least one block of every kernel calls it: who waits for this kernel relies on those
// ahead of it, and nothing says that a kernel can't be complete before them (devices of 9.0 were not seen to let it).
static __device__ __forceinline__ void pq_pdl_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
}

// Lets the next kernel of the stream start; its own wait still waits for the end of this one.
static __device__ __forceinline__ void pq_pdl_launch_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// For a kernel whose next one may run beside it: lets that one start at the beginning, so that what it does first is hidden, too. Who starts finds everything complete
// that comes before such kernels: the first of them (settled: it is not the first) has a warp wait for that. Before its other warps read what that wrote, they wait for themselves.
static __device__ __forceinline__ void pq_pdl_launch_beside(bool settled, int n_threads) {
    if (settled || (int) threadIdx.x >= n_threads - 32) {
        if (!settled) {
            pq_pdl_wait();
        }
        pq_pdl_launch_next();
    }
}

// Reads what a kernel ahead wrote that this block has not waited for, because others have: past L1, where it could lie as it was before. (Before 9.0 every kernel waits.)
template <class T>
static __device__ __forceinline__ T pq_load_fresh(const T * p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    return __ldcg(p);
#else
    return *p;
#endif
}

// Whether the current device runs code compiled for 9.0 or later: older code has no wait in it and must not start early, not
// even on a newer device. All kernels of a build have the same architectures, so any of them answers for all.
static inline bool pq_device_has_pdl(const void * kernel) {
    enum { UNKNOWN = 0, NO = 1, YES = 2, MAX_DEVICES = 64 };
    static std::atomic<int> known[MAX_DEVICES];
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= MAX_DEVICES) {
        return false;
    }
    int state = known[device].load(std::memory_order_relaxed);
    if (state == UNKNOWN) {
        cudaFuncAttributes attr;
        state = cudaFuncGetAttributes(&attr, kernel) == cudaSuccess && attr.ptxVersion >= 90 ? YES : NO;
        known[device].store(state, std::memory_order_relaxed);
    }
    return state == YES;
}

template <class... Params, class... Args>
static cudaError_t pq_launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes, cudaStream_t stream, Args... args) {
    if (smem_bytes > 48 * 1024) { // more must be asked for
        const cudaError_t err = cudaFuncSetAttribute((const void *) kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int) smem_bytes);
        if (err != cudaSuccess) {
            return err;
        }
    }
    cudaLaunchAttribute attr = {};
    attr.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attr.val.programmaticStreamSerializationAllowed = 1;

    cudaLaunchConfig_t config = {};
    config.gridDim          = grid;
    config.blockDim         = block;
    config.dynamicSmemBytes = smem_bytes;
    config.stream           = stream;
    config.attrs            = &attr;
    config.numAttrs         = pq_device_has_pdl((const void *) kernel) ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, (Params) args...);
}
