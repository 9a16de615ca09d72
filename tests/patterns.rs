//! What holds for one pattern of blocks and not for another. What holds for all is in the tests of each law.

mod common;

use std::collections::BTreeSet;

use common::{frame, patterns, wave};
use hymba::ndarray::{Array2, Array3, s};
use hymba::{Error, Hymba, HymbaOptions, Pattern, Predictor, Task};

fn names(model: &Hymba) -> Vec<String> {
    let mut names = Vec::new();
    model.visit(&mut |name, _| names.push(name.to_string()));
    names
}

/// The counts of the specification.
#[test]
fn parameters() {
    let options = HymbaOptions::new(64).num_layers(6);
    for (pattern, count) in [
        (Pattern::Parallel, 7_778_048),
        (Pattern::Mamba, 5_804_288),
        (Pattern::Attention, 4_756_736),
        (Pattern::Alternating { attention_every: 3 }, 5_455_104),
        (Pattern::SharedAttention { attention_every: 3 }, 4_225_280),
    ] {
        let model = Hymba::build(options.clone().pattern(pattern)).unwrap();
        let mut all = 0;
        model.visit(&mut |_, array| all += array.len());
        assert_eq!((model.num_parameters(), all), (count, count), "{pattern:?}");
    }
    for options in patterns() {
        let model = Hymba::build(options).unwrap();
        let mut all = 0;
        model.visit(&mut |_, array| all += array.len());
        assert_eq!(model.num_parameters(), all, "{:?}", model.options());
    }
}

#[test]
fn the_presets() {
    let alternating = HymbaOptions::new(9).num_layers(6).pattern(Pattern::Alternating { attention_every: 3 });
    assert_eq!(HymbaOptions::jamba(9), alternating);
    let shared = HymbaOptions::new(9).num_layers(6).pattern(Pattern::SharedAttention { attention_every: 3 });
    assert_eq!(HymbaOptions::zamba(9), shared);
    assert_eq!(HymbaOptions::new(9), HymbaOptions::new(9).pattern(Pattern::Parallel));
}

#[test]
fn names_are_those_of_files() {
    let small = |options: HymbaOptions| Hymba::build(options.hidden_size(8).num_heads(2)).unwrap();
    let zamba =
        names(&small(HymbaOptions::zamba(8).num_layers(2).pattern(Pattern::SharedAttention { attention_every: 2 })));
    let mamba = "norm.weight norm.bias mamba.in_proj.weight mamba.conv.weight mamba.conv.bias mamba.x_proj.weight \
        mamba.dt_proj.weight mamba.dt_proj.bias mamba.a_log mamba.d mamba.out_proj.weight";
    let attention = "attention.q_proj.weight attention.q_proj.bias attention.k_proj.weight attention.k_proj.bias \
        attention.v_proj.weight attention.v_proj.bias attention.out_proj.weight attention.out_proj.bias";
    let ffn = "ffn_norm.weight ffn_norm.bias ffn.up.weight ffn.up.bias ffn.down.weight ffn.down.bias";
    let under = |prefix: &str, parts: &[&str]| {
        let names = parts.iter().flat_map(|part| part.split_whitespace());
        names.map(|name| format!("{prefix}{name}")).collect::<Vec<_>>()
    };
    let expected = [
        under("", &["meta_tokens"]),
        under("shared_block.", &["norm.weight norm.bias", attention, ffn]),
        under("blocks.0.", &[mamba]),
        under("blocks.1.", &["shared_proj.weight", mamba]),
        under("final_norm.", &["weight bias"]),
    ];
    assert_eq!(zamba, expected.concat());

    let jamba =
        names(&small(HymbaOptions::jamba(8).num_layers(2).pattern(Pattern::Alternating { attention_every: 2 })));
    let expected = [
        under("", &["meta_tokens"]),
        under("blocks.0.", &[mamba, ffn]),
        under("blocks.1.", &["norm.weight norm.bias", attention, ffn]),
        under("final_norm.", &["weight bias"]),
    ];
    assert_eq!(jamba, expected.concat());
}

/// The bound of a linear map's first weights is 1/√ of the width it reads.
#[test]
fn first_weights_of_the_shared_block() {
    let h = 64;
    let model = Hymba::build(HymbaOptions::zamba(h).hidden_size(h)).unwrap();
    model.visit(&mut |name, array| {
        let largest = array.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        let bound = |inputs: usize| 1.0 / (inputs as f32).sqrt();
        let expected = match name.strip_prefix("shared_block.").or(name.strip_prefix("blocks.2.")) {
            Some("attention.q_proj.weight" | "attention.out_proj.weight") => bound(2 * h),
            Some("ffn.up.weight" | "shared_proj.weight") => bound(h),
            Some("ffn.down.weight") => bound(4 * h),
            Some("norm.weight" | "ffn_norm.weight") => 1.0,
            Some("attention.q_proj.bias" | "ffn.up.bias" | "norm.bias") => 0.0,
            _ => return,
        };
        assert!(largest <= expected && largest >= 0.95 * expected, "{name}: {largest} {expected}");
    });
}

