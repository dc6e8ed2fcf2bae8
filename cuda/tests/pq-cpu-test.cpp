// Tests and times the CPU kernels.
//
//   pq-cpu-test          every kernel on every instruction set of this processor, against plain loops in double precision
//   pq-cpu-test bench [codebook|encode|decode|prefill|kmeans]
//                        single-thread times: median and spread, and the ratio to a plain f16 loop
//   pq-cpu-test all      both, the times only when every check held
#include "../cpu/pq-c.h"
#include "../pq/pq-codebook.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <limits>
#include <set>
#include <string>
#include <vector>

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#include <immintrin.h>
#define HAVE_F16_LOOP 1
#endif

static int n_failed = 0;
static int n_checks = 0;

static void check(bool ok, const char * fmt, ...) {
    n_checks++;
    if (ok) {
        return;
    }
    n_failed++;
    va_list args;
    va_start(args, fmt);
    printf("FAILED: ");
    vprintf(fmt, args);
    printf("\n");
    va_end(args);
    if (n_failed > 20) {
        printf("too many failures\n");
        exit(1);
    }
}

// ---- random numbers that are the same everywhere ----

struct rng {
    uint64_t s;
    explicit rng(uint64_t seed) : s(seed * 0x9e3779b97f4a7c15u + 1) {}
    uint64_t next() {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        return s;
    }
    int   below(int n) { return (int) (next() >> 33) % n; }
    float uniform()    { return (float) (next() >> 40) * 0x1p-24f * 2.0f - 1.0f; }
    float normal()     { return (uniform() + uniform() + uniform()) * 1.0f; }
};

// ---- halves ----

static double f16_value(uint16_t h) {
    const int    e = h >> 10 & 31;
    const double m = h & 1023;
    const double v = e == 31 ? (m != 0 ? NAN : INFINITY) : e == 0 ? ldexp(m, -24) : ldexp(m + 1024, e - 25);
    return h & 0x8000 ? -v : v;
}

static uint16_t to_f16(double f) { // to nearest even
    const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
    const double   a    = std::fabs(f);
    if (std::isnan(f)) {
        return sign | 0x7e00;
    }
    if (a >= 65520.0) {
        return sign | 0x7c00;
    }
    int e = 0;
    if (a == 0.0 || (std::frexp(a, &e), e < -13)) {
        return sign | (uint16_t) std::nearbyint(ldexp(a, 24));
    }
    const int m = (int) std::nearbyint(ldexp(a, 11 - e)); // 1024..2048
    return (uint16_t) (sign + ((e + 14) << 10) + (m - 1024));
}

// ---- codebooks ----

static const char * type_names[] = { "pq4", "pq3", "pq2", "f16" };
static const int bits_per_element[] = { 4, 3, 2 };

// The subspaces of code j: said once more, so that pq-layout.h has something to be compared with.
static std::vector<int> subspaces_of(pq_type type, int D, int j) {
    if (type != PQ_TYPE_PQ3) {
        return { j };
    }
    const int n_single = D / 8 * 2, u = j < n_single ? j / 2 : j - n_single; // of every 8 elements
    return j < n_single ? std::vector<int>{ 4 * u + j % 2 } : std::vector<int>{ 4 * u + 2, 4 * u + 3 };
}

struct codebook {
    pq_type type;
    int     D, H;
    bool    transform;
    std::vector<uint8_t> blob, blocks;
    std::vector<double>  T, T_inv; // [H][D][D]

    pq_codebook_layout layout() const { return pq_get_codebook_layout(D, transform); }
    const uint8_t  * block(int h)     const { return blocks.data() + (size_t) h * layout().head_bytes; }
    const float    * mu(int h)        const { return (const float *) (block(h) + layout().mu); }
    const uint16_t * T_bits(int h)     const { return (const uint16_t *) (block(h) + layout().T); }
    const uint16_t * T_inv_bits(int h) const { return (const uint16_t *) (block(h) + layout().T_inv); }
    const uint16_t * centroids(int h) const { return (const uint16_t *) (block(h) + layout().centroids); }
    const float    * aniso(int h)     const { return (const float *) (block(h) + layout().aniso); }
    void set_aniso(int h, int i, float value) { ((float *) (blocks.data() + (size_t) h * layout().head_bytes + layout().aniso))[i] = value; }

    // y^ of a code string, in double
    void decode_y(int h, const uint8_t * codes, double * y) const {
        const pq_spec s = pq_get_spec(type);
        for (int m = 0; m < D / s.dsub; m++) {
            for (int e = 0; e < s.dsub; e++) {
                y[m * s.dsub + e] = f16_value(centroids(h)[((size_t) m * PQ_KSUB + pq_code_get(type, D, codes, m)) * s.dsub + e]);
            }
        }
    }
    void decode_x(int h, const uint8_t * codes, double * x) const {
        std::vector<double> y(D);
        decode_y(h, codes, y.data());
        for (int i = 0; i < D; i++) {
            x[i] = mu(h)[i];
            if (!transform) {
                x[i] += y[i];
                continue;
            }
            for (int j = 0; j < D; j++) {
                x[i] += y[j] * T_inv[((size_t) h * D + j) * D + i];
            }
        }
    }
};

static uint32_t crc32(const uint8_t * p, size_t n) { // bit by bit: not the table of the code under test
    uint32_t c = 0xffffffffu;
    for (size_t i = 0; i < n; i++) {
        c ^= p[i];
        for (int k = 0; k < 8; k++) {
            c = c & 1 ? c >> 1 ^ 0xedb88320u : c >> 1;
        }
    }
    return ~c;
}

static void put(std::vector<uint8_t> & v, uint64_t x, int n_bytes) {
    for (int i = 0; i < n_bytes; i++) {
        v.push_back((uint8_t) (x >> (8 * i)));
    }
}

static std::vector<uint8_t> make_blob(pq_type type, int D, int H, bool transform, rng & r) {
    const pq_spec s = pq_get_spec(type);
    std::vector<uint8_t> payload;
    for (int h = 0; h < H; h++) {
        for (int i = 0; i < D; i++) {
            const float f = 0.3f * r.normal();
            uint32_t bits;
            memcpy(&bits, &f, 4);
            put(payload, bits, 4);
        }
        if (transform) { // close to a permutation, with a spread of scales: well conditioned and not symmetric
            for (int i = 0; i < D; i++) {
                for (int j = 0; j < D; j++) {
                    const bool on = h % 2 ? (i + D / 2 - 1) % D == j : i == j; // off the diagonal the inversion must swap rows
                    put(payload, to_f16((on ? 0.5f + (float) (i % 7) * 0.2f : 0.0f) + 0.4f * r.normal() / sqrtf((float) D)), 2);
                }
            }
        }
        int twins[8];
        for (int m = 0; m < D / s.dsub; m++) {
            std::vector<uint16_t> c;
            for (int k = 0; k < PQ_KSUB * s.dsub; k++) {
                c.push_back(to_f16(1.2f * r.normal()));
            }
            for (int & t : twins) { // the same in subspaces that share a code
                t = type == PQ_TYPE_PQ3 && m % 4 == 3 ? t : r.below(PQ_KSUB);
            }
            for (int t = 0; t < 8; t += 2) { // some centroids occur twice
                for (int e = 0; e < s.dsub; e++) {
                    c[twins[t] * s.dsub + e] = c[twins[t + 1] * s.dsub + e];
                }
            }
            for (uint16_t x : c) {
                put(payload, x, 2);
            }
        }
    }
    std::vector<uint8_t> blob = { 'M', 'P', 'Q', 'B' };
    put(blob, 2, 4);
    put(blob, D, 2);
    put(blob, H, 2);
    put(blob, D / s.dsub, 2);
    put(blob, s.dsub, 2);
    put(blob, D * bits_per_element[type] / 8, 2);
    put(blob, transform ? 1 : 0, 2);
    put(blob, payload.size(), 4);
    put(blob, crc32(payload.data(), payload.size()), 4);
    put(blob, 0, 4);
    blob.insert(blob.end(), payload.begin(), payload.end());
    return blob;
}

static codebook make_codebook(pq_type type, int D, int H, bool transform, uint64_t seed) {
    rng r(seed);
    codebook cb;
    cb.type      = type;
    cb.D         = D;
    cb.H         = H;
    cb.transform = transform;
    cb.blob      = make_blob(type, D, H, transform, r);
    cb.blocks.resize(million_pq_codebook_bytes(type, D, H, transform));
    char err[256] = "";
    const int rc = million_pq_codebook_build(type, cb.blob.data(), cb.blob.size(), D, H, cb.blocks.data(), cb.blocks.size(), err, sizeof(err));
    check(rc == 0, "codebook %s D %d: %s", type_names[type], D, err);
    for (int h = 0; transform && h < H; h++) {
        for (int i = 0; i < D * D; i++) {
            cb.T.push_back(f16_value(cb.T_bits(h)[i]));
            cb.T_inv.push_back(f16_value(cb.T_inv_bits(h)[i]));
        }
    }
    return cb;
}

// Gauss-Jordan with the identity beside it: not the method of the code under test
static std::vector<double> inverse(const double * T, int n) {
    std::vector<double> a((size_t) n * 2 * n, 0.0), inv((size_t) n * n);
    for (int i = 0; i < n; i++) {
        std::copy(T + (size_t) i * n, T + (size_t) (i + 1) * n, &a[(size_t) i * 2 * n]);
        a[(size_t) i * 2 * n + n + i] = 1.0;
    }
    for (int k = 0; k < n; k++) {
        int pivot = k;
        for (int r = k; r < n; r++) {
            pivot = std::fabs(a[(size_t) r * 2 * n + k]) > std::fabs(a[(size_t) pivot * 2 * n + k]) ? r : pivot;
        }
        for (int j = 0; j < 2 * n; j++) {
            std::swap(a[(size_t) k * 2 * n + j], a[(size_t) pivot * 2 * n + j]);
        }
        for (int j = 2 * n - 1; j >= k; j--) {
            a[(size_t) k * 2 * n + j] /= a[(size_t) k * 2 * n + k];
        }
        for (int r = 0; r < n; r++) {
            const double f = r == k ? 0.0 : a[(size_t) r * 2 * n + k];
            for (int j = k; j < 2 * n; j++) {
                a[(size_t) r * 2 * n + j] -= f * a[(size_t) k * 2 * n + j];
            }
        }
    }
    for (int i = 0; i < n * n; i++) {
        inv[i] = a[(size_t) (i / n) * 2 * n + n + i % n];
    }
    return inv;
}

