"""``million eval``: what it reads out of llama-perplexity, what it shows, and what it leaves when it is stopped."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REQUIRE_NATIVE, Result
from test_cli import Terminal

from million_gguf import plots, tools
from million_gguf.cli import eval as eval_
from million_gguf.cli import output
from million_gguf.errors import InputError, MillionError, NativeError

Run = Callable[..., Result]
# What llama-perplexity --kl-divergence printed for the demo model, shortened.
PRINTED = """\
0.02 minutes

chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence              Δp RMS            Same top p
   1      35.8893 ±    6.9741       0.01422 ±    0.01470       0.01302 ±    0.00115     1.467 ±  0.181 %    84.252 ±  3.245 %
   2      50.8537 ±    7.3301      -0.00689 ±    0.00927       0.01167 ±    0.00070     1.626 ±  0.206 %    88.976 ±  1.969 %

====== Perplexity statistics ======
Mean PPL(Q)                   :  76.878561 ±   8.234687
Mean PPL(base)                :  77.755862 ±   8.313047
Mean PPL(Q)/PPL(base)         :   0.988717 ±   0.006589

====== KL divergence statistics ======
Mean    KLD:   0.009973 ±   0.000435
Maximum KLD:   0.109012
99.9%   KLD:   0.087290
99.0%   KLD:   0.050461
Median  KLD:   0.007203

====== Token probability statistics ======
99.9%   Δp:  5.856%
RMS Δp    :  1.351 ± 0.133 %
Same top p: 91.732 ± 1.223 %
"""


def need_tool(name: str) -> Path:
    try:
        return tools.find(name)
    except MillionError as e:
        if REQUIRE_NATIVE:
            raise
        pytest.skip(str(e))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text that the demo model cuts into about 6000 tokens."""
    from million_gguf import paths

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(paths.converters_data("calibration.txt").read_text(encoding="utf-8")[:16_000], encoding="utf-8")
    return path


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


# ---- reading llama-perplexity ----


def test_statistics_are_read_to_the_last_digit() -> None:
    assert eval_.parse_statistics(PRINTED) == {
        "ppl": 76.878561,
        "ppl_error": 8.234687,
        "kl_mean": 0.009973,
        "kl_mean_error": 0.000435,
        "kl_median": 0.007203,
        "kl_p99": 0.050461,
        "kl_p999": 0.08729,
        "kl_max": 0.109012,
        "same_top_percent": 91.732,
        "same_top_percent_error": 1.223,
    }


@pytest.mark.parametrize("lost", ["Mean PPL(Q)   ", "Mean    KLD", "99.9%   KLD", "Same top p:"])
def test_a_missing_line_is_an_error(lost: str) -> None:
    lines = [line for line in PRINTED.splitlines() if not line.startswith(lost)]
    with pytest.raises(NativeError, match="llama-perplexity printed no"):
        eval_.parse_statistics("\n".join(lines))


def test_values_that_are_not_finite_are_read() -> None:
    row = eval_.parse_statistics(PRINTED.replace("0.009973", "nan").replace("0.109012", "inf"))
    assert math.isnan(row["kl_mean"]) and math.isinf(row["kl_max"])


def test_perplexity_of_the_base() -> None:
    assert eval_.parse_perplexity("0.01 I perplexity: Final estimate: PPL = 9.3597 +/- 0.05123") == (9.3597, 0.05123)
    with pytest.raises(NativeError, match="no final estimate"):
        eval_.parse_perplexity("[1]9.3,")


def test_size_of_the_base_file() -> None:
    # 4 chunks of 256 tokens with a vocabulary of 2048: the size of a file that llama-perplexity wrote
    assert eval_.base_bytes(4, 256, 2048) == 2088948


# ---- numbers in tables ----


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0504612, "0.0505"), (1.03123, "1.03"), (123.4, "123"), (0.000184, "0.000184"), (0.0, "0")]
)
def test_significant(value: float, shown: str) -> None:
    assert output.significant(value) == shown


