#include "pq-attn-128.cuh"
#include "pq-attn.cuh"

#include <algorithm>

using namespace pq_attn;

namespace {

constexpr int MAX_LIST       = 65535;  // tiles and tail slots of a block: u16 indexes
constexpr int SPLIT_STEP     = 64;     // cells: whole tiles of every kernel
constexpr int PREFETCH_CELLS = 512;    // of a part. Below it a block may well see nothing but the tail, and its tables would be fetched for nothing
constexpr int EARLY_CELLS    = 128;    // the same of the kernel for D = 128, whose tables are copied beside other work,
constexpr int EARLY_N_KV     = 512;    // and what the context must have for that
constexpr int MAX_NEW_ROWS   = 64;     // of a step: every block looks at the slots of all

// Times, in units of what a block takes for a cell.
struct plan_costs {
    int prologue; // a block, before its first cell and after its last
    int combine;  // merging parts, at least
    int part;     // merging one more
};
constexpr plan_costs COSTS     = { 400, 200, 0 };
constexpr plan_costs COSTS_128 = { 1400, 400, 2 }; // fitted to steps between products, as in a model; a cell takes 5 to 6 ns on an H100, whatever the rows
constexpr int UNIT_CELLS     = 1200;   // a group of threads encodes a unit of one row
constexpr int UNIT_ROW_CELLS = 300;    // one more row
constexpr int HIDDEN_CELLS   = 800;    // what the last units, those that blocks which attended encode, may take while the parts are merged; more where parts are
                                       // long, and end at different times

int64_t div_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

bool is_coded(const pq_attn_side & s) {
    return s.type < PQ_TYPE_COUNT;
}

struct smem_layout {
    size_t scores, rows, q, qt, list, bits, merge_ml, tail, tail_part, bytes;
};

// One place for the sizes that the plan adds up and the kernel is told.
smem_layout get_smem_layout(const pq_attn_params & p, int lanes, int R, bool two_phase, int64_t n_list, int score_tiles) {
    const size_t NW = n_threads(R) / PQ_WARP, D = p.k.D;
    const size_t k  = table_bytes(p.k.type, lanes), v = table_bytes(p.v.type, lanes);
    const size_t v_offset = v == 0 || lanes == 8 ? 0 : v_table_offset(lanes, two_phase);
    smem_layout s;
    size_t off = std::max({ k, v_offset + v, NW * R * 1024, NW * R * (D + 2) * sizeof(float) }); // the merge, and the tail where there is nothing else, reuse the tables' room
    auto take = [&](size_t bytes) {
        const size_t at = off;
        off += (bytes + 15) / 16 * 16;
        return at;
    };
    s.scores    = take((size_t) score_tiles * R * (lanes == 8 ? 2 : 1) * PQ_WARP * sizeof(float));
    s.rows      = take(R * sizeof(row_info));
    s.q         = take(R * D * sizeof(float));
    s.qt        = take((size_t) R * 8 * lanes * sizeof(uint16_t));
    s.list      = take(n_list * sizeof(uint16_t));
    s.bits      = take((n_list / 32 + 2) * sizeof(uint32_t));
    s.merge_ml  = take((2 * NW * R + 6 * R) * sizeof(float));
    s.tail      = p.tail.n > 0 ? take(R * D * sizeof(float)) : 0;
    s.tail_part = p.tail.n > 0 ? take(n_tail_threads(R) / PQ_WARP * R * (D + 2) * sizeof(float)) : 0;
    s.bytes     = off;
    return s;
}

// Whether the tables of K and V can be in shared memory together where one is not written over the other (see v_table_offset).
bool tables_apart(const pq_attn_params & p, int lanes) {
    return lanes < 32 || !is_coded(p.k) || !is_coded(p.v);
}

struct smem_layout_128 {
    size_t codes, rows, qt, weights, merge_ml, sums, tail, barriers, bytes;
};

// Of attn_128_kernel.
smem_layout_128 get_smem_layout_128(const pq_attn_params & p, int R, int n_tail_warps, bool has_boxes) {
    const size_t NW = n_threads_128(R) / PQ_WARP;
    smem_layout_128 s;
    // after the tables their room serves the merge, beside it T_inv of V
    size_t off = std::max((size_t) table_bytes(p.k.type, 16) + table_bytes(p.v.type, 16), NW * R * 128 * sizeof(float) + V_MAP_BYTES);
    auto take = [&](size_t bytes) {
        const size_t at = off;
        off += (bytes + 15) / 16 * 16;
        return at;
    };
    off = (off + TILE_ALIGN - 1) / TILE_ALIGN * TILE_ALIGN;
    s.codes    = take(NW * TILE_128 * (tile_cell(p.k.type) + tile_cell(p.v.type)));
    s.rows     = take(R * sizeof(row_info));
    s.qt       = take((size_t) 2 * R * Q_STRIDE * sizeof(uint16_t));
    s.weights  = take(R > 1 ? ((NW + 1) * 16 * R + 4) * sizeof(uint32_t) : 0);
    s.merge_ml = take((4 * NW * R + 4 * R + 4 + R) * sizeof(float));
    s.sums     = take((size_t) R * 2 * 128 * sizeof(float));
    s.tail     = take((size_t) n_tail_warps * R * 128 * sizeof(float)); // first it holds turns of n_q tokens: there are no more than rows
    s.barriers = take((has_boxes ? 1 + 2 * NW : 0) * sizeof(uint64_t)); // of the tables, of K and V of each warp's tile
    s.bytes    = std::max(off, NW * PQ_WARP / PQ_ENCODE_FEW_THREADS * sizeof(pq_encode_group_smem)); // who encodes has nothing else left to do
    return s;
}

// What the heads of a cell take together, one beside the other.
size_t row_bytes(const pq_attn_params & p, const pq_attn_side & s) {
    return (p.n_head_kv - 1) * s.head_stride + pq_head_bytes(s.type, s.D);
}

bool has_boxes(const pq_cuda_device_props & device) {
    return device.cc >= 90;
}

// Whether attn_128_kernel takes these parameters, where it has the shared memory: it copies 16 bytes of codes at a time, and boxes of cells that are rows.
bool takes_kernel_128(const pq_attn_params & p, const pq_cuda_device_props & device, int R) {
    for (const pq_attn_side * s : { &p.k, &p.v }) {
        if (s->D != 128 || !is_coded(*s) || !s->tables || ((uintptr_t) s->data | s->row_stride | s->head_stride | s->stream_stride) % 16 != 0 ||
            (has_boxes(device) && row_bytes(p, *s) > s->row_stride)) {
            return false;
        }
    }
    return ((uintptr_t) p.q | p.q_token_stride | p.q_head_stride | p.q_stream_stride) % 16 == 0 &&
           get_smem_layout_128(p, R, p.tail.n > 0, has_boxes(device)).bytes <= device.smem_optin;
}

// Whether the codes of every two heads are whole sectors of memory.
bool is_paired(const pq_attn_params & p, const pq_attn_side & s) {
    return ((uintptr_t) s.data | s.row_stride | s.stream_stride | 2 * s.head_stride) % 32 == 0 && s.head_stride == pq_head_bytes(s.type, s.D) && p.n_head_kv % 2 == 0;
}

// Units of encoding of a step: strips of heads of both sides, unit_rows rows at a time.
int64_t n_encode_units(int64_t n_new_rows, int64_t unit_rows, int n_head_kv) {
    return div_up(n_new_rows, unit_rows) * 2 * n_head_kv * (128 / PQ_ENCODE_STRIP);
}

int64_t unit_cells(int64_t unit_rows) {
    return UNIT_CELLS + (unit_rows - 1) * UNIT_ROW_CELLS;
}

// Those of them that n_free multiprocessors without attention encode in the time that the others attend.
int64_t n_units_apart(int64_t n_units, int64_t unit_rows, int64_t n_free, int n_threads, int64_t cells_per_split) {
    return std::min(n_units, n_free * (n_threads / PQ_ENCODE_FEW_THREADS) * std::max<int64_t>((COSTS_128.prologue + cells_per_split) / unit_cells(unit_rows), 1));
}

// Blocks that encode the other units: when they have delivered their part, and are not the last of their row group.
int64_t n_helpers(int64_t n_blocks, int64_t n_split) {
    return n_split == 1 ? n_blocks : n_blocks / n_split * (n_split - 1);
}

struct encode_plan {
    int64_t rows; // of a unit
    int64_t cost; // what it adds to attention
};

// The more rows in a unit, the less codebook is read, and the more uneven is the work.
encode_plan plan_encode(int64_t n_new_rows, int n_head_kv, int64_t n_blocks, int64_t n_split, int n_sm, int n_threads, int64_t cells) {
    encode_plan best = { PQ_ENCODE_FEW_ROWS, 0 };
    int64_t best_cost = INT64_MAX;
    for (int64_t rows = PQ_ENCODE_FEW_ROWS; rows >= 1; rows /= 2) {
        if (rows > 1 && rows / 2 >= n_new_rows) {
            continue; // as many units with fewer
        }
        const int64_t n_units = n_encode_units(n_new_rows, rows, n_head_kv);
        const int64_t late    = n_units - n_units_apart(n_units, rows, std::max<int64_t>(n_sm - n_blocks, 0), n_threads, cells);
        const int64_t turns   = div_up(late, n_helpers(n_blocks, n_split) * (n_threads / PQ_ENCODE_FEW_THREADS));
        const int64_t seen    = late > 0 ? std::max<int64_t>(turns * unit_cells(rows) - HIDDEN_CELLS - cells * 3 / 10, 0) : 0;
        if (seen + late * rows < best_cost) { // of those that hide as well: the least work for blocks with attention
            best_cost = seen + late * rows;
            best      = { rows, seen + late };
        }
    }
    return best;
}

// Cells of each of n parts but the last. A part that is a little longer than whole rounds of its warps takes one more round; the last cells of a context are
// seldom seen (the tail has the newest tokens, and some cells have none yet), so the last part may have a round more than the others.
int64_t cells_of_parts(int64_t n_kv, int64_t n, int64_t round) {
    const int64_t even = div_up(div_up(n_kv, SPLIT_STEP), n) * SPLIT_STEP, whole = even / round * round;
    return whole > 0 && n_kv - n * whole <= round ? whole : even;
}

int rows_per_block(int64_t n_rows) {
    return n_rows == 1 ? 1 : n_rows <= 4 ? 4 : 8;
}

int lanes_per_cell(int D) {
    return D <= 64 ? 8 : D <= 128 ? 16 : 32;
}

constexpr int MIN_SCORE_TILES = 16; // a tile for every warp

} // namespace

