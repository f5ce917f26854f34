//! Tokenizers: reading what others wrote, and training one as a user does.

use std::fs;
use std::io::Write;
use std::path::Path;

use assert_cmd::Command;
use predicates::prelude::*;
use predicates::str::contains;
use serde_json::{Value, json};
use tempfile::TempDir;
use titan::Error;
use titan::data::tokenizer::Tokenizer;

const SHIPPED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/tokenizer");
const STORIES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/data/stories_validation.json.zst");

/// A folder with these files.
fn folder(files: &[(&str, &str)]) -> TempDir {
    let dir = TempDir::new().unwrap();
    for (name, text) in files {
        fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

/// A byte-level BPE of single letters and "ab", with `extra` on top, as text of a tokenizer.json.
fn letters(extra: Value) -> String {
    let vocab: serde_json::Map<_, _> = ('a'..='z').zip(0..).map(|(letter, id)| (letter.into(), json!(id))).collect();
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let mut tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": byte_level, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [],
        },
    });
    for (key, value) in extra.as_object().unwrap() {
        tokenizer[key] = value.clone();
    }
    tokenizer.to_string()
}

fn refusal(dir: &Path) -> String {
    match Tokenizer::from_dir(dir) {
        Err(Error::Tokenizer(message)) => message,
        Err(other) => panic!("not a fault of the tokenizer: {other}"),
        Ok(_) => panic!("it was read"),
    }
}

#[test]
fn the_shipped_tokenizer_agrees_with_hugging_faces_library() {
    // By tokenizers 0.23.3 for Python: `Tokenizer.from_file(file).encode(text).ids`, which adds BOS.
    let golden: Value = serde_json::from_str(include_str!("golden/tokenizer.json")).unwrap();
    let tokenizer = Tokenizer::from_dir(SHIPPED).unwrap();
    assert_eq!(tokenizer.vocab_size(), 2048);
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(0), Some(1)));
    for case in golden.as_array().unwrap() {
        let ids = tokenizer.encode(case["text"].as_str().unwrap(), true, false).unwrap();
        assert_eq!(json!(ids), case["ids"]);
        assert_eq!(tokenizer.decode(&ids).unwrap(), case["decoded"].as_str().unwrap());
    }
}

#[test]
fn bos_and_eos_are_added_as_asked_and_never_twice() {
    // The shipped tokenizer's own post-processor adds BOS; this one's adds both; `plain` adds none.
    let both = json!({
        "type": "TemplateProcessing", "pair": [],
        "single": [
            { "SpecialToken": { "id": "<s>", "type_id": 0 } },
            { "Sequence": { "id": "A", "type_id": 0 } },
            { "SpecialToken": { "id": "</s>", "type_id": 0 } },
        ],
        "special_tokens": {
            "<s>": { "id": "<s>", "ids": [26], "tokens": ["<s>"] },
            "</s>": { "id": "</s>", "ids": [27], "tokens": ["</s>"] },
        },
    });
    let config = r#"{ "bos_token": "<s>", "eos_token": { "content": "</s>" } }"#;
    let plain = folder(&[("tokenizer.json", &letters(json!({}))), ("tokenizer_config.json", config)]);
    let both =
        folder(&[("tokenizer.json", &letters(json!({ "post_processor": both }))), ("tokenizer_config.json", config)]);
    for dir in [Path::new(SHIPPED), plain.path(), both.path()] {
        let tokenizer = Tokenizer::from_dir(dir).unwrap();
        let (bos, eos) = (tokenizer.bos_id().unwrap(), tokenizer.eos_id().unwrap());
        let bare = tokenizer.encode("cab", false, false).unwrap();
        assert!(!bare.contains(&bos) && !bare.contains(&eos), "{bare:?}");
        assert_eq!(tokenizer.encode("cab", true, false).unwrap(), [&[bos], &bare[..]].concat());
        assert_eq!(tokenizer.encode("cab", false, true).unwrap(), [&bare[..], &[eos]].concat());
        assert_eq!(tokenizer.encode("cab", true, true).unwrap(), [&[bos], &bare[..], &[eos]].concat());
        assert_eq!(tokenizer.encode("", true, true).unwrap(), [bos, eos]);
        assert_eq!(tokenizer.encode("", false, false).unwrap(), [0_u32; 0]);
    }
}

#[test]
fn one_token_may_be_bos_and_eos() {
    let config = r#"{ "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>" }"#;
    let ends = json!({
        "type": "TemplateProcessing", "pair": [],
        "single": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "SpecialToken": { "id": "<|endoftext|>", "type_id": 0 } }],
        "special_tokens": { "<|endoftext|>": { "id": "<|endoftext|>", "ids": [26], "tokens": ["<|endoftext|>"] } },
    });
    for extra in [json!({}), json!({ "post_processor": ends })] {
        let dir = folder(&[("tokenizer.json", &letters(extra)), ("tokenizer_config.json", config)]);
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        assert_eq!(tokenizer.encode("ab", true, true).unwrap(), [26, 0, 1, 26]);
        assert_eq!(tokenizer.encode("ab", false, false).unwrap(), [0, 1]);
    }
}

