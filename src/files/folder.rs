//! A checkpoint of Hugging Face: `model.safetensors`, or several such files and an index that says which tensor is where.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::fs;
use std::path::{Component, Path, PathBuf};

use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use super::header::{self, printable};
use super::stored::Files;
use super::tensors::{Kind, MAX_HEADER, MAX_NAME, MAX_TENSORS, Source, Tensors, differences, quoted};
use crate::lm::python_json;
use crate::{Error, Result};

/// The file of a checkpoint that is in one piece.
pub(crate) const SINGLE: &str = "model.safetensors";
/// The index of one that is not.
const INDEX: &str = "model.safetensors.index.json";
/// Most files of a checkpoint. Each stays open.
const MAX_SHARDS: usize = 256;
/// Longest name of a file.
const MAX_FILE_NAME: usize = 255;

/// The tensors of a checkpoint, wherever in the folder they lie. Only names and shapes are in memory.
pub(crate) struct Folder<'a> {
    /// The file that stands for all of them in messages.
    path: PathBuf,
    shards: Vec<Tensors<'a>>,
    /// In which of the shards a tensor is.
    places: BTreeMap<String, usize>,
}

impl<'a> Folder<'a> {
    /// Opens the files of the folder and checks that they hold what they say, and what the index says.
    ///
    /// Where there is both a `model.safetensors` and an index, the index is ignored.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when a file cannot be read, [`Error::Format`] when one is damaged, hostile or absent, and
    /// [`Error::Tensors`], with the whole list, where the index and the files differ.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        if !fs::metadata(folder).map_err(|source| Error::io(folder, source))?.is_dir() {
            return Err(Error::format(
                folder,
                "not a folder: give the one that holds config.json and model.safetensors",
            ));
        }
        let (single, index) = (folder.join(SINGLE), folder.join(INDEX));
        // a link that leads nowhere is there, and opening it says what is wrong
        let there = |path: &Path| fs::symlink_metadata(path).is_ok();
        if there(&single) {
            return Self::one(single);
        }
        if there(&index) {
            return Self::several(folder, index);
        }
        let hint = other_contents(folder).map_or(String::new(), |hint| format!("; {hint}"));
        Err(Error::format(folder, format!("it has neither {SINGLE} nor {INDEX}{hint}")))
    }

    fn one(path: PathBuf) -> Result<Self> {
        let (tensors, _) = header::read(Source::open(&path)?)?;
        Ok(Self::of(tensors))
    }

    /// As a folder with this one file in it.
    pub(crate) fn of(tensors: Tensors<'a>) -> Self {
        let places = tensors.names().map(|name| (name.to_string(), 0)).collect();
        Folder { path: tensors.path().to_path_buf(), shards: vec![tensors], places }
    }

    fn several(folder: &Path, path: PathBuf) -> Result<Self> {
        let text = Source::open(&path)?.text(MAX_HEADER)?;
        let Index { weight_map: WeightMap { files, places } } = serde_json::from_slice(&python_json(text.as_bytes()))
            .map_err(|error| {
            Error::format(&path, format!("not a usable index: {}", printable(&error.to_string())))
        })?;
        drop(text);
        let absent: Vec<_> = files.iter().filter(|file| fs::symlink_metadata(folder.join(file)).is_err()).collect();
        if !absent.is_empty() {
            let names: Vec<_> = absent.iter().take(20).map(|file| quoted(file)).collect();
            let more = if absent.len() > names.len() { ", …" } else { "" };
            return Err(Error::format(
                &path,
                format!("{} of its files are not in the folder: {}{more}", absent.len(), names.join(", ")),
            ));
        }
        let mut shards = Vec::new();
        let mut count = 0;
        for file in &files {
            let (tensors, _) = header::read(Source::open(&folder.join(file))?)?;
            count += tensors.names().len();
            // checked while they are read: their headers together must not fill the memory
            if count > MAX_TENSORS {
                return Err(Error::format(&path, format!("its files have more than {MAX_TENSORS} tensors")));
            }
            shards.push(tensors);
        }
        let folder = Folder { path, shards, places };
        folder.check_index(&files)?;
        Ok(folder)
    }

    /// Checks that every tensor is in the file where the index has it, and in no other.
    fn check_index(&self, files: &[String]) -> Result<()> {
        let mut problems = Vec::new();
        for (name, &shard) in &self.places {
            if self.shards[shard].get(name).is_none() {
                problems.push(format!("{}: not in {}, where the index has it", quoted(name), quoted(&files[shard])));
            }
        }
        for (number, (shard, file)) in self.shards.iter().zip(files).enumerate() {
            for name in shard.names() {
                let (shown, here) = (quoted(name), quoted(file));
                match self.places.get(name) {
                    Some(&place) if place == number => {}
                    Some(&place) => {
                        let there = quoted(&files[place]);
                        problems.push(format!("{shown}: in {here}, and the index has it in {there}"));
                    }
                    None => problems.push(format!("{shown}: in {here}, and not in the index")),
                }
            }
        }
        self.fits(problems)
    }

    /// Checks that the checkpoint has exactly the `expected` tensors, each of its shape and kind. Others whose names are
    /// `ignored` may be there, too, whatever they are. Every difference is in the one error.
    pub(crate) fn check<'e>(
        &self,
        expected: impl IntoIterator<Item = (&'e str, &'e [usize], Kind)>,
        ignored: impl Fn(&str) -> bool,
    ) -> Result<()> {
        let expected = expected.into_iter().map(|(name, shape, kind)| (name, (shape, kind))).collect();
        let all = self.shards.iter().flat_map(Tensors::iter).filter(|(name, _)| !ignored(name));
        self.fits(differences(&expected, |name| self.shard(name)?.get(name), all))
    }

    fn fits(&self, mut problems: Vec<String>) -> Result<()> {
        if problems.is_empty() {
            return Ok(());
        }
        problems.sort();
        Err(Error::Tensors { path: self.path.clone(), problems })
    }

    fn shard(&self, name: &str) -> Option<&Tensors<'a>> {
        self.shards.get(*self.places.get(name)?)
    }

    fn shard_mut(&mut self, name: &str) -> Result<&mut Tensors<'a>> {
        match self.places.get(name) {
            Some(&shard) => Ok(&mut self.shards[shard]),
            None => Err(self.error(format!("{}: missing", quoted(name)))),
        }
    }

    /// An error that names the checkpoint.
    pub(crate) fn error(&self, reason: impl Into<String>) -> Error {
        Error::format(&self.path, reason)
    }

    /// The type in which a tensor is stored.
    pub(crate) fn dtype(&self, name: &str) -> Option<Dtype> {
        Some(self.shard(name)?.get(name)?.dtype)
    }

    /// Bytes of all files.
    pub(crate) fn length(&self) -> u64 {
        self.shards.iter().map(Tensors::file_length).sum()
    }

    /// Whether two tensors of one shape hold the same numbers, bit for bit once they are f32.
    pub(crate) fn are_same(&mut self, first: &str, second: &str) -> Result<bool> {
        const PIECE: usize = 1 << 16;
        let shape = self.shard(first).and_then(|shard| shard.shape(first)).unwrap_or_default();
        let count: usize = shape.iter().product();
        let mut pieces = [first, second].map(|name| (name, vec![0.0f32; count.min(PIECE)]));
        for start in (0..count).step_by(PIECE) {
            let length = PIECE.min(count - start);
            for (name, numbers) in &mut pieces {
                self.shard_mut(name)?.read_part(name, start, &mut numbers[..length])?;
            }
            let [(_, first), (_, second)] = &pieces;
            if first[..length].iter().zip(second).any(|(first, second)| first.to_bits() != second.to_bits()) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl<'a> Files<'a> for Folder<'a> {
    fn holding(&mut self, name: &str) -> Result<&mut Tensors<'a>> {
        self.shard_mut(name)
    }
}

