//! Scalars for TensorBoard.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use chrono::{DateTime, Local};
use protobuf::Message;
use tensorboard_proto::event::{Event, SessionLog, SessionLog_SessionStatus};
use tensorboard_proto::summary::{Summary, Summary_Value};
use tensorboard_rs::record_writer::RecordWriter;

use super::append_file::AppendFile;
use super::{StepMetrics, ValidationMetrics};
use crate::tools::device::GIB;
use crate::{Error, Result};

/// One run's event file.
pub struct EventFile {
    records: RecordWriter<AppendFile<File>>,
}

impl EventFile {
    /// A new file in `folder/%Y%m%d-%H%M`, for a run that goes on after `start_step`: TensorBoard forgets what an
    /// earlier file of the same folder has of later steps. Never an old file: what follows a torn record is lost.
    pub fn create(folder: &Path, start_step: u64) -> Result<Self> {
        let now = Local::now();
        let folder = folder.join(now.format("%Y%m%d-%H%M").to_string());
        fs::create_dir_all(&folder).map_err(Error::io("cannot be created", &folder))?;
        Self::create_in(&folder, now, start_step).map_err(Error::io("cannot be written", &folder))
    }

    fn create_in(folder: &Path, now: DateTime<Local>, start_step: u64) -> io::Result<Self> {
        let mut file = Self { records: RecordWriter::new(AppendFile::new(new_file(folder, now)?)?) };

        let mut version = Event::new();
        version.set_file_version("brain.Event:2".into());
        file.append(version)?;

        let mut session = SessionLog::new();
        session.set_status(SessionLog_SessionStatus::START);
        let mut start = Event::new();
        start.set_step(start_step as i64 + 1);
        start.set_session_log(session);
        file.append(start)?;

        file.records.flush()?;
        Ok(file)
    }

    /// On an error the event is kept and goes out with the next one.
    pub fn step(&mut self, metrics: &StepMetrics) -> io::Result<()> {
        let peak_gib = metrics.peak_mem_bytes as f64 / GIB;
        let reserved_gib = metrics.peak_reserved_bytes as f64 / GIB;
        self.scalars(
            metrics.step,
            &[
                ("loss_metrics/global_avg_loss", metrics.loss.into()),
                ("loss_metrics/global_max_loss", metrics.max_loss.into()),
                ("grad_norm", metrics.grad_norm.into()),
                ("throughput(tps)", metrics.tps),
                ("tflops", metrics.tflops),
                ("mfu(%)", metrics.mfu_pct),
                ("time_metrics/end_to_end(s)", metrics.end_to_end_s),
                ("time_metrics/data_loading(s)", metrics.data_loading_s),
                ("time_metrics/data_loading(%)", metrics.data_loading_pct),
                // No try to allocate is repeated: memory that is not there ends the run.
                ("memory/max_active(GiB)", peak_gib),
                ("memory/max_active(%)", metrics.peak_mem_pct),
                ("memory/max_reserved(GiB)", reserved_gib),
                ("memory/max_reserved(%)", metrics.peak_reserved_pct),
                ("memory/num_alloc_retries", 0.0),
                ("memory/num_ooms", 0.0),
                ("n_tokens_seen", metrics.n_tokens_seen as f64),
                ("lr", metrics.lr),
            ],
        )
    }

    /// On an error the event is kept and goes out with the next one.
    pub fn validation(&mut self, metrics: &ValidationMetrics) -> io::Result<()> {
        let peak_gib = metrics.peak_mem_bytes as f64 / GIB;
        let reserved_gib = metrics.peak_reserved_bytes as f64 / GIB;
        self.scalars(
            metrics.step,
            &[
                ("validation_metrics/loss", metrics.validation_loss.into()),
                ("validation_metrics/throughput(tps)", metrics.validation_tps),
                ("validation_metrics/memory/max_active(GiB)", peak_gib),
                ("validation_metrics/memory/max_active(%)", metrics.peak_mem_pct),
                ("validation_metrics/memory/max_reserved(GiB)", reserved_gib),
                ("validation_metrics/memory/max_reserved(%)", metrics.peak_reserved_pct),
            ],
        )
    }

    fn scalars(&mut self, step: u64, scalars: &[(&str, f64)]) -> io::Result<()> {
        let values = scalars.iter().map(|&(tag, value)| {
            let mut scalar = Summary_Value::new();
            scalar.set_tag(tag.into());
            scalar.set_simple_value(value as f32);
            scalar
        });
        let mut summary = Summary::new();
        summary.set_value(values.collect());
        let mut event = Event::new();
        event.set_step(step as i64);
        event.set_summary(summary);
        self.append(event)?;
        self.records.flush()
    }

    fn append(&mut self, mut event: Event) -> io::Result<()> {
        event.set_wall_time(Local::now().timestamp_micros() as f64 / 1e6);
        self.records.write(&event.write_to_bytes()?)
    }
}

/// TensorBoard reads a folder's files in the order of their names, which must be the order of their runs.
fn new_file(folder: &Path, now: DateTime<Local>) -> io::Result<File> {
    let mut attempt = 0;
    loop {
        let name = format!("events.out.tfevents.{}.{attempt}.titan", now.timestamp());
        match File::create_new(folder.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => attempt += 1,
            created => return created,
        }
    }
}
