// Rotary position embedding inside a step (pq_cuda_rope in pq-cuda.h). Rows and queries come out bit for bit as ggml's kernel makes them, whose
// file is compiled with fast math: the same approximations, in the same order, with the same fused multiply-adds.
#pragma once

#include "pq-cuda-common.cuh"
#include "pq-cuda.h"

PQ_DEVICE float pq_lg2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

PQ_DEVICE float pq_rcp_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// {cos, sin} by which pair i is turned at position pos
PQ_DEVICE float2 pq_rope_turn(const pq_cuda_rope & r, int32_t pos, int i) {
    float theta = __fmul_rn((float) pos, pq_exp2(__fmul_rn((float) i, pq_lg2_approx(r.theta_scale))));
    if (r.freq_factors) {
        theta = __fdividef(theta, r.freq_factors[i]);
    }
    const float extrapolated = theta;
    float scale = r.attn_factor;
    theta = __fmul_rn(r.freq_scale, theta);
    if (r.ext_factor != 0.0f) {
        const float ramp = 1.0f - __saturatef(__fmul_rn((float) i - r.corr_low, pq_rcp_approx(fmaxf(0.001f, r.corr_high - r.corr_low))));
        const float mix  = __fmul_rn(ramp, r.ext_factor);
        theta = __fmaf_rn(extrapolated, mix, __fmul_rn(theta, 1.0f - mix));
        scale = __fmul_rn(__fmaf_rn(__fmul_rn(pq_lg2_approx(pq_rcp_approx(r.freq_scale)), 0.693147182f), 0.1f, 1.0f), scale);
    }
    return make_float2(__fmul_rn(__cosf(theta), scale), __fmul_rn(__sinf(theta), scale));
}

PQ_DEVICE float pq_rope_low(float2 turn, float low, float high) {
    return __fmaf_rn(turn.x, low, -__fmul_rn(turn.y, high));
}

PQ_DEVICE float pq_rope_high(float2 turn, float low, float high) {
    return __fmaf_rn(turn.y, low, __fmul_rn(turn.x, high));
}
