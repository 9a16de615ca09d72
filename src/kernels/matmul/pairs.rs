//! Weights in bfloat16, in pairs of inputs.

use half::bf16;

use super::operands::Weights;
use super::packed::Store;
pub(crate) use crate::kernels::simd::Words as PairRow;
use crate::kernels::simd::{LANES, Simd};

impl Weights<[f32; 2]> for PairRow {
    const MAX_ROWS: usize = 8;
    const MAX_ROWS_BY_HALF: usize = 5;
    const PANELS: usize = 1;
    const AHEAD: usize = 4096;

    #[inline(always)]
    fn load<S: Simd>(&self, s: S, step: usize, half: usize) -> S::V {
        let pairs = s.load_int(&self.0[half & 1]);
        if step == 0 { s.low_bf16(pairs) } else { s.high_bf16(pairs) }
    }
}

impl Weights<[u16; 2]> for PairRow {
    const MAX_ROWS: usize = 12;
    const PANELS: usize = 4;
    const AHEAD: usize = 1024;
    const BY_SIX: bool = true;

    #[inline(always)]
    fn some_rows<S: Simd, const R: usize>(
        s: S,
        x: [&[[u16; 2]]; R],
        w: &[Self],
        line: usize,
        sums: &mut [S::V],
    ) -> usize {
        s.dot_rows_bf16(x, w, line, sums)
    }

    #[inline(always)]
    fn load<S: Simd>(&self, s: S, _step: usize, half: usize) -> S::I {
        s.load_int(&self.0[half & 1])
    }
}

impl Store<2> for PairRow {
    const ZERO: Self = PairRow([[0; LANES]; 2]);

    fn set(&mut self, output: usize, numbers: [f32; 2]) {
        let [first, second] = numbers.map(|number| u32::from(bf16::from_f32(number).to_bits()));
        self.0[output / LANES][output % LANES] = second << 16 | first;
    }

    fn get(&self, output: usize) -> [f32; 2] {
        let pair = self.0[output / LANES][output % LANES];
        [f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000)]
    }
}