static std::vector<std::string> simd_names() {
    std::vector<std::string> names;
    for (const char * n : { "scalar", "avx2", "avx512" }) {
        if (pq_cpu_simd_set(n) == 0) {
            names.push_back(n);
        }
    }
    return names;
}

// ---- codebook tests ----

static void test_codebook() {
    rng r(1);
    std::vector<uint8_t> out;
    check(pq_base64_decode("", 0, out) && out.empty(), "base64 of nothing");
    check(pq_base64_decode("TWFu", 4, out) && out.size() == 3 && memcmp(out.data(), "Man", 3) == 0, "base64 of 3 bytes");
    check(pq_base64_decode("TWE=", 4, out) && out.size() == 2 && memcmp(out.data(), "Ma", 2) == 0, "base64 of 2 bytes");
    check(pq_base64_decode("TQ==", 4, out) && out.size() == 1 && out[0] == 'M', "base64 of 1 byte");
    for (const char * bad : { "TWF", "TW Fu", "T===", "====", "TW=u", "TWF\n", "TWF-", "TR==", "TWE=TWFu" }) {
        check(!pq_base64_decode(bad, strlen(bad), out), "base64 takes '%s'", bad);
    }

    for (int type = 0; type < PQ_TYPE_COUNT; type++) {
        for (int D : { 8, 24, 64, 128, 256 }) {
            const int n_codes = (int) pq_head_bytes((pq_type) type, D);
            check(n_codes == D * bits_per_element[type] / 8, "%d codes of %s, D %d", n_codes, type_names[type], D);
            std::set<int> subspaces;
            for (int j = 0; j < n_codes; j++) {
                for (int m : subspaces_of((pq_type) type, D, j)) {
                    check(subspaces.insert(m).second && pq_code_index((pq_type) type, D, m) == j, "subspace %d of %s has code %d, needs %d", m,
                          type_names[type], pq_code_index((pq_type) type, D, m), j);
                }
            }
            check((int) subspaces.size() == pq_n_subspaces((pq_type) type, D) && *subspaces.rbegin() == (int) subspaces.size() - 1,
                  "%zu subspaces of %s have a code, D %d", subspaces.size(), type_names[type], D);
            for (bool transform : { false, true }) {
                const codebook cb = make_codebook((pq_type) type, D, 2, transform, 7 + D);
                for (int h = 0; transform && h < 2; h++) {
                    const uint8_t * T_file = cb.blob.data() + 32 + cb.blob.size() / 2 * h - 16 * h + D * 4;
                    check(memcmp(cb.T_bits(h), T_file, (size_t) D * D * 2) == 0, "T is not the file's, D %d", D);
                    const std::vector<double> exact = inverse(&cb.T[(size_t) h * D * D], D);
                    int n_off = 0, n_far = 0;
                    for (int i = 0; i < D * D; i++) {
                        const int ulps = std::abs((int) to_f16(exact[i]) - (int) cb.T_inv_bits(h)[i]);
                        n_off += ulps != 0;
                        n_far += ulps > 1;
                    }
                    // a value within 1e-13 of the middle of two halves may go either way
                    check(n_off <= 1 && n_far == 0, "%d elements of T^-1 are not the nearest halves, D %d", n_off, D);
                }
            }
        }
    }

    const codebook good = make_codebook(PQ_TYPE_PQ4, 64, 2, true, 3);
    auto refused = [&](std::vector<uint8_t> blob, bool fix_crc, const char * needle) {
        if (fix_crc && blob.size() > PQ_BLOB_HEADER_BYTES) {
            const uint32_t c = crc32(blob.data() + 32, blob.size() - 32);
            memcpy(&blob[24], &c, 4);
        }
        std::vector<uint8_t> dst(good.blocks.size());
        char err[256] = "";
        const int rc = million_pq_codebook_build(PQ_TYPE_PQ4, blob.data(), blob.size(), 64, 2, dst.data(), dst.size(), err, sizeof(err));
        check(rc != 0 && strstr(err, needle), "a bad blob should be refused for its %s, got %d '%s'", needle, rc, err);
    };
    auto with = [&](size_t at, std::vector<uint8_t> bytes) {
        std::vector<uint8_t> b = good.blob;
        std::copy(bytes.begin(), bytes.end(), b.begin() + (ptrdiff_t) at);
        return b;
    };
    const size_t payload = 32, T = 32 + 64 * 4, cents = T + 64 * 64 * 2;
    refused({}, false, "size");
    refused({ good.blob.begin(), good.blob.begin() + 31 }, false, "size");
    refused(with(0, { 'X' }), false, "magic");
    refused(with(4, { 1 }), false, "version");
    refused(with(4, { 3 }), false, "version");
    refused(with(8, { 63 }), false, "head size");
    refused(with(8, { 0, 0xff }), false, "head size");
    refused(with(8, { 128 }), false, "shape");
    refused(with(10, { 0 }), false, "KV heads");
    refused(with(10, { 3 }), false, "payload");
    refused(with(12, { 31 }), false, "subspaces");
    refused(with(14, { 4 }), false, "shape");
    refused(with(16, { 8 }), false, "shape"); // what version 1 had there
    refused(with(16, { 24 }), false, "shape");
    refused(make_blob(PQ_TYPE_PQ3, 64, 2, true, r), false, "shape"); // differs from one of pq4 in nothing else
    refused(with(18, { 4 }), false, "flags");
    refused(with(18, { 3 }), false, "payload");
    refused(with(18, { 0 }), false, "payload");
    refused(with(20, { 0xff, 0xff, 0xff, 0xff }), false, "payload");
    refused(with(28, { 1 }), false, "reserved");
    refused(with(payload + 5, { 0x55 }), false, "checksum");
    refused({ good.blob.begin(), good.blob.end() - 1 }, false, "payload");
    refused(with(payload, { 0, 0, 0x80, 0x7f }), true, "mu");
    refused(with(T, { 0, 0x7e }), true, "T");
    refused(with(cents, { 0, 0xfc }), true, "centroid");
    {
        const auto row0 = good.blob.begin() + (ptrdiff_t) T;
        refused(with(T + 128, { row0, row0 + 128 }), true, "singular"); // two equal rows of T
        refused(with(T, std::vector<uint8_t>(128, 0)), true, "singular");
    }
    std::vector<uint8_t> diagonal((size_t) 64 * 64 * 2, 0); // of 1e-5, whose inverse is beyond the largest half
    for (size_t i = 0; i < 64; i++) {
        const uint16_t h = to_f16(1e-5);
        memcpy(&diagonal[(i * 64 + i) * 2], &h, 2);
    }
    refused(with(T, diagonal), true, "65504");

    // An anisotropy goes between T and the centroids, and to its own part of a block; without one it is 0.
    std::vector<uint8_t> aniso(good.blob.begin(), good.blob.begin() + 32);
    const size_t head = (good.blob.size() - 32) / 2;
    codebook other = good;
    for (int h = 0; h < 2; h++) {
        const auto at = good.blob.begin() + (ptrdiff_t) (32 + h * head);
        aniso.insert(aniso.end(), at, at + (ptrdiff_t) (cents - 32));
        for (int i = 0; i < 64; i++) {
            const float f = (float) (i - 7 * h) * 0.37f;
            uint32_t bits;
            memcpy(&bits, &f, 4);
            put(aniso, bits, 4);
            check(good.aniso(h)[i] == 0.0f, "a blob without anisotropy has one, head %d", h);
            other.set_aniso(h, i, f);
        }
        aniso.insert(aniso.end(), at + (ptrdiff_t) (cents - 32), at + (ptrdiff_t) head);
    }
    aniso[18] = PQ_BLOB_TRANSFORM | PQ_BLOB_ANISO;
    auto finish = [](std::vector<uint8_t> b) {
        const uint32_t n = (uint32_t) b.size() - 32, c = crc32(b.data() + 32, b.size() - 32);
        memcpy(&b[20], &n, 4);
        memcpy(&b[24], &c, 4);
        return b;
    };
    aniso = finish(aniso);
    std::vector<uint8_t> blocks(good.blocks.size());
    char err[256] = "";
    check(million_pq_codebook_build(PQ_TYPE_PQ4, aniso.data(), aniso.size(), 64, 2, blocks.data(), blocks.size(), err, sizeof(err)) == 0,
          "a blob with an anisotropy: %s", err);
    check(blocks == other.blocks, "the anisotropy of a blob is not that of its block");
    const uint8_t nan[] = { 0, 0, 0xc0, 0x7f };
    std::copy(nan, nan + 4, aniso.begin() + (ptrdiff_t) cents);
    refused(finish(aniso), false, "anisotropy");
    aniso.resize(aniso.size() - 4);
    refused(finish(aniso), false, "payload");
}

// ---- encode and decode ----

