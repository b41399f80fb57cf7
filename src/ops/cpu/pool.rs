//! Fork-join threads with a start-up cost of about a microsecond.
//!
//! The calling thread works too, so a pool of one thread runs everything inline. Workers that
//! find nothing to do spin for [`SPIN`] and then park: inside a step the next operation finds
//! them awake, between steps they leave the cores to others. A worker that wakes too late
//! finds the job closed and is not waited for. A worker that was put on the caller's core, because
//! others are busy, does not spin there: it would keep the caller from the job that it waits for.
//! Asleep, it is put on an idle core by the next job, if there is one.
//!
//! Every thread begins with its own stretch of the tasks, the same whenever the same job comes
//! again: what lies in its caches is what it reads next, and weights are read in their order.
//! Whoever is done takes tasks from the ends of the others' stretches.

use std::any::Any;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use super::topology::{self, Place};

/// How long a thread waits awake. Longer than the gap between two operations of a step,
/// shorter than anything a neighbour on the same core would notice.
const SPIN: Duration = Duration::from_micros(30);

/// Where the system does not tell.
const UNKNOWN_CORE: i32 = -1;

/// Job states: bit 0 says open, the next 15 bits count the workers inside, the rest numbers
/// the job.
const OPEN: usize = 1;
const WORKER: usize = 2;
const NUMBER: usize = 1 << 16;

/// A fixed set of threads.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    // Held while a job runs: one job at a time.
    turn: Mutex<()>,
}

/// What a job is: a function of the thread's index and the task's index.
type Task<'a> = dyn Fn(usize, usize) + Sync + 'a;

struct Job {
    task: *const Task<'static>,
    num_tasks: usize,
    caller: Thread,
}

struct Shared {
    state: AtomicUsize,
    // Written only while the state is closed and no worker is inside.
    job: UnsafeCell<Option<Job>>,
    // Tasks that somebody has set out to take.
    claimed: AtomicUsize,
    stretches: Vec<Stretch>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    asleep: Vec<AtomicBool>,
    /// The core on which the last job began.
    caller_core: AtomicI32,
    stop: AtomicBool,
}

// SAFETY: `job` is written by the caller that holds the turn while no worker is inside, and
// read by workers between entering and leaving; the state's atomic updates order the two.
unsafe impl Sync for Shared {}
// SAFETY: as above; the task behind the pointer is Sync.
unsafe impl Send for Shared {}

impl Pool {
    /// A pool of `threads` threads, the caller among them. A worker stays in its place if it
    /// has one and the system agrees. Fails when the system has no more threads.
    pub fn new(threads: usize, places: Vec<Place>) -> std::io::Result<Pool> {
        let num_workers = threads.max(1) - 1;
        let shared = Arc::new(Shared {
            state: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            claimed: AtomicUsize::new(0),
            stretches: (0..=num_workers).map(|_| Stretch::default()).collect(),
            panic: Mutex::new(None),
            asleep: (0..num_workers).map(|_| AtomicBool::new(false)).collect(),
            caller_core: AtomicI32::new(UNKNOWN_CORE),
            stop: AtomicBool::new(false),
        });
        let mut pool = Pool { shared, workers: Vec::new(), turn: Mutex::new(()) };
        let mut places = places.into_iter();
        for index in 0..num_workers {
            let (shared, place) = (Arc::clone(&pool.shared), places.next());
            let thread = std::thread::Builder::new().name(format!("compute-{}", index + 1));
            let life = move || {
                place.iter().for_each(stay);
                work(&shared, index);
            };
            pool.workers.push(thread.spawn(life)?);
        }
        Ok(pool)
    }

