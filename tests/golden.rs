//! Expected values of independent implementations: see `tests/data/README.md`.

mod common;

use common::{data, difference, frame, frames, model, tensors};
use hymba::ndarray::{Axis, concatenate, s};

const TOLERANCE: f64 = 1e-5;

#[test]
fn hymba_outputs_and_every_block() {
    for case in ["small", "no_input_projection", "longer_than_window", "ragged_lengths"] {
        let folder = data("hymba").join(case);
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
            for (i, (meta, block)) in seen.meta.iter().zip(&seen.blocks).enumerate() {
                let parts = [
                    ("mamba", &meta.mamba, &block.mamba),
                    ("attention", &meta.attention, &block.attention),
                    ("gate", &meta.gate, &block.gate),
                    ("output", &meta.output, &block.output),
                ];
                for (part, meta, block) in parts {
                    let name = format!("block_{i}.{part}");
                    let meta = meta.index_axis(Axis(0), 0);
                    let got = concatenate(Axis(0), &[meta, block.slice(rows)]).unwrap();
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
