//! One to four rows: weights are unpacked in registers and used at once, several panels in
//! flight so that the chains of dependent additions overlap.

use std::marker::PhantomData;

use crate::weights::{PANEL_COLUMNS, UNIT_ROWS};

use super::formats::Format;
use super::lanes::{Kernel, Lanes, unroll};
use super::linear::{Columns, Panels};

/// `columns.out = x * W + bias` for one thread's columns.
pub(crate) struct Gemv<'a, F> {
    pub panels: Panels<'a>,
    /// (rows, stored rows)
    pub x: &'a [f32],
    /// (rows, segments), or empty if no correction is needed.
    pub sums: &'a [f32],
    pub columns: Columns<'a>,
    pub format: PhantomData<F>,
}

impl<F: Format> Kernel for Gemv<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self, lanes: L) {
        match self.columns.out.len() {
            1 => self.sweep::<L, 1>(lanes),
            2 => self.sweep::<L, 2>(lanes),
            3 => self.sweep::<L, 3>(lanes),
            _ => self.sweep::<L, 4>(lanes),
        }
    }
}

/// Panels that one pass takes together.
const fn streams<L: Lanes>(rows: usize) -> usize {
    if rows <= 2 {
        L::STREAMS.0
    } else {
        L::STREAMS.1
    }
}

impl<F: Format> Gemv<'_, F> {
    #[inline(always)]
    fn sweep<L: Lanes, const R: usize>(&mut self, lanes: L) {
        let panels = self.columns.out[0].len().div_ceil(PANEL_COLUMNS);
        let mut panel = 0;
        while panel < panels {
            let left = panels - panel;
            if const { streams::<L>(R) >= 4 } && left >= 4 {
                self.pass::<L, R, 4>(lanes, panel);
                panel += 4;
            } else if const { streams::<L>(R) == 2 } && left >= 2 {
                self.pass::<L, R, 2>(lanes, panel);
                panel += 2;
            } else {
                self.pass::<L, R, 1>(lanes, panel);
                panel += 1;
            }
        }
    }

    /// `P` panels from the thread's panel `first` on, all rows of K.
    #[inline(always)]
    fn pass<L: Lanes, const R: usize, const P: usize>(&mut self, lanes: L, first: usize) {
        let panels = &self.panels;
        let segments = &panels.weights.rows.segments[..];
        let per_panel = panels.units_per_panel;
        let all = F::units(panels.storage);
        let absolute = self.columns.first_panel + first;
        let mut units: [&[F::Unit]; P] = [&[]; P];
        for (p, units) in units.iter_mut().enumerate() {
            *units = &all[(absolute + p) * per_panel..][..per_panel];
        }
        let mut x: [&[[f32; 8]]; R] = [&[]; R];
        for (r, x) in x.iter_mut().enumerate() {
            *x = &self.x.as_chunks().0[r * per_panel..][..per_panel];
        }

        let mut total = [[lanes.zero(); P]; R];
        for (index, segment) in segments.iter().enumerate() {
            let mut acc = [[lanes.zero(); P]; R];
            for unit in segment.first_unit..segment.first_unit + segment.units {
                unroll!(p < P, {
                    let w = F::unpack(lanes, &units[p][unit]);
                    unroll!(i < UNIT_ROWS, {
                        unroll!(r < R, {
                            let x = lanes.splat(x[r][unit][i]);
                            acc[r][p] = lanes.mul_add(x, w[i], acc[r][p]);
                        });
                    });
                });
            }
            unroll!(p < P, {
                let fold = panels.fold(lanes, absolute + p, segment.run);
                unroll!(r < R, {
                    let sum = self
                        .sums
                        .get(r * segments.len() + index)
                        .copied()
                        .unwrap_or(0.0);
                    total[r][p] = fold.apply(lanes, acc[r][p], sum, total[r][p]);
                });
            });
        }

        unroll!(r < R, {
            let out = &mut self.columns.out[r];
            unroll!(p < P, {
                let start = (first + p) * PANEL_COLUMNS;
                let end = (start + PANEL_COLUMNS).min(out.len());
                panels.finish(lanes, absolute + p, total[r][p], &mut out[start..end]);
            });
        });
    }
}
