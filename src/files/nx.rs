//! Files of `Nx.serialize`: `nx`, version, byte order, the length of a term, an Erlang term that describes the tensors,
//! their data.
//!
//! The term is walked, never built: all that is kept of it are names, types, shapes and offsets.

use std::collections::BTreeMap;

use safetensors::Dtype;

use crate::Result;
use crate::files::tensors::{MAX_NAME, MAX_RANK, Source, Tensor, Tensors, add, quoted};

/// `nx`, version, byte order, and a `u64` of length.
const FIXED_BYTES: usize = 12;
/// Deepest nesting of maps; a model has two levels.
const MAX_DEPTH: usize = 8;

/// Whether a file starts as those of `Nx.serialize` do. A safetensors file can also begin with `nx`, as the low bytes of
/// its header's length; its ninth byte is then `{`, which here would be the length of a term of 2 GB.
pub(crate) fn starts(first: &[u8; 9]) -> bool {
    first.starts_with(b"nx") && first[8] != b'{'
}

/// The tensors of an `.nx` file, named `outer.inner` by the keys of the maps around them.
pub(crate) fn read(mut source: Source<'_>) -> Result<Tensors<'_>> {
    if source.length() < FIXED_BYTES as u64 {
        return Err(source.error("an Nx.serialize file that is cut short"));
    }
    let [_, _, version, byte_order, length @ ..] = source.first_bytes::<FIXED_BYTES>()?;
    if version != 1 {
        return Err(source.error(format!("an Nx.serialize file of version {version}, and only version 1 is read")));
    }
    if byte_order != 0 {
        return Err(source.error("an Nx.serialize file that is not little-endian; save it on another machine"));
    }
    let length = u64::from_be_bytes(length);
    let term = source.header(FIXED_BYTES as u64, length)?;
    let mut tensors = BTreeMap::new();
    // every tensor has the names around it in front of its own
    let mut term = Term { bytes: &term, names: 2 * term.len() };
    term.file(&mut tensors)
        .map_err(|reason| source.error(format!("the term of this Nx.serialize file is not usable: {reason}")))?;
    Tensors::new(source, FIXED_BYTES as u64 + length, tensors)
}

/// What is wrong with a term.
type Parsed<T = ()> = Result<T, String>;

/// The part of a term, in Erlang's external format, that has not been read yet.
struct Term<'a> {
    bytes: &'a [u8],
    /// Bytes that the names of tensors may still take.
    names: usize,
}

impl<'a> Term<'a> {
    fn file(&mut self, tensors: &mut BTreeMap<String, Tensor>) -> Parsed {
        if self.byte()? != 131 {
            return Err("it does not start as an Erlang term does".into());
        }
        if self.bytes.first() == Some(&tag::COMPRESSED) {
            return Err("it is compressed; call Nx.serialize without the option `compressed`".into());
        }
        self.container("", 0, tensors)?;
        match self.bytes.len() {
            0 => Ok(()),
            left => Err(format!("{left} bytes follow it")),
        }
    }

    /// A map, a model state, which wraps a map, or a tensor.
    fn container(&mut self, name: &str, depth: usize, tensors: &mut BTreeMap<String, Tensor>) -> Parsed {
        if depth > MAX_DEPTH {
            return Err(format!("more than {MAX_DEPTH} maps in one another"));
        }
        match (self.tuple()?, self.atom()?) {
            (3, b"Elixir.Nx.Container.Axon.ModelState") if depth == 0 => {
                self.list(|term| match (term.tuple()?, term.atom()?) {
                    (2, b"data") => term.container(name, depth + 1, tensors),
                    (2, _) => term.skip(),
                    _ => Err("a field of the model state is not a pair".into()),
                })?;
                self.skip()
            }
            (3, b"Elixir.Nx.Container.Map") => {
                self.list(|term| {
                    if term.tuple()? != 2 {
                        return Err("an entry of a map is not a pair".into());
                    }
                    let name = join(name, term.binary()?)?;
                    term.container(&name, depth + 1, tensors)
                })?;
                self.skip()
            }
            (7, b"t") => {
                let tensor = self.tensor().map_err(|reason| format!("{}: {reason}", quoted(name)))?;
                self.names = self.names.checked_sub(name.len()).ok_or("the names of its tensors are too long")?;
                add(tensors, name.to_string(), tensor)
            }
            _ => Err(format!("{}: neither a map of tensors nor a tensor", quoted(name))),
        }
    }

