//! Data that is wrong, and threads that fail.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tempfile::TempDir;
use titan::data::chat::{Example, Message};
use titan::data::{DatasetSpec, Encode, Loader, LoaderOptions};
use titan::{Error, Result};

use crate::common::*;
use crate::resume::assert_resumes_exactly;
use crate::shards::{llmc, megatron};

#[test]
fn malformed_records_are_skipped_up_to_the_limit() {
    let dir = TempDir::new().unwrap();
    let good = documents(30);
    let mut lines: Vec<Vec<u8>> = good.iter().map(|text| json_lines(&[text])).collect();
    for (at, bad) in [(2, &b"{\"text\": \"cut\n"[..]), (9, b"\"\xff\"\n"), (20, b"{\"text\": null}\n")] {
        lines.insert(at, bad.to_vec());
    }
    let lenient = DatasetSpec { max_bad_records: 3, ..spec("json", write(&dir, "a.json", lines.concat())) };
    assert_eq!(pass(&lenient, None), encoded(&good));
    for shuffle in [None, Some(4)] {
        // Over several epochs: each may skip as many.
        assert_resumes_exactly(&lenient, &LoaderOptions { shuffle, ..options(2, 20) }, 30);
    }

    let strict = DatasetSpec { max_bad_records: 2, ..lenient };
    let mut loader = loader(&strict, options(1, 20)).unwrap();
    let message = first_error(&mut loader).to_string();
    assert!(message.contains("a.json:21: field `text` is null"), "{message}");
    assert!(message.contains("max_bad_records = 2"), "{message}");
    // Asked again, it is not silent.
    assert_eq!(loader.next_batch().unwrap_err().to_string(), message);

    let rows = write(&dir, "a.parquet", parquet(&[Some("one"), None, Some("three")]));
    let rows = DatasetSpec { max_bad_records: 1, ..spec("parquet", rows) };
    assert_eq!(pass(&rows, None), encoded(&["one", "three"]));
}

