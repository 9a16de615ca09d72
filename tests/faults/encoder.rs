//! The encoder: numbers, memory, threads, platforms.

use hymba::ndarray::{Array1, Array2, Array3};
use hymba::train::{CrossEntropy, RegressionLoss};
use hymba::{Error, Hymba, HymbaOptions, Normalization, Predictor, Task};

fn small() -> HymbaOptions {
    HymbaOptions::new(4).hidden_size(8).num_heads(2).num_layers(2).num_meta_tokens(2)
}

fn largest_difference<'a>(a: impl IntoIterator<Item = &'a f32>, b: impl IntoIterator<Item = &'a f32>) -> f32 {
    a.into_iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |largest, d| if d > largest || d.is_nan() { d } else { largest })
}

// ---- norms ----

/// The frames reach the first norm as they are, and that makes the same of all constant ones.
#[test]
fn constant_frames_are_alike_whatever_the_constant() {
    for (h, edifice) in [(256, false), (96, false), (512, false), (256, true)] {
        let options = if edifice { HymbaOptions::edifice(h) } else { HymbaOptions::new(h) };
        let model = Hymba::build(options.hidden_size(h).num_heads(2).num_layers(1)).unwrap();
        let of = |c: f32| model.inspect(&Array3::from_elem((1, 6, h), c)).unwrap().blocks[0].mamba.clone();
        let one = of(1.0);
        for c in [1.3f32, 10.1, 123.4, 1234.5, 12345.6, 123456.7].into_iter().flat_map(|c| [c, -c, 1.7 * c]) {
            let difference = largest_difference(&of(c), &one);
            assert!(difference <= 1e-6, "h {h}, constant {c}: {difference}");
        }
    }
}

/// Numbers that lie close together far from zero keep their differences.
#[test]
fn an_offset_that_f32_holds_exactly_changes_nothing() {
    let h = 256;
    let model = Hymba::build(HymbaOptions::new(h).hidden_size(h).num_heads(2).num_layers(1)).unwrap();
    // multiples of 1/64, which remain exact beside 2^16
    let x = Array3::from_shape_fn((1, 6, h), |(_, t, i)| ((i * 37 + t * 11) % 64) as f32 / 64.0);
    let mamba = |x: &Array3<f32>| model.inspect(x).unwrap().blocks[0].mamba.clone();
    let difference = largest_difference(&mamba(&x), &mamba(&x.mapv(|x| x + 65536.0)));
    assert!(difference < 1e-5, "{difference}");
}

/// Only the direction of a frame matters to a norm, up to the largest numbers there are.
#[test]
fn frames_whose_squares_overflow() {
    let h = 64;
    let model = Hymba::build(HymbaOptions::new(h).hidden_size(h).num_heads(2).num_layers(1)).unwrap();
    let frames = |size: f32| Array3::from_shape_fn((1, 6, h), |(_, t, i)| size * ((i * 7 + t * 5) % 13) as f32);
    let branches = |size: f32| {
        let seen = model.inspect(&frames(size)).unwrap().blocks.remove(0);
        (seen.mamba, seen.attention, seen.gate)
    };
    let want = branches(1e10);
    for size in [1e17, 1e18, 1e19, 1e20, 1e25, 1e30, 2e37] {
        let got = branches(size);
        assert!(largest_difference(&got.0, &want.0) < 1e-5, "{size}");
        assert!(largest_difference(&got.1, &want.1) < 1e-5, "{size}");
        assert!(largest_difference(&got.2, &want.2) < 1e-5, "{size}");
        assert!(model.forward(&frames(size)).unwrap().iter().all(|y| y.is_finite()), "{size}");
    }
}

// ---- memory ----

fn is_refused<T: std::fmt::Debug>(result: hymba::Result<T>, what: &str) {
    let error = result.expect_err(what);
    assert!(matches!(error, Error::Shape { .. }), "{what}: {error}");
    assert!(error.to_string().contains("smaller") || error.to_string().contains("fewer"), "{what}: {error}");
}

/// More rows than any memory has room for.
const MANY: usize = 1 << if usize::BITS == 64 { 40 } else { 27 };

