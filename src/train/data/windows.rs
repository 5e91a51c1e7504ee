//! From a token stream to batches.
//!
//! An epoch cuts the stream into windows of equal length, starting at an offset given by the seed
//! and the epoch, and uses them in an order also given by them. So windows are random, but almost
//! every token is used once before any is used again. Attention does not cross document boundaries
//! within a window, and positions restart at each document. The end-of-text token of a document is
//! the first token of the next one.

use super::{Cursor, Order, Stream};
use crate::train::model::{Batch, Documents};
use sha2::{Digest, Sha256};
use std::io;
use std::sync::Arc;

/// The windows of a stream.
pub struct Windows<'a> {
    stream: &'a Stream,
    /// Tokens that a window predicts.
    length: usize,
    /// The end-of-text token.
    end: Option<u32>,
    /// Shuffle seed; `None` keeps the order of the stream.
    seed: Option<u64>,
    order: Order,
}

impl<'a> Windows<'a> {
    /// Windows of `length` tokens, or of the whole stream if it is shorter. The stream must have at
    /// least two tokens.
    pub fn new(stream: &'a Stream, length: usize, end: Option<u32>, seed: Option<u64>) -> Self {
        let targets = stream.len().saturating_sub(1);
        let length = (length as u64).min(targets).max(1);
        // Room for a random offset.
        let slack = if seed.is_some() { length - 1 } else { 0 };
        let count = (targets.saturating_sub(slack) / length).max(1) as usize;
        Self { stream, length: length as usize, end, seed, order: Order::new(count, seed) }
    }

    /// Windows per epoch.
    pub fn count(&self) -> usize {
        self.order.len()
    }

    /// The next `count` windows in batches of `each` windows; continues into the next epoch if
    /// necessary.
    ///
    /// # Errors
    /// If the stream cannot be read.
    pub fn next(
        &mut self,
        cursor: &mut Cursor,
        count: usize,
        each: usize,
    ) -> io::Result<Vec<Batch>> {
        let mut windows = Vec::with_capacity(count);
        for _ in 0..count {
            let index = self.order.next(cursor, 1).first().copied().unwrap_or(0);
            let start = self.offset(cursor.epoch) + (index * self.length) as u64;
            windows.push(self.stream.read(start, self.length + 1)?);
        }
        Ok(windows.chunks(each).map(|windows| self.batch(windows)).collect())
    }

    /// Passes the whole stream to `each` in consecutive windows, `together` windows at a time.
    /// Every token except the first is predicted once.
    ///
    /// # Errors
    /// If the stream cannot be read, and the errors of `each`.
    pub fn all<E: From<io::Error>>(
        &self,
        together: usize,
        mut each: impl FnMut(Batch) -> Result<(), E>,
    ) -> Result<(), E> {
        let targets = self.stream.len().saturating_sub(1);
        let starts: Vec<u64> = (0..targets).step_by(self.length).collect();
        for starts in starts.chunks(together.max(1)) {
            let read = |start: &u64| {
                self.stream.read(*start, (targets - start).min(self.length as u64) as usize + 1)
            };
            each(self.batch(&starts.iter().map(read).collect::<io::Result<Vec<_>>>()?))?;
        }
        Ok(())
    }

    /// Offset of the first window of an epoch.
    fn offset(&self, epoch: u64) -> u64 {
        let Some(seed) = self.seed else { return 0 };
        let slack = self.stream.len() - 1 - (self.count() * self.length) as u64;
        let mut hash = Sha256::new();
        hash.update("offset");
        hash.update(seed.to_le_bytes());
        hash.update(epoch.to_le_bytes());
        let bytes: [u8; 32] = hash.finalize().into();
        u64::from_le_bytes(bytes[..8].try_into().unwrap_or_default()) % (slack + 1)
    }

    /// A batch of windows side by side. Each window has one token more than it predicts.
    fn batch(&self, windows: &[Vec<u32>]) -> Batch {
        let (mut tokens, mut targets, mut starts) = (Vec::new(), Vec::new(), Vec::new());
        for window in windows {
            let Some((_, inputs)) = window.split_last() else { continue };
            for (at, token) in inputs.iter().enumerate() {
                if at == 0 || Some(*token) == self.end {
                    starts.push(tokens.len() + at);
                }
            }
            tokens.extend_from_slice(inputs);
            targets.extend_from_slice(&window[1..]);
        }
        let weights = Arc::new(vec![1.0; tokens.len()]);
        let documents = Arc::new(Documents::starting_at(&starts, tokens.len()));
        let (tokens, targets) = (Arc::new(tokens), Arc::new(targets));
        Batch { tokens, documents, targets, weights }
    }
}

