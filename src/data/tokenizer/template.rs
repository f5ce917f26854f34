//! How a conversation becomes text: the tokenizer's own chat template, which is Jinja.

use std::fmt::Write;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{AutoEscape, Environment, ErrorKind, State, Value, context};
use serde::Serialize;
use serde_json::Map;
use serde_json::ser::Formatter;
use tracing::{info, warn};

use super::{Tokenizer, load};
use crate::data::chat::Message;
use crate::tools::panics::caught;
use crate::{Error, Result};

/// The file that a template has to itself; it wins over `chat_template` in `tokenizer_config.json`.
pub(super) const FILE: &str = "chat_template.jinja";

/// Ten times the longest template that there is.
const MAX_BYTES: usize = 256 << 10;

/// What a template may do to write a conversation: instructions, and 64 bytes of text for each. Those that there are copy
/// each message a few times, and take some hundred instructions for it.
const FUEL: u64 = 1_000_000;
const FUEL_OF_MESSAGE: u64 = 1_000;
const BYTES_OF_FUEL: u64 = 4;
const MAX_FUEL: u64 = 6_000_000;

/// Of the thread that a template is read and run on: enough for as deep a nesting as its length and its fuel allow.
const STACK_BYTES: usize = 256 << 20;

/// Bytes that may be written to find out what each message of a conversation adds to it.
const MAX_WRITTEN: usize = 1 << 29;

/// Of the processor, many times what that and the fuel take.
const MAX_TIME: Duration = Duration::from_secs(8);

/// ChatML, for tokenizers without a template.
const CHATML: &str = "{{ bos_token }}{% for message in messages %}\
    {{ '<|im_start|>' + message['role'] + '\n' + message['content'] + end_of_turn + '\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
const CHATML_END: &str = "<|im_end|>";

/// Stand around what a template marks by `{% generation %}`: characters that Unicode keeps for such inner use, so that no
/// text has them.
const MARKS: [char; 2] = ['\u{fdd0}', '\u{fdd1}'];

#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// The file that it is in.
    origin: String,
    /// `bos_token`, `eos_token` and the others that `tokenizer_config.json` names.
    special_tokens: Map<String, serde_json::Value>,
    /// Whether it says itself what an assistant writes.
    marks_generation: bool,
}

impl ChatTemplate {
    /// # Errors
    /// [`Error::Tokenizer`] if the template is malformed, or there is neither a template nor a token that could end a turn.
    pub(super) fn of(tokenizer: &Tokenizer) -> Result<Self> {
        let (config, mut special_tokens) = load::config_and_special_tokens(&tokenizer.files)?;
        let file = tokenizer.files.iter().find(|file| file.name == FILE);
        let (source, origin) = match (file, template_in(&config)) {
            (Some(file), _) => (String::from_utf8_lossy(&file.bytes).into_owned(), FILE),
            (None, Some(source)) => (source.to_owned(), "tokenizer_config.json"),
            (None, None) => {
                let known = tokenizer.token_id(CHATML_END).map(|_| CHATML_END.into());
                let Some(end) = known.or_else(|| special_tokens.get("eos_token").cloned()) else {
                    return Err(Error::Tokenizer(
                        "the tokenizer has no chat template, and no token that could end a turn\n   = put the model's \
                         chat_template.jinja beside its tokenizer.json, or name an eos_token in tokenizer_config.json"
                            .into(),
                    ));
                };
                warn!(
                    "The tokenizer has no chat template: conversations are written as ChatML, with turns that end in {end}"
                );
                special_tokens.entry("bos_token").or_insert_with(|| "".into());
                special_tokens.insert("end_of_turn".into(), end);
                (CHATML.to_owned(), "ChatML")
            }
        };
        let explain = {
            let at = tokenizer.origin.clone();
            move |fault: String| Error::Tokenizer(format!("{at}: chat template of {origin}: {fault}"))
        };
        if source.len() > MAX_BYTES {
            return Err(explain(format!("it is longer than {} KiB", MAX_BYTES >> 10)));
        }
        let marked = generation_as_filter(&source);
        let marks_generation = marked != source;
        // Without it, templates that ask for it fall back to a date of their own: what is learned does not depend on the day.
        let asks_for_date = !source.contains("strftime_now is defined");
        let environment = on_large_stack(move || {
            let mut environment = environment();
            if asks_for_date {
                environment.add_function("strftime_now", strftime_now);
            }
            environment.add_template_owned(origin, marked).map_err(|error| explain(error.to_string()))?;
            Ok(environment)
        })?;
        info!(
            "Chat template: {origin}; learned is {}",
            if marks_generation {
                "what it marks as generation"
            } else {
                "what each message of the assistant adds to it"
            }
        );
        Ok(Self { environment, origin: origin.to_owned(), special_tokens, marks_generation })
    }

