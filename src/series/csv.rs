//! Tables of comma-separated values.

use std::collections::HashMap;

use ndarray::Array2;

use super::labels::Labels;
use super::timestamps::{self, Times};
use super::{
    Case, Column, CsvLayout, Fault, LATIN, ReadOptions, SeriesSet, Target, TargetKind, TimeInput, decode, number,
    short, value,
};

/// Reads a table.
pub(super) fn read(bytes: &[u8], options: &ReadOptions) -> Result<SeriesSet, Fault> {
    let (text, is_utf8) = decode(bytes, |_| true)?;
    let mut rows = Rows::new(&text, options.delimiter.unwrap_or(','));
    let Some(first) = rows.next()? else { return Err(Fault::new("the table is empty")) };
    let table = Table::new(&first, options).map_err(|reason| Fault::at(first.line, reason))?;
    let mut set = match options.header {
        true => table.series(rows, None, options),
        false => table.series(rows, Some(first), options),
    }?;
    if !is_utf8 {
        set.notes.push(LATIN.into());
    }
    Ok(set)
}

/// The rows of a file.
struct Rows<'a> {
    text: &'a str,
    reader: csv::Reader<&'a [u8]>,
}

struct Row {
    line: usize,
    fields: csv::StringRecord,
}

impl<'a> Rows<'a> {
    fn new(text: &'a str, delimiter: char) -> Self {
        let mut builder = csv::ReaderBuilder::new();
        builder.has_headers(false).flexible(true).trim(csv::Trim::All).delimiter(delimiter as u8);
        Rows { text, reader: builder.from_reader(text.as_bytes()) }
    }

    fn next(&mut self) -> Result<Option<Row>, Fault> {
        let mut fields = csv::StringRecord::new();
        match self.reader.read_record(&mut fields) {
            Ok(true) => {
                // a record is said to begin behind the one before it, at the rest of that line's end, or at empty lines
                let line = fields.position().map_or(0, |position| {
                    let rest = self.text.as_bytes().get(position.byte() as usize..).unwrap_or_default();
                    let ends = rest.iter().take_while(|byte| matches!(byte, b'\r' | b'\n'));
                    position.line() as usize + ends.filter(|byte| **byte == b'\n').count()
                });
                Ok(Some(Row { line, fields }))
            }
            Ok(false) => Ok(None),
            Err(error) => Err(Fault::new(error.to_string())),
        }
    }
}

/// What the columns are for.
struct Table {
    names: Vec<String>,
    target: Option<usize>,
    id: Option<usize>,
    time: Option<usize>,
    layout: CsvLayout,
    /// The other columns.
    values: Vec<usize>,
    note: Option<String>,
}

impl Table {
    fn new(first: &Row, options: &ReadOptions) -> Result<Self, String> {
        let names: Vec<String> = match options.header {
            true => first.fields.iter().map(String::from).collect(),
            false => (0..first.fields.len()).map(|i| i.to_string()).collect(),
        };
        let find = |column: &Option<Column>, usual: &[&str]| match column {
            Some(Column::Index(index)) if *index < names.len() => Ok(Some(*index)),
            Some(Column::Index(index)) => {
                Err(format!("there is no column {index}: there are {}, counted from 0", names.len()))
            }
            Some(Column::Name(name)) => {
                let place = names.iter().position(|other| other == name);
                place
                    .map(Some)
                    .ok_or_else(|| format!("there is no column `{}`: {}", short(name), short(&names.join(", "))))
            }
            None => Ok(names
                .iter()
                .position(|name| options.header && usual.iter().any(|usual| name.eq_ignore_ascii_case(usual)))),
        };
        let id = find(&options.id, &["id"])?;
        let time = find(&options.time_column, &["time", "timestamp"])?;
        let target = find(&options.target, &["target", "class", "label"])?;
        let layout = options.layout.unwrap_or(match id.and(time) {
            Some(_) => CsvLayout::Long,
            None => CsvLayout::Wide,
        });
        // a row that is a series has no time
        let is_wide = layout == CsvLayout::Wide;
        let unused = time.filter(|_| is_wide && time != target && time != id);
        if let (Some(column), Some(_)) = (unused, &options.time_column) {
            let name = short(&names[column]);
            return Err(format!(
                "with a series in each row there is no column of times, such as `{name}`: for frames give an `id`, too"
            ));
        }
        let note =
            unused.map(|column| format!("the column `{}` is left out: each row is a series", short(&names[column])));
        let time = time.filter(|_| !is_wide);
        if options.time != TimeInput::Even && time.is_none() {
            return Err("times are to be an input, and there is no column of times (in the long layout)".into());
        }
        if layout == CsvLayout::Long && id.is_none() {
            return Err("a table with a frame in each row needs a column of ids (option `id`)".into());
        }
        let roles: Vec<usize> = [id, time, target].into_iter().flatten().collect();
        if (1..roles.len()).any(|i| roles[..i].contains(&roles[i])) {
            return Err("id, time and target must be different columns".into());
        }
        let values: Vec<usize> =
            (0..names.len()).filter(|column| !roles.contains(column) && unused != Some(*column)).collect();
        match values.is_empty() {
            true => Err("there are no columns of values".into()),
            false => {
                let target = target.filter(|_| options.target_kind != TargetKind::Ignored);
                Ok(Table { names, target, id, time, layout, values, note })
            }
        }
    }

