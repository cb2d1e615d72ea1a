"""Trains the embedded model: a small Qwen2.5-architecture chat model, from `corpus.py` alone.

    python train.py --out /tmp/builtin-float --steps 11873   # one GPU: 8 minutes; CPU: days
    python train.py --out /tmp/builtin-float --smoke         # a minute on a CPU, learns nothing
    python quantise.py /tmp/builtin-float                    # int4 by GPTQModel, checks, eval.json

Needs torch, numpy, tokenizers and safetensors. Writes an ordinary Hugging Face folder in float16.
The last part of the training sees its linear weights rounded to int4 as GPTQ will round them, so
that quantisation costs almost nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers, processors, trainers
from torch import Tensor, nn

import corpus
from corpus import Message

IGNORED = -100  # a label that the loss skips

# --------------------------------------------------------------------------------------------
# Tokenizer: byte-level BPE with Qwen's pre-tokenizer (digits stand alone) and ChatML tokens
# --------------------------------------------------------------------------------------------

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BPE_VOCABULARY = 1400


def train_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(1)
    texts = [
        f"{role}\n{text}"
        for _ in range(20_000)
        for role, text in [("system", corpus.DEFAULT_SYSTEM)] + corpus.conversation(rng, 1, 0.1)
    ]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=BPE_VOCABULARY,
            min_frequency=2,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer


class Renderer:
    """Turns conversations into token ids exactly as the chat template does."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.start = tokenizer.token_to_id("<|im_start|>")
        self.end = tokenizer.token_to_id("<|im_end|>")
        self.newline = self.encode("\n")
        self.assistant = [self.start, *self.encode("assistant\n")]
        self.default_system = self.turn("system", corpus.DEFAULT_SYSTEM)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def turn(self, role: str, text: str) -> list[int]:
        return [self.start, *self.encode(f"{role}\n{text}"), self.end, *self.newline]

    def render(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        """Ids, and which of them the model learns: answers with their end mark."""
        ids = [] if messages[0][0] == "system" else list(self.default_system)
        learnt = [False] * len(ids)
        for role, text in messages:
            if role != "assistant":
                turn = self.turn(role, text)
                ids += turn
                learnt += [False] * len(turn)
            else:
                answer = [*self.encode(text), self.end]
                ids += self.assistant + answer + self.newline
                learnt += [False] * len(self.assistant) + [True] * len(answer)
                learnt += [False] * len(self.newline)
        return ids, learnt

    def prompt(self, messages: list[Message]) -> list[int]:
        return self.render(messages)[0] + self.assistant


# --------------------------------------------------------------------------------------------
# Data: a pool of rendered conversations, made once by all processor cores
# --------------------------------------------------------------------------------------------


ROW_TOKENS = 192
SUMS = 0.65  # fraction of turns that are sums


def make_rows(job: tuple[int, int, str]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of whole conversations, one after another until no more fits; most have one turn."""
    rows, seed, tokenizer_json = job
    renderer = Renderer(Tokenizer.from_str(tokenizer_json))
    rng = random.Random(seed)
    inputs = np.zeros((rows, ROW_TOKENS), dtype=np.int16)
    labels = np.full((rows, ROW_TOKENS), IGNORED, dtype=np.int16)
    row = used = 0
    while row < rows:
        turns = rng.choice((1, 1, 1, 1, 1, 1, 2, 3))
        ids, learnt = renderer.render(corpus.conversation(rng, turns, SUMS))
        n = len(ids) - 1
        if used + n > ROW_TOKENS:
            row, used = row + 1, 0
            if row == rows or n > ROW_TOKENS:
                continue
        inputs[row, used : used + n] = ids[:-1]
        labels[row, used : used + n] = np.where(learnt[1:], ids[1:], IGNORED)
        used += n
    return inputs, labels


def make_pool(rows: int, seed: int, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """(rows, tokens) int16 inputs and labels. The same seed gives the same pool anywhere."""
    parts = 64
    jobs = [(rows // parts, seed * 1000 + part, tokenizer.to_str()) for part in range(parts)]
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as workers:
        made = workers.map(make_rows, jobs, chunksize=1)
    inputs = torch.from_numpy(np.concatenate([m[0] for m in made]))
    labels = torch.from_numpy(np.concatenate([m[1] for m in made]))
    return inputs, labels


# --------------------------------------------------------------------------------------------
# Network: Qwen2, with Hugging Face's parameter names
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 512

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


GROUP = 32
LEVELS = 16


def round_to_int4(weight: Tensor) -> Tensor:
    """What symmetric int4 GPTQ stores, before its error compensation; gradients pass through."""
    rows, columns = weight.shape
    groups = weight.view(rows, columns // GROUP, GROUP)
    scale = (2.0 / (LEVELS - 1)) * groups.abs().amax(dim=-1, keepdim=True).clamp(min=1e-8)
    scale = scale.half().float().detach()
    rounded = torch.clamp(torch.round(groups / scale), -LEVELS // 2, LEVELS // 2 - 1) * scale
    return (groups + (rounded - groups).detach()).view(rows, columns)


class Linear(nn.Linear):
    rounding = False

    def forward(self, x: Tensor) -> Tensor:
        weight = round_to_int4(self.weight) if Linear.rounding else self.weight
        return F.linear(x, weight, self.bias)


class RMSNorm(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.hidden_size))
        self.eps = shape.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        query, key = shape.hidden_size, shape.num_key_value_heads * shape.head_dim
        self.q_proj = Linear(shape.hidden_size, query, bias=True)
        self.k_proj = Linear(shape.hidden_size, key, bias=True)
        self.v_proj = Linear(shape.hidden_size, key, bias=True)
        self.o_proj = Linear(query, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, _ = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, tokens, -1, self.shape.head_dim).transpose(1, 2)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        shared = self.shape.num_attention_heads // self.shape.num_key_value_heads
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, tokens, -1))


class Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Network(nn.Module):
    """Ids (batch, tokens) -> logits (batch, tokens, vocab); embeddings are tied."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape)
        frequencies = 1.0 / shape.rope_theta ** (
            torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
        )
        angles = torch.outer(torch.arange(shape.max_position_embeddings).float(), frequencies)
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * shape.num_hidden_layers) if last else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: Tensor, last: Tensor | None = None) -> Tensor:
        """Logits everywhere, or at each row's position `last` alone (batch, vocab)."""
        batch, tokens = ids.shape
        cos, sin = self.cos[:tokens], self.sin[:tokens]
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        if last is not None:
            x = x[torch.arange(batch, device=x.device), last]
        return F.linear(self.norm(x), self.embed_tokens.weight)


