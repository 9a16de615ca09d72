//! The optimiser: PyTorch's numbers, what decays, what is clipped, what is saved, and what it refuses.

mod common;

use std::fs;

use approx::assert_relative_eq;
use common::wave;
use hymba::ndarray::{Array1, Array2, ArrayViewD, ArrayViewMutD, ShapeBuilder, array, s};
use hymba::train::{AdamW, AdamWOptions, Parameters, Schedule};
use hymba::{Error, Hymba, HymbaOptions};

/// A matrix and a bias.
#[derive(Clone, PartialEq, Debug)]
struct Layer {
    weight: Array2<f32>,
    bias: Array1<f32>,
    names: [&'static str; 2],
}

impl Layer {
    fn new(weight: Array2<f32>, bias: Array1<f32>) -> Self {
        Layer { weight, bias, names: ["weight", "bias"] }
    }

    fn numbers(&self) -> Vec<f32> {
        self.weight.iter().chain(&self.bias).copied().collect()
    }
}

impl Parameters for Layer {
    fn visit<'a>(&'a self, f: &mut dyn FnMut(&str, ArrayViewD<'a, f32>)) {
        f(self.names[0], self.weight.view().into_dyn());
        f(self.names[1], self.bias.view().into_dyn());
    }

    fn visit_mut<'a>(&'a mut self, f: &mut dyn FnMut(&str, ArrayViewMutD<'a, f32>)) {
        f(self.names[0], self.weight.view_mut().into_dyn());
        f(self.names[1], self.bias.view_mut().into_dyn());
    }

