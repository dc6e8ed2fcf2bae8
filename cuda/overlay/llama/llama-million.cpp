#include "llama-million.h"
#include "llama-million-tail.h"

#include "llama-arch.h"
#include "llama-context.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model-loader.h"
#include "llama-model.h"

#include "ggml-cpp.h"
#include "pq-codebook.h"

#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

static constexpr uint32_t MILLION_VERSION = 2;

static pq_type pq_type_of(ggml_type type) {
    return (pq_type) (type - GGML_TYPE_PQ4);
}

struct llama_million {
    std::string error; // why the metadata cannot be used; empty when it can

    uint32_t    n_layer        = 0;
    float       rope_freq_base = 0.0f;
    std::string model_digest;

    // base64 blobs [type][is_v][n_layer]; empty vectors for types that the file does not have
    std::vector<std::string> blobs[PQ_TYPE_COUNT][2];

    mutable std::mutex mutex;

    struct device_codebook {
        ggml_context_ptr        ctx;
        ggml_backend_buffer_ptr buf;
        ggml_tensor           * tensor;
    };
    using key = std::tuple<int, int, uint32_t, ggml_backend_buffer_type_t>; // type, is_v, il, buft
    std::map<key, device_codebook> codebooks;

    std::string digest_now; // of the loaded model, computed once
};

//
// metadata
//

