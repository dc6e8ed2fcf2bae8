"""Imports ``llama_cpp`` on our libraries, once, and checks that they are ours.

``llama_cpp`` binds to one libllama when it is first imported. We point it at ours through LLAMA_CPP_LIB_PATH, take an
installed llama-cpp-python of exactly the version that our libraries were built from (its ctypes structs mirror that
version's headers), and otherwise the copy of its Python part that ships with this package.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from types import ModuleType

from .. import paths
from ..errors import NativeError

LLAMA_CPP_VERSION = "0.3.36"
_TELL_TALE = "million_capture_init"  # exported by our libllama and by no other


def _installed_version() -> str | None:
    try:
        if importlib.util.find_spec("llama_cpp") is None:
            return None
        return importlib.metadata.version("llama-cpp-python")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None


def _check(module: ModuleType) -> None:
    low_level = sys.modules.get("llama_cpp.llama_cpp")
    library = getattr(low_level, "_lib", None)
    version = getattr(module, "__version__", "of unknown version")
    if version != LLAMA_CPP_VERSION:
        raise NativeError(
            f"llama_cpp {version} is already imported and this package needs {LLAMA_CPP_VERSION}: "
            "import million_gguf.Llama before llama_cpp"
        )
    if not hasattr(library, _TELL_TALE):
        raise NativeError(
            f"llama_cpp is bound to {getattr(library, '_name', 'another library')}, which has no PQ cache: "
            "import million_gguf.Llama before llama_cpp, and check MILLION_LIB_DIR and LLAMA_CPP_LIB_PATH"
        )


def load() -> ModuleType:
    """The ``llama_cpp`` package, bound to our libraries. Raises NativeError when that cannot be had."""
    already = sys.modules.get("llama_cpp")
    if already is not None:
        _check(already)
        return already
    folder = str(paths.lib_dir())
    os.environ["LLAMA_CPP_LIB_PATH"] = folder  # and it stays: llama_cpp.mtmd_cpp reads it when it is first needed
    vendored = None if _installed_version() == LLAMA_CPP_VERSION else str(paths.vendor_dir("llama_cpp").parent)
    try:
        if vendored is not None:
            sys.path.insert(0, vendored)
        module = importlib.import_module("llama_cpp")
    except (OSError, RuntimeError, ImportError) as e:
        for name in [n for n in sys.modules if n == "llama_cpp" or n.startswith("llama_cpp.")]:
            del sys.modules[name]
        raise NativeError(f"cannot load llama.cpp from {folder}: {e}") from e
    finally:
        if vendored is not None and vendored in sys.path:
            sys.path.remove(vendored)
    _check(module)
    return module
