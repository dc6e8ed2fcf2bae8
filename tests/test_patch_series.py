"""The patch series: the pin, fuzz-free application, what it may touch, and that preparing twice gives the same tree."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "cuda"
PATCHES = NATIVE / "patches"

# Upstream files that patches may touch, with the most lines that they may add and remove together. A patch only
# hooks our files in: growth here is a sign that code belongs into the overlay.
LINE_BUDGET = {
    "common/arg.cpp": 15,
    "ggml/include/ggml.h": 6,
    "ggml/src/ggml-cpu/ggml-cpu.cpp": 6,
    "ggml/src/ggml-cpu/traits.cpp": 10,
    "ggml/src/ggml-cuda/ggml-cuda.cu": 22,
    "ggml/src/ggml-cuda/mmvq.cu": 12,
    "ggml/src/ggml.c": 6,
    "src/llama-context.cpp": 16,
    "src/llama-graph.cpp": 10,
    "src/llama-kv-cache.cpp": 135,
    "src/llama-kv-cache.h": 35,
    "src/llama-model.h": 5,
    "src/llama.cpp": 4,
    "tests/test-backend-ops.cpp": 8,
    "tools/llama-bench/llama-bench.cpp": 8,
    "tools/perplexity/perplexity.cpp": 1,
}


def series() -> list[Path]:
    lines = (PATCHES / "series").read_text().splitlines()
    return [PATCHES / line for line in lines if line and not line.startswith("#")]


def changed_lines() -> dict[str, int]:
    counts: dict[str, int] = {}
    name = ""
    for patch in series():
        in_hunk = False
        for line in patch.read_text().splitlines():
            if line.startswith("diff --git "):
                in_hunk = False
            elif line.startswith("+++ b/") and not in_hunk:
                name = line[len("+++ b/") :]
                counts.setdefault(name, 0)
            elif line.startswith("@@ "):
                in_hunk = True
            elif in_hunk and line[:1] in "+-":
                counts[name] += 1
    return counts


def test_pin_names_one_exact_sdist():
    pin = json.loads((NATIVE / "upstream.json").read_text())
    assert set(pin) == {"name", "version", "sha256"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", pin["version"])
    assert re.fullmatch(r"[0-9a-f]{64}", pin["sha256"])


def test_series_lists_every_patch_in_order():
    names = [p.name for p in series()]
    assert names == sorted(p.name for p in PATCHES.glob("*.patch"))
    assert all(re.match(r"\d{4}-", name) for name in names)


def test_every_patch_says_what_and_why():
    for patch in series():
        header = patch.read_text().split("diff --git")[0]
        assert "Not an overlay:" in header, patch.name
        assert "LICENSE.llama.cpp" in header, patch.name
    assert (PATCHES / "LICENSE.llama.cpp").is_file()


def test_patches_touch_only_what_they_may():
    counts = changed_lines()
    assert set(counts) <= set(LINE_BUDGET)
    over = {name: n for name, n in counts.items() if n > LINE_BUDGET[name]}
    assert not over, f"over the line budget: {over}"


def test_patches_carry_minimal_context():
    for patch in series():
        for line in patch.read_text().splitlines():
            if match := re.match(r"@@ -\d+(?:,(\d+))? ", line):
                assert int(match[1] or 1) <= 12, f"{patch.name}: {line}"


def tree_digest(tree: Path) -> str:
    h = hashlib.sha256()
    for path in sorted(p for p in tree.rglob("*") if p.is_file()):
        h.update(str(path.relative_to(tree)).encode() + b"\0" + path.read_bytes())
    return h.hexdigest()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The pinned sdist, from the build's downloads where it is there already."""
    pin = json.loads((NATIVE / "upstream.json").read_text())
    name = f"{pin['name'].replace('-', '_')}-{pin['version']}.tar.gz"
    for place in (os.environ.get("MILLION_LLAMA_CPP_SDIST"), ROOT / "build" / "upstream" / name):
        if place and Path(place).is_file():
            return Path(place)
    if os.environ.get("MILLION_REQUIRE_NATIVE") == "1":
        pytest.fail("the build should have left the sdist in build/upstream")
    pytest.skip("the llama-cpp-python sdist has not been fetched")


def prepare(native: Path, out: Path, sdist: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(native / "prepare_llama_cpp.py"), "--out", str(out)],
        env=dict(os.environ, MILLION_LLAMA_CPP_SDIST=str(sdist)),
        capture_output=True,
        text=True,
    )


@pytest.fixture
def native_copy(tmp_path) -> Path:
    copy = tmp_path / "native"
    copy.mkdir()
    shutil.copytree(PATCHES, copy / "patches")
    for name in ("prepare_llama_cpp.py", "upstream.json"):
        shutil.copy(NATIVE / name, copy)
    return copy


@pytest.mark.build
def test_two_preparations_give_identical_trees(tmp_path, sdist):
    trees = []
    for name in ("one", "two"):
        done = prepare(NATIVE, tmp_path / name, sdist)
        assert done.returncode == 0, done.stderr
        trees.append(Path(done.stdout.strip()))
    assert trees[0].name == trees[1].name
    assert tree_digest(trees[0]) == tree_digest(trees[1])
    # a second call finds the finished tree
    again = prepare(NATIVE, tmp_path / "one", sdist)
    assert again.stdout.strip() == str(trees[0])


@pytest.mark.build
def test_patches_apply_inside_another_checkout(tmp_path, sdist):
    # git apply in a tree below a foreign repository applies nothing and exits 0 unless a ceiling is set
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    done = prepare(NATIVE, tmp_path / "out", sdist)
    assert done.returncode == 0, done.stderr
    assert "GGML_TYPE_PQ4" in (Path(done.stdout.strip()) / "llama.cpp/ggml/include/ggml.h").read_text()


def test_wrong_sdist_is_refused(tmp_path):
    wrong = tmp_path / "llama_cpp_python-0.3.36.tar.gz"
    wrong.write_bytes(b"not an sdist")
    done = prepare(NATIVE, tmp_path / "out", wrong)
    assert done.returncode == 2
    assert "sha256" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.build
def test_moved_context_is_refused_not_fuzzed(tmp_path, native_copy, sdist):
    patch = native_copy / "patches" / series()[0].name
    patch.write_text(patch.read_text().replace("GGML_TYPE_Q2_0", "GGML_TYPE_Q2_X"))
    done = prepare(native_copy, tmp_path / "out", sdist)
    assert done.returncode == 2
    assert "git apply" in done.stderr
    assert not list((tmp_path / "out").glob("*")), "a failed preparation must leave nothing"


@pytest.mark.build
def test_unrecorded_result_is_refused(tmp_path, native_copy, sdist):
    patch = native_copy / "patches" / series()[0].name
    patch.write_text(patch.read_text().replace("see ggml-pq.h", "see elsewhere"))
    done = prepare(native_copy, tmp_path / "out", sdist)
    assert done.returncode == 2
    assert "SHA256SUMS" in done.stderr
