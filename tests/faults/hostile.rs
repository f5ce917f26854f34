//! Folders of models that somebody made to do harm.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value as Json, json};
use titan::components::checkpoint::Weights;
use titan::data::chat::Message;
use titan::data::tokenizer::{Tokenizer, TokenizerFile};
use titan::models::hf;

use crate::binary::{repo, titan};
use crate::bounded::{Canary, Verdict, examine};
use crate::common::{amount, held};
use crate::mutation::{for_seeds, mutated, random};

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The folder of a model that is whole, beside a folder that nobody may look into.
struct Model {
    parent: tempfile::TempDir,
    canary: Canary,
}

impl Model {
    fn new() -> Self {
        let parent = tempfile::tempdir().unwrap();
        let [folder, outside] = ["model", "outside"].map(|name| parent.path().join(name));
        fs::create_dir(&folder).unwrap();
        fs::create_dir(&outside).unwrap();
        for (from, names) in [
            ("tests/golden/hf_llama3", [WEIGHTS, "config.json"]),
            ("assets/tokenizer", ["tokenizer.json", "tokenizer_config.json"]),
        ] {
            for name in names {
                fs::copy(repo(from).join(name), folder.join(name)).unwrap();
                fs::copy(repo(from).join(name), outside.join(name)).unwrap();
            }
        }
        let canary = Canary::over(&outside);
        Self { parent, canary }
    }

    fn folder(&self) -> PathBuf {
        self.parent.path().join("model")
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.folder().join(name), bytes).unwrap();
    }

    /// Puts a link in the place of a file.
    fn link(&self, name: &str, target: &str) {
        let path = self.folder().join(name);
        fs::remove_file(&path).ok();
        symlink(target, path).unwrap();
    }

    fn json(&self, name: &str) -> Json {
        serde_json::from_slice(&fs::read(self.folder().join(name)).unwrap()).unwrap()
    }

    fn generate(&mut self) -> Verdict {
        let mut titan = titan(&["generate", "--prompt", "hi", "--max-new-tokens", "2", "--checkpoint"]);
        self.examine(titan.arg(self.folder()))
    }

    fn chat(&mut self) -> Verdict {
        self.write("say", "hello\n");
        let stdin = fs::File::open(self.folder().join("say")).unwrap();
        let mut titan = titan(&["generate", "--chat", "--max-new-tokens", "2", "--checkpoint"]);
        self.examine(titan.arg(self.folder()).stdin(Stdio::from(stdin)))
    }

    #[track_caller]
    fn examine(&mut self, titan: &mut Command) -> Verdict {
        let verdict = examine(titan);
        assert!(!self.canary.sang(), "a file outside of the folder was opened\n{}", verdict.stderr);
        verdict
    }
}

