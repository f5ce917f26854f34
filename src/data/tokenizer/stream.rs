//! Text as it is generated, token by token.

use super::Tokenizer;
use crate::Result;

/// Turns ids into text one at a time. A token may hold part of a UTF-8 character, or text that depends on the token
/// before it; what is not yet certain is held back.
pub struct TokenStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The ids whose text came out last, then those held back.
    ids: Vec<u32>,
    n_emitted: usize,
}

impl<'a> TokenStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, ids: Vec::new(), n_emitted: 0 }
    }

    /// The text that `id` completes, if any.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        self.ids.push(id);
        let text = self.pending()?;
        // A character that is not complete yet decodes to U+FFFD.
        if text.is_empty() || text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(None);
        }
        self.ids.drain(..self.n_emitted);
        self.n_emitted = self.ids.len();
        Ok(Some(text))
    }

    /// What is still held back: a character that was cut off, as U+FFFD.
    pub fn finish(self) -> Result<Option<String>> {
        Ok(Some(self.pending()?).filter(|text| !text.is_empty()))
    }

    /// Text of the ids that are held back, decoded together with those before them: some decoders treat the first
    /// token of a text differently.
    fn pending(&self) -> Result<String> {
        let emitted = self.tokenizer.decode(&self.ids[..self.n_emitted])?;
        let all = self.tokenizer.decode(&self.ids)?;
        Ok(all.get(emitted.len()..).unwrap_or_default().to_owned())
    }
}