@pytest.mark.parametrize(
    ("n", "shown"), [(640, "640 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (5 << 50, "5120.0 TiB")]
)
def test_size(n: int, shown: str) -> None:
    assert output.size(n) == shown


@pytest.mark.parametrize(("n", "shown"), [(118 * 1024 + 5, "118K"), (2048, "2048"), (10240, "10K"), (3 << 19, "1.5M")])
def test_context(n: int, shown: str) -> None:
    assert output.context(n) == shown


# ---- the command ----


@pytest.mark.native
def test_agrees_with_llama_perplexity(million: Run, demo_gguf: Path, text: Path, tmp_path: Path, work: Path) -> None:
    program = need_tool("llama-perplexity")
    done = million(
        "eval", demo_gguf, "--text", text, "-c", 256, "--chunks", 6, "--types", "q4_0,pq4/pq2", "--kv-tail", 0,
        "-ub", 64, "-t", 1, "--json", "--work-dir", work,
    )  # fmt: skip
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    common = [
        program,
        "-m",
        demo_gguf,
        "-f",
        text,
        "-c",
        256,
        "-b",
        256,
        "-ub",
        64,
        "--chunks",
        6,
        "-t",
        2,
        "-fa",
        "on",
    ]
    base = tmp_path / "base.kld"

    def direct(*more: object, expect: str) -> str:
        for _ in range(4):  # its last lines are lost now and then
            run = subprocess.run(
                [*map(str, common), *map(str, more)], capture_output=True, check=True, env=tools.environment(0)
            )
            printed = (run.stdout + run.stderr).decode("utf-8")
            if expect in printed:
                return printed
        raise AssertionError(printed)

    ppl = eval_.parse_perplexity(direct("--kl-divergence-base", base, expect="Final estimate"))
    rows = {row["type"]: row for row in facts["results"]}
    assert list(rows) == ["f16", "q4_0", "pq4/pq2"]
    assert (rows["f16"]["ppl"], rows["f16"]["ppl_error"]) == ppl
    assert rows["f16"]["kl_mean"] is None
    for name in ("q4_0", "pq4/pq2"):
        k, v = (name.split("/") * 2)[:2]
        printed = direct(
            "--kl-divergence", "--kl-divergence-base", base, "-ctk", k, "-ctv", v, expect="Same top p:"
        )  # fmt: skip
        want = eval_.parse_statistics(printed)
        assert {key: rows[name][key] for key in want} == want
    assert (rows["q4_0"]["bits_per_element"], rows["pq4/pq2"]["bits_per_element"]) == (4.5, 3.0)
    # 4 layers, 2 KV heads, K and V of 64 elements
    assert rows["f16"]["cache_bytes_per_token"] == 4 * 2 * 2 * 64 * 2
    assert rows["pq4/pq2"]["cache_bytes_per_token"] == 4 * 2 * (32 + 16)
    assert facts["tokens_evaluated"] == 6 * 127
    assert list(work.iterdir()) == []


@pytest.mark.native
def test_table_csv_and_plot(program: Run, demo_gguf: Path, text: Path, tmp_path: Path, work: Path) -> None:
    need_tool("llama-perplexity")
    pytest.importorskip("matplotlib")
    plot = tmp_path / "kl.png"
    options = ("eval", demo_gguf, "--text", text, "-c", 256, "--chunks", 4, "-t", 1, "--work-dir", work)
    shown = program(*options, "--plot", plot)
    assert shown.code == 0, shown.err
    for word in ("f16", "q8_0", "q4_0", "pq4", "pq3", "pq2", "KL 99.9%", "same top", "B/token", "base"):
        assert word in shown.out
    assert [line for line in shown.out.splitlines() if line != line.rstrip()] == []
    assert "━" not in shown.err and "\x1b" not in shown.out + shown.err
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".part")] == []
    listed = program(*options, "--types", "pq4", "--csv")
    assert listed.code == 0, listed.err
    rows = list(csv.DictReader(io.StringIO(listed.out)))
    assert [(row["type"], row["kl_mean"] == "") for row in rows] == [("f16", True), ("pq4", False)]
    assert float(rows[1]["kl_mean"]) > 0


