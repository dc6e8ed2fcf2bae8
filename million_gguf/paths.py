"""Where the installed parts of the package lie: native libraries, llama.cpp's programs, vendored Python, packaged data.

In a wheel they are folders of the package. In an editable install the Python sources stay in the checkout while the
build puts ``lib/``, ``bin/`` and ``_vendor/`` into site-packages, so both places are searched. ``MILLION_LIB_DIR`` names a folder
of libraries that goes before either; a ``_vendor`` folder beside it does too.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from .errors import InputError, NativeError

LIB_DIR_VARIABLE = "MILLION_LIB_DIR"
_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parent
_REBUILD = "install the package again ('pip install .' in a checkout builds them)"


def _roots() -> Iterator[Path]:
    """Folders that may hold ``lib/``, ``bin/`` and ``_vendor/``, best first."""
    chosen = os.environ.get(LIB_DIR_VARIABLE)
    if chosen:
        yield Path(os.path.abspath(chosen)).parent
    yield _PACKAGE
    yield Path(sysconfig.get_path("platlib")) / "million_gguf"


def library_file_name(name: str) -> str:
    """File name of the shared library ``name`` ("llama", "million-pq") on this platform."""
    if sys.platform == "win32":
        return f"{name}.dll"
    return f"lib{name}.dylib" if sys.platform == "darwin" else f"lib{name}.so"


def lib_dir() -> Path:
    """The folder of our native libraries. Raises NativeError when they are not installed."""
    chosen = os.environ.get(LIB_DIR_VARIABLE)
    if chosen:
        folder = Path(os.path.abspath(chosen))
        if not (folder / library_file_name("llama")).is_file():
            raise NativeError(
                f"{LIB_DIR_VARIABLE} is {chosen}, which has no {library_file_name('llama')}: "
                "point it at the folder of the built libraries or unset it"
            )
        return folder
    tried = [root / "lib" for root in _roots()]
    for folder in tried:
        if (folder / library_file_name("llama")).is_file():
            return folder
    raise NativeError(f"the native libraries are missing (looked in {', '.join(map(str, tried))}): {_REBUILD}")


def library(name: str) -> Path:
    """Path of one native library, such as ``library("million-pq")``. Raises NativeError when it is not installed."""
    path = lib_dir() / library_file_name(name)
    if not path.is_file():
        raise NativeError(f"{path.name} is missing from {path.parent}: {_REBUILD}")
    return path


def bin_dirs() -> list[Path]:
    """Folders that may hold the programs of llama.cpp that ship with the package, best first."""
    return [root / "bin" for root in _roots()]


def vendor_dir(name: str = "") -> Path:
    """``_vendor`` or a folder in it: "llama_cpp" (llama-cpp-python's Python part) or "convert" (llama.cpp's converter).

    Raises NativeError when it is not installed.
    """
    tried = [root / "_vendor" / name for root in _roots()]
    for folder in tried:
        if folder.is_dir():
            return folder
    raise NativeError(
        f"the vendored {name or 'Python sources'} are missing (looked in {', '.join(map(str, tried))}): {_REBUILD}"
    )


def converters_data(name: str) -> Path:
    """A data file of the converters, such as the default calibration text. Raises NativeError when it is missing."""
    tried = [folder / "converters" / "data" / name for folder in (_PACKAGE, _CHECKOUT)]
    for path in tried:
        if path.is_file():
            return path
    raise NativeError(f"the packaged file {name} is missing (looked for {', '.join(map(str, tried))}): {_REBUILD}")


def demo_model() -> Path:
    """The HF checkpoint that ships with the repository. Raises InputError outside a checkout."""
    folder = _CHECKOUT / "examples" / "demo-model"
    if not (folder / "config.json").is_file():
        raise InputError(f"the demo model is not at {folder}: run from a checkout, or give a model with --model")
    return folder


def synthetic_model_program() -> Path:
    """The program that makes models of random weights. Raises InputError outside a checkout."""
    program = _CHECKOUT / "benchmarks" / "gpu" / "synthetic_gguf.py"
    if not program.is_file():
        raise InputError(f"synthetic models are made by {program}, which is not there: run from a checkout")
    return program
