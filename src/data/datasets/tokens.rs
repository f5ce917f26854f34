//! Token ids from files: raw, llm.c's, Megatron's.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use serde::{Deserialize, Serialize};
use tracing::info;

use super::{Content, Dataset, Document, Documents, FileEntry, Files, Position, Stop};
use crate::data::permutation::Permutation;
use crate::data::tokenizer::MAX_VOCAB_SIZE;
use crate::tools::files;
use crate::tools::random::keyed;
use crate::{Error, Result};

/// Ids read at once where the order is that of the files.
const CHUNK: u64 = 64 * 1024;

const LLMC_HEADER_BYTES: usize = 1024;
const LLMC_U16: i32 = 20240520;
const LLMC_U32: i32 = 20240801;
const MEGATRON_MAGIC: &[u8] = b"MMIDIDX\0\0";
const MEGATRON_HEADER_BYTES: usize = 34;

/// How an id is stored, little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    U16,
    U32,
}

impl Dtype {
    /// The smallest that holds every id of a vocabulary.
    pub fn for_vocab(vocab_size: usize) -> Self {
        if vocab_size <= 1 << 16 { Self::U16 } else { Self::U32 }
    }

    /// Bytes of an id.
    pub fn bytes(self) -> usize {
        match self {
            Self::U16 => 2,
            Self::U32 => 4,
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::U16 => "u16",
            Self::U32 => "u32",
        })
    }
}

/// What `NAME.json` says of the token ids in `NAME.bin`. With it, no tokenizer is needed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sidecar {
    pub vocab_size: usize,
    #[serde(default)]
    pub eos_id: Option<u32>,
    /// Where absent, what the vocabulary needs.
    #[serde(default)]
    pub dtype: Option<Dtype>,
}

impl Sidecar {
    pub fn path(bin: &Path) -> PathBuf {
        bin.with_extension("json")
    }

    fn read(bin: &Path) -> Result<Option<Self>> {
        let path = Self::path(bin);
        let text = match files::read(&path, 1_000_000) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("cannot read", &path)(error)),
        };
        let fault = |what: String| {
            let example = r#"{"vocab_size": 2048, "eos_id": 1, "dtype": "u16"}"#;
            Error::Data(format!("{}: {what}; it must be like {example}", path.display()))
        };
        let sidecar: Self = serde_json::from_slice(&text).map_err(|error| fault(error.to_string()))?;
        if !(1..=MAX_VOCAB_SIZE).contains(&sidecar.vocab_size) {
            return Err(fault(format!("vocab_size {} is not from 1 to {MAX_VOCAB_SIZE}", sidecar.vocab_size)));
        }
        if let Some(eos_id) = sidecar.eos_id.filter(|&id| id as usize >= sidecar.vocab_size) {
            return Err(fault(format!("eos_id {eos_id} is no id below vocab_size {}", sidecar.vocab_size)));
        }
        Ok(Some(sidecar))
    }
}

/// What token shards say of themselves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Vocabulary {
    pub vocab_size: usize,
    pub eos_id: Option<u32>,
}

impl Vocabulary {
    /// What the sidecars agree on; `None` where there are none.
    pub fn of_files(files: &Files) -> Result<Option<Self>> {
        let mut agreed: Option<(Self, PathBuf)> = None;
        for entry in &files.entries {
            let Some(sidecar) = Sidecar::read(entry.path())? else { continue };
            let (path, eos_id) = (Sidecar::path(entry.path()), sidecar.eos_id);
            let this = Self { vocab_size: sidecar.vocab_size, eos_id };
            match &agreed {
                Some((other, first)) if *other != this => {
                    return Err(Error::Data(format!(
                        "{}: vocab_size {} and eos_id {:?} differ from {} and {:?} in {}",
                        path.display(),
                        this.vocab_size,
                        this.eos_id,
                        other.vocab_size,
                        other.eos_id,
                        first.display()
                    )));
                }
                Some(_) => {}
                None => agreed = Some((this, path)),
            }
        }
        Ok(agreed.map(|(vocabulary, _)| vocabulary))
    }
}

/// Token shards, as if they were one after another in one file.
pub struct TokenDataset {
    shards: Arc<Shards>,
    /// Ids that stay together when the order is shuffled.
    window: u64,
}

struct Shards {
    files: Files,
    vocab_size: usize,
    shards: Vec<Shard>,
    /// Ids before each shard, and in all.
    starts: Vec<u64>,
}

/// One file's ids, mapped into memory.
struct Shard {
    map: Mmap,
    header_bytes: usize,
    dtype: Dtype,
}

