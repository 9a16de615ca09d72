//! Any options: an error, or a model whose ways of running agree.

#![no_main]

use hymba::ndarray::{Array2, Array3, Axis, s};
use hymba::{Hymba, HymbaOptions, Pattern};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

/// Parameters of the largest model that is built, about.
const MAX_PARAMETERS: usize = 1 << 18;

#[derive(Debug, Arbitrary)]
enum Size {
    Small(u8),
    Any(usize),
}

impl Size {
    fn number(&self) -> usize {
        match *self {
            Size::Small(number) => usize::from(number % 24),
            Size::Any(number) => number,
        }
    }
}

#[derive(Debug, Arbitrary)]
enum Options<'a> {
    Text(&'a str),
    Sizes { embed_dim: Size, hidden_size: Size, sizes: [Size; 5], dropout: f32, seed: u64, edifice: bool, pattern: (u8, Size) },
}

impl Options<'_> {
    fn read(&self) -> Option<HymbaOptions> {
        match self {
            Options::Text(text) => serde_json::from_str(text).ok(),
            Options::Sizes { embed_dim, hidden_size, sizes, dropout, seed, edifice, pattern } => {
                let embed_dim = embed_dim.number();
                let options = if *edifice { HymbaOptions::edifice(embed_dim) } else { HymbaOptions::new(embed_dim) };
                let attention_every = pattern.1.number();
                let pattern = match pattern.0 % 8 {
                    0 => Pattern::Mamba,
                    1 => Pattern::Attention,
                    2 | 3 => Pattern::Alternating { attention_every },
                    4 | 5 => Pattern::SharedAttention { attention_every },
                    _ => Pattern::Parallel,
                };
                let [state_size, num_layers, num_heads, num_meta_tokens, window_size] = sizes;
                Some(
                    options
                        .hidden_size(hidden_size.number())
                        .state_size(state_size.number())
                        .num_layers(num_layers.number())
                        .num_heads(num_heads.number())
                        .num_meta_tokens(num_meta_tokens.number())
                        .window_size(window_size.number())
                        .dropout(*dropout)
                        .pattern(pattern)
                        .seed(*seed),
                )
            }
        }
    }
}

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    batch: u8,
    length: u8,
    options: Options<'a>,
}

fuzz_target!(|input: Input| {
    let Some(options) = input.options.read() else { return };
    if options.validate().is_err() {
        assert!(Hymba::build(options).is_err());
        return;
    }
    if about_parameters(&options) > MAX_PARAMETERS {
        return;
    }
    let text = serde_json::to_string(&options).expect("options are plain numbers");
    assert_eq!(serde_json::from_str::<HymbaOptions>(&text).expect("they were valid"), options);

    let model = Hymba::build(options).expect("they were valid");
    let (batch, length) = (1 + usize::from(input.batch % 3), 1 + usize::from(input.length % 8));
    let x = Array3::from_shape_fn((batch, length, model.options().embed_dim), |(row, t, i)| {
        (row as f32 + 0.7 * t as f32 + 1.3 * i as f32).sin()
    });
    let sequence = model.forward_sequence(&x).expect("the input fits the model");

    let lengths: Vec<usize> = (0..batch).map(|row| length.saturating_sub(row).max(1)).collect();
    let ragged = model.forward_ragged(&x, &lengths).expect("the input fits the model");
    for (row, &length) in lengths.iter().enumerate() {
        close(
            &ragged.slice(s![row..row + 1, ..]).to_owned(),
            &sequence.slice(s![row..row + 1, length - 1, ..]).to_owned(),
        );
    }

    let mut state = model.new_state(batch);
    for t in 0..length {
        let y = model.step(&x.index_axis(Axis(1), t), &mut state).expect("the frame fits the state");
        close(&y, &sequence.index_axis(Axis(1), t).to_owned());
    }
});

fn about_parameters(options: &HymbaOptions) -> usize {
    let (h, layers) = (options.hidden_size, options.num_layers);
    let row =
        [64, h.saturating_mul(32), options.state_size.saturating_mul(8), options.num_meta_tokens.saturating_mul(2)];
    let row = row.into_iter().fold(0, usize::saturating_add);
    row.saturating_mul(h).saturating_mul(layers).saturating_add(options.embed_dim.saturating_mul(h))
}

fn close(a: &Array2<f32>, b: &Array2<f32>) {
    assert_eq!(a.dim(), b.dim());
    for (a, b) in a.iter().zip(b) {
        assert!((a - b).abs() <= 1e-3 * b.abs().max(1.0), "{a} is not {b}");
    }
}
