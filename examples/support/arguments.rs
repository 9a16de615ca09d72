//! Arguments of the form `--name value`.

use std::str::FromStr;

/// The arguments that are left.
pub struct Arguments(std::iter::Skip<std::env::Args>);

impl Arguments {
    pub fn new() -> Self {
        Arguments(std::env::args().skip(1))
    }

    /// The next name.
    pub fn next(&mut self) -> Option<String> {
        self.0.next()
    }

    /// What follows the name.
    pub fn value<T: FromStr>(&mut self, name: &str) -> Result<T, String> {
        let value = self.0.next().ok_or_else(|| format!("{name} needs a value"))?;
        value.parse().map_err(|_| format!("{name} {value:?} is not usable"))
    }
}
