//! `metrics.jsonl`: one object per logged step and one per validation, every value in full precision.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};
use tracing::info;

use super::append_file::AppendFile;
use crate::tools::files;
use crate::{Error, Result};

const FILE: &str = "metrics.jsonl";
/// Where the lines go that a resumed run takes back.
const SUPERSEDED: &str = "metrics.superseded.jsonl";

pub struct JsonLines {
    file: AppendFile<File>,
}

impl JsonLines {
    /// Opens the file for a run that goes on after `start_step`. Lines of later steps, written by a run that died or
    /// was started over, move to `metrics.superseded.jsonl`; a torn last line goes.
    pub fn open(folder: &Path, start_step: u64) -> Result<Self> {
        let path = folder.join(FILE);
        fs::create_dir_all(folder).map_err(Error::io("cannot be created", folder))?;
        Self::open_in(folder, start_step).map_err(Error::io("cannot be written", path))
    }

    fn open_in(folder: &Path, start_step: u64) -> io::Result<Self> {
        let path = folder.join(FILE);
        let text = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            read => read?,
        };
        let lines = text.split_inclusive(|&byte| byte == b'\n');
        let (kept, taken_back): (Vec<&[u8]>, Vec<&[u8]>) =
            lines.partition(|line| step_of(line).is_some_and(|step| step <= start_step));

        let whole = taken_back.iter().copied().filter(|line| line.ends_with(b"\n")).collect::<Vec<_>>();
        if !whole.is_empty() {
            let mut superseded = OpenOptions::new().create(true).append(true).open(folder.join(SUPERSEDED))?;
            superseded.write_all(&whole.concat())?;
            superseded.sync_all()?;
            info!("{FILE}: lines of steps after {start_step} moved to {SUPERSEDED}: {}", whole.len());
        }
        if !taken_back.is_empty() {
            files::write(&path, &mut kept.concat().as_slice())?;
        }
        let file = OpenOptions::new().create(true).write(true).truncate(false).open(path)?;
        // So that what `sync` brings to the disk has a name there.
        File::open(folder)?.sync_all()?;
        Ok(Self { file: AppendFile::new(file)? })
    }

    /// On an error the line is kept and goes out with the next one. What is not a finite number is null.
    pub fn append(&mut self, metrics: &impl Serialize) -> io::Result<()> {
        serde_json::to_writer(&mut self.file, metrics)?;
        self.file.write_all(b"\n")?;
        self.file.flush()
    }
}

/// Waits until the lines that a run wrote, if it did, are on the disk.
pub fn sync(folder: &Path) -> io::Result<()> {
    match File::open(folder.join(FILE)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        file => file?.sync_all(),
    }
}

/// `None` for a line that is torn or not titan's.
fn step_of(line: &[u8]) -> Option<u64> {
    #[derive(Deserialize)]
    struct Stepped {
        step: u64,
    }
    let stepped: Stepped = serde_json::from_slice(line.strip_suffix(b"\n")?).ok()?;
    Some(stepped.step)
}
