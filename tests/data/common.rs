//! A tokenizer of bytes, and data files in every format.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;
use titan::data::chat::{Example, Message};
use titan::data::datasets::{self, Position};
use titan::data::pipeline::{Plan, Tokenized};
use titan::data::remote::RemoteFiles;
use titan::data::{Batch, DatasetSpec, Encode, Loader, LoaderOptions};
use titan::{Error, Result};

pub const BOS: u32 = 256;
pub const EOS: u32 = 257;

/// A token for each byte.
pub struct Bytes;

impl Encode for Bytes {
    fn encode(&self, text: &str, add_bos: bool, add_eos: bool) -> Result<Vec<u32>> {
        let bos = add_bos.then_some(BOS);
        Ok(bos.into_iter().chain(text.bytes().map(u32::from)).chain(add_eos.then_some(EOS)).collect())
    }

    /// Each message is its role's first letter, its content and EOS.
    fn encode_chat(&self, messages: &[Message]) -> Result<Example> {
        let mut example = Example { tokens: vec![BOS], learned: vec![false] };
        for message in messages {
            let role = message.role().as_bytes()[0];
            let content = message.text().bytes().map(u32::from).chain([EOS]);
            example.tokens.extend([u32::from(role)].into_iter().chain(content));
            example.learned.push(false);
            example.learned.resize(example.tokens.len(), message.is_learned());
        }
        Ok(example)
    }

    fn vocab_size(&self) -> usize {
        258
    }

    fn eos_id(&self) -> Option<u32> {
        Some(EOS)
    }
}

pub fn spec(dataset: &str, path: impl AsRef<Path>) -> DatasetSpec {
    let dataset_path = Some(path.as_ref().to_str().unwrap().to_owned());
    DatasetSpec { dataset: dataset.to_owned(), dataset_path, ..DatasetSpec::default() }
}

pub fn options(batch_size: usize, seq_len: usize) -> LoaderOptions {
    LoaderOptions { batch_size, seq_len, dp_rank: 0, dp_degree: 1, shuffle: None, repeat: true, num_workers: Some(2) }
}

pub fn no_hub(repo: &str) -> Result<Arc<dyn RemoteFiles>> {
    Err(Error::Hub(format!("{repo} was not to be asked for")))
}

pub fn loader(spec: &DatasetSpec, options: LoaderOptions) -> Result<Loader> {
    Loader::new(spec, Some(Arc::new(Bytes)), options, &no_hub)
}

pub fn next(loader: &mut Loader) -> Batch {
    loader.next_batch().unwrap().expect("the data goes on")
}

/// The first error, which must come.
pub fn first_error(loader: &mut Loader) -> Error {
    loop {
        match loader.next_batch() {
            Ok(batch) => assert!(batch.is_some(), "the data ended well"),
            Err(error) => return error,
        }
    }
}

/// All tokens of one pass, in order.
pub fn pass(spec: &DatasetSpec, shuffle: Option<u64>) -> Vec<u32> {
    let dataset = datasets::open(spec, Some(Bytes.vocab_size()), 8, &no_hub).unwrap();
    let plan = Plan { dataset, encoder: Some(Arc::new(Bytes)), shuffle, repeat: false, n_workers: 3 };
    Tokenized::new(&plan, Position::default()).unwrap().flat_map(|document| document.unwrap().tokens).collect()
}

pub fn encoded(documents: &[impl AsRef<str>]) -> Vec<u32> {
    documents.iter().flat_map(|text| Bytes.encode(text.as_ref(), true, true).unwrap()).collect()
}

/// Texts that differ in content and length.
pub fn documents(n: usize) -> Vec<String> {
    (0..n).map(|i| format!("{i}:{}", &"abcdefgh".repeat(4)[..i * 7 % 29])).collect()
}

