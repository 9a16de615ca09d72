//! The comparison behind the `verify` example, and how it reads what the published language model left.

#[path = "../examples/support/compare.rs"]
mod compare;
#[path = "../examples/support/published.rs"]
mod published;
#[path = "../examples/support/tensors.rs"]
mod tensors;

use compare::{Comparison, Tolerance};
use hymba::ndarray::{ArrayD, Axis, IxDyn, array};
use published::{Prompt, cached_inputs, cached_rows, is_within};
use tensors::Tensors;

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

#[test]
fn the_worst_row_stands_for_all() {
    let row = |given: f32| compare(array![given].into_dyn(), array![0.0].into_dyn(), LOOSE);
    let worst = Comparison::worst_row([row(0.25), row(1.0), row(0.5)].into_iter()).unwrap();
    assert_eq!(worst.difference, Ok(1.0));
    assert!(!worst.holds());
    let worst = Comparison::worst_row([row(0.25), row(f32::NAN), row(9.0)].into_iter()).unwrap();
    assert!(!worst.holds() && worst.to_string().contains("row 1 is NaN at [0]"), "{worst}");
    assert!(Comparison::worst_row(std::iter::empty()).is_none());
}

fn prompt(tensors: &[(&str, ArrayD<f64>)]) -> Result<Prompt, String> {
    Prompt::new(&tensors.iter().map(|(name, array)| (name.to_string(), array.clone())).collect::<Tensors>())
}

#[test]
fn padding_may_be_on_either_side() {
    let ids = ("input_ids", array![[1.0, 2.0, 3.0], [-100.0, 4.0, 5.0]].into_dyn());
    let left = ("attention_mask", array![[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]].into_dyn());
    let padded = prompt(&[ids.clone(), left.clone()]).unwrap();
    assert_eq!(padded.rows, [vec![1, 2, 3], vec![4, 5]]);
    assert!(padded.is_padded());
    assert_eq!((padded.last(0), padded.last(1)), (2, 2));
    assert_eq!(padded.places(1).collect::<Vec<_>>(), [1, 2]);

    let ids = ("input_ids", array![[1.0, 2.0, 3.0], [4.0, 5.0, -100.0]].into_dyn());
    let lengths = ("lengths", array![3.0, 2.0].into_dyn());
    let behind = prompt(&[ids.clone(), lengths.clone()]).unwrap();
    assert_eq!(behind.rows, padded.rows);
    assert_eq!((behind.last(1), behind.places(1).collect::<Vec<_>>()), (1, vec![0, 1]));
    let whole = prompt(&[("input_ids", array![[7.0, 8.0]].into_dyn())]).unwrap();
    assert!(!whole.is_padded());

    let mask = |mask: ArrayD<f64>| prompt(&[ids.clone(), ("attention_mask", mask)]);
    for (fault, says) in [
        (prompt(&[]), "there is no tensor input_ids"),
        (prompt(std::slice::from_ref(&ids)), "-100 is not the id of a token"),
        (prompt(&[("input_ids", array![1.0].into_dyn())]), "must have two axes"),
        (prompt(&[("input_ids", ArrayD::zeros(IxDyn(&[0, 3])))]), "no tokens"),
        (prompt(&[ids.clone(), ("lengths", array![3.0, 4.0].into_dyn())]), "does not go with lengths"),
        (prompt(&[ids.clone(), ("lengths", array![3.0, 0.0].into_dyn())]), "does not go with lengths"),
        (prompt(&[ids.clone(), ("lengths", array![3.0].into_dyn())]), "does not go with lengths"),
        (mask(array![[1.0, 1.0, 1.0]].into_dyn()), "of shape [2, 3]"),
        (mask(array![[1.0, 1.0, 1.0], [1.0, 0.5, 0.0]].into_dyn()), "zeros and ones"),
        (mask(array![[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]].into_dyn()), "2 runs of real tokens in row 0"),
        (mask(array![[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]].into_dyn()), "0 runs of real tokens in row 1"),
        (prompt(&[ids.clone(), lengths, ("attention_mask", ArrayD::ones(IxDyn(&[2, 3])))]), "do not agree"),
    ] {
        let fault = fault.unwrap_err();
        assert!(fault.contains(says), "{fault} / {says}");
    }
}

