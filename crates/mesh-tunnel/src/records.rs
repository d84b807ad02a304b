// SPDX-License-Identifier: Apache-2.0
//! The record layer of TLS 1.3 (RFC 8446, 5), with keys that rustls has agreed on.
//!
//! Records are sealed and opened in place in the caller's buffers: no copy and no allocation per
//! record, and many records per system call, which rustls's own connection types do not offer. This
//! module owns nonces and the layout of records; keys come from rustls, ciphers from aws-lc.

use std::ops::Range;

use aws_lc_rs::aead::{
    AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey,
};
use rustls::ConnectionTrafficSecrets;

/// Bytes before a record's content: type, version, length.
pub const HEAD: usize = 5;

/// The most content of one record (RFC 8446, 5.1: 2^14).
pub const CONTENT: usize = 1 << 14;

/// Bytes of a record of ours besides its content: header, inner type and tag.
pub const OVERHEAD: usize = HEAD + 1 + TAG;

/// The length of a full record of ours.
pub const FULL: usize = CONTENT + OVERHEAD;

/// The longest record a peer may send (RFC 8446, 5.2: content, and 256 for all else).
pub const LONGEST: usize = HEAD + CONTENT + 256;

const TAG: usize = 16;
const APPLICATION_DATA: u8 = 23;

/// The number of records after which a key is replaced. AES-GCM allows 2^24.5 full records (RFC 8446,
/// 5.5); half of 2^24 leaves time for the replacement.
const REKEY_AFTER: u64 = 1 << 23;

/// Type of a record's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An alert.
    Alert = 21,
    /// Messages after the handshake: tickets, key updates.
    Handshake = 22,
    /// The tunnel's bytes.
    Data = 23,
}

/// A record cannot be sealed or opened, which always ends the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// The outer type is not "application data", as all protected records have.
    #[error("a record of type {0} is not protected")]
    Unprotected(u8),
    /// The record is longer than allowed, or too short for a tag.
    #[error("invalid record length {0}")]
    Length(usize),
    /// The tag is wrong.
    #[error("record authentication failed")]
    Forged,
    /// The inner type is missing or not one that may come after the handshake.
    #[error("missing or invalid inner content type")]
    Inner,
    /// The cipher suite is not one of TLS 1.3.
    #[error("unsupported cipher suite")]
    Suite,
    /// The cryptographic library failed, which it does not with correct lengths.
    #[error("the cipher failed to seal a record")]
    Seal,
}

/// One direction's key, and the number of the next record.
struct RecordKey {
    key: LessSafeKey,
    iv: [u8; NONCE_LEN],
    sequence: u64,
}

impl RecordKey {
    fn new(sequence: u64, secrets: &ConnectionTrafficSecrets) -> Result<Self, RecordError> {
        let (algorithm, key, iv) = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(RecordError::Suite),
        };
        let key = key.as_ref();
        let key = key.get(..algorithm.key_len()).ok_or(RecordError::Suite)?;
        let key = UnboundKey::new(algorithm, key).map_err(|_unspecified| RecordError::Suite)?;
        let iv = iv
            .as_ref()
            .try_into()
            .map_err(|_length| RecordError::Suite)?;
        Ok(Self {
            key: LessSafeKey::new(key),
            iv,
            sequence,
        })
    }

    /// The nonce of the next record (RFC 8446, 5.3). A sequence number is never used twice: the
    /// sealer replaces its key long before it could wrap, and an opener's record then fails.
    fn nonce(&mut self) -> Nonce {
        let mut nonce = self.iv;
        for (byte, number) in nonce[4..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= number;
        }
        self.sequence = self.sequence.wrapping_add(1);
        Nonce::assume_unique_for_key(nonce)
    }
}

/// Seals our records.
pub struct RecordSealer(RecordKey);

impl RecordSealer {
    /// Makes one from the next record's sequence number and the key.
    ///
    /// # Errors
    /// The cipher suite is not one of TLS 1.3.
    pub fn new(sequence: u64, secrets: &ConnectionTrafficSecrets) -> Result<Self, RecordError> {
        RecordKey::new(sequence, secrets).map(Self)
    }

    /// Whether the key must be replaced before more is sealed.
    #[must_use]
    pub const fn worn(&self) -> bool {
        self.0.sequence >= REKEY_AFTER
    }

