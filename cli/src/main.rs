//! The program `hymba`.
fn main() {}
