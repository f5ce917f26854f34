//! Datasets of text: the records of one file after another.

use std::iter::Enumerate;
use std::sync::Arc;

use tracing::warn;

use super::files::Fetcher;
use super::records::{self, Fields, Place, Records};
use super::{Content, Dataset, Document, Documents, Files, Format, Position, Stop};
use crate::data::permutation::Permutation;
use crate::tools::random::keyed;
use crate::{Error, Result};

/// A block to be shuffled ends at whichever comes first, or with its file.
const BLOCK_RECORDS: usize = 4096;
const BLOCK_BYTES: usize = 64 << 20;

#[derive(Clone)]
pub struct TextDataset {
    pub files: Arc<Files>,
    pub format: Format,
    pub fields: Fields,
    pub max_bad_records: u64,
}

impl Dataset for TextDataset {
    fn files(&self) -> &Files {
        &self.files
    }

    /// Shuffles the files, and the records of each within blocks. The records of a plain text file stay in order: they
    /// are one document.
    fn pass(&self, from: Position, shuffle: Option<u64>, stop: &Stop) -> Documents {
        let order = FileOrder::new(self.files.entries.len(), shuffle, from.epoch);
        Box::new(Pass {
            dataset: self.clone(),
            shuffle_records: shuffle.filter(|_| self.format != Format::Text),
            place_in_order: from.file.map_or(0, |file| order.place_of(file)),
            order,
            fetcher: Fetcher::new(self.files.clone(), stop.clone()),
            reader: None,
            bad_records: from.bad_records,
            block: Vec::new().into_iter().enumerate(),
            resume: from.file.is_some().then(|| from.clone()),
            start: from,
        })
    }
}

/// One pass over the files, under way.
struct Pass {
    dataset: TextDataset,
    shuffle_records: Option<u64>,
    order: FileOrder,
    place_in_order: usize,
    fetcher: Fetcher,
    /// Of the file at `place_in_order`, once it is being read.
    reader: Option<Box<dyn Records>>,
    bad_records: u64,
    /// Where to begin, until that is done.
    resume: Option<Position>,
    /// Where `block` begins.
    start: Position,
    /// The rest of the block, each record with its index.
    block: Enumerate<std::vec::IntoIter<Content>>,
}

impl Iterator for Pass {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some((index, content)) = self.block.next() {
                let position = Position { index: index as u64, ..self.start.clone() };
                return Some(Ok(Document { position, content }));
            }
            match self.read_block() {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

impl Pass {
    /// Reads the next block, which may turn out empty at the end of a file; false at the end of the pass.
    fn read_block(&mut self) -> Result<bool> {
        let Some(file) = self.order.file_at(self.place_in_order) else { return Ok(false) };
        let resume = self.resume.take();
        let mut reader = match self.reader.take() {
            Some(reader) => reader,
            None => {
                let place = resume.as_ref().map_or(Place::default(), |at| Place { offset: at.offset, line: at.line });
                self.open(file, place)?
            }
        };

        let Place { offset, line } = reader.place();
        let (epoch, bad_records) = (self.start.epoch, self.bad_records);
        self.start = Position { epoch, file: Some(file), offset, line, index: 0, bad_records, token: 0 };

        let max_records = if self.shuffle_records.is_some() { BLOCK_RECORDS } else { 1 };
        let (mut records, mut bytes) = (Vec::new(), 0);
        while records.len() < max_records && bytes < BLOCK_BYTES {
            match reader.next()? {
                Some(Ok(record)) => {
                    bytes += record.text_bytes();
                    records.push(record);
                }
                Some(Err(fault)) => self.skip_bad(fault)?,
                None => {
                    self.place_in_order += 1;
                    break;
                }
            }
        }
        if self.order.file_at(self.place_in_order) == Some(file) {
            self.reader = Some(reader);
        }

        if let Some(seed) = self.shuffle_records {
            let random = keyed(seed, "order of records", &format!("{epoch} {file} {line}"));
            records = Permutation::new(records.len() as u64, random).shuffle(records);
        }
        self.block = records.into_iter().enumerate();
        self.block.by_ref().take(resume.map_or(0, |at| at.index as usize)).for_each(drop);
        Ok(true)
    }

    fn open(&mut self, file: usize, place: Place) -> Result<Box<dyn Records>> {
        let path = self.fetcher.path(file, self.order.file_at(self.place_in_order + 1))?;
        let TextDataset { files, format, fields, .. } = &self.dataset;
        records::open(&path, &files.label(file), *format, fields, place)
    }

    fn skip_bad(&mut self, fault: String) -> Result<()> {
        let max = self.dataset.max_bad_records;
        self.bad_records += 1;
        if self.bad_records <= max {
            warn!("skipped malformed record {} of at most {max}: {fault}", self.bad_records);
            return Ok(());
        }
        Err(Error::Data(match max {
            0 => format!("{fault} (data.max_bad_records says how many malformed records may be skipped; it is 0)"),
            _ => format!("{fault} (more than data.max_bad_records = {max} malformed records)"),
        }))
    }
}

/// The order in which a pass reads files.
struct FileOrder {
    n_files: usize,
    shuffled: Option<Permutation>,
}

impl FileOrder {
    fn new(n_files: usize, shuffle: Option<u64>, epoch: u64) -> Self {
        let permutation = |seed| Permutation::new(n_files as u64, keyed(seed, "order of files", &epoch.to_string()));
        Self { n_files, shuffled: shuffle.map(permutation) }
    }

    fn file_at(&self, place: usize) -> Option<usize> {
        let file = |order: &Permutation| order.at(place as u64) as usize;
        (place < self.n_files).then(|| self.shuffled.as_ref().map_or(place, file))
    }

    fn place_of(&self, file: usize) -> usize {
        (0..self.n_files).find(|&place| self.file_at(place) == Some(file)).unwrap_or(self.n_files)
    }
}
