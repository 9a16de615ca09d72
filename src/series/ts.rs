//! The `.ts` text format.

use ndarray::Array2;

use super::labels::Labels;
use super::timestamps::{self, Spacing};
use super::{Case, Fault, LATIN, ReadOptions, SeriesSet, Target, TimeInput, decode, number, short, value};

/// Reads a file.
pub(super) fn read(bytes: &[u8], options: &ReadOptions) -> Result<SeriesSet, Fault> {
    let (text, is_utf8) = decode(bytes, decides)?;
    let mut header = Header { time: options.time, ..Header::default() };
    let mut cases = Vec::new();
    let mut in_data = false;
    for (index, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
        let at_this_line = |reason: String| Fault::at(index + 1, reason);
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
    match (in_data, cases.is_empty()) {
        (false, _) => Err(Fault::new("there is no @data line; is this a .ts file?")),
        (true, true) => Err(Fault::new("there are no cases after @data")),
        (true, false) => {
            let mut set = header.set(cases);
            if !is_utf8 {
                set.notes.push(LATIN.into());
            }
            Ok(set)
        }
    }
}

/// Whether a line tells the encoding. Comments and the name of the problem do not: nothing is read of them that could be mistaken.
fn decides(line: &[u8]) -> bool {
    let line = line.trim_ascii_start();
    let is_name = line.get(..12).is_some_and(|key| key.eq_ignore_ascii_case(b"@problemname"));
    !is_name && !line.starts_with(b"#") && !line.starts_with(b"%")
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
    /// How timestamps are used.
    time: TimeInput,
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
        if self.time != TimeInput::Even && !self.has_timestamps {
            return Err("times are to be an input, and the file has no timestamps (`@timestamps true`)".into());
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
            match self.time {
                TimeInput::Even => self.spacing = timestamps::common(self.spacing, times.spacing()?)?,
                time => columns.push(times.channel(time)?),
            }
        }
        let length = columns[0].len();
        if let Some(other) = columns.iter().position(|column| column.len() != length) {
            return Err(format!(
                "lengths differ: dimension 1 has {length}, dimension {} has {}; a frame needs a value of each",
                other + 1,
                columns[other].len()
            ));
        }
        let frames = Array2::from_shape_fn((length, columns.len()), |(time, dim)| columns[dim][time]);
        Ok(Case { id: String::new(), frames, target })
    }

    /// What was read.
    fn set(self, mut cases: Vec<Case>) -> SeriesSet {
        let (labels, mut notes) = self.labels.finish(&mut cases);
        let mut channels: Vec<String> = (1..=self.dims.unwrap_or(0)).map(|dim| format!("dimension {dim}")).collect();
        if self.has_timestamps {
            notes.push(timestamps::note(self.time, self.spacing));
            channels.extend(self.time.channel().map(String::from));
        }
        SeriesSet { name: self.name, channels, labels, cases, spacing: self.spacing, notes, ..SeriesSet::default() }
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
