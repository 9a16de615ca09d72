//! A cache of states after prompt prefixes, for later prompts.
//!
//! A state cannot be cut back, so it serves only prompts that begin with all that it has seen, cut in the same places.
//! The longest wins; where memory is short, the least recently used go first.

use hymba::lm::LmState;

use super::prompt::Prompt;

pub struct PrefixCache {
    limit: usize,
    bytes: usize,
    clock: u64,
    entries: Vec<Entry>,
}

struct Entry {
    ids: Vec<u32>,
    cuts: Vec<usize>,
    state: LmState,
    bytes: usize,
    used: u64,
}

impl PrefixCache {
    /// A cache of at most `limit` bytes; 0 keeps nothing.
    pub fn new(limit: usize) -> Self {
        PrefixCache { limit, bytes: 0, clock: 0, entries: Vec::new() }
    }

    /// How many pieces of the prompt need not be read, and a state that has seen them. At least the last piece is read.
    pub fn find(&mut self, prompt: &Prompt) -> Option<(usize, LmState)> {
        let serves = |entry: &&mut Entry| {
            entry.cuts.len() < prompt.cuts.len()
                && prompt.cuts.starts_with(&entry.cuts)
                && prompt.ids.starts_with(&entry.ids)
        };
        let entry = self.entries.iter_mut().filter(serves).max_by_key(|entry| entry.ids.len())?;
        self.clock += 1;
        entry.used = self.clock;
        Some((entry.cuts.len(), entry.state.clone()))
    }

    /// Keeps a copy of a state that has seen `pieces` pieces of the prompt, if they end where [`Prompt::keep`] says.
    pub fn offer(&mut self, prompt: &Prompt, pieces: usize, state: &LmState) {
        let (cuts, end) = (&prompt.cuts[..pieces], prompt.cuts[pieces - 1]);
        let bytes = state.num_bytes() + end * size_of::<u32>() + size_of_val(cuts) + size_of::<Entry>();
        if !prompt.keep.contains(&end) || bytes > self.limit {
            return;
        }
        self.clock += 1;
        let ids = &prompt.ids[..end];
        if let Some(entry) = self.entries.iter_mut().find(|entry| entry.cuts == cuts && entry.ids == ids) {
            entry.used = self.clock;
            return;
        }
        while self.bytes + bytes > self.limit {
            let oldest = (0..self.entries.len()).min_by_key(|&i| self.entries[i].used);
            let Some(oldest) = oldest else { return };
            self.bytes -= self.entries.swap_remove(oldest).bytes;
        }
        self.bytes += bytes;
        let (ids, cuts, state) = (ids.to_vec(), cuts.to_vec(), state.clone());
        self.entries.push(Entry { ids, cuts, state, bytes, used: self.clock });
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::engine::tests::small;

    #[test]
    fn longest_wins_and_memory_is_bounded() {
        let lm = small();
        let ids: Vec<u32> = (1..30).collect();
        let prompt = Prompt::new(ids.clone(), &[5, 10], 4);
        let one = lm.new_state(1);
        let mut cache = PrefixCache::new(2 * one.num_bytes() + 4000);
        for pieces in 1..prompt.cuts.len() {
            let mut state = lm.new_state(1);
            lm.prefill_ragged(&[&ids[..prompt.cuts[pieces - 1]]], &mut state).unwrap();
            cache.offer(&prompt, pieces, &state);
        }
        // only the boundaries
        assert!(cache.len() <= 2 && cache.bytes() <= cache.limit);
        let (pieces, state) = cache.find(&prompt).unwrap();
        assert_eq!((prompt.cuts[pieces - 1], state.lengths()), (10, vec![10]));
        // the same beginning without the boundaries is another one
        assert!(cache.find(&Prompt::new(ids.clone(), &[], 4)).is_none());
        // all that was seen must be there, and something must be left to read
        assert!(cache.find(&Prompt::new(ids[..10].to_vec(), &[5], 4)).is_none_or(|(_, state)| state.lengths() == [5]));
        // what was asked for last stays
        for other in 100..120 {
            let ids = vec![other % 50; 9];
            let prompt = Prompt::new(ids.clone(), &[], 4);
            let mut state = lm.new_state(1);
            lm.prefill_ragged(&[&ids[..8]], &mut state).unwrap();
            cache.offer(&prompt, 2, &state);
            assert!(cache.bytes() <= cache.limit, "{} of {}", cache.bytes(), cache.limit);
            assert!(cache.find(&prompt).is_some());
        }
        let mut none = PrefixCache::new(0);
        none.offer(&prompt, 2, &one);
        assert_eq!(none.len(), 0);
    }
}
