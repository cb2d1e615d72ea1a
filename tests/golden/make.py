"""Writes the golden checkpoints: tiny real GPTQ checkpoints and what they must answer.

    pip install -r requirements.txt
    python make.py                  # all of them, into checkpoints/
    python make.py qwen3_4bit_yarn  # only the named ones

Each folder under `checkpoints/` is what a user would download: the files that GPTQModel and
transformers write for a randomly initialised Qwen model of two or three small layers. Beside
them stand two files of ours:

* `golden.safetensors`: token ids and the log-probabilities of every position, computed by
  `transformers` in float32 (eager attention, one full forward over the whole sequence) over
  weights that `read_weights` below dequantises from the written files, bit by bit, without
  any of GPTQModel's code.
* `golden.json`: what the checkpoint covers, its top-2 margins, and notes.

The script asserts that `read_weights` and GPTQModel agree bit for bit on every weight.

Format facts that a reader must honour (read in GPTQModel 7.7.0, and checked by the asserts):

* Values are `bits` wide fields of one little-endian bit stream per column: along K (rows) in
  `qweight`, along N (columns) in `qzeros`. A 3-bit value may straddle two 32-bit words.
* A v2 file (`gptq_v2`) stores zero points as they are. A v1 file (`gptq`) stores them minus one:
  - bits 2, 4, 8: GPTQModel subtracts 0x55555555 / 0x11111111 / 0x01010101 from each WHOLE
    32-bit word when saving and adds it when loading. A zero point of 0 (asymmetric only)
    therefore borrows from the next field, and loading carries back into it. A reader that adds
    one field by field reads the neighbour of such a field wrong: stored nibbles [15, 3] mean
    zero points [0, 5], not [0, 4] and not [16, 4]. The carry out of a word's top field is lost.
  - bits 3: each field is shifted on its own, modulo 8. A stored 7 means zero point 0.
  So a stored 2^bits - 1 always means zero point 0, never 2^bits, and for 2, 4 and 8 bits the
  next field of the same word is one more besides.
* `dynamic` decides per module, by the first pattern that matches the START of its name; GPTQModel
  itself adds a rule for a quantised `lm_head` (8 bits, whatever `bits` says).
* Dequantised weight [k, n] = scales[g_idx[k], n] * (q[k, n] - zero[g_idx[k], n]).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers import Qwen2Config, Qwen3Config

HERE = Path(__file__).resolve().parent
OUT = HERE / "checkpoints"

# --------------------------------------------------------------------------------------------
# The shared tokenizer
# --------------------------------------------------------------------------------------------

# Qwen2's pre-tokenizer: digits stand alone, a word may carry one leading non-letter.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen marks the first three as special and the tool tags as ordinary added tokens.
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PLAIN_ADDED_TOKENS = ["<tool_call>", "</tool_call>"]
BPE_VOCABULARY = 278

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

TEXT = """
A river is older than the bridge that crosses it, and the bridge is older than the song about it.
The old card on the shelf still has twenty-four gigabytes of memory, which is more than the new one.
Every worker reads its own slices of the weights; the coordinator keeps the tokens and the plan.
When two workers share one head, both of them hold its keys and its values.
"Is it faster?" she asked. "It's slower, but it's ours," he said, and they'd laugh about it later.
for (let i = 0; i < 128; i++) { total += weights[i] * inputs[i]; }
In 1969 they went to the moon with 4096 words of memory; in 2016 a P40 had 24576 MiB.
Die alte Brücke über den Fluß ist größer als die neue. Où est la bibliothèque? 日本語のテキスト。
The quick brown fox jumps over the lazy dog, and then the dog thinks about what it has done.
"""

PROMPT_A = "<|im_start|>user\nIs the old card faster?<|im_end|>\n<|im_start|>assistant\n"
PROMPT_B = "The 42 words"
GENERATED_A = 16
GENERATED_B = 5


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer with Qwen's parts and a very small vocabulary."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False, ignore_merges=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_VOCABULARY,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in PLAIN_ADDED_TOKENS])
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


# --------------------------------------------------------------------------------------------
# What is made
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """One checkpoint: its shape, how it is quantised, and how its files are spelled."""

    name: str
    covers: str
    architecture: str = "qwen2"
    hidden: int = 128
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int | None = None  # qwen2: hidden / query_heads
    intermediate: int = 384
    layers: int = 2
    vocabulary: int = 288
    tied: bool = True
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_theta": 10000.0})
    max_positions: int = 512
    bits: int = 4
    group: int = 128
    sym: bool = True
    desc_act: bool = False
    format: str = "gptq"
    dynamic: dict[str, dict[str, Any]] | None = None
    quantise_lm_head: bool = False
    leftovers: torch.dtype = torch.float16
    shard_bytes: int | None = None
    old_spelling: bool = False
    seed: int = 1


SPECS: list[Spec] = [
    Spec(
        "qwen2_4bit_g128",
        "the common case, as the official Qwen2.5 files: int4, group 128, symmetric; untied; "
        "BF16 leftovers; 2026 spelling",
        tied=False,
        leftovers=torch.bfloat16,
    ),
    Spec(
        "qwen2_4bit_g32_old_sharded",
        "group 32, three groups per o_proj, seven per down_proj; the older config spelling, "
        "quantisation block in quantize_config.json only; sharded safetensors with an index",
        hidden=96,
        query_heads=6,
        kv_heads=2,
        intermediate=224,
        group=32,
        rope={"rope_theta": 1000000.0},
        shard_bytes=70_000,
        old_spelling=True,
    ),
    Spec(
        "qwen2_4bit_g64_act_order",
        "act-order (g_idx not monotone), three groups of 64 per down_proj",
        query_heads=4,
        kv_heads=4,
        intermediate=192,
        group=64,
        desc_act=True,
    ),
    Spec(
        "qwen2_2bit_g32_asym",
        "2 bits, asymmetric v1: zero points of 0 borrow from the neighbouring field; 5 query "
        "heads over 1 kv head",
        hidden=160,
        query_heads=5,
        kv_heads=1,
        intermediate=160,
        bits=2,
        group=32,
        sym=False,
    ),
    Spec(
        "qwen2_3bit_g64",
        "3 bits, values across word boundaries; 8 query heads over 2 kv heads of dim 16",
        query_heads=8,
        kv_heads=2,
        intermediate=192,
        bits=3,
        group=64,
    ),
    Spec(
        "qwen2_8bit_channel_f32",
        "8 bits, group -1 (one group per column); 7 query heads over 1 kv head; F32 leftovers; "
        "a vocabulary of 285, which divides by nothing",
        hidden=112,
        query_heads=7,
        kv_heads=1,
        intermediate=144,
        vocabulary=285,
        bits=8,
        group=-1,
        leftovers=torch.float32,
    ),
    Spec(
        "qwen2_4bit_lm_head",
        "a quantised lm_head; untied",
        hidden=96,
        query_heads=6,
        kv_heads=2,
        intermediate=160,
        group=32,
        tied=False,
        quantise_lm_head=True,
    ),
    Spec(
        "qwen2_4bit_linear_rope",
        "linear rope scaling",
        hidden=96,
        query_heads=3,
        kv_heads=3,
        intermediate=160,
        group=32,
        rope={"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0},
        seed=2,
    ),
    Spec(
        "qwen2_4bit_dynamic_rope",
        "dynamic NTK rope, sequence longer than max_position_embeddings",
        hidden=96,
        query_heads=6,
        kv_heads=2,
        intermediate=128,
        group=32,
        rope={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        max_positions=32,
    ),
    Spec(
        "qwen2_4bit_yarn_old",
        "yarn rope in the older spelling (rope_scaling.type), as the Qwen2.5 model cards say",
        hidden=64,
        query_heads=4,
        kv_heads=1,
        intermediate=192,
        group=64,
        rope={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "rope_theta": 1000000.0,
        },
        old_spelling=True,
    ),
    Spec(
        "qwen3_8bit_g32",
        "8 bits; 14 query heads over 2 kv heads of dim 16, seven groups of 32 per o_proj; untied",
        architecture="qwen3",
        hidden=64,
        query_heads=14,
        kv_heads=2,
        head_dim=16,
        intermediate=160,
        bits=8,
        group=32,
        tied=False,
    ),
    Spec(
        "qwen3_4bit_g128_asym_act_order",
        "asymmetric v1 with act-order, group 128",
        architecture="qwen3",
        query_heads=4,
        kv_heads=1,
        head_dim=64,
        intermediate=256,
        sym=False,
        desc_act=True,
    ),
    Spec(
        "qwen3_3bit_asym",
        "3 bits asymmetric v1 (each zero point wraps on its own), group 64",
        architecture="qwen3",
        query_heads=6,
        kv_heads=2,
        head_dim=32,
        intermediate=192,
        bits=3,
        group=64,
        sym=False,
    ),
    Spec(
        "qwen3_4bit_v2_asym",
        "gptq_v2 (zero points stored as they are), asymmetric, group 32",
        architecture="qwen3",
        hidden=96,
        query_heads=5,
        kv_heads=1,
        head_dim=32,
        intermediate=160,
        group=32,
        sym=False,
        format="gptq_v2",
    ),
    Spec(
        "qwen3_2bit_v2_channel",
        "gptq_v2, 2 bits, group -1 with act-order (which means nothing then), symmetric; head dim 64, "
        "four times hidden / heads",
        architecture="qwen3",
        hidden=64,
        query_heads=4,
        kv_heads=2,
        head_dim=64,
        intermediate=224,
        bits=2,
        group=-1,
        desc_act=True,
        format="gptq_v2",
    ),
    Spec(
        "qwen3_dynamic",
        "dynamic: 8 bits group 32 for down_proj, asymmetric 3 bits for two gate_proj, act-order for "
        "the third, o_proj and one layer's k_proj left unquantised",
        architecture="qwen3",
        hidden=64,
        query_heads=6,
        kv_heads=2,
        head_dim=32,
        intermediate=192,
        group=64,
        layers=3,
        dynamic={
            r"-:.*\.self_attn\.o_proj": {},
            r"-:model\.layers\.1\..*k_proj": {},
            r"+:.*\.mlp\.down_proj": {"bits": 8, "group_size": 32},
            r"model\.layers\.[02]\.mlp\.gate_proj": {"bits": 3, "group_size": 32, "sym": False},
            # Never reached for layers 0 and 2: the first match decides.
            r".*\.gate_proj": {"group_size": 32, "desc_act": True},
        },
    ),
    Spec(
        "qwen3_4bit_yarn",
        "yarn rope in the 2026 spelling",
        architecture="qwen3",
        hidden=96,
        query_heads=6,
        kv_heads=3,
        head_dim=32,
        intermediate=224,
        group=32,
        rope={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "rope_theta": 1000000.0,
        },
    ),
]

# --------------------------------------------------------------------------------------------
# The float model
# --------------------------------------------------------------------------------------------


def build_config(spec: Spec, tokenizer: Tokenizer) -> Qwen2Config | Qwen3Config:
    common: dict[str, Any] = dict(
        vocab_size=spec.vocabulary,
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.query_heads,
        num_key_value_heads=spec.kv_heads,
        max_position_embeddings=spec.max_positions,
        tie_word_embeddings=spec.tied,
        rope_parameters=dict(spec.rope),
        bos_token_id=tokenizer.token_to_id("<|endoftext|>"),
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
        pad_token_id=None,
    )
    if spec.architecture == "qwen3":
        return Qwen3Config(head_dim=spec.head_dim, **common)
    return Qwen2Config(**common)


def randomise(model: torch.nn.Module, spec: Spec, special_ids: range, tokenizer_size: int) -> None:
    """Weights for which every part matters.

    Default initialisation gives near-uniform logits, over which any mistake disappears. Here
    attention scores spread by about 1.5, each sublayer adds as much as the embedding holds, and
    logits spread by about 2.5. An eighth of the rows are all positive and an eighth all
    negative, so that asymmetric zero points reach both ends of their range. Special tokens get
    small rows, so that greedy decoding does not end at once.
    """
    generator = torch.Generator().manual_seed(spec.seed)

    def normal(shape: torch.Size, std: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * std

    hidden = spec.hidden
    embedding_std = 0.25 if spec.tied else 1.0
    fan_in_std = {
        "q_proj": 1.25 / hidden**0.5,
        "k_proj": 1.25 / hidden**0.5,
        "v_proj": 1.0 / hidden**0.5,
        "o_proj": 1.5 * embedding_std / (spec.query_heads * 8) ** 0.5,
        "gate_proj": 1.5 / hidden**0.5,
        "up_proj": 1.0 / hidden**0.5,
        "down_proj": 1.5 * embedding_std / (0.36 * spec.intermediate) ** 0.5,
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = parameter.shape
            module = name.split(".")[-2]
            if name.endswith("bias"):
                parameter.copy_(normal(shape, 0.4))
            elif module in fan_in_std:
                weight = normal(shape, fan_in_std[module])
                if not spec.sym or spec.dynamic:
                    sign = torch.randint(0, 8, (shape[0], 1), generator=generator)
                    weight = torch.where(sign == 0, weight.abs(), weight)
                    weight = torch.where(sign == 1, -weight.abs(), weight)
                parameter.copy_(weight)
            elif module == "embed_tokens":
                parameter.copy_(normal(shape, embedding_std))
                if spec.tied:
                    parameter[special_ids] *= 0.3
                    # Ids past the tokenizer's end pad the vocabulary, as in real checkpoints.
                    parameter[tokenizer_size:] = 0
            elif module == "lm_head":
                parameter.copy_(normal(shape, 2.5 / hidden**0.5))
                parameter[special_ids] *= 0.3
                parameter[tokenizer_size:] = 0
            elif name == "model.norm.weight":
                scale = torch.ones(shape)
                if spec.tied:
                    # Random signs: otherwise a token's own embedding, still present in the
                    # residual stream, would make the model repeat its input for ever.
                    scale = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0
                    scale *= 2.5 / (hidden**0.5 * embedding_std)
                parameter.copy_(scale * (1 + normal(shape, 0.2)))
            elif module in ("q_norm", "k_norm"):
                parameter.copy_(1.25 * (1 + normal(shape, 0.2)))
            else:  # the layers' norms
                parameter.copy_(1 + normal(shape, 0.2))


def calibration(tokenizer: Tokenizer, seed: int) -> list[dict[str, list[int]]]:
    """Windows of the training text, for GPTQ's second-order statistics."""
    ids = tokenizer.encode(TEXT).ids
    starts = np.random.default_rng(seed).integers(0, len(ids) - 64, size=24)
    return [
        {"input_ids": ids[s : s + 64], "attention_mask": [1] * 64} for s in sorted(starts.tolist())
    ]