    /// The text of a conversation; with `add_generation_prompt` up to where the assistant's next message begins.
    pub fn render(self: &Arc<Self>, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let (this, messages) = (self.clone(), messages.to_vec());
        on_large_stack(move || this.render_here(&messages, add_generation_prompt))
    }

    fn render_here(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let mut text = self.render_marked(messages, add_generation_prompt)?;
        text.retain(|c| !MARKS.contains(&c));
        Ok(text)
    }

    /// The text of a conversation, and which of its bytes the assistant wrote, the ends of its turns included.
    ///
    /// # Errors
    /// [`Error::Data`] in the template's own words where it refuses the conversation, or where it rewrites earlier
    /// messages and does not mark what is the assistant's.
    pub fn render_learned(self: &Arc<Self>, messages: &[Message]) -> Result<(String, Vec<Range<usize>>)> {
        let (this, messages) = (self.clone(), messages.to_vec());
        on_large_stack(move || this.render_learned_here(&messages))
    }

    fn render_learned_here(&self, messages: &[Message]) -> Result<(String, Vec<Range<usize>>)> {
        let whole = self.render_marked(messages, false)?;
        if self.marks_generation {
            return Ok(unmark(&whole));
        }
        if whole.len().saturating_mul(messages.len()) > MAX_WRITTEN {
            return Err(Error::Data(format!(
                "a conversation of {} messages and {} bytes is too long to find out what each message adds to it\n   = mark \
                 what the assistant writes by {{% generation %}} and {{% endgeneration %}} in a {FILE} beside the tokenizer",
                messages.len(),
                whole.len()
            )));
        }
        let learned = (0..messages.len()).filter(|i| messages[*i].is_learned());
        let spans = learned.map(|i| {
            let start = self.render_here(&messages[..i], true)?;
            let end = self.render_here(&messages[..=i], false)?;
            if !whole.starts_with(&end) || !end.starts_with(&start) {
                return Err(Error::Data(format!(
                    "the chat template writes messages differently when others follow, so that what message {} adds cannot \
                     be told\n   = mark what the assistant writes by {{% generation %}} and {{% endgeneration %}} in a {FILE} \
                     beside the tokenizer",
                    i + 1
                )));
            }
            Ok(start.len()..end.len())
        });
        let spans = spans.collect::<Result<_>>()?;
        Ok((whole, spans))
    }

    fn render_marked(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let mut environment = self.environment.clone();
        let bytes: usize = messages.iter().map(Message::bytes).sum();
        let fuel = FUEL + FUEL_OF_MESSAGE * messages.len() as u64 + bytes as u64 / BYTES_OF_FUEL;
        environment.set_fuel(Some(fuel.min(MAX_FUEL)));
        let template = environment.get_template(&self.origin).expect("added when it was made");
        let given = context! {
            messages => Serde(messages),
            add_generation_prompt,
            ..Serde(&self.special_tokens)
        };
        template.render(given).map_err(|error| {
            // What `raise_exception` says is for the user; where in the template it was raised is not.
            let words = error.detail().unwrap_or_default();
            Error::Data(match error.kind() {
                ErrorKind::OutOfFuel => {
                    format!("the chat template does not come to an end, or makes too much of the messages: {error}")
                }
                ErrorKind::InvalidOperation if !words.is_empty() => format!("the chat template refuses it: {words}"),
                _ => format!("the chat template fails: {error}"),
            })
        })
    }
}