    fn zeros_like(&self) -> Self {
        Layer { weight: Array2::zeros(self.weight.dim()), bias: Array1::zeros(self.bias.dim()), names: self.names }
    }
}

fn layer() -> Layer {
    Layer::new(array![[-0.25, -0.125, 0.0], [0.125, 0.25, 0.375]], array![0.5, 0.0, -0.5])
}

/// The gradient of step t.
fn gradient(t: usize) -> Layer {
    let number = |i: usize| ((i * 7 + t * 3) % 11) as f32 / 4.0 - 1.25;
    Layer::new(
        Array2::from_shape_fn((2, 3), |(row, i)| number(row * 3 + i)),
        Array1::from_shape_fn(3, |i| number(6 + i)),
    )
}

// import torch
// def train(betas, clip):
//     weight = torch.nn.Parameter((torch.arange(6.) / 8 - 0.25).reshape(2, 3))
//     bias = torch.nn.Parameter(torch.tensor([0.5, 0, -0.5]))
//     groups = [{"params": [weight], "weight_decay": 0.5}, {"params": [bias], "weight_decay": 0.0}]
//     optimizer = torch.optim.AdamW(groups, lr=0.05, betas=betas, eps=1e-3)
//     for t in range(5):
//         g = ((torch.arange(9) * 7 + t * 3) % 11 - 5) / 4
//         weight.grad, bias.grad = g[:6].reshape(2, 3).clone(), g[6:].clone()
//         print(torch.nn.utils.clip_grad_norm_([weight, bias], clip))
//         optimizer.step()
//     print(weight.flatten(), bias)
// train((0.9, 0.999), float("inf"))
// train((0.8, 0.95), 1.0)
#[test]
fn as_pytorch() {
    let options = AdamWOptions::default().learning_rate(0.05).epsilon(1e-3).weight_decay(0.5);
    for (options, expected) in [
        (
            options.clone(),
            [-0.0901338, -0.248978, 0.0491705, 0.0348778, 0.1289056, 0.4458357, 0.4367963, 0.0062449, -0.4059755],
        ),
        (
            options.betas(0.8, 0.95).clip_norm(1.0),
            [-0.1000503, -0.240661, 0.038074, 0.0503218, 0.1362083, 0.4370613, 0.4472041, 0.0098951, -0.4198061],
        ),
    ] {
        let mut model = layer();
        let mut optimizer = AdamW::new(&model, options).unwrap();
        let norms = [2.5, 2.25, 2.25, 2.5, 2.42384].map(f64::from);
        for (t, norm) in norms.into_iter().enumerate() {
            let info = optimizer.step(&mut model, &mut gradient(t)).unwrap();
            assert_eq!((info.step, info.learning_rate), (t as u64 + 1, 0.05));
            assert_relative_eq!(info.gradient_norm, norm, max_relative = 1e-5);
        }
        assert_relative_eq!(model.numbers()[..], expected, epsilon = 1e-6);
    }
}

#[test]
fn the_gradient_is_used_up() {
    let mut model = layer();
    let mut optimizer = AdamW::new(&model, AdamWOptions::default()).unwrap();
    let mut gradient = gradient(0);
    optimizer.step(&mut model, &mut gradient).unwrap();
    assert_eq!(gradient, model.zeros_like());
}

#[test]
fn what_clipping_and_accumulating_do() {
    // with this epsilon the length of the gradient matters
    let options = AdamWOptions::default().epsilon(1.0).learning_rate(0.5);
    let step = |options: AdamWOptions, factor: f32, weight: f64| {
        let mut model = layer();
        let mut gradient = gradient(0); // of norm 2.5
        gradient.visit_mut(&mut |_, mut array| array *= factor);
        let mut optimizer = AdamW::new(&model, options).unwrap();
        let info = optimizer.step_accumulated(&mut model, &mut gradient, weight).unwrap();
        (model, info.gradient_norm)
    };
    let (plain, norm) = step(options.clone(), 1.0, 1.0);
    assert_relative_eq!(norm, 2.5);
    assert_eq!(step(options.clone(), 4.0, 4.0), (plain.clone(), norm));
    assert_eq!(step(options.clone().clip_norm(2.5), 1.0, 1.0), (plain.clone(), norm), "not longer than that");
    let (clipped, norm) = step(options.clone().clip_norm(2.5), 8.0, 1.0);
    assert_relative_eq!(norm, 20.0);
    assert_relative_eq!(clipped.numbers()[..], plain.numbers()[..], epsilon = 1e-6);
    let (clipped, norm) = step(options.clone().clip_norm(2.5), 32.0, 4.0);
    assert_relative_eq!(norm, 20.0);
    assert_relative_eq!(clipped.numbers()[..], plain.numbers()[..], epsilon = 1e-6);
    assert_ne!(step(options, 8.0, 1.0).0, plain);
}

#[test]
fn matrices_decay() {
    let options = AdamWOptions::default().weight_decay(0.1);
    for model in [
        Hymba::build(HymbaOptions::new(3).hidden_size(8).num_layers(1)).unwrap(),
        Hymba::build(HymbaOptions::edifice(3).hidden_size(8).num_layers(1)).unwrap(),
    ] {
        model.visit(&mut |name, array| {
            let kept = ["bias", "norm.weight", "meta_tokens", "meta_k", "meta_v", "a_log", "mamba.d"];
            let decay = if kept.iter().any(|end| name.ends_with(end)) { 0.0 } else { 0.1 };
            assert_eq!(options.decay_of(name, array.shape()), decay, "{name}");
        });
    }
    let options = options.weight_decay_for("head.*", 0.2).weight_decay_for("*.bias", 0.3);
    assert_eq!(options.decay_of("head.weight", &[8, 2]), 0.2);
    assert_eq!(options.decay_of("head.bias", &[2]), 0.3);

    // without a gradient only the decay is left
    let mut model = layer();
    let options = AdamWOptions::default().learning_rate(0.5).weight_decay(0.5).weight_decay_for("bias", 1.0);
    let mut optimizer = AdamW::new(&model, options).unwrap();
    optimizer.step(&mut model, &mut layer().zeros_like()).unwrap();
    assert_eq!(model, Layer::new(layer().weight * 0.75, layer().bias * 0.5));
}

fn schedules() -> [(Schedule, [f32; 7]); 4] {
    [
        (Schedule::constant(0.5), [0.5; 7]),
        (Schedule::constant(0.75).warm_up(2), [0.25, 0.5, 0.75, 0.75, 0.75, 0.75, 0.75]),
        (Schedule::linear(1.0, 5).warm_up(1).floor(0.5), [0.5, 1.0, 0.875, 0.75, 0.625, 0.5, 0.5]),
        (Schedule::cosine(3.0, 6).warm_up(2).floor(1.0), [1.0, 2.0, 3.0, 2.707_106_8, 2.0, 1.292_893_2, 1.0]),
    ]
}

#[test]
fn the_rate_follows_the_schedule() {
    for (schedule, rates) in schedules() {
        schedule.validate().unwrap();
        let mut model = layer();
        let mut optimizer = AdamW::new(&model, AdamWOptions::default().schedule(schedule)).unwrap();
        for (step, rate) in rates.into_iter().enumerate() {
            assert_relative_eq!(schedule.rate(step as u64), rate, max_relative = 1e-6);
            let info = optimizer.step(&mut model, &mut gradient(step)).unwrap();
            assert_eq!((info.learning_rate, info.step), (schedule.rate(step as u64), step as u64 + 1));
        }
        assert_relative_eq!(schedule.rate(u64::MAX), rates[6]);
        let text = serde_json::to_string(&schedule).unwrap();
        assert_eq!(serde_json::from_str::<Schedule>(&text).unwrap(), schedule);
    }
    let odd = Schedule::linear(1.0, 0).warm_up(u64::MAX).floor(2.0);
    assert!(
        [0, 1, u64::MAX].map(|step| odd.rate(step)).iter().all(|rate| rate.is_finite()),
        "not checked, not a panic"
    );
}

/// Large enough that a step is shared among threads, with tensors above and below the size of a share.
fn encoder() -> Hymba {
    Hymba::build(HymbaOptions::new(20).hidden_size(160).num_layers(1).seed(3)).unwrap()
}

/// Steps towards some numbers, as if backward had found the gradient.
fn train(model: &mut Hymba, optimizer: &mut AdamW<Hymba>, steps: usize) {
    let mut gradient = model.zeros_like();
    for _ in 0..steps {
        let t = optimizer.steps() as f32;
        let mut numbers = Vec::new();
        model.visit(&mut |_, array| numbers.extend(array.iter().copied()));
        let mut numbers = numbers.into_iter().zip(0..);
        gradient.visit_mut(&mut |_, mut array| {
            array.iter_mut().zip(&mut numbers).for_each(|(g, (p, i))| *g += p - (i as f32 * 0.01 + t).sin());
        });
        optimizer.step(model, &mut gradient).unwrap();
    }
}

fn bits(parameters: &impl Parameters) -> Vec<u32> {
    let mut bits = Vec::new();
    parameters.visit(&mut |_, array| bits.extend(array.iter().map(|x| x.to_bits())));
    bits
}

fn options() -> AdamWOptions {
    let schedule = Schedule::cosine(3e-3, 9).warm_up(2).floor(1.7e-5);
    AdamWOptions::default().schedule(schedule).clip_norm(0.7).weight_decay(0.03).weight_decay_for("*.gate.*", 0.011)
}

#[test]
fn ten_steps_are_five_a_file_and_five() {
    let folder = tempfile::tempdir().unwrap();
    let [model_path, path] = ["model", "optimizer"].map(|name| folder.path().join(name));

    let mut through = encoder();
    let mut optimizer = AdamW::new(&through, options()).unwrap();
    train(&mut through, &mut optimizer, 10);

    let mut model = encoder();
    let mut first_half = AdamW::new(&model, options()).unwrap();
    train(&mut model, &mut first_half, 5);
    model.save(&model_path).unwrap();
    first_half.save(&path).unwrap();
    drop((model, first_half));

    let mut model = Hymba::load(&model_path).unwrap();
    let mut second_half = AdamW::load(&path, &model).unwrap();
    assert_eq!((second_half.steps(), second_half.options()), (5, &options()));
    train(&mut model, &mut second_half, 5);
    assert_eq!(second_half.steps(), 10);
    assert!(bits(&model) == bits(&through));

    // and the two remember the same
    let other = folder.path().join("other");
    second_half.save(&path).unwrap();
    optimizer.save(&other).unwrap();
    assert!(fs::read(path).unwrap() == fs::read(other).unwrap());
}

#[cfg(feature = "rayon")]
#[test]
fn any_number_of_threads() {
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut model = encoder();
            let mut optimizer = AdamW::new(&model, options()).unwrap();
            train(&mut model, &mut optimizer, 3);
            bits(&model)
        })
    };
    let one = run(1);
    for threads in [2, 3, 8] {
        assert!(run(threads) == one, "{threads} threads");
    }
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing() {
    let mut model = encoder();
    let mut optimizer = AdamW::new(&model, options()).unwrap();
    train(&mut model, &mut optimizer, 2);
    let before = bits(&model);
    let mut state = model.new_state(1);
    for (bad, says) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        let mut gradient = model.zeros_like();
        gradient.visit_mut(&mut |name, mut array| {
            if name.ends_with("gate.weight") || name.ends_with("ffn.up.bias") {
                *array.iter_mut().last().unwrap() = bad;
            }
        });
        let spoilt = bits(&gradient);
        let error = optimizer.step(&mut model, &mut gradient).unwrap_err();
        assert!(matches!(error, Error::NotFinite { step: 3, .. }));
        let error = error.to_string();
        assert!(
            error.contains("step 3") && error.contains("\"blocks.0.gate.weight\"") && error.contains(says),
            "{error}"
        );
        assert!(bits(&model) == before && bits(&gradient) == spoilt);
    }
    model.step(&wave(1, 1, 20).slice(s![.., 0, ..]), &mut state).expect("the parameters were not even lent out");
    assert_eq!(optimizer.steps(), 2);
    train(&mut model, &mut optimizer, 1);
}

