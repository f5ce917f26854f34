//! Conversations and instructions: whole in their rows, learned in part.

use proptest::prelude::*;
use serde_json::json;
use tempfile::TempDir;
use titan::data::{Batch, DatasetSpec, LoaderOptions};
use titan::ops::IGNORE_INDEX;

use crate::common::*;
use crate::resume::assert_resumes_exactly;

/// A conversation of one question and its answer: `2 + 1 + question + 2 + answer` tokens.
fn exchange(question: &str, answer: &str) -> String {
    let messages = json!([{"role": "user", "content": question}, {"role": "assistant", "content": answer}]);
    format!("{}\n", json!({ "messages": messages }))
}

fn chat(dir: &TempDir, exchanges: &[(&str, &str)]) -> DatasetSpec {
    let lines: String = exchanges.iter().map(|(question, answer)| exchange(question, answer)).collect();
    spec("chat", write(dir, "chat.jsonl", lines))
}

/// The rows of a batch as text, `.` for what is not learned and `$` for EOS, and where documents start.
fn rows(batch: &Batch) -> Vec<(String, String, Vec<u32>)> {
    let text = |ids: &[u32]| -> String {
        let letter = |id: &u32| match *id {
            IGNORE_INDEX => '.',
            BOS => '^',
            EOS => '$',
            0 => '_',
            id => id as u8 as char,
        };
        ids.iter().map(letter).collect()
    };
    let starts = batch.document_starts.as_ref().unwrap();
    let rows = batch.inputs.chunks(batch.seq_len).zip(batch.labels.chunks(batch.seq_len));
    let rows = rows.zip(starts.chunks(batch.seq_len));
    rows.map(|((inputs, labels), starts)| (text(inputs), text(labels), starts.to_vec())).collect()
}

#[test]
fn conversations_stay_whole_and_only_answers_are_learned() {
    let dir = TempDir::new().unwrap();
    let spec = chat(&dir, &[("ab", "c"), ("d", "ef"), ("ghi", "jkl")]);
    let mut loader = loader(&spec, LoaderOptions { repeat: false, ..options(1, 18) }).unwrap();
    let first = next(&mut loader);
    let starts = [vec![0; 7], vec![7; 7], vec![14; 4]].concat();
    assert_eq!(rows(&first), [("^uab$ac^ud$aef____".into(), ".....c$....ef$....".into(), starts)]);
    assert_eq!(first.n_targets(), 5);
    let starts = [vec![0; 10], vec![10; 8]].concat();
    assert_eq!(rows(&next(&mut loader)), [("^ughi$ajkl________".into(), "......jkl$........".into(), starts)]);
    assert_eq!(loader.next_batch().unwrap(), None);
}

#[test]
fn a_conversation_that_is_too_long_is_cut_and_left_out_if_nothing_to_learn_remains() {
    let dir = TempDir::new().unwrap();
    let spec = chat(&dir, &[("a", "bcdefgh"), ("a question longer than a row", "x"), ("i", "j")]);
    let mut loader = loader(&spec, LoaderOptions { repeat: false, ..options(2, 8) }).unwrap();
    let batch = next(&mut loader);
    let [long, short] = &rows(&batch)[..] else { panic!("{batch:?}") };
    assert_eq!((long.0.as_str(), long.1.as_str()), ("^ua$abcd", "....bcde"));
    assert_eq!((short.0.as_str(), short.1.as_str()), ("^ui$aj__", "....j$.."));
}

#[test]
fn data_with_nothing_to_learn_says_so() {
    let dir = TempDir::new().unwrap();
    let spec = chat(&dir, &[("a question longer than a row", "x")]);
    for repeat in [true, false] {
        let error = loader(&spec, LoaderOptions { repeat, ..options(1, 8) }).err().unwrap().to_string();
        assert!(error.contains("nothing to learn in any of its 1 documents, 1 of which were cut"), "{error}");
    }
}

#[test]
fn of_an_instruction_the_completion_and_its_end_are_learned() {
    let dir = TempDir::new().unwrap();
    let line = format!("{}\n", json!({"q": "ab", "a": "cd"}));
    let spec = DatasetSpec {
        prompt_field: "q".into(),
        completion_field: "a".into(),
        ..spec("instruct", write(&dir, "a.jsonl", line))
    };
    let batch = next(&mut loader(&spec, LoaderOptions { repeat: false, ..options(1, 6) }).unwrap());
    assert_eq!(rows(&batch), [("^abcd_".into(), "..cd$.".into(), vec![0, 0, 0, 0, 0, 5])]);
}

const CHATS: [&[(&str, &str)]; 5] = [
    &[("user", "ab"), ("assistant", "c")],
    &[("system", "s"), ("user", "d"), ("assistant", "ef"), ("user", "g"), ("assistant", "h")],
    &[("user", "ghi"), ("assistant", "jkl")],
    &[("user", "m"), ("assistant", "n")],
    &[("user", "o"), ("assistant", "pq")],
];