/// Runs `f` where it may nest deeper than a thread's stack commonly allows, for Jinja's expressions and values have no limit
/// of their own, and may be left alone: joining lists takes no fuel. A panic of the engine is an error.
fn on_large_stack<T: Send + 'static>(f: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let fault = |what: String| Error::Tokenizer(format!("the chat template cannot be used: {what}"));
    let (done, result) = sync_channel(1);
    let run = move || {
        // Nobody receives it if the template took too long.
        let _ = done.send(caught(|| Ok(f())));
    };
    let thread = std::thread::Builder::new().name("chat-template".into()).stack_size(STACK_BYTES).spawn(run);
    let thread = thread.map_err(|error| fault(error.to_string()))?;
    loop {
        match result.recv_timeout(Duration::from_millis(100)) {
            Ok(result) => return result.map_err(fault)?,
            Err(RecvTimeoutError::Timeout) if processor_time(&thread) < MAX_TIME => {}
            Err(_) => return Err(fault(format!("it has not come to an end in {MAX_TIME:?}"))),
        }
    }
}

/// What a thread has taken of the processor, whatever else the machine was doing meanwhile. Unknown where the system does not
/// say.
#[cfg(not(target_os = "linux"))]
fn processor_time(_: &JoinHandle<()>) -> Duration {
    Duration::ZERO
}

#[cfg(target_os = "linux")]
fn processor_time(thread: &JoinHandle<()>) -> Duration {
    use std::os::unix::thread::JoinHandleExt;
    let (mut clock, mut time) = (0, libc::timespec { tv_sec: 0, tv_nsec: 0 });
    // SAFETY: the thread was not joined or detached, so that its handle is valid; both calls write to places that live.
    let found = unsafe {
        libc::pthread_getcpuclockid(thread.as_pthread_t(), &mut clock) == 0
            && libc::clock_gettime(clock, &mut time) == 0
    };
    if found { Duration::new(time.tv_sec as u64, time.tv_nsec as u32) } else { Duration::ZERO }
}

/// Jinja as `transformers` sets it up for chat templates.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("the delimiters are Jinja's own"));
    // What a template writes is text, whatever the file is called that it is in.
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(python_method);
    environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_filter("tojson", python_json);
    environment.add_filter("generation", |text: String| format!("{}{text}{}", MARKS[0], MARKS[1]));
    environment
}

/// Methods of Python's types.
fn python_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, minijinja::Error> {
    // These make much of little; the engine's own look at the fuel before they do.
    match (value.as_str(), method, args) {
        (Some(_), "replace", _) => state.apply_filter("replace", &[std::slice::from_ref(value), args].concat()),
        (Some(format), "format", _) if widths(format) > 100_000 => {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, "no format is that wide"))
        }
        (Some(_), "join", [items]) => state.apply_filter("join", &[items.clone(), value.clone()]),
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args),
    }
}

/// The sum of the numbers in a format.
fn widths(format: &str) -> usize {
    let numbers = format.split(|c: char| !c.is_ascii_digit()).filter(|number| !number.is_empty());
    numbers.map(|number| number.parse().unwrap_or(usize::MAX)).fold(0, usize::saturating_add)
}

fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    if format.len() > 1000 {
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, "no format of dates is that long"));
    }
    let mut now = String::new();
    // An unknown directive is an error of `write!`, but a panic of `to_string`.
    write!(now, "{}", chrono::Local::now().format(format))
        .map_err(|_| minijinja::Error::new(ErrorKind::InvalidOperation, format!("no format of dates: {format:?}")))?;
    Ok(now)
}

/// `chat_template` in `tokenizer_config.json`: a template, or several with names.
fn template_in(config: &Map<String, serde_json::Value>) -> Option<&str> {
    match config.get("chat_template")? {
        serde_json::Value::Array(named) => named.iter().find(|it| it["name"] == "default")?["template"].as_str(),
        one => one.as_str(),
    }
}

/// `{% generation %}`, a tag of `transformers`, as the block of a filter.
fn generation_as_filter(source: &str) -> String {
    let mut tags = source.split("{%");
    let mut text = tags.next().unwrap_or_default().to_owned();
    for tag in tags {
        let inside = tag.split("%}").next().unwrap_or_default();
        text += "{%";
        text += &match inside.trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace()) {
            "generation" => tag.replacen("generation", "filter generation", 1),
            "endgeneration" => tag.replacen("endgeneration", "endfilter", 1),
            _ => tag.to_owned(),
        };
    }
    text
}