    /// Number of threads, the caller among them.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(thread, i)` once for every `i` below `num_tasks`, in any order on all
    /// threads, and returns when all calls have; `thread` is below [`Pool::threads`].
    /// A panic in a task is raised again here. Tasks must not call `run` themselves.
    pub fn run(&self, num_tasks: usize, task: impl Fn(usize, usize) + Sync) {
        if num_tasks <= 1 || self.workers.is_empty() {
            return (0..num_tasks).for_each(|i| task(0, i));
        }
        let _turn = lock(&self.turn);
        let shared = &*self.shared;
        let task: &Task<'_> = &task;
        // SAFETY: only the lifetime changes; nobody holds the pointer once `run` returns,
        // because it waits until every worker that entered has left.
        let erased = unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task) };
        let job = Job { task: erased, num_tasks, caller: std::thread::current() };
        // SAFETY: this thread has the turn, the state is closed and no worker is inside.
        unsafe { *shared.job.get() = Some(job) };
        shared.deal(num_tasks);
        shared.caller_core.store(own_core(), Ordering::Relaxed);
        let number = (shared.state.load(Ordering::Relaxed) / NUMBER).wrapping_add(1);
        shared.state.store(number.wrapping_mul(NUMBER) | OPEN, Ordering::SeqCst);
        for (asleep, worker) in shared.asleep.iter().zip(&self.workers) {
            if asleep.swap(false, Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
        shared.run_tasks(task, num_tasks, 0);
        shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        wait_until(|| shared.state.load(Ordering::Acquire).is_multiple_of(NUMBER));
        let panicked = lock(&shared.panic).take();
        if let Some(payload) = panicked {
            resume_unwind(payload);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of its tasks, so there is no result to look at.
            let _ = worker.join();
        }
    }
}

/// The tasks that are left of a thread's own, the first in the lower half of the word and the end in
/// the upper one. On a cache line of its own.
#[derive(Default)]
#[repr(align(128))]
struct Stretch(AtomicU64);

impl Stretch {
    fn set(&self, tasks: Range<usize>) {
        self.0.store((tasks.end as u64) << 32 | tasks.start as u64, Ordering::Relaxed);
    }

    /// Takes the first task, or for another thread the last one.
    fn take(&self, is_own: bool) -> Option<usize> {
        let rest = |word: u64| {
            let (first, end) = (word & u64::from(u32::MAX), word >> 32);
            let (first, end) = if is_own { (first + 1, end) } else { (first, end.wrapping_sub(1)) };
            (word & u64::from(u32::MAX) < word >> 32).then_some(end << 32 | first)
        };
        let word = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, rest).ok()?;
        let (first, end) = (word & u64::from(u32::MAX), word >> 32);
        Some(if is_own { first } else { end - 1 } as usize)
    }
}

impl Shared {
    /// Gives every thread its stretch of a new job; nobody may be inside.
    fn deal(&self, num_tasks: usize) {
        assert!(u32::try_from(num_tasks).is_ok(), "{num_tasks} tasks");
        let threads = self.stretches.len();
        for (i, stretch) in self.stretches.iter().enumerate() {
            stretch.set(num_tasks * i / threads..num_tasks * (i + 1) / threads);
        }
        self.claimed.store(0, Ordering::Relaxed);
    }

    /// The next task of a thread that has claimed one, so that one is left for it somewhere.
    fn take(&self, thread: usize) -> usize {
        let threads = self.stretches.len();
        let in_turn = |i: usize| self.stretches[(thread + i) % threads].take(i == 0);
        loop {
            if let Some(task) = (0..threads).find_map(in_turn) {
                return task;
            }
            std::hint::spin_loop();
        }
    }

