//! Losses and their gradients: PyTorch's numbers, finite differences, frames that do not count, and bad targets.

mod common;

use approx::assert_relative_eq;
use common::wave;
use hymba::Error;
use hymba::ndarray::{Array, Array2, Array3, Axis, Dimension, array, s};
use hymba::train::{CrossEntropy, RegressionLoss};

const MEAN_SQUARED_ERROR: RegressionLoss = RegressionLoss::MeanSquaredError;

fn huber(delta: f32) -> RegressionLoss {
    RegressionLoss::Huber { delta }
}

fn weighted() -> CrossEntropy {
    CrossEntropy::new().class_weights([2.0, 0.5, 1.0]).label_smoothing(0.3)
}

fn close<D: Dimension>(got: &Array<f32, D>, expected: &Array<f32, D>) {
    assert_eq!(got.shape(), expected.shape());
    assert_relative_eq!(got.as_slice().unwrap(), expected.as_slice().unwrap(), epsilon = 2e-7);
}

// import torch
// from torch import nn
// p = torch.tensor([[1.5, -0.25], [0.0, 3.0], [2.0, -1.0]])
// t = torch.tensor([[1.0, 0.5], [-2.0, 3.25], [2.0, 0.5]])
// for loss in nn.MSELoss(), nn.HuberLoss(delta=0.6):
//     q = p.clone().requires_grad_()
//     value = loss(q, t)
//     value.backward()
//     print(value.item(), q.grad)
#[test]
fn regression_as_pytorch() {
    let predictions = array![[1.5, -0.25], [0.0, 3.0], [2.0, -1.0]];
    let targets = array![[1.0, 0.5], [-2.0, 3.25], [2.0, 0.5]];
    for (loss, value, gradient) in [
        (MEAN_SQUARED_ERROR, 1.1875, array![[0.1666667, -0.25], [0.6666667, -0.0833333], [0.0, -0.5]]),
        (huber(0.6), 0.3610417, array![[0.0833333, -0.1], [0.1, -0.0416667], [0.0, -0.1]]),
    ] {
        let got = loss.evaluate(&predictions, &targets).unwrap();
        assert_relative_eq!(got.value, value, max_relative = 1e-6);
        close(&got.gradient, &gradient);
    }
}

fn logits() -> Array2<f32> {
    array![[1.0, -2.0, 0.5], [0.0, 0.25, -0.75], [3.0, 1.0, 2.0], [-1.0, 0.0, 4.0]]
}

const LABELS: [usize; 4] = [0, 2, 1, 2];

// z = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.25, -0.75], [3.0, 1.0, 2.0], [-1.0, 0.0, 4.0]])
// y = torch.tensor([0, 2, 1, 2])
// w = torch.tensor([2.0, 0.5, 1.0])
// for weight, smoothing in [(None, 0.0), (None, 0.1), (w, 0.0), (w, 0.3)]:
//     q = z.clone().requires_grad_()
//     value = nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing)(q, y)
//     value.backward()
//     print(value.item(), q.grad)
#[test]
fn cross_entropy_as_pytorch() {
    let plain = CrossEntropy::new;
    for (loss, value, gradient) in [
        (
            plain(),
            1.1752176,
            array![
                [-0.0990628, 0.0075147, 0.0915481],
                [0.0906983, 0.1164589, -0.2071572],
                [0.1663102, -0.2274924, 0.0611821],
                [0.0016433, 0.004467, -0.0061103]
            ],
        ),
        (
            plain().label_smoothing(0.1),
            1.2398009,
            array![
                [-0.0823961, -0.0008186, 0.0832147],
                [0.082365, 0.1081256, -0.1904905],
                [0.1579769, -0.2108257, 0.0528488],
                [-0.00669, -0.0038663, 0.0105563]
            ],
        ),
        (
            plain().class_weights([2.0, 0.5, 1.0]),
            0.8892587,
            array![
                [-0.1761116, 0.0133595, 0.1627521],
                [0.0806207, 0.103519, -0.1841397],
                [0.0739157, -0.1011077, 0.0271921],
                [0.0014607, 0.0039707, -0.0054314]
            ],
        ),
        (
            weighted(),
            1.14366,
            array![
                [-0.1207643, 0.0005785, 0.1201859],
                [0.0402073, 0.0975839, -0.1377911],
                [0.0590375, -0.0748841, 0.0158466],
                [-0.0429107, -0.0069419, 0.0498526]
            ],
        ),
    ] {
        let got = loss.evaluate(&logits(), &LABELS).unwrap();
        assert_relative_eq!(got.value, value, max_relative = 1e-6);
        close(&got.gradient, &gradient);
    }
}

