//! The names of classes: as a header lists them, and as the lines of a file spell them.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{Case, Target, short};
use crate::Task;

/// The classes of one file.
#[derive(Default)]
pub(super) struct Labels {
    names: Vec<String>,
    /// Where each is among them.
    places: Places,
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
        Labels { listed: !names.is_empty(), places: Places::new(&names), names, spellings: BTreeMap::new() }
    }

    /// The class that a line names.
    pub fn class(&mut self, label: &str) -> Result<usize, String> {
        if let Some(class) = self.places.find(label) {
            if self.names[class] != label {
                self.spellings.entry(label.to_string()).or_insert(class);
            }
            return Ok(class);
        }
        match (self.listed, label.is_empty()) {
            (false, true) => Err("there is no class after the last `:`".into()),
            (false, false) if self.names.len() == Task::MAX_LABELS => Err(format!(
                "`{}` is one class too many, at most {} are allowed; are they numbers to predict?",
                short(label),
                Task::MAX_LABELS
            )),
            (false, false) => {
                self.places.add(label, self.names.len());
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
    fn sort(&mut self) -> Vec<usize> {
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

    /// The names, in the order that the classes of `cases` then have, and notes on them.
    pub fn finish(mut self, cases: &mut [Case]) -> (Vec<String>, Vec<String>) {
        let places = self.sort();
        for case in cases {
            if let Target::Class(class) = &mut case.target {
                *class = places[*class];
            }
        }
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

/// Where labels are among the names of classes.
#[derive(Default)]
pub(super) struct Places {
    exact: HashMap<String, usize>,
    /// By [`key`]; `None` where several names have the same.
    similar: HashMap<String, Option<usize>>,
}

impl Places {
    pub fn new(names: &[String]) -> Self {
        let mut places = Places::default();
        names.iter().enumerate().for_each(|(class, name)| places.add(name, class));
        places
    }

    fn add(&mut self, name: &str, class: usize) {
        self.exact.entry(name.to_string()).or_insert(class);
        self.similar.entry(key(name)).and_modify(|class| *class = None).or_insert(Some(class));
    }

    /// The place of a label: of its own spelling, or else of the only name that differs from it in nothing but case, which sktime and
    /// aeon ignore, too, or in how a number is written (`1` and `1.0`). Case is that of ASCII: other letters may be of an encoding
    /// that was guessed.
    pub fn find(&self, label: &str) -> Option<usize> {
        self.exact.get(label).copied().or_else(|| self.similar.get(&key(label)).copied().flatten())
    }
}

/// The note on a class that is spelled in another way.
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
