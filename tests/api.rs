//! What users rely on without saying so.

mod common;

use common::wave;
use hymba::{Error, Hymba, HymbaBlock, HymbaOptions, HymbaState, MambaBranch, MetaTokenAttention};

#[test]
fn types_cross_threads() {
    fn shared<T: Send + Sync + Clone + std::fmt::Debug + 'static>() {}
    shared::<Hymba>();
    shared::<HymbaOptions>();
    shared::<HymbaState>();
    shared::<HymbaBlock>();
    shared::<MambaBranch>();
    shared::<MetaTokenAttention>();
    #[cfg(feature = "lm")]
    {
        fn shared<T: Send + Sync + std::fmt::Debug + 'static>() {}
        shared::<hymba::HymbaLm>();
        shared::<hymba::LmState>();
        shared::<hymba::lm::Sampler>();
        #[cfg(feature = "tokenizer")]
        shared::<hymba::lm::Tokenizer>();
    }
    fn error<T: std::error::Error + Send + Sync + 'static>() {}
    error::<Error>();
}

#[test]
fn documented_defaults() {
    let options = HymbaOptions::new(287);
    let numbers = (options.hidden_size, options.state_size, options.num_layers, options.num_heads);
    assert_eq!(numbers, (256, 16, 4, 4));
    assert_eq!((options.num_meta_tokens, options.window_size, options.seed), (4, 60, 0));
    assert_eq!(options.dropout, 0.0);
    assert_eq!(HymbaOptions::recommended(287), options.clone().dropout(0.1));
    assert_eq!(HymbaOptions::DEFAULT_HIDDEN_SIZE, options.output_size());
}

#[test]
fn the_size_of_the_default_models() {
    // 4 blocks of 1,257,728 and the input projection, meta tokens and final norm
    let model = Hymba::build(HymbaOptions::new(287)).unwrap();
    let mut count = 0;
    model.visit(&mut |_, array| count += array.len());
    assert_eq!(model.num_parameters(), count);
    // as the original counts them
    assert_eq!(Hymba::build(HymbaOptions::edifice(287)).unwrap().num_parameters(), 5_291_776);
    for options in [HymbaOptions::new(5).hidden_size(36).num_heads(3).state_size(7).num_meta_tokens(3), {
        HymbaOptions::edifice(36).hidden_size(36).num_heads(2)
    }] {
        let limit = options.clone().embed_dim;
        assert!(Hymba::build(options).unwrap().num_parameters() > limit);
    }
}

#[test]
fn one_model_serves_many_threads() {
    let model = Hymba::build(HymbaOptions::new(6).hidden_size(32).num_layers(2)).unwrap();
    let x = wave(2, 20, 6);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| model.forward(&x).unwrap())).collect();
        let results: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
    });
}

#[test]
fn names_are_those_of_files() {
    let names = |options: HymbaOptions| {
        let mut names = Vec::new();
        Hymba::build(options).unwrap().visit(&mut |name, _| names.push(name.to_string()));
        names
    };
    let own = names(HymbaOptions::new(6).hidden_size(8).num_heads(2).num_layers(1));
    let expected = "input_proj.weight input_proj.bias meta_tokens blocks.0.norm.weight blocks.0.norm.bias \
        blocks.0.mamba.in_proj.weight blocks.0.mamba.conv.weight blocks.0.mamba.conv.bias blocks.0.mamba.x_proj.weight \
        blocks.0.mamba.dt_proj.weight blocks.0.mamba.dt_proj.bias blocks.0.mamba.a_log blocks.0.mamba.d \
        blocks.0.mamba.out_proj.weight blocks.0.attention.q_proj.weight blocks.0.attention.q_proj.bias \
        blocks.0.attention.k_proj.weight blocks.0.attention.k_proj.bias blocks.0.attention.v_proj.weight \
        blocks.0.attention.v_proj.bias blocks.0.attention.out_proj.weight blocks.0.attention.out_proj.bias \
        blocks.0.gate.weight blocks.0.gate.bias blocks.0.ffn_norm.weight blocks.0.ffn_norm.bias \
        blocks.0.ffn.up.weight blocks.0.ffn.up.bias blocks.0.ffn.down.weight blocks.0.ffn.down.bias \
        final_norm.weight final_norm.bias";
    assert_eq!(own, expected.split_whitespace().collect::<Vec<_>>());
    let without = names(HymbaOptions::new(8).hidden_size(8).num_heads(2).num_layers(1).num_meta_tokens(0));
    assert!(!without.iter().any(|name| name.starts_with("input_proj") || name == "meta_tokens"));
}

#[test]
fn nothing_prints_megabytes() {
    let model = Hymba::build(HymbaOptions::new(287)).unwrap();
    assert!(format!("{model:?}").len() < 1000);
    assert!(format!("{:?}", model.blocks()[0]).len() < 4000);
    assert!(format!("{:?}", model.new_state(8)).len() < 200);
    assert!(model.summary().len() < 4000);
    let seen = model.inspect(&wave(1, 60, 287)).unwrap();
    assert!(format!("{seen:?}").len() < 1_000_000);
}
