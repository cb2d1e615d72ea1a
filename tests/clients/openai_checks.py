"""What the `openai` package makes of a server. Run as: openai_checks.py CHECK BASE_URL.

Each function is a check; `tests/clients/main.rs` runs them all against the embedded model.
"""

import json
import re
import sys
import typing

import openai
import pydantic

QUESTION = "What is 345 + 278?"
ANSWER = "345 + 278 = 623"


def ask(client, question=QUESTION, **more):
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(model="builtin", messages=messages, temperature=0, **more)


def models(client):
    assert [model.id for model in client.models.list()] == ["builtin"]
    assert client.models.retrieve("builtin").id == "builtin"


def chat(client):
    answer = ask(client, max_tokens=48)
    choice = answer.choices[0]
    assert choice.message.role == "assistant", answer
    assert choice.message.content == ANSWER, answer
    assert choice.finish_reason == "stop", answer
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, answer
    parts = [{"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": parts}]
    same = client.chat.completions.create(model="builtin", messages=messages, temperature=0)
    assert same.choices[0].message.content == ANSWER, same
    assert ask(client, max_completion_tokens=1).choices[0].finish_reason == "length"
    assert ask(client, stop=" = ").choices[0].message.content == "345 + 278"


def streaming(client):
    stream = ask(client, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant", chunks[0]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == ANSWER, text
    assert chunks[-2].choices[0].finish_reason == "stop", chunks[-2]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 1, chunks[-1]
    with client.chat.completions.stream(
        model="builtin", messages=[{"role": "user", "content": QUESTION}], temperature=0
    ) as helper:
        assert helper.get_final_completion().choices[0].message.content == ANSWER
    # Leaving early must not hurt whoever comes next.
    early = ask(client, "What is secondwind?", stream=True)
    next(iter(early))
    early.close()
    assert ask(client).choices[0].message.content == ANSWER


def logprobs(client):
    answer = ask(client, logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    text = b"".join(bytes(entry.bytes) for entry in entries).decode()
    assert text.startswith(ANSWER), text
    for entry in entries:
        assert len(entry.top_logprobs) == 3, entry
        # Greedy: what was taken is the likeliest.
        assert entry.top_logprobs[0].token == entry.token, entry
        assert entry.top_logprobs[0].logprob == entry.logprob <= 0, entry


def seeds_and_choices(client):
    def sample(seed, n):
        messages = [{"role": "user", "content": "What is secondwind?"}]
        answer = client.chat.completions.create(
            model="builtin", messages=messages, temperature=4, seed=seed, n=n, max_tokens=24
        )
        assert [choice.index for choice in answer.choices] == list(range(n))
        return [choice.message.content for choice in answer.choices]

    three = sample(7, 3)
    assert three == sample(7, 3)
    assert len(set(three)) == 3, three
    assert sample(7, 1) == three[:1]
    assert sample(8, 3) != three


def completions(client):
    answer = client.completions.create(
        model="builtin", prompt=["One", "Two"], max_tokens=4, temperature=0, echo=True, logprobs=0
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice, prompt in zip(answer.choices, ["One", "Two"]):
        assert choice.text.startswith(prompt), choice
        assert choice.logprobs.token_logprobs[0] is None, choice
        assert all(logprob <= 0 for logprob in choice.logprobs.token_logprobs[1:]), choice
        assert "".join(choice.logprobs.tokens).startswith(prompt), choice
    stream = client.completions.create(model="builtin", prompt="One", max_tokens=4, temperature=0, stream=True)
    text = "".join(chunk.choices[0].text for chunk in stream)
    assert "One" + text == answer.choices[0].text, text


def shapes(client):
    """Whatever the model would say: what comes is of the shape that was asked."""
    card = {
        "type": "object",
        "properties": {
            "card": {"enum": ["P40", "T4"]},
            "gigabytes": {"type": "integer", "minimum": 1, "maximum": 99},
        },
        "required": ["card", "gigabytes"],
        "additionalProperties": False,
    }
    schema = {"type": "json_schema", "json_schema": {"name": "card", "strict": True, "schema": card}}
    answer = ask(client, response_format=schema).choices[0]
    value = json.loads(answer.message.content)
    assert value["card"] in ("P40", "T4") and 1 <= value["gigabytes"] <= 99, answer
    assert answer.finish_reason == "stop", answer

    class Card(pydantic.BaseModel):
        gigabytes: typing.Annotated[int, pydantic.Field(ge=1, le=99)]

    messages = [{"role": "user", "content": QUESTION}]
    parsed = client.chat.completions.parse(
        model="builtin", messages=messages, temperature=0, response_format=Card
    )
    assert 1 <= parsed.choices[0].message.parsed.gigabytes <= 99, parsed

    free = ask(client, response_format={"type": "json_object"}, max_tokens=60, seed=1)
    assert free.choices[0].message.content.startswith("{"), free
    for shape, fits in [
        ({"choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"regex": "[a-f]{3}[0-9]"}, lambda text: re.fullmatch("[a-f]{3}[0-9]", text)),
        ({"grammar": 'start: "a" "b"*  "c"'}, lambda text: re.fullmatch("ab*c", text)),
        ({"json": card}, lambda text: json.loads(text)["card"] in ("P40", "T4")),
    ]:
        text = ask(client, extra_body={"structured_outputs": shape}).choices[0].message.content
        assert fits(text), text
    text = client.completions.create(
        model="builtin", prompt="One", temperature=0, extra_body={"structured_outputs": {"choice": ["two"]}}
    )
    assert text.choices[0].text == "two", text

    try:
        ask(client, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 7}}})
        raise AssertionError("a type that is none")
    except openai.BadRequestError as error:
        assert error.param == "response_format.json_schema.schema", error


def errors(client):
    def refused(kind, call):
        try:
            call()
        except kind as error:
            return error
        raise AssertionError(f"not {kind}")

    error = refused(openai.NotFoundError, lambda: client.models.retrieve("gpt-4"))
    assert (error.code, error.param) == ("model_not_found", "model"), error
    error = refused(openai.BadRequestError, lambda: ask(client, top_p=2))
    assert error.param == "top_p" and error.request_id, error
    error = refused(openai.BadRequestError, lambda: ask(client, "x" * 100_000))
    assert error.code == "context_length_exceeded", error
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    error = refused(openai.BadRequestError, lambda: ask(client, tools=tools))
    assert (error.code, error.param) == ("unsupported_parameter", "tools"), error
    error = refused(
        openai.BadRequestError, lambda: client.embeddings.create(model="builtin", input="x")
    )
    assert "embeddings" in str(error), error
    refused(openai.APIStatusError, lambda: ask(client, "x" * 5_000_000))


if __name__ == "__main__":
    check, base_url = sys.argv[1:]
    globals()[check](openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=60))
