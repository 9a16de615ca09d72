//! The part of the series of several ranks that is validated on: the same one, whichever rank has which of them.

use std::collections::HashMap;

use rand::{RngExt, SeedableRng};

use crate::layers::Rng;
use crate::train::data::shares;
use crate::train::{Dataset, Hash, Ranks, Targets};
use crate::{Error, Result};

/// Training and validation part of what this rank has. As in [`Dataset::split`] each class of series has its share in the validation
/// part, but a series is drawn by a number of its own, which follows from what is in it, and of equal ones from how many came before: those with the lowest are validated on.
pub(super) fn split(data: &Dataset, fraction: f32, seed: u64, ranks: &mut Ranks) -> Result<(Vec<usize>, Vec<usize>)> {
    let group = |i: usize| if let Targets::Classes(classes) = data.targets() { classes[i] } else { 0 };
    let own: Vec<u64> = (0..data.num_series()).map(|i| data.fingerprint_of_parts(&[i])).collect();
    let (all, first) = ranks.gather_hashes(&own)?;
    let mut equal = HashMap::new();
    let number = |print: u64| {
        let count = equal.entry(print).or_insert(0u64);
        let before = std::mem::replace(count, *count + 1);
        let mut hash = Hash::new();
        [print, seed].into_iter().chain((before > 0).then_some(before)).for_each(|word| hash.add(word));
        Rng::seed_from_u64(hash.finish()).random::<u32>()
    };
    let numbers: Vec<u32> = all[..first + own.len()].iter().copied().map(number).skip(first).collect();
    let groups = if let Targets::Classes(_) = data.targets() { data.task().outputs() } else { 1 };
    // of all ranks
    let mut count = |limit: &dyn Fn(usize) -> u64| {
        let mut counts = vec![0.0; groups];
        let below = numbers.iter().enumerate().filter(|(i, number)| u64::from(**number) < limit(group(*i)));
        below.for_each(|(i, _)| counts[group(i)] += 1.0);
        ranks.sum_of_data(&mut counts)?;
        Ok::<_, Error>(counts.into_iter().map(|count| count as usize).collect::<Vec<_>>())
    };
    let sizes = count(&|_| u64::MAX)?;
    let wanted = shares(&sizes, fraction);
    // the highest limit that has no more than is wanted below it, bit by bit
    let mut limits = vec![0u64; groups];
    for bit in (0..32).rev() {
        let counts = count(&|group| limits[group] | 1 << bit)?;
        for ((limit, count), wanted) in limits.iter_mut().zip(counts).zip(&wanted) {
            *limit |= u64::from(count <= *wanted) << bit;
        }
    }
    if count(&|group| limits[group])?.iter().sum::<usize>() == 0 {
        let all = sizes.iter().sum::<usize>();
        return Err(Error::Data(format!("no series is left for a validation part of {fraction} of {all}")));
    }
    Ok((0..data.num_series()).partition(|&i| u64::from(numbers[i]) >= limits[group(i)]))
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::*;
    use crate::Task;
    use crate::train::Threads;

    /// Which of 60 series, 40, 15 and 5 of a class, are validated on, where ranks have these.
    fn chosen(parts: &[Vec<usize>], seed: u64) -> Vec<usize> {
        let of_rank = |mine: &[usize], rank: &mut Threads| {
            let series = mine.iter().map(|&i| Array2::from_elem((3 + i % 4, 1), i as f32)).collect();
            let class = |&i: &usize| if i < 40 { 0 } else { 1 + usize::from(i >= 55) };
            let classes = Targets::Classes(mine.iter().map(class).collect());
            let data = Dataset::new(&Task::classify(["a", "b", "c"]), series, classes).unwrap();
            let (train, validation) = split(&data, 0.2, seed, &mut Ranks::new(rank, true).unwrap()).unwrap();
            assert_eq!(train.len() + validation.len(), mine.len());
            validation.into_iter().map(|place| mine[place]).collect::<Vec<_>>()
        };
        let mut all = std::thread::scope(|scope| {
            let ranks = Threads::new(parts.len()).into_iter().zip(parts);
            let ranks: Vec<_> = ranks.map(|(mut rank, part)| scope.spawn(move || of_rank(part, &mut rank))).collect();
            ranks.into_iter().flat_map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
        });
        all.sort_unstable();
        all
    }

    /// Sets of equal series are divided, too, and the same number of each is validated on, whichever rank has them.
    #[test]
    fn equal_series_count_apart() {
        let of_rank = |count: [usize; 2], rank: &mut Threads| {
            let series = |kind: usize| Array2::from_elem((5, 1), kind as f32);
            let kinds: Vec<_> = (0..2).flat_map(|kind| vec![kind; count[kind]]).collect();
            let series = kinds.iter().map(|kind| series(*kind)).collect();
            let classes = Targets::Classes(vec![0; kinds.len()]);
            let data = Dataset::new(&Task::classify(["a", "b"]), series, classes).unwrap();
            let (_, validation) = split(&data, 0.25, 3, &mut Ranks::new(rank, true).unwrap()).unwrap();
            [0, 1].map(|kind| validation.iter().filter(|i| kinds[**i] == kind).count())
        };
        let counts = |parts: &[[usize; 2]]| {
            std::thread::scope(|scope| {
                let ranks = Threads::new(parts.len()).into_iter().zip(parts);
                let ranks = ranks.map(|(mut rank, part)| scope.spawn(move || of_rank(*part, &mut rank)));
                let ranks: Vec<_> = ranks.collect();
                let all = ranks.into_iter().map(|rank| rank.join().unwrap());
                all.fold([0; 2], |sum, part| [sum[0] + part[0], sum[1] + part[1]])
            })
        };
        let one = counts(&[[24, 16]]);
        assert_eq!(one[0] + one[1], 10);
        assert_eq!(counts(&[[12, 8], [12, 8]]), one);
        assert_eq!(counts(&[[1, 15], [20, 1], [3, 0]]), one);
        // of a single kind
        assert_eq!(counts(&[[6, 0], [6, 0]]), [3, 0]);
    }

    #[test]
    fn each_class_has_its_share_and_the_same_series_whichever_rank_has_them() {
        let one = chosen(&[(0..60).collect()], 3);
        let count = |from, to| one.iter().filter(|i| (from..to).contains(*i)).count();
        assert_eq!([count(0, 40), count(40, 55), count(55, 60)], [8, 3, 1]);
        // one rank has a class for itself, and one a single series
        assert_eq!(chosen(&[(0..55).collect(), (55..60).collect()], 3), one);
        let third = |rank: usize| (1..60).rev().filter(|i| i % 2 == rank).collect();
        assert_eq!(chosen(&[vec![0], third(0), third(1)], 3), one);
        assert_ne!(chosen(&[(0..60).collect()], 4), one);
    }
}
