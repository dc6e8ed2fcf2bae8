"""``million eval``: what a cache type costs in quality, against f16."""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .. import __version__, plots, tools
from ..container import GGUFHeader
from ..errors import InputError, NativeError
from ..progress import Stage, note, stage
from .memory import machine, open_model
from .options import (
    DEFAULT_KV_TAIL,
    MODEL_HELP,
    add_compared_types,
    add_runtime,
    at_least,
    compared_types,
    positive_float,
)
from .output import print_table, significant, size, table

TOOL = "llama-perplexity"
_DEFAULT_CTX, _DEFAULT_CHUNKS = 2048, 16
_DEFAULT_DISK_GIB = 4.0
_BASE_HEADER_BYTES = 20  # magic, context, vocabulary, chunks
_MAX_BATCH = 2048  # llama-perplexity holds the logits of a batch in memory
_MIN_TOKENS = 100  # llama-perplexity prints no statistics of fewer
_CTX_PER_TAIL = 8  # from here on, most tokens that a prediction looks at are codes
_STALE_S = 7 * 24 * 3600.0  # an unfinished run that nobody came back to
# llama-perplexity logs through a thread that it doesn't wait for at its end: on a busy machine, with a small model, its
# last lines are sometimes lost.
_ATTEMPTS = 4

_Parsed = TypeVar("_Parsed")

_NUMBER = r"(-?\d+\.\d+|-?nan|-?inf)"
_FINAL = re.compile(rf"Final estimate: PPL = {_NUMBER} \+/- {_NUMBER}")
_CHUNK_OF_BASE = re.compile(r"\[\d+\]-?[\dnai]")
_CHUNK_OF_KL = re.compile(rf"^ *\d+ +{_NUMBER} ± ", re.MULTILINE)
_STATISTICS = {
    "ppl": re.compile(rf"^Mean PPL\(Q\) *: *{_NUMBER} ± *{_NUMBER}", re.MULTILINE),
    "kl_mean": re.compile(rf"^Mean +KLD: *{_NUMBER} ± *{_NUMBER}", re.MULTILINE),
    "kl_median": re.compile(rf"^Median +KLD: *{_NUMBER}", re.MULTILINE),
    "kl_p99": re.compile(rf"^99\.0% +KLD: *{_NUMBER}", re.MULTILINE),
    "kl_p999": re.compile(rf"^99\.9% +KLD: *{_NUMBER}", re.MULTILINE),
    "kl_max": re.compile(rf"^Maximum KLD: *{_NUMBER}", re.MULTILINE),
    "same_top_percent": re.compile(rf"^Same top p: *{_NUMBER} ± *{_NUMBER}", re.MULTILINE),
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "eval",
        help="perplexity and KL divergence of cache types against f16",
        description="Run a text through a model with an f16 cache and with others, and say how far their predictions are "
        "from f16's: perplexity, KL divergence (mean, and what 99% and 99.9% of the tokens stay below), and how often the "
        "most likely token is the same. The numbers are those of llama-perplexity --kl-divergence. An interrupted run goes "
        "on where it stopped when the same command is given again.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL.gguf", help=MODEL_HELP)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text to predict")
    add_compared_types(parser)
    parser.add_argument(
        "-c",
        "--ctx",
        type=at_least(32),
        metavar="N",
        help=f"tokens per chunk; the second half is predicted (default: {_DEFAULT_CTX}, or the model's if smaller)",
    )
    parser.add_argument(
        "--chunks",
        type=at_least(1),
        default=_DEFAULT_CHUNKS,
        metavar="N",
        help="chunks of the text to use, at most (default: %(default)s)",
    )
    parser.add_argument(
        "-ub",
        "--ubatch",
        type=at_least(1),
        metavar="N",
        help="tokens computed at once (default: 128 with a tail, 512 without). A micro-batch attends to itself exactly, so a "
        "large one makes a PQ cache look better than it is while text is generated",
    )
    add_runtime(parser)
    disk = parser.add_argument_group("disk")
    disk.add_argument(
        "--max-disk",
        type=positive_float,
        default=_DEFAULT_DISK_GIB,
        metavar="GIB",
        help="disk for f16's predictions while the run lasts; fewer chunks are used if need be (default: %(default)g)",
    )
    disk.add_argument(
        "--work-dir", type=Path, metavar="DIR", help="where they lie (default: million-gguf in the user's cache folder)"
    )
    output = parser.add_argument_group("output")
    form = output.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of a table")
    form.add_argument("--csv", action="store_true", help="print CSV instead of a table")
    output.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="also draw KL divergence against bits per element"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.plot is not None:
        plots.check(args.plot)
    facts = evaluate(
        args.model,
        args.text,
        types=args.types,
        n_ctx=args.ctx,
        n_chunks=args.chunks,
        kv_tail=args.kv_tail,
        n_ubatch=args.ubatch,
        n_threads=args.threads,
        n_gpu_layers=args.n_gpu_layers,
        max_disk_bytes=int(args.max_disk * (1 << 30)),
        work_dir=args.work_dir,
    )
    if args.plot is not None:
        title = f"{facts['model']}: distance of KV cache types from f16"
        subtitle = f"{_tail_in_words(facts)}; {facts['n_chunks']} chunks of {facts['n_ctx']} tokens of {args.text.name}"
        plots.kl_by_bits(args.plot, title, {"": facts["results"]}, subtitle)
    if args.json:
        print(json.dumps(facts, indent=2))
    elif args.csv:
        _print_csv(facts)
    else:
        _print_table(facts)
    if args.plot is not None:
        note(f"plot: {args.plot}")
    return 0


