//! Expected values of independent implementations: see `tests/data/README.md`.

mod common;

use common::{HYBRIDS, data, difference, frame, frames, model, tensors};
use hymba::ndarray::{Array2, Array3, Axis, concatenate, s};
use hymba::{BlockInspection, Hymba, HymbaOptions};

const TOLERANCE: f64 = 1e-5;
const EDIFICE_TOLERANCE: f64 = 2e-5;

#[test]
fn hymba_outputs_and_every_block() {
    every_block("hymba", &["small", "no_input_projection", "longer_than_window", "ragged_lengths"]);
}

#[test]
fn patterns_outputs_and_every_block() {
    every_block("hybrids", &HYBRIDS);
}

fn every_block(of: &str, cases: &[&str]) {
    for case in cases {
        let folder = data(of).join(case);
        let model = model(&folder);
        let expected = tensors(&folder.join("expected.safetensors"));
        let x = frames(&expected["input"]);
        let (batch, l, _) = x.dim();
        let lengths: Vec<usize> = match expected.get("lengths") {
            Some(lengths) => lengths.iter().map(|length| *length as usize).collect(),
            None => vec![l; batch],
        };
        let check = |name: &str, difference: f64| {
            assert!(difference <= TOLERANCE, "{case} {name}: {difference:e}");
        };
        check("output", difference(&model.forward_ragged(&x, &lengths).unwrap(), &expected["output"]));

        let sequence = model.forward_sequence(&x).unwrap();
        let seen = model.inspect(&x).unwrap();
        let k = model.options().num_meta_tokens;
        for (row, &length) in lengths.iter().enumerate() {
            let rows = s![row, ..length, ..];
            check("sequence_output", {
                let want = expected["sequence_output"].slice(rows).to_owned().into_dyn();
                difference(&sequence.slice(rows).to_owned(), &want)
            });
            for (i, block) in seen.blocks.iter().enumerate() {
                for (part, of) in PARTS {
                    let name = format!("block_{i}.{part}");
                    assert_eq!(of(block).is_empty(), !expected.contains_key(&name), "{case} {name}");
                    if of(block).is_empty() {
                        continue;
                    }
                    let meta = seen.meta.get(i).map_or(Array2::zeros((0, of(block).dim().2)), |meta| {
                        of(meta).index_axis(Axis(0), 0).to_owned()
                    });
                    let got = concatenate(Axis(0), &[meta.view(), of(block).slice(rows)]).unwrap();
                    let want = expected[&name].slice(s![row, ..k + length, ..]).to_owned().into_dyn();
                    check(&name, difference(&got, &want));
                }
            }
        }

        let mut state = model.new_state(batch);
        for t in 0..l {
            let y = model.step(&frame(&x, t), &mut state).unwrap();
            for row in (0..batch).filter(|&row| t < lengths[row]) {
                let want = expected["sequence_output"].slice(s![row, t, ..]).to_owned().into_dyn();
                check("step", difference(&y.row(row).to_owned(), &want));
            }
        }
    }
}

/// The parts of a block and their names in files.
type Part = fn(&BlockInspection) -> &Array3<f32>;
const PARTS: [(&str, Part); 5] = [
    ("shared_output", |block| &block.shared_output),
    ("mamba", |block| &block.mamba),
    ("attention", |block| &block.attention),
    ("gate", |block| &block.gate),
    ("output", |block| &block.output),
];

#[test]
fn edifice_outputs_and_every_block() {
    for case in ["small", "no_input_projection", "single", "long", "grad_small"] {
        let folder = data("edifice").join(case);
        let options: HymbaOptions = common::options(&folder);
        let expected = tensors(&folder.join("expected.safetensors"));
        let x = frames(&expected["input"]);
        let (batch, l, _) = x.dim();
        let files = ["model.safetensors", "model.nx", "model_data.nx"].map(|file| folder.join(file));
        for file in files.iter().filter(|file| file.exists()) {
            let model = Hymba::load_edifice(file, options.clone()).unwrap();
            let y = model.forward(&x).unwrap();
            for name in ["output", "output_f64"] {
                assert!(difference(&y, &expected[name]) <= EDIFICE_TOLERANCE, "{} {name}", file.display());
            }
            let mut state = model.new_state(batch);
            let last = (0..l).map(|t| model.step(&frame(&x, t), &mut state).unwrap()).last().unwrap();
            assert!(difference(&last, &expected["output"]) <= EDIFICE_TOLERANCE, "{} steps", file.display());
        }
    }

    let folder = data("edifice").join("small");
    let model = Hymba::load_edifice(folder.join("model.nx"), common::options(&folder)).unwrap();
    let x = frames(&tensors(&folder.join("expected.safetensors"))["input"]);
    let layers = tensors(&folder.join("intermediates.safetensors"));
    let seen = model.inspect(&x).unwrap();
    assert!(seen.meta.is_empty());
    for (i, block) in seen.blocks.iter().enumerate() {
        for (layer, got) in [
            ("mamba_out_proj", &block.mamba),
            ("attn_out_proj", &block.attention),
            ("fusion_gate", &block.gate),
            ("ffn_residual", &block.output),
        ] {
            let name = format!("hymba_block_{}_{layer}", i + 1);
            assert!(difference(got, &layers[&name]) <= EDIFICE_TOLERANCE, "{name}");
        }
    }
    assert!(difference(&model.forward_sequence(&x).unwrap(), &layers["final_norm"]) <= EDIFICE_TOLERANCE);
}
