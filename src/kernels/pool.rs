//! The thread pool: one thread per core, including the caller.
//!
//! A job is a number of chunks. Each thread has a share of consecutive chunks, so the data it
//! prefetches beyond its current chunk belongs to its next one. A thread that has finished its
//! share takes chunks from the ends of the others' shares. The caller waits for chunks to be
//! *done*, not for threads to arrive: if another process keeps a worker off its core, only the
//! chunk of that worker is delayed. Idle workers spin briefly (the next job of a step comes within
//! microseconds), then sleep.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Bits of a share for its first unclaimed chunk, and for its end.
const CHUNK_BITS: u32 = 20;
const CHUNK_MASK: u64 = (1 << CHUNK_BITS) - 1;
/// Number of checks for a new job before a worker sleeps: about 50 µs.
const SPINS: u32 = 4_000;
/// Most bytes that a thread prefetches: half of a core's L2 cache, on CPUs with a small one.
const AHEAD: usize = 192 << 10;
/// Bytes prefetched per step.
const ASKED: usize = 512;

/// Puts data that the workers write on other cache lines than data that the caller polls.
#[repr(align(128))]
#[derive(Default)]
struct Line<T>(T);

struct Shared {
    /// Number of the current job.
    epoch: Line<AtomicU64>,
    /// The share of each thread, the caller's first: epoch, first unclaimed chunk, end.
    shares: Vec<Line<AtomicU64>>,
    /// Number of finished chunks of the job.
    done: Line<AtomicUsize>,
    /// Written between jobs, read by threads that have claimed a chunk of the current job.
    job: UnsafeCell<Job>,
    panicked: AtomicBool,
    stop: AtomicBool,
    /// Address and length of the data that idle threads prefetch.
    prefetch_next: Line<[AtomicUsize; 2]>,
    sleepers: AtomicUsize,
    bed: Mutex<()>,
    bell: Condvar,
}

#[derive(Clone, Copy)]
struct Job {
    data: *const (),
    /// # Safety
    /// `data` must still point to the closure that this was created for.
    call: unsafe fn(*const (), usize),
}

// SAFETY: `job` is written only by the caller (`Pool::run` takes `&mut self`) while no chunk is
// unfinished, and read only by threads that hold an unfinished chunk; the closure behind it is
// `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer is used only while `Pool::run` borrows the closure.
unsafe impl Send for Shared {}

/// Threads that execute the chunks of one job at a time.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    epoch: u64,
    asked: Asked,
}

