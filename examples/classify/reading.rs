//! Options of how files are read.

use hymba::series::{Column, CsvLayout, ReadOptions, TargetKind, TimeInput};

/// Whether the argument is one of these options; then it is set.
pub fn option(
    options: &mut ReadOptions,
    argument: &str,
    value: &mut dyn FnMut() -> Result<String, String>,
) -> Result<bool, String> {
    match argument {
        "--target" => options.target = Some(column(&value()?)),
        "--id" => options.id = Some(column(&value()?)),
        "--time-column" => options.time_column = Some(column(&value()?)),
        "--classes" => options.target_kind = TargetKind::Classes,
        "--numbers" => options.target_kind = TargetKind::Values,
        "--wide" => options.layout = Some(CsvLayout::Wide),
        "--long" => options.layout = Some(CsvLayout::Long),
        "--no-header" => options.header = false,
        "--delimiter" => {
            let text = value()?;
            let mut all = text.chars();
            options.delimiter = match (text.as_str(), all.next(), all.next()) {
                ("tab" | "\\t", ..) => Some('\t'),
                (_, Some(one), None) => Some(one),
                _ => return Err(format!("--delimiter is one character, or tab; found {text:?}")),
            };
        }
        "--time" => {
            options.time = match value()?.as_str() {
                "even" => TimeInput::Even,
                "delta" => TimeInput::Delta,
                "log-delta" => TimeInput::LogDelta,
                other => return Err(format!("--time is even, delta or log-delta, found {other:?}")),
            }
        }
        _ => return Ok(false),
    }
    Ok(true)
}

/// A place if it is a number.
fn column(text: &str) -> Column {
    text.parse().map_or_else(|_| Column::Name(text.into()), Column::Index)
}
