//! The thread pool: one worker per core, the caller among them.
//!
//! A job is a number of chunks. Workers claim chunks one at a time, and the caller waits for chunks
//! that are *done*, not for threads that arrived: a worker that another process keeps off its core
//! holds up the chunk in its hands, and nothing else. Idle workers spin briefly (the next job of a
//! step comes within microseconds), then sleep.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Bits of a ticket for the chunk to be claimed next, and for the number of chunks.
const CHUNK_BITS: u32 = 20;
const CHUNK_MASK: u64 = (1 << CHUNK_BITS) - 1;
/// Looks at the ticket before a worker goes to sleep: about 50 µs.
const SPINS: u32 = 4_000;
/// Bytes asked for ahead, at most: half of a core's second cache, on what has little of it.
const AHEAD: usize = 192 << 10;
/// Bytes asked for at once.
const ASKED: usize = 512;

/// Keeps what the workers write apart from what the caller polls.
#[repr(align(128))]
#[derive(Default)]
struct Line<T>(T);

struct Shared {
    /// Epoch, chunks of the job, next chunk.
    ticket: Line<AtomicU64>,
    /// Chunks of the job that are finished.
    done: Line<AtomicUsize>,
    /// Written between jobs, read by whoever has claimed a chunk of the current one.
    job: UnsafeCell<Job>,
    panicked: AtomicBool,
    stop: AtomicBool,
    /// Addresses that idle threads ask memory for: the next one, and the end.
    ahead: Line<AtomicUsize>,
    ahead_end: AtomicUsize,
    sleepers: AtomicUsize,
    bed: Mutex<()>,
    bell: Condvar,
}

#[derive(Clone, Copy)]
struct Job {
    data: *const (),
    /// # Safety
    /// `data` still points to the closure that this was made for.
    call: unsafe fn(*const (), usize),
}

// SAFETY: `job` is written by the one caller (`Pool::run` takes `&mut self`) while no chunk is
// unfinished, and read only by threads that hold an unfinished chunk; the closure behind it is
// `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer is used only while `Pool::run` borrows what it points to.
unsafe impl Send for Shared {}

/// Threads that share the chunks of one job at a time.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    epoch: u64,
}

impl Pool {
    /// `threads` in all, the caller's own among them.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            ticket: Line::default(),
            done: Line::default(),
            job: UnsafeCell::new(Job { data: std::ptr::null(), call: |_, _| {} }),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            ahead: Line::default(),
            ahead_end: AtomicUsize::new(0),
            sleepers: AtomicUsize::new(0),
            bed: Mutex::new(()),
            bell: Condvar::new(),
        });
        let mut pool = Self { shared, workers: Vec::new(), epoch: 0 };
        for number in 1..threads {
            let shared = pool.shared.clone();
            let name = format!("kernel-{number}");
            pool.workers.push(std::thread::Builder::new().name(name).spawn(move || work(&shared))?);
        }
        Ok(pool)
    }

    /// What the job after the next one reads first, or the next one, if the caller has something of
    /// its own to do before: idle threads ask memory for the beginning of it. A job for one token
    /// waits for memory, which has nothing to do while threads wait for each other.
    pub fn ahead(&self, bytes: &[u8]) {
        let from = bytes.as_ptr().addr();
        let shared = &*self.shared;
        // Somebody may see one address of before and one of now; asking for anything is harmless.
        shared.ahead_end.store(0, Ordering::Relaxed);
        shared.ahead.0.store(from, Ordering::Relaxed);
        shared.ahead_end.store(from + bytes.len().min(AHEAD), Ordering::Relaxed);
    }

    /// Threads, the caller's among them.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `chunk` once for each number below `chunks`, on all threads; returns when all are
    /// done.
    ///
    /// # Panics
    /// If a chunk does.
    pub fn run<F: Fn(usize) + Sync>(&mut self, chunks: usize, chunk: F) {
        if self.workers.is_empty() || chunks <= 1 {
            (0..chunks).for_each(chunk);
            return;
        }
        assert!(chunks as u64 <= CHUNK_MASK, "{chunks} chunks are too many");
        /// # Safety
        /// `data` points to a live `F`.
        unsafe fn call<F: Fn(usize)>(data: *const (), index: usize) {
            // SAFETY: the caller's promise.
            unsafe { (*data.cast::<F>())(index) }
        }
        let shared = &*self.shared;
        // SAFETY: all chunks of the job before are done, and none of this one is published.
        unsafe { *shared.job.get() = Job { data: (&raw const chunk).cast(), call: call::<F> } };
        shared.done.0.store(0, Ordering::Relaxed);
        self.epoch += 1;
        let ticket = (self.epoch << (2 * CHUNK_BITS)) | ((chunks as u64) << CHUNK_BITS);
        shared.ticket.0.store(ticket, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            drop(shared.bed.lock().unwrap_or_else(PoisonError::into_inner));
            shared.bell.notify_all();
        }
        while shared.do_one() {}
        let mut looks = 0u32;
        while shared.done.0.load(Ordering::Acquire) < chunks {
            looks += 1;
            // A worker that has lost its core may need this one.
            if looks.is_multiple_of(SPINS) { std::thread::yield_now() } else { shared.pass_time() }
        }
        assert!(!shared.panicked.load(Ordering::Relaxed), "a chunk of a job panicked");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(self.shared.bed.lock().unwrap_or_else(PoisonError::into_inner));
        self.shared.bell.notify_all();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// What a thread does that has nothing to do.
    fn pass_time(&self) {
        let end = self.ahead_end.load(Ordering::Relaxed);
        if self.ahead.0.load(Ordering::Relaxed) >= end {
            std::hint::spin_loop();
            return;
        }
        let from = self.ahead.0.fetch_add(ASKED, Ordering::Relaxed);
        #[cfg(target_arch = "x86_64")]
        for line in (from..from + ASKED).step_by(64) {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            // SAFETY: a hint; whatever the address, nothing is read.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::without_provenance(line)) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = from;
    }

    fn has_work(&self) -> bool {
        let ticket = self.ticket.0.load(Ordering::SeqCst);
        ticket & CHUNK_MASK < (ticket >> CHUNK_BITS) & CHUNK_MASK
    }

    /// Claims a chunk and does it. False when none is left.
    fn do_one(&self) -> bool {
        let claimed = self.ticket.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, |ticket| {
            let (next, chunks) = (ticket & CHUNK_MASK, (ticket >> CHUNK_BITS) & CHUNK_MASK);
            (next < chunks).then_some(ticket + 1)
        });
        let Ok(ticket) = claimed else { return false };
        let index = (ticket & CHUNK_MASK) as usize;
        // SAFETY: a chunk of the current job is ours and unfinished, so the job stays what it is,
        // and the closure behind it alive, until `done` is raised.
        let ran = catch_unwind(AssertUnwindSafe(|| unsafe {
            let job = *self.job.get();
            (job.call)(job.data, index);
        }));
        if ran.is_err() {
            self.panicked.store(true, Ordering::Relaxed);
        }
        self.done.0.fetch_add(1, Ordering::Release);
        true
    }
}

