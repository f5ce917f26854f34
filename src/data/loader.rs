//! Batches for the trainer, read ahead on other threads, from a position that can be saved.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::Deserialize;
use tracing::{info, warn};

use crate::data::datasets::{self, DatasetSpec, Position, StopOnDrop};
use crate::data::packing::{Batch, Packing, Positioned};
use crate::data::pipeline::{Encode, Plan, Tokenized, join, spawn};
use crate::data::remote::OpenRemote;
use crate::data::state::{Fingerprints, State};
use crate::{Error, Result};

/// Batches that may wait for the trainer.
const BATCHES_AHEAD: usize = 8;

#[derive(Debug, Clone)]
pub struct LoaderOptions {
    /// Rows of a batch on each rank.
    pub batch_size: usize,
    pub seq_len: usize,
    pub dp_rank: usize,
    pub dp_degree: usize,
    /// Seed of the shuffle; `None` keeps the order of the data.
    pub shuffle: Option<u64>,
    /// Whether to start over at the end of the data, as for training, or to end there, as for validation.
    pub repeat: bool,
    /// Threads that tokenize; `None` is one for each core but one.
    pub num_workers: Option<usize>,
}

/// Packs documents into rows: text one after another without a gap, as if it were one; conversations and other examples
/// each whole.
pub struct Loader {
    dataset: String,
    packing: Packing,
    plan: Plan,
    /// Of the first token behind the batches that were taken.
    position: Position,
    /// Of the files, where the data repeats: a run over data that ends is never resumed.
    fingerprints: Fingerprints,
    /// A batch that was read to see whether the data is good.
    ready: Option<Positioned>,
    running: Option<Running>,
}

/// The threads that read ahead; dropping it ends them.
struct Running {
    batches: Receiver<Result<Positioned>>,
    packer: JoinHandle<()>,
    _stop: StopOnDrop,
}

impl Loader {
    /// Opens the dataset. Of a local one the first batch is read, so that most faults show now.
    ///
    /// # Errors
    /// [`Error::Data`] if there is no such dataset, it is empty, or cannot fill one row (one batch, where it does not
    /// repeat); [`Error::Tokenizer`] if it is text and there is no `encoder`.
    pub fn new(
        spec: &DatasetSpec,
        encoder: Option<Arc<dyn Encode>>,
        options: LoaderOptions,
        open_remote: OpenRemote,
    ) -> Result<Self> {
        let LoaderOptions { batch_size, seq_len, dp_rank, dp_degree, shuffle, repeat, num_workers } = options;
        if encoder.is_none() && spec.dataset != "tokens" {
            return Err(Error::Tokenizer(format!("dataset {:?} is text, which needs a tokenizer", spec.dataset)));
        }
        let vocab_size = encoder.as_ref().map(|encoder| encoder.vocab_size());
        let dataset = datasets::open(spec, vocab_size, seq_len + 1, open_remote)?;
        let origin = dataset.files().origin.clone();
        let is_remote = dataset.files().is_remote();

        let fingerprints = if repeat { Fingerprints::of(dataset.files())? } else { Fingerprints::default() };
        let mut loader = Self {
            dataset: spec.dataset.clone(),
            packing: Packing {
                origin,
                batch_size,
                seq_len,
                dp_rank,
                dp_degree,
                keeps_whole: spec.is_of_examples(),
                masks: spec.masks_examples,
                said: Arc::default(),
            },
            plan: Plan { dataset, encoder, shuffle, repeat, n_workers: num_workers.unwrap_or_else(default_workers) },
            position: Position::default(),
            fingerprints,
            ready: None,
            running: None,
        };
        // What is remote may not be wanted from its beginning, should a state be loaded.
        if !is_remote {
            loader.ready = loader.pull(&|| Ok(()))?;
        }
        Ok(loader)
    }

    /// The next batch; `None` at the end of data that does not repeat. Waits where reading ahead has not kept up.
    ///
    /// # Errors
    /// What went wrong on the way to this batch. Calling again tries again.
    pub fn next_batch(&mut self) -> Result<Option<Batch>> {
        self.next_batch_while(&|| Ok(()))
    }

