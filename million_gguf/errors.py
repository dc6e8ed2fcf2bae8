"""Errors that this package raises for faults of its input. Each message says what was found, needed, and what to do."""


class MillionError(Exception):
    """Base class. The command line turns it into one line on stderr and exit code 2."""


class FormatError(MillionError):
    """A GGUF file or its ``million.*`` metadata is malformed, truncated, or of another version."""


class MismatchError(MillionError):
    """Codebooks do not fit the model, the head size, or the cache type that was asked for."""


class NativeError(MillionError):
    """llama.cpp failed; the message carries the reason that it logged."""


class InputError(MillionError):
    """A file, text or option given by the user cannot be used."""