/// A view that repeats one frame takes no memory, and what comes of it would.
#[test]
fn views_without_end_are_refused() {
    let one = Array1::<f32>::zeros(4);
    let model = Hymba::build(small()).unwrap();
    let mut predictor = Predictor::build(small(), Task::RegressFrames { outputs: 3 }).unwrap();
    predictor.set_input_normalization(Some(Normalization::new(one.clone(), one.mapv(|_| 1.0)).unwrap())).unwrap();
    for shape in [(MANY, 1, 4), (1, MANY, 4), (MANY >> 4, 1 << 4, 4), (MANY >> 2, 1 << 2, 4)] {
        let x = one.broadcast(shape).unwrap();
        let what = format!("{shape:?}");
        is_refused(model.forward(&x), &what);
        is_refused(model.forward_sequence(&x), &what);
        is_refused(model.inspect(&x), &what);
        is_refused(model.forward_train(&x, None, 0).map(|(y, _)| y), &what);
        is_refused(model.forward_sequence_train(&x, None, 0).map(|(y, _)| y), &what);
        is_refused(predictor.predict(&x, None), &what);
        is_refused(predictor.predict_frames(&x), &what);
        is_refused(predictor.forward_train(&x, None, 0).map(|(y, _)| y), &what);
        is_refused(predictor.forward_frames_train(&x, None, 0).map(|(y, _)| y), &what);
    }
    // only the padding has no end
    let x = one.broadcast((2, MANY, 4)).unwrap();
    assert_eq!(model.forward_ragged(&x, &[3, 5]).unwrap().dim(), (2, 8));
    is_refused(model.forward_ragged(&x, &[3, MANY]), "a long row");
    is_refused(model.forward_train(&x, Some(&[3, 5]), 0).map(|(y, _)| y), "padding is kept in training");

    let frames = one.broadcast((MANY, 4)).unwrap();
    let mut state = model.new_state(MANY);
    assert!(matches!(model.step(&frames, &mut state), Err(Error::State(_))));
    assert!(matches!(predictor.step(&frames, &mut predictor.new_state(MANY)), Err(Error::State(_))));
    assert!(matches!(predictor.step(&frames, &mut predictor.new_state(1)), Err(Error::State(_))));

    let x = Array3::zeros((2, 3, 4));
    let (_, cache) = predictor.forward_train(&x, None, 0).unwrap();
    let dy = Array1::<f32>::zeros(3);
    let mut grads = predictor.zeros_like();
    let error = predictor.backward(&cache, &dy.broadcast((MANY, 3)).unwrap(), &mut grads).unwrap_err();
    assert!(matches!(error, Error::Shape { argument: "dy", .. }), "{error}");
}

/// So do the losses of such a view.
#[test]
fn predictions_without_end_are_refused() {
    let one = Array1::<f32>::zeros(4);
    let (few, many) = (one.broadcast((MANY, 4)).unwrap(), one.broadcast((2, MANY, 4)).unwrap());
    for loss in [RegressionLoss::MeanSquaredError, RegressionLoss::Huber { delta: 1.0 }] {
        is_refused(loss.evaluate(&few, &few), "evaluate");
        is_refused(loss.evaluate_sequences(&many, &many, None), "evaluate_sequences");
        is_refused(loss.evaluate_sequences(&many, &many, Some(&[1, 2])), "evaluate_sequences");
    }
    let label = Array1::<usize>::zeros(1);
    let labels = label.broadcast((2, MANY)).unwrap();
    is_refused(CrossEntropy::new().evaluate_sequences(&many, &labels, None), "cross-entropy");
    let wide = Array1::<f32>::zeros(1);
    is_refused(CrossEntropy::new().evaluate(&wide.broadcast((1, MANY)).unwrap(), &[0]), "classes");
}

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "x86")))]
#[test]
fn models_that_do_not_fit_into_memory_are_refused() {
    // few parameters each, but many blocks
    let error = run_limited("blocks");
    assert!(error.contains("num_layers") && error.contains("memory"), "{error}");
}

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "x86")))]
#[test]
fn calls_that_a_process_has_no_room_for_are_refused() {
    for (call, says) in
        [("sequence", "shorter sequences"), ("train", "shorter sequences"), ("state", "do not fit into memory")]
    {
        let error = run_limited(call);
        assert!(error.contains(says), "{call}: {error}");
    }
    // long sequences are read in pieces
    assert_eq!(run_limited("forward"), "none");
}

/// The name of what a child of this test is to do.
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "x86")))]
const CALL: &str = "HYMBA_TEST_CALL";

