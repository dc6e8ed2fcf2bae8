"""Fixtures: the command line in process and as a program, and one converted model for all tests that run a model.

Tests marked ``native`` need the built libraries; without them they are skipped, and with MILLION_REQUIRE_NATIVE=1 they
fail. MILLION_TEST_MODEL names another checkpoint (a folder), or a calibrated GGUF file, to use for the demo model.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # helpers.py and others, which no package holds

from cuda_build import CudaBuild  # noqa: E402
from gguf_edit import edit  # noqa: E402
from helpers import make_set, write_model  # noqa: E402

from million_gguf import container, paths  # noqa: E402
from million_gguf.errors import MillionError  # noqa: E402

# A shell starts background jobs with SIGINT ignored, and children would inherit that: the tests of Ctrl-C need it back.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
N_TOKENS = 8192  # calibration tokens of the demo model in tests: quick, and enough for text that makes sense
REQUIRE_NATIVE = os.environ.get("MILLION_REQUIRE_NATIVE", "") not in ("", "0")


def _why_not_native() -> str | None:
    try:
        paths.lib_dir()
        return None
    except MillionError as e:
        return str(e)


def _wants_cuda_build(item: pytest.Item) -> bool:
    return "cuda_build" in getattr(item, "fixturenames", ())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_wants_cuda_build)  # they wait for a build that runs beside the others
    reason = _why_not_native()
    if reason is None or REQUIRE_NATIVE:
        return
    for item in items:
        if item.get_closest_marker("native"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cuda_build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CudaBuild | None]:
    """None without the tools."""
    if CudaBuild.missing():
        yield None
        return
    build = CudaBuild(tmp_path_factory.mktemp("cuda"))
    yield build
    build.stop()


@pytest.fixture(scope="session", autouse=True)
def _begin_cuda_build(request: pytest.FixtureRequest) -> None:
    if any(map(_wants_cuda_build, request.session.items)):
        request.getfixturevalue("cuda_build")


@dataclass(frozen=True)
class Result:
    """How a run of ``million`` ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def million(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command line in this process."""
    from million_gguf.cli import main

    def run(*args: object) -> Result:
        capsys.readouterr()
        try:
            code = main([str(a) for a in args])
        except SystemExit as e:  # argparse
            code = int(e.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child that finds the package wherever this process found it."""
    import million_gguf

    package = Path(next(iter(million_gguf.__path__))).parent
    search = [str(package), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in search if p), **extra}


@pytest.fixture
def program() -> Callable[..., Result]:
    """Run ``python -m million_gguf`` as a program."""

    def run(*args: object, input: str = "", timeout: float = 300, **env: str) -> Result:
        done = subprocess.run(
            [sys.executable, "-m", "million_gguf", *map(str, args)],
            input=input,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment(**env),
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A GGUF file with the metadata of a model and no weights to run."""
    return write_model(tmp_path / "tiny.gguf")


@pytest.fixture
def tiny_pq(tmp_path: Path, tiny: Path) -> Path:
    """The same with codebooks of every type."""
    path = tmp_path / "tiny-pq.gguf"
    container.embed(tiny, path, make_set(tiny))
    return path


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The HF checkpoint that tests convert."""
    chosen = os.environ.get("MILLION_TEST_MODEL")
    folder = Path(chosen) if chosen else ROOT / "examples" / "demo-model"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"there is no checkpoint in {folder}")
    _need("torch", "transformers", "sentencepiece")
    return folder


@pytest.fixture(scope="session")
def demo_gguf(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The demo model as GGUF with codebooks of every type, made by the code under test."""
    chosen = os.environ.get("MILLION_TEST_MODEL")
    if chosen and Path(chosen).is_file():
        return Path(chosen)
    from million_gguf.converters.hf import convert

    checkpoint: Path = request.getfixturevalue("demo_checkpoint")
    path = tmp_path_factory.mktemp("demo") / "demo.gguf"
    convert(checkpoint, path, n_tokens=N_TOKENS, progress=False)
    return path


@pytest.fixture(scope="session")
def plain_gguf(tmp_path_factory: pytest.TempPathFactory, demo_gguf: Path) -> Path:
    """The demo model without codebooks."""
    with container.GGUFHeader(demo_gguf) as header:
        ours: dict[str, Any] = {key: None for key in header.kv if key.startswith("million.")}
    return edit(demo_gguf, tmp_path_factory.mktemp("plain") / "plain.gguf", ours)


def _need(*modules: str) -> None:
    missing: Sequence[str] = [m for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        pytest.skip(f"converting needs {', '.join(missing)}")