@pytest.mark.native
def test_fits_80_columns(demo_gguf: Path, text: Path, work: Path) -> None:
    need_tool("llama-perplexity")
    terminal = Terminal(
        "eval", str(demo_gguf), "--text", str(text), "-c", "256", "--chunks", "4", "-t", "1", "--types", "pq4/pq2,q4_0",
        "--work-dir", str(work),
    )  # fmt: skip
    terminal.wait_for("KL divergence")
    shown = terminal.rest()
    assert terminal.exit_code() == 0
    rows = [line.rstrip() for line in shown.splitlines() if line.strip()]
    assert [row.split()[0] for row in rows[-3:]] == ["f16", "pq4/pq2", "q4_0"]
    assert max(map(len, rows)) <= 80


@pytest.mark.native
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-c", 4096), ("tokens, need 8192", "smaller --ctx")),
        (("--types", "pq5"), ("unknown KV cache type 'pq5'",)),
        (("--types", "pq4/pq3/pq2"), ("pair",)),
        (("--max-disk", 1e-6), ("--max-disk allows", "raise it")),
        (("-c", 32, "--chunks", 2), ("predictions, need 100",)),
        (("--plot", "kl.pdf"), ("ends in .png",)),
        (("--plot", "no/such/folder/kl.png"), ("no folder",)),
    ],
)
def test_refused(
    million: Run, demo_gguf: Path, text: Path, work: Path, options: tuple[object, ...], words: tuple[str, ...]
) -> None:
    need_tool("llama-perplexity")
    if "--plot" in options:
        pytest.importorskip("matplotlib")
    done = million("eval", demo_gguf, "--text", text, "-c", 256, "--work-dir", work, *options)
    assert done.code == 2
    error = done.err.splitlines()[-1]
    assert error.startswith("million: error: ")
    for word in words:
        assert word in error
    assert not work.exists() or list(work.iterdir()) == []


@pytest.mark.native
def test_a_type_without_codebooks(million: Run, plain_gguf: Path, text: Path, work: Path) -> None:
    need_tool("llama-perplexity")
    done = million("eval", plain_gguf, "--text", text, "-c", 256, "--types", "pq4", "--work-dir", work)
    assert done.code == 2
    assert "codebooks" in done.err and "million calibrate" in done.err


