//! Text to token ids and back, through tokenizers in Hugging Face's format.

mod growth;
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
use crate::tools::panics::caught;
use crate::{Error, Result};

/// Ids are below this: no vocabulary is larger, and tables of it can be counted in float32.
pub const MAX_VOCAB_SIZE: usize = 1 << 24;

/// A longer text is encoded in pieces, as encoding takes some hundred times its size.
const PIECE_BYTES: usize = 256 << 10;

/// A tokenizer and the files it was read from.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bos: Option<Mark>,
    eos: Option<Mark>,
    vocab_size: usize,
    files: Vec<TokenizerFile>,
    /// Where the files are, for messages.
    origin: String,
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
        let mut all = Vec::from_iter(self.bos_id().filter(|_| add_bos));
        for (_, piece) in pieces(text) {
            let encoding = self.guarded(|| self.inner.encode_fast(piece, true))?;
            let mut ids = encoding.get_ids();
            if self.bos.is_some_and(|bos| bos.added_by_tokenizer && ids.first() == Some(&bos.id)) {
                ids = &ids[1..];
            }
            if self.eos.is_some_and(|eos| eos.added_by_tokenizer && ids.last() == Some(&eos.id)) {
                ids = &ids[..ids.len() - 1];
            }
            all.extend_from_slice(ids);
        }
        all.extend(self.eos_id().filter(|_| add_eos));
        Ok(all)
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
        let mut example = Example { tokens: Vec::new(), learned: Vec::new() };
        for (first, encoding) in self.encode_verbatim(&text) {
            let encoding = encoding?;
            let is_learned = |&(start, end): &(usize, usize)| {
                spans.iter().any(|span| first + start < span.end && first + end > span.start)
            };
            example.tokens.extend_from_slice(encoding.get_ids());
            example.learned.extend(encoding.get_offsets().iter().map(is_learned));
        }
        Ok(example)
    }

    /// The ids up to where the assistant's next message begins.
    pub fn encode_chat_prompt(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let text = self.chat_template()?.render(messages, true)?;
        let mut ids = Vec::new();
        for (_, encoding) in self.encode_verbatim(&text) {
            ids.extend_from_slice(encoding?.get_ids());
        }
        Ok(ids)
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

    /// The ids of a text that holds its special tokens already, piece by piece, each with where it begins.
    fn encode_verbatim(&self, text: &str) -> impl Iterator<Item = (usize, Result<tokenizers::Encoding>)> {
        pieces(text).map(|(first, piece)| (first, self.guarded(|| self.inner.encode(piece, false))))
    }

    /// A vocabulary can be such that it fails on some texts only, by a panic too.
    fn guarded<T>(&self, f: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
        caught(|| f().map_err(|error| error.to_string()))
            .map_err(|error| Error::Tokenizer(format!("{}: {} fails: {error}", self.origin, self.files[0].name)))
    }

    fn special_tokens(&self) -> impl Iterator<Item = String> {
        let added = self.inner.get_added_tokens_decoder().into_values();
        added.filter(|token| token.special && !token.content.is_empty()).map(|token| token.content)
    }

    /// Text of `ids`, without special tokens. Bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.guarded(|| self.inner.decode(ids, true))
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

/// A text in pieces of at most [`PIECE_BYTES`], each with where it begins: cut behind a line or a word, if there is one.
fn pieces(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut start = Some(0);
    std::iter::from_fn(move || {
        let (first, rest) = (start?, &text[start?..]);
        if rest.len() <= PIECE_BYTES {
            start = None;
            return Some((first, rest));
        }
        let most = &rest[..rest.floor_char_boundary(PIECE_BYTES)];
        let len = most.rfind('\n').map(|end| end + 1).or(most.rfind(' ')).filter(|&len| len > 0).unwrap_or(most.len());
        start = Some(first + len);
        Some((first, &rest[..len]))
    })
}

/// The highest id + 1 of everything that `inner` can yield.
fn vocab_size(inner: &tokenizers::Tokenizer) -> usize {
    let vocab: HashMap<String, u32> = inner.get_vocab(true);
    vocab.values().max().map_or(0, |&id| id as usize + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_is_cut_behind_lines_and_before_words_and_nothing_of_it_is_lost() {
        for part in ["a line\n", "word ", "\u{1f600}", " ", "\n"] {
            let text = part.repeat(3 * PIECE_BYTES / part.len());
            let parts: Vec<_> = pieces(&text).collect();
            assert!(parts.iter().all(|(_, piece)| (1..=PIECE_BYTES).contains(&piece.len())), "{part:?}");
            assert!(parts.iter().all(|(first, piece)| text[*first..].starts_with(piece)), "{part:?}");
            assert_eq!(parts.iter().map(|(_, piece)| *piece).collect::<String>(), text);
        }
        assert_eq!(pieces("").collect::<Vec<_>>(), [(0, "")]);
        let tokenizer = Tokenizer::from_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/tokenizer")).unwrap();
        let line = "Once upon a time there was a cat.\n";
        let n = 2 * PIECE_BYTES / line.len();
        let of_line = tokenizer.encode(line, false, false).unwrap();
        assert_eq!(tokenizer.encode(&line.repeat(n), false, false).unwrap(), of_line.repeat(n));
    }
}
