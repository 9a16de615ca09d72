//! Every instruction set the CPU has is really taken when asked for, and gives the same model. The kernels themselves are
//! tested one by one beside their code.

mod common;

use std::process::Command;

use common::wave;
use hymba::{Hymba, HymbaOptions};

const CHILD: &str = "HYMBA_TEST_CHILD";

/// Runs only as a child process: prints the level and some results.
#[test]
fn child() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let model = Hymba::build(HymbaOptions::new(11).hidden_size(48).num_layers(2).window_size(20).seed(4)).unwrap();
    let y = model.forward(&wave(2, 50, 11)).unwrap();
    println!("\nlevel {}", hymba::simd_level());
    y.iter().for_each(|y| println!("y {y}"));
}

/// What starts this program, if the system cannot: an emulator of another kind of CPU, with its arguments.
const RUNNER: &str = "HYMBA_TEST_RUNNER";

/// Nothing where the system cannot start this program again, and nobody says what does.
fn run(level: &str) -> Option<(String, Vec<f32>)> {
    let runner = std::env::var(RUNNER).unwrap_or_default();
    let program = std::env::current_exe().unwrap();
    let mut words = runner.split_whitespace().map(std::ffi::OsStr::new).chain([program.as_os_str()]);
    let output = Command::new(words.next().unwrap())
        .args(words)
        .args(["child", "--exact", "--nocapture"])
        .env(CHILD, "1")
        .env("HYMBA_SIMD", level)
        .output();
    const FORMAT: i32 = 8; // ENOEXEC
    if output.as_ref().is_err_and(|error| cfg!(unix) && error.raw_os_error() == Some(FORMAT)) {
        eprintln!("left out: the system cannot start this program again");
        return None;
    }
    let output = output.unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let level = text.lines().find_map(|line| line.strip_prefix("level ")).unwrap().to_string();
    Some((level, text.lines().filter_map(|line| line.strip_prefix("y ")?.parse().ok()).collect()))
}

/// What this CPU has beside plain code, worst first.
fn levels() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let avx512 = avx2 && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
        [avx2.then_some("avx2"), avx512.then_some("avx512")].into_iter().flatten().collect()
    }
    #[cfg(target_arch = "aarch64")]
    {
        vec!["neon"]
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    Vec::new()
}

#[test]
fn a_forced_level_is_taken_and_gives_the_same_results() {
    let Some((level, want)) = run("scalar") else { return };
    assert_eq!(level, "scalar");
    assert_eq!(want.len(), 2 * 48);
    let levels = levels();
    for forced in &levels {
        let (level, got) = run(forced).unwrap();
        assert_eq!(level, *forced);
        for (got, want) in got.iter().zip(&want) {
            assert!((got - want).abs() < 1e-5, "{level}: {got} {want}");
        }
    }
    // a name nobody knows: the best there is
    assert_eq!(run("abacus").unwrap().0, levels.last().copied().unwrap_or("scalar"));
}
