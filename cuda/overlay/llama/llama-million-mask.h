// The attention mask of a sequence that has a cache to itself, as in a chat.
#pragma once

#include "llama-kv-cells.h"

#include <vector>

// Fills row [n_kv] of a causal mask for a token of `seq_id` at position `pos`, where every cell in use is of that sequence: positions alone then say
// what it sees, in a loop without branches. Cells from position pos_recorded on are added to `idxs`.
// Returns false, having done nothing, where other sequences have cells.
template <class T>
static bool llama_million_mask_of_one_sequence(const llama_kv_cells & cells, llama_seq_id seq_id, llama_pos pos, llama_pos pos_recorded, T keep, T drop,
                                               T * row, int64_t n_kv, std::vector<uint32_t> & idxs) {
    const auto & seq_pos = cells.seq_pos_get(seq_id);
    if (seq_pos.size() != cells.get_used()) {
        return false;
    }
    for (uint32_t j = 0; j < n_kv; ++j) {
        row[j] = !cells.is_empty(j) && cells.pos_get(j) <= pos ? keep : drop;
    }
    for (auto it = seq_pos.lower_bound({ pos_recorded, 0 }); it != seq_pos.end(); ++it) {
        if (it->second < n_kv) {
            idxs.push_back(it->second);
        }
    }
    return true;
}