const char * pq_cuda_attn_unsupported(const pq_attn_params & p, const pq_cuda_device_props & device) {
    if (device.cc < 80) {
        return "the device is older than compute capability 8.0 (tensor-core products of halves, 16x8x16)";
    }
    if (!is_coded(p.k) && !is_coded(p.v)) {
        return "neither K nor V holds PQ codes";
    }
    if (p.k.D != p.v.D) {
        return "K and V have different head sizes";
    }
    if (!pq_head_size_ok(p.k.D)) {
        return "the head size is not a multiple of 8 up to 256";
    }
    if (p.n_q < 1 || p.n_q > PQ_CUDA_ATTN_MAX_N_Q) {
        return "more query tokens than the kernels for few rows take";
    }
    for (const pq_attn_side * s : { &p.k, &p.v }) {
        const size_t align = !is_coded(*s) ? 16 : s->type == PQ_TYPE_PQ4 ? 4 : s->type == PQ_TYPE_PQ2 ? 2 : 1;
        if (((uintptr_t) s->data | s->row_stride | s->head_stride | s->stream_stride) % align != 0) {
            return "rows of the cache are not aligned (16 bytes for f16, 4 for pq4, 2 for pq2)";
        }
        if (s->row_stride > UINT32_MAX) {
            return "cells of the cache are 4 GiB or more apart";
        }
    }
    const pq_attn_tail & t = p.tail;
    if (t.n > 0 && ((uintptr_t) t.k | (uintptr_t) t.v | t.k_row_stride | t.v_row_stride | t.k_head_stride | t.v_head_stride
                    | t.k_stream_stride | t.v_stream_stride) % 16 != 0) {
        return "rows of the exact tail are not at multiples of 16 bytes";
    }
    if (t.n > MAX_LIST / 2) {
        return "the exact tail has more than 32767 slots";
    }
    if (p.k.D <= 64) {
        const int R = rows_per_block(p.n_q * (p.n_head / p.n_head_kv));
        if (get_smem_layout(p, 8, R, false, t.n + 256, 0).bytes > device.smem_optin) {
            return "the device has too little shared memory per block";
        }
    } else {
        const int lanes = lanes_per_cell(p.k.D), R = rows_per_block(p.n_q * (p.n_head / p.n_head_kv));
        if (get_smem_layout(p, lanes, R, true, t.n + 4096, MIN_SCORE_TILES).bytes > device.smem_optin) {
            return "the device has too little shared memory per block";
        }
    }
    return nullptr;
}

