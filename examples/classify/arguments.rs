//! What is asked for, and the options that follow.

use std::mem::discriminant;
use std::path::{Path, PathBuf};

use hymba::series::ReadOptions;
use hymba::train::{Augmentation, Dataset, TrainerOptions};
use hymba::{Differences, Pooling, PredictorOptions, Stem};

use crate::{reading, trials};

pub const USAGE: &str = "usage: classify [TRAIN TEST] [options]
Files end in .ts; with the feature csv also in .csv and .tsv:
  --target COLUMN     name, or place from 0, of what is to be predicted (target, class or label)
  --classes, --numbers     what that is (numbers if there are fractions)
  --id COLUMN --time-column COLUMN     of a table with a frame in each row (id; time or timestamp)
  --wide, --long      a series or a frame in each row (long with id and time)
  --no-header --delimiter C     first row with values; what separates columns
  --time T            what becomes of timestamps: even (dropped), delta or log-delta (an input)
What no option sets follows from the training series: see PredictorOptions and TrainerOptions::recommended_for.
  --views V           kernels: ridge regression on features of fixed kernels; encoder: a Hymba encoder; both: the kernels, and the
                      encoder with the share that training series say (both)
  --seed N            of kernels, weights, dropout and order (0)
  --epochs N          how often each series is seen
  --hidden N          hidden_size
  --layers N          num_layers
  --heads N           num_heads
  --window N          window_size
  --dropout X         of what branches and FFN add
  --pooling P         last, mean, max, or a number of attention queries
  --stride N          frames to a token of the stem; 0 for no stem
  --widths N,N,...    frames that the stem's convolutions look at
  --channels N        features of each convolution of the stem
  --directions N      1, or 2 for a second encoder that reads from the end
  --differences D     none, only, or beside: of each frame to the one before
  --normalize-series  each series to mean 0 and variance 1
  --learning-rate X   the highest one
  --weight-decay X    decay of the matrices
  --batch N           series in a step
  --average X         what a moving average of the weights keeps in a step; 0 for none
  --slice X --jitter X --scale X --warp X --mixup X     augmentations by their numbers; 0 for none
  --validation X      share of the training series that only picks the best epoch (0)
  --folds K           K times trains on all but one in K of the training series, and measures on these; no test
  --search N          random search of N trials by --folds (3) of the training series, the encoder alone, with successive halving: see
                      examples/classify/search.rs for the ranges; no test. Killed, it goes on where it was
  --trial K/N         of a search only every Nth trial, from the Kth on, counted from 1
  --results FILE      of a search, to which lines are added (results.jsonl in the folder of --out)
  --table FILE...     only prints the table of these results
  --out DIR           for model, pictures and checkpoint (target/classify/<name of the data>)
  --resume            goes on where a training with the same options was interrupted
  --restart           begins anew although there is one to go on with";

/// What series are told apart by.
#[derive(Default, Clone, Copy, PartialEq)]
pub enum Views {
    #[default]
    Both,
    Kernels,
    Encoder,
}

#[derive(Default, Clone)]
pub struct Arguments {
    pub train: PathBuf,
    pub test: PathBuf,
    pub reading: ReadOptions,
    pub views: Views,
    pub seed: u64,
    pub epochs: Option<usize>,
    pub hidden: Option<usize>,
    pub layers: Option<usize>,
    pub heads: Option<usize>,
    pub window: Option<usize>,
    pub dropout: Option<f32>,
    pub pooling: Option<Pooling>,
    pub stride: Option<usize>,
    pub widths: Option<Vec<usize>>,
    pub channels: Option<usize>,
    pub directions: Option<usize>,
    pub differences: Option<Differences>,
    pub normalize_series: bool,
    pub learning_rate: Option<f32>,
    pub weight_decay: Option<f32>,
    pub batch: Option<usize>,
    pub average: Option<f32>,
    pub augmentations: Vec<(String, f32)>,
    pub validation: f32,
    pub folds: Option<usize>,
    pub search: Option<usize>,
    pub trial: Option<(usize, usize)>,
    pub results: Option<PathBuf>,
    pub table: Option<Vec<PathBuf>>,
    pub out: Option<PathBuf>,
    pub resume: bool,
    pub restart: bool,
}

