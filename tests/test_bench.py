"""``million bench``: what it reads out of llama-bench, what it checks first, and what it says fits."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Result
from test_cli import Terminal
from test_eval import need_tool

from million_gguf import container, tools
from million_gguf.cli import bench, memory
from million_gguf.errors import InputError, NativeError

Run = Callable[..., Result]
GIB = 1 << 30


# ---- reading llama-bench ----


def line(n_prompt: int, n_gen: int, n_depth: int, samples_ns: list[int]) -> str:
    return json.dumps({"n_prompt": n_prompt, "n_gen": n_gen, "n_depth": n_depth, "samples_ns": samples_ns})


def test_median_and_range() -> None:
    printed = "\n".join((line(512, 0, 0, [10**9]), line(0, 32, 0, [4 * 10**9, 10**9, 2 * 10**9]), ""))
    results = bench.parse_results(printed, 2)
    assert bench._speed(results, 0, "n_gen") == {"median": 16.0, "min": 8.0, "max": 32.0, "samples": [8.0, 32.0, 16.0]}
    assert bench._speed(results, 0, "n_prompt") == {"median": 512.0, "min": 512.0, "max": 512.0, "samples": [512.0]}
    assert bench._speed(results, 4096, "n_gen") is None


@pytest.mark.parametrize("printed", ["", "fatal error\n", line(1, 0, 0, [1]) + "\n"])
def test_missing_results_are_an_error(printed: str) -> None:
    with pytest.raises(NativeError, match="llama-bench printed"):
        bench.parse_results(printed, 2)


# ---- what fits ----


def test_what_fits() -> None:
    ram = memory.Memory("RAM", 8 * GIB)
    # Llama-3.1-8B: 32 layers, 8 KV heads, K and V of 128 elements; 4 GiB of weights, and 1 GiB to work in
    f16 = memory.CacheCost(bytes_per_token=131072, bytes_fixed=0, bits_per_element=16)
    pq4 = memory.CacheCost(bytes_per_token=32768, bytes_fixed=64 << 20, bits_per_element=4)
    assert bench.fitting_context(ram, 4 * GIB, f16) == 24 * 1024
    assert bench.fitting_context(ram, 4 * GIB, pq4) == (3 * GIB - (64 << 20)) // 32768
    assert bench.fitting_context(ram, 8 * GIB, f16) == 0
    # a mask of 512 rows in f16
    assert bench.fitting_context(ram, 4 * GIB, pq4, 1024) == (3 * GIB - (64 << 20)) // (32768 + 1024) // 256 * 256
    contexts = {"f16": 24 * 1024, "pq4": 96256, "q8_0": 0}
    shown = bench.fits_line({"memory": "RAM", "bytes_free": 8 * GIB, "context": contexts})
    assert shown == "RAM, 8.0 GiB free: 24K with f16, 94K with pq4, none with q8_0"


def test_a_control_group_limits_memory(tmp_path: Path) -> None:
    assert memory._cgroup_free(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._cgroup_free(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 200\n")
    assert memory._cgroup_free(tmp_path) == 500


@pytest.mark.native
def test_cost_of_a_cache(demo_gguf: Path) -> None:
    from million_gguf.bindings.cache_types import parse

    with memory.open_model(demo_gguf) as model:
        # 4 layers, 2 KV heads, K and V of 64 elements
        for name, bits in (("f16", 16), ("q8_0", 8.5), ("pq4", 4), ("pq4,pq2", 3), ("pq3", 3)):
            cost = model.cache_cost(*parse(name), kv_tail=0)
            assert cost.bits_per_element == bits
            assert cost.bytes_per_token == 4 * 2 * 2 * 64 * bits / 8
            assert cost.bytes(1024) == cost.bytes_fixed + 1024 * cost.bytes_per_token
        assert (model.n_vocab, model.n_ctx_train) == (2048, 2048)
        assert model.f16_layer_bytes == 2 * 2 * 64 * 2


@pytest.mark.native
def test_work_space_that_grows_with_the_context(demo_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said to fit leaves room for the attention mask, on a GPU also for one layer's rows decoded to f16."""
    from million_gguf.bindings.cache_types import parse

    with memory.open_model(demo_gguf) as model:
        costs = {name: model.cache_cost(*parse(name), kv_tail=0) for name in ("f16", "pq4")}
        monkeypatch.setattr(bench, "ram", lambda: memory.Memory("RAM", 4 * GIB))
        monkeypatch.setattr(bench, "gpus", lambda: [memory.Memory("GPU", 4 * GIB)])
        on_cpu, on_gpu = (bench._fits(model, costs, 512, n_gpu_layers) for n_gpu_layers in (0, -1))
        free = 3 * GIB - model.weight_bytes
    mask, layer = 512 * 2, 2 * 2 * 64 * 2
    assert [f["memory"] for f in on_gpu] == ["RAM", "GPU"] and on_gpu[:1] == on_cpu
    for fits, extra in ((on_cpu[0], 0), (on_gpu[1], layer)):
        for name, work in (("f16", mask), ("pq4", mask + extra)):
            n = fits["context"][name]
            need = costs[name].bytes(n) + n * work
            assert 0 <= free - need <= 256 * (costs[name].bytes_per_token + work)