@pytest.mark.native
def test_fewer_chunks_where_the_disk_is_small(million: Run, demo_gguf: Path, text: Path, work: Path) -> None:
    need_tool("llama-perplexity")
    three = eval_.base_bytes(3, 256, 2048) / (1 << 30)
    done = million(
        "eval", demo_gguf, "--text", text, "-c", 256, "--chunks", 6, "--types", "q4_0", "--json",
        "--max-disk", three, "--work-dir", work,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads(done.out)["n_chunks"] == 3
    assert "using 3 chunks" in done.err


@pytest.mark.native
@pytest.mark.parametrize(("tail", "told"), [(128, True), (32, False), (0, False)])
def test_a_tail_that_hides_the_codes_is_told(
    stand_in: Path, million: Run, demo_gguf: Path, text: Path, work: Path, tail: int, told: bool
) -> None:
    done = million(*arguments(demo_gguf, text, work), "--kv-tail", tail)
    assert done.code == 0, done.err
    assert ("are in the exact tail" in done.err) == told


@pytest.mark.parametrize("content", [b"", b" \n", b"caf\xe9 au lait"])
def test_a_text_that_is_none(million: Run, tiny_pq: Path, tmp_path: Path, content: bytes) -> None:
    need_tool("llama-perplexity")
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    done = million("eval", tiny_pq, "--text", path)
    assert done.code == 2
    assert "empty" in done.err or "not UTF-8: byte 3" in done.err


def test_no_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'million-gguf\[plot\]'"):
        plots.check(tmp_path / "kl.png")


# ---- a stand-in for llama-perplexity, to be slow, to fail and to lose output at will ----

STAND_IN = """#!{python}
import os, sys, time
argv = sys.argv
kind = argv[argv.index("-ctk") + 1]
mode = os.environ.get("STAND_IN_" + kind.upper(), "")
with open(os.environ["STAND_IN_LOG"], "a") as log:
    log.write(kind + "\\n")
base = argv[argv.index("--kl-divergence-base") + 1]
if "--kl-divergence" not in argv:
    with open(base, "wb") as f:
        f.write(bytes(int(os.environ["STAND_IN_BYTES"]) // (2 if mode == "short" else 1)))
    print("[1]9.3,", end="", flush=True)
    if mode == "slow":
        time.sleep(60)
    if mode != "silent":
        print("Final estimate: PPL = 9.3597 +/- 0.05", file=sys.stderr)
    sys.exit()
assert os.path.getsize(base)
print("chunk PPL\\n   1      35.8893 ±", flush=True)
if mode == "slow":
    time.sleep(60)
if mode == "fail":
    print("0.00.015.926 E llama_x: out of luck", file=sys.stderr)
    print("0.00.015.999 E cmn  common_init_: failed to create context with model 'm'", file=sys.stderr)
    sys.exit(1)
if mode == "crash":
    os.abort()
lost = mode == "silent" or (mode == "once" and open(os.environ["STAND_IN_LOG"]).read().count(kind) == 1)
if not lost:
    print({printed!r}.replace("0.009973", "nan" if mode == "nan" else "0.009973"))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts a stand-in for llama-perplexity first. Returns the file in which it notes the types it was asked for."""
    folder = tmp_path / "tools"
    folder.mkdir()
    program = folder / "llama-perplexity"
    program.write_text(
        STAND_IN.replace("{python}", sys.executable).replace("{printed!r}", repr(PRINTED)), encoding="utf-8"
    )
    program.chmod(0o755)
    monkeypatch.setenv(tools.TOOLS_DIR_VARIABLE, str(folder))
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "asked"))
    monkeypatch.setenv("STAND_IN_BYTES", str(eval_.base_bytes(4, 256, 2048)))
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8")
    return tmp_path / "asked"


def arguments(demo_gguf: Path, text: Path, work: Path, types: str = "q4_0,pq4,pq2") -> list[str]:
    return [
        "eval", str(demo_gguf), "--text", str(text), "-c", "256", "--chunks", "4", "--types", types,
        "--work-dir", str(work),
    ]  # fmt: skip


def wait_for_type(stand_in: Path, name: str, seconds: float = 60) -> None:
    """Until the stand-in has been asked for a type, and is asleep."""
    end = time.monotonic() + seconds
    while not stand_in.exists() or name not in stand_in.read_text().split():
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(0.3)


