//! The tensors of a stranger's file: what it says it holds, checked before anything is allocated.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::{self, File};
use std::io::{Cursor, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use ndarray::ArrayViewMutD;
use safetensors::Dtype;

use super::float::Float;
use crate::{Error, Result};

/// The path that errors name where the bytes are not in a file.
pub(crate) const BYTES: &str = "<bytes>";
/// Longest table of contents read from a file. A block needs about 3 kB of it.
pub(crate) const MAX_HEADER: u64 = 4 << 20;
/// Most tensors in a file, enough for 500 blocks. In memory an entry is several times its length in the header.
pub(crate) const MAX_TENSORS: usize = 1 << 14;
/// Longest tensor name. Nested names of an `.nx` file are joined, so that without a limit they grow as a square.
pub(crate) const MAX_NAME: usize = 256;
/// Most axes of a tensor.
pub(crate) const MAX_RANK: usize = 8;

/// An open regular file, or what would be in one, and its true length.
pub(crate) struct Source<'a> {
    /// Where it is, or what it is called in errors.
    path: PathBuf,
    contents: Box<dyn Contents + 'a>,
    length: u64,
}

trait Contents: Read + Seek {}

impl<C: Read + Seek> Contents for C {}

impl<'a> Source<'a> {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let io = |source| Error::io(path, source);
        // asked before opening: opening a pipe waits for somebody to write to it
        if !fs::metadata(path).map_err(io)?.is_file() {
            return Err(Error::format(path, "not a regular file"));
        }
        let file = File::open(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        Ok(Source { path: path.to_path_buf(), contents: Box::new(file), length })
    }

    /// The contents of a file, in memory.
    pub(crate) fn memory(bytes: &'a [u8]) -> Self {
        let length = bytes.len() as u64;
        Source { path: BYTES.into(), contents: Box::new(Cursor::new(bytes)), length }
    }

    /// What can be read from the beginning to the end, wherever the reader stands.
    pub(crate) fn reader(mut reader: impl Read + Seek + 'a) -> Result<Self> {
        let length = reader.seek(SeekFrom::End(0)).map_err(|source| Error::io(Path::new(BYTES), source))?;
        Ok(Source { path: BYTES.into(), contents: Box::new(reader), length })
    }

    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    pub(crate) fn error(&self, reason: impl Into<String>) -> Error {
        Error::format(&self.path, reason)
    }

    pub(crate) fn seek(&mut self, position: u64) -> Result<()> {
        self.contents.seek(SeekFrom::Start(position)).map_err(|source| Error::io(&self.path, source))?;
        Ok(())
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.contents.read_exact(bytes).map_err(|source| Error::io(&self.path, source))
    }

    /// The first bytes of the file, zeros where it is shorter.
    pub(crate) fn first_bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut first = [0; N];
        let held = N.min(usize::try_from(self.length).unwrap_or(N));
        self.seek(0)?;
        self.fill(&mut first[..held])?;
        Ok(first)
    }

    /// The whole file, which must not be longer than `most` bytes.
    pub(crate) fn text(&mut self, most: u64) -> Result<String> {
        if self.length > most {
            return Err(self.error(format!("it has {} bytes, and at most {most} are read", self.length)));
        }
        let mut bytes = vec![0; self.length as usize];
        self.seek(0)?;
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|error| self.error(format!("it is not UTF-8: {error}")))
    }

    /// The `claimed` bytes from `start`, which are the file's table of contents.
    pub(crate) fn header(&mut self, start: u64, claimed: u64) -> Result<Vec<u8>> {
        let held = self.length.saturating_sub(start);
        if claimed > held {
            return Err(self.error(format!(
                "its header claims {claimed} bytes and the file has {held} left: it is cut short, or of another format"
            )));
        }
        if claimed > MAX_HEADER {
            return Err(self.error(format!("its header claims {claimed} bytes, and at most {MAX_HEADER} are read")));
        }
        let mut header = vec![0; claimed as usize];
        self.seek(start)?;
        self.fill(&mut header)?;
        Ok(header)
    }
}

/// What a file says about one tensor. Bytes are counted from the start of the file's data.
#[derive(Debug)]
pub(crate) struct Tensor {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) start: u64,
    pub(crate) stop: u64,
}

impl Tensor {
    /// Bytes of the data, by type and shape; `None` where they cannot be counted.
    pub(super) fn size(&self) -> Option<u64> {
        let count = self.shape.iter().try_fold(1usize, |count, &axis| count.checked_mul(axis))?;
        let bits = (count as u64).checked_mul(self.dtype.bitsize() as u64)?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }
}

