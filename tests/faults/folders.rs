//! Folders of language models that other people wrote.

use std::fs;
use std::path::Path;

use hymba::lm::{HymbaLmConfig, KvStorage, LoadOptions, Quantization, TorchDtype};
use hymba::ndarray::{Array1, Array2, Array3, arr1, arr2, s};
use hymba::{Error, HymbaLm};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{common, tiny_lm};

type Tensor = (String, Dtype, Vec<usize>, Vec<u8>);

const SINGLE: &str = "model.safetensors";
const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

/// A copy of the golden folder `a_minimal`: tied, f32, 2 layers.
fn minimal() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", SINGLE] {
        fs::copy(common::data("hymba_lm/a_minimal").join(name), folder.path().join(name)).unwrap();
    }
    folder
}

/// The same with other values in its config.
fn with_config(changes: Value) -> TempDir {
    let folder = minimal();
    change_config(folder.path(), changes);
    folder
}

/// Sets keys of a config; those that become null stay there as null.
fn change_config(folder: &Path, changes: Value) {
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    changes.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
    fs::write(path, config.to_string()).unwrap();
}

fn change_tensors(folder: &Path, change: impl FnOnce(&mut Vec<Tensor>)) {
    let path = folder.join(SINGLE);
    let bytes = fs::read(&path).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap().tensors().into_iter();
    let mut tensors: Vec<Tensor> =
        all.map(|(name, tensor)| (name, tensor.dtype(), tensor.shape().to_vec(), tensor.data().to_vec())).collect();
    change(&mut tensors);
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, data)| (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn place(tensors: &[Tensor], name: &str) -> usize {
    tensors.iter().position(|(other, ..)| other == name).unwrap()
}

/// Numbers in f32, each changed.
fn scaled(data: &[u8], factor: f32) -> Vec<u8> {
    let (numbers, _) = data.as_chunks();
    numbers.iter().flat_map(|number| (factor * f32::from_le_bytes(*number)).to_le_bytes()).collect()
}

fn logits(lm: &HymbaLm) -> Array3<f32> {
    lm.forward(&arr2(&[[1, 5, 9, 2, 40, 33], [3, 3, 8, 20, 4, 7]])).unwrap()
}

fn read(folder: &TempDir) -> HymbaLm {
    HymbaLm::from_dir(folder.path()).unwrap()
}

fn error(folder: &TempDir) -> String {
    HymbaLm::from_dir(folder.path()).unwrap_err().to_string()
}

fn all_bits() -> [LoadOptions; 4] {
    let plain = LoadOptions::default();
    [
        plain.clone(),
        plain.clone().dtype(TorchDtype::BF16),
        plain.clone().quantize(Quantization::Bits8),
        plain.quantize(Quantization::Bits4),
    ]
}

#[test]
fn the_head_of_a_tied_folder_counts() {
    let tied = read(&minimal());
    let want = logits(&tied);
    let with_head = |factor: f32| {
        let folder = minimal();
        change_tensors(folder.path(), |tensors| {
            let (_, dtype, shape, data) = tensors[place(tensors, EMBEDDING)].clone();
            tensors.push((HEAD.into(), dtype, shape, scaled(&data, factor)));
        });
        folder
    };
    let same = read(&with_head(1.0));
    assert_eq!((logits(&same), same.num_parameters()), (want.clone(), tied.num_parameters()));
    assert!(same.config().tie_word_embeddings);

    let folder = with_head(-2.0);
    let other = read(&folder);
    assert_eq!(logits(&other), -2.0 * &want);
    assert!(!other.config().tie_word_embeddings);
    // in fewer bits, and written and read again
    for options in all_bits() {
        let lm = HymbaLm::from_dir_with(folder.path(), &options, |_| {}).unwrap();
        let saved = tempfile::tempdir().unwrap();
        lm.save_dir(saved.path()).unwrap();
        let again = read(&saved);
        assert_eq!((again.config(), logits(&again)), (lm.config(), logits(&lm)), "{options:?}");
        let off = (&logits(&lm) + &(2.0 * &want)).mapv(f32::abs).sum() / want.mapv(f32::abs).sum();
        assert!(off < 1.5, "{options:?} {off}");

        let saved = tempfile::tempdir().unwrap();
        let lm = HymbaLm::from_dir_with(with_head(1.0).path(), &options, |_| {}).unwrap();
        lm.save_dir(saved.path()).unwrap();
        assert!(read(&saved).config().tie_word_embeddings);
    }

    let folder = minimal();
    change_tensors(folder.path(), |tensors| tensors.push((HEAD.into(), Dtype::F32, vec![3, 7], vec![0; 84])));
    assert!(error(&folder).contains(r#""lm_head.weight": has shape [3, 7], expected [97, 32]"#), "{}", error(&folder));
    let folder = minimal();
    change_tensors(folder.path(), |tensors| {
        tensors.push((HEAD.into(), Dtype::I32, vec![97, 32], vec![0; 4 * 97 * 32]))
    });
    assert!(error(&folder).contains(r#""lm_head.weight": has type I32"#), "{}", error(&folder));
}

#[test]
fn a_tied_folder_may_have_kept_the_head_only() {
    let folder = minimal();
    change_tensors(folder.path(), |tensors| {
        let at = place(tensors, EMBEDDING);
        tensors[at].0 = HEAD.into();
    });
    let lm = read(&folder);
    assert_eq!(logits(&lm), logits(&read(&minimal())));
    for options in all_bits() {
        let lm = HymbaLm::from_dir_with(folder.path(), &options, |_| {}).unwrap();
        let same = HymbaLm::from_dir_with(minimal().path(), &options, |_| {}).unwrap();
        assert_eq!((logits(&lm), lm.num_bytes()), (logits(&same), same.num_bytes()));
        // the files of a quantised model that kept its head only
        let saved = tempfile::tempdir().unwrap();
        lm.save_dir(saved.path()).unwrap();
        change_tensors(saved.path(), |tensors| {
            for (name, ..) in tensors {
                if let Some(rest) = name.strip_prefix(EMBEDDING) {
                    *name = format!("{HEAD}{rest}");
                }
            }
        });
        assert_eq!(logits(&read(&saved)), logits(&lm));
    }
    change_config(folder.path(), json!({"tie_word_embeddings": false}));
    assert!(error(&folder).contains(r#""model.embed_tokens.weight": missing"#));
}

#[test]
fn buffers_of_angles_are_ignored() {
    let folder = minimal();
    change_tensors(folder.path(), |tensors| {
        let name = "model.layers.0.mamba.self_attn.rotary_emb.inv_freq";
        tensors.push((name.into(), Dtype::F32, vec![4], vec![0; 16]));
    });
    assert_eq!(logits(&read(&folder)), logits(&read(&minimal())));
}

#[test]
fn parameters_of_the_rotary_embedding_are_read_or_refused() {
    let plain = logits(&read(&minimal()));
    let want = logits(&read(&with_config(json!({"rope_theta": 500_000.0}))));
    assert_ne!(want, plain);
    let folder = with_config(json!({"rope_parameters": {"rope_theta": 500_000.0, "rope_type": "default"}}));
    assert_eq!(logits(&read(&folder)), want);
    let text = fs::read_to_string(folder.path().join("config.json")).unwrap();
    fs::write(folder.path().join("config.json"), text.replace("\"rope_theta\":10000.0,", "")).unwrap();
    assert_eq!(logits(&read(&folder)), want);
    assert_eq!(logits(&read(&with_config(json!({"rope_scaling": null})))), plain);
    let says = error(&with_config(json!({"rope_scaling": {"type": "linear", "factor": 4.0}})));
    assert!(says.contains("rope_scaling") && says.contains("linear"), "{says}");
}

#[test]
fn configs_are_read_as_the_published_code_reads_them() {
    let want = logits(&read(&minimal()));
    for changes in [
        json!({"num_experts": 16}),
        json!({"global_attn_idx": [0, 15, 31]}),
        json!({"kv_reuse_group": [[1, 2]]}),
        json!({"pad_token_id": -1, "bos_token_id": -1, "eos_token_id": -1}),
        json!({"pad_token_id": 32000}),
        json!({"kq_head_dim": 0, "attn_hidden_size": 0}),
        json!({"num_key_value_heads": null}),
    ] {
        assert_eq!(logits(&read(&with_config(changes.clone()))), want, "{changes}");
    }
    // no keys and values are there for it yet
    assert!(error(&with_config(json!({"kv_reuse_group": [[1, 0]]}))).contains("layer 0 cannot use"));
}

#[test]
fn words_of_python_and_byte_order_marks_are_skipped() {
    let want = logits(&read(&minimal()));
    for entry in [r#""time_step_limit": [0.0, Infinity]"#, r#""x": NaN"#, r#""x": -Infinity"#] {
        let folder = minimal();
        let path = folder.path().join("config.json");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, format!("\u{feff}{{{entry}, {}", text.strip_prefix('{').unwrap())).unwrap();
        let lm = read(&folder);
        assert_eq!(logits(&lm), want);
        // and stay where they are
        let saved = tempfile::tempdir().unwrap();
        lm.save_dir(saved.path()).unwrap();
        let written = fs::read_to_string(saved.path().join("config.json")).unwrap();
        assert_eq!(written, fs::read_to_string(&path).unwrap().trim_start_matches('\u{feff}'));
    }
    let folder = minimal();
    let shard = "model-00001-of-00001.safetensors";
    fs::rename(folder.path().join(SINGLE), folder.path().join(shard)).unwrap();
    let bytes = fs::read(folder.path().join(shard)).unwrap();
    let names: serde_json::Map<_, _> = SafeTensors::deserialize(&bytes)
        .unwrap()
        .names()
        .into_iter()
        .map(|name| (name.to_string(), json!(shard)))
        .collect();
    let index = format!("\u{feff}{{\"metadata\": {{\"total_size\": NaN}}, \"weight_map\": {}}}", Value::Object(names));
    fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    assert_eq!(logits(&read(&folder)), want);
}

#[test]
fn a_saved_folder_keeps_what_the_config_had() {
    let original = fs::read_to_string(common::data("hymba_lm/a_minimal/config.json")).unwrap();
    let saved = tempfile::tempdir().unwrap();
    let written = |options: &LoadOptions| {
        HymbaLm::from_dir_with(minimal().path(), options, |_| {}).unwrap().save_dir(saved.path()).unwrap();
        fs::read_to_string(saved.path().join("config.json")).unwrap()
    };
    assert_eq!(written(&LoadOptions::default()), original);
    let narrow = written(&LoadOptions::default().dtype(TorchDtype::BF16));
    assert_eq!(narrow, original.replace(r#""torch_dtype": "float32""#, r#""torch_dtype": "bfloat16""#));
    let quantised: Value =
        serde_json::from_str(&written(&LoadOptions::default().quantize(Quantization::Bits4))).unwrap();
    let mut want: Value = serde_json::from_str(&original).unwrap();
    want["quantization_config"] = json!({"quant_method": "hymba", "bits": 4, "group_size": 32});
    assert_eq!(quantised, want);
    // what transformers 5 calls it
    let folder = minimal();
    let path = folder.path().join("config.json");
    fs::write(&path, original.replace("torch_dtype", "dtype")).unwrap();
    let options = LoadOptions::default().dtype(TorchDtype::F16);
    HymbaLm::from_dir_with(folder.path(), &options, |_| {}).unwrap().save_dir(saved.path()).unwrap();
    let written = fs::read_to_string(saved.path().join("config.json")).unwrap();
    assert_eq!(written, original.replace(r#""torch_dtype": "float32""#, r#""dtype": "float16""#));

    // a model that was not read has what the published code needs
    tiny_lm::model(50).save_dir(saved.path()).unwrap();
    let config: Value = serde_json::from_slice(&fs::read(saved.path().join("config.json")).unwrap()).unwrap();
    for key in ["auto_map", "architectures", "attn_implementation_new", "conv_dim", "layer_type", "num_experts"] {
        assert!(config.get(key).is_some(), "{key}");
    }
}

#[test]
fn a_wide_folder_can_be_read_narrow() {
    let folder = minimal();
    let wide = read(&folder);
    let narrow =
        HymbaLm::from_dir_with(folder.path(), &LoadOptions::default().dtype(TorchDtype::BF16), |_| {}).unwrap();
    assert_eq!(narrow.config().torch_dtype, Some(TorchDtype::BF16));
    assert!(3 * narrow.num_bytes() < 2 * wide.num_bytes(), "{} {}", narrow.num_bytes(), wide.num_bytes());
    let off = (&logits(&narrow) - &logits(&wide)).mapv(f32::abs).sum() / logits(&wide).mapv(f32::abs).sum();
    assert!(off > 0.0 && off < 0.1, "{off}");
    let saved = tempfile::tempdir().unwrap();
    narrow.save_dir(saved.path()).unwrap();
    assert_eq!(logits(&read(&saved)), logits(&narrow));
    // numbers of bf16 are those of f32
    let wide = HymbaLm::from_dir_with(saved.path(), &LoadOptions::default().dtype(TorchDtype::F32), |_| {}).unwrap();
    assert_eq!(logits(&wide), logits(&narrow));
}

#[test]
fn other_folders_are_told_what_they_are() {
    for (files, says) in [
        (&["adapter_config.json", "adapter_model.safetensors"][..], "load_lora"),
        (&["adapter_config.json", "adapter_model.safetensors", "config.json"], "load_lora"),
        (&["pytorch_model.bin", "config.json"], "convert them to safetensors"),
        (&["pytorch_model.bin"], "convert them to safetensors"),
        (&["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "config.json"], "safe_serialization"),
        (&["hymba.Q4_K_M.gguf"], "GGUF"),
        (&["hymba.gguf", "config.json"], "GGUF"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        for name in files {
            let text = fs::read(common::data("hymba_lm/a_minimal/config.json")).unwrap();
            fs::write(folder.path().join(name), if *name == "config.json" { text } else { b"{}".to_vec() }).unwrap();
        }
        assert!(error(&folder).contains(says), "{files:?}: {}", error(&folder));
    }
    let says = HymbaLm::from_dir(minimal().path().join(SINGLE)).unwrap_err().to_string();
    assert!(says.contains(SINGLE), "{says}");
    let folder = minimal();
    let says = HymbaLm::from_dir(folder.path().join(SINGLE)).unwrap_err().to_string();
    assert!(says.contains("not a folder"), "{says}");
}

/// The tiny model without meta tokens.
fn without_meta_tokens() -> HymbaLmConfig {
    let mut config = tiny_lm::config(50);
    (config.num_memory_tokens, config.torch_dtype) = (0, Some(TorchDtype::F32));
    config
}

#[test]
fn a_model_without_meta_tokens_can_be_saved_and_read() {
    for options in all_bits() {
        let lm = HymbaLm::random(without_meta_tokens(), 7, &options).unwrap();
        let folder = tempfile::tempdir().unwrap();
        lm.save_dir(folder.path()).unwrap();
        let again = read(&folder);
        assert_eq!((logits(&again), again.config()), (logits(&lm), lm.config()), "{options:?}");
        assert_eq!(Some(again.num_parameters()), lm.config().num_parameters());
    }
}

#[test]
fn models_without_meta_tokens_and_texts_without_ids_are_inspected() {
    let lm = tiny_lm::model(50);
    assert!(matches!(lm.inspect(&[]), Err(Error::Tokens(_))));
    assert!(matches!(lm.inspect(&[50]), Err(Error::Tokens(_))));
    let lm = HymbaLm::random(without_meta_tokens(), 7, &LoadOptions::default()).unwrap();
    assert!(matches!(lm.inspect(&[]), Err(Error::Tokens(_))));
    let ids: Vec<u32> = (0..600).map(|i| i * i % 50).collect();
    let states = lm.inspect(&ids).unwrap().hidden_states;
    assert_eq!(states.iter().map(Array2::dim).collect::<Vec<_>>(), [(600, 48); 4]);
    // and are those that logits are made of
    let head = lm.forward(&Array2::from_shape_vec((1, 600), ids.clone()).unwrap()).unwrap();
    let saved = tempfile::tempdir().unwrap();
    lm.save_dir(saved.path()).unwrap();
    let embedding = common::tensors(&saved.path().join(SINGLE))[EMBEDDING].mapv(|x| x as f32);
    let embedding: Array2<f32> = embedding.into_dimensionality().unwrap();
    for row in [0, 511, 512, 599] {
        let got: Array1<f32> = embedding.dot(&states[3].row(row));
        let off = (&got - &head.slice(s![0, row, ..])).mapv(f32::abs).sum();
        assert!(off < 1e-3, "{row} {off}");
    }
}

/// Where all layers are global, meta tokens are what other tokens are; they are fed in pieces of 512.
#[test]
fn many_meta_tokens_are_fed_in_pieces() {
    let mut config = without_meta_tokens();
    config.sliding_window = None;
    let plain = HymbaLm::random(config, 7, &LoadOptions::default()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    plain.save_dir(folder.path()).unwrap();
    let ids: Vec<u32> = (0..1100).map(|i| i * (i + 3) % 50).collect();
    let text = [4, 9, 17];
    change_tensors(folder.path(), |tensors| {
        let (_, _, shape, data) = tensors[place(tensors, EMBEDDING)].clone();
        let width = 4 * shape[1];
        let rows = ids.iter().flat_map(|&id| data[id as usize * width..][..width].to_vec()).collect();
        tensors.push(("model.memory_tokens".into(), Dtype::F32, vec![ids.len(), shape[1]], rows));
    });
    change_config(folder.path(), json!({"num_memory_tokens": ids.len()}));
    let lm = read(&folder);
    let all = [&ids[..], &text].concat();
    let want = plain.forward(&Array2::from_shape_vec((1, all.len()), all).unwrap()).unwrap();
    let got = lm.forward(&arr2(&[text])).unwrap();
    let off = (&got - &want.slice(s![.., ids.len().., ..])).mapv(f32::abs).fold(0.0, |a: f32, b| a.max(*b));
    assert!(off < 1e-4, "{off}");
    assert_eq!(lm.inspect(&text).unwrap().hidden_states[0].nrows(), ids.len() + text.len());

    let mut config = tiny_lm::config(50);
    config.num_memory_tokens = HymbaLmConfig::MAX_META_TOKENS + 1;
    assert!(matches!(config.validate(), Err(Error::Option { option: "num_memory_tokens", .. })));
}

#[test]
fn states_outlive_changes_that_change_nothing() {
    let folder = minimal();
    let lm = read(&folder);
    let mut state = lm.new_state(1);
    lm.prefill(&arr2(&[[1, 2, 3, 4]]), &mut state).unwrap();
    let path = folder.path().join("state");
    lm.save_state(&state, &path).unwrap();
    let want = lm.step(&arr1(&[5]), &mut state).unwrap();
    for changes in [
        json!({"eos_token_id": [2, 7], "bos_token_id": null, "pad_token_id": -1}),
        json!({"torch_dtype": "bfloat16"}),
        json!({"torch_dtype": null, "dtype": "float32"}),
        json!({"max_position_embeddings": 100_000, "seq_length": 3}),
        json!({"global_attn_idx": [0, 1, 2]}),
        json!({"rope_theta": 7, "rope_parameters": {"rope_theta": 10000.0}}),
    ] {
        change_config(folder.path(), changes.clone());
        let lm = read(&folder);
        assert_eq!(lm.step(&arr1(&[5]), &mut lm.load_state(&path).unwrap()).unwrap(), want, "{changes}");
    }
    let narrow =
        HymbaLm::from_dir_with(folder.path(), &LoadOptions::default().dtype(TorchDtype::BF16), |_| {}).unwrap();
    narrow.load_state(&path).unwrap();
    for changes in [json!({"rope_parameters": {"rope_theta": 20000.0}}), json!({"rms_norm_eps": 1e-5})] {
        change_config(folder.path(), changes.clone());
        assert!(matches!(read(&folder).load_state(&path), Err(Error::State(_))), "{changes}");
    }
}

/// A state that was kept in 16 bits is saved as one, by whatever model.
#[test]
fn a_state_keeps_its_type() {
    let folder = tempfile::tempdir().unwrap();
    let [first, second] = ["first", "second"].map(|name| folder.path().join(name));
    let narrow = LoadOptions::default().kv_storage(KvStorage::Bf16);
    let narrow = HymbaLm::random(tiny_lm::config(50), 7, &narrow).unwrap();
    let mut state = narrow.new_state(2);
    narrow.prefill_ragged(&[&[1, 2, 3][..], &[4]], &mut state).unwrap();
    narrow.save_state(&state, &first).unwrap();
    let wide = tiny_lm::model(50);
    wide.save_state(&wide.load_state(&first).unwrap(), &second).unwrap();
    assert_eq!(fs::read(&first).unwrap(), fs::read(&second).unwrap());
}

/// Views of a few bytes that stand for more rows than there is memory.
#[test]
fn too_many_rows_are_an_error() {
    if usize::BITS < 64 {
        return;
    }
    let lm = tiny_lm::model(50);
    let one = Array2::from_elem((1, 1), 3u32);
    let mut state = lm.new_state(1);
    for shape in [(1usize << 36, 1), (1 << 50, 1), (1, 1 << 40), (1 << 30, 1 << 20)] {
        let view = one.broadcast(shape).unwrap();
        assert!(matches!(lm.forward(&view), Err(Error::Tokens(_))), "{shape:?}");
        assert!(lm.prefill(&view, &mut state).is_err(), "{shape:?}");
        assert!(lm.step(&view, &mut state).is_err(), "{shape:?}");
    }
    assert_eq!(lm.new_state(1 << 40).batch(), 0);
    // of no size at all, and more than can be counted
    let nothing = [[0u32; 0]; usize::MAX];
    assert!(matches!(lm.prefill_ragged(&nothing, &mut state), Err(Error::State(_))));
    assert_eq!(state.lengths(), [0]);
}