def quantise(spec: Spec, tokenizer: Tokenizer, folder: Path) -> None:
    """Runs the real GPTQModel and leaves its files in `folder`."""
    config = build_config(spec, tokenizer)
    torch.manual_seed(spec.seed)
    # GPTQModel keeps what it does not quantise in the dtype it loads the model in.
    load_dtype = torch.bfloat16 if spec.leftovers == torch.bfloat16 else torch.float16
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    randomise(model, spec, range(BPE_VOCABULARY, size), size)
    with tempfile.TemporaryDirectory() as source:
        model.to(load_dtype).save_pretrained(source)
        wrap_tokenizer(tokenizer).save_pretrained(source)
        quantize_config = QuantizeConfig(
            bits=spec.bits,
            group_size=spec.group,
            sym=spec.sym,
            desc_act=spec.desc_act,
            act_group_aware=False,
            format=spec.format,
            dynamic=spec.dynamic,
            lm_head=spec.quantise_lm_head,
            offload_to_disk=False,
        )
        gptq = GPTQModel.load(source, quantize_config, device="cpu", dtype=load_dtype)
        gptq.quantize(calibration(tokenizer, spec.seed), batch_size=4)
        gptq.save(str(folder), max_shard_size=spec.shard_bytes)
    for extra in ("quant_log.csv", "README.md"):
        (folder / extra).unlink(missing_ok=True)
    if spec.leftovers == torch.float32:
        widen_leftovers(folder)
    if spec.old_spelling:
        spell_old(folder)


