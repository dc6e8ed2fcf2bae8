"""``Llama`` and the code around it."""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import environment
from gguf import GGUFValueType as VT
from gguf_edit import edit, encoded, string_array, strings
from lowlevel import LowLevel, close_to, tokens_of
from million_gguf.bindings import cache_types
from million_gguf.bindings.native_log import _CONT, _ERROR, _WARN, Collected

from million_gguf.errors import InputError, MillionError, MismatchError, NativeError
from million_gguf.spec import PQ_TYPES

PROMPT = "The history of the"
N_CTX = 512


# ---- names of types ----


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("pq4", ("pq4", "pq4")),
        ("PQ4", ("pq4", "pq4")),
        ("pq4,pq2", ("pq4", "pq2")),
        ("q8_0, pq4", ("q8_0", "pq4")),
        (("pq4", "pq2"), ("pq4", "pq2")),
        (["f16", "q4_0"], ("f16", "q4_0")),
    ],
)
def test_cache_types(given: Any, want: tuple[str, str]) -> None:
    k, v = cache_types.parse(given)
    assert (k.name, v.name) == want


@pytest.mark.parametrize("given", ["pq5", "", "pq4,", "pq4,pq3,pq2", ("pq4",) * 3, (), (43, 43), "auto,pq4", "q4_K"])
def test_unknown_cache_types_list_the_known(given: Any) -> None:
    with pytest.raises(InputError) as e:
        cache_types.parse(given)
    for name in ("pq4", "pq2", "q8_0", "iq4_nl", "auto"):
        assert name in str(e.value)


def test_bits() -> None:
    bits = {name: t.bits for name, t in cache_types.CACHE_TYPES.items()}
    assert bits["pq4"] == 4.0 and bits["pq3"] == 3.0 and bits["pq2"] == 2.0
    assert bits["f16"] == 16.0 and bits["q8_0"] == 8.5 and bits["q4_0"] == 4.5


@pytest.mark.native
def test_cache_types_are_those_of_ggml() -> None:
    """Numbers and block sizes, against ggml itself."""
    from million_gguf import paths

    ggml = ctypes.CDLL(str(paths.library("ggml-base")))
    ggml.ggml_type_name.restype = ctypes.c_char_p
    ggml.ggml_blck_size.restype = ctypes.c_int64
    ggml.ggml_type_size.restype = ctypes.c_size_t
    for t in cache_types.CACHE_TYPES.values():
        assert ggml.ggml_type_name(t.ggml_type).decode() == t.name
        assert ggml.ggml_blck_size(t.ggml_type) == t.block_elems
        assert ggml.ggml_type_size(t.ggml_type) == t.block_bytes


# ---- log ----


def test_the_reason_is_what_was_logged_as_error() -> None:
    log = Collected(echo=True)
    log.add(_WARN, "a warning\n")
    assert log.reason() == "a warning"
    log.add(_ERROR, "load: tensor 'x' ")
    log.add(_CONT, "is missing\n")
    log.add(_ERROR, "llama_model_load_from_file_impl: failed to load model\n")
    log.add(_ERROR, "load: tensor 'x' is missing\n")
    assert log.reason() == "load: tensor 'x' is missing"


def test_an_empty_phrase_is_better_than_nothing() -> None:
    log = Collected(echo=True)
    assert log.reason("unknown") == "unknown"
    log.add(_ERROR, "failed to load model\n")
    assert log.reason("unknown") == "failed to load model"


# ---- loading llama_cpp ----


