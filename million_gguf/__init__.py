"""Product-quantized KV cache for llama.cpp: convert or calibrate a GGUF model, then run it with ``kv_cache="pq4"``.

    from million_gguf import Llama
    llm = Llama("model.gguf", n_ctx=32768, kv_cache="pq4")

Importing this package loads no native code; the first use of ``Llama`` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import FormatError, InputError, MillionError, MismatchError, NativeError

if TYPE_CHECKING:
    from .bindings.llama import Llama as Llama
    from .converters.gguf import calibrate as calibrate
    from .converters.hf import convert as convert

__version__ = "0.1.0"
__all__ = [
    "FormatError",
    "InputError",
    "Llama",
    "MillionError",
    "MismatchError",
    "NativeError",
    "__version__",
    "calibrate",
    "convert",
]

# In a checkout, bindings/ and converters/ lie beside this folder and not in it: Python started there still finds them.
if not (Path(__file__).parent / "bindings").exists():
    _root = Path(__file__).resolve().parent.parent
    if (_root / "bindings" / "llama.py").is_file():
        __path__.append(str(_root))

_LAZY = {
    "Llama": ("bindings.llama", "Llama"),
    "calibrate": ("converters.gguf", "calibrate"),
    "convert": ("converters.hf", "convert"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module, attribute = _LAZY[name]
    value = getattr(importlib.import_module(f".{module}", __name__), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
