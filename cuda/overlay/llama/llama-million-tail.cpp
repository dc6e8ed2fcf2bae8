#include "llama-million-tail.h"

#include "llama-batch.h"
#include "llama-impl.h"
#include "llama-kv-cells.h"
#include "llama-million.h"

#include "ggml-pq.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <stdexcept>

static constexpr uint32_t N_TAIL_DEFAULT = 128;
static constexpr uint32_t N_TAIL_MAX     = 1 << 20;
static constexpr int      IDXS_TAIL      = 0; // source of an index tensor that holds its tail indices
static constexpr uint32_t SLOT_PAD       = 64; // attention reads slots up to a multiple of this

//
// configuration
//
// llama_context_params is mirrored by other languages, so it cannot have a new field: the thread that makes a context says it here.
//

static thread_local int32_t  t_n_tail   = -1;
static thread_local uint32_t t_n_ubatch = 512;

static uint32_t configured_n_tail() {
    if (t_n_tail >= 0) {
        return t_n_tail;
    }
    const char * env = getenv("MILLION_KV_TAIL");
    if (!env || !*env) {
        return N_TAIL_DEFAULT;
    }
    char * end = nullptr;
    const long n = strtol(env, &end, 10);
    if (*end || n < 0 || n > N_TAIL_MAX) {
        throw std::runtime_error(format("MILLION_KV_TAIL is '%s', which is not a number of tokens from 0 to %u: set it to one, such as %u, or unset it",
            env, N_TAIL_MAX, N_TAIL_DEFAULT));
    }
    return n;
}

int32_t million_set_kv_tail(int32_t n_tokens) {
    const int32_t old = t_n_tail;
    t_n_tail = n_tokens < 0 ? -1 : std::min<int32_t>(n_tokens, N_TAIL_MAX);
    return old;
}

void llama_million_tail_config(uint32_t n_ubatch) {
    t_n_ubatch = n_ubatch;
}

std::shared_ptr<llama_million_tail> llama_million_tail::make(uint32_t kv_size, uint32_t n_seq_max, uint32_t n_stream) {
    const uint32_t n_tail = configured_n_tail();
    if (n_tail == 0) {
        return nullptr;
    }
    auto res = std::make_shared<llama_million_tail>();
    const uint64_t n_seq = n_stream == 1 ? n_seq_max : 1; // per stream
    res->n_tail_    = n_tail;
    res->n_seq_max_ = n_seq_max;
    res->n_slots_   = (uint32_t) std::min<uint64_t>(GGML_PAD(n_seq*n_tail + t_n_ubatch, (uint64_t) SLOT_PAD), GGML_PAD(kv_size, SLOT_PAD));
    res->streams.resize(n_stream);
    for (auto & st : res->streams) {
        st.cell_of_slot.assign(res->n_slots_, -1);
        st.slot_of_cell.assign(kv_size, -1);
    }
    return res;
}

//
// slots
//

void llama_million_tail::clear() {
    for (uint32_t s = 0; s < streams.size(); ++s) {
        clear(s);
    }
}

void llama_million_tail::clear(uint32_t strm) {
    auto & st = streams[strm];
    std::fill(st.cell_of_slot.begin(), st.cell_of_slot.end(), -1);
    std::fill(st.slot_of_cell.begin(), st.slot_of_cell.end(), -1);
}

int32_t llama_million_tail::take(uint32_t strm, uint32_t cell) {
    auto & st = streams[strm];
    release(strm, cell);
    const auto it = std::find(st.cell_of_slot.begin(), st.cell_of_slot.end(), -1);
    if (it == st.cell_of_slot.end()) {
        return -1;
    }
    const int32_t slot = it - st.cell_of_slot.begin();
    st.cell_of_slot[slot] = cell;
    st.slot_of_cell[cell] = slot;
    return slot;
}

void llama_million_tail::release(uint32_t strm, uint32_t cell) {
    auto & st = streams[strm];
    const int32_t slot = st.slot_of_cell[cell];
    if (slot >= 0) {
        st.cell_of_slot[slot] = -1;
        st.slot_of_cell[cell] = -1;
    }
}

