"""``convert``: an HF checkpoint in, a GGUF file with codebooks out.

The conversion itself is llama.cpp's own ``convert_hf_to_gguf.py``, out of the same source that our libraries are built
from, run as a program: it knows every architecture that those libraries run, and nothing of it is ours to keep in step.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import paths
from ..errors import InputError, MillionError, MismatchError
from ..progress import Stage, stage
from .gguf import (
    NO_ROWS_MLA,
    NO_ROWS_RECURRENT,
    RECURRENT,
    Calibrated,
    calibrate,
    check_output,
    check_space,
    parse_types,
)

OUTTYPES = ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0", "auto")
_BYTES_PER_WEIGHT = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 1.0625, "tq1_0": 0.25, "tq2_0": 0.3, "auto": 2.0}
_MODULES = ("torch", "transformers", "sentencepiece", "safetensors", "yaml", "tqdm")  # yaml comes as pyyaml
_INSTALL = "pip install million-gguf[convert]"

# Options that would make something other than one complete model file.
_REFUSED = {
    "--outfile", "--outtype", "--split-max-tensors", "--split-max-size", "--dry-run", "--vocab-only", "--mmproj",
    "--mtp", "--dspark", "--bigendian", "--print-supported-models", "--remote", "-h", "--help",
}  # fmt: skip


def check_checkpoint(folder: Path) -> int:
    """Bytes of the weight files of an HF checkpoint. Raises InputError unless ``folder`` looks like one."""
    if not folder.exists():
        raise InputError(f"no such folder: {folder}")
    if not folder.is_dir():
        raise InputError(
            f"{folder} is a file: give the folder of an HF checkpoint ('million calibrate' takes GGUF files)"
        )
    if not (folder / "config.json").is_file() and not (folder / "params.json").is_file():
        raise InputError(f"{folder} has no config.json: give the folder of an HF checkpoint")
    weights = [
        p for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth") for p in folder.glob(pattern) if p.is_file()
    ]
    if not weights:
        raise InputError(f"{folder} has no weights (*.safetensors or *.bin): download the checkpoint completely")
    return sum(p.stat().st_size for p in weights)


def _check_modules() -> None:
    missing = [name for name in _MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"converting needs {', '.join(missing)}: install what is missing with '{_INSTALL}'")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror or e}") from e
    except ValueError as e:
        raise InputError(f"{path} is not JSON ({e}): download the checkpoint again") from None
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a JSON object: download the checkpoint again")
    return config


def _check_kind(source: Path, config: dict[str, Any]) -> None:
    """Refuse, before the long conversion, what ``calibrate`` would refuse after it."""
    kind = str(config.get("model_type", ""))
    if kind.startswith(RECURRENT):
        raise MismatchError(f"{source} ({kind}): {NO_ROWS_RECURRENT}")
    if config.get("kv_lora_rank"):
        raise MismatchError(f"{source} ({kind}): {NO_ROWS_MLA}")


def convert(
    hf_dir: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    outtype: str = "f16",
    *,
    converter_args: Sequence[str] = (),
    verbose: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **calibrate_args: Any,
) -> Calibrated:
    """Convert the HF checkpoint in ``hf_dir`` to GGUF, calibrate it, and write the result to ``dst``.

    Args:
        outtype: weight type, one of OUTTYPES.
        converter_args: further options for llama.cpp's converter, as ``["--no-lazy"]``.
        verbose: let the converter write to stderr as it works.
        calibrate_args: what ``million_gguf.calibrate`` takes (``types``, ``text``, ``n_tokens``, ...).

    Raises:
        InputError: the folder is not a checkpoint that the converter knows, a module that it needs is missing, or an
            option or the output cannot be used.
        Otherwise as ``calibrate``.
    """
    source, target = Path(hf_dir), Path(dst)
    if outtype not in OUTTYPES:
        raise InputError(f"unknown outtype {outtype!r}: known are {', '.join(OUTTYPES)}")
    refused = [a for a in converter_args if a.split("=")[0] in _REFUSED]
    if refused:
        raise InputError(
            f"the converter option {refused[0]} cannot be passed on: it would not make one complete model file"
        )
    parse_types(calibrate_args.get("types", "pq4"))
    weights = check_checkpoint(source)
    check_output(target, overwrite=overwrite)
    config = _read_config(source)
    _check_kind(source, config)
    bytes_per_weight = 4.0 if "float32" in (config.get("torch_dtype"), config.get("dtype")) else 2.0
    size = int(weights / bytes_per_weight * _BYTES_PER_WEIGHT[outtype])
    check_space(target.parent, 2 * size)  # the converted file, and its copy with codebooks
    _check_modules()

    folder = target.parent / f".{target.name}.{secrets.token_hex(6)}.tmp"
    with _removed(folder):
        folder.mkdir()
        plain = folder / "model.gguf"
        _run_converter(source, plain, outtype, converter_args, verbose, progress)
        try:
            return calibrate(plain, target, overwrite=overwrite, progress=progress, **calibrate_args)
        except MillionError as e:  # the user knows nothing of the file between
            raise type(e)(str(e).replace(str(plain), str(source))) from e


@contextmanager
def _removed(folder: Path) -> Iterator[None]:
    """Remove ``folder`` when the block ends, however it ends."""
    try:
        yield
    except OSError as e:
        raise InputError(f"cannot write to {folder.parent}: {e.strerror or e}") from e
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_converter(source: Path, out: Path, outtype: str, extra: Sequence[str], verbose: bool, progress: bool) -> None:
    script = paths.vendor_dir("convert") / "convert_hf_to_gguf.py"
    # With NO_LOCAL_GGUF set it would take another gguf-py than its own.
    env = {k: v for k, v in os.environ.items() if k != "NO_LOCAL_GGUF"}
    env["PYTHONUNBUFFERED"] = "1"
    command = [sys.executable, str(script), str(source.resolve()), "--outfile", str(out), "--outtype", outtype, *extra]
    with stage("convert", 100, enabled=progress and not verbose) as bar:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            encoding="utf-8", errors="replace",
        )  # fmt: skip
        lines: list[str] = []
        # A thread reads, so that Ctrl-C is noticed at once and not at the converter's next line.
        reader = threading.Thread(target=_follow, args=(process, lines, bar, verbose), daemon=True)
        reader.start()
        try:
            status = process.wait()
        except BaseException:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise
        finally:
            reader.join(5)
    if status != 0:
        raise _failure(source, status, lines)
    if not out.is_file():
        raise InputError(f"llama.cpp's converter wrote no file for {source}: see why with --verbose")


def _follow(process: subprocess.Popen[str], lines: list[str], bar: Stage, verbose: bool) -> None:
    assert process.stdout is not None
    for line in process.stdout:  # universal newlines: each step of a \r progress bar is a line
        percent = re.match(r"Writing:\s+(\d+)%", line)
        if percent:
            bar.set(int(percent[1]), 100)
            continue
        if line.strip():
            lines.append(line.rstrip())
            del lines[:-400]
        if verbose:
            print(line, end="", file=sys.stderr, flush=True)


def _failure(source: Path, status: int, lines: Sequence[str]) -> MillionError:
    """What went wrong, out of the converter's last lines: its error messages, else the end of its traceback."""
    module = next(
        (m[1] for line in lines if (m := re.search(r"(?:ModuleNotFound|Import)Error: .*'([\w.]+)'", line))), None
    )
    if module is not None:
        return InputError(f"the converter needs the Python module {module}: '{_INSTALL}', or install {module} itself")
    if any("No space left on device" in line for line in lines):
        return InputError("no space left on the disk while converting: free some, or write to another disk")
    told = [line.split(":", 2)[-1].strip() for line in lines if line.startswith("ERROR:")]
    end = [lines[-1].strip()] if lines else [f"exit status {status}"]
    reason = "; ".join(dict.fromkeys((told or end)[-3:]))
    return InputError(f"llama.cpp's converter cannot convert {source}: {reason} (all of its output: --verbose)")
