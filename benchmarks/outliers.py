"""Give a model outlier channels in its KV cache without changing what it computes.

A few rope pairs of every key head are multiplied by a factor and the matching query rows divided by it; a few channels of
every value head are multiplied and the matching columns of the output projection divided. Scores and outputs stay as they
were, but a cache type whose blocks span several channels now codes most of them with the step of the largest. Trained
models have such channels by themselves (Qwen2.5's key bias is the usual example); this makes the effect measurable.

    python benchmarks/outliers.py model.gguf -o outliers.gguf
    million calibrate outliers.gguf -o outliers-pq.gguf
    million eval outliers-pq.gguf ...                              # and once more for the original
    LLAMA_ATTN_ROT_DISABLE=1 million eval outliers-pq.gguf ...     # q4_0 as it is without llama.cpp's rotation

The factor is a power of two by default: it changes exponents only, so f16 weights stay exact (but for subnormal ones).
Weights must be f16 or f32. Biases of Q, K and V are scaled too.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from million_gguf import container
from million_gguf.errors import InputError, MillionError, MismatchError

DTYPES = {int(GGMLQuantizationType.F16): np.float16, int(GGMLQuantizationType.F32): np.float32}


def rescale(src: Path, dst: Path, *, factor: float, n_pairs: int, n_channels: int, neox: bool, seed: int) -> None:
    """Write a copy of ``src`` with ``n_pairs`` rope pairs of each key head and ``n_channels`` of each value head scaled.

    Args:
        neox: a rope pair is (i, i + D/2), as in most architectures but llama, and not (2i, 2i + 1).
    """
    if container.has_codebooks(src):
        raise InputError(f"{src} carries codebooks, which would not fit the result: give the model without them")
    with container.GGUFHeader(src) as header:
        shape = container.model_shape(header)
        tensors = dict(header.tensors)
    shutil.copyfile(src, dst)
    data = np.memmap(dst, dtype=np.uint8, mode="r+")

    def part(name: str, *, required: bool = True) -> npt.NDArray[np.floating] | None:
        tensor = tensors.get(name)
        if tensor is None and not required:
            return None
        if tensor is None or tensor.n_bytes is None or tensor.type not in DTYPES:
            raise MismatchError(f"{src}: found no {name} in f16 or f32, need it: convert with --outtype f16")
        raw = data[tensor.offset : tensor.offset + tensor.n_bytes]
        return raw.view(DTYPES[tensor.type]).reshape(tensor.dims[::-1])

    rng = np.random.default_rng(seed)
    for i in range(shape.block_count):
        n_head, n_head_kv, D_k, D_v = shape.n_head[i], shape.n_head_kv[i], shape.D_k[i], shape.D_v[i]
        key_scale, value_scale = np.ones((n_head_kv, D_k), np.float32), np.ones((n_head_kv, D_v), np.float32)
        for h in range(n_head_kv):
            pair = rng.choice(D_k // 2, n_pairs, replace=False)
            both = (pair, pair + D_k // 2) if neox else (2 * pair, 2 * pair + 1)
            key_scale[h, np.concatenate(both)] = factor
            value_scale[h, rng.choice(D_v, n_channels, replace=False)] = factor
        group = n_head // n_head_kv
        query_scale = np.repeat(key_scale, group, axis=0)
        output_scale = np.repeat(value_scale, group, axis=0).ravel()
        for name, scale in (("k", key_scale), ("q", 1.0 / query_scale), ("v", value_scale)):
            weight = part(f"blk.{i}.attn_{name}.weight")
            bias = part(f"blk.{i}.attn_{name}.bias", required=False)
            assert weight is not None
            weight *= scale.ravel()[:, None].astype(weight.dtype)
            if bias is not None:
                bias *= scale.ravel().astype(bias.dtype)
        weight = part(f"blk.{i}.attn_output.weight")
        assert weight is not None
        weight /= output_scale[None, :].astype(weight.dtype)
    data.flush()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.gguf")
    parser.add_argument("--factor", type=float, default=32.0, help="default: %(default)g")
    parser.add_argument("--pairs", type=int, default=3, help="rope pairs of each key head (default: %(default)s)")
    parser.add_argument("--channels", type=int, default=3, help="channels of each value head (default: %(default)s)")
    parser.add_argument("--neox", action="store_true", help="rope pairs are (i, i + D/2); needed for all but llama")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        rescale(
            args.model, args.output, factor=args.factor, n_pairs=args.pairs, n_channels=args.channels, neox=args.neox,
            seed=args.seed,
        )  # fmt: skip
    except MillionError as e:
        print(f"outliers: error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
