//! Several threads and one model.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hymba::HymbaLm;
use hymba::lm::LoadOptions;
use hymba::ndarray::{Array2, arr1};

/// A step beside a long prompt waits for pieces of it, not for all of it.
#[test]
fn a_step_beside_a_long_prompt_gets_its_turn() {
    let mut config = crate::tiny_lm::config(500);
    (config.hidden_size, config.intermediate_size, config.num_attention_heads) = (192, 256, 6);
    let lm = HymbaLm::random(config, 7, &LoadOptions::default()).unwrap();
    let prompt = Array2::from_shape_fn((1, 8192), |(_, i)| (i * 7 % 500) as u32);
    lm.step(&arr1(&[5]), &mut lm.new_state(1)).unwrap(); // what the first call computes
    let over = AtomicBool::new(false);
    let (mut prompt_took, mut longest) = (Duration::ZERO, Duration::ZERO);
    std::thread::scope(|scope| {
        let feeding = scope.spawn(|| {
            let start = Instant::now();
            lm.prefill(&prompt, &mut lm.new_state(1)).unwrap();
            over.store(true, Ordering::Relaxed);
            start.elapsed()
        });
        let mut state = lm.new_state(1);
        while !over.load(Ordering::Relaxed) {
            let start = Instant::now();
            // so large a step that it asks for the pool
            lm.prefill(&Array2::from_elem((1, 16), 5), &mut state).unwrap();
            longest = longest.max(start.elapsed());
        }
        prompt_took = feeding.join().unwrap();
    });
    // 16 pieces: a step waits for one, or for two where they come at a bad time
    assert!(longest < prompt_took / 3, "{longest:?} of {prompt_took:?}");
}
