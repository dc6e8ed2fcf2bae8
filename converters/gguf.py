"""``calibrate``: a GGUF file in, the same file with codebooks out. Any weight type that llama.cpp runs."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import secrets
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .. import __version__, container, paths
from ..errors import InputError, MismatchError
from ..progress import note, stage
from ..spec import PQ_TYPES, PQSpec, get_spec

if TYPE_CHECKING:
    from ..pq_ref import Codebook
    from .capture import Capture

DEFAULT_TYPES = tuple(PQ_TYPES)
# More are a little better. With these ref-33m takes just under five minutes on two slow cores (docs/calibration.md).
DEFAULT_TOKENS = 65536
DEFAULT_CTX = 2048
DEFAULT_TEXT = "calibration.txt"

_BYTES_PER_TOKEN = 64  # more of a text than this times the wanted tokens is not read: tokens average four bytes
_HELD_BACK = 16  # one row of so many is not trained on. While all rows are kept, it is the end of the text that is not.
# Rows that centroids are trained on: 128 for each of 256. The transform takes all rows: it is cheap, and gains from more text.
_MAX_TRAINED = 32768

# Keys of text of another kind lie further from the mean than those of the calibration text (in the heads that copy from far
# back by a quarter, in squares), and far keys are those that queries look for. So half of the keys are trained on stretched.
_STRETCH_K = 1.3
_OTHER_TYPES = "run it with cache type f16 or q8_0"

RECURRENT = ("mamba", "rwkv", "arwkv", "falcon_mamba")  # beginnings of architecture names, in GGUF and HF files
NO_ROWS_RECURRENT = "its layers are recurrent and keep a state of fixed size, there are no KV rows to code: run it as it is, in llama.cpp"
NO_ROWS_MLA = (
    "its attention is MLA, whose cache is a small latent vector already and has no K and V rows to code: "
    f"{_OTHER_TYPES}, in llama.cpp"
)


@dataclass(frozen=True)
class Calibrated:
    """What ``calibrate`` did.

    Attributes:
        path: the file written.
        n_tokens: tokens that the codebooks were trained on.
        n_layer: layers that have codebooks.
        errors: by cache type, the mean over layers of the (K, V) errors: squared error over squared deviation.
    """

    path: Path
    n_tokens: int
    n_layer: int
    errors: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Text:
    """A calibration text: what of it will be used, and the sha256 (hex) of all of it."""

    text: str
    digest: str


def load_text(source: str | os.PathLike[str] | None, n_tokens: int) -> Text:
    """The calibration text: a ``str`` is the text itself, a path names a file, None is the text of the package.

    Raises InputError when it cannot be read or is not UTF-8.
    """
    limit = n_tokens * _BYTES_PER_TOKEN
    if isinstance(source, str):
        return Text(source[:limit], hashlib.sha256(source.encode("utf-8", "replace")).hexdigest())
    path = paths.converters_data(DEFAULT_TEXT) if source is None else Path(source)
    sha, kept = hashlib.sha256(), bytearray()
    try:
        with open(path, "rb") as f:
            while block := f.read(1 << 20):
                sha.update(block)
                kept += block[: max(0, limit - len(kept))]
    except OSError as e:
        raise InputError(f"cannot read the calibration text {path}: {e.strerror or e}") from e
    try:
        text = kept.decode("utf-8")
    except UnicodeDecodeError as e:
        if len(kept) < limit or e.start < limit - 4:  # not just a character cut at the limit
            raise InputError(f"the calibration text {path} is not UTF-8 (byte {e.start}): convert it first") from None
        text = kept[: e.start].decode("utf-8")
    return Text(text, sha.hexdigest())


def parse_types(types: Sequence[str] | str) -> tuple[PQSpec, ...]:
    """Specs of "pq4,pq2" or ("pq4", "pq2"), without repetition. Raises InputError for an unknown or empty list."""
    names = types.split(",") if isinstance(types, str) else types
    specs = tuple(dict.fromkeys(get_spec(n.strip()) for n in names if n.strip()))
    if not specs:
        raise InputError(f"no cache types to calibrate for: give some of {', '.join(PQ_TYPES)}")
    return specs


def check_output(dst: Path, *, overwrite: bool) -> None:
    """Raises InputError unless ``dst`` can be written: found out now, and not after the expensive work."""
    folder = dst.parent
    if dst.is_dir():
        raise InputError(f"the output {dst} is a folder: give a file name")
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder} to write {dst.name} to: make it first")
    if dst.exists() and not overwrite:
        raise InputError(
            f"the output {dst} exists already: choose another name, or replace it (--force; overwrite=True in Python)"
        )
    probe = folder / f".{dst.name}.{secrets.token_hex(6)}.tmp"
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as e:
        raise InputError(f"cannot write to {folder}: {e.strerror or e}") from e


def check_space(folder: Path, n_bytes: int) -> None:
    """Raises InputError when the disk of ``folder`` has less than ``n_bytes`` free."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise InputError(
            f"{folder} has {free / 1e9:.2f} GB free, need {n_bytes / 1e9:.2f} GB: free some, or write to another disk"
        )


