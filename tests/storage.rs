//! Encoders whose large matrices are stored for inference: in fewer bits they are nearly the same model, and files bring back
//! exactly that one.

use std::io::Cursor;

use hymba::ndarray::{Array1, Array2, Array3, s};
use hymba::train::{AdamW, AdamWOptions, Trainer, TrainerOptions};
use hymba::{Error, Hymba, HymbaOptions, Normalization, Parameter, Predictor, Storage, Task};

const ALL: [Storage; 5] = [Storage::F32, Storage::F16, Storage::Bf16, Storage::Q8, Storage::Q4];

/// Of sizes that fill neither panels of 32 outputs nor blocks of 32 inputs.
fn odd() -> Hymba {
    Hymba::build(HymbaOptions::new(5).hidden_size(36).num_heads(3).num_layers(2).window_size(7).seed(3)).unwrap()
}

fn frames(b: usize, l: usize, width: usize) -> Array3<f32> {
    Array3::from_shape_fn((b, l, width), |(i, t, c)| ((i * 31 + t * 7 + c) as f32 * 0.37).sin())
}

fn stored(mut model: Hymba, storage: Storage) -> Hymba {
    model.store_as(storage).unwrap();
    model
}

/// Every number, row by row, and the type it is in.
fn numbers(model: &Hymba) -> Vec<(String, Option<Storage>, Vec<u32>)> {
    let mut all = Vec::new();
    model.visit_parameters(&mut |name, parameter| {
        let bits = match &parameter {
            Parameter::Array(array) => array.iter().map(|x| x.to_bits()).collect(),
            Parameter::Stored(matrix) => {
                (0..matrix.shape()[0]).flat_map(|row| matrix.row(row)).map(f32::to_bits).collect()
            }
            _ => panic!("{name} is something new"),
        };
        all.push((name.to_string(), parameter.storage(), bits));
    });
    all
}

#[test]
fn files_bring_back_the_same_model() {
    let folder = tempfile::tempdir().unwrap();
    let (path, streams) = (folder.path().join("model"), folder.path().join("streams"));
    let x = frames(2, 20, 5);
    for storage in ALL {
        let model = stored(odd(), storage);
        model.save(&path).unwrap();
        let loaded = Hymba::load(&path).unwrap();
        assert_eq!(loaded.storage(), Some(storage));
        assert_eq!(numbers(&loaded), numbers(&model), "{storage:?}");
        assert_eq!(loaded.forward(&x).unwrap(), model.forward(&x).unwrap(), "{storage:?}");

        let bytes = model.to_bytes().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
        assert_eq!(loaded.to_bytes().unwrap(), bytes, "{storage:?}");
        let mut file = Cursor::new(Vec::new());
        model.write_to(&mut file).unwrap();
        // wherever it stands
        assert_eq!(numbers(&Hymba::read_from(&mut file).unwrap()), numbers(&model));
        assert_eq!(numbers(&Hymba::from_bytes(&bytes).unwrap()), numbers(&model));

        // a state outlives the process
        let mut state = model.new_state(2);
        model.prefill(&x, &mut state).unwrap();
        model.save_state(&state, &streams).unwrap();
        let mut other = loaded.load_state(&streams).unwrap();
        let frame = Array2::ones((2, 5));
        assert_eq!(loaded.step(&frame, &mut other).unwrap(), model.step(&frame, &mut state).unwrap());
        assert!(matches!(odd().load_state(&streams), Err(Error::State(_))), "{storage:?}");
    }
}

#[test]
fn reading_into_a_type_is_reading_and_storing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    for in_file in [None].into_iter().chain(ALL.map(Some)) {
        let mut model = odd();
        if let Some(in_file) = in_file {
            model.store_as(in_file).unwrap();
        }
        model.save(&path).unwrap();
        for storage in ALL {
            let loaded = Hymba::load_as(&path, storage).unwrap();
            assert_eq!(loaded.storage(), Some(storage));
            assert_eq!(numbers(&loaded), numbers(&stored(model.clone(), storage)), "{in_file:?} {storage:?}");
        }
    }
}

#[test]
fn only_large_matrices_change() {
    let model = odd();
    for storage in ALL {
        let narrow = stored(model.clone(), storage);
        assert_eq!(narrow.num_parameters(), model.num_parameters());
        assert!(narrow.summary().contains(&format!("{storage:?}")), "{}", narrow.summary());
        let mut of_a_block = 0;
        for ((name, is, new), (same, was, old)) in numbers(&narrow).into_iter().zip(numbers(&model)) {
            assert_eq!((&name, was, new.len()), (&same, None, old.len()));
            match is {
                Some(is) => {
                    assert_eq!(is, storage);
                    of_a_block += usize::from(name.starts_with("blocks.0."));
                    assert!(storage == Storage::F32 && new == old || storage != Storage::F32 && new != old, "{name}");
                }
                None => assert_eq!(new, old, "{name}"),
            }
        }
        assert_eq!(of_a_block, 9);
    }
    // and back again
    let mut wide = stored(model.clone(), Storage::F32);
    wide.make_trainable().unwrap();
    assert_eq!(numbers(&wide), numbers(&model));
    assert_eq!(wide.to_bytes().unwrap(), model.to_bytes().unwrap());
}

/// Root mean square of the difference to the f32 model, whose outputs have one of 1: the final norm sees to that.
fn distance(options: HymbaOptions, storage: Storage) -> f32 {
    let model = Hymba::build(options).unwrap();
    let x = frames(3, 50, model.options().embed_dim);
    let difference = model.forward_sequence(&x).unwrap() - stored(model, storage).forward_sequence(&x).unwrap();
    (difference.iter().map(|d| d * d).sum::<f32>() / difference.len() as f32).sqrt()
}

