//! The instruction sets there are code paths for, and which of them this machine has.

#[cfg(target_arch = "aarch64")]
use std::arch::is_aarch64_feature_detected;
use std::sync::OnceLock;

/// The instruction sets there are code paths for, those of one kind of CPU worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Isa {
    Scalar,
    /// Of WebAssembly: in a module that is compiled for it, and there the only one outside tests.
    Simd128,
    Neon,
    /// As `Neon`, with `sdot` for [`Simd::dot`](super::Simd::dot), which only
    /// [`dispatch_int_at`](super::dispatch_int_at) uses.
    NeonDot,
    /// With `usdot` for it.
    NeonI8mm,
    /// With `bfdot` for [`Simd::dot_bf16`](super::Simd::dot_bf16), too, which only
    /// [`dispatch_bf16_at`](super::dispatch_bf16_at) uses.
    NeonBf16,
    Avx2,
    /// As `Avx2`, with an instruction for [`Simd::dot`](super::Simd::dot) (AVX-VNNI), which only
    /// [`dispatch_int_at`](super::dispatch_int_at) uses.
    Avx2Vnni,
    Avx512,
    /// As `Avx512`, with an instruction for [`Simd::dot`](super::Simd::dot), which only
    /// [`dispatch_int_at`](super::dispatch_int_at) uses.
    Avx512Vnni,
    /// With one for [`Simd::dot_bf16`](super::Simd::dot_bf16), too, which only
    /// [`dispatch_bf16_at`](super::dispatch_bf16_at) uses.
    Avx512Bf16,
    /// With tiles of bfloat16 (AMX), which only products of matrices in bfloat16 use.
    Amx,
}

impl Isa {
    const HAS_SIMD128: bool = cfg!(all(target_arch = "wasm32", target_feature = "simd128"));

