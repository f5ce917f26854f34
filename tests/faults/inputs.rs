//! Data that is damaged, or was made to do harm.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parquet::basic::{Compression, GzipLevel, ZstdLevel};
use parquet::data_type::{ByteArray, ByteArrayType};
use titan::data::DatasetSpec;
use titan::data::datasets::{self, Position, Stop};

use crate::binary::titan;
use crate::bounded::{Verdict, examine};
use crate::common::{amount, held};
use crate::mutation::{for_seeds, mutated};

/// A folder of data, and a job that trains a few steps on a file of it.
struct Data(tempfile::TempDir);

impl Data {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn train(&self, dataset: &str, path: &Path, flags: &[&str]) -> Verdict {
        let mut titan = titan(&["train", "--training.dataset", dataset, "--training.dataset_path"]);
        titan.arg(path).arg("--job.dump_folder").arg(self.0.path().join("outputs")).args(flags);
        titan.args(
            "--model.args.dim=16 --model.args.n_layers=1 --model.args.n_heads=2 --model.args.multiple_of=16".split(' '),
        );
        titan.args("--training.local_batch_size=1 --training.seq_len=16 --training.steps=20".split(' '));
        examine(&mut titan)
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zst(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

/// `head`, `n` MiB of `byte`, and `tail`, compressed to a thousandth.
fn bomb(head: &[u8], byte: u8, n: usize, tail: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(head).unwrap();
    let piece = vec![byte; 1 << 20];
    (0..n).for_each(|_| encoder.write_all(&piece).unwrap());
    encoder.write_all(tail).unwrap();
    encoder.finish().unwrap()
}

/// One column `text`, compressed, in one row group.
fn parquet(texts: &[Vec<u8>]) -> Vec<u8> {
    let texts: Vec<ByteArray> = texts.iter().map(|text| ByteArray::from(text.clone())).collect();
    parquet_as(Compression::ZSTD(ZstdLevel::default()), &texts)
}

fn parquet_as(compression: Compression, texts: &[ByteArray]) -> Vec<u8> {
    use parquet::file::properties::WriterProperties;
    let schema =
        Arc::new(parquet::schema::parser::parse_message_type("message docs { required binary text (UTF8); }").unwrap());
    let properties = WriterProperties::builder().set_compression(compression).build();
    let mut bytes = Vec::new();
    let mut writer =
        parquet::file::writer::SerializedFileWriter::new(&mut bytes, schema, Arc::new(properties)).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<ByteArrayType>().write_batch(texts, None, None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
    bytes
}

fn lines(n: usize) -> Vec<u8> {
    (0..n)
        .flat_map(|i| format!("{{\"text\": \"Story {i} of an owl that sat in a tree and sang.\"}}\n").into_bytes())
        .collect()
}

#[test]
fn damaged_data_is_refused_by_file_and_line() {
    let data = Data::new();
    let good = lines(2);
    let half = |bytes: &[u8]| bytes[..bytes.len() / 2].to_vec();
    let texts: Vec<Vec<u8>> = (0..500).map(|i| format!("row {i}").into_bytes()).collect();
    let rows = parquet(&texts);
    let mut broken_page = rows.clone();
    broken_page[60..100].fill(0xff);
    let array = format!("{{\"x\":[{}0],\"text\":\"a\"}}\n", "0,".repeat(4_000_000));
    let cases: Vec<(&str, &str, Vec<u8>, &[&str])> = vec![
        ("json", "a.jsonl", [&good, &b"{\"text\": \"\xff\xfe\"}\n"[..]].concat(), &["a.jsonl:3:", "not valid JSON"]),
        ("json", "b.jsonl", [&good, &b"{\"text\": \"cut"[..]].concat(), &["b.jsonl:3:", "not valid JSON"]),
        ("json", "c.jsonl", b"{\"content\": \"a\"}\n".repeat(9), &["c.jsonl:1", "no field `text`"]),
        ("json", "d.jsonl", Vec::new(), &["d.jsonl", "empty"]),
        ("json", "e.jsonl", b"{\"text\": \"word\"}\n".to_vec(), &["e.jsonl", "too small"]),
        (
            "json",
            "f.jsonl",
            [b"{\"text\":".to_vec(), b"[".repeat(1_000_000)].concat(),
            &["f.jsonl:1", "recursion limit"],
        ),
        (
            "json",
            "g.jsonl",
            [b"{\"text\": \"".to_vec(), b"a".repeat(40 << 20), b"\"}\n".to_vec()].concat(),
            &["g.jsonl:1", "32 MiB"],
        ),
        ("json", "h.jsonl", array.into_bytes(), &["h.jsonl:1", "more JSON values"]),
        ("json", "i.jsonl", b"\n".repeat(70 << 20), &["i.jsonl:", "blank lines"]),
        (
            "json",
            "k.jsonl",
            format!("{{{}}}", (0..200_000).map(|i| format!("\"k{i}\":1,")).collect::<String>() + "\"z\":1").into(),
            &["k.jsonl:1", "no field"],
        ),
        ("json", "l.jsonl.gz", half(&gzip(&lines(9))), &["l.jsonl.gz:", "is the file complete?"]),
        ("json", "m.jsonl.zst", half(&zst(&lines(9))), &["m.jsonl.zst:", "is the file complete?"]),
        ("json", "n.jsonl.gz", b"\x1f\x8b".to_vec(), &["n.jsonl.gz:1", "is the file complete?"]),
        ("text", "a.txt", b"one\ntwo\n\xff\n".to_vec(), &["a.txt:3", "not valid UTF-8"]),
        ("text", "b.txt", b"word".to_vec(), &["b.txt", "too small"]),
        ("text", "c.txt", Vec::new(), &["c.txt", "empty"]),
        (
            "chat",
            "a.jsonl",
            b"{\"messages\": [{\"role\": \"evil\", \"content\": \"x\"}]}\n".to_vec(),
            &["a.jsonl:1", "unknown role"],
        ),
        ("chat", "b.jsonl", b"{\"messages\": [5]}\n".to_vec(), &["b.jsonl:1", "message 1"]),
        ("parquet", "a.parquet", half(&rows), &["a.parquet", "not a complete parquet file"]),
        ("parquet", "b.parquet", Vec::new(), &["b.parquet"]),
        ("parquet", "c.parquet", broken_page, &["c.parquet"]),
        ("parquet", "d.parquet", parquet(&[b"\xff".to_vec()]), &["d.parquet: row 1", "UTF-8"]),
        ("tokens", "a.bin", vec![0; 999], &["a.bin", "whole number"]),
        ("json", "/dev/zero", Vec::new(), &["/dev/zero", "neither a file nor a folder"]),
    ];
    for (dataset, name, bytes, named) in &cases {
        let path = if name.starts_with('/') { PathBuf::from(name) } else { data.write(name, bytes) };
        data.train(dataset, &path, &[]).assert_refused(1, named);
    }
    for sidecar in [
        r#"{"vocab_size": 18446744073709551615}"#,
        r#"{"vocab_size": 0}"#,
        r#"{"vocab_size": 9, "eos_id": 9}"#,
        "\u{0}",
        &"[".repeat(100_000),
    ] {
        let path = data.write("t.bin", [0; 2000]);
        data.write("t.json", sidecar);
        data.train("tokens", &path, &[]).assert_refused(1, &["t.json"]);
    }
    held("damaged data: file and line or row named, under 1.5 GB", format!("{0} of {0}", cases.len() + 5));
}

#[test]
fn what_is_malformed_is_skipped_within_the_limit() {
    let data = Data::new();
    let bad = [b"{\"text\": \"".to_vec(), b"a".repeat(40 << 20), b"\"}\n{\"text\": \"\xff\"}\n{}\n".to_vec()].concat();
    let path = data.write("a.jsonl", [bad, lines(20)].concat());
    assert_eq!(data.train("json", &path, &["--data.max_bad_records=3"]).code, 0);
    data.train("json", &path, &["--data.max_bad_records=2"]).assert_refused(1, &["a.jsonl:3", "max_bad_records = 2"]);
    held("malformed records: skipped up to data.max_bad_records, the next stops the run", "2 of 2");
}

#[test]
fn huge_records_and_bombs_take_bounded_memory() {
    let data = Data::new();
    let record = |text: &[u8]| [b"{\"text\": \"", text, b"\"}\n"].concat();
    let chat = format!(
        "{{\"messages\": [{}]}}\n",
        r#"{"role":"user","content":"hi"},{"role":"assistant","content":"ho"},"#.repeat(40_000).trim_end_matches(',')
    );
    let long = format!(
        "{{\"messages\": [{{\"role\":\"user\",\"content\":\"{}\"}},{{\"role\":\"assistant\",\"content\":\"{}\"}}]}}\n",
        "a".repeat(4 << 20),
        "b ".repeat(2 << 20)
    );
    // 8 MB in one line: words, one word, nothing but blanks, line breaks, characters of four bytes.
    let mut cases: Vec<(&str, &str, Vec<u8>, &[i32])> = vec![
        ("json", "words.jsonl", record(&b"word ".repeat(1_600_000)), &[0]),
        ("json", "word.jsonl", record(&b"a".repeat(8_000_000)), &[0]),
        ("json", "blanks.jsonl", record(&b" ".repeat(8_000_000)), &[0]),
        ("json", "breaks.jsonl", record(&b"\\n".repeat(4_000_000)), &[0]),
        ("json", "wide.jsonl", record("\u{1f600}".repeat(2_000_000).as_bytes()), &[0]),
        ("text", "word.txt", b"a".repeat(8_000_000), &[0]),
        ("chat", "many.jsonl", chat.into_bytes(), &[1]),
        ("chat", "long.jsonl", long.into_bytes(), &[1]),
    ];
    let n = amount(300, 3000);
    let (zstd, word) = (Compression::ZSTD(ZstdLevel::default()), b"a".repeat(8_000_000));
    cases.extend([
        ("json", "in-string.jsonl.gz", bomb(b"{\"text\": \"", b'a', n, b"\"}\n"), &[1][..]),
        ("json", "zeros.jsonl.gz", bomb(b"", 0, n, b""), &[1]),
        ("json", "blank.jsonl.gz", bomb(b"", b'\n', n, b""), &[1]),
        ("text", "zeros.txt.gz", bomb(b"", 0, n, b""), &[0]),
        ("text", "bytes.txt.gz", bomb(b"", 0xff, n, b""), &[1]),
        ("parquet", "text.parquet", parquet(&[vec![b'a'; 100 << 20]]), &[1]),
        // A large text, which is in the file once, in many rows.
        ("parquet", "rows.parquet", parquet_as(zstd, &vec![word.into(); amount(100, 400)]), &[0]),
    ]);
    // What unpacks to more than a page may hold, and one that says it does not.
    let text = [ByteArray::from(vec![b'a'; 450 << 20])];
    let gzip = Compression::GZIP(GzipLevel::default());
    let pages = [("zstd", zstd), ("gzip", gzip), ("lz4", Compression::LZ4), ("snappy", Compression::SNAPPY)];
    for (name, compression) in &pages[..amount(1, pages.len())] {
        let mut file = parquet_as(*compression, &text);
        if *compression == gzip {
            // Behind the file's magic and the page's kind, a number whose bytes but the last have their high bit set.
            let end = 7 + file[7..].iter().position(|byte| *byte < 0x80).unwrap();
            file[7..end].fill(0x80);
            file[end] = 0;
        }
        cases.push(("parquet", name, file, &[1]));
    }
    for (dataset, name, bytes, codes) in &cases {
        let path = data.write(name, bytes);
        let verdict = data.train(dataset, &path, &[]);
        assert!(codes.contains(&verdict.code), "{name}: {}", verdict.stderr);
        assert!(verdict.code == 0 || verdict.stderr.contains(name), "{name}: {}", verdict.stderr);
        fs::remove_file(path).unwrap();
    }
    held("records of 8 MB and decompression bombs: under 1.5 GB and 40 s", format!("{0} of {0}", cases.len()));
}

/// A folder may be linked into itself, and hold what is no data.
#[test]
fn links_and_pipes_among_the_data_are_no_endless_loop() {
    let data = Data::new();
    let folder = data.0.path().join("data");
    fs::create_dir_all(folder.join("a")).unwrap();
    fs::create_dir_all(folder.join("b")).unwrap();
    std::os::unix::fs::symlink("../../data", folder.join("a/all")).unwrap();
    std::os::unix::fs::symlink("../a", folder.join("b/a")).unwrap();
    std::os::unix::fs::symlink("../b", folder.join("a/b")).unwrap();
    fs::write(folder.join("a/x.jsonl"), lines(20)).unwrap();
    assert_eq!(data.train("json", &folder, &[]).code, 0);
    assert!(std::process::Command::new("mkfifo").arg(folder.join("b/y.jsonl")).status().unwrap().success());
    data.train("json", &folder, &[]).assert_refused(1, &["y.jsonl", "neither a file nor a folder"]);
}

/// In process, and therefore many.
#[test]
fn no_data_makes_the_readers_panic_or_go_on_for_ever() {
    let folder = tempfile::tempdir().unwrap();
    let text = b"One line.\n\nAnother, \xc3\xa9, and a third.\n".to_vec();
    let json = [&lines(3)[..], b"{\"messages\": [{\"role\": \"assistant\", \"content\": \"x\"}], \"text\": \"y\", \"prompt\": \"p\", \"completion\": \"c\"}\n"].concat();
    let rows = parquet(&[b"one".to_vec(), b"two".to_vec(), "\u{1f600}".into()]);
    let ids: Vec<u8> = (0..200_u16).flat_map(u16::to_le_bytes).collect();
    let llmc = [&[20240520_i32, 1, 200].map(i32::to_le_bytes).concat()[..], &[0; 1012], &ids].concat();
    let index = [
        &b"MMIDIDX\0\0"[..],
        &1_u64.to_le_bytes(),
        &[8],
        &2_u64.to_le_bytes(),
        &3_u64.to_le_bytes(),
        &[100_i32, 100].map(i32::to_le_bytes).concat(),
        &[0_i64, 200].map(i64::to_le_bytes).concat(),
    ]
    .concat();
    let sidecar = br#"{"vocab_size": 300, "eos_id": 3, "dtype": "u16"}"#;
    for_seeds("data of every format", 500, 200_000, |seed| {
        let changed = |bytes: &[u8]| mutated(bytes, seed);
        let mut beside: Option<(&str, Vec<u8>)> = None;
        let (dataset, name, bytes) = match seed % 10 {
            0 => ("text", "a.txt", changed(&text)),
            1 => ("text", "a.txt.gz", changed(&gzip(&text))),
            2 => ("json", "a.jsonl", changed(&json)),
            3 => ("json", "a.jsonl.zst", changed(&zst(&json))),
            4 => ("chat", "a.jsonl", changed(&json)),
            5 => ("instruct", "a.jsonl", changed(&json)),
            6 => ("parquet", "a.parquet", changed(&rows)),
            7 => ("tokens", "a.bin", changed(&llmc)),
            8 => {
                beside = Some(("a.idx", changed(&index)));
                ("tokens", "a.bin", ids.clone())
            }
            _ => {
                beside = Some(("a.json", changed(sidecar)));
                ("tokens", "a.bin", ids.clone())
            }
        };
        let path = folder.path().join(name);
        fs::write(&path, &bytes).unwrap();
        if let Some((name, bytes)) = &beside {
            fs::write(folder.path().join(name), bytes).unwrap();
        }
        let spec = DatasetSpec {
            dataset: dataset.into(),
            dataset_path: Some(path.to_str().unwrap().into()),
            max_bad_records: seed as usize % 3,
            ..DatasetSpec::default()
        };
        let read = datasets::open(&spec, Some(300), 17, &|repo| panic!("{repo} was asked for")).and_then(|data| {
            let pass = data.pass(Position::default(), (seed % 2 == 0).then_some(seed), &Stop::default());
            let mut n = 0;
            pass.take(100_000).try_for_each(|document| document.map(|_| n += 1))?;
            Ok(n)
        });
        for name in [name].into_iter().chain(beside.map(|(name, _)| name)) {
            fs::remove_file(folder.path().join(name)).unwrap();
        }
        match read {
            Ok(100_000) => Err("it has no end".into()),
            Err(error) if !error.to_string().contains("a.") => Err(error.to_string()),
            _ => Ok(()),
        }
    });
}
