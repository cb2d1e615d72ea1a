//! Positioned reads of a rank's slices, in pieces, with their bytes counted.

use std::{ops::Range, sync::mpsc, thread};

use secondwind_model::{
    checkpoint::{Checkpoint, TensorInfo},
    gptq,
    modules::{GptqFormat, LinearModule},
    slices::{ModuleSlice, PACKED_UNIT, TensorPart, TensorSlice, byte_runs},
};

use super::LoadError;

/// Bytes that are read before they are passed on.
const PIECE_BYTES: usize = 1 << 20;

/// Reads what the slices name and reports how far it is.
pub struct Reader<'a> {
    checkpoint: &'a Checkpoint,
    progress: &'a mut dyn FnMut(u64, u64) -> bool,
    loaded_bytes: u64,
    reported_bytes: u64,
    total_bytes: u64,
}

/// Input rows that a piece of `qweight` brings.
pub struct Window {
    /// First of them, counted in the shard.
    pub first: usize,
    /// Rows of the piece before it.
    pub skip: usize,
    /// How many.
    pub rows: usize,
}

impl<'a> Reader<'a> {
    /// A reader of `slices`.
    ///
    /// # Errors
    /// A tensor that the checkpoint lacks.
    pub fn new(
        checkpoint: &'a Checkpoint,
        slices: &[ModuleSlice],
        progress: &'a mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Self, LoadError> {
        let mut reader = Self {
            checkpoint,
            progress,
            loaded_bytes: 0,
            reported_bytes: 0,
            total_bytes: 0,
        };
        let mut total = 0;
        for tensor in slices.iter().flat_map(|slice| &slice.tensors) {
            total += reader.bytes(tensor)?;
        }
        reader.total_bytes = total;
        reader.report(true)?;
        Ok(reader)
    }

    /// Checks that every promised byte was read.
    pub fn finish(self) {
        debug_assert_eq!(self.loaded_bytes, self.total_bytes);
    }

    /// All floats of a part, widened.
    ///
    /// # Errors
    /// Of the read.
    pub fn floats(&mut self, slice: &ModuleSlice, part: TensorPart) -> Result<Vec<f32>, LoadError> {
        let tensor = tensor(slice, part)?;
        let info = self.info(tensor)?;
        let dtype = info.float_type().ok_or_else(|| LoadError::Plan {
            what: format!("{} is not of floats", tensor.name),
        })?;
        Ok(gptq::floats(dtype, self.read(tensor)?.bytes()))
    }

    /// All words of a part.
    ///
    /// # Errors
    /// Of the read.
    pub fn words(&mut self, slice: &ModuleSlice, part: TensorPart) -> Result<Vec<u32>, LoadError> {
        let tensor = tensor(slice, part)?;
        Ok(gptq::words(self.read(tensor)?.bytes()))
    }

    /// The group of every input row of the whole module; it may have no tensor of its own.
    ///
    /// # Errors
    /// Of the read.
    pub fn group_indices(
        &mut self,
        slice: &ModuleSlice,
        module: &LinearModule,
        format: &GptqFormat,
    ) -> Result<Vec<u32>, LoadError> {
        self.loaded_bytes += self.bytes(tensor(slice, TensorPart::GroupIndex)?)?;
        Ok(self.checkpoint.group_indices(module, format)?)
    }

    /// All words of a part that is packed along its columns, and the columns that they cover.
    ///
    /// # Errors
    /// Of the read.
    pub fn packed_columns(
        &mut self,
        slice: &ModuleSlice,
        part: TensorPart,
    ) -> Result<(Vec<u32>, Range<usize>), LoadError> {
        let covered = tensor(slice, part)?.covered_columns.clone();
        Ok((self.words(slice, part)?, covered))
    }

