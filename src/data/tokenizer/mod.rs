//! Text to token ids and back, through tokenizers in Hugging Face's format.

mod load;
mod stream;
pub mod train;

use std::collections::HashMap;
use std::path::Path;

pub use stream::TokenStream;

use crate::{Error, Result};

/// A tokenizer and the files it was read from.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bos: Option<Mark>,
    eos: Option<Mark>,
    vocab_size: usize,
    files: Vec<TokenizerFile>,
}

/// One file of a tokenizer's folder, as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenizerFile {
    pub name: String,
    pub bytes: Vec<u8>,
}

/// BOS or EOS.
#[derive(Clone, Copy)]
struct Mark {
    id: u32,
    /// The tokenizer's post-processor puts it there by itself.
    added_by_tokenizer: bool,
}

impl Tokenizer {
    /// Reads `tokenizer.json`; else `vocab.json` or `vocab.txt`, as byte-level BPE where `merges.txt` is beside it and
    /// as whole words where it is not. BOS, EOS and further special tokens come from `tokenizer_config.json`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the folder holds no tokenizer, or one that cannot be understood; [`Error::Io`].
    pub fn from_dir(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::from_files(load::read_files(path)?, &path.display().to_string())
    }

    /// The files of a folder that [`Tokenizer::from_dir`] reads; none if it holds no tokenizer.
    pub fn files_in(path: &Path) -> Result<Vec<TokenizerFile>> {
        if load::has_tokenizer(path) { load::read_files(path) } else { Ok(Vec::new()) }
    }

    /// A tokenizer from the contents of its files, as [`Tokenizer::files`] gives them. `origin` is for messages.
    pub fn from_files(files: Vec<TokenizerFile>, origin: &str) -> Result<Self> {
        load::build(files, origin)
    }

    /// Ids of `text`, with BOS before it and EOS behind it exactly as asked, never twice, whether or not the tokenizer
    /// adds them by itself. Where the tokenizer has no such token, none is added.
    pub fn encode(&self, text: &str, add_bos: bool, add_eos: bool) -> Result<Vec<u32>> {
        let encoding =
            self.inner.encode_fast(text, true).map_err(|e| Error::Tokenizer(format!("cannot encode text: {e}")))?;
        let mut ids = encoding.get_ids();
        if self.bos.is_some_and(|bos| bos.added_by_tokenizer && ids.first() == Some(&bos.id)) {
            ids = &ids[1..];
        }
        if self.eos.is_some_and(|eos| eos.added_by_tokenizer && ids.last() == Some(&eos.id)) {
            ids = &ids[..ids.len() - 1];
        }
        let bos = self.bos_id().filter(|_| add_bos);
        let eos = self.eos_id().filter(|_| add_eos);
        Ok(bos.into_iter().chain(ids.iter().copied()).chain(eos).collect())
    }

    /// Text of `ids`, without special tokens. Bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|e| Error::Tokenizer(format!("cannot decode {} ids: {e}", ids.len())))
    }

    /// Decodes ids as they are generated.
    pub fn stream(&self) -> TokenStream<'_> {
        TokenStream::new(self)
    }

    /// The highest id + 1: the rows that an embedding needs. Ids may have holes.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    pub fn bos_id(&self) -> Option<u32> {
        self.bos.map(|bos| bos.id)
    }

    pub fn eos_id(&self) -> Option<u32> {
        self.eos.map(|eos| eos.id)
    }

    /// Id of one token by its exact content, special tokens included.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The files as they were read: written into another folder they make the same tokenizer.
    pub fn files(&self) -> &[TokenizerFile] {
        &self.files
    }
}

/// The highest id + 1 of everything that `inner` can yield.
fn vocab_size(inner: &tokenizers::Tokenizer) -> usize {
    let vocab: HashMap<String, u32> = inner.get_vocab(true);
    vocab.values().max().map_or(0, |&id| id as usize + 1)
}