static bool read_strings(const gguf_context * meta, const std::string & name, std::vector<std::string> & out, std::string & error) {
    const int64_t id = gguf_find_key(meta, name.c_str());
    if (id < 0) {
        error = format("%s is missing", name.c_str());
        return false;
    }
    if (gguf_get_kv_type(meta, id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(meta, id) != GGUF_TYPE_STRING) {
        error = format("%s is not an array of strings", name.c_str());
        return false;
    }
    const size_t n = gguf_get_arr_n(meta, id);
    out.reserve(n);
    for (size_t i = 0; i < n; ++i) {
        out.emplace_back(gguf_get_arr_str(meta, id, i));
    }
    return true;
}

template <typename T> static bool read_value(const gguf_context * meta, const char * name, gguf_type type, T (*get)(const gguf_context *, int64_t), T & out, std::string & error) {
    const int64_t id = gguf_find_key(meta, name);
    if (id < 0 || gguf_get_kv_type(meta, id) != type) {
        error = format("%s is %s", name, id < 0 ? "missing" : "of the wrong type");
        return false;
    }
    out = get(meta, id);
    return true;
}

static bool read_metadata(const gguf_context * meta, llama_million & m) {
    uint32_t version = 0;
    if (!read_value(meta, "million.version", GGUF_TYPE_UINT32, gguf_get_val_u32, version, m.error)) {
        return false;
    }
    if (version != MILLION_VERSION) {
        m.error = format("the codebooks are of format version %u, this build reads version %u", version, MILLION_VERSION);
        return false;
    }
    const char * digest = nullptr;
    std::vector<std::string> types;
    if (!read_value(meta, "million.block_count",    GGUF_TYPE_UINT32,  gguf_get_val_u32, m.n_layer,        m.error) ||
        !read_value(meta, "million.rope_freq_base", GGUF_TYPE_FLOAT32, gguf_get_val_f32, m.rope_freq_base, m.error) ||
        !read_value(meta, "million.model_digest",   GGUF_TYPE_STRING,  gguf_get_val_str, digest,           m.error) ||
        !read_strings(meta, "million.types", types, m.error)) {
        return false;
    }
    m.model_digest = digest;

    for (const auto & name : types) {
        int t = 0;
        while (t < PQ_TYPE_COUNT && name != ggml_type_name((ggml_type) (GGML_TYPE_PQ4 + t))) {
            ++t;
        }
        if (t == PQ_TYPE_COUNT) {
            m.error = format("million.types names the unknown type '%s'", name.c_str());
            return false;
        }
        for (int is_v = 0; is_v < 2; ++is_v) {
            const std::string key = "million." + name + (is_v ? ".v" : ".k");
            auto & blobs = m.blobs[t][is_v];
            if (!blobs.empty()) {
                m.error = format("million.types names '%s' twice", name.c_str());
                return false;
            }
            if (!read_strings(meta, key, blobs, m.error)) {
                return false;
            }
            if (blobs.size() != m.n_layer) {
                m.error = format("%s has %zu entries, million.block_count is %u", key.c_str(), blobs.size(), m.n_layer);
                return false;
            }
        }
    }
    return true;
}

std::shared_ptr<llama_million> llama_million_load(const llama_model_loader & ml) {
    for (const auto & [name, weight] : ml.weights_map) {
        if (ggml_is_pq(weight.tensor->type)) {
            throw std::runtime_error(format("tensor '%s' has type %s, which is for KV caches only: the file is damaged",
                name.c_str(), ggml_type_name(weight.tensor->type)));
        }
    }
    if (gguf_find_key(ml.metadata, "million.version") < 0) {
        return nullptr;
    }
    auto m = std::make_shared<llama_million>();
    if (!read_metadata(ml.metadata, *m)) {
        LLAMA_LOG_WARN("%s: PQ cache types are not available: %s\n", __func__, m->error.c_str());
    }
    return m;
}

//
// checks against the model
//

// FNV-1a over the attention norms, which stay f32 in every quantization of a model: docs/format.md
static std::string model_digest(const llama_model & model) {
    uint64_t h = 0xcbf29ce484222325ull;
    std::vector<uint8_t> data;
    for (uint32_t il = 0; il < model.hparams.n_layer_all; ++il) {
        const ggml_tensor * t = model.get_tensor(format("blk.%u.attn_norm.weight", il).c_str());
        if (!t || t->type != GGML_TYPE_F32) {
            continue;
        }
        data.resize(ggml_nbytes(t));
        ggml_backend_tensor_get(t, data.data(), 0, data.size());
        for (const uint8_t b : data) {
            h = (h ^ b) * 0x100000001b3ull;
        }
    }
    return format("%016" PRIx64, h);
}

static const char * HINT_CALIBRATE = "make codebooks with 'million calibrate MODEL.gguf -o OUT.gguf', or choose another cache type (q8_0, f16)";
static const char * HINT_OTHER     = "choose another cache type (q8_0, f16)";

// Why a cache of this type cannot be had, or an empty string.
static std::string check_type(const llama_model & model, ggml_type type, bool is_v) {
    const char * name = ggml_type_name(type);
    const auto & hp   = model.hparams;

    if (hp.is_mla()) {
        return format("cache type %s: the layers of this model (%s) use multi-head latent attention, which has no K and V rows to code: %s",
            name, llm_arch_name(model.arch), HINT_OTHER);
    }
    if (llm_arch_is_recurrent(model.arch)) {
        return format("cache type %s: the layers of this model (%s) are recurrent and have no KV cache: %s", name, llm_arch_name(model.arch), HINT_OTHER);
    }
    switch (model.arch) {
        case LLM_ARCH_T5:
        case LLM_ARCH_GROK:
            return format("cache type %s needs flash attention, which %s cannot use: %s", name, llm_arch_name(model.arch), HINT_OTHER);
        case LLM_ARCH_MINIMAX_M3:
        case LLM_ARCH_GLM_DSA:
        case LLM_ARCH_DEEPSEEK32:
        case LLM_ARCH_DEEPSEEK4:
            return format("cache type %s: the sparse attention layers of this model (%s) read their cache in other ways than flash attention: %s",
                name, llm_arch_name(model.arch), HINT_OTHER);
        default:
            break;
    }
    if (!model.million) {
        return format("cache type %s: this model has no PQ codebooks (million.* metadata): %s", name, HINT_CALIBRATE);
    }
    const auto & m = *model.million;
    if (!m.error.empty()) {
        return format("cache type %s: %s: %s", name, m.error.c_str(), HINT_CALIBRATE);
    }
    const auto & blobs = m.blobs[pq_type_of(type)][is_v];
    if (std::all_of(blobs.begin(), blobs.end(), [](const std::string & blob) { return blob.empty(); })) {
        return format("cache type %s: this model has PQ codebooks, but none for %s: %s", name, name, HINT_CALIBRATE);
    }
    if (m.n_layer != hp.n_layer_all) {
        return format("cache type %s: the codebooks are for a model of %u layers, this one has %u: %s", name, m.n_layer, hp.n_layer_all, HINT_CALIBRATE);
    }
    if (m.rope_freq_base != 0.0f && hp.rope_type != LLAMA_ROPE_TYPE_NONE && m.rope_freq_base != hp.rope_freq_base_train) {
        return format("cache type %s: the codebooks are for a rope base of %g, the model has %g: %s",
            name, m.rope_freq_base, hp.rope_freq_base_train, HINT_CALIBRATE);
    }
    if (!hp.no_alloc && !hp.vocab_only) {
        std::lock_guard<std::mutex> lock(m.mutex);
        auto & now = model.million->digest_now;
        if (now.empty()) {
            now = model_digest(model);
        }
        if (now != m.model_digest) {
            return format("cache type %s: the codebooks were made for another model (digest %s, this model has %s): %s",
                name, m.model_digest.c_str(), now.c_str(), HINT_CALIBRATE);
        }
    }
    return "";
}

bool llama_million_check_params(const llama_model & model, llama_context_params & params) {
    llama_million_tail_config(params.n_ubatch == 0 ? params.n_batch : std::min(params.n_batch, params.n_ubatch));

    for (const bool is_v : { false, true }) {
        const ggml_type type = is_v ? params.type_v : params.type_k;
        if (!ggml_is_pq(type)) {
            continue;
        }
        const std::string why = check_type(model, type, is_v);
        if (!why.empty()) {
            LLAMA_LOG_ERROR("%s: %s\n", __func__, why.c_str());
            return false;
        }
        if (params.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_AUTO) {
            LLAMA_LOG_INFO("%s: enabling flash_attn since it is required for cache type %s\n", __func__, ggml_type_name(type));
            params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
        }
        if (params.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_DISABLED) {
            LLAMA_LOG_ERROR("%s: cache type %s requires flash_attn to be enabled\n", __func__, ggml_type_name(type));
            return false;
        }
    }
    return true;
}

void llama_million_check_graph(ggml_cgraph * gf) {
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        const ggml_tensor * t = ggml_graph_node(gf, i);
        if (!ggml_pq_has_operand(t)) {
            continue;
        }
        const bool tail_lost = t->op == GGML_OP_FLASH_ATTN_EXT &&
            ggml_pq_get_tail_mask(t->src[3]) && !t->src[GGML_PQ_SRC_FLASH_ATTN_TAIL_MASK]; // its mask hides what nothing else shows
        const bool ok = !tail_lost && (
            (t->op == GGML_OP_SET_ROWS       && t->src[GGML_PQ_SRC_SET_ROWS]) ||
            (t->op == GGML_OP_CPY            && t->src[GGML_PQ_SRC_CPY]) ||
            (t->op == GGML_OP_FLASH_ATTN_EXT && (!ggml_is_pq(t->src[1]->type) || t->src[GGML_PQ_SRC_FLASH_ATTN_K])
                                             && (!ggml_is_pq(t->src[2]->type) || t->src[GGML_PQ_SRC_FLASH_ATTN_V])));
        if (!ok) {
            throw std::runtime_error(format("this model reads its KV cache with %s (%s), which PQ cache types do not support: %s",
                ggml_op_name(t->op), t->name, HINT_OTHER));
        }
    }
}

