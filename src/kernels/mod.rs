//! The arithmetic, for the instruction sets of this CPU and for several threads.
//!
//! Each kernel is written once over sixteen lanes ([`simd`]) and tested, on every instruction set, against a plain
//! reference that stands in its tests. (This file is named so that the benchmarks can include it.)

pub(crate) mod attention;
pub(crate) mod conv;
#[cfg(feature = "lm")]
pub(crate) mod cross_entropy;
pub(crate) mod features;
#[cfg(feature = "profile")]
pub(crate) mod limits;
pub(crate) mod math;
pub(crate) mod matmul;
#[allow(unsafe_code)]
pub(crate) mod memory;
pub(crate) mod norm;
pub(crate) mod profiler;
pub(crate) mod rows;
pub(crate) mod scan;
#[allow(unsafe_code)]
pub(crate) mod simd;
#[allow(unsafe_code)]
pub(crate) mod team;
