//! The tensors of a stranger's file: what it says it holds, checked before anything is allocated.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use ndarray::ArrayViewMutD;
use safetensors::Dtype;

use crate::{Error, Result};

/// Longest table of contents read from a file. A block needs about 3 kB of it.
pub(crate) const MAX_HEADER: u64 = 4 << 20;
/// Most tensors in a file, enough for 500 blocks. In memory an entry is several times its length in the header.
pub(crate) const MAX_TENSORS: usize = 1 << 14;
/// Longest tensor name. Nested names of an `.nx` file are joined, so that without a limit they grow as a square.
pub(crate) const MAX_NAME: usize = 256;
/// Most axes of a tensor.
pub(crate) const MAX_RANK: usize = 8;

/// An open regular file and its true length.
pub(crate) struct Source {
    path: PathBuf,
    file: File,
    length: u64,
}

impl Source {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let io = |source| Error::io(path, source);
        // asked before opening: opening a pipe waits for somebody to write to it
        if !fs::metadata(path).map_err(io)?.is_file() {
            return Err(Error::format(path, "not a regular file"));
        }
        let file = File::open(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        Ok(Source { path: path.to_path_buf(), file, length })
    }

    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    pub(crate) fn error(&self, reason: impl Into<String>) -> Error {
        Error::format(&self.path, reason)
    }

    pub(crate) fn seek(&mut self, position: u64) -> Result<()> {
        self.file.seek(SeekFrom::Start(position)).map_err(|source| Error::io(&self.path, source))?;
        Ok(())
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.file.read_exact(bytes).map_err(|source| Error::io(&self.path, source))
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
    #[cfg(feature = "lm")]
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
    fn size(&self) -> Option<u64> {
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
pub(crate) struct Tensors {
    source: Source,
    data_start: u64,
    tensors: BTreeMap<String, Tensor>,
}

impl Tensors {
    /// Checks that the tensors fill the data of the file from its first byte to its last, each exactly as large as its
    /// type and shape say: so none overlap, and all of them together are no larger than the file.
    pub(crate) fn new(source: Source, data_start: u64, tensors: BTreeMap<String, Tensor>) -> Result<Self> {
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
        let mut problems = Vec::new();
        for (name, shape) in expected {
            let name_shown = quoted(name);
            match self.tensors.get(name) {
                None => problems.push(format!("{name_shown}: missing, expected shape {shape:?}")),
                Some(found) if found.shape != *shape => {
                    problems.push(format!("{name_shown}: has shape {:?}, expected {shape:?}", found.shape));
                }
                Some(found) if Float::of(found.dtype).is_none() => {
                    problems.push(format!("{name_shown}: has type {}, expected F32, F64, F16 or BF16", found.dtype));
                }
                Some(_) => {}
            }
        }
        for (name, found) in &self.tensors {
            if !expected.contains_key(name) {
                problems.push(format!("{}: unexpected, has shape {:?}", quoted(name), found.shape));
            }
        }
        problems.sort();
        problems.splice(0..0, remarks);
        if problems.is_empty() {
            return Ok(());
        }
        Err(Error::Tensors { path: self.source.path.clone(), problems })
    }

    /// Reads the named tensor into `array`, whose elements in row-major order are those of the file.
    pub(crate) fn read_into(&mut self, name: &str, mut array: ArrayViewMutD<'_, f32>) -> Result<()> {
        const PIECE: u64 = 1 << 16;
        let found = self.tensors.get(name).and_then(|tensor| Some((tensor, Float::of(tensor.dtype)?)));
        let Some((tensor, float)) = found.filter(|(tensor, _)| tensor.shape.iter().product::<usize>() == array.len())
        else {
            return Err(self.error(format!("{}: not {} numbers", quoted(name), array.len())));
        };
        self.source.seek(self.data_start + tensor.start)?;
        let mut left = tensor.stop - tensor.start;
        let mut piece = vec![0; left.min(PIECE) as usize];
        let mut places = array.iter_mut();
        while left > 0 {
            let bytes = &mut piece[..left.min(PIECE) as usize];
            self.source.fill(bytes)?;
            float.decode(bytes, &mut places);
            left -= bytes.len() as u64;
        }
        Ok(())
    }
}

/// The types of number that are read; f32 is what they become.
#[derive(Clone, Copy)]
enum Float {
    F32,
    F64,
    F16,
    BF16,
}

impl Float {
    fn of(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F32 => Some(Float::F32),
            Dtype::F64 => Some(Float::F64),
            Dtype::F16 => Some(Float::F16),
            Dtype::BF16 => Some(Float::BF16),
            _ => None,
        }
    }

    /// Writes the little-endian numbers of `bytes` to the next of `places`. The bytes may be unaligned in the file.
    fn decode<'a>(self, bytes: &[u8], places: &mut impl Iterator<Item = &'a mut f32>) {
        match self {
            Float::F32 => put(bytes, f32::from_le_bytes, places),
            Float::F64 => put(bytes, |bytes| f64::from_le_bytes(bytes) as f32, places),
            Float::F16 => put(bytes, |bytes| f16_to_f32(u16::from_le_bytes(bytes)), places),
            Float::BF16 => put(bytes, |[low, high]| f32::from_le_bytes([0, 0, low, high]), places),
        }
    }
}

fn put<'a, const N: usize>(
    bytes: &[u8],
    number: impl Fn([u8; N]) -> f32,
    places: &mut impl Iterator<Item = &'a mut f32>,
) {
    // the numbers come first in the zip: places must not advance past the last of them
    for (bytes, place) in bytes.as_chunks().0.iter().zip(places) {
        *place = number(*bytes);
    }
}