//
// codebooks
//

static llama_million::device_codebook make_codebook(
        const std::string & text, ggml_backend_buffer_type_t buft, ggml_type type, uint32_t il, bool is_v,
        uint32_t D, uint32_t n_head_kv, bool no_alloc) {
    const std::string what = format("blk.%u %s codebook for cache type %s", il, is_v ? "V" : "K", ggml_type_name(type));
    const auto fail = [&](const std::string & why) {
        throw std::runtime_error(format("%s: %s: %s", what.c_str(), why.c_str(), HINT_CALIBRATE));
    };

    std::vector<uint8_t> bytes;
    std::string          error;
    pq_blob              blob;
    if (!pq_base64_decode(text.data(), text.size(), bytes)) {
        fail("is not base64");
    }
    if (!pq_blob_parse(bytes.data(), bytes.size(), pq_type_of(type), blob, error)) {
        fail(error);
    }
    if ((uint32_t) blob.D != D || (uint32_t) blob.n_head_kv != n_head_kv) {
        fail(format("is for %d KV heads of size %d, the model has %u of size %u", blob.n_head_kv, blob.D, n_head_kv, D));
    }
    if (is_v && blob.has_aniso) {
        fail("has an anisotropy, which only K has");
    }

    llama_million::device_codebook res;
    const ggml_init_params params = { 2*ggml_tensor_overhead(), nullptr, /*no_alloc =*/ true };
    res.ctx.reset(ggml_init(params));
    const bool with_tables = !ggml_backend_buft_is_host(buft); // the CPU has no use for them
    res.tensor = ggml_pq_new_codebook(res.ctx.get(), type, blob.D, blob.n_head_kv, blob.has_transform, with_tables);
    ggml_tensor * all = res.tensor->view_src ? res.tensor->view_src : res.tensor;
    ggml_format_name(res.tensor, "pq_codebook_%s_l%u", is_v ? "v" : "k", il);

    if (no_alloc) { // only sizes are wanted: a dummy buffer, as the cache itself has
        res.buf.reset(ggml_backend_buft_alloc_buffer(buft, 0));
        res.tensor->buffer = res.buf.get();
        all->buffer        = res.buf.get();
        return res;
    }
    std::vector<uint8_t> packed(ggml_nbytes(all));
    if (!pq_codebook_build(blob, packed.data(), error)) {
        fail(error);
    }
    if (all != res.tensor) {
        pq_build_tables(blob.type, blob.D, blob.n_head_kv, blob.has_transform, is_v, packed.data(), packed.data() + ggml_nbytes(res.tensor));
    }
    res.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(res.ctx.get(), buft));
    if (!res.buf) {
        throw std::runtime_error(format("%s: cannot allocate %zu bytes in %s", what.c_str(), packed.size(), ggml_backend_buft_name(buft)));
    }
    ggml_backend_tensor_set(all, packed.data(), 0, packed.size());
    return res;
}