/// Adds an entry to the table of contents; the error is the reason why it cannot be there.
pub(crate) fn add(tensors: &mut BTreeMap<String, Tensor>, name: String, tensor: Tensor) -> Result<(), String> {
    if tensors.len() == MAX_TENSORS {
        return Err(format!("there are more than {MAX_TENSORS} tensors"));
    }
    match tensors.entry(name) {
        Entry::Vacant(place) => {
            place.insert(tensor);
            Ok(())
        }
        Entry::Occupied(first) => Err(format!("two tensors have the name {}", quoted(first.key()))),
    }
}

/// Named tensors that lie one after the other in a file. They are read one by one, so that no second copy of the file
/// is ever in memory.
pub(crate) struct Tensors<'a> {
    source: Source<'a>,
    data_start: u64,
    tensors: BTreeMap<String, Tensor>,
}

impl<'a> Tensors<'a> {
    /// Checks that the tensors fill the data of the file from its first byte to its last, each exactly as large as its
    /// type and shape say: so none overlap, and all of them together are no larger than the file.
    pub(crate) fn new(source: Source<'a>, data_start: u64, tensors: BTreeMap<String, Tensor>) -> Result<Self> {
        let mut in_order: Vec<_> = tensors.iter().collect();
        in_order.sort_by_key(|(_, tensor)| (tensor.start, tensor.stop));
        let mut end = 0;
        for (name, tensor) in in_order {
            let Tensor { dtype, shape, start, stop } = tensor;
            let name = quoted(name);
            let Some(size) = tensor.size() else {
                return Err(source.error(format!("{name}: {dtype} {shape:?} is not a size that memory can have")));
            };
            if stop.checked_sub(*start) != Some(size) {
                return Err(source.error(format!(
                    "{name}: {dtype} {shape:?} is {size} bytes, which do not fit its offsets {start} to {stop}"
                )));
            }
            if *start != end {
                return Err(source.error(format!(
                    "{name}: starts at offset {start} instead of {end}: tensors overlap or leave a gap"
                )));
            }
            end = *stop;
        }
        let held = source.length.saturating_sub(data_start);
        if end != held {
            return Err(source.error(format!(
                "its tensors take {end} bytes and the file has {held} for them: it is cut short, or bytes were added"
            )));
        }
        Ok(Tensors { source, data_start, tensors })
    }

    pub(crate) fn error(&self, reason: impl Into<String>) -> Error {
        self.source.error(reason)
    }

    pub(crate) fn file_length(&self) -> u64 {
        self.source.length
    }

