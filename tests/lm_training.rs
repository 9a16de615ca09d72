//! Training of the language model: gradients and steps against PyTorch in float64 (`tests/data/hymba_lm_train`), and the laws that
//! hold for any model.
#![cfg(feature = "lm")]

mod common;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use common::{data, tensors};
use hymba::lm::{HymbaLmConfig, LmLoss, LoadOptions, LoraOptions, Quantization, TorchDtype};
use hymba::ndarray::{Array2, ArrayD};
use hymba::train::{AdamW, AdamWOptions, LmProgress, LmTrainer, LmTrainerOptions, Parameters, Stopped, TokenRows};
use hymba::{Error, HymbaLm};

/// Token rows, and which tokens of each are predicted.
type IdsAndMasks = (Vec<Vec<u32>>, Option<Vec<Vec<bool>>>);

fn folder(case: &str) -> PathBuf {
    data("hymba_lm_train").join(case)
}

fn trainable(folder: &Path) -> HymbaLm {
    HymbaLm::from_dir_with(folder, &LoadOptions::default().trainable(true), |_| {}).unwrap()
}

fn token_rows(given: &BTreeMap<String, ArrayD<f64>>) -> IdsAndMasks {
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
    for (step, want) in expected["losses"].iter().take(3).enumerate() {
        let loss = lm.accumulate(&rows, masks.as_deref(), &mut gradient).unwrap();
        assert!((loss.mean() - want).abs() < 1e-5, "step {step}: {}", loss.mean());
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

#[test]
fn activations_that_are_computed_again_are_the_same() {
    let (folder, rows) = small();
    let mut lm = trainable(folder.path());
    let (mut kept, mut again) = (lm.zeros_like(), lm.zeros_like());
    let loss = lm.accumulate(&rows, None, &mut kept).unwrap();
    lm.recompute_activations(true);
    assert_eq!(lm.accumulate(&rows, None, &mut again).unwrap(), loss);
    assert!(by_name(&again) == by_name(&kept));
    // the backward pass goes by what the forward pass kept
    for recompute in [true, false] {
        lm.recompute_activations(recompute);
        let (_, cache) = lm.forward_train(&rows, None).unwrap();
        lm.recompute_activations(!recompute);
        let mut switched = lm.zeros_like();
        lm.backward_sum(&cache, &mut switched).unwrap();
        assert!(by_name(&switched) == by_name(&kept), "{recompute}");
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

/// A model that has everything and learns quickly.
fn tiny() -> HymbaLm {
    let mut config = HymbaLmConfig::hymba_1_5b();
    (config.hidden_size, config.intermediate_size, config.vocab_size) = (32, 48, 20);
    (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) = (3, 4, 2);
    (config.global_attn_idx, config.kv_reuse_group) = (Some(vec![0]), Some(vec![vec![1, 2]]));
    (config.sliding_window, config.num_memory_tokens, config.mamba_dt_rank) = (Some(9), 3, Some(2));
    HymbaLm::build(config, 3).unwrap()
}

fn periodic(length: u32) -> TokenRows {
    let stream: Vec<u32> = (0..length).map(|i| (i * i / 3) % 11).collect();
    TokenRows::packed(&stream, 30).unwrap().bytes(length as usize - 1)
}

#[test]
fn build_draws_the_same_from_the_same_seed() {
    let (one, two) = (by_name(&tiny()), by_name(&tiny()));
    assert!(one == two);
    assert!(one["model.embed_tokens.weight"].iter().any(|x| *x != 0.0));
    assert!(one["model.layers.0.input_layernorm.weight"].iter().all(|x| *x == 1.0));
}

/// A step in several passes is a step; a training that is killed and goes on is the one that was not.
#[test]
fn a_training_goes_on_where_it_was_killed() {
    let (train, validation) = (periodic(400), periodic(100));
    let options = LmTrainerOptions::default().epochs(4).batch_size(4).pass_size(3).learning_rate(5e-3);
    let go_on = |_: &LmProgress| ControlFlow::Continue(());
    let whole = LmTrainer::new(tiny(), options.clone()).unwrap().fit(&train, Some(&validation), go_on).unwrap();
    assert_eq!((whole.history.len(), whole.stopped), (4, Stopped::Finished));
    let of = |epoch: usize| whole.history[epoch].validation.unwrap();
    assert!(of(3).mean() < 0.8 * of(0).mean(), "{} {}", of(0).mean(), of(3).mean());
    let bits = of(3).sum / 99.0 / std::f64::consts::LN_2;
    assert!((whole.history[3].bits_per_byte.unwrap() - bits).abs() < 1e-12);

    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("run");
    let options = options.checkpoint(&folder);
    let mut epochs = 0;
    let stopped = LmTrainer::new(tiny(), options.clone()).unwrap().fit(&train, Some(&validation), |progress| {
        epochs += usize::from(progress.finished.is_some());
        if epochs == 2 && progress.finished.is_none() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert_eq!(stopped.unwrap().stopped, Stopped::Callback);
    let again = LmTrainer::new(tiny(), options).unwrap().fit(&train, Some(&validation), go_on);
    assert!(matches!(again, Err(Error::Checkpoint { .. })));
    let other = LmTrainer::resume(tiny(), &folder).unwrap().fit(&validation, None, go_on);
    assert!(matches!(other, Err(Error::Data(_))));
    let resumed = LmTrainer::resume(tiny(), &folder).unwrap().fit(&train, Some(&validation), go_on).unwrap();
    assert_eq!(resumed.history, whole.history);
    assert!(by_name(&resumed.lm) == by_name(&whole.lm));
}

#[test]
fn bad_rows_and_options() {
    assert!(matches!(TokenRows::packed(&[1], 10), Err(Error::Data(_))));
    assert!(matches!(TokenRows::new(vec![vec![1], vec![2]], None), Err(Error::Data(_))));
    assert!(matches!(TokenRows::new(vec![vec![1, 2], vec![]], None), Err(Error::Data(_))));
    assert!(matches!(TokenRows::new(vec![vec![1, 2]], Some(vec![vec![true]])), Err(Error::Data(_))));
    let options = [
        LmTrainerOptions::default().epochs(0),
        LmTrainerOptions::default().epochs(100_001),
        LmTrainerOptions::default().batch_size(0),
        LmTrainerOptions::default().warm_up(1.0),
        LmTrainerOptions::default().learning_rate(f32::NAN),
        LmTrainerOptions::default().floor(2.0),
    ];
    assert!(options.iter().all(|options| matches!(options.validate(), Err(Error::Option { .. }))));
    // before the first step, whichever rows they are in
    let (good, bad) = (periodic(100), TokenRows::packed(&[1, 2, 3, 500], 4).unwrap());
    let long = TokenRows::packed(&[1; 8193], 8193).unwrap();
    for (train, validation) in [(&bad, None), (&good, Some(&bad)), (&long, None), (&good, Some(&long))] {
        let folder = tempfile::tempdir().unwrap();
        let options = LmTrainerOptions::default().checkpoint(folder.path());
        let trainer = LmTrainer::new(tiny(), options).unwrap();
        let fitted = trainer.fit(train, validation, |_| panic!("a step was taken"));
        assert!(matches!(fitted, Err(Error::Tokens(_))));
        assert!(!folder.path().join("training.json").exists());
    }
}

/// A training that leads out of the numbers ends, and its checkpoint is that of the epoch before.
#[test]
fn what_is_not_finite_is_not_kept() {
    let rows = periodic(100);
    let folder = tempfile::tempdir().unwrap();
    // one step an epoch: what it led to is seen at its end only
    let options = LmTrainerOptions::default().epochs(2).batch_size(100).warm_up(0.0);
    let options = options.learning_rate(1e38).weight_decay(10.0);
    for validation in [None, Some(&rows)] {
        let folder = folder.path().join(if validation.is_some() { "validated" } else { "alone" });
        let trainer = LmTrainer::new(tiny(), options.clone().checkpoint(&folder)).unwrap();
        let fitted = trainer.fit(&rows, validation, |progress| {
            assert!(progress.finished.is_none());
            ControlFlow::Continue(())
        });
        assert!(matches!(fitted, Err(Error::NotFinite { .. })), "{fitted:?}");
        let text = std::fs::read_to_string(folder.join("training.json")).unwrap();
        assert!(text.contains("\"history\":[]"), "{text}");
    }
}

#[test]
fn low_rank_parts_equal_those_of_another_program() {
    let folder = data("lora").join("r8_rslora");
    let expected = tensors(&folder.join("expected.safetensors"));
    let (rows, masks) = token_rows(&expected);
    let mut lm = HymbaLm::from_dir(folder.join("base")).unwrap();
    let covered = lm.load_lora(folder.join("adapter")).unwrap();
    assert_eq!((covered.maps.len(), covered.parameters), (25, 15800));
    let (loss, cache) = lm.forward_train(&rows, masks.as_deref()).unwrap();
    assert!((loss.mean() - expected["loss"].first().unwrap()).abs() < 1e-5, "{}", loss.mean());
    for (i, row) in rows.iter().enumerate() {
        let logits = lm.forward(&Array2::from_shape_fn((1, row.len()), |(_, t)| row[t])).unwrap();
        let want = expected["logits"].slice(hymba::ndarray::s![i..=i, ..row.len(), ..]).to_owned();
        assert!(common::difference(&logits, &want.into_dyn()) < 3e-4);
    }
    let mut gradient = lm.zeros_like();
    lm.backward(&cache, &mut gradient).unwrap();
    let want: BTreeMap<&str, &ArrayD<f64>> =
        expected.iter().filter_map(|(name, want)| Some((name.strip_prefix("grad.base_model.model.")?, want))).collect();
    let got = by_name(&gradient);
    assert!(got.len() == want.len() && want.len() == 50);
    let largest = |array: &ArrayD<f64>| array.iter().fold(0f64, |m, x| m.max(x.abs()));
    let of_all = want.values().map(|want| largest(want)).fold(0.0, f64::max);
    for (name, want) in want {
        let (difference, bound) = (common::difference(&got[name], want), 3e-4 * largest(want).max(1e-3 * of_all));
        assert!(difference <= bound, "{name}: {difference:e} over {bound:e}");
    }
}

/// Low-rank parts alone are trained; merged, apart, saved and read again they give the same, and removed, what was before.
#[test]
fn low_rank_parts() {
    let (folder, rows) = small();
    let rows = &rows[..3];
    let mut lm = HymbaLm::from_dir(folder.path()).unwrap();
    let ids = Array2::from_shape_fn((2, 30), |(i, j)| ((i * 31 + j * 7) % 300) as u32);
    let before = lm.forward(&ids).unwrap();
    let options = LoraOptions::default().rank(3).alpha(6.0).maps(["in_proj", "*.x_proj.0", "down_proj", "lm_head"]);
    let covered = lm.add_lora(&options, 1).unwrap();
    assert_eq!(covered.maps.len(), 3 * 5 + 1);
    assert!(lm.forward(&ids).unwrap() == before, "B is zero");
    assert_eq!(covered.parameters, Parameters::zeros_like(&lm).count());

    let mut optimizer = AdamW::new(&lm, AdamWOptions::default().learning_rate(1e-2)).unwrap();
    let (mut gradient, mut losses) = (lm.zeros_like(), Vec::new());
    for _ in 0..5 {
        let loss = lm.accumulate(rows, None, &mut gradient).unwrap();
        optimizer.step_accumulated(&mut lm, &mut gradient, loss.tokens as f64).unwrap();
        losses.push(loss.mean());
    }
    assert!(losses[4] < losses[0], "{losses:?}");
    let apart = lm.forward(&ids).unwrap();
    let difference = |a: &hymba::ndarray::Array3<f32>, b: &hymba::ndarray::Array3<f32>| {
        a.iter().zip(b).fold(0f32, |m, (a, b)| m.max((a - b).abs()))
    };
    assert!(difference(&apart, &before) > 1e-2);

    let saved = tempfile::tempdir().unwrap();
    lm.save_lora(saved.path()).unwrap();
    // a folder or bytes would be without them
    assert!(matches!(lm.save_dir(saved.path().join("all")), Err(Error::State(_))));
    assert!(matches!(lm.to_bytes(), Err(Error::State(_))));
    assert!(!saved.path().join("all").exists());
    let mut other = trainable(folder.path());
    assert_eq!(other.load_lora(saved.path()).unwrap().parameters, covered.parameters);
    assert!(other.forward(&ids).unwrap() == apart);
    other.merge_lora();
    let largest = apart.iter().fold(0f32, |m, x| m.max(x.abs()));
    assert!(difference(&other.forward(&ids).unwrap(), &apart) <= 1e-5 * largest);
    other.to_bytes().unwrap();
    lm.remove_lora();
    assert!(lm.forward(&ids).unwrap() == before);
    assert!(matches!(lm.save_lora(saved.path()), Err(Error::State(_))));
}

/// What could be trained before can be trained without the parts again, whether they are removed or merged.
#[test]
fn matrices_are_frozen_beside_low_rank_parts() {
    let (folder, _) = small();
    let options = LoraOptions::default().rank(2);
    for merge in [false, true] {
        let mut lm = trainable(folder.path());
        let before = by_name(&lm);
        for seed in 0..2 {
            lm.add_lora(&options, seed).unwrap();
            assert!(by_name(&lm).keys().all(|name| name.contains("lora_")));
        }
        // B is zero
        if merge {
            lm.merge_lora()
        } else {
            lm.remove_lora()
        }
        assert!(by_name(&lm) == before);
        // of a model for inference they stay what they are
        let mut stored = HymbaLm::from_dir(folder.path()).unwrap();
        let before = by_name(&stored);
        stored.add_lora(&options, 0).unwrap();
        if merge {
            stored.merge_lora()
        } else {
            stored.remove_lora()
        }
        assert!(by_name(&stored) == before);
    }
}

#[test]
fn bad_adapters() {
    let (folder, _) = small();
    let mut lm = HymbaLm::from_dir(folder.path()).unwrap();
    for options in [
        LoraOptions::default().rank(0),
        LoraOptions::default().rank(5000),
        LoraOptions::default().alpha(f64::NAN),
        LoraOptions::default().maps(["in_proj", "q_proj"]),
    ] {
        assert!(matches!(lm.add_lora(&options, 0), Err(Error::Option { .. })), "{options:?}");
        assert!(!lm.has_lora());
    }
    lm.add_lora(&LoraOptions::default().rank(2).maps(["out_proj"]), 0).unwrap();
    let saved = tempfile::tempdir().unwrap();
    lm.save_lora(saved.path()).unwrap();
    lm.remove_lora();
    let config = saved.path().join("adapter_config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    for (from, to) in [
        ("\"use_dora\": false", "\"use_dora\": true"),
        ("\"LORA\"", "\"IA3\""),
        ("\"r\": 2", "\"r\": 3"),
        ("\"r\": 2", "\"r\": 0"),
        ("\"r\": 2", "\"r\": -1"),
        ("\"bias\": \"none\"", "\"bias\": \"all\""),
        ("\"rank_pattern\": {}", "\"rank_pattern\": {\"out_proj\": 4}"),
        ("\"bias\"", "\"init_lora_weights\": \"pissa_niter_4\", \"bias\""),
        ("{", ""),
    ] {
        assert!(text.contains(from), "{from}");
        std::fs::write(&config, text.replacen(from, to, 1)).unwrap();
        assert!(matches!(lm.load_lora(saved.path()), Err(Error::Format { .. })), "{to}");
        assert!(!lm.has_lora());
    }
    for usual in ["null", "true", "false", "\"gaussian\""] {
        let to = format!("\"init_lora_weights\": {usual}, \"bias\"");
        std::fs::write(&config, text.replacen("\"bias\"", &to, 1)).unwrap();
        lm.load_lora(saved.path()).unwrap();
        lm.remove_lora();
    }
    std::fs::write(&config, &text).unwrap();
    // of a smaller model
    assert!(tiny().load_lora(saved.path()).is_err());
    std::fs::write(saved.path().join("adapter_model.safetensors"), [0; 100]).unwrap();
    assert!(matches!(lm.load_lora(saved.path()), Err(Error::Format { .. })));
}

/// Numbers that are trained.
trait Count {
    fn count(&self) -> usize;
}

impl<P: Parameters> Count for P {
    fn count(&self) -> usize {
        let mut count = 0;
        self.visit(&mut |_, array| count += array.len());
        count
    }
}
