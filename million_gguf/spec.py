"""The product-quantized cache types.

Mirrors ``pq_spec`` in ``cuda/pq/pq-layout.h``; ``tests/test_spec.py`` compares the two.

Names are those of ``faiss::ProductQuantizer``: a head vector of ``D`` elements is cut into ``M`` subspaces of ``dsub``
elements, and each subspace is stored as a code, one byte, that names one of ``ksub`` = 256 centroids. In ``pq3`` the last two of
every four subspaces share a code.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import InputError, MismatchError

MAX_D = 256  # largest head size that the kernels take (PQ_MAX_D)
KSUB = 256  # centroids per subspace (PQ_KSUB)
D_STEP = 8  # every head size is a multiple: whole blocks of every type


@dataclass(frozen=True)
class PQSpec:
    """One cache type.

    Attributes:
        name: what the user writes, ``pq4``, ``pq3`` or ``pq2`` (the digit is bits per element).
        dsub: elements per subspace.
        block_elems: elements of the smallest group that has whole codes (the ggml block size).
        block_bytes: codes of that group, a byte each (the ggml type size).
        ggml_type: number of the type in the patched ``enum ggml_type``.
        index: number of the type in ``enum pq_type``.
    """

    name: str
    dsub: int
    block_elems: int
    block_bytes: int
    ggml_type: int
    index: int

    @property
    def bits_per_element(self) -> float:
        """Cache bits per element of K or V."""
        return 8 * self.block_bytes / self.block_elems

    @property
    def ksub(self) -> int:
        """Centroids per subspace."""
        return KSUB

    def check_head_size(self, D: int) -> None:
        """Raises MismatchError unless the kernels take head size ``D``: a multiple of 8 from 8 to 256."""
        if not (D_STEP <= D <= MAX_D) or D % D_STEP != 0:
            raise MismatchError(
                f"{self.name}: found head size {D}, need a multiple of {D_STEP} between {D_STEP} and {MAX_D}: "
                "use cache type f16 or q8_0 for this model"
            )

    def n_subspaces(self, D: int) -> int:
        """``M`` for head size ``D``. Raises MismatchError when ``D`` is not a head size that the kernels take."""
        self.check_head_size(D)
        return D // self.dsub

    def code_of_subspace(self, D: int) -> npt.NDArray[np.intp]:
        """Which byte of a head is the code of each subspace, ``[M]``. Raises MismatchError as ``check_head_size`` does."""
        m = np.arange(self.n_subspaces(D))
        if self.name != "pq3":
            return m
        return np.where(m % 4 < 2, m // 4 * 2 + m % 4, D // 4 + m // 4)  # codes of two subspaces come last

    def elements_of_codes(self, D: int) -> list[npt.NDArray[np.intp]]:
        """The elements of y that each code stands for: ``[codes, dims]`` for each number of dims that a code may have.

        Raises MismatchError as ``check_head_size`` does."""
        code_of_element = np.repeat(self.code_of_subspace(D), self.dsub)
        dims = np.bincount(code_of_element)
        return [np.flatnonzero(dims[code_of_element] == n).reshape(-1, n) for n in np.unique(dims)]

    def head_bytes(self, D: int) -> int:
        """Codes of one head of one token, a byte each. Raises MismatchError as ``check_head_size`` does."""
        self.check_head_size(D)
        return D // self.block_elems * self.block_bytes


PQ_TYPES: dict[str, PQSpec] = {
    s.name: s
    for s in (
        PQSpec("pq4", dsub=2, block_elems=2, block_bytes=1, ggml_type=43, index=0),
        PQSpec("pq3", dsub=2, block_elems=8, block_bytes=3, ggml_type=44, index=1),
        PQSpec("pq2", dsub=4, block_elems=4, block_bytes=1, ggml_type=45, index=2),
    )
}


def get_spec(name: str) -> PQSpec:
    """The spec called ``name``. Raises InputError, which lists the names there are."""
    try:
        return PQ_TYPES[name]
    except KeyError:
        raise InputError(f"found cache type {name!r}, need one of {', '.join(PQ_TYPES)}") from None
