//! Forecasts the carbon dioxide in the air at Mauna Loa: the next month, and twelve years on end.
//!
//! ```sh
//! cargo run --release --example forecast
//! cargo run --release --example forecast -- --seed 1 --out DIR
//! ```
//!
//! A small model is trained on the months from 1958 to 1989. It sees the change of each month against the one before and
//! says the next change, after every frame. Then it streams through all months with `step`, one frame at a time:
//!
//! * one step ahead: it is told every month as it comes, and predicts the next;
//! * running free: from January 1990 on it is told nothing more, and goes on from its own predictions.
//!
//! Both are compared with two forecasts that cost nothing: persistence (the next month is as this one) and the calendar (it
//! changes as it did a year ago; the model is not told the calendar). A picture of both goes into the folder of `--out`.

use std::collections::BTreeMap;
use std::error::Error;
use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use hymba::ndarray::{Array1, Array2, ArrayView1, Axis, s};
use hymba::train::{Dataset, Targets, Trainer, TrainerOptions};
use hymba::{HymbaOptions, Predictor, Task};
use indicatif::{ProgressBar, ProgressStyle};

#[path = "support/picture.rs"]
mod picture;

use picture::{BLUE, Chart, Charts, Corner, GREEN, GREY, ORANGE, Series, Shape};

/// The first month that is not trained on, counted from year 0.
const FIRST_TEST_MONTH: usize = 1990 * 12;
/// Months of a training series, and from the start of one to that of the next.
const LENGTH: usize = 96;
const STRIDE: usize = 6;
const YEAR: usize = 12;

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("forecast: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all went as it should.
fn run() -> Result<bool, Box<dyn Error>> {
    let (seed, epochs, out) = arguments()?;
    let (first, levels) = read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data/mauna_loa_co2.csv"))?;
    let changes = &levels.slice(s![1..]) - &levels.slice(s![..-1]); // changes[i] leads from month i to i + 1
    let split = FIRST_TEST_MONTH - first;
    println!(
        "{} months of CO2 at Mauna Loa, from {} to {}; trained on those before {}",
        levels.len(),
        month(first),
        month(first + levels.len() - 1),
        month(FIRST_TEST_MONTH)
    );

    let start = Instant::now();
    let predictor = train(changes.slice(s![..split - 1]), seed, epochs)?;
    println!("trained {} parameters in {:.1} s", predictor.num_parameters(), start.elapsed().as_secs_f64());

    let start = Instant::now();
    let forecast = Forecast::stream(&predictor, &levels, &changes, split)?;
    println!("streamed {} frames in {:.2} s", 2 * levels.len() - split, start.elapsed().as_secs_f64());

    std::fs::create_dir_all(&out).map_err(|error| format!("{}: {error}", out.display()))?;
    let picture = out.join("forecast.svg");
    forecast.draw(first, &levels, &picture)?;
    println!("drew both forecasts into {}\n", picture.display());
    report(&forecast, &levels)
}

/// `[--seed N] [--epochs N] [--out DIR]`
fn arguments() -> Result<(u64, usize, PathBuf), String> {
    const USAGE: &str = "usage: forecast [--seed N] [--epochs N] [--out DIR]";
    let mut out = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/forecast");
    let (mut seed, mut epochs) = (0, 60);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let value = arguments.next().ok_or(USAGE)?;
        match argument.as_str() {
            "--seed" => seed = value.parse().map_err(|_| USAGE)?,
            "--epochs" => epochs = value.parse().map_err(|_| USAGE)?,
            "--out" => out = value.into(),
            _ => return Err(USAGE.into()),
        }
    }
    Ok((seed, epochs, out))
}