@pytest.mark.native
def test_a_tail_costs_memory_that_does_not_grow(demo_gguf: Path) -> None:
    from million_gguf.bindings.cache_types import parse

    with memory.open_model(demo_gguf) as model:
        without, with_tail = (model.cache_cost(*parse("pq4"), kv_tail=n) for n in (0, 128))
    assert with_tail.bytes_per_token == without.bytes_per_token
    # K and V of 128 tokens in f16, at least
    assert with_tail.bytes_fixed - without.bytes_fixed >= 128 * 4 * 2 * 2 * 64 * 2


# ---- the command ----


@pytest.mark.native
def test_json_csv_and_plot(million: Run, program: Run, demo_gguf: Path, tmp_path: Path) -> None:
    need_tool("llama-bench")
    pytest.importorskip("matplotlib")
    plot = tmp_path / "speed.png"
    options = (
        "bench", demo_gguf, "--types", "q4_0,pq4/pq2", "-d", "0,64", "-n", 4, "-p", 16, "-r", 2, "-t", 1,
    )  # fmt: skip
    done = million(*options, "--json", "--plot", plot)
    assert done.code == 0, done.err
    assert plot.read_bytes().startswith(b"\x89PNG")
    facts = json.loads(done.out)
    rows = facts["results"]
    assert [(r["depth"], r["type"]) for r in rows] == [
        (depth, name) for depth in (0, 64) for name in ("f16", "q4_0", "pq4/pq2")
    ]
    for row in rows:
        for kind in ("decode", "prefill"):
            speed = row[kind]
            assert 0 < speed["min"] <= speed["median"] <= speed["max"]
            assert len(speed["samples"]) == 2
    assert rows[0]["cache_bytes"] == 16 * 2048
    contexts = facts["fits"][0]["context"]
    assert contexts["f16"] < contexts["q4_0"] < contexts["pq4/pq2"]
    listed = program(*options, "--prefill", 0, "--csv")
    table = list(csv.DictReader(io.StringIO(listed.out)))
    shown = program(*options, "--prefill", 0).out
    assert ", 1 thread\n" in shown and "tokens: decode 4, exact tail 128; repetitions: 2\n" in shown
    assert "prefill" not in shown  # it was not measured
    assert [line for line in shown.splitlines() if line != line.rstrip()] == []
    assert [r["type"] for r in table] == ["f16", "q4_0", "pq4/pq2"] * 2
    assert all(float(r["decode_median_tokens_per_s"]) > 0 and r["prefill_median_tokens_per_s"] == "" for r in table)


@pytest.mark.native
def test_fits_80_columns(demo_gguf: Path) -> None:
    need_tool("llama-bench")
    terminal = Terminal("bench", str(demo_gguf), "-d", "0,64", "-n", "4", "-p", "16", "-r", "1", "-t", "1")
    terminal.wait_for("Tokens per second")
    shown = terminal.rest()
    assert terminal.exit_code() == 0
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80
    for word in ("pq4/pq2", "q5_0"):
        assert word not in shown
    for word in ("f16", "q8_0", "q4_0", "pq4", "pq3", "pq2", "prefill", "1.00x", "with pq2"):
        assert word in shown