@torch.no_grad()
def answer(network: Network, renderer: Renderer, questions: list[str], device: str) -> list[str]:
    """Greedy answers, batched, without a cache (sequences are short)."""
    prompts = [renderer.prompt([("user", q)]) for q in questions]
    longest = max(map(len, prompts)) + 64
    ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    ends = torch.tensor([len(p) for p in prompts], device=device)
    rows = torch.arange(len(prompts), device=device)
    open_rows = torch.ones(len(prompts), dtype=torch.bool, device=device)
    while open_rows.any() and int(ends.max()) < longest:
        token = network(ids[:, : int(ends.max())], ends - 1).argmax(-1)
        open_rows &= token != renderer.end
        ids[rows[open_rows], ends[open_rows]] = token[open_rows]
        ends = ends + open_rows
    return [
        renderer.tokenizer.decode(ids[row, len(prompt) : int(ends[row])].tolist())
        for row, prompt in enumerate(prompts)
    ]


def score(network: Network, renderer: Renderer, device: str, count: int) -> dict[str, Any]:
    """Exact answers to held-out sums and card facts, and the first mistakes."""
    network.eval()
    rng = random.Random(77)
    sums: list[tuple[str, str]] = []
    while len(sums) < count:
        a, sign, b = rng.randint(0, 999), rng.choice("+-"), rng.randint(0, 999)
        if corpus.held_out(a, sign, b):
            sums.append((corpus.ask_sum(rng, a, sign, b), corpus.answer_sum(a, sign, b)))
    given = answer(network, renderer, [q for q, _ in sums], device)
    wrong = [(q, g) for (q, want), g in zip(sums, given, strict=True) if g != want]
    facts = corpus.evaluation()["card_facts"][:count]
    said = answer(network, renderer, [f["question"] for f in facts], device)
    wrong_facts = [
        (f["question"], g) for f, g in zip(facts, said, strict=True) if f["expected"] not in g
    ]
    network.train()
    return {
        "sums": 1 - len(wrong) / len(sums),
        "card_facts": 1 - len(wrong_facts) / len(facts),
        "mistakes": wrong[:5] + wrong_facts[:5],
    }


# --------------------------------------------------------------------------------------------
# Writing the folder
# --------------------------------------------------------------------------------------------


