//! The checkpoint of a training, from which it goes on after an interruption.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Its folder, beside the output of the training.
pub fn of(out: &Path) -> PathBuf {
    let mut name = out.as_os_str().to_owned();
    name.push(".checkpoint");
    name.into()
}

/// Removes it, when the training is complete or is to begin anew.
pub fn remove(checkpoint: &Path) -> Result<()> {
    match checkpoint.exists() {
        true => fs::remove_dir_all(checkpoint).with_context(|| checkpoint.display().to_string()),
        false => Ok(()),
    }
}
