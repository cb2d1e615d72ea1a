//! Heap memory that starts on a cache line, so that a 64-byte load never straddles two.

const LINE_BYTES: usize = 64;

/// A zero-initialised slice of plain numbers whose first element is 64-byte aligned.
///
/// Plain `Vec` storage with the start moved forward: fresh zero pages from the operating system
/// stay untouched until they are written, and no `unsafe` is needed.
#[derive(Debug, Default)]
pub(crate) struct Aligned<T> {
    data: Vec<T>,
    start: usize,
    len: usize,
}

impl<T: Copy + Default> Aligned<T> {
    pub(crate) fn zeroed(len: usize) -> Self {
        if len == 0 {
            return Self {
                data: Vec::new(),
                start: 0,
                len: 0,
            };
        }
        let data = vec![T::default(); len + Self::slack()];
        let start = match data.as_ptr().align_offset(LINE_BYTES) {
            offset if offset <= Self::slack() => offset,
            _ => 0,
        };
        Self { data, start, len }
    }

    /// Makes the buffer at least `len` long; the contents are unspecified afterwards.
    pub(crate) fn reserve(&mut self, len: usize) {
        if self.len < len {
            *self = Self::zeroed(len);
        }
    }

    /// Elements kept in reserve for moving the start.
    const fn slack() -> usize {
        LINE_BYTES / size_of::<T>() - 1
    }

    /// Heap bytes of a buffer of `len` elements.
    pub(crate) const fn heap_bytes(len: usize) -> u64 {
        if len == 0 {
            0
        } else {
            ((len + Self::slack()) * size_of::<T>()) as u64
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        Self::heap_bytes(self.len)
    }
}

impl<T> std::ops::Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.data[self.start..self.start + self.len]
    }
}

impl<T> std::ops::DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.data[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_on_a_cache_line_whatever_the_element() {
        for len in [1, 7, 4096, 1_000_003] {
            assert_eq!(Aligned::<u32>::zeroed(len).as_ptr().addr() % 64, 0);
            assert_eq!(Aligned::<u16>::zeroed(len).as_ptr().addr() % 64, 0);
            assert_eq!(Aligned::<f32>::zeroed(len).len(), len);
        }
        assert!(Aligned::<f32>::zeroed(0).is_empty());
    }
}