ggml_type llama_million_layer_type(const llama_model & model, ggml_type type, uint32_t il, bool is_v) {
    if (!ggml_is_pq(type)) {
        return type;
    }
    const std::string why = check_type(model, type, is_v);
    if (!why.empty()) {
        throw std::runtime_error(why);
    }
    return model.million->blobs[pq_type_of(type)][is_v].at(il).empty() ? GGML_TYPE_F16 : type;
}

bool llama_million_can_have_tail(
        const llama_model & model, ggml_type type_k, ggml_type type_v, uint32_t n_layer, const std::function<bool(int32_t il)> & filter) {
    uint32_t n_coded = 0;
    uint32_t n_plain = 0;
    for (uint32_t il = 0; il < n_layer; ++il) {
        if (!model.hparams.has_kv(il) || (filter && !filter(il))) {
            continue;
        }
        const bool coded = ggml_is_pq(llama_million_layer_type(model, type_k, il, false)) ||
                           ggml_is_pq(llama_million_layer_type(model, type_v, il, true));
        ++(coded ? n_coded : n_plain);
    }
    if (n_coded > 0 && n_plain > 0) {
        // one mask serves all layers, and a plain layer must see the cells that the tail hides
        LLAMA_LOG_WARN("%s: %u layers have no codebooks and stay f16: this cache has no exact tail\n", __func__, n_plain);
    } else if (n_plain > 0 && (ggml_is_pq(type_k) || ggml_is_pq(type_v))) {
        LLAMA_LOG_INFO("%s: none of the %u layers of this cache has codebooks: they stay f16\n", __func__, n_plain);
    }
    return n_coded > 0 && n_plain == 0;
}

ggml_tensor * llama_million_codebook(
        const llama_model & model, const llama_hparams & hparams, ggml_backend_buffer_type_t buft, ggml_type type, uint32_t il, bool is_v) {
    if (!ggml_is_pq(type)) {
        return nullptr;
    }
    const std::string why = check_type(model, type, is_v);
    if (!why.empty()) {
        throw std::runtime_error(why);
    }
    auto & m = *model.million;
    std::lock_guard<std::mutex> lock(m.mutex);

    const llama_million::key key { pq_type_of(type), is_v, il, buft };
    auto it = m.codebooks.find(key);
    if (it == m.codebooks.end()) {
        const uint32_t D = is_v ? hparams.n_embd_head_v(il) : hparams.n_embd_head_k(il);
        it = m.codebooks.emplace(key, make_codebook(m.blobs[pq_type_of(type)][is_v].at(il), buft, type, il, is_v,
            D, hparams.n_head_kv(il), hparams.no_alloc)).first;
    }
    return it->second.tensor;
}

