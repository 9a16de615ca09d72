//! The table that [`Hymba::summary`] prints.

use std::fmt::Write;

use super::model::Hymba;

/// A line of the table: a parameter, or the same parameter of several blocks.
struct Line {
    name: String,
    shape: Vec<usize>,
    blocks: usize,
}

impl Hymba {
    /// A table of the parameters: name in files, shape, and how many numbers; blocks of one kind share a line. Below it
    /// the totals.
    ///
    /// ```
    /// use hymba::{Hymba, HymbaOptions};
    ///
    /// let model = Hymba::build(HymbaOptions::new(12).hidden_size(64))?;
    /// println!("{}", model.summary());
    /// assert!(model.summary().contains("blocks.{0..=3}.mamba.in_proj.weight"));
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn summary(&self) -> String {
        let blocks = self.blocks().len();
        let mut lines: Vec<Line> = Vec::new();
        self.visit_parameters(&mut |name, parameter| {
            let (name, repeats) = match name.strip_prefix("blocks.").and_then(|rest| rest.split_once('.')) {
                None => (name.to_string(), 1),
                Some((_, rest)) if blocks == 1 => (format!("blocks.0.{rest}"), 1),
                Some(("0", rest)) => (format!("blocks.{{0..={}}}.{rest}", blocks - 1), blocks),
                Some(_) => return,
            };
            lines.push(Line { name, shape: parameter.shape(), blocks: repeats });
        });

        let widest = lines.iter().map(|line| line.name.len()).max().unwrap_or(0);
        let mut table = format!("{:widest$}  {:>14}  {:>16}\n", "parameter", "shape", "numbers");
        for line in &lines {
            let numbers = grouped(line.shape.iter().product());
            let numbers = if line.blocks > 1 { format!("{} × {numbers}", line.blocks) } else { numbers };
            let shape = format!("{:?}", line.shape);
            let _ = writeln!(table, "{:widest$}  {shape:>14}  {numbers:>16}", line.name);
        }
        let count = self.num_parameters();
        let options = self.options();
        let _ = writeln!(
            table,
            "{} parameters, {:.1} MB{}; frames of width {} → {}, {} blocks, {} meta tokens, variant {:?}",
            grouped(count),
            self.num_bytes() as f64 / 1e6,
            self.storage().map_or(String::new(), |storage| format!(", large matrices stored as {storage:?}")),
            options.embed_dim,
            options.output_size(),
            options.num_layers,
            options.num_meta_tokens,
            options.variant,
        );
        table
    }
}

/// 1234567 → 1,234,567
fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}
