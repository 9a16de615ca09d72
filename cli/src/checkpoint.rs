//! What a training keeps, to go on after it was interrupted.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Where it stands: beside what the training makes.
pub fn of(out: &Path) -> PathBuf {
    let mut name = out.as_os_str().to_owned();
    name.push(".checkpoint");
    name.into()
}

/// Removes it, where all is done or is to begin anew.
pub fn remove(checkpoint: &Path) -> Result<()> {
    match checkpoint.exists() {
        true => fs::remove_dir_all(checkpoint).with_context(|| checkpoint.display().to_string()),
        false => Ok(()),
    }
}
