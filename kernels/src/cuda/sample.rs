//! Single logits changed and rows masked on the card, and rows reduced to what sampling needs: no whole row crosses the bus.

use super::{CudaError, Device, Memory, launch};
use crate::logits::{Adjustment, CANDIDATES, RowMasks, RowSummary};

/// Logits that one block reduces.
const CHUNK: usize = 8192;
/// Blocks of a row that one more block can join.
const MAX_CHUNKS: usize = 32;
/// Words of `ChunkSummary<256>` and `RowSummary<256>` of `sample.cu`.
const CHUNK_WORDS: usize = 8 + 2 * CANDIDATES;
const ROW_WORDS: usize = 10 + 2 * CANDIDATES;
/// Changes of one launch; a step that has more takes several.
const ADJUSTMENTS: usize = 1 << 16;
/// Threads of a block that changes logits.
const ADJUST_THREADS: usize = 256;
/// Threads of a block that masks a row.
const MASK_THREADS: usize = 256;

/// Memory between the launches of one reduction, and its result.
pub struct SampleScratch {
    temperatures: Memory<f32>,
    targets: Memory<u32>,
    chunks: Memory<u32>,
    rows: Memory<u32>,
    adjustments: Memory<Adjustment>,
    originals: Memory<f32>,
    masked_rows: Memory<u32>,
    masks: Memory<u32>,
    max_rows: usize,
}

impl SampleScratch {
    /// Room for `rows` rows of `width` logits.
    ///
    /// # Errors
    /// The card's.
    pub fn new(device: &Device, rows: usize, width: usize) -> Result<Self, CudaError> {
        let chunks = width.div_ceil(CHUNK);
        assert!(
            chunks <= MAX_CHUNKS,
            "{width} logits of a row are more than one block can join"
        );
        let what = "sampling";
        let adjustments = Self::adjustments(rows, width);
        Ok(Self {
            temperatures: device.zeros(rows, what)?,
            targets: device.zeros(rows, what)?,
            chunks: device.zeros(rows * chunks * CHUNK_WORDS, what)?,
            rows: device.zeros(rows * ROW_WORDS, what)?,
            adjustments: device.zeros(adjustments, what)?,
            originals: device.zeros(adjustments, what)?,
            masked_rows: device.zeros(rows, what)?,
            masks: device.zeros(rows * width.div_ceil(32), what)?,
            max_rows: rows,
        })
    }

    /// Bytes that [`SampleScratch::new`] takes.
    pub fn bytes_for(rows: usize, width: usize) -> u64 {
        let words =
            rows * (3 + width.div_ceil(CHUNK) * CHUNK_WORDS + ROW_WORDS + width.div_ceil(32));
        let adjustment = size_of::<Adjustment>() + size_of::<f32>();
        (4 * words + Self::adjustments(rows, width) * adjustment) as u64
    }

    /// Changes of one launch.
    fn adjustments(rows: usize, width: usize) -> usize {
        ADJUSTMENTS.min(rows.saturating_mul(width))
    }
}

/// What sampling asks of a row.
#[derive(Clone, Copy, Debug)]
pub struct RowRequest {
    /// 0 for greedy.
    pub temperature: f32,
    /// A token whose logit is wanted, if the range has it.
    pub target: Option<u32>,
}

/// Changes single logits in place, in stream order; `originals`, if wanted, get what they were, which waits
/// for the card. No two changes are of the same logit.
///
/// # Errors
/// The card's.
pub fn adjust_logits(
    device: &Device,
    logits: &Memory<f32>,
    adjustments: &[Adjustment],
    mut originals: Option<&mut [f32]>,
    scratch: &SampleScratch,
) -> Result<(), CudaError> {
    let inside = |change: &Adjustment| (change.element as usize) < logits.len();
    assert!(
        adjustments.iter().all(inside)
            && originals
                .as_ref()
                .is_none_or(|originals| originals.len() == adjustments.len()),
        "adjust_logits: lengths"
    );
    let most = scratch.adjustments.len().max(1);
    for (index, part) in adjustments.chunks(most).enumerate() {
        device.write(&scratch.adjustments, 0, part)?;
        let kept = match originals {
            Some(_) => scratch.originals.address(),
            None => 0,
        };
        let blocks = part.len().div_ceil(ADJUST_THREADS) as u32;
        launch!(device, "adjust_logits", [blocks, 1, 1], [ADJUST_THREADS as u32, 1, 1], 0;
            logits.address(), scratch.adjustments.address(), part.len() as u32, kept)?;
        if let Some(originals) = &mut originals {
            let first = index * most;
            device.read(
                &scratch.originals,
                0,
                &mut originals[first..first + part.len()],
            )?;
        }
    }
    Ok(())
}

