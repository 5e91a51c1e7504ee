//! Length-prefixed MessagePack frames.

use serde::{Serialize, de::DeserializeOwned};
use std::io::{self, Read, Write};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Largest frame in bytes. The HTTP body limit bounds prompts far below this; a larger length can
/// only come from a broken peer.
pub const MAX_FRAME: usize = 256 << 20;

/// The reason why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error("the other process closed the connection")]
    Closed,
    #[error("a frame of {0} bytes is over the limit of {MAX_FRAME} bytes")]
    TooLarge(usize),
    #[error("a frame could not be encoded: {0}")]
    Encode(#[from] rmp_serde::encode::Error),
    #[error("a frame could not be decoded: {0}")]
    Decode(#[from] rmp_serde::decode::Error),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Encodes a message with its length prefix, ready to be written in one call.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let mut bytes = vec![0; 4];
    rmp_serde::encode::write_named(&mut bytes, message)?;
    let length = bytes.len() - 4;
    if length > MAX_FRAME {
        return Err(FrameError::TooLarge(length));
    }
    let prefix = u32::try_from(length).expect("MAX_FRAME fits in u32").to_le_bytes();
    bytes[..4].copy_from_slice(&prefix);
    Ok(bytes)
}

/// Decodes the payload of one frame, without its length prefix.
fn decode<T: DeserializeOwned>(payload: &[u8]) -> Result<T, FrameError> {
    Ok(rmp_serde::from_slice(payload)?)
}

pub fn write_frame<T: Serialize>(to: &mut impl Write, message: &T) -> Result<(), FrameError> {
    to.write_all(&encode(message)?)?;
    Ok(())
}

/// Reads one frame; returns [`FrameError::Closed`] at a clean end of the stream.
pub fn read_frame<T: DeserializeOwned>(from: &mut impl Read) -> Result<T, FrameError> {
    let mut prefix = [0; 4];
    match from.read_exact(&mut prefix) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(FrameError::Closed);
        }
        Err(error) => return Err(error.into()),
    }
    let length = u32::from_le_bytes(prefix) as usize;
    if length > MAX_FRAME {
        return Err(FrameError::TooLarge(length));
    }
    // Grow the buffer as bytes arrive: an invalid length must not cause a large allocation.
    let mut payload = Vec::with_capacity(length.min(64 << 10));
    from.take(length as u64).read_to_end(&mut payload)?;
    if payload.len() < length {
        return Err(FrameError::Closed);
    }
    decode(&payload)
}

/// Reads one frame without blocking the thread. `buffer` is reused from frame to frame.
///
/// # Errors
/// As [`read_frame`].
pub async fn next_frame<T: DeserializeOwned>(
    from: &mut (impl AsyncRead + Unpin),
    buffer: &mut Vec<u8>,
) -> Result<T, FrameError> {
    let length = from.read_u32_le().await.map_err(|_| FrameError::Closed)? as usize;
    if length > MAX_FRAME {
        return Err(FrameError::TooLarge(length));
    }
    buffer.clear();
    let got = from.take(length as u64).read_to_end(buffer).await?;
    if got < length {
        return Err(FrameError::Closed);
    }
    let frame = decode(buffer);
    if buffer.capacity() > 1 << 20 {
        *buffer = Vec::new();
    }
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_round_trip_and_end_cleanly() {
        let mut wire = Vec::new();
        write_frame(&mut wire, &("one", 1u32)).unwrap();
        write_frame(&mut wire, &("two", 2u32)).unwrap();
        let mut reader = wire.as_slice();
        assert_eq!(read_frame::<(String, u32)>(&mut reader).unwrap(), ("one".into(), 1));
        assert_eq!(read_frame::<(String, u32)>(&mut reader).unwrap(), ("two".into(), 2));
        assert!(matches!(read_frame::<(String, u32)>(&mut reader), Err(FrameError::Closed)));
    }

    #[test]
    fn a_broken_length_is_refused_before_allocation() {
        let wire = u32::MAX.to_le_bytes();
        assert!(matches!(read_frame::<u8>(&mut wire.as_slice()), Err(FrameError::TooLarge(_))));
        let short = [10, 0, 0, 0, 1, 2];
        assert!(matches!(read_frame::<u8>(&mut short.as_slice()), Err(FrameError::Closed)));
    }
}
