//! The metrics logger over runs with made-up steps: what lands in the dump folder, and on the console.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::Duration;

use protobuf::Message;
use serde_json::{Value, json};
use tensorboard_proto::event::{Event, SessionLog_SessionStatus};
use titan::components::metrics::{MetricsLogger, MetricsSettings, RunFacts, StepRecord};
use titan::tools::device::DeviceFacts;

fn settings() -> MetricsSettings {
    MetricsSettings {
        log_freq: 10,
        enable_tensorboard: true,
        save_tb_folder: "tb".into(),
        disable_color_printing: false,
    }
}

/// A run that goes on after `start_step`.
fn logger(dump_folder: &Path, start_step: u64) -> MetricsLogger {
    let device =
        DeviceFacts { name: "a device".into(), cores: 2, total_memory_bytes: 1 << 40, peak_flops: 1e12, gpu: None };
    let facts = RunFacts { flops_per_token: 1e6, device, total_steps: 40, start_step };
    MetricsLogger::new(settings(), dump_folder, facts).unwrap()
}

fn loss(step: u64) -> f32 {
    8.0 / step as f32
}

fn record(step: u64) -> StepRecord {
    StepRecord {
        step,
        loss: loss(step),
        max_loss: loss(step) + 0.5,
        grad_norm: 1.5,
        lr: 0.1 / 3.0,
        n_tokens: 100,
        n_tokens_seen: 100 * step,
        data_loading_s: 1e-4,
        tokens_per_expert: BTreeMap::from([(1, vec![40, 60])]),
    }
}

fn run(logger: &mut MetricsLogger, steps: std::ops::RangeInclusive<u64>) {
    for step in steps {
        logger.step_done(record(step));
    }
}

fn json_lines(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn steps(lines: &[Value]) -> Vec<u64> {
    lines.iter().map(|line| line["step"].as_u64().unwrap()).collect()
}

/// The event files below `folder`, in the order in which TensorBoard reads them.
fn event_files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .flat_map(|run| fs::read_dir(run.unwrap().path()).unwrap())
        .map(|f| f.unwrap().path())
        .collect();
    files.sort();
    files
}

/// CRC-32C bit by bit, masked as TFRecord wants it.
fn masked_crc(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        }
    }
    (!crc).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The events of a TFRecord file: length (u64), its checksum, data, its checksum, and so on.
fn events(path: &Path) -> Vec<Event> {
    let bytes = fs::read(path).unwrap();
    let mut rest = bytes.as_slice();
    let mut events = Vec::new();
    while !rest.is_empty() {
        let (length, tail) = rest.split_at(8);
        let (length_crc, tail) = tail.split_at(4);
        let (data, tail) = tail.split_at(u64::from_le_bytes(length.try_into().unwrap()) as usize);
        let (data_crc, tail) = tail.split_at(4);
        assert_eq!(length_crc, masked_crc(length).to_le_bytes());
        assert_eq!(data_crc, masked_crc(data).to_le_bytes());
        events.push(Event::parse_from_bytes(data).unwrap());
        rest = tail;
    }
    events
}

/// What `emit` logs, line by line.
fn console(emit: impl FnOnce()) -> Vec<String> {
    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);
    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let sink = Sink::default();
    let writer = sink.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    tracing::subscriber::with_default(subscriber, emit);
    let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
    text.lines().map(str::to_owned).collect()
}

