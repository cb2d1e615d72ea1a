//! The group that serves and its plan, as a table and as JSON.

use secondwind_proto::v1::Group;
use serde::Serialize;

use crate::output;

/// The running plan.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    model: String,
    epoch: u64,
    world_size: usize,
    max_context_tokens: u64,
    max_sequences: u64,
    kv_blocks: u64,
    block_tokens: u64,
    kv_dtype: String,
    ranks: Vec<Rank>,
}

#[derive(Clone, Debug, Serialize)]
struct Rank {
    rank: u32,
    worker: String,
    device: String,
    query_heads: String,
    ffn: String,
    vocab: String,
    planned_bytes: u64,
    resident_bytes: u64,
    choices: Vec<String>,
}

impl Plan {
    /// From what the coordinator says of itself.
    pub fn new(model: &str, max_context_tokens: u64, group: Group) -> Self {
        let ranks = group.ranks.into_iter().map(|rank| Rank {
            rank: rank.rank,
            worker: rank.worker,
            device: rank.device,
            query_heads: rank.query_heads,
            ffn: rank.ffn,
            vocab: rank.vocab,
            planned_bytes: rank.planned_bytes,
            resident_bytes: rank.resident_bytes,
            choices: rank.choices,
        });
        let ranks: Vec<_> = ranks.collect();
        Self {
            model: model.into(),
            epoch: group.epoch,
            world_size: ranks.len(),
            max_context_tokens,
            max_sequences: group.max_sequences,
            kv_blocks: group.kv_blocks,
            block_tokens: group.block_tokens,
            kv_dtype: group.kv_dtype,
            ranks,
        }
    }

    /// A small table for people.
    pub fn table(&self) -> String {
        let header = [
            "rank", "worker", "device", "heads", "ffn", "vocab", "planned",
        ];
        let rows = self.ranks.iter().map(|rank| {
            vec![
                rank.rank.to_string(),
                rank.worker.clone(),
                rank.device.clone(),
                rank.query_heads.clone(),
                rank.ffn.clone(),
                rank.vocab.clone(),
                output::bytes(rank.planned_bytes),
            ]
        });
        let table = output::table(&header, &rows.collect::<Vec<_>>(), &[0, 6]);
        let capacity = self.kv_blocks.saturating_mul(self.block_tokens);
        format!(
            "{} over {} rank{}\n{table}\nKV cache: {capacity} tokens ({} blocks of {}, {})",
            self.model,
            self.world_size,
            if self.world_size == 1 { "" } else { "s" },
            self.kv_blocks,
            self.block_tokens,
            self.kv_dtype
        )
    }
}
