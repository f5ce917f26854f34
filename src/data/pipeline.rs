//! Documents to tokens on other threads, in order.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use crate::data::chat::{Conversation, Example, Instruction, Message};
use crate::data::datasets::{Content, Dataset, Document, Position, Stop, StopOnDrop};
use crate::data::tokenizer::Tokenizer;
use crate::{Error, Result};

/// Documents that may wait before and behind each worker.
const QUEUE: usize = 16;

/// Text to token ids.
pub trait Encode: Send + Sync {
    /// With BOS before and EOS behind exactly as asked, where the vocabulary has them.
    fn encode(&self, text: &str, add_bos: bool, add_eos: bool) -> Result<Vec<u32>>;

    /// A conversation as the vocabulary's chat template writes it. Learned is what the assistant wrote.
    fn encode_chat(&self, messages: &[Message]) -> Result<Example>;

    fn vocab_size(&self) -> usize;

    fn eos_id(&self) -> Option<u32>;
}

impl Encode for Tokenizer {
    fn encode(&self, text: &str, add_bos: bool, add_eos: bool) -> Result<Vec<u32>> {
        Tokenizer::encode(self, text, add_bos, add_eos)
    }

    fn encode_chat(&self, messages: &[Message]) -> Result<Example> {
        Tokenizer::encode_chat(self, messages)
    }

    fn vocab_size(&self) -> usize {
        Tokenizer::vocab_size(self)
    }

    fn eos_id(&self) -> Option<u32> {
        Tokenizer::eos_id(self)
    }
}

/// Tokens of a document, and where it begins.
#[derive(Debug, PartialEq)]
pub struct Tokens {
    pub position: Position,
    pub tokens: Vec<u32>,
    /// Of each token whether it is learned; `None`: all are.
    pub learned: Option<Vec<bool>>,
    /// Of the text that they stand for; 0 where there was none.
    pub text_bytes: usize,
    /// Whether a document ends with them; of token ids that is not known.
    pub ends: bool,
}

/// The tokens of a dataset's documents, from a position on, for one pass or for ever.
///
/// One thread reads, `n_workers` encode. Document `i` goes to worker `i % n_workers` and is awaited from there, so the
/// order is the dataset's whatever the number of workers. Ends after the first error.
///
/// Dropping it ends the threads, by closing the channels that they wait on; nobody waits for them.
pub struct Tokenized {
    stop: StopOnDrop,
    /// Of each worker, in turn.
    outputs: Vec<Receiver<Result<Tokens>>>,
    turn: usize,
    threads: Vec<JoinHandle<()>>,
}

/// What to tokenize, and how.
#[derive(Clone)]
pub struct Plan {
    pub dataset: Arc<dyn Dataset>,
    /// Needed for documents of text.
    pub encoder: Option<Arc<dyn Encode>>,
    /// Seed of the shuffle, if any.
    pub shuffle: Option<u64>,
    /// Whether to start over at the end.
    pub repeat: bool,
    pub n_workers: usize,
}

impl Tokenized {
    /// # Errors
    /// [`Error::Data`] if the system cannot start a thread.
    pub fn new(plan: &Plan, from: Position) -> Result<Self> {
        let stop = Stop::default();
        let mut this = Self { stop: StopOnDrop(stop.clone()), outputs: Vec::new(), turn: 0, threads: Vec::new() };
        let mut inputs = Vec::new();
        for i in 0..plan.n_workers.max(1) {
            let (input, documents) = sync_channel(QUEUE);
            let (sender, output) = sync_channel(QUEUE);
            let encoder = plan.encoder.clone();
            this.spawn(&format!("encode-{i}"), move || work(encoder.as_deref(), &documents, &sender))?;
            inputs.push(input);
            this.outputs.push(output);
        }
        let plan = plan.clone();
        this.spawn("read-data", move || read(&plan, from, &stop, &inputs))?;
        Ok(this)
    }

    /// Ends the threads when requested, even if they wait for a download.
    pub fn stop(&self) -> Stop {
        self.stop.0.clone()
    }

    fn spawn(&mut self, name: &str, run: impl FnOnce() + Send + 'static) -> Result<()> {
        self.threads.push(spawn(name, run)?);
        Ok(())
    }

