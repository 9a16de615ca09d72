//! The ranks of a training, and all that they do together.

use std::ops::ControlFlow;

use ndarray::ArrayView2;
use rand::SeedableRng;

use super::Collective;
use crate::layers::Rng;
use crate::train::{Parameters, cut_into, views, views_mut};
use crate::{Error, Normalization, Parameter, Result};

/// The ranks of a training.
pub(in crate::train) struct Ranks<'a> {
    collective: &'a mut dyn Collective,
    /// Whether every rank has other data.
    sharded: bool,
    /// All numbers of a gradient.
    flat: Vec<f32>,
    /// Whether the callback said so, on rank 0.
    stop: bool,
}

impl<'a> Ranks<'a> {
    pub fn new(collective: &'a mut dyn Collective, sharded: bool) -> Result<Self> {
        let (rank, size) = (collective.rank(), collective.size());
        if rank >= size {
            return Err(Error::Collective(format!("there is no rank {rank} of {size}: ranks count from 0")));
        }
        Ok(Ranks { collective, sharded, flat: Vec::new(), stop: false })
    }

    pub fn rank(&self) -> usize {
        self.collective.rank()
    }

    /// Whether this is the rank that writes and tells.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    fn is_alone(&self) -> bool {
        self.collective.size() == 1
    }

    pub fn sharded(&self) -> bool {
        self.sharded
    }

    /// Generators of an epoch: one that all ranks share, and one of this rank alone.
    pub fn generators(&self, seed: u64, epoch: usize) -> [Rng; 2] {
        let all = epoch as u64 + 1;
        [all, 1 << 63 | (self.rank() as u64) << 32 | all].map(|stream| {
            let mut rng = Rng::seed_from_u64(seed);
            rng.set_stream(stream);
            rng
        })
    }

    /// The part of `all` that this rank takes: every one in turn, so that of a sorted list each rank has its share of the large.
    /// Where ranks have their own data, all.
    pub fn share<T: Copy>(&self, all: &[T]) -> Vec<T> {
        let step = if self.sharded { 1 } else { self.collective.size() };
        all.iter().skip(if self.sharded { 0 } else { self.rank() }).step_by(step).copied().collect()
    }

    /// How many batches of at most `most` this rank makes of its share of so many series in `steps` steps: one at least of each step.
    pub fn num_batches(&self, count: usize, steps: usize, most: usize) -> usize {
        let share = |count: usize| match self.sharded {
            true => count,
            false => (count + self.collective.size() - 1 - self.rank()) / self.collective.size(),
        };
        cut_into(count, steps).map(|step| share(step.len()).div_ceil(most).max(1)).sum()
    }

    /// Calls back on rank 0, until the callback says stop.
    pub fn tell(&mut self, callback: impl FnOnce() -> ControlFlow<()>) {
        self.stop = self.stop || self.is_first() && callback().is_break();
    }

    /// Whether this rank was told to stop. The others learn of it when they [agree](Self::agree).
    pub fn stop(&self) -> bool {
        self.stop
    }

    /// Every rank says what became of its work, and whether it was told to stop, and adds to `sums`. An error of one rank is an error
    /// of all, and so nobody waits for it. Returns whether to stop.
    ///
    /// Where numbers are not finite on one rank, all get [`Error::NotFinite`].
    pub fn agree(&mut self, done: Result<()>, sums: &mut [f64]) -> Result<bool> {
        let rank = self.rank() as f64;
        let mut all = [0.0; 6].to_vec();
        match &done {
            Ok(()) => {}
            Err(Error::NotFinite { step, .. }) => all[..3].copy_from_slice(&[1.0, rank, *step as f64]),
            Err(_) => all[3..5].copy_from_slice(&[1.0, rank]),
        }
        all[5] = f64::from(self.stop);
        all.extend_from_slice(sums);
        self.collective.sum_f64(&mut all)?;
        let (said, rest) = all.split_at(6);
        let at = |count: f64, ranks: f64| match count {
            1.0 => format!("on rank {ranks}"),
            _ => format!("on {count} ranks"),
        };
        if said[3] > 0.0 {
            let elsewhere = || Error::Collective(format!("an error {}: see its message", at(said[3], said[4])));
            return Err(done.err().filter(|error| !matches!(error, Error::NotFinite { .. })).unwrap_or_else(elsewhere));
        }
        if said[5] == 0.0 && said[0] > 0.0 {
            let what = format!("the loss is not finite {}", at(said[0], said[1]));
            let elsewhere = Error::NotFinite { step: (said[2] / said[0]) as u64, what };
            return Err(done.err().unwrap_or(elsewhere));
        }
        sums.copy_from_slice(rest);
        Ok(said[5] > 0.0)
    }

    /// As [`agree`](Self::agree), for work that gives something.
    pub fn together<T>(&mut self, done: Result<T>) -> Result<T> {
        match done {
            Ok(value) => self.agree(Ok(()), &mut []).map(|_| value),
            Err(error) => self.agree(Err(error), &mut []).and(Err(Error::Collective("no rank failed".into()))),
        }
    }

    /// Adds up what differs from rank to rank where each has its own data, and is the same on all where not.
    pub fn sum_of_data(&mut self, sums: &mut [f64]) -> Result<()> {
        if self.sharded { self.collective.sum_f64(sums) } else { Ok(()) }
    }

    /// The numbers of every rank, in the order of the ranks.
    pub fn gather<const N: usize>(&mut self, own: [f64; N]) -> Result<Vec<[f64; N]>> {
        let mut all = vec![[0.0; N]; self.collective.size()];
        all[self.rank()] = own;
        self.collective.sum_f64(all.as_flattened_mut())?;
        Ok(all)
    }

    /// The hashes of all ranks, in their order, and where those of this rank begin.
    pub fn gather_hashes(&mut self, own: &[u64]) -> Result<(Vec<u64>, usize)> {
        let counts: Vec<usize> = self.gather([own.len() as f64])?.iter().map(|[count]| *count as usize).collect();
        let first = counts[..self.rank()].iter().sum();
        let mut all = vec![[0.0; 2]; counts.iter().sum()];
        all[first..].iter_mut().zip(own).for_each(|(halves, hash)| *halves = split(*hash));
        self.collective.sum_f64(all.as_flattened_mut())?;
        let whole = |[high, low]: [f64; 2]| (high as u64) << 32 | low as u64;
        Ok((all.into_iter().map(whole).collect(), first))
    }

    /// A normalization of the frames `[.., width]` of all ranks.
    pub fn fit<'f>(
        &mut self,
        width: usize,
        frames: impl Iterator<Item = ArrayView2<'f, f32>> + Clone,
    ) -> Result<Normalization> {
        let sum = self.sharded.then_some(|sums: &mut [f64]| self.collective.sum_f64(sums));
        Normalization::fit_over(width, frames, sum)
    }

    /// Adds up the gradients of all ranks.
    pub fn sum(&mut self, gradient: &mut impl Parameters) -> Result<()> {
        self.flat(gradient, |collective, flat| collective.sum(flat))
    }

    /// Gives the weights of rank 0 to all.
    pub fn broadcast(&mut self, weights: &mut impl Parameters) -> Result<()> {
        self.flat(weights, |collective, flat| collective.broadcast(flat))
    }

    fn flat(
        &mut self,
        parameters: &mut impl Parameters,
        call: impl FnOnce(&mut dyn Collective, &mut [f32]) -> Result<()>,
    ) -> Result<()> {
        if self.is_alone() {
            return Ok(());
        }
        self.flat.clear();
        views(parameters).iter().for_each(|(_, array)| self.flat.extend(array));
        call(self.collective, &mut self.flat)?;
        let mut flat = self.flat.iter();
        for (_, mut array) in views_mut(parameters) {
            array.iter_mut().zip(&mut flat).for_each(|(number, sum)| *number = *sum);
        }
        Ok(())
    }

    /// Refuses numbers that are not the same on all ranks, and names those that differ from rank 0.
    pub fn compare(&mut self, what: &str, hash: impl FnOnce() -> u64) -> Result<()> {
        if self.is_alone() {
            return Ok(());
        }
        let halves = self.gather(split(hash()))?;
        let others = halves.iter().enumerate().filter(|(_, other)| **other != halves[0]);
        let others: Vec<String> = others.take(8).map(|(rank, _)| rank.to_string()).collect();
        match others.is_empty() {
            true => Ok(()),
            false => Err(Error::Collective(format!(
                "{what} on rank {} differ from those on rank 0, and must be the same on all ranks",
                others.join(", ")
            ))),
        }
    }

    /// A number by which to notice other data: of `whole`, which must be the same on all ranks, or the sum of all ranks' `parts` where
    /// each has its own.
    pub fn fingerprint(&mut self, what: &str, whole: impl FnOnce() -> u64, parts: impl FnOnce() -> u64) -> Result<u64> {
        if self.sharded() {
            return self.sum_of_hashes(parts());
        }
        let whole = whole();
        self.compare(what, || whole)?;
        Ok(whole)
    }

    /// A number for the data of all ranks, whichever of them has which part.
    fn sum_of_hashes(&mut self, hash: u64) -> Result<u64> {
        // 16 bits each, so that sums are exact
        let mut parts = [0, 16, 32, 48].map(|shift| ((hash >> shift) & 0xffff) as f64);
        self.collective.sum_f64(&mut parts)?;
        Ok(parts.iter().rev().fold(0, |sum: u64, &part| (sum << 16).wrapping_add(part as u64)))
    }
}

