//! Packing of documents that stay whole: each lies within one row, and rows are filled up where the next does not fit.

use std::sync::mpsc::SyncSender;

use tracing::{info, warn};

use super::{Batch, Packing, Positioned};
use crate::data::datasets::Position;
use crate::data::pipeline::{Tokenized, Tokens};
use crate::ops::IGNORE_INDEX;
use crate::{Error, Result};

/// A row that is being filled, at most `seq_len` places.
#[derive(Default)]
struct Row {
    inputs: Vec<u32>,
    labels: Vec<u32>,
    document_starts: Vec<u32>,
}

/// What became of the documents of a pass.
#[derive(Default)]
struct Counts {
    documents: usize,
    cut: usize,
    /// Of those cut, the ones of which nothing to learn was left, and documents that had nothing.
    left_out: usize,
}

impl Packing {
    /// As [`Packing::run`], whose `whole` is `from_start` here. The last batch of data that ends is filled up.
    pub(super) fn run_whole(
        &self,
        documents: Tokenized,
        from_start: bool,
        repeat: bool,
        output: &SyncSender<Result<Positioned>>,
    ) {
        if let Err(error) = self.pack(documents, from_start, repeat, output) {
            // Whoever is gone does not need it.
            let _ = output.send(Err(error));
        }
    }

    fn pack(
        &self,
        documents: Tokenized,
        from_start: bool,
        repeat: bool,
        output: &SyncSender<Result<Positioned>>,
    ) -> Result<()> {
        let n_rows = self.dp_degree * self.batch_size;
        let mut rows: Vec<Row> = Vec::new();
        let mut behind = Position::default();
        // Of the pass, where it is known from its beginning.
        let mut counts = from_start.then(Counts::default);
        let mut epoch = None;

        for document in documents {
            let Tokens { position, tokens, learned, .. } = document?;
            if epoch.is_some_and(|epoch| epoch != position.epoch) {
                counts.as_ref().map_or(Ok(()), |counts| self.check_pass(counts))?;
                counts = Some(Counts::default());
            }
            epoch = Some(position.epoch);
            behind = Position { token: tokens.len() as u64, ..position.clone() };
            if position.token > 0 {
                continue; // it was packed before this run was resumed
            }

            let n = tokens.len().min(self.seq_len + 1);
            let cut = n < tokens.len();
            if cut {
                self.said.first_cut.call_once(|| {
                    let (origin, found, seq_len) = (&self.origin, tokens.len(), self.seq_len);
                    warn!("{origin}: a document of {found} tokens is cut to training.seq_len = {seq_len}, as others may be");
                });
            }
            let learned = learned.unwrap_or_else(|| vec![true; tokens.len()]);
            // The first token is nobody's next.
            let is_left_out = !learned[..n].iter().skip(1).any(|learned| *learned);
            if let Some(counts) = &mut counts {
                counts.documents += 1;
                counts.cut += usize::from(cut);
                counts.left_out += usize::from(is_left_out);
            }
            if is_left_out {
                continue;
            }

            let fits = |row: &Row| row.inputs.len() + n - 1 <= self.seq_len;
            if !rows.last().is_some_and(fits) {
                if rows.len() == n_rows {
                    let batch = self.batch_of(std::mem::take(&mut rows));
                    if output.send(Ok((batch, position))).is_err() {
                        return Ok(());
                    }
                }
                rows.push(Row::default());
            }
            rows.last_mut().expect("pushed above").push(&tokens[..n], &learned[..n]);
        }

        counts.as_ref().map_or(Ok(()), |counts| self.check_pass(counts))?;
        if !repeat && !rows.is_empty() {
            let _ = output.send(Ok((self.batch_of(rows), behind)));
        }
        Ok(())
    }

    /// Says how many documents of a pass were cut.
    ///
    /// # Errors
    /// [`Error::Data`] if there was nothing to learn in all of it.
    fn check_pass(&self, &Counts { documents, cut, left_out }: &Counts) -> Result<()> {
        let (origin, seq_len) = (&self.origin, self.seq_len);
        if left_out == documents {
            return Err(Error::Data(format!(
                "{origin}: there is nothing to learn in any of its {documents} documents, {cut} of which were cut to \
                 seq_len = {seq_len} tokens\n   = raise training.seq_len, or look at what `titan train` says of the chat template"
            )));
        }
        if cut + left_out > 0 {
            self.said.of_a_pass.call_once(|| {
                info!(
                    "{origin}: of {documents} documents {cut} were longer than seq_len = {seq_len} and cut; {left_out} were \
                     left out, as there was nothing to learn in them"
                );
            });
        }
        Ok(())
    }

    fn batch_of(&self, mut rows: Vec<Row>) -> Batch {
        rows.resize_with(self.dp_degree * self.batch_size, Row::default);
        rows.iter_mut().for_each(|row| row.fill_up(self.seq_len));
        let rows = || rows.iter().skip(self.dp_rank * self.batch_size).take(self.batch_size);
        Batch {
            inputs: rows().flat_map(|row| &row.inputs).copied().collect(),
            labels: rows().flat_map(|row| &row.labels).copied().collect(),
            document_starts: self.masks.then(|| rows().flat_map(|row| &row.document_starts).copied().collect()),
            batch_size: self.batch_size,
            seq_len: self.seq_len,
        }
    }
}

impl Row {
    /// Appends a document. Its last token is only predicted.
    fn push(&mut self, tokens: &[u32], learned: &[bool]) {
        let start = self.inputs.len() as u32;
        let places = tokens.len() - 1;
        self.inputs.extend(&tokens[..places]);
        let labels = tokens.iter().zip(learned).skip(1);
        self.labels.extend(labels.map(|(token, learned)| if *learned { *token } else { IGNORE_INDEX }));
        self.document_starts.extend(std::iter::repeat_n(start, places));
    }

    /// With token 0, as a document that nobody learns or sees.
    fn fill_up(&mut self, seq_len: usize) {
        let start = self.inputs.len() as u32;
        self.inputs.resize(seq_len, 0);
        self.labels.resize(seq_len, IGNORE_INDEX);
        self.document_starts.resize(seq_len, start);
    }
}