pq_cuda_attn_plan pq_cuda_attn_make_plan(const pq_attn_params & p, const pq_cuda_device_props & device) {
    pq_cuda_attn_plan plan = {};
    const int64_t n_rows = p.n_q * (p.n_head / p.n_head_kv);
    plan.lanes          = lanes_per_cell(p.k.D);
    plan.rows_per_block = rows_per_block(n_rows);
    plan.n_row_groups   = (int32_t) div_up(n_rows, plan.rows_per_block);
    plan.n_sm           = device.n_sm;
    plan.has_boxes      = has_boxes(device);
    const bool is_128   = takes_kernel_128(p, device, plan.rows_per_block);
    plan.n_threads      = is_128 ? n_threads_128(plan.rows_per_block) : n_threads(plan.rows_per_block);

    // One block fills a multiprocessor: every wave of blocks costs its longest block. Fewer parts leave multiprocessors to the encoding of a step's new rows,
    // of which there is one per query token.
    const int64_t n_base  = (int64_t) p.n_stream * p.n_head_kv * plan.n_row_groups;
    const int64_t n_new   = is_128 && p.tail.n > 0 ? (int64_t) p.n_stream * p.n_q : 0;
    const int64_t n_steps = div_up(p.n_kv, SPLIT_STEP);
    const int64_t round   = is_128 ? plan.n_threads / PQ_WARP * TILE_128 : SPLIT_STEP; // the other kernels have a list as long as a part
    const plan_costs costs = is_128 ? COSTS_128 : COSTS;
    int64_t best_cost = INT64_MAX;
    plan.n_split = 1;
    for (int64_t n = 1; n <= std::min<int64_t>(MAX_SPLIT, std::max<int64_t>(n_steps, 1)); n++) {
        const int64_t cells = cells_of_parts(p.n_kv, n, round);
        const int64_t slots = div_up(p.tail.n, n);
        if (!is_128 && cells / cells_per_tile(plan.lanes) + slots > MAX_LIST) {
            continue;
        }
        const int64_t waves = div_up(n_base * n, device.n_sm);
        const encode_plan encode = n_new > 0 ? plan_encode(n_new, p.n_head_kv, n_base * n, n, device.n_sm, plan.n_threads, cells) : encode_plan { 1, 0 };
        const int64_t cost  = waves * (costs.prologue + cells) + (n > 1 ? costs.combine + n * costs.part : 0) + encode.cost;
        if (cost < best_cost) {
            best_cost        = cost;
            plan.n_split     = (int32_t) n;
            plan.encode_rows = (int32_t) encode.rows;
        }
    }
    plan.cells_per_split = cells_of_parts(p.n_kv, plan.n_split, round);
    if (n_steps > 0) { // no part without cells
        plan.n_split = (int32_t) std::min<int64_t>(plan.n_split, div_up(p.n_kv, plan.cells_per_split));
    }
    plan.slots_per_split = div_up(p.tail.n, plan.n_split);
    plan.n_blocks        = (int32_t) (n_base * plan.n_split);

    const int R = plan.rows_per_block;
    if (is_128) {
        plan.kernel          = PQ_CUDA_ATTN_128;
        plan.slots_per_split = div_up(plan.slots_per_split, TAIL_STEP) * TAIL_STEP;
        plan.counter_bytes = (size_t) n_base * sizeof(uint32_t);
        plan.scratch_bytes = plan.n_split == 1 ? 0 : (size_t) p.n_stream * p.n_head_kv * n_rows * plan.n_split * RECORD_128 * sizeof(float);
        const size_t per_warp = (size_t) R * 128 * sizeof(float);
        const size_t room     = device.smem_optin - get_smem_layout_128(p, R, 0, plan.has_boxes).bytes;
        // one warp fits, or another kernel would have been chosen
        plan.n_tail_warps = (int32_t) std::min<int64_t>({ plan.n_threads / PQ_WARP, div_up(plan.slots_per_split, TAIL_STEP), std::max<int64_t>(1, (int64_t) (room / per_warp)) });
        plan.smem_bytes   = get_smem_layout_128(p, R, plan.n_tail_warps, plan.has_boxes).bytes;
        return plan;
    }
    const int64_t n_list = plan.cells_per_split / cells_per_tile(plan.lanes) + plan.slots_per_split;
    plan.kernel     = PQ_CUDA_ATTN_ONE_PHASE;
    plan.smem_bytes = get_smem_layout(p, plan.lanes, R, false, n_list, 0).bytes;
    if (plan.smem_bytes > device.smem_optin || !tables_apart(p, plan.lanes)) {
        plan.kernel      = PQ_CUDA_ATTN_TWO_PHASES;
        const size_t one = get_smem_layout(p, plan.lanes, R, true, n_list, 1).bytes - get_smem_layout(p, plan.lanes, R, true, n_list, 0).bytes;
        const size_t fit = (device.smem_optin - std::min(device.smem_optin, get_smem_layout(p, plan.lanes, R, true, n_list, 0).bytes)) / one;
        const int64_t need = std::max<int64_t>(plan.cells_per_split / cells_per_tile(plan.lanes), MIN_SCORE_TILES);
        plan.score_tiles = (int32_t) std::min<int64_t>((int64_t) fit, need);
        plan.smem_bytes  = get_smem_layout(p, plan.lanes, R, true, n_list, plan.score_tiles).bytes;
    }
    const size_t record_floats = 4 + (size_t) p.v.D * (p.tail.n > 0 ? 2 : 1);
    plan.scratch_bytes = plan.n_split == 1 ? 0 : (size_t) p.n_stream * p.n_head_kv * n_rows * plan.n_split * record_floats * sizeof(float);
    return plan;
}