//
// C ABI
//

const char * million_model_check(const llama_model * model, int32_t type_k, int32_t type_v) {
    thread_local std::string why;
    for (const bool is_v : { false, true }) {
        const int32_t type = is_v ? type_v : type_k;
        if (type < 0 || type >= GGML_TYPE_COUNT) {
            why = format("%d is not a cache type", type);
            return why.c_str();
        }
        if (ggml_is_pq((ggml_type) type)) {
            why = check_type(*model, (ggml_type) type, is_v);
            if (!why.empty()) {
                return why.c_str();
            }
        }
    }
    return nullptr;
}

struct llama_million_cache { // a friend of llama_kv_cache
    static void add(const llama_kv_cache * kv, million_cache_info & info) {
        if (!kv) {
            return;
        }
        info.bytes_k += kv->size_k_bytes();
        info.bytes_v += kv->size_v_bytes();
        for (const auto & layer : kv->layers) {
            for (const ggml_tensor * t : { layer.k, layer.v }) {
                info.bytes_f16 += t ? ggml_nelements(t)*sizeof(ggml_fp16_t) : 0;
            }
            for (const ggml_tensor * t : { layer.k_tail, layer.v_tail }) {
                info.bytes_tail += t ? ggml_nbytes(t) : 0;
            }
            for (const ggml_tensor * t : { layer.k_cb, layer.v_cb }) {
                info.bytes_codebooks += t ? ggml_nbytes(t) : 0;
            }
            info.type_k = layer.k ? layer.k->type : info.type_k;
            info.type_v = layer.v ? layer.v->type : info.type_v;
        }
        if (kv->tail) {
            info.n_tail  = kv->tail->n_tail();
            info.n_slots = kv->tail->n_slots()*kv->n_stream;
        }
    }
};

void million_get_cache_info(llama_context * ctx, million_cache_info * info) {
    *info = {};
    info->type_k = info->type_v = -1;
    const auto add_iswa = [&](const llama_kv_cache_iswa * kv) {
        llama_million_cache::add(kv->get_base(), *info);
        llama_million_cache::add(kv->get_swa(),  *info);
    };
    llama_memory_t mem = llama_get_memory(ctx);
    if (auto * kv = dynamic_cast<llama_kv_cache *>(mem)) {
        llama_million_cache::add(kv, *info);
    } else if (auto * kv = dynamic_cast<llama_kv_cache_iswa *>(mem)) {
        add_iswa(kv);
    } else if (auto * hybrid = dynamic_cast<llama_memory_hybrid *>(mem)) {
        llama_million_cache::add(hybrid->get_mem_attn(), *info);
    } else if (auto * hybrid = dynamic_cast<llama_memory_hybrid_iswa *>(mem)) {
        add_iswa(hybrid->get_mem_attn());
    }
}

//
// the exact tail in a saved state
//

struct llama_million_state { // a friend of llama_kv_cache
    static void write(const llama_kv_cache & kv, llama_io_write_i & io, uint32_t strm, const std::vector<std::pair<uint32_t, uint32_t>> & cell_ranges) {
        if (!is_pq(kv)) {
            return;
        }
        const uint64_t fingerprint = codebooks_fingerprint(kv);
        io.write(&fingerprint, sizeof(fingerprint));

        std::map<uint32_t, uint32_t> entries; // slot -> ordinal of its cell
        uint32_t ordinal = 0;
        for (const auto & [c0, c1] : cell_ranges) {
            for (uint32_t cell = c0; cell < c1; ++cell, ++ordinal) {
                const int32_t slot = kv.tail ? kv.tail->slot_of(strm, cell) : -1;
                if (slot >= 0) {
                    entries[slot] = ordinal;
                }
            }
        }
        const uint32_t n = entries.size();
        io.write(&n, sizeof(n));
        for (const auto & [_, ordinal] : entries) {
            io.write(&ordinal, sizeof(ordinal));
        }
        for (const auto & layer : kv.layers) {
            for (ggml_tensor * t : { layer.k_tail, layer.v_tail }) { // NULL without a tail: no entries then
                for (const auto & [slot, _] : entries) {
                    io.write_tensor(t, strm*t->nb[2] + slot*t->nb[1], t->nb[1]);
                }
            }
        }
    }

