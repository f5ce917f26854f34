//! Plain text: one file is one document, read in pieces.

use std::io::{BufRead, Read};

use super::Content;
use super::records::{Parsed, Place, Record, Records, unreadable};
use crate::Result;

/// A piece ends with the last blank line in this many bytes; failing that, the last line; failing that, the last
/// whole character. Where a piece ends depends on nothing but where it begins, so tokens do not depend on where
/// reading was resumed, and memory does not depend on the file's size.
const PIECE_BYTES: usize = 64 * 1024;

pub struct TextPieces {
    reader: Box<dyn BufRead + Send>,
    name: String,
    place: Place,
    /// What was read ahead, from `place.offset` on.
    buffer: Vec<u8>,
}

impl TextPieces {
    pub fn new(reader: Box<dyn BufRead + Send>, name: &str, place: Place) -> Self {
        Self { reader, name: name.to_owned(), place, buffer: Vec::new() }
    }
}

impl Records for TextPieces {
    fn next(&mut self) -> Result<Option<Parsed>> {
        // One byte more than a piece tells whether the file goes on.
        let missing = (PIECE_BYTES + 1 - self.buffer.len()) as u64;
        let read = self.reader.by_ref().take(missing).read_to_end(&mut self.buffer);
        read.map_err(unreadable(&self.name, self.place.line))?;
        if self.buffer.is_empty() {
            return Ok(None);
        }

        let ends = self.buffer.len() <= PIECE_BYTES;
        let len = if ends { self.buffer.len() } else { piece_len(&self.buffer[..PIECE_BYTES]) };
        let rest = self.buffer.split_off(len);
        let bytes = std::mem::replace(&mut self.buffer, rest);
        let start = self.place;
        self.place.offset += len as u64;
        self.place.line += newlines(&bytes);

        Ok(Some(match String::from_utf8(bytes) {
            Ok(text) => Ok(Content::Text(Record { text: without_bom(text, start), begins: start.offset == 0, ends })),
            Err(error) => {
                let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
                Err(format!("{}:{}: not valid UTF-8", self.name, start.line + newlines(good) + 1))
            }
        }))
    }

    fn place(&self) -> Place {
        self.place
    }
}

fn piece_len(bytes: &[u8]) -> usize {
    let after = |pattern: &[u8]| Some(bytes.windows(pattern.len()).rposition(|w| w == pattern)? + pattern.len());
    let last_character = || bytes.iter().rposition(|byte| byte & 0xc0 != 0x80).filter(|&start| start > 0);
    after(b"\n\n").or_else(|| after(b"\n")).or_else(last_character).unwrap_or(bytes.len())
}

fn newlines(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|&&byte| byte == b'\n').count() as u64
}

/// Editors on Windows mark UTF-8 with a byte order mark, which is no text.
pub fn without_bom(text: String, start: Place) -> String {
    match text.strip_prefix('\u{feff}') {
        Some(rest) if start.offset == 0 => rest.to_owned(),
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    fn pieces(text: &str) -> Vec<Record> {
        let mut reader = TextPieces::new(Box::new(Cursor::new(text.to_owned())), "a.txt", Place::default());
        let pieces = std::iter::from_fn(|| reader.next().unwrap()).map(Result::unwrap);
        pieces.map(|piece| if let Content::Text(record) = piece { record } else { panic!("{piece:?}") }).collect()
    }

    #[test]
    fn a_piece_ends_with_a_blank_line_or_a_line_or_a_character() {
        let paragraph = format!("{}\n\n", "a".repeat(PIECE_BYTES / 2));
        let line = format!("{}\n", "b".repeat(PIECE_BYTES / 2));
        // Three bytes each, so that a character straddles the end of the piece.
        let solid = "€".repeat(PIECE_BYTES / 3 + 1);
        let text = [&paragraph[..], &line, &line, &solid].concat();
        let pieces = pieces(&text);
        let lengths: Vec<usize> = pieces.iter().map(|piece| piece.text.len()).collect();
        let full = PIECE_BYTES / 3 * 3;
        assert_eq!(lengths, [paragraph.len(), line.len(), line.len(), full, solid.len() - full]);
        assert!(pieces.iter().flat_map(|piece| piece.text.bytes()).eq(text.bytes()));
        assert_eq!(pieces.iter().map(|piece| piece.begins).collect::<Vec<_>>(), [true, false, false, false, false]);
        assert_eq!(pieces.iter().map(|piece| piece.ends).collect::<Vec<_>>(), [false, false, false, false, true]);
    }

    #[test]
    fn a_file_of_exactly_one_piece_is_not_cut() {
        let text = "a\n".repeat(PIECE_BYTES / 2);
        assert_eq!(pieces(&text), [Record::document(text)]);
    }
}