#[test]
fn a_gradient_too_large_to_be_squared_must_be_clipped() {
    let mut model = layer();
    let gradient = Layer::new(array![[0.0, 0.0, 0.0], [0.0, f32::MAX, 0.0]], array![0.0, 0.0, 0.0]);
    let mut optimizer = AdamW::new(&model, AdamWOptions::default()).unwrap();
    let error = optimizer.step(&mut model, &mut gradient.clone()).unwrap_err().to_string();
    assert!(error.contains("\"weight\" is too large") && error.contains("clip"), "{error}");
    assert_eq!(model, layer());
    let mut optimizer = AdamW::new(&model, AdamWOptions::default().clip_norm(1.0)).unwrap();
    let info = optimizer.step(&mut model, &mut gradient.clone()).unwrap();
    assert_relative_eq!(info.gradient_norm, f64::from(f32::MAX));
    assert!(model != layer() && model.numbers().iter().all(|number| number.is_finite()));
}

#[test]
fn parameters_that_do_not_fit() {
    let refused = |error: Error, says: &str| {
        assert!(matches!(error, Error::Optimizer(_)) && error.to_string().contains(says), "{error}");
    };
    let mut model = layer();
    let mut optimizer = AdamW::new(&model, AdamWOptions::default()).unwrap();
    let wide = Layer::new(Array2::zeros((2, 4)), Array1::zeros(3));
    let renamed = Layer { names: ["weight", "shift"], ..layer() };
    let transposed = Layer::new(Array2::zeros((2, 3).f()), Array1::zeros(3));
    for mut other in [wide, renamed, transposed.clone()] {
        refused(optimizer.step(&mut model, &mut other.clone()).unwrap_err(), "the gradient has");
        refused(optimizer.step(&mut other, &mut gradient(0)).unwrap_err(), "the model has");
    }
    for weight in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        refused(
            optimizer.step_accumulated(&mut model, &mut gradient(0), weight).unwrap_err(),
            "the gradient's weight is",
        );
    }
    assert_eq!((model, optimizer.steps()), (layer(), 0));
    refused(AdamW::new(&transposed, AdamWOptions::default()).unwrap_err(), "row-major");
    let twice = Layer { names: ["weight"; 2], ..layer() };
    refused(AdamW::new(&twice, AdamWOptions::default()).unwrap_err(), "two parameters have the name \"weight\"");

    let small = HymbaOptions::new(3).hidden_size(8).num_layers(1);
    let mut model = Hymba::build(small.clone()).unwrap();
    let mut optimizer = AdamW::new(&model, AdamWOptions::default()).unwrap();
    let mut deeper = Hymba::build(small.num_layers(2)).unwrap().zeros_like();
    refused(optimizer.step(&mut model, &mut deeper).unwrap_err(), "\"blocks.1.norm.weight\"");
}

