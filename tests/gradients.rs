//! Gradients against those of independent implementations in float64 (see `tests/data/README.md`), and the laws of the way
//! back that hold for any model.

mod common;

use std::collections::BTreeMap;

use common::{HYBRIDS, data, frames, model, patterns, tensors, wave};
use hymba::ndarray::{Array2, Array3, ArrayD, Axis, s};
use hymba::{Error, Hymba, HymbaOptions};

fn by_name(model: &Hymba) -> BTreeMap<String, ArrayD<f32>> {
    let mut all = BTreeMap::new();
    model.visit(&mut |name, array| {
        all.insert(name.to_string(), array.to_owned());
    });
    all
}

fn matrix(array: &ArrayD<f64>) -> Array2<f32> {
    array.mapv(|x| x as f32).into_dimensionality().unwrap()
}

/// |Δ| ≤ 3e-4 · max(largest entry of the tensor, 1e-3 · largest entry of all)
fn check(case: &str, got: &BTreeMap<String, ArrayD<f32>>, want: &BTreeMap<String, ArrayD<f64>>) {
    let largest = |array: &ArrayD<f64>| array.iter().fold(0f64, |m, x| m.max(x.abs()));
    let of_all = want.values().map(largest).fold(0.0, f64::max);
    assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>(), "{case}");
    for (name, want) in want {
        let bound = 3e-4 * largest(want).max(1e-3 * of_all);
        let difference = common::difference(&got[name], want);
        assert!(difference <= bound, "{case} {name}: {difference:e} over {bound:e}");
    }
}

#[test]
fn hymba_gradients() {
    let cases = ["small", "no_input_projection", "longer_than_window", "ragged_lengths"].map(|case| ("hymba", case));
    for (of, case) in cases.into_iter().chain(HYBRIDS.map(|case| ("hybrids", case))) {
        let folder = data(of).join(case);
        let model = model(&folder);
        let expected = tensors(&folder.join("expected.safetensors"));
        let x = frames(&expected["input"]);
        let lengths: Option<Vec<usize>> =
            expected.get("lengths").map(|lengths| lengths.iter().map(|length| *length as usize).collect());
        let (y, cache) = model.forward_train(&x, lengths.as_deref(), 0).unwrap();
        assert!(common::difference(&y, &expected["output"]) <= 1e-5);
        let mut grads = model.zeros_like();
        let dx = model.backward(&cache, &matrix(&expected["cotangent"]), &mut grads).unwrap();
        let mut got = by_name(&grads);
        got.insert("input".into(), dx.into_dyn());
        check(case, &got, &tensors(&folder.join("grads.safetensors")));
    }
}

/// The file has the gradients under the names of Edifice; read as a model, they are under ours and in our order of axes.
#[test]
fn edifice_gradients() {
    let folder = data("edifice").join("grad_small");
    let options = common::options(&folder);
    let model = Hymba::load_edifice(folder.join("model.safetensors"), options.clone()).unwrap();
    let expected = tensors(&folder.join("expected.safetensors"));
    let (y, cache) = model.forward_train(&frames(&expected["input"]), None, 0).unwrap();
    assert!(common::difference(&y, &expected["output"]) <= 2e-5);
    let mut grads = model.zeros_like();
    let dx = model.backward(&cache, &matrix(&expected["cotangent"]), &mut grads).unwrap();
    let mut got = by_name(&grads);
    got.insert("input".into(), dx.into_dyn());

    let mut want = tensors(&folder.join("grads.safetensors"));
    let input = want.remove("input").unwrap();
    let renamed = tempfile::tempdir().unwrap();
    let path = renamed.path().join("grads");
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = want
        .iter()
        .map(|(name, array)| {
            (name.clone(), array.shape().to_vec(), array.iter().flat_map(|x| x.to_le_bytes()).collect())
        })
        .collect();
    let views = bytes.iter().map(|(name, shape, bytes)| {
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F64, shape.clone(), bytes).unwrap())
    });
    std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    let mut want: BTreeMap<_, _> = by_name(&Hymba::load_edifice(&path, options).unwrap())
        .into_iter()
        .map(|(name, array)| (name, array.mapv(f64::from)))
        .collect();
    want.insert("input".into(), input);
    check("edifice", &got, &want);
}

fn models() -> Vec<Hymba> {
    let small = |width| HymbaOptions::new(width).hidden_size(24).num_heads(3).num_layers(3).state_size(5).seed(3);
    [
        small(7).window_size(6),
        small(24).window_size(40).num_meta_tokens(1),
        small(7).window_size(9).num_meta_tokens(0),
        small(7).window_size(2).num_meta_tokens(20).dropout(0.4),
        small(7).num_layers(1).dropout(0.5),
        HymbaOptions::edifice(7).hidden_size(24).num_heads(3).num_layers(2).state_size(5),
        HymbaOptions::edifice(7).hidden_size(24).num_heads(3).num_layers(2).state_size(5).dropout(0.3),
    ]
    .into_iter()
    .chain(patterns())
    .chain(patterns().into_iter().map(|options| options.dropout(0.4)))
    .map(|options| Hymba::build(options).unwrap())
    .collect()
}

