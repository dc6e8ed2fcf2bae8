"""``million chat``: talk to a model at the terminal, or ask it once."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..container import GGUFHeader
from ..errors import InputError
from ..signals import STOPPING
from .options import MODEL_HELP, add_ctx, add_runtime, at_least, chosen_ctx

if TYPE_CHECKING:
    from ..bindings.llama import Llama

_HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"
_BASE_TOKENS = 256  # a base model seldom ends its text by itself
_ROOM = 64  # tokens of the context that a prompt leaves for the answer, at least


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "chat",
        help="chat with a model, with a product-quantized KV cache",
        description="Chat with a model. With -p, or with a prompt on standard input, answer once and leave. A model without "
        "chat template (a base model) continues the text that it is given.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL.gguf", help=MODEL_HELP)
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="answer this and leave; '-' reads standard input")
    parser.add_argument(
        "--kv",
        default="auto",
        metavar="TYPE",
        help="KV cache type: pq4, pq3, pq2, f16, q8_0, ...; K,V for a pair; auto (the default) is pq4 if the file has "
        "codebooks, else f16",
    )
    parser.add_argument(
        "--kv-tail",
        type=at_least(0),
        metavar="N",
        help="most recent tokens that a PQ cache also keeps exact (default: 128; 0: none)",
    )
    add_ctx(parser, "context")
    parser.add_argument(
        "-n",
        "--max-tokens",
        type=at_least(1),
        metavar="N",
        help="longest answer (default: what fits; 256 for a base model)",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--temp", type=float, default=0.8, metavar="X", help="temperature; 0 is greedy (default: 0.8)")
    parser.add_argument("--seed", type=at_least(0), metavar="N", help="seed of the sampling (default: random)")
    add_runtime(parser)
    parser.add_argument("--stats", action="store_true", help="print cache bytes and tokens/s on stderr")
    parser.add_argument("--verbose", action="store_true", help="show what llama.cpp logs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if not args.temp >= 0:
        raise InputError(f"--temp is {args.temp}, need 0 or more")
    prompt = args.prompt
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        prompt = _read_stdin()
    if prompt is not None and not prompt.strip():
        raise InputError(
            "the prompt is empty: give one with -p, on standard input, or run 'million chat' in a terminal"
        )

    from ..bindings.llama import Llama

    with GGUFHeader(args.model) as header:
        n_ctx = chosen_ctx(args.ctx, header)
    options: dict[str, Any] = {} if args.seed is None else {"seed": args.seed}
    if args.threads is not None:
        options.update(n_threads=args.threads, n_threads_batch=args.threads)
    llm = Llama(
        args.model,
        kv_cache=args.kv,
        kv_tail=args.kv_tail,
        n_ctx=n_ctx,
        n_gpu_layers=args.n_gpu_layers,
        verbose=args.verbose,
        **options,
    )
    with closing(llm):
        session = Session(llm, system=args.system, max_tokens=args.max_tokens, temperature=args.temp)
        if prompt is not None:
            session.answer(prompt)
            if args.stats:
                session.print_stats()
            if session.stopped:
                raise KeyboardInterrupt
            return 0
        return _interact(session, args)


def _read_stdin() -> str:
    try:
        return sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as e:
        raise InputError(f"standard input is not text in {e.encoding}: byte {e.start}") from None


def _interact(session: Session, args: argparse.Namespace) -> int:
    try:
        import readline  # noqa: F401  # line editing and history for input()
    except ImportError:
        pass  # not on Windows
    types = "/".join(dict.fromkeys(session.llm.kv_cache_types))
    print(f"{args.model.name}, {types} cache, context {session.llm.n_ctx()}\n{_HELP}", file=sys.stderr)
    if not session.has_template:
        print("This is a base model (no chat template): it continues the text that you type.", file=sys.stderr)
        if args.system:
            print("It has no place for a system message: --system is put before the text.", file=sys.stderr)
    while True:
        try:
            line = input("> ")
        except EOFError:
            print(file=sys.stderr)
            return 0
        except KeyboardInterrupt:
            print(f"\n({_HELP})", file=sys.stderr)
            continue
        command = line.strip()
        if command in ("/exit", "/quit"):
            return 0
        if command == "/reset":
            session.reset()
            print("(a new conversation)", file=sys.stderr)
        elif command == "/help":
            print(f"({_HELP})", file=sys.stderr)
        elif command:
            try:
                session.answer(line)
            except InputError as e:  # such as a line longer than the context: the conversation goes on
                print(f"({e})", file=sys.stderr)
                continue
            if args.stats:
                session.print_stats()


class Session:
    """A conversation: its messages, or its text when the model has no chat template.

    Attributes:
        llm: the model.
        has_template: whether the file has a chat template.
        stopped: the last answer was stopped by Ctrl-C.
    """

    def __init__(self, llm: Llama, *, system: str | None, max_tokens: int | None, temperature: float) -> None:
        self.llm = llm
        self.has_template = "tokenizer.chat_template" in llm.metadata
        self.stopped = False
        self._system = system
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._n_tokens = 0
        self._first_s = 0.0  # from the question to the first token
        self._rest_s = 0.0
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.llm.reset()
        self._text = f"{self._system}\n" if self._system and not self.has_template else ""
        self._messages: list[dict[str, str]] = []
        if self._system and self.has_template:
            self._messages.append({"role": "system", "content": self._system})

    def answer(self, question: str) -> str:
        """Stream the answer to stdout and return it. Ctrl-C ends it early; what was said stays in the conversation.

        Raises InputError when the question alone does not fit the context.
        """
        from ..bindings.interrupt import Interrupt

        self.stopped = False
        messages, text = list(self._messages), self._text
        self._messages.append({"role": "user", "content": question})
        self._text += f"\n{question}" if self._text and not self._text.endswith("\n") else question
        said, printed_at = "", 0.0
        self._n_tokens, self._first_s, self._rest_s = 0, 0.0, 0.0
        started = time.perf_counter()
        with Interrupt() as interrupt:
            low = _low_level()
            # llama.cpp asks between the nodes of a graph, so that a long prompt can be stopped too; once tokens
            # come, the loop below asks often enough.
            low.llama_set_abort_callback(self.llm.ctx, interrupt.callback, None)
            try:
                for piece in self._stream():
                    if interrupt.requested:
                        break
                    if not piece:
                        continue
                    if not self._n_tokens:
                        low.llama_set_abort_callback(self.llm.ctx, low.ggml_abort_callback(), None)
                        printed_at = time.perf_counter()
                        self._first_s = printed_at - started
                    self._n_tokens += 1
                    said += piece
                    print(piece, end="", flush=True)
            except BaseException:
                if not interrupt.requested:  # else it was stopped in the prompt, and that is what the user wanted
                    self._messages, self._text = messages, text
                    raise
            finally:
                low.llama_set_abort_callback(self.llm.ctx, low.ggml_abort_callback(), None)
            self.stopped = interrupt.requested
            if interrupt.received in STOPPING:  # that one is for the program
                interrupt.check()
        if self._n_tokens:
            self._rest_s = time.perf_counter() - printed_at
        print(flush=True)
        if said:
            self._messages.append({"role": "assistant", "content": said})
            self._text += said
        else:
            self._messages, self._text = messages, text
        return said

    def _stream(self) -> Iterator[str]:
        if not self.has_template:
            self._shorten_text()
            for chunk in self.llm.create_completion(
                self._text, max_tokens=self._limit(), temperature=self._temperature, stream=True
            ):
                yield chunk["choices"][0]["text"]
            return
        while True:
            stream = self.llm.create_chat_completion(
                self._messages, max_tokens=self._limit(), temperature=self._temperature, stream=True
            )
            try:
                for chunk in stream:
                    piece = chunk["choices"][0]["delta"].get("content")
                    if piece:
                        yield piece
                return
            except ValueError as e:
                if "exceed context window" not in str(e):
                    raise
                self._forget_oldest()

    def _limit(self) -> int:
        if self._max_tokens is not None:
            return self._max_tokens
        return -1 if self.has_template else _BASE_TOKENS

    def _forget_oldest(self) -> None:
        """Drop the oldest exchange of a conversation that has outgrown the context."""
        first = 1 if self._messages[0]["role"] == "system" else 0
        if len(self._messages) - first <= 1:
            raise InputError(f"this does not fit the context of {self.llm.n_ctx()} tokens: give a larger one with -c")
        del self._messages[first : first + 2]
        print("(the conversation has outgrown the context: its oldest part is forgotten)", file=sys.stderr)

    def _shorten_text(self) -> None:
        tokens = self.llm.tokenize(self._text.encode("utf-8"), add_bos=False)
        room = self.llm.n_ctx() - _ROOM
        if len(tokens) <= room:
            return
        if not self._text_before_question():
            raise InputError(f"this does not fit the context of {self.llm.n_ctx()} tokens: give a larger one with -c")
        kept = self.llm.detokenize(tokens[-room // 2 :])  # half, so that it does not happen again at once
        self._text = kept.decode("utf-8", "ignore")
        print("(the text has outgrown the context: its oldest part is forgotten)", file=sys.stderr)

    def _text_before_question(self) -> bool:
        return len(self._text) > len(self._messages[-1]["content"])

    def print_stats(self) -> None:
        """Cache bytes and speed of the last answer, on stderr."""
        types = self.llm.kv_cache_types
        now, f16 = self.llm.kv_cache_bytes, self.llm.kv_cache_bytes_f16
        ratio = f", {f16 / now:.2f}x smaller than f16's {f16}" if now else ""
        # The first token is the prompt's; the rate is that of the others.
        rate = (self._n_tokens - 1) / self._rest_s if self._n_tokens > 1 and self._rest_s > 0 else 0.0
        speed = f"{self._n_tokens} tokens, first after {self._first_s:.2f} s, then {rate:.1f} tokens/s"
        print(f"[cache K {types[0]} V {types[1]}: {now} bytes{ratio}]\n[{speed}]", file=sys.stderr, flush=True)


def _low_level() -> Any:
    from ..bindings import native

    return native.llama_cpp()
