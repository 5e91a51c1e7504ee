//! Allocator that counts the allocations of a thread, only in the library's test binary.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

thread_local! {
    /// Bytes allocated minus bytes freed by this thread; negative if it freed memory of other
    /// threads.
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

/// Counts before the allocation, so that a refused allocation counts as well.
fn note(bytes: isize) {
    let live = LIVE.get() + bytes;
    LIVE.set(live);
    PEAK.set(PEAK.get().max(live));
}

// SAFETY: every call is forwarded to the system's allocator; the counters are plain cells, whose
// access does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size() as isize);
        // SAFETY: the caller upholds the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size() as isize);
        // SAFETY: the caller upholds the contract of `alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        note(-(layout.size() as isize));
        // SAFETY: the caller upholds the contract of `dealloc`.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // The old and the new block may exist at the same time.
        note(size as isize);
        note(-(layout.size() as isize));
        // SAFETY: the caller upholds the contract of `realloc`.
        unsafe { System.realloc(place, layout, size) }
    }
}

/// The result of `work`, and the peak of bytes that this thread had allocated during it, in excess
/// of the bytes allocated before.
pub(super) fn peak<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = LIVE.get();
    PEAK.set(before);
    let result = work();
    (result, (PEAK.get() - before).max(0) as usize)
}

#[test]
fn allocations_are_seen() {
    let (_, none) = peak(|| 1 + 1);
    let (kept, some) = peak(|| {
        drop(vec![1u8; 5000]);
        let mut grown = vec![0u8; 3000];
        grown.reserve_exact(4000);
        grown
    });
    assert_eq!((none, kept.capacity()), (0, 7000));
    assert_eq!(some, 10_000, "old and new place of the grown one");
}