#[test]
fn outputs_equal_those_of_inference_to_the_bit() {
    for model in models().iter().filter(|model| model.options().dropout == 0.0) {
        let x = wave(3, 40, model.options().embed_dim);
        let lengths = [40, 1, 23];
        let (y, _) = model.forward_train(&x, Some(&lengths), 0).unwrap();
        assert_eq!(y, model.forward_ragged(&x, &lengths).unwrap());
        let (y, _) = model.forward_sequence_train(&x, None, 0).unwrap();
        assert_eq!(y, model.forward_sequence(&x).unwrap());
    }
}

/// Σ w ⊙ outputs along a random direction of all inputs and parameters, against the gradient. In f32 the difference quotient
/// is good for three digits or so; the golden data are good for more.
#[test]
fn directional_differences() {
    for (i, model) in models().iter().enumerate() {
        let x = wave(2, 37, model.options().embed_dim);
        let lengths: &[usize] = &[37, 20];
        let weights = wave(2, 37, 24).mapv(|w| w / 10.0);
        for sequence in [false, true] {
            let mut weights = weights.clone();
            weights.slice_mut(s![1, 20.., ..]).fill(0.0);
            let value = |model: &Hymba, x: &Array3<f32>| -> f64 {
                let product =
                    |y: &Array3<f32>, w: &Array3<f32>| y.iter().zip(w).map(|(y, w)| *y as f64 * *w as f64).sum::<f64>();
                if sequence {
                    product(&model.forward_sequence_train(x, Some(lengths), 7).unwrap().0, &weights)
                } else {
                    let y = model.forward_train(x, Some(lengths), 7).unwrap().0.insert_axis(Axis(1));
                    product(&y, &weights.slice(s![.., ..1, ..]).to_owned())
                }
            };
            let mut grads = model.zeros_like();
            let dx = if sequence {
                let (_, cache) = model.forward_sequence_train(&x, Some(lengths), 7).unwrap();
                model.backward_sequence(&cache, &weights, &mut grads).unwrap()
            } else {
                let (_, cache) = model.forward_train(&x, Some(lengths), 7).unwrap();
                model.backward(&cache, &weights.index_axis(Axis(1), 0), &mut grads).unwrap()
            };
            assert!(dx.slice(s![1, 20.., ..]).iter().all(|dx| *dx == 0.0), "padding");

            let direction = |i: usize| ((i * 7919 % 101) as f32 / 50.0 - 1.0) * 2e-4;
            let moved = |sign: f32| {
                let mut model = model.clone();
                model.visit_mut(&mut |_, mut p| p.iter_mut().enumerate().for_each(|(i, p)| *p += sign * direction(i)));
                let mut x = x.clone();
                x.iter_mut().enumerate().for_each(|(i, x)| *x += sign * direction(i));
                value(&model, &x)
            };
            let slope = moved(1.0) - moved(-1.0);
            let mut want = 0.0;
            let mut add = |array: &mut dyn Iterator<Item = &f32>| {
                want += 2.0 * array.enumerate().map(|(i, g)| *g as f64 * direction(i) as f64).sum::<f64>();
            };
            add(&mut dx.iter());
            grads.visit(&mut |_, array| add(&mut array.iter()));
            assert!((slope - want).abs() <= 3e-3 * want.abs().max(1e-2), "model {i} {sequence}: {slope} {want}");
        }
    }
}

/// A step that reads the last frames only leaves the rest of the last block out. The outputs stay those of the step that reads every
/// frame, dropout included, and the gradients are those of a loss that ignores all but the last.
#[test]
fn the_last_frames_alone() {
    // with 96 inner channels z begins at a panel of the products, with 48 it does not
    let wide = HymbaOptions::recommended(7).hidden_size(48).num_heads(3).num_layers(2).state_size(5).dropout(0.2);
    for (i, model) in models().iter().chain(&[Hymba::build(wide).unwrap()]).enumerate() {
        let h = model.options().hidden_size;
        let x = wave(3, 37, model.options().embed_dim);
        let lengths = [37, 1, 20];
        let dy = wave(1, 3, h).index_axis(Axis(0), 0).to_owned();
        let mut dall = Array3::zeros((3, 37, h));
        let (last, cache) = model.forward_train(&x, Some(&lengths), 7).unwrap();
        let (all, cache_of_all) = model.forward_sequence_train(&x, Some(&lengths), 7).unwrap();
        for (row, length) in lengths.into_iter().enumerate() {
            assert_eq!(last.row(row), all.slice(s![row, length - 1, ..]), "model {i}");
            dall.slice_mut(s![row, length - 1, ..]).assign(&dy.row(row));
        }
        let (mut got, mut want) = (model.zeros_like(), model.zeros_like());
        let dx = model.backward(&cache, &dy, &mut got).unwrap();
        let dx_of_all = model.backward_sequence(&cache_of_all, &dall, &mut want).unwrap();
        let (mut got, mut want) = (by_name(&got), by_name(&want));
        got.insert("input".into(), dx.into_dyn());
        want.insert("input".into(), dx_of_all.into_dyn());
        let want: BTreeMap<_, _> = want.into_iter().map(|(name, array)| (name, array.mapv(f64::from))).collect();
        check(&format!("model {i}"), &got, &want);
    }
}