    static bool read(llama_kv_cache & kv, llama_io_read_i & io, uint32_t strm, const std::vector<uint32_t> & cells) {
        if (!is_pq(kv)) {
            return true;
        }
        uint64_t fingerprint = 0;
        io.read(&fingerprint, sizeof(fingerprint));
        if (fingerprint != codebooks_fingerprint(kv)) {
            LLAMA_LOG_ERROR("%s: the state has codes of other codebooks than this model, or in the order of another version: load the file it was saved with, or make the state anew\n", __func__);
            return false;
        }
        uint32_t n = 0;
        io.read(&n, sizeof(n));
        if (n > cells.size()) {
            LLAMA_LOG_ERROR("%s: the state has a tail of %u rows for %zu cells: it is damaged\n", __func__, n, cells.size());
            return false;
        }
        std::vector<int32_t> slots(n);
        if (kv.tail) {
            for (const uint32_t cell : cells) {
                kv.tail->release(strm, cell);
            }
        }
        for (int32_t & slot : slots) {
            uint32_t ordinal = 0;
            io.read(&ordinal, sizeof(ordinal));
            if (ordinal >= cells.size()) {
                LLAMA_LOG_ERROR("%s: the state has a tail row for cell %u of %zu: it is damaged\n", __func__, ordinal, cells.size());
                return false;
            }
            slot = kv.tail ? kv.tail->take(strm, cells[ordinal]) : -1;
        }
        std::vector<uint8_t> skipped;
        for (const auto & layer : kv.layers) {
            for (const bool is_v : { false, true }) {
                ggml_tensor       * t     = is_v ? layer.v_tail : layer.k_tail;
                const ggml_tensor * cache = is_v ? layer.v      : layer.k;
                const size_t row = cache->ne[0]*sizeof(ggml_fp16_t);
                for (const int32_t slot : slots) {
                    if (slot >= 0) {
                        io.read_tensor(t, strm*t->nb[2] + slot*t->nb[1], row);
                    } else {
                        skipped.resize(row);
                        io.read(skipped.data(), row);
                    }
                }
            }
        }
        return true;
    }

private:
    // Tells codebooks apart: hashes the header of each blob, which has the checksum of its payload, and the order of codes in a row.
    static uint64_t codebooks_fingerprint(const llama_kv_cache & kv) {
        uint64_t h = 0xcbf29ce484222325ull ^ PQ_CODE_ORDER;
        for (const auto & layer : kv.layers) {
            for (const bool is_v : { false, true }) {
                const ggml_tensor * t = is_v ? layer.v : layer.k;
                if (!t || !ggml_is_pq(t->type)) {
                    continue;
                }
                const std::string & blob = kv.model.million->blobs[pq_type_of(t->type)][is_v].at(layer.il);
                for (size_t i = 0; i < std::min<size_t>(blob.size(), (PQ_BLOB_HEADER_BYTES + 2)/3*4); ++i) {
                    h = (h ^ (uint8_t) blob[i]) * 0x100000001b3ull;
                }
            }
        }
        return h;
    }

    static bool is_pq(const llama_kv_cache & kv) {
        return std::any_of(kv.layers.begin(), kv.layers.end(), [](const auto & layer) { return layer.k_cb || layer.v_cb; });
    }
};

void llama_million_state_write_tail(const llama_kv_cache & kv, llama_io_write_i & io, uint32_t strm,
        const std::vector<std::pair<uint32_t, uint32_t>> & cell_ranges) {
    llama_million_state::write(kv, io, strm, cell_ranges);
}

bool llama_million_state_read_tail(llama_kv_cache & kv, llama_io_read_i & io, uint32_t strm, const std::vector<uint32_t> & cells) {
    return llama_million_state::read(kv, io, strm, cells);
}
