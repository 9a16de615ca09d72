//! The filters against sorting and adding up in f64, the draws against the probabilities, and whatever logits may hold.

use super::*;

fn options() -> GenerateOptions {
    GenerateOptions::default()
}

fn sampler(options: &GenerateOptions) -> Sampler {
    Sampler::new(options).unwrap()
}

/// The probabilities of all tokens, each option in its turn, as the documentation has it: the oracle.
fn reference(logits: &[f32], observed: &[u32], options: &GenerateOptions) -> Vec<f64> {
    let penalty = options.repetition_penalty;
    // scores are f32, as they are there
    let penalized = logits.iter().enumerate().map(|(id, &logit)| match observed.contains(&(id as u32)) {
        true if logit < 0.0 => logit * penalty,
        true => logit / penalty,
        false => logit,
    });
    let mut scores: Vec<f64> = penalized.map(|score| f64::from(score) / f64::from(options.temperature)).collect();
    let softmax = |scores: &[f64]| -> Vec<f64> {
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let exps: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
        let sum: f64 = exps.iter().sum();
        exps.iter().map(|exp| exp / sum).collect()
    };
    // a stable sort, so the lower id first
    let order = |scores: &[f64]| {
        let mut ids: Vec<usize> = (0..scores.len()).collect();
        ids.sort_by(|&a, &b| scores[b].partial_cmp(&scores[a]).unwrap());
        ids
    };
    if options.top_k > 0 {
        for &id in order(&scores).iter().skip(options.top_k) {
            scores[id] = f64::NEG_INFINITY;
        }
    }
    if options.top_p < 1.0 {
        let (probabilities, mut before) = (softmax(&scores), 0.0);
        for id in order(&scores) {
            if before >= f64::from(options.top_p) {
                scores[id] = f64::NEG_INFINITY;
            }
            before += probabilities[id];
        }
    }
    let probabilities = softmax(&scores);
    let largest = probabilities.iter().copied().fold(0.0, f64::max);
    for (score, probability) in scores.iter_mut().zip(probabilities) {
        if probability < f64::from(options.min_p) * largest {
            *score = f64::NEG_INFINITY;
        }
    }
    softmax(&scores)
}

/// What the sampler draws from.
fn distribution(logits: &[f32], observed: &[u32], options: &GenerateOptions) -> Vec<f64> {
    let mut sampler = sampler(options);
    observed.iter().for_each(|&id| sampler.observe(id));
    sampler.pick(logits).unwrap();
    assert!(sampler.kept.is_sorted_by_key(|token| token.id()), "the order of a draw is that of the ids");
    let total = total(&sampler.kept) as f64;
    let mut probabilities = vec![0.0; logits.len()];
    for token in &sampler.kept {
        probabilities[token.id() as usize] = token.weight as f64 / total;
    }
    probabilities
}

fn same(logits: &[f32], observed: &[u32], options: &GenerateOptions) {
    let (ours, expected) = (distribution(logits, observed, options), reference(logits, observed, options));
    for (id, (ours, expected)) in ours.iter().zip(&expected).enumerate() {
        // what the reference keeps out is kept out, and the other way round, but for what is lost beside the largest
        assert!((*ours > 0.0) == (*expected > 0.0) || *expected < 1e-12, "{id}: {ours} is not {expected}: {options:?}");
        assert!((ours - expected).abs() <= 4e-6 * expected + 1e-12, "{id}: {ours} is not {expected}: {options:?}");
    }
}

fn random(rng: &mut Rng, count: usize, spread: f32) -> Vec<f32> {
    (0..count).map(|_| spread * (rng.random::<f32>() + rng.random::<f32>() - rng.random::<f32>())).collect()
}

/// On a grid, so that many are equal; some are impossible.
fn random_with_ties(rng: &mut Rng, count: usize) -> Vec<f32> {
    let logits = random(rng, count, 4.0).into_iter().map(|logit| logit.round() / 2.0);
    logits.enumerate().map(|(id, logit)| if id % 7 == 3 { f32::NEG_INFINITY } else { logit }).collect()
}

