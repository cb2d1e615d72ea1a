//! Which paths a card takes: what the one selector says of it.

use secondwind_kernels::{
    KernelError,
    cuda::{Arch, Linear},
    kv::KvDtype,
    select::{
        AttentionPath, AttentionTask, Choice, DeviceFacts, LinearPath, Phase, Precision,
        select_attention, select_linear,
    },
};

/// What a choice depends on beside the operation.
#[derive(Clone, Copy)]
pub(super) struct Paths {
    facts: DeviceFacts,
    pub precision: Precision,
    forced_linear: Option<LinearPath>,
    forced_attention: Option<AttentionPath>,
}

impl Paths {
    /// Paths may be forced; one that the architecture does not have is refused here.
    pub fn new(
        arch: Arch,
        forced_linear: Option<LinearPath>,
        forced_attention: Option<AttentionPath>,
    ) -> Result<Self, KernelError> {
        let paths = Self {
            facts: DeviceFacts::Cuda { arch },
            precision: Precision::Fast,
            forced_linear,
            forced_attention,
        };
        for phase in [Phase::Decode, Phase::Prefill] {
            paths.attention(phase, 128, KvDtype::F16)?;
        }
        Ok(Self {
            precision: Precision::Exact,
            ..paths
        })
    }

    pub fn linear(&self, linear: &Linear, rows: usize) -> Result<Choice<LinearPath>, KernelError> {
        let shape = linear.shape(rows);
        select_linear(self.facts, shape, self.precision, self.forced_linear)
    }

    pub fn attention(
        &self,
        phase: Phase,
        head_dim: usize,
        kv: KvDtype,
    ) -> Result<Choice<AttentionPath>, KernelError> {
        let task = AttentionTask {
            phase,
            head_dim,
            kv,
            precision: self.precision,
        };
        select_attention(self.facts, task, self.forced_attention)
    }

    /// True if every one of `readers` wants `rows` rows as 8-bit integers in their own order.
    pub fn want_a8(&self, readers: &[&Linear], rows: usize) -> Result<bool, KernelError> {
        for reader in readers {
            let path = self.linear(reader, rows)?.path;
            if !(reader.is_plain() && path.takes_a8()) {
                return Ok(false);
            }
        }
        Ok(!readers.is_empty())
    }

    /// For people: by number of rows.
    pub fn linear_lines(&self, linear: &Linear) -> Vec<String> {
        let line = |rows| {
            let Choice { path, reason } = self.linear(linear, rows).ok()?;
            let format = linear.format();
            Some(format!("{format}, {rows} rows: {path} ({reason})"))
        };
        [1, 8, 64, 512].into_iter().filter_map(line).collect()
    }

    /// For people: by phase.
    pub fn attention_line(&self, head_dim: usize, kv: KvDtype) -> String {
        let choice = |phase| match self.attention(phase, head_dim, kv) {
            Ok(Choice { path, reason }) => format!("{path} ({reason})"),
            Err(error) => error.to_string(),
        };
        let (decode, prefill) = (choice(Phase::Decode), choice(Phase::Prefill));
        format!("attention: decode {decode}; prefill {prefill}")
    }
}
