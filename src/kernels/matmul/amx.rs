//! AMX: products of tiles of bfloat16, on Linux.
//!
//! The eight tiles hold sixteen lines of 64 bytes each. Numbers 0 to 3 are sums: of 32 rows by 32 outputs, the first two
//! of rows 0 to 15. Tiles 4 and 5 are the rows' inputs, 6 and 7 the weights of the lower and the upper half of a panel.

use std::arch::asm;
use std::cell::Cell;
use std::marker::PhantomData;

use super::pairs::PairRow;
use crate::kernels::rows::Rows;
use crate::kernels::simd::{Isa, LANES};

/// Rows of a tile, and pairs of inputs that one instruction multiplies.
const TILE: usize = 16;
/// Rows that there are tiles for.
const MOST_ROWS: usize = 2 * TILE;
/// From one row of a panel's weights, or sums, to the next, in bytes.
const LINE: usize = 128;

/// Instructions that change tiles: the compiler is told so, though it has no use for them itself.
macro_rules! tiles {
    ($($instructions_and_operands:tt)*) => {
        asm!(
            $($instructions_and_operands)*,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

/// What LDTILECFG reads.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_per_row: [u16; 16],
    rows: [u8; 16],
}

thread_local! {
    /// Whether there is a [`Tiles`].
    static IN_USE: Cell<bool> = const { Cell::new(false) };
}

/// The tile registers of this thread, which are there once.
pub(crate) struct Tiles {
    /// Rows of x that they are configured for.
    rows: usize,
    /// Not to be sent to other threads.
    _here: PhantomData<*const ()>,
}

impl Tiles {
    /// The tiles, if this process may use them and this thread does not yet.
    pub(crate) fn new() -> Option<Tiles> {
        // made only if it may be: dropping one uses the tiles
        (Isa::Amx.is_available() && !IN_USE.replace(true)).then(|| Tiles { rows: 0, _here: PhantomData })
    }

    /// sums `[m, 32]` += x `[m, k]` · Wᵀ for the panel `w` `[k / 2]`. Rows of x go on to a multiple of 32 inputs, with zeros.
    ///
    /// A sum is taken 32 inputs at a time in ascending order, so that a row is the same for any m.
    pub(crate) fn multiply(&mut self, x: Rows<u16>, w: &[PairRow], sums: &mut [[[f32; LANES]; 2]]) {
        /// Pairs of inputs whose weights stay in the first cache while many rows pass: 32 KiB.
        const BLOCK: usize = 16 * TILE;
        let block = if sums.len() > MOST_ROWS { BLOCK } else { w.len().next_multiple_of(TILE).max(TILE) };
        for (i, w) in w.chunks(block).enumerate() {
            let x = x.skip_columns(2 * i * block);
            let (whole, rest) = w.as_chunks();
            self.add(x, whole, sums);
            if !rest.is_empty() {
                let mut last = [PairRow([[0; LANES]; 2]); TILE];
                last[..rest.len()].copy_from_slice(rest);
                self.add(x.skip_columns(2 * TILE * whole.len()), &[last], sums);
            }
        }
    }

    /// As [`multiply`](Self::multiply), with all weights passing by once for every 32 rows.
    fn add(&mut self, x: Rows<u16>, w: &[[PairRow; TILE]], sums: &mut [[[f32; LANES]; 2]]) {
        for (i, sums) in sums.chunks_mut(MOST_ROWS).enumerate() {
            let x = Rows { data: &x.data[i * MOST_ROWS * x.stride..], ..x };
            self.add_rows(x, w, sums);
        }
    }

    /// As [`multiply`](Self::multiply), for at most 32 rows.
    fn add_rows(&mut self, x: Rows<u16>, w: &[[PairRow; TILE]], sums: &mut [[[f32; LANES]; 2]]) {
        let m = sums.len();
        let Some(last) = m.checked_sub(1) else { return };
        if w.is_empty() {
            return;
        }
        let _all_there = x.row(last, 2 * TILE * w.len());
        self.configure(m);
        let (rows, weights, sums) = (x.data.as_ptr(), w.as_ptr(), sums.as_mut_ptr());
        let x_stride = 2 * x.stride;
        // SAFETY: the tiles are configured for m rows and this thread's only `Tiles`. Read are m rows of x,
        // `x_stride` bytes apart, with 64 bytes for each of `w`, which was just checked, and the sixteen lines of each of `w`;
        // read and written are m sums of 128 bytes. (What is fetched ahead may be anywhere.)
        unsafe {
            if m <= TILE {
                tiles!(
                    "tileloadd tmm0, [{sums} + {line}]",
                    "tileloadd tmm1, [{sums} + {line} + 64]",
                    "2:",
                    "tileloadd tmm4, [{x} + {x_stride}]",
                    "tileloadd tmm6, [{w} + {line}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{w} + {line} + 64]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    // few rows wait for memory
                    ".set .Lhymba_ahead, 4096",
                    ".rept 32",
                    "prefetcht0 [{w} + .Lhymba_ahead]",
                    ".set .Lhymba_ahead, .Lhymba_ahead + 64",
                    ".endr",
                    "add {x}, 64",
                    "add {w}, 2048",
                    "dec {count}",
                    "jnz 2b",
                    "tilestored [{sums} + {line}], tmm0",
                    "tilestored [{sums} + {line} + 64], tmm1",
                    x = inout(reg) rows => _,
                    w = inout(reg) weights => _,
                    count = inout(reg) w.len() => _,
                    x_stride = in(reg) x_stride,
                    line = in(reg) LINE,
                    sums = in(reg) sums
                );
            } else {
                tiles!(
                    "tileloadd tmm0, [{sums} + {line}]",
                    "tileloadd tmm1, [{sums} + {line} + 64]",
                    "tileloadd tmm2, [{lower_sums} + {line}]",
                    "tileloadd tmm3, [{lower_sums} + {line} + 64]",
                    "2:",
                    "tileloadd tmm4, [{x} + {x_stride}]",
                    "tileloadd tmm6, [{w} + {line}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{w} + {line} + 64]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{lower} + {x_stride}]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "add {x}, 64",
                    "add {lower}, 64",
                    "add {w}, 2048",
                    "dec {count}",
                    "jnz 2b",
                    "tilestored [{sums} + {line}], tmm0",
                    "tilestored [{sums} + {line} + 64], tmm1",
                    "tilestored [{lower_sums} + {line}], tmm2",
                    "tilestored [{lower_sums} + {line} + 64], tmm3",
                    x = inout(reg) rows => _,
                    lower = inout(reg) rows.add(TILE * x.stride) => _,
                    w = inout(reg) weights => _,
                    count = inout(reg) w.len() => _,
                    x_stride = in(reg) x_stride,
                    line = in(reg) LINE,
                    sums = in(reg) sums,
                    lower_sums = in(reg) sums.add(TILE)
                );
            }
        }
    }

    /// Gives the tiles as many rows as there are, if they have others.
    fn configure(&mut self, rows: usize) {
        if rows == self.rows {
            return;
        }
        self.rows = rows;
        let upper = rows.min(TILE);
        let lower = rows - upper;
        let rows = [upper, upper, lower, lower, upper, lower, TILE, TILE];
        let mut configuration =
            Configuration { palette: 1, start_row: 0, reserved: [0; 14], bytes_per_row: [0; 16], rows: [0; 16] };
        for (tile, rows) in rows.into_iter().enumerate() {
            // a tile without rows must have no bytes, either
            configuration.bytes_per_row[tile] = if rows > 0 { 64 } else { 0 };
            configuration.rows[tile] = rows as u8;
        }
        // SAFETY: the process may use the tiles; the configuration has at most 16 rows of 64 bytes for each of eight tiles
        unsafe { tiles!("ldtilecfg [{}]", in(reg) &raw const configuration) }
    }
}

impl Drop for Tiles {
    /// Lets the system and the CPU forget about the tiles.
    fn drop(&mut self) {
        IN_USE.set(false);
        // SAFETY: the process may use the tiles
        unsafe { tiles!("tilerelease") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_has_its_tiles_once_and_only_if_permitted() {
        for _ in 0..2 {
            let tiles = Tiles::new();
            assert_eq!(tiles.is_some(), Isa::Amx.is_available());
            assert!(Tiles::new().is_none());
            // the first is there still
            if let Some(mut tiles) = tiles {
                let (x, mut sums) = ([0x3f80; 32], [[[0.0; LANES]; 2]]);
                tiles.multiply(Rows { data: &x, stride: 32 }, &[PairRow([[0x3f80_3f80; LANES]; 2]); TILE], &mut sums);
                assert_eq!(sums, [[[32.0; LANES]; 2]]);
            }
        }
    }
}
