//! A request of the protocol to the body of `/v1/completions` that asks the same.

use std::time::{Duration, Instant};

use secondwind_proto::kserve::ModelInferRequest;
use secondwind_proto::kserve::infer_parameter::ParameterChoice;
use serde_json::{Map, Value as Json, json};

use super::super::frontend::ServedModel;
use super::super::http::{Completion, completion};
use super::super::status::ApiError;
use super::tensors::{self, OUTPUT};

/// The model's only version.
pub(super) const VERSION: &str = "1";

/// Parameters of Triton's clients that say nothing of the answer.
const HINTS: [&str; 2] = ["triton_enable_empty_final_response", "binary_data_output"];
/// Those of sequences that keep a state, which no model here does.
const UNSUPPORTED: [&str; 3] = ["sequence_id", "sequence_start", "sequence_end"];

/// A request that can be run.
pub(super) struct Asked {
    pub completion: Completion,
    /// Tensors came raw, and go raw.
    pub raw: bool,
}

/// Reads and checks `request`.
pub(super) fn read(
    mut request: ModelInferRequest,
    strict: bool,
    model: &ServedModel,
    deadline: Option<Instant>,
) -> Result<Asked, ApiError> {
    check_model(&request.model_name, &request.model_version, model)?;
    for output in &request.outputs {
        if output.name != OUTPUT {
            let detail = format!("there is no output {:?}; there is {OUTPUT}", output.name);
            return Err(ApiError::value("outputs", detail));
        }
        if let Some(parameter) = output.parameters.keys().next() {
            return Err(ApiError::unsupported(format!("{OUTPUT}.{parameter}")));
        }
    }
    let inputs = tensors::take(&mut request)?;
    let mut body = Map::new();
    body.insert("prompt".to_owned(), inputs.text_input.into());
    body.insert("stream".to_owned(), inputs.stream.into());
    if let Some(exclude) = inputs.exclude_input_in_output {
        body.insert("echo".to_owned(), (!exclude).into());
    }
    let mut given = Vec::new();
    if let Some(json) = inputs.sampling_parameters {
        given.extend(sampling_parameters(&json)?);
    }
    let mut deadline = deadline;
    for (name, parameter) in request.parameters {
        let value = match parameter.parameter_choice {
            Some(ParameterChoice::BoolParam(value)) => json!(value),
            Some(ParameterChoice::Int64Param(value)) => json!(value),
            Some(ParameterChoice::Uint64Param(value)) => json!(value),
            Some(ParameterChoice::DoubleParam(value)) if !value.is_finite() => {
                return Err(ApiError::value(name, format!("{value} is no number")));
            }
            Some(ParameterChoice::DoubleParam(value)) => json!(value),
            Some(ParameterChoice::StringParam(value)) => json!(value),
            None => return Err(ApiError::value(name, "the parameter has no value")),
        };
        if name == "timeout" {
            deadline = earlier(deadline, &value)?;
        } else if UNSUPPORTED.contains(&name.as_str()) {
            return Err(ApiError::unsupported(name));
        } else if !HINTS.contains(&name.as_str()) {
            given.push((name, value));
        }
    }
    for (name, value) in given {
        if body.contains_key(&name) {
            return Err(ApiError::value(name, "is given twice"));
        }
        body.insert(name, value);
    }
    let mut completion = completion(body, strict, model).map_err(by_tensor)?;
    completion.checked.sequence.deadline = deadline;
    Ok(Asked {
        completion,
        raw: inputs.raw,
    })
}

/// The name and version are those of the model that is served.
pub(super) fn check_model(name: &str, version: &str, model: &ServedModel) -> Result<(), ApiError> {
    if name != model.name {
        return Err(ApiError::ModelNotFound {
            asked: name.to_owned(),
            served: model.name.clone(),
        });
    }
    match version {
        "" | VERSION => Ok(()),
        _ => Err(ApiError::ModelNotFound {
            asked: format!("{name}, version {version}"),
            served: format!("{name}, version {VERSION}"),
        }),
    }
}

/// Fields that are texts, even if they look like numbers.
const TEXTS: [&str; 3] = ["stop", "cache_salt", "model"];

/// The fields of the JSON object. Clients of vLLM's backend write numbers as strings too.
fn sampling_parameters(json: &str) -> Result<Map<String, Json>, ApiError> {
    let wrong = |detail: String| ApiError::value("sampling_parameters", detail);
    let mut fields: Map<String, Json> =
        serde_json::from_str(json).map_err(|error| wrong(format!("no JSON object: {error}")))?;
    for (name, value) in &mut fields {
        if name == "timeout" {
            return Err(ApiError::unsupported("sampling_parameters.timeout"));
        }
        let plain = value.as_str().filter(|_| !TEXTS.contains(&name.as_str()));
        let number = plain.and_then(|text| serde_json::from_str::<Json>(text).ok());
        if let Some(number) = number.filter(|json| json.is_number() || json.is_boolean()) {
            *value = number;
        }
    }
    Ok(fields)
}

/// The earlier of `deadline` and so many microseconds from now; 0 is none.
fn earlier(deadline: Option<Instant>, micros: &Json) -> Result<Option<Instant>, ApiError> {
    let micros = micros.as_u64().ok_or_else(|| {
        ApiError::value("timeout", format!("{micros} is no count of microseconds"))
    })?;
    let own = Some(micros).filter(|&micros| micros != 0);
    let own = own.and_then(|micros| Instant::now().checked_add(Duration::from_micros(micros)));
    Ok(match (deadline, own) {
        (Some(deadline), Some(own)) => Some(deadline.min(own)),
        (deadline, own) => deadline.or(own),
    })
}

/// The prompt came in a tensor.
fn by_tensor(error: ApiError) -> ApiError {
    match error {
        ApiError::Named { field, source } if field == "prompt" => ApiError::Named {
            field: "text_input".to_owned(),
            source,
        },
        other => other,
    }
}
