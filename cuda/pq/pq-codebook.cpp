#include "pq-codebook.h"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <utility>

static_assert(sizeof(float) == 4, "blobs hold IEEE single precision");

namespace {

bool fail(std::string & error, const char * fmt, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 2, 3)))
#endif
    ;

bool fail(std::string & error, const char * fmt, ...) {
    char text[512];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    error = text;
    return false;
}

// Byte by byte, so that a blob reads the same on a big-endian machine and from any address.
uint32_t read_u16(const uint8_t * p) { return (uint32_t) p[0] | (uint32_t) p[1] << 8; }
uint32_t read_u32(const uint8_t * p) { return read_u16(p) | read_u16(p + 2) << 16; }

float read_f32(const uint8_t * p) {
    const uint32_t bits = read_u32(p);
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

// Both by their bits: a codebook has millions of values, and the library's ldexp() and frexp() take longer than the inversion.
double f16_to_f64(uint32_t h) {
    const uint32_t magnitude = h & 0x7fff;
    double value = (double) magnitude * 0x1p-24; // subnormal
    if (magnitude >= 0x400) {
        const uint64_t bits = ((uint64_t) magnitude << 42) + ((uint64_t) (1023 - 15) << 52);
        memcpy(&value, &bits, sizeof(value));
    }
    return h & 0x8000 ? -value : value;
}

// The nearest half, ties to even. Returns false when there is none: NaN, or too large.
bool f64_to_f16(double value, uint16_t & h) {
    double a = std::fabs(value);
    if (!(a < 65520.0)) { // half a step above 65504, the largest half
        return false;
    }
    uint64_t bits;
    if (a < 0x1p-14) {
        a += 0x1p28; // doubles there are as far apart as subnormal halves
        memcpy(&bits, &a, sizeof(bits));
    } else {
        memcpy(&bits, &a, sizeof(bits));
        bits -= (uint64_t) (1023 - 15) << 52;
        bits  = (bits + ((uint64_t) 1 << 41) - 1 + (bits >> 42 & 1)) >> 42;
    }
    h = (uint16_t) ((bits & 0x7fff) | (std::signbit(value) ? 0x8000u : 0u));
    return true;
}

// entry[k][b]: what a byte b does to the checksum with k zero bytes behind it. Eight bytes at a time, for megabytes of codebooks.
struct crc32_table {
    uint32_t entry[8][256];
    crc32_table() {
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t c = i;
            for (int k = 0; k < 8; k++) {
                c = c & 1 ? 0xedb88320u ^ c >> 1 : c >> 1;
            }
            entry[0][i] = c;
        }
        for (int k = 1; k < 8; k++) {
            for (uint32_t i = 0; i < 256; i++) {
                entry[k][i] = entry[0][entry[k - 1][i] & 0xff] ^ entry[k - 1][i] >> 8;
            }
        }
    }
};

uint32_t crc32(const uint8_t * data, size_t n) {
    static const crc32_table table;
    const auto & e = table.entry;
    uint32_t c = 0xffffffffu;
    size_t   i = 0;
    for (; i + 8 <= n; i += 8) {
        const uint32_t lo = c ^ read_u32(data + i), hi = read_u32(data + i + 4);
        c = e[7][lo & 0xff] ^ e[6][lo >> 8 & 0xff] ^ e[5][lo >> 16 & 0xff] ^ e[4][lo >> 24] ^
            e[3][hi & 0xff] ^ e[2][hi >> 8 & 0xff] ^ e[1][hi >> 16 & 0xff] ^ e[0][hi >> 24];
    }
    for (; i < n; i++) {
        c = e[0][(c ^ data[i]) & 0xff] ^ c >> 8;
    }
    return c ^ 0xffffffffu;
}

const char * type_name(pq_type type) {
    switch (type) {
        case PQ_TYPE_PQ4: return "pq4";
        case PQ_TYPE_PQ3: return "pq3";
        case PQ_TYPE_PQ2: return "pq2";
        default:          return "an unknown type";
    }
}

