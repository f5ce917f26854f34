//! The trace of a training step: whole, nested, and without gaps.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value as Json;

/// A span of a trace, times in nanoseconds, with what it lies in.
struct Span {
    name: String,
    category: String,
    start: u64,
    end: u64,
    /// Indices, the outermost first.
    around: Vec<usize>,
    is_leaf: bool,
}

/// The spans in the order of their beginnings.
fn read_trace(path: &Path) -> Vec<Span> {
    let trace: Json = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let ns = |event: &Json, key: &str| (event[key].as_f64().unwrap() * 1e3).round() as u64;
    let mut spans: Vec<Span> = Vec::new();
    for event in trace["traceEvents"].as_array().unwrap() {
        assert_eq!((&event["ph"], &event["pid"], &event["tid"]), (&"X".into(), &0.into(), &0.into()));
        let text = |key: &str| event[key].as_str().unwrap().to_owned();
        let (start, duration) = (ns(event, "ts"), ns(event, "dur"));
        let (name, category) = (text("name"), text("cat"));
        spans.push(Span { name, category, start, end: start + duration, around: vec![], is_leaf: true });
    }
    spans.sort_by_key(|span| (span.start, std::cmp::Reverse(span.end)));
    let mut open: Vec<usize> = Vec::new();
    for i in 0..spans.len() {
        open.retain(|outer| spans[*outer].end > spans[i].start);
        for outer in &open {
            assert!(spans[i].end <= spans[*outer].end, "{} crosses the end of {}", spans[i].name, spans[*outer].name);
            spans[*outer].is_leaf = false;
        }
        spans[i].around = open.clone();
        open.push(i);
    }
    spans
}

/// What a run of the debug model into `folder` logs.
fn train(folder: &Path, args: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_titan"))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("TITAN_DEVICE", "cpu") // a GPU makes one op of some
        .args(["train", "--config", "configs/debug_model.toml", "--checkpoint.no-enable", "--validation.no-enable"])
        .args(args)
        .arg("--job.dump_folder")
        .arg(folder)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{log}");
    log.into_owned()
}

#[test]
fn a_trace_holds_every_op_of_every_block_both_ways_and_leaves_no_gaps() {
    let folder = tempfile::tempdir().unwrap();
    let log = train(
        folder.path(),
        &[
            "--training.steps=5",
            "--activation_checkpoint.mode=selective",
            "--activation_checkpoint.selective_ac_option=2",
            "--profiling.enable_profiling",
            "--profiling.profile_freq=3",
            "--profiling.profiler_active=2",
        ],
    );
    for line in ["ms of a step went, mean of 2", "not accounted for", "Dumping profiler traces at step 3"] {
        assert!(log.contains(line), "{line} is missing in:\n{log}");
    }

    let traces = folder.path().join("profile_traces");
    let mut written: Vec<_> = std::fs::read_dir(&traces).unwrap().map(|it| it.unwrap().file_name()).collect();
    written.sort();
    // Of the first three steps the last two, of the next three, of which the run takes two, the fifth.
    assert_eq!(written, ["iteration_3", "iteration_5"]);
    let steps = |spans: &[Span]| -> Vec<String> {
        spans.iter().filter(|it| it.category == "step").map(|it| it.name.clone()).collect()
    };
    assert_eq!(steps(&read_trace(&traces.join("iteration_5/rank0_trace.json"))), ["step 5"]);
    let spans = read_trace(&traces.join("iteration_3/rank0_trace.json"));
    assert_eq!(steps(&spans), ["step 2", "step 3"]);

    let within = |outer: usize| spans.iter().filter(move |span| span.around.contains(&outer));
    for step in (0..spans.len()).filter(|i| spans[*i].around.is_empty()) {
        assert_eq!(spans[step].category, "step", "{} is in no step", spans[step].name);
        let length = spans[step].end - spans[step].start;
        let leaves: u64 = within(step).filter(|it| it.is_leaf).map(|it| it.end - it.start).sum();
        assert!(leaves as f64 >= 0.95 * length as f64, "{leaves} ns of {length} are accounted for");

        let named = |name: &str, category: &str| -> Option<usize> {
            let is_it = |i: &usize| spans[*i].name == name && spans[*i].category == category;
            (0..spans.len()).find(|i| spans[*i].around == [step] && is_it(i))
        };
        let ops = |stage: usize| -> BTreeSet<&str> { within(stage).map(|it| it.name.as_str()).collect() };
        for layer in 0..6 {
            let find = |category| named(&format!("layers.{layer}"), category);
            let (forward, backward) = (find("forward").unwrap(), find("backward").unwrap());
            let expected = match layer % 2 {
                0 => vec!["rms_norm", "linear", "reshape", "rope", "attention", "add", "glu"],
                // The dense feed-forward of these layers is the shared expert.
                _ => vec!["rms_norm", "linear", "reshape", "rope", "attention", "add", "route", "experts", "glu"],
            };
            assert_eq!(ops(forward), BTreeSet::from_iter(expected), "layer {layer}");
            assert_eq!(ops(backward), ops(forward), "layer {layer}");
            assert!(within(forward).all(|it| it.category == "forward"));
            assert!(within(backward).all(|it| it.category == "backward"));
            match find("recompute") {
                // What only the result needs is not computed again.
                Some(again) => assert!(ops(again).is_subset(&ops(forward)) && layer % 2 == 1),
                None => assert_eq!(layer % 2, 0, "every second layer runs forward again"),
            }
            let optimizer = named("optimizer", "optimizer").unwrap();
            let of_layer = within(optimizer).filter(|it| it.name == format!("layers.{layer}"));
            assert_eq!(of_layer.count(), 2, "the norm and the update of layer {layer}");
        }
        assert_eq!(ops(named("head", "forward,backward").unwrap()), BTreeSet::from(["rms_norm", "cross_entropy"]));
        for category in ["forward", "backward"] {
            assert_eq!(ops(named("tok_embeddings", category).unwrap()), BTreeSet::from(["embedding"]));
        }
        for (name, category) in [("data_loading", "data"), ("context", "forward"), ("metrics", "metrics")] {
            assert!(named(name, category).is_some(), "{name} is missing");
        }
    }
}