    pub(crate) const ALL: [Isa; 12] = [
        Isa::Scalar,
        Isa::Simd128,
        Isa::Neon,
        Isa::NeonDot,
        Isa::NeonI8mm,
        Isa::NeonBf16,
        Isa::Avx2,
        Isa::Avx2Vnni,
        Isa::Avx512,
        Isa::Avx512Vnni,
        Isa::Avx512Bf16,
        Isa::Amx,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Simd128 => "simd128",
            Isa::Neon | Isa::NeonDot | Isa::NeonI8mm | Isa::NeonBf16 => "neon",
            Isa::Avx2 | Isa::Avx2Vnni => "avx2",
            Isa::Avx512 | Isa::Avx512Vnni | Isa::Avx512Bf16 => "avx512",
            Isa::Amx => "amx",
        }
    }

    /// What `HYMBA_SIMD` calls it: `avx2` leaves out AVX-VNNI, so that it is the same on every CPU.
    fn forced_name(self) -> &'static str {
        match self {
            Isa::Avx2Vnni => "avx2-vnni",
            level => level.name(),
        }
    }

    pub(crate) fn is_available(self) -> bool {
        match self {
            Isa::Scalar => cfg!(test) || !Isa::HAS_SIMD128,
            Isa::Simd128 => Isa::HAS_SIMD128,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => is_aarch64_feature_detected!("neon"),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDot => is_aarch64_feature_detected!("dotprod") && Isa::Neon.is_available(),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonI8mm => is_aarch64_feature_detected!("i8mm") && Isa::NeonDot.is_available(),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonBf16 => is_aarch64_feature_detected!("bf16") && Isa::NeonI8mm.is_available(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2Vnni => is_x86_feature_detected!("avxvnni") && Isa::Avx2.is_available(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") && Isa::Avx2.is_available()
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => is_x86_feature_detected!("avx512vnni") && Isa::Avx512.is_available(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => is_x86_feature_detected!("avx512bf16") && Isa::Avx512Vnni.is_available(),
            #[cfg(all(target_arch = "x86_64", target_pointer_width = "64", target_os = "linux"))]
            Isa::Amx => Isa::Avx512Bf16.is_available() && amx::is_permitted(),
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// Whether there are instructions for products of bfloat16.
    pub(crate) fn has_bf16(self) -> bool {
        // a constant elsewhere, so that such products are not even compiled
        cfg!(any(target_arch = "x86_64", target_arch = "aarch64")) && (self == Isa::NeonBf16 || self >= Isa::Avx512Bf16)
    }

    /// The level in use: the one `HYMBA_SIMD` names, if the CPU has it, or else the best there is. Tiles are not asked for.
    pub(crate) fn current() -> Isa {
        static CURRENT: OnceLock<Isa> = OnceLock::new();
        *CURRENT.get_or_init(|| Isa::best(Isa::Avx512Bf16))
    }

    /// As [`current`](Self::current), or tiles: the first call asks the system for them, unless `HYMBA_SIMD` names
    /// another level that the CPU has.
    pub(crate) fn with_tiles() -> Isa {
        static WITH_TILES: OnceLock<Isa> = OnceLock::new();
        *WITH_TILES.get_or_init(|| Isa::best(Isa::Amx))
    }

    fn best(most: Isa) -> Isa {
        Isa::choose(most, &std::env::var("HYMBA_SIMD").unwrap_or_default(), Isa::is_available)
    }

    /// The best level of the forced name, or else the best there is. Others are not asked for: to ask for tiles is to have
    /// them from then on.
    fn choose(most: Isa, forced: &str, is_available: impl Fn(Isa) -> bool) -> Isa {
        let levels = Isa::ALL.into_iter().rev().filter(|level| *level <= most);
        let named = levels.clone().find(|level| level.forced_name() == forced && is_available(*level));
        named.or_else(|| levels.clone().find(|level| is_available(*level))).unwrap_or(Isa::Scalar)
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

    /// Tests of all levels go through those of which the system says that the CPU has them; `--nocapture` shows which these are. An old
    /// system does not name all.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    #[test]
    fn the_levels_are_those_of_the_cpu() {
        let levels: Vec<Isa> = Isa::ALL.into_iter().filter(|level| level.is_available()).collect();
        println!("levels: {levels:?}");
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let flags: Vec<&str> = info.lines().find(|line| line.starts_with("flags")).unwrap().split(' ').collect();
        let is_named = |wanted: &[&str]| wanted.iter().all(|flag| flags.contains(flag));
        let avx2 = is_named(&["avx2", "fma", "f16c"]);
        let avx512 = avx2 && is_named(&["avx512f", "avx512bw"]);
        let vnni = avx512 && is_named(&["avx512_vnni"]);
        for (level, named) in [
            (Isa::Avx2, avx2),
            (Isa::Avx2Vnni, avx2 && is_named(&["avx_vnni"])),
            (Isa::Avx512, avx512),
            (Isa::Avx512Vnni, vnni),
            (Isa::Avx512Bf16, vnni && is_named(&["avx512_bf16"])),
        ] {
            assert!(levels.contains(&level) || !named, "{level:?}");
        }
    }

    #[test]
    fn a_level_that_is_not_wanted_is_not_asked_for() {
        for (forced, want, asked_for_tiles) in [
            ("avx512", Isa::Avx512Bf16, false),
            ("avx2", Isa::Avx2, false),
            ("avx2-vnni", Isa::Avx2Vnni, false),
            ("scalar", Isa::Scalar, false),
            ("amx", Isa::Amx, true),
            ("", Isa::Amx, true),
            ("abacus", Isa::Amx, true),
        ] {
            let asked = RefCell::new(Vec::new());
            let level = Isa::choose(Isa::Amx, forced, |level| {
                asked.borrow_mut().push(level);
                true
            });
            assert_eq!((level, asked.into_inner().contains(&Isa::Amx)), (want, asked_for_tiles), "{forced:?}");
        }
        let old = |level: Isa| level <= Isa::Avx2;
        assert_eq!(Isa::choose(Isa::Amx, "avx512", old), Isa::Avx2, "the CPU lacks it");
        assert_eq!(Isa::choose(Isa::Amx, "avx2-vnni", old), Isa::Avx2, "the CPU lacks it");
        assert_eq!(Isa::choose(Isa::Avx512Bf16, "", |level| level < Isa::Avx512), Isa::Avx2Vnni);
        assert_eq!(Isa::choose(Isa::Avx512Bf16, "amx", |_| true), Isa::Avx512Bf16);
    }
}
