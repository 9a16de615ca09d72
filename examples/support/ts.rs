//! Reads the `.ts` text format of the UEA and UCR time series archives.
//!
//! A file is a header of `@key value` lines, then `@data`, then one case a line: dimensions separated by `:`, the values
//! of a dimension by `,`, and at the end a class or a number where the header announces one. `?` is a missing value.
//! Of the header only what decides how the lines are read is used (`@timestamps`, `@dimensions`, `@univariate`,
//! `@classLabel`, `@targetLabel`, in any case of letters); lengths and missing values are taken as the lines give them.
//!
//! Where a file leaves something open, it is read as follows, and [`Dataset::notes`] say so: values with timestamps lose
//! them, if they are evenly spaced; a class may be spelled in another case than in the header, or as another form of the same
//! number; classes that the header does not list are those of the lines, sorted; text that is not UTF-8 is Latin-1. White space is
//! that of ASCII: other characters of that kind are part of a label.

#![allow(dead_code, reason = "each example uses a part of this reader")]

use std::borrow::Borrow;
use std::fmt;
use std::path::{Path, PathBuf};

use hymba::ndarray::{Array2, Array3, s};

#[path = "labels.rs"]
pub mod labels;
#[path = "timestamps.rs"]
mod timestamps;

use labels::Labels;
pub use timestamps::Spacing;

/// The contents of one file.
#[derive(Debug, Clone, Default)]
pub struct Dataset {
    /// What `@problemName` says, or nothing.
    pub name: String,
    /// Width of every frame.
    pub dims: usize,
    /// The class names: in the order of the header, or sorted where it does not list them.
    pub classes: Vec<String>,
    /// The series, in the order of the file.
    pub cases: Vec<Case>,
    /// The time between two frames, where the values had timestamps.
    pub spacing: Option<Spacing>,
    /// What a user should know of how the file was read, a line each.
    pub notes: Vec<String>,
}

/// One series and what is to be predicted from it.
#[derive(Debug, Clone)]
pub struct Case {
    /// `[length, dims]`, NaN where a value is missing.
    pub frames: Array2<f32>,
    /// The class or number at the end of the line.
    pub target: Target,
}

/// What stands at the end of a case.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    /// Nothing, or `?`.
    None,
    /// A class, as its place in [`Dataset::classes`].
    Class(usize),
    /// The number of a regression problem.
    Value(f32),
}

/// Why a file could not be read.
#[derive(Debug)]
pub struct TsError {
    path: Option<PathBuf>,
    line: Option<usize>,
    reason: String,
}

impl std::error::Error for TsError {}

impl fmt::Display for TsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = &self.path {
            write!(f, "{}: ", path.display())?;
        }
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        f.write_str(&self.reason)
    }
}

impl Dataset {
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Dataset, TsError> {
        let with_path = |error| TsError { path: Some(path.to_path_buf()), ..error };
        let bytes = std::fs::read(path)
            .map_err(|error| with_path(TsError { path: None, line: None, reason: error.to_string() }))?;
        let (text, is_utf8) = decode(&bytes).map_err(with_path)?;
        let mut data = Dataset::parse(&text).map_err(with_path)?;
        if !is_utf8 {
            data.notes.push("the text is not UTF-8: it is read as Latin-1".into());
        }
        Ok(data)
    }

    /// Reads the text of a file.
    pub fn parse(text: &str) -> Result<Dataset, TsError> {
        let mut header = Header::default();
        let mut cases = Vec::new();
        let mut in_data = false;
        for (index, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
            let at_this_line = |reason| TsError { path: None, line: Some(index + 1), reason };
            let line = line.trim_ascii();
            if line.is_empty() || line.starts_with(['#', '%']) {
                continue;
            }
            if in_data {
                cases.push(header.read_case(line).map_err(at_this_line)?);
            } else if line.eq_ignore_ascii_case("@data") {
                header.check().map_err(at_this_line)?;
                in_data = true;
            } else {
                header.read_entry(line).map_err(at_this_line)?;
            }
        }
        let reason = match (in_data, cases.is_empty()) {
            (false, _) => "there is no @data line; is this a .ts file?",
            (true, true) => "there are no cases after @data",
            (true, false) => return Ok(header.dataset(cases)),
        };
        Err(TsError { path: None, line: None, reason: reason.into() })
    }
}

/// Bytes → text, and whether it is UTF-8. Otherwise it is Latin-1, which keeps all bytes apart. Comments and the name of the
/// problem do not decide: nothing is read of them that could be mistaken.
fn decode(bytes: &[u8]) -> Result<(String, bool), TsError> {
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
        return Err(TsError { path: None, line: None, reason: "it is UTF-16; save it as UTF-8".into() });
    }
    let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes);
    let decides = |line: &&[u8]| {
        let line = line.trim_ascii_start();
        let is_name = line.get(..12).is_some_and(|key| key.eq_ignore_ascii_case(b"@problemname"));
        !is_name && !line.starts_with(b"#") && !line.starts_with(b"%")
    };
    let is_utf8 = std::str::from_utf8(bytes).is_ok()
        || bytes.split(|byte| *byte == b'\n').filter(decides).all(|line| std::str::from_utf8(line).is_ok());
    let text = match is_utf8 {
        true => String::from_utf8_lossy(bytes).into_owned(),
        false => bytes.iter().map(|&byte| char::from(byte)).collect(),
    };
    Ok((text, is_utf8))
}

