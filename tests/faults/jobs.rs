//! Job files that somebody got wrong, or wants to be wrong.

use std::fs;
use std::path::Path;

use titan::config::{self, JobConfig};

use crate::binary::titan;
use crate::bounded::{Verdict, examine};
use crate::common::{amount, held};
use crate::mutation::{for_seeds, mutated, random};

/// A job that trains one step in an instant.
const JOB: &str = r#"
[model]
name = "llama3"
[model.args]
dim = 16
n_layers = 1
n_heads = 2
multiple_of = 16
[training]
local_batch_size = 1
seq_len = 16
steps = 1
"#;

/// Every key of a job file with its default.
fn keys() -> Vec<(String, toml::Value)> {
    fn collect(table: toml::Table, path: &str, keys: &mut Vec<(String, toml::Value)>) {
        for (key, value) in table {
            match value {
                toml::Value::Table(inner) => collect(inner, &format!("{path}{key}."), keys),
                value => keys.push((format!("{path}{key}"), value)),
            }
        }
    }
    let mut keys = Vec::new();
    collect(JobConfig::default().to_toml().parse().unwrap(), "", &mut keys);
    for (key, value) in [("dim", 256.into()), ("norm_eps", 1e-5.into()), ("moe_args.top_k", 1.into())] {
        keys.push((format!("model.args.{key}"), value));
    }
    keys
}

/// Values that no key with such a default takes.
fn misfits(value: &toml::Value) -> &'static [&'static str] {
    match value {
        toml::Value::Integer(_) => {
            &["\"x\"", "-7", "1.5", "99999999999999999999", "true", "nan", "[]", "{ a = 1 }", "\"\""]
        }
        toml::Value::Float(_) => &["\"x\"", "true", "nan", "-1e308", "1e308", "-inf", "[1.0]", "1979-05-27"],
        toml::Value::Boolean(_) => &["1", "\"true\"", "0.0", "[true]"],
        toml::Value::String(_) => &["true", "[[[[]]]]", "\"a\\u0000b\"", "{ a = { b = 1 } }"],
        _ => &["5", "[[5]]", "[true]", "\"\\u0000\""],
    }
}

fn config_of(folder: &Path, job: &str) -> Verdict {
    fs::write(folder.join("job.toml"), job).unwrap();
    examine(titan(&["config", "--config", "job.toml"]).current_dir(folder))
}

#[test]
fn ten_thousand_mutated_job_files_are_refused_by_section_and_key() {
    let folder = tempfile::tempdir().unwrap();
    let keys = keys();
    let n = amount(150, 10_000);
    for i in 0..n {
        let mut random = random(i as u64);
        let (key, default) = &keys[random.below(keys.len())];
        let (section, name) = key.rsplit_once('.').unwrap();
        let misfits = misfits(default);
        let (job, named) = match i % 4 {
            // A misspelt key, a misspelt section, two values that do not fit.
            0 => (format!("[{section}]\n{name}x = 1\n"), format!("`{key}x`")),
            1 => (format!("[{section}.{name}.more]\nx = 1\n"), key.clone()),
            _ => (format!("[{section}]\n{name} = {}\n", misfits[random.below(misfits.len())]), format!("`{key}`")),
        };
        let job = format!("{}\n{job}", "# nothing but a comment\n".repeat(random.below(3)));
        config_of(folder.path(), &job).assert_refused(2, &[&named, "job.toml:"]);
    }
    held("mutated job files: exit 2, section and key named, no trace, under 1.5 GB", format!("{n} of {n}"));
}

#[test]
fn bytes_changed_at_random_are_accepted_or_refused_with_their_place() {
    let folder = tempfile::tempdir().unwrap();
    let jobs =
        [include_bytes!("../../configs/colab_a100.toml").as_slice(), include_bytes!("../../configs/debug_model.toml")];
    for i in 0..amount(50, 2000) {
        let job = mutated(jobs[i % 2], i as u64);
        fs::write(folder.path().join("job.toml"), job).unwrap();
        let verdict = examine(titan(&["config", "--config", "job.toml"]).current_dir(folder.path()));
        if verdict.code != 0 {
            verdict.assert_refused(2, &["job.toml"]);
        }
    }
}

