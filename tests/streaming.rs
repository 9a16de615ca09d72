//! `step`, folded over frames, equals `forward` on the frames so far.

mod common;

use common::{frame, patterns, wave};
use hymba::ndarray::{Array2, Axis, s};
use hymba::{Hymba, HymbaOptions};

/// Frames pass the window several times over.
fn models() -> Vec<Hymba> {
    let small = |width| HymbaOptions::new(width).hidden_size(24).num_heads(3).num_layers(3).state_size(5).seed(3);
    [
        small(7).window_size(6),
        small(24).window_size(1),
        small(7).window_size(9).num_meta_tokens(0),
        small(7).window_size(9).num_meta_tokens(20),
        HymbaOptions::edifice(7).hidden_size(24).num_heads(3).num_layers(3).state_size(5),
        HymbaOptions::edifice(7).hidden_size(24).num_heads(3).num_layers(1).num_meta_tokens(0),
    ]
    .into_iter()
    .chain(patterns())
    .map(|options| Hymba::build(options).unwrap())
    .collect()
}

fn assert_close(got: &Array2<f32>, want: &Array2<f32>, what: &str) {
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() <= 1e-5, "{what}: {got} {want}");
    }
}

#[test]
fn steps_equal_forward_past_the_window() {
    for (i, model) in models().iter().enumerate() {
        for batch in [1, 3] {
            let x = wave(batch, 40, model.options().embed_dim);
            let whole = model.forward_sequence(&x).unwrap();
            let mut state = model.new_state(batch);
            for t in 0..40 {
                let y = model.step(&frame(&x, t), &mut state).unwrap();
                assert_close(&y, &whole.index_axis(Axis(1), t).to_owned(), &format!("model {i} batch {batch} t {t}"));
                if t % 13 == 0 {
                    let forward = model.forward(&x.slice(s![.., ..=t, ..])).unwrap();
                    assert_close(&y, &forward, "forward on the frames so far");
                }
            }
            assert_eq!((state.frames(), state.batch()), (40, batch));
        }
    }
}

#[test]
fn a_cloned_state_goes_its_own_way() {
    for model in models() {
        let x = wave(2, 30, model.options().embed_dim);
        let mut state = model.new_state(2);
        for t in 0..20 {
            model.step(&frame(&x, t), &mut state).unwrap();
        }
        let mut fork = state.clone();
        let other = wave(2, 10, model.options().embed_dim).mapv(|x| 1.0 - x);
        for t in 0..10 {
            model.step(&frame(&other, t), &mut fork).unwrap();
        }
        let mut last = Array2::zeros((0, 0));
        for t in 20..30 {
            last = model.step(&frame(&x, t), &mut state).unwrap();
        }
        assert_close(&last, &model.forward(&x).unwrap(), "the original, after its clone moved on");
    }
}

#[test]
fn streams_of_a_batch_do_not_touch_each_other() {
    for model in models() {
        let x = wave(3, 12, model.options().embed_dim);
        let mut state = model.new_state(3);
        let mut alone = model.new_state(1);
        for t in 0..12 {
            let mut frames = frame(&x, t);
            frames.row_mut(0).fill(if t == 3 { f32::NAN } else { 1e30 });
            let all = model.step(&frames, &mut state).unwrap();
            let one = model.step(&frame(&x, t).slice(s![1..2, ..]), &mut alone).unwrap();
            assert_eq!(all.row(1), one.row(0));
        }
    }
}

#[test]
fn memory_is_flat_past_the_window() {
    let model = Hymba::build(HymbaOptions::new(4).hidden_size(8).num_heads(2).num_layers(2).window_size(100)).unwrap();
    let mut state = model.new_state(2);
    let mut bytes = Vec::new();
    for t in 0..5000 {
        model.step(&Array2::from_elem((2, 4), (t as f32).sin()), &mut state).unwrap();
        bytes.push(state.num_bytes());
    }
    assert!(bytes[98] < bytes[99]);
    assert!(bytes[99..].iter().all(|bytes_then| *bytes_then == bytes[99]));
    assert!(format!("{state:?}").len() < 200 && format!("{model:?}").len() < 1000);
}
