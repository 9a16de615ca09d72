//! The file of results: a line of JSON per trial, only ever appended to, so that a killed comparison goes on where it was and any
//! number of processes may write.

use std::fs::{File, OpenOptions, read};
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::trial::{Outcome, Settings, Trial};

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    #[serde(flatten)]
    pub trial: Trial,
    pub settings: Settings,
    #[serde(flatten)]
    pub outcome: Outcome,
    pub seconds: f64,
    pub simd: String,
    /// What the user says about the machine and the version.
    pub note: String,
}

/// The records of a file, and how many lines are none: a line that was cut short by a kill, for example. None where there is no file.
pub fn load(path: &Path) -> io::Result<(Vec<Record>, usize)> {
    let bytes = match read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        other => other?,
    };
    let lines = || bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let records: Vec<Record> = lines().filter_map(|line| serde_json::from_slice(line).ok()).collect();
    let none = lines().count() - records.len();
    Ok((records, none))
}

/// Adds a line, in one write. It begins on a new line where the last one was cut short.
pub fn append(path: &Path, record: &Record) -> io::Result<()> {
    let mut line = serde_json::to_vec(record)?;
    line.push(b'\n');
    if read(path).is_ok_and(|bytes| bytes.last().is_some_and(|byte| *byte != b'\n')) {
        line.insert(0, b'\n');
    }
    let mut file: File = OpenOptions::new().create(true).append(true).open(path)?;
    file.write_all(&line)?;
    file.sync_data()
}

/// Whether the trial is among the records.
pub fn is_done(records: &[Record], trial: &Trial, settings: &Settings) -> bool {
    records.iter().any(|record| record.trial == *trial && record.settings == *settings)
}