    fn run_tasks(&self, task: &Task<'_>, num_tasks: usize, thread: usize) {
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            while self.claimed.fetch_add(1, Ordering::Relaxed) < num_tasks {
                task(thread, self.take(thread));
            }
        }));
        if let Err(payload) = outcome {
            // The others stop at their next task.
            self.claimed.store(usize::MAX / 2, Ordering::Relaxed);
            lock(&self.panic).get_or_insert(payload);
        }
    }

    /// False on the core of the caller, who cannot bring a job while it is taken.
    fn is_worth_spinning(&self, own_core: i32) -> bool {
        own_core == UNKNOWN_CORE || own_core != self.caller_core.load(Ordering::Relaxed)
    }

    /// Enters job `state` unless it was closed or changed meanwhile.
    fn enter(&self, state: usize) -> bool {
        let entered = |state| (state & OPEN != 0).then_some(state + WORKER);
        let number = state / NUMBER;
        let same =
            |current: usize| if current / NUMBER == number { entered(current) } else { None };
        self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, same).is_ok()
    }
}

/// The core that the calling thread is on now.
#[cfg(target_os = "linux")]
fn own_core() -> i32 {
    // SAFETY: takes nothing; its error is -1, which is UNKNOWN_CORE.
    unsafe { libc::sched_getcpu() }
}

#[cfg(not(target_os = "linux"))]
fn own_core() -> i32 {
    UNKNOWN_CORE
}

/// Keeps the calling thread in its place, where it is only faster: a refusal changes nothing.
fn stay(place: &Place) {
    if let Err(error) = topology::keep_to(place) {
        tracing::debug!(?place, %error, "a compute thread runs anywhere");
    }
}

/// A worker's life: wait for a job with a new number, help, leave.
fn work(shared: &Shared, index: usize) {
    let mut last_number = 0;
    loop {
        let is_new = |state: usize| state & OPEN != 0 && state / NUMBER != last_number;
        let mut state = shared.state.load(Ordering::Acquire);
        let idle_since = Instant::now();
        while !is_new(state) {
            if shared.stop.load(Ordering::SeqCst) {
                return;
            }
            if shared.is_worth_spinning(own_core()) && idle_since.elapsed() < SPIN {
                std::hint::spin_loop();
            } else {
                shared.asleep[index].store(true, Ordering::SeqCst);
                let stop = shared.stop.load(Ordering::SeqCst);
                if !stop && !is_new(shared.state.load(Ordering::SeqCst)) {
                    std::thread::park();
                }
                shared.asleep[index].store(false, Ordering::SeqCst);
            }
            state = shared.state.load(Ordering::Acquire);
        }
        last_number = state / NUMBER;
        if shared.enter(state) {
            help(shared, index + 1);
        }
    }
}

/// Works on the job that this thread has entered, then leaves it.
fn help(shared: &Shared, thread: usize) {
    // SAFETY: this thread has entered, so the caller neither writes the job nor returns until
    // it leaves; entering acquired what the caller wrote.
    let job = unsafe { (*shared.job.get()).as_ref().expect("an open job is set") };
    let caller = job.caller.clone();
    // SAFETY: as above; the task lives until the caller returns.
    shared.run_tasks(unsafe { &*job.task }, job.num_tasks, thread);
    // From here on the job may be gone.
    let before = shared.state.fetch_sub(WORKER, Ordering::AcqRel);
    if before % NUMBER == WORKER {
        caller.unpark();
    }
}

/// Waits awake for [`SPIN`], then parked; whoever makes `done` true unparks this thread.
fn wait_until(done: impl Fn() -> bool) {
    let since = Instant::now();
    while !done() {
        if since.elapsed() < SPIN {
            std::hint::spin_loop();
        } else {
            std::thread::park();
        }
    }
}