/// A safetensors file by its header and its data.
fn safetensors(header: impl AsRef<[u8]>, data: &[u8]) -> Vec<u8> {
    let header = header.as_ref();
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

/// `n` times `each`, with commas.
fn list(each: &str, n: usize) -> String {
    format!("{}{each}", format!("{each},").repeat(n - 1))
}

#[test]
fn the_model_that_the_others_are_made_of_generates() {
    assert_eq!(Model::new().generate().code, 0);
}

#[test]
fn hostile_safetensors_are_refused_by_name() {
    let mut model = Model::new();
    let whole = fs::read(model.folder().join(WEIGHTS)).unwrap();
    let len = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let (header, data) = (serde_json::from_slice::<Json>(&whole[8..8 + len]).unwrap(), &whole[8 + len..]);
    let with = |field: &str, value: Json| {
        let mut header = header.clone();
        header["model.norm.weight"][field] = value;
        safetensors(header.to_string(), data)
    };
    let one = r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
    let tensor = |n: usize| format!("\"{n}\":{{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}");
    let cases = [
        Vec::new(),
        whole[..whole.len() - 1].to_vec(),
        [&whole[..], b"x"].concat(),
        u64::MAX.to_le_bytes().to_vec(),
        [&(1_u64 << 62).to_le_bytes()[..], b"{}"].concat(),
        safetensors("[".repeat(1_000_000), b""),
        safetensors(r#"{"a":"#.repeat(1_000_000), b""),
        // Overlaps, a hole, a name twice, sizes that overflow, a type that lies.
        with("data_offsets", json!([0, 192])),
        with("data_offsets", json!([u64::MAX - 191, u64::MAX])),
        with("data_offsets", json!([192, 0])),
        safetensors(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#, &[0; 8]),
        safetensors(format!("{{\"a\":{one},\"a\":{one}}}"), &[0; 4]),
        with("shape", json!([1_u64 << 40, 1_u64 << 40])),
        with("shape", json!([-1])),
        with("shape", json!([])),
        with("dtype", json!("F64")),
        with("dtype", json!("F4")),
        with("dtype", json!("I32")),
        // What parsing would blow up.
        safetensors(
            format!(r#"{{"a":{{"shape":[{}],"dtype":"F32","data_offsets":[0,4]}}}}"#, list("1", 40_000_000)),
            &[0; 4],
        ),
        safetensors(format!("{{{}}}", (0..1_000_000).map(tensor).collect::<Vec<_>>().join(",")), b""),
    ];
    for bytes in &cases {
        model.write(WEIGHTS, bytes);
        model.generate().assert_refused(1, &[model.folder().to_str().unwrap()]);
    }
    held(
        "hostile safetensors: refused with the file's name, under 1.5 GB and 40 s",
        format!("{0} of {0}", cases.len()),
    );
}

#[test]
fn nothing_outside_of_the_folder_is_opened() {
    let mut n = 0;
    let mut refused = |model: &mut Model, code: i32, words: &[&str]| {
        n += 1;
        model.generate().assert_refused(code, words);
    };
    let names = |model: &Model| {
        let outside = model.parent.path().join("outside").join(WEIGHTS).display().to_string();
        let more = [
            "../outside/model.safetensors",
            "x/../../outside/model.safetensors",
            "./m.safetensors",
            "",
            ".",
            "..",
            "\0",
        ];
        more.map(str::to_owned).into_iter().chain([outside, "a\\..\\b".into(), "x".repeat(5000)]).collect::<Vec<_>>()
    };
    for name in names(&Model::new()) {
        let mut model = Model::new();
        fs::rename(model.folder().join(WEIGHTS), model.folder().join("m.safetensors")).unwrap();
        let name = name.replace(Model::new().parent.path().to_str().unwrap(), model.parent.path().to_str().unwrap());
        model.write(INDEX, json!({ "weight_map": { "lm_head.weight": name } }).to_string());
        refused(&mut model, 1, &["model"]);
    }
    for index in [
        "[]",
        "{}",
        r#"{"weight_map":{}}"#,
        r#"{"weight_map":[]}"#,
        r#"{"weight_map":{"a":5}}"#,
        "\u{0}",
        &"[".repeat(1_000_000),
        &format!(r#"{{"x":[{}],"weight_map":{{"a":"m.safetensors"}}}}"#, list("0", 20_000_000)),
    ] {
        let mut model = Model::new();
        fs::rename(model.folder().join(WEIGHTS), model.folder().join("m.safetensors")).unwrap();
        model.write(INDEX, index);
        refused(&mut model, 1, &[INDEX]);
    }
    // A link of every file, and what a link could lead to.
    for file in [WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json"] {
        let mut model = Model::new();
        model.link(file, &format!("../outside/{file}"));
        refused(&mut model, 1, &[file, "it leads out of its folder"]);
    }
    for target in ["/dev/zero", "../outside", "/proc/self/mem"] {
        let mut model = Model::new();
        model.link(WEIGHTS, target);
        refused(&mut model, 1, &[WEIGHTS]);
    }
    for file in [WEIGHTS, "tokenizer_config.json"] {
        let mut model = Model::new();
        fs::remove_file(model.folder().join(file)).unwrap();
        assert!(Command::new("mkfifo").arg(model.folder().join(file)).status().unwrap().success());
        // A pipe that nobody writes to would be waited for; one that is not needed is left alone.
        if model.generate().code != 0 {
            refused(&mut model, 1, &[file]);
        }
    }
    let mut model = Model::new();
    model.link("chat_template.jinja", "../outside/tokenizer.json");
    model.chat().assert_refused(1, &["chat_template.jinja", "it leads out of its folder"]);
    held("names and links that lead out of a model's folder: refused, nothing opened", format!("{0} of {0}", n + 1));
}

#[test]
fn hostile_tokenizers_are_refused_by_name() {
    let mut model = Model::new();
    let whole = model.json("tokenizer.json");
    let with = |part: &str, value: Json| {
        let mut tokenizer = whole.clone();
        tokenizer[part] = value;
        tokenizer.to_string().into_bytes()
    };
    let with_model = |field: &str, value: Json| {
        let mut model = whole["model"].clone();
        model[field] = value;
        with("model", model)
    };
    let split = |regex: &str| json!({ "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false });
    let template = |id: &str, ids: usize, times: usize| {
        json!({ "type": "TemplateProcessing", "single": vec![json!({ "SpecialToken": { "id": id, "type_id": 0 } }); times], "pair": [],
            "special_tokens": { "x": { "id": "x", "ids": vec![0; ids], "tokens": vec!["x"; ids] } } })
    };
    let replace = json!({ "type": "Replace", "pattern": { "Regex": "." }, "content": "xxxxxxxxxx" });
    let cases = [
        Vec::new(),
        b"\0".repeat(1000),
        b"[".repeat(1_000_000),
        with("model", json!({ "type": "Evil" })),
        with("model", json!({ "type": "Unigram", "unk_id": 9, "vocab": [["a", -1.0]] })),
        with("model", json!({ "type": "Unigram", "unk_id": null, "vocab": [["a", -1.0]] })),
        with("model", json!({ "type": "WordLevel", "vocab": { "a": u32::MAX }, "unk_token": "a" })),
        with_model("vocab", json!({ "a": -1 })),
        with_model("vocab", json!({ "a": 0 })),
        with_model("merges", json!(["a"])),
        with_model("dropout", json!(5)),
        with("pre_tokenizer", split("(")),
        with("pre_tokenizer", split(&"(".repeat(100_000))),
        with("pre_tokenizer", split("((a{1000}){1000}){1000}")),
        with("pre_tokenizer", json!({ "type": "FixedLength", "length": 0 })),
        with("normalizer", json!({ "type": "Precompiled", "precompiled_charsmap": "AAAA" })),
        with("normalizer", json!({ "type": "Prepend", "prepend": "" })),
        // What would make a text longer than memory.
        with("normalizer", json!({ "type": "Sequence", "normalizers": vec![&replace; 12] })),
        with("post_processor", template("x", 1000, 100_000)),
        with("post_processor", template("y", 1, 1)),
        // What parsing would blow up.
        format!(
            r#"{{"version":"1.0","model":{{"type":"BPE","x":[{}],"vocab":{{}},"merges":[]}}}}"#,
            list("0", 20_000_000)
        )
        .into(),
        format!(r#"{{"version":"1.0","model":{{"type":"Unigram","vocab":[{}]}}}}"#, list(r#"["a",0]"#, 3_000_000))
            .into(),
        b" ".repeat(100_000_000),
    ];
    for bytes in &cases {
        model.write("tokenizer.json", bytes);
        model.generate().assert_refused(1, &["tokenizer.json"]);
    }
    model.write("tokenizer.json", whole.to_string());
    let configs = [
        "[".repeat(1_000_000),
        "[]".into(),
        r#"{"bos_token": 5}"#.into(),
        r#"{"added_tokens_decoder": []}"#.into(),
        format!(r#"{{"x":[{}]}}"#, list("0", 20_000_000)),
    ];
    for config in &configs {
        model.write("tokenizer_config.json", config);
        model.generate().assert_refused(1, &["tokenizer_config.json"]);
    }
    let n = cases.len() + configs.len();
    held("hostile tokenizers: refused with the file's name, under 1.5 GB and 40 s", format!("{n} of {n}"));
}

/// Expressions that take for ever on some text: the search gives up, and the text stays in one piece.
#[test]
fn a_regular_expression_without_end_is_given_up() {
    let model = Model::new();
    let mut tokenizer = model.json("tokenizer.json");
    for regex in ["(a|a)*$", "(?=((a+)+)$)x|(a|aa)+$", "(.*)*\\1$"] {
        tokenizer["pre_tokenizer"] =
            json!({ "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false });
        model.write("tokenizer.json", tokenizer.to_string());
        let prompt = "a".repeat(5000) + "!";
        let mut titan = titan(&["generate", "--prompt", &prompt, "--max-new-tokens", "1", "--checkpoint"]);
        let verdict = examine(titan.arg(model.folder()));
        assert!([0, 1].contains(&verdict.code), "{regex}");
    }
}

#[test]
fn absurd_configs_of_models_are_refused_by_name() {
    let fields = [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
    ];
    let values = [
        json!(0),
        json!(-1),
        json!(10_000_000),
        json!(1_u64 << 40),
        json!(u64::MAX),
        json!(1e308),
        json!("x"),
        json!([]),
        json!(1.5),
    ];
    let mut n = 0;
    for family in ["hf_llama3", "hf_deepseek_v3", "hf_qwen3_moe", "hf_gpt_oss"] {
        let mut model = Model::new();
        fs::copy(repo("tests/golden").join(family).join(WEIGHTS), model.folder().join(WEIGHTS)).unwrap();
        let whole: Json =
            serde_json::from_slice(&fs::read(repo("tests/golden").join(family).join("config.json")).unwrap()).unwrap();
        let experts =
            ["num_local_experts", "n_routed_experts", "num_experts", "n_shared_experts", "moe_intermediate_size"];
        let fields: Vec<&str> =
            fields.iter().chain(&experts).copied().filter(|field| whole.get(field).is_some()).collect();
        let mut random = random(n);
        for i in 0..amount(8, fields.len() * values.len()) {
            let all = amount(0, 1) == 1;
            let (field, value) = match all {
                true => (fields[i / values.len()], &values[i % values.len()]),
                false => (fields[random.below(fields.len())], &values[random.below(values.len())]),
            };
            let mut config = whole.clone();
            config[field] = value.clone();
            model.write("config.json", config.to_string());
            let verdict = model.generate();
            // A family does not look at every field.
            if verdict.code != 0 {
                verdict.assert_refused(1, &[model.folder().to_str().unwrap()]);
            }
            n += 1;
        }
    }
    let mut model = Model::new();
    for config in [
        "",
        "[]",
        "\0",
        &"[".repeat(1_000_000),
        &format!(r#"{{"x":[{}]}}"#, list("0", 4_900_000)),
        &" ".repeat(20_000_000),
    ] {
        model.write("config.json", config);
        model.generate().assert_refused(1, &["config.json"]);
        n += 1;
    }
    held(
        "absurd config.json: refused with its folder's name, or of no effect; under 1.5 GB and 40 s",
        format!("{n} of {n}"),
    );
}

#[test]
fn hostile_chat_templates_come_to_an_end() {
    let mut model = Model::new();
    let repeated = |part: &str, n: usize| part.repeat(n);
    let templates = [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% for k in range(100000) %}{% endfor %}{% endfor %}{% endfor %}".to_owned(),
        "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}".into(),
        "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}".into(),
        "{% set n = namespace(s=[1]) %}{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s | list }}".into(),
        "{% set n = namespace(s=[1]) %}{% for i in range(90000) %}{% set n.s = [n.s] %}{% endfor %}{{ n.s }}".into(),
        "{% set n = namespace(s=[1]) %}{% for i in range(90000) %}{% set n.s = [n.s] %}{% endfor %}{{ n.s | tojson }}".into(),
        "{% set n = namespace(s=['a' * 1000000]) %}{{ (n.s * 10000) | tojson }}".into(),
        "{% for i in range(100000) %}{{ ('a' * 1000000) | generation }}{% endfor %}".into(),
        "{{ 'a' * 1000000000000 }}".into(),
        "{{ messages | tojson(indent=1000000000000) }}".into(),
        "{{ 'a\nb' | indent(1000000000000) }}".into(),
        "{{ '%1000000000000s' | format('a') }}".into(),
        "{{ '{:1000000000000}'.format(1) }}".into(),
        "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}".into(),
        "{{ ('a' * 1000000) | replace('', 'b' * 1000000) }}".into(),
        "{{ ('b' * 1000000).join('a' * 1000000) }}".into(),
        "{{ range(100000) | join('b' * 1000000) }}".into(),
        "{{ range(10) | batch(1000000000000, 'x') | list }}".into(),
        "{{ range(10) | slice(1000000000000) | list }}".into(),
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".into(),
        "{% include 'chat_template.jinja' %}".into(),
        "{% extends 'chat_template.jinja' %}".into(),
        "{% include '../outside/tokenizer.json' %}".into(),
        "{{ raise_exception('no') }}".into(),
        "{{ strftime_now('%c' * 1000000) }}".into(),
        "{{ 2 ** 1000000000 }}".into(),
        "{% for %}".into(),
        format!("{{{{ {}1{} }}}}", repeated("(", 100_000), repeated(")", 100_000)),
        format!("{{{{ {}1 }}}}", repeated("1+", 100_000)),
        format!("{{{{ {}1 }}}}", repeated("not ", 60_000)),
        format!("{{{{ {}1 }}}}", repeated("-", 200_000)),
        format!("{{{{ a{} }}}}", repeated(".a", 100_000)),
        format!("{{{{ a{} }}}}", repeated("|upper", 40_000)),
        format!("{{{{ a{} }}}}", repeated("()", 100_000)),
        format!("{{{{ {}1 }}}}", repeated("1 if 1 else ", 20_000)),
        repeated("{% if 1 %}", 20_000),
        format!("{{% if 0 %}}{}{{% endif %}}", repeated("{% elif 0 %}", 20_000)),
        repeated("a", 20_000_000),
    ];
    for template in &templates {
        model.write("chat_template.jinja", template);
        // It may be harmless after all; and what it writes may be too long for the model, which is the user's mistake.
        let verdict = model.chat();
        let start = &template[..template.len().min(80)];
        assert!([0, 1, 2].contains(&verdict.code), "{start}\n{}", verdict.stderr);
        assert!(
            verdict.stderr.contains("template") && verdict.stderr.len() < 20_000,
            "{start}\n{}",
            verdict.stderr.len()
        );
    }
    let n = templates.len();
    held(
        "chat templates without end, or that make much of little: come to an end, under 1.5 GB and 40 s",
        format!("{n} of {n}"),
    );
}

#[test]
fn no_index_and_no_header_makes_the_readers_of_weights_panic() {
    let folder = tempfile::tempdir().unwrap();
    let whole = fs::read(repo("tests/golden/hf_llama3").join(WEIGHTS)).unwrap();
    let index = json!({ "weight_map": { "a": "m.safetensors", "b": "../b.safetensors", "c": "/c" } }).to_string();
    fs::write(folder.path().join("m.safetensors"), &whole).unwrap();
    for_seeds("headers and indices of weights", 150, 150_000, |seed| {
        let (name, bytes) = match seed % 2 {
            0 => (INDEX, mutated(index.as_bytes(), seed)),
            // Faults beyond the header are faults of values.
            _ => (WEIGHTS, [&mutated(&whole[..3000], seed), &whole[3000..]].concat()),
        };
        fs::write(folder.path().join(name), bytes).unwrap();
        let opened = Weights::open(folder.path());
        fs::remove_file(folder.path().join(name)).unwrap();
        let message = opened.err().map_or(String::new(), |error| error.to_string());
        let names_it = message.is_empty() || message.contains(folder.path().to_str().unwrap());
        names_it.then_some(()).ok_or(message)
    });
}

#[test]
fn no_tokenizer_and_no_config_of_a_model_makes_the_loaders_panic() {
    let tokenizer = json!({ "version": "1.0", "added_tokens": [{ "id": 3, "content": "<s>", "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": true }], "normalizer": { "type": "Replace", "pattern": { "String": " " }, "content": "_" },
        "pre_tokenizer": { "type": "Split", "pattern": { "Regex": "\\p{L}+|\\s" }, "behavior": "Isolated", "invert": false },
        "post_processor": { "type": "TemplateProcessing", "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [], "special_tokens": { "<s>": { "id": "<s>", "ids": [3], "tokens": ["<s>"] } } },
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": { "type": "BPE", "unk_token": "a", "byte_fallback": true, "vocab": { "a": 0, "b": 1, "ab": 2 }, "merges": [["a", "b"]] } });
    let tokenizer = tokenizer.to_string().into_bytes();
    let config = fs::read(repo("tests/golden/hf_deepseek_v3/config.json")).unwrap();
    for_seeds("tokenizer.json and config.json", 300, 250_000, |seed| {
        if seed % 2 == 0 {
            if let Ok(config) = serde_json::from_slice(&mutated(&config, seed)) {
                let _ = hf::args_from_config(&config);
            }
            return Ok(());
        }
        let bytes = mutated(&tokenizer, seed);
        let made = Tokenizer::from_files(vec![TokenizerFile { name: "tokenizer.json".into(), bytes }], "folder");
        let used = made.and_then(|it| it.decode(&it.encode("ab <s> ba", true, true)?));
        let message = used.err().map_or(String::new(), |error| error.to_string());
        let names_it = message.is_empty() || message.contains("folder");
        names_it.then_some(()).ok_or(message)
    });
}

#[test]
fn no_chat_template_makes_the_engine_panic() {
    const PARTS: [&str; 28] = [
        "{% for m in messages %}",
        "{% endfor %}",
        "{% if m.role == 'user' %}",
        "{% else %}",
        "{% endif %}",
        "{{ m.content }}",
        "{{ m['x'] }}",
        "{% set s = s ~ m.content %}",
        "{{ s }}",
        "{% generation %}",
        "{% endgeneration %}",
        "{{ messages | tojson(indent=2) }}",
        "{{ m.content.split('l')[-1].strip() }}",
        "{{ 'a' * 70000000 }}",
        "{{ loop.index0 }}",
        "{{ messages[5:-9:2] }}",
        "{{ m.content[::-1] }}",
        "{{ raise_exception(m.role) }}",
        "{{ strftime_now('%d %b %Y') }}",
        "{% macro f(x) %}",
        "{{ f(f) }}",
        "{% endmacro %}",
        "{{ 1 // 0 }}",
        "{{ (1 << 2) ** 99999 }}",
        "{{ m.content | replace('', 'x') }}",
        "{%- break -%}",
        "{{ namespace(a=1).b }}",
        "text {# a remark #}",
    ];
    let vocab = TokenizerFile { name: "vocab.json".into(), bytes: br#"{"[UNK]": 0, "hello": 1, "<s>": 2}"#.to_vec() };
    let messages = [Message::new("user", "hello"), Message::new("assistant", "hello hello")];
    for_seeds("chat templates", 300, 200_000, |seed| {
        let mut random = random(seed);
        let parts: String = (0..1 + random.below(8)).map(|_| random.pick(&PARTS)).collect();
        let template = match seed % 3 {
            0 => mutated(parts.as_bytes(), seed),
            _ => parts.into_bytes(),
        };
        let template = TokenizerFile { name: "chat_template.jinja".into(), bytes: template };
        let tokenizer =
            Tokenizer::from_files(vec![vocab.clone(), template], "folder").map_err(|error| error.to_string())?;
        let _ = tokenizer.encode_chat(&messages);
        Ok(())
    });
}

/// What the command line and the environment bring.
#[test]
fn odd_prompts_paths_and_variables_are_answered_in_words() {
    let mut model = Model::new();
    let folder = model.folder();
    for prompt in [
        "\u{1b}[31m\u{7}",
        "\u{202e}\u{fdd0}\u{fdd1}",
        &"\u{1f600}".repeat(2000),
        "<|begin_of_text|>".repeat(300).as_str(),
        "",
        " ",
        "--",
    ] {
        let verdict = model.examine(
            titan(&["generate", "--max-new-tokens=1", "--checkpoint"]).arg(&folder).arg(format!("--prompt={prompt}")),
        );
        // The model of the test knows 128 tokens only.
        assert!([0, 1].contains(&verdict.code), "{prompt:?}\n{}", verdict.stderr);
    }
    let not_utf8 = <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"\xff\xfe");
    for path in [
        "",
        "/",
        "..",
        "/dev/null",
        "/dev/zero",
        "/proc/self",
        "step-",
        "step-99999999999999999999",
        &"x/".repeat(3000),
    ] {
        let verdict = model.examine(&mut titan(&["generate", "--checkpoint", path]));
        assert!([1, 2].contains(&verdict.code), "{path:?}\n{}", verdict.stderr);
    }
    for argument in ["--checkpoint", "--prompt", "--dump-folder", "--config"] {
        let verdict = model.examine(titan(&["generate", argument]).arg(not_utf8));
        assert!([1, 2].contains(&verdict.code), "{argument}\n{}", verdict.stderr);
    }
    for (name, codes) in [
        ("TITAN_LOG", [2, 2]),
        ("HF_TOKEN", [0, 0]),
        ("HF_ENDPOINT", [0, 0]),
        ("HF_HOME", [0, 0]),
        ("RAYON_NUM_THREADS", [0, 0]),
        ("NO_COLOR", [0, 0]),
        ("TMPDIR", [0, 0]),
        ("COLUMNS", [0, 0]),
    ] {
        for value in ["\u{1b}]", "999999999999999999999", "../..", "-1"] {
            let mut titan = titan(&["generate", "--prompt", "hi", "--max-new-tokens=1", "--checkpoint"]);
            let verdict = model.examine(titan.arg(&folder).env(name, value));
            assert!(codes.contains(&verdict.code), "{name}={value}\n{}", verdict.stderr);
        }
        let mut titan = titan(&["generate", "--prompt", "hi", "--max-new-tokens=1", "--checkpoint"]);
        let verdict = model.examine(titan.arg(&folder).env(name, not_utf8));
        assert!([0, 2].contains(&verdict.code), "{name}\n{}", verdict.stderr);
    }
    for flag in [
        "--max-new-tokens=18446744073709551615",
        "--max-new-tokens=-1",
        "--temperature=nan",
        "--top-p=inf",
        "--top-k=0",
    ] {
        let mut titan = titan(&["generate", "--prompt", "hi", flag, "--checkpoint"]);
        model.examine(titan.arg(&folder)).assert_refused(2, &[]);
    }
    assert!(Path::new(&folder).is_dir());
}
