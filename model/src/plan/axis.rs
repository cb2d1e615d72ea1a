//! Axes: the cuts of a plan, each shared by every layer of the same shape.

use std::ops::Range;

use super::ModelShape;
use super::cost::Rate;
use super::shape::Heads;
use crate::modules::{Axis, GptqFormat, LinearModule, LinearRole, WeightFormat};

/// Vocabulary rows of a cut come in multiples of this where every rank can get as many.
const VOCAB_MULTIPLE: usize = 16;
/// Channels of a cut inside a quantisation group come in multiples of this where possible.
const CHANNEL_MULTIPLE: usize = 8;

/// How finely channels may be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Grain {
    /// At the quantisation groups of the down projection, where every rank can get one.
    Group,
    /// At multiples of 8, where every rank can get that many.
    Eight,
    /// Anywhere.
    One,
}

/// What an axis is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AxisKind {
    Heads(Heads),
    Channels(usize),
    Vocab,
}

/// One cut, shared by every layer of the same shape.
#[derive(Clone, Debug)]
pub(super) struct CutAxis {
    pub kind: AxisKind,
    /// Layers that share it; empty for the vocabulary.
    pub layers: Vec<usize>,
    pub units: usize,
    /// Units per step of a boundary.
    pub quantum: usize,
    /// Steps that every rank gets at least.
    pub least: usize,
    pub modules: Vec<CostedModule>,
}

impl CutAxis {
    /// Steps of the whole axis.
    pub fn quanta(&self) -> usize {
        self.units.div_ceil(self.quantum)
    }

    /// Units of a range of steps.
    pub fn range(&self, start: usize, end: usize) -> Range<usize> {
        (start * self.quantum).min(self.units)..(end * self.quantum).min(self.units)
    }
}

/// A linear that occurs `count` times in an axis.
#[derive(Clone, Debug)]
pub(super) struct CostedModule {
    pub module: LinearModule,
    pub count: u64,
    /// Per rank.
    pub rates: Vec<Rate>,
}

impl CutAxis {
    pub fn empty(kind: AxisKind, shape: &ModelShape) -> Self {
        let units = match kind {
            AxisKind::Heads(heads) => heads.query_heads,
            AxisKind::Channels(channels) => channels,
            AxisKind::Vocab => shape.config.vocab_size,
        };
        Self {
            kind,
            layers: Vec::new(),
            units,
            quantum: 1,
            least: 1,
            modules: Vec::new(),
        }
    }

    pub fn holds(&self, module: &LinearModule) -> bool {
        let of_layer = module
            .layer
            .is_some_and(|layer| self.layers.contains(&layer));
        match self.kind {
            AxisKind::Heads(_) => {
                of_layer && matches!(module.axis, Axis::QueryHeads | Axis::KvHeads)
            }
            AxisKind::Channels(_) => of_layer && module.axis == Axis::Ffn,
            AxisKind::Vocab => module.layer.is_none(),
        }
    }

    /// Largest step of a boundary that the grain allows and that gives every rank one.
    pub fn quantum_for(&self, world: usize, grain: Grain) -> usize {
        let steps = match self.kind {
            AxisKind::Heads(_) => [1, 1, 1],
            AxisKind::Vocab => [VOCAB_MULTIPLE, 1, 1],
            AxisKind::Channels(_) => match grain {
                Grain::Group => [
                    self.group().unwrap_or(CHANNEL_MULTIPLE),
                    CHANNEL_MULTIPLE,
                    1,
                ],
                Grain::Eight => [CHANNEL_MULTIPLE, 1, 1],
                Grain::One => [1, 1, 1],
            },
        };
        let legal = |step: &usize| self.units.div_ceil(*step) >= world;
        steps.into_iter().find(legal).unwrap_or(1)
    }

    /// Rows after which every down projection of the axis begins a group. `None` where there are no
    /// groups to respect: unquantised, one group over all rows, or act-order (any cut is equal).
    fn group(&self) -> Option<usize> {
        let sizes = self
            .modules
            .iter()
            .filter(|known| known.module.role == LinearRole::Down);
        let sizes: Vec<_> = sizes
            .filter_map(|known| match known.module.format {
                WeightFormat::Gptq(GptqFormat {
                    group_size,
                    desc_act: false,
                    ..
                }) => group_size,
                _ => None,
            })
            .collect();
        let largest = *sizes.iter().max()?;
        sizes
            .iter()
            .all(|size| largest % size == 0)
            .then_some(largest)
    }
}

/// The same linear but for its place.
pub(super) fn alike(a: &LinearModule, b: &LinearModule) -> bool {
    let key = |m: &LinearModule| (m.role, m.k, m.n, m.bias, m.split, m.axis, m.unit);
    key(a) == key(b) && a.format == b.format
}
