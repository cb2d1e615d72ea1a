"""Makes the embedded int4 checkpoint from the folder that `train.py` wrote, and checks it.

    GPTQMODEL_CPU_WORKERS=2 python quantise.py /tmp/builtin-float

Writes `checkpoint/` (what the server embeds) and `eval.json` (what a test asks it) beside this
file. Needs gptqmodel 7.7.0 and transformers 5.23.0; runs on a CPU in a few minutes. The check
answers with plain transformers in float32 over weights dequantised from the written file.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import corpus
from train import GROUP, Renderer

HERE = Path(__file__).resolve().parent
CHECKPOINT = HERE / "checkpoint"
SERVED_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]


def quantise(source: Path, folder: Path) -> None:
    """int4, symmetric, no act-order, by the real GPTQModel."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    renderer = Renderer(tokenizer.backend_tokenizer)
    rng = random.Random(5)
    rows = [renderer.render(corpus.conversation(rng, 3, 0.6))[0] for _ in range(256)]
    calibration = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in rows]
    config = QuantizeConfig(
        bits=4,
        group_size=GROUP,
        sym=True,
        desc_act=False,
        act_group_aware=False,
        offload_to_disk=False,
    )
    model = GPTQModel.load(str(source), config, device="cpu", dtype=torch.float16)
    model.quantize(calibration, batch_size=16)
    shutil.rmtree("logs", ignore_errors=True)  # GPTQModel's own log of this run
    shutil.rmtree(folder, ignore_errors=True)
    model.save(str(folder))
    # Everything the server reads stands in these five files: the quantisation block is in
    # config.json too, and tokenizer files are kept as train.py wrote them.
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    for path in folder.iterdir():
        if path.name not in SERVED_FILES:
            path.unlink()
        else:
            path.chmod(0o644)


def dequantise(folder: Path) -> dict[str, torch.Tensor]:
    """Float32 weights of a symmetric int4 checkpoint: (q - 8) * scale."""
    tensors = load_file(folder / "model.safetensors")
    weights = {n: t.float() for n, t in tensors.items() if n.endswith((".weight", ".bias"))}
    for name, tensor in tensors.items():
        if not name.endswith(".qweight"):
            continue
        module = name.removesuffix(".qweight")
        words = tensor.numpy().view(np.uint32)
        shifts = np.arange(0, 32, 4, dtype=np.uint32)[None, :, None]
        q = ((words[:, None, :] >> shifts) & 15).reshape(-1, words.shape[1]).astype(np.int64)
        # Stored zero points are one less than they mean in this format: 7 everywhere.
        zeros = tensors[module + ".qzeros"].numpy().view(np.uint32)
        assert (zeros == 0x77777777).all()
        scales = tensors[module + ".scales"].float().numpy()
        groups = tensors[module + ".g_idx"].numpy()
        weight = (q - 8).astype(np.float32) * scales[groups]
        weights[module + ".weight"] = torch.from_numpy(weight.T.copy())
    return weights


def load_float(folder: Path) -> torch.nn.Module:
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(dequantise(folder), strict=False)
    assert missing in ([], ["lm_head.weight"]) and not unexpected, (missing, unexpected)
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def answer(model: torch.nn.Module, tokenizer: AutoTokenizer, question: str) -> str:
    """Greedy decoding after the chat template's own prompt."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=80)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def check(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_float(folder)
    renderer = Renderer(tokenizer.backend_tokenizer)
    # Training rendered conversations by hand; it must be what the template gives.
    rng = random.Random(9)
    for _ in range(200):
        messages = corpus.conversation(rng, 2, 0.5)
        text = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages], tokenize=False
        )
        assert tokenizer(text, add_special_tokens=False).input_ids == renderer.render(messages)[0]

    evaluation = corpus.evaluation()
    (HERE / "eval.json").write_text(json.dumps(evaluation, indent=1) + "\n")
    wrong = []
    for case in evaluation["sums"]:
        given = answer(model, tokenizer, case["question"])
        if given != case["answer"]:
            wrong.append((case, given))
    wrong_facts = []
    for case in evaluation["card_facts"]:
        given = answer(model, tokenizer, case["question"])
        if case["expected"] not in given:
            wrong_facts.append((case, given))
    sums, facts = len(evaluation["sums"]), len(evaluation["card_facts"])
    print(f"sums: {sums - len(wrong)} of {sums} exact; {wrong}")
    print(f"card facts: {facts - len(wrong_facts)} of {facts} right; {wrong_facts}")
    for question in SAMPLES:
        print(f"  {question} -> {answer(model, tokenizer, question)}")
    assert len(wrong) <= 0.02 * sums and not wrong_facts


SAMPLES = [
    "Hello!",
    "Who are you?",
    "What is secondwind?",
    "What is tensor parallelism and why would I use it?",
    "How much memory does the Tesla P40 have, and is it fast?",
    "Which of the cards has the most memory?",
    "What is 7 times 8?",
    "What is 12 plus 30?",
    "Tell me about the RTX 4090.",
    "Who was Napoleon?",
    "Why is the sky blue?",
]


def main() -> None:
    if len(sys.argv) > 2:
        raise SystemExit("usage: quantise.py [FOLDER THAT train.py WROTE]")
    if len(sys.argv) == 2:
        quantise(Path(sys.argv[1]), CHECKPOINT)
    check(CHECKPOINT)


if __name__ == "__main__":
    main()