/// The first month, counted from year 0, and the mean of the weeks of each month; where none was measured, as far between
/// its neighbours as the month is.
fn read(path: &Path) -> Result<(usize, Array1<f32>), String> {
    let fault = |reason: String| format!("{}: {reason}", path.display());
    let text = std::fs::read_to_string(path).map_err(|error| fault(error.to_string()))?;
    let mut weeks = BTreeMap::<usize, Vec<f32>>::new();
    for (i, line) in text.lines().enumerate().skip(1) {
        let week = || {
            let (date, level) = line.split_once(',')?;
            let (year, month) = (date.get(..4)?.parse::<usize>().ok()?, date.get(4..6)?.parse::<usize>().ok()?);
            let level = if level.is_empty() { None } else { Some(level.parse::<f32>().ok()?) };
            Some((12 * year + month.checked_sub(1)?, level))
        };
        let (month, level) = week().ok_or_else(|| fault(format!("line {}: expected `YYYYMMDD,number`", i + 1)))?;
        weeks.entry(month).or_default().extend(level);
    }
    let means: Vec<(usize, f32)> = weeks
        .into_iter()
        .filter(|(_, levels)| !levels.is_empty())
        .map(|(month, levels)| (month, levels.iter().sum::<f32>() / levels.len() as f32))
        .collect();
    let (Some(&(first, level)), Some(&(last, _))) = (means.first(), means.last()) else {
        return Err(fault("no month has a number".into()));
    };
    if first + LENGTH > FIRST_TEST_MONTH || last < FIRST_TEST_MONTH + YEAR {
        return Err(fault("too few months before 1990, or after".into()));
    }
    let mut levels = vec![level];
    for ends in means.windows(2) {
        let [(from, before), (to, after)] = [ends[0], ends[1]];
        levels.extend(
            (from + 1..=to).map(|month| before + (after - before) * (month - from) as f32 / (to - from) as f32),
        );
    }
    Ok((first, levels.into()))
}

/// `March 1958`
fn month(count: usize) -> String {
    const NAMES: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    format!("{} {}", NAMES[count % 12], count / 12)
}

/// Learns to say, after every change, the next one.
fn train(changes: ArrayView1<f32>, seed: u64, epochs: usize) -> Result<Predictor, Box<dyn Error>> {
    let options = HymbaOptions::recommended(1).hidden_size(32).num_layers(2).window_size(2 * YEAR).seed(seed);
    let task = Task::RegressFrames { outputs: 1 };
    let (mut series, mut targets) = (Vec::new(), Vec::new());
    // counted from the end, so that the last month is learned from
    for end in (LENGTH + 1..=changes.len()).rev().step_by(STRIDE) {
        let changes = changes.slice(s![end - LENGTH - 1..end]).insert_axis(Axis(1)).to_owned(); // [l + 1, 1]
        series.push(changes.slice(s![..LENGTH, ..]).to_owned());
        targets.push(changes.slice(s![1.., ..]).to_owned());
    }
    let data = Dataset::new(&task, series, Targets::FrameValues(targets))?;
    let training = TrainerOptions::default().epochs(epochs).batch_size(8).learning_rate(3e-3).seed(seed);
    let trainer = Trainer::new(Predictor::build(options, task)?, training)?;

    let terminal = std::io::stderr().is_terminal();
    let style = ProgressStyle::with_template("{wide_bar} {msg}").unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = if terminal { ProgressBar::new(epochs as u64) } else { ProgressBar::hidden() }.with_style(style);
    let trained = trainer.fit(&data, |progress| {
        if let Some(epoch) = &progress.finished {
            let line = format!("epoch {}/{epochs}  loss {:.4}", progress.epoch, epoch.train.loss);
            bar.set_message(format!("{line}  {} s left", progress.remaining.as_secs()));
            bar.inc(1);
            if !terminal && progress.epoch % 10 == 0 {
                println!("{line}");
            }
        }
        ControlFlow::Continue(())
    });
    bar.finish_and_clear();
    Ok(trained?.predictor)
}

/// Forecasts of the months from `split` on.
struct Forecast {
    split: usize,
    /// Of each month, from all months before it.
    one_step: Vec<f32>,
    /// Of all months, from those before the first.
    free: Vec<f32>,
    /// Of the same months by the calendar: from the month before, and from the months before the first.
    calendar_step: Vec<f32>,
    calendar_free: Vec<f32>,
}

impl Forecast {
    fn stream(
        predictor: &Predictor,
        levels: &Array1<f32>,
        changes: &Array1<f32>,
        split: usize,
    ) -> Result<Forecast, Box<dyn Error>> {
        let mut state = predictor.new_state(1);
        let step = |change: f32, state: &mut _| -> hymba::Result<f32> {
            Ok(predictor.step(&Array2::from_elem((1, 1), change), state)?[[0, 0]])
        };
        // the change that leads to month `split` is predicted from the one that leads to the month before
        let mut next = 0.0;
        for &change in changes.slice(s![..split - 1]) {
            next = step(change, &mut state)?;
        }

        let mut free = Vec::new();
        let (mut free_state, mut change, mut level) = (state.clone(), next, levels[split - 1]);
        for _ in split..levels.len() {
            level += change;
            free.push(level);
            change = step(change, &mut free_state)?;
        }

        let mut one_step = Vec::new();
        for month in split..levels.len() {
            one_step.push(levels[month - 1] + next);
            next = step(changes[month - 1], &mut state)?;
        }

        let year_before = |month: usize| levels[month - YEAR] - levels[month - YEAR - 1];
        let calendar_step = (split..levels.len()).map(|month| levels[month - 1] + year_before(month)).collect();
        // the last known year again and again, risen by as much each time
        let rise = levels[split - 1] - levels[split - 1 - YEAR];
        let calendar_free =
            (0..levels.len() - split).map(|i| levels[split - YEAR + i % YEAR] + (i / YEAR + 1) as f32 * rise).collect();
        Ok(Forecast { split, one_step, free, calendar_step, calendar_free })
    }