    /// The rest of `{:t, shape, {kind, bits}, names, vectorized_axes, offset, byte_size}`.
    fn tensor(&mut self) -> Parsed<Tensor> {
        let rank = self.tuple()?;
        if rank > MAX_RANK {
            return Err(format!("{rank} axes, and at most {MAX_RANK} are read"));
        }
        let mut shape = Vec::with_capacity(rank);
        for _ in 0..rank {
            let size = self.unsigned()?;
            shape.push(usize::try_from(size).map_err(|_| format!("an axis of {size}"))?);
        }
        if self.tuple()? != 2 {
            return Err("its type is not a pair".into());
        }
        let (kind, bits) = (self.atom()?, self.unsigned()?);
        let dtype = dtype(kind, bits).ok_or_else(|| format!("unknown type {}{bits}", kind.escape_ascii()))?;
        self.skip()?;
        self.list(|_| Err("vectorized axes are not supported".into()))?;
        let (start, size) = (self.unsigned()?, self.unsigned()?);
        let stop = start.checked_add(size).ok_or("its offset and size are too large")?;
        Ok(Tensor { dtype, shape, start, stop })
    }

    fn byte(&mut self) -> Parsed<u8> {
        let [byte] = self.array()?;
        Ok(byte)
    }

    fn array<const N: usize>(&mut self) -> Parsed<[u8; N]> {
        let (array, rest) = self.bytes.split_first_chunk().ok_or("it is cut short")?;
        self.bytes = rest;
        Ok(*array)
    }

    fn take(&mut self, count: usize) -> Parsed<&'a [u8]> {
        let (taken, rest) = self.bytes.split_at_checked(count).ok_or("it is cut short")?;
        self.bytes = rest;
        Ok(taken)
    }

    fn u16(&mut self) -> Parsed<usize> {
        Ok(u16::from_be_bytes(self.array()?).into())
    }

    fn u32(&mut self) -> Parsed<usize> {
        let count = u32::from_be_bytes(self.array()?);
        usize::try_from(count).map_err(|_| "it is too large".to_string())
    }

    /// The number of elements of a tuple; they follow.
    fn tuple(&mut self) -> Parsed<usize> {
        match self.byte()? {
            tag::SMALL_TUPLE => Ok(self.byte()?.into()),
            tag::LARGE_TUPLE => self.u32(),
            other => Err(format!("tag {other} where a tuple was expected")),
        }
    }

    fn list(&mut self, mut element: impl FnMut(&mut Self) -> Parsed) -> Parsed {
        match self.byte()? {
            tag::NIL => return Ok(()),
            tag::LIST => {}
            other => return Err(format!("tag {other} where a list was expected")),
        }
        for _ in 0..self.u32()? {
            element(self)?;
        }
        match self.byte()? {
            tag::NIL => Ok(()),
            _ => Err("a list has no end".into()),
        }
    }

    fn atom(&mut self) -> Parsed<&'a [u8]> {
        match self.byte()? {
            tag::ATOM | tag::ATOM_UTF8 => {
                let length = self.u16()?;
                self.take(length)
            }
            tag::SMALL_ATOM | tag::SMALL_ATOM_UTF8 => {
                let length = self.byte()?.into();
                self.take(length)
            }
            other => Err(format!("tag {other} where an atom was expected")),
        }
    }

    fn binary(&mut self) -> Parsed<&'a [u8]> {
        match self.byte()? {
            tag::BINARY => {
                let length = self.u32()?;
                self.take(length)
            }
            other => Err(format!("tag {other} where a binary was expected")),
        }
    }

    fn unsigned(&mut self) -> Parsed<u64> {
        match self.byte()? {
            tag::SMALL_INTEGER => Ok(self.byte()?.into()),
            tag::INTEGER => {
                let number = i32::from_be_bytes(self.array()?);
                u64::try_from(number).map_err(|_| format!("{number} where a size was expected"))
            }
            tag::SMALL_BIG => {
                let length = self.byte()?.into();
                let negative = self.byte()? != 0;
                let digits = self.take(length)?;
                let mut number = [0; 8];
                let fits = number.get_mut(..length).filter(|_| !negative);
                fits.ok_or("a number that is no size")?.copy_from_slice(digits);
                Ok(u64::from_le_bytes(number))
            }
            other => Err(format!("tag {other} where a whole number was expected")),
        }
    }

    /// Passes over one term, whatever it is. A count of the terms to come stands for recursion.
    fn skip(&mut self) -> Parsed {
        let mut terms = 1u64;
        while terms > 0 {
            terms -= 1;
            let (elements, bytes) = match self.byte()? {
                tag::NIL => (0, 0),
                tag::SMALL_INTEGER => (0, 1),
                tag::INTEGER => (0, 4),
                tag::NEW_FLOAT => (0, 8),
                tag::SMALL_BIG => (0, usize::from(self.byte()?) + 1),
                tag::ATOM | tag::ATOM_UTF8 | tag::STRING => (0, self.u16()?),
                tag::SMALL_ATOM | tag::SMALL_ATOM_UTF8 => (0, self.byte()?.into()),
                tag::BINARY => (0, self.u32()?),
                tag::SMALL_TUPLE => (self.byte()?.into(), 0),
                tag::LARGE_TUPLE => (self.u32()? as u64, 0),
                tag::LIST => (self.u32()? as u64 + 1, 0),
                tag::MAP => (self.u32()? as u64 * 2, 0),
                other => return Err(format!("tag {other} is not supported")),
            };
            self.take(bytes)?;
            // each of them takes at least a byte, so that the sum cannot overflow
            terms += elements;
            if terms > self.bytes.len() as u64 {
                return Err("it is cut short".into());
            }
        }
        Ok(())
    }
}

