//! The comparison behind the `verify` example.

#[path = "../examples/support/compare.rs"]
mod compare;

use compare::{Comparison, Tolerance};
use hymba::ndarray::{ArrayD, IxDyn, array};

const EXACT: Tolerance = Tolerance { absolute: 0.0, relative: 0.0 };
const LOOSE: Tolerance = Tolerance { absolute: 0.5, relative: 0.1 };

fn compare(given: ArrayD<f32>, expected: ArrayD<f64>, tolerance: Tolerance) -> Comparison {
    Comparison::new("x".into(), &given, &expected, |_: &IxDyn| false, tolerance)
}

#[test]
fn differences_within_the_tolerance_hold() {
    let same = compare(array![1.0, -2.0].into_dyn(), array![1.0, -2.0].into_dyn(), EXACT);
    assert!(same.holds());
    assert_eq!(same.difference, Ok(0.0));

    let near = compare(array![1.5, 102.0].into_dyn(), array![1.0, 100.0].into_dyn(), LOOSE);
    assert!(near.holds());
    assert_eq!(near.difference, Ok(2.0));
    assert!((near.strain - 0.5 / 0.6).abs() < 1e-12);

    assert!(!compare(array![1.625].into_dyn(), array![1.0].into_dyn(), LOOSE).holds());
    assert!(!compare(array![1.0000001].into_dyn(), array![1.0].into_dyn(), EXACT).holds());
}

#[test]
fn what_is_not_a_number_never_holds() {
    for (given, expected) in [
        (f32::NAN, 1.0),
        (1.0, f64::NAN),
        (f32::NAN, f64::NAN),
        (f32::INFINITY, 1.0),
        (1.0, f64::INFINITY),
        (f32::INFINITY, f64::INFINITY),
    ] {
        let comparison = compare(array![0.0, given, 0.0].into_dyn(), array![0.0, expected, 0.0].into_dyn(), LOOSE);
        assert!(!comparison.holds(), "{given} against {expected}");
        assert_eq!(comparison.strain, f64::INFINITY);
        assert!(comparison.to_string().contains("[1]"), "{comparison}");
    }
}

#[test]
fn shapes_must_agree_even_where_they_could_be_broadcast() {
    let comparison = compare(array![[1.0], [1.0]].into_dyn(), array![[1.0]].into_dyn(), LOOSE);
    assert!(!comparison.holds());
    assert!(comparison.to_string().contains("has shape [2, 1], expected [1, 1]"), "{comparison}");
}

#[test]
fn padding_is_left_out() {
    let (given, expected) = (array![[1.0, f32::NAN], [1.0, 9.0]].into_dyn(), array![[1.0, 0.0], [1.0, 0.0]].into_dyn());
    let comparison = Comparison::new("x".into(), &given, &expected, |index| index[1] == 1, EXACT);
    assert!(comparison.holds());
}

#[test]
fn what_there_is_nothing_to_compare_with_fails() {
    let comparison = Comparison::failed("x".into(), "there is none");
    assert!(!comparison.holds());
    assert!(comparison.to_string().ends_with("there is none"), "{comparison}");
}
