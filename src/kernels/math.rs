//! Element-wise functions: exp and what is built on it, each within a few units in the last place of its f64 value (gelu:
//! within 2e-7·|x|, as 1 + erf cancels for negative x).

use super::profiler::{Cost, Stage, timed};
use super::simd::{Kernel, LANES, Simd, dispatch};

/// A function of one number, applied to sixteen at a time.
pub(crate) trait Unary {
    fn apply<S: Simd>(s: S, x: S::V) -> S::V;
}

/// Replaces every number of `x` by its function value.
pub(crate) fn map<F: Unary>(x: &mut [f32]) {
    timed(Stage::Elementwise, Cost::numbers(2 * x.len()), || dispatch(Map::<F>(x, std::marker::PhantomData)));
}

/// A function and its derivative.
pub(crate) trait Differentiable: Unary {
    fn derivative<S: Simd>(s: S, x: S::V) -> S::V;
}

/// dy ⊙ f′(x), in place of dy.
pub(crate) fn map_backward<F: Differentiable>(x: &[f32], dy: &mut [f32]) {
    timed(Stage::Elementwise, Cost::numbers(3 * x.len()), || {
        dispatch(MapBackward::<F>(x, dy, std::marker::PhantomData))
    });
}

/// f(x) ⊙ y, in place of x.
pub(crate) fn map_mul<F: Unary>(x: &mut [f32], y: &[f32]) {
    timed(Stage::Elementwise, Cost::numbers(3 * x.len()), || dispatch(MapMul::<F>(x, y, std::marker::PhantomData)));
}

struct MapMul<'a, F>(&'a mut [f32], &'a [f32], std::marker::PhantomData<F>);

impl<F: Unary> Kernel for MapMul<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (x, y) in self.0.chunks_mut(LANES).zip(self.1.chunks(LANES)) {
            let product = s.mul(F::apply(s, s.load_some(x)), s.load_some(y));
            s.store_some(product, x);
        }
    }
}

struct MapBackward<'a, F>(&'a [f32], &'a mut [f32], std::marker::PhantomData<F>);

impl<F: Differentiable> Kernel for MapBackward<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (x, dy) in self.0.chunks(LANES).zip(self.1.chunks_mut(LANES)) {
            let slope = F::derivative(s, s.load_some(x));
            s.store_some(s.mul(slope, s.load_some(dy)), dy);
        }
    }
}

struct Map<'a, F>(&'a mut [f32], std::marker::PhantomData<F>);

impl<F: Unary> Kernel for Map<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for x in self.0.chunks_mut(LANES) {
            let y = F::apply(s, s.load_some(x));
            s.store_some(y, x);
        }
    }
}

/// d softplus / dδ = 1 − e^−Δ for Δ = softplus(δ): dΔ becomes dδ, in place.
pub(crate) fn softplus_backward(delta: &[f32], ddelta: &mut [f32]) {
    dispatch(SoftplusBackward { delta, ddelta });
}

struct SoftplusBackward<'a> {
    delta: &'a [f32],
    ddelta: &'a mut [f32],
}

impl Kernel for SoftplusBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let zero = s.splat(0.0);
        for (delta, ddelta) in self.delta.chunks(LANES).zip(self.ddelta.chunks_mut(LANES)) {
            let slope = s.sub(zero, exp_m1(s, s.sub(zero, s.load_some(delta))));
            s.store_some(s.mul(s.load_some(ddelta), slope), ddelta);
        }
    }
}

/// eˣ. Below −87.3 it stays at e^−87.3 = 1.2e-38 and above 88.3 at e^88.3 = 2.2e38; NaN stays NaN.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    let (p, power) = exp_parts(s, x);
    s.mul(s.add(p, s.splat(1.0)), power)
}

