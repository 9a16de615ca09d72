//! Low-rank adapters of the encoder: merged and apart, gradients, streams, training, files, several at once.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use hymba::ndarray::{Array2, Array3, ArrayD, Axis};
use hymba::train::{AdamW, AdamWOptions, Dataset, Parameters, Targets, Trainer, TrainerOptions};
use hymba::{
    Error, Hymba, HymbaOptions, LoraOptions, Parameter, Pooling, Predictor, PredictorOptions, Stem, Storage, Task,
};

const ALL: [&str; 6] = ["*_proj", "gate", "up", "down", "x_proj", "dt_proj"];

fn input(batch: usize, l: usize, width: usize) -> Array3<f32> {
    Array3::from_shape_fn((batch, l, width), |(b, t, i)| ((b * 31 + t * 7 + i * 3) as f32 * 0.37).sin())
}

/// Models of every pattern and variant.
fn models() -> Vec<Hymba> {
    let small = |options: HymbaOptions| options.hidden_size(16).num_heads(2).state_size(4).window_size(9);
    [
        small(HymbaOptions::new(5)).num_layers(2),
        small(HymbaOptions::edifice(5)).num_layers(2),
        small(HymbaOptions::jamba(5)).num_layers(3),
        small(HymbaOptions::zamba(5)).num_layers(6),
    ]
    .map(|options| Hymba::build(options).unwrap())
    .into()
}

fn options(model: &Hymba) -> LoraOptions {
    // not every pattern has a gate, or a map for each
    let mut names = Vec::new();
    model.visit_parameters(&mut |name, _| names.push(name.to_string()));
    let there = ALL.into_iter().filter(|pattern| {
        let end = pattern.trim_start_matches('*');
        names.iter().any(|name| name.ends_with(&format!("{end}.weight")))
    });
    LoraOptions::default().rank(3).alpha(5.0).maps(there)
}

/// Numbers in place of those that training would find, B among them.
fn fill(model: &mut Hymba, seed: usize) {
    let mut i = seed;
    model.visit_mut(&mut |name, mut array| {
        assert!(name.contains("lora_"), "{name}");
        array.mapv_inplace(|_| {
            i += 1;
            0.2 * (i as f32 * 1.7).sin()
        });
    });
}

fn by_name(model: &Hymba) -> BTreeMap<String, ArrayD<f32>> {
    let mut all = BTreeMap::new();
    model.visit(&mut |name, array| {
        all.insert(name.to_string(), array.to_owned());
    });
    all
}

fn difference<'a>(a: impl IntoIterator<Item = &'a f32>, b: impl IntoIterator<Item = &'a f32>) -> f32 {
    a.into_iter().zip(b).fold(0f32, |m, (a, b)| m.max((a - b).abs()))
}

/// What outputs are multiplied by in a loss. (The norm at the end makes a sum of their squares constant.)
fn slopes(y: &Array2<f32>) -> Array2<f32> {
    Array2::from_shape_fn(y.dim(), |(i, j)| ((i * 5 + j * 3) as f32).cos())
}

fn loss_of(y: &Array2<f32>) -> f64 {
    y.iter().zip(&slopes(y)).map(|(y, slope)| f64::from(*y) * f64::from(*slope)).sum()
}

#[test]
fn merged_equals_apart_and_removed_what_was_before() {
    for mut model in models() {
        let x = input(2, 30, 5);
        let (weights, before) = (by_name(&model), model.forward(&x).unwrap());
        let covered = model.add_lora(&options(&model), 1).unwrap();
        let lines = covered.to_string();
        assert!(lines.contains(&format!("{} maps, {} parameters", covered.maps.len(), covered.parameters)), "{lines}");
        assert!(lines.contains("blocks.*.mamba.in_proj [64, 16]"), "{lines}");
        assert_eq!(covered.parameters, by_name(&model).values().map(|array| array.len()).sum::<usize>());
        assert!(difference(&model.forward(&x).unwrap(), &before) < 1e-5, "B is zero");

        fill(&mut model, 0);
        let apart = model.forward(&x).unwrap();
        assert!(difference(&apart, &before) > 1e-2);
        let mut merged = model.clone();
        merged.merge_lora();
        let largest = apart.iter().fold(0f32, |m, x| m.max(x.abs()));
        assert!(difference(&merged.forward(&x).unwrap(), &apart) <= 1e-5 * largest);
        assert_eq!(merged.num_parameters(), by_name(&merged).values().map(|array| array.len()).sum::<usize>());

        model.remove_lora();
        assert!(by_name(&model) == weights && model.forward(&x).unwrap() == before);
    }
}