def widen_leftovers(folder: Path) -> None:
    """Rewrites the unquantised tensors as F32, as some publishers' files have them."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.rsplit(".", 1)[-1] in ("weight", "bias"):
            tensors[name] = tensor.float()
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)


def spell_old(folder: Path) -> None:
    """Rewrites config.json as transformers 4 wrote it, and drops what it did not write."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    config.pop("pad_token_id", None)
    config["sliding_window"] = 4096
    config["transformers_version"] = "4.45.2"
    quantisation = config.pop("quantization_config")
    for key in ("method", "format"):
        quantisation.pop(key, None)
    if kind == "default":
        # One of the two old-style folders has the block in quantize_config.json alone...
        path.write_text(json.dumps(config, indent=2) + "\n")
    else:
        # ... and the other in config.json alone.
        config["quantization_config"] = quantisation
        path.write_text(json.dumps(config, indent=2) + "\n")
        (folder / "quantize_config.json").unlink()
    # transformers 4 kept the chat template inside tokenizer_config.json.
    template = folder / "chat_template.jinja"
    if template.exists():
        tokenizer_path = folder / "tokenizer_config.json"
        tokenizer_config = json.loads(tokenizer_path.read_text())
        tokenizer_config["chat_template"] = template.read_text()
        tokenizer_path.write_text(json.dumps(tokenizer_config, indent=2) + "\n")
        template.unlink()