static side_args get_side_args(const pq_attn_side & s) {
    side_args a = {};
    if (is_coded(s)) {
        const pq_codebook_layout l = pq_get_codebook_layout(s.D, s.has_transform);
        a.mu         = (uint32_t) l.mu;
        a.T_inv      = (uint32_t) l.T_inv;
        a.centroids  = (uint32_t) l.centroids;
        a.head_bytes = l.head_bytes;
        // lanes share words: a head must begin at a word and have whole words of both kinds of codes
        a.bytewise = s.type == PQ_TYPE_PQ3 && (((uintptr_t) s.data | s.row_stride | s.head_stride | s.stream_stride) % 4 != 0 || s.D % 32 != 0);
    }
    return a;
}

// What every kernel is told.
static void set_args(args & a, const pq_attn_params & p, const pq_cuda_attn_plan & plan, void * scratch) {
    a.p = p;
    a.k = get_side_args(p.k);
    a.v = get_side_args(p.v);
    a.n_split         = plan.n_split;
    a.n_row_groups    = plan.n_row_groups;
    a.n_group         = p.n_head / p.n_head_kv;
    a.by_group        = small_divisor(a.n_group);
    a.by_stream_mask  = small_divisor(std::max(p.n_stream_mask, 1)); // no mask: 0
    a.by_head_mask    = small_divisor(std::max(p.n_head_mask, 1));
    a.n_rows          = (int32_t) p.n_q * a.n_group;
    a.cells_per_split = plan.cells_per_split;
    a.slots_per_split = plan.slots_per_split;
    a.mask_by_16      = ((uintptr_t) p.mask | p.mask_token_stride | p.mask_head_stride | p.mask_stream_stride) % 16 == 0;
    a.n_head_log2     = 1;
    while (2 * a.n_head_log2 <= p.n_head) {
        a.n_head_log2 *= 2;
    }
    a.slope_log2_0  = -p.max_bias / (float) a.n_head_log2;
    a.slope_log2_1  = -p.max_bias / 2.0f / (float) a.n_head_log2;
    a.q_scale       = p.logit_softcap != 0.0f ? p.scale : p.scale * LOG2E;
    a.cap_inv       = p.logit_softcap != 0.0f ? 1.0f / p.logit_softcap : 0.0f;
    a.cap_log2e     = p.logit_softcap * LOG2E;
    a.partials      = (float *) scratch;
}

