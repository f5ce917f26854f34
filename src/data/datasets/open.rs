//! From a name in the job config to a dataset.

use std::path::Path;
use std::sync::Arc;

use tracing::info;

use super::documents::TextDataset;
use super::files::has_ending;
use super::tokens::TokenDataset;
use super::{Dataset, DatasetSpec, Fields, Files, Format, Vocabulary};
use crate::data::remote::{OpenRemote, RemoteFiles};
use crate::data::stories;
use crate::{Error, Result};

const TEXT: &[&str] = &[".txt", ".text", ".md"];
const JSON: &[&str] = &[".json", ".jsonl", ".ndjson"];
const PARQUET: &[&str] = &[".parquet"];
const TOKENS: &[&str] = &[".bin"];

const C4: &str = "allenai/c4";
/// Besides those of the hub, `user/name`.
pub const NAMES: [&str; 9] =
    ["c4", "c4_test", "c4_validation", "chat", "instruct", "json", "parquet", "text", "tokens"];

/// What token shards say of themselves; `None` for datasets of text, and for shards without a sidecar.
pub fn vocabulary(spec: &DatasetSpec) -> Result<Option<Vocabulary>> {
    match (spec.dataset.as_str(), &spec.dataset_path) {
        ("tokens", Some(path)) => Vocabulary::of_files(&Files::local(path, TOKENS)?),
        _ => Ok(None),
    }
}

/// Opens a dataset: lists its files, and maps those of token ids.
///
/// `vocab_size` is the tokenizer's, for token shards that do not state theirs; `window` the number of ids that stay
/// together when such shards are shuffled.
pub fn open(
    spec: &DatasetSpec,
    vocab_size: Option<usize>,
    window: usize,
    open_remote: OpenRemote,
) -> Result<Arc<dyn Dataset>> {
    let records = |files: Files, format: Format, fields: Fields| -> Result<Arc<dyn Dataset>> {
        let max_bad_records = spec.max_bad_records as u64;
        Ok(Arc::new(TextDataset { files: Arc::new(files), format, fields, max_bad_records }))
    };
    let text = |files, format| records(files, format, Fields::Text(spec.text_field.clone()));
    let name = spec.dataset.as_str();
    match (name, spec.dataset_path.as_deref()) {
        ("text", Some(path)) => text(Files::local(path, TEXT)?, Format::Text),
        ("json", Some(path)) => text(Files::local(path, JSON)?, Format::Json),
        ("parquet", Some(path)) => text(Files::local(path, PARQUET)?, Format::Parquet),
        ("chat", Some(path)) => {
            let (files, format) = files_of_examples(path)?;
            records(files, format, Fields::Chat { messages: spec.messages_field.clone() })
        }
        ("instruct", Some(path)) => {
            let (files, format) = files_of_examples(path)?;
            let (prompt, completion) = (spec.prompt_field.clone(), spec.completion_field.clone());
            records(files, format, Fields::Instruct { prompt, completion })
        }
        ("tokens", Some(path)) => Ok(Arc::new(TokenDataset::open(Files::local(path, TOKENS)?, vocab_size, window)?)),
        ("text" | "json" | "parquet" | "chat" | "instruct" | "tokens", None) => {
            Err(Error::Data(format!("dataset `{name}` needs a dataset_path: a file, a folder or a glob")))
        }

        ("c4" | "c4_test" | "c4_validation", Some(path)) => text(Files::local(path, JSON)?, Format::Json),
        ("c4_test", None) => text(Files::shipped(name), Format::Shipped(stories::TRAIN)),
        ("c4_validation", None) if spec.validates.as_deref().is_some_and(|training| !is_remote(training)) => {
            text(Files::shipped(name), Format::Shipped(stories::VALIDATION))
        }
        ("c4" | "c4_validation", None) => {
            let split = if name == "c4" { "train" } else { "validation" };
            let remote = open_remote(C4)?;
            let files = remote.list(&format!("en/c4-{split}.*.json.gz"))?;
            text(remote_files(C4, remote, files)?, Format::Json)
        }

        (repo, path) if is_remote(repo) && !Path::new(repo).exists() => {
            let remote = open_remote(repo)?;
            let (files, format) = choose_files(&*remote, repo, path, spec.validates.is_some())?;
            text(remote_files(repo, remote, files)?, format)
        }
        _ => Err(unknown(name)),
    }
}

