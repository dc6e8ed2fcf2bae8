"""The product-quantized cache types.

Mirrors ``pq_spec`` in ``cuda/pq/pq-layout.h``; ``tests/test_spec.py`` compares the two.

Names are those of ``faiss::ProductQuantizer``: a head vector of ``D`` elements is cut into ``M`` subspaces of ``dsub``
elements, and each subspace is stored as a code of ``nbits`` bits that names one of ``ksub = 2**nbits`` centroids.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InputError, MismatchError

MAX_D = 256  # largest head size that the kernels take (PQ_MAX_D)
D_STEP = 8  # every head size is a multiple: whole blocks of every type


@dataclass(frozen=True)
class PQSpec:
    """One cache type.

    Attributes:
        name: what the user writes, ``pq4``, ``pq3`` or ``pq2`` (the digit is bits per element).
        dsub: elements per subspace.
        nbits: bits per code.
        ksub: centroids per subspace, ``1 << nbits``.
        block_elems: elements of the smallest byte-aligned group of codes (the ggml block size).
        block_bytes: bytes of that group (the ggml type size).
        ggml_type: number of the type in the patched ``enum ggml_type``.
        index: number of the type in ``enum pq_type``.
    """

    name: str
    dsub: int
    nbits: int
    ksub: int
    block_elems: int
    block_bytes: int
    ggml_type: int
    index: int

    @property
    def bits_per_element(self) -> float:
        """Cache bits per element of K or V."""
        return self.nbits / self.dsub

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

    def head_bytes(self, D: int) -> int:
        """Bytes of the codes of one head of one token. Raises MismatchError as ``check_head_size`` does."""
        self.check_head_size(D)
        return D // self.block_elems * self.block_bytes


PQ_TYPES: dict[str, PQSpec] = {
    s.name: s
    for s in (
        PQSpec("pq4", dsub=2, nbits=8, ksub=256, block_elems=2, block_bytes=1, ggml_type=43, index=0),
        PQSpec("pq3", dsub=2, nbits=6, ksub=64, block_elems=8, block_bytes=3, ggml_type=44, index=1),
        PQSpec("pq2", dsub=4, nbits=8, ksub=256, block_elems=4, block_bytes=1, ggml_type=45, index=2),
    )
}


def get_spec(name: str) -> PQSpec:
    """The spec called ``name``. Raises InputError, which lists the names there are."""
    try:
        return PQ_TYPES[name]
    except KeyError:
        raise InputError(f"found cache type {name!r}, need one of {', '.join(PQ_TYPES)}") from None