#[test]
fn streams_equal_whole_sequences() {
    for mut model in models() {
        model.add_lora(&options(&model), 1).unwrap();
        fill(&mut model, 3);
        let x = input(2, 24, 5);
        let all = model.forward_sequence(&x).unwrap();
        assert_eq!(all.index_axis(Axis(1), 23), model.forward(&x).unwrap());
        let mut state = model.new_state(2);
        for (t, frame) in x.axis_iter(Axis(1)).enumerate() {
            let y = model.step(&frame, &mut state).unwrap();
            assert!(difference(&y, all.index_axis(Axis(1), t)) < 1e-5);
        }
        let y = model.prefill(&x, &mut model.new_state(2)).unwrap();
        assert!(difference(&y, all.index_axis(Axis(1), 23)) < 1e-5);
        let (trained, _) = model.forward_train(&x, None, 0).unwrap();
        assert_eq!(trained, model.forward(&x).unwrap());
    }
}

/// ⟨gradient, v⟩ = (loss(p + εv) − loss(p − εv)) / 2ε, over weights of any type.
#[test]
fn directional_differences() {
    let of_storage = |storage: Storage| {
        let options = HymbaOptions::new(5).hidden_size(32).num_heads(2).num_layers(2).state_size(4);
        let mut model = Hymba::build(options).unwrap();
        model.store_as(storage).unwrap();
        model
    };
    let narrow = [Storage::F32, Storage::Bf16, Storage::F16, Storage::Q8, Storage::Q4].map(of_storage);
    for mut model in models().into_iter().chain(narrow) {
        // sums of products with 8 and 4 bits round their inputs: too coarse for differences
        let coarse = matches!(model.storage(), Some(Storage::Q8 | Storage::Q4));
        model.add_lora(&options(&model), 1).unwrap();
        fill(&mut model, 5);
        let (x, lengths) = (input(2, 20, 5), [20, 13]);
        let (y, cache) = model.forward_train(&x, Some(&lengths), 0).unwrap();
        let mut gradient = model.zeros_like();
        model.backward(&cache, &slopes(&y), &mut gradient).unwrap();
        let gradient = by_name(&gradient);
        assert!(gradient.keys().eq(by_name(&model).keys()) && gradient.keys().all(|name| name.contains("lora_")));
        let largest = |part: &str| {
            let of_part = gradient.iter().filter(|(name, _)| name.contains(part)).map(|(_, array)| array);
            of_part.flat_map(|array| array.iter()).fold(0f32, |m, x| m.max(x.abs()))
        };
        assert!(largest("lora_A") > 1e-4 && largest("lora_B") > 1e-4);
        let expected: f64 = gradient.values().flat_map(|array| array.iter()).map(|g| f64::from(g.abs())).sum();
        let (step, bound) = if coarse { (2e-3, 0.1) } else { ((0.05 / expected) as f32, 0.01) };
        let loss = |sign: f32| {
            let mut moved = model.clone();
            moved.visit_mut(&mut |name, mut array| array += &gradient[name].mapv(|g| sign * step * g.signum()));
            loss_of(&moved.forward_ragged(&x, &lengths).unwrap())
        };
        let got = (loss(1.0) - loss(-1.0)) / f64::from(2.0 * step);
        assert!((got - expected).abs() < bound * expected, "{:?}: {got} for {expected}", model.storage());
    }
}

/// Outputs and gradients in training from this seed are those of one thread.
#[cfg(feature = "rayon")]
fn check_threads(model: &Hymba, seed: u64) {
    let x = input(3, 50, 5);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let (y, cache) = model.forward_train(&x, None, seed).unwrap();
            let mut gradient = model.zeros_like();
            model.backward(&cache, &y, &mut gradient).unwrap();
            (y, by_name(&gradient))
        })
    };
    let one = run(1);
    assert!(run(2) == one && run(3) == one);
}

#[cfg(feature = "rayon")]
#[test]
fn any_number_of_threads() {
    let mut model = Hymba::build(HymbaOptions::new(5).hidden_size(64).num_layers(2)).unwrap();
    model.store_as(Storage::Q8).unwrap();
    model.add_lora(&LoraOptions::default(), 1).unwrap();
    fill(&mut model, 0);
    check_threads(&model, 0);
}