    /// Names in order.
    pub(crate) fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    #[cfg(any(feature = "lm", test))]
    pub(super) fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&String, &Tensor)> {
        self.tensors.iter()
    }

    /// A tensor, and its name as it is kept here.
    pub(super) fn entry(&self, name: &str) -> Option<(&String, &Tensor)> {
        self.tensors.get_key_value(name)
    }

    pub(super) fn path(&self) -> &Path {
        &self.source.path
    }

    pub(crate) fn shape(&self, name: &str) -> Option<&[usize]> {
        Some(&self.tensors.get(name)?.shape)
    }

    /// Forgets the tensors for which `keep` is false.
    pub(crate) fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        self.tensors.retain(|name, _| keep(name));
    }

    /// Checks that the file has exactly the `expected` names and shapes, in a type of float. Every difference is in the
    /// one error, after the `remarks`, which are differences already found.
    pub(crate) fn check(&self, expected: &BTreeMap<String, Vec<usize>>, remarks: Vec<String>) -> Result<()> {
        let expected = expected.iter().map(|(name, shape)| (name.as_str(), (shape.as_slice(), Kind::Float))).collect();
        let mut problems = differences(&expected, |name| self.tensors.get(name), self.tensors.iter());
        problems.splice(0..0, remarks);
        if problems.is_empty() {
            return Ok(());
        }
        Err(Error::Tensors { path: self.source.path.clone(), problems })
    }

    /// Reads the named tensor into `array`, whose elements in row-major order are those of the file.
    pub(crate) fn read_into(&mut self, name: &str, mut array: ArrayViewMutD<'_, f32>) -> Result<()> {
        let found = self.tensors.get(name).and_then(|tensor| Some((tensor, Float::of(tensor.dtype)?)));
        let Some((_, float)) = found.filter(|(tensor, _)| tensor.shape.iter().product::<usize>() == array.len()) else {
            return Err(self.error(format!("{}: not {} numbers", quoted(name), array.len())));
        };
        match array.as_slice_mut() {
            Some(mut places) => self.pieces(name, float.size(), &mut |bytes| {
                let (now, later) = std::mem::take(&mut places).split_at_mut(bytes.len() / float.size());
                float.decode(bytes, now);
                places = later;
            }),
            None => {
                let mut numbers = Vec::new();
                let mut places = array.iter_mut();
                self.pieces(name, float.size(), &mut |bytes| {
                    numbers.resize(bytes.len() / float.size(), 0.0);
                    float.decode(bytes, &mut numbers);
                    // the numbers come first in the zip: places must not advance past the last of them
                    numbers.iter().zip(&mut places).for_each(|(number, place)| *place = *number);
                })
            }
        }
    }

    /// Reads a tensor of floats row by row, in order; `take` gets the row's number and the row, as f32. Of the tensor, a
    /// few rows are in memory at a time.
    ///
    /// The first axis counts the rows, and the others are a row. What has one axis or none is a single row, and what has
    /// no elements has no rows.
    pub(crate) fn read_rows(&mut self, name: &str, take: &mut dyn FnMut(usize, &[f32])) -> Result<()> {
        let Some(float) = self.tensors.get(name).and_then(|tensor| Float::of(tensor.dtype)) else {
            return Err(self.error(format!("{}: not a tensor of floats", quoted(name))));
        };
        let width = self.row_size(name)? / float.size();
        let mut numbers = Vec::new();
        let mut row = 0;
        self.pieces(name, width * float.size(), &mut |bytes| {
            numbers.resize(bytes.len() / float.size(), 0.0);
            float.decode(bytes, &mut numbers);
            for numbers in numbers.chunks_exact(width) {
                take(row, numbers);
                row += 1;
            }
        })
    }

    /// Reads a tensor of floats from its first number to its last; `take` gets them in pieces, as f32.
    pub(crate) fn read_numbers(&mut self, name: &str, take: &mut dyn FnMut(&[f32])) -> Result<()> {
        let Some(float) = self.tensors.get(name).and_then(|tensor| Float::of(tensor.dtype)) else {
            return Err(self.error(format!("{}: not a tensor of floats", quoted(name))));
        };
        let mut numbers = Vec::new();
        self.pieces(name, float.size(), &mut |bytes| {
            numbers.resize(bytes.len() / float.size(), 0.0);
            float.decode(bytes, &mut numbers);
            take(&numbers);
        })
    }

    /// As [`read_rows`](Self::read_rows), but with the bytes of the rows as they stand in the file, little-endian, whatever
    /// their type.
    pub(crate) fn read_byte_rows(&mut self, name: &str, take: &mut dyn FnMut(usize, &[u8])) -> Result<()> {
        let size = self.row_size(name)?;
        let mut row = 0;
        self.pieces(name, size, &mut |bytes| {
            for bytes in bytes.chunks_exact(size) {
                take(row, bytes);
                row += 1;
            }
        })
    }

    /// Fills `numbers` with those of a tensor from place `first` on; it must have as many.
    #[cfg(feature = "lm")]
    pub(crate) fn read_part(&mut self, name: &str, first: usize, numbers: &mut [f32]) -> Result<()> {
        let found = self.tensors.get(name).and_then(|tensor| Some((tensor, Part::of(tensor.dtype)?)));
        let Some((tensor, part)) = found else {
            return Err(self.error(format!("{}: neither floats nor bytes", quoted(name))));
        };
        let start = tensor.start + (first * part.size()) as u64;
        let mut bytes = vec![0; numbers.len() * part.size()];
        if start + bytes.len() as u64 > tensor.stop {
            return Err(self.error(format!("{}: has no {} numbers from {first} on", quoted(name), numbers.len())));
        }
        self.source.seek(self.data_start + start)?;
        self.source.fill(&mut bytes)?;
        part.decode(&bytes, numbers);
        Ok(())
    }

    /// Bytes of a row.
    fn row_size(&self, name: &str) -> Result<usize> {
        let found = self.tensors.get(name).and_then(|tensor| {
            let rows = if tensor.shape.len() > 1 { tensor.shape[0].max(1) } else { 1 };
            let size = (tensor.stop - tensor.start) / rows as u64;
            // a row of 4-bit numbers may end within a byte
            let whole = (tensor.stop - tensor.start).is_multiple_of(rows as u64);
            usize::try_from(size).ok().filter(|_| whole)
        });
        match found {
            Some(size) => Ok(size),
            None => Err(self.error(format!("{}: has no rows that can be read one by one", quoted(name)))),
        }
    }

    /// Hands the bytes of a tensor, which is there, to `take`, in pieces of a multiple of `unit` bytes; `unit` may be 0 where
    /// there are none.
    fn pieces(&mut self, name: &str, unit: usize, take: &mut dyn FnMut(&[u8])) -> Result<()> {
        /// Long enough for few calls of the system, short enough to stay in the cache until it is decoded.
        const PIECE: usize = 1 << 18;
        let tensor = &self.tensors[name];
        self.source.seek(self.data_start + tensor.start)?;
        let mut left = tensor.stop - tensor.start;
        let longest = (PIECE / unit.max(1)).max(1) * unit;
        let shorter = |left: u64| usize::try_from(left).unwrap_or(usize::MAX).min(longest);
        let mut piece = vec![0; shorter(left)];
        while left > 0 {
            let bytes = &mut piece[..shorter(left)];
            self.source.fill(bytes)?;
            take(bytes);
            left -= bytes.len() as u64;
        }
        Ok(())
    }
}