// The lookup tables: by index, the same centroids; rows of K with the first halves of the quarters first, and all of pq3 with what has
// a code of its own first.
static void test_tables() {
    for (int t = 0; t < PQ_TYPE_COUNT; t++) {
        const pq_spec  s  = pq_get_spec((pq_type) t);
        const codebook cb = make_codebook((pq_type) t, 128, 2, t != 1, 5);
        check(pq_table_bytes(64) == 0, "tables of D 64 are of no use");
        for (int is_v = 0; is_v < 2; is_v++) {
            std::vector<uint16_t> tables(2 * pq_table_bytes(128) / 2, 0xffff);
            pq_build_tables((pq_type) t, 128, 2, cb.transform, is_v, cb.blocks.data(), (uint8_t *) tables.data());
            std::vector<int> seen(128);
            for (int i = 0; i < 128; i++) {
                const int place = pq_table_place((pq_type) t, is_v, i);
                seen[place]++;
                const int half  = t == PQ_TYPE_PQ3 ? i % 8 / 4 : i % 32 / 16;
                check(is_v && t != PQ_TYPE_PQ3 ? place == i : place / 64 == half && place % 64 / 16 == i / 32,
                      "element %d of %s is in the wrong place of the row: %d", i, type_names[t], place);
                for (int h = 0; h < 2; h++) {
                    for (int c = 0; c < PQ_KSUB; c++) {
                        check(tables[((size_t) h * PQ_KSUB + c) * 128 + place] == cb.centroids(h)[(i / s.dsub * PQ_KSUB + c) * s.dsub + i % s.dsub],
                              "table of %s, head %d, centroid %d, element %d", type_names[t], h, c, i);
                    }
                }
            }
            check(std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; }), "an element has no place of its own in a row");
        }
    }
}

// Code j of y in floats: squared distances summed from the left, not fused, the lowest of equals.
static int code_in_floats(const codebook & cb, int h, int j, const float * y) {
    const int dsub = pq_get_spec(cb.type).dsub;
    float best = INFINITY;
    int   code = 0;
    for (int k = 0; k < PQ_KSUB; k++) {
        volatile float dist = 0.0f, square; // keep the compiler from fusing
        for (int m : subspaces_of(cb.type, cb.D, j)) {
            for (int e = 0; e < dsub; e++) {
                const float v = y[m * dsub + e] - (float) f16_value(cb.centroids(h)[((size_t) m * PQ_KSUB + k) * dsub + e]);
                square = v * v;
                dist   = dist + square;
            }
        }
        if (dist < best) {
            best = dist;
            code = k;
        }
    }
    return code;
}

// Distances that only rounding tells apart: every centroid is there a second time with its elements in reverse, and every y has equal
// elements, so that the two are summed in opposite orders.
static void test_encode_order() {
    for (int type = 0; type < PQ_TYPE_COUNT; type++) {
        const int D = 64, n_rows = 301, dsub = pq_get_spec((pq_type) type).dsub, n_codes = (int) pq_head_bytes((pq_type) type, D);
        codebook cb = make_codebook((pq_type) type, D, 1, false, 77);
        memset(cb.blocks.data() + cb.layout().mu, 0, (size_t) D * 4);
        uint16_t * centroids = (uint16_t *) (cb.blocks.data() + cb.layout().centroids);
        for (int j = 0; j < n_codes; j++) {
            const std::vector<int> sub = subspaces_of((pq_type) type, D, j);
            const int n = (int) sub.size() * dsub;
            auto at = [&](int k, int e) -> uint16_t & { return centroids[((size_t) sub[e / dsub] * PQ_KSUB + k) * dsub + e % dsub]; };
            for (int k = 0; k < PQ_KSUB / 2; k++) {
                for (int e = 0; e < n; e++) {
                    at(PQ_KSUB - 1 - k, e) = at(k, n - 1 - e);
                }
            }
        }
        std::vector<float> x((size_t) n_rows * D);
        for (int i = 0; i < n_rows * D; i++) {
            x[i] = (float) f16_value(to_f16(((double) (i / D) - 150.0) / 97.0));
        }
        for (const std::string & name : simd_names()) {
            pq_cpu_simd_set(name.c_str());
            for (int n_at_once : { 1, n_rows }) {
                std::vector<uint8_t> codes((size_t) n_rows * n_codes);
                pq_encode_params p = {};
                p.type             = (pq_type) type;
                p.D                = D;
                p.n_head_kv        = 1;
                p.n_rows           = n_at_once;
                p.codebook         = cb.blocks.data();
                p.x_head_stride    = p.x_row_stride = (size_t) D * 4;
                p.codes_row_stride = (size_t) n_codes;
                int n_other = 0;
                for (int i = 0; i < n_rows; i += n_at_once) {
                    p.x     = &x[(size_t) i * D];
                    p.codes = &codes[(size_t) i * n_codes];
                    million_pq_encode(&p, 1);
                }
                for (int i = 0; i < n_rows * n_codes; i++) {
                    n_other += codes[i] != code_in_floats(cb, 0, i % n_codes, &x[(size_t) (i / n_codes) * D]);
                }
                check(n_other == 0, "%s: %d codes of %s in rows of %d are not those that floats give, summed from the left", name.c_str(), n_other,
                      type_names[type], n_at_once);
            }
        }
    }
}

// The codes of one row y, in floats and one operation at a time: those of pq-layout.h, "Anisotropic codes". Counts strips that took their second codes.
static std::vector<uint8_t> aniso_codes_in_floats(const codebook & cb, int h, const float * y, int & n_taken) {
    const int D = cb.D, dsub = pq_get_spec(cb.type).dsub, n_codes = (int) pq_head_bytes(cb.type, D);
    auto nearest = [&](const float * to) {
        std::vector<uint8_t> codes(n_codes);
        for (int j = 0; j < n_codes; j++) { codes[j] = (uint8_t) code_in_floats(cb, h, j, to); }
        return codes;
    };
    struct strip { volatile float sum[3]; float cost; };
    auto sum = [&](const std::vector<uint8_t> & codes, int d0) {
        float a[3][32] = {};
        for (int i = 0; i < 32 && d0 + i < D; i++) {
            const int m = (d0 + i) / dsub;
            volatile float d = cb.aniso(h)[d0 + i] * y[d0 + i];
            volatile float e = y[d0 + i] - (float) f16_value(cb.centroids(h)[((size_t) m * PQ_KSUB + pq_code_get(cb.type, D, codes.data(), m)) * dsub + (d0 + i) % dsub]);
            a[0][i] = e * e; a[1][i] = e * d; a[2][i] = d * d;
        }
        strip s;
        for (int k = 0; k < 3; k++) {
            for (int n = 16; n > 0; n /= 2) {
                for (int i = 0; i < n; i++) { s.sum[k] = a[k][i] + a[k][i + n]; a[k][i] = s.sum[k]; }
            }
        }
        volatile float u = s.sum[1] / s.sum[2], uu = s.sum[1] * u, w = 3.0f * uu;
        s.cost = s.sum[0] + w;
        return s;
    };
    std::vector<uint8_t> codes = nearest(y);
    std::vector<float>   moved(y, y + D);
    for (int i = 0; i < D; i++) {
        const strip s = sum(codes, i / 32 * 32);
        volatile float u = s.sum[1] / s.sum[2], step = 0.75f * u, d = cb.aniso(h)[i] * y[i], by = step * d;
        moved[i] = y[i] + by;
    }
    const std::vector<uint8_t> first = codes, second = nearest(moved.data());
    for (int j = 0; j < n_codes; j++) {
        const int d0 = subspaces_of(cb.type, D, j)[0] * dsub / 32 * 32;
        if (sum(second, d0).cost < sum(first, d0).cost) {
            codes[j] = second[j];
            n_taken++;
        }
    }
    return codes;
}

static void test_encode_aniso() {
    for (int type = 0; type < PQ_TYPE_COUNT; type++) {
        for (int D : { 8, 80, 128 }) { // one strip, a short last one, whole ones
            for (bool transform : { false, true }) {
                const int H = 3, n_rows = 37, n_codes = (int) pq_head_bytes((pq_type) type, D);
                codebook cb = make_codebook((pq_type) type, D, H, transform, 300 + D);
                const codebook plain = cb;
                rng r(D * 2 + transform);
                for (int i = 0; i < D; i++) { // head 0: all; head 1: none; head 2: the first strip only, and there not all
                    cb.set_aniso(0, i, r.normal());
                    cb.set_aniso(2, i, i < 32 && i % 3 ? 0.1f + r.normal() : 0.0f);
                }
                std::vector<float> x((size_t) n_rows * H * D);
                for (float & f : x) { f = 1.5f * r.normal(); }
                for (int i = 0; i < H * D; i++) { // on the mean: no direction; and what has no finite sums
                    x[(size_t) 3 * H * D + i] = cb.mu(i / D)[i % D];
                    x[(size_t) 5 * H * D + i] = i % 7 == 3 ? NAN : x[(size_t) 5 * H * D + i];
                    x[(size_t) 6 * H * D + i] = i % 7 == 4 ? 65504.0f : -65504.0f;
                }
                std::vector<uint8_t> first, without;
                for (const std::string & name : simd_names()) {
                    pq_cpu_simd_set(name.c_str());
                    for (const codebook * c : { (const codebook *) &cb, &plain }) {
                        for (int n_at_once : { 1, 3, n_rows }) {
                            std::vector<uint8_t> codes((size_t) n_rows * H * n_codes);
                            for (int i = 0; i < n_rows; i += n_at_once) {
                                pq_encode_params p = {};
                                p.type             = (pq_type) type;
                                p.D                = D;
                                p.n_head_kv        = H;
                                p.n_rows           = std::min(n_at_once, n_rows - i);
                                p.codebook         = c->blocks.data();
                                p.has_transform    = transform;
                                p.x                = &x[(size_t) i * H * D];
                                p.x_head_stride    = (size_t) D * 4;
                                p.x_row_stride     = (size_t) H * D * 4;
                                p.codes            = &codes[(size_t) i * H * n_codes];
                                p.codes_row_stride = (size_t) H * n_codes;
                                million_pq_encode(&p, 1);
                            }
                            std::vector<uint8_t> & want = c == &cb ? first : without;
                            if (want.empty()) { want = codes; }
                            check(codes == want, "%s anisotropic codes of %s D %d, %d rows at once, differ from %s's", name.c_str(), type_names[type], D,
                                  n_at_once, simd_names()[0].c_str());
                        }
                    }
                }
                int n_other = 0, n_taken = 0, n_plain = 0;
                for (int i = 0; i < n_rows; i++) {
                    for (int h = 0; h < H; h++) {
                        std::vector<float> y(D, 0.0f);
                        for (int a = 0; a < D; a++) {
                            const float c = (float) f16_value(to_f16(x[((size_t) i * H + h) * D + a])) - cb.mu(h)[a];
                            for (int b = 0; transform && b < D; b++) { y[b] = fmaf(c, (float) cb.T[((size_t) h * D + a) * D + b], y[b]); }
                            y[a] = transform ? y[a] : c;
                        }
                        const uint8_t * found = &first[((size_t) i * H + h) * n_codes];
                        const std::vector<uint8_t> want = aniso_codes_in_floats(cb, h, y.data(), n_taken);
                        n_other += memcmp(found, want.data(), n_codes) != 0;
                        n_plain += h == 1 && memcmp(found, &without[((size_t) i * H + h) * n_codes], n_codes) != 0;
                    }
                }
                check(n_other == 0, "%d rows of %s D %d do not have the anisotropic codes that floats give", n_other, type_names[type], D);
                check(n_plain == 0, "%d rows of a head without anisotropy have other codes than before, %s D %d", n_plain, type_names[type], D);
                check(D < 64 || n_taken > n_rows, "only %d codes of %s D %d came from the second search", n_taken, type_names[type], D);
            }
        }
    }
}