#[test]
fn every_filter_equals_the_reference() {
    let mut rng = Rng::seed_from_u64(1);
    let plain = options().temperature(1.0);
    let mut cases = vec![plain.clone(), plain.clone().temperature(0.3), plain.clone().temperature(40.0)];
    cases.extend([1, 2, 3, 7, 40, 299, 300, 301, usize::MAX].map(|k| plain.clone().top_k(k)));
    cases.extend([1e-40, 0.01, 0.3, 0.5, 0.9, 0.95, 0.999, 0.999_999_94].map(|p| plain.clone().top_p(p)));
    cases.extend([1e-40, 0.01, 0.1, 0.5, 0.9, 1.0].map(|p| plain.clone().min_p(p)));
    cases.extend([0.1, 0.9, 1.1, 1.5, 30.0].map(|penalty| plain.clone().repetition_penalty(penalty)));
    let all = plain.clone().temperature(0.7).repetition_penalty(1.2);
    cases.push(all.clone().top_k(50).top_p(0.9).min_p(0.05));
    cases.push(all.clone().top_k(20).top_p(0.7));
    cases.push(all.temperature(2.0).top_p(0.8).min_p(0.3));
    for options in &cases {
        for count in [1, 2, 5, 15, 16, 17, 300] {
            for spread in [0.1, 3.0, 20.0] {
                let observed: Vec<u32> = (0..20).map(|_| rng.random_range(0..2 * count as u32)).collect();
                same(&random(&mut rng, count, spread), &observed, options);
            }
        }
    }
}

#[test]
fn equal_logits_are_told_apart_by_their_ids() {
    let mut rng = Rng::seed_from_u64(2);
    for k in [1, 2, 5, 20, 60] {
        for _ in 0..20 {
            same(&random_with_ties(&mut rng, 80), &[], &options().temperature(0.8).top_k(k));
        }
    }
    // sums that are exact, so that 0.5 is reached and not passed
    let flat = [1.0, 1.0, 1.0, 1.0];
    assert_eq!(distribution(&flat, &[], &options().temperature(1.0).top_p(0.5)), [0.5, 0.5, 0.0, 0.0]);
    assert_eq!(distribution(&flat, &[], &options().temperature(1.0).top_k(3).top_p(0.4)), [0.5, 0.5, 0.0, 0.0]);
    assert_eq!(distribution(&[-0.0, 0.0], &[], &options().temperature(1.0).top_k(1)), [1.0, 0.0]);
    for logits in [&[3.0, 5.0, 5.0][..], &[-0.0, 0.0], &[f32::NEG_INFINITY, -2.0, -2.0]] {
        let expected = logits.iter().position(|&logit| logit == largest(logits)).unwrap() as u32;
        assert_eq!(sampler(&options()).pick(logits).unwrap().id, expected);
        assert_eq!(sampler(&options().temperature(9.0).top_k(1)).pick(logits).unwrap().id, expected);
    }
}

#[test]
fn ranks_order_all_numbers() {
    let numbers = [f32::MAX, 2.0, 1.0, f32::MIN_POSITIVE, 1e-45, 0.0, -1e-45, -1.0, -2.0, f32::MIN, f32::NEG_INFINITY];
    assert!(numbers.windows(2).all(|pair| rank(1, pair[0]) < rank(0, pair[1])));
    assert_eq!(rank(5, -0.0), rank(5, 0.0));
    assert!(rank(4, 1.0) < rank(5, 1.0));
    assert_eq!(Token { rank: rank(usize::try_from(u32::MAX).unwrap(), -3.0), weight: 0 }.id(), u32::MAX);
}

#[test]
fn draws_are_as_frequent_as_they_are_probable() {
    const DRAWS: usize = 40_000;
    let logits = random(&mut Rng::seed_from_u64(3), 40, 3.0);
    for options in [options().temperature(1.0), options().temperature(1.5).top_k(12).top_p(0.9)] {
        let expected = reference(&logits, &[], &options);
        let mut sampler = sampler(&options.seed(7));
        let mut counts = [0; 40];
        for _ in 0..DRAWS {
            counts[sampler.pick(&logits).unwrap().id as usize] += 1;
        }
        let (mut chi_square, mut possible) = (0.0, 0.0);
        for (&count, probability) in counts.iter().zip(expected) {
            let expected = probability * DRAWS as f64;
            if expected == 0.0 {
                assert_eq!(count, 0, "a token of probability 0 is never drawn");
            } else {
                chi_square += (f64::from(count) - expected).powi(2) / expected;
                possible += 1.0;
            }
        }
        // mean and variance of a chi-square are its degrees of freedom and twice that
        let freedom: f64 = possible - 1.0;
        assert!((chi_square - freedom).abs() < 4.0 * (2.0 * freedom).sqrt(), "{chi_square} for {freedom}");
    }
}

