"""The cache types, and that Python and ``cuda/pq/pq-layout.h`` state the same numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from million_gguf.errors import InputError, MismatchError
from million_gguf.spec import PQ_TYPES, get_spec

HEADER = Path(__file__).parent.parent / "cuda" / "pq" / "pq-layout.h"


@pytest.mark.parametrize("name", PQ_TYPES)
def test_numbers_agree_with_each_other(name: str) -> None:
    s = PQ_TYPES[name]
    assert s.name == name
    assert s.ksub == 1 << s.nbits
    assert s.block_elems % s.dsub == 0
    assert s.block_bytes * 8 == s.block_elems // s.dsub * s.nbits
    assert s.bits_per_element == {"pq4": 4.0, "pq3": 3.0, "pq2": 2.0}[name]


def test_c_header_states_the_same() -> None:
    text = HEADER.read_text()
    for s in PQ_TYPES.values():
        row = re.search(rf"case PQ_TYPE_{s.name.upper()}:.*?= \{{([^}}]*)\}}", text)
        assert row is not None
        numbers = [int(x) for x in row.group(1).split(",")]
        assert numbers == [s.dsub, s.nbits, s.ksub, s.block_elems, s.block_bytes]
        assert re.search(rf"PQ_TYPE_{s.name.upper()} = {s.index},", text)


def test_ggml_types_are_distinct_and_in_order() -> None:
    assert [s.ggml_type for s in PQ_TYPES.values()] == [43, 44, 45]
    assert [s.index for s in PQ_TYPES.values()] == [0, 1, 2]


@pytest.mark.parametrize(("name", "M", "head_bytes"), [("pq4", 64, 64), ("pq3", 64, 48), ("pq2", 32, 32)])
def test_head_of_128(name: str, M: int, head_bytes: int) -> None:
    assert PQ_TYPES[name].n_subspaces(128) == M
    assert PQ_TYPES[name].head_bytes(128) == head_bytes


@pytest.mark.parametrize("name", PQ_TYPES)
@pytest.mark.parametrize("D", [-8, 0, 4, 12, 63, 100, 264, 512])
def test_refuses_other_head_sizes(name: str, D: int) -> None:
    for f in (PQ_TYPES[name].check_head_size, PQ_TYPES[name].n_subspaces, PQ_TYPES[name].head_bytes):
        with pytest.raises(MismatchError, match=f"{name}: found head size {D}, need a multiple of 8"):
            f(D)


@pytest.mark.parametrize("D", range(8, 257, 8))
def test_every_supported_head_size_is_whole_bytes(D: int) -> None:
    for s in PQ_TYPES.values():
        assert s.head_bytes(D) * 8 == s.n_subspaces(D) * s.nbits


def test_unknown_type_lists_the_known() -> None:
    assert get_spec("pq3").name == "pq3"
    with pytest.raises(InputError, match="'q4_0', need one of pq4, pq3, pq2"):
        get_spec("q4_0")