/// Takes out the marks, and says what was between them.
fn unmark(marked: &str) -> (String, Vec<Range<usize>>) {
    let (mut text, mut spans, mut start) = (String::with_capacity(marked.len()), Vec::new(), 0);
    for c in marked.chars() {
        if c == MARKS[0] {
            start = text.len();
        } else if c == MARKS[1] {
            spans.push(start..text.len());
        } else {
            text.push(c);
        }
    }
    (text, spans)
}

/// As Python's `json.dumps` with `ensure_ascii=False`, which templates are written for.
fn python_json(state: &State, value: Value, options: Kwargs) -> Result<Value, minijinja::Error> {
    struct Spaced;
    impl Formatter for Spaced {
        fn begin_array_value<W: std::io::Write + ?Sized>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
            if first { Ok(()) } else { out.write_all(b", ") }
        }

        fn begin_object_key<W: std::io::Write + ?Sized>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
            if first { Ok(()) } else { out.write_all(b", ") }
        }

        fn begin_object_value<W: std::io::Write + ?Sized>(&mut self, out: &mut W) -> std::io::Result<()> {
            out.write_all(b": ")
        }
    }
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    if indent.is_some_and(|n| n > 100) {
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, "no indent is that wide"));
    }
    let (_, left) = state.fuel_levels().unwrap_or((0, u64::MAX));
    let mut json = Limited { bytes: Vec::new(), most: left.saturating_mul(BYTES_OF_JSON) };
    let written = match indent.map(|n| " ".repeat(n)) {
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, Spaced)),
        Some(indent) => {
            let pretty = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, pretty))
        }
    };
    state.consume_fuel(json.bytes.len() as u64 / BYTES_OF_JSON)?;
    written.map_err(|error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    Ok(Value::from_safe_string(String::from_utf8(json.bytes).expect("JSON is UTF-8")))
}

/// What the engine's own serializer takes a unit of fuel for.
const BYTES_OF_JSON: u64 = 4;

/// Takes no more than so many bytes.
struct Limited {
    bytes: Vec<u8>,
    most: u64,
}

