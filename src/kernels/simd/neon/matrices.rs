//! Products of matrices, two rows by two outputs at a time: `usmmla` takes eight bytes of each, `bfmmla` four bfloat16.
//!
//! Weights lie as `usdot` and `bfdot` want them, four bytes or a pair after the other for each output; so those of two outputs are
//! joined in registers. That costs as many instructions as two rows save, and pays from four rows on.
//!
//! The sums are the same bits as theirs: those of bytes are exact, and `bfmmla` is by its definition two times `bfdot`.

use super::{LANES, QUARTERS, Words};
use std::arch::aarch64::*;
use std::arch::asm;

/// Sums of a pair of rows. Of each quarter, those of the first two outputs, then of the others: of each output those of both rows.
type Pair<T> = [[T; 2]; QUARTERS];

/// Adds the products of the weights in a register to sums of two pairs of rows, or of three.
macro_rules! pairs {
    (2, $instruction:literal, $lanes:literal, $w:literal, $first:literal, $second:literal, $third:literal) => {
        concat!(
            $instruction,
            " v",
            $first,
            ".4s, v",
            $w,
            $lanes,
            ", v0",
            $lanes,
            "\n",
            $instruction,
            " v",
            $second,
            ".4s, v",
            $w,
            $lanes,
            ", v1",
            $lanes,
            "\n",
        )
    };
    (3, $instruction:literal, $lanes:literal, $w:literal, $first:literal, $second:literal, $third:literal) => {
        concat!(
            pairs!(2, $instruction, $lanes, $w, $first, $second, $third),
            $instruction,
            " v",
            $third,
            ".4s, v",
            $w,
            $lanes,
            ", v2",
            $lanes,
            "\n",
        )
    };
}

/// The sums of a quarter, whose weights are in two registers; both are lost, and a third.
macro_rules! quarter {
    ($pairs:tt, $instruction:literal, $lanes:literal, $low:literal, $high:literal, $other:literal,
     $a:literal, $b:literal, $c:literal, $d:literal, $e:literal, $f:literal) => {
        concat!(
            "zip1 v",
            $other,
            ".4s, v",
            $low,
            ".4s, v",
            $high,
            ".4s\n",
            "zip2 v",
            $low,
            ".4s, v",
            $low,
            ".4s, v",
            $high,
            ".4s\n",
            pairs!($pairs, $instruction, $lanes, $other, $a, $c, $e),
            pairs!($pairs, $instruction, $lanes, $low, $b, $d, $f),
        )
    };
}

/// The products of eight bytes of each row. The weights of the first half of them are in one line, those of the second 128 bytes on.
macro_rules! eight_bytes {
    ($pairs:tt, $instruction:literal, $lanes:literal) => {
        concat!(
            "ldp q3, q4, [{w}], #256\n",
            "ldp q5, q6, [{w}, #-128]\n",
            quarter!($pairs, $instruction, $lanes, "3", "5", "7", "8", "9", "16", "17", "24", "25"),
            quarter!($pairs, $instruction, $lanes, "4", "6", "7", "10", "11", "18", "19", "26", "27"),
            "ldp q3, q4, [{w}, #-224]\n",
            "ldp q5, q6, [{w}, #-96]\n",
            quarter!($pairs, $instruction, $lanes, "3", "5", "7", "12", "13", "20", "21", "28", "29"),
            quarter!($pairs, $instruction, $lanes, "4", "6", "7", "14", "15", "22", "23", "30", "31"),
        )
    };
}