#[test]
fn options_outside_their_range() {
    let (new, cosine) = (AdamWOptions::default, Schedule::cosine);
    let many = (0..257).fold(new(), |options, i| options.weight_decay_for(format!("{i}"), 0.0));
    for (options, name, says) in [
        (new().learning_rate(0.0), "learning_rate", "above 0"),
        (new().learning_rate(-1.0), "learning_rate", "-1"),
        (new().learning_rate(f32::NAN), "learning_rate", "NaN"),
        (new().learning_rate(f32::INFINITY), "learning_rate", "inf"),
        (new().schedule(cosine(1.0, 0)), "warm_up", "below the number of steps, 0"),
        (new().schedule(Schedule::linear(1.0, 5).warm_up(5)), "warm_up", "= 5 is"),
        (new().schedule(cosine(1.0, 5).floor(1.5)), "floor", "from 0 to the peak, 1"),
        (new().schedule(cosine(1.0, 5).floor(-0.5)), "floor", "-0.5"),
        (new().schedule(cosine(1.0, 5).floor(f32::NAN)), "floor", "NaN"),
        (new().betas(1.0, 0.9), "betas", "below 1"),
        (new().betas(0.9, -0.1), "betas", "-0.1"),
        (new().betas(f32::NAN, 0.9), "betas", "NaN"),
        (new().epsilon(0.0), "epsilon", "above 0"),
        (new().epsilon(f32::INFINITY), "epsilon", "inf"),
        (new().weight_decay(-0.1), "weight_decay", "0 or more"),
        (new().weight_decay(f32::NAN), "weight_decay", "NaN"),
        (new().weight_decay_for("a*", -0.1), "weight_decay_for", "a*"),
        (new().weight_decay_for("*".repeat(257), 0.1), "weight_decay_for", "256 bytes"),
        (many, "weight_decay_for", "257 patterns"),
        (new().clip_norm(0.0), "clip_norm", "above 0"),
        (new().clip_norm(f32::NAN), "clip_norm", "NaN"),
        (new().clip_norm(f32::INFINITY), "clip_norm", "inf"),
    ] {
        let error = AdamW::new(&layer(), options).unwrap_err();
        assert!(matches!(&error, Error::Option { option, .. } if *option == name), "{error}");
        assert!(error.to_string().contains(says), "{error}");
    }
}

