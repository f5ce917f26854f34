//! From the files of a folder to a [`Tokenizer`].

use std::collections::HashMap;
use std::path::Path;
use std::sync::OnceLock;

use serde::Deserialize;
use serde_json::{Map, Value};
use tokenizers::AddedToken;
use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::whitespace::Whitespace;

use super::{MAX_VOCAB_SIZE, Mark, Tokenizer, TokenizerFile, growth, template, vocab_size};
use crate::tools::files;
use crate::tools::panics::caught;
use crate::{Error, Result};

const CONFIG: &str = "tokenizer_config.json";
/// Twice the largest tokenizers that there are.
const MAX_FILE_BYTES: u64 = 64_000_000;
const UNKNOWN_WORD: &str = "[UNK]";

/// Keys of `tokenizer_config.json` that name one special token each.
const SPECIAL_TOKEN_KEYS: [&str; 7] =
    ["bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"];

/// A special token in `tokenizer_config.json`.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or an object with `content`")]
enum SpecialToken {
    Content(String),
    Full {
        content: String,
        #[serde(default)]
        single_word: bool,
        #[serde(default)]
        lstrip: bool,
        #[serde(default)]
        rstrip: bool,
        #[serde(default)]
        normalized: bool,
    },
}

impl From<SpecialToken> for AddedToken {
    fn from(token: SpecialToken) -> Self {
        match token {
            SpecialToken::Content(content) => AddedToken::from(content, true),
            SpecialToken::Full { content, single_word, lstrip, rstrip, normalized } => {
                AddedToken { content, single_word, lstrip, rstrip, normalized, special: true }
            }
        }
    }
}

/// Where a vocabulary may be, the best first.
const VOCABULARIES: [&str; 3] = ["tokenizer.json", "vocab.json", "vocab.txt"];

pub(super) fn has_tokenizer(dir: &Path) -> bool {
    VOCABULARIES.iter().any(|name| dir.join(name).is_file())
}

/// The files of `dir` that make its tokenizer, the vocabulary first.
pub(super) fn read_files(dir: &Path) -> Result<Vec<TokenizerFile>> {
    let present = |name: &&str| dir.join(name).is_file();
    let mut names = match VOCABULARIES.iter().copied().find(present) {
        Some("tokenizer.json") => vec!["tokenizer.json"],
        Some(vocab) => [vocab, "merges.txt"].into_iter().filter(present).collect(),
        None => return Err(no_tokenizer_in(dir)),
    };
    names.extend([CONFIG, template::FILE].iter().filter(|name| present(name)));
    names
        .into_iter()
        .map(|name| {
            let read = if name.ends_with(".json") { files::read_json } else { files::read };
            let bytes = files::inside(dir, name).and_then(|path| read(&path, MAX_FILE_BYTES));
            let bytes = bytes.map_err(Error::io("cannot read the tokenizer", dir.join(name)))?;
            Ok(TokenizerFile { name: name.into(), bytes })
        })
        .collect()
}

fn no_tokenizer_in(dir: &Path) -> Error {
    let found = if !dir.is_dir() {
        "there is no such folder"
    } else if dir.join("tokenizer.model").is_file() {
        "it holds only tokenizer.model, a format that titan does not read"
    } else {
        "looked for tokenizer.json, vocab.json and vocab.txt (with merges.txt for byte-level BPE)"
    };
    Error::Tokenizer(format!(
        "no tokenizer in {}: {found}\n  \
         = to fetch a model's: titan download-tokenizer --repo-id OWNER/NAME\n  \
         = to make one from your text: titan train-tokenizer FILES --output DIR",
        dir.display()
    ))
}

pub(super) fn build(files: Vec<TokenizerFile>, origin: &str) -> Result<Tokenizer> {
    let file = |name: &str| files.iter().find(|file| file.name == name);
    let vocab = files.first().filter(|file| file.name != CONFIG && file.name != template::FILE);
    let vocab = vocab.ok_or_else(|| Error::Tokenizer(format!("no vocabulary among the files of {origin}")))?;
    let explain = |name: &str, e: String| Error::Tokenizer(format!("{origin}: {name} cannot be used: {e}"));

    if vocab.name == "tokenizer.json" {
        growth::check(&vocab.bytes).map_err(|e| explain(&vocab.name, e))?;
    }
    let mut inner = caught(|| match (vocab.name.as_str(), file("merges.txt")) {
        ("tokenizer.json", _) => tokenizers::Tokenizer::from_bytes(&vocab.bytes).map_err(|e| e.to_string()),
        (_, Some(merges)) => byte_level_bpe(vocab, &merges.bytes),
        (_, None) => word_level(vocab),
    })
    .map_err(|e| explain(&vocab.name, e))?;
    // A file may carry the limits of the run that saved it; documents must be neither cut nor filled up.
    inner.with_truncation(None).map_err(|e| explain(&vocab.name, e.to_string()))?;
    inner.with_padding(None);

    let config: Map<String, Value> = match file(CONFIG) {
        Some(config) => serde_json::from_slice(&config.bytes).map_err(|e| explain(CONFIG, e.to_string()))?,
        None => {
            tracing::warn!("{origin} has no {CONFIG}: documents will be encoded without BOS and EOS");
            Map::new()
        }
    };
    caught(|| add_special_tokens(&mut inner, &config)).map_err(|e| explain(CONFIG, e))?;
    let id_of = |key| Ok(special_token(&config, key)?.and_then(|token| inner.token_to_id(&token.content)));
    let bos = id_of("bos_token").map_err(|e| explain(CONFIG, e))?;
    let eos = id_of("eos_token").map_err(|e| explain(CONFIG, e))?;
    // Encoding here also shows, before any training, that the tokenizer can.
    let ids = |special| {
        let encoded = caught(|| inner.encode_fast("a", special).map_err(|e| e.to_string()));
        encoded.map(|encoding| encoding.get_ids().to_vec()).map_err(|e| explain(&vocab.name, e))
    };
    let (bare, full) = (ids(false)?, ids(true)?);
    let adds_bos = full.first() != bare.first();
    let adds_eos = full.last() != bare.last();

    let vocab_size = vocab_size(&inner);
    if vocab_size > MAX_VOCAB_SIZE {
        return Err(explain(&vocab.name, format!("it has the id {}, which is beyond any model", vocab_size - 1)));
    }
    Ok(Tokenizer {
        bos: bos.map(|id| Mark { id, added_by_tokenizer: adds_bos && full.first() == Some(&id) }),
        eos: eos.map(|id| Mark { id, added_by_tokenizer: adds_eos && full.last() == Some(&id) }),
        vocab_size,
        inner,
        origin: origin.to_owned(),
        files,
        chat_template: OnceLock::new(),
    })
}