// Sizes of the parts of one head in the payload.
struct head_parts {
    size_t mu, T, aniso, centroids;
    size_t total() const { return mu + T + aniso + centroids; }
};

head_parts get_head_parts(int32_t D, bool has_transform, bool has_aniso) {
    const size_t d = (size_t) D;
    return { d * 4, has_transform ? d * d * 2 : 0, has_aniso ? d * 4 : 0, d * PQ_KSUB * 2 };
}

bool f16_all_finite(const uint8_t * p, size_t n_bytes) {
    for (size_t i = 0; i < n_bytes; i += 2) {
        if ((p[i + 1] & 0x7c) == 0x7c) {
            return false;
        }
    }
    return true;
}

bool f32_all_finite(const uint8_t * p, size_t n_bytes) {
    for (size_t i = 0; i < n_bytes; i += 4) {
        if ((read_u32(p + i) & 0x7f800000u) == 0x7f800000u) {
            return false;
        }
    }
    return true;
}

// dst -= f[0] * rows[0] + f[1] * rows[1] + ..., of `len` elements each; four rows to one pass over dst.
void subtract_rows(double * dst, const double * f, const double * rows, size_t ld, size_t n_rows, size_t len) {
    size_t i = 0;
    for (; i + 4 <= n_rows; i += 4) {
        const double * a = rows + i * ld, * b = a + ld, * c = b + ld, * d = c + ld;
        const double fa = f[i], fb = f[i + 1], fc = f[i + 2], fd = f[i + 3];
        for (size_t j = 0; j < len; j++) {
            dst[j] -= (fa * a[j] + fb * b[j]) + (fc * c[j] + fd * d[j]);
        }
    }
    for (; i < n_rows; i++) {
        for (size_t j = 0; j < len; j++) {
            dst[j] -= f[i] * rows[i * ld + j];
        }
    }
}

// inv = a^-1; a is overwritten. LU with partial pivoting, by panels of 8 columns, which together with subtract_rows() saves most of
// the memory traffic: a file may hold hundreds of heads, and a user waits for their inverses.
bool invert(std::vector<double> & a, std::vector<double> & inv, size_t n) {
    constexpr size_t PANEL = 8;
    std::vector<size_t> row(n); // row i of P a is row row[i] of a
    for (size_t i = 0; i < n; i++) {
        row[i] = i;
    }
    for (size_t k0 = 0; k0 < n; k0 += PANEL) {
        const size_t k1 = std::min(k0 + PANEL, n);
        for (size_t k = k0; k < k1; k++) {
            size_t pivot = k;
            for (size_t r = k + 1; r < n; r++) {
                if (std::fabs(a[r * n + k]) > std::fabs(a[pivot * n + k])) {
                    pivot = r;
                }
            }
            if (!(std::fabs(a[pivot * n + k]) > 0.0)) {
                return false;
            }
            if (pivot != k) {
                std::swap_ranges(&a[pivot * n], &a[pivot * n] + n, &a[k * n]);
                std::swap(row[pivot], row[k]);
            }
            for (size_t r = k + 1; r < n; r++) {
                const double f = a[r * n + k] /= a[k * n + k];
                for (size_t j = k + 1; j < k1; j++) {
                    a[r * n + j] -= f * a[k * n + j];
                }
            }
        }
        for (size_t r = k0 + 1; k1 < n && r < n; r++) {
            subtract_rows(&a[r * n + k1], &a[r * n + k0], &a[k0 * n + k1], n, std::min(r, k1) - k0, n - k1);
        }
    }

    std::vector<double> x(n * n, 0.0); // L^-1, then U^-1 L^-1
    for (size_t i = 0; i < n; i++) {
        for (size_t j = 0; j < i; j += 4) {
            const size_t end = std::min(j + 4, i); // L^-1 is lower triangular
            subtract_rows(&x[i * n], &a[i * n + j], &x[j * n], n, end - j, end);
        }
        x[i * n + i] = 1.0;
    }
    for (size_t i = n; i-- > 0;) {
        if (i + 1 < n) {
            subtract_rows(&x[i * n], &a[i * n + i + 1], &x[(i + 1) * n], n, n - i - 1, n);
        }
        for (size_t j = 0; j < n; j++) {
            x[i * n + j] /= a[i * n + i];
        }
    }
    for (size_t i = 0; i < n; i++) {
        for (size_t j = 0; j < n; j++) {
            inv[i * n + row[j]] = x[i * n + j];
        }
    }
    return true;
}

