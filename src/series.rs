//! Series from files: the `.ts` format of the UEA and UCR archives, and with the feature `csv` tables of comma-separated values.
//!
//! A [`SeriesSet`] is what was read: series of any lengths with `NaN` where a value is missing, a class or a number for each, and notes
//! that say how the file was understood. [`SeriesSet::fill_missing`] closes the gaps, and [`SeriesSet::into_dataset`] makes a
//! [`Dataset`](crate::train::Dataset) of it, which can be trained on.
//!
//! ```
//! use hymba::KernelPredictor;
//! use hymba::series::{ReadOptions, SeriesSet};
//!
//! let text = "@univariate true\n@classLabel true up down\n@data\n1,2,4:up\n5,?,1:down\n2,3:up\n";
//! let mut set = SeriesSet::from_ts(text, &ReadOptions::default())?; // or SeriesSet::read("TRAIN.ts", ..)
//! assert_eq!((set.cases.len(), set.width(), set.labels.len()), (3, 1, 2));
//! set.fill_missing();
//! println!("{}", set.notes.join("\n"));
//!
//! let task = set.task()?;
//! let data = set.into_dataset(&task)?;
//! assert_eq!(data.longest(), 3);
//! # Ok::<(), hymba::Error>(())
//! ```
//!
//! Files need not be trusted: what is damaged is an [`Error`] with the line at fault.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use ndarray::Array2;

use crate::{Error, Result};

#[cfg(feature = "csv")]
mod csv;
mod dataset;
mod labels;
mod missing;
mod options;
mod timestamps;
mod ts;

pub use options::{Column, CsvLayout, ReadOptions, TargetKind, TimeInput};
pub use timestamps::Spacing;

/// The path in errors of text that comes from no file.
const TEXT: &str = "text";

/// Series with their targets, as a file has them.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct SeriesSet {
    /// The `@problemName` of the header, or the name of the file without its ending.
    pub name: String,
    /// The names of the channels, one for each number of a frame.
    pub channels: Vec<String>,
    /// The names of the classes: in the order of the header, or sorted where none lists them. Empty in a regression.
    pub labels: Vec<String>,
    /// The series, in the order of the file.
    pub cases: Vec<Case>,
    /// The time between two frames, where they had timestamps that were dropped.
    pub spacing: Option<Spacing>,
    /// Notes on how the file was read, one line each.
    pub notes: Vec<String>,
    /// Where they come from, for messages.
    path: PathBuf,
}

/// One series and what is to be predicted from it.
#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    /// Its id in a table; else empty.
    pub id: String,
    /// `[length, channels]`, NaN where a value is missing.
    pub frames: Array2<f32>,
    /// Its target.
    pub target: Target,
}

/// The target of a series.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    /// It is not known.
    None,
    /// A class, as its index in [`SeriesSet::labels`].
    Class(usize),
    /// A number.
    Value(f32),
}

/// What is wrong with a file, and where.
struct Fault {
    /// From 1.
    line: Option<usize>,
    reason: String,
}

impl Fault {
    fn new(reason: impl Into<String>) -> Self {
        Fault { line: None, reason: reason.into() }
    }

    fn at(line: usize, reason: impl Into<String>) -> Self {
        Fault { line: Some(line), reason: reason.into() }
    }

    fn error(self, path: &Path) -> Error {
        let reason = match self.line {
            Some(line) => format!("line {line}: {}", self.reason),
            None => self.reason,
        };
        Error::format(path, reason)
    }
}