    /// Counts a part that is not needed as read.
    ///
    /// # Errors
    /// The slice has no such part.
    pub fn skip(&mut self, slice: &ModuleSlice, part: TensorPart) -> Result<(), LoadError> {
        self.loaded_bytes += self.bytes(tensor(slice, part)?)?;
        Ok(())
    }

    /// Stored rows of a part.
    ///
    /// # Errors
    /// The slice has no such part.
    pub fn rows(&self, slice: &ModuleSlice, part: TensorPart) -> Result<Range<usize>, LoadError> {
        Ok(tensor(slice, part)?.rows.clone())
    }

    /// Passes on an unquantised weight: (first row of the shard, bytes of whole rows).
    ///
    /// # Errors
    /// Of the read, or of `write`.
    pub fn dense(
        &mut self,
        slice: &ModuleSlice,
        mut write: impl FnMut(usize, &[u8]) -> Result<(), LoadError>,
    ) -> Result<(), LoadError> {
        let tensor = tensor(slice, TensorPart::Weight)?;
        let row_bytes = self.bytes(tensor)? as usize / tensor.rows.len().max(1);
        let pieces = pieces(&tensor.rows, PIECE_BYTES / row_bytes.max(1), 1);
        self.stream(tensor, pieces, |piece| {
            write(piece.rows.start - tensor.rows.start, piece.bytes())
        })
    }

    /// Passes on `qweight` in windows that begin at multiples of 32 input rows.
    ///
    /// # Errors
    /// Of the read, or of `write`.
    pub fn packed_rows(
        &mut self,
        slice: &ModuleSlice,
        bits: usize,
        mut write: impl FnMut(Window, &[u32]) -> Result<(), LoadError>,
    ) -> Result<(), LoadError> {
        let tensor = tensor(slice, TensorPart::Qweight)?;
        let row_bytes = tensor.columns.len() * size_of::<u32>();
        // A unit of 32 values is `bits` words.
        let pieces = pieces(&tensor.rows, PIECE_BYTES / row_bytes.max(1), bits);
        self.stream(tensor, pieces, |piece| {
            let covered = piece.rows.start / bits * PACKED_UNIT
                ..(piece.rows.end.div_ceil(bits) * PACKED_UNIT).min(tensor.covered_rows.end);
            let start = covered.start.max(slice.rows.start);
            let end = covered.end.min(slice.rows.end);
            if start >= end {
                return Ok(());
            }
            let window = Window {
                first: start - slice.rows.start,
                skip: start - covered.start,
                rows: end - start,
            };
            write(window, piece.words())
        })
    }

    /// Passes on a tensor slice piece by piece, while a second thread reads the next piece.
    fn stream(
        &mut self,
        tensor: &TensorSlice,
        pieces: impl Iterator<Item = Range<usize>> + Send,
        mut take: impl FnMut(&Piece) -> Result<(), LoadError>,
    ) -> Result<(), LoadError> {
        let (checkpoint, info) = (self.checkpoint, self.info(tensor)?);
        thread::scope(|scope| {
            let (fill, filled) = mpsc::sync_channel(1);
            let (empty, empties) = mpsc::channel();
            scope.spawn(move || {
                for rows in pieces {
                    // The channels close when the taker has failed.
                    let Ok(mut buffer) = empties.recv() else {
                        return;
                    };
                    let read = read_into(checkpoint, info, tensor, rows.clone(), &mut buffer);
                    let piece = read.map(|bytes| Piece {
                        rows,
                        buffer,
                        bytes,
                    });
                    let failed = piece.is_err();
                    if fill.send(piece).is_err() || failed {
                        return;
                    }
                }
            });
            for _ in 0..2 {
                let _ = empty.send(Vec::new());
            }
            for piece in filled {
                let piece = piece?;
                self.loaded_bytes += piece.bytes as u64;
                self.report(false)?;
                take(&piece)?;
                let _ = empty.send(piece.buffer);
            }
            Ok(())
        })
    }