impl TokenDataset {
    /// `vocab_size` is that of the tokenizer, needed only where no sidecar names it.
    pub fn open(files: Files, vocab_size: Option<usize>, window: usize) -> Result<Self> {
        let vocabulary = Vocabulary::of_files(&files)?;
        let Some(vocab_size) = vocabulary.map(|v| v.vocab_size).or(vocab_size) else {
            let sidecar = Sidecar::path(files.entries[0].path());
            return Err(Error::Data(format!(
                "{}: give the vocabulary of these token ids, by a tokenizer or by a file {} such as {}",
                files.origin,
                sidecar.display(),
                r#"{"vocab_size": 2048, "eos_id": 1, "dtype": "u16"}"#
            )));
        };
        let open = |entry: &FileEntry| Shard::open(entry.path(), vocab_size);
        let shards = files.entries.iter().map(open).collect::<Result<Vec<_>>>()?;
        let mut starts = vec![0];
        for shard in &shards {
            starts.push(starts[starts.len() - 1] + shard.len());
        }
        let n_tokens = starts[shards.len()];
        if n_tokens < window as u64 {
            return Err(Error::Data(format!(
                "{}: the dataset is too small: it has {n_tokens} tokens, but one row takes seq_len + 1 = {window}",
                files.origin
            )));
        }
        info!("{}: {n_tokens} tokens in {} shards, vocabulary {vocab_size}", files.origin, shards.len());
        Ok(Self { shards: Arc::new(Shards { files, vocab_size, shards, starts }), window: window as u64 })
    }
}

impl Dataset for TokenDataset {
    fn files(&self) -> &Files {
        &self.shards.files
    }

    fn pass(&self, from: Position, shuffle: Option<u64>, _stop: &Stop) -> Documents {
        match shuffle {
            None => Box::new(in_order(self.shards.clone(), from)),
            Some(seed) => Box::new(windows(self.shards.clone(), self.window, from, seed)),
        }
    }
}

fn in_order(shards: Arc<Shards>, from: Position) -> impl Iterator<Item = Result<Document>> + Send {
    let (mut file, mut offset) = (from.file.unwrap_or(0), from.offset);
    std::iter::from_fn(move || {
        while offset >= shards.shards.get(file)?.len() {
            (file, offset) = (file + 1, 0);
        }
        let ids = offset..(offset + CHUNK).min(shards.shards[file].len());
        let position = Position { epoch: from.epoch, file: Some(file), offset, ..Position::default() };
        offset = ids.end;
        let mut tokens = Vec::new();
        let read = shards.read(file, ids, &mut tokens);
        Some(read.map(|()| Document { position, content: Content::Tokens(tokens) }))
    })
}

/// Windows at multiples of their length, shuffled over all shards; what is left after the last one is not used.
fn windows(
    shards: Arc<Shards>,
    window: u64,
    from: Position,
    seed: u64,
) -> impl Iterator<Item = Result<Document>> + Send {
    let n_windows = shards.starts[shards.shards.len()] / window;
    let order = Permutation::new(n_windows, keyed(seed, "order of windows", &from.epoch.to_string()));
    (from.index..n_windows).map(move |index| {
        let mut start = order.at(index) * window;
        let end = start + window;
        let mut tokens = Vec::with_capacity(window as usize);
        let mut file = shards.starts.partition_point(|&first| first <= start) - 1;
        while start < end {
            let (first, next) = (shards.starts[file], shards.starts[file + 1]);
            let until = end.min(next);
            shards.read(file, start - first..until - first, &mut tokens)?;
            (file, start) = (file + 1, until);
        }
        let position = Position { epoch: from.epoch, index, ..Position::default() };
        Ok(Document { position, content: Content::Tokens(tokens) })
    })
}

impl Shards {
    /// Appends the ids at `ids` of a file.
    fn read(&self, file: usize, ids: std::ops::Range<u64>, tokens: &mut Vec<u32>) -> Result<()> {
        let already = tokens.len();
        let first = ids.start;
        self.shards[file].read(ids, tokens);
        match tokens[already..].iter().position(|&id| id as usize >= self.vocab_size) {
            None => Ok(()),
            Some(i) => Err(Error::Data(format!(
                "{}: token {} is {}, but the vocabulary ends at {}; is the dtype right?",
                self.files.label(file),
                first + i as u64,
                tokens[already + i],
                self.vocab_size - 1
            ))),
        }
    }
}