static void test_encode_decode() {
    const std::vector<std::string> simd = simd_names();
    for (int type = 0; type < PQ_TYPE_COUNT; type++) {
        const pq_spec spec = pq_get_spec((pq_type) type);
        for (int D : { 8, 24, 64, 80, 96, 128, 192, 256 }) {
            for (int variant = 0; variant < 4; variant++) {
                const bool transform = variant & 1, x_f16 = variant & 2;
                const int  H = 3, n_rows = D == 128 ? 70 : 7, n_cells = n_rows + 9;
                const int  n_codes = D * bits_per_element[type] / 8;
                const codebook cb = make_codebook((pq_type) type, D, H, transform, 100 + D);
                rng r(D * 4 + variant);

                std::vector<float>    x((size_t) n_rows * H * D);
                std::vector<uint16_t> x16(x.size());
                for (float & f : x) {
                    f = r.normal() * 1.5f;
                }
                for (int d = 0; d < D; d++) { // row 0 stands on centroids when there is no transform
                    const int m = d / spec.dsub, k = pq_code_index((pq_type) type, D, m);
                    x[d] = cb.mu(0)[d] + (float) f16_value(cb.centroids(0)[((size_t) m * PQ_KSUB + k) * spec.dsub + d % spec.dsub]);
                }
                // the last row: at and around the ends of f16, and halfway between halves
                const float hard[] = { 65504.0f, 65519.99f, 65520.0f, -65520.0f, 1e9f, -INFINITY, NAN, 0.0f, -0.0f, 1e-45f, 0x1p-25f,
                                       0x1.000002p-25f, -0x1.8p-24f, 0x1.ffcp-15f, 0x1.ffep-15f, 0x1.002p0f, 0x1.006p0f, 2049.0f, 2051.0f };
                for (int i = 0; i < H * D; i++) {
                    x[(size_t) (n_rows - 1) * H * D + i] = hard[i % (sizeof(hard) / sizeof(hard[0]))];
                }
                for (size_t i = 0; i < x.size(); i++) {
                    x16[i] = to_f16(x[i]);
                }
                std::vector<int64_t> cells(n_cells);
                for (int i = 0; i < n_cells; i++) {
                    cells[i] = i;
                }
                for (int i = n_cells - 1; i > 0; i--) {
                    std::swap(cells[i], cells[r.below(i + 1)]);
                }

                const size_t head_bytes = pq_head_bytes((pq_type) type, D), row_bytes = head_bytes * H + 5;
                const size_t slot_bytes = (size_t) H * D * 2 + 6;
                std::vector<int64_t> slots(n_rows); // every third row is not kept, the others fill slots from behind
                int n_slots = 1;
                for (int i = n_rows - 1; i >= 0; i--) {
                    slots[i] = i % 3 == 1 ? -1 - i : n_slots++;
                }
                std::vector<uint8_t> want_tail(slot_bytes * (n_slots + 1), 0xdd);
                for (int i = 0; i < n_rows; i++) {
                    if (slots[i] >= 0) {
                        memcpy(&want_tail[slot_bytes * slots[i]], &x16[(size_t) i * H * D], (size_t) H * D * 2);
                    }
                }
                std::vector<uint8_t> first;
                for (const std::string & name : simd) {
                    pq_cpu_simd_set(name.c_str());
                    for (int n_threads : { 1, 3 }) {
                        std::vector<uint8_t> codes(row_bytes * n_cells, 0xee);
                        pq_encode_params p = {};
                        p.type             = (pq_type) type;
                        p.D                = D;
                        p.n_head_kv        = H;
                        p.n_rows           = n_rows;
                        p.codebook         = cb.blocks.data();
                        p.has_transform    = transform;
                        p.x                = x_f16 ? (const void *) x16.data() : x.data();
                        p.x_f16            = x_f16;
                        p.x_head_stride    = (size_t) D * (x_f16 ? 2 : 4);
                        p.x_row_stride     = p.x_head_stride * H;
                        p.codes            = codes.data();
                        p.codes_row_stride = row_bytes;
                        p.row_idx          = cells.data();
                        std::vector<uint8_t> tail(want_tail.size(), 0xdd);
                        if (n_threads == 3) {
                            p.tail            = tail.data();
                            p.tail_row_stride = slot_bytes;
                            p.tail_idx        = slots.data();
                        }
                        million_pq_encode(&p, n_threads);
                        check(n_threads == 1 || tail == want_tail, "%s tail of %s D %d does not hold the rows in f16", name.c_str(),
                              type_names[type], D);
                        if (first.empty()) {
                            first = codes;
                        }
                        check(codes == first, "%s codes of %s D %d differ from %s's", name.c_str(), type_names[type], D, simd[0].c_str());
                    }
                }
                for (int i = n_rows; i < n_cells; i++) {
                    const uint8_t * c = &first[row_bytes * cells[i]];
                    check(std::all_of(c, c + row_bytes, [](uint8_t b) { return b == 0xee; }), "encode wrote to a cell that it was not given");
                }

                // the nearest centroid, and the lowest of equals: in double, and the same code as loops over floats find
                int n_far = 0, n_tie = 0, n_other = 0;
                for (int i = 0; i < n_rows - 1; i++) {
                    for (int h = 0; h < H; h++) {
                        const uint16_t * xr = &x16[((size_t) i * H + h) * D];
                        std::vector<double> y(D, 0.0);
                        std::vector<float>  y32(D, 0.0f);
                        for (int a = 0; a < D; a++) {
                            const double c   = f16_value(xr[a]) - cb.mu(h)[a];
                            const float  c32 = (float) f16_value(xr[a]) - cb.mu(h)[a];
                            for (int b = 0; transform && b < D; b++) {
                                const double t = cb.T[((size_t) h * D + a) * D + b];
                                y[b] += c * t;
                                y32[b] = fmaf(c32, (float) t, y32[b]);
                            }
                            y[a]   = transform ? y[a] : c;
                            y32[a] = transform ? y32[a] : c32;
                        }
                        for (int j = 0; j < n_codes; j++) {
                            const std::vector<int> sub = subspaces_of((pq_type) type, D, j);
                            auto centroid = [&](int m, int k) { return cb.centroids(h) + ((size_t) m * PQ_KSUB + k) * spec.dsub; };
                            double dist[PQ_KSUB], best = INFINITY;
                            for (int k = 0; k < PQ_KSUB; k++) {
                                dist[k] = 0.0;
                                for (int m : sub) {
                                    for (int e = 0; e < spec.dsub; e++) {
                                        const double v = y[m * spec.dsub + e] - f16_value(centroid(m, k)[e]);
                                        dist[k] += v * v;
                                    }
                                }
                                best = std::min(best, dist[k]);
                            }
                            const int code = first[row_bytes * cells[i] + head_bytes * h + j];
                            n_other += code != code_in_floats(cb, h, j, y32.data());
                            n_far   += dist[code] > best + 1e-5 * (1.0 + sqrt(best));
                            for (int k = 0; k < code; k++) {
                                n_tie += std::all_of(sub.begin(), sub.end(), [&](int m) {
                                    return memcmp(centroid(m, k), centroid(m, code), 2 * spec.dsub) == 0;
                                });
                            }
                        }
                    }
                }
                check(n_far == 0, "%d codes of %s D %d are not the nearest", n_far, type_names[type], D);
                check(n_tie == 0, "%d ties of %s D %d do not go to the lowest code", n_tie, type_names[type], D);
                check(n_other == 0, "%d codes of %s D %d are not those that floats give, summed from the left", n_other, type_names[type], D);

                for (const std::string & name : simd) {
                    pq_cpu_simd_set(name.c_str());
                    std::vector<float> dec((size_t) n_cells * H * D + 3, -77.0f);
                    pq_decode_params p = {};
                    p.type             = (pq_type) type;
                    p.D                = D;
                    p.n_head_kv        = H;
                    p.n_rows           = n_cells;
                    p.codebook         = cb.blocks.data();
                    p.has_transform    = transform;
                    p.codes            = first.data();
                    p.codes_row_stride = row_bytes;
                    p.x                = dec.data();
                    p.x_head_stride    = (size_t) D * 4;
                    p.x_row_stride     = p.x_head_stride * H;
                    million_pq_decode(&p, 2);
                    double worst = 0.0;
                    std::vector<double> ref(D);
                    for (int i = 0; i < n_rows; i++) { // cells without codes hold 0xee, a valid code string as well
                        for (int h = 0; h < H; h++) {
                            cb.decode_x(h, &first[row_bytes * i + head_bytes * h], ref.data());
                            for (int d = 0; d < D; d++) {
                                worst = std::max(worst, std::fabs(ref[d] - dec[((size_t) i * H + h) * D + d]));
                            }
                        }
                    }
                    check(worst < 1e-4, "%s decode of %s D %d is off by %g", name.c_str(), type_names[type], D, worst);
                    check(dec.back() == -77.0f, "decode wrote past its end");
                }
            }
        }
    }
}

// ---- attention ----

