//! The one error of the crate: it names the op, the tensor's role and the shapes that disagree.

/// Why an op, a builder or the selector refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// A buffer does not have the length that the other arguments imply.
    #[error("{op}: {tensor} has {actual} elements, expected {expected}")]
    Length {
        /// The op that was called.
        op: &'static str,
        /// The role of the buffer, as in the op's signature.
        tensor: &'static str,
        /// Elements that the other arguments imply.
        expected: usize,
        /// Elements that were passed.
        actual: usize,
    },
    /// A dimension or setting that the op cannot work with.
    #[error("{op}: {tensor} {problem}")]
    Shape {
        /// The op that was called.
        op: &'static str,
        /// The role of the tensor or argument.
        tensor: &'static str,
        /// What is wrong with it, with the numbers.
        problem: String,
    },
    /// An index points outside the tensor that it selects from.
    #[error("{op}: {tensor}[{position}] is {index}, must be below {limit}")]
    Index {
        /// The op that was called.
        op: &'static str,
        /// The index tensor.
        tensor: &'static str,
        /// Where in the index tensor.
        position: usize,
        /// The offending index.
        index: usize,
        /// One past the largest legal index.
        limit: usize,
    },
    /// Rows of a weight were written twice, or not at all.
    #[error("{op}: {tensor} {first} to {end} {problem}")]
    Coverage {
        /// The builder call.
        op: &'static str,
        /// "rows" or "columns" of which tensor.
        tensor: &'static str,
        /// First index concerned.
        first: usize,
        /// One past the last index concerned.
        end: usize,
        /// "were written before" or "were never written".
        problem: &'static str,
    },
    /// A value that must be finite is not.
    #[error("{op}: {tensor}[{position}] is not finite")]
    NonFinite {
        /// The op or builder.
        op: &'static str,
        /// The role of the tensor.
        tensor: &'static str,
        /// Flat index of the first such value.
        position: usize,
    },
    /// The machine cannot run the path that was asked for.
    #[error("path {path} cannot run here: {reason}")]
    PathRefused {
        /// The path by its display name.
        path: &'static str,
        /// What is missing.
        reason: String,
    },
    /// A name that is no path.
    #[error("unknown {kind} path {name:?}, one of {known}")]
    UnknownPath {
        /// "linear" or "attention".
        kind: &'static str,
        /// What was typed.
        name: String,
        /// The known names, comma separated.
        known: String,
    },
    /// The card or its driver.
    #[error(transparent)]
    Cuda(#[from] crate::cuda::CudaError),
    /// The operating system gave no threads.
    #[error("thread pool of {threads} threads: {problem}")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// What the system said.
        problem: String,
    },
}

/// `Err(Length)` unless `actual == expected`.
pub(crate) fn expect_length(
    op: &'static str,
    tensor: &'static str,
    expected: usize,
    actual: usize,
) -> Result<(), KernelError> {
    if actual == expected {
        Ok(())
    } else {
        Err(KernelError::Length {
            op,
            tensor,
            expected,
            actual,
        })
    }
}

/// `Err(Shape)` with `problem` unless `holds`.
pub(crate) fn expect_shape(
    op: &'static str,
    tensor: &'static str,
    holds: bool,
    problem: impl FnOnce() -> String,
) -> Result<(), KernelError> {
    if holds {
        Ok(())
    } else {
        Err(KernelError::Shape {
            op,
            tensor,
            problem: problem(),
        })
    }
}
