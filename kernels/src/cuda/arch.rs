//! The architectures that kernels are built for.

use std::{fmt, str::FromStr};

use super::CudaError;

/// A compute capability that the pack has code for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Arch {
    /// Tesla P100.
    Sm60,
    /// Tesla P40, GTX 10xx.
    Sm61,
    /// Tesla V100.
    Sm70,
    /// Tesla T4, RTX 20xx.
    Sm75,
    /// A100.
    Sm80,
    /// RTX 30xx, A10.
    Sm86,
    /// RTX 40xx, L4.
    Sm89,
    /// H100.
    Sm90,
}

impl Arch {
    /// All of them, oldest first.
    pub const ALL: [Self; 8] = [
        Self::Sm60,
        Self::Sm61,
        Self::Sm70,
        Self::Sm75,
        Self::Sm80,
        Self::Sm86,
        Self::Sm89,
        Self::Sm90,
    ];

    /// As the compiler names it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sm60 => "sm_60",
            Self::Sm61 => "sm_61",
            Self::Sm70 => "sm_70",
            Self::Sm75 => "sm_75",
            Self::Sm80 => "sm_80",
            Self::Sm86 => "sm_86",
            Self::Sm89 => "sm_89",
            Self::Sm90 => "sm_90",
        }
    }

    /// Compute capability, (major, minor).
    pub const fn capability(self) -> (u8, u8) {
        match self {
            Self::Sm60 => (6, 0),
            Self::Sm61 => (6, 1),
            Self::Sm70 => (7, 0),
            Self::Sm75 => (7, 5),
            Self::Sm80 => (8, 0),
            Self::Sm86 => (8, 6),
            Self::Sm89 => (8, 9),
            Self::Sm90 => (9, 0),
        }
    }

    /// The newest whose code runs on a card of this capability; `None` below 6.0.
    pub fn for_card(capability: (u8, u8)) -> Option<Self> {
        Self::ALL
            .into_iter()
            .rev()
            .find(|arch| arch.capability() <= capability)
    }

    /// True if a card of this capability executes the architecture's cubin itself: the same major
    /// version and at least the same minor one. Any newer card takes its PTX through the driver.
    pub fn runs_cubin(self, capability: (u8, u8)) -> bool {
        let (major, minor) = self.capability();
        major == capability.0 && minor <= capability.1
    }

    /// Four-way int8 dot products, which start at 6.1.
    pub const fn has_dp4a(self) -> bool {
        !matches!(self, Self::Sm60)
    }

    /// fp16 tensor cores, which start at 7.0 with an instruction of their own (`mma.m8n8k4`).
    pub const fn has_f16_mma(self) -> bool {
        self.capability().0 >= 7
    }

    /// Paired half arithmetic at twice the fp32 rate, before integer tensor cores did better.
    pub const fn has_half2(self) -> bool {
        matches!(self, Self::Sm60 | Self::Sm70)
    }

    /// int8 tensor cores (`mma.m8n8k16`), which start at 7.5, with today's of fp16 (`mma.m16n8k8`).
    pub const fn has_int8_mma(self) -> bool {
        self.capability().0 > 7 || matches!(self, Self::Sm75)
    }

    /// Bytes of shared memory that one block may take without asking for more.
    pub const fn static_shared_bytes(self) -> usize {
        48 << 10
    }

    /// The lowest PTX version under which the kernels of this architecture assemble: a driver takes
    /// no newer one than its own. 7.4 brought loads that pass by the first cache, 7.8 the newest
    /// architectures; drivers of CUDA 11.4 and 11.8 know them.
    pub const fn ptx_version(self) -> &'static str {
        match self {
            Self::Sm89 | Self::Sm90 => "7.8",
            _ => "7.4",
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Arch {
    type Err = CudaError;

    fn from_str(name: &str) -> Result<Self, CudaError> {
        Self::ALL
            .into_iter()
            .find(|arch| arch.name() == name)
            .ok_or_else(|| CudaError::UnknownArch {
                name: name.to_owned(),
                known: Self::ALL.map(Self::name).join(", "),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_get_the_newest_code_they_run() {
        let cases = [
            ((5, 2), None),
            ((6, 0), Some(Arch::Sm60)),
            ((6, 1), Some(Arch::Sm61)),
            ((6, 2), Some(Arch::Sm61)),
            ((7, 2), Some(Arch::Sm70)),
            ((7, 5), Some(Arch::Sm75)),
            ((8, 7), Some(Arch::Sm86)),
            ((12, 0), Some(Arch::Sm90)),
        ];
        for (capability, expected) in cases {
            assert_eq!(Arch::for_card(capability), expected, "{capability:?}");
        }
        assert!(Arch::Sm86.runs_cubin((8, 9)) && !Arch::Sm61.runs_cubin((9, 0)));
        assert!(!Arch::Sm61.runs_cubin((6, 0)) && Arch::Sm60.runs_cubin((6, 1)));
        for arch in Arch::ALL {
            assert_eq!(arch.name().parse::<Arch>().unwrap(), arch);
        }
        assert!("sm_50".parse::<Arch>().is_err());
    }
}