def evaluate(
    model: Path,
    text: Path,
    *,
    types: Sequence[str] | None = None,
    n_ctx: int | None = None,
    n_chunks: int = _DEFAULT_CHUNKS,
    kv_tail: int = DEFAULT_KV_TAIL,
    n_ubatch: int | None = None,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
    max_disk_bytes: int = int(_DEFAULT_DISK_GIB * (1 << 30)),
    work_dir: Path | None = None,
) -> dict[str, Any]:
    """What ``million eval --json`` prints.

    Args:
        types: cache types such as "pq4" or "pq4/pq2"; f16 is the reference and always among the results.
        n_ctx: tokens per chunk; None for 2048, or less if the model was trained with less.
        n_ubatch: None for 128 with a tail and 512 without.
        work_dir: folder for what an interrupted run leaves; None for the user's cache folder.

    Raises:
        InputError: a file, type or option cannot be used; the text is too short; the disk is too small.
        MismatchError: the model cannot have a cache of one of the types.
        NativeError: llama-perplexity is missing or failed.
    """
    program = tools.find(TOOL)
    digest_of_text, raw = _read_text(text)
    with GGUFHeader(model) as header:
        pairs = compared_types(types, header)
        digest_of_model = _digest(header)
        label = str(header.get("general.name") or model.stem)

    with open_model(model) as opened:
        costs = {name: opened.cache_cost(k, v, kv_tail) for name, (k, v) in pairs.items()}
        n_ctx = n_ctx if n_ctx is not None else min(_DEFAULT_CTX, opened.n_ctx_train)
        n_tokens, n_vocab = opened.count_tokens(raw.removesuffix(b"\n")), opened.n_vocab
    n_chunks = _fit_text(n_chunks, n_ctx, n_tokens, text)
    n_chunks = _fit_disk(n_chunks, n_ctx, n_vocab, max_disk_bytes)
    n_evaluated = n_chunks * _evaluated(n_ctx)
    if n_evaluated < _MIN_TOKENS:
        raise InputError(
            f"{n_chunks} chunks of {n_ctx} tokens give {n_evaluated} predictions, need {_MIN_TOKENS}: use more or longer chunks"
        )
    if n_ctx < _CTX_PER_TAIL * kv_tail and len(pairs) > 1:
        note(
            f"million: with chunks of {n_ctx} tokens, many of those that a prediction looks at are in the exact tail of "
            f"{kv_tail}: a longer --ctx, or --kv-tail 0, shows what the codes cost"
        )
    n_batch = min(n_ctx, _MAX_BATCH)
    n_ubatch = min(n_ubatch if n_ubatch is not None else 128 if kv_tail else 512, n_batch)
    settings = {
        "n_ctx": n_ctx,
        "n_chunks": n_chunks,
        "n_batch": n_batch,
        "n_ubatch": n_ubatch,
        "kv_tail": kv_tail,
        "n_gpu_layers": n_gpu_layers,
    }
    plan = _Plan(program, model, text, settings, n_threads, kv_tail, base_bytes(n_chunks, n_ctx, n_vocab))
    key = _key(digest_of_model, digest_of_text, settings, program)
    with _State.open(work_dir if work_dir is not None else _default_work_dir(), key) as state:
        plan.check_disk(state)
        base = plan.base(state)
        results = []
        for name, (k, v) in pairs.items():
            measured = base if name == "f16" else plan.measure(state, name, k.name, v.name)
            results.append(
                {
                    "type": name,
                    "type_k": k.name,
                    "type_v": v.name,
                    "bits_per_element": costs[name].bits_per_element,
                    "cache_bytes_per_token": costs[name].bytes_per_token,
                    "cache_bytes_fixed": costs[name].bytes_fixed,
                    **measured,
                }
            )
        state.remove()
    return {
        "model": label,
        "file": str(model),
        "model_digest": digest_of_model,
        "text": str(text),
        "text_sha256": digest_of_text,
        "tokens_evaluated": n_evaluated,
        **settings,
        "machine": machine(n_threads),
        "tool": f"million-gguf {__version__}",
        "results": results,
    }


