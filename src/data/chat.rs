//! Conversations, as chat templates take them.

use serde::Serialize;
use serde_json::{Map, Value};

/// Those that chat templates know.
const ROLES: [&str; 7] = ["system", "developer", "user", "assistant", "tool", "function", "ipython"];

/// A message: role, content, and whatever else the data says of it, such as `tool_calls`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Message(Map<String, Value>);

/// A conversation to learn from.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversation {
    pub messages: Vec<Message>,
    /// File and line, for messages.
    pub at: String,
}

/// What follows a prompt, to be learned.
#[derive(Clone, Debug, PartialEq)]
pub struct Instruction {
    pub prompt: String,
    pub completion: String,
}

/// Tokens, and of each whether a model is to learn to produce it.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    pub tokens: Vec<u32>,
    pub learned: Vec<bool>,
}

impl Message {
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        Self(Map::from_iter([("role".into(), role.into()), ("content".into(), Value::String(content.into()))]))
    }

    pub fn role(&self) -> &str {
        self.0["role"].as_str().unwrap_or_default()
    }

    /// The content; empty where a message has none.
    pub fn text(&self) -> &str {
        self.0.get("content").and_then(Value::as_str).unwrap_or_default()
    }

    /// As [`bytes_of`].
    pub fn bytes(&self) -> usize {
        bytes_of(&self.0)
    }

    /// Whether a model that learns the conversation is to learn this.
    pub fn is_learned(&self) -> bool {
        self.role() == "assistant"
    }

    fn parse(value: Value) -> Result<Self, String> {
        let Value::Object(message) = value else { return Err("is not an object with `role` and `content`".into()) };
        match message.get("role").and_then(Value::as_str) {
            Some(role) if ROLES.contains(&role) => {}
            Some(role) => return Err(format!("has the unknown role {role:?}; known are {}", ROLES.join(", "))),
            None => return Err("has no `role`".into()),
        }
        match message.get("content") {
            Some(Value::String(_)) => Ok(Self(message)),
            None | Some(Value::Null) if message.contains_key("tool_calls") => Ok(Self(message)),
            None => Err("has no `content`".into()),
            Some(_) => Err("has a `content` that is not text".into()),
        }
    }
}

/// About the bytes of all that these fields hold.
pub fn bytes_of(fields: &Map<String, Value>) -> usize {
    fn bytes(value: &Value) -> usize {
        match value {
            Value::String(text) => text.len(),
            Value::Array(items) => items.iter().map(bytes).sum(),
            Value::Object(fields) => bytes_of(fields),
            Value::Null | Value::Bool(_) | Value::Number(_) => 8,
        }
    }
    fields.iter().map(|(key, value)| key.len() + bytes(value)).sum()
}

/// The messages of a conversation to learn from, or what is wrong with them.
pub fn parse_messages(value: Value) -> Result<Vec<Message>, String> {
    let Value::Array(messages) = value else { return Err("is not an array of messages".into()) };
    let parse =
        |(i, message)| Message::parse(message).map_err(|fault| format!("holds message {}, which {fault}", i + 1));
    let messages = messages.into_iter().enumerate().map(parse).collect::<Result<Vec<_>, _>>()?;
    if !messages.iter().any(Message::is_learned) {
        return Err("has no message of the assistant, so there is nothing to learn".into());
    }
    Ok(messages)
}
