//! The instruction sets there are code paths for, and which of them this machine has.

use std::sync::OnceLock;

/// The instruction sets there are code paths for, worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    Scalar,
    Avx2,
    Avx512,
    /// As `Avx512`, with an instruction for [`Simd::dot`](super::Simd::dot), which only [`dispatch_whole_at`](super::dispatch_whole_at) makes use of.
    Avx512Vnni,
    /// With one for [`Simd::dot_bf16`](super::Simd::dot_bf16) besides, which only [`dispatch_bf16_at`](super::dispatch_bf16_at) makes use of.
    Avx512Bf16,
    /// With tiles of bfloat16 (AMX), which only products of matrices in bfloat16 make use of.
    Amx,
}

impl Level {
    pub(crate) const ALL: [Level; 6] =
        [Level::Scalar, Level::Avx2, Level::Avx512, Level::Avx512Vnni, Level::Avx512Bf16, Level::Amx];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Level::Scalar => "scalar",
            Level::Avx2 => "avx2",
            Level::Avx512 | Level::Avx512Vnni | Level::Avx512Bf16 => "avx512",
            Level::Amx => "amx",
        }
    }

    pub(crate) fn is_available(self) -> bool {
        match self {
            Level::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && Level::Avx2.is_available()
            }
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vnni => is_x86_feature_detected!("avx512vnni") && Level::Avx512.is_available(),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => is_x86_feature_detected!("avx512bf16") && Level::Avx512Vnni.is_available(),
            #[cfg(all(target_arch = "x86_64", target_pointer_width = "64", target_os = "linux"))]
            Level::Amx => Level::Avx512Bf16.is_available() && amx::is_permitted(),
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// The level in use: the one `HYMBA_SIMD` names, if the CPU has it, or else the best there is. Tiles are not asked for.
    pub(crate) fn current() -> Level {
        static CURRENT: OnceLock<Level> = OnceLock::new();
        *CURRENT.get_or_init(|| Level::best(Level::Avx512Bf16))
    }

    /// As [`current`](Self::current), or tiles: the first call asks the system for them.
    pub(crate) fn with_tiles() -> Level {
        static WITH_TILES: OnceLock<Level> = OnceLock::new();
        *WITH_TILES.get_or_init(|| Level::best(Level::Amx))
    }

    fn best(most: Level) -> Level {
        Level::choose(most, &std::env::var("HYMBA_SIMD").unwrap_or_default(), Level::is_available)
    }

    /// The best level of the forced name, or else the best there is. Others are not asked for: to ask for tiles is to have
    /// them from then on.
    fn choose(most: Level, forced: &str, is_available: impl Fn(Level) -> bool) -> Level {
        let levels = Level::ALL.into_iter().rev().filter(|level| *level <= most);
        let named = levels.clone().find(|level| level.name() == forced && is_available(*level));
        named.or_else(|| levels.clone().find(|level| is_available(*level))).unwrap_or(Level::Scalar)
    }
}

/// Whether tiles may be used.
#[cfg(all(target_arch = "x86_64", target_pointer_width = "64", target_os = "linux"))]
mod amx {
    use std::arch::x86_64::{__cpuid_count, _xgetbv, CpuidResult};
    use std::sync::OnceLock;

    /// Whether the CPU has tiles of bfloat16 and the system lets this process use them, which is asked for once.
    pub(super) fn is_permitted() -> bool {
        static PERMITTED: OnceLock<bool> = OnceLock::new();
        *PERMITTED.get_or_init(|| {
            const XSAVE_IN_USE: u32 = 1 << 27;
            const AMX_BF16_AND_TILE: u32 = 1 << 22 | 1 << 24;
            /// State of the tile registers, and of their configuration.
            const TILE_STATES: u64 = 1 << 17 | 1 << 18;
            #[target_feature(enable = "xsave")]
            fn states_in_use() -> u64 {
                // SAFETY: there is the instruction, and register 0 always is
                unsafe { _xgetbv(0) }
            }

            let has_tiles = cpuid(0).eax >= 7
                && cpuid(1).ecx & XSAVE_IN_USE != 0
                && cpuid(7).edx & AMX_BF16_AND_TILE == AMX_BF16_AND_TILE
                // SAFETY: XSAVE is in use, so that there is XGETBV
                && unsafe { states_in_use() } & TILE_STATES == TILE_STATES;
            has_tiles && request()
        })
    }

    /// What the CPU says of itself. From Rust 1.94 on the function is safe.
    #[allow(unused_unsafe)]
    fn cpuid(leaf: u32) -> CpuidResult {
        // SAFETY: every CPU of this kind has the instruction
        unsafe { __cpuid_count(leaf, 0) }
    }

    /// Asks Linux for the tiles, for good and for the whole process: signal frames of threads that use them become 8 KiB larger, and
    /// signal stacks too small for that are refused.
    fn request() -> bool {
        const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_ulong = 18;
        // SAFETY: the call changes nothing but what the kernel lets the process do
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn a_level_that_is_not_wanted_is_not_asked_for() {
        for (forced, want, asked_for_tiles) in [
            ("avx512", Level::Avx512Bf16, false),
            ("avx2", Level::Avx2, false),
            ("scalar", Level::Scalar, false),
            ("amx", Level::Amx, true),
            ("", Level::Amx, true),
            ("abacus", Level::Amx, true),
        ] {
            let asked = RefCell::new(Vec::new());
            let level = Level::choose(Level::Amx, forced, |level| {
                asked.borrow_mut().push(level);
                true
            });
            assert_eq!((level, asked.into_inner().contains(&Level::Amx)), (want, asked_for_tiles), "{forced:?}");
        }
        let old = |level: Level| level <= Level::Avx2;
        assert_eq!(Level::choose(Level::Amx, "avx512", old), Level::Avx2, "the CPU lacks it");
        assert_eq!(Level::choose(Level::Avx512Bf16, "amx", |_| true), Level::Avx512Bf16);
    }
}
