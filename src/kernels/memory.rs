//! Memory for weights, which are read from end to end for every token, and scratch memory for products.

use std::cell::Cell;
use std::thread::LocalKey;

/// Memory that a thread keeps from one call to the next: returning it to the system and taking it again would cost more
/// than filling it.
pub(crate) type Scratch<T> = Cell<Vec<T>>;

/// Calls `f` with `count` values of unspecified content.
pub(crate) fn with_scratch<T: Copy + Default, R>(
    scratch: &'static LocalKey<Scratch<T>>,
    count: usize,
    f: impl FnOnce(&mut [T]) -> R,
) -> R {
    let mut values = scratch.take();
    if values.len() < count {
        values.resize(count, T::default());
    }
    let result = f(&mut values[..count]);
    scratch.set(values);
    result
}

/// Whether the allocator can give `bytes` bytes now.
pub(crate) fn fits(bytes: usize) -> bool {
    Vec::<u8>::new().try_reserve_exact(bytes).is_ok()
}

/// `vec![value; count]`, backed by huge pages where available (fewer TLB misses).
pub(crate) fn filled<T: Copy>(count: usize, value: T) -> Vec<T> {
    let mut values = Vec::with_capacity(count);
    // before it is written to, which is when it gets its pages
    advise(values.as_mut_ptr(), values.capacity());
    values.resize(count, value);
    values
}

/// Asks Linux for huge pages. It may not have any, or not be willing.
#[cfg(target_os = "linux")]
fn advise<T>(start: *mut T, count: usize) {
    const HUGE: usize = 2 << 20;
    // SAFETY: it changes nothing
    let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(HUGE).max(1);
    let end = start.wrapping_add(count).addr();
    let offset = start.addr().next_multiple_of(page) - start.addr();
    let first: *mut libc::c_void = start.wrapping_byte_add(offset).cast();
    if let Some(bytes) = end.checked_sub(first.addr())
        && bytes >= HUGE
    {
        // SAFETY: the advice does not change what the memory holds
        unsafe { libc::madvise(first, bytes, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn advise<T>(_start: *mut T, _count: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_of_a_value() {
        for count in [0, 1, 1000, 3_000_000] {
            let values = filled(count, [1.5f32; 2]);
            assert_eq!((values.len(), values.iter().all(|value| *value == [1.5; 2])), (count, true));
        }
        assert_eq!(filled(3, ()).len(), 3);
    }

    #[test]
    fn scratch_may_be_wanted_while_it_is_in_use() {
        thread_local! {
            static SCRATCH: Scratch<u8> = const { Scratch::new(Vec::new()) };
        }
        for count in [3, 5, 2, 0] {
            with_scratch(&SCRATCH, count, |outer| {
                outer.fill(7);
                with_scratch(&SCRATCH, 9, |inner| inner.fill(8));
                assert_eq!(outer, vec![7; count]);
            });
        }
    }
}
