//! NVIDIA cards: the kernel pack, a card, weights in its layout, and one function per operation.
//!
//! Nothing of CUDA is needed to build or to start: libcuda and NVRTC are opened when a card is, and
//! what is missing is said in a sentence. Kernels are `kernels/cuda/**/*.cu`, embedded here, compiled
//! by NVRTC, shipped as a pack. An op checks lengths on the host and then only launches; what a
//! kernel finds not finite it notes in the guard, which a step reads once.

mod arch;
mod attention;
pub mod bench;
mod device;
mod error;
mod graph;
mod layout;
mod linear;
mod memory;
mod nvrtc;
mod one_shot;
mod ops;
mod pack;
mod sample;
mod shared;
mod source;

pub use arch::Arch;
pub use attention::{
    Attention, AttentionBatch, AttentionLimits, AttentionScratch, HeadNorms, KvPages, attention,
    rope_kv,
};
pub use device::{CardFacts, Device, Event, cards, device_count};
pub use error::CudaError;
pub use graph::{Graph, Recording};
pub use layout::{
    BLOCK_ROWS, DenseStaging, LayoutFacts, QuantStaging, QuantWeights, Rows, SUPERBLOCK_ROWS,
    TILE_COLUMNS,
};
pub use linear::{Activations, DenseWeights, Linear, LinearCall, Weights, linear};
pub use memory::{Memory, Pinned};
pub use nvrtc::{Compiled, Nvrtc, Usage};
pub use one_shot::{Inbox, Offer, OneShot, Reach, Ticket};
pub use ops::{
    Destination, F16Form, Guard, Quantised, Table, add_rms_norm, embed, gather, quantise, silu_mul,
    take_rows, to_f16,
};
pub use pack::{Code, Form, Pack, PackSource};
pub use sample::{RowRequest, SampleScratch, adjust_logits, mask_logits, reduce_rows};
pub use shared::Stop;
pub use source::{UNITS, Unit, source_hash};

use device::launch;