#[test]
fn ids_are_whole_numbers() {
    let of = |value: f64| published::ids(&Tensors::from([("x".into(), array![[value]].into_dyn())]), "x");
    assert_eq!(of(70000.0), Ok(Some(array![[70000]])));
    assert_eq!(published::ids(&Tensors::new(), "x"), Ok(None));
    for value in [-1.0, 0.5, f64::NAN, 1e10] {
        assert!(of(value).unwrap_err().contains("x: "), "{value}");
    }
}

#[test]
fn the_published_decoding_is_followed_as_far_as_its_window() {
    // the end of the prompt always, decoding while prompt and step fit
    assert!(is_within(None, 1000, 1000));
    assert!(is_within(Some(8), 40, 0) && !is_within(Some(8), 40, 1));
    assert!(is_within(Some(8), 4, 4) && !is_within(Some(8), 4, 5));
}

#[test]
fn rows_of_published_caches() {
    // one head, two meta tokens (10, 11), tokens 0 to 4 of which the first is padding
    let rows = |rows: &[f64]| ArrayD::from_shape_vec(IxDyn(&[1, rows.len(), 1]), rows.to_vec()).unwrap();
    let real = [false, true, true, true, true];
    let all = rows(&[10.0, 11.0, 0.0, 1.0, 2.0, 3.0, 4.0]);
    assert_eq!(cached_rows(&all, 2, &real, 4), Ok(rows(&[10.0, 11.0, 1.0, 2.0, 3.0, 4.0])));
    assert_eq!(cached_rows(&all, 2, &real, 2), Ok(rows(&[10.0, 11.0, 3.0, 4.0])));
    assert_eq!(cached_rows(&all, 2, &real, 0), Ok(rows(&[10.0, 11.0])));
    assert!(cached_rows(&all, 2, &real, 5).is_err(), "padding is no token");
    // trimmed to the last three
    let trimmed = rows(&[10.0, 11.0, 2.0, 3.0, 4.0]);
    assert_eq!(cached_rows(&trimmed, 2, &real, 2), Ok(rows(&[10.0, 11.0, 3.0, 4.0])));
    assert!(cached_rows(&trimmed, 2, &real, 4).is_err());
    assert!(cached_rows(&rows(&[0.0; 8]), 2, &real, 4).is_err(), "more than there were");
    assert!(cached_rows(&rows(&[0.0]), 2, &real, 0).is_err(), "fewer than the meta tokens");
    assert!(cached_rows(&array![1.0].into_dyn(), 2, &real, 0).is_err());

    let inputs = array![[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]].into_dyn();
    let last = array![[2.0, 6.0], [3.0, 7.0], [4.0, 8.0]].into_dyn();
    assert_eq!(cached_inputs(&inputs, 4, 3), Ok(last));
    assert!(cached_inputs(&inputs, 3, 3).is_err());
    assert!(cached_inputs(&inputs.index_axis(Axis(0), 0).to_owned(), 4, 3).is_err());
}

#[test]
fn tensors_of_many_types_are_read() {
    use safetensors::Dtype::{BF16, BOOL, I32, U8};
    use safetensors::tensor::TensorView;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.safetensors");
    let data: [(&str, _, &[u8]); 4] =
        [("a", BF16, &[0xc0, 0x3f]), ("b", I32, &[254, 255, 255, 255]), ("c", U8, &[200]), ("d", BOOL, &[1])];
    let views = data.map(|(name, dtype, bytes)| (name, TensorView::new(dtype, vec![1], bytes).unwrap()));
    std::fs::write(&file, safetensors::serialize(views, None).unwrap()).unwrap();
    let read = tensors::read(&file).unwrap();
    for (name, value) in [("a", 1.5), ("b", -2.0), ("c", 200.0), ("d", 1.0)] {
        assert_eq!(read[name], array![value].into_dyn(), "{name}");
    }
}
