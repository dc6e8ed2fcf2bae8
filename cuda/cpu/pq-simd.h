// Vector types for pq-kernels-impl.h: a struct of static functions per instruction set.
//
// pq_vec8 has 8 lanes everywhere (AVX2, or plain C that a compiler may vectorize) and carries the table look-ups;
// pq_vec is the widest type of the instruction set and carries the matrix products and the searches.
//
// fma() rounds once, on every instruction set. madd() may round twice: it is for results that need not be equal bit for bit.
#pragma once

#include "../pq/pq-layout.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) && !defined(PQ_SCALAR)
#include <immintrin.h>
#endif
#if defined(_MSC_VER)
#include <intrin.h>
#endif

#if defined(PQ_SCALAR) && !defined(_MSC_VER)
// leaves more to the compiler, which otherwise takes long over eight lanes of plain C
#define PQ_INLINE static inline
#define PQ_MEMBER static inline __attribute__((always_inline))
#define PQ_UNROLL
#define PQ_NO_UNROLL
#define PQ_PREFETCH(p) __builtin_prefetch(p)
#elif defined(_MSC_VER)
#define PQ_INLINE static __forceinline
#define PQ_MEMBER static __forceinline
#define PQ_UNROLL
#define PQ_NO_UNROLL
#define PQ_PREFETCH(p)
#else
#define PQ_INLINE static inline __attribute__((always_inline))
#define PQ_MEMBER static inline __attribute__((always_inline))
#define PQ_UNROLL _Pragma("GCC unroll 16")
#define PQ_NO_UNROLL _Pragma("GCC unroll 1")
#define PQ_PREFETCH(p) __builtin_prefetch(p)
#endif

namespace {

PQ_INLINE float pq_f16_to_f32(uint16_t h) {
    // Shifts the half's exponent and mantissa into place and lets one multiplication rebias both normal and subnormal
    // numbers; infinities and NaN get the exponent that the multiplication can't give them.
    const uint32_t magnitude = (uint32_t) (h & 0x7fff) << 13;
    uint32_t bits = magnitude;
    float f;
    memcpy(&f, &bits, 4);
    f *= 0x1p112f;
    memcpy(&bits, &f, 4);
    if ((h & 0x7c00) == 0x7c00) {
        bits = magnitude | 0x7f800000u;
    }
    bits |= (uint32_t) (h & 0x8000) << 16;
    memcpy(&f, &bits, 4);
    return f;
}

// To nearest even, as vcvtps2ph does: what is too large becomes infinity, and a NaN keeps its upper bits.
PQ_INLINE uint16_t pq_f32_to_f16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    const uint32_t sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) {
        return (uint16_t) (sign | 0x7e00u | (bits >> 13 & 0x3ffu));
    }
    if (bits >= 0x477ff000u) { // 65520, half a step above the largest half
        return (uint16_t) (sign | 0x7c00u);
    }
    if (bits < 0x38800000u) { // 2^-14: subnormal; adding 0.5 leaves as many bits as it has
        float a;
        memcpy(&a, &bits, 4);
        a += 0.5f;
        memcpy(&bits, &a, 4);
        return (uint16_t) (sign | (bits - 0x3f000000u));
    }
    bits -= 112u << 23;
    return (uint16_t) (sign | (bits + 0xfffu + (bits >> 13 & 1u)) >> 13);
}

// of a mask that is not 0
PQ_INLINE int pq_lowest_bit(uint32_t mask) {
#if defined(_MSC_VER)
    unsigned long i;
    _BitScanForward(&i, mask);
    return (int) i;
#else
    return __builtin_ctz(mask);
#endif
}

#if defined(__AVX2__) && !defined(PQ_SCALAR)

struct pq_vec8 {
    using T = __m256;
    using H = __m128i; // as many halves
    enum { N = 8, MR = 6 /* 6 x 2 accumulators, 2 loads and 1 broadcast fill the 16 registers */ };