void llama_million_tail::assign(
        uint32_t strm, const llama_kv_cells & cells, const std::vector<uint32_t> & cells_new, const llama_ubatch & ubatch, uint32_t i0) {
    auto & st = streams[strm];

    for (const uint32_t cell : cells_new) {
        release(strm, cell);
    }

    // the oldest position that a sequence keeps
    std::vector<llama_pos> p_new(n_seq_max_, -1);
    for (uint32_t i = i0; i < i0 + cells_new.size(); ++i) {
        for (int32_t s = 0; s < ubatch.n_seq_id[i]; ++s) {
            llama_pos & p = p_new[ubatch.seq_id[i][s]];
            p = p < 0 ? ubatch.pos[i] : std::min(p, ubatch.pos[i]);
        }
    }
    std::vector<llama_pos> p_keep(n_seq_max_);
    for (uint32_t s = 0; s < n_seq_max_; ++s) {
        const llama_pos next = p_new[s] >= 0 ? p_new[s] : cells.seq_pos_max(s) + 1;
        p_keep[s] = next - (llama_pos) n_tail_ + 1;
    }
    for (uint32_t slot = 0; slot < n_slots_; ++slot) {
        const int32_t cell = st.cell_of_slot[slot];
        if (cell < 0) {
            continue;
        }
        bool keep = false;
        if (!cells.is_empty(cell)) {
            const llama_pos pos = cells.pos_get(cell);
            for (uint32_t s = 0; s < n_seq_max_ && !keep; ++s) {
                keep = pos >= p_keep[s] && cells.seq_has(cell, s);
            }
        }
        if (!keep) {
            release(strm, cell);
        }
    }

    // more tokens than positions (the tokens of an image share one): new ones go before old ones
    if (std::count(st.cell_of_slot.begin(), st.cell_of_slot.end(), -1) < (int64_t) cells_new.size()) {
        clear(strm);
    }
    for (const uint32_t cell : cells_new) {
        const int32_t slot = take(strm, cell);
        GGML_ASSERT(slot >= 0 && "a tail has room for a micro-batch");
    }
}

uint32_t llama_million_tail::n_used(const std::vector<int32_t> & strms) const {
    uint32_t n = 1;
    for (const int32_t s : strms) {
        const auto & c = streams[s].cell_of_slot;
        for (uint32_t slot = n_slots_; slot > n; --slot) {
            if (c[slot - 1] >= 0) {
                n = slot;
                break;
            }
        }
    }
    return std::min(GGML_PAD(n, SLOT_PAD), n_slots_);
}

//
// graph
//

ggml_tensor * llama_million_tail::new_storage(ggml_context * ctx, const ggml_tensor * cache) const {
    return ggml_new_tensor_3d(ctx, GGML_TYPE_F16, cache->ne[0], n_slots_, streams.size());
}

ggml_tensor * llama_million_tail::view(ggml_context * ctx, ggml_tensor * storage, int64_t D, uint32_t n_used, uint32_t s0, uint32_t s1) const {
    return ggml_view_4d(ctx, storage, D, n_used, storage->ne[0]/D, s1 - s0 + 1,
        storage->nb[1], D*ggml_element_size(storage), storage->nb[2], s0*storage->nb[2]);
}

ggml_tensor * llama_million_tail::write(ggml_context * ctx, ggml_tensor * op, ggml_tensor * storage) {
    ggml_tensor * idxs = op->src[1]->src[IDXS_TAIL];
    if (!storage || !idxs) {
        return op;
    }
    storage = ggml_reshape_2d(ctx, storage, storage->ne[0], storage->ne[1]*storage->ne[2]);
    if (ggml_is_pq(op->type)) {
        return ggml_pq_set_rows_tail(op, storage, idxs);
    }
    // the plain side of a mixed cache writes its tail in an op of its own, which comes into the graph as a source
    op->src[GGML_PQ_SRC_SET_ROWS_TAIL] = ggml_set_rows(ctx, storage, op->src[0], idxs);
    return op;
}