# --------------------------------------------------------------------------------------------
# The independent reader
# --------------------------------------------------------------------------------------------

WORD_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                tensors[name] = file.get_tensor(name)
    return tensors


def fields(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Reads `count` fields of `bits` bits down axis 0 of uint32 words, lowest bit first."""
    shifts = np.arange(32, dtype=np.uint32)[None, :, None]
    stream = (words[:, None, :] >> shifts) & 1  # (words, 32, columns)
    stream = stream.reshape(-1, words.shape[1])[: count * bits]
    values = np.zeros((count, words.shape[1]), dtype=np.int64)
    for bit in range(bits):
        values |= stream[bit::bits].astype(np.int64) << bit
    return values


def read_zeros(qzeros: np.ndarray, bits: int, columns: int, v1: bool) -> np.ndarray:
    """Zero points (groups, N). See the module comment for v1's off-by-one."""
    if v1 and bits in WORD_ONES:
        qzeros = qzeros + np.uint32(WORD_ONES[bits])  # wraps modulo 2^32
    zeros = fields(np.ascontiguousarray(qzeros.T), bits, columns).T
    if v1 and bits == 3:
        zeros = (zeros + 1) % 8
    return zeros


def module_bits(name: str, quantisation: dict[str, Any]) -> int:
    """The width of a quantised module: the first `dynamic` pattern that matches decides."""
    for pattern, override in (quantisation.get("dynamic") or {}).items():
        if pattern.startswith("-:"):
            continue
        if re.match(pattern.removeprefix("+:"), name):
            return override.get("bits", quantisation["bits"])
    return quantisation["bits"]


def quantisation_block(folder: Path) -> dict[str, Any]:
    separate = folder / "quantize_config.json"
    if separate.exists():
        return json.loads(separate.read_text())
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@dataclass
class Weights:
    dense: dict[str, torch.Tensor]  # every parameter of the float model, float32
    quantised: dict[str, torch.Tensor]  # module -> (N, K) float32
    bits: dict[str, int]
    carried_zeros: int  # zero points that a field-by-field reader gets wrong
    zero_range: tuple[int, int]
    act_ordered: int  # modules whose g_idx is not k / group_size


def read_weights(folder: Path) -> Weights:
    """Dequantises a checkpoint from its files alone."""
    tensors = read_tensors(folder)
    quantisation = quantisation_block(folder)
    v1 = quantisation.get("checkpoint_format", quantisation.get("format")) == "gptq"
    out = Weights({}, {}, {}, 0, (255, 0), 0)
    for name, tensor in tensors.items():
        module, leaf = name.rsplit(".", 1)
        if leaf in ("weight", "bias"):
            out.dense[name] = tensor.float()
        if leaf != "qweight":
            continue
        bits = module_bits(module, quantisation)
        qweight = tensor.numpy().view(np.uint32)
        qzeros = tensors[module + ".qzeros"].numpy().view(np.uint32)
        scales = tensors[module + ".scales"]
        g_idx = tensors[module + ".g_idx"].numpy()
        assert scales.dtype == torch.float16, (module, scales.dtype)
        rows, columns = g_idx.shape[0], tensor.shape[1]
        q = fields(qweight, bits, rows)
        zeros = read_zeros(qzeros, bits, columns, v1)
        scale = scales.numpy().astype(np.float32)
        weight = (q - zeros[g_idx]).astype(np.float32) * scale[g_idx]

        naive = read_zeros(qzeros, bits, columns, v1=False)
        if v1:
            naive = (naive + 1) % (1 << bits)
        out.carried_zeros += int((naive != zeros).sum())
        out.zero_range = (
            min(out.zero_range[0], int(zeros.min())),
            max(out.zero_range[1], int(zeros.max())),
        )
        out.act_ordered += int((np.diff(g_idx) < 0).any())
        out.bits[module] = bits
        out.quantised[module] = torch.from_numpy(np.ascontiguousarray(weight.T))
        out.dense[module + ".weight"] = out.quantised[module]
    return out


# --------------------------------------------------------------------------------------------
# The oracle
# --------------------------------------------------------------------------------------------


def oracle(folder: Path, weights: Weights) -> torch.nn.Module:
    """transformers' own model, float32, eager attention, over our dequantised weights."""
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(weights.dense, strict=False)
    allowed = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert set(missing) <= allowed and not unexpected, (missing, unexpected)
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """(tokens, vocabulary) float32, from one forward over the whole sequence, no cache."""
    logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


@torch.no_grad()
def log_probabilities_stepwise(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """The same, fed one token at a time through transformers' KV cache."""
    cache = None
    rows = []
    for position, token in enumerate(ids):
        out = model(
            torch.tensor([[token]]),
            past_key_values=cache,
            position_ids=torch.tensor([[position]]),
            use_cache=True,
        )
        cache = out.past_key_values
        rows.append(torch.log_softmax(out.logits[0, -1].float(), dim=-1))
    return torch.stack(rows)


def extend_greedily(
    model: torch.nn.Module, prompt: list[int], count: int, stepwise: bool
) -> list[int]:
    forward = log_probabilities_stepwise if stepwise else log_probabilities
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(forward(model, ids)[-1].argmax()))
    return ids


def margins(logprobs: torch.Tensor) -> torch.Tensor:
    top = logprobs.topk(2, dim=-1).values
    return top[:, 0] - top[:, 1]


def quantised_modules(model: Any) -> Iterator[tuple[str, BaseQuantLinear]]:
    for name, module in model.model.named_modules():
        if isinstance(module, BaseQuantLinear):
            yield name, module


def check_against_gptqmodel(folder: Path, weights: Weights, ids: list[int]) -> float:
    """Asserts that GPTQModel reads the same weights; returns the log-probability difference of
    its own half-precision forward (information only)."""
    gptq = GPTQModel.load(str(folder), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
    seen = set()
    for name, module in quantised_modules(gptq):
        theirs = module.dequantize_weight().detach().cpu()  # (K, N) float16
        ours = weights.quantised[name].T.half()
        assert theirs.dtype == torch.float16, theirs.dtype
        assert torch.equal(theirs, ours), f"{folder.name}: {name} differs from GPTQModel"
        seen.add(name)
    assert seen == set(weights.quantised), set(weights.quantised) ^ seen
    with torch.no_grad():
        logits = gptq.model(torch.tensor([ids])).logits[0].float()
    reference = log_probabilities(oracle(folder, weights), ids)
    return float((torch.log_softmax(logits, -1) - reference).abs().max())


# --------------------------------------------------------------------------------------------
# Putting a folder together
# --------------------------------------------------------------------------------------------

DYNAMIC_ROPE_NOTE = (
    "transformers derives the dynamic-NTK base from the longest position of each forward call. "
    "`logprobs` is one forward over all tokens: every position, early ones too, is rotated with "
    "the base of the full length. `logprobs_stepwise` feeds one token per call through its "
    "cache: the token at position p (its query and its key) is rotated with the base of length "
    "max(max_position_embeddings, p + 1), and cached keys keep the rotation they were stored "
    "with. Only the stepwise meaning does not depend on how a prompt was cut into chunks. Up to "
    "max_position_embeddings tokens, `logprobs_stepwise` equals a plain full forward over them. "
    "The generated tokens are those of greedy stepwise decoding."
)


def make(spec: Spec, tokenizer: Tokenizer) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / spec.name
        folder.mkdir()
        os.chdir(temporary)  # GPTQModel leaves a logs folder where it runs
        fill(spec, tokenizer, folder)
        os.chdir(HERE)
        shutil.rmtree(OUT / spec.name, ignore_errors=True)
        shutil.copytree(folder, OUT / spec.name)


def fill(spec: Spec, tokenizer: Tokenizer, folder: Path) -> None:
    quantise(spec, tokenizer, folder)

    # transformers and GPTQModel may rewrite tokenizer.json; it must still mean the same.
    saved = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in (TEXT, PROMPT_A, PROMPT_B):
        assert saved.encode(text).ids == tokenizer.encode(text).ids

    weights = read_weights(folder)
    model = oracle(folder, weights)
    golden: dict[str, torch.Tensor] = {}
    notes: dict[str, Any] = {
        "covers": spec.covers,
        "bits": spec.bits,
        "group_size": spec.group,
        "sym": spec.sym,
        "desc_act": spec.desc_act,
        "checkpoint_format": spec.format,
        "bits_of_modules": {
            str(b): sum(v == b for v in weights.bits.values())
            for b in sorted(set(weights.bits.values()))
        },
        "modules_with_unordered_g_idx": weights.act_ordered,
        "zero_points_lowest_highest": list(weights.zero_range),
        "zero_points_misread_field_by_field": weights.carried_zeros,
        "sequences": {},
    }
    eos = tokenizer.token_to_id("<|im_end|>")
    dynamic_rope = spec.rope.get("rope_type") == "dynamic"
    for suffix, prompt, count in (("", PROMPT_A, GENERATED_A), ("_b", PROMPT_B, GENERATED_B)):
        prompt_ids = tokenizer.encode(prompt).ids
        ids = extend_greedily(model, prompt_ids, count, stepwise=dynamic_rope)
        assert eos not in ids[len(prompt_ids) :]
        logprobs = log_probabilities(model, ids)
        golden[f"input_ids{suffix}"] = torch.tensor(ids, dtype=torch.int32)
        golden[f"prompt_len{suffix}"] = torch.tensor([len(prompt_ids)], dtype=torch.int32)
        golden[f"logprobs{suffix}"] = logprobs
        margin = margins(logprobs)
        notes["sequences"][f"input_ids{suffix}"] = {
            "prompt_tokens": len(prompt_ids),
            "generated_tokens": count,
            "lowest_margin": round(float(margin.min()), 4),
            "median_margin": round(float(margin.median()), 4),
            "positions_with_margin_below_0.01": int((margin < 1e-2).sum()),
            "logit_standard_deviation": round(float(logprobs.std(dim=-1).mean()), 2),
            "generated_tokens_distinct": len(set(ids[len(prompt_ids) :])),
        }
        if dynamic_rope:
            stepwise = log_probabilities_stepwise(model, ids)
            # A fresh model: transformers' rotary module remembers the longest length it met.
            within = log_probabilities(oracle(folder, weights), ids[: spec.max_positions])
            assert (stepwise[: spec.max_positions] - within).abs().max() < 2e-4
            golden[f"logprobs_stepwise{suffix}"] = stepwise
            notes["dynamic_rope"] = DYNAMIC_ROPE_NOTE
            notes["sequences"][f"input_ids{suffix}"]["largest_difference_of_stepwise"] = round(
                float((stepwise - logprobs).abs().max()), 3
            )
        else:
            stepwise = log_probabilities_stepwise(model, ids)
            assert (stepwise - logprobs).abs().max() < 2e-4
    difference = check_against_gptqmodel(folder, weights, golden["input_ids"].tolist())
    notes["gptqmodel_f16_forward_largest_difference"] = round(difference, 4)
    save_file(golden, folder / "golden.safetensors")
    (folder / "golden.safetensors").chmod(0o644)
    (folder / "golden.json").write_text(json.dumps(notes, indent=2) + "\n")
    size = sum(p.stat().st_size for p in folder.iterdir())
    print(f"== {spec.name}: {size / 1024:.0f} KiB {json.dumps(notes)}", flush=True)


def main() -> None:
    wanted = set(sys.argv[1:])
    unknown = wanted - {s.name for s in SPECS}
    if unknown:
        raise SystemExit(f"unknown checkpoint: {', '.join(sorted(unknown))}")
    tokenizer = train_tokenizer()
    for spec in SPECS:
        if not wanted or spec.name in wanted:
            make(spec, tokenizer)


if __name__ == "__main__":
    main()
