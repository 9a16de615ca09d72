//! The variants of the model, and how they differ.

use serde::{Deserialize, Serialize};

use crate::kernels::norm::SmallVariance;
use crate::layers::TimeStep;

/// Which arithmetic the layers use. See [`HymbaOptions::edifice`](crate::HymbaOptions::edifice).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Variant {
    /// The model this crate documents: meta tokens travel through every block.
    #[default]
    Hymba,
    /// The arithmetic of `Edifice.SSM.Hymba` 0.2.0 (Elixir, Axon), to the letter.
    Edifice,
}

/// Everything that differs between the two variants.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Differences {
    /// The projections into and out of the Mamba branch have a bias.
    pub projection_bias: bool,
    /// A and the skip D are learned; otherwise A is −1 … −n and there is no skip.
    pub learned_decay: bool,
    pub time_step: TimeStep,
    /// Every block has its own meta keys and values; otherwise meta tokens travel through the blocks.
    pub own_meta: bool,
    pub small_variance: SmallVariance,
}

impl Variant {
    pub(crate) fn differences(self) -> Differences {
        match self {
            Variant::Hymba => Differences {
                projection_bias: false,
                learned_decay: true,
                time_step: TimeStep::Softplus,
                own_meta: false,
                small_variance: SmallVariance::AddEpsilon,
            },
            Variant::Edifice => Differences {
                projection_bias: true,
                learned_decay: false,
                time_step: TimeStep::Clipped,
                own_meta: true,
                small_variance: SmallVariance::ClipBelowEpsilon,
            },
        }
    }
}
