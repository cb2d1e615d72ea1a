use half::f16;

/// The power of two that `row` is multiplied by so that its largest magnitude lies in
/// `2^exponent..2^(exponent + 1)`, and the one that undoes it; both are normal numbers.
fn row_power(row: &[f32], exponent: u32) -> (f32, f32) {
    let top = row.iter().map(|x| x.to_bits() & 0x7fff_ffff).max();
    let power = (top.unwrap_or(0) >> 23).clamp(15, 254);
    let power_of_two = |biased: u32| f32::from_bits(biased << 23);
    (
        power_of_two(254 + exponent - power),
        power_of_two(power - exponent),
    )
}

/// (scale, high and low): a row is scale * (high + low), as the cards' exact tensor-core linear reads
/// it. What that differs from `row` by is at most 2^-23 of the value or 2^-39 of the row's largest,
/// whichever is more.
pub fn split_f16(row: &[f32]) -> (f32, Vec<[f16; 2]>) {
    let (power, scale) = row_power(row, 14);
    let parts = row.iter().map(|x| {
        let high = f16::from_f32(x * power);
        [high, f16::from_f32(x * power - high.to_f32())]
    });
    (scale, parts.collect())
}

/// (scale, rounded): a row is about scale * rounded, as the cards' linear in half arithmetic reads it.
/// Magnitudes stay below 16, so that no 8 products with codes of 8 bits leave the range of f16.
pub fn round_f16(row: &[f32]) -> (f32, Vec<f16>) {
    let (power, scale) = row_power(row, 3);
    let rounded = row.iter().map(|x| f16::from_f32(x * power));
    (scale, rounded.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Magnitudes from 2^-149 to nearly 2^128 in one row and in many, and what is not finite.
    #[test]
    fn a_split_row_is_as_near_as_it_says() {
        let mut state = 1u32;
        let mut random = move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 8
        };
        for case in 0..2000 {
            // Rows of one magnitude, of a few neighbouring ones, of any.
            let (lowest, span) = (random() % 255, [1, 40, 255][case % 3]);
            let row: Vec<f32> = (0..64)
                .map(|_| {
                    let exponent = (lowest + random() % span).min(254);
                    f32::from_bits(random() << 31 | exponent << 23 | random() & 0x7f_ffff)
                })
                .collect();
            let largest = row.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            let (scale, parts) = split_f16(&row);
            for (x, [high, low]) in row.iter().zip(&parts) {
                assert!(high.is_finite() && low.is_finite(), "{x}");
                let split = f64::from(scale) * (high.to_f64() + low.to_f64());
                let error = (split - f64::from(*x)).abs();
                // Below 2^-112, of which a scale is made, the largest counts as that.
                let largest = f64::from(largest).max(2f64.powi(-112));
                let bound = (f64::from(x.abs()) * 2f64.powi(-23)).max(largest * 2f64.powi(-39));
                assert!(error <= bound, "{x} of {largest}: {high} + {low}");
            }
            let (scale, rounded) = round_f16(&row);
            for (x, rounded) in row.iter().zip(&rounded) {
                assert!(rounded.to_f32().abs() <= 16.0, "{x}");
                let error = (f64::from(scale) * rounded.to_f64() - f64::from(*x)).abs();
                let largest = f64::from(largest).max(2f64.powi(-112));
                let bound = (f64::from(x.abs()) * 2f64.powi(-11)).max(largest * 2f64.powi(-28));
                assert!(error <= bound, "{x} of {largest}: {rounded}");
            }
        }
        for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            let (_, parts) = split_f16(&[1.0, bad, -3e38]);
            assert!(!(parts[1][0].to_f32() + parts[1][1].to_f32()).is_finite());
            assert!(!round_f16(&[bad, 2.0]).1[0].is_finite());
        }
    }
}
