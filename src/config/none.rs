//! The string "none" stands for an absent optional value, because TOML has no null.

use serde::de::value::{MapDeserializer, SeqDeserializer};
use serde::de::{DeserializeOwned, IntoDeserializer, Visitor};
use serde::{Deserializer, Serialize, forward_to_deserialize_any};
use toml::{Table, Value};

use super::schema::Key;

/// Reads a `T`, taking "none" for `None` wherever `T` has an `Option`.
pub fn from_table<T: DeserializeOwned>(table: Table) -> Result<T, toml::de::Error> {
    T::deserialize(Nullable(Value::Table(table)))
}

/// Every one of `keys`, "none" where `value` has `None`.
///
/// Serde leaves out what is `None`; a key that has a default and is missing is such a one.
pub fn to_table(value: &impl Serialize, keys: &[Key]) -> Table {
    complete(Table::try_from(value).expect("config structs have only TOML's types"), keys)
}

fn complete(mut table: Table, keys: &[Key]) -> Table {
    let complete_key = |key: &Key| {
        let value = match (table.remove(&key.name), key.shape.keys()) {
            (Some(Value::Table(inner)), Some(keys)) => Value::Table(complete(inner, keys)),
            (Some(value), _) => value,
            (None, _) => key.default.as_ref().map(|_| "none".into())?,
        };
        Some((key.name.clone(), value))
    };
    keys.iter().filter_map(complete_key).collect()
}

struct Nullable(Value);

impl<'de> Deserializer<'de> for Nullable {
    type Error = toml::de::Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        match self.0 {
            Value::Table(table) => {
                visitor.visit_map(MapDeserializer::new(table.into_iter().map(|(key, value)| (key, Self(value)))))
            }
            Value::Array(items) => visitor.visit_seq(SeqDeserializer::new(items.into_iter().map(Self))),
            value => value.deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        match self.0.as_str() {
            Some("none" | "None") => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        self.0.deserialize_enum(name, variants, visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_newtype_struct(self)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf
        unit unit_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

impl<'de> IntoDeserializer<'de, toml::de::Error> for Nullable {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}