impl SeriesSet {
    /// Reads a file: with the ending `.csv` or `.tsv` a table, any other in the `.ts` format.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if it cannot be read; [`Error::Format`], which names the line and what is wrong with it, and for a table if
    /// the feature `csv` is off; [`Error::Option`] if an option is not usable.
    pub fn read(path: impl AsRef<Path>, options: &ReadOptions) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|error| Error::io(path, error))?;
        let ending = path.extension().map(|ending| ending.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
        let mut set = match ending.as_str() {
            "csv" => Self::table(&bytes, path, options),
            "tsv" => Self::table(
                &bytes,
                path,
                &ReadOptions { delimiter: options.delimiter.or(Some('\t')), ..options.clone() },
            ),
            _ => Self::ts(&bytes, path, options),
        }?;
        if set.name.is_empty() {
            set.name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        }
        Ok(set)
    }

    /// Reads the text of a `.ts` file.
    ///
    /// A file is a header of `@key value` lines, then `@data`, then one series per line: channels separated by `:`, the values of a channel
    /// by `,`, and at the end a class or a number where the header announces one. `?` is a missing value. Of the header
    /// only what decides how the lines are read is used (`@timestamps`, `@dimensions`, `@univariate`, `@classLabel`,
    /// `@targetLabel`, in any case of letters); lengths and missing values are taken as the lines give them.
    ///
    /// Where a file leaves something open, it is read as follows, and [`notes`](Self::notes) say so: values with timestamps lose
    /// them if they are evenly spaced (see [`TimeInput`] for others); a class may be spelled in another case than in the header, or
    /// as another form of the same number; classes that the header does not list are those of the lines, sorted; text
    /// that is not UTF-8 is Latin-1. White space is that of ASCII: other characters of that kind are part of a label.
    ///
    /// # Errors
    ///
    /// [`Error::Format`] names the line and what is wrong with it.
    pub fn from_ts(text: impl AsRef<[u8]>, options: &ReadOptions) -> Result<Self> {
        Self::ts(text.as_ref(), Path::new(TEXT), options)
    }

    /// Reads a table of comma-separated values, of one of two layouts; see [`CsvLayout`] and [`ReadOptions`].
    ///
    /// ```
    /// use hymba::ndarray::array;
    /// use hymba::series::{ReadOptions, SeriesSet, Target};
    ///
    /// // wide: a series per row; long: a frame per row
    /// let wide = "x_0,x_1,y_0,y_1,class\n1,2,3,4,up\n5,6,,,down\n";
    /// let long = "id,time,x,y,class\na,0,1,3,up\na,1,2,4,up\nb,0,5,,down\nb,1,6,,down\n";
    /// for text in [wide, long] {
    ///     let set = SeriesSet::from_csv(text, &ReadOptions::default())?;
    ///     assert_eq!((&set.channels[..], &set.labels[..]), (&["x".into(), "y".into()][..], &["down".into(), "up".into()][..]));
    ///     assert_eq!((&set.cases[0].frames, set.cases[0].target), (&array![[1.0, 3.0], [2.0, 4.0]], Target::Class(1)));
    /// }
    /// # Ok::<(), hymba::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`from_ts`](Self::from_ts); [`Error::Option`] if an option is not usable.
    #[cfg(feature = "csv")]
    pub fn from_csv(text: impl AsRef<[u8]>, options: &ReadOptions) -> Result<Self> {
        Self::table(text.as_ref(), Path::new(TEXT), options)
    }

    fn ts(bytes: &[u8], path: &Path, options: &ReadOptions) -> Result<Self> {
        let set = ts::read(bytes, options).map_err(|fault| fault.error(path))?;
        Ok(SeriesSet { path: path.into(), ..set })
    }

    #[cfg(feature = "csv")]
    fn table(bytes: &[u8], path: &Path, options: &ReadOptions) -> Result<Self> {
        options.validate()?;
        let set = csv::read(bytes, options).map_err(|fault| fault.error(path))?;
        Ok(SeriesSet { path: path.into(), ..set })
    }

    #[cfg(not(feature = "csv"))]
    fn table(_: &[u8], path: &Path, _: &ReadOptions) -> Result<Self> {
        Err(Error::format(path, "tables are read with the feature `csv`, and this program was built without it"))
    }

    /// How many numbers each frame has.
    pub fn width(&self) -> usize {
        self.channels.len()
    }

    /// How a message calls a series.
    fn called(&self, i: usize) -> String {
        match self.cases[i].id.as_str() {
            "" => format!("series {}", i + 1),
            id => format!("series `{}`", short(id)),
        }
    }
}

/// The text of a file, and whether it is UTF-8: in every line that `decides`. Otherwise it is Latin-1, which keeps all bytes apart.
fn decode(bytes: &[u8], decides: impl Fn(&[u8]) -> bool) -> Result<(Cow<'_, str>, bool), Fault> {
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
        return Err(Fault::new("it is UTF-16; save it as UTF-8"));
    }
    let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes);
    if let Ok(text) = std::str::from_utf8(bytes) {
        return Ok((text.into(), true));
    }
    let mut deciding = bytes.split(|byte| *byte == b'\n').filter(|line| decides(line));
    match deciding.all(|line| std::str::from_utf8(line).is_ok()) {
        true => Ok((String::from_utf8_lossy(bytes), true)),
        false => Ok((bytes.iter().map(|&byte| char::from(byte)).collect(), false)),
    }
}

const LATIN: &str = "the text is not UTF-8: it is read as Latin-1";

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

/// The start of a text that may be a whole line of numbers.
fn short(text: &str) -> String {
    const SHOWN: usize = 40;
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_string(),
    }
}
