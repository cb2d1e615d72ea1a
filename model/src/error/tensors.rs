//! What can be wrong with the tensors: headers, shapes, contents.

/// A safetensors header or the lengths around it are wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SafetensorsError {
    /// Fewer bytes than a header length.
    #[error(
        "{bytes} bytes long, too short for a safetensors file; it may be a pointer file or a broken download"
    )]
    TooShort {
        /// Length of the file.
        bytes: u64,
    },
    /// The header is longer than any real one.
    #[error("header of {bytes} bytes is over the limit of {limit}")]
    HeaderTooLong {
        /// Length that the file claims.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// The header runs past the end of the file.
    #[error("truncated: the header needs {needed} bytes, the file has {found}; download it again")]
    HeaderTruncated {
        /// Bytes needed.
        needed: u64,
        /// Bytes there.
        found: u64,
    },
    /// The header is not the JSON it should be; duplicate names end here too.
    #[error("header cannot be read: {reason}")]
    Header {
        /// What the parser said.
        reason: String,
    },
    /// A tensor's element type is unknown.
    #[error("tensor {tensor}: element type {found:?} is not read")]
    ElementType {
        /// The tensor.
        tensor: String,
        /// The type's name.
        found: String,
    },
    /// Shape times element size overflows.
    #[error("tensor {tensor}: shape {shape:?} overflows")]
    ShapeOverflow {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
    },
    /// The byte range does not have the length that shape and type imply.
    #[error("tensor {tensor}: shape {shape:?} needs {needed} bytes but its offsets span {found}")]
    Length {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
        /// Bytes that shape and type imply.
        needed: u64,
        /// Bytes between the offsets.
        found: i128,
    },
    /// Byte ranges overlap or leave a gap.
    #[error(
        "tensor {tensor}: data starts at {found}, expected {expected}; tensors must neither overlap nor leave gaps"
    )]
    Offset {
        /// The tensor.
        tensor: String,
        /// Where it starts.
        found: u64,
        /// Where the one before it ends.
        expected: u64,
    },
    /// The file is longer or shorter than its tensors.
    #[error(
        "tensors end at byte {expected} but the file has {found}; it is truncated or padded, download it again"
    )]
    FileLength {
        /// Length that the header implies.
        expected: u64,
        /// Length of the file.
        found: u64,
    },
}

/// The tensors of a checkpoint do not make up the model that its configuration describes.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ModuleError {
    /// A tensor is absent.
    #[error("tensor {tensor} is missing")]
    Missing {
        /// The tensor.
        tensor: String,
    },
    /// A tensor has another shape than the configuration implies.
    #[error("tensor {tensor}: shape is {found:?}, expected {expected:?}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape that the configuration implies.
        expected: Vec<usize>,
    },
    /// The packed shape belongs to another bit width.
    #[error(
        "tensor {tensor}: shape {found:?} holds {implied}-bit weights but the quantisation config says {bits} bits"
    )]
    Bits {
        /// The tensor.
        tensor: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Bit width that the shape implies.
        implied: u8,
        /// Bit width in the configuration, after `dynamic`.
        bits: u8,
    },
    /// A tensor has an element type that it cannot have.
    #[error("tensor {tensor}: element type is {found}, expected {expected}")]
    ElementType {
        /// The tensor.
        tensor: String,
        /// Type in the file.
        found: String,
        /// Types that are read.
        expected: String,
    },
    /// Both `.weight` and `.qweight`.
    #[error("module {module} has both .weight and .qweight; remove one of them")]
    BothForms {
        /// The module.
        module: String,
    },
    /// The configuration says quantised, the tensors say not.
    #[error(
        "module {module} is quantised according to the quantisation config, but the checkpoint has {module}.weight and no {module}.qweight; exclude it with a \"-:\" pattern in dynamic"
    )]
    NotQuantised {
        /// The module.
        module: String,
    },
    /// The tensors say quantised, the configuration says not.
    #[error(
        "module {module} has {module}.qweight but the quantisation config excludes it or is absent"
    )]
    Quantised {
        /// The module.
        module: String,
    },
    /// The embedding table is quantised.
    #[error("tensor {tensor}: quantised embeddings are not served; re-quantise without them")]
    QuantisedEmbedding {
        /// The tensor.
        tensor: String,
    },
    /// `lm_head` has its own quantised weights although it is tied to the embeddings.
    #[error(
        "tensor lm_head.qweight is present although tie_word_embeddings is true; set tie_word_embeddings to false to serve it"
    )]
    TiedHeadQuantised,
    /// A bit width that is not read.
    #[error("module {module}: {bits} bits are not served; 2, 3, 4 and 8 are")]
    UnservedBits {
        /// The module.
        module: String,
        /// Bit width after `dynamic`.
        bits: i64,
    },
    /// A group size that is not read.
    #[error("module {module}: group size {group_size} is not served; 32, 64, 128 and -1 are")]
    UnservedGroupSize {
        /// The module.
        module: String,
        /// Group size after `dynamic`.
        group_size: i64,
    },
    /// A width that does not fill whole packed words.
    #[error(
        "module {module}: {dimension} width {width} does not fill whole 32-bit words at {bits} bits"
    )]
    PartialWord {
        /// The module.
        module: String,
        /// `input` or `output`.
        dimension: &'static str,
        /// Its width.
        width: usize,
        /// Bit width after `dynamic`.
        bits: u8,
    },
}

/// The contents of a GPTQ tensor are wrong.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum GptqError {
    /// A slice has another length than its shape implies.
    #[error("tensor {tensor}: {found} elements, expected {expected}")]
    Length {
        /// The tensor.
        tensor: String,
        /// Elements given.
        found: usize,
        /// Elements that the shape implies.
        expected: usize,
    },
    /// A range of columns or groups leaves the tensor.
    #[error("tensor {tensor}: columns {start}..{end} are outside its {columns}")]
    Columns {
        /// The tensor.
        tensor: String,
        /// First column asked for.
        start: usize,
        /// End of the columns asked for.
        end: usize,
        /// Columns that exist.
        columns: usize,
    },
    /// A row points at a group that does not exist.
    #[error(
        "tensor {tensor}: row {row} belongs to group {group}, but there are {groups} groups; the checkpoint is damaged"
    )]
    GroupIndex {
        /// The tensor.
        tensor: String,
        /// Row of K.
        row: usize,
        /// Its value.
        group: i32,
        /// Groups that exist.
        groups: usize,
    },
    /// A scale is NaN or infinite.
    #[error(
        "tensor {tensor}: scale of group {group}, column {column} is {value}; the checkpoint is damaged"
    )]
    Scale {
        /// The tensor.
        tensor: String,
        /// Row of the tensor.
        group: usize,
        /// Column of the tensor.
        column: usize,
        /// The value.
        value: f32,
    },
}
