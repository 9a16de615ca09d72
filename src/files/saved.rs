//! Parameters and their options in one safetensors file.

use std::io::{self, Write};

use ndarray::{ArrayViewD, ArrayViewMutD};
use safetensors::Dtype;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::comparison::Comparison;
use super::header::{OPTIONS_KEY, printable};
use super::tensors::Tensors;
use super::write::{Target, write_streamed};
use crate::{Error, Result};

/// The version of what this crate writes.
pub(crate) const VERSION: u32 = 1;

/// Writes a safetensors file of f32 tensors, with `saved` in its metadata.
pub(crate) fn write(target: Target, saved: &impl Serialize, tensors: &[(String, ArrayViewD<'_, f32>)]) -> Result<()> {
    let infos: Vec<_> =
        tensors.iter().map(|(name, array)| (name.clone(), Dtype::F32, array.shape().to_vec())).collect();
    write_metadata(target, saved, &infos, &mut |index, file| {
        const PIECE: usize = 1 << 16;
        let mut piece = Vec::new();
        for number in &tensors[index].1 {
            piece.extend(number.to_le_bytes());
            if piece.len() == PIECE {
                file.write_all(&piece)?;
                piece.clear();
            }
        }
        file.write_all(&piece)
    })
}

/// Writes a safetensors file with `saved` in its metadata: one entry there, so that saving twice gives the same bytes. The rest is
/// as in [`write_streamed`].
pub(crate) fn write_metadata(
    target: Target,
    saved: &impl Serialize,
    tensors: &[(String, Dtype, Vec<usize>)],
    write: &mut dyn FnMut(usize, &mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    let saved = serde_json::to_string(saved).map_err(|error| Error::format(target.name(), error.to_string()))?;
    write_streamed(target, tensors, &[(OPTIONS_KEY, &saved)], write)
}

/// A walk over names and the places for their numbers, the same ones every time.
pub(crate) type Walk<'w> = dyn FnMut(&mut dyn FnMut(&str, ArrayViewMutD<'_, f32>)) + 'w;

/// Checks that the file has exactly the tensors that have a place, and reads them.
pub(crate) fn fill(tensors: &mut Tensors, walk: &mut Walk<'_>) -> Result<()> {
    let mut comparison = Comparison::new(tensors, Vec::new());
    walk(&mut |name, array| comparison.expect(name, array.shape()));
    comparison.finish()?;
    let mut read = Ok(());
    walk(&mut |name, array| {
        if read.is_ok() {
            read = tensors.read_into(name, array);
        }
    });
    read
}

/// What [`write`] put into the metadata.
pub(crate) fn entry<T: DeserializeOwned>(saved: Option<String>, tensors: &Tensors) -> Result<T> {
    let Some(saved) = saved else {
        return Err(tensors.error(format!(
            "its metadata has no entry {OPTIONS_KEY:?} with the options of a model: {}",
            origin(tensors)
        )));
    };
    parse(&saved, tensors)
}

/// Reads what [`write`] put into the metadata.
pub(crate) fn parse<T: DeserializeOwned>(saved: &str, tensors: &Tensors) -> Result<T> {
    /// Read first: what another version wrote may not be readable.
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }

    let unusable = |error: serde_json::Error| {
        let reason = printable(&error.to_string());
        tensors.error(format!("the options in its metadata are not usable: {reason}"))
    };
    let Version { version } = serde_json::from_str(saved).map_err(unusable)?;
    if version != VERSION {
        return Err(tensors.error(format!(
            "written in version {version} of the format, and this version of the crate reads version {VERSION}"
        )));
    }
    serde_json::from_str(saved).map_err(unusable)
}

/// Where a file without options probably comes from, by the names of its tensors.
pub(crate) fn origin(tensors: &Tensors) -> &'static str {
    let has = |prefix: &str| tensors.names().any(|name| name.starts_with(prefix));
    if has("hymba_block_") {
        "it seems to come from Edifice; read it with Hymba::load_edifice"
    } else if has("model.layers.") {
        "it seems to be a language model of Hugging Face; read its folder with HymbaLm::from_dir (feature lm)"
    } else if has("blocks.") {
        "its names look right, so it was probably made elsewhere; read it with Hymba::load_with and the options"
    } else if tensors.names().any(|name| name.contains(".blocks.")) {
        "all of them stand under a further name; remove it"
    } else {
        "it is some other model"
    }
}