    PQ_MEMBER T    zero()                        { return _mm256_setzero_ps(); }
    PQ_MEMBER T    set1(float f)                 { return _mm256_set1_ps(f); }
    PQ_MEMBER T    load(const float * p)         { return _mm256_loadu_ps(p); }
    PQ_MEMBER void store(float * p, T a)         { _mm256_storeu_ps(p, a); }
    PQ_MEMBER T    add(T a, T b)                 { return _mm256_add_ps(a, b); }
    PQ_MEMBER T    sub(T a, T b)                 { return _mm256_sub_ps(a, b); }
    PQ_MEMBER T    mul(T a, T b)                 { return _mm256_mul_ps(a, b); }
    PQ_MEMBER T    div(T a, T b)                 { return _mm256_div_ps(a, b); }
    PQ_MEMBER T    fma(T a, T b, T c)            { return _mm256_fmadd_ps(a, b, c); }
    PQ_MEMBER T    madd(T a, T b, T c)           { return _mm256_fmadd_ps(a, b, c); }
    PQ_MEMBER T    max(T a, T b)                 { return _mm256_max_ps(a, b); }
    PQ_MEMBER T    min(T a, T b)                 { return _mm256_min_ps(a, b); }
    PQ_MEMBER T    if_lt(T a, T b, T x, T y)     { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
    PQ_MEMBER T    if_eq(T a, T b, T x, T y)     { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
    PQ_MEMBER uint32_t mask_le(T a, T b)         { return (uint32_t) _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LE_OQ)); }
    PQ_MEMBER T    round(T a)                    { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    PQ_MEMBER T    iota()                        { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }
    PQ_MEMBER H    load_half(const uint16_t * p) { return _mm_loadu_si128((const __m128i *) p); }
    PQ_MEMBER void store_half(uint16_t * p, H a) { _mm_storeu_si128((__m128i *) p, a); }
    PQ_MEMBER T    from_half(H a)                { return _mm256_cvtph_ps(a); }
    PQ_MEMBER H    to_half(T a)                  { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }
    PQ_MEMBER T    load_f16(const uint16_t * p)  { return from_half(load_half(p)); }

    PQ_MEMBER T pow2(T n) { // n integral, -126..127
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
    }

    // a, b = 16 values in order -> those at even and at odd positions
    PQ_MEMBER void unzip(T a, T b, T * even, T * odd) {
        const __m256d e = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88));
        const __m256d o = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xdd));
        *even = _mm256_castpd_ps(_mm256_permute4x64_pd(e, 0xd8));
        *odd  = _mm256_castpd_ps(_mm256_permute4x64_pd(o, 0xd8));
    }

    // The centroids at c, one per lane, element e in x[e]; in the order of centroid_lanes(), which saves shuffles across halves
    template <int DSUB>
    PQ_MEMBER void load_centroids(const uint16_t * c, T * x) {
        if constexpr (DSUB == 2) {
            const T a = load_f16(c), b = load_f16(c + N);
            x[0] = _mm256_shuffle_ps(a, b, 0x88);
            x[1] = _mm256_shuffle_ps(a, b, 0xdd);
        } else {
            const T a = load_f16(c), b = load_f16(c + N), d = load_f16(c + 2 * N), e = load_f16(c + 3 * N);
            const T ab_lo = _mm256_unpacklo_ps(a, b), ab_hi = _mm256_unpackhi_ps(a, b);
            const T de_lo = _mm256_unpacklo_ps(d, e), de_hi = _mm256_unpackhi_ps(d, e);
            x[0] = _mm256_shuffle_ps(ab_lo, de_lo, 0x44);
            x[1] = _mm256_shuffle_ps(ab_lo, de_lo, 0xee);
            x[2] = _mm256_shuffle_ps(ab_hi, de_hi, 0x44);
            x[3] = _mm256_shuffle_ps(ab_hi, de_hi, 0xee);
        }
    }
    template <int DSUB>
    PQ_MEMBER T centroid_lanes() {
        return DSUB == 2 ? _mm256_setr_ps(0, 1, 4, 5, 2, 3, 6, 7)
                         : _mm256_setr_ps(0, 2, 4, 6, 1, 3, 5, 7);
    }

    PQ_MEMBER void zip(T a, T b, T * lo, T * hi) {
        const T l = _mm256_unpacklo_ps(a, b);
        const T h = _mm256_unpackhi_ps(a, b);
        *lo = _mm256_permute2f128_ps(l, h, 0x20);
        *hi = _mm256_permute2f128_ps(l, h, 0x31);
    }

    PQ_MEMBER float hmax(T a) {
        __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        x = _mm_max_ps(x, _mm_movehl_ps(x, x));
        return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
    }
    PQ_MEMBER float hmin(T a) {
        __m128 x = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        x = _mm_min_ps(x, _mm_movehl_ps(x, x));
        return _mm_cvtss_f32(_mm_min_ss(x, _mm_movehdup_ps(x)));
    }
    PQ_MEMBER float hsum(T a) {
        __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
    }

    // lane i: the sum of a[i]
    PQ_MEMBER T hsum_8(const T * a) {
        const T lo = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
        const T hi = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
        return _mm256_add_ps(_mm256_permute2f128_ps(lo, hi, 0x20), _mm256_permute2f128_ps(lo, hi, 0x31));
    }

    // a square of halves: lane t of out[e] is rows[t][e]
    PQ_MEMBER void load_f16_columns(const uint16_t * const * rows, int64_t at, T * out) {
        __m128i r[8], a[8], b[8];
        PQ_UNROLL
        for (int i = 0; i < 8; i++) {
            r[i] = load_half(rows[i] + at);
        }
        PQ_UNROLL
        for (int i = 0; i < 8; i += 4) {
            a[i]     = _mm_unpacklo_epi16(r[i],     r[i + 1]);
            a[i + 1] = _mm_unpackhi_epi16(r[i],     r[i + 1]);
            a[i + 2] = _mm_unpacklo_epi16(r[i + 2], r[i + 3]);
            a[i + 3] = _mm_unpackhi_epi16(r[i + 2], r[i + 3]);
            b[i]     = _mm_unpacklo_epi32(a[i],     a[i + 2]); // columns 0, 1 of four rows
            b[i + 1] = _mm_unpackhi_epi32(a[i],     a[i + 2]); // 2, 3
            b[i + 2] = _mm_unpacklo_epi32(a[i + 1], a[i + 3]);
            b[i + 3] = _mm_unpackhi_epi32(a[i + 1], a[i + 3]);
        }
        PQ_UNROLL
        for (int i = 0; i < 4; i++) {
            out[2 * i]     = from_half(_mm_unpacklo_epi64(b[i], b[i + 4]));
            out[2 * i + 1] = from_half(_mm_unpackhi_epi64(b[i], b[i + 4]));
        }
    }

    // two floats (or four halves) from each address, by way of a double, which the compiler loads straight into the register
    PQ_MEMBER __m128 load_64(const void * p) {
        double d;
        memcpy(&d, p, 8);
        return _mm_castpd_ps(_mm_set_sd(d));
    }
    PQ_MEMBER __m128 load_64_64(const void * p, const void * q) {
        double d, e;
        memcpy(&d, p, 8);
        memcpy(&e, q, 8);
        return _mm_castpd_ps(_mm_set_pd(e, d));
    }

    // s[0..RP) += sum over NB codes of table[j][code j][0..RP); `stride` floats from one subspace to the next
    template <int RP, int NB>
    PQ_MEMBER void table_add(const float * table, size_t stride, const uint8_t * codes, float * s) {
        static_assert(NB == 4 || NB == 8, "codes come as one word");
        uint64_t w = 0;
        memcpy(&w, codes, NB);
        if constexpr (RP == 1) {
            float a = s[0], b = 0.0f;
            PQ_UNROLL
            for (int j = 0; j < NB; j += 2) {
                a += table[ j      * stride + ((w >>  (8 * j))      & 0xff)];
                b += table[(j + 1) * stride + ((w >> (8 * j + 8)) & 0xff)];
            }
            s[0] = a + b;
        } else if constexpr (RP == 2) {
            __m128 a = load_64(s), b = _mm_setzero_ps();
            PQ_UNROLL
            for (int j = 0; j < NB; j += 2) {
                a = _mm_add_ps(a, load_64(table +  j      * stride + 2 * ((w >>  (8 * j))      & 0xff)));
                b = _mm_add_ps(b, load_64(table + (j + 1) * stride + 2 * ((w >> (8 * j + 8)) & 0xff)));
            }
            _mm_storel_pi((__m64 *) s, _mm_add_ps(a, b));
        } else if constexpr (RP == 4) {
            __m128 a = _mm_loadu_ps(s), b = _mm_setzero_ps();
            PQ_UNROLL
            for (int j = 0; j < NB; j += 2) {
                a = _mm_add_ps(a, _mm_loadu_ps(table +  j      * stride + 4 * ((w >>  (8 * j))      & 0xff)));
                b = _mm_add_ps(b, _mm_loadu_ps(table + (j + 1) * stride + 4 * ((w >> (8 * j + 8)) & 0xff)));
            }
            _mm_storeu_ps(s, _mm_add_ps(a, b));
        } else {
            __m256 a = _mm256_loadu_ps(s), b = _mm256_setzero_ps();
            PQ_UNROLL
            for (int j = 0; j < NB; j += 2) {
                a = _mm256_add_ps(a, _mm256_loadu_ps(table +  j      * stride + 8 * ((w >>  (8 * j))      & 0xff)));
                b = _mm256_add_ps(b, _mm256_loadu_ps(table + (j + 1) * stride + 8 * ((w >> (8 * j + 8)) & 0xff)));
            }
            _mm256_storeu_ps(s, _mm256_add_ps(a, b));
        }
    }

    // 8 elements from CODES codes, out of f32 centroids of PQ_KSUB each: four of 2 elements, two of 2 and one of 4, or two of 4
    template <int CODES>
    PQ_MEMBER T gather(const float * c, size_t w) {
        __m128 a, b;
        if constexpr (CODES == 2) {
            a = _mm_loadu_ps(c + 4 * (w & 0xff));
            b = _mm_loadu_ps(c + 4 * (PQ_KSUB + (w >> 8 & 0xff)));
        } else {
            a = load_64_64(c + 2 * (w & 0xff), c + 2 * (PQ_KSUB + (w >> 8 & 0xff)));
            b = CODES == 3 ? _mm_loadu_ps(c + 4 * (PQ_KSUB + (w >> 16 & 0xff)))
                           : load_64_64(c + 2 * (2 * PQ_KSUB + (w >> 16 & 0xff)), c + 2 * (3 * PQ_KSUB + (w >> 24)));
        }
        return _mm256_insertf128_ps(_mm256_castps128_ps256(a), b, 1);
    }

    // pairs of halves a0, a1, ... and b0, b1, ... -> a0, b0, a1, b1, ...
    PQ_MEMBER void zip_f16_pairs(const uint16_t * a, const uint16_t * b, T * lo, T * hi) {
        *lo = from_half(_mm_unpacklo_epi32(load_half(a), load_half(b)));
        *hi = from_half(_mm_unpackhi_epi32(load_half(a), load_half(b)));
    }

    PQ_MEMBER __m128i load_4_pairs(const uint16_t * a, const uint16_t * b, const uint16_t * c, const uint16_t * d) {
        int32_t w[4];
        memcpy(&w[0], a, 4);
        memcpy(&w[1], b, 4);
        memcpy(&w[2], c, 4);
        memcpy(&w[3], d, 4);
        return _mm_insert_epi32(_mm_insert_epi32(_mm_insert_epi32(_mm_cvtsi32_si128(w[0]), w[1], 1), w[2], 2), w[3], 3);
    }
    PQ_MEMBER __m128i load_2_quads(const uint16_t * a, const uint16_t * b) {
        return _mm_castps_si128(load_64_64(a, b));
    }

    // 8 elements from 8/DSUB codes, out of f16 centroids [..][PQ_KSUB][DSUB]; `stride` elements between subspaces
    template <int DSUB>
    PQ_MEMBER T gather_f16(const uint16_t * c, size_t stride, size_t w) {
        if constexpr (DSUB == 2) {
            return _mm256_cvtph_ps(load_4_pairs(c              + 2 * (w       & 0xff), c +     stride + 2 * (w >> 8 & 0xff),
                                                c + 2 * stride + 2 * (w >> 16 & 0xff), c + 3 * stride + 2 * (w >> 24)));
        } else {
            return _mm256_cvtph_ps(load_2_quads(c + 4 * (w & 0xff), c + stride + 4 * (w >> 8 & 0xff)));
        }
    }

    // 32 codes as they lie, or with EXPAND two of 16 in turns with one of 8 `shared` ones, twice
    template <bool EXPAND>
    PQ_MEMBER __m256i load_32_codes(const uint8_t * src, int64_t shared /* from src on */) {
        if constexpr (EXPAND) {
            const __m128i one = _mm_loadu_si128((const __m128i *) src), two = _mm_loadl_epi64((const __m128i *) (src + shared));
            const __m128i twice = _mm_unpacklo_epi8(two, two);
            return _mm256_set_m128i(_mm_unpackhi_epi16(one, twice), _mm_unpacklo_epi16(one, twice));
        } else {
            return _mm256_loadu_si256((const __m256i *) src);
        }
    }

    // 32 codes of each of 4 cells -> 4 groups of 8 codes, `group_stride` bytes apart, each with the 4 cells side by side: four
    // wide stores in place of sixteen narrow ones to as many cache lines
    template <bool EXPAND>
    PQ_MEMBER void stage_4_cells(const uint8_t * s0, const uint8_t * s1, const uint8_t * s2, const uint8_t * s3, int64_t shared,
                                 uint8_t * dst, int64_t group_stride) {
        const __m256i a = load_32_codes<EXPAND>(s0, shared), b = load_32_codes<EXPAND>(s1, shared);
        const __m256i c = load_32_codes<EXPAND>(s2, shared), d = load_32_codes<EXPAND>(s3, shared);
        const __m256i ab_even = _mm256_unpacklo_epi64(a, b), ab_odd = _mm256_unpackhi_epi64(a, b); // groups 0, 2 and 1, 3
        const __m256i cd_even = _mm256_unpacklo_epi64(c, d), cd_odd = _mm256_unpackhi_epi64(c, d);
        _mm256_storeu_si256((__m256i *) (dst                   ), _mm256_permute2x128_si256(ab_even, cd_even, 0x20));
        _mm256_storeu_si256((__m256i *) (dst +     group_stride), _mm256_permute2x128_si256(ab_odd,  cd_odd,  0x20));
        _mm256_storeu_si256((__m256i *) (dst + 2 * group_stride), _mm256_permute2x128_si256(ab_even, cd_even, 0x31));
        _mm256_storeu_si256((__m256i *) (dst + 3 * group_stride), _mm256_permute2x128_si256(ab_odd,  cd_odd,  0x31));
    }

    // the same with 16 codes as they lie, 2 groups
    PQ_MEMBER void stage_4_cells_16(const uint8_t * s0, const uint8_t * s1, const uint8_t * s2, const uint8_t * s3, uint8_t * dst,
                                    int64_t group_stride) {
        const __m128i a = _mm_loadu_si128((const __m128i *) s0), b = _mm_loadu_si128((const __m128i *) s1);
        const __m128i c = _mm_loadu_si128((const __m128i *) s2), d = _mm_loadu_si128((const __m128i *) s3);
        _mm_storeu_si128((__m128i *) (dst                    ), _mm_unpacklo_epi64(a, b));
        _mm_storeu_si128((__m128i *) (dst                + 16), _mm_unpacklo_epi64(c, d));
        _mm_storeu_si128((__m128i *) (dst + group_stride     ), _mm_unpackhi_epi64(a, b));
        _mm_storeu_si128((__m128i *) (dst + group_stride + 16), _mm_unpackhi_epi64(c, d));
    }
    enum { STAGES_4_CELLS = 1 };

    // one subspace of 8 cells, whose codes are 8 bytes apart: out[e] holds element e of the 8 centroids
    template <int DSUB>
    PQ_MEMBER void gather_cells(const uint16_t * c, const uint8_t * codes, T * out) {
        // Cells 0-3 go to the lower and 4-7 to the upper half: the shuffles below don't cross halves.
        if constexpr (DSUB == 2) {
            const T a = _mm256_cvtph_ps(load_4_pairs(c + 2 * codes[0],  c + 2 * codes[8],  c + 2 * codes[32], c + 2 * codes[40]));
            const T b = _mm256_cvtph_ps(load_4_pairs(c + 2 * codes[16], c + 2 * codes[24], c + 2 * codes[48], c + 2 * codes[56]));
            out[0] = _mm256_shuffle_ps(a, b, 0x88);
            out[1] = _mm256_shuffle_ps(a, b, 0xdd);
        } else {
            const T r0 = _mm256_cvtph_ps(load_2_quads(c + 4 * codes[0],  c + 4 * codes[32]));
            const T r1 = _mm256_cvtph_ps(load_2_quads(c + 4 * codes[8],  c + 4 * codes[40]));
            const T r2 = _mm256_cvtph_ps(load_2_quads(c + 4 * codes[16], c + 4 * codes[48]));
            const T r3 = _mm256_cvtph_ps(load_2_quads(c + 4 * codes[24], c + 4 * codes[56]));
            const T l01 = _mm256_unpacklo_ps(r0, r1), h01 = _mm256_unpackhi_ps(r0, r1);
            const T l23 = _mm256_unpacklo_ps(r2, r3), h23 = _mm256_unpackhi_ps(r2, r3);
            out[0] = _mm256_shuffle_ps(l01, l23, 0x44);
            out[1] = _mm256_shuffle_ps(l01, l23, 0xee);
            out[2] = _mm256_shuffle_ps(h01, h23, 0x44);
            out[3] = _mm256_shuffle_ps(h01, h23, 0xee);
        }
    }
};