#[test]
fn ids_of_special_tokens_are_those_the_vocabulary_gives() {
    // The config claims id 128000 for BOS, which the vocabulary lacks, and 7 for a token that has the id 25.
    let config = json!({
        "added_tokens_decoder": {
            "128000": { "content": "<bos>", "special": true, "lstrip": false, "normalized": false },
            "128001": { "content": "<eos>", "special": true },
            "7": { "content": "z", "special": true },
        },
        "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": null,
    });
    let dir = folder(&[("tokenizer.json", &letters(json!({}))), ("tokenizer_config.json", &config.to_string())]);
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.vocab_size()), (Some(26), Some(27), 28));
    assert_eq!(tokenizer.token_id("z"), Some(25));
    // Bytes outside of the vocabulary are lost, special tokens are not decoded.
    assert_eq!(tokenizer.decode(&tokenizer.encode("a cab!z", true, true).unwrap()).unwrap(), "acab");
}

#[test]
fn the_vocabulary_reaches_to_the_highest_id() {
    let mut tokenizer: Value = serde_json::from_str(&letters(json!({}))).unwrap();
    tokenizer["model"]["vocab"]["far"] = json!(999);
    let dir = folder(&[("tokenizer.json", &tokenizer.to_string())]);
    assert_eq!(Tokenizer::from_dir(dir.path()).unwrap().vocab_size(), 1000);
}