impl Arguments {
    /// `None` if help is asked for.
    pub fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Option<Self>, String> {
        let mut parsed = Arguments::default();
        let mut files = Vec::new();
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or(format!("{argument} needs a value\n{USAGE}"));
            if reading::option(&mut parsed.reading, &argument, &mut value)? {
                continue;
            }
            match argument.as_str() {
                "--help" | "-h" => return Ok(None),
                "--resume" => parsed.resume = true,
                "--restart" => parsed.restart = true,
                "--views" => {
                    parsed.views = match value()?.as_str() {
                        "both" => Views::Both,
                        "kernels" => Views::Kernels,
                        "encoder" => Views::Encoder,
                        other => return Err(format!("--views is both, kernels or encoder, found {other:?}")),
                    }
                }
                "--out" => parsed.out = Some(value()?.into()),
                "--seed" => parsed.seed = number(&argument, &value()?)?,
                "--epochs" => parsed.epochs = Some(number(&argument, &value()?)?),
                "--hidden" => parsed.hidden = Some(number(&argument, &value()?)?),
                "--layers" => parsed.layers = Some(number(&argument, &value()?)?),
                "--heads" => parsed.heads = Some(number(&argument, &value()?)?),
                "--window" => parsed.window = Some(number(&argument, &value()?)?),
                "--dropout" => parsed.dropout = Some(number(&argument, &value()?)?),
                "--pooling" => parsed.pooling = Some(pooling(&value()?)?),
                "--stride" => parsed.stride = Some(number(&argument, &value()?)?),
                "--widths" => {
                    let widths = value()?.split(',').map(|width| number(&argument, width)).collect::<Result<_, _>>()?;
                    parsed.widths = Some(widths);
                }
                "--channels" => parsed.channels = Some(number(&argument, &value()?)?),
                "--directions" => match number(&argument, &value()?)? {
                    directions @ 1..=2 => parsed.directions = Some(directions),
                    other => return Err(format!("--directions is 1 or 2, found {other}")),
                },
                "--differences" => {
                    parsed.differences = Some(match value()?.as_str() {
                        "none" => Differences::None,
                        "only" => Differences::Only,
                        "beside" => Differences::Beside,
                        other => return Err(format!("--differences is none, only or beside, found {other:?}")),
                    });
                }
                "--normalize-series" => parsed.normalize_series = true,
                "--weight-decay" => parsed.weight_decay = Some(number(&argument, &value()?)?),
                "--average" => parsed.average = Some(number(&argument, &value()?)?),
                "--slice" | "--jitter" | "--scale" | "--warp" | "--mixup" => {
                    let amount = number(&argument, &value()?)?;
                    parsed.augmentations.push((argument, amount));
                }
                "--search" => parsed.search = Some(number(&argument, &value()?)?),
                "--trial" => parsed.trial = Some(trials::share(&value()?)?),
                "--results" => parsed.results = Some(value()?.into()),
                "--table" => parsed.table = Some(Vec::new()),
                "--folds" => parsed.folds = Some(number(&argument, &value()?)?),
                "--learning-rate" => parsed.learning_rate = Some(number(&argument, &value()?)?),
                "--batch" => parsed.batch = Some(number(&argument, &value()?)?),
                "--validation" => parsed.validation = number(&argument, &value()?)?,
                _ if argument.starts_with('-') => return Err(format!("unknown option {argument}\n{USAGE}")),
                _ => files.push(PathBuf::from(argument)),
            }
        }
        if let Some(table) = &mut parsed.table {
            table.append(&mut files);
        }
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data");
        [parsed.train, parsed.test] = match files.len() {
            0 => ["TRAIN", "TEST"].map(|part| shipped.join(format!("JapaneseVowels_{part}.ts"))),
            _ => files.try_into().map_err(|_| format!("give two files, to train with and to test with\n{USAGE}"))?,
        };
        if parsed.resume && parsed.restart {
            return Err("--resume and --restart say the opposite of each other".into());
        }
        Ok(Some(parsed))
    }

    pub fn model(&self, train: &Dataset) -> PredictorOptions {
        let mut options = PredictorOptions::recommended_for(train);
        let encoder = &mut options.encoder;
        encoder.seed = self.seed;
        encoder.hidden_size = self.hidden.unwrap_or(encoder.hidden_size);
        encoder.num_layers = self.layers.unwrap_or(encoder.num_layers);
        encoder.num_heads = self.heads.unwrap_or(encoder.num_heads);
        encoder.window_size = self.window.unwrap_or(encoder.window_size);
        encoder.dropout = self.dropout.unwrap_or(encoder.dropout);
        match self.stride {
            Some(0) => options.stem = None,
            Some(stride) => options.stem = Some(Stem::new(stride)),
            None => {}
        }
        if let Some(stem) = &mut options.stem {
            stem.widths = self.widths.clone().unwrap_or_else(|| stem.widths.clone());
            stem.channels = self.channels.unwrap_or(stem.channels);
        }
        options.pooling = self.pooling.unwrap_or(options.pooling);
        options.bidirectional = self.directions.map_or(options.bidirectional, |directions| directions == 2);
        options.differences = self.differences.unwrap_or(options.differences);
        options.normalize_series |= self.normalize_series;
        options
    }

    pub fn training(&self, train: &Dataset) -> TrainerOptions {
        let usual = TrainerOptions::recommended_for(train);
        let epochs = usual.epochs;
        let (rate, average) = (usual.learning_rate, self.average.or(usual.average).filter(|average| *average != 0.0));
        let mut options = usual
            .epochs(self.epochs.unwrap_or(epochs))
            .learning_rate(self.learning_rate.unwrap_or(rate))
            .average(average)
            .validation_fraction(self.validation)
            .seed(self.seed);
        if let Some(decay) = self.weight_decay {
            options = options.weight_decay(decay);
        }
        if let Some(batch) = self.batch {
            options = options.batch_size(batch).accumulation(1);
        }
        for (name, amount) in &self.augmentations {
            let amount = *amount;
            let augmentation = match name.as_str() {
                "--slice" => Augmentation::Slice { fraction: amount },
                "--jitter" => Augmentation::Jitter { deviation: amount },
                "--scale" => Augmentation::Scale { deviation: amount },
                "--warp" => Augmentation::TimeWarp { strength: amount },
                _ => Augmentation::Mixup { alpha: amount },
            };
            options.augmentations.retain(|other| discriminant(other) != discriminant(&augmentation));
            if amount != 0.0 {
                options.augmentations.push(augmentation);
            }
        }
        options
    }
}

fn pooling(text: &str) -> Result<Pooling, String> {
    Ok(match text {
        "last" => Pooling::Last,
        "mean" => Pooling::Mean,
        "max" => Pooling::Max,
        queries => Pooling::Attention { queries: number("--pooling", queries)? },
    })
}

fn number<T: std::str::FromStr>(option: &str, text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{option} needs a number, found {text:?}\n{USAGE}"))
}
