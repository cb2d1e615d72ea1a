//! Requests of KServe's protocol that are wrong, each named by its tensor or parameter.

use super::*;

#[tokio::test]
async fn what_is_wrong_is_named_by_its_tensor() {
    let served = served().await;
    let input = || texts("text_input", "hello");
    let with = |tensor: InferInputTensor| ask(vec![input(), tensor]);
    let changed = |change: fn(&mut InferInputTensor)| {
        let mut tensor = input();
        change(&mut tensor);
        ask(vec![tensor])
    };
    let given = |name: &str, choice| {
        let mut request = hello();
        request.parameters = parameters([(name, choice)]);
        request
    };
    let text = |text: &str| ParameterChoice::StringParam(text.to_owned());
    let mut output = hello();
    output.outputs = vec![InferRequestedOutputTensor {
        name: "logits".to_owned(),
        ..InferRequestedOutputTensor::default()
    }];
    let mut both = hello();
    both.raw_input_contents = vec![vec![0; 4]];
    let mut empty = hello();
    empty
        .parameters
        .insert("top_p".to_owned(), InferParameter::default());
    let cases = [
        (ask(vec![]), "text_input: the input is missing"),
        (ask(vec![input(), input()]), "text_input: comes twice"),
        (
            with(texts("image", "")),
            "inputs: there is no input \"image\"; there are text_input, stream, sampling_parameters, exclude_input_in_output",
        ),
        (
            changed(|tensor| tensor.datatype = "INT32".to_owned()),
            "text_input: is of datatype \"INT32\", not BYTES",
        ),
        (
            changed(|tensor| tensor.shape = vec![1, 1]),
            "text_input: has shape [1, 1], not [1]",
        ),
        (
            changed(|tensor| tensor.contents = None),
            "text_input: has no contents; set contents, or raw_input_contents for all inputs",
        ),
        (
            changed(|tensor| {
                tensor
                    .contents
                    .as_mut()
                    .unwrap()
                    .bytes_contents
                    .push(vec![])
            }),
            "text_input: its contents hold 2 elements of its datatype, not 1 and no other",
        ),
        (
            changed(|tensor| tensor.contents.as_mut().unwrap().int_contents.push(1)),
            "text_input: its contents hold 1 elements of its datatype, not 1 and no other",
        ),
        (
            changed(|tensor| {
                tensor.contents.as_mut().unwrap().bytes_contents[0] = vec![b'a', 0xff]
            }),
            "text_input: not UTF-8 from byte 1 on",
        ),
        (
            changed(|tensor| {
                tensor
                    .parameters
                    .insert("shared_memory_region".to_owned(), InferParameter::default());
            }),
            "text_input.shared_memory_region: is not supported; leave it out",
        ),
        (both, "text_input: has contents beside raw_input_contents"),
        (
            raw(hello(), vec![vec![9, 0, 0, 0, b'a']]),
            "text_input: its 5 raw bytes are not one element behind its length in 4 bytes, the lowest first",
        ),
        (
            raw(hello(), vec![vec![0, 0]]),
            "text_input: its 2 raw bytes are not one element behind its length in 4 bytes, the lowest first",
        ),
        (
            raw(hello(), vec![vec![]; 2]),
            "raw_input_contents: 2 entries for 1 inputs",
        ),
        (
            raw(with(truth("stream", true)), vec![vec![0; 4], vec![2]]),
            "stream: its raw bytes are not one byte of 0 or 1",
        ),
        (
            with(truth("stream", true)),
            "stream: an answer as it comes has no place in one response; use ModelStreamInfer",
        ),
        (
            output,
            "outputs: there is no output \"logits\"; there is text_output",
        ),
        (empty, "top_p: the parameter has no value"),
        (
            given("top_p", ParameterChoice::DoubleParam(2.0)),
            "top_p: 2 is not above 0 and at most 1",
        ),
        (
            given("top_p", text("x")),
            "top_p: is a string, not a number",
        ),
        (given("prompt", text("x")), "prompt: is given twice"),
        (
            given("n", ParameterChoice::Int64Param(2)),
            "n: is not 1; send a request for each answer that is wanted",
        ),
        (
            given("logprobs", ParameterChoice::Int64Param(2)),
            "logprobs: is not supported; leave it out",
        ),
        (
            given("best_of", ParameterChoice::Uint64Param(2)),
            "best_of: is not supported; leave it out",
        ),
        (
            given("sequence_id", ParameterChoice::Int64Param(2)),
            "sequence_id: is not supported; leave it out",
        ),
        (
            given("timeout", ParameterChoice::Int64Param(-2)),
            "timeout: -2 is no count of microseconds",
        ),
        (
            given("temperature", ParameterChoice::DoubleParam(f64::NAN)),
            "temperature: NaN is no number",
        ),
        (
            with(texts("sampling_parameters", r#"{"timeout": 5}"#)),
            "sampling_parameters.timeout: is not supported; leave it out",
        ),
        (
            with(texts("sampling_parameters", "[]")),
            "sampling_parameters: no JSON object: invalid type: sequence, expected a map at line 1 column 0",
        ),
        (
            ask(vec![texts("text_input", "")]),
            "text_input: the prompt is empty",
        ),
    ];
    for (request, message) in cases {
        let status = client(&served).model_infer(request).await.unwrap_err();
        assert_eq!(
            (status.code(), status.message()),
            (Code::InvalidArgument, message)
        );
    }
    assert!(served.engine.submitted.lock().unwrap().is_empty());
}