    /// Seals the `length` bytes that lie at `slot[HEAD..]`, in place, and returns the record's
    /// length: `length + OVERHEAD`, from the slot's beginning.
    ///
    /// # Errors
    /// The slot is too short, or the content is longer than [`CONTENT`].
    pub fn seal(
        &mut self,
        slot: &mut [u8],
        length: usize,
        kind: Kind,
    ) -> Result<usize, RecordError> {
        let total = length + OVERHEAD;
        if length > CONTENT || slot.len() < total {
            return Err(RecordError::Length(length));
        }
        let head = head(total - HEAD);
        let (front, rest) = slot.split_at_mut(HEAD);
        front.copy_from_slice(&head);
        let (inner, rest) = rest.split_at_mut(length + 1);
        inner[length] = kind as u8;
        let nonce = self.0.nonce();
        let tag = self
            .0
            .key
            .seal_in_place_separate_tag(nonce, Aad::from(head), inner)
            .map_err(|_unspecified| RecordError::Seal)?;
        rest[..TAG].copy_from_slice(tag.as_ref());
        Ok(total)
    }
}

/// Opens the peer's records.
pub struct RecordOpener(RecordKey);

impl RecordOpener {
    /// Makes one from the next record's sequence number and the key.
    ///
    /// # Errors
    /// The cipher suite is not one of TLS 1.3.
    pub fn new(sequence: u64, secrets: &ConnectionTrafficSecrets) -> Result<Self, RecordError> {
        RecordKey::new(sequence, secrets).map(Self)
    }

    /// Opens a whole record in place, and returns the range of its content in `record`.
    ///
    /// # Errors
    /// The record is not exactly what the peer sealed.
    pub fn open(&mut self, record: &mut [u8]) -> Result<(Kind, Range<usize>), RecordError> {
        let Some((front, body)) = record.split_first_chunk_mut::<HEAD>() else {
            return Err(RecordError::Length(record.len()));
        };
        let nonce = self.0.nonce();
        let plain = self
            .0
            .key
            .open_in_place(nonce, Aad::from(*front), body)
            .map_err(|_unspecified| RecordError::Forged)?;
        if plain.len() > CONTENT + 1 {
            return Err(RecordError::Length(plain.len()));
        }
        // The inner type is the last byte that is not padding (RFC 8446, 5.4).
        let last = plain
            .iter()
            .rposition(|byte| *byte != 0)
            .ok_or(RecordError::Inner)?;
        let kind = match plain[last] {
            21 => Kind::Alert,
            22 => Kind::Handshake,
            23 => Kind::Data,
            _ => return Err(RecordError::Inner),
        };
        Ok((kind, HEAD..HEAD + last))
    }
}

/// The length of the record at the beginning of `input`, with its header. `None` if the header is not
/// complete.
///
/// # Errors
/// No protected record has such a header.
pub fn length(input: &[u8]) -> Result<Option<usize>, RecordError> {
    let Some(&[kind, _, _, high, low]) = input.first_chunk::<HEAD>() else {
        return Ok(None);
    };
    if kind != APPLICATION_DATA {
        return Err(RecordError::Unprotected(kind));
    }
    let length = usize::from(u16::from_be_bytes([high, low]));
    if length <= TAG || HEAD + length > LONGEST {
        return Err(RecordError::Length(length));
    }
    Ok(Some(HEAD + length))
}

fn head(length: usize) -> [u8; HEAD] {
    let [.., high, low] = length.to_be_bytes();
    // Protected records say TLS 1.2 (RFC 8446, 5.2).
    [APPLICATION_DATA, 3, 3, high, low]
}

#[cfg(any(test, fuzzing))]
pub mod fuzz;
#[cfg(test)]
mod tests {
    use aws_lc_rs::aead::Algorithm;

    use super::*;

    fn keyed(algorithm: &'static Algorithm) -> RecordKey {
        let key = vec![7; algorithm.key_len()];
        RecordKey {
            key: LessSafeKey::new(UnboundKey::new(algorithm, &key).unwrap()),
            iv: [9; NONCE_LEN],
            sequence: 0,
        }
    }

    fn pair() -> (RecordSealer, RecordOpener) {
        (
            RecordSealer(keyed(&AES_128_GCM)),
            RecordOpener(keyed(&AES_128_GCM)),
        )
    }

