//! The types of number a file may hold, and f32, which is what they become.
//!
//! Whole slices are converted at a time: a model of a few gigabytes is decoded as fast as the system reads it.

use safetensors::Dtype;

/// The types of float that are read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Float {
    F32,
    F64,
    F16,
    BF16,
}

impl Float {
    pub(crate) fn of(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F32 => Some(Float::F32),
            Dtype::F64 => Some(Float::F64),
            Dtype::F16 => Some(Float::F16),
            Dtype::BF16 => Some(Float::BF16),
            _ => None,
        }
    }

    /// Bytes of a number.
    pub(crate) fn size(self) -> usize {
        match self {
            Float::F64 => 8,
            Float::F32 => 4,
            Float::F16 | Float::BF16 => 2,
        }
    }

    /// Writes the little-endian numbers of `bytes` to as many `places`. The bytes may be unaligned in the file.
    pub(crate) fn decode(self, bytes: &[u8], places: &mut [f32]) {
        debug_assert_eq!(bytes.len(), places.len() * self.size());
        match self {
            Float::F32 => put(bytes, f32::from_le_bytes, places),
            Float::F64 => put(bytes, |bytes| f64::from_le_bytes(bytes) as f32, places),
            Float::F16 => put(bytes, |bytes| f16_to_f32(u16::from_le_bytes(bytes)), places),
            Float::BF16 => put(bytes, |[low, high]| f32::from_le_bytes([0, 0, low, high]), places),
        }
    }

    /// Appends the `numbers`, rounded to the nearest of this type, to `bytes`.
    pub(crate) fn encode(self, numbers: &[f32], bytes: &mut Vec<u8>) {
        use half::{bf16, f16};

        match self {
            Float::F32 => bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes())),
            Float::F64 => bytes.extend(numbers.iter().flat_map(|&number| f64::from(number).to_le_bytes())),
            Float::F16 => bytes.extend(numbers.iter().flat_map(|&number| f16::from_f32(number).to_le_bytes())),
            Float::BF16 => bytes.extend(numbers.iter().flat_map(|&number| bf16::from_f32(number).to_le_bytes())),
        }
    }
}

fn put<const N: usize>(bytes: &[u8], number: impl Fn([u8; N]) -> f32, places: &mut [f32]) {
    for (place, bytes) in places.iter_mut().zip(bytes.as_chunks().0) {
        *place = number(*bytes);
    }
}

/// Half precision has 5 bits of exponent and 10 of fraction, and its exponents start 112 later than those of f32. All three
/// cases are cheap, so that a loop can compute each and choose; none of them meets a subnormal f32, which is slow.
fn f16_to_f32(half: u16) -> f32 {
    const INFINITY: u32 = 0x7f80_0000;
    const LATER: u32 = 112 << 23;
    const ONE: u32 = 1 << 23;
    let sign = u32::from(half & 0x8000) << 16;
    let moved = u32::from(half & 0x7fff) << 13;
    let normal = moved + LATER;
    // without the implicit 1 of the fraction, which is put in and taken off again
    let subnormal = (f32::from_bits(normal + ONE) - f32::from_bits(LATER + ONE)).to_bits();
    let magnitude = match half & 0x7c00 {
        0x7c00 => moved | INFINITY,
        0 => subnormal,
        _ => normal,
    };
    f32::from_bits(sign | magnitude)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_become_floats() {
        for (half, float) in [
            (0x0000, 0.0),
            (0x8000, -0.0),
            (0x0001, 2f32.powi(-24)),
            (0x83ff, -1023.0 * 2f32.powi(-24)),
            (0x0400, 2f32.powi(-14)),
            (0x3c00, 1.0),
            (0x3555, 1365.0 / 4096.0),
            (0xc500, -5.0),
            (0x7bff, 65504.0),
            (0x7c00, f32::INFINITY),
            (0xfc00, f32::NEG_INFINITY),
        ] {
            assert_eq!(f16_to_f32(half).to_bits(), f32::to_bits(float), "{half:#06x}");
        }
        assert!(f16_to_f32(0x7e01).is_nan());
    }

    #[test]
    fn every_type_of_float_is_decoded() {
        let decode = |float: Float, bytes: &[u8]| {
            let mut read = [0f32; 2];
            float.decode(bytes, &mut read);
            read
        };
        assert_eq!(decode(Float::F32, &[0, 0, 0x80, 0x3f, 0, 0, 0x20, 0xc0]), [1.0, -2.5]);
        assert_eq!(decode(Float::F16, &[0x00, 0x3c, 0x00, 0xc1]), [1.0, -2.5]);
        assert_eq!(decode(Float::BF16, &[0x80, 0x3f, 0x20, 0xc0]), [1.0, -2.5]);
        let doubles = [1f64.to_le_bytes(), (-2.5f64).to_le_bytes()].concat();
        assert_eq!(decode(Float::F64, &doubles), [1.0, -2.5]);
    }

    #[cfg(feature = "lm")]
    #[test]
    fn every_half_is_encoded_as_it_was() {
        for float in [Float::F16, Float::BF16] {
            let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
            let mut numbers = vec![0.0; 1 << 16];
            float.decode(&bytes, &mut numbers);
            let mut encoded = Vec::new();
            float.encode(&numbers, &mut encoded);
            for ((before, after), number) in bytes.as_chunks::<2>().0.iter().zip(encoded.as_chunks().0).zip(numbers) {
                // a signalling NaN becomes a quiet one
                assert!(before == after || number.is_nan(), "{float:?} {before:?} {after:?}");
            }
        }
        let mut rounded = Vec::new();
        Float::BF16.encode(&[f32::from_bits(0x3f80_8001), f32::from_bits(0x3f80_8000)], &mut rounded);
        assert_eq!(rounded, [0x81, 0x3f, 0x80, 0x3f]);
    }
}