fn split(hash: u64) -> [f64; 2] {
    [(hash >> 32) as f64, (hash & 0xffff_ffff) as f64]
}

/// FNV-1a over words.
pub(in crate::train) struct Hash(u64);

impl Hash {
    pub fn new() -> Self {
        Hash(0xcbf2_9ce4_8422_2325)
    }

    pub fn add(&mut self, word: u64) {
        self.0 = (self.0 ^ word).wrapping_mul(0x0000_0100_0000_01b3);
    }

    pub fn finish(&self) -> u64 {
        self.0
    }
}

/// A hash of names and numbers.
pub(in crate::train) fn hash_of(parameters: &impl Parameters) -> u64 {
    let mut hash = Hash::new();
    parameters.visit(&mut |name, array| {
        name.bytes().for_each(|byte| hash.add(byte.into()));
        array.iter().for_each(|number| hash.add(number.to_bits().into()));
    });
    hash.finish()
}

/// A hash of all that a walk visits, and of the types it is stored in.
pub(in crate::train) fn hash_of_every(walk: impl FnOnce(&mut dyn FnMut(&str, Parameter<'_>))) -> u64 {
    let mut hash = Hash::new();
    walk(&mut |name, parameter| {
        hash.add(hash_of_text(&(name, parameter.storage())));
        match parameter {
            Parameter::Array(array) => array.iter().for_each(|number| hash.add(number.to_bits().into())),
            Parameter::Stored(matrix) => (0..matrix.shape()[0])
                .for_each(|output| matrix.row(output).iter().for_each(|number| hash.add(number.to_bits().into()))),
        }
    });
    hash.finish()
}

/// A hash of what `Debug` prints.
pub(in crate::train) fn hash_of_text(value: &impl std::fmt::Debug) -> u64 {
    let mut hash = Hash::new();
    format!("{value:?}").bytes().for_each(|byte| hash.add(byte.into()));
    hash.finish()
}