/// What a folder without the files of a model seems to be, and what to do about it.
pub(crate) fn other_contents(folder: &Path) -> Option<&'static str> {
    let names: Vec<_> = fs::read_dir(folder).ok()?.flatten().map(|entry| entry.file_name()).collect();
    let has = |name: &str| names.iter().any(|other| other == name);
    let ends = |extensions: &[&str]| {
        let mut found = names.iter().filter_map(|name| Path::new(name).extension());
        found.any(|extension| extensions.iter().any(|other| extension.eq_ignore_ascii_case(other)))
    };
    if has("adapter_config.json") || has("adapter_model.safetensors") || has("adapter_model.bin") {
        Some(
            "it is an adapter of PEFT (LoRA): read its base model, and add the adapter to that with load_lora, or merge the two \
             in Python with merge_and_unload()",
        )
    } else if ends(&["bin", "pth", "pt"]) {
        Some(
            "files of torch.save (pytorch_model.bin) are not read: convert them to safetensors, in Python with \
             from_pretrained and save_pretrained(…, safe_serialization=True)",
        )
    } else if ends(&["gguf"]) {
        Some(
            "files of llama.cpp (GGUF) are not read: take the folder they were made from, and LoadOptions::quantize for \
             fewer bits",
        )
    } else {
        None
    }
}