#[test]
fn patterns_that_cannot_be() {
    let of = |pattern, layers| HymbaOptions::new(4).hidden_size(8).num_heads(2).num_layers(layers).pattern(pattern);
    let alternating = |attention_every, layers| of(Pattern::Alternating { attention_every }, layers);
    let shared = |attention_every, layers| of(Pattern::SharedAttention { attention_every }, layers);
    for (options, every, range) in [
        (alternating(0, 6), "0", "from 2 to num_layers = 6"),
        (alternating(1, 6), "1", "from 2 to num_layers = 6"),
        (alternating(7, 6), "7", "from 2 to num_layers = 6"),
        (alternating(usize::MAX, 6), "18446744073709551615", "from 2 to num_layers = 6"),
        (alternating(1, 1), "1", "from 2 to num_layers = 1"),
        (shared(0, 6), "0", "from 1 to num_layers = 6"),
        (shared(7, 6), "7", "from 1 to num_layers = 6"),
    ] {
        let json = serde_json::to_string(&options).unwrap();
        let error = Hymba::build(options).unwrap_err();
        assert!(matches!(&error, Error::Option { option: "attention_every", .. }), "{error}");
        for error in [error.to_string(), serde_json::from_str::<HymbaOptions>(&json).unwrap_err().to_string()] {
            assert!(error.contains(&format!("attention_every = {every}")) || usize::BITS < 64, "{error}");
            assert!(error.contains(range) || every == "0" && error.contains("num_layers"), "{error}");
        }
    }
    for options in [alternating(2, 2), alternating(6, 6), shared(1, 1), shared(6, 6)] {
        assert!(Hymba::build(options).is_ok());
    }

    // heads are heads even where nothing attends
    let error = of(Pattern::Mamba, 2).num_heads(3).validate().unwrap_err();
    assert!(matches!(error, Error::Option { option: "hidden_size", .. }));
    let error = HymbaOptions::edifice(4).pattern(Pattern::Mamba).validate().unwrap_err();
    assert!(matches!(&error, Error::Option { option: "pattern", given, .. } if given == "mamba"), "{error}");
    let error = Hymba::load_edifice("absent", of(Pattern::Attention, 2)).unwrap_err();
    assert!(error.to_string().contains("pattern"), "{error}");

    for (pattern, says) in [
        (r#"{"kind": "jamba"}"#, "pattern"),
        (r#"{"kind": "alternating"}"#, "pattern"),
        (r#"{"kind": "shared_attention", "attention_every": -2}"#, "attention_every = -2"),
        (r#"{"kind": "alternating", "attention_every": 5}"#, "attention_every = 5"),
    ] {
        let text = format!(r#"{{"embed_dim": 3, "pattern": {pattern}}}"#);
        let error = serde_json::from_str::<HymbaOptions>(&text).unwrap_err().to_string();
        assert!(error.contains(says), "{pattern}: {error}");
    }
    let huge = shared(3, usize::MAX);
    assert!(matches!(Hymba::build(huge), Err(Error::Option { option: "num_layers", .. })));
    let wide = shared(3, 6).hidden_size(1 << 20);
    assert!(matches!(Hymba::build(wide), Err(Error::Option { option: "hidden_size", .. })));
}

/// Files of parallel models do not say so, as they never did.
#[test]
fn the_parallel_pattern_leaves_no_trace() {
    let options = HymbaOptions::new(3);
    assert!(!serde_json::to_string(&options).unwrap().contains("pattern"));
    let text = r#"{"embed_dim": 3, "pattern": {"kind": "parallel"}}"#;
    assert_eq!(serde_json::from_str::<HymbaOptions>(text).unwrap(), options);
}

#[test]
fn files_of_one_pattern_are_not_those_of_another() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let all = [
        Pattern::Parallel,
        Pattern::Mamba,
        Pattern::Attention,
        Pattern::Alternating { attention_every: 2 },
        Pattern::Alternating { attention_every: 3 },
        Pattern::SharedAttention { attention_every: 1 },
        Pattern::SharedAttention { attention_every: 2 },
    ];
    let options = HymbaOptions::new(5).hidden_size(8).num_heads(2).num_layers(4);
    for one in all {
        let model = Hymba::build(options.clone().pattern(one)).unwrap();
        model.save(&path).unwrap();
        let bytes = model.to_bytes().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
        assert_eq!(Hymba::from_bytes(&bytes).unwrap().options().pattern, one);
        for other in all.into_iter().filter(|other| *other != one) {
            let error = Hymba::load_with(&path, options.clone().pattern(other)).unwrap_err();
            assert!(matches!(error, Error::Tensors { .. }), "{one:?} as {other:?}: {error}");
            let grads = Hymba::build(options.clone().pattern(other)).unwrap();
            let x = wave(1, 5, 5);
            let (y, cache) = model.forward_train(&x, None, 0).unwrap();
            assert!(matches!(model.backward(&cache, &y, &mut grads.zeros_like()), Err(Error::State(_))));
        }
    }
}

/// As many blocks as a file can hold, of the kind that has the fewest tensors, are read; more are refused before memory is taken.
#[test]
fn deep_models_in_files() {
    let deep = |layers, every| {
        let options = HymbaOptions::new(1).hidden_size(1).num_heads(1).state_size(1).num_layers(layers);
        options.pattern(Pattern::SharedAttention { attention_every: every })
    };
    let model = Hymba::build(deep(1400, 1400)).unwrap();
    let bytes = model.to_bytes().unwrap();
    assert_eq!(Hymba::from_bytes(&bytes).unwrap().options(), model.options());
    assert!(Hymba::build(deep(1600, 2)).unwrap().to_bytes().unwrap_err().to_string().contains("num_layers"));
}

#[test]
fn states_go_through_files_and_are_those_of_one_pattern() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    for options in patterns() {
        let model = Hymba::build(options.clone()).unwrap();
        let x = wave(2, 40, options.embed_dim);
        let mut state = model.new_state(2);
        model.prefill(&x.slice(s![.., ..23, ..]), &mut state).unwrap();
        model.save_state(&state, &path).unwrap();
        let mut loaded = model.load_state(&path).unwrap();
        let mut swapped = state.select(&[1, 0]).unwrap();
        swapped.append(state.clone()).unwrap();
        for t in 23..40 {
            let y = model.step(&frame(&x, t), &mut state).unwrap();
            assert_eq!(model.step(&frame(&x, t), &mut loaded).unwrap(), y, "{options:?}");
            let four =
                hymba::ndarray::concatenate![hymba::ndarray::Axis(0), frame(&x, t).slice(s![..;-1, ..]), frame(&x, t)];
            let got = model.step(&four, &mut swapped).unwrap();
            assert_eq!(got.slice(s![2.., ..]), y);
            assert_eq!(got.slice(s![..2;-1, ..]), y);
        }
        assert_eq!(loaded.lengths(), [40, 40]);
        loaded.reset(0).unwrap();
        let y = model.step(&frame(&x, 0), &mut loaded).unwrap();
        assert_eq!(y.row(0), model.step(&frame(&x, 0), &mut model.new_state(2)).unwrap().row(0));
        let other = Hymba::build(options.num_meta_tokens(2)).unwrap();
        assert!(matches!(other.load_state(&path), Err(Error::State(_))));
    }
    // the same weights in another order of the same sizes are other weights
    let of = |window| Hymba::build(HymbaOptions::jamba(3).hidden_size(8).num_heads(2).window_size(window)).unwrap();
    of(4).save_state(&of(4).new_state(1), &path).unwrap();
    assert!(of(4).load_state(&path).is_ok() && of(5).load_state(&path).is_err());
}

/// What the documentation of `new_state` says, in bytes.
#[test]
fn the_size_of_a_stream() {
    let (h, n, k, w, a) = (24, 5, 3, 7, 3);
    let options = HymbaOptions::new(4).hidden_size(h).state_size(n).num_meta_tokens(k).window_size(w).num_heads(a);
    let (mamba, kv) = (2 * h * (n + 3), 2 * h * (k + w));
    for (pattern, numbers) in [
        (Pattern::Parallel, 6 * (mamba + kv)),
        (Pattern::Mamba, 6 * mamba),
        (Pattern::Attention, 6 * kv),
        (Pattern::Alternating { attention_every: 3 }, 4 * mamba + 2 * kv),
        (Pattern::SharedAttention { attention_every: 3 }, 6 * mamba + 2 * (2 * kv)),
    ] {
        let model = Hymba::build(options.clone().num_layers(6).pattern(pattern)).unwrap();
        let mut state = model.new_state(1);
        for _ in 0..3 * w {
            model.step(&Array2::ones((1, 4)), &mut state).unwrap();
        }
        assert_eq!(state.num_bytes(), 4 * numbers, "{pattern:?}");
    }
}

#[test]
fn the_summary_counts_once_and_shows_uses() {
    let zamba = Hymba::build(HymbaOptions::zamba(64)).unwrap().summary();
    for line in [
        "shared_block.attention.q_proj.weight        [512, 512]           262,144",
        "blocks.{2,5}.shared_proj.weight",
        "blocks.{0..=5}.mamba.out_proj.weight",
        "4,225,280 parameters",
        "pattern shared_attention, attention_every 3; shared_block is used 2 times, by blocks.{2,5}",
    ] {
        assert!(zamba.contains(line), "{line}\n{zamba}");
    }
    let jamba = Hymba::build(HymbaOptions::jamba(64)).unwrap().summary();
    for line in ["blocks.{0..=1,3..=4}.mamba.d ", "blocks.{2,5}.attention.", "pattern alternating, attention_every 3\n"]
    {
        assert!(jamba.contains(line), "{line}\n{jamba}");
    }
    assert!(!Hymba::build(HymbaOptions::new(64)).unwrap().summary().contains("pattern"));
}

#[test]
fn inspect_shows_what_a_block_has() {
    let options = HymbaOptions::new(5).hidden_size(16).num_heads(2).num_layers(3);
    let x = wave(2, 9, 5);
    let seen = |pattern| Hymba::build(options.clone().pattern(pattern)).unwrap().inspect(&x).unwrap();
    for (depth, block) in seen(Pattern::SharedAttention { attention_every: 2 }).blocks.iter().enumerate() {
        assert_eq!((block.mamba.dim(), block.output.dim()), ((2, 9, 16), (2, 9, 16)));
        assert!(block.attention.is_empty() && block.gate.is_empty());
        assert_eq!((block.shared_output.is_empty(), block.attention_weights.is_empty()), (depth != 1, depth != 1));
    }
    let blocks = seen(Pattern::Alternating { attention_every: 3 }).blocks;
    assert!(blocks[0].attention.is_empty() && blocks[0].attention_weights.is_empty() && !blocks[0].mamba.is_empty());
    assert!(blocks[2].mamba.is_empty());
    let weights = &blocks[2].attention_weights;
    assert_eq!(weights.dim(), (2, 2, 9, 4 + 9));
    assert!(weights.sum_axis(hymba::ndarray::Axis(3)).iter().all(|sum| (sum - 1.0).abs() < 1e-5));
}

/// Where the window is 1 and there are no meta tokens, attention mixes nothing; the pure attention model then sees one frame.
#[test]
fn what_a_pattern_can_see() {
    let options = HymbaOptions::new(5).hidden_size(16).num_heads(2).num_layers(2).num_meta_tokens(0).window_size(1);
    let x = wave(1, 9, 5);
    let reads_the_past = |pattern| {
        let model = Hymba::build(options.clone().pattern(pattern)).unwrap();
        model.forward(&x).unwrap() != model.forward(&x.slice(s![.., 8.., ..])).unwrap()
    };
    assert!(!reads_the_past(Pattern::Attention));
    for pattern in
        [Pattern::Mamba, Pattern::Alternating { attention_every: 2 }, Pattern::SharedAttention { attention_every: 1 }]
    {
        assert!(reads_the_past(pattern));
    }
}

#[test]
fn predictors_of_every_pattern() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("predictor.safetensors");
    let mut losses = BTreeSet::new();
    for options in patterns() {
        let predictor = Predictor::build(options.clone(), Task::RegressFrames { outputs: 2 }).unwrap();
        predictor.save(&path).unwrap();
        let loaded = Predictor::load(&path).unwrap();
        let x = wave(2, 20, options.embed_dim);
        let y = predictor.predict_frames(&x).unwrap();
        assert_eq!(loaded.predict_frames(&x).unwrap(), y);
        let mut state = loaded.new_state(2);
        for t in 0..20 {
            let step = loaded.step(&frame(&x, t), &mut state).unwrap();
            assert!(step.iter().zip(y.slice(s![.., t, ..])).all(|(a, b)| (a - b).abs() < 1e-5));
        }
        losses.insert(y[[0, 19, 0]].to_bits());
    }
    assert_eq!(losses.len(), patterns().len(), "every pattern computes something else");
}

/// Where no block has a state, its size is nobody's.
#[test]
fn a_state_size_that_nobody_has_may_be_anything() {
    let options = HymbaOptions::new(4).hidden_size(16).num_layers(1).pattern(Pattern::Attention).state_size(usize::MAX);
    let model = Hymba::build(options).unwrap();
    assert_eq!(model.forward(&Array3::ones((1, 3, 4))).unwrap().dim(), (1, 16));
}
