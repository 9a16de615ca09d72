//! The language model against the published code: `tests/data/hymba_lm`.
#![cfg(feature = "lm")]

mod common;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;

use common::{data, difference, tensors};
use hymba::ndarray::{Array1, Array2, ArrayD, Axis, s};
use hymba::{GenerateOptions, HymbaLm};

const LOGITS: f64 = 3e-4;
const STATES: f64 = 1e-4;

type Expected = BTreeMap<String, ArrayD<f64>>;

fn folders() -> Vec<PathBuf> {
    let mut folders: Vec<_> = std::fs::read_dir(data("hymba_lm"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("config.json").exists())
        .collect();
    folders.sort();
    assert!(folders.len() >= 6);
    folders
}

fn case(folder: &std::path::Path) -> (HymbaLm, Expected) {
    (HymbaLm::from_dir(folder).unwrap(), tensors(&folder.join("expected.safetensors")))
}

fn ids(expected: &Expected, name: &str) -> Array2<u32> {
    expected[name].mapv(|id| id as u32).into_dimensionality().unwrap()
}

#[test]
fn logits_equal_the_published_ones() {
    for folder in folders() {
        let (lm, expected) = case(&folder);
        let logits = lm.forward(&ids(&expected, "input_ids")).unwrap();
        let off = difference(&logits, &expected["logits"]);
        println!("{}: {off:e}", folder.display());
        assert!(off < LOGITS, "{}: {off}", folder.display());
    }
}

#[test]
fn steps_equal_a_pass_without_a_cache() {
    for folder in folders() {
        let (lm, expected) = case(&folder);
        let (prompt, chosen) = (ids(&expected, "input_ids"), ids(&expected, "greedy_ids"));
        let want = &expected["uncached_step_logits"];
        let mut state = lm.new_state(prompt.nrows());
        let mut logits = lm.prefill(&prompt, &mut state).unwrap();
        for (step, ids) in chosen.columns().into_iter().enumerate() {
            let want = want.index_axis(Axis(1), step).to_owned();
            let off = difference(&logits, &want);
            assert!(off < LOGITS, "{} step {step}: {off}", folder.display());
            logits = lm.step(&ids.to_owned(), &mut state).unwrap();
        }
    }
}