impl io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if (self.bytes.len() + bytes.len()) as u64 > self.most {
            return Err(io::Error::other("it is too long"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::data::tokenizer::{Tokenizer, TokenizerFile};

    /// As Llama 3's, without the date and the tools.
    const LLAMA: &str = "{{- bos_token }}{%- for message in messages %}
        {{- '<|start|>' + message['role'] + '<|end|>\n\n'+ message['content'] | trim + '<|eot|>' }}
    {%- endfor %}
    {%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\n\n' }}{%- endif %}";

    /// Writes earlier answers without their thoughts, as reasoning models do, and marks what the assistant writes.
    const MARKED: &str = "{% for message in messages %}
{% if message.role == 'assistant' %}
A: {% generation %}{{ message.content if loop.last else message.content.split('</think>')[-1].lstrip() }}<|eot|>
{%- endgeneration %}

{% else %}
U: {{ message.content }}
{% endif %}
{% endfor %}";

    fn tokenizer(template: Option<&str>) -> Tokenizer {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tokenizer");
        let added = |content: &str| json!({ "content": content, "special": true });
        let mut config = json!({
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|end_of_text|>",
            "added_tokens_decoder": { "2048": added("<|start|>"), "2049": added("<|end|>"), "2050": added("<|eot|>") },
        });
        if let Some(template) = template {
            config["chat_template"] = template.into();
        }
        let model = TokenizerFile {
            name: "tokenizer.json".into(),
            bytes: std::fs::read(folder.join("tokenizer.json")).unwrap(),
        };
        let config = TokenizerFile { name: "tokenizer_config.json".into(), bytes: config.to_string().into_bytes() };
        Tokenizer::from_files(vec![model, config], "a test").unwrap()
    }

    fn conversation() -> [Message; 5] {
        [
            Message::new("system", "Be brief."),
            Message::new("user", "Who fell?"),
            Message::new("assistant", "<think>Hm.</think> Tom fell."),
            Message::new("user", "Thanks"),
            Message::new("assistant", "No problem."),
        ]
    }

    /// The text of the tokens that are learned, each run apart.
    fn learned(tokenizer: &Tokenizer, messages: &[Message]) -> Vec<String> {
        let example = tokenizer.encode_chat(messages).unwrap();
        let tokens: Vec<_> = example.tokens.iter().zip(&example.learned).collect();
        let runs = tokens.chunk_by(|a, b| a.1 == b.1).filter(|run| *run[0].1);
        runs.map(|run| run.iter().map(|(id, _)| tokenizer.inner.decode(&[**id], false).unwrap()).collect()).collect()
    }

    #[test]
    fn what_an_assistant_writes_is_learned_to_the_end_of_its_turn() {
        let tokenizer = tokenizer(Some(LLAMA));
        let answers = ["<think>Hm.</think> Tom fell.<|eot|>", "No problem.<|eot|>"];
        assert_eq!(learned(&tokenizer, &conversation()), answers);
        let example = tokenizer.encode_chat(&conversation()).unwrap();
        assert_eq!(example.tokens.iter().filter(|id| **id == tokenizer.bos_id().unwrap()).count(), 1);
        // A prompt ends where the answer begins, token for token.
        let prompt = tokenizer.encode_chat_prompt(&conversation()[..2]).unwrap();
        assert_eq!(example.tokens[..prompt.len()], prompt);
        assert!(example.learned[prompt.len()] && !example.learned[..prompt.len()].contains(&true));
        assert_eq!(tokenizer.ends_of_turn().unwrap(), [2050, tokenizer.eos_id().unwrap()]);
    }

    #[test]
    fn what_a_template_marks_is_learned_and_the_marks_leave_no_trace() {
        let tokenizer = tokenizer(Some(MARKED));
        // The space before the mark is one token with the word behind it.
        assert_eq!(learned(&tokenizer, &conversation()[1..]), [" Tom fell.<|eot|>", " No problem.<|eot|>"]);
        let text = tokenizer.chat_template().unwrap().render(&conversation()[1..], false).unwrap();
        assert_eq!(text, "U: Who fell?\nA: Tom fell.<|eot|>\nU: Thanks\nA: No problem.<|eot|>\n");
    }

    #[test]
    fn a_template_that_rewrites_history_without_marks_is_refused() {
        let template = MARKED.replace("{% generation %}", "").replace("{%- endgeneration %}", "");
        let error = tokenizer(Some(&template)).encode_chat(&conversation()[1..]).unwrap_err().to_string();
        assert!(error.contains("what message 2 adds cannot be told") && error.contains("{% generation %}"), "{error}");
    }

    #[test]
    fn without_a_template_a_conversation_is_chatml_that_ends_turns_with_a_token_of_the_vocabulary() {
        let tokenizer = tokenizer(None);
        let text = tokenizer.chat_template().unwrap().render(&conversation()[1..2], true).unwrap();
        let expected = "<|begin_of_text|><|im_start|>user\nWho fell?<|end_of_text|>\n<|im_start|>assistant\n";
        assert_eq!(text, expected);
        assert_eq!(learned(&tokenizer, &conversation())[1], "No problem.<|end_of_text|>");
    }

    #[test]
    fn a_templates_own_words_come_through() {
        let template = "{{ raise_exception('Conversation roles must alternate') }}";
        let error = tokenizer(Some(template)).encode_chat(&conversation()).unwrap_err().to_string();
        assert_eq!(error, "the chat template refuses it: Conversation roles must alternate");
        let error = tokenizer(Some("{% for %}")).chat_template().unwrap_err().to_string();
        assert!(error.contains("chat template of tokenizer_config.json"), "{error}");
    }

    #[test]
    fn json_in_templates_is_pythons() {
        let mut environment = environment();
        environment.add_template("t", "{{ x | tojson }} {{ x | tojson(indent=1) }}").unwrap();
        let x = json!({ "b": [1, "é<"], "a": null });
        let text = environment.get_template("t").unwrap().render(context! { x => Serde(x) }).unwrap();
        assert_eq!(text, "{\"b\": [1, \"é<\"], \"a\": null} {\n \"b\": [\n  1,\n  \"é<\"\n ],\n \"a\": null\n}");
    }
}
