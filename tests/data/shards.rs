//! Token shards: read, and written.

use std::sync::Arc;

use tempfile::TempDir;
use titan::data::Loader;
use titan::data::datasets::{self, Dtype, Sidecar};
use titan::data::pipeline::Plan;
use titan::data::shards::{ShardWriter, tokenize};
use titan::data::tokenizer::Tokenizer;

use crate::common::*;

/// llm.c's header, then the ids.
pub fn llmc(magic: i32, version: i32, n_tokens: i32, ids: &[u8]) -> Vec<u8> {
    let mut header = vec![0; 1024];
    for (i, field) in [magic, version, n_tokens].into_iter().enumerate() {
        header[4 * i..][..4].copy_from_slice(&field.to_le_bytes());
    }
    [header, ids.to_vec()].concat()
}

/// Megatron's index of sequences that follow one another, of ids of `width` bytes.
pub fn megatron(dtype_code: u8, lengths: &[i32], width: i64) -> Vec<u8> {
    let mut index = b"MMIDIDX\0\0".to_vec();
    index.extend(1u64.to_le_bytes());
    index.push(dtype_code);
    index.extend((lengths.len() as u64).to_le_bytes());
    index.extend((lengths.len() as u64 + 1).to_le_bytes());
    index.extend(lengths.iter().flat_map(|length| length.to_le_bytes()));
    let mut offset = 0;
    for &length in lengths {
        index.extend(i64::to_le_bytes(offset));
        offset += i64::from(length) * width;
    }
    index.extend((0..=lengths.len() as i64).flat_map(i64::to_le_bytes));
    index
}

#[test]
fn token_shards_of_every_kind_read_alike() {
    let dir = TempDir::new().unwrap();
    let ids: Vec<u32> = (0..200).collect();
    let narrow = u16_bytes(0..200);
    let wide: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let sidecar = |dtype: &str| format!(r#"{{"vocab_size": 258, "eos_id": 0, "dtype": "{dtype}"}}"#);
    write(&dir, "raw16.bin", &narrow);
    write(&dir, "named16.bin", &narrow);
    write(&dir, "named16.json", sidecar("u16"));
    write(&dir, "named32.bin", &wide);
    write(&dir, "named32.json", sidecar("u32"));
    write(&dir, "llmc16.bin", llmc(20240520, 1, 200, &narrow));
    write(&dir, "llmc32.bin", llmc(20240801, 7, 200, &wide));
    write(&dir, "megatron16.bin", &narrow);
    write(&dir, "megatron16.idx", megatron(8, &[50, 0, 150], 2));
    write(&dir, "megatron32.bin", &wide);
    write(&dir, "megatron32.idx", megatron(4, &[120, 80], 4));
    for name in ["raw16", "named16", "named32", "llmc16", "llmc32", "megatron16", "megatron32"] {
        let spec = spec("tokens", dir.path().join(name).with_extension("bin"));
        assert_eq!(pass(&spec, None), ids, "{name}");
    }
}

#[test]
fn a_sidecar_makes_a_tokenizer_needless() {
    let dir = TempDir::new().unwrap();
    write(&dir, "a.json", r#"{"vocab_size": 258, "eos_id": 7, "dtype": "u16", "made_by": "me"}"#);
    let spec = spec("tokens", write(&dir, "a.bin", u16_bytes(0..200)));
    let vocabulary = datasets::vocabulary(&spec).unwrap().unwrap();
    assert_eq!((vocabulary.vocab_size, vocabulary.eos_id), (258, Some(7)));
    let mut loader = Loader::new(&spec, None, options(2, 4), &no_hub).unwrap();
    assert_eq!(next(&mut loader).inputs, [0, 1, 2, 3, 5, 6, 7, 8]);
}

#[test]
fn tokenized_shards_train_as_their_text_does() {
    let dir = TempDir::new().unwrap();
    let documents = documents(60);
    let text = spec("json", write(&dir, "a.json", json_lines(&documents)));
    for dtype in [None, Some(Dtype::U32)] {
        let out = TempDir::new().unwrap();
        let sidecar = Sidecar { vocab_size: 258, eos_id: Some(EOS), dtype };
        let writer = || ShardWriter::new(out.path(), "tales", sidecar.clone(), 300);
        let dataset = datasets::open(&text, None, 1, &no_hub).unwrap();
        let plan = Plan { dataset, encoder: Some(Arc::new(Bytes)), shuffle: None, repeat: false, n_workers: 2 };
        let counts = tokenize(&plan, writer().unwrap(), |_, _| ()).unwrap();

        let n_tokens = encoded(&documents).len();
        assert_eq!((counts.documents, counts.tokens), (60, n_tokens as u64));
        assert_eq!(counts.text_bytes, documents.iter().map(|text| text.len() as u64).sum::<u64>());
        assert!(counts.shards > 2, "{counts:?}");
        let files = std::fs::read_dir(out.path()).unwrap().map(|entry| entry.unwrap());
        let bytes: u64 =
            files.filter(|f| f.path().extension() == Some("bin".as_ref())).map(|f| f.metadata().unwrap().len()).sum();
        assert_eq!(bytes, (n_tokens * dtype.unwrap_or(Dtype::U16).bytes()) as u64);

        let mut from_text = loader(&text, options(2, 30)).unwrap();
        let mut from_shards = Loader::new(&spec("tokens", out.path()), None, options(2, 30), &no_hub).unwrap();
        for _ in 0..80 {
            assert_eq!(next(&mut from_shards), next(&mut from_text));
        }
        let message = writer().err().unwrap().to_string();
        assert!(message.contains("tales-00000.bin exists already"), "{message}");
    }
}

#[test]
fn titan_tokenize_writes_shards_that_train_as_their_text_does() {
    let dir = TempDir::new().unwrap();
    let text = spec("json", write(&dir, "a.json.gz", gzip(&json_lines(&documents(60)))));
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/tokenizer");
    let run = || {
        let mut titan = assert_cmd::Command::cargo_bin("titan").unwrap();
        titan.current_dir(&dir).args(["tokenize", "--dataset=json", "--dataset-path=a.json.gz", "--output=out"]);
        titan.args(["--tokenizer", folder, "--shard-tokens=200", "--num-workers=2"]).assert()
    };
    run().success().stdout(predicates::str::starts_with("60 documents, "));

    let tokenizer = Arc::new(Tokenizer::from_dir(folder).unwrap());
    let shards = spec("tokens", dir.path().join("out"));
    let vocabulary = datasets::vocabulary(&shards).unwrap().unwrap();
    assert_eq!((vocabulary.vocab_size, vocabulary.eos_id), (tokenizer.vocab_size(), tokenizer.eos_id()));
    let mut from_text = Loader::new(&text, Some(tokenizer), options(2, 30), &no_hub).unwrap();
    let mut from_shards = Loader::new(&shards, None, options(2, 30), &no_hub).unwrap();
    for _ in 0..40 {
        assert_eq!(next(&mut from_shards), next(&mut from_text));
    }
    run().failure().code(2).stderr(predicates::str::contains("json-00000.bin exists already"));
}

#[test]
fn ids_that_do_not_fit_the_dtype_are_refused_before_writing() {
    let out = TempDir::new().unwrap();
    let sidecar = Sidecar { vocab_size: 70_000, eos_id: None, dtype: Some(Dtype::U16) };
    let message = ShardWriter::new(out.path(), "tales", sidecar, 300).err().unwrap().to_string();
    assert!(message.contains("vocabulary of 70000"), "{message}");
}
