//! Where time and memory go: nested spans, written down while a recording runs.
//!
//! Whoever does something worth knowing about opens a [`span`]; it ends when it is dropped. While nothing records, that
//! costs one load of a flag.

mod memory;
mod table;
pub mod trace;

use std::cell::Cell;
use std::fmt::{self, Display};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use candle_core::Device;
use serde::Serialize;

use super::memory::Mark;

pub use memory::MemoryTable;
pub use table::Table;

/// What a span is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Category {
    /// A whole step; its spans are of the others.
    Step,
    Data,
    Forward,
    Backward,
    /// One pass that does both, as over the logits.
    #[serde(rename = "forward,backward")]
    ForwardBackward,
    /// A block's forward, run a second time for its activations.
    Recompute,
    Optimizer,
    Metrics,
    Validation,
    Checkpoint,
}

impl Category {
    /// Of the spans inside that do not say their own.
    fn inside(self) -> Self {
        if self == Self::ForwardBackward { Self::Forward } else { self }
    }
}

impl Display for Category {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// A span that ended while a recording ran.
#[derive(Clone, Debug)]
pub struct Event {
    pub name: String,
    pub category: Category,
    /// Of what it worked on; of an op's backward, of the gradient of the op's result.
    pub shapes: Vec<Vec<usize>>,
    pub start: Instant,
    pub duration: Duration,
    /// Threads that have spans, numbered from 0.
    pub thread: usize,
    /// Whether no span lies inside it.
    pub is_leaf: bool,
    /// If the recording watches memory.
    pub memory: Option<Memory>,
}

/// Bytes that were held of the memory of the device that computes, by whatever runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// When the span began.
    pub before: u64,
    pub after: u64,
    /// The most meanwhile.
    pub peak: u64,
}

impl Memory {
    /// What is held more afterwards.
    fn growth(&self) -> f64 {
        self.after as f64 - self.before as f64
    }
}

static RECORDING: AtomicBool = AtomicBool::new(false);
/// The thread whose spans say what memory is held, for one alone sees all peaks; [`NOBODY`] if it is not watched.
static WATCHER: AtomicUsize = AtomicUsize::new(NOBODY);
const NOBODY: usize = usize::MAX;
static EVENTS: Mutex<Vec<Event>> = Mutex::new(Vec::new());

/// Whether a recording runs.
pub fn is_on() -> bool {
    RECORDING.load(Ordering::Relaxed)
}

/// The GPU whose work the spans of the main thread stand for.
static GPU: OnceLock<Device> = OnceLock::new();

/// From here on, a recording waits for `device` wherever a span begins or ends, so that a span lasts as long as the work that
/// was launched in it: a GPU would do it later. That takes away what host and GPU do at the same time.
pub fn wait_for(device: &Device) {
    if !device.is_cpu() {
        // A process computes on one device.
        let _ = GPU.set(device.clone());
    }
}

fn wait() {
    if let Some(device) = GPU.get() {
        // A fault of the device shows where its results are read.
        let _ = device.synchronize();
    }
}

fn watches_memory() -> bool {
    WATCHER.load(Ordering::Relaxed) == THREAD.with(|thread| *thread)
}

/// How much of the device's memory is held now, if this thread watches it.
fn mark_memory() -> Mark {
    match GPU.get() {
        _ if !watches_memory() => Mark::default(),
        #[cfg(feature = "cuda")]
        Some(Device::Cuda(device)) => super::gpu::mark(device),
        _ => super::memory::mark(),
    }
}

/// Begins a recording; with `watch_memory`, spans of this thread say how much memory is held.
pub fn start(watch_memory: bool) {
    EVENTS.lock().unwrap_or_else(PoisonError::into_inner).clear();
    WATCHER.store(if watch_memory { THREAD.with(|thread| *thread) } else { NOBODY }, Ordering::Relaxed);
    RECORDING.store(true, Ordering::Relaxed);
}

/// Ends the recording, and returns the spans that began and ended in it, in the order of their ends.
pub fn stop() -> Vec<Event> {
    RECORDING.store(false, Ordering::Relaxed);
    std::mem::take(&mut EVENTS.lock().unwrap_or_else(PoisonError::into_inner))
}

/// A span in the category of the span around it, [`Category::Forward`] if there is none.
#[inline]
pub fn span(name: impl Display) -> Span {
    Span(RECORDING.load(Ordering::Relaxed).then(|| Open::begin(CATEGORY.get(), name.to_string())))
}

