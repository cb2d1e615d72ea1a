//! One formation of the group, and its members.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use secondwind_model::{capabilities::Capabilities, plan::ShardPlan};
use secondwind_proto::v1;
use tokio::sync::mpsc::UnboundedSender;
use tonic::Status;

use super::{MemberId, RankEvent};

/// A worker's stream of commands.
pub type Commands = UnboundedSender<Result<v1::Command, Status>>;

pub(super) struct Member {
    pub join: v1::Join,
    pub capabilities: Capabilities,
    pub commands: Commands,
    pub last_heard: Instant,
}

/// An epoch that forms or serves.
pub(super) struct Epoch {
    pub number: u64,
    /// By rank.
    pub members: Vec<MemberId>,
    pub plan: Arc<ShardPlan>,
    pub plan_digest: String,
    /// By rank, once it is ready.
    pub ready: Vec<Option<v1::Ready>>,
    /// By rank: (loaded, total).
    pub progress: Vec<(u64, u64)>,
    /// By rank: when it last told of progress.
    pub progressed: Vec<Instant>,
    /// To the step loop, once all are ready.
    pub events: Option<UnboundedSender<RankEvent>>,
}

impl Epoch {
    pub fn tell(&self, event: RankEvent) {
        if let Some(events) = &self.events {
            // A step loop that has ended its epoch no longer listens.
            let _ = events.send(event);
        }
    }
}

pub(super) fn group_info(epoch: &Epoch, members: &BTreeMap<MemberId, Member>) -> v1::Group {
    let plan = &epoch.plan;
    let range = |range: &std::ops::Range<usize>| format!("{}..{}", range.start, range.end);
    let ranks = epoch
        .members
        .iter()
        .enumerate()
        .filter_map(|(rank, member)| {
            let member = members.get(member)?;
            let ready = epoch.ready[rank].as_ref()?;
            let first = plan.layers.first()?;
            Some(v1::GroupRank {
                rank: rank as u32,
                worker: member.join.worker.clone(),
                device: member.capabilities.device.clone(),
                query_heads: range(&first.query_heads[rank]),
                ffn: range(&first.ffn[rank]),
                vocab: range(&plan.vocab[rank]),
                planned_bytes: plan.ranks[rank].memory.total(),
                resident_bytes: ready.resident_bytes,
                choices: ready.choices.clone(),
            })
        })
        .collect();
    v1::Group {
        epoch: epoch.number,
        ranks,
        kv_blocks: plan.kv_blocks as u64,
        block_tokens: plan.settings.block_tokens as u64,
        max_sequences: plan.settings.max_sequences as u64,
        kv_dtype: plan.settings.kv_dtype.name().to_owned(),
        max_step_tokens: plan.settings.max_step_tokens as u64,
    }
}