/// `tokenizer_config.json`, and the contents of the special tokens that it names one by one.
pub(super) fn config_and_special_tokens(files: &[TokenizerFile]) -> Result<(Map<String, Value>, Map<String, Value>)> {
    let Some(file) = files.iter().find(|file| file.name == CONFIG) else { return Ok(Default::default()) };
    let explain = |e: String| Error::Tokenizer(format!("{CONFIG} cannot be used: {e}"));
    let config: Map<String, Value> = serde_json::from_slice(&file.bytes).map_err(|e| explain(e.to_string()))?;
    let mut tokens = Map::new();
    for key in SPECIAL_TOKEN_KEYS {
        if let Some(token) = special_token(&config, key).map_err(explain)? {
            tokens.insert(key.to_owned(), token.content.into());
        }
    }
    Ok((config, tokens))
}

fn special_token(config: &Map<String, Value>, key: &str) -> Result<Option<AddedToken>, String> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => {
            let token = SpecialToken::deserialize(value).map_err(|e| format!("`{key}`: {e}"))?;
            Ok(Some(token.into()))
        }
    }
}

/// Adds what `tokenizer_config.json` names. A token that the vocabulary has keeps its id, whatever id the config
/// gives it; the others get the next free ones, in the order of the file.
fn add_special_tokens(inner: &mut tokenizers::Tokenizer, config: &Map<String, Value>) -> Result<(), String> {
    let mut tokens = Vec::new();
    for key in SPECIAL_TOKEN_KEYS {
        tokens.extend(special_token(config, key)?);
    }
    match config.get("added_tokens_decoder") {
        None | Some(Value::Null) => {}
        Some(Value::Object(decoder)) => {
            for id in decoder.keys() {
                tokens.extend(special_token(decoder, id).map_err(|e| format!("added_tokens_decoder: {e}"))?);
            }
        }
        Some(_) => return Err("`added_tokens_decoder`: expected an object from ids to tokens".into()),
    }
    inner.add_special_tokens(tokens).map_err(|e| e.to_string())?;
    Ok(())
}

/// GPT-2's: bytes as characters, split by its regular expression.
fn byte_level_bpe(vocab: &TokenizerFile, merges: &[u8]) -> Result<tokenizers::Tokenizer, String> {
    let merges = text(merges).map_err(|e| format!("merges.txt: {e}"))?;
    let merges = merges
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with("#version"))
        .map(|line| match line.split_whitespace().collect::<Vec<_>>()[..] {
            [left, right] => Ok((left.to_owned(), right.to_owned())),
            _ => Err(format!("merges.txt: `{line}` is not a pair of tokens")),
        })
        .collect::<Result<_, _>>()?;
    let vocab: Vocab = read_vocab(vocab)?.into_iter().collect();
    let model = BPE::builder().vocab_and_merges(vocab, merges).build().map_err(|e| format!("merges.txt: {e}"))?;

    let mut inner = tokenizers::Tokenizer::new(ModelWrapper::BPE(model));
    let byte_level = ByteLevel::default().add_prefix_space(false);
    inner.with_pre_tokenizer(Some(byte_level)).with_decoder(Some(byte_level)).with_post_processor(Some(byte_level));
    Ok(inner)
}

fn word_level(vocab: &TokenizerFile) -> Result<tokenizers::Tokenizer, String> {
    let vocab = read_vocab(vocab)?;
    if !vocab.contains_key(UNKNOWN_WORD) {
        return Err(format!(
            "a vocabulary of words needs the token `{UNKNOWN_WORD}` for all others; byte-level BPE needs merges.txt"
        ));
    }
    let model = WordLevel::builder()
        .vocab(vocab.into_iter().collect())
        .unk_token(UNKNOWN_WORD.into())
        .build()
        .map_err(|e| e.to_string())?;
    let mut inner = tokenizers::Tokenizer::new(ModelWrapper::WordLevel(model));
    inner.with_pre_tokenizer(Some(Whitespace));
    Ok(inner)
}

/// `vocab.json`, an object from tokens to ids, or `vocab.txt`, a token per line with the line as its id.
fn read_vocab(file: &TokenizerFile) -> Result<HashMap<String, u32>, String> {
    if file.name.ends_with(".json") {
        return serde_json::from_slice(&file.bytes).map_err(|e| e.to_string());
    }
    let lines = text(&file.bytes)?.lines().map(str::trim).zip(0..);
    Ok(lines.filter(|(token, _)| !token.is_empty()).map(|(token, id)| (token.to_owned(), id)).collect())
}

fn text(bytes: &[u8]) -> Result<&str, String> {
    std::str::from_utf8(bytes).map_err(|e| e.to_string())
}
