//! What changes logits before tokens are chosen, in every form of generation.
#![cfg(feature = "lm")]

use std::ops::ControlFlow;

use hymba::lm::{
    FrequencyPenalty, GenerateOptions, HymbaLm, HymbaLmConfig, LoadOptions, LogitBias, LogitsProcessor,
    PresencePenalty, Sampler, log_prob,
};

fn small() -> HymbaLm {
    let mut config = HymbaLmConfig::hymba_1_5b();
    (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
    config.num_hidden_layers = 2;
    HymbaLm::random(config, 3, &LoadOptions::default()).unwrap()
}

fn options() -> GenerateOptions {
    GenerateOptions::default().max_tokens(20).stop_tokens(vec![])
}

#[test]
fn what_is_added_to_logits() {
    let process = |processor: &mut dyn LogitsProcessor| {
        let mut logits = [1.0, 2.0, f32::NEG_INFINITY, f32::MAX];
        processor.process(&mut logits).unwrap();
        logits
    };
    let mut bias = LogitBias::new([(0, -3.0), (1, f32::NEG_INFINITY), (2, 5.0), (3, f32::MAX), (99, 1.0)]).unwrap();
    assert_eq!(process(&mut bias), [-2.0, f32::NEG_INFINITY, f32::NEG_INFINITY, f32::MAX]);
    let mut frequency = FrequencyPenalty::new(0.5).unwrap();
    let mut presence = PresencePenalty::new(0.5).unwrap();
    for processor in [&mut frequency as &mut dyn LogitsProcessor, &mut presence] {
        processor.observe_prompt(&[0, 0, 0]);
        [1, 1, 1, 77].into_iter().for_each(|id| processor.observe(id));
    }
    assert_eq!(process(&mut frequency)[..2], [1.0, 0.5]);
    assert_eq!(process(&mut presence)[..2], [1.0, 1.5]);
    assert!(LogitBias::new([(0, f32::NAN)]).is_err() && LogitBias::new([(0, f32::INFINITY)]).is_err());
    assert!(FrequencyPenalty::new(f32::NAN).is_err() && PresencePenalty::new(f32::INFINITY).is_err());
}

#[test]
fn a_generation_is_the_loop_written_by_hand() {
    let lm = small();
    let prompt = [1, 2, 3];
    let options = options().processor(FrequencyPenalty::new(1.5).unwrap()).log_probs(true);
    let (mut state, mut sampler) = (lm.new_state(1), Sampler::new(&options).unwrap());
    sampler.observe_prompt(&prompt);
    let (mut counts, mut next, mut ids, mut log_probs) = (vec![0.0; 50], prompt.to_vec(), Vec::new(), Vec::new());
    for _ in 0..20 {
        let logits = lm.prefill_ragged(&[&next], &mut state).unwrap();
        let mut penalized = logits.row(0).to_vec();
        penalized.iter_mut().zip(&counts).for_each(|(logit, count)| *logit -= 1.5 * count);
        let best = (0..50).rev().max_by(|&a, &b| penalized[a].total_cmp(&penalized[b])).unwrap() as u32;
        assert_eq!(sampler.pick(logits.row(0).as_slice().unwrap()).unwrap().id, best);
        log_probs.push(log_prob(logits.row(0).as_slice().unwrap(), best).unwrap()); // the model's own
        sampler.observe(best);
        counts[best as usize] += 1.0;
        ids.push(best);
        next = vec![best];
    }
    let generated = lm.generate(&prompt, &options, |_| ControlFlow::Continue(())).unwrap();
    assert_eq!((&generated.ids, &generated.log_probs), (&ids, &log_probs));
    // it does something, and rows share nothing: each is what it is alone
    let plain = lm.generate(&prompt, &self::options(), |_| ControlFlow::Continue(())).unwrap();
    assert_ne!(plain.ids, ids);
    let rows = lm.generate_batch(&[&prompt[..], &[4, 5], &prompt], &options, |_, _| ControlFlow::Continue(())).unwrap();
    assert_eq!((&rows[0].ids, &rows[2].ids), (&ids, &ids));
}

#[test]
fn nothing_left_is_an_error() {
    let lm = small();
    let options = options().processor(LogitBias::new((0..50).map(|id| (id, f32::NEG_INFINITY))).unwrap());
    let error = lm.generate(&[1], &options, |_| ControlFlow::Continue(())).unwrap_err().to_string();
    assert!(error.contains("after the processors"), "{error}");
}

#[test]
fn logits_of_some_rows_and_a_piece_of_a_prompt_together() {
    let lm = small();
    let mut alone = lm.new_state(1);
    lm.prefill_ragged(&[[5, 6, 7]], &mut alone).unwrap();
    let expected = lm.prefill_ragged(&[[8]], &mut alone).unwrap();

    let mut rows = lm.new_state(1);
    lm.prefill_ragged(&[[5, 6, 7]], &mut rows).unwrap();
    rows.append(lm.new_state(2)).unwrap();
    let mut heard = Vec::new();
    lm.prefill_each(&[vec![8], vec![], vec![1; 30]], &mut rows, &[0, 0, 30], |row, i, logits| {
        assert_eq!(logits, expected.row(0).as_slice().unwrap());
        heard.push((row, i));
    })
    .unwrap();
    assert_eq!(heard, [(0, 0)]);
    let rows = rows.into_rows();
    assert_eq!(rows.iter().map(|row| row.lengths()[0]).collect::<Vec<_>>(), [4, 0, 30]);
    assert!(lm.prefill_each(&[[1]], &mut lm.new_state(1), &[], |_, _, _| ()).is_err());
}