struct attn_case {
    int  type_k, type_v; // PQ_TYPE_COUNT: f16
    int  D_k, D_v, n_head_kv, n_group, n_stream, n_q, n_kv;
    bool transform, sinks;
    int  mask; // 0 none, 1 causal with zeros, 2 random -inf, 3 random values, 4 per head and stream, 5 two windows, 6 all masked
    float max_bias, softcap;
    uint64_t seed;
    int  n_tail;
    int  tail_mask; // 0 random -inf, 1 nothing visible, 2 everything visible
    bool nans;      // what no query sees holds NaN, where it can: in the tail, and in plain rows

    std::string name() const {
        char t[320];
        snprintf(t, sizeof(t), "k %s v %s D %d/%d heads %dx%d streams %d n_q %d n_kv %d transform %d sinks %d mask %d alibi %g softcap %g "
                 "tail %d mask %d nans %d",
                 type_names[type_k], type_names[type_v], D_k, D_v, n_head_kv, n_group, n_stream, n_q, n_kv, transform, sinks, mask,
                 max_bias, softcap, n_tail, tail_mask, nans);
        return t;
    }
};

struct attn_side {
    int  type;
    int  D, H, n_kv, n_stream;
    codebook cb;
    std::vector<uint8_t> data;
    size_t head_stride, row_stride, stream_stride;
    bool   native_f16 = false; // read by the kernels themselves, and not through to_float

    attn_side(int type, int D, int H, int n_kv, int n_stream, bool transform, uint64_t seed)
        : type(type), D(D), H(H), n_kv(n_kv), n_stream(n_stream) {
        rng r(seed);
        if (type < PQ_TYPE_COUNT) {
            cb = make_codebook((pq_type) type, D, H, transform, seed);
            head_stride = pq_head_bytes((pq_type) type, D);
        } else {
            head_stride = (size_t) D * 2;
        }
        row_stride    = head_stride * H;
        stream_stride = row_stride * n_kv;
        data.resize(stream_stride * n_stream); // not one byte more: a sanitizer sees reads past the end
        if (type < PQ_TYPE_COUNT) {
            for (uint8_t & b : data) {
                b = (uint8_t) r.next();
            }
        } else {
            for (size_t i = 0; i < data.size(); i += 2) {
                const uint16_t h = to_f16(r.normal());
                memcpy(&data[i], &h, 2);
            }
        }
    }
    void set_nan(int stream, int cell) {
        for (size_t i = 0; i < row_stride; i += 2) {
            const uint16_t nan = i % 4 == 0 ? 0x7e00 : 0xfc00;
            memcpy(&data[stream * stream_stride + cell * row_stride + i], &nan, 2);
        }
    }
    pq_attn_side params() const {
        pq_attn_side s = {};
        s.type          = (pq_type) type;
        s.D             = D;
        s.codebook      = type < PQ_TYPE_COUNT ? cb.blocks.data() : nullptr;
        s.has_transform = type < PQ_TYPE_COUNT && cb.transform;
        s.data          = data.data();
        s.row_stride    = row_stride;
        s.head_stride   = head_stride;
        s.stream_stride = stream_stride;
        s.to_float      = type < PQ_TYPE_COUNT || native_f16 ? nullptr : million_pq_f16_to_float;
        return s;
    }
    void row(int stream, int cell, int h, double * x) const {
        const uint8_t * p = &data[stream * stream_stride + cell * row_stride + h * head_stride];
        if (type < PQ_TYPE_COUNT) {
            cb.decode_x(h, p, x);
            return;
        }
        for (int i = 0; i < D; i++) {
            uint16_t v;
            memcpy(&v, p + 2 * i, 2);
            x[i] = f16_value(v);
        }
    }
};

struct attn_data {
    attn_case c;
    attn_side k, v, tail_k, tail_v;
    int n_head;
    std::vector<float>    q, sinks;
    std::vector<uint16_t> mask, tail_mask;
    int n_head_mask, n_stream_mask;

    explicit attn_data(const attn_case & c)
        : c(c), k(c.type_k, c.D_k, c.n_head_kv, c.n_kv, c.n_stream, c.transform, c.seed),
          v(c.type_v, c.D_v, c.n_head_kv, c.n_kv, c.n_stream, c.transform, c.seed + 1),
          tail_k(PQ_TYPE_COUNT, c.D_k, c.n_head_kv, c.n_tail, c.n_stream, false, c.seed + 3),
          tail_v(PQ_TYPE_COUNT, c.D_v, c.n_head_kv, c.n_tail, c.n_stream, false, c.seed + 4), n_head(c.n_head_kv * c.n_group) {
        rng r(c.seed + 2);
        q.resize((size_t) c.n_stream * n_head * c.n_q * c.D_k);
        for (float & f : q) {
            f = r.normal();
        }
        for (int h = 0; c.sinks && h < n_head; h++) {
            sinks.push_back(2.0f * r.normal());
        }
        n_head_mask   = c.mask == 4 ? n_head : 1;
        n_stream_mask = c.mask == 4 ? c.n_stream : 1;
        k.native_f16 = v.native_f16 = c.seed % 2 == 0;
        make_mask(r);
        make_tail_mask(r);
        if (!c.nans) {
            return;
        }
        for (int s = 0; s < c.n_stream; s++) {
            for (int cell = 0; cell < c.n_kv && !mask.empty(); cell++) {
                if (is_seen(mask, s % n_stream_mask, n_head_mask, c.n_kv, cell)) {
                    continue;
                }
                for (attn_side * side : { &k, &v }) {
                    if (side->type == PQ_TYPE_COUNT) {
                        side->set_nan(s, cell);
                    }
                }
            }
            for (int slot = 0; slot < c.n_tail; slot++) {
                if (!is_seen(tail_mask, s, 1, c.n_tail, slot)) {
                    tail_k.set_nan(s, slot);
                    tail_v.set_nan(s, slot);
                }
            }
        }
    }

    bool is_seen(const std::vector<uint16_t> & mask, int stream, int n_head_mask, int n, int cell) const {
        for (int ht = 0; ht < n_head_mask * c.n_q; ht++) {
            if (mask[((size_t) stream * n_head_mask * c.n_q + ht) * n + cell] != 0xfc00) {
                return true;
            }
        }
        return false;
    }

    void make_tail_mask(rng & r) {
        for (int st = 0; st < c.n_stream * c.n_q; st++) {
            // a query that sees no cell of the cache sees none of the tail either
            const bool dead_row = c.mask == 2 && c.n_q > 1 && st % c.n_q == c.n_q / 2;
            for (int slot = 0; slot < c.n_tail; slot++) {
                const bool unused = c.tail_mask == 1 || (c.tail_mask == 0 && (slot % 5 == 2 || r.below(3) == 0));
                tail_mask.push_back(dead_row || unused ? 0xfc00 : to_f16(c.mask == 3 ? -(float) r.below(4) : 0.0f));
            }
        }
    }

    void make_mask(rng & r) {
        if (!c.mask) {
            return;
        }
        mask.resize((size_t) n_stream_mask * n_head_mask * c.n_q * c.n_kv);
        size_t i = 0;
        for (int sh = 0; sh < n_stream_mask * n_head_mask; sh++) {
            for (int t = 0; t < c.n_q; t++) {
                const bool dead_row = c.mask == 6 || (c.mask == 2 && c.n_q > 1 && t == c.n_q / 2);
                for (int cell = 0; cell < c.n_kv; cell++, i++) {
                    bool  dead = dead_row;
                    float value = 0.0f;
                    switch (c.mask) {
                        case 1: dead |= cell > c.n_kv - c.n_q + t && cell > 0; break;
                        case 2: dead |= r.below(3) == 0; break;
                        case 3: value = -(float) r.below(40); break;
                        case 4: dead |= r.below(4) == 0; value = -(float) r.below(4); break;
                        case 5: dead |= (cell % 400) >= 30; break;
                        default: break;
                    }
                    mask[i] = dead ? 0xfc00 : to_f16(value);
                }
            }
        }
    }

    pq_attn_params params(float * dst) const {
        pq_attn_params p = {};
        p.n_head             = n_head;
        p.n_head_kv          = c.n_head_kv;
        p.n_stream           = c.n_stream;
        p.n_q                = c.n_q;
        p.n_kv               = c.n_kv;
        p.k                  = k.params();
        p.v                  = v.params();
        p.q                  = (const uint8_t *) q.data();
        p.q_token_stride     = (size_t) c.D_k * 4;
        p.q_head_stride      = p.q_token_stride * c.n_q;
        p.q_stream_stride    = p.q_head_stride * n_head;
        p.mask               = mask.empty() ? nullptr : (const uint8_t *) mask.data();
        p.mask_token_stride  = (size_t) c.n_kv * 2;
        p.mask_head_stride   = p.mask_token_stride * c.n_q;
        p.mask_stream_stride = p.mask_head_stride * n_head_mask;
        p.n_head_mask        = n_head_mask;
        p.n_stream_mask      = n_stream_mask;
        if (c.n_tail > 0) {
            const pq_attn_side tk = tail_k.params(), tv = tail_v.params();
            p.tail.n                  = c.n_tail;
            p.tail.k                  = tk.data;
            p.tail.k_row_stride       = tk.row_stride;
            p.tail.k_head_stride      = tk.head_stride;
            p.tail.k_stream_stride    = tk.stream_stride;
            p.tail.v                  = tv.data;
            p.tail.v_row_stride       = tv.row_stride;
            p.tail.v_head_stride      = tv.head_stride;
            p.tail.v_stream_stride    = tv.stream_stride;
            p.tail.mask               = (const uint8_t *) tail_mask.data();
            p.tail.mask_token_stride  = (size_t) c.n_tail * 2;
            p.tail.mask_stream_stride = p.tail.mask_token_stride * c.n_q;
        }
        p.sinks              = sinks.empty() ? nullptr : sinks.data();
        p.scale              = 1.0f / sqrtf((float) c.D_k);
        p.max_bias           = c.max_bias;
        p.logit_softcap      = c.softcap;
        p.dst                = dst;
        p.dst_head_stride    = (size_t) c.D_v * 4;
        p.dst_token_stride   = p.dst_head_stride * n_head;
        p.dst_stream_stride  = p.dst_token_stride * c.n_q;
        return p;
    }

