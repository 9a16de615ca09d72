//! Whatever a caller hands over, the answer is an `Error` that says what to change. Files have their own table in
//! `bad_files.rs`.

mod common;

use common::wave;
use hymba::ndarray::{Array2, Array3};
use hymba::{Error, Hymba, HymbaOptions, Pattern};

fn options() -> HymbaOptions {
    HymbaOptions::new(4).hidden_size(8).num_heads(2).num_layers(1)
}

#[test]
fn options_outside_their_range() {
    let new = HymbaOptions::new;
    let table = [
        (new(0), "embed_dim", "at least 1"),
        (new(4).hidden_size(0), "hidden_size", "at least 1"),
        (new(4).state_size(0), "state_size", "at least 1"),
        (new(4).num_layers(0), "num_layers", "at least 1"),
        (new(4).num_heads(0), "num_heads", "at least 1"),
        (new(4).window_size(0), "window_size", "at least 1"),
        (new(4).hidden_size(256).num_heads(3), "hidden_size", "multiple of num_heads = 3, for example 258"),
        (new(4).num_heads(usize::MAX), "hidden_size", "multiple of num_heads"),
        (new(4).dropout(1.0), "dropout", "below 1"),
        (new(4).dropout(-0.1), "dropout", "at least 0"),
        (new(4).dropout(f32::NAN), "dropout", "NaN"),
        (new(4).dropout(f32::INFINITY), "dropout", "inf"),
        (new(usize::MAX), "embed_dim", "than can be counted"),
        (new(4).hidden_size(usize::MAX).num_heads(1), "hidden_size", "than can be counted"),
        (new(4).state_size(usize::MAX), "state_size", "than can be counted"),
        (new(4).num_layers(usize::MAX), "num_layers", "than can be counted"),
        (new(4).num_meta_tokens(usize::MAX), "num_meta_tokens", "than can be counted"),
        (new(4).num_layers(1 << 20), "num_layers", "at most 2147483648"),
        (new(4).hidden_size(usize::MAX), "hidden_size", "multiple of num_heads = 4; change"),
        (new(4).hidden_size(1 << 20), "hidden_size", "at most 2147483648"),
        (HymbaOptions::edifice(4).num_meta_tokens(usize::MAX), "num_meta_tokens", "than can be counted"),
        (HymbaOptions::edifice(4).hidden_size(1 << (usize::BITS - 3)), "hidden_size", "parameters"),
    ];
    for (options, option, says) in table {
        let error = Hymba::build(options.clone()).expect_err(&format!("{options:?}"));
        assert!(matches!(&error, Error::Option { option: named, .. } if *named == option), "{options:?}: {error}");
        assert!(error.to_string().contains(says), "{options:?}: {error}");
    }
}

#[test]
fn unusual_options_that_are_fine() {
    let x = wave(2, 5, 4);
    for options in [
        options().num_meta_tokens(0),
        options().state_size(1),
        options().window_size(1),
        options().window_size(usize::MAX),
        options().hidden_size(1).num_heads(1),
        options().hidden_size(4).num_heads(4),
        options().dropout(0.99),
        options().seed(u64::MAX),
        HymbaOptions::edifice(4).hidden_size(1).num_heads(1).num_layers(1),
        HymbaOptions::edifice(4).hidden_size(4).num_layers(2).window_size(usize::MAX),
    ] {
        let model = Hymba::build(options.clone()).unwrap();
        let y = model.forward(&x).unwrap();
        assert!(y.iter().all(|y| y.is_finite()), "{options:?}");
        let mut state = model.new_state(2);
        model.step(&x.slice(hymba::ndarray::s![.., 0, ..]), &mut state).unwrap();
    }
}