#[test]
fn a_memory_snapshot_says_what_is_held_when_and_by_whom() {
    let folder = tempfile::tempdir().unwrap();
    let log = train(
        folder.path(),
        &["--training.steps=2", "--profiling.enable_memory_snapshot", "--profiling.profile_freq=2"],
    );
    assert!(!folder.path().join("profile_traces").exists(), "nobody has asked for traces");

    let path = folder.path().join("memory_snapshot/iteration_2/rank0_memory_snapshot.json");
    let trace: Json = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let spans = || events.iter().filter(|event| event["ph"] == "X");
    let bytes = |event: &Json, when: &str| event["args"]["memory"][when].as_u64().unwrap();
    let step = spans().find(|event| event["cat"] == "step").unwrap();
    // In a program whose weights are f32, but for the copy in bf16 of all but the embedding.
    let n = 15_017_216_u64;
    let of_states = (4 + 2 + 4 + 8) * n - 2 * 2048 * 256;
    let before = bytes(step, "before");
    assert!(
        (of_states..of_states + of_states / 20).contains(&before),
        "{before} bytes before the step, not {of_states}"
    );
    assert!(bytes(step, "after").abs_diff(before) < 1 << 20, "a step gives back what it takes");

    let peak = spans().map(|event| bytes(event, "peak")).max().unwrap();
    assert_eq!(bytes(step, "peak"), peak);
    assert!(peak > before + (20 << 20) && peak < before + (200 << 20), "a peak of {peak} bytes, {before} before");
    for event in spans() {
        assert!(bytes(event, "peak") >= bytes(event, "before").max(bytes(event, "after")), "{event}");
    }
    let counted = |name: &'static str| events.iter().filter(move |it| it["ph"] == "C" && it["name"] == name);
    assert_eq!(counted("memory at most").map(|it| it["args"]["bytes"].as_u64().unwrap()).max().unwrap(), peak);
    assert_eq!(counted("memory held").count(), 2 * counted("memory at most").count());

    let mib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
    let table = &log[log.find("What holds").unwrap()..];
    assert!(table.contains(&format!("the {} MiB at the peak of step 2", mib(peak))), "{log}");
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    for (name, bytes) in [("gradients", 4 * n), ("moments", 8 * n)] {
        assert!(rows.iter().any(|row| row.len() == 3 && row[..2] == [name, &mib(bytes)]), "{name} in {table}");
    }
}
