//! `hymba-mpi train-lm`: a small language model from scratch, byte by byte, trained on many machines.

use std::error::Error;
use std::fs;
use std::ops::ControlFlow;
use std::path::PathBuf;

use clap::Args;
use hymba::HymbaLm;
use hymba::lm::HymbaLmConfig;
use hymba::train::{Collective, LmTrainer, LmTrainerOptions, TokenRows, TrainingData};
use hymba_mpi::World;

use crate::{Pace, has_training};

/// The same model as that of `hymba train-lm`: the last twentieth of the text is held out, and the tokens are its bytes. Every rank
/// reads all files.
#[derive(Args)]
pub struct TrainLm {
    /// Text files
    #[arg(required = true, value_name = "FILE")]
    texts: Vec<PathBuf>,
    /// Where the model, a folder as on the Hugging Face Hub, and the checkpoint go; rank 0 writes, and with --resume every rank reads
    #[arg(long, default_value = "hymba-mpi-run")]
    out: PathBuf,
    /// Continue after the last epoch of the checkpoint, with any number of ranks and the same texts and options; begin if there is none
    #[arg(long)]
    resume: bool,
    /// Width of the model
    #[arg(long, default_value_t = 128)]
    hidden: usize,
    /// Layers of the model
    #[arg(long, default_value_t = 4)]
    layers: usize,
    /// Bytes per row
    #[arg(long, default_value_t = 256)]
    window: usize,
    /// Rows per step, of all ranks together
    #[arg(long, default_value_t = LmTrainerOptions::default().batch_size)]
    batch: usize,
    /// Passes over the text
    #[arg(long, default_value_t = 1)]
    epochs: usize,
    /// Peak of the learning rate
    #[arg(long, default_value_t = 2e-3)]
    learning_rate: f32,
    /// Seed of weights and order
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

impl TrainLm {
    pub fn run(self, world: &mut World) -> Result<(), Box<dyn Error>> {
        let mut stream = Vec::new();
        for path in &self.texts {
            let text = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
            stream.extend(text.into_iter().map(u32::from));
        }
        let (text, held_out) = stream.split_at(stream.len() - stream.len() / 20);
        if held_out.len() < 2 {
            return Err("the text is too short: a twentieth of it is held out, which needs 2 bytes at least".into());
        }
        let train = TokenRows::packed(text, self.window)?;
        let validation = TokenRows::packed(held_out, self.window)?.bytes(held_out.len() - 1);

        let checkpoint = self.out.join("checkpoint");
        let options = LmTrainerOptions::default()
            .learning_rate(self.learning_rate)
            .batch_size(self.batch)
            .epochs(self.epochs)
            .seed(self.seed)
            .checkpoint(&checkpoint);
        let lm = HymbaLm::build(HymbaLmConfig::bytes(self.hidden, self.layers, self.window), self.seed)?;
        let first = world.rank() == 0;
        if first {
            let (millions, learned) = (lm.num_parameters() as f64 / 1e6, train.predicted());
            println!("{} ranks, {millions:.2} M parameters, {learned} bytes to learn", world.size());
        }
        let trainer = if self.resume && has_training(&checkpoint, world) {
            LmTrainer::resume(lm, &checkpoint)?
        } else {
            LmTrainer::new(lm, options.clone())?
        };
        if *trainer.options() != options {
            return Err(format!("{}: a training with other options: give the same", checkpoint.display()).into());
        }
        let mut pace = Pace::start();
        let data = TrainingData::new(&train).validation(&validation);
        let trained = trainer.fit_on(data, world, |progress| {
            let Some(finished) = progress.finished else {
                pace.step();
                return ControlFlow::Continue(());
            };
            let (epoch, loss, bits) = (progress.epoch, finished.train.mean(), finished.bits_per_byte);
            let (bits, pace) = (bits.unwrap_or(f64::NAN), pace.of_epoch(train.predicted() as f64));
            println!("epoch {epoch}: loss {loss:.4}, {bits:.4} bits per byte held out, {pace:.0} bytes/s");
            ControlFlow::Continue(())
        })?;
        if first {
            let folder = self.out.join("model");
            trained.lm.save_dir(&folder)?;
            println!("{}: {}, the best was epoch {}", folder.display(), trained.stopped, trained.best_epoch);
        }
        Ok(())
    }
}
