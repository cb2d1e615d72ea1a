"""Writes sampling.json: what the logits processors of transformers make of random logits.

    pip install -r requirements.txt
    python sampling.py

Each case has logits, a prompt and an output, sampling parameters by our names, the scores after the processors
(null where a token cannot be drawn), and the probabilities after the warpers, of those tokens alone that are kept.
Presence and frequency penalties are not there: transformers has none.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import torch
from transformers.generation import logits_process as hf

VOCAB = 48
CASES = 32


def case(seed: int) -> dict:
    rng = random.Random(seed)

    def maybe(value):
        return value if rng.random() < 0.5 else None

    # Whole 64ths, so that decimals are exact, and no two the same: top-k keeps ties there, and not here.
    logits = [x / 64 for x in rng.sample(range(-512, 512), VOCAB)]
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 12))]
    output = [rng.randrange(VOCAB) for _ in range(rng.randrange(0, 12))]
    parameters = {
        "temperature": rng.randrange(16, 160) / 64,
        "top_k": maybe(rng.randrange(2, 30)),
        "top_p": maybe(rng.randrange(20, 62) / 64),
        "min_p": maybe(rng.randrange(1, 16) / 64),
        "typical_p": maybe(rng.randrange(16, 62) / 64),
        "repetition_penalty": maybe(rng.randrange(40, 128) / 64),
        "logit_bias": [
            [token, rng.randrange(-256, 256) / 64]
            for token in sorted(rng.sample(range(VOCAB), rng.choice([0, 0, 1, 4])))
        ],
        "min_tokens": rng.choice([0, 0, 6, 20]),
        "stop_tokens": sorted(rng.sample(range(VOCAB), 3)),
    }

    ids = torch.tensor([prompt + output])
    # The order is that of `GenerationMixin._get_logits_processor`.
    processors, warpers = hf.LogitsProcessorList(), hf.LogitsProcessorList()
    if parameters["logit_bias"]:
        biases = [[[token], bias] for token, bias in parameters["logit_bias"]]
        processors.append(hf.SequenceBiasLogitsProcessor(biases))
    if parameters["repetition_penalty"] is not None:
        penalty = parameters["repetition_penalty"]
        processors.append(hf.RepetitionPenaltyLogitsProcessor(penalty))
    if parameters["min_tokens"] > 0:
        processors.append(
            hf.MinNewTokensLengthLogitsProcessor(
                len(prompt), parameters["min_tokens"], parameters["stop_tokens"]
            )
        )
    warpers.append(hf.TemperatureLogitsWarper(parameters["temperature"]))
    for name, warper in [
        ("top_k", hf.TopKLogitsWarper),
        ("top_p", hf.TopPLogitsWarper),
        ("min_p", hf.MinPLogitsWarper),
        ("typical_p", hf.TypicalLogitsWarper),
    ]:
        if parameters[name] is not None:
            warpers.append(warper(parameters[name]))

    scores = processors(ids, torch.tensor([logits]))
    probabilities = torch.softmax(warpers(ids, scores).double(), -1)[0].tolist()
    return {
        "logits": logits,
        "prompt": prompt,
        "output": output,
        "parameters": parameters,
        "scores": [x if math.isfinite(x) else None for x in scores[0].tolist()],
        "probabilities": [[i, p] for i, p in enumerate(probabilities) if p > 0.0],
    }


def main() -> None:
    cases = [case(seed) for seed in range(CASES)]
    lines = ",\n".join(json.dumps(case) for case in cases)
    Path(__file__).with_suffix(".json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
