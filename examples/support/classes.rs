//! From `.ts` files to data sets of classes, and what is to be said of them on the way.

use std::error::Error;
use std::path::Path;

use hymba::Task;
use hymba::train::{Dataset, Targets};

use super::ts::{self, Case, Target, labels};

/// The series of a file, without gaps; what was done about these is among the notes.
pub fn read(path: &Path) -> Result<ts::Dataset, Box<dyn Error>> {
    let mut data = ts::Dataset::read(path)?;
    if data.classes.is_empty() {
        let reason = match data.cases.iter().any(|case| matches!(case.target, Target::Value(_))) {
            true => "it is a regression problem (`@targetLabel true`): numbers are to be predicted, not classes",
            false => "its series have no classes (no `@classLabel true` line)",
        };
        return Err(format!("{}: {reason}", path.display()).into());
    }
    let (mut cut, mut missing, mut gaps, mut leading, mut silent, mut empty) = (0, 0, 0, 0, 0, 0);
    for case in &mut data.cases {
        cut += ts::cut_missing_end(&mut case.frames);
        let known = |column: hymba::ndarray::ArrayView1<f32>| column.iter().position(|value| !value.is_nan());
        let first: Vec<Option<usize>> = case.frames.columns().into_iter().map(known).collect();
        if first.iter().all(Option::is_none) {
            empty += 1;
        } else {
            silent += first.iter().filter(|first| first.is_none()).count();
        }
        leading += first.into_iter().flatten().sum::<usize>();
        let filled = ts::fill_missing(&mut case.frames);
        missing += filled;
        gaps += usize::from(filled > 0);
    }
    for (count, what) in [
        (cut, "frames at the ends of series hold no value at all: they are cut off"),
        (empty, "series hold no value at all: each is one frame of zeros"),
        (silent, "dimensions of single series hold no value at all: they are zeros"),
        (leading, "values are missing at the beginnings of series: each takes the first value after it"),
    ] {
        if count > 0 {
            data.notes.push(format!("{count} {what}"));
        }
    }
    if missing > 0 {
        data.notes
            .push(format!("{missing} values are missing in {gaps} series; in a gap each takes the value before it"));
    }
    Ok(data)
}

/// The classes of the training series, in the order of the header.
pub fn task(train: &ts::Dataset, path: &Path) -> Result<Task, String> {
    let occurs = |class: usize| train.cases.iter().any(|case| case.target == Target::Class(class));
    let classes: Vec<&str> =
        train.classes.iter().enumerate().filter(|&(class, _)| occurs(class)).map(|(_, label)| label.as_str()).collect();
    if classes.len() < 2 {
        return Err(format!(
            "{}: the series are of {} classes, two at least are needed",
            path.display(),
            classes.len()
        ));
    }
    Ok(Task::classify(classes))
}

/// The training series, with their classes as places among the labels of `task`, which is theirs.
pub fn training(task: &Task, data: ts::Dataset, path: &Path) -> Result<Dataset, Box<dyn Error>> {
    dataset(task.labels().to_vec(), data, path, "has no class; a training series needs one").map(|(data, _)| data)
}

/// The test series, and notes. Their task has the labels of `task`, and then those that no training series has: a model of
/// `task` never says these, so that it is wrong about their series.
pub fn test(task: &Task, data: ts::Dataset, path: &Path) -> Result<(Dataset, Vec<String>), Box<dyn Error>> {
    let known = task.labels().len();
    let (data, mut notes) =
        dataset(task.labels().to_vec(), data, path, "has no class; leave it out to count the others")?;
    let Targets::Classes(classes) = data.targets() else { return Ok((data, notes)) };
    let unknown = classes.iter().filter(|&&class| class >= known).count();
    if unknown > 0 {
        let labels = shortened(&data.task().labels()[known..].join(", "));
        notes.push(format!(
            "{unknown} test series are of classes that no training series has, and count as wrong: {labels}"
        ));
    }
    Ok((data, notes))
}

/// The series with their classes as places among `known` labels, to which those are added that it lacks.
fn dataset(
    mut known: Vec<String>,
    data: ts::Dataset,
    path: &Path,
    no_class: &str,
) -> Result<(Dataset, Vec<String>), Box<dyn Error>> {
    let mut notes = Vec::new();
    let mut places = vec![None; data.classes.len()];
    let mut classes = Vec::with_capacity(data.cases.len());
    for (i, case) in data.cases.iter().enumerate() {
        let Target::Class(class) = case.target else {
            return Err(format!("{}: series {} {no_class}", path.display(), i + 1).into());
        };
        let place = *places[class].get_or_insert_with(|| {
            let label = &data.classes[class];
            match labels::find(&known, label) {
                Some(place) => {
                    if known[place] != *label {
                        notes.push(labels::read_as(label, &known[place]));
                    }
                    place
                }
                None => {
                    known.push(label.clone());
                    known.len() - 1
                }
            }
        });
        classes.push(place);
    }
    let series = data.cases.into_iter().map(|Case { frames, .. }| frames).collect();
    Ok((Dataset::new(&Task::classify(known), series, Targets::Classes(classes))?, notes))
}

fn shortened(text: &str) -> String {
    const SHOWN: usize = 200;
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_string(),
    }
}
