use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::*;

fn published() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/hymba-1.5b-base/config.json")
}

/// A small config with windows and sharing.
fn small() -> Value {
    json!({
        "hidden_size": 8, "num_hidden_layers": 6, "vocab_size": 11, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 12, "mlp_hidden_act": "silu", "kq_norm": "none", "sliding_window": 4, "rope": true,
        "global_attn_idx": [0, 5], "kv_reuse_group": [[1, 2], [3, 4]], "num_memory_tokens": 3,
    })
}

fn read(value: &Value) -> Result<HymbaLmConfig> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    fs::write(&path, value.to_string()).unwrap();
    HymbaLmConfig::from_file(path)
}

fn with(changes: Value) -> Value {
    let mut config = small();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn without(key: &str) -> Value {
    let mut config = small();
    config.as_object_mut().unwrap().remove(key);
    config
}

#[test]
fn the_published_config_is_the_built_in_one() {
    let config = HymbaLmConfig::from_file(published()).unwrap();
    assert_eq!(config, HymbaLmConfig::hymba_1_5b());
    assert_eq!(config.num_parameters(), Some(1_522_797_824));
    assert_eq!(HymbaLmConfig { tie_word_embeddings: false, ..config.clone() }.num_parameters(), Some(1_573_999_424));
    assert_eq!((config.inner_size(), config.key_width(), config.value_width(), config.dt_rank()), (3200, 64, 128, 100));
    let base = config.rope_base().unwrap();
    assert!((base / 74534.83031811893 - 1.0).abs() < 1e-14, "{base}");

    let globals: Vec<_> = (0..32).filter(|&layer| config.is_global(layer)).collect();
    assert_eq!(globals, [0, 15, 31]);
    assert_eq!((config.window(0), config.window(1)), (None, Some(1024)));
    let users: Vec<_> = (0..32).filter(|&layer| !config.owns_kv(layer)).collect();
    assert_eq!(users, [2, 4, 6, 8, 10, 12, 14, 17, 18, 20, 22, 24, 26, 28, 30]);
    assert_eq!([16, 17, 18, 30, 31].map(|layer| config.kv_source(layer)), [16, 16, 16, 29, 31]);
    assert_eq!((config.in_proj_rows(1), config.in_proj_rows(2)), (8960, 8000));
}

#[test]
fn the_tensors_are_those_of_the_state_dict() {
    let config = HymbaLmConfig::hymba_1_5b();
    let tensors = config.tensors();
    assert_eq!(tensors.len(), 611);
    let numbers: usize = tensors.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    assert_eq!(Some(numbers), config.num_parameters());
    let shape = |name: &str| &tensors.iter().find(|(found, _)| found == name).unwrap().1[..];
    assert_eq!(shape("model.layers.2.mamba.in_proj.weight"), [8000, 1600]);
    assert_eq!(shape("model.layers.31.mamba.conv1d.weight"), [3200, 1, 4]);
    assert_eq!(shape("model.layers.0.mamba.x_proj.0.weight"), [132, 3200]);

    let names = |config: &HymbaLmConfig| config.tensors().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    let mut config = config;
    config.num_hidden_layers = 1;
    config.tie_word_embeddings = false;
    assert_eq!(names(&config).len(), 2 + 19 + 2);
    config.mlp_hidden_act = MlpActivation::Relu2;
    config.mamba_conv_bias = false;
    config.mamba_inner_layernorms = false;
    assert_eq!(names(&config).len(), 2 + 14 + 2);
    config.intermediate_size = 0;
    config.num_memory_tokens = 0;
    assert_eq!(names(&config).len(), 1 + 11 + 2);
    config.mamba_proj_bias = true;
    config.kq_norm = KeyQueryNorm::PerHeadRms;
    let tensors = config.tensors();
    assert_eq!(tensors.len(), 1 + 15 + 2);
    assert!(tensors.contains(&("model.layers.0.mamba.self_attn.k_norm.weight".into(), vec![1, 5, 1, 64])));
    assert!(tensors.contains(&("model.layers.0.mamba.in_proj.bias".into(), vec![8960])));
}

#[test]
fn absent_keys_have_the_published_defaults() {
    let config = read(&json!({
        "hidden_size": 48, "num_hidden_layers": 4, "vocab_size": 11, "num_attention_heads": 16, "intermediate_size": 0,
        "mlp_hidden_act": "relu2", "kq_norm": "rms",
    }))
    .unwrap();
    assert_eq!((config.num_key_value_heads, config.dt_rank(), config.inner_size()), (8, 3, 96));
    assert_eq!((config.rope_base(), config.sliding_window, config.num_memory_tokens), (None, None, 0));
    assert!(config.is_global(3) && config.owns_kv(3) && !config.tie_word_embeddings);
    assert_eq!((config.bos_token_id, &config.eos_token_id[..], config.pad_token_id), (Some(1), &[2][..], Some(0)));
    assert_eq!(read(&with(json!({"num_key_value_heads": null}))).unwrap().num_key_value_heads, 2);
    let error = read(&without("num_key_value_heads")).unwrap_err().to_string();
    assert!(error.contains("num_key_value_heads = 8") && error.contains("if absent it is 8"), "{error}");
}

/// The published code computes the same model for each of them.
#[test]
fn what_the_published_code_ignores_is_ignored() {
    let plain = read(&small()).unwrap();
    for changes in [
        json!({"num_experts": 16, "num_experts_per_tok": "two"}),
        json!({"attn_hidden_size": 0, "kq_head_dim": 0}),
        json!({"attn_hidden_size": -7, "kq_head_dim": -1}),
        json!({"v_head_dim": 999, "conv_dim": {"0": 7}, "layer_type": ["a"], "num_mamba": 2}),
        json!({"kv_reuse_group": [[1, 2, 6], [4, 900], [3, 4], [7, 8]]}),
        json!({"kv_reuse_group": [[3, -1, 4, 4], [1, 2]]}),
        json!({"rope_parameters": null, "rope_scaling": null, "partial_rotary_factor": null}),
        json!({"rope_scaling": {}, "rope_parameters": {"rope_type": "default", "rope_theta": 10000, "factor": 4.0}}),
        json!({"partial_rotary_factor": 1.0, "rope_parameters": {"partial_rotary_factor": 1, "attention_factor": [1.5]}}),
    ] {
        assert_eq!(read(&with(changes.clone())).unwrap(), plain, "{changes}");
    }
    // numbers that no layer has
    let config = read(&with(json!({"global_attn_idx": [5, 0, 0, 15, -1]}))).unwrap();
    assert_eq!((0..6).map(|layer| config.window(layer)).collect::<Vec<_>>(), {
        (0..6).map(|layer| plain.window(layer)).collect::<Vec<_>>()
    });
    // what tokens mean changes nothing in the layers
    let config =
        read(&with(json!({"bos_token_id": -1, "eos_token_id": [7, -1, 32000], "pad_token_id": 32000}))).unwrap();
    assert_eq!(
        (config.bos_token_id, &config.eos_token_id[..], config.pad_token_id),
        (None, &[7, 32000][..], Some(32000))
    );
    assert!(config.has_layers_of(&plain) && config != plain);
}

#[test]
fn keys_and_values_may_be_handed_on() {
    let every = |groups: Value| with(json!({"sliding_window": null, "kv_reuse_group": groups}));
    let config = read(&every(json!([[3, 5, 4], [2, 3], [2, 4]]))).unwrap();
    assert_eq!([2, 3, 4, 5].map(|layer| config.kv_source(layer)), [2, 2, 2, 2]);
    assert_eq!(config.kv_reuse_group, Some(vec![vec![2, 3, 4, 5]]));
}

#[test]
fn words_of_python_are_skipped_where_nothing_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    let read = |entry: &str| {
        let text = small().to_string();
        fs::write(&path, format!("\u{feff}{}, {entry}}}", text.strip_suffix('}').unwrap())).unwrap();
        HymbaLmConfig::from_file(&path)
    };
    let plain = super::tests::read(&small()).unwrap();
    for entry in [r#""time_step_limit": [0.0, Infinity]"#, r#""x": NaN"#, r#""x": {"y": -Infinity}"#, r#""x": 1e400"#] {
        assert_eq!(read(entry).unwrap(), plain, "{entry}");
    }
    for (entry, says) in [
        (r#""rope_theta": NaN"#, "rope_theta = \"NaN\""),
        (r#""mamba_d_state": Infinity"#, "mamba_d_state = \"Infinity\""),
        (r#""rope_parameters": {"rope_theta": -Infinity}"#, "rope_theta = \"-Infinity\""),
    ] {
        let error = read(entry).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn parameters_of_the_rotary_embedding_are_read_as_by_transformers() {
    let base = |changes: Value| read(&with(changes)).unwrap().rope_base();
    for changes in [
        json!({"rope_parameters": {"rope_theta": 500_000.0, "rope_type": "default"}}),
        json!({"rope_parameters": {"rope_theta": 500_000, "type": "default"}, "rope_theta": 7.0}),
        json!({"rope_scaling": {"rope_theta": 500_000}, "rope_parameters": {"rope_theta": 7, "rope_type": "yarn"}}),
        json!({"rope_parameters": {
            "full_attention": {"rope_theta": 500_000.0, "rope_type": "default"},
            "sliding_attention": {"rope_type": null, "rope_theta": 500_000.0},
        }}),
        json!({"rope_parameters": {"rope_type": "default"}, "rope_theta": 500_000.0}),
    ] {
        assert_eq!(base(changes.clone()), Some(500_000.0), "{changes}");
    }
    let ntk = json!({
        "rope_parameters": {"rope_theta": 10, "rope_type": "default"}, "rope_type": "ntk", "num_attention_heads": 1,
        "max_position_embeddings": 40, "orig_max_position_embeddings": 20,
    });
    assert_eq!(base(ntk), Some(10.0 * 3f64.powf(8.0 / 6.0)));
    assert_eq!(base(json!({"rope": false, "rope_scaling": {"type": "yarn"}, "partial_rotary_factor": 0.5})), None);

    for (changes, parts) in [
        (json!({"rope_scaling": {"type": "linear", "factor": 4.0}}), &["rope_scaling", "linear", "ntk"][..]),
        (json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}), &["rope_scaling", "dynamic"]),
        (json!({"rope_scaling": {"factor": 2.0}}), &["rope_scaling", "factor\": 2.0", "rope_type"]),
        (
            json!({"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0, 2.5], "short_factor": []}}),
            &["rope_parameters", "longrope"],
        ),
        (json!({"rope_parameters": {"rope_type": "llama3"}}), &["llama3"]),
        (json!({"rope_parameters": {"rope_type": 3}}), &["rope_type = 3"]),
        (json!({"rope_parameters": {"rope_theta": "big"}}), &["rope_theta = \"big\""]),
        (json!({"rope_parameters": {"rope_theta": -1}}), &["rope_theta = -1"]),
        (json!({"rope_parameters": [1]}), &["rope_parameters", "object"]),
        (json!({"rope_scaling": "linear"}), &["rope_scaling", "object"]),
        (json!({"partial_rotary_factor": 0.5}), &["partial_rotary_factor = 0.5"]),
        (json!({"rope_parameters": {"partial_rotary_factor": 0.25}}), &["partial_rotary_factor = 0.25"]),
        (
            json!({"rope_parameters": {"full_attention": {"rope_theta": 5}, "sliding_attention": {"rope_theta": 6}}}),
            &["rope_parameters", "same for all"],
        ),
        (json!({"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}}), &["yarn"]),
    ] {
        let error = read(&with(changes.clone())).expect_err(&changes.to_string()).to_string();
        for part in parts {
            assert!(error.contains(part), "{changes}: {error}");
        }
    }
}

#[test]
fn values_may_be_written_in_several_ways() {
    let config = read(&with(json!({
        "mamba_expand": 1.5, "mamba_dt_rank": "auto", "eos_token_id": [2, 3], "bos_token_id": null, "pad_token_id": null,
        "kq_head_dim": 4, "attn_hidden_size": 8, "dtype": "float16", "kv_reuse_every_i_layer": 3, "rope_type": "default",
        "model_type": "hymba", "what": {"nobody": ["reads"]}, "num_experts": 1,
    })))
    .unwrap();
    assert_eq!((config.inner_size(), config.dt_rank(), config.mamba_dt_rank), (12, 1, None));
    assert_eq!((config.bos_token_id, &config.eos_token_id[..], config.pad_token_id), (None, &[2, 3][..], None));
    assert_eq!((config.torch_dtype, config.rope_base()), (Some(TorchDtype::F16), Some(10000.0)));
    // groups come first
    assert_eq!([1, 2, 3, 4, 5].map(|layer| config.kv_source(layer)), [1, 1, 3, 3, 5]);

    let every = json!({"kv_reuse_group": null, "kv_reuse_every_i_layer": 2, "sliding_window": null});
    let config = read(&with(every)).unwrap();
    assert_eq!([1, 2, 3, 4, 5].map(|layer| config.kv_source(layer)), [0, 2, 2, 4, 4]);
}

#[test]
fn a_config_is_written_as_it_is_read() {
    let mut odd = HymbaLmConfig::hymba_1_5b();
    odd.mamba_expand = 1.0625;
    odd.mamba_dt_rank = None;
    odd.eos_token_id = vec![2, 7];
    odd.bos_token_id = None;
    odd.kv_reuse_group = None;
    odd.rms_norm_eps = 1e-5;
    odd.rope_type = RopeType::Default;
    for config in [HymbaLmConfig::hymba_1_5b(), odd] {
        config.validate().unwrap();
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<HymbaLmConfig>(&text).unwrap(), config, "{text}");
    }
    let written = serde_json::to_value(HymbaLmConfig::hymba_1_5b()).unwrap();
    let published: Value = serde_json::from_str(&fs::read_to_string(published()).unwrap()).unwrap();
    for (key, value) in written.as_object().unwrap() {
        assert_eq!(&published[key], value, "{key}");
    }
    for key in ["architectures", "auto_map", "attn_implementation_new", "conv_dim", "layer_type"] {
        assert!(written.get(key).is_some(), "{key}");
    }
}

#[test]
fn bad_values_are_refused_by_name() {
    for (changes, parts) in [
        (json!({"hidden_size": 0}), &["hidden_size = 0", "1 to"][..]),
        (json!({"hidden_size": -8}), &["hidden_size = -8", "whole number"]),
        (json!({"hidden_size": 8.5}), &["hidden_size = 8.5", "whole number"]),
        (json!({"hidden_size": "8"}), &["hidden_size = \"8\""]),
        (json!({"hidden_size": [8]}), &["hidden_size = [8]"]),
        (json!({"hidden_size": {"a": [1]}}), &["hidden_size = {…}"]),
        (json!({"hidden_size": u64::MAX}), &["hidden_size = 18446744073709551615"]),
        (json!({"hidden_size": 1e300}), &["hidden_size = 1e300"]),
        (json!({"hidden_size": 9}), &["hidden_size = 9", "num_attention_heads = 2"]),
        (json!({"num_hidden_layers": 0}), &["num_hidden_layers = 0"]),
        (json!({"num_hidden_layers": 100_000_000}), &["num_hidden_layers = 100000000", "512"]),
        (json!({"vocab_size": 0}), &["vocab_size = 0"]),
        (json!({"vocab_size": 1u64 << 40}), &["vocab_size"]),
        (json!({"num_attention_heads": 0}), &["num_attention_heads = 0"]),
        (json!({"num_attention_heads": null}), &["num_attention_heads = null", "is required"]),
        (json!({"num_key_value_heads": 0}), &["num_key_value_heads = 0"]),
        (json!({"num_attention_heads": 4, "num_key_value_heads": 3}), &["num_key_value_heads = 3", "divide"]),
        (json!({"mamba_expand": 1.625}), &["mamba_expand = 1.625", "13"]),
        (json!({"mamba_expand": 0}), &["mamba_expand = 0"]),
        (json!({"mamba_expand": -2}), &["mamba_expand = -2"]),
        (json!({"mamba_expand": 1e300}), &["mamba_expand"]),
        (json!({"mamba_d_state": 0}), &["mamba_d_state = 0"]),
        (json!({"mamba_d_conv": 5}), &["mamba_d_conv = 5", "1 to 4"]),
        (json!({"mamba_d_conv": 0}), &["mamba_d_conv = 0"]),
        (json!({"mamba_dt_rank": 0}), &["mamba_dt_rank = 0"]),
        (json!({"mamba_dt_rank": "car"}), &["mamba_dt_rank = \"car\"", "auto"]),
        (json!({"mamba_conv_bias": 1}), &["mamba_conv_bias = 1", "true or false"]),
        (json!({"num_memory_tokens": -1}), &["num_memory_tokens = -1"]),
        (json!({"num_memory_tokens": 1 << 30}), &["num_memory_tokens"]),
        (json!({"sliding_window": 0}), &["sliding_window = 0"]),
        (json!({"sliding_window": u64::MAX}), &["sliding_window"]),
        (json!({"global_attn_idx": null}), &["global_attn_idx = null", "sliding_window"]),
        (json!({"global_attn_idx": ["a"]}), &["line 1"]),
        (json!({"global_attn_idx": 3}), &["list of at most 512 layers"]),
        (json!({"global_attn_idx": vec![0; 513]}), &["invalid length 513"]),
        (json!({"kv_reuse_group": [[2, 1]]}), &["kv_reuse_group = [2, 1]", "layer 1 cannot use"]),
        (json!({"kv_reuse_group": [[1, 1]]}), &["kv_reuse_group = [1, 1]", "layer 1 cannot use"]),
        (json!({"kv_reuse_group": [[-1, 1]]}), &["kv_reuse_group = [-1, 1]", "layer -1"]),
        (json!({"kv_reuse_group": [[7, 1]]}), &["kv_reuse_group = [7, 1]", "layer 7"]),
        (json!({"bos_token_id": 1u64 << 40}), &["bos_token_id = 1099511627776"]),
        (json!({"num_memory_tokens": 16385}), &["num_memory_tokens = 16385", "0 to 16384"]),
        (json!({"kv_reuse_group": [[]]}), &["kv_reuse_group = []"]),
        (json!({"kv_reuse_group": [[0, 1]]}), &["kv_reuse_group = [0, 1]", "layer 0, which is global"]),
        (json!({"kv_reuse_group": [[4, 5]]}), &["kv_reuse_group = [4, 5]", "layer 5 is global"]),
        (json!({"kv_reuse_group": [1, 2]}), &["line 1"]),
        (json!({"kv_reuse_group": null, "kv_reuse_every_i_layer": 2}), &["kv_reuse_every_i_layer = 2", "layer 1"]),
        (json!({"kq_norm": null}), &["kq_norm = null", "perhead-rms"]),
        (json!({"kq_norm": "layer"}), &["kq_norm = \"layer\""]),
        (json!({"mlp_hidden_act": "gelu"}), &["mlp_hidden_act = \"gelu\"", "relu2"]),
        (json!({"hidden_act": "gelu"}), &["hidden_act = \"gelu\"", "silu"]),
        (json!({"hidden_size": 6}), &["hidden_size = 6", "even width"]),
        (json!({"rope_theta": 0}), &["rope_theta = 0"]),
        (json!({"rope_theta": 1e300}), &["rope_theta"]),
        (json!({"rope_type": "dynamic_ntk"}), &["rope_type = \"dynamic_ntk\"", "ntk"]),
        (json!({"rope_type": "ntk"}), &["orig_max_position_embeddings = null"]),
        (json!({"rope_type": "ntk", "orig_max_position_embeddings": 0}), &["orig_max_position_embeddings = 0"]),
        (
            json!({"rope_type": "ntk", "orig_max_position_embeddings": 20, "max_position_embeddings": 10}),
            &["orig_max_position_embeddings = 20", "19"],
        ),
        (
            json!({"rope_type": "ntk", "orig_max_position_embeddings": 20, "num_attention_heads": 4}),
            &["rope_type = \"ntk\"", "wider than 2"],
        ),
        (
            json!({"rope_type": "ntk", "orig_max_position_embeddings": 1, "rope_theta": 3e38}),
            &["rope_theta", "lower it"],
        ),
        (json!({"max_position_embeddings": 0}), &["max_position_embeddings = 0"]),
        (json!({"rms_norm_eps": 0}), &["rms_norm_eps = 0"]),
        (json!({"rms_norm_eps": -1e-6}), &["rms_norm_eps"]),
        (json!({"rms_norm_eps": 1e-60}), &["rms_norm_eps"]),
        (json!({"rms_norm_eps": "1e-6"}), &["rms_norm_eps = \"1e-6\""]),
        (json!({"torch_dtype": "int8"}), &["torch_dtype = \"int8\"", "bfloat16"]),
        (json!({"memory_tokens_interspersed_every": 64}), &["memory_tokens_interspersed_every = 64"]),
        (json!({"attn_hidden_size": 16}), &["attn_hidden_size = 16", "-1, or 8"]),
        (json!({"kq_head_dim": 8}), &["kq_head_dim = 8", "-1, or 4"]),
        (json!({"model_type": "mamba"}), &["model_type = \"mamba\"", "hymba"]),
        (json!({"model_type": "\u{1b}[31m"}), &["\\u{1b}[31m"]),
        (json!({"intermediate_size": 1 << 24, "hidden_size": 1 << 10}), &["intermediate_size", "parameters"]),
        (json!({"hidden_size": 1 << 24, "intermediate_size": 0}), &["mamba_expand"]),
        (json!({"hidden_size": 1 << 23, "intermediate_size": 0}), &["hidden_size", "parameters"]),
    ] {
        let error = read(&with(changes.clone())).expect_err(&changes.to_string());
        assert!(matches!(error, Error::Format { .. }), "{error}");
        for part in parts {
            assert!(error.to_string().contains(part), "{changes}: {error}");
        }
    }
    for key in ["hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "intermediate_size"] {
        let error = read(&without(key)).unwrap_err();
        assert!(error.to_string().contains(&format!("{key} = null")), "{error}");
    }
    for key in ["mlp_hidden_act", "kq_norm"] {
        assert!(read(&without(key)).is_err());
    }
}

#[test]
fn fields_set_by_hand_are_checked() {
    type Change = fn(&mut HymbaLmConfig);
    let changes: [Change; 10] = [
        |config| config.mamba_expand = f64::NAN,
        |config| config.rms_norm_eps = f64::NAN,
        |config| config.rope_theta = f64::INFINITY,
        |config| config.hidden_size = usize::MAX,
        |config| config.num_hidden_layers = usize::MAX,
        |config| config.kv_reuse_every_i_layer = Some(0),
        |config| config.hidden_act = "\n".repeat(1000),
        |config| config.mamba_dt_rank = Some(usize::MAX),
        |config| config.kv_reuse_group = Some(vec![vec![1, 2], vec![3, 2]]),
        |config| config.kv_reuse_group = Some(vec![vec![2, 1]]),
    ];
    for change in changes {
        let mut config = HymbaLmConfig::hymba_1_5b();
        change(&mut config);
        assert!(matches!(config.validate(), Err(Error::Option { .. })), "{config:?}");
        assert_eq!(config.num_parameters(), None);
    }
}

#[test]
fn files_that_are_no_configs_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    let error = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        HymbaLmConfig::from_file(&path).unwrap_err().to_string()
    };
    let good = small().to_string();
    for cut in 0..good.len() {
        error(&good.as_bytes()[..cut]);
    }
    for other in ["null", "3", "\"config\""] {
        assert!(error(other.as_bytes()).contains("expected a config:"), "{}", error(other.as_bytes()));
    }
    assert!(error(b"[]").contains("is required"));
    assert!(error(b"{\"rope\": \xff}").contains("UTF-8"));
    assert!(error(b"{\"rope\": true, \"rope\": true}").contains("duplicate field `rope`"));
    assert!(error(b"{\"num_hidden_layers\": NaN}").contains("num_hidden_layers = \"NaN\""));
    assert!(error(b"{\"rope_theta\": 1e999}").contains("line 1"));
    for key in ["rope", "kv_reuse_group", "global_attn_idx", "ignored"] {
        for open in ["[", "{\"a\":"] {
            error(format!("{{\"{key}\": {}", open.repeat(200_000)).as_bytes());
        }
    }
    assert!(error(&vec![b' '; MAX_CONFIG as usize + 1]).contains("at most 1048576"));
    assert!(matches!(HymbaLmConfig::from_file(folder.path()), Err(Error::Format { .. })));
    assert!(matches!(HymbaLmConfig::from_file(folder.path().join("absent")), Err(Error::Io { .. })));
}

#[test]
fn quantisation_is_written_and_read() {
    for (bits, quantization) in [(8, Quantization::Bits8), (4, Quantization::Bits4)] {
        let quantized = json!({"quant_method": "hymba", "bits": bits, "group_size": 32, "other": [1.5, {}]});
        let config = read(&with(json!({"quantization_config": quantized}))).unwrap();
        assert_eq!(config.quantization, quantization);
        let written = serde_json::to_value(&config).unwrap();
        assert_eq!(written["quantization_config"], json!({"quant_method": "hymba", "bits": bits, "group_size": 32}));
        assert_eq!(read(&written).unwrap(), config);
    }
    let plain = read(&with(json!({"quantization_config": null}))).unwrap();
    assert_eq!(plain, read(&small()).unwrap());
    assert!(serde_json::to_value(&plain).unwrap().get("quantization_config").is_none());
    for bad in [json!([]), json!("hymba"), json!(8), json!({"quant_method": "gptq", "bits": 4, "group_size": 32})] {
        assert!(read(&with(json!({"quantization_config": bad}))).is_err(), "{bad}");
    }
}