#[test]
fn a_batch_is_the_sum_of_its_rows_and_gradients_add_up() {
    for model in models().iter().filter(|model| model.options().dropout == 0.0) {
        let x = wave(3, 30, model.options().embed_dim);
        let lengths = [30, 4, 17];
        let dy = wave(1, 3, 24).index_axis(Axis(0), 0).to_owned();
        let mut together = model.zeros_like();
        let (_, cache) = model.forward_train(&x, Some(&lengths), 0).unwrap();
        let dx = model.backward(&cache, &dy, &mut together).unwrap();
        let mut alone = model.zeros_like();
        for (row, &length) in lengths.iter().enumerate() {
            let (_, cache) = model.forward_train(&x.slice(s![row..=row, ..length, ..]), None, 0).unwrap();
            let one = model.backward(&cache, &dy.slice(s![row..=row, ..]), &mut alone).unwrap();
            let difference = &one.index_axis(Axis(0), 0) - &dx.slice(s![row, ..length, ..]);
            assert!(difference.iter().all(|d| d.abs() < 1e-5));
        }
        let want: BTreeMap<_, _> = by_name(&alone).into_iter().map(|(n, a)| (n, a.mapv(f64::from))).collect();
        check("rows", &by_name(&together), &want);
    }
}

#[cfg(feature = "rayon")]
#[test]
fn any_number_of_threads() {
    let options = HymbaOptions::recommended(20).hidden_size(128).num_layers(2).window_size(30);
    use hymba::Pattern;
    let alternating = Pattern::Alternating { attention_every: 2 };
    let shared = Pattern::SharedAttention { attention_every: 1 };
    for pattern in [Pattern::Parallel, alternating, shared] {
        let model = Hymba::build(options.clone().pattern(pattern)).unwrap();
        let x = wave(12, 40, 20);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut grads = model.zeros_like();
                let (y, cache) = model.forward_train(&x, None, 5).unwrap();
                let dx = model.backward(&cache, &y, &mut grads).unwrap();
                (y, dx, by_name(&grads))
            })
        };
        let one = run(1);
        for &threads in common::threads() {
            assert_eq!(run(threads), one, "{pattern:?} {threads} threads");
        }
    }
}

#[test]
fn what_does_not_go_together() {
    let options = HymbaOptions::new(4).hidden_size(8).num_heads(2).num_layers(1);
    let mut model = Hymba::build(options.clone()).unwrap();
    let x = wave(2, 5, 4);
    let (y, cache) = model.forward_train(&x, None, 0).unwrap();
    let (sequence, sequence_cache) = model.forward_sequence_train(&x, None, 0).unwrap();
    let mut grads = model.zeros_like();

    assert!(matches!(model.forward_train(&x, Some(&[5]), 0), Err(Error::Lengths(_))));
    assert!(matches!(model.forward_train(&wave(2, 5, 3), None, 0), Err(Error::Shape { .. })));
    let short = y.slice(s![..1, ..]).to_owned();
    assert!(matches!(model.backward(&cache, &short, &mut grads), Err(Error::Shape { .. })));
    assert!(matches!(model.backward(&sequence_cache, &y, &mut grads), Err(Error::State(_))));
    assert!(matches!(model.backward_sequence(&cache, &sequence, &mut grads), Err(Error::State(_))));
    let mut other = Hymba::build(options.num_layers(2)).unwrap();
    assert!(matches!(model.backward(&cache, &y, &mut other), Err(Error::State(_))));
    assert!(by_name(&grads).values().all(|g| g.iter().all(|g| *g == 0.0)), "nothing was added");
    model.visit_mut(&mut |_, mut parameter| parameter *= 0.5);
    let error = model.backward(&cache, &y, &mut grads).unwrap_err();
    assert!(error.to_string().contains("parameters have changed"), "{error}");
    assert!(format!("{cache:?}").len() < 200);
}