def check_model(header: container.GGUFHeader, specs: Sequence[PQSpec]) -> container.ModelShape:
    """The shape of a model whose KV cache can be coded. Raises MismatchError for any other, naming what stands against it.

    Raises FormatError and InputError when the file is no complete, single GGUF model.
    """
    arch = header.require("general.architecture")
    where = f"{header.path} ({arch})"
    if int(header.get("split.count", 0) or 0) > 1:
        raise InputError(
            f"{header.path} is one part of {header.get('split.count')} of a split model: "
            f"merge it first with 'llama-gguf-split --merge {header.path.name} merged.gguf'"
        )
    if str(arch).startswith(RECURRENT):
        raise MismatchError(f"{where}: {NO_ROWS_RECURRENT}")
    if f"{arch}.attention.kv_lora_rank" in header.kv:
        raise MismatchError(f"{where}: {NO_ROWS_MLA}")
    if header.get(f"{arch}.attention.causal") is False:
        raise MismatchError(f"{where}: it is an encoder (not causal) and keeps no KV cache: run it as it is")
    if not header.tensors:
        raise InputError(f"{header.path} has no weights (a vocabulary only?): give a complete model")
    shape = container.model_shape(header)
    if not any(shape.n_head_kv):
        raise MismatchError(f"{where}: no layer has KV heads, there are no KV rows to code: run it as it is")
    for n_head_kv, sizes in zip(shape.n_head_kv, zip(shape.D_k, shape.D_v, strict=True), strict=True):
        for spec in specs:
            for size in sizes if n_head_kv else ():
                try:
                    spec.check_head_size(size)
                except MismatchError as e:
                    raise MismatchError(f"{where}: {e}") from None
    return shape


def codebook_file_bytes(shape: container.ModelShape, specs: Sequence[PQSpec], *, has_transform: bool = True) -> int:
    """Upper bound of the bytes that codebooks add to a file."""
    total = 64 << 10  # keys, errors, alignment
    for spec in specs:
        for n_head_kv, d_k, d_v in zip(shape.n_head_kv, shape.D_k, shape.D_v, strict=True):
            for size, is_k in ((d_k, True), (d_v, False)) if n_head_kv else ():
                raw = 32 + container.payload_bytes(spec, size, n_head_kv, has_transform, has_aniso=is_k)
                total += 8 + (raw + 2) // 3 * 4
    return total