/// A weight is off by at most half a unit of its last place: relatively 2⁻⁹ in bf16, 2⁻¹² in f16; by 1/254 of the largest of 32 in 8
/// bits (where inputs are rounded likewise), by 1/16 of it in 4. The errors are independent, so that a sum over many inputs is off
/// by relatively as much as its weights are: as a root mean square, by a half to a third of that. The maps of a few blocks add up to a
/// small multiple. The bounds are 1.5 times what was measured for the worst of these models: 3.0e-4, 2.5e-3, 1.0e-2, 9.4e-2.
#[test]
fn outputs_are_close_to_those_of_f32() {
    for (storage, bound) in [
        (Storage::F32, 1e-6),
        (Storage::F16, 4.5e-4),
        (Storage::Bf16, 3.8e-3),
        (Storage::Q8, 1.5e-2),
        (Storage::Q4, 0.15),
    ] {
        for options in
            [HymbaOptions::new(12), HymbaOptions::new(12).hidden_size(64).num_layers(8), HymbaOptions::edifice(12)]
        {
            let distance = distance(options, storage);
            assert!(distance <= bound, "{storage:?} {distance:e}");
        }
    }
}

#[test]
fn rows_do_not_depend_on_their_company() {
    for storage in ALL {
        let model = stored(odd(), storage);
        let x = frames(5, 30, 5);
        let together = model.forward_sequence(&x).unwrap();
        let mut state = model.new_state(5);
        for t in 0..30 {
            let y = model.step(&x.slice(s![.., t, ..]), &mut state).unwrap();
            let difference = &y - &together.slice(s![.., t, ..]);
            assert!(difference.iter().all(|d| d.abs() < 1e-5), "{storage:?}");
        }
        for row in 0..5 {
            let alone = model.forward_sequence(&x.slice(s![row..row + 1, .., ..])).unwrap();
            assert_eq!(alone.slice(s![0, .., ..]), together.slice(s![row, .., ..]), "{storage:?}");
        }
        let seen = model.inspect(&x).unwrap();
        assert_eq!(seen.blocks.len(), 2);
        assert_eq!(model.clone().forward(&x).unwrap(), model.forward(&x).unwrap());
    }
}

#[test]
fn training_is_refused_with_advice() {
    let x = frames(2, 9, 5);
    let trainable = odd();
    let narrow = stored(trainable.clone(), Storage::Bf16);
    let refused = |error: Error| {
        assert!(matches!(error, Error::Option { option: "storage", .. }), "{error}");
        assert!(error.to_string().contains("make_trainable"), "{error}");
    };
    refused(narrow.forward_train(&x, None, 0).unwrap_err());
    refused(narrow.forward_sequence_train(&x, None, 0).unwrap_err());
    refused(AdamW::new(&narrow, AdamWOptions::default()).unwrap_err());
    let (y, cache) = trainable.forward_train(&x, None, 0).unwrap();
    // a gradient with room for the small parameters only
    let mut gradient = narrow.zeros_like();
    refused(trainable.backward(&cache, &y, &mut gradient).unwrap_err());
    assert!(gradient.num_bytes() < trainable.num_bytes() / 5);
    // which computes as zeros, like any other
    assert!(gradient.forward(&x).unwrap().iter().all(|y| *y == 0.0));

    let predictor = Predictor::with_encoder(narrow, Task::classify(["a", "b"])).unwrap();
    refused(predictor.forward_train(&x, None, 0).unwrap_err());
    refused(predictor.forward_frames_train(&x, None, 0).unwrap_err());
    refused(Trainer::new(predictor, TrainerOptions::default()).unwrap_err());
}

#[test]
fn predictors_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("predictor");
    let x = frames(2, 9, 5);
    let mut wide = Predictor::with_encoder(odd(), Task::Regress { outputs: 3 }).unwrap();
    let normalization = Normalization::new(Array1::from_elem(5, 0.1), Array1::from_elem(5, 0.7)).unwrap();
    wide.set_input_normalization(Some(normalization)).unwrap();
    wide.save(&path).unwrap();
    for storage in ALL {
        let mut predictor = wide.clone();
        predictor.store_as(storage).unwrap();
        assert_eq!(predictor.num_parameters(), wide.num_parameters());
        let y = predictor.predict(&x, None).unwrap();
        let bytes = predictor.to_bytes().unwrap();
        let loaded = Predictor::read_from(Cursor::new(&bytes)).unwrap();
        assert_eq!(loaded.encoder().storage(), Some(storage));
        assert_eq!(loaded.predict(&x, None).unwrap(), y);
        assert_eq!(loaded.to_bytes().unwrap(), bytes);
        let loaded = Predictor::load_as(&path, storage).unwrap();
        assert_eq!(loaded.predict(&x, None).unwrap(), y);
        assert_eq!(loaded.to_bytes().unwrap(), bytes);
        // the head is learned anew on any encoder, but the whole is not trained
        assert!(loaded.zeros_like().predict(&x, None).is_ok());
    }
    wide.store_as(Storage::F32).unwrap();
    wide.make_trainable().unwrap();
    assert!(wide.forward_train(&x, None, 0).is_ok());
}

#[test]
fn small_models_are_refused() {
    let mut model = Hymba::build(HymbaOptions::new(5).hidden_size(12).num_layers(1)).unwrap();
    let before = numbers(&model);
    let error = model.store_as(Storage::Bf16).unwrap_err();
    assert!(error.to_string().contains("hidden_size 12"), "{error}");
    assert_eq!((numbers(&model), model.storage()), (before, None));
}
