// Tests and times the CUDA encode and decode kernels, and those around the flash attention of prefill.
//
//   pq-cuda-codec-test          every case against the CPU kernels: codes must be the same bits
//   pq-cuda-codec-test quick    a few small cases, for compute-sanitizer
//   pq-cuda-codec-test bench    median times: K and V of one layer, of an MHA model (32 heads) and a GQA model (8), D = 128
#include "../cpu/pq-cpu.h"
#include "../kernels/pq-cuda.h"
#include "../kernels/pq-launch.cuh"

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#define CUDA(call)                                                                              \
    do {                                                                                        \
        const cudaError_t err_ = (call);                                                        \
        if (err_ != cudaSuccess) {                                                              \
            printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(err_));     \
            exit(1);                                                                            \
        }                                                                                       \
    } while (0)

static std::mt19937 rng(1);

static float normal() {
    return std::normal_distribution<float>()(rng);
}

template <class T> struct device_array {
    T    * p = nullptr;
    size_t n = 0;
    explicit device_array(size_t n) : n(n) { CUDA(cudaMalloc(&p, n * sizeof(T))); }
    explicit device_array(const std::vector<T> & v) : device_array(v.size()) {
        CUDA(cudaMemcpy(p, v.data(), n * sizeof(T), cudaMemcpyHostToDevice));
    }
    device_array(const device_array &) = delete;
    device_array(device_array && o) : p(o.p), n(o.n) { o.p = nullptr; }
    ~device_array() { cudaFree(p); }
    std::vector<T> host() const {
        std::vector<T> v(n);
        CUDA(cudaMemcpy(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
        return v;
    }
};

struct copies {
    static constexpr int MAX = 12;
    struct { const uint8_t * from; uint8_t * to; size_t n_bytes; } all[MAX];
    int n = 0;

    template <class T>
    void add(const device_array<T> & from, const device_array<T> & to) {
        all[n++] = { (const uint8_t *) from.p, (uint8_t *) to.p, from.n * sizeof(T) };
    }
};

static __device__ void make_copies(const copies & c) {
    for (int k = 0; k < c.n; k++) {
        for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < c.all[k].n_bytes; i += gridDim.x * blockDim.x) {
            c.all[k].to[i] = c.all[k].from[i];
        }
    }
}

// What others have written, as the next kernel finds it that waits for the last of them.
static __global__ void copy_after_wait(const __grid_constant__ copies c) {
    pq_pdl_wait();
    make_copies(c);
}

// What others are to read, written long after they may begin.
static __global__ void copy_late(const __grid_constant__ copies c) {
    pq_pdl_launch_next();
    const long long start = clock64();
    while (clock64() - start < 100000) {
    }
    make_copies(c);
}

// Head blocks with normally distributed centroids; T is no inverse of T_inv, which neither direction minds.
// twins: some centroids repeat others, so that two are equally near. aniso: codes are anisotropic, but for head 1, and for the second strip of others
static std::vector<uint8_t> make_codebook(int D, int n_head_kv, bool has_transform, bool twins = false, bool aniso = false) {
    const pq_codebook_layout l = pq_get_codebook_layout(D, has_transform);
    std::vector<uint8_t> blocks(l.head_bytes * n_head_kv, 0);
    for (int h = 0; h < n_head_kv; h++) {
        uint8_t * block = blocks.data() + h * l.head_bytes;
        for (int i = 0; i < D; i++) {
            ((float *) (block + l.mu))[i] = 0.3f * normal();
        }
        for (int i = 0; aniso && h != 1 && i < D; i++) {
            ((float *) (block + l.aniso))[i] = i / PQ_ANISO_STRIP == 1 ? 0.0f : normal();
        }
        for (int i = 0; has_transform && i < D * D; i++) {
            ((__half *) (block + l.T))[i]     = __float2half(normal() / sqrtf((float) D));
            ((__half *) (block + l.T_inv))[i] = __float2half(normal() / sqrtf((float) D));
        }
        for (int i = 0; i < D * PQ_KSUB; i++) {
            const bool twin = twins && i % (2 * PQ_KSUB) >= 400; // of 512 halves the last 112
            ((__half *) (block + l.centroids))[i] = twin ? ((const __half *) (block + l.centroids))[i - 200] : __float2half(normal());
        }
    }
    return blocks;
}

static int n_failed = 0, n_checks = 0;
static size_t n_strips = 0, n_other = 0; // of anisotropic codes of many rows, and of them those where rounding decided

static void check(bool ok, const std::string & what) {
    n_checks++;
    if (!ok) {
        n_failed++;
        printf("FAILED: %s\n", what.c_str());
    }
}

struct side_case {
    pq_type type;
    int     D;
    int     n_head_kv;
    bool    has_transform;
    bool    x_f16;
    bool    tail;
    enum { NORMAL, OUTLIERS, NAN_ROWS, ON_CENTROIDS } values;
    bool    aniso = false;
};

// One side on both backends: its arrays, and parameters that point to them.
struct encode_side {
    side_case c;
    int       n_rows, n_cells;
    std::vector<uint8_t> codebook, x, codes, tail;
    std::vector<int64_t> row_idx, tail_idx;
    device_array<uint8_t> d_codebook, d_x, d_codes, d_tail;
    device_array<int64_t> d_row_idx, d_tail_idx;
    pq_encode_params      host, device;

    static std::vector<uint8_t> make_x(const side_case & c, int n_rows, const std::vector<uint8_t> & codebook) {
        const pq_codebook_layout l = pq_get_codebook_layout(c.D, c.has_transform);
        const int n = n_rows * c.n_head_kv * c.D, dsub = pq_get_spec(c.type).dsub;
        std::vector<uint8_t> bytes(n * (c.x_f16 ? sizeof(__half) : sizeof(float)));
        for (int i = 0; i < n; i++) {
            float v = normal();
            if (c.values == side_case::OUTLIERS && i % c.D == 5) {
                v *= 1000;
            } else if (c.values == side_case::NAN_ROWS && i % 4099 == 7) {
                v = i % 2 ? NAN : INFINITY;
            } else if (c.values == side_case::ON_CENTROIDS) { // of which some repeat others
                const int j = i % c.D;
                const uint8_t * block = codebook.data() + i / c.D % c.n_head_kv * l.head_bytes;
                const int code = (200 + 37 * (i / c.D)) % PQ_KSUB; // also with a few rows some that repeat
                v = ((const float *) (block + l.mu))[j] +
                    __half2float(((const __half *) (block + l.centroids))[(j / dsub * PQ_KSUB + code) * dsub + j % dsub]);
            }
            if (c.x_f16) {
                ((__half *) bytes.data())[i] = __float2half(v);
            } else {
                ((float *) bytes.data())[i] = v;
            }
        }
        return bytes;
    }

    static std::vector<int64_t> make_cells(int n_rows, int n_cells) {
        std::vector<int64_t> cells(n_cells);
        for (int i = 0; i < n_cells; i++) {
            cells[i] = i;
        }
        std::shuffle(cells.begin(), cells.end(), rng);
        cells.resize(n_rows);
        return cells;
    }

    static std::vector<int64_t> make_slots(int n_rows) {
        std::vector<int64_t> slots = make_cells(n_rows, n_rows);
        for (int i = 0; i < n_rows; i += 3) {
            slots[i] = -1;
        }
        return slots;
    }

    encode_side(const side_case & c, int n_rows)
        : c(c), n_rows(n_rows), n_cells(2 * n_rows), codebook(make_codebook(c.D, c.n_head_kv, c.has_transform, c.values == side_case::ON_CENTROIDS, c.aniso)),
          x(make_x(c, n_rows, codebook)), codes(n_cells * c.n_head_kv * pq_head_bytes(c.type, c.D), 0xee),
          tail((size_t) n_rows * c.n_head_kv * c.D * sizeof(__half), 0x55), row_idx(make_cells(n_rows, n_cells)),
          tail_idx(make_slots(n_rows)), d_codebook(codebook), d_x(x), d_codes(codes), d_tail(tail), d_row_idx(row_idx),
          d_tail_idx(tail_idx) {
        const size_t elem = c.x_f16 ? sizeof(__half) : sizeof(float);
        pq_encode_params p = {};
        p.type             = c.type;
        p.D                = c.D;
        p.n_head_kv        = c.n_head_kv;
        p.n_rows           = n_rows;
        p.has_transform    = c.has_transform;
        p.x_f16            = c.x_f16;
        p.x_row_stride     = c.n_head_kv * c.D * elem;
        p.x_head_stride    = c.D * elem;
        p.codes_row_stride = c.n_head_kv * pq_head_bytes(c.type, c.D);
        p.tail_row_stride  = c.n_head_kv * c.D * sizeof(__half);
        host = device      = p;
        host.codebook      = codebook.data();
        host.x             = x.data();
        host.codes         = codes.data();
        host.row_idx       = row_idx.data();
        device.codebook    = d_codebook.p;
        device.x           = d_x.p;
        device.codes       = d_codes.p;
        device.row_idx     = d_row_idx.p;
        if (c.tail) {
            host.tail       = tail.data();
            host.tail_idx   = tail_idx.data();
            device.tail     = d_tail.p;
            device.tail_idx = d_tail_idx.p;
        }
    }

    std::string name() const {
        char text[160];
        snprintf(text, sizeof(text), "type %d, D %d, %d heads, transform %d, %d rows, f16 %d, tail %d, values %d, aniso %d", c.type, c.D,
                 c.n_head_kv, c.has_transform, n_rows, c.x_f16, c.tail, c.values, c.aniso);
        return text;
    }

    // With many rows y is that of the tensor cores. Where rounding decides between two codes of the second search, that strip's may be others: they
    // are rare, and cost no more than the nearest. Cells that no row goes to stay.
    void compare_aniso(const std::vector<uint8_t> & got) {
        std::vector<uint8_t> nearest = codes, scratch(pq_encode_scratch_size(&host)), plain = codebook;
        const pq_codebook_layout l = pq_get_codebook_layout(c.D, c.has_transform);
        for (int h = 0; h < c.n_head_kv; h++) {
            memset(plain.data() + h * l.head_bytes + l.aniso, 0, c.D * sizeof(float));
        }
        pq_encode_params p = host;
        p.codes    = nearest.data();
        p.codebook = plain.data();
        for (int64_t i = 0; i < pq_encode_n_items(&p); i++) {
            pq_encode_item(&p, i, scratch.data());
        }
        const int    dsub       = pq_get_spec(c.type).dsub;
        const size_t head_bytes = pq_head_bytes(c.type, c.D);
        size_t other = 0, worse = 0, strips = 0, moved = 0;
        for (int r = 0; r < n_rows; r++) {
            for (int h = 0; h < c.n_head_kv; h++) {
                const uint8_t * block = codebook.data() + h * l.head_bytes;
                const float   * mu = (const float *) (block + l.mu), * aniso = (const float *) (block + l.aniso);
                const size_t    at = (row_idx[r] * c.n_head_kv + h) * head_bytes;
                std::vector<double> y(c.D, 0.0);
                for (int k = 0; k < c.D; k++) {
                    const size_t i = ((size_t) r * c.n_head_kv + h) * c.D + k;
                    const float  x_k = __half2float(c.x_f16 ? ((const __half *) x.data())[i] : __float2half(((const float *) x.data())[i]));
                    for (int j = 0; j < c.D; j++) {
                        y[j] += ((double) x_k - mu[k]) * __half2float(((const __half *) (block + l.T))[k * c.D + j]);
                    }
                }
                for (int d0 = 0; d0 < c.D; d0 += PQ_ANISO_STRIP) {
                    bool   same = true, as_before = true;
                    double cost[2]; // of the codes found, of the nearest
                    for (int which = 0; which < 2; which++) {
                        double ee = 0.0, ed = 0.0, dd = 0.0;
                        for (int i = d0; i < std::min(d0 + PQ_ANISO_STRIP, c.D); i++) {
                            const int m = i / dsub;
                            const int code = pq_code_get(c.type, c.D, (which ? nearest : got).data() + at, m);
                            same      = same && (which || code == (int) pq_code_get(c.type, c.D, codes.data() + at, m));
                            as_before = as_before && (which || code == (int) pq_code_get(c.type, c.D, nearest.data() + at, m));
                            const double e = y[i] - __half2float(((const __half *) (block + l.centroids))[(m * PQ_KSUB + code) * dsub + i % dsub]);
                            const double d = aniso[i] * y[i];
                            ee += e * e;
                            ed += e * d;
                            dd += d * d;
                        }
                        cost[which] = ee + (dd > 0.0 ? PQ_ANISO_WEIGHT * ed * ed / dd : 0.0);
                    }
                    strips++;
                    moved += !as_before;
                    other += !same;
                    worse += cost[0] > cost[1] * (1.0 + 1e-4) + 1e-6;
                }
            }
        }
        std::vector<char> ours(got.size(), 0);
        for (int64_t cell : row_idx) {
            std::fill_n(ours.begin() + cell * (int64_t) (c.n_head_kv * head_bytes), c.n_head_kv * head_bytes, (char) 1);
        }
        for (size_t i = 0; i < got.size(); i++) {
            worse += !ours[i] && got[i] != codes[i];
        }
        n_strips += strips;
        n_other  += other;
        char text[300];
        snprintf(text, sizeof(text), "encode %s: of %zu strips %zu have codes that are not the CPU's, %zu have worse than the nearest, %zu others than those", name().c_str(),
                 strips, other, worse, moved);
        check(other <= 1 + strips / 500 && worse == 0 && moved > strips / 16, text);
    }

    void compare() {
        std::vector<uint8_t> scratch(pq_encode_scratch_size(&host));
        for (int64_t i = 0; i < pq_encode_n_items(&host); i++) {
            pq_encode_item(&host, i, scratch.data());
        }
        const std::vector<uint8_t> got = d_codes.host(), got_tail = d_tail.host();
        size_t different = 0;
        for (size_t i = 0; i < got.size(); i++) {
            different += got[i] != codes[i];
        }
        if (c.aniso && c.has_transform && n_rows > 32) {
            compare_aniso(got);
        } else {
            check(different == 0, "encode " + name() + ": " + std::to_string(different) + " bytes differ");
        }
        // a NaN may be any NaN
        size_t tail_different = 0;
        for (size_t i = 0; i < tail.size() / sizeof(__half); i++) {
            const float a = __half2float(((const __half *) tail.data())[i]), b = __half2float(((const __half *) got_tail.data())[i]);
            tail_different += !(a == b || (std::isnan(a) && std::isnan(b)));
        }
        check(tail_different == 0, "tail " + name() + ": " + std::to_string(tail_different) + " elements differ");
    }
};

static void test_encode(const std::vector<side_case> & cases, int n_rows) {
    std::vector<encode_side>      sides;
    std::vector<pq_encode_params> params;
    sides.reserve(cases.size());
    for (const side_case & c : cases) {
        sides.emplace_back(c, n_rows);
        params.push_back(sides.back().device);
    }
    CUDA(pq_cuda_encode(params.data(), (int) params.size(), 0));
    CUDA(cudaDeviceSynchronize());
    for (encode_side & s : sides) {
        s.compare();
    }
}

static void test_decode(pq_type type, int D, int n_head_kv, bool has_transform, int n_rows) {
    const std::vector<uint8_t> codebook = make_codebook(D, n_head_kv, has_transform);
    std::vector<uint8_t> codes(n_rows * n_head_kv * pq_head_bytes(type, D));
    for (uint8_t & c : codes) {
        c = (uint8_t) rng();
    }
    const size_t n = (size_t) n_rows * n_head_kv * D;
    std::vector<float> want(n);
    pq_decode_params p = {};
    p.type             = type;
    p.D                = D;
    p.n_head_kv        = n_head_kv;
    p.n_rows           = n_rows;
    p.codebook         = codebook.data();
    p.has_transform    = has_transform;
    p.codes            = codes.data();
    p.codes_row_stride = n_head_kv * pq_head_bytes(type, D);
    p.x                = want.data();
    p.x_row_stride     = n_head_kv * D * sizeof(float);
    p.x_head_stride    = D * sizeof(float);
    std::vector<uint8_t> scratch(pq_decode_scratch_size(&p));
    for (int64_t i = 0; i < pq_decode_n_items(&p); i++) {
        pq_decode_item(&p, i, scratch.data());
    }
    const device_array<uint8_t> d_codebook(codebook), d_codes(codes);
    const device_array<float>    d_x(n);
    const device_array<uint16_t> d_x16(n);
    p.codebook = d_codebook.p;
    p.codes    = d_codes.p;
    p.x        = d_x.p;
    CUDA(pq_cuda_decode(p, nullptr, 0));
    // f16 in the layout of the prefill's scratch: [n_head_kv][n_rows][D]
    p.x             = nullptr;
    p.x_row_stride  = D * sizeof(uint16_t);
    p.x_head_stride = (size_t) n_rows * D * sizeof(uint16_t);
    CUDA(pq_cuda_decode(p, d_x16.p, 0));
    CUDA(cudaDeviceSynchronize());
    const std::vector<float>    got   = d_x.host();
    const std::vector<uint16_t> got16 = d_x16.host();
    double err = 0, err16 = 0, sum = 0;
    for (int r = 0; r < n_rows; r++) {
        for (int h = 0; h < n_head_kv; h++) {
            for (int i = 0; i < D; i++) {
                const size_t at = ((size_t) r * n_head_kv + h) * D + i;
                const double w  = want[at];
                __half x16;
                memcpy(&x16, &got16[((size_t) h * n_rows + r) * D + i], sizeof(x16));
                err   += (got[at] - w) * (got[at] - w);
                err16 += (__half2float(x16) - w) * (__half2float(x16) - w);
                sum   += w * w;
            }
        }
    }
    char text[120];
    snprintf(text, sizeof(text), "decode type %d, D %d, %d heads, transform %d, %d rows: NMSE %g, as f16 %g", type, D, n_head_kv,
             has_transform, n_rows, err / sum, err16 / sum);
    check(err / sum < 1e-11 && err16 / sum < 2e-7, text); // f32 sums in another order; f16 rounds to 11 bits
}

// ---- rows from codes, from the tail, and zeros ----

enum row_sources {
    ROWS_ALL_CODES, // no row_source
    ROWS_MIXED,     // every kind in turn and in runs; the last rows, which have no codes, are zero
    ROWS_NO_CODES,  // as in the first step of a prompt
    ROWS_ONE_CODE,  // only the last row
};

struct decode_side {
    pq_type type;
    int     D, n_head_kv;
    bool    has_transform, heads_apart; // heads_apart: heads are not side by side within a cell

    size_t cell_bytes() const { return n_head_kv * pq_head_bytes(type, D); }
};

// Decodes the sides in one call, and compares each with the CPU.
static void test_decode_rows(const std::vector<decode_side> & sides, int n_rows, row_sources sources) {
    constexpr int N_SLOTS = 77;
    std::vector<int32_t> source(n_rows, PQ_ROW_CODES);
    int n_cells = sources == ROWS_MIXED ? n_rows - n_rows / 5 : n_rows;
    for (int i = 0; i < n_rows; i++) {
        const int slot = (int) (rng() % N_SLOTS);
        if (sources == ROWS_NO_CODES || (sources == ROWS_ONE_CODE && i != n_rows - 1)) {
            source[i] = i % 7 == 3 ? PQ_ROW_ZERO : slot;
        } else if (sources == ROWS_MIXED) {
            const int run = i / 48 % 3; // longer than a tile, so that some tiles are of one kind
            source[i] = i >= n_cells || rng() % 16 == 0 ? PQ_ROW_ZERO : run == 0 ? slot : run == 1 || rng() % 2 ? PQ_ROW_CODES : slot;
        }
    }
    n_cells = sources == ROWS_NO_CODES ? 0 : n_cells;
    const device_array<int32_t> d_source(source);

    struct memory {
        std::vector<uint8_t>   codebook, codes;
        std::vector<uint16_t>  tail;
        device_array<uint8_t>  d_codebook, d_codes;
        device_array<uint16_t> d_tail, d_x;
    };
    std::vector<memory>              all;
    std::vector<pq_cuda_decode_side> params;
    all.reserve(sides.size());
    for (const decode_side & c : sides) {
        std::vector<uint8_t> codebook = make_codebook(c.D, c.n_head_kv, c.has_transform), codes(std::max<size_t>(1, n_cells * c.cell_bytes()));
        for (uint8_t & b : codes) {
            b = (uint8_t) rng();
        }
        std::vector<uint16_t> tail((size_t) N_SLOTS * c.n_head_kv * c.D);
        for (uint16_t & t : tail) {
            t = (uint16_t) (rng() % 0x7c00);
        }
        device_array<uint8_t>  d_codebook(codebook), d_codes(codes);
        device_array<uint16_t> d_tail(tail), d_x(std::vector<uint16_t>((size_t) n_rows * c.n_head_kv * c.D, 0x7e00)); // NaN
        all.push_back({ codebook, codes, tail, std::move(d_codebook), std::move(d_codes), std::move(d_tail), std::move(d_x) });
        const memory & m = all.back();
        pq_cuda_decode_side s = {};
        s.p.type             = c.type;
        s.p.D                = c.D;
        s.p.n_head_kv        = c.n_head_kv;
        s.p.n_rows           = n_rows;
        s.p.codebook         = m.d_codebook.p;
        s.p.has_transform    = c.has_transform;
        s.p.codes            = m.d_codes.p;
        s.p.codes_row_stride = c.heads_apart ? pq_head_bytes(c.type, c.D) : c.cell_bytes();
        s.codes_head_stride  = c.heads_apart ? n_cells * pq_head_bytes(c.type, c.D) : pq_head_bytes(c.type, c.D);
        s.p.x_row_stride     = c.D * sizeof(uint16_t);
        s.p.x_head_stride    = (size_t) n_rows * c.D * sizeof(uint16_t);
        s.x_f16              = m.d_x.p;
        s.row_source         = sources == ROWS_ALL_CODES ? nullptr : d_source.p;
        s.tail               = (const uint8_t *) m.d_tail.p;
        s.tail_row_stride    = c.n_head_kv * c.D * sizeof(uint16_t);
        s.tail_head_stride   = c.D * sizeof(uint16_t);
        params.push_back(s);
    }
    CUDA(pq_cuda_decode_rows(params.data(), (int) params.size(), 0));
    CUDA(cudaDeviceSynchronize());

    for (size_t i = 0; i < sides.size(); i++) {
        const decode_side & c   = sides[i];
        const memory      & m   = all[i];
        const std::vector<uint16_t> got = m.d_x.host();
        std::vector<float> want((size_t) std::max(n_cells, 1) * c.D);
        double err = 0, sum = 1e-30;
        size_t copies_differ = 0;
        for (int h = 0; h < c.n_head_kv; h++) {
            pq_decode_params p = params[i].p;
            p.n_head_kv     = 1;
            p.n_rows        = n_cells;
            p.codebook      = m.codebook.data() + h * pq_get_codebook_layout(c.D, c.has_transform).head_bytes;
            p.codes         = m.codes.data() + h * params[i].codes_head_stride;
            p.x             = want.data();
            p.x_row_stride  = c.D * sizeof(float);
            p.x_head_stride = 0;
            std::vector<uint8_t> scratch(pq_decode_scratch_size(&p));
            for (int64_t item = 0; n_cells > 0 && item < pq_decode_n_items(&p); item++) {
                pq_decode_item(&p, item, scratch.data());
            }
            for (int r = 0; r < n_rows; r++) {
                for (int e = 0; e < c.D; e++) {
                    const uint16_t x = got[((size_t) h * n_rows + r) * c.D + e];
                    if (source[r] == PQ_ROW_CODES) {
                        __half x16;
                        memcpy(&x16, &x, sizeof(x16));
                        const double w = want[(size_t) r * c.D + e], d = __half2float(x16) - w;
                        err += d == d ? d * d : INFINITY;
                        sum += w * w;
                    } else {
                        copies_differ += x != (source[r] < 0 ? 0 : m.tail[((size_t) source[r] * c.n_head_kv + h) * c.D + e]);
                    }
                }
            }
        }
        char text[200];
        snprintf(text, sizeof(text), "decode rows, side %d of %d: type %d, D %d, %d heads (apart %d), transform %d, %d rows, sources %d: "
                 "NMSE %g, %d copied elements differ", (int) i, (int) sides.size(), c.type, c.D, c.n_head_kv, c.heads_apart,
                 c.has_transform, n_rows, sources, err / sum, (int) copies_differ);
        check(err / sum < 2e-7 && copies_differ == 0, text);
    }
}

static void test_decode_rows(bool quick) {
    const std::vector<int> all_D    = quick ? std::vector<int> { 80, 128 } : std::vector<int> { 8, 24, 64, 72, 80, 96, 128, 136, 192, 256 };
    const std::vector<int> all_rows = quick ? std::vector<int> { 1, 97 } : std::vector<int> { 1, 31, 32, 33, 256, 500 };
    for (const row_sources sources : { ROWS_ALL_CODES, ROWS_MIXED, ROWS_NO_CODES, ROWS_ONE_CODE }) {
        for (const pq_type type : { PQ_TYPE_PQ4, PQ_TYPE_PQ3, PQ_TYPE_PQ2 }) {
            for (const bool has_transform : { false, true }) {
                for (const int D : all_D) {
                    const decode_side k = { type, D, 3, has_transform, false };
                    test_decode_rows({ k }, all_rows.back(), sources);
                    test_decode_rows({ k, k }, 70, sources);
                }
                const decode_side k = { type, 128, 2, has_transform, false };
                for (const int n_rows : all_rows) {
                    test_decode_rows({ k, k }, n_rows, sources);
                }
                // sides that differ, and heads that lie apart
                test_decode_rows({ k, { PQ_TYPE_PQ2, 128, 2, has_transform, false } }, 97, sources);
                test_decode_rows({ k, { type, 128, 5, has_transform, true } }, 97, sources);
                test_decode_rows({ k, { type, 64, 2, !has_transform, false } }, 97, sources);
            }
        }
        if (!quick) { // warps take several tiles, and blocks end at different rows
            const decode_side k = { PQ_TYPE_PQ4, 128, 32, true, false };
            test_decode_rows({ k, k }, 4000, sources);
        }
    }
}

// ---- in the space of codes: lookups alone, and what comes before and after flash attention ----

static float half_at(const std::vector<uint16_t> & v, size_t i) {
    __half h;
    memcpy(&h, &v[i], sizeof(h));
    return __half2float(h);
}

static const __half * halves(const std::vector<uint8_t> & codebook, size_t offset) {
    return (const __half *) (codebook.data() + offset);
}

// Prefill in the space of codes: maps of queries, rows of the tail and results against sums in double precision, looked up rows against their centroids, the
// mask in between and afterwards. First alone, then with rows to encode, which are to become most of the tail.
struct prefill_case {
    pq_type k, v;
    int  n_head, n_head_kv, n_q, n_kv, n_slots;
    bool heads_apart = false;
    int  shift       = 0; // bytes that codes lie off
    bool x_f16       = false; // rows to encode
    bool other_slots = false; // their slots of V are those of K, elsewhere in memory
};

static void test_prefill(const prefill_case & t) {
    constexpr int D = 128;
    const int n_q = t.n_q, n_kv = t.n_kv, n_slots = t.n_slots, n_head = t.n_head, n_head_kv = t.n_head_kv;
    const pq_codebook_layout l = pq_get_codebook_layout(D, true);
    const std::vector<uint8_t> books[2] = { make_codebook(D, n_head_kv, true, false, true), make_codebook(D, n_head_kv, true) };
    const int group = n_head / n_head_kv, mask_cols = (n_kv + 7) / 8 * 8 + 8;
    std::vector<float> q((size_t) n_head * n_q * D), out((size_t) n_q * n_head * D);
    for (float & x : q) {
        x = 3.0f * normal();
    }
    for (float & x : out) {
        x = normal();
    }
    // some slots are not in use, some hold cells beyond those that are read; the tail's mask is followed by the cells
    std::vector<int32_t> cells(n_kv + n_slots);
    for (size_t i = 0; i < cells.size(); i++) {
        cells[i] = (int32_t) i;
    }
    std::shuffle(cells.begin(), cells.end(), rng);
    std::vector<uint16_t> mask((size_t) n_q * mask_cols), tail_mask((size_t) (n_q + 2) * std::max(n_slots, 1));
    for (uint16_t & m : mask) {
        m = (uint16_t) rng();
    }
    for (uint16_t & m : tail_mask) {
        m = (uint16_t) rng();
    }
    // The tail of another stream lies before this one. Of rows to encode one is for that, the others for this
    const int slot0 = n_slots;
    std::vector<int64_t> new_cells, new_slots;
    if (n_slots > 0) {
        new_cells.push_back(n_kv + n_slots);
        new_slots.push_back(slot0 - 1);
    } else { // no tail: lookups find them as codes
        for (int c = 0; c < n_kv && c < 200; c += 3) {
            new_cells.push_back(c);
        }
    }
    for (int s = 0; s < n_slots; s++) {
        if (s % 7 == 2) {
            cells[s] = -1;
        } else if (s % 7 != 4) {
            new_cells.push_back(cells[s]);
            new_slots.push_back(slot0 + s);
        }
        tail_mask[(size_t) n_q * n_slots + s]       = (uint16_t) cells[s];
        tail_mask[(size_t) (n_q + 1) * n_slots + s] = (uint16_t) ((uint32_t) cells[s] >> 16);
    }
    const size_t row_elements = (size_t) n_head_kv * D;
    std::vector<uint16_t> tail[2]; // of both streams
    std::vector<uint8_t>  x[2], codes[2];
    for (int i = 0; i < 2; i++) {
        const uint16_t nan = 0x7e00; // in slots that are not in use
        tail[i].assign(std::max(2 * n_slots, 1) * row_elements, nan);
        for (int s = 0; s < n_slots; s++) {
            for (size_t e = 0; e < row_elements && cells[s] >= 0; e++) {
                const __half h = __float2half(normal());
                memcpy(&tail[i][(slot0 + s) * row_elements + e], &h, sizeof(h));
            }
        }
        for (size_t r = 0; r < new_cells.size(); r++) {
            for (size_t e = 0; e < row_elements; e++) {
                uint16_t bits = 0; // of the other stream
                if (n_slots == 0) {
                    const __half h = __float2half(normal());
                    memcpy(&bits, &h, sizeof(h));
                } else if (new_slots[r] >= slot0) {
                    bits = tail[i][new_slots[r] * row_elements + e];
                }
                const float    f    = half_at({ bits }, 0);
                const uint8_t * from = t.x_f16 ? (const uint8_t *) &bits : (const uint8_t *) &f;
                x[i].insert(x[i].end(), from, from + (t.x_f16 ? sizeof(bits) : sizeof(f)));
            }
        }
        codes[i].resize((n_kv + n_slots + 1) * n_head_kv * pq_head_bytes(i ? t.v : t.k, D) + t.shift);
        for (uint8_t & c : codes[i]) {
            c = (uint8_t) rng();
        }
    }
    const device_array<uint8_t>  d_k_book(books[0]), d_v_book(books[1]), d_k_codes(codes[0]), d_v_codes(codes[1]), d_k_x(x[0]), d_v_x(x[1]);
    const device_array<float>    d_q(q), d_out(out), d_q_mapped(out.size());
    const device_array<int64_t>  d_new_cells(new_cells), d_new_slots(new_slots), d_v_slots(new_slots);
    const device_array<uint16_t> d_k_tail(tail[0]), d_v_tail(tail[1]), d_k(n_kv * row_elements), d_v(n_kv * row_elements);
    const device_array<uint16_t> d_mask(mask), d_tail_mask(tail_mask), d_kept((size_t) n_q * std::max(n_slots, 1));
    pq_cuda_prefill_step s = {};
    s.p.n_head = n_head;
    s.p.n_head_kv = n_head_kv;
    s.p.n_stream = 1;
    s.p.n_q  = n_q;
    s.p.n_kv = n_kv;
    for (int i = 0; i < 2; i++) {
        const pq_type type = i ? t.v : t.k;
        const size_t  head = pq_head_bytes(type, D);
        (i ? s.p.v : s.p.k) = { type, D, (i ? d_v_book : d_k_book).p, 1, (i ? d_v_codes : d_k_codes).p + t.shift, t.heads_apart ? head : n_head_kv * head,
                                t.heads_apart ? (n_kv + n_slots + 1) * head : head, 0, nullptr, nullptr };
    }
    s.p.q = (const uint8_t *) d_q.p; // [n_head][n_q][D], as it does not lie in a model
    s.p.q_token_stride = D * sizeof(float);
    s.p.q_head_stride  = n_q * D * sizeof(float);
    s.p.mask = (const uint8_t *) d_mask.p;
    s.p.mask_token_stride = mask_cols * sizeof(uint16_t);
    s.p.tail.n = n_slots;
    s.p.tail.k = (const uint8_t *) (d_k_tail.p + slot0 * row_elements);
    s.p.tail.v = (const uint8_t *) (d_v_tail.p + slot0 * row_elements);
    s.p.tail.k_row_stride  = s.p.tail.v_row_stride  = row_elements * sizeof(uint16_t);
    s.p.tail.k_head_stride = s.p.tail.v_head_stride = D * sizeof(uint16_t);
    s.p.tail.mask = (const uint8_t *) d_tail_mask.p;
    s.p.tail.mask_token_stride = n_slots * sizeof(uint16_t);
    s.p.dst = d_out.p;
    s.p.dst_head_stride  = D * sizeof(float);
    s.p.dst_token_stride = n_head * D * sizeof(float);
    s.cell_low  = d_tail_mask.p + (size_t) n_q * n_slots;
    s.cell_high = s.cell_low + n_slots;
    s.q_mapped  = d_q_mapped.p;
    s.k_rows    = d_k.p;
    s.v_rows    = d_v.p;
    s.mask      = (uint8_t *) d_mask.p;
    s.mask_kept = d_kept.p;
    std::vector<int> slot_of(n_kv, -1);
    for (int i = 0; i < n_slots; i++) {
        if (cells[i] >= 0 && cells[i] < n_kv) {
            slot_of[cells[i]] = i;
        }
    }
    char what[200];
    snprintf(what, sizeof(what), "prefill K %d V %d heads %d/%d (apart %d), n_q %d, n_kv %d, slots %d, codes at %d", t.k, t.v, n_head, n_head_kv, t.heads_apart, n_q, n_kv, n_slots, t.shift);
    check(!pq_cuda_prefill_unsupported(s.p), std::string(what) + ": not supported");

    for (const bool encodes : { false, true }) {
        const std::string text = std::string(what) + (encodes ? ", encoding" : "");
        if (encodes && t.heads_apart) { // rows of codes that the encoder does not write
            continue;
        }
        for (const device_array<uint16_t> * rows : { &d_k, &d_v }) {
            CUDA(cudaMemset(rows->p, 0xff, rows->n * sizeof(uint16_t))); // NaN
        }
        CUDA(cudaMemcpy(d_out.p, out.data(), out.size() * sizeof(float), cudaMemcpyHostToDevice));
        pq_encode_params p[2] = {};
        if (encodes) {
            for (int i = 0; i < 2; i++) {
                const pq_attn_side & side = i ? s.p.v : s.p.k;
                for (const int64_t slot : new_slots) { // or they would be what they are to become
                    CUDA(cudaMemset((i ? d_v_tail : d_k_tail).p + slot * row_elements, 0xff, row_elements * sizeof(uint16_t)));
                }
                p[i].type             = side.type;
                p[i].D                = D;
                p[i].n_head_kv        = n_head_kv;
                p[i].n_rows           = (int64_t) new_cells.size();
                p[i].codebook         = side.codebook;
                p[i].has_transform    = 1;
                p[i].x                = (i ? d_v_x : d_k_x).p;
                p[i].x_f16            = t.x_f16;
                p[i].x_head_stride    = D * (t.x_f16 ? sizeof(__half) : sizeof(float));
                p[i].x_row_stride     = n_head_kv * p[i].x_head_stride;
                p[i].codes            = const_cast<uint8_t *>(side.data);
                p[i].codes_row_stride = side.row_stride;
                p[i].row_idx          = d_new_cells.p;
                if (n_slots > 0) {
                    p[i].tail            = (uint8_t *) (i ? d_v_tail : d_k_tail).p;
                    p[i].tail_row_stride = row_elements * sizeof(uint16_t);
                    p[i].tail_idx        = (i && t.other_slots ? d_v_slots : d_new_slots).p;
                }
            }
        }
        // what is read arrives late, and what is written is seen by who waits for the last kernel
        copies late, after;
        const device_array<float>    q_then(d_q.n), q_mapped_seen(d_q_mapped.n);
        const device_array<uint8_t>  k_x_then(d_k_x.n), v_x_then(d_v_x.n), k_codes_then(d_k_codes.n), v_codes_then(d_v_codes.n), k_codes_seen(d_k_codes.n), v_codes_seen(d_v_codes.n);
        const device_array<uint16_t> k_tail_then(d_k_tail.n), v_tail_then(d_v_tail.n), k_tail_seen(d_k_tail.n), v_tail_seen(d_v_tail.n), k_seen(d_k.n), v_seen(d_v.n), mask_seen(d_mask.n);
        auto arrives_late = [&](const auto & now, const auto & then) {
            CUDA(cudaMemcpy(then.p, now.p, now.n * sizeof(*now.p), cudaMemcpyDeviceToDevice));
            CUDA(cudaMemset(now.p, 0xff, now.n * sizeof(*now.p)));
            late.add(then, now);
        };
        arrives_late(d_q, q_then);
        arrives_late(d_k_x, k_x_then);
        arrives_late(d_v_x, v_x_then);
        arrives_late(d_k_codes, k_codes_then);
        arrives_late(d_v_codes, v_codes_then);
        arrives_late(d_k_tail, k_tail_then);
        arrives_late(d_v_tail, v_tail_then);
        after.add(d_q_mapped, q_mapped_seen);
        after.add(d_k_codes, k_codes_seen);
        after.add(d_v_codes, v_codes_seen);
        after.add(d_k_tail, k_tail_seen);
        after.add(d_v_tail, v_tail_seen);
        after.add(d_k, k_seen);
        after.add(d_v, v_seen);
        after.add(d_mask, mask_seen);
        CUDA(cudaDeviceSynchronize());
        CUDA(pq_launch(copy_late, dim3(64), 256, 0, 0, late));
        CUDA(pq_cuda_prefill_begin(s, encodes ? p : nullptr, 0));
        CUDA(pq_launch(copy_after_wait, dim3(64), 256, 0, 0, after));
        CUDA(cudaDeviceSynchronize());
        check(k_seen.host() == d_k.host() && v_seen.host() == d_v.host(), text + ": rows are not all there for the next kernel");
        check(q_mapped_seen.host() == d_q_mapped.host() && mask_seen.host() == d_mask.host(), text + ": queries and mask are not all there for the next kernel");
        check(k_codes_seen.host() == d_k_codes.host() && v_codes_seen.host() == d_v_codes.host(), text + ": codes are not all there for the next kernel");
        check(k_tail_seen.host() == d_k_tail.host() && v_tail_seen.host() == d_v_tail.host(), text + ": the tail is not all there for the next kernel");
        const std::vector<uint8_t> codes_now[2] = { d_k_codes.host(), d_v_codes.host() };

        if (encodes) { // the tail and the codes that a launch of its own writes
            std::vector<uint16_t> tails[2] = { d_k_tail.host(), d_v_tail.host() };
            for (int i = 0; i < 2; i++) {
                for (const int64_t slot : new_slots) {
                    const size_t at = slot * row_elements;
                    check(std::equal(&tails[i][at], &tails[i][at] + row_elements, slot < slot0 ? std::vector<uint16_t>(row_elements, 0).data() : &tail[i][at]), text + ": the tail");
                }
            }
            for (int i = 0; i < 2; i++) {
                CUDA(cudaMemcpy((i ? d_v_codes : d_k_codes).p, codes[i].data(), codes[i].size(), cudaMemcpyHostToDevice));
            }
            CUDA(pq_cuda_encode(p, 2, 0));
            CUDA(cudaDeviceSynchronize());
            check(codes_now[0] == d_k_codes.host() && codes_now[1] == d_v_codes.host(), text + ": codes are not those of encoding alone");
        }

        // queries
        const std::vector<float> q_mapped = d_q_mapped.host();
        double err = 0, sum = 0;
        for (int h = 0; h < n_head; h++) {
            const __half * T_inv = halves(books[0], h / group * l.head_bytes + l.T_inv);
            for (int i = 0; i < n_q; i++) {
                for (int j = 0; j < D; j++) {
                    double want = 0;
                    for (int e = 0; e < D; e++) {
                        want += (double) q[((size_t) h * n_q + i) * D + e] * __half2float(T_inv[j * D + e]);
                    }
                    const double d = q_mapped[((size_t) i * n_head + h) * D + j] - want;
                    err += d == d ? d * d : INFINITY;
                    sum += want * want;
                }
            }
        }
        check(err / sum < 1e-11, text + ": queries, NMSE " + std::to_string(err / sum));

        // rows: of the tail, or centroids
        for (int side = 0; side < 2; side++) {
            const std::vector<uint16_t> got = (side ? d_v : d_k).host();
            const std::vector<uint8_t> & book = books[side];
            const pq_attn_side & from = side ? s.p.v : s.p.k;
            const pq_spec spec = pq_get_spec(from.type);
            size_t differ = 0;
            err = 0;
            sum = 1e-30;
            for (int h = 0; h < n_head_kv; h++) {
                const __half   * T  = halves(book, h * l.head_bytes + l.T);
                const float    * mu = (const float *) (book.data() + h * l.head_bytes + l.mu);
                const uint16_t * centroids = (const uint16_t *) (book.data() + h * l.head_bytes + l.centroids);
                for (int c = 0; c < n_kv; c++) {
                    const uint8_t * row_codes = codes_now[side].data() + t.shift + c * from.row_stride + h * from.head_stride;
                    for (int j = 0; j < D; j++) {
                        const size_t at = ((size_t) h * n_kv + c) * D + j;
                        if (slot_of[c] < 0) {
                            const int m = j / spec.dsub;
                            differ += got[at] != centroids[(m * PQ_KSUB + pq_code_get(from.type, D, row_codes, m)) * spec.dsub + j % spec.dsub];
                            continue;
                        }
                        double want = 0;
                        for (int e = 0; e < D; e++) {
                            want += ((double) half_at(tail[side], (slot0 + slot_of[c]) * row_elements + h * D + e) - mu[e]) * __half2float(T[e * D + j]);
                        }
                        const double d = half_at(got, at) - want;
                        err += d == d ? d * d : INFINITY;
                        sum += want * want;
                    }
                }
            }
            check(err / sum < 2e-7 && differ == 0, text + (side ? ": V" : ": K") + ", NMSE of the tail " + std::to_string(err / sum) + ", elements of others that differ: " + std::to_string(differ));
        }

        // the mask
        std::vector<uint16_t> got = d_mask.host();
        size_t differ = 0;
        for (int i = 0; i < n_q; i++) {
            for (int c = 0; c < mask_cols; c++) {
                differ += got[(size_t) i * mask_cols + c] != (c < n_kv && slot_of[c] >= 0 ? tail_mask[(size_t) i * n_slots + slot_of[c]] : mask[(size_t) i * mask_cols + c]);
            }
        }
        check(differ == 0, text + ": elements of the mask differ: " + std::to_string(differ));

        CUDA(pq_cuda_prefill_end(s, 0));
        CUDA(cudaDeviceSynchronize());
        got = d_mask.host();
        check(got == mask, text + ": the mask is not what it was");
        const std::vector<float> mapped = d_out.host();
        err = sum = 0;
        for (int i = 0; i < n_q; i++) {
            for (int h = 0; h < n_head; h++) {
                const __half * T_inv = halves(books[1], h / group * l.head_bytes + l.T_inv);
                const float  * mu    = (const float *) (books[1].data() + h / group * l.head_bytes + l.mu);
                const float  * y     = out.data() + ((size_t) i * n_head + h) * D;
                for (int j = 0; j < D; j++) {
                    double want = mu[j];
                    for (int e = 0; e < D; e++) {
                        want += (double) y[e] * __half2float(T_inv[e * D + j]);
                    }
                    const double d = mapped[((size_t) i * n_head + h) * D + j] - want;
                    err += d == d ? d * d : INFINITY;
                    sum += want * want;
                }
            }
        }
        check(err / sum < 1e-11, text + ": results, NMSE " + std::to_string(err / sum));
    }
}

static void test_code_space(bool quick) {
    for (const pq_type type : { PQ_TYPE_PQ4, PQ_TYPE_PQ3, PQ_TYPE_PQ2 }) {
        for (const int n_kv : quick ? std::vector<int> { 1, 97 } : std::vector<int> { 1, 16, 63, 64, 65, 700, 40000 } /* the last: a block takes several tiles */) {
            test_prefill({ type, type, 2, 2, 1, n_kv, 0 });
            test_prefill({ type, type, 3, 3, 1, n_kv, 5, true, type == PQ_TYPE_PQ3 ? 1 : 4 });
        }
    }
    test_prefill({ PQ_TYPE_PQ4, PQ_TYPE_PQ4, 2, 1, 9, 256, 40 });
    test_prefill({ PQ_TYPE_PQ3, PQ_TYPE_PQ2, 4, 4, 33, 300, 0 });
    test_prefill({ PQ_TYPE_PQ3, PQ_TYPE_PQ2, 2, 2, 9, 60, 20 });   // one tile, the encoder of few rows, two of it
    test_prefill({ PQ_TYPE_PQ2, PQ_TYPE_PQ4, 3, 1, 40, 200, 80 }); // two of the encoder of many
    test_prefill({ PQ_TYPE_PQ4, PQ_TYPE_PQ4, 4, 2, 40, 200, 150, false, 0, true });
    test_prefill({ PQ_TYPE_PQ4, PQ_TYPE_PQ4, 4, 2, 40, 200, 150, false, 0, false, true }); // encoded before
    test_prefill({ PQ_TYPE_PQ4, PQ_TYPE_PQ4, 8, 8, 9, 300, 1500 }); // most of what is encoded is beyond the cells that are read
    if (!quick) {
        test_prefill({ PQ_TYPE_PQ2, PQ_TYPE_PQ4, 3, 1, 127, 1000, 129 });
        test_prefill({ PQ_TYPE_PQ4, PQ_TYPE_PQ4, 8, 2, 130, 70000, 640 }); // cells of more than 16 bits
        test_prefill({ PQ_TYPE_PQ3, PQ_TYPE_PQ3, 8, 8, 130, 8192, 640 });  // an encoder that fills the device
        test_prefill({ PQ_TYPE_PQ4, PQ_TYPE_PQ4, 14, 2, 100, 512, 600 });
    }
    pq_attn_params p = {};
    p.k = p.v = { PQ_TYPE_PQ4, 128, nullptr, 1, nullptr, 0, 0, 0, nullptr, nullptr };
    check(!pq_cuda_prefill_unsupported(p), "prefill in the space of codes is supported");
    for (int i = 0; i < 8; i++) {
        pq_attn_params other = p;
        float sinks = 0.0f;
        if (i == 0) other.k.D = 64;
        if (i == 1) other.v.has_transform = 0;
        if (i == 2) other.k.type = PQ_TYPE_COUNT;
        if (i == 3) other.logit_softcap = 30.0f;
        if (i == 4) other.sinks = &sinks;
        if (i == 5) other.q_token_stride = 516;
        if (i == 6) other.dst_stream_stride = 516;
        if (i == 7) other.tail.n = 1, other.tail.k_row_stride = 258;
        check(pq_cuda_prefill_unsupported(other), "prefill in the space of codes is not supported, case " + std::to_string(i));
    }
}

static void test(bool quick) {
    const std::vector<int> all_D    = quick ? std::vector<int> { 80, 128 } : std::vector<int> { 8, 24, 64, 80, 96, 128, 192, 256 };
    const std::vector<int> all_rows = quick ? std::vector<int> { 1, 70 } : std::vector<int> { 1, 3, 8, 31, 33, 130, 300 };
    for (const pq_type type : { PQ_TYPE_PQ4, PQ_TYPE_PQ3, PQ_TYPE_PQ2 }) {
        for (const int D : all_D) {
            for (const bool has_transform : { false, true }) {
                for (const int n_rows : all_rows) {
                    test_encode({ { type, D, 3, has_transform, false, true, side_case::NORMAL } }, n_rows);
                    test_encode({ { type, D, 3, has_transform, false, true, side_case::NORMAL, true } }, n_rows);
                    test_decode(type, D, 3, has_transform, n_rows);
                }
                test_encode({ { type, D, 2, has_transform, true, false, side_case::NORMAL } }, 129);
                test_encode({ { type, D, 1, has_transform, false, true, side_case::OUTLIERS } }, 129);
                test_encode({ { type, D, 1, has_transform, false, true, side_case::NAN_ROWS } }, 129);
                for (const int n_rows : { 5, 257 }) {
                    test_encode({ { type, D, 1, has_transform, false, false, side_case::ON_CENTROIDS } }, n_rows);
                }
                for (const int n_rows : { 9, 129 }) { // all that is exact: a few rows, or no transform
                    for (const auto values : { side_case::OUTLIERS, side_case::NAN_ROWS, side_case::ON_CENTROIDS }) {
                        if (n_rows == 9 || !has_transform) {
                            test_encode({ { type, D, 3, has_transform, n_rows == 9, false, values, true } }, n_rows);
                        }
                    }
                }
            }
        }
        // K and V of a step in one call: the same shape, and all that may differ between them
        for (const int n_rows : { 1, 6, 140 }) {
            const side_case k = { type, 128, 4, true, false, true, side_case::NORMAL };
            const side_case k_aniso = { type, 128, 4, true, false, true, side_case::NORMAL, true };
            test_encode({ k, k }, n_rows);
            test_encode({ k_aniso, k }, n_rows);
            test_encode({ k, { PQ_TYPE_PQ2, 64, 4, false, true, true, side_case::NORMAL } }, n_rows);
        }
    }
    test_decode_rows(quick);
    test_code_space(quick);
    if (!quick) { // large: every multiprocessor takes several tiles
        for (const pq_type type : { PQ_TYPE_PQ4, PQ_TYPE_PQ3, PQ_TYPE_PQ2 }) {
            test_encode({ { type, 128, 8, true, false, true, side_case::NORMAL } }, 2048);
        }
        test_decode(PQ_TYPE_PQ4, 128, 8, true, 5000);
    }
}

// ---- benchmark ----

// Median time of `launch(layer)` over layers that together are larger than the L2 cache.
template <class F> static float median_us(int n_layers, F && launch) {
    cudaEvent_t begin, end;
    CUDA(cudaEventCreate(&begin));
    CUDA(cudaEventCreate(&end));
    cudaStream_t stream;
    CUDA(cudaStreamCreate(&stream));
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < n_layers; i++) {
        launch(i, stream);
    }
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    std::vector<float> us;
    for (int i = 0; i < 12; i++) {
        CUDA(cudaEventRecord(begin, stream));
        CUDA(cudaGraphLaunch(exec, stream));
        CUDA(cudaEventRecord(end, stream));
        CUDA(cudaEventSynchronize(end));
        float ms;
        CUDA(cudaEventElapsedTime(&ms, begin, end));
        if (i >= 2) {
            us.push_back(1000 * ms / n_layers);
        }
    }
    CUDA(cudaGraphExecDestroy(exec));
    CUDA(cudaGraphDestroy(graph));
    CUDA(cudaStreamDestroy(stream));
    std::sort(us.begin(), us.end());
    return us[us.size() / 2];
}

