//! What came of a test, and whether that is success.

use std::error::Error;
use std::fmt;

use hymba::argmax;
use hymba::train::{Dataset, Targets};

use crate::confusion::Confusion;
use crate::model::Model;
use crate::numbers::Numbers;

/// What came of a test.
#[derive(PartialEq)]
pub enum Outcome {
    Classes(Confusion),
    Numbers(Numbers),
}

impl Outcome {
    /// The higher the better, and what it is.
    pub fn score(&self) -> (f64, &'static str) {
        match self {
            Outcome::Classes(confusion) => (confusion.accuracy().into(), "accuracy"),
            Outcome::Numbers(numbers) => (numbers.metrics.r2, "R²"),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Classes(confusion) => write!(f, "confusion matrix of the test series:\n{confusion}"),
            Outcome::Numbers(numbers) => write!(f, "{numbers}"),
        }
    }
}

pub fn test_with(model: &Model, test: &Dataset) -> Result<Outcome, Box<dyn Error>> {
    let predicted = model.predict(test)?;
    match test.targets() {
        Targets::Classes(classes) => {
            // the labels of the test series may be more
            let mut confusion = Confusion::new(test.task().labels());
            classes.iter().zip(argmax(&predicted)).for_each(|(&class, predicted)| confusion.count(class, predicted));
            Ok(Outcome::Classes(confusion))
        }
        Targets::Values(values) => Ok(Outcome::Numbers(Numbers::new(predicted, values.clone())?)),
        _ => Err("the series have neither classes nor numbers".into()),
    }
}

/// Prints what success looks like, and whether it was reached by the model that was read again.
pub fn report(model: &Model, test: &Dataset, outcome: &Outcome, shipped: bool) -> Result<bool, Box<dyn Error>> {
    let read_again = test_with(model, test)? == *outcome;
    println!("\n{} the saved model, read again, gives the same answers", mark(read_again));
    let learned = match outcome {
        Outcome::Classes(confusion) => {
            let most_frequent = confusion.share_of_most_frequent();
            let learned = confusion.accuracy() > most_frequent;
            println!(
                "{} test accuracy {:.4} ({} of {}); always the most frequent class would be {most_frequent:.4}",
                mark(learned),
                confusion.accuracy(),
                confusion.right(),
                test.num_series()
            );
            learned
        }
        Outcome::Numbers(numbers) => {
            let (learned, r2) = (numbers.metrics.r2 > 0.0, numbers.metrics.r2);
            println!("{} test R² {r2:.4} of {} series; always their mean would be 0", mark(learned), test.num_series());
            learned
        }
    };
    if shipped {
        println!("       (with the default options 0.98 to 0.99 is usual on these data)");
    }
    Ok(read_again && learned)
}

fn mark(good: bool) -> &'static str {
    if good { "ok    " } else { "FAILED" }
}