pub fn json_lines(documents: &[impl AsRef<str>]) -> Vec<u8> {
    let line = |text: &str| format!("{}\n", serde_json::json!({"url": "x", "text": text}));
    documents.iter().map(|text| line(text.as_ref())).collect::<String>().into_bytes()
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub fn zst(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

pub fn u16_bytes(ids: impl IntoIterator<Item = u32>) -> Vec<u8> {
    ids.into_iter().flat_map(|id| (id as u16).to_le_bytes()).collect()
}

pub fn write(dir: &TempDir, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Columns `id`, `text` and `tags` in two row groups; `None` is a null.
pub fn parquet(documents: &[Option<&str>]) -> Vec<u8> {
    use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
    let schema = "message docs { required int64 id; optional binary text (UTF8); repeated binary tags (UTF8); }";
    let schema = Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
    let mut bytes = Vec::new();
    let mut writer = parquet::file::writer::SerializedFileWriter::new(&mut bytes, schema, Default::default()).unwrap();
    for rows in documents.chunks(documents.len().div_ceil(2)) {
        let mut group = writer.next_row_group().unwrap();
        let ids: Vec<i64> = (0..rows.len() as i64).collect();
        let texts: Vec<ByteArray> = rows.iter().flatten().map(|&text| ByteArray::from(text)).collect();
        let levels: Vec<i16> = rows.iter().map(|text| i16::from(text.is_some())).collect();
        let none = vec![0; rows.len()];

        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int64Type>().write_batch(&ids, None, None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&texts, Some(&levels), None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&[], Some(&none), Some(&none)).unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
    bytes
}

/// Conversations of (role, content) in a column `messages` of lists of structs, whose `name` is always null, and the first
/// and last contents in `prompt` and `completion`; in row groups of two. An empty conversation is null.
pub fn parquet_chats(chats: &[&[(&str, &str)]]) -> Vec<u8> {
    use parquet::data_type::{ByteArray, ByteArrayType};
    let schema = "message chats {
        optional group messages (LIST) { repeated group list { optional group element {
            optional binary role (UTF8); optional binary content (UTF8); optional binary name (UTF8); } } }
        optional binary prompt (UTF8);
        optional binary completion (UTF8);
    }";
    let schema = Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
    let mut bytes = Vec::new();
    let mut writer = parquet::file::writer::SerializedFileWriter::new(&mut bytes, schema, Default::default()).unwrap();
    for rows in chats.chunks(2) {
        let mut group = writer.next_row_group().unwrap();
        let mut write = |values: Vec<&str>, definition: &[i16], repetition: Option<&[i16]>| {
            let values: Vec<ByteArray> = values.into_iter().map(ByteArray::from).collect();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&values, Some(definition), repetition).unwrap();
            column.close().unwrap();
        };
        // Definition: 0 no list, 3 an element, 4 an element's value. Repetition: 0 in the first of a row.
        let of_messages = |present: i16| -> Vec<i16> {
            rows.iter().flat_map(|chat| if chat.is_empty() { vec![0] } else { vec![present; chat.len()] }).collect()
        };
        let repetition: Vec<i16> =
            rows.iter().flat_map(|chat| (0..chat.len().max(1)).map(|i| i16::from(i > 0))).collect();
        write(rows.concat().iter().map(|(role, _)| *role).collect(), &of_messages(4), Some(&repetition));
        write(rows.concat().iter().map(|(_, content)| *content).collect(), &of_messages(4), Some(&repetition));
        write(vec![], &of_messages(3), Some(&repetition));
        let is_there: Vec<i16> = rows.iter().map(|chat| i16::from(!chat.is_empty())).collect();
        write(rows.iter().filter_map(|chat| Some(chat.first()?.1)).collect(), &is_there, None);
        write(rows.iter().filter_map(|chat| Some(chat.last()?.1)).collect(), &is_there, None);
        group.close().unwrap();
    }
    writer.close().unwrap();
    bytes
}

/// The same documents in every format, over three files of unequal size, one of a single document.
pub fn every_format(dir: &TempDir, documents: &[String]) -> Vec<DatasetSpec> {
    let n = documents.len();
    let parts = [&documents[..n / 2], &documents[n / 2..n / 2 + 1], &documents[n / 2 + 1..]];
    for (i, part) in parts.iter().enumerate() {
        let lines = json_lines(part);
        write(dir, &format!("json/{i}.jsonl"), &lines);
        let middle = lines.iter().position(|&byte| byte == b'\n').unwrap() + 1;
        let members = [gzip(&lines[..middle]), gzip(&lines[middle..])].concat();
        write(dir, &format!("gz/{i}.json.gz"), members);
        write(dir, &format!("zst/{i}.json.zst"), zst(&lines));
        let rows: Vec<_> = part.iter().map(|text| Some(text.as_str())).collect();
        write(dir, &format!("parquet/{i}.parquet"), parquet(&rows));
        write(dir, &format!("tokens/{i}.bin"), u16_bytes(encoded(part)));
        write(dir, &format!("tokens/{i}.json"), r#"{"vocab_size": 258, "eos_id": 257, "dtype": "u16"}"#);
    }
    // A text file is one document. An empty one is none.
    for (i, text) in documents.iter().enumerate() {
        write(dir, &format!("text/{i:05}.txt"), text);
    }
    let at = |name: &str| dir.path().join(name);
    vec![
        spec("json", at("json")),
        spec("json", at("gz")),
        spec("json", at("zst/*.zst")),
        spec("parquet", at("parquet")),
        spec("tokens", at("tokens")),
        spec("text", at("text")),
    ]
}