#[cfg(test)]
mod tests {
    use super::super::prepare_stream;
    use super::super::tests::Bytes;
    use super::*;

    fn stream(text: &str) -> Stream {
        let folder = tempfile::tempdir().unwrap();
        let (source, cache) = (folder.path().join("data"), folder.path().join("data.bin"));
        std::fs::write(&source, text).unwrap();
        prepare_stream(&source, &Bytes::new(), &cache, |_| {}).unwrap().0
    }

    fn counted(count: u32) -> Stream {
        // Letters that give their position modulo 26.
        stream(&(0..count - 1).map(|i| char::from(b'a' + (i % 26) as u8)).collect::<String>())
    }

    #[test]
    fn documents_end_and_begin_with_their_mark() {
        let text = "{\"text\": \"abc\"}\n{\"text\": \"\"}\n{\"text\": \"de\"}\n";
        let stream = stream(text);
        assert_eq!(stream.read(0, 7).unwrap(), [97, 98, 99, 257, 100, 101, 257]);
        let windows = Windows::new(&stream, 6, Some(257), None);
        let mut batches = Vec::new();
        windows
            .all::<io::Error>(8, |batch| {
                batches.push(batch);
                Ok(())
            })
            .unwrap();
        assert_eq!(batches.len(), 1);
        assert_eq!(*batches[0].tokens, [97, 98, 99, 257, 100, 101]);
        assert_eq!(*batches[0].targets, [98, 99, 257, 100, 101, 257]);
        assert_eq!(*batches[0].documents, Documents::starting_at(&[0, 3], 6));
    }

    #[test]
    fn all_windows_predict_every_token_once() {
        let stream = counted(1000);
        let windows = Windows::new(&stream, 64, Some(257), Some(1));
        let mut targets = Vec::new();
        windows
            .all::<io::Error>(3, |batch| {
                targets.extend_from_slice(&batch.targets);
                Ok(())
            })
            .unwrap();
        assert_eq!(targets, stream.read(1, 999).unwrap());
    }

    #[test]
    fn random_windows_cover_an_epoch_and_go_on_from_a_cursor() {
        let stream = counted(1000);
        let run = |mut cursor: Cursor, steps: usize| {
            let mut windows = Windows::new(&stream, 16, Some(257), Some(1));
            let mut taken = Vec::new();
            for _ in 0..steps {
                for batch in windows.next(&mut cursor, 5, 2).unwrap() {
                    taken.extend(batch.tokens.chunks(16).map(<[u32]>::to_vec));
                }
            }
            (taken, cursor)
        };
        let count = Windows::new(&stream, 16, Some(257), Some(1)).count();
        assert_eq!(count, 61);
        let (all, _) = run(Cursor::default(), 40);
        let (head, cursor) = run(Cursor::default(), 13);
        assert_eq!(all[..65], head);
        assert_eq!((cursor.epoch, cursor.taken), (1, 4));
        assert_eq!(all[65..], run(cursor, 27).0);
        // The windows of an epoch are adjacent; those of the next epoch have another offset and
        // another order.
        let first =
            |windows: &[Vec<u32>]| windows.iter().map(|window| window[0] % 26).collect::<Vec<_>>();
        assert_ne!(first(&all[..61]), first(&all[61..122]));
        let seen: usize = all[..61].iter().map(Vec::len).sum();
        assert_eq!(seen, 61 * 16);
        // A stream shorter than a window is one window.
        let short = counted(10);
        let mut windows = Windows::new(&short, 64, None, Some(1));
        let batch = windows.next(&mut Cursor::default(), 1, 1).unwrap().remove(0);
        assert_eq!((windows.count(), batch.tokens.len()), (1, 9));
    }

    #[test]
    fn a_share_at_the_end_is_held_out() {
        let stream = counted(1000);
        let (train, held) = stream.hold_out(0.05);
        assert_eq!((train.len(), held.len()), (950, 50));
        assert_eq!(held.read(0, 50).unwrap(), stream.read(950, 50).unwrap());
    }
}
