//! Names and shapes of a file against those of a model.

use std::collections::BTreeSet;

use super::tensors::{Kind, Tensors, quoted};
use crate::{Error, Result};

/// Compares them one by one: a list of all of them would take more memory than a small file.
pub(crate) struct Comparison<'a> {
    tensors: &'a Tensors<'a>,
    found: BTreeSet<&'a String>,
    remarks: Vec<String>,
    problems: BTreeSet<String>,
    /// Problems that are not listed.
    more: usize,
}

impl<'a> Comparison<'a> {
    /// Problems that are listed, at most: thousands take memory, and nobody reads them.
    const LISTED: usize = 1000;

    /// With differences that have been found already.
    pub(crate) fn new(tensors: &'a Tensors<'a>, remarks: Vec<String>) -> Self {
        Comparison { tensors, found: BTreeSet::new(), remarks, problems: BTreeSet::new(), more: 0 }
    }

    /// Expects a tensor of floats with this name and shape.
    pub(crate) fn expect(&mut self, name: &str, shape: &[usize]) {
        self.expect_kind(name, shape, Kind::Float);
    }

    /// Expects a tensor of this name, shape and kind of numbers.
    pub(crate) fn expect_kind(&mut self, name: &str, shape: &[usize], kind: Kind) {
        let Some((name, found)) = self.tensors.entry(name) else {
            return self.problem(|| format!("{}: missing, expected shape {shape:?}", quoted(name)));
        };
        self.found.insert(name);
        if found.shape != shape {
            self.problem(|| format!("{}: has shape {:?}, expected {shape:?}", quoted(name), found.shape));
        } else if !kind.has(found.dtype) {
            let expected = kind.names();
            self.problem(|| format!("{}: has type {}, expected {expected}", quoted(name), found.dtype));
        }
    }

    /// Expects no other tensors, and returns all differences as one error.
    pub(crate) fn finish(mut self) -> Result<()> {
        let tensors = self.tensors;
        if self.found.len() < tensors.names().len() {
            for (name, tensor) in tensors.iter() {
                if !self.found.contains(name) {
                    self.problem(|| format!("{}: unexpected, has shape {:?}", quoted(name), tensor.shape));
                }
            }
        }
        let Comparison { remarks: mut problems, problems: found, more, .. } = self;
        problems.extend(found);
        if more > 0 {
            problems.push(format!("and {more} more"));
        }
        if problems.is_empty() { Ok(()) } else { Err(Error::Tensors { path: tensors.path().to_path_buf(), problems }) }
    }

    fn problem(&mut self, problem: impl FnOnce() -> String) {
        if self.problems.len() < Self::LISTED {
            self.problems.insert(problem());
        } else {
            self.more += 1;
        }
    }
}
