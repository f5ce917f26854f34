//! Text to token ids and back, through tokenizers in Hugging Face's format.

mod load;
mod stream;
mod template;
pub mod train;

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};

pub use stream::TokenStream;
pub use template::ChatTemplate;

use crate::data::chat::{Example, Message};
use crate::{Error, Result};

/// A tokenizer and the files it was read from.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bos: Option<Mark>,
    eos: Option<Mark>,
    vocab_size: usize,
    files: Vec<TokenizerFile>,
    /// Once it was asked for.
    chat_template: OnceLock<Arc<ChatTemplate>>,
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

    /// How conversations are written for this tokenizer: its own template, else ChatML, with a warning.
    pub fn chat_template(&self) -> Result<Arc<ChatTemplate>> {
        if let Some(template) = self.chat_template.get() {
            return Ok(template.clone());
        }
        let template = Arc::new(ChatTemplate::of(self)?);
        Ok(self.chat_template.get_or_init(|| template).clone())
    }

    /// The tokens of a conversation. Learned is what the assistant wrote, to the end of its turns.
    ///
    /// # Errors
    /// As for [`ChatTemplate::render_learned`].
    pub fn encode_chat(&self, messages: &[Message]) -> Result<Example> {
        let (text, mut spans) = self.chat_template()?.render_learned(messages)?;
        for span in &mut spans {
            // Whatever the template writes behind the token that ends a turn, nobody waits for it.
            let written = text[span.clone()].trim_end();
            if self.special_tokens().any(|token| written.ends_with(&token)) {
                span.end = span.start + written.len();
            }
        }
        let encoding = self.encode_verbatim(&text)?;
        let is_learned = |&(start, end): &(usize, usize)| spans.iter().any(|span| start < span.end && end > span.start);
        let learned = encoding.get_offsets().iter().map(is_learned).collect();
        Ok(Example { tokens: encoding.get_ids().to_vec(), learned })
    }

    /// The ids up to where the assistant's next message begins.
    pub fn encode_chat_prompt(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let text = self.chat_template()?.render(messages, true)?;
        Ok(self.encode_verbatim(&text)?.get_ids().to_vec())
    }

    /// The special tokens that the chat template puts behind what an assistant says, and EOS.
    pub fn ends_of_turn(&self) -> Result<Vec<u32>> {
        const SAID: &str = "hello";
        let messages = [Message::new("user", SAID), Message::new("assistant", SAID)];
        let text = self.chat_template()?.render(&messages, false)?;
        let behind = text.rfind(SAID).map_or("", |at| text[at + SAID.len()..].trim_start());
        let end = self.special_tokens().find(|token| behind.starts_with(token.as_str()));
        Ok(end.and_then(|token| self.token_id(&token)).into_iter().chain(self.eos_id()).collect())
    }

    /// The ids of a text that holds its special tokens already.
    fn encode_verbatim(&self, text: &str) -> Result<tokenizers::Encoding> {
        self.inner.encode(text, false).map_err(|e| Error::Tokenizer(format!("cannot encode text: {e}")))
    }

    fn special_tokens(&self) -> impl Iterator<Item = String> {
        let added = self.inner.get_added_tokens_decoder().into_values();
        added.filter(|token| token.special && !token.content.is_empty()).map(|token| token.content)
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
