use rand_chacha::ChaCha8Rng;
use tracing::info;

use super::{Generator, Pace, Sampling};
use crate::data::chat::Message;
use crate::models::decoder::KvCache;
use crate::{Error, Result};

/// A conversation with a model, in the words of its chat template.
pub struct Chat<'a> {
    generator: &'a Generator,
    messages: Vec<Message>,
    /// Tokens that end an answer.
    ends: Vec<u32>,
    cache: KvCache,
    /// The tokens that `cache` holds.
    cached: Vec<u32>,
}

impl<'a> Chat<'a> {
    pub fn new(generator: &'a Generator, system: Option<&str>) -> Result<Self> {
        Ok(Self {
            generator,
            messages: system.map(|system| Message::new("system", system)).into_iter().collect(),
            ends: generator.tokenizer.ends_of_turn()?,
            cache: generator.model.cache(),
            cached: Vec::new(),
        })
    }

    /// Answers `text`, in at most `max_new_tokens`. The oldest messages are forgotten where the conversation would be longer
    /// than the model's sequences.
    ///
    /// # Errors
    /// [`Error::Usage`] if `text` alone is too long; whatever `emit` returns.
    pub fn say(
        &mut self,
        text: &str,
        max_new_tokens: usize,
        sampling: &Sampling,
        rng: &mut ChaCha8Rng,
        mut emit: impl FnMut(&str) -> Result<()>,
    ) -> Result<Pace> {
        self.messages.push(Message::new("user", text));
        let ids = self.fitting_prompt(max_new_tokens)?;
        let room = self.generator.max_seq_len() - ids.len();

        // What is cached is read no second time, unless the template has rewritten it.
        if !(ids.starts_with(&self.cached) && ids.len() > self.cached.len()) {
            self.cache = self.generator.model.cache();
            self.cached.clear();
        }
        let mut answer = String::new();
        let (new_ids, pace) = self.generator.extend(
            &mut self.cache,
            &ids[self.cached.len()..],
            max_new_tokens.min(room),
            &self.ends,
            sampling,
            rng,
            |piece| {
                answer += piece;
                emit(piece)
            },
        )?;
        self.cached = ids;
        // The last one was not read.
        self.cached.extend(&new_ids[..new_ids.len().saturating_sub(1)]);
        self.messages.push(Message::new("assistant", answer.trim()));
        Ok(pace)
    }

    /// The tokens of the conversation, with room for an answer, or for a good part of one.
    fn fitting_prompt(&mut self, max_new_tokens: usize) -> Result<Vec<u32>> {
        let longest = self.generator.max_seq_len();
        let room = max_new_tokens.min(longest / 4);
        loop {
            let ids = self.generator.tokenizer.encode_chat_prompt(&self.messages)?;
            if ids.len() + room <= longest {
                return Ok(ids);
            }
            let first = usize::from(self.messages[0].role() == "system");
            // The user's newest message, and less room than asked for.
            if self.messages.len() - first < 3 {
                if ids.len() < longest {
                    return Ok(ids);
                }
                return Err(Error::Usage(format!(
                    "the message makes {} tokens, more than the {longest} that the model takes at once",
                    ids.len()
                )));
            }
            info!("The conversation is longer than {longest} tokens: its oldest messages are forgotten");
            self.messages.drain(first..first + 2);
        }
    }
}
