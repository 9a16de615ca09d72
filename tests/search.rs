//! The search of the example `classify`: trials that are drawn, halved, kept and found again.

#[path = "../examples/classify/search.rs"]
mod search;
#[path = "../examples/support/trials.rs"]
mod trials;

use std::path::Path;

use search::{Record, Search, drawn, make_folder, table};

fn search(folder: &Path, share: Option<(usize, usize)>) -> Search {
    let results = folder.join("sub/results.jsonl");
    make_folder(&results).unwrap();
    Search { trials: 16, share, folds: 2, seed: 5, results, data: "waves".into() }
}

/// Of trial i the score i / 100, whatever the epochs.
fn score(options: &[String]) -> f64 {
    (0..16).position(|trial| drawn(5, trial) == options).unwrap() as f64 / 100.0
}

#[test]
fn the_better_half_goes_on_and_what_is_done_is_not_done_again() {
    let folder = tempfile::tempdir().unwrap();
    let search = search(folder.path(), None);
    let mut seen = Vec::new();
    // killed in the second round
    let killed = search.run(80, |options, epochs| {
        seen.push((score(options), epochs));
        if seen.len() == 19 { Err("killed".into()) } else { Ok(vec![score(options); 2]) }
    });
    assert!(killed.is_err());
    // a line that was cut short
    let mut bytes = std::fs::read(&search.results).unwrap();
    bytes.extend(b"{\"data\":\"wav");
    std::fs::write(&search.results, bytes).unwrap();
    let mut again = Vec::new();
    search
        .run(80, |options, epochs| {
            again.push((score(options), epochs));
            Ok(vec![score(options); 2])
        })
        .unwrap();
    let counts = |epochs| seen[..18].iter().chain(&again).filter(|(_, of)| *of == epochs).count();
    assert_eq!([10, 20, 40, 80].map(counts), [16, 8, 4, 2]);
    let (records, none): (Vec<Record>, usize) = trials::load(&search.results).unwrap();
    assert_eq!((records.len(), none), (30, 1));
    let last: Vec<usize> = records.iter().filter(|record| record.epochs == 80).map(|record| record.trial).collect();
    assert_eq!(last, [15, 14]);
    assert!(search.run(80, |_, _| Err("all is done".into())).is_ok());
    assert!(table(std::slice::from_ref(&search.results)).is_ok());
    // other data are another search
    let other = Search { data: "others".into(), ..search };
    assert!(other.run(80, |_, _| Err("to be done".into())).is_err());
}

#[test]
fn a_share_is_k_of_n() {
    assert_eq!(trials::share("2/3"), Ok((2, 3)));
    for text in ["", "2", "0/3", "4/3", "a/b", "1/0"] {
        assert!(trials::share(text).is_err(), "{text}");
    }
}

#[test]
fn shares_have_every_trial_once() {
    let mut all = Vec::new();
    for k in 1..=3 {
        let folder = tempfile::tempdir().unwrap();
        search(folder.path(), Some((k, 3)))
            .run(4, |options, epochs| {
                if epochs == 1 {
                    all.push(options.to_vec());
                }
                Ok(vec![0.5])
            })
            .unwrap();
    }
    assert_eq!(all.len(), 16);
    assert!((0..16).all(|trial| all.contains(&drawn(5, trial))));
    assert_ne!(drawn(5, 1), drawn(6, 1));
    assert!(drawn(5, 0).is_empty());
}
