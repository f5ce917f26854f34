//! Files that grow by whole records and outlive a full disk.

use std::io::{self, Seek, SeekFrom, Write};

/// Writing only collects; `flush` brings everything collected to the file, or leaves it for the next flush. A record
/// that went in half is overwritten then, so what follows stays readable.
pub struct AppendFile<F> {
    file: F,
    /// Length of the file up to the last flush that succeeded.
    flushed: u64,
    pending: Vec<u8>,
}

impl<F: Write + Seek> AppendFile<F> {
    /// Goes on at the end of `file`, which nobody else may write.
    pub fn new(mut file: F) -> io::Result<Self> {
        let flushed = file.seek(SeekFrom::End(0))?;
        Ok(Self { file, flushed, pending: Vec::new() })
    }
}

impl<F: Write + Seek> Write for AppendFile<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.pending.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(self.flushed))?;
        self.file.write_all(&self.pending)?;
        self.flushed += self.pending.len() as u64;
        self.pending.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    /// A disk that holds `room` bytes.
    struct Disk {
        content: Cursor<Vec<u8>>,
        room: u64,
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let free = self.room.saturating_sub(self.content.position()) as usize;
            if free == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.content.write(&bytes[..bytes.len().min(free)])
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Seek for Disk {
        fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
            self.content.seek(to)
        }
    }

    #[test]
    fn records_that_met_a_full_disk_are_whole_once_there_is_room() {
        let mut file = AppendFile::new(Disk { content: Cursor::new(b"old\n".to_vec()), room: 12 }).unwrap();
        for (record, fits) in [("first\n", true), ("second\n", false), ("third\n", false)] {
            file.write_all(record.as_bytes()).unwrap();
            assert_eq!(file.flush().is_ok(), fits, "{record}");
        }
        assert_eq!(file.file.content.get_ref(), b"old\nfirst\nse");

        file.file.room = 100;
        file.flush().unwrap();
        assert_eq!(file.file.content.get_ref(), b"old\nfirst\nsecond\nthird\n");
    }
}