fn waves(count: usize) -> Dataset {
    let wave =
        |i: usize| Array2::from_shape_fn((20, 1), |(t, _)| ((0.3 + 0.5 * (i % 2) as f32) * t as f32 + i as f32).sin());
    let targets = Targets::Classes((0..count).map(|i| i % 2).collect());
    Dataset::new(&Task::classify(["slow", "fast"]), (0..count).map(wave).collect(), targets).unwrap()
}

fn predictor(options: impl Into<PredictorOptions>, storage: Option<Storage>) -> Predictor {
    let mut predictor = Predictor::build(options, Task::classify(["slow", "fast"])).unwrap();
    storage.into_iter().for_each(|storage| predictor.store_as(storage).unwrap());
    predictor
}

fn small() -> HymbaOptions {
    HymbaOptions::new(1).hidden_size(16).num_heads(2).num_layers(1)
}

/// Every number of a predictor, in whatever type it is stored.
fn numbers(predictor: &Predictor) -> BTreeMap<String, Vec<f32>> {
    let mut all = BTreeMap::new();
    predictor.visit_parameters(&mut |name, parameter| {
        let numbers = match parameter {
            Parameter::Array(array) => array.iter().copied().collect(),
            Parameter::Stored(matrix) => (0..matrix.shape()[0]).flat_map(|output| matrix.row(output)).collect(),
            _ => unreachable!(),
        };
        all.insert(name.to_string(), numbers);
    });
    all
}

fn go_on<T>(_: &T) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// The trainer changes the adapter and what is around the encoder, and nothing else; interrupted, it ends the same.
#[test]
fn a_predictor_with_an_adapter_is_trained() {
    let data = waves(24);
    for (bidirectional, storage) in [(false, None), (false, Some(Storage::Q4)), (true, Some(Storage::Bf16))] {
        let options = PredictorOptions::new(small()).bidirectional(bidirectional);
        let mut start = predictor(options, storage);
        let covered = start.add_lora(&LoraOptions::default().rank(4).maps(["in_proj", "out_proj", "up"]), 0).unwrap();
        assert_eq!(covered.maps.len(), if bidirectional { 8 } else { 4 });
        let before = numbers(&start);
        let options = TrainerOptions::default().epochs(6).learning_rate(1e-2);
        let trained = Trainer::new(start.clone(), options.clone()).unwrap().fit(&data, go_on).unwrap();
        assert!(trained.history[5].train.loss < trained.history[0].train.loss);
        let after = numbers(&trained.predictor);
        for (name, numbers) in &after {
            let trains = name.contains("lora_") || name.starts_with("head.");
            assert_eq!(*numbers != before[name], trains, "{name}");
        }

        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("run");
        let mut epochs = 0;
        Trainer::new(start, options.checkpoint(&folder))
            .unwrap()
            .fit(&data, |progress| {
                epochs += usize::from(progress.finished.is_some());
                if epochs == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })
            .unwrap();
        let resumed = Trainer::resume(&folder).unwrap().fit(&data, go_on).unwrap();
        assert!(resumed.history == trained.history && numbers(&resumed.predictor) == after);

        // one file with all, and a folder with the adapter alone
        let (x, file) = (input(3, 20, 1), folder.join("all"));
        let want = trained.predictor.predict(&x, None).unwrap();
        trained.predictor.save(&file).unwrap();
        let mut read = Predictor::load(&file).unwrap();
        assert_eq!((read.loras(), read.lora_options()), (vec!["default"], trained.predictor.lora_options()));
        assert_eq!(read.predict(&x, None).unwrap(), want);
        read.save_lora(folder.join("adapter")).unwrap();
        read.remove_lora();
        assert!(read.predict(&x, None).unwrap() != want);
        assert_eq!(read.load_lora(folder.join("adapter")).unwrap(), covered);
        assert_eq!(read.predict(&x, None).unwrap(), want);
        if storage.is_none() {
            read.merge_lora();
            assert!(difference(&read.predict(&x, None).unwrap(), &want) < 1e-5);
        }
    }
}