/// The same for weights of four bits: those of the first half are the low ones of a line, the mask of which is in v7.
macro_rules! eight_nibbles {
    ($pairs:tt) => {
        concat!(
            "ldp q3, q4, [{w}], #128\n",
            eight_nibbles!($pairs, "3", "8", "9", "16", "17", "24", "25"),
            eight_nibbles!($pairs, "4", "10", "11", "18", "19", "26", "27"),
            "ldp q3, q4, [{w}, #-96]\n",
            eight_nibbles!($pairs, "3", "12", "13", "20", "21", "28", "29"),
            eight_nibbles!($pairs, "4", "14", "15", "22", "23", "30", "31"),
        )
    };
    ($pairs:tt, $w:literal, $a:literal, $b:literal, $c:literal, $d:literal, $e:literal, $f:literal) => {
        concat!(
            "and v5.16b, v",
            $w,
            ".16b, v7.16b\n",
            "ushr v",
            $w,
            ".16b, v",
            $w,
            ".16b, #4\n",
            quarter!($pairs, "usmmla", ".16b", "5", $w, "6", $a, $b, $c, $d, $e, $f),
        )
    };
}

/// A loop over eight bytes at a time of some rows, of the sums of which the last are in the last registers.
macro_rules! multiply {
    ($x:literal, $step:expr, $steps:expr, $w:expr, [$($row:ident = $address:expr),+], [$($register:tt = $sum:expr),+]) => {
        asm!(
            "2:",
            "ldr d0, [{a}], #8", "ld1 {{v0.d}}[1], [{b}], #8",
            "ldr d1, [{c}], #8", "ld1 {{v1.d}}[1], [{d}], #8",
            $x,
            $step,
            "subs {steps}, {steps}, #1",
            "b.ne 2b",
            $($row = inout(reg) $address => _,)+
            w = inout(reg) $w => _,
            steps = inout(reg) $steps => _,
            $(inout($register) $sum,)+
            out("v0") _, out("v1") _, out("v2") _, out("v3") _, out("v4") _, out("v5") _, out("v6") _,
            inout("v7") vdupq_n_u8(0x0f) => _,
            options(readonly, nostack),
        )
    };
    (2, $step:expr, $steps:expr, $w:expr, $x:expr, $sums:expr) => {{
        let ([a, b, c, d, ..], [p, q, ..]) = ($x, $sums);
        multiply!("", $step, $steps, $w, [a = a, b = b, c = c, d = d], [
            "v8" = p[0][0], "v9" = p[0][1], "v10" = p[1][0], "v11" = p[1][1],
            "v12" = p[2][0], "v13" = p[2][1], "v14" = p[3][0], "v15" = p[3][1],
            "v16" = q[0][0], "v17" = q[0][1], "v18" = q[1][0], "v19" = q[1][1],
            "v20" = q[2][0], "v21" = q[2][1], "v22" = q[3][0], "v23" = q[3][1]
        ])
    }};
    (3, $step:expr, $steps:expr, $w:expr, $x:expr, $sums:expr) => {{
        let ([a, b, c, d, e, f], [p, q, r]) = ($x, $sums);
        multiply!("ldr d2, [{e}], #8\nld1 {{v2.d}}[1], [{f}], #8", $step, $steps, $w, [a = a, b = b, c = c, d = d, e = e, f = f], [
            "v8" = p[0][0], "v9" = p[0][1], "v10" = p[1][0], "v11" = p[1][1],
            "v12" = p[2][0], "v13" = p[2][1], "v14" = p[3][0], "v15" = p[3][1],
            "v16" = q[0][0], "v17" = q[0][1], "v18" = q[1][0], "v19" = q[1][1],
            "v20" = q[2][0], "v21" = q[2][1], "v22" = q[3][0], "v23" = q[3][1],
            "v24" = r[0][0], "v25" = r[0][1], "v26" = r[1][0], "v27" = r[1][1],
            "v28" = r[2][0], "v29" = r[2][1], "v30" = r[3][0], "v31" = r[3][1]
        ])
    }};
}

/// Adds the products of so many times eight bytes of six rows, or of the first four, with weights from `w` on.
macro_rules! four_or_six {
    ($four:expr, $steps:expr, $w:expr, $x:expr, $sums:expr, $step:ident $(, $argument:literal)*) => {
        if $four {
            multiply!(2, $step!(2 $(, $argument)*), $steps, $w, $x, $sums)
        } else {
            multiply!(3, $step!(3 $(, $argument)*), $steps, $w, $x, $sums)
        }
    };
}