/// What the header says about the lines after it.
#[derive(Default)]
struct Header {
    name: String,
    /// `None` until the header or the first case tells.
    dims: Option<usize>,
    has_timestamps: bool,
    has_class: bool,
    has_value: bool,
    labels: Labels,
    /// Of the first series that tells.
    spacing: Option<Spacing>,
}

impl Header {
    /// Reads one `@key value…` line. Keys that are not needed are passed over.
    fn read_entry(&mut self, line: &str) -> Result<(), String> {
        let Some(entry) = line.strip_prefix('@') else {
            return Err(format!("expected a header line such as `@problemName x`, found `{}`", short(line)));
        };
        let mut words = entry.split_ascii_whitespace();
        let key = words.next().unwrap_or_default();
        let value = words.next();
        match key.to_ascii_lowercase().as_str() {
            "problemname" => self.name = value.unwrap_or_default().to_string(),
            "timestamps" => self.has_timestamps = yes_or_no(key, value)?,
            "univariate" if yes_or_no(key, value)? => self.set_dims(1)?,
            "dimension" | "dimensions" => match value.and_then(|value| value.parse().ok()) {
                Some(dims) if dims > 0 => self.set_dims(dims)?,
                _ => return Err(format!("@{key} needs a whole number of at least 1, found {}", quoted(value))),
            },
            "classlabel" => {
                self.has_class = yes_or_no(key, value)?;
                let names = words.filter(|_| self.has_class);
                self.labels = Labels::new(names.map(str::to_string).collect());
            }
            "targetlabel" => self.has_value = yes_or_no(key, value)?,
            _ => {}
        }
        Ok(())
    }

    fn set_dims(&mut self, dims: usize) -> Result<(), String> {
        match self.dims.replace(dims) {
            Some(before) if before != dims => {
                Err(format!("the header says both {before} and {dims} dimensions (`@univariate true` means 1)"))
            }
            _ => Ok(()),
        }
    }

    /// What only the whole header can tell.
    fn check(&self) -> Result<(), String> {
        if self.has_class && self.has_value {
            return Err(
                "the header has both `@classLabel true` and `@targetLabel true`; a case ends with one of them".into()
            );
        }
        Ok(())
    }

    /// Reads one line after `@data`.
    fn read_case(&mut self, line: &str) -> Result<Case, String> {
        let mut fields = fields(line);
        let (targets, end) = match (self.has_class, self.has_value) {
            (true, _) => (1, " and a class"),
            (_, true) => (1, " and a target number"),
            _ => (0, ""),
        };
        let found = fields.len();
        let dims = *self.dims.get_or_insert_with(|| found.saturating_sub(targets).max(1));
        if found.checked_sub(targets) != Some(dims) {
            return Err(format!("fields separated by `:`: {found}, but expected {dims} with values{end}"));
        }

        let target = match fields.get(dims) {
            Some(&label) => self.read_target(label)?,
            None => Target::None,
        };
        fields.truncate(dims);

        let mut columns = Vec::with_capacity(dims);
        let mut times = None;
        for (index, field) in fields.iter().enumerate() {
            let fault = |reason| format!("dimension {}: {reason}", index + 1);
            if self.has_timestamps {
                let (column, new) = timestamps::read(field).map_err(fault)?;
                if *times.get_or_insert_with(|| new.clone()) != new {
                    return Err(fault(
                        "its timestamps are not those of dimension 1; a frame needs a value of each".into(),
                    ));
                }
                columns.push(column);
            } else {
                columns.push(read_values(field).map_err(fault)?);
            }
        }
        if let Some(times) = times {
            self.keep_spacing(times.spacing()?)?;
        }
        let length = columns[0].len();
        if let Some(other) = columns.iter().position(|column| column.len() != length) {
            return Err(format!(
                "lengths differ: dimension 1 has {length}, dimension {} has {}; a frame needs a value of each",
                other + 1,
                columns[other].len()
            ));
        }
        let frames = Array2::from_shape_fn((length, dims), |(time, dim)| columns[dim][time]);
        Ok(Case { frames, target })
    }

    /// All series must have the same, since it is dropped.
    fn keep_spacing(&mut self, spacing: Option<Spacing>) -> Result<(), String> {
        match (self.spacing, spacing) {
            (Some(before), Some(new)) if !before.is_like(new) => Err(format!(
                "its timestamps are {} apart, those of the series before {}; give all series one spacing",
                new.amount(),
                before.amount()
            )),
            (before, new) => {
                self.spacing = before.or(new);
                Ok(())
            }
        }
    }