// How far T * inv is from the identity: largest element of T (inv v) - v over a few vectors v of signs. The full product
// would cost as much as the inversion, and tell no more: a singular T is off by far in almost every direction.
double inverse_residual(const std::vector<double> & T, const std::vector<double> & inv, size_t n) {
    constexpr size_t PROBES = 4; // together, so that no sum waits for another
    uint32_t bits = 1;
    std::vector<double> v(n * PROBES), w(n * PROBES), u(n * PROBES);
    for (double & x : v) {
        bits = bits * 1664525u + 1013904223u;
        x = bits >> 31 ? 1.0 : -1.0;
    }
    auto multiply = [n](const std::vector<double> & a, const std::vector<double> & x, std::vector<double> & y) {
        for (size_t i = 0; i < n; i++) {
            double sum[PROBES] = {};
            for (size_t j = 0; j < n; j++) {
                for (size_t p = 0; p < PROBES; p++) {
                    sum[p] += a[i * n + j] * x[j * PROBES + p];
                }
            }
            std::copy(sum, sum + PROBES, &y[i * PROBES]);
        }
    };
    multiply(inv, v, w);
    multiply(T, w, u);
    double worst = 0.0;
    for (size_t i = 0; i < n * PROBES; i++) {
        const double r = std::fabs(u[i] - v[i]);
        if (r > worst || std::isnan(r)) { // a NaN becomes the worst and stays it
            worst = r;
        }
    }
    return worst;
}

int base64_value(unsigned char c) {
    if (c >= 'A' && c <= 'Z') { return c - 'A'; }
    if (c >= 'a' && c <= 'z') { return c - 'a' + 26; }
    if (c >= '0' && c <= '9') { return c - '0' + 52; }
    if (c == '+')             { return 62; }
    if (c == '/')             { return 63; }
    return -1;
}

struct base64_table {
    int8_t value[256];
    base64_table() {
        for (int c = 0; c < 256; c++) {
            value[c] = (int8_t) base64_value((unsigned char) c);
        }
    }
};

} // namespace

bool pq_base64_decode(const char * text, size_t n, std::vector<uint8_t> & out) {
    static const base64_table table;
    out.clear();
    if (n % 4 != 0) {
        return false;
    }
    if (n == 0) {
        return true;
    }
    const size_t n_pad = text[n - 1] != '=' ? 0 : text[n - 2] != '=' ? 1 : 2;
    out.resize(n / 4 * 3);
    uint8_t * dst = out.data();
    for (size_t i = 0; i < n; i += 4) {
        int v[4];
        for (size_t k = 0; k < 4; k++) {
            v[k] = i + k >= n - n_pad ? 0 : table.value[(unsigned char) text[i + k]];
        }
        if ((v[0] | v[1] | v[2] | v[3]) < 0) {
            out.clear();
            return false;
        }
        const uint32_t w = (uint32_t) v[0] << 18 | (uint32_t) v[1] << 12 | (uint32_t) v[2] << 6 | (uint32_t) v[3];
        *dst++ = (uint8_t) (w >> 16);
        *dst++ = (uint8_t) (w >> 8);
        *dst++ = (uint8_t) w;
    }
    // RFC 4648, 3.5: the bits that padding leaves over are zero, so that a blob has one spelling only
    for (size_t k = 0; k < n_pad; k++) {
        if (out.back() != 0) {
            out.clear();
            return false;
        }
        out.pop_back();
    }
    return true;
}