#[test]
fn step_1_and_every_tenth_are_logged_in_full_precision() {
    let folder = tempfile::tempdir().unwrap();
    let lines = console(|| {
        let mut logger = logger(folder.path(), 0);
        run(&mut logger, 1..=25);
        logger.validation(25, 0.1, 4000, Duration::from_secs(4));
    });
    for (line, beginning) in lines.iter().zip([
        "step:  1  loss:  8.0000  grad_norm:  1.5000  memory: ",
        "step: 10  loss:  0.8000  grad_norm:  1.5000  memory: ",
        "step: 20  loss:  0.4000  grad_norm:  1.5000  memory: ",
        "validate step: 25  loss:  0.1000  memory: ",
    ]) {
        assert!(line.contains(beginning), "{line}");
    }
    assert_eq!(lines.len(), 4);

    let lines = json_lines(&folder.path().join("metrics.jsonl"));
    assert_eq!(steps(&lines), [1, 10, 20, 25]);
    for line in &lines[..3] {
        let step = line["step"].as_u64().unwrap();
        assert_eq!(line["loss"].as_f64().unwrap() as f32, loss(step));
        assert_eq!(line["n_tokens_seen"], 100 * step);
        assert_eq!(line["tokens_per_expert"], json!({"1": [40, 60]}));
        // tflops = 1e6 FLOPs per token * tps / 1e12, and the peak is 1 TFLOP/s.
        let (tps, tflops) = (line["tps"].as_f64().unwrap(), line["tflops"].as_f64().unwrap());
        assert!((tflops / (1e-6 * tps) - 1.0).abs() < 1e-12, "{line}");
        assert!((line["mfu_pct"].as_f64().unwrap() / (100.0 * tflops) - 1.0).abs() < 1e-12, "{line}");
    }
    assert_eq!(lines[3]["validation_loss"], 0.1);
    assert_eq!(lines[3]["validation_tps"], 1000.0);
    assert_eq!(lines[3].get("loss"), None);
    // Shortest decimals that read back as the same f32 and f64.
    let text = fs::read_to_string(folder.path().join("metrics.jsonl")).unwrap();
    assert!(text.contains(r#""loss":0.8,"max_loss":1.3,"grad_norm":1.5,"lr":0.03333333333333333,"#), "{text}");
}

#[test]
fn a_resumed_run_takes_back_the_lines_of_later_steps() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metrics.jsonl");
    let mut dead = logger(folder.path(), 0);
    run(&mut dead, 1..=30);
    dead.validation(30, 1.0, 100, Duration::from_secs(1));
    drop(dead);
    let torn = fs::read_to_string(&path).unwrap() + r#"{"step":40,"loss":0."#;
    fs::write(&path, torn).unwrap();

    run(&mut logger(folder.path(), 20), 21..=40);

    assert_eq!(steps(&json_lines(&path)), [1, 10, 20, 30, 40]);
    assert_eq!(steps(&json_lines(&folder.path().join("metrics.superseded.jsonl"))), [30, 30]);
}

#[test]
fn a_run_continued_where_it_ended_keeps_every_line() {
    let folder = tempfile::tempdir().unwrap();
    run(&mut logger(folder.path(), 0), 1..=20);
    run(&mut logger(folder.path(), 20), 21..=30);
    assert_eq!(steps(&json_lines(&folder.path().join("metrics.jsonl"))), [1, 10, 20, 30]);
    assert!(!folder.path().join("metrics.superseded.jsonl").exists());
}

#[test]
fn tensorboard_gets_the_tags_that_torchtitan_writes() {
    let folder = tempfile::tempdir().unwrap();
    let mut logger = logger(folder.path(), 0);
    run(&mut logger, 1..=10);
    logger.validation(10, 0.25, 4000, Duration::from_secs(4));

    let files = event_files(&folder.path().join("tb"));
    let events = events(&files[0]);
    assert_eq!(files.len(), 1);
    assert_eq!(events[0].get_file_version(), "brain.Event:2");
    let scalars: Vec<(i64, BTreeMap<&str, f32>)> = events[2..]
        .iter()
        .map(|event| {
            let values = event.get_summary().get_value();
            (event.get_step(), values.iter().map(|value| (value.get_tag(), value.get_simple_value())).collect())
        })
        .collect();

    assert_eq!(scalars.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [1, 10, 10]);
    let mut step_tags = [
        "loss_metrics/global_avg_loss",
        "loss_metrics/global_max_loss",
        "grad_norm",
        "throughput(tps)",
        "tflops",
        "mfu(%)",
        "time_metrics/end_to_end(s)",
        "time_metrics/data_loading(s)",
        "time_metrics/data_loading(%)",
        "memory/max_active(GiB)",
        "memory/max_active(%)",
        "memory/max_reserved(GiB)",
        "memory/max_reserved(%)",
        "memory/num_alloc_retries",
        "memory/num_ooms",
        "n_tokens_seen",
        "lr",
    ];
    step_tags.sort();
    assert_eq!(scalars[1].1.keys().copied().collect::<Vec<_>>(), step_tags);
    assert_eq!(scalars[1].1["loss_metrics/global_avg_loss"], loss(10));
    assert_eq!(scalars[1].1["loss_metrics/global_max_loss"], loss(10) + 0.5);
    assert_eq!(scalars[1].1["n_tokens_seen"], 1000.0);
    let mut validation_tags = [
        "validation_metrics/loss",
        "validation_metrics/throughput(tps)",
        "validation_metrics/memory/max_active(GiB)",
        "validation_metrics/memory/max_active(%)",
        "validation_metrics/memory/max_reserved(GiB)",
        "validation_metrics/memory/max_reserved(%)",
    ];
    validation_tags.sort();
    assert_eq!(scalars[2].1.keys().copied().collect::<Vec<_>>(), validation_tags);
    assert_eq!(scalars[2].1["validation_metrics/loss"], 0.25);
}

#[test]
fn a_resumed_run_opens_a_new_event_file_that_purges_later_steps() {
    let folder = tempfile::tempdir().unwrap();
    run(&mut logger(folder.path(), 0), 1..=30);
    run(&mut logger(folder.path(), 20), 21..=30);

    let files = event_files(&folder.path().join("tb"));
    assert_eq!(files.len(), 2);
    let start = &events(&files[1])[1];
    assert_eq!(start.get_session_log().get_status(), SessionLog_SessionStatus::START);
    assert_eq!(start.get_step(), 21);
}

#[test]
fn throughput_leaves_out_the_runs_first_step_and_validation() {
    let folder = tempfile::tempdir().unwrap();
    let slow = Duration::from_millis(600);
    let mut logger = logger(folder.path(), 25);
    sleep(slow);
    run(&mut logger, 26..=26);
    run(&mut logger, 27..=32);
    sleep(slow);
    logger.validation(32, 1.0, 100, slow);
    run(&mut logger, 33..=40);

    let lines = json_lines(&folder.path().join("metrics.jsonl"));
    let step_lines: Vec<&Value> = lines.iter().filter(|line| line.get("loss").is_some()).collect();
    assert_eq!(step_lines.len(), 2);
    for line in step_lines {
        // Made-up steps take microseconds; a slow one among ten would make it 60 ms each.
        assert!(line["end_to_end_s"].as_f64().unwrap() < 0.05, "{line}");
        assert!((line["data_loading_s"].as_f64().unwrap() / 1e-4 - 1.0).abs() < 1e-9, "{line}");
    }
}

#[test]
fn a_first_step_that_is_logged_shows_its_own_time() {
    let folder = tempfile::tempdir().unwrap();
    let mut logger = logger(folder.path(), 0);
    sleep(Duration::from_millis(50));
    run(&mut logger, 1..=1);
    let line = &json_lines(&folder.path().join("metrics.jsonl"))[0];
    assert!(line["end_to_end_s"].as_f64().unwrap() >= 0.05, "{line}");
    assert!(line["tps"].as_f64().unwrap() <= 2000.0, "{line}");
}

#[test]
fn a_loss_that_is_not_a_number_leaves_the_line_readable() {
    let folder = tempfile::tempdir().unwrap();
    logger(folder.path(), 0).step_done(StepRecord { loss: f32::NAN, ..record(1) });
    assert_eq!(json_lines(&folder.path().join("metrics.jsonl"))[0]["loss"], Value::Null);
}

#[test]
fn a_dump_folder_that_cannot_be_written_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("outputs");
    fs::write(&file, "in the way").unwrap();
    let facts = RunFacts { flops_per_token: 1.0, device: DeviceFacts::cpu(), total_steps: 1, start_step: 0 };
    let error = MetricsLogger::new(settings(), &file, facts).err().unwrap();
    assert!(error.to_string().starts_with(&file.display().to_string()), "{error}");
}
