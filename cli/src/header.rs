//! The header of a safetensors file, which says what model the weights belong to before any of them is read.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};

/// The most bytes a header has, as the format says.
const MOST: u64 = 100_000_000;

pub struct Header {
    /// The options that this crate wrote into the metadata.
    pub saved: Option<Map<String, Value>>,
    pub names: Vec<String>,
    pub numbers: usize,
}

pub fn read(path: &Path) -> Result<Header> {
    let name = || path.display().to_string();
    let mut file = File::open(path).with_context(name)?;
    let size = file.metadata().with_context(name)?.len();
    let mut length = [0; 8];
    file.read_exact(&mut length).with_context(|| format!("{}: too short for a safetensors file", path.display()))?;
    let length = u64::from_le_bytes(length);
    if length > MOST.min(size.saturating_sub(8)) {
        bail!("{}: not a safetensors file", path.display());
    }
    let mut text = vec![0; length as usize];
    file.read_exact(&mut text).with_context(name)?;
    let Ok(Value::Object(mut entries)) = serde_json::from_slice(&text) else {
        bail!("{}: not a safetensors file", path.display());
    };
    let metadata = entries.remove("__metadata__");
    let saved = metadata
        .as_ref()
        .and_then(|metadata| metadata.get("hymba")?.as_str())
        .and_then(|text| serde_json::from_str(text).ok());
    let numbers = entries.values().map(elements).fold(0, usize::saturating_add);
    Ok(Header { saved, names: entries.keys().cloned().collect(), numbers })
}

fn elements(tensor: &Value) -> usize {
    let shape = tensor["shape"].as_array().map(Vec::as_slice).unwrap_or_default();
    shape.iter().map(|axis| axis.as_u64().unwrap_or(0) as usize).fold(1, usize::saturating_mul)
}
