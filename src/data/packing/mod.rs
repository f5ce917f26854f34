//! Greedy packing: tokens of many documents, one after another, cut into rows; or documents that stay whole.

mod whole;

use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Once};

use candle_core::Device;

use crate::data::datasets::Position;
use crate::data::pipeline::{Tokenized, Tokens};
use crate::engine::MicroBatch;
use crate::ops::{self, IGNORE_INDEX};
use crate::{Error, Result};

/// Rows of token ids, and at each place the id that comes next.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// `(batch_size, seq_len)`, row after row; so are `labels`, where [`IGNORE_INDEX`] stands for what is not learned, and
    /// `document_starts`.
    pub inputs: Vec<u32>,
    pub labels: Vec<u32>,
    /// Where in its row the document of each token begins, of whole documents that are masked from each other.
    pub document_starts: Option<Vec<u32>>,
    pub batch_size: usize,
    pub seq_len: usize,
}

impl Batch {
    /// Labels that are learned.
    pub fn n_targets(&self) -> usize {
        self.labels.iter().filter(|label| **label != IGNORE_INDEX).count()
    }

    /// On `device`, as the engine takes it.
    ///
    /// # Errors
    /// [`Error::Model`] if a model of `vocab_size` does not know one of the tokens: ops on a GPU cannot say so.
    pub fn micro_batch(self, device: &Device, vocab_size: usize) -> Result<MicroBatch> {
        let labels = self.labels.iter().filter(|label| **label != IGNORE_INDEX);
        ops::check_tokens(self.inputs.iter().chain(labels), vocab_size)?;
        let tensor = |ids| ops::upload(ids, (self.batch_size, self.seq_len), device);
        let (tokens, labels) = (tensor(self.inputs)?, tensor(self.labels)?);
        Ok(MicroBatch { tokens, labels, document_starts: self.document_starts })
    }
}

/// A batch, and the position of the first token behind it.
pub type Positioned = (Batch, Position);

#[derive(Debug, Clone)]
pub struct Packing {
    /// What messages call the data.
    pub origin: String,
    /// Rows of a batch on each rank.
    pub batch_size: usize,
    pub seq_len: usize,
    /// Rank `r` of `n` gets rows `r * batch_size ..` of every `n * batch_size`, so that the order of the data and its
    /// position are the same on any number of ranks.
    pub dp_rank: usize,
    pub dp_degree: usize,
    /// Whether each document lies within one row, or is a part of one long text.
    pub keeps_whole: bool,
    /// Whether batches say where whole documents begin, for such a mask.
    pub masks: bool,
    /// What was said of cut documents, lest each pass say it again.
    pub said: Arc<Said>,
}

#[derive(Debug)]
pub struct Said {
    first_cut: Once,
    of_a_pass: Once,
}

impl Default for Said {
    fn default() -> Self {
        Self { first_cut: Once::new(), of_a_pass: Once::new() }
    }
}

impl Packing {
    /// A row of `seq_len` ids and the one behind it. Rows do not overlap.
    fn window(&self) -> usize {
        self.seq_len + 1
    }

    fn batch_tokens(&self) -> usize {
        self.dp_degree * self.batch_size * self.window()
    }

    /// Sends batches until the documents end, an error comes, or nobody takes them any more. Tokens that do not fill
    /// the last batch are dropped.
    ///
    /// `whole` says that the documents begin with a pass, so that what they lack is lacking. Data that repeats must
    /// fill a window in each pass; data that ends, a batch.
    pub fn run(&self, documents: Tokenized, whole: bool, repeat: bool, output: &SyncSender<Result<Positioned>>) {
        if self.keeps_whole {
            return self.run_whole(documents, whole, repeat, output);
        }
        let mut epoch = None;
        // Tokens of the pass, where it is known from its beginning.
        let mut pass_tokens = whole.then_some(0);
        let mut any = false;
        let mut buffer = Vec::with_capacity(self.batch_tokens());

        for document in documents {
            let Tokens { position, tokens, .. } = match document {
                Ok(document) => document,
                Err(error) => {
                    // Whoever is gone does not need it.
                    let _ = output.send(Err(error));
                    return;
                }
            };
            if epoch.is_some_and(|epoch| epoch != position.epoch) {
                if let Some(found) = pass_tokens.filter(|&found| found < self.window()) {
                    let _ = output.send(Err(self.too_small(found, self.window(), "one row takes seq_len + 1 =")));
                    return;
                }
                pass_tokens = Some(0);
            }
            epoch = Some(position.epoch);
            pass_tokens = pass_tokens.map(|sum| sum + tokens.len());

            let mut rest = tokens.get(position.token as usize..).unwrap_or_default();
            while !rest.is_empty() {
                let (now, later) = rest.split_at(rest.len().min(self.batch_tokens() - buffer.len()));
                buffer.extend_from_slice(now);
                rest = later;
                if buffer.len() == self.batch_tokens() {
                    let token = (tokens.len() - rest.len()) as u64;
                    let position = Position { token, ..position.clone() };
                    if output.send(Ok((self.batch(&buffer), position))).is_err() {
                        return;
                    }
                    any = true;
                    buffer.clear();
                }
            }
        }
        if whole && !any && !repeat {
            let found = buffer.len();
            let _ = output.send(Err(self.too_small(found, self.batch_tokens(), "one batch takes")));
        }
    }

    fn batch(&self, tokens: &[u32]) -> Batch {
        let rows = || tokens.chunks_exact(self.window()).skip(self.dp_rank * self.batch_size).take(self.batch_size);
        Batch {
            inputs: rows().flat_map(|row| &row[..self.seq_len]).copied().collect(),
            labels: rows().flat_map(|row| &row[1..]).copied().collect(),
            document_starts: None,
            batch_size: self.batch_size,
            seq_len: self.seq_len,
        }
    }

    fn too_small(&self, found: usize, needed: usize, what: &str) -> Error {
        let origin = &self.origin;
        Error::Data(format!(
            "{origin}: the dataset is too small: it has {found} tokens, but {what} {needed}; \
             give more text, or lower seq_len or local_batch_size"
        ))
    }
}
