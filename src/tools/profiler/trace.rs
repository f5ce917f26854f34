//! A recording as a file that chrome://tracing and ui.perfetto.dev open.

use std::fs;
use std::io::{self, BufWriter};
use std::path::Path;
use std::time::Instant;

use serde::Serialize;

use super::{Category, Event};
use crate::tools::files::NewFile;

/// Chrome's trace event format, "complete" events; times are in microseconds.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Trace<'a> {
    trace_events: Vec<TraceEvent<'a>>,
    display_time_unit: &'static str,
}

#[derive(Serialize)]
struct TraceEvent<'a> {
    name: &'a str,
    cat: Category,
    ph: &'static str,
    ts: f64,
    dur: f64,
    pid: usize,
    tid: usize,
    #[serde(skip_serializing_if = "Args::is_empty")]
    args: Args<'a>,
}

#[derive(Serialize)]
struct Args<'a> {
    shapes: &'a [Vec<usize>],
}

impl Args<'_> {
    fn is_empty(&self) -> bool {
        self.shapes.is_empty()
    }
}

/// Writes all of a recording, or leaves what `path` held before. `rank` is the process it is shown as.
pub fn write(path: &Path, events: &[Event], rank: usize) -> io::Result<()> {
    let origin = events.iter().map(|event| event.start).min().unwrap_or_else(Instant::now);
    let trace_events = events.iter().map(|event| TraceEvent {
        name: &event.name,
        cat: event.category,
        ph: "X",
        ts: event.start.duration_since(origin).as_nanos() as f64 / 1e3,
        dur: event.duration.as_nanos() as f64 / 1e3,
        pid: rank,
        tid: event.thread,
        args: Args { shapes: &event.shapes },
    });
    let trace = Trace { trace_events: trace_events.collect(), display_time_unit: "ms" };
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let mut file = BufWriter::new(NewFile::create(path)?);
    serde_json::to_writer(&mut file, &trace)?;
    file.into_inner()?.keep()
}
