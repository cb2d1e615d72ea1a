"""What `tritonclient` makes of a server. Run as: triton_checks.py CHECK BASE_URL.

Each function is a check; `tests/clients/main.rs` runs them all against the embedded model.
"""

import json
import queue
import sys

import numpy as np
import tritonclient.grpc as triton

QUESTION = "What is 345 + 278?"
# As the model's chat template writes it.
PROMPT = (
    "<|im_start|>system\nYou are the small demo model inside secondwind.<|im_end|>\n"
    f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
)
ANSWER = "345 + 278 = 623"
TIMEOUT_S = 60


def tensor(name, value):
    if isinstance(value, bool):
        tensor, values = triton.InferInput(name, [1], "BOOL"), np.array([value], dtype=bool)
    else:
        tensor, values = triton.InferInput(name, [1], "BYTES"), np.array([value.encode()], dtype=object)
    tensor.set_data_from_numpy(values)
    return tensor


def inputs(prompt=PROMPT, **more):
    sampling = {"temperature": "0", "max_tokens": "48"}
    return [tensor("text_input", prompt), tensor("sampling_parameters", json.dumps(sampling))] + [
        tensor(name, value) for name, value in more.items()
    ]


def text(result):
    return result.as_numpy("text_output")[0].decode()


def refused(code, call):
    try:
        call()
    except triton.InferenceServerException as error:
        assert error.status() == f"StatusCode.{code}", error
        return error
    raise AssertionError(f"not {code}")


def metadata(client):
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("builtin") and client.is_model_ready("builtin", "1")
    assert client.get_server_metadata().name == "secondwind"
    model = client.get_model_metadata("builtin")
    assert [tensor.name for tensor in model.outputs] == ["text_output"], model
    first = model.inputs[0]
    assert (first.name, first.datatype, list(first.shape)) == ("text_input", "BYTES", [1]), model
    refused("NOT_FOUND", lambda: client.get_model_metadata("gpt-4"))


def infer(client):
    outputs = [triton.InferRequestedOutput("text_output")]
    result = client.infer("builtin", inputs(), outputs=outputs, request_id="7", client_timeout=TIMEOUT_S)
    assert text(result) == ANSWER, result.get_response()
    response = result.get_response()
    assert response.id == "7"
    assert response.parameters["finish_reason"].string_param == "stop", response
    assert response.parameters["completion_tokens"].int64_param > 1, response
    # Without a tensor of them, parameters are the request's.
    given = {"max_tokens": 3, "temperature": 0, "ignore_eos": True}
    result = client.infer("builtin", [tensor("text_input", "One")], parameters=given)
    assert result.get_response().parameters["completion_tokens"].int64_param == 3
    error = refused("INVALID_ARGUMENT", lambda: client.infer("builtin", inputs(image="x")))
    assert "image" in str(error), error
    error = refused("INVALID_ARGUMENT", lambda: client.infer("builtin", inputs(), parameters={"top_p": 2.0}))
    assert "top_p" in str(error), error
    refused("NOT_FOUND", lambda: client.infer("gpt-4", inputs()))


def stream(client):
    results = queue.Queue()
    client.start_stream(lambda result, error: results.put((result, error)), stream_timeout=TIMEOUT_S)
    client.async_stream_infer("builtin", inputs(stream=True), request_id="pieces")
    client.async_stream_infer("builtin", inputs(), request_id="whole")
    client.async_stream_infer("builtin", inputs(image="x"), request_id="wrong")
    said, errors, finals = {"pieces": [], "whole": []}, [], 0
    while finals < 2 or not errors:
        result, error = results.get(timeout=TIMEOUT_S)
        if error is not None:
            errors.append(str(error))
            continue
        response = result.get_response()
        said[response.id].append(text(result))
        finals += response.parameters["triton_final_response"].bool_param
    client.stop_stream()
    assert "".join(said["pieces"]) == ANSWER and len(said["pieces"]) > 1, said
    assert said["whole"] == [ANSWER], said
    assert len(errors) == 1 and "image" in errors[0], errors


if __name__ == "__main__":
    check, base_url = sys.argv[1:]
    with triton.InferenceServerClient(base_url.removeprefix("http://")) as client:
        globals()[check](client)