/// 2ˣ for x ≤ 0, which takes half as long as [`exp`]. Below −125 it stays at 2⁻¹²⁵; NaN stays NaN.
#[inline(always)]
pub(crate) fn exp2_negative<S: Simd>(s: S, x: S::V) -> S::V {
    /// Adding and subtracting it rounds to a whole number.
    const ROUND: f32 = (3u32 << 22) as f32;
    /// 2ᶠ for |f| ≤ 1/2: the series of eᶠ ˡⁿ ² up to f⁷, and that of the polynomials of degree 6 which is nearest to it (relative
    /// error 7e-9).
    const POWERS: [f32; 7] =
        [1.0, std::f32::consts::LN_2, 0.240_226_5, 0.055_503_275, 0.009_618_13, 0.001_340_029, 1.540_353e-4];
    let x = s.max(s.splat(-125.0), x);
    let n = s.sub(s.add(x, s.splat(ROUND)), s.splat(ROUND));
    s.mul(polynomial(s, s.sub(x, n), &POWERS), s.exp2_whole(n))
}

/// eˣ − 1, also where eˣ is near 1; the range is that of [`exp`].
#[inline(always)]
fn exp_m1<S: Simd>(s: S, x: S::V) -> S::V {
    let (p, power) = exp_parts(s, x);
    s.mul_add(p, power, s.sub(power, s.splat(1.0)))
}

/// eᶠ − 1 and 2ⁿ for x = n·ln 2 + f with |f| ≤ ln 2 / 2.
#[inline(always)]
fn exp_parts<S: Simd>(s: S, x: S::V) -> (S::V, S::V) {
    // ln 2 in two parts, the first exact in products with n
    const LN_2_HIGH: f32 = 355.0 / 512.0;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    /// Adding and subtracting it rounds to a whole number.
    const ROUND: f32 = (3u32 << 22) as f32;
    /// eᶠ − 1 − f over f², the minimax fit of degree 4 (relative error 3e-9).
    const TAIL: [f32; 5] = [0.499_999_93, 0.166_665_21, 0.041_668_387, 0.008_368_71, 0.001_381_461];

    let x = s.min(s.splat(88.3), s.max(s.splat(-87.3), x));
    let n = s.mul_add(x, s.splat(std::f32::consts::LOG2_E), s.splat(ROUND));
    let n = s.sub(n, s.splat(ROUND));
    let f = s.mul_add(n, s.splat(-LN_2_HIGH), x);
    let f = s.mul_add(n, s.splat(-LN_2_LOW), f);
    (s.mul_add(s.mul(f, f), polynomial(s, f, &TAIL), f), s.exp2_whole(n))
}

/// c₀ + c₁x + c₂x² + …
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(s: S, x: S::V, c: &[f32; N]) -> S::V {
    let mut p = s.splat(c[N - 1]);
    for &c in c[..N - 1].iter().rev() {
        p = s.mul_add(p, x, s.splat(c));
    }
    p
}

/// 1 / (1 + e⁻ˣ)
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), x))))
}

/// x · sigmoid(x)
#[inline(always)]
pub(crate) fn silu<S: Simd>(s: S, x: S::V) -> S::V {
    s.div(x, s.add(s.splat(1.0), exp(s, s.sub(s.splat(0.0), x))))
}

/// d silu / dx = σ(x)·(1 + x·(1 − σ(x)))
#[inline(always)]
pub(crate) fn silu_derivative<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    let sigmoid = sigmoid(s, x);
    s.mul(sigmoid, s.mul_add(x, s.sub(one, sigmoid), one))
}

/// ln(1 + eˣ) as max(x, 0) + ln(1 + u) with u = e^−|x|.
#[inline(always)]
pub(crate) fn softplus<S: Simd>(s: S, x: S::V) -> S::V {
    /// 1, 1/3, 1/5, …: the series of atanh(q) / q in q². With q ≤ 1/3 the next term is below 2e-9.
    const ATANH: [f32; 8] = [1.0, 1.0 / 3.0, 1.0 / 5.0, 1.0 / 7.0, 1.0 / 9.0, 1.0 / 11.0, 1.0 / 13.0, 1.0 / 15.0];
    let minus_x = s.sub(s.splat(0.0), x);
    let u = exp(s, s.min(minus_x, x));
    let q = s.div(u, s.add(s.splat(2.0), u)); // ln(1 + u) = 2 atanh(u / (2 + u))
    let log = s.mul(s.add(q, q), polynomial(s, s.mul(q, q), &ATANH));
    s.add(s.max(s.splat(0.0), x), log)
}