/// A number in a tensor that [`Kind`] allows.
#[cfg(feature = "lm")]
#[derive(Clone, Copy)]
enum Part {
    Float(Float),
    Byte,
}

#[cfg(feature = "lm")]
impl Part {
    fn of(dtype: Dtype) -> Option<Self> {
        let byte = Kind::Bytes.has(dtype).then_some(Part::Byte);
        Float::of(dtype).map(Part::Float).or(byte)
    }

    fn size(self) -> usize {
        match self {
            Part::Float(float) => float.size(),
            Part::Byte => 1,
        }
    }

    fn decode(self, bytes: &[u8], numbers: &mut [f32]) {
        match self {
            Part::Float(float) => float.decode(bytes, numbers),
            Part::Byte => bytes.iter().zip(numbers).for_each(|(&byte, number)| *number = f32::from(byte)),
        }
    }
}

/// What a tensor must consist of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Numbers that become f32: F32, F64, F16, BF16.
    Float,
    /// Bytes, of whatever meaning: I8, U8.
    Bytes,
}

impl Kind {
    pub(super) fn has(self, dtype: Dtype) -> bool {
        match self {
            Kind::Float => Float::of(dtype).is_some(),
            Kind::Bytes => matches!(dtype, Dtype::I8 | Dtype::U8),
        }
    }

    pub(super) fn names(self) -> &'static str {
        match self {
            Kind::Float => "F32, F64, F16 or BF16",
            Kind::Bytes => "I8 or U8",
        }
    }
}

/// Where tensors differ from the `expected` names, shapes and kinds: a line each, in order. `all` are the tensors there
/// are, and `find` looks for one of them.
pub(super) fn differences<'a>(
    expected: &BTreeMap<&str, (&[usize], Kind)>,
    find: impl Fn(&str) -> Option<&'a Tensor>,
    all: impl Iterator<Item = (&'a String, &'a Tensor)>,
) -> Vec<String> {
    let mut problems = Vec::new();
    for (&name, &(shape, kind)) in expected {
        let name_shown = quoted(name);
        match find(name) {
            None => problems.push(format!("{name_shown}: missing, expected shape {shape:?}")),
            Some(found) if found.shape != shape => {
                problems.push(format!("{name_shown}: has shape {:?}, expected {shape:?}", found.shape));
            }
            Some(found) if !kind.has(found.dtype) => {
                problems.push(format!("{name_shown}: has type {}, expected {}", found.dtype, kind.names()));
            }
            Some(_) => {}
        }
    }
    for (name, found) in all {
        if !expected.contains_key(name.as_str()) {
            problems.push(format!("{}: unexpected, has shape {:?}", quoted(name), found.shape));
        }
    }
    problems.sort();
    problems
}

/// A stranger's name for a message: escaped, and not longer than a line.
pub(crate) fn quoted(name: &str) -> String {
    const SHOWN: usize = 80;
    match name.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{:?}…", &name[..end]),
        None => format!("{name:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_shown_escaped_and_short() {
        assert_eq!(quoted("a\u{1b}[31m\u{202e}"), r#""a\u{1b}[31m\u{202e}""#);
        assert_eq!(quoted(&"é".repeat(5000)), format!("\"{}\"…", "é".repeat(80)));
    }
}