bool pq_blob_parse(const uint8_t * data, size_t n, pq_type type, pq_blob & out, std::string & error) {
    if ((int) type < 0 || type >= PQ_TYPE_COUNT) {
        return fail(error, "codebook type: found %d, needs 0 to %d", (int) type, PQ_TYPE_COUNT - 1);
    }
    if (n < PQ_BLOB_HEADER_BYTES) {
        return fail(error, "codebook size: found %zu bytes, needs a header of %d", n, PQ_BLOB_HEADER_BYTES);
    }
    if (memcmp(data, "MPQB", 4) != 0) {
        return fail(error, "codebook magic: found %02x %02x %02x %02x, needs \"MPQB\"",
                    data[0], data[1], data[2], data[3]);
    }
    if (read_u32(data + 4) != PQ_BLOB_VERSION) {
        return fail(error, "codebook version: found %u, needs %u", read_u32(data + 4), PQ_BLOB_VERSION);
    }

    const uint32_t D         = read_u16(data + 8);
    const uint32_t n_head_kv = read_u16(data + 10);
    const uint32_t M         = read_u16(data + 12);
    const uint32_t dsub      = read_u16(data + 14);
    const uint32_t n_codes   = read_u16(data + 16);
    const uint32_t flags     = read_u16(data + 18);

    if (!pq_head_size_ok((int32_t) D)) {
        return fail(error, "codebook head size: found %u, needs a multiple of 8 from 8 to %d", D, PQ_MAX_D);
    }
    if (n_head_kv == 0) {
        return fail(error, "codebook KV heads: found 0, needs 1 or more");
    }
    const uint32_t need_dsub = (uint32_t) pq_get_spec(type).dsub, need_codes = (uint32_t) pq_head_bytes(type, (int32_t) D);
    if (dsub != need_dsub || n_codes != need_codes) {
        return fail(error, "codebook shape: found dsub %u and %u bytes of codes per head, needs %u and %u for %s and head size %u",
                    dsub, n_codes, need_dsub, need_codes, type_name(type), D);
    }
    if (M != D / dsub) {
        return fail(error, "codebook subspaces: found %u, needs %u for head size %u", M, D / dsub, D);
    }
    if (flags & ~(PQ_BLOB_TRANSFORM | PQ_BLOB_ANISO)) {
        return fail(error, "codebook flags: found %#x, needs 0 to %#x", flags, PQ_BLOB_TRANSFORM | PQ_BLOB_ANISO);
    }
    if (read_u32(data + 28) != 0) {
        return fail(error, "codebook reserved field: found %u, needs 0", read_u32(data + 28));
    }

    const bool       has_transform = (flags & PQ_BLOB_TRANSFORM) != 0;
    const bool       has_aniso     = (flags & PQ_BLOB_ANISO) != 0;
    const head_parts parts         = get_head_parts((int32_t) D, has_transform, has_aniso);
    const uint64_t   need          = (uint64_t) parts.total() * n_head_kv;
    const uint32_t   payload_bytes = read_u32(data + 20);
    if (payload_bytes != need) {
        return fail(error, "codebook payload: header says %u bytes, needs %llu", payload_bytes, (unsigned long long) need);
    }
    if (n - PQ_BLOB_HEADER_BYTES != need) {
        return fail(error, "codebook payload: found %zu bytes, needs %llu",
                    n - PQ_BLOB_HEADER_BYTES, (unsigned long long) need);
    }
    const uint8_t * payload = data + PQ_BLOB_HEADER_BYTES;
    const uint32_t  crc     = crc32(payload, payload_bytes);
    if (crc != read_u32(data + 24)) {
        return fail(error, "codebook checksum: found %08x, needs %08x: the file is damaged", crc, read_u32(data + 24));
    }

    for (uint32_t h = 0; h < n_head_kv; h++) {
        const uint8_t * p = payload + h * parts.total();
        if (!f32_all_finite(p, parts.mu)) {
            return fail(error, "codebook head %u: found an infinite or NaN mu, needs finite values", h);
        }
        if (!f16_all_finite(p + parts.mu, parts.T)) {
            return fail(error, "codebook head %u: found an infinite or NaN T, needs finite values", h);
        }
        if (!f32_all_finite(p + parts.mu + parts.T, parts.aniso)) {
            return fail(error, "codebook head %u: found an infinite or NaN anisotropy, needs finite values", h);
        }
        if (!f16_all_finite(p + parts.mu + parts.T + parts.aniso, parts.centroids)) {
            return fail(error, "codebook head %u: found an infinite or NaN centroid, needs finite values", h);
        }
    }

    out.type          = type;
    out.D             = (int32_t) D;
    out.n_head_kv     = (int32_t) n_head_kv;
    out.has_transform = has_transform;
    out.has_aniso     = has_aniso;
    out.payload.assign(payload, payload + payload_bytes);
    return true;
}

