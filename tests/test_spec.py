"""The cache types, and that Python and ``cuda/pq/pq-layout.h`` state the same numbers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from million_gguf.errors import InputError, MismatchError
from million_gguf.pq_ref import ANISO_STRIP, ANISO_WEIGHT
from million_gguf.spec import KSUB, PQ_TYPES, get_spec

HEADER = Path(__file__).parent.parent / "cuda" / "pq" / "pq-layout.h"


@pytest.mark.parametrize("name", PQ_TYPES)
def test_numbers_agree_with_each_other(name: str) -> None:
    s = PQ_TYPES[name]
    assert s.name == name
    assert s.ksub == KSUB == 1 << 8
    assert s.block_elems % s.dsub == 0
    assert s.bits_per_element == {"pq4": 4.0, "pq3": 3.0, "pq2": 2.0}[name]


def test_c_header_states_the_same() -> None:
    text = HEADER.read_text()
    for s in PQ_TYPES.values():
        row = re.search(rf"case PQ_TYPE_{s.name.upper()}:.*?= \{{([^}}]*)\}}", text)
        assert row is not None
        numbers = [int(x) for x in row.group(1).split(",")]
        assert numbers == [s.dsub, s.block_elems, s.block_bytes]
        assert re.search(rf"PQ_TYPE_{s.name.upper()} = {s.index},", text)
    assert re.search(rf"#define PQ_KSUB +{KSUB}\b", text)
    assert re.search(rf"#define PQ_ANISO_STRIP +{ANISO_STRIP}\b", text)
    assert re.search(rf"#define PQ_ANISO_WEIGHT +{ANISO_WEIGHT}f\b", text)
    assert re.search(rf"#define PQ_ANISO_STEP +{ANISO_WEIGHT / (1 + ANISO_WEIGHT)}f\b", text)


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
    s = PQ_TYPES[name]
    for f in (s.check_head_size, s.n_subspaces, s.head_bytes, s.code_of_subspace, s.elements_of_codes):
        with pytest.raises(MismatchError, match=f"{name}: found head size {D}, need a multiple of 8"):
            f(D)


@pytest.mark.parametrize("D", range(8, 257, 8))
def test_every_subspace_has_a_code_and_every_code_a_subspace(D: int) -> None:
    for s in PQ_TYPES.values():
        code = s.code_of_subspace(D)
        assert len(code) == s.n_subspaces(D)
        assert sorted(set(code)) == list(range(s.head_bytes(D)))
        assert s.head_bytes(D) * 8 == s.bits_per_element * D


def test_of_four_subspaces_of_pq3_the_last_two_share_a_code() -> None:
    assert PQ_TYPES["pq3"].code_of_subspace(16).tolist() == [0, 1, 4, 4, 2, 3, 5, 5]
    assert PQ_TYPES["pq4"].code_of_subspace(8).tolist() == PQ_TYPES["pq2"].code_of_subspace(16).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", PQ_TYPES)
@pytest.mark.parametrize("D", [8, 24, 128])
def test_elements_of_codes_are_those_of_their_subspaces(name: str, D: int) -> None:
    s = PQ_TYPES[name]
    code_of_element = np.repeat(s.code_of_subspace(D), s.dsub)
    found = {}
    for elements in s.elements_of_codes(D):
        for group in elements.tolist():
            found[code_of_element[group[0]]] = group
    assert [found[c] for c in range(s.head_bytes(D))] == [
        [i for i in range(D) if code_of_element[i] == c] for c in range(s.head_bytes(D))
    ]
    assert [e.shape[1] for e in s.elements_of_codes(D)] == {"pq4": [2], "pq3": [2, 4], "pq2": [4]}[name]


def test_unknown_type_lists_the_known() -> None:
    assert get_spec("pq3").name == "pq3"
    with pytest.raises(InputError, match="'q4_0', need one of pq4, pq3, pq2"):
        get_spec("q4_0")