    fn series(&self, mut rows: Rows, first: Option<Row>, options: &ReadOptions) -> Result<SeriesSet, Fault> {
        let (mut set, mut targets) = (SeriesSet::default(), Found::default());
        set.notes.extend(self.note.clone());
        let mut reader = match self.layout {
            CsvLayout::Wide => Reader::Wide(self.wide().map_err(|reason| Fault::at(1, reason))?),
            CsvLayout::Long => Reader::Long(Groups::default()),
        };
        let mut next = first;
        while let Some(row) = match next.take() {
            Some(row) => Some(row),
            None => rows.next()?,
        } {
            let at = |reason: String| Fault::at(row.line, reason);
            if row.fields.len() != self.names.len() {
                return Err(at(format!("{} fields, and {} columns", row.fields.len(), self.names.len())));
            }
            match &mut reader {
                Reader::Wide(places) => {
                    let frames = places.frames(self, &row).map_err(at)?;
                    let id = self.id.map_or(String::new(), |id| row.fields[id].to_string());
                    targets.push(row.line, self.target.map_or("", |target| &row.fields[target]));
                    set.cases.push(Case { id, frames, target: Target::None });
                }
                Reader::Long(groups) => groups.read(self, &row).map_err(at)?,
            }
        }
        match reader {
            Reader::Wide(places) => set.channels = places.channels,
            Reader::Long(groups) => {
                set.channels = self.values.iter().map(|&column| self.names[column].clone()).collect();
                groups.finish(self, options.time, &mut set, &mut targets)?;
            }
        }
        if set.cases.is_empty() {
            return Err(Fault::new("there are no rows of values"));
        }
        if let Some(target) = self.target {
            targets.finish(&self.names[target], options.target_kind, &mut set)?;
        }
        Ok(set)
    }

    /// Where the numbers of a row belong.
    fn wide(&self) -> Result<Places, String> {
        fn numbered(name: &str) -> Option<(&str, u64)> {
            let (name, t) = name.rsplit_once('_')?;
            let digits = !t.is_empty() && t.bytes().all(|byte| byte.is_ascii_digit());
            Some((name, t.parse().ok().filter(|_| digits)?))
        }
        let (with, without): (Vec<usize>, _) =
            self.values.iter().partition(|&&column| numbered(&self.names[column]).is_some());
        match (with.first(), without.first()) {
            (Some(&with), Some(&without)) => {
                return Err(format!(
                    "some columns of values have a number, such as `{}`, and some have none, such as `{}`: if that is the target or the \
                     id, say so, otherwise rename it",
                    short(&self.names[with]),
                    short(&self.names[without])
                ));
            }
            (None, _) => return Ok(Places { channels: vec!["value".into()], columns: vec![self.values.clone()] }),
            (Some(_), None) => {}
        }
        let parts: Vec<(&str, u64)> = self.values.iter().filter_map(|&column| numbered(&self.names[column])).collect();
        let (mut channels, mut columns) = (Vec::<String>::new(), Vec::<Vec<(u64, usize)>>::new());
        let mut places = HashMap::new();
        for (&(name, t), &column) in parts.iter().zip(&self.values) {
            let place = *places.entry(name).or_insert_with(|| {
                channels.push(name.into());
                columns.push(Vec::new());
                columns.len() - 1
            });
            columns[place].push((t, column));
        }
        columns.iter_mut().for_each(|columns| columns.sort_unstable());
        for (columns_of, channel) in columns.iter().zip(&channels) {
            let times = |columns: &[(u64, usize)]| columns.iter().map(|(t, _)| *t).collect::<Vec<_>>();
            if columns_of.windows(2).any(|pair| pair[0].0 == pair[1].0) {
                return Err(format!("the channel `{}` has two columns with the same number", short(channel)));
            }
            if times(columns_of) != times(&columns[0]) {
                return Err(format!(
                    "the columns of the channel `{}` are not numbered as those of `{}`; a frame needs a value of each",
                    short(channel),
                    short(&channels[0])
                ));
            }
        }
        let columns =
            columns.into_iter().map(|columns| columns.into_iter().map(|(_, column)| column).collect()).collect();
        Ok(Places { channels, columns })
    }

    fn value(&self, row: &Row, column: usize) -> Result<f32, String> {
        match &row.fields[column] {
            "" => Ok(f32::NAN),
            text => value(text).map_err(|reason| format!("column `{}`: {reason}", short(&self.names[column]))),
        }
    }
}

enum Reader {
    Wide(Places),
    Long(Groups),
}

/// Columns of channels and frames.
struct Places {
    channels: Vec<String>,
    /// Of each channel, a column per frame.
    columns: Vec<Vec<usize>>,
}

