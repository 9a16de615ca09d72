//! The arithmetic, for the instruction sets of the CPU at hand and for several threads.
//!
//! Each kernel is written once over sixteen lanes ([`simd`]) and tested, on every instruction set, against a plain
//! reference that stands in its tests.

pub(crate) mod attention;
#[cfg(feature = "lm")]
pub(crate) mod bfloat16;
pub(crate) mod clock;
pub(crate) mod conv;
#[cfg(feature = "profile")]
pub(crate) mod limits;
pub(crate) mod math;
pub(crate) mod matmul;
#[cfg(feature = "lm")]
pub(crate) mod matrix;
#[cfg(feature = "lm")]
#[allow(unsafe_code)]
mod memory;
pub(crate) mod norm;
pub(crate) mod parallel;
#[cfg(feature = "lm")]
pub(crate) mod quantized;
#[cfg(feature = "lm")]
mod quants;
pub(crate) mod scan;
#[allow(unsafe_code)]
pub(crate) mod simd;
#[cfg(feature = "lm")]
#[allow(unsafe_code)]
pub(crate) mod team;
