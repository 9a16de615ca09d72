//! What the file of results has of each trial.

use serde::{Deserialize, Serialize};

use crate::trial::{Outcome, Settings, Trial};
pub use crate::trials::{append, load};

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    #[serde(flatten)]
    pub trial: Trial,
    pub settings: Settings,
    #[serde(flatten)]
    pub outcome: Outcome,
    pub seconds: f64,
    pub simd: String,
    /// What the user says about the machine and the version.
    pub note: String,
}

/// Whether the trial is among the records.
pub fn is_done(records: &[Record], trial: &Trial, settings: &Settings) -> bool {
    records.iter().any(|record| record.trial == *trial && record.settings == *settings)
}
