//! The table that [`Hymba::summary`] prints.

use std::collections::HashMap;
use std::fmt::Write;

use super::model::Hymba;
use super::pattern::{BlockKind, Pattern};

/// A line of the table: a parameter, or the same parameter of several blocks.
struct Line {
    name: String,
    shape: Vec<usize>,
    /// Where the name is that of a part of these blocks.
    blocks: Vec<usize>,
}

impl Hymba {
    /// A table of the parameters: name in files, shape, and how many numbers; blocks that have the same parameter share a line.
    /// Below it the totals, in which what several blocks share counts once.
    ///
    /// ```
    /// use hymba::{Hymba, HymbaOptions};
    ///
    /// let model = Hymba::build(HymbaOptions::new(12).hidden_size(64))?;
    /// println!("{}", model.summary());
    /// assert!(model.summary().contains("blocks.{0..=3}.mamba.in_proj.weight"));
    ///
    /// let jamba = Hymba::build(HymbaOptions::jamba(12).hidden_size(64))?;
    /// assert!(jamba.summary().contains("blocks.{2,5}.attention.q_proj.weight"));
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn summary(&self) -> String {
        let mut lines: Vec<Line> = Vec::new();
        let mut places = HashMap::new();
        self.visit_parameters(&mut |name, parameter| {
            let of_a_block = name.strip_prefix("blocks.").and_then(|rest| rest.split_once('.'));
            let (name, block): (_, Option<usize>) =
                match of_a_block.and_then(|(block, rest)| Some((rest, block.parse().ok()?))) {
                    Some((rest, block)) => (rest, Some(block)),
                    None => (name, None),
                };
            let place = *places.entry((name.to_string(), block.is_some())).or_insert(lines.len());
            if place == lines.len() {
                lines.push(Line { name: name.to_string(), shape: parameter.shape(), blocks: Vec::new() });
            }
            lines[place].blocks.extend(block);
        });
        for line in lines.iter_mut().filter(|line| !line.blocks.is_empty()) {
            line.name = format!("blocks.{}.{}", list(&line.blocks), line.name);
        }

        let widest = lines.iter().map(|line| line.name.len()).max().unwrap_or(0);
        let mut table = format!("{:widest$}  {:>14}  {:>16}\n", "parameter", "shape", "numbers");
        for line in &lines {
            let numbers = grouped(line.shape.iter().product());
            let numbers = if line.blocks.len() > 1 { format!("{} × {numbers}", line.blocks.len()) } else { numbers };
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
        if options.pattern != Pattern::Parallel {
            let _ = write!(table, "pattern {}", options.pattern.kind());
            if let Some(every) = options.pattern.attention_every() {
                let _ = write!(table, ", attention_every {every}");
            }
            if options.pattern.shares() {
                let by_shared = BlockKind::Fed { by_shared: true };
                let uses: Vec<_> = (0..options.num_layers).filter(|&i| options.pattern.at(i) == by_shared).collect();
                let _ = write!(table, "; shared_block is used {} times, by blocks.{}", uses.len(), list(&uses));
            }
            table.push('\n');
        }
        table
    }
}

/// 2 → 2, 0 1 2 3 → {0..=3}, 0 1 3 → {0..=1,3}
fn list(blocks: &[usize]) -> String {
    if let [block] = blocks {
        return block.to_string();
    }
    let runs = blocks.chunk_by(|a, b| a + 1 == *b).map(|run| match run {
        [first, .., last] => format!("{first}..={last}"),
        _ => run[0].to_string(),
    });
    format!("{{{}}}", runs.collect::<Vec<_>>().join(","))
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