/// x/2 · (1 + erf(x/√2)), the exact form of the Gaussian error linear unit.
#[inline(always)]
pub(crate) fn gelu<S: Simd>(s: S, x: S::V) -> S::V {
    let half = s.mul(x, s.splat(0.5));
    s.mul_add(half, erf(s, s.mul(x, s.splat(std::f32::consts::FRAC_1_SQRT_2))), half)
}

/// d gelu / dx = Φ(x) + x·φ(x), with φ(x) = e^(−x²/2)/√(2π) and Φ its integral.
#[inline(always)]
fn gelu_derivative<S: Simd>(s: S, x: S::V) -> S::V {
    const FRAC_1_SQRT_2PI: f32 = 0.398_942_3;
    let half = s.splat(0.5);
    let integral = s.mul_add(half, erf(s, s.mul(x, s.splat(std::f32::consts::FRAC_1_SQRT_2))), half);
    let density = s.mul(s.splat(FRAC_1_SQRT_2PI), exp(s, s.mul(s.mul(x, x), s.splat(-0.5))));
    s.mul_add(x, density, integral)
}

/// erf(x) = x·P(x²)/Q(x²) up to |x| = 3.8, beyond which erf is ±1 in f32 (minimax fit, relative error 1.2e-8).
#[inline(always)]
fn erf<S: Simd>(s: S, x: S::V) -> S::V {
    const P: [f32; 6] =
        [std::f32::consts::FRAC_2_SQRT_PI, 0.186_249_3, 0.052_310_68, 0.003_615_06, 2.865_083e-4, 2.151_031_4e-6];
    const Q: [f32; 6] = [1.0, 0.498_392_1, 0.112_491_83, 0.014_667_238, 0.001_135_096_6, 3.921_344e-5];
    let x = s.min(s.splat(3.8), s.max(s.splat(-3.8), x));
    let t = s.mul(x, x);
    s.div(s.mul(x, polynomial(s, t, &P)), polynomial(s, t, &Q))
}

/// max(x, 0)²
#[inline(always)]
fn squared_relu<S: Simd>(s: S, x: S::V) -> S::V {
    let positive = s.max(s.splat(0.0), x);
    s.mul(positive, positive)
}

macro_rules! unary {
    ($($name:ident = $function:path: $doc:literal;)*) => {$(
        #[doc = $doc]
        pub(crate) struct $name;
        impl Unary for $name {
            #[inline(always)]
            fn apply<S: Simd>(s: S, x: S::V) -> S::V {
                $function(s, x)
            }
        }
    )*};
}

unary! {
    Sigmoid = sigmoid: "1 / (1 + e⁻ˣ)";
    Silu = silu: "x · sigmoid(x)";
    Softplus = softplus: "ln(1 + eˣ)";
    Gelu = gelu: "x/2 · (1 + erf(x/√2))";
}

unary! {
    SquaredRelu = squared_relu: "max(x, 0)²";
}

impl Differentiable for SquaredRelu {
    #[inline(always)]
    fn derivative<S: Simd>(s: S, x: S::V) -> S::V {
        let positive = s.max(s.splat(0.0), x);
        s.add(positive, positive)
    }
}

impl Differentiable for Silu {
    #[inline(always)]
    fn derivative<S: Simd>(s: S, x: S::V) -> S::V {
        silu_derivative(s, x)
    }
}

