//! Making a tokenizer from text.

use std::io::{IsTerminal, Write};
use std::path::Path;

use serde_json::json;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer as Inner};

use super::{Tokenizer, TokenizerFile};
use crate::tools::files::NewFile;
use crate::{Error, Result};

pub const BOS: &str = "<|begin_of_text|>";
pub const EOS: &str = "<|end_of_text|>";

/// BOS, EOS and the 256 bytes: with them any text can be encoded.
pub const MIN_VOCAB_SIZE: usize = 2 + 256;

/// Trains byte-level BPE, split as GPT-2 does, on `texts`: ids 0 and 1 are BOS and EOS, then come the bytes, then
/// the merges. Fewer than `vocab_size` ids result where the texts have no more pairs to merge.
///
/// # Errors
/// [`Error::Usage`] if `vocab_size` is below [`MIN_VOCAB_SIZE`], and the first error of `texts`.
pub fn train(texts: impl Iterator<Item = Result<String>> + Send, vocab_size: usize) -> Result<Tokenizer> {
    if vocab_size < MIN_VOCAB_SIZE {
        return Err(Error::Usage(format!(
            "a vocabulary of {vocab_size} is too small: BOS, EOS and the bytes need {MIN_VOCAB_SIZE}"
        )));
    }
    let failed = |e: tokenizers::Error| Error::Tokenizer(format!("cannot train a tokenizer: {e}"));

    let byte_level = ByteLevel::default().add_prefix_space(false);
    let mut inner = Inner::new(BPE::default());
    inner.with_pre_tokenizer(Some(byte_level)).with_decoder(Some(byte_level));
    let mut trainer: TrainerWrapper = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .special_tokens([BOS, EOS].map(|token| AddedToken::from(token, true)).to_vec())
        // Without it, bytes that the texts lack could not be encoded later.
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .show_progress(std::io::stderr().is_terminal())
        .build()
        .into();

    let mut fault = None;
    let good = texts.map_while(|text| text.map_err(|e| fault = Some(e)).ok());
    inner.train(&mut trainer, good).map_err(failed)?;
    if let Some(fault) = fault {
        return Err(fault);
    }

    let bos_id = inner.token_to_id(BOS).expect("the trainer puts special tokens first");
    let template = TemplateProcessing::builder()
        .try_single(format!("{BOS} $A"))
        .and_then(|builder| builder.try_pair(format!("{BOS} $A {BOS} $B:1")))
        .map_err(|e| Error::Tokenizer(e.to_string()))?
        .special_tokens(vec![(BOS, bos_id)])
        .build()
        .map_err(|e| Error::Tokenizer(e.to_string()))?;
    inner.with_post_processor(Some(template));

    let model = inner.to_string(true).map_err(failed)?;
    let config = serde_json::to_string_pretty(&config()).expect("a JSON value can be written");
    let file = |name: &str, text: String| TokenizerFile { name: name.into(), bytes: text.into_bytes() };
    Tokenizer::from_files(
        vec![file("tokenizer.json", model), file("tokenizer_config.json", config)],
        "the new tokenizer",
    )
}

/// What Hugging Face's library needs beside `tokenizer.json`.
fn config() -> serde_json::Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": false,
        "model_input_names": ["input_ids", "attention_mask"],
    })
}

/// Writes the tokenizer's files into `dir`, which is made if need be: all of them, or none.
pub fn save(tokenizer: &Tokenizer, dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(Error::io("cannot make the folder", dir))?;
    let failed = |file: &TokenizerFile| Error::io("cannot write the tokenizer", dir.join(&file.name));
    let write = |file: &TokenizerFile| {
        let mut new = NewFile::create(&dir.join(&file.name))?;
        new.write_all(&file.bytes)?;
        Ok(new)
    };
    let write = |file| write(file).map_err(failed(file));
    let written = tokenizer.files().iter().map(write).collect::<Result<Vec<_>>>()?;
    written.into_iter().zip(tokenizer.files()).try_for_each(|(new, file)| new.keep().map_err(failed(file)))
}
