//! Files of results: a line of JSON per trial, only ever appended to, so that what was killed goes on where it was and any number of
//! processes may write.

use std::fs::{File, OpenOptions, read};
use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// The records of a file, and how many lines are none: a line that was cut short by a kill, for example. None where there is no file.
pub fn load<T: DeserializeOwned>(path: &Path) -> io::Result<(Vec<T>, usize)> {
    let bytes = match read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        other => other?,
    };
    let lines = || bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let records: Vec<T> = lines().filter_map(|line| serde_json::from_slice(line).ok()).collect();
    let none = lines().count() - records.len();
    Ok((records, none))
}

/// Adds a line, in one write. It begins on a new line where the last one was cut short.
pub fn append<T: Serialize>(path: &Path, record: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(record)?;
    line.push(b'\n');
    if read(path).is_ok_and(|bytes| bytes.last().is_some_and(|byte| *byte != b'\n')) {
        line.insert(0, b'\n');
    }
    let mut file: File = OpenOptions::new().create(true).append(true).open(path)?;
    file.write_all(&line)?;
    file.sync_data()
}

/// K/N: every Nth trial, from the Kth on, counted from 1.
pub fn share(text: &str) -> Result<(usize, usize), String> {
    let numbers = text.split_once('/').and_then(|(k, n)| Some((k.parse().ok()?, n.parse().ok()?)));
    numbers
        .filter(|(k, n)| (1..=*n).contains(k))
        .ok_or_else(|| format!("--trial needs K/N with 1 ≤ K ≤ N, found {text:?}"))
}
