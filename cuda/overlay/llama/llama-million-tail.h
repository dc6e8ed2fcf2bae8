// The exact tail of a PQ cache: the f16 rows of the most recent tokens, beside their codes.
//
// Codes are written for every token at once, so the tail is an overlay: a slot may be dropped at any time, which is always
// correct and only less exact. Before a micro-batch is computed, a sequence keeps the last n_tail - 1 tokens before
// it; the tokens of the micro-batch itself come on top. So a query always finds at least the n_tail most recent tokens, itself included,
// exact, and a prompt attends to its own micro-batch exactly.
//
//     memory     k_tail, v_tail of a layer: F16 [D*n_head_kv, n_slots, n_stream]
//     graph      tail K, V [D, n_used, n_head_kv, n_stream] ride on the views of the cache, tail_mask [n_used, n_q + 2, 1, n_stream],
//                which tells the cells of the slots too, on the mask, tail_idxs [n_tokens] on k_idxs and v_idxs (ggml-pq.h says where)
//     host       which cell each slot holds, per stream
#pragma once

#include "ggml.h"

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

class  llama_io_read_i;
class  llama_io_write_i;
class  llama_kv_cache;
class  llama_kv_cells;
struct llama_ubatch;

class llama_million_tail {
public:
    // NULL when contexts made by this thread have no tail (million_set_kv_tail).
    // n_seq_max: sequences of the context; n_stream of them have cells of their own, or share one stream.
    static std::shared_ptr<llama_million_tail> make(uint32_t kv_size, uint32_t n_seq_max, uint32_t n_stream);

    uint32_t n_tail () const { return n_tail_;  } // tokens kept per sequence
    uint32_t n_slots() const { return n_slots_; } // rows per stream

    void clear();
    void clear(uint32_t strm);

    // Drops what has grown too old, and gives slots to tokens [i0, i0 + cells_new.size()) of the micro-batch, which
    // `cells` holds already, in the cells `cells_new`. Each of them gets one: their codes may be made from these rows.
    void assign(uint32_t strm, const llama_kv_cells & cells, const std::vector<uint32_t> & cells_new, const llama_ubatch & ubatch, uint32_t i0);

    int32_t slot_of(uint32_t strm, uint32_t cell) const { return streams[strm].slot_of_cell[cell]; } // -1: none
    int32_t cell_of(uint32_t strm, uint32_t slot) const { return streams[strm].cell_of_slot[slot]; } // -1: free

    // Gives the cell the lowest free slot, so that attention reads few; returns -1 when none is free.
    int32_t take(uint32_t strm, uint32_t cell);
    void release(uint32_t strm, uint32_t cell);

    // Slots up to the last one in use, rounded up so that graphs stay the same for many tokens.
    uint32_t n_used(const std::vector<int32_t> & strms) const;

    // ---- graph ----

    ggml_tensor * new_storage(ggml_context * ctx, const ggml_tensor * cache) const;

    // The tail of streams [s0, s1] as attention takes it, of D elements per head.
    ggml_tensor * view(ggml_context * ctx, ggml_tensor * storage, int64_t D, uint32_t n_used, uint32_t s0, uint32_t s1) const;

    // Lets a cache write go to the tail too. `op` is a SET_ROWS whose indices carry tail indices.
    static ggml_tensor * write(ggml_context * ctx, ggml_tensor * op, ggml_tensor * storage);

    // The indices of a cache write carry the slots of its tokens.
    void add_idxs (ggml_context * ctx, ggml_tensor * idxs);
    void fill_idxs(ggml_tensor * idxs, const std::vector<int32_t> & strms, const std::vector<std::vector<uint32_t>> & cells) const;

    // The indices that add_idxs was given last, once, then NULL: V's rows go where K's go, and every input less is a copy to the device less.
    ggml_tensor * take_idxs();

    // A mask [n_kv, n_q, 1, n_stream] carries the tail's mask [n_used, n_q + 2, 1, n_stream]; n_used 0: none.
    static void add_mask (ggml_context * ctx, ggml_tensor * mask, uint32_t n_used);
    static bool mask_fits(const ggml_tensor * mask, uint32_t n_used);

    // Moves the columns of cells that are in the tail from a mask, filled as always, to the tail's mask, and writes the cells
    // of the slots there. Rows of its stream s are those of strms[s].
    void fill_mask(ggml_tensor * mask, const std::vector<int32_t> & strms) const;

private:
    struct stream {
        std::vector<int32_t> cell_of_slot;
        std::vector<int32_t> slot_of_cell;
    };

    uint32_t n_tail_    = 0;
    uint32_t n_slots_   = 0;
    uint32_t n_seq_max_ = 0;

    std::vector<stream> streams;
    ggml_tensor *       idxs_ = nullptr;
};

// The tail in a saved state, after the cells of a stream; does nothing for caches without PQ types.
//
//     u64 fingerprint of the codebooks | u32 n | n times: u32 ordinal of the row's cell among the saved ones |
//     per layer: K rows f16 [n][D*n_head_kv], V rows f16 [n][D*n_head_kv]
//
// Rows are in the order of their slots and get slots in that order, so that sums run in the same order and logits are the same.
// Reading returns false (having logged why) when the codes are of other codebooks.
void llama_million_state_write_tail(const llama_kv_cache & kv, llama_io_write_i & io, uint32_t strm,
        const std::vector<std::pair<uint32_t, uint32_t>> & cell_ranges);
bool llama_million_state_read_tail(llama_kv_cache & kv, llama_io_read_i & io, uint32_t strm, const std::vector<uint32_t> & cells);

// What contexts made by this thread will have: tokens in the tail, and micro-batch size.
void llama_million_tail_config(uint32_t n_ubatch);
