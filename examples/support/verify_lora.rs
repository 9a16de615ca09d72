//! Low-rank adapters of a language model, for the `verify` example.

use std::error::Error;
use std::path::Path;

use hymba::HymbaLm;
use hymba::ndarray::ArrayD;

use crate::EXPECTED;
use crate::compare::{Comparison, Tolerance};
use crate::tensors::{self, Tensors};
use crate::training::{LOGITS, LOSS, TokenRows, by_name, gradients, of_numbers};

/// The folders of a case.
pub const ADAPTER: &str = "adapter";
const BASE: &str = "base";
/// What PEFT puts in front of names.
const PREFIX: &str = "base_model.model.";

/// Checks one folder and prints a line per comparison.
pub fn verify(folder: &Path, tolerance: Option<Tolerance>) -> Result<Vec<Comparison>, Box<dyn Error>> {
    let given = tensors::read(&folder.join(EXPECTED))?;
    let rows = TokenRows::new(&given).map_err(|error| format!("{EXPECTED}: {error}"))?;
    let mut lm = HymbaLm::from_dir(folder.join(BASE))?;
    let mut comparisons = Vec::new();
    let mut add = |comparison: Comparison| {
        println!("  {comparison}");
        comparisons.push(comparison);
    };
    let logits = |lm: &HymbaLm, name: &str| -> Result<Option<ArrayD<f32>>, Box<dyn Error>> {
        let Some(expected) = given.get(name) else { return Ok(None) };
        Ok(Some(rows.logits(lm, expected.shape().get(1).copied().unwrap_or_default())?))
    };
    let compare = |name: &str, logits: &Option<ArrayD<f32>>| {
        let (expected, logits) = (given.get(name)?, logits.as_ref()?);
        Some(Comparison::new(name.into(), logits, expected, |_| false, tolerance.unwrap_or(LOGITS)))
    };
    compare("base_logits", &logits(&lm, "base_logits")?).into_iter().for_each(&mut add);
    let covered = lm.load_lora(folder.join(ADAPTER))?;
    println!(
        "  hymba_lm with low-rank parts of {} maps, {} parameters beside {}",
        covered.maps.len(),
        covered.parameters,
        lm.num_parameters()
    );
    let apart = logits(&lm, "logits")?;
    compare("logits", &apart).into_iter().for_each(&mut add);

    let (loss, cache) = lm.forward_train(&rows.rows, rows.masks.as_deref())?;
    if let Some(expected) = given.get("loss") {
        add(of_numbers("loss", &[loss.mean()], expected, tolerance.unwrap_or(LOSS)));
    }
    let mut gradient = lm.zeros_like();
    lm.backward(&cache, &mut gradient)?;
    let expected: Tensors = given
        .iter()
        .filter_map(|(name, array)| Some((name.strip_prefix("grad.")?.to_string(), array.clone())))
        .collect();
    let named = by_name(&gradient).into_iter().map(|(name, array)| (format!("{PREFIX}{name}"), array)).collect();
    gradients(&named, &expected).into_iter().for_each(&mut add);

    lm.merge_lora();
    if let (Some(apart), Some(merged)) = (apart, logits(&lm, "logits")?) {
        let largest = apart.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        let law = Tolerance { absolute: 1e-5 * f64::from(largest), relative: 0.0 };
        add(Comparison::new("logits, merged and apart".into(), &merged, &apart.mapv(f64::from), |_| false, law));
    }
    Ok(comparisons)
}