impl Places {
    fn frames(&self, table: &Table, row: &Row) -> Result<Array2<f32>, String> {
        let mut frames = Array2::zeros((self.columns[0].len(), self.channels.len()));
        for (channel, columns) in self.columns.iter().enumerate() {
            for (frame, &column) in columns.iter().enumerate() {
                frames[[frame, channel]] = table.value(row, column)?;
            }
        }
        Ok(frames)
    }
}

/// Series of which each row has a frame.
#[derive(Default)]
struct Groups {
    places: HashMap<String, usize>,
    all: Vec<Group>,
}

struct Group {
    id: String,
    /// Of its first row.
    line: usize,
    times: Times,
    /// `[frames, channels]`
    values: Vec<f32>,
    target: String,
}

impl Groups {
    fn read(&mut self, table: &Table, row: &Row) -> Result<(), String> {
        let id = table.id.map_or("", |id| &row.fields[id]);
        if id.is_empty() {
            return Err("its id is empty".into());
        }
        let place = match self.places.get(id) {
            Some(place) => *place,
            None => {
                let (id, line) = (id.to_string(), row.line);
                self.places.insert(id.clone(), self.all.len());
                let (times, values, target) = (Times::default(), Vec::new(), String::new());
                self.all.push(Group { id, line, times, values, target });
                self.all.len() - 1
            }
        };
        let group = &mut self.all[place];
        if let Some(time) = table.time {
            group.times.push(&row.fields[time])?;
        }
        for &column in &table.values {
            group.values.push(table.value(row, column)?);
        }
        match table.target.map_or("", |target| &row.fields[target]) {
            "" => {}
            target if group.target.is_empty() => group.target = target.into(),
            target if group.target == target => {}
            target => {
                return Err(format!(
                    "its series has the targets `{}` and `{}`; a target is one of the whole series",
                    short(&group.target),
                    short(target)
                ));
            }
        }
        Ok(())
    }

    fn finish(self, table: &Table, time: TimeInput, set: &mut SeriesSet, targets: &mut Found) -> Result<(), Fault> {
        let channels = table.values.len();
        for Group { id, line, mut times, values, target } in self.all {
            let at = |reason: String| Fault::at(line, format!("series `{}`, which begins here: {reason}", short(&id)));
            let length = values.len() / channels;
            let mut order: Vec<usize> = (0..length).collect();
            let mut last = None;
            if table.time.is_some() {
                order = times.sort();
                match time {
                    TimeInput::Even => {
                        set.spacing = timestamps::common(set.spacing, times.spacing().map_err(at)?).map_err(at)?;
                    }
                    time => last = Some(times.channel(time).map_err(at)?),
                }
            }
            let frames =
                Array2::from_shape_fn(
                    (length, channels + usize::from(last.is_some())),
                    |(frame, channel)| match &last {
                        Some(last) if channel == channels => last[frame],
                        _ => values[order[frame] * channels + channel],
                    },
                );
            targets.push(line, &target);
            set.cases.push(Case { id, frames, target: Target::None });
        }
        if table.time.is_some() {
            set.channels.extend(time.channel().map(String::from));
            set.notes.push(timestamps::note(time, set.spacing));
        }
        Ok(())
    }
}

/// Targets as the file has them, with their lines.
#[derive(Default)]
struct Found {
    texts: Vec<(usize, String)>,
}

impl Found {
    fn push(&mut self, line: usize, text: &str) {
        self.texts.push((line, text.to_string()));
    }

    fn finish(self, column: &str, kind: TargetKind, set: &mut SeriesSet) -> Result<(), Fault> {
        let known = || self.texts.iter().filter(|(_, text)| !is_missing(text));
        let whole = |text: &str| number(text).map(|number| number.fract() == 0.0);
        let kind = match kind {
            TargetKind::Auto if known().next().is_none() => return Ok(()),
            TargetKind::Auto => {
                let numbers: Result<Vec<bool>, String> = known().map(|(_, text)| whole(text)).collect();
                let values = numbers.is_ok_and(|whole| whole.contains(&false));
                let (kind, what) =
                    if values { (TargetKind::Values, "numbers") } else { (TargetKind::Classes, "classes") };
                set.notes.push(format!("the column `{}` is read as {what} to predict", short(column)));
                kind
            }
            kind => kind,
        };
        let mut labels = Labels::default();
        for (case, (line, text)) in set.cases.iter_mut().zip(&self.texts) {
            case.target = match (text.as_str(), kind) {
                (text, _) if is_missing(text) => Target::None,
                (text, TargetKind::Values) => {
                    let value = number(text).map_err(|reason| Fault::at(*line, format!("target: {reason}")))?;
                    Target::Value(value)
                }
                (text, _) => Target::Class(labels.class(text).map_err(|reason| Fault::at(*line, reason))?),
            };
        }
        let (labels, notes) = labels.finish(&mut set.cases);
        set.labels = labels;
        set.notes.extend(notes);
        Ok(())
    }
}

/// Whether a target is not known.
fn is_missing(text: &str) -> bool {
    text.is_empty() || text == "?" || text.eq_ignore_ascii_case("nan")
}