/// The sums of R rows, four to six, by half a panel for 32 inputs: weights of 8 bits, or of 4 where there are half as many lines. The
/// last of five rows is taken twice.
///
/// # Safety
///
/// The CPU has the instructions.
#[inline(always)]
pub(super) unsafe fn dot_bytes<const R: usize, const N: usize>(
    x: [&[u32; 8]; R],
    starts: [u32; R],
    w: &[[[u32; LANES]; 2]; N],
    half: usize,
) -> [[uint32x4_t; QUARTERS]; R] {
    let start = |row: usize| u64::from(starts[row.min(R - 1)]);
    // SAFETY: a row has four times eight bytes, and there are as many times weights for them
    unsafe {
        let begin = |pair: usize| vreinterpretq_u32_u64(vdupq_n_u64(start(2 * pair + 1) << 32 | start(2 * pair)));
        let mut sums: [Pair<uint32x4_t>; 3] = [[[begin(0); 2]; 4], [[begin(1); 2]; 4], [[begin(2); 2]; 4]];
        let mut addresses = [x[R - 1].as_ptr(); 6];
        for (address, x) in addresses.iter_mut().zip(x) {
            *address = x.as_ptr();
        }
        let w = w.as_ptr().cast::<[u32; LANES]>().add(half & 1);
        if N == 8 {
            four_or_six!(R == 4, 4_usize, w, addresses, &mut sums, eight_bytes, "usmmla", ".16b");
        } else {
            four_or_six!(R == 4, 4_usize, w, addresses, &mut sums, eight_nibbles);
        }
        let mut rows = [[vdupq_n_u32(0); QUARTERS]; R];
        for (row, to) in rows.iter_mut().enumerate() {
            for (to, [a, b]) in to.iter_mut().zip(sums[row / 2]) {
                *to = if row % 2 == 0 { vuzp1q_u32(a, b) } else { vuzp2q_u32(a, b) };
            }
        }
        rows
    }
}

/// Adds to the sums of R rows, four to six, by half a panel, and says of how many pairs of inputs.
///
/// # Safety
///
/// The CPU has the instructions.
#[inline(always)]
pub(super) unsafe fn dot_bf16<const R: usize>(
    x: [&[[u16; 2]]; R],
    w: &[Words],
    half: usize,
    rows: &mut [[float32x4_t; QUARTERS]],
) -> usize {
    let steps = x.iter().fold(w.len(), |least, x| least.min(x.len())) / 2;
    if steps == 0 || rows.len() != R {
        return 0;
    }
    // SAFETY: so many times two pairs there are of each row, and weights for them
    unsafe {
        let mut sums: [Pair<float32x4_t>; 3] = [[[vdupq_n_f32(0.0); 2]; 4]; 3];
        for pair in 0..R.div_ceil(2) {
            let [a, b] = [rows[2 * pair], rows[(2 * pair + 1).min(R - 1)]];
            for quarter in 0..QUARTERS {
                sums[pair][quarter] = [vzip1q_f32(a[quarter], b[quarter]), vzip2q_f32(a[quarter], b[quarter])];
            }
        }
        let w = w[0].0[half & 1].as_ptr();
        let mut addresses = [x[R - 1].as_ptr(); 6];
        for (address, x) in addresses.iter_mut().zip(x) {
            *address = x.as_ptr();
        }
        four_or_six!(R == 4, steps, w, addresses, &mut sums, eight_bytes, "bfmmla", ".8h");
        for (row, to) in rows.iter_mut().enumerate() {
            for (to, [a, b]) in to.iter_mut().zip(sums[row / 2]) {
                *to = if row % 2 == 0 { vuzp1q_f32(a, b) } else { vuzp2q_f32(a, b) };
            }
        }
    }
    2 * steps
}