/// What is trained with an adapter goes with it: base and folder together are what was trained, in another process, too.
#[test]
fn an_adapter_brings_what_was_trained_around_the_encoder() {
    let classes = Task::classify(["slow", "fast"]);
    let regress = Task::Regress { outputs: 1 };
    let stem = PredictorOptions::new(small())
        .stem(Stem::new(2).widths([3]).channels(16))
        .pooling(Pooling::Attention { queries: 2 })
        .bidirectional(true);
    for (options, task) in [(stem, classes), (PredictorOptions::new(small()), regress.clone())] {
        let data = waves(16);
        let data = match task == regress {
            true => {
                let targets = Targets::Values(Array2::from_shape_fn((16, 1), |(i, _)| 5.0 + (i % 2) as f32));
                Dataset::new(&task, data.series().to_vec(), targets).unwrap()
            }
            false => data,
        };
        let base = Predictor::build(options, task).unwrap().to_bytes().unwrap();
        let base = || Predictor::from_bytes(&base).unwrap();
        let train = |maps: &str| {
            let mut start = base();
            start.add_lora(&LoraOptions::default().rank(2).maps([maps]), 0).unwrap();
            let options = TrainerOptions::default().epochs(2).learning_rate(1e-2);
            Trainer::new(start, options).unwrap().fit(&data, go_on).unwrap().predictor
        };
        let (x, folder) = (input(3, 20, 1), tempfile::tempdir().unwrap());
        let trained = ["in_proj", "out_proj"].map(train);
        for (i, trained) in trained.iter().enumerate() {
            trained.save_lora(folder.path().join(i.to_string())).unwrap();
        }
        let mut read = base();
        for i in [0, 1, 0] {
            read.load_lora(folder.path().join(i.to_string())).unwrap();
            assert_eq!(read.predict(&x, None).unwrap(), trained[i].predict(&x, None).unwrap());
        }
        assert!(read.to_bytes().unwrap() == trained[0].to_bytes().unwrap());

        // nothing changes where there is an error
        let config = folder.path().join("0/adapter_config.json");
        let text = std::fs::read_to_string(&config).unwrap();
        let mut start = base();
        for (from, to) in [("\"head\"", "\"tail\""), ("\"head\",", ""), ("\"head\"", "7")] {
            assert!(text.contains(from), "{text}");
            std::fs::write(&config, text.replace(from, to)).unwrap();
            let error = start.load_lora(folder.path().join("0")).unwrap_err();
            assert!(matches!(error, Error::Format { .. } | Error::Tensors { .. }), "{error}");
            assert!(start.to_bytes().unwrap() == base().to_bytes().unwrap());
        }
        // nor does a folder from around a predictor fit an encoder
        std::fs::write(&config, &text).unwrap();
        assert!(matches!(base().encoder().clone().load_lora(folder.path().join("0")), Err(Error::Format { .. })));
    }
}

/// Models of one checkpoint that do not go together are refused before anything goes over the numbers of two.
#[test]
fn a_checkpoint_of_two_adapters() {
    let with = |rank: usize, maps: &str| {
        let mut start = predictor(small(), None);
        start.add_lora(&LoraOptions::default().rank(rank).maps([maps]), 0).unwrap();
        start
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let options = TrainerOptions::default().epochs(2).average(0.9).checkpoint(&path);
    let stop = |progress: &hymba::train::Progress| match progress.finished {
        Some(_) => ControlFlow::Break(()),
        None => ControlFlow::Continue(()),
    };
    Trainer::new(with(2, "in_proj"), options).unwrap().fit(&waves(8), stop).unwrap();
    assert!(Trainer::resume(&path).is_ok());
    let average = path.join("average-1.safetensors");
    let mut narrow = with(2, "in_proj");
    narrow.store_as(Storage::Bf16).unwrap();
    let mut inactive = with(2, "in_proj");
    inactive.set_lora(None).unwrap();
    for other in [with(3, "in_proj"), with(2, "out_proj"), predictor(small(), None), narrow, inactive] {
        other.save(&average).unwrap();
        let error = Trainer::resume(&path).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains("adapters"), "{error}");
    }
    with(2, "in_proj").save(&average).unwrap();
    assert!(Trainer::resume(&path).unwrap().fit(&waves(8), go_on).is_ok());
}

