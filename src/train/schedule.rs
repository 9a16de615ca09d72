//! Learning rates that change with time.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The learning rate of every step: a straight warm-up to the peak, then constant, or down to the floor.
///
/// Steps count from 0. A warm-up of w steps climbs from peak/(w + 1) so that step w is the first at the peak; the floor is
/// reached `steps` steps after the beginning, warm-up included, and kept from then on. So none of the first `steps` steps has a
/// rate of 0.
///
/// Nothing is checked until [`validate`](Self::validate), which [`AdamW::new`](super::AdamW::new) calls.
///
/// ```
/// use hymba::train::Schedule;
///
/// let schedule = Schedule::cosine(1e-3, 1000).warm_up(3).floor(1e-5);
/// assert_eq!(schedule.rate(0), 2.5e-4);
/// assert_eq!(schedule.rate(3), 1e-3);
/// assert_eq!(schedule.rate(5000), 1e-5);
/// assert!(schedule.warm_up(1000).validate().is_err());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    shape: Shape,
    peak: f32,
    floor: f32,
    warm_up: u64,
    steps: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Shape {
    Constant,
    Linear,
    Cosine,
}

impl Schedule {
    /// Always the same rate; above 0.
    pub fn constant(rate: f32) -> Self {
        Schedule { shape: Shape::Constant, peak: rate, floor: 0.0, warm_up: 0, steps: 0 }
    }

    /// Down from `peak` in a straight line, for `steps` steps.
    ///
    /// ```
    /// use hymba::train::Schedule;
    ///
    /// let schedule = Schedule::linear(1.0, 4);
    /// assert_eq!([0, 1, 2, 3, 4].map(|step| schedule.rate(step)), [1.0, 0.75, 0.5, 0.25, 0.0]);
    /// ```
    pub fn linear(peak: f32, steps: u64) -> Self {
        Schedule { shape: Shape::Linear, steps, ..Self::constant(peak) }
    }

    /// Down from `peak` along half a period of the cosine, for `steps` steps.
    ///
    /// ```
    /// use hymba::train::Schedule;
    ///
    /// assert_eq!([0, 2, 4].map(|step| Schedule::cosine(1.0, 4).rate(step)), [1.0, 0.5, 0.0]);
    /// ```
    pub fn cosine(peak: f32, steps: u64) -> Self {
        Schedule { shape: Shape::Cosine, steps, ..Self::constant(peak) }
    }

    /// Sets how many steps the climb to the peak takes; 0 by default, and fewer than all steps.
    pub fn warm_up(mut self, warm_up: u64) -> Self {
        self.warm_up = warm_up;
        self
    }

    /// Sets the rate at which the decay ends, from 0, the default, to the peak.
    pub fn floor(mut self, floor: f32) -> Self {
        self.floor = floor;
        self
    }

    /// The rate of the step after `step` others.
    pub fn rate(&self, step: u64) -> f32 {
        let (peak, floor) = (f64::from(self.peak), f64::from(self.floor));
        if step < self.warm_up {
            return (peak * (step as f64 + 1.0) / (self.warm_up as f64 + 1.0)) as f32;
        }
        let way_down = self.steps.saturating_sub(self.warm_up).max(1);
        let gone = ((step - self.warm_up) as f64 / way_down as f64).min(1.0);
        let left = match self.shape {
            Shape::Constant => 1.0,
            Shape::Linear => 1.0 - gone,
            Shape::Cosine => 0.5 + 0.5 * (PI * gone).cos(),
        };
        (floor + (peak - floor) * left) as f32
    }

    /// Checks every number.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] names the first that is outside its range: the peak must be finite and above 0, the floor from 0 to
    /// the peak, and the warm-up shorter than the steps.
    pub fn validate(&self) -> Result<()> {
        let bad = |option, given: String, allowed: String| Err(Error::Option { option, given, allowed });
        if !(self.peak > 0.0 && self.peak.is_finite()) {
            let allowed = "it must be a finite number above 0; 0.001 is a good first try";
            return bad("learning_rate", self.peak.to_string(), allowed.into());
        }
        if !(0.0..=self.peak).contains(&self.floor) {
            return bad("floor", self.floor.to_string(), format!("it must be from 0 to the peak, {}", self.peak));
        }
        if self.shape != Shape::Constant && self.warm_up >= self.steps {
            let allowed = format!("it must be below the number of steps, {}; change either", self.steps);
            return bad("warm_up", self.warm_up.to_string(), allowed);
        }
        Ok(())
    }
}