#[test]
fn the_seed_decides_the_draws() {
    let logits = random(&mut Rng::seed_from_u64(4), 500, 2.0);
    let draw = |sampler: &mut Sampler| -> Vec<u32> { (0..30).map(|_| sampler.pick(&logits).unwrap().id).collect() };
    let options = options().temperature(1.0).top_p(0.95).seed(11);
    let mut first = sampler(&options);
    let ids = draw(&mut first);
    assert_eq!(ids, draw(&mut sampler(&options)));
    assert_ne!(ids, draw(&mut sampler(&options.clone().seed(12))));
    assert_ne!(ids, draw(&mut first));
    // logits that cannot be used do not count as a draw
    let mut interrupted = sampler(&options);
    assert!(interrupted.pick(&[f32::NAN]).is_err());
    assert_eq!(draw(&mut interrupted), ids);
}

#[test]
fn the_penalty_is_taken_once_and_outside_the_vocabulary_ignored() {
    let logits = [4.0, 3.0, -1.0];
    let options = options().repetition_penalty(2.0);
    let mut sampler = sampler(&options);
    assert_eq!(sampler.pick(&logits).unwrap().id, 0);
    for id in [0, 0, 2, 3, u32::MAX] {
        sampler.observe(id);
    }
    assert_eq!(sampler.pick(&logits).unwrap().id, 1);
    assert_eq!(sampler.scores, [2.0, 3.0, -2.0]);
    assert_eq!(format!("{sampler:?}").matches("observed: 4").count(), 1);
}

#[test]
fn log_probabilities_are_those_of_the_model() {
    let logits = random(&mut Rng::seed_from_u64(5), 777, 10.0);
    let expected = reference(&logits, &[], &options().temperature(1.0));
    for options in [options(), options().temperature(3.0).top_k(9).repetition_penalty(1.3)] {
        let mut sampler = sampler(&options.log_probs(true));
        for _ in 0..50 {
            let choice = sampler.pick(&logits).unwrap();
            let (given, expected) = (f64::from(choice.log_prob.unwrap()), expected[choice.id as usize].ln());
            assert!((given - expected).abs() <= 1e-6 * expected.abs().max(1.0), "{given} is not {expected}");
            sampler.observe(choice.id);
        }
    }
    assert_eq!(sampler(&options()).pick(&logits).unwrap().log_prob, None);
    let half = std::f32::consts::LN_2;
    assert_eq!(log_softmax_at(&[1e30, 1e30], 1), -half);
    assert_eq!(log_softmax_at(&[-1e30, -1e30, f32::NEG_INFINITY], 0), -half);
    assert_eq!(log_softmax_at(&[0.0, f32::NEG_INFINITY], 1), f32::NEG_INFINITY);
    assert_eq!(log_softmax_at(&[7.0], 0), 0.0);
    assert!(log_softmax_at(&[1.0, f32::NAN], 0).is_nan());
}