impl Shard {
    fn open(path: &Path, vocab_size: usize) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("cannot open", path))?;
        // SAFETY: nobody writes to the file while it is mapped: titan writes shards under another name and renames
        // them, and data files are not for other programs to change under a running training either.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("cannot map", path))?;
        let fault = |message: String| Error::Data(format!("{}: {message}", path.display()));

        let sidecar = Sidecar::read(path)?.and_then(|sidecar| sidecar.dtype);
        let llmc = llmc_header(&map).map_err(fault)?;
        let (header_bytes, dtype) = match (llmc, megatron_dtype(path, map.len())?) {
            (Some((dtype, _)), _) => (LLMC_HEADER_BYTES, dtype),
            (None, Some(dtype)) => (0, dtype),
            (None, None) => (0, sidecar.unwrap_or(Dtype::for_vocab(vocab_size))),
        };
        let bytes = map.len() - header_bytes;
        if sidecar.is_some_and(|said| said != dtype) {
            return Err(fault(format!("holds {dtype} ids, but {} says otherwise", Sidecar::path(path).display())));
        }
        if bytes % dtype.bytes() != 0 {
            return Err(fault(format!("{bytes} bytes are not a whole number of {dtype} ids; is it complete?")));
        }
        if let Some((_, n_tokens)) = llmc.filter(|&(dtype, n_tokens)| n_tokens * dtype.bytes() != bytes) {
            let found = bytes / dtype.bytes();
            return Err(fault(format!("its header says {n_tokens} ids, but it has {found}; is it complete?")));
        }
        Ok(Self { map, header_bytes, dtype })
    }

    fn len(&self) -> u64 {
        ((self.map.len() - self.header_bytes) / self.dtype.bytes()) as u64
    }

    fn read(&self, ids: std::ops::Range<u64>, tokens: &mut Vec<u32>) {
        let at = |id: u64| self.header_bytes + id as usize * self.dtype.bytes();
        let bytes = &self.map[at(ids.start)..at(ids.end)];
        match self.dtype {
            Dtype::U16 => tokens.extend(bytes.as_chunks().0.iter().map(|&id| u32::from(u16::from_le_bytes(id)))),
            Dtype::U32 => tokens.extend(bytes.as_chunks().0.iter().map(|&id| u32::from_le_bytes(id))),
        }
    }
}

/// The dtype and number of ids that llm.c's header states, where there is one: 256 i32, of which the first are a
/// magic number that tells the dtype, a version, and the number of ids.
fn llmc_header(bytes: &[u8]) -> Result<Option<(Dtype, usize)>, String> {
    let Some(header) = bytes.get(..LLMC_HEADER_BYTES) else { return Ok(None) };
    let field = |i: usize| i32::from_le_bytes(std::array::from_fn(|byte| header[4 * i + byte]));
    let (dtype, version) = match field(0) {
        LLMC_U16 => (Dtype::U16, 1),
        LLMC_U32 => (Dtype::U32, 7),
        _ => return Ok(None),
    };
    if field(1) != version {
        return Err(format!("llm.c header of version {}; known is {version}", field(1)));
    }
    Ok(Some((dtype, field(2) as u32 as usize)))
}

/// The dtype of Megatron's `NAME.bin`, where its `NAME.idx` is there, whose sequences must follow one another.
///
/// All little-endian: magic (9 bytes), u64 version, u8 dtype code, u64 sequences, u64 document marks, i32 length
/// of each sequence, i64 byte offset of each; then documents and modes, which packing has no use for.
fn megatron_dtype(bin: &Path, bin_bytes: usize) -> Result<Option<Dtype>> {
    let path = bin.with_extension("idx");
    if !path.is_file() {
        return Ok(None);
    }
    let index = std::fs::read(&path).map_err(Error::io("cannot read", &path))?;
    let fault = |message: String| Error::Data(format!("{}: {message}", path.display()));
    if index.len() < MEGATRON_HEADER_BYTES || !index.starts_with(MEGATRON_MAGIC) {
        return Err(fault("not an index of Megatron's".to_owned()));
    }
    let dtype = match index[17] {
        // Ids are not negative, so i32 reads as u32.
        4 => Dtype::U32,
        8 => Dtype::U16,
        code => return Err(fault(format!("dtype code {code}; known are 4 (i32) and 8 (u16)"))),
    };
    let n = u64::from_le_bytes(std::array::from_fn(|byte| index[18 + byte])) as usize;
    let body = &index[MEGATRON_HEADER_BYTES..];
    let Some((lengths, offsets)) = n.checked_mul(12).and_then(|size| body.get(..size)).map(|b| b.split_at(4 * n))
    else {
        return Err(fault(format!("too short for its {n} sequences; is it complete?")));
    };
    let mut expected = 0;
    for (length, offset) in lengths.as_chunks().0.iter().zip(offsets.as_chunks().0) {
        if i64::from_le_bytes(*offset) != expected {
            return Err(fault(format!("its sequences do not follow one another at byte {expected} of the .bin")));
        }
        let length = i32::from_le_bytes(*length);
        if length < 0 {
            return Err(fault(format!("it has a sequence of {length} ids")));
        }
        expected += i64::from(length) * dtype.bytes() as i64;
    }
    if expected != bin_bytes as i64 {
        return Err(fault(format!("describes {expected} bytes, but {} has {bin_bytes}", bin.display())));
    }
    Ok(Some(dtype))
}