void llama_million_tail::add_idxs(ggml_context * ctx, ggml_tensor * idxs) {
    ggml_tensor * t = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, idxs->ne[0]);
    ggml_set_input(t);
    ggml_format_name(t, "%s_tail", idxs->name);
    idxs->src[IDXS_TAIL] = t;
    idxs_ = idxs;
}

ggml_tensor * llama_million_tail::take_idxs() {
    return std::exchange(idxs_, nullptr);
}

void llama_million_tail::fill_idxs(ggml_tensor * idxs, const std::vector<int32_t> & strms, const std::vector<std::vector<uint32_t>> & cells) const {
    ggml_tensor * t = idxs->src[IDXS_TAIL];
    if (!t || !t->buffer) {
        return; // the graph does not write to this cache
    }
    GGML_ASSERT(ggml_backend_buffer_is_host(t->buffer));
    int64_t * dst = (int64_t *) t->data;
    for (size_t s = 0; s < strms.size(); ++s) {
        for (const uint32_t cell : cells[s]) {
            *dst++ = (int64_t) strms[s]*n_slots_ + slot_of(strms[s], cell);
        }
    }
}

void llama_million_tail::add_mask(ggml_context * ctx, ggml_tensor * mask, uint32_t n_used) {
    if (n_used == 0) {
        return;
    }
    ggml_tensor * t = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, n_used, mask->ne[1] + GGML_PQ_TAIL_CELL_ROWS, mask->ne[2], mask->ne[3]);
    ggml_set_input(t);
    ggml_format_name(t, "%s_tail", mask->name);
    ggml_pq_set_tail_mask(mask, t);
}

bool llama_million_tail::mask_fits(const ggml_tensor * mask, uint32_t n_used) {
    const ggml_tensor * t = ggml_pq_get_tail_mask(mask);
    return n_used == (t ? t->ne[0] : 0);
}

void llama_million_tail::fill_mask(ggml_tensor * mask, const std::vector<int32_t> & strms) const {
    ggml_tensor * tail_mask = ggml_pq_get_tail_mask(mask);
    if (!tail_mask || !tail_mask->buffer) {
        return; // the graph reads codes alone, if it reads this cache at all
    }
    GGML_ASSERT(mask->type == GGML_TYPE_F16 && tail_mask->type == GGML_TYPE_F16);
    GGML_ASSERT(ggml_backend_buffer_is_host(mask->buffer) && ggml_backend_buffer_is_host(tail_mask->buffer));
    GGML_ASSERT((int64_t) strms.size() == mask->ne[3] && tail_mask->ne[1] == mask->ne[1] + GGML_PQ_TAIL_CELL_ROWS);

    const ggml_fp16_t drop = ggml_fp32_to_fp16(-INFINITY);
    for (int64_t s = 0; s < mask->ne[3]; ++s) {
        const auto & cell_of_slot = streams[strms[s]].cell_of_slot;
        for (int64_t i = 0; i < mask->ne[1]; ++i) {
            ggml_fp16_t * m = (ggml_fp16_t *) ((char *) mask->data      + i*mask->nb[1]      + s*mask->nb[3]);
            ggml_fp16_t * t = (ggml_fp16_t *) ((char *) tail_mask->data + i*tail_mask->nb[1] + s*tail_mask->nb[3]);
            for (int64_t slot = 0; slot < tail_mask->ne[0]; ++slot) {
                const int32_t cell = cell_of_slot[slot];
                t[slot] = drop;
                if (cell >= 0 && cell < mask->ne[0]) {
                    std::swap(t[slot], m[cell]);
                }
            }
        }
        uint16_t * low  = (uint16_t *) ((char *) tail_mask->data + mask->ne[1]*tail_mask->nb[1] + s*tail_mask->nb[3]);
        uint16_t * high = (uint16_t *) ((char *) low + tail_mask->nb[1]);
        for (int64_t slot = 0; slot < tail_mask->ne[0]; ++slot) {
            const int32_t  cell = cell_of_slot[slot];
            const uint32_t bits = cell < mask->ne[0] ? cell : -1;
            low [slot] = (uint16_t) bits;
            high[slot] = (uint16_t) (bits >> 16);
        }
    }
}