#[test]
fn whatever_the_logits_the_answer_is_a_possible_token_or_an_error() {
    const NAN: f32 = f32::NAN;
    const INF: f32 = f32::INFINITY;
    let bad: [(&[f32], &str); 8] = [
        (&[], "there are none"),
        (&[NAN], "token 0 has NaN"),
        (&[0.0, -NAN, INF], "token 1 has NaN"),
        (&[0.0, 1.0, INF], "token 2 has inf"),
        (&[-INF, INF], "token 1 has inf"),
        (&[-INF], "all 1 are -inf"),
        (&[-INF; 40], "all 40 are -inf"),
        (&[NAN; 40], "token 0 has NaN"),
    ];
    let good: [&[f32]; 9] = [
        &[-5.0],
        &[-INF, -INF, 0.0],
        &[f32::MIN, f32::MAX],
        &[f32::MAX, f32::MAX, -INF],
        &[f32::MIN; 20],
        &[f32::MIN, -INF],
        &[1e-45, -1e-45, 0.0, -0.0],
        &[1e38, -1e38, 0.0],
        &[0.0; 33],
    ];
    let mut extremes = Vec::new();
    for temperature in [0.0, 1e-45, 1e-3, 1.0, f32::MAX] {
        for (top_k, top_p, min_p) in [
            (0, 1.0, 0.0),
            (1, 1.0, 0.0),
            (usize::MAX, 1e-45, 1e-45),
            (2, 1.0 - f32::EPSILON, 1.0),
            (0, f32::MIN_POSITIVE, 0.0),
            (0, 1.0, 1.0),
        ] {
            for penalty in [1e-45, 1e-3, 1.0, f32::MAX] {
                let options = options().temperature(temperature).top_k(top_k).top_p(top_p).min_p(min_p);
                extremes.push(options.repetition_penalty(penalty).seed(u64::MAX).log_probs(true));
            }
        }
    }
    for options in &extremes {
        for (logits, expected) in bad {
            let error = sampler(options).pick(logits).unwrap_err();
            assert!(matches!(error, Error::Logits(_)));
            assert!(error.to_string().contains(expected), "{error}");
        }
        for logits in good {
            let mut sampler = sampler(options);
            for _ in 0..logits.len() + 2 {
                let choice = sampler.pick(logits).unwrap();
                assert!(logits[choice.id as usize] > -INF, "{choice:?} of {logits:?} with {options:?}");
                assert!(choice.log_prob.unwrap() <= 0.0, "{choice:?} of {logits:?} with {options:?}");
                sampler.observe(choice.id);
            }
        }
    }
}

#[test]
fn options_outside_their_range_are_refused() {
    const NAN: f32 = f32::NAN;
    const INF: f32 = f32::INFINITY;
    let temperature = |t| options().temperature(t);
    let top_p = |p| options().top_p(p);
    let min_p = |p| options().min_p(p);
    let penalty = |p| options().repetition_penalty(p);
    let bad = [
        ("temperature", [-0.1, INF, -INF, NAN].map(temperature)),
        ("top_p", [0.0, -0.5, 1.000_1, NAN].map(top_p)),
        ("min_p", [-0.1, 1.000_1, INF, NAN].map(min_p)),
        ("repetition_penalty", [0.0, -1.0, INF, NAN].map(penalty)),
        ("stop_strings", [vec![""], vec!["a", ""], vec!["", "a"], vec![""; 3]].map(|s| options().stop_strings(s))),
    ];
    for (name, cases) in bad {
        for options in cases {
            let error = Sampler::new(&options).unwrap_err();
            assert!(matches!(error, Error::Option { option, .. } if option == name), "{error}");
        }
    }
    let good = [options(), temperature(-0.0), temperature(f32::MAX), top_p(1e-45), top_p(1.0), min_p(0.0), min_p(1.0)];
    for options in
        good.into_iter().chain([penalty(1e-45), penalty(f32::MAX), options().max_tokens(0).top_k(usize::MAX)])
    {
        options.validate().unwrap();
    }
    assert_eq!(options().stop_tokens(vec![2]).stop_tokens, Some(vec![2]));
    assert_eq!(options().stop_tokens(vec![2]).stop_tokens(None), options());
}

#[test]
fn a_pick_allocates_nothing_once_it_has_seen_the_vocabulary() {
    let mut rng = Rng::seed_from_u64(6);
    let mut sampler = sampler(&options().temperature(1.0).top_k(2999).top_p(0.99).min_p(1e-6).repetition_penalty(1.1));
    // flat logits, of which the filters keep most
    sampler.pick(&[0.0; 3000]).unwrap();
    let places =
        |s: &Sampler| (s.scores.as_ptr(), s.ranks.as_ptr(), s.exps.as_ptr(), s.kept.as_ptr(), s.halves.as_ptr());
    let before = places(&sampler);
    for spread in [0.0, 0.01, 1.0, 10.0] {
        sampler.pick(&random(&mut rng, 3000, spread)).unwrap();
        assert_eq!(places(&sampler), before);
    }
}