    std::vector<double> reference() const {
        std::vector<double> out((size_t) c.n_stream * c.n_q * n_head * c.D_v);
        const int    log2_heads = 1 << (int) floor(log2(n_head));
        const double m0 = pow(2.0, -c.max_bias / log2_heads), m1 = pow(2.0, -c.max_bias / 2 / log2_heads);
        const int n_all = c.n_kv + c.n_tail; // the tail is more cells
        std::vector<double> kx((size_t) n_all * c.D_k), vx((size_t) n_all * c.D_v), score(n_all);
        for (int s = 0; s < c.n_stream; s++) {
            for (int g = 0; g < c.n_head_kv; g++) {
                for (int cell = 0; cell < n_all; cell++) {
                    const int slot = cell - c.n_kv;
                    slot < 0 ? k.row(s, cell, g, &kx[(size_t) cell * c.D_k]) : tail_k.row(s, slot, g, &kx[(size_t) cell * c.D_k]);
                    slot < 0 ? v.row(s, cell, g, &vx[(size_t) cell * c.D_v]) : tail_v.row(s, slot, g, &vx[(size_t) cell * c.D_v]);
                }
                for (int h = g * c.n_group; h < (g + 1) * c.n_group; h++) {
                    const double slope = c.max_bias > 0 ? h < log2_heads ? pow(m0, h + 1) : pow(m1, 2 * (h - log2_heads) + 1) : 1.0;
                    for (int t = 0; t < c.n_q; t++) {
                        const float    * qr = &q[(((size_t) s * n_head + h) * c.n_q + t) * c.D_k];
                        const uint16_t * mr = mask.empty() ? nullptr
                            : &mask[(((size_t) (s % n_stream_mask) * n_head_mask + h % n_head_mask) * c.n_q + t) * c.n_kv];
                        double top = sinks.empty() ? -INFINITY : sinks[h];
                        for (int cell = 0; cell < n_all; cell++) {
                            const uint16_t bias = cell >= c.n_kv ? tail_mask[((size_t) s * c.n_q + t) * c.n_tail + cell - c.n_kv] : mr ? mr[cell] : 0;
                            score[cell] = -INFINITY;
                            if (bias == 0xfc00) {
                                continue;
                            }
                            double x = 0.0;
                            for (int i = 0; i < c.D_k; i++) {
                                x += qr[i] * kx[(size_t) cell * c.D_k + i];
                            }
                            x /= sqrt((double) c.D_k);
                            x = c.softcap != 0.0f ? c.softcap * tanh(x / c.softcap) : x;
                            score[cell] = x + slope * f16_value(bias);
                            top = std::max(top, score[cell]);
                        }
                        double sum = sinks.empty() || top == -INFINITY ? 0.0 : exp(sinks[h] - top);
                        double * o = &out[(((size_t) s * c.n_q + t) * n_head + h) * c.D_v];
                        for (int cell = 0; cell < n_all; cell++) {
                            if (score[cell] == -INFINITY) {
                                continue;
                            }
                            const double w = exp(score[cell] - top);
                            sum += w;
                            for (int i = 0; i < c.D_v; i++) {
                                o[i] += w * vx[(size_t) cell * c.D_v + i];
                            }
                        }
                        for (int i = 0; i < c.D_v; i++) {
                            o[i] = sum == 0.0 ? 0.0 : o[i] / sum;
                        }
                    }
                }
            }
        }
        return out;
    }
};

static void test_attn_case(const attn_case & c, const std::vector<std::string> & simd) {
    const attn_data d(c);
    const std::vector<double> ref = d.reference();
    for (const std::string & name : simd) {
        pq_cpu_simd_set(name.c_str());
        std::vector<float> first;
        for (int n_threads : { 1, 3 }) {
            std::vector<float> out(ref.size() + 1, 1234.0f);
            const pq_attn_params p = d.params(out.data());
            million_pq_attn(&p, n_threads);
            double worst = 0.0, sum_err = 0.0, sum_ref = 0.0;
            for (size_t i = 0; i < ref.size(); i++) {
                const double e = std::fabs(out[i] - ref[i]);
                worst    = e <= worst ? worst : e;
                sum_err += e * e;
                sum_ref += ref[i] * ref[i];
            }
            check(worst < 3e-5 && !(sum_err > 1e-10 * sum_ref), "%s attention: largest error %g, NMSE %g; %s", name.c_str(), worst,
                  sum_err / sum_ref, c.name().c_str());
            check(out.back() == 1234.0f, "attention wrote past its end");
            out.pop_back();
            check(first.empty() || memcmp(first.data(), out.data(), out.size() * 4) == 0, "%s attention depends on the number of threads; %s",
                  name.c_str(), c.name().c_str());
            first = out;
        }
    }
}

static void test_attn() {
    const std::vector<std::string> simd = simd_names();
    rng r(5);
    auto base = [&](int i) {
        attn_case c = {};
        c.type_k    = i % PQ_TYPE_COUNT;
        c.type_v    = (i / 3) % PQ_TYPE_COUNT;
        c.D_k       = 64;
        c.D_v       = 64;
        c.n_head_kv = 2;
        c.n_group   = 1;
        c.n_stream  = 1;
        c.n_q       = 1;
        c.n_kv      = 97;
        c.transform = true;
        c.seed      = 1000 + (uint64_t) i;
        return c;
    };
    int i = 0;
    for (int n_kv : { 1, 31, 97, 257, 1000 }) {
        for (int D : { 64, 80, 96, 128, 192, 256 }) {
            for (int n_group : { 1, 2, 8 }) {
                for (int n_q : { 1, 3, 65 }) {
                    if (n_q == 65 && n_group == 8 && D > 128 && n_kv > 257) {
                        continue; // the reference would take most of the time
                    }
                    attn_case c = base(i++);
                    c.D_k = c.D_v = D;
                    c.n_group   = n_group;
                    c.n_q       = n_q;
                    c.n_kv      = n_kv;
                    c.mask      = r.below(7);
                    c.sinks     = r.below(4) == 0;
                    c.transform = r.below(4) != 0;
                    c.n_stream  = n_q < 65 ? 1 + r.below(2) : 1;
                    c.max_bias  = c.mask == 3 || c.mask == 4 ? 8.0f : 0.0f;
                    c.softcap   = r.below(4) == 0 ? 5.0f : 0.0f;
                    const int tails[] = { 0, 1, 7, 128, 129 };
                    c.n_tail    = tails[r.below(5)];
                    c.tail_mask = r.below(3);
                    c.nans      = r.below(2);
                    test_attn_case(c, simd);
                }
            }
        }
    }
    // each feature alone, with few and with many rows, without and with a tail
    for (int f = 0; f < 28; f++) {
        for (int n_q : { 1, 4, 20 }) {
            for (int n_tail : { 0, 129 }) {
                attn_case c = base(i++);
                c.n_q    = n_q;
                c.n_kv   = 700;
                c.n_tail = n_tail;
                c.nans   = true;
                switch (f) {
                    case 0:  break;
                    case 1:  c.transform = false; break;
                    case 2:  c.sinks = true; break;
                    case 3:  c.softcap = 2.0f; break;
                    case 4:  c.mask = 3; c.max_bias = 8.0f; c.n_group = 3; break; // 6 heads: both slope formulas
                    case 5:  case 6: case 7: case 8: case 9: case 10: c.mask = f - 4; break;
                    case 11: c.mask = 6; c.sinks = true; break;
                    case 12: c.n_stream = 3; c.mask = 4; break;
                    case 13: c.type_k = PQ_TYPE_COUNT; break;
                    case 14: c.type_v = PQ_TYPE_COUNT; break;
                    case 15: c.type_k = PQ_TYPE_COUNT; c.type_v = PQ_TYPE_COUNT; c.mask = 2; break;
                    case 16: c.type_k = PQ_TYPE_COUNT; c.D_k = 72; c.n_group = 5; c.mask = 5; break;
                    case 17: c.D_k = 192; c.D_v = 128; break;
                    case 18: c.D_k = 8; c.D_v = 24; break;
                    case 19: c.D_k = 24; c.D_v = 8; c.type_k = PQ_TYPE_PQ2; c.type_v = PQ_TYPE_PQ2; break;
                    case 20: c.D_k = 40; c.D_v = 56; c.type_k = PQ_TYPE_PQ3; c.type_v = PQ_TYPE_PQ3; break;
                    case 21: c.n_kv = 4097; c.mask = 5; break;
                    case 22: c.n_head_kv = 1; c.n_group = 16; c.n_kv = 2300; c.mask = 1; break;
                    case 23: c.n_kv = 3000; c.sinks = true; c.n_group = 7; break;
                    case 24: c.type_v = PQ_TYPE_COUNT; c.D_v = 20; c.mask = 5; break; // rows that are no multiple of a vector
                    case 25: c.type_k = PQ_TYPE_COUNT; c.mask = 5; c.n_group = 4; break;
                    case 26: c.tail_mask = 1; c.mask = 6; break;
                    case 27: c.tail_mask = 1; c.n_stream = 2; break;
                }
                test_attn_case(c, simd);
                if (n_tail > 0 && c.n_kv == 700) { // a cache of one part, to which the tail is joined without partial results
                    c.n_kv = 300;
                    test_attn_case(c, simd);
                }
            }
        }
    }
    // a long tail, and one much longer than the cache
    for (int n_q : { 1, 40 }) {
        for (int n_kv : { 1, 2000 }) {
            attn_case c = base(i++);
            c.n_q    = n_q;
            c.n_kv   = n_kv;
            c.n_tail = 1500;
            test_attn_case(c, simd);
        }
    }
    for (int n_group : { 71, 128 }) { // more heads than a block has rows
        attn_case c = base(i++);
        c.n_head_kv = 1;
        c.n_group   = n_group;
        c.n_q       = 2;
        c.n_kv      = 200;
        test_attn_case(c, simd);
    }
}

// ---- k-means ----