bool pq_codebook_build(const pq_blob & blob, uint8_t * dst, std::string & error) {
    if ((int) blob.type < 0 || blob.type >= PQ_TYPE_COUNT || !pq_head_size_ok(blob.D)) {
        return fail(error, "codebook: found type %d and head size %d, needs a parsed blob", (int) blob.type, blob.D);
    }
    const head_parts         parts  = get_head_parts(blob.D, blob.has_transform, blob.has_aniso);
    const pq_codebook_layout layout = pq_get_codebook_layout(blob.D, blob.has_transform);
    const size_t             n      = (size_t) blob.D;

    if (blob.payload.size() != parts.total() * (size_t) blob.n_head_kv) {
        return fail(error, "codebook payload: found %zu bytes, needs %zu",
                    blob.payload.size(), parts.total() * (size_t) blob.n_head_kv);
    }

    std::vector<double> T(n * n), lu, inv(n * n);
    for (int32_t h = 0; h < blob.n_head_kv; h++) {
        const uint8_t * src  = blob.payload.data() + (size_t) h * parts.total();
        uint8_t       * head = dst + (size_t) h * layout.head_bytes;
        memset(head, 0, layout.head_bytes); // the gaps between parts too: equal codebooks are equal bytes

        const auto copy_f32 = [&](size_t offset) {
            for (size_t i = 0; i < n; i++) {
                const float value = read_f32(src + 4 * i);
                memcpy(head + offset + 4 * i, &value, sizeof(value));
            }
        };
        copy_f32(layout.mu);
        src += parts.mu;

        if (blob.has_transform) {
            for (size_t i = 0; i < n * n; i++) {
                const uint16_t value = (uint16_t) read_u16(src + 2 * i);
                T[i] = f16_to_f64(value);
                memcpy(head + layout.T + 2 * i, &value, sizeof(value));
            }
            src += parts.T;

            lu = T;
            if (!invert(lu, inv, n)) {
                return fail(error, "codebook head %d: found a singular transform, needs an invertible one", h);
            }
            // A pivot is hardly ever exactly zero: what tells a singular T is that its inverse does not invert it.
            const double residual = inverse_residual(T, inv, n);
            if (!(residual <= 1e-3)) {
                return fail(error, "codebook head %d: found a transform whose inverse is off by %.3g, needs 1e-3 or less "
                                   "(it is singular)", h, residual);
            }
            for (size_t i = 0; i < n * n; i++) {
                uint16_t value;
                if (!f64_to_f16(inv[i], value)) {
                    return fail(error, "codebook head %d: found %g in the inverse of its transform, needs 65504 or less, "
                                       "which an f16 holds: scale the transform up", h, inv[i]);
                }
                memcpy(head + layout.T_inv + 2 * i, &value, sizeof(value));
            }
        }

        if (blob.has_aniso) {
            copy_f32(layout.aniso);
            src += parts.aniso;
        }

        for (size_t i = 0; i < n * PQ_KSUB; i++) {
            const uint16_t value = (uint16_t) read_u16(src + 2 * i);
            memcpy(head + layout.centroids + 2 * i, &value, sizeof(value));
        }
    }
    return true;
}
