//! Saving while training goes on.
//!
//! Training waits only for a copy of its state in host memory; another thread writes that, as if it were the state. One
//! save runs at a time.

use std::panic;
use std::thread::{self, JoinHandle};

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use tracing::error;

use super::State;
use super::step_folder::Progress;
use super::writer::Writer;
use crate::{Error, Result};

#[derive(Default)]
pub struct Background {
    /// Empty before the first save, and while one is running.
    snapshot: Snapshot,
    running: Option<JoinHandle<(Snapshot, Result<usize>)>>,
}

/// A copy of a run's tensors, in memory that the next copy uses again.
#[derive(Default)]
struct Snapshot {
    model: Vec<(String, Tensor)>,
    optimizer: Vec<(String, Tensor)>,
}

impl Background {
    /// Copies `state`, and begins to save it. No save may be running.
    pub fn begin(&mut self, writer: Writer, step: usize, state: &State) -> Result<()> {
        let mut snapshot = std::mem::take(&mut self.snapshot);
        snapshot.take(state)?;
        let progress = state.progress.clone();
        let save = move || {
            step_aside();
            let result = writer.save(step, &snapshot.state(&progress));
            (snapshot, result.map(|()| step))
        };
        let thread = thread::Builder::new().name("checkpoint".into()).spawn(save);
        self.running = Some(thread.map_err(Error::io("save on another thread", "checkpoint.async_mode"))?);
        Ok(())
    }

    /// Whether a save has ended that nobody has waited for.
    pub fn is_finished(&self) -> bool {
        self.running.as_ref().is_some_and(JoinHandle::is_finished)
    }

    /// Waits for the running save and returns its step; `None` if none is running.
    pub fn wait(&mut self) -> Result<Option<usize>> {
        let Some(running) = self.running.take() else { return Ok(None) };
        let (snapshot, result) = running.join().unwrap_or_else(|bug| panic::resume_unwind(bug));
        self.snapshot = snapshot;
        result.map(Some)
    }
}

impl Drop for Background {
    /// A run that ends by an error still finishes what it has begun to save.
    fn drop(&mut self) {
        if let Some(Ok((_, Err(error)))) = self.running.take().map(JoinHandle::join) {
            error!("{error}");
        }
    }
}

impl Snapshot {
    fn take(&mut self, state: &State) -> Result<()> {
        copy(state.model, &mut self.model)?;
        copy(state.optimizer, &mut self.optimizer)
    }

    fn state<'a>(&'a self, progress: &'a Progress) -> State<'a> {
        State { model: &self.model, optimizer: &self.optimizer, progress }
    }
}

/// Copies tensors to host memory, over the copies of the last time.
fn copy(tensors: &[(String, Tensor)], copies: &mut Vec<(String, Tensor)>) -> Result<()> {
    if copies.is_empty() {
        let like = |(name, tensor): &(String, Tensor)| {
            Ok((name.clone(), Tensor::zeros(tensor.shape(), tensor.dtype(), &Device::Cpu)?))
        };
        *copies = tensors.iter().map(like).collect::<Result<_>>()?;
    }
    copies
        .par_iter()
        .zip(tensors)
        .try_for_each(|((_, copy), (_, tensor))| copy.slice_set(&tensor.to_device(&Device::Cpu)?.contiguous()?, 0, 0))
        .map_err(Error::from)
}

/// Leaves the processors to training where it wants them all. Only on Linux does a thread have a priority of its own.
fn step_aside() {
    const NICE: i32 = 19;
    if cfg!(target_os = "linux") {
        // SAFETY: takes numbers, and changes nothing but the priority of the calling thread.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
    }
}