/// Half precision has 5 bits of exponent and 10 of fraction. Moved to where f32 has them, the number is 2¹¹² too small.
fn f16_to_f32(half: u16) -> f32 {
    const INFINITY: u32 = 0x7f80_0000;
    let sign = u32::from(half & 0x8000) << 16;
    let moved = u32::from(half & 0x7fff) << 13;
    let magnitude = if half & 0x7c00 == 0x7c00 {
        moved | INFINITY
    } else {
        (f32::from_bits(moved) * f32::from_bits((127 + 112) << 23)).to_bits()
    };
    f32::from_bits(sign | magnitude)
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
    fn halves_become_floats() {
        for (half, float) in [
            (0x0000, 0.0),
            (0x8000, -0.0),
            (0x0001, 2f32.powi(-24)),
            (0x83ff, -1023.0 * 2f32.powi(-24)),
            (0x0400, 2f32.powi(-14)),
            (0x3c00, 1.0),
            (0x3555, 1365.0 / 4096.0),
            (0xc500, -5.0),
            (0x7bff, 65504.0),
            (0x7c00, f32::INFINITY),
            (0xfc00, f32::NEG_INFINITY),
        ] {
            assert_eq!(f16_to_f32(half).to_bits(), f32::to_bits(float), "{half:#06x}");
        }
        assert!(f16_to_f32(0x7e01).is_nan());
    }

    #[test]
    fn every_type_of_float_is_decoded() {
        let mut read = [0f32; 2];
        let mut decode = |float: Float, bytes: &[u8]| {
            float.decode(bytes, &mut read.iter_mut());
            read
        };
        assert_eq!(decode(Float::F32, &[0, 0, 0x80, 0x3f, 0, 0, 0x20, 0xc0]), [1.0, -2.5]);
        assert_eq!(decode(Float::F16, &[0x00, 0x3c, 0x00, 0xc1]), [1.0, -2.5]);
        assert_eq!(decode(Float::BF16, &[0x80, 0x3f, 0x20, 0xc0]), [1.0, -2.5]);
        let doubles = [1f64.to_le_bytes(), (-2.5f64).to_le_bytes()].concat();
        assert_eq!(decode(Float::F64, &doubles), [1.0, -2.5]);
    }

    #[test]
    fn names_are_shown_escaped_and_short() {
        assert_eq!(quoted("a\u{1b}[31m\u{202e}"), r#""a\u{1b}[31m\u{202e}""#);
        assert_eq!(quoted(&"é".repeat(5000)), format!("\"{}\"…", "é".repeat(80)));
    }
}