def test_another_llama_cpp_is_refused(tmp_path: Path) -> None:
    """A llama_cpp that is imported already, on another library, is not used and not silently replaced."""
    package = tmp_path / "llama_cpp"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '0.3.36'\nfrom . import llama_cpp\n")
    (package / "llama_cpp.py").write_text("import ctypes\n_lib = ctypes.CDLL(None)\n")
    code = (
        "import llama_cpp\nfrom million_gguf.errors import NativeError\n"
        "try:\n    from million_gguf import Llama\nexcept NativeError as e:\n    print(e)\n"
    )
    env = environment()
    env["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{env['PYTHONPATH']}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "before llama_cpp" in done.stdout, done.stderr


def test_missing_libraries_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    code = (
        "from million_gguf.errors import NativeError\n"
        "try:\n    from million_gguf import Llama\nexcept NativeError as e:\n    print(e)\n"
    )
    env = environment(MILLION_LIB_DIR=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "MILLION_LIB_DIR" in done.stdout and str(tmp_path) in done.stdout, done.stderr


def test_a_foreign_library_is_an_error(tmp_path: Path) -> None:
    from million_gguf import paths

    (tmp_path / paths.library_file_name("llama")).write_bytes(b"no library")
    (tmp_path.parent / "_vendor").mkdir(exist_ok=True)
    code = (
        "from million_gguf.errors import NativeError\n"
        "try:\n    from million_gguf import Llama\nexcept NativeError as e:\n    print(e)\n"
    )
    env = environment(MILLION_LIB_DIR=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.startswith(("cannot load llama.cpp", "the vendored")), done.stderr


# ---- the model ----


def load(path: Path, kv_cache: Any = None, **options: Any) -> Any:
    from million_gguf import Llama

    options = {"n_ctx": N_CTX, "verbose": False, "seed": 1, "logits_all": False, **options}
    return Llama(path, kv_cache=kv_cache, **options)


def complete(llm: Any, prompt: str = PROMPT, n: int = 24) -> str:
    text: str = llm.create_completion(prompt, max_tokens=n, temperature=0.0)["choices"][0]["text"]
    return text


@pytest.fixture(scope="module", params=["pq4", "pq3", "pq2", "pq4,pq2", "pq2,pq4", "pq4,f16", "q8_0,pq4"])
def pq_llm(request: pytest.FixtureRequest, demo_gguf: Path) -> Iterator[Any]:
    with closing(load(demo_gguf, request.param)) as llm:
        yield llm


@pytest.mark.native
class TestEveryType:
    def test_it_generates(self, pq_llm: Any) -> None:
        assert len(complete(pq_llm).strip()) > 10

    def test_generation_is_deterministic(self, pq_llm: Any) -> None:
        pq_llm.reset()
        first = complete(pq_llm)
        pq_llm.reset()
        assert complete(pq_llm) == first

    def test_cache_bytes_are_what_the_bits_promise(self, pq_llm: Any, demo_gguf: Path) -> None:
        from million_gguf import container

        shape = container.model_shape(demo_gguf)
        k, v = (cache_types.CACHE_TYPES[name] for name in pq_llm.kv_cache_types)
        elements_k = sum(n * d for n, d in zip(shape.n_head_kv, shape.D_k, strict=True)) * pq_llm.n_ctx()
        elements_v = sum(n * d for n, d in zip(shape.n_head_kv, shape.D_v, strict=True)) * pq_llm.n_ctx()
        assert pq_llm.kv_cache_bytes * 8 == elements_k * k.bits + elements_v * v.bits
        assert pq_llm.kv_cache_bytes_f16 == (elements_k + elements_v) * 2


@pytest.mark.native
@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"])
def test_types_of_llama_cpp_still_work(demo_gguf: Path, name: str) -> None:
    with closing(load(demo_gguf, name)) as llm:
        assert llm.kv_cache_types == (name, name)
        assert complete(llm, n=4)


def logits_along(llm: Any, tokens: list[int]) -> npt.NDArray[np.float64]:
    """Log probabilities after every token: f64 ``[n, n_vocab]``."""
    llm.reset()
    llm.eval(tokens)
    x = np.array(llm.scores[: len(tokens)], dtype=np.float64)
    x -= x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


@pytest.mark.native
@pytest.mark.parametrize(("name", "limit"), [("q8_0", 0.01), ("pq4", 0.15), ("pq3", 0.4), ("pq2", 1.0)])
def test_output_stays_near_that_of_f16(demo_gguf: Path, name: str, limit: float) -> None:
    """Mean KL divergence over a text, in nats. The limits are loose: they tell a working cache from a broken one."""
    with closing(load(demo_gguf, "f16", logits_all=True)) as llm:
        text = (Path(__file__).parent.parent / "converters" / "data" / "calibration.txt").read_bytes()[:1500]
        tokens = llm.tokenize(text.decode("utf-8", "ignore").encode())[:N_CTX]
        want = logits_along(llm, tokens)
    with closing(load(demo_gguf, name, logits_all=True)) as llm:
        found = logits_along(llm, tokens)
    kl = (np.exp(want) * (want - found)).sum(axis=1).mean()
    assert 0 <= kl < limit


@pytest.mark.native
def test_greedy_text_of_pq4_begins_as_that_of_f16(demo_gguf: Path) -> None:
    texts = {}
    for name in ("f16", "pq4"):
        with closing(load(demo_gguf, name)) as llm:
            texts[name] = complete(llm, n=48)
    common = os.path.commonprefix(list(texts.values()))
    assert len(common) >= 8, texts


# ---- auto, and what is refused ----


@pytest.mark.native
def test_auto_takes_pq4_and_says_so(demo_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from million_gguf.bindings import llama

    llama._said.clear()
    with closing(load(demo_gguf, "auto")) as llm:
        assert llm.kv_cache_types == ("pq4", "pq4")
        assert complete(llm, n=2)
    with closing(load(demo_gguf, "auto")):
        pass
    assert capsys.readouterr().err.count("KV cache pq4") == 1  # once


@pytest.mark.native
def test_auto_takes_f16_without_codebooks(plain_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(load(plain_gguf, "auto")) as llm:
        assert llm.kv_cache_types == ("f16", "f16")
    said = capsys.readouterr().err
    assert "KV cache f16" in said and "million calibrate" in said


@pytest.mark.native
def test_auto_takes_what_the_file_has(demo_gguf: Path, tmp_path: Path) -> None:
    gone = {f"million.pq4.{k}": None for k in ("k", "v", "k.error", "v.error")}
    path = edit(demo_gguf, tmp_path / "no-pq4.gguf", {**gone, "million.types": string_array(["pq3", "pq2"])})
    with closing(load(path, "auto")) as llm:
        assert llm.kv_cache_types == ("pq3", "pq3")
    with pytest.raises(MismatchError, match="none for pq4"):
        load(path, "pq4")


@pytest.mark.native
@pytest.mark.parametrize("name", sorted(PQ_TYPES))
def test_a_file_without_codebooks_is_refused(plain_gguf: Path, name: str) -> None:
    with pytest.raises(MismatchError, match="million calibrate"):
        load(plain_gguf, name)
    with pytest.raises(MismatchError, match="million calibrate"):
        load(plain_gguf, ("f16", name))


@pytest.mark.native
@pytest.mark.parametrize("kv_cache", ["pq4", "auto"])
def test_codebooks_of_another_model_are_refused(demo_gguf: Path, tmp_path: Path, kv_cache: str) -> None:
    path = edit(demo_gguf, tmp_path / "other.gguf", {"million.model_digest": encoded(VT.STRING, "0123456789abcdef")})
    with pytest.raises(MismatchError, match="another model"):
        load(path, kv_cache)
    with closing(load(path, "f16")) as llm:  # the model itself is sound
        assert complete(llm, n=2)


@pytest.mark.native
def test_broken_codebooks_are_refused(demo_gguf: Path, tmp_path: Path) -> None:
    blobs = strings(demo_gguf, "million.pq4.v")
    blobs[-1] = blobs[-1][:-8]
    path = edit(demo_gguf, tmp_path / "broken.gguf", {"million.pq4.v": string_array(blobs)})
    with pytest.raises(MillionError, match=f"blk.{len(blobs) - 1} V"):
        load(path, "pq4")


@pytest.mark.native
def test_arguments_that_contradict_each_other(demo_gguf: Path) -> None:
    with pytest.raises(InputError, match="type_k"):
        load(demo_gguf, "pq4", type_k=1)
    with pytest.raises(InputError, match="flash attention"):
        load(demo_gguf, "pq4", flash_attn=False)
    with pytest.raises(InputError, match="known types"):
        load(demo_gguf, "pq5")


@pytest.mark.native
def test_the_types_of_llama_cpp_can_be_pq(demo_gguf: Path, plain_gguf: Path) -> None:
    number = PQ_TYPES["pq4"].ggml_type
    with closing(load(demo_gguf, type_k=number, type_v=number, flash_attn=True)) as llm:
        assert llm.kv_cache_types == ("pq4", "pq4")
    with pytest.raises(MismatchError, match="million calibrate"):
        load(plain_gguf, type_k=number, type_v=number, flash_attn=True)


@pytest.mark.native
def test_native_errors_carry_their_reason(tmp_path: Path, demo_gguf: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "none.gguf")
    with pytest.raises(InputError, match="not a file"):
        load(tmp_path)
    (tmp_path / "text.gguf").write_text("this is no model, " * 100)
    with pytest.raises(NativeError, match="magic"):
        load(tmp_path / "text.gguf")
    (tmp_path / "half.gguf").write_bytes(demo_gguf.read_bytes()[: demo_gguf.stat().st_size // 2])
    with pytest.raises(NativeError, match="half.gguf.*(file bounds|corrupted|incomplete)"):
        load(tmp_path / "half.gguf")
    with pytest.raises(NativeError):
        load(demo_gguf, lora_path=str(tmp_path / "text.gguf"))
    gc.collect()  # what is left of the half-made objects raises nothing


# ---- what is inherited ----


@pytest.mark.native
def test_it_is_a_llama_of_llama_cpp(demo_gguf: Path) -> None:
    from million_gguf import Llama

    import llama_cpp  # isort: skip  # after ours

    with closing(load(demo_gguf, "pq4")) as llm:
        assert isinstance(llm, llama_cpp.Llama) and isinstance(llm, Llama)
        pieces = [
            c["choices"][0]["text"] for c in llm.create_completion(PROMPT, max_tokens=8, temperature=0, stream=True)
        ]
        assert "".join(pieces) == complete(llm, n=8)
        grammar = llama_cpp.LlamaGrammar.from_string('root ::= " yes" | " no"', verbose=False)
        answer = llm.create_completion(PROMPT, max_tokens=8, temperature=0, grammar=grammar)["choices"][0]["text"]
        assert answer in (" yes", " no", "yes", "no")


@pytest.mark.native
def test_from_pretrained_passes_kv_cache_on(demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hub that is a folder."""
    hub = pytest.importorskip("huggingface_hub")
    from million_gguf import Llama

    class Files:
        def ls(self, repo: str, recursive: bool) -> list[str]:
            return [f"{repo}/{demo_gguf.name}"]

    monkeypatch.setattr(hub, "HfFileSystem", Files)
    monkeypatch.setattr(hub, "hf_hub_download", lambda **kw: str(demo_gguf))
    llm = Llama.from_pretrained("someone/demo", "*.gguf", kv_cache="pq4", n_ctx=N_CTX, verbose=False)
    with closing(llm):
        assert isinstance(llm, Llama)
        assert llm.kv_cache_types == ("pq4", "pq4")


@pytest.mark.native
@pytest.mark.parametrize("kv_cache", ["pq4", ("pq4", "pq2"), None])
def test_pickling_keeps_the_cache_types(demo_gguf: Path, kv_cache: Any) -> None:
    with closing(load(demo_gguf, kv_cache)) as llm:
        types, text = llm.kv_cache_types, complete(llm, n=8)
        raw = pickle.dumps(llm)
    with closing(pickle.loads(raw)) as again:
        assert again.kv_cache_types == types
        assert complete(again, n=8) == text


# ---- state, sequences, shift ----


def last_logits(llm: Any) -> npt.NDArray[np.float32]:
    """A copy of the logits of the last decoded token."""
    import llama_cpp

    pointer = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    return np.ctypeslib.as_array(pointer, shape=(llm.n_vocab(),)).copy()


@pytest.mark.native
def test_a_restored_state_continues_with_the_same_logits(pq_llm: Any) -> None:
    pq_llm.reset()
    pq_llm.eval(pq_llm.tokenize(b"The history of the world is long, and"))
    state = pq_llm.save_state()
    more = pq_llm.tokenize(b" nobody knows all of it", add_bos=False)
    want = []
    for token in more:
        pq_llm.eval([token])
        want.append(last_logits(pq_llm))
    pq_llm.reset()
    pq_llm.eval(pq_llm.tokenize(b"Something else entirely was written here, over the same cells of the cache"))
    pq_llm.load_state(state)
    for token, expected in zip(more, want, strict=True):
        pq_llm.eval([token])
        np.testing.assert_array_equal(last_logits(pq_llm), expected)


@pytest.mark.native
def test_a_state_of_another_cache_type_is_refused(demo_gguf: Path) -> None:
    with closing(load(demo_gguf, "pq4")) as llm:
        llm.eval(llm.tokenize(PROMPT.encode()))
        state = llm.save_state()
    with closing(load(demo_gguf, "pq2")) as other, pytest.raises(NativeError, match="state"):
        other.load_state(state)


@pytest.mark.native
@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.parametrize("name", ["pq4", "pq3", "pq2"])
def test_two_sequences_in_one_batch_equal_two_runs(demo_gguf: Path, name: str, unified: bool) -> None:
    texts = ["The history of the world is long", "To install the package, you need to run"]
    prompts = [tokens_of(demo_gguf, t) for t in texts]
    alone = []
    for prompt in prompts:
        with closing(LowLevel(demo_gguf, name, N_CTX, 1, unified)) as run:
            alone.append(
                (
                    run.decode([(t, i, 0) for i, t in enumerate(prompt[:-2])]),
                    *(run.decode([(prompt[i], i, 0)]) for i in (len(prompt) - 2, len(prompt) - 1)),
                )
            )
    with closing(LowLevel(demo_gguf, name, N_CTX, 2, unified)) as run:
        both = run.decode([(t, i, s) for s, p in enumerate(prompts) for i, t in enumerate(p[:-2])])
        cut = len(prompts[0]) - 2
        close_to(both[:cut], alone[0][0])
        close_to(both[cut:], alone[1][0])
        for step in (1, 2):  # single tokens of both sequences, each at its own position
            found = run.decode([(p[len(p) - 3 + step], len(p) - 3 + step, s) for s, p in enumerate(prompts)])
            for s in (0, 1):
                close_to(found[s], alone[s][step][0])


@pytest.mark.native
@pytest.mark.parametrize("name", ["pq4", "pq3", "pq2"])
def test_a_copied_sequence_continues_as_its_source(demo_gguf: Path, name: str) -> None:
    prompt = tokens_of(demo_gguf, "The history of the world is long")
    with closing(LowLevel(demo_gguf, name, N_CTX, 2, unified=True)) as run:
        run.decode([(t, i, 0) for i, t in enumerate(prompt[:-1])])
        run.low.llama_memory_seq_cp(run.memory, 0, 1, -1, -1)
        found = run.decode([(prompt[-1], len(prompt) - 1, s) for s in (0, 1)])
        close_to(found[0], found[1])


@pytest.mark.native
@pytest.mark.parametrize("name", ["f16", "pq4", "pq3", "pq2"])
def test_context_shift_keeps_generating(demo_gguf: Path, name: str) -> None:
    """Past the end of a small context: drop the older half, move the rest down, go on, three times over."""
    n_ctx, n_keep = 256, 4
    prompt = tokens_of(demo_gguf, PROMPT)
    with closing(LowLevel(demo_gguf, name, n_ctx, 1, unified=True)) as run:
        low = run.low
        assert low.llama_memory_can_shift(run.memory)
        logits = run.decode([(t, i, 0) for i, t in enumerate(prompt)])[-1]
        position, shifts, said = len(prompt), 0, []
        while shifts < 3:
            if position == n_ctx:
                dropped = (position - n_keep) // 2
                assert low.llama_memory_seq_rm(run.memory, 0, n_keep, n_keep + dropped)
                low.llama_memory_seq_add(run.memory, 0, n_keep + dropped, position, -dropped)
                position -= dropped
                shifts += 1
            said.append(int(logits.argmax()))
            logits = run.decode([(said[-1], position, 0)])[0]
            assert np.isfinite(logits).all()
            position += 1
        after = said[-16:]
        # Still a model that is sure of something: a broken cache gives nearly flat, or wildly peaked, garbage.
        x = logits.astype(np.float64) - logits.max()
        entropy = -(np.exp(x) / np.exp(x).sum() * (x - np.log(np.exp(x).sum()))).sum()
        assert entropy < 0.8 * np.log(run.n_vocab)
        assert all(0 <= t < run.n_vocab for t in after)


@pytest.mark.native
def test_shifted_codes_predict_like_shifted_f16(demo_gguf: Path) -> None:
    """After one shift, the next-token distribution of pq4 is near that of f16 on the same tokens."""
    text = (Path(__file__).parent.parent / "converters" / "data" / "calibration.txt").read_bytes()[:3000]
    tokens = tokens_of(demo_gguf, text.decode("utf-8", "ignore"))[:300]
    assert len(tokens) == 300
    results = {}
    for name in ("f16", "pq4"):
        with closing(LowLevel(demo_gguf, name, 256, 1, unified=True)) as run:
            run.decode([(t, i, 0) for i, t in enumerate(tokens[:256])])
            assert run.low.llama_memory_seq_rm(run.memory, 0, 4, 130)
            run.low.llama_memory_seq_add(run.memory, 0, 130, 256, -126)
            x = run.decode([(t, 130 + i, 0) for i, t in enumerate(tokens[256:])]).astype(np.float64)
            x -= x.max(axis=1, keepdims=True)
            results[name] = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    kl = (np.exp(results["f16"]) * (results["f16"] - results["pq4"])).sum(axis=1).mean()
    assert kl < 0.2
