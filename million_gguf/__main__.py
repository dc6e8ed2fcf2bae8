"""``python -m million_gguf`` is the ``million`` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