static void test_kmeans() {
    const std::vector<std::string> simd = simd_names();
    for (int dsub : { 2, 4 }) {
        for (int ksub : { 1, 3, 64, 100, 256 }) {
            for (int n : { 0, 1, 2, 3, 5, 1003 }) {
                rng r(dsub * 1000 + ksub + n);
                const int P = 3;
                std::vector<float> x((size_t) P * n * dsub), c((size_t) P * ksub * dsub);
                for (float & f : x) { f = r.normal(); }
                for (float & f : c) { f = r.normal(); }
                std::vector<uint8_t> first;
                std::vector<double>  first_sums;
                std::vector<double>  first_costs;
                for (const std::string & name : simd) {
                    pq_cpu_simd_set(name.c_str());
                    std::vector<uint8_t> codes((size_t) P * n + 1, 0xee);
                    std::vector<float>   dists((size_t) P * n + 1, -1.0f);
                    std::vector<double>  sums(c.size(), -1.0), costs((size_t) P * ksub, -1.0);
                    std::vector<int64_t> counts((size_t) P * ksub, -1);
                    million_pq_kmeans_assign_many(x.data(), P, n, dsub, c.data(), ksub, codes.data(), dists.data(), sums.data(), counts.data(),
                                                  costs.data(), 2);
                    const std::vector<double> before = costs;
                    million_pq_kmeans_assign_many(x.data(), P, n, dsub, c.data(), ksub, nullptr, nullptr, sums.data(), counts.data(),
                                                  costs.data(), 1);
                    check(costs == before, "k-means: two calls differ");
                    if (name == simd[0]) {
                        first      = codes;
                        first_sums = sums;
                        first_costs = costs;
                        std::vector<double>  ref_sums(c.size(), 0.0);
                        std::vector<int64_t> ref_counts((size_t) P * ksub, 0);
                        std::vector<double>  ref_costs(costs.size(), 0.0);
                        int n_off = 0;
                        int n_far = 0;
                        for (int p = 0; p < P; p++) {
                            for (int i = 0; i < n; i++) {
                                auto dist = [&](int k) {
                                    double s = 0.0;
                                    for (int e = 0; e < dsub; e++) {
                                        const double v = (double) x[((size_t) p * n + i) * dsub + e] - c[((size_t) p * ksub + k) * dsub + e];
                                        s += v * v;
                                    }
                                    return s;
                                };
                                double best = INFINITY;
                                for (int k = 0; k < ksub; k++) {
                                    best = std::min(best, dist(k));
                                }
                                const int code = codes[(size_t) p * n + i];
                                n_far   += code >= ksub || dist(code) > best * (1 + 1e-5) + 1e-9;
                                ref_costs[(size_t) p * ksub + code] += best;
                                n_off += !(std::fabs(dists[(size_t) p * n + i] - best) <= 1e-5 * best + 1e-9);
                                ref_counts[(size_t) p * ksub + code]++;
                                for (int e = 0; e < dsub; e++) {
                                    ref_sums[((size_t) p * ksub + code) * dsub + e] += x[((size_t) p * n + i) * dsub + e];
                                }
                            }
                        }
                        check(n_far == 0, "k-means: %d points of %d are not with their nearest centroid", n_far, P * n);
                        check(ref_counts == counts && ref_sums == sums, "k-means: sums or counts are wrong, dsub %d ksub %d n %d", dsub, ksub, n);
                        check(n_off == 0, "k-means: %d of %d squared distances are off", n_off, P * n);
                        n_off = 0;
                        for (size_t k = 0; k < costs.size(); k++) {
                            n_off += !(std::fabs(costs[k] - ref_costs[k]) <= 1e-5 * ref_costs[k] + 1e-9);
                        }
                        check(n_off == 0, "k-means: the squared distances of %d centroids are off", n_off);
                    }
                    check(codes == first && sums == first_sums && costs == first_costs, "k-means of %s differs from %s's", name.c_str(), simd[0].c_str());
                    check(codes.back() == 0xee && dists.back() == -1.0f, "k-means wrote past its end");
                }
            }
        }
    }
}

// Points halfway between the centroids of a grid, where all arithmetic is exact: ties go to the lowest centroid on every instruction set. Far
// from zero, scores by way of |c|^2 - 2 x.c say nothing; at 2^-70 squares are subnormal; and one point is NaN.
static void test_kmeans_ties() {
    const int n = 1003, ksub = 256;
    const struct { float offset, scale; } places[] = { { 0, 1 }, { 1000, 1 }, { 1e6f, 1 }, { 0, 0x1p-70f }, { 0, 0x1p50f }, { 100, 0x1p50f } };
    for (int dsub : { 2, 4 }) {
        const int side = dsub == 2 ? 16 : 4;
        for (const auto & place : places) {
            rng r(dsub);
            std::vector<float> x((size_t) n * dsub), c((size_t) ksub * dsub);
            for (int k = 0; k < ksub; k++) {
                for (int e = 0, at = (k * 37 + 11) % ksub; e < dsub; e++, at /= side) { // neighbours are not in order
                    c[k * dsub + e] = (place.offset + at % side) * place.scale;
                }
            }
            for (float & f : x) {
                f = (place.offset + 0.5f * (float) (r.below(2 * side + 3) - 2)) * place.scale;
            }
            std::vector<uint8_t> want(n);
            for (int i = 0; i < n; i++) {
                double best = INFINITY;
                for (int k = 0; k < ksub; k++) {
                    double d = 0.0;
                    for (int e = 0; e < dsub; e++) {
                        d += std::pow((double) x[i * dsub + e] - c[k * dsub + e], 2);
                    }
                    if (d < best) {
                        best    = d;
                        want[i] = (uint8_t) k;
                    }
                }
            }
            x[500 * dsub] = NAN;
            want[500]     = 0;
            for (const std::string & name : simd_names()) {
                pq_cpu_simd_set(name.c_str());
                std::vector<uint8_t> codes(n);
                std::vector<double>  sums(c.size()), costs(ksub);
                std::vector<int64_t> counts(ksub);
                pq_kmeans_assign(x.data(), n, dsub, dsub, c.data(), ksub, codes.data(), nullptr, sums.data(), counts.data(), costs.data());
                int n_wrong = 0;
                for (int i = 0; i < n; i++) {
                    n_wrong += codes[i] != want[i];
                }
                check(n_wrong == 0, "k-means of %s: %d of %d ties are not with the lowest, dsub %d, from %g, grid %g", name.c_str(), n_wrong, n,
                      dsub, place.offset, place.scale);
            }
        }
    }
}

// ---- bench ----

static double now_ns() {
    return (double) std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Time that this thread ran: other programs on the machine don't count.
static double thread_ns() {
#ifdef CLOCK_THREAD_CPUTIME_ID
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return 1e9 * (double) t.tv_sec + (double) t.tv_nsec;
#else
    return now_ns();
#endif
}

struct timing {
    double median, low, high;
};

template <class F>
static timing time_ns(F fn) {
    fn();
    std::vector<double> t;
    const double start = now_ns();
    while (t.size() < 7 || (now_ns() - start < 0.4e9 && t.size() < 500)) {
        const double t0 = thread_ns();
        fn();
        t.push_back(thread_ns() - t0);
    }
    std::sort(t.begin(), t.end());
    return { t[t.size() / 2], t.front(), t[t.size() * 9 / 10] };
}

#ifdef HAVE_F16_LOOP
// What an f16 cache costs without any blocking: a dot product and a scaled sum per (query head, cell).
__attribute__((target("avx2,fma,f16c")))
static void f16_attn(const float * q, const uint16_t * k, const uint16_t * v, int D, int n_kv, size_t row, float * out) {
    float m = -INFINITY, sum = 0.0f;
    memset(out, 0, (size_t) D * 4);
    for (int t = 0; t < n_kv; t++) {
        __m256 a = _mm256_setzero_ps(), b = _mm256_setzero_ps();
        for (int i = 0; i < D; i += 16) {
            a = _mm256_fmadd_ps(_mm256_loadu_ps(q + i),     _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (k + t * row + i))), a);
            b = _mm256_fmadd_ps(_mm256_loadu_ps(q + i + 8), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (k + t * row + i + 8))), b);
        }
        float lanes[8], s = 0.0f;
        _mm256_storeu_ps(lanes, _mm256_add_ps(a, b));
        for (float f : lanes) { s += f; }
        s *= 0.088f;
        if (s > m) {
            const __m256 f = _mm256_set1_ps(expf(m - s));
            for (int i = 0; i < D; i += 8) {
                _mm256_storeu_ps(out + i, _mm256_mul_ps(f, _mm256_loadu_ps(out + i)));
            }
            sum *= expf(m - s);
            m = s;
        }
        const float  w = expf(s - m);
        const __m256 W = _mm256_set1_ps(w);
        sum += w;
        for (int i = 0; i < D; i += 8) {
            _mm256_storeu_ps(out + i, _mm256_fmadd_ps(W, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (v + t * row + i))), _mm256_loadu_ps(out + i)));
        }
    }
    for (int i = 0; i < D; i++) {
        out[i] /= sum;
    }
}

__attribute__((target("avx2,fma,f16c")))
static void run_fma(int n) { // twelve chains: enough to fill two units of latency 4 or 5
    __m256 a[12];
    for (int i = 0; i < 12; i++) {
        a[i] = _mm256_set1_ps((float) i);
    }
    const __m256 x = _mm256_set1_ps(0.999f), y = _mm256_set1_ps(1e-3f);
    for (int k = 0; k < n; k++) {
        for (int i = 0; i < 12; i++) {
            a[i] = _mm256_fmadd_ps(a[i], x, y);
        }
        __asm__ volatile("" : "+x"(a[0]), "+x"(a[1]), "+x"(a[2]), "+x"(a[3]), "+x"(a[4]), "+x"(a[5]));
        __asm__ volatile("" : "+x"(a[6]), "+x"(a[7]), "+x"(a[8]), "+x"(a[9]), "+x"(a[10]), "+x"(a[11]));
    }
}

static double peak_fma_ns() { // ns per 8-lane fused multiply-add
    return time_ns([] { run_fma(100000); }).low / 1.2e6;
}
#endif

