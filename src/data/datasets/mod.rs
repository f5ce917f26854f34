//! Datasets: documents one after another, from any position.

mod documents;
mod files;
mod json;
mod open;
mod parquet;
mod parquet_file;
mod parquet_rows;
mod records;
mod text;
mod tokens;

use serde::{Deserialize, Serialize};

pub use files::{FileEntry, Files, Stop, StopOnDrop};
pub use open::{NAMES, open, vocabulary};
pub use records::{Fields, Record};
pub use tokens::{Dtype, Sidecar, Vocabulary};

use crate::Result;
use crate::data::chat::{Conversation, Instruction};

/// What the job config says of a dataset.
#[derive(Debug, Clone)]
pub struct DatasetSpec {
    /// - `text`: plain files, each a document, however large. Shuffling shuffles the files.
    /// - `json`: JSON lines (`.json`, `.jsonl`, `.ndjson`), one document each.
    /// - `parquet`: one document per row.
    /// - `chat`: JSON lines or parquet, one conversation each.
    /// - `instruct`: JSON lines or parquet, a prompt and its completion each.
    /// - `tokens`: shards of token ids, see [`Sidecar`].
    /// - `c4`: the `en` subset of `allenai/c4` on the Hugging Face hub.
    /// - `c4_test`: the stories that titan ships.
    /// - `c4_validation`: C4's validation split on the hub; for validating a training set that is not from the hub,
    ///   the stories that titan ships for it.
    /// - `user/name`: any dataset repository of the hub.
    ///
    /// Text and JSON may be compressed with gzip or zstd. With a `dataset_path`, `c4`, `c4_test` and `c4_validation`
    /// read the JSON lines there.
    pub dataset: String,
    /// A file, a folder or a glob. Of a hub dataset, one within the repository.
    pub dataset_path: Option<String>,
    /// Field or column that holds the text.
    pub text_field: String,
    /// Field or column that holds the messages of a conversation.
    pub messages_field: String,
    pub prompt_field: String,
    pub completion_field: String,
    /// Whether conversations and other examples in one row are masked from each other.
    pub masks_examples: bool,
    /// How many malformed records may be skipped in one pass over the data.
    pub max_bad_records: usize,
    /// The dataset that is trained on, where this one validates.
    pub validates: Option<String>,
}

impl Default for DatasetSpec {
    fn default() -> Self {
        Self {
            dataset: "c4_test".to_owned(),
            dataset_path: None,
            text_field: "text".to_owned(),
            messages_field: "messages".to_owned(),
            prompt_field: "prompt".to_owned(),
            completion_field: "completion".to_owned(),
            masks_examples: true,
            max_bad_records: 0,
            validates: None,
        }
    }
}

impl DatasetSpec {
    /// Whether its documents stay whole, each within one row, and are learned in part.
    pub fn is_of_examples(&self) -> bool {
        ["chat", "instruct"].contains(&self.dataset.as_str())
    }
}

/// What a file's records are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Format {
    Text,
    Json,
    Parquet,
    /// JSON lines that are part of the program; such a file exists in name only.
    Shipped(&'static [u8]),
}

/// Where in a dataset a token is. Small, and cheap to return to.
///
/// Records are dealt in blocks, each shuffled by itself where shuffling is on and a single record where it is not:
/// `offset` and `line` say where the block begins, `index` which of its records it is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Position {
    /// Passes completed before this one.
    pub epoch: u64,
    /// Index of the file in the dataset; `None` before the first record of a pass.
    #[serde(skip)]
    pub file: Option<usize>,
    /// Of text, bytes (decompressed); of parquet, rows; of token ids, ids.
    pub offset: u64,
    /// Lines or rows before the block.
    pub line: u64,
    /// In shuffled token shards, the window's number in the shuffled order of all.
    pub index: u64,
    /// Malformed records skipped in this pass before the block.
    pub bad_records: u64,
    /// Tokens of the document before this one.
    pub token: u64,
}

/// Text or token ids, and where they begin.
#[derive(Debug, Clone, PartialEq)]
pub struct Document {
    pub position: Position,
    pub content: Content,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    Text(Record),
    Chat(Conversation),
    Instruct(Instruction),
    Tokens(Vec<u32>),
}

impl Content {
    /// Bytes of its text; 0 where there is none.
    pub fn text_bytes(&self) -> usize {
        match self {
            Self::Text(record) => record.text.len(),
            Self::Chat(conversation) => conversation.messages.iter().map(|message| message.text().len()).sum(),
            Self::Instruct(Instruction { prompt, completion }) => prompt.len() + completion.len(),
            Self::Tokens(_) => 0,
        }
    }
}

pub type Documents = Box<dyn Iterator<Item = Result<Document>> + Send>;

/// A source of documents.
pub trait Dataset: Send + Sync {
    fn files(&self) -> &Files;

    /// The documents of the pass `from.epoch`, from the one at `from` on. `from.token` is left to the caller.
    ///
    /// With a seed in `shuffle` their order is shuffled, anew in each pass; without, it is that of the files.
    /// Iteration ends with the first error. Waiting for a download is given up when `stop` is requested.
    fn pass(&self, from: Position, shuffle: Option<u64>, stop: &Stop) -> Documents;
}
