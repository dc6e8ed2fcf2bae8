"""Train the demo model: a 2 M parameter Llama checkpoint small enough to live in the repository.

    python train.py --text corpus.txt --out .

Needs torch, transformers, safetensors and sentencepiece. On one CPU core the default run takes
about twenty minutes. Every file is written under a temporary name and renamed when complete, so an
interrupted run leaves the previous checkpoint as it was.
"""

import argparse
import io
import json
import math
import os
import sys
import time
from pathlib import Path

import sentencepiece as spm
import torch
from safetensors.torch import save
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 2048
BOS, EOS = 1, 2  # unk is 0, as in every Llama tokenizer
HELD_OUT = 0.02  # share of the text, taken from its end


def write(path: Path, data: bytes) -> None:
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_bytes(data)
    os.replace(tmp, path)


def write_json(path: Path, value: dict) -> None:
    write(path, (json.dumps(value, indent=2) + "\n").encode())


def train_tokenizer(text: str) -> bytes:
    """SentencePiece BPE with byte fallback; returns the serialized model."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB,
        byte_fallback=True,
        unk_id=0,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",  # llama.cpp does not apply the NFKC table
        max_sentence_length=16384,
        num_threads=1,  # merges are then the same on every machine
        minloglevel=2,
    )
    return model.getvalue()


def model_config(n_ctx: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,  # not hidden_size / num_attention_heads: 64 is the smallest head the cache types serve
        max_position_embeddings=n_ctx,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def batch_at(tokens: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
    """tokens [n], starts [b] -> [b][length], each row opened by BOS as at inference."""
    rows = torch.stack([tokens[s : s + length - 1] for s in starts.tolist()])
    return torch.cat([torch.full((len(rows), 1), BOS), rows], dim=1)


@torch.no_grad()
def loss_on(model: LlamaForCausalLM, tokens: torch.Tensor, length: int) -> float:
    """Mean next-token loss, nats per token, over consecutive windows."""
    model.eval()
    total = n = 0
    for start in range(0, len(tokens) - 1, length - 1):
        ids = batch_at(tokens, torch.tensor([start]), length)  # the last window may be shorter
        total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        n += ids.shape[1] - 1
    model.train()
    return total / n


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warmup, then a cosine down to a twentieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    x = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * x)))


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--text", type=Path, required=True, help="training text, UTF-8")
    ap.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for the checkpoint")
    ap.add_argument("--steps", type=int, default=2400)
    ap.add_argument("--batch", type=int, default=2, help="sequences per step")
    ap.add_argument("--seq-len", type=int, default=512, help="tokens per sequence, BOS included")
    ap.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    ap.add_argument("--weight-decay", type=float, default=0.1)
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--seed", type=int, default=1234)
    args = ap.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    text = args.text.read_text(encoding="utf-8")
    cut = int(len(text) * (1 - HELD_OUT))
    tokenizer_model = train_tokenizer(text[:cut])
    sp = spm.SentencePieceProcessor(model_proto=tokenizer_model)
    train = torch.tensor(sp.encode(text[:cut]))
    held_out = torch.tensor(sp.encode(text[cut:]))
    if len(train) <= args.seq_len:
        print(
            f"{args.text} has {len(train)} tokens, --seq-len {args.seq_len} needs more: give a longer text",
            file=sys.stderr,
        )
        return 1
    print(
        f"{len(train)} training tokens, {len(held_out)} held out, "
        f"{len(text) / (len(train) + len(held_out)):.2f} characters per token",
        flush=True,
    )

    config = model_config(n_ctx=2048)
    model = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": norms, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )

    began = time.monotonic()
    smooth = None
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, warmup=100)
        starts = torch.randint(len(train) - args.seq_len, (args.batch,))
        ids = batch_at(train, starts, args.seq_len)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            seconds = time.monotonic() - began
            left = seconds / (step + 1) * (args.steps - step - 1)
            print(
                f"step {step + 1:5d}/{args.steps}  loss {smooth:.3f}  {seconds:.0f} s, about {left:.0f} s left",
                flush=True,
            )
        if (step + 1) % 600 == 0 and step + 1 < args.steps:
            print(f"held-out loss {loss_on(model, held_out, args.seq_len):.3f} nats/token", flush=True)

    # Evaluate what ships: the weights after rounding to bf16.
    weights = {
        name: p.detach().to(torch.bfloat16).contiguous()
        for name, p in model.state_dict().items()
        if name != "lm_head.weight"
    }
    model.load_state_dict({name: w.float() for name, w in weights.items()}, strict=False)
    print(f"held-out loss {loss_on(model, held_out, args.seq_len):.3f} nats/token (bf16 weights)", flush=True)

    write(args.out / "model.safetensors", save(weights, metadata={"format": "pt"}))
    write(args.out / "tokenizer.model", tokenizer_model)
    write_json(
        args.out / "tokenizer_config.json",
        {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": True,
            "add_eos_token": False,
            "legacy": False,
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        },
    )
    write_json(args.out / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS})
    write_json(
        args.out / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_position_embeddings,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": config.rope_theta,
            "rope_scaling": None,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "torch_dtype": "bfloat16",
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