impl Pool {
    /// Creates a pool of `threads` threads, including the caller's own.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            epoch: Line::default(),
            shares: (0..threads.max(1)).map(|_| Line::default()).collect(),
            done: Line::default(),
            job: UnsafeCell::new(Job { data: std::ptr::null(), call: |_, _| {} }),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            prefetch_next: Line::default(),
            sleepers: AtomicUsize::new(0),
            bed: Mutex::new(()),
            bell: Condvar::new(),
        });
        let mut pool = Self { shared, workers: Vec::new(), epoch: 0, asked: Asked::default() };
        for number in 1..threads {
            let shared = pool.shared.clone();
            let name = format!("kernel-{number}");
            pool.workers
                .push(std::thread::Builder::new().name(name).spawn(move || work(&shared, number))?);
        }
        Ok(pool)
    }

    /// Announces the data that the job after the next one reads first (or the next one, if the
    /// caller has other work before it): idle threads prefetch the beginnings of their shares of
    /// it. A job for one token is limited by memory bandwidth, which is otherwise unused while
    /// threads wait for each other.
    pub fn prefetch_next(&self, bytes: &[u8]) {
        let [from, len] = &self.shared.prefetch_next.0;
        // A thread may see only one of the two new values; prefetching any address is harmless.
        from.store(bytes.as_ptr().addr(), Ordering::Relaxed);
        len.store(bytes.len(), Ordering::Relaxed);
    }

    /// Number of threads, including the caller's.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `chunk` once for each number below `chunks`, on all threads; returns when all chunks
    /// are done.
    ///
    /// # Panics
    /// If a chunk panics.
    pub fn run<F: Fn(usize) + Sync>(&mut self, chunks: usize, chunk: F) {
        if self.workers.is_empty() || chunks <= 1 {
            (0..chunks).for_each(chunk);
            return;
        }
        assert!(chunks as u64 <= CHUNK_MASK, "{chunks} chunks are too many");
        /// # Safety
        /// `data` must point to a live `F`.
        unsafe fn call<F: Fn(usize)>(data: *const (), index: usize) {
            // SAFETY: guaranteed by the caller.
            unsafe { (*data.cast::<F>())(index) }
        }
        let shared = &*self.shared;
        // SAFETY: all chunks of the previous job are done, and none of this job has been published.
        unsafe { *shared.job.get() = Job { data: (&raw const chunk).cast(), call: call::<F> } };
        shared.done.0.store(0, Ordering::Relaxed);
        self.epoch += 1;
        let threads = self.threads();
        for (thread, share) in shared.shares.iter().enumerate() {
            let [first, end] =
                [thread, thread + 1].map(|thread| (thread * chunks / threads) as u64);
            let share_of_job = (self.epoch << CHUNK_BITS | first) << CHUNK_BITS | end;
            share.0.store(share_of_job, Ordering::Release);
        }
        shared.epoch.0.store(self.epoch, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            drop(shared.bed.lock().unwrap_or_else(PoisonError::into_inner));
            shared.bell.notify_all();
        }
        while shared.do_one(0) {}
        let mut looks = 0u32;
        while shared.done.0.load(Ordering::Acquire) < chunks {
            looks += 1;
            // A worker that has lost its core may need this one.
            if looks.is_multiple_of(SPINS) {
                std::thread::yield_now()
            } else {
                shared.pass_time(0, &mut self.asked)
            }
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
    /// Prefetches the announced data on an idle thread.
    fn pass_time(&self, thread: usize, asked: &mut Asked) {
        let [from, len] = self.prefetch_next.0.each_ref().map(|x| x.load(Ordering::Relaxed));
        if asked.from != from {
            let [at, end] = [thread, thread + 1].map(|t| from + len / self.shares.len() * t);
            *asked = Asked { from, at, end: end.min(at + AHEAD) };
        }
        if asked.at >= asked.end {
            std::hint::spin_loop();
            return;
        }
        #[cfg(target_arch = "x86_64")]
        for line in (asked.at..asked.at + ASKED).step_by(64) {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            // SAFETY: a prefetch is a hint: it reads nothing at any address.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::without_provenance(line)) };
        }
        asked.at += ASKED;
    }

    /// Claims a chunk: the first of the thread's own share, or the last of another's.
    fn claim(&self, thread: usize) -> Option<usize> {
        let threads = self.shares.len();
        (0..threads).find_map(|other| {
            let share = &self.shares[(thread + other) % threads].0;
            let one =
                if other == 0 { |share| share + (1 << CHUNK_BITS) } else { |share| share - 1 };
            let part = |share: u64| (share >> CHUNK_BITS & CHUNK_MASK, share & CHUNK_MASK);
            let less = |share| {
                let (first, end) = part(share);
                (first < end).then(|| one(share))
            };
            let before = share.fetch_update(Ordering::AcqRel, Ordering::Acquire, less).ok()?;
            let (first, end) = part(before);
            Some(if other == 0 { first } else { end - 1 } as usize)
        })
    }

    /// Claims and executes a chunk. Returns false if none is left.
    fn do_one(&self, thread: usize) -> bool {
        let Some(index) = self.claim(thread) else { return false };
        // SAFETY: this thread holds an unfinished chunk of the current job, so the job does not
        // change, and the closure behind it stays alive, until `done` is incremented.
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

/// The state of a thread's prefetching.
#[derive(Default)]
struct Asked {
    /// Start address of the announced data.
    from: usize,
    at: usize,
    end: usize,
}

fn work(shared: &Shared, thread: usize) {
    let (mut idle, mut seen, mut asked) = (0, 0, Asked::default());
    while !shared.stop.load(Ordering::Relaxed) {
        let epoch = shared.epoch.0.load(Ordering::Acquire);
        if epoch != seen {
            while shared.do_one(thread) {}
            (idle, seen) = (0, epoch);
            continue;
        }
        idle += 1;
        if idle < SPINS {
            shared.pass_time(thread, &mut asked);
            continue;
        }
        idle = 0;
        let mut bed = shared.bed.lock().unwrap_or_else(PoisonError::into_inner);
        shared.sleepers.fetch_add(1, Ordering::SeqCst);
        while shared.epoch.0.load(Ordering::SeqCst) == seen && !shared.stop.load(Ordering::SeqCst) {
            bed = shared.bell.wait(bed).unwrap_or_else(PoisonError::into_inner);
        }
        shared.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A slice whose disjoint parts are written by the chunks of a job.
#[derive(Clone, Copy)]
pub struct Disjoint<T> {
    data: *mut T,
    len: usize,
}

// SAFETY: parts are handed out by `part`, whose callers guarantee that they do not overlap.
unsafe impl<T: Send> Sync for Disjoint<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Disjoint<T> {}

impl<T> Disjoint<T> {
    pub fn new(slice: &mut [T]) -> Self {
        Self { data: slice.as_mut_ptr(), len: slice.len() }
    }

    /// A pointer to `len` elements from `from` on; other threads may write elements in that range
    /// that the caller does not.
    pub fn span(&self, from: usize, len: usize) -> *mut T {
        assert!(from.checked_add(len).is_some_and(|end| end <= self.len), "the span is inside");
        // SAFETY: the pointer is within the slice.
        unsafe { self.data.add(from) }
    }

    /// # Safety
    /// The slice that this was created from must still be borrowed, and parts in use at the same
    /// time must not overlap.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part<'a>(&self, from: usize, len: usize) -> &'a mut [T] {
        // SAFETY: within the slice; the caller guarantees that it is not aliased.
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