/// A file with another header.
fn with_header(bytes: &[u8], change: impl Fn(String) -> String) -> Vec<u8> {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = change(String::from_utf8(bytes[8..8 + length].to_vec()).unwrap());
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &bytes[8 + length..]].concat()
}

#[test]
fn files_that_are_not_of_this_optimiser() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("optimizer");
    let mut model = layer();
    let mut optimizer = AdamW::new(&model, options()).unwrap();
    optimizer.step(&mut model, &mut gradient(1)).unwrap();
    optimizer.save(&path).unwrap();
    let valid = fs::read(&path).unwrap();
    let load = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        AdamW::load(&path, &layer())
    };
    for end in 0..valid.len() {
        assert!(load(&valid[..end]).is_err(), "cut short after {end} bytes");
    }

    let header = |from: &'static str, to: &'static str| {
        let changed = with_header(&valid, |header| header.replacen(from, to, 1));
        assert_ne!(changed, valid);
        changed
    };
    let number = |from_end: usize, number: f32| {
        let mut bytes = valid.clone();
        let at = bytes.len() - from_end;
        bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
        bytes
    };
    Hymba::build(HymbaOptions::new(3).hidden_size(8).num_layers(1)).unwrap().save(&path).unwrap();
    let of_a_model = fs::read(&path).unwrap();
    for (bytes, says) in [
        (of_a_model, "missing field `steps`"),
        (header("hymba", "other"), "AdamW::save did not write it"),
        (header(r#"\"version\":1"#, r#"\"version\":2"#), "version 2"),
        (header(r#"\"steps\":1"#, r#"\"steps\":-1"#), "not usable"),
        (header("0.9,", "1.5,"), "betas = 1.5"),
        (header("clip_norm", "clip_more"), "unknown field"),
        (header("first_moment.bias", "first_moment.shift"), "\"first_moment.bias\": missing"),
        (header("[2,3]", "[3,2]"), "has shape [3, 2], expected [2, 3]"),
        (number(4, f32::NAN), "\"second_moment.bias\" holds NaN"),
        (number(4, -1.0), "holds -1"),
        (number(40, f32::INFINITY), "\"first_moment.bias\" holds inf"),
    ] {
        let error = load(&bytes).expect_err(says);
        assert!(error.to_string().contains(says), "{error}");
    }

    // as many steps as can be counted are still no reason to panic
    let mut optimizer = load(&header(r#"\"steps\":1"#, r#"\"steps\":18446744073709551615"#)).unwrap();
    assert_eq!(optimizer.step(&mut model, &mut gradient(2)).unwrap().step, u64::MAX);
    assert!(model.numbers().iter().all(|number| number.is_finite()));

    fs::write(&path, &valid).unwrap();
    assert!(matches!(Hymba::load(&path), Err(Error::Format { .. })));
    assert!(matches!(AdamW::load(folder.path().join("absent"), &layer()), Err(Error::Io { .. })));
    let wide = Layer::new(Array2::zeros((2, 4)), Array1::zeros(3));
    assert!(matches!(AdamW::load(&path, &wide), Err(Error::Tensors { .. })));
    assert!(load(&valid).is_ok());
}

/// What is frozen has no say: not in the norm, not in the steps of the others, and not by numbers that are none.
#[test]
fn gradients_of_what_is_frozen_do_not_count() {
    let start = Layer::new(Array2::from_shape_fn((4, 3), |(i, j)| (i + 2 * j) as f32), Array1::ones(4));
    let options = AdamWOptions::default().clip_norm(1.0).rate_for("weight", 0.0);
    let run = |of_frozen: f32| {
        let (mut layer, mut optimizer) = (start.clone(), AdamW::new(&start, options.clone()).unwrap());
        let mut infos = Vec::new();
        for _ in 0..2 {
            let mut gradient = Layer::new(Array2::from_elem((4, 3), of_frozen), Array1::from_elem(4, 3.0));
            infos.push(optimizer.step(&mut layer, &mut gradient).unwrap());
            assert!(gradient.numbers().iter().all(|x| *x == 0.0));
        }
        (layer, infos)
    };
    let (layer, infos) = run(0.0);
    assert_eq!(infos[0].gradient_norm, 6.0);
    assert!(layer.weight == start.weight && layer.bias != start.bias);
    for of_frozen in [1.0, 1e30, f32::NAN, f32::INFINITY] {
        assert_eq!(run(of_frozen), (layer.clone(), infos.clone()), "{of_frozen}");
    }
}