#[test]
fn each_faulty_file_is_named_with_what_is_wrong() {
    let dir = TempDir::new().unwrap();
    let half = |bytes: &[u8]| bytes[..bytes.len() / 2].to_vec();
    let lines = json_lines(&documents(2000));
    let rows = parquet(&[Some("one"), Some("two"), None]);
    let ids = u16_bytes(0..200);
    for (name, sidecar) in [
        ("typo.json", r#"{"vocab_size": 258, "dtype": "u8"}"#),
        ("small.json", r#"{"vocab_size": 100, "dtype": "u16"}"#),
        ("wide.json", r#"{"vocab_size": 258, "dtype": "u32"}"#),
        ("contrary.json", r#"{"vocab_size": 258, "dtype": "u32"}"#),
        ("two/a.json", r#"{"vocab_size": 258, "dtype": "u16"}"#),
        ("two/b.json", r#"{"vocab_size": 300, "dtype": "u16"}"#),
    ] {
        write(&dir, name, sidecar);
    }
    write(&dir, "gap.idx", megatron(8, &[50, 60, 90], 4));
    write(&dir, "code.idx", megatron(7, &[50], 4));
    write(&dir, "long.idx", megatron(8, &[150, 90], 2));
    write(&dir, "no-index.idx", "hello");
    write(&dir, "two/b.bin", &ids);

    let cases: Vec<(&str, &str, Vec<u8>, &[&str])> = vec![
        (
            "json",
            "a.json",
            b"{\"text\": \"a\"}\n{\"text\": \"b\n".into(),
            &["a.json:2:11: not valid JSON: EOF", "max_bad_records"],
        ),
        (
            "json",
            "b.json",
            b"{\"content\": \"a\", \"url\": 1}\n".into(),
            &["b.json:1: no field `text`", "`content`, `url`"],
        ),
        ("json", "c.json", b"{\"text\": 5}\n".into(), &["c.json:1: field `text` is a number, not text"]),
        ("json", "d.json", b"\"text\"\n".into(), &["d.json:1: is a string, not an object"]),
        ("json", "e.json", b"\n{\"text\": \"\xc3\"}\n".into(), &["e.json:2:", "not valid JSON"]),
        ("json", "f.json", b" [{\"text\": \"a\"}]".into(), &["f.json: is one JSON array", "jq -c"]),
        ("json", "g.json.gz", half(&gzip(&lines)), &["g.json.gz:", "is the file complete?"]),
        ("json", "h.json.zst", half(&zst(&lines)), &["h.json.zst:", "is the file complete?"]),
        ("json", "i.json", b"\n\n".into(), &["i.json: the dataset is empty"]),
        ("json", "j.json", b"{\"text\": \"abc\"}\n".into(), &["j.json", "has 5 tokens", "seq_len + 1 = 17"]),
        ("text", "a.txt", b"one\ntwo\nthr\xffee\n".into(), &["a.txt:3: not valid UTF-8"]),
        ("text", "b.txt", b"".into(), &["b.txt: the dataset is empty"]),
        ("parquet", "a.parquet", half(&rows), &["a.parquet: not a complete parquet file"]),
        ("parquet", "b.parquet", rows, &["b.parquet: row 3: the text is null"]),
        ("tokens", "odd.bin", half(&ids)[..99].into(), &["odd.bin: 99 bytes are not a whole number"]),
        ("tokens", "small.bin", ids.clone(), &["small.bin: token 100 is 100", "ends at 99"]),
        ("tokens", "wide.bin", ids.clone(), &["wide.bin: token 0 is 65536", "is the dtype right?"]),
        ("tokens", "typo.bin", ids.clone(), &["typo.json", "u8", r#""dtype": "u16""#]),
        ("tokens", "short.bin", u16_bytes(0..9), &["short.bin", "has 9 tokens", "seq_len + 1 = 17"]),
        ("tokens", "void.bin", b"".into(), &["void.bin", "has 0 tokens"]),
        ("tokens", "cut.bin", llmc(20240520, 1, 500, &ids), &["cut.bin: its header says 500 ids, but it has 200"]),
        ("tokens", "version.bin", llmc(20240520, 2, 200, &ids), &["version.bin", "version 2"]),
        ("tokens", "contrary.bin", llmc(20240520, 1, 200, &ids), &["contrary.bin: holds u16 ids", "contrary.json"]),
        ("tokens", "gap.bin", ids.clone(), &["gap.idx", "do not follow one another at byte 100"]),
        ("tokens", "code.bin", ids.clone(), &["code.idx: dtype code 7"]),
        ("tokens", "long.bin", ids.clone(), &["long.idx: describes 480 bytes", "has 400"]),
        ("tokens", "no-index.bin", ids.clone(), &["no-index.idx: not an index"]),
    ];
    for (dataset, name, bytes, expected) in cases {
        let spec = spec(dataset, write(&dir, name, bytes));
        let message = match loader(&spec, options(2, 16)) {
            Err(error) => error.to_string(),
            // Far into a compressed file.
            Ok(mut loader) => first_error(&mut loader).to_string(),
        };
        assert!(expected.iter().all(|part| message.contains(part)), "{name}: {message}");
    }
    write(&dir, "two/a.bin", &ids);
    let message = loader(&spec("tokens", dir.path().join("two")), options(2, 16)).err().unwrap().to_string();
    assert!(message.contains("two/b.json: vocab_size 300") && message.contains("differ from 258"), "{message}");
}

#[test]
fn each_faulty_setting_is_refused_with_what_would_work() {
    let dir = TempDir::new().unwrap();
    let here = dir.path().to_str().unwrap();
    write(&dir, "folder/a.csv", "a,b");
    write(&dir, "folder/.hidden.txt", "not seen");
    let rows = write(&dir, "a.parquet", parquet(&[Some("one")]));
    let good = spec("json", write(&dir, "good.json", json_lines(&documents(20))));
    let ids = spec("tokens", write(&dir, "ids.bin", u16_bytes(0..200)));
    let column = |name: &str| DatasetSpec { text_field: name.to_owned(), ..spec("parquet", &rows) };
    let named = |dataset: &str| DatasetSpec { dataset: dataset.to_owned(), ..DatasetSpec::default() };

    let cases: Vec<(DatasetSpec, &[&str])> = vec![
        (named("text"), &["`text` needs a dataset_path"]),
        (named("c4_tset"), &["unknown dataset \"c4_tset\"; did you mean \"c4_test\"?", "parquet"]),
        (named("zzz"), &["unknown dataset \"zzz\"\n", "c4_validation"]),
        (named(here), &["is a path: give it as dataset_path"]),
        (spec("json", dir.path().join("none.json")), &["none.json", "no such file"]),
        (spec("json", dir.path().join("none/*.json")), &["no file matches"]),
        (spec("text", dir.path().join("folder")), &["none of its 1 files ends in .txt"]),
        (column("body"), &["a.parquet: no field `body`", "`id`, `text`, `tags`"]),
        (column("id"), &["column `id` is INT64, not text"]),
        (column("tags"), &["column `tags` is a list of BYTE_ARRAY, not text"]),
    ];
    for (spec, expected) in cases {
        let message = loader(&spec, options(2, 16)).err().unwrap().to_string();
        assert!(expected.iter().all(|part| message.contains(part)), "{spec:?}: {message}");
    }

    let message = loader(&good, LoaderOptions { repeat: false, ..options(100, 16) }).err().unwrap().to_string();
    assert!(message.contains("one batch takes 1700"), "{message}");
    let Err(Error::Tokenizer(message)) = Loader::new(&good, None, options(1, 4), &no_hub) else { panic!("no error") };
    assert!(message.contains("needs a tokenizer"), "{message}");
    let message = Loader::new(&ids, None, options(1, 4), &no_hub).err().unwrap().to_string();
    assert!(message.contains("by a tokenizer or by a file") && message.contains("ids.json"), "{message}");
}

/// Fails, or panics, at its `left`-th document.
struct Faulty {
    left: AtomicUsize,
    panics: bool,
}

impl Encode for Faulty {
    fn encode(&self, text: &str, add_bos: bool, add_eos: bool) -> Result<Vec<u32>> {
        if self.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            assert!(!self.panics, "out of cheese");
            return Err(Error::Tokenizer("cannot".to_owned()));
        }
        Bytes.encode(text, add_bos, add_eos)
    }

    fn encode_chat(&self, messages: &[Message]) -> Result<Example> {
        Bytes.encode_chat(messages)
    }

    fn vocab_size(&self) -> usize {
        258
    }

    fn eos_id(&self) -> Option<u32> {
        None
    }
}

#[test]
fn a_worker_that_fails_or_panics_is_an_error_and_no_hang() {
    let dir = TempDir::new().unwrap();
    let spec = spec("json", write(&dir, "a.json", json_lines(&documents(500))));
    for (panics, expected) in [(false, "cannot"), (true, "panicked: out of cheese")] {
        let encoder = Arc::new(Faulty { left: AtomicUsize::new(400), panics });
        let mut loader = Loader::new(&spec, Some(encoder), options(1, 16), &no_hub).unwrap();
        let message = first_error(&mut loader).to_string();
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn a_file_that_vanishes_under_way_is_an_error_that_names_it() {
    let dir = TempDir::new().unwrap();
    let path: Vec<PathBuf> =
        (0..40).map(|i| write(&dir, &format!("{i:02}.json"), json_lines(&documents(20)))).collect();
    let mut loader = loader(&spec("json", dir.path()), options(1, 16)).unwrap();
    std::fs::remove_file(&path[39]).unwrap();
    let message = first_error(&mut loader).to_string();
    assert!(message.contains("39.json"), "{message}");
}
