//! How a unit of 8 rows x 16 columns becomes 8 vectors, for every weight format.

use crate::weights::Storage;

use super::lanes::Lanes;

/// A weight format, at compile time.
pub(crate) trait Format {
    /// One unit of one panel.
    type Unit;

    /// All units, `[panel][unit]`; empty if the storage is of another kind.
    fn units(storage: &Storage) -> &[Self::Unit];

    /// The 8 rows of a unit as f32, less the code centre.
    fn unpack<L: Lanes>(lanes: L, unit: &Self::Unit) -> [L::F; 8];
}

fn words<const N: usize>(storage: &Storage) -> &[[u32; N]] {
    match storage {
        Storage::Words(words) => words.as_chunks().0,
        Storage::Halves(_) => &[],
    }
}

fn halves<const N: usize>(storage: &Storage) -> &[[u16; N]] {
    match storage {
        Storage::Words(_) => &[],
        Storage::Halves(halves) => halves.as_chunks().0,
    }
}

macro_rules! format {
    ($(#[$doc:meta])* $name:ident, $unit:ty, $units:ident, |$lanes:ident, $x:ident| $unpack:expr) => {
        $(#[$doc])*
        pub(crate) struct $name;

        impl Format for $name {
            type Unit = $unit;

            fn units(storage: &Storage) -> &[Self::Unit] {
                $units(storage)
            }

            #[inline(always)]
            fn unpack<L: Lanes>($lanes: L, $x: &Self::Unit) -> [L::F; 8] {
                $unpack
            }
        }
    };
}

format!(
    /// 2-bit codes.
    Int2, [u16; 16], halves, |lanes, unit| lanes.unpack2(unit)
);
format!(
    /// 3-bit codes.
    Int3, [u16; 24], halves, |lanes, unit| lanes.unpack3(unit)
);
format!(
    /// 4-bit codes.
    Int4, [u32; 16], words, |lanes, unit| lanes.unpack4(unit)
);
format!(
    /// 8-bit codes.
    Int8, [u32; 32], words, |lanes, unit| lanes.unpack8(unit)
);
format!(
    /// f32 numbers.
    F32, [u32; 128], words, |lanes, unit| rows(lanes, unit, L::load_bits)
);
format!(
    /// f16 numbers.
    F16, [u16; 128], halves, |lanes, unit| rows(lanes, unit, L::widen_f16)
);
format!(
    /// bf16 numbers.
    Bf16, [u16; 128], halves, |lanes, unit| rows(lanes, unit, L::widen_bf16)
);

#[inline(always)]
fn rows<L: Lanes, T>(lanes: L, unit: &[T; 128], load: impl Fn(L, &[T; 16]) -> L::F) -> [L::F; 8] {
    let mut out = [lanes.zero(); 8];
    for (out, row) in out.iter_mut().zip(unit.as_chunks::<16>().0) {
        *out = load(lanes, row);
    }
    out
}
