// Encoding, as other launches of this folder have it beside them.
#pragma once

#include "pq-cuda.h"

// Whether pq_cuda_encode has work for many multiprocessors in rows: those that are many, and lie as it wants them.
bool pq_encodes_tiles(const pq_encode_params * sides, int n_sides);

// As pq_cuda_encode. settled, of tiles: the kernels ahead in the stream that may still run are of this folder, neither write what this one reads nor use what it writes, and let
// the next begin when everything before them was complete; this one may then run beside them. Who waits for this one waits for all.
cudaError_t pq_encode(const pq_encode_params * sides, int n_sides, bool settled, cudaStream_t stream);
