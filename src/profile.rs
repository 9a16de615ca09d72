//! Where the time goes, for those who work on the speed of this crate: the feature `profile`.
//!
//! The kernels are timed on every thread, in parts, together with the least work that each part needs; [`Limits`] says how
//! fast this machine could do that. `examples/profile.rs` makes tables of it.
//!
//! ```
//! use hymba::ndarray::Array3;
//! use hymba::{Hymba, HymbaOptions, profile};
//!
//! let model = Hymba::build(HymbaOptions::new(12).hidden_size(64).num_layers(2))?;
//! let x = Array3::<f32>::ones((3, 20, 12));
//! model.forward(&x)?; // the first call computes more
//! profile::reset();
//! model.forward(&x)?;
//! let limits = profile::Limits::measure();
//! for part in profile::report() {
//!     let fraction = limits.seconds(&part.work) / part.seconds;
//!     println!("{}: {} s in {} calls, {fraction:.2} of its limit", part.name, part.seconds, part.calls);
//! }
//! # assert!(profile::report().iter().any(|part| part.name == "products" && part.calls > 0));
//! # Ok::<(), hymba::Error>(())
//! ```

pub use crate::kernels::limits::Limits;
pub use crate::kernels::profiler::{Cost, Simulation, StageReport, report, reset, simulate};
