//! Adapters of the language model: several at once, dropout, trainings that go on.
#![cfg(feature = "lm")]

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use hymba::lm::{HymbaLmConfig, LoadOptions, LoraOptions};
use hymba::ndarray::{Array2, Array3, ArrayD, arr1};
use hymba::train::{AdamW, AdamWOptions, LmProgress, LmTrainer, LmTrainerOptions, Parameters, TokenRows};
use hymba::{Error, HymbaLm};

fn config() -> HymbaLmConfig {
    let mut config = HymbaLmConfig::hymba_1_5b();
    (config.hidden_size, config.intermediate_size, config.vocab_size) = (32, 48, 20);
    (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) = (3, 4, 2);
    (config.global_attn_idx, config.kv_reuse_group) = (Some(vec![0]), Some(vec![vec![1, 2]]));
    (config.sliding_window, config.num_memory_tokens, config.mamba_dt_rank) = (Some(9), 3, Some(2));
    config.tie_word_embeddings = false;
    config
}

fn model() -> HymbaLm {
    HymbaLm::random(config(), 3, &LoadOptions::default()).unwrap()
}

fn by_name(lm: &HymbaLm) -> BTreeMap<String, ArrayD<f32>> {
    let mut all = BTreeMap::new();
    Parameters::visit(lm, &mut |name, array| {
        all.insert(name.to_string(), array.to_owned());
    });
    all
}

/// Numbers in place of those that training would find, B among them.
fn fill(lm: &mut HymbaLm, seed: usize) {
    let mut i = seed;
    lm.visit_mut(&mut |_, mut array| {
        array.mapv_inplace(|_| {
            i += 1;
            0.2 * (i as f32 * 1.7).sin()
        });
    });
}

fn ids(seed: usize) -> Array2<u32> {
    Array2::from_shape_fn((1, 25), |(_, t)| ((t * t + seed) % 19) as u32)
}

fn periodic(length: u32) -> TokenRows {
    let stream: Vec<u32> = (0..length).map(|i| (i * i / 3) % 11).collect();
    TokenRows::packed(&stream, 30).unwrap()
}

/// As a server does between batches: each conversation goes on with its own adapter.
#[test]
fn several_adapters_take_turns() {
    let mut lm = model();
    let folder = tempfile::tempdir().unwrap();
    for (i, name) in ["french", "german"].into_iter().enumerate() {
        let maps = [["in_proj", "lm_head"], ["out_proj", "down_proj"]][i];
        lm.add_lora_as(name, &LoraOptions::default().rank(2 + i).maps(maps), 0).unwrap();
        fill(&mut lm, 100 * i);
        lm.save_lora(folder.path().join(name)).unwrap();
    }
    assert_eq!((lm.loras(), lm.lora()), (vec!["french", "german"], Some("german")));
    // what each gives alone
    let alone = |name: Option<&str>| -> (HymbaLm, Array3<f32>) {
        let mut lm = model();
        name.into_iter().for_each(|name| drop(lm.load_lora(folder.path().join(name)).unwrap()));
        let logits = lm.forward(&ids(0)).unwrap();
        (lm, logits)
    };
    let names = [None, Some("french"), Some("german")];
    let mut states = Vec::new();
    for name in names {
        lm.set_lora(name).unwrap();
        assert_eq!(lm.forward(&ids(0)).unwrap(), alone(name).1, "{name:?}");
        let mut state = lm.new_state(1);
        lm.prefill(&ids(1), &mut state).unwrap();
        states.push(state);
    }
    for turn in 0..6 {
        let (active, other) = (turn % 3, (turn + 1) % 3);
        lm.set_lora(names[active]).unwrap();
        let before = states[other].lengths();
        assert!(matches!(lm.step(&arr1(&[turn as u32]), &mut states[other]), Err(Error::State(_))));
        assert_eq!(states[other].lengths(), before);
        lm.step(&arr1(&[turn as u32]), &mut states[active]).unwrap();
    }
    for (name, state) in names.into_iter().zip(&states) {
        assert_eq!(state.lengths(), [27]);
        // in files, too; the same adapter of another model will do
        lm.set_lora(name).unwrap();
        let file = folder.path().join("state");
        lm.save_state(state, &file).unwrap();
        for other in names {
            assert_eq!(alone(other).0.load_state(&file).is_ok(), other == name, "{other:?} {name:?}");
        }
    }
    // a gradient of another adapter, of as many numbers in the same shapes
    let mut pair = model();
    for (name, map) in [("a", "layers.0.mamba.in_proj"), ("b", "layers.1.mamba.in_proj")] {
        pair.add_lora_as(name, &LoraOptions::default().rank(2).maps([map]), 0).unwrap();
    }
    let mut of_b = pair.zeros_like();
    let rows = [ids(0).row(0).to_vec()];
    assert!(pair.accumulate(&rows, None, &mut of_b).is_ok());
    pair.set_lora("a").unwrap();
    assert!(matches!(pair.accumulate(&rows, None, &mut of_b), Err(Error::State(_))));
    assert!(matches!(
        pair.add_lora(&LoraOptions::default().maps([""; 0]), 0),
        Err(Error::Option { option: "maps", .. })
    ));

    lm.set_lora(None).unwrap();
    assert!(by_name(&lm).is_empty());
    assert!(matches!(AdamW::new(&lm, AdamWOptions::default()), Err(Error::State(_))));
    lm.drop_lora("french").unwrap();
    lm.drop_lora("german").unwrap();
    assert!(!lm.has_lora() && lm.to_bytes().is_ok());
}