/// Where none of the adapters is active it is the model itself that is explained.
#[test]
fn saliency_beside_adapters() {
    let bare = predictor(small(), None);
    let (mut with, x) = (bare.clone(), Array2::from_shape_fn((9, 1), |(t, _)| (t as f32).sin()));
    with.add_lora(&LoraOptions::default(), 0).unwrap();
    with.visit_mut(&mut |name, mut array| array += if name.contains("lora_") { 0.1 } else { 0.0 });
    assert!(with.saliency(&x, 1).unwrap() != bare.saliency(&x, 1).unwrap());
    with.set_lora(None).unwrap();
    assert_eq!(with.saliency(&x, 1).unwrap(), bare.saliency(&x, 1).unwrap());
    assert_eq!(with.loras(), ["default"]);
}

/// Of two encoders one may have no map of an adapter, and is a model of its own.
#[test]
fn an_adapter_of_the_second_encoder_alone() {
    let mut both = predictor(PredictorOptions::new(small()).bidirectional(true), None);
    both.add_lora(&LoraOptions::default().maps(["reverse.*in_proj"]), 0).unwrap();
    let encoder = Hymba::from_bytes(&both.encoder().to_bytes().unwrap()).unwrap();
    assert_eq!(encoder.forward(&input(1, 9, 1)).unwrap(), both.encoder().forward(&input(1, 9, 1)).unwrap());
    assert!(!encoder.has_lora());
    assert_eq!(Predictor::from_bytes(&both.to_bytes().unwrap()).unwrap().lora_options(), both.lora_options());
}

#[test]
fn a_frozen_head_stays_as_it_is() {
    let mut start = predictor(small(), None);
    start.add_lora(&LoraOptions::default(), 0).unwrap();
    let before = numbers(&start);
    let adamw = AdamWOptions::default().rate_for("head.*", 0.0);
    let options = TrainerOptions::default().epochs(2).learning_rate(1e-2).adamw(adamw);
    let trained = Trainer::new(start, options).unwrap().fit(&waves(8), go_on).unwrap();
    for (name, numbers) in numbers(&trained.predictor) {
        assert_eq!(numbers != before[&name], name.contains("lora_"), "{name}");
    }
}

/// One adapter at a time, or none; switching brings back the same to the bit, and states belong to theirs.
#[test]
fn several_adapters() {
    let mut model = Hymba::build(HymbaOptions::new(5).hidden_size(16).num_heads(2).num_layers(2)).unwrap();
    let (x, frame) = (input(1, 10, 5), Array2::ones((1, 5)));
    for (i, name) in ["a", "b"].into_iter().enumerate() {
        let maps = [["in_proj", "gate"], ["out_proj", "dt_proj"]][i];
        model.add_lora_as(name, &LoraOptions::default().rank(2 + i).maps(maps), 0).unwrap();
        fill(&mut model, 100 * i);
    }
    assert_eq!((model.lora(), model.loras()), (Some("b"), vec!["a", "b"]));
    let mut seen = BTreeMap::new();
    for name in [None, Some("a"), Some("b")] {
        model.set_lora(name).unwrap();
        let mut state = model.new_state(1);
        model.prefill(&x, &mut state).unwrap();
        seen.insert(name, (model.forward(&x).unwrap(), state));
    }
    let bytes = model.num_bytes();
    for name in [Some("a"), None, Some("b"), Some("a")] {
        model.set_lora(name).unwrap();
        assert_eq!(model.num_bytes(), bytes);
        for (other, (y, state)) in &seen {
            assert_eq!(model.forward(&x).unwrap() == *y, *other == name);
            // of the same adapter it goes on
            let mut state = state.clone();
            let stepped = model.step(&frame, &mut state);
            assert_eq!(stepped.is_ok(), *other == name);
            assert!(stepped.is_ok() || matches!(stepped, Err(Error::State(_))));
        }
    }
    // without an active one there is nothing to train
    let folder = tempfile::tempdir().unwrap();
    model.set_lora(None).unwrap();
    assert!(by_name(&model).is_empty());
    assert!(matches!(AdamW::new(&model, AdamWOptions::default()), Err(Error::State(_))));
    assert!(matches!(model.forward_train(&x, None, 0), Err(Error::State(_))));
    assert!(matches!(model.save_lora(folder.path()), Err(Error::State(_))));

    // all in one file, each in a folder of its own
    model.set_lora("a").unwrap();
    let read = Hymba::from_bytes(&model.to_bytes().unwrap()).unwrap();
    assert_eq!((read.lora(), read.loras()), (Some("a"), vec!["a", "b"]));
    let mut alone = Hymba::build(model.options().clone()).unwrap();
    for mut model in [model.clone(), read] {
        for name in ["b", "a"] {
            model.set_lora(name).unwrap();
            assert_eq!(model.forward(&x).unwrap(), seen[&Some(name)].0);
            model.save_lora(folder.path().join(name)).unwrap();
            alone.load_lora_as(name, folder.path().join(name)).unwrap();
            assert_eq!(alone.forward(&x).unwrap(), seen[&Some(name)].0);
        }
    }
    // states in files, too
    let file = folder.path().join("state");
    model.save_state(&seen[&Some("a")].1, &file).unwrap();
    alone.set_lora("a").unwrap();
    alone.load_state(&file).unwrap();
    alone.set_lora("b").unwrap();
    assert!(matches!(alone.load_state(&file), Err(Error::State(_))));
    // the same numbers at another scale are another adapter
    let config = folder.path().join("a/adapter_config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("\"lora_alpha\": 16.0", "\"lora_alpha\": 17.0")).unwrap();
    alone.load_lora_as("louder", folder.path().join("a")).unwrap();
    assert!(matches!(alone.load_state(&file), Err(Error::State(_))));

    model.drop_lora("b").unwrap();
    assert_eq!((model.lora(), model.loras()), (Some("a"), vec!["a"]));
    model.drop_lora("a").unwrap();
    assert!(!model.has_lora() && model.forward_train(&x, None, 0).is_ok());
}