#[test]
fn absurd_sizes_are_refused_before_they_take_memory() {
    let cases: &[(&str, &[&str])] = &[
        ("--model.args.dim=1000000000000", &["`dim` 1000000000000 is beyond any model", "--model.args.dim"]),
        ("--model.args.dim=16777216", &["a feed-forward of width", "--model.args.dim"]),
        ("--model.args.dim=4194304", &["[model.args]", "GiB of memory"]),
        ("--model.args.n_layers=1000000000", &["`n_layers`", "--model.args.n_layers"]),
        ("--model.args.vocab_size=1000000000", &["`vocab_size`", "--model.args.vocab_size"]),
        ("--model.args.moe_args.num_experts=1000000000", &["num_experts", "--model.args.moe_args.num_experts"]),
        ("--model.args.moe_args.num_shared_experts=1000000000000000000", &["num_shared_experts"]),
        ("--model.args.hidden_dim=4000000000", &["`hidden_dim`", "--model.args.hidden_dim"]),
        ("--model.args.ffn_dim_multiplier=1e30", &["feed-forward of width", "--model.args.ffn_dim_multiplier"]),
        ("--model.args.norm_eps=1e308", &["`model.args.norm_eps`", "float32"]),
        ("--optimizer.eps=1e-308", &["`optimizer.eps`", "float32"]),
        ("--optimizer.lr=inf", &["`optimizer.lr`"]),
        ("--training.seq_len=0", &["`training.seq_len`"]),
        ("--training.seq_len=1000000000000000000", &["`training.seq_len`"]),
        ("--training.seq_len=1000000000", &["`seq_len` in [training]"]),
        ("--training.local_batch_size=1000000000", &["`local_batch_size`", "[training]"]),
        ("--training.global_batch_size=1000000000000000000", &["`training.global_batch_size`"]),
        ("--training.max_norm=nan", &["`training.max_norm`"]),
        ("--training.steps=1e18", &["`training.steps`"]),
        ("--data.num_workers=1000000000", &["`data.num_workers`"]),
        ("--model.lora.rank=1000000000000", &["`model.lora.rank`"]),
        ("--model.hf_assets_path=", &["`model.hf_assets_path`", "cannot be empty"]),
        ("--model.tokenizer_path=", &["`model.tokenizer_path`", "cannot be empty"]),
        ("--validation.enable --validation.local_batch_size=1000000000", &["[validation]"]),
    ];
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("job.toml"), JOB).unwrap();
    let dump_folder = folder.path().join("outputs");
    for (flags, named) in cases {
        let mut titan = titan(&["train", "--config"]);
        titan.arg(folder.path().join("job.toml")).arg("--job.dump_folder").arg(&dump_folder).args(flags.split(' '));
        examine(&mut titan).assert_refused(2, named);
    }
    held("absurd sizes and numbers in a job file: exit 2, key or section named", format!("{0} of {0}", cases.len()));
}

#[test]
fn files_that_are_no_job_are_refused_soon() {
    let folder = tempfile::tempdir().unwrap();
    let many = |line: &dyn Fn(usize) -> String, n: usize| (0..n).map(line).collect::<String>();
    let jobs = [
        "x=".to_owned() + &"[".repeat(200_000),
        "x=".to_owned() + &"{a=".repeat(200_000),
        format!("a{}=1", ".a".repeat(500_000)),
        format!("[{}a]", "a.".repeat(500_000)),
        format!("[model.args]\nmoe_args{}=1", ".a".repeat(100_000)),
        many(&|i| format!("k{i}=1\n"), 200_000),
        many(&|i| format!("[t{i}]\n"), 200_000),
        many(&|_| "= =\n".into(), 200_000),
        format!("[compile]\ncomponents=[{}]", "\"a\",".repeat(500_000)),
        format!("[training]\nsteps={}", "9".repeat(3_000_000)),
        format!("[optimizer]\nname=\"{}\"", "A".repeat(3_000_000)),
        format!("{}=1", "a".repeat(3_000_000)),
        "\0".repeat(3_000_000),
        "a".repeat(10_000_000),
    ];
    for job in &jobs {
        config_of(folder.path(), job).assert_refused(2, &["job.toml"]);
    }
    for device in ["/dev/zero", "/dev/urandom", "."] {
        examine(&mut titan(&["config", "--config", device])).assert_refused(2, &[device]);
    }
}

/// In process, and therefore many.
#[test]
fn no_text_makes_the_config_loader_panic() {
    let jobs = [include_str!("../../configs/colab_a100.toml"), include_str!("../config/defaults.toml"), JOB];
    for_seeds("job files", 300, 200_000, |seed| {
        let text = mutated(jobs[seed as usize % jobs.len()].as_bytes(), seed);
        match config::parse("job.toml", &String::from_utf8_lossy(&text)) {
            Err(error) if error.exit_code() != 2 => Err(error.to_string()),
            _ => Ok(()),
        }
    });
}
