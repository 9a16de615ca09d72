//! `hymba predict MODEL DATA`: classes or labels with their probabilities, or numbers, as CSV; `--stream` frame by frame.

use std::io::{self, BufRead};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use hymba::ndarray::Array2;
use hymba::{Predictor, Task};
use serde_json::{Map, Value, json};

use crate::load::ThreadArgs;
use crate::output::out;
use crate::series::{Answer, Model, ReadArgs, Said};

#[derive(clap::Args)]
pub struct Args {
    /// A model that `hymba train` wrote.
    model: PathBuf,
    /// Series: .ts, .csv or .tsv. Their targets, if there are any, are ignored.
    #[arg(required_unless_present = "stream")]
    data: Option<PathBuf>,
    /// Read frames from the standard input, one per line, numbers separated by commas or spaces, and answer each line at once. An
    /// empty line begins another series. The model must be one of `train --streaming`.
    #[arg(long, conflicts_with = "data")]
    stream: bool,
    /// Print lines of JSON instead of CSV.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    reading: ReadArgs,
    #[command(flatten)]
    threads: ThreadArgs,
}

pub fn run(args: Args) -> Result<()> {
    args.threads.start()?;
    let model = Model::load(&args.model)?;
    match &args.data {
        Some(data) => whole(&args, &model, data),
        None => match &model {
            Model::Encoder(predictor) => stream(&args, predictor),
            _ => bail!("{}: this model needs whole series; train one with --streaming", args.model.display()),
        },
    }
}

fn whole(args: &Args, model: &Model, data: &Path) -> Result<()> {
    let task = model.task();
    let set = args.reading.read_inputs(data)?;
    let (ids, series): (Vec<_>, Vec<_>) = set.cases.into_iter().map(|case| (case.id, case.frames)).unzip();
    let predicted = model.predict(&series)?;
    let mut text = String::new();
    if !args.json {
        text += &header(task, Some("series"));
    }
    for (i, (id, outputs)) in ids.into_iter().zip(predicted.rows()).enumerate() {
        let id = if id.is_empty() { i.to_string() } else { id };
        text += &line(task, &Answer::of(task, outputs), args.json, Some(("series", &id)));
    }
    out(text)
}

fn stream(args: &Args, predictor: &Predictor) -> Result<()> {
    let (task, width) = (predictor.task(), predictor.predictor_options().encoder.embed_dim);
    let mut state = predictor.new_state(1);
    if !args.json {
        out(header(task, None))?;
    }
    for (i, text) in io::stdin().lock().lines().enumerate() {
        let text = text.context("the standard input")?;
        if text.trim().is_empty() {
            state = predictor.new_state(1);
            continue;
        }
        let frame = frame(&text, width).with_context(|| format!("line {}", i + 1))?;
        let outputs = predictor.step(&frame, &mut state)?;
        out(line(task, &Answer::of(task, outputs.row(0)), args.json, None))?;
    }
    Ok(())
}

fn frame(text: &str, width: usize) -> Result<Array2<f32>> {
    let numbers = text.trim().trim_start_matches('[').trim_end_matches(']').split([',', ' ', '\t', ';']);
    let numbers: Vec<f32> = numbers
        .map(str::trim)
        .filter(|number| !number.is_empty())
        .map(|number| match number.parse::<f32>() {
            Ok(parsed) if parsed.is_finite() => Ok(parsed),
            _ => bail!("{number:?} is not a number"),
        })
        .collect::<Result<_>>()?;
    let count = numbers.len();
    Array2::from_shape_vec((1, width), numbers)
        .ok()
        .with_context(|| format!("it has {count} numbers, and the model's frames have {width}"))
}

/// The names of the columns.
fn header(task: &Task, id: Option<&str>) -> String {
    let mut names: Vec<String> = id.into_iter().map(str::to_string).collect();
    if !task.labels().is_empty() {
        names.push("predicted".into());
        names.extend(task.labels().iter().map(|label| format!("p({label})")));
    } else if task.outputs() == 1 {
        names.push("predicted".into());
    } else {
        names.extend((0..task.outputs()).map(|i| format!("predicted_{i}")));
    }
    row(&names)
}

fn line(task: &Task, answer: &Answer, json: bool, id: Option<(&str, &str)>) -> String {
    if json {
        let mut object = Map::new();
        if let Some((name, id)) = id {
            object.insert(name.into(), id.into());
        }
        let predicted = match (&answer.said, &answer.numbers[..]) {
            (Said::Class(class), _) => json!(class),
            (Said::Labels(labels), _) => json!(labels),
            (Said::Numbers, [number]) => json!(number),
            (Said::Numbers, numbers) => json!(numbers),
        };
        object.insert("predicted".into(), predicted);
        if !matches!(answer.said, Said::Numbers) {
            object.insert("probabilities".into(), answer.probabilities(task));
        }
        return Value::from(object).to_string() + "\n";
    }
    let said = match &answer.said {
        Said::Class(class) => Some(class.clone()),
        Said::Labels(labels) => Some(labels.join(";")),
        Said::Numbers => None,
    };
    let fields = id.map(|(_, id)| id.to_string()).into_iter().chain(said);
    let fields: Vec<String> = fields.chain(answer.numbers.iter().map(f32::to_string)).collect();
    row(&fields)
}

/// A row of CSV.
fn row(fields: &[String]) -> String {
    let quoted = |field: &String| match field.contains([',', '"', '\n', '\r']) || field.trim() != field {
        true => format!("\"{}\"", field.replace('"', "\"\"")),
        false => field.clone(),
    };
    fields.iter().map(quoted).collect::<Vec<_>>().join(",") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_from_lines_of_several_kinds() {
        for text in ["1,2.5,-3", " 1 2.5 -3\r", "[1, 2.5, -3]", "1\t2.5\t-3"] {
            assert_eq!(frame(text, 3).unwrap().as_slice(), Some(&[1.0, 2.5, -3.0][..]), "{text:?}");
        }
        for text in ["1,2", "1,2,x", "1,2,NaN", "1,2,inf", "1,2,3,4"] {
            assert!(frame(text, 3).is_err(), "{text:?}");
        }
    }

    #[test]
    fn fields_with_commas_and_quotes_are_quoted() {
        assert_eq!(row(&["a,b".into(), "say \"x\"".into(), "c".into()]), "\"a,b\",\"say \"\"x\"\"\",c\n");
        assert_eq!(row(&[" a".into(), "b c".into()]), "\" a\",b c\n");
    }
}