#[test]
fn a_document_is_neither_cut_nor_filled_up() {
    let limits = json!({
        "truncation": { "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0 },
        "padding": {
            "strategy": { "Fixed": 8 }, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "a",
        },
    });
    let dir = folder(&[("tokenizer.json", &letters(limits))]);
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(tokenizer.encode("abcde", false, false).unwrap(), [0, 1, 2, 3, 4]);
}

#[test]
fn vocab_and_merges_make_byte_level_bpe() {
    let json = [
        ("vocab.json", r#"{ "a": 0, "b": 1, "ab": 2, "Ġ": 3, "Ġab": 4 }"#),
        ("merges.txt", "#version: 0.2\na b\nĠ ab\n"),
    ];
    let txt = [("vocab.txt", "a\nb\nab\nĠ\nĠab\n"), json[1]];
    for files in [json, txt] {
        let dir = folder(&files);
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        assert_eq!(tokenizer.encode("ab ab a", false, false).unwrap(), [2, 4, 3, 0]);
        assert_eq!(tokenizer.decode(&[2, 4, 3, 0]).unwrap(), "ab ab a");
    }
}

#[test]
fn a_vocabulary_without_merges_is_one_of_words() {
    let dir = folder(&[("vocab.txt", "[UNK]\nthe\ncat\n.\n")]);
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(tokenizer.encode("the cat sat.", false, false).unwrap(), [1, 2, 0, 3]);

    let dir = folder(&[("vocab.json", r#"{ "the": 0 }"#)]);
    assert!(refusal(dir.path()).contains("[UNK]"));
}

#[test]
fn the_files_of_a_tokenizer_make_it_again() {
    let tokenizer = Tokenizer::from_dir(SHIPPED).unwrap();
    let names: Vec<_> = tokenizer.files().iter().map(|file| file.name.as_str()).collect();
    assert_eq!(names, ["tokenizer.json", "tokenizer_config.json"]);
    let again = Tokenizer::from_files(tokenizer.files().to_vec(), "a checkpoint").unwrap();
    let text = "Once upon a time";
    assert_eq!(again.encode(text, true, true).unwrap(), tokenizer.encode(text, true, true).unwrap());
}

#[test]
fn a_stream_gives_the_text_in_whole_characters() {
    let tokenizer = Tokenizer::from_dir(SHIPPED).unwrap();
    let text = "Grüße aus 東京, \"🦊 said\" the owl.\n\nThe end. ";
    let ids = tokenizer.encode(text, true, true).unwrap();
    let mut stream = tokenizer.stream();
    let mut pieces = Vec::new();
    for &id in &ids {
        pieces.extend(stream.push(id).unwrap());
    }
    assert_eq!(stream.finish().unwrap(), None);
    assert_eq!(pieces.concat(), text);
    assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')), "{pieces:?}");
    assert!(pieces.len() > 15, "{pieces:?}");
}

#[test]
fn a_character_that_is_cut_off_comes_out_at_the_end() {
    let tokenizer = Tokenizer::from_dir(SHIPPED).unwrap();
    let fox = tokenizer.encode("a🦊", false, false).unwrap();
    let mut stream = tokenizer.stream();
    let mut text = String::new();
    for &id in &fox[..fox.len() - 1] {
        text += &stream.push(id).unwrap().unwrap_or_default();
    }
    assert_eq!(text, "a");
    assert_eq!(stream.finish().unwrap().as_deref(), Some("\u{fffd}"));
}

#[test]
fn a_folder_without_a_tokenizer_says_what_to_do() {
    let dir = folder(&[("config.json", "{}")]);
    for (dir, reason) in [(dir.path(), "tokenizer.json, vocab.json"), (Path::new("no/such/place"), "no such folder")] {
        let message = refusal(dir);
        for part in [reason, &dir.display().to_string(), "titan download-tokenizer", "titan train-tokenizer"] {
            assert!(message.contains(part), "{message}");
        }
    }
    let dir = folder(&[("tokenizer.model", "")]);
    assert!(refusal(dir.path()).contains("tokenizer.model"));
}

#[test]
fn malformed_files_are_named_and_never_panic() {
    let good = letters(json!({}));
    let panics = letters(json!({ "normalizer": { "type": "Precompiled", "precompiled_charsmap": "AAAA" } }));
    let cases: [(&str, &str); 6] = [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", &panics),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", r#"{ "bos_token": 3 }"#),
        ("tokenizer_config.json", r#"{ "added_tokens_decoder": { "1": { "content": null } } }"#),
    ];
    for (name, text) in cases {
        let dir = folder(&[("tokenizer.json", &good), (name, text)]);
        let message = refusal(dir.path());
        assert!(message.contains(&format!("{name} cannot be used")), "{text}: {message}");
    }
    let dir = folder(&[("vocab.json", "{\"a\": 0}"), ("merges.txt", "a b c\n")]);
    assert!(refusal(dir.path()).contains("`a b c`"));
}

fn train_tokenizer(dir: &TempDir) -> Command {
    let mut titan = Command::cargo_bin("titan").unwrap();
    titan.arg("train-tokenizer").current_dir(dir.path());
    titan
}

#[test]
fn a_tokenizer_is_trained_on_packed_stories() {
    let dir = TempDir::new().unwrap();
    let printed = contains("vocabulary of 600").and(contains("bytes per token"));
    train_tokenizer(&dir)
        .args([STORIES, "--vocab-size", "600", "--output", "tok"])
        .assert()
        .success()
        .stdout(printed)
        .stderr("");
    let tokenizer = Tokenizer::from_dir(dir.path().join("tok")).unwrap();
    assert_eq!(tokenizer.vocab_size(), 600);
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(0), Some(1)));
    // Bytes that no story has can be encoded nevertheless.
    let text = "Ωmega \u{7f}\t🦊";
    assert_eq!(tokenizer.decode(&tokenizer.encode(text, true, true).unwrap()).unwrap(), text);
}

#[test]
fn plain_json_and_packed_files_train_the_same_tokenizer() {
    let text = "the quick brown fox jumps over the lazy dog\n".repeat(50);
    let line = json!({ "id": 1, "body": text }).to_string() + "\n\n";
    let dir = folder(&[("a.txt", &text), ("a.jsonl", &line)]);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(line.as_bytes()).unwrap();
    fs::write(dir.path().join("a.json.gz"), gzip.finish().unwrap()).unwrap();
    fs::write(dir.path().join("b.txt.zst"), zstd::encode_all(text.as_bytes(), 1).unwrap()).unwrap();

    let mut made = Vec::new();
    for file in ["a.txt", "a.jsonl", "*.json.gz", "b.txt.zst"] {
        let args = [file, "--vocab_size=280", "--text-field", "body", "--output", "tok"];
        train_tokenizer(&dir).args(args).assert().success();
        made.push(fs::read_to_string(dir.path().join("tok/tokenizer.json")).unwrap());
    }
    assert!(made.iter().all(|tokenizer| *tokenizer == made[0]));
}

#[test]
fn text_that_cannot_be_read_is_named_and_nothing_is_written() {
    let dir = folder(&[("good.txt", "hello"), ("bad.json", "{\"text\": \"a\"}\n{\"txt\": 1}\n"), ("empty.txt", "")]);
    let cases = [
        (vec!["nothing*"], 1, "no file matches \"nothing*\""),
        (vec!["bad.json"], 1, "bad.json:2"),
        (vec!["empty.txt"], 1, "empty.txt"),
        (vec!["good.txt", "--vocab-size", "100"], 2, "need 258"),
    ];
    for (args, code, message) in cases {
        train_tokenizer(&dir).args(args).args(["--output", "tok"]).assert().code(code).stderr(contains(message));
        assert!(!dir.path().join("tok").exists());
    }
}
