//! The exponential of 16 lanes.

use super::lanes::Lanes;

/// `exp(x)` within 2 units in the last place; exactly 1 at 0, 0 below -104, infinity above 88.73.
///
/// Range reduction by Cody and Waite and the polynomial of Moshier's Cephes `expf`.
#[inline(always)]
pub(crate) fn exp<L: Lanes>(lanes: L, x: L::F) -> L::F {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const POLYNOMIAL: [f32; 6] = [
        1.987_569_1e-4,
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ];

    let x = lanes.min(lanes.splat(89.0), lanes.max(lanes.splat(-104.0), x));
    let n = lanes.round(lanes.mul(x, lanes.splat(std::f32::consts::LOG2_E)));
    let r = lanes.mul_add(n, lanes.splat(-LN2_HIGH), x);
    let r = lanes.mul_add(n, lanes.splat(-LN2_LOW), r);
    let mut p = lanes.splat(POLYNOMIAL[0]);
    for coefficient in &POLYNOMIAL[1..] {
        p = lanes.mul_add(p, r, lanes.splat(*coefficient));
    }
    let p = lanes.add(lanes.mul_add(p, lanes.mul(r, r), r), lanes.splat(1.0));
    // 2^n in two steps, for n leaves the exponent range on its way to 0 and to infinity.
    let first = lanes.round(lanes.mul(n, lanes.splat(0.5)));
    let second = lanes.sub(n, first);
    lanes.mul(
        lanes.mul(p, lanes.power_of_two(first)),
        lanes.power_of_two(second),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::lanes::{Kernel, dispatch, test_sets};

    struct Exp([f32; 16]);

    impl Kernel for Exp {
        type Output = [f32; 16];

        #[inline(always)]
        fn run<L: Lanes>(self, lanes: L) -> [f32; 16] {
            lanes.to_array(exp(lanes, lanes.load(&self.0)))
        }
    }

    #[test]
    fn is_within_two_ulps_everywhere() {
        for isa in test_sets() {
            let mut worst = 0.0f64;
            for step in 0..200_000 {
                let mut x = [0.0; 16];
                for (lane, x) in x.iter_mut().enumerate() {
                    *x = -87.0 + 175.7 * (step * 16 + lane) as f32 / 3_200_000.0;
                }
                for (got, x) in dispatch(isa, Exp(x)).into_iter().zip(x) {
                    let expected = f64::from(x).exp();
                    let ulp = f64::from((expected as f32).next_up() - expected as f32);
                    worst = worst.max((f64::from(got) - expected).abs() / ulp);
                }
            }
            assert!(worst <= 2.0, "{isa:?}: {worst} ulps");
        }
    }

    #[test]
    fn holds_at_the_edges() {
        for isa in test_sets() {
            let mut x = [0.0; 16];
            x[1..8].copy_from_slice(&[
                f32::NEG_INFINITY,
                -104.0,
                -1e30,
                f32::INFINITY,
                88.73,
                f32::NAN,
                -100.0,
            ]);
            let got = dispatch(isa, Exp(x));
            assert_eq!(got[0].to_bits(), 1.0f32.to_bits());
            assert_eq!(got[1..4], [0.0; 3]);
            assert_eq!(got[4..6], [f32::INFINITY; 2]);
            assert!(got[6].is_nan(), "{isa:?}");
            let tiny = (-100.0f64).exp();
            assert!(
                (f64::from(got[7]) - tiny).abs() <= 1.5e-45,
                "{isa:?}: {}",
                got[7]
            );
        }
    }
}
