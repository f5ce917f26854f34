//! The stories that titan ships, one document each.

use super::records::{Parsed, Place, Record, Records};
use crate::Result;
use crate::data::stories::{self, Split};

pub struct Stories {
    split: Split,
    next: u64,
}

impl Stories {
    pub fn new(split: Split, place: Place) -> Self {
        Self { split, next: place.offset }
    }
}

impl Records for Stories {
    fn next(&mut self) -> Result<Option<Parsed>> {
        if self.next >= stories::len(self.split) {
            return Ok(None);
        }
        self.next += 1;
        Ok(Some(Ok(Record::document(stories::story(self.split, self.next - 1)))))
    }

    fn place(&self) -> Place {
        Place { offset: self.next, line: self.next }
    }
}