/// Runs only as a child, with little memory: prints the error of a call.
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "x86")))]
#[test]
fn limited_child() {
    let Ok(call) = std::env::var(CALL) else { return };
    let model = Hymba::build(HymbaOptions::new(1).hidden_size(64).num_layers(2)).unwrap();
    let x = |l| Array3::<f32>::zeros((1, l, 1));
    let error = match call.as_str() {
        "forward" => model.forward(&x(1 << 20)).err(),
        "sequence" => model.forward_sequence(&x(1 << 21)).err(),
        "train" => model.forward_train(&x(1 << 16), None, 0).err(),
        "state" => model.step(&Array2::zeros((100_000, 1)), &mut model.new_state(100_000)).err(),
        _ => {
            let options = HymbaOptions::new(1).hidden_size(1).num_heads(1).state_size(1).num_layers(30_000_000);
            Hymba::build(options).err()
        }
    };
    println!("\nerror {}", error.map_or("none".into(), |error| error.to_string()));
}

/// The error of a call in a process of 600 MB.
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "x86")))]
fn run_limited(call: &str) -> String {
    let output = std::process::Command::new("sh")
        .args(["-c", "ulimit -v 600000 && exec \"$0\" encoder::limited_child --exact --nocapture"])
        .arg(std::env::current_exe().unwrap())
        .env(CALL, call)
        .env("RAYON_NUM_THREADS", "2")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = text.lines().find_map(|line| line.strip_prefix("error "));
    error.unwrap_or_else(|| panic!("{call}: {output:?}")).to_string()
}

// ---- threads ----

/// A child of `fork` has none of its parent's threads: it does everything itself, and the results are the same.
#[cfg(all(target_os = "linux", feature = "rayon"))]
#[test]
fn a_forked_child_computes_what_its_parent_does() {
    let model = Hymba::build(HymbaOptions::new(2)).unwrap();
    let x = crate::common::wave(32, 60, 2);
    let want = model.forward(&x).unwrap(); // the pool starts
    let train = |model: &Hymba| {
        let (y, cache) = model.forward_train(&x, None, 1).unwrap();
        model.backward(&cache, &y, &mut model.zeros_like()).unwrap()
    };
    let gradient = train(&model);
    assert!(in_a_fork(|| {
        let own = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        model.forward(&x).unwrap() == want
            && train(&model) == gradient
            && model
                .forward(&x.index_axis(hymba::ndarray::Axis(0), 3).insert_axis(hymba::ndarray::Axis(0)))
                .unwrap()
                .row(0)
                == want.row(3)
            && own.install(|| model.forward(&x).unwrap()) == want
    }));
}

#[cfg(all(target_os = "linux", feature = "rayon", feature = "lm"))]
#[test]
fn a_forked_child_runs_a_language_model() {
    use hymba::HymbaLm;
    use hymba::lm::LoadOptions;
    let mut config = crate::tiny_lm::config(500);
    (config.hidden_size, config.intermediate_size, config.num_attention_heads) = (256, 512, 8);
    let model = HymbaLm::random(config, 7, &LoadOptions::default()).unwrap();
    let prompt = Array2::from_shape_fn((1, 300), |(_, i)| (i * 7 % 500) as u32);
    let run = || {
        let mut state = model.new_state(1);
        (model.prefill(&prompt, &mut state).unwrap(), model.step(&Array1::from_elem(1, 3), &mut state).unwrap())
    };
    let want = run();
    assert!(in_a_fork(|| run() == want));
}

/// Whether `f` says so in a child of this process, within a minute.
#[cfg(all(target_os = "linux", feature = "rayon"))]
fn in_a_fork(f: impl FnOnce() -> bool) -> bool {
    use std::time::{Duration, Instant};
    // SAFETY: the child has this thread alone, calls nothing of the test harness, and ends without unwinding
    let child = unsafe { libc::fork() };
    if child == 0 {
        let right = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).unwrap_or(false);
        unsafe { libc::_exit(if right { 0 } else { 1 }) }
    }
    assert!(child > 0);
    let start = Instant::now();
    let mut status = 0;
    while unsafe { libc::waitpid(child, &mut status, libc::WNOHANG) } == 0 {
        if start.elapsed() > Duration::from_secs(60) {
            unsafe { libc::kill(child, libc::SIGKILL) };
            unsafe { libc::waitpid(child, &mut status, 0) };
            panic!("the child hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
}
