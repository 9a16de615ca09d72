//! Continues a text with NVIDIA's Hymba language model, and says how fast. For a conversation, quantised weights, sampling options
//! and measurements see the program: `hymba complete`, `hymba chat`, `hymba bench`.
//!
//! ```sh
//! # a folder as the Hugging Face Hub has it: config.json, *.safetensors, tokenizer.json
//! cargo run --release --features tokenizer --example generate -- Hymba-1.5B-Base "The capital of France is"
//! ```

use std::error::Error;
use std::io::Write;
use std::ops::ControlFlow;
use std::time::Instant;

use hymba::HymbaLm;
use hymba::lm::{GenerateOptions, Tokenizer};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, prompt] = arguments.as_slice() else {
        return Err("usage: generate DIR PROMPT".into());
    };
    let tokenizer = Tokenizer::from_dir(folder)?;
    let lm = HymbaLm::from_dir(folder)?;
    let options = GenerateOptions::from_dir(folder)?.max_tokens(64);

    print!("{prompt}");
    let start = Instant::now();
    let written = lm.generate_text(&tokenizer, prompt, &options, |text| {
        print!("{text}");
        // whoever closed the other end wants no more
        if std::io::stdout().flush().is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    let (tokens, seconds) = (written.generation.ids.len(), start.elapsed().as_secs_f64());
    println!("\n{tokens} tokens in {seconds:.2} s; ended by {:?}", written.generation.finish);
    Ok(())
}