def write_folder(network: Network, tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"model.{name}": tensor.detach().half().cpu().contiguous()
        for name, tensor in network.state_dict().items()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    shape = asdict(network.shape)
    shape.pop("rope_theta")
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": network.shape.rope_theta},
        "bos_token_id": pad,
        "eos_token_id": end,
        "dtype": "float16",
        **shape,
    }
    generation = {
        "bos_token_id": pad,
        "pad_token_id": pad,
        "eos_token_id": [end, pad],
        "do_sample": False,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": network.shape.max_position_embeddings,
        "chat_template": corpus.CHAT_TEMPLATE,
    }
    tokenizer.save(str(out / "tokenizer.json"))
    for name, value in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer_config),
    ):
        (out / name).write_text(json.dumps(value, indent=2) + "\n")


# --------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    rows: int = 1_200_000  # of the pool, each of about 3.5 conversations
    batch: int = 768
    peak_rate: float = 2e-3
    warmup: int = 400
    weight_decay: float = 0.1
    rounding_from: float = 0.65  # of all steps: weights are rounded to int4 from here on
    scored: int = 2000  # held-out sums per report
    reports: int = 6


SMOKE = Recipe(rows=640, batch=8, warmup=5, scored=4, reports=1)


class Batches:
    """Shuffled rows of a pool, epoch after epoch."""

    def __init__(self, pool: tuple[Tensor, Tensor], batch: int, device: str, seed: int) -> None:
        self.inputs, self.labels = (part.to(device) for part in pool)
        self.batch = batch
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.long, device=device)

    def next(self) -> tuple[Tensor, Tensor]:
        if len(self.order) < self.batch:
            order = torch.randperm(len(self.inputs), generator=self.generator)
            self.order = order.to(self.inputs.device)
        rows, self.order = self.order[: self.batch], self.order[self.batch :]
        return self.inputs[rows].long(), self.labels[rows].long()


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    if step < recipe.warmup:
        return recipe.peak_rate * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, steps - recipe.warmup)
    return recipe.peak_rate * (0.005 + 0.995 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(
    recipe: Recipe, steps: int, minutes: float | None, out: Path, seed: int, compiled: bool
) -> None:
    began = time.monotonic()
    tokenizer = train_tokenizer()
    renderer = Renderer(tokenizer)
    pool = make_pool(recipe.rows, seed, tokenizer)
    print(f"data made after {time.monotonic() - began:.0f} s", flush=True)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    vocabulary = -(-tokenizer.get_vocab_size() // 64) * 64
    network = Network(Shape(vocab_size=vocabulary)).to(device)
    parameters = sum(p.numel() for p in network.parameters())
    print(f"{parameters} parameters, {vocabulary} tokens, on {device}", flush=True)
    batches = Batches(pool, recipe.batch, device, seed)

    decayed = [p for p in network.parameters() if p.dim() == 2]
    others = [p for p in network.parameters() if p.dim() != 2]
    optimiser = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=recipe.peak_rate,
        betas=(0.9, 0.98),
        fused=device == "cuda",
    )

    def loss_of(ids: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            logits = network(ids)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)

    step_loss = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    training_began = mark = time.monotonic()
    step = 0
    while step < steps:
        rounding = step >= recipe.rounding_from * steps
        if rounding != Linear.rounding:
            Linear.rounding = rounding
            torch.compiler.reset()
        rate = learning_rate(step, steps, recipe)
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss = step_loss(*batches.next())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step += 1
        if minutes is not None and step in (100, 400):
            # Fit the number of steps to the time given, once compilation is behind us.
            now = time.monotonic()
            if step == 400:
                per_step = (now - mark) / 300
                left = minutes * 60 - (now - began)
                steps = step + int(left / per_step)
                print(f"{per_step * 1000:.1f} ms a step: {steps} steps fit", flush=True)
            mark = now
        if step % max(1, steps // recipe.reports) == 0 or step == steps:
            seconds = time.monotonic() - training_began
            result = score(network, renderer, device, recipe.scored)
            write_folder(network, tokenizer, out)
            print(
                f"step {step} of {steps}, {seconds:.0f} s, loss {loss.item():.4f}, gradient "
                f"{norm.item():.3f}, int4 {Linear.rounding}: {json.dumps(result)}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=11_873)
    parser.add_argument("--minutes", type=float, help="choose the steps to fit this time instead")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--eager", action="store_true", help="do without torch.compile")
    parser.add_argument("--smoke", action="store_true", help="a few steps on little data")
    args = parser.parse_args()
    if args.smoke:
        train(SMOKE, min(args.steps, 60), None, args.out, args.seed, compiled=False)
    else:
        compiled = torch.cuda.is_available() and not args.eager
        train(Recipe(), args.steps, args.minutes, args.out, args.seed, compiled)


if __name__ == "__main__":
    main()