#[test]
fn options_in_files_are_checked_too() {
    let parsed = |text: &str| serde_json::from_str::<HymbaOptions>(text);
    let all = r#"{"embed_dim": 12, "hidden_size": 256, "state_size": 16, "num_layers": 4, "num_heads": 4,
        "num_meta_tokens": 4, "dropout": 0.0, "window_size": 60}"#;
    assert_eq!(parsed(all).unwrap(), HymbaOptions::new(12));
    assert_eq!(parsed(r#"{"embed_dim": 12}"#).unwrap(), HymbaOptions::new(12));
    for options in [HymbaOptions::recommended(3).seed(u64::MAX), HymbaOptions::edifice(5).num_meta_tokens(0)] {
        assert_eq!(parsed(&serde_json::to_string(&options).unwrap()).unwrap(), options);
    }
    let largest = if usize::BITS == 64 { "than can be counted" } else { "invalid value" };
    for (text, says) in [
        ("{}", "embed_dim"),
        (r#"{"embed_dim": 0}"#, "at least 1"),
        (r#"{"embed_dim": -1}"#, "invalid value"),
        (r#"{"embed_dim": 1e400}"#, "number out of range"),
        (r#"{"embed_dim": 12, "hiden_size": 8}"#, "hiden_size"),
        (r#"{"embed_dim": 12, "num_heads": 7}"#, "multiple"),
        (r#"{"embed_dim": 12, "dropout": 2}"#, "below 1"),
        (r#"{"embed_dim": 12, "hidden_size": 18446744073709551615, "num_heads": 1}"#, largest),
        (r#"{"embed_dim": 12, "preset": "other"}"#, "preset"),
    ] {
        let error = parsed(text).unwrap_err().to_string();
        assert!(error.contains(says) || says == "preset" && error.contains("other"), "{text}: {error}");
    }
}

#[test]
fn inputs_that_do_not_fit() {
    let model = Hymba::build(options()).unwrap();
    for shape in [(0, 5, 4), (2, 0, 4), (2, 5, 3), (2, 5, 0), (2, 5, 5), (0, 0, 0)] {
        let x = Array3::zeros(shape);
        let errors = [
            model.forward(&x).unwrap_err(),
            model.forward_sequence(&x).unwrap_err(),
            model.forward_ragged(&x, &vec![5; shape.0]).unwrap_err(),
            model.inspect(&x).unwrap_err(),
        ];
        for error in errors {
            assert!(matches!(error, Error::Shape { .. }), "{error}");
            assert!(error.to_string().contains("embed_dim = 4"), "{error}");
        }
    }
    let x = wave(2, 5, 4);
    for (lengths, says) in [
        (vec![], "0 lengths for a batch of 2"),
        (vec![5], "1 lengths"),
        (vec![5, 5, 5], "3 lengths"),
        (vec![5, 0], "lengths[1] = 0"),
        (vec![6, 5], "lengths[0] = 6"),
        (vec![5, usize::MAX], "from 1 to 5"),
    ] {
        let error = model.forward_ragged(&x, &lengths).unwrap_err();
        assert!(matches!(error, Error::Lengths(_)) && error.to_string().contains(says), "{lengths:?}: {error}");
    }
}

#[test]
fn what_is_too_long_to_inspect() {
    let model = Hymba::build(HymbaOptions::new(1).hidden_size(4).num_heads(2)).unwrap();
    let x = Array3::zeros((1, 1 << 24, 1));
    let error = model.inspect(&x).unwrap_err();
    assert!(matches!(error, Error::Shape { .. }) && error.to_string().contains("shorter"), "{error}");
}

#[test]
fn states_that_do_not_fit() {
    let model = Hymba::build(options()).unwrap();
    let frame = Array2::zeros((2, 4));
    let mut state = model.new_state(2);
    for (frame, says) in [
        (Array2::zeros((0, 4)), "b ≥ 1"),
        (Array2::zeros((2, 3)), "embed_dim = 4"),
        (Array2::zeros((3, 4)), "holds 2 streams, and the frame has 3 rows"),
    ] {
        let error = model.step(&frame, &mut state).unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
    }
    assert_eq!(state.frames(), 0);
    model.step(&frame, &mut state).unwrap();

    let mut other = Hymba::build(options().seed(1)).unwrap();
    let error = other.step(&frame, &mut state).unwrap_err();
    assert!(matches!(error, Error::State(_)) && error.to_string().contains("another model"), "{error}");
    model.clone().step(&frame, &mut state).unwrap();

    let mut state = other.new_state(2);
    other.visit_mut(&mut |_, mut parameter| parameter *= 2.0);
    assert!(other.step(&frame, &mut state).is_err(), "the parameters have changed");

    for batch in [usize::MAX, usize::MAX / 8, 0] {
        let mut state = model.new_state(batch);
        assert!(model.step(&frame, &mut state).is_err());
        assert_eq!(state.batch(), batch);
    }
}

#[test]
fn nan_stays_in_its_row() {
    let shared = options().num_layers(2).pattern(Pattern::SharedAttention { attention_every: 1 });
    let alternating = options().num_layers(2).pattern(Pattern::Alternating { attention_every: 2 });
    let edifice = HymbaOptions::edifice(4).hidden_size(8).num_heads(2).num_layers(2);
    for options in [options().window_size(3), shared.window_size(9), alternating, edifice] {
        let model = Hymba::build(options).unwrap();
        let clean = wave(3, 9, 4);
        let mut x = clean.clone();
        x[[1, 5, 2]] = f32::NAN;
        let (got, want) = (model.forward_sequence(&x).unwrap(), model.forward_sequence(&clean).unwrap());
        for row in [0, 2] {
            assert_eq!(got.index_axis(hymba::ndarray::Axis(0), row), want.index_axis(hymba::ndarray::Axis(0), row));
        }
        for t in 0..9 {
            let row = got.slice(hymba::ndarray::s![1, t, ..]);
            assert_eq!(row.iter().any(|y| y.is_nan()), t >= 5, "frame {t} of the row");
        }
        assert!(model.forward(&x).unwrap().row(1).iter().all(|y| y.is_nan()));
    }
}