#else

struct pq_vec8 {
    struct T { float    v[8]; };
    struct H { uint16_t v[8]; };
    enum { N = 8, MR = 2 };

#define PQ_LANES(expr) T r; for (int i = 0; i < 8; i++) { r.v[i] = (expr); } return r
    PQ_MEMBER T    zero()                       { PQ_LANES(0.0f); }
    PQ_MEMBER T    set1(float f)                { PQ_LANES(f); }
    PQ_MEMBER T    load(const float * p)        { PQ_LANES(p[i]); }
    PQ_MEMBER void store(float * p, T a)        { for (int i = 0; i < 8; i++) { p[i] = a.v[i]; } }
    PQ_MEMBER T    add(T a, T b)                { PQ_LANES(a.v[i] + b.v[i]); }
    PQ_MEMBER T    sub(T a, T b)                { PQ_LANES(a.v[i] - b.v[i]); }
    PQ_MEMBER T    mul(T a, T b)                { PQ_LANES(a.v[i] * b.v[i]); }
    PQ_MEMBER T    div(T a, T b)                { PQ_LANES(a.v[i] / b.v[i]); }
    PQ_MEMBER T    fma(T a, T b, T c)           { PQ_LANES(fmaf(a.v[i], b.v[i], c.v[i])); }
    PQ_MEMBER T    madd(T a, T b, T c)          { PQ_LANES(a.v[i] * b.v[i] + c.v[i]); }
    // the second operand when one is NaN, as the x86 instructions do
    PQ_MEMBER T    max(T a, T b)                { PQ_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
    PQ_MEMBER T    min(T a, T b)                { PQ_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
    PQ_MEMBER T    if_lt(T a, T b, T x, T y)    { PQ_LANES(a.v[i] < b.v[i] ? x.v[i] : y.v[i]); }
    PQ_MEMBER T    if_eq(T a, T b, T x, T y)    { PQ_LANES(a.v[i] == b.v[i] ? x.v[i] : y.v[i]); }
    PQ_MEMBER uint32_t mask_le(T a, T b)        { uint32_t m = 0; for (int i = 0; i < 8; i++) { m |= (uint32_t) (a.v[i] <= b.v[i]) << i; } return m; }
    // adding 1.5 * 2^23 leaves no fraction bits; inputs here are far below 2^22
    PQ_MEMBER T    round(T a)                   { PQ_LANES((a.v[i] + 12582912.0f) - 12582912.0f); }
    PQ_MEMBER T    iota()                       { PQ_LANES((float) i); }
    PQ_MEMBER T    load_f16(const uint16_t * p) { PQ_LANES(pq_f16_to_f32(p[i])); }
    PQ_MEMBER T    from_half(H a)               { PQ_LANES(pq_f16_to_f32(a.v[i])); }
#undef PQ_LANES

    PQ_MEMBER H    load_half(const uint16_t * p) { H r; memcpy(r.v, p, sizeof(r.v)); return r; }
    PQ_MEMBER void store_half(uint16_t * p, H a) { memcpy(p, a.v, sizeof(a.v)); }
    PQ_MEMBER H    to_half(T a)                  { H r; for (int i = 0; i < 8; i++) { r.v[i] = pq_f32_to_f16(a.v[i]); } return r; }

    PQ_MEMBER T pow2(T n) {
        T r;
        for (int i = 0; i < 8; i++) {
            const uint32_t bits = (uint32_t) ((int32_t) n.v[i] + 127) << 23;
            memcpy(&r.v[i], &bits, 4);
        }
        return r;
    }

    PQ_MEMBER void unzip(T a, T b, T * even, T * odd) {
        for (int i = 0; i < 4; i++) {
            even->v[i]     = a.v[2 * i];
            odd ->v[i]     = a.v[2 * i + 1];
            even->v[i + 4] = b.v[2 * i];
            odd ->v[i + 4] = b.v[2 * i + 1];
        }
    }
    template <int DSUB>
    PQ_MEMBER void load_centroids(const uint16_t * c, T * x) {
        for (int i = 0; i < 8; i++) {
            for (int e = 0; e < DSUB; e++) {
                x[e].v[i] = pq_f16_to_f32(c[DSUB * i + e]);
            }
        }
    }
    template <int DSUB>
    PQ_MEMBER T centroid_lanes() { return iota(); }

    PQ_MEMBER void zip(T a, T b, T * lo, T * hi) {
        for (int i = 0; i < 4; i++) {
            lo->v[2 * i]     = a.v[i];
            lo->v[2 * i + 1] = b.v[i];
            hi->v[2 * i]     = a.v[i + 4];
            hi->v[2 * i + 1] = b.v[i + 4];
        }
    }

    PQ_MEMBER float hmax(T a) { float r = a.v[0]; for (int i = 1; i < 8; i++) { r = a.v[i] > r ? a.v[i] : r; } return r; }
    PQ_MEMBER float hmin(T a) { float r = a.v[0]; for (int i = 1; i < 8; i++) { r = a.v[i] < r ? a.v[i] : r; } return r; }
    PQ_MEMBER float hsum(T a) {
        return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
    }
    PQ_MEMBER T hsum_8(const T * a) { T r; for (int i = 0; i < 8; i++) { r.v[i] = hsum(a[i]); } return r; }

    PQ_MEMBER void load_f16_columns(const uint16_t * const * rows, int64_t at, T * out) {
        for (int t = 0; t < 8; t++) {
            for (int e = 0; e < 8; e++) {
                out[e].v[t] = pq_f16_to_f32(rows[t][at + e]);
            }
        }
    }

    template <int RP, int NB>
    PQ_MEMBER void table_add(const float * table, size_t stride, const uint8_t * codes, float * s) {
        float a[RP];
        for (int r = 0; r < RP; r++) {
            a[r] = s[r];
        }
        for (int j = 0; j < NB; j++) {
            const float * t = table + j * stride + (size_t) RP * codes[j];
            for (int r = 0; r < RP; r++) {
                a[r] += t[r];
            }
        }
        for (int r = 0; r < RP; r++) {
            s[r] = a[r];
        }
    }

    template <int CODES>
    PQ_MEMBER T gather(const float * c, uint32_t w) {
        T r;
        for (int j = 0, d = 0; j < CODES; j++) {
            const int n = CODES == 2 || (CODES == 3 && j == 2) ? 4 : 2; // elements of code j
            for (int e = 0; e < n; e++) {
                r.v[d + e] = c[d * PQ_KSUB + n * (w >> (8 * j) & 0xff) + e];
            }
            d += n;
        }
        return r;
    }
    PQ_MEMBER void zip_f16_pairs(const uint16_t * a, const uint16_t * b, T * lo, T * hi) {
        for (int i = 0; i < 8; i++) {
            T * dst = i < 4 ? lo : hi;
            dst->v[i % 4 / 2 * 4 + i % 2]     = pq_f16_to_f32(a[i]);
            dst->v[i % 4 / 2 * 4 + i % 2 + 2] = pq_f16_to_f32(b[i]);
        }
    }
    template <int DSUB>
    PQ_MEMBER T gather_f16(const uint16_t * c, size_t stride, uint32_t w) {
        T r;
        for (int j = 0; j < 8 / DSUB; j++) {
            for (int e = 0; e < DSUB; e++) {
                r.v[j * DSUB + e] = pq_f16_to_f32(c[j * stride + DSUB * (w >> (8 * j) & 0xff) + e]);
            }
        }
        return r;
    }
    template <bool EXPAND>
    PQ_MEMBER void stage_4_cells(const uint8_t *, const uint8_t *, const uint8_t *, const uint8_t *, int64_t, uint8_t *, int64_t) {}
    PQ_MEMBER void stage_4_cells_16(const uint8_t *, const uint8_t *, const uint8_t *, const uint8_t *, uint8_t *, int64_t) {}
    enum { STAGES_4_CELLS = 0 };

    template <int DSUB>
    PQ_MEMBER void gather_cells(const uint16_t * c, const uint8_t * codes, T * out) {
        for (int t = 0; t < 8; t++) {
            for (int e = 0; e < DSUB; e++) {
                out[e].v[t] = pq_f16_to_f32(c[DSUB * codes[8 * t] + e]);
            }
        }
    }
};

#endif

#if defined(__AVX512F__) && !defined(PQ_SCALAR)

struct pq_vec16 {
    using T = __m512;
    enum { N = 16, MR = 12 /* 12 x 2 of 32 registers hold sums: enough in flight for two units of latency 4 */ };

    PQ_MEMBER T    zero()                       { return _mm512_setzero_ps(); }
    PQ_MEMBER T    set1(float f)                { return _mm512_set1_ps(f); }
    PQ_MEMBER T    load(const float * p)        { return _mm512_loadu_ps(p); }
    PQ_MEMBER void store(float * p, T a)        { _mm512_storeu_ps(p, a); }
    PQ_MEMBER T    add(T a, T b)                { return _mm512_add_ps(a, b); }
    PQ_MEMBER T    sub(T a, T b)                { return _mm512_sub_ps(a, b); }
    PQ_MEMBER T    mul(T a, T b)                { return _mm512_mul_ps(a, b); }
    PQ_MEMBER T    div(T a, T b)                { return _mm512_div_ps(a, b); }
    PQ_MEMBER T    fma(T a, T b, T c)           { return _mm512_fmadd_ps(a, b, c); }
    PQ_MEMBER T    madd(T a, T b, T c)          { return _mm512_fmadd_ps(a, b, c); }
    PQ_MEMBER T    max(T a, T b)                { return _mm512_max_ps(a, b); }
    PQ_MEMBER T    min(T a, T b)                { return _mm512_min_ps(a, b); }
    PQ_MEMBER T    if_lt(T a, T b, T x, T y)    { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x); }
    PQ_MEMBER T    if_eq(T a, T b, T x, T y)    { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), y, x); }
    PQ_MEMBER uint32_t mask_le(T a, T b)        { return (uint32_t) _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
    PQ_MEMBER T    round(T a)                   { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    PQ_MEMBER T    iota()                       { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
    PQ_MEMBER T    load_f16(const uint16_t * p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }

    PQ_MEMBER T pow2(T n) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
    }

    PQ_MEMBER void unzip(T a, T b, T * even, T * odd) {
        const __m512i e = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i o = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
        *even = _mm512_permutex2var_ps(a, e, b);
        *odd  = _mm512_permutex2var_ps(a, o, b);
    }

    // The centroids at c, one per lane, element e in x[e]; in the order of centroid_lanes(), which saves shuffles across halves
    template <int DSUB>
    PQ_MEMBER void load_centroids(const uint16_t * c, T * x) {
        if constexpr (DSUB == 2) {
            const T a = load_f16(c), b = load_f16(c + N);
            x[0] = _mm512_shuffle_ps(a, b, 0x88);
            x[1] = _mm512_shuffle_ps(a, b, 0xdd);
        } else {
            const T a = load_f16(c), b = load_f16(c + N), d = load_f16(c + 2 * N), e = load_f16(c + 3 * N);
            const T ab_lo = _mm512_unpacklo_ps(a, b), ab_hi = _mm512_unpackhi_ps(a, b);
            const T de_lo = _mm512_unpacklo_ps(d, e), de_hi = _mm512_unpackhi_ps(d, e);
            x[0] = _mm512_shuffle_ps(ab_lo, de_lo, 0x44);
            x[1] = _mm512_shuffle_ps(ab_lo, de_lo, 0xee);
            x[2] = _mm512_shuffle_ps(ab_hi, de_hi, 0x44);
            x[3] = _mm512_shuffle_ps(ab_hi, de_hi, 0xee);
        }
    }
    template <int DSUB>
    PQ_MEMBER T centroid_lanes() {
        return DSUB == 2 ? _mm512_setr_ps(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
                         : _mm512_setr_ps(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    }

    PQ_MEMBER float hmax(T a) { return _mm512_reduce_max_ps(a); }
    PQ_MEMBER float hmin(T a) { return _mm512_reduce_min_ps(a); }
    PQ_MEMBER float hsum(T a) { return _mm512_reduce_add_ps(a); }
};

#endif

} // namespace