static timing time_attn(const attn_data & d) {
    std::vector<float> out((size_t) d.c.n_stream * d.c.n_q * d.n_head * d.c.D_v);
    const pq_attn_params p = d.params(out.data());
    std::vector<uint8_t> partials(pq_attn_partials_size(&p)), scratch(pq_attn_scratch_size(&p));
    return time_ns([&] {
        pq_attn_scratch_begin(scratch.data());
        for (int64_t i = 0; i < pq_attn_n_items(&p); i++)        { pq_attn_item(&p, i, partials.data(), scratch.data()); }
        for (int64_t i = 0; i < pq_attn_n_reduce_items(&p); i++) { pq_attn_reduce_item(&p, i, partials.data(), scratch.data()); }
    });
}

// Moves the last n_exact tokens of the context into the tail, as the cache does; query t is the token n_q - 1 - t before the end.
static void use_tail(attn_data & d, int n_exact) {
    const int n_kv = d.c.n_kv, n_q = d.c.n_q, first = n_kv - n_exact;
    for (int t = 0; t < n_q; t++) {
        for (int cell = first; cell < n_kv; cell++) {
            d.mask[(size_t) t * n_kv + cell]                  = 0xfc00;
            d.tail_mask[(size_t) t * n_exact + cell - first] = cell > n_kv - n_q + t ? 0xfc00 : 0;
        }
    }
}

// The same attention with identity maps and no tail, with maps, and with maps and the last n_exact tokens in the tail.
static void bench_attn(const char * what, attn_case c, int n_exact, double f16_pair, double fma_ns) {
    const double n = (double) c.n_head_kv * c.n_group * c.n_q * c.n_kv;
    double first = 0.0;
    c.mask = 1;
    for (int variant = 0; variant < 3; variant++) {
        c.transform = variant > 0;
        c.n_tail    = variant > 1 ? n_exact : 0;
        attn_data d(c);
        if (c.n_tail > 0) {
            use_tail(d, c.n_tail);
        }
        const timing t = time_attn(d);
        first = variant == 0 ? t.median : first;
        const char * names[] = { "identity", "maps", "maps, tail" };
        printf("%s %s D %3d GQA %d queries %3d cells %d %-10s: %6.2f ns per (query, cell) [%.2f, %.2f] %+5.1f%%", what, type_names[c.type_k],
               c.D_k, c.n_group, c.n_q, c.n_kv, names[variant], t.median / n, t.low / n, t.high / n, 100.0 * (t.median / first - 1.0));
        if (f16_pair > 0.0) {
            printf("  %.2fx f16", f16_pair / (t.median / n));
        }
        if (fma_ns > 0.0) {
            printf("  %.0f%% of the 8-lane multiply-add peak", 100.0 * 2 * c.D_k / 8 * fma_ns / (t.median / n));
        }
        printf("\n");
    }
}

static void bench(const char * filter) {
    auto wanted = [&](const char * what) { return !filter || strstr(filter, what); };
    double fma_ns = 0.0;
#ifdef HAVE_F16_LOOP
    fma_ns = peak_fma_ns();
    printf("one 8-lane fused multiply-add: %.3f ns (%.1f GFLOP/s)\n", fma_ns, 16 / fma_ns);
#endif
    if (wanted("codebook")) {
        for (int D : { 64, 128, 256 }) {
            const codebook cb = make_codebook(PQ_TYPE_PQ4, D, 1, true, 1);
            std::vector<uint8_t> dst(cb.blocks.size());
            char err[256];
            const timing t = time_ns([&] { million_pq_codebook_build(PQ_TYPE_PQ4, cb.blob.data(), cb.blob.size(), D, 1, dst.data(), dst.size(), err, sizeof(err)); });
            printf("codebook of one head, D %3d, with maps: %7.1f us [%.1f, %.1f]\n", D, t.median / 1e3, t.low / 1e3, t.high / 1e3);
        }
    }
    for (const std::string & name : simd_names()) {
        if (name == "scalar" && !getenv("PQ_BENCH_SCALAR")) {
            continue;
        }
        pq_cpu_simd_set(name.c_str());
        printf("\n== %s, one thread; [fastest, 90%%] ==\n", name.c_str());

        for (int type = 0; type < PQ_TYPE_COUNT && wanted("encode"); type++) {
            for (int n_rows : { 1, 512 }) {
                const int D = 128, H = 8;
                const codebook cb = make_codebook((pq_type) type, D, H, true, 1);
                rng r(2);
                std::vector<float> x((size_t) n_rows * H * D);
                for (float & f : x) { f = r.normal(); }
                std::vector<uint8_t> codes((size_t) n_rows * H * pq_head_bytes((pq_type) type, D));
                pq_encode_params p = {};
                p.type             = (pq_type) type;
                p.D                = D;
                p.n_head_kv        = H;
                p.n_rows           = n_rows;
                p.codebook         = cb.blocks.data();
                p.has_transform    = 1;
                p.x                = x.data();
                p.x_head_stride    = (size_t) D * 4;
                p.x_row_stride     = p.x_head_stride * H;
                p.codes            = codes.data();
                p.codes_row_stride = codes.size() / n_rows;
                std::vector<uint8_t> scratch(pq_encode_scratch_size(&p));
                const timing t = time_ns([&] {
                    for (int64_t i = 0; i < pq_encode_n_items(&p); i++) { pq_encode_item(&p, i, scratch.data()); }
                });
                const double n = (double) n_rows * H;
                printf("encode  %s D 128 rows %4d: %8.1f ns per (row, head) [%.1f, %.1f]\n", type_names[type], n_rows, t.median / n, t.low / n, t.high / n);
            }
        }

        for (int D : { 64, 128 }) {
            if (!wanted("decode")) {
                break;
            }
            for (int n_group : { 1, 2, 4, 8 }) {
                const int H = 8, n_kv = 8192;
                double f16_pair = 0.0;
#ifdef HAVE_F16_LOOP
                {
                    const attn_side k(PQ_TYPE_COUNT, D, H, n_kv, 1, false, 1), v(PQ_TYPE_COUNT, D, H, n_kv, 1, false, 2);
                    std::vector<float> q(D, 0.1f), out(D);
                    const timing t = time_ns([&] {
                        for (int h = 0; h < H * n_group; h++) {
                            f16_attn(q.data(), (const uint16_t *) k.data.data() + h / n_group * D, (const uint16_t *) v.data.data() + h / n_group * D,
                                     D, n_kv, (size_t) H * D, out.data());
                        }
                    });
                    f16_pair = t.median / ((double) H * n_group * n_kv);
                    printf("decode  f16 D %3d GQA %d cells %d: %6.2f ns per (query head, cell) [plain loop]\n", D, n_group, n_kv, f16_pair);
                }
#endif
                for (int type = 0; type < PQ_TYPE_COUNT; type++) {
                    attn_case c = {};
                    c.type_k = c.type_v = type;
                    c.D_k = c.D_v = D;
                    c.n_head_kv = H;
                    c.n_group   = n_group;
                    c.n_stream  = 1;
                    c.n_q       = 1;
                    c.n_kv      = n_kv;
                    c.seed      = 1;
                    bench_attn("decode ", c, 128, f16_pair, 0.0);
                }
            }
        }

        for (int n_kv : { 512, 2048 }) {
            for (int type = 0; type < PQ_TYPE_COUNT && wanted("prefill"); type++) {
                attn_case c = {};
                c.type_k = c.type_v = type;
                c.D_k = c.D_v = 128;
                c.n_head_kv = 2;
                c.n_group   = 1;
                c.n_stream  = 1;
                c.n_q       = 512;
                c.n_kv      = n_kv;
                c.seed      = 1;
                bench_attn("prefill", c, std::min(n_kv, 640), 0.0, fma_ns); // the tail holds the queries' own tokens too
            }
        }

        for (int dsub : { 2, 4 }) {
            if (!wanted("kmeans")) {
                break;
            }
            const int n = 32768, ksub = 256;
            rng r(3);
            std::vector<float> x((size_t) n * dsub), cen((size_t) ksub * dsub);
            for (float & f : x)   { f = r.normal(); }
            for (float & f : cen) { f = r.normal(); }
            std::vector<double>  sums(cen.size()), costs(ksub);
            std::vector<int64_t> counts(ksub);
            const timing t = time_ns([&] { pq_kmeans_assign(x.data(), n, dsub, dsub, cen.data(), ksub, nullptr, nullptr, sums.data(), counts.data(), costs.data()); });
            printf("k-means dsub %d ksub 256: %6.2f ns per point [%.2f, %.2f]\n", dsub, t.median / n, t.low / n, t.high / n);
        }
    }
}

int main(int argc, char ** argv) {
    setvbuf(stdout, nullptr, _IONBF, 0); // a crash should not swallow what came before
    const std::string mode = argc > 1 ? argv[1] : "test";
    if (mode == "bench") {
        bench(argc > 2 ? argv[2] : nullptr);
        return 0;
    }
    if (mode != "test" && mode != "all") {
        fprintf(stderr, "found '%s', needs test, bench or all\n", mode.c_str());
        return 2;
    }
    const struct { const char * name; void (*run)(); } tests[] = {
        { "codebook", test_codebook }, { "tables", test_tables }, { "order of sums", test_encode_order }, { "encode and decode", test_encode_decode },
        { "anisotropic codes", test_encode_aniso }, { "attention", test_attn }, { "k-means", test_kmeans },
        { "k-means, ties", test_kmeans_ties },
    };
    printf("instruction sets:");
    for (const std::string & name : simd_names()) {
        printf(" %s", name.c_str());
    }
    printf("\n");
    for (const auto & test : tests) {
        const int before = n_failed, checks = n_checks;
        const double t0 = now_ns();
        test.run();
        printf("%-18s %6d checks, %d failed, %.1f s\n", test.name, n_checks - checks, n_failed - before, (now_ns() - t0) / 1e9);
    }
    if (n_failed == 0 && mode == "all") {
        pq_cpu_simd_set("auto");
        bench(nullptr);
    }
    return n_failed != 0;
}