static __global__ void read_q(const float * q, size_t n, float * out) {
    float sum = 0.0f;
    for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        sum += q[i];
    }
    if (sum == 12345.0f) { // so that it is read
        *out = sum;
    }
}

static void bench() {
    constexpr int D = 128, N_LAYERS = 16;
    for (const pq_type type : { PQ_TYPE_PQ4, PQ_TYPE_PQ3, PQ_TYPE_PQ2 }) {
        for (const int n_head_kv : { 32, 8 }) {
            const pq_codebook_layout l = pq_get_codebook_layout(D, true);
            const std::vector<uint8_t> one = make_codebook(D, 1, true);
            std::vector<uint8_t> codebook;
            for (int h = 0; h < n_head_kv; h++) {
                codebook.insert(codebook.end(), one.begin(), one.end());
            }
            std::vector<uint8_t> aniso = codebook; // of K
            for (int i = 0; i < n_head_kv * D; i++) {
                ((float *) (aniso.data() + i / D * l.head_bytes + l.aniso))[i % D] = normal();
            }
            std::vector<device_array<uint8_t>> codebooks;
            for (int i = 0; i < 2 * N_LAYERS; i++) {
                codebooks.emplace_back(i % 2 ? codebook : aniso);
            }
            printf("type %d, %d KV heads, codebook of a layer %.1f MB\n", type, n_head_kv, 2e-6 * l.head_bytes * n_head_kv);
            const size_t row_bytes = n_head_kv * pq_head_bytes(type, D);
            for (const int n_rows : { 1, 2, 8, 512, 2048 }) {
                std::vector<float> x(n_rows * n_head_kv * D);
                for (float & v : x) {
                    v = normal();
                }
                std::vector<int64_t> idx(n_rows);
                for (int i = 0; i < n_rows; i++) {
                    idx[i] = i;
                }
                const device_array<float>   d_x(x);
                const device_array<int64_t> d_idx(idx);
                const device_array<uint8_t> codes(2 * n_rows * row_bytes), tail(2 * x.size() * sizeof(__half));
                const float us = median_us(N_LAYERS, [&](int layer, cudaStream_t stream) {
                    pq_encode_params p[2] = {};
                    for (int i = 0; i < 2; i++) {
                        p[i].type             = type;
                        p[i].D                = D;
                        p[i].n_head_kv        = n_head_kv;
                        p[i].n_rows           = n_rows;
                        p[i].codebook         = codebooks[2 * layer + i].p;
                        p[i].has_transform    = 1;
                        p[i].x                = d_x.p;
                        p[i].x_row_stride     = n_head_kv * D * sizeof(float);
                        p[i].x_head_stride    = D * sizeof(float);
                        p[i].codes            = codes.p + i * n_rows * row_bytes;
                        p[i].codes_row_stride = row_bytes;
                        p[i].row_idx          = d_idx.p;
                        p[i].tail             = tail.p + i * x.size() * sizeof(__half);
                        p[i].tail_row_stride  = n_head_kv * D * sizeof(__half);
                        p[i].tail_idx         = d_idx.p;
                    }
                    CUDA(pq_cuda_encode(p, 2, stream));
                });
                printf("  encode K and V, %5d rows: %8.2f us\n", n_rows, us);
            }
            // the last n_exact rows are in the tail, as in prefill; codes vary as real ones do, or all lookups would be of one entry
            const struct { int n_rows, n_exact; } shapes[] = { { 512, 512 }, { 2048, 0 }, { 2048, 639 }, { 32768, 0 }, { 33280, 639 } };
            for (const auto & shape : shapes) {
                const int n_rows = shape.n_rows;
                std::vector<uint8_t> random(n_rows * row_bytes);
                for (uint8_t & c : random) {
                    c = (uint8_t) rng();
                }
                std::vector<int32_t> source(n_rows, PQ_ROW_CODES);
                for (int i = 0; i < shape.n_exact; i++) {
                    source[n_rows - shape.n_exact + i] = i;
                }
                const device_array<uint8_t>  codes(random);
                const device_array<int32_t>  d_source(source);
                const device_array<uint16_t> x(2ull * n_rows * n_head_kv * D), tail(768ull * n_head_kv * D);
                const float us = median_us(N_LAYERS, [&](int layer, cudaStream_t stream) {
                    pq_cuda_decode_side s[2] = {};
                    for (int i = 0; i < 2; i++) {
                        s[i].p.type             = type;
                        s[i].p.D                = D;
                        s[i].p.n_head_kv        = n_head_kv;
                        s[i].p.n_rows           = n_rows;
                        s[i].p.codebook         = codebooks[2 * layer + i].p;
                        s[i].p.has_transform    = 1;
                        s[i].p.codes            = codes.p;
                        s[i].p.codes_row_stride = row_bytes;
                        s[i].codes_head_stride  = pq_head_bytes(type, D);
                        s[i].p.x_row_stride     = D * sizeof(uint16_t);
                        s[i].p.x_head_stride    = (size_t) n_rows * D * sizeof(uint16_t);
                        s[i].x_f16              = x.p + i * x.n / 2;
                        s[i].row_source         = shape.n_exact ? d_source.p : nullptr;
                        s[i].tail               = (const uint8_t *) tail.p;
                        s[i].tail_row_stride    = n_head_kv * D * sizeof(uint16_t);
                        s[i].tail_head_stride   = D * sizeof(uint16_t);
                    }
                    CUDA(pq_cuda_decode_rows(s, 2, stream));
                });
                printf("  decode K and V, %5d rows, %3d of the tail: %8.2f us, %.0f GB/s\n", n_rows, shape.n_exact, us,
                       1e-3 * (x.n * sizeof(uint16_t) + 2 * n_rows * row_bytes) / us);
            }
            // around attention of 512 tokens of 32 heads, which are encoded first, to the tail, too
            constexpr int N_Q = 512, N_HEAD = 32, N_SLOTS = 640, N_KV = 32768;
            const device_array<float>    q(2ull * N_Q * N_HEAD * D), out(1ull * N_Q * N_HEAD * D), x(1ull * N_Q * n_head_kv * D);
            const device_array<uint16_t> rows(2ull * N_KV * n_head_kv * D), tail(2ull * N_SLOTS * n_head_kv * D), mask(1ull * N_Q * N_KV), kept(2ull * N_Q * N_SLOTS);
            std::vector<float> random_x(x.n);
            for (float & v : random_x) {
                v = normal();
            }
            CUDA(cudaMemcpy(x.p, random_x.data(), x.n * sizeof(float), cudaMemcpyHostToDevice));
            std::vector<uint8_t> random(2 * N_KV * row_bytes);
            for (uint8_t & c : random) {
                c = (uint8_t) rng();
            }
            std::vector<uint16_t> cells(2 * N_SLOTS, 0);
            for (int i = 0; i < N_SLOTS; i++) {
                cells[i] = (uint16_t) (N_KV - N_SLOTS + i);
            }
            std::vector<int64_t> new_cells, new_slots;
            for (int i = 0; i < N_Q; i++) {
                new_slots.push_back(N_SLOTS - N_Q + i);
                new_cells.push_back(N_KV - N_Q + i);
            }
            const device_array<uint8_t>  codes(random);
            const device_array<uint16_t> d_cells(cells);
            const device_array<int64_t>  d_new_cells(new_cells), d_new_slots(new_slots);
            auto step = [&](int layer) {
                pq_cuda_prefill_step s = {};
                s.p.n_head    = N_HEAD;
                s.p.n_head_kv = n_head_kv;
                s.p.n_q  = N_Q;
                s.p.n_kv = N_KV;
                s.p.k = { type, D, codebooks[2 * layer].p,     1, codes.p,                    row_bytes, pq_head_bytes(type, D), 0, nullptr, nullptr };
                s.p.v = { type, D, codebooks[2 * layer + 1].p, 1, codes.p + N_KV * row_bytes, row_bytes, pq_head_bytes(type, D), 0, nullptr, nullptr };
                s.p.q = (const uint8_t *) q.p;
                s.p.q_head_stride    = s.p.dst_head_stride  = D * sizeof(float);
                s.p.q_token_stride   = s.p.dst_token_stride = N_HEAD * D * sizeof(float);
                s.p.mask_token_stride = N_KV * sizeof(uint16_t);
                s.p.tail.n = N_SLOTS;
                s.p.tail.k = (const uint8_t *) tail.p;
                s.p.tail.v = (const uint8_t *) (tail.p + tail.n / 2);
                s.p.tail.k_row_stride   = s.p.tail.v_row_stride  = n_head_kv * D * sizeof(uint16_t);
                s.p.tail.k_head_stride  = s.p.tail.v_head_stride = D * sizeof(uint16_t);
                s.p.tail.mask = (const uint8_t *) (kept.p + N_Q * N_SLOTS);
                s.p.tail.mask_token_stride = N_SLOTS * sizeof(uint16_t);
                s.p.dst     = out.p;
                s.cell_low  = d_cells.p;
                s.cell_high = d_cells.p + N_SLOTS;
                s.q_mapped  = q.p + N_Q * N_HEAD * D;
                s.k_rows    = rows.p;
                s.v_rows    = rows.p + rows.n / 2;
                s.mask      = (uint8_t *) mask.p;
                s.mask_kept = kept.p;
                return s;
            };
            auto set_new_rows = [&](pq_encode_params (&p)[2], const pq_cuda_prefill_step & s) {
                for (int i = 0; i < 2; i++) {
                    const pq_attn_side & side = i ? s.p.v : s.p.k;
                    p[i] = {};
                    p[i].type             = type;
                    p[i].D                = D;
                    p[i].n_head_kv        = n_head_kv;
                    p[i].n_rows           = N_Q;
                    p[i].codebook         = side.codebook;
                    p[i].has_transform    = 1;
                    p[i].x                = x.p;
                    p[i].x_row_stride     = n_head_kv * D * sizeof(float);
                    p[i].x_head_stride    = D * sizeof(float);
                    p[i].codes            = const_cast<uint8_t *>(side.data);
                    p[i].codes_row_stride = row_bytes;
                    p[i].row_idx          = d_new_cells.p;
                    p[i].tail             = const_cast<uint8_t *>(i ? s.p.tail.v : s.p.tail.k);
                    p[i].tail_row_stride  = s.p.tail.k_row_stride;
                    p[i].tail_idx         = d_new_slots.p;
                }
            };
            const float encoding = median_us(N_LAYERS, [&](int layer, cudaStream_t stream) {
                pq_encode_params p[2];
                set_new_rows(p, step(layer));
                CUDA(pq_cuda_encode(p, 2, stream));
            });
            const float begin    = median_us(N_LAYERS, [&](int layer, cudaStream_t stream) { CUDA(pq_cuda_prefill_begin(step(layer), nullptr, stream)); });
            const float both     = median_us(N_LAYERS, [&](int layer, cudaStream_t stream) {
                const pq_cuda_prefill_step s = step(layer);
                pq_encode_params p[2];
                set_new_rows(p, s);
                CUDA(pq_cuda_prefill_begin(s, p, stream));
            });
            // behind a kernel that does not let others begin early and uses no shared memory: what begins first is not hidden, as behind a product in a model
            const float other    = median_us(N_LAYERS, [&](int, cudaStream_t stream) { read_q<<<132, 1024, 0, stream>>>(q.p, q.n, out.p); });
            const float behind   = median_us(N_LAYERS, [&](int layer, cudaStream_t stream) {
                const pq_cuda_prefill_step s = step(layer);
                pq_encode_params p[2];
                set_new_rows(p, s);
                read_q<<<132, 1024, 0, stream>>>(q.p, q.n, out.p);
                CUDA(pq_cuda_prefill_begin(s, p, stream));
            });
            const float end = median_us(N_LAYERS, [&](int layer, cudaStream_t stream) { CUDA(pq_cuda_prefill_end(step(layer), stream)); });
            printf("  prefill of 512 tokens, 32 heads, 32768 cells: encode %.2f us, before attention %.2f us, both %.2f us, behind another kernel %.2f us, after attention %.2f us\n",
                   encoding, begin, both, behind - other, end);
        }
    }
}

int main(int argc, char ** argv) {
    const std::string mode = argc > 1 ? argv[1] : "test";
    if (mode == "bench") {
        bench();
        return 0;
    }
    if (mode != "test" && mode != "quick") {
        printf("usage: pq-cuda-codec-test [test | quick | bench]\n");
        return 2;
    }
    test(mode == "quick");
    printf("anisotropic codes of many rows: in %zu of %zu strips rounding decided\n", n_other, n_strips);
    printf("%d checks, %d failed\n", n_checks, n_failed);
    return n_failed ? 1 : 0;
}