    /// Whether the threads ended well.
    fn join(&mut self) -> Result<()> {
        self.stop.0.request();
        // A thread that waits to send gives up when nobody can receive.
        self.outputs.clear();
        self.threads.drain(..).try_for_each(join)
    }
}

/// Starts a thread of the data pipeline.
pub fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(run);
    thread.map_err(|error| Error::Data(format!("cannot start the thread `{name}`: {error}")))
}

/// Waits for a thread of the data pipeline; its panic is an error.
pub fn join(thread: JoinHandle<()>) -> Result<()> {
    let name = thread.thread().name().unwrap_or_default().to_owned();
    thread.join().map_err(|payload| {
        let text = payload.downcast_ref::<&str>().copied();
        let message = text.or(payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
        Error::Data(format!("data thread `{name}` panicked: {message}"))
    })
}

impl Iterator for Tokenized {
    type Item = Result<Tokens>;

    fn next(&mut self) -> Option<Self::Item> {
        let output = self.outputs.get(self.turn)?;
        let Ok(tokens) = output.recv() else {
            return self.join().err().map(Err);
        };
        self.turn = (self.turn + 1) % self.outputs.len();
        if tokens.is_err() {
            self.outputs.clear();
        }
        Some(tokens)
    }
}

/// Sends documents to the workers in turn, until there are no more, or a worker is gone.
fn read(plan: &Plan, from: Position, stop: &Stop, workers: &[SyncSender<Result<Document>>]) {
    let mut workers = workers.iter().cycle();
    let mut send = |document| workers.next().is_some_and(|worker| worker.send(document).is_ok());

    let mut start = from;
    loop {
        // Where nothing was read yet, nothing may come: a pass that was resumed at its end.
        let mut is_empty = start.file.is_none() && start.index == 0;
        let epoch = start.epoch;
        let mut token = start.token;
        for document in plan.dataset.pass(start, plan.shuffle, stop) {
            is_empty = false;
            let failed = document.is_err();
            let document = document.map(|mut document| {
                document.position.token = std::mem::take(&mut token);
                document
            });
            if !send(document) || failed {
                return;
            }
        }
        if is_empty {
            let origin = &plan.dataset.files().origin;
            send(Err(Error::Data(format!("{origin}: the dataset is empty"))));
            return;
        }
        if !plan.repeat {
            return;
        }
        start = Position { epoch: epoch + 1, ..Position::default() };
    }
}

fn work(encoder: Option<&dyn Encode>, documents: &Receiver<Result<Document>>, output: &SyncSender<Result<Tokens>>) {
    for document in documents {
        if output.send(document.and_then(|document| encode(encoder, document))).is_err() {
            return;
        }
    }
}

fn encode(encoder: Option<&dyn Encode>, Document { position, content }: Document) -> Result<Tokens> {
    let encoder = || encoder.ok_or_else(|| Error::Tokenizer("text needs a tokenizer".to_owned()));
    let text_bytes = content.text_bytes();
    Ok(match content {
        Content::Tokens(tokens) => Tokens { position, tokens, learned: None, text_bytes, ends: false },
        Content::Text(record) => {
            let tokens = encoder()?.encode(&record.text, record.begins, record.ends)?;
            Tokens { position, tokens, learned: None, text_bytes, ends: record.ends }
        }
        Content::Chat(Conversation { messages, at }) => {
            let example = encoder()?.encode_chat(&messages).map_err(|error| match error {
                Error::Data(fault) => Error::Data(format!("{at}: {fault}")),
                other => other,
            })?;
            Tokens { position, tokens: example.tokens, learned: Some(example.learned), text_bytes, ends: true }
        }
        // Apart, as in generation, where the prompt is encoded before there is a completion.
        Content::Instruct(Instruction { prompt, completion }) => {
            let mut tokens = encoder()?.encode(&prompt, true, false)?;
            let completion = encoder()?.encode(&completion, false, true)?;
            let learned = [vec![false; tokens.len()], vec![true; completion.len()]].concat();
            tokens.extend(completion);
            Tokens { position, tokens, learned: Some(learned), text_bytes, ends: true }
        }
    })
}