#[derive(Deserialize)]
#[serde(expecting = "an index: an object with a weight_map")]
struct Index {
    weight_map: WeightMap,
}

/// The files of a checkpoint, and in which of them a tensor is.
struct WeightMap {
    files: Vec<String>,
    places: BTreeMap<String, usize>,
}

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(WeightMapVisitor)
    }
}

/// Reads the entries one by one: a map type would keep the last of two entries with one name, and say nothing.
struct WeightMapVisitor;

impl<'de> Visitor<'de> for WeightMapVisitor {
    type Value = WeightMap;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of file names by tensor name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<WeightMap, A::Error> {
        let mut numbers = BTreeMap::new();
        let mut places = BTreeMap::new();
        while let Some((name, file)) = entries.next_entry::<String, String>()? {
            if name.len() > MAX_NAME {
                return Err(A::Error::custom(format!("the name {} is too long", quoted(&name))));
            }
            if places.len() == MAX_TENSORS {
                return Err(A::Error::custom(format!("there are more than {MAX_TENSORS} tensors")));
            }
            let next = numbers.len();
            let shard = match numbers.entry(file) {
                Entry::Occupied(number) => *number.get(),
                Entry::Vacant(_) if next == MAX_SHARDS => {
                    return Err(A::Error::custom(format!("there are more than {MAX_SHARDS} files")));
                }
                Entry::Vacant(place) if is_plain(place.key()) => *place.insert(next),
                Entry::Vacant(place) => {
                    return Err(A::Error::custom(format!(
                        "{} is not the name of a file in the folder",
                        quoted(place.key())
                    )));
                }
            };
            match places.entry(name) {
                Entry::Vacant(place) => place.insert(shard),
                Entry::Occupied(first) => {
                    return Err(A::Error::custom(format!("the tensor {} appears twice", quoted(first.key()))));
                }
            };
        }
        let mut files = vec![String::new(); numbers.len()];
        for (file, number) in numbers {
            files[number] = file;
        }
        Ok(WeightMap { files, places })
    }
}

/// Whether a stranger's name stays in the folder, on every system: the separators and drives of one are plain letters on
/// another.
fn is_plain(file: &str) -> bool {
    let mut parts = Path::new(file).components();
    file.len() <= MAX_FILE_NAME
        && !file.contains(['/', '\\', ':', '\0'])
        && matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
}

#[cfg(test)]
mod tests;