// q = z.clone().requires_grad_()
// value = nn.CrossEntropyLoss(weight=w, label_smoothing=0.3)(q[:3], y[:3])
// value.backward()
// print(value.item(), q.grad)
#[test]
fn fillers_of_a_ragged_batch_do_not_count() {
    let mut logits = logits().into_shape_with_order((2, 2, 3)).unwrap();
    let expected = array![
        [[-0.1552684, 0.0007437, 0.1545247], [0.0516951, 0.125465, -0.17716]],
        [[0.0759053, -0.0962796, 0.0203743], [0.0, 0.0, 0.0]]
    ];
    for (filler, label) in [(4.0, 2), (f32::NAN, usize::MAX)] {
        logits.slice_mut(s![1, 1, ..]).fill(filler);
        let got = weighted().evaluate_sequences(&logits, &array![[0, 2], [1, label]], Some(&[2, 1])).unwrap();
        assert_relative_eq!(got.value, 1.1201394, max_relative = 1e-6);
        close(&got.gradient, &expected);
        assert!(got.gradient.slice(s![1, 1, ..]).iter().all(|&g| g == 0.0));
    }
}

#[test]
fn sequences_are_the_frames_that_count() {
    let (predictions, targets) = (wave(3, 5, 2), wave(3, 5, 2).mapv(|x| 2.0 * x * x));
    let lengths = [5, 1, 3];
    let (mut padded, mut padded_targets) = (predictions.clone(), targets.clone());
    for (row, &length) in lengths.iter().enumerate() {
        padded.slice_mut(s![row, length.., ..]).fill(f32::INFINITY);
        padded_targets.slice_mut(s![row, length.., ..]).fill(f32::NAN);
    }
    let frames = |x: &Array3<f32>| {
        let rows: Vec<_> = lengths.iter().enumerate().map(|(row, &length)| x.slice(s![row, ..length, ..])).collect();
        hymba::ndarray::concatenate(Axis(0), &rows).unwrap()
    };
    for loss in [MEAN_SQUARED_ERROR, huber(0.5)] {
        let ragged = loss.evaluate_sequences(&padded, &padded_targets, Some(&lengths)).unwrap();
        let flat = loss.evaluate(&frames(&predictions), &frames(&targets)).unwrap();
        assert_eq!(ragged.value, flat.value);
        assert_eq!(frames(&ragged.gradient), flat.gradient);
        for (row, &length) in lengths.iter().enumerate() {
            assert!(ragged.gradient.slice(s![row, length.., ..]).iter().all(|g| g.to_bits() == 0));
        }
        let all = loss.evaluate_sequences(&predictions, &targets, None).unwrap();
        assert_eq!(all, loss.evaluate_sequences(&predictions, &targets, Some(&[5, 5, 5])).unwrap());
    }
}

/// Compares ⟨gradient, direction⟩ with the difference of two values, for a few directions.
fn check_slope(at: &Array3<f32>, evaluate: impl Fn(&Array3<f32>) -> (f32, Array3<f32>)) {
    const STEP: f32 = 1.0 / 64.0;
    let (_, gradient) = evaluate(at);
    for seed in 0..5 {
        let direction =
            wave(at.dim().0 + seed, at.dim().1, at.dim().2).slice(s![seed.., .., ..]).mapv(|x| (9.0 * x).sin());
        let slope: f64 = (&gradient * &direction).iter().map(|&x| f64::from(x)).sum();
        let difference = evaluate(&(at + &direction * STEP)).0 - evaluate(&(at - &direction * STEP)).0;
        assert_relative_eq!(f64::from(difference / (2.0 * STEP)), slope, max_relative = 2e-3, epsilon = 1e-4);
    }
}