/// A poisoned lock is as good as any: what it guards is replaced as a whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn every_task_runs_exactly_once() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads, Vec::new()).unwrap();
            for num_tasks in [0, 1, 2, 7, 1000] {
                let calls: Vec<AtomicUsize> = (0..num_tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(num_tasks, |thread, i| {
                    assert!(thread < threads);
                    calls[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(calls.iter().all(|calls| calls.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_thread_works_on_its_own_stretch_until_others_have_nothing_left() {
        let pool = Pool::new(2, Vec::new()).unwrap();
        let takers: Vec<AtomicUsize> = (0..8).map(|_| AtomicUsize::new(usize::MAX)).collect();
        let others = Barrier::new(2);
        // The caller waits in its first task until the worker has had all others.
        pool.run(8, |thread, i| {
            takers[i].store(thread, Ordering::SeqCst);
            let is_last = i == 1;
            if i == 0 || is_last {
                others.wait();
            }
        });
        let takers: Vec<usize> = takers.into_iter().map(AtomicUsize::into_inner).collect();
        assert_eq!(takers[0], 1 - takers[1]);
        assert!(takers[1..].iter().all(|&taker| taker == takers[1]), "{takers:?}");
    }

    #[test]
    fn a_stretch_gives_its_owner_the_first_task_and_others_the_last() {
        let stretch = Stretch::default();
        assert_eq!((stretch.take(true), stretch.take(false)), (None, None));
        stretch.set(3..6);
        assert_eq!(stretch.take(true), Some(3));
        assert_eq!(stretch.take(false), Some(5));
        assert_eq!(stretch.take(false), Some(4));
        assert_eq!((stretch.take(true), stretch.take(false)), (None, None));
    }

    #[test]
    fn a_worker_spins_anywhere_but_on_the_core_of_its_caller() {
        let pool = Pool::new(2, Vec::new()).unwrap();
        let worth = |own_core| pool.shared.is_worth_spinning(own_core);
        assert!(worth(3) && worth(UNKNOWN_CORE), "nobody has called yet");
        pool.shared.caller_core.store(3, Ordering::Relaxed);
        assert!(worth(2) && worth(UNKNOWN_CORE) && !worth(3));
    }

    #[test]
    fn many_short_jobs_follow_each_other() {
        let pool = Pool::new(3, Vec::new()).unwrap();
        let sum = AtomicUsize::new(0);
        for _ in 0..20_000 {
            pool.run(4, |_, i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
        }
        assert_eq!(sum.into_inner(), 6 * 20_000);
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller_and_the_pool_survives() {
        let pool = Pool::new(2, Vec::new()).unwrap();
        for culprit in [0, 99] {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.run(100, |_, i| assert!(i != culprit, "task {i} fails"));
            }));
            let message = *outcome.unwrap_err().downcast::<String>().unwrap();
            assert!(message.contains(&format!("task {culprit} fails")), "{message}");
        }
        let sum = AtomicUsize::new(0);
        pool.run(10, |_, i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }

    #[test]
    fn callers_on_several_threads_take_turns() {
        let pool = Pool::new(2, Vec::new()).unwrap();
        let sum = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        pool.run(3, |_, i| {
                            sum.fetch_add(i, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 3 * 500 * 3);
    }

    /// Where the caller and the worker of a pool may run.
    #[cfg(target_os = "linux")]
    fn seen_places(pool: &Pool) -> [Place; 2] {
        let seen = [0, 1].map(|_| Mutex::new(Place::new()));
        // Neither finishes its task before the other has one.
        let both = Barrier::new(2);
        pool.run(2, |thread, _| {
            both.wait();
            *lock(&seen[thread]) = topology::tests::own_place();
        });
        seen.map(|place| place.into_inner().unwrap())
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn workers_stay_in_their_places_and_callers_stay_free() {
        let all = topology::tests::own_place();
        let last = vec![*all.last().unwrap()];
        let placed = Pool::new(2, vec![last.clone()]).unwrap();
        assert_eq!(seen_places(&placed), [all.clone(), last]);
        let free = Pool::new(2, Vec::new()).unwrap();
        assert_eq!(seen_places(&free), [all.clone(), all]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_worker_without_its_place_works_anywhere() {
        let all = topology::tests::own_place();
        let nowhere = Pool::new(2, vec![vec![1_000_000]]).unwrap();
        assert_eq!(seen_places(&nowhere), [all.clone(), all]);
    }
}