/// Bans what `masks` leave out of rows of (any, `width`) logits, in place and in stream order.
///
/// # Errors
/// The card's.
pub fn mask_logits(
    device: &Device,
    logits: &Memory<f32>,
    width: usize,
    masks: &RowMasks,
    scratch: &SampleScratch,
) -> Result<(), CudaError> {
    let rows = masks.rows.len();
    let inside = |&row: &u32| (row as usize + 1) * width <= logits.len();
    assert!(
        rows <= scratch.max_rows
            && masks.rows.iter().all(inside)
            && masks.words.len() == rows * width.div_ceil(32),
        "mask_logits: lengths"
    );
    if rows == 0 {
        return Ok(());
    }
    device.write(&scratch.masked_rows, 0, &masks.rows)?;
    device.write(&scratch.masks, 0, &masks.words)?;
    let blocks = width.div_ceil(MASK_THREADS) as u32;
    launch!(device, "mask_logits", [blocks, rows as u32, 1], [MASK_THREADS as u32, 1, 1], 0;
        logits.address(), scratch.masked_rows.address(), scratch.masks.address(), width as i32)
}

/// Reduces the rows of (requests, width) logits, whose first column is token `first_id`. Waits for
/// the card. The second part is the target's logit.
///
/// # Errors
/// The card's.
pub fn reduce_rows(
    device: &Device,
    logits: &Memory<f32>,
    width: usize,
    first_id: u32,
    requests: &[RowRequest],
    scratch: &SampleScratch,
) -> Result<Vec<(RowSummary, Option<f32>)>, CudaError> {
    let rows = requests.len();
    assert!(
        rows <= scratch.max_rows && rows * width <= logits.len(),
        "reduce_rows: lengths"
    );
    if rows == 0 {
        return Ok(Vec::new());
    }
    let temperatures: Vec<f32> = requests.iter().map(|request| request.temperature).collect();
    let targets: Vec<u32> = requests
        .iter()
        .map(|request| request.target.unwrap_or(u32::MAX))
        .collect();
    device.write(&scratch.temperatures, 0, &temperatures)?;
    device.write(&scratch.targets, 0, &targets)?;
    let chunks = width.div_ceil(CHUNK);
    let (summaries, temperatures) = (scratch.chunks.address(), scratch.temperatures.address());
    launch!(device, "sample_chunks_k256", [chunks as u32, rows as u32, 1], [512, 1, 1], 0;
        logits.address(), temperatures, width as i32, summaries)?;
    // The second block of a row joins its sums while the first sorts.
    launch!(device, "sample_rows_k256", [rows as u32, 2, 1], [1024, 1, 1], 0;
        summaries, logits.address(), temperatures, scratch.targets.address(), width as i32, first_id,
        chunks as i32, scratch.rows.address())?;
    let mut words = vec![0u32; rows * ROW_WORDS];
    device.read(&scratch.rows, 0, &mut words)?;
    Ok(words.chunks_exact(ROW_WORDS).map(row).collect())
}

/// Reads `RowSummary<256>`.
fn row(words: &[u32]) -> (RowSummary, Option<f32>) {
    let double = |at: usize| f64::from_bits(u64::from(words[at]) | u64::from(words[at + 1]) << 32);
    let float = |at: usize| f32::from_bits(words[at]);
    let count = (words[8] as usize).min(CANDIDATES);
    let candidates = words[9..].chunks_exact(2).take(count);
    let summary = RowSummary {
        max: float(6),
        sum_exp: double(0),
        sum_exp_t: double(2),
        sum_x_exp_t: double(4),
        candidates: candidates
            .map(|pair| (pair[0], f32::from_bits(pair[1])))
            .collect(),
    };
    let target = float(7);
    (summary, (!target.is_nan()).then_some(target))
}