    fn draw(&self, first: usize, levels: &Array1<f32>, path: &Path) -> Result<(), Box<dyn Error>> {
        let year = |month: usize| (first + month) as f32 / YEAR as f32;
        let line = |name: &str, color, shape, from: usize, levels: &[f32]| Series {
            name: name.into(),
            points: levels.iter().enumerate().map(|(i, &level)| (year(from + i), level)).collect(),
            color,
            shape,
        };
        let all = levels.to_vec();
        let (split, test) = (self.split, &all[self.split..]);
        let errors = |of: &[f32]| of.iter().zip(test).map(|(forecast, level)| forecast - level).collect::<Vec<f32>>();
        let chart = |title: &str, y_range, legend, series| Chart {
            title: title.into(),
            x_label: "year".into(),
            y_label: "ppm".into(),
            whole_x: false,
            y_range,
            legend,
            series,
        };
        let shown = split - 5 * YEAR;
        let persistence: Vec<f32> = all[split - 1..all.len() - 1].to_vec();
        let picture = Charts {
            title: "Carbon dioxide at Mauna Loa".into(),
            subtitle: "Monthly means in parts per million; the model has learned from the months before 1990".into(),
            panels: vec![
                chart(
                    "Running free: nothing measured after 1989 is told to the model",
                    None,
                    Corner::UpperLeft,
                    vec![
                        line("measured", GREY, Shape::Line, shown, &all[shown..]),
                        line("last year again", GREEN, Shape::Thin, split, &self.calendar_free),
                        line("model, free", ORANGE, Shape::Line, split, &self.free),
                    ],
                ),
                chart(
                    "One month ahead: error of the forecast",
                    Some(-2.0..4.0),
                    Corner::UpperRight,
                    vec![
                        line("persistence", GREY, Shape::Thin, split, &errors(&persistence)),
                        line("calendar", GREEN, Shape::Thin, split, &errors(&self.calendar_step)),
                        line("model", BLUE, Shape::Line, split, &errors(&self.one_step)),
                    ],
                ),
            ],
            panel_size: (980, 340),
            side_by_side: false,
        };
        picture::charts(path, &picture)
    }
}

/// Prints what success looks like, and whether it was reached.
fn report(forecast: &Forecast, levels: &Array1<f32>) -> Result<bool, Box<dyn Error>> {
    let split = forecast.split;
    let test = &levels.to_vec()[split..];
    let persistence = rmse(&levels.to_vec()[split - 1..levels.len() - 1], test);
    let (model, calendar) = (rmse(&forecast.one_step, test), rmse(&forecast.calendar_step, test));
    println!("root mean square error in ppm, {} months from January 1990 on", test.len());
    println!("  one month ahead     model {model:.3}   persistence {persistence:.3}   calendar {calendar:.3}");
    println!("  running free, over the first");
    let horizons = [YEAR, 2 * YEAR, 5 * YEAR, test.len()];
    for horizon in horizons.into_iter().filter(|&horizon| horizon <= test.len()) {
        let still = vec![levels[split - 1]; horizon];
        let test = &test[..horizon];
        println!(
            "  {horizon:>7} months       model {:.3}   persistence {:.3}   last year again {:.3}",
            rmse(&forecast.free[..horizon], test),
            rmse(&still, test),
            rmse(&forecast.calendar_free[..horizon], test)
        );
    }
    let first_years = rmse(&forecast.free[..2 * YEAR], &test[..2 * YEAR]);
    let (halved, held) = (model < persistence / 2.0, first_years < persistence);
    println!();
    println!("{} one month ahead, the error is less than half that of persistence", mark(halved));
    println!("{} running free for two years, it is still below that of persistence for one month", mark(held));
    Ok(halved && held)
}

fn rmse(forecast: &[f32], levels: &[f32]) -> f32 {
    let squares: f32 = forecast.iter().zip(levels).map(|(forecast, level)| (forecast - level).powi(2)).sum();
    (squares / levels.len() as f32).sqrt()
}

fn mark(good: bool) -> &'static str {
    if good { "ok    " } else { "FAILED" }
}
