// Reads codebook blobs out of a file and lays them out for the kernels. Knows neither ggml nor llama.cpp.
// Nothing in a blob is trusted: sizes are checked before they are used, values must be finite, T must have an inverse, which
// f16 can hold.
#pragma once

#include "pq-layout.h"

#include <cstdint>
#include <string>
#include <vector>

struct pq_blob {
    pq_type type          = PQ_TYPE_COUNT;
    int32_t D             = 0;
    int32_t n_head_kv     = 0;
    bool    has_transform = false;
    bool    has_aniso     = false;

    std::vector<uint8_t> payload; // layout: pq-layout.h, "Codebook in a file"
};

// Decodes base64 (RFC 4648, padded, no white space). Returns false on any other character or length.
bool pq_base64_decode(const char * text, size_t n, std::vector<uint8_t> & out);

// Checks a blob and takes it over. On failure returns false and says in `error` what was found and what was needed.
bool pq_blob_parse(const uint8_t * data, size_t n, pq_type type, pq_blob & out, std::string & error);

// Writes the run-time head blocks, pq_get_codebook_layout(...).head_bytes each, n_head_kv of them, to `dst`.
// Returns false (and why, in `error`) when a transform has no inverse, or one too large for f16.
bool pq_codebook_build(const pq_blob & blob, uint8_t * dst, std::string & error);
