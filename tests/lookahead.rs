//! Looking ahead changes nothing but the time: text, log-probabilities and state are those without it, to the bit.
#![cfg(feature = "lm")]

use std::ops::ControlFlow;
use std::path::Path;

use hymba::lm::{Arithmetic, Generation, KvStorage, LoadOptions, Quantization, TorchDtype};
use hymba::{GenerateOptions, HymbaLm, LmState};

/// Models with windows, shared keys and values, bf16 and other options.
const FOLDERS: [&str; 5] =
    ["byte_lm", "hymba_lm/b1_swa_kvshare", "hymba_lm/b2_window_lt_meta", "hymba_lm/e_bf16", "hymba_lm/f_options"];

fn kinds() -> Vec<LoadOptions> {
    let plain = LoadOptions::default();
    vec![
        plain.clone(),
        plain.clone().quantize(Quantization::Bits8),
        plain.clone().quantize(Quantization::Bits4).kv_storage(KvStorage::Bf16),
        plain.dtype(TorchDtype::BF16).arithmetic(Arithmetic::Bf16),
    ]
}

fn generate(lm: &HymbaLm, prompt: &[u32], options: &GenerateOptions, stop_after: usize) -> (Generation, LmState) {
    let mut state = lm.new_state(1);
    let mut heard = Vec::new();
    let generated = lm
        .generate_with(&mut state, prompt, options, |id| {
            heard.push(id);
            if heard.len() == stop_after { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap();
    assert_eq!(generated.ids, heard);
    (generated, state)
}

#[test]
fn nothing_changes() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let mut longest = 0;
    for folder in FOLDERS {
        for load in kinds() {
            let lm = HymbaLm::from_dir_with(data.join(folder), &load, |_| {}).unwrap();
            let vocabulary = lm.config().vocab_size as u32;
            // some of it repeats itself, some does not
            let prompt: Vec<u32> = (0..60).map(|i: u32| (i % 13 * 7 + i / 40) % vocabulary).collect();
            let plain = GenerateOptions::default().max_tokens(90).log_probs(true);
            let drawn = plain.clone().temperature(0.8).top_p(0.95).seed(3).repetition_penalty(1.1);
            let endless = plain.clone().stop_tokens(vec![]);
            for (options, stop_after) in [(&plain, 0), (&drawn, 0), (&endless, 0), (&endless, 37)] {
                let (text, mut state) = generate(&lm, &prompt, options, stop_after);
                longest = longest.max(text.ids.len());
                // what a guess leaves behind in the state would show in the next logits
                let logits = lm.prefill_ragged(&[[1]], &mut state).unwrap();
                for lookahead in [1, 3, 10, 64] {
                    let (mut same, mut after) =
                        generate(&lm, &prompt, &options.clone().lookahead(lookahead), stop_after);
                    assert!(same.passes <= text.passes + 1 && text.passes == text.ids.len());
                    same.passes = text.passes;
                    assert_eq!(same, text, "{folder} {load:?} {lookahead}");
                    assert_eq!(lm.prefill_ragged(&[[1]], &mut after).unwrap(), logits, "{folder} {load:?} {lookahead}");
                    assert_eq!(after.lengths(), state.lengths());
                    for layer in 0..lm.config().num_hidden_layers {
                        assert_eq!(after.layer(0, layer), state.layer(0, layer));
                    }
                }
            }
        }
    }
    assert_eq!(longest, 90);
}

#[test]
fn too_far_is_refused() {
    let options = GenerateOptions::default().lookahead(GenerateOptions::MAX_LOOKAHEAD + 1);
    assert!(options.validate().unwrap_err().to_string().contains("lookahead"));
}