def calibrate(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    types: Sequence[str] | str = DEFAULT_TYPES,
    *,
    text: str | os.PathLike[str] | None = None,
    n_tokens: int = DEFAULT_TOKENS,
    n_ctx: int = DEFAULT_CTX,
    seed: int = 0,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
    memory_bytes: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Calibrated:
    """Train PQ codebooks for the model in ``src`` and write a copy of it that carries them to ``dst``.

    The model is run over ``text`` in our own runtime; ``src`` is left untouched, and ``dst`` appears complete or not at
    all. The same input, seed and machine give the same codebooks.

    Args:
        types: cache types to make codebooks for, as names or as one string with commas.
        text: the text itself (``str``), a file (a path object), or None for the one that ships with the package.
        n_tokens: how much of it to use; more is a little more accurate.
        n_ctx: tokens per context; clipped to what the model was trained on.
        n_gpu_layers: as llama.cpp's -ngl; -1 for all.
        memory_bytes: budget for captured rows; the default is a share of the memory that is free.
        overwrite: replace ``dst`` if it exists.
        progress: show progress on stderr when it is a terminal.

    Raises:
        InputError: a file, text, folder or option cannot be used.
        FormatError: ``src`` is not a sound GGUF file.
        MismatchError: the model keeps no KV rows that could be coded.
        NativeError: llama.cpp could not load or run the model.
    """
    src, dst = Path(src), Path(dst)
    specs = parse_types(types)
    for name, value, least in (("n_tokens", n_tokens, 1), ("n_ctx", n_ctx, 32), ("n_threads", n_threads or 1, 1)):
        if value < least:
            raise InputError(f"{name} is {value}, need at least {least}")
    if src.is_dir():
        raise InputError(f"{src} is a folder: give a GGUF file ('million convert' takes HF checkpoints)")
    if dst.exists() and src.exists() and os.path.samefile(src, dst):
        raise InputError(f"{dst} is the input itself: give another name for the output")
    with container.GGUFHeader(src) as header:
        shape = check_model(header, specs)
        rope_freq_base, digest = shape.rope_freq_base, container.model_digest(header)
    check_output(dst, overwrite=overwrite)
    check_space(dst.parent, src.stat().st_size + codebook_file_bytes(shape, specs))
    calibration_text = load_text(text, n_tokens)

    # Native code and training are loaded only now: a wrong file name should not cost seconds.
    from .capture import MIN_TOKENS, capture

    if n_tokens < MIN_TOKENS:
        raise InputError(f"{n_tokens} calibration tokens are too few: give at least {MIN_TOKENS}")
    with ExitStack() as stack:
        captured = stack.enter_context(
            capture(
                src,
                calibration_text.text,
                shape,
                n_tokens=n_tokens,
                n_ctx=n_ctx,
                seed=seed,
                n_threads=n_threads,
                n_gpu_layers=n_gpu_layers,
                memory_bytes=memory_bytes,
                progress=progress,
            )
        )
        # The text that ships is shorter than the default; who gave neither has nothing to do about it.
        if captured.n_tokens < n_tokens // 2 and (text is not None or n_tokens != DEFAULT_TOKENS):
            note(f"the text has only {captured.n_tokens} of {n_tokens} tokens asked for", enabled=progress)
        trained = _train(captured.rows, shape, specs, seed, n_threads, src, progress)
    codebooks = container.CodebookSet(
        block_count=shape.block_count,
        model_digest=digest,
        rope_freq_base=rope_freq_base,
        calibration=container.Calibration(
            tokens=captured.n_tokens,
            text_digest=calibration_text.digest,
            seed=seed,
            tool=f"million-gguf {__version__}",
        ),
        types=trained,
    )
    with stage("write (MB)", enabled=progress) as bar:
        container.embed(src, dst, codebooks, lambda done, total: bar.set(done / 1e6, total / 1e6))
    layers = [i for i, cb in enumerate(next(iter(trained.values())).k) if cb is not None]
    return Calibrated(
        path=dst,
        n_tokens=captured.n_tokens,
        n_layer=len(layers),
        errors={
            name: (_mean([t.k_error[i] for i in layers]), _mean([t.v_error[i] for i in layers]))
            for name, t in trained.items()
        },
    )


def _train(
    rows: Capture,
    shape: container.ModelShape,
    specs: Sequence[PQSpec],
    seed: int,
    n_threads: int | None,
    src: Path,
    progress: bool,
) -> dict[str, container.TypeCodebooks]:
    """Codebooks of every type for every layer that wrote rows. Only one layer's rows are in Python at a time."""
    from .. import codebook, transform
    from .capture import K, V

    n_layer = shape.block_count
    if rows.n_layer > n_layer:
        raise MismatchError(f"{src}: the model has {n_layer} layers, but layer {rows.n_layer - 1} wrote KV rows")
    books: dict[str, dict[int, list[Codebook | None]]] = {
        s.name: {K: [None] * n_layer, V: [None] * n_layer} for s in specs
    }
    errors: dict[str, dict[int, list[float]]] = {s.name: {K: [0.0] * n_layer, V: [0.0] * n_layer} for s in specs}
    figures: dict[str, dict[int, dict[str, list[list[float]]]]] = {
        s.name: {kind: {f: [[] for _ in range(n_layer)] for f in container.HEAD_FIGURES} for kind in (K, V)}
        for s in specs
    }
    coded = [i for i in range(rows.n_layer) if rows.shape(i, K) is not None and rows.shape(i, V) is not None]
    if not coded:
        raise MismatchError(
            f"{src}: no layer wrote both K and V rows, so there is nothing to calibrate: {_OTHER_TYPES}"
        )
    plain: dict[int, list[int]] = {K: [], V: []}  # layers without a metric
    with stage("train", len(coded) * 2 * len(specs), enabled=progress) as bar, container.GGUFHeader(src) as header:
        for layer in coded:
            for kind, sizes in ((K, shape.D_k), (V, shape.D_v)):
                expected = (shape.n_head_kv[layer], sizes[layer])
                if rows.shape(layer, kind) != expected:
                    side = "K" if kind == K else "V"
                    raise MismatchError(
                        f"{src}: blk.{layer} {side} rows are of shape {rows.shape(layer, kind)}, "
                        f"the metadata says {expected} (heads, head size): {_OTHER_TYPES}"
                    )
                kept = rows.rows(layer, kind)
                metric = _query_metric(rows, shape, layer) if kind == K else _output_metric(header, shape, layer)
                if metric is None:
                    plain[kind].append(layer)
                matches = rows.matches(layer) if kind == K and metric is not None else None
                n_held_back = max(1, kept.shape[0] // _HELD_BACK)
                held_back, sample = kept[-n_held_back:], kept[:-n_held_back]
                basis = transform.fit(sample, metric)
                sample = sample[:: -(-sample.shape[0] // _MAX_TRAINED)]
                for spec in specs:
                    cb, error = codebook.train_side(
                        sample,
                        spec,
                        seed,
                        T=basis.transform(spec),
                        stretch=_STRETCH_K if kind == K else 1.0,
                        n_threads=n_threads or 0,
                    )
                    if matches is not None:
                        assert cb.T is not None and cb.T_inv is not None
                        aniso = transform.anisotropy(matches, cb.T, cb.T_inv, cb.mu)
                        cb = dataclasses.replace(cb, aniso=aniso)
                    books[spec.name][kind][layer], errors[spec.name][kind][layer] = cb, error
                    heads = figures[spec.name][kind]
                    heads["spread"][layer] = basis.spread.tolist()
                    # As many as were held back, so that both figures cost and scatter alike.
                    trained_on = sample[:: max(1, sample.shape[0] // n_held_back)]
                    for figure, some in (("trained", trained_on), ("measured", held_back)):
                        heads[figure][layer] = codebook.head_errors(cb, some, n_threads=n_threads or 0).tolist()
                    bar.advance()
    for kind, what in ((K, "queries were captured"), (V, "output projection was found")):
        if plain[kind]:
            note(
                f"no {what} for {len(plain[kind])} layers (the first is {plain[kind][0]}): "
                f"their {'K' if kind == K else 'V'} codebooks weigh all errors alike, which is a little less accurate",
                enabled=progress,
            )
    return {
        s.name: container.TypeCodebooks(
            k=books[s.name][K],
            v=books[s.name][V],
            k_error=errors[s.name][K],
            v_error=errors[s.name][V],
            k_heads=figures[s.name][K],
            v_heads=figures[s.name][V],
        )
        for s in specs
    }


def _query_metric(rows: Capture, shape: container.ModelShape, layer: int) -> npt.NDArray[np.float64] | None:
    """What errors in K of a layer cost; None when its queries are not rows of the same heads."""
    from .. import transform
    from .capture import Q

    if rows.shape(layer, Q) != (shape.n_head[layer], shape.D_k[layer]):
        return None
    return transform.query_metric(rows.rows(layer, Q), shape.n_head_kv[layer], rows.weights(layer))


def _output_metric(
    header: container.GGUFHeader, shape: container.ModelShape, layer: int
) -> npt.NDArray[np.float64] | None:
    """What errors in V of a layer cost; None when its output projection has another name, shape, or a type that gguf-py
    cannot decode."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    from .. import transform

    n_head, n_head_kv, D = shape.n_head[layer], shape.n_head_kv[layer], shape.D_v[layer]
    tensor = header.tensors.get(f"blk.{layer}.attn_output.weight")
    if tensor is None or tensor.n_bytes is None or len(tensor.dims) != 2 or tensor.dims[0] != n_head * D:
        return None
    raw = np.frombuffer(header.bytes(tensor.offset, tensor.offset + tensor.n_bytes), dtype=np.uint8)
    try:
        weight = dequantize(raw.reshape(tensor.dims[1], -1), GGMLQuantizationType(tensor.type))
    except NotImplementedError:
        return None
    return transform.output_metric(weight, n_head_kv, D)


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else 0.0