/// JSON lines, or parquet.
fn files_of_examples(path: &str) -> Result<(Files, Format)> {
    let files = Files::local(path, &[JSON, PARQUET].concat())?;
    let n_parquet = files.entries.iter().filter(|file| has_ending(&file.name, PARQUET)).count();
    match n_parquet {
        0 => Ok((files, Format::Json)),
        n if n == files.entries.len() => Ok((files, Format::Parquet)),
        n => Err(Error::Data(format!(
            "{path}: {n} of its {} files are parquet and the others are not\n   = choose some of one kind with a glob, as in \
             \"data/*.parquet\"",
            files.entries.len()
        ))),
    }
}

fn is_remote(dataset: &str) -> bool {
    dataset == "c4" || dataset.contains('/')
}

fn unknown(name: &str) -> Error {
    if Path::new(name).exists() {
        return Error::Data(format!(
            "dataset {name:?} is a path: give it as dataset_path, and as dataset what it holds: text, json, parquet, chat, instruct or tokens"
        ));
    }
    let nearest = NAMES.into_iter().max_by(|a, b| strsim::jaro(a, name).total_cmp(&strsim::jaro(b, name)));
    let guess = nearest.filter(|known| strsim::jaro(known, name) > 0.7);
    let guess = guess.map_or(String::new(), |known| format!("; did you mean {known:?}?"));
    Error::Data(format!(
        "unknown dataset {name:?}{guess}\n  = known are {}, and `user/name` of the Hugging Face hub",
        NAMES.join(", ")
    ))
}

fn remote_files(repo: &str, remote: Arc<dyn RemoteFiles>, files: Vec<String>) -> Result<Files> {
    if files.is_empty() {
        return Err(Error::Data(format!("{repo}: the hub lists no data files for it")));
    }
    info!("{repo}: {} files, from {} on", files.len(), files[0]);
    Ok(Files::remote(repo.to_owned(), remote, files))
}

/// The data files of a hub dataset: of one format, and of one split unless `path` is a file or a glob.
fn choose_files(
    remote: &dyn RemoteFiles,
    repo: &str,
    path: Option<&str>,
    validates: bool,
) -> Result<(Vec<String>, Format)> {
    let formats = [(PARQUET, Format::Parquet), (JSON, Format::Json), (&TEXT[..1], Format::Text)];
    let format_of = |file: &str| formats.iter().find(|(endings, _)| has_ending(file, endings)).map(|&(_, f)| f);
    let path = path.map(|path| path.trim_matches('/'));
    let (pattern, named) = match path {
        None => ("**/*".to_owned(), false),
        Some(path) if path.contains(['*', '?', '[']) || format_of(path).is_some() => (path.to_owned(), true),
        Some(path) => (format!("{path}/**/*"), false),
    };

    let mut files = remote.list(&pattern)?;
    // Hugging Face's own descriptions of a dataset.
    files.retain(|file| !file.ends_with("dataset_info.json") && !file.ends_with("dataset_infos.json"));
    let Some((_, format)) = formats.into_iter().find(|&(_, f)| files.iter().any(|file| format_of(file) == Some(f)))
    else {
        let endings = [PARQUET, JSON, &TEXT[..1]].concat().join(", ");
        return Err(Error::Data(format!("{repo}: no file that matches {pattern:?} ends in {endings}")));
    };
    files.retain(|file| format_of(file) == Some(format));
    files.sort_unstable();
    if !named {
        files = split_of(files, validates).ok_or_else(|| {
            Error::Data(format!("{repo}: none of its files is named for validation; choose some with dataset_path"))
        })?;
    }
    Ok((files, format))
}

/// The files that are named for training or for validating; all where nothing is named for training.
fn split_of(files: Vec<String>, validates: bool) -> Option<Vec<String>> {
    let named = |words: &[&str]| -> Option<Vec<String>> {
        let is_word = |part: &str| words.contains(&part.to_lowercase().as_str());
        let matches = |file: &&String| file.split(|c: char| !c.is_alphanumeric()).any(is_word);
        let found: Vec<String> = files.iter().filter(matches).cloned().collect();
        (!found.is_empty()).then_some(found)
    };
    if validates {
        return named(&["validation", "valid", "val", "dev"]).or_else(|| named(&["test"]));
    }
    named(&["train", "training"]).or(Some(files))
}
