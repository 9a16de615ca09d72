//! Kernel features and their predictor: series of any kind, threads, files.

use hymba::ndarray::Array2;
use hymba::train::{Dataset, Targets};
use hymba::{Error, KernelFeatures, KernelPredictor, Task, argmax};

/// Waves of `l(i)` frames, whose speed tells class i % classes.
fn waves(count: usize, classes: usize, channels: usize, l: impl Fn(usize) -> usize) -> Vec<Array2<f32>> {
    let wave = |i: usize| {
        let speed = 0.2 + 0.25 * (i % classes) as f32;
        Array2::from_shape_fn((l(i), channels), |(t, c)| {
            let noise = ((i * 7919 + t * 104_729 + c * 31) % 101) as f32 / 101.0 - 0.5;
            (t as f32 * speed + (i * i) as f32 + c as f32).sin() + 0.2 * noise
        })
    };
    (0..count).map(wave).collect()
}

fn data(series: Vec<Array2<f32>>, classes: usize) -> Dataset {
    let labels = (0..classes).map(|class| class.to_string());
    let targets = Targets::Classes((0..series.len()).map(|i| i % classes).collect());
    Dataset::new(&Task::classify(labels), series, targets).unwrap()
}

#[test]
fn classes_of_series_of_any_lengths_and_channels_are_learned() {
    for (channels, shortest) in [(1, 40), (1, 12), (3, 20), (20, 9)] {
        let all = waves(60, 3, channels, |i| shortest + i % 17);
        let (train, test) = all.split_at(30);
        let predictor = KernelPredictor::fit(&data(train.to_vec(), 3), 0).unwrap();
        let right =
            argmax(&predictor.predict(test).unwrap()).into_iter().enumerate().filter(|(i, class)| i % 3 == *class);
        let right = right.count();
        assert!(right >= 26, "{channels} channels, from {shortest} frames on: {right} of 30");
    }
}

#[test]
fn series_shorter_than_a_kernel_or_without_a_shape_are_series_too() {
    let mut all = waves(8, 2, 2, |i| 1 + i % 4);
    all.push(Array2::zeros((30, 2)));
    all.push(Array2::from_elem((1, 2), 1e30));
    let predictor = KernelPredictor::fit(&data(all.clone(), 2), 0).unwrap();
    let predicted = predictor.predict(&all).unwrap();
    assert!(predicted.iter().all(|y| y.is_finite()), "{predicted}");

    let alike = data(vec![Array2::ones((5, 1)); 6], 2);
    let predicted = KernelPredictor::fit(&alike, 0).unwrap().predict(alike.series()).unwrap();
    assert!(predicted.iter().all(|y| *y == 0.0), "{predicted}");
    // and one series of each class
    let two = data(waves(2, 2, 1, |_| 30), 2);
    let predicted = KernelPredictor::fit(&two, 0).unwrap().predict(two.series()).unwrap();
    assert_eq!(argmax(&predicted).to_vec(), [0, 1]);
}

#[test]
fn of_many_series_some_choose_the_strength() {
    let all = waves(800, 2, 1, |_| 12);
    let predictor = KernelPredictor::fit(&data(all.clone(), 2), 0).unwrap();
    let right = argmax(&predictor.predict(&all[..100]).unwrap())
        .iter()
        .enumerate()
        .filter(|(i, class)| i % 2 == **class)
        .count();
    assert!(right >= 98, "{right} of 100");
}

#[test]
fn numbers_of_series_are_learned() {
    let series = waves(40, 7, 1, |_| 60);
    let speed = Array2::from_shape_fn((40, 1), |(i, _)| 1000.0 + (i % 7) as f32);
    let data = Dataset::new(&Task::Regress { outputs: 1 }, series.clone(), Targets::Values(speed.clone())).unwrap();
    let predicted = KernelPredictor::fit(&data, 0).unwrap().predict(&series).unwrap();
    assert!(predicted.iter().zip(&speed).all(|(a, b)| (a - b).abs() < 0.5), "{predicted}");

    let frames = Targets::FrameValues(vec![Array2::zeros((60, 1)); 40]);
    let data = Dataset::new(&Task::RegressFrames { outputs: 1 }, series, frames).unwrap();
    assert!(matches!(KernelPredictor::fit(&data, 0), Err(Error::Data(_))));
}