# ---- sizes ----


def _evaluated(n_ctx: int) -> int:
    """Predictions per chunk: llama-perplexity takes those of its second half."""
    return n_ctx - 1 - n_ctx // 2


def base_bytes(n_chunks: int, n_ctx: int, n_vocab: int) -> int:
    """Bytes of llama-perplexity's file of base predictions: a header, the tokens, and 16 bits per prediction and token of
    the vocabulary (tools/perplexity/perplexity.cpp, process_logits)."""
    per_prediction = 2 * (2 * ((n_vocab + 1) // 2) + 4)
    return _BASE_HEADER_BYTES + n_chunks * (4 * n_ctx + _evaluated(n_ctx) * per_prediction)


def _fit_text(n_chunks: int, n_ctx: int, n_tokens: int, text: Path) -> int:
    if n_tokens < 2 * n_ctx:  # llama-perplexity's own limit
        raise InputError(
            f"{text} has {n_tokens} tokens, need {2 * n_ctx} for chunks of {n_ctx}: use a longer text or a smaller --ctx"
        )
    if n_tokens // n_ctx < n_chunks:
        note(f"million: the text has {n_tokens // n_ctx} chunks of {n_ctx} tokens, and not {n_chunks}: using those")
    return min(n_chunks, n_tokens // n_ctx)


def _fit_disk(n_chunks: int, n_ctx: int, n_vocab: int, max_disk_bytes: int) -> int:
    one = base_bytes(1, n_ctx, n_vocab)
    fitting = (max_disk_bytes - _BASE_HEADER_BYTES) // (one - _BASE_HEADER_BYTES)
    if fitting < 1:
        raise InputError(
            f"f16's predictions for one chunk of {n_ctx} tokens take {size(one)}, --max-disk allows {size(max_disk_bytes)}: "
            "raise it, or use a smaller --ctx"
        )
    if fitting < n_chunks:
        note(
            f"million: f16's predictions for {n_chunks} chunks would take {size(base_bytes(n_chunks, n_ctx, n_vocab))}, "
            f"--max-disk allows {size(max_disk_bytes)}: using {fitting} chunks"
        )
    return min(n_chunks, fitting)


# ---- what is evaluated ----


def _read_text(path: Path) -> tuple[str, bytes]:
    """(sha256, bytes) of a text. Raises InputError when it is not one."""
    try:
        raw = path.read_bytes()
        raw.decode("utf-8")
    except OSError as e:
        raise InputError(f"cannot read the text {path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise InputError(f"the text {path} is not UTF-8: byte {e.start}") from None
    if not raw.strip():
        raise InputError(f"the text {path} is empty")
    return hashlib.sha256(raw).hexdigest(), raw


def _digest(header: GGUFHeader) -> str:
    """Names a file without reading all of it: its metadata, codebooks included, its size and its time."""
    h = hashlib.sha256(header.bytes(0, header.data_offset))
    h.update(f"{header.size} {header.path.stat().st_mtime_ns}".encode())
    return h.hexdigest()[:16]


def _key(model: str, text: str, settings: dict[str, Any], program: Path) -> str:
    """Names a run: nothing of it may be taken up with another model, text, setting or build."""
    built = program.stat()
    parts = [__version__, model, text, json.dumps(settings, sort_keys=True), f"{built.st_size} {built.st_mtime_ns}"]
    with contextlib.suppress(NativeError):
        from .. import paths

        parts.append(str(paths.library("llama").stat().st_mtime_ns))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Plan:
    """How llama-perplexity is run."""

    program: Path
    model: Path
    text: Path
    settings: dict[str, Any]
    n_threads: int | None
    kv_tail: int
    base_bytes: int

    def check_disk(self, state: _State) -> None:
        free = shutil.disk_usage(state.folder).free
        if state.base_ppl is None and free < self.base_bytes:
            raise InputError(
                f"f16's predictions take {size(self.base_bytes)} and {state.folder.parent} has {size(free)} free: "
                "use fewer --chunks, a smaller --ctx, or another --work-dir"
            )

    def base(self, state: _State) -> dict[str, Any]:
        """f16's row. Its predictions are in the state's file afterwards."""
        if state.base_ppl is None or not state.base_is_whole(self.base_bytes):
            state.keep_base(self._make_base(state.part))
        assert state.base_ppl is not None
        ppl, error, seconds = state.base_ppl
        nothing = dict.fromkeys(("kl_mean", "kl_mean_error", "kl_median", "kl_p99", "kl_p999", "kl_max"))
        return {
            "ppl": ppl, "ppl_error": error, **nothing,
            "same_top_percent": None, "same_top_percent_error": None, "seconds": round(seconds, 2),
        }  # fmt: skip

    def _make_base(self, path: Path) -> tuple[float, float, float]:
        """Write f16's predictions, and return its perplexity, the error of it, and the seconds that it took."""
        started = time.perf_counter()
        more = ["--kl-divergence-base", str(path)]
        ppl, error = self._run("f16", "f16", "f16", _CHUNK_OF_BASE, more, parse_perplexity)
        if not math.isfinite(ppl):
            raise NativeError(f"the model's perplexity with an f16 cache is {ppl}: there is nothing to compare with")
        written = path.stat().st_size
        if written != self.base_bytes:  # llama-perplexity does not notice a full disk
            raise NativeError(
                f"f16's predictions are {size(written)} of {size(self.base_bytes)}: is the disk of {path.parent} full? "
                "Use fewer --chunks or another --work-dir"
            )
        return ppl, error, time.perf_counter() - started

    def measure(self, state: _State, name: str, type_k: str, type_v: str) -> dict[str, Any]:
        """The row of another type, from the state if it is there."""
        if name not in state.results:
            started = time.perf_counter()
            more = ["--kl-divergence", "--kl-divergence-base", str(state.base)]
            row = self._run(name, type_k, type_v, _CHUNK_OF_KL, more, parse_statistics)
            if not all(math.isfinite(x) for x in row.values()):
                raise NativeError(f"{name}: the model's predictions are not finite with this cache type: {row}")
            state.keep(name, {**row, "seconds": round(time.perf_counter() - started, 2)})
        return state.results[name]

    def _run(
        self,
        name: str,
        type_k: str,
        type_v: str,
        chunk: re.Pattern[str],
        more: list[str],
        parse: Callable[[str], _Parsed],
    ) -> _Parsed:
        """Run llama-perplexity with a bar, and return what ``parse`` finds in all that it printed."""
        s = self.settings
        argv: list[str | os.PathLike[str]] = [
            self.program, "-m", self.model, "-f", self.text, *more,
            "-ctk", type_k, "-ctv", type_v, "-fa", "on", "-fit", "off", "-ngl", str(s["n_gpu_layers"]),
            "-c", str(s["n_ctx"]), "-b", str(s["n_batch"]), "-ub", str(s["n_ubatch"]), "--chunks", str(s["n_chunks"]),
        ]  # fmt: skip
        if self.n_threads is not None:
            argv += ["-t", str(self.n_threads)]
        for attempt in range(_ATTEMPTS):
            started = time.perf_counter()
            with stage(name, s["n_chunks"]) as bar:
                output, log = tools.run(argv, env=tools.environment(self.kv_tail), on_output=_Counter(bar, chunk))
                bar.set(s["n_chunks"])
            try:
                parsed = parse(f"{output}\n{log}")
            except NativeError:
                if attempt + 1 == _ATTEMPTS:
                    raise
                note(f"million: {name}: the last lines of {TOOL}'s output were lost, running it again")
                continue
            if not sys.stderr.isatty():
                note(f"million: {name}: {s['n_chunks']} chunks in {time.perf_counter() - started:.0f} s")
            return parsed
        raise AssertionError("the loop returns or raises")


class _Counter:
    """Moves a bar by the chunks that have been printed."""

    def __init__(self, bar: Stage, chunk: re.Pattern[str]) -> None:
        self._bar, self._chunk, self._shown = bar, chunk, ""

    def __call__(self, piece: str) -> None:
        self._shown += piece
        self._bar.set(len(self._chunk.findall(self._shown)))


def parse_perplexity(output: str) -> tuple[float, float]:
    """Perplexity and its error in what ``llama-perplexity`` prints. Raises NativeError when they are missing."""
    found = _FINAL.search(output)
    if found is None:
        raise NativeError(f"{TOOL} printed no final estimate: {_tail(output)}")
    return float(found.group(1)), float(found.group(2))


def parse_statistics(output: str) -> dict[str, float]:
    """The row of one type in what ``llama-perplexity --kl-divergence`` prints; "x_error" is what follows a ±.

    Raises NativeError when something is missing.
    """
    row: dict[str, float] = {}
    for name, pattern in _STATISTICS.items():
        found = pattern.search(output)
        if found is None:
            raise NativeError(f"{TOOL} printed no {name}: {_tail(output)}")
        values = [float(x) for x in found.groups()]
        row[name] = values[0]
        if len(values) > 1:
            row[f"{name}_error"] = values[1]
    return row


def _tail(text: str) -> str:
    return " ".join(text.split())[-300:]


# ---- what an interrupted run leaves ----


def _default_work_dir() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "million-gguf" / "eval"


class _State:
    """A folder with f16's predictions and the rows that are done; gone when the run is finished.

    Attributes:
        base_ppl: f16's perplexity, its error and the seconds it took, once its predictions are whole.
        results: rows by type.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = folder / "base.kld"
        self.part = folder / "base.kld.part"
        self.base_ppl: tuple[float, float, float] | None = None
        self.results: dict[str, dict[str, Any]] = {}

    @classmethod
    @contextlib.contextmanager
    def open(cls, work_dir: Path, key: str) -> Iterator[_State]:
        """The state of one run, for this process alone. Whatever ends the block, no half-written file stays."""
        _remove_stale(work_dir)
        with _locked(work_dir / key) as folder:
            state = cls(folder)
            state._load()
            try:
                yield state
            finally:
                state.part.unlink(missing_ok=True)
                if state.base_ppl is None:
                    state.remove()
                elif folder.exists():
                    done = ", ".join(["f16", *state.results])
                    note(
                        f"million: kept {done} and f16's predictions ({size(state.base.stat().st_size)}) in {folder}: the same "
                        "command goes on from there"
                    )

    def _load(self) -> None:
        try:
            found = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
            ppl, error, seconds = found["base_ppl"]
            self.base_ppl, self.results = (ppl, error, seconds), dict(found["results"])
        except (OSError, ValueError, KeyError, TypeError):
            return  # none yet
        if self.base.is_file():
            note(f"million: going on with an interrupted run (done: {', '.join(['f16', *self.results])})")

    def _save(self) -> None:
        part = self.folder / "state.json.part"
        part.write_text(json.dumps({"base_ppl": self.base_ppl, "results": self.results}), encoding="utf-8")
        os.replace(part, self.folder / "state.json")

    def base_is_whole(self, n_bytes: int) -> bool:
        return self.base.is_file() and self.base.stat().st_size == n_bytes

    def keep_base(self, base_ppl: tuple[float, float, float]) -> None:
        os.replace(self.part, self.base)
        self.base_ppl = base_ppl
        self._save()

    def keep(self, name: str, row: dict[str, Any]) -> None:
        self.results[name] = row
        self._save()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """A folder that no other process uses meanwhile. Raises InputError when one does."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(
                    f"another 'million eval' of the same model, text and settings is running (it uses {folder}): wait for it"
                ) from None
            # Another process may have finished and removed the folder between the two lines above.
            if not (folder / "lock").exists() or not os.path.samestat(
                os.fstat(lock.fileno()), os.stat(folder / "lock")
            ):
                continue
            yield folder
            return


def _remove_stale(work_dir: Path) -> None:
    """Remove unfinished runs that are old, so that they do not fill the disk."""
    if not work_dir.is_dir():
        return
    for folder in work_dir.iterdir():
        state = folder / "state.json"
        try:
            if state.is_file() and time.time() - state.stat().st_mtime > _STALE_S:
                with _locked(folder):
                    shutil.rmtree(folder, ignore_errors=True)
                note(f"million: removed an unfinished run of {_STALE_S / 86400:.0f} days ago or more: {folder}")
        except (OSError, InputError):
            continue  # in use, or gone


# ---- output ----


def _print_csv(facts: dict[str, Any]) -> None:
    rows = facts["results"]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def _tail_in_words(facts: dict[str, Any]) -> str:
    return f"exact tail {facts['kv_tail']}" if facts["kv_tail"] else "no exact tail"


def _print_table(facts: dict[str, Any]) -> None:
    print(f"model  {facts['model']}, {facts['file']}")
    print(
        f"text   {facts['text']}: {facts['n_chunks']} chunks of {facts['n_ctx']}, {facts['tokens_evaluated']} predictions"
    )
    print(f"run    {_tail_in_words(facts)}, micro-batch {facts['n_ubatch']}; {facts['machine']}\n", flush=True)
    made = table(
        "KL divergence from f16, in nats per token",
        ("cache", "bits", "B/token", "PPL", "KL", "KL 99%", "KL 99.9%", "same top"),
    )
    for row in facts["results"]:
        base = row["kl_mean"] is None
        made.add_row(
            row["type"],
            f"{row['bits_per_element']:g}",
            f"{row['cache_bytes_per_token']:.10g}",
            f"{row['ppl']:.4f}",
            "base" if base else f"{row['kl_mean']:.6f}",
            "" if base else significant(row["kl_p99"]),
            "" if base else significant(row["kl_p999"]),
            "" if base else f"{row['same_top_percent']:.2f}%",
        )
    print_table(made)
