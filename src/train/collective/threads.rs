//! Ranks in one process, joined by channels.

use std::sync::mpsc::{Receiver, Sender, channel};

use super::Collective;
use crate::{Error, Result};

/// Ranks that are threads of one process: to try a training of several ranks, and to test one, without MPI.
///
/// Rank 0 adds up in the order of the ranks, in f64, so the same training gives the same weights, bit for bit. A rank that is
/// dropped, because its thread has ended or panicked, is an error for all others. (To use the cores of one machine none of this
/// is needed: a single training does.)
///
/// ```
/// use std::thread;
///
/// use hymba::train::{Collective, Threads};
///
/// let [first, mut second] = Threads::new(2).try_into().unwrap();
/// let rank = thread::spawn(move || second.sum(&mut [1.0]));
/// drop(first);
/// assert!(rank.join().unwrap().unwrap_err().to_string().contains("rank 0 is gone"));
/// ```
#[derive(Debug)]
pub struct Threads {
    rank: usize,
    size: usize,
    /// Of rank 0 one to each of the others, of the others one to rank 0; none after an error, of which the others learn so.
    links: Vec<Link>,
}

#[derive(Debug)]
struct Link {
    /// The rank at the other end.
    rank: usize,
    to: Sender<Message>,
    from: Receiver<Message>,
}

type Message = (Call, Vec<f64>);

#[derive(Debug, Clone, Copy, PartialEq)]
enum Call {
    Sum,
    SumF64,
    Broadcast,
}

impl Threads {
    /// So many ranks in their order, one for each thread; 1 at least.
    pub fn new(size: usize) -> Vec<Self> {
        let size = size.max(1);
        let mut all = vec![Threads { rank: 0, size, links: Vec::new() }];
        for rank in 1..size {
            let ((to, from_root), (to_root, from)) = (channel(), channel());
            all[0].links.push(Link { rank, to, from });
            all.push(Threads { rank, size, links: vec![Link { rank: 0, to: to_root, from: from_root }] });
        }
        all
    }

    fn call(&mut self, call: Call, numbers: impl Iterator<Item = f64>) -> Result<Vec<f64>> {
        if self.links.is_empty() && self.size > 1 {
            return Err(Error::Collective("an earlier call failed: a rank is gone".into()));
        }
        let done = self.exchange(call, numbers.collect());
        if done.is_err() {
            self.links.clear();
        }
        done
    }

    /// Rank 0 adds up what all ranks have, or of a broadcast takes its own, and sends it to the others.
    fn exchange(&self, call: Call, mut numbers: Vec<f64>) -> Result<Vec<f64>> {
        if self.rank > 0 {
            self.links[0].send((call, numbers))?;
            return self.links[0].receive().map(|(_, numbers)| numbers);
        }
        for link in &self.links {
            let (other, more) = link.receive()?;
            if other != call || more.len() != numbers.len() {
                let Link { rank, .. } = link;
                return Err(Error::Collective(format!("rank {rank} makes another call than rank 0")));
            }
            if call != Call::Broadcast {
                numbers.iter_mut().zip(more).for_each(|(sum, number)| *sum += number);
            }
        }
        self.links.iter().try_for_each(|link| link.send((call, numbers.clone())))?;
        Ok(numbers)
    }

    fn call_f32(&mut self, call: Call, numbers: &mut [f32]) -> Result<()> {
        let all = self.call(call, numbers.iter().map(|&number| f64::from(number)))?;
        numbers.iter_mut().zip(all).for_each(|(number, all)| *number = all as f32);
        Ok(())
    }
}

impl Link {
    fn send(&self, message: Message) -> Result<()> {
        self.to.send(message).map_err(|_| self.gone())
    }

    fn receive(&self) -> Result<Message> {
        self.from.recv().map_err(|_| self.gone())
    }

    fn gone(&self) -> Error {
        Error::Collective(format!("rank {} is gone", self.rank))
    }
}

impl Collective for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn sum(&mut self, numbers: &mut [f32]) -> Result<()> {
        self.call_f32(Call::Sum, numbers)
    }

    fn sum_f64(&mut self, numbers: &mut [f64]) -> Result<()> {
        let all = self.call(Call::SumF64, numbers.iter().copied())?;
        numbers.copy_from_slice(&all);
        Ok(())
    }

    fn broadcast(&mut self, numbers: &mut [f32]) -> Result<()> {
        self.call_f32(Call::Broadcast, numbers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_of_all_ranks_and_of_all_later_calls() {
        let [mut first, mut second, mut third] = Threads::new(3).try_into().unwrap();
        let second = std::thread::spawn(move || second.sum(&mut [1.0]).unwrap_err().to_string());
        let third = std::thread::spawn(move || third.broadcast(&mut [1.0]).unwrap_err().to_string());
        let error = first.sum(&mut [1.0]).unwrap_err().to_string();
        assert!(error.contains("rank 2 makes another call"), "{error}");
        // though rank 0 is still there
        for error in [second, third].map(|rank| rank.join().unwrap()) {
            assert!(error.contains("rank 0 is gone"), "{error}");
        }
        let error = first.sum_f64(&mut [1.0]).unwrap_err().to_string();
        assert!(error.contains("an earlier call failed"), "{error}");
    }
}
