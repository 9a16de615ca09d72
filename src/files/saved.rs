//! Parameters and their options in one safetensors file.

use std::io::{self, Write};

use safetensors::Dtype;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::comparison::Comparison;
use super::header::{OPTIONS_KEY, printable};
use super::stored;
use super::tensors::Tensors;
use super::write::{Target, write_streamed};
use crate::kernels::matmul::Storage;
use crate::parameters::{Parameter, ParameterMut};
use crate::{Error, Result};

/// The version of what this crate writes.
pub(crate) const VERSION: u32 = 1;

/// Writes a safetensors file of parameters, with `saved` in its metadata.
pub(crate) fn write<'a>(
    target: Target,
    saved: &impl Serialize,
    parameters: impl IntoIterator<Item = (String, Parameter<'a>)>,
) -> Result<()> {
    let parameters = parameters.into_iter().map(|(name, parameter)| (name, parameter.shape(), parameter));
    let saved = text(&target, saved)?;
    stored::write(target, &[(OPTIONS_KEY, &saved)], &parameters.collect::<Vec<_>>())
}

/// Writes a safetensors file with `saved` in its metadata: one entry there, so that saving twice gives the same bytes. The rest is
/// as in [`write_streamed`].
pub(crate) fn write_metadata(
    target: Target,
    saved: &impl Serialize,
    tensors: &[(String, Dtype, Vec<usize>)],
    write: &mut dyn FnMut(usize, &mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    let saved = text(&target, saved)?;
    write_streamed(target, tensors, &[(OPTIONS_KEY, &saved)], write)
}

fn text(target: &Target, saved: &impl Serialize) -> Result<String> {
    serde_json::to_string(saved).map_err(|error| Error::format(target.name(), error.to_string()))
}

/// A walk over names and the places for their numbers, the same ones every time.
pub(crate) type Walk<'w> = dyn FnMut(&mut dyn FnMut(&str, ParameterMut<'_>)) + 'w;

/// Checks that the file has exactly the tensors that have a place, and reads them. Matrices that are not to be trained are in the
/// file as `in_file` says.
pub(crate) fn fill(tensors: &mut Tensors, in_file: Option<Storage>, walk: &mut Walk<'_>) -> Result<()> {
    let mut comparison = Comparison::new(tensors, Vec::new());
    walk(&mut |name, parameter| match parameter {
        ParameterMut::Array(array) => comparison.expect(name, array.shape()),
        ParameterMut::Stored(matrix) => {
            let (outputs, inputs) = matrix.dim();
            for (name, shape, kind) in stored::tensors(name.to_string(), vec![outputs, inputs], in_file) {
                comparison.expect_kind(&name, &shape, kind);
            }
        }
    });
    comparison.finish()?;
    let mut read = Ok(());
    walk(&mut |name, parameter| {
        if read.is_ok() {
            read = stored::read(tensors, name, parameter, in_file);
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
        "all names have a common prefix; remove it"
    } else {
        "it is some other model"
    }
}

/// The calls that save and load what has `write(&self, Target)` and `read(Source)`. The docs in front of a name are a
/// part of those of the call.
macro_rules! in_one_file {
    ($what:ident {
        $(#[$save:meta])* save,
        $(#[$load:meta])* load,
        $(#[$from_bytes:meta])* from_bytes $(,)?
    }) => {
        impl $what {
            $(#[$save])*
            ///
            /// The file is written under a temporary name in the same folder and then renamed, so that `path` is at all times the
            /// old file, if there was one, or the complete new one. A symbolic link stays, and what it leads to is replaced; on
            /// Unix so does the mode of an old file.
            ///
            /// # Errors
            ///
            /// [`Error::Io`](crate::Error::Io) when the file cannot be written; an old file is then untouched.
            /// [`Error::Format`](crate::Error::Format) when the model has so many blocks that [`load`](Self::load) would refuse
            /// the file.
            pub fn save(&self, path: impl AsRef<std::path::Path>) -> crate::Result<()> {
                self.write(crate::files::Target::File(path.as_ref()))
            }

            /// The bytes that [`save`](Self::save) would write: for a database, a network, a browser.
            ///
            /// # Errors
            ///
            /// [`Error::Format`](crate::Error::Format) as [`save`](Self::save).
            pub fn to_bytes(&self) -> crate::Result<Vec<u8>> {
                let mut bytes = Vec::new();
                self.write(crate::files::Target::Writer(&mut bytes))?;
                Ok(bytes)
            }

            /// As [`save`](Self::save), to any writer, directly and without a temporary file.
            ///
            /// # Errors
            ///
            /// As [`save`](Self::save).
            pub fn write_to(&self, mut writer: impl std::io::Write) -> crate::Result<()> {
                self.write(crate::files::Target::Writer(&mut writer))
            }

            $(#[$load])*
            ///
            /// The file need not be trusted. Reading takes no more memory than twice its length and a few megabytes.
            ///
            /// # Errors
            ///
            /// [`Error::Io`](crate::Error::Io) when the file cannot be read, [`Error::Format`](crate::Error::Format) when it is
            /// damaged, hostile, or of another format, and [`Error::Tensors`](crate::Error::Tensors), with the whole list, when
            /// tensors are missing, unexpected or of the wrong shape or type.
            pub fn load(path: impl AsRef<std::path::Path>) -> crate::Result<Self> {
                Self::read(crate::files::tensors::Source::open(path.as_ref())?)
            }

            /// As [`load`](Self::load), from any reader: all of it, from its beginning, wherever it stands.
            ///
            /// # Errors
            ///
            /// As [`load`](Self::load).
            pub fn read_from(reader: impl std::io::Read + std::io::Seek) -> crate::Result<Self> {
                Self::read(crate::files::tensors::Source::reader(reader)?)
            }

            /// As [`load`](Self::load), from what [`save`](Self::save) or [`to_bytes`](Self::to_bytes) wrote: a model inside the
            /// program, by `include_bytes!`, in a database, in a browser. The bytes need not be trusted either.
            ///
            $(#[$from_bytes])*
            ///
            /// # Errors
            ///
            /// As [`load`](Self::load).
            pub fn from_bytes(bytes: &[u8]) -> crate::Result<Self> {
                Self::read(crate::files::tensors::Source::memory(bytes))
            }
        }
    };
}

pub(crate) use in_one_file;