impl Differentiable for Gelu {
    #[inline(always)]
    fn derivative<S: Simd>(s: S, x: S::V) -> S::V {
        gelu_derivative(s, x)
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::{Isa, dispatch_at};
    use super::*;

    struct Exp;
    impl Unary for Exp {
        #[inline(always)]
        fn apply<S: Simd>(s: S, x: S::V) -> S::V {
            exp(s, x)
        }
    }

    /// The f64 value of erf by its Maclaurin series: the oracle for gelu.
    fn erf_f64(x: f64) -> f64 {
        if x.abs() > 6.0 {
            return x.signum();
        }
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / n as f64;
            sum += term / (2 * n + 1) as f64;
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    }

    fn check<F: Unary>(oracle: impl Fn(f64) -> f64, range: f32, absolute: f64, relative: f64) {
        for level in Isa::ALL.into_iter().filter(|level| level.is_available()) {
            for len in 0..130 {
                for offset in [0, 1, 5] {
                    let x: Vec<f32> = (0..offset + len).map(|i| ((i * 37 % 131) as f32 / 65.0 - 1.0) * range).collect();
                    let mut y = x.clone();
                    dispatch_at(level, Map::<F>(&mut y[offset..], std::marker::PhantomData));
                    assert_eq!(x[..offset], y[..offset]);
                    for (x, y) in x.iter().zip(&y).skip(offset) {
                        let want = oracle(*x as f64);
                        let bound = absolute + relative * want.abs();
                        assert!((*y as f64 - want).abs() <= bound, "{level:?} f({x}) = {y}, not {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn functions_equal_their_f64_values_on_every_level() {
        check::<Exp>(f64::exp, 87.0, 0.0, 3e-7);
        check::<Exp>(f64::exp, 1.0, 0.0, 2e-7);
        check::<Sigmoid>(|x| 1.0 / (1.0 + (-x).exp()), 30.0, 0.0, 4e-7);
        check::<Silu>(|x| x / (1.0 + (-x).exp()), 30.0, 0.0, 4e-7);
        check::<Softplus>(|x| x.max(0.0) + (-x.abs()).exp().ln_1p(), 40.0, 0.0, 4e-7);
        check::<Softplus>(|x| x.max(0.0) + (-x.abs()).exp().ln_1p(), 2.0, 0.0, 4e-7);
        check::<Gelu>(|x| 0.5 * x * (1.0 + erf_f64(x / 2f64.sqrt())), 6.0, 8e-7, 4e-7);
        check::<Gelu>(|x| 0.5 * x * (1.0 + erf_f64(x / 2f64.sqrt())), 0.5, 0.0, 4e-7);
        check::<SquaredRelu>(|x| x.max(0.0).powi(2), 9.0, 0.0, 2e-7);
    }

    /// The rest of a vector's lanes are zero when read, and what follows is left as it is when written.
    #[test]
    fn some_lanes_are_read_and_written_on_every_level() {
        struct Some<'a>(&'a [f32], &'a mut [f32], &'a mut [f32; LANES]);
        impl Kernel for Some<'_> {
            type Output = ();

            #[inline(always)]
            fn run<S: Simd>(self, s: S) {
                s.store(s.load_some(self.0), self.2);
                s.store_some(s.load_some(self.0), self.1);
            }
        }
        let x: Vec<f32> = (1..40).map(|i| i as f32).collect();
        for level in Isa::ALL.into_iter().filter(|level| level.is_available()) {
            for len in 0..=LANES {
                for offset in [0, 1, 5] {
                    let (mut y, mut all) = (vec![-1.0; 40], [7.0; LANES]);
                    // nothing lies behind what is given
                    let given = x[offset..offset + len].to_vec().into_boxed_slice();
                    dispatch_at(level, Some(&given, &mut y[offset..offset + len], &mut all));
                    for (lane, number) in all.into_iter().enumerate() {
                        assert_eq!(number, if lane < len { x[offset + lane] } else { 0.0 }, "{level:?} {len}");
                    }
                    for (i, number) in y.into_iter().enumerate() {
                        let is_inside = (offset..offset + len).contains(&i);
                        assert_eq!(number, if is_inside { x[i] } else { -1.0 }, "{level:?} {len} from {offset}");
                    }
                }
            }
        }
    }

    #[test]
    fn powers_of_two_equal_their_f64_values_on_every_level() {
        struct Power;
        impl Unary for Power {
            #[inline(always)]
            fn apply<S: Simd>(s: S, x: S::V) -> S::V {
                exp2_negative(s, s.min(s.splat(0.0), x))
            }
        }
        for range in [125.0, 3.0, 0.01] {
            check::<Power>(|x| x.min(0.0).exp2(), range, 0.0, 2e-7);
        }
        for level in Isa::ALL.into_iter().filter(|level| level.is_available()) {
            let mut x = [f32::NEG_INFINITY, -1e9, 0.0, f32::NAN];
            dispatch_at(level, Map::<Power>(&mut x, std::marker::PhantomData));
            assert!(x[..2] == [2f32.powi(-125); 2] && x[2] == 1.0, "{level:?} {x:?}");
        }
    }

    #[test]
    fn derivatives_equal_their_f64_values_on_every_level() {
        fn check<F: Differentiable>(oracle: impl Fn(f64) -> f64) {
            for level in Isa::ALL.into_iter().filter(|level| level.is_available()) {
                for len in 0..130 {
                    let x: Vec<f32> = (0..len).map(|i| (i * 37 % 131) as f32 / 13.0 - 5.0).collect();
                    let mut dy = vec![2.0; len];
                    dispatch_at(level, MapBackward::<F>(&x, &mut dy, std::marker::PhantomData));
                    for (x, dy) in x.iter().zip(&dy) {
                        let want = 2.0 * oracle(*x as f64);
                        assert!((*dy as f64 - want).abs() <= 1e-6, "{level:?} f′({x}) = {dy}, not {want}");
                    }
                }
            }
        }
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        check::<Silu>(|x| sigmoid(x) * (1.0 + x * (1.0 - sigmoid(x))));
        check::<SquaredRelu>(|x| 2.0 * x.max(0.0));
        let density = |x: f64| (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
        check::<Gelu>(|x| 0.5 * (1.0 + erf_f64(x / 2f64.sqrt())) + x * density(x));
    }

    #[test]
    fn products_with_a_function_equal_the_two_steps() {
        for level in Isa::ALL.into_iter().filter(|level| level.is_available()) {
            for len in 0..130 {
                let x: Vec<f32> = (0..len).map(|i| (i * 37 % 131) as f32 / 13.0 - 5.0).collect();
                let y: Vec<f32> = (0..len).map(|i| (i * 31 % 53) as f32 / 10.0 - 2.0).collect();
                let (mut got, mut want) = (x.clone(), x);
                dispatch_at(level, MapMul::<Silu>(&mut got, &y, std::marker::PhantomData));
                dispatch_at(level, Map::<Silu>(&mut want, std::marker::PhantomData));
                assert!(got.iter().zip(&want).zip(&y).all(|((got, want), y)| *got == want * y));
            }
        }
    }

    #[test]
    fn the_slope_of_softplus_is_exact_where_it_is_small() {
        for level in Isa::ALL.into_iter().filter(|level| level.is_available()) {
            for len in 0..130 {
                let delta: Vec<f32> = (0..len).map(|i| 10f32.powf((i * 37 % 131) as f32 / 16.0 - 6.0)).collect();
                let mut ddelta = vec![2.0; len];
                dispatch_at(level, SoftplusBackward { delta: &delta, ddelta: &mut ddelta });
                for (delta, ddelta) in delta.iter().zip(&ddelta) {
                    let want = -2.0 * (-*delta as f64).exp_m1();
                    assert!((*ddelta as f64 - want).abs() <= 4e-7 * want, "{level:?} {delta}: {ddelta} {want}");
                }
            }
        }
    }

    #[test]
    fn extremes_saturate_and_nan_stays() {
        for level in Isa::ALL.into_iter().filter(|level| level.is_available()) {
            let mut x = [f32::NEG_INFINITY, -1e9, 1e9, f32::INFINITY, f32::NAN];
            dispatch_at(level, Map::<Exp>(&mut x, std::marker::PhantomData));
            assert!(x[0] < 1.3e-38 && x[1] < 1.3e-38 && x[2] > 2e38 && x[3] > 2e38 && x[4].is_nan(), "{x:?}");
            let mut x = [-1e9, 1e9, f32::NAN];
            dispatch_at(level, Map::<Softplus>(&mut x, std::marker::PhantomData));
            assert!(x[0].abs() < 1e-30 && x[1] == 1e9 && x[2].is_nan(), "{x:?}");
            let mut x = [-1e3, 1e3, f32::NAN];
            dispatch_at(level, Map::<Gelu>(&mut x, std::marker::PhantomData));
            assert!(x[0].abs() < 1e-3 && (x[1] - 1e3).abs() < 1e-3 && x[2].is_nan(), "{x:?}");
        }
    }
}