#[test]
fn dropout_in_training_alone() {
    let rows = [ids(0).row(0).to_vec(), ids(3).row(0).iter().take(12).copied().collect()];
    let mut lm = model();
    let options = LoraOptions::default().rank(3).maps(["*_proj*", "lm_head"]).dropout(0.3);
    lm.add_lora(&options, 1).unwrap();
    fill(&mut lm, 0);
    let loss = |lm: &HymbaLm, seed: Option<u64>| match seed {
        None => lm.forward_train(&rows, None).unwrap().0.sum,
        Some(seed) => lm.forward_train_seeded(&rows, None, seed).unwrap().0.sum,
    };
    let (plain, seeded) = (loss(&lm, None), loss(&lm, Some(7)));
    assert!(loss(&lm, Some(7)) == seeded && loss(&lm, Some(8)) != seeded && seeded != plain);
    // a row loses the same whatever else passes
    let first = lm.forward_train_seeded(&rows[..1], None, 7).unwrap().0;
    let second = lm.forward_train_seeded(&rows, Some(&[vec![false; 25], vec![true; 12]]), 7).unwrap().0;
    assert!((first.sum + second.sum - seeded).abs() < 1e-9 * seeded);

    let mut gradient = lm.zeros_like();
    lm.accumulate_seeded(&rows, None, 7, &mut gradient).unwrap();
    let gradient = by_name(&gradient);
    let want: f64 = gradient.values().flat_map(|array| array.iter()).map(|g| f64::from(g.abs())).sum();
    let step = (0.1 / want) as f32;
    let moved = |sign: f32| {
        let mut values = by_name(&lm);
        values.iter_mut().for_each(|(name, array)| *array += &gradient[name].mapv(|g| sign * step * g.signum()));
        let mut other = model();
        other.add_lora(&options, 1).unwrap();
        other.visit_mut(&mut |name, mut array| array.assign(&values[name]));
        loss(&other, Some(7))
    };
    let got = (moved(1.0) - moved(-1.0)) / f64::from(2.0 * step);
    assert!((got - want).abs() < 0.01 * want, "{got} for {want}");
    // computed once more
    lm.recompute_activations(true);
    let mut again = lm.zeros_like();
    lm.accumulate_seeded(&rows, None, 7, &mut again).unwrap();
    assert!(by_name(&again) == gradient);

    let folder = tempfile::tempdir().unwrap();
    lm.save_lora(folder.path()).unwrap();
    let text = std::fs::read_to_string(folder.path().join("adapter_config.json")).unwrap();
    assert!(text.contains("\"lora_dropout\": 0.3"), "{text}");
    let mut other = model();
    other.load_lora(folder.path()).unwrap();
    assert_eq!(other.lora_options().unwrap(), lm.lora_options().unwrap());
    assert_eq!((loss(&other, Some(7)), loss(&other, None)), (seeded, plain));
    for bad in [1.0, -0.1, f64::NAN] {
        let options = LoraOptions::default().dropout(bad);
        assert!(matches!(other.add_lora(&options, 0), Err(Error::Option { option: "dropout", .. })));
    }
}

/// Interrupted, a training with dropout ends the same, bit for bit; with another adapter it does not go on.
#[test]
fn a_training_goes_on_with_the_same_adapter_alone() {
    let (train, validation) = (periodic(400), periodic(100));
    let adapter = LoraOptions::default().rank(2).alpha(4.0).maps(["in_proj", "lm_head"]).dropout(0.1);
    let with = |options: &LoraOptions| {
        let mut lm = model();
        lm.add_lora(options, 0).unwrap();
        lm
    };
    let options = LmTrainerOptions::default().epochs(3).batch_size(4).pass_size(3).learning_rate(2e-2);
    let go_on = |_: &LmProgress| ControlFlow::Continue(());
    let fit = |lm, options: &LmTrainerOptions| {
        LmTrainer::new(lm, options.clone()).unwrap().fit(&train, Some(&validation), go_on).unwrap()
    };
    let whole = fit(with(&adapter), &options);
    let [first, .., last] = &whole.history[..] else { panic!() };
    assert!(last.validation.unwrap().mean() < first.validation.unwrap().mean());
    let without = fit(with(&adapter.clone().dropout(0.0)), &options);
    assert!(without.history[0] != whole.history[0]);

    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("run");
    let mut epochs = 0;
    let options = options.checkpoint(&folder);
    LmTrainer::new(with(&adapter), options)
        .unwrap()
        .fit(&train, Some(&validation), |progress| {
            epochs += usize::from(progress.finished.is_some());
            if epochs == 1 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap();
    for (option, other) in [
        ("alpha", adapter.clone().alpha(8.0)),
        ("rslora", adapter.clone().rslora(true)),
        ("dropout", adapter.clone().dropout(0.2)),
        ("rank", adapter.clone().rank(3)),
        ("maps", adapter.clone().maps(["in_proj"])),
    ] {
        let error = LmTrainer::resume(with(&other), &folder).unwrap_err();
        assert!(matches!(&error, Error::Option { option: named, .. } if *named == option), "{error}");
    }
    assert!(matches!(LmTrainer::resume(model(), &folder), Err(Error::State(_))));
    let resumed = LmTrainer::resume(with(&adapter), &folder).unwrap().fit(&train, Some(&validation), go_on).unwrap();
    assert_eq!(resumed.history, whole.history);
    assert!(by_name(&resumed.lm) == by_name(&whole.lm));
}
