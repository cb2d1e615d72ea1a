"""What `grpcio` makes of a server that it knows by reflection alone. Run as: grpc_checks.py CHECK BASE_URL.

Each function is a check; `tests/clients/main.rs` runs them all against the embedded model.
"""

import re
import sys
import time
import urllib.request

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

QUESTION = "What is 345 + 278?"
# As the model's chat template writes it.
PROMPT = (
    "<|im_start|>system\nYou are the small demo model inside secondwind.<|im_end|>\n"
    f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
)
ANSWER = "345 + 278 = 623"
OURS = "secondwind.v1.Inference"
SERVICES = [OURS, "inference.GRPCInferenceService", "vllm.Control", "vllm.Inference"]
TIMEOUT_S = 60


class Service:
    """The methods of a service, made of what the server says of itself."""

    def __init__(self, channel, name):
        self.channel = channel
        self.descriptor = DescriptorPool(ProtoReflectionDescriptorDatabase(channel)).FindServiceByName(name)

    def call(self, method, timeout=TIMEOUT_S, **fields):
        method = self.descriptor.methods_by_name[method]
        request, response = (GetMessageClass(kind) for kind in (method.input_type, method.output_type))
        make = self.channel.unary_stream if method.server_streaming else self.channel.unary_unary
        path = f"/{self.descriptor.full_name}/{method.name}"
        call = make(path, request_serializer=request.SerializeToString, response_deserializer=response.FromString)
        return call(request(**fields), timeout=timeout)


def refused(code, call):
    try:
        answer = call()
        list(answer) if hasattr(answer, "__next__") else answer
    except grpc.RpcError as error:
        assert error.code() == code, error
        return error
    raise AssertionError(f"not {code}")


def reflection(channel):
    listed = ProtoReflectionDescriptorDatabase(channel).get_services()
    for name in [*SERVICES, "grpc.health.v1.Health"]:
        assert name in listed, listed
    assert "secondwind.v1.Cluster" not in listed, listed
    for name in SERVICES:
        assert Service(channel, name).descriptor.methods


def health(channel):
    stub = health_pb2_grpc.HealthStub(channel)
    serving = health_pb2.HealthCheckResponse.SERVING
    for name in ["", *SERVICES]:
        request = health_pb2.HealthCheckRequest(service=name)
        assert stub.Check(request, timeout=TIMEOUT_S).status == serving, name
        watch = stub.Watch(request, timeout=TIMEOUT_S)
        assert next(watch).status == serving, name
        watch.cancel()
    request = health_pb2.HealthCheckRequest(service="nobody")
    refused(grpc.StatusCode.NOT_FOUND, lambda: stub.Check(request, timeout=TIMEOUT_S))


def generate(channel):
    service = Service(channel, OURS)
    model = service.call("GetModel")
    assert model.name == "builtin" and model.has_chat_template and model.group.ranks, model
    # The calls that the README shows with grpcurl.
    responses = list(service.call("Generate", text="One", max_tokens=4))
    tokens = sum(len(response.token_ids) for response in responses)
    assert 1 <= tokens == responses[-1].finish.usage.completion_tokens <= 4, responses
    chat = {"messages": [{"role": "user", "content": QUESTION}]}
    responses = list(service.call("Generate", chat=chat, temperature=0))
    assert "".join(response.text for response in responses) == ANSWER, responses
    assert len(responses) > 1, responses
    error = refused(grpc.StatusCode.INVALID_ARGUMENT, lambda: service.call("Generate", text="One", top_p=2))
    assert error.details().startswith("top_p: "), error


def aborts():
    """Requests that clients gave up, by the server's count."""
    with urllib.request.urlopen(f"{sys.argv[2]}/metrics", timeout=TIMEOUT_S) as metrics:
        found = re.search(r'request_failure_total\{reason="abort"\} (\d+)', metrics.read().decode())
    return int(found[1]) if found else 0


def cancel(channel):
    service = Service(channel, OURS)
    # More than may run at once.
    calls, before = 16, aborts()
    for _ in range(calls):
        call = service.call("Generate", text="One", ignore_eos=True)
        next(call)
        call.cancel()
        assert call.code() == grpc.StatusCode.CANCELLED, call
    patience = time.monotonic() + TIMEOUT_S
    while aborts() < before + calls:
        assert time.monotonic() < patience, f"{aborts() - before} of {calls} calls were cancelled"
        time.sleep(0.1)
    list(service.call("Generate", text="One", max_tokens=1))


def deadline(channel):
    service = Service(channel, OURS)
    call = lambda: service.call("Generate", timeout=0.05, text="One", ignore_eos=True)
    refused(grpc.StatusCode.DEADLINE_EXCEEDED, call)
    list(service.call("Generate", text="One", max_tokens=1))


def vllm(channel):
    control, inference = Service(channel, "vllm.Control"), Service(channel, "vllm.Inference")
    info = control.call("GetServerInfo")
    assert info.parallelism.tensor_parallel_size == info.parallelism.world_size > 0, info
    assert info.kv_block_size > 0 and info.total_kv_blocks > 0 and info.max_batched_tokens > 0, info
    assert control.call("GetModelInfo").served_model_name == "builtin"

    more = {"stopping": {"max_new_tokens": 48}, "response": {"output_token_ids": True, "output_logprobs": True}}
    answer = inference.call("Generate", text=PROMPT, **more)
    output = answer.outputs
    assert output.text == ANSWER, answer
    assert len(output.token_ids) == len(output.logprobs) == output.num_tokens, answer
    # Greedy: what was taken is the likeliest.
    assert set(output.ranks) == {1}, answer
    assert output.finish_info.finish_reason == 2 and output.finish_info.WhichOneof("stop_reason") == "eos_token_id"
    chunks = list(inference.call("GenerateStream", text=PROMPT, **more))
    assert "".join(chunk.outputs.text for chunk in chunks) == ANSWER, chunks
    assert chunks[0].prompt_info == answer.prompt_info and len(chunks) > 1, chunks

    shaped = {"choice": {"choices": ["maybe", "perhaps"]}}
    output = inference.call("Generate", text=PROMPT, decoding=shaped).outputs
    assert output.text in ("maybe", "perhaps") and output.finish_info.finish_reason == 2, output

    endless = {"max_new_tokens": 4000, "ignore_eos": True}
    call = inference.call("GenerateStream", request_id="mine", text="One", stopping=endless)
    while next(call).outputs.num_tokens == 0:
        pass
    control.call("Abort", request_ids=["mine", "nobody's"])
    finish = list(call)[-1].outputs.finish_info
    assert finish.finish_reason == 3 and finish.num_output_tokens > 0, finish
    refused(grpc.StatusCode.INVALID_ARGUMENT, lambda: inference.call("Generate", text="One", lora_name="x"))
    method = channel.unary_unary("/vllm.Control/Shutdown")
    refused(grpc.StatusCode.UNIMPLEMENTED, lambda: method(b"", timeout=TIMEOUT_S))


if __name__ == "__main__":
    check, base_url = sys.argv[1:]
    with grpc.insecure_channel(base_url.removeprefix("http://")) as channel:
        globals()[check](channel)