    /// As [`Loader::next_batch`], but gives up waiting when `waits` fails, which is asked now and then.
    pub fn next_batch_while(&mut self, waits: &dyn Fn() -> Result<()>) -> Result<Option<Batch>> {
        let next = match self.ready.take() {
            Some(ready) => Some(ready),
            None => self.pull(waits)?,
        };
        let Some((batch, position)) = next else { return Ok(None) };
        let (before, epoch) = (self.position.epoch + 1, position.epoch + 1);
        // Data smaller than a batch begins anew in every step: the second, fourth, eighth ... time tells enough.
        if epoch.ilog2() > before.ilog2() {
            let name = &self.dataset;
            match before {
                1 => warn!("dataset {name}: all of it was read, and it starts over: epoch {epoch}"),
                _ => info!("dataset {name}: epoch {epoch}"),
            }
        }
        self.position = position;
        Ok(Some(batch))
    }

    /// The next `n` batches of data that repeats, or none of them: after an error the position is as before.
    ///
    /// # Errors
    /// As [`Loader::next_batch_while`].
    pub fn next_batches(&mut self, n: usize, waits: &dyn Fn() -> Result<()>) -> Result<Vec<Batch>> {
        let before = self.position.clone();
        let ended = || Error::Data("the training data ended, though it should repeat".into());
        let batches = (0..n).map(|_| self.next_batch_while(waits)?.ok_or_else(ended)).collect::<Result<_>>();
        if batches.is_err() {
            self.position = before;
            self.running = None;
        }
        batches
    }

    fn pull(&mut self, waits: &dyn Fn() -> Result<()>) -> Result<Option<Positioned>> {
        const NOW_AND_THEN: Duration = Duration::from_millis(20);
        let running = match self.running.take() {
            Some(running) => running,
            None => self.start()?,
        };
        let next = loop {
            match running.batches.recv_timeout(NOW_AND_THEN) {
                Err(RecvTimeoutError::Timeout) => waits()?,
                next => break next,
            }
        };
        match next {
            Ok(batch) => {
                let batch = batch?;
                self.running = Some(running);
                Ok(Some(batch))
            }
            // The packer is through with the data, or it panicked.
            Err(_) => join(running.packer).map(|()| None),
        }
    }

    fn start(&self) -> Result<Running> {
        let (sender, batches) = sync_channel(BATCHES_AHEAD);
        let documents = Tokenized::new(&self.plan, self.position.clone())?;
        let stop = StopOnDrop(documents.stop());
        let whole = self.position == Position { epoch: self.position.epoch, ..Position::default() };
        let (packing, repeat) = (self.packing.clone(), self.plan.repeat);
        let packer = spawn("pack-data", move || packing.run(documents, whole, repeat, &sender))?;
        Ok(Running { batches, packer, _stop: stop })
    }

    /// Goes back to the first batch.
    pub fn rewind(&mut self) {
        self.go_to(Position::default());
    }

    fn go_to(&mut self, position: Position) {
        self.position = position;
        self.ready = None;
        // Should it fail, the next batch tries again and says why.
        self.running = self.start().ok();
    }

    /// The position behind the batches that were taken, whatever was read ahead of them.
    pub fn state(&self) -> serde_json::Value {
        serde_json::to_value(self.state_here()).expect("a state is plain data")
    }

    fn state_here(&self) -> State {
        let Plan { dataset, shuffle, .. } = &self.plan;
        let (seq_len, position) = (self.packing.seq_len, self.position.clone());
        State::new(&self.dataset, seq_len, *shuffle, position, dataset.files(), &self.fingerprints)
    }

    /// Continues where [`Loader::state`] was taken: the batches that followed it follow again, bit for bit.
    ///
    /// A shuffle goes on with the state's seed. Where the data is not what it was, a warning says what changed, and
    /// where the file that was being read is gone, the data starts over.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if `state` is not a loader's.
    pub fn load_state(&mut self, state: &serde_json::Value) -> Result<()> {
        let state = State::deserialize(state)
            .map_err(|error| Error::Checkpoint(format!("the saved data position cannot be read: {error}")))?;
        let files = self.plan.dataset.files();
        for change in state.changes(&self.state_here()) {
            warn!("{change}: the run goes on, but on other tokens than without that change");
        }

        let file = state.file.as_ref().map(|name| files.entries.iter().position(|entry| entry.name == *name));
        let position = match file {
            Some(None) => {
                warn!("dataset {} starts over: it lacks the file that was being read", self.dataset);
                Position::default()
            }
            Some(file) => Position { file, ..state.position },
            None => state.position,
        };
        // Another seed would lead to other documents from here on.
        self.plan.shuffle = self.plan.shuffle.map(|seed| state.shuffle_seed.unwrap_or(seed));
        self.go_to(position);
        Ok(())
    }
}

/// One for each core but the trainer's.
pub fn default_workers() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    (cores - 1).max(1)
}
