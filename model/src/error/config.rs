//! What can be wrong with the JSON files.

/// A JSON file of a checkpoint says something that cannot be read or is not served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON, or not a JSON object.
    #[error("{file}: not a JSON object: {reason}")]
    Json {
        /// The file.
        file: String,
        /// What the parser said.
        reason: String,
    },
    /// A field that has no default is absent or null.
    #[error("{file}: field {field} is missing")]
    Missing {
        /// The file.
        file: String,
        /// Path of the field inside the file.
        field: String,
    },
    /// A field has the wrong type or an absurd value.
    #[error("{file}: field {field} is {found}, expected {expected}")]
    Invalid {
        /// The file.
        file: String,
        /// Path of the field inside the file.
        field: String,
        /// The value found, shortened.
        found: String,
        /// What would have been right.
        expected: String,
    },
    /// A field asks for something that exists elsewhere but is not served here.
    #[error("{file}: {field} {found} is not served; {remedy}")]
    Unsupported {
        /// The file.
        file: String,
        /// Path of the field inside the file.
        field: String,
        /// The value found, shortened.
        found: String,
        /// What is served, or what to do.
        remedy: String,
    },
    /// Two spellings or two files disagree.
    #[error(
        "field {field} is {first} in {first_file} but {second} in {second_file}; make them agree"
    )]
    Disagree {
        /// The field in its canonical spelling.
        field: String,
        /// First place.
        first_file: String,
        /// Value there.
        first: String,
        /// Second place.
        second_file: String,
        /// Value there.
        second: String,
    },
    /// Two fields of one file do not fit each other.
    #[error("{file}: {left} {left_value} is not divisible by {right} {right_value}")]
    NotDivisible {
        /// The file.
        file: String,
        /// The field to divide.
        left: String,
        /// Its value.
        left_value: u64,
        /// The divisor.
        right: String,
        /// Its value.
        right_value: u64,
    },
    /// A `dynamic` pattern is not a regular expression that can be evaluated.
    #[error(
        "{file}: dynamic pattern {pattern:?} cannot be read: {reason}; \
         prefixes are +: and -:, look-around and back-references are not read"
    )]
    Pattern {
        /// The file.
        file: String,
        /// The pattern with its prefix.
        pattern: String,
        /// What is wrong with it.
        reason: String,
    },
}