/// A span in a category of its own, which the spans inside it take over.
#[inline]
pub fn span_in(category: Category, name: impl Display) -> Span {
    Span(RECORDING.load(Ordering::Relaxed).then(|| Open::begin(category, name.to_string())))
}

/// Ends when it is dropped.
#[must_use = "a span ends when it is dropped"]
pub struct Span(Option<Open>);

impl Span {
    /// Notes the shapes of what is worked on.
    #[inline]
    pub fn shapes(mut self, shapes: &[&[usize]]) -> Self {
        if let Some(open) = &mut self.0 {
            open.shapes = shapes.iter().map(|shape| shape.to_vec()).collect();
        }
        self
    }

    /// Ends with `run`.
    #[inline]
    pub fn around<R>(self, run: impl FnOnce() -> R) -> R {
        run()
    }
}

thread_local! {
    static THREAD: usize = {
        static N_THREADS: AtomicUsize = AtomicUsize::new(0);
        N_THREADS.fetch_add(1, Ordering::Relaxed)
    };
    /// Of a span that begins now and does not say its own.
    static CATEGORY: Cell<Category> = const { Cell::new(Category::Forward) };
    /// The most memory that was held since the span began that is open now, as far as it was asked for.
    static PEAK: Cell<u64> = const { Cell::new(0) };
    /// Spans begun on this thread so far.
    static BEGUN: Cell<u64> = const { Cell::new(0) };
}

struct Open {
    name: String,
    category: Category,
    around: Category,
    shapes: Vec<Vec<usize>>,
    number: u64,
    held: u64,
    peak_around: u64,
    start: Instant,
}

impl Open {
    #[cold]
    fn begin(category: Category, name: String) -> Self {
        let number = BEGUN.get() + 1;
        BEGUN.set(number);
        wait();
        let Mark { held, peak } = mark_memory();
        Self {
            name,
            category,
            around: CATEGORY.replace(category.inside()),
            shapes: vec![],
            number,
            held,
            peak_around: PEAK.replace(held).max(peak),
            start: Instant::now(),
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        wait();
        let duration = self.start.elapsed();
        let Mark { held, peak } = mark_memory();
        let peak = PEAK.get().max(peak);
        PEAK.set(self.peak_around.max(peak));
        CATEGORY.set(self.around);
        if !RECORDING.load(Ordering::Relaxed) {
            return;
        }
        EVENTS.lock().unwrap_or_else(PoisonError::into_inner).push(Event {
            name: std::mem::take(&mut self.name),
            category: self.category,
            shapes: std::mem::take(&mut self.shapes),
            start: self.start,
            duration,
            thread: THREAD.with(|thread| *thread),
            is_leaf: BEGUN.get() == self.number,
            memory: watches_memory().then_some(Memory { before: self.held, after: held, peak }),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Other tests run ops meanwhile, on other threads.
    fn own(events: Vec<Event>) -> Vec<Event> {
        let thread = THREAD.with(|thread| *thread);
        events.into_iter().filter(|event| event.thread == thread).collect()
    }

    #[test]
    fn spans_nest_inherit_their_category_and_are_kept_only_while_a_recording_runs() {
        let before = span("before");
        start(false);
        drop(before);
        let outer = span_in(Category::Backward, format_args!("layers.{}", 3));
        span("linear").shapes(&[&[2, 3], &[4]]).around(|| std::thread::sleep(Duration::from_millis(1)));
        drop(outer);
        span_in(Category::ForwardBackward, "head").around(|| drop(span("rms_norm")));
        let unfinished = span("unfinished");
        let events = own(stop());
        drop(unfinished);
        drop(span("after"));

        let found: Vec<_> = events.iter().map(|it| (it.name.as_str(), it.category, it.is_leaf)).collect();
        let expected = [
            ("linear", Category::Backward, true),
            ("layers.3", Category::Backward, false),
            ("rms_norm", Category::Forward, true),
            ("head", Category::ForwardBackward, false),
        ];
        assert_eq!(found, expected);
        let (inner, outer) = (&events[0], &events[1]);
        assert_eq!(inner.shapes, [vec![2, 3], vec![4]]);
        assert!(inner.duration >= Duration::from_millis(1));
        assert!(outer.start <= inner.start && inner.start + inner.duration <= outer.start + outer.duration);
        assert_eq!(CATEGORY.get(), Category::Forward, "spans that end give back the category around them");
        start(false);
        assert!(own(stop()).is_empty(), "a recording begins empty");
    }
}