fn work(shared: &Shared) {
    let mut idle = 0;
    while !shared.stop.load(Ordering::Relaxed) {
        if shared.do_one() {
            idle = 0;
            continue;
        }
        idle += 1;
        if idle < SPINS {
            shared.pass_time();
            continue;
        }
        idle = 0;
        let mut bed = shared.bed.lock().unwrap_or_else(PoisonError::into_inner);
        shared.sleepers.fetch_add(1, Ordering::SeqCst);
        while !shared.has_work() && !shared.stop.load(Ordering::SeqCst) {
            bed = shared.bell.wait(bed).unwrap_or_else(PoisonError::into_inner);
        }
        shared.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A slice that chunks of a job write disjoint parts of.
#[derive(Clone, Copy)]
pub struct Disjoint<T> {
    data: *mut T,
    len: usize,
}

// SAFETY: parts are handed out by `part`, whose callers promise that they do not overlap.
unsafe impl<T: Send> Sync for Disjoint<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Disjoint<T> {}

impl<T> Disjoint<T> {
    pub fn new(slice: &mut [T]) -> Self {
        Self { data: slice.as_mut_ptr(), len: slice.len() }
    }

    /// Where `len` elements from `from` on are; others may write between those that the caller does.
    pub fn span(&self, from: usize, len: usize) -> *mut T {
        assert!(from.checked_add(len).is_some_and(|end| end <= self.len), "the span is inside");
        // SAFETY: within the slice.
        unsafe { self.data.add(from) }
    }

    /// # Safety
    /// The slice that this was made of is still borrowed, and parts in use at the same time do not
    /// overlap.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part<'a>(&self, from: usize, len: usize) -> &'a mut [T] {
        // SAFETY: within the slice; not aliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.span(from, len), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn every_chunk_is_done_once() {
        for threads in [1, 2, 5] {
            let mut pool = Pool::new(threads).unwrap();
            for chunks in (0..200).chain([5_000]) {
                let counts: Vec<_> = (0..chunks).map(|_| AtomicU32::new(0)).collect();
                pool.run(chunks, |chunk| {
                    counts[chunk].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn workers_wake_after_sleep() {
        let mut pool = Pool::new(3).unwrap();
        for _ in 0..5 {
            std::thread::sleep(std::time::Duration::from_millis(20));
            let sum = AtomicU32::new(0);
            pool.run(100, |chunk| {
                sum.fetch_add(chunk as u32, Ordering::Relaxed);
            });
            assert_eq!(sum.load(Ordering::Relaxed), 4950);
        }
    }

    #[test]
    #[should_panic = "a chunk of a job panicked"]
    fn a_panic_comes_back_to_the_caller() {
        let mut pool = Pool::new(2).unwrap();
        pool.run(64, |chunk| assert!(chunk != 40));
    }
}
