//! The names of classes: as a header lists them, and as the lines of a file spell them.

use std::collections::{BTreeMap, BTreeSet};

use super::short;

/// The classes of one file.
#[derive(Default)]
pub(super) struct Labels {
    names: Vec<String>,
    /// Whether a header lists them all; otherwise they are what the lines have.
    listed: bool,
    /// Other spellings, and the class that each was read as.
    spellings: BTreeMap<String, usize>,
}

impl Labels {
    /// Those of a header; an empty list is one that leaves them to the lines.
    pub fn new(mut names: Vec<String>) -> Self {
        let mut seen = BTreeSet::new();
        names.retain(|name| seen.insert(name.clone()));
        Labels { listed: !names.is_empty(), names, spellings: BTreeMap::new() }
    }

    /// The class that a line names.
    pub fn class(&mut self, label: &str) -> Result<usize, String> {
        let known = self.names.iter().position(|name| name == label).or_else(|| self.spellings.get(label).copied());
        if let Some(class) = known {
            return Ok(class);
        }
        if let Some(class) = find(&self.names, label) {
            self.spellings.insert(label.to_string(), class);
            return Ok(class);
        }
        match (self.listed, label.is_empty()) {
            (false, true) => Err("there is no class after the last `:`".into()),
            (false, false) => {
                self.names.push(label.to_string());
                Ok(self.names.len() - 1)
            }
            (true, _) => {
                let listed = short(&self.names.join(" "));
                Err(format!("class `{}` is not in the header's list: {listed}", short(label)))
            }
        }
    }

    /// Sorts names that no header has put in order. Returns the place of each class among the sorted ones.
    pub fn sort(&mut self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.names.len()).collect();
        if !self.listed {
            let numbers: Option<Vec<f64>> = self.names.iter().map(|name| number(name)).collect();
            match numbers {
                Some(numbers) => order.sort_by(|&a, &b| numbers[a].total_cmp(&numbers[b])),
                None => order.sort_by(|&a, &b| self.names[a].cmp(&self.names[b])),
            }
        }
        let mut places = vec![0; order.len()];
        order.iter().enumerate().for_each(|(place, &class)| places[class] = place);
        self.names = order.into_iter().map(|class| std::mem::take(&mut self.names[class])).collect();
        self.spellings.values_mut().for_each(|class| *class = places[*class]);
        places
    }

    /// The names, and what is to be said of them.
    pub fn finish(self) -> (Vec<String>, Vec<String>) {
        let mut notes: Vec<String> =
            self.spellings.iter().map(|(label, &class)| read_as(label, &self.names[class])).collect();
        let mut seen = BTreeSet::new();
        if let Some(name) = self.names.iter().find(|name| !seen.insert(key(name))) {
            notes.push(format!(
                "class `{}` differs from another of the header only in case or in how a number is written: here they are \
                 two classes, while sktime and aeon ignore case",
                short(name)
            ));
        }
        (self.names, notes)
    }
}

/// The place of a label among the names of classes: its own spelling, or else the only one that differs from it in nothing but
/// case, which sktime and aeon ignore, too, or in how a number is written (`1` and `1.0`). Case is that of ASCII: other letters may be
/// of an encoding that was guessed.
pub(super) fn find(names: &[String], label: &str) -> Option<usize> {
    if let Some(class) = names.iter().position(|name| name == label) {
        return Some(class);
    }
    let wanted = key(label);
    let mut similar = names.iter().enumerate().filter(|(_, name)| key(name) == wanted).map(|(class, _)| class);
    similar.next().filter(|_| similar.next().is_none())
}

/// What is said where a class is spelled in another way.
pub(super) fn read_as(label: &str, name: &str) -> String {
    format!("class `{}` is read as `{}`", short(label), short(name))
}

/// The same for labels that differ only in case, or in how a number is written.
fn key(label: &str) -> String {
    // adding 0 turns −0 into 0
    number(label).map_or_else(|| label.to_ascii_lowercase(), |number| (number + 0.0).to_string())
}

/// A label that is a number, and not such a long one that others look the same in 64 bits.
fn number(label: &str) -> Option<f64> {
    const EXACT: f64 = 9e15;
    label.parse().ok().filter(|number: &f64| number.abs() < EXACT && label.len() <= 16)
}
