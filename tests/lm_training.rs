//! Training of the language model: gradients and steps against PyTorch in float64 (`tests/data/hymba_lm_train`), and the laws that
//! hold for any model.
#![cfg(feature = "lm")]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::{data, tensors};
use hymba::lm::{HymbaLmConfig, LmLoss, LoadOptions, Quantization, TorchDtype};
use hymba::ndarray::{Array2, ArrayD};
use hymba::train::{AdamW, AdamWOptions, Parameters};
use hymba::{Error, HymbaLm};

/// Token rows, and which tokens of each are predicted.
type TokenRows = (Vec<Vec<u32>>, Option<Vec<Vec<bool>>>);

fn folder(case: &str) -> PathBuf {
    data("hymba_lm_train").join(case)
}

fn trainable(folder: &Path) -> HymbaLm {
    HymbaLm::from_dir_with(folder, &LoadOptions::default().trainable(true), |_| {}).unwrap()
}

fn token_rows(given: &BTreeMap<String, ArrayD<f64>>) -> TokenRows {
    let lengths: Vec<usize> = given["lengths"].iter().map(|length| *length as usize).collect();
    let rows = |name: &str| {
        let array: Array2<f64> = given.get(name)?.clone().into_dimensionality().unwrap();
        Some(array.rows().into_iter().zip(&lengths).map(|(row, length)| row.to_vec()[..*length].to_vec()).collect())
    };
    let ids: Vec<Vec<f64>> = rows("ids").unwrap();
    let masks: Option<Vec<Vec<f64>>> = rows("loss_mask");
    let ids = ids.into_iter().map(|row| row.into_iter().map(|id| id as u32).collect()).collect();
    (ids, masks.map(|masks| masks.into_iter().map(|row| row.into_iter().map(|mark| mark == 1.0).collect()).collect()))
}

fn by_name(model: &HymbaLm) -> BTreeMap<String, ArrayD<f32>> {
    let mut all = BTreeMap::new();
    Parameters::visit(model, &mut |name, array| {
        all.insert(name.to_string(), array.to_owned());
    });
    all
}

/// A model with everything that the released one has, norms of each head, and a head of its own; large enough that all that may be
/// shared among threads is.
fn small() -> (tempfile::TempDir, Vec<Vec<u32>>) {
    let mut config = HymbaLmConfig::hymba_1_5b();
    (config.hidden_size, config.intermediate_size, config.vocab_size) = (96, 160, 300);
    (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) = (5, 6, 2);
    (config.global_attn_idx, config.kv_reuse_group) = (Some(vec![0, 4]), Some(vec![vec![1, 2, 3]]));
    (config.sliding_window, config.num_memory_tokens, config.mamba_dt_rank) = (Some(9), 5, Some(4));
    config.kq_norm = hymba::lm::KeyQueryNorm::PerHeadRms;
    config.tie_word_embeddings = false;
    config.torch_dtype = Some(TorchDtype::F32);
    let folder = tempfile::tempdir().unwrap();
    HymbaLm::random(config, 1, &LoadOptions::default()).unwrap().save_dir(folder.path()).unwrap();
    let rows = [200, 1, 37, 64];
    let rows = rows.into_iter().enumerate();
    (
        folder,
        rows.map(|(row, length)| (0..length).map(|i| ((i * i * 31 + i * 17 + row * 7) % 300) as u32).collect())
            .collect(),
    )
}

#[test]
fn losses_and_gradients_equal_those_of_another_program() {
    for case in ["t1_perhead_untied", "t2_relu2_window", "t3_adamw"] {
        let folder = folder(case);
        let given = tensors(&folder.join("train.safetensors"));
        let (rows, masks) = token_rows(&given);
        let lm = trainable(&folder);
        let (loss, cache) = lm.forward_train(&rows, masks.as_deref()).unwrap();
        assert!((loss.mean() - given["loss"].first().unwrap()).abs() < 1e-5, "{case}: {}", loss.mean());
        let mut gradient = lm.zeros_like();
        lm.backward(&cache, &mut gradient).unwrap();
        let (got, want) = (by_name(&gradient), tensors(&folder.join("grads.safetensors")));
        assert!(got.keys().eq(want.keys()), "{case}");
        let largest = |array: &ArrayD<f64>| array.iter().fold(0f64, |m, x| m.max(x.abs()));
        let of_all = want.values().map(largest).fold(0.0, f64::max);
        for (name, want) in &want {
            let got = got[name].to_shape(want.shape()).unwrap().to_owned();
            let (difference, bound) = (common::difference(&got, want), 3e-4 * largest(want).max(1e-3 * of_all));
            assert!(difference <= bound, "{case} {name}: {difference:e} over {bound:e}");
        }
    }
}

