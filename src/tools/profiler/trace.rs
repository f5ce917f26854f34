//! A recording as a file that chrome://tracing and ui.perfetto.dev open.

use std::fs;
use std::io::{self, BufWriter};
use std::path::Path;
use std::time::Instant;

use serde::Serialize;

use super::{Category, Event, Memory};
use crate::tools::files::NewFile;

/// Chrome's trace event format, "complete" events and counters; times are in microseconds.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Trace<'a> {
    trace_events: Vec<TraceEvent<'a>>,
    display_time_unit: &'static str,
}

#[derive(Serialize)]
struct TraceEvent<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    cat: Option<Category>,
    ph: &'static str,
    ts: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    dur: Option<f64>,
    pid: usize,
    tid: usize,
    #[serde(skip_serializing_if = "Args::is_empty")]
    args: Args<'a>,
}

#[derive(Default, Serialize)]
struct Args<'a> {
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    shapes: &'a [Vec<usize>],
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<Memory>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
}

impl Args<'_> {
    fn is_empty(&self) -> bool {
        self.shapes.is_empty() && self.memory.is_none() && self.bytes.is_none()
    }
}

/// Writes all of a recording, or leaves what `path` held before. `rank` is the process it is shown as. Memory, if it was
/// watched, is a counter too: what innermost spans find, and the most while they run.
pub fn write(path: &Path, events: &[Event], rank: usize) -> io::Result<()> {
    let origin = events.iter().map(|event| event.start).min().unwrap_or_else(Instant::now);
    let us = |at: Instant| at.duration_since(origin).as_nanos() as f64 / 1e3;
    let mut trace_events = Vec::with_capacity(events.len());
    for event in events {
        let (start, thread) = (us(event.start), event.thread);
        trace_events.push(TraceEvent {
            name: &event.name,
            cat: Some(event.category),
            ph: "X",
            ts: start,
            dur: Some(event.duration.as_nanos() as f64 / 1e3),
            pid: rank,
            tid: thread,
            args: Args { shapes: &event.shapes, memory: event.memory, bytes: None },
        });
        if let Some(memory) = event.memory.filter(|_| event.is_leaf) {
            let counter = |name, ts, bytes| {
                let args = Args { bytes: Some(bytes), ..Args::default() };
                TraceEvent { name, cat: None, ph: "C", ts, dur: None, pid: rank, tid: thread, args }
            };
            trace_events.push(counter("memory held", start, memory.before));
            trace_events.push(counter("memory held", us(event.start + event.duration), memory.after));
            trace_events.push(counter("memory at most", start, memory.peak));
        }
    }
    let trace = Trace { trace_events, display_time_unit: "ms" };
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let mut file = BufWriter::new(NewFile::create(path)?);
    serde_json::to_writer(&mut file, &trace)?;
    file.into_inner()?.keep()
}