@pytest.mark.native
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-n", 0, "-p", 0), ("nothing to measure",)),
        (("--types", "pq9"), ("unknown KV cache type 'pq9'",)),
        (("--synthetic", "tiny"), ("one of the two",)),
    ],
)
def test_refused(million: Run, demo_gguf: Path, options: tuple[object, ...], words: tuple[str, ...]) -> None:
    need_tool("llama-bench")
    done = million("bench", demo_gguf, *options)
    assert done.code == 2
    for word in words:
        assert word in done.err
    assert "Traceback" not in done.err


def test_a_synthetic_model_lasts_as_long_as_the_run() -> None:
    with bench._model(None, "tiny") as path:
        assert list(container.read(path).types) == ["pq4", "pq3", "pq2"]
    assert not path.parent.exists()
    with pytest.raises(InputError, match="--synthetic gpt-9: .*invalid choice"), bench._model(None, "gpt-9"):
        pass


@pytest.mark.native
def test_the_name_of_a_synthetic_model(
    million: Run, demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = "\n".join(line(p, n, 8, [10**6]) for p, n in ((512, 0), (0, 32)))
    put_stand_in(tmp_path, monkeypatch, f"print({results!r})")
    monkeypatch.setattr(bench, "_model", lambda path, synthetic: contextlib.nullcontext(demo_gguf))
    options = ("bench", "--synthetic", "llama-2-7b", "--types", "f16", "-d", 8)
    facts = json.loads(million(*options, "--json").out)
    assert (facts["model"], facts["file"]) == ("llama-2-7b (random weights)", None)
    assert "model  llama-2-7b (random weights) (" in million(*options).out


@pytest.mark.native
def test_a_failure_of_llama_bench(
    million: Run, demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_stand_in(tmp_path, monkeypatch, "print('0.00.015.926 E llama_x: out of luck', file=sys.stderr); sys.exit(3)")
    done = million("bench", demo_gguf, "--types", "f16")
    assert done.code == 2
    assert "llama-bench failed with exit code 3: llama_x: out of luck" in done.err


def put_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Put a program of our own in llama-bench's place."""
    program = tmp_path / "llama-bench"
    program.write_text(f"#!{sys.executable}\nimport sys, time\n{code}\n")
    program.chmod(0o755)
    monkeypatch.setenv(tools.TOOLS_DIR_VARIABLE, str(tmp_path))


@pytest.mark.native
def test_output_that_is_not_finite_is_not_timed(million: Run, demo_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_tool("llama-bench")
    from million_gguf.bindings.llama import Llama

    evaluate = Llama.eval

    def spoil(self: Llama, tokens: list[int]) -> None:
        evaluate(self, tokens)
        if self.kv_cache_types[0] == "pq4":
            np.ctypeslib.as_array(self._ctx.get_logits_ith(-1), shape=(self.n_vocab(),))[7] = np.nan

    monkeypatch.setattr(Llama, "eval", spoil)
    monkeypatch.setattr(tools, "run", lambda *_, **__: pytest.fail("llama-bench was run"))
    done = million("bench", demo_gguf, "--types", "pq4")
    assert done.code == 2
    assert "with a pq4/pq4 cache, 1 of 2048 logits are not finite after 160 tokens" in done.err


@pytest.mark.native
def test_ctrl_c(demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_stand_in(tmp_path, monkeypatch, "time.sleep(60)")
    terminal = Terminal("bench", str(demo_gguf), "--types", "f16", "-t", "1")
    terminal.wait_for("check")
    terminal.wait_for("1/1")
    terminal.wait_for("\n")
    terminal.type("\x03")
    shown = terminal.rest()
    assert terminal.exit_code() == 130
    assert "Traceback" not in shown and "interrupted" in shown


def test_a_missing_tool(million: Run, tiny_pq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "_folders", lambda: [tmp_path])
    done = million("bench", tiny_pq)
    assert done.code == 2
    assert "llama-bench is missing" in done.err