#[test]
fn three_steps_equal_those_of_another_program() {
    let folder = folder("t3_adamw");
    let (rows, masks) = token_rows(&tensors(&folder.join("train.safetensors")));
    let expected = tensors(&folder.join("adamw.safetensors"));
    let mut lm = trainable(&folder);
    let options = AdamWOptions::default().learning_rate(1e-3).betas(0.9, 0.95).weight_decay(0.1);
    let mut optimizer = AdamW::new(&lm, options).unwrap();
    let mut gradient = lm.zeros_like();
    for step in 0..3 {
        let loss = lm.accumulate(&rows, masks.as_deref(), &mut gradient).unwrap();
        assert!((loss.mean() - expected["losses"][step]).abs() < 1e-5, "step {step}: {}", loss.mean());
        optimizer.step_accumulated(&mut lm, &mut gradient, loss.tokens as f64).unwrap();
    }
    for (name, weight) in by_name(&lm) {
        let want = &expected[&format!("final.{name}")];
        let sum: f64 = weight.iter().zip(want).map(|(got, want)| (f64::from(*got) - want).abs()).sum();
        assert!(sum / want.len() as f64 <= 1e-5, "{name}: {:e}", sum / want.len() as f64);
    }
}

/// The names of language models say what decays, too.
#[test]
fn what_decays() {
    let options = AdamWOptions::default().weight_decay(0.1);
    for (name, shape, decays) in [
        ("model.embed_tokens.weight", &[8, 4][..], true),
        ("lm_head.weight", &[8, 4], true),
        ("model.memory_tokens", &[2, 4], false),
        ("model.layers.0.mamba.A_log.0", &[8, 2], false),
        ("model.layers.0.mamba.D.0", &[8], false),
        ("model.layers.0.mamba.conv1d.weight", &[8, 4], true),
        ("model.layers.0.mamba.x_proj.0.weight", &[8, 8], true),
        ("model.layers.0.mamba.dt_proj.0.bias", &[8], false),
        ("model.layers.0.mamba.self_attn.q_norm.weight", &[2, 4], false),
    ] {
        assert_eq!(options.decay_of(name, shape) > 0.0, decays, "{name}");
    }
}

#[test]
fn the_loss_is_that_of_the_logits() {
    let (folder, rows) = small();
    let lm = trainable(folder.path());
    let (loss, _) = lm.forward_train(&rows, None).unwrap();
    let mut want = LmLoss::default();
    for row in &rows {
        let ids = Array2::from_shape_fn((1, row.len()), |(_, i)| row[i]);
        let logits = lm.forward(&ids).unwrap();
        for t in 1..row.len() {
            let logits = logits.slice(hymba::ndarray::s![0, t - 1, ..]);
            let sum: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
            want += LmLoss::new(sum.ln() - f64::from(logits[row[t] as usize]), 1);
        }
    }
    assert_eq!(loss.tokens, want.tokens);
    assert!((loss.mean() - want.mean()).abs() < 1e-5);
}

/// A row's gradient does not depend on its company, and what is marked out, or stands behind the last mark, predicts nothing.
#[test]
fn rows_add_up_and_masks_leave_out() {
    let (folder, rows) = small();
    let lm = trainable(folder.path());
    let (mut together, mut alone, mut masked) = (lm.zeros_like(), lm.zeros_like(), lm.zeros_like());
    let of_all = lm.accumulate(&rows, None, &mut together).unwrap();
    let mut sum = LmLoss::default();
    for row in &rows {
        sum += lm.accumulate(&[row], None, &mut alone).unwrap();
    }
    assert_eq!(sum.tokens, of_all.tokens);
    assert!((sum.mean() - of_all.mean()).abs() < 1e-6);
    let (together, alone) = (by_name(&together), by_name(&alone));
    let largest = together.values().flatten().fold(0f32, |m, x| m.max(x.abs()));
    for (name, together) in &together {
        let difference = together.iter().zip(&alone[name]).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(difference <= 1e-4 * largest, "{name}: {difference:e} of {largest:e}");
    }
    // rows cut at 30, the rest left out
    let masks: Vec<Vec<bool>> = rows.iter().map(|row| (0..row.len()).map(|t| t < 30).collect()).collect();
    let cut: Vec<Vec<u32>> = rows.iter().map(|row| row[..row.len().min(30)].to_vec()).collect();
    let mut shorter = lm.zeros_like();
    let losses = [lm.accumulate(&rows, Some(&masks), &mut masked), lm.accumulate(&cut, None, &mut shorter)];
    let [masked_loss, cut_loss] = losses.map(Result::unwrap);
    assert_eq!(masked_loss, cut_loss);
    assert_eq!(by_name(&masked), by_name(&shorter));
}

