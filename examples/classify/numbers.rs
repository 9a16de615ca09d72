//! How well numbers were predicted.

use std::error::Error;
use std::fmt;
use std::path::Path;

use hymba::ndarray::Array2;
use hymba::train::RegressionMetrics;

use crate::picture::{self, BLUE, Chart, Charts, Corner, GREY, Series, Shape};

/// Predictions beside what was to be predicted.
#[derive(PartialEq)]
pub struct Numbers {
    /// `[series, 1]`
    predicted: Array2<f32>,
    wanted: Array2<f32>,
    pub metrics: RegressionMetrics,
}

impl Numbers {
    pub fn new(predicted: Array2<f32>, wanted: Array2<f32>) -> hymba::Result<Self> {
        let metrics = RegressionMetrics::of(&predicted, &wanted)?;
        Ok(Numbers { predicted, wanted, metrics })
    }

    /// Each series as a point.
    pub fn draw(&self, name: &str, path: &Path) -> Result<(), Box<dyn Error>> {
        let points = self.wanted.iter().copied().zip(self.predicted.iter().copied()).collect();
        let ends = |pick: fn(f32, f32) -> f32, from: f32| self.wanted.iter().copied().fold(from, pick);
        let (low, high) = (ends(f32::min, f32::INFINITY), ends(f32::max, f32::NEG_INFINITY));
        let series = |name: &str, points, color, shape| Series { name: name.into(), points, color, shape };
        picture::charts(
            path,
            &Charts {
                title: format!("{name}: predicted and true numbers"),
                subtitle: format!("each point is a test series; on the line both are equal. {self}").replace('\n', ""),
                panels: vec![Chart {
                    title: String::new(),
                    x_label: "true".into(),
                    y_label: "predicted".into(),
                    whole_x: false,
                    y_range: None,
                    legend: Corner::LowerRight,
                    series: vec![
                        series("", vec![(low, low), (high, high)], GREY, Shape::Line),
                        series("", points, BLUE, Shape::Dots),
                    ],
                }],
                panel_size: (760, 620),
                side_by_side: false,
            },
        )
    }
}

impl fmt::Display for Numbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RegressionMetrics { rmse, mae, r2, .. } = self.metrics;
        writeln!(f, "RMSE {rmse:.5}, MAE {mae:.5}, R² {r2:.4}")
    }
}
