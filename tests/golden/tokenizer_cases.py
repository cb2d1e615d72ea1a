"""Writes tokenizer_cases.json: strings and the ids that the Python tokenizers library gives them.

    pip install -r requirements.txt
    python tokenizer_cases.py

Per tokenizer.json (its path is relative to the repository): for each text, `ids` as encoded
without adding special tokens (Qwen's tokenizers add none anyway; special tokens written in the
text are recognised), and the text decoded from them with special tokens kept and skipped.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TOKENIZERS = [
    "tests/golden/checkpoints/qwen2_4bit_g128/tokenizer.json",
    "model/builtin/checkpoint/tokenizer.json",
]
TEXTS = [
    "",
    "a",
    " ",
    "Hello, world!",
    "What is 123 + 456?",
    "0123456789 1,000.50 -42 ١٢٣ ⅷ ²",
    "I'll say it's they'RE 'Twas don't CAN'T",
    "   leading and trailing   ",
    "a  b   c    d\t\te\t f",
    "line\nline\r\nline\r\n\r\n\n  indented\n\n\n",
    "\n",
    "\n\n \n",
    " \t \n \t ",
    "end with space ",
    'fn main() { println!("{}", x[0] << 2 | !y); } // done',
    "!!!???...---===",
    "https://example.org/a?b=c&d=%20#e",
    "Die Brücke über den Fluß: größer, naïve café",
    "cafe\u0301 ne\u0301e A\u030a \u1e9b\u0323",
    "日本語のテキスト、中文文本。한국어",
    "Привет, мир! Ελληνικά שלום مرحبا",
    "😀 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ☀️",
    "zero\u200bwidth nbsp\u00a0here line\u2028sep \ufeffbom",
    "control \u0000\u0001\u007f end",
    "𝕌𝕟𝕚𝕔𝕠𝕕𝕖 \U0001f9e0",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>text<|endoftext|>",
    "<|im_start|><|im_start|> <|im_end |> <|IM_END|> <|im_end|",
    '<tool_call>\n{"name": "add"}\n</tool_call>',
    "sm_61 dp4a int8x4 2080Ti P40/P100",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "supercalifragilisticexpialidocious",
]


def main() -> None:
    out = []
    for path in TOKENIZERS:
        tokenizer = Tokenizer.from_file(str(ROOT / path))
        cases = []
        for text in TEXTS:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert ids == tokenizer.encode(text).ids
            cases.append(
                {
                    "text": text,
                    "ids": ids,
                    "decoded": tokenizer.decode(ids, skip_special_tokens=False),
                    "decoded_without_special": tokenizer.decode(ids, skip_special_tokens=True),
                }
            )
        # Ids cut inside a character: the decoder gives U+FFFD for the missing bytes.
        emoji = tokenizer.encode("😀é").ids
        partial = [
            {"ids": emoji[:n], "decoded": tokenizer.decode(emoji[:n])} for n in range(1, len(emoji))
        ]
        out.append({"tokenizer": path, "cases": cases, "partial": partial})
    text = json.dumps(out, indent=1, ensure_ascii=True)
    (HERE / "tokenizer_cases.json").write_text(text + "\n")
    print(f"{len(TOKENIZERS)} tokenizers, {len(TEXTS)} texts each")


if __name__ == "__main__":
    main()