#[test]
fn gradients_are_slopes() {
    let (at, targets) = (wave(3, 4, 5), wave(3, 4, 5).mapv(|x| 3.0 * (2.0 * x).cos()));
    let labels = Array2::from_shape_fn((3, 4), |(row, frame)| (row * 3 + frame * 2) % 5);
    let lengths = Some(&[4, 2, 1][..]);
    for loss in [MEAN_SQUARED_ERROR, huber(1e-3), huber(1e3)] {
        check_slope(&at, |predictions| {
            let loss = loss.evaluate_sequences(predictions, &targets, lengths).unwrap();
            (loss.value, loss.gradient)
        });
    }
    let plain = CrossEntropy::new;
    let weights = [0.5, 2.0, 0.0, 1.0, 3.0];
    for loss in [
        plain(),
        plain().label_smoothing(0.2),
        plain().label_smoothing(1.0).class_weights(weights),
        plain().class_weights(weights),
    ] {
        check_slope(&at, |logits| {
            let loss = loss.evaluate_sequences(logits, &labels, lengths).unwrap();
            (loss.value, loss.gradient)
        });
    }
}

#[test]
fn any_memory_order() {
    let (x, targets) = (wave(3, 4, 5), wave(3, 4, 5).mapv(|x| x * x));
    let labels = Array2::from_shape_fn((3, 4), |(row, frame)| (row + frame) % 5);
    let fortran = |x: &Array3<f32>| Array3::from_shape_fn((5, 4, 3), |(i, t, b)| x[[b, t, i]]).reversed_axes();
    let lengths = Some(&[4, 3, 1][..]);
    let loss = MEAN_SQUARED_ERROR;
    assert_eq!(
        loss.evaluate_sequences(&fortran(&x), &fortran(&targets), lengths).unwrap(),
        loss.evaluate_sequences(&x, &targets, lengths).unwrap()
    );
    let fortran_labels = labels.t().as_standard_layout().into_owned().reversed_axes();
    let loss = weighted().class_weights([1.0, 2.0, 3.0, 4.0, 5.0]);
    assert_eq!(
        loss.evaluate_sequences(&fortran(&x), &fortran_labels, lengths).unwrap(),
        loss.evaluate_sequences(&x, &labels, lengths).unwrap()
    );
}

#[test]
fn extreme_logits_are_safe() {
    let loss = CrossEntropy::new().evaluate(&array![[1e30, -1e30], [-3e4, 3e4]], &[0, 1]).unwrap();
    assert_eq!((loss.value, loss.gradient), (0.0, Array2::zeros((2, 2))));
    let loss = CrossEntropy::new().evaluate(&array![[0.0, 1000.0]], &[0]).unwrap();
    assert_eq!((loss.value, loss.gradient), (1000.0, array![[-1.0, 1.0]]));
    let single = CrossEntropy::new().evaluate(&array![[7.0]], &[0]).unwrap();
    assert_eq!((single.value, single.gradient), (0.0, array![[0.0]]));
    // f32 would lose the small differences in the sum
    let mut far = Array2::from_elem((1, 1 << 16), 1.0);
    far[[0, 0]] = 4096.0;
    let loss = MEAN_SQUARED_ERROR.evaluate(&far, &Array2::zeros((1, 1 << 16))).unwrap();
    assert_eq!(loss.value, ((4096.0f64 * 4096.0 + 65535.0) / 65536.0) as f32);
}

#[test]
fn labels_of_weight_zero_teach_nothing() {
    let loss = CrossEntropy::new().class_weights([0.0, 1.0]).label_smoothing(0.1);
    let loss = loss.evaluate(&array![[1.0, 2.0], [3.0, 1.0]], &[0, 0]).unwrap();
    assert_eq!((loss.value, loss.gradient), (0.0, Array2::zeros((2, 2))));
}

#[test]
fn predictions_that_are_not_finite_show_in_the_loss() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for place in [[0, 0], [0, 1], [1, 2]] {
            let mut x = logits().slice(s![..2, ..]).to_owned();
            x[place] = bad;
            for loss in [MEAN_SQUARED_ERROR, huber(1.0)] {
                let loss = loss.evaluate(&x, &Array2::ones((2, 3))).unwrap();
                assert!(!loss.value.is_finite(), "{bad} at {place:?}");
            }
            for loss in [CrossEntropy::new(), weighted()] {
                let loss = loss.evaluate(&x, &[0, 1]).unwrap();
                assert!(!loss.value.is_finite(), "{bad} at {place:?}");
            }
        }
    }
}