    /// What was read.
    fn dataset(mut self, mut cases: Vec<Case>) -> Dataset {
        let places = self.labels.sort();
        for case in &mut cases {
            if let Target::Class(class) = &mut case.target {
                *class = places[*class];
            }
        }
        let (classes, mut notes) = self.labels.finish();
        if self.has_timestamps {
            let apart =
                self.spacing.map_or("one a series".into(), |spacing| format!("evenly {} apart", spacing.amount()));
            notes.push(format!("the timestamps ({apart}) are dropped"));
        }
        Dataset { name: self.name, dims: self.dims.unwrap_or(0), classes, cases, spacing: self.spacing, notes }
    }

    fn read_target(&mut self, label: &str) -> Result<Target, String> {
        if label == "?" {
            return Ok(Target::None);
        }
        if self.has_value {
            return number(label).map(Target::Value).map_err(|reason| format!("target: {reason}"));
        }
        self.labels.class(label).map(Target::Class)
    }
}

/// A line at its `:`, but for those in the brackets of a timestamp.
fn fields(line: &str) -> Vec<&str> {
    let mut in_brackets = false;
    let is_end = |c: char| {
        in_brackets = c == '(' || in_brackets && c != ')';
        c == ':' && !in_brackets
    };
    line.split(is_end).map(str::trim_ascii).collect()
}

/// The values of one dimension, NaN for a missing one.
fn read_values(field: &str) -> Result<Vec<f32>, String> {
    if field.is_empty() {
        return Err("no values".into());
    }
    let mut values = Vec::new();
    for (index, text) in field.split(',').map(str::trim_ascii).enumerate() {
        values.push(value(text).map_err(|reason| format!("value {}: {reason}", index + 1))?);
    }
    Ok(values)
}

/// A value, NaN for a missing one.
fn value(text: &str) -> Result<f32, String> {
    if text == "?" || text.eq_ignore_ascii_case("nan") { Ok(f32::NAN) } else { number(text) }
}

fn number(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(value) if value.is_finite() => Ok(value),
        Ok(_) => Err(format!("`{}` is not a finite 32-bit number", short(text))),
        Err(_) if text.starts_with('(') => Err(format!(
            "`{}` looks like a timestamp: with timestamps the header needs `@timestamps true`",
            short(text)
        )),
        Err(_) => Err(format!("`{}` is not a number", short(text))),
    }
}

fn yes_or_no(key: &str, value: Option<&str>) -> Result<bool, String> {
    match value {
        Some(value) if value.eq_ignore_ascii_case("true") => Ok(true),
        Some(value) if value.eq_ignore_ascii_case("false") => Ok(false),
        _ => Err(format!("@{key} needs `true` or `false`, found {}", quoted(value))),
    }
}

fn quoted(value: Option<&str>) -> String {
    value.map_or("nothing".into(), |value| format!("`{}`", short(value)))
}

/// The start of a text that may be a whole line of numbers.
fn short(text: &str) -> String {
    const SHOWN: usize = 40;
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_string(),
    }
}

/// Puts the value before it in the place of every missing one; at the start the first known one, and 0 where a dimension
/// has none at all. Returns how many were missing.
pub fn fill_missing(frames: &mut Array2<f32>) -> usize {
    let mut missing = 0;
    for mut column in frames.columns_mut() {
        let mut known = column.iter().copied().find(|value| !value.is_nan()).unwrap_or(0.0);
        for value in column.iter_mut() {
            if value.is_nan() {
                *value = known;
                missing += 1;
            }
            known = *value;
        }
    }
    missing
}

/// Cuts off the frames at the end of which every value is missing: files of equal lengths are made from series of unequal
/// ones that way. The first frame stays. Returns how many were cut off.
pub fn cut_missing_end(frames: &mut Array2<f32>) -> usize {
    let known = frames.rows().into_iter().rposition(|row| row.iter().any(|value| !value.is_nan()));
    let (before, kept) = (frames.nrows(), known.map_or(1, |last| last + 1));
    frames.slice_collapse(s![..kept.min(before), ..]);
    before - frames.nrows()
}

/// Stacks series of different lengths: `[b, l, dims]`, zeros after the end of each, and the lengths.
pub fn pad<C: Borrow<Case>>(cases: &[C]) -> (Array3<f32>, Vec<usize>) {
    let lengths: Vec<usize> = cases.iter().map(|case| case.borrow().frames.nrows()).collect();
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let dims = cases.iter().map(|case| case.borrow().frames.ncols()).max().unwrap_or(0);
    let mut frames = Array3::zeros((cases.len(), longest, dims));
    for (row, case) in cases.iter().enumerate() {
        let case = &case.borrow().frames;
        frames.slice_mut(s![row, ..case.nrows(), ..case.ncols()]).assign(case);
    }
    (frames, lengths)
}