/// The tags of the external term format that occur.
mod tag {
    pub const COMPRESSED: u8 = 80;
    pub const NEW_FLOAT: u8 = 70;
    pub const SMALL_INTEGER: u8 = 97;
    pub const INTEGER: u8 = 98;
    pub const ATOM: u8 = 100;
    pub const SMALL_TUPLE: u8 = 104;
    pub const LARGE_TUPLE: u8 = 105;
    pub const NIL: u8 = 106;
    pub const STRING: u8 = 107;
    pub const LIST: u8 = 108;
    pub const BINARY: u8 = 109;
    pub const SMALL_BIG: u8 = 110;
    pub const SMALL_ATOM: u8 = 115;
    pub const MAP: u8 = 116;
    pub const ATOM_UTF8: u8 = 118;
    pub const SMALL_ATOM_UTF8: u8 = 119;
}

fn join(outer: &str, inner: &[u8]) -> Parsed<String> {
    let inner = str::from_utf8(inner).map_err(|_| "a name is not UTF-8")?;
    if outer.len() + inner.len() >= MAX_NAME {
        return Err(format!("the name {} is too long", quoted(inner)));
    }
    Ok(if outer.is_empty() { inner.to_string() } else { format!("{outer}.{inner}") })
}

fn dtype(kind: &[u8], bits: u64) -> Option<Dtype> {
    Some(match (kind, bits) {
        (b"f", 16) => Dtype::F16,
        (b"f", 32) => Dtype::F32,
        (b"f", 64) => Dtype::F64,
        (b"bf", 16) => Dtype::BF16,
        (b"c", 64) => Dtype::C64,
        (b"s", 8) => Dtype::I8,
        (b"s", 16) => Dtype::I16,
        (b"s", 32) => Dtype::I32,
        (b"s", 64) => Dtype::I64,
        (b"u", 8) => Dtype::U8,
        (b"u", 16) => Dtype::U16,
        (b"u", 32) => Dtype::U32,
        (b"u", 64) => Dtype::U64,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn term(bytes: &[u8]) -> Term<'_> {
        Term { bytes, names: bytes.len() }
    }

    #[test]
    fn whole_numbers_of_every_tag() {
        assert_eq!(term(&[97, 255]).unsigned(), Ok(255));
        assert_eq!(term(&[98, 127, 255, 255, 255]).unsigned(), Ok(0x7fff_ffff));
        assert_eq!(term(&[110, 0, 0]).unsigned(), Ok(0));
        assert_eq!(term(&[110, 5, 0, 1, 0, 0, 0, 2]).unsigned(), Ok(0x2_0000_0001));
        assert_eq!(term(&[[110, 8, 0].as_slice(), &[255; 8]].concat()).unsigned(), Ok(u64::MAX));
    }

    #[test]
    fn atoms_and_tuples_of_every_tag() {
        for bytes in [[100, 0, 1, b't'].as_slice(), &[118, 0, 1, b't'], &[115, 1, b't'], &[119, 1, b't']] {
            assert_eq!(term(bytes).atom(), Ok(b"t".as_slice()));
        }
        assert_eq!(term(&[104, 7]).tuple(), Ok(7));
        assert_eq!(term(&[105, 0, 0, 1, 0]).tuple(), Ok(256));
    }

    #[test]
    fn exactly_one_term_is_skipped() {
        let map = [116, 0, 0, 0, 1, 109, 0, 0, 0, 1, b'k', 110, 1, 1, 9];
        let list = [[108, 0, 0, 0, 3, 107, 0, 2, 1, 2, 70, 0, 0, 0, 0, 0, 0, 0, 0].as_slice(), &map, &[106]].concat();
        let tuple = [[104, 4].as_slice(), &list, &[105, 0, 0, 0, 0, 98, 0, 0, 0, 0, 119, 1, b'a']].concat();
        let bytes = [&tuple, [97].as_slice()].concat();
        let mut read = term(&bytes);
        assert_eq!(read.skip(), Ok(()));
        assert_eq!(read.bytes, [97]);
        for length in 0..tuple.len() {
            assert!(term(&tuple[..length]).skip().is_err(), "cut to {length} bytes");
        }
    }

    #[test]
    fn only_nx_files_start_like_one() {
        assert!(starts(b"nx\x01\0\0\0\0\0\0"));
        assert!(!starts(b"nx\x01\0\0\0\0\0{"), "a safetensors header of 96366 bytes");
    }
}
