//! Tensors of a request and of an answer. All have one element, a text or a truth value.

use secondwind_proto::kserve::model_infer_request::InferInputTensor;
use secondwind_proto::kserve::model_infer_response::InferOutputTensor;
use secondwind_proto::kserve::{InferTensorContents, ModelInferRequest, ModelInferResponse};

use super::super::status::ApiError;

/// What a tensor holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Datatype {
    /// UTF-8.
    Bytes,
    Bool,
}

impl Datatype {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Bytes => "BYTES",
            Self::Bool => "BOOL",
        }
    }
}

/// What a model takes; only the first must be there. The names are those of vLLM's backend for Triton.
pub(super) const INPUTS: [(&str, Datatype); 4] = [
    ("text_input", Datatype::Bytes),
    ("stream", Datatype::Bool),
    ("sampling_parameters", Datatype::Bytes),
    ("exclude_input_in_output", Datatype::Bool),
];

/// What it gives.
pub(super) const OUTPUT: &str = "text_output";

/// Of every tensor.
pub(super) const SHAPE: [i64; 1] = [1];

/// The inputs of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Inputs {
    pub text_input: String,
    pub stream: bool,
    /// JSON.
    pub sampling_parameters: Option<String>,
    pub exclude_input_in_output: Option<bool>,
    /// They came raw.
    pub raw: bool,
}

/// Takes the inputs out of `request`.
///
/// # Errors
/// Name the tensor.
pub(super) fn take(request: &mut ModelInferRequest) -> Result<Inputs, ApiError> {
    let tensors = std::mem::take(&mut request.inputs);
    let raw = std::mem::take(&mut request.raw_input_contents);
    if !raw.is_empty() && raw.len() != tensors.len() {
        let detail = format!("{} entries for {} inputs", raw.len(), tensors.len());
        return Err(ApiError::value("raw_input_contents", detail));
    }
    let mut inputs = Inputs {
        raw: !raw.is_empty(),
        ..Inputs::default()
    };
    let mut seen: Vec<String> = Vec::new();
    let mut raw = raw.into_iter();
    for tensor in tensors {
        let name = tensor.name.clone();
        if seen.contains(&name) {
            return Err(ApiError::value(name, "comes twice"));
        }
        let element = Element {
            raw: raw.next(),
            tensor,
        };
        match name.as_str() {
            "text_input" => inputs.text_input = element.text()?,
            "stream" => inputs.stream = element.truth()?,
            "sampling_parameters" => inputs.sampling_parameters = Some(element.text()?),
            "exclude_input_in_output" => inputs.exclude_input_in_output = Some(element.truth()?),
            _ => {
                let known = INPUTS.map(|(name, _)| name).join(", ");
                let detail = format!("there is no input {name:?}; there are {known}");
                return Err(ApiError::value("inputs", detail));
            }
        }
        seen.push(name);
    }
    match seen.iter().any(|name| name == "text_input") {
        true => Ok(inputs),
        false => Err(ApiError::value("text_input", "the input is missing")),
    }
}

/// An input that is not read yet.
struct Element {
    tensor: InferInputTensor,
    /// Its contents, if they came apart.
    raw: Option<Vec<u8>>,
}

impl Element {
    fn text(self) -> Result<String, ApiError> {
        self.check(Datatype::Bytes)?;
        let name = self.tensor.name.clone();
        let bytes = match self.raw {
            Some(raw) => {
                let mut raw = raw;
                let length = raw.first_chunk().map(|length| u32::from_le_bytes(*length));
                if length.is_none_or(|length| length as usize != raw.len() - 4) {
                    let detail = format!(
                        "its {} raw bytes are not one element behind its length in 4 bytes, the lowest first",
                        raw.len()
                    );
                    return Err(ApiError::value(name, detail));
                }
                raw.split_off(4)
            }
            None => self.typed(|contents| std::mem::take(&mut contents.bytes_contents))?,
        };
        String::from_utf8(bytes).map_err(|error| {
            let at = error.utf8_error().valid_up_to();
            ApiError::value(name, format!("not UTF-8 from byte {at} on"))
        })
    }

    fn truth(self) -> Result<bool, ApiError> {
        self.check(Datatype::Bool)?;
        match &self.raw {
            Some(raw) => match raw[..] {
                [0] => Ok(false),
                [1] => Ok(true),
                _ => {
                    let detail = "its raw bytes are not one byte of 0 or 1";
                    Err(ApiError::value(self.tensor.name, detail))
                }
            },
            None => self.typed(|contents| std::mem::take(&mut contents.bool_contents)),
        }
    }

    /// The one element of `contents`.
    fn typed<T>(self, of: fn(&mut InferTensorContents) -> Vec<T>) -> Result<T, ApiError> {
        let name = self.tensor.name;
        let Some(mut contents) = self.tensor.contents else {
            let detail = "has no contents; set contents, or raw_input_contents for all inputs";
            return Err(ApiError::value(name, detail));
        };
        let mut elements = of(&mut contents);
        let count = elements.len();
        match elements.pop() {
            Some(element) if count == 1 && contents == InferTensorContents::default() => {
                Ok(element)
            }
            _ => {
                let detail = format!(
                    "its contents hold {count} elements of its datatype, not 1 and no other"
                );
                Err(ApiError::value(name, detail))
            }
        }
    }

    fn check(&self, datatype: Datatype) -> Result<(), ApiError> {
        let tensor = &self.tensor;
        let wrong = |detail: String| Err(ApiError::value(tensor.name.clone(), detail));
        if let Some(parameter) = tensor.parameters.keys().next() {
            return Err(ApiError::unsupported(format!(
                "{}.{parameter}",
                tensor.name
            )));
        }
        if tensor.datatype != datatype.name() {
            return wrong(format!(
                "is of datatype {:?}, not {}",
                tensor.datatype,
                datatype.name()
            ));
        }
        if tensor.shape != SHAPE {
            return wrong(format!("has shape {:?}, not {SHAPE:?}", tensor.shape));
        }
        if self.raw.is_some() && tensor.contents.is_some() {
            return wrong("has contents beside raw_input_contents".to_owned());
        }
        Ok(())
    }
}

/// Puts `text` into `response`, raw or not.
pub(super) fn put(text: String, raw: bool, response: &mut ModelInferResponse) {
    let mut tensor = InferOutputTensor {
        name: OUTPUT.to_owned(),
        datatype: Datatype::Bytes.name().to_owned(),
        shape: SHAPE.to_vec(),
        ..InferOutputTensor::default()
    };
    if raw {
        let mut bytes = (text.len() as u32).to_le_bytes().to_vec();
        bytes.extend(text.into_bytes());
        response.raw_output_contents.push(bytes);
    } else {
        tensor.contents = Some(InferTensorContents {
            bytes_contents: vec![text.into_bytes()],
            ..InferTensorContents::default()
        });
    }
    response.outputs.push(tensor);
}
