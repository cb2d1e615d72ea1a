//! [`Capabilities`] on the wire.

use secondwind_model::capabilities::{Capabilities, LinearCapability, Recordings, WeightKind};

use crate::{WireError, index, v1};

impl From<&Capabilities> for v1::Capabilities {
    fn from(from: &Capabilities) -> Self {
        Self {
            device: from.device.clone(),
            usable_bytes: from.usable_bytes,
            read_bytes_per_second: from.read_bytes_per_second,
            all_reduce_latency_seconds: from.all_reduce_latency_seconds,
            op_latency_seconds: from.op_latency_seconds,
            linears: from.linears.iter().map(Into::into).collect(),
            recordings: Some(v1::Recordings {
                sizes: from
                    .recordings
                    .sizes
                    .iter()
                    .map(|size| *size as u64)
                    .collect(),
                bytes_per_layer: from.recordings.bytes_per_layer,
                bytes_per_sum: from.recordings.bytes_per_sum,
                nccl_bytes: from.recordings.nccl_bytes,
            }),
        }
    }
}

impl TryFrom<v1::Capabilities> for Capabilities {
    type Error = WireError;

    fn try_from(from: v1::Capabilities) -> Result<Self, WireError> {
        Ok(Self {
            device: from.device,
            usable_bytes: from.usable_bytes,
            read_bytes_per_second: positive(from.read_bytes_per_second, "read_bytes_per_second")?,
            all_reduce_latency_seconds: not_negative(
                from.all_reduce_latency_seconds,
                "all_reduce_latency_seconds",
            )?,
            op_latency_seconds: not_negative(from.op_latency_seconds, "op_latency_seconds")?,
            linears: from
                .linears
                .into_iter()
                .map(TryInto::try_into)
                .collect::<Result<_, _>>()?,
            recordings: recordings(from.recordings.unwrap_or_default())?,
        })
    }
}

fn recordings(from: v1::Recordings) -> Result<Recordings, WireError> {
    let size = |size| index(size, "Recordings", "sizes");
    Ok(Recordings {
        sizes: from.sizes.into_iter().map(size).collect::<Result<_, _>>()?,
        bytes_per_layer: from.bytes_per_layer,
        bytes_per_sum: from.bytes_per_sum,
        nccl_bytes: from.nccl_bytes,
    })
}

impl From<&LinearCapability> for v1::LinearCapability {
    fn from(from: &LinearCapability) -> Self {
        let weights = match from.weights {
            WeightKind::Gptq { bits: 2 } => v1::WeightKind::Gptq2,
            WeightKind::Gptq { bits: 3 } => v1::WeightKind::Gptq3,
            WeightKind::Gptq { bits: 4 } => v1::WeightKind::Gptq4,
            WeightKind::Gptq { bits: 8 } => v1::WeightKind::Gptq8,
            WeightKind::Gptq { .. } => v1::WeightKind::Unspecified,
            WeightKind::Dense16 => v1::WeightKind::Dense16,
            WeightKind::Dense32 => v1::WeightKind::Dense32,
        };
        Self {
            weights: weights.into(),
            max_rows: from.max_rows as u64,
            path: from.path.clone(),
            bytes_per_weight: from.bytes_per_weight,
            column_multiple: from.column_multiple as u64,
            row_multiple: from.row_multiple as u64,
            scale_rows: from.scale_rows as u64,
            bytes_per_scale: from.bytes_per_scale,
            scratch_bytes_per_row: from.scratch_bytes_per_row,
            scratch_bytes: from.scratch_bytes,
            seconds_per_byte: from.seconds_per_byte,
        }
    }
}

impl TryFrom<v1::LinearCapability> for LinearCapability {
    type Error = WireError;

    fn try_from(from: v1::LinearCapability) -> Result<Self, WireError> {
        let message = "LinearCapability";
        let weights = match from.weights() {
            v1::WeightKind::Gptq2 => WeightKind::Gptq { bits: 2 },
            v1::WeightKind::Gptq3 => WeightKind::Gptq { bits: 3 },
            v1::WeightKind::Gptq4 => WeightKind::Gptq { bits: 4 },
            v1::WeightKind::Gptq8 => WeightKind::Gptq { bits: 8 },
            v1::WeightKind::Dense16 => WeightKind::Dense16,
            v1::WeightKind::Dense32 => WeightKind::Dense32,
            v1::WeightKind::Unspecified => {
                return Err(WireError::Invalid {
                    message,
                    field: "weights",
                    value: from.weights.to_string(),
                });
            }
        };
        let multiple = |value, field| match index(value, message, field)? {
            multiple @ 1..=4096 => Ok(multiple),
            other => Err(WireError::Invalid {
                message,
                field,
                value: other.to_string(),
            }),
        };
        Ok(Self {
            weights,
            max_rows: index(from.max_rows, message, "max_rows")?,
            path: from.path,
            bytes_per_weight: positive(from.bytes_per_weight, "bytes_per_weight")?,
            column_multiple: multiple(from.column_multiple, "column_multiple")?,
            row_multiple: multiple(from.row_multiple, "row_multiple")?,
            scale_rows: index(from.scale_rows, "LinearCapability", "scale_rows")?,
            bytes_per_scale: not_negative(from.bytes_per_scale, "bytes_per_scale")?,
            scratch_bytes_per_row: not_negative(
                from.scratch_bytes_per_row,
                "scratch_bytes_per_row",
            )?,
            scratch_bytes: not_negative(from.scratch_bytes, "scratch_bytes")?,
            seconds_per_byte: positive(from.seconds_per_byte, "seconds_per_byte")?,
        })
    }
}

fn positive(value: f64, field: &'static str) -> Result<f64, WireError> {
    if value.is_finite() && value > 0.0 {
        return Ok(value);
    }
    Err(WireError::Invalid {
        message: "Capabilities",
        field,
        value: value.to_string(),
    })
}

fn not_negative(value: f64, field: &'static str) -> Result<f64, WireError> {
    if value == 0.0 {
        return Ok(0.0);
    }
    positive(value, field)
}