/// The type of the weights may change beside an adapter.
#[test]
fn weights_are_stored_narrower_beside_an_adapter() {
    let mut model = Hymba::build(HymbaOptions::new(5).hidden_size(64).num_layers(2)).unwrap();
    model.add_lora(&LoraOptions::default(), 0).unwrap();
    fill(&mut model, 0);
    let (x, mut state) = (input(1, 10, 5), model.new_state(1));
    let wide = model.forward(&x).unwrap();
    model.store_as(Storage::Bf16).unwrap();
    let narrow = model.forward(&x).unwrap();
    assert!(narrow != wide && difference(&narrow, &wide) < 0.1);
    assert!(matches!(model.prefill(&x, &mut state), Err(Error::State(_))));
    model.make_trainable().unwrap();
    assert!(by_name(&model).keys().all(|name| name.contains("lora_")));
    assert!(difference(&model.forward(&x).unwrap(), &narrow) < 1e-4);
    model.remove_lora();
    assert!(model.storage().is_none() && by_name(&model).len() > 20);
}

#[test]
fn bad_input() {
    let mut model = Hymba::build(HymbaOptions::new(5).hidden_size(16).num_heads(2).num_layers(1)).unwrap();
    for options in [
        LoraOptions::default().rank(0),
        LoraOptions::default().alpha(f64::INFINITY),
        LoraOptions::default().maps(["in_proj", "lm_head"]),
        LoraOptions::default().maps(["conv"]),
        LoraOptions::default().maps([""; 0]),
    ] {
        assert!(matches!(model.add_lora(&options, 0), Err(Error::Option { .. })), "{options:?}");
        assert!(!model.has_lora());
    }
    for name in ["", "a.b", "a/b", "ü", &"a".repeat(65)] {
        assert!(matches!(model.add_lora_as(name, &LoraOptions::default(), 0), Err(Error::Option { .. })), "{name}");
    }
    assert!(matches!(model.set_lora("a"), Err(Error::Option { option: "name", .. })));
    assert!(matches!(model.drop_lora("a"), Err(Error::Option { option: "name", .. })));

    // gradients of another
    let x = input(1, 5, 5);
    let mut plain = model.zeros_like();
    model.add_lora(&LoraOptions::default().rank(2), 0).unwrap();
    let mut optimizer = AdamW::new(&model, AdamWOptions::default()).unwrap();
    let (y, cache) = model.forward_train(&x, None, 0).unwrap();
    assert!(matches!(model.backward(&cache, &y, &mut plain), Err(Error::State(_))));
    assert!(optimizer.step(&mut model, &mut plain).is_err());
    // caches of another
    model.add_lora_as("other", &LoraOptions::default().rank(2), 0).unwrap();
    assert!(matches!(model.backward(&cache, &y, &mut model.zeros_like()), Err(Error::State(_))));
    let mut cleared = model.zeros_like();
    cleared.fill_zero();

    // files of which something is missing
    let bytes = model.to_bytes().unwrap();
    let text = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).expect(from);
        let mut changed = bytes.clone();
        changed[at..at + to.len()].copy_from_slice(to.as_bytes());
        Hymba::from_bytes(&changed)
    };
    assert!(Hymba::from_bytes(&bytes).is_ok());
    let maps = model.lora_options().unwrap().maps.iter().map(|map| format!(r#"\"{map}\""#)).collect::<Vec<_>>();
    let with_maps = format!(r#"\"maps\":[{}]"#, maps.join(","));
    let without = format!(r#"\"maps\":[{}]"#, " ".repeat(with_maps.len() - r#"\"maps\":[]"#.len()));
    for (from, to) in [
        (r#"\"rank\":2"#, r#"\"rank\":3"#),
        (r#"\"rank\":2"#, r#"\"rank\":0"#),
        (r#"\"active\":\"other\""#, r#"\"active\":\"outer\""#),
        (&with_maps, &without),
        ("in_proj.lora_A", "xn_proj.lora_A"),
    ] {
        assert!(matches!(text(from, to), Err(Error::Format { .. } | Error::Tensors { .. })), "{to}");
    }
}

/// Dropout of what A reads: the gradient is that of what was computed, masks follow from seed, row and frame, and inference has none.
#[test]
fn dropout_in_training_alone() {
    for mut model in models() {
        let x = input(3, 20, 5);
        let none = options(&model);
        let some = none.clone().dropout(0.3);
        model.add_lora_as("none", &none, 1).unwrap();
        fill(&mut model, 5);
        let (plain, want) = (by_name(&model), model.forward(&x).unwrap());
        model.add_lora_as("some", &some, 1).unwrap();
        model.visit_mut(&mut |name, mut array| array.assign(&plain[name]));
        assert_eq!(model.forward(&x).unwrap(), want);
        let lengths = [20, 13, 7];
        let train = |model: &Hymba, seed| model.forward_train(&x, Some(&lengths), seed).unwrap();
        let (y, cache) = train(&model, 7);
        assert_eq!(train(&model, 7).0, y);
        assert!(difference(&train(&model, 8).0, &y) > 1e-3 && difference(&y, &want) > 1e-3);
        // alone as in a batch
        let alone = model.forward_train(&x.slice(hymba::ndarray::s![..1, .., ..]), None, 7).unwrap().0;
        assert_eq!(alone.row(0), y.row(0));
        // the last frames as among all frames
        let all = model.forward_sequence_train(&x, Some(&lengths), 7).unwrap().0;
        for (row, length) in lengths.into_iter().enumerate() {
            assert_eq!(y.row(row), all.slice(hymba::ndarray::s![row, length - 1, ..]));
        }

        let mut gradient = model.zeros_like();
        let dx = model.backward(&cache, &slopes(&y), &mut gradient).unwrap();
        let gradient = by_name(&gradient);
        let sum = |numbers: &mut dyn Iterator<Item = &f32>| numbers.map(|g| f64::from(g.abs())).sum::<f64>();
        let of_weights = |step: f32| {
            let mut moved = model.clone();
            moved.visit_mut(&mut |name, mut array| array += &gradient[name].mapv(|g| step * g.signum()));
            loss_of(&train(&moved, 7).0)
        };
        let of_input = |step: f32| {
            let moved = &x + &dx.mapv(|g| step * g.signum());
            loss_of(&model.forward_train(&moved, Some(&lengths), 7).unwrap().0)
        };
        let losses: [(&dyn Fn(f32) -> f64, f64); 2] = [
            (&of_weights, sum(&mut gradient.values().flat_map(|array| array.iter()))),
            (&of_input, sum(&mut dx.iter())),
        ];
        for (loss, want) in losses {
            let step = (0.05 / want) as f32;
            let got = (loss(step) - loss(-step)) / f64::from(2.0 * step);
            assert!((got - want).abs() < 0.01 * want, "{got} for {want}");
        }
    }
}

#[cfg(feature = "rayon")]
#[test]
fn dropout_with_any_number_of_threads() {
    let mut model = Hymba::build(HymbaOptions::new(5).hidden_size(64).num_layers(2)).unwrap();
    model.add_lora(&LoraOptions::default().dropout(0.2), 1).unwrap();
    fill(&mut model, 0);
    check_threads(&model, 3);
}