    #[test]
    fn sealed_records_open_once_and_in_order() {
        for algorithm in [&AES_128_GCM, &AES_256_GCM, &CHACHA20_POLY1305] {
            let (mut sealer, mut opener) = (
                RecordSealer(keyed(algorithm)),
                RecordOpener(keyed(algorithm)),
            );
            for (kind, length) in [
                (Kind::Data, CONTENT),
                (Kind::Data, 1),
                (Kind::Handshake, 40),
                (Kind::Alert, 2),
                (Kind::Data, 0),
            ] {
                let mut slot = vec![0x5a; FULL];
                let total = sealer.seal(&mut slot, length, kind).unwrap();
                assert_eq!(total, length + OVERHEAD);
                assert_eq!(super::length(&slot), Ok(Some(total)));
                let (got, range) = opener.open(&mut slot[..total]).unwrap();
                assert_eq!((got, range.len()), (kind, length));
                assert!(slot[range].iter().all(|byte| *byte == 0x5a));
            }
        }
    }

    #[test]
    fn modified_record_does_not_open() {
        for at in [0, 4, 5, 20, 5 + 32 + TAG] {
            let (mut sealer, mut opener) = pair();
            let mut slot = vec![1; FULL];
            let total = sealer.seal(&mut slot, 32, Kind::Data).unwrap();
            slot[at] ^= 1;
            let opened = opener.open(&mut slot[..total]);
            assert_eq!(opened, Err(RecordError::Forged), "byte {at}");
        }
    }

    #[test]
    fn replayed_record_does_not_open() {
        let (mut sealer, mut opener) = pair();
        let mut slot = vec![1; FULL];
        let total = sealer.seal(&mut slot, 32, Kind::Data).unwrap();
        let mut again = slot.clone();
        opener.open(&mut slot[..total]).unwrap();
        assert_eq!(opener.open(&mut again[..total]), Err(RecordError::Forged));
    }

    #[test]
    fn invalid_record_headers_are_refused() {
        assert_eq!(length(&[23, 3, 3, 0]), Ok(None));
        assert_eq!(length(&[20, 3, 3, 0, 1]), Err(RecordError::Unprotected(20)));
        assert_eq!(length(&[23, 3, 3, 0, 16]), Err(RecordError::Length(16)));
        assert_eq!(
            length(&[23, 3, 3, 0x41, 1]),
            Err(RecordError::Length(0x4101))
        );
        assert_eq!(length(&[23, 3, 3, 0x41, 0]), Ok(Some(LONGEST)));
    }

    #[test]
    fn padding_is_removed_and_padding_alone_is_refused() {
        let seal = |inner: &[u8]| {
            let mut key = keyed(&AES_128_GCM);
            let mut record = head(inner.len() + TAG).to_vec();
            let aad = Aad::from(head(inner.len() + TAG));
            let mut body = inner.to_vec();
            let nonce = key.nonce();
            let tag = key.key.seal_in_place_separate_tag(nonce, aad, &mut body);
            record.extend(body);
            record.extend(tag.unwrap().as_ref());
            record
        };
        let open = |mut record: Vec<u8>| RecordOpener(keyed(&AES_128_GCM)).open(&mut record);
        assert_eq!(open(seal(&[1, 2, 23, 0, 0])), Ok((Kind::Data, 5..7)));
        assert_eq!(open(seal(&[0, 0, 0])), Err(RecordError::Inner));
        assert_eq!(open(seal(&[1, 20])), Err(RecordError::Inner));
    }

    #[test]
    fn key_is_worn_after_its_record_limit() {
        let (mut sealer, _) = pair();
        assert!(!sealer.worn());
        sealer.0.sequence = REKEY_AFTER;
        assert!(sealer.worn());
    }

    #[test]
    fn content_that_exceeds_a_record_is_refused() {
        let (mut sealer, _) = pair();
        let mut slot = vec![0; FULL - 1];
        let refused = sealer.seal(&mut slot, CONTENT, Kind::Data);
        assert_eq!(refused, Err(RecordError::Length(CONTENT)));
        let mut slot = vec![0; FULL + 1];
        let refused = sealer.seal(&mut slot, CONTENT + 1, Kind::Data);
        assert_eq!(refused, Err(RecordError::Length(CONTENT + 1)));
    }
}