    /// All bytes of a small tensor slice.
    fn read(&mut self, tensor: &TensorSlice) -> Result<Piece, LoadError> {
        let mut buffer = Vec::new();
        let rows = tensor.rows.clone();
        let info = self.info(tensor)?;
        let bytes = read_into(self.checkpoint, info, tensor, rows.clone(), &mut buffer)?;
        self.loaded_bytes += bytes as u64;
        self.report(false)?;
        Ok(Piece {
            rows,
            buffer,
            bytes,
        })
    }

    /// Tells of progress every 32 MiB, and at the start and the end.
    fn report(&mut self, now: bool) -> Result<(), LoadError> {
        let due = self.loaded_bytes - self.reported_bytes >= 32 << 20;
        if now || due || self.loaded_bytes == self.total_bytes {
            self.reported_bytes = self.loaded_bytes;
            if !(self.progress)(self.loaded_bytes, self.total_bytes) {
                return Err(LoadError::Cancelled);
            }
        }
        Ok(())
    }

    fn info(&self, tensor: &TensorSlice) -> Result<&'a TensorInfo, LoadError> {
        self.checkpoint
            .tensor(&tensor.name)
            .ok_or_else(|| LoadError::Plan {
                what: format!("the checkpoint has no tensor {}", tensor.name),
            })
    }

    fn bytes(&self, tensor: &TensorSlice) -> Result<u64, LoadError> {
        if tensor.part == TensorPart::GroupIndex && self.checkpoint.tensor(&tensor.name).is_none() {
            return Ok(0);
        }
        Ok(tensor.elements() as u64 * self.info(tensor)?.dtype.bytes())
    }
}

/// Rows of a tensor slice, read.
struct Piece {
    /// Stored rows.
    rows: Range<usize>,
    /// Words, so that words need no copy.
    buffer: Vec<u32>,
    bytes: usize,
}

impl Piece {
    fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.buffer)[..self.bytes]
    }

    fn words(&self) -> &[u32] {
        &self.buffer[..self.bytes / size_of::<u32>()]
    }
}

/// Reads stored rows of a tensor slice into `buffer`; gives their bytes' number.
fn read_into(
    checkpoint: &Checkpoint,
    info: &TensorInfo,
    tensor: &TensorSlice,
    rows: Range<usize>,
    buffer: &mut Vec<u32>,
) -> Result<usize, LoadError> {
    let element = info.dtype.bytes() as usize;
    let bytes = rows.len() * tensor.columns.len() * element;
    let words = bytes.div_ceil(size_of::<u32>());
    if buffer.len() < words {
        buffer.resize(words, 0);
    }
    let mut rest = &mut bytemuck::cast_slice_mut::<u32, u8>(buffer)[..bytes];
    for run in byte_runs(tensor.shape, element, rows, tensor.columns.clone()) {
        let length = (run.end - run.start) as usize;
        let (now, later) = rest.split_at_mut(length.min(rest.len()));
        checkpoint.read_at(info, run.start, now)?;
        rest = later;
    }
    Ok(bytes)
}

fn tensor(slice: &ModuleSlice, part: TensorPart) -> Result<&TensorSlice, LoadError> {
    slice
        .tensors
        .iter()
        .find(|tensor| tensor.part == part)
        .ok_or_else(|| LoadError::Plan {
            what: format!("{} has no {} to read", slice.module, part.suffix()),
        })
}

/// Cuts `rows` into pieces of about `length` rows, each but the first beginning at a multiple of
/// `multiple`.
fn pieces(
    rows: &Range<usize>,
    length: usize,
    multiple: usize,
) -> impl Iterator<Item = Range<usize>> + use<> {
    let length = (length / multiple).max(1) * multiple;
    let (mut start, end) = (rows.start, rows.end);
    std::iter::from_fn(move || {
        let piece = start..(start + length).min(end);
        start = piece.end;
        (!piece.is_empty()).then_some(piece)
    })
}
