//! Checks of sizes: lengths of rows, bytes of a model, and whether they fit into memory.

use super::blocks::Block;
use super::options::HymbaOptions;
use crate::files::tensors::Tensors;
use crate::kernels::matmul::{Matrix, Storage};
use crate::kernels::memory;
use crate::kernels::team::work;
use crate::{Error, Result};

/// Frames that go through the blocks together on one thread: 128 rows of width 4h are half a megabyte at h = 256.
pub(super) const GROUP: usize = 128;
/// Frames of a sequence that go through the blocks together: more come in pieces, so that memory does not grow with them.
pub(super) const PIECE: usize = 8192;

/// What a call keeps of its frames until it returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keeps {
    /// The last output of each sequence.
    Last,
    /// The output at every frame.
    Outputs,
    /// What [`Hymba::backward`](super::Hymba::backward) reads.
    Cache,
    /// What [`Hymba::inspect`](super::Hymba::inspect) returns.
    Inspection,
}

/// Whether this many bytes can be allocated at once. Few are taken for granted: asking for them costs some microseconds.
pub(crate) fn fits(bytes: usize) -> bool {
    const FEW: usize = 16 << 20;
    bytes <= FEW || memory::fits(bytes)
}

/// Checks, before memory is taken, that so many bytes can be had for what a call makes of an argument of this shape: a view that
/// repeats itself takes none.
pub(crate) fn check_fits(argument: &'static str, given: &[usize], bytes: usize) -> Result<()> {
    if fits(bytes) {
        return Ok(());
    }
    let expected = format!("a smaller array: this takes about {} MB of memory, more than there is", bytes >> 20);
    Err(Error::Shape { argument, expected, given: given.to_vec() })
}

/// Bytes of a model with these options and this storage of its large matrices, before its first call.
pub(crate) fn model_bytes(options: &HymbaOptions, storage: Option<Storage>) -> usize {
    /// What the allocator adds to the arrays of a block.
    const BLOCK_ARRAYS: usize = 1 << 10;
    let blocks = work([options.num_layers, size_of::<Block>() + BLOCK_ARRAYS]);
    parameter_bytes(options, storage).saturating_add(blocks)
}

/// One length for each row, from 1 to l.
pub(crate) fn check_lengths(lengths: &[usize], batch: usize, l: usize) -> Result<()> {
    if lengths.len() != batch {
        let advice = format!("{} lengths for a batch of {batch}; give one for each row", lengths.len());
        return Err(Error::Lengths(advice));
    }
    if let Some(row) = lengths.iter().position(|length| !(1..=l).contains(length)) {
        let length = lengths[row];
        return Err(Error::Lengths(format!(
            "lengths[{row}] = {length}, but it must be from 1 to {l}, the padded length"
        )));
    }
    Ok(())
}

/// Bytes of the parameters of a model with these options, before its first call. At most `usize::MAX`.
pub(super) fn parameter_bytes(options: &HymbaOptions, storage: Option<Storage>) -> usize {
    let count = || {
        let parameters = options.parameters()?.checked_mul(size_of::<f32>())?;
        let Some(storage) = storage else { return Some(parameters) };
        let (mut narrowed, mut stored) = (0usize, 0usize);
        let blocks =
            options.pattern.kinds(options.num_layers).map(|(kind, count)| (options.large_matrices(kind), count));
        let shared = options.pattern.shares().then(|| (options.large_shared_matrices(), 1));
        for (matrices, count) in blocks.chain(shared) {
            for [n, k] in matrices {
                let numbers = n.checked_mul(k)?.checked_mul(count)?;
                narrowed = narrowed.checked_add(numbers.checked_mul(size_of::<f32>())?)?;
                stored = stored.checked_add(Matrix::bytes(n, k, storage)?.checked_mul(count)?)?;
            }
        }
        parameters.checked_sub(narrowed)?.checked_add(stored)
    };
    count().unwrap_or(usize::MAX)
}

/// Refuses models that would take more memory than in f32: rows are filled up to panels of 32 outputs.
pub(super) fn check_storage(options: &HymbaOptions, storage: Option<Storage>) -> Result<()> {
    /// So that a model takes at most twice what its file has.
    const LEAST_HIDDEN_SIZE: usize = 16;
    match storage {
        Some(storage) if options.hidden_size < LEAST_HIDDEN_SIZE => Err(Error::Option {
            option: "storage",
            given: format!("{storage:?}"),
            allowed: format!(
                "with hidden_size {} it saves nothing, as outputs are padded to 32; use it from {LEAST_HIDDEN_SIZE} on",
                options.hidden_size
            ),
        }),
        _ => Ok(()),
    }
}

/// The storage to read matrices into that are in a file as `in_file` says and are to be stored as `asked`: whole numbers and
/// scales come out of the file as they are, before they become something else.
pub(crate) fn first_storage(in_file: Option<Storage>, asked: Option<Storage>) -> Option<Storage> {
    match in_file {
        Some(Storage::Q8 | Storage::Q4) => in_file,
        _ => asked.or(in_file),
    }
}

/// Checks, before memory is taken, that the file holds enough for a model with so many `encoders` of these options and so many
/// `parameters`, of which there may be too many to count, and with its large matrices stored in the file as `in_file` says; and that
/// it fits into memory with these stored as `asked`, if they are to be otherwise.
pub(crate) fn check_size(
    options: &HymbaOptions,
    encoders: usize,
    parameters: Option<usize>,
    in_file: Option<Storage>,
    asked: Option<Storage>,
    tensors: &Tensors,
) -> Result<()> {
    /// So much any file may ask for: a small model is built although tensors are missing, and then all are listed.
    const SMALL: usize = 1 << 20;
    const FEW_BLOCKS: usize = 16;
    let (blocks, held) = (options.num_layers, tensors.names().len());
    let per_block = options.tensors_per_block();
    if blocks > (held / per_block).max(FEW_BLOCKS) {
        return Err(tensors.error(format!(
            "the options ask for {blocks} blocks of {per_block} tensors, and it has {held} tensors: a file cannot hold \
             more blocks than tensors"
        )));
    }
    let twice_the_file = usize::try_from(tensors.file_length()).unwrap_or(usize::MAX).saturating_mul(2);
    check_storage(options, in_file).map_err(|error| tensors.error(error.to_string()))?;
    check_storage(options, asked)?;
    let parameters = parameters.unwrap_or(usize::MAX);
    let saved = parameter_bytes(options, None).saturating_sub(parameter_bytes(options, in_file));
    if work([parameters, size_of::<f32>()]).saturating_sub(work([encoders, saved])) <= twice_the_file.max(SMALL) {
        return match fits(work([encoders, model_bytes(options, first_storage(in_file, asked))])) {
            true => Ok(()),
            false => Err(tensors.error("its model does not fit into memory")),
        };
    }
    Err(tensors.error(format!(
        "the options ask for {parameters} parameters, which do not fit in a file of {} bytes",
        tensors.file_length()
    )))
}