fn says(error: Error, text: &str) {
    assert!(error.to_string().contains(text), "{error}");
}

#[test]
fn regression_that_cannot_be() {
    let x = Array2::zeros((2, 3));
    let loss = MEAN_SQUARED_ERROR;
    for shape in [(2, 2), (3, 2), (1, 3)] {
        says(loss.evaluate(&x, &Array2::zeros(shape)).unwrap_err(), "expected [2, 3]");
    }
    for shape in [(0, 3), (2, 0)] {
        says(loss.evaluate(&Array2::zeros(shape), &Array2::zeros(shape)).unwrap_err(), "at least one");
    }
    for bad in [f32::NAN, f32::INFINITY] {
        let mut targets = x.clone();
        targets[[1, 2]] = bad;
        let error = loss.evaluate(&x, &targets).unwrap_err();
        assert!(matches!(error, Error::Targets(_)));
        says(error, "targets[1, 2]");
    }
    for delta in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let error = huber(delta).evaluate(&x, &x).unwrap_err();
        assert!(matches!(error, Error::Option { option: "delta", .. }));
    }

    let x = Array3::zeros((2, 4, 3));
    let mut targets = x.clone();
    targets[[1, 2, 0]] = f32::NEG_INFINITY;
    says(loss.evaluate_sequences(&x, &targets, None).unwrap_err(), "targets[1, 2, 0] = -inf");
    says(loss.evaluate_sequences(&x, &targets, Some(&[4, 3])).unwrap_err(), "targets[1, 2, 0] = -inf");
    assert!(loss.evaluate_sequences(&x, &targets, Some(&[4, 2])).is_ok());
    for (lengths, text) in [(&[4][..], "1 lengths"), (&[0, 4], "lengths[0] = 0"), (&[4, 5], "from 1 to 4")] {
        let error = loss.evaluate_sequences(&x, &x, Some(lengths)).unwrap_err();
        assert!(matches!(error, Error::Lengths(_)));
        says(error, text);
    }
    says(loss.evaluate_sequences(&x, &Array3::zeros((2, 3, 4)), None).unwrap_err(), "expected [2, 4, 3]");
    let empty = Array3::zeros((2, 0, 3));
    says(loss.evaluate_sequences(&empty, &empty, None).unwrap_err(), "at least one");
}

#[test]
fn classes_that_cannot_be() {
    let plain = CrossEntropy::new;
    let x = Array2::zeros((2, 3));
    says(plain().evaluate(&x, &[0, 3]).unwrap_err(), "labels[1] = 3, but there are 3 classes");
    says(plain().evaluate(&x, &[0]).unwrap_err(), "expected [2]");
    says(plain().evaluate(&Array2::zeros((2, 0)), &[0, 0]).unwrap_err(), "at least one");
    says(plain().evaluate(&Array2::zeros((0, 3)), &[]).unwrap_err(), "at least one");
    for smoothing in [-0.1, 1.1, f32::NAN] {
        says(plain().label_smoothing(smoothing).evaluate(&x, &[0, 0]).unwrap_err(), "from 0 to 1");
    }
    for (weights, text) in [
        (vec![], "0 weights"),
        (vec![1.0; 4], "the logits have 3 classes"),
        (vec![1.0, -1.0, 1.0], "-1"),
        (vec![1.0, f32::NAN, 1.0], "NaN"),
        (vec![1.0, f32::INFINITY, 1.0], "inf"),
        (vec![0.0; 3], "all 0"),
    ] {
        says(plain().class_weights(weights).evaluate(&x, &[0, 0]).unwrap_err(), text);
    }

    let x = Array3::zeros((2, 4, 3));
    let mut labels = Array2::zeros((2, 4));
    labels[[1, 2]] = 99;
    says(plain().evaluate_sequences(&x, &labels, Some(&[4, 3])).unwrap_err(), "labels[1, 2] = 99");
    assert!(plain().evaluate_sequences(&x, &labels, Some(&[4, 2])).is_ok());
    says(plain().evaluate_sequences(&x, &Array2::zeros((2, 3)), None).unwrap_err(), "expected [2, 4]");
    says(plain().evaluate_sequences(&x, &labels, Some(&[4, 2, 1])).unwrap_err(), "3 lengths");
}
