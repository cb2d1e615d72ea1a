"""Writes cases.json: what transformers' apply_chat_template renders from each template here.

    pip install -r ../requirements.txt
    python make.py

A case is {name, template, messages, tools, kwargs, add_generation_prompt} and either `expected`
(the text, byte for byte) or `error` (the message given to raise_exception). What a renderer must
match (transformers 5.23.0, utils/chat_template_utils.py):

* Jinja runs with trim_blocks and lstrip_blocks on and the loop controls extension.
* `tojson` is Python's json.dumps(ensure_ascii=False): keys in their given order, ", " and ": " as
  separators, no HTML escaping, floats as Python prints them (1.0, 1e-05, 1e+16).
* `bos_token`, `eos_token` and so on are variables; an absent keyword such as `enable_thinking`
  is undefined, not false; `tools` is none when the request has no tools.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent

Message = dict[str, Any]

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Wetter für eine Stadt – 天気 ☀️. Says "hot" when > 30 °C & it\'s dry.',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "e.g. São Paulo <or> O'Fallon"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
                "days": {"type": "integer", "minimum": 0, "maximum": 14},
                "threshold": {"type": "number", "default": 0.5, "maximum": 100.0},
                "options": {
                    "type": "object",
                    "properties": {
                        "hourly": {"type": "boolean", "default": False},
                        "tags": {"type": "array", "items": {"type": ["string", "null"]}},
                    },
                    "additionalProperties": True,
                },
            },
            "required": ["city"],
        },
    },
}
ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers",
        "parameters": {"type": "object", "properties": {}, "required": []},
        "strict": True,
    },
}


def call(name: str, arguments: Any, identity: str = "call_1") -> dict[str, Any]:
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


USER: Message = {"role": "user", "content": "How warm is it in Köln?"}
SYSTEM: Message = {"role": "system", "content": "You are terse."}
ASSISTANT: Message = {"role": "assistant", "content": "It is 21 °C."}
CALLS: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        call(
            "get_weather",
            {"city": "Köln", "days": 2, "options": {"hourly": True, "tags": [None, 'a"b']}},
        ),
        call("get_weather", {"city": "<Aachen> & 'Bonn'", "threshold": 1.0}, "call_2"),
    ],
}
RESULTS: list[Message] = [
    {
        "role": "tool",
        "name": "get_weather",
        "tool_call_id": "call_1",
        "content": '{"celsius": 21.5}',
    },
    {
        "role": "tool",
        "name": "get_weather",
        "tool_call_id": "call_2",
        "content": "rain\n  & <wind>",
    },
]
NUMBERS: Message = {
    "role": "assistant",
    "content": "numbers",
    "tool_calls": [
        call(
            "add",
            {
                "zero": 0,
                "negative": -7,
                "large": 9007199254740993,
                "one": 1.0,
                "half": 0.5,
                "tenth": 0.1,
                "small": 1e-05,
                "tiny": 5e-324,
                "huge": 1e16,
                "below": 123456789012345.6,
                "third": 1 / 3,
                "yes": True,
                "no": False,
                "none": None,
                "empty": {},
                "list": [],
                "text": 'tab\t newline\n slash/ backslash\\ quote" del\x7f nul-free \u2028 ü 😀',
            },
        )
    ],
}

# (name, messages, tools), rendered with and without a generation prompt on every real template.
CONVERSATIONS: list[tuple[str, list[Message], list[dict[str, Any]] | None]] = [
    ("user", [USER], None),
    ("system", [SYSTEM, USER], None),
    ("empty_system", [{"role": "system", "content": ""}, USER], None),
    ("turns", [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "And tomorrow?"}], None),
    ("ends_with_assistant", [USER, ASSISTANT], None),
    ("empty_content", [{"role": "user", "content": ""}], None),
    (
        "special_characters",
        [
            {
                "role": "user",
                "content": '<b>"it\'s" & {{ x }} {% y %}</b>\n\ttab\\n 日本語 😀 \u00a0|<|im_end|>',
            }
        ],
        None,
    ),
    (
        "whitespace",
        [
            {"role": "user", "content": "\n  padded  \n\n"},
            {"role": "assistant", "content": "\n\n also \n"},
            USER,
        ],
        None,
    ),
    ("tools", [USER], [WEATHER]),
    ("tools_system", [SYSTEM, USER], [WEATHER, ADD]),
    ("empty_tools", [USER], []),
    ("tool_calls", [SYSTEM, USER, CALLS], [WEATHER]),
    ("tool_results", [USER, CALLS, *RESULTS], [WEATHER]),
    (
        "tool_results_then_answer",
        [USER, CALLS, *RESULTS, ASSISTANT, {"role": "user", "content": "Thanks!"}],
        [WEATHER, ADD],
    ),
    ("tool_calls_with_content", [USER, {**CALLS, "content": "Let me look."}, *RESULTS], [WEATHER]),
    (
        "tool_calls_without_function_key",
        [
            USER,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"name": "add", "arguments": {"a": 1}}],
            },
        ],
        [ADD],
    ),
    (
        "two_rounds_of_tools",
        [USER, CALLS, *RESULTS, {**CALLS, "tool_calls": CALLS["tool_calls"][:1]}, RESULTS[0]],
        [WEATHER],
    ),
    ("numbers", [USER, NUMBERS], None),
]
THINKING: list[tuple[str, list[Message], list[dict[str, Any]] | None]] = [
    ("reasoning_field", [USER, {**ASSISTANT, "reasoning_content": "Is it\nsummer?"}, USER], None),
    ("reasoning_field_last", [USER, {**ASSISTANT, "reasoning_content": "\nIs it summer?\n"}], None),
    (
        "reasoning_inline",
        [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nWarm."}, USER],
        None,
    ),
    (
        "reasoning_inline_last",
        [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nWarm."}],
        None,
    ),
    (
        "reasoning_before_tools",
        [USER, {**CALLS, "reasoning_content": "I need the weather."}, *RESULTS],
        [WEATHER],
    ),
    (
        "tool_response_as_user",
        [
            USER,
            ASSISTANT,
            {"role": "user", "content": "<tool_response>\nx\n</tool_response>"},
            {**ASSISTANT, "reasoning_content": "r"},
        ],
        None,
    ),
]
# Content that is null or left out, which the templates treat differently.
NULL_CONTENT: list[Message] = [USER, {**CALLS, "content": None}, *RESULTS]
NO_CONTENT: list[Message] = [USER, {k: v for k, v in CALLS.items() if k != "content"}, *RESULTS]
STRING_ARGUMENTS: list[Message] = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [call("add", '{"a": 1, "b": [2]}')]},
]


def render(template: str, case: dict[str, Any]) -> dict[str, Any]:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = template
    try:
        text = tokenizer.apply_chat_template(
            case["messages"],
            tools=case["tools"],
            add_generation_prompt=case["add_generation_prompt"],
            tokenize=False,
            **case["kwargs"],
        )
    except TemplateError as error:
        return {**case, "error": str(error)}
    return {**case, "expected": text}


def cases() -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []

    def add(
        template: str,
        name: str,
        messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
        generation: bool = True,
        **kwargs: Any,
    ) -> None:
        case = {
            "name": f"{template}/{name}",
            "template": template,
            "messages": messages,
            "tools": tools,
            "kwargs": kwargs,
            "add_generation_prompt": generation,
        }
        out.append(render((HERE / f"{template}.jinja").read_text(), case))

    for template in ("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_8"):
        for name, messages, tools in CONVERSATIONS:
            add(template, name, messages, tools)
            if name in ("turns", "tools", "tool_results", "ends_with_assistant"):
                add(template, f"{name}_no_prompt", messages, tools, generation=False)
        add(template, "null_content", NULL_CONTENT, [WEATHER])
        add(template, "no_content", NO_CONTENT, [WEATHER])
        if template != "qwen3_8":  # whose arguments must be an object
            add(template, "string_arguments", STRING_ARGUMENTS)
    for template in ("qwen3", "qwen3_8"):
        for name, messages, tools in THINKING:
            for suffix, kwargs in (
                ("", {}),
                ("_thinking", {"enable_thinking": True}),
                ("_no_thinking", {"enable_thinking": False}),
            ):
                add(template, name + suffix, messages, tools, **kwargs)
        add(template, "user_no_thinking", [USER], enable_thinking=False)
        add(template, "user_no_thinking_no_prompt", [USER], generation=False, enable_thinking=False)
        add(template, "tools_no_thinking", [SYSTEM, USER], [WEATHER], enable_thinking=False)
    add("qwen3_8", "low_effort", [SYSTEM, USER], reasoning_effort="low")
    add(
        "qwen3_8",
        "content_parts",
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            }
        ],
    )
    add("qwen3_8", "error_effort", [USER], reasoning_effort="none")
    add("qwen3_8", "error_no_user", [SYSTEM])
    add("qwen3_8", "error_role", [USER, {"role": "oracle", "content": "?"}])
    add("own_blocks", "plain", [USER, ASSISTANT])
    add(
        "own_blocks",
        "name",
        [{**USER, "name": "Ada", "content": '"Quoted words" stay'}],
        generation=False,
    )
    add("own_blocks", "break", [USER, {"role": "stop", "content": ""}, ASSISTANT])
    add("own_blocks", "tools", [USER], [WEATHER])
    add("own_raise", "fine", [USER, ASSISTANT])
    add("own_raise", "error_order", [USER, USER])
    return out


def main() -> None:
    made = cases()
    text = json.dumps(made, indent=1, ensure_ascii=False)
    (HERE / "cases.json").write_text(text + "\n", encoding="utf-8")
    errors = [c["name"] for c in made if "error" in c]
    print(f"{len(made)} cases, {len(errors)} of them errors: {errors}")


if __name__ == "__main__":
    main()
