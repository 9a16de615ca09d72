//! The header of a safetensors file: 8 bytes of length, then JSON that names the tensors.

use std::collections::BTreeMap;
use std::fmt;

use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use super::nx;
use super::tensors::{MAX_NAME, MAX_RANK, Source, Tensor, Tensors, add, quoted};
use crate::Result;

/// Where the metadata of a file has the options.
pub(crate) const OPTIONS_KEY: &str = "hymba";

/// Bytes of the length in front of the header.
const LENGTH_BYTES: u64 = 8;

/// The tensors of a safetensors file, and its metadata under [`OPTIONS_KEY`].
pub(crate) fn read(mut source: Source<'_>) -> Result<(Tensors<'_>, Option<String>)> {
    let first = source.first_bytes()?;
    if let Some(format) = other_format(&first) {
        return Err(source.error(format!("not a safetensors file but {format}")));
    }
    if source.length() < LENGTH_BYTES {
        return Err(source.error("not a safetensors file: it ends before the length of its header"));
    }
    let [length @ .., _] = first;
    let length = u64::from_le_bytes(length);
    let header = String::from_utf8(source.header(LENGTH_BYTES, length)?)
        .map_err(|error| source.error(format!("its header is not UTF-8: {error}")))?;
    let Header { options, tensors } = serde_json::from_str(&header)
        .map_err(|error| source.error(format!("its header is not usable: {}", printable(&error.to_string()))))?;
    drop(header);
    Ok((Tensors::new(source, LENGTH_BYTES + length, tensors)?, options))
}

/// What a file seems to be whose header is not JSON.
fn other_format(first: &[u8; 9]) -> Option<&'static str> {
    match first {
        [.., b'{'] => None,
        first if nx::starts(first) => Some("one of Nx.serialize, which Hymba::load_edifice reads"),
        [b'P', b'K', 3, 4, ..] => Some("a zip archive, perhaps of torch.save: save the tensors as safetensors"),
        b"version h" => Some("a pointer of Git LFS: fetch the file itself, with `git lfs pull`"),
        [131, b'h' | b'l' | b't' | b'P', ..] => {
            Some("an Erlang term, perhaps a checkpoint of Axon.Loop: save the parameters with Nx.serialize")
        }
        _ => None,
    }
}

struct Header {
    options: Option<String>,
    tensors: BTreeMap<String, Tensor>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Reads the entries one by one: a map type would keep the last of two entries with one name, and say nothing.
struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors by name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Header, A::Error> {
        let mut metadata = None;
        let mut tensors = BTreeMap::new();
        while let Some(name) = entries.next_key::<String>()? {
            if name == "__metadata__" {
                if metadata.replace(entries.next_value::<Metadata>()?).is_some() {
                    return Err(A::Error::custom("__metadata__ appears twice"));
                }
                continue;
            }
            if name.len() > MAX_NAME {
                return Err(A::Error::custom(format!("the name {} is too long", quoted(&name))));
            }
            let Info { dtype, shape: Shape(shape), data_offsets: (start, stop) } = entries.next_value()?;
            add(&mut tensors, name, Tensor { dtype, shape, start, stop }).map_err(A::Error::custom)?;
        }
        Ok(Header { options: metadata.and_then(|Metadata { options }| options), tensors })
    }
}

#[derive(Deserialize)]
struct Info {
    dtype: Dtype,
    shape: Shape,
    data_offsets: (u64, u64),
}

/// A list of few numbers: the text `0,0,0,…` would take four times its length in memory.
struct Shape(Vec<usize>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ShapeVisitor;

        impl<'de> Visitor<'de> for ShapeVisitor {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {MAX_RANK} sizes")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut sizes: A) -> Result<Shape, A::Error> {
                let mut shape = Vec::new();
                while let Some(size) = sizes.next_element()? {
                    if shape.len() == MAX_RANK {
                        return Err(A::Error::invalid_length(MAX_RANK + 1, &self));
                    }
                    shape.push(size);
                }
                Ok(Shape(shape))
            }
        }

        deserializer.deserialize_seq(ShapeVisitor)
    }
}

/// Of the metadata, all text, the one entry that is of interest here.
struct Metadata {
    options: Option<String>,
}

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MetadataVisitor;

        impl<'de> Visitor<'de> for MetadataVisitor {
            type Value = Metadata;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("metadata: an object of strings by name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Metadata, A::Error> {
                let mut options = None;
                while let Some((key, value)) = entries.next_entry::<String, String>()? {
                    if key == OPTIONS_KEY && options.replace(value).is_some() {
                        return Err(A::Error::custom(format!("the metadata has {OPTIONS_KEY} twice")));
                    }
                }
                Ok(Metadata { options })
            }
        }

        deserializer.deserialize_map(MetadataVisitor)
    }
}

/// The message of a parser, which may repeat what a stranger wrote: without control characters, and not long.
pub(crate) fn printable(message: &str) -> String {
    const SHOWN: usize = 300;
    let mut text = String::new();
    for character in message.chars().take(SHOWN) {
        match character {
            '"' | '\'' | '\\' => text.push(character),
            _ => text.extend(character.escape_debug()),
        }
    }
    text
}
