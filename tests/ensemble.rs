//! Kernels and an encoder together.

use hymba::ndarray::Array2;
use hymba::train::{Dataset, Targets};
use hymba::{Ensemble, Error, HymbaOptions, KernelPredictor, Predictor, Task, argmax};

fn task() -> Task {
    Task::classify(["slow", "fast"])
}

fn waves(count: usize) -> Vec<Array2<f32>> {
    let value = |i: usize, t: usize| (t as f32 * (0.3 + 0.4 * (i % 2) as f32) + i as f32).sin();
    (0..count).map(|i| Array2::from_shape_fn((20 + i % 7, 1), |(t, _)| value(i, t))).collect()
}

fn data(count: usize) -> Dataset {
    Dataset::new(&task(), waves(count), Targets::Classes((0..count).map(|i| i % 2).collect())).unwrap()
}

fn encoder(task: Task) -> Predictor {
    Predictor::build(HymbaOptions::new(1).hidden_size(8).num_layers(1), task).unwrap()
}

#[test]
fn no_encoder_is_trained_where_the_kernels_leave_nothing_to_gain() {
    let ensemble = Ensemble::fit::<Error>(&data(120), 0, |_| panic!("trained")).unwrap();
    assert!(ensemble.encoder().is_none() && ensemble.share() == 0.0);
    let classes = argmax(&ensemble.predict(&waves(140)[120..]).unwrap());
    assert!(classes.iter().enumerate().all(|(i, class)| i % 2 == *class), "{classes}");
}

#[test]
fn of_few_series_no_encoder_is_trained() {
    let classes = (0..40).map(|i| i * i % 7 % 2).collect();
    let noise = Dataset::new(&task(), waves(40), Targets::Classes(classes)).unwrap();
    assert!(Ensemble::fit::<Error>(&noise, 0, |_| panic!("trained")).unwrap().encoder().is_none());
}

#[test]
fn an_encoder_without_merit_is_left_out() {
    // classes that have nothing to do with the series
    let classes = (0..120).map(|i| i * i % 7 % 2).collect();
    let noise = Dataset::new(&task(), waves(120), Targets::Classes(classes)).unwrap();
    let mut seen = Vec::new();
    let ensemble = Ensemble::fit(&noise, 0, |part| {
        seen.push(part.num_series());
        Ok::<_, Error>(encoder(task()))
    });
    assert_eq!(seen[0], 90, "three quarters");
    assert_eq!(seen.len(), 1 + usize::from(ensemble.unwrap().encoder().is_some()));
}

#[test]
fn both_views_come_back_from_a_file() {
    let (data, series) = (data(12), waves(70));
    let kernels = KernelPredictor::fit(&data, 0).unwrap();
    let alone = kernels.predict(&series).unwrap();
    for (encoder, share) in [(None, 0.0), (Some((encoder(task()), 0.25)), 0.25)] {
        let ensemble = Ensemble::new(kernels.clone(), encoder).unwrap();
        let predicted = ensemble.predict(&series).unwrap();
        assert_eq!(predicted == alone, share == 0.0);
        let read = Ensemble::from_bytes(&ensemble.to_bytes().unwrap()).unwrap();
        assert_eq!((read.share(), read.task()), (share, &task()));
        assert_eq!(read.predict(&series).unwrap(), predicted);
        assert_eq!(read.predict(&series[5..6]).unwrap().row(0), predicted.row(5), "alone");
    }
}

#[test]
fn views_that_do_not_go_together_are_refused() {
    let kernels = KernelPredictor::fit(&data(12), 0).unwrap();
    for share in [-0.1, 1.5, f32::NAN] {
        let error = Ensemble::new(kernels.clone(), Some((encoder(task()), share))).unwrap_err();
        assert!(matches!(error, Error::Option { option: "share", .. }), "{error}");
    }
    let other = encoder(Task::classify(["a", "b"]));
    assert!(matches!(Ensemble::new(kernels.clone(), Some((other, 0.5))), Err(Error::Data(_))));

    let bytes = Ensemble::new(kernels, Some((encoder(task()), 0.5))).unwrap().to_bytes().unwrap();
    let change = |from: &[u8], to: &[u8]| {
        let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
        [&bytes[..at], to, &bytes[at + from.len()..]].concat()
    };
    for (from, to) in [
        (&b"share\\\":0.5"[..], &b"share\\\":7.5"[..]),
        (b"hidden_size\\\":8", b"hidden_size\\\":9"),
        (b"slow", b"snow"),
    ] {
        assert!(Ensemble::from_bytes(&change(from, to)).is_err(), "{}", String::from_utf8_lossy(to));
    }
}
