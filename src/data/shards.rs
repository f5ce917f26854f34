//! Tokens written to files, for the dataset `tokens` to read.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::data::datasets::{Dtype, Position, Sidecar};
use crate::data::pipeline::{Plan, Tokenized};
use crate::tools::files::NewFile;
use crate::{Error, Result};

/// Writes `NAME-00000.bin`, `NAME-00001.bin`, ... into a folder, each with its [`Sidecar`]. A shard appears when it is
/// complete.
pub struct ShardWriter {
    folder: PathBuf,
    name: String,
    sidecar: Sidecar,
    dtype: Dtype,
    shard_tokens: u64,
    n_shards: usize,
    current: Option<(BufWriter<NewFile>, u64)>,
}

impl ShardWriter {
    /// A shard is closed with the document that brings it to `shard_tokens`.
    ///
    /// # Errors
    /// [`Error::Usage`] if the folder holds shards of this name already, whose rest would mix with the new ones, or if
    /// `dtype` cannot hold every id of the vocabulary.
    pub fn new(folder: &Path, name: &str, sidecar: Sidecar, shard_tokens: u64) -> Result<Self> {
        let needed = Dtype::for_vocab(sidecar.vocab_size);
        let dtype = sidecar.dtype.unwrap_or(needed);
        if needed.bytes() > dtype.bytes() {
            let size = sidecar.vocab_size;
            return Err(Error::Usage(format!("u16 cannot hold the ids of a vocabulary of {size}; u32 can")));
        }
        std::fs::create_dir_all(folder).map_err(Error::io("cannot create", folder))?;
        let sidecar = Sidecar { dtype: Some(dtype), ..sidecar };
        let name = name.to_owned();
        let writer = Self { folder: folder.to_owned(), name, sidecar, dtype, shard_tokens, n_shards: 0, current: None };
        let first = writer.path(0);
        if first.exists() {
            return Err(Error::Usage(format!(
                "{} exists already; remove the shards there, or write to another folder",
                first.display()
            )));
        }
        Ok(writer)
    }

    fn path(&self, shard: usize) -> PathBuf {
        self.folder.join(format!("{}-{shard:05}.bin", self.name))
    }

    /// Appends a document's tokens, which must be ids of the vocabulary.
    pub fn write(&mut self, tokens: &[u32]) -> Result<()> {
        let (mut file, n_tokens) = match self.current.take() {
            Some(current) => current,
            None => {
                let path = self.path(self.n_shards);
                let file = NewFile::create(&path).map_err(Error::io("cannot write", path))?;
                (BufWriter::with_capacity(1 << 20, file), 0)
            }
        };
        let bytes: Vec<u8> = match self.dtype {
            Dtype::U16 => tokens.iter().flat_map(|&id| (id as u16).to_le_bytes()).collect(),
            Dtype::U32 => tokens.iter().flat_map(|&id| id.to_le_bytes()).collect(),
        };
        file.write_all(&bytes).map_err(Error::io("cannot write shards to", &self.folder))?;
        self.current = Some((file, n_tokens + tokens.len() as u64));
        if n_tokens + tokens.len() as u64 >= self.shard_tokens {
            self.close_shard()?;
        }
        Ok(())
    }

    /// Closes the last shard, and says how many there are.
    pub fn finish(mut self) -> Result<usize> {
        self.close_shard()?;
        Ok(self.n_shards)
    }

    fn close_shard(&mut self) -> Result<()> {
        let Some((file, _)) = self.current.take() else { return Ok(()) };
        let path = self.path(self.n_shards);
        let keep = || {
            // The sidecar first, so that a shard never stands without it.
            let mut sidecar = NewFile::create(&Sidecar::path(&path))?;
            serde_json::to_writer(&mut sidecar, &self.sidecar)?;
            sidecar.keep()?;
            file.into_inner()?.keep()
        };
        keep().map_err(Error::io("cannot write", &path))?;
        self.n_shards += 1;
        Ok(())
    }
}

/// What was tokenized.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Counts {
    pub documents: u64,
    pub tokens: u64,
    pub text_bytes: u64,
    pub shards: usize,
}

/// Tokenizes one pass over a dataset into shards; `progress` is told after each document where it began.
pub fn tokenize(plan: &Plan, mut writer: ShardWriter, mut progress: impl FnMut(&Counts, &Position)) -> Result<Counts> {
    let mut counts = Counts::default();
    for document in Tokenized::new(plan, Position::default())? {
        let document = document?;
        writer.write(&document.tokens)?;
        counts.documents += u64::from(document.ends);
        counts.tokens += document.tokens.len() as u64;
        counts.text_bytes += document.text_bytes as u64;
        progress(&counts, &document.position);
    }
    counts.shards = writer.finish()?;
    Ok(counts)
}