#[cfg(feature = "rayon")]
#[test]
fn threads_other_series_and_files_change_no_bit() {
    let series = waves(31, 3, 2, |i| 25 + i % 9);
    let data = data(series.clone(), 3);
    let fit = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let predictor = KernelPredictor::fit(&data, 5).unwrap();
            (predictor.to_bytes().unwrap(), predictor.predict(&series).unwrap())
        })
    };
    let (bytes, predicted) = fit(1);
    for threads in [2, 3, 8] {
        let (others, other) = fit(threads);
        assert!(others == bytes && other == predicted, "{threads} threads");
    }
    let read = KernelPredictor::from_bytes(&bytes).unwrap();
    assert_eq!(read.task(), data.task());
    for (i, series) in series.iter().enumerate() {
        assert_eq!(read.predict(std::slice::from_ref(series)).unwrap().row(0), predicted.row(i), "series {i} alone");
    }
    let reversed: Vec<_> = series.iter().rev().cloned().collect();
    let mut back = read.predict(&reversed).unwrap();
    back.invert_axis(hymba::ndarray::Axis(0));
    assert_eq!(back, predicted);
    assert_ne!(KernelPredictor::fit(&data, 6).unwrap().predict(&series).unwrap(), predicted, "another seed");
}

#[test]
fn series_of_other_shapes_are_refused() {
    let series = waves(6, 2, 2, |_| 20);
    let features = KernelFeatures::fit(&series, 0).unwrap();
    assert_eq!(features.num_features(), features.views().iter().sum::<usize>());
    assert_eq!(features.transform(&[]).unwrap().dim(), (0, features.num_features()));
    for bad in [Array2::zeros((20, 3)), Array2::zeros((0, 2)), Array2::zeros((20, 0))] {
        assert!(matches!(features.transform(std::slice::from_ref(&bad)), Err(Error::Shape { .. })));
        assert!(matches!(KernelFeatures::fit(&[series[0].clone(), bad], 0), Err(Error::Shape { .. })));
    }
    assert!(matches!(KernelFeatures::fit(&[], 0), Err(Error::Data(_))));
}

#[test]
fn files_that_were_tampered_with_are_refused() {
    let bytes = KernelPredictor::fit(&data(waves(6, 2, 2, |_| 20), 2), 0).unwrap().to_bytes().unwrap();
    for length in [0, 8, 100, bytes.len() / 2, bytes.len() - 1] {
        assert!(KernelPredictor::from_bytes(&bytes[..length]).is_err(), "cut to {length}");
    }
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let text = String::from_utf8(bytes[8..header].to_vec()).unwrap();
    let changed = |from: &str, to: &str| {
        assert!(text.contains(from), "{text}");
        let text = text.replacen(from, to, 1);
        let mut all = (text.len() as u64).to_le_bytes().to_vec();
        all.extend(text.bytes());
        all.extend(&bytes[header..]);
        KernelPredictor::from_bytes(&all).map(|_| ()).unwrap_err().to_string()
    };
    for (from, to) in [
        (r#"\"channels\":2"#, r#"\"channels\":0"#),
        (r#"\"channels\":2"#, r#"\"channels\":3"#),
        (r#"\"channels\":2"#, r#"\"channels\":18446744073709551615"#),
        (r#"\"dilations\":[[1,"#, r#"\"dilations\":[[0,"#),
        (r#"\"dilations\":[[1,"#, r#"\"dilations\":[[9,"#),
        (r#"\"dilations\":[[1,"#, r#"\"dilations\":[[1,1],[2,18446744073709551615],[3,"#),
        (r#"\"dilations\":[["#, r#"\"dilations\":[],\"others\":[["#),
        (r#"\"labels\":[\"0\","#, r#"\"labels\":[\"0\",\"2\","#),
        (r#"{\"classify\":"#, r#"{\"classify_frames\":"#),
        (r#"\"version\":1"#, r#"\"version\":2"#),
    ] {
        let error = changed(from, to);
        assert!(error.contains("<bytes>"), "{from} {to}: {error}");
    }
    // a scale that cannot be divided by
    let mut bad = bytes.clone();
    let scale = text.find("kernels.input_scale").unwrap();
    let offsets = &text[scale..][text[scale..].find("data_offsets").unwrap()..];
    let start: usize = offsets[offsets.find('[').unwrap() + 1..offsets.find(',').unwrap()].parse().unwrap();
    bad[header + start..][..4].fill(0);
    assert!(KernelPredictor::from_bytes(&bad).unwrap_err().to_string().contains("scale"));
}
