//! How files are read.

#[cfg(feature = "csv")]
use crate::{Error, Result};

/// How series are read from a file. Of a `.ts` file, whose header says the rest, only `time` matters.
///
/// | option | default | meaning |
/// |---|---|---|
/// | `time` | [`TimeInput::Even`] | how timestamps are used |
/// | `layout` | long if there are columns of id and time, else wide | what a row of the table is |
/// | `header` | yes | whether the first row has the names of the columns; else they are called `0`, `1` and so on |
/// | `delimiter` | `,` and in a `.tsv` file the tab | what separates columns, an ASCII character |
/// | `target` | the column `target`, `class` or `label`, if there is one | what is to be predicted; not known where it is empty, `?` or `NaN` |
/// | `target_kind` | [`TargetKind::Auto`] | whether that is classes or numbers |
/// | `id` | the column `id`, if there is one | the name of a series; it is not a value |
/// | `time_column` | the column `time` or `timestamp`, if there is one | in the long layout, the times of frames: numbers, or dates such as `2004-08-10 14:30:00`; in the wide layout it is left out, and an error if it was set |
///
/// Names of columns that are looked for by default may be in any case of letters.
///
/// ```
/// use hymba::series::{ReadOptions, TargetKind, TimeInput};
///
/// let options = ReadOptions::default().target("price").target_kind(TargetKind::Values).time(TimeInput::LogDelta);
/// assert!(options.header);
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ReadOptions {
    /// How timestamps are used.
    pub time: TimeInput,
    /// What a row of a table is.
    pub layout: Option<CsvLayout>,
    /// Whether the first row of a table has the names of the columns.
    pub header: bool,
    /// What separates the columns of a table.
    pub delimiter: Option<char>,
    /// The column of the targets.
    pub target: Option<Column>,
    /// Whether classes or numbers are to be predicted.
    pub target_kind: TargetKind,
    /// The column of the names of series.
    pub id: Option<Column>,
    /// The column of the times of frames.
    pub time_column: Option<Column>,
}

/// How the timestamps of frames are used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TimeInput {
    /// They must be evenly spaced, the same in all series, and are dropped: every frame is a step of the model.
    #[default]
    Even,
    /// They become a channel, `dt`: the time since the frame before, in the unit of the file (dates: seconds). The first frame
    /// has that of the second, and the only frame of a series 1.
    Delta,
    /// As [`Delta`](Self::Delta), but the natural logarithm of it, as the channel `ln dt`: for times that differ by factors.
    LogDelta,
}

impl TimeInput {
    /// The name of the channel that timestamps become.
    pub(super) fn channel(self) -> Option<&'static str> {
        match self {
            TimeInput::Even => None,
            TimeInput::Delta => Some("dt"),
            TimeInput::LogDelta => Some("ln dt"),
        }
    }
}

/// What a row of a table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CsvLayout {
    /// A series. If the names of all columns of values are `name_t`, where t is a whole number, there is a channel for each name, with
    /// its frames in the order of t, and each has the same t. If none is, there is one channel, `value`, and the columns are its
    /// frames from left to right; if only some are, the table is refused, since the others may be targets. Empty cells are missing
    /// values: at the end, where a series is shorter than others, they are cut off by
    /// [`SeriesSet::fill_missing`](super::SeriesSet::fill_missing).
    Wide,
    /// A frame: the `id` of its series, its time if there is such a column, a column per channel, and perhaps the target of
    /// the series, the same in all its rows or empty. The rows of a series need not follow each other; they are put in the order of
    /// their times, or stay in that of the file.
    Long,
}

/// Whether classes or numbers are to be predicted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TargetKind {
    /// Numbers if all targets are numbers, and not all whole ones; otherwise classes.
    #[default]
    Auto,
    /// Classes.
    Classes,
    /// Numbers.
    Values,
    /// The column is ignored, and no series has a target: for data to predict from.
    Ignored,
}

/// A column of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Column {
    /// By its name in the header.
    Name(String),
    /// By its index, from 0.
    Index(usize),
}

impl From<&str> for Column {
    fn from(name: &str) -> Self {
        Column::Name(name.into())
    }
}

impl From<String> for Column {
    fn from(name: String) -> Self {
        Column::Name(name)
    }
}

impl From<usize> for Column {
    fn from(index: usize) -> Self {
        Column::Index(index)
    }
}

impl Default for ReadOptions {
    fn default() -> Self {
        ReadOptions {
            time: TimeInput::Even,
            layout: None,
            header: true,
            delimiter: None,
            target: None,
            target_kind: TargetKind::Auto,
            id: None,
            time_column: None,
        }
    }
}

impl ReadOptions {
    /// Sets how timestamps are used.
    pub fn time(mut self, time: TimeInput) -> Self {
        self.time = time;
        self
    }

    /// Sets what a row of a table is.
    pub fn layout(mut self, layout: CsvLayout) -> Self {
        self.layout = Some(layout);
        self
    }

    /// Sets whether the first row of a table has the names of the columns.
    pub fn header(mut self, header: bool) -> Self {
        self.header = header;
        self
    }

    /// Sets what separates the columns of a table.
    pub fn delimiter(mut self, delimiter: char) -> Self {
        self.delimiter = Some(delimiter);
        self
    }

    /// Sets the column of the targets, by its name or its index from 0.
    pub fn target(mut self, column: impl Into<Column>) -> Self {
        self.target = Some(column.into());
        self
    }

    /// Sets whether classes or numbers are to be predicted.
    pub fn target_kind(mut self, kind: TargetKind) -> Self {
        self.target_kind = kind;
        self
    }

    /// Sets the column of the names of series.
    pub fn id(mut self, column: impl Into<Column>) -> Self {
        self.id = Some(column.into());
        self
    }

    /// Sets the column of the times of frames.
    pub fn time_column(mut self, column: impl Into<Column>) -> Self {
        self.time_column = Some(column.into());
        self
    }

    #[cfg(feature = "csv")]
    pub(super) fn validate(&self) -> Result<()> {
        match self.delimiter {
            Some(delimiter) if !delimiter.is_ascii() || matches!(delimiter, '"' | '\n' | '\r') => Err(Error::Option {
                option: "delimiter",
                given: format!("{delimiter:?}"),
                allowed: "an ASCII character, but no quote and no end of a line".into(),
            }),
            _ => Ok(()),
        }
    }
}
