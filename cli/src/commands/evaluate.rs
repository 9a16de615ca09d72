//! `hymba evaluate MODEL DATA`: how well a model does on series whose classes or numbers are known.

use std::path::PathBuf;

use anyhow::{Result, bail};
use hymba::argmax;
use hymba::ndarray::Array2;
use hymba::train::{RegressionMetrics, Targets};
use serde_json::{Value, json};

use crate::load::ThreadArgs;
use crate::output::{self, out};
use crate::series::{Model, ReadArgs};

#[derive(clap::Args)]
pub struct Args {
    /// A model that `hymba train` wrote.
    model: PathBuf,
    /// Series with their classes or numbers: .ts, .csv or .tsv.
    data: PathBuf,
    /// Print one JSON object.
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
    let task = model.task();
    let set = args.reading.read_for(&args.data, task)?;
    set.compare_labels(task).iter().for_each(|note| eprintln!("{}: {note}", args.data.display()));
    let data = set.into_dataset(task)?;
    let predicted = model.predict(data.series())?;
    let (json, words) = match data.targets() {
        Targets::Classes(classes) => of_classes(data.task().labels(), classes, &argmax(&predicted).to_vec()),
        Targets::Values(values) => of_numbers(values, &predicted)?,
        _ => bail!("{}: its targets are neither classes nor numbers of whole series", args.data.display()),
    };
    if args.json { output::json(&json) } else { out(words) }
}

fn of_classes(labels: &[String], classes: &[usize], predicted: &[usize]) -> (Value, String) {
    let mut confusion = vec![vec![0usize; labels.len()]; labels.len()];
    classes.iter().zip(predicted).for_each(|(&class, &predicted)| confusion[class][predicted] += 1);
    let right: usize = (0..labels.len()).map(|class| confusion[class][class]).sum();
    let accuracy = right as f64 / classes.len() as f64;
    let most: usize = confusion.iter().map(|row| row.iter().sum()).max().unwrap_or(0);
    let most = most as f64 / classes.len() as f64;
    let json = json!({"series": classes.len(), "accuracy": accuracy, "most_frequent_class": most, "labels": labels,
        "confusion": confusion});
    let mut words =
        format!("accuracy  {accuracy:.4} ({right} of {}); always the most frequent class: {most:.4}\n", classes.len());
    for (class, (label, row)) in labels.iter().zip(&confusion).enumerate() {
        let wrong = labels.iter().zip(row).filter(|(other, count)| *other != label && **count > 0);
        let wrong: Vec<String> = wrong.map(|(other, count)| format!("{count} as {other}")).collect();
        let right = row[class];
        let all: usize = row.iter().sum();
        words +=
            &format!("{label}  {right} of {all}{}{}\n", if wrong.is_empty() { "" } else { "; " }, wrong.join(", "));
    }
    (json, words)
}

fn of_numbers(values: &Array2<f32>, predicted: &Array2<f32>) -> Result<(Value, String)> {
    let RegressionMetrics { rmse, mae, r2, .. } = RegressionMetrics::of(predicted, values)?;
    // of targets that are all the same nothing can be explained
    let r2 = values.iter().any(|value| *value != values[[0, 0]]).then_some(r2);
    let json = json!({"series": values.nrows(), "rmse": rmse, "mae": mae, "r2": r2});
    let r2 = r2.map_or("none".to_string(), |r2| format!("{r2:.4}"));
    Ok((json, format!("series  {}\nRMSE    {rmse:.6}\nMAE     {mae:.6}\nR²      {r2}\n", values.nrows())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hymba::ndarray::arr2;

    #[test]
    fn figures_of_numbers_and_classes() {
        let (json, _) = of_numbers(&arr2(&[[1.0], [2.0], [3.0]]), &arr2(&[[1.0], [2.0], [5.0]])).unwrap();
        assert_eq!((json["mae"].as_f64(), json["r2"].as_f64()), (Some(2.0 / 3.0), Some(-1.0)));
        let labels = ["a", "b"].map(String::from);
        let (json, words) = of_classes(&labels, &[0, 0, 1, 1], &[0, 1, 1, 1]);
        assert_eq!(json["accuracy"], 0.75);
        assert!(words.contains("a  1 of 2; 1 as b"), "{words}");
    }
}
