//! Language models in one piece, and prompts that can be watched and ended.
#![cfg(feature = "lm")]

#[path = "common/tiny_lm.rs"]
mod tiny_lm;

use std::io::Cursor;
use std::ops::ControlFlow;

use hymba::HymbaLm;
use hymba::lm::{FinishReason, GenerateOptions, LoadOptions, Quantization, TorchDtype};

fn options() -> [LoadOptions; 4] {
    let plain = LoadOptions::default();
    [
        plain.clone(),
        plain.clone().dtype(TorchDtype::F16),
        plain.clone().quantize(Quantization::Bits8),
        plain.quantize(Quantization::Bits4),
    ]
}

#[test]
fn a_model_comes_back_from_one_piece_as_from_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let prompt: Vec<u32> = (0..40).map(|i| i * 7 % 50).collect();
    let logits = |lm: &HymbaLm| lm.prefill_ragged(&[&prompt], &mut lm.new_state(1)).unwrap();
    for options in options() {
        let lm = HymbaLm::random(tiny_lm::config(50), 7, &options).unwrap();
        let bytes = lm.to_bytes().unwrap();
        let one = HymbaLm::from_bytes(&bytes).unwrap();
        assert_eq!(one.config(), lm.config());
        assert_eq!(one.num_bytes(), lm.num_bytes());
        assert_eq!(logits(&one), logits(&lm));
        assert_eq!(one.to_bytes().unwrap(), bytes);

        let mut file = Cursor::new(Vec::new());
        lm.write_to(&mut file).unwrap();
        let mut parameters = 0;
        let read =
            HymbaLm::read_from_with(&mut file, &LoadOptions::default(), |loading| parameters = loading.parameters);
        assert_eq!(logits(&read.unwrap()), logits(&lm));
        assert_eq!(parameters, lm.num_parameters() as u64);

        // the folder's two files
        lm.save_dir(folder.path()).unwrap();
        let config = std::fs::read_to_string(folder.path().join("config.json")).unwrap();
        let weights = std::fs::read(folder.path().join("model.safetensors")).unwrap();
        let parts = HymbaLm::from_parts(&config, &weights, &LoadOptions::default(), |_| {}).unwrap();
        assert_eq!(logits(&parts), logits(&lm));
        // what was read keeps the words of its config
        let from_dir = HymbaLm::from_dir(folder.path()).unwrap();
        assert_eq!(parts.to_bytes().unwrap(), from_dir.to_bytes().unwrap());
        assert_eq!(logits(&HymbaLm::from_bytes(&from_dir.to_bytes().unwrap()).unwrap()), logits(&lm));
    }
    // other options than it was written with
    let bytes = tiny_lm::model(50).to_bytes().unwrap();
    let narrow = LoadOptions::default().quantize(Quantization::Bits8);
    let narrow = HymbaLm::from_bytes_with(&bytes, &narrow, |_| {}).unwrap();
    assert_eq!(narrow.config().quantization, Quantization::Bits8);
}

/// Stop tokens that a folder's `generation_config.json` gives go with the model.
#[test]
fn stop_tokens_of_the_folder_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    tiny_lm::model(50).save_dir(folder.path()).unwrap();
    std::fs::write(folder.path().join("generation_config.json"), r#"{"eos_token_id": [3, 4]}"#).unwrap();
    let bytes = HymbaLm::from_dir(folder.path()).unwrap().to_bytes().unwrap();
    assert_eq!(HymbaLm::from_bytes(&bytes).unwrap().config().eos_token_id, [3, 4]);
}

#[test]
fn progress_is_heard_after_each_piece() {
    let lm = tiny_lm::model(50);
    let rows: [Vec<u32>; 3] = [1300, 5, 600].map(|length| (0..length).map(|i| i * 7 % 50).collect());
    let mut heard = Vec::new();
    let mut state = lm.new_state(3);
    let logits = lm.prefill_with(&rows, &mut state, |done, of| {
        heard.push((done, of));
        ControlFlow::Continue(())
    });
    assert_eq!(logits.unwrap().unwrap(), lm.prefill_ragged(&rows, &mut lm.new_state(3)).unwrap());
    assert_eq!(heard.last(), Some(&(1905, 1905)));
    assert!(heard.iter().all(|(_, of)| *of == 1905));
    let starts = [0].into_iter().chain(heard.iter().map(|(done, _)| *done));
    assert!(starts.zip(&heard).all(|(before, (done, _))| (1..=512).contains(&(done - before))), "{heard:?}");
}

#[test]
fn an_ended_prompt_goes_on_where_it_was() {
    let lm = tiny_lm::model(50);
    let rows: [Vec<u32>; 2] = [1300, 600].map(|length| (0..length).map(|i| i * 7 % 50).collect());
    let whole = lm.prefill_ragged(&rows, &mut lm.new_state(2)).unwrap();
    for pieces in 1..4 {
        let (mut state, mut calls, mut told) = (lm.new_state(2), 0, 0);
        let ended = lm.prefill_with(&rows, &mut state, |done, _| {
            (calls, told) = (calls + 1, done);
            if calls == pieces { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert_eq!((ended.unwrap(), calls), (None, pieces));
        let lengths = state.lengths();
        assert_eq!(lengths.iter().sum::<usize>(), told);
        for (row, length) in lengths.into_iter().enumerate() {
            let mut one = state.select(&[row]).unwrap();
            let rest = &rows[row][length..];
            if !rest.is_empty() {
                let logits = lm.prefill_ragged(&[rest], &mut one).unwrap();
                assert_eq!(logits.row(0), whole.row(row), "row {row} after {pieces} pieces");
            }
        }
    }
    // what is wrong with a call is said before anything is heard
    let mut state = lm.new_state(1);
    let error = lm.prefill_with(&[[50]], &mut state, |_, _| panic!("nothing is done")).unwrap_err();
    assert!(error.to_string().contains("vocabulary"), "{error}");
}

#[test]
fn generations_can_be_ended_in_the_prompt() {
    let lm = tiny_lm::model(50);
    let prompt: Vec<u32> = (0..1300).map(|i| i * 7 % 50).collect();
    let plain = GenerateOptions::default().max_tokens(3).stop_tokens(vec![]);
    let heard = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let watched = |end: usize| {
        let heard = heard.clone();
        plain.clone().on_prompt(move |done, of| {
            heard.lock().unwrap().push((done, of));
            if done >= end { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
    };
    let go = |_| ControlFlow::Continue(());
    let generated = lm.generate(&prompt, &watched(usize::MAX), go).unwrap();
    assert_eq!(generated, lm.generate(&prompt, &plain, go).unwrap());
    assert_eq!(std::mem::take(&mut *heard.lock().unwrap()), [(512, 1300), (1024, 1300), (1300, 1300)]);

    let mut state = lm.new_state(1);
    let ended = lm.generate_with(&mut state, &prompt, &watched(600), |_| panic!("no token was chosen")).unwrap();
    assert_eq!((ended.ids.len(), ended.finish), (0, FinishReason::Cancelled));
    assert_eq!(state.lengths(), [1024]);

    // any of a batch ends all of it
    let each = [plain.clone(), watched(1)];
    let all = lm.generate_batch(&[&prompt, &prompt], &each, |_, _| ControlFlow::Continue(())).unwrap();
    assert!(all.iter().all(|row| row.finish == FinishReason::Cancelled && row.ids.is_empty()));
    assert!(watched(1) != watched(1) && each[1] == each[1].clone());
}