// The driver's function, which is not linked: NULL where the driver does not have it.
static decltype(&cuTensorMapEncodeTiled) find_map_encoder() {
    void * f = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t err = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t err = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &f, cudaEnableDefault, &found);
#endif
    return err == cudaSuccess && found == cudaDriverEntryPointSuccess ? (decltype(&cuTensorMapEncodeTiled)) f : nullptr;
}

// One side in boxes of tiles. There are cells.
static cudaError_t make_tile_map(CUtensorMap & map, const pq_attn_params & p, const pq_attn_side & s, bool turned) {
    static const auto encode = find_map_encoder();
    if (!encode) {
        return cudaErrorCallRequiresNewerDriver;
    }
    const cuuint64_t dims[3]    = { row_bytes(p, s), (cuuint64_t) p.n_kv, (cuuint64_t) p.n_stream };
    const cuuint64_t strides[2] = { s.row_stride, p.n_stream > 1 ? s.stream_stride : p.n_kv * s.row_stride };
    const cuuint32_t box[3]     = { tile_cell(s.type), TILE_128, 1 }, steps[3] = { 1, 1, 1 };
    const CUresult   res        = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, (void *) s.data, dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                         turned ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return res == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

static cudaError_t run_128(const pq_attn_params & p, const pq_cuda_attn_plan & plan, const pq_encode_params * new_rows, const pq_cuda_rope * rope,
                           bool settled, uint8_t * dst_q8, void * scratch, void * counters, cudaStream_t stream) {
    const smem_layout_128 s = get_smem_layout_128(p, plan.rows_per_block, plan.n_tail_warps, plan.has_boxes);
    args_128 a = {};
    set_args(a, p, plan, scratch);
    a.by_row_groups   = small_divisor(plan.n_row_groups);
    a.by_heads        = small_divisor(p.n_head_kv);
    a.by_parts        = small_divisor(plan.n_split);
    a.n_attn_blocks   = plan.n_blocks;
    a.n_tail_warps    = plan.n_tail_warps;
    a.tail_mask_by_16 = ((uintptr_t) p.tail.mask | p.tail.mask_token_stride | p.tail.mask_stream_stride) % 16 == 0;
    a.one_mask        = p.mask && p.n_q == 1 && p.n_head_mask == 1 && a.mask_by_16;
    a.one_tail_mask   = p.n_q == 1 && a.tail_mask_by_16;
    a.early_tables  = plan.cells_per_split >= EARLY_CELLS && p.n_kv >= EARLY_N_KV;
    a.k_paired      = is_paired(p, p.k);
    a.v_paired      = is_paired(p, p.v);
    a.settled       = settled;
    a.dst_q8        = dst_q8;
    a.counters      = (uint32_t *) counters;
    a.smem_codes    = (uint32_t) s.codes;
    a.smem_rows     = (uint32_t) s.rows;
    a.smem_qt       = (uint32_t) s.qt;
    a.smem_weights  = (uint32_t) s.weights;
    a.smem_merge_ml = (uint32_t) s.merge_ml;
    a.smem_sums     = (uint32_t) s.sums;
    a.smem_tail     = (uint32_t) s.tail;
    a.smem_barriers = (uint32_t) s.barriers;
    if (rope) {
        a.rope = *rope;
    }
    int n_blocks = plan.n_blocks;
    if (new_rows) {
        a.new_rows         = pq_make_encode_sides(new_rows, 2);
        a.n_new            = (int32_t) new_rows->n_rows;
        a.units = { (int32_t) n_encode_units(new_rows->n_rows, plan.encode_rows, p.n_head_kv), (int32_t) new_rows->n_rows, plan.encode_rows, p.n_head_kv, small_divisor(2 * p.n_head_kv) };
        a.slot_base        = (p.tail.k - new_rows->tail) / (int64_t) new_rows->tail_row_stride;
        a.slots_per_stream = (int64_t) (p.tail.k_stream_stride / new_rows->tail_row_stride);
        // Multiprocessors without attention encode for as long as the others attend, side by side before one after the other. What is left is for blocks that are not the last of their
        // row group.
        const int n_free   = std::max(plan.n_sm - plan.n_blocks, 0);
        a.n_apart   = (int32_t) n_units_apart(a.units.n, plan.encode_rows, n_free, plan.n_threads, plan.cells_per_split);
        a.n_helpers = a.n_apart == a.units.n ? 0 : (int32_t) n_helpers(plan.n_blocks, plan.n_split);
        n_blocks   += std::min<int>(n_free, a.n_apart);
    }
    code_maps maps = {};
    if (plan.has_boxes && p.n_kv > 0) {
        cudaError_t err = make_tile_map(maps.k, p, p.k, tile_turned(p.k.type, false, plan.rows_per_block));
        if (err == cudaSuccess) err = make_tile_map(maps.v, p, p.v, tile_turned(p.v.type, true, plan.rows_per_block));
        if (err != cudaSuccess) {
            return err;
        }
    }
    return plan.rows_per_block == 1 ? launch_128<1>(a, maps, plan, n_blocks, stream)
         : plan.rows_per_block == 4 ? launch_128<4>(a, maps, plan, n_blocks, stream)
                                    : launch_128<8>(a, maps, plan, n_blocks, stream);
}

const char * pq_cuda_step_unsupported(const pq_attn_params & p, const pq_cuda_attn_plan & plan, const pq_encode_params * new_rows) {
    if (plan.kernel != PQ_CUDA_ATTN_128) {
        return "only the kernel for D = 128 and codes on both sides writes rows too";
    }
    if (p.tail.n == 0) {
        return "there is no exact tail to hold the new rows";
    }
    for (int i = 0; i < 2; i++) {
        const pq_encode_params & e = new_rows[i];
        const pq_attn_side     & s = i == 0 ? p.k : p.v;
        const uint8_t * tail       = i == 0 ? p.tail.k : p.tail.v;
        const size_t row_stride    = i == 0 ? p.tail.k_row_stride : p.tail.v_row_stride;
        const size_t head_stride   = i == 0 ? p.tail.k_head_stride : p.tail.v_head_stride;
        const size_t stream_stride = i == 0 ? p.tail.k_stream_stride : p.tail.v_stream_stride;
        if (e.n_rows < 1 || e.n_rows > MAX_NEW_ROWS || e.n_rows != new_rows[0].n_rows) {
            return "there are no new rows, too many, or not as many of K as of V";
        }
        if (e.type != s.type || e.D != s.D || e.n_head_kv != p.n_head_kv || e.codebook != s.codebook) {
            return "the new rows are not of this K and V";
        }
        if (e.x_f16 || ((uintptr_t) e.x | e.x_row_stride | e.x_head_stride) % 16 != 0) {
            return "the new rows are not f32 at multiples of 16 bytes";
        }
        // the same slots, counted from the beginning of the storage there and of the streams in use here
        if (!e.tail || e.tail_row_stride != row_stride || head_stride != 256 || (tail - e.tail) % (int64_t) row_stride != 0 || stream_stride % row_stride != 0 ||
            (tail - e.tail) / (int64_t) row_stride != (p.tail.k - new_rows[0].tail) / (int64_t) new_rows[0].tail_row_stride || stream_stride / row_stride != p.tail.k_stream_stride / p.tail.k_row_stride) {
            return "the tail that attention reads is not the one that the new rows go to";
        }
    }
    return nullptr;
}

cudaError_t pq_cuda_step(const pq_attn_params & p, const pq_cuda_attn_plan & plan, const pq_encode_params * new_rows, const pq_cuda_rope * rope,
                         bool settled, uint8_t * dst_q8, void * scratch, void * counters, cudaStream_t stream) {
    const bool contiguous = p.dst_head_stride == 128 * sizeof(float) && p.dst_token_stride == p.n_head * p.dst_head_stride &&
                            (p.n_stream == 1 || p.dst_stream_stride == p.n_q * p.dst_token_stride);
    if (pq_cuda_step_unsupported(p, plan, new_rows) || (rope && new_rows->n_rows != p.n_q * p.n_stream) || (dst_q8 && !contiguous)) {
        return cudaErrorInvalidValue;
    }
    return run_128(p, plan, new_rows, rope, settled, dst_q8, scratch, counters, stream);
}

cudaError_t pq_cuda_attn(const pq_attn_params & p, const pq_cuda_attn_plan & plan, void * scratch, void * counters, cudaStream_t stream) {
    if (p.n_q == 0 || p.n_stream == 0) {
        return cudaSuccess;
    }
    if (plan.kernel == PQ_CUDA_ATTN_128) {
        return run_128(p, plan, nullptr, nullptr, false, nullptr, scratch, counters, stream);
    }
    const int64_t     n_list = plan.cells_per_split / cells_per_tile(plan.lanes) + plan.slots_per_split;
    const smem_layout s      = get_smem_layout(p, plan.lanes, plan.rows_per_block, plan.kernel == PQ_CUDA_ATTN_TWO_PHASES, n_list, plan.score_tiles);

    args a = {};
    set_args(a, p, plan, scratch);
    a.prefetch      = plan.cells_per_split >= PREFETCH_CELLS;
    a.score_tiles   = plan.score_tiles;
    a.record_floats = 4 + p.v.D * (p.tail.n > 0 ? 2 : 1);
    a.smem_scores   = (uint32_t) s.scores;
    a.smem_rows     = (uint32_t) s.rows;
    a.smem_q        = (uint32_t) s.q;
    a.smem_qt       = (uint32_t) s.qt;
    a.smem_list     = (uint32_t) s.list;
    a.smem_bits     = (uint32_t) s.bits;
    a.smem_merge_ml = (uint32_t) s.merge_ml;
    a.smem_tail     = (uint32_t) s.tail;
    a.smem_tail_part = (uint32_t) s.tail_part;

    const cudaError_t err = plan.rows_per_block == 1 ? launch<1>(a, plan, stream)
                          : plan.rows_per_block == 4 ? launch<4>(a, plan, stream)
                                                     : launch<8>(a, plan, stream);
    if (err != cudaSuccess || plan.n_split == 1) {
        return err;
    }
    return pq_launch(combine_kernel<COMBINE_THREADS>, dim3(a.n_rows, p.n_head_kv, p.n_stream), COMBINE_THREADS, 0, stream, a);
}

cudaError_t pq_cuda_get_device_props(pq_cuda_device_props * props) {
    int device = 0, major = 0, minor = 0, n_sm = 0, smem = 0;
    cudaError_t err = cudaGetDevice(&device);
    if (err == cudaSuccess) err = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (err == cudaSuccess) err = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (err == cudaSuccess) err = cudaDeviceGetAttribute(&n_sm, cudaDevAttrMultiProcessorCount, device);
    if (err == cudaSuccess) err = cudaDeviceGetAttribute(&smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (err == cudaSuccess) {
        props->cc         = 10 * major + minor;
        props->n_sm       = n_sm;
        props->smem_optin = (size_t) smem;
    }
    return err;
}