@pytest.mark.native
@pytest.mark.parametrize("at", ["f16", "pq4"])
def test_ctrl_c_and_resume(
    stand_in: Path, demo_gguf: Path, text: Path, work: Path, million: Run, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    monkeypatch.setenv(f"STAND_IN_{at.upper()}", "slow")
    terminal = Terminal(*arguments(demo_gguf, text, work))
    wait_for_type(stand_in, at)
    terminal.type("\x03")
    shown = terminal.rest()
    assert terminal.exit_code() == 130
    assert "Traceback" not in shown and "interrupted" in shown
    left = sorted(p.name for p in work.rglob("*") if p.is_file())
    if at == "f16":  # its predictions are not whole: nothing is kept
        assert left == []
        assert "kept" not in shown
    else:
        assert left == ["base.kld", "lock", "state.json"]
        assert "kept f16, q4_0 and f16's predictions" in " ".join(shown.split())
    stand_in.write_text("")
    monkeypatch.delenv(f"STAND_IN_{at.upper()}")
    done = million(*arguments(demo_gguf, text, work), "--json")
    assert done.code == 0, done.err
    assert stand_in.read_text().split() == (["f16", "q4_0", "pq4", "pq2"] if at == "f16" else ["pq4", "pq2"])
    assert [row["type"] for row in json.loads(done.out)["results"]] == ["f16", "q4_0", "pq4", "pq2"]
    assert list(work.iterdir()) == []


@pytest.mark.native
@pytest.mark.parametrize(
    ("variable", "mode", "words"),
    [
        ("PQ4", "fail", ("failed with exit code 1: llama_x: out of luck",)),
        ("PQ4", "crash", ("llama-perplexity was killed by signal 6",)),
        ("PQ4", "nan", ("pq4", "not finite")),
        ("PQ4", "silent", ("printed no ppl",)),
        ("F16", "short", ("f16's predictions are", "full?")),
    ],
)
def test_failures(
    stand_in: Path, demo_gguf: Path, text: Path, work: Path, million: Run, monkeypatch: pytest.MonkeyPatch,
    variable: str, mode: str, words: tuple[str, ...],
) -> None:  # fmt: skip
    monkeypatch.setenv(f"STAND_IN_{variable}", mode)
    done = million(*arguments(demo_gguf, text, work))
    assert done.code == 2
    error = done.err.splitlines()[-1]
    for word in words:
        assert word in error
    assert [p.name for p in work.rglob("*.part")] == []
    # q4_0 was done before pq4 failed: it is not asked for again
    stand_in.write_text("")
    monkeypatch.delenv(f"STAND_IN_{variable}")
    assert million(*arguments(demo_gguf, text, work)).code == 0
    assert stand_in.read_text().split() == (["pq4", "pq2"] if variable == "PQ4" else ["f16", "q4_0", "pq4", "pq2"])


@pytest.mark.native
def test_lost_output_is_asked_for_again(
    stand_in: Path, demo_gguf: Path, text: Path, work: Path, million: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_PQ4", "once")
    done = million(*arguments(demo_gguf, text, work, "pq4"))
    assert done.code == 0, done.err
    assert stand_in.read_text().split() == ["f16", "pq4", "pq4"]


@pytest.mark.native
def test_another_model_text_or_setting_starts_over(
    stand_in: Path, demo_gguf: Path, text: Path, work: Path, million: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_PQ4", "fail")
    assert million(*arguments(demo_gguf, text, work, "pq4")).code == 2
    assert million(*arguments(demo_gguf, text, work, "pq4"), "-ub", 64).code == 2
    assert stand_in.read_text().split() == ["f16", "pq4", "f16", "pq4"]
    assert len(list(work.iterdir())) == 2
    text_2 = work.parent / "other.txt"
    text_2.write_text(text.read_text(encoding="utf-8") + "More.", encoding="utf-8")
    assert million(*arguments(demo_gguf, text_2, work, "pq4")).code == 2
    assert len(list(work.iterdir())) == 3


@pytest.mark.native
def test_unfinished_runs_do_not_stay_for_ever(
    stand_in: Path, demo_gguf: Path, text: Path, work: Path, million: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_PQ4", "fail")
    assert million(*arguments(demo_gguf, text, work, "pq4")).code == 2
    (folder,) = work.iterdir()
    assert million(*arguments(demo_gguf, text, work, "pq4"), "-ub", 64).code == 2
    assert folder.exists()
    os.utime(folder / "state.json", (0, 0))
    assert million(*arguments(demo_gguf, text, work, "pq4"), "-ub", 64).code == 2
    assert not folder.exists()


@pytest.mark.native
def test_two_at_a_time_are_refused(
    stand_in: Path, demo_gguf: Path, text: Path, work: Path, million: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_PQ4", "slow")
    terminal = Terminal(*arguments(demo_gguf, text, work, "pq4"))
    wait_for_type(stand_in, "pq4")
    done = million(*arguments(demo_gguf, text, work, "pq4"))
    terminal.type("\x03")
    assert terminal.exit_code() == 130
    assert done.code == 2
    assert "another 'million eval'" in done.err
    assert (len(list(work.rglob("base.kld")))) == 1


def test_a_missing_tool(million: Run, tiny_pq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "_folders", lambda: [tmp_path])
    done = million("eval", tiny_pq, "--text", tmp_path / "t.txt")
    assert done.code == 2
    assert "llama-perplexity is missing" in done.err and "make tools" in done.err
