//! The perplexity of a text under a model whose tokens are bytes, in windows that are scored alone. For tokenizers, and to compare
//! bits, see the program: `hymba perplexity`.
//!
//! ```sh
//! cargo run --release --features lm --example perplexity -- tests/data/byte_lm tests/data/byte_lm/text.txt
//! ```

use std::error::Error;

use hymba::HymbaLm;

/// Tokens scored together.
const WINDOW: usize = 512;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, text] = arguments.as_slice() else {
        return Err("usage: perplexity DIR FILE".into());
    };
    let lm = HymbaLm::from_dir(folder)?;
    let first = lm.config().bos_token_id.ok_or("the model has no token to begin a text with")?;
    let ids: Vec<u32> = std::fs::read(text)?.into_iter().map(u32::from).collect();

    let mut total = 0.0;
    for window in ids.chunks(WINDOW) {
        total -= lm.log_likelihood(&[first], window)?.total;
    }
    let mean = total / ids.len() as f64;
    println!("{} bytes: {:.4} bits each; perplexity {:.4}", ids.len(), mean / std::f64::consts::LN_2, mean.exp());
    Ok(())
}