#[test]
fn one_call_gives_what_two_give() {
    let (folder, rows) = small();
    let lm = trainable(folder.path());
    let (mut one, mut two) = (lm.zeros_like(), lm.zeros_like());
    let at_once = lm.accumulate(&rows, None, &mut one).unwrap();
    let (loss, cache) = lm.forward_train(&rows, None).unwrap();
    lm.backward_sum(&cache, &mut two).unwrap();
    assert_eq!(at_once, loss);
    assert_eq!(by_name(&one), by_name(&two));
    // adds
    lm.backward_sum(&cache, &mut two).unwrap();
    for (name, one) in by_name(&one) {
        let doubled = by_name(&two)[&name].clone();
        let largest = one.iter().fold(0f32, |m, x| m.max(x.abs()));
        assert!(one.iter().zip(&doubled).all(|(one, two)| (2.0 * one - two).abs() <= 1e-5 * largest), "{name}");
    }
}

#[cfg(feature = "rayon")]
#[test]
fn any_number_of_threads() {
    let (folder, rows) = small();
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut lm = trainable(folder.path());
            let mut gradient = lm.zeros_like();
            let mut optimizer = AdamW::new(&lm, AdamWOptions::default()).unwrap();
            let mut losses = Vec::new();
            for _ in 0..2 {
                losses.push(lm.accumulate(&rows, None, &mut gradient).unwrap());
                optimizer.step(&mut lm, &mut gradient).unwrap();
            }
            (losses, by_name(&lm))
        })
    };
    let one = run(1);
    for threads in [2, 4] {
        assert!(run(threads) == one, "{threads} threads");
    }
}

/// Matrices that are stored for products only have no gradient; all others have theirs.
#[test]
fn narrow_weights_cost_no_gradient() {
    let (folder, rows) = small();
    let stored = HymbaLm::from_dir(folder.path()).unwrap();
    let all = trainable(folder.path());
    let (mut few, mut many) = (stored.zeros_like(), all.zeros_like());
    let losses = [stored.accumulate(&rows, None, &mut few), all.accumulate(&rows, None, &mut many)].map(Result::unwrap);
    assert!((losses[0].mean() - losses[1].mean()).abs() < 1e-6);
    let (few, many) = (by_name(&few), by_name(&many));
    assert!(few.keys().all(|name| !name.contains("proj.weight") && !name.contains("embed")));
    for (name, few) in &few {
        let largest = many[name].iter().fold(0f32, |m, x| m.max(x.abs()));
        assert!(few.iter().zip(&many[name]).all(|(a, b)| (a - b).abs() <= 1e-4 * largest), "{name}");
    }
    let options = LoadOptions::default().quantize(Quantization::Bits8);
    let narrow = HymbaLm::from_dir_with(folder.path(), &options, |_| {}).unwrap();
    let mut gradient = narrow.zeros_like();
    assert!(narrow.accumulate(&rows, None, &mut gradient).unwrap().mean().is_finite());
    assert!(by_name(&gradient)["model.memory_tokens"].iter().any(|x| *x != 0.0));
}

#[test]
fn bad_input() {
    let (folder, rows) = small();
    let mut lm = trainable(folder.path());
    let tokens = |error: Error| matches!(error, Error::Tokens(_));
    assert!(tokens(lm.forward_train(&[] as &[Vec<u32>], None).unwrap_err()));
    assert!(tokens(lm.forward_train(&[vec![1, 2], vec![]], None).unwrap_err()));
    assert!(tokens(lm.forward_train(&[vec![1, 300]], None).unwrap_err()));
    assert!(tokens(lm.forward_train(&[vec![1; 8193]], None).unwrap_err()));
    assert!(tokens(lm.forward_train(&[vec![1, 2]], Some(&[])).unwrap_err()));
    assert!(tokens(lm.forward_train(&[vec![1, 2]], Some(&[vec![true]])).unwrap_err()));
    let nothing = [vec![true, false], vec![false]];
    let (loss, cache) = lm.forward_train(&[vec![1, 2], vec![3]], Some(&nothing)).unwrap();
    assert_eq!((loss.tokens, loss.mean()), (0, 0.0));
    let mut gradient = lm.zeros_like();
    lm.backward(&cache, &mut gradient).unwrap();
    assert!(by_name(&gradient).values().flatten().all(|x| *x == 0.0));

    let (_, cache) = lm.forward_train(&rows, None).unwrap();
    let other = HymbaLm::from_dir(folder.path()).unwrap();
    assert!(matches!(lm.backward(&cache, &mut other.zeros_like()), Err(Error::State(_))));
    assert!(matches!(other.backward(&cache, &mut other.zeros_like()), Err(Error::State(_))));
    lm.visit_mut(&mut |_, mut array| array.fill(0.5));
    assert!(matches!(lm.backward(&cache, &mut gradient), Err(Error::State(_))), "the weights have changed");

    let options = LoadOptions::default().quantize(Quantization::Bits4).trainable(true);
    let refused = HymbaLm::from_dir_with(folder.path(), &options, |_| {});
    assert!(matches!(refused, Err(Error::Option { option: "trainable", .. })));
}
