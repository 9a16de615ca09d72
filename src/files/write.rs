//! Safetensors files, written tensor by tensor.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::ser::{Error as _, SerializeMap};
use serde::{Serialize, Serializer};

use super::replace::replace;
use super::tensors::{BYTES, MAX_HEADER, MAX_NAME, MAX_RANK, MAX_TENSORS, Tensor, quoted};
use crate::{Error, Result};

/// Writes a safetensors file of `tensors`, given by name, type and shape, with `metadata` in its header.
///
/// `write` is called once for each tensor, with its place in the list, and writes its numbers, little-endian, row by row:
/// exactly as many bytes as type and shape make, or the file is given up. So the tensors need never be in memory together.
/// The calls are in the order of the list but for this: wider types come first. Some readers need every number at a
/// multiple of its width, which after an odd number of bytes it would not be.
///
/// # Errors
///
/// [`Error::Io`] when the file cannot be written, or `write` gives an error or too few or too many bytes; an old file is
/// then untouched. [`Error::Format`] when the file could not be read again: two tensors of one name, or too many.
pub(crate) fn write_streamed(
    target: Target,
    tensors: &[(String, Dtype, Vec<usize>)],
    metadata: &[(&str, &str)],
    write: &mut dyn FnMut(usize, &mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    let path = target.name();
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(tensors[index].1.bitsize()));
    let contents = Contents::new(tensors, &order, metadata).map_err(|reason| Error::format(path, reason))?;
    let mut header = serde_json::to_vec(&contents).map_err(|error| Error::format(path, error.to_string()))?;
    // so that the data begins at a multiple of 8 bytes
    header.resize(header.len().next_multiple_of(8), b' ');
    if tensors.len() > MAX_TENSORS || header.len() as u64 > MAX_HEADER {
        return Err(Error::format(path, "too many blocks for one file; set a smaller num_layers"));
    }
    let mut write_all = |file: &mut dyn Write| {
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        for (&index, (name, tensor)) in order.iter().zip(&contents.tensors) {
            let mut bytes = Exactly { file, left: tensor.stop - tensor.start };
            write(index, &mut bytes)?;
            if bytes.left > 0 {
                let error = format!("{}: {} bytes less were given than its shape makes", quoted(name), bytes.left);
                return Err(io::Error::new(io::ErrorKind::InvalidInput, error));
            }
        }
        Ok(())
    };
    match target {
        Target::File(path) => replace(path, |file| write_all(file)),
        Target::Writer(writer) => write_all(writer),
    }
    .map_err(|source| Error::io(path, source))
}

/// Where a file goes.
pub(crate) enum Target<'a> {
    /// To be replaced when the new one is complete.
    File(&'a Path),
    Writer(&'a mut dyn Write),
}

impl<'a> Target<'a> {
    /// What it is called in errors.
    pub(crate) fn name(&self) -> &'a Path {
        match self {
            Target::File(path) => path,
            Target::Writer(_) => Path::new(BYTES),
        }
    }
}

/// What the header says.
struct Contents<'a> {
    metadata: &'a [(&'a str, &'a str)],
    /// One after the other.
    tensors: Vec<(&'a str, Tensor)>,
}

impl<'a> Contents<'a> {
    /// The error is the reason why there can be no such file.
    fn new(
        tensors: &'a [(String, Dtype, Vec<usize>)],
        order: &[usize],
        metadata: &'a [(&'a str, &'a str)],
    ) -> Result<Self, String> {
        let mut names = BTreeSet::new();
        let mut end = 0u64;
        let mut contents = Contents { metadata, tensors: Vec::new() };
        for &index in order {
            let (name, dtype, shape) = &tensors[index];
            let mut tensor = Tensor { dtype: *dtype, shape: shape.clone(), start: end, stop: end };
            let size = tensor.size().and_then(|size| end.checked_add(size)).filter(|_| shape.len() <= MAX_RANK);
            tensor.stop = size.ok_or_else(|| format!("{}: {dtype} {shape:?} is not a size to write", quoted(name)))?;
            if name.len() > MAX_NAME || name == "__metadata__" || !names.insert(name) {
                return Err(format!("{}: the name is too long, not allowed, or a duplicate", quoted(name)));
            }
            end = tensor.stop;
            contents.tensors.push((name, tensor));
        }
        Ok(contents)
    }
}

struct Metadata<'a>(&'a [(&'a str, &'a str)]);

impl Serialize for Metadata<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().copied())
    }
}

impl Serialize for Contents<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        if !self.metadata.is_empty() {
            map.serialize_entry("__metadata__", &Metadata(self.metadata))?;
        }
        for (name, tensor) in &self.tensors {
            let place = |offset| usize::try_from(offset).map_err(S::Error::custom);
            let data_offsets = (place(tensor.start)?, place(tensor.stop)?);
            map.serialize_entry(name, &TensorInfo { dtype: tensor.dtype, shape: tensor.shape.clone(), data_offsets })?;
        }
        map.end()
    }
}

/// A file that takes exactly `left` more bytes.
struct Exactly<'a> {
    file: &'a mut dyn Write,
    left: u64,
}

impl Write for Exactly<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() as u64 > self.left {
            let error =
                format!("{} bytes more were given than the tensor's shape makes", bytes.len() as u64 - self.left);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, error));
        }
        let written = self.file.write(bytes)?;
        self.left -= written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::files::header;
    use crate::files::tensors::Source;

    fn files(folder: &Path) -> Vec<std::ffi::OsString> {
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    }

    #[test]
    fn what_is_written_is_as_long_as_was_said() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        let tensors = [("a".to_string(), Dtype::I8, vec![3]), ("b".to_string(), Dtype::BF16, vec![2])];
        let write = |a: &[u8], b: &[u8]| {
            write_streamed(Target::File(&path), &tensors, &[], &mut |index, file| file.write_all([a, b][index]))
        };
        for (a, b) in [(&b"12"[..], &b"1234"[..]), (b"123", b"123"), (b"123", b"12345"), (b"", b"1234")] {
            let error = write(a, b).unwrap_err();
            assert!(error.to_string().contains("shape makes"), "{error}");
        }
        assert!(files(folder.path()).is_empty());

        write(b"123", b"1234").unwrap();
        let (found, _) = header::read(Source::open(&path).unwrap()).unwrap();
        // the wider type comes first
        assert_eq!([found.get("b").unwrap().start, found.get("a").unwrap().start], [0, 4]);
        assert_eq!(&fs::read(&path).unwrap()[found.file_length() as usize - 7..], b"1234123");
    }

    #[test]
    fn files_that_could_not_be_read_are_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        let tensor = |name: &str, shape: &[usize]| (name.to_string(), Dtype::F32, shape.to_vec());
        for tensors in [
            vec![tensor("a", &[1]), tensor("a", &[2])],
            vec![tensor("__metadata__", &[1])],
            vec![tensor(&"a".repeat(MAX_NAME + 1), &[1])],
            vec![tensor("a", &[usize::MAX, 2])],
            vec![tensor("a", &[1; MAX_RANK + 1])],
            (0..=MAX_TENSORS).map(|number| tensor(&number.to_string(), &[0])).collect(),
        ] {
            let error = write_streamed(Target::File(&path), &tensors, &[], &mut |_, _| Ok(())).unwrap_err();
            assert!(matches!(error, Error::Format { .. }), "{error}");
        }
        assert!(files(folder.path()).is_empty());
    }
}