#[test]
fn conversations_and_instructions_in_parquet_are_those_of_json_lines() {
    let dir = TempDir::new().unwrap();
    let lines = CHATS.map(|chat| {
        let messages: Vec<_> = chat.iter().map(|(role, content)| json!({ "role": role, "content": content })).collect();
        let (prompt, completion) = (chat[0].1, chat[chat.len() - 1].1);
        format!("{}\n", json!({ "messages": messages, "prompt": prompt, "completion": completion }))
    });
    write(&dir, "lines/a.jsonl", lines.concat());
    write(&dir, "rows/a.parquet", parquet_chats(&CHATS));
    for dataset in ["chat", "instruct"] {
        let of_all = |folder: &str, shuffle| {
            let options = LoaderOptions { repeat: false, shuffle, ..options(2, 24) };
            let mut loader = loader(&spec(dataset, dir.path().join(folder)), options).unwrap();
            std::iter::from_fn(|| loader.next_batch().unwrap()).collect::<Vec<_>>()
        };
        for shuffle in [None, Some(3)] {
            assert_eq!(of_all("rows", shuffle), of_all("lines", shuffle), "{dataset}");
        }
        let spec = spec(dataset, dir.path().join("rows"));
        assert_resumes_exactly(&spec, &options(1, 16), 12);
    }
}

#[test]
fn a_fault_of_a_parquet_row_names_it() {
    let dir = TempDir::new().unwrap();
    let fault =
        |spec: &DatasetSpec| loader(spec, LoaderOptions { repeat: false, ..options(1, 16) }).err().unwrap().to_string();
    let path = write(&dir, "a.parquet", parquet_chats(&[CHATS[0], &[], CHATS[2]]));
    let at = format!("{}: row 2", path.display());
    assert!(fault(&spec("chat", &path)).contains(&format!("{at}: field `messages` is not an array of messages")));
    assert!(fault(&spec("instruct", &path)).contains(&format!("{at}: field `prompt` is null, not text")));
    let other = DatasetSpec { messages_field: "chats".into(), ..spec("chat", &path) };
    let message = fault(&other);
    assert!(message.contains("no field `chats`; data.messages_field can be one of: `messages`, `prompt`"), "{message}");
    write(&dir, "b.jsonl", exchange("a", "b"));
    let message = fault(&spec("chat", dir.path()));
    assert!(message.contains("1 of its 2 files are parquet and the others are not"), "{message}");
}

#[test]
fn examples_that_shall_see_each_other_come_without_a_mask() {
    let dir = TempDir::new().unwrap();
    let spec = DatasetSpec { masks_examples: false, ..chat(&dir, &[("ab", "c"), ("d", "ef")]) };
    assert_eq!(next(&mut loader(&spec, options(1, 18)).unwrap()).document_starts, None);
}

#[test]
fn a_fault_names_file_line_and_message() {
    let good = exchange("a", "b");
    for (line, fault) in [
        (
            r#"{"messages": [{"role": "usr", "content": "a"}]}"#,
            "message 1, which has the unknown role \"usr\"; known are",
        ),
        (r#"{"messages": [{"role": "user", "content": "a"}]}"#, "`messages` has no message of the assistant"),
        (r#"{"messages": [{"role": "user"}]}"#, "message 1, which has no `content`"),
        (r#"{"messages": [{"role": "user", "content": 1}]}"#, "message 1, which has a `content` that is not text"),
        (r#"{"messages": [{"content": "a"}]}"#, "message 1, which has no `role`"),
        (r#"{"messages": ["a"]}"#, "message 1, which is not an object with `role` and `content`"),
        (r#"{"messages": "a"}"#, "`messages` is not an array of messages"),
        (r#"{"chat": []}"#, "no field `messages`; data.messages_field can be one of: `chat`"),
    ] {
        let dir = TempDir::new().unwrap();
        let spec = spec("chat", write(&dir, "a.jsonl", format!("{good}{line}\n{good}")));
        let options = LoaderOptions { repeat: false, ..options(1, 16) };
        let error = loader(&spec, options.clone()).err().unwrap().to_string();
        assert!(error.contains("a.jsonl:2: ") && error.contains(fault), "{line}: {error}");
        let lenient = DatasetSpec { max_bad_records: 1, ..spec };
        assert_eq!(next(&mut loader(&lenient, options).unwrap()).n_targets(), 4);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn resuming_anywhere_repeats_the_unbroken_run(
        exchanges in prop::collection::vec(("[a-z]{0,9}", "[a-z]{1,12}"), 4..20),
        batch_size in 1..3usize,
        seq_len in 14..40usize,
        shuffle in prop::option::of(0..9u64),
    ) {
        let dir = TempDir::new().unwrap();
        let exchanges: Vec<_> = exchanges.iter().map(|(q, a)| (q.as_str(), a.as_str())).collect();
        let spec = chat(&dir, &exchanges);
        assert_resumes_exactly(&spec, &LoaderOptions { shuffle, ..options(batch_size, seq_len) }, 12);
    }
}
